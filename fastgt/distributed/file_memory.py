"""Results of operations in files, so that they need no memory while nobody reads them."""

from __future__ import annotations

import ctypes
import mmap
import os
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

LEAST = 2**16  # bytes of a tensor that is worth a file


class FileMemory(TorchDispatchMode):
    """Inside, what an operation gives is written to a file, and is a tensor mapped from there.

    This holds for tensors of a CPU of 64 KB or more, in the forward and in the backward: those that
    autograd saves, gradients, parameters, the state of an optimizer. Views and what is changed in
    place stay where they are. A file has no name: its space is free again when its last tensor is
    gone, however the process ends.

    Args:
        folder: Of a file system on a disk; where files lie in memory, nothing is gained.
    """

    def __init__(self, folder: Path):
        super().__init__()
        self._folder = folder
        self._mapped: list[StorageWeakRef] = []

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        found = func(*args, **(kwargs or {}))
        if not any(isinstance(x, Tensor) and _is_large(x) for x in tree_leaves(found)):
            return found
        given = {_identity(x) for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        return tree_map_only(
            Tensor, lambda x: x if _identity(x) in given else self._moved(x), found
        )

    def put_away(self) -> None:
        """Give the memory of all files back. Whoever reads a tensor gets it from its file."""
        libc = ctypes.CDLL(None, use_errno=True)
        alive = []
        for ref in self._mapped:
            storage = torch.UntypedStorage._new_with_weak_ptr(ref.cdata)
            if storage is None:
                continue
            alive.append(ref)
            begin, size = ctypes.c_void_p(storage.data_ptr()), ctypes.c_size_t(storage.nbytes())
            if libc.madvise(begin, size, mmap.MADV_DONTNEED):
                number = ctypes.get_errno()
                raise OSError(number, os.strerror(number))
        self._mapped = alive
        if hasattr(libc, "malloc_trim"):  # of glibc, which keeps what threads have freed
            libc.malloc_trim(ctypes.c_size_t(0))

    def _moved(self, x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        # what cannot be resized is mapped or shared already
        if not _is_large(x) or not storage.resizable():
            return x
        handle, path = tempfile.mkstemp(dir=self._folder)
        try:
            # written at once: a new file that is mapped is filled page by page
            with open(handle, "wb") as file:
                file.write(torch.empty(0, dtype=torch.uint8).set_(storage).numpy().data)
            mapped = torch.UntypedStorage.from_file(path, True, storage.nbytes())
        finally:
            os.unlink(path)
        self._mapped.append(StorageWeakRef(mapped))
        new = torch.empty(0, dtype=x.dtype)
        place = x.storage_offset(), x.shape, x.stride()
        return new.set_(mapped, *place)  # type: ignore[arg-type]


def _is_large(x: Tensor) -> bool:
    here = x.device.type == "cpu" and x.layout == torch.strided
    return here and x.untyped_storage().nbytes() >= LEAST


def _identity(x: Tensor) -> int:
    """Of its storage, while that lives; 0 for what has none of its own."""
    return x.untyped_storage()._cdata if x.layout == torch.strided else 0
