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

from .configs import alignment
from .linear_attention import (
    COUNTS,
    attend,
    find_turns,
    linear_plan,
    linear_states,
    load_key_top,
    load_stat,
    load_state,
    state_rows,
    take_nodes,
)
from .linear_features import (
    before_features,
    features,
    load_held,
    load_inputs,
    load_projection,
    load_stabilised,
    store_inputs,
    times_matrix,
    times_rows,
)
from .loads import dot, load_rows, scalar, store_rows


@triton.jit(do_not_specialize=COUNTS)
def _linear_bwd_dq_kernel(
    do_ptr, q_ptr, k_ptr, v_ptr, projection_ptr,
    top_ptr, state_ptr, z_ptr,  # [G, H], [P, H, M, DV], [P, H, M]
    dq_ptr, stat_ptr,  # [N, H, D]; [N, H, 3]: share, down and stabiliser of the query
    offsets_ptr, piece_ptr, mask_ptr,
    do_stride, q_stride, k_stride, v_stride, mask_stride,
    num_graphs, piece, small, tiles, eps: tl.float64,
    H: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, M: tl.constexpr, MAP: tl.constexpr,
    NORMALIZE: tl.constexpr, NEED_Q: tl.constexpr, SMALL: tl.constexpr,
    ALIGN: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_M: tl.constexpr,
    SLICE: tl.constexpr,
):  # fmt: skip
    """Grid (programs or graphs, heads): dq of a piece's or a small graph's nodes, and what dk
    and dv need to know of them."""
    ACC: tl.constexpr = state_ptr.dtype.element_ty
    RANDOM: tl.constexpr = projection_ptr is not None
    head = tl.program_id(1)
    turns, stride = find_turns(piece_ptr, num_graphs, SMALL)
    for turn in range(tl.program_id(0), turns, stride):
        graph, slot, begin, end = take_nodes(
            offsets_ptr, piece_ptr, mask_ptr, mask_stride, head, turn, num_graphs, piece, small,
            SMALL,
        )  # fmt: skip
        key_top = load_key_top(top_ptr, graph, head, H, MAP, BLOCK_N, ACC)
        for step in range(0, end - begin, BLOCK_N):
            row = begin + step + tl.arange(0, BLOCK_N)
            live = row < end
            q, half, top = load_stabilised(
                q_ptr, q_stride, row, live, head, projection_ptr, tiles,
                D, M, MAP, ALIGN, BLOCK_N, BLOCK_D, BLOCK_M, SLICE, ACC, PRECISION,
            )  # fmt: skip
            share = tl.full([BLOCK_N], 1.0, ACC)
            down = tl.zeros([BLOCK_N], ACC)
            if NORMALIZE:
                num, den = attend(
                    q_ptr, k_ptr, v_ptr, q_stride, k_stride, v_stride, projection_ptr, q, half, top,
                    key_top, row, live, head, slot, begin, end, state_ptr, z_ptr,
                    tiles, H, D, DV, M, MAP, RANDOM, ALIGN, PRECISION, ACC, SMALL,
                    BLOCK_N, BLOCK_D, BLOCK_DV, BLOCK_M, SLICE,
                )  # fmt: skip
                share = 1 / (den + scalar(eps, ACC))
                do = load_rows(do_ptr, do_stride, row, live, head, DV, BLOCK_DV, ALIGN).to(ACC)
                down = -share * tl.sum(do * share[:, None] * num, 1)
            at = stat_ptr + (row * H + head) * 3
            tl.store(at, share, mask=live)
            tl.store(at + 1, down, mask=live)
            tl.store(at + 2, top, mask=live)
            if NEED_Q:
                flow = load_held(
                    do_ptr, do_stride, row, live, head, DV, BLOCK_DV, SLICE, ALIGN, ACC
                )
                dx = tl.zeros([BLOCK_N, BLOCK_D], ACC)
                total = tl.zeros([BLOCK_N], ACC)
                for tile in range(tiles):
                    df = tl.zeros([BLOCK_N, BLOCK_M], ACC)
                    if not SMALL:
                        m, inside = state_rows(slot, head, tile, H, M, BLOCK_M)
                        df += times_matrix(
                            flow, do_ptr, do_stride, row, live, head, state_ptr, m, inside,
                            DV, ALIGN, BLOCK_DV, SLICE, ACC, PRECISION,
                        )  # fmt: skip
                        z = tl.load(z_ptr + m, mask=inside, other=0.0)
                        df = df * share[:, None] + down[:, None] * z[None, :]
                    else:
                        for key_step in range(0, end - begin, BLOCK_N):
                            key = begin + key_step + tl.arange(0, BLOCK_N)
                            there = key < end
                            k, k_half = load_inputs(
                                k_ptr,
                                k_stride,
                                key,
                                there,
                                head,
                                D,
                                RANDOM,
                                BLOCK_D,
                                SLICE,
                                ALIGN,
                                ACC,
                            )
                            g, _g_inner = features(
                                k_ptr, k_stride, k, k_half, key_top, key, there, head, tile,
                                projection_ptr, D, M, MAP, ALIGN, BLOCK_D, BLOCK_M, SLICE, ACC,
                                PRECISION,
                            )  # fmt: skip
                            db = times_rows(
                                flow, do_ptr, do_stride, row, live, v_ptr, v_stride, key, there,
                                head, DV, ALIGN, BLOCK_DV, SLICE, ACC, PRECISION,
                            )  # fmt: skip
                            db = db * share[:, None] + down[:, None]
                            df = dot(db, g, df, ACC, ACC, PRECISION)
                    f, inner = features(
                        q_ptr, q_stride, q, half, top, row, live, head, tile, projection_ptr,
                        D, M, MAP, ALIGN, BLOCK_D, BLOCK_M, SLICE, ACC, PRECISION,
                    )  # fmt: skip
                    gradient = before_features(df, f, inner, M, MAP)
                    if RANDOM:
                        w = load_projection(projection_ptr, tile, D, M, BLOCK_D, BLOCK_M)
                        dx = dot(gradient, w, dx, ACC, ACC, PRECISION)
                        total += tl.sum(gradient, 1)
                    else:
                        store_rows(dq_ptr, row, live, head, H, D, BLOCK_M, gradient, tile * BLOCK_M)
                if RANDOM:
                    store_inputs(
                        dq_ptr, q_ptr, q_stride, row, live, head, dx, total,
                        H, D, MAP, ALIGN, BLOCK_D, ACC,
                    )  # fmt: skip


@triton.jit
def query_features(
    q_ptr, q_stride, top, query, there, head, tile, projection_ptr,
    D: tl.constexpr, M: tl.constexpr, MAP: tl.constexpr, RANDOM: tl.constexpr,
    ALIGN: tl.constexpr, PRECISION: tl.constexpr, ACC: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, SLICE: tl.constexpr,
):  # fmt: skip
    """phi(q) [N, BLOCK_M] of some queries."""
    q, half = load_inputs(
        q_ptr, q_stride, query, there, head, D, RANDOM, BLOCK_D, SLICE, ALIGN, ACC
    )
    f, _ = features(
        q_ptr, q_stride, q, half, top, query, there, head, tile, projection_ptr,
        D, M, MAP, ALIGN, BLOCK_D, BLOCK_M, SLICE, ACC, PRECISION,
    )  # fmt: skip
    return f


@triton.jit(do_not_specialize=COUNTS)
def _linear_bwd_dkv_kernel(
    do_ptr, q_ptr, k_ptr, v_ptr, projection_ptr,
    top_ptr, dstate_ptr, dz_ptr,  # [G, H], [P, H, M, DV], [P, H, M]
    dk_ptr, dv_ptr, stat_ptr,  # [N, H, D], [N, H, DV], [N, H, 3]
    offsets_ptr, piece_ptr, mask_ptr,
    do_stride, q_stride, k_stride, v_stride, mask_stride,
    num_graphs, piece, small, tiles,
    H: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, M: tl.constexpr, MAP: tl.constexpr,
    NEED_K: tl.constexpr, NEED_V: tl.constexpr, SMALL: tl.constexpr,
    ALIGN: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_M: tl.constexpr,
    SLICE: tl.constexpr,
):  # fmt: skip
    """Grid (programs or graphs, heads): dk and dv of a piece's or a small graph's nodes."""
    ACC: tl.constexpr = dstate_ptr.dtype.element_ty
    RANDOM: tl.constexpr = projection_ptr is not None
    head = tl.program_id(1)
    turns, stride = find_turns(piece_ptr, num_graphs, SMALL)
    for turn in range(tl.program_id(0), turns, stride):
        graph, slot, begin, end = take_nodes(
            offsets_ptr, piece_ptr, mask_ptr, mask_stride, head, turn, num_graphs, piece, small,
            SMALL,
        )  # fmt: skip
        key_top = load_key_top(top_ptr, graph, head, H, MAP, BLOCK_N, ACC)
        for step in range(0, end - begin, BLOCK_N):
            row = begin + step + tl.arange(0, BLOCK_N)
            live = row < end
            k, half = load_inputs(
                k_ptr, k_stride, row, live, head, D, RANDOM, BLOCK_D, SLICE, ALIGN, ACC
            )
            v = load_held(v_ptr, v_stride, row, live, head, DV, BLOCK_DV, SLICE, ALIGN, ACC)
            dv = tl.zeros([BLOCK_N, BLOCK_DV], ACC)
            dx = tl.zeros([BLOCK_N, BLOCK_D], ACC)
            total = tl.zeros([BLOCK_N], ACC)
            for tile in range(tiles):
                if NEED_V:
                    g, inner = features(
                        k_ptr, k_stride, k, half, key_top, row, live, head, tile, projection_ptr,
                        D, M, MAP, ALIGN, BLOCK_D, BLOCK_M, SLICE, ACC, PRECISION,
                    )  # fmt: skip
                    if not SMALL:
                        ds, dz = load_state(
                            dstate_ptr, dz_ptr, slot, head, tile, H, M, DV, BLOCK_M, BLOCK_DV
                        )
                        dv = dot(g, ds, dv, ACC, ACC, PRECISION)
                    else:
                        for query_step in range(0, end - begin, BLOCK_N):
                            query = begin + query_step + tl.arange(0, BLOCK_N)
                            there = query < end
                            share, _down, top = load_stat(stat_ptr, query, there, head, H)
                            f = query_features(
                                q_ptr, q_stride, top, query, there, head, tile, projection_ptr,
                                D, M, MAP, RANDOM, ALIGN, PRECISION, ACC, BLOCK_D, BLOCK_M, SLICE,
                            )  # fmt: skip
                            # this tile's part of b: the other tiles add theirs
                            b = dot(g, tl.trans(f), None, ACC, ACC, PRECISION) * share[None, :]
                            do = load_rows(
                                do_ptr, do_stride, query, there, head, DV, BLOCK_DV, ALIGN
                            )
                            dv = dot(b, do.to(ACC), dv, ACC, ACC, PRECISION)
                if NEED_K:
                    dg = tl.zeros([BLOCK_N, BLOCK_M], ACC)
                    if not SMALL:
                        m, inside = state_rows(slot, head, tile, H, M, BLOCK_M)
                        dz = tl.load(dz_ptr + m, mask=inside, other=0.0)
                        dg += dz[None, :] + times_matrix(
                            v, v_ptr, v_stride, row, live, head, dstate_ptr, m, inside,
                            DV, ALIGN, BLOCK_DV, SLICE, ACC, PRECISION,
                        )  # fmt: skip
                    else:
                        for query_step in range(0, end - begin, BLOCK_N):
                            query = begin + query_step + tl.arange(0, BLOCK_N)
                            there = query < end
                            share, down, top = load_stat(stat_ptr, query, there, head, H)
                            f = query_features(
                                q_ptr, q_stride, top, query, there, head, tile, projection_ptr,
                                D, M, MAP, RANDOM, ALIGN, PRECISION, ACC, BLOCK_D, BLOCK_M, SLICE,
                            )  # fmt: skip
                            db = times_rows(
                                v, v_ptr, v_stride, row, live, do_ptr, do_stride, query, there,
                                head, DV, ALIGN, BLOCK_DV, SLICE, ACC, PRECISION,
                            )  # fmt: skip
                            db = db * share[None, :] + down[None, :]
                            dg = dot(db, f, dg, ACC, ACC, PRECISION)
                    # made anew rather than held meanwhile
                    g, inner = features(
                        k_ptr, k_stride, k, half, key_top, row, live, head, tile, projection_ptr,
                        D, M, MAP, ALIGN, BLOCK_D, BLOCK_M, SLICE, ACC, PRECISION,
                    )  # fmt: skip
                    gradient = before_features(dg, g, inner, M, MAP)
                    if RANDOM:
                        w = load_projection(projection_ptr, tile, D, M, BLOCK_D, BLOCK_M)
                        dx = dot(gradient, w, dx, ACC, ACC, PRECISION)
                        total += tl.sum(gradient, 1)
                    else:
                        store_rows(dk_ptr, row, live, head, H, D, BLOCK_M, gradient, tile * BLOCK_M)
            if NEED_K and RANDOM:
                store_inputs(
                    dk_ptr, k_ptr, k_stride, row, live, head, dx, total,
                    H, D, MAP, ALIGN, BLOCK_D, ACC,
                )  # fmt: skip
            if NEED_V:
                store_rows(dv_ptr, row, live, head, H, DV, BLOCK_DV, dv)


def linear_attention_bwd(
    do,
    q,
    k,
    v,
    tops,
    offsets,
    projection,
    mask,
    feature_map,
    eps,
    normalize,
    need_q,
    need_k,
    need_v,
):
    """-> dq, dk [N, H, D], dv [N, H, DV]; empty where not needed."""
    n, heads, _ = q.shape
    dq, dk, dv = (
        (x.new_empty if mask is None else x.new_zeros)(x.shape if need else (0,))
        for x, need in ((q, need_q), (k, need_k), (v, need_v))
    )
    if not n:
        return dq, dk, dv
    plan = linear_plan(q, k, v, offsets, projection, mask, feature_map)
    inputs = do, q, k, v, plan.projection, tops
    strides = do.stride(), q.stride(), k.stride(), v.stride()
    counts = plan.mask_stride, plan.graphs, plan.piece, plan.small
    same = {"H": heads, "ALIGN": alignment((do, q, k, v))}
    states = linear_states(k, v, plan, tops, None)
    stat = states[0].new_empty(n, heads, 3)
    for programs, tiles, meta in plan.passes:
        _linear_bwd_dq_kernel[programs, heads](
            *inputs, *states, dq, stat, *plan.walk, *strides, *counts, tiles, eps,
            NORMALIZE=normalize, NEED_Q=need_q, **same, **meta,
        )  # fmt: skip
    del states  # the next ones may take their place
    if need_k or need_v:
        states = linear_states(q, do, plan, tops, stat)
        for programs, tiles, meta in plan.passes:
            _linear_bwd_dkv_kernel[programs, heads](
                *inputs, *states, dk, dv, stat, *plan.walk, *strides, *counts, tiles,
                NEED_K=need_k, NEED_V=need_v, **same, **meta,
            )  # fmt: skip
    return dq, dk, dv
