"""linear_attention: public function -> checks -> autograd -> registered ops -> launchers."""

from __future__ import annotations

import functools
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from fastgt import reference
from fastgt.contract import Features, Inputs, NeedQKV, Quotient, Ragged
from fastgt.cpu import linear_attention as cpu
from fastgt.ops.checks import (
    accumulator,
    autocast,
    autocasts,
    check_float,
    check_nodes,
    check_numbers,
    check_offsets,
    check_widths,
    needs_gradient,
    number,
    refuse_forward_mode,
    without_autocast,
)
from fastgt.ops.head_mask import check_head_gate, gated, head_mask
from fastgt.ops.implementation import Impl, require_triton, resolve_impl
from fastgt.ops.second_order import differentiable_gradients
from fastgt.ops.segment_pool import segment_sum
from fastgt.shard import Roles, Shard
from fastgt.signature import Signature

FeatureMap = Literal["identity", "relu", "elu", "sigmoid", "softmax", "relu_random"]
Norms = Literal["graph", "node"]
_RANDOM = ("softmax", "relu_random")  # those with a projection
MAX_FEATURES = 1024


def linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    offsets: Tensor | Shard | None = None,
    *,
    feature_map: FeatureMap = "elu",
    projection: Tensor | None = None,
    eps: float = 1e-6,
    normalize: bool = True,
    head_gate: Tensor | None = None,
    dense_gate_grad: bool = False,
    impl: Impl | None = None,
) -> Tensor:
    """Attention of every node over all nodes of its graph, in time linear in their number.

    For node i of graph g and head h, with a feature map phi from D to M channels::

        S_g   = sum_j phi(k_j) v_j^T,   z_g = sum_j phi(k_j)        j over the nodes of g
        out_i = gate_gh phi(q_i)^T S_g / (phi(q_i)^T z_g + eps)

    Graphs lie one after another, of any size, without padding: what is in one graph, NaN included,
    reaches no other. The result is the same, bit for bit, every time; gradients too.

    The feature maps, element by element but for the last two, which have a projection w [M, D]::

        "identity"     x
        "relu"         max(x, 0)
        "elu"          elu(x) + 1
        "sigmoid"      1 / (1 + exp(-x))
        "softmax"      (exp(w . x D^-1/4 - |x|^2 D^-1/2 / 2 - c) + 1e-4) M^-1/2
        "relu_random"  max(w . x, 0) + 1e-3

    c keeps exp() in range: of a query, the largest of its own w . x D^-1/4; of keys, the largest of
    all keys of the graph, for each head. It counts as a constant: no gradient goes through it.

    Args:
        q: ``[N, H, D]`` float16, bfloat16, float32 or float64; D from 1 to 256. As all tensors, of
            any strides.
        k: ``[N, H, D]``, as q.
        v: ``[N, H, Dv]``, as q; Dv from 1 to 256.
        offsets: ``[G + 1]`` int32 or int64: nodes ``offsets[g]`` to ``offsets[g + 1]`` are those of
            graph g, which may have none (``Graph.graph_ptr``, or ``ptr`` of a PyG batch). Their
            values are checked on a CPU only. None: all nodes are one graph.
        feature_map: phi, above.
        projection: ``[M, D]`` for the last two, of any float dtype, M from 1 to 1024:
            :func:`fastgt.nn.random_features` draws one. It gets no gradient here.
        eps: eps above, relative to the features as they are.
        normalize: False: ``out_i = gate_gh phi(q_i)^T S_g``.
        head_gate: ``[H]``, or ``[G, H]`` for each graph, floating point or bool. Where it is 0 the
            head is masked: neither read nor computed, in the forward and in the backward, with an
            output and gradients of 0, and NaN there changes nothing. A gate other than 0 gets its
            gradient ``sum do . out / gate``, one of 0 gets 0. NaN is refused (on a CPU).
        dense_gate_grad: Compute masked heads too, so that gates of 0 get the exact gradient; NaN in
            them shows.
        impl: As in :func:`fastgt.neighborhood_attention`.

    Returns:
        ``[N, H, Dv]`` in the dtype of q. Sums are kept in float32 (float64 for float64). No
        features are stored. Memory beside the result is O(N H (D + Dv)) on a CPU; Triton's kernels
        keep states, of at most about N H (M + Dv) numbers, and far fewer for large graphs. Under
        ``torch.autocast`` the inputs are cast first. Second derivatives go through the plain
        definition; ``torch.func`` transforms, forward-mode derivatives and a gradient of the
        projection need ``impl="reference"``; a model exported by ``torch.export`` is for inference.

    Raises:
        TypeError, ValueError: An argument does not fit; its name and both numbers are given.
        RuntimeError: ``impl`` cannot run here.

    Source:
        Katharopoulos et al., Transformers are RNNs, arXiv 2006.16236, eqs. 4-7 ("elu"); Choromanski
        et al., Rethinking Attention with Performers, arXiv 2009.14794, eq. 5 and section 2.4
        ("softmax", "relu_random", with the constants of their code); Deng et al., Polynormer,
        arXiv 2403.01232 ("sigmoid").

    Example:
        >>> import torch
        >>> from fastgt import linear_attention
        >>> q, k, v = torch.randn(3, 10, 4, 16)
        >>> offsets = torch.tensor([0, 3, 3, 10])  # graphs of 3, 0 and 7 nodes
        >>> linear_attention(q, k, v, offsets).shape
        torch.Size([10, 4, 16])
    """
    if isinstance(offsets, Shard):
        return offsets.run(linear_attention, _ROLES, locals())
    if isinstance(q, Tensor) and autocasts(q.device.type):
        dtype = torch.get_autocast_dtype(q.device.type)
        q, k, v = (autocast(x, dtype) for x in (q, k, v))
    eps = number("eps", eps)
    check_linear(q, k, v, offsets, feature_map, projection)
    check_numbers(q, None, eps, 0.0, "eps")
    if head_gate is not None:
        graphs = 1 if offsets is None else offsets.shape[0] - 1
        check_head_gate(head_gate, q.shape[1], q.device, graphs)
    impl = resolve_impl(impl, q)
    if impl == "reference":
        # its sums are float32's, whatever the inputs were cast to
        with without_autocast(q.device.type):
            return reference.linear_attention(
                q,
                k,
                v,
                offsets,
                feature_map=feature_map,
                projection=projection,
                eps=eps,
                normalize=normalize,
                head_gate=head_gate,
                dense_gate_grad=dense_gate_grad,
            )
    dense = dense_gate_grad and head_gate is not None and head_gate.dtype != torch.bool
    mask = None if head_gate is None or dense else head_mask(head_gate)
    features, ragged = Features(feature_map, projection), Ragged(offsets, mask)
    out = _attend(impl, Inputs(q, k, v), features, ragged, Quotient(eps, bool(normalize)))
    return out if head_gate is None else gated(out, head_gate, offsets, dense, impl)


def sgformer_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    offsets: Tensor | Shard | None = None,
    *,
    norms: Norms = "graph",
    impl: Impl | None = None,
) -> Tensor:
    """SGFormer's global attention: linear, with every node's own value added.

    For node i of graph g, which has n nodes, with q and k divided by their norms::

        out_i = (sum_j (q_i . k_j) v_j + n v_i) / (sum_j q_i . k_j + n)

    Args:
        q, k, v, offsets, impl: As in :func:`linear_attention`.
        norms: ``"graph"``: Frobenius norms over the nodes, heads and channels of a graph, as the
            authors have them. ``"node"``: norms of each head of each node, as torch-geometric has
            them. A q or k whose norm is 0 stays zero, with a gradient of 0.

    Returns:
        ``[N, H, Dv]`` in the dtype of q; memory beside it as there. Within ``torch.autocast`` norms
        and sums are not cast down; of several dtypes the widest is taken.

    Raises:
        TypeError, ValueError: An argument does not fit; its name and both numbers are given.
        RuntimeError: ``impl`` cannot run here.

    Source:
        Wu et al., SGFormer, arXiv 2306.10759, its simple global attention, as in their code;
        ``"node"`` as in ``torch_geometric.nn.attention.SGFormerAttention``.

    Example:
        >>> import torch
        >>> from fastgt import sgformer_attention
        >>> q, k, v = torch.randn(3, 10, 1, 64)
        >>> sgformer_attention(q, k, v, torch.tensor([0, 3, 10])).shape
        torch.Size([10, 1, 64])
    """
    if isinstance(offsets, Shard):
        return offsets.run(sgformer_attention, _ROLES, locals())
    given = all(isinstance(x, Tensor) for x in (q, k, v))
    if given and autocasts(q.device.type):
        dtype = functools.reduce(torch.promote_types, (x.dtype for x in (q, k, v)))
        q, k, v = (x.to(dtype) for x in (q, k, v))
    check_linear(q, k, v, offsets, "identity", None)
    check_norms(norms)
    if offsets is None:
        offsets = torch.arange(2, device=q.device) * q.shape[0]
    sizes = offsets.diff()

    def of_node(x: Tensor) -> Tensor:
        """What a graph has, for each of its nodes, [N, ...]."""
        return x.repeat_interleave(sizes, 0, output_size=q.shape[0])

    wide = accumulator(q)
    normed = []
    for x in (q, k):
        square = x.to(wide).square().sum(2, keepdim=True)  # [N, H, 1]
        if norms == "graph":
            square = of_node(segment_sum(square.sum((1, 2)), offsets, impl=impl))[:, None, None]
        tiny = torch.finfo(wide).tiny
        norm = torch.where(square > tiny, square.clamp(min=tiny).rsqrt(), 0)
        normed.append((x * norm).to(q.dtype))
    q, k = normed
    total = of_node(segment_sum(k.to(wide), offsets, impl=impl))  # [N, H, D]
    n = of_node(sizes.to(wide))[:, None, None]
    linear = linear_attention(q, k, v, offsets, feature_map="identity", normalize=False, impl=impl)
    share = (q * total).sum(2, keepdim=True) + n
    return ((linear + n * v) / share).to(q.dtype)


def check_norms(norms: object) -> None:
    """What q and k may be divided by."""
    if norms not in get_args(Norms):
        raise ValueError(f"norms must be one of {list(get_args(Norms))}, got {norms!r}")


_ROLES = Roles(rows=("q", "k", "v"))


def _attend(
    impl: Impl, inputs: Inputs, features: Features, ragged: Ragged, quotient: Quotient
) -> Tensor:
    projection = features.projection
    if torch.is_grad_enabled() and projection is not None and projection.requires_grad:
        raise NotImplementedError(
            "projection requires a gradient, which only impl='reference' gives: detach it, or make "
            "learnt features outside, with feature_map='relu' or 'identity'"
        )
    if torch.compiler.is_compiling():
        # Dynamo refuses one tensor in two places of a Function, as in self-attention on x itself
        q, k, v = inputs
        inputs = Inputs(q, k.view_as(k), v.view_as(v))
    refuse_forward_mode(*inputs, projection)
    flat = *inputs, *features, *ragged, *quotient
    attend = _LinearAttention.apply if needs_gradient(*inputs) else _fwd
    return attend(impl, *flat)[0]


def check_linear(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    offsets: Tensor | None,
    feature_map: str,
    projection: Tensor | None,
) -> None:
    """q, k, v, the boundaries and the feature map fit each other."""
    check_nodes(q, k, v)
    nodes, heads, width = q.shape
    for name, x in (("k", k), ("v", v)):
        if x.shape[0] != nodes:
            raise ValueError(f"{name} has {x.shape[0]} nodes but q has {nodes}")
        if x.shape[1] != heads:
            raise ValueError(f"{name} has {x.shape[1]} heads but q has {heads}")
    if not heads:
        raise ValueError("q has no heads")
    if k.shape[2] != width:
        raise ValueError(f"k has head width {k.shape[2]} but q has {width}")
    check_widths(q, v, "whose products are smaller too")
    if offsets is not None:
        check_offsets(offsets, nodes, q.device)
    if feature_map not in get_args(FeatureMap):
        raise ValueError(
            f"feature_map must be one of {list(get_args(FeatureMap))}, got {feature_map!r}"
        )
    if (projection is not None) != (feature_map in _RANDOM):
        needs = "needs" if feature_map in _RANDOM else "takes no"
        raise ValueError(f"feature_map={feature_map!r} {needs} projection [M, D]")
    if projection is None:
        return
    check_float("projection", projection)
    if projection.ndim != 2 or projection.shape[1] != width:
        raise ValueError(f"projection must be [M, D] = [M, {width}], got {list(projection.shape)}")
    if not 1 <= projection.shape[0] <= MAX_FEATURES:
        raise ValueError(
            f"projection has {projection.shape[0]} features; supported are 1 to {MAX_FEATURES}"
        )
    if projection.device != q.device:
        raise ValueError(f"projection is on {projection.device} but q is on {q.device}")


class _LinearAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, impl: str, *flat: Any) -> tuple[Tensor, Tensor]:
        o, kept = _fwd(impl, *flat)
        inputs, features, ragged, quotient = FORWARD.split(flat)
        ctx.save_for_backward(*inputs, kept, features.projection, *ragged)
        ctx.impl, ctx.feature_map, ctx.quotient = impl, features.feature_map, quotient
        ctx.mark_non_differentiable(kept)
        return o, kept

    @staticmethod
    def backward(ctx: Any, do: Tensor, _: None) -> tuple:
        q, k, v, kept, projection, *ragged = ctx.saved_tensors
        inputs, features = Inputs(q, k, v), Features(ctx.feature_map, projection)
        needs = NeedQKV(*ctx.needs_input_grad[1:4])
        if torch.is_grad_enabled():
            # create_graph=True: the gradient must itself be differentiable
            define = functools.partial(_definition, features, Ragged(*ragged), ctx.quotient)
            grads = differentiable_gradients(define, inputs, [do], needs)
        else:
            given = _bwd(ctx.impl, do, kept, *inputs, *features, *ragged, *ctx.quotient, *needs)
            grads = [x if need else None for x, need in zip(given, needs, strict=True)]
        return (None, *grads, *[None] * (FORWARD.size - len(inputs)))


def _definition(
    features: Features, ragged: Ragged, quotient: Quotient, q: Tensor, k: Tensor, v: Tensor
) -> tuple[Tensor]:
    out = reference.linear_attention(
        q,
        k,
        v,
        ragged.offsets,
        feature_map=features.feature_map,
        projection=features.projection,
        eps=quotient.eps,
        normalize=quotient.normalize,
        head_gate=ragged.mask,
    )
    return (out,)


FORWARD = Signature(Inputs, Features, Ragged, Quotient)
BACKWARD = Signature(Inputs, Features, Ragged, Quotient, NeedQKV)

# kept: a GPU's kernels keep the stabilisers of "softmax" keys [G, H], a CPU's the states of graphs
# in pieces
torch.library.define(
    "fastgt::linear_attention_fwd", f"(str impl, {FORWARD.schema}) -> (Tensor o, Tensor kept)"
)
torch.library.define(
    "fastgt::linear_attention_bwd",
    f"(str impl, Tensor do, Tensor kept, {BACKWARD.schema}) -> (Tensor dq, Tensor dk, Tensor dv)",
)


@torch.library.register_fake("fastgt::linear_attention_fwd")
def _(impl: str, *flat: Any) -> tuple[Tensor, Tensor]:
    inputs, features, ragged, _ = FORWARD.split(flat)
    q, _, v = inputs
    if impl == "cpp":
        return q.new_empty(v.shape), cpu.states_kept(inputs, features, ragged)
    graphs = 0
    if features.feature_map == "softmax":
        graphs = 1 if ragged.offsets is None else ragged.offsets.shape[0] - 1
    return q.new_empty(v.shape), q.new_empty(graphs, q.shape[1], dtype=accumulator(q))


@torch.library.register_fake("fastgt::linear_attention_bwd")
def _(impl: str, do: Tensor, kept: Tensor, *flat: Any) -> tuple[Tensor, ...]:
    inputs, *_, needs = BACKWARD.split(flat)
    return tuple(
        x.new_empty(x.shape if need else (0,)) for x, need in zip(inputs, needs, strict=True)
    )


def _launch_fwd(impl: str, *flat: Any) -> tuple[Tensor, Tensor]:
    inputs, features, ragged, quotient = FORWARD.split(flat)
    if impl == "cpp":
        return cpu.linear_attention_fwd(inputs, features, ragged, quotient)
    require_triton(inputs.q)
    from fastgt.kernels.linear_attention import linear_attention_fwd

    return linear_attention_fwd(inputs, features, ragged, quotient)


def _launch_bwd(impl: str, do: Tensor, kept: Tensor, *flat: Any) -> tuple[Tensor, Tensor, Tensor]:
    inputs, features, ragged, quotient, needs = BACKWARD.split(flat)
    if impl == "cpp":
        return cpu.linear_attention_bwd(do, kept, inputs, features, ragged, quotient, needs)
    from fastgt.kernels.linear_attention_backward import linear_attention_bwd

    return linear_attention_bwd(do, kept, inputs, features, ragged, quotient, needs)


torch.library.impl("fastgt::linear_attention_fwd", "CompositeExplicitAutograd", _launch_fwd)
torch.library.impl("fastgt::linear_attention_bwd", "CompositeExplicitAutograd", _launch_bwd)

_fwd = torch.ops.fastgt.linear_attention_fwd.default
_bwd = torch.ops.fastgt.linear_attention_bwd.default
