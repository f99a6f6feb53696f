"""GridFormer: Point-Grid Transformer for Surface Reconstruction, Li et al., arXiv 2401.02292.

A cell of a grid attends to the points that lie in it, channel by channel (vector attention):

    d_j   = W_2 relu(norm(W_1 o_j))             o_j: where point j is in its cell
    w_j   = relu(norm(W (k_j - q_i + d_j)))     [C / 8], j in cell i
    out_i = sum_j softmax_j(w_j) (v_j + d_j)

Channels s C / 8 + c of all 8 planes s share weight c: logits `[E, C / 8]` are expanded, not copied.
Rows are cells, columns are points; an empty cell gets 0. Kept: the ReLU before the softmax. The
released code does not use its attention over 9 neighbours. Dense attention weighs no channels.
"""

import torch
from torch import nn

from fastgt import Graph, channelwise_attention

PATTERN = "cells of a grid to the points in them"
OPERATOR = "channelwise_attention"


def cells(points, resolution):
    """The graph of cells and points [N, 3], from 0 to 1; and where in its cell each point is."""
    cell = (points * resolution).long().clamp(max=resolution - 1)
    row = cell @ torch.tensor([1, resolution, resolution**2])
    edges = torch.stack([torch.arange(len(points)), row])
    graph = Graph.from_edge_index(edges, (resolution**3, len(points)))
    return graph, points - cell / resolution


class PointGridAttention(nn.Module):
    def __init__(self, dim, planes=8):
        super().__init__()
        self.planes, small, wide = planes, dim // planes, 2 * dim
        self.q, self.k = nn.Linear(dim, dim), nn.Linear(dim, dim)
        deep = nn.Linear(dim, dim), nn.ReLU(), nn.Linear(dim, wide), nn.ReLU(), nn.Linear(wide, dim)
        near = nn.Linear(3, 3), nn.BatchNorm1d(3), nn.ReLU(), nn.Linear(3, dim)
        self.v, self.place = nn.Sequential(*deep), nn.Sequential(*near)
        self.weigh = nn.Sequential(nn.Linear(dim, small), nn.BatchNorm1d(small), nn.ReLU())

    def forward(self, cell, x, place, graph):  # cell [R^3, dim], x [N, dim], place [N, 3]
        col, row = graph.edge_index
        d = self.place(place)  # of points: each has one edge
        logits = self.weigh(self.k(x)[col] - self.q(cell)[row] + d[col])
        shared = logits[:, None].expand(-1, self.planes, -1)  # [E, 8, C / 8]
        v = (self.v(x) + d).unflatten(1, (self.planes, -1))
        return channelwise_attention(shared, v, graph).flatten(1)


def paper_size():
    """10,000 points of a room and those of 16^3 cells that have some; 8 planes of 32 channels."""
    points = torch.rand(10_000, 3, generator=torch.Generator().manual_seed(0))
    col, row = cells(points, 16)[0].edge_index
    filled, row = row.unique(return_inverse=True)
    return Graph.from_edge_index(torch.stack([col, row]), (len(filled), len(col))), 8, 32


if __name__ == "__main__":
    graph, place = cells(torch.rand(40, 3), 2)
    y = PointGridAttention(16)(torch.randn(8, 16), torch.randn(40, 16), place, graph)
    print(f"GridFormer: {graph.num_edges} edges, output {list(y.shape)}")
