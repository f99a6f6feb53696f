"""LookupViT (Koner et al., arXiv 2407.12753): few compressed tokens look many others up.

Compressed tokens p gather from lookup tokens l, attend to each other, and give back to l. The
queries and keys of the gathering serve for giving back, read the other way::

    s_ij = W_q p_i . W_k l_j / sqrt(D)
    p'_i = p_i + W sum_j softmax_j(s_ij) W_v l_j
    p''  = p' + attention(p')
    l'_j = l_j + W' sum_i softmax_i(s_ij) W_v' p''_i

Time is linear in the lookup tokens. Their number may differ from image to image, and that of the
compressed ones too, which one LookupViT is trained with: offsets say both, nothing is padded.
Where all images have one size, scaled_dot_product_attention takes less time.

No code was released. That the second softmax runs over the compressed tokens of the same logits is
read out of the paper's words that weights are shared. MLPs and norms are left out.
"""

import torch
from torch import Tensor, nn

from fastgt import Graph, global_attention

PATTERN = "compressed tokens to all tokens of their image, and back"
OPERATOR = "global_attention"


class LookupViTAttention(nn.Module):
    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.heads = heads
        self.q, self.kv, self.out = (nn.Linear(dim, width) for width in (dim, 2 * dim, dim))
        self.qkv, self.out_self = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.v_back, self.out_back = nn.Linear(dim, dim), nn.Linear(dim, dim)

    def forward(
        self, few: Tensor, few_offsets: Tensor, many: Tensor, offsets: Tensor
    ) -> tuple[Tensor, Tensor]:
        """few ``[M, dim]``, many ``[N, dim]``, boundaries of both ``[G + 1]`` -> few, many."""
        heads = (self.heads, -1)
        q = self.q(few).unflatten(1, heads)
        k, v = self.kv(many).unflatten(1, (2, *heads)).unbind(1)
        gathered = global_attention(q, k, v, few_offsets, key_offsets=offsets)
        few = few + self.out(gathered.flatten(1))
        own = self.qkv(few).unflatten(1, (3, *heads)).unbind(1)
        few = few + self.out_self(global_attention(*own, few_offsets).flatten(1))
        v = self.v_back(few).unflatten(1, heads)
        back = global_attention(k, q, v, offsets, key_offsets=few_offsets)
        return few, many + self.out_back(back.flatten(1))


def paper_size() -> tuple[Graph, int, int]:
    """ViT-B/16 with 5 x 5 compressed tokens for 14 x 14: the gathering, 12 heads of 64."""
    return Graph.complete(torch.tensor([0, 25]), torch.tensor([0, 196])), 12, 64


if __name__ == "__main__":
    few, many = torch.randn(13, 32), torch.randn(90, 32)
    ends = torch.tensor([0, 4, 13]), torch.tensor([0, 40, 90])
    few, many = LookupViTAttention(32, heads=4)(few, ends[0], many, ends[1])
    print("LookupViT:", tuple(few.shape), tuple(many.shape))
