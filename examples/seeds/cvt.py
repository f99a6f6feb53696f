"""CvT (Wu et al., arXiv 2103.15808): projections that are convolutions, with fewer keys.

A depthwise convolution of 3 x 3 and a batch norm stand before each projection. Those of keys and
values have stride 2, so that there is one key for 2 x 2 tokens. The class token passes them by::

    q = W_q [c, BN(conv_1(x))],  k = W_k [c, BN(conv_2(x))],  v = W_v [c, BN(conv_2'(x))]
    out_i = W softmax_j(q_i . k_j / sqrt(dim)) v_j

Every token attends to all keys. That is a rectangle without holes, and images of a batch have one
size: take scaled_dot_product_attention, as here.

Kept: logits are divided by the root of the whole width and not of a head's, as in the released
code: with 6 heads they are sqrt(6) times smaller than the paper's equation has them.
"""

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from fastgt import Graph

PATTERN = "every token to one key for each 2 x 2 tokens of its image, and to the class"
OPERATOR = "scaled_dot_product_attention"


class CvTAttention(nn.Module):
    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.heads, self.scale = heads, dim**-0.5
        self.convs = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(dim, dim, 3, stride=stride, padding=1, groups=dim, bias=False),
                nn.BatchNorm2d(dim),
            )
            for stride in (1, 2, 2)
        )
        self.projections = nn.ModuleList(nn.Linear(dim, dim) for _ in range(3))
        self.out = nn.Linear(dim, dim)

    def forward(self, token: Tensor, x: Tensor) -> Tensor:
        """token ``[G, 1, dim]``, x ``[G, h, w, dim]`` -> ``[G, 1 + h w, dim]``."""
        image, parts = x.permute(0, 3, 1, 2), []
        for conv, projection in zip(self.convs, self.projections, strict=True):
            y = torch.cat([token, conv(image).flatten(2).mT], 1)
            parts.append(projection(y).unflatten(2, (self.heads, -1)).transpose(1, 2))
        out = scaled_dot_product_attention(*parts, scale=self.scale)
        return self.out(out.transpose(1, 2).flatten(2))


def paper_size() -> tuple[Graph, int, int]:
    """Stage 3 of CvT-13: 14 x 14 tokens, 7 x 7 keys and the class; 6 heads of 64."""
    return Graph.complete(torch.tensor([0, 197]), torch.tensor([0, 50])), 6, 64


if __name__ == "__main__":
    out = CvTAttention(48, heads=4)(torch.randn(2, 1, 48), torch.randn(2, 6, 8, 48))
    print("CvT:", tuple(out.shape))
