"""segment_sum, segment_mean, segment_max and virtual_node against loops over the graphs."""

import itertools

import pytest
import torch
from attention_cases import BF16, DEVICE, FAST, FP16, FP32, FP64, close
from hypothesis import given, settings
from hypothesis import strategies as st

from fastgt import segment_max, segment_mean, segment_sum, virtual_node
from fastgt.ops.segment_pool import of_nodes

POOLS = {"sum": segment_sum, "mean": segment_mean, "max": segment_max}
IMPLS = ["reference", *FAST]


def made(seed, sizes, channels=(3,), dtype=FP64, index=torch.int64):
    generator = torch.Generator().manual_seed(seed)
    offsets = torch.tensor([0, *sizes]).cumsum(0).to(DEVICE, index)
    n, g = sum(sizes), len(sizes)
    x, dx = torch.randn(2, n, *channels, generator=generator, dtype=FP64).to(DEVICE, dtype)
    s, ds = torch.randn(2, g, *channels, generator=generator, dtype=FP64).to(DEVICE, dtype)
    return x.requires_grad_(), s.requires_grad_(), offsets, dx, ds


def loop(x, offsets, reduce):
    pools = []
    for begin, end in itertools.pairwise(offsets.tolist()):
        part = x[begin:end]
        if begin == end:
            pools.append(x.new_zeros(x.shape[1:]))
        elif reduce == "max":
            pools.append(part.amax(0))
        else:
            pools.append(part.sum(0) if reduce == "sum" else part.mean(0))
    return torch.stack(pools) if pools else x.new_zeros(0, *x.shape[1:])


@pytest.mark.parametrize("reduce", POOLS)
@pytest.mark.parametrize("impl", IMPLS)
def test_pools_are_loops(impl, reduce):
    few = impl == "triton" and DEVICE == "cpu"

    @settings(max_examples=8 if few else 40)
    @given(
        seed=st.integers(0, 2**31),
        sizes=st.lists(st.integers(0, 9 if few else 60), max_size=6),
        channels=st.sampled_from([(), (1,), (5,), (2, 3)]),
        index=st.sampled_from([torch.int32, torch.int64]),
    )
    def check(seed, sizes, channels, index):
        x, _, offsets, _, ds = made(seed, sizes, channels, index=index)
        found = POOLS[reduce](x, offsets, impl=impl)
        wanted = loop(x, offsets, reduce)
        close(found, wanted)
        if sum(sizes):
            pairs = zip(*(torch.autograd.grad(y, x, ds) for y in (found, wanted)), strict=True)
            for a, b in pairs:
                close(a, b)

    check()


@pytest.mark.parametrize("impl", IMPLS)
def test_virtual_nodes_are_loops(impl):
    for sizes in ((3, 0, 5), (1,), (0, 0), ()):
        x, s, offsets, dx, ds = made(1, sizes, (4,))
        y, pooled = virtual_node(x, s, offsets, impl=impl)
        wanted = x + s.repeat_interleave(offsets.diff(), 0)
        wanted = wanted, s + loop(wanted, offsets, "sum")
        close(y, wanted[0])
        close(pooled, wanted[1])
        found = torch.autograd.grad((y, pooled), (x, s), (dx, ds))
        expected = torch.autograd.grad(wanted, (x, s), (dx, ds), materialize_grads=True)
        for a, b in zip(found, expected, strict=True):
            close(a, b)


@pytest.mark.parametrize("impl", IMPLS)
def test_nan_stays_in_its_graph(impl):
    x, s, offsets, _, _ = made(0, (3, 4, 2))
    poisoned = x.detach().clone()
    poisoned[3:7] = torch.nan
    for pool in POOLS.values():
        clean, dirty = (pool(t, offsets, impl=impl) for t in (x, poisoned))
        close(dirty[[0, 2]], clean[[0, 2]])
        assert dirty[1].isnan().all()
    clean, dirty = (virtual_node(t, s, offsets, impl=impl)[1] for t in (x, poisoned))
    close(dirty[[0, 2]], clean[[0, 2]])


@pytest.mark.parametrize("impl", FAST)
@pytest.mark.parametrize("dtype", [FP32, BF16, FP16])
def test_sums_are_kept_in_float32(impl, dtype):
    x = torch.full((3072, 1), 0.25, dtype=dtype, device=DEVICE)
    offsets = torch.tensor([0, 3072], device=DEVICE)
    assert segment_sum(x, offsets, impl=impl).tolist() == [[768.0]]
    assert segment_mean(x, offsets, impl=impl).tolist() == [[0.25]]


@pytest.mark.parametrize("impl", IMPLS)
def test_offsets_of_any_stride(impl):
    x, s, offsets, _, _ = made(0, (3, 0, 2))
    strided = torch.stack([offsets, offsets + 7], 1)[:, 0]
    for pool in (*POOLS.values(), lambda x, o, impl: virtual_node(x, s, o, impl=impl)[1]):
        found = [pool(x, o, impl=impl) for o in (strided, offsets)]
        assert torch.equal(*found)
        grads = [torch.autograd.grad(f.square().sum(), x)[0] for f in found]
        assert torch.equal(*grads)


@pytest.mark.parametrize("impl", FAST)
def test_second_derivatives(impl):
    x, s, offsets, _, _ = made(0, (2, 0, 3), (2,))
    for pool in (segment_sum, segment_mean):
        assert torch.autograd.gradgradcheck(lambda t, f=pool: f(t, offsets, impl=impl) ** 2, x)
    assert torch.autograd.gradgradcheck(
        lambda x, s: virtual_node(x, s, offsets, impl=impl)[1] ** 2, (x, s)
    )


def test_bad_input():
    x, s, offsets, _, _ = made(0, (3, 2))
    for f in (*POOLS.values(), lambda x, o: virtual_node(x, s, o)):
        with pytest.raises(TypeError, match="x must be a tensor, got list"):
            f([1.0], offsets)
        with pytest.raises(TypeError, match="x must be float16"):
            f(torch.arange(5), offsets)
        with pytest.raises(ValueError, match=r"x must be \[N, ...\], got a scalar"):
            f(torch.tensor(1.0), offsets)
        with pytest.raises(TypeError, match="offsets must be a tensor of integers"):
            f(x, [0, 5])
        if DEVICE == "cpu":
            with pytest.raises(ValueError, match="offsets ends at 4 but there are 5 nodes"):
                f(x, torch.tensor([0, 4]))
            with pytest.raises(ValueError, match="offsets must start at 0"):
                f(x, torch.tensor([1, 5]))
            with pytest.raises(ValueError, match="offsets decreases"):
                f(x, torch.tensor([0, 4, 3, 5]))
    with pytest.raises(ValueError, match=r"state must be \[2, 3\].*got \[3, 3\]"):
        virtual_node(x, torch.zeros(3, 3, dtype=FP64, device=DEVICE), offsets)
    with pytest.raises(ValueError, match=f"state is on meta but x is on {DEVICE}"):
        virtual_node(x, s.to("meta"), offsets)
    with pytest.raises(TypeError, match=r"state is torch\.float32 but x is torch\.float64"):
        virtual_node(x, s.float(), offsets)


@pytest.mark.parametrize("pool", [segment_sum, segment_mean, segment_max])
def test_autocast_casts_no_sum_down(pool):
    x, offsets = torch.randn(2001, 3, device=DEVICE), torch.tensor([0, 1, 2001], device=DEVICE)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        found = pool(x, offsets)
    assert torch.equal(found, pool(x, offsets))


def test_the_meta_device_gives_shapes():
    """There is no autocast to leave out."""
    x, state = torch.zeros(5, 3, device="meta"), torch.zeros(2, 3, device="meta")
    offsets = torch.zeros(3, dtype=torch.long, device="meta")
    for pool in (segment_sum, segment_mean, segment_max):
        assert pool(x, offsets).shape == (2, 3)
    assert of_nodes(state, offsets, 5, None).shape == (5, 3)
    assert [y.shape for y in virtual_node(x, state, offsets)] == [(5, 3), (2, 3)]


def test_what_a_graph_has_is_given_to_its_nodes_in_its_dtype():
    state = torch.randn(3, 2, device=DEVICE)
    offsets = torch.tensor([0, 2, 2, 5], device=DEVICE)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        found = of_nodes(state, offsets, 5, None)
    assert torch.equal(found, state[[0, 0, 2, 2, 2]])
