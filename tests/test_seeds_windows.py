"""Blocks of windows, sets and chosen tokens beside dense transcriptions of their papers."""

import math
import runpy
from collections.abc import Callable, Sequence

import pytest
import torch
from seed_cases import SEEDS, load
from torch import Tensor, nn
from torch.nn import functional as F

from fastgt.patterns import windows

EDGES = {
    "swin": (7 * 7**2 + 3**2 + 4**2) ** 2,
    "cswin": 2 * 56**2 * 56,
    "maformer": 56**2 * 49,
    "vitpose": 32 * 24 * (16 * 12 + 4),
    "biformer": 56**2 * 64,
    "sparsifiner": 6 * (197 + 196 * 50),
    "swinbert": 784**2 + 50 * 784 + 50 * 51 // 2,
}
NAMES = [*EDGES, "dsvt", "flatformer"]


def made(block: nn.Module, *inputs: Tensor) -> tuple[nn.Module, list[Tensor]]:
    """In float64, with inputs that get gradients."""
    return block.double(), [x.double().requires_grad_() for x in inputs]


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def check(block: nn.Module, inputs: Sequence[Tensor], found: Tensor, right: Tensor) -> None:
    """The same output, and the same gradients of inputs and of all parameters."""
    torch.testing.assert_close(found, right, rtol=1e-11, atol=1e-11)
    names = [f"input {i}" for i in range(len(inputs))] + [n for n, _ in block.named_parameters()]
    leaves = [*inputs, *block.parameters()]
    upstream = draw(*right.shape, seed=9)
    for name, mine, theirs in zip(
        names,
        torch.autograd.grad(found, leaves, upstream),
        torch.autograd.grad(right, leaves, upstream),
        strict=True,
    ):
        torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-10, msg=lambda m, n=name: n + m)
        assert theirs.abs().max() > 1e-6, name


def heads_of(linear: nn.Linear, x: Tensor, heads: int, part: int = 0, parts: int = 1) -> Tensor:
    """A part of a joint projection, ``[H, N, D]``."""
    rows = len(linear.weight) // parts
    y = x @ linear.weight[part * rows : (part + 1) * rows].T
    y = y + linear.bias[part * rows : (part + 1) * rows]
    return y.reshape(len(x), heads, -1).transpose(0, 1)


def dense(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | float = 0.0, scale: float | None = None
) -> Tensor:
    """Softmax attention of all pairs, under a mask that is added: ``[H, N, D] -> [N, H D]``."""
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    weight = (q @ k.transpose(1, 2) * scale + mask).softmax(-1)
    return (weight @ v).transpose(0, 1).flatten(1)


def forbidden(allowed: Tensor) -> Tensor:
    """The mask that is added: 0, and -inf where a pair is not allowed."""
    return torch.zeros(allowed.shape, dtype=torch.float64).masked_fill(~allowed, -math.inf)


def same(label: Tensor) -> Tensor:
    return label[:, None] == label


def window_of(shape: tuple[int, int], size: tuple[int, int]) -> Tensor:
    """The number of each token's window, token by token."""
    across = -(-shape[1] // size[1])
    return torch.tensor(
        [y // size[0] * across + x // size[1] for y in range(shape[0]) for x in range(shape[1])]
    )


@pytest.mark.parametrize("shift", [0, 2])
def test_swin_is_that_of_its_equations(shift):
    shape, window, heads, images = (8, 12), 4, 2, 2
    n, width = shape[0] * shape[1], shape[1]
    block, (x,) = made(load("swin").SwinAttention(8, heads, window, width), draw(images * n, 8))
    graph = windows(shape, window, shift=shift, graphs=images)
    # the grid is rolled, cut into windows and rolled back; regions are those of the released mask
    region = torch.zeros(shape, dtype=torch.int64)
    cuts = (slice(0, -window), slice(-window, -shift or None), slice(-shift or shape[0] * 9, None))
    for a, rows in enumerate(cuts):
        for b, cols in enumerate(cuts):
            region[rows, cols] = 3 * a + b
    label = window_of(shape, (window, window)).view(shape) * 9 + region
    label = label.roll((shift, shift), (0, 1)).flatten()
    place = torch.tensor([(y, z) for y in range(shape[0]) for z in range(width)])
    apart = place[:, None] - place + window - 1  # [N, N, 2]
    number = (apart[..., 0] * (2 * window - 1) + apart[..., 1]).clamp(0, len(block.table) - 1)
    mask = block.table[number].permute(2, 0, 1) + forbidden(same(label))
    outs = []
    for image in x.split(n):
        q, k, v = (heads_of(block.qkv, image, heads, i, 3) for i in range(3))
        outs.append(dense(q, k, v, mask))
    check(block, [x], block(x, graph), F.linear(torch.cat(outs), *block.out.parameters()))


def test_cswin_is_that_of_its_equations():
    shape, stripe, heads, dim = (4, 6), 2, 4, 8
    seed = load("cswin")
    block, (x,) = made(seed.CSWinAttention(dim, heads, shape, stripe), draw(24, dim))
    q, k, v = (heads_of(block.qkv, x, heads, i, 3) for i in range(3))
    parts = []
    for half, size in enumerate([(shape[0], stripe), (stripe, shape[1])]):
        chosen = slice(half * heads // 2, (half + 1) * heads // 2)
        label = window_of(shape, size)
        out = dense(q[chosen], k[chosen], v[chosen], forbidden(same(label)))
        grid = v[chosen].transpose(0, 1).flatten(1)  # [N, C / 2]
        for number in label.unique():
            inside = (label == number).nonzero().flatten()
            image = grid[inside].T.reshape(1, dim // 2, *size)
            conv = block.conv[half]
            near = F.conv2d(image, conv.weight, conv.bias, padding=1, groups=dim // 2)
            out = out.index_add(0, inside, near[0].flatten(1).T)
        parts.append(out)
    right = F.linear(torch.cat(parts, 1), *block.out.parameters())
    check(block, [x], block(x, seed.pattern(shape, stripe)), right)


def test_maformer_is_that_of_its_equations():
    shape, heads, images = (4, 6), 2, 2
    seed = load("maformer")
    block, (x,) = made(seed.MAFormerAttention(8, heads, 24, 3), draw(48, 8))
    outs = []
    for image in x.split(24):
        q, k, v = (heads_of(block.qkv, image, heads, i, 3) for i in range(3))
        local = dense(q, k, v, forbidden(same(window_of(shape, (2, 3)))))
        few = block.down.weight @ image + block.down.bias[:, None]
        k, v = (heads_of(block.key_value, few, heads, i, 2) for i in range(2))
        outs.append(local + dense(heads_of(block.query, local, heads), k, v))
    right = F.linear(torch.cat(outs), *block.out.parameters())
    check(block, [x], block(x, windows(shape, (2, 3), graphs=images)), right)


@pytest.mark.parametrize("shift", [(0, 0), (2, 1)])
def test_vitpose_is_that_of_its_equations(shift):
    shape, size, heads = (8, 6), (4, 3), 2
    seed = load("vitpose")
    block, (x,) = made(seed.ViTPoseAttention(8, heads), draw(48, 8))
    graph, window = seed.pattern(shape, size, shift)
    larger = shape[0] + size[0], shape[1] + size[1]  # the first windows begin before the grid
    label = window_of(larger, size).view(larger)
    rows, cols = (size[0] - shift[0], size[1] - shift[1])
    label = label[rows : rows + shape[0], cols : cols + shape[1]].flatten()
    inside = label.unique()[:, None] == label  # [W, N]
    means = (inside.double() / inside.sum(1, keepdim=True)) @ x
    keys = torch.cat([x, means])
    k, v = (heads_of(block.key_value, keys, heads, i, 2) for i in range(2))
    allowed = torch.cat([same(label), torch.ones(48, len(inside), dtype=torch.bool)], 1)
    out = dense(heads_of(block.query, x, heads), k, v, forbidden(allowed))
    right = F.linear(out, *block.out.parameters())
    check(block, [x], block(x, graph, window), right)
    assert len(inside) == (9 if any(shift) else 4)


def voxels(n: int, most: int) -> Tensor:
    """Places of n voxels on a grid of that many each way, not in order."""
    chosen = torch.randperm(most * most, generator=torch.Generator().manual_seed(4))[:n]
    return torch.stack([chosen // most, chosen % most], 1)


def in_windows(at: Tensor, window: int, axis: int) -> list[list[int]]:
    """The voxels of every window that has some, in order along an axis."""
    found: dict[tuple[int, int], list[int]] = {}
    for i, (x, y) in enumerate(at.tolist()):
        found.setdefault((x // window, y // window), []).append(i)
    key: Callable[[int], tuple[int, int]] = lambda i: (int(at[i, axis]), int(at[i, 1 - axis]))  # noqa: E731
    return [sorted(found[place], key=key) for place in sorted(found)]


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("size", [2, 3, 8, 30])
def test_dsvt_is_that_of_its_equations(size, axis):
    seed, heads, n = load("dsvt"), 2, 60
    block, (x, e) = made(seed.DSVTAttention(8, heads), draw(n, 8), draw(n, 8, seed=1))
    at, out = voxels(n, 10), torch.zeros(n, 8, dtype=torch.float64)
    q, k = (heads_of(block.query_key, x + e, heads, i, 2) for i in range(2))
    v, copies = heads_of(block.value, x, heads), 0
    for inside in in_windows(at, 5, axis):
        sets = math.ceil(len(inside) / size)
        done: set[int] = set()
        for j in range(sets):
            places = [(j * size + p) * len(inside) // (sets * size) for p in range(size)]
            members = [inside[p] for p in places]
            # the released mask of a key that is the one before it
            twice = [p > 0 and members[p] == members[p - 1] for p in range(size)]
            mask = forbidden(~torch.tensor(twice))
            found = dense(q[:, members], k[:, members], v[:, members], mask)
            assert not done & set(members), "a voxel is in one set"
            done |= set(members)
            copies += sum(twice)
            first = [p for p in range(size) if not twice[p]]
            out = out.index_add(0, torch.tensor([members[p] for p in first]), found[first])
        assert done == set(inside)
    right = F.linear(out, *block.out.parameters())
    check(block, [x, e], block(x, e, seed.pattern(at, 5, size, axis)), right)
    assert copies > 0


@pytest.mark.parametrize("group", [7, 12, 30, 31, 40])
@pytest.mark.parametrize("axis", [0, 1])
def test_flatformer_is_that_of_its_equations(group, axis):
    seed, heads, n = load("flatformer"), 2, 30
    block, (x, e) = made(seed.FlatFormerAttention(8, heads, group), draw(n, 8), draw(n, 8, seed=1))
    at, out = voxels(n, 9), torch.zeros(n, 8, dtype=torch.float64)
    order = [i for inside in in_windows(at, 3, axis) for i in inside]
    q, k = (heads_of(block.query_key, x + e, heads, i, 2) for i in range(2))
    v = heads_of(block.value, x, heads)
    for begin in range(0, n, group):
        rows = order[begin : begin + group]
        keys = order[max(0, n - group) :] if len(rows) < group else rows
        found = dense(q[:, rows], k[:, keys], v[:, keys])
        out = out.index_add(0, torch.tensor(rows), found)
    right = F.linear(out, *block.out.parameters())
    check(block, [x, e], block(x, e, seed.sort(at, 3, axis)), right)


@pytest.mark.parametrize("k_best", [1, 2, 4])
def test_biformer_is_that_of_its_equations(k_best):
    shape, heads, dim = (4, 6), 2, 8
    block, (x,) = made(
        load("biformer").BiFormerAttention(dim, heads, shape, 2, k_best), draw(24, dim)
    )
    q, k, v = (heads_of(block.qkv, x, heads, i, 3) for i in range(3))
    label = window_of(shape, (2, 3))
    means = [torch.stack([t[:, label == r].mean(1).flatten() for r in range(4)]) for t in (q, k)]
    best = (means[0] @ means[1].T).topk(k_best).indices
    allowed = (label == best[label][..., None]).any(1)  # [N, N]
    assert int(allowed.sum()) == 24 * 6 * k_best
    out = dense(q, k, v, forbidden(allowed), scale=dim**-0.5)
    image = v.transpose(0, 1).flatten(1).T.reshape(1, dim, *shape)
    near = F.conv2d(image, block.conv.weight, block.conv.bias, padding=2, groups=dim)
    right = F.linear(out + near[0].flatten(1).T, *block.out.parameters())
    check(block, [x], block(x), right)


@pytest.mark.parametrize("threshold", [0.0, 0.01])
def test_sparsifiner_is_that_of_its_equations(threshold):
    n, heads, dim, kept = 11, 3, 12, 4
    seed = load("sparsifiner")
    block, (x,) = made(seed.SparsifinerAttention(dim, heads, n, kept, 5, threshold), draw(n, dim))
    q, k, v = (heads_of(block.qkv, x, heads, i, 3) for i in range(3))
    outs, guesses = [], []
    for h in range(heads):
        low_q = F.linear(q[h], *block.narrow_q.parameters())
        low_k = F.linear(k[h], *block.narrow_k.parameters())
        coefficient = (low_q @ (low_k.T @ block.mix) / math.sqrt(heads)).softmax(-1)
        size = block.basis.abs()
        guess = coefficient[1:] @ torch.where(size > threshold, size, 0.0).T
        allowed = torch.zeros(n, n, dtype=torch.bool)
        allowed[0] = True
        for i in range(1, n):
            allowed[i, guess[i - 1].topk(kept).indices] = True
        outs.append(dense(*(t[h : h + 1] for t in (q, k, v)), forbidden(allowed)))
        guesses.append(guess)
    found, guess = block(x)
    right = F.linear(torch.cat(outs, 1), *block.out.parameters())
    # the loss on the guess is what the choice learns from
    found, right = (
        torch.cat([out.flatten(), 100 * y.flatten()])
        for out, y in ((found, guess), (right, torch.stack(guesses)))
    )
    check(block, [x], found, right)


def test_the_choice_of_sparsifiner_has_no_gradient():
    block, (x,) = made(load("sparsifiner").SparsifinerAttention(12, 3, 11, 4, 5, 0.0), draw(11, 12))
    block(x)[0].sum().backward()
    without = {name for name, parameter in block.named_parameters() if parameter.grad is None}
    assert without == {
        "mix",
        "basis",
        *(f"narrow_{x}.{part}" for x in "qk" for part in ("weight", "bias")),
    }


@pytest.mark.parametrize("hard", [False, True])
def test_swinbert_is_that_of_its_equations(hard):
    words, video, heads = 5, 9, 2
    n = words + video
    seed = load("swinbert")
    block, (x,) = made(seed.SwinBERTAttention(8, heads, video), draw(n, 8))
    with torch.no_grad():  # where a float64 of e^-10^4 is not 0
        block.mask.copy_(8 + 2 * draw(video, video, seed=5))
    learned = block.mask
    kept = draw(video, video, seed=6) > 0
    if hard:  # all that is kept is kept in full
        learned = torch.where(kept, math.inf, -math.inf) + 0 * block.mask.detach()
        with torch.no_grad():
            block.mask.fill_(math.inf)
    one = torch.eye(video, dtype=torch.float64)
    soft = one + (1 - one) * learned.sigmoid()
    m = torch.zeros(n, n, dtype=torch.float64)
    for i in range(words):
        m[i, : i + 1] = 1
        m[i, words:] = 1
    m = torch.cat([m[:words], torch.cat([m[words:, :words], soft], 1)])
    q, k, v = (heads_of(block.qkv, x, heads, i, 3) for i in range(3))
    right = F.linear(dense(q, k, v, (1 - m) * -1e4), *block.out.parameters())
    found = block(x, seed.pattern(words, video, kept if hard else None))
    if hard:
        block.mask.requires_grad_(False)
        leaves = [x, *(p for p in block.parameters() if p.requires_grad)]
        torch.testing.assert_close(found, right, rtol=1e-11, atol=1e-11)
        grads = (torch.autograd.grad(y.square().sum(), leaves) for y in (found, right))
        torch.testing.assert_close(*grads, rtol=1e-10, atol=1e-10)
    else:
        check(block, [x], found, right)


@pytest.mark.parametrize("name", NAMES)
def test_the_paper_s_size(name):
    graph, heads, width = load(name).paper_size()
    assert heads * width <= 1024
    if name in EDGES:
        assert graph.num_edges == EDGES[name]
    assert int(graph.row_degree.min()) > 0


def test_sets_of_dsvt_and_groups_of_flatformer_at_the_paper_s_size():
    sets, groups = (load(name).paper_size()[0] for name in ("dsvt", "flatformer"))
    assert sets.num_rows == groups.num_rows > 20_000
    assert int(sets.row_degree.max()) <= 36
    assert set(groups.row_degree.tolist()) == {69}
    assert groups.num_graphs == math.ceil(groups.num_rows / 69)


@pytest.mark.parametrize("name", NAMES)
def test_an_example_says_one_line(name, capsys):
    runpy.run_path(str(SEEDS / f"{name}.py"), run_name="__main__")
    said = capsys.readouterr().out
    assert said.count("\n") == 1
    assert "->" in said
