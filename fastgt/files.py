"""Files that are replaced whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path


def write(path: Path, content: bytes | memoryview) -> None:
    """Replace the file: whoever reads it, after any accident, finds the old or the new one."""
    partial = path.with_name(path.name + ".partial")
    try:
        with partial.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    if os.name == "posix":  # the new name must reach the disk too
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
