"""What ranks cost: steps of training on this machine, what partitions cut, and larger machines.

``python -m fastgt.bench.distributed`` does three things, each with rows of its own kind:

- ``measured``: a :class:`fastgt.models.GraphTransformer` is trained on debian, in one process and
  on 2 ranks with gloo. All of them together have the threads that one process has. Seconds of a
  step, peak memory of a rank, and bytes that it sent, which have to be those of
  :meth:`fastgt.distributed.DistributedGraph.bytes_of_exchange`. The memory is that of a run of its
  own, in which glibc gives tensors back that are freed. Left alone it keeps pieces of them, more
  where tensors have many sizes: what the timed run took is in the rows too;
- ``partition``: what each method cuts of moby, and the seconds that it takes;
- ``simulated``: steps on 8 to 1,024 ranks, by the model of ``fastgt.bench.scaling``.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.nn import functional

from fastgt import Graph, files
from fastgt.bench import harness, memory, scaling
from fastgt.bench.scaling import METIS_MOST, Setting
from fastgt.distributed import (
    DistributedGraph,
    Group,
    load_partition,
    over_ranks,
    partition,
    report,
    sync_gradients,
    sync_parameters,
    write_partitions,
)
from fastgt.distributed.group import Flight
from fastgt.distributed.partition import ROW_COST
from fastgt.models import GraphTransformer, GraphTransformerConfig
from fastgt.testing import PROBLEMS

Rows = list[dict[str, Any]]
TYPES, CLASSES = 64, 58
METHODS = ("metis", "ldg", "contiguous", "hash")
THRESHOLD = "MALLOC_MMAP_THRESHOLD_"  # of glibc: larger blocks go back when they are freed
PATIENCE = timedelta(minutes=5)  # that a rank waits for another


class Run(NamedTuple):
    """A training on some ranks of this machine.

    Attributes:
        parts: How many ranks; 1 is one process without any.
        method: Of the partition.
        overlap: As of :class:`fastgt.distributed.DistributedGraph`.
        steps: That are timed, after one that is not.
        threads: Of each rank.
    """

    parts: int
    method: str = "metis"
    overlap: bool = True
    steps: int = 5
    threads: int = 1


class Counting(Group):
    """A group that counts the bytes of halos that this rank hands to others."""

    def __init__(self, processes: dist.ProcessGroup | None = None):
        super().__init__(processes)
        self._bytes = [0]  # shared with groups of the same ranks that compare nothing

    @property
    def sent(self) -> int:
        return self._bytes[0]

    def all_to_all(self, x: Tensor, send: Sequence[int], receive: Sequence[int]) -> Flight:
        row = x[:1].nbytes if len(x) else 0
        self._bytes[0] += row * (sum(send) - send[self.rank])
        return super().all_to_all(x, send, receive)


def measured(problem: str, setting: Setting, runs: Sequence[Run]) -> Rows:
    """-> a row a run: seconds, memory and bytes. The first run is what the others are compared to.

    Raises:
        RuntimeError: Ranks sent other bytes than the formula has.
    """
    graph = PROBLEMS[problem].load()
    tensors = tensors_of(graph)
    rows: Rows = []
    for run in runs:
        with tempfile.TemporaryDirectory() as scratch:
            place = Path(scratch)
            if run.parts > 1:
                owners = partition(
                    graph,
                    run.parts,
                    run.method,  # type: ignore[arg-type]
                    row_cost=ROW_COST,
                )
                write_partitions(place / "parts", graph, owners, parts=run.parts, **tensors)
            found = _ran(problem, setting, run, place)
            with _freed_at_once():
                peaks = _ran(problem, setting, run._replace(steps=1), place)
        rows.append(_row(problem, graph, setting, run, found, peaks))
        rows[-1]["step_x"] = rows[-1]["step_s"] / rows[0]["step_s"]
        rows[-1]["peak_x"] = rows[-1]["peak_bytes"] / rows[0]["peak_bytes"]
    return [row | harness.environment(torch.device("cpu")) for row in rows]


def _ran(problem: str, setting: Setting, run: Run, place: Path) -> list[dict[str, Any]]:
    """What each rank of a run found."""
    mp.spawn(_rank, (problem, setting, run, place), nprocs=run.parts)
    return [json.loads((place / f"rank-{rank}.json").read_text()) for rank in range(run.parts)]


@contextmanager
def _freed_at_once() -> Iterator[None]:
    """Processes that begin here return tensors of a megabyte and more when they are freed."""
    before = os.environ.get(THRESHOLD)
    os.environ[THRESHOLD] = str(1 << 20)
    try:
        yield
    finally:
        if before is None:
            del os.environ[THRESHOLD]
        else:
            os.environ[THRESHOLD] = before


def _row(
    problem: str,
    graph: Graph,
    setting: Setting,
    run: Run,
    found: list[dict[str, Any]],
    peaks: list[dict[str, Any]],
) -> dict[str, Any]:
    for rank, one in enumerate(found):
        if one["sent"] != one["formula"]:
            raise RuntimeError(
                f"rank {rank} sent {one['sent']} bytes in a step and the formula has "
                f"{one['formula']}"
            )
    # a step ends when the last rank is through
    steps = [max(times) for times in zip(*(one["seconds"] for one in found), strict=True)]
    return {
        "kind": "measured",
        "problem": problem,
        "rows": graph.num_rows,
        "edges": graph.num_edges,
        **setting._asdict(),
        **run._asdict(),
        "method": run.method if run.parts > 1 else None,
        "step_s": statistics.median(steps),
        "step_least_s": min(steps),
        "peak_bytes": max(one["peak"] for one in peaks),
        "kept_bytes": max(one["peak"] for one in found),
        "imported_bytes": max(one["imported"] for one in found),
        "sent_bytes": sum(one["sent"] for one in found),
        "formula_bytes": sum(one["formula"] for one in found),
        "loss": sum(one["loss"] for one in found),
    }


def _rank(rank: int, problem: str, setting: Setting, run: Run, place: Path) -> None:
    """One process of a run; writes what it found beside the parts."""
    torch.set_num_threads(run.threads)
    imported = memory.resident()
    graph: Graph | DistributedGraph
    if run.parts == 1:
        group, graph = Counting(), PROBLEMS[problem].load()
        tensors, nodes = tensors_of(graph), graph.num_rows
    else:
        store = f"file://{place / f'store-{run.steps}'}"
        dist.init_process_group("gloo", store, rank=rank, world_size=run.parts, timeout=PATIENCE)
        group = Counting()
        graph, tensors = load_partition(place / "parts", group, overlap=run.overlap, check=False)
        nodes = graph.part.whole.rows
    model = over_ranks(model_of(setting))
    sync_parameters(model, group)
    step = step_of(model, graph, tensors, nodes, lambda: sync_gradients(model, group))
    loss = step()
    seconds, before = [], group.sent
    for _ in range(run.steps):
        group.sum(torch.zeros(1))  # all begin together
        begin = time.perf_counter()
        loss = step()
        seconds.append(time.perf_counter() - begin)
    formula = 0
    if isinstance(graph, DistributedGraph):
        # a layer sends its input, whose gradient comes back
        formula = sum(graph.bytes_of_exchange(setting.dim * setting.layers, torch.float32))
    found = {
        "seconds": seconds,
        "imported": imported,
        "peak": memory.peak_resident(),
        "sent": (group.sent - before) // run.steps,
        "formula": formula,
        "loss": loss,
    }
    (place / f"rank-{rank}.json").write_text(json.dumps(found))
    if run.parts > 1:
        dist.destroy_process_group()


def tensors_of(graph: Graph) -> dict[str, Tensor]:
    """Types and classes of nodes, at random: what they are costs nothing."""
    generator = torch.Generator().manual_seed(0)
    return {
        "node_type": torch.randint(TYPES, (graph.num_rows,), generator=generator),
        "y": torch.randint(CLASSES, (graph.num_rows,), generator=generator),
    }


def model_of(setting: Setting) -> GraphTransformer:
    """The same on every rank."""
    torch.manual_seed(0)
    config = GraphTransformerConfig(
        node_types=TYPES,
        out_dim=CLASSES,
        dim=setting.dim,
        heads=setting.heads,
        layers=setting.layers,
        norm="layer",  # the sums of batch norms would be counted too
    )
    return GraphTransformer(config)


def step_of(
    model: nn.Module,
    graph: Graph | DistributedGraph,
    tensors: dict[str, Tensor],
    nodes: int,
    synchronize: Callable[[], None] = lambda: None,
) -> Callable[[], float]:
    """-> a step of training, which gives the loss; ``nodes``: of the whole graph."""
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)

    def step() -> float:
        optimizer.zero_grad()
        out = model(tensors["node_type"], graph)
        loss = functional.cross_entropy(out, tensors["y"], reduction="sum") / nodes
        loss.backward()
        synchronize()
        optimizer.step()
        return float(loss.detach())

    return step


def partitions(problem: str, counts: Sequence[int], setting: Setting) -> Rows:
    """-> a row for each method and number of ranks."""
    graph = PROBLEMS[problem].load()
    pair = Graph.from_edge_index(torch.tensor([[0], [1]]))
    rows: Rows = []
    for parts in counts:
        for method in METHODS:
            if method == "metis" and graph.num_edges > METIS_MOST:
                continue
            partition(pair, 2, method)  # type: ignore[arg-type]  # importing is no part of it
            begin = time.perf_counter()
            owners = partition(graph, parts, method)  # type: ignore[arg-type]
            seconds = time.perf_counter() - begin
            found = report(graph, owners, parts=parts, width=setting.dim)
            rows.append(
                {
                    "kind": "partition",
                    "problem": problem,
                    "rows": graph.num_rows,
                    "edges": graph.num_edges,
                    "parts": parts,
                    "method": method,
                    "partition_s": seconds,
                    **scaling.counts_of(found),
                }
            )
    return [row | harness.environment(torch.device("cpu")) for row in rows]


def rates(problem: str, setting: Setting, repeats: int = 5) -> scaling.Rates:
    """What a node and an edge cost in a step of this process."""
    graph = PROBLEMS[problem].load()
    none = Graph.from_edge_index(torch.zeros(2, 0, dtype=torch.int64), graph.num_rows)
    found = []
    for one in (graph, none):
        step = step_of(model_of(setting), one, tensors_of(one), one.num_rows)
        step()
        times = []
        for _ in range(repeats):
            begin = time.perf_counter()
            step()
            times.append(time.perf_counter() - begin)
        found.append(statistics.median(times))
    whole, nodes = found
    if whole <= nodes:
        raise RuntimeError(f"a step on {problem} took no longer than one without its edges")
    device = harness.environment(torch.device("cpu"))["device"]
    return scaling.Rates(
        "this CPU",
        edge=(whole - nodes) / graph.num_edges,
        node=nodes / graph.num_rows,
        item=4,
        network="ethernet-10g",
        source=f"measured on {problem}: {device}",
    )


def show(rows: Rows) -> str:
    """The rows as lines for a terminal."""
    lines = []
    for row in rows:
        what = f"{row['kind']:9} {row['problem']:9} {row['parts']:5} {row['method'] or '':10}"
        if row["kind"] == "measured":
            what += (
                f" overlap {row['overlap']!s:5} {row['step_s']:8.3f} s a step, peak "
                f"{row['peak_bytes'] / 1e6:7.0f} MB ({row['peak_x']:.0%}), "
                f"{row['sent_bytes']:,} bytes sent"
            )
        else:
            what += f" halo {row['halo']:12,} cut {row['cut']:6.1%} balance {row['balance']:5.2f}"
        if row["kind"] == "partition":
            what += f" {row['partition_s']:8.2f} s"
        if row["kind"] == "simulated":
            what += f" {row['rates']} {row['scaling']} {row['efficiency']:.1%}"
        lines.append(what)
    return "\n".join(lines)


KINDS = ("measured", "partition", "simulated")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--kind", choices=KINDS, action="append", help="default: all")
    parser.add_argument("--problem", choices=PROBLEMS, default="debian", help="that is measured")
    parser.add_argument("--cut", choices=PROBLEMS, default="moby", help="of which parts are made")
    parser.add_argument(
        "--strong",
        choices=PROBLEMS,
        nargs="+",
        default=["debian", "moby", "rmat_21"],
        help="that are shared among ever more ranks, simulated; default: %(default)s",
    )
    parser.add_argument("--layers", type=int, default=Setting().layers)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument(
        "--json", type=Path, help="rows of these kinds are written anew, others stay"
    )
    args = parser.parse_args()
    setting, threads = Setting(layers=args.layers), torch.get_num_threads()
    found: Rows = []
    for kind in args.kind or KINDS:
        if kind == "measured":
            half = max(1, threads // 2)
            runs = [Run(1, steps=args.steps, threads=threads)] + [
                Run(2, overlap=overlap, steps=args.steps, threads=half) for overlap in (True, False)
            ]
            new = measured(args.problem, setting, runs)
        elif kind == "partition":
            new = partitions(args.cut, (8, 64), setting)
        else:
            devices = [rates(args.problem, setting), scaling.stated_rates("H200", setting)]
            new = scaling.simulated(args.strong, devices, setting)
        print(show(new), flush=True)
        found += new
        if args.json:
            kept = json.loads(args.json.read_text()) if args.json.exists() else []
            kept = [row for row in kept if row["kind"] != kind]
            files.write(args.json, (json.dumps(kept + new, indent=1) + "\n").encode())


if __name__ == "__main__":
    main()
