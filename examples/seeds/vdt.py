"""VDT (Lu et al., arXiv 2305.13311): attention over time, then over space, of a noisy video.

x_tp is the token of place p in frame t, and c the step of the diffusion, which scales, shifts and
gates (adaLN)::

    x = x + W' attention(LN(x))                        over the frames, place by place
    x = x + gate(c) attention(LN(x) (1 + scale(c)) + shift(c))     over the places of each frame

Both are made of blocks: one for each place of a clip, and one for each frame. Clips of different
lengths lie one after another, and an order puts the frames of a place side by side. Where all have
one length, scaled_dot_product_attention does the same.

Kept: only attention over space is gated and modulated. The MLP is left out.
"""

import torch
from torch import Tensor, nn
from torch.nn.functional import layer_norm

from fastgt import Graph, global_attention

PATTERN = "every token to its place in all frames of the clip; then to all places of its frame"
OPERATOR = "global_attention"


class VDTAttention(nn.Module):
    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(dim)
        self.change = nn.Sequential(nn.SiLU(), nn.Linear(dim, 3 * dim))
        self.qkv = nn.ModuleList(nn.Linear(dim, 3 * dim) for _ in range(2))
        self.out = nn.ModuleList(nn.Linear(dim, dim) for _ in range(2))
        self.last = nn.Linear(dim, dim)

    def forward(self, x: Tensor, c: Tensor, frames: Tensor, places: int) -> Tensor:
        """x ``[N, dim]``, c ``[G, dim]``, frames ``[G]`` of so many places -> ``[N, dim]``."""
        order, offsets = over_time(frames, places)
        found = self.last(self.part(0, self.norm(x)[order], offsets))
        x = x.index_add(0, order, found)
        shift, scale, gate = self.change(c).repeat_interleave(frames * places, 0).chunk(3, 1)
        y = layer_norm(x, x.shape[1:], eps=1e-6) * (1 + scale) + shift
        offsets = torch.arange(len(x) // places + 1, device=x.device) * places
        return x + gate * self.part(1, y, offsets)

    def part(self, i: int, y: Tensor, offsets: Tensor) -> Tensor:
        q, k, v = self.qkv[i](y).unflatten(1, (3, self.heads, -1)).unbind(1)
        return self.out[i](global_attention(q, k, v, offsets).flatten(1))


def over_time(frames: Tensor, places: int) -> tuple[Tensor, Tensor]:
    """An order of tokens by clip, place and frame, and the boundaries of the places."""
    clip = torch.arange(len(frames), device=frames.device).repeat_interleave(frames * places)
    place = torch.arange(len(clip), device=frames.device) % places
    sizes = torch.cat([frames.new_zeros(1), frames.repeat_interleave(places)])
    return (clip * places + place).argsort(stable=True), sizes.cumsum(0)


def paper_size() -> tuple[Graph, int, int]:
    """16 frames of 16 x 16 tokens: the attention over time, 16 heads of 72."""
    return Graph.complete(torch.arange(257) * 16), 16, 72


if __name__ == "__main__":
    x, c, frames = torch.randn(7 * 9, 32), torch.randn(2, 32), torch.tensor([3, 4])
    print("VDT:", tuple(VDTAttention(32, heads=4)(x, c, frames, 9).shape))
