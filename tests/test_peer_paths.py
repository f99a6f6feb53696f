"""Adapters to kernels in checkouts, by stand-ins that take the same arguments as the real ones."""

import sys
import textwrap

import pytest
import torch

from fastgt import Graph, reference
from fastgt.bench import peer_paths
from fastgt.testing import assert_as_accurate, random_graph

ANEMOI = """
    import torch


    def graph_transformer_attention_conv(query, key, value, edges, csc, reverse):
        row, colptr = csc
        rowptr, edge_ids, edge_dst = reverse
        assert edges.shape == (len(row), *query.shape[1:])
        assert edges.dtype == query.dtype
        assert not edges.any()
        assert {x.dtype for x in (*csc, *reverse)} == {torch.int64}
        assert edge_dst.equal(torch.arange(len(query)).repeat_interleave(colptr.diff()))
        # the other walk: the same edges, by source
        assert edge_ids.sort().values.equal(torch.arange(len(row)))
        assert row[edge_ids].equal(torch.arange(len(key)).repeat_interleave(rowptr.diff()))
        calls.append(edges.data_ptr())

        weight = ((query[edge_dst] * key[row]).sum(-1) / query.shape[2] ** 0.5).exp()
        total = weight.new_zeros(query.shape[:2]).index_add(0, edge_dst, weight)
        weight = weight / total[edge_dst]
        return torch.zeros_like(query).index_add(0, edge_dst, weight[..., None] * value[row])


    calls = []
"""

TURBO_GRAPH = """
    class AdjacencyForwardBackwardWithNodeBuckets:
        @classmethod
        def from_edge_list(cls, edge_index, num_nodes, quantile=0.99, index_dtype=None,
                           is_directed=None):
            made = cls()
            made.edge_index, made.num_nodes, made.dtype = edge_index, num_nodes, index_dtype
            return made
"""

TURBO_OPS = """
    import torch

    from turbo_gnn.graph import AdjacencyForwardBackwardWithNodeBuckets


    def graph_transformer_aggr(graph, x, Q, K, V, scale=None, *, autotune=False):
        assert isinstance(graph, AdjacencyForwardBackwardWithNodeBuckets)
        assert graph.dtype == torch.int32
        assert Q.shape == K.shape == V.shape == (graph.num_nodes, *x.shape[1:])
        source, target = graph.edge_index
        # the query is the source's
        weight = ((Q[source] * K[target]).sum(-1) * scale).exp()
        total = weight.new_zeros(Q.shape[:2]).index_add(0, target, weight)
        weight = weight / total[target]
        return torch.zeros_like(V).index_add(0, target, weight[..., None] * V[source])
"""

VARLEN = """
    import torch

    from flash_bla.utils import attend


    def varlen_linear_attention(q, k, v, cu_seqlens, max_seqlen, scale=None, eps=1e-6):
        assert cu_seqlens.dtype == torch.int32
        sizes = cu_seqlens.diff()
        assert sizes.min() > 0
        assert max_seqlen == sizes.max()
        parts = zip(*(x.split(sizes.tolist()) for x in (q, k, v)))
        return torch.cat(
            [attend(*(x.transpose(0, 1) for x in part), eps).transpose(0, 1) for part in parts]
        )
"""

FUSED = """
    from flash_bla.utils import attend


    def linear_attention(q, k, v, scale=None, eps=1e-6):
        assert q.ndim == 4
        return attend(q, k, v, eps)
"""

FLASH_UTILS = """
    def attend(q, k, v, eps):
        # means over the nodes, in both
        n = k.shape[-2]
        divisor = q @ k.mean(-2, keepdim=True).transpose(-2, -1) + eps
        return q @ (k.transpose(-2, -1) @ (v / n)) / divisor
"""

SOURCES = {
    "anemoi": {"models/src/anemoi/models/triton/gt.py": ANEMOI},
    "turbo-gnn": {
        "turbo_gnn/__init__.py": "",
        "turbo_gnn/graph.py": TURBO_GRAPH,
        "turbo_gnn/ops.py": TURBO_OPS,
    },
    "flash": {
        "flash_bla/utils.py": FLASH_UTILS,
        "flash_bla/ops/linear_attn/varlen.py": VARLEN,
        "flash_bla/ops/linear_attn/fused.py": FUSED,
    },
}


@pytest.fixture(autouse=True)
def seeded_and_nothing_stays_imported():
    torch.manual_seed(0)
    yield
    for name in list(sys.modules):
        if name.split(".")[0] in ("turbo_gnn", "flash_bla"):
            del sys.modules[name]


@pytest.fixture
def any_device(monkeypatch):
    monkeypatch.setattr(peer_paths, "_check_device", lambda peer, device: None)


def plant(folder, peer):
    for path, text in SOURCES[peer].items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text(textwrap.dedent(text))


def check(call, define, inputs, name):
    """Output and gradients, with a factor of 3: the stand-ins are other orders of summation."""
    found = []
    for f, dtype in ((call, torch.float32), (define, torch.float32), (define, torch.float64)):
        leaves = [x.to(dtype).requires_grad_() for x in inputs]
        out = f(*leaves)
        grads = torch.autograd.grad(out.sin().sum(), leaves)
        found.append([out, *grads])
    for actual, eager, oracle, what in zip(*found, ("output", "q", "k", "v"), strict=True):
        assert_as_accurate(actual, eager, oracle, f"{name}, {what}", factor=3)


@pytest.mark.parametrize("below", [".", "anemoi-core", "ecmwf/anemoi-core"])
@pytest.mark.parametrize("cols", [None, 17])
def test_anemoi_is_given_both_walks(tmp_path, any_device, below, cols):
    plant(tmp_path / below, "anemoi")
    graph = random_graph(0, 20, 90, cols=cols, isolated=2)
    attend = peer_paths.anemoi(graph, tmp_path)
    q, k, v = (torch.randn(n, 3, 5) for n in (20, cols or 20, cols or 20))
    check(attend, lambda *x: reference.neighborhood_attention(*x, graph), (q, k, v), "anemoi")


def test_anemoi_keeps_its_zeros(tmp_path, any_device):
    plant(tmp_path, "anemoi")
    attend = peer_paths.anemoi(random_graph(0, 20, 90), tmp_path)
    q, k, v = (torch.randn(20, 3, 5) for _ in range(3))
    attend(q, k, v)
    attend(q, k, v)
    file = tmp_path / "models/src/anemoi/models/triton/gt.py"
    first, second = peer_paths._run("anemoi", file.resolve()).calls
    assert first == second


@pytest.mark.parametrize("below", [".", "On-Efficient-Scaling-Of-GNNs"])
def test_turbo_gnn_is_given_keys_as_queries(tmp_path, any_device, below):
    plant(tmp_path / below, "turbo-gnn")
    graph = random_graph(1, 20, 90, isolated=2)
    attend = peer_paths.turbo_gnn(graph, tmp_path)
    q, k, v = (torch.randn(20, 2, 32) for _ in range(3))
    check(attend, lambda *x: reference.neighborhood_attention(*x, graph), (q, k, v), "turbo-gnn")


@pytest.mark.parametrize("name", peer_paths.LINEAR_ATTENTION)
@pytest.mark.parametrize("offsets", [[0, 5, 5, 42, 50], [0, 9, 18], [0, 30]])
@pytest.mark.parametrize("feature_map", ["identity", "relu", "elu"])
def test_linear_attention_of_a_batch(tmp_path, any_device, name, offsets, feature_map):
    plant(tmp_path / "checkout", "flash")
    q, k, v = (torch.randn(offsets[-1], 2, 16) for _ in range(3))
    if feature_map == "identity":
        q, k = q.abs(), k.abs()  # else the divisor may be close to nothing
    offsets = torch.tensor(offsets)
    # one that would be noticed, where it is exact
    eps = 1e-6 if offsets.diff().unique().numel() > 1 and "padded" not in name else 0.1
    how = {"feature_map": feature_map, "eps": eps}
    attend = peer_paths.LINEAR_ATTENTION[name](offsets, tmp_path, **how)
    check(attend, lambda *x: reference.linear_attention(*x, offsets, **how), (q, k, v), name)


@pytest.mark.parametrize("name", [*peer_paths.ATTENTION, *peer_paths.LINEAR_ATTENTION])
def test_absent_sources_are_named(tmp_path, name):
    graph, offsets = random_graph(0, 5, 9), torch.tensor([0, 5])
    adapter = {**peer_paths.ATTENTION, **peer_paths.LINEAR_ATTENTION}[name]
    given = graph if name in peer_paths.ATTENTION else offsets
    for folder in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(ImportError) as caught:
            adapter(given, folder)
        assert name.removesuffix(", padded") in str(caught.value)
        assert str(caught.value).endswith(f".py not found under {folder}")


def test_what_a_source_lacks_is_named(tmp_path, any_device):
    graph, offsets = random_graph(0, 5, 9), torch.tensor([0, 5])
    for peer in SOURCES:
        plant(tmp_path, peer)
    gt = tmp_path / "models/src/anemoi/models/triton/gt.py"
    gt.write_text("raise ValueError('Triton is not installed')\n")
    with pytest.raises(ImportError, match=r"anemoi, from .*gt.py: Triton is not installed"):
        peer_paths.anemoi(graph, tmp_path)
    # as a checkout is whose extension was not built
    (tmp_path / "turbo_gnn/__init__.py").write_text("import turbo_gnn._C\n")
    with pytest.raises(ImportError, match=r"turbo-gnn, from .*ops.py: .*turbo_gnn\._C"):
        peer_paths.turbo_gnn(graph, tmp_path)
    (tmp_path / "flash_bla/utils.py").unlink()
    with pytest.raises(ImportError, match=r"flash.*, from .*varlen.py: .*flash_bla\.utils"):
        peer_paths.flash_bla(offsets, tmp_path)
    assert str(tmp_path) not in sys.path


def test_another_copy_is_not_mistaken_for_the_one_named(tmp_path, any_device):
    graph = random_graph(0, 5, 9)
    for folder in ("first", "second"):
        plant(tmp_path / folder, "turbo-gnn")
    peer_paths.turbo_gnn(graph, tmp_path / "first")
    with pytest.raises(ImportError, match=r"turbo_gnn\.ops is .*first.* already, and not .*second"):
        peer_paths.turbo_gnn(graph, tmp_path / "second")


def test_anemoi_of_two_checkouts(tmp_path, any_device):
    graph = random_graph(0, 5, 9)
    for folder in ("first", "second"):
        plant(tmp_path / folder, "anemoi")
        peer_paths.anemoi(graph, tmp_path / folder)


@pytest.mark.parametrize("name", [*peer_paths.ATTENTION, *peer_paths.LINEAR_ATTENTION])
def test_a_cpu_is_refused(tmp_path, name):
    for peer in SOURCES:
        plant(tmp_path, peer)
    adapter = {**peer_paths.ATTENTION, **peer_paths.LINEAR_ATTENTION}[name]
    given = random_graph(0, 5, 9) if name in peer_paths.ATTENTION else torch.tensor([0, 5])
    with pytest.raises(NotImplementedError, match="runs on a GPU, not on cpu"):
        adapter(given, tmp_path)


@pytest.mark.parametrize("name", peer_paths.ATTENTION)
def test_attention_that_peers_do_not_have(tmp_path, any_device, name):
    plant(tmp_path, name)
    adapter = peer_paths.ATTENTION[name]
    attend = adapter(random_graph(0, 5, 9), tmp_path)
    x = torch.randn(5, 4, 32)
    with pytest.raises(NotImplementedError, match="not 2 for 4"):
        attend(x, x[:, :2], x[:, :2])
    with pytest.raises(NotImplementedError, match="not 16 and 32"):
        attend(x, x, x[..., :16])
    with pytest.raises(NotImplementedError, match=r"not torch\.float64"):
        attend(x.double(), x.double(), x.double())
    if name == "turbo-gnn":
        with pytest.raises(NotImplementedError, match="32, 64, 128 and 256, not 16"):
            attend(*(x[..., :16] for _ in range(3)))
        with pytest.raises(NotImplementedError, match="not 5 rows and 4 columns"):
            adapter(Graph.from_edge_index(torch.tensor([[0], [0]]), (5, 4)), tmp_path)


@pytest.mark.parametrize("name", peer_paths.LINEAR_ATTENTION)
def test_linear_attention_that_peers_do_not_have(tmp_path, any_device, name):
    plant(tmp_path, "flash")
    adapter = peer_paths.LINEAR_ATTENTION[name]
    offsets = torch.tensor([0, 5])
    with pytest.raises(NotImplementedError, match="identity, relu, elu, not softmax"):
        adapter(offsets, tmp_path, feature_map="softmax")
    with pytest.raises(NotImplementedError, match="no batch without nodes"):
        adapter(torch.tensor([0, 0]), tmp_path)
    attend = adapter(offsets, tmp_path)
    x = torch.randn(5, 2, 136)
    with pytest.raises(NotImplementedError, match="not 136"):
        attend(x, x, x)
    with pytest.raises(NotImplementedError, match="not 1 for 2"):
        attend(x, x[:, :1], x[:, :1])
