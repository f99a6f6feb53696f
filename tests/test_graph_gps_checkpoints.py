"""Checkpoints of the authors' GraphGPS, and of torch-geometric's GPSConv, give the same here."""

import pytest
import torch
from torch import nn
from torch.nn.functional import normalize, relu

from fastgt import Graph
from fastgt.models import (
    GraphGPS,
    GraphGPSConfig,
    gps_conv_state_dict,
    graph_gps_state_dict,
)
from fastgt.models.graph_gps_layer import GraphGPSLayer
from fastgt.testing import random_edge_index

DIM, HEADS, N, E = 16, 4, 12, 40
FP64 = torch.float64


def summed(messages, target):
    return torch.zeros(N, *messages.shape[1:]).to(messages).index_add(0, target, messages)


class Concat(nn.Module):
    """Under the authors' names, as all modules here."""

    def __init__(self, encoders):
        super().__init__()
        for i, encoder in enumerate(encoders, 1):
            setattr(self, f"encoder{i}", encoder)

    def forward(self, given):
        return torch.cat([encoder(given) for encoder in self.children()], 1)


class TypeDict(nn.Module):
    def __init__(self, kinds, dim, key):
        super().__init__()
        self.key, self.encoder = key, nn.Embedding(kinds, dim)

    def forward(self, given):
        return self.encoder(given[self.key])


class Linear(nn.Module):
    def __init__(self, features, dim, key):
        super().__init__()
        self.key, self.encoder = key, nn.Linear(features, dim)

    def forward(self, given):
        return self.encoder(given[self.key])


class Atoms(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.atom_embedding_list = nn.ModuleList(nn.Embedding(k, dim) for k in (5, 3))

    def forward(self, given):
        return sum(f(x) for f, x in zip(self.atom_embedding_list, given["node"].T, strict=True))


class Bonds(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.bond_embedding_list = nn.ModuleList(nn.Embedding(k, dim) for k in (4, 2))

    def forward(self, given):
        return sum(f(x) for f, x in zip(self.bond_embedding_list, given["edge"].T, strict=True))


class DummyEdge(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.encoder = nn.Embedding(1, dim)

    def forward(self, given):
        return self.encoder(torch.zeros(E, dtype=torch.long))


class RWSE(nn.Module):
    def __init__(self, steps, dim):
        super().__init__()
        self.raw_norm = nn.BatchNorm1d(steps)
        self.pe_encoder = nn.Linear(steps, dim)

    def forward(self, given):
        return self.pe_encoder(self.raw_norm(given["walk_pe"]))


class LapPE(nn.Module):
    def __init__(self, dim, layers, features=0, out=0):
        super().__init__()
        if features:
            self.linear_x = nn.Linear(features, out)
        self.linear_A = nn.Linear(2, 2 * dim if layers > 1 else dim)
        parts = [nn.ReLU()]
        for i in range(1, layers):
            parts += [nn.Linear(2 * dim, dim if i == layers - 1 else 2 * dim), nn.ReLU()]
        self.pe_encoder = nn.Sequential(*parts)

    def forward(self, given):
        vectors, values = given["lap_vectors"], given["lap_values"].expand(N, -1)
        pairs = torch.stack([vectors, values], 2)
        absent = pairs.isnan()
        pairs[absent] = 0
        y = self.pe_encoder(self.linear_A(pairs))
        y = y.clone().masked_fill_(absent[:, :, 0].unsqueeze(2), 0.0).sum(1)
        return torch.cat([self.linear_x(given["node"]), y], 1) if hasattr(self, "linear_x") else y


class TransformerLapPE(nn.Module):
    def __init__(self, dim, layers, heads):
        super().__init__()
        self.linear_A = nn.Linear(2, dim)
        layer = nn.TransformerEncoderLayer(d_model=dim, nhead=heads, batch_first=True)
        self.pe_encoder = nn.TransformerEncoder(layer, num_layers=layers)

    def forward(self, given):
        vectors, values = given["lap_vectors"], given["lap_values"].expand(N, -1)
        pairs = torch.stack([vectors, values], 2)
        absent = pairs.isnan()
        pairs[absent] = 0
        y = self.pe_encoder(self.linear_A(pairs), src_key_padding_mask=absent[:, :, 0])
        return y.clone().masked_fill_(absent[:, :, 0].unsqueeze(2), 0.0).sum(1)


class MLP(nn.Module):
    def __init__(self, width, hidden, out, layers):
        super().__init__()
        widths = [width, *[hidden] * (layers - 1), out]
        self.lins = nn.ModuleList(nn.Linear(*widths[i : i + 2]) for i in range(layers))
        self.bns = nn.ModuleList(nn.BatchNorm1d(hidden) for _ in range(layers - 1))

    def forward(self, x):
        for lin, bn in zip(self.lins[:-1], self.bns, strict=True):
            x = relu(lin(x))
            x = bn(x) if x.ndim == 2 else bn(x.transpose(2, 1)).transpose(2, 1)
        return self.lins[-1](x)


class GINConv(nn.Module):
    def __init__(self, *widths):
        super().__init__()
        self.nn = MLP(*widths, 2)
        self.register_buffer("eps", torch.zeros(1))


class GIN(nn.Module):
    def __init__(self, hidden, out, layers):
        super().__init__()
        widths = [1, *[hidden] * (layers - 1), out]
        convs = [GINConv(widths[i], hidden, widths[i + 1]) for i in range(layers)]
        self.layers = nn.ModuleList(convs)
        self.bns = nn.ModuleList(nn.BatchNorm1d(hidden) for _ in range(layers - 1))

    def forward(self, x, index):
        source, target = index
        for i, layer in enumerate(self.layers):  # [K, N, channels]
            if i:
                x = self.bns[i - 1](x.transpose(2, 1)).transpose(2, 1)
            received = torch.zeros_like(x).index_add(1, target, x[:, source])
            x = layer.nn((1 + layer.eps) * x + received)
        return x


class SignNet(nn.Module):
    def __init__(self, count, dim, hidden, out, rho_layers, deepset):
        super().__init__()
        self.deepset, net = deepset, nn.Module()
        net.enc = GIN(hidden, out, 3)
        net.rho = MLP(out if deepset else count * out, hidden, dim, rho_layers)
        self.sign_inv_net = net

    def forward(self, given):
        net, x = self.sign_inv_net, given["lap_vectors"].T.unsqueeze(2)
        x = (net.enc(x, given["index"]) + net.enc(-x, given["index"])).transpose(0, 1)
        return net.rho(x.sum(1) if self.deepset else x.reshape(N, -1))


class StableLapPE(nn.Module):
    def __init__(self, count):
        super().__init__()
        self.linear_encoder_eigenvec = nn.Linear(count, DIM)

    def forward(self, given):
        given["stable"] = self.linear_encoder_eigenvec(given["lap_vectors"])
        return torch.zeros(N, 0, dtype=FP64)


class GatedGCN(nn.Module):
    def __init__(self, stable):
        super().__init__()
        self.A, self.B, self.C, self.D, self.E = (nn.Linear(DIM, DIM) for _ in range(5))
        self.bn_node_x, self.bn_edge_e = nn.BatchNorm1d(DIM), nn.BatchNorm1d(DIM)
        if stable:
            self.mlp_r_ij = factor()

    def forward(self, x, e, index, pe):
        source, target = index
        e_ij = self.D(x)[target] + self.E(x)[source] + self.C(e)
        sigma = e_ij.sigmoid()
        if pe is not None:
            sigma = sigma * self.mlp_r_ij(((pe[target] - pe[source]) ** 2).sum(-1, keepdim=True))
        mean = summed(sigma * self.B(x)[source], target) / (summed(sigma, target) + 1e-6)
        return x + relu(self.bn_node_x(self.A(x) + mean)), e + relu(self.bn_edge_e(e_ij))


class GINE(nn.Module):
    def __init__(self, stable):
        super().__init__()
        self.nn = nn.Sequential(nn.Linear(DIM, DIM), nn.ReLU(), nn.Linear(DIM, DIM))
        self.register_buffer("eps", torch.zeros(1))
        if stable:
            self.mlp_r_ij = factor()

    def forward(self, x, e, index, pe):
        source, target = index
        messages = relu(x[source] + e)
        if pe is not None:
            r = self.mlp_r_ij(((pe[target] - pe[source]) ** 2).sum(-1, keepdim=True))
            messages = messages * r
        return x + self.nn(summed(messages, target) + (1 + self.eps) * x), e


class GCN(nn.Module):
    def __init__(self, stable):
        super().__init__()
        self.lin, self.bias = nn.Linear(DIM, DIM, bias=False), nn.Parameter(torch.ones(DIM))

    def forward(self, x, e, index, pe):
        loops = torch.arange(N)
        source, target = torch.cat([index[:, index[0] != index[1]], loops.expand(2, -1)], 1)
        norm = summed(torch.ones(len(target), dtype=FP64), target) ** -0.5
        messages = (norm[source] * norm[target])[:, None] * self.lin(x)[source]
        return x + summed(messages, target) + self.bias, e


def factor():
    return nn.Sequential(nn.Linear(1, DIM), nn.ReLU(), nn.Linear(DIM, 1), nn.Sigmoid())


class FastAttention(nn.Module):
    def __init__(self, width, features):
        super().__init__()
        self.register_buffer("projection_matrix", torch.randn(features, width))

    def kernel(self, x, over):
        width, features = self.projection_matrix.shape[1], len(self.projection_matrix)
        product = torch.einsum("hid,jd->hij", width**-0.25 * x, self.projection_matrix)
        diagonal = (x**2).sum(-1, keepdim=True) / 2 * width**-0.5
        top = product.amax(over, keepdim=True)
        return features**-0.5 * ((product - diagonal - top).exp() + 1e-4)

    def forward(self, q, k, v):
        q, k = self.kernel(q, -1), self.kernel(k, (-1, -2))
        inverse = 1 / torch.einsum("hnd,hd->hn", q, k.sum(-2))
        return torch.einsum("hde,hnd,hn->hne", torch.einsum("hnd,hne->hde", k, v), q, inverse)


class Performer(nn.Module):
    def __init__(self):
        super().__init__()
        self.fast_attention = FastAttention(64, 266)
        self.to_q, self.to_k, self.to_v = (nn.Linear(DIM, 64 * HEADS, bias=False) for _ in range(3))
        self.to_out = nn.Linear(64 * HEADS, DIM)

    def forward(self, x):
        heads = (f(x).view(N, HEADS, 64).transpose(0, 1) for f in (self.to_q, self.to_k, self.to_v))
        return self.to_out(self.fast_attention(*heads).transpose(0, 1).reshape(N, -1))


class Layer(nn.Module):
    def __init__(self, local, attention, stable):
        super().__init__()
        kinds = {"gatedgcn": GatedGCN, "gine": GINE, "gcn": GCN}
        self.local_model = kinds[local](stable) if local != "none" else None
        self.self_attn = None
        if attention == "performer":
            self.self_attn = Performer()
        elif attention == "softmax":
            self.self_attn = nn.MultiheadAttention(DIM, HEADS, batch_first=True)
        self.norm1_local, self.norm1_attn = nn.BatchNorm1d(DIM), nn.BatchNorm1d(DIM)
        self.ff_linear1, self.ff_linear2 = nn.Linear(DIM, 2 * DIM), nn.Linear(2 * DIM, DIM)
        self.norm2 = nn.BatchNorm1d(DIM)

    def forward(self, x, e, index, pe):
        h = 0
        if self.local_model is not None:
            local, e = self.local_model(x, e, index, pe)
            h = h + self.norm1_local(local)
        if isinstance(self.self_attn, Performer):
            h = h + self.norm1_attn(x + self.self_attn(x))
        elif self.self_attn is not None:
            attended = self.self_attn(x[None], x[None], x[None], need_weights=False)[0][0]
            h = h + self.norm1_attn(x + attended)
        return self.norm2(h + self.ff_linear2(relu(self.ff_linear1(h)))), e


class SANGraph(nn.Module):
    def __init__(self, out):
        super().__init__()
        self.FC_layers = nn.ModuleList(
            [nn.Linear(DIM, DIM // 2), nn.Linear(DIM // 2, DIM // 4), nn.Linear(DIM // 4, out)]
        )

    def forward(self, x):
        y = x.sum(0, keepdim=True)
        for layer in self.FC_layers[:-1]:
            y = relu(layer(y))
        return self.FC_layers[-1](y)


class Wrapped(nn.Module):
    """One linear layer as GraphGym wraps it."""

    def __init__(self, name, layer):
        super().__init__()
        setattr(self, name, layer)


class GraphGymHead(nn.Module):
    """GraphGym's MLP: every hidden layer gives rows of length 1."""

    def __init__(self, out, layers, pool):
        super().__init__()
        self.pool, self.layer_post_mp = pool, nn.Module()
        last = Wrapped("model", nn.Linear(DIM, out))
        self.layer_post_mp.model = (
            nn.Sequential(nn.Module(), last) if layers > 1 else nn.Sequential(last)
        )
        for i in range(layers - 1):
            one = Wrapped("layer", Wrapped("model", nn.Linear(DIM, DIM)))
            self.layer_post_mp.model[0].add_module(f"Layer_{i}", one)

    def forward(self, x):
        x = x.mean(0, keepdim=True) if self.pool else x
        if len(self.layer_post_mp.model) > 1:
            for part in self.layer_post_mp.model[0].children():
                x = normalize(relu(part.layer.model(x)), p=2, dim=1)
        return self.layer_post_mp.model[-1].model(x)


class Net(nn.Module):
    def __init__(self, node_encoder, edge_encoder, local, attention, head, stable=False):
        super().__init__()
        self.encoder = nn.Module()
        self.encoder.node_encoder, self.encoder.edge_encoder = node_encoder, edge_encoder
        self.layers = nn.Sequential(*(Layer(local, attention, stable) for _ in range(2)))
        self.post_mp = head

    def forward(self, given, index):
        given = {**given, "index": index}
        x, e = self.encoder.node_encoder(given), self.encoder.edge_encoder(given)
        for layer in self.layers:
            x, e = layer(x, e, index, given.get("stable"))
        return self.post_mp(x)


WALK = {"walk_steps": 5, "walk_dim": 4}
NO_WALK = {"walk_steps": 0, "walk_dim": 0}
LAP = {"lap_pe": 3, "lap_dim": 6}
# name -> the authors' model, and the settings of the same one here
NETS = (
    {
        "zinc": (
            lambda: Net(
                Concat([TypeDict(28, DIM - 4, "node"), RWSE(5, 4)]),
                TypeDict(4, DIM, "edge"),
                "gine",
                "softmax",
                SANGraph(1),
            ),
            WALK,
        ),
        "pattern": (
            lambda: Net(
                LapPE(6, 2, 7, DIM - 6),
                DummyEdge(DIM),
                "gatedgcn",
                "softmax",
                GraphGymHead(2, 3, False),
            ),
            NO_WALK
            | LAP
            | {"node_types": (), "node_features": 7, "edge_types": (), "local": "gatedgcn"}
            | {"head": "inductive_node", "out_dim": 2},
        ),
        "malnet": (
            lambda: Net(
                LapPE(6, 3, 7, DIM - 6),
                Linear(2, DIM, "edge"),
                "gatedgcn",
                "performer",
                GraphGymHead(3, 2, True),
            ),
            NO_WALK
            | LAP
            | {"node_types": (), "node_features": 7, "edge_types": (), "edge_features": 2}
            | {"local": "gatedgcn", "attention": "performer", "lap_layers": 3, "out_dim": 3}
            | {"head": "default", "head_layers": 2, "pooling": "mean"},
        ),
        "molecules": (
            lambda: Net(
                Concat([Atoms(DIM - 10), LapPE(6, 1), RWSE(5, 4)]),
                Bonds(DIM),
                "gatedgcn",
                "softmax",
                GraphGymHead(1, 1, True),
            ),
            WALK
            | LAP
            | {"node_types": (5, 3), "edge_types": (4, 2), "local": "gatedgcn", "lap_layers": 1}
            | {"head": "default", "head_layers": 1, "pooling": "mean"},
        ),
    }
    | {
        "transformer": (
            lambda: Net(
                Concat([TypeDict(28, DIM - 8, "node"), TransformerLapPE(8, 2, 2)]),
                TypeDict(4, DIM, "edge"),
                "gine",
                "softmax",
                SANGraph(1),
            ),
            NO_WALK | {"lap_pe": 3, "lap_dim": 8, "lap_layers": 2, "lap_heads": 2},
        )
    }
    | {
        f"signs {kind}": (
            lambda deepset=kind == "deepset", rho=rho: Net(
                Concat(
                    [TypeDict(28, DIM - 9, "node"), SignNet(3, 5, 7, 2, rho, deepset), RWSE(5, 4)]
                ),
                TypeDict(4, DIM, "edge"),
                "gine",
                "softmax",
                SANGraph(1),
            ),
            WALK
            | {"sign_pe": 3, "sign_dim": 5, "sign_net": kind, "sign_layers": 3}
            | {"sign_hidden": 7, "sign_out": 2, "sign_rho_layers": rho},
        )
        for kind, rho in (("mlp", 2), ("deepset", 3))
    }
    | {
        f"stable {local}": (
            lambda local=local: Net(
                Concat([Linear(7, DIM, "node"), StableLapPE(3)]),
                TypeDict(4, DIM, "edge"),
                local,
                "softmax",
                SANGraph(1),
                stable=True,
            ),
            NO_WALK | {"node_types": (), "node_features": 7, "stable_pe": 3, "local": local},
        )
        for local in ("gine", "gatedgcn")
    }
    | {
        f"{local} and {attention}": (
            lambda local=local, attention=attention: Net(
                Linear(7, DIM, "node"), DummyEdge(DIM), local, attention, SANGraph(1)
            ),
            NO_WALK
            | {"node_types": (), "node_features": 7, "edge_types": ()}
            | {"local": local, "attention": attention},
        )
        for local, attention in (("gcn", "softmax"), ("none", "softmax"), ("gatedgcn", "none"))
    }
)


def perturbed(module):
    for m in module.modules():
        if isinstance(m, nn.BatchNorm1d):
            m.running_mean.normal_()
            m.running_var.uniform_(0.5, 2)
            nn.init.normal_(m.weight)
            nn.init.normal_(m.bias)
    return module.double().eval()


def draw(config):
    def part(types, features, size):
        if types:
            columns = torch.stack([torch.randint(k, (size,)) for k in types], 1)
            return columns[:, 0] if len(types) == 1 else columns
        return torch.randn(size, features, dtype=FP64) if features else None

    given = {
        "node": part(config.node_types, config.node_features, N),
        "edge": part(config.edge_types, config.edge_features, E),
    }
    if config.walk_steps:
        given["walk_pe"] = torch.rand(N, config.walk_steps, dtype=FP64)
    if config.lap_pe or config.sign_pe or config.stable_pe:
        given["lap_vectors"] = torch.randn(N, 3, dtype=FP64)
    if config.lap_pe:
        given["lap_vectors"][:, 2] = torch.nan
        given["lap_values"] = torch.rand(1, 3, dtype=FP64)
    return given


@pytest.mark.parametrize("prefix", ["", "model."])
@pytest.mark.parametrize("name", NETS)
def test_graph_gps(name, prefix):
    torch.manual_seed(0)
    make, settings = NETS[name]
    theirs = perturbed(make())
    config = GraphGPSConfig(**{"dim": DIM, "heads": HEADS, "layers": 2} | settings)
    ours = GraphGPS(config).double().eval()
    state = {prefix + key: x for key, x in theirs.state_dict().items()}
    ours.load_state_dict(graph_gps_state_dict(state))
    index = random_edge_index(0, N, E)
    given = draw(config)
    found = ours(graph=Graph.from_edge_index(index, N), **given)
    torch.testing.assert_close(found, theirs(given, index))


def test_the_head_is_graphgyms(monkeypatch):
    """What the transcription above takes for GraphGym's MLP."""
    layer = pytest.importorskip("torch_geometric.graphgym.models.layer")
    # without yacs it knows no activation
    monkeypatch.setitem(layer.register.act_dict, "relu", nn.ReLU)
    torch.manual_seed(0)
    settings = layer.LayerConfig(dim_in=DIM, dim_out=3, num_layers=3, has_act=False)
    theirs, ours = layer.MLP(settings), GraphGymHead(3, 3, False)
    ours.layer_post_mp.load_state_dict(theirs.state_dict())
    x = torch.randn(5, DIM)
    torch.testing.assert_close(ours(x), theirs(x))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("encoder.node_encoder_bn.bn.weight", 0.0),
        ("encoder.node_encoder.encoder2.pe_encoder.0.weight", 0.0),
        ("layers.0.local_model.aggr_module.p", 0.0),
        ("layers.0.self_attn.attention.weight", 0.0),
        ("layers.0.local_model.eps", 0.5),
    ],
)
def test_other_names_are_refused(name, value):
    message = rf"'{name}' (is no parameter of a GraphGPS model|must be 0, got \[0\.5\])"
    with pytest.raises(ValueError, match=message):
        graph_gps_state_dict({name: torch.full((1,), value)})


def network():
    return nn.Sequential(nn.Linear(DIM, DIM), nn.ReLU(), nn.Linear(DIM, DIM))


CONVS = {
    "none": lambda pyg: None,
    "gcn": lambda pyg: pyg.GCNConv(DIM, DIM),
    "gin": lambda pyg: pyg.GINConv(network()),
    "gine": lambda pyg: pyg.GINEConv(network()),
    "genconv": lambda pyg: pyg.GENConv(DIM, DIM),
    "pna": lambda pyg: pyg.PNAConv(
        DIM, DIM, ["mean", "max", "sum"], ["identity"], torch.tensor([1, 3, 5]), edge_dim=DIM
    ),
    "gat": lambda pyg: pyg.GATConv(DIM, DIM // HEADS, heads=HEADS, edge_dim=DIM),
}


def test_a_learnt_temperature_and_edges_come_with_genconv():
    pyg = pytest.importorskip("torch_geometric.nn")
    conv = pyg.GENConv(DIM, DIM, learn_t=True, t=0.5)
    state = {f"layers.0.local_model.{name}": x for name, x in conv.state_dict().items()}
    found = graph_gps_state_dict(state | {"encoder.edge_encoder.encoder.weight": torch.ones(4, 2)})
    assert found.pop("embed_edge.embed.0.weight").shape == (4, 2)
    layer = GraphGPSLayer(DIM, HEADS, local="genconv", attention="none", learn_temperature=True)
    layer.local.load_state_dict({k.removeprefix("layers.0.local."): x for k, x in found.items()})
    assert layer.local.temperature.tolist() == [0.5]


@pytest.mark.parametrize("norm", ["batch", "graph"])
@pytest.mark.parametrize("local", CONVS)
def test_gps_conv(local, norm):
    pyg = pytest.importorskip("torch_geometric.nn")
    torch.manual_seed(0)
    kind = {"batch": "batch_norm", "graph": "layer_norm"}[norm]
    theirs = perturbed(pyg.GPSConv(DIM, CONVS[local](pyg), heads=HEADS, norm=kind))
    for name, x in theirs.named_parameters():
        if x.ndim == 1:
            nn.init.normal_(theirs.get_parameter(name))
    ours = GraphGPSLayer(DIM, HEADS, local=local, norm=norm).double().eval()
    ours.load_state_dict(gps_conv_state_dict(theirs.state_dict()))
    index = torch.cat([random_edge_index(0, N, E - 2), torch.tensor([[0, 3], [0, 3]])], 1)
    index[1, index[1] == 5] = 6  # a node that receives nothing
    x, e = torch.randn(N, DIM, dtype=FP64), torch.randn(E, DIM, dtype=FP64)
    with_edges = local in ("gine", "genconv", "gat", "pna")
    found, _ = ours(x, e if with_edges else None, Graph.from_edge_index(index, N))
    # with a batch vector, as in training: without one, its norm adds eps to the deviation
    wanted = theirs(x, index, torch.zeros(N).long(), **{"edge_attr": e} if with_edges else {})
    torch.testing.assert_close(found, wanted)


def test_other_gps_convs_are_refused():
    pyg = pytest.importorskip("torch_geometric.nn")
    for theirs in (
        pyg.GPSConv(DIM, None, heads=HEADS, attn_type="performer"),
        pyg.GPSConv(DIM, pyg.ResGatedGraphConv(DIM, DIM), heads=HEADS),
        pyg.GPSConv(DIM, pyg.GINEConv(network(), train_eps=True, eps=0.5), heads=HEADS),
    ):
        with pytest.raises(ValueError, match=r"is no parameter of a|must be 0, got"):
            gps_conv_state_dict(theirs.state_dict())
    with pytest.raises(ValueError, match=r"'lin\.weight' is no parameter of a GPSConv"):
        gps_conv_state_dict({"lin.weight": torch.zeros(1)})
