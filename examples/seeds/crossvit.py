"""CrossViT (Chen et al., arXiv 2103.14899): the class token of one branch asks the other branch.

Two branches see an image in patches of two sizes, with two widths. With c the class of this branch,
p the patches of the other, f and g from one width to the other::

    z   = LN([f(c), p])
    c'  = f(c) + W softmax_j(q(z_0) . k(z_j) / sqrt(D)) v(z_j)
    out = g(c'),   f and g are LN, GELU and a linear layer

One query reads n + 1 keys, so time is linear in the tokens. All images of a batch have one size:
scaled_dot_product_attention does it, as here.

Kept: the class is a key of itself, and is normed together with the patches. The paper has f and g
as projections; LN and GELU in them are those of the released code.
"""

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from fastgt import Graph

PATTERN = "one token of one branch to itself and to all patches of the other"
OPERATOR = "scaled_dot_product_attention"


class CrossViTFusion(nn.Module):
    def __init__(self, dim: int, other_dim: int, heads: int):
        super().__init__()
        self.heads = heads
        self.there = nn.Sequential(nn.LayerNorm(dim), nn.GELU(), nn.Linear(dim, other_dim))
        self.back = nn.Sequential(nn.LayerNorm(other_dim), nn.GELU(), nn.Linear(other_dim, dim))
        self.norm = nn.LayerNorm(other_dim)
        self.q, self.kv = nn.Linear(other_dim, other_dim), nn.Linear(other_dim, 2 * other_dim)
        self.out = nn.Linear(other_dim, other_dim)

    def forward(self, x: Tensor, other: Tensor) -> Tensor:
        """x ``[G, n, dim]``, other ``[G, m, other_dim]``, classes first -> ``[G, n, dim]``."""
        token = self.there(x[:, :1])
        z = self.norm(torch.cat([token, other[:, 1:]], 1))
        q = self.q(z[:, :1]).unflatten(2, (self.heads, -1)).transpose(1, 2)  # [G, H, 1, D]
        k, v = self.kv(z).unflatten(2, (2, self.heads, -1)).permute(2, 0, 3, 1, 4)
        attended = scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return torch.cat([self.back(token + self.out(attended)), x[:, 1:]], 1)


def paper_size() -> tuple[Graph, int, int]:
    """CrossViT-S: the class of patches of 16 among 20 x 20 patches of 12; 6 heads of 32."""
    return Graph.complete(torch.tensor([0, 1]), torch.tensor([0, 401])), 6, 32


if __name__ == "__main__":
    x, other = torch.randn(2, 10, 48), torch.randn(2, 17, 24)
    print("CrossViT:", tuple(CrossViTFusion(48, 24, heads=4)(x, other).shape))
