"""Random problems for neighborhood_attention and how they are evaluated and compared.

Hypothesis draws shapes, dtype, layout and a seed; arrays come from the seed. Identities between two
runs are judged in float64, where a wrong formula cannot hide; the arithmetic of the other dtypes is
judged against that of plain PyTorch.
"""

import itertools
import math
from dataclasses import dataclass, field, replace

import numpy as np
import oracle
import torch
from hypothesis import strategies as st
from problems import DEVICE, PLANS, GraphProblem, OpUnderTest, planned

from fastgt import AuxRequest, DropoutSeed, Graph, neighborhood_attention, reference
from fastgt.contract import Dropout, EdgeTerms, HeadMask, Logit, Switches
from fastgt.testing import random_edge_index, with_index_dtype

FAST = ["cpp", "triton"] if DEVICE == "cpu" else ["triton"]
IMPLS = ["reference", *FAST]
FP64, FP32, BF16, FP16 = torch.float64, torch.float32, torch.bfloat16, torch.float16
# every way through the kernels, where a test does not draw one
WAYS = ["buckets", "windows 64"]
FAST_WAYS = [*FAST, *WAYS]
GATHERING = [*FAST, "buckets"]
ALL_TERMS = "gate key value attr-key attr-value drop scores"
TERMS_BY_HEAD = "factor key value attr-key attr-value numbered"
# words for what a case has on its edges: one of each group, or none
TERMS = ("gate factor", "key shared", "value", "attr-key", "attr-value", "drop numbered", "scores")
LAYOUTS = ("contiguous", "transposed", "reversed", "sliced", "expanded")


# what a tensor, a result or a gradient has an entry for
OVER = {
    **dict.fromkeys(("q", "o", "lse"), "rows"),
    **dict.fromkeys(("k", "v"), "cols"),
    **dict.fromkeys(("bias", "weights", "scores"), "edges"),
    **dict.fromkeys(("edge_gate", "edge_key", "edge_value", "edge_attr"), "edges"),
    **dict.fromkeys(("edge_key_weight", "edge_value_weight"), "none"),
}


@dataclass(repr=False)
class Case(GraphProblem):
    """One problem: inputs, upstream gradients and options."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    bias: torch.Tensor | None
    do: torch.Tensor
    dlse: torch.Tensor
    options: dict
    terms: dict = field(default_factory=dict)  # edge tensors by the public function's names
    dscores: torch.Tensor | None = None

    @property
    def shared(self):
        """Whether keys and values take one edge vector, which ``tensors`` has once."""
        return "edge_key" in self.terms and self.terms.get("edge_value") is self.terms["edge_key"]

    def tensors(self):
        names = ("q", "k", "v", "bias", "do", "dlse", "dscores")
        found = {name: t for name in names if (t := getattr(self, name)) is not None} | self.terms
        if self.shared:
            del found["edge_value"]
        return found

    def having(self, **tensors):
        terms = self.terms | {name: tensors.pop(name) for name in self.terms if name in tensors}
        if self.shared:
            terms["edge_value"] = terms["edge_key"]
        return replace(self, terms=terms, **tensors)

    def over(self, name):
        return OVER[name.removeprefix("d")]


def case(
    seed=0,
    rows=12,
    edges=40,
    *,
    cols=None,
    heads=2,
    group=1,
    d=8,
    dv=8,
    dtype=FP64,
    index=torch.int32,
    kind="uniform",
    isolated=0,
    layout="contiguous",
    biased=True,
    clamped=False,
    eps=0.0,
    scale=None,
    plan="gather",
    terms="",
):
    """A random case; ``heads`` counts key heads, ``group`` the query heads of each.

    ``terms``: words of TERMS. The shared edge vector takes values as wide as keys.
    """
    made_by = f"case({', '.join(f'{name}={value!r}' for name, value in locals().items())})"
    m, h = rows if cols is None else cols, heads * group
    edge_index = random_edge_index(seed, rows, edges, cols=m, kind=kind, isolated=isolated)
    edge_index = edge_index.to(DEVICE)
    graph = with_index_dtype(Graph.from_edge_index(edge_index, (rows, m)), index)
    graph = planned(graph, plan)
    generator = torch.Generator().manual_seed(seed)
    layouts = itertools.cycle((layout, "contiguous", layout))

    def tensor(*shape, dtype=dtype):
        x = torch.randn(shape, generator=generator, dtype=FP64)
        return arrange(x.to(DEVICE, dtype), next(layouts))

    words, e, c = terms.split(), edge_index.shape[1], 3
    dv = d if "shared" in words else dv
    q, k, v = tensor(rows, h, d), tensor(m, heads, d), tensor(m, heads, dv)
    bias = tensor(e, h) if biased else None
    do = tensor(rows, h, dv)
    dlse = tensor(rows, h, dtype=FP64 if dtype == FP64 else FP32)
    options = {"scale": scale, "denominator_eps": eps}
    made = {}
    for word, name, shape in (
        ("gate", "edge_gate", (e, h, d)),
        ("factor", "edge_gate", (e, h)),
        ("key", "edge_key", (e, h, d)),
        ("shared", "edge_key", (e, h, d)),
        ("value", "edge_value", (e, h, dv)),
        ("attr-key", "edge_key_weight", (c, h, d)),
        ("attr-value", "edge_value_weight", (c, h, dv)),
    ):
        if word in words:
            made[name] = tensor(*shape)
    if "shared" in words:
        made["edge_value"] = made["edge_key"]
    if any(name.endswith("weight") for name in made):
        made["edge_attr"] = tensor(e, c)
    if "drop" in words or "numbered" in words:
        options |= {"dropout_p": 0.3, "dropout_seed": seed}
    if "numbered" in words:
        # as a rank knows some edges and heads of a large graph
        numbers = torch.randint(2**40, (e,), generator=generator).to(DEVICE)
        options["dropout_seed"] = DropoutSeed(seed, numbers, seed % 7)
    dscores = tensor(e, h, d) if "scores" in words else None
    if clamped:
        wide = {name: x.double() for name, x in made.items()}
        _, aux = reference.neighborhood_attention(
            q.double(), k.double(), v.double(), graph, **wide, scale=scale,
            return_aux=AuxRequest(edge_scores=True),
        )  # fmt: skip
        options["logit_clamp"] = gap(aux.edge_scores.sum(-1))
    tensors = q, k, v, bias, do, dlse
    named = {"made_by": made_by, "plan": plan}
    return Case(seed, edge_index, graph, *tensors, options, made, dscores, **named)


def gap(logit):
    """Clamp bounds far from every logit: rounding must not decide what the clamp lets through."""
    s = logit.flatten().sort().values
    if not len(s):
        return -0.5, 0.5
    wide = s.diff() > 1e-3 * s.abs().max().clamp(min=1.0)
    between = ((s[1:] + s[:-1]) / 2)[wide]
    low, high = s[0] - 1, s[-1] + 1
    if len(between):
        low, high = (between[(between - s.quantile(part)).abs().argmin()] for part in (0.2, 0.8))
    return float(low), float(high)


def arrange(x, layout):
    """x in other strides, amid NaN where memory is left over; "expanded" repeats its first row."""
    if layout == "transposed" and x.ndim == 1:
        return x.new_full((len(x), 2), torch.nan)[:, 0].copy_(x)
    if layout == "transposed":
        return x.transpose(0, 1).contiguous().transpose(0, 1)
    if layout == "reversed":
        order = tuple(range(x.ndim))[::-1]
        return x.permute(order).contiguous().permute(order)
    if layout == "sliced":
        room = x.new_full([n + 2 for n in x.shape], torch.nan)
        inner = room[tuple(slice(1, -1) for _ in x.shape)]
        return inner.copy_(x)
    if layout == "expanded" and len(x):
        return x[:1].expand_as(x)
    return x


@st.composite
def cases(draw, impl, **fixed):
    """Small where the interpreter runs it: about 8 ms a program."""
    small = impl == "triton" and DEVICE == "cpu"
    choices = {
        "seed": st.integers(0, 2**31),
        "rows": st.integers(0, 12 if small else 64),
        "edges": st.integers(0, 50 if small else 300),
        "heads": st.sampled_from([1, 2, 3] if small else [1, 2, 3, 8]),
        "group": st.sampled_from([1, 1, 2, 3]),
        "d": st.sampled_from([1, 5, 8, 10, 16, 17, 32]),
        "dv": st.sampled_from([1, 5, 8, 10, 16, 17, 32]),
        "dtype": st.sampled_from([FP64, FP32, BF16, FP16]),
        "index": st.sampled_from([torch.int32, torch.int64]),
        "kind": st.sampled_from(["uniform", "power_law", "hub"]),
        "isolated": st.integers(0, 3),
        "layout": st.sampled_from(LAYOUTS),
        "biased": st.booleans(),
        "clamped": st.booleans(),
        "eps": st.sampled_from([0.0, 1e-6, 0.5]),
        "scale": st.sampled_from([None, 0.3, -1.0]),
    }
    if impl == "triton":
        choices["plan"] = st.sampled_from(PLANS)
    drawn = {name: draw(s) for name, s in choices.items() if name not in fixed}
    fixed = {name: draw(x) if isinstance(x, st.SearchStrategy) else x for name, x in fixed.items()}
    if "cols" not in fixed and draw(st.booleans()):
        drawn["cols"] = draw(st.integers(0, 12 if small else 64))
    return case(**drawn, **fixed)


@st.composite
def term_words(draw):
    """Any combination of TERMS."""
    words = [draw(st.sampled_from(["", *group.split()])) for group in TERMS]
    return " ".join(word for word in words if word and not (word == "value" and "shared" in words))


def draws(count, impl):
    """Fewer where the interpreter runs them."""
    return max(6, count // 2) if impl == "triton" and DEVICE == "cpu" else 2 * count


def attend(case, impl, **changes):
    """The public function on a case, with its options and all results: o, lse, weights, and edge
    scores where the case has a gradient of theirs.

    ``impl`` may be one of PLANS: Triton's kernels on the graph planned so.
    """
    if impl in PLANS:
        case, impl = replace(case, graph=planned(case.graph, impl)), "triton"
    inputs = {"q": case.q, "k": case.k, "v": case.v, "edge_bias": case.bias, **case.terms}
    request = AuxRequest(lse=True, weights=True, edge_scores=case.dscores is not None)
    options = {**case.options, "return_aux": request, "impl": impl, **changes}
    o, aux = neighborhood_attention(graph=case.graph, **inputs, **options)
    return (o, *(x for x in aux if x is not None))


def with_leaves(case, dtype=None, wanted=None):
    """-> the case on detached inputs, and those by name; ``dtype`` casts them, ``wanted`` names the
    ones that require a gradient (None: all)."""
    leaves = {}

    def leaf(name, x):
        x = x.detach() if dtype is None else x.detach().to(dtype)
        leaves[name] = x.requires_grad_(wanted is None or name in wanted)
        return x

    inputs = {n: leaf(n, getattr(case, n)) for n in ("q", "k", "v")}
    if case.bias is not None:
        inputs["bias"] = leaf("bias", case.bias)
    terms = {}
    for name, x in case.terms.items():
        # the shared edge vector is one leaf in two places
        shared = name == "edge_value" and x is case.terms.get("edge_key")
        terms[name] = terms["edge_key"] if shared else leaf(name, x)
    return replace(case, **inputs, terms=terms), leaves


def evaluate(case, impl, dtype=None):
    """Outputs and gradients by name; ``dtype`` casts the inputs first."""
    wide = FP64 if dtype == FP64 else case.dlse.dtype
    x, leaves = with_leaves(case, dtype)
    o, lse, weights, *scores = attend(x, impl)
    cast = case.do.dtype if dtype is None else dtype
    outputs = [(o, case.do.to(cast)), (lse, case.dlse.to(wide))]
    outputs += [(t, case.dscores.to(cast)) for t in scores]
    ys, dys = zip(*outputs, strict=True)
    grads = torch.autograd.grad(ys, list(leaves.values()), dys, materialize_grads=True)
    found = {"o": o, "lse": lse, "weights": weights}
    if scores:
        found["scores"] = scores[0]
    found |= {f"d{name}": g for name, g in zip(leaves, grads, strict=True)}
    return {name: t.detach() for name, t in found.items()}


def results(case, impl):
    """Outputs by name, connected to the inputs."""
    o, lse, weights, *scores = attend(case, impl)
    found = {"o": o, "lse": lse, "weights": weights}
    return found | ({"scores": scores[0]} if scores else {})


PLAIN = {
    "terms": EdgeTerms(),
    "mask": HeadMask(None, None),
    "dropout": Dropout(),
    "logit": Logit(0.3, -math.inf, math.inf, 0.0),
    "switches": Switches(),
}


def op_arguments(inputs, **changes):
    """What both registered ops take after what is theirs alone: a plain call's, with changes."""
    terms, mask, dropout, logit, switches = (PLAIN | changes).values()
    return (*inputs, *logit, *terms, *mask, *dropout, *switches)


def close(actual, expected, name="", tolerance=1e-9):
    torch.testing.assert_close(
        actual,
        expected,
        rtol=tolerance,
        atol=tolerance,
        equal_nan=True,
        msg=lambda m: f"{name}: {m}",
    )


def all_close(actual, expected, tolerance=1e-9):
    assert actual.keys() == expected.keys()
    for name, x in actual.items():
        close(x, expected[name], name, tolerance)


def same_bits(actual, expected):
    assert actual.keys() == expected.keys()
    for name, x in actual.items():
        assert torch.equal(x, expected[name]), name


def loops(case):
    """The third implementation, on the caller's edge list."""
    low, high = case.options.get("logit_clamp") or (-math.inf, math.inf)
    d, scale = case.q.shape[2], case.options["scale"]

    def array(x):
        return None if x is None else x.detach().double().cpu().numpy()

    arrays = (case.q, case.k, case.v, case.bias, case.do, case.dlse)
    found = oracle.neighborhood_attention(
        case.edge_index.tolist(),
        *map(array, arrays),
        scale=1 / math.sqrt(d) if scale is None else scale,
        low=low,
        high=high,
        eps=case.options["denominator_eps"],
        **{name: array(x) for name, x in case.terms.items()},
        dscores=array(case.dscores),
        **dropout_of(case.options),
    )
    if case.dscores is None:
        del found["scores"]
    if case.terms.get("edge_value") is case.terms.get("edge_key") and "edge_key" in case.terms:
        found["dedge_key"] += found.pop("dedge_value")
    return {name: torch.from_numpy(np.asarray(x)).to(DEVICE) for name, x in found.items()}


def dropout_of(options):
    """What an oracle takes of a call's dropout."""
    seed, numbers, first = options.get("dropout_seed", 0), None, 0
    if isinstance(seed, DropoutSeed):
        seed, numbers, first = seed.seed, seed.edge_numbers.tolist(), seed.first_head
    found = {"dropout": options.get("dropout_p", 0.0), "seed": seed, "numbers": numbers}
    return found | {"first_head": first}


ATTENTION = OpUnderTest(
    "neighborhood_attention", IMPLS, cases, draws, results, evaluate, loops, logit="bias"
)
EDGE_TERMS = replace(ATTENTION, name="neighborhood_attention with edge terms")
examples = ATTENTION.examples
