"""P2AT: Pyramid Pooling Axial Transformer for Segmentation, Elhassan et al., arXiv 2310.15025.

Features are averaged over each row and each column of pixels. Rows attend to rows and columns to
columns, with e and f learnt at 16 places and interpolated. Pixels (r, c) get both back:

    row_r  = softmax_s((mean_c q_rc + e_r) . (mean_c k_sc + f_s) / sqrt(D)) mean_c v_sc
    out_rc = proj(v_rc + encode_row(row_r) + encode_column(column_c))

A line of pixels is one node, and an image has two complete graphs. Attention of every pixel along
its lines is another pattern, `fastgt.patterns.axial`. Kept: encode_row has a norm and a PReLU,
encode_column neither. For one image, 23 and 30 nodes, two dense calls are as good.
"""

import torch
from torch import nn
from torch.nn.functional import interpolate

from fastgt import Graph, global_attention

PATTERN = "rows to rows and columns to columns of an image, averaged first"
OPERATOR = "global_attention"


def pointwise(dim, out, act=False):
    extra = (nn.BatchNorm1d(out), nn.PReLU(out)) if act else ()
    return nn.Sequential(nn.Linear(dim, out, bias=False), *extra)


class P2ATAttention(nn.Module):
    def __init__(self, dim=64, heads=8, key_dim=16, value_dim=32):
        super().__init__()
        self.heads, keys, values = heads, heads * key_dim, heads * value_dim
        self.q, self.k, self.v = pointwise(dim, keys), pointwise(dim, keys), pointwise(dim, values)
        self.places = nn.Parameter(torch.randn(2, 2, keys, 16))  # of q and k; of rows and columns
        self.encode_row, self.proj = (pointwise(values, n, act=True) for n in (values, dim))
        self.encode_column = pointwise(values, values)

    def forward(self, x):  # [B, height, width, dim]
        B, *sides = shape = x.shape[:3]
        q, k, v = (f(x.flatten(0, 2)).view(*shape, -1) for f in (self.q, self.k, self.v))
        q, k, u = (
            torch.cat([t.mean(2), t.mean(1)], 1) for t in (q, k, v)
        )  # [B, rows + columns, .]
        at = [interpolate(self.places[:, a], n, mode="linear") for a, n in enumerate(sides)]
        e, f = torch.cat(at, 2).transpose(1, 2)
        lines = (t.flatten(0, 1).unflatten(1, (self.heads, -1)) for t in (q + e, k + f, u))
        ends = torch.tensor([0, *sides * B]).cumsum(0)
        rows, columns = global_attention(*lines, ends).view(B, sum(sides), -1).split(sides, 1)
        rows = self.encode_row(rows.flatten(0, 1)).view(B, sides[0], 1, -1)
        columns = self.encode_column(columns.flatten(0, 1)).view(B, 1, sides[1], -1)
        return self.proj((v + rows + columns).flatten(0, 2)).view(x.shape)


def paper_size():
    """CamVid, 720 x 960 pixels at a stride of 32: 23 rows and 30 columns; 8 heads of 16."""
    return Graph.complete(torch.tensor([0, 23, 53])), 8, 16


if __name__ == "__main__":
    y = P2ATAttention(32, 4, 8, 16)(torch.randn(2, 5, 7, 32))
    print(f"P2AT: {2 * (5**2 + 7**2)} pairs of lines, output {list(y.shape)}")
