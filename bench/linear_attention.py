"""PerformerAttention on a ragged batch against torch-geometric's on the padded one.

``python -m fastgt.bench.linear_attention`` verifies outputs and all gradients against the float64
definition, then times forward (without gradients) and forward+backward, in turns, and measures the
peak memory of both. torch-geometric's counts padded keys in its denominators: as released it
disagrees, and is not timed. Beside it stands the same module with the features of padded keys
zeroed, which agrees.
"""

from __future__ import annotations

import argparse
import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastgt import implementation
from fastgt.bench import harness
from fastgt.bench.attention import DTYPES
from fastgt.bench.transformer_conv import show
from fastgt.nn import PerformerAttention


def run(
    *,
    graphs: int = 256,
    smallest: int = 10,
    largest: int = 500,
    channels: int = 64,
    heads: int = 4,
    width: int = 16,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    repeats: int = 9,
) -> list[dict[str, Any]]:
    """-> one row a provider: seconds, ratios to ours, peak extra bytes, and whether it is right."""
    device = torch.device(device)
    generator = torch.Generator().manual_seed(0)
    sizes = torch.randint(smallest, largest + 1, (graphs,), generator=generator)
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), sizes.cumsum(0)]).to(device)
    nodes = int(sizes.sum())
    torch.manual_seed(0)
    ours = PerformerAttention(channels, heads, width).to(device, dtype)
    x, do = (torch.randn(nodes, channels).to(device, dtype) for _ in range(2))
    shape = {
        "problem": f"ragged {smallest} to {largest}",
        "rows": nodes,
        "graphs": graphs,
        "heads": heads,
        "width": width,
        "features": ours.fast_attn.projection_matrix.shape[0],
        "channels": channels,
        "dtype": str(dtype).removeprefix("torch."),
    }
    calls: dict[str, tuple[nn.Module, Callable[[Tensor], Tensor]]] = {
        "fastgt": (ours, lambda x: ours(x, offsets))
    }
    rows: list[dict[str, Any]] = []
    try:
        for name, repaired in (("pyg", False), ("pyg, padded keys zeroed", True)):
            theirs = _pyg(ours, repaired)
            calls[name] = theirs, _padded(theirs, sizes.to(device))
    except ImportError:
        rows.append({"provider": "pyg", "match": None, "error": "not installed"})

    with implementation("reference"):
        eager = _with_backward(ours, lambda x: ours(x, offsets), x, do)()
        wide = copy.deepcopy(ours).double()
        oracle = _with_backward(wide, lambda x: wide(x, offsets), x.double(), do.double())()
    names = ["output", "x", *(name for name, _ in ours.named_parameters())]
    forward, both = {}, {}
    for name, (module, f) in calls.items():
        backward = _with_backward(module, f, x, do)
        row = {"provider": name, **harness.verdict(names, backward(), eager, oracle)}
        rows.append(row)
        if row["match"]:
            forward[name], both[name] = torch.no_grad()(lambda f=f: f(x)), backward
    del eager, oracle
    harness.time_rows(rows, forward, both, device, repeats=repeats)
    for row in rows:
        if row["match"]:
            # queries, keys, values and outputs are one each
            one = nodes * heads * width * x.element_size()
            row["both_peak_inputs"] = row["both_peak_bytes"] / one
    rows.sort(key=lambda row: row["provider"] != "fastgt")
    return [shape | row | harness.environment(device) for row in rows]


def _pyg(ours: PerformerAttention, repaired: bool) -> nn.Module:
    """PyG's module with the parameters of ours; ImportError where the package is absent."""
    from torch_geometric.nn.attention import PerformerAttention as PyG
    from torch_geometric.nn.attention.performer import generalized_kernel, linear_attention

    channels = ours.attn_out.out_features
    heads, width = ours.heads, ours.q.out_features // ours.heads
    theirs = PyG(channels, heads, width)
    theirs.load_state_dict(ours.state_dict())
    theirs = theirs.to(ours.q.weight)
    if not repaired:
        return theirs

    def forward(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        projection = theirs.fast_attn.projection_matrix
        q, k = (generalized_kernel(x, projection) for x in (q, k))
        return linear_attention(q, k.masked_fill(~theirs.key_mask, 0.0), v)

    theirs.fast_attn.forward = forward
    return theirs


def _padded(theirs: nn.Module, sizes: Tensor) -> Callable[[Tensor], Tensor]:
    from torch_geometric.utils import to_dense_batch

    batch = torch.arange(len(sizes), device=sizes.device).repeat_interleave(sizes)

    def f(x: Tensor) -> Tensor:
        dense, mask = to_dense_batch(x, batch)
        theirs.key_mask = mask[:, None, :, None]
        return theirs(dense, mask)[mask]

    return f


def _with_backward(
    module: nn.Module, f: Callable[[Tensor], Tensor], x: Tensor, do: Tensor
) -> Callable[[], tuple[Tensor, ...]]:
    def both() -> tuple[Tensor, ...]:
        leaf = x.detach().requires_grad_()
        out = f(leaf)
        return out.detach(), *torch.autograd.grad(out, [leaf, *module.parameters()], do)

    return both


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--graphs", type=int, default=256)
    parser.add_argument("--smallest", type=int, default=10, help="nodes of a graph, at least")
    parser.add_argument("--largest", type=int, default=500, help="nodes of a graph, at most")
    parser.add_argument("--channels", type=int, default=64)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--width", type=int, default=16)
    parser.add_argument("--dtype", choices=DTYPES, default="fp32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    args = parser.parse_args()
    rows = run(
        graphs=args.graphs,
        smallest=args.smallest,
        largest=args.largest,
        channels=args.channels,
        heads=args.heads,
        width=args.width,
        dtype=DTYPES[args.dtype],
        device=args.device,
        repeats=args.repeats,
    )
    size = f"{rows[0]['graphs']} graphs, {rows[0]['rows']} nodes, M={rows[0]['features']}"
    print(f"{rows[0]['problem']}: {size}, H={args.heads}, D={args.width}, {args.dtype}")
    print(show(rows))
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
