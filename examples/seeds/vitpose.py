"""ViTPose's windows on large feature maps (Xu et al., arXiv 2204.12484).

A token attends to its window and to the mean of every window, so that windows hear of each other::

    out_i = W_o sum_j softmax_j(q_i . k_j / sqrt(d)) v_j,   j in the window of i, or a mean m_w
    m_w   = mean of x_j over window w

Windows may be shifted too. The released model has full attention alone; this follows the text of
the paper. A window that the border cuts has a mean of its own. One graph has both kinds of keys: N
tokens, and behind them W means.
"""

import torch
from torch import Tensor, nn

from fastgt import Graph, neighborhood_attention
from fastgt.patterns import windows

PATTERN = "windows of 16 x 12, and the mean of every window"
OPERATOR = "neighborhood_attention"


class ViTPoseAttention(nn.Module):
    """x ``[N, C]``, the tokens of one image -> ``[N, C]``."""

    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.heads = heads
        self.query, self.key_value = nn.Linear(dim, dim), nn.Linear(dim, 2 * dim)
        self.out = nn.Linear(dim, dim)

    def forward(self, x: Tensor, graph: Graph, window: Tensor) -> Tensor:
        """window ``[N]`` numbers the window of each token; both are of :func:`pattern`."""
        means = x.new_zeros(graph.num_cols - len(x), x.shape[1]).index_add(0, window, x)
        means = means / window.bincount(minlength=len(means))[:, None]
        y = torch.cat([x, means])  # [N + W, C]
        k, v = self.key_value(y).view(len(y), 2, self.heads, -1).unbind(1)
        q = self.query(x).view(len(x), self.heads, -1)
        return self.out(neighborhood_attention(q, k, v, graph).flatten(1))


def pattern(
    shape: tuple[int, int], size: tuple[int, int], shift: tuple[int, int] = (0, 0)
) -> tuple[Graph, Tensor]:
    """-> edges to the own window and to all means, and the window of each token."""
    near = windows(shape, size, shift=shift)
    (j, i), n = near.edge_index, near.num_nodes
    first, window = near.col[near.row_ptr[:-1]].unique(return_inverse=True)  # token of each window
    token, mean = torch.cartesian_prod(torch.arange(n), n + torch.arange(len(first))).T
    edges = torch.stack([torch.cat([j, mean]), torch.cat([i, token])])
    return Graph.from_edge_index(edges, (n, n + len(first))), window


def paper_size() -> tuple[Graph, int, int]:
    """ViT-B on a person of 256 x 192 at an eighth of that."""
    return pattern((32, 24), (16, 12))[0], 12, 64


if __name__ == "__main__":
    graph, window = pattern((8, 6), (4, 3), shift=(2, 1))
    out = ViTPoseAttention(32, heads=4)(torch.randn(48, 32), graph, window)
    print(f"ViTPose: {graph.num_edges} edges -> {list(out.shape)}")
