"""AdaFormer (Nie et al., arXiv 2401.11204): vector attention in groups that a point shifts itself.

Cars, cyclists and pedestrians differ in size, so each point regresses where the group is that it
reads. With p its place and x its features, and all products channel by channel::

    c_i   = p_i + W x_i                                 the middle of the group
    S_i   = the k points nearest to c_i
    d_ij  = MLP(c_i - p_j)
    out_i = x_i + W' sum_{j in S_i} softmax_j(MLP'(W_q x_i - W_k x_j + d_ij)) (W_v x_j + d_ij)

Each channel has a softmax of its own, which no dense call computes: it would need all pairs times
all channels. Clouds of any sizes lie one after another, by offsets. Groups are chosen without a
gradient; the shift learns through d.

No code was released. That a group is the nearest points of a shifted middle is assumed: the paper's
text names a regression of deformable groups and vector attention in them.
"""

import torch
from torch import Tensor, nn

from fastgt import Graph, channelwise_attention
from fastgt.patterns import knn

PATTERN = "every point to the 32 points nearest to a place that it regresses"
OPERATOR = "channelwise_attention"


class AdaFormerAttention(nn.Module):
    def __init__(self, dim: int, *, nearest: int):
        super().__init__()
        self.nearest, self.shift = nearest, nn.Linear(dim, 3)
        self.q, self.k, self.v, self.out = (nn.Linear(dim, dim) for _ in range(4))
        self.place = nn.Sequential(nn.Linear(3, dim), nn.ReLU(), nn.Linear(dim, dim))
        self.weigh = nn.Sequential(nn.Linear(dim, dim), nn.ReLU(), nn.Linear(dim, dim))

    def forward(self, x: Tensor, p: Tensor, offsets: Tensor) -> Tensor:
        """x ``[N, dim]``, p ``[N, 3]``, offsets ``[G + 1]`` -> ``[N, dim]``."""
        middle = p + self.shift(x)
        ends = {"offsets": offsets, "query_offsets": offsets}
        graph = knn(p.detach(), self.nearest, queries=middle.detach(), **ends)
        j, i = graph.edge_index
        d = self.place(middle[i] - p[j])  # [E, dim]
        logits = self.weigh(self.q(x)[i] - self.k(x)[j] + d)
        return x + self.out(channelwise_attention(logits, self.v(x), graph, edge_value=d))


def paper_size() -> tuple[Graph, int, int]:
    """A search region of 1,024 points, drawn, and groups of 32 (sizes assumed), 128 channels."""
    points = torch.rand(1024, 3, generator=torch.Generator().manual_seed(0))
    return knn(points, 32), 1, 128


if __name__ == "__main__":
    x, p, offsets = torch.randn(50, 32), torch.randn(50, 3), torch.tensor([0, 20, 50])
    print("AdaFormer:", tuple(AdaFormerAttention(32, nearest=8)(x, p, offsets).shape))
