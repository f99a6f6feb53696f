"""Pictures of the documents as files: the same code gives the same bytes."""

from __future__ import annotations

import io
from pathlib import Path
from typing import TYPE_CHECKING

from fastgt import files

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def png(figure: Figure, dpi: int) -> bytes:
    """The figure, without the version of matplotlib in it."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=dpi, metadata={"Software": None})
    return buffer.getvalue()


def write_changed(path: Path, new: bytes) -> None:
    """Write what is not there yet, or otherwise, and name it."""
    if not path.exists() or path.read_bytes() != new:
        path.parent.mkdir(parents=True, exist_ok=True)
        files.write(path, new)
        print(path)
