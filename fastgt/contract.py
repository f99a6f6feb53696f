"""What travels through an operator: from its public call over autograd and the registered op to a
launcher. A type is declared here once; ``signature.py`` makes the schema of a registered op and the
places of its arguments from the type's fields."""

from __future__ import annotations

from typing import Generic, NamedTuple, TypeVar

from torch import Tensor


class AuxRequest(NamedTuple):
    """Which results an operator gives beside its output. Each operator says which ones it has.

    Example:
        >>> from fastgt import AuxRequest
        >>> AuxRequest(lse=True)
        AuxRequest(lse=True, weights=False, edge_scores=False)
    """

    lse: bool = False
    weights: bool = False
    edge_scores: bool = False


class Aux(NamedTuple):
    """The results that an :class:`AuxRequest` asked for; None where it did not.

    Attributes:
        lse: Logarithm of the sum of exponentials of each row's logits.
        weights: The attention weight of every edge, before dropout.
        edge_scores: The logit of every edge, channel by channel: in attention before its sum over
            channels, in ``gated_aggregate`` that of the gate.
    """

    lse: Tensor | None = None
    weights: Tensor | None = None
    edge_scores: Tensor | None = None


class Logit(NamedTuple):
    """How a logit is made from a product: ``clamp(scale * product, low, high)``; and what its row's
    denominator has besides, ``eps``."""

    scale: float
    low: float
    high: float
    eps: float


class HeadMask(NamedTuple):
    """Which heads are active: of each row, and of each column. No edge leaves its graph."""

    rows: Tensor | None = None  # [1 or N_rows, H] bool
    cols: Tensor | None = None  # [1 or N_cols, H] bool


class RowWalk(NamedTuple):
    """The edges grouped by row, see :mod:`fastgt.ops.walks`."""

    row_walk: tuple[Tensor, ...]


class Walks(NamedTuple):
    """The edges grouped by row and by column; nothing by column where no gradient needs it."""

    row_walk: tuple[Tensor, ...]
    column_walk: tuple[Tensor, ...]


class Dropout(NamedTuple):
    """Each weight is dropped with probability ``p``, as ``seed``, its edge and its head say."""

    seed: Tensor | None = None  # [1] int64; None where p is 0
    numbers: Tensor | None = None  # [E] int64, by which an edge is known; None: its own
    p: float = 0.0
    first_head: int = 0  # by which head 0 is known


class PairDropout(NamedTuple):
    """As :class:`Dropout`, for pairs: known by the sum of the two numbers, or by their own."""

    seed: Tensor | None = None  # [1] int64; None where p is 0
    query_numbers: Tensor | None = None  # [N] int64; both or none
    key_numbers: Tensor | None = None  # [M] int64
    p: float = 0.0
    first_head: int = 0


class Inputs(NamedTuple):
    """What attention takes of rows and of columns."""

    q: Tensor  # [N_rows, H, D]
    k: Tensor  # [N_cols, H_kv, D]
    v: Tensor  # [N_cols, H_kv, Dv]


class EdgeTensors(NamedTuple):
    """What a call of attention gives for edges, by the names of the public arguments."""

    edge_bias: Tensor | None = None  # [E, H]
    edge_gate: Tensor | None = None  # [E, H, D] or [E, H]
    edge_key: Tensor | None = None  # [E, H, D]
    edge_value: Tensor | None = None  # [E, H, Dv]
    edge_attr: Tensor | None = None  # [E, C]
    edge_key_weight: Tensor | None = None  # [C, H, D]
    edge_value_weight: Tensor | None = None  # [C, H, Dv]


class EdgeTerms(NamedTuple):
    """What the registered ops of attention take for edges. All None is the plain call."""

    bias: Tensor | None = None  # [E, H]
    gate: Tensor | None = None  # [E, H, D] or [E, H]
    key: Tensor | None = None  # [E, H, D]
    value: Tensor | None = None  # [E, H, Dv]; None also where the key is added to the values
    attr: Tensor | None = None  # [E, C]
    attr_q: Tensor | None = None  # [N_rows, H, C]: its product with attr joins the logit


class Switches(NamedTuple):
    """What a call of attention does, beside what its tensors say."""

    key_is_value: bool = False  # the edge key is added to the values too
    make_weights: bool = False
    make_scores: bool = False
    make_attr_o: bool = False  # the weighted sums of attr


class Results(NamedTuple):
    """What the forward of attention makes; None where no switch asks for it."""

    o: Tensor  # [N_rows, H, Dv]
    lse: Tensor  # [N_rows, H]
    weights: Tensor | None = None  # [E, H]
    scores: Tensor | None = None  # [E, H, D]
    attr_o: Tensor | None = None  # [N_rows, H, C]


class Upstream(NamedTuple):
    """The gradients that the backward of attention starts from: of o, lse, scores and attr_o."""

    do: Tensor
    dlse: Tensor | None
    dscores: Tensor | None
    dattr_o: Tensor | None


class Saved(NamedTuple):
    """What the backward of attention takes from its forward."""

    lse: Tensor
    o: Tensor | None  # where windows run


T = TypeVar("T")


class PerInput(NamedTuple, Generic[T]):
    """One value for each input of attention that may have a gradient: whether it is needed, or the
    gradient itself."""

    q: T
    k: T
    v: T
    bias: T
    gate: T
    key: T
    value: T
    attr: T
    attr_q: T


class Features(NamedTuple):
    """How linear attention makes features of queries and keys."""

    feature_map: str
    projection: Tensor | None  # [M, D]


class Ragged(NamedTuple):
    """Where the graphs of a batch lie, and which of their heads are active. None: one graph, and
    all heads."""

    offsets: Tensor | None  # [G + 1]
    mask: Tensor | None  # [1 or G, H] bool


class Quotient(NamedTuple):
    """Linear attention's denominator: ``eps`` is added to it; whether there is one."""

    eps: float
    normalize: bool


class NeedQKV(NamedTuple):
    """Which gradients the backward of linear attention has to give."""

    need_q: bool
    need_k: bool
    need_v: bool


class PairTerms(NamedTuple):
    """How global attention makes the logit of a pair: ``scale * product + bias``."""

    scale: float
    bias: Tensor | None  # [M, H] where per_key, else [pairs, H]
    per_key: bool


class RaggedPairs(NamedTuple):
    """Where the queries and the keys of each graph lie, and which of its heads are active. Without
    offsets all are one graph."""

    offsets: Tensor | None  # [G + 1], of queries
    key_offsets: Tensor | None  # [G + 1]; None: as offsets
    head_mask: Tensor | None  # [1 or G, H] bool


class GlobalResults(NamedTuple):
    """What the forward of global attention makes."""

    o: Tensor  # [N, H, Dv]
    lse: Tensor  # [N, H]


class GlobalUpstream(NamedTuple):
    """What the backward of global attention begins with."""

    do: Tensor  # [N, H, Dv]
    dlse: Tensor | None  # [N, H]
    lse: Tensor  # [N, H], kept by the forward


class PairNeeds(NamedTuple):
    """Which gradients the backward of global attention computes."""

    need_q: bool
    need_k: bool
    need_v: bool
    need_bias: bool


class Messages(NamedTuple):
    """What aggregate puts together, ``activation(x_j + edge_value_ij)``: at least one of them; what
    it multiplies each message with; and values of edges in their low-rank form, ``edge_attr_ij @
    edge_value_weight``, both factors or none."""

    x: Tensor | None  # [N_cols, D]
    edge_value: Tensor | None  # [E, D]
    edge_weight: Tensor | None  # [E, D], or [E, 1]: one number an edge
    edge_attr: Tensor | None = None  # [E, C]
    edge_value_weight: Tensor | None = None  # [C, D]


class Reduction(NamedTuple):
    """How messages are put together, and whether each goes through ``max(0, m)`` before."""

    reduce: str  # "sum", "mean" or "max"
    relu: bool


class MessageNeeds(NamedTuple):
    """Which messages' gradients a backward gives."""

    need_x: bool
    need_edge_value: bool
    need_edge_weight: bool
    need_edge_attr: bool = False
    need_edge_value_weight: bool = False


class GatedMessages(NamedTuple):
    """What gated_aggregate averages, the terms of the gates, of which one is there at least, and
    what stands on edges besides."""

    x: Tensor  # [N_cols, D]
    gate: Tensor | None  # [E, D]
    gate_row: Tensor | None  # [N_rows, D]
    gate_col: Tensor | None  # [N_cols, D]
    edge_weight: Tensor | None  # [E, D], or [E, 1]: one number an edge
    edge_value: Tensor | None  # [E, D]


class GatedMean(NamedTuple):
    """Whether the sum is divided by that of the gates and ``eps``."""

    eps: float
    normalize: bool


class GatedResults(NamedTuple):
    """What a forward gives beside the mean: the gates' logits, and what its backward needs."""

    edge_scores: bool
    keep: bool


class GatedUpstream(NamedTuple):
    """The gradients of what gated_aggregate gave."""

    do: Tensor  # [N_rows, D]
    de: Tensor | None  # [E, D], of the gates' logits


class GatedKept(NamedTuple):
    """What a forward kept for its backward, empty without the denominator."""

    total: Tensor  # [N_rows, D], the denominator, infinity for 0
    mean: Tensor  # [N_rows, D], the output before it was rounded


class GatedNeeds(NamedTuple):
    """Which inputs' gradients a backward gives."""

    need_x: bool
    need_gate: bool
    need_gate_row: bool
    need_gate_col: bool
    need_edge_weight: bool
    need_edge_value: bool


class ChannelwiseInputs(NamedTuple):
    """What channelwise attention reads, of C channels or [H, D]."""

    logits: Tensor  # [E, C]
    v: Tensor | None  # [N_cols, C]
    edge_value: Tensor | None  # [E, C]


class ChannelwiseLogit(NamedTuple):
    """How a logit counts in channelwise attention: ``clamp(logit, low, high)``; and what its row's
    denominator has besides, ``eps``."""

    low: float
    high: float
    eps: float


class ChannelwiseResults(NamedTuple):
    """What the forward of channelwise attention gives beside o and lse."""

    keep: bool  # stat, for the backward
    return_weights: bool


class ChannelwiseUpstream(NamedTuple):
    """What the backward of channelwise attention begins with."""

    do: Tensor  # [N_rows, C]
    dlse: Tensor | None  # [N_rows, C]
    stat: Tensor  # [N_rows, 3, C], kept by the forward


class ChannelwiseNeeds(NamedTuple):
    """Which gradients the backward of channelwise attention computes."""

    need_logits: bool
    need_v: bool
    need_edge_value: bool


class AdditiveInputs(NamedTuple):
    """What additive attention takes of rows, of columns and of heads."""

    q: Tensor  # [N_rows, H, D]
    k: Tensor  # [N_cols, H, D]
    v: Tensor  # [N_cols, H, Dv]
    weight: Tensor  # [H, D]


class AdditiveLogit(NamedTuple):
    """How additive attention makes a logit: the slope of its leaky ReLU below 0."""

    slope: float


class AdditiveTerms(NamedTuple):
    """What edges have in additive attention."""

    key: Tensor | None = None  # [E, H, D]
    attr: Tensor | None = None  # [E, C]
    key_weight: Tensor | None = None  # [C, H, D]: its product with attr is added to the keys
    bias: Tensor | None = None  # [E, H]


class AdditiveResults(NamedTuple):
    """What the forward of additive attention gives beside o and lse."""

    make_weights: bool = False


class AdditiveUpstream(NamedTuple):
    """What the backward of additive attention begins with."""

    do: Tensor  # [N_rows, H, Dv]
    dlse: Tensor | None  # [N_rows, H]
    lse: Tensor  # [N_rows, H], kept by the forward


class AdditiveNeeds(NamedTuple):
    """Which gradients the backward of additive attention computes."""

    need_q: bool
    need_k: bool
    need_v: bool
    need_weight: bool
    need_key: bool
    need_attr: bool
    need_key_weight: bool
    need_bias: bool
