"""What a module may take for granted of the layers inside it."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn.modules import module as hooks
from torch.utils._python_dispatch import is_traceable_wrapper_subclass


def is_plain_linear(layer: Any, kind: type[nn.Module] = nn.Linear) -> bool:
    """Whether a call of the layer is ``x W^T + b``, of its parameters as they stand, and no more.

    ``kind`` is the class that a plain layer has, with a weight and a bias like ``nn.Linear``'s.
    Only then may a module read the parameters instead of the call. All else is called: adapters,
    subclasses, as parametrizations, sharding and quantisation make them, an instance with a forward
    of its own or compiled by itself, hooks of the layer or of all modules, and weights that are
    tensors of a type of their own.
    """
    return (
        type(layer) is kind
        and not has_hooks(layer)
        and "forward" not in layer.__dict__
        and layer._compiled_call_impl is None
        and _is_plain_tensor(layer.weight)
        and (layer.bias is None or _is_plain_tensor(layer.bias))
    )


def is_linear(layer: nn.Module) -> bool:
    """Whether it is an ``nn.Linear``, or torch-geometric's, which has the same fields."""
    kinds = {(kind.__module__, kind.__name__) for kind in type(layer).__mro__}
    theirs = "torch_geometric.nn.dense.linear", "Linear"  # by name: it need not be installed
    return isinstance(layer, nn.Linear) or theirs in kinds


def has_hooks(layer: nn.Module) -> bool:
    """Whether a call of the layer runs hooks, its own or those of all modules."""
    return bool(
        layer._forward_pre_hooks
        or layer._forward_hooks
        or layer._backward_pre_hooks
        or layer._backward_hooks
        or hooks._global_forward_pre_hooks
        or hooks._global_forward_hooks
        or hooks._global_backward_pre_hooks
        or hooks._global_backward_hooks
    )


def reset_sublayers(module: nn.Module) -> None:
    """Reset what is inside a module, in the order in which it was made: a seed draws the same.

    What has no ``reset_parameters``, as containers and adapters, passes that on to its own layers.

    Raises:
        TypeError: A layer has parameters of its own and nothing that draws them.
    """
    for layer in module.children():
        if callable(reset := getattr(layer, "reset_parameters", None)):
            reset()
            continue
        reset_sublayers(layer)
        if callable(reset := getattr(layer, "_reset_parameters", None)):  # PyTorch's attention
            reset()
        elif own := [name for name, _ in layer.named_parameters(recurse=False)]:
            raise TypeError(
                f"{type(layer).__name__} has the parameter {own[0]!r} and no reset_parameters: "
                "give it one, which draws what it has"
            )


def check_rows(norm: nn.Module, x: Tensor, where: str, of: str, instead: str = "") -> None:
    """Refuse one row where a batch norm in training needs two; the norm may stand inside."""
    if x.shape[0] != 1:
        return
    if any(type(layer) is nn.BatchNorm1d and layer.training for layer in norm.modules()):
        raise ValueError(
            f"{where} is a batch norm in training and got 1 {of}: a variance takes 2 at least. "
            f"Make larger batches, or leave such a one out (drop_last of a DataLoader){instead}"
        )


def _is_plain_tensor(x: object) -> bool:
    # the usual types first: this is asked at every call
    return type(x) in (nn.Parameter, Tensor) or (
        isinstance(x, Tensor) and not is_traceable_wrapper_subclass(x)
    )
