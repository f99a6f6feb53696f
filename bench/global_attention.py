"""Softmax attention within the graphs of a ragged batch, against padded batches."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from fastgt import global_attention, reference
from fastgt.bench.attention import draw
from fastgt.bench.harness import Case, Provider
from fastgt.bench.linear_attention import padding, sizes_of
from fastgt.bench.roofline import Work, passes


def case(
    problem: str,
    *,
    heads: int = 4,
    width: int = 16,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> Case:
    """Every node attends to all nodes of its graph; of a problem the graphs, without edges."""
    sizes, offsets = sizes_of(problem, device)
    q, k, v, do = draw([(int(offsets[-1]), heads, width)] * 4, dtype, device)

    def padded() -> Provider:
        """Padding, a mask of the keys, PyTorch's attention, and out of the padding."""
        dense, packed = padding(sizes)
        there = torch.arange(int(sizes.max()), device=device) < sizes[:, None]
        mask = there[:, None, None]  # [G, 1, 1, largest]

        def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            heads_first = (dense(x).transpose(1, 2) for x in (q, k, v))
            out = scaled_dot_product_attention(*heads_first, attn_mask=mask)
            return packed(out.transpose(1, 2))

        return Provider(call)

    def pyg() -> Provider:
        """As GPSConv goes through ``torch.nn.MultiheadAttention``, without its projections."""
        from torch_geometric.utils import to_dense_batch

        batch = torch.arange(len(sizes), device=device).repeat_interleave(sizes)

        def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            found = [to_dense_batch(x.flatten(1), batch) for x in (q, k, v)]
            mask = found[0][1]
            split = (x.unflatten(2, (heads, width)).transpose(1, 2) for x, _ in found)
            padded = torch.zeros_like(mask, dtype=dtype).masked_fill(~mask, -math.inf)
            out = scaled_dot_product_attention(*split, attn_mask=padded[:, None, None])
            return out.transpose(1, 2)[mask]

        return Provider(call)

    providers: dict[str, Callable[[], Provider]] = {
        "fastgt": lambda: Provider(lambda q, k, v: global_attention(q, k, v, offsets)),
        "padded SDPA": padded,
        "pyg": pyg,
    }
    nodes, graphs, item = len(q), len(sizes), dtype.itemsize
    pairs = int(sizes.square().sum())
    once = Work(4 * nodes * heads * width * item, 0, 4 * pairs * heads * width)
    back = Work(8 * nodes * heads * width * item, 0, 10 * pairs * heads * width)
    return Case(
        shape={
            "problem": problem,
            "rows": nodes,
            "graphs": graphs,
            "heads": heads,
            "width": width,
            "dtype": str(dtype).removeprefix("torch."),
            "node_order": "as loaded",
        },
        inputs={"q": q, "k": k, "v": v},
        upstream=do,
        definition=lambda dtype: Provider(
            lambda q, k, v: reference.global_attention(q, k, v, offsets)
        ),
        providers=providers,
        work=passes(once, back),
    )
