"""Values of edges in aggregate's messages that are products of few attributes."""

import itertools

import laws
import pytest
import torch
from aggregate_cases import (
    AGGREGATE,
    FAST_WAYS,
    call,
    case,
    degrees,
    evaluate,
    loops,
    walks,
    zeros,
)
from attention_cases import BF16, DEVICE, FAST, FP16, FP32, FP64, IMPLS, close, same_bits

from fastgt import aggregate
from fastgt.bench.memory import peak_extra_memory
from fastgt.testing import random_graph

GINE = {"relu": True, "takes": 1, "attr": 3}


@pytest.mark.parametrize("channels", [(1,), (12,), (65,), (130,), (2, 152), (1100,)])
@pytest.mark.parametrize("attr", [1, 16, 19])
@pytest.mark.parametrize("dtype", [FP64, FP32], ids=str)
def test_every_width_on_a_cpu(channels, attr, dtype):
    """A row and a column of many more edges than have their values made at once."""
    x = case("sum", 0, 6, 600, channels=channels, dtype=dtype, kind="hub", relu=True, attr=attr)
    if dtype == FP64:
        laws.equals_its_oracle(AGGREGATE, "cpp", x)
    else:
        laws.as_accurate_as_eager(AGGREGATE, "cpp", x, of_outputs=3.0)


@pytest.mark.parametrize("channels", [(3,), (64,)])
@pytest.mark.parametrize("turned", [False, True])
def test_long_rows_between_short_ones(channels, turned):
    """Values are made for some slots at a time, which begin and end anywhere in a row."""
    counts = [2, 255, 0, 3, 256, 1, 257, 40, 1500, 0, 7, 511, 513, 1, 600, 2]
    x = degrees("sum", counts, 7, channels=channels, relu=True, attr=5, takes=0)
    if turned:
        y = case("sum", 1, 7, sum(counts), cols=16, channels=channels, relu=True, attr=5)
        x = y.onto(x.edge_index.flip(0))
    laws.equals_its_oracle(AGGREGATE, "cpp", x)


@pytest.mark.parametrize("dtype", [FP16, BF16], ids=str)
@pytest.mark.parametrize("weight", ["", "edge", "channel"])
def test_half_precision_only_rounds_the_result_on_a_cpu(weight, dtype):
    x = case("sum", 3, 3, 3000, kind="hub", dtype=dtype, weight=weight, **GINE)
    laws.half_precision_only_rounds(AGGREGATE, "cpp", x)


@pytest.mark.parametrize("impl", FAST_WAYS)
def test_the_same_bits_every_time(impl):
    interpreted = impl != "cpp" and DEVICE == "cpu"
    x = case("sum", 1, *((8, 30) if interpreted else (100, 9000)), kind="hub", dtype=FP32, **GINE)
    laws.the_same_bits_every_time(AGGREGATE, impl, x, 1 if interpreted else 10)
    laws.index_width_does_not_change_a_bit(AGGREGATE, impl, x)
    if impl == "cpp":
        laws.threads_do_not_change_a_bit(AGGREGATE, x)


def test_a_row_has_the_same_bits_whatever_lies_beside_it():
    """Its place among the slots whose values are made at once has no say."""
    x = degrees("sum", [3, 300, 40, 700], 50, dtype=FP32, channels=(20,), **GINE)
    whole = evaluate(x, "cpp")
    for row in range(4):
        alone = x.taking((x.target == row).nonzero()[:, 0])
        (o,) = call(alone, "cpp")
        assert torch.equal(o[row], whole["o"][row])


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("weight", ["", "edge", "channel"])
def test_gradcheck(impl, weight):
    x = case("mean", 3, 4, 9, cols=5, channels=(2,), relu=True, attr=2, weight=weight)
    names = list(x.inputs)

    def f(*inputs):
        return call(x.having(**dict(zip(names, inputs, strict=True))), impl)

    inputs = [t.detach().requires_grad_() for t in x.inputs.values()]
    assert torch.autograd.gradcheck(f, inputs, fast_mode=impl == "triton")
    assert torch.autograd.gradgradcheck(f, inputs, fast_mode=True)


@pytest.mark.parametrize("impl", FAST)
@pytest.mark.parametrize("op", ["sum", "max"])
def test_double_backward_equals_the_reference(impl, op):
    x = case(op, 2, 8, 24, cols=9, isolated=1, **GINE)
    laws.double_backward_equals_the_reference(AGGREGATE, impl, x)


@pytest.mark.parametrize("impl", FAST_WAYS)
@pytest.mark.parametrize("takes", [0, 1])
def test_every_subset_of_gradients(impl, takes):
    x = case("sum", 9, 5, 14, cols=4, isolated=1, relu=True, weight="edge", attr=3, takes=takes)
    wanted = loops(x)
    for some in itertools.product((False, True), repeat=len(x.inputs)):
        if not any(some):
            continue
        leaves = {
            name: t.detach().requires_grad_(need)
            for (name, t), need in zip(x.inputs.items(), some, strict=True)
        }
        (o,) = call(x.having(**leaves), impl)
        asked = {name: t for name, t in leaves.items() if t.requires_grad}
        grads = torch.autograd.grad(o, list(asked.values()), x.do)
        for name, grad in zip(asked, grads, strict=True):
            close(grad, wanted[f"d{name}"])


@pytest.mark.parametrize("impl", IMPLS)
def test_nan_of_an_edge_reaches_its_row_only(impl):
    x = case("sum", 4, 8, 20, cols=9, dtype=FP32, isolated=1, **GINE)
    found, hit = laws.a_value_stays_with_its_rows(AGGREGATE, impl, x, "edge_attr", torch.nan)
    assert found["o"][hit["rows"]].isnan().any(0).all()


@pytest.mark.parametrize("impl", IMPLS)
def test_no_edges_and_no_nodes(impl):
    for (rows, cols), channels in itertools.product(((4, 4), (0, 0), (0, 3)), ((5,), (0,), (2, 0))):
        x = case("sum", 0, rows, 0, cols=cols, channels=channels, **GINE)
        found = laws.without_edges_all_is_zero(AGGREGATE, impl, x)
        assert found["dedge_value_weight"].shape == (3, *channels)


@pytest.mark.parametrize("impl", IMPLS)
def test_attributes_alone_are_a_product(impl):
    graph = random_graph(0, 5, 12, cols=3, device=DEVICE)
    generator = torch.Generator().manual_seed(0)
    attr = torch.randn(12, 2, generator=generator, dtype=FP64).to(DEVICE)
    factor = torch.randn(2, 3, 4, generator=generator, dtype=FP64).to(DEVICE)
    given = {"edge_attr": attr, "edge_value_weight": factor, "impl": impl}
    values = torch.tensordot(attr, factor, 1)
    close(aggregate(None, graph, **given), aggregate(None, graph, edge_value=values, impl=impl))


@pytest.mark.parametrize("impl", FAST)
def test_autocast_casts_them(impl):
    x = case("sum", 3, 8, 30, dtype=FP32, **GINE)
    with torch.autocast(DEVICE, BF16):
        (found,) = call(x, impl)
    (plain,) = call(x.having(**{n: t.to(BF16) for n, t in x.inputs.items()}), impl)
    assert torch.equal(found, plain)


@pytest.mark.parametrize("impl", FAST)
def test_compiles_whole(impl):
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda x: call(x, impl), fullgraph=True, dynamic=True, backend="aot_eager"
    )
    for edges in (30, 41):
        x = case("sum", edges, 8, edges, dtype=FP32, **GINE)
        leaves = x.having(**{n: t.detach().requires_grad_() for n, t in x.inputs.items()})
        (o,) = compiled(leaves)
        grads = torch.autograd.grad(o, list(leaves.inputs.values()), x.do)
        found = {"o": o.detach()} | dict(zip([f"d{n}" for n in x.inputs], grads, strict=True))
        same_bits(found, evaluate(x, impl))


def test_no_memory_is_taken_for_values_on_a_cpu():
    n, edges, d = 50, 40_000, 64
    x = case("sum", 0, n, edges, channels=(d,), dtype=FP32, relu=True, takes=1, attr=4)
    evaluate(x, "cpp")
    peak = peak_extra_memory(lambda: evaluate(x, "cpp"), torch.device("cpu"))
    assert peak < 0.3 * edges * d * 4
    assert peak_extra_memory(lambda: evaluate(x, "reference"), torch.device("cpu")) > edges * d * 4


@pytest.mark.parametrize("impl", [None, "reference"])
def test_refusals(impl):
    graph, x = random_graph(0, 5, 6, cols=3, device=DEVICE), zeros(3, 2)
    attr, factor = zeros(6, 4), zeros(4, 2)
    for error, message, changes in (
        (ValueError, "edge_attr needs edge_value_weight", {"edge_value_weight": None}),
        (ValueError, "edge_value_weight needs edge_attr", {"edge_attr": None}),
        (ValueError, "edge_attr has 3 rows but .* 6 edges", {"edge_attr": zeros(3, 4)}),
        (ValueError, r"edge_attr must be \[E, C\] = \[6, C\], got \[6\]", {"edge_attr": zeros(6)}),
        (ValueError, "edge_attr has 0 channels; .* 1 to 256", {"edge_attr": zeros(6, 0)}),
        (ValueError, "edge_attr has 257 channels", {"edge_attr": zeros(6, 257)}),
        (ValueError, r"must be \[C, ...\] = \[4, ...\], got \[3, 2\]", {"edge_value_weight": x}),
        (
            ValueError,
            r"edge_value_weight has channels \[3\] but x has \[2\]",
            {"edge_value_weight": zeros(4, 3)},
        ),
        (TypeError, "edge_value_weight is .*64 but edge_attr is .*32", {
            "edge_value_weight": factor.double()
        }),
        (TypeError, "x is .*32 but edge_attr is .*64", {
            "edge_attr": attr.double(), "edge_value_weight": factor.double()
        }),
        (TypeError, "edge_attr must be a tensor, got list", {"edge_attr": [1.0]}),
        (TypeError, "edge_value_weight must be a strided tensor, got list", {
            "edge_value_weight": [1.0]
        }),
    ):  # fmt: skip
        given = {"edge_attr": attr, "edge_value_weight": factor} | changes
        with pytest.raises(error, match=message):
            aggregate(x, graph, **given, impl=impl)


@pytest.mark.skipif(DEVICE != "cpu", reason="of the CPU's kernels")
def test_the_registered_op_of_maxima_refuses_them_on_a_cpu():
    x = case("max", 0, 5, 12, attr=2)
    v, values, attr, factor = x.inputs.values()
    messages = v, values, None, attr, factor
    with pytest.raises(ValueError, match="maxima takes no values"):
        torch.ops.fastgt.aggregate_fwd("cpp", *messages, walks(x.graph, "cpp")[0], "max", False)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [FP32, FP64], ids=str)
def test_gine_makes_no_values_of_edges(bias, dtype):
    """torch-geometric's layer, its gradients, and memory below one tensor of edges."""
    nn = pytest.importorskip("torch_geometric.nn")
    from fastgt.pyg import GINEConv

    x = case("sum", 2, 200, 8000, channels=(16,), dtype=dtype, attr=3, takes=1)
    v, attr = x.inputs["x"], x.inputs["edge_attr"]
    theirs = nn.GINEConv(torch.nn.Linear(16, 16), eps=0.5, edge_dim=3, train_eps=True)
    theirs.lin = nn.Linear(3, 16, bias=bias)
    theirs.to(dtype)
    theirs.eps.data.fill_(0.5)
    ours = GINEConv(torch.nn.Linear(16, 16), eps=0.5, edge_dim=3, train_eps=True)
    ours.lin = nn.Linear(3, 16, bias=bias)
    ours.to(dtype).load_state_dict(theirs.state_dict())
    results = []
    for layer in (ours, theirs):
        leaves = [v.clone().requires_grad_(), attr.clone().requires_grad_(), *layer.parameters()]
        out = layer(leaves[0], x.edge_index, leaves[1])
        results.append([out, *torch.autograd.grad(out, leaves, x.do)])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4 if dtype == FP32 else 1e-10)
    hooked = ours.lin.register_forward_hook(lambda *_: None)
    out = ours(v, x.edge_index, attr)
    torch.testing.assert_close(out, results[1][0], rtol=1e-4, atol=1e-4)
    hooked.remove()
    with torch.no_grad():
        run = lambda: ours(v, x.edge_index, attr)  # noqa: E731
        run()
        peak = peak_extra_memory(run, torch.device("cpu"))
    assert peak < 0.9 * 8000 * 16 * v.element_size()
