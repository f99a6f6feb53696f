"""One line that makes a torch-geometric model run on fastgt, and one that undoes it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn

if TYPE_CHECKING:
    from fastgt.pyg import Report


def accelerate(model: nn.Module, *, dry_run: bool = False) -> Report:
    """Make torch-geometric's layers in a model run on fastgt's operators, in place.

    Each layer gets the class of the same name in :mod:`fastgt.pyg`. It stays the same object:
    parameters, buffers, hooks and training flags are untouched, and optimizers hold what they held.
    Every forward of the model makes one Graph of an ``edge_index`` for all its layers
    (:func:`fastgt.pyg.shared_graphs`).

    A subclass of a layer is kept, since it may compute something else. What cannot be fused at a
    call runs torch-geometric's own code (:func:`fastgt.pyg.explain`). Results are torch-geometric's
    to rounding, but for dropout, which drops other weights from the same seed, and for Performer,
    SGFormer and Polynormer attention, where padded nodes no longer count: a warning says so.

    Args:
        model: Any module, or one layer itself.
        dry_run: Change nothing; only report.

    Returns:
        A report of what was replaced, and of what was kept and why; ``print`` shows it as lines. A
        model without anything to replace gives a warning.

    Raises:
        ImportError: torch-geometric is not installed.
        TypeError: ``model`` is no module.

    Example:
        >>> import torch
        >>> import fastgt
        >>> from torch_geometric.nn import GAT
        >>> model = GAT(8, 16, num_layers=2, out_channels=4, v2=True)
        >>> print(fastgt.accelerate(model))
        2 layers replaced, 0 kept
          convs.0: GATv2Conv
          convs.1: GATv2Conv
        >>> model(torch.randn(3, 8), torch.tensor([[0, 1], [1, 2]])).shape
        torch.Size([3, 4])
    """
    from fastgt.pyg import accelerating

    return accelerating.accelerate(model, dry_run=dry_run)


def restore(model: nn.Module) -> nn.Module:
    """Undo :func:`accelerate`: the layers that it replaced are torch-geometric's again.

    Args:
        model: What was accelerated, or a model of which parts were.

    Returns:
        The same model.

    Raises:
        ImportError: torch-geometric is not installed.
        TypeError: ``model`` is no module.

    Example:
        >>> import fastgt
        >>> from torch_geometric.nn import GAT
        >>> model = GAT(8, 16, num_layers=2)
        >>> _ = fastgt.accelerate(model)
        >>> type(fastgt.restore(model).convs[0]).__module__
        'torch_geometric.nn.conv.gat_conv'
    """
    from fastgt.pyg import accelerating

    accelerating.restore(model)
    return model
