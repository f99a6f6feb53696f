"""Models on torch-geometric's layers compute the same, wrong ones are not timed."""

import copy
import sys
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from fastgt.bench import harness, models, on_pyg, table
from fastgt.datasets import GraphSet
from fastgt.testing import Problem, random_graph

TINY = {"graph_transformer": "tiny", **{m: p[0] for m, p in list(models.MODELS.items())[1:]}}
SMALL = {"dim": 8, "heads": 2, "layers": 2}
REPAIRED = "pyg, padded keys zeroed"


@pytest.fixture(autouse=True)
def data(monkeypatch):
    """Ragged graphs, one without edges; in each the last node receives none."""
    generator = torch.Generator().manual_seed(0)
    nodes = [5, 3, 9, 4, 1, 6, 7, 3, 8, 5, 2, 6]
    edges = [8, 4, 20, 6, 0, 9, 11, 5, 14, 7, 2, 12]
    index = [
        torch.randint(max(n - 1, 1), (2, e), generator=generator)
        for n, e in zip(nodes, edges, strict=True)
    ]
    node_ptr, edge_ptr = (torch.tensor([0, *x]).cumsum(0) for x in (nodes, edges))

    def types(kinds, count):
        return torch.randint(kinds, (count,), generator=generator)

    flat = torch.cat(index, 1)
    made = GraphSet(
        types(models.ATOM_TYPES, sum(nodes)),
        types(models.BOND_TYPES, sum(edges)),
        flat,
        node_ptr,
        edge_ptr,
        torch.randn(len(nodes), generator=generator),
        {"train": torch.arange(len(nodes))},
    )
    proteins = replace(
        made,
        node=types(models.NODE_TYPES, sum(nodes)),
        edge=None,
        y=types(2, len(nodes)),
        splits={"train": torch.arange(10)},
    )
    monkeypatch.setattr(models, "zinc12k", lambda: made)
    monkeypatch.setattr(models, "dd", lambda: proteins)
    tiny = Problem("tiny", lambda: random_graph(0, 40, 200, isolated=3))
    monkeypatch.setitem(models.PROBLEMS, "tiny", tiny)
    # one test below compiles; the others would take minutes
    monkeypatch.setattr(models, "_compiled", lambda module: module)


pytestmark = pytest.mark.usefixtures("one_thread")
real_compiled = models._compiled


def sizes(model):
    if model == "gps":
        pytest.importorskip("torch_geometric")  # its layers are those of fastgt.pyg
    if model in ("gps", "graph_gps"):
        return SMALL | {"batch": 4, "dim": 16}  # of a narrower readout, all ReLUs may be 0
    return SMALL | ({} if model == "graph_transformer" else {"batch": 4})


@pytest.mark.parametrize("model", TINY)
def test_every_provider_computes_the_model(model):
    pytest.importorskip("torch_geometric")
    case = models.case(model, TINY[model], **sizes(model))
    assert not any(x.is_floating_point() for x in case.inputs.values())
    expected = dict.fromkeys(("pyg", "pyg, compiled"), model != "gps")
    expected |= {"fastgt": True, "fastgt, compiled": True}
    if model == "gps":
        expected[REPAIRED] = True  # torch-geometric's own counts padded keys
    rows = harness.compare(case, repeats=1)
    assert {row["provider"]: row["match"] for row in rows} == expected, rows
    for row in rows:
        assert "backward_error" not in row
        assert row["problem"] == TINY[model]
    assert next(iter(case.providers)) == "fastgt"
    for prepare in case.providers.values():
        provider = prepare()
        out = provider.call(*case.inputs.values())
        gradients = torch.autograd.grad(out, provider.parameters, case.upstream)  # all are used
        if model != "graph_gps":  # projections are in one matrix there
            assert len(gradients) == len(case.parameters)
        assert all(g.abs().sum() > 0 for g in gradients if len(g) > 1)


@pytest.mark.parametrize("model", [m for m in TINY if m not in ("gps", "graph_gps")])
def test_clamped_logits_are_the_same_too(model, monkeypatch):
    pytest.importorskip("torch_geometric")
    real = models._model

    def sharp(name, sizes):
        ours = real(name, sizes)
        for layer in ours.layers:
            layer.attention.q.weight.data *= 100
        return ours

    monkeypatch.setattr(models, "_model", sharp)
    shape, ours, (batch,) = models._prepare(
        model, TINY[model], 1, torch.device("cpu"), torch.float32, sizes(model)
    )
    case = models._case(shape, ours, batch)
    rows = harness.compare(case, repeats=1)
    assert [row["match"] for row in rows] == [True] * 4, rows
    before = ours(*case.inputs.values(), batch.graph)
    for layer in ours.layers:
        layer.attention.logit_clamp = None
    assert (ours(*case.inputs.values(), batch.graph) - before).abs().max() > 1e-4


@pytest.mark.parametrize("where", ["inference", "output", "readout.2.weight"])
@pytest.mark.parametrize("model", TINY)
def test_a_wrong_provider_is_a_mismatch_and_not_timed(model, where, monkeypatch):
    """A tenth of a percent shows, in evaluation, in training and in one parameter's gradient."""
    if model == "graph_gps":
        where = where.replace("readout", "readout.layers")
    scale = {"inference": (1, 1.001), "output": (1.001, 1)}.get(where, (1, 1))

    def wrong(ours):
        module = copy.deepcopy(ours)
        if where not in ("inference", "output"):
            module.get_parameter(where).register_hook(lambda g: g * 1.001)
        module.readout.register_forward_hook(lambda m, x, out: out * scale[not m.training])
        return module

    real = models._modules
    monkeypatch.setattr(models, "_modules", lambda x: {**real(x), "wrong": lambda: wrong(x)})
    rows = models.epochs(model, TINY[model], batches=2, repeats=1, **sizes(model))
    *others, row = rows
    assert others[0]["match"]
    assert row["provider"] == "wrong"
    assert row["match"] is False
    assert row["error"].startswith(where)
    assert not {"epoch_s", "epoch_x", "inference_s", "epoch_peak_bytes"} & row.keys()
    said = table.table(rows).partition("\nwrong ")[2]
    assert said.lstrip().startswith("MISMATCH: ")


@pytest.mark.parametrize("model", TINY)
def test_rows_of_epochs_are_complete(model):
    pytest.importorskip("torch_geometric")
    rows = models.epochs(model, TINY[model], batches=3, repeats=2, **sizes(model))
    names = ["fastgt", "fastgt, compiled", "pyg", "pyg, compiled"]
    names += [REPAIRED] if model == "gps" else []
    assert [row["provider"] for row in rows] == names
    size = {"graph_transformer": (1, 40, 200), "graph_classifier": (3, 51, 84)}
    for row in rows:
        found = row["batches"], row["rows"], row["edges"]
        assert found == size.get(model, (3, 59, 98))
        assert row["graphs_s"] > 0
        assert {"device", "commit", "torch_geometric", "heads", "width", "dtype"} <= row.keys()
        if row["provider"] in ("pyg", "pyg, compiled") and model == "gps":
            assert row["match"] is False
            continue
        assert row["match"], row
        assert row["epoch_s"] > 0
        assert row["inference_s"] > 0
        assert row["epoch_peak_bytes"] > 2 * row["parameters"]  # gradients are there, of most
        assert row["epoch_spread"] >= 0
        assert row["inference_spread"] >= 0
        assert row["epoch_x"] > 0
        assert row["inference_x"] > 0
    assert rows[0]["epoch_x"] == rows[0]["inference_x"] == 1
    assert all(name in table.table(rows) for name in names)


def test_without_torch_geometric_ours_is_measured_alone(monkeypatch):
    for name in [x for x in sys.modules if x.split(".")[0] == "torch_geometric"]:
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setitem(sys.modules, "fastgt.pyg", None)
    on_pyg._attention_layers.cache_clear()
    ours, compiled, *others = models.epochs(
        "graph_classifier", batches=1, repeats=1, **SMALL, batch=4
    )
    for row in (ours, compiled):
        assert row["match"]
        assert row["epoch_s"] > 0
    for other in others:
        assert other["match"] is None
        assert "not installed" in other["error"]
        assert "not installed" in table.table([ours, other])
    with pytest.raises(ImportError, match=r"fastgt\.pyg"):  # whose layers GPS is made of
        models.case("gps", "zinc", **SMALL, batch=4)


def test_a_provider_that_fails_has_its_reason(monkeypatch):
    def fails(ours):
        raise MemoryError("no room")

    monkeypatch.setattr(models, "on_pyg", fails)
    ours, compiled, *others = models.epochs("graph_transformer", "tiny", repeats=1, **SMALL)
    assert ours["epoch_s"] > 0
    assert compiled["epoch_s"] > 0
    assert [(row["match"], row["error"]) for row in others] == [(None, "MemoryError: no room")] * 2


@pytest.mark.parametrize("model", TINY)
def test_twenty_steps_lose_the_same(model):
    """Ours and torch-geometric's layers, from the same weights: the same curve, and it falls.

    Torch-geometric's Performer attends to padding: its curve is that of the repaired layer.
    """
    pytest.importorskip("torch_geometric")
    options = sizes(model) | {"dim": 32, "heads": 4}
    _, ours, batches = models._prepare(
        model, TINY[model], 2, torch.device("cpu"), torch.float32, options
    )
    curves = []
    for module in (copy.deepcopy(ours), on_pyg.on_pyg(ours, repaired=True)):
        epoch = models._epoch(module, batches)
        losses = [loss for _ in range(20 // len(batches)) for loss in epoch()]
        curves.append(torch.stack(losses))
        assert len(losses) == 20
    torch.testing.assert_close(*curves, rtol=0, atol=1e-4)
    assert curves[0][-1] < curves[0][0] - 1e-2


def test_a_compiled_provider_is_measured(monkeypatch):
    pytest.importorskip("torch_geometric")
    real, backends = nn.Module.compile, []

    def compile(module, **options):
        backends.append(options)
        real(module, backend="eager", **options)

    monkeypatch.setattr(nn.Module, "compile", compile)
    monkeypatch.setattr(models, "_compiled", real_compiled)
    options = sizes("graph_gps") | {"layers": 1}
    rows = models.epochs("graph_gps", batches=1, repeats=1, only=["pyg, compiled"], **options)
    assert [row["provider"] for row in rows] == ["fastgt", "pyg, compiled"]
    assert rows[1]["match"], rows[1]
    assert rows[1]["epoch_s"] > 0
    assert backends == [{"dynamic": True}]


@pytest.mark.parametrize("model", TINY)
def test_torch_geometric_runs_nothing_of_ours(model, compiled_kernels):
    pytest.importorskip("torch_geometric")

    class Seen(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            namespaces.add(func.namespace)
            return func(*args, **(kwargs or {}))

    found = {}
    case = models.case(model, TINY[model], **sizes(model))
    for name, prepare in case.providers.items():
        provider, namespaces = prepare(), set()
        with Seen():
            provider.call(*case.inputs.values()).sum().backward()
        found[name] = "fastgt" in namespaces
    assert found == {name: name.startswith("fastgt") for name in case.providers}


def test_an_epoch_trains_and_inference_does_not():
    _, ours, batches = models._prepare(
        "graph_classifier", "dd", 3, torch.device("cpu"), torch.float32, sizes("graph_classifier")
    )
    assert [batch.graph.num_graphs for batch in batches] == [4, 4, 2]
    before = copy.deepcopy(ours.state_dict())
    models._inference(ours, batches)()
    assert all(torch.equal(x, before[name]) for name, x in ours.state_dict().items())
    models._epoch(ours, batches)()
    moved = ours.state_dict()
    for name, _ in ours.named_parameters():
        assert not torch.equal(moved[name], before[name]), name
    assert moved["layers.0.norm1.num_batches_tracked"] == 3


def test_relus_are_moved_off_their_kinks():
    torch.manual_seed(0)
    x = torch.randn(3000, 20, dtype=torch.float64)
    x[:, 0] += 9  # comes nowhere near
    shift = models._into_gap(x)
    assert shift[0] == 0
    assert shift.abs().max() < 0.1
    moved, before = ((x + y).abs().amin(0)[1:] for y in (shift, 0))
    assert moved.min() > 2e-4 > 2 * before.min()
    assert models._into_gap(x[:1]).tolist() == [0] * 20

    _, ours, (batch,) = models._prepare(
        "gps", "zinc", 1, torch.device("cpu"), torch.float32, sizes("gps")
    )
    least = []
    for module in ours.modules():
        if isinstance(module, nn.ReLU):
            module.register_forward_pre_hook(lambda m, x: least.append(x[0].abs().min().item()))
    ours(*batch.inputs.values(), batch.graph)
    assert len(least) == 6
    assert min(least) > 1e-4
    assert ours.layers[0].norm1.num_batches_tracked == 1  # of the call above
