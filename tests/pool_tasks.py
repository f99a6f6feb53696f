"""What tests of bench/gpu_pool.py do in processes of their own, which import it by name."""

import os
import signal
import time

from fastgt.bench import gpu_pool


def double(x, tell):
    tell(f"doubling {x}")
    return 2 * x


def die(tell):
    tell("dying")
    print("last words", flush=True)
    os.kill(os.getpid(), signal.SIGSEGV)


def fail(tell):
    raise ValueError("no such thing\nand more")


def sleep(tell):
    tell("sleeping")
    time.sleep(600)


def sick(tell):
    raise gpu_pool.Sick("an illegal memory access was encountered")


def identity(tell):
    return os.getpid()


def setting(tell):
    return os.environ.get("FASTGT_TEST_OF_A_SETTING")
