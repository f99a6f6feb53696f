"""Power grids, whose voltages are predicted from loads, generation and lines."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fastgt.datasets import archive
from fastgt.datasets.node_graphs import edges_of, random_splits
from fastgt.datasets.node_set import NodeSet
from fastgt.graph import Graph

BUS_TYPES = 3  # load, generator, reference
_TYPE, _VM, _VA = 0, 6, 7
_GIVEN = [1, 2, 3, 4, 8]  # Pd, Qd, Gs, Bs, base kV
_WIDTHS = {"bus": 12, "branch": 9, "gen_pq": 2}


def power_grid(stem: str, title: str, folder: Path | None) -> NodeSet:
    """The solved power flow of a synthetic grid, of ``stem.npz``: a random half trains.

    Columns of the file are MATPOWER's. ``y`` ``[N, 2]`` is the magnitude and the angle of a bus's
    voltage. A bus has its type in three columns, then what a power flow is given of it: Pd, Qd, Gs,
    Bs, base kV, generated P, and the magnitude where a generator holds it. Each branch stands both
    ways with its nine numbers and its direction, 1 or -1. All but types and directions have mean 0
    and deviation 1. Targets have them over the nodes to train on.

    Source:
        Birchfield et al., IEEE Trans. Power Systems 32, 2017.
    """
    name, arrays = archive.read(folder, stem, ("edge_index", *_WIDTHS))
    with archive.checking(name):
        for key, width in _WIDTHS.items():
            archive.check_array(key, arrays[key], 2, "f")
            if arrays[key].shape[1] != width or not np.isfinite(arrays[key]).all():
                raise ValueError(f"{key} must be finite numbers in {width} columns")
        bus, branch, gen = (torch.from_numpy(arrays[key].astype(np.float64)) for key in _WIDTHS)
        if len(gen) != len(bus):
            raise ValueError(f"gen_pq must have {len(bus)} rows, got {len(gen)}")
        edge_index = edges_of(arrays["edge_index"], len(bus))
        if len(branch) != edge_index.shape[1]:
            raise ValueError(f"branch must have {edge_index.shape[1]} rows, got {len(branch)}")
        kind = bus[:, _TYPE].long() - 1
        if ((kind < 0) | (kind >= BUS_TYPES)).any():
            raise ValueError(f"bus has types beyond 1 to {BUS_TYPES}")
        splits = random_splits(len(bus), (0.5, 0.25), 1)
        held = torch.where(kind > 0, bus[:, _VM], 1.0)
        given = torch.cat([bus[:, _GIVEN], gen[:, :1], held[:, None]], 1)
        way = torch.ones(len(branch), 1)
        lines = _scaled(branch)
        y = bus[:, [_VM, _VA]]
        return NodeSet(
            Graph.from_edge_index(torch.cat([edge_index, edge_index.flip(0)], 1), len(bus)),
            torch.cat([torch.eye(BUS_TYPES)[kind], _scaled(given)], 1),
            torch.cat([torch.cat([lines, way], 1), torch.cat([lines, -way], 1)]),
            _scaled(y, y[splits[0]["train"]]),
            splits,
            title=title,
        )


def _scaled(x: Tensor, of: Tensor | None = None) -> Tensor:
    """float32 columns of mean 0 and deviation 1, those that never change 0."""
    of = x if of is None else of
    deviation = of.std(0, unbiased=False)
    return ((x - of.mean(0)) / torch.where(deviation > 0, deviation, 1)).float()
