"""GAT's and GATv2's attention against what users would otherwise run."""

from __future__ import annotations

import functools

import torch
from torch import Tensor
from torch.nn.functional import leaky_relu

from fastgt import additive_attention, reference
from fastgt.bench.attention import draw, load, shape, table_rows
from fastgt.bench.harness import Case, Provider
from fastgt.bench.peers import scatters, softmaxes
from fastgt.bench.roofline import Work, passes


def case(
    problem: str,
    *,
    heads: int = 8,
    width: int = 16,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    gat: bool = False,
) -> Case:
    """Queries, keys and a weight of ``width`` channels, as GATv2's; ``gat``: of one channel a head,
    as GAT's. Values have ``width`` channels."""
    graph = load(problem, device)
    d = 1 if gat else width
    rows, cols = (graph.num_rows, heads, d), (graph.num_cols, heads, d)
    values, out = (graph.num_cols, heads, width), (graph.num_rows, heads, width)
    q, k, v, weight, do = draw([rows, cols, values, (heads, d), out], dtype, device)
    source, target = graph.edge_index
    softmax, scatter = softmaxes(graph), scatters(graph)

    def composed(name: str) -> Provider:
        """The messages of torch-geometric's layers, by a package's softmax and sum."""
        weigh, add = softmax[name](), scatter[name]()

        def attend(q: Tensor, k: Tensor, v: Tensor, weight: Tensor) -> Tensor:
            logit = (leaky_relu(q[target] + k[source], 0.2) * weight).sum(-1)
            return add(weigh(logit)[..., None] * v[source])

        return Provider(attend)

    node, edges, item = heads * (d + width), graph.num_edges, dtype.itemsize
    index = graph.col.element_size() * (edges + graph.num_rows)
    once = (graph.num_rows + graph.num_cols) * node * item + 4 * heads * graph.num_rows + index
    row, channels = node * item, heads * edges
    by_row, by_column = (max(0, edges - n) * row for n in (graph.num_cols, graph.num_rows))
    table = table_rows(graph) * row
    forward = Work(once, by_row, channels * (4 * d + 2 * width), table, row)
    backward = Work(2 * once, by_row + by_column, channels * (12 * d + 4 * width), table, row)
    return Case(
        shape=shape(problem, graph, heads, width, dtype),
        inputs={"q": q, "k": k, "v": v, "weight": weight},
        upstream=do,
        definition=lambda dtype: Provider(
            lambda q, k, v, weight: reference.additive_attention(q, k, v, graph, weight)
        ),
        providers={
            "fastgt": lambda: Provider(
                lambda q, k, v, weight: additive_attention(q, k, v, graph, weight)
            ),
            **{name: lambda name=name: composed(name) for name in scatter},
        },
        work=passes(forward, backward),
    )


gat = functools.partial(case, gat=True)
