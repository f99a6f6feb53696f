"""FlatFormer's attention in groups of equal size (Liu et al., arXiv 2301.08739, section 3).

Voxels are sorted by window and, inside, by x or y. Each G of them in a row are a group::

    out_i = W_o sum_j softmax_j((x_i + e_i) W_q . (x_j + e_j) W_k / sqrt(d)) W_v x_j

j is in the group of i. Where G does not divide N, the released code fills the last group up with
voxels of the one before it, without a mask: the last N mod G voxels attend to the last G of all.
That is kept. The released code also walks to and fro through windows; here they are sorted.

Groups need no index of pairs: ``global_attention`` takes them as a ragged batch. As equal, dense
problems they suit PyTorch's attention as well.
"""

import torch
from torch import Tensor, nn

from fastgt import Graph, global_attention

PATTERN = "groups of 69 voxels in the order of windows of 9 x 9"
OPERATOR = "global_attention"


class FlatFormerAttention(nn.Module):
    """x ``[N, C]``, voxels, and e ``[N, C]``, of their positions -> ``[N, C]``."""

    def __init__(self, dim: int, heads: int, group: int):
        super().__init__()
        self.heads, self.group = heads, group
        self.query_key, self.value = nn.Linear(dim, 2 * dim), nn.Linear(dim, dim)
        self.out = nn.Linear(dim, dim)

    def forward(self, x: Tensor, e: Tensor, order: Tensor) -> Tensor:
        """order ``[N]``: which voxel stands at each place."""
        q, k = self.query_key(x + e).view(len(x), 2, self.heads, -1).unbind(1)  # [N, H, D]
        offsets, key_offsets, keys = (t.to(x.device) for t in groups(len(x), self.group))
        at, v = order[keys], self.value(x).view_as(q)
        out = global_attention(q[order], k[at], v[at], offsets, key_offsets=key_offsets)
        return self.out(out[order.argsort()].flatten(1))


def sort(at: Tensor, window: int, axis: int) -> Tensor:
    """The order of voxels at ``[N, 2]``, all different, by window and then along ``axis``."""
    number = (at // window).unique(dim=0, return_inverse=True)[1]
    along, across = (at % window)[:, [axis, 1 - axis]].T
    return ((number * window + along) * window + across).argsort()


def groups(n: int, size: int) -> tuple[Tensor, Tensor, Tensor]:
    """-> where groups end among the queries, among the keys, and at which places these stand."""
    begin = list(range(0, n, size))
    keys = torch.cat([torch.arange(begin[-1]), torch.arange(max(0, n - size), n)])
    return torch.tensor([*begin, n]), torch.tensor([*begin, len(keys)]), keys


def paper_size() -> tuple[Graph, int, int]:
    """As many pillars as a sweep of Waymo's lidar may fill, drawn, denser near the car."""
    at = torch.randn(30_000, 2, generator=torch.Generator().manual_seed(0)) * 60 + 234
    n = len(at.long().clamp(0, 467).unique(dim=0))
    return Graph.complete(*groups(n, 69)[:2]), 8, 16


if __name__ == "__main__":
    at = torch.cartesian_prod(torch.arange(9), torch.arange(9))
    block = FlatFormerAttention(32, heads=4, group=20)
    out = block(torch.randn(81, 32), torch.randn(81, 32), sort(at, window=3, axis=0))
    print(f"FlatFormer: 81 voxels in groups of 20 -> {list(out.shape)}")
