"""A pattern for each head: heads are folded into nodes, and attention has one head."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from fastgt.graph import Graph
from fastgt.ops.checks import check_float, integer


def fold_heads(graphs: Sequence[Graph]) -> Graph:
    """Patterns of P groups of heads as one graph, whose nodes are those of each pattern in turn.

    With edges ``E_p`` of pattern p the edges are ``{(p N + i, p N + j): (i, j) in E_p}``. These are
    ``sum_p |E_p|``. Edges are numbered pattern after pattern. The graph is symmetric where all
    patterns are. Attention on :func:`fold` of q, k and v is that of each group of heads on its own
    pattern, and :func:`unfold` brings it back::

        out = unfold(neighborhood_attention(fold(q, P), fold(k, P), fold(v, P), graph), P)

    Edge tensors are those of the patterns one after another, each with the heads of its group.

    Args:
        graphs: One for each head, or for each group of consecutive heads; all have N nodes.

    Raises:
        TypeError, ValueError: An argument does not fit; it is named, with both numbers.

    Source:
        Dong et al., CSWin Transformer, arXiv 2107.00652, section 3.2, where half of the heads have
        horizontal stripes and the others vertical ones.

    Example:
        >>> import torch
        >>> from fastgt import neighborhood_attention
        >>> from fastgt.patterns import fold, fold_heads, stripes, unfold
        >>> graph = fold_heads([stripes((4, 4), 2, 0), stripes((4, 4), 2, 1)])
        >>> x = fold(torch.randn(16, 6, 8), 2)
        >>> x.shape, unfold(neighborhood_attention(x, x, x, graph), 2).shape
        (torch.Size([32, 3, 8]), torch.Size([16, 6, 8]))
    """
    graphs = list(graphs)
    if not graphs:
        raise ValueError("graphs must be one at least, got none")
    joined = Graph.batch(graphs)
    first = graphs[0].num_rows, graphs[0].num_cols
    for p, graph in enumerate(graphs):
        if (graph.num_rows, graph.num_cols) != first:
            raise ValueError(
                f"graphs[0] has {first[0]} rows and {first[1]} columns, graphs[{p}] has "
                f"{graph.num_rows} and {graph.num_cols}"
            )
    return joined


def fold(x: Tensor, patterns: int | None = None) -> Tensor:
    """Heads into nodes, ``[N, H, D] -> [P N, H / P, D]``, as :func:`fold_heads` numbers nodes.

    Row ``p N + i`` has heads ``p H / P`` to ``(p + 1) H / P - 1`` of node i.

    Args:
        x: ``[N, H, D]``.
        patterns: P, which divides H; None for a pattern of each head.

    Raises:
        TypeError, ValueError: An argument does not fit; it is named, with both numbers.
    """
    check_float("x", x)
    if x.ndim != 3:
        raise ValueError(f"x must be [N, H, D], got {list(x.shape)}")
    n, heads, width = x.shape
    patterns = heads if patterns is None else integer("patterns", patterns, 1)
    if patterns == 0 or heads % patterns:
        raise ValueError(f"patterns={patterns} must divide the {heads} heads of x")
    each = heads // patterns
    return x.view(n, patterns, each, width).transpose(0, 1).reshape(patterns * n, each, width)


def unfold(x: Tensor, patterns: int) -> Tensor:
    """Heads back out of nodes, ``[P N, H / P, D] -> [N, H, D]``: the inverse of :func:`fold`.

    Args:
        x: ``[P N, H / P, D]``.
        patterns: P; the number of heads where each head has a pattern of its own.

    Raises:
        TypeError, ValueError: An argument does not fit; it is named, with both numbers.
    """
    check_float("x", x)
    if x.ndim != 3:
        raise ValueError(f"x must be [P N, H / P, D], got {list(x.shape)}")
    patterns = integer("patterns", patterns, 1)
    rows, each, width = x.shape
    if rows % patterns:
        raise ValueError(f"patterns={patterns} must divide the {rows} rows of x")
    n = rows // patterns
    return x.reshape(patterns, n, each, width).transpose(0, 1).reshape(n, patterns * each, width)
