"""ECO-M2F (Yao et al., arXiv 2404.15244): Mask2Former, whose queries read their own masks only.

The masked attention of Mask2Former's decoder (arXiv 2112.01527), on whatever encoder layer a gate
lets the image leave. m_ij is the mask that query i predicted before, e and p are positions::

    S_i   = {j: sigmoid(m_ij) >= 1/2}, or all pixels where that is empty
    out_i = LN(u_i + W softmax_{j in S_i}(W_q(u_i + e_i) . W_k(x_j + p_j) / sqrt(D)) W_v x_j)

A mask is a small part of the image, so a graph of its pixels saves the others: a dense call
computes them and then adds -inf. On one thread of a CPU the graph takes a quarter of the dense
call's time where masks cover 6 % of the image, and more than it where they cover a quarter.

Kept: a query whose mask is empty reads everything, as in Mask2Former; a row without edges would
give 0. The gate that ends the encoder, and the encoder's deformable attention, are left out.
"""

import torch
from torch import Tensor, nn

from fastgt import Graph, neighborhood_attention

PATTERN = "every query to the pixels of its own mask"
OPERATOR = "neighborhood_attention"


class ECOM2FMaskedAttention(nn.Module):
    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.heads, self.norm = heads, nn.LayerNorm(dim)
        self.q, self.k, self.v, self.out = (nn.Linear(dim, dim) for _ in range(4))

    def forward(self, u: Tensor, x: Tensor, e: Tensor, p: Tensor, graph: Graph) -> Tensor:
        """Of all images: u and e ``[Q, dim]``, x and p ``[N, dim]`` -> ``[Q, dim]``."""
        layers = (self.q, u + e), (self.k, x + p), (self.v, x)
        q, k, v = (layer(y).unflatten(1, (self.heads, -1)) for layer, y in layers)
        attended = neighborhood_attention(q, k, v, graph)
        return self.norm(u + self.out(attended.flatten(1)))


def masked(masks: list[Tensor]) -> Graph:
    """The graph of a batch from logits of masks, one ``[Q, n]`` for each image."""
    chosen = [mask.sigmoid() >= 0.5 for mask in masks]
    return Graph.batch([Graph.from_dense(y | ~y.any(1, keepdim=True)) for y in chosen])


def paper_size() -> tuple[Graph, int, int]:
    """100 queries, 128 x 128 pixels, 8 heads of 32; as masks, squares of 32 x 32 (assumed)."""
    mask = torch.full((100, 128, 128), -1.0)
    for i in range(100):
        top, left = divmod(i, 10)
        mask[i, 10 * top : 10 * top + 32, 10 * left : 10 * left + 32] = 1
    return masked([mask.flatten(1)]), 8, 32


if __name__ == "__main__":
    graph = masked([torch.randn(5, 49), torch.randn(5, 64)])
    u, x = torch.randn(10, 32), torch.randn(113, 32)
    block = ECOM2FMaskedAttention(32, heads=4)
    out = block(u, x, torch.randn(10, 32), torch.randn(113, 32), graph)
    print("ECO-M2F:", tuple(out.shape), "over", graph.num_edges, "of", 5 * 49 + 5 * 64, "pairs")
