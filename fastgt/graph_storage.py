"""What PyTorch and frameworks do to an object of tensors: move it, pin it, share it, copy it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import FrozenInstanceError
from typing import Any, NoReturn, Self

import torch
from torch import Tensor

from fastgt.graph_build import normal
from fastgt.prepared import map_tensors


class Stored:
    """A graph as an object that holds tensors: it does not change, and moves as a tensor does."""

    col: Tensor

    @property
    def device(self) -> torch.device:
        return self.col.device

    def __setattr__(self, name: str, value: Any) -> NoReturn:
        raise FrozenInstanceError(f"cannot set {name!r}: a Graph does not change")

    def __delattr__(self, name: str) -> NoReturn:
        raise FrozenInstanceError(f"cannot delete {name!r}: a Graph does not change")

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Of a copy or of a pickle."""
        vars(self).update(state)
        if any(x.is_inference() for x in self._tensors()):
            vars(self).update(vars(self._mapped(normal)))

    def _replace(self, **changes: Any) -> Self:
        """One with other values of some fields, and the others of this one."""
        return type(self)(**{**vars(self), **changes})

    def _tensors(self) -> list[Tensor]:
        """All that it holds, what is prepared too."""
        held: list[Tensor] = []
        map_tensors(held.append, vars(self))
        return held

    def _bytes(self) -> int:
        """What its tensors take. Two walks may share a tensor: each storage counts once."""
        storages = [x.untyped_storage() for x in self._tensors()]
        return sum({x.data_ptr(): x.nbytes() for x in storages}.values())

    def _mapped(self, f: Callable[[Tensor], Tensor]) -> Self:
        """The same one with ``f`` of every tensor; one tensor in two places stays one."""
        done: dict[int, Tensor] = {}

        def once(x: Tensor) -> Tensor:
            if id(x) not in done:
                done[id(x)] = normal(f(x))
            return done[id(x)]

        return type(self)(**map_tensors(once, vars(self)))

    def to(
        self,
        device: torch.device | str | int | torch.dtype | Tensor | None = None,
        dtype: torch.dtype | None = None,
        non_blocking: bool = False,
        copy: bool = False,
        *,
        memory_format: torch.memory_format | None = None,
    ) -> Self:
        """The same graph on another device, with what was cached; itself if it is there already.

        The arguments are those of ``Tensor.to``: without a device the graph stays where it is, and
        a tensor stands for its device. A floating-point ``dtype`` changes nothing, for indices stay
        integers, nor does a ``memory_format``. A graph that goes to the CPU with
        ``non_blocking=True`` must not be used before the device has been waited for, as with
        tensors.
        """
        if isinstance(device, torch.dtype) and dtype is None:
            device, dtype = None, device
        if device is None or isinstance(device, Tensor):
            device = self.device if device is None else device.device
        if not isinstance(device, (torch.device, str, int)):
            raise TypeError(f"device must be a torch.device or its name, got {device!r}")
        if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
            raise TypeError(
                "dtype must be a floating-point torch.dtype, for a graph keeps its own index type, "
                f"got {dtype!r}"
            )
        if self.device.type == "meta" and torch.device(device).type != "meta":
            raise NotImplementedError(
                f"a graph on the meta device has no values to copy to {device}: keep the one that "
                "was moved there"
            )
        device = self.col.new_empty(0).to(device).device  # "cuda" means "cuda:0"
        if self.device == device:
            return self._mapped(torch.clone) if copy else self
        return self._mapped(lambda x: x.to(device, non_blocking=non_blocking))._elsewhere()

    def _elsewhere(self) -> Self:
        """What is left of one that was moved to another device."""
        return self

    def cpu(self) -> Self:
        """:meth:`to` the CPU."""
        return self.to("cpu")

    def cuda(
        self, device: torch.device | str | int | None = None, non_blocking: bool = False
    ) -> Self:
        """:meth:`to` a CUDA device; default: the current one."""
        return self.to("cuda" if device is None else device, non_blocking=non_blocking)

    def pin_memory(self, device: torch.device | str | None = None) -> Self:
        """The same graph in page-locked memory, from which a GPU can copy while others compute.

        PyTorch warns that a ``device`` is deprecated; it takes the current accelerator without one.
        """
        where = () if device is None else (device,)
        return self if self.is_pinned() else self._mapped(lambda x: x.pin_memory(*where))

    def is_pinned(self) -> bool:
        """Whether :meth:`pin_memory` would change nothing."""
        return all(x.is_pinned() for x in self._tensors() if x.numel())

    def share_memory_(self) -> Self:
        """Moves the tensors to memory that processes share, in place; itself."""
        for x in self._tensors():
            x.share_memory_()
        return self

    def record_stream(self, stream: torch.Stream) -> None:
        """``Tensor.record_stream`` of every tensor: another stream uses them."""
        for x in self._tensors():
            x.record_stream(stream)
