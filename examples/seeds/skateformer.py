"""SkateFormer: Skeletal-Temporal Transformer, Do and Kim, arXiv 2403.09508.

A clip is a grid of T frames and V joints. Four partitions have heads of their own: frames in a row
or every (T / F)-th, with joints that are near or every (V / K)-th. Inside a part all attend:

    a_ij = softmax_j(s q_i . k_j + b_ij),   out_i = sum_j a_ij v_j

b_ij depends on the step between frames, and on both joints where these are spread. The patterns are
one batch, for one call. Kept: s = 1 / sqrt(heads of a partition). Left out: convolutions of the
other channels. Parts have equal sizes: reshapes and dense attention in them are faster.
"""

import torch
from torch import nn

from fastgt import Graph, neighborhood_attention
from fastgt.patterns import dilated

PATTERN = "four partitions of frames x joints, near or strided in each direction"
OPERATOR = "neighborhood_attention"


def partitions(shape, frames=8, near=8, spread=12, graphs=1):
    """The four patterns as a batch: node p N + n is joint n of partition p."""
    sizes, far = ((frames, near), (frames, spread)), (shape[0] // frames, shape[1] // spread)
    parts = zip(sizes * 2, ((1, 1), (1, far[1]), (far[0], 1), far), strict=True)
    return Graph.batch([dilated(shape, *part, graphs=graphs) for part in parts])


class SkateFormerAttention(nn.Module):
    def __init__(self, dim, shape, heads=4, frames=8, spread=12):
        super().__init__()
        self.shape, self.heads, self.qkv = shape, heads, nn.Linear(dim, 3 * dim // 2)
        self.near = nn.Parameter(0.02 * torch.randn(2, 2 * frames - 1, heads))
        self.far = nn.Parameter(0.02 * torch.randn(2, 2 * frames - 1, spread, spread, heads))

    def bias(self, graph):  # [E, H]
        (times, joints), nodes = self.shape, graph.num_rows // 4
        frames, spread = self.far.shape[1] // 2 + 1, self.far.shape[2]
        part, node = graph.edge_index[1] // nodes, graph.edge_index % nodes % (times * joints)
        time, joint = node // joints, node % joints // (joints // spread)
        frame = torch.where(part < 2, time % frames, time // (times // frames))
        step = frame[1] - frame[0] + frames - 1  # from column to row
        far = self.far[part // 2, step, joint[1], joint[0]]
        return torch.where((part % 2 == 0)[:, None], self.near[part // 2, step], far)

    def forward(self, x, graph):  # x [N, dim], N = T V a clip -> [N, dim / 2]
        qkv = self.qkv(x).view(len(x), 4, 3, self.heads, -1)
        q, k, v = qkv.permute(2, 1, 0, 3, 4).flatten(1, 2)  # [4 N, H, D]
        scale, bias = self.heads**-0.5, self.bias(graph)
        out = neighborhood_attention(q, k, v, graph, scale=scale, edge_bias=bias)
        return out.view(4, len(x), -1).transpose(0, 1).flatten(1)


def paper_size():
    """A clip of NTU, 64 frames of 2 x 24 joints; the first stage has 4 x 4 heads of 3 channels."""
    return partitions((64, 48)), 4, 3


if __name__ == "__main__":
    graph = partitions((4, 8), frames=2, near=4, spread=2)
    y = SkateFormerAttention(32, (4, 8), 2, frames=2, spread=2)(torch.randn(32, 32), graph)
    print(f"SkateFormer: {graph.num_edges} edges, output {list(y.shape)}")
