"""The training loop. An interrupted run, resumed, ends with the bits of one never interrupted.

A checkpoint holds model, optimizer, schedule, the scale of losses, the states of all random
generators and where in which epoch the run stands, with that epoch's order of examples. It is
written after an epoch, if ``EPOCH_EVERY`` seconds went by since the last, every ``SAVE_EVERY``
seconds inside one, in the end and, on Ctrl-C or SIGTERM, after the batch at hand. Killed without
warning, a run repeats what it did since the last of them.

The bits are those of one device, one number of threads and processes and one version of PyTorch.
"""

from __future__ import annotations

import copy
import math
import sys
import time
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from fastgt import files
from fastgt.ops.checks import integer
from fastgt.training import checkpoint, optimization, report, scores
from fastgt.training.memory import peak_memory
from fastgt.training.ranks import Ranks
from fastgt.training.recipe import Recipe
from fastgt.training.stop import Stop
from fastgt.training.tasks import Task

EPOCH_EVERY = 1.0  # seconds
SAVE_EVERY = 30.0  # seconds
REPORT_EVERY = 10.0  # seconds: a curve takes longer to draw than a small graph's epoch
TELL_EVERY = 30.0  # seconds between lines of a log
SHOW_EVERY = 0.5  # seconds: reading the loss waits for the device


@dataclass
class Progress:
    """Where a run stands: all of a checkpoint that is not a ``state_dict`` or a generator's.

    Attributes:
        rows: The epochs that are done, as in ``metrics.csv``.
        order: Of the training examples in the present epoch; None before its first batch.
        batch: Batches of it that are done.
        loss: Summed over their examples, on the device.
        seconds: That this epoch took so far.
        peak_bytes: Of memory, in all parts of the run.
        best: Epoch, metrics in validation and test and weights of the epoch best in validation.
    """

    rows: list[report.Row] = field(default_factory=list)
    order: Tensor | None = None
    batch: int = 0
    loss: Tensor | None = None
    seconds: float = 0.0
    peak_bytes: int = 0
    best: dict[str, Any] | None = None


class Pruning(Protocol):
    """Takes parts of a model away while it trains, :class:`fastgt.pruning.HeadSparsity` for one."""

    def step(self) -> None:
        """After every step of the optimizer."""

    def state_dict(self) -> dict[str, Any]:
        """Where it stands, apart from what the model's has."""

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class Training:
    """One run in one folder.

    Args:
        task: What is trained on; its model is ``model``, or wraps it.
        recipe: How: clipping, precision, schedule, limits.
        optimizer, schedule: Of the model.
        folder: Of the checkpoint, ``metrics.csv``, ``curve.png`` and ``best.pt``.
        settings: What makes a run another run; kept in the checkpoint.
        sparsity: Takes a step after each of the optimizer's; kept in the checkpoint.
        resumed: Checkpoint to go on from (:func:`fastgt.training.checkpoint.open_run`).
        ranks: The processes that share the run.
    """

    def __init__(
        self,
        task: Task,
        recipe: Recipe,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        schedule: LRScheduler,
        *,
        folder: Path,
        settings: dict[str, Any],
        resumed: dict[str, Any] | None = None,
        sparsity: Pruning | None = None,
        ranks: Ranks | None = None,
    ):
        self.task, self.recipe, self.model = task, recipe, model
        self.optimizer, self.schedule = optimizer, schedule
        self.batch_size = integer("batch_size", recipe.batch_size, 1)
        self.folder, self.settings = folder, settings
        self.sparsity, self.ranks = sparsity, ranks or Ranks()
        self.score = scores.metric(recipe.metric)
        if recipe.local_epochs and not hasattr(model, "set_stage"):
            raise ValueError(f"local_epochs must be 0: {recipe.model} has one stage")
        self._val, self._test = f"val_{recipe.metric}", f"test_{recipe.metric}"
        self.device = next(model.parameters()).device
        self.scaler = optimization.scaler(recipe.precision, self.device)
        self.batches = -(-task.sizes["train"] // self.batch_size)
        self.progress = Progress()
        self._clock = self._saved = self._reported = self._told = time.monotonic()
        self._stop = Stop()
        if resumed is None:
            self._save()  # a folder that cannot be written to must show now
        else:
            self._restore(resumed)

    def run(self, *, hours: float = math.inf) -> str:
        """Train until one of the limits. -> which.

        Raises:
            KeyboardInterrupt: By Ctrl-C or SIGTERM, with the checkpoint written.
            RuntimeError: The loss is no longer finite.
        """
        from tqdm import tqdm

        rows, epochs = self.progress.rows, self.recipe.epochs
        self._clock = time.monotonic()
        with (
            self._stop,
            tqdm(
                total=epochs,
                initial=min(len(rows), epochs),
                desc="training",
                unit="epoch",
                disable=None if self.ranks.leads else True,  # None: on a terminal alone
            ) as bar,
        ):
            while True:
                if rows:
                    self._describe(bar)
                if (ended := self._ended(hours)) is not None:
                    self._save()
                    self._report()
                    return ended
                self._obey()
                self._epoch()
                bar.update()
                if bar.disable and self.ranks.leads:
                    self._tell()

    def _ended(self, hours: float) -> str | None:
        rows, recipe = self.progress.rows, self.recipe
        if recipe.schedule == "plateau" and self._lr() < recipe.min_lr:
            return f"the learning rate fell below {recipe.min_lr:g}"
        if len(rows) >= recipe.epochs:
            return f"{len(rows)} epochs are done"
        if sum(row["seconds"] for row in rows) >= hours * 3600:
            return f"{hours:g} hours are over"
        best = self.progress.best
        since = len(rows) - best["epoch"] if best else 0
        if recipe.stop_after is not None and since >= recipe.stop_after:
            return f"validation was no better for {since} epochs"
        return None

    def _epoch(self) -> None:
        if self.recipe.local_epochs:
            self._enter_stage()
        self._train()
        p, examples, score = self.progress, self.task.sizes["train"], self.score
        assert p.loss is not None
        number, loss = len(p.rows) + 1, float(p.loss) / examples
        val_loss, val = self._evaluate("val")
        if not all(math.isfinite(x) for x in (loss, val_loss, val)):
            raise RuntimeError(
                f"epoch {number} ended with loss {loss}, validation loss {val_loss} and "
                f"{score.name} {val}"
            )
        test = None
        if p.best is None or (val > p.best[self._val] if score.higher else val < p.best[self._val]):
            test = self._evaluate("test")[1]
            weights = {name: x.cpu().clone() for name, x in self.model.state_dict().items()}
            p.best = {"epoch": number, self._val: val, self._test: test, "model": weights}
            if number <= self.recipe.local_epochs:
                p.best["optimizer"] = copy.deepcopy(self.optimizer.state_dict())
        row = {"epoch": number, "lr": self._lr(), "train_loss": loss, "val_loss": val_loss}
        if isinstance(self.schedule, ReduceLROnPlateau):
            self.schedule.step(val_loss)
        else:
            self.schedule.step()
        self._count_time()
        seconds = self.ranks.largest(p.seconds)
        p.rows.append({**row, "seconds": seconds, self._val: val, self._test: test})
        p.order, p.batch, p.loss, p.seconds = None, 0, None, 0.0
        if self._agreed(time.monotonic() - self._saved >= EPOCH_EVERY):
            self._save()
        if time.monotonic() - self._reported >= REPORT_EVERY:
            self._report()

    def _enter_stage(self) -> None:
        """The first global epoch goes on from the best local one."""
        p, local = self.progress, self.recipe.local_epochs
        model: Any = self.model
        model.set_stage("local" if len(p.rows) < local else "global")
        if len(p.rows) == local and p.order is None:
            assert p.best is not None
            self.model.load_state_dict(p.best["model"])
            self.optimizer.load_state_dict(p.best["optimizer"])

    def _train(self) -> None:
        """The rest of the epoch's batches."""
        from tqdm import tqdm

        p = self.progress
        if p.order is None or p.loss is None:
            p.order = self.ranks.told(torch.randperm(self.task.sizes["train"]))
            p.loss = torch.zeros((), dtype=torch.float64, device=self.device)
        assert p.order is not None
        self.model.train()
        shown = 0.0
        with tqdm(
            total=self.batches,
            initial=p.batch,
            desc=f"epoch {len(p.rows) + 1}",
            unit="batch",
            leave=False,
            disable=None if self.ranks.leads and self.batches > 1 else True,
        ) as bar:
            for chosen in p.order.split(self.batch_size)[p.batch :]:
                loss = self._step(self.ranks.share(chosen))
                p.loss += self.ranks.mean(loss) * len(chosen)
                p.batch += 1
                bar.update()
                now = time.monotonic()
                if now - shown >= SHOW_EVERY:
                    done = min(p.batch * self.batch_size, len(p.order))
                    bar.set_postfix(loss=f"{float(p.loss) / done:.4f}", refresh=False)
                    shown = now
                if self._agreed(now - self._saved >= SAVE_EVERY):
                    self._save()
                self._obey()

    def _step(self, chosen: Tensor) -> Tensor:
        """One step of the optimizer. -> the loss."""
        loss = self.task.loss(chosen)
        self.optimizer.zero_grad()
        self.scaler.scale(loss).backward()
        self.ranks.sum_gradients(self.model)
        if self.recipe.clip is not None:
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.model.parameters(), self.recipe.clip)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if self.sparsity is not None:
            self.sparsity.step()
        return loss.detach()

    @torch.no_grad()
    def _evaluate(self, split: str) -> tuple[float, float]:
        """Loss and metric of a split. Draws nothing and changes nothing: interrupted, it is
        repeated."""
        self.model.eval()
        mine = []
        for chosen in torch.arange(self.task.sizes[split]).split(self.batch_size):
            share = self.ranks.share(chosen)
            if len(share):
                mine.append(tuple(x.cpu() for x in self.task.outputs(split, share)))
            self._obey()
        pairs = [pair for part in self.ranks.gathered(mine) for pair in part]
        output, y = (torch.cat(parts) for parts in zip(*pairs, strict=True))
        output = output.float() if output.dtype in (torch.float16, torch.bfloat16) else output
        loss, weight = scores.loss_terms(self.recipe.loss, output, y, lambda x: x)
        return float(loss / weight), self.score.of(output, y)

    def _obey(self) -> None:
        if not self._agreed(self._stop.asked):
            return
        self._save()
        if self.progress.rows:
            self._report()
        raise KeyboardInterrupt(
            f"stopped in epoch {len(self.progress.rows) + 1} after {self.progress.batch} of "
            f"{self.batches} batches; the same command goes on from there"
        )

    def _agreed(self, asked: bool) -> bool:
        """Whether any process asks for it: all must do it, at the same place."""
        if self.ranks.size == 1:
            return asked
        return bool(self.ranks.total(torch.tensor(float(asked), device=self.device)))

    def _lr(self) -> float:
        return self.optimizer.param_groups[0]["lr"]

    def _count_time(self) -> None:
        now = time.monotonic()
        self.progress.seconds += now - self._clock
        self._clock = now

    def _describe(self, bar: Any) -> None:
        bar.set_postfix(self._state())

    def _tell(self) -> None:
        """A line where a log is in the place of the bar."""
        if time.monotonic() - self._told >= TELL_EVERY:
            state = ", ".join(f"{name} {value}" for name, value in self._state().items())
            done = f"epoch {len(self.progress.rows)} of {self.recipe.epochs}"
            print(f"{done}: {state}", file=sys.stderr, flush=True)
            self._told = time.monotonic()

    def _state(self) -> dict[str, str]:
        row, best = self.progress.rows[-1], self.progress.best
        assert best is not None
        return {
            "loss": f"{row['train_loss']:.4f}",
            self._val: f"{row[self._val]:.4f}",
            "best": f"{best[self._val]:.4f}",
            "lr": f"{self._lr():.1e}",
        }

    def _save(self) -> None:
        self._count_time()
        p = self.progress
        p.peak_bytes = max(p.peak_bytes, peak_memory(self.device))
        random = self.ranks.gathered(checkpoint.random_state(self.device))
        if self.ranks.leads:
            checkpoint.save(
                self.folder / "checkpoint.pt",
                {
                    "format": checkpoint.FORMAT,
                    "settings": self.settings,
                    "model": self.model.state_dict(),
                    "optimizer": self.optimizer.state_dict(),
                    "schedule": self.schedule.state_dict(),
                    "scaler": self.scaler.state_dict(),
                    "random": {str(rank): state for rank, state in enumerate(random)},
                    "progress": vars(p),
                    **({} if self.sparsity is None else {"sparsity": self.sparsity.state_dict()}),
                },
            )
        self._saved = time.monotonic()

    def _restore(self, content: dict[str, Any]) -> None:
        with checkpoint.restoring(self.folder / "checkpoint.pt"):
            self.model.load_state_dict(content["model"])
            self.optimizer.load_state_dict(content["optimizer"])
            self.schedule.load_state_dict(content["schedule"])
            self.scaler.load_state_dict(content["scaler"])
            if self.sparsity is not None:
                self.sparsity.load_state_dict(content["sparsity"])
            self.progress = p = self._progress(content["progress"])
            if p.rows:
                self._report()  # the run may have ended between its checkpoint and these
            checkpoint.set_random_state(content["random"][str(self.ranks.rank)], self.device)

    def _progress(self, content: dict[str, Any]) -> Progress:
        """As it was saved; whatever is missing is a KeyError, not a default."""
        p = Progress(**content | {field.name: content[field.name] for field in fields(Progress)})
        p.loss = None if p.loss is None else p.loss.to(self.device)
        best = p.best or {}
        for name in ("epoch", self._val, self._test, "model") if p.rows else ():
            if name not in best:
                raise KeyError(name)
        return p

    def _report(self) -> None:
        p = self.progress
        if not self.ranks.leads:
            return
        assert p.best is not None
        best = {name: x for name, x in p.best.items() if name != "optimizer"}
        checkpoint.save(self.folder / "best.pt", {**best, "settings": self.settings})
        files.write(self.folder / "metrics.csv", report.csv(p.rows, self.recipe.metric))
        curve = report.curve(p.rows, self.task.title, self.recipe.metric)
        files.write(self.folder / "curve.png", curve)
        self._reported = time.monotonic()
