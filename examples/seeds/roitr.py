"""RoITr: Rotation-Invariant Transformer for Point Cloud Matching, Yu et al., arXiv 2303.08231.

A point attends to its k nearest. Point pair features f_ij, the length of d = p_j - p_i and angles
between d and the normals, are the same when the cloud is turned. They give edges keys and values:

    e_ij  = W_e f_ij + b_e,   r_ij = W_r e_ij + b_r,   u_ij = W_u e_ij + b_u
    a_ij  = softmax_j((q_i . k_j + q_i . r_ij) / sqrt(D))
    out_i = LayerNorm(x_i + W_o sum_j a_ij (v_j + u_ij))

The bias q_i . r_ij depends on the query: r is an edge key. r and u are linear in (f_ij, 1), hence
`edge_attr [E, 5]` with weights `[5, H, D]`. Dense attention has no keys and values of pairs.
"""

import torch
from torch import nn
from torch.nn.functional import pad

from fastgt import neighborhood_attention
from fastgt.patterns import knn

PATTERN = "k nearest points, with keys and values on edges"
OPERATOR = "neighborhood_attention"


def pair_features(points, normals, graph):  # [E, 4]
    col, row = graph.edge_index
    d, a, b = points[col] - points[row], normals[row], normals[col]
    x, y = torch.stack([a, b, a]), torch.stack([d, d, b])
    angles = torch.atan2(torch.linalg.cross(x, y).norm(dim=2), (x * y).sum(2)) / torch.pi
    return torch.cat([d.norm(dim=1)[None], angles]).t()


class RoITrAttention(nn.Module):
    def __init__(self, dim, heads=4):
        super().__init__()
        self.heads, self.embed, self.qkv = heads, nn.Linear(4, dim), nn.Linear(dim, 3 * dim)
        self.r, self.u, self.out = (nn.Linear(dim, dim) for _ in range(3))
        self.norm = nn.LayerNorm(dim)

    def weight(self, layer):  # layer(embed(f)) = (f, 1) times this, [5, H, D]
        rows = torch.cat([self.embed.weight.t(), self.embed.bias[None]]) @ layer.weight.t()
        return (rows + pad(layer.bias[None], (0, 0, 4, 0))).unflatten(1, (self.heads, -1))

    def forward(self, x, features, graph):  # x [N, dim], features [E, 4]
        q, k, v = self.qkv(x).view(len(x), 3, self.heads, -1).unbind(1)
        edge = {"edge_key_weight": self.weight(self.r), "edge_value_weight": self.weight(self.u)}
        attr = pad(features, (0, 1), value=1.0)
        out = neighborhood_attention(q, k, v, graph, edge_attr=attr, **edge)
        return self.norm(x + self.out(out.flatten(1)))


def paper_size():
    """7,500 of 30,000 points of 3DMatch, the second stage: 16 neighbours, 4 heads of 32."""
    return knn(torch.rand(7_500, 3, generator=torch.Generator().manual_seed(0)), 16), 4, 32


if __name__ == "__main__":
    points = torch.nn.functional.normalize(torch.randn(50, 3), dim=1)  # of a ball: their normals
    graph = knn(points, 8)
    y = RoITrAttention(32)(torch.randn(50, 32), pair_features(points, points, graph), graph)
    print(f"RoITr: {graph.num_edges} edges, output {list(y.shape)}")
