"""HoT (Li et al., arXiv 2311.12028): few frames are computed, and all of them are recovered.

After some blocks only T of F frames are kept, the centres of clusters by density peaks. After the
last block, a learned token for each frame asks those that are left::

    rho_i   = exp(-mean of the k smallest d_ij^2),   d_ij = |x_i - x_j| / sqrt(dim)
    delta_i = min d_ij over rho_j > rho_i;  the largest d, where there is none
    kept    = the T frames of the largest rho_i delta_i, in order
    out_f   = e_f + W softmax_j(W_q e_f . W_k y_j / sqrt(D)) W_v y_j

All frames ask all T kept ones, and clips have one length: take scaled_dot_product_attention.

Mended: the released code adds noise to rho, so that two runs keep other frames. Ties go to the
first frame here.
"""

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from fastgt import Graph

PATTERN = "a learned token for each frame to all kept frames of its clip"
OPERATOR = "scaled_dot_product_attention"


class HoTRecovery(nn.Module):
    def __init__(self, dim: int, heads: int, frames: int):
        super().__init__()
        self.heads, self.tokens = heads, nn.Parameter(torch.randn(frames, dim) * 0.02)
        self.q, self.kv, self.out = (nn.Linear(dim, width) for width in (dim, 2 * dim, dim))

    def forward(self, y: Tensor) -> Tensor:
        """y ``[G, T, dim]`` -> ``[G, F, dim]``."""
        q = self.q(self.tokens).unflatten(1, (self.heads, -1)).transpose(0, 1)  # [H, F, D]
        k, v = self.kv(y).unflatten(2, (2, self.heads, -1)).permute(2, 0, 3, 1, 4)
        out = scaled_dot_product_attention(q.expand(len(y), -1, -1, -1), k, v)
        return self.tokens + self.out(out.transpose(1, 2).flatten(2))


@torch.no_grad()
def kept_frames(x: Tensor, frames: int, *, nearest: int = 2) -> Tensor:
    """Numbers ``[G, T]`` of the frames to keep of ``[G, F, dim]``."""
    d = torch.cdist(x, x) / x.shape[2] ** 0.5
    rho = (-d.topk(nearest, largest=False).values.square().mean(2)).exp()
    denser, largest = rho[:, None] > rho[:, :, None], d.amax((1, 2), keepdim=True)
    delta = torch.where(denser, d, largest).amin(2)
    order = (rho * delta).argsort(dim=1, descending=True, stable=True)
    return order[:, :frames].sort().values


def paper_size() -> tuple[Graph, int, int]:
    """MixSTE with 243 frames, of which 81 are kept: one joint, 8 heads of 64."""
    return Graph.complete(torch.tensor([0, 243]), torch.tensor([0, 81])), 8, 64


if __name__ == "__main__":
    x = torch.randn(2, 27, 32)
    y = x.take_along_dim(kept_frames(x, 9)[..., None], 1)
    print("HoT:", tuple(y.shape), "to", tuple(HoTRecovery(32, heads=4, frames=27)(y).shape))
