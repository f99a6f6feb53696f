"""Partitions as torch_geometric.distributed's ``Partitioner`` writes them."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastgt.distributed.part import Part, Whole, arranged
from fastgt.graph_build import check_index, check_range, size_of


def read_pyg_partition(folder: str | os.PathLike[str], rank: int) -> tuple[Part, dict[str, Tensor]]:
    """One rank's share of a homogeneous graph, and its features.

    The folder has ``META.json``, ``node_map.pt`` and ``edge_map.pt``, the rank of each node and of
    each edge, and ``part_0/graph.pt``, ``node_feats.pt`` and ``edge_feats.pt``. There as here an
    edge lies with its target. Features come in the order of the part: node features in that of
    ``part.rows``, those of edges in that of ``part.edge``. Takes memory for the two maps and for
    the rank's own files.

    Raises:
        ValueError: The folder holds no such partition, it is heterogeneous, it has no such rank, or
            its files disagree; names the file and both numbers.
        OSError: A file cannot be read.

    Source: torch_geometric 2.6 to 2.8, ``torch_geometric/distributed/partition.py``.

    Example:
        >>> import json, tempfile, torch
        >>> from pathlib import Path
        >>> from fastgt.distributed import read_pyg_partition
        >>> with tempfile.TemporaryDirectory() as name:
        ...     root = Path(name)
        ...     (root / "part_0").mkdir()
        ...     meta = {"num_parts": 1, "is_hetero": False}
        ...     _ = (root / "META.json").write_text(json.dumps(meta))
        ...     edges = {"row": torch.tensor([1]), "col": torch.tensor([0])}
        ...     edges |= {"edge_id": torch.tensor([0]), "size": (2, 2)}
        ...     nodes = {"global_id": torch.tensor([1, 0]), "feats": {"x": torch.tensor([8, 9])}}
        ...     torch.save(edges, root / "part_0" / "graph.pt")
        ...     torch.save(nodes, root / "part_0" / "node_feats.pt")
        ...     torch.save({}, root / "part_0" / "edge_feats.pt")
        ...     torch.save(torch.tensor([0, 0]), root / "node_map.pt")
        ...     torch.save(torch.tensor([0]), root / "edge_map.pt")
        ...     part, tensors = read_pyg_partition(root, 0)
        >>> part.rows.tolist(), tensors["x"].tolist()
        ([0, 1], [9, 8])
    """
    root, parts = _opened(Path(folder))
    rank = size_of(rank, "rank")
    if rank >= parts:
        raise ValueError(f"rank {rank} is none of the {parts} parts in {root}")
    owner, edge_owner = (_index(root / f"{x}_map.pt", None, None) for x in ("node", "edge"))
    check_range(owner, parts, f"{root / 'node_map.pt'}", "ranks")
    nodes, at = len(owner), root / f"part_{rank}"
    path = at / "graph.pt"
    graph = _loaded(path)
    if not isinstance(graph, dict) or not {"row", "col", "edge_id"} <= set(graph):
        raise ValueError(f"{path} must have row, col and edge_id")
    source, target, edge = (_index(path, graph[x], x) for x in ("row", "col", "edge_id"))
    if not len(source) == len(target) == len(edge):
        raise ValueError(
            f"{path} has {len(source)} sources, {len(target)} targets and {len(edge)} edge numbers"
        )
    for name, x, size, of in (
        ("row", source, nodes, "nodes"),
        ("col", target, nodes, "nodes"),
        ("edge_id", edge, len(edge_owner), "edges"),
    ):
        check_range(x, size, f"{path}: {name}", of)
    foreign = owner.index_select(0, target) != rank
    if bool(foreign.any()):
        wrong = int(target[foreign][0])
        raise ValueError(
            f"{path} has an edge of target {wrong}, which node_map.pt gives to rank "
            f"{int(owner[wrong])}, not {rank}"
        )
    ours = (edge_owner == rank).nonzero().flatten()
    if not torch.equal(ours, edge.sort().values):
        raise ValueError(
            f"{path} has {len(edge)} edges, edge_map.pt gives rank {rank} {len(ours)}, or others"
        )
    rows = (owner == rank).nonzero().flatten()
    # row by row; the edges of a row in the order of their numbers
    order = edge.sort().indices
    order = order.index_select(0, target.index_select(0, order).sort(stable=True).indices)
    row = torch.searchsorted(rows, target.index_select(0, order))
    reads, number = source.index_select(0, order), edge.index_select(0, order)
    ends = torch.tensor([0, nodes])
    whole = Whole(nodes, nodes, len(edge_owner), True, ends, ends)
    part = arranged(whole, rank, parts, rows, rows, owner, row, reads, number)
    tensors = _features(at / "node_feats.pt", part.rows, "nodes")
    of_edges = _features(at / "edge_feats.pt", part.edge, "edges")
    twice = sorted(set(tensors) & set(of_edges))
    if twice:
        raise ValueError(f"{at}: {twice} are features of nodes and of edges")
    return part, tensors | of_edges


def _opened(root: Path) -> tuple[Path, int]:
    path = root / "META.json"
    try:
        meta = json.loads(path.read_bytes())
        parts, is_hetero = meta["num_parts"], meta["is_hetero"]
    except (ValueError, LookupError, TypeError) as error:
        raise ValueError(f"{path} is not that of a torch_geometric partition: {error}") from error
    except FileNotFoundError:
        raise ValueError(f"{root} holds no torch_geometric partition: no META.json") from None
    if is_hetero:
        raise ValueError(
            f"{root} holds a heterogeneous graph: make a Graph of it with Graph.from_hetero, and "
            "write_partitions of that"
        )
    return root, size_of(parts, f"{path}: num_parts")


def _features(path: Path, order: Tensor, of: str) -> dict[str, Tensor]:
    """Those of a file by name, in another order; none where the file says none."""
    said = _loaded(path)
    if not isinstance(said, dict):
        raise ValueError(f"{path} must hold a dict, got {type(said).__name__}")
    feats = {k: x for k, x in said.get("feats", {}).items() if x is not None}
    if not feats:
        return {}
    there = _index(path, said.get("global_id"), "global_id")
    places = there.sort()
    if not torch.equal(places.values, order.sort().values):
        raise ValueError(
            f"{path} has features of {len(there)} {of}, the rank has {len(order)}, or others"
        )
    pick = places.indices.index_select(0, torch.searchsorted(places.values, order))
    for name, x in feats.items():
        if not isinstance(x, Tensor) or x.ndim == 0 or len(x) != len(there):
            found = list(x.shape) if isinstance(x, Tensor) else type(x).__name__
            raise ValueError(f"{path}: {name} must be [{len(there)}, ...], got {found}")
    return {name: x.index_select(0, pick) for name, x in feats.items()}


def _index(path: Path, x: Any, name: str | None) -> Tensor:
    """Of a file, or in one: ``[n]`` int64."""
    said = str(path) if name is None else f"{path}: {name}"
    found = _loaded(path) if name is None else x
    check_index(found, said)
    if found.ndim != 1:
        raise ValueError(f"{said} must be a vector, got {list(found.shape)}")
    return found.long()


def _loaded(path: Path) -> Any:
    # torch_geometric saves features of edges in a defaultdict without a factory. Where somebody has
    # allowed the class itself, that entry would win.
    allowed = torch.serialization.get_safe_globals()
    torch.serialization.clear_safe_globals()
    try:
        with torch.serialization.safe_globals([(dict, "collections.defaultdict")]):
            return torch.load(path, weights_only=True, map_location="cpu")
    except FileNotFoundError:
        raise ValueError(f"{path} is absent: the partition is not whole") from None
    except OSError:
        raise
    except Exception as error:  # a damaged pickle may raise any
        raise ValueError(f"{path} cannot be read: {error}") from error
    finally:
        torch.serialization.add_safe_globals(allowed)
