"""What a type checker sees of results that are requested. No test runs it: checkers read it."""

from typing import assert_type

import torch
from torch import Tensor

from fastgt import Aux, AuxRequest, Graph, channelwise_attention, gated_aggregate

graph = Graph.from_edge_index(torch.tensor([[1, 2], [0, 1]]), num_nodes=3)
x, edges = torch.randn(3, 2, 8), torch.randn(2, 2, 8)
weights, scores = AuxRequest(weights=True), AuxRequest(edge_scores=True)

assert_type(channelwise_attention(edges, x, graph), Tensor)
assert_type(channelwise_attention(edges, x, graph, return_aux=weights), tuple[Tensor, Aux])
assert_type(gated_aggregate(x, graph, edges), Tensor)
assert_type(gated_aggregate(x, graph, edges, return_aux=scores), tuple[Tensor, Aux])
