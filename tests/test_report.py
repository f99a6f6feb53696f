"""The model of memory traffic, what compiled code says, and the command that prints both."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fastgt import Graph, tiles
from fastgt.bench import device_model, traffic
from fastgt.cli import main
from fastgt.testing import PROBLEMS, random_graph

RESULTS = Path(traffic.__file__).parent / "results"
SHAPES = [(8, 16), (1, 128)]


def load(problem: str) -> Graph:
    try:
        return PROBLEMS[problem].load()
    except FileNotFoundError as error:
        pytest.skip(str(error))


def kernels(graph: Graph, path: str, heads: int = 8, width: int = 16, **options):
    graph = graph.plan(path)
    options = {"heads": heads, "width": width, "dtype": torch.bfloat16} | options
    found = traffic.attention_traffic(graph, graph.settled, **options)
    return {kernel.name: kernel for kernel in found}


def misses_by_the_book(nodes: list[int], capacity: int) -> int:
    recent: list[int] = []
    missed = 0
    for node in nodes:
        if node in recent:
            recent.remove(node)
        else:
            missed += 1
        recent = [*recent, node][-capacity:]
    return missed


@pytest.mark.parametrize("capacity", [1, 3, 8, 40])
def test_misses_are_those_of_an_lru_cache(capacity):
    nodes = torch.randint(20, (400,), generator=torch.Generator().manual_seed(0))
    nodes = torch.cat([nodes, torch.arange(12).repeat(5)])
    assert device_model.Visits(nodes).misses(capacity) == misses_by_the_book(
        nodes.tolist(), capacity
    )


def test_gathering_visits_columns_in_the_order_of_the_buckets():
    degrees = torch.tensor([3, 1100, 2, 40, 0, 600, 20])
    ptr = torch.cat([torch.zeros(1, dtype=torch.int64), degrees.cumsum(0)])
    col = torch.randint(7, (int(ptr[-1]),), generator=torch.Generator().manual_seed(0))
    few, middle, segment, split = (x[:-2].tolist() for x in tiles.buckets(ptr))
    ranges = [(begin, end) for _, begin, end in segment]
    ranges += [(ptr[row], ptr[row + 1]) for row in [*middle, *few]]
    walk = (ptr, col, col, *tiles.buckets(ptr))
    visits, _, parts, splits = traffic._gathered(walk, 4)
    assert visits.nodes.tolist() == [int(c) for begin, end in ranges for c in col[begin:end]]
    assert (parts, splits) == (len(segment), len(split)) == (5, 2)


@pytest.mark.parametrize(("heads", "width"), SHAPES)
@pytest.mark.parametrize(
    "problem",
    ["power_law", "molecules", "pattern", "superpixels", "rmat", "mesh", "debian", "zinc", "moby"],
)
def test_gathering_moves_what_the_design_says(problem, heads, width):
    graph = load(problem)
    found = kernels(graph, "gather", heads, width)
    design = traffic.designed(graph, heads, width, torch.bfloat16)
    forward, dq, dkv = (found[name] for name in ("fwd", "bwd dq", "bwd dkv"))
    # the formula counts k and v of nodes that nobody attends to
    unseen = int((graph.col_degree == 0).sum()) * 4 * heads * width
    assert forward.compulsory == pytest.approx(design["compulsory_forward"] - unseen, rel=0.1)
    assert forward.gathered == design["gathers_forward"]
    # beside q and do, lse, w and gamma of 32 bits for each head
    assert dq.gathered + dkv.gathered == pytest.approx(design["gathers_backward"], rel=0.1)
    combined = sum(k.once for name, k in found.items() if name.endswith("combine"))
    assert combined < 0.01 * (forward.gathered + dq.gathered + dkv.gathered)


@pytest.mark.parametrize("problem", ["pattern", "superpixels", "rmat"])
def test_windows_save_rho(problem):
    graph = load(problem)
    rho = tiles.density(graph.row_ptr, graph.col, graph.num_cols)
    gathered, windows = (kernels(graph, path) for path in ("gather", "windows"))
    for name in ("fwd", "bwd dq"):
        assert windows[name].gathered * rho == pytest.approx(gathered[name].gathered)
        # two products of 64 rows forward, four backward, of entries and of what fills up tiles
        products = 4 if name == "fwd" else 8
        entries = windows[name].gathered // (8 * 2 * 16 * 2)
        needed = products * 64 * 16 * 8 * entries
        assert needed <= windows[name].flops < 2 * needed


def test_key_heads_are_shared_in_the_cache_only():
    graph = random_graph(0, 500, 9000)
    many, few = kernels(graph, "windows"), kernels(graph, "windows", kv_heads=2)
    assert few["fwd"].gathered == many["fwd"].gathered  # by one program for each query head
    assert 4 * few["fwd"].row == many["fwd"].row
    gathered = kernels(graph, "gather", kv_heads=2)["fwd"].gathered
    assert 4 * gathered == kernels(graph, "gather")["fwd"].gathered


def test_a_bias_adds_its_values_and_its_numbers():
    graph = random_graph(0, 500, 9000)
    for path, extra in (("gather", 4), ("windows", 0)):
        plain, biased = kernels(graph, path), kernels(graph, path, bias=True)
        values = 9000 * 8 * 2
        for name, times in (("fwd", 1), ("bwd dq", 1), ("bwd dkv", 2)):
            more = biased[name].once - plain[name].once - times * values
            assert more == 9000 * extra or (not extra and 9000 * 4 < more < 9000 * 8)


def test_no_edges_and_no_nodes_move_next_to_nothing():
    for rows in (0, 3):
        for path in ("gather", "windows"):
            graph = Graph.from_edge_index(torch.zeros(2, 0, dtype=torch.int64), rows)
            for kernel in kernels(graph, path).values():
                assert kernel.gathered == 0
                assert kernel.seconds(device_model.DEVICES["H200"]) < 1e-8


def test_what_does_not_fit_in_the_cache_comes_from_memory():
    graph = random_graph(0, 2000, 30_000)
    kernel = kernels(graph, "gather")["fwd"]
    device = device_model.DEVICES["H200"]
    assert kernel.missed(device) == kernel.row * len(graph.col.unique())
    tiny = device._replace(cache=20 * kernel.row)
    assert 0.95 < kernel.missed(tiny) / kernel.gathered < 1  # nodes are random: 1 in 100 hits
    assert kernel.limits(tiny)["memory"] > kernel.limits(device)["memory"]
    assert kernel.seconds(tiny) == max(kernel.limits(tiny).values())


# edges a distinct column of 16 and of 64 rows, as measured for the design on other drawings
@pytest.mark.parametrize(
    ("problem", "order", "rho"),
    [
        ("pattern", None, (5.5, 16.4)),
        ("molecules", None, (1.8, 2.1)),
        ("zinc", None, (1.8, 2.1)),
        ("rmat", "degree", (1.6, 2.35)),
        ("mesh", "rcm", (1.8, 2.0)),
    ],
)
def test_rho_is_near_the_designs(problem, order, rho):
    graph = load(problem)
    graph = graph if order is None else graph.reordered(order)
    for height, expected in zip((16, 64), rho, strict=True):
        found = tiles.density(graph.row_ptr, graph.col, graph.num_cols, height)
        assert found == pytest.approx(expected, rel=0.15)


@pytest.mark.parametrize(
    ("name", "known"),
    [
        ("NVIDIA H200", True),
        ("NVIDIA H100 80GB HBM3", True),
        ("NVIDIA H100 PCIe", False),
        ("NVIDIA A100-SXM4-80GB", True),
        ("AMD Instinct MI300X", True),
        ("NVIDIA GeForce RTX 4090", False),
    ],
)
def test_a_known_device_has_a_prediction(name, known):
    graph = random_graph(0, 500, 9000)
    found = traffic.predicted(graph, name, heads=4, width=32, dtype=torch.float16)
    assert set(found) == ({"predicted_forward_s", "predicted_both_s"} if known else set())
    assert not known or 0 < found["predicted_forward_s"] < found["predicted_both_s"]


def test_traffic_command(tmp_path, capsys):
    path = tmp_path / "new" / "traffic.json"
    options = ["--problem", "molecules", "--heads", "4", "--width", "32", "--device", "H200"]
    assert main(["report", "traffic", *options, "--path", "windows", "--json", str(path)]) == 0
    printed = capsys.readouterr().out
    assert "H=4 D=32 bfloat16, windows -> windows of 64 rows (named)" in " ".join(printed.split())
    assert "bwd dkv" in printed
    (row,) = json.loads(path.read_text())
    assert [k["kernel"] for k in row["kernels"]] == ["fwd", "bwd dq", "bwd dkv"]
    assert main(["report", "traffic", "--heads", "4"]) == 2
    assert "--width must be given as often" in capsys.readouterr().err
    assert main(["report", "traffic", "--problem", "power_law", "--path", "graphs"]) == 2
    assert "graphs of up to 128 nodes" in capsys.readouterr().err


def test_committed_traffic_is_what_the_model_gives():
    rows = json.loads((RESULTS / "traffic.json").read_text())
    assert {row["problem"] for row in rows} == set(traffic.COMMITTED)
    row = next(r for r in rows if r["problem"] == "superpixels" and r["path"] == "gather")
    shape = {"heads": row["heads"], "width": row["width"], "dtype": torch.bfloat16}
    assert traffic.measure("superpixels", load("superpixels"), "gather", **shape) == row


TTIR = """
module {
  tt.func public @_kernel(%k_ptr: !tt.ptr<bf16> {tt.divisibility = 16 : i32}, %n: i32) {
    %c0_i32 = arith.constant 0 : i32
    %c4 = arith.constant 4 : i32
    %c1_i32 = arith.constant 1 : i32
    %q = tt.load %1, %2, %3 : tensor<8x16x!tt.ptr<bf16>> loc(#loc1)
    %m = scf.for %member = %c0_i32 to %c4 step %c1_i32 iter_args(%x = %y) -> (i32)  : i32 {
      %acc = scf.for %at = %8 to %stop step %c4 iter_args(%a = %b) -> (i32)  : i32 {
        %s = tt.load %1 : !tt.ptr<i32> loc(#loc2)
        %k = tt.load %1, %2, %3 {cache = 1 : i32} : tensor<8x16x!tt.ptr<bf16>> loc(#loc2)
        %r = "tt.reduce"(%k) <{axis = 1 : i32}> ({
        }) : (tensor<8x16xf32>) -> tensor<8xf32> loc(#loc2)
        %p = scf.for %i = %c0_i32 to %c4 step %c1_i32 iter_args(%a = %b) -> (i32)  : i32 {
          %lse = tt.load %1, %2, %3 : tensor<8x!tt.ptr<f32>> loc(#loc2)
        }
      }
    }
    %z = scf.if %18 -> (i32) {
      %acc = scf.for %at = %8 to %stop step %c4 iter_args(%a = %b) -> (i32)  : i32 {
        %k = tt.load %1, %2, %3 : tensor<64x512x!tt.ptr<f64>> loc(#loc2)
      }
    } else {
      %w = scf.for %at = %8 to %stop step %c4 iter_args(%a = %b) -> (i32)  : i32 {
        %k = tt.load %1, %2, %3 : tensor<64x512x!tt.ptr<f64>> loc(#loc2)
      }
    }
    %u = scf.for %at = %8 to %stop step %c4 iter_args(%a = %b) -> (i32)  : i32 {
      %k = tt.load %1, %2, %3 : tensor<8x!tt.ptr<i8>> loc(#loc2)
    }
  }
}
"""


def test_bytes_of_a_step_are_counted_in_the_loop_over_edges():
    resources = pytest.importorskip("fastgt.kernels.resources", exc_type=ImportError)
    # a scalar, a tile of 8 x 16, four times 8 numbers; for 8 entries
    assert resources._step_bytes(TTIR, {"BLOCK_N": 8}) == -(-(4 + 256 + 4 * 32) // 8)


def test_arguments_of_a_kernel_have_paths():
    resources = pytest.importorskip("fastgt.kernels.resources", exc_type=ImportError)
    edge_tile = pytest.importorskip("fastgt.kernels.edge_tile", exc_type=ImportError)
    none = dict.fromkeys(edge_tile.Terms._fields)
    terms = edge_tile.Terms(**none | {"key": torch.ones(2, dtype=torch.float16)})
    values = resources.by_path(
        {"k_ptr": torch.ones(2), "k_stride": (16, 1), "terms": terms, "BLOCK_D": 16}
    )
    assert (values["k_stride.1"], values["terms.value"], values["BLOCK_D"]) == (1, None, 16)
    assert resources._pointers(values) == {"k_ptr": 4, "terms.key": 2}
    assert resources.constants(values) == {"BLOCK_D": 16}


def test_occupancy_is_bound_by_what_runs_out_first():
    resources = pytest.importorskip("fastgt.kernels.resources", exc_type=ImportError)
    sm_90, gfx942 = resources.PROCESSORS["sm_90"], resources.PROCESSORS["gfx942"]
    for on, registers, shared, columns, warps, resident in (
        (sm_90, 32, 0, 0, 4, 64),
        (sm_90, 33, 0, 0, 4, 48),  # 40 of 512: 12 warps of each part
        (sm_90, 255, 0, 0, 8, 8),
        (sm_90, 32, 227 * 1024, 0, 4, 4),
        (sm_90, 32, 227 * 1024 + 1, 0, 4, 0),
        (sm_90, 32, 0, 0, 1, 32),  # programs
        (sm_90, 32, 0, 256, 4, 8),  # tensor memory
        (sm_90, 32, 0, 513, 4, 0),
        (gfx942, 128, 32 * 1024, 0, 4, 8),
        (gfx942, 512, 0, 0, 4, 4),
    ):
        assert resources._resident_warps(on, registers, shared, columns, warps) == resident


def test_every_kernel_is_reported():
    """Of every operator: the budget has the keys of the report."""
    root = Path(__file__).parent.parent
    budget = json.loads((root / "tests" / "kernel_budget.json").read_text())
    sources = "".join(path.read_text() for path in (root / "kernels").glob("*.py"))
    kernels = set(re.findall(r"def _(\w+_kernel)\(", sources))
    assert len(kernels) > 30
    for target, used in budget.items():
        assert kernels <= {key.split("/")[1].removesuffix("_small") for key in used}, target


def test_kernels_command(tmp_path):
    pytest.importorskip("triton")
    path = tmp_path / "kernels.json"
    options = ["--target", "sm_90", "--only", "one_head_d8", "--json", str(path)]
    # a process of its own: here, Triton may be set to interpret
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    run = subprocess.run(
        [sys.executable, "-m", "fastgt", "report", "kernels", *options],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr[-4000:]
    assert "compiling one_head_d8_fp16 for sm_90" in run.stderr
    assert "one_head_d8_fp16\n attention_fwd " in run.stdout
    for used in json.loads(path.read_text())["sm_90"].values():
        # k and v of 8 channels and an index, or q and do with lse, w and gamma
        assert used["step_bytes"] == used["step_bytes_design"]
        assert used["step_bytes"] in (36, 48)
        assert used["row_load"] == 16


def test_kernels_command_refuses_the_interpreter(monkeypatch, capsys):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert main(["report", "kernels"]) == 1
    assert "unset it" in capsys.readouterr().err
