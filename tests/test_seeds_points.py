"""Attention of points, skeletons and pairs in examples/seeds, against dense transcriptions."""

from collections.abc import Callable

import pytest
import torch
from seed_cases import SEEDS, load
from torch import Tensor, nn
from torch.nn import functional as F

import fastgt
from fastgt import Graph
from fastgt.models import connected_neighbors
from fastgt.patterns import knn

FP64 = torch.float64
NAMES = [
    "any2point",
    "condaformer",
    "gmm_mask",
    "gridformer",
    "p2at",
    "relationnet",
    "roitr",
    "skateformer",
    "sympoint",
]


def randn(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=FP64, requires_grad=True)


def check(
    block: nn.Module, call: Callable[..., Tensor], dense: Callable[..., Tensor], *given: Tensor
) -> None:
    """``call(block, *given)`` is ``dense(parameters, *given)``, and so are all gradients."""
    p = {name: t.detach().clone().requires_grad_() for name, t in block.named_parameters()}
    copies = [t.detach().clone().requires_grad_() for t in given]
    out, wanted = call(block, *given), dense(p, *copies)
    upstream = torch.randn(wanted.shape, dtype=FP64)
    out.backward(upstream)
    wanted.backward(upstream)
    torch.testing.assert_close(out, wanted, rtol=0, atol=1e-11)
    for found, copy in zip(given, copies, strict=True):
        torch.testing.assert_close(found.grad, copy.grad, rtol=0, atol=1e-10)
    for name, t in block.named_parameters():
        assert t.grad is not None, name
        torch.testing.assert_close(t.grad, p[name].grad, rtol=0, atol=1e-10, msg=name)


def linear(p: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    bias = p.get(f"{name}.bias")
    return F.linear(x, p[f"{name}.weight"], bias)


def norm(p: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    """Batch norm in training, over all but the last axis."""
    x, shape = x.reshape(-1, x.shape[-1]), x.shape
    centred = x - x.mean(0)
    scaled = centred / (centred.square().mean(0) + 1e-5).sqrt()
    return (scaled * p[f"{name}.weight"] + p[f"{name}.bias"]).view(shape)


@pytest.mark.parametrize("name", NAMES)
def test_a_seed_runs_and_says_one_line(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    source = (SEEDS / f"{name}.py").read_text()
    exec(compile(source, name, "exec"), {"__name__": "__main__"})
    said = capsys.readouterr().out
    assert said.count("\n") == 1
    assert "output [" in said


@pytest.mark.parametrize("name", NAMES)
def test_the_size_of_the_paper_is_a_graph(name: str) -> None:
    module = load(name)
    graph, heads, width = module.paper_size()
    assert isinstance(graph, Graph)
    assert graph.row_degree.min() > 0  # so that dense attention can be compared
    edges = graph.edge_index[1] * graph.num_cols + graph.edge_index[0]
    assert len(edges.unique()) == graph.num_edges
    assert isinstance(heads, int)
    assert isinstance(width, int)
    assert module.PATTERN
    assert module.OPERATOR in fastgt.__all__
    blocks = [
        c for c in vars(module).values() if isinstance(c, type) and c.__module__ == module.__name__
    ]
    assert [issubclass(c, nn.Module) for c in blocks] == [True]
    assert "arXiv" in module.__doc__


def test_gaussian_mixture_mask() -> None:
    torch.manual_seed(0)
    height, width, heads, dim = 3, 4, 2, 8
    n = height * width
    block = load("gmm_mask").GaussianMixtureAttention(dim, heads, (height, width)).double()

    def dense(p: dict[str, Tensor], x: Tensor) -> Tensor:
        # the authors' mask, pair by pair
        mask = torch.zeros(n, n, dtype=FP64)
        for i in range(n):
            for j in range(n):
                dx, dy = i % width - j % width, i // width - j // width
                mask[i, j] = -(dx**2 + dy**2)
        mask = torch.exp(mask) ** 0.5
        sigma, alpha = (p[name][:, :, None, None] for name in ("sigma", "alpha"))
        mask = (alpha * mask ** (1 / (sigma**2 + 1e-5))).sum(0)  # [H, n, n]
        q, k, v = linear(p, "qkv", x).view(2, n, 3, heads, -1).permute(2, 0, 3, 1, 4)
        a = (mask * (q @ k.transpose(-1, -2)) * (dim // heads) ** -0.5).softmax(-1)
        return linear(p, "out", (a @ v).transpose(1, 2).reshape(2 * n, dim))

    graph = Graph.complete(torch.tensor([0, n, 2 * n]))
    check(block, lambda b, x: b(x, graph), dense, randn(2 * n, dim))


def test_condaformer() -> None:
    torch.manual_seed(0)
    module, heads, dim, window, n = load("condaformer"), 6, 24, 4, 40
    points = 9 * torch.rand(n, 3, dtype=FP64)
    block = module.ConDaFormerAttention(dim, heads, window).double()
    for shift in (False, True):

        def dense(p: dict[str, Tensor], x: Tensor, shift: bool = shift) -> Tensor:
            q, k, v = linear(p, "qkv", x).view(n, 3, heads, -1).permute(1, 2, 0, 3)
            q = q * (dim // heads) ** -0.5
            outs = []
            for h in range(heads):
                size = [[window, window, 1], [window, 1, window], [1, window, window]][h // 2]
                low = points.amin(0).tolist()
                place = [
                    [c - low[a] + shift * size[a] / 2 for a, c in enumerate(point)]
                    for point in points.tolist()
                ]
                cell = [[c // size[a] for a, c in enumerate(at)] for at in place]
                step = [[int(c % size[a] // 0.25) for a, c in enumerate(at)] for at in place]
                logits, values = x.new_full((n, n), -torch.inf), {}
                for i in range(n):
                    for j in range(n):
                        if cell[i] == cell[j]:
                            r = [step[i][a] - step[j][a] + 4 * window - 1 for a in range(3)]
                            t_q, t_k, t_v = (
                                sum(table[r[a], a, h % 2] for a in range(3))
                                for table in p["tables"]
                            )
                            logits[i, j] = q[h, i] @ (k[h, j] + t_q) + k[h, j] @ t_k
                            values[i, j] = v[h, j] + t_v
                a = logits.softmax(1)
                outs.append(
                    torch.stack(
                        [
                            sum(a[i, j] * values[i, j] for j in range(n) if (i, j) in values)
                            for i in range(n)
                        ]
                    )
                )
            return linear(p, "out", torch.cat(outs, 1))

        graph, place = module.planes(points, window, shift)
        block.zero_grad()
        check(block, lambda b, x: b(x, graph, place), dense, randn(n, dim))  # noqa: B023


def test_skateformer() -> None:
    torch.manual_seed(0)
    module, clips, times, joints, dim, heads = load("skateformer"), 2, 8, 6, 24, 3
    frames, near, spread = 4, 2, 3
    n = times * joints
    graph = module.partitions((times, joints), frames, near, spread, graphs=clips)
    block = module.SkateFormerAttention(dim, (times, joints), heads, frames, spread).double()

    def parts(x: Tensor, partition: int) -> Tensor:
        """[B, T, V, ...] -> [parts, of a part, ...], by the reshapes of the paper."""
        t = (times // frames, frames) if partition < 2 else (frames, times // frames)
        v = (joints // near, near) if partition % 2 == 0 else (spread, joints // spread)
        x = x.reshape(clips, *t, *v, *x.shape[3:])
        inside = (2 if partition < 2 else 1), (4 if partition % 2 == 0 else 3)
        outside = [0, *(a for a in (1, 2, 3, 4) if a not in inside)]
        x = x.permute(*outside, *inside, *range(5, x.ndim))
        return x.flatten(3, 4).flatten(0, 2)

    def dense(p: dict[str, Tensor], x: Tensor) -> Tensor:
        qkv = linear(p, "qkv", x).view(clips, times, joints, 4, -1)
        number = torch.arange(clips * n).view(clips, times, joints)
        outs = []
        for partition in range(4):
            q, k, v = (
                parts(qkv[:, :, :, partition], partition).unflatten(-1, (3, heads, -1)).unbind(2)
            )
            size = near if partition % 2 == 0 else spread
            bias = x.new_zeros(heads, frames * size, frames * size)
            for i in range(frames * size):
                for j in range(frames * size):
                    step = i // size - j // size + frames - 1
                    if partition % 2 == 0:
                        bias[:, i, j] = p["near"][partition // 2, step]
                    else:
                        bias[:, i, j] = p["far"][partition // 2, step, i % size, j % size]
            a = torch.einsum("pihd,pjhd->phij", q, k) * heads**-0.5 + bias
            out = torch.einsum("phij,pjhd->pihd", a.softmax(-1), v).flatten(2).flatten(0, 1)
            back = torch.zeros_like(out)
            outs.append(back.index_copy(0, parts(number, partition).flatten(), out))
        return torch.cat(outs, 1)

    check(block, lambda b, x: b(x, graph), dense, randn(clips * n, dim))


def test_relationnet() -> None:
    torch.manual_seed(0)
    dim, heads, radius, waves = 12, 3, 4, 8
    torch.set_default_dtype(FP64)  # for its sines and cosines
    try:
        block = load("relationnet").BridgingAttention(dim, heads, radius, waves)
    finally:
        torch.set_default_dtype(torch.float32)
    nn.init.normal_(block.relation.weight)  # as many above the clamp as below
    offsets, ends = [0, 7, 11], [0, 3, 8]
    place, key_place = 6 * torch.rand(11, 2, dtype=FP64), 6 * torch.rand(8, 2, dtype=FP64)

    def embed(x: int, y: int) -> Tensor:
        feats = []
        for c in (x, y):
            angle = [c / 1000 ** (4 / waves * f) for f in range(waves // 4)]
            feats += [torch.tensor(angle, dtype=FP64).sin(), torch.tensor(angle, dtype=FP64).cos()]
        return torch.cat(feats)

    def dense(p: dict[str, Tensor], x: Tensor, key: Tensor) -> Tensor:
        side = 2 * radius + 1
        table = [
            [linear(p, "relation", embed(c - radius, r - radius)) for c in range(side)]
            for r in range(side)
        ]

        def read(dx: float, dy: float) -> Tensor:
            """Bilinear; a step of ``radius`` is the outer edge of the last pixel."""
            x, y = (min(max(((d / radius + 1) * side - 1) / 2, 0), side - 1) for d in (dx, dy))
            c, r = min(int(x), side - 2), min(int(y), side - 2)
            fx, fy = x - c, y - r
            return (
                (1 - fx) * (1 - fy) * table[r][c]
                + fx * (1 - fy) * table[r][c + 1]
                + (1 - fx) * fy * table[r + 1][c]
                + fx * fy * table[r + 1][c + 1]
            )

        q, k, v = linear(p, "q", x), linear(p, "k", key), linear(p, "v", key)
        q, k, v = (t.view(len(t), heads, -1).transpose(0, 1) for t in (q, k, v))
        bias = x.new_full((heads, len(x), len(key)), -torch.inf)
        for g in (0, 1):
            for i in range(offsets[g], offsets[g + 1]):
                for j in range(ends[g], ends[g + 1]):
                    step = (key_place[j] - place[i]).tolist()
                    bias[:, i, j] = torch.log(read(*step).clamp(min=1e-6))
        a = (q @ k.transpose(1, 2) * (dim // heads) ** -0.5 + bias).softmax(-1)
        return F.relu(x + linear(p, "out", (a @ v).transpose(0, 1).flatten(1)))

    graph = Graph.complete(torch.tensor(offsets), torch.tensor(ends))
    check(
        block,
        lambda b, x, key: b(x, place, key, key_place, graph),
        dense,
        randn(11, dim),
        randn(8, dim),
    )


def test_roitr() -> None:
    torch.manual_seed(0)
    module, n, dim, heads, k = load("roitr"), 14, 12, 4, 5
    points = torch.randn(n, 3, dtype=FP64)
    normals = F.normalize(torch.randn(n, 3, dtype=FP64), dim=1)
    graph = knn(points, k)
    features = module.pair_features(points, normals, graph)
    block = module.RoITrAttention(dim, heads).double()

    def angle(a: Tensor, b: Tensor) -> float:
        sine, cosine = torch.linalg.cross(a, b).norm(), a @ b
        return torch.atan2(sine, cosine).item() / torch.pi

    def dense(p: dict[str, Tensor], x: Tensor) -> Tensor:
        logits, value = (
            x.new_full((heads, n, n), -torch.inf),
            x.new_zeros(heads, n, n, dim // heads),
        )
        q, key, v = linear(p, "qkv", x).view(n, 3, heads, -1).unbind(1)
        for i in range(n):
            near = sorted(range(n), key=lambda j: (points[i] - points[j]).norm().item())[:k]
            for j in near:
                d = points[j] - points[i]
                f = [d.norm().item(), angle(normals[i], d), angle(normals[j], d)]
                f = torch.tensor([*f, angle(normals[i], normals[j])], dtype=FP64)
                e = linear(p, "embed", f)
                r, u = (linear(p, name, e).view(heads, -1) for name in "ru")
                logits[:, i, j] = ((q[i] * key[j]).sum(1) + (q[i] * r).sum(1)) / (
                    dim // heads
                ) ** 0.5
                value[:, i, j] = v[j] + u
        out = torch.einsum("hij,hijd->ihd", logits.softmax(-1), value).flatten(1)
        return F.layer_norm(x + linear(p, "out", out), (dim,), p["norm.weight"], p["norm.bias"])

    check(block, lambda b, x: b(x, features, graph), dense, randn(n, dim))
    # turned, the cloud gives the same
    turn, _ = torch.linalg.qr(torch.randn(3, 3, dtype=FP64))
    turn = turn * turn.det().sign()
    turned = module.pair_features(points @ turn, normals @ turn, graph)
    torch.testing.assert_close(turned, features, rtol=0, atol=1e-12)


def test_gridformer() -> None:
    torch.manual_seed(0)
    module, n, side, dim, planes = load("gridformer"), 20, 2, 12, 3
    points = torch.rand(n, 3, dtype=FP64)
    points[:, 2] /= 2  # the cells above stay empty
    graph, place = module.cells(points, side)
    block = module.PointGridAttention(dim, planes).double()

    def dense(p: dict[str, Tensor], cell: Tensor, x: Tensor) -> Tensor:
        at = [[int(side * c) for c in point] for point in points.tolist()]
        offset = torch.stack([points[j] - torch.tensor(at[j]) / side for j in range(n)])
        d = linear(p, "place.3", norm(p, "place.1", linear(p, "place.0", offset)).relu())
        q, k = linear(p, "q", cell), linear(p, "k", x)
        row = [x0 + side * (x1 + side * x2) for x0, x1, x2 in at]
        w = linear(p, "weigh.0", torch.stack([k[j] - q[row[j]] + d[j] for j in range(n)]))
        w = norm(p, "weigh.1", w).relu()
        v = linear(p, "v.4", linear(p, "v.2", linear(p, "v.0", x).relu()).relu()) + d
        mask = torch.tensor([[row[j] == i for j in range(n)] for i in range(side**3)])
        logits = w.expand(side**3, n, -1).masked_fill(~mask[:, :, None], -torch.inf)
        a = logits.softmax(1).masked_fill(~mask.any(1)[:, None, None], 0.0)
        return (a.repeat(1, 1, planes) * v).sum(1)

    check(
        block,
        lambda b, cell, x: b(cell, x, place, graph),
        dense,
        randn(side**3, dim),
        randn(n, dim),
    )
    assert (graph.row_degree == 0).sum() == 4


def test_p2at() -> None:
    torch.manual_seed(0)
    B, height, width, dim, heads, keys, values = 2, 3, 5, 7, 2, 4, 3
    block = load("p2at").P2ATAttention(dim, heads, keys, values).double()
    names = {"q": "q.0", "k": "k.0", "v": "v.0"}

    def places(p: dict[str, Tensor], axis: int, which: int, n: int) -> Tensor:
        """Linear interpolation of 16 places at the middles of n."""
        rows = []
        for i in range(n):
            at = min(max((i + 0.5) * 16 / n - 0.5, 0), 15)
            low = min(int(at), 14)
            table = p["places"][which, axis]
            rows.append((low + 1 - at) * table[:, low] + (at - low) * table[:, low + 1])
        return torch.stack(rows)

    def dense(p: dict[str, Tensor], x: Tensor) -> Tensor:
        q, k, v = (linear(p, names[name], x) for name in "qkv")
        encoded = []
        for axis, n in ((0, height), (1, width)):
            a, b, c = (t.mean(2 - axis) for t in (q, k, v))  # [B, n, .]
            a, b = a + places(p, axis, 0, n), b + places(p, axis, 1, n)
            a, b, c = (t.view(B, n, heads, -1).transpose(1, 2) for t in (a, b, c))
            weights = (a @ b.transpose(2, 3) / keys**0.5).softmax(-1)
            encoded.append((weights @ c).transpose(1, 2).reshape(B, n, -1))
        row = norm(p, "encode_row.1", linear(p, "encode_row.0", encoded[0]))
        row = torch.where(row > 0, row, p["encode_row.2.weight"] * row)
        column = linear(p, "encode_column.0", encoded[1])
        out = norm(p, "proj.1", linear(p, "proj.0", v + row[:, :, None] + column[:, None]))
        return torch.where(out > 0, out, p["proj.2.weight"] * out)

    check(block, lambda b, x: b(x), dense, randn(B, height, width, dim))


def test_any2point() -> None:
    torch.manual_seed(0)
    module, dim, heads, width = load("any2point"), 8, 2, 6
    offsets = [0, 12, 21]
    place = 20 * torch.rand(21, dtype=FP64)
    graphs = module.bins(place, torch.tensor(offsets))
    block = module.Any2PointLine(dim, heads, width).double()

    def dense(p: dict[str, Tensor], x: Tensor) -> Tensor:
        n = len(x)
        label = [(int(i >= 12), int(c // 2)) for i, c in enumerate(place.tolist())]
        mask = torch.tensor([[label[i] == label[j] for j in range(n)] for i in range(n)])
        h = F.layer_norm(x, (dim,), p["norm.weight"], p["norm.bias"])
        q, k, v = linear(p, "qkv", h).view(n, 3, heads, -1).permute(1, 2, 0, 3)
        logits = (q @ k.transpose(1, 2) * width**-0.5).masked_fill(~mask, -torch.inf)
        y = x + linear(p, "out", (logits.softmax(-1) @ v).transpose(0, 1).flatten(1))
        every = [(cloud, b) for cloud in (0, 1) for b in range(39)]
        means = []
        for b in every:
            mine = [i for i in range(n) if label[i] == b]
            means.append(y[mine].mean(0) if mine else y.new_zeros(dim))
        pooled = F.gelu(norm(p, "pool.0", torch.stack(means)))
        return torch.stack([pooled[every.index(label[i])] for i in range(n)])

    check(block, lambda b, x: b(x, *graphs), dense, randn(21, dim))


def test_sympoint() -> None:
    torch.manual_seed(0)
    module, dim, planes = load("sympoint"), 16, 8
    corners = 100 * torch.rand(21, 2, dtype=FP64)  # lines from each to the next
    ends = torch.stack([corners[:-1], corners[1:]], 1)
    n, position = len(ends), ends.mean(1)
    graph = connected_neighbors(ends, 3, distance=1e-9)
    block = module.SymPointBlock(dim).double()

    def dense(p: dict[str, Tensor], x: Tensor) -> Tensor:
        mask = torch.zeros(n, n, dtype=torch.bool)
        for i in range(n):
            near = sorted(range(n), key=lambda j: (position[i] - position[j]).norm().item())
            mask[i, near[:3]] = True
            mask[i, max(i - 1, 0) : i + 2] = True
        y = norm(p, "before.1", linear(p, "before.0", x)).relu()
        q, k, v = (linear(p, f"attention.{name}", y) for name in "qkv")
        row, col = mask.nonzero().t()
        d = linear(p, "attention.position.0", position[col] - position[row])
        d = linear(p, "attention.position.3", norm(p, "attention.position.1", d).relu())
        w = norm(p, "attention.logits.0", k[col] - q[row] + d).relu()
        w = norm(p, "attention.logits.3", linear(p, "attention.logits.2", w)).relu()
        w = linear(p, "attention.logits.5", w)
        logits = x.new_full((n, n, dim // planes), -torch.inf).index_put((row, col), w)
        value = x.new_zeros(n, n, dim).index_put((row, col), v[col] + d)
        z = (logits.softmax(1).repeat(1, 1, planes) * value).sum(1)
        z = linear(p, "after.2", norm(p, "after.0", z).relu())
        return (x + norm(p, "after.3", z)).relu()

    check(block, lambda b, x: b(x, position, graph), dense, randn(n, dim))
