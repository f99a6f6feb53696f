"""Random problems for additive_attention.

As in ``attention_cases.py``, arrays come from a drawn seed and identities are judged in float64.
"""

from dataclasses import dataclass, field, replace

import oracle
import torch
from attention_cases import BF16, FAST, FP16, FP32, FP64, IMPLS, LAYOUTS, arrange, dropout_of
from hypothesis import strategies as st
from problems import DEVICE, GraphProblem, OpUnderTest, planned

from fastgt import AuxRequest, DropoutSeed, Graph, additive_attention
from fastgt.contract import Walks
from fastgt.ops.walks import CPU, GATHER, column_walk, row_walk
from fastgt.testing import random_edge_index, with_index_dtype

WAYS = [*FAST, "buckets"]
ALL = ["reference", *WAYS]
EDGE_TERMS = ("edge_key", "edge_attr", "edge_key_weight", "edge_bias")
# words for what a case has on its edges, each of them or not
WORDS = ("key", "attr", "bias", "drop", "numbered")
EVERYTHING = " ".join(WORDS)

# what a tensor, a result or a gradient has an entry for
OVER = {
    **dict.fromkeys(("q", "o", "lse"), "rows"),
    **dict.fromkeys(("k", "v"), "cols"),
    **dict.fromkeys(("edge_key", "edge_attr", "edge_bias", "weights"), "edges"),
    **dict.fromkeys(("weight", "edge_key_weight"), "none"),
}


@dataclass(repr=False)
class Case(GraphProblem):
    """One problem: inputs, upstream gradients and options."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    weight: torch.Tensor
    do: torch.Tensor
    dlse: torch.Tensor
    options: dict
    terms: dict = field(default_factory=dict)  # edge tensors by the public function's names

    def tensors(self):
        names = ("q", "k", "v", "weight", "do", "dlse")
        return {name: getattr(self, name) for name in names} | self.terms

    def having(self, **tensors):
        terms = self.terms | {name: tensors.pop(name) for name in self.terms if name in tensors}
        return replace(self, terms=terms, **tensors)

    def over(self, name):
        return OVER[name.removeprefix("d")] if name not in OVER else OVER[name]


def case(
    seed=0,
    rows=10,
    edges=40,
    *,
    cols=None,
    heads=2,
    d=5,
    dv=4,
    dtype=FP64,
    index=torch.int32,
    kind="uniform",
    isolated=0,
    layout="contiguous",
    terms="bias",
    slope=0.2,
    plan="gather",
):
    """A random case; ``terms``: words of WORDS."""
    made_by = f"case({', '.join(f'{name}={value!r}' for name, value in locals().items())})"
    m, words = rows if cols is None else cols, terms.split()
    edge_index = random_edge_index(seed, rows, edges, cols=m, kind=kind, isolated=isolated)
    edge_index = edge_index.to(DEVICE)
    graph = with_index_dtype(Graph.from_edge_index(edge_index, (rows, m)), index)
    graph = planned(graph, plan)
    generator = torch.Generator().manual_seed(seed)
    e, c = edge_index.shape[1], 3

    def tensor(*shape, dtype=dtype):
        x = torch.randn(shape, generator=generator, dtype=FP64)
        return arrange(x.to(DEVICE, dtype), layout)

    q, k, v = tensor(rows, heads, d), tensor(m, heads, d), tensor(m, heads, dv)
    weight, do = tensor(heads, d), tensor(rows, heads, dv)
    dlse = tensor(rows, heads, dtype=FP64 if dtype == FP64 else FP32)
    made = {}
    if "key" in words:
        made["edge_key"] = tensor(e, heads, d)
    if "attr" in words:
        made |= {"edge_attr": tensor(e, c), "edge_key_weight": tensor(c, heads, d)}
    if "bias" in words:
        made["edge_bias"] = tensor(e, heads)
    options = {"negative_slope": slope}
    if "drop" in words:
        options |= {"dropout_p": 0.3, "dropout_seed": seed}
        if "numbered" in words:
            # as a rank knows some edges and heads of a large graph
            numbers = torch.randint(2**40, (e,), generator=generator).to(DEVICE)
            options["dropout_seed"] = DropoutSeed(seed, numbers, seed % 7)
    tensors, named = (q, k, v, weight, do, dlse), {"made_by": made_by, "plan": plan}
    return Case(seed, edge_index, graph, *tensors, options, made, **named)


@st.composite
def cases(draw, impl, **fixed):
    """Small where the interpreter runs it."""
    small = impl == "triton" and DEVICE == "cpu"
    choices = {
        "seed": st.integers(0, 2**31),
        "rows": st.integers(0, 12 if small else 64),
        "edges": st.integers(0, 40 if small else 200),
        "heads": st.sampled_from([1, 2, 3, 8, 9]),
        "d": st.sampled_from([1, 2, 4, 5, 8, 16, 17, 32]),
        "dv": st.sampled_from([1, 4, 8, 16, 17]),
        "dtype": st.sampled_from([FP64, FP32, BF16, FP16]),
        "index": st.sampled_from([torch.int32, torch.int64]),
        "kind": st.sampled_from(["uniform", "power_law", "hub"]),
        "isolated": st.integers(0, 3),
        "layout": st.sampled_from(LAYOUTS),
        "terms": st.sets(st.sampled_from(WORDS)).map(lambda words: " ".join(sorted(words))),
        "slope": st.sampled_from([0.2, 0.0, 1.0, -0.5, 2.0]),
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
    call = case.q, case.k, case.v, case.graph, case.weight
    o, aux = additive_attention(*call, **options | case.terms | changes)
    return o, aux.lse, aux.weights


def walks(graph, impl):
    """The edges of a graph, as the op takes them for one implementation."""
    plan = CPU if impl == "cpp" else GATHER
    return Walks(row_walk(graph, plan), column_walk(graph, plan))


def evaluate(case, impl, dtype=None, **changes):
    """Outputs and gradients by name; ``dtype`` casts the inputs first."""
    if dtype is not None:
        case = case.having(**{name: t.to(dtype) for name, t in case.tensors().items()})
    y, leaves = case.leaves()
    o, lse, weights = attend(y, impl, **changes)
    upstream = case.do, case.dlse.to(lse.dtype)
    grads = torch.autograd.grad((o, lse), list(leaves.values()), upstream, materialize_grads=True)
    found = {"o": o, "lse": lse, "weights": weights}
    found |= {f"d{name}": x for name, x in zip(leaves, grads, strict=True)}
    return {name: x.detach() for name, x in found.items()}


def results(case, impl):
    """Outputs by name, connected to the inputs."""
    return dict(zip(("o", "lse", "weights"), attend(case, impl), strict=True))


def loops(case):
    """The oracle's results."""
    tensors = {name: t.double().cpu().numpy() for name, t in case.tensors().items()}
    options = {"slope": case.options["negative_slope"]}
    options |= dropout_of(case.options)
    found = oracle.additive_attention(case.edge_index.tolist(), **tensors, **options)
    return {name: torch.from_numpy(x).to(DEVICE) for name, x in found.items()}


ADDITIVE = OpUnderTest(
    "additive_attention", IMPLS, cases, draws, results, evaluate, loops, logit="edge_bias"
)
examples = ADDITIVE.examples
