"""Global attention on ragged batches, forward: every query meets every key of its graph.

    s_ij = scale q_i . k_j + bias_ij,   o_i = sum_j exp(s_ij - lse_i) v_j

Graphs lie one after another, and nothing is gathered. A program owns BLOCK_M queries of one graph
and a head, and takes BLOCK_N keys of that graph at a time, with an online softmax. Blocks do not
cross graphs; a table says where those of each graph begin, and a program finds its graph there:

    queries  |0 0 0 0 0 0 0|1 1|2 2 2 2 2|      BLOCK_M = 4
    blocks   |   0   |  1  | 2 |   3   |4|      block_ptr = [0, 2, 3, 5]

The host knows only how many blocks there may be, N / BLOCK_M + G; the last programs find none. The
backward (``global_attention_backward.py``) has blocks of keys besides, with a table of theirs. So
each output has one writer, in a fixed order: no atomics.

Heads that are wide for their dtype are read in slices of their channels: each of several programs
makes all logits of its block, and one slice of the output.

All pairs of a tile within the graph exist, so NaN of a key reaches no row that does not attend to
it; what lies beyond the graph is not read. Pairs are numbered graph after graph and row after row:
the first of each graph stands in pair_ptr, which a bias of pairs and dropout need.
"""

from functools import cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from fastgt.contract import Inputs, PairDropout, PairTerms, RaggedPairs

from .configs import (
    accumulator,
    alignment,
    dot_dtype,
    dot_precision,
    global_tile,
    power_of_2,
)
from .edge_tile import Operands, kept_share, known_heads
from .linear_states import find_graph
from .loads import dot, load_rows, rows_of, scalar, store_rows, sum_dtype

COUNTS = ["num_graphs", "threshold"]


class Blocks(NamedTuple):
    """Where the nodes and blocks of each graph begin, [G + 1] each, and its active heads."""

    block_ptr: Any
    own_ptr: Any  # of queries, in the column pass of keys
    other_ptr: Any
    pair_ptr: Any  # None where no pair is asked for its number
    mask: Any  # [G, H], ``Rows``; None: all heads are active


class PairDrop(NamedTuple):
    """What decides which weights dropout keeps; None where absent."""

    seed: Any  # [1]; None: all are kept
    query_numbers: Any  # [N], with key_numbers [M]; None: pairs are known by their own numbers
    key_numbers: Any
    first_head: Any  # by which head 0 is known; None: 0


class Block(NamedTuple):
    """What a program owns, and the nodes of the other side that it goes through."""

    row: Any  # [M], int64
    mine: Any  # [M], which exist
    read: Any  # [M], which are read: none where the head is masked
    begin: Any  # the graph's first node of this side
    width: Any  # how many nodes of this side the graph has
    first: Any  # the graph's first node of the other side
    last: Any  # where those end; first, where there is nothing to do
    others: Any  # how many nodes of the other side the graph has
    pair: Any  # the number of the graph's first pair


class GlobalSizes(NamedTuple):
    """Sizes of global attention and of what a program holds, constants of its kernel."""

    H: int
    GROUP: int  # query heads that share a key head
    D: int
    DV: int
    PER_KEY: bool  # the bias is one of keys
    BLOCK_M: int
    BLOCK_N: int
    BLOCK_D: int
    BLOCK_DV: int
    ALIGN: int  # channels that rows of q, k, v and do start at a multiple of
    WIDE: bool  # sums are in float64
    PRODUCTS: str  # the dtype that tiles are multiplied in
    PRECISION: str


@triton.jit(do_not_specialize=COUNTS)
def _global_fwd_kernel(
    x,  # Operands
    o_ptr,  # [N, H, DV]
    lse_ptr,  # [N, H]
    blocks,
    drop,  # PairDrop
    threshold,
    scale: tl.float64,
    num_graphs,
    T: tl.constexpr,
):
    """Grid (blocks of queries x heads, slices): one program owns a block and a head."""
    ACC: tl.constexpr = sum_dtype(T.WIDE)
    head = tl.program_id(0) % T.H
    kv_head = head // T.GROUP
    channel = tl.program_id(1) * T.BLOCK_DV
    own = active_block(blocks, tl.program_id(0) // T.H, head, num_graphs, T)
    q = hold_rows(x.q, own.row, own.read, head, T.D, T.BLOCK_D, T)
    counted = own_numbers(drop.query_numbers, own)

    top = tl.full([T.BLOCK_M], float("-inf"), ACC)
    total = tl.full([T.BLOCK_M], 0.0, ACC)
    acc = tl.full([T.BLOCK_M, T.BLOCK_DV], 0.0, ACC)
    for at in range(own.first, own.last, T.BLOCK_N):
        key = at + tl.arange(0, T.BLOCK_N)
        within = key < own.last
        s, _k = row_products(q, x.q, own, head, x.k, key, within, kv_head, T.D, T.BLOCK_D, T)
        v = load_slice(x.v, key, within, kv_head, channel, T.DV, T.BLOCK_DV, T)
        number = pair_numbers(own, key, True)
        s *= scalar(scale, ACC)
        s = finish_logits(s, x.bias, number, own.read, key, within, head, T)
        new_top = tl.maximum(top, tl.max(s, 1))
        pivot = tl.where(new_top == float("-inf"), 0.0, new_top)
        decay = tl.exp(top - pivot)
        p = tl.exp(s - pivot[:, None])  # [M, N]
        total = total * decay + tl.sum(p, 1)
        if drop.seed is not None:
            number = dropped_numbers(number, counted, drop.key_numbers, key, within)
            p *= kept_share(drop.seed, threshold, number, known_heads(drop, head), ACC)
        acc = dot(p.to(v.dtype), v, acc * decay[:, None], T)
        top = new_top

    empty = total == 0.0
    o = tl.where(empty[:, None], 0.0, acc / tl.where(empty, 1.0, total)[:, None])
    store_rows(o_ptr, own.row, own.mine, head, T.H, T.DV, T.BLOCK_DV, o, channel)
    pivot = tl.where(top == float("-inf"), 0.0, top)
    lse = tl.where(empty, float("-inf"), pivot + tl.log(tl.where(empty, 1.0, total)))
    tl.store(lse_ptr + own.row * T.H + head, lse, mask=rows_where(own, channel == 0))


@triton.jit
def take_block(blocks, number, num_graphs, BLOCK_M: tl.constexpr):
    """Block ``number``, as a ``Block`` of which everything is read."""
    number = number.to(tl.int64)
    graph = find_graph(blocks.block_ptr, number, num_graphs)
    begin = tl.load(blocks.own_ptr + graph).to(tl.int64)
    end = tl.load(blocks.own_ptr + graph + 1).to(tl.int64)
    first = tl.load(blocks.other_ptr + graph).to(tl.int64)
    last = tl.load(blocks.other_ptr + graph + 1).to(tl.int64)
    start = begin + (number - tl.load(blocks.block_ptr + graph)) * BLOCK_M
    pair = begin
    if blocks.pair_ptr is not None:
        pair = tl.load(blocks.pair_ptr + graph)
    row = start + tl.arange(0, BLOCK_M)
    mine = row < end
    stop = tl.where(start < end, last, first)
    return graph, Block(row, mine, mine, begin, end - begin, first, stop, last - first, pair)


@triton.jit
def active_block(blocks, number, head, num_graphs, T: tl.constexpr):
    """Block ``number`` of queries, of which nothing is read where the head is masked."""
    graph, own = take_block(blocks, number, num_graphs, T.BLOCK_M)
    active = head_active(blocks, graph, head)
    own = own_rows(own, rows_where(own, active))
    return until(own, tl.where(active, own.last, own.first))


@triton.jit
def rows_where(own, condition):
    """The block's rows where a scalar condition holds, else none."""
    # Triton 3.9's interpreter makes integers of a block and a scalar, and takes no mask of them
    return (own.mine & condition) != 0


@triton.jit
def own_rows(own, read):
    """The block, of which these rows are read."""
    return Block(
        own.row,
        own.mine,
        read,
        own.begin,
        own.width,
        own.first,
        own.last,
        own.others,
        own.pair,
    )


@triton.jit
def until(own, last):
    """The block, with another end of the nodes that it goes through."""
    return Block(
        own.row,
        own.mine,
        own.read,
        own.begin,
        own.width,
        own.first,
        last,
        own.others,
        own.pair,
    )


@triton.jit
def head_active(blocks, graph, head):
    """Whether a graph's head is not masked."""
    active = head >= 0
    if blocks.mask is not None:
        at = blocks.mask.ptr + graph * blocks.mask.stride[0] + head * blocks.mask.stride[1]
        active = tl.load(at) != 0
    return active


@triton.jit
def load_slice(
    x, row, live, head, channel, D: tl.constexpr, BLOCK_D: tl.constexpr, T: tl.constexpr
):
    """BLOCK_D channels of ``Rows`` of one head, from ``channel`` on: [M, BLOCK_D]."""
    return load_rows(x.ptr, x.stride, row, live, head, D, BLOCK_D, T.ALIGN, channel)


@triton.jit
def hold_rows(x, row, live, head, D: tl.constexpr, BLOCK_D: tl.constexpr, T: tl.constexpr):
    """All channels, [M, D], which a program holds; None where it reads them slice by slice."""
    held = None
    if D <= BLOCK_D:
        held = load_slice(x, row, live, head, 0, D, BLOCK_D, T)
    return held


@triton.jit
def row_products(
    held,
    x,
    own,
    head,
    y,
    other,
    within,
    other_head,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    T: tl.constexpr,
):
    """-> x y^T [M, N] over all channels, of this block's rows with ``other`` ones; and the other
    ones, [N, D], where they are not read slice by slice."""
    if D <= BLOCK_D:
        theirs = load_slice(y, other, within, other_head, 0, D, BLOCK_D, T)
        s = dot(held, tl.trans(theirs), None, T)
    else:
        s = tl.full([T.BLOCK_M, T.BLOCK_N], 0.0, sum_dtype(T.WIDE))
        for channel in range(0, D, BLOCK_D):
            a = load_slice(x, own.row, own.read, head, channel, D, BLOCK_D, T)
            b = load_slice(y, other, within, other_head, channel, D, BLOCK_D, T)
            s = dot(a, tl.trans(b), s, T)
        theirs = s  # nobody asks
    return s, theirs


@triton.jit
def pair_numbers(own, other, QUERIES: tl.constexpr):
    """The numbers of the pairs of this block with ``other``, [M, N]; whether it has queries."""
    mine, theirs = (own.row - own.begin)[:, None], (other - own.first)[None, :]
    if QUERIES:
        number = own.pair + mine * own.others + theirs
    else:
        number = own.pair + theirs * own.width + mine
    return number


@triton.jit
def own_numbers(numbers, own):
    """Those of this block's nodes, [M], which a program holds; None where absent."""
    held = None
    if numbers is not None:
        held = tl.load(numbers + own.row, mask=own.mine, other=0)
    return held


@triton.jit
def dropped_numbers(number, mine, numbers, other, within):
    """By which dropout knows pairs of this block with ``other``, [M, N]: their own ``number``, or
    sums of what a program holds and of what the others have."""
    if mine is not None:
        theirs = tl.load(numbers + other, mask=within, other=0)
        number = mine[:, None] + theirs[None, :]
    return number


@triton.jit
def finish_logits(s, bias, number, mine, key, within, head, T: tl.constexpr):
    """s + bias [M, N], queries in rows; -inf beyond the graph's keys."""
    there = mine[:, None] & within[None, :]
    if bias is not None:
        at = head.to(tl.int64) * bias.stride[1]
        if T.PER_KEY:
            more = tl.load(bias.ptr + at + key * bias.stride[0], mask=within, other=0.0)
            s += more.to(s.dtype)[None, :]
        else:
            s += tl.load(bias.ptr + at + number * bias.stride[0], mask=there, other=0.0).to(s.dtype)
    return tl.where(there, s, float("-inf"))


def global_attention_fwd(
    inputs: Inputs, terms: PairTerms, graphs: RaggedPairs, dropout: PairDropout
) -> tuple[torch.Tensor, torch.Tensor]:
    """-> o [N, H, DV], lse [N, H]."""
    q, _, v = inputs
    n, heads, _ = q.shape
    o = q.new_empty(n, heads, v.shape[2])
    lse = q.new_empty(n, heads, dtype=accumulator(q))
    numbered = dropout.seed is not None or (terms.bias is not None and not terms.per_key)
    meta = global_plan("fwd", inputs, inputs, terms, numbered)
    T = meta["T"]
    blocks, count, num_graphs = block_table(inputs, graphs, T.BLOCK_M, numbered)
    if count:
        _global_fwd_kernel[count * heads, slices(T.DV, T.BLOCK_DV)](
            Operands(*map(rows_of, inputs), rows_of(terms.bias)),
            o,
            lse,
            blocks,
            *pair_drop(dropout),
            terms.scale,
            num_graphs,
            **meta,
        )
    return o, lse


def block_table(
    inputs: Inputs, graphs: RaggedPairs, block: int, numbered: bool, *, of_keys: bool = False
) -> tuple[Blocks, int, int]:
    """-> the table of blocks of queries, or of keys; how many there may be; how many graphs."""
    offsets, ends, mask = graphs
    n, m = inputs.q.shape[0], inputs.k.shape[0]
    if offsets is None:
        offsets = torch.arange(2, device=inputs.q.device) * n
    ends = offsets if ends is None else ends
    num_graphs = offsets.shape[0] - 1
    if of_keys:
        own, other, nodes = ends, offsets, m
    else:
        own, other, nodes = offsets, ends, n
    counts = (own.diff() + (block - 1)).div_(block, rounding_mode="floor")
    pair_ptr = None
    if numbered:
        pair_ptr = _sums(offsets.diff().long() * ends.diff().long())
    if mask is not None:
        mask = rows_of(mask.expand(num_graphs, -1))
    blocks = Blocks(_sums(counts), own.contiguous(), other.contiguous(), pair_ptr, mask)
    return blocks, min(nodes // block + num_graphs, nodes), num_graphs


def _sums(counts: torch.Tensor) -> torch.Tensor:
    """How much there is before each, and after the last one, int64."""
    found = counts.new_zeros(counts.shape[0] + 1, dtype=torch.int64)
    torch.cumsum(counts, 0, out=found[1:])
    return found


def pair_drop(dropout: PairDropout) -> tuple[PairDrop, int]:
    """What kernels take of it, and what 24 bits have to reach for a weight to stay."""
    numbers = (None if x is None else x.contiguous() for x in dropout[1:3])
    return PairDrop(dropout.seed, *numbers, dropout.first_head or None), round(dropout.p * 2**24)


def slices(width: int, block: int) -> int:
    return -(-width // block)


def global_plan(direction, inputs, aligned, terms, numbered):
    """-> the constants of a kernel, of the "fwd", "dq" or "dkv" pass; ``numbered``: pairs are asked
    for their numbers."""
    q, k, v = inputs
    tile = global_tile(direction, max(q.shape[2], v.shape[2]), q.element_size(), numbered)
    shape = q.shape[1], k.shape[1], q.shape[2], v.shape[2]
    kind = q.dtype, dot_dtype(q), dot_precision(q)
    sizes = _sizes(tile, shape, kind, alignment(aligned), terms.per_key)
    return {"T": sizes, "num_warps": tile.num_warps, "num_stages": tile.num_stages}


@cache
def _sizes(tile, shape, kind, align, per_key):
    heads, kv_heads, d, dv = shape
    dtype, dot_type, precision = kind
    return GlobalSizes(
        H=heads,
        GROUP=heads // kv_heads,
        D=d,
        DV=dv,
        PER_KEY=per_key,
        BLOCK_M=tile.block_m,
        BLOCK_N=tile.block_n,
        # a dot product takes at least 16 channels
        BLOCK_D=max(16, min(tile.channels, power_of_2(d))),
        BLOCK_DV=max(16, min(tile.channels, power_of_2(dv))),
        ALIGN=align,
        WIDE=dtype == torch.float64,
        PRODUCTS=dot_type,
        PRECISION=precision,
    )
