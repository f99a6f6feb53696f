"""Todyformer against its equations, event by event and over padded sequences; what it may know."""

from dataclasses import replace

import pytest
import torch
from literal_layers import assert_same, layer_norm, linear, perturbed
from test_event_set import changed_later, drawn, every_batch
from torch.nn import functional as F

from fastgt.datasets import flights
from fastgt.models import Todyformer, TodyformerConfig
from fastgt.models.todyformer_block import patchify
from fastgt.training.scores import average_precision

pytestmark = pytest.mark.usefixtures("one_thread")
FP64 = torch.float64
N, NOW = 7, 31
# node 5 has no event, 6 one with itself; an event stands twice, and events share a time
SOURCE = torch.tensor([0, 1, 1, 1, 6, 3, 0, 2, 4, 0, 3])
TARGET = torch.tensor([1, 2, 2, 0, 6, 0, 4, 3, 0, 1, 1])
TIME = torch.tensor([3, 3, 5, 9, 9, 9, 14, 20, 21, 29, 30])
EVENTS = SOURCE, TARGET, TIME
PAIRS = torch.tensor([[0, 5, 6, 2, 0, 0], [1, 0, 5, 2, 1, 3]])
SMALL = TodyformerConfig(N, dim=6, heads=2, blocks=2, patches=3, time_dim=3)
KINDS = {
    "vectors": {},
    "features": {"node_features": 3, "edge_features": 2},
    "mean": {"mixing": "mean", "edge_features": 2},
    "one patch": {"patches": 1, "blocks": 3},
    "a patch an event": {"patches": len(TIME), "edge_features": 1},
    "more patches than events": {"patches": 25, "mixing": "mean", "node_features": 1},
    "one head": {"heads": 1, "blocks": 1},
}


def made(**options):
    torch.manual_seed(0)
    return Todyformer(replace(SMALL, **options))


def softmax(s):
    w = (s - s.max()).exp()
    return w / w.sum()


def feed_forward(m, x):
    hidden = linear(m.layers[0], x).clamp(min=0)
    return layer_norm(m.norm, x + linear(m.layers[2], hidden))


def phi(m, age):
    return torch.cos(age * m.frequency + m.phase)


def mixed(m, mixing, q, keys, values):
    """One token: q, keys and values are of the tokens or events that it sees."""
    n, width = len(values), values[0].shape[0] // m.heads
    heads = []
    for h in range(m.heads):
        part = slice(h * width, (h + 1) * width)
        if mixing == "mean":
            weights = torch.full((n,), 1 / n, dtype=values[0].dtype)
        else:
            weights = softmax(torch.stack([q[part] @ k[part] for k in keys]) / width**0.5)
        heads.append(sum(w * v[part] for w, v in zip(weights, values, strict=True)))
    return linear(m.out, torch.cat(heads))


def literal(model, pairs, source, target, time, edge=None, node=None, now=NOW):
    """Loops over events, patches and nodes; tokens in a matrix [N, M] with a mask."""
    c, n = model.config, len(time)
    x = linear(model.embed, node) if c.node_features else model.embed.weight
    patch_of = [e * c.patches // n for e in range(n)]
    there = [[False] * c.patches for _ in range(c.num_nodes)]
    for e in range(n):
        there[source[e]][patch_of[e]] = there[target[e]][patch_of[e]] = True
    age = [torch.tensor([float(now - t)], dtype=x.dtype) for t in time.tolist()]
    tokens = {(i, m): x[i] for i in range(c.num_nodes) for m in range(c.patches) if there[i][m]}

    def event(e, way):
        own = [] if edge is None else [edge[e]]
        return torch.cat([*own, torch.tensor([way], dtype=x.dtype), phi(model.age, age[e])])

    for block in model.blocks:
        local, across, new = block.local, block.across, {}
        for (i, m), token in tokens.items():
            seen = []
            for e in range(n):
                if patch_of[e] == m and target[e] == i:
                    seen.append((int(source[e]), event(e, 1.0)))
                if patch_of[e] == m and source[e] == i:
                    seen.append((int(target[e]), event(e, -1.0)))
            keys = q = None
            if c.mixing == "attention":
                q = linear(local.q, token)
                keys = [linear(local.k, tokens[j, m]) + linear(local.edge_k, z) for j, z in seen]
            values = [linear(local.v, tokens[j, m]) + linear(local.edge_v, z) for j, z in seen]
            y = layer_norm(block.local_norm, token + mixed(local, c.mixing, q, keys, values))
            end = max(e for e in range(n) if patch_of[e] == m)
            position = linear(block.position, phi(model.patch_age, age[end]))
            new[i, m] = feed_forward(block.local_ffn, y) + position
        tokens = {}
        for (i, m), token in new.items():
            mine = [new[i, k] for k in range(c.patches) if there[i][k]]
            keys = q = None
            if c.mixing == "attention":
                q, keys = linear(across.q, token), [linear(across.k, p) for p in mine]
            values = [linear(across.v, p) for p in mine]
            y = layer_norm(block.across_norm, token + mixed(across, c.mixing, q, keys, values))
            tokens[i, m] = feed_forward(block.across_ffn, y)
    states = []
    for i in range(c.num_nodes):
        mine = [tokens[i, m] for m in range(c.patches) if there[i][m]]
        states.append(linear(model.own, x[i]) + (sum(mine) / len(mine) if mine else 0))
    logits = []
    for i, j in pairs.T.tolist():
        both = torch.cat([states[i], states[j], states[i] * states[j]])
        hidden = linear(model.link[0], both).clamp(min=0)
        logits.append(linear(model.link[2], hidden)[0])
    return torch.stack(logits)


def features(c):
    draws = torch.Generator().manual_seed(3)
    sizes = {"edge": (len(TIME), c.edge_features), "node": (N, c.node_features)}
    return {
        name: torch.randn(size, generator=draws, dtype=FP64)
        for name, size in sizes.items()
        if size[1]
    }


@pytest.mark.parametrize("kind", KINDS)
def test_the_model_is_its_equations(kind):
    model = perturbed(made(**KINDS[kind]).double())
    with torch.no_grad():
        for encoding in (model.age, model.patch_age):
            encoding.frequency.mul_(0.1)
    assert_same(
        model,
        lambda m, **given: m(PAIRS, *EVENTS, now=NOW, **given),
        lambda m, **given: literal(m, PAIRS, *EVENTS, **given),
        features(model.config),
        1e-11,
    )


@pytest.mark.parametrize("mixing", ["attention", "mean"])
def test_one_event_of_one_node_is_the_equations(mixing):
    model = perturbed(made(num_nodes=1, mixing=mixing).double())
    zero, time = torch.zeros(1, dtype=torch.int64), torch.tensor([30])
    pairs = torch.zeros(2, 1, dtype=torch.int64)
    assert_same(
        model,
        lambda m: m(pairs, zero, zero, time, now=NOW),
        lambda m: literal(m, pairs, zero, zero, time),
        {},
        1e-11,
    )


def test_a_softmax_of_equal_logits_is_the_mean():
    mean, model = made(mixing="mean").double(), made().double()
    for m in model.modules():
        if hasattr(m, "q") and m.q is not None:
            for x in m.q.parameters():
                x.data.zero_()
    missing, unexpected = model.load_state_dict(mean.state_dict(), strict=False)
    assert not unexpected
    assert {name.split(".")[3] for name in missing} == {"q", "k", "edge_k"}
    found, wanted = (m(PAIRS, *EVENTS, now=NOW) for m in (model, mean))
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)
    assert not torch.allclose(made().double()(PAIRS, *EVENTS, now=NOW), wanted, atol=1e-4)


@pytest.mark.parametrize("count", [1, 2, 3, 5, 11, 40])
def test_patches_have_equal_counts_and_lie_in_the_order_of_time(count):
    patches = patchify(SOURCE, TARGET, N, count)
    events, (source, target) = len(TIME), patches.graph.edge_index
    assert patches.graph.num_edges == 2 * events
    of = patches.patch[source]
    assert torch.equal(of, patches.patch[target])
    assert torch.equal(of[:events], of[events:])
    assert (of[:events].diff() >= 0).all()
    sizes = torch.bincount(of[:events], minlength=count)
    assert len(sizes) == count
    assert sizes.max() - sizes.min() <= 1
    assert torch.equal(patches.node[source], torch.cat([SOURCE, TARGET]))
    assert torch.equal(patches.node[target], torch.cat([TARGET, SOURCE]))


def test_packing_to_sequences_of_nodes_and_back_changes_nothing():
    """The sequence of a node holds its tokens, patch after patch, and those of no other."""
    patches = patchify(SOURCE, TARGET, N, 4)
    there = torch.zeros(N, 4, dtype=torch.bool)
    for e, (i, j) in enumerate(zip(SOURCE.tolist(), TARGET.tolist(), strict=True)):
        there[i, e * 4 // len(TIME)] = there[j, e * 4 // len(TIME)] = True
    padded = torch.full((N, 4), -1)
    padded[patches.node, patches.patch] = torch.arange(len(patches.node))
    assert torch.equal(padded >= 0, there)
    assert torch.equal(padded[there], torch.arange(len(patches.node)))
    for i, (first, last) in enumerate(zip(patches.offsets[:-1], patches.offsets[1:], strict=True)):
        assert torch.equal(padded[i][there[i]], torch.arange(int(first), int(last)))
    assert patches.offsets[5] == patches.offsets[6]  # node 5 has no token


def batch_and_later():
    data = drawn()
    split, batch = next((s, b) for s, b in every_batch(data) if 30 < b.known < b.first)
    other = changed_later(data, batch)
    number = (batch.first - data.splits[split][0]) // 7
    return data, batch, other.batch(split, number, size=7, history=20)


def test_what_happens_at_the_predicted_time_or_later_changes_no_logit():
    data, batch, again = batch_and_later()
    model = made(num_nodes=data.num_nodes, edge_features=2)
    pairs = torch.cartesian_prod(*2 * [torch.arange(data.num_nodes)]).T
    wanted = model(pairs, *batch.history, now=batch.now)
    assert torch.equal(model(pairs, *again.history, now=again.now), wanted)
    # and what happened before does
    for place in (0, -1):
        target = batch.history.target.clone()
        target[place] = (target[place] + 1) % data.num_nodes
        changed = batch.history._replace(target=target)
        assert not torch.allclose(model(pairs, *changed, now=batch.now), wanted)


def test_events_that_are_not_before_now_are_refused():
    model = made()
    for now in (30, 30.0, 12):
        with pytest.raises(ValueError, match=f"time must be below now={now}, got 30"):
            model(PAIRS, *EVENTS, now=now)


def test_only_ages_count():
    """Seconds since 1970 have no room in float32, nanoseconds none in float64."""
    model = made()
    wanted = model(PAIRS, *EVENTS, now=NOW)
    for shift in (1_700_000_000, 1_700_000_000 * 10**9):
        assert torch.equal(model(PAIRS, SOURCE, TARGET, TIME + shift, now=NOW + shift), wanted)
    assert torch.equal(model(PAIRS, SOURCE, TARGET, TIME.to(torch.uint8), now=NOW), wanted)
    far = model(PAIRS, *EVENTS, now=300)
    assert torch.equal(model(PAIRS, SOURCE, TARGET, TIME.to(torch.uint8), now=300), far)
    assert torch.equal(model(PAIRS, SOURCE, TARGET, TIME.double(), now=float(NOW)), wanted)
    assert not torch.allclose(model(PAIRS, *EVENTS, now=NOW + 1), wanted, atol=1e-5)


def test_nodes_are_told_apart_by_what_they_carry_alone():
    model = made(node_features=3).double()
    node = torch.randn(N, 3, dtype=FP64)
    order = torch.tensor([3, 0, 6, 1, 5, 2, 4])
    wanted = model(PAIRS, *EVENTS, now=NOW, node=node)
    moved = torch.empty_like(node)
    moved[order] = node
    found = model(order[PAIRS], order[SOURCE], order[TARGET], TIME, now=NOW, node=moved)
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("mixing", ["attention", "mean"])
def test_without_events_a_node_is_its_own_part(mixing):
    model = made(mixing=mixing, edge_features=2)
    none = [x[:0] for x in EVENTS]
    states = model.encode(*none, torch.zeros(0, 2), now=NOW)
    torch.testing.assert_close(states, model.own(model.embed.weight))
    logits = model(PAIRS, *none, torch.zeros(0, 2), now=NOW)
    logits.sum().backward()
    assert logits.isfinite().all()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
    assert model(PAIRS[:, :0], *EVENTS, torch.zeros(11, 2), now=NOW).shape == (0,)


@pytest.mark.parametrize("kind", KINDS)
def test_every_parameter_gets_a_gradient(kind):
    """One of zeros where a softmax is of one token."""
    model = made(**KINDS[kind])
    given = {name: x.float() for name, x in features(model.config).items()}
    out = model(PAIRS, *EVENTS, now=NOW, **given)
    (out * torch.arange(1.0, 7)).sum().backward()
    for name, p in model.named_parameters():
        assert p.grad is not None, name
        assert p.grad.isfinite().all(), name
        if kind in ("vectors", "features", "mean", "one head"):
            assert p.grad.abs().max() > 0, name


def test_integers_of_any_width_are_nodes():
    model = made()
    wanted = model(PAIRS, *EVENTS, now=NOW)
    for dtype in (torch.uint8, torch.int16, torch.int32):
        given = [x.to(dtype) for x in (PAIRS, *EVENTS)]
        assert torch.equal(model(*given, now=NOW), wanted)


def test_dropout_is_of_training_alone_and_autocast_is_taken():
    model = made(dropout=0.5)
    assert not torch.equal(model(PAIRS, *EVENTS, now=NOW), model(PAIRS, *EVENTS, now=NOW))
    model.eval()
    wanted = model(PAIRS, *EVENTS, now=NOW)
    assert torch.equal(model(PAIRS, *EVENTS, now=NOW), wanted)
    with torch.autocast("cpu", torch.bfloat16):
        found = model(PAIRS, *EVENTS, now=NOW)
    torch.testing.assert_close(found.float(), wanted, rtol=0.1, atol=0.1)


def test_a_batch_is_learnt_by_heart():
    """Pairs with an event from those without, of the same history."""
    data = drawn()
    batch = data.batch("val", 3, size=7, history=60)
    pairs = torch.cat([batch.pairs, data.negatives(batch, "historical")], 1)
    y = (torch.arange(pairs.shape[1]) < batch.pairs.shape[1]).float()
    model = made(num_nodes=data.num_nodes, edge_features=2, dim=16)
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        loss = F.binary_cross_entropy_with_logits(model(pairs, *batch.history, now=batch.now), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] > 0.5
    assert losses[-1] < 0.05


def test_a_few_steps_on_real_flights_are_better_than_chance():
    try:
        data = flights()
    except FileNotFoundError as error:
        pytest.skip(str(error))
    torch.manual_seed(0)
    config = TodyformerConfig(data.num_nodes, edge_features=1, dim=32, heads=2, patches=4)
    model = Todyformer(config)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)

    def scored(split, number):
        batch = data.batch(split, number, size=200, history=1000)
        pairs = torch.cat([batch.pairs, data.negatives(batch, "random")], 1)
        y = (torch.arange(pairs.shape[1]) < batch.pairs.shape[1]).float()
        return model(pairs, *batch.history, now=batch.now), y

    for number in range(100, 160):
        optimizer.zero_grad()
        F.binary_cross_entropy_with_logits(*scored("train", number)).backward()
        optimizer.step()
    with torch.no_grad():
        logits, y = map(torch.cat, zip(*(scored("val", n) for n in range(5)), strict=True))
    assert average_precision(logits[:, None], y) > 0.7


def test_what_does_not_fit_is_refused_by_name():
    model = made(edge_features=2, node_features=3)
    edge, node = torch.zeros(11, 2), torch.zeros(N, 3)
    given = {"pairs": PAIRS, "source": SOURCE, "target": TARGET, "time": TIME, "now": NOW}
    given |= {"edge": edge, "node": node}
    back = TIME.clone()
    back[4] = 2
    for changes, error, message in (
        ({"time": back}, ValueError, "time must not go back: event 4 is at 2 and event 3 at 9"),
        ({"time": TIME / 0.0}, ValueError, "time must be finite, got inf"),
        ({"time": TIME.tolist()}, TypeError, "time must be a tensor, got list"),
        ({"time": TIME[:, None]}, ValueError, r"time must be \[E\] numbers, got \[11, 1\]"),
        ({"time": TIME > 3}, TypeError, r"time must be \[E\] numbers, got torch.bool"),
        ({"time": TIME.to("meta")}, ValueError, "time is on meta but the model is on cpu"),
        ({"target": TARGET.to("meta")}, ValueError, "target must be on cpu, got meta"),
        ({"now": "31"}, TypeError, "now must be a number, got str"),
        ({"now": float("inf")}, ValueError, "now must be finite, got inf"),
        ({"source": SOURCE + 1}, ValueError, "source must be from 0 to 6, got 7 at 4"),
        ({"target": TARGET - 1}, ValueError, "target must be from 0 to 6, got -1 at 3"),
        ({"target": TARGET[1:]}, ValueError, r"target must be \[E\] = \[11\] as .*, got \[10\]"),
        ({"source": SOURCE.float()}, TypeError, "source must hold integers .*, got torch.float32"),
        ({"source": SOURCE.tolist()}, TypeError, "source must be a tensor of integers, got list"),
        ({"pairs": PAIRS.T}, ValueError, r"pairs must be \[2, B\], .*, got \[6, 2\]"),
        ({"pairs": PAIRS[0]}, ValueError, r"pairs must be \[2, B\], .*, got \[6\]"),
        ({"pairs": None}, TypeError, r"pairs must be a tensor of integers, got NoneType"),
        ({"pairs": PAIRS + 2}, ValueError, "pairs must be from 0 to 6, got 7 at 1"),
        ({"edge": edge[1:]}, ValueError, r"edge must be .* = \[11, 2\], got \[10, 2\]"),
        ({"edge": edge.double()}, TypeError, "edge must be torch.float32, as the model is"),
        ({"edge": None}, TypeError, "edge must be a tensor, got NoneType"),
        ({"node": node[1:]}, ValueError, r"node must be .* = \[7, 3\], got \[6, 3\]"),
        ({"node": None}, TypeError, "node must be a tensor, got NoneType"),
    ):
        with pytest.raises(error, match=message):
            model(**given | changes)
    plain, none = made(), torch.zeros(0, dtype=torch.int64)
    with pytest.raises(ValueError, match="now must be finite, got nan"):
        plain(PAIRS, none, none, none, now=float("nan"))
    for name, x in (("edge", edge), ("node", node)):
        with pytest.raises(ValueError, match=f"{name} must be None: {name}_features is 0"):
            plain(PAIRS, *EVENTS, now=NOW, **{name: x})
    for options, error, message in (
        ({"num_nodes": 0}, ValueError, "num_nodes must be positive, got 0"),
        ({"patches": 1.5}, TypeError, "patches must be an int, got float 1.5"),
        ({"edge_features": -1}, ValueError, "edge_features must not be negative, got -1"),
        ({"heads": 4}, ValueError, "heads must divide dim=6, got 4"),
        ({"mixing": "sum"}, ValueError, "mixing must be one of .*, got 'sum'"),
        ({"dropout": 1.5}, ValueError, r"dropout must be from 0 to 1, got 1\.5"),
    ):
        with pytest.raises(error, match=message):
            replace(SMALL, **options)
