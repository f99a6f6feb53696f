"""Sinkhorn's iterations against loops over single numbers, and what their result must add up to."""

import math

import pytest
import torch
from attention_cases import DEVICE, FAST

from fastgt import implementation
from fastgt.models import log_sinkhorn

FP64 = torch.float64
SHAPES = [(3, 5), (1, 1), (4, 2), (1, 6), (7, 7)]


def offsets(sizes, dtype=torch.int64):
    return torch.tensor([0, *sizes], device=DEVICE).cumsum(0).to(dtype)


def both(shapes, dtype=torch.int64):
    return tuple(offsets(sizes, dtype) for sizes in zip(*shapes, strict=True))


def drawn(shapes, dtype=FP64, seed=0, scale=2.0):
    generator = torch.Generator().manual_seed(seed)
    count = sum(n * m for n, m in shapes)
    return (scale * torch.randn(count, generator=generator, dtype=FP64)).to(DEVICE, dtype)


def log_sum(numbers):
    top = max(float(torch.as_tensor(x).detach()) for x in numbers)
    return top + torch.log(sum(torch.exp(x - top) for x in numbers))


def literal(scores, dustbin, shapes, iterations):
    """Pair after pair, row after row, number after number."""
    out, scores = [], list(scores)
    for n, m in shapes:
        z = [[scores.pop(0) for _ in range(m)] + [dustbin] for _ in range(n)]
        z.append([dustbin] * (m + 1))
        mu = [-math.log(n + m)] * n + [math.log(m / (n + m))]
        nu = [-math.log(n + m)] * m + [math.log(n / (n + m))]
        v = [torch.zeros((), dtype=dustbin.dtype)] * (m + 1)
        for _ in range(iterations):
            u = [mu[i] - log_sum([z[i][j] + v[j] for j in range(m + 1)]) for i in range(n + 1)]
            v = [nu[j] - log_sum([z[i][j] + u[i] for i in range(n + 1)]) for j in range(m + 1)]
        out += [z[i][j] + u[i] + v[j] + math.log(n + m) for i in range(n + 1) for j in range(m + 1)]
    return torch.stack(out)


def matrices(out, shapes):
    parts = out.split([(n + 1) * (m + 1) for n, m in shapes])
    return [part.view(n + 1, m + 1) for part, (n, m) in zip(parts, shapes, strict=True)]


@pytest.mark.parametrize("impl", ["reference", *FAST])
@pytest.mark.parametrize("iterations", [1, 2, 7])
def test_the_result_and_its_gradients_are_the_equations(iterations, impl):
    scores, dustbin = drawn(SHAPES), torch.tensor(0.7, dtype=FP64, device=DEVICE)
    given = [scores.requires_grad_(), dustbin.requires_grad_()]
    with implementation(impl):
        found = log_sinkhorn(*given, *both(SHAPES), iterations=iterations)
    wanted = literal(*given, SHAPES, iterations)
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)
    upstream = drawn([(1, len(wanted))], seed=1)
    with implementation(impl):
        ours = torch.autograd.grad(found, given, upstream)
    theirs = torch.autograd.grad(wanted, given, upstream)
    for a, b in zip(ours, theirs, strict=True):
        assert b.abs().max() > 0.1
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)


def test_twenty_iterations_are_the_default():
    dustbin = torch.tensor(1.0, dtype=FP64, device=DEVICE)
    found = log_sinkhorn(drawn(SHAPES), dustbin, *both(SHAPES))
    wanted = literal(drawn(SHAPES), dustbin, SHAPES, 20)
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, FP64])
def test_rows_and_columns_add_up_to_their_masses(dtype):
    """Columns do after any iteration, rows in the limit."""
    dustbin = torch.tensor(1.0, dtype=dtype, device=DEVICE)
    exact = {"rtol": 1e-12, "atol": 1e-12} if dtype == FP64 else {"rtol": 2e-5, "atol": 2e-5}
    for iterations in (1, 400):
        out = log_sinkhorn(drawn(SHAPES, dtype), dustbin, *both(SHAPES), iterations=iterations)
        assert out.dtype == dtype
        for p, (n, m) in zip(matrices(out.exp(), SHAPES), SHAPES, strict=True):
            columns = torch.tensor([1.0] * m + [n], dtype=dtype, device=DEVICE)
            torch.testing.assert_close(p.sum(0), columns, **exact)
            rows = torch.tensor([1.0] * n + [m], dtype=dtype, device=DEVICE)
            off = (p.sum(1) - rows).abs().max()
            assert off < (1e-4 if iterations == 400 else math.inf)
            if iterations == 1 and n > 2:
                assert off > 1e-3  # so that the limit says something


def test_pairs_know_nothing_of_each_other():
    scores, dustbin = drawn(SHAPES), torch.tensor(0.3, dtype=FP64, device=DEVICE)
    whole = matrices(log_sinkhorn(scores, dustbin, *both(SHAPES)), SHAPES)
    parts = scores.split([n * m for n, m in SHAPES])
    for one, part, shape in zip(whole, parts, SHAPES, strict=True):
        alone = log_sinkhorn(part, dustbin, *both([shape]))
        assert torch.equal(alone, one.flatten())
    with_nan = scores.clone()
    with_nan[0] = torch.nan
    found = matrices(log_sinkhorn(with_nan, dustbin, *both(SHAPES)), SHAPES)
    assert found[0].isnan().all()
    assert all(torch.equal(a, b) for a, b in zip(found[1:], whole[1:], strict=True))


def test_scores_far_apart_neither_overflow_nor_vanish():
    """Logarithms stand for what no float32 could hold."""
    scores = (drawn([(6, 6)], torch.float32, scale=1.0) * 500).requires_grad_()
    dustbin = torch.tensor(-300.0, device=DEVICE, requires_grad=True)
    out = log_sinkhorn(scores, dustbin, *both([(6, 6)]))
    assert out.isfinite().all()
    assert out.min() < -200
    out.sum().backward()
    assert scores.grad.isfinite().all()
    assert dustbin.grad.isfinite()


def test_a_score_of_minus_infinity_forbids_a_match():
    scores = drawn([(3, 2)]).view(3, 2)
    scores[0] = scores[2, 1] = -torch.inf
    scores.requires_grad_()
    dustbin = torch.tensor(1.0, dtype=FP64, device=DEVICE, requires_grad=True)
    p = log_sinkhorn(scores.flatten(), dustbin, *both([(3, 2)])).view(4, 3).exp()
    assert (p[:3, :2] == 0).tolist() == [[True, True], [False, False], [False, True]]
    assert p[0, 2].item() > 0.99
    p.square().sum().backward()
    assert scores.grad.isfinite().all()
    assert (scores.grad == 0).tolist() == [[True, True], [False, False], [False, True]]
    assert dustbin.grad.isfinite()


def test_indices_dtypes_and_autocast():
    dustbin = torch.tensor(1.0, device=DEVICE)
    scores = drawn(SHAPES, torch.float32)
    wanted = log_sinkhorn(scores, dustbin, *both(SHAPES))
    assert torch.equal(log_sinkhorn(scores, dustbin, *both(SHAPES, torch.int32)), wanted)
    with torch.autocast(DEVICE, torch.bfloat16):
        assert torch.equal(log_sinkhorn(scores, dustbin, *both(SHAPES)), wanted)
    for dtype in (torch.float16, torch.bfloat16):
        half = scores.to(dtype)
        found = log_sinkhorn(half, dustbin, *both(SHAPES))
        assert found.dtype == torch.float32
        assert torch.equal(found, log_sinkhorn(half.float(), dustbin, *both(SHAPES)))


def test_no_matrix_is_kept_for_an_iteration():
    shapes = [(40, 50), (60, 30)]
    entries = sum((n + 1) * (m + 1) for n, m in shapes)

    def kept(iterations):
        storages = {}

        def pack(x):
            storage = x.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
            return x

        scores = drawn(shapes, torch.float32).requires_grad_()
        dustbin = torch.tensor(1.0, device=DEVICE)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            out = log_sinkhorn(scores, dustbin, *both(shapes), iterations=iterations)
        assert out.requires_grad
        return sum(storages.values())

    assert kept(21) - kept(1) < 20 * 4 * entries / 2


def test_no_pairs_are_no_entries():
    none = torch.zeros(1, dtype=torch.int64, device=DEVICE)
    dustbin = torch.tensor(1.0, device=DEVICE)
    assert log_sinkhorn(torch.zeros(0, device=DEVICE), dustbin, none, none).shape == (0,)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"scores": [0.0] * 6}, TypeError, "scores must be a tensor, got list"),
        ({"scores": torch.zeros(6, dtype=int)}, TypeError, "scores must be float16, .* torch.int"),
        ({"scores": torch.zeros(2, 3)}, ValueError, r"scores must be .*, got \[2, 3\]"),
        ({"scores": torch.zeros(5)}, ValueError, r"scores must be \[.*\] = \[6\], got \[5\]"),
        ({"dustbin": 1.0}, TypeError, "dustbin must be a tensor, got float"),
        ({"dustbin": torch.ones(1)}, ValueError, r"dustbin must be one number, \[\], got \[1\]"),
        (
            {"dustbin": torch.ones((), device="meta")},
            ValueError,
            "dustbin is on meta but scores is",
        ),
        ({"offsets": [0, 2]}, TypeError, "offsets must be a tensor of integers, got list"),
        ({"offsets": torch.tensor([0.0, 2.0])}, TypeError, "offsets must be int32 or int64, got"),
        ({"offsets": torch.tensor([1, 2])}, ValueError, "offsets must"),
        ({"key_offsets": torch.tensor([0, 1, 3])}, ValueError, "key_offsets has 2 pairs but offse"),
        ({"key_offsets": torch.tensor([0, 0])}, ValueError, "key_offsets has no node in pair 0"),
        ({"iterations": 0}, ValueError, "iterations must be positive, got 0"),
        ({"iterations": 2.0}, TypeError, "iterations must be an int, got float 2.0"),
    ],
)
def test_wrong_arguments_are_named(changes, error, message):
    given = {
        "scores": torch.zeros(6),
        "dustbin": torch.tensor(1.0),
        "offsets": torch.tensor([0, 2]),
        "key_offsets": torch.tensor([0, 3]),
    }
    given = {name: x.to(DEVICE) for name, x in given.items()}
    with pytest.raises(error, match=message):
        log_sinkhorn(**given | changes)
