"""Fashionformer (Xu et al., arXiv 2204.04654): queries that gather their own mask, then talk.

One stage of a stream of queries, of objects or of their attributes. With m_i the predicted mask of
query u_i over the pixels x, and f, g, a, b linear layers::

    s_i = sum_j 1[sigmoid(m_ij) > 0.5] x_j                what the mask gathers
    z_i = f(u_i) * g(s_i)
    u'  = FC(sigmoid(LN(a(z))) * LN(g'(s)) + sigmoid(LN(b(z))) * LN(f'(u)))      K-Net's update
    out = LN(u' + attention(u'))                          all queries of the image

The gathering has no softmax, and is a product of matrices. A hundred queries attend to each other
without holes: take scaled_dot_product_attention, as here.

Kept: the masks are cut at 1/2, so no gradient reaches them through s.
"""

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from fastgt import Graph

PATTERN = "every query to the sum of its mask's pixels, then to all queries of its image"
OPERATOR = "scaled_dot_product_attention"


class FashionformerStage(nn.Module):
    def __init__(self, dim: int, heads: int, inner: int):
        super().__init__()
        self.heads = heads
        self.query, self.mask = nn.Linear(dim, 2 * inner), nn.Linear(dim, 2 * inner)  # [f, f'], ...
        self.gates = nn.ModuleList(nn.Linear(inner, inner) for _ in range(2))
        self.norms = nn.ModuleList(nn.LayerNorm(inner) for _ in range(4))
        self.update = nn.Sequential(nn.Linear(inner, dim), nn.LayerNorm(dim), nn.ReLU())
        self.qkv, self.out = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.norm = nn.LayerNorm(dim)

    def forward(self, u: Tensor, x: Tensor, mask: Tensor) -> Tensor:
        """u ``[G, Q, dim]``, x ``[G, n, dim]``, mask ``[G, Q, n]`` -> ``[G, Q, dim]``."""
        gathered = (mask.sigmoid() > 0.5).to(x.dtype) @ x  # [G, Q, dim]
        f, own = self.query(u).chunk(2, 2)
        g, new = self.mask(gathered).chunk(2, 2)
        keep, take = (gate(f * g) for gate in self.gates)
        norms = self.norms
        u = norms[0](take).sigmoid() * norms[1](new) + norms[2](keep).sigmoid() * norms[3](own)
        u = self.update(u)
        q, k, v = self.qkv(u).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        attended = scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return self.norm(u + self.out(attended))


def paper_size() -> tuple[Graph, int, int]:
    """100 queries of one image, 8 heads of 32."""
    return Graph.complete(torch.tensor([0, 100])), 8, 32


if __name__ == "__main__":
    u, x, mask = torch.randn(2, 6, 32), torch.randn(2, 49, 32), torch.randn(2, 6, 49)
    print("Fashionformer:", tuple(FashionformerStage(32, heads=4, inner=16)(u, x, mask).shape))
