"""Tokens: nodes that leave the layers that follow."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fastgt.graph import Graph
from fastgt.nn.sublayers import reset_sublayers
from fastgt.ops.checks import accumulator, check_float, check_graph, check_offsets, integer
from fastgt.ops.segment_pool import segment_max, segment_sum


class TokenPruning(nn.Module):
    """Keeps the best nodes of every graph; the others leave, with their edges.

    With the score s_i = w . x_i + b of node i, over the n nodes of its own graph::

        y_i    = softmax_i((s_i + noise_i) / tau)
        kept   : the ceil(keep n) nodes of the largest y
        gate_i = 1 + y_i - y_i        the last one without its gradient: 1, with y's gradient

    The noise is Gumbel's, -log(-log(uniform)), in training; outside there is none. Scores are in
    float32 at least. Of equal ones the first node is taken; a node whose score is not finite, for
    NaN in its features, comes last and changes no other's y. A graph with nodes keeps one at least.
    What follows runs on the smaller graph that is returned: its time falls with the nodes and edges
    that are left, and what was pruned takes no part in any softmax.

    Args:
        dim: Width of a node's features.
        keep: Share of the nodes, above 0, to 1.
        tau: Temperature, positive. It does not change which nodes are kept.

    Raises:
        TypeError, ValueError: An argument does not fit; its name and both numbers are given.

    Source:
        Liu et al., GTSP, arXiv 2312.05479, section 3 (tokens), with k from the true number of nodes
        of a graph and without pruned tokens in the softmax; Jang et al., arXiv 1611.01144, and
        Kool et al., arXiv 1903.06059, for the straight-through Gumbel top-k.

    Example:
        >>> import torch
        >>> from fastgt import Graph
        >>> from fastgt.pruning import TokenPruning
        >>> ring = torch.tensor([[0, 1, 2, 3], [1, 2, 3, 0]])
        >>> kept = TokenPruning(16, keep=0.5)(torch.randn(4, 16), Graph.from_edge_index(ring))
        >>> kept.x.shape, kept.graph.num_nodes
        (torch.Size([2, 16]), 2)
        >>> kept.spread(kept.x).shape
        torch.Size([4, 16])
    """

    def __init__(self, dim: int, keep: float = 0.5, *, tau: float = 1.0):
        super().__init__()
        dim = integer("dim", dim, 1)
        if not 0 < keep <= 1:
            raise ValueError(f"keep must be above 0, to 1, got {keep}")
        if not 0 < tau < math.inf:
            raise ValueError(f"tau must be positive and finite, got {tau}")
        self.dim, self.keep, self.tau = dim, keep, tau
        self.score = nn.Linear(dim, 1)

    def reset_parameters(self) -> None:
        """Draw every parameter anew."""
        reset_sublayers(self)

    def forward(self, x: Tensor, graph: Graph) -> KeptTokens:
        """x ``[N, dim]``, nodes of a square graph or batch -> what is kept."""
        check_graph(graph)
        check_float("x", x)
        n = graph.num_nodes
        if tuple(x.shape) != (n, self.dim):
            raise ValueError(f"x must be [N, dim] = [{n}, {self.dim}], got {list(x.shape)}")
        if x.device != graph.device:
            raise ValueError(f"x is on {x.device} but graph is on {graph.device}")
        nodes, gate, offsets = self.select(x, graph.graph_ptr)
        mask = torch.zeros(n, dtype=torch.bool, device=x.device).index_fill(0, nodes, True)
        edge_index = graph.edge_index
        source, target = (mask.index_select(0, end) for end in edge_index)
        edges = (source & target).nonzero().squeeze(1)
        number = mask.cumsum(0) - 1
        smaller = Graph.from_edge_index(
            number[edge_index.index_select(1, edges)], len(nodes), graph_ptr=offsets
        )
        return KeptTokens(x.index_select(0, nodes) * gate[:, None], smaller, nodes, edges, n)

    def select(self, x: Tensor, offsets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x ``[N, dim]``, offsets ``[G + 1]`` -> for what follows without edges, the numbers of the
        kept nodes ``[K]``, ascending, their gates ``[K]``, and their boundaries ``[G + 1]``."""
        check_float("x", x)
        n = len(x)
        if x.ndim != 2 or x.shape[1] != self.dim:
            raise ValueError(f"x must be [N, {self.dim}], got {list(x.shape)}")
        check_offsets(offsets, n, x.device)
        ptr = offsets.long()
        sizes = ptr.diff()
        owner = torch.repeat_interleave(sizes, output_size=n)  # [N], the graph of each node
        scores = self.score(x).squeeze(1)
        scores = scores.to(accumulator(scores))
        if self.training:
            # of (0, 1) without 0, where the noise would be infinite; rand gives no 1
            uniform = torch.rand_like(scores).clamp(min=torch.finfo(scores.dtype).tiny)
            scores = scores - (-uniform.log()).log()
        lowest, highest = torch.finfo(scores.dtype).min, torch.finfo(scores.dtype).max
        scores = scores.masked_fill(~scores.isfinite(), lowest)
        soft = _softmax((scores / self.tau).clamp(lowest, highest), ptr, owner)
        # in the order of the scores, graph after graph
        order = scores.detach().sort(descending=True, stable=True).indices
        order = order[owner[order].sort(stable=True).indices]
        rank = torch.arange(n, device=x.device) - ptr[owner]
        # what is a whole number but for rounding stays one
        count = (sizes.double() * (self.keep * (1 - 1e-12))).ceil().long()
        mask = torch.zeros(n, dtype=torch.bool, device=x.device)
        mask[order] = rank < count[owner]
        nodes = mask.nonzero().squeeze(1)
        gate = (1 + (soft - soft.detach())).index_select(0, nodes).to(x.dtype)
        return nodes, gate, torch.cat([ptr[:1], count.cumsum(0)])

    def extra_repr(self) -> str:
        return f"keep={self.keep}, tau={self.tau}"


@dataclass(frozen=True, eq=False)
class KeptTokens:
    """What :class:`TokenPruning` keeps.

    Attributes:
        x: ``[K, dim]``, the features of the kept nodes, times their gates.
        graph: Theirs, with the edges that join two of them. Where the pruned graph was reordered or
            planned, this one has neither: its nodes stand as they stood there, and it plans anew.
        nodes: ``[K]`` int64, ascending: which nodes these were.
        edges: int64, ascending: which edges, by the caller's number: ``edge_attr[edges]`` are their
            attributes.
        size: N.
    """

    x: Tensor  # [K, dim]
    graph: Graph
    nodes: Tensor  # [K]
    edges: Tensor  # [E of graph]
    size: int

    def spread(self, y: Tensor, others: Tensor | None = None) -> Tensor:
        """y ``[K, ...]`` in the places of the kept nodes among all ``[N, ...]``; the pruned ones
        have what they have in ``others [N, ...]``, as with a residual, or 0."""
        if y.shape[:1] != self.nodes.shape:
            raise ValueError(f"y must be [K, ...] = [{len(self.nodes)}, ...], got {list(y.shape)}")
        wanted = (self.size, *y.shape[1:])
        if others is None:
            others = y.new_zeros(wanted)
        if tuple(others.shape) != wanted:
            raise ValueError(f"others must be {list(wanted)}, got {list(others.shape)}")
        if others.dtype != y.dtype:
            raise TypeError(f"others is {others.dtype} but y is {y.dtype}")
        return others.index_copy(0, self.nodes, y)


def _softmax(x: Tensor, ptr: Tensor, owner: Tensor) -> Tensor:
    """Over the nodes of each graph."""
    top = segment_max(x.detach()[:, None], ptr)[owner].squeeze(1)
    weight = (x - top).exp()
    return weight / segment_sum(weight[:, None], ptr)[owner].squeeze(1)
