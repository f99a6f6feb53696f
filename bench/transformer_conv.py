"""fastgt.pyg.TransformerConv with edge features against torch-geometric's own code.

Parameters are the same. Gradients are those of x, the edge attributes and all parameters.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from fastgt import Graph, implementation
from fastgt.bench.attention import draw, load, shape
from fastgt.bench.harness import Case, Provider

if TYPE_CHECKING:
    from fastgt.pyg import TransformerConv


def case(
    problem: str,
    *,
    heads: int = 8,
    width: int = 16,
    edge_dim: int = 16,
    in_channels: int = 128,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> Case:
    """``edge_dim`` attributes an edge, ``in_channels`` a node.

    Raises:
        ImportError: torch-geometric is not installed.
        ValueError: The layer would run torch-geometric's own code.
    """
    from fastgt.pyg import TransformerConv

    graph = load(problem, device)
    torch.manual_seed(0)
    ours = TransformerConv(in_channels, width, heads, edge_dim=edge_dim).to(device, dtype)
    x, edge_attr, do = draw(
        [
            (graph.num_nodes, in_channels),
            (graph.num_edges, edge_dim),
            (graph.num_nodes, heads * width),
        ],
        dtype,
        device,
    )

    def provider(conv: nn.Module, edges: object) -> Provider:
        return Provider(lambda x, e: conv(x, edges, e), tuple(conv.parameters()))

    def definition(dtype: torch.dtype) -> Provider:
        conv = copy.deepcopy(ours).to(dtype)

        def call(x: Tensor, edge_attr: Tensor) -> Tensor:
            with implementation("reference"):
                return conv(x, graph, edge_attr)

        return Provider(call, tuple(conv.parameters()))

    def compiled() -> Provider:
        # every module and shape is compiled anew, and beyond some of them none would be
        torch.compiler.reset()
        theirs, edge_index = _pyg(ours), graph.edge_index
        call = torch.compile(theirs, dynamic=True)
        return Provider(lambda x, e: call(x, edge_index, e), tuple(theirs.parameters()))

    extra = {"edge_dim": edge_dim, "in_channels": in_channels}
    return Case(
        shape=shape(problem, graph, heads, width, dtype) | extra,
        inputs={"x": x, "edge_attr": edge_attr},
        upstream=do,
        definition=definition,
        providers={
            "fastgt": lambda: provider(ours, graph),
            "pyg": lambda: provider(_pyg(ours), graph.edge_index),
            "pyg, compiled": compiled,
        },
        parameters=tuple(name for name, _ in ours.named_parameters()),
        terms=_terms(ours, graph, x, edge_attr, do),
    )


def _pyg(ours: TransformerConv) -> nn.Module:
    """PyG's module with the parameters of ours."""
    from torch_geometric.nn import TransformerConv as PyG

    theirs = PyG(ours.in_channels, ours.out_channels, ours.heads, edge_dim=ours.edge_dim)
    theirs.load_state_dict(ours.state_dict())
    return theirs.to(ours.lin_key.weight)


def _terms(
    conv: TransformerConv, graph: Graph, x: Tensor, edge_attr: Tensor, do: Tensor
) -> dict[str, Tensor]:
    """Sizes of what the gradients of biases are sums of: over all nodes, in whatever order; of the
    keys' nothing is left but roundings, for a softmax does not see what all keys have in common."""
    found: dict[str, Tensor] = {}

    def take(name: str) -> Callable[..., None]:
        return lambda module, inputs, outputs: found.update({name: outputs[0].abs().sum(0)})

    hooks = [
        module.register_full_backward_hook(take(f"{name}.bias"))
        for name, module in conv.named_children()
    ]
    conv(x.detach().requires_grad_(), graph, edge_attr).backward(do)
    for hook in hooks:
        hook.remove()
    conv.zero_grad()
    if conv.why_pyg:
        raise ValueError(f"fastgt.pyg.TransformerConv is not fused: {conv.why_pyg}")
    return found
