"""DVPT (He et al., arXiv 2307.09787): prompts of a frozen ViT that look at the image first.

Frozen features x pass a bottleneck, learned prompts s ask it, and what they find goes on as further
tokens of the next frozen block::

    y   = GELU(W_down x)                               [n, r], r much smaller than dim
    s'  = s + W softmax_j(W_q s . W_k y_j / sqrt(D)) W_v y_j
    out = [x, W_up s']

A few prompts read all tokens, in time linear in them. Images of a batch have one size: take
scaled_dot_product_attention, as here.

The paper's abstract has these steps, but not how prompts and frozen features are put together: here
the prompts are appended, as in visual prompt tuning.
"""

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, scaled_dot_product_attention

from fastgt import Graph

PATTERN = "a few prompts to all tokens of the image"
OPERATOR = "scaled_dot_product_attention"


class DVPTPrompts(nn.Module):
    def __init__(self, dim: int, inner: int, heads: int, prompts: int):
        super().__init__()
        self.heads, self.prompts = heads, nn.Parameter(torch.randn(prompts, inner) * 0.02)
        self.down, self.up = nn.Linear(dim, inner), nn.Linear(inner, dim)
        self.q, self.kv, self.out = (nn.Linear(inner, y) for y in (inner, 2 * inner, inner))

    def forward(self, x: Tensor) -> Tensor:
        """x ``[G, n, dim]`` -> ``[G, n + prompts, dim]``."""
        y = gelu(self.down(x))
        q = self.q(self.prompts).unflatten(1, (self.heads, -1)).transpose(0, 1)  # [H, P, D]
        k, v = self.kv(y).unflatten(2, (2, self.heads, -1)).permute(2, 0, 3, 1, 4)
        found = scaled_dot_product_attention(q.expand(len(x), -1, -1, -1), k, v)
        prompts = self.prompts + self.out(found.transpose(1, 2).flatten(2))
        return torch.cat([x, self.up(prompts)], 1)


def paper_size() -> tuple[Graph, int, int]:
    """10 prompts of 64 channels for the 197 tokens of ViT-B/16 (sizes assumed), one head."""
    return Graph.complete(torch.tensor([0, 10]), torch.tensor([0, 197])), 1, 64


if __name__ == "__main__":
    block = DVPTPrompts(48, inner=16, heads=2, prompts=3)
    print("DVPT:", tuple(block(torch.randn(2, 17, 48)).shape))
