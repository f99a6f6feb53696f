"""The training loop. An interrupted run, resumed, ends with the bits of one never interrupted.

A checkpoint holds model, optimizer, schedule, the states of all random generators and where in
which epoch the run stands, with that epoch's order of examples. It is written after every epoch,
every ``SAVE_EVERY`` seconds inside one and, on Ctrl-C or SIGTERM, after the batch at hand. Killed
without warning, a run repeats what it did since the last of them.

The bits are those of one device, one number of threads and one version of PyTorch.
"""

from __future__ import annotations

import math
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from fastgt import files
from fastgt.ops.checks import integer
from fastgt.pruning import HeadSparsity
from fastgt.training import checkpoint, report

SAVE_EVERY = 30.0  # seconds
SHOW_EVERY = 0.5  # seconds: reading the loss waits for the device


@dataclass
class Task:
    """What is learned.

    Attributes:
        title: Of the curve.
        sizes: Examples in each of train, val and test.
        loss: Mean loss of some training examples, given their numbers ``[B]``.
        error: Summed error of some examples of a split, given its name and their numbers.
        measure: What their mean is called: ``"mae"`` makes the columns val_mae and test_mae.
    """

    title: str
    sizes: dict[str, int]
    loss: Callable[[Tensor], Tensor]
    error: Callable[[str, Tensor], Tensor]
    measure: str = "mae"


@dataclass
class Progress:
    """Where a run stands: all of a checkpoint that is not a ``state_dict`` or a generator's.

    Attributes:
        rows: The epochs that are done, as in ``metrics.csv``.
        order: Of the training examples in the present epoch; None before its first batch.
        batch: Batches of it that are done.
        loss: Summed over their examples, on the device.
        seconds: That this epoch took so far.
        best: Epoch, errors in validation and test and weights of the epoch best in validation.
    """

    rows: list[report.Row] = field(default_factory=list)
    order: Tensor | None = None
    batch: int = 0
    loss: Tensor | None = None
    seconds: float = 0.0
    best: dict[str, Any] | None = None


class Training:
    """One run in one folder.

    Args:
        task, model, optimizer, schedule: What is trained, how; the schedule takes the validation
            error after every epoch.
        batch_size: Examples; the last batch of an epoch has what is left.
        folder: Of the checkpoint, ``metrics.csv``, ``curve.png`` and ``best.pt``.
        settings: What makes a run another run; kept in the checkpoint.
        sparsity: Takes a step after each of the optimizer's; kept in the checkpoint.
        resumed: Checkpoint to go on from (:func:`fastgt.training.checkpoint.open_run`).
    """

    def __init__(
        self,
        task: Task,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        schedule: torch.optim.lr_scheduler.ReduceLROnPlateau,
        *,
        batch_size: int,
        folder: Path,
        settings: dict[str, Any],
        resumed: dict[str, Any] | None = None,
        sparsity: HeadSparsity | None = None,
    ):
        self.task, self.model, self.optimizer, self.schedule = task, model, optimizer, schedule
        self.batch_size = batch_size = integer("batch_size", batch_size, 1)
        self.folder, self.settings = folder, settings
        self.sparsity = sparsity
        self._val, self._test = f"val_{task.measure}", f"test_{task.measure}"
        self.device = next(model.parameters()).device
        self.batches = -(-task.sizes["train"] // batch_size)
        self.progress = Progress()
        self._clock = self._saved = time.monotonic()
        self._stop = _Stop()
        if resumed is None:
            self._save()  # a folder that cannot be written to must show now
        else:
            self._restore(resumed)

    def run(self, *, epochs: int, hours: float, min_lr: float) -> str:
        """Train until one of the limits. -> which.

        Raises:
            KeyboardInterrupt: By Ctrl-C or SIGTERM, with the checkpoint written.
            RuntimeError: The loss is no longer finite.
        """
        from tqdm import tqdm

        epochs = integer("epochs", epochs)
        rows = self.progress.rows
        self._clock = time.monotonic()
        with (
            self._stop,
            tqdm(
                total=epochs, initial=min(len(rows), epochs), desc="training", unit="epoch"
            ) as bar,
        ):
            while True:
                if rows:
                    self._describe(bar)
                if self._lr() < min_lr:
                    return f"the learning rate fell below {min_lr:g}"
                if len(rows) >= epochs:
                    return f"{len(rows)} epochs are done"
                if sum(row["seconds"] for row in rows) >= hours * 3600:
                    return f"{hours:g} hours are over"
                self._obey()
                self._epoch()
                bar.update()

    def _epoch(self) -> None:
        self._train()
        p, examples = self.progress, self.task.sizes["train"]
        assert p.loss is not None
        number, loss, val = len(p.rows) + 1, float(p.loss) / examples, self._error("val")
        if not math.isfinite(loss) or not math.isfinite(val):
            raise RuntimeError(f"epoch {number} ended with loss {loss} and validation error {val}")
        test = None
        if p.best is None or val < p.best[self._val]:
            test = self._error("test")
            weights = {name: x.cpu().clone() for name, x in self.model.state_dict().items()}
            p.best = {"epoch": number, self._val: val, self._test: test, "model": weights}
        row = {"epoch": number, "lr": self._lr(), "train_loss": loss}
        self.schedule.step(val)
        self._count_time()
        p.rows.append({**row, "seconds": p.seconds, self._val: val, self._test: test})
        p.order, p.batch, p.loss, p.seconds = None, 0, None, 0.0
        self._save()
        self._report()

    def _train(self) -> None:
        """The rest of the epoch's batches."""
        from tqdm import tqdm

        p = self.progress
        if p.order is None or p.loss is None:
            p.order = torch.randperm(self.task.sizes["train"])
            p.loss = torch.zeros((), dtype=torch.float64, device=self.device)
        self.model.train()
        shown = 0.0
        with tqdm(
            total=self.batches,
            initial=p.batch,
            desc=f"epoch {len(p.rows) + 1}",
            unit="batch",
            leave=False,
            disable=None,  # where stderr is a file
        ) as bar:
            for chosen in p.order.split(self.batch_size)[p.batch :]:
                loss = self.task.loss(chosen)
                self.optimizer.zero_grad()
                loss.backward()
                self.optimizer.step()
                if self.sparsity is not None:
                    self.sparsity.step()
                p.loss += loss.detach() * len(chosen)
                p.batch += 1
                bar.update()
                now = time.monotonic()
                if now - shown >= SHOW_EVERY:
                    done = min(p.batch * self.batch_size, len(p.order))
                    bar.set_postfix(loss=f"{float(p.loss) / done:.4f}", refresh=False)
                    shown = now
                if now - self._saved >= SAVE_EVERY:
                    self._save()
                self._obey()

    @torch.no_grad()
    def _error(self, split: str) -> float:
        """Mean over a split. Draws nothing and changes nothing: interrupted, it is repeated."""
        self.model.eval()
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        for chosen in torch.arange(self.task.sizes[split]).split(self.batch_size):
            total += self.task.error(split, chosen)
            self._obey()
        return float(total) / self.task.sizes[split]

    def _obey(self) -> None:
        if not self._stop.asked:
            return
        self._save()
        raise KeyboardInterrupt(
            f"stopped in epoch {len(self.progress.rows) + 1} after {self.progress.batch} of "
            f"{self.batches} batches; the same command goes on from there"
        )

    def _lr(self) -> float:
        return self.optimizer.param_groups[0]["lr"]

    def _count_time(self) -> None:
        now = time.monotonic()
        self.progress.seconds += now - self._clock
        self._clock = now

    def _describe(self, bar: Any) -> None:
        row, best = self.progress.rows[-1], self.progress.best
        assert best is not None
        bar.set_postfix(
            {
                "loss": f"{row['train_loss']:.4f}",
                self._val: f"{row[self._val]:.4f}",
                "best": f"{best[self._val]:.4f}",
                "lr": f"{self._lr():.1e}",
            }
        )

    def _save(self) -> None:
        self._count_time()
        checkpoint.save(
            self.folder / "checkpoint.pt",
            {
                "format": checkpoint.FORMAT,
                "settings": self.settings,
                "model": self.model.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "schedule": self.schedule.state_dict(),
                "random": checkpoint.random_state(self.device),
                "progress": vars(self.progress),
                **({} if self.sparsity is None else {"sparsity": self.sparsity.state_dict()}),
            },
        )
        self._saved = time.monotonic()

    def _restore(self, content: dict[str, Any]) -> None:
        with checkpoint.restoring(self.folder / "checkpoint.pt"):
            self.model.load_state_dict(content["model"])
            self.optimizer.load_state_dict(content["optimizer"])
            self.schedule.load_state_dict(content["schedule"])
            if self.sparsity is not None:
                self.sparsity.load_state_dict(content["sparsity"])
            self.progress = p = self._progress(content["progress"])
            if p.rows:
                self._report()  # the run may have ended between its checkpoint and these
            checkpoint.set_random_state(content["random"], self.device)

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
        assert p.best is not None
        checkpoint.save(self.folder / "best.pt", {**p.best, "settings": self.settings})
        files.write(self.folder / "metrics.csv", report.csv(p.rows, self.task.measure))
        curve = report.curve(p.rows, self.task.title, self.task.measure)
        files.write(self.folder / "curve.png", curve)


class _Stop:
    """Ctrl-C and SIGTERM ask to stop; a second one does not wait."""

    def __init__(self) -> None:
        self.asked = False
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> None:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._ask)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _ask(self, number: int, frame: Any) -> None:
        self.asked = True
        signal.signal(number, self._before[signal.Signals(number)])
