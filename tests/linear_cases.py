"""Random ragged batches for linear attention, and how they are evaluated.

Hypothesis draws sizes, shapes, dtype, layout and a seed; arrays come from the seed.
"""

import itertools
from contextlib import contextmanager
from dataclasses import dataclass, replace

import pytest
import torch
from attention_cases import BF16, DEVICE, FP16, FP32, FP64, LAYOUTS, arrange
from hypothesis import strategies as st
from problems import OpUnderTest

from fastgt import linear_attention

ELEMENTWISE = ["identity", "relu", "elu", "sigmoid"]
RANDOM = ["softmax", "relu_random"]
MAPS = [*ELEMENTWISE, *RANDOM]
# "slices" is the CPU path with several pieces and slices to a graph; "pieces" are Triton's kernels
# with several tiles of features and pieces to a graph
FORMS = ["cpp", "slices", "triton", "pieces"] if DEVICE == "cpu" else ["triton", "pieces"]


@dataclass(repr=False)
class Case:
    """One problem: inputs, the upstream gradient and options."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    offsets: torch.Tensor | None
    do: torch.Tensor
    options: dict
    made_by: str = ""

    def __repr__(self):
        return self.made_by

    def bounds(self):
        """(begin, end) of every graph."""
        ends = [0, len(self.q)] if self.offsets is None else self.offsets.tolist()
        return list(itertools.pairwise(ends))


def case(
    seed=0,
    sizes=(3, 0, 17, 1),
    *,
    heads=2,
    d=8,
    dv=6,
    feature_map="elu",
    m=7,
    dtype=FP64,
    index=torch.int64,
    layout="contiguous",
    eps=1e-6,
    normalize=True,
):
    """A random case; ``sizes`` None: one graph of 9 nodes without offsets."""
    made_by = f"case({', '.join(f'{name}={value!r}' for name, value in locals().items())})"
    generator = torch.Generator().manual_seed(seed)
    layouts = itertools.cycle((layout, "contiguous", layout))

    def tensor(*shape):
        x = torch.randn(shape, generator=generator, dtype=FP64)
        return arrange(x.to(DEVICE, dtype), next(layouts))

    offsets = None
    if sizes is not None:
        offsets = torch.tensor([0, *sizes]).cumsum(0).to(DEVICE, index)
    n = 9 if sizes is None else sum(sizes)
    q, k, v, do = (
        tensor(n, heads, d),
        tensor(n, heads, d),
        tensor(n, heads, dv),
        tensor(n, heads, dv),
    )
    options = {"feature_map": feature_map, "eps": eps, "normalize": normalize}
    if feature_map in RANDOM:
        projection = torch.randn(m, d, generator=generator, dtype=FP64)
        options["projection"] = projection.to(DEVICE, FP64 if dtype == FP64 else FP32)
    if feature_map == "identity" and normalize:
        # denominators far from 0: sums of products of either sign would come close
        q, k = q.abs() + 0.1, k.abs() + 0.1
    return Case(q, k, v, offsets, do, options, made_by)


@st.composite
def cases(draw, form, **fixed):
    small = form in ("triton", "pieces") and DEVICE == "cpu"
    size = st.integers(0, 20 if small else 70)
    choices = {
        "seed": st.integers(0, 2**31),
        "sizes": st.none() | st.lists(size, max_size=3 if small else 9),
        "heads": st.sampled_from([1, 2] if small else [1, 2, 3]),
        "d": st.sampled_from([1, 5, 16, 17, 40]),
        "dv": st.sampled_from([1, 5, 16, 17, 40]),
        "feature_map": st.sampled_from(MAPS),
        "m": st.sampled_from([1, 7, 16, 33]),
        "dtype": st.sampled_from([FP64, FP32, BF16, FP16]),
        "index": st.sampled_from([torch.int32, torch.int64]),
        "layout": st.sampled_from(LAYOUTS),
        "eps": st.sampled_from([1e-6, 0.5]),
        "normalize": st.booleans(),
    }
    drawn = {name: draw(s) for name, s in choices.items() if name not in fixed}
    return case(**drawn, **fixed)


def draws(count, form):
    """Fewer where the interpreter runs them."""
    return max(6, count // 3) if form in ("triton", "pieces") and DEVICE == "cpu" else count


@contextmanager
def run_as(form):
    """-> the ``impl`` of one of FORMS, or of an ``impl``, forward and backward."""
    with pytest.MonkeyPatch.context() as patch:
        if form == "slices":
            patch.setattr("fastgt.cpu.linear_attention._SLICE", 5)
            patch.setattr("fastgt.cpu.linear_attention._PIECE", 12)
        if form == "pieces":
            from fastgt.kernels import linear_states
            from fastgt.kernels.configs import LinearTile

            patch.setattr(linear_states, "linear_tile", lambda *args: LinearTile(16, 16, 16, 4))
            patch.setattr(linear_states, "_PROGRAMS", 2**40)
            patch.setattr(linear_states, "_programs", lambda pieces, others: min(pieces, 2))
        yield {"slices": "cpp", "pieces": "triton"}.get(form, form)


def attend(x, form, **changes):
    """The public function on a case."""
    with run_as(form) as impl:
        return linear_attention(x.q, x.k, x.v, x.offsets, **x.options | changes, impl=impl)


def evaluate(x, form, dtype=None):
    """Output and gradients by name; ``dtype`` casts the inputs first."""
    cast = x.q.dtype if dtype is None else dtype
    leaves = [t.detach().to(cast).requires_grad_() for t in (x.q, x.k, x.v)]
    with run_as(form):
        o = attend(replace(x, q=leaves[0], k=leaves[1], v=leaves[2]), form)
        grads = torch.autograd.grad(o, leaves, x.do.to(cast), materialize_grads=True)
    found = {"o": o.detach()}
    return found | {f"d{name}": g for name, g in zip("qkv", grads, strict=True)}


def terms(x):
    """Sizes of what dq and dk are differences of: the share of the numerator, and of the
    denominator, in float64. A row whose features are small has large ones, which cancel."""
    if not (x.options["normalize"] and len(x.q)):
        return {}
    leaves = [t.detach().double().requires_grad_() for t in (x.q, x.k)]
    y = replace(x, q=leaves[0], k=leaves[1], v=x.v.double())
    num = attend(y, "reference", normalize=False)
    ones = replace(y, v=torch.ones_like(y.v))
    den = attend(ones, "reference", normalize=False).detach() + x.options["eps"]
    grads = torch.autograd.grad(num / den, leaves, x.do.double(), materialize_grads=True)
    return {name: g.abs() for name, g in zip(("dq", "dk"), grads, strict=True)}


def results(x, form):
    """The output by name, connected to the inputs."""
    return {"o": attend(x, form)}


def quadratic(x):
    """The reference, which is judged by loops on a few problems: these are too slow for more."""
    return evaluate(x, "reference")


LINEAR = OpUnderTest(
    "linear_attention", FORMS, cases, draws, results, evaluate, quadratic, tolerance=1e-8
)
