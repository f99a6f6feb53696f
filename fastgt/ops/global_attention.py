"""global_attention: public function -> checks -> autograd -> registered ops -> launchers."""

from __future__ import annotations

import functools
import math
from typing import Any, overload

import torch
from torch import Tensor

from fastgt import reference
from fastgt.contract import (
    Aux,
    AuxRequest,
    GlobalResults,
    GlobalUpstream,
    Inputs,
    PairDropout,
    PairNeeds,
    PairTerms,
    RaggedPairs,
)
from fastgt.ops.aux_request import check_request
from fastgt.ops.checks import (
    accumulator,
    autocast,
    autocasts,
    check_edge_tensor,
    check_nodes,
    check_numbers,
    check_offsets,
    check_widths,
    needs_gradient,
    number,
    pair_dropout,
    readable,
    refuse_forward_mode,
    without_autocast,
)
from fastgt.ops.head_mask import check_head_gate, gated, head_mask
from fastgt.ops.implementation import Impl, require_triton, resolve_impl
from fastgt.ops.registration import register
from fastgt.ops.second_order import differentiable_gradients
from fastgt.philox import PairDropoutSeed
from fastgt.shard import Roles, Shard
from fastgt.signature import Signature, results_schema

MAX_WIDTH = 512


@overload
def global_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    offsets: Tensor | Shard | None = None,
    *,
    key_offsets: Tensor | None = None,
    scale: float | None = None,
    bias: Tensor | None = None,
    dropout_p: float = 0.0,
    dropout_seed: int | Tensor | PairDropoutSeed | None = None,
    head_gate: Tensor | None = None,
    dense_gate_grad: bool = False,
    return_aux: None = None,
    impl: Impl | None = None,
) -> Tensor: ...


@overload
def global_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    offsets: Tensor | Shard | None = None,
    *,
    key_offsets: Tensor | None = None,
    scale: float | None = None,
    bias: Tensor | None = None,
    dropout_p: float = 0.0,
    dropout_seed: int | Tensor | PairDropoutSeed | None = None,
    head_gate: Tensor | None = None,
    dense_gate_grad: bool = False,
    return_aux: AuxRequest,
    impl: Impl | None = None,
) -> tuple[Tensor, Aux]: ...


def global_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    offsets: Tensor | Shard | None = None,
    *,
    key_offsets: Tensor | None = None,
    scale: float | None = None,
    bias: Tensor | None = None,
    dropout_p: float = 0.0,
    dropout_seed: int | Tensor | PairDropoutSeed | None = None,
    head_gate: Tensor | None = None,
    dense_gate_grad: bool = False,
    return_aux: AuxRequest | None = None,
    impl: Impl | None = None,
) -> Tensor | tuple[Tensor, Aux]:
    """Softmax attention of every node over all nodes of its graph, or over other keys of it.

    For query i and the keys j of its graph, head by head::

        s_ij  = scale q_i . k_j + bias_ij
        a_ij  = exp(s_ij) / sum_j exp(s_ij)
        out_i = gate sum_j dropout(a_ij) v_j

    Graphs lie one after another, of any size, without padding, and no pair of nodes has an index.
    What is in one graph, NaN included, reaches no other. A query of a graph without keys, or whose
    logits are all -inf, gives exactly 0, an LSE of -inf and zero gradients. The result is the same,
    bit for bit, every time; gradients too, but not those of ``create_graph=True``.

    Args:
        q: ``[N, H, D]`` float16, bfloat16, float32 or float64; D from 1 to 512. As all tensors, of
            any strides.
        k: ``[M, H_kv, D]``, as q; H_kv divides H, query head h reads key head h // (H / H_kv).
        v: ``[M, H_kv, Dv]``, as q; Dv from 1 to 512.
        offsets: ``[G + 1]`` int32 or int64: queries ``offsets[g]`` to ``offsets[g + 1]`` are those
            of graph g, which may have none (``Graph.graph_ptr``, or ``ptr`` of a PyG batch). Their
            values are checked on a CPU only. None: all nodes are one graph.
        key_offsets: ``[G + 1]``, likewise of the keys. None: as offsets, and M is N.
        scale: Default ``1 / sqrt(D)``. A number; to learn it, multiply q by it.
        bias: ``[M, H]``, a number for each key and head; or ``[sum_g n_g m_g, H]``, one for each
            pair: graph after graph, each row after row. One with M rows is taken for the former.
            How many pairs there are is checked on a CPU only. In q's dtype; it gets a gradient.
        dropout_p: Probability, in multiples of 2^-24, of dropping a weight; others grow by
            ``1 / (1 - dropout_p)``. Pass 0 in evaluation.
        dropout_seed: As in :func:`fastgt.neighborhood_attention`. A pair's number is its place
            among the pairs, as those of bias stand: so both operators drop the same on a complete
            graph. A :class:`fastgt.PairDropoutSeed` gives other numbers.
        head_gate: ``[H]``, or ``[G, H]`` for each graph, floating point or bool. Where it is 0 the
            head is masked: neither read nor computed, in the forward and in the backward, with an
            output and gradients of 0, an LSE of -inf, and NaN there changes nothing. A gate other
            than 0 gets its gradient ``sum do . out / gate``, one of 0 gets 0. NaN is refused (on a
            CPU).
        dense_gate_grad: Compute masked heads too, so that gates of 0 get the exact gradient; NaN in
            them shows.
        return_aux: ``AuxRequest(lse=True)`` gives ``lse_i = log sum_j exp(s_ij)`` besides, natural,
            ``[N, H]`` in float32 (float64 for float64), with its gradient: the attention over
            several sets of keys can be merged through it.
        impl: ``"triton"`` (GPU), ``"cpp"`` (CPU), ``"reference"`` (plain definition, with all
            logits of a graph in memory), or None to follow the device.

    Returns:
        ``[N, H, Dv]`` in the dtype of q; with ``return_aux`` a tuple of it and an ``Aux``. Sums are
        kept in float32 (float64 for float64). Memory beside the results is O(N + M), where a CPU
        takes up to eight times the gradients of k and v for a graph of many queries. On a CPU all
        batches run on the compiled kernel, PyTorch's attention on none. Under ``torch.autocast``
        the inputs are cast first. Second derivatives go through the plain definition, with its
        memory. ``torch.func`` transforms and forward-mode derivatives need ``impl="reference"``; a
        model exported by ``torch.export`` is for inference.

    Raises:
        TypeError, ValueError: An argument does not fit; its name and both numbers are given.
        RuntimeError: ``impl`` cannot run here.

    Source:
        Vaswani et al., arXiv 1706.03762, eq. 1, over the nodes of a graph as in Rampášek et al.,
        GraphGPS, arXiv 2205.12454. A bias of pairs is eq. 6 of Ying et al., Graphormer, arXiv
        2106.05234. Keys of their own, with logarithms of counts as their bias, are those of Dwivedi
        et al., LargeGT, arXiv 2312.11109. In blocks, with a running maximum: Dao et al.,
        FlashAttention, arXiv 2205.14135.

    Example:
        >>> import torch
        >>> from fastgt import global_attention
        >>> q, k, v = torch.randn(3, 10, 4, 16)
        >>> offsets = torch.tensor([0, 3, 3, 10])  # graphs of 3, 0 and 7 nodes
        >>> global_attention(q, k, v, offsets).shape
        torch.Size([10, 4, 16])
        >>> bias = torch.randn(3 * 3 + 7 * 7, 4)
        >>> global_attention(q, k, v, offsets, bias=bias).shape
        torch.Size([10, 4, 16])
    """
    if isinstance(offsets, Shard):
        return offsets.run(global_attention, _ROLES, locals())
    request = check_request("global_attention", return_aux, "lse")
    dropout_p = number("dropout_p", dropout_p)
    if isinstance(q, Tensor) and autocasts(q.device.type):
        dtype = torch.get_autocast_dtype(q.device.type)
        q, k, v = (autocast(x, dtype) for x in (q, k, v))
        bias = None if bias is None else autocast(bias, dtype)
    scale = None if scale is None else number("scale", scale)
    _check(q, k, v, offsets, key_offsets)
    if bias is not None:
        _check_bias(bias, q, k, offsets, key_offsets)
    check_numbers(q, scale, 0.0, dropout_p)
    mask, dense = None, False
    if head_gate is not None:
        graphs = 1 if offsets is None else offsets.shape[0] - 1
        check_head_gate(head_gate, q.shape[1], q.device, graphs)
        mask = head_mask(head_gate)
        dense = dense_gate_grad and head_gate.dtype != torch.bool
    dropout = PairDropout()
    if dropout_p or dropout_seed is not None:
        dropout = pair_dropout(dropout_p, dropout_seed, q, k)
    impl = resolve_impl(impl, q)
    terms = PairTerms(
        1 / math.sqrt(q.shape[2]) if scale is None else scale,
        bias,
        bias is not None and bias.shape[0] == k.shape[0],
    )
    ragged = RaggedPairs(offsets, key_offsets, None if dense else mask)
    o, lse = _attend(impl, Inputs(q, k, v), terms, ragged, dropout)
    if head_gate is not None:
        o = gated(o, head_gate, offsets, dense, impl)
        if dense and request.lse and mask is not None:
            lse = lse.masked_fill(~_of_nodes(mask, offsets, q), -math.inf)
    return o if return_aux is None else (o, Aux(lse if request.lse else None))


_ROLES = Roles(rows=("q", "k", "v", "bias"))


def _attend(
    impl: Impl, inputs: Inputs, terms: PairTerms, ragged: RaggedPairs, dropout: PairDropout
) -> GlobalResults:
    if impl == "reference":
        # its sums are float32's, whatever the inputs were cast to
        with without_autocast(inputs.q.device.type):
            return GlobalResults(*reference.masked_global_attention(inputs, terms, ragged, dropout))
    tensors = *inputs, terms.bias
    refuse_forward_mode(*tensors)
    if torch.compiler.is_compiling():
        # Dynamo refuses one tensor in two places of a Function, as in self-attention on x itself
        q, k, v = inputs
        inputs = Inputs(q, k.view_as(k), v.view_as(v))
        offsets, ends, mask = ragged
        ragged = RaggedPairs(offsets, None if ends is None else ends.view_as(ends), mask)
        if terms.bias is not None:
            terms = terms._replace(bias=terms.bias.view_as(terms.bias))
        if dropout.key_numbers is not None:
            dropout = dropout._replace(key_numbers=dropout.key_numbers.view_as(dropout.key_numbers))
    flat = *inputs, *terms, *ragged, *dropout
    attend = _GlobalAttention.apply if needs_gradient(*tensors) else _fwd
    return GlobalResults(*attend(impl, *flat))


def _of_nodes(mask: Tensor, offsets: Tensor | None, q: Tensor) -> Tensor:
    """[1 or G, H] -> [1 or N, H]."""
    if offsets is None or mask.shape[0] == 1:
        return mask
    return mask.repeat_interleave(offsets.diff(), 0, output_size=q.shape[0])


def _check(
    q: Tensor, k: Tensor, v: Tensor, offsets: Tensor | None, key_offsets: Tensor | None
) -> None:
    check_nodes(q, k, v)
    if v.shape[0] != k.shape[0]:
        raise ValueError(f"v has {v.shape[0]} nodes but k has {k.shape[0]}")
    if k.shape[2] != q.shape[2]:
        raise ValueError(f"k has head width {k.shape[2]} but q has {q.shape[2]}")
    heads, kv_heads = q.shape[1], k.shape[1]
    if v.shape[1] != kv_heads:
        raise ValueError(f"v has {v.shape[1]} heads but k has {kv_heads}")
    if heads == 0 or kv_heads == 0 or heads % kv_heads:
        raise ValueError(f"q's {heads} heads must be a multiple of k's {kv_heads} heads")
    instead = "or take PyTorch's scaled_dot_product_attention, of graphs padded to one size"
    check_widths(q, v, instead, MAX_WIDTH)
    if offsets is not None:
        check_offsets(offsets, q.shape[0], q.device)
    if key_offsets is None:
        if k.shape[0] != q.shape[0]:
            raise ValueError(
                f"k has {k.shape[0]} nodes but q has {q.shape[0]}: pass key_offsets, the "
                "boundaries of the keys of each graph"
            )
        return
    check_offsets(key_offsets, k.shape[0], q.device, "key_offsets")
    graphs = 1 if offsets is None else offsets.shape[0] - 1
    if key_offsets.shape[0] - 1 != graphs:
        raise ValueError(
            f"key_offsets has {key_offsets.shape[0] - 1} graphs but offsets has {graphs}"
        )


def _check_bias(
    bias: object, q: Tensor, k: Tensor, offsets: Tensor | None, key_offsets: Tensor | None
) -> None:
    """[M, H] or [pairs, H]; how many pairs there are only where offsets are at hand."""
    heads = q.shape[1]
    if not isinstance(bias, Tensor) or bias.ndim != 2 or bias.shape[1] != heads:
        check_edge_tensor("bias", bias, q, "M or pairs, H", k.shape[0], heads)
        return
    check_edge_tensor("bias", bias, q, "M or pairs, H", bias.shape[0], heads)
    if bias.shape[0] == k.shape[0]:
        return
    ends = offsets if key_offsets is None else key_offsets
    if offsets is None:
        pairs = q.shape[0] * k.shape[0]
    elif ends is not None and readable(offsets) and readable(ends):
        pairs = int((offsets.diff().long() * ends.diff().long()).sum())
    else:
        return
    if bias.shape[0] != pairs:
        raise ValueError(
            f"bias must be [M, H] = [{k.shape[0]}, {heads}] or [pairs, H] = [{pairs}, {heads}], "
            f"got {list(bias.shape)}"
        )


class _GlobalAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, impl: str, *flat: Any) -> tuple[Tensor, Tensor]:
        o, lse = _fwd(impl, *flat)
        inputs, terms, ragged, dropout = FORWARD.split(flat)
        ctx.save_for_backward(*inputs, terms.bias, *ragged, *dropout[:3], lse)
        ctx.impl, ctx.scale, ctx.per_key = impl, terms.scale, terms.per_key
        ctx.dropout = dropout[3:]
        ctx.set_materialize_grads(False)
        return o, lse

    @staticmethod
    def backward(ctx: Any, do: Tensor | None, dlse: Tensor | None) -> tuple:
        q, k, v, bias, *rest, lse = ctx.saved_tensors
        terms = PairTerms(ctx.scale, bias, ctx.per_key)
        dropout = PairDropout(*rest[3:], *ctx.dropout)
        given = ctx.needs_input_grad
        needs = PairNeeds(given[1], given[2], given[3], given[5])
        ragged = RaggedPairs(*rest[:3])
        if torch.is_grad_enabled():
            # create_graph=True: the gradient must itself be differentiable
            define = functools.partial(_definition, terms, ragged, dropout)
            grads = differentiable_gradients(define, (q, k, v, bias), [do, dlse], needs)
        else:
            if do is None:
                do = q.new_zeros(()).expand(*q.shape[:2], v.shape[2])
            flat = do, dlse, lse, q, k, v, *terms, *ragged, *needs, *dropout
            grads = _bwd(ctx.impl, *flat)
        dq, dk, dv, dbias = grads
        others = [None] * (FORWARD.size - 5)
        return (None, dq, dk, dv, None, dbias, *others)


def _definition(
    terms: PairTerms,
    ragged: RaggedPairs,
    dropout: PairDropout,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
) -> tuple[Tensor, Tensor]:
    terms = terms._replace(bias=bias)
    return reference.masked_global_attention(Inputs(q, k, v), terms, ragged, dropout)


def _fake_fwd(
    inputs: Inputs, terms: PairTerms, ragged: RaggedPairs, dropout: PairDropout
) -> GlobalResults:
    q, _, v = inputs
    o = q.new_empty(*q.shape[:2], v.shape[2])
    return GlobalResults(o, q.new_empty(q.shape[:2], dtype=accumulator(q)))


def _fake_bwd(
    upstream: GlobalUpstream,
    inputs: Inputs,
    terms: PairTerms,
    ragged: RaggedPairs,
    needs: PairNeeds,
    dropout: PairDropout,
) -> tuple[Tensor | None, ...]:
    pairs = zip((*inputs, terms.bias), needs, strict=True)
    return tuple(x.new_empty(x.shape) if x is not None and need else None for x, need in pairs)


def _launch_fwd(
    impl: str, inputs: Inputs, terms: PairTerms, ragged: RaggedPairs, dropout: PairDropout
) -> GlobalResults:
    if impl == "cpp":
        from fastgt.cpu import global_attention as cpu

        return cpu.global_attention_fwd(inputs, terms, ragged, dropout)
    require_triton(inputs.q)
    from fastgt.kernels.global_attention import global_attention_fwd

    return GlobalResults(*global_attention_fwd(inputs, terms, ragged, dropout))


def _launch_bwd(
    impl: str,
    upstream: GlobalUpstream,
    inputs: Inputs,
    terms: PairTerms,
    ragged: RaggedPairs,
    needs: PairNeeds,
    dropout: PairDropout,
) -> tuple[Tensor | None, ...]:
    call = upstream, inputs, terms, ragged, dropout, needs
    if impl == "cpp":
        from fastgt.cpu import global_attention as cpu

        return cpu.global_attention_bwd(*call)
    from fastgt.kernels.global_attention_backward import global_attention_bwd

    return global_attention_bwd(*call)


FORWARD = Signature(Inputs, PairTerms, RaggedPairs, PairDropout)
BACKWARD = Signature(GlobalUpstream, Inputs, PairTerms, RaggedPairs, PairNeeds, PairDropout)
_fwd = register(
    "global_attention_fwd",
    FORWARD,
    f"({results_schema(GlobalResults)})",
    launch=_launch_fwd,
    fake=_fake_fwd,
)
_bwd = register(
    "global_attention_bwd",
    BACKWARD,
    "(Tensor? dq, Tensor? dk, Tensor? dv, Tensor? dbias)",
    launch=_launch_bwd,
    fake=_fake_bwd,
)
