"""What is made under torch.inference_mode() or no_grad() and kept is trained with afterwards."""

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from graph_cases import SIX, assert_same
from module_cases import MODULES, Given
from torch import Tensor, nn

import fastgt
from fastgt import Graph, plans, tiles
from fastgt.nn import (
    HeadGate,
    NeighborhoodAttention,
)
from fastgt.pruning import (
    GradualPruning,
    HeadSparsity,
    SkipLayer,
    prune_heads,
    prune_layers,
)
from fastgt.testing import with_index_dtype

PTR = torch.tensor([0, 4, 6])
ORDER = torch.tensor([1, 0, 3, 2, 5, 4])
MODES = pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad])


def batch(edge_index: Tensor = SIX, ptr: Tensor = PTR) -> Graph:
    return Graph.from_edge_index(edge_index, graph_ptr=ptr)


def through_torch(graph: Graph) -> Graph:
    file = io.BytesIO()
    torch.save(graph, file)
    file.seek(0)
    return torch.load(file)


MASK = torch.zeros(6, 6, dtype=torch.bool).index_put((SIX[1], SIX[0]), torch.tensor(True))
BEFORE = batch()
MADE: dict[str, Callable[[], Graph]] = {
    "from_edge_index": lambda: Graph.from_edge_index(SIX, 6),
    "bipartite": lambda: Graph.from_edge_index(SIX, (6, 7)),
    "boundaries": batch,
    "inputs too": lambda: batch(SIX.clone(), PTR.clone()),
    "int32 inputs too": lambda: batch(SIX.int(), PTR.int()),
    "no edges": lambda: Graph.from_edge_index(SIX[:, :0], 6),
    "from_csr": lambda: Graph.from_csr(BEFORE.row_ptr.clone(), BEFORE.col.clone()),
    "from_dense": lambda: Graph.from_dense(MASK),
    "from_scipy": lambda: Graph.from_scipy(
        pytest.importorskip("scipy.sparse").coo_array(MASK.numpy())
    ),
    "from_hetero": lambda: Graph.from_hetero({("a", "to", "a"): SIX}, {"a": 6}, "types"),
    "complete": lambda: Graph.complete(PTR),
    "batch": lambda: Graph.batch([batch(), BEFORE]),
    "batch of none": lambda: Graph.batch([]),
    "transpose": BEFORE.transpose,
    "with_self_loops": BEFORE.with_self_loops,
    "reordered": lambda: BEFORE.reordered(ORDER),
    "degree": lambda: BEFORE.reordered("degree"),
    "plan": lambda: batch().plan("windows"),
    "plan of one made before": lambda: BEFORE.plan("windows", height=16),
    "plan of graphs": lambda: Graph.from_dense(MASK).plan("graphs"),
    "copied to a device": lambda: BEFORE.to("cpu", copy=True),
    "moved": lambda: BEFORE.to("meta"),
    "copy": lambda: copy.copy(batch()),
    "deepcopy": lambda: copy.deepcopy(BEFORE),
    "pickle": lambda: pickle.loads(pickle.dumps(BEFORE)),
    "torch.load": lambda: through_torch(BEFORE),
    "another index type": lambda: with_index_dtype(BEFORE, torch.int64),
}


@pytest.mark.parametrize("name", MADE)
def test_a_graph_holds_no_inference_tensor(name: str) -> None:
    _ = BEFORE.columns
    with torch.inference_mode():
        graph = MADE[name]()
        square = graph.graph_ptr is graph.col_graph_ptr
        _ = graph.columns  # sorted on first use
        graph.column_walk(plans.SMALL)
    held = graph._tensors()
    assert len(held) >= 9
    assert not any(x.is_inference() for x in held)
    assert square is (name != "bipartite")
    if graph.device.type == "cpu":
        assert_same(graph, MADE[name]())


def test_nothing_is_copied_without_inference_mode() -> None:
    twin = copy.copy(BEFORE)
    assert twin.prepared is BEFORE.prepared
    assert twin.col is BEFORE.col


def test_buckets_filled_in_a_validation_are_no_inference_tensors(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(tiles, "SMALL_EDGES", 0)
    hub = torch.cat([torch.zeros(600), torch.arange(1, 9).repeat_interleave(40)]).long()
    graph = Graph.from_edge_index(torch.stack([torch.arange(len(hub)) % 9, hub]), 9)
    with torch.inference_mode():
        graph.row_walk(plans.SMALL), graph.column_walk(plans.SMALL)
    assert graph.prepared.columns is not None
    assert graph.prepared.row_buckets
    assert not any(x.is_inference() for x in graph._tensors())


@MODES
def test_a_walk_sorted_in_a_compiled_validation_is_no_inference_tensor(mode: Any) -> None:
    graph = batch()

    def gathered(x: Tensor) -> Tensor:
        return x.index_select(0, graph.columns.row)

    x = torch.randn(6, 3)
    torch.compiler.reset()
    with mode():
        actual = torch.compile(gathered, fullgraph=True, backend="aot_eager")(x)
    assert torch.equal(actual, gathered(x))
    assert not any(y.is_inference() for y in graph._tensors())


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize(
    "make",
    [lambda g: Graph.batch([g, g]), lambda g: g.to("cpu", copy=True)],
    ids=["batch", "copied to a device"],
)
def test_a_copy_of_a_graph_made_in_a_compiled_validation_trains(
    make: Callable[[Graph], Graph], backend: str
) -> None:
    torch.compiler.reset()
    with torch.inference_mode():
        compiled = torch.compile(make, backend=backend)(batch())
    graph = copy.copy(compiled)
    assert not any(x.is_inference() for x in graph._tensors())
    assert_same(graph, make(batch()))
    x = torch.randn(graph.num_nodes, 2, 4, requires_grad=True)
    fastgt.linear_attention(x, x, x, graph.graph_ptr).sum().backward()
    assert x.grad is not None


def qkv() -> list[Tensor]:
    return list(torch.randn(3, 6, 2, 4, generator=torch.Generator().manual_seed(1)).unbind())


def on_edges(*shape: int) -> Tensor:
    return torch.randn(5, *shape, generator=torch.Generator().manual_seed(2))


OPERATORS: dict[str, Callable[[Graph, Tensor, Tensor, Tensor], Any]] = {
    "neighborhood_attention": lambda g, q, k, v: fastgt.neighborhood_attention(q, k, v, g),
    "edge bias": lambda g, q, k, v: fastgt.neighborhood_attention(
        q, k, v, g, edge_bias=on_edges(2), edge_gate=on_edges(2)
    ),
    "gate of graphs": lambda g, q, k, v: fastgt.neighborhood_attention(
        q, k, v, g, head_gate=torch.tensor([[1.0, 0.0], [0.5, 1.0]])
    ),
    "additive": lambda g, q, k, v: fastgt.additive_attention(q, k, v, g, q[0]),
    "channelwise": lambda g, q, k, v: fastgt.channelwise_attention(on_edges(2, 4), v, g),
    "sum": lambda g, q, k, v: fastgt.aggregate(v, g),
    "mean": lambda g, q, k, v: fastgt.aggregate(v, g, reduce="mean"),
    "max": lambda g, q, k, v: fastgt.aggregate(v, g, reduce="max", edge_value=on_edges(2, 4)),
    "gated": lambda g, q, k, v: fastgt.gated_aggregate(v, g, on_edges(2, 4)),
    "softmax": lambda g, q, k, v: fastgt.segment_softmax(v[:5], g),
    "linear": lambda g, q, k, v: fastgt.linear_attention(q, k, v, g.graph_ptr),
    "sgformer": lambda g, q, k, v: fastgt.sgformer_attention(q, k, v, g.graph_ptr),
    "segment_sum": lambda g, q, k, v: fastgt.segment_sum(v, g.graph_ptr),
    "segment_mean": lambda g, q, k, v: fastgt.segment_mean(v, g.graph_ptr),
    "segment_max": lambda g, q, k, v: fastgt.segment_max(v, g.graph_ptr),
    "virtual_node": lambda g, q, k, v: fastgt.virtual_node(v, v[:2] + 1, g.graph_ptr)[0],
    "apply_order": lambda g, q, k, v: g.apply_order(v),
    "undo_order": lambda g, q, k, v: g.undo_order(v),
    "transpose": lambda g, q, k, v: fastgt.neighborhood_attention(q, k, v, g.transpose()),
}


@pytest.mark.parametrize("impl", ["cpp", "reference"])
@pytest.mark.parametrize("name", OPERATORS)
def test_operators_train_on_a_graph_of_a_validation(name: str, impl: str) -> None:
    """Made and first used in inference mode, as by a sanity check before the first epoch."""
    operator = OPERATORS[name]
    # loss and gradients, as of a graph that was never in inference mode
    with fastgt.implementation(impl):
        expected = gradients(operator, batch().reordered(ORDER))
        with torch.inference_mode():
            graph = batch().reordered(ORDER)
            operator(graph, *qkv())
        actual = gradients(operator, graph)
    assert all(torch.equal(x, y) for x, y in zip(actual, expected, strict=True))
    assert any(x.any() for x in actual[1:])


def gradients(operator: Callable[..., Tensor], graph: Graph) -> list[Tensor]:
    inputs = [x.requires_grad_() for x in qkv()]
    loss = operator(graph, *inputs).square().sum()
    grads = torch.autograd.grad(loss, inputs, allow_unused=True, materialize_grads=True)
    return [loss.detach(), *grads]


TYPES = torch.tensor([0, 1, 2, 0, 1, 2])
SMALL = {"layers": 1}
# the options of modules that are called with a graph of a validation
VALIDATED: dict[str, dict[str, Any]] = {
    "NeighborhoodAttention": {},
    "EdgeGatedAttention": {},
    "LinearAttention": {},
    "PerformerAttention": {},
    "TransformerConv with edges": {"edge_dim": 8},
    "VirtualNode": {},
    "TokenPruning": {},
    "GraphTransformer": SMALL,
    "EdgeGraphTransformer": SMALL | {"pe_dim": 0},
    "GraphClassifier": SMALL,
    "GraphGPS": SMALL,
    "Polynormer": SMALL,
    "SGFormer": SMALL,
    "Exphormer": SMALL,
    "MPNNVirtualNode": {"layers": 2},
}


def first_output(name: str, module: nn.Module, graph: Graph) -> Tensor:
    """Of a virtual node the second one, which its parameters make."""
    x = torch.arange(48.0).view(6, 8).sin()
    kinds = torch.zeros(5, dtype=torch.long)
    given = Given(graph, graph.graph_ptr, x, torch.ones(5, 8), torch.ones(2, 8), TYPES, kinds)
    out = MODULES[name].call(module, given)
    if isinstance(out, Tensor):
        return out
    return out.x if name == "TokenPruning" else out[name == "VirtualNode"]


@pytest.mark.parametrize("name", VALIDATED)
def test_modules_train_after_a_validation(name: str) -> None:
    module = MODULES[name].make(8, 2, **VALIDATED[name])
    with torch.inference_mode():
        graph = batch()
        first_output(name, module.eval(), graph)
    first_output(name, module.train(), graph).square().sum().backward()
    assert any(p.grad is not None and p.grad.any() for p in module.parameters())


def gated(dense: bool = False) -> NeighborhoodAttention:
    gate = HeadGate(torch.tensor([1.0, 0.0, 0.5, 0.0]))
    return NeighborhoodAttention(8, 4, head_gate=gate, dense_gate_grad=dense)


@MODES
def test_a_model_with_fewer_heads_trains(mode: Any) -> None:
    model, graph = gated(), batch()
    with mode():
        smaller = prune_heads(model)
    smaller(torch.ones(6, 8), graph).sum().backward()
    assert all(p.grad is not None for p in smaller.parameters())


@MODES
@pytest.mark.parametrize("made_there", [False, True])
def test_a_model_with_fewer_layers_trains(mode: Any, made_there: bool) -> None:
    layers = nn.Sequential(SkipLayer(nn.Linear(8, 8)), SkipLayer(nn.Linear(8, 8)))
    with mode():
        if made_there:  # the model's own parameters are inference tensors
            layers = nn.Sequential(SkipLayer(nn.Linear(8, 8)), SkipLayer(nn.Linear(8, 8)))
        layers[0].skipped = True  # type: ignore[assignment]
        smaller = prune_layers(layers)
    smaller(torch.ones(6, 8)).sum().backward()
    assert len(smaller) == 1  # type: ignore[arg-type]
    assert all(p.grad is not None for p in smaller.parameters())


@MODES
def test_a_model_shrunk_to_a_state_trains(mode: Any) -> None:
    model = gated()
    state = prune_heads(model).state_dict()
    with mode():
        smaller = prune_heads(model, state_dict=state)
    smaller(torch.ones(6, 8), batch()).sum().backward()
    assert all(p.grad is not None for p in smaller.parameters())


@MODES
def test_weights_that_are_pruned_there_train(mode: Any) -> None:
    models = [nn.Linear(8, 8), nn.Linear(8, 8)]
    models[1].load_state_dict(models[0].state_dict())
    for model, where in zip(models, (mode, torch.enable_grad), strict=True):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        with where():
            pruning = GradualPruning(model, 0.5, end=3, every=1, initial=0.25)
        for _ in range(3):
            optimizer.zero_grad()
            model(torch.ones(2, 8)).square().sum().backward()
            optimizer.step()
            with where():
                pruning.step()
        with where():
            pruning.finish()
        model(torch.ones(2, 8)).sum().backward()
    assert int((models[0].weight == 0).sum()) == 32
    assert torch.equal(models[0].weight, models[1].weight)


@MODES
def test_heads_that_are_exchanged_may_be_set_up_there(mode: Any) -> None:
    model, graph = gated(dense=True), batch()
    with mode():
        sparsity = HeadSparsity(model, 0.5, steps=8, every=2, scored=2)
        sparsity.load_state_dict(sparsity.state_dict())
    for _ in range(4):
        model(torch.ones(6, 8), graph).square().sum().backward()
        sparsity.step()
    assert int(model.head_gate.mask.sum()) == 2  # type: ignore[union-attr, operator]
