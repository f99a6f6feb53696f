"""LargeGT against its equations, written out node by node, with the parameters of the authors."""

import copy
import io
import math
import warnings
from dataclasses import replace

import pytest
import torch
from torch import distributed, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from fastgt.models import LargeGT, LargeGTConfig
from fastgt.models.large_gt_codebook import Codebook

FP64 = torch.float64
NODES, B, K, FEATURES, CLASSES, DIM, HEADS, G, M = 20, 7, 3, 5, 4, 6, 2, 3, 6
SMALL = LargeGTConfig(
    FEATURES, CLASSES, NODES, dim=DIM, heads=HEADS, samples=K, position_dim=G, centroids=M,
    dropout=0.0, local_dropout=0.0,
)  # fmt: skip
PARTS = ["full", "local", "global"]
pytestmark = pytest.mark.usefixtures("one_thread")


def linear(layer, x):
    return x @ layer.weight.T + layer.bias


def layer_norm(norm, x):
    mean, variance = x.mean(-1, keepdim=True), x.var(-1, unbiased=False, keepdim=True)
    return (x - mean) / (variance + 1e-5).sqrt() * norm.weight + norm.bias


def batch_norm(norm, x):
    mean, variance = norm.running_mean, norm.running_var
    if norm.training:
        mean, variance = x.mean(0), x.var(0, unbiased=False)
        for running, new in ((norm.running_mean, mean), (norm.running_var, x.var(0))):
            running.copy_(0.9 * running + 0.1 * new.detach())
    x = (x - mean) / (variance + 1e-5).sqrt()
    return x * norm.weight + norm.bias if norm.affine else x


class Local(nn.Module):
    """The authors' local_module.py."""

    def __init__(self, c):
        super().__init__()
        h, width = c.dim, c.dim * c.heads
        self.c = c
        self.att_embeddings_nope = nn.Linear(h, h)
        self.self_attention_norm = nn.LayerNorm(h)
        self.linear_q, self.linear_k, self.linear_v = (nn.Linear(h, width) for _ in range(3))
        self.output_layer = nn.Linear(width, width)
        self.res_proj = nn.Linear(h, width)
        self.final_ln = nn.LayerNorm(width)
        self.out_proj = nn.Linear(2 * h, h)  # unused
        self.attn_layer = nn.Linear(2 * width, 1)

    def forward(self, tokens):
        c = self.c
        x = linear(self.att_embeddings_nope, tokens)
        y = layer_norm(self.self_attention_norm, x)
        attended = []
        for each in y:  # [T, h]
            heads = []
            for i in range(c.heads):
                mine = slice(i * c.dim, (i + 1) * c.dim)
                q, k, v = (
                    linear(f, each)[:, mine] for f in (self.linear_q, self.linear_k, self.linear_v)
                )
                weight = (q * c.dim**-0.5 @ k.T).exp()
                heads.append(weight / weight.sum(1, keepdim=True) @ v)
            attended.append(torch.cat(heads, 1))
        p = c.local_dropout
        y = F.dropout(linear(self.output_layer, torch.stack(attended)), p, self.training)
        y = F.dropout(linear(self.res_proj, x) + y, p, self.training)
        out = []
        for each in layer_norm(self.final_ln, y):
            score = [linear(self.attn_layer, torch.cat([each[0], other]))[0] for other in each[1:]]
            weight = torch.stack(score).exp()
            weight = weight / weight.sum()
            out.append(each[0] + sum(w * other for w, other in zip(weight, each[1:], strict=True)))
        return torch.stack(out)


class Global(nn.Module):
    """The authors' global module and codebook; what moves is read before it moves."""

    def __init__(self, c):
        super().__init__()
        self.c = c
        width, g = c.dim * c.heads, c.position_dim
        self.lin_proj_g = nn.Linear(c.dim, g)
        self.lin_query_g, self.lin_key_g = (nn.Linear(2 * g, width) for _ in range(2))
        self.lin_value_g = nn.Linear(g, width)
        self.bn = nn.BatchNorm1d(2 * g, affine=False)
        self.register_buffer("ema_cluster_size", torch.rand(c.centroids) + 0.5)
        self.register_buffer("ema_w", torch.randn(c.centroids, 2 * g))
        self.register_buffer("embedding", self.ema_w / self.ema_cluster_size[:, None])
        # the last centroid has no node
        self.register_buffer("c_idx", torch.randint(c.centroids - 1, (c.num_nodes,)))

    def forward(self, x, position, nodes):
        c, out = self.c, []
        x = torch.cat([linear(self.lin_proj_g, x), position], 1)
        codes = self.embedding * (self.bn.running_var + 1e-5).sqrt() + self.bn.running_mean
        q, k = linear(self.lin_query_g, x), linear(self.lin_key_g, codes)
        v = linear(self.lin_value_g, codes[:, : c.position_dim])
        for i in range(len(x)):
            for h in range(c.heads):
                mine = slice(h * c.dim, (h + 1) * c.dim)
                weight = []
                for m in range(c.centroids):
                    count = sum(int(j == m) for j in self.c_idx)
                    weight.append(count * (q[i, mine] @ k[m, mine] / math.sqrt(c.dim)).exp())
                weight = torch.stack(weight)
                out.append(weight / weight.sum() @ v[:, mine])
        if self.training:
            self.update(x.detach(), nodes)
        return torch.stack(out).view(len(x), -1)

    def update(self, x, nodes):
        c = self.c
        z = batch_norm(self.bn, x)
        nearest = [
            min(range(c.centroids), key=lambda m, row=row: float((row - self.embedding[m]).norm()))
            for row in z
        ]
        count, total = torch.zeros_like(self.ema_cluster_size), torch.zeros_like(self.ema_w)
        for row, m in zip(z, nearest, strict=True):
            count[m] += 1
            total[m] += row
        size = c.decay * self.ema_cluster_size + (1 - c.decay) * count
        n = size.sum()
        self.ema_cluster_size = (size + 1e-5) / (n + c.centroids * 1e-5) * n
        self.ema_w = c.decay * self.ema_w + (1 - c.decay) * total
        self.embedding = self.ema_w / self.ema_cluster_size[:, None]
        for node, m in zip(nodes.tolist(), nearest, strict=True):
            self.c_idx[node] = m


class Authors(nn.Module):
    """The authors' model.py, with the layers that nothing uses."""

    def __init__(self, c):
        super().__init__()
        self.c = c
        h, width = c.dim, c.dim * c.heads
        self.fc_in = nn.Sequential(
            nn.Linear(c.node_features, h), nn.BatchNorm1d(h), nn.Linear(h, h)
        )
        self.fc_in_seq = nn.Sequential(nn.Linear(c.node_features, h), nn.Linear(h, h))
        self.unused = nn.ModuleList(nn.Linear(h, width) for _ in range(4))
        self.local = Local(c)
        if c.parts != "local":
            self.globally = Global(c)
        times = 2 if c.parts == "full" else 1
        self.ff = nn.Sequential(
            nn.Linear(times * width, width),
            nn.BatchNorm1d(width),
            nn.Linear(width, h),
            nn.BatchNorm1d(h),
        )
        self.fc_out = nn.Linear(h, c.out_dim)

    def drop(self, x):
        return F.dropout(x.clamp(min=0), self.c.dropout, self.training)

    def forward(self, tokens, position=None, nodes=None):
        out = []
        if self.c.parts != "global":
            x = linear(self.fc_in_seq[1], self.drop(linear(self.fc_in_seq[0], tokens)))
            out.append(self.local(x))
        if self.c.parts != "local":
            x = batch_norm(self.fc_in[1], linear(self.fc_in[0], tokens[:, 0]))
            x = linear(self.fc_in[2], self.drop(x))
            out.append(self.globally(x, position, nodes))
        x = torch.cat(out, 1)
        for i in (0, 2):
            x = self.drop(batch_norm(self.ff[i + 1], linear(self.ff[i], x)))
        return linear(self.fc_out, x)


LAYERS = {
    "embed_tokens.0": "fc_in_seq.0",
    "embed_tokens.3": "fc_in_seq.1",
    "local.embed": "local.att_embeddings_nope",
    "local.norm1": "local.self_attention_norm",
    "local.q": "local.linear_q",
    "local.k": "local.linear_k",
    "local.v": "local.linear_v",
    "local.out": "local.output_layer",
    "local.residual": "local.res_proj",
    "local.norm2": "local.final_ln",
    "local.score": "local.attn_layer",
    "embed.0": "fc_in.0",
    "embed.1": "fc_in.1",
    "embed.4": "fc_in.2",
    "codes.project": "globally.lin_proj_g",
    "codes.q": "globally.lin_query_g",
    "codes.k": "globally.lin_key_g",
    "codes.v": "globally.lin_value_g",
    "after.0": "ff.0",
    "after.1": "ff.1",
    "after.4": "ff.2",
    "after.5": "ff.3",
    "readout": "fc_out",
}


def theirs_of(name, theirs):
    """The parameter that has that name here; of the readout's scores the half of the others."""
    layer, _, kind = name.rpartition(".")
    found = getattr(theirs.get_submodule(LAYERS[layer]), kind)
    return found, slice(DIM * HEADS, None) if name == "local.score.weight" else slice(None)


def pair(config):
    """Both models in float64 with the same parameters, and a codebook of which all has begun."""
    torch.manual_seed(0)
    theirs = Authors(config).double()
    ours = LargeGT(config).double()
    with torch.no_grad():
        for p in theirs.parameters():
            p.copy_(torch.randn_like(p) / 2)
        for name, p in ours.named_parameters():
            wanted, part = theirs_of(name, theirs)
            p.copy_(wanted[..., part])
        for x in (theirs.modules(), ours.modules()):
            for norm in x:
                if isinstance(norm, nn.BatchNorm1d):
                    norm.running_mean.uniform_(-0.5, 0.5, generator=seeded(norm.num_features))
                    norm.running_var.uniform_(0.5, 2, generator=seeded(norm.num_features))
        if config.parts != "local":
            copy_codebook(ours.codes, theirs.globally)
    return ours, theirs


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def copy_codebook(codes, theirs):
    book = codes.codebook
    for mine, wanted in (
        (book.size, theirs.ema_cluster_size),
        (book.total, theirs.ema_w),
        (book.centroids, theirs.embedding),
        (book.begun, torch.tensor(M)),
        (codes.assigned, theirs.c_idx),
        (codes.count, theirs.c_idx.bincount(minlength=M)),
    ):
        mine.copy_(wanted)


def batch(seed=1, size=B):
    generator = seeded(seed)
    tokens = torch.randn(size, 3 * K, FEATURES, generator=generator, dtype=FP64)
    nodes = torch.randperm(NODES, generator=generator)[:size]
    return tokens, torch.randn(size, G, generator=generator, dtype=FP64), nodes


def inputs(config, seed=1, size=B):
    tokens, position, nodes = batch(seed, size)
    local = config.parts == "local"
    return tokens, {} if local else {"position": position, "nodes": nodes}


def near(found, wanted, tolerance=1e-11):
    assert torch.allclose(found, wanted.to(found.dtype), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dropout", [0.0, 0.4], ids=["", "dropout"])
@pytest.mark.parametrize("parts", PARTS)
def test_outputs_gradients_and_codebook_are_those_of_the_equations(parts, dropout):
    config = replace(SMALL, parts=parts, dropout=dropout, local_dropout=dropout / 2, decay=0.8)
    ours, theirs = pair(config)
    for step in range(3):
        tokens, given = inputs(config, seed=step)
        sides = []
        for model in (ours, theirs):
            mine = tokens.clone().requires_grad_()
            model.zero_grad()
            torch.manual_seed(step)
            out = model(mine, **given)
            out.square().sum().backward()
            sides.append((out, mine.grad))
        for found, wanted in zip(*sides, strict=True):
            near(found, wanted)
        for name, p in ours.named_parameters():
            wanted, part = theirs_of(name, theirs)
            near(p.grad, wanted.grad[..., part], 1e-9)
        if parts != "local":
            book, other = ours.codes.codebook, theirs.globally
            near(book.size, other.ema_cluster_size)
            near(book.total, other.ema_w)
            near(book.centroids, other.embedding)
            near(book.norm.running_var, other.bn.running_var)
            assert torch.equal(ours.codes.assigned, other.c_idx.int())
            assert torch.equal(ours.codes.count, other.c_idx.bincount(minlength=M))
    ours.eval(), theirs.eval()
    state = copy.deepcopy(ours.state_dict())
    tokens, given = inputs(config, seed=9)
    near(ours(tokens, **given), theirs(tokens, **given))
    assert all(torch.equal(x, state[name]) for name, x in ours.state_dict().items())


def test_a_score_of_the_target_cancels():
    """What the authors' readout has and this one has not gets a gradient of 0."""
    _, theirs = pair(replace(SMALL, parts="local"))
    theirs(batch()[0]).square().sum().backward()
    layer = theirs.local.attn_layer
    assert layer.weight.grad[:, DIM * HEADS :].abs().min() > 1e-6
    assert layer.weight.grad[:, : DIM * HEADS].abs().max() < 1e-12
    assert layer.bias.grad.abs().max() < 1e-12


@pytest.mark.parametrize(
    ("name", "released", "parameters"),
    [
        ("ogbn_products", 2_550_384, 1_892_207),
        ("snap_patents", 739_654, 574_405),
        ("ogbn_papers100m", 10_141_485, 7_514_412),
    ],
)
def test_parameters_are_those_of_the_authors_that_are_used(name, released, parameters):
    """``released``: what the authors' main.py prints."""
    config = LargeGTConfig.published(name)
    with torch.device("meta"):
        ours, theirs = LargeGT(config), Authors(config)
    count = sum(p.numel() for p in ours.parameters())
    unused = [*theirs.unused.parameters(), *theirs.local.out_proj.parameters()]
    dead = config.dim * config.heads + 1  # of the score: the target's half and the bias
    whole = sum(p.numel() for p in theirs.parameters())
    assert whole == released
    assert count == whole - sum(p.numel() for p in unused) - dead
    assert count == parameters


def test_published_names():
    with pytest.raises(ValueError, match=r"name must be one of \['ogbn_products'.*got 'cora'"):
        LargeGTConfig.published("cora")


def test_the_codebook_begins_with_rows_of_the_first_batches():
    """Seven centroids of batches of three; then the equations hold from sizes of 1 on."""
    book = Codebook(7, 2).double()
    rows = [torch.randn(3, 2, generator=seeded(i), dtype=FP64) for i in range(4)]
    for i, x in enumerate(rows):
        z = (x - x.mean(0)) / (x.var(0, unbiased=False) + 1e-5).sqrt()
        before = copy.deepcopy(book.state_dict())
        small = pytest.warns(UserWarning, match="has 7 centroids and the batch 3 nodes")
        with small if i < 3 else warnings.catch_warnings(action="error"):  # then it is full
            nearest = book.update(x)
        begun = min(7, 3 * (i + 1))
        assert int(book.begun) == begun
        assert int(nearest.max()) < begun
        fresh = range(3 * i, begun)
        size, total = before["size"].clone(), before["total"].clone()
        centroids = before["centroids"].clone()
        for row, m in enumerate(fresh):
            size[m], total[m], centroids[m] = 1, z[row], z[row]
            assert int(nearest[row]) == m  # nothing is nearer than the row itself
        assert nearest.tolist() == [
            int((centroids[:begun] - row).square().sum(1).argmin()) for row in z
        ]
        for m in range(begun):
            mine = nearest == m
            size[m] = 0.99 * size[m] + 0.01 * int(mine.sum())
            total[m] = 0.99 * total[m] + 0.01 * z[mine].sum(0)
        whole = size.sum()
        size = (size + 1e-5) / (whole + 7e-5) * whole
        near(book.size[:begun], size[:begun])
        near(book.centroids[:begun], total[:begun] / size[:begun, None])
        assert not book.size[begun:].any()


def test_centroids_stay_among_the_nodes():
    """What begins with a size of 0 is thrown far away where the first batch leaves it out."""
    torch.manual_seed(0)
    book = Codebook(64, 8)
    for _ in range(30):
        book.update(torch.randn(64, 8))
    assert book.centroids.norm(dim=1).max() < 6
    book.eval()
    assert len(book.update(torch.randn(2000, 8)).unique()) > 40


def test_before_the_first_batch_the_global_module_gives_nothing():
    model = LargeGT(replace(SMALL, parts="global")).double().eval()
    tokens, given = inputs(model.config)
    out = model.codes(torch.randn(B, DIM, dtype=FP64), given["position"], given["nodes"])
    assert torch.equal(out, torch.zeros(B, DIM * HEADS, dtype=FP64))
    model(tokens, **given).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_a_node_twice_in_a_batch_counts_once():
    model = LargeGT(SMALL).double()
    for seed in range(3):
        tokens, given = inputs(SMALL, seed)
        given["nodes"] = given["nodes"] % 4
        model(tokens, **given)
        codes = model.codes
        known = codes.assigned[codes.assigned >= 0]
        assert len(known) <= 4
        assert torch.equal(codes.count, known.bincount(minlength=M))


def test_the_order_of_other_tokens_makes_no_difference():
    model = LargeGT(SMALL).double().eval()
    tokens, given = inputs(SMALL)
    order = torch.cat([torch.zeros(1, dtype=torch.long), 1 + torch.randperm(3 * K - 1)])
    near(model(tokens[:, order], **given), model(tokens, **given))


def test_learns_a_batch_by_heart():
    torch.manual_seed(0)
    model = LargeGT(replace(SMALL, dim=16))
    tokens, given = inputs(SMALL, size=16)
    tokens, given["position"] = tokens.float(), given["position"].float()
    wanted = torch.arange(16) % CLASSES
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    for _ in range(150):
        optimizer.zero_grad()
        F.cross_entropy(model(tokens, **given), wanted).backward()
        optimizer.step()
    model.eval()
    assert (model(tokens, **given).argmax(1) == wanted).all()


def test_saved_loaded_and_made_on_the_meta_device():
    torch.manual_seed(0)
    model = LargeGT(SMALL).double()
    tokens, given = inputs(SMALL)
    model(tokens, **given)
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    other = LargeGT(SMALL).double()
    other.load_state_dict(torch.load(file))
    assert torch.equal(model.eval()(tokens, **given), other.eval()(tokens, **given))
    with torch.device("meta"):
        empty = LargeGT(SMALL)
    empty.to_empty(device="cpu")
    for x in (*empty.parameters(), *empty.buffers()):
        x.data.fill_(7)
    torch.manual_seed(3)
    empty.reset_parameters()
    torch.manual_seed(3)
    model.float().reset_parameters()
    for (name, x), y in zip(model.state_dict().items(), empty.state_dict().values(), strict=True):
        assert torch.equal(x, y), name
    assert int(empty.codes.assigned.max()) == -1
    assert float(empty.local.q.weight.detach().std()) == pytest.approx(0.02, rel=0.3)


@pytest.mark.parametrize("parts", PARTS)
def test_every_parameter_gets_a_gradient_in_every_step(parts, tmp_path):
    config = replace(SMALL, parts=parts)
    torch.manual_seed(0)
    model = LargeGT(config).double()
    distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1
    )
    try:
        wrapped = DistributedDataParallel(model)
        for step in range(3):
            tokens, given = inputs(config, step)
            wrapped(tokens, **given).square().sum().backward()
    finally:
        distributed.destroy_process_group()
    assert all(p.grad.abs().sum() > 0 for p in model.parameters() if p.ndim > 1)


def test_under_autocast_the_codebook_stays_exact():
    torch.manual_seed(0)
    model = LargeGT(SMALL)
    tokens, given = inputs(SMALL)
    tokens, given["position"] = tokens.float(), given["position"].float()
    with torch.autocast("cpu", torch.bfloat16):
        out = model(tokens, **given)
    assert out.dtype == torch.bfloat16
    assert model.codes.codebook.centroids.dtype == torch.float32
    out.float().sum().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())


def test_centroids_of_more_nodes_than_float16_counts():
    torch.manual_seed(0)
    model = LargeGT(SMALL).double()
    tokens, given = inputs(SMALL)
    model(tokens, **given)
    model.eval().codes.count *= 70_000
    wanted = model(tokens, **given)
    half = {name: x.half() if name == "position" else x for name, x in given.items()}
    near(model.half()(tokens.half(), **half).double(), wanted, 0.02)


TOKENS, POSITION, IDS = batch()


@pytest.mark.parametrize(
    ("tokens", "given", "error", "message"),
    [
        (TOKENS[:, :8], {}, ValueError, r"tokens must be .*\[B, 9, 5\], got \[7, 8, 5\]"),
        (TOKENS.float(), {}, TypeError, "tokens must be torch.float64.*got torch.float32"),
        (TOKENS.tolist(), {}, TypeError, "tokens must be a tensor, got list"),
        (TOKENS, {"position": POSITION[:, :2]}, ValueError, r"\[7, 3\], got \[7, 2\]"),
        (TOKENS, {"position": None}, ValueError, "position must be given with parts='full'"),
        (TOKENS, {"nodes": None}, ValueError, "nodes must be given with parts='full'"),
        (TOKENS, {"nodes": IDS.double()}, TypeError, "nodes must hold integers .*, got"),
        (TOKENS, {"nodes": IDS[:3]}, ValueError, r"nodes must be \[B\] = \[7\], got \[3\]"),
        (TOKENS, {"nodes": IDS + NODES}, ValueError, "nodes must be from 0 to 19, got"),
    ],
)  # fmt: skip
def test_what_is_refused(tokens, given, error, message):
    model = LargeGT(SMALL).double()
    state = copy.deepcopy(model.state_dict())
    with pytest.raises(error, match=message):
        model(tokens, **{"position": POSITION, "nodes": IDS} | given)
    assert all(torch.equal(x, state[name]) for name, x in model.state_dict().items())


def test_the_local_module_takes_no_positions():
    model = LargeGT(replace(SMALL, parts="local")).double()
    with pytest.raises(ValueError, match="nodes must be None: parts is 'local'"):
        model(TOKENS, nodes=IDS)


def test_one_node_is_refused_in_training():
    model = LargeGT(SMALL).double()
    one = TOKENS[:1], {"position": POSITION[:1], "nodes": IDS[:1]}
    with pytest.raises(ValueError, match="after of LargeGT is a batch norm in training and got 1"):
        model(one[0], **one[1])
    assert model.eval()(one[0], **one[1]).shape == (1, CLASSES)


def test_no_node_changes_nothing():
    model = LargeGT(SMALL).double()
    tokens, given = inputs(SMALL)
    model(tokens, **given)
    state = copy.deepcopy(model.state_dict())
    none = {name: x[:0] for name, x in given.items()}
    assert model(tokens[:0], **none).shape == (0, CLASSES)
    for name, x in model.state_dict().items():
        assert torch.equal(x, state[name]) or "num_batches" in name


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"centroids": 21}, "centroids must be num_nodes=20 at most, got 21"),
        ({"dim": 513}, "dim must be 512 at most with parts='full', got 513"),
        ({"samples": 1}, "samples must be 2 at least.*got 1"),
        ({"parts": "both"}, "parts must be one of .*got 'both'"),
        ({"decay": 1.0}, "decay must be between 0 and 1, got 1.0"),
        ({"dropout": 1.5}, "dropout must be from 0 to 1, got 1.5"),
        ({"heads": 0}, "heads must be positive, got 0"),
    ],
)
def test_settings_that_are_refused(changed, message):
    with pytest.raises(ValueError, match=message):
        replace(SMALL, **changed)
    if "dim" in changed:
        assert replace(SMALL, parts="local", **changed).dim == 513
