"""A layer of DeepSets, which a GraphGPS layer takes in the place of attention."""

from __future__ import annotations

from torch import Tensor, nn

from fastgt.nn.sublayers import check_rows, reset_sublayers
from fastgt.ops.checks import check_float, check_offsets, integer
from fastgt.ops.segment_pool import segment_mean, virtual_node


class DeepSets(nn.Module):
    """What a virtual node makes of the mean of its graph, for every node.

    ``y_i = norm(relu(A x_i + B mean_j x_j + b))``, j over all nodes of i's graph, norm a batch
    norm. The authors' code takes the norm over the rows of a padded batch, whose padding is 0 and
    counts; here it is over the nodes.

    Args:
        dim: Width of the input and the output.

    Source:
        Zaheer et al., arXiv 1703.06114, eq. 4, as Cai et al., arXiv 2301.11956, put it into
        GraphGPS.

    Example:
        >>> import torch
        >>> from fastgt.models.deepsets import DeepSets
        >>> DeepSets(64)(torch.randn(10, 64), torch.tensor([0, 3, 10])).shape
        torch.Size([10, 64])
    """

    def __init__(self, dim: int):
        super().__init__()
        self.dim = integer("dim", dim, 1)
        self.own = nn.Linear(dim, dim)
        self.mean = nn.Linear(dim, dim, bias=False)
        self.norm = nn.BatchNorm1d(dim)

    def reset_parameters(self) -> None:
        """Draw every parameter anew."""
        reset_sublayers(self)

    def forward(self, x: Tensor, offsets: Tensor) -> Tensor:
        """x ``[N, dim]``, offsets ``[G + 1]`` -> ``[N, dim]``."""
        check_float("x", x)
        if x.ndim != 2 or x.shape[1] != self.dim:
            raise ValueError(f"x must be [N, {self.dim}], got {list(x.shape)}")
        check_offsets(offsets, len(x), x.device)
        check_rows(self.norm, x, "norm of DeepSets", "node")
        y, _ = virtual_node(self.own(x), self.mean(segment_mean(x, offsets)), offsets)
        return self.norm(y.relu())
