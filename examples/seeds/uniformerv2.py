"""UniFormerV2 (Li et al., arXiv 2211.09552): one token for a clip reads all frames.

The global block. c is the video's token, x the tokens of all frames of its clip::

    c' = c + W softmax_j(W_q LN(c) . W_k LN'(x_j) / sqrt(D)) W_v LN'(x_j)

One query reads T (h w + 1) keys, so time is linear in the clip. Clips of different lengths lie in a
batch one after another, by offsets. Where all have one length, as in the released code,
scaled_dot_product_attention does the same in less time: one query is little work.

Kept: W begins as 0, so a block changes nothing before it is trained. Local blocks and the position
are convolutions: they are left out.
"""

import torch
from torch import Tensor, nn

from fastgt import Graph, global_attention

PATTERN = "one token a clip to all tokens of all its frames"
OPERATOR = "global_attention"


class UniFormerV2Global(nn.Module):
    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.heads = heads
        self.norm, self.norm_x = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.q, self.kv, self.out = (nn.Linear(dim, width) for width in (dim, 2 * dim, dim))
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(self, token: Tensor, x: Tensor, offsets: Tensor) -> Tensor:
        """token ``[G, dim]``, x ``[N, dim]``, offsets ``[G + 1]`` -> ``[G, dim]``."""
        q = self.q(self.norm(token)).unflatten(1, (self.heads, -1))
        k, v = self.kv(self.norm_x(x)).unflatten(1, (2, self.heads, -1)).unbind(1)
        single = torch.arange(len(token) + 1, device=x.device)
        attended = global_attention(q, k, v, single, key_offsets=offsets)
        return token + self.out(attended.flatten(1))


def paper_size() -> tuple[Graph, int, int]:
    """B/16 with 16 frames, of which 8 remain: 8 x 197 keys, 12 heads of 64."""
    return Graph.complete(torch.tensor([0, 1]), torch.tensor([0, 8 * 197])), 12, 64


if __name__ == "__main__":
    token, x, offsets = torch.randn(2, 32), torch.randn(90, 32), torch.tensor([0, 40, 90])
    print("UniFormerV2:", tuple(UniFormerV2Global(32, heads=4)(token, x, offsets).shape))
