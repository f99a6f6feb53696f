"""T2T-ViT (Yuan et al., arXiv 2101.11986): the Performer that makes its tokens.

One head, with M random features of M orthogonal rows w of length sqrt(M)::

    phi(x) = exp(w x - |x|^2 / 2) / sqrt(M)
    y_i    = phi(q_i) . sum_j phi(k_j) v_j^T / (phi(q_i) . sum_j phi(k_j) + 1e-8)
    out_i  = v_i + W y_i

The first tokens are many, 56 x 56, and narrow. Softmax over all pairs would be the most expensive
layer of the model.

Kept: rows of w have length sqrt(M), where features of the softmax kernel have rows of length about
sqrt(D), and logits are not divided by sqrt(D). So y is no estimate of softmax attention, but a
kernel of its own. Nothing is subtracted in exp either. ``feature_map="softmax"`` of
``linear_attention`` does both as the Performer's authors do, and stays in range.
"""

import math

import torch
from torch import Tensor, nn

from fastgt import Graph, linear_attention
from fastgt.nn import random_features

PATTERN = "every token to all tokens of its image, through 32 random features"
OPERATOR = "linear_attention"


class T2TPerformer(nn.Module):
    def __init__(self, dim: int, width: int = 64, *, features: int = 32):
        super().__init__()
        self.norm, self.kqv = nn.LayerNorm(dim), nn.Linear(dim, 3 * width)
        self.out = nn.Linear(width, width)
        w = random_features(features, width, norms="unit") * math.sqrt(features)
        self.register_buffer("w", w)

    def forward(self, x: Tensor, offsets: Tensor) -> Tensor:
        """x ``[N, dim]``, offsets ``[G + 1]`` -> ``[N, width]``."""
        k, q, v = self.kqv(self.norm(x)).chunk(3, 1)
        rows = [y[:, None] for y in (self.features(q), self.features(k), v)]  # of one head
        y = linear_attention(*rows, offsets, feature_map="identity", eps=1e-8)
        return v + self.out(y.squeeze(1))

    def features(self, x: Tensor) -> Tensor:
        square = x.square().sum(1, keepdim=True)
        return torch.exp(x @ self.w.mT - square / 2) / math.sqrt(len(self.w))


def paper_size() -> tuple[Graph, int, int]:
    """The first tokens of an image of 224 x 224: patches of 7, every 4 pixels; one head of 64."""
    return Graph.complete(torch.tensor([0, 56 * 56])), 1, 64


if __name__ == "__main__":
    x, offsets = torch.randn(90, 147), torch.tensor([0, 40, 90])
    print("T2T-ViT:", tuple(T2TPerformer(147)(x, offsets).shape))
