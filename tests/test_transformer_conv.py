"""fastgt.pyg.TransformerConv against torch-geometric's own code, from one state_dict."""

import copy
import math
import sys

import pytest
import torch
from attention_cases import BF16, DEVICE, FAST, FP32, FP64
from torch._dynamo.testing import CompileCounterWithBackend

from fastgt import Graph, implementation
from fastgt.bench import harness, memory, table
from fastgt.bench import transformer_conv as bench
from fastgt.real_graphs import open_data
from fastgt.testing import (
    PROBLEMS,
    Problem,
    assert_as_accurate,
    random_edge_index,
    random_graph,
)

pytest.importorskip("torch_geometric")

from torch_geometric import nn as pyg_nn

from fastgt.pyg import TransformerConv

IMPLS = pytest.mark.parametrize("impl", ["reference", FAST[0]], indirect=True)
WIDTHS = (7, 5)  # of sources and of targets


@pytest.fixture
def impl(request):
    """All of the test runs on it."""
    with implementation(request.param):
        yield request.param


def pair(*arguments, dtype=FP64, **options):
    """Theirs and ours from its state_dict, which must fit key by key."""
    torch.manual_seed(0)
    theirs = pyg_nn.TransformerConv(*arguments, **options)
    ours = TransformerConv(*arguments, **options)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    return theirs.to(DEVICE, dtype), ours.to(DEVICE, dtype)


def evaluate(conv, x, edges, edge_attr=None, dtype=FP64):
    """The output, and the gradients of it of every parameter and input, by name."""
    conv = copy.deepcopy(conv).to(dtype)
    inputs = {f"x{i}": t for i, t in enumerate(x if isinstance(x, tuple) else (x,))}
    inputs |= {} if edge_attr is None else {"edge_attr": edge_attr}
    inputs = {name: t.detach().to(dtype).requires_grad_() for name, t in inputs.items()}
    x = tuple(t for name, t in inputs.items() if name != "edge_attr")
    out = conv(x if len(x) == 2 else x[0], edges, inputs.get("edge_attr"))
    assert not isinstance(conv, TransformerConv) or conv.ran() == "fused"
    leaves = dict(conv.named_parameters()) | inputs
    upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=FP64)
    grads = torch.autograd.grad(out, leaves.values(), upstream.to(out), allow_unused=True)
    return {"out": out.detach()} | dict(zip(leaves, grads, strict=True))


def assert_same(theirs, ours, x, edge_index, graph, edge_attr=None):
    """To 1e-10 in float64, and in float32 no further from that than theirs."""
    oracle = evaluate(theirs, x, edge_index, edge_attr)
    exact = evaluate(ours, x, graph, edge_attr)
    eager = evaluate(theirs, x, edge_index, edge_attr, FP32)
    found = evaluate(ours, x, graph, edge_attr, FP32)
    assert oracle.keys() == exact.keys() == found.keys()
    for name, truth in oracle.items():
        if truth is None:  # lin_skip without root_weight: there, and unused
            assert exact[name] is found[name] is None, name
            continue
        torch.testing.assert_close(
            exact[name], truth, rtol=1e-10, atol=1e-10, msg=lambda m, name=name: f"{name}: {m}"
        )
        factor = 2.0 if name == "out" else 3.0
        assert_as_accurate(found[name], eager[name], truth, name, factor)


def random_inputs(seed, bipartite, edge_dim, kind="hub"):
    """x, edge_index, graph, edge_attr: with duplicates, self loops, a hub and isolated nodes."""
    rows, cols = 30, 20 if bipartite else 30
    edge_index = random_edge_index(seed, rows, 200, cols=cols, kind=kind, isolated=4)
    generator = torch.Generator().manual_seed(seed)
    x = tuple(
        torch.randn(n, width, generator=generator, dtype=FP64).to(DEVICE)
        for n, width in zip((cols, rows), WIDTHS, strict=True)
    )
    edge_attr = None
    if edge_dim is not None:
        edge_attr = torch.randn(200, edge_dim, generator=generator, dtype=FP64).to(DEVICE)
    edge_index = edge_index.to(DEVICE)
    graph = Graph.from_edge_index(edge_index, (rows, cols))
    return x if bipartite else x[0], edge_index, graph, edge_attr


@pytest.mark.parametrize("bipartite", [False, True], ids=["square", "bipartite"])
@pytest.mark.parametrize("root_weight", [True, False], ids=["root", "no root"])
@pytest.mark.parametrize("edge_dim", [None, 3])
@pytest.mark.parametrize("beta", [False, True], ids=["no beta", "beta"])
@pytest.mark.parametrize("concat", [True, False], ids=["concat", "mean"])
@IMPLS
def test_is_pygs_from_its_own_parameters(impl, concat, beta, edge_dim, root_weight, bipartite):
    theirs, ours = pair(
        WIDTHS if bipartite else WIDTHS[0],
        6,
        heads=3,
        concat=concat,
        beta=beta,
        edge_dim=edge_dim,
        root_weight=root_weight,
    )
    for seed, kind in enumerate(("hub", "power_law")):
        x, edge_index, graph, edge_attr = random_inputs(seed, bipartite, edge_dim, kind)
        assert (edge_index[0] == edge_index[1]).any()
        assert edge_index.unique(dim=1).shape[1] < 200
        assert (graph.row_degree == 0).sum() >= 4
        assert_same(theirs, ours, x, edge_index, graph, edge_attr)


@pytest.mark.parametrize("edge_dim", [None, 3])
@pytest.mark.parametrize("bias", [True, False])
def test_every_implementation(bias, edge_dim):
    """One head, a tuple of widths, and the whole module under ``implementation``."""
    theirs, ours = pair(WIDTHS, 4, edge_dim=edge_dim, bias=bias)
    x, _, _, _ = random_inputs(0, True, None)
    x = x[0][:6], x[1][:5]
    edge_index = random_edge_index(0, 5, 14, cols=6, isolated=1).to(DEVICE)
    graph = Graph.from_edge_index(edge_index, (5, 6))
    edge_attr = None if edge_dim is None else torch.randn(14, edge_dim, device=DEVICE)
    for impl in ("reference", *FAST):
        with implementation(impl):
            assert_same(theirs, ours, x, edge_index, graph, edge_attr)


def standardised(x):
    x = torch.from_numpy(x).double()
    return (x - x.mean(0)) / x.std(0).clamp(min=1e-6)


def power_grid():
    with open_data("power10k") as data:
        bus, branch = standardised(data["bus"]), standardised(data["branch"])
    return bus, torch.cat([branch, branch])  # each branch in both directions


def molecules():
    with open_data("zinc12k") as data:
        atoms, edges = data["train_node_ptr"][128], data["train_edge_ptr"][128]
        atom = torch.from_numpy(data["train_atom"][:atoms]).long()
        bond = torch.from_numpy(data["train_bond"][:edges]).long()
    one_hot = torch.nn.functional.one_hot
    return one_hot(atom, 21).double(), one_hot(bond - 1, 3).double()


@IMPLS
@pytest.mark.parametrize(
    ("problem", "features"),
    [("zinc", molecules), ("power10k", power_grid)],
    ids=["zinc", "power10k"],
)
def test_real_graphs_with_their_own_edge_features(problem, features, impl):
    try:
        graph = PROBLEMS[problem].load().to(DEVICE)
        x, edge_attr = (t.to(DEVICE) for t in features())
    except FileNotFoundError as error:
        pytest.skip(str(error))
    theirs, ours = pair(x.shape[1], 8, heads=4, beta=True, edge_dim=edge_attr.shape[1])
    assert_same(theirs, ours, x, graph.edge_index, graph, edge_attr)


@IMPLS
def test_training_goes_the_same_way(impl):
    """From the same seed: initial parameters bit for bit, then three steps of two layers."""
    x, edge_index, graph, edge_attr = random_inputs(0, False, 3)
    ends = []
    for cls, edges in ((pyg_nn.TransformerConv, edge_index), (TransformerConv, graph)):
        torch.manual_seed(5)
        layers = torch.nn.ModuleList(
            [cls(7, 4, heads=2, edge_dim=3), cls(8, 2, heads=3, concat=False, beta=True)]
        ).to(DEVICE)
        initial = {name: p.detach().clone() for name, p in layers.named_parameters()}
        layers.double()
        optimizer = torch.optim.SGD(layers.parameters(), lr=0.1)
        for _ in range(3):
            out = layers[1](layers[0](x, edges, edge_attr).relu(), edges)
            optimizer.zero_grad()
            out.square().mean().backward()
            optimizer.step()
        ends.append((initial, layers.state_dict()))
    (initial, end), (expected_initial, expected_end) = ends[1], ends[0]
    assert initial.keys() == expected_initial.keys()
    for name, p in initial.items():
        assert torch.equal(p, expected_initial[name]), name
        torch.testing.assert_close(end[name], expected_end[name], rtol=1e-10, atol=1e-10)


@IMPLS
def test_attention_weights_are_pygs(impl):
    theirs, ours = pair(WIDTHS, 4, heads=2, edge_dim=3, dropout=0.5)
    x, edge_index, graph, edge_attr = random_inputs(0, True, 3)
    theirs.eval()
    _, (_, expected) = theirs(x, edge_index, edge_attr, return_attention_weights=True)
    with torch.no_grad():
        for edges in (graph, edge_index):
            out, (index, weights) = ours(x, edges, edge_attr, return_attention_weights=True)
            assert ours.ran() == "fused"
            assert torch.equal(index, edge_index)
            # those of before dropout
            torch.testing.assert_close(weights, expected.detach(), rtol=1e-10, atol=1e-10)
            assert out.shape == (30, 8)
    assert ours(x, graph, edge_attr).shape == (30, 8)
    # with gradients, torch-geometric's code runs on the Graph's edges
    ours.eval()
    _, (index, weights) = ours(x, graph, edge_attr, return_attention_weights=True)
    assert "gradients are recorded" in ours.ran()
    assert torch.equal(index, edge_index)
    assert weights.requires_grad
    assert torch.equal(weights, expected)


@IMPLS
def test_without_edges_only_the_root_is_left(impl):
    for options in ({"edge_dim": 3}, {"concat": False, "beta": True}):
        theirs, ours = pair(7, 4, heads=2, **options)
        edge_attr = torch.zeros(0, 3, device=DEVICE) if "edge_dim" in options else None
        for nodes in (4, 0):
            none = torch.zeros(2, 0, dtype=torch.int64, device=DEVICE)
            x = torch.randn(nodes, 7, device=DEVICE)
            assert_same(theirs, ours, x, none, Graph.from_edge_index(none, nodes), edge_attr)


@IMPLS
def test_dropout_keeps_an_edge_whole_or_not_at_all(impl):
    """One edge a row: each head gives 0 or (v + e) / (1 - p), as often as p says."""
    nodes, p = 500, 0.3
    target = torch.arange(nodes, device=DEVICE)
    graph = Graph.from_edge_index(torch.stack([target.flip(0), target]), nodes)
    _, ours = pair(7, 4, heads=3, edge_dim=3, dropout=p, root_weight=False)
    x = torch.randn(nodes, 7, dtype=FP64, device=DEVICE)
    edge_attr = torch.randn(nodes, 3, dtype=FP64, device=DEVICE)
    whole = ours.eval()(x, graph, edge_attr).view(nodes, 3, 4)
    torch.manual_seed(0)
    out = ours.train()(x, graph, edge_attr).view(nodes, 3, 4)
    dropped = (out == 0).all(-1)
    kept = torch.where(dropped[..., None], 0.0, whole / (1 - p))
    torch.testing.assert_close(out, kept, rtol=1e-6, atol=1e-12)  # p is a multiple of 2^-24
    spread = math.sqrt(p * (1 - p) / dropped.numel())
    assert abs(dropped.double().mean().item() - p) < 5 * spread


@IMPLS
def test_dropout_is_for_training_and_repeats(impl):
    theirs, ours = pair(7, 4, heads=2, edge_dim=3, dropout=0.4)
    x, edge_index, graph, edge_attr = random_inputs(0, False, 3)
    plain = TransformerConv(7, 4, heads=2, edge_dim=3).to(DEVICE, FP64)
    plain.load_state_dict(ours.state_dict())
    calm = ours.eval()(x, graph, edge_attr)
    assert torch.equal(plain.train()(x, graph, edge_attr), calm)
    assert_same(theirs.eval(), ours, x, edge_index, graph, edge_attr)

    ours.train()
    found = []
    for seed in (3, 3, 4):
        torch.manual_seed(seed)
        found.append(evaluate(ours, x, graph, edge_attr))
    for name, value in found[0].items():
        assert torch.equal(value, found[1][name]), name
    assert not torch.equal(found[0]["out"], found[2]["out"])
    with torch.no_grad():
        samples = torch.stack([ours(x, graph, edge_attr) for _ in range(300)])
    error = (samples.mean(0) - calm).abs()
    assert (error <= 5 * samples.std(0) / math.sqrt(300) + 1e-6).all()


def test_autocast_is_as_accurate_as_pygs():
    theirs, ours = pair(7, 4, heads=2, edge_dim=3, beta=True, dtype=FP32)
    x, edge_index, graph, edge_attr = random_inputs(0, False, 3)
    oracle = evaluate(theirs, x, edge_index, edge_attr)
    with torch.autocast(DEVICE, BF16):
        out = ours(x.float(), graph, edge_attr.float())
        eager = theirs(x.float(), edge_index, edge_attr.float())
    assert out.dtype == BF16
    assert_as_accurate(out, eager.to(BF16), oracle["out"], "out")


@pytest.mark.parametrize("impl", FAST, indirect=True)
@pytest.mark.parametrize("edge_dim", [None, 3])
def test_compiles_whole_and_once(edge_dim, impl):
    """One compilation serves graphs of every size, forward and backward."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    conv = TransformerConv(7, 4, heads=2, beta=True, edge_dim=edge_dim).to(DEVICE)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(conv, fullgraph=True, dynamic=True, backend=counter)
    counts = []
    # no two sizes are equal, nor N + 1 and another: the compiler would take them for one number
    for seed, (n, e) in enumerate([(11, 20), (9, 31), (13, 15)]):
        graph = random_graph(seed, n, e, device=DEVICE)
        leaves = [torch.randn(n, 7, device=DEVICE, requires_grad=True)]
        if edge_dim is not None:
            leaves.append(torch.randn(e, edge_dim, device=DEVICE, requires_grad=True))
        upstream, found = torch.randn(n, 8, device=DEVICE), []
        for f in (compiled, conv):
            out = f(leaves[0], graph, *leaves[1:])
            found.append([out, *torch.autograd.grad(out, [*leaves, *conv.parameters()], upstream)])
        for a, b in zip(*found, strict=True):
            torch.testing.assert_close(a, b)  # gradients are added in any order
        counts.append(counter.frame_count)
    assert counts[0] > 0
    assert counts == counts[:1] * 3


@pytest.mark.parametrize(("width", "edge_dim", "fused"), [(300, 3, False), (4, 300, True)])
def test_wider_than_kernels_are(width, edge_dim, fused):
    """Heads of more channels run torch-geometric's code; attributes are projected before."""
    theirs, ours = pair(7, width, heads=2, edge_dim=edge_dim)
    x, edge_index, graph, edge_attr = random_inputs(0, False, edge_dim)
    expected = theirs(x, edge_index, edge_attr)
    for edges in (graph, edge_index):
        torch.testing.assert_close(ours(x, edges, edge_attr), expected, rtol=1e-10, atol=1e-10)
        assert (ours.ran() == "fused") == fused


@pytest.mark.parametrize(
    ("edge_dim", "changes", "error", "message"),
    [
        (3, {"edge_attr": torch.zeros(20, 3, dtype=FP64)}, TypeError, "edge_attr is .*float64"),
        (3, {"edge_attr": torch.zeros(20, 4)}, ValueError, "edge_key_weight must be .* = .4, "),
        (3, {"edge_attr": None}, AssertionError, ""),  # torch-geometric's own from here on
        (3, {"edge_attr": torch.zeros(19, 3)}, RuntimeError, "tensor"),
        (None, {"x": torch.zeros(7, 4)}, ValueError, "from 6 sources to 6 targets but x has 7 and"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(edge_dim, changes, error, message):
    conv = TransformerConv(4, 2, edge_dim=edge_dim)
    edge_attr = None if edge_dim is None else torch.zeros(20, edge_dim)
    graph = random_graph(0, 6, 20)
    fitting = {"x": torch.zeros(6, 4), "edge_index": graph, "edge_attr": edge_attr}
    with pytest.raises(error, match=message):
        conv(**fitting | changes)


@pytest.fixture
def rows(monkeypatch):
    """-> rows of the benchmark on a tiny graph, by provider."""
    tiny = Problem("tiny", lambda: random_graph(0, 50, 300, isolated=3))
    monkeypatch.setitem(PROBLEMS, "tiny", tiny)

    def measured():
        case = bench.case("tiny", width=4, in_channels=8, edge_dim=4)
        return {row["provider"]: row for row in harness.compare(case, repeats=1)}

    return measured


def test_benchmark_rows_are_complete(rows, compiled_kernels):
    found = rows()
    assert list(found) == ["fastgt", "pyg", "pyg, compiled"]
    for row in found.values():
        assert row["match"] is True, row
        assert row["both_s"] > 0
        assert row["both_peak_bytes"] >= row["forward_peak_bytes"] > 0
        assert {"commit", "device", "torch", "triton", "date", "edge_dim"} <= row.keys()


def test_a_module_that_disagrees_is_reported_and_not_timed(rows, monkeypatch):
    real = bench._pyg

    def wrong(ours):
        theirs = real(ours)
        with torch.no_grad():
            theirs.lin_edge.weight.mul_(1.001)
        return theirs

    monkeypatch.setattr(bench, "_pyg", wrong)
    found = rows()
    assert found["fastgt"]["match"] is True
    assert found["pyg"]["match"] is False
    assert "forward_s" not in found["pyg"]
    assert "MISMATCH" in table.table([found["fastgt"], found["pyg"]])


def test_a_wrong_bias_is_not_hidden_by_what_its_gradient_sums(rows, monkeypatch):
    """Each bias's gradient off by a thousandth of the largest."""
    real = bench._pyg
    for name in ("lin_query", "lin_value", "lin_skip"):

        def wrong(ours, name=name):
            theirs = real(ours)
            bias = getattr(theirs, name).bias
            bias.register_hook(lambda grad: grad + 1e-3 * grad.abs().max())
            return theirs

        monkeypatch.setattr(bench, "_pyg", wrong)
        row = rows()["pyg"]
        assert row["match"] is False
        assert row["error"].startswith(f"{name}.bias is off")


def test_an_absent_peer_is_listed(rows, monkeypatch):
    def absent(ours):
        raise ImportError("no such package")

    monkeypatch.setattr(bench, "_pyg", absent)
    assert [row["match"] for row in rows().values()] == [True, None, None]


def test_nothing_is_measured_without_torch_geometric_or_by_its_code(rows, monkeypatch):
    with pytest.raises(ValueError, match="TransformerConv is not fused: heads have more than 256"):
        bench.case("tiny", width=300)
    monkeypatch.setitem(sys.modules, "fastgt.pyg", None)
    with pytest.raises(ImportError, match=r"fastgt\.pyg"):
        rows()


@pytest.mark.skipif(DEVICE != "cpu", reason="measures the CPU path")
def test_no_tensor_of_edges_by_width_is_made(compiled_kernels):
    """The peak hardly grows with the width of the heads, where theirs does by whole tensors."""
    nodes, edges, heads = 100, 20_000, 4
    edge_index = torch.randint(nodes, (2, edges))
    graph = Graph.from_edge_index(edge_index, nodes)
    graph.columns  # noqa: B018
    x, edge_attr = torch.randn(nodes, 16), torch.randn(edges, 8)
    peaks = []
    for width in (16, 64):
        for conv, walk in zip(
            pair(16, width, heads=heads, edge_dim=8, dtype=FP32), (edge_index, graph), strict=True
        ):
            do = torch.randn(nodes, heads * width)
            provider = harness.Provider(
                lambda x, e, conv=conv, walk=walk: conv(x, walk, e), tuple(conv.parameters())
            )
            inputs = {"x": x, "edge_attr": edge_attr}
            both = harness.step(
                provider, harness.Case({}, inputs, do, lambda dtype, p=provider: p, {})
            )
            both()
            peaks.append(memory.peak_extra_memory(both, torch.device("cpu")))
    grown = 4 * edges * heads * (64 - 16)
    assert peaks[2] - peaks[0] > 4 * grown
    assert peaks[3] - peaks[1] < grown / 8


@pytest.mark.skipif(DEVICE != "cpu", reason="of the CPU path")
@pytest.mark.parametrize("degree", [1, 6, 7, 20])
def test_edges_of_more_than_six_a_node_are_not_made(degree):
    nodes, width = 300, 64
    graph = random_graph(0, nodes, nodes * degree)
    theirs, ours = pair(5, 8, heads=8, edge_dim=3, dtype=FP32)
    x = torch.randn(nodes, 5)
    attr = torch.randn(graph.num_edges, 3)
    with torch.profiler.profile(record_shapes=True) as profile:
        out = ours(x, graph, attr)
    calls = [event for event in profile.events() if [graph.num_edges, 3] in event.input_shapes]
    made = any(event.name == "aten::linear" for event in calls)
    assert made == (degree <= 6)
    expected = theirs(x, graph.edge_index, attr)
    assert out.shape == (nodes, width)
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4)
