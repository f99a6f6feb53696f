"""Attention whose heads lie on several ranks, each of which has the whole graph.

Of H heads, rank r of P computes heads r H / P to (r + 1) H / P, for all nodes. It has some rows of
q, k and v, of all heads. One all-to-all brings them together, one takes the output back::

    q, k, v [n, H, D]  ->  [N, H / P, D]  ->  o [N, H / P, Dv]  ->  [n, H, Dv]

So a rank sends the heads of the other ranks, (P - 1) / P of its rows, and receives as many numbers
where rows are shared out evenly. The backward sends the same numbers the other way round.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from fastgt.contract import Aux
from fastgt.distributed.agreement import (
    agree,
    agree_on_backward,
    described,
    described_autocast,
)
from fastgt.distributed.group import Group
from fastgt.graph import Graph
from fastgt.ops.additive_attention import additive_attention
from fastgt.ops.attention import neighborhood_attention
from fastgt.ops.checks import check_first_head, dropout_key
from fastgt.ops.global_attention import global_attention
from fastgt.ops.head_mask import check_head_gate
from fastgt.ops.linear_attention import linear_attention
from fastgt.philox import DropoutSeed, PairDropoutSeed


def head_parallel(
    op: Callable[..., Any],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    graph: Graph | Tensor,
    group: dist.ProcessGroup | DeviceMesh | Group | None = None,
    **options: Any,
) -> Any:
    """Attention with its heads shared out over ranks, each of which has the whole graph.

    The ranks' rows, one rank's after the other, are those of the graph. P ranks give what one
    process gives, up to rounding, and the same bits every time; they drop what one drops.

    Every rank has the graph and all options, with the tensors of edges whole, and hands its own
    heads of them to ``op``. What gets a gradient there gets that of the rank's heads, and 0 in the
    other ones: their sum over the ranks is one process's. :func:`fastgt.distributed.sync_gradients`
    sums those of parameters. Gradients of q, k and v are those of the rank's rows, and whole.

    Every rank of the group calls this in the same order, a rank without rows too.

    Args:
        op: ``neighborhood_attention``, ``additive_attention``, ``global_attention`` or
            ``linear_attention``.
        q: ``[n, H, D]``, the rank's rows; P divides H. Ranks may have different numbers of rows.
        k, v: ``[m, H_kv, D]`` and ``[m, H_kv, Dv]``, the rank's columns; P divides H_kv.
        graph: The whole one. ``global_attention`` and ``linear_attention`` take its ``graph_ptr``,
            or offsets ``[G + 1]`` of all nodes in its place.
        group: As of :class:`fastgt.distributed.DistributedGraph`.
        options: Those of ``op``, by name. A bias of ``global_attention`` is that of all keys or
            pairs. Where ``dropout_seed`` is None ranks draw one each: they have to seed PyTorch's
            generator alike.

    Returns:
        What ``op`` returns, for the rank's rows and all heads: the output ``[n, H, Dv]`` and, on
        request, the LSE ``[n, H]``. Weights and scores of edges are those of all edges and of the
        rank's own heads, ``[E, H / P]`` and ``[E, H / P, D]``.

    Raises:
        TypeError, ValueError: An argument does not fit; its name and both numbers are given.
        RuntimeError: Another rank refuses its arguments, or ranks disagree.

    Source:
        Jacobs et al., DeepSpeed Ulysses, arXiv 2309.14509, section 3, for sequences.

    Example:
        >>> import torch
        >>> from fastgt import Graph, neighborhood_attention
        >>> from fastgt.distributed import head_parallel
        >>> graph = Graph.from_edge_index(torch.tensor([[0, 1, 2], [1, 2, 0]]))
        >>> x = torch.randn(3, 4, 16)  # of a process alone: it has all rows, and computes all heads
        >>> head_parallel(neighborhood_attention, x, x, x, graph).shape
        torch.Size([3, 4, 16])
    """
    ranks = group if isinstance(group, Group) else Group(group)
    seed: DropoutSeed | PairDropoutSeed | None = None
    problem: Exception | None = None
    try:
        _check(op, q, k, v, graph, options, ranks.size)
        if options.get("dropout_p"):
            seed = _seed(op, options.get("dropout_seed"), q)
    except (TypeError, ValueError) as error:
        problem = error
    device = q.device if isinstance(q, Tensor) else torch.device("cpu")
    rows = {name: described(x, rows=True) for name, x in {"q": q, "k": k, "v": v}.items()}
    told = options | {"graph": graph, "dropout_seed": None if seed is None else seed.seed}
    shared = {name: described(x, rows=False) for name, x in told.items()}
    shared["autocast"] = described_autocast(device)
    name = f"head_parallel of {getattr(op, '__name__', op)}"
    agree(ranks, device, name, rows | shared, problem)

    sizes = ranks.gathered(torch.tensor([len(q), len(k)], device=device))
    of_rows, of_columns = (tuple(x) for x in sizes.T.tolist())
    width = q.shape[1] // ranks.size
    own = _own_heads(op, options, ranks.rank * width, width)
    if seed is not None:
        own["dropout_seed"] = seed._replace(first_head=seed.first_head + ranks.rank * width)
    place = graph.graph_ptr if op in _OVER_GRAPHS and isinstance(graph, Graph) else graph
    heads = _ToHeads.apply(_Shares(ranks, (of_rows, of_columns, of_columns)), q, k, v)
    result = op(*heads, place, **own)

    out, aux = (result, Aux()) if options.get("return_aux") is None else result
    given = [out] if aux.lse is None else [out, aux.lse]
    found = _ToRows.apply(_Shares(ranks, (of_rows,) * len(given)), *given)
    if options.get("return_aux") is None:
        return found[0]
    return found[0], aux._replace(lse=None if aux.lse is None else found[1])


# of each operator, the options that have heads, and in which dimension
_OF_HEADS: dict[Callable[..., Any], dict[str, int]] = {
    neighborhood_attention: {
        "edge_bias": 1,
        "edge_gate": 1,
        "edge_key": 1,
        "edge_value": 1,
        "edge_key_weight": 1,
        "edge_value_weight": 1,
        "head_gate": -1,
    },
    additive_attention: {
        "weight": 0,
        "edge_key": 1,
        "edge_key_weight": 1,
        "edge_bias": 1,
        "head_gate": -1,
    },
    global_attention: {"bias": 1, "head_gate": -1},
    linear_attention: {"head_gate": -1},
}
_OVER_GRAPHS = (global_attention, linear_attention)


def _check(
    op: Any, q: Any, k: Any, v: Any, graph: Any, options: Mapping[str, Any], ranks: int
) -> None:
    """What ``op`` would not refuse on all ranks alike, or with the numbers of one rank's heads."""
    if op not in _OF_HEADS:
        known = ", ".join(f.__name__ for f in _OF_HEADS)
        raise ValueError(f"op must be one of {known}, got {getattr(op, '__name__', op)!r}")
    wanted = (Graph, Tensor) if op in _OVER_GRAPHS else (Graph,)
    if not isinstance(graph, wanted):
        found = type(graph).__name__
        raise TypeError(f"graph must be a Graph, which every rank has whole, got {found}")
    for name, x in (("q", q), ("k", k), ("v", v)):
        if not isinstance(x, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(x).__name__}")
        if x.ndim != 3:
            raise ValueError(f"{name} must be [n, H, D], got {list(x.shape)}")
        if not x.shape[1] or x.shape[1] % ranks:
            raise ValueError(
                f"{name} has {x.shape[1]} heads, which must be a multiple of the group's {ranks} "
                "ranks"
            )
    if v.shape[:2] != k.shape[:2]:
        raise ValueError(
            f"v has {v.shape[0]} nodes and {v.shape[1]} heads but k has {k.shape[0]} and "
            f"{k.shape[1]}"
        )
    for name, dim in _OF_HEADS[op].items():
        if (x := options.get(name)) is None:
            continue
        if name == "head_gate":
            graphs = graph.num_graphs if isinstance(graph, Graph) else len(graph) - 1
            check_head_gate(x, q.shape[1], q.device, graphs)
        if not isinstance(x, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(x).__name__}")
        if x.ndim <= max(dim, 0) or x.shape[dim] != q.shape[1]:
            raise ValueError(
                f"{name} must have q's {q.shape[1]} heads in dimension {dim}, got {list(x.shape)}"
            )


def _seed(op: Any, seed: Any, q: Tensor) -> DropoutSeed | PairDropoutSeed:
    """That of one process."""
    kind = PairDropoutSeed if op is global_attention else DropoutSeed
    given = seed if isinstance(seed, kind) else kind(seed)
    first = check_first_head(given.first_head)
    check_first_head(first + q.shape[1] - 1)
    return given._replace(seed=dropout_key(given.seed, q.device))


def _own_heads(op: Any, options: Mapping[str, Any], begin: int, count: int) -> dict[str, Any]:
    """The options, with the rank's heads of those that have any."""
    found = dict(options)
    done: dict[int, Tensor] = {}
    for name, dim in _OF_HEADS[op].items():
        if (x := options.get(name)) is not None:
            # one tensor in two arguments stays one
            found[name] = done.setdefault(id(x), x.narrow(dim, begin, count))
    return found


class _Shares(NamedTuple):
    """Tensors of rows of all ranks: how many rows each rank has of each tensor."""

    group: Group
    rows: tuple[Sequence[int], ...]

    def of(self, which: Sequence[int]) -> _Shares:
        return _Shares(self.group, tuple(self.rows[i] for i in which))

    def to_heads(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """``[n, H, ...]``, the rank's rows, -> ``[N, H / P, ...]``, its heads."""
        size = self.group.size
        outgoing = [[x.unflatten(1, (size, -1))[:, p] for x in tensors] for p in range(size)]
        incoming = [
            [(rows[p], *x.shape[1:]) for rows, x in zip(self.rows, outgoing[0], strict=True)]
            for p in range(size)
        ]
        got = self._exchanged(outgoing, incoming)
        return [torch.cat(of_ranks) for of_ranks in zip(*got, strict=True)]

    def to_rows(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """``[N, H / P, ...]``, the rank's heads, -> ``[n, H, ...]``, its rows."""
        size, rank = self.group.size, self.group.rank
        pieces = [x.split(list(rows)) for rows, x in zip(self.rows, tensors, strict=True)]
        outgoing = [[of_tensor[p] for of_tensor in pieces] for p in range(size)]
        mine = [tuple(of_tensor[rank].shape) for of_tensor in pieces]
        got = self._exchanged(outgoing, [mine] * size)
        return [torch.cat(of_ranks, 1) for of_ranks in zip(*got, strict=True)]

    def _exchanged(
        self, outgoing: list[list[Tensor]], incoming: list[list[tuple[int, ...]]]
    ) -> list[list[Tensor]]:
        """What goes to each rank, tensor by tensor, -> what comes from each, of those shapes.

        Tensors of one dtype go in one message.
        """
        dtypes = [x.dtype for x in outgoing[0]]
        found: list[list[Any]] = [[None] * len(dtypes) for _ in outgoing]
        for dtype in dict.fromkeys(dtypes):
            which = [i for i, one in enumerate(dtypes) if one == dtype]
            message = torch.cat([x[i].flatten() for x in outgoing for i in which])
            send = [sum(x[i].numel() for i in which) for x in outgoing]
            shapes = [[torch.Size(x[i]) for i in which] for x in incoming]
            receive = [sum(shape.numel() for shape in of_rank) for of_rank in shapes]
            got = self.group.all_to_all(message, send, receive).wait().split(receive)
            for rank, (flat, of_rank) in enumerate(zip(got, shapes, strict=True)):
                parts = flat.split([shape.numel() for shape in of_rank])
                for i, part, shape in zip(which, parts, of_rank, strict=True):
                    found[rank][i] = part.view(shape)
        return found


class _ToHeads(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, shares: _Shares, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.shares, ctx.call = shares, next(shares.group.calls)
        return tuple(shares.to_heads(tensors))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return None, *_returned(ctx, grads, _ToRows)


class _ToRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, shares: _Shares, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.shares, ctx.call = shares, next(shares.group.calls)
        return tuple(shares.to_rows(tensors))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return None, *_returned(ctx, grads, _ToHeads)


def _returned(
    ctx: Any, grads: Sequence[Tensor], back: type[torch.autograd.Function]
) -> list[Tensor | None]:
    """The gradients that are asked for, on all ranks the same ones."""
    found: list[Tensor | None] = [None] * len(grads)
    which = [i for i, need in enumerate(ctx.needs_input_grad[1:]) if need]
    agree_on_backward(ctx.shares.group, grads[0].device, "head_parallel", ctx.call, {})
    sent = back.apply(ctx.shares.of(which), *(grads[i] for i in which))
    for i, grad in zip(which, sent, strict=True):
        found[i] = grad
    return found
