"""molhiv: molecules as SMILES, which inhibit HIV or do not."""

from __future__ import annotations

import csv
import hashlib
import io
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fastgt import files
from fastgt.datasets import archive
from fastgt.datasets.graph_set import GraphSet

ATOMS = (119, 4, 12, 12, 10, 6, 6, 2, 2)
BONDS = (5, 6, 2)
SPLITS = {"train": "train", "val": "valid", "test": "test"}
SMALL = 4000, 1000  # molecules to train on, and at most to validate or to test on
_FORMAT = 1  # of what is kept
_KEYS = ("atom", "bond", "edge_index", "node_ptr", "edge_ptr", "y", "split")


def molhiv(folder: Path | None = None) -> GraphSet:
    """The molecules of ``molhiv.csv`` by its scaffold split, with OGB's types of atoms and bonds.

    The file has columns smiles, HIV_active and split (train, valid, test). Atoms have nine types:
    number, chirality, degree, charge, hydrogens, radical electrons, hybridisation, aromatic, in a
    ring. Bonds have three: kind, stereo, conjugated; each stands both ways. Chirality has four
    values, as in the first versions of OGB: those that came later count as "other". A molecule
    whose valences rdkit refuses is taken without that check.

    Needs rdkit, which takes most of a minute for the first time. What it makes is kept in
    ``~/.cache/fastgt``, by the content of the file and the version of rdkit.

    Args:
        folder: That of the file, or the file. None: that which ``FASTGT_DATA`` names.

    Raises:
        FileNotFoundError: It is absent.
        ImportError: rdkit is absent.
        ValueError: It is damaged, or what was kept is; says how.

    Source:
        Hu et al., arXiv 2005.00687, ogbg-molhiv; Wu et al., arXiv 1703.00564.
    """
    arrays = _kept(archive.found(folder, "molhiv.csv"))
    node_ptr, edge_ptr, edge_index, atom, bond, y, split = (
        torch.from_numpy(arrays[key].astype(np.int64))
        for key in ("node_ptr", "edge_ptr", "edge_index", "atom", "bond", "y", "split")
    )
    return GraphSet(
        atom,
        bond,
        edge_index,
        node_ptr,
        edge_ptr,
        y,
        {name: (split == i).nonzero()[:, 0] for i, name in enumerate(SPLITS)},
        title="molhiv, scaffold split",
        classes=2,
        node_types=ATOMS,
        edge_types=BONDS,
    )


def molhiv_small(folder: Path | None = None) -> GraphSet:
    """4,000 random training molecules of :func:`molhiv`, and 1,000 of each other split.

    All active molecules of these are there, so that an area under the curve varies less; the others
    are random. They are always the same ones.
    """
    whole = molhiv(folder)
    draw = torch.Generator().manual_seed(0)
    chosen = []
    for name, split in whole.splits.items():
        mixed = split[torch.randperm(len(split), generator=draw)]
        if name == "train":
            chosen.append(mixed[: SMALL[0]])
        else:
            active = whole.y[mixed] == 1
            chosen.append(torch.cat([mixed[active], mixed[~active]])[: SMALL[1]])
    small = whole.subset(torch.cat(chosen).sort().values)
    return replace(small, title="molhiv, a part of it")


def _kept(path: Path) -> dict[str, np.ndarray]:
    """The arrays that were made of the file once, or are made now."""
    try:
        from rdkit import __version__ as version
    except ImportError as error:
        raise ImportError(
            f"molhiv's SMILES are read by rdkit: pip install rdkit ({error})"
        ) from None
    content = path.read_bytes()
    key = hashlib.sha256(f"{_FORMAT} {version} ".encode() + content).hexdigest()[:16]
    kept = Path.home() / ".cache" / "fastgt" / f"molhiv-{key}.npz"
    if kept.is_file():
        try:
            return archive.read(kept, kept.stem, _KEYS)[1]
        except ValueError as error:
            raise ValueError(f"{error}; delete it, and it is made anew") from error
    with archive.checking(str(path)):
        arrays = _parsed(content.decode())
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)  # type: ignore[arg-type]
    kept.parent.mkdir(parents=True, exist_ok=True)
    files.write(kept, buffer.getbuffer())
    return arrays


def _parsed(text: str) -> dict[str, np.ndarray]:
    from rdkit import Chem, rdBase

    features = _Features(Chem)
    splits = {name: i for i, name in enumerate(SPLITS.values())}
    atoms: list[list[int]] = []
    bonds: list[list[int]] = []
    ends: list[tuple[int, int]] = []
    nodes, edges, y, split = [0], [0], [], []
    with rdBase.BlockLogs():
        for number, row in enumerate(csv.DictReader(io.StringIO(text)), 1):
            try:
                molecule = _molecule(Chem, row["smiles"])
                y.append(("0", "1").index(row["HIV_active"]))
                split.append(splits[row["split"]])
            except (KeyError, ValueError, TypeError) as error:
                raise ValueError(f"molecule {number} cannot be read: {error}") from None
            atoms += map(features.of_atom, molecule.GetAtoms())
            for bond in molecule.GetBonds():
                i, j = bond.GetBeginAtomIdx(), bond.GetEndAtomIdx()
                ends += ((i, j), (j, i))
                bonds += 2 * [features.of_bond(bond)]
            nodes.append(len(atoms))
            edges.append(len(ends))
    if not y:
        raise ValueError("there is no molecule")
    return {
        "atom": np.array(atoms, dtype=np.uint8).reshape(-1, len(ATOMS)),
        "bond": np.array(bonds, dtype=np.uint8).reshape(-1, len(BONDS)),
        "edge_index": np.array(ends, dtype=np.int16).reshape(-1, 2).T,
        "node_ptr": np.array(nodes),
        "edge_ptr": np.array(edges),
        "y": np.array(y, dtype=np.uint8),
        "split": np.array(split, dtype=np.uint8),
    }


def _molecule(chem: Any, smiles: str) -> Any:
    molecule = chem.MolFromSmiles(smiles)
    if molecule is not None:
        return molecule
    molecule = chem.MolFromSmiles(smiles, sanitize=False)
    if molecule is None:
        raise ValueError(f"{smiles!r} is no SMILES")
    # some hold metals in valences that rdkit refuses
    molecule.UpdatePropertyCache(strict=False)
    every = chem.SanitizeFlags.SANITIZE_ALL
    chem.SanitizeMol(molecule, every ^ chem.SanitizeFlags.SANITIZE_PROPERTIES)
    return molecule


class _Features:
    """Types of atoms and bonds, numbered as OGB numbers them."""

    def __init__(self, chem: Any):
        def numbered(enum: Any, names: str) -> dict[Any, int]:
            return {getattr(enum, name): i for i, name in enumerate(names.split())}

        self.chirality = numbered(
            chem.ChiralType, "CHI_UNSPECIFIED CHI_TETRAHEDRAL_CW CHI_TETRAHEDRAL_CCW"
        )
        self.hybrid = numbered(chem.HybridizationType, "SP SP2 SP3 SP3D SP3D2")
        self.kind = numbered(chem.BondType, "SINGLE DOUBLE TRIPLE AROMATIC")
        self.stereo = numbered(
            chem.BondStereo,
            "STEREONONE STEREOZ STEREOE STEREOCIS STEREOTRANS STEREOANY",
        )

    def of_atom(self, atom: Any) -> list[int]:
        number, charge = atom.GetAtomicNum(), atom.GetFormalCharge()
        return [
            number - 1 if 1 <= number <= 118 else 118,
            self.chirality.get(atom.GetChiralTag(), 3),
            min(atom.GetTotalDegree(), 11),
            charge + 5 if -5 <= charge <= 5 else 11,
            min(atom.GetTotalNumHs(), 9),
            min(atom.GetNumRadicalElectrons(), 5),
            self.hybrid.get(atom.GetHybridization(), 5),
            int(atom.GetIsAromatic()),
            int(atom.IsInRing()),
        ]

    def of_bond(self, bond: Any) -> list[int]:
        return [
            self.kind.get(bond.GetBondType(), 4),
            self.stereo[bond.GetStereo()],
            int(bond.GetIsConjugated()),
        ]
