"""Random ragged batches for global attention, and how they are evaluated.

Hypothesis draws sizes, shapes, dtype, layout and a seed; arrays come from the seed. A case is also
a problem on the complete graph of each of its graphs, whose edges are in the order of the pairs.
"""

import itertools
import math
from contextlib import contextmanager
from dataclasses import dataclass, replace

import numpy as np
import oracle
import pytest
import torch
from attention_cases import BF16, DEVICE, FP16, FP32, FP64, LAYOUTS, arrange
from hypothesis import strategies as st
from problems import GraphProblem, OpUnderTest

from fastgt import AuxRequest, Graph, PairDropoutSeed, global_attention

# "blocks" is the CPU path with a few keys at a time, which are read again, and with several parts
# to a graph of more than 64 queries
FORMS = ["cpp", "blocks", "triton"] if DEVICE == "cpu" else ["triton"]
LSE = AuxRequest(lse=True)


@dataclass(repr=False)
class Case(GraphProblem):
    """One problem: inputs, upstream gradients and options."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    bias: torch.Tensor | None
    do: torch.Tensor
    dlse: torch.Tensor
    offsets: torch.Tensor | None
    key_offsets: torch.Tensor | None
    options: dict

    def tensors(self):
        names = ("q", "k", "v", "bias", "do", "dlse")
        return {name: t for name in names if (t := getattr(self, name)) is not None}

    def having(self, **tensors):
        return replace(self, **tensors)

    def over(self, name):
        name = name.removeprefix("d")
        if name == "bias":
            return "cols" if len(self.bias) == len(self.k) else "edges"
        return "rows" if name in ("q", "o", "lse") else "cols"

    def bounds(self):
        """(begin, end, first key, last key) of every graph."""
        return bounds(len(self.q), self.offsets, self.key_offsets)


def bounds(nodes, offsets, key_offsets):
    rows = [0, nodes] if offsets is None else offsets.tolist()
    cols = rows if key_offsets is None else key_offsets.tolist()
    pairs = zip(itertools.pairwise(rows), itertools.pairwise(cols), strict=True)
    return [(*mine, *others) for mine, others in pairs]


def case(
    seed=0,
    sizes=(3, 0, 17, 1),
    *,
    keys=None,
    heads=2,
    group=1,
    d=8,
    dv=6,
    bias="",
    drop=False,
    numbered=False,
    scale=None,
    dtype=FP64,
    index=torch.int64,
    layout="contiguous",
):
    """A random case; ``sizes`` None: one graph of 9 nodes without offsets. ``keys``: how many each
    graph has, None: as many as queries. ``bias``: "", "key" or "pair"."""
    made_by = f"case({', '.join(f'{name}={value!r}' for name, value in locals().items())})"
    generator = torch.Generator().manual_seed(seed)
    layouts = itertools.cycle((layout, "contiguous", layout))

    def tensor(*shape, dtype=dtype):
        x = torch.randn(shape, generator=generator, dtype=FP64)
        return arrange(x.to(DEVICE, dtype), next(layouts))

    def boundaries(sizes):
        if sizes is None:
            return None
        return torch.tensor([0, *sizes]).cumsum(0).to(DEVICE, index)

    n = 9 if sizes is None else sum(sizes)
    m = n if keys is None else sum(keys)
    offsets, key_offsets = boundaries(sizes), boundaries(keys)
    ends = bounds(n, offsets, key_offsets)
    edges = [(j, i) for a, b, c, e in ends for i in range(a, b) for j in range(c, e)]
    edge_index = torch.tensor(edges, dtype=torch.int64).reshape(-1, 2).T.contiguous().to(DEVICE)
    graph = Graph.from_edge_index(edge_index, (n, m))
    h = heads * group
    q, k, v = tensor(n, h, d), tensor(m, heads, d), tensor(m, heads, dv)
    b = {"": None, "key": (m, h), "pair": (len(edges), h)}[bias]
    b = None if b is None else tensor(*b)
    do = tensor(n, h, dv)
    dlse = tensor(n, h, dtype=FP64 if dtype == FP64 else FP32)
    options = {"scale": scale}
    if drop:
        options |= {"dropout_p": 0.3, "dropout_seed": seed}
        if numbered:
            # as a rank knows some pairs and heads of a large batch
            numbers = (torch.randint(2**40, (x,), generator=generator).to(DEVICE) for x in (n, m))
            options["dropout_seed"] = PairDropoutSeed(seed, *numbers, seed % 7)
    tensors = q, k, v, b, do, dlse
    return Case(seed, edge_index, graph, *tensors, offsets, key_offsets, options, made_by=made_by)


@st.composite
def cases(draw, form, **fixed):
    small = form == "triton" and DEVICE == "cpu"
    size = st.integers(0, 20 if small else 40)
    if form == "blocks":
        size = size | st.integers(60, 140)
    choices = {
        "seed": st.integers(0, 2**31),
        "sizes": st.none() | st.lists(size, max_size=3 if small else 5),
        "heads": st.sampled_from([1, 2]),
        "group": st.sampled_from([1, 1, 3]),
        "d": st.sampled_from([1, 5, 16, 17, 40]),
        "dv": st.sampled_from([1, 5, 16, 17, 40]),
        "bias": st.sampled_from(["", "key", "pair"]),
        "drop": st.booleans(),
        "numbered": st.booleans(),
        "scale": st.sampled_from([None, 0.3, -1.0]),
        "dtype": st.sampled_from([FP64, FP32, BF16, FP16]),
        "index": st.sampled_from([torch.int32, torch.int64]),
        "layout": st.sampled_from(LAYOUTS),
    }
    drawn = {name: draw(s) for name, s in choices.items() if name not in fixed}
    sizes = (drawn | fixed)["sizes"]
    if "keys" not in fixed and sizes is not None and draw(st.booleans()):
        drawn["keys"] = draw(st.lists(size, min_size=len(sizes), max_size=len(sizes)))
    return case(**drawn, **fixed)


def draws(count, form):
    """Fewer where the interpreter runs them."""
    return max(6, count // 3) if form == "triton" and DEVICE == "cpu" else count


@contextmanager
def run_as(form):
    """-> the ``impl`` of one of FORMS, or of an ``impl``, forward and backward."""
    with pytest.MonkeyPatch.context() as patch:
        if form == "blocks":
            patch.setattr("fastgt.cpu.global_attention._MOST", 16)
            patch.setattr("fastgt.cpu.global_attention._PIECE", 1)
            patch.setattr("fastgt.cpu.global_attention._PIECES", 3)
        yield {"blocks": "cpp"}.get(form, form)


def attend(x, form, **changes):
    """The public function on a case: o and lse."""
    call = {"key_offsets": x.key_offsets, "bias": x.bias, **x.options, **changes}
    with run_as(form) as impl:
        return global_attention(x.q, x.k, x.v, x.offsets, **call, return_aux=LSE, impl=impl)


def results(x, form, **changes):
    """The outputs by name, connected to the inputs."""
    o, aux = attend(x, form, **changes)
    return {"o": o, "lse": aux.lse}


def evaluate(x, form, dtype=None, **changes):
    """Outputs and gradients by name; ``dtype`` casts the inputs first."""
    cast = x.q.dtype if dtype is None else dtype
    names = [name for name in ("q", "k", "v", "bias") if getattr(x, name) is not None]
    leaves = {name: getattr(x, name).detach().to(cast).requires_grad_() for name in names}
    found = results(x.having(**leaves), form, **changes)
    upstream = [x.do.to(cast), x.dlse.to(found["lse"].dtype)]
    with run_as(form):
        grads = torch.autograd.grad(
            list(found.values()), list(leaves.values()), upstream, materialize_grads=True
        )
    found |= {f"d{name}": g for name, g in zip(leaves, grads, strict=True)}
    return {name: t.detach() for name, t in found.items()}


def loops(x):
    """Neighbourhood attention on the edges of all pairs, in loops."""
    target, source = x.edge_index[1].cpu(), x.edge_index[0].cpu()
    bias = None if x.bias is None else x.bias.detach().double().cpu()
    per_key = bias is not None and x.over("bias") == "cols"
    if per_key:
        bias = bias[source]
    arrays = (x.q, x.k, x.v, bias, x.do, x.dlse)
    arrays = [None if t is None else t.detach().double().cpu().numpy() for t in arrays]
    scale = x.options["scale"]
    seed, numbers, first = x.options.get("dropout_seed", 0), None, 0
    if isinstance(seed, PairDropoutSeed):
        seed, of_query, of_key, first = seed
        numbers = (of_query.cpu()[target] + of_key.cpu()[source]).tolist()
    found = oracle.neighborhood_attention(
        torch.stack([source, target]).tolist(),
        *arrays,
        scale=1 / math.sqrt(x.q.shape[2]) if scale is None else scale,
        low=-math.inf,
        high=math.inf,
        eps=0.0,
        dropout=x.options.get("dropout_p", 0.0),
        seed=seed,
        numbers=numbers,
        first_head=first,
    )
    del found["scores"], found["weights"]
    found = {name: torch.from_numpy(np.asarray(t)) for name, t in found.items()}
    if per_key:
        found["dbias"] = torch.zeros(x.bias.shape, dtype=FP64).index_add(0, source, found["dbias"])
    return {name: t.to(DEVICE) for name, t in found.items()}


def definition(x):
    """The reference, which is judged by loops on a few problems: these are too slow for more."""
    return evaluate(x, "reference")


GLOBAL = OpUnderTest(
    "global_attention", FORMS, cases, draws, results, evaluate, definition, tolerance=1e-9
)
