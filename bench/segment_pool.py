"""Pooling over the graphs of a batch against what users would otherwise run."""

from __future__ import annotations

import torch
from torch import Tensor

from fastgt import segment_mean
from fastgt.bench.attention import draw, load, shape
from fastgt.bench.harness import Case, Provider
from fastgt.bench.roofline import Work, passes


def case(
    problem: str,
    *,
    heads: int = 8,
    width: int = 16,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> Case:
    """Means over the nodes of each graph, of all channels of all heads."""
    graph = load(problem, device)
    channels = heads * width
    offsets = graph.graph_ptr.long()
    sizes, graphs = offsets.diff(), graph.num_graphs
    batch = torch.arange(graphs, device=device).repeat_interleave(sizes)
    x, do = draw([(graph.num_rows, channels), (graphs, channels)], dtype, device)
    do *= graph.num_rows / graphs  # gradients of x are shares of it

    def definition(x: Tensor) -> Tensor:
        total = x.new_zeros(graphs, channels).index_add(0, batch, x)
        return total / sizes.clamp(min=1)[:, None]

    def pyg() -> Provider:
        from torch_geometric.nn import global_mean_pool

        return Provider(lambda x: global_mean_pool(x, batch, graphs))

    def torch_scatter() -> Provider:
        from torch_scatter import segment_csr

        return Provider(lambda x: segment_csr(x, offsets, reduce="mean"))

    def torch_segment_reduce() -> Provider:
        return Provider(
            lambda x: torch.segment_reduce(x, "mean", offsets=offsets, axis=0, initial=0)
        )

    once = (graph.num_rows + graphs) * channels * dtype.itemsize
    work = Work(once, 0, graph.num_rows * channels)
    return Case(
        shape=shape(problem, graph, heads, width, dtype),
        inputs={"x": x},
        upstream=do,
        definition=lambda dtype: Provider(definition),
        providers={
            "fastgt": lambda: Provider(lambda x: segment_mean(x, offsets)),
            "pyg": pyg,
            "torch-scatter": torch_scatter,
            "torch.segment_reduce": torch_segment_reduce,
        },
        work=passes(work, work),
    )
