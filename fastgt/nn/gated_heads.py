"""What attention modules that take a gate of their heads have in common."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fastgt.graph import Graph
from fastgt.nn.sublayers import is_plain_linear, reset_sublayers
from fastgt.ops.checks import readable
from fastgt.ops.head_mask import check_head_gate, gated
from fastgt.ops.head_projection import dense, head_projection
from fastgt.ops.implementation import Impl, resolve_impl
from fastgt.shard import Shard


@dataclass(frozen=True, eq=False)
class Gate:
    """A gate as a module's attention and the projections around it take it.

    Where a CPU has the values at hand, masked heads do not come into being: attention has the
    others alone, by their ``index``. Elsewhere they are left out by kernels that read the gate.
    """

    values: Tensor | None = None  # [H] or [G, H], for the attention
    dense: bool = False  # compute masked heads too, for the exact gradient
    active: Tensor | None = None  # [H], for the projections
    index: Tensor | None = None  # [A] query heads
    key_index: Tensor | None = None
    scale: Tensor | None = None  # [A], of the output of these; None: 1

    def heads(self, x: Tensor | None) -> Tensor | None:
        """Those of a tensor ``[E, H]`` that there are."""
        return x if x is None or self.index is None else x.index_select(1, self.index)

    def scaled(self, x: Tensor) -> Tensor:
        """``[N, A, D]`` times the gates of its heads."""
        return x if self.scale is None else gated(x, self.scale, None, True, "cpp")


class GatedHeads(nn.Module):
    """What attention modules with a ``head_gate`` share.

    A masked head takes no part in their projections either, unless ``dense_gate_grad`` asks for its
    gradient: then everything is computed wherever the gate itself requires one. A projection that
    is no plain ``nn.Linear``, for an adapter or a hook for example, is called as it is: for all
    heads, of which the masked ones then go no further.

    Attributes:
        INTO, INTO_KV: Names of the linear layers into query and into key heads.
        OUT_OF: Names of those out of query heads.
        GATED: Those of OUT_OF whose input the gate multiplies.
        heads, kv_heads, head_dim: Of the queries, of keys and values, and the width of each.
    """

    INTO: tuple[str, ...] = ("q", "k", "v")
    INTO_KV: tuple[str, ...] = ()
    OUT_OF: tuple[str, ...] = ("out",)
    GATED: tuple[str, ...] = ("out",)
    heads: int
    kv_heads: int
    head_dim: int
    impl: Impl | None

    def __init__(self, head_gate: nn.Module | None, dense_gate_grad: bool):
        super().__init__()
        if head_gate is not None and not isinstance(head_gate, nn.Module):
            found = type(head_gate).__name__
            raise TypeError(f"head_gate must be a module, as HeadGate(mask) is, got {found}")
        self.head_gate, self.dense_gate_grad = head_gate, dense_gate_grad

    def reset_parameters(self) -> None:
        """Draw every parameter anew."""
        reset_sublayers(self)

    def heads_left(self, heads: Tensor) -> None:
        """Called by :func:`fastgt.prune_heads` with the numbers that the heads left ``[A]`` had.

        A module whose other inputs go on having all heads overrides it.
        """

    def gate_of(self, head_gate: Tensor | None, x: Tensor) -> Gate:
        """The module's own, or the one given to this call, for nodes ``x``."""
        if head_gate is None:
            if self.head_gate is None:
                return Gate()
            head_gate = self.head_gate()
        elif self.head_gate is not None:
            raise ValueError("head_gate is given twice: to the module, and to this call")
        if not isinstance(head_gate, Tensor) or head_gate.ndim < 2:
            check_head_gate(head_gate, self.heads, x.device)
        assert isinstance(head_gate, Tensor)
        if not self.heads:
            return Gate()
        if self.dense_gate_grad and torch.is_grad_enabled() and head_gate.requires_grad:
            return Gate(head_gate, dense=True)
        if head_gate.ndim > 1:
            return Gate(head_gate, active=(head_gate != 0).any(0))
        if (
            resolve_impl(self.impl, x) == "cpp"
            and readable(head_gate)
            and (found := self._present(head_gate)) is not None
        ):
            return found
        return Gate(head_gate, active=head_gate)

    def _present(self, head_gate: Tensor) -> Gate | None:
        """The heads that are there; None where they would not share their key heads evenly."""
        index = head_gate.nonzero().squeeze(1)
        key_index, sizes = (index // (self.heads // self.kv_heads)).unique_consecutive(
            return_counts=True
        )
        if (sizes != sizes[:1]).any():
            return None
        scale: Tensor | None = head_gate.index_select(0, index)
        assert scale is not None
        if not scale.requires_grad and bool((scale == 1).all()):
            scale = None
        return Gate(index=index, key_index=key_index, scale=scale)

    def into_heads(self, name: str, x: Tensor, gate: Gate) -> Tensor:
        """x ``[N, C]`` -> ``[N, H, D]`` by the layer of that name, of the active heads only."""
        layer: nn.Module = getattr(self, name)
        shared = name in self.INTO_KV
        heads, index = self.kv_heads if shared else self.heads, gate.index
        active, size = gate.active, (heads, self.head_dim)
        if (active is None and index is None) or not heads:
            return layer(x).unflatten(-1, size)
        if shared and index is not None:
            index = gate.key_index
        if not is_plain_linear(layer):
            y = layer(x).unflatten(-1, size)
            return y if index is None else y.index_select(1, index)
        assert isinstance(layer, nn.Linear)
        if active is not None and heads < self.heads:
            active = (active != 0).unflatten(0, (heads, -1)).any(1)
        weight = layer.weight.unflatten(0, size)
        bias = None if layer.bias is None else layer.bias.unflatten(0, size)
        if index is not None:
            weight = weight.index_select(0, index).flatten(0, 1)
            bias = None if bias is None else bias.index_select(0, index).flatten()
            return dense(x, weight, bias).unflatten(-1, (len(index), self.head_dim))
        return head_projection(x, weight, bias, active, impl=self.impl)

    def sent(self, y: Tensor, graph: Graph, gate: Gate, k: Tensor, v: Tensor) -> Graph:
        """The graph for an attention over keys and values of y.

        Where it lies on several ranks, they fetch y itself if it has fewer bytes than both.
        """
        if not isinstance(graph, Shard):
            return graph
        bytes_of = [x.shape[1:].numel() * x.element_size() for x in (y, k, v)]
        layers = self.get_submodule("k"), self.get_submodule("v")
        # hooks would see two calls
        if bytes_of[0] >= sum(bytes_of[1:]) or not all(map(is_plain_linear, layers)):
            return graph
        project = functools.partial(self._keys_and_values, gate)
        return graph.sending(y, project)  # type: ignore[return-value]

    def _keys_and_values(self, gate: Gate, y: Tensor) -> tuple[Tensor, Tensor]:
        return self.into_heads("k", y, gate), self.into_heads("v", y, gate)

    @staticmethod
    def without_heads(q: Tensor, *others: Tensor) -> Tensor:
        """The attention of no heads, ``[N, 0, D]``. Gradients of 0 reach every projection, which
        ``DistributedDataParallel`` wants of all parameters."""
        return q + sum(x.sum() for x in others)

    def out_of_heads(self, name: str, x: Tensor, gate: Gate) -> Tensor:
        """x ``[N, H, D]`` -> ``[N, C]`` by the layer of that name, from the active heads only."""
        layer: nn.Module = getattr(self, name)
        if (gate.active is None and gate.index is None) or not self.heads:
            return layer(x.flatten(-2))
        if not is_plain_linear(layer):
            if gate.index is not None:
                whole = x.new_zeros(x.shape[0], self.heads, self.head_dim)
                x = whole.index_copy(1, gate.index, x)
            return layer(x.flatten(-2))
        assert isinstance(layer, nn.Linear)
        weight, bias = layer.weight.unflatten(1, (self.heads, self.head_dim)), layer.bias
        if gate.index is not None:
            return dense(x.flatten(-2), weight.index_select(1, gate.index).flatten(1), bias)
        return head_projection(x, weight, bias, gate.active, impl=self.impl)
