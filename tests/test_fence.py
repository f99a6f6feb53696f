"""No kernel touches memory beyond its tensors, at either end."""

import ast
import shutil
from pathlib import Path

import pytest
import torch
from fence import SIDES, Crash, Worker
from fence_cases import ENDS, OPERATORS, calls, copied
from hypothesis import HealthCheck, given, settings

from fastgt import kernels

KERNELS = Path(kernels.__file__).parent

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


# by file, the calls that reach all its masks
REACH = {
    "additive_attention.py": ENDS["additive"][:2],
    "additive_attention_backward.py": ENDS["additive"][:2],
    "aggregate.py": [ENDS["mean"][1], ENDS["max"][0], ENDS["sum"][2]],
    "attention.py": ENDS["attention"][:1],
    "attention_backward.py": ENDS["edge terms"][:1],
    "attention_combine.py": ENDS["attention"][:1],
    "attention_windows.py": ENDS["windows"][:3],
    "attention_windows_backward.py": ENDS["windows"][:3],
    "buckets.py": [ENDS["sum"][2], ENDS["attention"][4]],
    "channels.py": [*ENDS["softmax"][:1], ENDS["weights"][1]],
    "channelwise_attention.py": ENDS["channelwise"][1:2],
    "channelwise_attention_backward.py": ENDS["channelwise"][:3],
    "channelwise_tile.py": ENDS["channelwise"][:3],
    "edge_tile.py": ENDS["edge terms"][:2],
    "global_attention.py": ENDS["global"],
    "global_attention_backward.py": ENDS["global"],
    "head_projection.py": ENDS["projection"][::3],
    "linear_attention.py": ENDS["linear"][:1],
    "linear_attention_backward.py": ENDS["linear"][:1],
    "linear_features.py": ENDS["linear"][:1],
    "linear_states.py": ENDS["linear"][:1],
    "loads.py": [ENDS["sum"][2], ENDS["attention"][4], ENDS["windows"][0], ENDS["attention"][0]],
}
# Where these masks are false, the address is still one of the tensor: that of number 0, of the next
# row, or of an inactive head. Without them kernels compute nonsense, but they stay inside.
INSIDE = {
    "attention_windows.py": [
        "tl.store(place, p.to(weights_ptr.dtype.element_ty), mask=live & read[:, None])",
        "tl.load(bias.ptr + at, mask=mask, other=0.0)",
    ],
    "attention_windows_backward.py": [
        "tl.store(place, ds.to(out.dbias.dtype.element_ty), mask=live & mine[:, None])",
    ],
    # in tables of buckets: the same loads of rows as they stand are not among these
    "buckets.py": [
        "tl.load(ptr_ptr + row, mask=mine, other=0)",
        "tl.load(ptr_ptr + row + 1, mask=mine, other=0)",
    ],
    "channels.py": [
        "tl.load(weight.ptr + at, mask=live, other=0.0)",
        "tl.store(ptr + at, tl.sum(x, 2).to(ptr.dtype.element_ty), mask=live)",
    ],
    "channelwise_attention_backward.py": ["tl.load(cu_ptr + at, mask=mask, other=0.0)"],
    "edge_tile.py": ["tl.load(drop.numbers + number, mask=live, other=0)"],
    "head_projection.py": ["tl.load(at, mask=active, other=0.0)"],
}


@pytest.mark.parametrize("name", REACH)
def test_a_kernel_without_one_of_its_masks_dies(tmp_path, name):
    source = (KERNELS / name).read_text()
    survivors = []
    for number, mask in enumerate(_masks(source)):
        folder = tmp_path / str(number)
        shutil.copytree(KERNELS, folder)
        (folder / name).write_text(_without(source, mask))
        if not _dies(folder, REACH[name]):
            survivors.append(ast.unparse(mask))
    assert sorted(survivors) == sorted(INSIDE.get(name, []))


def test_every_file_of_kernels_is_tried():
    masked = {path.name for path in KERNELS.glob("*.py") if list(_masks(path.read_text()))}
    assert masked == set(REACH)


def _dies(folder, calls):
    """Whether the kernels of a folder do, in one of the calls."""
    with Worker(folder) as worker:
        try:
            for call in calls:
                check(worker, call)
        except Crash as crash:
            return str(folder) in str(crash)
    return False


def _masks(source):
    """Loads and stores with a mask, and statements that narrow one."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("tl.load", "tl.store"):
            if any(keyword.arg == "mask" for keyword in node.keywords):
                yield node
        elif isinstance(node, ast.AugAssign) and ast.unparse(node.target) == "mask":
            yield node


def _without(source, node):
    """The source with an unmasked load or store there, or without the narrowing."""
    text = "pass"
    if isinstance(node, ast.Call):
        left = [keyword for keyword in node.keywords if keyword.arg not in ("mask", "other")]
        text = ast.unparse(ast.Call(node.func, node.args, left))
    lines = source.splitlines(keepends=True)
    before = lines[node.lineno - 1][: node.col_offset]
    after = lines[node.end_lineno - 1][node.end_col_offset :]
    return "".join([*lines[: node.lineno - 1], before, text, after, *lines[node.end_lineno :]])
