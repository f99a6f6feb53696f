"""A batch norm over the rows of all ranks: ``nn.SyncBatchNorm`` takes no tensors of a CPU."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastgt.distributed.collectives import sum_over_ranks
from fastgt.distributed.group import Group


class RankBatchNorm(nn.BatchNorm1d):
    """``nn.BatchNorm1d`` whose mean and variance are those of all ranks' rows::

        y = (x - mean) / sqrt(var + eps) * weight + bias

    ``[n, C, L]`` has n L rows. Without running statistics, evaluation takes those of all ranks too.
    A rank may have no rows. The sums are taken in float32, or float64, in two passes: first of x,
    then of the squares of ``x - mean``.

    Attributes:
        group: The ranks.

    Raises:
        ValueError: x has another number of channels; or all ranks together have one row, and
            its mean and variance are asked for.

    Source:
        Ioffe and Szegedy, arXiv 1502.03167, algorithm 1.
    """

    group: Group

    def forward(self, x: Tensor) -> Tensor:
        """x ``[n, C]`` or ``[n, C, L]``, of the rank's own rows -> the same shape."""
        if not self.training and self.running_mean is not None:
            return super().forward(x)
        self._check_input_dim(x)
        if x.shape[1] != self.num_features:
            raise ValueError(
                f"a batch norm of {self.num_features} channels got {x.shape[1]}: {list(x.shape)}"
            )
        over, one = (0,) if x.ndim == 2 else (0, 2), (-1, *[1] * (x.ndim - 2))
        rows = len(x) * x.shape[2:].numel()
        count = int(self.group.sum(x.new_tensor([rows], dtype=torch.int64)))
        if count == 1:
            raise ValueError("a batch norm in training got 1 row in all processes together")
        if count == 0:  # as of graphs without edges: there is no mean, and nothing to track
            return super().forward(x)
        wide = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
        mean = sum_over_ranks(wide.sum(over), self.group) / count
        centred = wide - mean.view(one)
        square = sum_over_ranks(centred.square().sum(over), self.group) / count
        if self.training and self.track_running_stats:
            self._track(mean.detach(), square.detach() * (count / (count - 1)))
        out = centred * torch.rsqrt(square + self.eps).view(one)
        if self.affine:
            out = out * self.weight.view(one) + self.bias.view(one)
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
