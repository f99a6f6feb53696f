"""Linear attention over a batch of graphs of any size, without padding.

    python examples/ragged.py

A classifier of sets: does a graph have a node whose first number is above 2? Attention over the
whole graph is linear in its nodes, and no graph sees another one.
"""

import torch
from torch import nn
from torch.nn.functional import binary_cross_entropy_with_logits

from fastgt import segment_max
from fastgt.nn import LinearAttention


class Classifier(nn.Module):
    def __init__(self, dim: int = 32):
        super().__init__()
        self.embed, self.norm = nn.Linear(4, dim), nn.LayerNorm(dim)
        self.attention = LinearAttention(dim, heads=4)
        self.out = nn.Sequential(nn.Linear(dim, dim), nn.ReLU(), nn.Linear(dim, 1))

    def forward(self, x, offsets):
        x = self.embed(x)
        x = self.norm(x + self.attention(x, offsets))
        return self.out(segment_max(x, offsets))[:, 0]


def batch(graphs: int):
    sizes = torch.randint(1, 60, (graphs,))
    offsets = torch.cat([sizes.new_zeros(1), sizes.cumsum(0)])  # [G + 1]
    x = torch.randn(int(offsets[-1]), 4)
    y = torch.stack([part[:, 0].max() > 2 for part in x.split(sizes.tolist())])
    return x, offsets, y.float()


torch.manual_seed(0)
model = Classifier()
optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
for _ in range(200):
    x, offsets, y = batch(64)
    loss = binary_cross_entropy_with_logits(model(x, offsets), y)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
x, offsets, y = batch(1000)
right = float(((model(x, offsets) > 0) == (y > 0.5)).float().mean())
print(f"{right:.1%} of 1,000 graphs of 1 to 59 nodes are right")
assert right > 0.9
