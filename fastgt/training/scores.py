"""Losses of a batch, as a sum and what it is divided by, and metrics of a whole split."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from fastgt.training.recipe import Loss, Metric

Total = Callable[[Tensor], Tensor]


class Score(NamedTuple):
    """A metric: a function of outputs and labels, its name in texts, whether more is better."""

    of: Callable[[Tensor, Tensor], float]
    name: str
    higher: bool


def loss_terms(kind: Loss, output: Tensor, y: Tensor, total: Total) -> tuple[Tensor, Tensor]:
    """The loss of a batch is ``sum / total(weight)``. -> sum, weight.

    Args:
        kind: See :class:`fastgt.training.recipe.Recipe`.
        output: ``[B, T]`` of graphs or nodes. One logit ``[B, 1]`` tells two classes apart; class
            weights are then not divided by their sum but by B, as in GraphGPS's code. Of
            ``"assignment"`` ``[B, 2]``: of a node, the logarithm of the probability of its match,
            and the match that is found.
        y: ``[B]`` or ``[B, T]`` numbers, ``[B]`` classes, or ``[B]`` matches, -1 for none: each of
            two nodes that match counts half.
        total: Sums a tensor over the processes that share the batch.

    Example:
        >>> import torch
        >>> from fastgt.training.scores import loss_terms
        >>> terms = loss_terms("l1", torch.tensor([[1.0], [4.0]]), torch.zeros(2), lambda x: x)
        >>> float(terms[0] / terms[1])
        2.5
    """
    output = output.float() if output.dtype in (torch.float16, torch.bfloat16) else output
    if kind in ("l1", "binary_cross_entropy"):
        y = _beside(output, y)
        told = ~torch.isnan(y)
        if kind == "l1":
            each = (output - y).abs()
        else:
            each = F.binary_cross_entropy_with_logits(output, y.nan_to_num(), reduction="none")
        told_labels = told.sum().to(each.dtype)
        # without any label the loss is 0, not 0 / 0
        return each.where(told, each.new_zeros(())).sum(), told_labels + _tiny(each)
    if kind == "assignment":
        weight = torch.where(_matches(output, y) < 0, 1.0, 0.5).to(output.dtype)
        return -(weight * output[:, 0]).sum(), weight.sum()
    one, output = output.shape[1:] == (1,), _logits(output, y)
    each = F.cross_entropy(output, y, reduction="none")
    if kind == "cross_entropy":
        return each.sum(), each.new_tensor(len(y))
    # of the class that all labels have the weight is 0: a loss of 0, not of 0 / 0
    count = total(torch.bincount(y, minlength=output.shape[1]))
    weight = ((count.sum() - count) / count.sum()).to(each.dtype)[y]
    total_weight = each.new_tensor(len(y)) if one else weight.sum()
    return (weight * each).sum(), total_weight + _tiny(each)


def metric(kind: Metric) -> Score:
    """The metric of that name."""
    return _METRICS[kind]


def mae(output: Tensor, y: Tensor) -> float:
    """Mean of absolute differences; labels of NaN are left out."""
    return float((output.double() - _beside(output, y).double()).abs().nanmean())


def accuracy(output: Tensor, y: Tensor) -> float:
    """Share of rows whose largest logit is that of their class."""
    return float((_logits(output, y).argmax(1) == y).double().mean())


def class_accuracy(output: Tensor, y: Tensor) -> float:
    """Mean over all classes of the share of a class's rows that are found.

    A class without rows counts as 0, as in the benchmark's own code.

    Source:
        Dwivedi et al., arXiv 2003.00982, metric of PATTERN and CLUSTER.
    """
    output = _logits(output, y)
    classes = output.shape[1]
    count = torch.bincount(y, minlength=classes)
    right = torch.bincount(y[output.argmax(1) == y], minlength=classes)
    return float((right.double() / count.clamp(min=1)).mean())


def macro_f1(output: Tensor, y: Tensor) -> float:
    """Mean over classes of 2 TP / (2 TP + FP + FN); those in no row and no prediction are left out.

    Example:
        >>> import torch
        >>> from fastgt.training.scores import macro_f1
        >>> output = torch.eye(3)[torch.tensor([0, 0, 1, 1])]
        >>> round(macro_f1(output, torch.tensor([0, 1, 1, 1])), 4)  # 2 / 3 and 4 / 5
        0.7333
    """
    output = _logits(output, y)
    found, classes = output.argmax(1), output.shape[1]
    right = torch.bincount(y[found == y], minlength=classes)
    count = torch.bincount(y, minlength=classes) + torch.bincount(found, minlength=classes)
    there = count > 0
    return float((2 * right[there].double() / count[there]).mean())


def roc_auc(output: Tensor, y: Tensor) -> float:
    """Probability that a positive scores above a negative, ties counted as a half.

    ``[B, 2]`` logits of classes ``[B]``, or ``[B, T]`` logits of labels ``[B, T]``: then the mean
    over tasks that have both labels. NaN labels are left out.

    Example:
        >>> import torch
        >>> from fastgt.training.scores import roc_auc
        >>> roc_auc(torch.tensor([[0.1], [0.4], [0.35], [0.8]]), torch.tensor([0, 0, 1, 1]))
        0.75
    """
    return _over_tasks(_roc_auc, output, y)


def average_precision(output: Tensor, y: Tensor) -> float:
    """Sum over thresholds of precision times the recall that it adds; tasks as in `roc_auc`."""
    return _over_tasks(_average_precision, output, y)


def matched(output: Tensor, y: Tensor) -> float:
    """Share of the nodes that have a match whose match is found.

    Example:
        >>> import torch
        >>> from fastgt.training.scores import matched
        >>> found = torch.tensor([[-0.1, 4.0], [-0.7, 3.0], [-0.2, 0.0]])
        >>> matched(found, torch.tensor([4, 2, -1]))
        0.5
    """
    have = _matches(output, y) >= 0
    return float((output[have, 1] == y[have]).double().mean())


def _roc_auc(score: Tensor, positive: Tensor) -> float:
    _, group, size = score.unique(return_inverse=True, return_counts=True)
    end = size.cumsum(0).double()
    rank = (end - (size - 1) / 2)[group]  # from 1, the mean rank of those that tie
    ones = positive.sum().double()
    return float((rank[positive].sum() - ones * (ones + 1) / 2) / (ones * (~positive).sum()))


def _average_precision(score: Tensor, positive: Tensor) -> float:
    _, group = (-score).unique(return_inverse=True)
    hits = torch.bincount(group[positive], minlength=int(group.max()) + 1).double()
    precision = hits.cumsum(0) / torch.bincount(group).cumsum(0)
    return float((precision * hits).sum() / hits.sum())


def _over_tasks(of: Callable[[Tensor, Tensor], float], output: Tensor, y: Tensor) -> float:
    output = output.double()
    if output.shape[1] == 2 and y.dim() == 1:
        _check_classes(output, y)
        output = output[:, 1:] - output[:, :1]
    y = _beside(output, y)
    found = []
    for task in range(y.shape[1]):
        told = ~torch.isnan(y[:, task])
        positive = y[told, task] > 0.5
        if positive.any() and not positive.all():
            found.append(of(output[told, task], positive))
    if not found:
        raise ValueError("a ranking is judged by positive and negative labels: there are not both")
    return sum(found) / len(found)


def _tiny(x: Tensor) -> float:
    return torch.finfo(x.dtype).tiny


def _beside(output: Tensor, y: Tensor) -> Tensor:
    """Labels in the shape and dtype of the output."""
    if y.dim() == 1:
        y = y[:, None]
    if y.shape != output.shape:
        raise ValueError(
            f"the model gives {list(output.shape)} numbers and the labels are {list(y.shape)}"
        )
    return y.to(output.dtype)


def _logits(output: Tensor, y: Tensor) -> Tensor:
    """Of all classes: one logit is that of the second class, and the first has 0."""
    if output.shape[1:] == (1,):
        output = torch.cat([torch.zeros_like(output), output], 1)
    _check_classes(output, y)
    return output


def _matches(output: Tensor, y: Tensor) -> Tensor:
    if y.dim() != 1 or y.is_floating_point() or output.shape != (len(y), 2):
        raise ValueError(
            f"numbers [B, 2] need matches [B], got {list(output.shape)} and {list(y.shape)} "
            f"{y.dtype}"
        )
    return y


def _check_classes(output: Tensor, y: Tensor) -> None:
    if y.dim() != 1 or y.is_floating_point() or output.dim() != 2 or len(output) != len(y):
        raise ValueError(
            f"logits [B, classes] need classes [B], got {list(output.shape)} and {list(y.shape)} "
            f"{y.dtype}"
        )
    if len(y) and int(y.max()) >= output.shape[1]:
        raise ValueError(f"the model has {output.shape[1]} classes, and a label is {int(y.max())}")


_METRICS: dict[Metric, Score] = {
    "mae": Score(mae, "mean absolute error", False),
    "accuracy": Score(accuracy, "accuracy", True),
    "class_accuracy": Score(class_accuracy, "mean accuracy of classes", True),
    "macro_f1": Score(macro_f1, "macro F1", True),
    "roc_auc": Score(roc_auc, "ROC-AUC", True),
    "average_precision": Score(average_precision, "average precision", True),
    "matched": Score(matched, "share of matches found", True),
}
