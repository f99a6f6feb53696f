"""``fastgt doctor``: what runs here, and why."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version

import torch

from fastgt import __version__
from fastgt.cpu import library
from fastgt.graph import Graph
from fastgt.ops.segment_softmax import segment_softmax


def run() -> int:
    """-> exit status: 1 where this CPU has no kernels, or wrong ones."""
    packages = ", ".join(f"{name} {_version(name)}" for name in ("torch", "triton", "numpy"))
    print(f"fastgt {__version__}, Python {platform.python_version()}, {packages}")
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "none for this PyTorch"
    print(f"GPU: {gpu}")
    loaded = library.load()
    if isinstance(loaded, str):
        print(f"CPU: no kernels, the slow reference runs: {loaded}")
        return 1
    right = _agrees()
    print(
        f"CPU: kernels of the variant {library.variant()}, with vectors of {loaded.vector_bytes} "
        f"bytes, on {torch.get_num_threads()} threads ({loaded.path})\n"
        f"CPU: a small softmax by these kernels is {'right' if right else 'WRONG'}"
    )
    return 0 if right else 1


def _agrees() -> bool:
    edges = torch.randint(50, (2, 400), generator=torch.Generator().manual_seed(0))
    graph, x = Graph.from_edge_index(edges, 50), torch.linspace(-9, 9, 400 * 19).view(400, 19)
    found, truth = (segment_softmax(x, graph, impl=i) for i in ("cpp", "reference"))
    return torch.allclose(found, truth, 1e-5, 1e-7)


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "missing"
