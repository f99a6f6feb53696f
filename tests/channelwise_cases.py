"""Random problems for channelwise_attention, and its equations once more: loops, in float64.

As in ``attention_cases.py``, arrays come from a drawn seed and identities are judged in float64.
"""

import math
from dataclasses import dataclass, replace

import numpy as np
import torch
from attention_cases import (
    BF16,
    FAST,
    FP16,
    FP32,
    FP64,
    IMPLS,
    LAYOUTS,
    arrange,
    gap,
)
from hypothesis import strategies as st
from problems import DEVICE, GraphProblem, OpUnderTest, planned

from fastgt import AuxRequest, Graph, channelwise_attention
from fastgt.contract import Walks
from fastgt.ops.walks import CPU, GATHER, column_walk, row_walk
from fastgt.testing import random_edge_index, with_index_dtype

NAMES = ("o", "lse", "weights", "dlogits", "dv", "dedge_value")
PLANES = ("planes of heads", "planes of channels")
TERMS = ("v", "edge_value", "both")
WAYS = [*FAST, "buckets"]
ALL = ["reference", *WAYS]
PER_EDGE = ("weights", "dlogits", "dedge_value")


# what a tensor, a result or a gradient has an entry for
OVER = {
    **dict.fromkeys(("o", "lse"), "rows"),
    "v": "cols",
    **dict.fromkeys(("logits", "edge_value", "weights"), "edges"),
}


@dataclass(repr=False)
class Case(GraphProblem):
    """One problem: inputs, upstream gradients and options."""

    logits: torch.Tensor
    v: torch.Tensor | None
    edge_value: torch.Tensor | None
    do: torch.Tensor
    dlse: torch.Tensor
    options: dict

    def tensors(self):
        names = ("logits", "v", "edge_value", "do", "dlse")
        return {name: t for name in names if (t := getattr(self, name)) is not None}

    def having(self, **tensors):
        return replace(self, **tensors)

    def over(self, name):
        return OVER[name.removeprefix("d")]


def case(
    seed=0,
    rows=10,
    edges=40,
    *,
    cols=None,
    channels=(6,),
    dtype=FP64,
    index=torch.int32,
    kind="uniform",
    isolated=0,
    layout="contiguous",
    terms="both",
    clamped=False,
    eps=0.0,
    plan="gather",
):
    """A random case; ``channels`` is (C,) or (H, D)."""
    made_by = f"case({', '.join(f'{name}={value!r}' for name, value in locals().items())})"
    m = rows if cols is None else cols
    edge_index = random_edge_index(seed, rows, edges, cols=m, kind=kind, isolated=isolated)
    edge_index = edge_index.to(DEVICE)
    graph = with_index_dtype(Graph.from_edge_index(edge_index, (rows, m)), index)
    graph = planned(graph, plan)
    generator = torch.Generator().manual_seed(seed)

    def tensor(n, dtype=dtype):
        x = torch.randn(n, *channels, generator=generator, dtype=FP64).to(DEVICE, dtype)
        return x if layout in PLANES else arrange(x, layout)

    e = edge_index.shape[1]
    logits, v, edge_value, do = (tensor(n) for n in (e, m, e, rows))
    dlse = tensor(rows, FP64 if dtype == FP64 else FP32)
    logits = shared(logits, layout)
    options = {"denominator_eps": eps}
    if clamped:
        options["logit_clamp"] = gap(logits.double())
    v, edge_value = (None if terms == "edge_value" else v), (None if terms == "v" else edge_value)
    tensors, named = (logits, v, edge_value, do, dlse), {"made_by": made_by, "plan": plan}
    return Case(seed, edge_index, graph, *tensors, options, **named)


def shared(logits, layout):
    """Logits that several channels share, as an expanded tensor."""
    if layout not in PLANES:
        return logits
    dim = 1 if layout == "planes of heads" and logits.ndim == 3 else -1
    return logits.narrow(dim, 0, 1).clone().expand_as(logits)


@st.composite
def cases(draw, impl, **fixed):
    """Small where the interpreter runs it."""
    small = impl == "triton" and DEVICE == "cpu"
    choices = {
        "seed": st.integers(0, 2**31),
        "rows": st.integers(0, 12 if small else 64),
        "edges": st.integers(0, 40 if small else 200),
        "channels": st.sampled_from(
            [(1,), (5,), (8,), (16,), (17,), (3, 4), (2, 8), (1, 6), (5, 1), (3, 32)]
        ),
        "dtype": st.sampled_from([FP64, FP32, BF16, FP16]),
        "index": st.sampled_from([torch.int32, torch.int64]),
        "kind": st.sampled_from(["uniform", "power_law", "hub"]),
        "isolated": st.integers(0, 3),
        "layout": st.sampled_from((*LAYOUTS, *PLANES)),
        "terms": st.sampled_from(TERMS),
        "clamped": st.booleans(),
        "eps": st.sampled_from([0.0, 1e-6, 0.5]),
    }
    if impl == "triton":
        choices["plan"] = st.sampled_from(["gather", "buckets"])
    drawn = {name: draw(s) for name, s in choices.items() if name not in fixed}
    if "cols" not in fixed and draw(st.booleans()):
        drawn["cols"] = draw(st.integers(0, 12 if small else 64))
    return case(**drawn, **fixed)


def draws(count, impl):
    """Few where the interpreter runs them."""
    return max(3, count // 5) if impl == "triton" and DEVICE == "cpu" else count


def attend(case, impl, **changes):
    """The public function on a case, with its options: o, lse, weights.

    ``impl`` may be "buckets": Triton's kernels on rows in segments of five edges.
    """
    if impl == "buckets":
        case, impl = replace(case, graph=planned(case.graph, impl)), "triton"
    options = case.options | {"return_aux": AuxRequest(lse=True, weights=True), "impl": impl}
    options |= {"edge_value": case.edge_value} | changes
    o, aux = channelwise_attention(case.logits, case.v, case.graph, **options)
    return o, aux.lse, aux.weights


def walks(graph, impl):
    """The edges of a graph, as the op takes them for one implementation."""
    plan = CPU if impl == "cpp" else GATHER
    return Walks(row_walk(graph, plan), column_walk(graph, plan))


def evaluate(case, impl, dtype=None):
    """Outputs and gradients by name; ``dtype`` casts the inputs first."""

    def cast(x):
        return x if dtype is None else x.to(dtype)

    leaves = {
        name: cast(x).detach().requires_grad_()
        for name in ("logits", "v", "edge_value")
        if (x := getattr(case, name)) is not None
    }
    o, lse, weights = attend(replace(case, **leaves), impl)
    upstream = cast(case.do), case.dlse.to(lse.dtype)
    grads = torch.autograd.grad((o, lse), list(leaves.values()), upstream, materialize_grads=True)
    found = {"o": o, "lse": lse, "weights": weights}
    found |= {f"d{name}": x for name, x in zip(leaves, grads, strict=True)}
    return {name: x.detach() for name, x in found.items()}


def results(case, impl):
    """Outputs by name, connected to the inputs."""
    return dict(zip(("o", "lse", "weights"), attend(case, impl), strict=True))


def loops(case):
    """The equations and their gradients, written by hand from a = e / (Z + eps), row by row and
    channel by channel, on the caller's edge list."""
    shape = case.logits.shape[1:]
    logits, v, edge_value, do, dlse = (
        None if x is None else x.double().cpu().numpy().reshape(len(x), shape.numel())
        for x in (case.logits, case.v, case.edge_value, case.do, case.dlse)
    )
    low, high = case.options.get("logit_clamp") or (-math.inf, math.inf)
    eps = case.options["denominator_eps"]
    o, lse = np.zeros(do.shape), np.full(do.shape, -np.inf)
    weights, dlogits, dedge_value = (np.zeros(logits.shape) for _ in range(3))
    dv = np.zeros((case.graph.num_cols, shape.numel()))
    edges = list(zip(*case.edge_index.tolist(), strict=True))
    for i in range(len(do)):
        mine = [(e, j) for e, (j, target) in enumerate(edges) if target == i]
        for c in range(shape.numel()):
            logit = {e: min(max(logits[e, c], low), high) for e, _ in mine}
            top = max(logit.values(), default=-np.inf)
            if top == -np.inf:
                continue
            power = {e: np.exp(s - top) for e, s in logit.items()}
            total = sum(power.values())
            lse[i, c] = top + np.log(total)
            with np.errstate(over="ignore"):
                divisor = total + (eps * np.exp(-top) if eps else 0.0)
            value = {
                e: (0.0 if v is None else v[j, c])
                + (0.0 if edge_value is None else edge_value[e, c])
                for e, j in mine
            }
            for e, j in mine:
                weights[e, c] = power[e] / divisor
                o[i, c] += weights[e, c] * value[e]
                dv[j, c] += weights[e, c] * do[i, c]
                dedge_value[e, c] = weights[e, c] * do[i, c]
            for e, _ in mine:
                if low <= logits[e, c] <= high:
                    dlogits[e, c] = weights[e, c] * do[i, c] * (value[e] - o[i, c])
                    dlogits[e, c] += dlse[i, c] * power[e] / total
    found = dict(zip(NAMES, (o, lse, weights, dlogits, dv, dedge_value), strict=True))
    for name in ("v", "edge_value"):
        if getattr(case, name) is None:
            del found[f"d{name}"]
    return {name: torch.from_numpy(x).reshape(-1, *shape).to(DEVICE) for name, x in found.items()}


CHANNELWISE = OpUnderTest(
    "channelwise_attention", IMPLS, cases, draws, results, evaluate, loops, logit="logits"
)
examples = CHANNELWISE.examples
