"""Patterns that scores choose: the best columns of each row, or the best blocks of each block."""

from __future__ import annotations

import torch
from torch import Tensor

from fastgt.graph import Graph
from fastgt.ops.checks import check_float, integer
from fastgt.patterns.build import check_ptr, check_total, from_blocks, from_rows

Block = int | Tensor


def top_k(scores: Tensor, k: int) -> Graph:
    """Every row attends to the k columns of its highest scores.

    The edges are ``{(i, j): fewer than k columns are before j}``. A column is before j where its
    score is higher, or as high and its number lower. With M rows in each of G graphs these are
    ``G M k``. The pattern is symmetric only by chance. No gradient goes to the scores.

    Scores of H heads, ``[H, M, N]``, give what :func:`fold_heads` makes of one pattern a head.

    Args:
        scores: ``[M, N]``, or ``[G, M, N]`` for a batch of graphs of equal size.
        k: From 0 to N.

    Returns:
        A square graph if M equals N, else one of M rows and N columns; G of them as a batch. It is
        on the device of the scores.

    Raises:
        TypeError, ValueError: An argument does not fit, or a score is NaN; it is named.

    Source:
        Wei et al., Sparsifiner, arXiv 2303.13755, section 3.2.

    Example:
        >>> import torch
        >>> from fastgt.patterns import top_k
        >>> top_k(torch.tensor([[0.3, 0.9, 0.5], [0.1, 0.0, 0.0]]), 2).col.view(2, 2).tolist()
        [[1, 2], [0, 1]]
    """
    graphs, rows, cols = _sizes(scores)
    k = integer("k", k, 0)
    chosen = _best(scores, k, "columns").view(graphs, rows, k)
    number = torch.arange(graphs + 1, device=scores.device)
    col = (chosen + number[:-1, None, None] * cols).flatten()
    degree = number.new_full((graphs * rows,), k)
    return from_rows(degree, col, number * rows, None if rows == cols else number * cols)


def top_blocks(scores: Tensor, k: int, block: Block | tuple[Block, Block]) -> Graph:
    """Every row attends to all columns of the k blocks with the highest scores for its block.

    With ``r(i)`` the block of row i and ``c(j)`` that of column j, the edges are
    ``{(i, j): fewer than k blocks are before c(j) for r(i)}``, in the sense of :func:`top_k`. With
    R blocks of rows, and blocks of b rows and b' columns, these are ``G R k b b'``; in general they
    are the sum of ``b_r b'_c`` over the chosen pairs of blocks. The pattern is symmetric only by
    chance. No gradient goes to the scores.

    Args:
        scores: ``[R, C]``, for R blocks of rows and C of columns, or ``[G, R, C]`` for a batch.
        k: From 0 to C.
        block: Nodes of a block, or ``[R + 1]`` boundaries of blocks within a graph; or a pair of
            these, for rows and for columns.

    Returns:
        A Graph on the device of the scores. It is square where rows and columns have the same
        blocks.

    Raises:
        TypeError, ValueError: An argument does not fit, or a score is NaN; it is named.

    Source:
        Zhu et al., BiFormer, arXiv 2303.08810, section 3.2.

    Example:
        >>> import torch
        >>> from fastgt.patterns import top_blocks
        >>> top_blocks(torch.tensor([[0.1, 0.2], [0.9, 0.4]]), 1, 2).col.view(4, 2).tolist()
        [[2, 3], [2, 3], [0, 1], [0, 1]]
    """
    graphs, rows, cols = _sizes(scores)
    k = integer("k", k, 0)
    chosen = _best(scores, k, "blocks of columns").view(graphs, rows, k)
    both = block if isinstance(block, tuple) else (block, block)
    if len(both) != 2:
        raise ValueError(f"block must be one, or a pair (rows, columns), got {len(both)}")
    of_rows, of_cols = both
    row_ptr = _blocks(of_rows, rows, graphs, "rows", scores.device)
    col_ptr = _blocks(of_cols, cols, graphs, "columns", scores.device)
    number = torch.arange(graphs + 1, device=scores.device)
    col = (chosen + number[:-1, None, None] * cols).flatten()
    row = torch.arange(graphs * rows, device=scores.device).repeat_interleave(k)
    ends = None if torch.equal(row_ptr, col_ptr) else number * col_ptr[-1]
    ptrs = _repeated(row_ptr, graphs), _repeated(col_ptr, graphs)
    return from_blocks(row, col, *ptrs, number * row_ptr[-1], ends)


def _sizes(scores: Tensor) -> tuple[int, int, int]:
    """G, rows and columns."""
    check_float("scores", scores)
    if scores.ndim not in (2, 3):
        raise ValueError(f"scores must be [M, N] or [G, M, N], got {list(scores.shape)}")
    graphs = scores.shape[0] if scores.ndim == 3 else 1
    return graphs, scores.shape[-2], scores.shape[-1]


def _best(scores: Tensor, k: int, of: str) -> Tensor:
    """``[..., M, k]`` int64, the columns of the highest scores, in order of their numbers."""
    if k > scores.shape[-1]:
        raise ValueError(f"k={k} is larger than the {scores.shape[-1]} {of} of scores")
    scores = scores.detach()
    if bool(scores.isnan().any()):
        at = scores.isnan().nonzero()[0].tolist()
        raise ValueError(f"scores must not be NaN, got one at {at}")
    if k == 0:
        return torch.empty(*scores.shape[:-1], 0, dtype=torch.int64, device=scores.device)
    values, best = scores.topk(k, dim=-1)
    best = best.sort(-1).values
    # where more columns are as high as the last, topk does not say which of them it gives
    tied = (scores >= values[..., -1:]).sum(-1) > k
    order = scores[tied].argsort(dim=-1, descending=True, stable=True)
    best[tied] = order[:, :k].sort(-1).values
    return best


def _blocks(block: Block, count: int, graphs: int, of: str, device: torch.device) -> Tensor:
    """``[count + 1]`` int64 boundaries."""
    if not isinstance(block, Tensor):
        block = integer("block", block, 1)
        check_total("block", block * count, graphs)
        return torch.arange(count + 1, device=device) * block
    ptr = check_ptr("block", block)
    if len(ptr) != count + 1:
        raise ValueError(
            f"block has boundaries of {len(ptr) - 1} blocks but scores has {count} of {of}"
        )
    if ptr.device != device:
        raise ValueError(f"block is on {ptr.device} but scores is on {device}")
    check_total("block", int(ptr[-1]), graphs)
    return ptr


def _repeated(ptr: Tensor, graphs: int) -> Tensor:
    """The boundaries of the blocks of all graphs, one graph after another."""
    number = torch.arange(graphs, device=ptr.device)
    first = (number[:, None] * ptr[-1] + ptr[:-1]).flatten()
    return torch.cat([first, (graphs * ptr[-1])[None]])
