"""``fastgt train --list``: which models are trained on which data sets, and what others reached."""

from __future__ import annotations

from typing import Any

import torch

from fastgt.terminal import wrapped
from fastgt.training.published_recipes import MODELS, RECIPES
from fastgt.training.recipe import Recipe


def rows() -> list[dict[str, Any]]:
    """A row a recipe; draws no random number and reads no data."""
    return [
        {
            "model": recipe.model,
            "data": recipe.data,
            "parameters": parameters(recipe),
            "metric": recipe.metric,
            "published": None if recipe.published is None else recipe.published.value,
            "deviation": None if recipe.published is None else recipe.published.deviation,
            "source": None if recipe.published is None else recipe.published.source,
            "published_parameters": None
            if recipe.published is None
            else recipe.published.parameters,
        }
        for recipe in RECIPES.values()
    ]


def table(found: list[dict[str, Any]]) -> str:
    """Of those rows, within 100 columns."""
    lines = [
        f"{'model':<22} {'data':<20} {'parameters':>10}  {'metric':<17} {'published':<17} source"
    ]
    sources = sorted({row["source"] for row in found if row["source"] is not None})
    for row in found:
        published, source = "", ""
        if row["published"] is not None:
            spread = "" if row["deviation"] is None else f" +- {row['deviation']:.4g}"
            published = f"{row['published']:.4g}{spread}"
            source = f"[{sources.index(row['source']) + 1}]"
        lines.append(
            f"{row['model']:<22} {row['data']:<20} {row['parameters']:>10,}  "
            f"{row['metric']:<17} {published:<17} {source}".rstrip()
        )
    lines += [
        "",
        "pyg: and ogb: read files of these packages. Published: blank where there is no figure.",
        *(wrapped(f"[{i}] {source}") for i, source in enumerate(sources, 1)),
    ]
    return "\n".join(lines)


def parameters(recipe: Recipe) -> int:
    """How many numbers the recipe's model learns, counted without making them."""
    with torch.device("meta"):
        model = MODELS[recipe.model].make(recipe.config)
    return sum(x.numel() for x in model.parameters())
