"""The schema of a registered op, made of the types in ``contract.py``."""

from __future__ import annotations

from typing import Any, get_type_hints

from torch import Tensor

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
_MISSING = object()


class Signature:
    """The arguments of a registered op: the fields of NamedTuples, one type after another.

    The last fields keep their defaults. A call that leaves them out costs less: PyTorch's
    dispatcher hands over no last argument that equals its default.

    Example:
        >>> from fastgt.contract import HeadMask, Logit
        >>> from fastgt.signature import Signature
        >>> signature = Signature(Logit, HeadMask)
        >>> signature.schema
        'float scale, float low, float high, float eps, Tensor? rows=None, Tensor? cols=None'
        >>> signature.split((0.5, -5.0, 5.0, 0.0))
        [Logit(scale=0.5, low=-5.0, high=5.0, eps=0.0), HeadMask(rows=None, cols=None)]
    """

    def __init__(self, *types: type):
        fields = [field for kind in types for field in get_type_hints(kind).items()]
        if len(dict(fields)) < len(fields):
            raise ValueError(
                f"fields must have different names, got {[name for name, _ in fields]}"
            )
        defaults = [
            kind._field_defaults.get(name, _MISSING)  # type: ignore[attr-defined]
            for kind in types
            for name in kind._fields  # type: ignore[attr-defined]
        ]
        last = max((i + 1 for i, x in enumerate(defaults) if x is _MISSING), default=0)
        arguments = [f"{_SCHEMA_TYPES[hint]} {name}" for name, hint in fields]
        for i in range(last, len(arguments)):
            arguments[i] += f"={defaults[i]}"
        self.schema = ", ".join(arguments)
        self.size = len(fields)
        self._defaults = tuple(defaults[last:])
        self._places = []
        self._left_out: dict[int, tuple[int, list[Any]]] = {}
        end = 0
        for i, kind in enumerate(types):
            if end >= last:
                self._left_out[end] = i, [kind() for kind in types[i:]]
            begin, end = end, end + len(kind._fields)  # type: ignore[attr-defined]
            self._places.append((kind, slice(begin, end)))

    def split(self, flat: tuple[Any, ...]) -> list[Any]:
        """A value of each type, from the values of all fields in order."""
        # not kind(*...), and no type anew that a call has left out: launches wait for this
        if len(flat) in self._left_out:
            count, rest = self._left_out[len(flat)]
            return [tuple.__new__(kind, flat[at]) for kind, at in self._places[:count]] + rest
        if len(flat) < self.size:
            flat += self._defaults[len(flat) - self.size :]
        return [tuple.__new__(kind, flat[at]) for kind, at in self._places]


def results_schema(kind: type) -> str:
    """What a registered op gives: the fields of one type."""
    return ", ".join(f"{_SCHEMA_TYPES[x]} {name}" for name, x in get_type_hints(kind).items())
