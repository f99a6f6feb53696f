"""What every ready-made model refuses by name, and what it must withstand."""

import copy
import io
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from gps_cases import batch
from model_cases import CASES, Numbers, Types, call, draw, permuted, singles, sizes
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel

from fastgt import Graph
from fastgt.models.exphormer_graph import expander_table, exphormer_pattern
from fastgt.models.mpnn_vn import add_virtual_nodes
from fastgt.models.san import complement
from fastgt.testing import random_batch

pytestmark = pytest.mark.usefixtures("one_thread")
EVERY = pytest.mark.parametrize("name", CASES)
NO_EDGES = torch.zeros(2, 0, dtype=torch.long)
OF = [(name, key) for name, case in CASES.items() for key in case.inputs if key != "first"]
TYPES = [(name, key) for name, key in OF if isinstance(CASES[name].inputs[key], Types)]
NUMBERS = [(name, key) for name, key in OF if isinstance(CASES[name].inputs[key], Numbers)]
RANKS = 2


def made(name, seed=0):
    torch.manual_seed(seed)
    return CASES[name].make()


def trained(model):
    """A Polynormer trains a part of itself in each of its stages."""
    return [(key, p) for key, p in model.named_parameters() if p.requires_grad]


def graphs():
    """Plain molecules, without what a batch norm in training refuses."""
    return random_batch(5, [(6, 14), (5, 12), (7, 20), (4, 8)])


@pytest.mark.parametrize("sizes", [(3, 4), (4, 3)])
@pytest.mark.parametrize(
    "made",
    [
        complement,
        lambda graph: add_virtual_nodes(torch.zeros(graph.num_rows), None, graph),
        lambda graph: exphormer_pattern(graph, None, 1),
        lambda graph: expander_table(graph, 3),
    ],
    ids=["complement", "virtual nodes", "pattern", "expander"],
)
def test_what_a_model_makes_of_a_graph_needs_a_square_one(made, sizes):
    """Columns without a row would stand for the nodes of another graph, or for virtual ones."""
    graph = Graph.from_edge_index(torch.tensor([[2, 1, 0], [0, 1, 2]]), sizes)
    rows, cols = sizes
    with pytest.raises(ValueError, match=f"graph must be square, got {rows} rows and {cols} col"):
        made(graph)


@EVERY
def test_an_edge_index_is_no_graph(name):
    case, graph = CASES[name], graphs()
    model, given = made(name), case.derived(graph, draw(case, graph))
    for wrong in (graph.edge_index, graph.edge_index.tolist(), None):
        found = type(wrong).__name__
        with pytest.raises(TypeError, match=rf"graph must be a fastgt\.Graph, got {found}"):
            model(graph=wrong, **given)


@pytest.mark.parametrize(("name", "key"), TYPES)
def test_types(name, key):
    case, graph = CASES[name], graphs()
    model, given = made(name).eval(), draw(case, graph)
    types, (letter, kinds) = given[key], case.inputs[key]
    wanted = call(case, model, graph, given)
    for dtype in (torch.uint8, torch.int8, torch.int16, torch.int32):
        assert torch.equal(call(case, model, graph, given | {key: types.to(dtype)}), wanted)
    # what stands on the graph is derived of fitting inputs
    given, n = case.derived(graph, given), len(types)
    wrong = types.clone()
    wrong[2] = kinds
    for x, error, message in (
        (types.float(), TypeError, rf"{key} must hold integers .* got torch\.float32"),
        (types.bool(), TypeError, rf"{key} must hold integers .* got torch\.bool"),
        (types.tolist(), TypeError, f"{key} must be a tensor of integers, got list"),
        (types[1:], ValueError, rf"{key} must be \[{letter}\] = \[{n}\] integers, got \[{n - 1}\]"),
        (types[:, None], ValueError, rf"{key} must be \[{letter}\] = \[{n}\] .* \[{n}, 1\]"),
        (wrong, ValueError, f"{key} must be from 0 to {kinds - 1}, got {kinds} at 2"),
        (-wrong, ValueError, f"{key} must be from 0 to {kinds - 1}, got -"),
    ):
        with pytest.raises(error, match=message):
            model(graph=graph, **given | {key: x})


@pytest.mark.parametrize(("name", "key"), NUMBERS)
def test_numbers(name, key):
    case, graph = CASES[name], graphs()
    model, given = made(name).eval(), draw(case, graph)
    x, (letter, width) = given[key], case.inputs[key]
    given, n = case.derived(graph, given), sizes(graph)[letter]
    for wrong, error, message in (
        (x.long(), TypeError, rf"{key} must be float16.* got torch\.int64"),
        (x.bool(), TypeError, rf"{key} must be float16.* got torch\.bool"),
        (x.tolist(), TypeError, f"{key} must be a tensor, got list"),
        (x[1:], ValueError, rf"{key} must be .* \[{n}, {width}\], got \[{n - 1}, {width}\]"),
        (x[:, 1:], ValueError, rf"{key} must be .* \[{n}, {width}\], got \[{n}, {width - 1}\]"),
        (x[:, 0], ValueError, rf"{key} must be .* \[{n}, {width}\], got \[{n}\]"),
    ):
        with pytest.raises(error, match=message):
            model(graph=graph, **given | {key: wrong})
    for dtype in (torch.float64, torch.float16):
        other = given | {key: x.to(dtype)}
        if key == "lap_values":  # they become what the vectors are
            torch.testing.assert_close(
                model(graph=graph, **other), model(graph=graph, **given), rtol=1e-2, atol=1e-3
            )
            continue
        message = rf"{key} must be torch\.float32, as the model is, got {dtype}: {key}\.to\(torch"
        with pytest.raises(TypeError, match=message):
            model(graph=graph, **other)


@EVERY
def test_one_row_of_a_batch_norm_in_training_is_refused(name):
    """One node of the whole batch; its norms stay as they were."""
    case, model = CASES[name], made(name)
    graph = Graph.from_edge_index(torch.zeros(2, 2, dtype=torch.long), 1)
    given = draw(case, graph)
    before = copy.deepcopy(model.state_dict())
    if any(isinstance(m, nn.BatchNorm1d) for m in model.modules()):
        with pytest.raises(
            ValueError, match=r"is a batch norm in training and got 1 (node|graph): a va"
        ):
            call(case, model, graph, given)
        assert all(torch.equal(x, before[key]) for key, x in model.state_dict().items())
    else:
        assert call(case, model, graph, given).isfinite().all()
    assert call(case, model.eval(), graph, given).isfinite().all()


@EVERY
def test_one_edge_or_one_graph_trains_or_is_refused_by_name(name):
    case = CASES[name]
    for graph in (
        Graph.from_edge_index(torch.tensor([[0], [1]]), graph_ptr=torch.tensor([0, 2, 4])),
        Graph.from_edge_index(torch.tensor([[0, 1, 2], [1, 2, 0]]), 4),
    ):
        model, given = made(name), draw(case, graph)
        edges = graph.num_edges == 1 and any("edge_norm" in key for key in model.state_dict())
        if edges or (graph.num_graphs == 1 and name == "MPNNVirtualNode"):
            message = f"is a batch norm in training and got 1 {'edge' if edges else 'graph'}: a v"
            with pytest.raises(ValueError, match=message):
                call(case, model, graph, given)
        else:
            call(case, model, graph, given).sum().backward()
            assert all(p.grad.isfinite().all() for _, p in trained(model))
        assert call(case, model.eval(), graph, given).isfinite().all()


@EVERY
@pytest.mark.parametrize(
    "offsets", [[0, 4, 9], [0, 1], [0, 0, 3, 3], [0, 0], [0]], ids=lambda x: f"offsets {x}"
)
def test_no_edges(name, offsets):
    """Nor more: one node, graphs without nodes, no graphs."""
    case, graph = CASES[name], Graph.from_edge_index(NO_EDGES, graph_ptr=torch.tensor(offsets))
    model, given = made(name), draw(case, graph)
    out = call(case, model.eval(), graph, given)
    assert len(out) == sizes(graph)[case.of]
    assert out.isfinite().all()
    if graph.num_rows > 1:
        call(case, model.train(), graph, given).sum().backward()
        for key, p in trained(model):
            assert p.grad is not None, key
            assert p.grad.isfinite().all(), key
        assert all(x.isfinite().all() for x in model.state_dict().values())


@EVERY
def test_a_batch_equals_its_graphs_one_by_one(name):
    case, model, graph = CASES[name], made(name).double().eval(), batch()
    given = draw(case, graph, torch.float64)
    whole = call(case, model, graph, given)
    parts = [call(case, model, one, part) for one, part in singles(case, graph, given)]
    torch.testing.assert_close(torch.cat(parts), whole, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if not case.ordered])
def test_the_order_of_nodes_and_edges_means_nothing(name):
    case, model, graph = CASES[name], made(name).double().eval(), batch()
    given = draw(case, graph, torch.float64)
    wanted = call(case, model, graph, given)
    other, moved, nodes = permuted(case, graph, given)
    found = call(case, model, other, moved)
    wanted = wanted[nodes] if case.of == "N" else wanted
    torch.testing.assert_close(found, wanted, rtol=1e-11, atol=1e-11)


@EVERY
def test_a_model_of_the_meta_device_is_a_fresh_one(name):
    wanted = made(name, seed=7).state_dict()
    with torch.device("meta"):
        model = CASES[name].make()
    model.to_empty(device="cpu")
    for x in (*model.parameters(), *model.buffers()):
        x.data.fill_(torch.nan if x.is_floating_point() else 0)
    torch.manual_seed(7)
    model.reset_parameters()
    found = model.state_dict()
    assert found.keys() == wanted.keys()
    for key, x in wanted.items():
        assert torch.equal(found[key], x), key


@EVERY
def test_copies_and_files_compute_the_same(name):
    case, graph = CASES[name], graphs()
    model, given = made(name), draw(case, graph)
    call(case, model, graph, given)  # moves the norms' statistics
    wanted = call(case, model.eval(), graph, given)
    twin, stored = copy.deepcopy(model), io.BytesIO()
    torch.save(model.state_dict(), stored)
    stored.seek(0)
    again = made(name, seed=1).eval()
    assert not torch.equal(call(case, again, graph, given), wanted)
    again.load_state_dict(torch.load(stored, weights_only=True))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(1)
    for other in (twin, again):
        assert torch.equal(call(case, other, graph, given), wanted)


@EVERY
def test_half_precision(name):
    """Trained under autocast, and evaluated in bfloat16."""
    case, graph = CASES[name], graphs()
    model, given = made(name), draw(case, graph)
    wanted = call(case, copy.deepcopy(model).eval(), graph, given)
    scale = wanted.abs().max()
    with torch.autocast("cpu", torch.bfloat16):
        found = call(case, copy.deepcopy(model).eval(), graph, given)
        loss = call(case, model, graph, given).float().square().mean()
    loss.backward()
    for key, p in trained(model):
        assert p.grad.dtype == torch.float32, key
        assert p.grad.isfinite().all(), key
    assert (found.float() - wanted).abs().max() < 0.1 * scale + 0.02
    whole = made(name).bfloat16().eval()
    narrow = call(case, whole, graph, draw(case, graph, torch.bfloat16))
    assert narrow.dtype == torch.bfloat16
    assert (narrow.float() - wanted).abs().max() < 0.1 * scale + 0.02


@pytest.mark.parametrize("name", ["EdgeGraphTransformer", "GPS genconv"])
def test_compiled_whole(name, compiled_kernels):
    """In one graph without breaks, and for another batch."""
    torch._dynamo.reset()
    case = CASES[name]
    model = made(name).eval()
    compiled = torch.compile(model, backend="eager", fullgraph=True, dynamic=True)
    for graph in (graphs(), random_batch(2, [(9, 30), (3, 7)])):
        given = case.derived(graph, draw(case, graph))
        torch.testing.assert_close(*(f(graph=graph, **given) for f in (model, compiled)))


@pytest.mark.parametrize("name", ["GraphTransformer", "GPS bigbird"])
def test_exported(name, compiled_kernels):
    case, graph = CASES[name], graphs()
    model, given = made(name).eval(), case.derived(graph, draw(case, graph))
    program = torch.export.export(model, (), {"graph": graph, **given})
    found = program.module()(graph=graph, **given)
    torch.testing.assert_close(found, model(graph=graph, **given))


def work(rank: int, folder: Path) -> None:
    """Two steps of every model; the ranks have other graphs, one has no edges at first."""
    distributed.init_process_group(
        "gloo", init_method=f"file://{folder / 'store'}", rank=rank, world_size=RANKS
    )
    torch.set_num_threads(1)
    found = {}
    for name, case in CASES.items():
        model = DistributedDataParallel(made(name), find_unused_parameters=False)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for step in range(2):
            graph = random_batch(2 * step + rank, [(5, 12), (4 + rank, 9)])
            if step == rank == 0:
                graph = Graph.from_edge_index(NO_EDGES, graph_ptr=graph.graph_ptr)
            optimizer.zero_grad()
            call(case, model, graph, draw(case, graph)).square().mean().backward()
            optimizer.step()
        found[name] = dict(model.module.named_parameters())
    torch.save(found, folder / f"{rank}.pt")
    distributed.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    runs = [
        subprocess.Popen(
            [sys.executable, __file__, str(rank), str(folder)], stderr=subprocess.PIPE, text=True
        )
        for rank in range(RANKS)
    ]
    try:
        errors = [run.communicate(timeout=240)[1] for run in runs]
    finally:
        for run in runs:
            run.kill()
    assert [run.returncode for run in runs] == [0] * RANKS, errors
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(RANKS)]


@pytest.mark.skipif(not distributed.is_available(), reason="no torch.distributed")
@EVERY
def test_ranks_train_the_same_model(name, ranks):
    """Without unused parameters: DistributedDataParallel would say so in the second step."""
    first, second = (found[name] for found in ranks)
    before = dict(made(name).named_parameters())
    moved = 0
    for key, x in first.items():
        assert torch.equal(x, second[key]), key
        moved += not torch.equal(x, before[key])
    assert moved > len(first) / 2


if __name__ == "__main__":
    work(int(sys.argv[1]), Path(sys.argv[2]))
