"""What ranks compute together, told to each other before they wait for each other.

A rank that waits for another in a collective waits until the timeout where the other one refused
its arguments, or called something else. So every operator on a distributed graph first says what it
is about to do, in one small collective, and all ranks go on or all raise. So does what waits for
other ranks in a backward.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fastgt.distributed.eager import eager
from fastgt.distributed.group import Group, on_all_ranks
from fastgt.ops.checks import autocasts

_LONGEST = 200  # characters of an argument in a message
_MOST = 2**16  # bytes of a tensor whose numbers are compared
_FEW = 16  # numbers of a tensor that a message shows
_CALL = "which call, counted from 1,"


@eager
def agree(
    group: Group,
    device: torch.device,
    what: str,
    arguments: Mapping[str, Any],
    problem: Exception | None = None,
) -> None:
    """Go on if no rank has a problem and all of them do the same; else raise on every rank.

    Args:
        group: The ranks. Where it is not ``checked``, a rank raises its own problem and no other.
        device: Where the group's collectives take tensors.
        what: The operator.
        arguments: What must be the same on all ranks, as :func:`described`.
        problem: What this rank refuses.

    Raises:
        ValueError, TypeError: This rank's ``problem``.
        RuntimeError: Another rank refuses its arguments, or does something else; names it.
    """
    if group.size == 1 or not group.checked:
        if problem is not None:
            raise problem
        return
    text = f"{what}({', '.join(f'{name}={value}' for name, value in arguments.items())})"
    digest = int.from_bytes(hashlib.blake2b(text.encode(), digest_size=7).digest(), "little")
    mine = torch.tensor([digest, problem is not None], device=device)
    all_ranks = group.gathered(mine).tolist()
    if all(state == [digest, 0] for state in all_ranks):
        return
    said = group.told((what, dict(arguments), None if problem is None else str(problem)))
    if problem is not None:
        raise on_all_ranks(problem)
    for rank, (theirs, _, refused) in enumerate(said):
        if refused is not None:
            told = f"rank {rank} refuses the arguments of {theirs}: {refused}"
            raise on_all_ranks(RuntimeError(told))
    raise on_all_ranks(RuntimeError(_difference(group.rank, said)))


def agree_on_backward(
    group: Group, device: torch.device, what: str, call: int, arguments: Mapping[str, Any]
) -> None:
    """Go on if all ranks are in the backward of the same call; else raise on every rank.

    The loss of a rank may depend on some calls alone, and its backward then leaves the others out.

    Args:
        group, device, what, arguments: As of :func:`agree`.
        call: Its number by the group's ``calls``, taken in the forward.
    """
    agree(group, device, f"the backward of {what}", {_CALL: repr(call)} | dict(arguments))


def described(x: Any, *, rows: bool) -> str:
    """An argument as ranks compare it.

    Of a tensor with ``rows``, how its rows are made, for each rank has its own. Of another one, all
    of it: the numbers too, where they are few and at hand.
    """
    if not isinstance(x, Tensor):
        return repr(x)[:_LONGEST]
    grad = " with gradient" if x.requires_grad and torch.is_grad_enabled() else ""
    if rows:
        return f"{x.dtype}{['.', *x.shape[1:]]}{grad}"
    content = ""
    if x.device.type == "cpu" and x.nbytes <= _MOST:
        raw = x.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes()
        content = f" of digest {hashlib.blake2b(raw, digest_size=7).hexdigest()}"
        if x.numel() <= _FEW:
            content = f" = {x.tolist()}"
    return f"{x.dtype}{list(x.shape)}{grad}{content}"


def described_autocast(device: torch.device) -> str:
    """The dtype in which operators compute, and so exchange, whatever they are given."""
    return repr(torch.get_autocast_dtype(device.type)) if autocasts(device.type) else "off"


def _difference(rank: int, said: list[tuple[str, dict[str, Any], Any]]) -> str:
    what, mine, _ = said[rank]
    for other, (theirs, arguments, _) in enumerate(said):
        if theirs != what:
            return f"rank {rank} calls {what} where rank {other} calls {theirs}"
        for name in {**mine, **arguments}:
            left, right = mine.get(name, "nothing"), arguments.get(name, "nothing")
            if left != right:
                return (
                    f"ranks disagree about {name} of {what}: rank {rank} has {left}, rank {other} "
                    f"has {right}"
                )
    raise AssertionError("ranks that disagree say the same")
