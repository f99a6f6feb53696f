"""Data sets by name."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

from fastgt.datasets.block_models import cluster, pattern
from fastgt.datasets.dd import dd
from fastgt.datasets.graph_set import GraphSet
from fastgt.datasets.line_drawings import drawn_lines
from fastgt.datasets.molhiv import molhiv, molhiv_small
from fastgt.datasets.node_graphs import amazon_computers, citations, debian, heterophilous
from fastgt.datasets.node_set import NodeSet
from fastgt.datasets.ogb_sets import DATASETS as OF_OGB
from fastgt.datasets.power import power_grid
from fastgt.datasets.pyg_sets import DATASETS as OF_PYG
from fastgt.datasets.zinc import zinc12k

SMALL = 1000  # graphs to train on


def _drawn(draw: Callable[[], GraphSet], folder: Path | None) -> GraphSet:
    if folder is not None:
        raise ValueError(f"the set is drawn and has no file: leave out its folder, {folder}")
    return draw()


DATASETS: dict[str, Callable[[Path | None], GraphSet | NodeSet]] = {
    "zinc12k": zinc12k,
    "dd": dd,
    "molhiv": molhiv,
    "molhiv_small": molhiv_small,
    "cora": partial(citations, "cora", "Cora", 7),
    "citeseer": partial(citations, "citeseer", "CiteSeer", 6),
    "cora_drawn": partial(citations, "cora", "Cora", 7, splits="drawn"),
    "citeseer_drawn": partial(citations, "citeseer", "CiteSeer", 6, splits="drawn"),
    "cora_sgformer": partial(citations, "cora", "Cora", 7, splits="sgformer"),
    "citeseer_sgformer": partial(citations, "citeseer", "CiteSeer", 6, splits="sgformer"),
    "amazon_computers": amazon_computers,
    "tolokers": partial(heterophilous, "tolokers", "Tolokers", 2),
    "minesweeper": partial(heterophilous, "minesweeper", "Minesweeper", 2),
    "actor": partial(heterophilous, "actor", "Actor", 5),
    "squirrel_filtered": partial(heterophilous, "squirrel_filtered", "Squirrel, filtered", 5),
    "debian": debian,
    "power10k": partial(power_grid, "power10k", "Power grid of 10,000 buses"),
    "power70k": partial(power_grid, "power70k", "Power grid of 70,000 buses"),
    "pattern": partial(_drawn, pattern),
    "cluster": partial(_drawn, cluster),
    "pattern_small": partial(_drawn, partial(pattern, SMALL)),
    "cluster_small": partial(_drawn, partial(cluster, SMALL)),
    "drawn_lines": partial(_drawn, drawn_lines),
    **OF_PYG,
    **OF_OGB,
}


def load(name: str, folder: str | Path | None = None) -> GraphSet | NodeSet:
    """The data set of that name.

    Args:
        name: One of ``DATASETS``.
        folder: That holds its file, or the file. None: that which ``FASTGT_DATA`` names, unless the
            set is drawn.

    Raises:
        FileNotFoundError: Its file is absent.
        ValueError: There is no such name, the file is damaged, or ``folder`` is given for a set
            that is drawn; says how.

    Example:
        >>> from fastgt.datasets import load
        >>> packages = load("debian")
        >>> packages.node.shape, packages.classes
        (torch.Size([63436, 2000]), 58)
    """
    if name not in DATASETS:
        raise ValueError(f"name must be one of {', '.join(DATASETS)}, got {name!r}")
    return DATASETS[name](None if folder is None else Path(folder))
