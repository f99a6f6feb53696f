"""Compile every kernel configuration for GPUs that need not be here, and count what it uses.

The launchers run as they do in production, on small CPU tensors, with a stand-in for the driver
that names the target: signatures, strides and divisibility hints are those of a real call, only
the launch is left out. ``fastgt report kernels`` prints the figures, and writes them as JSON.
"""

from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from .cases import CASES
from .resources import constants, resources

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}


def compile_ahead(target: str, only: str = "", tell=lambda case: None) -> dict[str, dict]:
    """-> {case/kernel: its resources}; ``tell`` hears of every case before it is compiled."""
    compiled = []

    def compile_only(self, *args, grid, warmup, **kwargs):
        kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        named = dict(zip(self.arg_names[: len(args)], args, strict=True))
        compiled.append((kernel, named | kwargs))

    run, JITFunction.run = JITFunction.run, compile_only
    before, driver._active = driver._active, _Driver(TARGETS[target])
    try:
        found = {}
        for name, launch in CASES.items():
            if only not in name:
                continue
            tell(name)
            compiled.clear()
            launch()
            for kernel, arguments in compiled:
                key = f"{name}/{kernel.metadata.name.strip('_')}"
                if constants(arguments).get("SMALL"):  # the other form of linear attention
                    key += "_small"
                found[key] = resources(kernel, arguments, target)
        return found
    finally:
        JITFunction.run = run
        driver._active = before


class _Driver:
    """As much of a Triton driver as compiling asks for."""

    def __init__(self, target: GPUTarget):
        self.target = target

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> str:
        return str(self.target.arch)  # the key of Triton's kernel cache: one a target

    def get_current_stream(self, device: str) -> int:
        return 0
