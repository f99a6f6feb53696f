"""EcoFormer (Liu et al., arXiv 2209.09004): linear attention over binary codes.

Queries and keys are one projection, divided by its norm. A kernel hash with anchors u_m turns it
into b bits, and the weight of a pair is what its codes have in common::

    y_i   = A (exp(-|x_i - u_m|^2 / 2 sigma) - mean_m),   sigma the mean distance in the image
    c_i   = sign(y_i)  in {-1, 1}^b,   its gradient that of clamp(y_i, -1, 1)
    out_i = sum_j (c_i . c_j + b + 1) v_j / sum_j (c_i . c_j + b + 1)

That is linear attention over the b + 1 features [c_i, sqrt(b + 1)]. The authors fit anchors, mean
and A once, by supervised hashing of a trained model: they are buffers.

Mended: the released numerator adds (b + 1) v_i, its own value, where the equation has the sum of
all values, (b + 1) sum_j v_j. So its weights do not add up to one.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from fastgt import Graph, linear_attention, segment_mean

PATTERN = "every token to all tokens of its image, through codes of 16 bits"
OPERATOR = "linear_attention"


class EcoFormerAttention(nn.Module):
    def __init__(self, dim: int, heads: int, *, bits: int = 16, anchors: int = 25):
        super().__init__()
        self.heads = heads
        self.qk, self.v, self.out = (nn.Linear(dim, dim) for _ in range(3))
        self.register_buffer("anchors", normalize(torch.randn(heads, anchors, dim // heads), dim=2))
        self.register_buffer("mean", torch.zeros(heads, anchors))
        self.register_buffer("hash", torch.randn(heads, bits, anchors))

    def forward(self, x: Tensor, offsets: Tensor) -> Tensor:
        """x ``[N, dim]``, offsets ``[G + 1]`` -> ``[N, dim]``."""
        qk, v = (y.unflatten(1, (self.heads, -1)) for y in (self.qk(x), self.v(x)))
        code = self.codes(normalize(qk, dim=2), offsets)  # [N, H, b]
        one = torch.full_like(code[..., :1], math.sqrt(code.shape[2] + 1))
        code = torch.cat([code, one], 2)
        out = linear_attention(code, code, v, offsets, feature_map="identity", eps=0)
        return self.out(out.flatten(1))

    def codes(self, x: Tensor, offsets: Tensor) -> Tensor:
        distance = (x[:, :, None] - self.anchors).square().sum(3)  # [N, H, anchors]
        sigma = segment_mean(distance.mean(2), offsets)  # [G, H]
        sigma = sigma.repeat_interleave(offsets.diff(), 0)[..., None]
        kernel = torch.exp(-distance / (2 * sigma)) - self.mean
        y = torch.einsum("nhm,hbm->nhb", kernel, self.hash)
        soft = y.clamp(-1, 1)
        return soft + (torch.where(y > 0, 1.0, -1.0) - soft).detach()


def paper_size() -> tuple[Graph, int, int]:
    """Stage 1 of PVTv2-B0, which EcoFormer is trained on: 56 x 56 tokens, one head of 32."""
    return Graph.complete(torch.tensor([0, 56 * 56])), 1, 32


if __name__ == "__main__":
    x, offsets = torch.randn(90, 32), torch.tensor([0, 40, 90])
    print("EcoFormer:", tuple(EcoFormerAttention(32, heads=2)(x, offsets).shape))
