"""Modules are made on the meta device, given memory and reset, as large models and FSDP do it."""

import pytest
import torch
from module_cases import MODULES
from torch import nn

from fastgt import models, pruning
from fastgt import nn as modules
from fastgt.models.graph_gps_layer import GlobalAttention, GraphGPSLayer
from fastgt.models.graph_transformer import GraphTransformerEdgeLayer, GraphTransformerLayer
from fastgt.models.package_classifier import PackageClassifier, PackageClassifierConfig

SIZES = {"dim": 48, "heads": 4, "layers": 2}
WALKS = {"walk_steps": 3, "walk_dim": 4, **SIZES}
TEMPORAL = {"dim": 48, "heads": 4, "blocks": 2}
MASK = torch.tensor([1.0, 0.0, -2.0, 0.5], device="cpu")

MAKE = {
    "EdgeGatedAttention": lambda: modules.EdgeGatedAttention(48, 4, edge_dim=20, bias=True),
    "HardConcreteHeadGate": lambda: modules.HardConcreteHeadGate(4, logit=1.5),
    "HeadGate": lambda: modules.HeadGate(MASK),
    "LinearAttention": lambda: modules.LinearAttention(48, 4),
    "LinearAttention softmax": lambda: modules.LinearAttention(48, 4, feature_map="softmax"),
    "LinearAttention gated": lambda: modules.LinearAttention(
        48, 4, feature_map="relu_random", head_gate=modules.HardConcreteHeadGate(4)
    ),
    "NeighborhoodAttention": lambda: modules.NeighborhoodAttention(48, 4, kv_heads=2),
    "NeighborhoodAttention gated": lambda: modules.NeighborhoodAttention(
        48, 4, head_gate=modules.HeadGate(MASK)
    ),
    "TopKHeadGate": lambda: modules.TopKHeadGate(4, 2),
    "TransformerConv": lambda: MODULES["TransformerConv"].make(48, 4, edge_dim=20, beta=True),
    "VirtualNode": lambda: modules.VirtualNode(48),
    "GlobalAttention": lambda: GlobalAttention(48, 4),
    "GraphGPSLayer gat": lambda: GraphGPSLayer(48, 4, local="gat", attention="performer"),
    "GraphGPSLayer gcn": lambda: GraphGPSLayer(48, 4, local="gcn", norm="graph"),
    "GraphGPSLayer pna": lambda: GraphGPSLayer(48, 4, local="pna"),
    "GraphGPSLayer gatedgcn": lambda: GraphGPSLayer(48, 4, local="gatedgcn", stable=True),
    "GraphTransformerLayer": lambda: GraphTransformerLayer(48, 4),
    "GraphTransformerEdgeLayer": lambda: GraphTransformerEdgeLayer(48, 4, norm="layer"),
    "GraphTransformer": lambda: models.GraphTransformer(
        models.GraphTransformerConfig(30, 20, pe_dim=20, **SIZES)
    ),
    "EdgeGraphTransformer": lambda: models.EdgeGraphTransformer(
        models.EdgeGraphTransformerConfig(**SIZES)
    ),
    "CorrespondenceTransformer": lambda: models.CorrespondenceTransformer(
        models.CorrespondenceTransformerConfig(**SIZES)
    ),
    "GraphGPS": lambda: models.GraphGPS(
        models.GraphGPSConfig(lap_pe=5, lap_dim=6, edge_types=(), **SIZES)
    ),
    "GraphGPS stable": lambda: models.GraphGPS(
        models.GraphGPSConfig(walk_steps=0, walk_dim=0, stable_pe=5, local="gatedgcn", **SIZES)
    ),
    "LargeGT": lambda: models.LargeGT(
        models.LargeGTConfig(30, 20, 50, dim=48, samples=5, position_dim=20, centroids=30)
    ),
    "Polynormer": lambda: models.Polynormer(models.PolynormerConfig(30, 20, **SIZES)),
    "Polynormer of large graphs": lambda: models.Polynormer(
        models.PolynormerConfig(
            30,
            20,
            beta=0.9,
            learn_beta=False,
            local="gcn",
            local_norm=True,
            pre_norm=True,
            shared_query=False,
            shared_output=False,
            **SIZES,
        )
    ),
    "OpenGraph": lambda: models.OpenGraph(models.OpenGraphConfig(**SIZES)),
    "SGFormer": lambda: models.SGFormer(models.SGFormerConfig(30, 20, **SIZES)),
    "SGFormer plain": lambda: models.SGFormer(
        models.SGFormerConfig(30, 20, convolution="plain", norm=False, values=False, **SIZES)
    ),
    "SGFormer initial": lambda: models.SGFormer(
        models.SGFormerConfig(30, 20, convolution="initial", aggregate="cat", **SIZES)
    ),
    "Graphormer": lambda: models.Graphormer(models.GraphormerConfig(head="transform", **SIZES)),
    "SceneGraphEncoder": lambda: models.SceneGraphEncoder(models.SceneGraphConfig(**SIZES)),
    "GraphGPSLayer deepsets": lambda: GraphGPSLayer(48, 4, attention="deepsets"),
    "Exphormer": lambda: models.Exphormer(
        models.ExphormerConfig(encode_norm=True, in_layers=1, **SIZES)
    ),
    "MPNNVirtualNode": lambda: models.MPNNVirtualNode(
        models.MPNNVirtualNodeConfig(48, local="gatedgcn", walk_steps=5, walk_dim=6, layers=2)
    ),
    "SAN": lambda: models.SAN(models.SANConfig(far_type=False, **SIZES)),
    "GraphGPS encodings": lambda: models.GraphGPS(
        models.GraphGPSConfig(
            lap_pe=5, lap_dim=6, lap_heads=2, heat_times=3, heat_dim=4, kernel_layers=2, **WALKS
        )
    ),
    "GraphGPS signs": lambda: models.GraphGPS(
        models.GraphGPSConfig(sign_pe=5, sign_dim=6, electrostatic_dim=4, **WALKS)
    ),
    "Todyformer": lambda: models.Todyformer(models.TodyformerConfig(30, **TEMPORAL)),
    "GTSP": lambda: models.GTSP(
        models.GTSPConfig(prune={"tokens": 0.5, "heads": 0.5, "layers": 0.5}, **SIZES)
    ),
    "GTSP graphormer": lambda: models.GTSP(
        models.GTSPConfig(base="graphormer", prune={"tokens": 0.5}, **SIZES)
    ),
    "GraphClassifier": lambda: models.GraphClassifier(
        models.GraphClassifierConfig(30, 20, gated=True, **SIZES)
    ),
    "PackageClassifier": lambda: PackageClassifier(PackageClassifierConfig(90, 5, 20, **SIZES)),
    "SymPointAttention": lambda: models.SymPointAttention(48),
    "TokenPruning": lambda: pruning.TokenPruning(48),
    "SkipLayer": lambda: pruning.SkipLayer(GraphTransformerLayer(48, 4)),
}


def poisoned(name):
    """A module from the meta device whose memory holds what no parameter would be."""
    with torch.device("meta"):
        module = MAKE[name]()
    module.to_empty(device="cpu")
    for x in (*module.parameters(), *module.buffers()):
        x.data.fill_(torch.nan if x.is_floating_point() else False)
    return module


def test_pytorchs_own_attention_is_reset_and_unknown_parameters_are_refused():
    from fastgt.pruning import SkipLayer

    skipped = SkipLayer(nn.TransformerEncoderLayer(8, 2), 0.5)
    for p in skipped.parameters():
        nn.init.constant_(p, torch.nan)
    skipped.reset_parameters()
    for name, p in skipped.named_parameters():
        assert p.isfinite().all(), name

    class Scale(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(2))

    with pytest.raises(TypeError, match="Scale has the parameter 'scale' and no reset_parameters"):
        SkipLayer(nn.Sequential(Scale()), 0.5).reset_parameters()


def state(module):
    return dict(module.named_parameters()) | dict(module.named_buffers())


def test_all_that_is_public_is_here():
    public = [getattr(m, name) for m in (modules, models, pruning) for name in m.__all__]
    classes = {c for c in public if isinstance(c, type) and issubclass(c, nn.Module)}
    classes.remove(pruning.DropPath)  # it has neither parameters nor buffers
    assert classes <= {type(make()) for name, make in MAKE.items() if name != "TransformerConv"}


@pytest.mark.parametrize("name", MAKE)
def test_what_has_parameters_or_buffers_can_be_reset(name):
    made = MAKE[name]()
    for path, module in made.named_modules():
        own = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
        if own or module is made:
            assert callable(getattr(module, "reset_parameters", None)), path


@pytest.mark.parametrize("name", MAKE)
def test_a_seed_draws_what_it_draws_for_a_module_made_at_once(name):
    torch.manual_seed(7)
    at_once = MAKE[name]()
    if name == "TransformerConv":  # it draws twice, as PyG's does
        torch.manual_seed(7)
        at_once.reset_parameters()
    later = poisoned(name)
    torch.manual_seed(7)
    later.reset_parameters()
    wanted = state(at_once)
    assert wanted
    for key, x in state(later).items():
        assert torch.equal(x, wanted[key]), key
        assert x.dtype == wanted[key].dtype, key
    # nor does the memory of a trained one matter
    for x in (*at_once.parameters(), *at_once.buffers()):
        x.data.fill_(0) if x.dtype == torch.bool else x.data.add_(1)
    torch.manual_seed(7)
    at_once.reset_parameters()
    for key, x in state(later).items():
        assert torch.equal(x, state(at_once)[key]), key


@pytest.mark.parametrize("name", MAKE)
def test_modules_that_are_reset_one_by_one_are_distributed_alike(name):
    """As FSDP does it: each module with parameters or buffers of its own, in any order."""
    torch.manual_seed(0)
    wanted, later = state(MAKE[name]()), poisoned(name)
    for module in reversed([*later.modules()]):
        if [*module.parameters(recurse=False), *module.buffers(recurse=False)]:
            module.reset_parameters()
    for key, x in state(later).items():
        y = wanted[key]
        assert not x.isnan().any(), key
        constant = y.numel() > 1 and (y == y.flatten()[0]).all()
        if constant or key.endswith(("mask", "logits", "num_batches_tracked")):
            assert torch.equal(x, y), key
        elif x.numel() >= 200:
            assert abs(x.std() / y.std() - 1) < 0.25, key
            assert x.abs().max() < 1.7 * y.abs().max(), key


def test_masks_of_the_meta_device_have_all_heads():
    with torch.device("meta"):
        gates = modules.HeadGate(torch.zeros(3)), modules.HeadGate(torch.zeros(3, dtype=torch.bool))
    for gate in gates:
        gate.to_empty(device="cpu").reset_parameters()
        assert (gate() == 1).all()


def test_a_mask_is_reset_to_what_it_was_made_with():
    mask = MASK.clone()
    gate = modules.HeadGate(mask)
    mask.zero_()
    gate.mask.zero_()
    gate.half().reset_parameters()
    assert gate.mask.tolist() == MASK.tolist()
    assert gate.mask.dtype == torch.float16


def test_layers_without_a_reset_pass_it_on():
    """Adapters and containers, in what is called for all that is inside."""
    attention = modules.NeighborhoodAttention(48, 4)
    attention.q = nn.Sequential(attention.q, nn.ModuleList([nn.Linear(3, 3)]))
    for p in attention.parameters():
        nn.init.constant_(p, torch.nan)
    attention.reset_parameters()
    for p in attention.parameters():
        assert p.isfinite().all()
