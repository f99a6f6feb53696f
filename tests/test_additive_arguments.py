"""additive_attention: what it takes, gives and refuses."""

import math

import pytest
import torch
from additive_cases import case
from attention_cases import BF16, DEVICE, FAST, FP16, FP32, FP64, IMPLS, close

from fastgt import Aux, AuxRequest, additive_attention, reference
from fastgt.testing import random_graph


@pytest.mark.parametrize("impl", IMPLS)
def test_extras_follow_the_output(impl):
    x = case(1, 6, 15, dtype=BF16, terms="")
    args = x.q.requires_grad_(), x.k, x.v, x.graph, x.weight
    o = additive_attention(*args, impl=impl)
    assert isinstance(o, torch.Tensor)
    request = AuxRequest(lse=True, weights=True)
    out, aux = additive_attention(*args, return_aux=request, impl=impl)
    assert aux.edge_scores is None
    both = out, aux.lse, aux.weights
    assert [y.dtype for y in both] == [BF16, FP32, BF16]
    assert [list(y.shape) for y in both] == [[6, 2, 4], [6, 2], [15, 2]]
    assert [y.requires_grad for y in both] == [True, True, False]
    assert torch.equal(out, o)
    for name in ("lse", "weights"):
        found, only = additive_attention(*args, return_aux=AuxRequest(**{name: True}), impl=impl)
        assert torch.equal(found, o)
        assert torch.equal(getattr(only, name), getattr(aux, name))
    found, none = additive_attention(*args, return_aux=AuxRequest(), impl=impl)
    assert torch.equal(found, o)
    assert none == Aux()


def test_the_reference_has_the_same_defaults():
    x = case(6, 7, 25, terms="")
    call = x.q, x.k, x.v, x.graph, x.weight
    for options in ({}, {"negative_slope": 0.7}, {"dropout_p": 0.5, "dropout_seed": 4}):
        direct = reference.additive_attention(*call, **options)
        close(direct, additive_attention(*call, impl=FAST[0], **options))


def zeros(*shape, dtype=FP32, device=DEVICE):
    return torch.zeros(shape, dtype=dtype, device=device)


REFUSALS = {
    "no graph": ({"graph": zeros(2, 6)}, TypeError, "graph must be a fastgt.Graph, got Tensor"),
    "rows": ({"q": zeros(4, 2, 3)}, ValueError, "q has 4 rows but the graph has 5 rows"),
    "columns": ({"k": zeros(4, 2, 3)}, ValueError, "k has 4 rows but the graph has 3 columns"),
    "width": ({"k": zeros(3, 2, 4)}, ValueError, "k has head width 4 but q has 3"),
    "shared heads": (
        {"k": zeros(3, 1, 3), "v": zeros(3, 1, 4)},
        ValueError,
        "k has 1 heads but q has 2: in additive_attention no heads are shared",
    ),
    "wide": ({"v": zeros(3, 2, 257)}, ValueError, "v has head width 257; supported are 1 to 256"),
    "weight": (
        {"weight": zeros(2, 4)},
        ValueError,
        r"weight must be \[H, D\] = \[2, 3\], got \[2, 4\]",
    ),
    "no weight": ({"weight": None}, TypeError, "weight must be a tensor, got NoneType"),
    "dtype of the weight": (
        {"weight": zeros(2, 3, dtype=FP64)},
        TypeError,
        "weight is .*float64 but q is .*float32",
    ),
    "edge keys": (
        {"edge_key": zeros(7, 2, 3)},
        ValueError,
        r"edge_key must be \[E, H, D\] = \[6, 2, 3\], got \[7, 2, 3\]",
    ),
    "dtype of edge keys": (
        {"edge_key": zeros(6, 2, 3, dtype=FP16)},
        TypeError,
        "edge_key is .*float16 but q is .*float32",
    ),
    "edge bias": (
        {"edge_bias": zeros(6, 3)},
        ValueError,
        r"edge_bias must be \[E, H\] = \[6, 2\], got \[6, 3\]",
    ),
    "attributes alone": (
        {"edge_attr": zeros(6, 4)},
        ValueError,
        "edge_attr needs edge_key_weight, which is None",
    ),
    "their weight alone": (
        {"edge_key_weight": zeros(4, 2, 3)},
        ValueError,
        "edge_key_weight needs edge_attr, which is None",
    ),
    "channels of attributes": (
        {"edge_attr": zeros(6, 5), "edge_key_weight": zeros(4, 2, 3)},
        ValueError,
        r"edge_key_weight must be \[C, H, D\] = \[5, 2, 3\], got \[4, 2, 3\]",
    ),
    "device": (
        {name: zeros(n, 2, 3, device="meta") for name, n in (("q", 5), ("k", 3), ("v", 3))},
        ValueError,
        "graph is on .* but q is on meta",
    ),
    "slope": ({"negative_slope": math.nan}, ValueError, "negative_slope must be finite, got nan"),
    "slope tensor": (
        {"negative_slope": zeros()},
        TypeError,
        "negative_slope must be a number, got Tensor",
    ),
    "dropout": ({"dropout_p": 1.5}, ValueError, "dropout_p must be from 0 to 1, got 1.5"),
    "gate": (
        {"head_gate": zeros(3)},
        ValueError,
        r"head_gate must be \[H\] = \[2\] or \[G, H\] = \[1, 2\], got \[3\]",
    ),
    "impl": ({"impl": "cuda"}, ValueError, "impl must be one of .* got 'cuda'"),
    "edge scores": (
        {"return_aux": AuxRequest(lse=True, edge_scores=True)},
        ValueError,
        "return_aux: additive_attention has no edge_scores; it has lse, weights",
    ),
    "no request": ({"return_aux": True}, TypeError, "return_aux must be an AuxRequest, got bool"),
}


@pytest.mark.parametrize("impl", [None, "reference"])
@pytest.mark.parametrize("refused", REFUSALS)
def test_refuses_by_name_and_numbers(refused, impl):
    changes, error, message = REFUSALS[refused]
    fitting = {
        "q": zeros(5, 2, 3),
        "k": zeros(3, 2, 3),
        "v": zeros(3, 2, 4),
        "graph": random_graph(0, 5, 6, cols=3, device=DEVICE),
        "weight": zeros(2, 3),
        "impl": impl,
    }
    additive_attention(**fitting)
    with pytest.raises(error, match=message):
        additive_attention(**fitting | changes)
