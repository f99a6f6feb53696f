"""TNT (Han et al., arXiv 2103.00112): attention among the pixels of a patch, then among patches.

w are 16 small tokens of a patch, its words, and s one wide token of it, its sentence::

    w = w + attention(LN(w))               among the 16 words of each patch
    s = s + W LN([w_1 ... w_16])           of the same patch; the class token gets none
    s = s + attention(LN(s))               among the sentences of each image, with its class

Both are block-diagonal: blocks of 16 words, and one block of sentences an image. Images of any
numbers of patches lie in a batch one after another, by offsets, without padding.

Kept: words attend in 4 heads of 6 channels. MLPs after both attentions are left out. Where all
images have one size, scaled_dot_product_attention does the same.
"""

import torch
from torch import Tensor, nn

from fastgt import Graph, global_attention

PATTERN = "every word to the 16 words of its patch; every sentence to all of its image"
OPERATOR = "global_attention"


class TNTAttention(nn.Module):
    def __init__(self, dim: int, heads: int, word_dim: int, word_heads: int, *, words: int = 16):
        super().__init__()
        self.heads = word_heads, heads
        self.norms = nn.ModuleList(nn.LayerNorm(width) for width in (word_dim, dim))
        self.qkv = nn.ModuleList(nn.Linear(width, 3 * width) for width in (word_dim, dim))
        self.out = nn.ModuleList(nn.Linear(width, width) for width in (word_dim, dim))
        self.up = nn.Sequential(nn.LayerNorm(words * word_dim), nn.Linear(words * word_dim, dim))

    def forward(self, w: Tensor, s: Tensor, offsets: Tensor) -> tuple[Tensor, Tensor]:
        """w ``[P, 16, word_dim]``; s ``[P + G, dim]`` and its offsets, classes first -> w, s."""
        patches, words = w.shape[:2]
        ends = torch.arange(patches + 1, device=w.device) * words
        w = (w.flatten(0, 1) + self.part(0, w.flatten(0, 1), ends)).view_as(w)
        is_patch = torch.ones(len(s), dtype=torch.bool, device=s.device)
        is_patch[offsets[:-1]] = False  # the class tokens, which come first
        s = s.index_add(0, is_patch.nonzero().squeeze(1), self.up(w.flatten(1)))
        return w, s + self.part(1, s, offsets)

    def part(self, i: int, x: Tensor, offsets: Tensor) -> Tensor:
        qkv = self.qkv[i](self.norms[i](x)).unflatten(1, (3, self.heads[i], -1))
        return self.out[i](global_attention(*qkv.unbind(1), offsets).flatten(1))


def paper_size() -> tuple[Graph, int, int]:
    """TNT-S: the words of 14 x 14 patches, 4 heads of 6."""
    return Graph.complete(torch.arange(197) * 16), 4, 6


if __name__ == "__main__":
    w, s, offsets = torch.randn(13, 16, 8), torch.randn(15, 32), torch.tensor([0, 5, 15])
    w, s = TNTAttention(32, 4, 8, 2)(w, s, offsets)
    print("TNT:", tuple(w.shape), tuple(s.shape))
