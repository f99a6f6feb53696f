"""What every test file stands on: the interpreter, poisoned memory, Hypothesis, the device."""

import importlib.util
import os
import sys
from pathlib import Path

import hypothesis
import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before the first `import triton`

# real graphs lie beside the checkout; tests that find none there are skipped
os.environ.setdefault("FASTGT_DATA", str(Path(__file__).resolve().parents[2] / "shared" / "data"))

# the import mode "importlib" leaves this folder off the path; helper modules are imported from it
sys.path.append(os.path.dirname(__file__))
sys.path.append(os.path.join(os.path.dirname(__file__), "..", "tools"))
pytest.register_assert_rewrite(
    "attention_cases", "distributed_cases", "gps_cases", "graph_cases", "laws", "pattern_cases"
)

hypothesis.settings.register_profile(
    "fastgt",
    deadline=None,
    derandomize="CI" in os.environ,
    print_blob=True,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.load_profile("fastgt")


# what takes minutes begins first, so that no process is left alone with it at the end
LONGEST = ("test_compiled", "test_wheel", "test_versions", "test_linear_attention")


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: LONGEST.index(item.path.stem) if item.path.stem in LONGEST else 99)
    if reason := why_no_kernels():
        for item in items:
            given = item.callspec.params if hasattr(item, "callspec") else {}
            if any(isinstance(x, str) and x == "cpp" for x in given.values()):
                item.add_marker(pytest.mark.skip(reason=reason))


def why_no_kernels() -> str:
    """Why impl="cpp" cannot run here, in one line; empty where it can."""
    from fastgt.cpu import library

    loaded = library.load()
    return loaded.partition("\n")[0] if isinstance(loaded, str) else ""


@pytest.hookimpl(wrapper=True)
def pytest_runtest_setup():
    return (yield from skipped_without_kernels())


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call():
    return (yield from skipped_without_kernels())


def skipped_without_kernels():
    """What asks for kernels inside is skipped where there are none, with the reason."""
    try:
        return (yield)
    except RuntimeError as error:
        if (reason := why_no_kernels()) and reason in str(error):
            pytest.skip(reason)
        raise


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """A process takes whole files, which share fixtures; each target is compiled for apart."""
    from xdist.scheduler import LoadFileScheduling

    class Files(LoadFileScheduling):
        def _split_scope(self, nodeid):
            file, target = super()._split_scope(nodeid), nodeid.partition("[")[2]
            return file + target if "test_compiled" in file else file

    return Files(config, log)


@pytest.fixture(scope="session", autouse=True)
def interpreter():
    if os.environ.get("TRITON_INTERPRET") == "1" and importlib.util.find_spec("triton"):
        from interpreter import remember_what_is_repeated

        remember_what_is_repeated()


@pytest.fixture(scope="session")
def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(scope="module")
def one_thread():
    """For files of small tensors: more threads would mostly wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def compiled_kernels():
    """For a test of what impl=None does with them: without them, it is skipped."""
    from fastgt.cpu import library

    return library.kernels()


@pytest.fixture(scope="session", autouse=True)
def poison():
    from fastgt.testing import poisoned_memory

    with poisoned_memory():
        yield


@pytest.fixture(scope="session")
def ranks(tmp_path_factory):
    """Processes of torch.distributed, for all tests of this one."""
    from rank_workers import Ranks

    found = Ranks(tmp_path_factory.mktemp("ranks"))
    yield found
    found.close()
