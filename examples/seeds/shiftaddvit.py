"""ShiftAddViT (You et al., arXiv 2306.06446): linear attention of 0s and 1s, by additions alone.

With queries and keys divided by their norms, and 1[z] a 0 or a 1::

    b_i   = 1[q_i > mean q],  c_j = 1[k_j > mean k],   gradients those of clamp(., 0, 1)
    y_i   = v_i / 2 + b_i . (sum_j c_j v_j^T) / pi
    out_i = y_i / |y_i| + (a convolution of v along the tokens, 9 wide, one a head)

There is no denominator: the row is divided by its norm instead. So ``normalize=False``.

Mended: the released code takes the mean over the whole batch, so that an image depends on those
beside it. Here each image has its own mean. Shifts and experts around attention are left out.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from fastgt import Graph, linear_attention

PATTERN = "every token to all tokens of its image, through binary features"
OPERATOR = "linear_attention"


class ShiftAddViTAttention(nn.Module):
    def __init__(self, dim: int, heads: int, *, kernel: int = 9):
        super().__init__()
        self.heads = heads
        self.qkv, self.out = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        padding = (kernel // 2, 0)
        self.conv = nn.Conv2d(heads, heads, (kernel, 1), padding=padding, groups=heads, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """x ``[G, n, dim]`` -> the same."""
        graphs, n = x.shape[:2]
        q, k, v = self.qkv(x).unflatten(2, (3, self.heads, -1)).unbind(2)  # [G, n, H, D]
        rows = [y.flatten(0, 1) for y in (binary(q), binary(k), v)]
        offsets = torch.arange(graphs + 1, device=x.device) * n
        out = linear_attention(*rows, offsets, feature_map="identity", normalize=False)
        out = normalize(v / 2 + out.view_as(v) / math.pi, dim=3)
        out = out + self.conv(v.transpose(1, 2)).transpose(1, 2)
        return self.out(out.flatten(2))


def binary(x: Tensor) -> Tensor:
    x = normalize(x, dim=3)
    hard = (x > x.mean((1, 2, 3), keepdim=True)).to(x.dtype)
    soft = x.clamp(0, 1)
    return soft + (hard - soft).detach()


def paper_size() -> tuple[Graph, int, int]:
    """Stage 1 of PVTv2-B0: 56 x 56 tokens, one head of 32."""
    return Graph.complete(torch.tensor([0, 56 * 56])), 1, 32


if __name__ == "__main__":
    print("ShiftAddViT:", tuple(ShiftAddViTAttention(32, heads=2)(torch.randn(2, 49, 32)).shape))
