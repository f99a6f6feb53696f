"""SGFormer against its equations, written out densely, and against torch-geometric's."""

import copy
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from attention_cases import DEVICE, close
from literal_layers import rough_batch
from torch import nn
from torch.nn import functional as F

from fastgt import Graph
from fastgt.models import SGFormer, SGFormerConfig, sgformer_state_dict
from fastgt.models.sgformer import SGFormerLayer
from fastgt.testing import random_batch

FP64 = torch.float64
FEATURES, CLASSES, DIM = 6, 3, 5
SIZES = [(5, 12), (0, 0), (7, 20), (1, 1)]
SMALL = SGFormerConfig(
    FEATURES, CLASSES, dim=DIM, dropout=0.0, conv_dropout=0.0, graph_weight=0.7, alpha=0.3
)
KINDS = {
    "large": {},
    "several heads and layers": {"heads": 3, "layers": 2, "activation": True},
    "initial": {"convolution": "initial", "aggregate": "cat"},
    "plain": {"convolution": "plain", "conv_layers": 4},
    "without norms": {"norm": False, "convolution": "plain", "values": False, "heads": 2},
    "without residual": {"alpha": 1.0, "norm": False, "values": False},
    "one convolution": {"convolution": "plain", "conv_layers": 1, "qkv_bias": False},
}
pytestmark = pytest.mark.usefixtures("one_thread")


def batch():
    return rough_batch(SIZES)


class Parts(nn.Module):
    """What stands in lists under the names that the authors give them."""

    def __init__(self, **parts):
        super().__init__()
        for name, part in parts.items():
            setattr(self, name, nn.ModuleList(part) if isinstance(part, list) else part)


class Authors(nn.Module):
    """The paper's equations over matrices [N, N], with the parameters of the released code."""

    def __init__(self, c):
        super().__init__()
        self.c, wide = c, c.heads * c.dim
        self.trans_conv = Parts(
            fcs=[nn.Linear(c.node_features, c.dim)],
            bns=[nn.LayerNorm(c.dim) for _ in range(c.layers + 1)],
            convs=[
                Parts(
                    Wq=nn.Linear(c.dim, wide, c.qkv_bias),
                    Wk=nn.Linear(c.dim, wide, c.qkv_bias),
                    **({"Wv": nn.Linear(c.dim, wide, c.qkv_bias)} if c.values else {}),
                )
                for _ in range(c.layers)
            ],
        )
        if c.convolution == "plain":
            widths = [c.node_features, *[c.dim] * c.conv_layers]
            self.gnn = Parts(
                convs=[Parts(lin=nn.Linear(*pair, bias=False)) for pair in pairwise(widths)],
                bns=[nn.BatchNorm1d(c.dim) for _ in range(c.conv_layers - 1)],
            )
            for conv in self.gnn.convs:
                conv.bias = nn.Parameter(torch.zeros(c.dim))
        else:
            wide = c.dim * (2 if c.convolution == "initial" else 1)
            self.graph_conv = Parts(
                fcs=[nn.Linear(c.node_features, c.dim)],
                convs=[Parts(W=nn.Linear(wide, c.dim)) for _ in range(c.conv_layers)],
                bns=[nn.BatchNorm1d(c.dim) for _ in range(c.conv_layers + 1)],
            )
        self.fc = nn.Linear(c.dim * (2 if c.aggregate == "cat" else 1), c.out_dim)

    def normed(self, norm, x):
        if not self.c.norm:
            return x
        if isinstance(norm, nn.LayerNorm):
            mean, variance = x.mean(1, keepdim=True), x.var(1, unbiased=False, keepdim=True)
        elif norm.training:
            mean, variance = x.mean(0), x.var(0, unbiased=False)
        else:
            mean, variance = norm.running_mean, norm.running_var
        return (x - mean) / (variance + 1e-5).sqrt() * norm.weight + norm.bias

    def attention(self, conv, x, bounds):
        c, parts = self.c, [x[:0]]
        for first, last in pairwise(bounds):
            n, mine = last - first, x[first:last]
            if not n:
                continue
            q, k = (f(mine).view(n, c.heads, c.dim) for f in (conv.Wq, conv.Wk))
            v = conv.Wv(mine).view(n, c.heads, c.dim) if c.values else mine[:, None]
            if c.qk_norms == "graph":
                q, k = q / (q**2).sum().sqrt(), k / (k**2).sum().sqrt()
            else:
                q, k = (y / (y**2).sum(2, keepdim=True).sqrt() for y in (q, k))
            heads = []
            for h in range(c.heads):
                weights = q[:, h] @ k[:, h].T + n * torch.eye(n).to(x)
                value = v[:, h] if c.values else mine
                heads.append(weights @ value / weights.sum(1, keepdim=True))
            parts.append(torch.stack(heads).mean(0))
        return torch.cat(parts)

    def forward(self, x, source, target, bounds):
        c, n = self.c, len(x)

        def dropped(y, p):
            return F.dropout(y, p, self.training)

        z = self.trans_conv.fcs[0](x)
        z = dropped(self.normed(self.trans_conv.bns[0], z).clamp(min=0), c.dropout)
        for conv, norm in zip(self.trans_conv.convs, self.trans_conv.bns[1:], strict=True):
            z = c.alpha * self.attention(conv, z, bounds) + (1 - c.alpha) * z
            z = self.normed(norm, z)
            z = dropped(z.clamp(min=0) if c.activation else z, c.dropout)
        adjacency = torch.eye(n).to(x)
        for i, j in zip(target.tolist(), source.tolist(), strict=True):
            adjacency[i, j] += i != j
        degree = adjacency.sum(1) ** -0.5
        adjacency = degree[:, None] * adjacency * degree
        if c.convolution == "plain":
            g = x
            for i, conv in enumerate(self.gnn.convs):
                g = adjacency @ conv.lin(g) + conv.bias
                if i < c.conv_layers - 1:
                    g = dropped(self.normed(self.gnn.bns[i], g).clamp(min=0), c.conv_dropout)
        else:
            part = self.graph_conv
            g = dropped(self.normed(part.bns[0], part.fcs[0](x)).clamp(min=0), c.conv_dropout)
            first = g
            for conv, norm in zip(part.convs, part.bns[1:], strict=True):
                y = adjacency @ g
                y = conv.W(torch.cat([y, first], 1) if c.convolution == "initial" else y)
                g = dropped(self.normed(norm, y).clamp(min=0), c.conv_dropout) + first
        if c.aggregate == "cat":
            return self.fc(torch.cat([z, g], 1))
        return self.fc(c.graph_weight * g + (1 - c.graph_weight) * z)


def drawn(module):
    """With norms and biases other than 1 and 0."""
    for p in module.parameters():
        p.data += 0.3 * torch.randn_like(p)
    for name, b in module.named_buffers():
        if "running" in name:
            b.data = b.data + 0.3 * torch.rand_like(b)
    return module


def pair(**changes):
    """The equations and the model, of the same parameters."""
    torch.manual_seed(0)
    c = replace(SMALL, **changes)
    written, model = drawn(Authors(c)), SGFormer(c)
    model.load_state_dict(sgformer_state_dict(written.state_dict(), norm=c.norm))
    return written.to(DEVICE, FP64), model.to(DEVICE, FP64)


def compare(written, model, graph, seed=None):
    """Outputs and the gradients of the input and of every parameter."""
    x = torch.randn(graph.num_rows, FEATURES, device=DEVICE, dtype=FP64, requires_grad=True)
    upstream = torch.randn(graph.num_rows, CLASSES, device=DEVICE, dtype=FP64)
    found = []
    for module, call in (
        (written, lambda: written(x, *graph.edge_index, graph.graph_ptr.tolist())),
        (model, lambda: model(x, graph)),
    ):
        if seed is not None:
            torch.manual_seed(seed)
        module.zero_grad()
        out = call()
        x.grad = None
        (out * upstream).sum().backward()
        grads = {name: p.grad for name, p in module.named_parameters() if p.grad is not None}
        found.append((out, x.grad, grads))
    (out, dx, grads), (out2, dx2, grads2) = found
    close(out2, out, "out", 1e-11)
    close(dx2, dx, "dx", 1e-10)
    wanted = sgformer_state_dict(grads)
    assert grads2.keys() == wanted.keys() == dict(model.named_parameters()).keys()
    for name, gradient in grads2.items():
        close(gradient, wanted[name], name, 1e-10)


@pytest.mark.parametrize("qk_norms", ["graph", "node"])
@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_it_is_its_equations(kind, train, qk_norms):
    written, model = pair(qk_norms=qk_norms, **KINDS[kind])
    compare(written.train(train), model.train(train), batch())


@pytest.mark.parametrize("kind", ["large", "plain", "initial"])
def test_dropout_stands_where_the_authors_have_it(kind):
    written, model = pair(**KINDS[kind] | {"dropout": 0.3, "conv_dropout": 0.6})
    compare(written.train(), model.train(), batch(), seed=5)


@pytest.fixture
def wide():
    """Torch-geometric's attention makes ones of the default dtype."""
    torch.set_default_dtype(FP64)
    yield
    torch.set_default_dtype(torch.float32)


def test_it_is_torch_geometrics_on_one_graph(wide):
    theirs = pytest.importorskip("torch_geometric.nn.models").SGFormer
    for train in (False, True):
        torch.manual_seed(0)
        options = {"trans_num_heads": 2, "trans_dropout": 0.0, "gnn_dropout": 0.0}
        written = drawn(theirs(FEATURES, 8, CLASSES, graph_weight=0.3, **options))
        c = SGFormerConfig(
            FEATURES, CLASSES, dim=8, heads=2, layers=2, dropout=0.0, conv_dropout=0.0,
            graph_weight=0.3, qk_norms="node", qkv_bias=False, activation=True,
        )  # fmt: skip
        model = SGFormer(c)
        model.load_state_dict(sgformer_state_dict(written.state_dict()))
        counts = [sum(p.numel() for p in m.parameters()) for m in (written, model)]
        assert counts[0] == counts[1]
        written, model = written.train(train), model.train(train)
        graph = random_batch(4, [(9, 30)])
        x, upstream = torch.randn(9, FEATURES), torch.randn(9, CLASSES)
        out = written(x, graph.edge_index, torch.zeros(9, dtype=torch.long))
        found = model(x, graph).log_softmax(1)
        close(found, out, "out", 1e-11)
        for y in (out, found):
            (y * upstream).sum().backward()
        wanted = sgformer_state_dict({name: p.grad for name, p in written.named_parameters()})
        for name, p in model.named_parameters():
            close(p.grad, wanted[name], name, 1e-10)
        buffers = sgformer_state_dict(dict(written.named_buffers()))
        for name, b in model.named_buffers():
            close(b, buffers[name], name)


def test_a_batch_equals_its_graphs_one_by_one():
    for kind, options in KINDS.items():
        _, model = pair(**options)
        model, graph = model.eval(), batch()
        x = torch.randn(graph.num_rows, FEATURES, dtype=FP64, device=DEVICE)
        whole = model(x, graph)
        assert whole.isfinite().all()
        target = graph.edge_index[1]
        for first, last in pairwise(graph.graph_ptr.tolist()):
            mine = (target >= first) & (target < last)
            one = Graph.from_edge_index(graph.edge_index[:, mine] - first, last - first)
            close(model(x[first:last], one), whole[first:last], kind)


def test_what_is_in_one_graph_reaches_no_other():
    _, model = pair(norm=False)
    graph = batch()
    x = torch.randn(graph.num_rows, FEATURES, dtype=FP64, device=DEVICE)
    wanted = model(x, graph)
    x[5:12] = torch.nan
    found = model(x, graph)
    assert found[5:12].isnan().all()
    close(found[:5], wanted[:5])
    close(found[12:], wanted[12:])


@pytest.mark.parametrize("kind", KINDS)
def test_a_graph_is_learnt_by_heart(kind):
    torch.manual_seed(0)
    model = SGFormer(replace(SMALL, **KINDS[kind] | {"dim": 32, "graph_weight": 0.5})).to(DEVICE)
    graph = random_batch(5, [(8, 20), (6, 10)], device=DEVICE)
    x, wanted = torch.randn(14, FEATURES, device=DEVICE), torch.arange(14, device=DEVICE) % CLASSES
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(150):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x, graph), wanted)
        loss.backward()
        optimizer.step()
    assert (model(x, graph).argmax(1) == wanted).all()
    assert loss < 0.1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype):
    torch.manual_seed(0)
    graph = batch()
    x = torch.randn(graph.num_rows, FEATURES, device=DEVICE)
    for kind, options in KINDS.items():
        model = SGFormer(replace(SMALL, **options)).to(DEVICE)
        wanted = model(x, graph)
        with torch.autocast(DEVICE, dtype=dtype):
            found = model(x, graph)
        found.float().sum().backward()
        assert all(p.grad.isfinite().all() for p in model.parameters()), kind
        assert (found - wanted).abs().max() < 0.1 * wanted.abs().max(), kind


@pytest.mark.parametrize("kind", KINDS)
def test_the_model_compiles_whole(kind, compiled_kernels):
    torch._dynamo.reset()
    torch.manual_seed(0)
    model, graph = SGFormer(replace(SMALL, **KINDS[kind])).eval(), batch()
    x = torch.randn(graph.num_rows, FEATURES)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x, graph), model(x, graph))


def test_graphs_of_no_edges_one_node_or_none():
    empty = torch.zeros(2, 0, dtype=torch.long)
    for kind, options in KINDS.items():
        model = SGFormer(replace(SMALL, **options))
        model(torch.randn(4, FEATURES), Graph.from_edge_index(empty, 4)).sum().backward()
        assert all(p.grad.isfinite().all() for p in model.parameters()), kind
        one = Graph.from_edge_index(empty, 1)
        if any(isinstance(m, nn.BatchNorm1d) for m in model.modules()):
            before = copy.deepcopy(model.state_dict())
            message = (
                "after of GraphConvolutions is a batch norm in training and got 1 node: .*, or ta"
            )
            with pytest.raises(ValueError, match=message):
                model(torch.randn(1, FEATURES), one)
            assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())
        assert model.eval()(torch.randn(1, FEATURES), one).isfinite().all()
        none = Graph.from_edge_index(empty, 0)
        assert model(torch.zeros(0, FEATURES), none).shape == (0, CLASSES)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"graph": torch.zeros(2, 3, dtype=int)}, TypeError, "graph must be a fastgt.Graph, got"),
        ({"node": torch.zeros(12, 6)}, ValueError, r"node .* = \[13, 6\], got \[12, 6\]"),
        ({"node": torch.zeros(13, 5)}, ValueError, r"node .* = \[13, 6\], got \[13, 5\]"),
        ({"node": torch.zeros(13, 6, dtype=int)}, TypeError, "node must be float16, .*int64"),
        ({"node": [[0.0] * 6] * 13}, TypeError, "node must be a tensor, got list"),
        (
            {"graph": Graph.from_edge_index(torch.tensor([[0, 4], [1, 0]]), (4, 5))},
            ValueError,
            "graph must be square, got 4 rows and 5 columns",
        ),
    ],
)
def test_wrong_inputs_are_named(changes, error, message):
    given = {"node": torch.zeros(13, FEATURES), "graph": random_batch(3, SIZES)}
    with pytest.raises(error, match=message):
        SGFormer(SMALL)(**given | changes)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"dim": 0}, ValueError, "dim must be positive, got 0"),
        ({"dim": 257}, ValueError, "dim must be 256 at most, got 257"),
        ({"conv_layers": 0}, ValueError, "conv_layers must be positive, got 0"),
        ({"heads": 1.5}, TypeError, "heads must be an int, got float 1.5"),
        ({"dropout": 1.5}, ValueError, "dropout must be from 0 to 1, got 1.5"),
        ({"alpha": -0.5}, ValueError, "alpha must be from 0 to 1, got -0.5"),
        ({"graph_weight": "half"}, TypeError, "graph_weight must be a number, got str"),
        ({"qk_norms": "head"}, ValueError, r"qk_norms must be one of \['graph', 'node'\], got 'h"),
        ({"convolution": "gcn"}, ValueError, r"convolution must be one of \['plain', .* got 'gcn'"),
        ({"aggregate": "sum"}, ValueError, r"aggregate must be one of \['add', .* got 'sum'"),
    ],
)
def test_configurations_that_make_no_model(changes, error, message):
    with pytest.raises(error, match=message):
        replace(SMALL, **changes)


def count(name):
    with torch.device("meta"):
        model = SGFormer(SGFormerConfig.published(name))
    return sum(p.numel() for p in model.parameters())


def test_published_settings():
    # two branches from 1,433 features, q and k, three more convolutions, the readout
    assert count("cora") == 2 * (1434 * 64) + 2 * (65 * 64) + 3 * (65 * 64) + 65 * 7
    assert count("squirrel") == 2 * (2090 * 64) + 2 * (65 * 64) + 4 * (65 * 64) + 65 * 5
    # norms, values and residuals besides
    arxiv = 2 * (129 * 256) + 3 * (257 * 256) + 3 * (257 * 256) + 6 * 2 * 256 + 257 * 40
    assert count("ogbn_arxiv") == arxiv
    pokec = 2 * (66 * 64) + 3 * (65 * 64) + 2 * (129 * 64) + 5 * 2 * 64 + 65 * 2
    assert count("pokec") == pokec
    assert count("citeseer") == 2 * (3704 * 64) + 2 * (65 * 64) + 65 * 64 + 65 * 6
    found = SGFormerConfig.published("actor")
    assert (found.alpha, found.graph_weight, found.dropout, found.conv_layers) == (0.5, 0.5, 0.6, 2)
    found.layers = 5
    assert SGFormerConfig.published("actor").layers == 1
    with pytest.raises(ValueError, match=r"name must be one of \['cora', .* got 'film'"):
        SGFormerConfig.published("film")


def test_names_that_no_sgformer_has_are_given():
    with pytest.raises(ValueError, match=r"'trans_conv\.gate' is no parameter of an SGFormer"):
        sgformer_state_dict({"trans_conv.gate": torch.zeros(1)})


def test_a_layer_takes_one_graph_without_offsets():
    layer, x = SGFormerLayer(DIM, heads=2), torch.randn(6, DIM)
    assert torch.equal(layer(x), layer(x, torch.tensor([0, 6])))
    with pytest.raises(ValueError, match=r"x must be \[N, 5\], got \[6, 4\]"):
        layer(x[:, 1:])
    assert "heads=2, alpha=0.5, qk_norms='graph'" in repr(layer)
