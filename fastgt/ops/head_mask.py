"""Gates of heads, as the attention operators take them: [H], or [G, H] for each graph."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.autograd import forward_ad

from fastgt.contract import Aux, HeadMask
from fastgt.graph import Graph
from fastgt.ops.checks import accumulator, check_float, readable
from fastgt.ops.implementation import Impl
from fastgt.ops.segment_pool import of_nodes


def check_head_gate(
    head_gate: object, heads: int, device: torch.device, graphs: int | None = None
) -> None:
    """``[H]``, or ``[G, H]`` where there are graphs; values only where they are at hand."""
    if not isinstance(head_gate, Tensor):
        raise TypeError(f"head_gate must be a tensor, got {type(head_gate).__name__}")
    if head_gate.dtype != torch.bool:
        check_float("head_gate", head_gate)
    fits = head_gate.ndim == 1 or (
        graphs is not None and head_gate.ndim == 2 and head_gate.shape[0] == graphs
    )
    if not fits or head_gate.shape[-1] != heads:
        letters = f"[H] = [{heads}]"
        if graphs is not None:
            letters += f" or [G, H] = [{graphs}, {heads}]"
        raise ValueError(f"head_gate must be {letters}, got {list(head_gate.shape)}")
    if head_gate.device != device:
        raise ValueError(f"head_gate is on {head_gate.device} but the nodes are on {device}")
    if readable(head_gate) and head_gate.isnan().any():
        at = head_gate.isnan().nonzero()
        if head_gate.ndim == 1:
            raise ValueError(f"head_gate is NaN at heads {at.flatten().tolist()}")
        raise ValueError(f"head_gate is NaN at graph and head {at.tolist()}")


def head_mask(head_gate: Tensor) -> Tensor:
    """Which heads are active, [1 or G, H]."""
    return torch.atleast_2d(head_gate.detach() != 0).contiguous()


def node_mask(head_gate: Tensor, graph: Graph) -> HeadMask:
    """Which heads are active, of each row and of each column of a graph."""
    mask = head_mask(head_gate)
    if mask.shape[0] == 1:
        return HeadMask(mask, mask)
    rows = mask.repeat_interleave(graph.graph_ptr.diff(), 0, output_size=graph.num_rows)
    if graph.graph_ptr is graph.col_graph_ptr:
        return HeadMask(rows, rows)
    sizes = graph.col_graph_ptr.diff()
    return HeadMask(rows, mask.repeat_interleave(sizes, 0, output_size=graph.num_cols))


def gated(
    out: Tensor, head_gate: Tensor, offsets: Tensor | None, dense: bool, impl: Impl
) -> Tensor:
    """out [N, H, D] times the gates of its heads; ``dense``: masked heads were computed."""
    if head_gate.dtype == torch.bool or (not dense and _is_mask(head_gate)):
        return out
    # sums for the gate's gradient are not those of 16 bits
    wide = torch.promote_types(accumulator(out), head_gate.dtype)
    gate = head_gate.to(wide)
    if not dense:
        # no gradient of masked heads, whatever stands upstream
        gate = gate.masked_fill(head_gate.detach() == 0, 0)
    if gate.ndim == 2 and offsets is not None:
        gate = of_nodes(gate, offsets, out.shape[0], impl)
    return (out.to(wide) * gate[..., None]).to(out.dtype)


def _is_mask(head_gate: Tensor) -> bool:
    """Whether the gates are constants of 0 and 1: times these, an output stays as it is."""
    if head_gate.requires_grad or not readable(head_gate) or torch.jit.is_tracing():
        return False
    if forward_ad._current_level >= 0 and forward_ad.unpack_dual(head_gate).tangent is not None:
        return False
    return bool(((head_gate == 0) | (head_gate == 1)).all())


def masked_aux(aux: Aux, mask: HeadMask, graph: Graph) -> Aux:
    """Results that were computed for every head: a masked head gets those of a head without edges.

    Its lse is -inf. Its weights and edge scores are 0.
    """
    on_rows = mask.rows
    assert on_rows is not None
    on_edges = on_rows
    if on_rows.shape[0] > 1 and (aux.weights is not None or aux.edge_scores is not None):
        on_edges = on_rows.index_select(0, graph.edge_index[1])
    return Aux(
        lse=_filled(aux.lse, on_rows, -math.inf),
        weights=_filled(aux.weights, on_edges, 0.0),
        edge_scores=_filled(aux.edge_scores, on_edges, 0.0),
    )


def _filled(x: Tensor | None, on: Tensor, value: float) -> Tensor | None:
    """``x [N, H]`` or ``[N, H, D]``, with ``value`` for the heads that are not ``on``."""
    if x is None:
        return None
    return x.masked_fill(~on[..., None] if x.ndim == 3 else ~on, value)
