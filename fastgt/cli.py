"""The command ``fastgt``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fastgt import __version__

EPOCHS = 80


def main(argv: Sequence[str] | None = None) -> int:
    """-> exit status: 0 done, 1 failed with a reason on stderr, 2 usage, 130 interrupted."""
    args = _parser().parse_args(argv)
    try:
        return args.run(args)
    except KeyboardInterrupt:
        print("\nfastgt: interrupted", file=sys.stderr)
        return 130
    except (RuntimeError, ValueError, OSError, ImportError) as error:
        print(f"fastgt: {error}", file=sys.stderr)
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="fastgt", description="Attention for graph transformers.")
    parser.add_argument("--version", action="version", version=f"fastgt {__version__}")
    commands = parser.add_subparsers(required=True, metavar="command")
    demo = commands.add_parser(
        "demo",
        help="train a graph transformer on the dependency graph of Debian",
        description="Train a graph transformer on the dependency graph of Debian 12 (63,436 "
        "packages) and compare it with the same model on gather-softmax-scatter attention. "
        "Time means something on a quiet machine only.",
    )
    demo.add_argument("--device", default=None, help="default: cuda where there is one, else cpu")
    demo.add_argument("--epochs", type=_positive, default=EPOCHS, help="default: %(default)s")
    demo.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    demo.add_argument(
        "--impl",
        choices=["triton", "torch", "reference"],
        help="implementation of the operator; default: by device",
    )
    demo.add_argument("--output", type=Path, default=Path("demo.png"), help="default: %(default)s")
    demo.set_defaults(run=_demo)
    report = commands.add_parser("report", help="what is known of the kernels without a GPU")
    _add_reports(report.add_subparsers(required=True, metavar="kind"))
    return parser


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


def _demo(args: argparse.Namespace) -> int:
    import torch

    from fastgt import demo

    name = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if name.partition(":")[0] not in ("cpu", "cuda"):
        raise ValueError(f"--device must be cpu or cuda, got {name}")
    if not args.output.resolve().parent.is_dir():
        raise ValueError(f"--output {args.output}: no such folder")
    if args.output.suffix not in (".png", ".pdf", ".svg"):
        raise ValueError(f"--output must end in .png, .pdf or .svg, got {args.output}")
    demo.run(
        device=torch.device(name),
        epochs=args.epochs,
        seed=args.seed,
        impl=args.impl,
        output=args.output,
    )
    return 0


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a positive integer, got {text!r}")
    return int(text)


if __name__ == "__main__":
    sys.exit(main())
