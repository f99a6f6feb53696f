"""Whole models against the same models on torch-geometric's layers, from the same parameters.

One batch is verified against the float64 definition, output and gradients of all parameters in
training and output in evaluation; then epochs of training (forward, loss, backward, Adam) and of
inference over the same batches are timed, in turns. Dropout is off. Models take no positions:
their random signs would make two runs of one model differ.
"""

from __future__ import annotations

import copy
import functools
import statistics
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, l1_loss

from fastgt import Graph, implementation
from fastgt.bench import harness, timing
from fastgt.bench.harness import Case, Provider
from fastgt.bench.memory import peak_extra_memory
from fastgt.bench.on_pyg import GPS, Edges, GPSLayer, OnPyG, on_pyg, shared, trained
from fastgt.datasets.dd import CLASSES, NODE_TYPES, dd
from fastgt.datasets.zinc import ATOM_TYPES, BOND_TYPES, zinc12k
from fastgt.models import (
    EdgeGraphTransformer,
    EdgeGraphTransformerConfig,
    GraphClassifier,
    GraphClassifierConfig,
    GraphGPS,
    GraphGPSConfig,
    GraphTransformer,
    GraphTransformerConfig,
)
from fastgt.nn import random_features
from fastgt.testing import PROBLEMS

MODELS: dict[str, tuple[str, ...]] = {
    "graph_transformer": ("cora", "citeseer", "debian", "pattern"),
    "edge_graph_transformer": ("zinc",),
    "graph_classifier": ("dd",),
    "gps": ("zinc",),
    "graph_gps": ("zinc",),
}
"""The problems of each; ``graph_transformer`` takes any other of ``PROBLEMS`` too."""

# as published and trained here, or, of "gps", as in torch-geometric's example of GPSConv; the first
# has fewer layers than published, for its float64 definition on debian must fit
SIZES: dict[str, dict[str, int]] = {
    "graph_transformer": {"dim": 80, "heads": 8, "layers": 4},
    "edge_graph_transformer": {"dim": 64, "heads": 8, "layers": 10, "batch": 128},
    "graph_classifier": {"dim": 64, "heads": 8, "layers": 4, "batch": 16},
    "gps": {"dim": 64, "heads": 4, "width": 64, "layers": 10, "batch": 128},
    "graph_gps": {"dim": 64, "heads": 4, "layers": 10, "batch": 32},
}
TYPES, SECTIONS = 64, 16  # of nodes and of their classes, where the problem is a bare graph
LEARNING_RATE = 7e-4


def case(
    model: str,
    problem: str,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    **sizes: int,
) -> Case:
    """The model on one batch, or on the whole graph, in training.

    Its inputs are integers: gradients are those of the parameters.

    Args:
        model, problem: Of :data:`MODELS`.
        device, dtype: Of the model.
        sizes: What is not to be as in :data:`SIZES`.

    Raises:
        FileNotFoundError: The problem's data is absent.
        ImportError: GPS without torch-geometric.
    """
    shape, ours, (batch,) = _prepare(model, problem, 1, torch.device(device), dtype, sizes)
    return _case(shape, ours, batch)


def epochs(
    model: str,
    problem: str | None = None,
    *,
    device: torch.device | str = "cpu",
    batches: int = 8,
    repeats: int = 5,
    only: Sequence[str] | None = None,
    dtype: torch.dtype = torch.float32,
    **sizes: int,
) -> list[dict[str, Any]]:
    """-> one row a provider: whether it is right; if so seconds of an epoch of training and of
    inference over so many batches (a whole graph is one), ratios to ours, and memory. ``only``:
    these peers beside ours.

    Batches are made once, before; ``graphs_s`` is what fastgt's graphs of them took.
    """
    device, problem = torch.device(device), problem or MODELS[model][0]
    shape, ours, made = _prepare(model, problem, batches, device, dtype, sizes)
    one = _case(shape, ours, made[0])
    graphs = timing.measure({"": lambda: [x.remade() for x in made]}, device, repeats=repeats)
    shape["graphs_s"] = statistics.median(graphs[""])
    truth, eager = (_defined_results(ours, wide, made[0], one) for wide in (torch.float64, dtype))
    rows, train, infer = [], {}, {}
    for name, prepare in _modules(ours).items():
        if only is not None and name != "fastgt" and name not in only:
            continue
        row: dict[str, Any] = {"provider": name}
        rows.append(row)
        try:
            module = prepare()
            found = _results(module, _call(module, made[0]), one)
            row |= _verdict(one.parameters, found, eager, truth)
        except ImportError as error:
            row |= {"match": None, "error": f"not installed: {error}"}
        except harness.FAILURES as error:
            row |= {"match": None, "error": harness.reason(error)}
        if row["match"]:
            train[name], infer[name] = _epoch(module, made), _inference(module, made)
    del truth, eager
    for part, calls in (("epoch", train), ("inference", infer)):
        seconds = timing.measure(calls, device, repeats=repeats)
        for row in rows:
            if (mine := seconds.get(row["provider"])) is not None:
                row[f"{part}_s"] = statistics.median(mine)
                row[f"{part}_spread"] = timing.spread(mine)
                if "fastgt" in seconds:
                    row[f"{part}_x"] = timing.ratio(mine, seconds["fastgt"])
    for row in rows:
        if (call := train.get(row["provider"])) is not None:
            row["epoch_peak_bytes"] = peak_extra_memory(call, device)
    extra = {"repeats": repeats} | harness.environment(device)
    return [shape | row | extra for row in rows]


class Batch(NamedTuple):
    inputs: dict[str, Tensor]
    graph: Graph
    edges: Edges
    y: Tensor

    def remade(self) -> Graph:
        """The graph made again, with what a backward walks."""
        ptr, edge_index = self.graph.graph_ptr, self.edges.edge_index
        graph = Graph.from_edge_index(edge_index, self.graph.num_nodes, graph_ptr=ptr)
        graph.columns  # noqa: B018
        return graph


def _modules(ours: nn.Module) -> dict[str, Callable[[], nn.Module]]:
    modules: dict[str, Callable[[], nn.Module]] = {
        "fastgt": lambda: copy.deepcopy(ours),
        "fastgt, compiled": lambda: _compiled(copy.deepcopy(ours)),
        "pyg": lambda: on_pyg(ours),
        "pyg, compiled": lambda: _compiled(on_pyg(ours)),
    }
    if isinstance(ours, GPS):
        modules["pyg, padded keys zeroed"] = lambda: on_pyg(ours, repaired=True)
    return modules


def _compiled(module: nn.Module) -> nn.Module:
    # every module and shape is compiled anew, and beyond some of them none would be
    torch.compiler.reset()
    module.compile(dynamic=True)
    return module


def _prepare(
    model: str, problem: str, batches: int, device: torch.device, dtype: torch.dtype, sizes: Any
) -> tuple[dict[str, Any], nn.Module, list[Batch]]:
    """-> columns for all rows, the model, and up to so many batches."""
    sizes = SIZES[model] | sizes
    torch.manual_seed(0)
    ours = _model(model, sizes).to(device, dtype)
    if model == "graph_transformer":
        made = [_whole(problem, device)]
    else:
        made = _batches(problem, batches, sizes["batch"], device, dtype)
    _off_kinks(ours, made[0])
    for batch in made:
        batch.graph.columns  # noqa: B018  built once for a graph, not at every call
    graphs = [batch.graph for batch in made]
    shape = {
        "problem": problem,
        "rows": sum(graph.num_rows for graph in graphs),
        "edges": sum(graph.num_edges for graph in graphs),
        "graphs": sum(graph.num_graphs for graph in graphs),
        "batches": len(made),
        "heads": sizes["heads"],
        "width": sizes.get("width", sizes["dim"] // sizes["heads"]),
        "layers": sizes["layers"],
        "parameters": sum(x.numel() for x in ours.parameters()),
        "dtype": str(dtype).removeprefix("torch."),
        "node_order": "as loaded",
    }
    return shape, ours, made


def _model(model: str, sizes: dict[str, int]) -> nn.Module:
    some: dict[str, Any] = {name: sizes[name] for name in ("dim", "heads", "layers")}
    if model == "graph_transformer":
        return GraphTransformer(GraphTransformerConfig(TYPES, SECTIONS, **some))
    if model == "graph_classifier":
        return GraphClassifier(GraphClassifierConfig(NODE_TYPES, CLASSES, **some))
    if model == "gps":
        return GPS(width=sizes["width"], **some)
    if model == "graph_gps":
        kinds = {"node_types": ATOM_TYPES, "edge_types": BOND_TYPES}
        bare = {"walk_steps": 0, "walk_dim": 0, "attention_dropout": 0.0}
        return GraphGPS(GraphGPSConfig(**kinds, **bare, **some))
    config = EdgeGraphTransformerConfig(ATOM_TYPES, BOND_TYPES, pe_dim=0, **some)
    ours = EdgeGraphTransformer(config)
    for name, x in ours.layers[-1].named_parameters():
        if "edge_" in name:  # reaches no output
            x.requires_grad_(False)
    return ours


@torch.no_grad()
def _off_kinks(ours: nn.Module, batch: Batch) -> None:
    """Move biases and random features until no ReLU stands at its kink for this batch: there
    roundings choose between gradients, and correct models differ by more than rounding."""
    wide = copy.deepcopy(ours).double()

    def move(layer: Any, out: Tensor) -> Tensor:
        shift = _into_gap(out)
        layer.bias.add_(shift)
        return out + shift

    def after_linear(layer: Any, args: Any, out: Tensor) -> Tensor:
        return move(layer, out)

    def before_conv(conv: Any, args: Any) -> None:
        x, graph, e = args
        move(conv.lin, x[graph.edge_index[0]] + conv.lin(e))

    def before_attention(attn: Any, args: Any) -> None:
        points = torch.cat([f(args[0]).unflatten(-1, (attn.heads, -1)) for f in (attn.q, attn.k)])
        features = attn.fast_attn.projection_matrix
        draws = [random_features(*features.shape, norms="unit").to(points) for _ in range(8)]
        clear = torch.stack([(points @ drawn.T).abs().amin((0, 1)) for drawn in draws])
        best = clear.argmax(0)
        features.copy_(torch.stack(draws)[best, torch.arange(len(best), device=best.device)])

    def before_messages(layer: Any, args: Any, out: Tensor) -> Tensor:
        e = wide.embed_edge("edge", batch.inputs["edge_type"], "E", len(source), batch.graph)
        shift = _into_gap(out[source] + e)
        # of an embedding, all rows; of a norm, its bias
        (layer.weight if isinstance(layer, nn.Embedding) else layer.bias).add_(shift)
        return out + shift

    source = batch.graph.edge_index[0]
    if isinstance(wide, GraphGPS):
        for layer in (wide.embed.embed[0], *(layer.norm for layer in wide.layers[:-1])):
            layer.register_forward_hook(before_messages)
        for linear in wide.readout.layers[:-1]:
            linear.register_forward_hook(after_linear)
    for module in wide.modules():
        if isinstance(module, nn.Sequential):
            for layer, following in pairwise(module):
                if isinstance(following, nn.ReLU):
                    layer.register_forward_hook(after_linear)
        elif isinstance(module, GPSLayer):
            module.conv.register_forward_pre_hook(before_conv)
            module.attn.register_forward_pre_hook(before_attention)
    _defined(wide, batch)(*batch.inputs.values())
    for module in wide.modules():
        if isinstance(module, nn.BatchNorm1d):
            module.reset_running_stats()
    ours.load_state_dict(wide.state_dict())


def _into_gap(x: Tensor) -> Tensor:
    """For each channel of ``[N, C]`` that comes near 0: what puts 0 amid the widest gap there."""
    near = x.gather(0, x.abs().topk(min(64, len(x)), dim=0, largest=False).indices).sort(0).values
    gaps = near.diff(dim=0)
    if not len(gaps):
        return torch.zeros_like(x).sum(0)
    widest = gaps.argmax(0, keepdim=True)
    middle = (near.gather(0, widest) + gaps.gather(0, widest) / 2)[0]
    return torch.where(x.abs().amin(0) < 1e-3, -middle, 0.0)


def _whole(problem: str, device: torch.device) -> Batch:
    """A graph with drawn kinds and classes of nodes: time does not depend on them."""
    graph = PROBLEMS[problem].load().to(device)
    generator = torch.Generator().manual_seed(0)
    types, y = (
        torch.randint(kinds, (graph.num_nodes,), generator=generator).to(device)
        for kinds in (TYPES, SECTIONS)
    )
    return Batch({"node_type": types}, graph, _edges(graph), y)


def _batches(
    problem: str, batches: int, size: int, device: torch.device, dtype: torch.dtype
) -> list[Batch]:
    made = []
    if problem == "zinc":
        molecules = zinc12k()
        for chosen in molecules.splits["train"].split(size)[:batches]:
            batch = molecules.batch(chosen).to(device)
            assert batch.edge is not None
            inputs = {"node_type": batch.node, "edge_type": batch.edge}
            made.append(Batch(inputs, batch.graph, _edges(batch.graph), batch.y.to(dtype)))
        return made
    proteins = dd()
    for chosen in proteins.splits["train"].split(size)[:batches]:
        batch = proteins.batch(chosen).to(device)
        made.append(Batch({"node_type": batch.node}, batch.graph, _edges(batch.graph), batch.y))
    return made


def _edges(graph: Graph) -> Edges:
    sizes = graph.graph_ptr.diff()
    batch = torch.arange(len(sizes), device=sizes.device).repeat_interleave(sizes)
    return Edges(graph.edge_index, batch, graph.num_graphs)


def _case(shape: dict[str, Any], ours: Any, batch: Batch) -> Case:
    def provider(prepare: Callable[[], nn.Module]) -> Provider:
        module = prepare()
        return Provider(_call(module, batch), _trained(module))

    def definition(dtype: torch.dtype) -> Provider:
        module = copy.deepcopy(ours).to(dtype)
        return Provider(_defined(module, batch), _trained(module))

    last = ours.readout.layers[-1] if isinstance(ours, GraphGPS) else ours.readout[-1]
    out = len(batch.y), last.out_features
    upstream = torch.randn(out, generator=torch.Generator().manual_seed(0))
    return Case(
        shape,
        batch.inputs,
        upstream.to(last.weight),
        definition,
        {name: functools.partial(provider, make) for name, make in _modules(ours).items()},
        shared(ours),
    )


def _trained(module: nn.Module) -> tuple[Tensor, ...]:
    return tuple(trained(module).values())


def _call(module: nn.Module, batch: Batch) -> Callable[..., Tensor]:
    where = batch.edges if isinstance(module, OnPyG) else batch.graph
    return lambda *inputs: module(*inputs, where)


def _defined(module: nn.Module, batch: Batch) -> Callable[..., Tensor]:
    def call(*inputs: Tensor) -> Tensor:
        with implementation("reference"):
            return module(*inputs, batch.graph)

    return call


def _defined_results(
    ours: nn.Module, dtype: torch.dtype, batch: Batch, one: Case
) -> tuple[Tensor, ...]:
    module = copy.deepcopy(ours).to(dtype)
    return _results(module, _defined(module, batch), one)


def _results(module: nn.Module, call: Callable[..., Tensor], one: Case) -> tuple[Tensor, ...]:
    """Output in evaluation, output in training, gradients of the parameters."""
    module.eval()  # first: a step in training moves the running statistics
    with torch.no_grad():
        inference = call(*one.inputs.values())
    module.train()
    out = call(*one.inputs.values())
    gradients = torch.autograd.grad(out, _trained(module), one.upstream.to(out.dtype))
    return inference, out.detach(), *gradients


def _verdict(names: tuple[str, ...], *results: tuple[Tensor, ...]) -> dict[str, Any]:
    """Of the results in evaluation, and if those are right, of the others."""
    found = harness.verdict(["inference"], *(x[:1] for x in results))
    if found["match"]:
        found = harness.verdict(["output", *names], *(x[1:] for x in results))
    return found


def _epoch(module: nn.Module, batches: list[Batch]) -> Callable[[], list[Tensor]]:
    """A call of an epoch of training, which gives the loss of every step."""
    optimizer = torch.optim.Adam(_trained(module), lr=LEARNING_RATE)
    calls = [(_call(module, batch), batch) for batch in batches]

    def epoch() -> list[Tensor]:
        module.train()
        losses = []
        for call, batch in calls:
            out = call(*batch.inputs.values())
            y = batch.y
            loss = l1_loss(out[:, 0], y) if y.is_floating_point() else cross_entropy(out, y)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()  # an epoch's memory has the gradients in it
            losses.append(loss.detach())
        return losses

    return epoch


def _inference(module: nn.Module, batches: list[Batch]) -> Callable[[], None]:
    calls = [(_call(module, batch), batch) for batch in batches]

    @torch.no_grad()
    def inference() -> None:
        module.eval()
        for call, batch in calls:
            call(*batch.inputs.values())

    return inference
