"""What a type checker sees of a program that calls fastgt. No test runs it: checkers read it."""

from typing import assert_type

import torch
from torch import Tensor

from fastgt import (
    Aux,
    AuxRequest,
    Graph,
    aggregate,
    head_projection,
    linear_attention,
    neighborhood_attention,
    segment_mean,
    segment_softmax,
    virtual_node,
)
from fastgt.nn import NeighborhoodAttention

graph = Graph.from_edge_index(torch.tensor([[1, 2], [0, 1]]), num_nodes=3)
assert_type(graph, Graph)
assert_type(graph.num_rows, int)
assert_type(graph.col, Tensor)
assert_type(graph.to("cpu"), Graph)
assert_type(graph.reordered("degree"), Graph)
assert_type(Graph.batch([graph, graph]), Graph)

q, k, v = torch.randn(3, 3, 2, 8)
offsets = torch.tensor([0, 3])
assert_type(aggregate(v, graph), Tensor)
assert_type(segment_softmax(torch.randn(2, 4), graph), Tensor)
assert_type(linear_attention(q, k, v, offsets), Tensor)
assert_type(segment_mean(q, offsets), Tensor)
assert_type(virtual_node(q, torch.randn(1, 2, 8), offsets), tuple[Tensor, Tensor])
assert_type(head_projection(torch.randn(3, 8), torch.randn(2, 4, 8)), Tensor)

assert_type(neighborhood_attention(q, k, v, graph), Tensor)
assert_type(neighborhood_attention(q, k, v, graph, edge_bias=torch.randn(2, 2)), Tensor)
out, aux = neighborhood_attention(q, k, v, graph, return_aux=AuxRequest(lse=True))
assert_type(out, Tensor)
assert_type(aux, Aux)
assert_type(aux.lse, Tensor | None)

layer = NeighborhoodAttention(16, heads=2)
assert_type(layer.forward(torch.randn(3, 16), graph), Tensor)
