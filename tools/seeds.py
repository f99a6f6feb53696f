"""The attention of every ``examples/seeds/*.py`` at its paper's size, beside dense attention.

``python tools/seeds.py`` measures, for each file, the operator that it names on the graph, heads
and width of its ``paper_size()``: q, k and v are random and float32, projections and biases are
left out. Beside it stand

- dense: PyTorch's ``scaled_dot_product_attention`` over all pairs of each graph of the batch,
  padded, under a boolean mask of the edges;
- sorted: fastgt's ``global_attention`` on nodes sorted by block, where the pattern is made of
  complete blocks, as windows and sets are;
- blocks: PyTorch's attention on a batch of these, where they have one size.

Where an operator is the softmax of these, its output is compared with theirs before it is timed.
Rows stand in ``bench/results/seeds.json``, from which ``tools/render.py`` makes the table of
``docs/gallery.md``.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import statistics
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from fastgt import (
    Graph,
    channelwise_attention,
    files,
    global_attention,
    linear_attention,
    neighborhood_attention,
)
from fastgt.bench import timing
from fastgt.bench.harness import environment
from fastgt.bench.memory import allocation_limit, peak_extra_memory

ROOT = Path(__file__).parent.parent
SEEDS = ROOT / "examples" / "seeds"
RESULTS = ROOT / "bench" / "results" / "seeds.json"
MASK_BYTES = 4 << 30  # of a dense mask, at most
DENSE = "scaled_dot_product_attention"
SOFTMAX = ("neighborhood_attention", "global_attention")  # what dense attention computes too
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
Rows = list[dict[str, Any]]


def main() -> None:
    """Measure what is asked for, and write each row as soon as it is there."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    there = {path.stem: path for path in sorted(SEEDS.glob("*.py"))}
    parser.add_argument("only", nargs="*", help=f"of {', '.join(there)}; default: all")
    parser.add_argument("--repeats", type=int, default=5, help="default: %(default)s")
    args = parser.parse_args()
    if unknown := set(args.only) - set(there):
        parser.error(f"unknown: {', '.join(sorted(unknown))}")
    for name in args.only or there:
        print(name, flush=True)
        row = measured(there[name], args.repeats)
        kept = json.loads(RESULTS.read_text()) if RESULTS.exists() else []
        rows = sorted([*(x for x in kept if x["seed"] != name), row], key=lambda x: x["seed"])
        files.write(RESULTS, (json.dumps(rows, indent=1) + "\n").encode())


def load(path: Path) -> ModuleType:
    """An example as a module; no package holds them."""
    spec = importlib.util.spec_from_file_location(f"seeds_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise ImportError(f"{path} is no Python file")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def measured(path: Path, repeats: int = 5) -> dict[str, Any]:
    """-> the row of one example: sizes, and of every provider seconds and peak extra bytes of a
    forward, and of a forward and backward; or why there are none.

    Raises:
        ValueError: It names an operator that this does not know, or its graph has a row without
            edges or an edge twice, which a mask cannot say.
        AssertionError: The operator and dense attention differ.
    """
    seed = load(path)
    graph, heads, width = seed.paper_size()
    row = {
        "seed": path.stem,
        "pattern": seed.PATTERN,
        "operator": seed.OPERATOR,
        "rows": graph.num_rows,
        "columns": graph.num_cols,
        "graphs": graph.num_graphs,
        "edges": graph.num_edges,
        "share": graph.num_edges / _pairs(graph),
        "heads": heads,
        "width": width,
    }
    generator = torch.Generator().manual_seed(0)
    sizes = (graph.num_rows, graph.num_cols, graph.num_cols)
    x = [torch.randn(n, heads, width, generator=generator).requires_grad_() for n in sizes]
    with allocation_limit(x[0].device):
        row |= _compared(_providers(graph, seed.OPERATOR), x, seed.OPERATOR, repeats)
    return row | environment(x[0].device)


def ours(graph: Graph, operator: str) -> Attend:
    """An operator of fastgt on a graph.

    Raises:
        ValueError: It is not known here.
    """
    ends = graph.graph_ptr
    known: dict[str, Attend] = {
        "neighborhood_attention": lambda q, k, v: neighborhood_attention(q, k, v, graph),
        "global_attention": lambda q, k, v: global_attention(
            q, k, v, ends, key_offsets=graph.col_graph_ptr
        ),
        "linear_attention": lambda q, k, v: linear_attention(q, k, v, ends),
        "channelwise_attention": lambda q, k, v: channelwise_attention(
            q[graph.edge_index[1]] - k[graph.edge_index[0]], v, graph
        ),
    }
    if operator not in known:
        raise ValueError(f"OPERATOR must be one of {', '.join([*known, DENSE])}, got {operator!r}")
    return known[operator]


def dense(graph: Graph) -> Attend:
    """PyTorch's attention on the padded batch, under a boolean mask for each graph.

    Raises:
        MemoryError: The masks would take more than ``MASK_BYTES``.
        ValueError: A row has no edges, or an edge is there twice.
    """
    rows, cols = (x.diff().long() for x in (graph.graph_ptr, graph.col_graph_ptr))
    shape = graph.num_graphs, int(rows.max()), int(cols.max())
    needed = shape[0] * shape[1] * shape[2]
    if needed > MASK_BYTES:
        raise MemoryError(f"a mask of {needed / 1e9:.1f} GB")
    (of_row, row), (of_col, col) = _places(rows), _places(cols)
    mask = torch.zeros(shape, dtype=torch.bool)
    j, i = graph.edge_index
    mask[of_row[i], row[i], col[j]] = True
    if int(mask.sum()) != graph.num_edges or int(graph.row_degree.min()) == 0:
        raise ValueError("a mask needs rows with edges, and each edge once")
    full = bool(mask.all())
    mask[torch.arange(shape[1]) >= rows[:, None]] = True  # what is filled up is dropped, not NaN

    def padded(x: Tensor, of: Tensor, at: Tensor, most: int) -> Tensor:
        out = x.new_zeros(shape[0], most, *x.shape[1:])
        return out.index_put((of, at), x).transpose(1, 2)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q = padded(q, of_row, row, shape[1])
        k, v = (padded(x, of_col, col, shape[2]) for x in (k, v))
        out = scaled_dot_product_attention(q, k, v, attn_mask=None if full else mask[:, None])
        return out.transpose(1, 2)[of_row, row]

    return attend


def blocks(graph: Graph) -> Tensor | None:
    """``[N]``, the number of each node's block, where the graph is made of complete blocks, as
    windows and sets are; else None. Each edge is there once."""
    if graph.num_rows != graph.num_cols:
        return None
    j, i = graph.edge_index
    nobody = torch.full((graph.num_rows,), graph.num_rows)
    label = nobody.scatter_reduce(0, i, j, "amin").unique(return_inverse=True)[1]
    sizes = label.bincount()
    degree = graph.row_degree.long()
    complete = torch.equal(label[i], label[j]) and torch.equal(degree, sizes[label])
    return label if complete else None


def sorted_blocks(label: Tensor) -> Attend:
    """``global_attention`` on nodes sorted by block."""
    order = label.argsort(stable=True)
    back, sizes = order.argsort(), label.bincount()
    offsets = torch.cat([sizes.new_zeros(1), sizes.cumsum(0)])
    return lambda q, k, v: global_attention(q[order], k[order], v[order], offsets)[back]


def equal_blocks(label: Tensor) -> Attend:
    """PyTorch's attention on a batch of blocks of one size."""
    block = label.argsort(stable=True).view(int(label.max()) + 1, -1)  # [blocks, size]
    back = block.flatten().argsort()

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x[block].transpose(1, 2) for x in (q, k, v))  # [blocks, H, size, D]
        return scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(0, 1)[back]

    return attend


def _providers(graph: Graph, operator: str) -> dict[str, Attend | str]:
    """By name, or why it does not run."""
    found: dict[str, Attend | str] = {}
    if operator != DENSE:
        found["fastgt"] = ours(graph, operator)
    try:
        found["dense"] = dense(graph)
    except MemoryError as error:
        found["dense"] = str(error)
    if graph.num_edges == _pairs(graph) or (label := blocks(graph)) is None:
        return found
    found["sorted"] = sorted_blocks(label)
    if len(label.bincount().unique()) == 1:
        found["blocks"] = equal_blocks(label)
    return found


def _compared(
    providers: dict[str, Attend | str], x: list[Tensor], operator: str, repeats: int
) -> dict[str, Any]:
    found: dict[str, Any] = {}
    calls: dict[str, Attend] = {}
    outputs: dict[str, Tensor] = {}
    for name, provider in providers.items():
        if isinstance(provider, str):
            found[name] = {"refused": provider}
            continue
        try:
            found[name], output = _memory(provider, x)
        except (MemoryError, RuntimeError) as error:
            if not _is_of_memory(error):
                raise
            found[name] = {"refused": "more memory than there is"}
            continue
        calls[name] = provider
        if operator in (*SOFTMAX, DENSE):
            outputs[name] = output
    for output in outputs.values():
        torch.testing.assert_close(output, next(iter(outputs.values())), rtol=1e-4, atol=1e-4)
    for part, step in (("forward", _forward), ("both", _both)):
        timed = {name: lambda call=call, step=step: step(call, x) for name, call in calls.items()}
        for name, times in timing.measure(timed, x[0].device, repeats=repeats).items():
            found[name] |= {
                f"{part}_s": statistics.median(times),
                f"{part}_spread": timing.spread(times),
            }
    return found


def _memory(call: Attend, x: list[Tensor]) -> tuple[dict[str, Any], Tensor]:
    output = _forward(call, x)  # plans of a graph are made once, before
    device = x[0].device
    peaks = {
        "forward_peak_bytes": peak_extra_memory(lambda: _forward(call, x), device),
        "both_peak_bytes": peak_extra_memory(lambda: _both(call, x), device),
    }
    return peaks, output


def _forward(call: Attend, x: list[Tensor]) -> Tensor:
    with torch.no_grad():
        return call(*x)


def _both(call: Attend, x: list[Tensor]) -> tuple[Tensor, ...]:
    return torch.autograd.grad(call(*x).square().sum(), x)


def _pairs(graph: Graph) -> int:
    """What dense attention goes over: those of two nodes of one graph."""
    return int((graph.graph_ptr.diff().long() * graph.col_graph_ptr.diff()).sum())


def _is_of_memory(error: Exception) -> bool:
    return isinstance(error, MemoryError) or "allocate memory" in str(error)


def _places(sizes: Tensor) -> tuple[Tensor, Tensor]:
    """-> the graph of every node, and its place there."""
    owner = torch.arange(len(sizes)).repeat_interleave(sizes)
    return owner, torch.arange(len(owner)) - (sizes.cumsum(0) - sizes)[owner]


if __name__ == "__main__":
    main()
