"""What stands before the layers of a GraphGPS model, and its head after them.

    x_i = concat(node_i, DeepSet_i, W BatchNorm(walk_i))
    DeepSet_i = sum_k phi(u_ki, lambda_k)    over the eigenvectors u_k that the graph has

In the place of the DeepSet there may be a Transformer (spectral_encoder.py) or SignNet
(graph_gps_sign_net.py), and beside walks the heat kernel and electrostatics. node_i is a sum of
embeddings, or linear. With stable encodings p_i = W u_i there is no more in x_i than node_i, and
p_i goes into the factors of edges.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastgt.encodings import flip_signs
from fastgt.graph import Graph
from fastgt.models.graph_gps_local import Activation, make_activation
from fastgt.models.graph_transformer import check_dtype, check_types
from fastgt.nn.sublayers import check_rows, reset_sublayers
from fastgt.ops.checks import check_float
from fastgt.ops.segment_pool import segment_max, segment_mean, segment_sum

Head = Literal["san_graph", "inductive_node", "default"]
Pooling = Literal["add", "mean", "max"]
_POOLING = {"add": segment_sum, "mean": segment_mean, "max": segment_max}


class TypeEncoder(nn.Module):
    """A sum of embeddings, one for each column of types.

    Args:
        kinds: How many there are in every column.
        dim: Width of the sum.
    """

    def __init__(self, kinds: Sequence[int], dim: int):
        super().__init__()
        self.kinds = tuple(kinds)
        self.embed = nn.ModuleList(nn.Embedding(n, dim) for n in self.kinds)

    def reset_parameters(self) -> None:
        """Draw every parameter anew."""
        reset_sublayers(self)

    def forward(self, name: str, types: Tensor, letter: str, size: int, graph: Graph) -> Tensor:
        """Types ``[size]`` of one column, or ``[size, columns]`` -> ``[size, dim]``."""
        columns = len(self.kinds)
        if columns == 1:
            types = check_types(name, types, letter, size, self.kinds[0], graph)
            return self.embed[0](types)
        if not isinstance(types, Tensor):
            raise TypeError(f"{name} must be a tensor of integers, got {type(types).__name__}")
        if types.shape != (size, columns):
            wanted = f"[{letter}, columns] = [{size}, {columns}]"
            raise ValueError(f"{name} must be {wanted} integers, got {list(types.shape)}")
        parts = [
            embed(check_types(f"{name}[:, {i}]", types[:, i], letter, size, kinds, graph))
            for i, (embed, kinds) in enumerate(zip(self.embed, self.kinds, strict=True))
        ]
        return torch.stack(parts).sum(0)


class FeatureEncoder(nn.Module):
    """A linear layer of features."""

    def __init__(self, features: int, dim: int):
        super().__init__()
        self.features = features
        self.lin = nn.Linear(features, dim)

    def reset_parameters(self) -> None:
        """Draw every parameter anew."""
        reset_sublayers(self)

    def forward(self, name: str, x: Tensor, letter: str, size: int, graph: Graph) -> Tensor:
        """``[size, features]`` -> ``[size, dim]``."""
        check_matrix(name, x, f"{letter}, {self.features}", (size, self.features))
        check_dtype(name, x, self.lin.weight)
        return self.lin(x)


class SharedEncoder(nn.Module):
    """One learnt vector, the same for all edges of a data set that describes none of them."""

    def __init__(self, dim: int):
        super().__init__()
        self.embed = nn.ModuleList([nn.Embedding(1, dim)])  # named as one of types

    def reset_parameters(self) -> None:
        """Draw every parameter anew."""
        reset_sublayers(self)

    def forward(self, name: str, x: Tensor | None, letter: str, size: int, graph: Graph) -> Tensor:
        """None -> ``[size, dim]``."""
        if x is not None:
            raise ValueError(f"{name} must be None: the model has one vector for all of them")
        first = torch.zeros(1, dtype=torch.long, device=graph.device)
        return self.embed[0](first).expand(size, -1)


def make_encoder(types: int | Sequence[int], features: int, dim: int) -> nn.Module:
    """Of types where there are any, else of features, else one vector for all."""
    assert not isinstance(types, int)
    if types:
        return TypeEncoder(types, dim)
    return FeatureEncoder(features, dim) if features else SharedEncoder(dim)


class KernelEncoder(nn.Module):
    """Numbers of a node (walks, heat, potentials), normalised and made as wide as asked for.

    Args:
        name: Of the argument that they come as.
        count: Numbers of a node.
        dim: Width of what is made of them.
        layers: Linear ones, each with a ReLU; 0 for a linear layer alone.

    Source:
        Dwivedi et al., arXiv 2110.07875, eq. 3; norms and layers as in GraphGPS's code.
    """

    def __init__(self, name: str, count: int, dim: int, layers: int = 0):
        super().__init__()
        self.name, self.count = name, count
        self.norm = nn.BatchNorm1d(count)
        self.lin = perceptron(count, dim, layers) if layers else nn.Linear(count, dim)

    def reset_parameters(self) -> None:
        """Draw every parameter anew."""
        reset_sublayers(self)

    def forward(self, x: Tensor, graph: Graph) -> Tensor:
        """``[N, count]`` -> ``[N, dim]``."""
        check_matrix(self.name, x, f"N, {self.count}", (graph.num_rows, self.count))
        check_dtype(self.name, x, self.norm.weight)
        check_rows(self.norm, x, f"norm of KernelEncoder of {self.name}", "node")
        return self.lin(self.norm(x))


class LaplacianEncoder(nn.Module):
    """A DeepSet of the pairs of a node's entry in an eigenvector and the eigenvalue.

    NaN stands for an eigenvector that a small graph does not have: it adds nothing. In training
    every eigenvector gets one random sign for the whole batch.

    Args:
        count: Eigenvectors of a node.
        dim: Width of what is made of them.
        layers: Linear ones.

    Source:
        Rampasek et al., arXiv 2205.12454, after Kreuzer et al., arXiv 2106.03893.
    """

    def __init__(self, count: int, dim: int, layers: int = 2):
        super().__init__()
        self.count = count
        self.phi = perceptron(2, dim, layers)

    def reset_parameters(self) -> None:
        """Draw every parameter anew."""
        reset_sublayers(self)

    def forward(self, vectors: Tensor, values: Tensor, graph: Graph) -> Tensor:
        """Eigenvectors ``[N, count]``, eigenvalues ``[G, count]`` -> ``[N, dim]``."""
        if self.training:
            vectors = flip_signs(vectors)
        weight = next(self.phi.parameters())
        pairs, absent = eigenpairs(vectors, values, graph, self.count, weight)
        return self.phi(pairs).masked_fill(absent[..., None], 0).sum(1)


class StableEncoder(nn.Module):
    """Eigenvectors made as wide as nodes, for the factors of edges; NaN counts as 0.

    Source:
        Wang et al., arXiv 2203.00199, as GraphGPS's ``EquivStableLapPE`` has it.
    """

    def __init__(self, count: int, dim: int):
        super().__init__()
        self.count = count
        self.lin = nn.Linear(count, dim)

    def reset_parameters(self) -> None:
        """Draw every parameter anew."""
        reset_sublayers(self)

    def forward(self, vectors: Tensor, graph: Graph) -> Tensor:
        """``[N, count]`` -> ``[N, dim]``."""
        k = self.count
        check_matrix("lap_vectors", vectors, f"N, {k}", (graph.num_rows, k))
        check_dtype("lap_vectors", vectors, self.lin.weight)
        return self.lin(vectors.nan_to_num(nan=0.0))


class Readout(nn.Module):
    """A head: ``"san_graph"`` and ``"default"`` of whole graphs, ``"inductive_node"`` of nodes.

    ``"san_graph"`` halves the width twice. The others keep it, and make what every hidden layer
    gives of length 1, as the authors' framework does.

    Args:
        kind: One of the three.
        dim: Width of nodes.
        out_dim: Numbers to predict.
        layers: Linear ones; ``"san_graph"`` has 3 whatever is given.
        pooling: Of nodes, for a graph.
        activation: Of ``"san_graph"``; the others have ReLU.
    """

    def __init__(
        self,
        kind: Head,
        dim: int,
        out_dim: int,
        *,
        layers: int = 3,
        pooling: Pooling = "mean",
        activation: Activation = "relu",
    ):
        super().__init__()
        if kind not in ("san_graph", "inductive_node", "default"):
            raise ValueError(
                f"head must be 'san_graph', 'inductive_node' or 'default', got {kind!r}"
            )
        if pooling not in _POOLING:
            raise ValueError(f"pooling must be one of {list(_POOLING)}, got {pooling!r}")
        self.kind, self.pooling = kind, pooling
        if kind == "san_graph":
            sizes = [dim, dim // 2, dim // 4, out_dim]
        else:
            sizes = [*[dim] * layers, out_dim]
        self.layers = nn.ModuleList(nn.Linear(*pair) for pair in pairwise(sizes))
        kind_of_activation = activation if kind == "san_graph" else "relu"
        self.activations = nn.ModuleList(make_activation(kind_of_activation) for _ in sizes[2:])

    def reset_parameters(self) -> None:
        """Draw every parameter anew."""
        reset_sublayers(self)

    def forward(self, x: Tensor, offsets: Tensor) -> Tensor:
        """``[N, dim]`` -> ``[G, out_dim]``, or ``[N, out_dim]`` of ``"inductive_node"``."""
        if self.kind != "inductive_node":
            x = pooled(x, offsets, self.pooling)
        for layer, activation in zip(self.layers[:-1], self.activations, strict=True):
            x = activation(layer(x))
            if self.kind != "san_graph":
                x = F.normalize(x, dim=1)
        return self.layers[-1](x)


def eigenpairs(
    vectors: Tensor, values: Tensor, graph: Graph, count: int, weight: Tensor
) -> tuple[Tensor, Tensor]:
    """``(u_ki, lambda_k)`` of each node i, ``[N, count, 2]``, and True where u_ki is NaN.

    What is NaN is 0 in the pairs. ``weight`` has the dtype that the eigenvectors must have.
    """
    n = graph.num_rows
    check_matrix("lap_vectors", vectors, f"N, {count}", (n, count))
    check_dtype("lap_vectors", vectors, weight)
    check_matrix("lap_values", values, f"G, {count}", (graph.num_graphs, count))
    sizes = graph.graph_ptr.diff()
    of_nodes = values.to(vectors.dtype).repeat_interleave(sizes, 0, output_size=n)
    return torch.stack([vectors, of_nodes], 2).nan_to_num(nan=0.0), vectors.isnan()


def pooled(x: Tensor, offsets: Tensor, pooling: Pooling) -> Tensor:
    """``[N, dim]`` -> ``[G, dim]``."""
    return _POOLING[pooling](x, offsets)


def perceptron(width: int, dim: int, layers: int) -> nn.Sequential:
    """Linear layers, each with a ReLU, twice as wide as ``dim`` but for the last."""
    sizes = [width, *[2 * dim] * (layers - 1), dim]
    parts: list[nn.Module] = []
    for pair in pairwise(sizes):
        parts += [nn.Linear(*pair), nn.ReLU()]
    return nn.Sequential(*parts)


def check_unused(name: str, given: Tensor | None, wanted: int, why: str) -> None:
    """Refuse an encoding that the model takes none of: ``wanted`` is 0, which ``why`` tells."""
    if given is not None and not wanted:
        raise ValueError(f"{name} must be None ({why}), got {list(given.shape)}")


def check_matrix(name: str, x: object, letters: str, shape: tuple[int, ...]) -> None:
    check_float(name, x)
    assert isinstance(x, Tensor)
    if x.shape != shape:
        raise ValueError(f"{name} must be [{letters}] = {list(shape)}, got {list(x.shape)}")
