"""Features of nodes, and of their neighbourhoods, computed and kept on disk in blocks."""

from __future__ import annotations

import hashlib
import os
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fastgt import files
from fastgt.datasets.block_file import BlockFile, graph_digest
from fastgt.graph import Graph
from fastgt.ops.aggregate import aggregate
from fastgt.ops.checks import check_square, integer

HOPS = 2
_FLOATS = (np.float16, np.float32, np.float64)


def hop_features(
    graph: Graph,
    x: Tensor | np.ndarray,
    folder: str | os.PathLike[str],
    *,
    hops: int = HOPS,
    progress: bool = False,
) -> list[BlockFile]:
    """Features after 0 to ``hops`` steps along the normalized edges, each in a file of its own.

        X_0 = X,    X_h = A' X_h-1,    A'_ij = (A + I)_ij / sqrt(r_i c_j)

    r_i sums row i of A + I and c_j its column j; duplicate edges and self loops count as given. Of
    edges both ways that is D^-1/2 (A + I) D^-1/2. On others the released code has r and c the other
    way round.

    Interrupted, it goes on with what was not written when it is called again. Memory is that of the
    graph, of a block of 8 MB and of the features of its neighbours, beside what x takes: pass an
    ``np.memmap`` to read it from a disk.

    Args:
        graph: Square.
        x: ``[N, F]``, float16, float32 or float64, which the files have too. Sums are kept in
            float32, float64 of float64.
        folder: Of the files hop0, hop1, ...; it is made.
        hops: How many steps; 0 keeps x alone.
        progress: Show a bar. Needs tqdm.

    Raises:
        TypeError, ValueError: An argument does not fit.
        ValueError: A file was made of another graph or of other features, or it is damaged; its
            path is given.

    Source:
        Dwivedi et al., arXiv 2312.11109, section 3.2, and their code; Chen et al., NAGphormer,
        arXiv 2206.04910, eq. 4.

    Example:
        >>> import tempfile, torch
        >>> from fastgt import Graph
        >>> from fastgt.datasets import hop_features
        >>> pair = Graph.from_edge_index(torch.tensor([[0, 1], [1, 0]]))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     _, after, _ = hop_features(pair, torch.tensor([[1.0], [3.0]]), folder)
        ...     [round(float(v), 4) for v in after.array[:, 0]]
        [2.0, 2.0]
    """
    n, hops = check_square(graph), integer("hops", hops, 0)
    values = x.detach().cpu().numpy() if isinstance(x, Tensor) else x
    if not isinstance(values, np.ndarray) or values.dtype not in _FLOATS:
        found = getattr(values, "dtype", type(values).__name__)
        raise TypeError(f"x must be float16, float32 or float64, got {found}")
    if values.ndim != 2 or len(values) != n or n == 0:
        raise ValueError(f"x must be [N, F] = [{n}, F], got {list(values.shape)}")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    about = {"what": "features", "graph": graph_digest(graph), "features": _digest(values)}
    paths = [folder / f"hop{h}" for h in range(hops + 1)]

    def prepared() -> list[BlockFile]:
        return [
            BlockFile.prepared(path, about | {"hop": h}, values.shape, values.dtype)
            for h, path in enumerate(paths)
        ]

    if all(BlockFile.complete(path) for path in paths):
        return prepared()
    with ExitStack() as stack:
        stack.enter_context(files.lock(folder))
        made = prepared()
        shown = None
        if progress:
            from tqdm import tqdm

            total = sum(len(file.missing()) for file in made)
            shown = stack.enter_context(tqdm(total=total, desc="hop_features", unit=" blocks"))
        row_ptr, col = graph.row_ptr.cpu().long(), graph.col.cpu().long()
        rows = (row_ptr.diff() + 1).double().rsqrt()
        columns = (torch.bincount(col, minlength=n) + 1).double().rsqrt()
        for h, file in enumerate(made):
            for block in file.missing():
                first, last = file.span(block)
                found = values[first:last]
                if h:
                    span = row_ptr[first : last + 1]
                    near = col[span[0] : span[-1]]
                    before = made[h - 1].array
                    found = _step(before, span - span[0], near, first, rows, columns)
                    made[h - 1].release()
                file.write(block, found)
                if shown is not None:
                    shown.update()
    return made


def _step(
    before: np.ndarray, row_ptr: Tensor, col: Tensor, first: int, rows: Tensor, columns: Tensor
) -> np.ndarray:
    """A' X for the rows from ``first`` on, of which these are the edges."""
    own = torch.arange(first, first + len(row_ptr) - 1)
    # of all columns these alone are read
    read, place = torch.cat([own, col]).unique(return_inverse=True)
    dtype = torch.float64 if before.dtype == np.float64 else torch.float32
    x = torch.from_numpy(before[read.numpy()]).to(dtype)
    x *= columns[read, None].to(dtype)
    graph = Graph.from_csr(row_ptr, place[len(own) :], len(read))
    with torch.autocast("cpu", enabled=False):  # its sums would be rounded, and stay in the file
        found = aggregate(x, graph) + x[place[: len(own)]]
    found *= rows[own, None].to(dtype)
    return found.numpy().astype(before.dtype)


def _digest(values: np.ndarray) -> str:
    total = hashlib.sha256()
    step = max(1, 2**23 // max(1, values[:1].nbytes))
    for start in range(0, len(values), step):
        total.update(np.ascontiguousarray(values[start : start + step]).data)
    return total.hexdigest()[:16]
