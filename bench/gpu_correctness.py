"""Every operator and every plan on thirty fixed problems, as compiled for the GPU that is there.

Outputs and gradients are held against the definition in float64 on the same device, by the bound
of :func:`fastgt.testing.assert_as_accurate`; a second run must give the same bits. What the
operators ask for uninitialised is poisoned.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

import fastgt
from fastgt import Graph, plans
from fastgt.bench import harness
from fastgt.bench.gpu_problems import PROBLEMS, SHAPES, Problem
from fastgt.testing import poisoned_memory

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
CHANNELS = 12  # of edge attributes


class Variant(NamedTuple):
    """A way to call an operator.

    Attributes:
        operator: A name in ``fastgt``.
        name: Of the way.
        inputs: From graph, heads and width to the shapes of what gets gradients, by argument.
        options: Other arguments, from the graph, heads and width; tensors too.
        plan: Of the graph.
        fits: Whether it is for such a graph, with heads of that width and dtype.
    """

    operator: str
    name: str
    inputs: Callable[[Graph, int, int], dict[str, tuple[int, ...]]]
    options: Callable[[Graph, int, int], dict[str, Any]] = lambda graph, heads, width: {}
    plan: str = "gather"
    fits: Callable[[Graph, int, torch.dtype], bool] = lambda graph, width, dtype: True


def check(
    problem: str, variant: str, dtype: torch.dtype, device: str, small: bool, tell: Callable
) -> dict[str, Any]:
    """-> a row: whether outputs and gradients are right, and the same bits twice."""
    found, how = _found(problem, small), _VARIANTS[variant]
    graph = _graph(problem, device, small)
    case = _case(found, how, graph, dtype)
    row = {
        "operator": how.operator,
        "variant": how.name,
        "problem": problem,
        "rows": graph.num_rows,
        "edges": graph.num_edges,
        "heads": found.heads,
        "width": found.width,
        "dtype": str(dtype).removeprefix("torch."),
    }
    with poisoned_memory():
        verdict, provider = harness.judge(case, "fastgt")
        if provider is not None:
            first, second = (harness.results(provider, case) for _ in range(2))
            same = all(map(torch.equal, first, second))
            verdict["same_bits"] = same
    return row | verdict


def launch(problem: str, variant: str, dtype: torch.dtype, device: str, small: bool) -> None:
    """Forward and backward, without a look at what comes out: what is compiled is wanted."""
    found, how = _found(problem, small), _VARIANTS[variant]
    graph = _graph(problem, device, small)
    shapes = how.inputs(graph, found.heads, found.width).values()
    inputs = [torch.zeros(x, dtype=dtype, device=device, requires_grad=True) for x in shapes]
    out = _call(found, how, graph, dtype, "triton")(*inputs)
    torch.autograd.grad(out, inputs, torch.zeros_like(out), allow_unused=True)


def groups(small: bool) -> Iterator[list[tuple[str, str, torch.dtype]]]:
    """Problems, ways and dtypes; those of a group share their kernels. Every operator has had its
    turn in every dtype before another width is begun. ``small``: as many as cover every way and
    every dtype, for a rehearsal."""
    for heads, width in SHAPES[:1] if small else SHAPES:
        for dtype in DTYPES:
            for place, (name, how) in enumerate(_VARIANTS.items()):
                if small and DTYPES[place % len(DTYPES)] != dtype:
                    continue
                problems = [x for x in PROBLEMS if (x.heads, x.width) == (heads, width)]
                fitting = [
                    x.name for x in problems if how.fits(_graph(x.name, "cpu", small), width, dtype)
                ]
                chosen = fitting[place % len(fitting) :][:1] if small and fitting else fitting
                if chosen:
                    yield [(problem, name, dtype) for problem in chosen]


def _case(problem: Problem, how: Variant, graph: Graph, dtype: torch.dtype) -> harness.Case:
    generator = torch.Generator().manual_seed(0)

    def draw(shape: Sequence[int]) -> Tensor:
        return torch.randn(*shape, generator=generator).to(graph.device, dtype)

    shapes = how.inputs(graph, problem.heads, problem.width)
    inputs = {name: draw(shape) for name, shape in shapes.items()}
    definition = _call(problem, how, graph, None, "reference")
    ours = harness.Provider(_call(problem, how, graph, dtype, "triton"))
    with torch.no_grad():
        out = definition(*inputs.values())
    return harness.Case(
        shape={},
        inputs=inputs,
        upstream=draw(out.shape),
        definition=lambda dtype: harness.Provider(definition),
        providers={"fastgt": lambda: ours},
    )


def _call(
    problem: Problem, how: Variant, graph: Graph, dtype: torch.dtype | None, impl: str
) -> Callable[..., Tensor]:
    """The operator on a variant's inputs; by its plan, if there is a dtype."""
    heads, width = problem.heads, problem.width
    names = list(how.inputs(graph, heads, width))
    options = {
        name: x.to(graph.device) if isinstance(x, Tensor) else x
        for name, x in how.options(graph, heads, width).items()
    }
    if how.operator not in _PACKED:
        options["graph"] = graph if dtype is None else _planned(graph, how, width, dtype)
    operator = getattr(fastgt, how.operator)
    return lambda *tensors: operator(**dict(zip(names, tensors, strict=True)), **options, impl=impl)


def _planned(graph: Graph, how: Variant, width: int, dtype: torch.dtype) -> Graph:
    if how.plan == "gather":
        return graph.plan("gather")
    return graph.plan(how.plan, height=plans.tallest(width, dtype.itemsize))  # type: ignore[arg-type]


def _found(problem: str, small: bool) -> Problem:
    """As it is, or of a size for Triton's interpreter."""
    found = _PROBLEMS[problem]
    return found._replace(nodes=min(found.nodes, 3), heads=2, width=8) if small else found


@functools.cache
def _graph(problem: str, device: str, small: bool) -> Graph:
    graph = (found := _found(problem, small)).make(found.nodes).to(device)
    graph.columns  # noqa: B018  as all walks, made once for a graph
    return graph


def _attention(graph: Graph, heads: int, width: int) -> dict[str, tuple[int, ...]]:
    q, k = (graph.num_rows, heads, width), (graph.num_cols, heads, width)
    return {"q": q, "k": k, "v": k}


def _on_edges(*names: str) -> Callable[[Graph, int, int], dict[str, tuple[int, ...]]]:
    """Attention's inputs, and edge tensors of these names."""

    def inputs(graph: Graph, heads: int, width: int) -> dict[str, tuple[int, ...]]:
        edges = graph.num_edges
        shapes = {
            "edge_bias": (edges, heads),
            "edge_gate": (edges, heads, width),
            "edge_key": (edges, heads, width),
            "edge_value": (edges, heads, width),
            "edge_attr": (edges, CHANNELS),
            "edge_key_weight": (CHANNELS, heads, width),
            "edge_value_weight": (CHANNELS, heads, width),
        }
        return _attention(graph, heads, width) | {name: shapes[name] for name in names}

    return inputs


def _grouped(graph: Graph, heads: int, width: int) -> dict[str, tuple[int, ...]]:
    """Two query heads for each key head."""
    k = graph.num_cols, heads, width
    return {"q": (graph.num_rows, 2 * heads, width), "k": k, "v": k}


def _messages(*names: str) -> Callable[[Graph, int, int], dict[str, tuple[int, ...]]]:
    def inputs(graph: Graph, heads: int, width: int) -> dict[str, tuple[int, ...]]:
        rows = {
            "x": graph.num_cols,
            "edge_value": graph.num_edges,
            "gate": graph.num_edges,
            "gate_row": graph.num_rows,
            "gate_col": graph.num_cols,
        }
        shapes = {name: (size, heads, width) for name, size in rows.items()}
        shapes["edge_weight"] = (graph.num_edges,)
        return {name: shapes[name] for name in names}

    return inputs


def _edges_only(graph: Graph, heads: int, width: int) -> dict[str, tuple[int, ...]]:
    return {"x": (graph.num_edges, heads)}


def _nodes(*names: str) -> Callable[[Graph, int, int], dict[str, tuple[int, ...]]]:
    return lambda graph, heads, width: dict.fromkeys(names, (graph.num_rows, heads, width))


def _vectors(graph: Graph, heads: int, width: int) -> dict[str, tuple[int, ...]]:
    edge = graph.num_edges, heads, width
    return {"logits": edge, "v": (graph.num_cols, heads, width), "edge_value": edge}


def _key_bias(graph: Graph, heads: int, width: int) -> dict[str, tuple[int, ...]]:
    return _nodes("q", "k", "v")(graph, heads, width) | {"bias": (graph.num_cols, heads)}


def _additive(graph: Graph, heads: int, width: int) -> dict[str, tuple[int, ...]]:
    rows, cols = (graph.num_rows, heads, width), (graph.num_cols, heads, width)
    return {"q": rows, "k": cols, "v": cols, "weight": (heads, width)}


def _additive_edges(graph: Graph, heads: int, width: int) -> dict[str, tuple[int, ...]]:
    """One channel of queries and keys, as GAT has."""
    given = {name: (*size[:-1], 1) for name, size in _additive(graph, heads, width).items()}
    edges = {"edge_key": (graph.num_edges, heads, 1), "edge_bias": (graph.num_edges, heads)}
    return given | edges | {"v": (graph.num_cols, heads, width)}


def _into_heads(graph: Graph, heads: int, width: int) -> dict[str, tuple[int, ...]]:
    channels = heads * width
    weight = heads, width, channels
    return {"x": (graph.num_rows, channels), "weight": weight, "bias": (heads, width)}


def _out_of_heads(graph: Graph, heads: int, width: int) -> dict[str, tuple[int, ...]]:
    channels = heads * width
    weight = channels, heads, width
    return {"x": (graph.num_rows, heads, width), "weight": weight, "bias": (channels,)}


def _clamped(graph: Graph, heads: int, width: int) -> dict[str, Any]:
    return {"logit_clamp": 5.0, "scale": 3 / width**0.5}  # a tenth of the logits are beyond it


def _dropped(graph: Graph, heads: int, width: int) -> dict[str, Any]:
    return {"dropout_p": 0.3, "dropout_seed": 7}


def _gate(graph: Graph, heads: int, width: int) -> dict[str, Any]:
    """Every other head, those of each graph by themselves."""
    place = torch.arange(graph.num_graphs)[:, None] + torch.arange(heads)
    return {"head_gate": (place % 2 == 0).to(torch.bool)}


def _one_gate(graph: Graph, heads: int, width: int) -> dict[str, Any]:
    return {"head_gate": torch.arange(heads) % 2 == 0}


def _offsets(graph: Graph, heads: int, width: int) -> dict[str, Any]:
    return {"offsets": graph.graph_ptr}


def _ragged_dropped(graph: Graph, heads: int, width: int) -> dict[str, Any]:
    return _offsets(graph, heads, width) | _dropped(graph, heads, width)


def _ragged_gate(graph: Graph, heads: int, width: int) -> dict[str, Any]:
    return _offsets(graph, heads, width) | _gate(graph, heads, width)


def _features(kind: str, count: int = 0) -> Callable[[Graph, int, int], dict[str, Any]]:
    """Of linear attention, ``count`` random ones."""

    def options(graph: Graph, heads: int, width: int) -> dict[str, Any]:
        made: dict[str, Any] = {"offsets": graph.graph_ptr, "feature_map": kind}
        if count:
            generator = torch.Generator().manual_seed(1)
            made["projection"] = torch.randn(count, width, generator=generator)
        return made

    return options


def _windows(graph: Graph, width: int, dtype: torch.dtype) -> bool:
    return bool(plans.tallest(width, dtype.itemsize))


def _dense(graph: Graph, width: int, dtype: torch.dtype) -> bool:
    """Batches of small graphs without duplicate edges."""
    if not _windows(graph, width, dtype) or graph.num_graphs < 2:
        return False
    try:
        graph.plan("graphs", height=plans.tallest(width, dtype.itemsize))
    except ValueError:
        return False
    return True


def _square(graph: Graph, width: int, dtype: torch.dtype) -> bool:
    """Operators on nodes have no use for columns that are no rows."""
    return graph.num_rows == graph.num_cols


_BIAS = _on_edges("edge_bias")
_VECTORS = _on_edges("edge_gate", "edge_key", "edge_value")
_LOW_RANK = _on_edges("edge_attr", "edge_key_weight", "edge_value_weight")
VARIANTS = (
    Variant("neighborhood_attention", "gather", _attention),
    Variant("neighborhood_attention", "windows", _attention, plan="windows", fits=_windows),
    Variant("neighborhood_attention", "graphs", _attention, plan="graphs", fits=_dense),
    Variant("neighborhood_attention", "gather, bias and clamp", _BIAS, _clamped),
    Variant("neighborhood_attention", "windows, bias", _BIAS, plan="windows", fits=_windows),
    Variant("neighborhood_attention", "graphs, bias", _BIAS, plan="graphs", fits=_dense),
    Variant("neighborhood_attention", "gather, shared key heads", _grouped),
    Variant("neighborhood_attention", "gather, masked heads", _attention, _gate),
    Variant(
        *("neighborhood_attention", "windows, masked heads", _attention, _gate),
        plan="windows",
        fits=_windows,
    ),
    Variant("neighborhood_attention", "edge gate, keys and values", _VECTORS),
    Variant("neighborhood_attention", "edge attributes, dropout", _LOW_RANK, _dropped),
    Variant("channelwise_attention", "values on edges", _vectors),
    Variant("additive_attention", "gather", _additive),
    Variant("additive_attention", "one channel, edge keys, dropout", _additive_edges, _dropped),
    Variant("additive_attention", "masked heads", _additive, _gate),
    Variant("segment_softmax", "", _edges_only),
    Variant("aggregate", "sum", _messages("x")),
    Variant("aggregate", "mean", _messages("x"), lambda *_: {"reduce": "mean"}),
    Variant("aggregate", "max", _messages("x"), lambda *_: {"reduce": "max"}),
    Variant("aggregate", "relu", _messages("x", "edge_value"), lambda *_: {"activation": "relu"}),
    Variant("aggregate", "weights", _messages("x", "edge_weight")),
    Variant("gated_aggregate", "", _messages("x", "gate", "gate_row", "gate_col")),
    Variant("gated_aggregate", "edges", _messages("x", "gate", "edge_weight", "edge_value")),
    Variant("global_attention", "", _nodes("q", "k", "v"), _offsets, fits=_square),
    Variant("global_attention", "bias of keys", _key_bias, _ragged_dropped, fits=_square),
    Variant("global_attention", "masked heads", _nodes("q", "k", "v"), _ragged_gate, fits=_square),
    Variant("linear_attention", "elu", _nodes("q", "k", "v"), _features("elu"), fits=_square),
    Variant(
        *("linear_attention", "softmax", _nodes("q", "k", "v"), _features("softmax", 44)),
        fits=_square,
    ),
    Variant(
        *("linear_attention", "relu_random", _nodes("q", "k", "v"), _features("relu_random", 44)),
        fits=_square,
    ),
    Variant("sgformer_attention", "", _nodes("q", "k", "v"), _offsets, fits=_square),
    Variant("head_projection", "into heads", _into_heads, _one_gate, fits=_square),
    Variant("head_projection", "out of heads", _out_of_heads, _one_gate, fits=_square),
    Variant("segment_mean", "", _nodes("x"), _offsets, fits=_square),
    Variant("segment_max", "", _nodes("x"), _offsets, fits=_square),
)
_PROBLEMS = {problem.name: problem for problem in PROBLEMS}
_VARIANTS = {f"{how.operator}, {how.name}": how for how in VARIANTS}
# take no graph
_PACKED = {"global_attention", "linear_attention", "sgformer_attention", "head_projection"}
_PACKED |= {"segment_mean", "segment_max"}
