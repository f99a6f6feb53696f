"""An ``edge_index`` becomes a Graph once for all layers of a model."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch_geometric import EdgeIndex
from torch_geometric.typing import SparseTensor
from torch_geometric.utils import add_self_loops, is_torch_sparse_tensor, remove_self_loops

from fastgt.graph import Graph

T = TypeVar("T")


@contextmanager
def shared_graphs() -> Iterator[None]:
    """Within it, layers that are given the same ``edge_index`` share one Graph.

    A tensor is the same if it is the same object and nobody has written to it in between. What is
    made is forgotten at the end of the outermost ``with``. :func:`fastgt.accelerate` puts it around
    every forward of the model. A tensor that was made under ``torch.inference_mode()`` counts no
    writes: it is compared with a copy. Nothing is shared in code that is being compiled.

    Example:
        >>> import torch
        >>> from fastgt.pyg import TransformerConv, shared_graphs
        >>> layers = [TransformerConv(8, 8) for _ in range(3)]
        >>> x, edge_index = torch.randn(3, 8), torch.tensor([[0, 1, 2], [1, 2, 0]])
        >>> with shared_graphs():
        ...     for layer in layers:
        ...         x = layer(x, edge_index)
    """
    enter()
    try:
        yield
    finally:
        leave()


class Edges(NamedTuple):
    """What a layer's ``edge_index`` says."""

    graph: Graph
    edge_attr: Tensor | None  # of a sparse matrix whose values have channels


class _Kept(NamedTuple):
    made: Any
    of: Any  # held, for the key has its id
    copy: Tensor | None  # of what counts no writes


class _Scope(threading.local):
    depth = 0
    kept: dict[Any, _Kept]


_SCOPE = _Scope()


def enter() -> None:
    """Begin to share; calls may be nested."""
    if not _SCOPE.depth:
        _SCOPE.kept = {}
    _SCOPE.depth += 1


def leave() -> None:
    """End what the last :func:`enter` began; a hook of all modules may fail before there is one."""
    _SCOPE.depth = max(0, _SCOPE.depth - 1)
    if not _SCOPE.depth:
        _SCOPE.kept = {}


def shared(what: str, of: Any, options: tuple, make: Callable[[], T]) -> T:
    """``make()``, or what it gave before for the same object, unchanged, and equal options."""
    if torch.compiler.is_compiling() or not _SCOPE.depth:
        return make()
    version, copy = 0, None
    if isinstance(of, Tensor):
        if of.is_inference():
            copy = of
        else:
            version = of._version
    key = what, id(of), version, options
    found = _SCOPE.kept.get(key)
    if found is not None and found.copy is not None and copy is not None:
        found = found if torch.equal(found.copy, copy) else None
    if found is None:
        copy = None if copy is None else copy.clone()
        found = _SCOPE.kept[key] = _Kept(make(), of, copy)
    return found.made


def edges_of(edge_index: Any, sources: int, targets: int, flow: str) -> Edges:
    """The Graph of what PyG calls an ``edge_index``: rows are targets of messages."""
    if isinstance(edge_index, Graph):
        return Edges(edge_index, None)
    options = sources, targets, flow
    return shared("graph", edge_index, options, lambda: _made(edge_index, *options))


def _made(edge_index: Any, sources: int, targets: int, flow: str) -> Edges:
    values = None
    if isinstance(edge_index, SparseTensor):
        row, col, values = edge_index.coo()
        ends = torch.stack([col, row])
    elif is_torch_sparse_tensor(edge_index):
        values = edge_index.values()
        if edge_index.layout == torch.sparse_coo:
            ends = edge_index.indices().flip(0)
        else:
            edge_index = edge_index.detach()
            ptr, col = edge_index.crow_indices(), edge_index.col_indices()
            row = torch.arange(targets, device=col.device).repeat_interleave(
                ptr.diff(), output_size=col.shape[0]
            )
            ends = torch.stack([col, row])
    else:
        ends = edge_index.as_tensor() if isinstance(edge_index, EdgeIndex) else edge_index
        ends = ends if flow == "source_to_target" else ends.flip(0)
    edge_attr = None if values is None or values.dim() == 1 else values
    sizes = sources if sources == targets else (targets, sources)
    return Edges(Graph.from_edge_index(ends, sizes), edge_attr)


def with_self_loops(
    edge_index: Tensor, edge_attr: Tensor | None, num_nodes: int, fill_value: Any = None
) -> tuple[Tensor, Tensor | None]:
    """As PyG's GAT has it: self loops go, then every node gets one; one ``edge_index`` for all
    layers."""

    def looped(edge_attr: Tensor | None) -> tuple[Tensor, Tensor | None]:
        ends, edge_attr = remove_self_loops(edge_index, edge_attr)
        return add_self_loops(ends, edge_attr, fill_value=fill_value, num_nodes=num_nodes)

    if edge_attr is None:
        return shared("loops", edge_index, (num_nodes,), lambda: looped(None)[0]), None
    ends, edge_attr = looped(edge_attr)
    return shared("loops", edge_index, (num_nodes,), lambda: ends), edge_attr


def offsets_of(batch: Tensor | None, num_nodes: int, device: torch.device) -> Tensor:
    """The boundaries ``[G + 1]`` of the graphs that a sorted ``batch`` numbers.

    Raises:
        TypeError: ``batch`` does not hold integers.
        ValueError: ``batch`` is not sorted, is negative, or has another number of nodes.
    """
    if batch is None:
        return torch.tensor([0, num_nodes], device=device)
    if batch.is_floating_point() or batch.dtype == torch.bool:
        raise TypeError(f"batch must hold integers, got {batch.dtype}")
    if batch.shape != (num_nodes,):
        raise ValueError(f"batch must be [N] = [{num_nodes}], got {list(batch.shape)}")

    def made() -> Tensor:
        down = batch[1:] < batch[:-1]
        if down.any():
            i = int(down.nonzero()[0])
            raise ValueError(
                f"batch is not sorted: node {i} is of graph {int(batch[i])}, node {i + 1} of graph "
                f"{int(batch[i + 1])}"
            )
        if num_nodes and batch[0] < 0:
            raise ValueError(f"batch has graph {int(batch[0])}; it must not be negative")
        graphs = int(batch[-1]) + 1 if num_nodes else 0
        return torch.searchsorted(batch.long(), torch.arange(graphs + 1, device=device))

    return shared("offsets", batch, (), made)
