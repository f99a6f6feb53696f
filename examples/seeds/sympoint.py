"""SymPoint: Symbol as Points, panoptic symbol spotting in drawings, Liu et al., arXiv 2401.10556.

Lines, arcs and circles of a drawing are points. A primitive attends to the 16 nearest and to those
whose ends touch its own, in one neighbourhood, channel by channel: the equations stand at
`fastgt.models.SymPointAttention`. The block is Point Transformer's:

    y   = relu(norm(W_1 x))
    z   = relu(norm(attention(y, p)))
    out = relu(x + norm(W_2 z))

Channels s C / 8 + c of all 8 planes s share the weight c ("share_planes = 8"). So the operator is
`channelwise_attention` with logits `[E, C / 8]`, expanded to `[E, 8, C / 8]` without a copy.

Mended: the released code left the connections out. It fills drawings up to 2,048 points, all at
one place, which others may attend to. Dense attention has no weights of channels.
"""

import torch
from torch import nn

from fastgt.models import SymPointAttention, connected_neighbors

PATTERN = "16 nearest primitives and those joined with it"
OPERATOR = "channelwise_attention"


class SymPointBlock(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.before = nn.Sequential(nn.Linear(dim, dim, bias=False), nn.BatchNorm1d(dim), nn.ReLU())
        self.attention = SymPointAttention(dim)
        self.after = nn.Sequential(
            nn.BatchNorm1d(dim), nn.ReLU(), nn.Linear(dim, dim, bias=False), nn.BatchNorm1d(dim)
        )

    def forward(self, x, position, graph):  # x [N, dim], position [N, 2]
        return (x + self.after(self.attention(self.before(x), position, graph))).relu()


def boxes(count, side, generator=None):
    """Ends [4 count, 2, 2] of the sides of so many boxes, somewhere on a sheet."""
    corner = 1000 * torch.rand(count, 1, 2, generator=generator)
    around = side * torch.tensor([[0, 0], [1, 0], [1, 1], [0, 1]]) + corner
    return torch.stack([around, around.roll(-1, 1)], 2).flatten(0, 1)


def paper_size():
    """A drawing of 2,048 lines; the first stage has 8 planes of 8 channels."""
    ends = boxes(512, 200, torch.Generator().manual_seed(0))
    return connected_neighbors(ends, 16), 8, 8


if __name__ == "__main__":
    ends = boxes(20, 50)
    graph = connected_neighbors(ends, 16)
    y = SymPointBlock(32)(torch.randn(80, 32), ends.mean(1), graph)
    print(f"SymPoint: {graph.num_edges} edges, output {list(y.shape)}")
