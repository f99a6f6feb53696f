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

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from .configs import accumulator, alignment, linear_precision, linear_tile, power_of_2
from .linear_features import features, load_inputs, load_matrix, load_stabilised
from .loads import dot, load_rows, scalar, store_rows

COUNTS = ["num_graphs", "piece", "small", "tiles"]


@triton.jit
def find_graph(piece_ptr, pid, num_graphs):
    """The graph that piece ``pid`` belongs to: the last whose pieces begin at it or before."""
    low = tl.full((), 0, tl.int64)
    high = tl.full((), num_graphs, tl.int64)
    while low + 1 < high:
        middle = (low + high) // 2
        before = tl.load(piece_ptr + middle) <= pid
        low = tl.where(before, middle, low)
        high = tl.where(before, high, middle)
    return low


@triton.jit
def find_piece(offsets_ptr, piece_ptr, pid, num_graphs, piece):
    """-> graph, its first piece, begin and end of this piece's nodes."""
    graph = find_graph(piece_ptr, pid, num_graphs)
    first = tl.load(piece_ptr + graph).to(tl.int64)
    begin = tl.load(offsets_ptr + graph).to(tl.int64) + (pid - first) * piece
    end = tl.minimum(begin + piece, tl.load(offsets_ptr + graph + 1).to(tl.int64))
    return graph, first, begin, end


@triton.jit
def find_turns(piece_ptr, num_graphs, SMALL: tl.constexpr):
    """-> end and step of what a program takes in turns, from its own number on: pieces, of which
    the host knows only how many there may be; of graphs, one."""
    if SMALL:
        end = tl.program_id(0) + 1
        step = 1
    else:
        end = tl.load(piece_ptr + num_graphs).to(tl.int32)
        step = tl.num_programs(0)
    return end, step


@triton.jit
def take_nodes(
    offsets_ptr, piece_ptr, mask_ptr, mask_stride, head, at, num_graphs, piece, small,
    SMALL: tl.constexpr,
):  # fmt: skip
    """Piece or graph ``at``: -> graph, slot of its state, begin and end of its nodes. No nodes
    where a graph is not small, or its head is masked."""
    if SMALL:
        graph = tl.full((), at, tl.int64)
        slot = graph
        begin = tl.load(offsets_ptr + graph).to(tl.int64)
        end = tl.load(offsets_ptr + graph + 1).to(tl.int64)
        end = tl.where(end - begin < small, end, begin)
    else:
        graph, slot, begin, end = find_piece(offsets_ptr, piece_ptr, at, num_graphs, piece)
    return graph, slot, begin, active_end(mask_ptr, mask_stride, graph, head, begin, end)


@triton.jit
def active_end(mask_ptr, mask_stride, graph, head, begin, end):
    """The end of a graph's nodes for a head; the begin where ``mask`` [1 or G, H] is false."""
    if mask_ptr is not None:
        end = tl.where(tl.load(mask_ptr + graph * mask_stride + head), end, begin)
    return end


@triton.jit
def load_key_top(
    top_ptr, graph, head, H: tl.constexpr, MAP: tl.constexpr, BLOCK_N: tl.constexpr,
    ACC: tl.constexpr,
):  # fmt: skip
    """The stabiliser of a graph's keys, for each of N nodes."""
    top = tl.zeros([BLOCK_N], ACC)
    if MAP == "softmax":
        top += tl.load(top_ptr + graph * H + head)
    return top


@triton.jit
def state_rows(slot, head, tile, H: tl.constexpr, M: tl.constexpr, BLOCK_M: tl.constexpr):
    """-> which rows of all states [P * H * M] are a tile of features, and which of them exist."""
    m = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    return (slot.to(tl.int64) * H + head) * M + m, m < M


@triton.jit
def load_state(
    state_ptr, z_ptr, slot, head, tile, H: tl.constexpr, M: tl.constexpr, DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    """-> BLOCK_M rows of a state, [M, DV], and of its last column, [M]."""
    m, there = state_rows(slot, head, tile, H, M, BLOCK_M)
    s = load_matrix(state_ptr, m, there, 0, DV, BLOCK_DV)
    return s, tl.load(z_ptr + m, mask=there, other=0.0)


@triton.jit
def store_state(
    state_ptr, z_ptr, slot, head, tile, s, z, H: tl.constexpr, M: tl.constexpr, DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    """Inverse of ``load_state``."""
    m, there = state_rows(slot, head, tile, H, M, BLOCK_M)
    d = tl.arange(0, BLOCK_DV)
    mask = there[:, None] & (d < DV)[None, :]
    tl.store(state_ptr + m[:, None] * DV + d[None, :], s, mask=mask)
    tl.store(z_ptr + m, z, mask=there)


@triton.jit(do_not_specialize=COUNTS)
def _linear_top_kernel(
    k_ptr, projection_ptr,  # [N, H, D], [M, D]
    top_ptr,  # [P, H] or [G, H]
    offsets_ptr, piece_ptr, mask_ptr,  # [G + 1], [G + 1], [1 or G, H]
    k_stride, mask_stride, num_graphs, piece, small, tiles,
    H: tl.constexpr, D: tl.constexpr, M: tl.constexpr, MAP: tl.constexpr, SMALL: tl.constexpr,
    ALIGN: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, SLICE: tl.constexpr,
):  # fmt: skip
    """Grid (programs or graphs, heads): the stabiliser of the keys of a piece, or of a small graph;
    -inf for a graph that has pieces."""
    ACC: tl.constexpr = top_ptr.dtype.element_ty
    head = tl.program_id(1)
    turns, stride = find_turns(piece_ptr, num_graphs, SMALL)
    for turn in range(tl.program_id(0), turns, stride):
        _graph, _slot, begin, end = take_nodes(
            offsets_ptr, piece_ptr, mask_ptr, mask_stride, head, turn, num_graphs, piece, small,
            SMALL,
        )  # fmt: skip
        top = tl.full([BLOCK_N], float("-inf"), ACC)
        for step in range(0, end - begin, BLOCK_N):
            row = begin + step + tl.arange(0, BLOCK_N)
            live = row < end
            _x, _half, found = load_stabilised(
                k_ptr, k_stride, row, live, head, projection_ptr, tiles,
                D, M, MAP, ALIGN, BLOCK_N, BLOCK_D, BLOCK_M, SLICE, ACC, PRECISION,
            )  # fmt: skip
            top = tl.maximum(top, tl.where(live, found, float("-inf")))
        tl.store(top_ptr + tl.full((), turn, tl.int64) * H + head, tl.max(top, 0))


@triton.jit
def _linear_top_of_graph_kernel(
    piece_top_ptr, top_ptr,  # [P, H], [G, H]
    piece_ptr, H: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """Grid (graphs,): the largest stabiliser of a graph's pieces, of all heads."""
    graph = tl.program_id(0).to(tl.int64)
    head = tl.arange(0, BLOCK_H)
    begin, end = tl.load(piece_ptr + graph), tl.load(piece_ptr + graph + 1)
    top = tl.load(top_ptr + graph * H + head, mask=head < H, other=0.0)
    for step in range(end - begin):
        at = (begin + step).to(tl.int64) * H + head
        top = tl.maximum(top, tl.load(piece_top_ptr + at, mask=head < H, other=0.0))
    tl.store(top_ptr + graph * H + head, top, mask=head < H)


@triton.jit(do_not_specialize=COUNTS)
def _linear_state_kernel(
    x_ptr, y_ptr, projection_ptr,  # [N, H, D], [N, H, DV], [M, D]
    top_ptr, stat_ptr,  # stabilisers: [G, H] of keys; of queries in [N, H, 3]: share, down, top
    state_ptr, z_ptr,  # [P, H, M, DV], [P, H, M]
    offsets_ptr, piece_ptr, mask_ptr,
    x_stride, y_stride, mask_stride, num_graphs, piece,
    H: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, M: tl.constexpr, MAP: tl.constexpr,
    OF_QUERIES: tl.constexpr, ALIGN: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_M: tl.constexpr,
    SLICE: tl.constexpr,
):  # fmt: skip
    """Grid (programs, heads, feature tiles): a piece's state, of keys and values; or its gradient,
    of queries and do', which is do times share, and down in the last column."""
    ACC: tl.constexpr = state_ptr.dtype.element_ty
    RANDOM: tl.constexpr = projection_ptr is not None
    head, tile = tl.program_id(1), tl.program_id(2)
    turns, stride = find_turns(piece_ptr, num_graphs, False)
    for turn in range(tl.program_id(0), turns, stride):
        slot = tl.full((), turn, tl.int64)
        graph, _first, begin, end = find_piece(offsets_ptr, piece_ptr, slot, num_graphs, piece)
        end = active_end(mask_ptr, mask_stride, graph, head, begin, end)
        key_top = tl.zeros([BLOCK_N], ACC)
        if not OF_QUERIES:
            key_top = load_key_top(top_ptr, graph, head, H, MAP, BLOCK_N, ACC)
        s = tl.zeros([BLOCK_M, BLOCK_DV], ACC)
        z = tl.zeros([BLOCK_M], ACC)
        for step in range(0, end - begin, BLOCK_N):
            row = begin + step + tl.arange(0, BLOCK_N)
            live = row < end
            x, half = load_inputs(
                x_ptr, x_stride, row, live, head, D, RANDOM, BLOCK_D, SLICE, ALIGN, ACC
            )
            y = load_rows(y_ptr, y_stride, row, live, head, DV, BLOCK_DV, ALIGN).to(ACC)
            last = tl.full([BLOCK_N], 1.0, ACC)
            top = key_top
            if OF_QUERIES:
                share, last, top = load_stat(stat_ptr, row, live, head, H)
                y = y * share[:, None]
            phi, _inner = features(
                x_ptr, x_stride, x, half, top, row, live, head, tile, projection_ptr,
                D, M, MAP, ALIGN, BLOCK_D, BLOCK_M, SLICE, ACC, PRECISION,
            )  # fmt: skip
            s = dot(tl.trans(phi), y, s, ACC, ACC, PRECISION)
            z += tl.sum(phi * last[:, None], 0)
        store_state(state_ptr, z_ptr, slot, head, tile, s, z, H, M, DV, BLOCK_M, BLOCK_DV)


@triton.jit
def load_stat(stat_ptr, row, live, head, H: tl.constexpr):
    """-> share, down and stabiliser of queries [N]."""
    at = stat_ptr + (row.to(tl.int64) * H + head) * 3
    share = tl.load(at, mask=live, other=0.0)
    return share, tl.load(at + 1, mask=live, other=0.0), tl.load(at + 2, mask=live, other=0.0)


@triton.jit(do_not_specialize=COUNTS)
def _linear_combine_kernel(
    state_ptr, z_ptr,  # [P, H, M, DV], [P, H, M]
    piece_ptr, num_graphs,
    H: tl.constexpr, DV: tl.constexpr, M: tl.constexpr,
    BLOCK_DV: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """Grid (programs, heads, feature tiles): a graph's first piece adds those of the others to its
    own, in order."""
    head, tile = tl.program_id(1), tl.program_id(2)
    turns, stride = find_turns(piece_ptr, num_graphs, False)
    for turn in range(tl.program_id(0), turns, stride):
        slot = tl.full((), turn, tl.int64)
        graph = find_graph(piece_ptr, slot, num_graphs)
        first, after = tl.load(piece_ptr + graph), tl.load(piece_ptr + graph + 1)
        if (slot == first) & (after - first > 1):
            s, z = load_state(state_ptr, z_ptr, slot, head, tile, H, M, DV, BLOCK_M, BLOCK_DV)
            for step in range(1, after - first):
                more_s, more_z = load_state(
                    state_ptr, z_ptr, first + step, head, tile, H, M, DV, BLOCK_M, BLOCK_DV
                )
                s += more_s
                z += more_z
            store_state(state_ptr, z_ptr, slot, head, tile, s, z, H, M, DV, BLOCK_M, BLOCK_DV)


@triton.jit
def attend(
    q_ptr, k_ptr, v_ptr, q_stride, k_stride, v_stride, projection_ptr, q, half, top, key_top,
    row, live, head, slot, begin, end, state_ptr, z_ptr, tiles,
    H: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, M: tl.constexpr, MAP: tl.constexpr,
    RANDOM: tl.constexpr, ALIGN: tl.constexpr, PRECISION: tl.constexpr, ACC: tl.constexpr,
    SMALL: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_M: tl.constexpr,
    SLICE: tl.constexpr,
):  # fmt: skip
    """phi(q) S [N, DV] and phi(q) z [N]: from a state, or key by key where ``SMALL``."""
    num = tl.zeros([BLOCK_N, BLOCK_DV], ACC)
    den = tl.zeros([BLOCK_N], ACC)
    if not SMALL:
        for tile in range(tiles):
            f, _f_inner = features(
                q_ptr, q_stride, q, half, top, row, live, head, tile, projection_ptr,
                D, M, MAP, ALIGN, BLOCK_D, BLOCK_M, SLICE, ACC, PRECISION,
            )  # fmt: skip
            s, z = load_state(state_ptr, z_ptr, slot, head, tile, H, M, DV, BLOCK_M, BLOCK_DV)
            num = dot(f, s, num, ACC, ACC, PRECISION)
            den += tl.sum(f * z[None, :], 1)
    else:
        for step in range(0, end - begin, BLOCK_N):
            key = begin + step + tl.arange(0, BLOCK_N)
            there = key < end
            k, k_half = load_inputs(
                k_ptr, k_stride, key, there, head, D, RANDOM, BLOCK_D, SLICE, ALIGN, ACC
            )
            a = tl.zeros([BLOCK_N, BLOCK_N], ACC)
            for tile in range(tiles):
                f, _f_inner = features(
                    q_ptr, q_stride, q, half, top, row, live, head, tile, projection_ptr,
                    D, M, MAP, ALIGN, BLOCK_D, BLOCK_M, SLICE, ACC, PRECISION,
                )  # fmt: skip
                g, _g_inner = features(
                    k_ptr, k_stride, k, k_half, key_top, key, there, head, tile, projection_ptr,
                    D, M, MAP, ALIGN, BLOCK_D, BLOCK_M, SLICE, ACC, PRECISION,
                )  # fmt: skip
                a = dot(f, tl.trans(g), a, ACC, ACC, PRECISION)
            v = load_rows(v_ptr, v_stride, key, there, head, DV, BLOCK_DV, ALIGN).to(ACC)
            num = dot(a, v, num, ACC, ACC, PRECISION)
            den += tl.sum(a, 1)
    return num, den


@triton.jit(do_not_specialize=COUNTS)
def _linear_fwd_kernel(
    q_ptr, k_ptr, v_ptr, projection_ptr,  # [N, H, D], [N, H, D], [N, H, DV], [M, D]
    top_ptr, state_ptr, z_ptr,  # [G, H], [P, H, M, DV], [P, H, M]
    o_ptr,  # [N, H, DV]
    offsets_ptr, piece_ptr, mask_ptr,
    q_stride, k_stride, v_stride, mask_stride, num_graphs, piece, small, tiles,
    eps: tl.float64,
    H: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, M: tl.constexpr, MAP: tl.constexpr,
    NORMALIZE: tl.constexpr, SMALL: tl.constexpr, ALIGN: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_M: tl.constexpr,
    SLICE: tl.constexpr,
):  # fmt: skip
    """Grid (programs or graphs, heads): the output of a piece, or of a small graph."""
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
            num, den = attend(
                q_ptr, k_ptr, v_ptr, q_stride, k_stride, v_stride, projection_ptr, q, half, top,
                key_top, row, live, head, slot, begin, end, state_ptr, z_ptr,
                tiles, H, D, DV, M, MAP, RANDOM, ALIGN, PRECISION, ACC, SMALL,
                BLOCK_N, BLOCK_D, BLOCK_DV, BLOCK_M, SLICE,
            )  # fmt: skip
            if NORMALIZE:
                num = num / (den + scalar(eps, ACC))[:, None]
            store_rows(o_ptr, row, live, head, H, DV, BLOCK_DV, num)


def linear_attention_fwd(q, k, v, offsets, projection, mask, feature_map, eps, normalize):
    """-> o [N, H, DV], and for "softmax" the stabilisers of the keys [G, H] (else [0, H])."""
    n, heads, _ = q.shape
    o = q.new_empty(v.shape) if mask is None else q.new_zeros(v.shape)
    plan = linear_plan(q, k, v, offsets, projection, mask, feature_map)
    softmax = feature_map == "softmax"
    tops = q.new_empty(plan.graphs if softmax else 0, heads, dtype=accumulator(q))
    if not n:
        # stabilisers of no keys
        return o, tops.fill_(float("-inf"))
    if softmax:
        _tops(k, plan, tops)
    states = linear_states(k, v, plan, tops, None)
    strides = q.stride(), k.stride(), v.stride()
    for programs, tiles, meta in plan.passes:
        _linear_fwd_kernel[programs, heads](
            q, k, v, plan.projection, tops, *states, o, *plan.walk, *strides,
            plan.mask_stride, plan.graphs, plan.piece, plan.small, tiles, eps,
            H=heads, NORMALIZE=normalize, ALIGN=alignment((q, k, v)), **meta,
        )  # fmt: skip
    return o, tops


class Plan(NamedTuple):
    """How a batch is cut, and the constants of the passes over its pieces and small graphs."""

    # offsets; pieces of the graphs before, [G + 1]; active heads [1 or G, H]
    walk: tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]
    mask_stride: int
    projection: torch.Tensor | None
    graphs: int
    pieces: int  # at most: how many there are, only the device knows
    piece: int  # nodes of a piece
    small: int  # nodes from which a graph is cut into pieces
    meta: dict[str, Any]  # of what goes through pieces
    # programs, feature tiles (no constant: they would be unrolled, and spill) and constants of a
    # pass over pieces and one over small graphs, as far as there may be any
    passes: list[tuple[int, int, dict[str, Any]]]


def linear_plan(q, k, v, offsets, projection, mask, feature_map) -> Plan:
    n, heads, d = q.shape
    m, dv = d if projection is None else projection.shape[0], v.shape[2]
    if offsets is None:
        offsets = torch.arange(2, device=q.device) * n
    if projection is not None:
        projection = projection.to(accumulator(q)).contiguous()
        if feature_map == "softmax":
            projection = projection * d**-0.25
    shape = {
        "D": d,
        "DV": dv,
        "M": m,
        "MAP": feature_map,
        "PRECISION": linear_precision(q),
        "BLOCK_D": max(16, power_of_2(d)),
        "BLOCK_DV": max(16, power_of_2(dv)),
        "num_stages": 1,
    }
    metas = []
    for whole in (False, True):
        tile = linear_tile(m, 1 if projection is None else d, dv, q.element_size(), whole)
        named = {
            "BLOCK_N": tile.block_n,
            "BLOCK_M": tile.block_m,
            "SLICE": tile.channels,
            "num_warps": tile.num_warps,
        }
        metas.append(shape | named)
    graphs, small = offsets.shape[0] - 1, max(1, 2 * m * dv // (m + dv))
    piece = max(power_of_2(small), power_of_2(n * heads // _PROGRAMS), metas[0]["BLOCK_N"])
    pieces = n // piece + min(graphs, n // small)
    sizes = offsets.diff()
    counts = (sizes + (piece - 1)).div_(piece, rounding_mode="floor")
    piece_ptr = offsets.new_zeros(graphs + 1)
    torch.cumsum(counts.masked_fill_(sizes < small, 0), 0, out=piece_ptr[1:])
    passes = [
        (programs, -(-m // meta["BLOCK_M"]), meta | {"SMALL": whole})
        for programs, meta, whole in (
            (_programs(pieces, heads), metas[0], False),
            (graphs, metas[1], True),
        )
        if programs
    ]
    walk = offsets.contiguous(), piece_ptr, mask
    stride = 0 if mask is None or len(mask) == 1 else heads
    return Plan(walk, stride, projection, graphs, pieces, piece, small, metas[0], passes)


# of a pass over one graph: enough to fill a device of some 150 processors a few times
_PROGRAMS = 2048


def _programs(pieces, others):
    """As many as fill a device, of which each takes some pieces in turns: most of those that there
    may be are not there, where graphs are small."""
    return min(pieces, max(1, 2 * _PROGRAMS // others))


def linear_states(x, y, plan, tops, stat):
    """-> states [P, H, M, DV] and their last columns [P, H, M], a graph's in its first piece's
    place: of keys and values, or with ``stat`` the gradients, of queries and upstream gradients."""
    heads, meta = x.shape[1], plan.meta
    m, dv = meta["M"], meta["DV"]
    state = x.new_empty(plan.pieces, heads, m, dv, dtype=accumulator(x))
    z = state.new_empty(plan.pieces, heads, m)
    if plan.pieces:
        tiles = -(-m // meta["BLOCK_M"])
        grid = _programs(plan.pieces, heads * tiles), heads, tiles
        _linear_state_kernel[grid](
            x, y, plan.projection, tops, stat, state, z, *plan.walk,
            x.stride(), y.stride(), plan.mask_stride, plan.graphs, plan.piece,
            H=heads, OF_QUERIES=stat is not None, ALIGN=alignment((x, y)), **meta,
        )  # fmt: skip
        _linear_combine_kernel[grid](
            state, z, plan.walk[1], plan.graphs,
            H=heads, DV=dv, M=m, BLOCK_DV=meta["BLOCK_DV"], BLOCK_M=meta["BLOCK_M"],
        )  # fmt: skip
    return state, z


def _tops(k, plan, tops):
    heads = k.shape[1]
    piece_tops = tops.new_empty(plan.pieces, heads)
    for programs, tiles, meta in plan.passes:
        meta = {name: x for name, x in meta.items() if name not in ("DV", "BLOCK_DV")}
        _linear_top_kernel[programs, heads](
            k, plan.projection, tops if meta["SMALL"] else piece_tops, *plan.walk, k.stride(),
            plan.mask_stride, plan.graphs, plan.piece, plan.small, tiles,
            H=heads, ALIGN=alignment((k,)), **meta,
        )  # fmt: skip
    if plan.pieces:
        _linear_top_of_graph_kernel[plan.graphs,](
            piece_tops, tops, plan.walk[1], H=heads, BLOCK_H=power_of_2(heads)
        )
