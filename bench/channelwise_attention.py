"""Vector attention against what users would otherwise run."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fastgt import channelwise_attention, reference
from fastgt.bench.attention import draw, load, shape
from fastgt.bench.harness import Case, Provider
from fastgt.bench.roofline import Work


def case(
    problem: str,
    *,
    heads: int = 8,
    width: int = 16,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> Case:
    """A softmax over each node's edges for every channel, as Point Transformer's."""
    graph = load(problem, device)
    channels = heads * width
    logits, v, do = draw(
        [(graph.num_edges, channels), (graph.num_cols, channels), (graph.num_rows, channels)],
        dtype,
        device,
    )
    (source, target), size = graph.edge_index, graph.num_rows

    def composed(softmax: Callable[[Tensor], Tensor], scatter: Callable[[Tensor], Tensor]):  # type: ignore[no-untyped-def]
        return Provider(lambda logits, v: scatter(softmax(logits) * v[source]))

    def pyg() -> Provider:
        from torch_geometric.utils import scatter, softmax

        return composed(
            lambda x: softmax(x, target, num_nodes=size),
            lambda x: scatter(x, target, dim=0, dim_size=size),
        )

    def torch_scatter() -> Provider:
        from torch_scatter import scatter_add, scatter_softmax

        return composed(
            lambda x: scatter_softmax(x, target, dim=0, dim_size=size),
            lambda x: scatter_add(x, target, dim=0, dim_size=size),
        )

    node, edge = channels * dtype.itemsize, graph.num_edges
    index = graph.col.element_size() * (2 * edge + size)
    once = (size + graph.num_cols + edge) * node + index
    forward = Work(once, edge * node, 5 * edge * channels)
    backward = Work(2 * once, 3 * edge * node, 8 * edge * channels)
    return Case(
        shape=shape(problem, graph, heads, width, dtype),
        inputs={"logits": logits, "v": v},
        upstream=do,
        definition=lambda dtype: Provider(
            lambda logits, v: reference.channelwise_attention(logits, v, graph)
        ),
        providers={
            "fastgt": lambda: Provider(lambda x, v: channelwise_attention(x, v, graph)),
            "pyg": pyg,
            "torch-scatter": torch_scatter,
        },
        work={"forward": forward, "backward": backward, "both": forward + backward},
    )
