"""What every test file stands on: the interpreter, poisoned memory, Hypothesis, the device."""

import functools
import os
import sys

import hypothesis
import pytest
import torch
from torch.utils._device import _device_constructors

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before the first `import triton`

# the import mode "importlib" leaves this folder off the path; helper modules are imported from it
sys.path.append(os.path.dirname(__file__))
pytest.register_assert_rewrite("attention_cases", "graph_cases")

hypothesis.settings.register_profile(
    "fastgt",
    deadline=None,
    derandomize="CI" in os.environ,
    print_blob=True,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.load_profile("fastgt")

# torch.device("meta") looks once for the functions that make tensors: before any is poisoned
_device_constructors()


@pytest.fixture(scope="session")
def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(scope="session", autouse=True)
def poison():
    """Memory that the library asks for uninitialised starts as NaN, or as an absurd integer."""
    with pytest.MonkeyPatch.context() as patch:
        poison_memory(patch.setattr)
        yield


def poison_memory(set_attribute):
    """Replace what allocates, by ``setattr`` or one that is undone."""
    for owner, name in (
        (torch, "empty"),
        (torch, "empty_like"),
        (torch, "empty_strided"),
        (torch.Tensor, "new_empty"),
        (torch.Tensor, "new_empty_strided"),
    ):
        set_attribute(owner, name, _poisoned(getattr(owner, name)))


def _poisoned(allocate):
    @functools.wraps(allocate)
    def empty(*args, **kwargs):
        x = allocate(*args, **kwargs)
        if torch.compiler.is_compiling():  # what follows cannot be traced
            return x
        if sys._getframe(1).f_globals.get("__name__", "").split(".")[0] != "fastgt":
            return x
        if x.is_floating_point() or x.is_complex():
            return x.fill_(float("nan"))
        return x.fill_(True if x.dtype == torch.bool else torch.iinfo(x.dtype).max // 2)

    return empty
