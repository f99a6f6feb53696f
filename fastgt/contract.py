"""What travels through an operator: from its public call over autograd and the registered op to a
launcher. A type is declared here once; the schema of a registered op and the places of its
arguments come from the type's fields."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, get_type_hints

from torch import Tensor


class AuxRequest(NamedTuple):
    """Which results an operator gives beside its output. Each operator says which ones it has.

    Example:
        >>> from fastgt import AuxRequest
        >>> AuxRequest(lse=True)
        AuxRequest(lse=True, weights=False, edge_scores=False)
    """

    lse: bool = False
    weights: bool = False
    edge_scores: bool = False


class Aux(NamedTuple):
    """The results that an :class:`AuxRequest` asked for; None where it did not.

    Attributes:
        lse: Logarithm of the sum of exponentials of each row's logits.
        weights: The attention weight of every edge, before dropout.
        edge_scores: The logit of every edge before its sum over channels.
    """

    lse: Tensor | None = None
    weights: Tensor | None = None
    edge_scores: Tensor | None = None


class Logit(NamedTuple):
    """How a logit is made from a product: ``clamp(scale * product, low, high)``; and what its row's
    denominator has besides, ``eps``."""

    scale: float
    low: float
    high: float
    eps: float


class HeadMask(NamedTuple):
    """Which heads are active: of each row, and of each column. No edge leaves its graph."""

    rows: Tensor | None  # [1 or N_rows, H] bool
    cols: Tensor | None  # [1 or N_cols, H] bool


_SCHEMA_TYPES = {
    Tensor: "Tensor",
    Tensor | None: "Tensor?",
    float: "float",
    bool: "bool",
    int: "int",
    str: "str",
    tuple[Tensor, ...]: "Tensor[]",
    tuple[bool, ...]: "bool[]",
}


class Signature:
    """The arguments of a registered op: the fields of NamedTuples, one type after another.

    Example:
        >>> from fastgt.contract import Logit, Signature
        >>> signature = Signature(Logit)
        >>> signature.schema
        'float scale, float low, float high, float eps'
        >>> signature.split([0.5, -5.0, 5.0, 0.0])
        [Logit(scale=0.5, low=-5.0, high=5.0, eps=0.0)]
    """

    def __init__(self, *types: type):
        self.schema = ", ".join(
            f"{_SCHEMA_TYPES[hint]} {name}"
            for kind in types
            for name, hint in get_type_hints(kind).items()
        )
        self._places = []
        end = 0
        for kind in types:
            begin, end = end, end + len(kind._fields)  # type: ignore[attr-defined]
            self._places.append((kind, slice(begin, end)))
        self.size = end

    def split(self, flat: Sequence[Any]) -> list[Any]:
        """A value of each type, from the values of all fields in order."""
        return [kind(*flat[place]) for kind, place in self._places]
