"""All that a GPU is for, in one go on a machine without network: ``make gpu OUT=DIR``, or
``python3 bench/gpu.py --out DIR`` in a bare checkout, with the Python, torch and triton that are
there.

Here, before: ``python -m fastgt.bench.gpu --pack DIR`` makes a folder that may travel along, for
``--carried``: real graphs, other kernels' sources and the commit. ``--rehearse`` goes through
every step without a GPU, on tiny problems, and predicts how long the device will take.

There, in this order: what the machine is and can do; every operator and every plan, forward and
backward, against float64; attention against its peers where figures are published; linear
attention and masked heads; launches and CUDA graphs; plans and tiles. Each step has a file in
``--out``, written as its rows come in, and tasks in processes of their own: a crash costs one of
them, and what time does not allow is named.

Here, after: ``python -m fastgt.bench.gpu --collect DIR --results bench/results`` makes committed
results of that folder.
"""

from __future__ import annotations

import argparse
import atexit
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

ROOT = Path(__file__).resolve().parent.parent


def main(argv: Sequence[str] | None = None) -> int:
    """-> exit status: 0 all is done and right, 1 something is wrong, 2 it cannot begin, 3 time was
    up and something is left."""
    from fastgt.bench import gpu_session

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--out", type=Path, default=Path("runs/gpu"), help="default: %(default)s", metavar="DIR"
    )
    parser.add_argument("--carried", type=Path, metavar="DIR", help="what --pack made")
    parser.add_argument(
        "--minutes", type=float, default=9.5, help="for all steps; default: %(default)s"
    )
    parser.add_argument(
        "--steps",
        nargs="+",
        choices=gpu_session.STEPS,
        default=list(gpu_session.STEPS),
        metavar="STEP",
        help=f"only these: {', '.join(gpu_session.STEPS)}",
    )
    parser.add_argument("--rehearse", action="store_true", help="on this CPU, and predict")
    parser.add_argument("--pack", type=Path, metavar="DIR", help="make the folder that travels")
    parser.add_argument(
        "--peer-path", type=Path, metavar="DIR", help="for --pack: as for fastgt bench"
    )
    parser.add_argument("--collect", type=Path, metavar="DIR", help="what a GPU's --out came to")
    parser.add_argument(
        "--results", type=Path, metavar="DIR", help="for --collect: the folder of results"
    )
    args = parser.parse_args(argv)
    try:
        if args.pack is not None:
            return _pack(args.pack, args.peer_path)
        if args.collect is not None:
            return _collect(args.collect, args.results)
        return gpu_session.run(args)
    except (OSError, RuntimeError, ValueError) as error:
        return _cannot(error)


def _cannot(error: Exception) -> int:
    print(f"fastgt.bench.gpu: {error}", file=sys.stderr)
    return 2


def _pack(folder: Path, peer_path: Path | None) -> int:
    from fastgt.bench import gpu_pack

    for line in gpu_pack.pack(folder, peer_path):
        print(line)
    return 0


def _collect(folder: Path, results: Path | None) -> int:
    from fastgt.bench import gpu_collect

    if results is None:
        raise ValueError(f"--collect {folder}: name the folder of results with --results")
    for line in gpu_collect.collect(folder, results):
        print(line)
    return 0


def _make_importable() -> None:
    """The package of this checkout, which installs kernels/ and bench/ within fastgt/: a folder of
    links says so to Python, to this process and its children."""
    site = Path(tempfile.mkdtemp(prefix="fastgt-"))
    atexit.register(shutil.rmtree, site, ignore_errors=True)
    package = site / "fastgt"
    package.mkdir()
    for entry in (*(ROOT / "fastgt").iterdir(), ROOT / "kernels", ROOT / "bench"):
        (package / entry.name).symlink_to(entry)
    sys.path[0] = str(site)  # the folder of this script, whose modules have common names
    paths = [str(site), os.environ.get("PYTHONPATH", "")]
    os.environ["PYTHONPATH"] = os.pathsep.join(path for path in paths if path)


def _terminated(number: int, frame: object) -> NoReturn:
    """As an exception: children are ended on the way out."""
    sys.exit(128 + number)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, _terminated)
    if __spec__ is None:  # a script, not python -m
        _make_importable()
    try:
        from fastgt.bench import gpu
    except ImportError as missing:  # torch, that is
        sys.exit(_cannot(missing))
    sys.exit(gpu.main())
