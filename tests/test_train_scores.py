"""Losses and metrics of trainings, beside their definitions in loops; schedules."""

import math

import pytest
import torch
from torch.nn import functional as F

from fastgt.training import optimization, scores
from fastgt.training.published_recipes import RECIPES
from fastgt.training.settings import changed


def loss(kind, output, y):
    total, weight = scores.loss_terms(kind, output, y, lambda x: x)
    return total / weight


def test_losses_are_their_definitions():
    draw = torch.Generator().manual_seed(0)
    output = torch.randn(40, 3, generator=draw, dtype=torch.float64)
    y = torch.randint(3, (40,), generator=draw)
    assert loss("cross_entropy", output, y) == pytest.approx(float(F.cross_entropy(output, y)))
    weight = torch.tensor([(40 - int((y == c).sum())) / 40 for c in range(3)], dtype=torch.float64)
    expected = F.cross_entropy(output, y, weight=weight)
    assert loss("class_weighted_cross_entropy", output, y) == pytest.approx(float(expected))
    one = output[:, :1]
    target = torch.randn(40, generator=draw, dtype=torch.float64)
    assert loss("l1", one, target) == pytest.approx(float((one[:, 0] - target).abs().mean()))
    many = torch.randint(2, (40, 3), generator=draw).double()
    many[::3, 1] = torch.nan
    parts = [
        math.log1p(math.exp(-x)) if label == 1 else math.log1p(math.exp(x))
        for x, label in zip(output.flatten().tolist(), many.flatten().tolist(), strict=True)
        if not math.isnan(label)
    ]
    assert len(parts) == 120 - 14
    assert loss("binary_cross_entropy", output, many) == pytest.approx(sum(parts) / len(parts))


def test_one_logit_tells_two_classes_apart():
    draw = torch.Generator().manual_seed(0)
    output = torch.randn(40, 1, generator=draw, dtype=torch.float64)
    y = (torch.rand(40, generator=draw) < 0.3).long()
    share = float(y.double().mean())
    each = [math.log1p(math.exp(-x if c else x)) for x, c in zip(output[:, 0], y, strict=True)]
    assert loss("cross_entropy", output, y) == pytest.approx(sum(each) / 40)
    weighted = [x * (1 - share if c else share) for x, c in zip(each, y, strict=True)]
    assert loss("class_weighted_cross_entropy", output, y) == pytest.approx(sum(weighted) / 40)
    right = (output[:, 0] > 0) == (y == 1)
    assert scores.accuracy(output, y) == pytest.approx(float(right.double().mean()))
    halves = [float(right[y == c].double().mean()) for c in (0, 1)]
    assert scores.class_accuracy(output, y) == pytest.approx(sum(halves) / 2)


def test_labels_that_are_unknown_get_no_gradient():
    output = torch.randn(4, 1, requires_grad=True)
    loss("binary_cross_entropy", output, torch.tensor([1.0, torch.nan, 0.0, torch.nan])).backward()
    assert output.grad[:, 0].ne(0).tolist() == [True, False, True, False]


@pytest.mark.parametrize("kind", ["l1", "binary_cross_entropy"])
def test_a_batch_without_labels_has_loss_zero(kind):
    output = torch.randn(4, 2, requires_grad=True)
    found = loss(kind, output, torch.full((4, 2), torch.nan))
    found.backward()
    assert found.item() == 0
    assert not output.grad.any()


def test_a_batch_of_one_class_has_weighted_loss_zero():
    output = torch.randn(5, 2, requires_grad=True)
    found = loss("class_weighted_cross_entropy", output, torch.zeros(5, dtype=torch.long))
    found.backward()
    assert found.item() == 0
    assert not output.grad.any()


def pairs(score, y):
    """ROC-AUC, pair by pair."""
    won = [
        0.5 * (a == b) + (a > b)
        for a, positive in zip(score, y, strict=True)
        for b, other in zip(score, y, strict=True)
        if positive and not other
    ]
    return sum(won) / len(won)


def area_of_steps(score, y):
    """Average precision, threshold by threshold."""
    total, before = 0.0, 0.0
    for threshold in sorted(set(score), reverse=True):
        chosen = [label for x, label in zip(score, y, strict=True) if x >= threshold]
        recall = sum(chosen) / sum(y)
        total += (recall - before) * sum(chosen) / len(chosen)
        before = recall
    return total


@pytest.mark.parametrize("levels", [3, 1000], ids=["many ties", "few ties"])
def test_rankings_are_judged_pair_by_pair(levels):
    draw = torch.Generator().manual_seed(levels)
    score = torch.randint(levels, (60, 2), generator=draw).double()
    y = torch.randint(2, (60, 2), generator=draw).double()
    lists = [(score[:, t].tolist(), y[:, t].tolist()) for t in range(2)]
    assert scores.roc_auc(score, y) == pytest.approx(sum(pairs(*x) for x in lists) / 2)
    expected = sum(area_of_steps(*x) for x in lists) / 2
    assert scores.average_precision(score, y) == pytest.approx(expected)
    # two logits of classes: their difference
    logits = torch.stack([-score[:, 0], score[:, 0]], 1)
    assert scores.roc_auc(logits, y[:, 0].long()) == pytest.approx(pairs(*lists[0]))
    y[1::2, 1] = torch.nan
    assert scores.roc_auc(score, y) == pytest.approx(
        (pairs(*lists[0]) + pairs(score[::2, 1].tolist(), y[::2, 1].tolist())) / 2
    )


def test_rankings_without_both_labels_are_refused():
    with pytest.raises(ValueError, match="there are not both"):
        scores.roc_auc(torch.randn(3, 1), torch.ones(3))
    both = torch.tensor([[1.0, 1.0], [0.0, 1.0]])
    assert scores.roc_auc(torch.tensor([[1.0, 0.0], [0.0, 1.0]]), both) == 1  # of the first task


def test_accuracies_count():
    output = F.one_hot(torch.tensor([0, 1, 1, 2, 2, 2]), 4).float()
    y = torch.tensor([0, 1, 2, 2, 2, 0])
    assert scores.accuracy(output, y) == pytest.approx(4 / 6)
    # 1 of 2, 1 of 1, 2 of 3, and a class without rows
    assert scores.class_accuracy(output, y) == pytest.approx((1 / 2 + 1 + 2 / 3 + 0) / 4)
    nan = torch.tensor([1.0, torch.nan])
    assert scores.mae(torch.tensor([[3.0], [5.0]]), nan) == 2


def test_macro_f1_is_the_mean_of_the_harmonic_means():
    draw = torch.Generator().manual_seed(0)
    output, y = torch.randn(90, 6, generator=draw), torch.randint(3, (90,), generator=draw)
    output[:, 3:5] -= 9  # class 4 is there and never found, 3 is neither, 5 is found only
    y[:7] = 4
    found, each = output.argmax(1).tolist(), []
    for c in (0, 1, 2, 4, 5):
        right = sum(a == b == c for a, b in zip(found, y.tolist(), strict=True))
        precision, recall = right / max(1, found.count(c)), right / max(1, y.tolist().count(c))
        each.append(2 * precision * recall / (precision + recall) if right else 0)
    assert each[3] == each[4] == 0
    assert scores.macro_f1(output, y) == pytest.approx(sum(each) / 5)


@pytest.mark.parametrize(
    ("kind", "output", "y", "message"),
    [
        ("l1", torch.zeros(4, 2), torch.zeros(4), r"gives \[4, 2\] numbers .* are \[4, 1\]"),
        ("cross_entropy", torch.zeros(4, 2), torch.zeros(4), r"need classes \[B\]"),
        (
            "cross_entropy",
            torch.zeros(4, 2),
            torch.tensor([0, 1, 2, 0]),
            "2 classes, .* label is 2",
        ),
    ],
)
def test_outputs_that_do_not_fit_are_refused(kind, output, y, message):
    with pytest.raises(ValueError, match=message):
        loss(kind, output, y)


@pytest.mark.parametrize("kind", ["cosine", "constant", "plateau"])
def test_schedules_are_the_published_ones(kind):
    recipe = changed(RECIPES["graph_gps", "zinc12k"], [f"schedule={kind}", "epochs=10", "warmup=3"])
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=recipe.lr)
    schedule = optimization.schedule(recipe, optimizer)
    rates = []
    for _ in range(10):
        rates.append(optimizer.param_groups[0]["lr"] / recipe.lr)
        optimizer.step()
        schedule.step(1.0) if kind == "plateau" else schedule.step()
    if kind == "constant":
        assert rates == [1.0] * 10
    elif kind == "cosine":
        rise = [1e-6, 1 / 3, 2 / 3]
        fall = [0.5 * (1 + math.cos(math.pi * i / 7)) for i in range(7)]
        assert rates == pytest.approx(rise + fall)
    else:
        assert rates == [1.0] * 10  # a patience of 10: the eleventh bad epoch halves it
        schedule.step(1.0), schedule.step(1.0)
        assert optimizer.param_groups[0]["lr"] == recipe.lr / 2
