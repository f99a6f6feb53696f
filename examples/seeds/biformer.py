"""BiFormer's attention with routing of two levels (Zhu et al., arXiv 2303.08810, section 3).

The grid has S x S regions. Each takes the k regions whose mean key suits its mean query best, and
its tokens attend to all tokens of these::

    A     = mean_r(q) . mean_s(k)               regions r, s; the k best s of each r are kept
    out_i = W_o (sum_j softmax_j(c q_i . k_j) v_j + (conv v)_i)

j is in a region that i's region kept, conv a depthwise 5 x 5 convolution of the grid (LePE). The
routing is detached, so A gets no gradient. The scale c is 1 / sqrt(C) of all C channels, not of the
d of a head: so it is in the released code, and kept.

The graph is made anew from every input. With k = 16 of 49 regions, in the third stage, attention
takes about as long as dense attention on a CPU; with k = 1 or 4, before that, it is sparse.
"""

import torch
from torch import Tensor, nn

from fastgt import Graph, neighborhood_attention
from fastgt.patterns import top_blocks

PATTERN = "regions of 8 x 8, each to the best of 49"
OPERATOR = "neighborhood_attention"


class BiFormerAttention(nn.Module):
    """x ``[N, C]``, the tokens of one image of ``shape``, row by row -> ``[N, C]``."""

    def __init__(self, dim: int, heads: int, shape: tuple[int, int], regions: int, k: int):
        super().__init__()
        self.heads, self.shape, self.regions, self.k = heads, shape, regions, k
        self.qkv, self.out = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.conv = nn.Conv2d(dim, dim, 5, padding=2, groups=dim)

    def forward(self, x: Tensor) -> Tensor:
        (height, width), s, dim = self.shape, self.regions, x.shape[1]
        number = torch.arange(len(x), device=x.device).view(s, height // s, s, width // s)
        order = number.transpose(1, 2).reshape(s * s, -1)  # [S S, tokens of a region]
        q, k, v = self.qkv(x).chunk(3, 1)  # [N, C]
        scores = q[order].mean(1) @ k[order].mean(1).T  # [S S, S S]
        graph = top_blocks(scores, self.k, block=order.shape[1])
        by_region = (t[order.flatten()].unflatten(1, (self.heads, -1)) for t in (q, k, v))
        out = neighborhood_attention(*by_region, graph, scale=dim**-0.5).flatten(1)
        near = self.conv(v.T.reshape(1, dim, height, width)).view(dim, -1).T
        return self.out(out[order.flatten().argsort()] + near)


def paper_size() -> tuple[Graph, int, int]:
    """The first stage of BiFormer-T on an image of 224 x 224; the routing is drawn."""
    scores = torch.randn(49, 49, generator=torch.Generator().manual_seed(0))
    return top_blocks(scores, 1, block=64), 2, 32


if __name__ == "__main__":
    block = BiFormerAttention(32, heads=4, shape=(12, 12), regions=3, k=2)
    print(f"BiFormer: 144 tokens in 9 regions -> {list(block(torch.randn(144, 32)).shape)}")
