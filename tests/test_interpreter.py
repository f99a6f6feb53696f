"""What tests/interpreter.py remembers is what Triton would work out again."""

import math
import os
from types import SimpleNamespace

import pytest

triton = pytest.importorskip("triton")

import interpreter  # noqa: E402

core = triton.language.core
ELEMENTS = (core.float32, core.int1, core.pointer_type(core.bfloat16))

pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1", reason="kernels are compiled here"
)


@pytest.mark.parametrize("element", ELEMENTS, ids=str)
@pytest.mark.parametrize("shape", [(4,), (2, 8), (8, 2), (1, 1, 16)], ids=str)
def test_a_tile_has_its_own_type(element, shape):
    for _ in range(2):  # the second is remembered
        for sizes in (list(shape), [core.constexpr(size) for size in shape]):
            tile = core.block_type(element, sizes)
            assert tile.element_ty is element
            assert tuple(tile.shape) == shape
            assert tile.numel == math.prod(shape)
            assert str(element) in tile.name

            tensor = core.tensor("handle", tile)
            assert tensor.handle == "handle"
            assert tensor.type is tile
            assert tensor.dtype is element
            assert [size.value for size in tensor.shape] == list(shape)
            assert tensor.numel.value == math.prod(shape)


def test_a_scalar_has_no_shape():
    for element in ELEMENTS:
        tensor = core.tensor("handle", element)
        assert (len(tensor.shape), tensor.numel.value) == (0, 1)
        assert tensor.dtype is element


def test_a_shape_that_triton_refuses_is_refused_each_time():
    for _ in range(2):
        with pytest.raises(ValueError, match="power of 2"):
            core.block_type(core.float32, [3])


def test_an_interpreter_of_another_form_is_refused():
    other = SimpleNamespace(_patch_lang=lambda fn, scope: None, _LangPatchScope=object)
    with pytest.raises(RuntimeError, match="does not know this Triton's interpreter: _patch_lang"):
        interpreter._replace_language_once(other, ())
