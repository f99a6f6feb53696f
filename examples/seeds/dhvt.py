"""DHVT (Lu et al., arXiv 2210.05958): every head sends a token of its own into the attention.

With x_h the channels of head h, averaged over the tokens, and p_h a learned position::

    t_h     = GELU(LN(W x_h)) + p_h        LN over the channels of each head
    [y, u]  = attention([x, t_1 ... t_H])  over all tokens of the image
    out_cls = y_cls + mean_h u_h,   out_i = y_i for patches

No head is masked and no pair is left out. The images of a batch have one size, so this is plain
dense attention over H tokens more: take scaled_dot_product_attention, as here.

Kept: W gives dim channels for each head, which LN norms in H groups, as the released code does.
"""

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, scaled_dot_product_attention

from fastgt import Graph

PATTERN = "every token to all tokens of its image, and to one token a head"
OPERATOR = "scaled_dot_product_attention"


class DHVTAttention(nn.Module):
    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.heads = heads
        self.token, self.norm = nn.Linear(dim // heads, dim), nn.LayerNorm(dim // heads)
        self.position = nn.Parameter(torch.randn(heads, dim) * 0.02)
        self.qkv, self.out = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """x ``[G, n, dim]``, the class first -> the same."""
        heads, n = self.heads, x.shape[1]
        mean = x.unflatten(2, (heads, -1)).mean(1)  # [G, H, D]
        token = gelu(self.norm(self.token(mean).unflatten(2, (heads, -1)))).flatten(2)
        x = torch.cat([x, token + self.position], 1)
        q, k, v = self.qkv(x).unflatten(2, (3, heads, -1)).permute(2, 0, 3, 1, 4)  # [G, H, n, D]
        x = self.out(scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        first = x[:, :1] + x[:, n:].mean(1, keepdim=True)
        return torch.cat([first, x[:, 1:n]], 1)


def paper_size() -> tuple[Graph, int, int]:
    """DHVT-S on ImageNet: 196 patches, the class and 6 head tokens, 6 heads of 64."""
    return Graph.complete(torch.tensor([0, 203])), 6, 64


if __name__ == "__main__":
    print("DHVT:", tuple(DHVTAttention(48, heads=4)(torch.randn(2, 17, 48)).shape))
