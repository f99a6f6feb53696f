"""The Gaussian mixture mask of "RetNet Viewed through Convolution", Li and Zhang, arXiv 2309.05375.

A ViT for small data sets learns how far to look. Patches i and j at distance d_ij on the image's
grid get, a head each,

    m_ij  = sum_k alpha_k exp(-d_ij^2 / (2 (sigma_k^2 + 1e-5)))
    a_ij  = softmax_j(m_ij (q_i . k_j) / sqrt(D))
    out_i = sum_j a_ij v_j

The mask multiplies logits before the softmax, so it is an `edge_gate [E, H]`. Where it is 0 the
logit is 0, and the weight is not: no edge may be left out, however far. The pattern is complete.

Mended: the released code takes exp(-d^2), which is 0 in float32 where d^2 > 103, and raises it to
a power. Here the exponents are multiplied.

At the paper's size, 64 patches, dense attention is faster. PyTorch's scaled_dot_product_attention
has no factor of logits, so it is written as two products with a softmax between them.
"""

import torch
from torch import nn

from fastgt import Graph, neighborhood_attention

PATTERN = "complete, with a factor of logits that falls with the distance of patches"
OPERATOR = "neighborhood_attention"


class GaussianMixtureAttention(nn.Module):
    def __init__(self, dim, heads, grid, kernels=3):
        super().__init__()
        self.heads, self.grid = heads, grid
        self.qkv, self.out = nn.Linear(dim, 3 * dim, bias=False), nn.Linear(dim, dim)
        self.sigma = nn.Parameter(10 + 10 * torch.randn(kernels, heads))
        self.alpha = nn.Parameter(2 * torch.randn(kernels, heads))

    def forward(self, x, graph):  # x [N, dim]: images one after another, row by row
        height, width = self.grid
        patch = graph.edge_index % (height * width)
        (y0, y1), (x0, x1) = patch // width, patch % width
        square = ((x0 - x1) ** 2 + (y0 - y1) ** 2).to(x.dtype)[:, None, None]
        mask = self.alpha * torch.exp(-square / (2 * (self.sigma**2 + 1e-5)))  # [E, kernels, H]
        q, k, v = self.qkv(x).view(len(x), 3, self.heads, -1).unbind(1)
        return self.out(neighborhood_attention(q, k, v, graph, edge_gate=mask.sum(1)).flatten(1))


def paper_size():
    """An image of CIFAR of 32 x 32 pixels in patches of 4 x 4; 12 heads of 16 channels."""
    return Graph.complete(torch.tensor([0, 64])), 12, 16


if __name__ == "__main__":
    images = Graph.complete(torch.tensor([0, 16, 32]))  # two of 4 x 4 patches
    y = GaussianMixtureAttention(48, 4, (4, 4))(torch.randn(32, 48), images)
    print(f"Gaussian mixture mask: {images.num_edges} edges, output {list(y.shape)}")
