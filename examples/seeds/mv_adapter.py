"""MV-Adapter (Huang et al., arXiv 2412.03632): a row of pixels reads that row in all views.

Two attentions stand beside the self-attention of a frozen image model, all on the same input x,
with r the features of a reference image::

    out_i = x_i + self(x_i; pixels of the view) + rows(x_i; pixels of the row in all views)
                + reference(x_i; pixels of r)

An object with V views of h x w has h groups of V w pixels: h (V w)^2 pairs, not (V h w)^2. Objects
may have different numbers of views: groups lie one after another, by offsets.

Mended: the released code repeats keys and values of a row V times, for the queries of each view.
Here all views of a row ask together, which gives the same.
"""

import torch
from torch import Tensor, nn

from fastgt import Graph, global_attention

PATTERN = "every pixel to its view, to its row in all views, and to all pixels of a reference"
OPERATOR = "global_attention"


class MVAdapterAttention(nn.Module):
    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.heads = heads
        self.q, self.kv, self.out = (
            nn.ModuleList(nn.Linear(dim, width, bias=bias) for _ in range(3))
            for width, bias in ((dim, False), (2 * dim, False), (dim, True))
        )

    def forward(self, x: Tensor, r: Tensor, views: Tensor, shape: tuple[int, int]) -> Tensor:
        """x ``[N, dim]``, r ``[G n, dim]``, views ``[G]`` of h x w pixels -> ``[N, dim]``."""
        pixels, graphs = shape[0] * shape[1], torch.arange(len(views) + 1, device=x.device)
        of_views = torch.arange(len(x) // pixels + 1, device=x.device) * pixels
        of_objects = torch.cat([views.new_zeros(1), views.cumsum(0)]) * pixels
        order, of_rows = rows_of(views, *shape)
        out = x + self.part(0, x, x, of_views, of_views)
        out = out.index_add(0, order, self.part(1, x[order], x[order], of_rows, of_rows))
        return out + self.part(2, x, r, of_objects, graphs * (len(r) // len(views)))

    def part(self, i: int, x: Tensor, y: Tensor, *ends: Tensor) -> Tensor:
        q = self.q[i](x).unflatten(1, (self.heads, -1))
        k, v = self.kv[i](y).unflatten(1, (2, self.heads, -1)).unbind(1)
        attended = global_attention(q, k, v, ends[0], key_offsets=ends[1])
        return self.out[i](attended.flatten(1))


def rows_of(views: Tensor, height: int, width: int) -> tuple[Tensor, Tensor]:
    """An order of pixels by object, row, view and column, and the boundaries of the rows."""
    objects = torch.arange(len(views), device=views.device)
    objects = objects.repeat_interleave(views * (height * width))
    row = torch.arange(len(objects), device=views.device) // width % height
    sizes = torch.cat([views.new_zeros(1), (views * width).repeat_interleave(height)])
    return (objects * height + row).argsort(stable=True), sizes.cumsum(0)


def paper_size() -> tuple[Graph, int, int]:
    """SDXL at 768 pixels, where attention begins: 6 views of 48 x 48; 10 heads of 64."""
    return Graph.complete(torch.arange(49) * (6 * 48)), 10, 64


if __name__ == "__main__":
    x, r, views = torch.randn(5 * 12, 32), torch.randn(2 * 12, 32), torch.tensor([2, 3])
    print("MV-Adapter:", tuple(MVAdapterAttention(32, heads=4)(x, r, views, (3, 4)).shape))
