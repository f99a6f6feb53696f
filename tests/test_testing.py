"""The tools that the tests stand on: the accuracy gate, poisoned memory, random graphs."""

import pytest
import torch
from attention_cases import DEVICE

from fastgt.testing import PROBLEMS, assert_as_accurate, random_batch


@pytest.mark.parametrize(
    "spoil",
    [
        lambda x: x + 1e-3,
        lambda x: x.clone().index_fill_(0, torch.tensor([1]), torch.nan),
        lambda x: x.clone().index_fill_(0, torch.tensor([1]), torch.inf),
    ],
    ids=["offset", "nan", "inf"],
)
def test_accuracy_gate_can_fail(spoil):
    x = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
    x[3] = -torch.inf
    assert_as_accurate(x, x, x.double(), "x")
    with pytest.raises(AssertionError, match=r"x is off by .* at \[\d, \d\]"):
        assert_as_accurate(spoil(x), x, x.double(), "x")
    with pytest.raises(AssertionError, match="x is off by"):
        assert_as_accurate(x.nan_to_num(neginf=0.0), x, x.double(), "x")


def test_accuracy_gate_knows_what_is_too_large_for_the_dtype():
    truth = torch.tensor([82267.0, 1.0], dtype=torch.float64)
    half = truth.half()
    assert half[0] == torch.inf
    assert_as_accurate(half, half, truth, "x")
    for wrong in (-torch.inf, torch.nan, 65504.0):
        with pytest.raises(AssertionError, match="is off by"):
            assert_as_accurate(torch.tensor([wrong, 1.0]).half(), half, truth, "x")
    with pytest.raises(AssertionError, match="is off by"):
        assert_as_accurate(torch.tensor([torch.inf, torch.inf]).half(), half, truth, "x")


def test_accuracy_gate_knows_what_cancels():
    x = torch.zeros(2, dtype=torch.float64)
    off = torch.tensor([1e-4, 0.0])
    terms = torch.tensor([100.0, 1.0])
    assert_as_accurate(off, x.float(), x, "x", terms=terms)
    with pytest.raises(AssertionError, match=r"x is off by .* at \[1\]"):
        assert_as_accurate(off.flip(0), x.float(), x, "x", terms=terms)


def test_library_memory_is_poisoned():
    source = "import torch\ndef f(x): return x.new_empty(3), torch.empty(3, dtype=torch.int32)"
    for name, poisoned in (("fastgt.somewhere", True), ("elsewhere", False)):
        scope = {"__name__": name}
        exec(source, scope)
        x, i = scope["f"](torch.zeros(1))
        if poisoned:
            assert x.isnan().all()
            assert (i == 2**30 - 1).all()


def test_random_batches_have_their_graphs():
    graph = random_batch(0, [(4, 9), (0, 0), (3, 5)], device=DEVICE)
    assert graph.graph_ptr.tolist() == [0, 4, 4, 7]
    assert graph.num_edges == 14


# rows, edges, graphs
SIZES = {
    "power_law": (20_000, 300_000, 1),
    "molecules": (2_944, 6_400, 128),
    "pattern": (3_813, 194_254, 32),
    "superpixels": (14_807, 118_456, 32),
    "rmat": (32_768, 468_117, 1),
    "mesh": (16_384, 98_250, 1),
    "cora": (2_708, 10_556, 1),
    "citeseer": (3_327, 9_228, 1),
    "amazon_computers": (13_752, 491_722, 1),
    "debian": (63_436, 661_326, 1),
    "tolokers": (11_758, 1_038_000, 1),
    "minesweeper": (10_000, 78_804, 1),
    "actor": (7_600, 53_318, 1),
    "squirrel": (2_223, 46_998, 1),
    "moby": (103_305, 3_566_702, 1),
    "zinc": (2_865, 6_140, 128),
    "dd": (18_811, 94_800, 64),
    "power10k": (10_000, 2 * 12_706, 1),
    "power70k": (70_000, 2 * 88_207, 1),
    "flights": (229, 600_000, 1),
    "cluster": (3_813, 142_334, 32),
    "points": (8_192, 131_072, 8),
    "banded": (16_384, 540_400, 1),
    "complete": (4_096, 262_144, 64),
    "molhiv": (2_075, 4_228, 128),
    "rmat_11": (2_048, 25_406, 1),
    "rmat_13": (8_192, 110_798, 1),
    "rmat_17": (131_072, 1_943_022, 1),
    "github": (37_700, 577_410, 1),
    "pascalvoc": (497_424, 2_805_792, 1024),
    "h_to_h": (40_962, 327_660, 1),
    "tiny": (11, 23, 2),
    "degree_4": (16_384, 65_536, 1),
    "degree_16": (16_384, 262_144, 1),
    "degree_64": (16_384, 1_048_576, 1),
    "degree_256": (16_384, 4_194_304, 1),
}
# 8, 12, 32 and 131 million edges take seconds to minutes
LARGE = {"rmat_19", "igb_small", "rmat_21", "rmat_23"}
DEGREES = {"degree_4", "degree_16", "degree_64", "degree_256"}
RMAT = {"rmat", "rmat_11", "rmat_13", "rmat_17"}
DIRECTED = {"power_law", "molecules", "superpixels", "points", "squirrel", "flights"}
DIRECTED |= DEGREES | RMAT | {"tiny"}
MULTIGRAPHS = {"power_law", "molecules", "power10k", "power70k", "flights", "tiny"} | DEGREES


def test_every_problem_is_looked_at():
    assert set(PROBLEMS) == set(SIZES) | LARGE


@pytest.mark.parametrize("name", SIZES)
def test_problems_are_what_they_say(name):
    try:
        graph = PROBLEMS[name].load()
    except FileNotFoundError as error:
        pytest.skip(str(error))
    assert (graph.num_rows, graph.num_edges, graph.num_graphs) == SIZES[name]
    n = graph.num_rows
    row, col = graph.row.long(), graph.col.long()
    there, back = (row * n + col).sort().values, (col * n + row).sort().values
    assert torch.equal(there, back) == (name not in DIRECTED)
    assert bool((there.diff() > 0).all()) == (name not in MULTIGRAPHS)
    if graph.num_graphs > 1:
        assert (graph.graph_ptr.diff() > 1).all()
    again = PROBLEMS[name].load()
    assert torch.equal(again.row_ptr, graph.row_ptr)
    assert torch.equal(again.col, graph.col)


def test_graphs_of_published_figures_are_like_those():
    github, mesh = PROBLEMS["github"].load(), PROBLEMS["h_to_h"].load()
    assert 8_000 < int(github.row_degree.max()) < 10_000  # MUSAE's has a hub of 9,458
    # level 6 with all coarser ones: a node has six neighbours, and those of the levels it is in
    assert mesh.num_nodes == 10 * 4**6 + 2
    assert mesh.num_edges == 2 * sum(30 * 4**level for level in range(7))
    assert mesh.row_degree.unique().tolist() == [6, 12, 18, 24, 30, 35, 36]
    assert int((mesh.row_degree == 35).sum()) == 12
    regions = PROBLEMS["pascalvoc"].load()
    assert abs(regions.num_nodes / regions.num_graphs / 479.4 - 1) < 0.03
    assert abs(regions.num_edges / regions.num_graphs / 2710.5 - 1) < 0.03
