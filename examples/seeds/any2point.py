"""Any2Point: Any-modality Large Models for 3D Understanding, Tang et al., arXiv 2404.07989.

A frozen transformer for text gets tokens of a point cloud. Its adapter projects points on several
lines, as places of a text of 77 words, in bins of two. A token attends to its bin of a line:

    y_i   = x_i + W_o attention(norm(x))_i       over j in the bin of i
    out_i = gelu(norm(mean of y_j, j in the bin of i))

This is one line. The model adds up all of them, by how similar out_i is to what a grid of voxels
gives. Kept: heads of 2 channels are scaled with 1 / sqrt(12), the width of all 6; bins without
tokens are rows of 0 in the batch norm. For one cloud of 128 tokens dense attention with a mask, as
the authors write it, is as good.
"""

import torch
from torch import nn

from fastgt import Graph, aggregate, neighborhood_attention
from fastgt.patterns import groups

PATTERN = "tokens in the same bin of a line"
OPERATOR = "neighborhood_attention"
BINS = 39  # of 2 of 77 words


def bins(place, offsets):
    """Who attends to whom, and bins with their tokens; place [N] from 0 to 76, of all clouds."""
    cloud = torch.arange(len(offsets) - 1).repeat_interleave(offsets.diff())
    row = cloud * BINS + (place / 2).long()
    edges = torch.stack([torch.arange(len(place)), row])
    return groups(row), Graph.from_edge_index(edges, (BINS * (len(offsets) - 1), len(place)))


class Any2PointLine(nn.Module):
    def __init__(self, dim, heads=6, width=12):
        super().__init__()
        self.heads, self.scale, self.norm = heads, width**-0.5, nn.LayerNorm(dim)
        self.qkv, self.out = nn.Linear(dim, 3 * width), nn.Linear(width, dim)
        self.pool = nn.Sequential(nn.BatchNorm1d(dim), nn.GELU())

    def forward(self, x, same_bin, in_bin):  # x [N, dim]
        q, k, v = self.qkv(self.norm(x)).view(len(x), 3, self.heads, -1).unbind(1)
        out = neighborhood_attention(q, k, v, same_bin, scale=self.scale)
        mean = aggregate(x + self.out(out.flatten(1)), in_bin, reduce="mean")  # [bins, dim]
        return self.pool(mean)[in_bin.edge_index[1]]


def paper_size():
    """128 tokens of a cloud on one of its lines; 6 heads of 2 channels."""
    place = 76 * torch.rand(128, generator=torch.Generator().manual_seed(0))
    return bins(place, torch.tensor([0, 128]))[0], 6, 2


if __name__ == "__main__":
    graphs = bins(76 * torch.rand(60), torch.tensor([0, 40, 60]))  # two clouds
    y = Any2PointLine(24)(torch.randn(60, 24), *graphs)
    print(f"Any2Point: {graphs[0].num_edges} edges, output {list(y.shape)}")
