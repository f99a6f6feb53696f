"""FaceXFormer (Narayan et al., arXiv 2403.12960): task tokens and a face attend to each other.

A layer of the decoder. t are 18 task tokens with positions e, x the pixels with positions p, and
att(q, k, v) multi-head attention with projections to half the width (the first: to all of it)::

    t = LN(t + att(t + e, t + e, t))           tokens to tokens
    t = LN(t + att(t + e, x + p, x))           tokens to the face
    t = LN(t + MLP(t))
    x = LN(x + att(x + p, t + e, t))           the face to tokens

Between 18 tokens and N pixels no pair is left out, and faces have one size: take
scaled_dot_product_attention, as here.

Kept: tokens' positions are what they began as. The first layer's first step has neither positions
nor a residual.
"""

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from fastgt import Graph

PATTERN = "18 task tokens to all pixels of a face, and back"
OPERATOR = "scaled_dot_product_attention"


class Attention(nn.Module):
    def __init__(self, dim: int, heads: int, inner: int):
        super().__init__()
        self.heads = heads
        self.q, self.k, self.v = (nn.Linear(dim, inner) for _ in range(3))
        self.out = nn.Linear(inner, dim)

    def forward(self, *qkv: Tensor) -> Tensor:
        layers = zip((self.q, self.k, self.v), qkv, strict=True)
        parts = (f(y).unflatten(2, (self.heads, -1)).transpose(1, 2) for f, y in layers)
        return self.out(scaled_dot_product_attention(*parts).transpose(1, 2).flatten(2))


class FaceXFormerLayer(nn.Module):
    def __init__(self, dim: int, heads: int, hidden: int, *, first: bool = False):
        super().__init__()
        self.first = first
        self.own = Attention(dim, heads, dim)
        self.ask, self.tell = (Attention(dim, heads, dim // 2) for _ in range(2))
        self.mlp = nn.Sequential(nn.Linear(dim, hidden), nn.ReLU(), nn.Linear(hidden, dim))
        self.norms = nn.ModuleList(nn.LayerNorm(dim) for _ in range(4))

    def forward(self, t: Tensor, x: Tensor, e: Tensor, p: Tensor) -> tuple[Tensor, Tensor]:
        """t and e ``[G, 18, dim]``, x and p ``[G, n, dim]`` -> t, x."""
        norms = self.norms
        t = norms[0](self.own(t, t, t) if self.first else t + self.own(t + e, t + e, t))
        t = norms[1](t + self.ask(t + e, x + p, x))
        t = norms[2](t + self.mlp(t))
        return t, norms[3](x + self.tell(x + p, t + e, t))


def paper_size() -> tuple[Graph, int, int]:
    """A face of 224 x 224: the pixels, 56 x 56, to 18 tokens; 8 heads of 16."""
    return Graph.complete(torch.tensor([0, 56 * 56]), torch.tensor([0, 18])), 8, 16


if __name__ == "__main__":
    t, x = torch.randn(2, 5, 32), torch.randn(2, 49, 32)
    t, x = FaceXFormerLayer(32, heads=4, hidden=64)(t, x, t, torch.randn(49, 32))
    print("FaceXFormer:", tuple(t.shape), tuple(x.shape))
