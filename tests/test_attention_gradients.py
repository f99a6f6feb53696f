"""neighborhood_attention: first and second gradients, in every combination."""

import itertools
from dataclasses import replace

import pytest
import torch
from attention_cases import (
    BF16,
    DEVICE,
    FAST,
    FAST_WAYS,
    FP16,
    FP32,
    FP64,
    LAYOUTS,
    all_close,
    arrange,
    attend,
    case,
    close,
    evaluate,
    loops,
    op_arguments,
    same_bits,
)

from fastgt import Graph, neighborhood_attention
from fastgt.contract import EdgeTerms, Inputs, Saved, Upstream
from fastgt.testing import random_graph


@pytest.mark.parametrize("impl", ["reference", *FAST_WAYS])
def test_gradcheck(impl):
    x = case(3, 4, 9, heads=1, group=2, cols=5, d=3, dv=2, clamped=True, eps=0.1)
    # every row needs an edge: the finite difference of an LSE of -inf is NaN
    x = x.onto(torch.cat([x.edge_index, torch.arange(4, device=DEVICE).repeat(2, 1)], 1))
    generator = x.generator
    x.bias = torch.randn(x.graph.num_edges, 2, generator=generator, dtype=FP64).to(DEVICE)
    inputs = [t.detach().requires_grad_() for t in (x.q, x.k, x.v, x.bias)]

    def f(q, k, v, bias):
        return attend(replace(x, q=q, k=k, v=v, bias=bias), impl)[:2]

    fast = impl == "triton" and DEVICE == "cpu"
    assert torch.autograd.gradcheck(f, inputs, fast_mode=fast)
    assert torch.autograd.gradgradcheck(f, inputs, fast_mode=True)


@pytest.mark.parametrize("twice", [False, True], ids=["once", "create_graph"])
@pytest.mark.parametrize("upstream", ["o", "lse", "both"])
@pytest.mark.parametrize("impl", ["reference", *FAST_WAYS])
def test_every_subset_of_gradients(impl, upstream, twice):
    """Asked for alone or together, through the output, the LSE or both: always the same."""
    x = case(
        9, 5, 14, heads=1, group=2, cols=4, d=4, dv=3, clamped=True, eps=0.2, isolated=1, scale=0.7
    )
    zero = {"o": {"dlse": x.dlse * 0}, "lse": {"do": x.do * 0}, "both": {}}[upstream]
    expected = loops(replace(x, **zero))
    for wanted in itertools.product([False, True], repeat=4):
        few = impl == "triton" and DEVICE == "cpu" and sum(wanted) in (2, 3)
        if not any(wanted) or few:
            continue
        leaves = dict(zip(("q", "k", "v", "bias"), wanted, strict=True))
        leaves = {
            name: getattr(x, name).detach().clone().requires_grad_(need)
            for name, need in leaves.items()
        }
        o, lse, _ = attend(replace(x, **leaves), impl)
        pairs = {"o": [(o, x.do)], "lse": [(lse, x.dlse)], "both": [(o, x.do), (lse, x.dlse)]}[
            upstream
        ]
        inputs = {name: t for name, t in leaves.items() if t.requires_grad}
        if impl == "reference":  # in plain autograd the LSE has no connection to v
            pairs = [(y, dy) for y, dy in pairs if y.requires_grad]
            if not pairs:
                continue
        outputs, upstreams = zip(*pairs, strict=True)
        found = torch.autograd.grad(
            outputs,
            list(inputs.values()),
            upstreams,
            create_graph=twice,
            materialize_grads=impl == "reference",
        )
        for name, grad in zip(inputs, found, strict=True):
            close(grad, expected[f"d{name}"], f"d{name} of {list(inputs)}")


@pytest.mark.parametrize("path", ["torch", "gather", "windows"] if DEVICE == "cpu" else ["gather"])
def test_nothing_is_computed_for_gradients_not_asked_for(path):
    x = case(0, 5, 12)
    graph, height = x.graph, 16 if path == "windows" else 0
    rows, columns = (graph.row_ptr, graph.col, graph.edge), tuple(graph.columns)
    if path != "torch":
        graph = graph.plan(path, height=height or None)
        rows, columns = graph.row_walk(graph.settled), graph.column_walk(graph.settled)
    flat = op_arguments(Inputs(x.q, x.k, x.v), terms=EdgeTerms(x.bias))
    o, lse, *_ = torch.ops.fastgt.attention_fwd(path, height, rows, *flat)
    for needs in itertools.product([False, True], repeat=4):
        needs = (*needs, *[False] * 5)
        given = *Upstream(x.do, x.dlse, None, None), *Saved(lse, o if height else None, None)
        grads = torch.ops.fastgt.attention_bwd(path, height, rows, columns, needs, *given, *flat)
        for need, grad in zip(needs, grads, strict=True):
            assert (grad is not None) == need
            assert grad is None or (grad.numel() and not grad.isnan().any())


@pytest.mark.parametrize("impl", FAST)
def test_double_backward_equals_the_reference(impl):
    def second(impl):
        x = case(
            2,
            8,
            24,
            cols=9,
            heads=2,
            group=2,
            d=5,
            dv=3,
            clamped=True,
            eps=0.3,
            isolated=1,
            scale=0.7,
        )
        leaves = [t.detach().requires_grad_() for t in (x.q, x.k, x.v, x.bias, x.do)]
        o, lse, _ = attend(replace(x, q=leaves[0], k=leaves[1], v=leaves[2], bias=leaves[3]), impl)
        loss = (o * leaves[4]).sum() + lse[~x.isolated()].square().sum()
        first = torch.autograd.grad(loss, leaves[:4], create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in first), leaves)

    for a, b in zip(second(impl), second("reference"), strict=True):
        close(a, b)


@pytest.mark.parametrize("layout", [*LAYOUTS, "scalar"])
@pytest.mark.parametrize("impl", FAST_WAYS)
def test_strides_of_upstream_gradients(impl, layout):
    x = case(6, 7, 30, heads=3, d=5, dv=6)
    if layout == "scalar":
        one = torch.ones((), dtype=FP64, device=DEVICE)
        do, dlse = one.expand(x.do.shape), one.expand(x.dlse.shape)
    else:
        do, dlse = arrange(x.do, layout), arrange(x.dlse, layout)
    x = replace(x, do=do, dlse=dlse)
    all_close(evaluate(x, impl), loops(x))


@pytest.mark.parametrize("impl", FAST)
def test_create_graph_where_one_input_was_made_from_another(impl):
    """Self-attention on one tensor, keys made from queries, a bias from both."""
    graph = random_graph(0, 6, 20, device=DEVICE)
    key, query = graph.edge_index
    x = torch.randn(6, 2, 4, generator=torch.Generator().manual_seed(0), dtype=FP64).to(DEVICE)
    for make in (
        lambda x: (x, x, x, None),
        lambda x: (x, 2 * x, x.sin(), None),
        lambda x: (x, x, x, (x[query] - x[key]).square().sum(-1)),
    ):
        found = []
        for chosen in (impl, "reference"):
            leaf = x.clone().requires_grad_()
            q, k, v, bias = make(leaf)
            o = neighborhood_attention(q, k, v, graph, edge_bias=bias, impl=chosen)
            first = torch.autograd.grad(o.square().sum(), leaf, create_graph=True)[0]
            found.append((first, torch.autograd.grad(first.cos().sum(), leaf)[0]))
        for a, b in zip(*found, strict=True):
            close(a, b)


@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
@pytest.mark.parametrize("impl", FAST)
def test_create_graph_keeps_its_sums_in_float32(impl, dtype):
    edges = 300
    target = torch.zeros(edges, dtype=torch.int64)
    graph = Graph.from_edge_index(torch.stack([torch.arange(edges), target]).to(DEVICE), (1, edges))
    generator = torch.Generator().manual_seed(0)
    shapes = (1, 2, 8), (edges, 2, 8), (edges, 2, 8), (1, 2, 8)
    q, k, v, do = (torch.randn(s, generator=generator).to(DEVICE, dtype) for s in shapes)
    leaves = [t.requires_grad_() for t in (q, k, v + 5)]
    o = neighborhood_attention(*leaves, graph, impl=impl)
    once = torch.autograd.grad(o, leaves, do, retain_graph=True)
    for a, b in zip(torch.autograd.grad(o, leaves, do, create_graph=True), once, strict=True):
        assert a.dtype == dtype
        torch.testing.assert_close(a, b, rtol=4 * torch.finfo(dtype).eps, atol=1e-4)


@pytest.mark.parametrize("impl", FAST)
def test_forward_mode_is_refused_not_zero(impl):
    graph = random_graph(0, 6, 20, device=DEVICE)
    x = torch.randn(6, 2, 4, dtype=FP64, device=DEVICE)

    def f(q, impl):
        return neighborhood_attention(q, q, q, graph, impl=impl)

    tangent = torch.func.jvp(lambda q: f(q, "reference"), (x,), (x.cos(),))[1]
    close(tangent, torch.autograd.functional.jvp(lambda q: f(q, impl), x, x.cos())[1])
    with pytest.raises(NotImplementedError, match="impl='reference' only"):
        torch.func.jvp(lambda q: f(q, impl), (x,), (x.cos(),))


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("impl", FAST_WAYS)
def test_rows_that_attend_to_nothing_ignore_their_upstream_gradients(impl, value):
    """Without edges, or with logits that are all -inf: the norm of such a row has no gradient."""
    x = case(7, 8, 40, dtype=FP32, isolated=2, eps=1e-6)
    alone = x.isolated()
    dead = x.target == x.target[0]
    x = replace(x, bias=x.bias.masked_fill(dead[:, None], -torch.inf))
    clean = evaluate(x, impl)
    dlse, do = x.dlse.clone(), x.do.clone()
    dlse[alone], do[alone], dlse[x.target[0]] = value, value, value
    same_bits(evaluate(replace(x, do=do, dlse=dlse), impl), clean)
