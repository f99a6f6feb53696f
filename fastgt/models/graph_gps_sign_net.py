"""SignNet for a GraphGPS model: an encoder of eigenvectors whose signs make no difference.

    y_k = phi(u_k) + phi(-u_k)    for each eigenvector u_k, over the edges of the graph
    p_i = rho(concat_k y_ki),     or rho(sum_k y_ki) over the eigenvectors that the graph has

phi is a GIN of one input channel: x <- MLP(norm(x) + sum_j norm(x)_j), without a norm before the
first layer. In an MLP a norm follows each activation.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from fastgt.graph import Graph
from fastgt.models.graph_gps_encoders import check_matrix
from fastgt.models.graph_transformer import check_dtype
from fastgt.nn.sublayers import check_rows, reset_sublayers
from fastgt.ops.aggregate import aggregate

SignNetKind = Literal["mlp", "deepset"]


class SignNet(nn.Module):
    """The encoder of the equations above, for ``"mlp"`` and ``"deepset"``.

    Norms are batch norms, over nodes and eigenvectors in phi. u and -u share one batch: in the
    authors' code each has statistics of its own, so that in training the signs make a difference.
    There and here NaN counts as an eigenvector of zeros, which ``"deepset"`` leaves out of the sum.

    Args:
        count: Eigenvectors of a node.
        dim: Width of what is made of them.
        kind: Which of the two.
        layers: Of phi, 2 at least.
        hidden, out: Widths of phi within and after its last layer.
        rho_layers: Linear ones of rho.

    Source:
        Lim et al., arXiv 2202.13013, eq. 5, as in GraphGPS's ``SignNetNodeEncoder``.

    Example:
        >>> import torch
        >>> from fastgt import Graph
        >>> from fastgt.models.graph_gps_sign_net import SignNet
        >>> graph = Graph.from_edge_index(torch.tensor([[0, 1, 1, 2], [1, 0, 2, 1]]))
        >>> net, u = SignNet(2, 8, kind="mlp").double(), torch.randn(3, 2).double()
        >>> torch.allclose(net(u, graph), net(u * torch.tensor([1, -1]), graph))
        True
    """

    def __init__(
        self,
        count: int,
        dim: int,
        *,
        kind: SignNetKind,
        layers: int = 8,
        hidden: int = 64,
        out: int = 4,
        rho_layers: int = 2,
    ):
        super().__init__()
        if kind not in ("mlp", "deepset"):
            raise ValueError(f"kind must be 'mlp' or 'deepset', got {kind!r}")
        if layers < 2:
            raise ValueError(f"layers must be 2 at least, got {layers}")
        self.count, self.kind = count, kind
        widths = [1, *[hidden] * (layers - 1), out]
        self.phi = nn.ModuleList(
            _perceptron(widths[i], hidden, widths[i + 1], 2) for i in range(layers)
        )
        self.norms = nn.ModuleList(nn.BatchNorm1d(hidden) for _ in range(layers - 1))
        self.rho = _perceptron(count * out if kind == "mlp" else out, hidden, dim, rho_layers)

    def reset_parameters(self) -> None:
        """Draw every parameter anew."""
        reset_sublayers(self)

    def forward(self, vectors: Tensor, graph: Graph) -> Tensor:
        """``[N, count]``, NaN for an eigenvector that a graph does not have -> ``[N, dim]``."""
        k = self.count
        check_matrix("lap_vectors", vectors, f"N, {k}", (graph.num_rows, k))
        check_dtype("lap_vectors", vectors, next(self.parameters()))
        check_rows(self.rho, vectors, "norm of SignNet", "node")
        u = vectors.nan_to_num(nan=0.0)
        x = torch.cat([u, -u], 1)[..., None]  # [N, 2 k, 1]
        for i, mlp in enumerate(self.phi):
            if i:
                x = _on_rows(self.norms[i - 1], x)
            x = _on_rows(mlp, x + aggregate(x, graph))
        y = x[:, :k] + x[:, k:]
        if self.kind == "mlp":
            return self.rho(y.flatten(1))
        return self.rho(y.masked_fill(vectors.isnan()[..., None], 0).sum(1))


def _on_rows(layer: nn.Module, x: Tensor) -> Tensor:
    """A layer of ``[rows, channels]`` on ``[N, eigenvectors, channels]``."""
    return layer(x.flatten(0, 1)).unflatten(0, x.shape[:2])


def _perceptron(width: int, hidden: int, out: int, layers: int) -> nn.Sequential:
    parts: list[nn.Module] = []
    for _ in range(layers - 1):
        parts += [nn.Linear(width, hidden), nn.ReLU(), nn.BatchNorm1d(hidden)]
        width = hidden
    return nn.Sequential(*parts, nn.Linear(width, out))
