"""Layers of fastgt.pyg with explainers, hooks, wrappers and transforms."""

import copy

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad
from torch.func import functional_call

pytest.importorskip("torch_geometric")

from torch_geometric import EdgeIndex
from torch_geometric import nn as pyg
from torch_geometric.explain import Explainer, GNNExplainer
from torch_geometric.nn import attention as pyg_attention
from torch_geometric.typing import SparseTensor
from torch_geometric.utils import to_dense_batch

import fastgt
from fastgt import Graph
from fastgt import pyg as ours
from fastgt.nn import LinearAttention
from fastgt.pruning import GradualPruning
from fastgt.pyg.fused import as_pyg

N, E, C = 9, 30, 6
WIDE = torch.float64

LAYERS = {
    "TransformerConv": lambda kinds, **more: kinds.TransformerConv(C, 4, heads=2, **more),
    "GATConv": lambda kinds, **more: kinds.GATConv(C, 4, heads=2, **more),
    "GATv2Conv": lambda kinds, **more: kinds.GATv2Conv(C, 4, heads=2, **more),
    "GINEConv": lambda kinds, **more: kinds.GINEConv(nn.Linear(C, 8), edge_dim=C, **more),
    "ResGatedGraphConv": lambda kinds, **more: kinds.ResGatedGraphConv(C, 8, **more),
    "PointTransformerConv": lambda kinds, **more: kinds.PointTransformerConv(C, 8, **more),
}
every_layer = pytest.mark.parametrize("name", LAYERS)
pytestmark = pytest.mark.filterwarnings("ignore:fastgt.pyg")


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def pair(name, **more):
    """Torch-geometric's layer, which is made first, and that of ours, with the same parameters."""
    expected = LAYERS[name](pyg, **more).double()
    found = LAYERS[name](ours, **more).double()
    found.load_state_dict(expected.state_dict())
    return found, expected


def call(layer, x, index):
    """Of any layer, of the same edges."""
    if isinstance(layer, pyg.PointTransformerConv):
        return layer(x, x[:, :3], index)
    if isinstance(layer, pyg.GINEConv):
        return layer(x, index, x[index[0]] - x[index[1]])
    return layer(x, index)


class Call(nn.Module):
    """A model of one layer."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x, index):
        return call(self.layer, x, index)


def given():
    return torch.randn(N, C, dtype=WIDE), torch.randint(N, (2, E))


def assert_close(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-11)


def assert_same(found, expected, *args):
    assert_close(call(found, *args), call(expected, *args))


@every_layer
def test_masks_of_an_explainer_count(name):
    x, index = given()
    layers = pair(name)
    plain = call(layers[1], x, index)
    for layer in layers:
        layer.explain, layer._edge_mask = True, torch.linspace(-1, 1, E, dtype=WIDE)
        layer._loop_mask = index[0] != index[1]
    assert_same(*layers, x, index)
    assert not torch.allclose(call(layers[0], x, index), plain)
    for layer in layers:
        layer.explain, layer._edge_mask, layer._loop_mask = False, None, None
    torch.testing.assert_close(call(layers[0], x, index), plain)
    assert layers[0].ran() == "fused"


@pytest.mark.parametrize("name", ["TransformerConv", "GATConv", "GATv2Conv"])
def test_gnn_explainer_explains_the_same(name):
    class Net(nn.Module):
        def __init__(self, kinds):
            super().__init__()
            torch.manual_seed(0)
            self.one, self.two = LAYERS[name](kinds), getattr(kinds, name)(8, 3)

        def forward(self, x, index):
            return self.two(self.one(x, index).relu(), index).log_softmax(-1)

    x, index = given()
    masks = []
    nets = [Net(pyg), Net(ours), Net(pyg)]
    fastgt.accelerate(nets[2])
    for net in nets:
        torch.manual_seed(0)
        explainer = Explainer(
            net,
            GNNExplainer(epochs=5),
            explanation_type="model",
            edge_mask_type="object",
            node_mask_type="attributes",
            model_config={
                "mode": "multiclass_classification",
                "task_level": "node",
                "return_type": "log_probs",
            },
        )
        masks.append(explainer(x.float(), index, index=2).edge_mask)
    assert masks[0].any()
    for mask in masks[1:]:
        torch.testing.assert_close(mask, masks[0])


@every_layer
def test_transforms_of_torch_func(name):
    layers, (x, index) = [Call(layer) for layer in pair(name)], given()

    def squares(layer, p, x):
        return functional_call(layer, p, (x, index)).square().sum()

    transforms = [
        lambda layer, p: torch.func.grad(lambda p: squares(layer, p, x))(p),
        lambda layer, p: torch.func.vmap(
            torch.func.grad(lambda p, x: squares(layer, p, x)), (None, 0)
        )(p, torch.stack([x, -x])),
        lambda layer, p: torch.func.jvp(lambda x: layer(x, index), (x,), (x,)),
    ]
    for transform in transforms:
        found, expected = (transform(layer, dict(layer.named_parameters())) for layer in layers)
        assert_close(found, expected)
        assert "torch.func transforms it" in layers[0].layer.ran()
    with forward_ad.dual_level():
        found, expected = (
            forward_ad.unpack_dual(layer(forward_ad.make_dual(x, x.cos()), index)).tangent
            for layer in layers
        )
        assert_close(found, expected)


def test_transforms_of_global_attention():
    batch = torch.tensor([0] * 4 + [1] * 5)
    x, index = torch.randn(N, 8, dtype=WIDE), torch.randint(N, (2, E))
    expected = pyg.GPSConv(8, None, heads=2).double().eval()
    found = ours.GPSConv(8, None, heads=2).double().eval()
    found.load_state_dict(expected.state_dict())

    def gradient(layer, x, *more):
        return torch.func.grad(lambda x: layer(x, *more).square().sum())(x)

    assert_close(gradient(found, x, index, batch), gradient(expected, x, index, batch))
    attn = ours.PolynormerAttention(8, 2, head_channels=4).double()
    assert_close(gradient(attn, x[None]), gradient(as_pyg(attn), x[None]))
    assert attn.ran() == "fused"  # padded keys do not count, as elsewhere
    for found.attn in (attn, LinearAttention(8, 2).double()):
        y = x.clone().requires_grad_()
        expected = torch.autograd.grad(found(y, index, batch).square().sum(), y)[0]
        assert_close(gradient(found, x, index, batch), expected)


@pytest.mark.parametrize("norm", ["batch_norm", "graph_norm"])
@pytest.mark.parametrize("hooked", [False, True])
def test_graphs_of_a_graph_are_those_of_gps(norm, hooked):
    """In norms too, and where torch-geometric's own code runs."""
    graph = Graph.batch([Graph.complete(torch.tensor([0, n])) for n in (4, 5)])
    batch, x = torch.tensor([0] * 4 + [1] * 5), torch.randn(N, 8, dtype=WIDE)
    layer = ours.GPSConv(8, None, heads=2, norm=norm).double()
    if hooked:
        layer.attn.register_forward_hook(lambda *_: None)
    assert_close(layer(x, graph), layer(x, graph.edge_index, batch))
    assert ("attn has hooks" in layer.ran()) == hooked
    with pytest.raises(ValueError, match="edge_index has 9 nodes, x has 8"):
        layer(x[1:], graph)


@pytest.mark.parametrize("name", ["PerformerAttention", "SGFormerAttention", "PolynormerAttention"])
@pytest.mark.parametrize("as_graph", [False, True])
def test_gps_calls_attention_that_counts_padding(name, as_graph):
    batch, x = torch.tensor([0] * 4 + [1] * 5), torch.randn(N, 8)
    index = torch.zeros(2, 0, dtype=torch.int64)
    layer = ours.GPSConv(8, None, heads=2, norm=None)
    layer.mlp = nn.Identity()
    width = 8 if name == "SGFormerAttention" else 4  # the mean of its heads
    layer.attn = getattr(ours, name)(8, heads=2, head_channels=width, padding="counted")
    dense, mask = to_dense_batch(x, batch)
    expected = 2 * (layer.attn(dense, mask)[mask] + x)
    if as_graph:
        index, batch = Graph.batch([Graph.complete(torch.tensor([0, n])) for n in (4, 5)]), None
    torch.testing.assert_close(layer(x, index, batch), expected)


@every_layer
def test_what_puts_messages_together_is_asked(name):
    x, index = given()
    layers = pair(name)
    for layer in layers:
        layer.aggr_module.register_forward_hook(lambda _, args, out: 2 * out)
    assert_same(*layers, x, index)
    assert "has hooks" in layers[0].ran()
    layers = pair(name)
    for layer in layers:
        layer.aggr_module = pyg.MeanAggregation()
    assert_same(*layers, x, index)
    layers = pair(name, aggr=pyg.SumAggregation())
    assert_same(*layers, x, index)
    assert layers[0].ran() == "fused"


def test_subclasses_that_propagate_themselves_do_so():
    def twice(function):
        return lambda *args, **kwargs: 2 * function(*args, **kwargs)

    def doubled(kind, name):
        return type("Doubled", (kind,), {name: lambda *a, **k: 2 * getattr(kind, name)(*a, **k)})

    x, index = given()
    for name, what in (("TransformerConv", "propagate"), ("GATConv", "edge_updater")):
        layers = [doubled(getattr(kinds, name), what)(C, 4).double() for kinds in (ours, pyg)]
        layers[1].load_state_dict(layers[0].state_dict())
        assert_same(*layers, x, index)
        assert "a propagation of its own" in layers[0].ran()
        layers = pair(name)
        for layer in layers:
            setattr(layer, what, twice(getattr(layer, what)))
        assert_same(*layers, x, index)
        assert f"a {what} of its own" in layers[0].ran()

        class Same(getattr(ours, name)):
            pass

        layer = Same(C, 4).double()
        call(layer, x, index)
        assert layer.ran() == "fused"


RELATIONS = [("a", "to", "b"), ("b", "to", "a"), ("a", "to", "a")]


def hgt(kind):
    torch.manual_seed(0)
    return kind(C, 8, (["a", "b"], RELATIONS), heads=2).double()


def hetero():
    x = {"a": torch.randn(N, C, dtype=WIDE), "b": torch.randn(N, C, dtype=WIDE)}
    return x, {relation: torch.randint(N, (2, E)) for relation in RELATIONS}


def test_subclasses_of_hgt_are_fused():
    class Same(ours.HGTConv):
        pass

    x, edges = hetero()
    expected = hgt(pyg.HGTConv)(x, edges)
    for layer in (hgt(Same), copy.deepcopy(hgt(Same))):
        assert_close(layer(x, edges), expected)
        assert layer.ran() == "fused"


@pytest.mark.parametrize("name", ["TransformerConv", "HGTConv"])
def test_layers_are_accelerated_and_restored_around_an_explanation(name):
    if name == "HGTConv":
        layer, args, edges = hgt(pyg.HGTConv), hetero(), 3 * E
    else:
        layer, args, edges = LAYERS[name](pyg).double(), given(), E
    plain = layer(*args)

    def explained(layer, on):
        layer.explain, layer._edge_mask = on, torch.zeros(edges, dtype=WIDE) if on else None
        layer._loop_mask = torch.ones(edges, dtype=torch.bool)
        return layer(*args)

    masked = explained(layer, True)
    for before in (True, False):
        assert_close(explained(layer, before), masked if before else plain)
        fastgt.accelerate(layer)
        assert_close(layer(*args), masked if before else plain)
        assert_close(explained(layer, True), masked)
        assert_close(explained(layer, False), plain)
        assert layer.ran() == "fused"
        assert_close(copy.deepcopy(layer)(*args), plain)
        assert_close(explained(layer, not before), plain if before else masked)
        fastgt.restore(layer)
        assert_close(layer(*args), plain if before else masked)
        assert_close(explained(layer, False), plain)


@pytest.mark.parametrize("node_dim", [0, 1, -1])
def test_nodes_may_stand_in_another_dimension(node_dim):
    x, index = torch.randn(C, C, dtype=WIDE), torch.randint(C, (2, C))
    inside = nn.Identity()
    layers = [kinds.GINEConv(inside, node_dim=node_dim).double() for kinds in (ours, pyg)]
    assert_close(*(layer(x, index, x) for layer in layers))
    assert (layers[0].ran() == "fused") == (node_dim == 0)


def test_sizes_of_edges_are_those_of_nodes():
    none, x = torch.zeros(2, 0, dtype=torch.int64), torch.randn(N, C, dtype=WIDE)
    found, expected = pair("GATConv", add_self_loops=False)
    assert_close(*(layer((x, None), none, size=(N, 0)) for layer in (found, expected)))
    found, expected = pair("GINEConv")
    attr = torch.zeros(0, C, dtype=WIDE)
    for size in ((N, 0), (None, 0)):
        assert_close(*(layer((x, None), none, attr, size=size) for layer in (found, expected)))
    with pytest.raises(ValueError, match="from any sources to 3 targets but x has 9 and 9"):
        found((x, x), none, attr, size=(None, 3))


@every_layer
def test_an_edge_index_of_other_sizes_is_refused(name):
    x, index = given()
    layers = pair(name)
    for sizes in ((N, N), (None, N), (None, None)):
        assert_same(*layers, x, EdgeIndex(index, sparse_size=sizes))
        assert layers[0].ran() == "fused"
    with pytest.raises(ValueError, match="from 10 sources to 9 targets but x has 9 and 9"):
        call(layers[0], x, EdgeIndex(index, sparse_size=(N + 1, N)))


class Matrix(SparseTensor):
    """What layers ask of a torch_sparse.SparseTensor, which may not be installed."""

    def __init__(self, row, col, value, size):
        self.entries, self.sizes = (row, col, value), size

    def coo(self):
        return self.entries

    def csr(self):
        row, col, value = self.entries
        return torch.searchsorted(row, torch.arange(self.sizes[0] + 1)), col, value

    def size(self, i):
        return self.sizes[i]

    def set_value(self, value, layout):
        return Matrix(*self.entries[:2], value, self.sizes)


@pytest.mark.parametrize("name", ["TransformerConv", "GATConv", "GATv2Conv"])
def test_attention_weights_come_with_edges_as_they_were_given(name):
    x, index = given()
    index = index.unique(dim=1)
    row, col = index
    coo = torch.sparse_coo_tensor(index, torch.ones(len(row), dtype=WIDE), (N, N)).coalesce()
    more = {} if name == "TransformerConv" else {"add_self_loops": False}
    layers = pair(name, **more)

    def results(layer, edges):
        with torch.no_grad():
            out, rest = layer(x, edges, return_attention_weights=True)
        if isinstance(rest, Matrix):
            return out, rest.coo()
        edges, weights = rest
        return out, weights, edges.layout, edges.to_dense()

    for edges in (index, coo, coo.to_sparse_csr(), Matrix(row, col, None, (N, N))):
        found, expected = (results(layer, edges) for layer in layers)
        assert layers[0].ran() == "fused"
        assert str(found[2:]) == str(expected[2:])
        assert_close(found[:2], expected[:2])
    graph = Graph.from_edge_index(index, N)
    assert_close(results(layers[0], graph)[3], index)


@pytest.mark.parametrize("name", ["GATConv", "GATv2Conv"])
def test_attributes_of_edges_may_have_more_dimensions(name):
    x, index = given()
    attr = torch.randn(E, 1, 3, dtype=WIDE)
    assert_close(*(layer(x, index, attr) for layer in pair(name, edge_dim=3)))


@pytest.mark.parametrize("attn_nn", [None, nn.Linear(8, 1), nn.Linear(8, 8)], ids=str)
@pytest.mark.parametrize("pos_nn", [nn.Linear(3, 1), nn.Linear(3, 8)], ids=str)
def test_networks_of_points_may_give_one_channel(pos_nn, attn_nn):
    layers = pair("PointTransformerConv", pos_nn=pos_nn, attn_nn=attn_nn)
    assert_same(*layers, *given())
    assert layers[0].ran() == "fused"


def test_points_without_a_position_are_refused():
    (x, index), layer = given(), pair("PointTransformerConv")[0]
    with pytest.raises(ValueError, match="pos has 8 sources and 8 targets but x has 9 and 9"):
        layer(x, x[1:, :3], index)


@pytest.mark.parametrize("dtype", [torch.float32, torch.int64, torch.bool])
def test_attributes_of_another_type_are_promoted(dtype):
    x, index = given()
    attr = torch.randint(3, (E, C)).to(dtype)
    assert_close(*(layer(x, index, attr) for layer in pair("ResGatedGraphConv", edge_dim=C)))
    inside = nn.Identity()
    assert_close(*(kinds.GINEConv(inside).double()(x, index, attr) for kinds in (ours, pyg)))


@pytest.mark.parametrize("name", ["ResGatedGraphConv", "GINEConv"])
def test_autocast_gives_nodes_and_edges_one_type(name):
    x, index = given()
    layers = [
        layer.float() for layer in pair(name, **({} if name == "GINEConv" else {"edge_dim": C}))
    ]
    with torch.autocast("cpu", torch.bfloat16):
        found, expected = (layer(x.bfloat16(), index, x[index[0]].float()) for layer in layers)
    torch.testing.assert_close(found.float(), expected.float(), rtol=5e-2, atol=5e-2)
    assert layers[0].ran() == "fused"


@every_layer
def test_weights_are_pruned_gradually(name):
    """Torch-geometric's linear layers are no nn.Linear."""
    x, index = given()
    for layer in pair(name):
        linears = [m for m in layer.modules() if isinstance(m, (pyg.Linear, nn.Linear))]
        size = sum(m.weight.numel() for m in linears)
        pruning = GradualPruning(layer, 0.5, end=1)
        assert pruning.size == size > 0
        optimizer = torch.optim.SGD(layer.parameters(), 0.1)
        call(layer, x, index).square().sum().backward()
        assert all(m.weight_orig.grad is not None for m in linears)
        optimizer.step()
        pruning.step()
        assert sum(int((m.weight == 0).sum()) for m in linears) == size // 2
        before = call(layer, x, index)
        pruning.finish()
        assert_close(call(layer, x, index), before)


def test_layers_without_a_size_are_not_pruned():
    with pytest.raises(ValueError, match="the weight of 'lin_key' has no size yet"):
        GradualPruning(ours.TransformerConv(-1, 4), 0.5, end=1)


def test_a_batch_that_numbers_no_graphs_is_refused():
    x, index = given()
    layer = ours.GPSConv(C, None, heads=2).double()
    with pytest.raises(ValueError, match="batch has graph -1; it must not be negative"):
        layer(x, index, torch.arange(N) - 1)
    with pytest.raises(TypeError, match=r"batch must hold integers, got torch\.float32"):
        layer(x, index, torch.zeros(N))


def test_hooks_on_a_performer_s_projection_run():
    expected = pyg_attention.PerformerAttention(8, 2, head_channels=4).double()
    found = ours.PerformerAttention(8, 2, head_channels=4).double()
    found.load_state_dict(expected.state_dict())
    for layer in (found, expected):
        layer.fast_attn.register_forward_hook(lambda _, args, out: 2 * out)
    x = torch.randn(2, 5, 8, dtype=WIDE)
    assert_close(found(x), expected(x))
    assert "fast_attn has hooks" in found.ran()
