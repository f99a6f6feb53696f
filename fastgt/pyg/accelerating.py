"""torch-geometric's layers in a model become fastgt's, and back."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch_geometric.nn import MessagePassing

from fastgt.pyg.fused import MARK, Fused, check_module
from fastgt.pyg.gat_conv import GATConv, GATv2Conv
from fastgt.pyg.gine_conv import GINEConv
from fastgt.pyg.gps_conv import GPSConv
from fastgt.pyg.hgt_conv import HGTConv
from fastgt.pyg.linear_attention import (
    PerformerAttention,
    PolynormerAttention,
    Ragged,
    SGFormerAttention,
)
from fastgt.pyg.point_transformer_conv import PointTransformerConv
from fastgt.pyg.res_gated_graph_conv import ResGatedGraphConv
from fastgt.pyg.sharing import enter, leave
from fastgt.pyg.transformer_conv import TransformerConv

LAYERS: tuple[type[Any], ...] = (
    GATConv,
    GATv2Conv,
    GINEConv,
    GPSConv,
    HGTConv,
    PerformerAttention,
    PointTransformerConv,
    PolynormerAttention,
    ResGatedGraphConv,
    SGFormerAttention,
    TransformerConv,
)
_OURS = {layer.PYG: layer for layer in LAYERS}


@dataclass(frozen=True)
class Report:
    """What :func:`fastgt.accelerate` did, by the names of layers in the model.

    Attributes:
        replaced: The class that each replaced layer has now.
        kept: Why a layer of torch-geometric was kept.
        notes: What is different in a replaced layer.
    """

    replaced: dict[str, str] = field(default_factory=dict)
    kept: dict[str, str] = field(default_factory=dict)
    notes: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = [f"{len(self.replaced)} layers replaced, {len(self.kept)} kept"]
        for name, kind in self.replaced.items():
            note = f" ({self.notes[name]})" if name in self.notes else ""
            lines.append(f"  {name or 'the model'}: {kind}{note}")
        lines += [f"  {name or 'the model'}: kept, {why}" for name, why in self.kept.items()]
        return "\n".join(lines)


def accelerate(model: nn.Module, *, dry_run: bool = False) -> Report:
    """Replace in place; see :func:`fastgt.accelerate`."""
    check_module(model)
    report = Report()
    for name, layer in model.named_modules():
        kind = type(layer)
        ours = _OURS.get(kind)
        if ours is not None:
            why = _why_kept(layer)
            if why:
                report.kept[name] = why
                continue
            report.replaced[name] = kind.__name__
            if issubclass(ours, Ragged):
                report.notes[name] = "padded nodes no longer count: outputs differ from PyG's"
            if not dry_run:
                _change(layer, ours)
                setattr(layer, MARK, True)
        elif isinstance(layer, Fused):
            report.kept[name] = "it is fastgt's already"
        elif kind.__module__.startswith("torch_geometric.nn.conv"):
            report.kept[name] = f"fastgt has no {kind.__name__}"
        elif any(isinstance(layer, theirs) for theirs in _OURS):
            report.kept[name] = f"{kind.__name__} is a subclass with code of its own"
    if not report.replaced:
        why = "; ".join(f"{name or 'the model'}: {x}" for name, x in report.kept.items())
        names = ", ".join(layer.__name__ for layer in LAYERS)
        warnings.warn(
            f"there is nothing to replace in {type(model).__name__}: "
            f"{why or f'it has no layer of torch-geometric among {names}'}",
            stacklevel=3,
        )
    elif not dry_run:
        _share(model)
    for name, note in report.notes.items():
        warnings.warn(f"{name or 'the model'}: {note}", stacklevel=3)
    return report


def restore(model: nn.Module) -> None:
    """Undo; see :func:`fastgt.restore`."""
    check_module(model)
    for layer in model.modules():
        if vars(layer).get(MARK):
            back(layer)
        # parts of the model may have been accelerated before it
        for hooks, hook in (
            (layer._forward_pre_hooks, _enter),
            (layer._forward_hooks, _leave),
        ):
            for number in [number for number, x in hooks.items() if x is hook]:
                del hooks[number]
                layer._forward_hooks_always_called.pop(number, None)


def replace(parent: nn.Module, name: str) -> None:
    """Replace one child of a layer of ours, if it is among those that can be."""
    child = getattr(parent, name)
    ours = _OURS.get(type(child))
    if ours is not None:
        _change(child, ours)


def back(layer: Any) -> None:
    """A replaced layer has torch-geometric's class again."""
    ours = next(base for base in type(layer).__mro__ if base in LAYERS)
    theirs = layer.PYG if type(layer) is ours else _on_another(type(layer), ours, layer.PYG)
    _change(layer, theirs)
    for name in (MARK, "why_pyg"):
        vars(layer).pop(name, None)


def _on_another(kind: type[Any], base: type[Any], other: type[Any]) -> type[Any]:
    """The class that a parametrization or sharding has made of one layer, made of another."""
    bases = tuple(other if x is base else x for x in kind.__bases__)
    held = {k: x for k, x in vars(kind).items() if k not in ("__dict__", "__weakref__")}
    return type(kind.__name__, bases, held)


def _change(layer: Any, kind: type[Any]) -> None:
    """Another class for a layer. PyG binds propagate to one that is, or was, explained: anew."""
    before = type(layer)
    layer.__class__ = kind
    bound = getattr(vars(layer).get("propagate"), "__func__", None)
    if bound is None or bound not in (before._jinja_propagate, before._orig_propagate):
        return
    if layer.explain or layer.decomposed_layers > 1:
        layer.propagate = MessagePassing.propagate.__get__(layer, MessagePassing)
    else:
        del layer.propagate


def _why_kept(layer: nn.Module) -> str:
    if "forward" in vars(layer):
        return "it has a forward of its own"
    if isinstance(layer, torch.jit.ScriptModule):
        return "it is compiled by torch.jit"
    return ""


def _share(model: nn.Module) -> None:
    """Every forward of the model is a scope of shared graphs."""
    if _enter not in model._forward_pre_hooks.values():
        model.register_forward_pre_hook(_enter, prepend=True)
        model.register_forward_hook(_leave, always_call=True)


def _enter(model: nn.Module, args: Any) -> None:
    if not torch.compiler.is_compiling():
        enter()


def _leave(model: nn.Module, args: Any, out: Any) -> None:
    if not torch.compiler.is_compiling():
        leave()


__all__ = ["LAYERS", "Report", "accelerate", "restore"]
