"""The arguments of ``fastgt train``, and what they start."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from fastgt.options import hours, numbers, shares, up_to
from fastgt.terminal import text_on_stderr

if TYPE_CHECKING:
    import torch

    from fastgt.training.recipe import Recipe

INT32_MAX = 2**31 - 1


def arguments(train: argparse.ArgumentParser) -> None:
    """Add them, apart from those that say where operators run."""
    train.add_argument("model", nargs="?", help="see --list")
    train.add_argument("data_set", nargs="?", metavar="data", help="see --list")
    train.add_argument(
        "--list", action="store_true", help="models, data sets, parameters, published results"
    )
    train.add_argument("--json", action="store_true", help="--list, or the closing table, as JSON")
    train.add_argument(
        "--data",
        type=Path,
        help="the data's file or its folder; default: the folder that FASTGT_DATA names",
    )
    train.add_argument(
        "--output",
        type=Path,
        help="folder of the run: checkpoint, metrics, curve, best weights, result; "
        "default: runs/MODEL-DATA",
    )
    train.add_argument(
        "--encodings", type=Path, help="folder that keeps them; default: OUTPUT/encodings"
    )
    train.add_argument(
        "--graph-parallel",
        type=up_to(INT32_MAX),
        metavar="P",
        help="share the one graph of the data among the P processes that torchrun starts; default: "
        "they share batches of graphs",
    )
    train.add_argument(
        "--partition",
        type=Path,
        metavar="DIR",
        help="of --graph-parallel, as fastgt partition wrote it; default: by METIS, or LDG where "
        "pymetis is not installed",
    )
    train.add_argument("--hours", type=hours, default=24.0, help="a run, at most; default: 24")
    settings = train.add_argument_group("settings of the run", "a folder holds one run")
    settings.add_argument(
        "--set",
        nargs="+",
        action="extend",
        default=[],
        metavar="key=value",
        help="of the training or the model, as lr=1e-3 layers=4; an unknown key names all",
    )
    for name, what in (("epochs", "at most"), ("limit", "train on the first so many graphs")):
        settings.add_argument(
            f"--{name}", type=up_to(INT32_MAX), metavar="N", help=f"{what}; as --set {name}=N"
        )
    settings.add_argument(
        "--precision", choices=["fp32", "bf16", "fp16"], help="as --set precision=; default: fp32"
    )
    settings.add_argument(
        "--seeds", type=numbers, metavar="0-3", help="a run for each; default: the recipe's one"
    )
    settings.add_argument(
        "--splits",
        type=numbers,
        metavar="0-9",
        help="of the nodes of one graph, a run for each; default: all that are published",
    )
    settings.add_argument(
        "--prune",
        type=shares,
        metavar="heads=SHARE[,SHARE...]",
        help="besides, train with that share of the heads of every layer masked, and compare",
    )


def run(args: argparse.Namespace, device: Callable[[], torch.device]) -> int:
    """What the arguments say. ``device``: checks the others and names it."""
    from fastgt.training import listing

    if args.list:
        if args.model is not None:
            raise ValueError(f"--list takes no names, got {args.model!r}")
        rows = listing.rows()
        print(json.dumps(rows, indent=1) if args.json else listing.table(rows))
        return 0
    recipe = chosen(args.model, args.data_set, assignments(args))
    # after the names: these import what they train with
    from fastgt.training import pruned, train

    shared = None
    if args.graph_parallel is not None:
        shared = train.GraphParallel(args.graph_parallel, args.partition)
        if args.prune is not None:
            raise ValueError("--prune compares runs of one process: leave --graph-parallel away")
    elif args.partition is not None:
        raise ValueError("--partition goes with --graph-parallel P, the number of its parts")
    plan = train.Plan(
        folder=args.output or Path("runs") / f"{recipe.model}-{recipe.data}".replace(":", "-"),
        hours=args.hours,
        seeds=args.seeds,
        splits=args.splits,
        data=args.data,
        encodings=args.encodings,
        graph_parallel=shared,
    )
    with text_on_stderr(args.json):
        if args.prune is not None:
            told = pruned.run(recipe, args.prune, plan, device=device(), impl=args.impl)
        else:
            told = train.run(recipe, plan, device=device(), impl=args.impl)
    if args.json and told:  # another process than the first of several has none
        print(json.dumps(told, indent=1))
    return 0


def assignments(args: argparse.Namespace) -> list[str]:
    """All settings as ``key=value``."""
    named = [
        f"{name}={value}"
        for name in ("epochs", "limit", "precision")
        if (value := getattr(args, name)) is not None
    ]
    return [*args.set, *named]


def chosen(model: str | None, data: str | None, assigned: Sequence[str]) -> Recipe:
    """The recipe of these names, with those settings.

    Raises:
        ValueError: There is no such recipe; says which there are.
    """
    from fastgt.training.published_recipes import MODELS, RECIPES
    from fastgt.training.settings import changed

    if model is None or model not in MODELS:
        found = "no model" if model is None else repr(model)
        raise ValueError(f"name a model of {', '.join(MODELS)}, got {found}: fastgt train --list")
    if data is None or (model, data) not in RECIPES:
        found = "no data set" if data is None else repr(data)
        sets = ", ".join(x for name, x in RECIPES if name == model)
        raise ValueError(f"{model} is trained on {sets}, got {found}: fastgt train --list")
    return changed(RECIPES[model, data], assigned)
