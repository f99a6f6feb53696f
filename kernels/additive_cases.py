"""Every configuration of additive attention, for ``cases.py``."""

from dataclasses import dataclass

import torch

from fastgt.contract import (
    AdditiveInputs,
    AdditiveNeeds,
    AdditiveTerms,
    AdditiveUpstream,
    Dropout,
    HeadMask,
    Walks,
)

from .additive_attention import additive_attention_fwd
from .additive_attention_backward import additive_attention_bwd
from .configs import FILLERS


@dataclass(frozen=True)
class AdditiveCase:
    """One configuration of additive attention."""

    heads: int
    width: int
    v_width: int
    dtype: torch.dtype
    terms: str = ""  # on edges: words of "key bias drop numbered"
    weights: bool = False
    buckets: bool = False
    masked: bool = False  # heads of each row


ADDITIVE_CASES = {
    "additive_h8_d1_v16_fp32": AdditiveCase(8, 1, 16, torch.float32, weights=True),
    "additive_h8_d1_v64_bf16": AdditiveCase(8, 1, 64, torch.bfloat16, "key"),
    "additive_h8_d8_fp32": AdditiveCase(8, 8, 8, torch.float32, "bias drop"),
    "additive_numbered_h8_d16_bf16": AdditiveCase(8, 16, 16, torch.bfloat16, "bias numbered"),
    "additive_h8_d16_fp32": AdditiveCase(8, 16, 16, torch.float32, weights=True),
    "additive_h8_d16_bf16": AdditiveCase(8, 16, 16, torch.bfloat16),
    "additive_h4_d64_fp16": AdditiveCase(4, 64, 64, torch.float16),
    "additive_key_h8_d16_fp32": AdditiveCase(8, 16, 16, torch.float32, "key bias drop", True),
    "additive_key_h4_d64_bf16": AdditiveCase(4, 64, 64, torch.bfloat16, "key"),
    "additive_h8_d128_bf16": AdditiveCase(8, 128, 128, torch.bfloat16, "key"),
    "additive_h2_d256_fp32": AdditiveCase(2, 256, 256, torch.float32, "key"),
    "additive_h4_d32_fp64": AdditiveCase(4, 32, 32, torch.float64, "key bias"),
    "additive_buckets_h8_d16_bf16": AdditiveCase(8, 16, 16, torch.bfloat16, buckets=True),
    "additive_buckets_h8_d16_fp32": AdditiveCase(8, 16, 16, torch.float32, "key", buckets=True),
    "additive_masked_h8_d16_fp32": AdditiveCase(
        8, 16, 16, torch.float32, "key bias", weights=True, masked=True
    ),
    "additive_masked_h8_d64_bf16": AdditiveCase(8, 64, 64, torch.bfloat16, masked=True),
}


def launch_additive(case: AdditiveCase) -> None:
    """All kernels of one configuration, forward and backward."""
    n, m, words = 8, 128, case.terms.split()
    index = torch.arange(m, dtype=torch.int32) % n
    ptr = torch.arange(0, m + 1, m // n, dtype=torch.int32)
    shape = case.heads, case.width
    q, k = torch.zeros(2, n, *shape, dtype=case.dtype)
    v = torch.zeros(n, case.heads, case.v_width, dtype=case.dtype)
    walk = ptr, index, index
    if case.buckets:
        rows, parts = index[: FILLERS + 2], index.new_zeros(FILLERS + 2, 3)
        walk = *walk, rows, rows, parts, parts
    key = torch.zeros(m, *shape, dtype=case.dtype) if "key" in words else None
    bias = torch.zeros(m, case.heads, dtype=case.dtype) if "bias" in words else None
    dropped = "drop" in words or "numbered" in words
    seed = torch.zeros(1, dtype=torch.int64) if dropped else None
    numbers = torch.arange(m) if "numbered" in words else None
    active = torch.ones(n, case.heads, dtype=torch.bool) if case.masked else None
    inputs = AdditiveInputs(q, k, v, torch.zeros(shape, dtype=case.dtype))
    terms, mask = AdditiveTerms(key, None, None, bias), HeadMask(active, active)
    dropout = Dropout(seed, numbers, 0.1 if dropped else 0.0)
    call = terms, mask, dropout
    o, lse, _ = additive_attention_fwd(walk, inputs, 0.2, *call, case.weights)
    upstream = AdditiveUpstream(o, lse if case.weights else None, lse)
    needs = AdditiveNeeds(*(True,) * 4, key is not None, False, False, bias is not None)
    additive_attention_bwd(Walks(walk, walk), upstream, inputs, 0.2, needs, *call)
