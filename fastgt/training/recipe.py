"""What is trained and how, as data.

A :class:`Recipe` names a model and a data set and holds every setting of their training. The table
of recipes, ``RECIPES`` of ``published_recipes.py``, has one entry a pair; ``MODELS`` there has one
entry a model, and ``DATA_SETS`` one a data set. Everything else follows from these three:

    recipe ──> config ──> model                 MODELS: class, and whether it takes edges
       │          └─────> encodings             inputs.py: which field of a config wants which
       ├─────> data  ───> batches               fastgt.datasets.load
       ├─────> loss, metric                     scores.py
       ├─────> optimizer, schedule, clip        optimization.py
       └─────> what makes a run another run     ``Recipe.kept``, in every checkpoint

To add a recipe of a model and a data set that are known, write one entry of ``graph_recipes.py``,
or of ``node_recipes.py`` where the data set is one graph: the config (``XConfig.published(name)``
where there is one), what differs from the defaults below, and the published figure with its source.
A new model takes one entry of ``MODELS`` more. It is called as
``model(node, edge, graph, **encodings)``, or ``model(node, graph, **encodings)`` if it takes no
edges. If its encodings are new, ``ENCODINGS`` of ``inputs.py`` gets the field that asks for them.

``fastgt train --set key=value`` reaches every field of a recipe but the first four, and every field
of its config: :func:`changed` of ``settings.py``.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, get_args

from fastgt.ops.checks import integer

Loss = Literal[
    "l1", "cross_entropy", "class_weighted_cross_entropy", "binary_cross_entropy", "assignment"
]
Metric = Literal[
    "mae", "accuracy", "class_accuracy", "macro_f1", "roc_auc", "average_precision", "matched"
]
Optimizer = Literal["adam", "adamw"]
Schedule = Literal["constant", "plateau", "cosine", "linear"]
Precision = Literal["fp32", "bf16", "fp16"]
Features = Literal["given", "binary", "rows"]

FIXED = ("model", "data", "config", "published")
BY_EPOCHS = ("cosine", "linear")  # schedules that depend on how many epochs there are


@dataclass(frozen=True)
class Published:
    """A figure that others reported for a model on a data set.

    Attributes:
        value: In the unit of the recipe's metric: shares are between 0 and 1.
        deviation: Over their seeds or splits; None where they tell none.
        source: Where it stands.
        parameters: How many numbers their model learns, as it is written there; None where nobody
            tells.
    """

    value: float
    deviation: float | None
    source: str
    parameters: str | None = None

    def __str__(self) -> str:
        spread = "" if self.deviation is None else f" +- {self.deviation:.4g}"
        return f"{self.value:.4g}{spread}"


@dataclass(frozen=True)
class Recipe:
    """A model, a data set, and how the one is trained on the other.

    Attributes:
        model, data: Names in ``MODELS`` and ``DATA_SETS``.
        config: Of the model.
        published: What others reached; None where nobody told.
        loss: ``"l1"``; ``"cross_entropy"`` of classes; the same with every class weighted by
            (V - n_c) / V (``"class_weighted_cross_entropy"``, V labels in the batch, n_c of the
            class); ``"binary_cross_entropy"`` of logits, labels of NaN left out; or
            ``"assignment"``, of pairs of graphs.
        metric: What chooses the best epoch, on the validation split; ``"mae"`` goes with the loss
            ``"l1"``, ``"matched"`` with ``"assignment"``, the others with classes.
        optimizer: ``"adam"`` or ``"adamw"``.
        lr, weight_decay: Of the optimizer.
        attention_decay: Weight decay of the parameters that ``MODELS`` calls attention; None for
            ``weight_decay``.
        schedule: Of the learning rate, after every epoch: ``"constant"``; ``"plateau"`` (times
            ``factor`` after ``patience`` epochs without a lower validation loss, and the run ends
            below ``min_lr``); ``"cosine"`` (to 0 at the last epoch, after ``warmup`` epochs of
            linear rise); ``"linear"`` (likewise, falling by as much every epoch).
        clip: Norm that gradients are cut to; None for no limit.
        batch_size: Graphs, pairs of them, or nodes whose tokens were sampled; a model that is
            called with one graph as a whole ignores it.
        epochs: At most.
        stop_after: Epochs without a better metric that end the run; None for no such end.
        local_epochs: So many first ones in the local stage of a model that has two, as Polynormer.
            The global stage goes on from the best of them.
        features: Of nodes, as they are ``"given"``; ``"binary"`` (1 where they are not 0); or
            ``"rows"``, divided by their sum.
        seed: Of weights, order and dropout.
        precision: ``"fp32"``, or that of autocast: ``"bf16"``, or ``"fp16"`` with scaled losses.
        limit: Train on the first so many graphs, two a pair; None for all.
    """

    model: str
    data: str
    config: Any
    published: Published | None = None
    loss: Loss = "cross_entropy"
    metric: Metric = "accuracy"
    optimizer: Optimizer = "adam"
    lr: float = 1e-3
    weight_decay: float = 0.0
    attention_decay: float | None = None
    schedule: Schedule = "plateau"
    factor: float = 0.5
    patience: int = 10
    min_lr: float = 1e-6
    warmup: int = 0
    clip: float | None = None
    batch_size: int = 32
    epochs: int = 1000
    stop_after: int | None = None
    local_epochs: int = 0
    features: Features = "given"
    seed: int = 0
    precision: Precision = "fp32"
    limit: int | None = None

    def __post_init__(self) -> None:
        for name, kinds in _KINDS.items():
            if getattr(self, name) not in kinds:
                raise ValueError(f"{name} must be one of {list(kinds)}, got {getattr(self, name)}")
        for loss, metric in (("l1", "mae"), ("assignment", "matched")):
            if (self.loss == loss) != (self.metric == metric):
                raise ValueError(
                    f"loss {loss!r} and metric {metric!r} go together, got {self.loss!r} and "
                    f"{self.metric!r}"
                )
        for name in ("batch_size", "epochs", "stop_after", "limit"):
            if getattr(self, name) is not None:
                integer(name, getattr(self, name), 1)
        for name in ("patience", "warmup", "local_epochs"):
            integer(name, getattr(self, name), 0)
        for name, least in (
            ("lr", True),
            ("clip", True),
            ("weight_decay", False),
            ("attention_decay", False),
        ):
            x = getattr(self, name)
            if x is not None and not (x > 0 if least else x >= 0):
                raise ValueError(
                    f"{name} must {'be positive' if least else 'not be below 0'}, got {x}"
                )
        if not 0 < self.factor < 1:
            raise ValueError(f"factor must be between 0 and 1, got {self.factor}")
        if not (math.isfinite(self.min_lr) and self.min_lr >= 0):
            raise ValueError(f"min_lr must not be below 0, got {self.min_lr}")
        if self.schedule in BY_EPOCHS and self.warmup >= self.epochs:
            raise ValueError(f"warmup must be below epochs={self.epochs}, got {self.warmup}")
        if not -(2**63) <= self.seed < 2**64:
            raise ValueError(f"seed must fit in 64 bits, got {self.seed}")

    @property
    def settable(self) -> dict[str, Any]:
        """Its own settings, by name: those that ``--set`` reaches, apart from the config's."""
        return {x.name: getattr(self, x.name) for x in fields(self) if x.name not in FIXED}

    def kept(self, digest: str) -> dict[str, Any]:
        """What makes a run another run. ``digest``: of the data.

        A run may be made longer, unless its learning rates depend on the number of epochs.
        """
        own = self.settable
        if self.schedule not in BY_EPOCHS:
            del own["epochs"]
        named = {"model": self.model, "data": self.data, "digest": digest}
        return {**named, **own, **asdict(self.config)}


_KINDS: dict[str, tuple[str, ...]] = {
    "loss": get_args(Loss),
    "metric": get_args(Metric),
    "optimizer": get_args(Optimizer),
    "schedule": get_args(Schedule),
    "precision": get_args(Precision),
    "features": get_args(Features),
}
