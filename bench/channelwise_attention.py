"""Vector attention against what users would otherwise run."""

from __future__ import annotations

import torch

from fastgt import channelwise_attention, reference
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
) -> Case:
    """A softmax over each node's edges for every channel, as Point Transformer's."""
    graph = load(problem, device)
    channels = heads * width
    logits, v, do = draw(
        [(graph.num_edges, channels), (graph.num_cols, channels), (graph.num_rows, channels)],
        dtype,
        device,
    )
    source = graph.edge_index[0]
    softmax, scatter = softmaxes(graph), scatters(graph)

    def composed(name: str) -> Provider:
        weigh, add = softmax[name](), scatter[name]()
        return Provider(lambda logits, v: add(weigh(logits) * v[source]))

    node, edge = channels * dtype.itemsize, graph.num_edges
    index = graph.col.element_size() * (2 * edge + graph.num_rows)
    once = (graph.num_rows + graph.num_cols + edge) * node + index
    again, table = max(0, edge - graph.num_cols) * node, table_rows(graph) * node
    forward = Work(once, again, 5 * edge * channels, table, node)
    backward = Work(2 * once, 3 * again, 8 * edge * channels, table, node)
    return Case(
        shape=shape(problem, graph, heads, width, dtype),
        inputs={"logits": logits, "v": v},
        upstream=do,
        definition=lambda dtype: Provider(
            lambda logits, v: reference.channelwise_attention(logits, v, graph)
        ),
        providers={
            "fastgt": lambda: Provider(lambda x, v: channelwise_attention(x, v, graph)),
            **{name: lambda name=name: composed(name) for name in scatter},
        },
        work=passes(forward, backward),
    )
