"""Triton's interpreter, without the work that it repeats for every call of a function.

To interpret, Triton replaces the functions of ``triton.language`` by its own. It does so for every
launch and for every jitted function that a kernel calls, and looks through all members of its
modules each time. That took longer than the kernels' arithmetic. Here it is done once.
"""

import inspect


def keep_language_replaced() -> None:
    """Let the interpreter replace Triton's functions once a process, and not put them back.

    Nothing compiles in a process that interprets, so nothing misses the functions replaced.
    """
    import triton.language as tl
    from triton.runtime import interpreter

    replace = interpreter._patch_lang
    scope = interpreter._LangPatchScope
    if list(inspect.signature(replace).parameters) != ["fn"] or scope()._changes != []:
        raise RuntimeError("Triton's interpreter replaces its language in another way: see there")
    replaced = set()

    def replace_once(fn):
        # a function's own modules decide what is replaced
        languages = frozenset(
            module.__name__
            for module in fn.__globals__.values()
            if inspect.ismodule(module) and module in (tl, tl.core)
        )
        if languages not in replaced:
            replace(fn)
            replaced.add(languages)
        return scope()  # of which nothing is put back

    interpreter._patch_lang = replace_once
