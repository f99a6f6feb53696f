"""What a compiled kernel takes, read from what Triton compiled it to: nothing is launched.

Bytes a step are counted in Triton's own code, before any target: every load inside the loops over
edges, at the shape of its tile, padding included. The rare loops that compute a window again are
left out: they are the only ones under a branch.
"""

import math
import os
import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton


class Processor(NamedTuple):
    """What one of a GPU's processors (SM, CU) holds; it is made of four parts."""

    warps: int  # of a part
    registers: int  # of a part, for each lane of a warp; given out by eights
    shared: int
    shared_reserved: int  # for each program
    programs: int


# NVIDIA: CUDA C++ Programming Guide, table "Technical Specifications per Compute Capability";
# AMD: CDNA 3 instruction set, vector registers of a SIMD, and LDS of a CU
PROCESSORS = {
    "sm_80": Processor(16, 512, 164 * 1024, 1024, 32),
    "sm_90": Processor(16, 512, 228 * 1024, 1024, 32),
    "sm_100": Processor(16, 512, 228 * 1024, 1024, 32),
    "gfx942": Processor(8, 512, 64 * 1024, 0, 16),
}
_TENSOR_COLUMNS = 512  # of sm_100's tensor memory


def resources(kernel, arguments: dict[str, Any], target: str) -> dict[str, int]:
    """Figures of one compiled kernel, launched with these ``arguments``, by name.

    - ``registers`` of a thread, ``stack``: bytes spilled, ``shared`` bytes and ``warps`` of a
      program; ``resident_warps`` of a processor: 0 where no program fits, it cannot be launched.
    - ``wide_loads``: instructions that load 16 bytes; ``row_load``: most bytes that a thread takes
      at once of a row of channels, in the loops over edges.
    - ``tensor_core_products`` and, of those, ``wgmma``: instructions.
    - ``step_bytes``: loaded in the loop for an edge (all heads of the program), an entry of a
      window (one head), a segment or a node of linear attention; ``step_bytes_design``: what has
      to be (not of linear attention, whose steps load tiles of states, or of projections).
    """
    name = kernel.metadata.name.strip("_")
    shared, warps = kernel.metadata.shared, kernel.metadata.num_warps
    if "amdgcn" in kernel.asm:
        asm = kernel.asm["amdgcn"]
        # vector registers of a wave; gfx942 spills to scratch ("private segment")
        registers = int(re.search(r"\.vgpr_count: *(\d+)", asm)[1])
        stack = int(re.search(r"\.private_segment_fixed_size: *(\d+)", asm)[1])
        wide = len(re.findall(r"(?:global|buffer|flat)_load_dwordx4", asm))
        products, wgmma = len(re.findall(r"v_mfma_", asm)), 0
    else:
        usage = _cuobjdump(kernel.asm["cubin"])
        registers = int(re.search(r"REG:(\d+)", usage)[1])
        stack = int(re.search(r"STACK:(\d+)", usage)[1])
        ptx = kernel.asm["ptx"]
        # into registers, or straight into shared memory
        wide = len(re.findall(r"ld\.global\S*\.v4\.b32|ld\.global\S*\.v2\.b64", ptx))
        wide += len(re.findall(r"cp\.async\.\S+ .*, 0x10,", ptx))
        products = len(re.findall(r"\s(?:mma|wgmma|tcgen05)\.(?:sync|mma)\S*", ptx))
        wgmma = len(re.findall(r"\swgmma\.mma_async", ptx))
    values = by_path(arguments)
    meta, pointers = constants(arguments), _pointers(values)
    step = {"step_bytes": _step_bytes(kernel.asm["ttir"], meta)}
    if not name.startswith(("linear", "head")):
        step["step_bytes_design"] = _designed_bytes(name, meta, pointers)
    return {
        "registers": registers,
        "stack": stack,
        "shared": shared,
        "warps": warps,
        "resident_warps": _resident_warps(
            PROCESSORS[target], registers, shared, getattr(kernel.metadata, "tmem_size", 0), warps
        ),
        "wide_loads": wide,
        "row_load": _row_load(kernel.asm["ttgir"]),
        "tensor_core_products": products,
        "wgmma": wgmma,
        **step,
    }


def _resident_warps(on: Processor, registers: int, shared: int, tensor: int, warps: int) -> int:
    """0 where not even one program fits: it could not be launched."""
    by_registers = min(on.warps, on.registers // (-(-registers // 8) * 8))
    programs = min(on.programs, 4 * by_registers // warps)
    programs = min(programs, on.shared // max(1, shared + on.shared_reserved))
    return warps * min(programs, _TENSOR_COLUMNS // max(1, tensor))


def _step_bytes(ttir: str, meta: dict) -> int:
    """Bytes loaded by a step of the loop over edges that loads most, for each of its edges."""
    steps = meta.get("BLOCK_R", 1) * meta.get("BLOCK_E", 1)
    steps *= meta.get("BLOCK_N", 1) * meta.get("BLOCK_S", 1)
    loads = re.compile(r"tt\.load .*: (?:tensor<([\dx]+)x)?!tt\.ptr<(\w+)>")
    total: dict[int, int] = {}
    for loop, times, line in _looped(ttir):
        if found := loads.search(line):
            size = math.prod(int(n) for n in (found[1] or "1").split("x")) * _size(found[2])
            total[loop] = total.get(loop, 0) + times * size
    return -(-max(total.values(), default=0) // steps)


def _row_load(ttgir: str) -> int:
    """Most bytes that a thread takes at once of a tile of rows, inside the loops over edges."""
    # elements of the last dimension that a thread has next to each other
    held = {
        name: int(last)
        for name, last in re.findall(r"^(#\w+) = .*sizePerThread = \[.*?(\d+)\]", ttgir, re.M)
    }
    tile = re.compile(
        r"(?:tt|amdg|ttg)\.\w*(?:load|global_to_local)\w* .*"
        r": tensor<(?:\d+x){2,4}(?:!tt\.ptr<)?(\w+)>?, (#\w+)>"
    )
    widest = 0
    for _, _, line in _looped(ttgir):
        if "local_load" in line or not (found := tile.search(line)):
            continue
        contiguity = re.search(r"contiguity = (\d+)", line)
        count = int(contiguity[1]) if contiguity else held.get(found[2], 1)
        widest = max(widest, min(16, count * _size(found[1])))
    return widest


def _looped(code: str):
    """-> (loop over edges, how often a step of it comes here, line) for the lines in such loops.

    Loops between constants, over the query heads of a key head, are part of a step if inside.
    """
    constants = dict(re.findall(r"^ *%(\S+) = arith\.constant (-?\d+) : i", code, re.M))
    head = re.compile(r"scf\.for %\S+ = %(\S+) to %(\S+) step %(\S+)")
    nest: list[tuple[int, int | None, int]] = []  # indentation, number of the loop, its trips
    for number, line in enumerate(code.splitlines()):
        indent = len(line) - len(line.lstrip())
        while nest and indent <= nest[-1][0] and "} else {" not in line:
            nest.pop()
        if "scf.if" in line:
            nest.append((indent, None, 0))
        elif found := head.search(line):
            bounds = [constants.get(name) for name in found.groups()]
            if None in bounds:
                nest.append((indent, number, 0))
            else:
                begin, end, step = map(int, bounds)
                nest.append((indent, None, max(1, -(-(end - begin) // step))))
        else:
            branches = any(loop is None and not trips for _, loop, trips in nest)
            edges = [i for i, (_, loop, _) in enumerate(nest) if loop is not None]
            if edges and not branches:
                inside = nest[edges[-1] + 1 :]
                yield nest[edges[-1]][1], math.prod(trips for _, _, trips in inside), line


def _designed_bytes(kernel: str, meta: dict, pointers: dict[str, int]) -> int:
    """What a step has to load for an edge, an entry of a window or a segment.

    Rows of channels once for each key head, indices, per-row numbers of the column pass, bias.
    """
    if kernel.startswith("channelwise"):
        return _designed_bytes_channelwise(kernel, meta, pointers)
    if kernel in _TILES:
        return _designed_bytes_aggregate(kernel, meta, pointers)
    if kernel.startswith("combine"):
        channels = {
            "combine_outputs_kernel": meta.get("BLOCK_DV", 0) + 2,
            "combine_rows_kernel": meta.get("PARTS", 0) * meta.get("BLOCK_D", 0) + 2,
            "combine_columns_kernel": meta.get("BLOCK_D", 0),
        }
        return meta["BLOCK_H"] * channels[kernel] * pointers["part_ptr"]
    if kernel.startswith("global"):
        return _designed_bytes_global(kernel, meta, pointers)
    if "windows" in kernel:
        return _designed_bytes_windows(kernel, meta, pointers)
    return _designed_bytes_gather(kernel, meta, pointers)


def _designed_bytes_windows(kernel: str, meta: dict, pointers: dict[str, int]) -> int:
    index, item = pointers["table.edge"], pointers["x.k.ptr"]
    total = (meta["BLOCK_D"] + meta["BLOCK_DV"]) * item
    if kernel.endswith("dkv_kernel"):
        total += 3 * pointers["saved.lse"]  # and w and gamma
    total += pointers["table.bits"] + (0 if meta["DENSE"] else index)
    bias = pointers.get("x.bias.ptr", 0)
    if bias or "out.dbias" in pointers:
        # each bit's edge, the first one's number beside the bits
        total += index + meta["BLOCK_M"] * (index + bias)
    return total


def _designed_bytes_global(kernel: str, meta: dict, pointers: dict[str, int]) -> int:
    """Keys and values, or queries with what they have upstream and their sums; and biases. Of heads
    in slices the program's own rows too, and the slice of which its output is made."""
    columns, bias = kernel.endswith("dkv_kernel"), pointers.get("x.bias.ptr", 0)
    d, dv, rows = meta["BLOCK_D"], meta["BLOCK_DV"], meta["BLOCK_M"] / meta["BLOCK_N"]

    def product(width: int, block: int) -> int:
        """Channels of a product over all of them."""
        return block if width <= block else round(-(-width // block) * block * (1 + rows))

    channels = product(meta["D"], d)
    if kernel == "global_fwd_kernel":
        channels += dv
    else:
        channels += product(meta["DV"], dv) + d * (meta["D"] > d)
        channels += dv * (columns and meta["DV"] > dv)
    total = channels * pointers["x.k.ptr"]
    if columns:
        total += 3 * pointers["lse_ptr"]
    total += pointers.get("drop.query_numbers", 0)  # of the other side
    if meta["PER_KEY"]:
        return total + (0 if columns else bias)
    return total + meta["BLOCK_M"] * bias


def _designed_bytes_gather(kernel: str, meta: dict, pointers: dict[str, int]) -> int:
    """Attributes count once for all heads, what edges have besides for each head."""

    def size(*paths: str) -> int:
        return sum(pointers.get(path, 0) for path in paths)

    columns, weights = kernel.endswith("dkv_kernel"), "weights" in kernel
    query_heads = meta["BLOCK_H"] * (meta["GROUP"] if columns else 1)
    key_heads = query_heads if columns else max(1, meta["BLOCK_H"] // meta["GROUP"])
    row = meta["BLOCK_D"] * size("x.k.ptr") + meta["BLOCK_DV"] * size("x.v.ptr")
    if columns:
        row += 3 * size("lse_ptr")  # and w and gamma
    numbers = ("x.bias.ptr", "out.dbias", *(path for path in pointers if path.startswith("terms.")))
    total = key_heads * row + size("walk.other")
    total += size("walk.edge") if weights or size(*numbers) else 0
    total += query_heads * size("x.bias.ptr", "terms.factor")
    channels = size("terms.gate", "terms.key")
    if columns or size("out.dq"):
        channels += size("up.dscores")
    total += query_heads * (meta["BLOCK_D"] * channels + meta["BLOCK_DV"] * size("terms.value"))
    total += meta["BLOCK_C"] * size("terms.attr") + size("drop.numbers")
    if columns:
        # of the row at the other end: what attributes are multiplied with
        total += query_heads * meta["BLOCK_C"] * size("terms.attr_q", "up.attr_do")
        if meta.get("ADD"):
            # the attributes' gradient so far
            total += meta["BLOCK_C"] * size("out.dattr")
    return total


def _designed_bytes_channelwise(kernel: str, meta: dict, pointers: dict[str, int]) -> int:
    """Indices, and channels of the logits, of v and edge values, or of two tables of the rows."""
    if "combine" in kernel:
        return 3 * meta["BLOCK_C"] * pointers["part_ptr"]
    index = pointers["walk.edge"]
    if "columns" in kernel:
        return meta["BLOCK_C"] * (pointers["logits.ptr"] + 2 * pointers["cu_ptr"]) + 2 * index
    values = "edges" not in kernel or "out.ds" in pointers
    has_v, has_edge = "x.v.ptr" in pointers, "x.edge_value.ptr" in pointers
    rows = 1 + values * (has_v + has_edge)
    return meta["BLOCK_C"] * rows * pointers["x.logits.ptr"] + index * (1 + values * has_v)


# tensors of which an aggregation loads channels for each edge or segment, those that are given
_TILES = {
    "aggregate_fwd_kernel": (
        "messages.x.ptr",
        "messages.edge_value.ptr",
        "messages.edge_weight.ptr",
    ),
    "aggregate_max_kernel": (
        "messages.x.ptr",
        "messages.edge_value.ptr",
        "messages.edge_weight.ptr",
    ),
    "aggregate_bwd_kernel": (
        "do.ptr",
        "first_ptr",
        "messages.edge_value.ptr",
        "messages.edge_weight.ptr",
    ),
    "aggregate_combine_kernel": ("part_ptr",),
    "aggregate_combine_max_kernel": ("part_ptr", "part_first_ptr"),
    "gated_fwd_kernel": (
        "gated.x.ptr",
        "gated.gate.ptr",
        "gated.gate_col.ptr",
        "gated.edge_weight.ptr",
        "gated.edge_value.ptr",
    ),
    "gated_bwd_columns_kernel": (
        "gated.gate.ptr",
        "gated.gate_row.ptr",
        "w.ptr",
        "shift.ptr",
        "de.ptr",
        "gated.edge_weight.ptr",
        "gated.edge_value.ptr",
    ),
    "gated_bwd_rows_kernel": (
        "gated.x.ptr",
        "gated.gate.ptr",
        "gated.gate_col.ptr",
        "de.ptr",
        "gated.edge_weight.ptr",
        "gated.edge_value.ptr",
    ),
    "gated_combine_kernel": ("part_ptr", "part_total_ptr"),
    "softmax_rows_kernel": ("x.ptr",),
    "softmax_edges_kernel": ("x.ptr",),
    "softmax_combine_kernel": ("part_ptr", "part_norm_ptr"),
    "softmax_bwd_rows_kernel": ("y.ptr", "dy.ptr"),
    "softmax_bwd_edges_kernel": ("y.ptr", "dy.ptr"),
    "softmax_bwd_combine_kernel": ("part_ptr", "part_norm_ptr"),
}


def _designed_bytes_aggregate(kernel: str, meta: dict, pointers: dict[str, int]) -> int:
    """Channels of the tensors that are there, and an index for each end and the edge."""
    tiles = {name: pointers.get(name, 0) for name in _TILES[kernel]}
    # one number, where an edge has one
    weights = [name for name in tiles if meta.get("ONE_WEIGHT") and name.endswith("weight.ptr")]
    channels = meta["BLOCK_D"] * sum(tiles.values())
    channels -= (meta["BLOCK_D"] - 1) * sum(tiles[name] for name in weights)
    if "combine" in kernel:
        return channels
    # the edge and its other end; a mean's backward asks where the row begins and ends, too
    indices = 1 if kernel.startswith("softmax") else 2
    if kernel == "aggregate_bwd_kernel" and meta["MEAN"]:
        indices += 2
    return channels + indices * pointers["walk.edge"]


def by_path(arguments: dict[str, Any]) -> dict[str, Any]:
    """What a kernel gets, each with its path: ``terms.key`` is the field of a tuple."""
    values = {}
    for name, x in arguments.items():
        if isinstance(x, tuple):
            fields = getattr(x, "_fields", map(str, range(len(x))))
            below = by_path(dict(zip(fields, x, strict=True)))
            values.update({f"{name}.{path}": value for path, value in below.items()})
        else:
            values[name] = x
    return values


def constants(arguments: dict[str, Any]) -> dict[str, Any]:
    """Sizes and switches, whose names are upper-case, by their name alone."""
    named = {path.rpartition(".")[2]: x for path, x in by_path(arguments).items()}
    return {name: x for name, x in named.items() if name.isupper()}


def _pointers(values: dict[str, Any]) -> dict[str, int]:
    """Bytes of an element behind each pointer."""
    return {path: x.element_size() for path, x in values.items() if isinstance(x, torch.Tensor)}


def _size(kind: str) -> int:
    return max(1, int(re.sub(r"\D", "", kind)) // 8)


def _cuobjdump(cubin: bytes) -> str:
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "kernel.cubin")
        Path(path).write_bytes(cubin)
        return subprocess.run(
            [tool, "-res-usage", path], capture_output=True, text=True, check=True
        ).stdout
