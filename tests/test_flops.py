"""FlopCounterMode counts every registered op, as PyTorch counts its own."""

import os
import subprocess
import sys

import pytest
import torch
from attention_cases import DEVICE, FAST
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import linear, scaled_dot_product_attention
from torch.utils import flop_counter
from torch.utils.flop_counter import FlopCounterMode

from fastgt import (
    AuxRequest,
    Graph,
    additive_attention,
    aggregate,
    channelwise_attention,
    gated_aggregate,
    global_attention,
    head_projection,
    linear_attention,
    neighborhood_attention,
    segment_softmax,
)
from fastgt.nn import HeadGate, NeighborhoodAttention, random_features
from fastgt.testing import random_graph

N, E, H, D, DV = 12, 50, 3, 5, 7


def count(function, backward=False):
    """The products of a call, or of the backward of its sum."""
    if not backward:
        with FlopCounterMode(display=False) as counter:
            function()
        return counter.get_total_flops()
    out = function()
    out = out[0] if isinstance(out, tuple) else out
    with FlopCounterMode(display=False) as counter:
        out.backward(torch.ones_like(out))
    return counter.get_total_flops()


def draw(*shape, grad=True):
    return torch.randn(shape, device=DEVICE, requires_grad=grad)


def graph():
    return random_graph(0, N, E, device=DEVICE)


def test_every_registered_op_has_a_formula():
    ops = {
        name.partition("::")[2].partition(".")[0]
        for name in torch._C._dispatch_get_all_op_names()
        if name.startswith("fastgt::")
    }
    assert {"attention_fwd", "linear_attention_bwd", "head_outer"} <= ops
    for name in ops:
        assert getattr(torch.ops.fastgt, name) in flop_counter.flop_registry, name


@pytest.mark.parametrize("impl", FAST)
def test_attention_on_a_complete_graph_counts_what_pytorchs_does(impl):
    everyone = torch.ones(N, N, dtype=torch.bool, device=DEVICE)
    complete = Graph.from_dense(everyone)
    q, k, v = draw(N, H, D), draw(N, H, D), draw(N, H, DV)
    shapes = [(1, H, N, D), (1, H, N, D), (1, H, N, DV)]

    def ours():
        return neighborhood_attention(q, k, v, complete, impl=impl)

    def theirs():
        with sdpa_kernel(SDPBackend.MATH):
            return scaled_dot_product_attention(*(x.transpose(0, 1)[None] for x in (q, k, v)))

    assert count(ours) == count(theirs)
    assert count(ours) == flop_counter.sdpa_flop_count(*shapes)
    backward = flop_counter.sdpa_backward_flop_count((1, H, N, DV), *shapes)
    assert count(ours, backward=True) == backward


@pytest.mark.parametrize("impl", FAST)
def test_attention_counts_its_edges(impl):
    """Two products an edge and head: also where key heads are shared, and heads are masked."""
    q, k, v = draw(N, 4, D), draw(N, 2, D), draw(N, 2, DV)
    bias, gate = draw(E, 4), torch.tensor([0.0, 1.0, 0.0, 2.0], device=DEVICE)

    def attend(**terms):
        return lambda: neighborhood_attention(q, k, v, graph(), impl=impl, **terms)

    request = AuxRequest(lse=True)
    for terms in ({}, {"edge_bias": bias}, {"head_gate": gate}, {"return_aux": request}):
        assert count(attend(**terms)) == 2 * E * 4 * (D + DV)
        assert count(attend(**terms), backward=True) == 2 * E * 4 * (3 * D + 2 * DV)
    with torch.no_grad():
        assert count(attend()) == 2 * E * 4 * (D + DV)


@pytest.mark.skipif("triton" not in FAST, reason="plans are those of Triton's kernels")
def test_every_path_of_the_kernels_counts_the_same():
    q = draw(N, H, D)
    for plan in ({"path": "gather"}, {"path": "windows", "height": 16}):
        planned = graph().plan(**plan)

        def attend(planned=planned):
            return neighborhood_attention(q, q, q, planned, impl="triton")

        assert count(attend) == 2 * E * H * 2 * D
        assert count(attend, backward=True) == 2 * E * H * 5 * D


@pytest.mark.parametrize(
    ("needed", "wanted"),
    [
        ("q", 2 * D + DV),
        ("k", 2 * D + DV),
        ("v", D + DV),
        ("qk", 3 * D + DV),
        ("b", D + DV),
        ("qkvb", 3 * D + 2 * DV),
    ],
)
def test_a_backward_counts_what_is_asked_for(needed, wanted, compiled_kernels):
    q, k, v = draw(N, H, D), draw(N, H, D), draw(N, H, DV)
    tensors = {"q": q, "k": k, "v": v, "b": draw(E, H)}
    for name, x in tensors.items():
        x.requires_grad_(name in needed)

    def attend():
        return neighborhood_attention(q, k, v, graph(), edge_bias=tensors["b"])

    assert count(attend, backward=True) == 2 * E * H * wanted


@pytest.mark.parametrize("impl", FAST)
def test_attention_with_terms_on_edges(impl):
    c, q, k, v = 4, draw(N, H, D), draw(N, H, D), draw(N, H, DV)
    attr, key_weight, value_weight = draw(E, c), draw(c, H, D), draw(c, H, DV)

    def attend(**terms):
        return lambda: neighborhood_attention(q, k, v, graph(), impl=impl, **terms)

    # products by channel, sums of vectors and dropout count nothing
    for terms in (
        {"edge_gate": draw(E, H, D)},
        {"edge_gate": draw(E, H)},
        {"edge_key": draw(E, H, D), "edge_value": draw(E, H, DV)},
        {"dropout_p": 0.5},
    ):
        assert count(attend(**terms)) == 2 * E * H * (D + DV)
        assert count(attend(**terms), backward=True) == 2 * E * H * (3 * D + 2 * DV)
    # a . (W q) and the sum of a, and W of both, one product a node
    terms = {"edge_attr": attr, "edge_key_weight": key_weight}
    of_key = 2 * N * H * c * D
    assert count(attend(**terms)) == 2 * E * H * (D + DV + c) + of_key
    backward = 2 * E * H * (3 * D + 2 * DV + 3 * c) + 2 * of_key
    assert count(attend(**terms), backward=True) == backward
    terms = {"edge_attr": attr, "edge_value_weight": value_weight}
    of_value = 2 * N * H * c * DV
    assert count(attend(**terms)) == 2 * E * H * (D + DV + c) + of_value
    backward = 2 * E * H * (3 * D + 2 * DV + 2 * c) + 2 * of_value
    assert count(attend(**terms), backward=True) == backward


@pytest.mark.parametrize("impl", FAST)
def test_linear_attention(impl):
    q, k, v = draw(N, H, D), draw(N, H, D), draw(N, H, DV)
    m, offsets = 9, torch.tensor([0, 5, N], device=DEVICE)
    for features, width, projected in ((None, D, 0), (random_features(m, D).to(DEVICE), m, D)):
        name = "elu" if features is None else "softmax"
        for normalize in (False, True):

            def attend(name=name, features=features, normalize=normalize):
                return linear_attention(
                    q, k, v, offsets,
                    feature_map=name, projection=features, normalize=normalize, impl=impl,
                )  # fmt: skip

            each = 2 * N * H * width
            assert count(attend) == each * (2 * projected + 2 * DV + normalize)
            backward = each * (4 * projected + 5 * DV + 2 * normalize)
            assert count(attend, backward=True) == backward


@pytest.mark.parametrize("impl", FAST)
def test_global_attention_counts_the_pairs_of_each_graph(impl):
    q, k, v = draw(N, H, D), draw(N, H, D), draw(N, H, DV)
    offsets = torch.tensor([0, 5, N], device=DEVICE)
    pairs = 5 * 5 + (N - 5) * (N - 5)

    def attend(offsets=offsets):
        return global_attention(q, k, v, offsets, impl=impl)

    assert count(attend) == 2 * pairs * H * (D + DV)
    assert count(attend, backward=True) == 2 * pairs * H * (3 * D + 2 * DV)
    assert count(lambda: attend(None)) == 2 * N * N * H * (D + DV)


@pytest.mark.parametrize("impl", FAST)
def test_head_projections_count_as_linear_layers_do(impl):
    x, weight, bias = draw(N, 10), draw(H, D, 10), draw(H, D)
    gate = torch.tensor([1.0, 0.0, 1.0], device=DEVICE)

    def into():
        return head_projection(x, weight, bias, gate, impl=impl)

    def out_of():
        return head_projection(y, weight.movedim(2, 0), None, gate, impl=impl)

    y = draw(N, H, D)
    products = count(lambda: linear(x, weight.flatten(0, 1), bias.flatten()))
    assert products == 2 * N * 10 * H * D
    assert count(into) == count(out_of) == products
    assert count(into, backward=True) == count(out_of, backward=True) == 2 * products


@pytest.mark.parametrize("impl", FAST)
def test_what_edges_weigh_channel_by_channel(impl):
    logits, v, edge_value = draw(E, DV), draw(N, DV), draw(E, DV)

    def attend():
        return channelwise_attention(logits, v, graph(), edge_value=edge_value, impl=impl)

    assert count(attend) == 2 * E * DV
    assert count(attend, backward=True) == 4 * E * DV
    v.requires_grad_(False)
    assert count(attend, backward=True) == 2 * E * DV
    x, gate = draw(N, DV), draw(E, DV)

    def weigh():
        return gated_aggregate(x, graph(), gate, impl=impl)

    assert count(weigh) == 2 * E * DV
    assert count(weigh, backward=True) == 4 * E * DV


@pytest.mark.parametrize("impl", FAST)
def test_additive_attention_counts_the_weight_and_the_values(impl):
    q, k, v, weight = draw(N, H, D), draw(N, H, D), draw(N, H, DV), draw(H, D)
    terms = {"edge_attr": draw(E, 4), "edge_key_weight": draw(4, H, D)}

    def attend():
        return additive_attention(q, k, v, graph(), weight, impl=impl)

    def attributes():
        return additive_attention(q, k, v, graph(), weight, **terms, impl=impl)

    each = 2 * E * H
    assert count(attend) == each * (D + DV)
    assert count(attend, backward=True) == each * (4 * D + 2 * DV)
    assert count(attributes) == each * (5 * D + DV)
    assert count(attributes, backward=True) == each * (16 * D + 2 * DV)
    for x in (q, k, weight):
        x.requires_grad_(False)
    assert count(attend, backward=True) == each * (D + DV)


@pytest.mark.parametrize("impl", FAST)
def test_sums_and_softmaxes_count_nothing(impl):
    x, e = draw(N, D), draw(E, D)

    def calls():
        return aggregate(x, graph(), edge_value=e, activation="relu", impl=impl)

    def softmax():
        return segment_softmax(e, graph(), impl=impl)

    for function in (calls, softmax):
        assert count(function) == count(function, backward=True) == 0
    with FlopCounterMode(display=False) as counter:
        calls(), softmax()
    named = {str(op).rpartition(".")[2] for op in counter.get_flop_counts()["Global"]}
    assert named == {"aggregate_fwd", "segment_softmax_fwd"}


def test_a_module_counts_its_layers_and_its_edges(compiled_kernels):
    attention = NeighborhoodAttention(12, 4).to(DEVICE)
    with FlopCounterMode(display=False) as counter:
        attention(draw(N, 12), graph())
    assert counter.get_total_flops() == 4 * 2 * N * 12 * 12 + 2 * E * 12 * 2
    found = {name: sum(ops.values()) for name, ops in counter.get_flop_counts().items()}
    assert found["NeighborhoodAttention"] == counter.get_total_flops()
    assert found["NeighborhoodAttention.q"] == 2 * N * 12 * 12
    # the counter's hooks have the layers called, for masked heads too
    attention.head_gate = HeadGate(torch.tensor([1.0, 0.0, 0.0, 1.0])).to(DEVICE)
    of_edges = E * 12 * 2 if DEVICE == "cpu" else 2 * E * 12 * 2
    assert count(lambda: attention(draw(N, 12), graph())) == 4 * 2 * N * 12 * 12 + of_edges


def test_transformer_conv_counts_its_layers_and_its_edges(compiled_kernels):
    pytest.importorskip("torch_geometric")
    from fastgt.pyg import TransformerConv

    conv = TransformerConv(12, 5, 3, edge_dim=4).to(DEVICE)
    products = 4 * 2 * N * 12 * 15 + 2 * E * 3 * 5 * 2 + 2 * E * 4 * 15
    assert count(lambda: conv(draw(N, 12), graph(), draw(E, 4))) == products


USE = """
import sys, torch
q, g = torch.randn(3, 1, 4), Graph.from_edge_index(torch.tensor([[0, 1], [1, 2]]), 3)
with FlopCounterMode(display=False) as counter:
    neighborhood_attention(q, q, q, g)
print(counter.get_total_flops(), sum(type(f).__name__ == "_Finder" for f in sys.meta_path))
"""
OURS = "from fastgt import Graph, neighborhood_attention\n"
THEIRS = "from torch.utils.flop_counter import FlopCounterMode\n"


LOOK = "import importlib.util as util\nutil.find_spec('torch.utils.flop_counter')\n"
RELOAD = "import importlib, fastgt\nimportlib.reload(fastgt)\n"
NO_TRITON = "import sys; sys.modules['triton'] = None\n"


@pytest.mark.parametrize(
    "imports",
    [OURS + LOOK + THEIRS, THEIRS + OURS + RELOAD, NO_TRITON + OURS + THEIRS],
    ids=["after", "before", "without triton"],
)
def test_whichever_is_imported_first(imports, compiled_kernels):
    run = subprocess.run(
        [sys.executable, "-c", imports + USE],
        capture_output=True,
        text=True,
        env=os.environ | {"CUDA_VISIBLE_DEVICES": ""},
    )
    assert run.stdout == f"{2 * 2 * 8} 0\n", run.stdout + run.stderr
