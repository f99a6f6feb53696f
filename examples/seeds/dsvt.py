"""DSVT's attention in sets of voxels (Wang et al., arXiv 2301.06051, equation 3).

The n voxels of a window, in the order of x or of y, fill s = ceil(n / t) sets of t places evenly::

    place p of all s t places holds voxel floor(p n / (s t))
    out_i = W_o sum_j softmax_j((x_i + e_i) W_q . (x_j + e_j) W_k / sqrt(d)) W_v x_j

j is in the set of i, once. The released code masks the copies of a voxel, which all stand in one
set, and writes their outputs, which are equal, to one row. So sets are runs of nearly equal length
of the order, and no place is needed: voxel r of a window is in set floor(((r + 1) s - 1) / n).

Sets are ragged, so that dense attention would have to pad them.
"""

import torch
from torch import Tensor, nn

from fastgt import Graph, neighborhood_attention
from fastgt.patterns import groups

PATTERN = "sets of 36 voxels or fewer inside windows of 12 x 12"
OPERATOR = "neighborhood_attention"


class DSVTAttention(nn.Module):
    """x ``[N, C]``, voxels, and e ``[N, C]``, of their positions -> ``[N, C]``."""

    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.heads = heads
        self.query_key, self.value = nn.Linear(dim, 2 * dim), nn.Linear(dim, dim)
        self.out = nn.Linear(dim, dim)

    def forward(self, x: Tensor, e: Tensor, graph: Graph) -> Tensor:
        q, k = self.query_key(x + e).view(len(x), 2, self.heads, -1).unbind(1)  # [N, H, D]
        v = self.value(x).view_as(q)
        return self.out(neighborhood_attention(q, k, v, graph).flatten(1))


def pattern(at: Tensor, window: int, size: int, axis: int) -> Graph:
    """Sets of ``size`` voxels at most, of voxels at ``[N, 2]``, all different, along ``axis``."""
    number = (at // window).unique(dim=0, return_inverse=True)[1]  # [N], of a voxel's window
    along, across = (at % window)[:, [axis, 1 - axis]].T
    order = ((number * window + along) * window + across).argsort()
    sizes = number.bincount()
    n, begin = sizes[number], (sizes.cumsum(0) - sizes)[number]
    rank, s = order.argsort() - begin, (n + size - 1) // size
    return groups(number * window**2 + ((rank + 1) * s - 1) // n)


def paper_size() -> tuple[Graph, int, int]:
    """As many pillars as a sweep of Waymo's lidar may fill, drawn, denser near the car."""
    at = torch.randn(30_000, 2, generator=torch.Generator().manual_seed(0)) * 60 + 234
    return pattern(at.long().clamp(0, 467).unique(dim=0), 12, 36, axis=0), 8, 24


if __name__ == "__main__":
    at = torch.cartesian_prod(torch.arange(9), torch.arange(9))
    graph = pattern(at, window=6, size=8, axis=0)
    out = DSVTAttention(32, heads=4)(torch.randn(81, 32), torch.randn(81, 32), graph)
    print(f"DSVT: {graph.num_edges} edges -> {list(out.shape)}")
