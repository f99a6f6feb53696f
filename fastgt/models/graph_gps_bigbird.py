"""BigBird for a GraphGPS model: attention along a pattern of blocks, in linear memory.

The nodes of a graph, in their order, are cut into blocks of 3; the last one may be shorter. Every
node of the first and the last block attends to all nodes of its graph, and all nodes attend to
those two blocks. A node of another block attends to its own block, to the one before and the one
after, and to 3 more that are drawn from the rest. The layer of the authors around it has norms and
a feed-forward of its own::

    h_i = norm(x_i + dropout(W_o concat_h attention(W_q x, W_k x, W_v x)_i))
    y_i = norm(h_i + dropout(W_2 relu(W_1 h_i)))

What differs from the authors' code, on purpose:

- There, the last block is that of the longest graph in the batch, and the blocks drawn depend on
  its length too: a shorter graph has padding for its second global block. Here a graph is the same
  in every batch.
- There, a block may be drawn that a node attends to already, and then counts twice; in graphs of
  more than 11 blocks only the first 11 are drawn from. Here blocks are drawn from all that are
  left, and no pair of nodes counts twice. Where 3 or fewer are left, all are taken.
- There, each head draws its own blocks. Here all heads share them, as in the paper's equation,
  which has one graph.
- There, batches whose longest graph has 9 nodes or fewer fail. Here a graph of 9 nodes or fewer
  attends to all of itself.

All layers share one pattern, as there.
"""

from __future__ import annotations

from torch import Tensor, nn

from fastgt.graph import Graph
from fastgt.nn import NeighborhoodAttention
from fastgt.nn.sublayers import reset_sublayers
from fastgt.ops.checks import check_square, integer
from fastgt.patterns.big_bird import blocks_pattern


def bigbird_pattern(graph: Graph, *, block: int = 3, random: int = 3, seed: int = 0) -> Graph:
    """Who attends to whom in BigBird, for every graph of a batch.

    Blocks are drawn anew for every place of a block and every number of blocks, by ``seed``: a
    graph's pattern is the same in every batch, and in every call. It does not depend on edges, but
    on the order of the nodes.

    Args:
        graph: Square; only its boundaries are used.
        block: Nodes of a block.
        random: Blocks that are drawn for a block.
        seed: From 0.

    Returns:
        A Graph of the same boundaries, on the graph's device, without duplicate edges. It has no
        more than ``N block (random + 7)`` edges.

    Raises:
        TypeError, ValueError: An argument does not fit; it is named.

    Source:
        Zaheer et al., Big Bird: Transformers for Longer Sequences, arXiv 2007.14062, section 2.

    Example:
        >>> import torch
        >>> from fastgt import Graph
        >>> from fastgt.models.graph_gps_bigbird import bigbird_pattern
        >>> pattern = bigbird_pattern(Graph.complete(torch.tensor([0, 60])))
        >>> pattern.row_degree[::15].tolist()
        [60, 24, 24, 24]
    """
    check_square(graph)
    block, random = integer("block", block, 1), integer("random", random, 0)
    seed = integer("seed", seed, 0)
    return blocks_pattern(graph.graph_ptr.long(), block, 1, 1, random, seed)


class BigBirdAttention(nn.Module):
    """BigBird's layer: attention along a pattern, a feed-forward, residuals, norms of channels.

    Args:
        dim: Width of the input and the output.
        heads: Divides ``dim``.
        dropout: Behind the attention and behind the feed-forward, in training. Weights of the
            attention are not dropped.
        head_gate: As for :class:`fastgt.nn.NeighborhoodAttention`.

    Source:
        Zaheer et al., arXiv 2007.14062, in the form of GraphGPS's code, with differences
        (:mod:`fastgt.models.graph_gps_bigbird`).

    Example:
        >>> import torch
        >>> from fastgt import Graph
        >>> from fastgt.models.graph_gps_bigbird import BigBirdAttention, bigbird_pattern
        >>> pattern = bigbird_pattern(Graph.complete(torch.tensor([0, 60, 70])))
        >>> BigBirdAttention(64, heads=4)(torch.randn(70, 64), pattern).shape
        torch.Size([70, 64])
    """

    def __init__(
        self, dim: int, heads: int, *, dropout: float = 0.0, head_gate: nn.Module | None = None
    ):
        super().__init__()
        self.attention = NeighborhoodAttention(
            dim, heads, bias=False, head_gate=head_gate, dense_gate_grad=True
        )
        self.dropout = nn.Dropout(dropout)
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.ffn = nn.Sequential(
            nn.Linear(dim, dim), nn.ReLU(), nn.Linear(dim, dim), nn.Dropout(dropout)
        )
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)

    def reset_parameters(self) -> None:
        """Draw every parameter anew."""
        reset_sublayers(self)

    def forward(self, x: Tensor, pattern: Graph) -> Tensor:
        """x ``[N, dim]``, pattern of :func:`bigbird_pattern` -> ``[N, dim]``."""
        h = self.norm1(x + self.dropout(self.attention(x, pattern)))
        return self.norm2(h + self.ffn(h))


def check_pattern(pattern: object, graph: Graph) -> Graph:
    """The pattern, if it is one of that many nodes."""
    if not isinstance(pattern, Graph):
        raise TypeError(
            f"pattern must be a fastgt.Graph, as bigbird_pattern(graph) makes it, got "
            f"{type(pattern).__name__}"
        )
    found, n = (pattern.num_rows, pattern.num_cols), graph.num_rows
    if found != (n, n):
        raise ValueError(
            f"pattern must have {n} rows and {n} columns, got {found[0]} and {found[1]}"
        )
    return pattern
