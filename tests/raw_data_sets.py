"""Files as torch-geometric's data sets download them, made of real graphs of FASTGT_DATA."""

import pickle
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest
import scipy.sparse
import torch

from fastgt.real_graphs import open_data


def opened(name: str) -> dict[str, np.ndarray]:
    """The arrays of a real graph; the test is skipped where it is absent."""
    try:
        with open_data(name) as data:
            return dict(data)
    except FileNotFoundError as error:
        pytest.skip(str(error))


def write_cora(root: Path) -> None:
    """For ``Planetoid(root, "Cora")``."""
    data = opened("cora")
    y = np.eye(7, dtype=np.int32)[data["y"]]
    bags = data["x_indices"], data["x_indptr"]
    x = scipy.sparse.csr_matrix((np.ones(len(bags[0]), np.float32), *bags), data["x_shape"])
    neighbours = defaultdict(list)
    for i, j in data["edge_index"].T.tolist():
        neighbours[i].append(j)
    raw = root / "Cora" / "raw"
    raw.mkdir(parents=True)
    train, known = 140, 1708  # nodes; the others are tested
    contents = {
        "x": x[:train],
        "y": y[:train],
        "allx": x[:known],
        "ally": y[:known],
        "tx": x[known:],
        "ty": y[known:],
        "graph": {i: neighbours[i] for i in range(len(y))},
    }
    for name, content in contents.items():
        (raw / f"ind.cora.{name}").write_bytes(pickle.dumps(content))
    tested = "".join(f"{i}\n" for i in range(known, len(y)))
    (raw / "ind.cora.test.index").write_text(tested)


def write_tolokers(root: Path, nodes: int) -> None:
    """For ``HeterophilousGraphDataset(root, "Tolokers")``: the first nodes and their edges."""
    data = opened("tolokers")
    raw = root / "tolokers" / "raw"
    raw.mkdir(parents=True)
    edges = data.pop("edges")
    part = {name: x[..., :nodes] if "masks" in name else x[:nodes] for name, x in data.items()}
    np.savez(raw / "tolokers.npz", edges=edges[(edges < nodes).all(1)], **part)


def write_zinc(root: Path, molecules: dict[str, int]) -> None:
    """For ``ZINC(root, subset=True)``: the first molecules of each split."""
    data = opened("zinc12k")
    raw = root / "raw"
    raw.mkdir(parents=True)
    for split, count in molecules.items():
        node, edge, ends, atom, bond, y = (
            data[f"{split}_{name}"]
            for name in ("node_ptr", "edge_ptr", "edge_local", "atom", "bond", "y")
        )
        found = []
        for i in range(count):
            nodes, edges = slice(*node[i : i + 2]), slice(*edge[i : i + 2])
            size = nodes.stop - nodes.start
            bonds = torch.zeros(size, size, dtype=torch.int64)
            source, target = torch.from_numpy(ends[:, edges].astype(np.int64))
            bonds[source, target] = torch.from_numpy(bond[edges].astype(np.int64))
            found.append(
                {
                    "atom_type": torch.from_numpy(atom[nodes].astype(np.int64)),
                    "bond_type": bonds,
                    "logP_SA_cycle_normalized": torch.tensor([y[i]]),
                }
            )
        (raw / f"{split}.pickle").write_bytes(pickle.dumps(found))
        (raw / f"{split}.index").write_text(",".join(map(str, range(count))) + "\n")


def write_benchmark(root: Path, name: str, splits: list[list[dict[str, torch.Tensor]]]) -> None:
    """For ``GNNBenchmarkDataset(root, name)``: graphs of train, val and test."""
    raw = root / name / "raw"
    raw.mkdir(parents=True)
    torch.save(splits, raw / f"{name}_v2.pt")


def write_long_range(root: Path, name: str, splits: dict[str, list[tuple]]) -> None:
    """For ``LRGBDataset(root, name)``: tuples of x, edge_attr, edge_index and y."""
    raw = root / name.lower() / "raw"
    raw.mkdir(parents=True)
    for split, graphs in splits.items():
        if name.endswith("-SP"):
            (raw / f"{split}.pickle").write_bytes(pickle.dumps(graphs))
        else:
            torch.save(graphs, raw / f"{split}.pt")


def write_ogb(root: Path, name: str, tables: dict[str, np.ndarray]) -> None:
    """For OGB's ``name``: each table as compressed text."""
    folder = root / name.replace("-", "_")
    for stem, table in tables.items():
        path = folder / f"{stem}.csv.gz"
        path.parent.mkdir(parents=True, exist_ok=True)
        np.savetxt(path, table, delimiter=",", fmt="%g")
