"""Pairs and heads that are some of a larger call's are dropped as they are there."""

import pytest
import torch
from attention_cases import DEVICE, FAST, FP32, all_close, close
from global_cases import FORMS, attend, case, evaluate

from fastgt import DropoutSeed, PairDropoutSeed, global_attention

IMPLS = ["reference", *FORMS]


def own_numbers(x):
    """By which dropout knows pairs without any: graph after graph, row after row."""
    of_query, of_key, first = torch.zeros(len(x.q)), torch.zeros(len(x.k)), 0
    for begin, end, key, last in x.bounds():
        of_query[begin:end] = first + torch.arange(end - begin) * (last - key)
        of_key[key:last] = torch.arange(last - key)
        first += (end - begin) * (last - key)
    return of_query.long().to(DEVICE), of_key.long().to(DEVICE)


def seeded(x, *numbers, first_head=0):
    seed = PairDropoutSeed(x.seed, *numbers, first_head=first_head)
    return x.having(options=x.options | {"dropout_seed": seed})


@pytest.mark.parametrize("form", IMPLS)
def test_a_pairs_own_number_changes_no_bit(form):
    x = case(3, (5, 0, 20), keys=(6, 3, 9), group=2, dtype=FP32, drop=True)
    with_numbers = evaluate(seeded(x, *own_numbers(x)), form)
    for name, found in evaluate(x, form).items():
        assert torch.equal(found, with_numbers[name]), name


@pytest.mark.skipif(DEVICE != "cpu", reason="of the CPU path")
def test_more_pairs_than_a_thread_remembers():
    generator = torch.Generator().manual_seed(3)
    q, k, v = (torch.randn(n, 1, 1, generator=generator) for n in (600, 3300, 3300))
    leaves = [x.requires_grad_() for x in (q, k, v)]
    numbered = PairDropoutSeed(7, torch.arange(600) * 3300, torch.arange(3300))
    call = {"key_offsets": torch.tensor([0, 3300]), "dropout_p": 0.5, "impl": "cpp"}
    found = []
    for seed in (7, numbered):
        o = global_attention(*leaves, dropout_seed=seed, **call)
        found.append([o, *torch.autograd.grad(o.sum(), leaves)])
    for a, b in zip(*found, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("form", IMPLS)
def test_a_rank_with_some_queries_and_keys_in_any_order_drops_what_one_with_all_drops(form):
    x = case(4, (8,), keys=(11,), heads=3, d=4, dv=3, bias="key", drop=True)
    whole, (of_query, of_key) = evaluate(x, form), own_numbers(x)
    rows = torch.randperm(8, generator=torch.Generator().manual_seed(1)).to(DEVICE)[:5]
    keys = torch.randperm(11, generator=torch.Generator().manual_seed(2)).to(DEVICE)
    y = x.having(
        **{name: getattr(x, name)[rows] for name in ("q", "do", "dlse")},
        **{name: getattr(x, name)[keys] for name in ("k", "v", "bias")},
        offsets=torch.tensor([0, 5], device=DEVICE),
    )
    found = evaluate(seeded(y, of_query[rows], of_key[keys]), form)
    for name in ("o", "lse", "dq"):
        close(found[name], whole[name][rows], name)


@pytest.mark.parametrize("first", [1, 4, 6])
@pytest.mark.parametrize("form", IMPLS)
def test_some_heads_drop_what_they_drop_among_all(form, first):
    x = case(5, (5, 0, 20), keys=(6, 3, 9), heads=9, d=3, dv=2, bias="key", drop=True)
    whole = evaluate(x, form)
    part = x.having(**{name: t[:, first : first + 3] for name, t in x.tensors().items()})
    found = evaluate(seeded(part, first_head=first), form)
    all_close(found, {name: t[:, first : first + 3] for name, t in whole.items()})


BAD = {
    "edges": (
        DropoutSeed(1, torch.arange(3)),
        TypeError,
        "dropout_seed of pairs must be a PairDropoutSeed, got a DropoutSeed",
    ),
    "a list": (
        PairDropoutSeed(1, [0, 1, 2], torch.arange(3)),
        TypeError,
        "query_numbers must be a tensor of int64, got list",
    ),
    "one of two": (
        PairDropoutSeed(1, torch.arange(3)),
        TypeError,
        "key_numbers must be a tensor of int64, got NoneType",
    ),
    "too few": (
        PairDropoutSeed(1, torch.arange(3), torch.arange(2)),
        ValueError,
        "key_numbers has 2 entries but k has 3 nodes",
    ),
    "int32": (
        PairDropoutSeed(1, torch.arange(3).int(), torch.arange(3)),
        TypeError,
        "query_numbers must be int64, got torch.int32",
    ),
    "negative": (
        PairDropoutSeed(1, torch.arange(3) - 1, torch.arange(3)),
        ValueError,
        "query_numbers must not be negative, got -1 at 0",
    ),
    "head": (
        PairDropoutSeed(1, first_head=2**31),
        ValueError,
        r"first_head must be from 0 to 2\^31 - 1, got 2147483648",
    ),
    "a head that is a float": (
        PairDropoutSeed(1, first_head=1.0),
        TypeError,
        "first_head must be an int, got float 1.0",
    ),
}


@pytest.mark.skipif(DEVICE != "cpu", reason="values on a GPU are not read")
@pytest.mark.parametrize("p", [0.0, 0.5])
@pytest.mark.parametrize("name", BAD)
def test_seeds_that_do_not_fit_are_refused(name, p):
    seed, error, message = BAD[name]
    x = torch.randn(3, 2, 4)
    with pytest.raises(error, match=message):
        global_attention(x, x, x, dropout_p=p, dropout_seed=seed)


@pytest.mark.parametrize("impl", FAST)
def test_it_compiles_with_one_tensor_for_both_numbers(impl):
    torch._dynamo.reset()
    x = case(0, (5, 8), d=8, dv=8, dtype=FP32)
    numbers = torch.arange(13, device=DEVICE) * 2**33

    def f(q, numbers):
        seed = PairDropoutSeed(7, numbers, numbers, 2)
        return global_attention(q, x.k, x.v, x.offsets, dropout_p=0.5, dropout_seed=seed, impl=impl)

    found = []
    for g in (f, torch.compile(f, fullgraph=True, backend="aot_eager")):
        leaf = x.q.detach().clone().requires_grad_()
        o = g(leaf, numbers)
        found.append([o, *torch.autograd.grad(o, leaf, x.do)])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b)


def test_the_oracle_is_asked_about_numbers():
    """Cases that are drawn have them, and these matter."""
    x = case(2, (4, 3), drop=True, numbered=True)
    assert isinstance(x.options["dropout_seed"], PairDropoutSeed)
    o, _ = attend(x, "reference")
    assert not torch.allclose(o, attend(x, "reference", dropout_seed=x.seed)[0])
