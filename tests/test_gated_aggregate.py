"""gated_aggregate: what is particular to it. Laws that it shares are in ``test_aggregate.py``."""

import math
from dataclasses import replace

import laws
import pytest
import torch
from aggregate_cases import (
    AGGREGATE,
    FAST_WAYS,
    WAYS,
    call,
    case,
    evaluate,
    zeros,
)
from attention_cases import (
    BF16,
    DEVICE,
    FAST,
    FP32,
    FP64,
    IMPLS,
    close,
)

from fastgt import AuxRequest, gated_aggregate
from fastgt.testing import random_graph


@pytest.mark.parametrize("impl", FAST_WAYS)
def test_a_rounded_output_does_not_shift_the_gates_gradient(impl):
    x = case("gated", 5, 8, 60, dtype=BF16, eps=0.0)
    v = torch.randint(2, x.inputs["x"].shape, generator=x.generator).to(DEVICE, BF16) / 2 + 64
    x = replace(x.having(x=v), do=torch.ones_like(x.do), de=x.de * 0)
    gates = ["dgate", "dgate_row", "dgate_col"]
    laws.a_rounded_output_does_not_shift_the_gradient(AGGREGATE, impl, x, gates)


@pytest.mark.parametrize("impl", WAYS)
def test_gates_far_out(impl):
    """exp(-e) overflows, sigma is 0 for all edges of a row: eps = 0 divides by nothing."""
    x = case("gated", 2, 5, 30, takes=4, dtype=FP32, eps=0.0)
    assert set(x.inputs) == {"x", "gate"}
    gate = torch.where(x.target[:, None] == 1, -1e4, x.inputs["gate"] * 1e3)
    found = evaluate(x.having(gate=gate), impl)
    for name, y in found.items():
        assert y.isfinite().all(), name
    assert (found["o"][1] == 0).all()


@pytest.mark.parametrize("twice", [False, True], ids=["once", "create_graph"])
@pytest.mark.parametrize("upstream", ["o", "e", "both"])
@pytest.mark.parametrize("impl", WAYS)
def test_every_subset_of_gradients_of_the_gated_mean(impl, upstream, twice):
    x = case("gated", 9, 4, 12, cols=3, isolated=1)
    outputs = ["o", "e"] if upstream == "both" else [upstream]
    some = {
        "twice": twice,
        "skip": (2, 3) if impl in ("triton", "buckets") and DEVICE == "cpu" else (),
        "connected": False,
    }
    laws.every_subset_of_gradients(AGGREGATE, impl, x, outputs, **some)


@pytest.mark.parametrize("impl", FAST)
def test_compiles_with_one_tensor_in_all_places(impl):
    torch._dynamo.reset()
    x = case("gated", 0, 5, 12, dtype=FP32)
    found = []

    def f(t):
        return gated_aggregate(t, x.graph, gate_row=t, gate_col=t, impl=impl)

    for g in (torch.compile(f, fullgraph=True, backend="aot_eager"), f):
        t = x.inputs["x"].detach().requires_grad_()
        o = g(t)
        found.append([o, *torch.autograd.grad(o, t, x.do)])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b)  # the three gradients are added in any order


@pytest.mark.parametrize("impl", IMPLS)
def test_without_a_denominator_it_is_torch_geometrics_resgated(impl):
    nn = pytest.importorskip("torch_geometric.nn")
    x = case("gated", 1, 8, 40)
    conv = nn.ResGatedGraphConv(5, 5, root_weight=False, bias=False).to(DEVICE, FP64)
    v = x.inputs["x"]
    found = gated_aggregate(
        conv.lin_value(v),
        x.graph,
        gate_row=conv.lin_key(v),
        gate_col=conv.lin_query(v),
        normalize=False,
        impl=impl,
    )
    close(found, conv(v, x.edge_index))


@pytest.mark.parametrize("impl", IMPLS)
def test_values_on_edges_are_those_of_torch_geometrics_resgated(impl):
    """Gates and values of [x_j, e_ij], with the gradients of its parameters."""
    nn = pytest.importorskip("torch_geometric.nn")
    x = case("gated", 1, 8, 40, isolated=1)
    conv = nn.ResGatedGraphConv(5, 5, edge_dim=3).to(DEVICE, FP64)
    v = x.inputs["x"].requires_grad_()
    attr = torch.randn(x.graph.num_edges, 3, dtype=FP64, generator=x.generator).to(DEVICE)
    attr.requires_grad_()

    def halves(linear):
        """What a layer of [x, e] makes of x, and of e."""
        of_nodes, of_edges = linear.weight.split([5, 3], 1)
        return v @ of_nodes.T, attr @ of_edges.T

    key, key_edge = halves(conv.lin_key)
    query, query_edge = halves(conv.lin_query)
    value, value_edge = halves(conv.lin_value)
    ours = gated_aggregate(
        value + conv.lin_value.bias,
        x.graph,
        key_edge + query_edge,
        gate_row=key + conv.lin_key.bias,
        gate_col=query + conv.lin_query.bias,
        edge_value=value_edge,
        normalize=False,
        impl=impl,
    )
    ours = ours + conv.lin_skip(v) + conv.bias
    theirs = conv(v, x.edge_index, attr)
    close(ours, theirs)
    leaves = [v, attr, *conv.parameters()]
    found, expected = (torch.autograd.grad(y, leaves, x.do) for y in (ours, theirs))
    for a, b in zip(found, expected, strict=True):
        close(a, b)


@pytest.mark.parametrize("impl", IMPLS)
def test_weights_of_gates_are_those_of_graphgps(impl):
    """Its factor r_ij, one number an edge, in its layer's own order of operations."""
    x = case("gated", 1, 8, 40, weight="edge", eps=1e-6)
    v, c, d, e, r = (t.requires_grad_() for t in x.inputs.values())
    r.data.sigmoid_()
    j, i = x.edge_index
    sigma = torch.sigmoid(d[i] + e[j] + c) * r[:, None]
    zeros = torch.zeros_like(v)
    theirs = zeros.index_add(0, i, sigma * v[j]) / (zeros.index_add(0, i, sigma) + 1e-6)
    ours, scores = call(x, impl)
    close(ours, theirs)
    close(scores, d[i] + e[j] + c)
    found, expected = (torch.autograd.grad(y, (v, c, d, e, r), x.do) for y in (ours, theirs))
    for a, b in zip(found, expected, strict=True):
        close(a, b)


@pytest.mark.parametrize("impl", WAYS)
def test_a_denominator_of_zero_gives_zero(impl):
    """Weights of both signs: the sum above is not 0."""
    x = case("gated", 1, 2, 2, weight="edge", takes=4, eps=0.0)
    x = x.onto(torch.tensor([[0, 1], [0, 0]], device=DEVICE))
    weight = torch.tensor([1.0, -1.0], dtype=FP64, device=DEVICE)
    x = x.having(gate=torch.zeros_like(x.inputs["gate"]), edge_weight=weight, de=x.de * 0)
    for name, y in evaluate(x, impl).items():
        assert (y == 0).all(), name


@pytest.mark.parametrize("impl", IMPLS)
def test_gated_gcn_is_that_of_graphgps(impl):
    """Its layer without norms, in its own order of operations (gather, sigmoid, two scatters)."""
    x = case("gated", 1, 8, 40)
    v, c, d, e = (x.inputs[name] for name in ("x", "gate", "gate_row", "gate_col"))
    j, i = x.edge_index
    e_ij = d[i] + e[j] + c
    sigma = torch.sigmoid(e_ij)
    zeros = torch.zeros_like(v)
    expected = zeros.index_add(0, i, sigma * v[j]) / (zeros.index_add(0, i, sigma) + 1e-6)
    found, edge = call(x, impl, eps=1e-6)
    close(found, expected)
    close(edge, e_ij)


REFUSALS = {
    "rows of x": ({"x": zeros(4, 2)}, ValueError, "x has 4 rows but the graph has 3 columns"),
    "rows of gate": ({"gate": zeros(5, 2)}, ValueError, "gate has 5 rows but .* has 6 edges"),
    "rows of gate_row": ({"gate_row": zeros(3, 2)}, ValueError, "gate_row has 3 .* 5 rows"),
    "rows of gate_col": ({"gate_col": zeros(5, 2)}, ValueError, "gate_col has 5 .* 3 columns"),
    "channels": (
        {"gate": zeros(6, 3)},
        ValueError,
        r"gate has channels \[3\] but x has \[2\]",
    ),
    "more dimensions": (
        {"gate_row": zeros(5, 2, 1)},
        ValueError,
        r"gate_row has channels \[2, 1\] but x has \[2\]",
    ),
    "rows of edge_weight": ({"edge_weight": zeros(5)}, ValueError, "edge_weight has 5 .* 6 edges"),
    "rows of edge_value": ({"edge_value": zeros(5, 2)}, ValueError, "edge_value has 5 .* 6 edges"),
    "channels of edge_weight": (
        {"edge_weight": zeros(6, 3)},
        ValueError,
        r"edge_weight has channels \[3\] but x has \[2\]",
    ),
    "channels of edge_value": (
        {"edge_value": zeros(6)},
        ValueError,
        r"edge_value has channels \[\] but x has \[2\]",
    ),
    "no dimension": ({"x": zeros()}, ValueError, r"x must have a first dimension .* got \[\]"),
    "integers": ({"x": zeros(3, 2, dtype=torch.int64)}, TypeError, "x must be float.*int64"),
    "dtype": ({"gate": zeros(6, 2, dtype=FP64)}, TypeError, "gate is .*float64 but x is .*32"),
    "device": ({"gate": zeros(6, 2, device="meta")}, ValueError, "gate is on meta but x is on"),
    "sparse": ({"x": zeros(3, 2).to_sparse()}, TypeError, "x must be a strided tensor, got"),
    "no tensor": ({"gate": [1.0]}, TypeError, "gate must be a tensor, got list"),
    "no x": ({"x": None}, TypeError, "x must be a tensor, got NoneType"),
    "no row of weights": ({"edge_weight": 2.0}, TypeError, "edge_weight must be a tensor, got flo"),
    "no graph": ({"graph": zeros(2, 6)}, TypeError, "graph must be a fastgt.Graph, got Tensor"),
    "no gates": (
        {"gate": None, "gate_row": None, "gate_col": None},
        ValueError,
        "gate, gate_row and gate_col are all None",
    ),
    "negative eps": ({"eps": -1.0}, ValueError, "eps must be finite and not negative, got -1.0"),
    "eps nan": ({"eps": math.nan}, ValueError, "eps must be finite and not negative, got nan"),
    "eps none": ({"eps": None}, TypeError, "eps must be a number, got NoneType"),
    "a flag for a request": (
        {"return_aux": True},
        TypeError,
        r"return_aux must be an AuxRequest, got bool: pass AuxRequest\(edge_scores=True\)",
    ),
    "weights": (
        {"return_aux": AuxRequest(weights=True)},
        ValueError,
        "return_aux: gated_aggregate has no weights; it has edge_scores",
    ),
    "lse": (
        {"return_aux": AuxRequest(lse=True, edge_scores=True)},
        ValueError,
        "return_aux: gated_aggregate has no lse; it has edge_scores",
    ),
}


@pytest.mark.parametrize("impl", [None, "reference"])
@pytest.mark.parametrize("refused", REFUSALS)
def test_refuses_by_name_and_numbers(refused, impl):
    changes, error, message = REFUSALS[refused]
    fitting = {
        "x": zeros(3, 2),
        "graph": random_graph(0, 5, 6, cols=3, device=DEVICE),
        "gate": zeros(6, 2),
        "gate_row": zeros(5, 2),
        "gate_col": zeros(3, 2),
    }
    gated_aggregate(**fitting, impl=impl)
    with pytest.raises(error, match=message):
        gated_aggregate(**fitting | changes, impl=impl)


@pytest.mark.parametrize("impl", IMPLS)
def test_what_a_request_asks_for_is_given(impl):
    x = case("gated", 1, 8, 40)
    inputs = dict(x.inputs)
    args = inputs.pop("x"), x.graph
    for ask in (False, True):
        out, aux = gated_aggregate(
            *args, **inputs, return_aux=AuxRequest(edge_scores=ask), impl=impl
        )
        assert (aux.lse, aux.weights) == (None, None)
        assert (aux.edge_scores is not None) == ask
        assert torch.equal(out, gated_aggregate(*args, **inputs, impl=impl))
    leaf = args[0].detach().requires_grad_()
    out, aux = gated_aggregate(leaf, x.graph, **inputs, return_aux=AuxRequest(), impl=impl)
    alone = gated_aggregate(leaf, x.graph, **inputs, impl=impl)
    for a, b in zip(*(torch.autograd.grad(y, leaf, x.do) for y in (out, alone)), strict=True):
        assert torch.equal(a, b)
