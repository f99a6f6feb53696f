"""What edges have in neighborhood_attention: from public arguments to the terms of the registered
ops, and the definition of these ops in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from fastgt import reference
from fastgt.contract import (
    AuxRequest,
    Dropout,
    EdgeTensors,
    EdgeTerms,
    HeadMask,
    Inputs,
    Logit,
)
from fastgt.graph import Graph
from fastgt.ops.checks import autocast, check_edge_attr, check_edge_tensor, check_gate
from fastgt.ops.wide_product import wide_product


def make_terms(
    inputs: Inputs, edges: EdgeTensors, mask: HeadMask, graph: Graph, *, by_channel: bool, path: str
) -> tuple[EdgeTerms, bool, Tensor | None]:
    """-> the terms, whether the key is added to the values too, and the weight of the attributes'
    sum.

    The low-rank form becomes one more row vector, ``attr_q = W_k q [N, H, C]``, whose product with
    an edge's attributes joins the logit, and one more output, the weighted sum of the attributes,
    which :func:`add_attributes` multiplies with W_v. ``by_channel``: edge scores are made. ``path``
    is the way that the op takes.
    """
    bias, gate, key, value, attr, key_weight, value_weight = edges
    key_is_value = value is key and key is not None
    if mask.rows is not None:
        # what is masked everywhere takes no part in the products below: 0 * NaN is not 0
        masked = ~mask.rows.any(0)[:, None]
        key_weight, value_weight = (
            None if x is None else x.masked_fill(masked, 0) for x in (key_weight, value_weight)
        )
    attr_q = None
    if attr is not None and key_weight is not None:
        if by_channel or (gate is not None and gate.ndim == 3):
            # channel by channel: beside a tensor of that size
            flat = key_weight.flatten(1)[None]  # [1, C, H D]
            product = wide_product(attr[:, None], flat).unflatten(2, key_weight.shape[1:])[:, 0]
            key, key_is_value = product if key is None else key + product, False
        else:
            # 0 in the place of what rows without edges hold, NaN perhaps, and of its gradient
            unused = (graph.row_degree == 0)[:, None, None]
            unused = unused if mask.rows is None else unused | ~mask.rows[..., None]
            by_head = key_weight.permute(1, 2, 0)  # [H, D, C]
            attr_q = narrow(wide_product(inputs.q.masked_fill(unused, 0), by_head), inputs.q, path)
    if attr_q is None and value_weight is None:
        attr = None
    terms = EdgeTerms(bias, gate, key, None if key_is_value else value, attr, attr_q)
    return terms, key_is_value, value_weight


def add_attributes(o: Tensor, lse: Tensor, attr_o: Tensor, weight: Tensor) -> Tensor:
    """o, and the weighted sums of the attributes [N, H, C] times their weight [C, H, Dv]."""
    projected = wide_product(attr_o, weight.transpose(0, 1))
    projected = projected.masked_fill((lse.detach() == -torch.inf)[..., None], 0)
    return projected.add_(o).to(o.dtype)


def narrow(x: Tensor, like: Tensor, path: str) -> Tensor:
    """Row vectors that Triton's kernels gather for every edge: in bfloat16 where the inputs are,
    whose range is float32's; float16 could overflow."""
    return x.to(like.dtype) if like.dtype == torch.bfloat16 and path != "cpp" else x


def autocast_edges(edges: EdgeTensors, dtype: torch.dtype) -> EdgeTensors:
    """Cast each; one tensor in two places stays one."""
    cast = EdgeTensors(*(None if x is None else autocast(x, dtype) for x in edges))
    if edges.edge_value is edges.edge_key:
        cast = cast._replace(edge_value=cast.edge_key)
    return cast


def check_edges(edges: EdgeTensors, q: Tensor, v: Tensor, num_edges: int) -> None:
    heads = q.shape[1]
    _, gate, key, value, attr, key_weight, value_weight = edges
    if gate is not None:
        check_gate(gate, q, num_edges)
    if key is not None:
        check_edge_tensor("edge_key", key, q, "E, H, D", num_edges, heads, q.shape[2])
    if value is not None:
        check_edge_tensor("edge_value", value, q, "E, H, Dv", num_edges, heads, v.shape[2])
    check_edge_attr(attr, key_weight, value_weight, q, v, num_edges)


def define(
    inputs: Inputs,
    terms: EdgeTerms,
    active: Tensor | None,
    graph: Graph,
    logit: Logit,
    dropout: Dropout,
    key_is_value: bool,
) -> tuple[Tensor, ...]:
    """o, lse, edge scores and weighted attributes of the registered op, in plain PyTorch;
    ``active [1 or N_rows, H]`` are its heads."""
    q, k, v = inputs
    bias, gate, key, value, attr, attr_q = terms
    d, dv, heads = q.shape[2], v.shape[2], q.shape[1]
    if key_is_value:
        value = key
    if attr is not None:
        # attributes are channels of their own: beside zeros of k and v, in place of edge vectors
        attr = attr[:, None].expand(-1, heads, -1)
        if attr_q is not None:
            key, k = _beside(key, attr, d), _beside(k, None, attr.shape[2])
            q = torch.cat([q, attr_q], 2)
        value, v = _beside(value, attr, dv), _beside(v, None, attr.shape[2])
    o, aux = reference.masked_attention(
        Inputs(q, k, v),
        EdgeTensors(bias, gate, key, value),
        active,
        graph,
        logit,
        dropout,
        AuxRequest(lse=True, edge_scores=True),
    )
    lse, _, scores = aux
    assert lse is not None
    assert scores is not None
    return o[..., :dv], lse, scores[..., :d], o[..., dv:]


def _beside(x: Tensor | None, other: Tensor | None, width: int) -> Tensor:
    """[..., width of x + width of other]: zeros where one is absent, ``width`` of them."""
    if x is None:
        assert other is not None
        return torch.nn.functional.pad(other, (width, 0))
    if other is None:
        return torch.nn.functional.pad(x, (0, width))
    return torch.cat([x, other], 2)
