"""SAN's learnt encoding, and GraphGPS's: a Transformer over the Laplacian eigenvectors of a node.

    t_ik = W (u_ki, lambda_k) + b                          over the eigenvectors u_k of i's graph
    t'_i = TransformerEncoder(t_i)
    pe_i = sum_k t'_ik

The encoder is PyTorch's, post-norm: ``norm(t + MHA(t))``, then ``norm(t + W_2 relu(W_1 t))``. The
authors' layers all begin with the same weights, those here with their own.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastgt.encodings import flip_signs
from fastgt.graph import Graph
from fastgt.models.graph_gps_encoders import eigenpairs
from fastgt.models.graph_gps_layer import GlobalAttention
from fastgt.nn.sublayers import reset_sublayers
from fastgt.ops.checks import integer


class SpectralEncoder(nn.Module):
    """Attention of a node's entries in the eigenvectors over each other, and their sum.

    NaN stands for an eigenvector that a small graph does not have: it is attended to by none and
    adds nothing. In training every eigenvector gets one random sign for the whole batch.

    Args:
        count: Eigenvectors K.
        dim: Width of the encoding.
        heads: Divides ``dim``.
        layers: Of the encoder.
        hidden_dim: Width within its feed-forward; PyTorch's default, as in the authors' code.
        dropout: Likewise.

    Source:
        Kreuzer et al., arXiv 2106.03893, section 4.2, with the authors' code; GraphGPS's
        ``LapPENodeEncoder`` is the same.

    Example:
        >>> import torch
        >>> from fastgt import Graph
        >>> from fastgt.models.spectral_encoder import SpectralEncoder
        >>> graph = Graph.from_edge_index(torch.tensor([[0, 1], [1, 0]]), 3)
        >>> SpectralEncoder(10, 8, heads=4)(torch.randn(3, 10), torch.rand(1, 10), graph).shape
        torch.Size([3, 8])
    """

    def __init__(
        self,
        count: int,
        dim: int,
        *,
        heads: int = 4,
        layers: int = 2,
        hidden_dim: int = 2048,
        dropout: float = 0.1,
    ):
        super().__init__()
        self.count, self.dim = integer("count", count, 1), integer("dim", dim, 1)
        self.lin = nn.Linear(2, dim)
        self.layers = nn.ModuleList(
            _EncoderLayer(dim, heads, hidden_dim, dropout)
            for _ in range(integer("layers", layers, 1))
        )

    def reset_parameters(self) -> None:
        """Draw every parameter anew."""
        reset_sublayers(self)

    def forward(self, vectors: Tensor, values: Tensor, graph: Graph) -> Tensor:
        """Eigenvectors ``[N, K]``, eigenvalues ``[G, K]`` -> ``[N, dim]``."""
        if self.training:
            vectors = flip_signs(vectors)
        n, k = graph.num_rows, self.count
        pairs, absent = eigenpairs(vectors, values, graph, k, self.lin.weight)
        pairs, absent = pairs.flatten(0, 1), absent.flatten()
        x = self.lin(pairs)
        # every node's tokens are a graph of their own
        offsets = k * torch.arange(n + 1, device=x.device)
        bias = x.new_zeros(absent.shape).masked_fill(absent, -torch.inf)[:, None]
        for layer in self.layers:
            x = layer(x, offsets, bias)
        return x.masked_fill(absent[:, None], 0).unflatten(0, (n, k)).sum(1)


class _EncoderLayer(nn.Module):
    """``torch.nn.TransformerEncoderLayer``, for tokens in ragged groups."""

    def __init__(self, dim: int, heads: int, hidden_dim: int, dropout: float):
        super().__init__()
        self.attention = GlobalAttention(dim, heads, dropout=dropout)
        self.dropout = nn.Dropout(dropout)
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.ffn = nn.Sequential(
            nn.Linear(dim, hidden_dim),
            nn.ReLU(),
            nn.Dropout(dropout),
            nn.Linear(hidden_dim, dim),
            nn.Dropout(dropout),
        )

    def reset_parameters(self) -> None:
        """Draw every parameter anew."""
        reset_sublayers(self)

    def forward(self, x: Tensor, offsets: Tensor, bias: Tensor) -> Tensor:
        """x ``[T, dim]``, offsets ``[N + 1]``, bias ``[T, 1]`` of keys -> ``[T, dim]``."""
        bias = bias.expand(-1, self.attention.heads)
        x = self.norm1(x + self.dropout(self.attention(x, offsets, bias=bias)))
        return self.norm2(x + self.ffn(x))
