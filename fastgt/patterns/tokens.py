"""Further nodes of a graph that attend to all, and that all attend to."""

from __future__ import annotations

import torch

from fastgt.graph import Graph
from fastgt.graph_build import owners
from fastgt.ops.checks import check_square, integer
from fastgt.patterns.build import ranges


def global_tokens(graph: Graph, tokens: int) -> Graph:
    """The graph, and in each graph of the batch further nodes that are joined with all.

    With t the new nodes of a graph, the edges are those of the graph and
    ``{(i, j): i in t or j in t}``: ``E + sum_g (2 n_g T + T^2)``, for a new node attends to itself
    too. The pattern is symmetric where the graph is.

    The new nodes of a graph stand at its end. So node i of graph g becomes ``i + g T``, and the new
    nodes of graph g are the last T of ``graph_ptr[g]`` to ``graph_ptr[g + 1]`` in the result. Edges
    of the graph keep their numbers, 0 to E - 1. Those that come from nodes follow, node after node,
    and then those that come from new nodes.

    Args:
        graph: Square, and not :meth:`fastgt.Graph.reordered`.
        tokens: T, 0 or more.

    Raises:
        TypeError, ValueError: An argument does not fit; it is named.

    Source:
        Beltagy et al., Longformer, arXiv 2004.05150, section 3.1; Ainslie et al., ETC,
        arXiv 2004.08483, section 3.2.

    Example:
        >>> from fastgt.patterns import band, global_tokens
        >>> graph = global_tokens(band(3, 1, 1, graphs=2), 1)
        >>> graph.graph_ptr.tolist(), graph.row_degree.tolist()
        ([0, 4, 8], [3, 4, 3, 4, 3, 4, 3, 4])
    """
    check_square(graph)
    if graph.graph_ptr is not graph.col_graph_ptr:
        raise ValueError("graph must be square, got a batch of bipartite ones")
    if graph.order is not None:
        raise ValueError("graph must not be reordered: reorder the graph with the tokens")
    tokens = integer("tokens", tokens, 0)
    ptr = graph.graph_ptr.long()
    sizes, owner = ptr.diff(), owners(ptr, int(ptr[-1]))
    number = torch.arange(graph.num_graphs + 1, device=ptr.device)
    ends = ptr + number * tokens
    node = torch.arange(len(owner), device=ptr.device) + owner * tokens
    source, target = (node[x] for x in graph.edge_index)
    first = ends[1:] - tokens  # [G], the first new node of each
    new = (first[:, None] + torch.arange(tokens, device=ptr.device)).flatten()
    of_node = (first[owner][:, None] + torch.arange(tokens, device=ptr.device)).flatten()
    count = (sizes + tokens).repeat_interleave(tokens)
    from_new = ranges(ends[:-1].repeat_interleave(tokens), count)
    edge_index = torch.stack(
        [
            torch.cat([source, of_node, from_new]),
            torch.cat([target, node.repeat_interleave(tokens), new.repeat_interleave(count)]),
        ]
    )
    return Graph.from_edge_index(edge_index, graph_ptr=ends)
