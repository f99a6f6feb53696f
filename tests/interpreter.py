"""Triton's interpreter, without the work that it repeats: no result changes.

To interpret, Triton replaces the functions of ``triton.language`` by its own. It does so for every
launch and for every jitted function that a kernel calls, and looks through all members of its
modules each time. It also works out the shape and the name of a tile's type for every operation.
Together that took twice as long as everything else that a kernel does.
"""

import inspect


def remember_what_is_repeated() -> None:
    """Raises a RuntimeError where Triton's interpreter is not made as it is known here."""
    import triton
    from triton.runtime import interpreter

    core = triton.language.core
    _replace_language_once(interpreter, (triton.language, core))
    interpreter._get_np_dtype = _by_name(interpreter._get_np_dtype)
    shapes = _remember_types(core.block_type)
    _remember_shapes(core.tensor, shapes)


def _replace_language_once(interpreter, languages) -> None:
    """The functions stay replaced: a process that interprets compiles nothing."""
    replace, scope = interpreter._patch_lang, interpreter._LangPatchScope
    _expect(inspect.signature(replace).parameters.keys() == {"fn"}, "_patch_lang")
    seen, replaced = set(), set()

    def replace_once(fn):
        if fn not in seen:
            # which of the modules a function sees decides what is replaced
            visible = [x for x in fn.__globals__.values() if inspect.ismodule(x) and x in languages]
            names = frozenset(module.__name__ for module in visible)
            if names not in replaced:
                replace(fn)
            replaced.add(names)
            seen.add(fn)
        return scope()  # of which nothing is put back

    interpreter._patch_lang = replace_once


def _by_name(numpy_dtype):
    _expect(inspect.signature(numpy_dtype).parameters.keys() == {"tt_dtype"}, "_get_np_dtype")
    known = {}

    def remembered(tt_dtype):
        name = tt_dtype.name
        if name not in known:
            known[name] = numpy_dtype(tt_dtype)
        return known[name]

    return remembered


def _remember_types(block_type) -> set[int]:
    """-> the identities of the shapes that types share; they live as long as the process."""
    make, known, shapes = block_type.__init__, {}, set()
    _expect(list(inspect.signature(make).parameters) == ["self", "element_ty", "shape"], "types")

    def remembered(self, element_ty, shape):
        # a size may be an int or Triton's constant; all but the element's type follows from these
        key = (element_ty.name, *[getattr(size, "value", size) for size in shape])
        facts = known.get(key)
        if facts is None:
            make(self, element_ty, shape)
            _expect(self.__dict__.keys() == {"element_ty", "shape", "numel", "name"}, "types")
            known[key] = dict(self.__dict__)
            shapes.add(id(self.shape))
        else:
            self.__dict__.update(facts)
            self.element_ty = element_ty

    block_type.__init__ = remembered
    return shapes


def _remember_shapes(tensor, shapes: set[int]) -> None:
    make, known = tensor.__init__, {}
    _expect(list(inspect.signature(make).parameters) == ["self", "handle", "type"], "tensors")

    def remembered(self, handle, type):
        shape = id(type.shape) if type.is_block() else 0
        facts = known.get(shape)
        if facts is None:
            make(self, handle, type)
            fields = {"handle", "shape", "numel", "type", "dtype"}
            _expect(self.__dict__.keys() == fields, "tensors")
            if shape in shapes or not shape:
                known[shape] = self.numel, self.shape
        else:
            self.handle, self.type, self.dtype = handle, type, type.scalar
            self.numel, self.shape = facts

    tensor.__init__ = remembered


def _expect(known: bool, part: str) -> None:
    if not known:
        raise RuntimeError(f"tests/interpreter.py does not know this Triton's interpreter: {part}")
