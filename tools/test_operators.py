"""The same measurements under pytest-benchmark: ``pytest tools``, with its own options.

``--benchmark-disable`` runs every case once. Providers are verified before they are timed; who
disagrees is an expected failure, who is absent is skipped. On a GPU a round is waited for, and
``extra_info`` has what the GPU's own clock said.
"""

from __future__ import annotations

import statistics
from functools import lru_cache

import pytest
import torch

from fastgt.bench import harness, timing
from fastgt.bench.memory import allocation_limit, peak_extra_memory
from fastgt.bench.operators import OPERATORS

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
CASES = [
    (operator, provider)
    for operator, entry in OPERATORS.items()
    if entry.epochs is None
    for provider in (entry.first, *entry.peers)
]


@lru_cache(maxsize=1)
def _case(operator: str, problem: str) -> harness.Case:
    try:
        return OPERATORS[operator].case(problem, device=DEVICE)
    except FileNotFoundError as error:
        pytest.skip(str(error))


@pytest.mark.parametrize(("operator", "provider"), CASES)
@pytest.mark.parametrize("part", ["forward", "both"])
def test_provider(benchmark, operator, provider, part):
    problem = OPERATORS[operator].smallest
    case = _case(operator, problem)
    if provider not in case.providers:
        pytest.skip(f"{provider} is found under --peer-path alone: fastgt bench")
    benchmark.group = f"{operator}, {problem}, {part}"
    with allocation_limit(DEVICE):
        row, found = harness.judge(case, provider)
        assert row["match"] or provider != OPERATORS[operator].first, row["error"]
        if row["match"] is None:
            pytest.skip(row["error"])
        if not row["match"]:
            pytest.xfail(f"MISMATCH: {row['error']}")
        if part == "both" and "backward_error" in row:
            pytest.skip(row["backward_error"])
        call = harness.forward(found, case) if part == "forward" else harness.step(found, case)
        benchmark.extra_info |= case.shape | harness.environment(DEVICE)
        benchmark.extra_info["peak_bytes"] = peak_extra_memory(call, DEVICE)
        if DEVICE.type == "cuda":
            times = timing.measure({provider: call}, DEVICE)[provider]
            benchmark.extra_info["device_s"] = statistics.median(times)
        benchmark(_waited(call))


def _waited(call):
    if DEVICE.type != "cuda":
        return call

    def waited():
        result = call()
        torch.cuda.synchronize()
        return result

    return waited
