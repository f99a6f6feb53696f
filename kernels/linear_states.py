"""The states of linear attention: graphs are cut into pieces, and each piece has one.

The picture of pieces and small graphs is that of ``linear_attention.py``.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from fastgt.contract import Features, Inputs, Ragged

from .configs import accumulator, alignment, linear_precision, linear_tile, power_of_2
from .linear_features import Nodes, Sizes, dot, features, hold, load_matrix, load_wide
from .loads import Rows, sum_dtype

COUNTS = ["num_graphs", "piece", "small", "tiles"]


class Batch(NamedTuple):
    """Where graphs and their pieces begin, and which heads are active; None: all."""

    offsets_ptr: Any  # [G + 1]
    piece_ptr: Any  # [G + 1]
    mask_ptr: Any  # [1 or G, H]
    mask_stride: Any  # 0 or H


class State(NamedTuple):
    """A state for every piece, and its last column. A graph's is in its first piece's place."""

    s_ptr: Any  # [P, H, M, DV]
    z_ptr: Any  # [P, H, M]


class Part(NamedTuple):
    """What a program works on at a time: a piece of a graph, or a small graph."""

    graph: Any
    slot: Any  # of its state: of a piece, the graph's first one
    begin: Any  # its nodes; none where a graph is not small, or its head is masked
    end: Any


class StateSizes(NamedTuple):
    """Those of ``Sizes`` that states have."""

    H: int
    M: int
    DV: int
    BLOCK_M: int
    BLOCK_DV: int


class Stat(NamedTuple):
    """What the backward has to know of queries [N]: see ``linear_attention_backward.py``."""

    share: Any
    down: Any
    top: Any  # the stabiliser


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
def take_piece(batch, head, at, num_graphs, piece):
    """Piece ``at``, as a ``Part``."""
    graph = find_graph(batch.piece_ptr, at, num_graphs)
    first = tl.load(batch.piece_ptr + graph).to(tl.int64)
    begin = tl.load(batch.offsets_ptr + graph).to(tl.int64) + (at - first) * piece
    end = tl.minimum(begin + piece, tl.load(batch.offsets_ptr + graph + 1).to(tl.int64))
    return Part(graph, first, begin, active_end(batch, graph, head, begin, end))


@triton.jit
def take_part(batch, head, at, num_graphs, piece, small, SMALL: tl.constexpr):
    """Piece or small graph ``at``, as a ``Part``."""
    if SMALL:
        graph = tl.full((), at, tl.int64)
        begin = tl.load(batch.offsets_ptr + graph).to(tl.int64)
        end = tl.load(batch.offsets_ptr + graph + 1).to(tl.int64)
        end = tl.where(end - begin < small, end, begin)
        part = Part(graph, graph, begin, active_end(batch, graph, head, begin, end))
    else:
        part = take_piece(batch, head, at, num_graphs, piece)
    return part


@triton.jit
def active_end(batch, graph, head, begin, end):
    """The end of a graph's nodes for a head; the begin where the head is masked."""
    if batch.mask_ptr is not None:
        active = tl.load(batch.mask_ptr + graph * batch.mask_stride + head)
        end = tl.where(active, end, begin)
    return end


@triton.jit
def take_nodes(part, step, head, S: tl.constexpr):
    """BLOCK_N nodes of a part, from its ``step``-th on."""
    row = part.begin + step + tl.arange(0, S.BLOCK_N)
    return Nodes(row, row < part.end, head)


@triton.jit
def load_key_top(top_ptr, graph, head, S: tl.constexpr):
    """The stabiliser of a graph's keys, for each of N nodes."""
    top = tl.full([S.BLOCK_N], 0.0, sum_dtype(S.WIDE))
    if S.MAP == "softmax":
        top += tl.load(top_ptr + graph * S.H + head)
    return top


@triton.jit
def state_rows(slot, head, tile, S: tl.constexpr):
    """-> which rows of all states [P * H * M] are a tile of features, and which of them exist."""
    m = tile * S.BLOCK_M + tl.arange(0, S.BLOCK_M)
    return (slot.to(tl.int64) * S.H + head) * S.M + m, m < S.M


@triton.jit
def load_state(state, slot, head, tile, S: tl.constexpr):
    """-> BLOCK_M rows of a state, [M, DV], and of its last column, [M]."""
    m, there = state_rows(slot, head, tile, S)
    s = load_matrix(state.s_ptr, m, there, 0, S.DV, S.BLOCK_DV)
    return s, tl.load(state.z_ptr + m, mask=there, other=0.0)


@triton.jit
def store_state(state, slot, head, tile, s, z, S: tl.constexpr):
    """Inverse of ``load_state``."""
    m, there = state_rows(slot, head, tile, S)
    d = tl.arange(0, S.BLOCK_DV)
    mask = there[:, None] & (d < S.DV)[None, :]
    tl.store(state.s_ptr + m[:, None] * S.DV + d[None, :], s, mask=mask)
    tl.store(state.z_ptr + m, z, mask=there)


@triton.jit
def load_stat(stat_ptr, nodes, S: tl.constexpr):
    """``Stat`` of queries, from [N, H, 3]."""
    at = stat_ptr + (nodes.row.to(tl.int64) * S.H + nodes.head) * 3
    share = tl.load(at, mask=nodes.live, other=0.0)
    down = tl.load(at + 1, mask=nodes.live, other=0.0)
    return Stat(share, down, tl.load(at + 2, mask=nodes.live, other=0.0))


@triton.jit(do_not_specialize=COUNTS)
def _linear_state_kernel(
    x,  # [N, H, D]
    y,  # [N, H, DV]
    projection_ptr,
    top_ptr,  # [G, H]
    stat_ptr,  # [N, H, 3] of queries; None: x and y are keys and values
    state,
    batch,
    num_graphs,
    piece,
    S: tl.constexpr,
):
    """Grid (programs, heads, feature tiles): a piece's state, of keys and values; or its gradient,
    of queries and do', which is do times share, and down in the last column."""
    head, tile = tl.program_id(1), tl.program_id(2)
    turns, stride = find_turns(batch.piece_ptr, num_graphs, False)
    for turn in range(tl.program_id(0), turns, stride):
        slot = tl.full((), turn, tl.int64)
        part = take_piece(batch, head, slot, num_graphs, piece)
        key_top = tl.full([S.BLOCK_N], 0.0, sum_dtype(S.WIDE))
        if stat_ptr is None:
            key_top = load_key_top(top_ptr, part.graph, head, S)
        s = tl.full([S.BLOCK_M, S.BLOCK_DV], 0.0, sum_dtype(S.WIDE))
        z = tl.full([S.BLOCK_M], 0.0, sum_dtype(S.WIDE))
        for step in range(0, part.end - part.begin, S.BLOCK_N):
            nodes = take_nodes(part, step, head, S)
            held = hold(x, nodes, S)
            values = load_wide(y, nodes, S.DV, S.BLOCK_DV, S)
            last = tl.full([S.BLOCK_N], 1.0, sum_dtype(S.WIDE))
            top = key_top
            if stat_ptr is not None:
                stat = load_stat(stat_ptr, nodes, S)
                last, top = stat.down, stat.top
                values = values * stat.share[:, None]
            phi, _inner = features(x, held, top, nodes, tile, projection_ptr, S)
            s = dot(tl.trans(phi), values, s, S)
            z += tl.sum(phi * last[:, None], 0)
        store_state(state, slot, head, tile, s, z, S)


@triton.jit(do_not_specialize=COUNTS)
def _linear_combine_kernel(state, piece_ptr, num_graphs, S: tl.constexpr):
    """Grid (programs, heads, feature tiles): a graph's first piece adds those of the others to its
    own, in order."""
    head, tile = tl.program_id(1), tl.program_id(2)
    turns, stride = find_turns(piece_ptr, num_graphs, False)
    for turn in range(tl.program_id(0), turns, stride):
        slot = tl.full((), turn, tl.int64)
        graph = find_graph(piece_ptr, slot, num_graphs)
        first, after = tl.load(piece_ptr + graph), tl.load(piece_ptr + graph + 1)
        if (slot == first) & (after - first > 1):
            s, z = load_state(state, slot, head, tile, S)
            for step in range(1, after - first):
                more_s, more_z = load_state(state, first + step, head, tile, S)
                s += more_s
                z += more_z
            store_state(state, slot, head, tile, s, z, S)


class Pass(NamedTuple):
    """A pass over pieces, or over small graphs."""

    programs: int
    tiles: int  # of features; no constant: loops would be unrolled, and spill
    sizes: Sizes
    num_warps: int


class Plan(NamedTuple):
    """How a batch is cut, and the constants of the passes over its pieces and small graphs."""

    batch: Batch
    projection: torch.Tensor | None
    graphs: int
    pieces: int  # at most: how many there are, only the device knows
    piece: int  # nodes of a piece
    small: int  # nodes from which a graph is cut into pieces
    states: Pass  # over pieces, one program for each tile of features
    passes: list[Pass]  # over pieces, and over small graphs, as far as there may be any

    @property
    def counts(self) -> tuple[int, int, int]:
        return self.graphs, self.piece, self.small


def linear_plan(inputs: Inputs, features: Features, ragged: Ragged) -> Plan:
    q, _, v = inputs
    projection, (offsets, mask) = features.projection, ragged
    n, heads, d = q.shape
    m, dv = d if projection is None else projection.shape[0], v.shape[2]
    if offsets is None:
        offsets = torch.arange(2, device=q.device) * n
    if projection is not None:
        projection = projection.to(accumulator(q)).contiguous()
        if features.feature_map == "softmax":
            projection = projection * d**-0.25
    precision, align = linear_precision(q), alignment(inputs)
    width = 1 if projection is None else d
    passes = []
    for whole in (False, True):
        tile = linear_tile(m, width, dv, q.element_size(), whole)
        sizes = Sizes(
            H=heads,
            D=d,
            DV=dv,
            M=m,
            MAP=features.feature_map,
            RANDOM=projection is not None,
            SMALL=whole,
            WIDE=q.dtype == torch.float64,
            PRECISION=precision,
            ALIGN=align,
            BLOCK_N=tile.block_n,
            BLOCK_D=max(16, power_of_2(d)),
            BLOCK_DV=max(16, power_of_2(dv)),
            BLOCK_M=tile.block_m,
            SLICE=tile.channels,
        )
        passes.append(Pass(0, -(-m // tile.block_m), sizes, tile.num_warps))
    cut, whole = passes
    graphs, small = offsets.shape[0] - 1, max(1, 2 * m * dv // (m + dv))
    piece = max(power_of_2(small), power_of_2(n * heads // _PROGRAMS), cut.sizes.BLOCK_N)
    pieces = n // piece + min(graphs, n // small)
    lengths = offsets.diff()
    counts = (lengths + (piece - 1)).div_(piece, rounding_mode="floor")
    piece_ptr = offsets.new_zeros(graphs + 1)
    torch.cumsum(counts.masked_fill_(lengths < small, 0), 0, out=piece_ptr[1:])
    stride = 0 if mask is None or len(mask) == 1 else heads
    batch = Batch(offsets.contiguous(), piece_ptr, mask, stride)
    states = cut._replace(programs=_programs(pieces, heads * cut.tiles))
    passes = [cut._replace(programs=_programs(pieces, heads)), whole._replace(programs=graphs)]
    some = [each for each in passes if each.programs]
    return Plan(batch, projection, graphs, pieces, piece, small, states, some)


# of a pass over one graph: enough to fill a device of some 150 processors a few times
_PROGRAMS = 2048


def _programs(pieces, others):
    """As many as fill a device, of which each takes some pieces in turns: most of those that there
    may be are not there, where graphs are small."""
    return min(pieces, max(1, 2 * _PROGRAMS // others))


def linear_states(x, y, plan, tops, stat) -> State:
    """The states of keys and values, or with ``stat`` the gradients of queries and upstream
    gradients."""
    heads, (programs, tiles, sizes, num_warps) = x.shape[1], plan.states
    s = x.new_empty(plan.pieces, heads, sizes.M, sizes.DV, dtype=accumulator(x))
    state = State(s, s.new_empty(plan.pieces, heads, sizes.M))
    if plan.pieces:
        grid = programs, heads, tiles
        _linear_state_kernel[grid](
            Rows(x, x.stride()),
            Rows(y, y.stride()),
            plan.projection,
            tops,
            stat,
            state,
            plan.batch,
            plan.graphs,
            plan.piece,
            S=sizes._replace(ALIGN=alignment((x, y))),
            num_warps=num_warps,
            num_stages=1,
        )
        shape = StateSizes(heads, sizes.M, sizes.DV, sizes.BLOCK_M, sizes.BLOCK_DV)
        _linear_combine_kernel[grid](state, plan.batch.piece_ptr, plan.graphs, S=shape)
    return state
