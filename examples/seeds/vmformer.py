"""VMFormer (Li et al., arXiv 2208.12801): queries of each frame, and a sum of them over the clip.

A layer of the decoder. u_tq is query q in frame t, e its position, and d_tq what it finds in its
frame, by deformable attention, which samples pixels and is not ours::

    u    = LN(u + attention(u + e, u + e, u))          among the queries of a frame
    d    = deformable(u + e, frame)
    a_tq = softmax_t(w . d_tq)                         over the frames of the clip
    out  = LN(u_tq + d_tq + sum_t' a_t'q d_t'q)

Few queries attend to each other, frame by frame, without holes, and clips have one length: take
scaled_dot_product_attention, as here. Matting has one foreground, so the released default is a
single query. The sum over frames has one weight for all that read it: one softmax and one sum.

Kept: a frame's own d counts twice, for itself and within the sum.
"""

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from fastgt import Graph

PATTERN = "every query to all queries of its frame, then to itself in all frames of its clip"
OPERATOR = "scaled_dot_product_attention"


class VMFormerLayer(nn.Module):
    """Args: sample, a module from queries ``[G, T, Q, dim]`` to what they find in their frames."""

    def __init__(self, dim: int, heads: int, sample: nn.Module):
        super().__init__()
        self.heads, self.sample = heads, sample
        self.qk, self.v, self.out = (nn.Linear(dim, width) for width in (2 * dim, dim, dim))
        self.time = nn.Linear(dim, 1, bias=False)
        self.norm_own, self.norm = nn.LayerNorm(dim), nn.LayerNorm(dim)

    def forward(self, u: Tensor, e: Tensor) -> Tensor:
        """u ``[G, T, Q, dim]``, e ``[Q, dim]`` -> as u."""
        q, k = self.qk(u + e).unflatten(3, (2, self.heads, -1)).permute(3, 0, 1, 4, 2, 5)
        v = self.v(u).unflatten(3, (self.heads, -1)).transpose(2, 3)  # [G, T, H, Q, D]
        own = scaled_dot_product_attention(q, k, v).transpose(2, 3).flatten(3)
        u = self.norm_own(u + self.out(own))
        found = self.sample(u + e)
        over_time = (self.time(found).softmax(1) * found).sum(1, keepdim=True)
        return self.norm(u + found + over_time)


def paper_size() -> tuple[Graph, int, int]:
    """The sum of one query over 5 frames (assumed), of 256 channels."""
    return Graph.complete(torch.tensor([0, 5])), 1, 256


if __name__ == "__main__":
    layer = VMFormerLayer(32, heads=4, sample=nn.Linear(32, 32))
    out = layer(torch.randn(2, 3, 6, 32), torch.randn(6, 32))
    print("VMFormer:", tuple(out.shape))
