"""``fastgt doctor``: what runs here, and why."""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from torch import Tensor

import fastgt
from fastgt import __version__
from fastgt.cpu import library
from fastgt.graph import Graph
from fastgt.ops.implementation import resolve_impl
from fastgt.terminal import wrapped

PACKAGES = "torch", "triton", "numpy", "scipy", "torch-geometric"


def run(as_json: bool = False) -> int:
    """Print what runs here and a trial of every operator, forward and backward.

    -> exit status: 1 where this CPU has no kernels, or where an operator is wrong.
    """
    found = examined()
    print(json.dumps(found, indent=1) if as_json else table(found))
    right = all(x["right"] for x in found["operators"].values())
    return 0 if right and found["cpu"]["kernels"] else 1


def examined() -> dict[str, Any]:
    """What ``fastgt doctor`` tells."""
    cuda = torch.cuda.is_available()
    loaded = library.load()
    cpu: dict[str, Any] = {"threads": torch.get_num_threads(), "kernels": None}
    if isinstance(loaded, str):
        cpu["why"] = loaded
    else:
        cpu |= {
            "kernels": library.variant(),
            "vector_bytes": loaded.vector_bytes,
            "path": str(loaded.path),
        }
    device = torch.device("cuda" if cuda else "cpu")
    return {
        "fastgt": __version__,
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in PACKAGES},
        "gpu": torch.cuda.get_device_name() if cuda else None,
        "cpu": cpu,
        "operators": {name: _tried(call, device) for name, call in OPERATORS.items()},
    }


def table(found: dict[str, Any]) -> str:
    """The same for a terminal."""
    packages = ", ".join(f"{name} {number}" for name, number in found["packages"].items())
    cpu = found["cpu"]
    lines = [
        wrapped(f"fastgt {found['fastgt']}, Python {found['python']}, {packages}"),
        f"GPU: {found['gpu'] or 'none for this PyTorch'}",
    ]
    if cpu["kernels"]:
        lines += [
            f"CPU: kernels of the variant {cpu['kernels']}, with vectors of {cpu['vector_bytes']} "
            f"bytes, on {cpu['threads']} thread{'' if cpu['threads'] == 1 else 's'}",
            f"  {cpu['path']}",
        ]
    else:
        why = f"CPU: no kernels, the slow reference runs: {cpu['why']}"
        lines += map(wrapped, why.splitlines())
    lines += ["", f"{'operator':<24}{'runs by':<12}forward and backward"]
    for name, x in found["operators"].items():
        said = f"{1e3 * x['seconds']:.1f} ms, as defined" if x["right"] else f"WRONG: {x['why']}"
        lines.append(wrapped(f"{name:<24}{x['impl']:<12}{said}", " " * 36))
    operators = found["operators"].values()
    agree = sum(x["right"] for x in operators)
    lines += ["", f"{agree} of {len(operators)} operators agree with their definitions"]
    return "\n".join(lines)


def _tried(call: Callable[..., Tensor], device: torch.device) -> dict[str, Any]:
    """One operator by the implementation that runs here, beside the definition."""
    impl = resolve_impl(None, torch.empty(0, device=device))
    try:
        found, seconds = _evaluated(call, impl, device)
        truth, _ = _evaluated(call, "reference", device)
    except RuntimeError as error:
        why = str(error).strip().partition("\n")[0]
        return {"impl": impl, "right": False, "why": why, "seconds": None}
    for x, y, what in zip(found, truth, ("its output", "its gradient"), strict=True):
        off, size = float((x - y).abs().max()), float(y.abs().max())
        if not off <= TOLERANCE * size:  # NaN too
            why = f"{what} is off by {off:.1e} where numbers are up to {size:.1e}"
            return {"impl": impl, "right": False, "why": why, "seconds": None}
    return {"impl": impl, "right": True, "why": None, "seconds": seconds}


def _evaluated(
    call: Callable[..., Tensor], impl: str, device: torch.device
) -> tuple[list[Tensor], float]:
    """-> the output and the gradient of x, and the seconds of the second call."""
    generator = torch.Generator().manual_seed(0)
    edges = torch.randint(NODES, (2, EDGES), generator=generator)
    graph = Graph.from_edge_index(edges.to(device), NODES)
    x = torch.randn(NODES, HEADS, WIDTH, generator=generator).to(device).requires_grad_()
    e = torch.randn(EDGES, HEADS, WIDTH, generator=generator).to(device)
    seconds = 0.0
    for _ in range(2):
        begin = time.perf_counter()
        out = call(graph, x, e, impl=impl)
        (grad,) = torch.autograd.grad(out.square().sum(), x)
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds = time.perf_counter() - begin
    return [out.detach(), grad], seconds


NODES, EDGES, HEADS, WIDTH = 500, 4000, 4, 19
TOLERANCE = 1e-4  # of the largest number: sums of float32
OPERATORS: dict[str, Callable[..., Tensor]] = {
    "neighborhood_attention": lambda g, x, e, **how: fastgt.neighborhood_attention(
        x, x, x, g, edge_key=e, **how
    ),
    "additive_attention": lambda g, x, e, **how: fastgt.additive_attention(
        x, x, x, g, e[0], edge_key=e, **how
    ),
    "channelwise_attention": lambda g, x, e, **how: fastgt.channelwise_attention(e, x, g, **how),
    "aggregate": lambda g, x, e, **how: fastgt.aggregate(
        x.flatten(1), g, edge_value=e.flatten(1), activation="relu", **how
    ),
    "gated_aggregate": lambda g, x, e, **how: fastgt.gated_aggregate(
        x.flatten(1), g, e.flatten(1), gate_row=x.flatten(1), **how
    ),
    "segment_softmax": lambda g, x, e, **how: fastgt.segment_softmax(
        x.index_select(0, g.edge_index[0]), g, **how
    ),
    "global_attention": lambda g, x, e, **how: fastgt.global_attention(x, x, x, **how),
    "linear_attention": lambda g, x, e, **how: fastgt.linear_attention(x, x, x, **how),
    "sgformer_attention": lambda g, x, e, **how: fastgt.sgformer_attention(x, x, x, **how),
    "segment_mean": lambda g, x, e, **how: fastgt.segment_mean(x, g.graph_ptr, **how),
    "head_projection": lambda g, x, e, **how: fastgt.head_projection(x, e[:8], **how),
}
"""Every operator of its kind on small tensors: x of nodes ``[N, H, D]``, e of edges."""


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "missing"
