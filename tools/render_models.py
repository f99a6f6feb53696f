"""Tables of docs/models.md: sizes and results of models, published and here."""

from __future__ import annotations

import statistics
from typing import Any, get_type_hints

import torch
from render_cells import Rows

from fastgt import models
from fastgt.training.listing import parameters
from fastgt.training.published_recipes import RECIPES
from fastgt.training.recipe import Recipe
from fastgt.training.scores import metric


def results(model: str, trained: Rows) -> str:
    """A line a setting of the model in ``RECIPES``: data sets that share it stand together.

    A column without an entry is left out.
    """
    mine = [recipe for recipe in RECIPES.values() if recipe.model == model]
    rows = [["data", "metric", "published", "reached here", "parameters"]]
    groups: dict[str, list[Recipe]] = {}
    for recipe in mine:
        groups.setdefault(repr(recipe.config), []).append(recipe)
    for group in groups.values():
        told = next((x.published for x in group if x.published is not None), None)
        count = f"{parameters(group[0]):,}"
        if told is not None and told.parameters is not None:
            same = count == told.parameters
            count += ", as published" if same else f" (published: {told.parameters})"
        rows.append(
            [
                ", ".join(f"`{x.data}`" for x in group),
                metric(group[0].metric).name,
                "" if told is None else with_deviation(told.value, told.deviation),
                "; ".join(filter(None, (_reached(x, trained) for x in group))),
                count,
            ]
        )
    kept = [column for column in zip(*rows, strict=True) if any(column[1:])]
    lines = [f"| {' | '.join(cells)} |" for cells in zip(*kept, strict=True)]
    lines.insert(1, f"|{'---|' * len(kept)}")
    sources = {x.published.source: None for x in mine if x.published is not None}
    if sources:
        lines += ["", f"Published figures: {'; '.join(sources)}."]
    return "\n".join(lines)


def sizes(model: str, names: list[str]) -> str:
    """How many parameters the model has by each of those published settings."""
    make = getattr(models, model)
    config = get_type_hints(make.__init__)["config"]
    counts = []
    for name in names:
        with torch.device("meta"):
            made = make(config.published(name))
        counts.append(f"`{name}` {sum(x.numel() for x in made.parameters()):,}")
    return f"Parameters of `{config.__name__}.published(name)`: {', '.join(counts)}."


def with_deviation(value: float, deviation: float | None) -> str:
    return f"{value:.4f}" if deviation is None else f"{value:.4f} ± {deviation:.4f}"


def trained_alike(row: dict[str, Any]) -> tuple[str, str, str]:
    """What the runs of one line share: model, data, and the way where one pair has several."""
    return row["settings"]["model"], row["settings"]["data"], row.get("way", "")


def _reached(recipe: Recipe, trained: Rows) -> str:
    """On the test split, with the data's own title and what made the training another one."""
    ways: dict[tuple[str, str, str], Rows] = {}
    for row in trained:
        if trained_alike(row)[:2] == (recipe.model, recipe.data):
            ways.setdefault(trained_alike(row), []).append(row)
    told = []
    for runs in ways.values():
        tests = [x["test"] for x in runs]
        deviation = statistics.stdev(tests) if len(tests) > 1 else None
        options = f", with `{runs[0]['options']}`" if runs[0]["options"] else ""
        reached = with_deviation(statistics.mean(tests), deviation)
        told.append(f"{reached} ({runs[0]['title']}{options})")
    return "; ".join(told)
