"""ConDaFormer: Disassembled Transformer for 3D Point Clouds, Duan et al., arXiv 2312.11112.

Cubic windows are taken apart into flat ones, S x S x 1, S x 1 x S and 1 x S x S voxels, each of a
third of the heads. Steps between points, in quarters of a voxel, have vectors t, sums over axes:

    a_ij  = softmax_j((q_i . k_j + q_i . tq_ij) / sqrt(D) + k_j . tk_ij)
    out_i = W_o sum_j a_ij (v_j + tv_ij)

tq is an edge key, tv an edge value and k_j . tk_ij a bias. The three patterns are one batch. Kept:
the keys' term is not scaled. Left out: convolutions. Dense attention would pad windows.
"""

import torch
from torch import nn

from fastgt import Graph, neighborhood_attention
from fastgt.patterns import groups

PATTERN = "flat windows in three planes, for a third of the heads each"
OPERATOR = "neighborhood_attention"


def planes(points, window=10, shift=False):
    """The batch of three patterns, and where in its window each point is, ``[3 N, 3]``."""
    graphs, places = [], []
    for flat in (2, 1, 0):
        size = points.new_tensor([1 if axis == flat else window for axis in range(3)])
        at = points - points.amin(0) + shift * size / 2
        graphs.append(groups(torch.unique(at // size, dim=0, return_inverse=True)[1]))
        places.append((at % size * 4).long())
    return Graph.batch(graphs), torch.cat(places)


class ConDaFormerAttention(nn.Module):
    def __init__(self, dim, heads, window=10):
        super().__init__()
        self.qkv, self.out = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.heads, shape = heads, (3, 8 * window - 1, 3, heads // 3, dim // heads)
        self.tables = nn.Parameter(0.02 * torch.randn(shape))  # of queries, keys, values

    def forward(self, x, graph, place):  # x [N, dim]
        qkv = self.qkv(x).view(len(x), 3, 3, self.heads // 3, -1)
        q, k, v = qkv.permute(1, 2, 0, 3, 4).flatten(1, 2)  # [3 N, H / 3, D]
        col, row = graph.edge_index
        step = place[row] - place[col] + self.tables.shape[1] // 2  # [E, 3]
        tq, tk, tv = self.tables[:, step, torch.arange(3)].sum(2)  # [E, H / 3, D]
        edge = {"edge_key": tq, "edge_value": tv, "edge_bias": (k[col] * tk).sum(2)}
        out = neighborhood_attention(q, k, v, graph, **edge)
        return self.out(out.view(3, len(x), -1).transpose(0, 1).flatten(1))


def paper_size():
    """A floor of 5 x 4 m in voxels of 4 cm, the first stage for ScanNet; 3 x 2 heads of 16."""
    floor = torch.cartesian_prod(torch.arange(125), torch.arange(100), torch.arange(1))
    return planes(floor.float())[0], 2, 16


if __name__ == "__main__":
    graph, place = planes(8 * torch.rand(60, 3), window=4)
    y = ConDaFormerAttention(24, 3, window=4)(torch.randn(60, 24), graph, place)
    print(f"ConDaFormer: {graph.num_edges} edges, output {list(y.shape)}")
