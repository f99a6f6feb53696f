"""What operators take in products, for ``torch.utils.flop_counter.FlopCounterMode``.

As PyTorch's own formulas do, these count multiply-adds, as two each, by shapes alone; but the
pairs of global attention by the boundaries of its graphs. Sums,
softmaxes, maxima and feature maps count nothing, and ops that only sum count 0. An edge counts as a
pair of nodes does in PyTorch's attention: on a complete graph both are equal. Heads that a gate
masks count, and where the quadratic form of linear attention runs, the linear one counts: shapes do
not tell. A backward counts the gradients that are asked for, and what it makes again of the
forward, once. ``impl="reference"`` runs PyTorch's operators, which count by themselves. The counter
follows modules by hooks of all modules: within it, those of ``fastgt.nn`` call each of their
layers, for all heads.

PyTorch's counter imports Triton where that is installed. It is not imported here: the formulas wait
until somebody does.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

import torch

from fastgt.contract import PerInput, RaggedPairs
from fastgt.ops import (
    additive_attention,
    aggregate,
    channelwise_attention,
    gated_aggregate,
    global_attention,
    linear_attention,
    row_dropout,  # noqa: F401  # its op
)
from fastgt.ops.attention_launch import BACKWARD, FORWARD

_COUNTER = "torch.utils.flop_counter"
Shape = Sequence[int]


def register_formulas() -> None:
    """With PyTorch's counter: now, if it has been imported, or as it is."""
    if _COUNTER in sys.modules:
        _register()
    else:
        sys.meta_path.insert(0, _FINDER)


def _register() -> None:
    from torch.utils.flop_counter import flop_registry, register_flop_formula

    for name, formula in _FORMULAS.items():
        op = getattr(torch.ops.fastgt, name)
        if op not in flop_registry:  # this package may be loaded a second time
            register_flop_formula(op, get_raw=name in _BY_VALUES)(formula)


class _Finder:
    """Finds PyTorch's counter as Python does, and registers the formulas when it has run."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name != _COUNTER:
            return None
        spec = PathFinder.find_spec(name, path, target)
        if spec is not None and spec.loader is not None:
            run = spec.loader.exec_module

            def run_and_register(module: ModuleType) -> None:
                run(module)
                sys.meta_path.remove(_FINDER)
                _register()

            spec.loader.exec_module = run_and_register  # type: ignore[method-assign]
        return spec


_FINDER = _Finder()


def _attention_fwd(path: str, height: int, rows: Any, *flat: Any, out_shape: Any) -> int:
    inputs, _, terms, _, _, switches = FORWARD.split(flat)
    channels = 0
    if terms.attr is not None:
        channels = ((terms.attr_q is not None) + switches.make_attr_o) * terms.attr[1]
    q, _, v = inputs
    return 2 * _pairs(q, rows) * (q[2] + v[2] + channels)


def _attention_bwd(
    path: str, height: int, rows: Any, columns: Any, needs: Any, *flat: Any, out_shape: Any
) -> int:
    upstream, _, inputs, _, terms, *_ = BACKWARD.split(flat)
    need = PerInput(*needs)
    logits = any(need._replace(v=False, value=False))
    # of width D: the logit again, the gradients of q and k; of width Dv: that of the weight, of v
    scores, weights = 1 + need.q + need.k, logits + need.v
    channels = 0
    if terms.attr is not None:
        channels += (terms.attr_q is not None) * (1 + need.attr_q + need.attr)
        channels += (upstream.dattr_o is not None) * (logits + need.attr)
        channels *= terms.attr[1]
    q, _, v = inputs
    return 2 * _pairs(q, rows) * (scores * q[2] + weights * v[2] + channels)


def _additive_attention_fwd(impl: str, *flat: Any, out_shape: Any) -> int:
    (q, _, v, _), walk, _, terms, *_ = additive_attention.FORWARD.split(flat)
    made = 0 if terms.attr is None else terms.attr[1]
    return 2 * _pairs(q, walk.row_walk) * (q[2] * (1 + made) + v[2])


def _additive_attention_bwd(impl: str, *flat: Any, out_shape: Any) -> int:
    _, (q, _, v, _), walks, _, need, terms, *_ = additive_attention.BACKWARD.split(flat)
    logits = any(need._replace(need_v=False))
    # of width D: the logit again, the gradients of q, k and the weight; of width Dv: that of the
    # attention weight, of v; and what attributes add, with the gradients of both factors
    scores = 1 + need.need_q + need.need_k + need.need_weight
    if terms.attr is not None:
        scores += (1 + need.need_attr + need.need_key_weight) * terms.attr[1]
    return 2 * _pairs(q, walks.row_walk) * (scores * q[2] + (logits + need.need_v) * v[2])


def _channelwise_attention_fwd(impl: str, *flat: Any, out_shape: Any) -> int:
    inputs, *_ = channelwise_attention.FORWARD.split(flat)
    return 2 * _size(inputs.logits)


def _channelwise_attention_bwd(impl: str, *flat: Any, out_shape: Any) -> int:
    _, inputs, *_, needs = channelwise_attention.BACKWARD.split(flat)
    return 2 * _size(inputs.logits) * (needs.need_logits + needs.need_v)


def _aggregate_fwd(impl: str, *shapes: Any, out_shape: Any) -> int:
    messages, *_ = aggregate.FORWARD.split(shapes)
    return 2 * _low_rank(messages)


def _aggregate_bwd(impl: str, *shapes: Any, out_shape: Any) -> int:
    _, messages, *_, needs = aggregate.BACKWARD.split(shapes)
    return 2 * _low_rank(messages) * (1 + needs.need_edge_attr + needs.need_edge_value_weight)


def _low_rank(messages: Any) -> int:
    """Edges times attributes times channels; of shapes."""
    attr, weight = messages.edge_attr, messages.edge_value_weight
    return 0 if attr is None else _size(attr) * weight[1]


def _gated_aggregate_fwd(impl: str, *shapes: Any, out_shape: Any) -> int:
    gated, walk, *_ = gated_aggregate.FORWARD.split(shapes)
    return 2 * walk.row_walk[2][0] * gated.x[1]


def _gated_aggregate_bwd(impl: str, *shapes: Any, out_shape: Any) -> int:
    _, gated, _, walks, _, needs = gated_aggregate.BACKWARD.split(shapes)
    gates = needs.need_gate or needs.need_gate_row or needs.need_gate_col
    return 2 * walks.row_walk[2][0] * gated.x[1] * (needs.need_x + gates)


def _global_attention_fwd(impl: str, *flat: Any, out_val: Any) -> int:
    (q, k, v), _, ragged, _ = global_attention.FORWARD.split(flat)
    pairs = _pairs_of_graphs(q.shape[0], k.shape[0], ragged)
    return 2 * pairs * q.shape[1] * (q.shape[2] + v.shape[2])


def _global_attention_bwd(impl: str, *flat: Any, out_val: Any) -> int:
    _, (q, k, v), _, ragged, needs, _ = global_attention.BACKWARD.split(flat)
    logits = needs.need_q or needs.need_k or needs.need_bias
    # of width D: the logit again, the gradients of q and k; of width Dv: that of the weight, of v
    each = (1 + needs.need_q + needs.need_k) * q.shape[2] + (logits + needs.need_v) * v.shape[2]
    return 2 * _pairs_of_graphs(q.shape[0], k.shape[0], ragged) * q.shape[1] * each


def _pairs_of_graphs(nodes: int, keys: int, ragged: RaggedPairs) -> int:
    """Queries times keys, graph by graph; of graphs of one size, where no sizes are known."""
    offsets, ends, _ = ragged
    if offsets is None:
        return nodes * keys
    ends = offsets if ends is None else ends
    if offsets.device.type == "meta" or ends.device.type == "meta":
        return nodes * keys // max(1, offsets.shape[0] - 1)
    return int((offsets.diff().long() * ends.diff().long()).sum())


def _linear_attention_fwd(impl: str, *flat: Any, out_shape: Any) -> int:
    (q, _, v), (_, projection), _, quotient = linear_attention.FORWARD.split(flat)
    nodes, heads, width = q
    projected, features = (0, width) if projection is None else (2 * width, projection[0])
    return 2 * nodes * heads * features * (projected + 2 * v[2] + quotient.normalize)


def _linear_attention_bwd(impl: str, do: Shape, tops: Any, *flat: Any, out_shape: Any) -> int:
    (q, _, v), (_, projection), _, quotient, needs = linear_attention.BACKWARD.split(flat)
    need_q, need_k, need_v = needs
    nodes, heads, width = q
    projected, features = (0, width) if projection is None else (width, projection[0])
    # S again, and of S, phi(q), phi(k) and v the gradients; the denominator again, and of z
    products = 1 + (need_k or need_v) + need_q + need_k + need_v
    return (
        2
        * nodes
        * heads
        * features
        * (projected * (2 + need_q + need_k) + products * v[2] + quotient.normalize * (1 + need_k))
    )


def _head_expand(impl: str, x: Shape, weight: Shape, bias: Any, heads: Any, out_shape: Any) -> int:
    return 2 * x[0] * _size(weight)


def _head_contract(
    impl: str, y: Shape, weight: Shape, bias: Any, heads: Any, out_shape: Any
) -> int:
    return 2 * y[0] * _size(weight)


def _head_outer(impl: str, y: Shape, x: Shape, heads: Any, out_shape: Any) -> int:
    return 2 * _size(y) * x[1]


def _no_products(*shapes: Any, out_shape: Any) -> int:
    return 0


_FORMULAS: dict[str, Callable[..., int]] = {
    "attention_fwd": _attention_fwd,
    "attention_bwd": _attention_bwd,
    "additive_attention_fwd": _additive_attention_fwd,
    "additive_attention_bwd": _additive_attention_bwd,
    "channelwise_attention_fwd": _channelwise_attention_fwd,
    "channelwise_attention_bwd": _channelwise_attention_bwd,
    "gated_aggregate_fwd": _gated_aggregate_fwd,
    "gated_aggregate_bwd": _gated_aggregate_bwd,
    "global_attention_fwd": _global_attention_fwd,
    "global_attention_bwd": _global_attention_bwd,
    "linear_attention_fwd": _linear_attention_fwd,
    "linear_attention_bwd": _linear_attention_bwd,
    "head_expand": _head_expand,
    "head_contract": _head_contract,
    "head_outer": _head_outer,
    "row_dropout": _no_products,
    "segment_softmax_fwd": _no_products,
    "segment_softmax_bwd": _no_products,
    "aggregate_fwd": _aggregate_fwd,
    "aggregate_bwd": _aggregate_bwd,
}
# those that get tensors, not their shapes
_BY_VALUES = {"global_attention_fwd", "global_attention_bwd"}


def _pairs(q: Shape, rows: Sequence[Shape]) -> int:
    """Edges times heads; the second tensor of every walk has an entry for each edge."""
    return rows[1][0] * q[1]


def _size(shape: Shape) -> int:
    return torch.Size(shape).numel()
