"""molhiv: SMILES become graphs with OGB's types of atoms and bonds."""

import csv

import pytest
import torch

from fastgt.datasets import load
from fastgt.datasets import molhiv as reader
from fastgt.models import GraphGPS, GraphGPSConfig
from fastgt.real_graphs import path_of

pytest.importorskip("rdkit")

ROWS = [
    ("Cl[C@H](/C=C/C)Br", "1", "train"),
    ("c1ccccc1[N+](=O)[O-]", "0", "train"),
    ("[Na+].[Cl-]", "0", "valid"),
    ("C", "1", "test"),
    ("CO(C)(C)C", "0", "test"),  # an oxygen of valence 4, which rdkit refuses
]
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    """Nothing is kept in the user's own."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("USERPROFILE", str(tmp_path / "home"))
    return tmp_path / "home" / ".cache" / "fastgt"


def write(folder, rows, names=("smiles", "HIV_active", "split")):
    with (folder / "molhiv.csv").open("w", newline="") as file:
        csv.writer(file).writerows([names, *rows])


def test_types_are_those_of_ogb(tmp_path):
    """The first molecule's are written down in OGB's own features.py."""
    write(tmp_path, ROWS)
    data = load("molhiv", tmp_path)
    assert data.node_ptr.tolist() == [0, 6, 15, 17, 18, 23]
    assert data.edge_ptr.diff().tolist() == [10, 18, 0, 0, 8]
    assert data.node[1].tolist() == [5, 2, 4, 5, 1, 0, 2, 0, 0]
    double = (data.edge_index[:, :10] == torch.tensor([[2], [3]])).all(0)
    assert data.edge[:10][double].tolist() == [[1, 2, 0]]
    ring, nitrogen, oxygen = data.node[6], data.node[12], data.node[14]
    assert ring.tolist() == [5, 0, 3, 5, 1, 0, 1, 1, 1]
    assert nitrogen.tolist() == [6, 0, 3, 6, 0, 0, 1, 0, 0]
    assert oxygen.tolist() == [7, 0, 1, 4, 0, 0, 1, 0, 0]
    aromatic = data.edge[10:28][:, 0] == 3
    assert int(aromatic.sum()) == 12
    assert data.edge[10:28][aromatic].unique(dim=0).tolist() == [[3, 0, 1]]
    assert data.node[17].tolist() == [5, 0, 4, 5, 4, 0, 2, 0, 0]
    assert data.node[19, 0] == 7
    assert data.y.tolist() == [1, 0, 0, 1, 0]
    assert {name: x.tolist() for name, x in data.splits.items()} == {
        "train": [0, 1],
        "val": [2],
        "test": [3, 4],
    }
    for g in range(5):  # each bond stands both ways with the same types
        edges = slice(*data.edge_ptr[g : g + 2].tolist())
        there, back = data.edge_index[:, edges], data.edge_index[:, edges].flip(0)
        assert torch.equal(there[:, ::2], back[:, 1::2])
        assert torch.equal(data.edge[edges][::2], data.edge[edges][1::2])


def test_the_published_model_takes_it(tmp_path):
    write(tmp_path, ROWS)
    data = load("molhiv", tmp_path)
    config = GraphGPSConfig.published("ogbg_molhiv")
    assert (data.node_types, data.edge_types) == (config.node_types, config.edge_types)
    config.walk_steps = config.walk_dim = 0
    batch = data.batch(torch.arange(5))
    assert GraphGPS(config).eval()(batch.node, batch.edge, batch.graph).shape == (5, 1)


def test_what_was_made_is_kept(tmp_path, home, monkeypatch):
    write(tmp_path, ROWS)
    made = load("molhiv", tmp_path)
    real = reader._parsed

    def refuse(text):
        raise AssertionError("read again")

    monkeypatch.setattr(reader, "_parsed", refuse)
    assert load("molhiv", tmp_path / "molhiv.csv").digest() == made.digest()
    (kept,) = home.iterdir()
    content = bytearray(kept.read_bytes())
    for damage in (content[: len(content) // 2], content[:80] + bytes(9) + content[89:], b""):
        kept.write_bytes(damage)
        with pytest.raises(ValueError, match=r"molhiv-\w{16}\.npz is damaged: .*; delete it, and"):
            load("molhiv", tmp_path)
    monkeypatch.setattr(reader, "_parsed", real)
    write(tmp_path, ROWS[:4])  # another file
    assert len(load("molhiv", tmp_path)) == 4
    assert len(list(home.iterdir())) == 2


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (("C(C", "0", "train"), "molecule 6 cannot be read: 'C\\(C' is no SMILES"),
        (("CC", "2", "train"), "molecule 6 cannot be read: "),
        (("CC", "1", "rest"), "molecule 6 cannot be read: 'rest'"),
        (("CC",), "molecule 6 cannot be read: "),
    ],
)
def test_damaged_molecules_are_refused(tmp_path, home, row, message):
    write(tmp_path, [*ROWS, row])
    with pytest.raises(ValueError, match=rf"molhiv\.csv is damaged: {message}"):
        load("molhiv", tmp_path)
    assert not home.exists()


def test_other_files_are_refused(tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match=r"molhiv\.csv is absent: --data names molhiv"):
        load("molhiv", tmp_path)
    monkeypatch.setenv("FASTGT_DATA", str(tmp_path))
    with pytest.raises(FileNotFoundError, match=r"molhiv\.csv is absent: set FASTGT_DATA"):
        load("molhiv")
    write(tmp_path, ROWS, names=("a", "b", "c"))
    with pytest.raises(ValueError, match="molecule 1 cannot be read: 'smiles'"):
        load("molhiv", tmp_path)
    write(tmp_path, [])
    with pytest.raises(ValueError, match="there is no molecule"):
        load("molhiv", tmp_path)
    (tmp_path / "molhiv.csv").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match=r"molhiv\.csv is damaged"):
        load("molhiv", tmp_path)


def test_the_small_set_has_every_active_molecule_that_is_held_out(tmp_path, monkeypatch):
    monkeypatch.setattr(reader, "SMALL", (4, 5))
    chain = [("C" * (i + 1), str(int(i % 4 == 1)), split) for split in ("train", "valid", "test")
             for i in range(12)]  # fmt: skip
    write(tmp_path, chain)
    data = load("molhiv_small", tmp_path)
    assert [len(x) for x in data.splits.values()] == [4, 5, 5]
    for name in ("val", "test"):
        assert int(data.y[data.splits[name]].sum()) == 3
    sizes = data.node_ptr.diff()
    for split in data.splits.values():  # a molecule's class is that of its length
        assert data.y[split].tolist() == (sizes[split] % 4 == 2).long().tolist()
        assert sizes[split].unique().numel() == len(split)
    assert load("molhiv_small", tmp_path).digest() == data.digest()


def test_the_real_file_is_whole():
    """Its first molecules: reading all of them takes most of a minute."""
    try:
        with path_of("molhiv.csv").open() as file:
            lines = [next(file) for _ in range(301)]
            count = 300 + sum(1 for _ in file)
    except FileNotFoundError as error:
        pytest.skip(str(error))
    assert count == 41_126
    arrays = reader._parsed("".join(lines))
    assert len(arrays["y"]) == 300
    assert arrays["node_ptr"][-1] == len(arrays["atom"])
    assert all((arrays["atom"] < reader.ATOMS).all(0))
    assert all((arrays["bond"] < reader.BONDS).all(0))
