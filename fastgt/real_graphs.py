"""Graphs of files: the package's own, and those in the folder that FASTGT_DATA names."""

from __future__ import annotations

import csv
import os
import zipfile
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path

import numpy as np
import torch

from fastgt.graph import Graph

_OF_NODES = "node_label", "node_labels", "bus", "y"  # arrays that have an entry for each node


def open_data(name: str) -> np.lib.npyio.NpzFile:
    """The arrays of ``name.npz``: the package's own, or in the folder of real graphs.

    Raises:
        FileNotFoundError: It is in neither; says how to name the folder.
    """
    return np.load(path_of(f"{name}.npz"))


def data_folder() -> Path | None:
    """Of real graphs: that which the environment variable ``FASTGT_DATA`` names."""
    folder = os.environ.get("FASTGT_DATA")
    return Path(folder) if folder else None


def path_of(name: str) -> Path:
    """Of a file: the package's own, or in the folder of real graphs.

    Raises:
        FileNotFoundError: It is in neither; says how to name the folder.
    """
    packaged = files("fastgt.data") / name
    if packaged.is_file():
        return Path(str(packaged))
    folder = data_folder()
    path = Path(name) if folder is None else folder / name
    if folder is None or not path.is_file():
        raise FileNotFoundError(f"{path} is absent: set FASTGT_DATA to the folder that holds it")
    return path


def undirected(name: str, edges: str = "edge_index", nodes: str = "y") -> Callable[[], Graph]:
    """The edges of ``name.npz``, listed in one direction or both; ``nodes`` has an entry each."""

    def load() -> Graph:
        with open_data(name) as data:
            edge_index = data[edges] if edges == "edge_index" else data[edges].T
            return _symmetric(edge_index, len(data[nodes]))

    return load


def undirected_of(path: Path) -> Graph:
    """The edges of any such file: listed in one direction or both, each taken both ways.

    Raises:
        ValueError: It has no edges, or does not say how many nodes there are.
        OSError: It cannot be read.
    """
    try:
        data = np.load(path, allow_pickle=False)
    except (ValueError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path} cannot be read as a .npz: {error}") from error
    with data:
        edges = next((x for x in ("edge_index", "edges") if x in data), None)
        nodes = next((x for x in ("num_nodes", *_OF_NODES) if x in data), None)
        if edges is None or nodes is None:
            raise ValueError(
                f"{path} must have edge_index [2, E] or edges [E, 2], and num_nodes or one of "
                f"{list(_OF_NODES)}; it has {list(data)}"
            )
        edge_index = data[edges] if edges == "edge_index" else data[edges].T
        count = int(data[nodes]) if nodes == "num_nodes" else len(data[nodes])
    # in range, before a pair becomes one number
    graph = Graph.from_edge_index(torch.from_numpy(np.ascontiguousarray(edge_index)), count)
    return _symmetric(graph.edge_index.numpy(), count)


def squirrel() -> Graph:
    with open_data("squirrel_filtered") as data:
        return Graph.from_edge_index(torch.from_numpy(data["edges"].T), len(data["node_labels"]))


def moby() -> Graph:
    with open_data("moby") as data:
        return _symmetric(data["edge_index"], int(data["num_nodes"]))


def flights() -> Graph:
    with open_data("flights") as data:
        edge_index = torch.from_numpy(np.stack([data["src"], data["dst"]]))
        return Graph.from_edge_index(edge_index, len(data["airports"]))


def power_grid(name: str) -> Callable[[], Graph]:
    def load() -> Graph:
        with open_data(name) as data:
            branch, buses = torch.from_numpy(data["edge_index"]), len(data["bus"])
        return Graph.from_edge_index(torch.cat([branch, branch.flip(0)], 1), buses)

    return load


def zinc() -> Graph:
    molecules = 128
    with open_data("zinc12k") as data:
        node_ptr = torch.from_numpy(data["train_node_ptr"][: molecules + 1].astype(np.int64))
        edge_ptr = torch.from_numpy(data["train_edge_ptr"][: molecules + 1].astype(np.int64))
        local = data["train_edge_local"][:, : int(edge_ptr[-1])].astype(np.int64)
    shift = node_ptr[:-1].repeat_interleave(edge_ptr.diff())
    edge_index = torch.from_numpy(local) + shift
    return Graph.from_edge_index(edge_index, int(node_ptr[-1]), graph_ptr=node_ptr)


def dd() -> Graph:
    with open_data("dd") as data:
        node_ptr, edge_index = data["node_ptr"].tolist(), torch.from_numpy(data["edge_index"])
    # edges stand protein by protein
    edge_ptr = torch.searchsorted(edge_index[1].contiguous(), torch.tensor(node_ptr)).tolist()
    proteins = torch.randperm(len(node_ptr) - 1, generator=torch.Generator().manual_seed(0))
    return Graph.batch(
        [
            Graph.from_edge_index(
                edge_index[:, edge_ptr[i] : edge_ptr[i + 1]] - node_ptr[i],
                node_ptr[i + 1] - node_ptr[i],
            )
            for i in proteins[:64].tolist()
        ]
    )


def molhiv() -> Graph:
    """The first 128 training molecules; no hydrogens, each bond both ways."""
    try:
        from rdkit import Chem
    except ImportError as error:
        raise FileNotFoundError(
            f"molhiv's SMILES are made into graphs by rdkit: {error}"
        ) from error
    graphs: list[Graph] = []
    with path_of("molhiv.csv").open() as file:
        for row in csv.DictReader(file):
            if row["split"] != "train" or len(graphs) == 128:
                continue
            # a few hold metals in valences that rdkit refuses to check
            molecule = Chem.MolFromSmiles(row["smiles"], sanitize=False)
            bonds = [(b.GetBeginAtomIdx(), b.GetEndAtomIdx()) for b in molecule.GetBonds()]
            one_way = torch.tensor(bonds, dtype=torch.int64).view(-1, 2).T
            both = torch.cat([one_way, one_way.flip(0)], 1)
            graphs.append(Graph.from_edge_index(both, molecule.GetNumAtoms()))
    return Graph.batch(graphs)


def _symmetric(edge_index: np.ndarray, nodes: int) -> Graph:
    source, target = torch.from_numpy(np.ascontiguousarray(edge_index)).long()
    both = torch.cat([target * nodes + source, source * nodes + target]).unique()
    return Graph.from_edge_index(torch.stack([both % nodes, both // nodes]), nodes)
