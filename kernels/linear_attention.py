"""Linear attention on ragged batches, forward: one state for every graph and head.

    S_g = sum_j phi(k_j) v_j^T,   z_g = sum_j phi(k_j)
    o_i = phi(q_i)^T S_g / (phi(q_i)^T z_g + eps)

Nodes of a graph lie one after another; nothing is gathered. A graph of at least ``small`` nodes is
cut into pieces of ``piece`` nodes, of which each adds up a state of its own, [M, DV] at a time
BLOCK_M features; the states of a graph's pieces are added in order (no atomics: the same bits every
time), then every piece makes the output of its nodes:

    graphs   |0 0 0 0 0 0 0 0 0 0|1 1|2 2 2 2 2 2|
    pieces   |  0   |  1   |  2  |   |  3   |  4 |      graph 1 is small
    states    S_0    S_1    S_2        S_3    S_4    ->  S_0 + S_1 + S_2,  S_3 + S_4

A graph of fewer nodes than a state has rows, about (``small`` = 2 M DV / (M + DV)), is multiplied
in the quadratic form by one program a head: it has no state, so that states never take more memory
than about N H (M + DV) numbers. Which graphs are small is known on the device alone, and so is how
many pieces there are: as many programs as fill it take them in turns. Outputs are made by the same
kernel, launched over pieces and over graphs: each form has tiles of its own, and the registers of
one do not weigh on the other.

Features are made of tiles [BLOCK_N, BLOCK_M], from channels of x or from its products with
BLOCK_M rows of the projection, wherever they are needed, and never stored.
"""

import triton
import triton.language as tl

from fastgt.contract import Features, Inputs, Quotient, Ragged

from .configs import accumulator, alignment, power_of_2
from .linear_features import dot, features, hold, hold_stabilised, load_wide
from .linear_states import (
    COUNTS,
    find_turns,
    linear_plan,
    linear_states,
    load_key_top,
    load_state,
    take_nodes,
    take_part,
)
from .loads import Rows, scalar, store_rows, sum_dtype


@triton.jit(do_not_specialize=COUNTS)
def _linear_top_kernel(
    k,  # [N, H, D]
    projection_ptr,  # [M, D]
    top_ptr,  # [P, H] or [G, H]
    batch,
    num_graphs,
    piece,
    small,
    tiles,
    S: tl.constexpr,
):
    """Grid (programs or graphs, heads): the stabiliser of the keys of a piece, or of a small graph;
    -inf for a graph that has pieces."""
    head = tl.program_id(1)
    turns, stride = find_turns(batch.piece_ptr, num_graphs, S.SMALL)
    for turn in range(tl.program_id(0), turns, stride):
        part = take_part(batch, head, turn, num_graphs, piece, small, S.SMALL)
        top = tl.full([S.BLOCK_N], float("-inf"), sum_dtype(S.WIDE))
        for step in range(0, part.end - part.begin, S.BLOCK_N):
            nodes = take_nodes(part, step, head, S)
            _held, largest = hold_stabilised(k, nodes, projection_ptr, tiles, S)
            top = tl.maximum(top, tl.where(nodes.live, largest, float("-inf")))
        tl.store(top_ptr + tl.full((), turn, tl.int64) * S.H + head, tl.max(top, 0))


@triton.jit
def _linear_top_of_graph_kernel(
    piece_top_ptr,  # [P, H]
    top_ptr,  # [G, H]
    piece_ptr,
    H: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """Grid (graphs,): the largest stabiliser of a graph's pieces, of all heads."""
    graph = tl.program_id(0).to(tl.int64)
    head = tl.arange(0, BLOCK_H)
    begin, end = tl.load(piece_ptr + graph), tl.load(piece_ptr + graph + 1)
    top = tl.load(top_ptr + graph * H + head, mask=head < H, other=0.0)
    for step in range(end - begin):
        at = (begin + step).to(tl.int64) * H + head
        top = tl.maximum(top, tl.load(piece_top_ptr + at, mask=head < H, other=0.0))
    tl.store(top_ptr + graph * H + head, top, mask=head < H)


@triton.jit
def attend(inputs, projection_ptr, held, top, key_top, nodes, part, state, tiles, S: tl.constexpr):
    """phi(q) S [N, DV] and phi(q) z [N]: from a state, or key by key where ``SMALL``."""
    num = tl.full([S.BLOCK_N, S.BLOCK_DV], 0.0, sum_dtype(S.WIDE))
    den = tl.full([S.BLOCK_N], 0.0, sum_dtype(S.WIDE))
    if not S.SMALL:
        for tile in range(tiles):
            f, _f_inner = features(inputs.q, held, top, nodes, tile, projection_ptr, S)
            s, z = load_state(state, part.slot, nodes.head, tile, S)
            num = dot(f, s, num, S)
            den += tl.sum(f * z[None, :], 1)
    else:
        for step in range(0, part.end - part.begin, S.BLOCK_N):
            keys = take_nodes(part, step, nodes.head, S)
            held_keys = hold(inputs.k, keys, S)
            a = tl.full([S.BLOCK_N, S.BLOCK_N], 0.0, sum_dtype(S.WIDE))
            for tile in range(tiles):
                f, _f_inner = features(inputs.q, held, top, nodes, tile, projection_ptr, S)
                g, _g_inner = features(inputs.k, held_keys, key_top, keys, tile, projection_ptr, S)
                a = dot(f, tl.trans(g), a, S)
            v = load_wide(inputs.v, keys, S.DV, S.BLOCK_DV, S)
            num = dot(a, v, num, S)
            den += tl.sum(a, 1)
    return num, den


@triton.jit(do_not_specialize=COUNTS)
def _linear_fwd_kernel(
    inputs,  # q, k [N, H, D], v [N, H, DV]
    projection_ptr,  # [M, D]
    top_ptr,  # [G, H]
    state,
    o_ptr,  # [N, H, DV]
    batch,
    num_graphs,
    piece,
    small,
    tiles,
    eps: tl.float64,
    NORMALIZE: tl.constexpr,
    S: tl.constexpr,
):
    """Grid (programs or graphs, heads): the output of a piece, or of a small graph."""
    head = tl.program_id(1)
    turns, stride = find_turns(batch.piece_ptr, num_graphs, S.SMALL)
    for turn in range(tl.program_id(0), turns, stride):
        part = take_part(batch, head, turn, num_graphs, piece, small, S.SMALL)
        key_top = load_key_top(top_ptr, part.graph, head, S)
        for step in range(0, part.end - part.begin, S.BLOCK_N):
            nodes = take_nodes(part, step, head, S)
            held, top = hold_stabilised(inputs.q, nodes, projection_ptr, tiles, S)
            num, den = attend(
                inputs, projection_ptr, held, top, key_top, nodes, part, state, tiles, S
            )
            if NORMALIZE:
                num = num / (den + scalar(eps, sum_dtype(S.WIDE)))[:, None]
            store_rows(o_ptr, nodes.row, nodes.live, head, S.H, S.DV, S.BLOCK_DV, num)


def linear_attention_fwd(inputs: Inputs, features: Features, ragged: Ragged, quotient: Quotient):
    """-> o [N, H, DV], and for "softmax" the stabilisers of the keys [G, H] (else [0, H])."""
    q, _, v = inputs
    n, heads, _ = q.shape
    o = q.new_empty(v.shape) if ragged.mask is None else q.new_zeros(v.shape)
    plan = linear_plan(inputs, features, ragged)
    softmax = features.feature_map == "softmax"
    tops = q.new_empty(plan.graphs if softmax else 0, heads, dtype=accumulator(q))
    if not n:
        # stabilisers of no keys
        return o, tops.fill_(float("-inf"))
    if softmax:
        _tops(inputs.k, plan, tops)
    state = linear_states(inputs.k, v, plan, tops, None)
    rows = strided(inputs)
    for each in plan.passes:
        _linear_fwd_kernel[each.programs, heads](
            rows,
            plan.projection,
            tops,
            state,
            o,
            plan.batch,
            *plan.counts,
            each.tiles,
            quotient.eps,
            NORMALIZE=quotient.normalize,
            S=each.sizes,
            num_warps=each.num_warps,
            num_stages=1,
        )
    return o, tops


def strided(inputs: Inputs) -> Inputs:
    """Queries, keys and values as kernels take them."""
    return Inputs(*(Rows(x, x.stride()) for x in inputs))


def _tops(k, plan, tops):
    heads = k.shape[1]
    piece_tops = tops.new_empty(plan.pieces, heads)
    for each in plan.passes:
        # one kernel for values of any width
        sizes = each.sizes._replace(DV=0, BLOCK_DV=0, ALIGN=alignment((k,)))
        _linear_top_kernel[each.programs, heads](
            Rows(k, k.stride()),
            plan.projection,
            tops if sizes.SMALL else piece_tops,
            plan.batch,
            *plan.counts,
            each.tiles,
            S=sizes,
            num_warps=each.num_warps,
            num_stages=1,
        )
    if plan.pieces:
        _linear_top_of_graph_kernel[plan.graphs,](
            piece_tops, tops, plan.batch.piece_ptr, H=heads, BLOCK_H=power_of_2(heads)
        )
