"""SymPoint's attention with connections, against its equations in loops over edges."""

from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastgt import Graph
from fastgt.models import SymPointAttention, connected_neighbors

FP64 = torch.float64


def drawing(seed: int = 0, sizes: tuple[int, ...] = (9, 1, 7)) -> tuple[Tensor, Tensor]:
    """-> ends ``[N, 2, 2]`` on a lattice, so that many touch; and boundaries."""
    generator = torch.Generator().manual_seed(seed)
    ends = torch.randint(4, (sum(sizes), 2, 2), generator=generator).to(FP64)
    return ends + 0.01 * torch.rand(ends.shape, generator=generator, dtype=FP64), torch.tensor(
        [0, *sizes]
    ).cumsum(0)


def batch() -> Graph:
    """Two graphs with self loops, an edge that is there twice, and an isolated node."""
    source = [1, 2, 0, 0, 3, 3, 5, 6, 7, 6, 5, 7]
    target = [0, 0, 0, 2, 2, 2, 6, 6, 5, 7, 7, 7]  # 1, 3 and 4 have no edges
    return Graph.from_edge_index(torch.tensor([source, target]), graph_ptr=torch.tensor([0, 5, 8]))


def norm(z: Tensor, layer: nn.BatchNorm1d, p: dict[str, Tensor], name: str) -> Tensor:
    mean, variance = layer.running_mean, layer.running_var
    if layer.training:
        mean = z.mean(0)
        variance = ((z - mean) ** 2).mean(0)
    return (z - mean) / torch.sqrt(variance + 1e-5) * p[f"{name}.weight"] + p[f"{name}.bias"]


def literal(layer: SymPointAttention, p: dict[str, Tensor], x, position, graph: Graph) -> Tensor:
    edges = graph.edge_index.t().tolist()

    def linear(z: Tensor, name: str) -> Tensor:
        return z @ p[f"{name}.weight"].t() + p[f"{name}.bias"]

    q, k, v = (linear(x, name) for name in "qkv")
    d = torch.stack([position[j] - position[i] for j, i in edges])
    d = linear(
        norm(linear(d, "position.0"), layer.position[1], p, "position.1").relu(), "position.3"
    )
    w = torch.stack([k[j] - q[i] + d[e] for e, (j, i) in enumerate(edges)])
    w = linear(norm(w, layer.logits[0], p, "logits.0").relu(), "logits.2")
    w = linear(norm(w, layer.logits[3], p, "logits.3").relu(), "logits.5")
    rows = []
    for i in range(len(x)):
        mine = [e for e, (_, target) in enumerate(edges) if target == i]
        if not mine:
            rows.append(x.new_zeros(layer.dim))
            continue
        a = torch.exp(w[mine]) / torch.exp(w[mine]).sum(0)  # [edges, dim / planes]
        value = torch.stack([v[edges[e][0]] + d[e] for e in mine])
        # the channel s * width + c of plane s has the weight c
        out = [
            sum(a[e, c % a.shape[1]] * value[e, c] for e in range(len(mine)))
            for c in range(layer.dim)
        ]
        rows.append(torch.stack(out))
    return torch.stack(rows)


def trained(layer: nn.Module) -> nn.Module:
    """Norms with weights and statistics that are not the first ones."""
    generator = torch.Generator().manual_seed(5)
    for norm in (m for m in layer.modules() if isinstance(m, nn.BatchNorm1d)):
        for t in (norm.weight.data, norm.bias.data, norm.running_mean, norm.running_var):
            t.copy_(0.5 + torch.rand(t.shape, generator=generator))
    return layer.double()


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(("planes", "width"), [(8, 2), (1, 2), (4, 3)])
def test_it_is_its_equations(planes: int, width: int, training: bool) -> None:
    torch.manual_seed(1)
    graph = batch()
    layer = trained(SymPointAttention(16, position_dim=width, planes=planes)).train(training)
    given = [torch.randn(8, n, dtype=FP64, requires_grad=True) for n in (16, width)]
    upstream = torch.randn(8, 16, dtype=FP64)
    p = {name: t.detach().clone().requires_grad_() for name, t in layer.named_parameters()}
    copies = [t.detach().clone().requires_grad_() for t in given]
    wanted = literal(layer, p, *copies, graph)
    wanted.backward(upstream)
    out = layer(*given, graph)
    out.backward(upstream)
    torch.testing.assert_close(out, wanted, rtol=0, atol=1e-12)
    for found, copy in zip(given, copies, strict=True):
        torch.testing.assert_close(found.grad, copy.grad, rtol=0, atol=1e-11)
    for name, t in layer.named_parameters():
        torch.testing.assert_close(t.grad, p[name].grad, rtol=0, atol=1e-11, msg=name)
    assert torch.equal(out[[1, 3, 4]], torch.zeros(3, 16, dtype=FP64))


def literal_neighbors(ends: Tensor, k: int, distance: float, offsets: Tensor) -> set:
    pairs = set()
    for first, last in pairwise(offsets.tolist()):
        for i in range(first, last):
            middle = ends.mean(1)
            near = sorted(
                range(first, last), key=lambda j: (((middle[i] - middle[j]) ** 2).sum().item(), j)
            )
            pairs |= {(i, j) for j in near[:k]}
            for j in range(first, last):
                gaps = [(a - b).norm().item() for a in ends[i] for b in ends[j]]
                if i != j and min(gaps) <= distance:
                    pairs.add((i, j))
    return pairs


@pytest.mark.parametrize("k", [0, 1, 3, 16])
def test_neighbors_are_the_nearest_and_the_connected(k: int) -> None:
    ends, offsets = drawing()
    graph = connected_neighbors(ends, k, distance=0.02, offsets=offsets, partial=True)
    col, row = graph.edge_index.tolist()
    pairs = list(zip(row, col, strict=True))
    assert set(pairs) == literal_neighbors(ends, k, 0.02, offsets)
    assert pairs == sorted(set(pairs))
    assert graph.graph_ptr.tolist() == offsets.tolist()
    near = literal_neighbors(ends, k, -1, offsets)
    assert len(pairs) > len(near) or k == 16  # some are connected and not near


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_middles_are_not_rounded_to_the_dtype_of_the_ends(dtype: torch.dtype) -> None:
    """Middles between two numbers of the dtype, and the sum of two ends beyond its largest."""
    digit = torch.finfo(dtype).eps
    x = torch.tensor([[1, 1 + digit], [1, 1 + 2 * digit], [1, 1], [1 + digit, 1 + 2 * digit]])
    largest = torch.full((2, 2), torch.finfo(dtype).max)
    ends = torch.cat([x, largest])[..., None].to(dtype).requires_grad_()
    found = connected_neighbors(ends, 2, distance=0.0)
    wanted = connected_neighbors(ends.detach().double(), 2, distance=0.0)
    assert found.edge_index.tolist() == wanted.edge_index.tolist()


def test_at_most_so_many_connections_are_drawn() -> None:
    ends, offsets = drawing(2, (30, 20))
    every = connected_neighbors(ends, 0, distance=0.02, offsets=offsets)
    draws = []
    for seed in (0, 0, 1):
        generator = torch.Generator().manual_seed(seed)
        graph = connected_neighbors(
            ends, 0, distance=0.02, most=3, generator=generator, offsets=offsets
        )
        assert torch.equal(graph.row_degree, every.row_degree.clamp(max=3))
        draws.append(set(map(tuple, graph.edge_index.t().tolist())))
        assert draws[-1] <= set(map(tuple, every.edge_index.t().tolist()))
    assert every.row_degree.max() > 3
    assert draws[0] == draws[1] != draws[2]
    # each connection is kept as often as any other of its row
    row = int(every.row_degree.argmax())
    generator, count = torch.Generator().manual_seed(3), torch.zeros(len(ends))
    for _ in range(300):
        graph = connected_neighbors(
            ends, 0, distance=0.02, most=1, generator=generator, offsets=offsets
        )
        col, at = graph.edge_index
        count[col[at == row]] += 1
    degree = int(every.row_degree[row])
    mine = every.edge_index[0, every.edge_index[1] == row]
    assert count.sum() == 300
    assert (count[mine] / 300 - 1 / degree).abs().max() < 4 * (1 / degree / 300) ** 0.5


def test_it_learns_a_drawing_by_heart() -> None:
    torch.manual_seed(0)
    ends, offsets = drawing(0, (10, 6))
    graph = connected_neighbors(ends, 4, distance=0.02, offsets=offsets)
    x, wanted = torch.randn(16, 16), torch.randn(16, 16)
    layer = SymPointAttention(16)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.02, weight_decay=0)
    losses = []
    for _ in range(200):
        optimizer.zero_grad()
        loss = F.mse_loss(layer(x, ends.mean(1).float(), graph), wanted)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.05 * losses[0], (losses[0], losses[-1])


def test_what_does_not_fit_is_refused_by_name() -> None:
    layer, graph = SymPointAttention(16), batch()
    x, position = torch.randn(8, 16), torch.randn(8, 2)
    with pytest.raises(ValueError, match="planes must divide dim, got dim=20 and planes=8"):
        SymPointAttention(20)
    with pytest.raises(TypeError, match=r"graph must be a fastgt\.Graph, got Tensor"):
        layer(x, position, graph.edge_index)
    with pytest.raises(ValueError, match=r"x must be \[N, dim\] = \[8, 16\], got \[7, 16\]"):
        layer(x[1:], position, graph)
    with pytest.raises(ValueError, match=r"position must be .* = \[8, 2\], got \[8, 3\]"):
        layer(x, torch.randn(8, 3), graph)
    with pytest.raises(TypeError, match="x must be float"):
        layer(x.long(), position, graph)
    bipartite = Graph.from_edge_index(torch.tensor([[0, 1], [0, 0]]), (8, 9))
    with pytest.raises(ValueError, match="graph must be square, got 8 rows and 9 columns"):
        layer(x, position, bipartite)
    one = Graph.from_edge_index(torch.tensor([[1], [0]]), 8)
    with pytest.raises(ValueError, match="batch norm in training and got 1 edge"):
        layer(x, position, one)
    assert layer.eval()(x, position, one).shape == (8, 16)
    ends, offsets = drawing()
    with pytest.raises(TypeError, match="ends must be a tensor, got list"):
        connected_neighbors(ends.tolist(), 2)
    with pytest.raises(ValueError, match=r"ends must be \[N, 2, position_dim\], got \[17, 2\]"):
        connected_neighbors(ends[:, 0], 2)
    with pytest.raises(ValueError, match=r"ends must be .* got \[17, 2, 0\]"):
        connected_neighbors(ends[..., :0], 2)
    with pytest.raises(TypeError, match="ends must be float"):
        connected_neighbors(ends.long(), 2)
    with pytest.raises(ValueError, match="offsets"):
        connected_neighbors(ends, 2, offsets=offsets + 1)
    with pytest.raises(ValueError, match="k=2 is larger than the 1 points of graph 1"):
        connected_neighbors(ends, 2, offsets=offsets)
    with pytest.raises(TypeError, match=r"generator must be a torch\.Generator or None, got int"):
        connected_neighbors(ends, 1, most=1, generator=3)
    for wrong in (-1.0, torch.inf, torch.nan):
        with pytest.raises(ValueError, match=rf"distance must be finite .* got {wrong}"):
            connected_neighbors(ends, 1, distance=wrong)
    ends[3, 1, 0] = torch.nan
    with pytest.raises(ValueError, match=r"ends must be finite, got \[nan, .*\] at \[3, 1\]"):
        connected_neighbors(ends, 1)


@pytest.mark.parametrize("n", [3, 1, 0])
@pytest.mark.parametrize("training", [True, False])
def test_without_edges_it_gives_0(training: bool, n: int) -> None:
    layer = SymPointAttention(16).train(training)
    none = Graph.from_edge_index(torch.empty(2, 0, dtype=torch.int64), n)
    out = layer(torch.randn(n, 16), torch.randn(n, 2), none)
    assert torch.equal(out, torch.zeros(n, 16))
    out.sum().backward()
    for name, t in layer.named_parameters():  # DistributedDataParallel needs all of them
        assert torch.equal(t.grad, torch.zeros_like(t)), name
    assert all(t.isfinite().all() for t in layer.buffers())


def test_drawings_without_primitives() -> None:
    ends = torch.rand(3, 2, 2)
    graph = connected_neighbors(ends, 2, most=1, offsets=torch.tensor([0, 0, 3, 3]))
    assert graph.num_graphs == 3
    assert graph.row_degree.min() >= 2
    assert connected_neighbors(ends[:0], 2, most=1).num_rows == 0
    assert connected_neighbors(ends[:0], 2).num_edges == 0


def test_a_narrow_dtype_and_compiled_code_give_the_same(compiled_kernels: None) -> None:
    torch.manual_seed(0)
    layer, graph = SymPointAttention(16).eval(), batch()
    x, position = torch.randn(8, 16), torch.randn(8, 2)
    wanted = layer(x, position, graph)
    with torch.autocast("cpu", torch.bfloat16):
        narrow = layer(x, position, graph)
    torch.testing.assert_close(narrow.float(), wanted, rtol=0.05, atol=0.05)
    torch._dynamo.reset()
    compiled = torch.compile(layer, backend="eager", fullgraph=True, dynamic=True)
    ends, offsets = drawing()
    other = connected_neighbors(ends, 1, distance=0.02, offsets=offsets)
    for given in ((x, position, graph), (torch.randn(17, 16), ends.mean(1).float(), other)):
        torch.testing.assert_close(compiled(*given), layer(*given))
