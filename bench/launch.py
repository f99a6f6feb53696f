"""Host cost of one attention call: everything but the kernels, measured where there is no GPU.

``python -m fastgt.bench.launch`` runs the Triton path on CPU tensors with a driver that compiles
for a named target and launches nothing. What is left is Python, PyTorch's dispatcher and
autograd, and Triton's own argument handling: what a batch of small graphs waits for.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from fastgt import Graph, files, neighborhood_attention
from fastgt.bench import harness
from fastgt.testing import random_batch


def run(*, target: str = "sm_90", repeats: int = 200, rounds: int = 7) -> dict[str, float]:
    """-> microseconds of a call on small graphs (H=8, D=16), medians over ``rounds`` means."""
    from triton.runtime import driver

    from fastgt.kernels.ahead import TARGETS

    # few molecules: the host's work does not depend on their number, but a CPU's allocator does
    with (
        mock.patch.object(driver, "_active", _Nowhere(TARGETS[target])),
        mock.patch("fastgt.ops.attention_launch.require_triton", _allow),
    ):
        return measure(calls(random_batch(0, [(23, 50)] * 4)), repeats, rounds)


def calls(graph: Graph) -> dict[str, Callable[[], Any]]:
    """Attention of 8 heads of 16 channels by Triton's kernels, each way that it is called."""
    graph.columns  # noqa: B018  built once for a graph, not at every call
    generator = torch.Generator().manual_seed(0)
    q, k, v, do = torch.randn(4, graph.num_rows, 8, 16, generator=generator).to(graph.device)
    inputs = [x.requires_grad_() for x in (q, k, v)]

    def attention() -> Any:
        return neighborhood_attention(*inputs, graph, impl="triton")

    return {
        "forward, no_grad": torch.no_grad()(attention),
        "forward": attention,
        "forward and backward": lambda: torch.autograd.grad(attention(), inputs, do),
    }


def measure(
    calls: dict[str, Callable[[], Any]], repeats: int = 200, rounds: int = 7
) -> dict[str, float]:
    """-> microseconds of the host, medians over ``rounds`` means."""
    return {name: _microseconds(f, repeats, rounds) for name, f in calls.items()}


def _microseconds(f: Callable[[], Any], repeats: int, rounds: int) -> float:
    for _ in range(min(10, repeats)):
        f()
    means = []
    for _ in range(rounds):
        begin = time.perf_counter()
        for _ in range(repeats):
            f()
        means.append((time.perf_counter() - begin) / repeats * 1e6)
    return statistics.median(means)


def _allow(x: torch.Tensor) -> None:
    """CPU tensors are as good as any where nothing is launched."""


class _Nowhere:
    """A Triton driver whose launches do nothing."""

    def __init__(self, target: Any):
        self.target = target
        self.utils = self

    def get_current_target(self) -> Any:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": 2**20, "warpSize": 32, "max_num_regs": 2**16}

    def load_binary(self, *args: Any) -> tuple[int, int, int, int, int]:
        return 0, 0, 0, 0, 1024  # module, function, registers, spills, threads

    def launcher_cls(self, *args: Any) -> Callable[..., None]:
        return lambda *launch, **options: None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    targets = "sm_80", "sm_90", "sm_100"
    parser.add_argument("--target", default="sm_90", choices=targets, help="default: %(default)s")
    parser.add_argument("--repeats", type=int, default=200)
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    args = parser.parse_args()
    print(f"92 nodes, 200 edges, H=8, D=16, float32, {args.target}, nothing launched")
    costs = run(target=args.target, repeats=args.repeats)
    for name, microseconds in costs.items():
        print(f"{name:22} {microseconds:7.1f} us")
    if args.json is not None:
        rows = [
            {"call": name, "microseconds": us, "target": args.target}
            | harness.environment(torch.device("cpu"))
            for name, us in costs.items()
        ]
        args.json.parent.mkdir(parents=True, exist_ok=True)
        files.write(args.json, (json.dumps(rows, indent=1) + "\n").encode())


if __name__ == "__main__":
    os.environ["TRITON_INTERPRET"] = "0"  # before the first `import triton`
    main()
