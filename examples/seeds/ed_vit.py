"""ED-ViT (Liu et al., arXiv 2410.11650): a ViT split over devices, each with the heads it needs.

Every device has some of the classes, and keeps the heads that matter for them. With m_h in {0, 1}::

    out_i = b + sum_h m_h W_h softmax_j(q_ih . k_jh / sqrt(D)) v_jh

A masked head costs nothing: neither its projections nor its attention is computed, and its weights
get gradients of 0. So masks can be tried and trained on one model. ``fastgt.prune_heads`` then
makes the small one of it, for modules of fastgt.nn.

How heads are ranked for a class, and the width of layers, which is cut too, are not attention: they
are left out. With all heads there and images of one size, scaled_dot_product_attention does it.
"""

import torch
from torch import Tensor, nn

from fastgt import Graph, global_attention, head_projection
from fastgt.nn import HeadGate

PATTERN = "every token to all tokens of its image, in the heads of a mask"
OPERATOR = "global_attention"


class EDViTAttention(nn.Module):
    """Args: mask ``[H]`` bool, the heads of this device."""

    def __init__(self, dim: int, mask: Tensor):
        super().__init__()
        self.gate, self.heads = HeadGate(mask), len(mask)
        self.qkv, self.out = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def forward(self, x: Tensor, offsets: Tensor) -> Tensor:
        """x ``[N, dim]``, offsets ``[G + 1]`` -> ``[N, dim]``."""
        gate, heads = self.gate(), self.heads
        weight, bias = (y.unflatten(0, (3 * heads, -1)) for y in (self.qkv.weight, self.qkv.bias))
        qkv = head_projection(x, weight, bias, gate.repeat(3))  # [N, 3 H, D]
        out = global_attention(*qkv.chunk(3, 1), offsets, head_gate=gate)
        weight = self.out.weight.unflatten(1, (heads, -1))
        return head_projection(out, weight, self.out.bias, gate)


def paper_size() -> tuple[Graph, int, int]:
    """ViT-B/16 on an image of 224 x 224: 196 patches and the class, 12 heads of 64."""
    return Graph.complete(torch.tensor([0, 197])), 12, 64


if __name__ == "__main__":
    block = EDViTAttention(32, torch.tensor([True, False, True, False]))
    x, offsets = torch.randn(60, 32), torch.tensor([0, 25, 60])
    print("ED-ViT:", tuple(block(x, offsets).shape), "with 2 of 4 heads")
