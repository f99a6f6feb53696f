"""neighborhood_attention with gates, vectors, attributes and dropout on edges, and edge scores."""

import itertools
import math
from dataclasses import replace

import laws
import pytest
import torch
from attention_cases import (
    ALL_TERMS,
    BF16,
    DEVICE,
    EDGE_TERMS,
    FAST,
    FP16,
    FP32,
    FP64,
    GATHERING,
    IMPLS,
    LAYOUTS,
    TERMS_BY_HEAD,
    all_close,
    attend,
    case,
    close,
    evaluate,
    loops,
    same_bits,
    term_words,
    with_leaves,
)
from hypothesis import strategies as st
from torch.utils.checkpoint import checkpoint

from fastgt import Graph, neighborhood_attention, philox, reference
from fastgt.testing import PROBLEMS, random_graph

# the loops are slow, and a combination does not show by its size
SMALL = {"rows": st.integers(0, 12), "edges": st.integers(0, 50), "heads": st.sampled_from([1, 2])}


test_reference_is_the_equations = EDGE_TERMS.obeys(
    laws.equals_its_oracle, 60, ["reference"], dtype=FP64, terms=term_words(), **SMALL
)


test_implementations_agree_in_float64 = EDGE_TERMS.obeys(
    laws.equals_its_oracle, 40, FAST, dtype=FP64, terms=term_words(), **SMALL
)


@pytest.mark.parametrize("layout", LAYOUTS[:4])
@pytest.mark.parametrize("terms", [ALL_TERMS, TERMS_BY_HEAD, "shared attr-value scores factor"])
@pytest.mark.parametrize("impl", ["reference", *GATHERING])
def test_everything_at_once(impl, terms, layout):
    """No two sizes equal, no power of two, every option in use."""
    shape = {"heads": 3, "group": 2, "d": 5, "dv": 10, "layout": layout, "terms": terms}
    x = case(7, 9, 60, cols=7, kind="hub", isolated=2, clamped=True, eps=0.3, scale=0.7, **shape)
    laws.equals_its_oracle(EDGE_TERMS, impl, x)


@pytest.mark.parametrize("dtype", [FP32, BF16, FP16], ids=str)
@pytest.mark.parametrize("impl", FAST)
def test_as_accurate_as_eager(impl, dtype):
    # a logit's rounding grows with it: at scale 1, luck decides which of the two errs less
    ordinary = st.sampled_from([None, 0.3])
    fixed = {"dtype": dtype, "terms": term_words(), "scale": ordinary, **SMALL}
    EDGE_TERMS.check(laws.as_accurate_as_eager, 16, impl, **fixed)


@pytest.mark.parametrize("impl", FAST)
def test_every_pair_of_terms(impl):
    """Each with each other and alone: what a drawn combination may leave out."""
    words = ("gate", "factor", "key", "shared", "value", "attr-key", "attr-value", "drop", "scores")
    apart = {("gate", "factor"), ("key", "shared"), ("shared", "value")}
    for pair in [*zip(words, words, strict=True), *itertools.combinations(words, 2)]:
        if pair in apart:
            continue
        x = case(5, 6, 18, cols=5, heads=1, group=2, d=3, dv=2, terms=" ".join(set(pair)), eps=0.1)
        laws.equals_its_oracle(EDGE_TERMS, impl, x)


@pytest.mark.parametrize("width", [1, 6, 13, 64, 100, 256])
@pytest.mark.parametrize("impl", FAST)
def test_every_width(impl, width):
    x = case(width, 5, 13, cols=6, d=width, dv=max(1, width - 3), dtype=FP32, terms=ALL_TERMS)
    laws.as_accurate_as_eager(EDGE_TERMS, impl, x, of_outputs=3.0)


@pytest.mark.parametrize("channels", [1, 2, 17, 256])
@pytest.mark.parametrize("impl", GATHERING)
def test_every_number_of_attributes(impl, channels):
    x = case(3, 5, 20, cols=6, heads=2, d=4, dv=3, terms="attr-key attr-value factor")
    generator = x.generator

    def tensor(*shape):
        return torch.randn(shape, generator=generator, dtype=FP64).to(DEVICE)

    weights = {n: tensor(channels, *x.terms[n].shape[1:]) for n in x.terms if n.endswith("weight")}
    x = replace(x, terms=x.terms | weights | {"edge_attr": tensor(20, channels)})
    laws.equals_its_oracle(EDGE_TERMS, impl, x)


@pytest.mark.parametrize("impl", FAST)
def test_more_heads_than_one_program_takes(impl):
    """Attributes are shared by heads that different programs compute."""
    x = case(3, 3, 6, heads=5, d=256, dv=256, dtype=FP32, terms="attr-key attr-value")
    laws.as_accurate_as_eager(EDGE_TERMS, impl, x, of_outputs=3.0)


test_renumbering_nodes_renumbers_the_result = EDGE_TERMS.obeys(
    laws.renumbering_nodes_renumbers_the_result,
    12,
    dtype=FP64,
    terms=term_words(),
    cols=None,
    **SMALL,
)


# dropout goes by an edge's number
UNDROPPED = term_words().filter(lambda words: not {"drop", "numbered"} & {*words.split()})

test_reordering_edges_reorders_only_edge_tensors = EDGE_TERMS.obeys(
    laws.reordering_edges_reorders_only_edge_tensors, 12, dtype=FP64, terms=UNDROPPED, **SMALL
)


@pytest.mark.parametrize("terms", [ALL_TERMS, TERMS_BY_HEAD])
@pytest.mark.parametrize("impl", ["reference", *GATHERING])
def test_no_edges_and_no_nodes(impl, terms):
    for rows, cols in ((4, 4), (0, 0), (0, 3), (3, 0)):
        x = case(0, rows, 0, cols=cols, terms=terms, eps=1e-6)
        laws.without_edges_all_is_zero(EDGE_TERMS, impl, x)


test_rows_without_edges_give_zero = EDGE_TERMS.obeys(
    laws.rows_without_edges_give_zero, 12, dtype=FP32, isolated=3, terms=term_words(), **SMALL
)


@pytest.mark.parametrize("where", ["edge_gate", "edge_key", "edge_value", "edge_attr", "dscores"])
@pytest.mark.parametrize("terms", [ALL_TERMS, TERMS_BY_HEAD + " scores"])
@pytest.mark.parametrize("impl", ["reference", *GATHERING])
def test_nan_on_an_edge_stays_with_its_row(impl, terms, where):
    x = case(4, 12, 30, cols=14, dtype=FP32, eps=1e-6, terms=terms)
    found, hit = laws.a_value_stays_with_its_rows(EDGE_TERMS, impl, x, where, torch.nan)
    if where != "dscores" and where != "edge_value":
        assert found["lse"][hit["rows"]].isnan().all()


@pytest.mark.parametrize("impl", ["reference", *GATHERING])
def test_logits_of_minus_infinity_leave_the_scores_their_gradient(impl):
    """A row that attends to nothing has edge scores all the same."""
    x = case(7, 8, 40, terms="gate key scores", eps=0.5)
    gone = torch.rand(x.bias.shape, generator=x.generator).to(DEVICE) < 0.3
    gone[x.target == x.target[0]] = True
    x = replace(x, bias=x.bias.masked_fill(gone, -torch.inf))
    laws.equals_its_oracle(EDGE_TERMS, impl, x)


@pytest.mark.parametrize("terms", ["", ALL_TERMS, TERMS_BY_HEAD + " scores", "attr-key attr-value"])
@pytest.mark.parametrize("impl", ["reference", *GATHERING])
def test_rows_that_attend_to_nothing_ignore_upstream_gradients(impl, terms):
    """Without edges, or with logits that are all -inf; the norm of such a row has NaN for one."""
    x = case(7, 8, 40, dtype=FP32, isolated=2, eps=1e-6, terms=terms)
    dead = x.target == x.target[0]
    x = replace(x, bias=x.bias.masked_fill(dead[:, None], -torch.inf))
    clean = evaluate(x, impl)
    do, dlse = x.do.clone(), x.dlse.clone()
    for rows in (x.isolated(), x.target[0]):
        do[rows], dlse[rows] = torch.nan, torch.nan
    same_bits(evaluate(replace(x, do=do, dlse=dlse), impl), clean)


@pytest.mark.parametrize("where", ["q", "edge_key_weight", "edge_value_weight"])
@pytest.mark.parametrize("impl", ["reference", *FAST])
def test_rows_without_edges_are_apart_from_the_low_rank_form(impl, where):
    """What they hold does not reach the weights, nor the weights them."""
    x = case(7, 8, 40, dtype=FP32, isolated=2, terms="attr-key attr-value")
    clean, alone = evaluate(x, impl), x.isolated()
    if where == "q":
        found = evaluate(replace(x, q=x.q.masked_fill(alone[:, None, None], torch.nan)), impl)
        same_bits(found, clean)
        return
    weight = x.terms[where].clone()
    weight[0, 0, 0] = torch.inf
    found = evaluate(replace(x, terms=x.terms | {where: weight}), impl)
    assert (found["o"][alone] == 0).all()
    assert (found["dq"][alone] == 0).all()


@pytest.mark.parametrize("upstream", ["scores", "o", "lse", "both"])
@pytest.mark.parametrize("terms", ["gate scores", "factor scores", "key scores", "scores"])
@pytest.mark.parametrize("impl", ["reference", *GATHERING])
def test_scores_used_alone_unused_and_with_the_output(impl, terms, upstream):
    x = case(9, 5, 16, heads=1, group=2, cols=4, d=4, dv=3, clamped=True, terms=terms, isolated=1)
    zero = {
        "scores": {"do": x.do * 0, "dlse": x.dlse * 0},
        "o": {"dscores": x.dscores * 0, "dlse": x.dlse * 0},
        "lse": {"dscores": x.dscores * 0, "do": x.do * 0},
        "both": {"dlse": x.dlse * 0},
    }[upstream]
    expected = loops(replace(x, **zero))
    y, leaves = with_leaves(x)
    o, lse, _, scores = attend(y, impl)
    pairs = {"scores": [(scores, x.dscores)], "o": [(o, x.do)], "lse": [(lse, x.dlse)]}
    pairs["both"] = pairs["scores"] + pairs["o"]
    ys, dys = zip(*pairs[upstream], strict=True)
    found = torch.autograd.grad(ys, list(leaves.values()), dys, materialize_grads=True)
    for name, grad in zip(leaves, found, strict=True):
        close(grad, expected[f"d{name}"], f"d{name}")


@pytest.mark.parametrize("terms", [ALL_TERMS, TERMS_BY_HEAD, "shared attr-value factor drop"])
@pytest.mark.parametrize("impl", FAST)
def test_every_gradient_alone(impl, terms):
    """What is asked for one input does not depend on what is asked for the others."""
    x = case(9, 5, 14, heads=1, group=2, cols=4, d=4, dv=3, clamped=True, eps=0.2, terms=terms)
    expected = loops(x)
    names = with_leaves(x)[1].keys()
    for wanted in [{name} for name in names] + [set(names) - {name} for name in names]:
        y, leaves = with_leaves(x, wanted=wanted)
        o, lse, _, *scores = attend(y, impl)
        outputs = [(o, x.do), (lse, x.dlse), *((t, x.dscores) for t in scores)]
        ys, dys = zip(*((y, dy) for y, dy in outputs if y.requires_grad), strict=True)
        inputs = {name: leaves[name] for name in sorted(wanted)}
        found = torch.autograd.grad(ys, list(inputs.values()), dys, materialize_grads=True)
        for name, grad in zip(inputs, found, strict=True):
            close(grad, expected[f"d{name}"], f"d{name} of {sorted(wanted)}")


@pytest.mark.parametrize("terms", [ALL_TERMS, TERMS_BY_HEAD])
@pytest.mark.parametrize("impl", ["reference", *FAST])
def test_gradcheck(impl, terms):
    terms = terms.replace("numbered", "drop")  # edges are added to those that numbers are for
    x = case(3, 4, 9, heads=1, group=2, cols=5, d=3, dv=2, clamped=True, eps=0.1, terms=terms)
    # every row needs an edge: the finite difference of an LSE of -inf is NaN
    edges = torch.cat([x.edge_index, torch.arange(4, device=DEVICE).repeat(2, 1)], 1)
    generator, count = x.generator, edges.shape[1]

    def more(t):
        rest = torch.randn((count - len(t), *t.shape[1:]), generator=generator, dtype=FP64)
        return torch.cat([t, rest.to(DEVICE)])

    grown = {n: t if n.endswith("weight") else more(t) for n, t in x.terms.items()}
    x = x.onto(edges, bias=more(x.bias), terms=grown)
    x, leaves = with_leaves(x)
    names = list(leaves)

    def f(*inputs):
        given = dict(zip(names, inputs, strict=True))
        plain = {n: given[n] for n in ("q", "k", "v", "bias")}
        return attend(replace(x, **plain, terms={n: given[n] for n in x.terms}), impl)[::3]

    assert torch.autograd.gradcheck(f, list(leaves.values()), fast_mode=True)
    assert torch.autograd.gradgradcheck(f, list(leaves.values()), fast_mode=True)


@pytest.mark.parametrize(
    "terms", [ALL_TERMS, TERMS_BY_HEAD, "shared attr-value factor", "attr-key"]
)
@pytest.mark.parametrize("impl", FAST)
def test_double_backward_equals_the_reference(impl, terms):
    x = case(2, 8, 24, cols=9, heads=2, group=2, d=5, dv=3, clamped=True, eps=0.3, terms=terms)
    laws.double_backward_equals_the_reference(EDGE_TERMS, impl, x)


@pytest.mark.parametrize("impl", ["reference", *GATHERING])
@pytest.mark.parametrize("p", [0.0, 1e-9, 0.25, 1 - 1e-9, 1.0])
def test_dropout_at_its_ends(impl, p):
    x = case(1, 8, 40)
    y = replace(x, options=x.options | {"dropout_p": p, "dropout_seed": 3})
    if round(p * 2**24) == 0:
        all_close(evaluate(y, impl), evaluate(x, impl))
        return
    found = evaluate(y, impl)
    if round(p * 2**24) == 2**24:
        for name in ("o", "dv"):
            assert (found[name] == 0).all()
        close(found["lse"], evaluate(x, impl)["lse"])
    all_close(found, evaluate(y, "reference"))


def test_the_mask_is_a_function_of_seed_edge_and_head():
    """Bits of the whole mask at once equal those of an edge alone, and of the oracle's."""
    from oracle import dropout_share

    for seed in (0, 1, 2**40 + 5, -3):
        key = torch.tensor([seed])
        mask = philox.kept(key, 70_000, 6, 0.3)
        for e, h in ((0, 0), (1, 5), (3, 4), (65_536, 3), (69_999, 1)):
            assert bool(mask[e, h]) == (dropout_share(seed % 2**64, e, h, 0.3) > 0)
        assert torch.equal(philox.kept(key, 10, 6, 0.3), mask[:10])
        assert torch.equal(philox.kept(key, 70_000, 3, 0.3), mask[:, :3])


def test_the_generator_gives_the_published_numbers():
    """Random123's known answers for philox4x32-10."""
    zero, ones = torch.zeros(1, dtype=torch.int64), torch.full((1,), 2**32 - 1)
    found = [int(x) for x in philox.words(zero, zero, zero, zero)]
    assert found == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    assert ones.dtype == torch.int64


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_weights_are_kept_as_often_as_they_should_be(p):
    edges, heads = 20_000, 5
    mask = philox.kept(torch.tensor([7]), edges, heads, p).double()
    # five standard deviations: of all, of each head, and of what two heads or edges have in common
    assert abs(mask.mean() - (1 - p)) < 5 * math.sqrt(p * (1 - p) / mask.numel())
    spread = 5 * math.sqrt(p * (1 - p) / edges)
    assert ((mask.mean(0) - (1 - p)).abs() < spread).all()
    centred = mask - (1 - p)
    for a, b in ((centred[:, 0], centred[:, 1]), (centred[1:, 0], centred[:-1, 0])):
        assert abs((a * b).mean()) < 5 * p * (1 - p) / math.sqrt(len(a))


@pytest.mark.parametrize("impl", IMPLS)
def test_dropout_follows_pytorchs_generator(impl):
    x = case(3, 8, 60, dtype=FP32)

    def run(**options):
        return neighborhood_attention(x.q, x.k, x.v, x.graph, dropout_p=0.5, impl=impl, **options)

    torch.manual_seed(5)
    first, second = run(), run()
    assert not torch.equal(first, second)
    torch.manual_seed(5)
    assert torch.equal(run(), first)
    assert torch.equal(run(), second)
    seeded = run(dropout_seed=9)
    torch.rand(3)
    assert torch.equal(run(dropout_seed=9), seeded)
    assert torch.equal(run(dropout_seed=torch.tensor(9, device=DEVICE)), seeded)
    torch.testing.assert_close(
        seeded,
        neighborhood_attention(
            x.q, x.k, x.v, x.graph, dropout_p=0.5, dropout_seed=9, impl="reference"
        ),
    )


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("impl", FAST)
def test_checkpointing_replays_dropout(impl, reentrant):
    x, leaves = with_leaves(case(3, 8, 30, dtype=FP32, terms="gate attr-value"))
    names = list(leaves)

    def f(*inputs):
        given = dict(zip(names, inputs, strict=True))
        terms = {name: given[name] for name in x.terms}
        return neighborhood_attention(
            given["q"].tanh(), given["k"], given["v"], x.graph, edge_bias=given["bias"], **terms,
            dropout_p=0.4, impl=impl,
        )  # fmt: skip

    torch.manual_seed(1)
    kept = checkpoint(f, *leaves.values(), use_reentrant=reentrant)
    kept.backward(x.do)
    torch.manual_seed(1)
    plain = torch.autograd.grad(f(*leaves.values()), list(leaves.values()), x.do)
    for leaf, b in zip(leaves.values(), plain, strict=True):
        assert torch.equal(leaf.grad, b)


@pytest.mark.parametrize("impl", FAST)
def test_one_edge_vector_in_two_places_has_one_gradient(impl):
    """And as two equal tensors it has two, which add up to it."""
    x = case(3, 8, 30, terms="shared", d=8)
    found = evaluate(x, impl)
    assert "dedge_value" not in found
    copy = x.terms["edge_key"].clone()
    apart = evaluate(replace(x, terms=x.terms | {"edge_value": copy}), impl)
    close(found["o"], apart["o"])
    close(found["dedge_key"], apart["dedge_key"] + apart["dedge_value"])


@pytest.mark.parametrize("impl", FAST)
def test_the_low_rank_form_is_the_edge_vector_it_stands_for(impl):
    x = case(3, 8, 30, d=6, dv=6, terms="attr-key attr-value")
    a, w_key, w_value = (
        x.terms[name] for name in ("edge_attr", "edge_key_weight", "edge_value_weight")
    )
    vectors = {
        "edge_key": torch.einsum("ec,chd->ehd", a, w_key),
        "edge_value": torch.einsum("ec,chd->ehd", a, w_value),
    }
    found, full = evaluate(x, impl), evaluate(replace(x, terms=vectors), impl)
    for name in ("o", "lse", "weights", "dq", "dk", "dv", "dbias"):
        close(found[name], full[name], name)
    close(found["dedge_key_weight"], torch.einsum("ec,ehd->chd", a, full["dedge_key"]))
    close(found["dedge_value_weight"], torch.einsum("ec,ehd->chd", a, full["dedge_value"]))


@pytest.mark.parametrize("name", ["cora", "zinc"])
def test_real_graphs(name):
    try:
        graph = PROBLEMS[name].load().to(DEVICE)
    except FileNotFoundError as error:
        pytest.skip(str(error))
    for terms in (ALL_TERMS, TERMS_BY_HEAD.replace("numbered", "drop")):
        x = case(0, 3, 2, heads=2, dtype=FP32, terms=terms)
        generator = torch.Generator().manual_seed(0)

        def tensor(t, graph=graph, generator=generator):
            size = {3: graph.num_rows, 2: graph.num_edges}.get(t.shape[0], t.shape[0])
            return torch.randn((size, *t.shape[1:]), generator=generator).to(DEVICE)

        made = {n: tensor(getattr(x, n)) for n in ("q", "k", "v", "bias", "do", "dlse")}
        dscores = None if x.dscores is None else tensor(x.dscores)
        grown = {n: t if n.endswith("weight") else tensor(t) for n, t in x.terms.items()}
        x = replace(
            x, graph=graph, edge_index=graph.edge_index, terms=grown, dscores=dscores, **made
        )
        laws.as_accurate_as_eager(EDGE_TERMS, FAST[0], x, of_outputs=3.0)


REFUSALS = {
    "gate of neither shape": (
        {"edge_gate": (6, 4, 7)},
        ValueError,
        r"edge_gate must be \[E, H\] = \[6, 4\] or \[E, H, D\] = \[6, 4, 8\], got \[6, 4, 7\]",
    ),
    "both gates": ({"edge_gate": [None, None]}, TypeError, "edge_gate must be a tensor, got list"),
    "edges of the gate": ({"edge_gate": (5, 4)}, ValueError, r"edge_gate must .* got \[5, 4\]"),
    "edges of the key": (
        {"edge_key": (5, 4, 8)},
        ValueError,
        r"edge_key must be \[E, H, D\] = \[6, 4, 8\], got \[5, 4, 8\]",
    ),
    "key head first": ({"edge_key": (4, 6, 8)}, ValueError, r"edge_key must .* got \[4, 6, 8\]"),
    "width of the value": (
        {"edge_value": (6, 4, 8)},
        ValueError,
        r"edge_value must be \[E, H, Dv\] = \[6, 4, 6\], got \[6, 4, 8\]",
    ),
    "weights without attributes": (
        {"edge_value_weight": (3, 4, 6)},
        ValueError,
        "edge_value_weight needs edge_attr, which is None",
    ),
    "attributes without weights": (
        {"edge_attr": (6, 3)},
        ValueError,
        "edge_attr needs edge_key_weight, edge_value_weight or both: both are None",
    ),
    "edges of the attributes": (
        {"edge_attr": (5, 3), "edge_key_weight": (3, 4, 8)},
        ValueError,
        r"edge_attr must be \[E, C\] = \[6, C\], got \[5, 3\]",
    ),
    "channels of a weight": (
        {"edge_attr": (6, 3), "edge_key_weight": (2, 4, 8)},
        ValueError,
        r"edge_key_weight must be \[C, H, D\] = \[3, 4, 8\], got \[2, 4, 8\]",
    ),
    "many channels": (
        {"edge_attr": (6, 257), "edge_key_weight": (257, 4, 8)},
        ValueError,
        "edge_attr has 257 channels; supported are 1 to 256",
    ),
    "dropout beyond 1": ({"dropout_p": 1.5}, ValueError, "dropout_p must be from 0 to 1, got 1.5"),
    "dropout below 0": ({"dropout_p": -0.1}, ValueError, "dropout_p must be from 0 to 1, got -0.1"),
    "dropout nan": ({"dropout_p": math.nan}, ValueError, "dropout_p must be from 0 to 1, got nan"),
    "dropout in words": ({"dropout_p": "half"}, TypeError, "dropout_p must be a number, got str"),
    "seed in words": (
        {"dropout_p": 0.5, "dropout_seed": "x"},
        TypeError,
        "dropout_seed must be an int or a tensor, got str",
    ),
    "many seeds": (
        {"dropout_p": 0.5, "dropout_seed": torch.zeros(2, dtype=torch.int64)},
        ValueError,
        r"dropout_seed must be one int64, got \[2\] of torch.int64",
    ),
    "large seed": (
        {"dropout_p": 0.5, "dropout_seed": 2**63},
        ValueError,
        "dropout_seed must fit in 64 bits, got 9223372036854775808",
    ),
}


@pytest.mark.parametrize("impl", [None, "reference"])
@pytest.mark.parametrize("refused", REFUSALS)
def test_refuses_by_name_and_numbers(refused, impl):
    changes, error, message = REFUSALS[refused]
    made = {n: torch.zeros(x, device=DEVICE) if type(x) is tuple else x for n, x in changes.items()}
    q, k, v = (torch.zeros(shape, device=DEVICE) for shape in ((5, 4, 8), (3, 2, 8), (3, 2, 6)))
    graph = random_graph(0, 5, 6, cols=3, device=DEVICE)
    with pytest.raises(error, match=message):
        neighborhood_attention(q, k, v, graph, **made, impl=impl)


@pytest.mark.parametrize("name", ["edge_gate", "edge_key", "edge_value", "edge_attr"])
def test_refuses_other_dtypes_and_devices(name):
    q = torch.zeros(5, 4, 8, device=DEVICE)
    graph = random_graph(0, 5, 6, device=DEVICE)
    x = torch.zeros((6, 3) if name == "edge_attr" else (6, 4, 8), device=DEVICE)
    rest = {"edge_key_weight": torch.zeros(3, 4, 8, device=DEVICE)} if name == "edge_attr" else {}
    neighborhood_attention(q, q, q, graph, **{name: x}, **rest)
    with pytest.raises(
        TypeError, match=rf"{name} is .*16 but q is .*32: pass {name}\.to\(q\.dtype\)"
    ):
        neighborhood_attention(q, q, q, graph, **{name: x.half()}, **rest)
    with pytest.raises(ValueError, match=f"{name} is on meta but q is on"):
        neighborhood_attention(q, q, q, graph, **{name: x.to("meta")}, **rest)
    with pytest.raises(TypeError, match=f"{name} must be a strided tensor, got torch.sparse_coo"):
        neighborhood_attention(q, q, q, graph, **{name: x.to_sparse()}, **rest)


def test_windows_take_a_bias_and_gather_the_rest():
    """A plan of windows holds for what windows have; with other edge tensors it says gather."""
    x = case(3, 20, 90, dtype=FP32, d=8, dv=8, terms="gate scores")
    graph = x.graph.plan("windows", height=16)
    assert graph.plan_for(8, FP32).path == "windows"
    chosen = graph.plan_for(8, FP32, more_than_bias=True)
    assert chosen.path == "gather"
    assert "gather" in str(chosen)
    assert "gather with edge vectors" in repr(graph)
    planned = replace(x, graph=graph)
    same_bits(evaluate(planned, "triton"), evaluate(x, "triton"))


def test_the_reference_has_the_same_defaults():
    x = case(6, 8, 30, terms="gate key value attr-key attr-value scores")
    args = (x.q, x.k, x.v, x.graph)
    direct = reference.neighborhood_attention(*args, **x.terms)
    close(direct, neighborhood_attention(*args, **x.terms, impl=FAST[0]))
    graph = Graph.from_edge_index(torch.zeros(2, 0, dtype=torch.int64, device=DEVICE), 8)
    none = {n: t if n.endswith("weight") else t[:0] for n, t in x.terms.items()}
    assert (neighborhood_attention(*args[:3], graph, **none, impl=FAST[0]) == 0).all()
