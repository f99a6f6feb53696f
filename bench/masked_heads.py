"""Attention with its projections where some of the heads are masked: what it saves.

NeighborhoodAttention with all heads, and with a HeadGate that leaves some of them, here and there.
What the masked ones give is verified against the definition of a module that has only the others;
ratios are shares of the time without a gate. Gradients are those of x and all parameters.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn

from fastgt import implementation, prune_heads
from fastgt.bench.attention import draw, load, shape
from fastgt.bench.harness import Case, Provider
from fastgt.nn import HeadGate, NeighborhoodAttention


def case(
    problem: str,
    *,
    heads: int = 8,
    width: int = 64,
    active: tuple[int, ...] | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> Case:
    """``active``: numbers of heads, each a provider beside "no gate"; by default one, a quarter, a
    half, three quarters and all of them."""
    counts = active or sorted({1, *(max(1, heads * i // 4) for i in (1, 2, 3, 4))})
    graph = load(problem, device)
    torch.manual_seed(0)
    full = NeighborhoodAttention(heads * width, heads).to(device, dtype)
    x, do = draw([(graph.num_nodes, heads * width)] * 2, dtype, device)
    order = torch.randperm(heads, generator=torch.Generator().manual_seed(0))
    modules: dict[str, nn.Module] = {"no gate": full}
    for count in counts:
        module = copy.deepcopy(full)
        module.head_gate = HeadGate(torch.zeros(heads).index_fill(0, order[:count], 1)).to(device)
        modules[f"{count} of {heads}"] = module

    def provider(module: nn.Module) -> Provider:
        return Provider(lambda x: module(x, graph), tuple(module.parameters()))

    def definition(module: nn.Module) -> Callable[[torch.dtype], Provider]:
        """As if the masked heads had never been there."""
        removed = prune_heads(module)

        def in_precision(dtype: torch.dtype) -> Provider:
            wide = copy.deepcopy(removed).to(dtype)

            def call(x: Tensor) -> Tensor:
                with implementation("reference"):
                    return wide(x, graph)

            return Provider(call)

        return in_precision

    return Case(
        shape=shape(problem, graph, heads, width, dtype),
        inputs={"x": x},
        upstream=do,
        definition=definition(full),
        definitions={name: definition(module) for name, module in modules.items()},
        providers={name: lambda m=module: provider(m) for name, module in modules.items()},
    )
