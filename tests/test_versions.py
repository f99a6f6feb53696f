"""Every operator on the installed torch, triton and NumPy: what can change between their versions.

``make matrix`` runs this file with the lowest and the highest versions that fastgt declares. A
problem is small and fixed; that operators are right on all problems is the other files' business.
"""

import copy
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from itertools import product

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

import fastgt
from fastgt import AuxRequest, Graph
from fastgt.testing import assert_as_accurate, random_edge_index

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
IMPLS = ["cpp", "triton"] if DEVICE == "cpu" else ["triton"]
H, D = 2, 8


@dataclass(frozen=True)
class Problem:
    """A batch of three graphs, one of them empty, and numbers for it by name."""

    graph: Graph
    generator: torch.Generator
    dtype: torch.dtype

    def draw(self, *shape: int) -> Tensor:
        x = torch.randn(shape, generator=self.generator, dtype=torch.float64)
        return x.to(DEVICE, self.dtype)


def problem(nodes: int = 11, edges: int = 29, dtype: torch.dtype = torch.float32) -> Problem:
    first = nodes // 2
    halves = [
        random_edge_index(seed, n, e) + start
        for seed, n, e, start in (
            (0, first, edges // 2, 0),
            (1, nodes - first, edges - edges // 2, first),
        )
    ]
    ptr = torch.tensor([0, first, first, nodes])
    graph = Graph.from_edge_index(torch.cat(halves, 1), nodes, graph_ptr=ptr).to(DEVICE)
    return Problem(graph, torch.Generator().manual_seed(0), dtype)


@dataclass(frozen=True)
class Operator:
    """``tensors`` get gradients; ``call`` is the operator, of the graph and of these."""

    tensors: Callable[[Problem], dict[str, Tensor]]
    call: Callable[..., Tensor | tuple]


def _qkv(p: Problem) -> dict[str, Tensor]:
    n = p.graph.num_rows
    return {name: p.draw(n, H, D) for name in "qkv"}


def _attention(p: Problem) -> dict[str, Tensor]:
    return _qkv(p) | {"edge_bias": p.draw(p.graph.num_edges, H)}


def _edges(p: Problem) -> dict[str, Tensor]:
    e = p.graph.num_edges
    return _attention(p) | {
        "edge_gate": p.draw(e, H, D),
        "edge_key": p.draw(e, H, D),
        "edge_value": p.draw(e, H, D),
        "edge_attr": p.draw(e, 3),
        "edge_key_weight": p.draw(3, H, D),
        "edge_value_weight": p.draw(3, H, D),
    }


def _nodes_and_edges(p: Problem) -> dict[str, Tensor]:
    return {"x": p.draw(p.graph.num_rows, D), "edge_value": p.draw(p.graph.num_edges, D)}


def _pool(name: str) -> Operator:
    return Operator(
        lambda p: {"x": p.draw(p.graph.num_rows, D)},
        lambda g, x, **how: getattr(fastgt, name)(x, g.graph_ptr, **how),
    )


def _aggregate(reduce: str) -> Operator:
    return Operator(
        _nodes_and_edges,
        lambda g, x, edge_value, **how: fastgt.aggregate(
            x, g, edge_value=edge_value, reduce=reduce, activation="relu", **how
        ),
    )


def _channelwise(graph, x, logits, edge_value, **how):  # type: ignore[no-untyped-def]
    how |= {"edge_value": edge_value, "return_aux": fastgt.AuxRequest(lse=True)}
    o, aux = fastgt.channelwise_attention(logits, x, graph, logit_clamp=5.0, **how)
    return o, aux.lse


def _linear(feature_map: str, features: int = 0) -> Operator:
    projection = None
    if features:
        generator = torch.Generator().manual_seed(1)
        projection = torch.randn(features, D, generator=generator, dtype=torch.float64).to(DEVICE)

    def call(graph, q, k, v, **how):  # type: ignore[no-untyped-def]
        return fastgt.linear_attention(
            q, k, v, graph.graph_ptr, feature_map=feature_map, projection=projection, **how
        )

    return Operator(_qkv, call)


def _additive(p: Problem) -> dict[str, Tensor]:
    e = p.graph.num_edges
    terms = {"edge_key": p.draw(e, H, D), "edge_attr": p.draw(e, 3), "edge_bias": p.draw(e, H)}
    return _qkv(p) | {"weight": p.draw(H, D), "edge_key_weight": p.draw(3, H, D)} | terms


OPERATORS = {
    "neighborhood_attention": Operator(
        _attention,
        lambda g, q, k, v, edge_bias, **how: fastgt.neighborhood_attention(
            q, k, v, g, edge_bias=edge_bias, return_aux=AuxRequest(lse=True), **how
        ),
    ),
    "neighborhood_attention, edges": Operator(
        _edges,
        lambda g, q, k, v, **terms: fastgt.neighborhood_attention(
            q, k, v, g, logit_clamp=5.0, denominator_eps=1e-6, dropout_p=0.3, dropout_seed=3,
            return_aux=AuxRequest(edge_scores=True), **terms,
        ),
    ),
    "neighborhood_attention, gate": Operator(
        lambda p: _qkv(p) | {"head_gate": p.draw(H)},
        lambda g, q, k, v, head_gate, **how: fastgt.neighborhood_attention(
            q, k, v, g, head_gate=head_gate, **how
        ),
    ),
    "additive_attention": Operator(
        _additive,
        lambda g, q, k, v, weight, **terms: fastgt.additive_attention(
            q, k, v, g, weight, dropout_p=0.3, dropout_seed=3,
            return_aux=AuxRequest(lse=True), **terms,
        ),
    ),
    "channelwise_attention": Operator(
        lambda p: _nodes_and_edges(p) | {"logits": p.draw(p.graph.num_edges, D)},
        _channelwise,
    ),
    "aggregate, sum": _aggregate("sum"),
    "aggregate, mean": _aggregate("mean"),
    "aggregate, max": _aggregate("max"),
    "gated_aggregate": Operator(
        _nodes_and_edges,
        lambda g, x, edge_value, **how: fastgt.gated_aggregate(
            x, g, edge_value, gate_row=x, gate_col=x,
            return_aux=AuxRequest(edge_scores=True), **how,
        ),
    ),
    "aggregate, weights": Operator(
        lambda p: {"x": p.draw(p.graph.num_cols, D), "edge_weight": p.draw(p.graph.num_edges)},
        lambda g, x, edge_weight, **how: fastgt.aggregate(x, g, edge_weight=edge_weight, **how),
    ),
    "gated_aggregate, weights": Operator(
        _nodes_and_edges,
        lambda g, x, edge_value, **how: fastgt.gated_aggregate(
            x, g, gate_row=x, edge_weight=edge_value.tanh(), edge_value=edge_value, **how
        ),
    ),
    "segment_softmax": Operator(
        lambda p: {"x": p.draw(p.graph.num_edges, H)},
        lambda g, x, **how: fastgt.segment_softmax(x, g, **how),
    ),
    "global_attention": Operator(
        lambda p: _qkv(p) | {"bias": p.draw(p.graph.num_rows, H)},
        lambda g, q, k, v, bias, **how: fastgt.global_attention(
            q, k, v, g.graph_ptr, bias=bias, return_aux=AuxRequest(lse=True), **how
        ),
    ),
    "linear_attention, elu": _linear("elu"),
    "linear_attention, softmax": _linear("softmax", 7),
    "sgformer_attention": Operator(
        _qkv,
        lambda g, q, k, v, **how: fastgt.sgformer_attention(q, k, v, g.graph_ptr, **how),
    ),
    "head_projection, into": Operator(
        lambda p: {"x": p.draw(p.graph.num_rows, 5), "w": p.draw(H, D, 5), "b": p.draw(H, D)},
        lambda g, x, w, b, **how: fastgt.head_projection(
            x, w, b, torch.ones(H, device=x.device), **how
        ),
    ),
    "head_projection, out of": Operator(
        lambda p: {"x": p.draw(p.graph.num_rows, H, D), "w": p.draw(5, H, D), "b": p.draw(5)},
        lambda g, x, w, b, **how: fastgt.head_projection(
            x, w, b, torch.ones(H, device=x.device), **how
        ),
    ),
    "segment_sum": _pool("segment_sum"),
    "segment_mean": _pool("segment_mean"),
    "segment_max": _pool("segment_max"),
    "virtual_node": Operator(
        lambda p: {"x": p.draw(p.graph.num_rows, D), "state": p.draw(p.graph.num_graphs, D)},
        lambda g, x, state, **how: fastgt.virtual_node(x, state, g.graph_ptr, **how),
    ),
}  # fmt: skip
EVERY = pytest.mark.parametrize(
    ("name", "impl"), list(product(OPERATORS, IMPLS)), ids=lambda x: x.replace(", ", "-")
)


def test_every_public_operator_is_here():
    """What ``make check`` says of this file."""
    others = {"Aux", "AuxRequest", "DropoutSeed", "Graph", "PairDropoutSeed", "implementation"}
    others |= {"accelerate", "prune_heads", "restore"}
    assert {name.partition(",")[0] for name in OPERATORS} == set(fastgt.__all__) - others


def evaluate(name: str, p: Problem, impl: str, dtype: torch.dtype | None = None) -> dict:
    """-> outputs and gradients by name, of numbers that are the same in every dtype."""
    operator = OPERATORS[name]
    leaves = {
        key: x.to(dtype or p.dtype).requires_grad_() for key, x in operator.tensors(p).items()
    }
    outs = _tuple(operator.call(p.graph, **leaves, impl=impl))
    upstream = [_like(y) for y in outs]
    grads = torch.autograd.grad(outs, list(leaves.values()), upstream, materialize_grads=True)
    found = {f"output {i}": y.detach() for i, y in enumerate(outs)}
    return found | {f"d{key}": g for key, g in zip(leaves, grads, strict=True)}


def _tuple(found: Tensor | tuple) -> tuple[Tensor, ...]:
    """The output and what was asked for beside it."""
    return tuple(x for x in tree_leaves(found) if x is not None)


def _like(y: Tensor) -> Tensor:
    """An upstream gradient: no constant, and the same for every implementation."""
    return torch.linspace(-1, 1, y.numel(), dtype=torch.float64).reshape(y.shape).to(y)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@EVERY
def test_values_and_gradients(name, impl, dtype):
    found = evaluate(name, problem(dtype=dtype), impl)
    eager = evaluate(name, problem(dtype=dtype), "reference")
    truth = evaluate(name, problem(dtype=dtype), "reference", torch.float64)
    for key, x in found.items():
        assert_as_accurate(x, eager[key], truth[key], key, 3.0 if key.startswith("d") else 2.0)


@EVERY
def test_second_gradients(name, impl):
    def second(impl: str) -> list[Tensor]:
        p = problem(dtype=torch.float64)
        leaves = [x.requires_grad_() for x in OPERATORS[name].tensors(p).values()]
        tensors = dict(zip(OPERATORS[name].tensors(problem()), leaves, strict=True))
        outs = _tuple(OPERATORS[name].call(p.graph, **tensors, impl=impl))
        options = {"create_graph": True, "materialize_grads": True}
        grads = torch.autograd.grad([y.square().sum() for y in outs], leaves, **options)
        total = sum((g * _like(g)).sum() for g in grads)
        return list(torch.autograd.grad(total, leaves, materialize_grads=True))

    for a, b in zip(second(impl), second("reference"), strict=True):
        torch.testing.assert_close(a, b)


@EVERY
def test_compiles_whole_and_once(name, impl):
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    call = OPERATORS[name].call
    compiled = torch.compile(call, fullgraph=True, dynamic=True, backend=counter)
    counts = []
    # no two sizes are equal: the compiler would take them for one number
    for nodes, edges in ((13, 31), (17, 41), (19, 37)):
        p = problem(nodes, edges)
        leaves = {key: x.requires_grad_() for key, x in OPERATORS[name].tensors(p).items()}
        found = []
        for f in (compiled, call):
            outs = _tuple(f(p.graph, **leaves, impl=impl))
            upstream = [_like(y) for y in outs]
            grads = torch.autograd.grad(
                outs, list(leaves.values()), upstream, materialize_grads=True
            )
            found.append([*outs, *grads])
        for a, b in zip(*found, strict=True):
            torch.testing.assert_close(a, b)
        counts.append(counter.frame_count)
    assert counts == [counts[0]] * 3
    assert counts[0] > 0


@pytest.mark.parametrize("name", ["neighborhood_attention, edges", "linear_attention, elu"])
def test_inductor(name):
    torch._dynamo.reset()
    p = problem()
    leaves = OPERATORS[name].tensors(p)
    compiled = torch.compile(OPERATORS[name].call, fullgraph=True, dynamic=True)
    found, plain = (
        _tuple(f(p.graph, **leaves, impl=IMPLS[0])) for f in (compiled, OPERATORS[name].call)
    )
    for a, b in zip(found, plain, strict=True):
        torch.testing.assert_close(a, b)


class Exported(torch.nn.Module):
    def __init__(self, name: str, graph: Graph, impl: str):
        super().__init__()
        self.name, self.graph, self.impl = name, graph, impl

    def forward(self, **tensors: Tensor) -> tuple[Tensor, ...]:
        return _tuple(OPERATORS[self.name].call(self.graph, **tensors, impl=self.impl))


@EVERY
def test_exports(name, impl):
    p = problem()
    tensors = OPERATORS[name].tensors(p)
    module = Exported(name, p.graph, impl)
    exported = torch.export.export(module, (), tensors).module()
    for a, b in zip(exported(**tensors), module(**tensors), strict=True):
        torch.testing.assert_close(a, b)


@EVERY
def test_autocast(name, impl):
    """Each operator says what autocast casts. All implementations do the same."""
    found = []
    for which in (impl, "reference"):
        with torch.autocast(DEVICE, torch.bfloat16):
            found.append(evaluate(name, problem(), which))
    truth = evaluate(name, problem(), "reference", torch.float64)
    for key, x in found[0].items():
        assert_as_accurate(x, found[1][key], truth[key], key, 4.0)


class Recorder(TorchDispatchMode):
    """Keeps what fastgt's registered operators were called with."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        if func.namespace == "fastgt":
            detached = tree_map_only(Tensor, lambda x: x.detach().clone(), (args, kwargs or {}))
            self.calls.append((func, *detached))
        return func(*args, **(kwargs or {}))


@EVERY
def test_opcheck(name, impl):
    with Recorder() as recorder:
        evaluate(name, problem(7, 15), impl)
    assert recorder.calls
    for func, args, kwargs in recorder.calls:
        torch.library.opcheck(func, args, kwargs)


def test_graphs_travel():
    graph = problem().graph
    for other in (pickle.loads(pickle.dumps(graph)), copy.deepcopy(graph), graph.to(DEVICE)):
        assert torch.equal(other.edge_index, graph.edge_index)
        assert torch.equal(other.graph_ptr, graph.graph_ptr)


@pytest.mark.parametrize("impl", IMPLS)
def test_models_train(impl):
    from fastgt.models import (
        EdgeGraphTransformer,
        EdgeGraphTransformerConfig,
        GraphGPS,
        GraphGPSConfig,
        GraphTransformer,
        GraphTransformerConfig,
    )
    from fastgt.nn import LinearAttention

    graph = problem().graph
    n, e = graph.num_rows, graph.num_edges
    kinds = torch.arange(n, device=DEVICE) % 3
    bonds = torch.arange(e, device=DEVICE) % 2
    x = torch.randn(n, 8, device=DEVICE)
    torch.manual_seed(0)
    nodes = GraphTransformer(GraphTransformerConfig(3, 2, dim=8, heads=2, layers=1, pe_dim=0))
    edges = EdgeGraphTransformer(EdgeGraphTransformerConfig(dim=8, heads=2, layers=1, pe_dim=0))
    linear = LinearAttention(8, 2)
    small = {"dim": 8, "heads": 2, "layers": 1, "walk_steps": 0, "walk_dim": 0}
    beside = GraphGPS(GraphGPSConfig(local="gatedgcn", **small))
    calls = {
        beside: lambda: beside(kinds, bonds, graph),
        nodes: lambda: nodes(kinds, graph),
        edges: lambda: edges(kinds, bonds, graph),
        linear: lambda: linear(x, graph.graph_ptr),
    }
    assert_trains(calls, impl)


@pytest.mark.parametrize("impl", IMPLS)
def test_layers_of_torch_geometric_train(impl):
    pytest.importorskip("torch_geometric", reason="torch-geometric is not installed")
    from fastgt.pyg import TransformerConv

    graph = problem().graph
    x, attr = torch.randn(graph.num_rows, 8), torch.randn(graph.num_edges, 4)
    x, attr = x.to(DEVICE), attr.to(DEVICE)
    torch.manual_seed(0)
    conv = TransformerConv(8, 4, heads=2, edge_dim=4)
    assert_trains({conv: lambda: conv(x, graph, attr)}, impl)
    assert conv.ran() == "fused"


def assert_trains(calls, impl):
    """Modules, and calls of them."""
    with fastgt.implementation(impl):
        for module, call in calls.items():
            module.to(DEVICE)
            optimizer = torch.optim.Adam(module.parameters(), lr=1e-2)
            losses = []
            for _ in range(5):
                optimizer.zero_grad()
                losses.append(call().square().mean())
                losses[-1].backward()
                optimizer.step()
            assert losses[-1] < losses[0], type(module).__name__


def test_graphs_from_scipy_and_its_eigenvectors():
    sp = pytest.importorskip("scipy.sparse", reason="scipy is not installed")
    from fastgt.encodings import laplacian_pe

    ring = sp.coo_array(([1.0] * 12, (list(range(12)), [*range(1, 12), 0])), shape=(12, 12))
    graph = Graph.from_scipy(sp.csr_array(ring + ring.T))
    _, values = laplacian_pe(graph, 2, return_eigenvalues=True)
    turn = torch.tensor(2 * torch.pi / 12)
    torch.testing.assert_close(values[0].double().cpu(), (1 - turn.cos()).double().expand(2))


AHEAD = (
    "edges_gt_zinc_d8_fp32",
    "windows_d64_bf16",
    "graphs_d64_bf16",
    "additive_key_h8_d16_fp32",
    "channelwise_c64_bf16",
    "aggregate_gine_d64_bf16",
    "gated_d64_bf16",
    "softmax_d8_fp32",
    "linear_elu_d64_bf16",
    "head_h24_d64_c512_bf16",
)


@pytest.mark.parametrize("target", ["sm_90", "gfx942"])
def test_kernels_compile_ahead_of_time(target):
    pytest.importorskip("triton")
    code = (
        "import sys; from fastgt.kernels.ahead import compile_ahead; target, *cases = sys.argv[1:];"
        "found = [compile_ahead(target, case) for case in cases]; assert all(found)"
    )
    # a process of its own: here, Triton is set to interpret
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    run = subprocess.run(
        [sys.executable, "-c", code, target, *AHEAD],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr[-4000:]
