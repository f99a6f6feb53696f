"""LinearAttention, VirtualNode, random features, and fastgt.pyg.PerformerAttention."""

import copy
import importlib
import math
import pickle
import sys

import pytest
import torch
from attention_cases import DEVICE, close

from fastgt import Graph
from fastgt.bench import harness, table
from fastgt.bench import linear_attention as bench
from fastgt.nn import LinearAttention, VirtualNode, random_features
from fastgt.testing import PROBLEMS, Problem, random_batch


def batch(seed=0, sizes=(5, 0, 12, 1), dim=16):
    generator = torch.Generator().manual_seed(seed)
    offsets = torch.tensor([0, *sizes]).cumsum(0)
    return torch.randn(sum(sizes), dim, generator=generator).to(DEVICE), offsets.to(DEVICE)


@pytest.mark.parametrize(("m", "d"), [(3, 5), (5, 5), (13, 5), (44, 16), (1, 1)])
def test_random_features_are_orthogonal_in_blocks(m, d):
    for norms in ("gaussian", "unit"):
        w = random_features(m, d, norms=norms, generator=torch.Generator().manual_seed(0))
        assert w.shape == (m, d)
        for block in w.double().split(d):
            gram = block @ block.T
            assert (gram - gram.diagonal().diag()).abs().max() < 1e-5 * gram.diagonal().max()
        lengths = w.norm(dim=1)
        if norms == "unit":
            torch.testing.assert_close(lengths, torch.ones(m))
    again = random_features(m, d, norms="unit", generator=torch.Generator().manual_seed(0))
    assert torch.equal(w, again)


def test_gaussian_lengths_are_those_of_gaussian_vectors():
    w = random_features(4000, 8, generator=torch.Generator().manual_seed(0))
    assert abs(float(w.square().sum(1).mean()) - 8) < 0.3
    assert float(w.mean(0).abs().max()) < 0.1


def test_softmax_features_approach_softmax():
    """Performers, section 2.3: the expected product of features is exp(q . k / sqrt(d))."""
    from fastgt import linear_attention

    d, n = 4, 12
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(n, 1, d, generator=generator) * 0.5 for _ in range(3))
    truth = torch.softmax((q[:, 0] @ k[:, 0].T) / math.sqrt(d), 1) @ v[:, 0]
    errors = []
    for m in (16, 1024):
        w = random_features(m, d, generator=generator)
        o = linear_attention(q, k, v, feature_map="softmax", projection=w, impl="reference")
        errors.append(float((o[:, 0] - truth).abs().max()))
    assert errors[1] < min(0.02, errors[0])


def test_random_features_refuse():
    with pytest.raises(ValueError, match="must be positive, got 0, 4"):
        random_features(0, 4)
    with pytest.raises(ValueError, match="norms must be"):
        random_features(4, 4, norms="large")


@pytest.mark.parametrize("feature_map", ["elu", "softmax", "relu_random"])
def test_linear_attention_module(feature_map):
    torch.manual_seed(0)
    module = LinearAttention(16, 4, feature_map=feature_map, dropout=0.5).to(DEVICE).eval()
    x, offsets = batch()
    out = module(x, offsets)
    assert out.shape == x.shape
    for begin, end in ((0, 5), (5, 17), (17, 18)):
        close(module(x[begin:end]), out[begin:end], tolerance=1e-5)
    out.sum().backward()
    assert all(p.grad is not None for p in module.parameters())
    other = LinearAttention(16, 4, feature_map=feature_map).to(DEVICE).eval()
    other.load_state_dict(module.state_dict())
    for twin in (other, copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert torch.equal(twin(x, offsets), out)
    if feature_map != "elu":
        before = module.projection.clone()
        module.redraw_projection(torch.Generator().manual_seed(1))
        assert not torch.equal(module.projection, before)
        assert "projection" in module.state_dict()
    else:
        with pytest.raises(ValueError, match="no projection"):
            module.redraw_projection()


def test_linear_attention_module_refuses():
    with pytest.raises(ValueError, match="heads must divide dim, got dim=10 and heads=4"):
        LinearAttention(10, 4)
    with pytest.raises(ValueError, match="'elu' has no random features"):
        LinearAttention(16, 4, num_features=8)
    with pytest.raises(ValueError, match="impl must be one of"):
        LinearAttention(16, 4, impl="cuda")


@pytest.fixture
def pyg():
    """fastgt.pyg, where torch-geometric is installed."""
    pytest.importorskip("torch_geometric")
    return importlib.import_module("fastgt.pyg")


@pytest.mark.parametrize("qkv_bias", [True, False])
@pytest.mark.parametrize("nodes", [1, 20])
def test_performer_is_torch_geometrics_where_nothing_is_padded(nodes, qkv_bias, pyg):
    from torch_geometric.nn import attention

    torch.manual_seed(0)
    theirs = attention.PerformerAttention(32, 4, 8, qkv_bias=qkv_bias).to(DEVICE)
    ours = pyg.PerformerAttention(32, 4, 8, qkv_bias=qkv_bias).to(DEVICE)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(3, nodes, 32, device=DEVICE)
    offsets = (torch.arange(4) * nodes).to(DEVICE)
    mask = torch.ones(3, nodes, dtype=torch.bool, device=DEVICE)
    found = []
    for f in (
        lambda t: theirs(t, mask).flatten(0, 1),
        lambda t: ours(t.flatten(0, 1), offsets=offsets),
    ):
        leaf = x.clone().requires_grad_()
        out = f(leaf)
        module = theirs if not found else ours
        found.append([out, *torch.autograd.grad(out.square().sum(), [leaf, *module.parameters()])])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_performer_does_not_see_padding(pyg):
    """Where torch-geometric's does."""
    torch.manual_seed(0)
    module = pyg.PerformerAttention(32, 4, 8).to(DEVICE)
    x, offsets = batch(sizes=(4, 9), dim=32)
    out = module(x, offsets=offsets)
    close(out[:4], module(x[None, :4])[0], tolerance=1e-5)
    dense = x.new_full((2, 9, 32), 7.0)
    mask = torch.ones(2, 9, dtype=torch.bool, device=DEVICE)
    mask[0, 4:] = False
    dense[mask] = x
    close(module(dense, mask)[mask], out, tolerance=1e-5)
    before = module.fast_attn.projection_matrix.clone()
    module.redraw_projection_matrix()
    assert not torch.equal(before, module.fast_attn.projection_matrix)


@pytest.mark.parametrize("residual", [True, False])
def test_virtual_node_module(residual):
    """OGB's loop: read, sum, update."""
    torch.manual_seed(0)
    node = VirtualNode(16, residual=residual).to(DEVICE)
    x, offsets = batch(sizes=(5, 3, 12))
    state = node.initial(3)
    assert torch.equal(state, torch.zeros_like(state))
    state = torch.randn(3, 16, device=DEVICE)
    y, new = node(x, state, offsets)
    graph = torch.arange(3, device=DEVICE).repeat_interleave(offsets.diff())
    h = x + state[graph]
    pooled = torch.zeros_like(state).index_add(0, graph, h) + state
    wanted = node.update(pooled) + (state if residual else 0)
    close(y, h, tolerance=1e-5)
    torch.testing.assert_close(new, wanted, rtol=1e-4, atol=1e-4)
    (y.sum() + new.sum() + node.initial(3).sum()).backward()
    assert all(p.grad is not None for p in node.parameters())


@pytest.fixture
def rows(monkeypatch):
    """-> rows of the benchmark on ragged graphs."""
    sizes = [(2, 3), (9, 20), (5, 0), (7, 12)]
    monkeypatch.setitem(PROBLEMS, "tiny", Problem("tiny", lambda: random_batch(0, sizes)))
    return lambda: harness.compare(bench.performer("tiny", channels=8, heads=2, width=8), repeats=1)


def test_benchmark_times_who_agrees(rows, pyg):
    """torch-geometric's module as released disagrees, and is not timed."""
    found = rows()
    assert [(row["provider"], row["match"]) for row in found] == [
        ("fastgt", True),
        ("pyg", False),
        ("pyg, padded keys zeroed", True),
    ]
    assert found[0]["both_x"] == 1
    assert "both_s" not in found[1]
    assert found[2]["both_s"] > 0
    assert "MISMATCH" in table.table(found)


def test_benchmark_without_peers(rows, pyg, monkeypatch):
    def absent(ours, repaired):
        raise ImportError("no such package")

    monkeypatch.setattr(bench, "_pyg", absent)
    found = rows()
    assert [row["match"] for row in found] == [True, None, None]
    assert "not installed" in table.table(found)


def test_nothing_is_measured_without_torch_geometric_or_by_its_code(rows, pyg, monkeypatch):
    with pytest.raises(ValueError, match="is not fused: heads have 300 channels and 1711 features"):
        bench.performer("tiny", channels=8, heads=2, width=300)
    monkeypatch.setitem(sys.modules, "fastgt.pyg", None)
    with pytest.raises(ImportError, match=r"fastgt\.pyg"):
        rows()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("residual", [True, False])
def test_a_virtual_nodes_layers_within_autocast(residual, dtype):
    """The first state is a float32 parameter, the next comes from a layer that was cast down."""
    node = VirtualNode(8, residual=residual).to(DEVICE)
    x, offsets = torch.randn(9, 8, device=DEVICE), torch.tensor([0, 4, 9], device=DEVICE)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        state = node.initial(2)
        for _ in range(2):
            y, state = node(x.to(dtype), state, offsets)
    # float32 only where x and the state have not both been cast down
    assert y.dtype == (torch.float32 if residual or dtype == torch.float32 else torch.bfloat16)
    (y.sum() + state.sum()).backward()
    assert node.start.grad.isfinite().all()


def test_modules_refuse_by_name():
    padded = torch.zeros(2, 5, 16)
    offsets = torch.tensor([0, 10])
    attention = LinearAttention(16, 4)
    assert "heads=4" in repr(attention)
    with pytest.raises(ValueError, match=r"x must be \[N, 16\], got \[2, 5, 16\].*x\[mask\]"):
        attention(padded)
    with pytest.raises(ValueError, match=r"x must be \[N, 16\], got \[10, 15\]"):
        attention(torch.zeros(10, 15), offsets)
    with pytest.raises(ValueError, match=r"batch\.ptr, not batch\.batch"):
        attention(torch.zeros(10, 16), torch.zeros(10, dtype=torch.long))
    graph = Graph.from_edge_index(torch.tensor([[0], [1]]))
    with pytest.raises(TypeError, match=r"got Graph: its graph_ptr is"):
        attention(torch.zeros(10, 16), graph)
    with pytest.raises(ValueError, match="feature_map must be one of"):
        LinearAttention(16, 4, feature_map="gelu")
    for heads in (0, 3):
        with pytest.raises(ValueError, match=f"heads must divide dim.*heads={heads}"):
            LinearAttention(16, heads)


def test_performer_refuses_by_name(pyg):
    attention, x = pyg.PerformerAttention(16, 4), torch.zeros(10, 16)
    with pytest.raises(ValueError, match=r"x must be \[N, channels\], got \[2, 5, 16\]"):
        attention(x.unflatten(0, (2, 5)), offsets=torch.tensor([0, 10]))
    with pytest.raises(ValueError, match=r"x must be \[B, n, channels\], got \[10, 16\]"):
        attention(x)
    with pytest.raises(ValueError, match=r"batch\.ptr, not batch\.batch"):
        attention(x, offsets=torch.zeros(10, dtype=torch.long))
    with pytest.raises(TypeError, match=r"got Graph: its graph_ptr is"):
        attention(x, offsets=Graph.from_edge_index(torch.tensor([[0], [1]])))


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"head_channels": 256}, "heads have 256 channels and 1419 features"),
        ({"head_channels": 4, "kernel": torch.nn.Softplus()}, "the kernel is Softplus"),
    ],
)
def test_a_performer_that_is_not_fused_takes_no_offsets(options, why, pyg):
    """PyG's code takes dense batches only: in a GPSConv it runs on them."""
    attention = pyg.PerformerAttention(8, 2, **options)
    with pytest.raises(ValueError, match=f"torch-geometric's own code cannot run, but {why}"):
        attention(torch.zeros(6, 8), offsets=torch.tensor([0, 6]))
    theirs = pyg.PerformerAttention.PYG(8, 2, **options)
    theirs.load_state_dict(attention.state_dict())
    x = torch.randn(1, 6, 8)
    with pytest.warns(UserWarning, match=why):
        found = attention(x)
    assert torch.equal(found, theirs(x))
    conv = pyg.GPSConv(8, None, heads=2, attn_type="performer", attn_kwargs=options)
    expected = pyg.GPSConv.PYG(8, None, heads=2, attn_type="performer", attn_kwargs=options)
    expected.load_state_dict(conv.state_dict())
    edges = torch.zeros(2, 0, dtype=torch.long)
    torch.testing.assert_close(conv(x[0], edges), expected(x[0], edges))
    assert why in pyg.explain(conv)["attn"]


def test_wide_heads_have_as_many_features_as_there_may_be():
    attention = LinearAttention(256, 1, feature_map="softmax").to(DEVICE)
    assert attention.projection.shape == (1024, 256)
    assert attention(torch.randn(3, 256, device=DEVICE)).isfinite().all()
