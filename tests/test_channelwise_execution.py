"""channelwise_attention: how it runs, whatever the strides, threads, tiles and compilers."""

from dataclasses import replace

import laws
import pytest
import torch
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
    close,
    same_bits,
)
from channelwise_cases import (
    ALL,
    CHANNELWISE,
    PLANES,
    WAYS,
    attend,
    case,
    evaluate,
    loops,
    shared,
    walks,
)
from torch._dynamo.testing import CompileCounterWithBackend

from fastgt import AuxRequest, Graph, channelwise_attention, reference
from fastgt.bench.memory import peak_extra_memory
from fastgt.contract import ChannelwiseLogit, ChannelwiseUpstream, HeadMask
from fastgt.ops.channelwise_attention import _launch_bwd, _launch_fwd
from fastgt.ops.head_mask import node_mask
from fastgt.prepared import ColumnWalk, Prepared
from fastgt.testing import with_buckets


@pytest.mark.parametrize("layout", [*LAYOUTS, *PLANES])
@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
@pytest.mark.parametrize("impl", FAST)
def test_strides_do_not_change_a_bit(impl, dtype, layout):
    x = case(4, 8, 24, dtype=dtype, channels=(3, 8), layout=layout)
    laws.strides_do_not_change_a_bit(CHANNELWISE, impl, x)


@pytest.mark.parametrize("impl", FAST)
def test_one_tensor_in_other_strides_does_not_change_a_bit(impl):
    x, layouts = case(4, 7, 20, channels=(2, 8), dtype=BF16), ["reversed", "sliced"]
    laws.one_tensor_in_other_strides_does_not_change_a_bit(CHANNELWISE, impl, x, layouts)


@pytest.mark.parametrize("layout", PLANES)
@pytest.mark.parametrize("impl", FAST)
def test_shared_planes_receive_the_sum_of_their_gradients(impl, layout):
    x = case(4, 7, 20, channels=(3, 4))
    dim = 1 if layout == "planes of heads" else 2
    leaf = x.logits.narrow(dim, 0, 1).clone().requires_grad_()
    o, lse, _ = attend(replace(x, logits=leaf.expand_as(x.logits)), impl)
    (found,) = torch.autograd.grad((o, lse), leaf, (x.do, x.dlse))
    expected = loops(replace(x, logits=shared(x.logits, layout)))["dlogits"]
    close(found, expected.sum(dim, keepdim=True))


@pytest.mark.parametrize("dtype", [FP32, FP64], ids=str)
@pytest.mark.parametrize("impl", ALL)
def test_inputs_are_left_alone_and_outputs_alias_nothing(impl, dtype):
    x = case(5, 7, 24, dtype=dtype, channels=(1,), clamped=True, eps=1e-6)
    laws.inputs_are_left_alone_and_outputs_alias_nothing(CHANNELWISE, impl, x)


def test_the_output_may_be_changed_in_place():
    """As in `out += residual`: the backward does not read it."""
    x = case(5, 7, 24, dtype=FP32)
    logits = x.logits.requires_grad_()
    o = channelwise_attention(logits, x.v, x.graph)
    expected = torch.autograd.grad(o, logits, x.do, retain_graph=True)[0]
    o.mul_(1.0)
    assert torch.equal(torch.autograd.grad(o, logits, x.do)[0], expected)


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
@pytest.mark.parametrize("impl", WAYS)
def test_bitwise_repeatable(impl, dtype):
    interpreted = impl != "cpp" and DEVICE == "cpu"
    n, edges = (8, 40) if interpreted else (100, 2000)
    x = case(1, n, edges, kind="hub", dtype=dtype)
    laws.the_same_bits_every_time(CHANNELWISE, impl, x, 2 if interpreted else 20)


@pytest.mark.skipif(DEVICE != "cpu", reason="threads are the CPU's")
def test_threads_do_not_change_a_bit():
    x = case(1, 1000, 20_000, kind="power_law", dtype=FP32, channels=(24,))
    laws.threads_do_not_change_a_bit(CHANNELWISE, x)


@pytest.mark.skipif(DEVICE != "cpu", reason="channels go together on a CPU")
@pytest.mark.parametrize("dtype", [FP32, FP64, BF16], ids=str)
def test_channels_that_go_together_do_not_change_a_bit(dtype):
    """Several vectors of channels, one vector, and a part of one."""
    x = case(5, 12, 300, kind="hub", dtype=dtype, channels=(150,), isolated=2, eps=1e-6)
    whole = evaluate(x, "cpp")
    for some in (slice(0, 64), slice(64, 128), slice(128, 150), slice(149, 150), slice(3, 20)):
        part = x.having(**{name: t[:, some] for name, t in x.tensors().items()})
        same_bits(evaluate(part, "cpp"), {name: t[:, some] for name, t in whole.items()})


@pytest.mark.parametrize("turned", [False, True], ids=["row", "column"])
def test_sums_over_a_huge_hub_are_accurate(turned):
    edges = 100_000
    shape = {"rows": 500, "cols": 3} if turned else {"rows": 3, "cols": 500}
    x = case(0, edges=edges, dtype=FP32, channels=(4,), **shape)
    index = x.edge_index.clone()
    index[0 if turned else 1] = 0
    laws.as_accurate_as_eager(CHANNELWISE, FAST[0], x.onto(index))


def test_a_huge_hub_of_equal_terms_does_not_drift(compiled_kernels):
    """Added one after the other, 200,000 times 0.1 is off by 2e-3 in float32."""
    edges = 200_000
    graph = Graph.from_edge_index(torch.zeros(2, edges, dtype=torch.int64, device=DEVICE), 1)
    logits = torch.zeros(edges, 1, device=DEVICE)
    v = torch.full((1, 1), 0.1, device=DEVICE)
    o = channelwise_attention(logits, v.requires_grad_(), graph)
    (dv,) = torch.autograd.grad(o, v, v.detach())
    torch.testing.assert_close(o, v, rtol=5e-4, atol=0.0)
    torch.testing.assert_close(dv, v, rtol=5e-4, atol=0.0)


@pytest.mark.parametrize("turned", [False, True], ids=["row", "column"])
def test_a_hub_beyond_one_segment(turned):
    """Rows and columns of few edges, of some, of segments that are combined in several steps."""
    pytest.importorskip("triton")
    few, segment = 4, 5
    degrees = torch.tensor([2, 50, 0, 1, 5, 9, 16])
    target = torch.arange(7).repeat_interleave(degrees)
    generator = torch.Generator().manual_seed(0)
    source = torch.randint(5, target.shape, generator=generator)
    index = torch.stack([source, target])[:, torch.randperm(len(target), generator=generator)]
    index = index.flip(0) if turned else index
    x = case(0, 5 if turned else 7, len(target), cols=7 if turned else 5, eps=1e-3, channels=(5,))
    x = x.onto(index.to(DEVICE))
    x = replace(x, graph=with_buckets(x.graph, few=few, segment=segment))
    all_close(evaluate(x, "triton"), loops(x))


@pytest.mark.parametrize("tile", [(1, 2, 1), (4, 4, 1), (2, 16, 4), (16, 1, 2)], ids=str)
@pytest.mark.parametrize("plan", ["gather", "buckets"])
def test_any_tile_gives_the_same(monkeypatch, tile, plan):
    """Degrees at and around every block size, and rows beyond a block of rows."""
    pytest.importorskip("triton")
    from fastgt.kernels import channelwise_tile
    from fastgt.kernels.configs import Tile

    chosen = Tile(*tile, num_warps=4)
    monkeypatch.setattr(channelwise_tile, "attention_tile", lambda *args: chosen)
    monkeypatch.setattr(channelwise_tile, "_WIDEST", 4)
    target = torch.arange(6).repeat_interleave(torch.tensor([0, 1, 3, 4, 5, 17]))
    source = torch.randint(5, target.shape, generator=torch.Generator().manual_seed(0))
    x = case(0, 6, len(target), cols=5, clamped=True, channels=(6,), dtype=FP64, plan=plan)
    x = x.onto(torch.stack([source, target]).to(DEVICE))
    all_close(evaluate(x, "triton"), loops(x))


@pytest.mark.skipif(DEVICE == "cpu", reason="the interpreter's memory is not the kernel's")
def test_memory_of_the_kernels():
    check_memory("triton")


@pytest.mark.skipif(DEVICE != "cpu", reason="runs on CPU tensors")
@pytest.mark.parametrize("kind", ["uniform", "hub"])
def test_memory_of_the_cpu_path(kind):
    check_memory("cpp", kind)


def check_memory(impl, kind="uniform"):
    """Outputs and gradients, and what is O(N C + E)."""
    n, edges, channels = 500, 100_000, 64
    x = case(0, n, edges, channels=(channels,), dtype=FP32, kind=kind)
    leaves = [t.detach().requires_grad_() for t in (x.logits, x.v, x.edge_value)]
    device, wide = torch.device(DEVICE), 4 * edges * channels
    attention = {"graph": x.graph, "edge_value": leaves[2], "impl": impl}

    def forward():
        with torch.no_grad():
            return channelwise_attention(*leaves[:2], **attention)

    def both(impl):
        o = channelwise_attention(*leaves[:2], **attention | {"impl": impl})
        return torch.autograd.grad(o, leaves, x.do)

    both(impl)  # the column walk and other first-time costs
    small = 4 * (12 * n * channels + 16 * edges) + 2**24  # and what stays in the cache
    assert small < wide
    assert peak_extra_memory(forward, device) <= small
    assert peak_extra_memory(lambda: both(impl), device) <= 2 * wide + small
    if kind == "uniform":
        assert peak_extra_memory(lambda: both("reference"), device) > 6 * wide


@pytest.mark.parametrize("impl", FAST)
def test_compiles_whole_and_once(impl):
    """One compilation serves graphs of every size, forward and backward."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(channelwise_attention, fullgraph=True, dynamic=True, backend=counter)
    counts = []
    for seed, (n, e) in enumerate([(11, 20), (9, 31), (13, 15)]):
        x = case(seed, n, e, dtype=FP32, channels=(2, 3))
        leaves = [t.detach().requires_grad_() for t in (x.logits, x.v, x.edge_value)]
        found = []
        for f in (compiled, channelwise_attention):
            y = f(*leaves[:2], x.graph, edge_value=leaves[2], logit_clamp=5.0, denominator_eps=1e-6,
                  return_aux=AuxRequest(lse=True, weights=True), impl=impl)  # fmt: skip
            o, lse, weights = y[0], y[1].lse, y[1].weights
            grads = torch.autograd.grad((o, lse), leaves, (x.do, x.dlse))
            found.append([o, lse, weights, *grads])
        for a, b in zip(*found, strict=True):
            assert torch.equal(a, b)
        counts.append(counter.frame_count)
    assert counts[0] > 0
    assert counts == counts[:1] * 3


@pytest.mark.parametrize("impl", FAST)
def test_compiles_with_one_tensor_in_all_places(impl):
    torch._dynamo.reset()
    x = case(0, 6, 6, dtype=FP32)

    def f(t):
        return channelwise_attention(t, t, x.graph, edge_value=t, impl=impl)

    found = []
    for g in (torch.compile(f, fullgraph=True, backend="aot_eager"), f):
        t = x.logits.detach().requires_grad_()
        o = g(t)
        found.append([o, *torch.autograd.grad(o, t, x.do)])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(
    ("edges", "layout", "terms"),
    [(9, "contiguous", "both"), (9, "reversed", "v"), (0, "planes of heads", "edge_value")],
    ids=["plain", "strided", "empty"],
)
@pytest.mark.parametrize("impl", FAST)
def test_opcheck(impl, edges, layout, terms):
    x = case(0, 4, edges, cols=3, channels=(2, 2), dtype=FP32, layout=layout, terms=terms)
    rows, columns = map(list, walks(x.graph, impl))
    mask, logit = HeadMask(None, None), ChannelwiseLogit(-1.0, 1.0, 1e-6)
    if layout == "reversed":
        active = torch.rand(4, 2, device=DEVICE) < 0.6
        mask = HeadMask(active, active[:3])
    given = x.logits, x.v, x.edge_value, *mask
    forward = torch.ops.fastgt.channelwise_attention_fwd.default
    *_, stat = forward(impl, *given, rows, *logit, True, False)
    for results in ((True, layout == "contiguous"), (False, False)):
        torch.library.opcheck(forward, (impl, *given, rows, *logit, *results))
    upstream = ChannelwiseUpstream(x.do, x.dlse if layout == "contiguous" else None, stat)
    for needs in ((True, x.v is not None, x.edge_value is not None), (True, False, False)):
        arguments = impl, *upstream, *given, rows, columns, *logit, *needs
        torch.library.opcheck(torch.ops.fastgt.channelwise_attention_bwd.default, arguments)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("impl", FAST)
def test_checkpointing(impl, reentrant):
    x = case(3, 7, 24, dtype=FP32)
    laws.checkpointing_changes_no_gradient(CHANNELWISE, impl, x, reentrant=reentrant)


@pytest.mark.parametrize("impl", IMPLS)
def test_autocast_casts_the_inputs(impl):
    laws.autocast_casts_the_inputs(CHANNELWISE, impl, case(3, 7, 24, dtype=FP32))


@pytest.mark.parametrize("impl", IMPLS)
def test_autocast_casts_the_other_half_too(impl):
    laws.autocast_casts_the_other_half_too(CHANNELWISE, impl, case(3, 7, 24, dtype=FP16))


@pytest.mark.parametrize("impl", FAST)
def test_index_width_does_not_change_a_bit(impl):
    x = case(3, 8, 24, kind="hub", dtype=FP32)
    laws.index_width_does_not_change_a_bit(CHANNELWISE, impl, x)


@pytest.mark.parametrize("impl", FAST)
def test_a_graph_planned_for_windows_is_gathered(impl):
    x = case(3, 8, 30)
    same_bits(evaluate(replace(x, graph=x.graph.plan("windows")), impl), evaluate(x, impl))


def test_shapes_beyond_two_to_the_31_on_meta_tensors():
    n, e, c = 3 * 2**26, 5 * 2**26, 64

    def index(size):
        return torch.empty(size, dtype=torch.int64, device="meta")

    walk = ColumnWalk(index(n + 1), *(index(e) for _ in range(3)))
    bounds = index(2)
    graph = Graph(n, n, walk.ptr, index(e), index(e), bounds, bounds, Prepared(columns=walk))
    logits, v, edge_value = (
        torch.empty(size, c, device="meta", requires_grad=True) for size in (e, n, e)
    )
    request = AuxRequest(lse=True, weights=True)
    o, (lse, weights, _) = channelwise_attention(
        logits, v, graph, edge_value=edge_value, return_aux=request, impl="triton"
    )
    assert [t.shape for t in (o, lse, weights)] == [(n, c), (n, c), (e, c)]
    grads = torch.autograd.grad((o, lse), (logits, v, edge_value), (o, lse))
    assert [g.shape for g in grads] == [(e, c), (n, c), (e, c)]


@pytest.mark.parametrize("axis", [0, 1, 2], ids=["row", "head", "channel"])
def test_addresses_beyond_two_to_the_31(tmp_path, axis):
    """Strides reach past 2^31 elements; the memory is a sparse file, so nothing of it is paid.

    Every base lies so far into the file that a wrapped offset would read zeros, not crash.
    """
    size = 2**33 + 2**20
    if DEVICE == "cuda":
        room = torch.zeros(size, dtype=FP16, device=DEVICE)
    else:
        room = torch.from_file(str(tmp_path / "sparse"), shared=True, size=size, dtype=FP16)
    x = case(2, 5, 9, channels=(4, 4), dtype=FP16)
    # odd, or the kernel multiplies by an even factor of it at the very end, in 64 bits
    far, place, laid = 2**29 + 1, 2**31, {}
    for name in ("logits", "v", "edge_value", "do"):
        tensor = getattr(x, name)
        stride = [far if i == axis else n for i, n in enumerate(tensor.stride())]
        laid[name] = room.as_strided(tensor.shape, stride, place).copy_(tensor)
        place += 256
    for impl in FAST:
        same_bits(evaluate(replace(x, **laid), impl), evaluate(x, impl))


def test_nothing_waits_for_the_device():
    """Launchers allocate and launch: no value comes back, so a CUDA graph can capture them."""
    pytest.importorskip("triton")
    from test_attention_execution import Calls

    x = case(1, 8, 40, channels=(2, 3), dtype=FP32, plan="buckets")
    rows, columns = walks(x.graph, "triton")
    logit = ChannelwiseLogit(-1.0, 1.0, 1e-6)
    gate = torch.tensor([0.0, 1.0], device=DEVICE)
    with Calls() as calls:
        for mask in (HeadMask(None, None), node_mask(gate, x.graph)):
            given = x.logits, x.v, x.edge_value, *mask
            *_, stat = _launch_fwd("triton", *given, rows, *logit, True, True)
            upstream = ChannelwiseUpstream(x.do, x.dlse, stat)
            _launch_bwd("triton", *upstream, *given, rows, columns, *logit, True, True, True)
    assert not {"_local_scalar_dense", "nonzero", "item", "unique", "sort"} & calls.names
    assert "new_empty" in calls.names


def test_the_named_implementation_runs(monkeypatch, compiled_kernels):
    import fastgt.cpu.channelwise_attention
    import fastgt.kernels.channelwise_attention
    import fastgt.kernels.channelwise_attention_backward

    seen = []
    for name, module, functions in (
        ("cpp", fastgt.cpu.channelwise_attention, ("fwd", "bwd")),
        ("triton", fastgt.kernels.channelwise_attention, ("fwd",)),
        ("triton", fastgt.kernels.channelwise_attention_backward, ("bwd",)),
        ("reference", reference, ("",)),
    ):
        for suffix in functions:
            function = f"channelwise_attention_{suffix}".rstrip("_")
            real = getattr(module, function)

            def spy(*args, real=real, name=name, **kwargs):
                seen.append(name)
                return real(*args, **kwargs)

            monkeypatch.setattr(module, function, spy)
    x = case(0, 3, 5, dtype=FP32)
    for impl in (None, *IMPLS):
        for chosen in (impl, None):
            seen.clear()
            logits = x.logits.detach().requires_grad_()
            with fastgt.implementation(None if chosen else impl):
                channelwise_attention(logits, x.v, x.graph, impl=chosen).sum().backward()
            assert set(seen) == {impl or FAST[0]}
