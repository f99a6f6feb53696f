"""Every kernel configuration: small calls of the launchers, one for each row of the tile tables,
dtype and optional path. ``ahead.py`` compiles them for every target."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

from fastgt.contract import (
    ChannelwiseInputs,
    ChannelwiseLogit,
    ChannelwiseNeeds,
    ChannelwiseResults,
    ChannelwiseUpstream,
    Dropout,
    EdgeTerms,
    Features,
    HeadMask,
    Inputs,
    Logit,
    NeedQKV,
    Quotient,
    Ragged,
    RowWalk,
    Saved,
    Switches,
    Upstream,
    Walks,
)

from .additive_cases import ADDITIVE_CASES, launch_additive
from .aggregate_cases import AGGREGATE_CASES, launch_aggregate
from .attention import attention_fwd
from .attention_backward import attention_bwd
from .attention_windows import windows_fwd
from .attention_windows_backward import windows_bwd
from .channelwise_attention import channelwise_attention_fwd
from .channelwise_attention_backward import channelwise_attention_bwd
from .configs import FILLERS
from .global_cases import GLOBAL_CASES, launch_global
from .head_projection import head_contract, head_expand, head_outer
from .linear_attention import linear_attention_fwd
from .linear_attention_backward import linear_attention_bwd


@dataclass(frozen=True)
class AttentionCase:
    """One configuration of neighbourhood attention."""

    heads: int
    width: int
    dtype: torch.dtype
    kv_heads: int = 0  # 0: as many as heads
    v_width: int = 0  # 0: as wide as q
    degree: int = 16
    bias: bool = False
    clamp: bool = False
    weights: bool = False
    buckets: bool = False
    height: int = 0  # of windows, 0: gather
    dense: bool = False
    terms: str = ""  # on edges: words of "gate factor key value shared attr drop numbered scores"
    channels: int = 16  # of the attributes
    masked: bool = False  # heads of each row


ATTENTION_CASES = {
    "one_head_d8_fp16": AttentionCase(1, 8, torch.float16),
    "low_degree_d8_bf16": AttentionCase(8, 8, torch.bfloat16, degree=3, bias=True, clamp=True),
    "gt_zinc_d8_fp32": AttentionCase(8, 8, torch.float32, degree=3, clamp=True),
    "gt_sbm_d10_bf16": AttentionCase(8, 10, torch.bfloat16, clamp=True),
    "h8_d16_bf16": AttentionCase(8, 16, torch.bfloat16),
    "h8_d16_fp32": AttentionCase(8, 16, torch.float32, bias=True, weights=True),
    "h4_d64_fp16": AttentionCase(4, 64, torch.float16),
    "gqa_h8_d64_bf16": AttentionCase(8, 64, torch.bfloat16, kv_heads=2),
    "h8_d128_bf16": AttentionCase(8, 128, torch.bfloat16, bias=True, clamp=True),
    "h16_d128_bf16": AttentionCase(16, 128, torch.bfloat16),
    "h2_d256_fp32": AttentionCase(2, 256, torch.float32),
    "uneven_d24_v40_fp16": AttentionCase(4, 24, torch.float16, v_width=40),
    "h4_d32_fp64": AttentionCase(4, 32, torch.float64, bias=True, clamp=True),
    "buckets_h8_d16_bf16": AttentionCase(8, 16, torch.bfloat16, buckets=True),
    "buckets_h8_d16_fp32": AttentionCase(8, 16, torch.float32, buckets=True, bias=True),
    "masked_h8_d16_bf16": AttentionCase(8, 16, torch.bfloat16, masked=True),
    "masked_h8_d64_fp32": AttentionCase(8, 64, torch.float32, bias=True, weights=True, masked=True),
    "masked_gqa_h8_d64_bf16": AttentionCase(8, 64, torch.bfloat16, kv_heads=2, masked=True),
    "masked_buckets_h8_d64_bf16": AttentionCase(8, 64, torch.bfloat16, buckets=True, masked=True),
    "buckets_h8_d128_bf16": AttentionCase(8, 128, torch.bfloat16, buckets=True),
    "edges_gt_zinc_d8_fp32": AttentionCase(
        8, 8, torch.float32, degree=3, clamp=True, terms="gate scores"
    ),
    "edges_gate_d10_bf16": AttentionCase(8, 10, torch.bfloat16, clamp=True, terms="gate scores"),
    "edges_attr_d16_bf16": AttentionCase(8, 16, torch.bfloat16, terms="attr drop"),
    "edges_attr_numbered_d16_bf16": AttentionCase(8, 16, torch.bfloat16, terms="attr numbered"),
    "edges_attr_d16_fp32": AttentionCase(8, 16, torch.float32, terms="attr", bias=True),
    "edges_buckets_attr_d16_bf16": AttentionCase(
        8, 16, torch.bfloat16, buckets=True, terms="attr scores key value"
    ),
    "edges_shared_d16_fp32": AttentionCase(8, 16, torch.float32, terms="shared"),
    "edges_shared_d64_bf16": AttentionCase(4, 64, torch.bfloat16, terms="shared drop"),
    "edges_factor_d64_fp16": AttentionCase(4, 64, torch.float16, terms="factor key value attr"),
    "edges_all_d32_fp32": AttentionCase(
        4,
        32,
        torch.float32,
        bias=True,
        clamp=True,
        weights=True,
        terms="gate key value attr drop scores",
    ),
    "edges_gqa_h8_d64_bf16": AttentionCase(
        8, 64, torch.bfloat16, kv_heads=2, terms="gate key value attr"
    ),
    "edges_attr_d128_bf16": AttentionCase(8, 128, torch.bfloat16, terms="attr", channels=64),
    "edges_gate_d128_bf16": AttentionCase(8, 128, torch.bfloat16, terms="gate key value scores"),
    "edges_all_d256_fp32": AttentionCase(
        2, 256, torch.float32, terms="gate key value attr drop scores", channels=256
    ),
    "edges_attr_d256_fp16": AttentionCase(2, 256, torch.float16, terms="attr", channels=256),
    "edges_all_d32_fp64": AttentionCase(
        4, 32, torch.float64, bias=True, clamp=True, terms="factor key value attr drop scores"
    ),
    "edges_masked_d16_fp32": AttentionCase(
        8, 16, torch.float32, weights=True, terms="attr key value drop", masked=True
    ),
    "edges_masked_d64_bf16": AttentionCase(
        8, 64, torch.bfloat16, terms="gate scores", clamp=True, masked=True
    ),
    "windows_d16_bf16": AttentionCase(8, 16, torch.bfloat16, height=64),
    "windows_d32_fp16": AttentionCase(8, 32, torch.float16, height=64, clamp=True),
    "windows_d64_bf16": AttentionCase(8, 64, torch.bfloat16, height=64),
    "windows_gqa_bias_d64_bf16": AttentionCase(
        8, 64, torch.bfloat16, kv_heads=2, height=64, bias=True, clamp=True, weights=True
    ),
    "windows_d128_bf16": AttentionCase(8, 128, torch.bfloat16, height=64),
    "windows_d256_fp16": AttentionCase(2, 256, torch.float16, height=64),
    "windows_32_d64_bf16": AttentionCase(8, 64, torch.bfloat16, height=32),
    "windows_16_d64_bf16": AttentionCase(8, 64, torch.bfloat16, height=16),
    "windows_d64_fp32": AttentionCase(4, 64, torch.float32, height=64, bias=True),
    "windows_32_d128_fp32": AttentionCase(2, 128, torch.float32, height=32),
    "windows_16_d256_fp32": AttentionCase(2, 256, torch.float32, height=16),
    "windows_d32_fp64": AttentionCase(2, 32, torch.float64, height=64),
    "windows_masked_d64_bf16": AttentionCase(
        8, 64, torch.bfloat16, kv_heads=2, height=64, bias=True, masked=True
    ),
    "graphs_masked_d64_bf16": AttentionCase(
        8, 64, torch.bfloat16, height=64, dense=True, masked=True
    ),
    "graphs_d10_bf16": AttentionCase(8, 10, torch.bfloat16, height=64, dense=True, clamp=True),
    "graphs_d64_bf16": AttentionCase(8, 64, torch.bfloat16, height=64, dense=True),
}


def _launch_attention(case: AttentionCase) -> None:
    n, m = 8, 8 * case.degree
    index = torch.arange(m, dtype=torch.int32) % n
    ptr = torch.arange(0, m + 1, case.degree, dtype=torch.int32)
    kv_heads = case.kv_heads or case.heads
    v_width = case.v_width or case.width
    q = torch.zeros(n, case.heads, case.width, dtype=case.dtype)
    k = torch.zeros(n, kv_heads, case.width, dtype=case.dtype)
    v = torch.zeros(n, kv_heads, v_width, dtype=case.dtype)
    bias = torch.zeros(m, case.heads, dtype=case.dtype) if case.bias else None
    low, high = (-5.0, 5.0) if case.clamp else (-torch.inf, torch.inf)
    inputs, logit = Inputs(q, k, v), Logit(1.0, low, high, 0.0)
    active = torch.ones(n, case.heads, dtype=torch.bool) if case.masked else None
    mask, walk = HeadMask(active, active), (ptr, index, index)
    if case.height:
        window = index.new_tensor([[0, n, 0, n, 0]] * 2)
        tables = window, index, index.long(), index, index
        walk, form, terms = (*walk, *tables), (case.height, case.dense), EdgeTerms(bias)
        switches = Switches(make_weights=case.weights)
        o, lse, *_ = windows_fwd(walk, *form, inputs, logit, terms, mask, switches)
        upstream = Upstream(o, lse if case.bias else None, None, None)
        needs = *(True,) * 3, case.bias
        saved = Saved(lse, o)
        windows_bwd(walk, tables, *form, needs, upstream, saved, inputs, logit, terms, mask)
        return
    if case.buckets:
        rows, parts = index[: FILLERS + 2], index.new_zeros(FILLERS + 2, 3)
        walk = *walk, rows, rows, parts, parts
    words = case.terms.split()
    terms = _edge_terms(case, words, inputs, bias)
    dropped = "drop" in words or "numbered" in words
    seed = torch.zeros(1, dtype=torch.int64) if dropped else None
    numbers = torch.arange(m) if "numbered" in words else None
    dropout = Dropout(seed, numbers, 0.1 if dropped else 0.0)
    attr_o, scores = terms.attr is not None, "scores" in words
    switches = Switches("shared" in words, case.weights, scores, attr_o)
    call = inputs, logit, terms, mask, dropout, switches
    o, lse, _, scores, attr_o = attention_fwd(walk, *call)
    attr_do = None if attr_o is None else torch.zeros_like(attr_o, dtype=case.dtype)
    upstream = Upstream(o, lse if case.bias and not words else None, scores, attr_do)
    needs = [x is not None for x in (*inputs, *terms)]
    attention_bwd(walk, walk, needs, upstream, Saved(lse, None), *call)


def _edge_terms(case: AttentionCase, words: list[str], inputs: Inputs, bias) -> EdgeTerms:
    q, _, v = inputs
    edges = 8 * case.degree

    def tensor(*shape):
        return torch.zeros(shape, dtype=case.dtype)

    gate = key = value = attr = attr_q = None
    if "gate" in words:
        gate = tensor(edges, *q.shape[1:])
    if "factor" in words:
        gate = tensor(edges, q.shape[1])
    if "key" in words or "shared" in words:
        key = tensor(edges, *q.shape[1:])
    if "value" in words:
        value = tensor(edges, q.shape[1], v.shape[2])
    if "attr" in words:
        attr = tensor(edges, case.channels)
    if "attr" in words and "gate" not in words and "scores" not in words:
        attr_q = tensor(*q.shape[:2], case.channels)
    return EdgeTerms(bias, gate, key, value, attr, attr_q)


@dataclass(frozen=True)
class ChannelwiseCase:
    """One configuration of channelwise attention."""

    heads: int
    width: int
    dtype: torch.dtype
    v: bool = True
    edge_value: bool = True
    planes: bool = False  # one logit for all heads of a channel
    clamp: bool = False
    weights: bool = False
    buckets: bool = False
    masked: bool = False  # heads of each row


CHANNELWISE_CASES = {
    "channelwise_c8_fp32": ChannelwiseCase(1, 8, torch.float32, weights=True),
    "channelwise_d10_bf16": ChannelwiseCase(1, 10, torch.bfloat16, clamp=True),
    "channelwise_c32_fp16": ChannelwiseCase(1, 32, torch.float16, v=False, clamp=True),
    "channelwise_c64_bf16": ChannelwiseCase(1, 64, torch.bfloat16, weights=True),
    "channelwise_c64_fp32": ChannelwiseCase(1, 64, torch.float32, clamp=True),
    "channelwise_c512_bf16": ChannelwiseCase(1, 512, torch.bfloat16),
    "channelwise_c512_fp32": ChannelwiseCase(1, 512, torch.float32, edge_value=False),
    "channelwise_c64_fp64": ChannelwiseCase(1, 64, torch.float64, clamp=True),
    "channelwise_planes_h8_d8_fp32": ChannelwiseCase(8, 8, torch.float32, planes=True),
    "channelwise_planes_h8_d32_bf16": ChannelwiseCase(8, 32, torch.bfloat16, planes=True),
    "channelwise_masked_h8_d16_fp32": ChannelwiseCase(
        8, 16, torch.float32, weights=True, masked=True
    ),
    "channelwise_masked_h4_d48_bf16": ChannelwiseCase(4, 48, torch.bfloat16, masked=True),
    "channelwise_buckets_c64_fp32": ChannelwiseCase(1, 64, torch.float32, buckets=True),
    "channelwise_buckets_c128_bf16": ChannelwiseCase(1, 128, torch.bfloat16, buckets=True),
}


def _launch_channelwise(case: ChannelwiseCase) -> None:
    n, m = 8, 128
    index = torch.arange(m, dtype=torch.int32) % n
    ptr = torch.arange(0, m + 1, m // n, dtype=torch.int32)
    shape = case.heads, case.width
    logits = torch.zeros(m, *shape, dtype=case.dtype)
    if case.planes:
        logits = logits[:, :1].contiguous().expand(m, *shape)
    v = torch.zeros(n, *shape, dtype=case.dtype) if case.v else None
    edge_value = torch.zeros(m, *shape, dtype=case.dtype) if case.edge_value else None
    walk = ptr, index, index
    if case.buckets:
        rows, parts = index[: FILLERS + 2], index.new_zeros(FILLERS + 2, 3)
        walk = *walk, rows, rows, parts, parts
    low, high = (-5.0, 5.0) if case.clamp else (-torch.inf, torch.inf)
    active = torch.ones(n, case.heads, dtype=torch.bool) if case.masked else None
    mask, logit = HeadMask(active, active), ChannelwiseLogit(low, high, 0.0)
    inputs = ChannelwiseInputs(logits, v, edge_value)
    results = ChannelwiseResults(keep=True, return_weights=case.weights)
    o, lse, _, stat = channelwise_attention_fwd(inputs, mask, RowWalk(walk), logit, results)
    upstream = ChannelwiseUpstream(o, lse if case.clamp else None, stat)
    needs = ChannelwiseNeeds(True, case.v, case.edge_value)
    channelwise_attention_bwd(upstream, inputs, mask, Walks(walk, walk), logit, needs)


@dataclass(frozen=True)
class LinearCase:
    """One configuration of linear attention."""

    width: int
    dtype: torch.dtype
    feature_map: str = "elu"
    features: int = 0  # random ones
    v_width: int = 0  # 0: as wide as q
    heads: int = 4
    normalize: bool = True
    masked: bool = False  # a mask of heads


LINEAR_CASES = {
    "linear_elu_d16_fp32": LinearCase(16, torch.float32),
    "linear_elu_d64_bf16": LinearCase(64, torch.bfloat16),
    "linear_masked_d64_bf16": LinearCase(64, torch.bfloat16, masked=True),
    "linear_elu_d32_fp64": LinearCase(32, torch.float64),
    "linear_elu_d10_fp32": LinearCase(10, torch.float32),
    "linear_identity_d64_fp16": LinearCase(64, torch.float16, "identity", normalize=False),
    "linear_relu_d128_bf16": LinearCase(128, torch.bfloat16, "relu"),
    "linear_sigmoid_d256_bf16": LinearCase(256, torch.bfloat16, "sigmoid"),
    "linear_sigmoid_d256_fp32": LinearCase(256, torch.float32, "sigmoid"),
    "linear_uneven_d24_v40_fp16": LinearCase(24, torch.float16, v_width=40),
    "linear_random_d16_m44_fp32": LinearCase(16, torch.float32, "relu_random", 44),
    "linear_random_d64_m266_bf16": LinearCase(64, torch.bfloat16, "relu_random", 266),
    "linear_softmax_d16_m44_fp32": LinearCase(16, torch.float32, "softmax", 44),
    "linear_softmax_d64_m266_bf16": LinearCase(64, torch.bfloat16, "softmax", 266),
    "linear_softmax_d64_m266_fp32": LinearCase(64, torch.float32, "softmax", 266),
    "linear_softmax_d128_m512_bf16": LinearCase(128, torch.bfloat16, "softmax", 512),
    "linear_softmax_d256_m1024_bf16": LinearCase(256, torch.bfloat16, "softmax", 1024),
    "linear_softmax_d128_m512_fp32": LinearCase(128, torch.float32, "softmax", 512),
    "linear_softmax_d256_m1024_fp32": LinearCase(256, torch.float32, "softmax", 1024),
    "linear_softmax_d256_m1024_fp64": LinearCase(256, torch.float64, "softmax", 1024),
    "linear_softmax_d32_m96_fp64": LinearCase(32, torch.float64, "softmax", 96),
}


def _launch_linear(case: LinearCase) -> None:
    # nodes enough for a graph with a state, and one without
    n = 4096
    q, k = torch.zeros(2, n, case.heads, case.width, dtype=case.dtype)
    v = torch.zeros(n, case.heads, case.v_width or case.width, dtype=case.dtype)
    offsets = torch.tensor([0, 8, n])
    projection = torch.zeros(case.features, case.width) if case.features else None
    mask = torch.ones(1, case.heads, dtype=torch.bool) if case.masked else None
    features, ragged = Features(case.feature_map, projection), Ragged(offsets, mask)
    call = Inputs(q, k, v), features, ragged, Quotient(1e-6, case.normalize)
    o, tops = linear_attention_fwd(*call)
    linear_attention_bwd(o, tops, *call, NeedQKV(True, True, True))


# heads, their channels, the others
PROJECTION_CASES = {
    "head_h8_d16_c128_fp32": (8, 16, 128, torch.float32),
    "head_h8_d64_c512_fp32": (8, 64, 512, torch.float32),
    "head_h24_d64_c512_bf16": (24, 64, 512, torch.bfloat16),
    "head_h4_d10_c70_fp16": (4, 10, 70, torch.float16),
    "head_h4_d16_c64_fp64": (4, 16, 64, torch.float64),
}


def _launch_projection(case: tuple[int, int, int, torch.dtype]) -> None:
    heads, width, channels, dtype = case
    n = 256
    x, y = torch.zeros(n, channels, dtype=dtype), torch.zeros(n, heads, width, dtype=dtype)
    into = torch.zeros(heads, width, channels, dtype=dtype)
    out = torch.zeros(channels, heads, width, dtype=dtype).permute(1, 2, 0)
    active = torch.arange(heads + 1, dtype=torch.int32)
    head_expand(x, into, torch.zeros(heads, width, dtype=dtype), active)
    head_contract(y, out, torch.zeros(channels, dtype=dtype), active)
    head_outer(y, x, active)


CASES: dict[str, Callable[[], None]] = {
    name: partial(_launch_attention, case) for name, case in ATTENTION_CASES.items()
}
CASES |= {name: partial(launch_additive, case) for name, case in ADDITIVE_CASES.items()}
CASES |= {name: partial(_launch_channelwise, case) for name, case in CHANNELWISE_CASES.items()}
CASES |= {name: partial(launch_aggregate, case) for name, case in AGGREGATE_CASES.items()}
CASES |= {name: partial(_launch_linear, case) for name, case in LINEAR_CASES.items()}
CASES |= {name: partial(launch_global, case) for name, case in GLOBAL_CASES.items()}
CASES |= {name: partial(_launch_projection, case) for name, case in PROJECTION_CASES.items()}
"""Name -> a call that launches all kernels of that configuration, forward and backward."""
