"""What a type checker sees of results that are asked for. No test runs it: checkers read it."""

from typing import assert_type

import torch
from torch import Tensor

from fastgt import Aux, AuxRequest, Graph, channelwise_attention, neighborhood_attention

graph = Graph.from_edge_index(torch.tensor([[1, 2], [0, 1]]), num_nodes=3)
q, k, v = torch.randn(3, 3, 2, 8)
logits = torch.randn(2, 2, 8)

assert_type(neighborhood_attention(q, k, v, graph), Tensor)
assert_type(neighborhood_attention(q, k, v, graph, edge_gate=logits), Tensor)
assert_type(channelwise_attention(logits, v, graph), Tensor)

out, aux = neighborhood_attention(q, k, v, graph, return_aux=AuxRequest(lse=True))
assert_type(out, Tensor)
assert_type(aux, Aux)
assert_type(aux.lse, Tensor | None)

both = channelwise_attention(logits, v, graph, return_aux=AuxRequest(weights=True))
assert_type(both, tuple[Tensor, Aux])
