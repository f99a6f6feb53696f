"""Seeds with linear attention, masked heads, few tokens or ragged batches, by their equations."""

import itertools
import math
import runpy

import pytest
import torch
from seed_cases import SEEDS, Weights, attention, centred, check, drawn, gelu, load, same
from torch import Tensor, nn

from fastgt import Graph

OPERATORS = {
    "ecoformer": "linear_attention",
    "shiftaddvit": "linear_attention",
    "t2t": "linear_attention",
    "ed_vit": "global_attention",
    "dhvt": "scaled_dot_product_attention",
    "crossvit": "scaled_dot_product_attention",
    "pvt": "scaled_dot_product_attention",
    "cvt": "scaled_dot_product_attention",
    "lookupvit": "global_attention",
    "uniformerv2": "global_attention",
    "isomer": "global_attention",
    "facexformer": "scaled_dot_product_attention",
    "fashionformer": "scaled_dot_product_attention",
    "hot": "scaled_dot_product_attention",
    "dvpt": "scaled_dot_product_attention",
    "vmformer": "scaled_dot_product_attention",
    "eco_m2f": "neighborhood_attention",
    "postometro": "neighborhood_attention",
    "nvist": "scaled_dot_product_attention",
    "mv_adapter": "global_attention",
    "tnt": "global_attention",
    "vdt": "global_attention",
    "channelvit": "global_attention",
    "adaformer": "channelwise_attention",
}
# of the pattern at the paper's size: rows, columns, edges
SIZES = {
    "ecoformer": (3136, 3136, 3136**2),
    "shiftaddvit": (3136, 3136, 3136**2),
    "t2t": (3136, 3136, 3136**2),
    "ed_vit": (197, 197, 197**2),
    "dhvt": (203, 203, 203**2),
    "crossvit": (1, 401, 401),
    "pvt": (3136, 49, 3136 * 49),
    "cvt": (197, 50, 197 * 50),
    "lookupvit": (25, 196, 25 * 196),
    "uniformerv2": (1, 1576, 1576),
    "isomer": (1024, 242, 1024 * 121),
    "facexformer": (3136, 18, 3136 * 18),
    "fashionformer": (100, 100, 100**2),
    "hot": (243, 81, 243 * 81),
    "dvpt": (10, 197, 1970),
    "vmformer": (5, 5, 25),
    "eco_m2f": (100, 128**2, 100 * 32**2),
    "postometro": (445, 445, 14 * 445 + 431 * (14 + 7)),
    "nvist": (468, 197, 468 * 197),
    "mv_adapter": (6 * 48**2, 6 * 48**2, 48 * (6 * 48) ** 2),
    "tnt": (196 * 16, 196 * 16, 196 * 16**2),
    "vdt": (16 * 256, 16 * 256, 256 * 16**2),
    "channelvit": (1569, 1569, 1569**2),
    "adaformer": (1024, 1024, 1024 * 32),
}


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


@pytest.mark.parametrize("stem", OPERATORS)
def test_sizes_are_those_of_the_paper(stem: str) -> None:
    module = load(stem)
    graph, heads, width = module.paper_size()
    assert isinstance(graph, Graph)
    assert (graph.num_rows, graph.num_cols, graph.num_edges) == SIZES[stem]
    assert heads >= 1
    assert 1 <= width <= 256
    assert OPERATORS[stem] == module.OPERATOR
    assert module.PATTERN
    assert "arXiv" in module.__doc__


@pytest.mark.parametrize("stem", OPERATORS)
def test_scripts_print_one_line(stem: str, capsys: pytest.CaptureFixture[str]) -> None:
    runpy.run_path(str(SEEDS / f"{stem}.py"), run_name="__main__")
    assert capsys.readouterr().out.count("\n") == 1


@pytest.mark.parametrize("stem", ["ecoformer", "t2t", "isomer"])
def test_an_image_without_tokens_changes_nothing(stem: str) -> None:
    module = load(stem)
    name = {"ecoformer": "EcoFormerAttention", "t2t": "T2TPerformer", "isomer": "IsomerScatter"}
    sizes = {"ecoformer": (12, 3), "t2t": (12,), "isomer": (12, 3, 4)}
    block, x = getattr(module, name[stem])(*sizes[stem]).double(), normal(14, 12)
    found, expected = (block(x, torch.tensor(y)) for y in ([0, 5, 5, 14], [0, 5, 14]))
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


class Sign(torch.autograd.Function):
    """-1 or 1, whose gradient is that of a clamp to [-1, 1]."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return torch.where(x > 0, 1.0, -1.0).to(x.dtype)

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        return grad * ((x >= -1) & (x <= 1))


def test_ecoformer() -> None:
    offsets = [0, 5, 14]
    block = drawn(load("ecoformer").EcoFormerAttention(12, 3, bits=6, anchors=4))
    w = Weights(block)

    def literal(x: Tensor) -> Tensor:
        (qk,), (v,) = w.heads("qk", x, 3), w.heads("v", x, 3)
        rows = torch.zeros(14, 3, 4, dtype=x.dtype)
        for start, end in itertools.pairwise(offsets):
            for h in range(3):
                z = qk[start:end, h] / qk[start:end, h].norm(dim=1, keepdim=True)
                d = (z[:, None] - w.of["anchors"][h]).square().sum(2)
                kernel = torch.exp(-d / (2 * d.mean())) - w.of["mean"][h]
                c = Sign.apply(kernel @ w.of["hash"][h].mT)
                weights = c @ c.mT + 6 + 1
                assert bool((weights > 0).all())
                out = weights / weights.sum(1, keepdim=True) @ v[start:end, h]
                rows[start:end, h] = out
        return w.linear("out", rows.flatten(1))

    check(block, lambda x: block(x, torch.tensor(offsets)), literal, normal(14, 12))


class Binary(torch.autograd.Function):
    """0 or 1, whose gradient is that of a clamp to [0, 1]."""

    @staticmethod
    def forward(ctx, x, threshold):
        ctx.save_for_backward(x)
        return (x > threshold).to(x.dtype)

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        return grad * ((x >= 0) & (x <= 1)), None


def test_shiftaddvit() -> None:
    block = drawn(load("shiftaddvit").ShiftAddViTAttention(12, 3, kernel=5))
    w = Weights(block)

    def literal(x: Tensor) -> Tensor:
        images = []
        for image in x:
            q, k, v = w.heads("qkv", image, 3, 3)
            q, k = (z / z.norm(dim=2, keepdim=True) for z in (q, k))
            b, c = (Binary.apply(z, z.mean()) for z in (q, k))
            heads = []
            for h in range(3):
                y = v[:, h] / 2 + (b[:, h] @ c[:, h].mT) @ v[:, h] / math.pi
                y = y / y.norm(dim=1, keepdim=True)
                padded = torch.cat([v.new_zeros(2, 4), v[:, h], v.new_zeros(2, 4)])
                taps = w.of["conv.weight"][h, 0, :, 0]
                y = y + sum(taps[t] * padded[t : t + len(image)] for t in range(5))
                heads.append(y)
            images.append(w.linear("out", torch.cat(heads, 1)))
        return torch.stack(images)

    check(block, block, literal, normal(2, 7, 12))


def test_shiftaddvit_gives_an_image_the_same_whatever_lies_beside_it() -> None:
    block = drawn(load("shiftaddvit").ShiftAddViTAttention(12, 3))
    x = normal(2, 7, 12)
    x[1] += 5
    torch.testing.assert_close(block(x)[0], block(x[:1])[0], rtol=1e-12, atol=1e-12)


def test_t2t() -> None:
    offsets = [0, 5, 14]
    block = drawn(load("t2t").T2TPerformer(10, 8, features=6))
    w = Weights(block)

    def phi(x: Tensor) -> Tensor:
        logits = torch.einsum("nd,md->nm", x, w.of["w"]) - x.square().sum(1, keepdim=True) / 2
        return logits.exp() / math.sqrt(6)

    def literal(x: Tensor) -> Tensor:
        kqv = w.linear("kqv", w.norm("norm", x))
        k, q, v = kqv[:, :8], kqv[:, 8:16], kqv[:, 16:]
        weights = phi(q) @ phi(k).mT * same(offsets)
        y = weights @ v / (weights.sum(1, keepdim=True) + 1e-8)
        return v + w.linear("out", y)

    check(block, lambda x: block(x, torch.tensor(offsets)), literal, normal(14, 10))


def test_t2t_draws_rows_that_are_orthogonal_and_as_long_as_the_authors_are() -> None:
    w = load("t2t").T2TPerformer(10).w
    torch.testing.assert_close(w @ w.mT, 32 * torch.eye(32), rtol=0, atol=1e-4)


def test_ed_vit() -> None:
    offsets, mask = [0, 5, 14], torch.tensor([True, False, True])
    block = load("ed_vit").EDViTAttention(12, mask).double()
    w = Weights(block)

    def literal(x: Tensor) -> Tensor:
        q, k, v = w.heads("qkv", x, 3, 3)
        heads = attention(q, k, v, same(offsets)).unflatten(1, (3, 4))
        return w.linear("out", (heads * mask[:, None]).flatten(1))

    check(block, lambda x: block(x, torch.tensor(offsets)), literal, normal(14, 12))


def test_ed_vit_reads_nothing_of_masked_heads() -> None:
    block = load("ed_vit").EDViTAttention(12, torch.tensor([True, False, True])).double()
    x, offsets = normal(14, 12), torch.tensor([0, 5, 14])
    expected = block(x, offsets)
    with torch.no_grad():
        block.qkv.weight.view(3, 3, 4, 12)[:, 1] = math.nan
        block.out.weight[:, 4:8] = math.nan
    assert torch.equal(block(x, offsets), expected)


def test_dhvt() -> None:
    block = drawn(load("dhvt").DHVTAttention(12, 3))
    w = Weights(block)

    def literal(x: Tensor) -> Tensor:
        images = []
        for image in x:
            tokens = []
            for h in range(3):
                token = w.linear("token", image[:, 4 * h : 4 * h + 4].mean(0))
                token = [gelu(w.norm("norm", token[4 * i : 4 * i + 4])) for i in range(3)]
                tokens.append(torch.cat(token) + w.of["position"][h])
            z = torch.cat([image, torch.stack(tokens)])
            q, k, v = w.heads("qkv", z, 3, 3)
            z = w.linear("out", attention(q, k, v))
            images.append(torch.cat([(z[0] + z[-3:].mean(0))[None], z[1:-3]]))
        return torch.stack(images)

    check(block, block, literal, normal(2, 7, 12))


def test_crossvit() -> None:
    block = drawn(load("crossvit").CrossViTFusion(12, 8, 2))
    w = Weights(block)

    def project(name: str, x: Tensor) -> Tensor:
        return w.linear(f"{name}.2", gelu(w.norm(f"{name}.0", x)))

    def literal(x: Tensor, other: Tensor) -> Tensor:
        images = []
        for image, patches in zip(x, other, strict=True):
            token = project("there", image[:1])
            z = w.norm("norm", torch.cat([token, patches[1:]]))
            (q,), (k, v) = w.heads("q", z[:1], 2), w.heads("kv", z, 2, 2)
            token = token + w.linear("out", attention(q, k, v))
            images.append(torch.cat([project("back", token), image[1:]]))
        return torch.stack(images)

    check(block, block, literal, normal(2, 5, 12), normal(2, 7, 8))


@pytest.mark.parametrize("reduction", [1, 2])
def test_pvt(reduction: int) -> None:
    block = drawn(load("pvt").PVTAttention(12, 3, reduction=reduction))
    w = Weights(block)

    def reduced(image: Tensor) -> Tensor:
        """[h, w, C] -> [n, C], patch by patch."""
        if reduction == 1:
            return image.flatten(0, 1)
        keys = []
        for i in range(0, image.shape[0], 2):
            for j in range(0, image.shape[1], 2):
                patch = image[i : i + 2, j : j + 2]
                key = torch.einsum("ijc,dcij->d", patch, w.of["reduce.weight"])
                keys.append(key + w.of["reduce.bias"])
        return w.norm("norm", torch.stack(keys))

    def literal(x: Tensor) -> Tensor:
        images = []
        for image in x:
            (q,), (k, v) = w.heads("q", image.flatten(0, 1), 3), w.heads("kv", reduced(image), 3, 2)
            images.append(w.linear("out", attention(q, k, v)).view_as(image))
        return torch.stack(images)

    check(block, block, literal, normal(2, 4, 6, 12))


def test_cvt() -> None:
    block = drawn(load("cvt").CvTAttention(12, 3))
    w = Weights(block)

    def convolved(i: int, x: Tensor, stride: int) -> Tensor:
        """[G, h, w, C] -> [G, n, C], a depthwise 3 x 3 and a batch norm in training."""
        graphs, height, width, dim = x.shape
        padded = x.new_zeros(graphs, height + 2, width + 2, dim)
        padded[:, 1:-1, 1:-1] = x
        taps = w.of[f"convs.{i}.0.weight"][:, 0]  # [C, 3, 3]
        y = torch.stack(
            [
                torch.einsum("gijc,cij->gc", padded[:, a : a + 3, b : b + 3], taps)
                for a in range(0, height, stride)
                for b in range(0, width, stride)
            ],
            1,
        )
        y = y - y.mean((0, 1))
        y = y / (y.square().mean((0, 1)) + 1e-5).sqrt()
        return y * w.of[f"convs.{i}.1.weight"] + w.of[f"convs.{i}.1.bias"]

    def literal(token: Tensor, x: Tensor) -> Tensor:
        parts = []
        for i, stride in enumerate((1, 2, 2)):
            y = torch.cat([token, convolved(i, x, stride)], 1)
            parts.append([w.heads(f"projections.{i}", z, 3)[0] for z in y])
        rows = zip(*parts, strict=True)
        return torch.stack([w.linear("out", attention(*row, scale=12**-0.5)) for row in rows])

    check(block, block, literal, normal(2, 1, 12), normal(2, 4, 6, 12))


def test_lookupvit() -> None:
    few_offsets, offsets = [0, 2, 5], [0, 5, 14]
    block = drawn(load("lookupvit").LookupViTAttention(12, 3))
    w = Weights(block)

    def literal(few: Tensor, many: Tensor) -> tuple[Tensor, Tensor]:
        (q,), (k, v) = w.heads("q", few, 3), w.heads("kv", many, 3, 2)
        allowed = same(few_offsets, offsets)
        logits = torch.einsum("nhd,mhd->hnm", q, k) / 2
        gather = logits.masked_fill(~allowed, -math.inf).softmax(2)
        few = few + w.linear("out", torch.einsum("hnm,mhd->nhd", gather, v).flatten(1))
        few = few + w.linear(
            "out_self", attention(*w.heads("qkv", few, 3, 3), allowed=same(few_offsets))
        )
        back = logits.masked_fill(~allowed, -math.inf).softmax(1)
        (v,) = w.heads("v_back", few, 3)
        many = many + w.linear("out_back", torch.einsum("hnm,nhd->mhd", back, v).flatten(1))
        return few, many

    ends = torch.tensor(few_offsets), torch.tensor(offsets)
    call = lambda few, many: block(few, ends[0], many, ends[1])  # noqa: E731
    check(block, call, literal, normal(5, 12), normal(14, 12))


def test_uniformerv2() -> None:
    offsets = [0, 5, 14]
    module = load("uniformerv2")
    token, x = normal(2, 12), normal(14, 12)
    fresh = module.UniFormerV2Global(12, 3).double()
    assert torch.equal(fresh(token, x, torch.tensor(offsets)), token)
    block = drawn(fresh)
    w = Weights(block)

    def literal(token: Tensor, x: Tensor) -> Tensor:
        (q,) = w.heads("q", w.norm("norm", token), 3)
        k, v = w.heads("kv", w.norm("norm_x", x), 3, 2)
        return token + w.linear("out", attention(q, k, v, same([0, 1, 2], offsets)))

    check(block, lambda t, x: block(t, x, torch.tensor(offsets)), literal, token, x)


def test_isomer() -> None:
    offsets = [0, 6, 14, 18]
    block = drawn(load("isomer").IsomerScatter(12, 3, 4, threshold=0.55))
    w = Weights(block)

    def literal(x: Tensor) -> Tensor:
        rows = []
        for start, end in itertools.pairwise(offsets):
            image = x[start:end]
            heat = 1 / (1 + torch.exp(-w.linear("heat", image)))
            found = list(image)
            for side, share in ((0, heat), (1, 1 - heat)):
                y = share * image
                tokens = torch.einsum("nk,nc->kc", w.linear(f"maps.{side}", y), y)
                (q,), (k, v) = w.heads(f"q.{side}", image, 3), w.heads(f"kv.{side}", tokens, 3, 2)
                new = w.norm(f"norm.{side}", image + w.linear(f"out.{side}", attention(q, k, v)))
                for i in range(len(image)):
                    if share[i] >= 0.55 if side == 0 else heat[i] < 1 - 0.55:
                        found[i] = new[i]
            rows += found
        return torch.stack(rows)

    x = normal(18, 12)
    with torch.no_grad():  # image 2 is all foreground
        x[14:] = 0.1 * x[14:] + 3 * block.heat.weight
        heat = block.heat(x).sigmoid()
    assert bool((heat[14:] > 0.55).all())
    assert 0 < int(((heat >= 0.45) & (heat < 0.55)).sum()) < 10
    assert bool((heat[:14] < 0.45).any())
    check(block, lambda x: block(x, torch.tensor(offsets)), literal, x)


@pytest.mark.parametrize("first", [False, True])
def test_facexformer(first: bool) -> None:
    block = drawn(load("facexformer").FaceXFormerLayer(12, 3, 10, first=first))
    w = Weights(block)

    def attend(name: str, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        parts = zip("qkv", (q, k, v), strict=True)
        rows = [w.heads(f"{name}.{letter}", x, 3)[0] for letter, x in parts]
        return w.linear(f"{name}.out", attention(*rows))

    def literal(t: Tensor, x: Tensor, e: Tensor, p: Tensor) -> tuple[Tensor, Tensor]:
        tokens, faces = [], []
        for u, y, f in zip(t, x, e, strict=True):
            u = attend("own", u, u, u) if first else u + attend("own", u + f, u + f, u)
            u = w.norm("norms.0", u)
            u = w.norm("norms.1", u + attend("ask", u + f, y + p, y))
            u = w.norm("norms.2", u + w.linear("mlp.2", w.linear("mlp.0", u).clamp(min=0)))
            tokens.append(u)
            faces.append(w.norm("norms.3", y + attend("tell", y + p, u + f, u)))
        return torch.stack(tokens), torch.stack(faces)

    tokens = normal(2, 4, 12), normal(2, 7, 12), normal(2, 4, 12), normal(7, 12)
    check(block, block, literal, *tokens)


def test_fashionformer() -> None:
    block = drawn(load("fashionformer").FashionformerStage(12, 3, 6))
    w, mask = Weights(block), normal(2, 5, 7)

    def sigmoid(x: Tensor) -> Tensor:
        return 1 / (1 + torch.exp(-x))

    def literal(u: Tensor, x: Tensor) -> Tensor:
        images = []
        for g in range(2):
            gathered = x.new_zeros(5, 12)
            for i, j in itertools.product(range(5), range(7)):
                if mask[g, i, j] > 0:
                    gathered[i] += x[g, j]
            own, new = w.linear("query", u[g]), w.linear("mask", gathered)
            z = own[:, :6] * new[:, :6]
            keep, take = w.linear("gates.0", z), w.linear("gates.1", z)
            y = sigmoid(w.norm("norms.0", take)) * w.norm("norms.1", new[:, 6:])
            y = y + sigmoid(w.norm("norms.2", keep)) * w.norm("norms.3", own[:, 6:])
            y = w.norm("update.1", w.linear("update.0", y)).clamp(min=0)
            attended = attention(*w.heads("qkv", y, 3, 3))
            images.append(w.norm("norm", y + w.linear("out", attended)))
        return torch.stack(images)

    check(block, lambda u, x: block(u, x, mask), literal, normal(2, 5, 12), normal(2, 7, 12))


def test_hot_recovers_all_frames() -> None:
    block = drawn(load("hot").HoTRecovery(12, 3, 9))
    w = Weights(block)

    def literal(y: Tensor) -> Tensor:
        (q,) = w.heads("q", w.of["tokens"], 3)
        clips = [attention(q, *w.heads("kv", clip, 3, 2)) for clip in y]
        return torch.stack([w.of["tokens"] + w.linear("out", clip) for clip in clips])

    check(block, block, literal, normal(2, 4, 12))


def test_hot_keeps_the_peaks_of_density() -> None:
    x = normal(2, 9, 6)
    found = load("hot").kept_frames(x, 4, nearest=3)
    for clip, kept in zip(x, found, strict=True):
        d = [[((a - b).square().sum() / 6).sqrt().item() for b in clip] for a in clip]
        rho = [math.exp(-sum(y * y for y in sorted(row)[:3]) / 3) for row in d]
        largest = max(max(row) for row in d)
        scores = []
        for i in range(9):
            denser = [d[i][j] for j in range(9) if rho[j] > rho[i]]
            scores.append(rho[i] * min(denser, default=largest))
        expected = sorted(sorted(range(9), key=lambda i: -scores[i])[:4])
        assert kept.tolist() == expected


def test_dvpt() -> None:
    block = drawn(load("dvpt").DVPTPrompts(12, 6, 3, 4))
    w = Weights(block)

    def literal(x: Tensor) -> Tensor:
        images = []
        for image in x:
            (q,) = w.heads("q", w.of["prompts"], 3)
            k, v = w.heads("kv", gelu(w.linear("down", image)), 3, 2)
            prompts = w.of["prompts"] + w.linear("out", attention(q, k, v))
            images.append(torch.cat([image, w.linear("up", prompts)]))
        return torch.stack(images)

    check(block, block, literal, normal(2, 7, 12))


def test_vmformer() -> None:
    block = drawn(load("vmformer").VMFormerLayer(12, 3, nn.Linear(12, 12)))
    w = Weights(block)

    def literal(u: Tensor, e: Tensor) -> Tensor:
        clips = []
        for clip in u:
            frames, found = [], []
            for frame in clip:
                q, k = w.heads("qk", frame + e, 3, 2)
                (v,) = w.heads("v", frame, 3)
                frames.append(w.norm("norm_own", frame + w.linear("out", attention(q, k, v))))
                found.append(w.linear("sample", frames[-1] + e))
            weights = [torch.exp(w.linear("time", d)) for d in found]
            whole = sum(a * d for a, d in zip(weights, found, strict=True)) / sum(weights)
            pairs = zip(frames, found, strict=True)
            clips.append(torch.stack([w.norm("norm", x + d + whole) for x, d in pairs]))
        return torch.stack(clips)

    check(block, block, literal, normal(2, 3, 5, 12), normal(5, 12))


def test_eco_m2f() -> None:
    module = load("eco_m2f")
    masks = normal(3, 5), normal(2, 6)
    masks[0][1] = -1.0  # of nothing
    block = drawn(module.ECOM2FMaskedAttention(12, 3))
    w, graph = Weights(block), module.masked(masks)
    allowed = torch.zeros(5, 11, dtype=torch.bool)
    allowed[:3, :5], allowed[3:, 5:] = masks[0] >= 0, masks[1] >= 0
    allowed[1, :5] = True
    assert graph.num_edges == int(allowed.sum()) < 27

    def literal(u: Tensor, x: Tensor, e: Tensor, p: Tensor) -> Tensor:
        rows = w.heads("q", u + e, 3)[0], w.heads("k", x + p, 3)[0], w.heads("v", x, 3)[0]
        return w.norm("norm", u + w.linear("out", attention(*rows, allowed)))

    inputs = normal(5, 12), normal(11, 12), normal(5, 12), normal(11, 12)
    check(block, lambda *x: block(*x, graph), literal, *inputs)


def test_postometro() -> None:
    module = load("postometro")
    mesh = torch.tensor([[0, 1, 1, 2], [1, 0, 2, 1]])
    graph = Graph.batch([module.body(2, mesh), module.body(2, mesh)])
    own = torch.ones(5, 5, dtype=torch.bool)
    own[2, 4] = own[4, 2] = False  # vertices 0 and 2
    assert graph.num_edges == 2 * 23
    block = drawn(module.PostoMETROLayer(12, 3))
    w, offsets = Weights(block), [0, 4, 10]

    def literal(u: Tensor, y: Tensor) -> Tensor:
        attended = attention(*w.heads("qkv", u, 3, 3), allowed=torch.block_diag(own, own))
        u = w.norm("norm_own", u + w.linear("out_own", attended))
        (q,), (k, v) = w.heads("q", u, 3), w.heads("kv", y, 3, 2)
        return w.norm("norm", u + w.linear("out", attention(q, k, v, same([0, 5, 10], offsets))))

    call = lambda u, y: block(u, y, graph, torch.tensor(offsets))  # noqa: E731
    check(block, call, literal, normal(10, 12), normal(10, 12))


def test_nvist() -> None:
    block = drawn(load("nvist").NViSTLayer(12, 3, 4))
    w = Weights(block)

    def literal(u: Tensor, y: Tensor, c: Tensor) -> Tensor:
        images = []
        for tokens, image, camera in zip(u, y, c, strict=True):
            change = w.linear("camera", camera).reshape(3, 2, 12)
            (q,) = w.heads("q", centred(tokens) * (1 + change[0, 0]) + change[0, 1], 3)
            tokens = tokens + w.linear("out", attention(q, *w.heads("kv", image, 3, 2)))
            own = centred(tokens) * (1 + change[1, 0]) + change[1, 1]
            tokens = tokens + w.linear("out_own", attention(*w.heads("qkv", own, 3, 3)))
            last = centred(tokens) * (1 + change[2, 0]) + change[2, 1]
            images.append(tokens + w.linear("mlp.2", gelu(w.linear("mlp.0", last))))
        return torch.stack(images)

    check(block, block, literal, normal(2, 5, 12), normal(2, 7, 12), normal(2, 4))


def test_mv_adapter() -> None:
    views, shape = torch.tensor([2, 1]), (2, 3)
    block = drawn(load("mv_adapter").MVAdapterAttention(12, 3))
    w = Weights(block)
    # object, view, row of every pixel
    of = [(0, 0, r) for r in (0, 0, 0, 1, 1, 1)]
    of += [(0, 1, r) for _, _, r in of] + [(1, 2, r) for _, _, r in of]
    view, row, reference = (torch.zeros(18, n, dtype=torch.bool) for n in (18, 18, 8))
    for i, (a, b, c) in enumerate(of):
        reference[i, 4 * a : 4 * a + 4] = True
        for j, (d, e, f) in enumerate(of):
            view[i, j], row[i, j] = b == e, (a, c) == (d, f)

    def literal(x: Tensor, y: Tensor) -> Tensor:
        out = x
        for i, (keys, allowed) in enumerate(((x, view), (x, row), (y, reference))):
            (q,), (k, v) = w.heads(f"q.{i}", x, 3), w.heads(f"kv.{i}", keys, 3, 2)
            out = out + w.linear(f"out.{i}", attention(q, k, v, allowed))
        return out

    check(block, lambda x, y: block(x, y, views, shape), literal, normal(18, 12), normal(8, 12))


def test_tnt() -> None:
    offsets = [0, 3, 7]
    block = drawn(load("tnt").TNTAttention(12, 3, 4, 2, words=5))
    w = Weights(block)

    def literal(words: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
        patches = []
        for patch in words:
            q, k, v = w.heads("qkv.0", w.norm("norms.0", patch), 2, 3)
            patches.append(patch + w.linear("out.0", attention(q, k, v)))
        up = iter(w.linear("up.1", w.norm("up.0", patch.flatten())) for patch in patches)
        s = torch.stack([x if i in (0, 3) else x + next(up) for i, x in enumerate(s)])
        attended = attention(*w.heads("qkv.1", w.norm("norms.1", s), 3, 3), allowed=same(offsets))
        return torch.stack(patches), s + w.linear("out.1", attended)

    call = lambda words, s: block(words, s, torch.tensor(offsets))  # noqa: E731
    check(block, call, literal, normal(5, 5, 4), normal(7, 12))


def test_vdt() -> None:
    frames, places = torch.tensor([2, 3]), 3
    block = drawn(load("vdt").VDTAttention(12, 3))
    w = Weights(block)
    # clip, frame, place of every token
    frame_of = [(0, 0), (0, 1), (1, 0), (1, 1), (1, 2)]
    of = [(clip, t, p) for clip, t in frame_of for p in range(3)]
    pairs = [[(a == d, b == e, c == f) for d, e, f in of] for a, b, c in of]
    time = torch.tensor([[clip and place for clip, _, place in row] for row in pairs])
    space = torch.tensor([[clip and frame for clip, frame, _ in row] for row in pairs])

    def literal(x: Tensor, c: Tensor) -> Tensor:
        found = attention(*w.heads("qkv.0", w.norm("norm", x), 3, 3), allowed=time)
        x = x + w.linear("last", w.linear("out.0", found))
        change = w.linear("change.1", c / (1 + torch.exp(-c)))
        shift, scale, gate = (
            torch.stack([change[clip, 12 * i : 12 * i + 12] for clip, _, _ in of]) for i in range(3)
        )
        y = centred(x, 1e-6) * (1 + scale) + shift
        found = attention(*w.heads("qkv.1", y, 3, 3), allowed=space)
        return x + gate * w.linear("out.1", found)

    check(block, lambda x, c: block(x, c, frames, places), literal, normal(15, 12), normal(2, 12))


def test_channelvit() -> None:
    block = drawn(load("channelvit").ChannelViTAttention(5, 4, 3, 12, 3))
    w, channel, place = Weights(block), [0, 2, 3, 1, 3], 3
    images = [[0, 2], [3, 1, 3]]  # channels of each

    def literal(z: Tensor) -> Tensor:
        outs, patches = [], iter(z)
        for channels in images:
            tokens = [w.of["token"] + w.of["place"][0]]
            for c in channels:
                for p in range(place):
                    token = w.linear("patch", next(patches))
                    tokens.append(token + w.of["channel"][c] + w.of["place"][p + 1])
            x = torch.stack(tokens)
            attended = attention(*w.heads("qkv", w.norm("norm", x), 3, 3))
            outs.append(x + w.linear("out", attended))
        return torch.cat(outs)

    channels = torch.tensor(channel).repeat_interleave(place)
    places, offsets = torch.arange(place).repeat(5), torch.tensor([0, 6, 15])
    assert block(normal(15, 5), channels, places, offsets)[1].tolist() == [0, 7, 17]
    check(block, lambda z: block(z, channels, places, offsets)[0], literal, normal(15, 5))


def test_adaformer() -> None:
    offsets = [0, 5, 14]
    block = drawn(load("adaformer").AdaFormerAttention(6, nearest=4))
    w = Weights(block)

    def mlp(name: str, x: Tensor) -> Tensor:
        return w.linear(f"{name}.2", w.linear(f"{name}.0", x).clamp(min=0))

    def literal(x: Tensor, p: Tensor) -> Tensor:
        middle = p + w.linear("shift", x)
        distance = (middle[:, None] - p).detach().square().sum(2)
        distance = distance.masked_fill(~same(offsets), math.inf)
        allowed = distance <= distance.sort(1).values[:, 3:4]
        assert int(allowed.sum()) == 14 * 4
        d = mlp("place", middle[:, None] - p)  # [N, N, C]
        logits = mlp("weigh", w.linear("q", x)[:, None] - w.linear("k", x) + d)
        weights = logits.masked_fill(~allowed[..., None], -math.inf).softmax(1)
        return x + w.linear("out", (weights * (w.linear("v", x) + d)).sum(1))

    call = lambda x, p: block(x, p, torch.tensor(offsets))  # noqa: E731
    check(block, call, literal, normal(14, 6), normal(14, 3))
