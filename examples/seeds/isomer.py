"""Isomer (Yuan et al., arXiv 2308.06693): foreground asks foreground, background background.

Semantic gathering and scattering. A heat h in (0, 1) says which pixels x are foreground, and K
tokens sum up each side. With w_k learned maps of the pixels, for the foreground::

    f_i = h_i x_i,   t_k = sum_i (w_k . f_i) f_i             over all pixels of the image
    out_i = LN(x_i + W softmax_k(q(x_i) . k(t_k) / sqrt(D)) v(t_k))    where h_i >= threshold

and likewise for the background, with 1 - h, where 1 - h > threshold. How many pixels ask differs
from image to image: their offsets are counted from the heat, and nothing is padded.

Mended: the released code writes the result into a copy and throws that away, so its layer gives the
pixels as they came. It also leaves an image alone that is all foreground or all background.
"""

import torch
from torch import Tensor, nn

from fastgt import Graph, global_attention

PATTERN = "every pixel to the tokens of its own side, foreground or background"
OPERATOR = "global_attention"


class IsomerScatter(nn.Module):
    def __init__(self, dim: int, heads: int, tokens: int, *, threshold: float = 0.5):
        super().__init__()
        self.heads, self.threshold, self.heat = heads, threshold, nn.Linear(dim, 1)
        self.maps = nn.ModuleList(nn.Linear(dim, tokens) for _ in range(2))
        self.q, self.kv, self.out = (
            nn.ModuleList(nn.Linear(dim, y) for _ in range(2)) for y in (dim, 2 * dim, dim)
        )
        self.norm = nn.ModuleList(nn.LayerNorm(dim) for _ in range(2))

    def forward(self, x: Tensor, offsets: Tensor) -> Tensor:
        """x ``[N, dim]``, offsets ``[G + 1]`` -> ``[N, dim]``."""
        heat, out = self.heat(x).sigmoid(), x  # [N, 1]
        sides = (heat, heat >= self.threshold), (1 - heat, heat < 1 - self.threshold)
        for i, (share, asks) in enumerate(sides):
            rows, ends = asks.squeeze(1).nonzero().squeeze(1), counted(asks, offsets)
            y, sizes = share * x, offsets.diff().tolist()
            weights = self.maps[i](y)  # [N, K]
            parts = zip(weights.split(sizes), y.split(sizes), strict=True)
            tokens = torch.cat([a.mT @ b for a, b in parts])  # [G K, dim]
            q = self.q[i](x[rows]).unflatten(1, (self.heads, -1))
            k, v = self.kv[i](tokens).unflatten(1, (2, self.heads, -1)).unbind(1)
            key_ends = torch.arange(len(offsets), device=x.device) * weights.shape[1]
            attended = global_attention(q, k, v, ends, key_offsets=key_ends)
            new = self.norm[i](x[rows] + self.out[i](attended.flatten(1)))
            out = out.index_copy(0, rows, new)
        return out


def counted(asks: Tensor, offsets: Tensor) -> Tensor:
    """How many rows ask before each boundary, ``[G + 1]``."""
    return torch.cat([asks.new_zeros(1, dtype=torch.long), asks.flatten().cumsum(0)])[offsets]


def paper_size() -> tuple[Graph, int, int]:
    """Stage 3 of 512 x 512 pixels: 32 x 32, half of it foreground, 121 tokens; 8 heads of 48."""
    offsets, key_offsets = torch.tensor([0, 512, 1024]), torch.tensor([0, 121, 242])
    return Graph.complete(offsets, key_offsets), 8, 48


if __name__ == "__main__":
    x, offsets = torch.randn(90, 32), torch.tensor([0, 40, 90])
    print("Isomer:", tuple(IsomerScatter(32, heads=4, tokens=6)(x, offsets).shape))
