"""What ``fastgt bench`` measures: operators, layers and models, and the problems of each."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from fastgt.bench import (
    additive_attention,
    aggregate,
    attention,
    channelwise_attention,
    drop_in,
    global_attention,
    linear_attention,
    masked_heads,
    models,
    peer_paths,
    peers,
    segment_pool,
    transformer_conv,
)
from fastgt.bench.harness import Case
from fastgt.testing import PROBLEMS


@dataclass(frozen=True)
class Operator:
    """One benchmark.

    Attributes:
        case: From a problem's name, and sizes, dtype and device, to its case.
        peers: Whom it is compared with.
        problems: Those it has.
        usual, quick: Those that run where none is named.
        first: Who is compared.
        epochs: Of a model: rows of training epochs and inference, in the place of a case's.
    """

    case: Callable[..., Case]
    peers: tuple[str, ...]
    problems: tuple[str, ...]
    usual: tuple[str, ...]
    quick: tuple[str, ...]
    first: str = "fastgt"
    epochs: Callable[..., list[dict[str, Any]]] | None = None

    @property
    def smallest(self) -> str:
        """What is over soon."""
        return "molecules" if "molecules" in self.problems else self.quick[0]

    def takes(self, option: str) -> bool:
        """Whether its case has that keyword."""
        return option in inspect.signature(self.case).parameters

    def sizes(self, options: dict[str, Any]) -> dict[str, int]:
        """Heads and width, with what is usual where the options name none."""
        known = inspect.signature(self.case).parameters
        names = [name for name in ("heads", "width") if name in known]
        return {name: options.get(name, known[name].default) for name in names}

    def options(self, **given: Any) -> dict[str, Any]:
        """Those that were given; its own defaults hold for the others."""
        return {name: x for name, x in given.items() if x is not None and self.takes(name)}


_ALL = tuple(PROBLEMS)
_REAL = ("zinc", "cora", "citeseer", "actor", "squirrel")
_MORE = ("minesweeper", "power10k", "power70k", "amazon_computers", "tolokers", "dd", "debian")
_DRAWN = ("power_law", "molecules", "pattern", "cluster", "superpixels", "points", "banded")
_COMPOSED = ("pyg", "torch-scatter")
_FEW = ("power_law", "zinc", "cora", "amazon_computers")

OPERATORS = {
    "attention": Operator(
        attention.case,
        (*peers.ATTENTION, *peer_paths.ATTENTION),
        _ALL,
        (*_DRAWN, "complete", *_REAL, *_MORE, "flights"),
        ("molecules", "power_law", *_REAL, "minesweeper"),
    ),
    "additive_attention": Operator(additive_attention.case, _COMPOSED, _ALL, _FEW, ("cora",)),
    "gat": Operator(additive_attention.gat, _COMPOSED, _ALL, _FEW, ("cora",)),
    "channelwise_attention": Operator(
        channelwise_attention.case, _COMPOSED, _ALL, (*_FEW, "points"), ("cora",)
    ),
    "aggregate": Operator(aggregate.sums, (*_COMPOSED, "torch.sparse"), _ALL, _FEW, ("cora",)),
    "gcn": Operator(aggregate.gcn, (*_COMPOSED, "torch.sparse"), _ALL, _FEW, ("cora",)),
    "gine": Operator(aggregate.gine, _COMPOSED, _ALL, _FEW, ("zinc",)),
    "gated_aggregate": Operator(aggregate.gated, _COMPOSED, _ALL, _FEW, ("cora",)),
    "segment_softmax": Operator(aggregate.softmax, _COMPOSED, _ALL, _FEW, ("cora",)),
    "segment_pool": Operator(
        segment_pool.case,
        (*_COMPOSED, "torch.segment_reduce"),
        _ALL,
        ("zinc", "molecules", "dd", "pattern"),
        ("zinc",),
    ),
    "global_attention": Operator(
        global_attention.case,
        ("padded SDPA", "pyg"),
        (linear_attention.RAGGED, *_ALL),
        (linear_attention.RAGGED, "zinc", "dd", "pattern"),
        ("zinc",),
    ),
    "linear_attention": Operator(
        linear_attention.case,
        ("padded einsum", *peer_paths.LINEAR_ATTENTION),
        (linear_attention.RAGGED, *_ALL),
        (linear_attention.RAGGED, "zinc", "dd", "cora"),
        (linear_attention.RAGGED,),
    ),
    "performer": Operator(
        linear_attention.performer,
        ("pyg", "pyg, padded keys zeroed"),
        (linear_attention.RAGGED, *_ALL),
        (linear_attention.RAGGED, "zinc", "dd"),
        (linear_attention.RAGGED,),
    ),
    "transformer_conv": Operator(
        transformer_conv.case,
        ("pyg", "pyg, compiled"),
        _ALL,
        ("power_law", "molecules", "zinc", "cora"),
        ("molecules", "cora"),
    ),
    "masked_heads": Operator(
        masked_heads.case,
        tuple(f"{active} of 8" for active in (1, 2, 4, 6, 8)),
        _ALL,
        ("power_law",),
        ("power_law",),
        first="no gate",
    ),
}

OPERATORS |= {
    model: Operator(
        partial(models.case, model),
        (
            *("fastgt, compiled", "pyg", "pyg, compiled"),
            *(["pyg, padded keys zeroed"] if model == "gps" else []),
        ),
        problems,
        problems,
        problems[:1] if model == "graph_transformer" else (),
        epochs=partial(models.epochs, model),
    )
    for model, problems in models.MODELS.items()
}

OPERATORS |= {
    f"drop_in_{model}": Operator(
        partial(drop_in.case, model),
        ("pyg", "pyg, compiled"),
        _ALL,
        ("tolokers", "amazon_computers", "debian", "zinc"),
        ("molecules",),
    )
    for model in drop_in.MODELS
}

# peers whose sources are found under --peer-path
EXTERNAL = {*peer_paths.ATTENTION, *peer_paths.LINEAR_ATTENTION}

# heads and width of attention in published models
SHAPES = {
    "gt_zinc": (8, 8),  # Dwivedi and Bresson, arXiv 2012.09699
    "gt_sbm": (8, 10),
    "gps_cluster": (8, 6),  # Rampasek et al., arXiv 2205.12454
    "gps_wide": (4, 13),
    "gps_zinc": (4, 16),
    "scene_graphs": (12, 64),  # GT with edges at d = 768
    "one_head": (1, 128),
}
