"""segment_softmax, aggregate and gated_aggregate: how they run, whatever the results are."""

import itertools
from dataclasses import replace

import laws
import pytest
import torch
from aggregate_cases import (
    AGGREGATE,
    FAST_WAYS,
    KINDS,
    OPS,
    OVER,
    WAYS,
    call,
    case,
    degrees,
    each_family,
    evaluate,
    loops,
    walks,
)
from attention_cases import (
    BF16,
    DEVICE,
    FAST,
    FP16,
    FP32,
    FP64,
    IMPLS,
    LAYOUTS,
    all_close,
    same_bits,
)
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._python_dispatch import TorchDispatchMode

from fastgt import AuxRequest, Graph, aggregate, gated_aggregate, reference, segment_softmax
from fastgt.bench.memory import peak_extra_memory
from fastgt.contract import (
    GatedKept,
    GatedMean,
    GatedMessages,
    GatedNeeds,
    GatedResults,
    GatedUpstream,
    MessageNeeds,
    Messages,
    Reduction,
)
from fastgt.prepared import ColumnWalk, Prepared
from fastgt.testing import with_index_dtype


@pytest.mark.parametrize("impl", FAST)
def test_nothing_is_computed_for_gradients_not_asked_for(impl):
    x = case("gated", 0, 5, 12, weight="edge", value=True)
    rows, columns = walks(x.graph, impl)
    x.inputs["edge_weight"] = x.inputs["edge_weight"][:, None]
    inputs = tuple(x.inputs.values())
    ops = torch.ops.fastgt
    _, _, total, mean = ops.gated_aggregate_fwd(impl, *inputs, rows, 0.1, True, False, True)
    assert not mean.numel()
    mean = ops.gated_aggregate_fwd(impl, *inputs, rows, 0.1, True, False, False)[0]
    for needs in itertools.product([False, True], repeat=len(inputs)):
        args = x.do, None, *inputs, total, mean, rows, columns, 0.1, True
        grads = ops.gated_aggregate_bwd(impl, *args, *needs)
        assert tuple(bool(g.numel()) for g in grads) == needs
        assert not any(g.isnan().any() for g in grads)
    x = case("sum", 0, 5, 12, weight="edge", attr=2)
    x.inputs["edge_weight"] = x.inputs["edge_weight"][:, None]
    first = x.graph.edge.new_empty(0, 5)
    for needs in itertools.product([False, True], repeat=5):
        args = x.do, first, *x.inputs.values(), rows, columns, "sum", True
        grads = ops.aggregate_bwd(impl, *args, *needs)
        assert tuple(bool(g.numel()) for g in grads) == needs
        assert not any(g.isnan().any() for g in grads)


@pytest.mark.parametrize("layout", ["expanded", "scalar"])
@pytest.mark.parametrize("impl", FAST)
@each_family
def test_strides_of_upstream_gradients(impl, op, options, layout):
    x = laws.with_upstream(case(op, 6, 7, 30, **options), layout)
    laws.equals_its_oracle(AGGREGATE, impl, x)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
@pytest.mark.parametrize("impl", FAST)
@each_family
def test_strides_do_not_change_a_bit(impl, op, options, dtype, layout):
    for channels in ((8,), (2, 4)) if impl == "cpp" else ((8,),):
        x = case(op, 4, 8, 20, cols=7, channels=channels, dtype=dtype, **options)
        laws.strides_do_not_change_a_bit(AGGREGATE, impl, laws.laid(x, layout))


@pytest.mark.parametrize("impl", WAYS)
@each_family
def test_inputs_are_left_alone_and_outputs_alias_nothing(impl, op, options):
    x = case(op, 5, 8, 30, dtype=FP32, **options)
    if op == "gated":  # one term only, so that e would be that term
        x = case(op, 5, 8, 30, dtype=FP32, takes=4)
    laws.inputs_are_left_alone_and_outputs_alias_nothing(AGGREGATE, impl, x)


@pytest.mark.parametrize("impl", FAST_WAYS)
@each_family
def test_bitwise_repeatable(impl, op, options):
    interpreted = impl != "cpp" and DEVICE == "cpu"
    size = (8, 30) if interpreted else (100, 2000)
    x = case(op, 1, *size, kind="hub", dtype=FP32, **options)
    laws.the_same_bits_every_time(AGGREGATE, impl, x, 1 if interpreted else 20)
    laws.index_width_does_not_change_a_bit(AGGREGATE, impl, x)


@pytest.mark.skipif(DEVICE != "cpu", reason="threads are the CPU's")
@each_family
def test_threads_do_not_change_a_bit(op, options):
    x = case(op, 1, 1000, 35_000, kind="hub", dtype=FP32, channels=(16,), **options)
    laws.threads_do_not_change_a_bit(AGGREGATE, x)


@pytest.mark.skipif(DEVICE != "cpu", reason="the CPU path's order")
@pytest.mark.parametrize("turned", [False, True], ids=["row", "column"])
@pytest.mark.parametrize("many", [60, 300, 3000])
def test_messages_that_are_alike_do_not_add_up_their_rounding(many, turned):
    """Each of them is rounded the same way where it joins a large sum."""
    graph = Graph.from_edge_index(torch.tensor([[0] + [1] * many, [0] * (many + 1)]), 2)
    x = torch.tensor([[3.0], [0.0071]], device=DEVICE)
    if turned:
        source = torch.zeros_like(x).requires_grad_()
        out = aggregate(source, graph.transpose(), impl="cpp")
        (found,) = torch.autograd.grad(out, source, x)
    else:
        found = aggregate(x, graph, impl="cpp")
    exact = x[0, 0].double() + many * x[1, 0].double()
    assert abs(found[0, 0].double() / exact - 1) < 4 * torch.finfo(FP32).eps


@pytest.mark.skipif(DEVICE != "cpu", reason="the CPU path's choice")
@pytest.mark.parametrize("width", [1, 7, 16, 33, 71, 130])
@pytest.mark.parametrize(("op", "options"), KINDS, ids=str)
def test_lines_and_blocks_of_rows_are_the_same_rows(op, options, width):
    """Channels around the width of vectors and lines, rows around the length of a block."""
    x = degrees(op, [0, 1, 3, 63, 64, 65, 0, 130, 0], 5, channels=(width,), **options)
    all_close(evaluate(x, "cpp"), loops(x))
    half = {name: t.to(BF16) for name, t in x.inputs.items()}
    do, de = (None if t is None else t.to(BF16) for t in (x.do, x.de))
    found = evaluate(replace(x, inputs=half, do=do, de=de), "cpp")
    assert not any(y.isnan().any() for y in found.values())


@pytest.mark.parametrize("index", [torch.int32, torch.int64], ids=str)
def test_the_first_of_equal_messages_is_so_by_number(index):
    """Edges of a transposed graph do not stand by number; a long row is searched in pieces."""
    source, target = torch.randperm(10_000) % 7, torch.arange(10_000) % 3
    there = Graph.from_edge_index(torch.stack([source, target]), (3, 7))
    back = with_index_dtype(Graph.from_edge_index(torch.stack([target, source]), (7, 3)), index)
    assert not (back.transpose().edge.diff() > 0).all()
    value = torch.randint(3, (10_000, 20)).float()
    value[value == 2] = -torch.inf
    value[::1000] = torch.nan
    found = []
    for graph, impl in ((back.transpose(), "cpp"), (there, "reference")):
        x = value.clone().requires_grad_()
        y = aggregate(None, graph, edge_value=x, reduce="max", impl=impl)
        found.append((y, *torch.autograd.grad(y, x, torch.ones_like(y))))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("tile", [(2, 16), (8, 1)], ids=str)
@pytest.mark.parametrize("plan", ["gather", "buckets"])
@each_family
def test_any_tile_gives_the_same(monkeypatch, op, options, plan, tile):
    """Degrees at and around every block size, rows beyond a block of rows, blocks of channels."""
    pytest.importorskip("triton")
    from fastgt.kernels import channels
    from fastgt.kernels.configs import Tile

    monkeypatch.setattr(channels, "attention_tile", lambda *args: Tile(*tile, 1, 4))
    monkeypatch.setattr(channels, "_CHANNELS", 4)
    x = degrees(op, [0, 1, 4, 5, 0, 23], 4, plan=plan, **options)
    all_close(evaluate(x, "triton"), loops(x))


@pytest.mark.parametrize("turned", [False, True], ids=["row", "column"])
@pytest.mark.parametrize("impl", FAST)
@each_family
def test_a_hub_is_like_any_other_node(impl, op, options, turned):
    """More edges than a piece on the CPU, than a program's share in the kernels."""
    big = impl == "cpp" or DEVICE == "cuda"
    x = degrees(op, [2, 20_000 if big else 60, 0, 1, 3], 7, dtype=FP32, **options)
    x = x if big else replace(x, plan="buckets")
    x = x.onto(x.edge_index)
    if turned:
        y = case(op, 1, 7, x.graph.num_edges, cols=5, dtype=FP32, plan=x.plan, **options)
        x = y.onto(x.edge_index.flip(0))
    gradients = [f"d{name}" for name in x.inputs] if op == "max" else []
    laws.as_accurate_as_eager(AGGREGATE, impl, x, of_outputs=3.0, but=gradients)


@pytest.mark.skipif(DEVICE != "cpu", reason="runs on CPU tensors")
@each_family
def test_memory_of_the_cpu_path(op, options):
    n, edges, d = 50, 20_000, 64
    x = case(op, 0, n, edges, channels=(d,), dtype=FP32, **options)
    evaluate(x, "cpp")  # the column walk and other first-time costs
    wide = edges * d * 4
    # results on edges: the softmax, the gates, and the gradients of what stands there
    asked = (op in ("softmax", "gated")) * wide
    asked += sum(4 * t.numel() for name, t in x.inputs.items() if OVER[name] == "edges")
    # a few tensors of nodes, and a few [E] vectors
    allowed = asked + 4 * (20 * n * d + 12 * edges)
    assert allowed < asked + 0.6 * wide
    device = torch.device(DEVICE)
    peak = peak_extra_memory(lambda: evaluate(x, "cpp"), device)
    assert peak <= allowed, (peak - asked) / wide
    assert peak_extra_memory(lambda: evaluate(x, "reference"), device) > asked + wide
    if op == "softmax":
        return
    # with no channels on edges, nothing of that size is made at all
    takes = {"gated": 3}.get(op, 1)
    changes = {"takes": takes, "value": False, "weight": options.get("weight", "") and "edge"}
    x = case(op, 0, n, edges, channels=(d,), dtype=FP32, **options | changes)
    assert not any(OVER[name] == "edges" and t.ndim > 1 for name, t in x.inputs.items())
    leaves = {name: t.requires_grad_() for name, t in x.inputs.items()}

    def train():
        v, rest = leaves["x"], {k: t for k, t in leaves.items() if k != "x"}
        f = gated_aggregate if op == "gated" else aggregate
        return torch.autograd.grad(f(v, x.graph, **rest, **x.options), leaves.values(), x.do)

    train()
    small = 4 * (20 * n * d + 12 * edges)
    assert peak_extra_memory(train, device) <= small
    assert small < 0.6 * wide


def huge_graph(rows, edges):
    """A graph beyond any memory: meta tensors only."""

    def index(n):
        return torch.empty(n, dtype=torch.int64, device="meta")

    ptr = index(rows + 1)
    walk = ColumnWalk(ptr, *(index(edges) for _ in range(3)))
    bounds = index(2)
    prepared = Prepared(columns=walk)
    return Graph(rows, rows, ptr, index(edges), index(edges), bounds, bounds, prepared)


def test_shapes_beyond_two_to_the_31_on_meta_tensors():
    n, e, d = 3 * 2**30, 5 * 2**30, 32
    graph = huge_graph(n, e)

    def tensor(n):
        return torch.empty(n, d, device="meta", requires_grad=True)

    x, edge, row = tensor(n), tensor(e), tensor(n)
    for reduce in ("sum", "max"):
        o = aggregate(x, graph, reduce=reduce, edge_value=edge, activation="relu", impl="triton")
        assert o.shape == (n, d)
        grads = torch.autograd.grad(o, (x, edge), o)
        assert [g.shape for g in grads] == [(n, d), (e, d)]
    request = AuxRequest(edge_scores=True)
    o, aux = gated_aggregate(
        x, graph, edge, gate_row=row, gate_col=x, return_aux=request, impl="triton"
    )
    assert (o.shape, aux.edge_scores.shape) == ((n, d), (e, d))
    outputs = o, aux.edge_scores
    grads = torch.autograd.grad(outputs, (x, edge, row), outputs)
    assert [g.shape for g in grads] == [(n, d), (e, d), (n, d)]
    y = segment_softmax(edge, graph, impl="triton")
    assert torch.autograd.grad(y, edge, y)[0].shape == (e, d)


@pytest.mark.parametrize("axis", [0, 1], ids=["node", "channel"])
@each_family
def test_addresses_beyond_two_to_the_31(tmp_path, op, options, axis):
    """Strides reach past 2^31 elements; the memory is a sparse file, so nothing of it is paid."""
    size = 2**33 + 2**20
    if DEVICE == "cuda":
        room = torch.zeros(size, dtype=FP16, device=DEVICE)
    else:
        room = torch.from_file(str(tmp_path / "sparse"), shared=True, size=size, dtype=FP16)
    x = case(op, 2, 5, 7, channels=(4,), dtype=FP16, **options)
    # odd, or the kernel multiplies by an even factor of it at the very end, in 64 bits
    far, place, laid = 3 * 2**28 + 1, 2**31, {}
    for name, tensor in (x.inputs | {"do": x.do, "de": x.de}).items():
        if tensor is None:
            continue
        stride = [far if i == axis else n for i, n in enumerate(tensor.stride())]
        laid[name] = room.as_strided(tensor.shape, stride, place).copy_(tensor)
        place += 128
    do, de = laid.pop("do"), laid.pop("de", None)
    for impl in FAST:
        same_bits(evaluate(replace(x, inputs=laid, do=do, de=de), impl), evaluate(x, impl))


@pytest.mark.parametrize("dtype", [FP16, FP64], ids=str)
@pytest.mark.parametrize("d", [1, 16, 256, 4096])
def test_grids_stay_within_the_limits(d, dtype, monkeypatch):
    """Rows are the first axis, 2^31 - 1 long; the second one ends at 65,535."""
    pytest.importorskip("triton")
    from fastgt.kernels import aggregate as sums
    from fastgt.kernels import gated_aggregate as gated
    from fastgt.kernels import segment_softmax as softmax

    grids = []

    class Recorder:
        def __getitem__(self, grid):
            grids.append(grid)
            return lambda *args, **kwargs: None

    for module in (sums, gated, softmax):
        for name in list(vars(module)):
            if name.endswith("_kernel"):
                monkeypatch.setattr(module, name, Recorder())
    n = 2**31 - 1
    x, ptr = (torch.empty(n, d, dtype=dtype, device="meta"), torch.empty(n + 1, device="meta"))
    for edges in (n, 40 * n):
        e = torch.empty(edges, d, dtype=dtype, device="meta")
        index = torch.empty(edges, dtype=torch.int64, device="meta")
        walk = ptr, index, index
        softmax.segment_softmax_bwd(e, softmax.segment_softmax_fwd(e, walk), walk)
        messages, reduction = Messages(x, e, None), Reduction("sum", True)
        sums.aggregate_fwd(messages, walk, Reduction("max", True))
        o, first = sums.aggregate_fwd(messages, walk, reduction)
        sums.aggregate_bwd(
            o, messages, first, walk, walk, reduction, MessageNeeds(True, True, False)
        )
        inputs, mean = GatedMessages(x, e, x, x, None, None), GatedMean(0.1, True)
        o, e, total, _ = gated.gated_aggregate_fwd(inputs, walk, mean, GatedResults(True, True))
        args = GatedUpstream(o, e), inputs, GatedKept(total, total), walk, walk, mean
        gated.gated_aggregate_bwd(*args, GatedNeeds(*(True,) * 4, False, False))
    assert len(grids) == 20
    for grid in grids:
        assert 0 < grid[0] < 2**31
        assert 0 < grid[1] <= 65535


@pytest.mark.parametrize("op", OPS)
def test_nothing_waits_for_the_device(op):
    """Launchers allocate and launch: no value comes back, so a CUDA graph can capture them."""
    pytest.importorskip("triton")
    x = case(op, 1, 4, 20, dtype=FP32, plan="buckets", relu=True)
    evaluate(x, "triton")
    with Calls() as calls:
        evaluate(x, "triton")
    assert not {"_local_scalar_dense", "nonzero", "item", "unique", "sort"} & calls.names


class Calls(TorchDispatchMode):
    """The names of the operators that ran."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.add(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("edges", "layout", "dtype"),
    [(9, "contiguous", FP32), (9, "reversed", BF16), (0, "contiguous", FP32)],
    ids=["plain", "strided", "empty"],
)
@pytest.mark.parametrize("impl", FAST)
def test_opcheck(impl, edges, layout, dtype):
    ops, check = torch.ops.fastgt, torch.library.opcheck
    made = {"cols": 3, "channels": (4,), "dtype": dtype, "layout": layout}
    x = case("sum", 0, 4, edges, weight="channel", **made)
    rows, columns = walks(x.graph, impl)
    values, weight = list(x.inputs.values())[:2], x.inputs["edge_weight"]
    factors = list(case("sum", 0, 4, edges, attr=2, **made).inputs.values())[2:]
    for reduce, weights, low_rank in (
        ("sum", None, (None, None)),
        ("max", None, (None, None)),
        ("sum", weight, factors),
        ("max", weight[:, :1], (None, None)),
    ):
        messages = *values, weights, *low_rank
        forward = (impl, *messages, rows, reduce, True)
        check(ops.aggregate_fwd.default, forward)
        _, first = ops.aggregate_fwd(*forward)
        inputs = x.do, first, *messages, rows, columns, reduce, True
        needs = True, reduce == "sum", weights is not None, *(low_rank == factors,) * 2
        check(ops.aggregate_bwd.default, (impl, *inputs, *needs))
    alone = None, x.inputs["edge_value"], None, None, None
    check(ops.aggregate_fwd.default, (impl, *alone, rows, "mean", False))
    x = case("gated", 0, 4, edges, weight="channel", value=True, **made)
    inputs = tuple(x.inputs.values())
    for flags in ((True, True, True), (False, False, False)):
        forward = (impl, *inputs, rows, 0.1, *flags)
        check(ops.gated_aggregate_fwd.default, forward)
        o, e, total, mean = ops.gated_aggregate_fwd(*forward)
        if flags[2]:
            kept = total, mean if mean.numel() else o.to(total.dtype)
            upstream = o, e if flags[1] else None
            backward = *upstream, *inputs, *kept, rows, columns, 0.1, flags[0]
            for needs in ((True,) * 6, (False, False, True, *(False,) * 3)):
                check(ops.gated_aggregate_bwd.default, (impl, *backward, *needs))
    y = case("softmax", 0, 4, edges, **made).do
    check(ops.segment_softmax_fwd.default, (impl, y, rows))
    check(ops.segment_softmax_bwd.default, (impl, y, ops.segment_softmax_fwd(impl, y, rows), rows))


@pytest.mark.parametrize("impl", FAST)
@each_family
def test_compiles_whole_and_once(impl, op, options):
    """One compilation serves graphs of every size, forward and backward."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")

    def f(x):
        return call(x, impl)

    compiled = torch.compile(f, fullgraph=True, dynamic=True, backend=counter)
    counts = []
    # no two sizes are equal, nor N + 1 and another: the compiler would take them for one number
    for seed, (n, e) in enumerate([(11, 20), (9, 31), (13, 15)]):
        x = case(op, seed, n, e, channels=(8,), dtype=FP32, **options)
        x = x.having(**{name: t.requires_grad_() for name, t in x.inputs.items()})
        found, leaves = [], list(x.inputs.values())
        for g in (compiled, f):
            y = g(x)
            upstream = [t for t in (x.do, x.de) if t is not None]
            found.append([*y, *torch.autograd.grad(y, leaves, upstream)])
        for a, b in zip(*found, strict=True):
            assert torch.equal(a, b)
        counts.append(counter.frame_count)
    assert counts[0] > 0
    assert counts == counts[:1] * 3


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("impl", FAST)
@each_family
def test_checkpointing(impl, op, options, reentrant):
    x = case(op, 3, 8, 30, dtype=FP32, **options)
    laws.checkpointing_changes_no_gradient(AGGREGATE, impl, x, reentrant=reentrant)


@pytest.mark.parametrize("impl", FAST)
@each_family
def test_inference_never_sorts_the_column_walk(impl, op, options):
    x = case(op, 0, 5, 12, dtype=FP32, **options)
    laws.inference_never_sorts_the_column_walk(AGGREGATE, impl, x)


def test_the_named_implementation_runs(monkeypatch, compiled_kernels):
    import fastgt.cpu.aggregate
    import fastgt.kernels.aggregate

    seen = []
    for name, module, function in (
        ("cpp", fastgt.cpu.aggregate, "aggregate_fwd"),
        ("triton", fastgt.kernels.aggregate, "aggregate_fwd"),
        ("cpp", fastgt.cpu.aggregate, "aggregate_bwd"),
        ("triton", fastgt.kernels.aggregate, "aggregate_bwd"),
        ("reference", reference, "aggregate"),
    ):
        real = getattr(module, function)

        def spy(*args, real=real, name=name, **kwargs):
            seen.append(name)
            return real(*args, **kwargs)

        monkeypatch.setattr(module, function, spy)
    x = case("sum", 0, 3, 5, dtype=FP32)
    for impl in (None, *IMPLS):
        seen.clear()
        evaluate(x, impl)
        assert set(seen) == {impl or FAST[0]}
        with fastgt.implementation(impl):
            seen.clear()
            evaluate(x, None)
        assert set(seen) == {impl or FAST[0]}
