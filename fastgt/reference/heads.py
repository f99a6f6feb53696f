"""Masks and gates of heads."""

from __future__ import annotations

import torch
from torch import Tensor

from fastgt.contract import Aux
from fastgt.graph import Graph
from fastgt.reference.sums import accumulator


def masked(x: Tensor | None, on: Tensor) -> Tensor | None:
    return None if x is None else torch.where(on, x, 0)


def masked_aux(aux: Aux, active: Tensor, graph: Graph) -> Aux:
    """As where masked heads were not computed."""
    lse, weights, edge_scores = aux
    on_edges = active[graph.edge_index[1]]
    if lse is not None:
        lse = torch.where(active[..., None] if lse.ndim == 3 else active, lse, -torch.inf)
    if weights is not None:
        weights = masked(weights, on_edges[..., None] if weights.ndim == 3 else on_edges)
    return Aux(lse, weights, masked(edge_scores, on_edges[..., None]))


def of_rows(x: Tensor, graph: Graph) -> Tensor:
    """What the heads of all graphs have, ``[H]``, or of each, ``[G, H]``: for every row."""
    if x.ndim == 1:
        return x[None]
    number = torch.arange(graph.num_graphs, device=x.device)
    return x[number.repeat_interleave(graph.graph_ptr.diff(), output_size=graph.num_rows)]


def gated(out: Tensor, head_gate: Tensor, graph: Graph, dense: bool) -> Tensor:
    """``out [N_rows, H, D]`` times the gates; a gate of 0 has a gradient where ``dense``."""
    if head_gate.dtype == torch.bool:
        return out
    wide = torch.promote_types(accumulator(out), head_gate.dtype)
    gate = head_gate.to(wide)
    if not dense:
        gate = gate.masked_fill(head_gate.detach() == 0, 0)
    return (out.to(wide) * of_rows(gate, graph)[..., None]).to(out.dtype)
