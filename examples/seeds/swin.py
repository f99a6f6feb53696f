"""Swin Transformer's attention in shifted windows (Liu et al., arXiv 2103.14030, equation 4).

With p_i the place of token i on the grid, head by head, over the tokens j of i's window::

    out_i = W_o sum_j softmax_j(q_i . k_j / sqrt(d) + B[p_i - p_j]) v_j

B is a table of (2M - 1)^2 numbers for windows of M x M: its gradient comes through ``edge_bias``.
Every second block moves the windows by M / 2. The released code then rolls the grid and adds -100
to logits across its seam, which leaves weights of e^-100. Here such pairs have no edge.

Tokens sorted by window are a batch of small dense problems. ``global_attention`` by boundaries, or
PyTorch's attention where no window is cut, is the faster way through these on a CPU.
"""

import torch
from torch import Tensor, nn

from fastgt import Graph, neighborhood_attention
from fastgt.patterns import windows

PATTERN = "windows of 7 x 7, shifted by 3"
OPERATOR = "neighborhood_attention"


class SwinAttention(nn.Module):
    """x ``[N, C]``, the tokens of images of ``width`` columns, row by row -> ``[N, C]``."""

    def __init__(self, dim: int, heads: int, window: int, width: int):
        super().__init__()
        self.heads, self.window, self.width = heads, window, width
        self.qkv, self.out = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.table = nn.Parameter(torch.empty((2 * window - 1) ** 2, heads))
        nn.init.trunc_normal_(self.table, std=0.02)

    def forward(self, x: Tensor, graph: Graph) -> Tensor:
        q, k, v = self.qkv(x).view(len(x), 3, self.heads, -1).unbind(1)  # [N, H, D]
        j, i = graph.edge_index
        down = i // self.width - j // self.width + self.window - 1
        right = i % self.width - j % self.width + self.window - 1
        bias = self.table[down * (2 * self.window - 1) + right]  # [E, H]
        return self.out(neighborhood_attention(q, k, v, graph, edge_bias=bias).flatten(1))


def paper_size() -> tuple[Graph, int, int]:
    """The first stage of Swin-T on an image of 224 x 224."""
    return windows((56, 56), 7, shift=3), 3, 32


if __name__ == "__main__":
    graph = windows((14, 14), 7, shift=3)
    block = SwinAttention(32, heads=4, window=7, width=14)
    print(f"Swin: {graph.num_edges} edges -> {list(block(torch.randn(196, 32), graph).shape)}")
