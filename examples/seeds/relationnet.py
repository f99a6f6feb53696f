"""RelationNet++: Bridging Visual Representations for Detection, Chi et al., arXiv 2010.15831.

Every place i of the feature maps attends to the keypoints j that another head found in its image:

    a_ij  = softmax_j(q_i . k_j / sqrt(D) + log max(g(p_j - p_i), 1e-6))
    out_i = relu(x_i + W_o sum_j a_ij v_j)

g, linear in sines and cosines of x and y, is read off a map of 401 x 401 steps. Mended: the map is
a line for x plus one for y; the authors store 401 x 401 x 256 numbers. Kept: the clamp. For one
image dense attention with an additive mask is as good; here images of a batch may have any sizes.
"""

import torch
from torch import nn
from torch.nn.functional import grid_sample

from fastgt import Graph, global_attention

PATTERN = "places of feature maps to sampled keypoints of their image, with a bias for each pair"
OPERATOR = "global_attention"


class BridgingAttention(nn.Module):
    def __init__(self, dim=256, heads=8, radius=200, waves=256):
        super().__init__()
        self.heads, self.radius, self.relation = heads, radius, nn.Linear(waves, heads)
        self.q, self.k, self.v, self.out = (nn.Linear(dim, dim) for _ in range(4))
        nn.init.normal_(self.relation.weight, std=0.01)
        lengths = 1000 ** (4 / waves * torch.arange(waves // 4))
        angle = torch.arange(-radius, radius + 1)[:, None] / lengths
        self.register_buffer("waves", torch.cat([angle.sin(), angle.cos()], 1), persistent=False)

    def bias(self, step):  # [E, 2] -> [E, H]
        x, y = (w @ self.waves.t() for w in self.relation.weight.chunk(2, 1))  # [H, steps]
        table = x[:, None] + y[:, :, None] + self.relation.bias[:, None, None]
        at = (step / self.radius).view(1, 1, -1, 2)
        g = grid_sample(table[None], at, padding_mode="border", align_corners=False)
        return g[0, :, 0].t().clamp(min=1e-6).log()

    def forward(self, x, place, key, key_place, graph):
        """x [N, dim] at place [N, 2], key [M, dim] at key_place, in strides of the finest map."""
        inputs = (self.q, x), (self.k, key), (self.v, key)
        q, k, v = (f(t).unflatten(1, (self.heads, -1)) for f, t in inputs)
        col, row = graph.edge_index
        bias, ends = self.bias(key_place[col] - place[row]), graph.col_graph_ptr
        out = global_attention(q, k, v, graph.graph_ptr, key_offsets=ends, bias=bias)
        return (x + self.out(out.flatten(1))).relu()


def paper_size():
    """The five maps of an image of 1333 x 800 pixels to 50 keypoints; 8 heads of 32 channels."""
    places = sum((-(-1333 // stride)) * (-(-800 // stride)) for stride in (8, 16, 32, 64, 128))
    return Graph.complete(torch.tensor([0, places]), torch.tensor([0, 50])), 8, 32


if __name__ == "__main__":
    graph = Graph.complete(torch.tensor([0, 12, 20]), torch.tensor([0, 3, 5]))  # two images
    x, place, key, key_place = (torch.rand(n, d) for n in (20, 5) for d in (32, 2))
    y = BridgingAttention(32, 4, radius=10, waves=16)(x, place, key, key_place, graph)
    print(f"RelationNet++: {graph.num_edges} pairs, output {list(y.shape)}")
