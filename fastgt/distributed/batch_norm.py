"""A batch norm over the rows of all ranks: ``nn.SyncBatchNorm`` takes no tensors of a CPU."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastgt.distributed.collectives import sum_over_ranks
from fastgt.distributed.group import Group


class RankBatchNorm(nn.BatchNorm1d):
    """``nn.BatchNorm1d`` whose mean and variance are those of all ranks' rows::

        y = (x - mean) / sqrt(var + eps) * weight + bias

    A rank may have no rows. The sums are taken in float32, or float64, in two passes: first of x,
    then of the squares of ``x - mean``.

    Attributes:
        group: The ranks.

    Raises:
        ValueError: In training all ranks together have one row.

    Source:
        Ioffe and Szegedy, arXiv 1502.03167, algorithm 1.
    """

    group: Group

    def forward(self, x: Tensor) -> Tensor:
        """x ``[n, C]``, of the rank's own rows -> the same shape."""
        if not self.training:
            return super().forward(x)
        count = float(self.group.sum(x.new_tensor([x.shape[0]], dtype=torch.float32)))
        if count == 1:
            raise ValueError("a batch norm in training got 1 row in all processes together")
        if count == 0:  # as of graphs without edges: there is no mean, and nothing to track
            return super().forward(x)
        wide = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
        mean = sum_over_ranks(wide.sum(0), self.group) / count
        centred = wide - mean
        square = sum_over_ranks(centred.square().sum(0), self.group) / count
        if self.track_running_stats:
            self._track(mean.detach(), square.detach() * (count / (count - 1)))
        out = centred * torch.rsqrt(square + self.eps)
        if self.affine:
            out = out * self.weight + self.bias
        return out.to(x.dtype)

    @torch.no_grad()
    def _track(self, mean: Tensor, variance: Tensor) -> None:
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        self.num_batches_tracked += 1
        share = self.momentum
        if share is None:
            share = 1 / float(self.num_batches_tracked)
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), share)
        self.running_var.lerp_(variance.to(self.running_var.dtype), share)
