"""CSWin Transformer's cross-shaped windows (Dong et al., arXiv 2107.00652, section 3).

Half of the heads attend in vertical stripes of the grid, half in horizontal ones::

    out_i = W_o concat_h (sum_j softmax_j(q_i . k_j / sqrt(d)) v_j + (conv_h v)_i)

j is in the stripe of i that belongs to head h, and conv_h is a depthwise 3 x 3 convolution (LePE).
``fold`` makes two graphs of the halves: all tokens twice, with half of the heads each. As in the
released code the first half has vertical stripes, where the paper names horizontal ones first, and
the convolution pads every stripe with zeros: it does not reach into the next one.

Tokens sorted by stripe are a batch of small dense problems: ``global_attention`` or PyTorch's
attention is the faster way through these on a CPU.
"""

import torch
from torch import Tensor, nn

from fastgt import Graph, neighborhood_attention
from fastgt.patterns import fold, fold_heads, stripes, unfold

PATTERN = "stripes of width 1, down for half of the heads and across for the other half"
OPERATOR = "neighborhood_attention"


class CSWinAttention(nn.Module):
    """x ``[N, C]``, the tokens of one image of ``shape``, row by row -> ``[N, C]``."""

    def __init__(self, dim: int, heads: int, shape: tuple[int, int], stripe: int):
        super().__init__()
        self.heads, self.shape = heads, shape
        self.stripes = (shape[0], stripe), (stripe, shape[1])
        self.qkv, self.out = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        half = dim // 2
        self.conv = nn.ModuleList(nn.Conv2d(half, half, 3, padding=1, groups=half) for _ in "12")

    def forward(self, x: Tensor, graph: Graph) -> Tensor:
        q, k, v = self.qkv(x).view(len(x), 3, self.heads, -1).unbind(1)  # [N, H, D]
        folded = neighborhood_attention(*(fold(y, 2) for y in (q, k, v)), graph)  # [2 N, H / 2, D]
        near = [self.near(i, half) for i, half in enumerate(v.flatten(1).chunk(2, 1))]
        return self.out(unfold(folded, 2).flatten(1) + torch.cat(near, 1))

    def near(self, half: int, v: Tensor) -> Tensor:
        """The convolution, of every stripe alone: ``[N, C / 2]`` -> the same."""
        (height, width), (down, across) = self.shape, self.stripes[half]
        v = v.view(height // down, down, width // across, across, -1)
        y = self.conv[half](v.permute(0, 2, 4, 1, 3).flatten(0, 1))  # [stripes, C / 2, ...]
        y = y.unflatten(0, (height // down, width // across))
        return y.permute(0, 3, 1, 4, 2).flatten(0, 3)


def pattern(shape: tuple[int, int], stripe: int) -> Graph:
    """Two graphs of all tokens: in vertical stripes, and in horizontal ones."""
    return fold_heads([stripes(shape, stripe, axis=1), stripes(shape, stripe, axis=0)])


def paper_size() -> tuple[Graph, int, int]:
    """The first stage of CSWin-T on an image of 224 x 224: 2 heads, one for each half."""
    return pattern((56, 56), 1), 1, 32


if __name__ == "__main__":
    graph = pattern((8, 8), 2)
    block = CSWinAttention(32, heads=4, shape=(8, 8), stripe=2)
    print(f"CSWin: {graph.num_edges} edges -> {list(block(torch.randn(64, 32), graph).shape)}")
