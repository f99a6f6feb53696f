"""Every configuration of aggregations and of the edge softmax, for ``cases.py``."""

from dataclasses import dataclass

import torch

from fastgt.contract import (
    GatedKept,
    GatedMean,
    GatedMessages,
    GatedNeeds,
    GatedResults,
    GatedUpstream,
    MessageNeeds,
    Messages,
    Reduction,
)

from .aggregate import aggregate_bwd, aggregate_fwd
from .configs import FILLERS
from .gated_aggregate import gated_aggregate_bwd, gated_aggregate_fwd
from .segment_softmax import segment_softmax_bwd, segment_softmax_fwd


@dataclass(frozen=True)
class AggregateCase:
    """One configuration of an aggregation: of messages, of gated ones, or an edge softmax."""

    width: int
    dtype: torch.dtype
    reduce: str = "sum"  # or mean, max, gated, softmax
    x: bool = True
    edge: bool = True  # values or gates on edges
    relu: bool = False
    normalize: bool = True
    buckets: bool = False
    weight: str = ""  # one an "edge", one a "channel" or none
    value: bool = False  # on edges, beside gates


AGGREGATE_CASES = {
    "aggregate_gine_d64_fp32": AggregateCase(64, torch.float32, relu=True),
    "aggregate_gine_d64_bf16": AggregateCase(64, torch.bfloat16, relu=True),
    "aggregate_gine_d10_fp16": AggregateCase(10, torch.float16, relu=True),
    "aggregate_gine_d304_bf16": AggregateCase(304, torch.bfloat16, relu=True),
    "aggregate_gine_d32_fp64": AggregateCase(32, torch.float64, relu=True),
    "aggregate_mean_d16_fp32": AggregateCase(16, torch.float32, "mean", edge=False),
    "aggregate_edges_d64_fp32": AggregateCase(64, torch.float32, "sum", x=False),
    "aggregate_max_d64_fp32": AggregateCase(64, torch.float32, "max"),
    "aggregate_max_d128_bf16": AggregateCase(128, torch.bfloat16, "max", relu=True),
    "aggregate_buckets_d64_fp32": AggregateCase(64, torch.float32, relu=True, buckets=True),
    "aggregate_buckets_max_d64_bf16": AggregateCase(64, torch.bfloat16, "max", buckets=True),
    "aggregate_gcn_d64_fp32": AggregateCase(64, torch.float32, edge=False, weight="edge"),
    "aggregate_gcn_d64_bf16": AggregateCase(64, torch.bfloat16, edge=False, weight="edge"),
    "aggregate_gcn_d256_bf16": AggregateCase(256, torch.bfloat16, edge=False, weight="edge"),
    "aggregate_weights_d64_fp32": AggregateCase(64, torch.float32, relu=True, weight="channel"),
    "aggregate_weights_max_d64_bf16": AggregateCase(64, torch.bfloat16, "max", weight="edge"),
    "gated_d64_fp32": AggregateCase(64, torch.float32, "gated"),
    "gated_d64_bf16": AggregateCase(64, torch.bfloat16, "gated"),
    "gated_d256_bf16": AggregateCase(256, torch.bfloat16, "gated"),
    "gated_d32_fp64": AggregateCase(32, torch.float64, "gated"),
    "gated_nodes_d64_fp16": AggregateCase(64, torch.float16, "gated", edge=False, normalize=False),
    "gated_buckets_d64_fp32": AggregateCase(64, torch.float32, "gated", buckets=True),
    "gated_buckets_d64_bf16": AggregateCase(64, torch.bfloat16, "gated", buckets=True),
    "gated_weights_d64_fp32": AggregateCase(64, torch.float32, "gated", weight="edge", value=True),
    "gated_weights_d64_bf16": AggregateCase(64, torch.bfloat16, "gated", weight="channel"),
    "softmax_d8_fp32": AggregateCase(8, torch.float32, "softmax"),
    "softmax_d64_bf16": AggregateCase(64, torch.bfloat16, "softmax"),
    "softmax_d32_fp64": AggregateCase(32, torch.float64, "softmax"),
    "softmax_buckets_d64_fp32": AggregateCase(64, torch.float32, "softmax", buckets=True),
}


def launch_aggregate(case: AggregateCase) -> None:
    """Launch the kernels of the case, forward and backward."""
    n, m = 8, 128
    index = torch.arange(m, dtype=torch.int32) % n
    ptr = torch.arange(0, m + 1, m // n, dtype=torch.int32)
    x = torch.zeros(n, case.width, dtype=case.dtype) if case.x else None
    edge = torch.zeros(m, case.width, dtype=case.dtype) if case.edge else None
    weights = {"": 0, "edge": 1, "channel": case.width}[case.weight]
    weight = torch.zeros(m, weights, dtype=case.dtype) if weights else None
    value = torch.zeros(m, case.width, dtype=case.dtype) if case.value else None
    walk = ptr, index, index
    if case.buckets:
        rows, parts = index[: FILLERS + 2], index.new_zeros(FILLERS + 2, 3)
        walk = *walk, rows, rows, parts, parts
    if case.reduce == "softmax":
        segment_softmax_bwd(edge, segment_softmax_fwd(edge, walk), walk)
    elif case.reduce == "gated":
        gated = GatedMessages(x, edge, x, x, weight, value)
        mean = GatedMean(1e-6, case.normalize)
        results = GatedResults(edge_scores=case.edge, keep=True)
        o, e, total, unrounded = gated_aggregate_fwd(gated, walk, mean, results)
        upstream = GatedUpstream(o, e if case.edge else None)
        kept = GatedKept(total, unrounded if unrounded.numel() else o)
        needs = GatedNeeds(True, case.edge, True, True, weights > 0, case.value)
        gated_aggregate_bwd(upstream, gated, kept, walk, walk, mean, needs)
    else:
        messages, reduction = Messages(x, edge, weight), Reduction(case.reduce, case.relu)
        o, first = aggregate_fwd(messages, walk, reduction)
        needs = MessageNeeds(case.x, case.edge, weights > 0)
        aggregate_bwd(o, messages, first, walk, walk, reduction, needs)
