"""Every kernel configuration: small calls of the launchers, one for each row of the tile tables,
dtype and optional path. ``ahead.py`` compiles them for every target."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

from .attention import attention_bwd, attention_fwd
from .attention_windows import windows_bwd, windows_fwd
from .configs import FILLERS


@dataclass(frozen=True)
class AttentionCase:
    """One configuration of neighbourhood attention."""

    heads: int
    width: int
    dtype: torch.dtype
    kv_heads: int = 0  # 0: as many as heads
    v_width: int = 0  # 0: as wide as q
    degree: int = 16
    bias: bool = False
    clamp: bool = False
    weights: bool = False
    buckets: bool = False
    height: int = 0  # of windows, 0: gather
    dense: bool = False


ATTENTION_CASES = {
    "one_head_d8_fp16": AttentionCase(1, 8, torch.float16),
    "low_degree_d8_bf16": AttentionCase(8, 8, torch.bfloat16, degree=3, bias=True, clamp=True),
    "gt_zinc_d8_fp32": AttentionCase(8, 8, torch.float32, degree=3, clamp=True),
    "gt_sbm_d10_bf16": AttentionCase(8, 10, torch.bfloat16, clamp=True),
    "h8_d16_bf16": AttentionCase(8, 16, torch.bfloat16),
    "h8_d16_fp32": AttentionCase(8, 16, torch.float32, bias=True, weights=True),
    "h4_d64_fp16": AttentionCase(4, 64, torch.float16),
    "gqa_h8_d64_bf16": AttentionCase(8, 64, torch.bfloat16, kv_heads=2),
    "h8_d128_bf16": AttentionCase(8, 128, torch.bfloat16, bias=True, clamp=True),
    "h16_d128_bf16": AttentionCase(16, 128, torch.bfloat16),
    "h2_d256_fp32": AttentionCase(2, 256, torch.float32),
    "uneven_d24_v40_fp16": AttentionCase(4, 24, torch.float16, v_width=40),
    "h4_d32_fp64": AttentionCase(4, 32, torch.float64, bias=True, clamp=True),
    "buckets_h8_d16_bf16": AttentionCase(8, 16, torch.bfloat16, buckets=True),
    "buckets_h8_d16_fp32": AttentionCase(8, 16, torch.float32, buckets=True, bias=True),
    "buckets_h8_d128_bf16": AttentionCase(8, 128, torch.bfloat16, buckets=True),
    "windows_d16_bf16": AttentionCase(8, 16, torch.bfloat16, height=64),
    "windows_d32_fp16": AttentionCase(8, 32, torch.float16, height=64, clamp=True),
    "windows_d64_bf16": AttentionCase(8, 64, torch.bfloat16, height=64),
    "windows_gqa_bias_d64_bf16": AttentionCase(
        8, 64, torch.bfloat16, kv_heads=2, height=64, bias=True, clamp=True, weights=True
    ),
    "windows_d128_bf16": AttentionCase(8, 128, torch.bfloat16, height=64),
    "windows_d256_fp16": AttentionCase(2, 256, torch.float16, height=64),
    "windows_32_d64_bf16": AttentionCase(8, 64, torch.bfloat16, height=32),
    "windows_16_d64_bf16": AttentionCase(8, 64, torch.bfloat16, height=16),
    "windows_d64_fp32": AttentionCase(4, 64, torch.float32, height=64, bias=True),
    "windows_32_d128_fp32": AttentionCase(2, 128, torch.float32, height=32),
    "windows_16_d256_fp32": AttentionCase(2, 256, torch.float32, height=16),
    "windows_d32_fp64": AttentionCase(2, 32, torch.float64, height=64),
    "graphs_d10_bf16": AttentionCase(8, 10, torch.bfloat16, height=64, dense=True, clamp=True),
    "graphs_d64_bf16": AttentionCase(8, 64, torch.bfloat16, height=64, dense=True),
}


def _launch_attention(case: AttentionCase) -> None:
    n, m = 8, 8 * case.degree
    index = torch.arange(m, dtype=torch.int32) % n
    ptr = torch.arange(0, m + 1, case.degree, dtype=torch.int32)
    kv_heads = case.kv_heads or case.heads
    v_width = case.v_width or case.width
    q = torch.zeros(n, case.heads, case.width, dtype=case.dtype)
    k = torch.zeros(n, kv_heads, case.width, dtype=case.dtype)
    v = torch.zeros(n, kv_heads, v_width, dtype=case.dtype)
    bias = torch.zeros(m, case.heads, dtype=case.dtype) if case.bias else None
    low, high = (-5.0, 5.0) if case.clamp else (-torch.inf, torch.inf)
    numbers = 1.0, low, high, 0.0
    needs = (True, True, True, case.bias)
    walk = ptr, index, index
    if case.height:
        window = index.new_tensor([[0, n, 0, n, 0]] * 2)
        tables = window, index, index.long(), index, index
        how = case.height, case.dense
        o, lse, _ = windows_fwd(q, k, v, bias, (*walk, *tables), *how, *numbers, case.weights)
        inputs = o, lse if case.bias else None, q, k, v, bias, lse, o
        windows_bwd(*inputs, (*walk, *tables), tables, *how, *numbers, *needs)
        return
    if case.buckets:
        rows, parts = index[: FILLERS + 2], index.new_zeros(FILLERS + 2, 3)
        walk = *walk, rows, rows, parts, parts
    o, lse, _ = attention_fwd(q, k, v, bias, walk, *numbers, case.weights)
    inputs = o, lse if case.bias else None, q, k, v, bias, lse
    attention_bwd(*inputs, walk, walk, *numbers, *needs)


CASES: dict[str, Callable[[], None]] = {
    name: partial(_launch_attention, case) for name, case in ATTENTION_CASES.items()
}
"""Name -> a call that launches all kernels of that configuration, forward and backward."""
