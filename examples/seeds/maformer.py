"""MAFormer's fusion of two scales (Wang et al., arXiv 2209.01620).

Tokens attend within their window, and what comes out attends to a few global tokens. These are M
mixtures of all N tokens, which a linear layer over the tokens learns::

    l_i   = sum_j softmax_j(q_i . k_j / sqrt(d)) v_j      j in the window of i
    g     = S x                                           S [M, N] and a bias, learned
    out_i = W_o (l_i + sum_m softmax_m(W_q l_i . W_k g_m / sqrt(d)) W_v g_m)

No code was released. The abstract fixes the three parts: windows, down-sampling of all tokens that
is learned, and fusion by attention. That the streams are added is a choice of this file, and so are
the grid and heads of ``paper_size()``, which are Swin-T's.

The global tokens are a small dense problem (``global_attention``), and so are sorted windows.
"""

import torch
from torch import Tensor, nn

from fastgt import Graph, global_attention, neighborhood_attention
from fastgt.patterns import windows

PATTERN = "windows of 7 x 7; then each token to 49 learned global tokens"
OPERATOR = "neighborhood_attention"


class MAFormerAttention(nn.Module):
    """x ``[N, C]``, the tokens of images of ``tokens`` each -> ``[N, C]``."""

    def __init__(self, dim: int, heads: int, tokens: int, global_tokens: int):
        super().__init__()
        self.heads, self.tokens, self.global_tokens = heads, tokens, global_tokens
        self.qkv, self.out = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.down = nn.Linear(tokens, global_tokens)
        self.query, self.key_value = nn.Linear(dim, dim), nn.Linear(dim, 2 * dim)

    def forward(self, x: Tensor, graph: Graph) -> Tensor:
        q, k, v = self.qkv(x).view(len(x), 3, self.heads, -1).unbind(1)  # [N, H, D]
        local = neighborhood_attention(q, k, v, graph).flatten(1)  # [N, C]
        images = x.view(-1, self.tokens, x.shape[1])  # [G, tokens, C]
        few = self.down(images.mT).mT.flatten(0, 1)  # [G M, C]
        ends = torch.arange(len(images) + 1, device=x.device)
        k, v = self.key_value(few).view(len(few), 2, self.heads, -1).unbind(1)
        far = global_attention(
            self.query(local).view_as(q),
            k,
            v,
            ends * self.tokens,
            key_offsets=ends * self.global_tokens,
        )
        return self.out(local + far.flatten(1))


def paper_size() -> tuple[Graph, int, int]:
    """The windows of an image of 224 x 224 in patches of 4 x 4."""
    return windows((56, 56), 7), 3, 32


if __name__ == "__main__":
    graph = windows((8, 8), 4, graphs=2)
    block = MAFormerAttention(32, heads=4, tokens=64, global_tokens=4)
    print(f"MAFormer: {graph.num_edges} edges -> {list(block(torch.randn(128, 32), graph).shape)}")
