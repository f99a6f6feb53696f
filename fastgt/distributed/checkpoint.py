"""Checkpoints of a model that ranks train, on torch.distributed.checkpoint.

A folder has one checkpoint::

    checkpoint.json        written last: which folder holds it, its files and their SHA-256, and of
                           which partition the training was
    step-120-9f3a.../      tensors of the model and of the optimizer, as
                           torch.distributed.checkpoint writes them; run.pt has what is no tensor

A new one is written beside the old, which goes when ``checkpoint.json`` names the new one. So a
process that is killed leaves the old one, or the new one.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import pickle
import re
import secrets
import shutil
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from fastgt import files
from fastgt.distributed.agreement import agree
from fastgt.distributed.graph import DistributedGraph
from fastgt.distributed.group import Group
from fastgt.ops.checks import integer

FORMAT, VERSION = "fastgt.Checkpoint", 1
_NAME = "checkpoint.json"
_FOLDER = r"step-\d+-[0-9a-f]{16}"


def save_checkpoint(
    folder: str | os.PathLike[str],
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None = None,
    /,
    *,
    partition: DistributedGraph | str | None = None,
    step: int = 0,
    group: dist.ProcessGroup | DeviceMesh | Group | None = None,
    **extra: Any,
) -> None:
    """Write model, optimizer and what else a training goes on from: whole, or not at all.

    Every rank of the group calls it, with one folder that all of them see. A tensor that each rank
    has whole is written by one of them; a ``DTensor``, as of FSDP2, by the ranks that share it.

    Args:
        folder: Is made if need be. The checkpoint that it has is replaced.
        model: Not wrapped in ``DistributedDataParallel``: its ``module`` is read by one process.
        optimizer: Of the model's parameters.
        partition: Which one the ranks train on: the graph, whose parts they hash together, or the
            hash in ``meta.json`` of ``write_partitions``.
        step: Where the training stands.
        group: As of :class:`fastgt.distributed.DistributedGraph`.
        extra: By name, of what ``torch.load`` reads without unpickling code: tensors as the state
            of a random generator, numbers, texts, lists and dicts of these. That of the first rank
            is written.

    Raises:
        RuntimeError: Another process writes there, or a rank could not write; names it.
        OSError: The folder cannot be written to.

    Example:
        >>> import tempfile
        >>> import torch
        >>> from fastgt.distributed import load_checkpoint, save_checkpoint
        >>> model = torch.nn.Linear(2, 1)
        >>> adam = torch.optim.Adam(model.parameters())
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_checkpoint(folder, model, adam, step=3, seed=torch.get_rng_state())
        ...     found = load_checkpoint(folder, model, adam)
        >>> found["step"], found["seed"].shape
        (3, torch.Size([5056]))
    """
    import torch.distributed.checkpoint as dcp

    ranks = group if isinstance(group, Group) else Group(group)
    place, device = Path(folder), _device(model)
    found, problem = _partition(partition)
    tensors, values = _state(model, optimizer)
    told = {"step": repr(step), "partition": repr(found)}
    told |= {name: f"{x.dtype}{list(x.shape)}" for name, x in tensors.items()}
    name, content = "", b""
    with ExitStack() as stack:
        try:
            content = _packed({"step": integer("step", step, 0), "extra": extra, "values": values})
            if ranks.rank == 0:
                place.mkdir(parents=True, exist_ok=True)
                stack.enter_context(files.lock(place))
                name = f"step-{step}-{secrets.token_hex(8)}"
        except (OSError, RuntimeError, TypeError, ValueError) as error:
            problem = problem or error
        agree(ranks, device, "save_checkpoint", told, problem)
        made = place / ranks.told_by_first(name)
        with _named_failure():
            dcp.save(
                tensors,
                storage_writer=dcp.FileSystemWriter(made, overwrite=False),
                process_group=ranks.processes,
                no_dist=ranks.size == 1,
            )
        if ranks.rank == 0:
            try:
                files.write(made / "run.pt", content)
                _publish(place, made, found, ranks.size)
            except OSError as error:
                problem = error
        agree(ranks, device, "save_checkpoint, its end", {}, problem)


def load_checkpoint(
    folder: str | os.PathLike[str],
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None = None,
    /,
    *,
    partition: DistributedGraph | str | None = None,
    any_partition: bool = False,
    group: dist.ProcessGroup | DeviceMesh | Group | None = None,
) -> dict[str, Any]:
    """Read what :func:`save_checkpoint` wrote into the model and the optimizer.

    Every rank of the group calls it. There may be more ranks than there were, or fewer, or one
    process without a group: parameters do not depend on it. What a training made of its rows, as a
    metric or an order, does depend on the partition.

    Args:
        folder, group: As of :func:`save_checkpoint`.
        model, optimizer: What is written to. The optimizer loses its gradients.
        partition: Which one the ranks train on now, as in :func:`save_checkpoint`; None to leave it
            at that.
        any_partition: Take a checkpoint of another partition.

    Returns:
        ``"step"``, ``"partition"`` (None where none was given) and ``extra`` by name.

    Raises:
        ValueError: The folder has no checkpoint, one that was not written to the end, one that is
            damaged, one of another partition, or one of another model; says which.
        RuntimeError: Another rank finds so; names it.
        OSError: A file cannot be read.

    Example:
        See :func:`save_checkpoint`.
    """
    import torch.distributed.checkpoint as dcp

    ranks = group if isinstance(group, Group) else Group(group)
    place, device = Path(folder), _device(model)
    wanted, problem = _partition(partition)
    told = {"partition": repr(wanted)}
    tensors: dict[str, Tensor] = {}
    run: dict[str, Any] = {}
    said: dict[str, Any] = {}
    try:
        said = _said(place)
        told["checkpoint"] = said["folder"]
        _check_partition(place, said["partition"], wanted, any_partition)
        run = _run(place / said["folder"] / "run.pt")
        tensors = _wanted(place / said["folder"], model, optimizer, run["values"])
    except (OSError, TypeError, ValueError) as error:
        problem = problem or error
    agree(ranks, device, "load_checkpoint", told, problem)
    with _named_failure():
        dcp.load(
            tensors,
            storage_reader=dcp.FileSystemReader(place / said["folder"]),
            process_group=ranks.processes,
            no_dist=ranks.size == 1,
        )
    _restore(model, optimizer, tensors, run["values"])
    return {**run["extra"], "step": run["step"], "partition": said["partition"]}


def _device(model: nn.Module) -> torch.device:
    return next((x.device for x in model.parameters()), torch.device("cpu"))


def _partition(partition: object) -> tuple[str | None, Exception | None]:
    """-> its hash, or what is wrong."""
    if isinstance(partition, DistributedGraph):
        return partition.digest, None
    if partition is None or isinstance(partition, str):
        return partition, None
    found = type(partition).__name__
    return None, TypeError(f"partition must be a DistributedGraph or a hash, got {found}")


def _state(
    model: nn.Module, optimizer: torch.optim.Optimizer | None
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """-> tensors by name, and what is no tensor."""
    named: dict[str, Any] = {f"model.{name}": x for name, x in model.state_dict().items()}
    values: dict[str, Any] = {}
    if optimizer is not None:
        state = optimizer.state_dict()
        values["param_groups"] = state["param_groups"]
        for i, of_parameter in state["state"].items():
            named |= {f"optimizer.{i}.{name}": x for name, x in of_parameter.items()}
    tensors = {name: x for name, x in named.items() if isinstance(x, Tensor)}
    values["others"] = {name: x for name, x in named.items() if not isinstance(x, Tensor)}
    return tensors, values


def _wanted(
    place: Path, model: nn.Module, optimizer: torch.optim.Optimizer | None, values: dict[str, Any]
) -> dict[str, Tensor]:
    """The tensors of the checkpoint to read, each in the place that it is read into.

    Those of the model are the model's. An optimizer that has not stepped has none yet.

    Raises:
        ValueError: The model or the optimizer has other ones; names the first.
    """
    from torch.distributed.checkpoint import FileSystemReader
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    there = FileSystemReader(place).read_metadata().state_dict_metadata
    own = {f"model.{name}": x for name, x in model.state_dict().items()}
    stored = {name: x for name, x in there.items() if isinstance(x, TensorStorageMetadata)}
    names = {*stored, *values["others"]}
    of_model = {name for name in names if name.startswith("model.")}
    if differing := sorted(of_model ^ own.keys()):
        where = "the checkpoint" if differing[0] in own else "the model"
        raise ValueError(
            f"{place} is of another model: {where} has no {differing[0].removeprefix('model.')!r}"
        )
    found: dict[str, Tensor] = {}
    for name in sorted(of_model & stored.keys()):
        shape, x = list(stored[name].size), own[name]
        if not isinstance(x, Tensor) or list(x.shape) != shape:
            has = list(x.shape) if isinstance(x, Tensor) else type(x).__name__
            what = name.removeprefix("model.")
            raise ValueError(
                f"{place} is of another model: {what!r} is {shape} there and {has} here"
            )
        found[name] = x
    if optimizer is None:
        return found
    if "param_groups" not in values:
        raise ValueError(f"{place} was written without an optimizer")
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    count = sum(len(group["params"]) for group in values["param_groups"])
    if count != len(parameters):
        raise ValueError(
            f"{place} is of an optimizer of {count} parameters, and this one has {len(parameters)}"
        )
    for name in sorted(stored.keys() - of_model):
        _, i, key = name.split(".", 2)
        of, size, dtype = parameters[int(i)], stored[name].size, stored[name].properties.dtype
        # a count of steps lies on the CPU; load_state_dict moves it where the optimizer wants it
        like = size == of.shape and key != "step"
        found[name] = torch.zeros_like(of, dtype=dtype) if like else torch.zeros(size, dtype=dtype)
    return found


def _restore(
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None,
    tensors: dict[str, Tensor],
    values: dict[str, Any],
) -> None:
    named = tensors | values["others"]
    prefix = "model."
    of_model = {n.removeprefix(prefix): x for n, x in named.items() if n.startswith(prefix)}
    model.load_state_dict(of_model)
    if optimizer is None:
        return
    optimizer.zero_grad()
    state: dict[int, dict[str, Any]] = {}
    for name, x in named.items():
        if name.startswith("optimizer."):
            _, i, key = name.split(".", 2)
            state.setdefault(int(i), {})[key] = x
    optimizer.load_state_dict({"state": state, "param_groups": values["param_groups"]})


def _packed(said: dict[str, Any]) -> bytes:
    """What ``torch.load`` reads without unpickling code.

    Raises:
        TypeError: Something in it would take that.
    """
    buffer = io.BytesIO()
    torch.save(said, buffer)
    content = buffer.getvalue()
    try:
        torch.load(io.BytesIO(content), weights_only=True)
    except pickle.UnpicklingError as error:
        reason = str(error).partition("\n")[0]
        raise TypeError(
            "a checkpoint has tensors, numbers, texts, lists and dicts of them beside the model: "
            f"{reason}"
        ) from error
    return content


def _run(path: Path) -> dict[str, Any]:
    found = torch.load(path, map_location="cpu", weights_only=True)
    assert isinstance(found, dict)
    return found


def _publish(place: Path, made: Path, partition: str | None, ranks: int) -> None:
    """Make the checkpoint in ``made`` that of the folder; what was there before goes."""
    sums = {path.name: _sha256(path) for path in sorted(made.iterdir())}
    said = {"format": FORMAT, "version": VERSION, "folder": made.name, "partition": partition}
    text = json.dumps({**said, "ranks": ranks, "files": sums}, sort_keys=True)
    digest = hashlib.sha256(text.encode()).hexdigest()
    files.write(place / _NAME, f"{digest}\n{text}\n".encode())
    for left in place.iterdir():
        if re.fullmatch(_FOLDER, left.name) and left.name != made.name:
            shutil.rmtree(left)


def _said(place: Path) -> dict[str, Any]:
    """What ``checkpoint.json`` says, whose files are all there and as they were written."""
    path = place / _NAME
    if not path.is_file():
        left = sorted(x.name for x in place.iterdir()) if place.is_dir() else []
        if half := next((name for name in left if re.fullmatch(_FOLDER, name)), None):
            raise ValueError(f"{place} has a checkpoint that was not written to the end: {half}")
        raise ValueError(f"{place} has no checkpoint")
    digest, _, text = path.read_text(errors="replace").partition("\n")
    text = text.removesuffix("\n")
    if hashlib.sha256(text.encode()).hexdigest() != digest:
        raise ValueError(f"{path} is damaged, or was not written by save_checkpoint")
    said = json.loads(text)
    if said["format"] != FORMAT or said["version"] != VERSION:
        raise ValueError(f"{path}: its version is {said['version']}, this fastgt reads {VERSION}")
    for name, wanted in said["files"].items():
        file = place / said["folder"] / name
        if not file.is_file():
            raise ValueError(f"{file} is absent: the checkpoint is not whole")
        if (found := _sha256(file)) != wanted:
            raise ValueError(f"{file} is damaged: its SHA-256 is {found} instead of {wanted}")
    return dict(said)


def _check_partition(place: Path, there: str | None, wanted: str | None, any_one: bool) -> None:
    if any_one or wanted is None or there == wanted:
        return
    raise ValueError(
        f"the checkpoint in {place} is of partition {there}, not {wanted}: its parameters would "
        "do, what it says of rows would not; any_partition=True takes it"
    )


@contextmanager
def _named_failure() -> Iterator[None]:
    """What torch.distributed.checkpoint raises is no Exception: which rank failed, and why."""
    from torch.distributed.checkpoint.api import CheckpointException

    try:
        with warnings.catch_warnings():
            # that a process which asks for no group has none
            warnings.filterwarnings("ignore", "torch.distributed is disabled")
            yield
    except CheckpointException as error:
        rank, (reason, _) = next(iter(error.failures.items()))
        raise RuntimeError(f"rank {rank} failed: {type(reason).__name__}: {reason}") from error


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
