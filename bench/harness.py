"""Verify, then time: the parts that every benchmark shares."""

from __future__ import annotations

import functools
import platform
import re
import statistics
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from datetime import date
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastgt.bench import timing
from fastgt.bench.memory import allocation_limit, peak_extra_memory
from fastgt.bench.roofline import Work, measured_rates, roofline
from fastgt.testing import assert_as_accurate

Call = Callable[[], Any]
Rows = list[dict[str, Any]]
UNKNOWN = "unknown"  # the commit of what is no checkout
# what others' code raises where it cannot do this; Triton's errors and a compiler's are among them
FAILURES = (Exception,)


class Provider(NamedTuple):
    """Who computes an output.

    Attributes:
        call: From a case's inputs to the output.
        parameters: Leaves that get gradients too, in one order for all providers of a case.
    """

    call: Callable[..., Tensor]
    parameters: tuple[Tensor, ...] = ()


@dataclass(frozen=True)
class Case:
    """One operator on one problem.

    Attributes:
        shape: Columns that every row of results gets.
        inputs: What ``call`` takes, in this order; floating ones get gradients.
        upstream: Gradient of the output.
        definition: What is right, in that precision; it is called with inputs in that precision.
        providers: The first is whom the others are compared with. Each is made once and prepares
            what is made once for a graph. Raises ImportError where it is not installed, one of
            ``FAILURES`` where it cannot do this.
        parameters: Names of the providers' parameters, as far as they are compared.
        definitions: Of providers that compute something else.
        terms: Per parameter, the size of what its gradient is the difference of, where that
            cancels: see :func:`fastgt.testing.assert_as_accurate`.
        work: Of "forward", "backward" and "both", whoever does it.
    """

    shape: dict[str, Any]
    inputs: dict[str, Tensor]
    upstream: Tensor
    definition: Callable[[torch.dtype], Provider]
    providers: dict[str, Callable[[], Provider]]
    parameters: tuple[str, ...] = ()
    definitions: dict[str, Callable[[torch.dtype], Provider]] = field(default_factory=dict)
    terms: dict[str, Tensor] = field(default_factory=dict)
    work: dict[str, Work] = field(default_factory=dict)

    _known: dict[str, _Truth] = field(default_factory=dict)

    @property
    def device(self) -> torch.device:
        return self.upstream.device

    def truth(self, name: str) -> _Truth:
        """What is right for that provider; kept until :meth:`forget`, the last one only."""
        key = name if name in self.definitions else ""
        if key not in self._known:
            self.forget()
            definition = self.definitions.get(name, self.definition)
            self._known[key] = _Truth(
                results(definition(torch.float64), self, torch.float64),
                results(definition(self.upstream.dtype), self),
            )
        return self._known[key]

    def forget(self) -> None:
        self._known.clear()

    def copied(self) -> Case:
        """With inputs of its own."""
        inputs = {name: x.clone() for name, x in self.inputs.items()}
        return replace(self, inputs=inputs, upstream=self.upstream.clone())

    def equals(self, other: Case) -> bool:
        return torch.equal(self.upstream, other.upstream) and all(
            torch.equal(x, other.inputs[name]) for name, x in self.inputs.items()
        )


class _Truth(NamedTuple):
    """The output and gradients, by the definition."""

    wide: tuple[Tensor, ...]  # in float64
    eager: tuple[Tensor, ...]  # in the case's dtype


def compare(
    case: Case,
    *,
    repeats: int = 9,
    only: Sequence[str] | None = None,
    tell: Callable[[str], None] = lambda provider: None,
) -> Rows:
    """-> one row a provider: whether it is right; if so seconds of a forward without gradients, of
    a backward, and of a forward and backward, ratios to the first, memory and the roofline.

    Args:
        case: Of one operator.
        repeats: Timings of each provider.
        only: These peers beside the first; None for all.
        tell: Hears which provider comes next.
    """
    rows: Rows = []
    found: dict[str, Provider] = {}
    first = next(iter(case.providers))
    with allocation_limit(case.device):
        for name in case.providers:
            if only is not None and name != first and name not in only:
                continue
            tell(name)
            row, provider = judge(case, name)
            if provider is not None:
                found[name] = provider
            rows.append({"provider": name} | row)
        case.forget()
        tell("timing")
        _time(rows, found, case, repeats)
    extra = {"repeats": repeats} | environment(case.device)
    return [case.shape | row | extra for row in rows]


def judge(case: Case, name: str) -> tuple[dict[str, Any], Provider | None]:
    """-> whether the provider is right, as columns of its row, and the provider if it is.

    It is called as it will be timed, without gradients and with them, on copies of the inputs."""
    names = ["output", *_differentiable(case), *case.parameters]
    truth = case.truth(name)
    mine = case.copied()
    try:
        provider = case.providers[name]()
        row = verdict(names[:1], (forward(provider, mine)(),), truth.eager, truth.wide)
        if row["match"]:
            row = _judged_backward(provider, mine, names, truth)
        if row["match"] and not mine.equals(case):
            row = {"match": False, "error": "it writes into its inputs"}
        if "backward_error" in row and name == next(iter(case.providers)):
            row = {"match": None, "error": row["backward_error"]}
    except ImportError as error:
        return {"match": None, "error": f"not installed: {error}"}, None
    except FAILURES as error:
        return {"match": None, "error": reason(error)}, None
    finally:
        if case.device.type == "cuda":
            torch.cuda.empty_cache()  # what a failure left is not to be the next one's
    return row, provider if row["match"] else None


def _judged_backward(
    provider: Provider, case: Case, names: Sequence[str], truth: _Truth
) -> dict[str, Any]:
    try:
        found = results(provider, case)
    except FAILURES as error:
        # some, as FlexAttention on a CPU, have a forward alone
        return {"match": True, "backward_error": reason(error)}
    return verdict(names, found, truth.eager, truth.wide, terms=case.terms)


def verdict(
    names: Sequence[str],
    *results: tuple[Tensor, ...],
    terms: dict[str, Tensor] | None = None,
) -> dict[str, Any]:
    """Whether a provider's results, the first of ``names`` an output and the others gradients, are
    as accurate as eager ones; ``results``: its own, eager ones and those in float64, as many as
    there are names or more; ``terms``: see :func:`fastgt.testing.assert_as_accurate`."""
    try:
        for i, name in enumerate(names):
            tensors = [result[i] for result in results]
            factor = 3.0 if i else 2.0
            assert_as_accurate(*tensors, name, factor=factor, terms=(terms or {}).get(name))
    except AssertionError as error:
        return {"match": False, "error": str(error)}
    return {"match": True}


def reason(error: Exception) -> str:
    """Its first line, with its kind."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else 'no reason given'}"


def _differentiable(case: Case) -> list[str]:
    return [name for name, x in case.inputs.items() if x.is_floating_point()]


def results(provider: Provider, case: Case, dtype: torch.dtype | None = None) -> tuple[Tensor, ...]:
    """The output and all gradients, ``dtype``: of inputs that are cast to it."""
    inputs = [
        x.detach().to(dtype).requires_grad_() if x.is_floating_point() else x
        for x in case.inputs.values()
    ]
    out = provider.call(*inputs)
    return out.detach(), *_backward(out, inputs, provider, case.upstream.to(out.dtype))


def _backward(
    out: Tensor, inputs: list[Tensor], provider: Provider, upstream: Tensor
) -> tuple[Tensor, ...]:
    leaves = [*(x for x in inputs if x.requires_grad), *provider.parameters]
    return torch.autograd.grad(out, leaves, upstream, allow_unused=True, materialize_grads=True)


def forward(provider: Provider, case: Case) -> Call:
    """A call without gradients."""
    return torch.no_grad()(lambda: provider.call(*case.inputs.values()))


def step(provider: Provider, case: Case) -> Callable[[Callable[[], None]], Any]:
    """A forward and backward, which says when the one ends and the other begins."""

    def call(between: Callable[[], None] = lambda: None) -> tuple[Tensor, ...]:
        inputs = [
            x.detach().requires_grad_() if x.is_floating_point() else x
            for x in case.inputs.values()
        ]
        out = provider.call(*inputs)
        between()
        return _backward(out, inputs, provider, case.upstream)

    return call


class _Failed(Exception):
    """Who was right when verified, and fails when timed."""

    def __init__(self, name: str, why: str):
        super().__init__(name)
        self.name, self.why = name, why


def _time(rows: Rows, found: dict[str, Provider], case: Case, repeats: int) -> None:
    """Fill the rows of those found to be right; who fails on the way leaves the others to go on."""
    while True:
        forwards = {name: _named(name, forward(p, case)) for name, p in found.items()}
        steps = {
            row["provider"]: _named(row["provider"], step(found[row["provider"]], case))
            for row in rows
            if row["provider"] in found and "backward_error" not in row
        }
        try:
            _fill(rows, forwards, steps, case, repeats)
        except _Failed as failure:
            del found[failure.name]
            row = next(row for row in rows if row["provider"] == failure.name)
            row.clear()
            row |= {"provider": failure.name, "match": None, "error": failure.why}
        else:
            return


def _named(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(call)
    def named(*args: Any) -> Any:
        try:
            return call(*args)
        except FAILURES as error:
            raise _Failed(name, f"while timed: {reason(error)}") from error

    return named


def _fill(
    rows: Rows,
    forwards: dict[str, Call],
    steps: dict[str, Callable[..., Any]],
    case: Case,
    repeats: int,
) -> None:
    times = {
        "forward": timing.measure(forwards, case.device, repeats=repeats),
        **timing.measure_steps(steps, case.device, repeats),
    }
    work = case.work.get("both", case.work.get("forward"))
    rates = measured_rates(case.device, case.upstream.dtype, _footprint(case), work)
    first = next(iter(case.providers))
    for row in rows:
        name = row["provider"]
        for part, seconds in times.items():
            if name not in seconds:
                continue
            row[f"{part}_s"] = statistics.median(seconds[name])
            row[f"{part}_spread"] = timing.spread(seconds[name])
            if first in seconds:
                row[f"{part}_x"] = timing.ratio(seconds[name], seconds[first])
            if part in case.work:
                found = roofline(case.work[part], row[f"{part}_s"], rates)
                row |= {f"{part}_{key}": value for key, value in found.items()}
        if name in forwards:
            row["forward_peak_bytes"] = peak_extra_memory(forwards[name], case.device)
            row |= rates
        if name in steps:
            row["both_peak_bytes"] = peak_extra_memory(steps[name], case.device)
        if case.device.type == "cuda":
            for part, calls in (("forward", forwards), ("both", steps)):
                if name in calls:
                    row |= _named(name, _on_device)(part, calls[name], case.device)


def _on_device(part: str, call: Any, device: torch.device) -> dict[str, Any]:
    from fastgt.bench import device_time

    # as it is: that it cannot be captured is a result, not a failure
    return device_time.measure(part, call.__wrapped__, device)


def _footprint(case: Case) -> int:
    """Bytes of inputs and output: what a pass over the problem touches."""
    return sum(x.nbytes for x in case.inputs.values()) + case.upstream.nbytes


def environment(device: torch.device) -> dict[str, str]:
    """What every row of results carries."""
    if device.type == "cuda":
        where = torch.cuda.get_device_name(device)
    else:
        where = f"{_cpu_name()}, {torch.get_num_threads()} threads"
    return {
        "date": date.today().isoformat(),
        "device": where,
        "commit": commit(),
        "torch": torch.__version__,
        "triton": version("triton"),
        "torch_geometric": version("torch_geometric"),
        "torch_scatter": version("torch_scatter"),
    }


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def commit(folder: Path = Path(__file__).parent) -> str:
    """Of the checkout that ``folder`` is in: "-dirty" where another file than results differs."""

    def git(*command: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(["git", *command], cwd=folder, capture_output=True, text=True)

    try:
        described = git("describe", "--always", "--exclude=*")
        # measurements write results while others still run: those change nothing that is measured
        same = git("diff", "--quiet", "HEAD", "--", ":/", ":(top,exclude)bench/results")
    except FileNotFoundError:  # no git
        return UNKNOWN
    name = described.stdout.strip()
    return f"{name}-dirty" if name and same.returncode else name or UNKNOWN


def slug_of(name: str) -> str:
    """A GPU's name in those of its files."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def version(name: str) -> str:
    """Of an installed package."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(name)
    except PackageNotFoundError:
        return "absent"
