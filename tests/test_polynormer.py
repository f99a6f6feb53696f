"""Polynormer against its equations, written out densely, and against torch-geometric's."""

import copy
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from attention_cases import DEVICE, close
from literal_layers import rough_batch
from torch import distributed, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from fastgt import Graph
from fastgt.models import Polynormer, PolynormerConfig, polynormer_state_dict
from fastgt.testing import random_batch

FP64 = torch.float64
FEATURES, CLASSES, HEADS, DIM = 6, 3, 2, 10
SIZES = [(5, 12), (0, 0), (7, 20), (1, 1)]
SMALL = PolynormerConfig(
    FEATURES, CLASSES, dim=DIM, heads=HEADS, layers=3, in_dropout=0.0, dropout=0.0,
    global_dropout=0.0,
)  # fmt: skip
LARGE = {"beta": 0.9, "learn_beta": False, "local_norm": True, "input_layer": False}
PYG = LARGE | {
    "shared_query": False,
    "qkv_bias": False,
    "shared_output": False,
    "eps": 1e-6,
}
KINDS = {
    "r": {},
    "without activations": {"activation": False},
    "learnt beta": {"beta": 0.4, "pre_norm": True},
    "convolutions": {"local": "gcn", "local_norm": True},
    "large": LARGE | {"local": "gcn", "pre_norm": True},
    "torch-geometric": PYG,
}
pytestmark = pytest.mark.usefixtures("one_thread")


def batch():
    return rough_batch(SIZES)


def relu(c, x):
    return x.clamp(min=0) if c.activation else x


def layer_norm(norm, x):
    mean, variance = x.mean(1, keepdim=True), x.var(1, unbiased=False, keepdim=True)
    return (x - mean) / (variance + 1e-5).sqrt() * norm.weight + norm.bias


def batch_norm(norm, x):
    mean, variance = norm.running_mean, norm.running_var
    if norm.training:
        mean, variance = x.mean(0), x.var(0, unbiased=False)
    return (x - mean) / (variance + 1e-5).sqrt() * norm.weight + norm.bias


class GAT(nn.Module):
    def __init__(self, in_dim):
        super().__init__()
        self.lin = nn.Linear(in_dim, DIM, bias=False)
        self.att_src = nn.Parameter(torch.randn(1, HEADS, DIM // HEADS))
        self.att_dst = nn.Parameter(torch.randn(1, HEADS, DIM // HEADS))

    def forward(self, x, source, target):
        v = self.lin(x).view(len(x), HEADS, -1)
        out = []
        for i in range(len(x)):
            near = source[target == i]
            if not len(near):
                out.append(torch.zeros(DIM).to(x))
                continue
            logit = (v[near] * self.att_src[0]).sum(2) + (v[i] * self.att_dst[0]).sum(1)
            weight = torch.where(logit > 0, logit, 0.2 * logit).exp()
            weight = weight / weight.sum(0)
            out.append((weight[..., None] * v[near]).sum(0).flatten())
        return torch.stack(out)


class GCN(nn.Module):
    def __init__(self, in_dim):
        super().__init__()
        self.lin = nn.Linear(in_dim, DIM, bias=False)
        self.bias = nn.Parameter(torch.randn(DIM))

    def forward(self, x, source, target):
        adjacency = torch.eye(len(x)).to(x)
        for i, j in zip(target.tolist(), source.tolist(), strict=True):
            adjacency[i, j] += i != j
        degree = adjacency.sum(1) ** -0.5
        return degree[:, None] * adjacency * degree @ self.lin(x) + self.bias


class GlobalAttention(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.c, layers = c, range(c.global_layers)
        if c.learn_beta:
            self.betas = nn.Parameter(torch.randn(c.global_layers, DIM))
        self.h_lins = nn.ModuleList(nn.Linear(DIM, DIM) for _ in layers)
        for name in "kv" if c.shared_query else "qkv":
            lins = nn.ModuleList(nn.Linear(DIM, DIM, c.qkv_bias) for _ in layers)
            setattr(self, f"{name}_lins", lins)
        self.lns = nn.ModuleList(nn.LayerNorm(DIM) for _ in layers)
        self.lin_out = nn.Linear(DIM, DIM)

    def forward(self, x, bounds, betas, p):
        c = self.c
        q_lins = self.k_lins if c.shared_query else self.q_lins
        for i, beta in enumerate(betas):
            rows = []
            for first, last in pairwise(bounds):
                mine = x[first:last]
                if first == last:
                    continue
                # heads are the last dimension of the released code
                q, k = (1 / (1 + torch.exp(-f[i](mine))) for f in (q_lins, self.k_lins))
                q, k, v = (y.view(len(mine), -1, HEADS) for y in (q, k, self.v_lins[i](mine)))
                parts = torch.zeros_like(v)
                for h in range(HEADS):
                    weight = q[..., h] @ k[..., h].T
                    total = weight.sum(1, keepdim=True) + c.eps
                    parts[..., h] = weight @ v[..., h] / total
                rows.append(parts.reshape(len(mine), -1))
            product = layer_norm(self.lns[i], torch.cat(rows)) * (self.h_lins[i](x) + beta)
            x = F.dropout(relu(c, self.lin_out(product)), p, self.training)
        return x


class Authors(nn.Module):
    """The equations node by node, with the parameters of the released code."""

    def __init__(self, c):
        super().__init__()
        self.c = c
        widths = [DIM if c.input_layer else FEATURES, *[DIM] * (c.layers - 1)]
        if c.learn_beta:
            self.betas = nn.Parameter(torch.randn(c.layers, DIM))
        if c.input_layer:
            self.lin_in = nn.Linear(FEATURES, DIM)
        self.h_lins = nn.ModuleList(nn.Linear(d, DIM) for d in widths)
        local = GAT if c.local == "gat" else GCN
        self.local_convs = nn.ModuleList(local(d) for d in widths)
        self.lins = nn.ModuleList(nn.Linear(d, DIM) for d in widths)
        self.lns = nn.ModuleList(nn.LayerNorm(DIM) for _ in widths)
        if c.pre_norm:
            self.pre_lns = nn.ModuleList(nn.LayerNorm(d) for d in widths)
        if c.local_norm:
            self.post_bns = nn.ModuleList(nn.BatchNorm1d(DIM) for _ in widths)
        self.ln = nn.LayerNorm(DIM)
        self.global_attn = GlobalAttention(c)
        self.pred_local, self.pred_global = nn.Linear(DIM, CLASSES), nn.Linear(DIM, CLASSES)

    def weights(self, owner, layers):
        if not self.c.learn_beta:
            return [self.c.beta] * layers
        return owner.betas.sigmoid() if self.c.beta is None else owner.betas

    def forward(self, x, source, target, bounds, stage):
        c = self.c
        x = F.dropout(x, c.in_dropout, self.training)
        if c.input_layer:
            x = F.dropout(self.lin_in(x), c.dropout, self.training)
        total = 0
        for i, beta in enumerate(self.weights(self, c.layers)):
            if c.pre_norm:
                x = layer_norm(self.pre_lns[i], x)
            h = relu(c, self.h_lins[i](x))
            m = self.local_convs[i](x, source, target) + self.lins[i](x)
            if c.local_norm:
                m = batch_norm(self.post_bns[i], m)
            m = F.dropout(relu(c, m), c.dropout, self.training)
            x = (1 - beta) * layer_norm(self.lns[i], h * m) + beta * m
            total = total + x
        if stage == "local":
            return self.pred_local(total)
        betas = self.weights(self.global_attn, c.global_layers)
        x = self.global_attn(layer_norm(self.ln, total), bounds, betas, c.global_dropout)
        return self.pred_global(x)


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
    c = replace(SMALL, **{"shared_output": True} | changes)
    written, model = drawn(Authors(c)), Polynormer(c)
    model.load_state_dict(polynormer_state_dict(written.state_dict(), c))
    return written.to(DEVICE, FP64), model.to(DEVICE, FP64)


def compare(written, model, graph, stage="global", seed=None):
    """Outputs and the gradients of the input and of every parameter."""
    x = torch.randn(graph.num_rows, FEATURES, device=DEVICE, dtype=FP64, requires_grad=True)
    upstream = torch.randn(graph.num_rows, CLASSES, device=DEVICE, dtype=FP64)
    model.set_stage(stage)
    found = []
    for module, call in (
        (written, lambda: written(x, *graph.edge_index, graph.graph_ptr.tolist(), stage)),
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
    close(dx2, dx, "dx", 1e-9)
    wanted = polynormer_state_dict(grads, model.config)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert grads2.keys() == wanted.keys() == trained
    for name, gradient in grads2.items():
        close(gradient, wanted[name], name, 1e-9)


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("stage", ["local", "global"])
@pytest.mark.parametrize("kind", KINDS)
def test_it_is_its_equations(kind, stage, train):
    written, model = pair(**KINDS[kind] | {"shared_output": True})
    compare(written.train(train), model.train(train), batch(), stage)


def test_dropout_stands_where_the_authors_have_it():
    written, model = pair(in_dropout=0.2, dropout=0.3, global_dropout=0.6)
    for stage in ("local", "global"):
        compare(written.train(), model.train(), batch(), stage, seed=5)


@pytest.fixture
def wide():
    torch.set_default_dtype(FP64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("local", ["gat", "gcn"])
@pytest.mark.parametrize(("train", "heads"), [(False, 1), (True, 1), (True, 2)])
def test_it_is_torch_geometrics_on_one_graph(local, train, heads, wide):
    """But for its global layers of several heads, which do not fit its own width."""
    theirs = pytest.importorskip("torch_geometric.nn.models").Polynormer
    torch.manual_seed(0)
    options = {"local_layers": 3, "in_dropout": 0.0, "dropout": 0.0, "global_dropout": 0.0}
    options |= {"heads": heads, "local_attn": local == "gat", "pre_ln": train}
    written = drawn(theirs(FEATURES, DIM // heads, CLASSES, **options))
    c = replace(SMALL, **PYG | {"heads": heads, "local": local, "pre_norm": train})
    model = Polynormer(c)
    state = polynormer_state_dict(written.state_dict(), c)
    if heads == 1:
        model.load_state_dict(state)
    else:
        fitting = {name: x for name, x in state.items() if not name.startswith("global_")}
        assert not model.load_state_dict(fitting, strict=False).unexpected_keys
    written, model = written.train(train), model.train(train)
    graph = random_batch(4, [(9, 30)])
    zeros = torch.zeros(9, dtype=torch.long)
    for stage in ("local", "global") if heads == 1 else ("local",):
        x, upstream = torch.randn(9, FEATURES), torch.randn(9, CLASSES)
        written._global = stage == "global"
        model.set_stage(stage)
        out = written(x, graph.edge_index, zeros)
        found = model(x, graph).log_softmax(1)
        close(found, out, "out", 1e-11)
        for module, y in ((written, out), (model, found)):
            module.zero_grad()
            (y * upstream).sum().backward()
        grads = {name: p.grad for name, p in written.named_parameters() if p.grad is not None}
        wanted = polynormer_state_dict(grads, c)
        assert wanted.keys() == {name for name, p in model.named_parameters() if p.requires_grad}
        for name, gradient in wanted.items():
            close(model.get_parameter(name).grad, gradient, name, 1e-9)


def test_a_batch_equals_its_graphs_one_by_one():
    for kind, options in KINDS.items():
        _, model = pair(**options | {"shared_output": True})
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
    _, model = pair()
    graph = batch()
    x = torch.randn(graph.num_rows, FEATURES, dtype=FP64, device=DEVICE)
    wanted = model(x, graph)
    x[5:12] = torch.nan
    found = model(x, graph)
    assert found[5:12].isnan().all()
    close(found[:5], wanted[:5])
    close(found[12:], wanted[12:])


@pytest.mark.parametrize("kind", ["r", "without activations", "torch-geometric"])
def test_a_graph_is_learnt_by_heart_in_two_stages(kind):
    torch.manual_seed(0)
    model = Polynormer(replace(SMALL, **KINDS[kind] | {"dim": 32})).to(DEVICE)
    graph = random_batch(5, [(8, 20), (6, 10)], device=DEVICE)
    x, wanted = torch.randn(14, FEATURES, device=DEVICE), torch.arange(14, device=DEVICE) % CLASSES
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    for stage in ("local", "global"):
        model.set_stage(stage)
        for _ in range(80):
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x, graph), wanted)
            loss.backward()
            optimizer.step()
        assert loss < 0.1, stage
        assert (model(x, graph).argmax(1) == wanted).all()


def test_a_stage_trains_what_it_uses():
    model, graph = Polynormer(SMALL), batch()
    x = torch.randn(graph.num_rows, FEATURES)
    only_global = ("norm.", "global_layers.", "global_out.", "readout.")
    for stage, unused in (("global", ("local_readout.",)), ("local", only_global)):
        if stage == "local":  # a new model is in the other one
            model.set_stage(stage)
        model.zero_grad()
        model(x, graph).sum().backward()
        for name, p in model.named_parameters():
            assert p.requires_grad == (p.grad is not None) == (not name.startswith(unused)), name
    with pytest.raises(ValueError, match=r"stage must be one of \['local', 'global'\], got 'all'"):
        model.set_stage("all")
    assert copy.deepcopy(model).stage == "local"


def test_both_stages_run_under_distributed_data_parallel(tmp_path):
    distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1
    )
    try:
        for options in KINDS.values():
            model, graph = Polynormer(replace(SMALL, **options)), batch()
            x = torch.randn(graph.num_rows, FEATURES)
            for stage in ("local", "global"):
                model.set_stage(stage)
                parallel = DistributedDataParallel(model)
                for _ in range(2):  # the second one misses what the first has left
                    parallel(x, graph).sum().backward()
    finally:
        distributed.destroy_process_group()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype):
    torch.manual_seed(0)
    graph = batch()
    x = torch.randn(graph.num_rows, FEATURES, device=DEVICE)
    for kind, options in KINDS.items():
        model = Polynormer(replace(SMALL, **options)).to(DEVICE)
        wanted = model(x, graph)
        with torch.autocast(DEVICE, dtype=dtype):
            found = model(x, graph)
        found.float().sum().backward()
        grads = [p.grad for p in model.parameters() if p.requires_grad]
        assert all(g.isfinite().all() for g in grads), kind
        assert (found - wanted).abs().max() < 0.1 * wanted.abs().max(), kind


@pytest.mark.parametrize("stage", ["local", "global"])
@pytest.mark.parametrize("kind", ["r", "torch-geometric"])
def test_the_model_compiles_whole(kind, stage, compiled_kernels):
    torch._dynamo.reset()
    torch.manual_seed(0)
    model, graph = Polynormer(replace(SMALL, **KINDS[kind])).eval(), batch()
    model.set_stage(stage)
    x = torch.randn(graph.num_rows, FEATURES)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x, graph), model(x, graph))


def test_graphs_of_no_edges_one_node_or_none():
    empty = torch.zeros(2, 0, dtype=torch.long)
    one = Graph.from_edge_index(empty, 1)
    for kind, options in KINDS.items():
        model = Polynormer(replace(SMALL, **options))
        model(torch.randn(4, FEATURES), Graph.from_edge_index(empty, 4)).sum().backward()
        grads = [p.grad for p in model.parameters() if p.requires_grad]
        assert all(g.isfinite().all() for g in grads), kind
        if model.config.local_norm:
            before = copy.deepcopy(model.state_dict())
            message = "after of PolynormerLocalLayer is a batch norm in training and got 1 node"
            with pytest.raises(ValueError, match=message + ".*, or take local_norm=False"):
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
        Polynormer(SMALL)(**given | changes)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"layers": 0}, ValueError, "layers must be positive, got 0"),
        ({"global_layers": 1.5}, TypeError, "global_layers must be an int, got float 1.5"),
        ({"heads": 3}, ValueError, "heads must divide dim, got dim=10 and heads=3"),
        ({"dim": 514}, ValueError, r"dim / heads must be 256 at most, got 514 / 2 = 257"),
        ({"in_dropout": -0.1}, ValueError, "in_dropout must be from 0 to 1, got -0.1"),
        ({"learn_beta": False}, ValueError, "beta must be a number with learn_beta=False, got N"),
        ({"beta": "half"}, TypeError, "beta must be a number, got str"),
        ({"local": "gin"}, ValueError, r"local must be one of \['gat', 'gcn'\], got 'gin'"),
    ],
)
def test_configurations_that_make_no_model(changes, error, message):
    with pytest.raises(error, match=message):
        replace(SMALL, **changes)


def count(name):
    with torch.device("meta"):
        model = Polynormer(PolynormerConfig.published(name))
    return sum(p.numel() for p in model.parameters())


def authors_count(features, classes, width, layers, global_layers, pre_norm=False):
    """Of their code: a local layer has three matrices, GAT's two vectors, a norm and a beta."""
    w = width
    local = layers * (2 * (w * w + w) + w * w + 2 * w + 2 * w + w + 2 * w * pre_norm)
    whole = global_layers * (3 * (w * w + w) + 2 * w + w) + w * w + w
    return (features + 1) * w + local + 2 * w + whole + 2 * (w + 1) * classes


def test_published_settings():
    assert count("minesweeper") == authors_count(7, 2, 512, 10, 3)
    assert count("tolokers") == authors_count(10, 2, 960, 7, 4)
    assert count("questions") == authors_count(301, 2, 512, 5, 3, pre_norm=True)
    assert count("coauthor_physics") == authors_count(8415, 5, 256, 5, 4)
    found = PolynormerConfig.published("amazon_ratings")
    assert (found.dim, found.heads, found.dropout, found.in_dropout) == (512, 2, 0.3, 0.2)
    for name, beta in (("roman_empire", 0.5), ("tolokers", 0.1), ("minesweeper", None)):
        assert PolynormerConfig.published(name).beta == beta
    found.layers = 1
    assert PolynormerConfig.published("amazon_ratings").layers == 10
    with pytest.raises(ValueError, match=r"name must be one of \['roman_empire', .* got 'wikics'"):
        PolynormerConfig.published("wikics")


def test_names_that_no_polynormer_has_are_given():
    with pytest.raises(ValueError, match=r"'gate\.weight' is no parameter of a Polynormer"):
        polynormer_state_dict({"gate.weight": torch.zeros(1)}, SMALL)
