"""Heads: taken away for good, and exchanged while a model trains."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fastgt.nn.gated_heads import GatedHeads
from fastgt.nn.head_gate import HeadGate
from fastgt.nn.sublayers import is_plain_linear
from fastgt.ops.checks import integer

Model = TypeVar("Model", bound=nn.Module)


@torch.inference_mode(False)  # its parameters are trained afterwards
def prune_heads(
    model: Model,
    *,
    allow_empty: bool = False,
    state_dict: Mapping[str, Tensor] | None = None,
) -> Model:
    """A copy of the model without the heads that its gates mask, and without gates.

    Rows of the projections into those heads and columns of those out of them, for edges too, are
    not there any more; values of gates other than 1 are multiplied into what follows. The outputs
    of the copy are those of ``model.eval()``, but for rounding. A gate is asked once, as outside
    training. An ``edge_bias`` for the copy has a column for each head that is left. Where the query
    heads that are left do not share their key heads evenly any more, each gets a key head of its
    own.

    All ranks of a distributed training prune the same heads, without asking each other: outside
    training, gates of :mod:`fastgt.nn` depend on parameters and buffers alone, which
    ``DistributedDataParallel`` keeps equal. In training, each rank draws random gates for itself,
    as it does for dropout.

    Args:
        model: With modules that have a ``head_gate``, of :class:`fastgt.nn.NeighborhoodAttention`,
            :class:`fastgt.nn.EdgeGatedAttention`, :class:`fastgt.nn.LinearAttention` or their
            subclasses. It stays as it is.
        allow_empty: Take all heads of a module away where all are masked: of its attention the bias
            of the last projection is left.
        state_dict: That of such a copy. Gates are not asked: the model's modules shrink to the
            sizes in it, and its values are loaded.

    Raises:
        ValueError: A module's heads are all masked, without ``allow_empty``; its gate is NaN, or
            differs from graph to graph; its projections are no plain ``nn.Linear``, for an adapter
            or a hook for example, or are one layer; or ``state_dict`` does not fit.

    Example:
        >>> import torch
        >>> from fastgt import prune_heads
        >>> from fastgt.nn import HeadGate, NeighborhoodAttention
        >>> gate = HeadGate(torch.tensor([1.0, 0.0, 1.0, 0.0]))
        >>> smaller = prune_heads(NeighborhoodAttention(64, heads=4, head_gate=gate))
        >>> smaller.heads, smaller.q
        (2, Linear(in_features=64, out_features=32, bias=True))
    """
    if state_dict is not None:
        return _like(model, state_dict)
    gates = {}
    for name, module in _gated(model):
        gate_module: Any = module.head_gate
        with torch.no_grad():
            gate = copy.deepcopy(gate_module).eval()()
        where = f"the head_gate of {name!r}" if name else "head_gate"
        if gate.shape != (module.heads,):
            raise ValueError(f"{where} must be [H] = [{module.heads}], got {list(gate.shape)}")
        if not gate.any() and not allow_empty:
            raise ValueError(
                f"{where} masks all {module.heads} heads: allow_empty=True takes them away"
            )
        if not gate.is_meta and gate.isnan().any():
            raise ValueError(f"{where} is NaN at heads {gate.isnan().nonzero().flatten().tolist()}")
        _check_layers(name, module)
        gates[name] = gate
    smaller = copy.deepcopy(model)
    for name, module in _gated(smaller):
        _keep(module, gates[name])
    return smaller


def _gated(model: nn.Module) -> list[tuple[str, GatedHeads]]:
    found = [(name, m) for name, m in model.named_modules() if isinstance(m, GatedHeads)]
    return [(name, m) for name, m in found if m.head_gate is not None]


def _check_layers(name: str, module: GatedHeads) -> None:
    """Each projection has parameters of its own."""
    seen: dict[int, str] = {}
    for short in (*module.INTO, *module.INTO_KV, *module.OUT_OF):
        layer, path = getattr(module, short), f"{name}.{short}" if name else short
        # what is no nn.Linear at all may have neither
        for part in ("weight", "bias") if isinstance(layer, nn.Linear) else ():
            if getattr(layer, part) is not None and part not in layer._parameters:
                raise ValueError(
                    f"the {part} of {path!r} is made by a hook or a parametrization, as pruning by "
                    "torch.nn.utils.prune: remove that before its heads are taken"
                )
        if not is_plain_linear(layer):
            kind = f"{type(layer).__module__}.{type(layer).__qualname__}"  # adapters are Linear too
            raise ValueError(
                f"{path!r} is no plain nn.Linear, or has hooks, got {kind}: its heads are not "
                "known. Merge adapters into it, and remove hooks, before"
            )
        if id(layer) in seen:
            raise ValueError(f"{seen[id(layer)]!r} and {path!r} are one layer: heads of both go")
        seen[id(layer)] = path


def _keep(module: GatedHeads, gate: Tensor) -> None:
    """Take away, in place, the heads whose gate is 0."""
    keep = gate.nonzero().squeeze(1)
    group = module.heads // max(1, module.kv_heads)
    key = keep // group  # that each of them reads
    shared = key.unique_consecutive()
    sizes = (key[:, None] == shared).sum(0)
    if len(shared) and (sizes == sizes[0]).all():
        key = shared
    value = gate[keep].to(getattr(module, module.OUT_OF[0]).weight.dtype)
    for name in module.INTO:
        _take(getattr(module, name), keep, module.head_dim, 0)
    for name in module.INTO_KV:
        _take(getattr(module, name), key, module.head_dim, 0)
    for name in module.OUT_OF:
        layer = getattr(module, name)
        _take(layer, keep, module.head_dim, 1)
        if name in module.GATED:
            with torch.no_grad():
                layer.weight.mul_(value.repeat_interleave(module.head_dim))
    module.heads_left(keep)
    module.heads, module.kv_heads, module.head_gate = len(keep), len(key), None


def _take(layer: nn.Linear, heads: Tensor, width: int, dim: int) -> None:
    """Keep ``heads``, of ``width`` channels each, of the layer's outputs (0) or inputs (1)."""
    at = (heads[:, None] * width + torch.arange(width, device=heads.device)).flatten()
    weight, bias = layer.weight, layer.bias
    layer.weight = nn.Parameter(
        weight.detach().index_select(dim, at), requires_grad=weight.requires_grad
    )
    if dim == 1:
        layer.in_features = len(at)
        return
    layer.out_features = len(at)
    if bias is not None:
        layer.bias = nn.Parameter(bias.detach()[at], requires_grad=bias.requires_grad)


def _like(model: Model, state_dict: Mapping[str, Tensor]) -> Model:
    smaller = copy.deepcopy(model)
    for name, module in smaller.named_modules():
        if not isinstance(module, GatedHeads):
            continue
        prefix, sizes = f"{name}." if name else "", []
        if any(key.startswith(f"{prefix}head_gate.") for key in state_dict):
            raise ValueError(f"state_dict has a {prefix}head_gate: it is of a model with gates")
        for layer in (module.INTO[0], (module.INTO_KV or module.INTO)[0]):
            key = f"{prefix}{layer}.weight"
            if key not in state_dict:
                raise ValueError(f"state_dict has no {key!r}")
            rows = len(state_dict[key])
            if rows % module.head_dim or rows > module.heads * module.head_dim:
                raise ValueError(
                    f"{key!r} has {rows} rows in state_dict, which are no heads of "
                    f"{module.head_dim} channels among the model's {module.heads}"
                )
            sizes.append(rows // module.head_dim)
        heads, key_heads = sizes
        if heads % max(1, key_heads):
            raise ValueError(f"state_dict has {heads} heads for {key_heads} key heads in {name!r}")
        _check_layers(name, module)
        device = getattr(module, module.INTO[0]).weight.device
        # whichever heads: the values are loaded
        first = torch.arange(heads, device=device)
        for layer in module.INTO:
            _take(getattr(module, layer), first, module.head_dim, 0)
        for layer in module.INTO_KV:
            own = torch.arange(key_heads, device=device) % module.kv_heads
            _take(getattr(module, layer), own, module.head_dim, 0)
        for layer in module.OUT_OF:
            _take(getattr(module, layer), first, module.head_dim, 1)
        module.heads, module.kv_heads, module.head_gate = heads, key_heads, None
    try:
        smaller.load_state_dict(state_dict)
    except RuntimeError as error:
        raise ValueError(f"state_dict does not fit the model: {error}") from error
    return smaller


def _has_ranks(group: dist.ProcessGroup | None) -> bool:
    initialised = dist.is_available() and dist.is_initialized()
    return initialised and dist.get_world_size(group) > 1


class HeadSparsity:
    """Dynamic sparse training of heads: of each layer as many are active, not always the same.

    Every ``every`` steps of training, of each layer's active heads the ``exchange`` (rounded up)
    with the smallest scores die, and as many of the masked ones with the largest are active
    instead. With the gate g_h of head h, 1 or 0, and sums over the last ``scored`` batches::

        death   |sum of g_h dL/dg_h|, the first-order change of the loss without the head
        growth  sum of |dL/dg_h|, of heads that were masked

    where dL/dg_h is the exact derivative, at g_h = 0 too, summed over all backwards since the last
    step; one that is not finite does not count. So the batches that are scored take the time of a
    dense model, and their gradient has to reach the gates; all others take that of the active heads
    alone. The exchange shrinks as a cosine over ``steps``, and ends with them. A head that grows
    has the weights that it had.

    The gates are set in place: their masks are kept in the model's ``state_dict``.

    Where ``torch.distributed`` is initialised, all ranks have the same active heads, those that one
    process with the batches of all ranks would have: the first rank draws the first ones, and
    gradients of gates are summed over the ranks in the steps that score. So it is where a graph
    lies on several ranks, beside others that have other graphs. Every rank then has to make one of
    these and to call :meth:`step` as often as the others.

    Args:
        model: With :class:`fastgt.nn.HeadGate` as the ``head_gate`` of its attention modules.
        active: Share of the heads of each layer that are active, rounded to a number of heads; they
            are drawn at random in the beginning.
        steps: Of the training, about.
        every, exchange, scored: Above.
        group: The ranks that decide together; None for all.

    Raises:
        TypeError, ValueError: A setting is out of range, leaves a layer without heads, or the model
            has no such gates.

    Source:
        Liu et al., GTSP, arXiv 2312.05479, section 3 (heads), with scores that are a head's own;
        death by a Taylor expansion as in Molchanov et al., arXiv 1611.06440, eq. 6; growth as in
        Evci et al., RigL, arXiv 1911.11134.

    Example:
        >>> import torch
        >>> from fastgt import Graph
        >>> from fastgt.nn import HeadGate, NeighborhoodAttention
        >>> from fastgt.pruning import HeadSparsity
        >>> gate = HeadGate(torch.ones(4, dtype=torch.bool))
        >>> layer = NeighborhoodAttention(16, heads=4, head_gate=gate, dense_gate_grad=True)
        >>> heads = HeadSparsity(layer, 0.5, steps=10, every=2, scored=1)
        >>> graph = Graph.from_edge_index(torch.tensor([[0, 1, 2], [1, 2, 0]]))
        >>> for _ in range(4):
        ...     layer(torch.randn(3, 16), graph).square().sum().backward()
        ...     heads.step()
        >>> int(gate.mask.sum())
        2
    """

    @torch.inference_mode(False)  # what it sums up is written to in training
    def __init__(
        self,
        model: nn.Module,
        active: float,
        *,
        steps: int,
        every: int = 200,
        exchange: float = 0.5,
        scored: int = 10,
        group: dist.ProcessGroup | None = None,
    ):
        if not 0 < active <= 1:
            raise ValueError(f"active must be above 0, to 1, got {active}")
        if not 0 <= exchange <= 1:
            raise ValueError(f"exchange must be from 0 to 1, got {exchange}")
        steps, every = integer("steps", steps), integer("every", every)
        scored = integer("scored", scored)
        if not 1 <= scored <= every or steps < 1:
            raise ValueError(
                f"scored must be from 1 to every, and steps positive, got scored={scored}, "
                f"every={every} and steps={steps}"
            )
        self.steps, self.every, self.exchange, self.scored = steps, every, exchange, scored
        self.group, self.done = group, 0
        self._layers: list[HeadGate] = []
        self._names: list[str] = []
        for name, module in _gated(model):
            gate = module.head_gate
            if not isinstance(gate, HeadGate):
                found = type(gate).__name__
                raise TypeError(f"the head_gate of {name!r} must be a HeadGate, got {found}")
            if not module.dense_gate_grad:
                raise ValueError(f"{name!r} needs dense_gate_grad=True: masked heads are scored")
            if any(gate is other for other in self._layers):
                raise ValueError(f"{name!r} shares its head_gate: each layer needs its own")
            count = round(active * len(gate.mask))
            if not count:
                raise ValueError(
                    f"active={active} leaves {name!r} none of its {len(gate.mask)} heads"
                )
            self._layers.append(gate)
            self._names.append(name)
            order = torch.randperm(len(gate.mask), device=gate.mask.device)
            if _has_ranks(group):
                dist.broadcast(order, group=group, group_src=0)
            gate.mask.zero_().index_fill_(0, order[:count], 1)
        if not self._layers:
            raise ValueError("model has no attention module with a HeadGate")
        self._sums = [torch.zeros(2, len(g.mask), device=g.mask.device) for g in self._layers]
        self._prepare()

    def step(self) -> None:
        """After the backward of every batch."""
        if self._scoring():
            for gate, sums, grad in zip(self._layers, self._sums, self._gradients(), strict=True):
                # a loss that overflowed says nothing about any head
                grad = torch.where(grad.isfinite().all(), grad, 0)
                sums[0] += gate.mask * grad
                sums[1] += grad.abs()
        self.done += 1
        if self.done % self.every == 0:
            self._update()
        self._prepare()

    def _gradients(self) -> list[Tensor]:
        """Of the losses of all ranks by each layer's gate."""
        if not _has_ranks(self.group):
            return [gate.take_gradient().float() for gate in self._layers]
        given = [gate.has_gradient for gate in self._layers]
        everywhere = torch.tensor(given, dtype=torch.uint8, device=self._sums[0].device)
        # a rank that raises alone would leave the others waiting
        dist.all_reduce(everywhere, dist.ReduceOp.MIN, self.group)
        if not everywhere.all():
            where = (everywhere == 0).nonzero().flatten().tolist()
            names = ", ".join(repr(self._names[i]) for i in where)
            raise RuntimeError(f"no backward has reached the head_gate of {names} on all ranks")
        grads = [gate.take_gradient().float() for gate in self._layers]
        for grad in grads:
            dist.all_reduce(grad, group=self.group)
        return grads

    def state_dict(self) -> dict[str, object]:
        """Where it stands; the masks are in the model's."""
        return {"done": self.done, "sums": [x.clone() for x in self._sums]}

    @torch.inference_mode(False)
    def load_state_dict(self, state: Mapping[str, object]) -> None:
        done, sums = integer("done", state["done"], 0), state["sums"]
        assert isinstance(sums, list)
        self.done = done
        for x, y in zip(self._sums, sums, strict=True):
            x.copy_(y)
        self._prepare()

    def _share(self) -> float:
        """Of the active heads that are exchanged now."""
        return self.exchange * (1 + math.cos(math.pi * min(1.0, self.done / self.steps))) / 2

    def _scoring(self) -> bool:
        """Whether the batch at hand counts."""
        left = self.done % self.every >= self.every - self.scored
        return left and self.done < self.steps

    def _prepare(self) -> None:
        for gate in self._layers:
            gate.score(self._scoring())

    def _update(self) -> None:
        for gate, sums in zip(self._layers, self._sums, strict=True):
            mask = gate.mask != 0
            active, masked = int(mask.sum()), int((~mask).sum())
            count = min(masked, math.ceil(self._share() * active))
            death = sums[0].abs().masked_fill(~mask, math.inf)
            growth = sums[1].masked_fill(mask, -math.inf)
            # of equal scores the first; all that died may come back only later
            dead = death.sort(stable=True).indices[:count]
            grown = growth.sort(stable=True, descending=True).indices[:count]
            gate.mask[dead], gate.mask[grown] = 0, 1
            sums.zero_()
