"""An edge term of one's own: distances of points in the logits, with gradients to the points.

    python examples/edge_term.py

What an edge adds to a logit is a tensor ``[E, H]`` that PyTorch made, so any function of both ends
can be one. Here each head learns how fast its attention falls with the distance.
"""

import torch
from torch import nn

from fastgt import neighborhood_attention
from fastgt.patterns import knn


class DistanceAttention(nn.Module):
    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.heads, self.qkv = heads, nn.Linear(dim, 3 * dim)
        self.decay = nn.Parameter(torch.zeros(heads))

    def forward(self, x, points, graph):
        q, k, v = self.qkv(x).unflatten(1, (3, self.heads, -1)).unbind(1)
        source, target = graph.edge_index
        square = (points[source] - points[target]).square().sum(1)  # [E]
        edge_bias = -square[:, None] * self.decay.exp()  # [E, H]
        return neighborhood_attention(q, k, v, graph, edge_bias=edge_bias).flatten(1)


torch.manual_seed(0)
points = torch.rand(500, 3, requires_grad=True)
graph = knn(points.detach(), 16)
x = torch.randn(500, 32)
target = torch.randn(500, 32)
layer = DistanceAttention(32, heads=4)
optimizer = torch.optim.Adam(layer.parameters(), lr=1e-2)
for step in range(1, 51):
    loss = (layer(x, points, graph) - target).square().mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    if step in (1, 50):
        print(f"step {step}: loss {loss.item():.4f}")
print(f"decays {[round(d, 2) for d in layer.decay.exp().tolist()]}")
print(f"gradients reach the points: {bool(points.grad.abs().sum() > 0)}")
