"""``fastgt train MODEL DATA``: a recipe, run for some seeds and splits, and what is told of it."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fastgt import files
from fastgt.datasets import GraphSet, NodeSet, TokenSet, load
from fastgt.distributed import DistributedGraph
from fastgt.encodings import Cache
from fastgt.extras import require_drawing
from fastgt.ops.implementation import Impl, implementation
from fastgt.terminal import wrapped
from fastgt.training import graph_parallel, optimization, results
from fastgt.training.checkpoint import open_run, seed_everything
from fastgt.training.graph_parallel import GraphParallel
from fastgt.training.inputs import prepared
from fastgt.training.loop import Pruning, Training
from fastgt.training.memory import check_fits
from fastgt.training.published_recipes import MODELS, Prune
from fastgt.training.ranks import GraphRanks, Ranks, joined
from fastgt.training.recipe import Recipe
from fastgt.training.tasks import GraphTask, NodeTask, PairTask, TokenTask


@dataclass(frozen=True)
class Plan:
    """Which runs of a recipe there are, and where.

    Attributes:
        folder: Of the runs; of several, each has a folder in it.
        hours: Of training that each run takes at most.
        seeds: None for the recipe's alone.
        splits: Of the nodes of one graph; None for all that the data set has.
        data: File or folder of the data; None for that which ``FASTGT_DATA`` names.
        encodings: Folder that keeps them; None for one in ``folder``.
        graph_parallel: How the one graph is shared by processes; None for each having all.
    """

    folder: Path
    hours: float = 24.0
    seeds: Sequence[int] | None = None
    splits: Sequence[int] | None = None
    data: Path | None = None
    encodings: Path | None = None
    graph_parallel: GraphParallel | None = None

    @property
    def cache(self) -> Cache:
        """Of encodings."""
        return Cache(self.encodings or self.folder / "encodings")


def run(
    recipe: Recipe, plan: Plan, *, device: torch.device, impl: Impl | None = None
) -> list[dict[str, Any]]:
    """Train, or go on with the runs in ``plan.folder``, and print the results.

    -> the rows of ``result.json``; of several processes, on the one that writes it.

    Raises:
        FileNotFoundError, ValueError: The data is absent or damaged; says which.
        ValueError: The folder holds another run, or a damaged one.
        RuntimeError: Another process trains there, or a loss is no longer finite.
        KeyboardInterrupt: By Ctrl-C or SIGTERM, with a checkpoint written.
    """
    require_drawing("fastgt train")

    with ExitStack() as stack:
        ranks, device = stack.enter_context(joined(device))
        if ranks.size > 1 and plan.graph_parallel is None:
            recipe = without_unused_parameters(recipe)
        kind = MODELS[recipe.model]
        prune = None if kind.prune is None else kind.prune(recipe.config)
        # before the data: its settings may be such as PyTorch refuses, and reading takes long
        parameters = check_fits(lambda: kind.make(recipe.config), device)
        data = load(recipe.data, plan.data)
        parallel = plan.graph_parallel
        if parallel is not None:
            graph_parallel.check(recipe, data, ranks.size, parallel)
            ranks = GraphRanks(ranks.group)
        elif ranks.size > 1 and isinstance(data, NodeSet):
            raise ValueError(
                f"{recipe.data} is one graph, and {ranks.size} processes share batches of graphs: "
                f"train it in one process, or share the graph with --graph-parallel {ranks.size}"
            )
        runs = _runs(recipe, plan, data)
        if ranks.leads:
            plan.folder.mkdir(parents=True, exist_ok=True)
            stack.enter_context(files.lock(plan.folder))
        digest = ranks.told(data.digest())
        data = prepared(recipe, data, plan.cache)
        tokens = _tokens(recipe, data, plan.cache.folder) if kind.sampled else None
        shard = None
        if parallel is not None:
            assert isinstance(data, NodeSet)
            shard = graph_parallel.shared(data.graph.to(device), parallel, ranks.group)
        stack.enter_context(implementation(impl))
        rows = [
            _trained(one, data, digest, parameters, plan.hours, device, ranks, prune, tokens, shard)
            for one in runs
        ]
        if ranks.leads:
            results.write(rows, plan.folder)
            print(results.table(rows, recipe, plan.folder))
        return rows if ranks.leads else []


@dataclass(frozen=True)
class _Run:
    recipe: Recipe
    split: int
    folder: Path


def without_unused_parameters(recipe: Recipe) -> Recipe:
    """Without the last layer's edge branch, which reaches no output and so gets no gradient."""
    if not getattr(recipe.config, "last_edges", False):
        return recipe
    return replace(recipe, config=replace(recipe.config, last_edges=False))


def _runs(recipe: Recipe, plan: Plan, data: GraphSet | NodeSet) -> list[_Run]:
    """Seed by seed, split by split; several have folders of their own.

    In the folder of one run, their result.json would take the place of its own.
    """
    splits = [0]
    if isinstance(data, NodeSet):
        splits = list(range(len(data.splits)) if plan.splits is None else plan.splits)
        if beyond := [split for split in splits if not 0 <= split < len(data.splits)]:
            raise ValueError(
                f"--splits {beyond[0]}: {recipe.data} has {len(data.splits)}, numbered from 0"
            )
    elif plan.splits is not None:
        raise ValueError(f"--splits are of the nodes of one graph, and {recipe.data} is many")
    seeds = [recipe.seed] if plan.seeds is None else list(plan.seeds)
    for name, given in (("--seeds", seeds), ("--splits", splits)):
        if len(set(given)) < len(given):
            raise ValueError(f"{name} has a number twice: {', '.join(map(str, given))}")
    alone = plan.seeds is None and isinstance(data, GraphSet)  # its run stands in the folder itself
    if not alone and (plan.folder / "checkpoint.pt").exists():
        raise ValueError(f"{plan.folder} holds one run: name another --output for several")
    runs = []
    for seed in seeds:
        for split in splits:
            parts = [f"seed-{seed}"] * (plan.seeds is not None)
            parts += [f"split-{split}"] * isinstance(data, NodeSet)
            runs.append(
                _Run(replace(recipe, seed=seed), split, plan.folder.joinpath("-".join(parts)))
            )
    return runs


def _trained(
    one: _Run,
    data: GraphSet | NodeSet,
    digest: str,
    parameters: int,
    hours: float,
    device: torch.device,
    ranks: Ranks,
    prune: Prune | None,
    tokens: TokenSet | None,
    shard: DistributedGraph | None,
) -> dict[str, Any]:
    """Train, or go on. -> a row of results."""
    recipe, kept = one.recipe, one.recipe.kept(digest)
    kept |= {"split": one.split, "processes": ranks.size}
    if shard is not None:
        kept["partition"] = shard.digest
    sparsity = None
    if prune is not None:
        # what is exchanged ends with the epochs: more of them make another run
        kept["epochs"] = recipe.epochs
        assert isinstance(data, GraphSet)
        steps = recipe.epochs * -(-len(data.splits["train"]) // recipe.batch_size)
        sparsity = partial(_pruning, prune, steps)
    resumed = ranks.told(open_run(one.folder, kept) if ranks.leads else None)
    training = start(
        recipe,
        data,
        device,
        folder=one.folder,
        kept=kept,
        resumed=resumed,
        ranks=ranks,
        split=one.split,
        sparsity=sparsity,
        tokens=tokens,
        shard=shard,
    )
    if ranks.leads:
        print(_opening(training, parameters), flush=True)
    ended = training.run(hours=hours)
    if ranks.leads:
        print(f"{one.folder}: {ended}")
    row = results.row(training, parameters)
    if ranks.leads:
        results.write([row], one.folder)
    return row


def _pruning(prune: Prune, steps: int, model: nn.Module) -> Pruning:
    return prune(model, steps)


def start(
    recipe: Recipe,
    data: GraphSet | NodeSet,
    device: torch.device,
    *,
    folder: Path,
    kept: dict[str, Any],
    resumed: dict[str, Any] | None = None,
    ranks: Ranks | None = None,
    split: int = 0,
    sparsity: Callable[[nn.Module], Pruning] | None = None,
    tokens: TokenSet | None = None,
    shard: DistributedGraph | None = None,
) -> Training:
    """A training that is about to begin or to go on, with everything made that it needs.

    Args:
        data: As :func:`fastgt.training.inputs.prepared` gives it.
        kept: What makes a run another run.
        resumed: Checkpoint to go on from.
        split: Of the nodes of one graph.
        sparsity: Makes what prunes the model while it trains.
        tokens: Of the nodes, for a model that is called with them.
        shard: This process's share of the one graph, where ``ranks`` have some rows each.
    """
    ranks = ranks or Ranks()
    seed_everything(recipe.seed)
    kind = MODELS[recipe.model]
    model = kind.make(recipe.config).to(device)
    called = ranks.wrapped(model)
    if ranks.own_seed(recipe.seed) != recipe.seed:
        seed_everything(ranks.own_seed(recipe.seed))  # of dropout
    if isinstance(data, NodeSet) and tokens is not None:
        task: GraphTask | NodeTask | TokenTask = TokenTask(
            data.title, recipe, data, split, called, tokens
        )
    elif isinstance(data, NodeSet):
        task = NodeTask(
            data.title, recipe, data, split, called, takes_edges=kind.takes_edges, shard=shard
        )
    else:
        kind_of_task = PairTask if kind.pairs else GraphTask
        task = kind_of_task(
            data.title, recipe, data, called, takes_edges=kind.takes_edges, ranks=ranks
        )
    prunes = None if sparsity is None else sparsity(model)
    optimizer = optimization.optimizer(recipe, model, kind.attention)
    return Training(
        task,
        recipe,
        model,
        optimizer,
        optimization.schedule(recipe, optimizer),
        folder=folder,
        settings=kept,
        resumed=resumed,
        sparsity=prunes,
        ranks=ranks,
    )


def _tokens(recipe: Recipe, data: GraphSet | NodeSet, folder: Path) -> TokenSet:
    """Sampled where they are not there; the same for all seeds of a training."""
    assert isinstance(data, NodeSet)
    n, known, samples = data.graph.num_nodes, recipe.config.num_nodes, recipe.config.samples
    if n != known:
        raise ValueError(f"num_nodes must be {n}, the nodes of {recipe.data}, got {known}")
    shown = sys.stderr.isatty()
    place = folder / f"tokens-{data.digest()}-{samples}"
    return TokenSet.make(data.graph, data.node, place, samples=samples, progress=shown)


def _opening(training: Training, parameters: int) -> str:
    task, p, recipe = training.task, training.progress, training.recipe
    sizes = " / ".join(f"{task.sizes[name]:,}" for name in ("train", "val", "test"))
    of = f"{sizes} graphs"
    if isinstance(task, PairTask):
        of = f"{sizes} pairs of graphs"
    elif isinstance(task, TokenTask):
        of = f"{sizes} nodes of one graph"
    elif isinstance(task, NodeTask):
        of = "one graph"
        if isinstance(training.ranks, GraphRanks):
            of += f" in {training.ranks.size} parts"
    processes = f", {training.ranks.size} processes" if training.ranks.size > 1 else ""
    what = (
        f"{recipe.model} on {task.title}: {of}; {parameters:,} parameters; {training.batches} "
        f"batches an epoch on {training.device}{processes}"
    )
    lines = [wrapped(what)]
    if p.rows or p.batch:
        lines.append(
            f"going on with {training.folder}: {len(p.rows)} epochs and {p.batch} batches done"
        )
    return "\n".join(lines)
