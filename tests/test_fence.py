"""No kernel touches memory beyond its tensors, at either end."""

import pytest
import torch
from fence import SIDES, Crash, Worker
from fence_cases import ENDS, OPERATORS, calls, copied
from hypothesis import HealthCheck, given, settings

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available(),
    reason="kernels run on the GPU: `compute-sanitizer pytest tests` looks at their accesses there",
)


@pytest.fixture(scope="module")
def worker():
    with Worker() as worker:
        yield worker


def check(worker, call):
    """The call dies at neither side, and gives the same bits at both."""
    at_end, at_begin = (worker(side, *call) for side in SIDES)
    differ = [name for name, bits in at_end.items() if bits != at_begin[name]]
    assert not differ, f"{call[1:]}: {differ} depend on what lies beside a tensor"


@pytest.mark.parametrize("operator", ENDS)
def test_no_access_out_of_bounds_where_tiles_end(worker, operator):
    for call in ENDS[operator]:
        check(worker, call)


@pytest.mark.parametrize("operator", OPERATORS)
def test_no_access_out_of_bounds(worker, operator):
    @settings(max_examples=8, suppress_health_check=list(HealthCheck))
    @given(call=calls(operator))
    def run(call):
        check(worker, call)

    run()


def test_results_are_those_without_fences(worker):
    for operator, (_, (function, *arguments), *_) in ENDS.items():
        plain, fenced = (worker(side, function, *arguments) for side in (None, "end"))
        assert fenced == plain, operator


@pytest.mark.parametrize("side", SIDES)
def test_lanes_that_are_masked_off_may_point_anywhere(worker, side):
    # 16 lanes
    assert worker(side, copied, 9) == list(range(9))


@pytest.mark.parametrize("by", ["load_by", "store_by"])
@pytest.mark.parametrize(("side", "places"), [("end", 1), ("begin", -1)])
def test_one_element_beyond_a_tensor_ends_the_process(worker, side, places, by):
    with pytest.raises(Crash, match=r"copied\(9, .*SIGSEGV(?s:.*)in _copy_kernel"):
        worker(side, copied, 9, *((places, 0) if by == "load_by" else (0, places)))
    assert worker(side, copied, 9) == list(range(9))  # by another process


@pytest.mark.parametrize(
    ("side", "places", "first", "stride"),
    [("end", -1, -4, 1), ("begin", 1, 36, 1), ("begin", 1, 4, 2)],
)
def test_what_is_written_beside_elements_is_found(worker, side, places, first, stride):
    with pytest.raises(AssertionError, match=rf"pointers.y of _copy_kernel: .* byte \[{first},"):
        worker(side, copied, 9, 0, places, stride)


def test_what_is_read_beside_elements_is_nan(worker):
    found = worker("end", copied, 9, -1)
    assert found[0] != found[0]
    assert found[1:] == list(range(8))
