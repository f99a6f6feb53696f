"""channelwise_attention: which gradients there are, twice, and what they equal."""

import itertools
import math
from dataclasses import replace

import laws
import pytest
import torch
from attention_cases import DEVICE, FAST, FP32, FP64
from channelwise_cases import ALL, CHANNELWISE, attend, case, walks

from fastgt import channelwise_attention
from fastgt.contract import ChannelwiseLogit, ChannelwiseUpstream, HeadMask
from fastgt.ops.channelwise_attention import _launch_bwd, _launch_fwd
from fastgt.prepared import Prepared
from fastgt.testing import random_graph


@pytest.mark.parametrize("impl", ALL)
def test_gradcheck(impl):
    x = case(3, 3, 7, cols=4, clamped=True, eps=0.1, channels=(2,))
    # every row needs an edge: the finite difference of an LSE of -inf is NaN
    every = torch.arange(3, device=DEVICE).repeat(2, 1)
    x = x.onto(torch.cat([x.edge_index, every], 1))
    extra = [torch.randn(3, 2, generator=x.generator, dtype=FP64).to(DEVICE) for _ in range(2)]
    tensors = torch.cat([x.logits, extra[0]]), x.v, torch.cat([x.edge_value, extra[1]])
    inputs = [t.detach().requires_grad_() for t in tensors]

    def f(logits, v, edge_value):
        return attend(replace(x, logits=logits, v=v, edge_value=edge_value), impl)[:2]

    fast = impl in ("triton", "buckets") and DEVICE == "cpu"
    assert torch.autograd.gradcheck(f, inputs, fast_mode=fast)
    assert torch.autograd.gradgradcheck(f, inputs, fast_mode=True)


@pytest.mark.parametrize("twice", [False, True], ids=["once", "create_graph"])
@pytest.mark.parametrize("upstream", ["o", "lse", "both"])
@pytest.mark.parametrize("impl", ALL)
def test_every_subset_of_gradients(impl, upstream, twice):
    x = case(9, 5, 14, cols=4, clamped=True, eps=0.2, isolated=1, channels=(3,))
    outputs = ["o", "lse"] if upstream == "both" else [upstream]
    laws.every_subset_of_gradients(CHANNELWISE, impl, x, outputs, twice=twice)


@pytest.mark.parametrize("impl", FAST)
def test_nothing_is_computed_for_gradients_not_asked_for(impl):
    x = case(0, 5, 12, channels=(2,))
    rows, columns = walks(x.graph, impl)
    logit = ChannelwiseLogit(-math.inf, math.inf, 0.0)
    given = x.logits, x.v, x.edge_value, *HeadMask(None, None)
    *_, weights, nothing = _launch_fwd(impl, *given, rows, *logit, False, False)
    assert nothing.numel() == weights.numel() == 0
    *_, stat = _launch_fwd(impl, *given, rows, *logit, True, False)
    for needs in itertools.product([False, True], repeat=3):
        for dlse in (None, x.dlse):
            upstream = ChannelwiseUpstream(x.do, dlse, stat)
            grads = _launch_bwd(impl, *upstream, *given, rows, columns, *logit, *needs)
            for need, grad in zip(needs, grads, strict=True):
                assert bool(grad.numel()) == need
                assert not grad.isnan().any()


@pytest.mark.parametrize("impl", FAST)
def test_inference_never_sorts_the_column_walk(impl):
    x = case(0, 5, 12, dtype=FP32)
    channelwise_attention(x.logits, x.v, x.graph, impl=impl)
    logits = x.logits.requires_grad_()
    with torch.no_grad():
        channelwise_attention(logits, x.v, x.graph, impl=impl)
    channelwise_attention(logits, x.v, x.graph, impl=impl).sum().backward()
    assert vars(x.graph.prepared) == vars(Prepared())


@pytest.mark.parametrize("impl", FAST)
def test_double_backward_equals_the_reference(impl):
    x = case(2, 7, 24, cols=8, clamped=True, eps=0.3, isolated=1, channels=(2, 2))
    laws.double_backward_equals_the_reference(CHANNELWISE, impl, x)


@pytest.mark.parametrize("impl", FAST)
def test_create_graph_where_one_input_was_made_from_another(impl):
    graph = random_graph(0, 6, 20, device=DEVICE)
    x = torch.randn(20, 4, generator=torch.Generator().manual_seed(0), dtype=FP64).to(DEVICE)

    def f(x, impl):
        return channelwise_attention(x, None, graph, edge_value=x.sin(), impl=impl)

    laws.gradients_through_one_tensor_equal_the_reference(f, impl, x)


@pytest.mark.parametrize("impl", FAST)
def test_forward_mode_is_refused_not_zero(impl):
    laws.forward_mode_is_refused_not_zero(CHANNELWISE, impl, case(0, 6, 20))
