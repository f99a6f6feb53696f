"""ChannelViT (Bao et al., arXiv 2309.16108): a token for each patch of each channel of an image.

Microscopes and satellites have many channels, and seldom all of them. A patch z of channel c at
place p is a token, with one projection for all channels::

    x_i = W z_i + channel[c_i] + place[p_i],   x_0 = class + place[0]
    out = x + attention(LN(x))                 over all tokens of the image

Images with other channels have other numbers of tokens: they lie one after another, by offsets,
without padding. Where all have the same channels, scaled_dot_product_attention does the same.

Mended: in training the released code draws channels to leave out, one set for the whole batch, for
its tokens are one tensor. Here each image has a set of its own.
"""

import torch
from torch import Tensor, nn

from fastgt import Graph, global_attention

PATTERN = "every token to all patches of all channels that its image has"
OPERATOR = "global_attention"


class ChannelViTAttention(nn.Module):
    def __init__(self, patch: int, channels: int, places: int, dim: int, heads: int):
        super().__init__()
        self.heads, self.patch = heads, nn.Linear(patch, dim)
        self.channel = nn.Parameter(torch.randn(channels, dim) * 0.02)
        self.place = nn.Parameter(torch.randn(places + 1, dim) * 0.02)
        self.token = nn.Parameter(torch.randn(dim) * 0.02)
        self.norm = nn.LayerNorm(dim)
        self.qkv, self.out = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def forward(
        self, z: Tensor, channel: Tensor, place: Tensor, offsets: Tensor
    ) -> tuple[Tensor, Tensor]:
        """z ``[N, patch]`` -> tokens ``[N + G, dim]``, the class first, and their boundaries."""
        graphs = len(offsets) - 1
        token = (self.token + self.place[0]).expand(graphs, -1)
        patches = self.patch(z) + self.channel[channel] + self.place[place + 1]
        # the class of image g stands before its patches, and g classes before those
        ends = offsets + torch.arange(graphs + 1, device=z.device)
        image = torch.arange(graphs, device=z.device).repeat_interleave(offsets.diff())
        to = torch.cat([ends[:-1], torch.arange(len(z), device=z.device) + image + 1])
        x = torch.cat([token, patches])[to.argsort()]  # [N + G, dim]
        q, k, v = self.qkv(self.norm(x)).unflatten(1, (3, self.heads, -1)).unbind(1)
        return x + self.out(global_attention(q, k, v, ends).flatten(1)), ends


def paper_size() -> tuple[Graph, int, int]:
    """JUMP-CP: 8 channels of 14 x 14 patches of 16, and the class; ViT-S, 6 heads of 64."""
    return Graph.complete(torch.tensor([0, 8 * 196 + 1])), 6, 64


if __name__ == "__main__":
    block = ChannelViTAttention(64, channels=5, places=9, dim=32, heads=4)
    channel = torch.tensor([0, 3, 1, 2, 4]).repeat_interleave(9)  # 2 of an image, 3 of another
    place, offsets = torch.arange(9).repeat(5), torch.tensor([0, 18, 45])
    out, ends = block(torch.randn(45, 64), channel, place, offsets)
    print("ChannelViT:", tuple(out.shape), "in", ends.tolist())
