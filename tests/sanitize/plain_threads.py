"""A plugin of pytest: kernels run on the plain threads of ``threads.cpp``."""

import ctypes
from pathlib import Path

import fastgt
from fastgt.cpu import library


def pytest_configure():
    threads = ctypes.CDLL(str(Path(fastgt.__file__).parents[1] / "libthreads.so"))
    function = ctypes.cast(threads.plain_threads, ctypes.c_void_p)
    library.kernels()._library.fastgt_use_threads(function)
