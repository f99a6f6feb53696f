"""Configurations of global attention, as ``cases.py`` has those of the other operators."""

from dataclasses import dataclass

import torch

from fastgt.contract import (
    GlobalUpstream,
    Inputs,
    PairDropout,
    PairNeeds,
    PairTerms,
    RaggedPairs,
)

from .global_attention import global_attention_fwd
from .global_attention_backward import global_attention_bwd


@dataclass(frozen=True)
class GlobalCase:
    """One configuration of global attention."""

    heads: int
    width: int
    dtype: torch.dtype
    kv_heads: int = 0  # 0: as many as heads
    v_width: int = 0  # 0: as wide as q
    bias: str = ""  # or key, pair
    drop: bool = False
    numbered: bool = False  # dropout knows pairs and heads by other numbers
    masked: bool = False  # a mask of heads


GLOBAL_CASES = {
    "global_d16_fp32": GlobalCase(4, 16, torch.float32),
    "global_d16_bf16": GlobalCase(8, 16, torch.bfloat16),
    "global_d10_bf16": GlobalCase(8, 10, torch.bfloat16),
    "global_d64_bf16": GlobalCase(8, 64, torch.bfloat16),
    "global_d64_fp32": GlobalCase(8, 64, torch.float32),
    "global_d128_fp16": GlobalCase(4, 128, torch.float16),
    "global_d256_bf16": GlobalCase(2, 256, torch.bfloat16),
    "global_d512_bf16": GlobalCase(2, 512, torch.bfloat16),
    "global_d128_fp32": GlobalCase(4, 128, torch.float32),
    "global_d512_fp32": GlobalCase(2, 512, torch.float32),
    "global_d32_fp64": GlobalCase(4, 32, torch.float64),
    "global_d512_fp64": GlobalCase(1, 512, torch.float64),
    "global_gqa_d64_bf16": GlobalCase(8, 64, torch.bfloat16, kv_heads=2, bias="key"),
    "global_uneven_d24_v40_fp16": GlobalCase(4, 24, torch.float16, v_width=40),
    "global_pairs_d16_fp32": GlobalCase(8, 16, torch.float32, bias="pair"),
    "global_pairs_d64_bf16": GlobalCase(8, 64, torch.bfloat16, bias="pair"),
    "global_pairs_drop_d64_bf16": GlobalCase(8, 64, torch.bfloat16, bias="pair", drop=True),
    "global_pairs_d128_fp16": GlobalCase(4, 128, torch.float16, bias="pair", drop=True),
    "global_pairs_d512_bf16": GlobalCase(2, 512, torch.bfloat16, bias="pair", drop=True),
    "global_pairs_d64_fp32": GlobalCase(4, 64, torch.float32, bias="pair", drop=True),
    "global_pairs_d128_fp32": GlobalCase(4, 128, torch.float32, bias="pair", drop=True),
    "global_pairs_d32_fp64": GlobalCase(4, 32, torch.float64, bias="pair", drop=True),
    "global_pairs_d512_fp64": GlobalCase(1, 512, torch.float64, bias="pair", drop=True),
    "global_pairs_d512_fp32": GlobalCase(2, 512, torch.float32, bias="pair", drop=True),
    "global_pairs_numbered_d64_bf16": GlobalCase(8, 64, torch.bfloat16, drop=True, numbered=True),
    "global_masked_d64_bf16": GlobalCase(8, 64, torch.bfloat16, bias="key", masked=True),
}


def launch_global(case: GlobalCase) -> None:
    n, kv_heads = 256, case.kv_heads or case.heads
    q = torch.zeros(n, case.heads, case.width, dtype=case.dtype)
    k = torch.zeros(n, kv_heads, case.width, dtype=case.dtype)
    v = torch.zeros(n, kv_heads, case.v_width or case.width, dtype=case.dtype)
    bias = None
    if case.bias:
        bias = torch.zeros(n if case.bias == "key" else n * n, case.heads, dtype=case.dtype)
    mask = torch.ones(1, case.heads, dtype=torch.bool) if case.masked else None
    seed = torch.zeros(1, dtype=torch.int64) if case.drop else None
    numbers = torch.arange(n) if case.numbered else None
    inputs, terms = Inputs(q, k, v), PairTerms(1.0, bias, case.bias == "key")
    graphs = RaggedPairs(torch.tensor([0, n]), None, mask)
    first_head = 4 if case.numbered else 0
    dropout = PairDropout(seed, numbers, numbers, 0.1 if case.drop else 0.0, first_head)
    call = inputs, terms, graphs, dropout
    o, lse = global_attention_fwd(*call)
    needs = PairNeeds(True, True, True, bias is not None)
    global_attention_bwd(GlobalUpstream(o, None if case.drop else lse, lse), *call, needs)
