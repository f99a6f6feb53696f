"""What runs inside fences: every operator on Triton's kernels, forward and backward.

A call is a function and its arguments, which a worker can run and a message can show: a case comes
as the text that makes it. ``ENDS`` has calls at the sizes where tiles end; ``calls`` draws others.
"""

from dataclasses import replace
from typing import NamedTuple

import additive_cases
import aggregate_cases
import attention_cases
import channelwise_cases
import global_cases
import linear_cases
import torch
import triton
import triton.language as tl
from attention_cases import BF16, FP16, FP32, FP64, LAYOUTS, PLANS, term_words
from fence import digests
from hypothesis import strategies as st
from test_attention_gate import in_graphs
from test_head_projection import case as projection_case
from test_head_projection import evaluate as evaluate_projection

# one below, at and one above what tiles of 4, 8 and 16 hold, and so on
AROUND = (1, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 32, 33)
GATES = ("", "shared", "per graph")


def attention(text, gate="", spoilt=False):
    """neighborhood_attention; ``gate``: one of GATES, of the heads; ``spoilt``: amid NaN."""
    x = _made(text, attention_cases.case)
    if spoilt:
        for tensor in (x.q, x.k, x.v, x.do):
            tensor[-1] = torch.nan
    return digests(attention_cases.evaluate(_gated(x, gate, x.q.shape[1]), "triton"))


def additive(text, gate=""):
    """additive_attention."""
    x = _made(text, additive_cases.case)
    return digests(additive_cases.evaluate(_gated(x, gate, x.q.shape[1]), "triton"))


def channelwise(text, gate=""):
    """channelwise_attention."""
    x = _made(text, channelwise_cases.case)
    return digests(channelwise_cases.evaluate(_gated(x, gate, x.logits.shape[1]), "triton"))


def aggregation(text):
    """aggregate, gated_aggregate or segment_softmax."""
    return digests(aggregate_cases.evaluate(_made(text, aggregate_cases.case), "triton"))


def linear(text, form, gate=""):
    """linear_attention; ``form``: "triton" or "pieces"."""
    x = _made(text, linear_cases.case)
    if gate:
        graphs = 1 if x.offsets is None else len(x.offsets) - 1
        x = replace(x, options=x.options | {"head_gate": _gate(gate, graphs, x.q.shape[1])})
    return digests(linear_cases.evaluate(x, form))


def global_attention(text, gate=""):
    """global_attention."""
    x = _made(text, global_cases.case)
    if gate:
        graphs = 1 if x.offsets is None else len(x.offsets) - 1
        x = replace(x, options=x.options | {"head_gate": _gate(gate, graphs, x.q.shape[1])})
    return digests(global_cases.evaluate(x, "triton"))


def projection(text):
    """head_projection."""
    return digests(evaluate_projection(_made(text, projection_case), "triton"))


def _made(text, case):
    return eval(text, {"case": case, "torch": torch})


def _gated(x, gate, heads):
    """The case with some heads masked; "per graph": on a batch of graphs."""
    if gate == "per graph" and x.graph.num_rows == x.graph.num_cols:
        x = in_graphs(x, plan=x.plan)
    elif gate:
        gate = "shared"
    if gate:
        gates = _gate(gate, x.graph.num_graphs, heads)
        x = replace(x, options=x.options | {"head_gate": gates})
    return x


def _gate(gate, graphs, heads):
    """Every third head of a graph is masked."""
    first = torch.arange(graphs)[:, None] if gate == "per graph" else 0
    return (first + torch.arange(heads)) % 3 != 1


def copied(n=8, load_by=0, store_by=0, stride=1):
    """n numbers that a kernel copies, read and written so many places too far, and ``stride``
    apart where they stand 2 apart."""
    x, y = torch.arange(n, dtype=FP32), torch.zeros(2 * n, dtype=FP32)
    y = y[::2] if stride > 1 else y[:n]
    _copy_kernel[(1,)](x, Pointers(y), load_by, store_by, stride, n, BLOCK=16)
    return y.tolist()


class Pointers(NamedTuple):
    """How kernels get tensors that may be absent."""

    y: torch.Tensor


@triton.jit
def _copy_kernel(x_ptr, pointers, load_by, store_by, stride, n, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + at + load_by, mask=at < n, other=0.0)
    tl.store(pointers.y + at * stride + store_by, x, mask=at < n)


# A row of many edges in segments, the others with up to 4. Programs take 16, 8, 4 or 2 rows.
_BUCKETS = {"kind": "hub", "plan": "buckets"}
_ALL = "gate key value attr-key attr-value numbered scores"
_ATTENTION = [
    ({"rows": 9, "edges": 24, "heads": 3, "d": 5, "dv": 9, "dtype": FP32} | _BUCKETS, ""),
    ({"rows": 17, "edges": 60, "heads": 1, "d": 7, "dv": 8, "dtype": FP32}, ""),
    ({"rows": 15, "edges": 40, "heads": 1, "d": 9, "dv": 5, "dtype": FP16} | _BUCKETS, "shared"),
    ({"rows": 16, "edges": 40, "heads": 2, "d": 4, "dv": 4, "dtype": BF16}, ""),
    ({"rows": 9, "edges": 30, "heads": 1, "group": 2, "d": 5, "dv": 3}, "per graph"),
    # more heads than a program takes
    ({"rows": 2, "edges": 9, "heads": 3, "d": 200, "dv": 5}, ""),
]
_TERMS = [
    (
        {"rows": 5, "edges": 14, "heads": 3, "d": 5, "terms": "factor shared attr-key drop"}
        | _BUCKETS,
        "",
    ),
    ({"rows": 5, "edges": 14, "heads": 3, "d": 5, "dv": 7, "terms": _ALL, "clamped": True}, ""),
    ({"rows": 5, "edges": 14, "d": 5, "dv": 7, "terms": _ALL} | _BUCKETS, "per graph"),
]
_WINDOWS = [
    ({"rows": rows, "edges": edges, "heads": heads, "d": d, "dv": dv, "plan": plan} | more, *how)
    for plan, rows, edges, heads, d, dv, more, *how in (
        ("windows 16", 17, 60, 3, 5, 17, {"cols": 17, "dtype": FP32}),
        # few enough edges that none stands twice, as windows of whole graphs need it
        ("graphs 64", 17, 9, 1, 5, 17, {"group": 2, "dtype": FP32}),
        ("windows 16", 15, 30, 1, 17, 15, {"cols": 9, "biased": False}, "", True),
        ("graphs 64", 33, 6, 1, 17, 5, {"clamped": True}, "per graph"),
        ("windows 32", 33, 60, 1, 16, 16, {"cols": 15, "dtype": BF16}, "shared"),
        ("windows 64", 65, 60, 1, 5, 5, {"dtype": FP16}, "per graph"),
    )
]
_ADDITIVE = [
    ({"rows": 9, "edges": 24, "heads": 3, "d": 5, "dv": 9, "dtype": FP32} | _BUCKETS, ""),
    ({"rows": 17, "edges": 60, "heads": 1, "d": 7, "dv": 8, "terms": "key bias drop"}, ""),
    ({"rows": 15, "edges": 40, "heads": 3, "d": 1, "dv": 5, "dtype": FP16} | _BUCKETS, "shared"),
    ({"rows": 5, "edges": 14, "heads": 2, "d": 5, "terms": "attr bias"}, "per graph"),
]
_CHANNELWISE = [
    ({"rows": 15, "edges": 40, "channels": (2, 5), "dtype": FP16, "clamped": True}, "shared"),
    ({"rows": 16, "edges": 40, "channels": (7,), "dtype": FP32} | _BUCKETS,),
    (
        {"rows": 9, "edges": 30, "channels": (3, 3), "dtype": BF16, "layout": "planes of heads"},
        "per graph",
    ),
    # more channels than a program takes
    ({"rows": 2, "edges": 9, "channels": (129,)} | _BUCKETS,),
]
_AGGREGATION = {
    op: [
        ({"op": op, "rows": 15, "edges": 40, "channels": (7,), "dtype": FP32} | _BUCKETS,),
        ({"op": op, "rows": 17, "edges": 40, "channels": (9,), "dtype": FP16, "relu": True},),
        ({"op": op, "rows": 13, "edges": 20, "channels": (129,)} | _BUCKETS,),
    ]
    for op in aggregate_cases.OPS
} | {
    "weights": [
        ({"op": "max", "rows": 15, "edges": 40, "channels": (7,), "weight": "channel"} | _BUCKETS,),
        ({"op": "sum", "rows": 13, "edges": 20, "channels": (129,), "weight": "edge"} | _BUCKETS,),
        (
            {"op": "gated", "rows": 17, "edges": 40, "channels": (9,), "dtype": FP16}
            | {"weight": "edge", "value": True},
        ),
    ]
}
# tiles of 16 and 32 nodes and features, products over 16 channels at a time
_LINEAR = [
    (
        {"sizes": sizes, "heads": heads, "d": d, "dv": dv, "feature_map": name, "m": m}
        | {"dtype": dtype},
        form,
        gate,
    )
    for sizes, heads, d, dv, name, m, dtype, form, gate in (
        # as many pieces as the host makes room for, the last of them a graph
        ((17, 7), 3, 5, 9, "softmax", 7, FP32, "pieces", ""),
        ((15, 0, 33), 2, 5, 17, "softmax", 7, FP64, "triton", "per graph"),
        ((33, 3), 1, 17, 15, "softmax", 17, BF16, "pieces", "shared"),
        ((31, 4), 1, 33, 9, "identity", 1, FP16, "pieces", ""),
    )
]
# blocks of 16, 32 and 64 nodes, slices of 64 and 128 channels
_GLOBAL = [
    ({"sizes": sizes, "d": d, "dv": dv, "dtype": dtype} | more, gate)
    for sizes, d, dv, dtype, more, gate in (
        ((33, 7), 5, 9, FP32, {"bias": "pair", "drop": True, "numbered": True}, ""),
        ((15, 0, 31), 5, 17, FP64, {"keys": (3, 9, 17), "bias": "key"}, "per graph"),
        ((65, 3), 17, 15, BF16, {"heads": 1, "group": 2}, "shared"),
        ((7, 9), 67, 129, FP64, {"heads": 1, "bias": "pair"}, ""),
    )
]
_PROJECTION = [
    ({"n": n, "active": active, "d": d, "c": c, "into": into, "dtype": dtype},)
    for into in (True, False)
    for n, active, d, c, dtype in (
        (65, (1, 0, 1), 13, 33, FP32),
        (31, (1, 1, 1, 0, 1), 7, 17, FP64),
        (64, (1, 1, 1), 43, 65, BF16),
    )
]


def _calls(function, cases):
    """A case's arguments as text."""
    return [
        (function, f"case({', '.join(f'{k}={x!r}' for k, x in made.items())})", *more)
        for made, *more in cases
    ]


ENDS = {
    "attention": _calls(attention, _ATTENTION),
    "edge terms": _calls(attention, _TERMS),
    "windows": _calls(attention, _WINDOWS),
    "additive": _calls(additive, _ADDITIVE),
    "channelwise": _calls(channelwise, _CHANNELWISE),
    **{name: _calls(aggregation, cases) for name, cases in _AGGREGATION.items()},
    "linear": _calls(linear, _LINEAR),
    "global": _calls(global_attention, _GLOBAL),
    "projection": _calls(projection, _PROJECTION),
}

OPERATORS = (
    "attention",
    "windows",
    "additive",
    "channelwise",
    "aggregation",
    "linear",
    "global",
    "projection",
)


@st.composite
def calls(draw, operator):
    """A call of one of OPERATORS, at or near the sizes where tiles end."""
    rows, wide = st.sampled_from(AROUND[:10]), st.sampled_from(AROUND[:10])
    gate = draw(st.sampled_from(GATES))
    if operator in ("attention", "windows"):
        plans = PLANS[2:] if operator == "windows" else PLANS[:2]
        fixed = {
            "rows": st.sampled_from(AROUND) if operator == "windows" else rows,
            "d": wide,
            "dv": wide,
            "heads": st.integers(1, 2 if gate else 3),
            "group": st.integers(1, 2),
            "plan": st.sampled_from(plans),
            "terms": "" if operator == "windows" else term_words(),
            # where none stands twice, windows of whole graphs
            "edges": st.integers(0, 9) | st.integers(0, 50),
        }
        x = draw(attention_cases.cases("triton", **fixed))
        return attention, x.made_by, gate
    if operator == "additive":
        x = draw(additive_cases.cases("triton", rows=draw(rows), d=draw(wide), dv=draw(wide)))
        return additive, x.made_by, gate
    if operator == "channelwise":
        x = draw(channelwise_cases.cases("triton", rows=draw(rows)))
        return channelwise, x.made_by, gate if x.logits.ndim == 3 else ""
    if operator == "aggregation":
        channels = draw(st.tuples(wide))
        x = draw(aggregate_cases.cases("triton", rows=draw(rows), channels=channels))
        return aggregation, x.made_by
    if operator == "linear":
        sizes = draw(st.lists(st.sampled_from((0, *AROUND)), max_size=2))
        form = draw(st.sampled_from(["triton", "pieces"]))
        fixed = {"sizes": sizes, "heads": draw(st.integers(1, 2)), "m": draw(wide)}
        x = draw(linear_cases.cases(form, **fixed, d=draw(wide), dv=draw(wide)))
        return linear, x.made_by, form, gate
    if operator == "global":
        sizes = draw(st.lists(st.sampled_from((0, *AROUND)), max_size=2))
        x = draw(global_cases.cases("triton", sizes=sizes, d=draw(wide), dv=draw(wide)))
        return global_attention, x.made_by, gate
    made = {
        "n": draw(st.sampled_from([0, 1, 31, 32, 33, 63, 64, 65])),
        "active": tuple(draw(st.lists(st.sampled_from([0, 1]), min_size=1, max_size=5))),
        "d": draw(wide),
        "c": draw(st.sampled_from([1, 15, 16, 17, 31, 32, 33, 63, 64, 65])),
        "into": draw(st.booleans()),
        "biased": draw(st.booleans()),
        "dtype": draw(st.sampled_from([FP64, FP32, BF16, FP16])),
        "layout": draw(st.sampled_from(LAYOUTS)),
    }
    return _calls(projection, [(made,)])[0]
