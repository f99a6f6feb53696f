"""Random problems for segment_softmax, aggregate and gated_aggregate, and their equations in loops.

As in ``attention_cases``: Hypothesis draws shapes, dtype, layout and a seed; arrays come from the
seed.
"""

import itertools
import math
from dataclasses import dataclass, field, replace

import numpy as np
import pytest
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
)
from hypothesis import strategies as st
from problems import DEVICE, GraphProblem, OpUnderTest, planned

from fastgt import AuxRequest, Graph, aggregate, gated_aggregate, segment_softmax
from fastgt.testing import random_edge_index, with_index_dtype

OPS = ("softmax", "sum", "mean", "max", "gated")
PLANS = ("gather", "buckets")
FAST_WAYS = [*FAST, "buckets"]
WAYS = ["reference", *FAST_WAYS]
# every combination of options that a kernel tells apart
KINDS = [
    *(
        (op, {"takes": takes, "relu": relu, "ties": op == "max"})
        for op in ("sum", "mean", "max")
        for takes in range(3)
        for relu in (False, True)
    ),
    *(
        (op, {"takes": takes, "relu": relu, "ties": op == "max", "weight": weight})
        for op in ("sum", "mean", "max")
        for takes, relu, weight in (
            *itertools.product(range(3), (False, True), ("edge", "channel")[: 1 + (op != "mean")]),
        )
    ),
    *(
        (op, {"takes": takes, "relu": relu, "ties": op == "max", "weight": weight, "attr": 3})
        for op in ("sum", "mean", "max")
        for takes in range(3)
        for relu, weight in ((False, ""), (True, ""), (True, "edge"), (True, "channel"))
    ),
    *(
        ("gated", {"takes": takes, "normalize": normalize})
        for takes in range(7)
        for normalize in (True, False)
    ),
    *(
        ("gated", {"takes": takes, "normalize": normalize, "weight": weight, "value": value})
        for takes in (0, 3, 4)
        for normalize in (True, False)
        for weight, value in (("edge", False), ("channel", True), ("", True))
    ),
    ("softmax", {}),
]
# one of each family
FAMILIES = [
    ("softmax", {}),
    ("sum", {"relu": True}),
    ("mean", {}),
    ("max", {"relu": True}),
    ("gated", {}),
    ("sum", {"relu": True, "weight": "edge"}),
    ("max", {"relu": True, "weight": "channel"}),
    ("gated", {"weight": "edge", "value": True}),
    ("gated", {"weight": "channel"}),
]
NAMES = (*OPS, "weighted_sum", "weighted_max", "weighted_gates", "channels_of_weights")
each_family = pytest.mark.parametrize(("op", "options"), FAMILIES, ids=NAMES)
# what each input has a row for
OVER = {
    "x": "cols",
    "edge_value": "edges",
    "edge_weight": "edges",
    "edge_attr": "edges",
    "edge_value_weight": "none",
    "gate": "edges",
    "gate_row": "rows",
    "gate_col": "cols",
    "logit": "edges",
}
TAKES = {
    "softmax": [("logit",)],
    "gated": [
        ("x", *gates)
        for n in (3, 2, 1)
        for gates in itertools.combinations(("gate", "gate_row", "gate_col"), n)
    ],
}
MESSAGES = [("x", "edge_value"), ("x",), ("edge_value",)]


@dataclass(repr=False)
class Case(GraphProblem):
    """One problem: inputs by name, upstream gradients and options."""

    op: str
    inputs: dict
    do: torch.Tensor
    de: torch.Tensor | None
    options: dict = field(default_factory=dict)

    def tensors(self):
        upstream = {"do": self.do} | ({} if self.de is None else {"de": self.de})
        return self.inputs | upstream

    def having(self, **tensors):
        upstream = {name: tensors.pop(name) for name in ("do", "de") if name in tensors}
        return replace(self, inputs=self.inputs | tensors, **upstream)

    def over(self, name):
        name = name.removeprefix("d")
        if name in ("o", "e"):
            return "edges" if name == "e" or self.op == "softmax" else "rows"
        return OVER[name]


def case(
    op,
    seed=0,
    rows=9,
    edges=40,
    *,
    cols=None,
    channels=(5,),
    dtype=FP64,
    index=torch.int32,
    kind="uniform",
    isolated=0,
    layout="contiguous",
    takes=0,
    relu=False,
    normalize=True,
    eps=0.1,
    ties=False,
    weight="",
    value=False,
    attr=0,
    plan="gather",
):
    """A random case; ``takes`` says which of the optional inputs are there. With ``ties``, values
    are quarters: many are equal, and no sum of two is rounded. Weights are then 0, 1, 2 or -1, -2.

    ``weight``: one an "edge", one a "channel" or "" for none. ``value``: on edges, of gated ones.
    ``attr``: attributes of an edge, of messages.
    """
    made_by = f"case({', '.join(f'{name}={value!r}' for name, value in locals().items())})"
    cols = rows if cols is None else cols
    edge_index = random_edge_index(seed, rows, edges, cols=cols, kind=kind, isolated=isolated)
    edge_index = edge_index.to(DEVICE)
    graph = planned(with_index_dtype(Graph.from_edge_index(edge_index, (rows, cols)), index), plan)
    generator = torch.Generator().manual_seed(seed)
    layouts = itertools.cycle((layout, "contiguous", layout))
    sizes = {"rows": rows, "cols": cols, "edges": edge_index.shape[1]}

    def tensor(n, channels=channels):
        x = torch.randn(n, *channels, generator=generator, dtype=FP64)
        x = (4 * x).round() / 4 if ties else x
        layout = next(layouts)
        if layout == "transposed" and not channels:
            layout = "reversed"
        return arrange(x.to(DEVICE, dtype), layout)

    kinds = TAKES.get(op, MESSAGES)
    inputs = {name: tensor(sizes[OVER[name]]) for name in kinds[takes % len(kinds)]}
    if weight and op != "softmax":
        each = tensor(sizes["edges"], channels if weight == "channel" else ())
        inputs["edge_weight"] = each.round().clamp(-2, 2) if ties else each
    if value and op == "gated":
        inputs["edge_value"] = tensor(sizes["edges"])
    if attr and op in ("sum", "mean", "max"):
        inputs["edge_attr"] = tensor(sizes["edges"], (attr,))
        factor = tensor(attr)
        inputs["edge_value_weight"] = factor.round().clamp(-1, 1) if ties else factor
    options = {}
    if op in ("sum", "mean", "max"):
        options = {"reduce": op, "activation": "relu" if relu else None}
    elif op == "gated":
        options = {"normalize": normalize, "eps": eps}
    do = tensor(sizes["edges" if op == "softmax" else "rows"])
    de = tensor(sizes["edges"]) if op == "gated" else None
    named = {"made_by": made_by, "plan": plan}
    return Case(seed, edge_index, graph, op, inputs, do, de, options, **named)


@st.composite
def cases(draw, impl, **fixed):
    """Small where the interpreter runs it: about 8 ms a program."""
    small = impl == "triton" and DEVICE == "cpu"
    choices = {
        "op": st.sampled_from(OPS),
        "seed": st.integers(0, 2**31),
        "rows": st.integers(0, 10 if small else 64),
        "edges": st.integers(0, 40 if small else 300),
        "cols": st.integers(0, 10 if small else 64),
        "channels": st.sampled_from([(1,), (5,), (8,), (10,), (17,), (2, 3), (3, 2, 2), ()]),
        "dtype": st.sampled_from([FP64, FP32, BF16, FP16]),
        "index": st.sampled_from([torch.int32, torch.int64]),
        "kind": st.sampled_from(["uniform", "power_law", "hub"]),
        "isolated": st.integers(0, 3),
        "layout": st.sampled_from(LAYOUTS),
        "takes": st.integers(0, 6),
        "relu": st.booleans(),
        "normalize": st.booleans(),
        "eps": st.sampled_from([0.0, 1e-6, 0.5]),
        "ties": st.booleans(),
        "weight": st.sampled_from(["", "edge", "channel"]),
        "value": st.booleans(),
        "attr": st.sampled_from([0, 0, 1, 4, 17]),
    }
    if impl == "triton":
        choices["plan"] = st.sampled_from(PLANS)
    return case(**{name: draw(s) for name, s in choices.items() if name not in fixed}, **fixed)


def draws(count, impl):
    """Fewer where the interpreter runs them."""
    return max(6, count // 2) if impl == "triton" and DEVICE == "cpu" else 2 * count


def call(case, impl, **changes):
    """The public function on a case: its outputs, always with the gates where there are some."""
    if impl in PLANS:
        case, impl = replace(case, graph=planned(case.graph, impl)), "triton"
    inputs, options = dict(case.inputs), case.options | {"impl": impl} | changes
    if case.op == "softmax":
        return (segment_softmax(inputs["logit"], case.graph, **options),)
    x = inputs.pop("x", None)
    if case.op == "gated":
        request = AuxRequest(edge_scores=True)
        out, aux = gated_aggregate(x, case.graph, **inputs, **options, return_aux=request)
        return out, aux.edge_scores
    return (aggregate(x, case.graph, **inputs, **options),)


def results(case, impl):
    """Outputs by name, connected to the inputs."""
    return dict(zip(("o", "e"), call(case, impl), strict=False))


def evaluate(case, impl, dtype=None):
    """Outputs and gradients by name; ``dtype`` casts the inputs first."""

    def cast(x):
        return x if dtype is None else x.to(dtype)

    leaves = {name: cast(x).detach().requires_grad_() for name, x in case.inputs.items()}
    outputs = call(replace(case, inputs=leaves), impl)
    upstream = [cast(x) for x in (case.do, case.de) if x is not None]
    grads = torch.autograd.grad(outputs, list(leaves.values()), upstream)
    found = dict(zip(("o", "e"), outputs, strict=False))
    found |= {f"d{name}": x for name, x in zip(leaves, grads, strict=True)}
    return {name: x.detach() for name, x in found.items()}


def loops(case):
    """The equations once more, row by row and edge by edge, and their gradients by hand."""
    shape = case.do.shape[1:]
    given = case.inputs | {"do": case.do, "de": case.de}
    given = {name: x for name, x in given.items() if x is not None}
    # weights of edges have one channel
    arrays = {
        name: x.double().cpu().numpy().reshape(len(x), math.prod(x.shape[1:]))
        for name, x in given.items()
    }
    edges = list(zip(*case.edge_index.tolist(), strict=True))
    rows = case.graph.num_rows
    mine = [[(e, j) for e, (j, target) in enumerate(edges) if target == i] for i in range(rows)]
    work = {"softmax": _softmax, "gated": _gated}.get(case.op, _messages)
    found = work(mine, arrays, len(edges), **case.options)
    shapes = {f"d{name}": x.shape[1:] for name, x in case.inputs.items()}
    return {
        name: torch.from_numpy(x).reshape(len(x), *shapes.get(name, shape)).to(DEVICE)
        for name, x in found.items()
    }


def _softmax(mine, given, num_edges):
    x, dy = given["logit"], given["do"]
    y, dx = np.zeros_like(x), np.zeros_like(x)
    for edges in mine:
        at = [e for e, _ in edges]
        if at:
            p = np.exp(x[at] - x[at].max(0))
            y[at] = p / p.sum(0)
            for c in range(x.shape[1]):
                w = y[at, c]
                dx[at, c] = (np.diag(w) - np.outer(w, w)) @ dy[at, c]
    return {"o": y, "dlogit": dx}


def _messages(mine, given, num_edges, *, reduce, activation):
    do = given["do"]
    o = np.zeros_like(do)
    names = [name for name in given if name not in ("do", "de")]
    grads = {f"d{name}": np.zeros_like(given[name]) for name in names}
    for i, edges in enumerate(mine):
        for c in range(do.shape[1]):
            raw, weight, at = {}, dict.fromkeys([e for e, _ in edges], 1.0), c
            if "edge_weight" in given:
                at = c if given["edge_weight"].shape[1] == do.shape[1] else 0
                weight = {e: given["edge_weight"][e, at] for e in weight}
            for e, j in edges:
                raw[e] = given["x"][j, c] if "x" in given else 0.0
                raw[e] += given["edge_value"][e, c] if "edge_value" in given else 0.0
                if "edge_attr" in given:
                    raw[e] += given["edge_attr"][e] @ given["edge_value_weight"][:, c]
            bare = {e: max(v, 0.0) if activation else v for e, v in raw.items()}
            m = {e: weight[e] * v for e, v in bare.items()}
            share = dict.fromkeys(m, 0.0)
            if m and reduce == "max":
                best = max(m, key=lambda e, m=m: (m[e], -e))
                o[i, c], share[best] = m[best], 1.0
            elif m:
                each = 1.0 / len(m) if reduce == "mean" else 1.0
                o[i, c] = sum(m.values()) * each
                share = dict.fromkeys(m, each)
            for e, j in edges:
                if "edge_weight" in given:
                    grads["dedge_weight"][e, at] += share[e] * do[i, c] * bare[e]
                if activation is None or raw[e] > 0:
                    dm = weight[e] * share[e] * do[i, c]
                    if "x" in given:
                        grads["dx"][j, c] += dm
                    if "edge_value" in given:
                        grads["dedge_value"][e, c] += dm
                    if "edge_attr" in given:
                        grads["dedge_attr"][e] += dm * given["edge_value_weight"][:, c]
                        grads["dedge_value_weight"][:, c] += dm * given["edge_attr"][e]
    return {"o": o} | grads


def _gated(mine, given, num_edges, *, normalize, eps):
    x, do, de = given["x"], given["do"], given["de"]
    o, e_out = np.zeros_like(do), np.zeros((num_edges, x.shape[1]))
    gates = [name for name in ("gate", "gate_row", "gate_col") if name in given]
    more = [name for name in ("edge_weight", "edge_value") if name in given]
    grads = {f"d{name}": np.zeros_like(given[name]) for name in ("x", *gates, *more)}
    edge = np.zeros((num_edges, x.shape[1]))
    weight, value = given.get("edge_weight", edge[:, :1] + 1), given.get("edge_value", edge)
    for i, edges in enumerate(mine):
        at = {"gate_row": i}
        for e, j in edges:
            at |= {"gate": e, "gate_col": j}
            e_out[e] = sum(given[name][at[name]] for name in gates)
        sigma = {e: 1 / (1 + np.exp(-e_out[e])) for e, _ in edges}
        eta = {e: weight[e] * sigma[e] for e, _ in edges}
        above = sum((eta[e] * (x[j] + value[e]) for e, j in edges), np.zeros(x.shape[1]))
        below = sum(eta.values(), np.zeros(x.shape[1])) + eps if normalize else 1.0
        if not edges:
            continue
        if normalize:  # a denominator of 0 gives 0
            below = np.where(below == 0, np.inf, below)
        o[i] = above / below
        for e, j in edges:
            slope = do[i] * ((x[j] + value[e]) / below - (above / below**2 if normalize else 0.0))
            ds = slope * weight[e] * sigma[e] * (1 - sigma[e]) + de[e]
            grads["dx"][j] += do[i] * eta[e] / below
            if "edge_value" in given:
                grads["dedge_value"][e] += do[i] * eta[e] / below
            if "edge_weight" in given:
                share = slope * sigma[e]
                grads["dedge_weight"][e] += share if weight.shape == edge.shape else share.sum()
            at |= {"gate": e, "gate_col": j}
            for name in gates:
                grads[f"d{name}"][at[name]] += ds
    return {"o": o, "e": e_out} | grads


def walks(graph, impl):
    if impl == "cpp":
        return [graph.row_ptr, graph.col, graph.edge], list(graph.columns)
    plan = graph.plan("gather").settled
    return list(graph.row_walk(plan)), list(graph.column_walk(plan))


def degrees(op, counts, cols, **options):
    """Row i has counts[i] edges, shuffled; columns are random."""
    generator = torch.Generator().manual_seed(0)
    target = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    source = torch.randint(cols, target.shape, generator=generator)
    order = torch.randperm(len(target), generator=generator)
    index = torch.stack([source, target])[:, order].to(DEVICE)
    return case(op, 0, len(counts), len(target), cols=cols, **options).onto(index)


def zeros(*shape, dtype=FP32, device=DEVICE):
    return torch.zeros(shape, dtype=dtype, device=device)


# all three: which one is drawn, or fixed by its name in OPS
AGGREGATE = OpUnderTest("aggregate", IMPLS, cases, draws, results, evaluate, loops)
SOFTMAX = replace(AGGREGATE, name="segment_softmax", logit="logit")
examples = AGGREGATE.examples
