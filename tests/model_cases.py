"""Every ready-made model in a small size, and what a call of it takes: a new model is one line."""

from collections.abc import Callable
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastgt import Graph
from fastgt.encodings import shortest_paths
from fastgt.models import (
    GTSP,
    SAN,
    EdgeGraphTransformer,
    EdgeGraphTransformerConfig,
    Exphormer,
    ExphormerConfig,
    GraphClassifier,
    GraphClassifierConfig,
    GraphGPS,
    GraphGPSConfig,
    Graphormer,
    GraphormerConfig,
    GraphTransformer,
    GraphTransformerConfig,
    GTSPConfig,
    MPNNVirtualNode,
    MPNNVirtualNodeConfig,
    OpenGraph,
    OpenGraphConfig,
    Polynormer,
    PolynormerConfig,
    SANConfig,
    SceneGraphConfig,
    SceneGraphEncoder,
    SGFormer,
    SGFormerConfig,
    expander_table,
)
from fastgt.models.graph_gps_bigbird import bigbird_pattern
from fastgt.models.package_classifier import PackageClassifier, PackageClassifierConfig


class Types(NamedTuple):
    """Integers from 0 to ``kinds - 1``, of every node, edge or graph: ``letter`` is N, E or G."""

    letter: str
    kinds: int


class Numbers(NamedTuple):
    """``[letter, width]`` floating point."""

    letter: str
    width: int


class Case(NamedTuple):
    """``of`` is the letter of the output's rows. ``derived`` are inputs made of the others and the
    graph; it may take an input away. ``ordered``: the output depends on the order of nodes, or of
    edges where several paths are the shortest."""

    make: Callable[[], nn.Module]
    of: str
    inputs: dict[str, Types | Numbers]
    derived: Callable[[Graph, dict[str, Any]], dict[str, Any]] = lambda graph, given: given
    ordered: bool = False


def words(graph: Graph, given: dict[str, Any]) -> dict[str, Any]:
    """A word for every node, two for those of the second kind."""
    first = given.pop("first")
    counts = 1 + (first == 1).long()
    ptr = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    return given | {"word_ptr": ptr, "word": first.repeat_interleave(counts)}


def no_edge(graph: Graph, given: dict[str, Any]) -> dict[str, Any]:
    return given | {"edge": None}


def paths(graph: Graph, given: dict[str, Any]) -> dict[str, Any]:
    distance, edges = shortest_paths(graph, given["edge"], 4)
    return given | {"pair_distance": distance, "pair_edges": edges}


def lengths(graph: Graph, given: dict[str, Any]) -> dict[str, Any]:
    distance, _ = shortest_paths(graph, torch.zeros(graph.num_edges, dtype=torch.int8), 4)
    return given | {"pair_distance": distance}


def expanded(graph: Graph, given: dict[str, Any]) -> dict[str, Any]:
    return given | {"expander": expander_table(graph, 3)}


def pattern(graph: Graph, given: dict[str, Any]) -> dict[str, Any]:
    return given | {"pattern": bigbird_pattern(graph, block=1, random=1)}


SMALL = {"dim": 16, "heads": 2, "layers": 2}
NODE, EDGE, FEATURES = Types("N", 5), Types("E", 3), Numbers("E", 3)
WALK, VECTORS, VALUES = Numbers("N", 3), Numbers("N", 2), Numbers("G", 2)


def gps(**options: Any) -> Callable[[], nn.Module]:
    options = {"node_types": 5, "walk_steps": 0, "walk_dim": 0, "last_edges": False} | options
    options = {"attention_dropout": 0.0, "edge_types": 3} | options
    return lambda: GraphGPS(GraphGPSConfig(**SMALL | options))


TYPED = {"node": NODE, "edge": EDGE}
LAP = {"lap_pe": 2, "lap_dim": 4}
CASES = {
    "GraphTransformer": Case(
        lambda: GraphTransformer(GraphTransformerConfig(5, 2, pe_dim=2, **SMALL)),
        "N",
        {"node_type": NODE, "pe": VECTORS},
    ),
    "EdgeGraphTransformer": Case(
        lambda: EdgeGraphTransformer(
            EdgeGraphTransformerConfig(5, 3, 2, pe_dim=2, last_edges=False, **SMALL)
        ),
        "G",
        {"node_type": NODE, "edge_type": EDGE, "pe": VECTORS},
    ),
    "GraphClassifier": Case(
        lambda: GraphClassifier(GraphClassifierConfig(5, 2, **SMALL)), "G", {"node_type": NODE}
    ),
    "PackageClassifier": Case(
        lambda: PackageClassifier(PackageClassifierConfig(5, 3, 2, **SMALL)),
        "N",
        {"first": NODE, "edge_kind": EDGE},
        words,
    ),
    "GPS none": Case(gps(local="none", edge_types=()), "G", {"node": NODE}, no_edge),
    "GPS gcn": Case(
        gps(local="gcn", edge_types=(), walk_steps=3, walk_dim=4, head="default"),
        "G",
        {"node": NODE, "walk_pe": WALK},
        no_edge,
    ),
    "GPS gin": Case(
        gps(local="gin", edge_types=(), attention="linear"), "G", {"node": NODE}, no_edge
    ),
    "GPS gine": Case(gps(**LAP), "G", TYPED | {"lap_vectors": VECTORS, "lap_values": VALUES}),
    "GPS genconv": Case(gps(local="genconv", learn_temperature=True), "G", TYPED),
    "GPS gat": Case(gps(local="gat", attention="performer"), "G", TYPED),
    "GPS pna": Case(gps(local="pna", attention="none", head="inductive_node"), "N", TYPED),
    "GPS attention": Case(gps(local="attention", norm="graph"), "G", TYPED),
    "GPS gatedgcn": Case(
        gps(local="gatedgcn", node_types=(), node_features=4, edge_types=(), edge_features=3),
        "G",
        {"node": Numbers("N", 4), "edge": FEATURES},
    ),
    "GPS stable": Case(
        gps(local="gatedgcn", stable_pe=2, pooling="max", head="default"),
        "G",
        TYPED | {"lap_vectors": VECTORS},
    ),
    "GPS pairs": Case(gps(path_distance=4, degrees=16), "G", TYPED, paths, ordered=True),
    "GPS signs": Case(
        gps(sign_pe=2, sign_dim=4, sign_net="deepset"), "G", TYPED | {"lap_vectors": VECTORS}
    ),
    "Exphormer": Case(
        lambda: Exphormer(
            ExphormerConfig(
                node_types=5,
                node_features=0,
                edge_types=3,
                edge_features=0,
                stable_pe=0,
                last_edges=False,
                dropout=0.0,
                **SMALL,
            )
        ),
        "G",
        TYPED,
        expanded,
        ordered=True,
    ),
    "SAN": Case(
        lambda: SAN(
            SANConfig(node_types=5, edge_types=3, lap_pe=2, lap_dim=4, lap_heads=2, **SMALL)
        ),
        "G",
        TYPED | {"lap_vectors": VECTORS, "lap_values": VALUES},
    ),
    "MPNNVirtualNode": Case(
        lambda: MPNNVirtualNode(
            MPNNVirtualNodeConfig(node_types=5, edge_types=3, dim=16, layers=2)
        ),
        "G",
        TYPED,
    ),
    "Graphormer": Case(
        lambda: Graphormer(
            GraphormerConfig(
                node_types=5, edge_types=(), path_distance=4, path_edges=3, path_rows=5, **SMALL
            )
        ),
        "G",
        {"node": NODE},
        lengths,
    ),
    "GTSP gps": Case(
        lambda: GTSP(GTSPConfig(node_features=4, walk_steps=3, **SMALL)),
        "G",
        {"node": Numbers("N", 4), "walk_pe": WALK},
    ),
    "GTSP graphormer": Case(
        lambda: GTSP(GTSPConfig("graphormer", node_features=4, path_distance=4, **SMALL)),
        "G",
        {"node": Numbers("N", 4)},
        lengths,
    ),
    "SceneGraphEncoder": Case(
        lambda: SceneGraphEncoder(
            SceneGraphConfig(objects=5, predicates=3, pe_dim=2, last_edges=False, **SMALL)
        ),
        "N",
        TYPED | {"pe": VECTORS},
    ),
    "SGFormer": Case(
        lambda: SGFormer(SGFormerConfig(4, 2, **SMALL)), "N", {"node": Numbers("N", 4)}
    ),
    # all nodes are anchors
    "OpenGraph": Case(lambda: OpenGraph(OpenGraphConfig(**SMALL)), "N", {"node": Numbers("N", 16)}),
    "Polynormer": Case(
        lambda: Polynormer(PolynormerConfig(4, 2, **SMALL)), "N", {"node": Numbers("N", 4)}
    ),
    "GPS bigbird": Case(gps(attention="bigbird"), "G", TYPED, pattern, ordered=True),
}


def sizes(graph: Graph) -> dict[str, int]:
    return {"N": graph.num_rows, "E": graph.num_edges, "G": graph.num_graphs}


def check_learnt_by_heart(
    model: nn.Module,
    graph: Graph,
    given: dict[str, Tensor],
    wanted: Tensor,
    *,
    steps: int,
    lr: float = 5e-3,
    left: float = 0.05,
) -> None:
    """Training on one batch leaves less than that share of the first loss."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = F.mse_loss(model(graph=graph, **given), wanted)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert min(losses[-20:]) < left * losses[0], (losses[0], losses[-1])


def draw(case: Case, graph: Graph, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """What is not derived."""
    generator, given = torch.Generator().manual_seed(0), {}
    for name, (letter, size) in case.inputs.items():
        n = sizes(graph)[letter]
        if isinstance(case.inputs[name], Types):
            given[name] = torch.randint(size, (n,), generator=generator)
        else:
            given[name] = torch.randn(n, size, generator=generator, dtype=torch.float64).to(dtype)
    return given


def call(case: Case, model: nn.Module, graph: Graph, given: dict[str, Tensor]) -> Tensor:
    out = model(graph=graph, **case.derived(graph, dict(given)))
    return torch.cat(out, 1) if isinstance(out, tuple) else out  # of boxes and classes


def singles(case: Case, graph: Graph, given: dict[str, Tensor]):
    """Graph after graph, with its inputs."""
    target = graph.edge_index[1]
    for g, (first, last) in enumerate(pairwise(graph.graph_ptr.tolist())):
        mine = (target >= first) & (target < last)
        one = Graph.from_edge_index(graph.edge_index[:, mine] - first, last - first)
        places = {"N": slice(first, last), "E": mine, "G": slice(g, g + 1)}
        yield one, {name: x[places[case.inputs[name][0]]] for name, x in given.items()}


def permuted(case: Case, graph: Graph, given: dict[str, Tensor]):
    """The same batch with nodes and edges in another order: node i was ``nodes[i]``."""
    generator = torch.Generator().manual_seed(1)
    parts = [
        first + torch.randperm(last - first, generator=generator)
        for first, last in pairwise(graph.graph_ptr.tolist())
    ]
    nodes, edges = torch.cat(parts), torch.randperm(graph.num_edges, generator=generator)
    place = torch.empty_like(nodes)
    place[nodes] = torch.arange(len(nodes))
    other = Graph.from_edge_index(place[graph.edge_index[:, edges]], graph_ptr=graph.graph_ptr)
    orders = {"N": nodes, "E": edges, "G": torch.arange(graph.num_graphs)}
    return other, {name: x[orders[case.inputs[name][0]]] for name, x in given.items()}, nodes
