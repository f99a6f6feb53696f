"""NViST (Jang and Agapito, arXiv 2312.08568): tokens of a radiance field ask an image.

A layer of the decoder. u are learned tokens of planes and lines of the field, y features of the
image from a masked autoencoder, and c the camera, which scales and shifts the norms::

    AdaLN_c(u) = LN(u) (1 + scale(c)) + shift(c)
    u = u + attention(AdaLN_c(u), y)
    u = u + attention(AdaLN'_c(u), AdaLN'_c(u))
    u = u + MLP(AdaLN''_c(u))

Every token attends to all features and to all tokens. Nothing is left out and all images have one
size: take scaled_dot_product_attention, as here.

No code was read. That the camera enters through adaptive norms and the image through
cross-attention is the paper's; the order of the steps is assumed.
"""

import torch
from torch import Tensor, nn
from torch.nn.functional import layer_norm, scaled_dot_product_attention

from fastgt import Graph

PATTERN = "every token of the field to all features of the image, then to all tokens"
OPERATOR = "scaled_dot_product_attention"


class NViSTLayer(nn.Module):
    def __init__(self, dim: int, heads: int, camera: int):
        super().__init__()
        self.dim, self.heads, self.camera = dim, heads, nn.Linear(camera, 6 * dim)
        self.q, self.kv, self.out = (nn.Linear(dim, width) for width in (dim, 2 * dim, dim))
        self.qkv, self.out_own = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))

    def forward(self, u: Tensor, y: Tensor, c: Tensor) -> Tensor:
        """u ``[G, n, dim]``, y ``[G, m, dim]``, c ``[G, camera]`` -> ``[G, n, dim]``."""
        changes = self.camera(c)[:, None].chunk(6, 2)

        def norm(i: int) -> Tensor:
            return layer_norm(u, (self.dim,)) * (1 + changes[2 * i]) + changes[2 * i + 1]

        q = self.q(norm(0)).unflatten(2, (self.heads, -1)).transpose(1, 2)  # [G, H, n, D]
        k, v = self.kv(y).unflatten(2, (2, self.heads, -1)).permute(2, 0, 3, 1, 4)
        u = u + self.out(scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        q, k, v = self.qkv(norm(1)).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        u = u + self.out_own(scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return u + self.mlp(norm(2))


def paper_size() -> tuple[Graph, int, int]:
    """468 tokens of a field to 197 features (sizes assumed), 16 heads of 64."""
    return Graph.complete(torch.tensor([0, 468]), torch.tensor([0, 197])), 16, 64


if __name__ == "__main__":
    u, y, c = torch.randn(2, 12, 32), torch.randn(2, 17, 32), torch.randn(2, 10)
    print("NViST:", tuple(NViSTLayer(32, heads=4, camera=10)(u, y, c).shape))
