"""``fastgt partition``: a graph of a file is shared out to ranks, and written for each of them."""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

from fastgt import real_graphs
from fastgt.distributed.edge_list import edge_list_graph
from fastgt.distributed.partition import METHODS, partition
from fastgt.distributed.partition_files import write_partitions
from fastgt.distributed.report import NETWORKS, Report, report
from fastgt.graph import Graph
from fastgt.options import up_to
from fastgt.terminal import text_on_stderr


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "file",
        type=Path,
        metavar="FILE",
        help="what Graph.save wrote; an edge list .npy [2, E], sources above targets; or a .npz "
        "with edge_index [2, E] or edges [E, 2], of which each edge is taken both ways, and with "
        "num_nodes or labels of nodes",
    )
    parser.add_argument("--parts", type=up_to(2**31 - 1), required=True, help="how many ranks")
    parser.add_argument("--method", choices=METHODS, default="metis", help="default: %(default)s")
    parser.add_argument(
        "--row-cost",
        type=int,
        default=0,
        help="edges that a row costs as much as, beside its own; default: %(default)s",
    )
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    parser.add_argument(
        "--output",
        type=Path,
        metavar="DIR",
        help="where the parts are written, and an edge list is sorted; default: nothing is kept",
    )
    parser.add_argument(
        "--width", type=up_to(2**31 - 1), default=128, help="channels; default: %(default)s"
    )
    parser.add_argument(
        "--network", choices=NETWORKS, default="infiniband-ndr", help="default: %(default)s"
    )
    parser.add_argument("--json", action="store_true", help="the report as JSON")


def run(args: argparse.Namespace) -> int:
    with tempfile.TemporaryDirectory() as scratch:
        sorted_in = Path(scratch) if args.output is None else args.output / "graph"
        graph = _graph(args.file, sorted_in)
        part = partition(graph, args.parts, args.method, row_cost=args.row_cost, seed=args.seed)
        found = report(graph, part, parts=args.parts, width=args.width, network=args.network)
        with text_on_stderr(args.json):
            print(found, flush=True)
            if args.output is not None:
                write_partitions(args.output, graph, part, parts=args.parts)
                print(f"wrote {args.parts} parts to {args.output}")
    if args.json:
        print(json.dumps(_figures(found), indent=1))
    return 0


def _figures(found: Report) -> dict[str, Any]:
    names = (
        *("rows", "cols", "edges", "halo", "sent", "cut", "peers"),
        *("bytes_received", "bytes_sent", "seconds"),
    )
    columns = [getattr(found, name).tolist() for name in names]
    ranks = [dict(zip(names, values, strict=True)) for values in zip(*columns, strict=True)]
    return {
        "width": found.width,
        "dtype": str(found.dtype).removeprefix("torch."),
        "network": found.network,
        "balance": found.balance,
        "ranks": ranks,
    }


def _graph(path: Path, sorted_in: Path) -> Graph:
    if path.suffix == ".npz":
        return real_graphs.undirected_of(path)
    if path.suffix == ".npy":
        return edge_list_graph(path, sorted_in)
    return Graph.load(path)
