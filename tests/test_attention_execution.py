"""neighborhood_attention: nothing but time depends on tiles, layouts, compilation or threads."""

import copy
import io
import math
import pickle
from dataclasses import replace

import laws
import pytest
import torch
from attention_cases import (
    ATTENTION,
    BF16,
    DEVICE,
    FAST,
    FAST_WAYS,
    FP16,
    FP32,
    FP64,
    IMPLS,
    LAYOUTS,
    PLANS,
    all_close,
    arrange,
    attend,
    case,
    evaluate,
    loops,
    op_arguments,
    same_bits,
)
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._python_dispatch import TorchDispatchMode

from fastgt import AuxRequest, Graph, neighborhood_attention
from fastgt.bench.memory import peak_extra_memory
from fastgt.contract import Dropout, EdgeTerms, HeadMask, Inputs, Logit, Saved, Switches, Upstream
from fastgt.prepared import ColumnWalk, Prepared
from fastgt.testing import random_graph


@pytest.fixture(
    params=[(1, 2, 1), (4, 4, 1), (2, 16, 4), (16, 1, 2), (8, 2, 8)],
    ids=lambda t: f"R{t[0]}-E{t[1]}-H{t[2]}",
)
def tile(request, monkeypatch):
    """Every launch with the same tile, whatever the shape."""
    pytest.importorskip("triton")
    import fastgt.kernels.attention as kernels
    from fastgt.kernels.configs import Tile

    chosen = Tile(*request.param, num_warps=4)
    monkeypatch.setattr(kernels, "attention_tile", lambda *args, **kwargs: chosen)
    return chosen


def degrees_case(degrees, cols, **options):
    """Row i has degrees[i] edges, shuffled; columns are random."""
    generator = torch.Generator().manual_seed(0)
    target = torch.arange(len(degrees)).repeat_interleave(torch.tensor(degrees))
    source = torch.randint(cols, target.shape, generator=generator)
    order = torch.randperm(len(target), generator=generator)
    index = torch.stack([source, target])[:, order].to(DEVICE)
    x = case(0, len(degrees), len(target), cols=cols, **options)
    return x.onto(index)


def test_any_tile_gives_the_same(tile):
    """Degrees at and around every block size, and rows beyond a block of rows."""
    x = degrees_case([0, 1, 3, 4, 5, 0, 17], 5, heads=2, d=5, dv=3, clamped=True)
    all_close(evaluate(x, "triton"), loops(x))
    turned = replace(x, q=x.k, k=x.q, v=x.do[:, :, :3], do=x.v, dlse=x.k[:, :, 0].clone())
    turned = replace(turned, edge_index=x.edge_index.flip(0), graph=x.graph.transpose())
    all_close(evaluate(turned, "triton"), loops(turned))


@pytest.mark.parametrize("plan", ["windows 64", "windows 16", "graphs 64"])
@pytest.mark.parametrize("columns", [16, 32])
def test_windows_of_several_tiles(monkeypatch, columns, plan):
    """Columns that all rows have, before, between and after others; edges twice; 66 rows."""
    pytest.importorskip("triton")
    import fastgt.kernels.attention_windows as kernels
    from fastgt.kernels.configs import WindowTile

    monkeypatch.setattr(kernels, "window_tile", lambda *args: WindowTile(columns, 4, 1))
    rows, cols = 66, 75
    full = torch.arange(0, cols, 2)  # 38 of them: two tiles of 16 and the rest
    every = torch.stack([full.repeat(rows), torch.arange(rows).repeat_interleave(len(full))])
    generator = torch.Generator().manual_seed(0)
    some = torch.stack([torch.randint(n, (90,), generator=generator) for n in (cols, rows)])
    if plan.startswith("graphs"):
        some = some[:, :0]
    index = torch.cat([every, some], 1).to(DEVICE)
    options = {"heads": 1, "group": 2, "d": 5, "dv": 3, "clamped": True, "eps": 0.1}
    x = case(0, rows, index.shape[1], cols=cols, plan=plan, **options)
    x = x.onto(index)
    assert x.graph.settled.path == plan.split()[0]
    all_close(evaluate(x, "triton"), evaluate(x, "reference"))


@pytest.mark.parametrize("turned", [False, True], ids=["row", "column"])
@pytest.mark.parametrize("impl", FAST_WAYS)
def test_a_hub_is_like_any_other_node(impl, turned):
    hub = 5000 if impl == "cpp" or DEVICE == "cuda" else 120
    x = degrees_case([2, hub, 0, 1, 3], 7, dtype=FP32, eps=1e-6)
    if turned:
        y = case(1, 7, x.graph.num_edges, cols=5, dtype=FP32, eps=1e-6)
        x = y.onto(x.edge_index.flip(0))
    laws.as_accurate_as_eager(ATTENTION, impl, x, of_outputs=3.0)


@pytest.mark.parametrize("impl", FAST_WAYS)
def test_index_width_does_not_change_a_bit(impl):
    x = case(3, 12, 40, kind="hub", dtype=FP32)
    laws.index_width_does_not_change_a_bit(ATTENTION, impl, x)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
@pytest.mark.parametrize("impl", FAST_WAYS)
def test_strides_do_not_change_a_bit(impl, dtype, layout):
    x = case(4, 9, 30, heads=2, group=2, d=16, dv=8, dtype=dtype)
    laws.strides_do_not_change_a_bit(ATTENTION, impl, laws.laid(x, layout))


@pytest.mark.parametrize("impl", FAST)
def test_slices_of_one_projection(impl):
    """The usual [N, 3, H, D] projection, and one whose slices start off any alignment."""
    generator = torch.Generator().manual_seed(0)
    for pad in (0, 1):
        packed = torch.randn(8, 3 * 2 * 8 + pad, generator=generator, dtype=BF16).to(DEVICE)
        q, k, v = packed[:, pad:].unflatten(1, (3, 2, 8)).unbind(1)
        graph = random_graph(0, 8, 25, device=DEVICE)
        found = neighborhood_attention(q, k, v, graph, impl=impl)
        plain = (t.contiguous() for t in (q, k, v))
        assert torch.equal(found, neighborhood_attention(*plain, graph, impl=impl))


@pytest.mark.parametrize("dtype", [FP32, FP64], ids=str)
@pytest.mark.parametrize("impl", ["reference", *FAST_WAYS])
def test_inputs_are_left_alone_and_outputs_alias_nothing(impl, dtype):
    x = case(5, 8, 30, dtype=dtype, heads=1, d=4, dv=4, clamped=True, eps=1e-6)
    laws.inputs_are_left_alone_and_outputs_alias_nothing(ATTENTION, impl, x)


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
@pytest.mark.parametrize("impl", FAST_WAYS)
def test_bitwise_repeatable(impl, dtype):
    interpreted = impl != "cpp" and DEVICE == "cpu"
    large = {"kind": "hub", "heads": 1}
    x = case(1, 16, 60, dtype=dtype) if interpreted else case(1, 100, 2000, dtype=dtype, **large)
    laws.the_same_bits_every_time(ATTENTION, impl, x, 2 if interpreted else 100)


@pytest.mark.skipif(DEVICE != "cpu", reason="threads are the CPU's")
def test_threads_do_not_change_a_bit():
    x = case(1, 3000, 40_000, kind="power_law", dtype=FP32, d=16, dv=16)
    laws.threads_do_not_change_a_bit(ATTENTION, x)


@pytest.mark.skipif(DEVICE == "cpu", reason="the interpreter's memory is not the kernel's")
def test_memory_of_the_kernels():
    check_memory("triton")


@pytest.mark.skipif(DEVICE != "cpu", reason="runs on CPU tensors")
def test_memory_of_the_cpu_path():
    check_memory("cpp")


def check_memory(impl):
    """Of large graphs; small ones may take up to 2^16 edges and nodes, heads counted, at once."""
    n, edges, h, d = 500, 140_000, 4, 64
    x = case(0, n, edges, heads=h, d=d, dv=d, dtype=FP32)
    evaluate(x, impl)  # the column walk and other first-time costs
    word, wide = 4, edges * h * d * 4
    # o, three gradients and their float32 copies; logits, weights, dbias and a few [E] vectors
    allowed = word * (10 * n * h * d + 6 * edges * h)
    assert allowed < wide / 4
    device = torch.device(DEVICE)
    assert peak_extra_memory(lambda: evaluate(x, impl), device) <= allowed
    assert peak_extra_memory(lambda: evaluate(x, "reference"), device) > wide


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
    n, e, h, d = 3 * 2**30, 5 * 2**30, 8, 32
    graph = huge_graph(n, e)
    q, k, v = (torch.empty(n, h, d, device="meta", requires_grad=True) for _ in range(3))
    bias = torch.empty(e, h, device="meta", requires_grad=True)
    request = AuxRequest(lse=True, weights=True)
    o, (lse, weights, _) = neighborhood_attention(
        q, k, v, graph, edge_bias=bias, return_aux=request, impl="triton"
    )
    assert [t.shape for t in (o, lse, weights)] == [(n, h, d), (n, h), (e, h)]
    grads = torch.autograd.grad((o, lse), (q, k, v, bias), (o, lse))
    assert [g.shape for g in grads] == [(n, h, d)] * 3 + [(e, h)]


@pytest.mark.parametrize("dtype", [FP16, FP64], ids=str)
@pytest.mark.parametrize(("heads", "d"), [(1, 1), (8, 16), (64, 256), (1024, 256)])
def test_grids_stay_within_the_limits(heads, d, dtype, monkeypatch):
    """Rows are the first axis, 2^31 - 1 long; the second one ends at 65,535."""
    pytest.importorskip("triton")
    import fastgt.kernels.attention as kernels
    import fastgt.kernels.attention_backward as backward

    grids = []

    class Recorder:
        def __getitem__(self, grid):
            grids.append(grid)
            return lambda *args, **kwargs: None

    for module in (kernels, backward):
        for name in list(vars(module)):
            if name.endswith("_kernel"):
                monkeypatch.setattr(module, name, Recorder())
    n = 2**31 - 1
    q = torch.empty(n, heads, d, dtype=dtype, device="meta")
    lse = torch.empty(n, heads, device="meta")
    ptr = torch.empty(n + 1, dtype=torch.int64, device="meta")
    logit = Logit(1.0, -math.inf, math.inf, 0.0)
    call = Inputs(q, q, q), logit, EdgeTerms(), HeadMask(), Dropout(), Switches()
    upstream, saved = Upstream(q, lse, None, None), Saved(lse, None)
    needs = (*(True,) * 3, *[False] * 6)
    for edges in (0, n, 40 * n):
        e = torch.empty(edges, dtype=torch.int64, device="meta")
        walk = ptr, e, e
        kernels.attention_fwd(walk, *call)
        backward.attention_bwd(walk, walk, needs, upstream, saved, *call)
    assert len(grids) >= 9
    for grid in grids:
        assert 0 < grid[0] < 2**31
        assert 0 < grid[1] <= 65535


@pytest.mark.parametrize(
    ("edges", "layout", "dtype"),
    [(9, "contiguous", FP32), (9, "reversed", BF16), (0, "contiguous", FP32)],
    ids=["plain", "strided", "empty"],
)
@pytest.mark.parametrize("path", ["cpp", "gather", "windows"] if DEVICE == "cpu" else ["gather"])
def test_opcheck(path, edges, layout, dtype):
    x = case(0, 4, edges, cols=3, heads=1, group=2, d=4, dv=2, dtype=dtype, layout=layout)
    x = replace(x, k=arrange(x.k, layout))
    height = 16 if path == "windows" else 0
    rows, columns = (x.graph.row_ptr, x.graph.col, x.graph.edge), list(x.graph.columns)
    if path != "cpp":
        plan = x.graph.plan(path, height=height or None).settled
        rows, columns = x.graph.row_walk(plan), list(x.graph.column_walk(plan))
    flat = op_arguments(
        Inputs(x.q, x.k, x.v),
        terms=EdgeTerms(x.bias),
        logit=Logit(0.5, -1.0, 1.0, 1e-6),
        switches=Switches(make_weights=layout == "contiguous"),
    )
    forward = path, height, list(rows), *flat
    torch.library.opcheck(torch.ops.fastgt.attention_fwd.default, forward)
    o, lse, *_ = torch.ops.fastgt.attention_fwd(*forward)
    upstream = Upstream(x.do, x.dlse if layout == "contiguous" else None, None, None)
    saved = Saved(lse, o if height else None)
    for needs in ((True,) * 4, (False, True, False, True)):
        walks = list(rows), columns, (*needs, *[False] * 5)
        arguments = path, height, *walks, *upstream, *saved, *flat
        torch.library.opcheck(torch.ops.fastgt.attention_bwd.default, arguments)


@pytest.mark.parametrize(
    "options",
    [{}, {"logit_clamp": 5.0, "denominator_eps": 1e-6, "scale": 0.3, "weights": True}],
    ids=["plain", "options"],
)
@pytest.mark.parametrize("impl", FAST)
def test_compiles_whole_and_once(impl, options):
    """One compilation serves graphs of every size, forward and backward."""
    torch._dynamo.reset()
    options = dict(options)
    options["return_aux"] = AuxRequest(lse=True, weights=options.pop("weights", False))
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(neighborhood_attention, fullgraph=True, dynamic=True, backend=counter)
    counts = []
    # no two sizes are equal, nor N + 1 and another: the compiler would take them for one number
    for seed, (n, e) in enumerate([(11, 20), (9, 31), (13, 15)]):
        x = case(seed, n, e, heads=2, d=8, dtype=FP32)
        leaves = [t.detach().requires_grad_() for t in (x.q, x.k, x.v, x.bias)]
        found = []
        for f in (compiled, neighborhood_attention):
            o, aux = f(*leaves[:3], x.graph, edge_bias=leaves[3], impl=impl, **options)
            y = [o, *(t for t in aux if t is not None)]
            found.append([*y, *torch.autograd.grad(y[:2], leaves, (x.do, x.dlse))])
        for a, b in zip(*found, strict=True):
            assert torch.equal(a, b)
        counts.append(counter.frame_count)
    assert counts[0] > 0
    assert counts == counts[:1] * 3


@pytest.mark.parametrize("impl", IMPLS)
def test_autocast_casts_the_inputs(impl):
    laws.autocast_casts_the_inputs(ATTENTION, impl, case(3, 8, 30, dtype=FP32))


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
@pytest.mark.parametrize("impl", FAST)
def test_a_copied_graph_gives_the_same(impl, how):
    x = case(3, 8, 30, dtype=FP32)
    first = evaluate(x, impl)  # the column walk is cached from here on
    if how == "deepcopy":
        graph = copy.deepcopy(x.graph)
    elif how == "pickle":
        graph = pickle.loads(pickle.dumps(x.graph))
    else:
        file = io.BytesIO()
        torch.save(x.graph, file)
        file.seek(0)
        graph = torch.load(file)
    assert graph.col is not x.graph.col
    assert graph.col.data_ptr() != x.graph.col.data_ptr()
    same_bits(evaluate(replace(x, graph=graph), impl), first)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("impl", FAST)
def test_checkpointing(impl, reentrant):
    x = case(3, 8, 30, dtype=FP32)
    laws.checkpointing_changes_no_gradient(ATTENTION, impl, x, reentrant=reentrant)


@pytest.mark.parametrize("axis", [0, 1, 2], ids=["node", "head", "channel"])
def test_addresses_beyond_two_to_the_31(tmp_path, axis):
    """Strides reach past 2^31 elements; the memory is a sparse file, so nothing of it is paid.

    Every base lies so far into the file that a wrapped offset would read zeros, not crash.
    """
    size = 2**33 + 2**20
    if DEVICE == "cuda":
        room = torch.zeros(size, dtype=FP16, device=DEVICE)
    else:
        room = torch.from_file(str(tmp_path / "sparse"), shared=True, size=size, dtype=FP16)
    x = case(2, 5, 14, heads=4, d=4, dv=4, dtype=FP16)
    # odd, or the kernel multiplies by an even factor of it at the very end, in 64 bits
    far, place, laid = 3 * 2**28 + 1, 2**31, {}
    for name in ("q", "k", "v", "do", "bias"):
        tensor = getattr(x, name)
        stride = [far if i == axis else n for i, n in enumerate(tensor.stride())]
        stride = (2**28 + 1, far) if name == "bias" else stride
        laid[name] = room.as_strided(tensor.shape, stride, place).copy_(tensor)
        place += 128
    if axis < 2:  # float32, half as many elements in the same file
        stride = (far, 1) if axis == 0 else (1, far)
        place = 2**32 - (x.dlse.shape[axis] - 1) * far + 2**16
        laid["dlse"] = room.view(FP32).as_strided(x.dlse.shape, stride, place).copy_(x.dlse)
    for impl in FAST:
        same_bits(evaluate(replace(x, **laid), impl), evaluate(x, impl))


@pytest.mark.skipif(DEVICE != "cpu", reason="60 GB, of which only the interpreter touches little")
def test_outputs_beyond_two_to_the_31(tmp_path):
    """Rows and edges of H = 2^30 heads, of which the one program that runs computes two."""
    pytest.importorskip("triton")
    import fastgt.kernels.attention as kernels
    import fastgt.kernels.attention_backward as backward
    from fastgt.kernels import buckets, edge_tile
    from fastgt.kernels.loads import rows_of

    x = case(3, 4, 4, heads=2, d=4, dv=4, dtype=FP32, biased=False, scale=0.5)
    wanted = evaluate(x, "triton")
    wanted["dbias"] = evaluate(replace(x, bias=torch.zeros(4, 2)), "triton")["dbias"]
    heads, base = 2**30, 2**31
    room = torch.from_file(str(tmp_path / "sparse"), shared=True, size=15 * 2**30, dtype=FP32)
    lse, weights, dbias, wgamma, norm, *wide = (room[base + 64 * i :] for i in range(9))
    o, dq, dk, dv = (t.as_strided((4, 2, 4), (4 * heads, 4, 1)) for t in wide)
    graph, columns = x.graph, x.graph.columns
    clamp = 0.5, -math.inf, math.inf
    sizes = {"H": heads, "GROUP": 1, "D": 4, "DV": 4, "C": 1, "CLAMP": False}
    sizes |= {"BLOCK_R": 4, "BLOCK_E": 4, "BLOCK_H": 2, "BLOCK_D": 4, "BLOCK_DV": 4, "BLOCK_C": 1}
    tile = edge_tile.Tile(**sizes, TERMS=False, SHARED=False, ALIGN=1, EDGE_ALIGN=1, WIDE=False)
    inputs = edge_tile.Operands(*map(rows_of, (x.q, x.k, x.v, None)))
    rows = buckets.Walk(graph.row_ptr, graph.col, graph.edge, None, None, None)
    columns = buckets.Walk(columns.ptr, columns.row, columns.edge, None, None, None)
    counts, plain = (4, 0, 0), (edge_tile.Drop(), 0, None, tile)  # nothing dropped, none masked
    outputs = kernels.Outputs(o, lse, norm, None, None, None, None, None)
    kernels._attention_fwd_kernel[1, 1](
        inputs, None, outputs, rows, *counts, *clamp, -math.inf, *plain
    )
    inputs_of_weights = inputs._replace(v=None), None, norm, weights
    kernels._attention_weights_kernel[1, 1](*inputs_of_weights, rows, *counts, *clamp, None, tile)
    up = backward.Received(rows_of(x.do), rows_of(x.dlse), None, None)
    grads = backward.RowGrads(dq, wgamma, None, None, None, None)
    backward._attention_bwd_dq_kernel[1, 1](
        inputs, None, up, lse, grads, rows, *counts, *clamp, -math.inf, *plain
    )
    grads = backward.ColumnGrads(dk, dv, dbias, *[None] * 7)
    backward._attention_bwd_dkv_kernel[1, 1](
        inputs, None, up, lse, wgamma, grads, columns, *counts, 0, *clamp, *plain, ADD=False
    )
    found = {"o": o, "dq": dq, "dk": dk, "dv": dv}
    for name, far in (("lse", lse), ("weights", weights), ("dbias", dbias)):
        found[name] = far.as_strided((4, 2), (heads, 1))
    all_close(found, wanted, 1e-6)


@pytest.mark.skipif(DEVICE != "cpu", reason="8 GB, of which only the interpreter touches little")
def test_the_last_tile_of_two_to_the_31_edges(tmp_path):
    """Its lanes reach past 2^31 - 1, the last slot of int32 indices."""
    edges = 2**31 - 1
    room = torch.from_file(str(tmp_path / "sparse"), shared=True, size=edges, dtype=torch.int32)
    x = case(3, 3, 5, dtype=FP32, biased=False)
    ptr, col = x.graph.row_ptr, x.graph.col
    flat = op_arguments(Inputs(x.q, x.k, x.v))
    wanted = torch.ops.fastgt.attention_fwd("gather", 0, [ptr, col, col], *flat)
    room[-5:] = col
    found = torch.ops.fastgt.attention_fwd("gather", 0, [ptr + (edges - 5), room, room], *flat)
    assert [x is not None for x in found] == [True] * 2 + [False] * 3
    for a, b in zip(found[:2], wanted[:2], strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("layout", LAYOUTS[1:4])
@pytest.mark.parametrize("impl", FAST)
def test_one_tensor_in_other_strides_does_not_change_a_bit(impl, layout):
    x = case(4, 7, 20, heads=2, d=8, dv=8, dtype=BF16)
    laws.one_tensor_in_other_strides_does_not_change_a_bit(ATTENTION, impl, x, [layout])


@pytest.mark.parametrize("impl", IMPLS)
def test_autocast_casts_the_other_half_too(impl):
    laws.autocast_casts_the_other_half_too(ATTENTION, impl, case(3, 8, 30, dtype=FP16))


@pytest.mark.parametrize("impl", FAST)
def test_inference_never_sorts_the_column_walk(impl):
    laws.inference_never_sorts_the_column_walk(ATTENTION, impl, case(0, 5, 12, dtype=FP32))


def test_compiles_where_dynamo_cannot_ask_for_autocast(monkeypatch):
    """As on torch 2.11, whose Dynamo does not know is_autocast_available."""
    torch._dynamo.reset()
    untraceable = torch._dynamo.disable(torch.amp.is_autocast_available)
    monkeypatch.setattr(torch.amp, "is_autocast_available", untraceable)
    x = case(0, 5, 12, dtype=FP32)
    compiled = torch.compile(neighborhood_attention, fullgraph=True, backend="aot_eager")
    for enabled in (False, True):
        with torch.autocast(DEVICE, BF16, enabled=enabled):
            found = compiled(x.q, x.k, x.v, x.graph)
            assert torch.equal(found, neighborhood_attention(x.q, x.k, x.v, x.graph))
            assert found.dtype == (BF16 if enabled else FP32)


def test_compiles_once_for_any_seed_of_dropout():
    torch._dynamo.reset()
    x, counter = case(0, 5, 12, dtype=FP32), CompileCounterWithBackend("aot_eager")

    def f(seed):
        return neighborhood_attention(x.q, x.k, x.v, x.graph, dropout_p=0.5, dropout_seed=seed)

    compiled = torch.compile(f, fullgraph=True, dynamic=True, backend=counter)
    counts = []
    for seed in (3, 4, 2**40, -5):
        assert torch.equal(compiled(seed), f(seed))
        counts.append(counter.frame_count)
    assert counts == counts[:1] * 4


@pytest.mark.parametrize("impl", FAST)
def test_compiles_with_one_tensor_in_all_places(impl):
    torch._dynamo.reset()
    x = case(0, 5, 12, dtype=FP32)
    found = []

    def f(t):
        return neighborhood_attention(t, t, t, x.graph, impl=impl)

    for g in (torch.compile(f, fullgraph=True, backend="aot_eager"), f):
        t = x.q.detach().requires_grad_()
        o = g(t)
        found.append([o, *torch.autograd.grad(o, t, x.do)])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b)  # the three gradients are added in any order


@pytest.mark.skipif(DEVICE != "cpu", reason="the CPU path's lengths")
def test_rows_around_the_lengths_of_blocks_and_chunks():
    lengths = [0, 1, 63, 64, 65, 0, 129, 255, 256, 257, 0]
    x = degrees_case(lengths, 5, heads=3, group=2, eps=1e-6)
    all_close(evaluate(x, "cpp"), evaluate(x, "reference"))


@pytest.mark.parametrize(
    ("edges", "seed", "turned"), [(300_000, 0, False), (1_000_000, 1, True)], ids=["row", "column"]
)
@pytest.mark.parametrize("terms", ["", "gate scores"])
def test_sums_over_a_huge_hub_are_accurate(edges, seed, turned, terms):
    shape = {"rows": 1000, "cols": 3} if turned else {"rows": 3, "cols": 1000}
    x = case(seed, edges=edges, heads=1, dtype=FP32, biased=False, terms=terms, **shape)
    index = x.edge_index.clone()
    index[0 if turned else 1] = 0
    x = x.onto(index)
    laws.as_accurate_as_eager(ATTENTION, FAST[0], x)


@pytest.mark.parametrize("plan", PLANS)
def test_nothing_waits_for_the_device(plan):
    """Launchers allocate and launch: no value comes back, so a CUDA graph can capture them."""
    pytest.importorskip("triton")
    from fastgt.ops import attention_launch as ops
    from fastgt.ops.head_mask import node_mask

    x = case(1, 20, 90, heads=2, group=2, d=8, dv=8, dtype=FP32, plan=plan)
    chosen = x.graph.plan_for(8, FP32)
    rows, columns = x.graph.row_walk(chosen), x.graph.column_walk(chosen)
    path, height, _ = chosen
    gate = torch.tensor([0.0, 1.0, 0.0, 0.0], device=DEVICE)
    with Calls() as calls:
        for active in (None, node_mask(gate, x.graph).rows):
            flat = op_arguments(
                Inputs(x.q, x.k, x.v),
                terms=EdgeTerms(x.bias),
                mask=HeadMask(active, active),
                logit=Logit(0.3, -1.0, 1.0, 1e-6),
                switches=Switches(make_weights=True),
            )
            o, lse, *_ = ops._launch_fwd(path, height, rows, *flat)
            from_forward = *Upstream(x.do, x.dlse, None, None), *Saved(lse, o)
            needs = [True] * 4 + [False] * 5
            ops._launch_bwd(path, height, rows, columns, needs, *from_forward, *flat)
    # the interpreter copies arguments and results; of the launchers only allocations remain
    assert not {"_local_scalar_dense", "nonzero", "item", "unique", "sort"} & calls.names
    assert "new_empty" in calls.names


class Calls(TorchDispatchMode):
    """The names of the operators that ran."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.add(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


@pytest.mark.skipif(DEVICE == "cpu", reason="captures are CUDA's")
@pytest.mark.parametrize("plan", PLANS)
def test_a_cuda_graph_replays_with_new_data(plan):
    x = case(1, 40, 300, kind="hub", heads=2, d=16, dv=16, dtype=FP32, plan=plan)
    x.graph.plan_for(16, FP32)
    names = ("q", "k", "v", "bias", "do", "dlse")
    still = replace(x, **{name: getattr(x, name).clone() for name in names})
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        evaluate(still, "triton")
    torch.cuda.current_stream().wait_stream(side)
    captured = torch.cuda.CUDAGraph()
    with torch.cuda.graph(captured):
        found = evaluate(still, "triton")
    for seed in (2, 3):
        y = case(seed, 40, 300, heads=2, d=16, dv=16, dtype=FP32)
        for name in names:
            getattr(still, name).copy_(getattr(y, name))
        captured.replay()
        same_bits(found, evaluate(replace(y, graph=x.graph), "triton"))


@pytest.mark.skipif(DEVICE == "cpu", reason="streams are CUDA's")
@pytest.mark.parametrize("plan", PLANS)
def test_a_second_stream_gives_the_same_bits(plan):
    x = case(1, 40, 300, kind="hub", heads=2, d=16, dv=16, dtype=FP32, plan=plan)
    first = evaluate(x, "triton")
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        second = evaluate(x, "triton")
    torch.cuda.current_stream().wait_stream(side)
    same_bits(second, first)


@pytest.mark.parametrize("impl", FAST)
def test_lazily_negated_tensors_and_a_default_device(impl):
    """What PyTorch's dispatcher resolves must not reach a kernel as it is stored."""
    x = case(1, 6, 20, heads=2, d=8, dv=8, biased=False)
    parts = torch.randn(x.q.shape, dtype=torch.complex128, device=DEVICE)
    negated = parts.conj().imag
    assert negated.is_neg()
    found = evaluate(replace(x, q=negated, do=negated), impl)
    plain = negated.resolve_neg().clone()
    all_close(found, evaluate(replace(x, q=plain, do=plain), impl))
    with torch.device("meta"):
        same = attend(x, impl)
    for a, b in zip(same, attend(x, impl), strict=True):
        assert torch.equal(a, b)
