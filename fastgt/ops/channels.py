"""Tensors of channels over the rows, columns or edges of a graph: what segment_softmax, aggregate
and gated_aggregate take."""

from __future__ import annotations

import torch
from torch import Tensor

from fastgt.graph import Graph
from fastgt.ops.checks import FLOATS, autocast, autocasts, check_graph
from fastgt.ops.walks import CPU, GATHER
from fastgt.tiles import MAX_WIDTH

PLANS = {"cpp": CPU, "triton": GATHER}
"""By implementation: channels never meet, so edges are gathered."""


def check_channels(
    graph: Graph, *, required: bool = False, **tensors: tuple[Tensor | None, str]
) -> None:
    """The tensors are alike and have one row for each of the graph's rows, columns or edges."""
    check_graph(graph)
    sizes = {"rows": graph.num_rows, "columns": graph.num_cols, "edges": graph.num_edges}
    first, like = "", None
    optional = len(tensors) > 1
    for name, (x, what) in tensors.items():
        if x is None and optional and not (required and name == "x"):
            continue
        if not isinstance(x, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(x).__name__}")
        if x.dtype not in FLOATS:
            raise TypeError(f"{name} must be float16, bfloat16, float32 or float64, got {x.dtype}")
        if x.layout != torch.strided:
            raise TypeError(f"{name} must be a strided tensor, got {x.layout}")
        if x.ndim == 0:
            raise ValueError(f"{name} must have a first dimension over the graph's {what}, got []")
        if x.shape[0] != sizes[what]:
            raise ValueError(f"{name} has {x.shape[0]} rows but the graph has {sizes[what]} {what}")
        if like is None:
            first, like = name, x
            continue
        if x.dtype != like.dtype:
            raise TypeError(f"{name} is {x.dtype} but {first} is {like.dtype}")
        if x.device != like.device:
            raise ValueError(f"{name} is on {x.device} but {first} is on {like.device}")
        if name == "edge_weight" and x.ndim == 1:
            continue
        if x.shape[1:] != like.shape[1:]:
            raise ValueError(
                f"{name} has channels {list(x.shape[1:])} but {first} has {list(like.shape[1:])}"
            )
    assert like is not None
    if graph.device != like.device:
        raise ValueError(
            f"graph is on {graph.device} but {first} is on {like.device}: use graph.to()"
        )


def check_low_rank(
    graph: Graph,
    edge_attr: Tensor | None,
    edge_value_weight: Tensor | None,
    like: tuple[str, Tensor | None],
) -> None:
    """Both factors are there or none, and fit each other, the graph, and a tensor of channels."""
    for one, other, x, y in (
        ("edge_attr", "edge_value_weight", edge_attr, edge_value_weight),
        ("edge_value_weight", "edge_attr", edge_value_weight, edge_attr),
    ):
        if x is not None and y is None:
            raise ValueError(f"{one} needs {other}, which is None")
    if edge_attr is None or edge_value_weight is None:
        return
    check_channels(graph, edge_attr=(edge_attr, "edges"))
    if edge_attr.ndim != 2:
        raise ValueError(
            f"edge_attr must be [E, C] = [{graph.num_edges}, C], got {list(edge_attr.shape)}"
        )
    channels, weight = edge_attr.shape[1], edge_value_weight
    if not 1 <= channels <= MAX_WIDTH:
        raise ValueError(f"edge_attr has {channels} channels; supported are 1 to {MAX_WIDTH}")
    if not isinstance(weight, Tensor) or weight.layout != torch.strided:
        raise TypeError(f"edge_value_weight must be a strided tensor, got {type(weight).__name__}")
    if weight.ndim == 0 or weight.shape[0] != channels:
        raise ValueError(
            f"edge_value_weight must be [C, ...] = [{channels}, ...], got {list(weight.shape)}"
        )
    first, x = like
    for name, y in (("edge_value_weight", weight), (first, x)):
        if not isinstance(y, Tensor):
            continue
        if y.dtype != edge_attr.dtype:
            raise TypeError(f"{name} is {y.dtype} but edge_attr is {edge_attr.dtype}")
        if y.device != edge_attr.device:
            raise ValueError(f"{name} is on {y.device} but edge_attr is on {edge_attr.device}")
    if isinstance(x, Tensor) and x.ndim and weight.shape[1:] != x.shape[1:]:
        raise ValueError(
            f"edge_value_weight has channels {list(weight.shape[1:])} but {first} has "
            f"{list(x.shape[1:])}"
        )


def autocast_all(*tensors: Tensor | None) -> list[Tensor | None]:
    """The tensors as ``torch.autocast`` has them, on the device of the first."""
    for first in tensors:
        if isinstance(first, Tensor):
            break
    else:
        return list(tensors)
    device = first.device.type
    if not autocasts(device):
        return list(tensors)
    dtype = torch.get_autocast_dtype(device)
    return [None if x is None else autocast(x, dtype) for x in tensors]


def flat(x: Tensor) -> Tensor:
    """``[N, D]``, as a view but for strides that do not allow it."""
    return x if x.ndim == 2 else x.flatten(1) if x.ndim > 1 else x[:, None]


def flat_all(*tensors: Tensor | None) -> list[Tensor | None]:
    """``flat`` of each tensor there is."""
    views = [None if x is None else flat(x) for x in tensors]
    if torch.compiler.is_compiling():
        # Dynamo refuses one tensor in two places of a Function, as where x gates itself
        views = [None if x is None else x.view_as(x) for x in views]
    return views
