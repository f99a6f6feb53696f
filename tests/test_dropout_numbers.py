"""Ranks that have some of a graph's edges drop what one rank that has all of them drops."""

import pytest
import torch
from additive_cases import ADDITIVE
from additive_cases import attend as attend_additively
from additive_cases import case as additive_case
from attention_cases import ATTENTION, FP32, IMPLS, all_close, attend, case
from oracle import dropout_share
from problems import DEVICE, planned

from fastgt import DropoutSeed, Graph, additive_attention, neighborhood_attention, philox
from fastgt.testing import with_index_dtype

ALL = [*IMPLS, "buckets"]
# those that Triton's interpreter does not slow down
AT_LENGTH = ("reference", "cpp")
OPERATORS = {
    "attention": (ATTENTION, case, attend, "factor key attr-value drop scores"),
    "additive": (ADDITIVE, additive_case, attend_additively, "key attr bias drop"),
}


def seeded(x, numbers=None):
    """A case whose dropout knows the edges by these numbers."""
    seed = x.seed if numbers is None else DropoutSeed(x.seed, numbers)
    return x.having(options=x.options | {"dropout_seed": seed})


def part(x, edges, rows=None):
    """The case of some edges, in that order, of all its rows or of those that are chosen."""
    source, target = x.edge_index[:, edges]
    count = x.graph.num_rows
    if rows is not None:
        place = torch.full((count,), -1, device=DEVICE)
        place[rows] = torch.arange(len(rows), device=DEVICE)
        target, count = place[target], len(rows)
    kept = {}
    for name, t in x.tensors().items():
        over = x.over(name)
        if over == "edges":
            kept[name] = t[edges]
        elif over == "rows" and rows is not None:
            kept[name] = t[rows]
    index = torch.stack([source, target])
    graph = Graph.from_edge_index(index, (count, x.graph.num_cols))
    graph = planned(with_index_dtype(graph, x.graph.col.dtype), x.plan)
    return x.having(edge_index=index, graph=graph, **kept)


@pytest.mark.parametrize("name", OPERATORS)
@pytest.mark.parametrize("impl", IMPLS)
def test_an_edges_own_number_changes_no_bit(impl, name):
    op, make, _, terms = OPERATORS[name]
    edges, heads = (300, 5) if impl in AT_LENGTH else (20, 2)
    x = make(3, 9, edges, kind="hub", heads=heads, dtype=FP32, terms=terms)
    own = torch.arange(x.graph.num_edges, device=DEVICE)
    with_numbers, without = (op.evaluate(y, impl) for y in (seeded(x, own), x))
    assert with_numbers.keys() == without.keys()
    for key, found in with_numbers.items():
        assert torch.equal(found, without[key]), key


@pytest.mark.parametrize("name", OPERATORS)
@pytest.mark.parametrize("impl", ALL)
def test_edges_in_another_order_drop_the_same(impl, name):
    op, make, _, terms = OPERATORS[name]
    x = make(4, 7, 30, heads=3, d=4, dv=3, terms=terms)
    order = torch.randperm(x.graph.num_edges, generator=x.generator).to(DEVICE)
    whole, found = op.evaluate(x, impl), op.evaluate(seeded(part(x, order), order), impl)
    expected = {n: t[order] if x.over(n) == "edges" else t for n, t in whole.items()}
    all_close(found, expected)


@pytest.mark.parametrize("name", OPERATORS)
@pytest.mark.parametrize("impl", ALL)
def test_ranks_with_rows_of_a_graph_drop_what_one_rank_drops(impl, name):
    """Outputs are those of its rows; gradients of what ranks share sum up to those of the whole."""
    op, make, _, terms = OPERATORS[name]
    x = make(5, 8, 30, cols=7, isolated=1, heads=3, d=4, dv=3, terms=terms)
    whole = op.evaluate(x, impl)
    owner = torch.randint(2, (8,), generator=x.generator).to(DEVICE)
    sums = {}
    for rank in range(2):
        rows = (owner == rank).nonzero()[:, 0].flip(0)
        edges = (owner[x.edge_index[1]] == rank).nonzero()[:, 0]
        assert len(rows)
        assert 0 < len(edges) < x.graph.num_edges
        for key, found in op.evaluate(seeded(part(x, edges, rows), edges), impl).items():
            at = {"rows": rows, "edges": edges}.get(x.over(key))
            if at is None:
                sums[key] = sums.get(key, 0) + found
            else:
                all_close({key: found}, {key: whole[key][at]})
    assert {"dk", "dv"} <= sums.keys()
    all_close(sums, {key: whole[key] for key in sums})


@pytest.mark.parametrize("first", [1, 4, 6])
@pytest.mark.parametrize("name", OPERATORS)
@pytest.mark.parametrize("impl", ALL)
def test_some_heads_drop_what_they_drop_among_all(impl, name, first):
    op, make, _, _ = OPERATORS[name]
    x = make(5, 7, 30, heads=9, d=4, dv=3, terms="bias drop" if name == "additive" else "drop")

    def some(key, t):
        return t.narrow(0 if key.removeprefix("d") == "weight" else 1, first, 3)

    part = x.having(**{key: some(key, t) for key, t in x.tensors().items()})
    seed = DropoutSeed(x.seed, first_head=first)
    part = part.having(options=x.options | {"dropout_seed": seed})
    whole = op.evaluate(x, impl)
    all_close(op.evaluate(part, impl), {key: some(key, t) for key, t in whole.items()})


@pytest.mark.parametrize("name", OPERATORS)
@pytest.mark.parametrize("impl", IMPLS)
def test_numbers_are_of_64_bits_and_of_any_strides(impl, name):
    """Those that agree in their lower or upper 32 bits alone are others."""
    op, make, _, terms = OPERATORS[name]
    x = make(6, 5, 24, heads=6, d=3, dv=3, terms=terms)
    count = x.graph.num_edges
    for factor in (2**32, 2**57 + 1) if impl in AT_LENGTH else (2**32 + 1,):
        numbers = (torch.arange(count, device=DEVICE) * factor).repeat_interleave(2)[::2]
        assert numbers.stride() == (2,)
        all_close(op.evaluate(seeded(x, numbers), impl), op.oracle(seeded(x, numbers)))


def test_the_mask_is_a_function_of_seed_number_and_head():
    numbers = torch.tensor([0, 5, 2**32 + 5, 2**63 - 1, 5])
    for seed in (0, -3):
        mask = philox.kept(torch.tensor([seed]), 5, 9, 0.3, numbers=numbers)
        for e, number in enumerate(numbers.tolist()):
            for h in range(9):
                assert bool(mask[e, h]) == (dropout_share(seed % 2**64, number, h, 0.3) > 0)


def test_many_numbers_are_drawn_in_pieces():
    count = 2 * philox._CHUNK + 7
    numbers = torch.arange(count).flip(0)
    mask = philox.kept(torch.tensor([5]), count, 2, 0.5, numbers=numbers)
    assert torch.equal(mask.flip(0), philox.kept(torch.tensor([5]), count, 2, 0.5))


@pytest.mark.parametrize("name", OPERATORS)
@pytest.mark.parametrize("impl", IMPLS)
def test_second_derivatives(impl, name):
    _, make, run, terms = OPERATORS[name]
    x = make(2, 3, 8, heads=2, d=2, dv=2, terms=terms)
    x = seeded(x, torch.randperm(8, generator=x.generator).to(DEVICE) + 2**33)
    whole = []
    for some in ("reference", impl):
        q = x.q.detach().clone().requires_grad_()
        o, *_ = run(x.having(q=q), some)
        (dq,) = torch.autograd.grad(o, q, x.do, create_graph=True)
        whole.append(torch.autograd.grad(dq.square().sum(), q)[0])
    torch.testing.assert_close(*whole, rtol=1e-9, atol=1e-9)
    assert whole[0].abs().max() > 0


@pytest.mark.parametrize("name", OPERATORS)
@pytest.mark.parametrize("impl", IMPLS)
def test_a_seed_may_be_drawn(impl, name):
    _, make, run, terms = OPERATORS[name]
    x = make(1, 6, 40, heads=2, terms=terms)
    seed = DropoutSeed(None, torch.arange(x.graph.num_edges, device=DEVICE))
    found = []
    for _ in range(2):
        torch.manual_seed(3)
        found.append([run(x, impl, dropout_seed=seed)[0] for _ in range(2)])
    (first, second), (again, _) = found
    assert torch.equal(first, again)
    assert not torch.equal(first, second)


BAD = {
    "a list": ([0, 1, 2], TypeError, "edge_numbers must be a tensor of int64, got list"),
    "int32": (torch.arange(3).int(), TypeError, r"edge_numbers must be int64, got torch.int32"),
    "a float": (torch.zeros(3), TypeError, "edge_numbers must be int64, got torch.float32"),
    "too few": (
        torch.arange(2),
        ValueError,
        "edge_numbers has 2 entries but the graph has 3",
    ),
    "a matrix": (torch.zeros(3, 1).long(), ValueError, r"edge_numbers must be \[3\], got \[3, 1\]"),
    "negative": (
        torch.tensor([0, -4, -1]),
        ValueError,
        "edge_numbers must not be negative, got -4 at 1",
    ),
}


@pytest.mark.parametrize("p", [0.0, 0.5])
@pytest.mark.parametrize("name", BAD)
@pytest.mark.parametrize("impl", IMPLS)
def test_numbers_that_do_not_fit_are_refused(impl, name, p):
    numbers, error, message = BAD[name]
    if isinstance(numbers, torch.Tensor):
        numbers = numbers.to(DEVICE)
    if name == "negative" and DEVICE == "cuda":
        pytest.skip("values on a GPU are not read")
    x = torch.randn(3, 2, 4, device=DEVICE)
    graph = Graph.from_edge_index(torch.tensor([[0, 1, 2], [1, 2, 0]], device=DEVICE))
    options = {"dropout_p": p, "dropout_seed": DropoutSeed(1, numbers), "impl": impl}
    with pytest.raises(error, match=message):
        neighborhood_attention(x, x, x, graph, **options)
    with pytest.raises(error, match=message):
        additive_attention(x, x, x, graph, x[0], **options)


def test_a_seed_within_is_checked_as_one_alone():
    x, numbers = torch.randn(3, 2, 4, device=DEVICE), torch.arange(3, device=DEVICE)
    graph = Graph.from_edge_index(torch.tensor([[0, 1, 2], [1, 2, 0]], device=DEVICE))
    for seed, error, message in (
        ("x", TypeError, "dropout_seed must be an int or a tensor, got str"),
        (2**63, ValueError, "dropout_seed must fit in 64 bits, got 9223372036854775808"),
    ):
        options = {"dropout_p": 0.5, "dropout_seed": DropoutSeed(seed, numbers)}
        with pytest.raises(error, match=message):
            neighborhood_attention(x, x, x, graph, **options)


@pytest.mark.parametrize("impl", IMPLS[1:])
def test_an_exported_module_drops_by_numbers(impl):
    class Layer(torch.nn.Module):
        def forward(self, q, graph, numbers):
            seed = DropoutSeed(7, numbers)
            return neighborhood_attention(
                q, q, q, graph, dropout_p=0.5, dropout_seed=seed, impl=impl
            )

    x = case(1, 6, 20, heads=2, d=4, dv=4, dtype=FP32)
    numbers = torch.randperm(20, generator=x.generator).to(DEVICE)
    call = x.q, x.graph, numbers
    exported = torch.export.export(Layer(), call).module()
    assert torch.equal(exported(*call), Layer()(*call))
    others = x.q, x.graph, numbers.flip(0)
    assert torch.equal(exported(*others), Layer()(*others))
    assert not torch.equal(exported(*others), exported(*call))
