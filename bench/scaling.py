"""Steps of training on more ranks than there are here: a simulation, nothing is run.

What is exact are the counts of a partition: rows, edges, halo and interior edges of every rank.
What is a model are seconds. A rank computes its edges and its nodes at the rates of one process. It
sends and receives its halo at the bandwidth and latency of a network of
``fastgt.distributed.report``::

    compute_p  = edges_p edge + rows_p node
    exchange_p = 2 layers (bytes_p / bandwidth + peers_p latency)         forward and backward
    hidden_p   = min(exchange_p, interior_p edge)                         where they overlap
    gradients  = 2 (P - 1) / P parameters / bandwidth + 2 ceil(log2 P) latency
    step       = max_p (compute_p + exchange_p - hidden_p) + gradients

Nobody waits for a switch that is shared, nor for a slower rank in the middle of a step, and no rank
is faster because its part fits in a cache.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastgt import Graph, files
from fastgt.bench import harness
from fastgt.bench.device_model import DEVICES
from fastgt.bench.plots import png_and_svg
from fastgt.distributed import partition, report
from fastgt.distributed.partition import ROW_COST
from fastgt.distributed.report import NETWORKS, Report
from fastgt.drawn_graphs import rmat
from fastgt.testing import PROBLEMS

Rows = list[dict[str, Any]]
RANKS = (8, 16, 32, 64, 128, 256, 512, 1024)
WEAK = {8: 15, 32: 17, 128: 19, 512: 21}  # ranks -> levels of an R-MAT graph
METHODS = ("metis", "ldg", "hash")
METIS_MOST = 5_000_000  # edges beyond which METIS takes minutes


class Setting(NamedTuple):
    """The model that is trained: a :class:`fastgt.models.GraphTransformer`, of PATTERN's sizes.

    Attributes:
        dim, heads, layers: As of its config.
    """

    dim: int = 80
    heads: int = 8
    layers: int = 10

    @property
    def parameters(self) -> int:
        """Of the layers: four projections of the attention, two layers of the feed-forward."""
        return 8 * self.layers * self.dim**2


class Rates(NamedTuple):
    """What one rank computes in a second.

    Attributes:
        name: Of the device.
        edge, node: Seconds of a step, forward and backward through all layers.
        item: Bytes of a channel that is exchanged.
        network: Between ranks, one of ``fastgt.distributed.report.NETWORKS``.
        source: Where the seconds are from.
    """

    name: str
    edge: float
    node: float
    item: int
    network: str
    source: str


def stated_rates(name: str, setting: Setting) -> Rates:
    """Of a GPU, in 16 bits, from its data sheet: bounds that kernels do not quite reach.

    An edge reads rows of k and v in the forward and again for dq, and rows of q and do for dk and
    dv, all from memory. A node takes three products, forward and backward, with the parameters of a
    layer, and moves about 60 rows of channels.
    """
    device, layers, row = DEVICES[name], setting.layers, 2 * setting.dim
    products = 3 * 2 * setting.parameters / device.tensor
    return Rates(
        name,
        edge=layers * 6 * row / device.memory,
        node=products + layers * 60 * row / device.memory,
        item=2,
        network="infiniband-ndr",
        source=f"bounds of its memory and tensor cores, {device.source}",
    )


def simulated(problems: Sequence[str], devices: Sequence[Rates], setting: Setting) -> Rows:
    """-> a row for each graph, method, number of ranks and device, strong scaling and weak."""
    rows: Rows = []
    for name in problems:
        graph = PROBLEMS[name].load()
        for parts in RANKS:
            rows += _steps("strong", name, graph, parts, devices, setting)
    for parts, levels in WEAK.items():
        rows += _steps("weak", f"rmat_{levels}", rmat(levels)(), parts, devices, setting)
    return [row | harness.environment(torch.device("cpu")) for row in rows]


def _steps(
    scaling: str,
    name: str,
    graph: Graph,
    parts: int,
    devices: Sequence[Rates],
    setting: Setting,
) -> Iterator[dict[str, Any]]:
    for method in METHODS:
        if method == "metis" and graph.num_edges > METIS_MOST:
            continue
        owners = partition(graph, parts, method, row_cost=ROW_COST)  # type: ignore[arg-type]
        assert isinstance(owners, Tensor)
        found = report(graph, owners, parts=parts, width=setting.dim)
        inside = interior_edges(graph, owners, parts)
        for rates in devices:
            share = parts if scaling == "weak" else 1
            alone = (graph.num_edges * rates.edge + graph.num_rows * rates.node) / share
            seconds = step_seconds(found, inside, rates, setting)
            ideal = alone if scaling == "weak" else alone / parts
            yield {
                "kind": "simulated",
                "scaling": scaling,
                "problem": name,
                "rows": graph.num_rows,
                "edges": graph.num_edges,
                "parts": parts,
                "method": method,
                **counts_of(found),
                "rates": rates.name,
                "edge_s": rates.edge,
                "node_s": rates.node,
                "source": rates.source,
                "network": rates.network,
                "alone_s": alone,
                **seconds,
                "efficiency": ideal / seconds["step_s"],
            }


def step_seconds(
    found: Report, interior: Tensor, rates: Rates, setting: Setting
) -> dict[str, float]:
    """Seconds of a step, by the equations above.

    Args:
        found: What each rank has, of an exchange of ``setting.dim`` channels.
        interior: ``[P]``, edges of rows that read own columns alone.
        rates: Of one rank.
        setting: The model.
    """
    parts, network = len(found.rows), NETWORKS[rates.network]
    dtype = torch.float32 if rates.item == 4 else torch.float16
    one = found._replace(network=rates.network, dtype=dtype)
    compute = found.edges.double() * rates.edge + found.rows.double() * rates.node
    exchange = 2 * setting.layers * one.seconds
    hidden = torch.minimum(exchange, interior.double() * rates.edge)
    sent = 2 * (parts - 1) / parts * setting.parameters * rates.item / network.bandwidth
    gradients = sent + 2 * math.ceil(math.log2(parts)) * network.latency
    return {
        "compute_s": float(compute.max()),
        "exchange_s": float(exchange.max()),
        "gradients_s": gradients,
        "step_s": float((compute + exchange - hidden).max()) + gradients,
        "step_plain_s": float((compute + exchange).max()) + gradients,
    }


def interior_edges(graph: Graph, owners: Tensor, parts: int) -> Tensor:
    """``[P]``, edges of rows that read own columns alone."""
    row, mine = graph.row.long(), owners.index_select(0, graph.row.long())
    outside = owners.index_select(0, graph.col.long()) != mine
    boundary = torch.zeros(graph.num_rows, dtype=torch.bool)
    boundary[row[outside]] = True
    return mine[~boundary.index_select(0, row)].bincount(minlength=parts)


def counts_of(found: Report) -> dict[str, Any]:
    """What a row says of a partition."""
    edges = int(found.edges.sum())
    return {
        "halo": int(found.halo.sum()),
        "halo_most": int(found.halo.max()),
        "peers_most": int(found.peers.max()),
        "cut": int(found.cut.sum()) / edges if edges else 0.0,
        "balance": found.balance,
        "balance_rows": int(found.rows.max()) * len(found.rows) / max(1, int(found.rows.sum())),
    }


def plot(rows: Rows, folder: Path) -> list[Path]:
    """Draws how many times faster a step is on ever more ranks, and how it holds up where graphs
    grow with the ranks; -> the files."""
    found = [row for row in rows if row["kind"] == "simulated"]
    if not found:
        return []
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for scaling in ("strong", "weak"):
        mine = [row for row in found if row["scaling"] == scaling]
        for suffix, content in png_and_svg(_figure(scaling, mine)):
            paths.append(folder / f"{scaling}.{suffix}")
            files.write(paths[-1], content)
    return paths


def _figure(scaling: str, rows: Rows) -> Any:
    from matplotlib.figure import Figure

    strong = scaling == "strong"
    problems = list(dict.fromkeys(row["problem"] for row in rows)) if strong else ["R-MAT"]
    figure = Figure(figsize=(1.5 + 3.2 * len(problems), 3.8), layout="constrained")
    first = rows[0]
    what = "one graph on ever more ranks" if strong else "as many edges a rank"
    figure.suptitle(
        f"SIMULATED, {what}: halos are counted, seconds are a model's\n"
        f"{first['date']}, commit {first['commit']}",
        fontsize=9,
    )
    devices = list(dict.fromkeys((row["rates"], row["network"]) for row in rows))
    for axes, problem in zip(
        figure.subplots(1, len(problems), squeeze=False)[0], problems, strict=True
    ):
        mine = [row for row in rows if not strong or row["problem"] == problem]
        for colour, (rates, network) in enumerate(devices):
            for method, style in zip(METHODS, ("o-", "s--", "x:"), strict=True):
                points = [
                    (row["parts"], row["alone_s"] / row["step_s"])
                    for row in mine
                    if (row["rates"], row["method"]) == (rates, method)
                ]
                if points:
                    across, up = zip(*sorted(points), strict=True)
                    label = f"{rates}, {network}, {method}"
                    axes.plot(across, up, style, markersize=4, color=f"C{colour}", label=label)
        ranks = sorted({row["parts"] for row in mine})
        ideal = ranks if strong else [1] * len(ranks)
        axes.plot(ranks, ideal, color="0.6", linewidth=0.8)
        axes.set_xscale("log", base=2)
        if strong:
            axes.set_yscale("log", base=2)
        else:
            axes.set_ylim(0)
        axes.set_xticks(ranks, [f"{x}" for x in ranks], fontsize=7)
        axes.set_title(f"{problem}: {mine[0]['edges']:,} edges" if strong else problem, fontsize=8)
        axes.set_xlabel("ranks")
        axes.spines[["top", "right"]].set_visible(False)
    axes = figure.axes[0]
    axes.set_ylabel("times as fast as one rank" if strong else "efficiency")
    handles = {
        label: line
        for x in figure.axes
        for line, label in zip(*x.get_legend_handles_labels(), strict=True)
    }
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=3, fontsize=6)
    return figure
