"""fastgt.pyg: torch-geometric's layers, values and gradients, computed another way."""

import copy
import pickle
import warnings

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("torch_geometric")

from torch_geometric import nn as pyg
from torch_geometric.data import HeteroData
from torch_geometric.nn import attention as pyg_attention
from torch_geometric.utils import to_torch_csc_tensor

import fastgt
from fastgt import Graph
from fastgt import pyg as ours
from fastgt.pyg import accelerating, fused, sharing
from fastgt.pyg.fused import Fused

N, SOURCES, E, C = 11, 7, 40, 6


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    """Random numbers from one seed, and nobody warned yet."""
    torch.manual_seed(0)
    monkeypatch.setattr(fused, "_told", set())


def edges(sources=N, targets=N, count=E):
    """Random edges; the last node has none."""
    return torch.stack([torch.randint(n - (n > 1), (count,)) for n in (sources, targets)])


def pair(name, *args, **kwargs):
    """The layer of ours and torch-geometric's, in float64, with the same parameters."""
    found = getattr(ours, name)(*args, **kwargs).double()
    theirs = getattr(pyg, name, None) or getattr(pyg_attention, name)
    expected = theirs(*args, **{k: x for k, x in kwargs.items() if k != "padding"}).double()
    expected.load_state_dict(found.state_dict())
    return found, expected


def results(layer, call, inputs):
    """The output, and the gradients of inputs and parameters."""
    given = [x.detach().clone().requires_grad_() for x in inputs]
    out = call(layer, *given)
    outs = list(out.values()) if isinstance(out, dict) else [out]
    upstream = torch.Generator().manual_seed(1)
    total = sum((x * torch.randn(x.shape, generator=upstream, dtype=x.dtype)).sum() for x in outs)
    wanted = [*given, *(p for p in layer.parameters() if p.requires_grad)]
    grads = torch.autograd.grad(total, wanted, allow_unused=True)
    return [
        *outs,
        *(torch.zeros_like(p) if g is None else g for p, g in zip(wanted, grads, strict=True)),
    ]


def assert_same(found, expected, call, *inputs, fused=True):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pairs = zip(results(found, call, inputs), results(expected, call, inputs), strict=True)
        for i, (x, y) in enumerate(pairs):
            torch.testing.assert_close(x, y, rtol=1e-9, atol=1e-11, msg=lambda m, i=i: f"{i}: {m}")
    for name, why in ours.explain(found).items():
        assert (why == "fused") == fused, f"{name}: {why}"


def close(found, expected):
    """Of what torch-geometric computes in float32 only."""
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


def wide(*shape):
    return torch.randn(*shape, dtype=torch.float64)


TRANSFORMERS = [
    {},
    {"heads": 3, "edge_dim": 5},
    {"heads": 2, "concat": False, "beta": True, "edge_dim": 5},
    {"heads": 2, "root_weight": False, "bias": False},
    {"heads": 2, "beta": True, "flow": "target_to_source"},
]
GATS = [
    {},
    {"heads": 3, "edge_dim": 5},
    {"heads": 2, "concat": False, "residual": True, "add_self_loops": False, "edge_dim": 5},
    {"heads": 2, "bias": False, "negative_slope": 0.1, "edge_dim": 5, "fill_value": 0.5},
    {"heads": 2, "flow": "target_to_source"},
]


@pytest.mark.parametrize("options", TRANSFORMERS, ids=str)
def test_transformer_conv(options):
    index = edges()
    layers = pair("TransformerConv", C, 4, **options)
    attr = [wide(E, 5)] if "edge_dim" in options else []
    assert_same(*layers, lambda layer, x, *e: layer(x, index, *e), wide(N, C), *attr)


@pytest.mark.parametrize("options", GATS, ids=str)
@pytest.mark.parametrize("name", ["GATConv", "GATv2Conv"])
def test_gat(name, options):
    index = edges()
    layers = pair(name, C, 4, **options)
    attr = [wide(E, 5)] if "edge_dim" in options else []
    assert_same(*layers, lambda layer, x, *e: layer(x, index, *e), wide(N, C), *attr)


def test_gatv2_shares_weights():
    index = edges()
    layers = pair("GATv2Conv", C, 4, heads=2, share_weights=True)
    assert_same(*layers, lambda layer, x: layer(x, index), wide(N, C))


@pytest.mark.parametrize("name", ["TransformerConv", "GATConv", "GATv2Conv"])
def test_two_sets_of_nodes(name):
    index = edges(SOURCES, N)
    options = {} if name == "TransformerConv" else {"add_self_loops": False}
    layers = pair(name, (C, 9), 4, heads=2, edge_dim=3, **options)
    assert_same(
        *layers,
        lambda layer, x, y, e: layer((x, y), index, e),
        wide(SOURCES, C),
        wide(N, 9),
        wide(E, 3),
    )


def test_gat_without_features_of_targets():
    index = edges(SOURCES, N)
    layers = pair("GATConv", (C, 9), 4, heads=2)
    sizes = SOURCES, N
    assert_same(*layers, lambda layer, x: layer((x, None), index, size=sizes), wide(SOURCES, C))


@pytest.mark.parametrize("edge_dim", [None, 5])
@pytest.mark.parametrize("train_eps", [False, True])
def test_gine_conv(edge_dim, train_eps):
    index = edges()
    torch.manual_seed(3)
    inside = nn.Linear(C, 8)
    found, expected = (
        kind(copy.deepcopy(inside), eps=0.3, train_eps=train_eps, edge_dim=edge_dim).double()
        for kind in (ours.GINEConv, pyg.GINEConv)
    )
    expected.load_state_dict(found.state_dict())
    attr = wide(E, edge_dim or C)
    assert_same(found, expected, lambda layer, x, e: layer(x, index, e), wide(N, C), attr)


@pytest.mark.parametrize("edge_dim", [None, 5])
def test_res_gated_graph_conv(edge_dim):
    index = edges()
    layers = pair("ResGatedGraphConv", C, 8, edge_dim=edge_dim)
    attr = [wide(E, edge_dim)] if edge_dim else []
    assert_same(*layers, lambda layer, x, *e: layer(x, index, *e), wide(N, C), *attr)


@pytest.mark.parametrize("loops", [False, True])
@pytest.mark.parametrize("attn_nn", [False, True])
def test_point_transformer_conv(loops, attn_nn):
    index = edges()
    inside = {"attn_nn": nn.Linear(8, 8)} if attn_nn else {}
    layers = pair("PointTransformerConv", C, 8, add_self_loops=loops, **inside)
    assert_same(*layers, lambda layer, x, p: layer(x, p, index), wide(N, C), wide(N, 3))


def test_hgt_conv():
    relations = {
        ("author", "writes", "paper"): edges(SOURCES, N),
        ("paper", "written_by", "author"): edges(N, SOURCES),
        ("paper", "cites", "paper"): edges(N, N),
    }
    metadata = ["author", "paper"], list(relations)
    layers = pair("HGTConv", {"author": C, "paper": 8}, 8, metadata, heads=2)

    def call(layer, author, paper):
        return layer({"author": author, "paper": paper}, relations)

    assert_same(*layers, call, wide(SOURCES, C), wide(N, 8))


@pytest.mark.parametrize("norm", [None, "batch_norm", "layer_norm", "graph_norm"])
@pytest.mark.parametrize("batched", [False, True])
def test_gps_conv(norm, batched):
    index = edges()
    batch = torch.tensor([0, 0, 0, 1, 3, 3, 3, 3, 3, 4, 4]) if batched else None
    torch.manual_seed(3)
    inside = nn.Linear(8, 8)
    found = ours.GPSConv(8, ours.GINEConv(inside), heads=2, norm=norm).double()
    expected = pyg.GPSConv(8, pyg.GINEConv(copy.deepcopy(inside)), heads=2, norm=norm).double()
    expected.load_state_dict(found.state_dict())

    def call(layer, x, e):
        return layer(x, index, batch, edge_attr=e)

    assert_same(found, expected, call, wide(N, 8), wide(E, 8))


def test_gps_conv_with_performer_leaves_padding_out():
    """Each graph of a batch gets what it gets alone, which torch-geometric's does not give."""
    conv = ours.GPSConv(8, None, heads=2, norm=None, attn_type="performer").double().eval()
    assert type(conv.attn) is ours.PerformerAttention
    x, batch = wide(N, 8), torch.tensor([0] * 2 + [1] * 9)
    together = conv(x, edges(), batch)
    alone = torch.cat([conv(part, edges()) for part in (x[:2], x[2:])])
    torch.testing.assert_close(together, alone)


DENSE = ["PerformerAttention", "SGFormerAttention", "PolynormerAttention"]


@pytest.mark.parametrize("name", DENSE)
@pytest.mark.parametrize("bias", [False, True])
def test_dense_attention_without_padding_is_torch_geometric_s(name, bias):
    layers = [x.float() for x in pair(name, C, heads=2, head_channels=4, qkv_bias=bias)]
    x = torch.randn(3, 5, C)
    found, expected = (results(layer, lambda layer, x: layer(x), [x]) for layer in layers)
    for one, other in zip(found, expected, strict=True):
        close(one, other)
    assert layers[0].ran() == "fused"


@pytest.mark.parametrize("name", DENSE)
def test_dense_attention_leaves_padding_out_unless_it_is_counted(name):
    x = torch.randn(2, 5, C)
    mask = torch.tensor([[True] * 3 + [False] * 2, [True] * 5])
    layer, theirs = (x.float() for x in pair(name, C, heads=2, head_channels=4))
    out = layer(x, mask)
    close(out[0, :3], theirs(x[:1, :3])[0])
    close(out[1], theirs(x[1:])[0])
    assert not out[0, 3:].any()
    close(layer(x[mask], offsets=torch.tensor([0, 3, 8])), out[mask])
    counted = pair(name, C, heads=2, head_channels=4, padding="counted")[0].float()
    counted.load_state_dict(theirs.state_dict())
    with pytest.warns(UserWarning, match="padded keys are to be counted"):
        found = counted(x, mask)
    close(found, theirs(x, mask))


def test_polynormer_with_queries_of_its_own():
    layers = pair("PolynormerAttention", C, heads=3, head_channels=4, qk_shared=False)
    assert_same(*layers, lambda layer, x: layer(x), wide(3, 5, C))


@pytest.mark.parametrize("name", ["TransformerConv", "GATConv", "GATv2Conv"])
def test_a_sparse_matrix_is_its_edges(name):
    index = edges().unique(dim=1)
    options = {} if name == "TransformerConv" else {"add_self_loops": False}
    found, _ = pair(name, C, 4, heads=2, **options)
    x = wide(N, C)
    adj_t = to_torch_csc_tensor(index, size=(N, N)).t()
    torch.testing.assert_close(found(x, adj_t), found(x, index))
    assert found.ran() == "fused"
    assert adj_t.layout == torch.sparse_csr
    torch.testing.assert_close(found(x, adj_t.to_sparse_coo()), found(x, index))


@pytest.mark.parametrize("name", ["TransformerConv", "GATConv", "GATv2Conv"])
def test_a_graph_takes_the_place_of_an_edge_index(name):
    index = edges()
    found, expected = pair(name, C, 4, heads=2)
    graph, x = Graph.from_edge_index(index, N), wide(N, C)
    torch.testing.assert_close(found(x, graph), expected(x, index))
    with pytest.raises(ValueError, match=r"11 sources to 11 targets but x has 5 and 5"):
        getattr(ours, name)(C, 4, add_self_loops=False)(
            x[:5].float(), graph
        ) if name != "TransformerConv" else found(x[:5], graph)


@pytest.mark.parametrize("name", ["TransformerConv", "GATConv", "GATv2Conv"])
def test_attention_weights(name):
    index, x = edges(), wide(N, C)
    found, expected = pair(name, C, 4, heads=2)
    with pytest.warns(UserWarning, match="gradients are recorded"):
        out, (_, weights) = found(x, index, return_attention_weights=True)
    assert weights.requires_grad
    theirs, (other_index, other) = expected(x, index, return_attention_weights=True)
    torch.testing.assert_close(weights, other)
    with torch.no_grad():
        out, (same_index, weights) = found(x, index, return_attention_weights=True)
    assert found.ran() == "fused"
    torch.testing.assert_close(out, theirs.detach())
    torch.testing.assert_close(weights, other.detach())
    assert same_index.equal(other_index)


def model(layers=3, **kwargs):
    torch.manual_seed(0)
    return pyg.GAT(C, 8, num_layers=layers, out_channels=4, heads=2, v2=True, **kwargs).double()


def test_accelerate_replaces_in_place_and_restore_undoes_it():
    net, x, index = model(), wide(N, C), edges()
    expected = net(x, index)
    before, optimizer = dict(net.named_parameters()), torch.optim.SGD(net.parameters(), 0.1)
    calls = []
    net.convs[1].register_forward_hook(lambda *_: calls.append(1))
    net.eval()
    layers = list(net.convs)
    assert len(fastgt.accelerate(net, dry_run=True).replaced) == 3
    assert type(net.convs[0]) is pyg.GATv2Conv
    report = fastgt.accelerate(net)
    assert report.replaced == {f"convs.{i}": "GATv2Conv" for i in range(3)}
    assert not net.training
    assert all(x is y for x, y in zip(layers, net.convs, strict=True))
    assert all(isinstance(x, pyg.GATv2Conv) and isinstance(x, Fused) for x in net.convs)
    torch.testing.assert_close(net(x, index), expected)
    assert calls == [1]
    assert set(ours.explain(net).values()) == {"fused"}
    assert dict(net.named_parameters()).keys() == before.keys()
    assert all(before[name] is p for name, p in net.named_parameters())
    net(x, index).sum().backward()
    optimizer.step()
    assert len(fastgt.accelerate(copy.deepcopy(model())).replaced) == 3
    assert fastgt.restore(net) is net
    assert [type(x) for x in net.convs] == [pyg.GATv2Conv] * 3
    assert not net._forward_pre_hooks
    assert not net._forward_hooks
    assert "why_pyg" not in vars(net.convs[0])


def test_restore_leaves_layers_alone_that_were_fastgt_s():
    net = nn.Sequential(ours.TransformerConv(4, 4), pyg.TransformerConv(4, 4))
    report = fastgt.accelerate(net)
    assert report.kept == {"0": "it is fastgt's already"}
    fastgt.restore(net)
    assert [type(x) for x in net] == [ours.TransformerConv, pyg.TransformerConv]


def test_accelerate_says_what_it_keeps():
    class Mine(pyg.GATConv):
        pass

    net = nn.ModuleList([pyg.GCNConv(4, 4), Mine(4, 4), pyg.GATConv(4, 4)])
    net.append(pyg.TransformerConv(4, 4))
    net[3].forward = lambda x, edge_index: x
    report = fastgt.accelerate(net)
    assert report.kept == {
        "0": "fastgt has no GCNConv",
        "1": "Mine is a subclass with code of its own",
        "3": "it has a forward of its own",
    }
    assert report.replaced == {"2": "GATConv"}
    assert "  0: kept, fastgt has no GCNConv" in str(report)
    with pytest.warns(UserWarning, match="nothing to replace in Linear"):
        fastgt.accelerate(nn.Linear(2, 2))
    with pytest.raises(TypeError, match=r"must be a torch\.nn\.Module, got int"):
        fastgt.accelerate(3)
    with pytest.warns(UserWarning, match="padded nodes no longer count"):
        fastgt.accelerate(pyg.GPSConv(8, None, heads=2, attn_type="performer"))


def made_graphs(monkeypatch):
    """Counts the Graphs that are made of edge indices."""
    made = []
    real = Graph.from_edge_index
    monkeypatch.setattr(
        sharing.Graph,
        "from_edge_index",
        lambda *args, **kwargs: made.append(1) or real(*args, **kwargs),
    )
    return made


def test_one_graph_for_all_layers(monkeypatch):
    made = made_graphs(monkeypatch)
    net, x, index = model(), wide(N, C), edges()
    fastgt.accelerate(net)
    net(x, index)
    assert len(made) == 1
    net(x, index)
    assert len(made) == 2  # nothing outlives a forward
    with torch.inference_mode():
        net(x, index)
    assert len(made) == 3


def test_self_loops_of_a_graph_are_one_graph(monkeypatch):
    made = made_graphs(monkeypatch)
    net, x = model(), wide(N, C)
    index = edges()
    expected = net(x, index)
    fastgt.accelerate(net)
    graph = Graph.from_edge_index(index, N)
    made.clear()
    torch.testing.assert_close(net(x, graph), expected)
    assert len(made) == 1


def test_a_changed_edge_index_is_another_graph():
    conv, x = ours.TransformerConv(C, 4).double(), wide(N, C)
    index = edges()
    with ours.shared_graphs():
        conv(x, index)
        index[0] = index[0].flip(0)
        found = conv(x, index)
    torch.testing.assert_close(found, conv(x, index))
    made = []
    with torch.inference_mode(), ours.shared_graphs():
        other = edges()  # it counts no writes
        for _ in range(2):
            sharing.shared("x", other, (), lambda: made.append(1))
        assert made == [1]
        other[0, 0] += 1
        sharing.shared("x", other, (), lambda: made.append(1))
    assert made == [1, 1]


def test_a_forward_that_fails_ends_its_scope():
    net = model()
    fastgt.accelerate(net)
    with pytest.raises((ValueError, RuntimeError)):
        net(wide(N, C + 1), edges())
    assert not sharing._SCOPE.depth

    def fail(*_):
        raise KeyError("first")

    handle = nn.modules.module.register_module_forward_pre_hook(fail)
    with pytest.raises(KeyError, match="first"):
        net(wide(N, C), edges())
    handle.remove()
    assert not sharing._SCOPE.depth


def test_adapters_and_hooks_of_projections_work():
    index, x, attr = edges(), wide(N, C), wide(E, 5)

    class Adapter(nn.Module):
        def __init__(self, layer):
            super().__init__()
            self.layer, self.more = layer, nn.Linear(5, 8, bias=False).double()

        def forward(self, e):
            return self.layer(e) + self.more(e)

    for name in ("TransformerConv", "GATConv", "GATv2Conv"):
        layers = pair(name, C, 4, heads=2, edge_dim=5)
        torch.manual_seed(5)
        adapter = Adapter(layers[0].lin_edge)
        layers[0].lin_edge = adapter
        layers[1].lin_edge = copy.deepcopy(adapter)
        assert_same(*layers, lambda layer, x, e: layer(x, index, e), x, attr)


def test_hooks_on_messages_run_torch_geometric_s_code():
    index, x = edges(), wide(N, C)
    layers = pair("GATv2Conv", C, 4, heads=2)
    seen = []
    for layer in layers:
        layer.register_message_forward_hook(lambda *_: seen.append(1))
    assert_same(*layers, lambda layer, x: layer(x, index), x, fused=False)
    assert len(seen) == 2


def test_subclasses_with_messages_of_their_own_run_them():
    class Doubled(ours.TransformerConv):
        def message(self, query_i, key_j, value_j, edge_attr, index, ptr, size_i):
            return 2 * super().message(query_i, key_j, value_j, edge_attr, index, ptr, size_i)

    conv = Doubled(C, 4, root_weight=False).double()
    plain = ours.TransformerConv(C, 4, root_weight=False).double()
    plain.load_state_dict(conv.state_dict())
    x, index = wide(N, C), edges()
    with pytest.warns(UserWarning, match="a message of its own"):
        found = conv(x, index)
    torch.testing.assert_close(found, 2 * plain(x, index))


@pytest.mark.parametrize("name", ["TransformerConv", "GATConv", "GATv2Conv"])
def test_copies_pickles_and_scripts(name):
    class Scripted(nn.Module):
        def __init__(self, conv):
            super().__init__()
            self.conv = conv

        def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:
            return self.conv(x, edge_index)

    index, x = edges(), torch.randn(N, C)
    conv = getattr(ours, name)(C, 4, heads=2)
    expected = conv(x, index)
    torch.testing.assert_close(copy.deepcopy(conv)(x, index), expected)
    torch.testing.assert_close(pickle.loads(pickle.dumps(conv))(x, index), expected)
    if name != "TransformerConv":
        return  # torch.jit does not take torch-geometric's own either
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.testing.assert_close(torch.jit.script(Scripted(conv))(x, index), expected)


def test_lazy_sizes():
    index, x, attr = edges(), wide(N, C), wide(E, 5)
    conv = ours.TransformerConv(-1, 4, heads=2, edge_dim=-1).double()
    first = conv(x, index, attr)
    assert conv.lin_key.weight.shape == (8, C)
    torch.testing.assert_close(conv(x, index, attr), first)


def test_lazy_sizes_draw_the_same_weights():
    """From one seed: layers come in torch-geometric's order."""
    x, index = wide(N, C), edges()
    found, expected = (
        of.PointTransformerConv(-1, 4, pos_nn=pyg.MLP([-1, 4]), attn_nn=pyg.MLP([-1, 4])).double()
        for of in (ours, pyg)
    )
    for conv in (found, expected):
        torch.manual_seed(1)
        conv(x, x[:, :3], index)
    for (name, p), q in zip(found.named_parameters(), expected.parameters(), strict=True):
        assert torch.equal(p, q), name


def test_to_hetero():
    data = HeteroData()
    data["a"].x, data["b"].x = torch.randn(5, C), torch.randn(N, C)
    data["a", "to", "b"].edge_index, data["b", "to", "a"].edge_index = edges(5, N), edges(N, 5)

    class Net(nn.Module):
        def __init__(self, kind):
            super().__init__()
            self.conv = kind((-1, -1), 8, heads=2)

        def forward(self, x, edge_index):
            return self.conv(x, edge_index)

    nets = []
    for kind in (ours.TransformerConv, pyg.TransformerConv):
        net = pyg.to_hetero(Net(kind), data.metadata())
        net(data.x_dict, data.edge_index_dict)  # lazy sizes
        nets.append(net)
    nets[1].load_state_dict(nets[0].state_dict())
    found, expected = (net(data.x_dict, data.edge_index_dict) for net in nets)
    for kind in found:
        torch.testing.assert_close(found[kind], expected[kind])
    assert set(ours.explain(nets[0]).values()) == {"fused"}


def test_dropout_is_of_weights():
    index = edges()
    for name in ("TransformerConv", "GATConv", "GATv2Conv"):
        conv = getattr(ours, name)(C, 4, heads=2, dropout=0.5).double()
        x = wide(N, C)
        assert not conv(x, index).equal(conv(x, index))
        assert conv.ran() == "fused"
        conv.eval()
        assert conv(x, index).equal(conv(x, index))


def test_refusals():
    with pytest.raises(ValueError, match="padding must be one of"):
        ours.PerformerAttention(8, 2, padding="none")
    attn = ours.SGFormerAttention(8)
    with pytest.raises(ValueError, match=r"mask must be \[2, 3\], got \[2, 4\]"):
        attn(torch.randn(2, 3, 8), torch.ones(2, 4, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"x must be \[N, channels\]"):
        attn(torch.randn(2, 3, 8), offsets=torch.tensor([0, 3]))
    conv = ours.GPSConv(8, None, heads=2)
    with pytest.raises(ValueError, match="batch is not sorted: node 1 is of graph 2, node 2 of "):
        conv(torch.randn(4, 8), edges(4, 4, 3), torch.tensor([0, 2, 1, 2]))
    with pytest.raises(ValueError, match=r"batch must be \[N\] = \[4\], got \[3\]"):
        conv(torch.randn(4, 8), edges(4, 4, 3), torch.tensor([0, 1, 1]))


def test_gps_keeps_torch_geometric_s_code_for_other_attention():
    conv = ours.GPSConv(8, None, heads=2)
    conv.attn.register_forward_hook(lambda *_: None)
    with pytest.warns(UserWarning, match="attn has hooks"):
        conv(torch.randn(4, 8), edges(4, 4, 3))


def test_gps_takes_fastgt_s_modules():
    from fastgt.nn import LinearAttention

    conv = ours.GPSConv(8, None, heads=2)
    conv.attn = LinearAttention(8, 2)
    assert conv(torch.randn(4, 8), edges(4, 4, 3)).shape == (4, 8)
    assert ours.explain(conv) == {"": "fused"}


def test_every_layer_is_named():
    """What accelerate replaces is what the package offers."""
    offered = {getattr(ours, name) for name in ours.__all__}
    assert set(accelerating.LAYERS) == {x for x in offered if isinstance(x, type)} - {ours.Report}
