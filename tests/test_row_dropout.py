"""row_dropout: a mask that rows take with them."""

import math

import pytest
import torch
from attention_cases import BF16, FP16, FP32, FP64
from oracle import dropout_share
from problems import DEVICE

import fastgt
from fastgt.ops import row_dropout as module
from fastgt.ops.row_dropout import row_dropout

IMPLS = ["cpp", "reference"] if DEVICE == "cpu" else ["reference"]
DTYPES = [FP64, FP32, BF16, FP16]


@pytest.fixture(params=IMPLS)
def impl(request):
    with fastgt.implementation(request.param if DEVICE == "cpu" else None):
        yield request.param


def draw(*shape, dtype=FP64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=FP64).to(DEVICE, dtype)


def factors(numbers, width, seed, p):
    """What the channels are multiplied with, one by one."""
    rows = [[dropout_share(seed % 2**64, n, c, p) for c in range(width)] for n in numbers]
    return torch.tensor(rows, dtype=FP64, device=DEVICE).view(len(numbers), width)


@pytest.mark.parametrize("width", [1, 3, 4, 7, 16, 70])
def test_it_is_the_equation(impl, width):
    x = draw(150 if width < 16 else 21, width).requires_grad_()
    dy = draw(*x.shape, seed=1)
    own = list(range(len(x)))
    far = [(n * 0x9E3779B97F4A7C15) % 2**63 for n in own]
    for numbers, seed, p in ((None, 0, 0.3), (far, -3, 0.5), (own, 2**40 + 5, 0.9)):
        factor = factors(numbers or own, width, seed, p)
        known = None if numbers is None else torch.tensor(numbers, device=DEVICE)
        y = row_dropout(x, p, seed=seed, numbers=known)
        torch.testing.assert_close(y, x * factor, rtol=1e-15, atol=0)
        (dx,) = torch.autograd.grad(y, x, dy)
        torch.testing.assert_close(dx, dy * factor, rtol=1e-15, atol=0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "transposed", "sliced", "expanded"])
def test_a_product_is_rounded_once(impl, dtype, layout):
    x = draw(6, 5, 3, dtype=dtype)
    if layout == "transposed":
        x = draw(5, 6, 3, dtype=dtype).transpose(0, 1)
    elif layout == "sliced":
        x = draw(14, 7, 9, dtype=dtype)[1:13:2, 1:6, 3:6]
    elif layout == "expanded":
        x = draw(1, 5, 3, dtype=dtype).expand(6, 5, 3)
    numbers = torch.arange(24, device=DEVICE)[::4]
    factor = factors(numbers.tolist(), 15, 4, 0.4).view(6, 5, 3)
    y = row_dropout(x, 0.4, seed=4, numbers=numbers)
    wide = FP64 if dtype == FP64 else FP32
    assert torch.equal(y, (x.to(wide) * factor.to(wide)).to(dtype))


@pytest.mark.skipif(len(IMPLS) < 2, reason="one implementation")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_implementations_give_the_same_bits(dtype):
    # several tasks, and rows that no task begins with
    x, numbers = draw(700, 37, dtype=dtype), torch.randperm(700) + 2**33
    found = []
    for name in IMPLS:
        with fastgt.implementation(name):
            found.append(row_dropout(x, 0.25, seed=9, numbers=numbers))
    assert torch.equal(*found)


def test_the_definition_takes_some_rows_at_a_time(monkeypatch):
    x, numbers = draw(23, 6), torch.arange(23, device=DEVICE) * 5
    with fastgt.implementation("reference" if DEVICE == "cpu" else None):
        whole = [row_dropout(x, 0.5, seed=1, numbers=n) for n in (None, numbers)]
        monkeypatch.setattr(module, "_CHUNK", 24)
        for n, expected in zip((None, numbers), whole, strict=True):
            assert torch.equal(row_dropout(x, 0.5, seed=1, numbers=n), expected)


def test_threads_change_no_bit():
    x, threads = draw(3000, 33, dtype=FP32), torch.get_num_threads()
    found = []
    try:
        for count in (1, 4):
            torch.set_num_threads(count)
            found.append(row_dropout(x, 0.5, seed=1))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(*found)


def test_rows_take_their_mask_with_them(impl):
    """Those of several ranks, in any order, are those of one."""
    x = draw(40, 3, 7, dtype=FP32).requires_grad_()
    dy = draw(40, 3, 7, dtype=FP32, seed=1)
    whole = row_dropout(x, 0.4, seed=5)
    (dx,) = torch.autograd.grad(whole, x, dy)
    order = torch.randperm(40, generator=torch.Generator().manual_seed(2)).to(DEVICE)
    for rows in (order[:13], order[13:]):
        part = x.detach()[rows].requires_grad_()
        y = row_dropout(part, 0.4, seed=5, numbers=rows)
        assert torch.equal(y, whole[rows])
        assert torch.equal(torch.autograd.grad(y, part, dy[rows])[0], dx[rows])


@pytest.mark.parametrize("shape", [(0, 4), (3, 0), (0,), (5,), (2, 0, 3)], ids=str)
def test_shapes_at_their_ends(impl, shape):
    x = draw(*shape).requires_grad_()
    y = row_dropout(x, 0.5, seed=0)
    (dx,) = torch.autograd.grad(y, x, torch.ones_like(y))
    assert y.shape == dx.shape == x.shape
    if x.numel():
        assert torch.equal(dx, factors(range(5), 1, 0, 0.5)[:, 0])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_probabilities_at_their_ends_are_as_in_pytorch(impl, dtype):
    x = draw(9, 8, dtype=dtype)
    x[0, 0], x[1, 1], x[2, 2] = math.nan, math.inf, -math.inf
    x.requires_grad_()
    dy = draw(9, 8, dtype=dtype, seed=1)
    for p in (0.0, 1.0):
        y = row_dropout(x, p, seed=3)
        expected = torch.nn.functional.dropout(x, p)
        torch.testing.assert_close(y, expected, rtol=0, atol=0, equal_nan=True)
        (dx,) = torch.autograd.grad(y, x, dy)
        assert torch.equal(dx, dy if p == 0 else torch.zeros_like(dy))
    tiny = row_dropout(x, 2.0**-26, seed=3)  # rounded to 0
    torch.testing.assert_close(tiny, x, rtol=0, atol=0, equal_nan=True)


def test_the_share_that_is_kept(impl):
    y = row_dropout(torch.ones(1000, 100, device=DEVICE), 0.3, seed=12)
    dropped = (y == 0).double()
    assert abs(dropped.mean().item() - 0.3) < 5 * math.sqrt(0.3 * 0.7 / y.numel())
    assert (dropped.mean(0) - 0.3).abs().max() < 6 * math.sqrt(0.3 * 0.7 / 1000)
    assert (dropped.mean(1) - 0.3).abs().max() < 6 * math.sqrt(0.3 * 0.7 / 100)
    assert y.max().item() == pytest.approx(1 / 0.7, rel=1e-6)


def test_a_seed_is_drawn_for_every_call(impl):
    x = draw(20, 20)
    found = []
    for _ in range(2):
        torch.manual_seed(4)
        found.append([row_dropout(x, 0.5) for _ in range(2)])
    assert torch.equal(found[0][0], found[1][0])
    assert not torch.equal(*found[0])
    by_int = row_dropout(x, 0.5, seed=8)
    assert torch.equal(by_int, row_dropout(x, 0.5, seed=torch.tensor(8, device=DEVICE)))


def test_derivatives_of_every_order(impl):
    x = draw(4, 3).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: row_dropout(x, 0.5, seed=2), x)
    assert torch.autograd.gradgradcheck(lambda x: row_dropout(x, 0.5, seed=2).sin(), x)


def test_nothing_is_kept_for_the_backward(impl):
    kept = []

    def keep(t):
        kept.append(t.numel())
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        row_dropout(draw(50, 40).requires_grad_(), 0.5)
    assert sum(kept) == 1


@pytest.mark.parametrize("numbered", [False, True])
def test_it_compiles_and_exports(impl, numbered):
    class Layer(torch.nn.Module):
        def forward(self, x, numbers):
            return row_dropout(x.sin(), 0.5, seed=7, numbers=numbers if numbered else None)

    torch._dynamo.reset()
    x, numbers = draw(9, 5).requires_grad_(), torch.arange(9, device=DEVICE).flip(0)
    compiled = torch.compile(Layer(), fullgraph=True, backend="aot_eager")
    y, expected = compiled(x, numbers), Layer()(x, numbers)
    assert torch.equal(y, expected)
    grads = [torch.autograd.grad(t.cos().sum(), x)[0] for t in (y, expected)]
    torch.testing.assert_close(*grads)
    exported = torch.export.export(Layer(), (x.detach(), numbers)).module()
    assert torch.equal(exported(x.detach(), numbers), expected)


@pytest.mark.parametrize("numbered", [False, True])
def test_opcheck(impl, numbered):
    numbers = torch.arange(6, device=DEVICE) if numbered else None
    seed = torch.tensor([3], device=DEVICE)
    for x in (draw(6, 5, dtype=FP32), draw(5, 6).T, draw(6, 0)):
        call = impl, x, seed, numbers, 0.5
        torch.library.opcheck(torch.ops.fastgt.row_dropout.default, call)


SIX = torch.zeros(6, 2, device=DEVICE)
BAD = {
    "a list": (([1.0], 0.5), {}, TypeError, "x must be a tensor, got list"),
    "integers": ((SIX.long(), 0.5), {}, TypeError, "x must be float16, .* got torch.int64"),
    "no rows": ((SIX[0, 0], 0.5), {}, ValueError, r"x must be \[R, ...\], got \[\]"),
    "p beyond 1": ((SIX, 1.5), {}, ValueError, "p must be from 0 to 1, got 1.5"),
    "p below 0": ((SIX, -0.5), {}, ValueError, "p must be from 0 to 1, got -0.5"),
    "p nan": ((SIX, math.nan), {}, ValueError, "p must be from 0 to 1, got nan"),
    "p in words": ((SIX, "half"), {}, TypeError, "p must be a number, got str"),
    "seed": ((SIX, 0.5), {"seed": 0.5}, TypeError, "seed must be an int or a tensor, got float"),
    "large seed": ((SIX, 0.5), {"seed": 2**63}, ValueError, "seed must fit in 64 bits, got 92"),
    "seeds": (
        (SIX, 0.0),
        {"seed": torch.zeros(2).long()},
        ValueError,
        r"seed must be one int64, got \[2\] of torch.int64",
    ),
    "few numbers": (
        (SIX, 0.5),
        {"numbers": torch.arange(5, device=DEVICE)},
        ValueError,
        "numbers has 5 entries but x has 6 rows",
    ),
    "numbers of 32 bits": (
        (SIX, 0.5),
        {"numbers": torch.arange(6, device=DEVICE).int()},
        TypeError,
        "numbers must be int64, got torch.int32",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_what_does_not_fit_is_refused(name):
    arguments, options, error, message = BAD[name]
    with pytest.raises(error, match=message):
        row_dropout(*arguments, **options)


@pytest.mark.skipif(DEVICE == "cuda", reason="values on a GPU are not read")
def test_numbers_below_0_are_refused():
    with pytest.raises(ValueError, match="numbers must not be negative, got -2 at 3"):
        row_dropout(SIX, 0.5, numbers=torch.tensor([0, 1, 2, -2, 4, -5]))
