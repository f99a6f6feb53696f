"""channelwise_attention: what it takes, gives and refuses."""

import math

import pytest
import torch
from attention_cases import BF16, DEVICE, FAST, FP16, FP32, FP64, IMPLS, close
from channelwise_cases import case

from fastgt import Aux, AuxRequest, channelwise_attention, reference
from fastgt.testing import random_graph


@pytest.mark.parametrize("impl", IMPLS)
def test_extras_follow_the_output(impl):
    x = case(1, 6, 15, dtype=BF16, channels=(2, 3))
    args = x.logits.requires_grad_(), x.v, x.graph
    o = channelwise_attention(*args, impl=impl)
    assert isinstance(o, torch.Tensor)
    request = AuxRequest(lse=True, weights=True)
    out, aux = channelwise_attention(*args, return_aux=request, impl=impl)
    assert aux.edge_scores is None
    both = out, aux.lse, aux.weights
    assert [y.dtype for y in both] == [BF16, FP32, BF16]
    assert [list(y.shape) for y in both] == [[6, 2, 3], [6, 2, 3], [15, 2, 3]]
    assert [y.requires_grad for y in both] == [True, True, False]
    assert [y.is_contiguous() for y in both] == [True] * 3
    for name in ("lse", "weights"):
        request = AuxRequest(**{name: True})
        found, only = channelwise_attention(*args, return_aux=request, impl=impl)
        assert torch.equal(found, o)
        assert torch.equal(getattr(only, name), getattr(aux, name))
        assert [x is None for x in only] == [not asked for asked in request]
    found, none = channelwise_attention(*args, return_aux=AuxRequest(), impl=impl)
    assert torch.equal(found, o)
    assert none == Aux()


def test_the_reference_has_the_same_defaults():
    x = case(6, 7, 25)
    for options in ({}, {"logit_clamp": 0.3}, {"logit_clamp": (-0.1, 0.5)}):
        direct = reference.channelwise_attention(x.logits, x.v, x.graph, **options)
        close(direct, channelwise_attention(x.logits, x.v, x.graph, impl=FAST[0], **options))


def zeros(*shape, dtype=FP32, device=DEVICE):
    return torch.zeros(shape, dtype=dtype, device=device)


REFUSALS = {
    "no graph": ({"graph": zeros(2, 6)}, TypeError, "graph must be a fastgt.Graph, got Tensor"),
    "no values": (
        {"v": None, "edge_value": None},
        ValueError,
        "v and edge_value are both None: give at least one of them",
    ),
    "no logits": ({"logits": None}, TypeError, "logits must be a tensor, got NoneType"),
    "no tensor v": ({"v": [1.0]}, TypeError, "v must be a tensor, got list"),
    "edges": ({"logits": zeros(5, 8)}, ValueError, "logits has 5 rows but the graph has 6 edges"),
    "columns": ({"v": zeros(5, 8)}, ValueError, "v has 5 rows but the graph has 3 columns"),
    "edges of values": (
        {"edge_value": zeros(7, 8)},
        ValueError,
        "edge_value has 7 rows but the graph has 6 edges",
    ),
    "channels of v": (
        {"v": zeros(3, 7)},
        ValueError,
        r"v has channels \[7\] but logits has \[8\]",
    ),
    "channels of values": (
        {"edge_value": zeros(6, 2, 4)},
        ValueError,
        r"edge_value has channels \[2, 4\] but logits has \[8\]",
    ),
    "no channels": (
        {"logits": zeros(6, 0), "v": zeros(3, 0), "edge_value": None},
        ValueError,
        r"logits has no channels: \[6, 0\]",
    ),
    "dimensions": (
        {"logits": zeros(6)},
        ValueError,
        r"logits must be \[E, C\] or \[E, H, D\], got \[6\]",
    ),
    "dimensions of v": (
        {"v": zeros(3, 2, 2, 2)},
        ValueError,
        r"v must be \[N_cols, C\] or \[N_cols, H, D\], got \[3, 2, 2, 2\]",
    ),
    "integers": (
        {"logits": zeros(6, 8, dtype=torch.int64)},
        TypeError,
        "logits must be float16, .* got torch.int64",
    ),
    "sparse": ({"v": zeros(3, 8).to_sparse()}, TypeError, "v must be a strided tensor, got"),
    "dtype of v": ({"v": zeros(3, 8, dtype=FP64)}, TypeError, "v is .*float64 but logits is .*32"),
    "dtype of values": (
        {"edge_value": zeros(6, 8, dtype=FP16)},
        TypeError,
        "edge_value is .*float16 but logits is .*float32",
    ),
    "device of v": (
        {"v": zeros(3, 8, device="meta")},
        ValueError,
        "v is on meta but logits is on",
    ),
    "device of the graph": (
        {"logits": zeros(6, 8, device="meta"), "v": None, "edge_value": zeros(6, 8, device="meta")},
        ValueError,
        "graph is on .* but logits is on meta",
    ),
    "negative eps": ({"denominator_eps": -1.0}, ValueError, "denominator_eps .* got -1.0"),
    "eps nan": ({"denominator_eps": math.nan}, ValueError, "denominator_eps .* got nan"),
    "eps none": ({"denominator_eps": None}, TypeError, "denominator_eps must .* got NoneType"),
    "clamp upside down": (
        {"logit_clamp": (3.0, -2.0)},
        ValueError,
        r"logit_clamp must have low <= high, got \(3.0, -2.0\)",
    ),
    "clamp of three": ({"logit_clamp": (0, 1, 2)}, ValueError, "logit_clamp .* got 3 numbers"),
    "clamp tensor": ({"logit_clamp": zeros()}, TypeError, "logit_clamp must be a number, got T"),
    "impl": ({"impl": "cuda"}, ValueError, "impl must be one of .* got 'cuda'"),
    "edge scores": (
        {"return_aux": AuxRequest(lse=True, edge_scores=True)},
        ValueError,
        "return_aux: channelwise_attention has no edge_scores; it has lse, weights",
    ),
    "no request": ({"return_aux": True}, TypeError, "return_aux must be an AuxRequest, got bool"),
}


@pytest.mark.parametrize("impl", [None, "reference"])
@pytest.mark.parametrize("refused", REFUSALS)
def test_refuses_by_name_and_numbers(refused, impl):
    changes, error, message = REFUSALS[refused]
    fitting = {
        "logits": zeros(6, 8),
        "v": zeros(3, 8),
        "graph": random_graph(0, 5, 6, cols=3, device=DEVICE),
        "edge_value": zeros(6, 8),
        "impl": impl,
    }
    channelwise_attention(**fitting)
    with pytest.raises(error, match=message):
        channelwise_attention(**fitting | changes)


def test_heads_of_any_width():
    """What neighborhood_attention has no kernel for: 600 channels are 600 softmaxes."""
    graph = random_graph(0, 7, 20)
    logits, v = torch.randn(20, 1, 600), torch.randn(7, 1, 600)
    whole = channelwise_attention(logits, v, graph, impl="cpp")
    split = (x.view(len(x), 3, 200) for x in (logits, v))
    parts = channelwise_attention(*split, graph, impl="reference")
    assert torch.allclose(whole.flatten(1), parts.flatten(1), atol=1e-6)
