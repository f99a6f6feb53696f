"""Runs in folders: what a run is resumed from."""

from __future__ import annotations

import io
import pickle
import random
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fastgt.files import write

FORMAT = 2  # of the checkpoint
PARTS = ("settings", "model", "optimizer", "schedule", "scaler", "random", "progress")


def open_run(folder: Path, settings: dict[str, Any]) -> dict[str, Any] | None:
    """The checkpoint in ``folder``, which is made where it is absent; None for a new run.

    Raises:
        ValueError: The folder holds a run with other settings, or a damaged checkpoint.
        OSError: The folder cannot be made.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "checkpoint.pt"
    if not path.exists():
        return None
    content = load(path)
    if content.get("format") != FORMAT:
        raise ValueError(f"{path} has format {content.get('format')}, this version reads {FORMAT}")
    for key in PARTS:
        if not isinstance(content.get(key), dict):
            was = f"a {type(content[key]).__name__}" if key in content else "missing"
            raise ValueError(
                f"{path} is no whole checkpoint: {key!r} is {was}; delete it, or name another "
                "--output"
            )
    found = content["settings"]
    differing = [
        f"{name} {found.get(name)}, not {settings.get(name)}"
        for name in sorted(found | settings)
        if found.get(name) != settings.get(name)
    ]
    if differing:
        raise ValueError(
            f"{folder} holds a run with {', '.join(differing)}: name another --output for this one"
        )
    return content


@contextmanager
def restoring(path: Path) -> Iterator[None]:
    """What does not fit inside is told as a fault of that checkpoint."""
    try:
        yield
    except KeyError as error:
        raise ValueError(
            f"{path} is no whole checkpoint: {error.args[0]!r} is missing; delete it, or name "
            "another --output"
        ) from error
    except (RuntimeError, ValueError, TypeError, AttributeError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(
            f"{path} does not fit the run: {reason}; delete it, or name another --output"
        ) from error


def save(path: Path, content: dict[str, Any]) -> None:
    buffer = io.BytesIO()
    torch.save(content, buffer)
    write(path, buffer.getbuffer())


def load(path: Path) -> dict[str, Any]:
    try:
        with zipfile.ZipFile(path) as archive:  # PyTorch loads flipped bits without a word
            if changed := archive.testzip():
                raise ValueError(f"{changed} is not what was written")
        content = torch.load(path, map_location="cpu", weights_only=True)
        if not isinstance(content, dict):
            raise ValueError(f"holds a {type(content).__name__}")
    except _DAMAGE as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(
            f"{path} is damaged: {reason}; delete it, or name another --output"
        ) from error
    return content


_DAMAGE = (
    zipfile.BadZipFile,
    RuntimeError,
    pickle.UnpicklingError,
    EOFError,
    KeyError,
    ValueError,
)


def seed_everything(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def random_state(device: torch.device) -> dict[str, Any]:
    """Of Python, NumPy, PyTorch and the device, in types that are safe to load."""
    name, keys, *rest = np.random.get_state(legacy=True)
    return {
        "python": random.getstate(),
        "numpy": (name, keys.tolist(), *rest),  # type: ignore[union-attr]
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
    }


def set_random_state(state: dict[str, Any], device: torch.device) -> None:
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    if device.type == "cuda" and state["cuda"] is not None:
        torch.cuda.set_rng_state(state["cuda"], device)
