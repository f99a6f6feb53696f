"""Backward of linear attention; pieces, states and tiles as in ``linear_attention.py``.

With o' = phi(q)^T [S, z], its gradient do' = [share do, down], where share = 1 / (phi(q)^T z + eps)
and down = -share (do . o), or 1 and 0 where nothing is divided:

    dphi(q)_i = S (share_i do_i) + down_i z              from the states, as the forward made them
    dS = sum_i phi(q_i) share_i do_i^T,  dz = sum_i phi(q_i) down_i      made as states are
    dphi(k)_j = dS v_j + dz,   dv_j = dS^T phi(k_j)

Small graphs do without: with b_ji = phi(k_j) . phi(q_i) and db_ji = share_i do_i . v_j + down_i,
dphi(q)_i = sum_j db_ji phi(k_j), dphi(k)_j = sum_i db_ji phi(q_i), dv_j = sum_i b_ji share_i do_i.
"""

import triton
import triton.language as tl

from fastgt.contract import Features, Inputs, NeedQKV, Quotient, Ragged

from .configs import alignment
from .linear_attention import attend, strided
from .linear_features import (
    before_features,
    dot,
    features,
    hold,
    hold_stabilised,
    load_held,
    load_projection,
    load_wide,
    store_inputs,
    times_matrix,
    times_rows,
)
from .linear_states import (
    COUNTS,
    find_turns,
    linear_plan,
    linear_states,
    load_key_top,
    load_stat,
    load_state,
    state_rows,
    take_nodes,
    take_part,
)
from .loads import Rows, scalar, store_rows, sum_dtype


@triton.jit(do_not_specialize=COUNTS)
def _linear_bwd_dq_kernel(
    do,  # [N, H, DV]
    inputs,  # q, k [N, H, D], v [N, H, DV]
    projection_ptr,  # [M, D]
    top_ptr,  # [G, H]
    state,
    dq_ptr,  # [N, H, D]
    stat_ptr,  # [N, H, 3]: share, down and stabiliser of the query
    batch,
    num_graphs,
    piece,
    small,
    tiles,
    eps: tl.float64,
    NORMALIZE: tl.constexpr,
    NEED_Q: tl.constexpr,
    S: tl.constexpr,
):
    """Grid (programs or graphs, heads): dq of a piece's or a small graph's nodes, and what dk
    and dv need to know of them."""
    head = tl.program_id(1)
    turns, stride = find_turns(batch.piece_ptr, num_graphs, S.SMALL)
    for turn in range(tl.program_id(0), turns, stride):
        part = take_part(batch, head, turn, num_graphs, piece, small, S.SMALL)
        key_top = load_key_top(top_ptr, part.graph, head, S)
        for step in range(0, part.end - part.begin, S.BLOCK_N):
            nodes = take_nodes(part, step, head, S)
            held, top = hold_stabilised(inputs.q, nodes, projection_ptr, tiles, S)
            share = tl.full([S.BLOCK_N], 1.0, sum_dtype(S.WIDE))
            down = tl.full([S.BLOCK_N], 0.0, sum_dtype(S.WIDE))
            if NORMALIZE:
                num, den = attend(
                    inputs, projection_ptr, held, top, key_top, nodes, part, state, tiles, S
                )
                share = 1 / (den + scalar(eps, sum_dtype(S.WIDE)))
                upstream = load_wide(do, nodes, S.DV, S.BLOCK_DV, S)
                down = -share * tl.sum(upstream * share[:, None] * num, 1)
            at = stat_ptr + (nodes.row * S.H + head) * 3
            tl.store(at, share, mask=nodes.live)
            tl.store(at + 1, down, mask=nodes.live)
            tl.store(at + 2, top, mask=nodes.live)
            if NEED_Q:
                flow = load_held(do, nodes, S.DV, S.BLOCK_DV, S)
                dx = tl.full([S.BLOCK_N, S.BLOCK_D], 0.0, sum_dtype(S.WIDE))
                total = tl.full([S.BLOCK_N], 0.0, sum_dtype(S.WIDE))
                for tile in range(tiles):
                    df = tl.full([S.BLOCK_N, S.BLOCK_M], 0.0, sum_dtype(S.WIDE))
                    if not S.SMALL:
                        m, inside = state_rows(part.slot, head, tile, S)
                        df += times_matrix(
                            flow, do, nodes, state.s_ptr, m, inside, S.DV, S.BLOCK_DV, S
                        )
                        z = tl.load(state.z_ptr + m, mask=inside, other=0.0)
                        df = df * share[:, None] + down[:, None] * z[None, :]
                    else:
                        for key_step in range(0, part.end - part.begin, S.BLOCK_N):
                            keys = take_nodes(part, key_step, head, S)
                            g = node_features(inputs.k, key_top, keys, tile, projection_ptr, S)
                            db = times_rows(flow, do, nodes, inputs.v, keys, S.DV, S.BLOCK_DV, S)
                            db = db * share[:, None] + down[:, None]
                            df = dot(db, g, df, S)
                    f, inner = features(inputs.q, held, top, nodes, tile, projection_ptr, S)
                    gradient = before_features(df, f, inner, S)
                    if S.RANDOM:
                        dx = dot(gradient, load_projection(projection_ptr, tile, S), dx, S)
                        total += tl.sum(gradient, 1)
                    else:
                        store_tile(dq_ptr, nodes, tile, gradient, S)
                if S.RANDOM:
                    store_inputs(dq_ptr, inputs.q, nodes, dx, total, S)


@triton.jit
def node_features(x, top, nodes, tile, projection_ptr, S: tl.constexpr):
    """phi(x) [N, BLOCK_M] of some nodes, of which nothing is held."""
    phi, _ = features(x, hold(x, nodes, S), top, nodes, tile, projection_ptr, S)
    return phi


@triton.jit
def store_tile(dx_ptr, nodes, tile, dx, S: tl.constexpr):
    """A tile of the gradient of x, whose features are its channels."""
    first = tile * S.BLOCK_M
    store_rows(dx_ptr, nodes.row, nodes.live, nodes.head, S.H, S.D, S.BLOCK_M, dx, first)


@triton.jit(do_not_specialize=COUNTS)
def _linear_bwd_dkv_kernel(
    do,  # [N, H, DV]
    inputs,  # q, k [N, H, D], v [N, H, DV]
    projection_ptr,  # [M, D]
    top_ptr,  # [G, H]
    dstate,
    dk_ptr,  # [N, H, D]
    dv_ptr,  # [N, H, DV]
    stat_ptr,  # [N, H, 3]
    batch,
    num_graphs,
    piece,
    small,
    tiles,
    NEED_K: tl.constexpr,
    NEED_V: tl.constexpr,
    S: tl.constexpr,
):
    """Grid (programs or graphs, heads): dk and dv of a piece's or a small graph's nodes."""
    head = tl.program_id(1)
    turns, stride = find_turns(batch.piece_ptr, num_graphs, S.SMALL)
    for turn in range(tl.program_id(0), turns, stride):
        part = take_part(batch, head, turn, num_graphs, piece, small, S.SMALL)
        key_top = load_key_top(top_ptr, part.graph, head, S)
        for step in range(0, part.end - part.begin, S.BLOCK_N):
            nodes = take_nodes(part, step, head, S)
            held = hold(inputs.k, nodes, S)
            v = load_held(inputs.v, nodes, S.DV, S.BLOCK_DV, S)
            dv = tl.full([S.BLOCK_N, S.BLOCK_DV], 0.0, sum_dtype(S.WIDE))
            dx = tl.full([S.BLOCK_N, S.BLOCK_D], 0.0, sum_dtype(S.WIDE))
            total = tl.full([S.BLOCK_N], 0.0, sum_dtype(S.WIDE))
            for tile in range(tiles):
                if NEED_V:
                    g, inner = features(inputs.k, held, key_top, nodes, tile, projection_ptr, S)
                    if not S.SMALL:
                        ds, dz = load_state(dstate, part.slot, head, tile, S)
                        dv = dot(g, ds, dv, S)
                    else:
                        for query_step in range(0, part.end - part.begin, S.BLOCK_N):
                            queries = take_nodes(part, query_step, head, S)
                            stat = load_stat(stat_ptr, queries, S)
                            f = node_features(inputs.q, stat.top, queries, tile, projection_ptr, S)
                            # this tile's part of b: the other tiles add theirs
                            b = dot(g, tl.trans(f), None, S) * stat.share[None, :]
                            upstream = load_wide(do, queries, S.DV, S.BLOCK_DV, S)
                            dv = dot(b, upstream, dv, S)
                if NEED_K:
                    dg = tl.full([S.BLOCK_N, S.BLOCK_M], 0.0, sum_dtype(S.WIDE))
                    if not S.SMALL:
                        m, inside = state_rows(part.slot, head, tile, S)
                        dz = tl.load(dstate.z_ptr + m, mask=inside, other=0.0)
                        dg += dz[None, :] + times_matrix(
                            v, inputs.v, nodes, dstate.s_ptr, m, inside, S.DV, S.BLOCK_DV, S
                        )
                    else:
                        for query_step in range(0, part.end - part.begin, S.BLOCK_N):
                            queries = take_nodes(part, query_step, head, S)
                            stat = load_stat(stat_ptr, queries, S)
                            f = node_features(inputs.q, stat.top, queries, tile, projection_ptr, S)
                            db = times_rows(v, inputs.v, nodes, do, queries, S.DV, S.BLOCK_DV, S)
                            db = db * stat.share[None, :] + stat.down[None, :]
                            dg = dot(db, f, dg, S)
                    # made anew rather than held meanwhile
                    g, inner = features(inputs.k, held, key_top, nodes, tile, projection_ptr, S)
                    gradient = before_features(dg, g, inner, S)
                    if S.RANDOM:
                        dx = dot(gradient, load_projection(projection_ptr, tile, S), dx, S)
                        total += tl.sum(gradient, 1)
                    else:
                        store_tile(dk_ptr, nodes, tile, gradient, S)
            if NEED_K and S.RANDOM:
                store_inputs(dk_ptr, inputs.k, nodes, dx, total, S)
            if NEED_V:
                store_rows(dv_ptr, nodes.row, nodes.live, head, S.H, S.DV, S.BLOCK_DV, dv)


def linear_attention_bwd(
    do,
    tops,
    inputs: Inputs,
    features: Features,
    ragged: Ragged,
    quotient: Quotient,
    needs: NeedQKV,
):
    """-> dq, dk [N, H, D], dv [N, H, DV]; empty where not needed."""
    q, k, v = inputs
    n, heads, _ = q.shape
    dq, dk, dv = (
        (x.new_empty if ragged.mask is None else x.new_zeros)(x.shape if need else (0,))
        for x, need in zip(inputs, needs, strict=True)
    )
    if not n:
        return dq, dk, dv
    plan = linear_plan(inputs, features, ragged)
    rows = Rows(do, do.stride()), strided(inputs), plan.projection, tops
    align = alignment((do, *inputs))
    state = linear_states(k, v, plan, tops, None)
    stat = state.s_ptr.new_empty(n, heads, 3)
    for each in plan.passes:
        _linear_bwd_dq_kernel[each.programs, heads](
            *rows,
            state,
            dq,
            stat,
            plan.batch,
            *plan.counts,
            each.tiles,
            quotient.eps,
            NORMALIZE=quotient.normalize,
            NEED_Q=needs.need_q,
            S=each.sizes._replace(ALIGN=align),
            num_warps=each.num_warps,
            num_stages=1,
        )
    del state  # the next one may take its place
    if needs.need_k or needs.need_v:
        dstate = linear_states(q, do, plan, tops, stat)
        for each in plan.passes:
            _linear_bwd_dkv_kernel[each.programs, heads](
                *rows,
                dstate,
                dk,
                dv,
                stat,
                plan.batch,
                *plan.counts,
                each.tiles,
                NEED_K=needs.need_k,
                NEED_V=needs.need_v,
                S=each.sizes._replace(ALIGN=align),
                num_warps=each.num_warps,
                num_stages=1,
            )
    return dq, dk, dv
