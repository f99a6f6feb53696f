"""The command ``fastgt``."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TextIO

from fastgt import __version__
from fastgt.options import up_to
from fastgt.terminal import text_on_stderr

if TYPE_CHECKING:
    import torch

EPOCHS = 80
INT32_MAX = 2**31 - 1
WELCOME = f"""fastgt {__version__}: attention that graph transformers run on.

    fastgt doctor          what runs on this machine, and why
    fastgt demo            train a graph transformer on Debian's packages, in minutes
    fastgt train --list    models, data sets, published results

fastgt --help has all commands, and what exit statuses mean."""
STATUSES = """exit statuses:
  0    done
  1    failed: no memory, device, disk or package for it, or a result is wrong
  2    refused: a wrong command line, or an input that is absent, damaged or does not fit
  130  interrupted, by Ctrl-C; a training, by SIGTERM too
  141  nobody reads the output any more, as after "| head"

An error is one line on stderr. JSON on stdout is alone there."""
# what an input is refused with; of other errors of the system, the machine is the cause
REFUSED = (
    ValueError,
    FileNotFoundError,
    FileExistsError,
    IsADirectoryError,
    NotADirectoryError,
)
FAILED = (RuntimeError, OSError, ImportError, MemoryError)


def main(argv: Sequence[str] | None = None) -> int:
    """-> exit status, as ``STATUSES`` has them."""
    status = 0
    try:
        try:
            status = _run(argv)
        finally:
            if sys.stdout is not None:  # None: closed, as by `>&-`
                sys.stdout.flush()  # after --help too
    except BrokenPipeError:  # as by `| head`
        _to_nowhere(sys.stdout, sys.stderr)
        return 128 + 13  # what a shell makes of SIGPIPE
    except OSError as error:  # as of a full disk
        _to_nowhere(sys.stdout)
        return status or _told(error, 1)
    return status


def _to_nowhere(*streams: TextIO | None) -> None:
    """What is still buffered has to go somewhere at exit."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in filter(None, streams):
        os.dup2(nowhere, stream.fileno())


def _run(argv: Sequence[str] | None) -> int:
    args = _parser().parse_args(argv)
    if args.run is None:
        print(WELCOME)
        return 0
    try:
        return args.run(args)
    except BrokenPipeError:
        raise
    except KeyboardInterrupt as stop:
        if sys.stderr is not None and sys.stderr.isatty():
            print(file=sys.stderr)  # the terminal's ^C stands in the line of the cursor
        return _told(str(stop) or "interrupted", 130)
    except REFUSED as error:
        return _told(error, 2)
    except FAILED as error:
        return _told(error, 1)


def _told(error: Exception | str, status: int) -> int:
    """One line on stderr. -> the status."""
    # PyTorch's own may end with the frames of its C++ code
    said = str(error).partition("\nException raised from ")[0]
    line = " ".join(filter(None, map(str.strip, said.splitlines()))) or type(error).__name__
    if sys.stderr is not None:  # else print takes stdout
        print(f"fastgt: {line}", file=sys.stderr)
    return status


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}; see {self.prog} --help\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="fastgt",
        description="Attention for graph transformers.",
        epilog=STATUSES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"fastgt {__version__}")
    parser.set_defaults(run=None)
    commands = parser.add_subparsers(metavar="command")
    demo = commands.add_parser(
        "demo",
        help="train a graph transformer on the dependency graph of Debian",
        description="Train a graph transformer on the dependency graph of Debian 12 (63,436 "
        "packages) and compare it with the same model on gather-softmax-scatter attention. "
        "Time means something on a quiet machine only.",
    )
    demo.add_argument(
        "--epochs", type=up_to(INT32_MAX), default=EPOCHS, help="default: %(default)s"
    )
    demo.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    _add_where(demo)
    demo.add_argument("--output", type=Path, default=Path("demo.png"), help="default: %(default)s")
    demo.add_argument("--json", action="store_true", help="the closing table as JSON")
    demo.set_defaults(run=_demo)
    train = commands.add_parser(
        "train",
        allow_abbrev=False,
        help="repeat a published training",
        description="Train a model on a data set with its published settings, or others. Stopped "
        "by Ctrl-C, SIGTERM or an accident, the same command goes on from the last checkpoint and "
        "gives what it would have given. Under torchrun, processes share every batch of graphs.",
    )
    _add_train(train)
    bench = commands.add_parser(
        "bench",
        allow_abbrev=False,
        help="measure operators against what you would otherwise run",
        description="Check operators and their peers against the float64 definition, then time "
        "them in turns. Time means something on a quiet machine only.",
    )
    _add_bench(bench)
    partition = commands.add_parser(
        "partition",
        allow_abbrev=False,
        help="share a graph out to the ranks of a distributed run",
        description="Find which rank owns each node of a graph, print what each rank has to "
        "exchange, and write each rank's share.",
    )
    _add_partition(partition)
    doctor = commands.add_parser(
        "doctor",
        help="what runs on this machine, and why",
        description="Say which compiled kernels this CPU runs, and try every operator, forward and "
        "backward. The exit status is 1 where there are no kernels, for operators then run their "
        "slow definitions, or where one is wrong.",
    )
    doctor.add_argument("--json", action="store_true", help="the same as JSON")
    doctor.set_defaults(run=_doctor)
    report = commands.add_parser("report", help="what is known of the kernels without a GPU")
    _add_reports(report.add_subparsers(required=True, metavar="kind"))
    return parser


def _add_where(command: argparse.ArgumentParser) -> None:
    command.add_argument("--device", help="default: cuda where there is one, else cpu")
    command.add_argument(
        "--impl",
        choices=["triton", "cpp", "reference"],
        help="implementation of the operator; default: by device",
    )


def _add_train(train: argparse.ArgumentParser) -> None:
    from fastgt.training import command

    command.arguments(train)
    _add_where(train)
    train.set_defaults(run=lambda args: command.run(args, lambda: _device(args)))


def _add_bench(bench: argparse.ArgumentParser) -> None:
    from fastgt.bench import command

    command.arguments(bench)
    bench.set_defaults(run=command.run)


def _add_partition(partition: argparse.ArgumentParser) -> None:
    from fastgt.distributed import command

    command.arguments(partition)
    partition.set_defaults(run=command.run)


def _add_reports(kinds: Any) -> None:
    from fastgt.bench import report, traffic

    for name, module, help in (
        ("kernels", report, "what every compiled configuration takes: loads, registers, ..."),
        ("traffic", traffic, "bytes that attention moves through a graph, seconds that GPUs need"),
    ):
        kind = kinds.add_parser(
            name,
            help=help,
            description=module.__doc__,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        module.arguments(kind)
        kind.set_defaults(run=module.run)


def _doctor(args: argparse.Namespace) -> int:
    from fastgt import doctor

    return doctor.run(args.json)


def _demo(args: argparse.Namespace) -> int:
    from fastgt import demo

    device = _device(args)
    if not args.output.resolve().parent.is_dir():
        raise ValueError(f"--output {args.output}: no such folder")
    if args.output.suffix not in (".png", ".pdf", ".svg"):
        raise ValueError(f"--output must end in .png, .pdf or .svg, got {args.output}")
    with text_on_stderr(args.json):
        rows = demo.run(
            device=device,
            epochs=args.epochs,
            seed=_seed(args),
            impl=args.impl,
            output=args.output,
        )
    if args.json:
        print(json.dumps(rows, indent=1))
    return 0


def _seed(args: argparse.Namespace) -> int:
    if not -(2**63) <= args.seed < 2**64:
        raise ValueError(f"--seed must fit in 64 bits, got {args.seed}")
    return args.seed


def _device(args: argparse.Namespace) -> torch.device:
    """The device of the options, on which their implementation can run."""
    import torch

    from fastgt.ops.implementation import require_triton, resolve_impl
    from fastgt.options import device_named

    device = device_named(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    probe = torch.empty(0, device=device)
    if resolve_impl(args.impl, probe) == "triton":
        require_triton(probe)
    return device


if __name__ == "__main__":
    sys.exit(main())
