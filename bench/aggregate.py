"""Aggregations against what users would otherwise run: sums of neighbours, GCN's weighted sums,
GINE's and GatedGCN's messages, and a softmax over edges."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fastgt import Graph, aggregate, gated_aggregate, reference, segment_softmax
from fastgt.bench.attention import draw, load, shape, table_rows
from fastgt.bench.harness import Case, Provider
from fastgt.bench.peers import scatters, softmaxes
from fastgt.bench.roofline import Work, passes

Providers = dict[str, Callable[[], Provider]]


def sums(
    problem: str,
    *,
    heads: int = 8,
    width: int = 16,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> Case:
    """Sums of neighbours, over all channels of all heads."""
    graph = load(problem, device)
    channels = heads * width
    x, do = draw([(graph.num_cols, channels), (graph.num_rows, channels)], dtype, device)
    source, size = graph.edge_index[0], graph.num_rows

    def torch_sparse() -> Provider:
        row_ptr, col = graph.row_ptr.long(), graph.col.long()
        one = torch.ones(len(col), dtype=dtype, device=device)
        matrix = torch.sparse_csr_tensor(row_ptr, col, one, (size, graph.num_cols))
        return Provider(lambda x: matrix @ x)

    node, edge = channels * dtype.itemsize, graph.num_edges
    index = graph.col.element_size() * (edge + size)
    again = max(0, edge - graph.num_cols) * node
    moved = (size + graph.num_cols) * node + index
    one_way = Work(moved, again, edge * channels, table_rows(graph) * node, node)
    return Case(
        shape=shape(problem, graph, heads, width, dtype),
        inputs={"x": x},
        upstream=do,
        definition=lambda dtype: Provider(lambda x: reference.aggregate(x, graph)),
        providers={
            "fastgt": lambda: Provider(lambda x: aggregate(x, graph)),
            **_scattered(graph, lambda x: x[source]),
            "torch.sparse": torch_sparse,
        },
        work=passes(one_way, one_way),
    )


def gcn(
    problem: str,
    *,
    heads: int = 8,
    width: int = 16,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> Case:
    """GCN's sum of neighbours, each times 1 / sqrt(degree_i degree_j): weights without gradient."""
    graph = load(problem, device)
    channels = heads * width
    x, do = draw([(graph.num_cols, channels), (graph.num_rows, channels)], dtype, device)
    source, target = graph.edge_index
    sent = torch.bincount(source, minlength=graph.num_cols)
    weight = (graph.row_degree[target] * sent[source]).double().rsqrt().to(dtype)

    def torch_sparse() -> Provider:
        row_ptr, col, value = graph.row_ptr.long(), graph.col.long(), weight[graph.edge.long()]
        size = graph.num_rows, graph.num_cols
        matrix = torch.sparse_csr_tensor(row_ptr, col, value, size)
        return Provider(lambda x: matrix @ x)

    node, edge = channels * dtype.itemsize, graph.num_edges
    # of each edge its column, its number and its weight
    index = graph.col.element_size() * (2 * edge + graph.num_rows) + dtype.itemsize * edge
    moved, again = (graph.num_rows + graph.num_cols) * node + index, max(0, edge - graph.num_cols)
    work = Work(moved, again * node, 2 * edge * channels, table_rows(graph) * node, node)
    return Case(
        shape=shape(problem, graph, heads, width, dtype),
        inputs={"x": x},
        upstream=do,
        definition=lambda dtype: Provider(
            lambda x: reference.aggregate(x, graph, edge_weight=weight.to(dtype))
        ),
        providers={
            "fastgt": lambda: Provider(lambda x: aggregate(x, graph, edge_weight=weight)),
            **_scattered(graph, lambda x: x[source] * weight[:, None]),
            "torch.sparse": torch_sparse,
        },
        work=passes(work, work),
    )


def gine(
    problem: str,
    *,
    heads: int = 8,
    width: int = 16,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> Case:
    """GINE's sum of relu(x_j + e_ij)."""
    graph = load(problem, device)
    channels = heads * width
    nodes = graph.num_cols, channels
    x, e, do = draw([nodes, (graph.num_edges, channels), (graph.num_rows, channels)], dtype, device)
    source = graph.edge_index[0]

    def message(x: Tensor, e: Tensor) -> Tensor:
        return (x[source] + e).relu()

    def ours(x: Tensor, e: Tensor) -> Tensor:
        return aggregate(x, graph, edge_value=e, activation="relu")

    node, edge = channels * dtype.itemsize, graph.num_edges
    index = graph.col.element_size() * (2 * edge + graph.num_rows)
    once = (graph.num_rows + graph.num_cols + edge) * node + index
    again, table = max(0, edge - graph.num_cols) * node, table_rows(graph) * node
    forward = Work(once, again, 3 * edge * channels, table, node)
    # x, edge_value, do and both gradients
    moved = (graph.num_rows + 2 * graph.num_cols + 2 * edge) * node + index
    backward = Work(moved, 2 * again, 3 * edge * channels, table, node)
    return Case(
        shape=shape(problem, graph, heads, width, dtype),
        inputs={"x": x, "edge_value": e},
        upstream=do,
        definition=lambda dtype: Provider(
            lambda x, e: reference.aggregate(x, graph, edge_value=e, activation="relu")
        ),
        providers={"fastgt": lambda: Provider(ours), **_scattered(graph, message)},
        work=passes(forward, backward),
    )


def gated(
    problem: str,
    *,
    heads: int = 8,
    width: int = 16,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> Case:
    """GatedGCN's mean of x_j under gates sigmoid(e_ij + a_i + b_j)."""
    graph = load(problem, device)
    channels = heads * width
    cols, rows = (graph.num_cols, channels), (graph.num_rows, channels)
    x, e, a, b, do = draw([cols, (graph.num_edges, channels), rows, cols, rows], dtype, device)
    source, target = graph.edge_index

    def ours(x: Tensor, e: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return gated_aggregate(x, graph, e, gate_row=a, gate_col=b)

    def composed(scatter: Callable[[Tensor], Tensor]) -> Provider:
        def call(x: Tensor, e: Tensor, a: Tensor, b: Tensor) -> Tensor:
            sigma = (e + a[target] + b[source]).sigmoid()
            return scatter(sigma * x[source]) / (scatter(sigma) + 1e-6)

        return Provider(call)

    node, edge = channels * dtype.itemsize, graph.num_edges
    index = graph.col.element_size() * (2 * edge + graph.num_rows)
    once = (2 * graph.num_rows + 2 * graph.num_cols + edge) * node + index
    again, table = 2 * max(0, edge - graph.num_cols) * node, 2 * table_rows(graph) * node
    forward = Work(once, again, 8 * edge * channels, table, node)
    backward = Work(2 * once, 2 * again, 12 * edge * channels, table, node)
    return Case(
        shape=shape(problem, graph, heads, width, dtype),
        inputs={"x": x, "gate": e, "gate_row": a, "gate_col": b},
        upstream=do,
        definition=lambda dtype: Provider(
            lambda x, e, a, b: reference.gated_aggregate(x, graph, e, gate_row=a, gate_col=b)
        ),
        providers={
            "fastgt": lambda: Provider(ours),
            **{name: lambda make=make: composed(make()) for name, make in scatters(graph).items()},
        },
        work=passes(forward, backward),
    )


def softmax(
    problem: str,
    *,
    heads: int = 8,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> Case:
    """A softmax over each node's edges, for every head."""
    graph = load(problem, device)
    x, do = draw([(graph.num_edges, heads)] * 2, dtype, device)
    edge = graph.num_edges * heads
    index = graph.col.element_size() * (graph.num_edges + graph.num_rows)
    forward = Work(2 * edge * dtype.itemsize + index, 0, 3 * edge)
    backward = Work(3 * edge * dtype.itemsize + index, 0, 4 * edge)
    return Case(
        shape=shape(problem, graph, heads, 1, dtype),
        inputs={"x": x},
        upstream=do,
        definition=lambda dtype: Provider(lambda x: reference.segment_softmax(x, graph)),
        providers={
            "fastgt": lambda: Provider(lambda x: segment_softmax(x, graph)),
            **{n: lambda make=make: Provider(make()) for n, make in softmaxes(graph).items()},
        },
        work=passes(forward, backward),
    )


def _scattered(graph: Graph, message: Callable[..., Tensor]) -> Providers:
    """Peers that add up the messages of edges."""

    def provider(make: Callable[[], Callable[[Tensor], Tensor]]) -> Provider:
        scatter = make()
        return Provider(lambda *inputs: scatter(message(*inputs)))

    return {name: lambda make=make: provider(make) for name, make in scatters(graph).items()}
