"""A codebook that follows the nodes it is shown by exponential moving averages."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor, nn

from fastgt.nn.sublayers import check_rows, reset_sublayers
from fastgt.ops.checks import readable, without_autocast

EPS = 1e-5  # of the smoothing, and of the batch norm


class Codebook(nn.Module):
    """M centroids of vectors that a batch norm without parameters makes even.

    In training a batch ``x_b`` of B rows moves them. For ``z = norm(x)``, ``c_b`` the centroid
    nearest to ``z_b`` and ``n_m`` how many rows have m as theirs::

        size_m  <- decay size_m + (1 - decay) n_m
        size_m  <- (size_m + eps) / (sum size + M eps) sum size
        total_m <- decay total_m + (1 - decay) sum_{b: c_b = m} z_b
        centroid_m = total_m / size_m

    The first M rows of the first batches are the first centroids, each with a size of 1; until
    then a centroid has no node. In the released code all begin as noise with a size of 0. What no
    row of the first batch is near to is then divided by about 1e-5, and stays so far away that no
    node comes to it again.

    Nothing here is a parameter: all is in the ``state_dict``, and no gradient reaches it. As in a
    batch norm, a forward that runs twice moves it twice.

    Args:
        centroids: M.
        dim: Width of x.
        decay: Of the averages.

    Source:
        van den Oord et al., arXiv 1711.00937, appendix A.1; Kong et al., GOAT, ICML 2023, and
        their code, which Dwivedi et al., arXiv 2312.11109, take over.
    """

    size: Tensor
    total: Tensor
    centroids: Tensor
    begun: Tensor

    def __init__(self, centroids: int, dim: int, decay: float = 0.99):
        super().__init__()
        self.decay = decay
        self.norm = nn.BatchNorm1d(dim, eps=EPS, affine=False)
        self.register_buffer("size", torch.empty(centroids))
        self.register_buffer("total", torch.empty(centroids, dim))
        self.register_buffer("centroids", torch.empty(centroids, dim))
        self.register_buffer("begun", torch.empty((), dtype=torch.int64))
        self._empty()

    def reset_parameters(self) -> None:
        """Forget every centroid."""
        reset_sublayers(self)
        self._empty()

    def _empty(self) -> None:
        for x in (self.size, self.total, self.centroids, self.begun):
            x.zero_()

    def forward(self) -> Tensor:
        """The centroids as vectors like x: ``[M, dim]``."""
        mean, variance = self.norm.running_mean, self.norm.running_var
        assert mean is not None
        assert variance is not None
        return self.centroids * (variance + EPS).sqrt() + mean

    @torch.no_grad()
    def update(self, x: Tensor) -> Tensor:
        """x ``[B, dim]`` -> the centroid of each row, ``[B]`` int64; in training they move too."""
        with without_autocast(x.device.type):
            check_rows(self.norm, x, "norm of Codebook", "node")
            z = self.norm(x.to(self.centroids.dtype))
            if self.training:
                self._begin(z)
            distance = self.centroids.square().sum(1) - 2 * (z @ self.centroids.T)  # less |z|^2
            number = torch.arange(len(self.size), device=x.device)
            nearest = distance.masked_fill(number >= self.begun, torch.inf).argmin(1)
            if self.training:
                self._move(z, nearest, number < self.begun)
        return nearest

    def _begin(self, z: Tensor) -> None:
        """Rows become the centroids that there are not yet."""
        full = readable(self.begun) and int(self.begun) == len(self.size)
        if len(z) < len(self.size) and not full:
            warnings.warn(
                f"the codebook has {len(self.size)} centroids and the batch {len(z)} nodes: no "
                "step moves more centroids than it has nodes, and the first steps fill it",
                stacklevel=4,
            )
        place = torch.arange(len(self.size), device=z.device) - self.begun
        fresh = (place >= 0) & (place < len(z))
        rows = z[place.clamp(0, len(z) - 1)]
        self.size.copy_(torch.where(fresh, 1.0, self.size))
        for x in (self.total, self.centroids):
            x.copy_(torch.where(fresh[:, None], rows, x))
        self.begun.copy_((self.begun + len(z)).clamp(max=len(self.size)))

    def _move(self, z: Tensor, nearest: Tensor, begun: Tensor) -> None:
        count = torch.zeros_like(self.size).index_add_(0, nearest, z.new_ones(len(z)))
        size = self.decay * self.size + (1 - self.decay) * count
        whole = size.sum()
        smooth = (size + EPS) / (whole + len(size) * EPS) * whole
        self.size.copy_(torch.where(begun, smooth, 0.0))
        moved = torch.zeros_like(self.total).index_add_(0, nearest, z)
        self.total.copy_(self.decay * self.total + (1 - self.decay) * moved)
        found = self.total / self.size[:, None]
        self.centroids.copy_(torch.where(begun[:, None], found, self.centroids))
