"""PVT (Wang et al., arXiv 2102.12122): keys and values of a smaller image.

Spatial-reduction attention: a convolution of kernel and stride R makes one key of R x R tokens::

    y   = LN(conv_R(x)),                 [h / R, w / R] tokens
    out = W softmax_j(W_q x_i . W_k y_j / sqrt(D)) W_v y_j

Every token attends to all N / R^2 keys. That is a rectangle without holes, and images of a batch
have one size: take scaled_dot_product_attention, as here.

Kept: at a stage with R = 1 there is neither the convolution nor the norm.
"""

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from fastgt import Graph

PATTERN = "every token to one key for each R x R tokens of its image"
OPERATOR = "scaled_dot_product_attention"


class PVTAttention(nn.Module):
    def __init__(self, dim: int, heads: int, *, reduction: int):
        super().__init__()
        self.heads = heads
        self.q, self.kv, self.out = (nn.Linear(dim, width) for width in (dim, 2 * dim, dim))
        self.reduce = None
        if reduction > 1:
            self.reduce = nn.Conv2d(dim, dim, reduction, stride=reduction)
            self.norm = nn.LayerNorm(dim)

    def forward(self, x: Tensor) -> Tensor:
        """x ``[G, h, w, dim]`` -> the same."""
        y = x
        if self.reduce is not None:
            y = self.norm(self.reduce(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))
        q = self.q(x).flatten(1, 2).unflatten(2, (self.heads, -1)).transpose(1, 2)  # [G, H, n, D]
        k, v = self.kv(y).flatten(1, 2).unflatten(2, (2, self.heads, -1)).permute(2, 0, 3, 1, 4)
        out = scaled_dot_product_attention(q, k, v)
        return self.out(out.transpose(1, 2).flatten(2)).view_as(x)


def paper_size() -> tuple[Graph, int, int]:
    """Stage 1: 56 x 56 tokens and R = 8, so 7 x 7 keys; one head of 64."""
    return Graph.complete(torch.tensor([0, 56 * 56]), torch.tensor([0, 49])), 1, 64


if __name__ == "__main__":
    x = torch.randn(2, 8, 12, 32)
    print("PVT:", tuple(PVTAttention(32, heads=2, reduction=4)(x).shape))
