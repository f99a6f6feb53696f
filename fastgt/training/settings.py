"""Settings of a recipe and of its model's config, changed by ``key=value``."""

from __future__ import annotations

import math
import types
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, replace
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from fastgt.training.recipe import Recipe


def changed(recipe: Recipe, assignments: Sequence[str]) -> Recipe:
    """The recipe with these settings, which are read as the types of their fields say.

    Args:
        assignments: ``"lr=1e-3"``, ``"layers=4"``, ``"node_types=119,4"``, ``"clip=none"``.

    Raises:
        ValueError: A key is unknown or there twice, or a value is not of its type.

    Example:
        >>> from fastgt.training.published_recipes import RECIPES
        >>> from fastgt.training.settings import changed
        >>> recipe = changed(RECIPES["graph_gps", "zinc12k"], ["layers=4", "clip=none"])
        >>> recipe.config.layers, recipe.clip
        (4, None)
    """
    own, config = types_of(recipe)
    given: dict[str, Any] = {}
    for assignment in assignments:
        key, equals, text = assignment.partition("=")
        if not equals:
            raise ValueError(f"--set takes key=value, got {assignment!r}")
        if key not in own | config:
            raise ValueError(f"--set {key}: no such setting; known are {', '.join(own | config)}")
        if key in given:
            raise ValueError(f"--set {key} is there twice")
        given[key] = parsed(key, text, (own | config)[key])
    of_config = {key: x for key, x in given.items() if key in config}
    if of_config:
        recipe = replace(recipe, config=replace(recipe.config, **of_config))
    return replace(recipe, **{key: x for key, x in given.items() if key in own})


def types_of(recipe: Recipe) -> tuple[dict[str, Any], dict[str, Any]]:
    """The types of a recipe's own settings and of its config's, by name."""
    hints, of_config = get_type_hints(type(recipe)), get_type_hints(type(recipe.config))
    own = {name: hints[name] for name in recipe.settable}
    return own, {x.name: of_config[x.name] for x in fields(recipe.config)}


def parsed(key: str, text: str, hint: Any) -> Any:
    """A value of that type.

    Example:
        >>> from fastgt.training.settings import parsed
        >>> parsed("clip", "1.0", float | None), parsed("kinds", "5,6,2", tuple[int, ...])
        (1.0, (5, 6, 2))
    """
    for kind in _alternatives(hint):
        try:
            return _read(text, kind)
        except ValueError:
            continue
    raise ValueError(f"--set {key} must be {_described(hint)}, got {text!r}")


def _alternatives(hint: Any) -> tuple[Any, ...]:
    return get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)


def _read(text: str, kind: Any) -> Any:
    """Raises ValueError where the text is not of that kind."""
    if get_origin(kind) is Literal:
        return get_args(kind)[[str(x) for x in get_args(kind)].index(text)]
    if get_origin(kind) in (tuple, Sequence, list) or kind in (tuple, list):
        inside = (get_args(kind) or (int,))[0]
        parts = text.strip("()").split(",")
        if len(parts) > 1 and not parts[-1]:
            parts.pop()  # as Python writes a tuple of one
        return () if parts == [""] else tuple(_read(part.strip(), inside) for part in parts)
    if get_origin(kind) is Mapping:
        return _shares(text)
    if kind not in _READERS:
        raise TypeError(f"no reader of settings of type {kind}")
    return _READERS[kind](text)


def _shares(text: str) -> dict[str, float]:
    """``"heads:0.5,tokens:0.25"``, or as Python writes it."""
    found: dict[str, float] = {}
    for part in filter(None, text.strip("{}").split(",")):
        name, _, share = part.partition(":")
        name = name.strip(" '")
        if name in found:
            raise ValueError(text)
        found[name] = _float(share)
    return found


def _none(text: str) -> None:
    if text.lower() != "none":
        raise ValueError(text)


def _bool(text: str) -> bool:
    if text.lower() not in ("true", "false"):
        raise ValueError(text)
    return text.lower() == "true"


def _int(text: str) -> int:
    if not text.removeprefix("-").isdecimal() or len(text) > 20:
        raise ValueError(text)
    return int(text)


def _float(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(text)
    return number


def _described(hint: Any) -> str:
    return " or ".join(_name(kind) for kind in _alternatives(hint))


def _name(kind: Any) -> str:
    if get_origin(kind) is Literal:
        return " or ".join(repr(x) for x in get_args(kind))
    if get_origin(kind) is Mapping:
        return "names and numbers, as heads:0.5,tokens:0.25"
    return _NAMES.get(kind, "whole numbers between commas")


_READERS: dict[Any, Callable[[str], Any]] = {
    type(None): _none,
    bool: _bool,
    int: _int,
    float: _float,
    str: str,
}
_NAMES = {
    type(None): "none",
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "a text",
}
