"""neighborhood_attention: first and second gradients, in every combination."""

import itertools
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
    LAYOUTS,
    attend,
    case,
    evaluate,
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
    shape = {"heads": 1, "group": 2, "cols": 4, "d": 4, "dv": 3}
    x = case(9, 5, 14, clamped=True, eps=0.2, isolated=1, scale=0.7, **shape)
    outputs = ["o", "lse"] if upstream == "both" else [upstream]
    few = impl == "triton" and DEVICE == "cpu"
    skip = (2, 3) if few else ()
    laws.every_subset_of_gradients(ATTENTION, impl, x, outputs, twice=twice, skip=skip)


@pytest.mark.parametrize("path", ["cpp", "gather", "windows"] if DEVICE == "cpu" else ["gather"])
def test_nothing_is_computed_for_gradients_not_asked_for(path):
    x = case(0, 5, 12)
    graph, height = x.graph, 16 if path == "windows" else 0
    rows, columns = (graph.row_ptr, graph.col, graph.edge), tuple(graph.columns)
    if path != "cpp":
        graph = graph.plan(path, height=height or None)
        rows, columns = graph.row_walk(graph.settled), graph.column_walk(graph.settled)
    flat = op_arguments(Inputs(x.q, x.k, x.v), terms=EdgeTerms(x.bias))
    o, lse, *_ = torch.ops.fastgt.attention_fwd(path, height, rows, *flat)
    for needs in itertools.product([False, True], repeat=4):
        needs = (*needs, *[False] * 5)
        given = *Upstream(x.do, x.dlse, None, None), *Saved(lse, o if height else None)
        grads = torch.ops.fastgt.attention_bwd(path, height, rows, columns, needs, *given, *flat)
        for need, grad in zip(needs, grads, strict=True):
            assert (grad is not None) == need
            assert grad is None or (grad.numel() and not grad.isnan().any())


@pytest.mark.parametrize("impl", FAST)
def test_double_backward_equals_the_reference(impl):
    shape = {"heads": 2, "group": 2, "cols": 9, "d": 5, "dv": 3}
    x = case(2, 8, 24, clamped=True, eps=0.3, isolated=1, scale=0.7, **shape)
    laws.double_backward_equals_the_reference(ATTENTION, impl, x)


@pytest.mark.parametrize("layout", [*LAYOUTS, "scalar"])
@pytest.mark.parametrize("impl", FAST_WAYS)
def test_strides_of_upstream_gradients(impl, layout):
    x = laws.with_upstream(case(6, 7, 30, heads=3, d=5, dv=6), layout)
    laws.equals_its_oracle(ATTENTION, impl, x)


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

        def f(x, impl, make=make):
            q, k, v, bias = make(x)
            return neighborhood_attention(q, k, v, graph, edge_bias=bias, impl=impl)

        laws.gradients_through_one_tensor_equal_the_reference(f, impl, x)


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
    laws.forward_mode_is_refused_not_zero(ATTENTION, impl, case(0, 6, 20, d=4))


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
