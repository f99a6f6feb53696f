"""Sizes and counts of modules, models, pruning and their settings: ints, NumPy's too, no floats."""

import dataclasses
import inspect
import itertools
import re

import numpy as np
import pytest
import torch
from torch import nn

from fastgt import Graph, models, pruning
from fastgt import nn as modules
from fastgt.models import graph_gps_layer, graph_transformer, open_graph, sgformer
from fastgt.models.package_classifier import PackageClassifierConfig
from fastgt.ops.checks import integer
from fastgt.pruning import GradualPruning, HeadSparsity

NODES = {"node_types": 3, "out_dim": 2, "dim": 8, "heads": 2, "layers": 2}


def sparsity(**counts):
    gate = modules.HeadGate(torch.ones(4))
    layer = modules.LinearAttention(8, 4, head_gate=gate, dense_gate_grad=True)
    return HeadSparsity(layer, 0.5, **counts)


# all that has sizes or counts, with fitting ones
SIZES = {
    modules.EdgeGatedAttention: {"dim": 8, "heads": 2, "edge_dim": 3},
    modules.HardConcreteHeadGate: {"heads": 4},
    modules.LinearAttention: {
        "dim": 8,
        "heads": 2,
        "head_dim": 3,
        "num_features": 6,
        "feature_map": "softmax",
    },
    modules.NeighborhoodAttention: {"dim": 8, "heads": 4, "kv_heads": 2, "context_dim": 5},
    modules.TopKHeadGate: {"heads": 4, "k": 2},
    modules.VirtualNode: {"dim": 8, "hidden_dim": 6},
    modules.random_features: {"num_features": 6, "width": 4},
    graph_transformer.GraphTransformerLayer: {"dim": 8, "heads": 2},
    graph_transformer.GraphTransformerEdgeLayer: {"dim": 8, "heads": 2},
    graph_gps_layer.GlobalAttention: {"dim": 8, "heads": 2},
    graph_gps_layer.GraphGPSLayer: {"dim": 8, "heads": 2, "performer_width": 4},
    models.GraphGPSConfig: NODES
    | {"dim": 16, "edge_types": 4, "node_features": 0, "edge_features": 0, "performer_width": 4}
    | {"walk_steps": 3, "walk_dim": 4, "lap_pe": 2, "lap_dim": 5, "lap_layers": 2}
    | {"stable_pe": 0, "head_layers": 2, "path_distance": 3, "degrees": 4, "lap_heads": 1}
    | {"sign_pe": 0, "sign_dim": 0, "sign_layers": 2, "sign_hidden": 3, "sign_out": 3}
    | {"sign_rho_layers": 2, "heat_times": 2, "heat_dim": 1, "electrostatic_dim": 1}
    | {"kernel_layers": 1},
    models.CorrespondenceTransformerConfig: {"node_features": 3, "dim": 8, "heads": 2}
    | {"layers": 2, "pe_dim": 5, "iterations": 3},
    models.log_sinkhorn: {"iterations": 3},
    models.ExphormerConfig: NODES
    | {"edge_types": 4, "node_features": 0, "edge_features": 0, "expander_degree": 3}
    | {"virtual_nodes": 2, "in_layers": 1, "lap_pe": 2, "lap_dim": 3, "lap_layers": 2}
    | {"stable_pe": 0, "head_layers": 2},
    models.SANConfig: NODES
    | {"edge_types": 4, "lap_pe": 2, "lap_dim": 4, "lap_heads": 2, "lap_layers": 1},
    models.MPNNVirtualNodeConfig: {"out_dim": 2, "node_types": 3, "node_features": 0}
    | {"edge_types": 4, "edge_features": 0, "dim": 8, "layers": 2, "walk_steps": 3, "walk_dim": 2}
    | {"lap_pe": 2, "lap_dim": 3, "lap_layers": 2, "head_layers": 2},
    models.GraphormerConfig: NODES
    | {"node_features": 0, "edge_types": 4, "ffn_dim": 8, "path_distance": 4, "path_edges": 3}
    | {"path_rows": 5, "degrees": 4},
    models.SceneGraphConfig: {"objects": 5, "predicates": 3, "dim": 8, "heads": 2, "layers": 2}
    | {"pe_dim": 2},
    models.GTSPConfig: {"node_features": 5, "out_dim": 2, "dim": 8, "heads": 2, "layers": 2}
    | {"walk_steps": 3, "path_distance": 4, "degrees": 4},
    models.Sparsification: {"steps": 10, "every": 4, "scored": 2},
    models.expander_table: {"degree": 2, "seed": 1, "tries": 3},
    models.OpenGraphConfig: {"dim": 8, "heads": 2, "layers": 2, "anchors": 3, "hops": 2},
    open_graph.OpenGraphLayer: {"dim": 8, "heads": 2, "anchors": 3},
    models.with_class_nodes: {"classes": 2},
    models.class_scores: {"classes": 2},
    models.PolynormerConfig: {
        "node_features": 5,
        "out_dim": 2,
        "dim": 8,
        "heads": 2,
        "layers": 2,
        "global_layers": 2,
    },
    models.SGFormerConfig: {
        "node_features": 5,
        "out_dim": 2,
        "dim": 8,
        "heads": 2,
        "layers": 2,
        "conv_layers": 2,
    },
    sgformer.SGFormerLayer: {"dim": 8, "heads": 2},
    models.GraphTransformerConfig: NODES | {"pe_dim": 2},
    models.EdgeGraphTransformerConfig: NODES | {"edge_types": 4, "pe_dim": 2},
    models.GraphClassifierConfig: NODES,
    PackageClassifierConfig: {
        "vocabulary": 5,
        "edge_kinds": 2,
        "classes": 3,
        "dim": 8,
        "heads": 2,
        "layers": 2,
    },
    models.LargeGTConfig: {"node_features": 5, "out_dim": 2, "num_nodes": 9, "dim": 8, "heads": 2}
    | {"samples": 3, "position_dim": 4, "centroids": 6},
    models.TodyformerConfig: {"num_nodes": 5, "node_features": 0, "edge_features": 0, "dim": 8}
    | {"heads": 2, "blocks": 1, "patches": 2, "time_dim": 3},
    models.SymPointAttention: {"dim": 8, "position_dim": 3, "planes": 4},
    models.connected_neighbors: {"k": 2, "most": 1},
    pruning.TokenPruning: {"dim": 8},
    pruning.SkipLayer: {"block": nn.Identity(), "passes": 2},
    GradualPruning: {"final": 0.5, "begin": 2, "end": 8, "every": 3},
    HeadSparsity: {"steps": 10, "every": 4, "scored": 2},
}
ENDS = torch.arange(24.0).view(6, 2, 2)
RING = Graph.from_edge_index(torch.tensor([[0, 1, 2, 3], [1, 2, 3, 0]]))
MAKE = {
    models.Sparsification: lambda **counts: models.Sparsification(
        models.GTSP(models.GTSPConfig(prune={"heads": 0.5}, **SIZES[models.GTSPConfig])), **counts
    ),
    models.expander_table: lambda **counts: models.expander_table(RING, **counts),
    models.connected_neighbors: lambda **counts: models.connected_neighbors(ENDS, **counts),
    models.log_sinkhorn: lambda **counts: models.log_sinkhorn(
        torch.arange(4.0), torch.tensor(1.0), *torch.tensor([[0, 2], [0, 2]]), **counts
    ),
    models.with_class_nodes: lambda **counts: models.with_class_nodes(
        RING, torch.tensor([0, 1, 0, 1]), torch.ones(4, dtype=torch.bool), **counts
    ),
    models.class_scores: lambda **counts: models.class_scores(torch.ones(5, 3), **counts),
    GradualPruning: lambda **counts: GradualPruning(nn.Linear(4, 4), **counts),
    HeadSparsity: sparsity,
}


def counted(thing):
    """The names of its arguments that are ints."""
    arguments = inspect.signature(thing).parameters.values()
    return [a.name for a in arguments if re.match(r"int\b", str(a.annotation))]


def make(thing, **changes):
    torch.manual_seed(0)
    return MAKE.get(thing, thing)(**SIZES[thing] | changes)


def content(made):
    """What tells two of a kind apart."""
    if isinstance(made, torch.Tensor):
        return made.tolist()
    if isinstance(made, nn.Module):
        state = {key: x.tolist() for key, x in made.state_dict().items() if "extra" not in key}
        return repr(made), state, {k: v for k, v in vars(made).items() if isinstance(v, int)}
    if dataclasses.is_dataclass(made):
        return made
    return {key: x for key, x in vars(made).items() if isinstance(x, int)}


# a seed may be any int, or a tensor
CASES = [(thing, name) for thing in SIZES for name in counted(thing) if name != "seed"]
IDS = [f"{thing.__name__}({name}=)" for thing, name in CASES]


def test_all_that_is_public_is_here():
    public = [getattr(m, name) for m in (modules, models, pruning) for name in m.__all__]
    results = {pruning.KeptTokens}
    assert {thing for thing in public if counted(thing)} - results <= set(SIZES)
    for thing, arguments in SIZES.items():
        assert counted(thing), thing
        assert set(counted(thing)) <= set(arguments), thing


@pytest.mark.parametrize(("thing", "name"), CASES, ids=IDS)
def test_what_is_no_int_is_refused_by_name(thing, name):
    fitting = SIZES[thing][name]
    for wrong, found in (
        (float(fitting), f"float {float(fitting)}"),
        (fitting + 0.5, "float"),
        (np.float64(fitting), "float64"),
        (True, "bool True"),
        (np.bool_(True), "bool"),
        (str(fitting), "str"),
        (torch.tensor(float(fitting)), "Tensor"),
    ):
        with pytest.raises(TypeError, match=f"{name} must be an int, got {found}"):
            make(thing, **{name: wrong})


@pytest.mark.parametrize(("thing", "name"), CASES, ids=IDS)
def test_integers_of_numpy_and_torch_are_ints(thing, name):
    fitting = SIZES[thing][name]
    wanted = content(make(thing))
    for integers in (np.int64, np.int32, np.uint8, torch.tensor):
        made = make(thing, **{name: integers(fitting)})
        assert content(made) == wanted
        kept = list(vars(made).values()) if hasattr(made, "__dict__") else []
        assert not any(isinstance(x, np.generic) for x in kept)


@pytest.mark.parametrize(("thing", "name"), CASES, ids=IDS)
def test_sizes_below_their_range_are_refused_with_the_number(thing, name):
    with pytest.raises(ValueError, match=r"got .*-1"):
        make(thing, **{name: -1})


def test_a_number_of_graphs_is_an_int():
    node = modules.VirtualNode(8)
    assert node.initial(np.int64(2)).shape == (2, 8)
    assert node.initial(0).shape == (0, 8)
    with pytest.raises(TypeError, match=r"num_graphs must be an int, got float 2\.0"):
        node.initial(2.0)
    with pytest.raises(ValueError, match="num_graphs must not be negative, got -1"):
        node.initial(-1)


@pytest.mark.parametrize("end", [7, 8, 40])
def test_every_end_that_is_taken_is_reached(end):
    model = nn.Linear(20, 20)
    steps = GradualPruning(model, 0.8, end=np.int64(end), every=5)
    for _ in range(end):
        steps.step()
    assert steps.pruned() == 320


def test_integers():
    for x, least in itertools.product((3, np.int8(3), torch.tensor(3)), (None, 0, 1)):
        assert integer("size", x, least) == 3
        assert type(integer("size", x, least)) is int
    assert integer("size", -3) == -3
    assert integer("size", 0, 0) == 0
    assert integer("size", 2**63 - 1) == 2**63 - 1
    with pytest.raises(ValueError, match=f"size must fit in 64 bits, got {2**63}"):
        integer("size", 2**63)
    with pytest.raises(ValueError, match="size must be positive, got 0"):
        integer("size", 0, 1)
    with pytest.raises(ValueError, match="size must not be negative, got -1"):
        integer("size", -1, 0)
    for x in (None, [3], 3 + 0j, np.array([3, 4])):
        with pytest.raises(TypeError, match=f"size must be an int, got {type(x).__name__}"):
            integer("size", x)


def test_steps_that_are_done_are_counted_in_ints():
    for made in (make(GradualPruning), make(HeadSparsity)):
        state = made.state_dict()
        made.load_state_dict(state | {"done": np.int64(3)})
        assert made.done == 3
        for wrong, error in ((7.5, TypeError), (True, TypeError), (-1, ValueError)):
            with pytest.raises(error, match="done must"):
                made.load_state_dict(state | {"done": wrong})
        assert made.done == 3


def test_a_size_that_no_tensor_has_is_refused_in_one_line():
    with pytest.raises(ValueError, match=r"^dim must fit in 64 bits, got 10{20}$"):
        modules.LinearAttention(10**20, 4)


def test_a_virtual_node_without_nodes_is_refused_by_name():
    with pytest.raises(TypeError, match="x must be a tensor, got NoneType"):
        modules.VirtualNode(8)(None, None, torch.tensor([0]))
