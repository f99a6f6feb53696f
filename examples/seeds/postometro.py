"""PostoMETRO (Yang et al., arXiv 2403.12473): joints and vertices ask the image and its 2-D pose.

A layer of the decoder. u are tokens of joints and of mesh vertices, y tokens of the image followed
by tokens of a quantised 2-D pose::

    u = LN(u + attention(u, u))     a joint reads all; a vertex all joints, and its mesh neighbours
    u = LN(u + attention(u, y))     all of them read all of y

A vertex has about 6 neighbours, so the first step has a thirteenth of all pairs. The second one
leaves none out: ``global_attention`` needs no edges for it, and no padding of shorter poses.

No code was released. The first step's mask is that of FastMETRO (arXiv 2207.13820), whose
decoder has the same tokens; positions and MLPs are left out.
"""

import torch
from torch import Tensor, nn

from fastgt import Graph, global_attention, neighborhood_attention

PATTERN = "joints to all, vertices to joints and neighbours; all to image and pose tokens"
OPERATOR = "neighborhood_attention"


class PostoMETROLayer(nn.Module):
    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv, self.out_own = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.q, self.kv, self.out = (nn.Linear(dim, width) for width in (dim, 2 * dim, dim))
        self.norm_own, self.norm = nn.LayerNorm(dim), nn.LayerNorm(dim)

    def forward(self, u: Tensor, y: Tensor, graph: Graph, offsets: Tensor) -> Tensor:
        """u ``[N, dim]``, y ``[M, dim]`` with offsets ``[G + 1]`` -> ``[N, dim]``."""
        q, k, v = self.qkv(u).unflatten(1, (3, self.heads, -1)).unbind(1)
        u = self.norm_own(u + self.out_own(neighborhood_attention(q, k, v, graph).flatten(1)))
        q = self.q(u).unflatten(1, (self.heads, -1))
        k, v = self.kv(y).unflatten(1, (2, self.heads, -1)).unbind(1)
        attended = global_attention(q, k, v, graph.graph_ptr, key_offsets=offsets)
        return self.norm(u + self.out(attended.flatten(1)))


def body(joints: int, mesh: Tensor) -> Graph:
    """Joints, then the vertices of a mesh: pairs ``[2, E]`` of neighbours, in both directions."""
    vertices = int(mesh.max()) + 1
    allowed = torch.ones(joints + vertices, joints + vertices, dtype=torch.bool)
    allowed[joints:, joints:] = torch.eye(vertices, dtype=torch.bool)
    allowed[joints + mesh[0], joints + mesh[1]] = True
    return Graph.from_dense(allowed)


def paper_size() -> tuple[Graph, int, int]:
    """14 joints and 431 vertices, 8 heads of 64; a torus of 6 neighbours a vertex for a body."""
    i = torch.arange(431).repeat(6)
    step = torch.tensor([-21, -20, -1, 1, 20, 21]).repeat_interleave(431)
    return body(14, torch.stack([i, (i + step) % 431])), 8, 64


if __name__ == "__main__":
    graph = Graph.batch([body(3, torch.tensor([[0, 1, 1, 2], [1, 0, 2, 1]]))] * 2)
    u, y, offsets = torch.randn(12, 32), torch.randn(23, 32), torch.tensor([0, 11, 23])
    print("PostoMETRO:", tuple(PostoMETROLayer(32, heads=4)(u, y, graph, offsets).shape))
