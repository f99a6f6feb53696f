"""A graph that lies on several ranks: each has some rows, their edges and the columns they read."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from fastgt.contract import Aux
from fastgt.distributed.agreement import agree, described, described_autocast
from fastgt.distributed.cached import cached_property
from fastgt.distributed.columns import Columns, joined
from fastgt.distributed.eager import eager
from fastgt.distributed.exchange import Exchange
from fastgt.distributed.group import Group
from fastgt.distributed.offsets import RankOffsets
from fastgt.distributed.part import Part, cut, graphs_of
from fastgt.distributed.part_checks import check_whole, identity, misfit
from fastgt.distributed.partition import check_part
from fastgt.distributed.partition_files import hash_of
from fastgt.graph import Graph
from fastgt.graph_build import from_pairs, size_of, with_boundaries
from fastgt.ops.checks import dropout_key
from fastgt.philox import DropoutSeed
from fastgt.shard import Roles, Shard

Kind = Literal["row", "column", "edge"]


class DistributedGraph(Shard):
    """One rank's share of a graph. Operators take it where they take a :class:`fastgt.Graph`.

    Node tensors are those of the rank's own rows, ``[n, ...]``, and of its own columns,
    ``[m, ...]``. Edge tensors are those of its rows' edges, ``[e, ...]``. Operators fetch the
    columns of other ranks that these edges read, and send their gradients back. P ranks give what
    one process gives for the whole graph, up to rounding, and the same bits every time. Gradients
    of parameters are the rank's share: :func:`fastgt.distributed.sync_gradients` sums them.

    Every rank of the group calls the same operators in the same order, a rank without rows too.

    Args:
        part: The rank's share, as :func:`fastgt.distributed.load_partition` reads it and
            :meth:`from_graph` cuts it.
        group: The ranks, a process group of ``torch.distributed`` or a ``DeviceMesh`` of one
            dimension; None for the default group, or for this process alone.
        overlap: Compute rows that read own columns alone while the other ranks' are on their way.
            Second derivatives need ``overlap=False``.
        check: Let ranks compare their arguments in every call, and tell each other before every
            backward, so that all of them raise where one does. Without, each has one small
            collective less, and ranks that disagree wait for each other until the timeout.

    Attributes:
        part: Which rows, columns, halo and edges these are in the whole graph.
        num_rows, num_cols, num_edges: n, m and e.
        num_graphs: Graphs of the whole batch.

    Raises:
        TypeError: ``part`` or ``group`` is of another type.
        ValueError: The group has another size than the partition, or this process has another
            rank in it.
        RuntimeError: Another rank refuses its part; or the ranks' parts are not of one partition.

    Example:
        >>> import torch
        >>> from fastgt import Graph, neighborhood_attention
        >>> from fastgt.distributed import DistributedGraph
        >>> graph = Graph.from_edge_index(torch.tensor([[0, 1, 2], [1, 2, 0]]))
        >>> shard = DistributedGraph.from_graph(graph, torch.zeros(3, dtype=torch.int64))
        >>> x = shard.own(torch.randn(3, 4, 16))
        >>> neighborhood_attention(x, x, x, shard).shape
        torch.Size([3, 4, 16])
    """

    def __init__(
        self,
        part: Part,
        group: dist.ProcessGroup | DeviceMesh | Group | None = None,
        *,
        overlap: bool = True,
        check: bool = True,
    ):
        ranks = group if isinstance(group, Group) else Group(group)
        told, device = {"overlap": repr(overlap), "check": repr(check)}, torch.device("cpu")
        if isinstance(part, Part):
            told, device = told | identity(part), part.rows.device
        agree(ranks, device, "DistributedGraph", told, misfit(part, ranks))
        self.part, self.overlap = part, overlap
        self.group = ranks if check else ranks.unchecked()
        self.num_rows, self.num_cols = len(part.rows), len(part.cols)
        self.num_edges, self.num_graphs = len(part.edge), len(part.whole.graph_ptr) - 1
        check_whole(part, self.sizes_of_ranks)
        self.exchange = Exchange(part, ranks, check)

    @classmethod
    def from_graph(
        cls,
        graph: Graph,
        part: Tensor | tuple[Tensor, Tensor],
        group: dist.ProcessGroup | DeviceMesh | Group | None = None,
        *,
        overlap: bool = True,
        check: bool = True,
    ) -> DistributedGraph:
        """This rank's share of a graph that every rank has.

        Args:
            graph: The whole graph.
            part: ``[N]``, the rank that owns each node; of a bipartite graph a pair, of rows and of
                columns.
            group, overlap, check: As of the class.

        Raises:
            TypeError, ValueError: ``part`` does not fit the graph or the group.
            RuntimeError: Another rank refuses its own; or ranks have other graphs or other parts.
        """
        ranks = group if isinstance(group, Group) else Group(group)
        told: dict[str, str] = {}
        problem: Exception | None = None
        share: Part | None = None
        try:
            row_part, col_part, _ = check_part(graph, part, ranks.size)
            if ranks.size > 1:
                told = {"partition": hash_of(graph, row_part, col_part, ranks.size)}
            share = cut(graph, row_part, col_part, ranks.rank, ranks.size)
        except (TypeError, ValueError) as error:
            problem = error
        device = graph.device if isinstance(graph, Graph) else torch.device("cpu")
        agree(ranks, device, "DistributedGraph.from_graph", told, problem)
        assert share is not None
        return cls(share, ranks, overlap=overlap, check=check)

    def __repr__(self) -> str:
        part = self.part
        return (
            f"DistributedGraph(rank {part.rank} of {part.parts}, n={self.num_rows}, "
            f"e={self.num_edges}, h={len(part.halo)}, {self.device})"
        )

    @property
    def device(self) -> torch.device:
        return self.part.rows.device

    @property
    def num_nodes(self) -> int:
        """The rank's own nodes, of a square graph."""
        if not self.part.whole.square:
            raise ValueError(
                f"num_nodes needs a square graph, got {self.num_rows} rows and {self.num_cols} "
                "columns"
            )
        return self.num_rows

    @cached_property
    def graph_ptr(self) -> RankOffsets:
        """The boundaries of the batch's graphs, for operators over the nodes of a graph."""
        return RankOffsets(self, self._ends[0])

    @property
    def row_degree(self) -> Tensor:
        """Edges of each own row, ``[n]``."""
        return self.part.row.bincount(minlength=self.num_rows)

    @cached_property
    def col_degree(self) -> Tensor:
        """Edges of each own column, those of other ranks' rows too, ``[m]``. All ranks ask."""
        self.agree("col_degree", {})
        width = self.num_cols + len(self.part.halo)
        counts = self.part.col.bincount(minlength=width).double()
        theirs = self.exchange.returned([counts[self.num_cols :]])[0]
        return (counts[: self.num_cols] + theirs).long()

    @property
    def edge_index(self) -> Tensor:
        """``[2, e]``, the column above the row of each edge, as :class:`Part` counts them."""
        return torch.stack([self.part.col, self.part.row])

    @cached_property
    def sizes_of_ranks(self) -> Tensor:
        """``[P, 3]``: own rows, own edges and graphs of each rank. All ranks ask."""
        sizes = self.num_rows, self.num_edges, self.num_graphs
        return self.group.gathered(torch.tensor(sizes, device=self.device))

    @cached_property
    def digest(self) -> str:
        """Sixteen letters that change with the graph and with who owns what. All ranks ask."""
        self.agree("digest", {})
        part = self.part
        mine = hashlib.sha256(str(tuple(part.whole[:4])).encode())
        for x in (part.rows, part.cols, part.halo, part.row, part.col, part.edge):
            mine.update(x.cpu().contiguous().numpy().data)
        of_ranks = self.group.told(mine.hexdigest())
        return hashlib.sha256(" ".join(of_ranks).encode()).hexdigest()[:16]

    def own(self, x: Tensor, kind: Kind = "row") -> Tensor:
        """The rank's share of a tensor of the whole graph: of its rows, columns or edges."""
        part, whole = self.part, self.part.whole
        kinds = {
            "row": (part.rows, whole.rows),
            "column": (part.cols, whole.cols),
            "edge": (part.edge, whole.edges),
        }
        if kind not in kinds:
            raise ValueError(f"kind must be one of {list(kinds)}, got {kind!r}")
        index, size = kinds[kind]
        if len(x) != size:
            raise ValueError(f"x has {len(x)} rows but the whole graph has {size} {kind}s")
        return x.index_select(0, index.to(x.device))

    def bytes_of_exchange(self, channels: int, dtype: torch.dtype) -> tuple[int, int]:
        """-> bytes that the rank sends and that it receives where an operator fetches columns.

        The backward is the reverse: the rank sends as many as it received, for the channels whose
        gradient is asked for.

        Args:
            channels: Of a column in all tensors that are fetched: H (D + Dv) where attention takes
                ``k [m, H, D]`` and ``v [m, H, Dv]``.
            dtype: Of these tensors.
        """
        row = size_of(channels, "channels") * dtype.itemsize
        return sum(self.exchange.send) * row, sum(self.exchange.receive) * row

    @cached_property
    def local(self) -> Graph:
        """All edges of the rank: from n rows to m own columns and h of the halo."""
        return self._graph(slice(None), halo=True)

    @cached_property
    def _interior(self) -> Graph:
        return self._graph(slice(self.part.interior), halo=False)

    @cached_property
    def _boundary(self) -> Graph:
        return self._graph(slice(self.part.interior, None), halo=True)

    @cached_property
    def _is_boundary(self) -> Tensor:
        """``[n]``: rows that read other ranks' columns."""
        found = torch.zeros(self.num_rows, dtype=torch.bool, device=self.device)
        found[self.part.row[self.part.interior :]] = True
        return found

    @cached_property
    def _ends(self) -> tuple[Tensor, Tensor, Tensor]:
        return graphs_of(self.part)

    @cached_property
    def _column_order(self) -> Tensor | None:
        """``[m + h]``, own columns and then the halo's, sorted by graph; None for one graph."""
        if self.num_graphs == 1:
            return None
        _, cols, halo = self._ends
        graphs = torch.arange(self.num_graphs, device=self.device)
        of = torch.cat([graphs.repeat_interleave(cols.diff()), halo])
        return of.sort(stable=True).indices

    def _graph(self, edges: slice, *, halo: bool) -> Graph:
        part, (rows, cols, of_halo) = self.part, self._ends
        col, width = part.col[edges], self.num_cols
        if halo:
            width += len(part.halo)
            if self._column_order is not None:
                place = torch.empty_like(self._column_order)
                place[self._column_order] = torch.arange(width, device=self.device)
                col = place.index_select(0, col)
            counts = of_halo.bincount(minlength=self.num_graphs)
            cols = cols + torch.cat([counts.new_zeros(1), counts.cumsum(0)])
        graph = from_pairs(part.row[edges], col, self.num_rows, width)
        return Graph(*with_boundaries(graph, rows, cols))

    def assembled(self, own: Tensor, halo: Tensor) -> Tensor:
        """``[m, ...]`` and ``[h, ...]`` -> ``[m + h, ...]``, the columns of ``local``."""
        return joined(own, halo, self._column_order)

    def sending(self, x: Tensor, project: Callable[[Tensor], Sequence[Tensor]]) -> Shard:
        return _Sending(self, x, project)

    @eager
    def run(
        self,
        op: Callable[..., Any],
        roles: Roles,
        arguments: Mapping[str, Any],
        source: _Sending | None = None,
    ) -> Any:
        """An operator on the rank's rows; called by the operator itself.

        ``source``: what is sent in the place of the tensors of columns.
        """
        problem: Exception | None = None
        if "graph" not in arguments:
            problem = TypeError(f"{op.__name__} takes graph.graph_ptr, got a DistributedGraph")
            self.agree(op.__name__, {}, problem)
        call = {name: x for name, x in arguments.items() if name != "graph"}
        if call.get("dropout_p"):
            try:
                call["dropout_seed"] = dropout_key(call["dropout_seed"], self.device)
            except (TypeError, ValueError) as error:
                problem = error
        self.check_call(op, roles, call, None if source is None else source.x, problem)
        given = {name: call[name] for name in roles.columns if call[name] is not None}
        if not given or not self.exchange.active:
            return op(**self._arguments(roles, call, slice(None)), graph=self.local)
        columns = Columns(given, len(self.part.halo), self._column_order)
        sent = columns.tensors if source is None else [source.x]
        made = tuple if source is None else source.made
        if not self.overlap:
            full = columns.joined(made(self.exchange.fetched(sent)))
            return op(**self._arguments(roles, call, slice(None)) | full, graph=self.local)
        journey, inside = self.exchange.depart(sent), self.part.interior
        if inside in (0, self.num_edges):
            full = columns.joined(made(journey.arrive()))
            return op(**self._arguments(roles, call, slice(None)) | full, graph=self.local)
        inner = self._arguments(roles, call, slice(inside)) | columns.placed()
        first = op(**inner, graph=self._interior)
        outer = self._arguments(roles, call, slice(inside, None))
        outer |= columns.joined(made(journey.arrive()))
        return self._merged(roles, first, op(**outer, graph=self._boundary))

    def check_call(
        self,
        op: Callable[..., Any],
        roles: Roles,
        call: Mapping[str, Any],
        sent: Tensor | None = None,
        problem: Exception | None = None,
    ) -> None:
        """Raise on all ranks where one has tensors of a wrong size, or where ranks disagree.

        ``problem``: what this rank has found already.
        """
        told = _told(roles, call) | {"what is sent": described(sent, rows=True)}
        told["autocast"] = described_autocast(self.device)
        self.agree(op.__name__, told, problem or self._wrong_size(roles, call))

    def agree(
        self, what: str, arguments: Mapping[str, str], problem: Exception | None = None
    ) -> None:
        """Go on if all ranks call the same with these arguments and none has a problem."""
        agree(self.group, self.device, what, arguments, problem)

    def _arguments(self, roles: Roles, call: Mapping[str, Any], edges: slice) -> dict[str, Any]:
        """The call for some of the rank's edges."""
        found: dict[str, Any] = dict(call)
        done: dict[int, Tensor] = {}
        for name in roles.edges:
            if (x := call[name]) is not None and edges != slice(None):
                # one tensor in two arguments stays one
                done.setdefault(id(x), x[edges])
                found[name] = done[id(x)]
        if call.get("dropout_p"):
            found["dropout_seed"] = DropoutSeed(call["dropout_seed"], self.part.edge[edges])
        return found

    def _merged(self, roles: Roles, first: Any, second: Any) -> Any:
        """The result of interior rows and that of boundary rows as one."""
        if isinstance(first, Tensor):
            return self._of_edges(first, second) if roles.of_edges else self._of_rows(first, second)
        (out, aux), (late_out, late_aux) = first, second
        lse = None if aux.lse is None else self._of_rows(aux.lse, late_aux.lse)
        edges = (
            None if x is None else self._of_edges(x, y)
            for x, y in zip(aux[1:], late_aux[1:], strict=True)
        )
        return self._of_rows(out, late_out), Aux(lse, *edges)

    def _of_rows(self, first: Tensor, second: Tensor) -> Tensor:
        late = self._is_boundary.view(-1, *[1] * (first.ndim - 1))
        return torch.where(late, second, first)

    def _of_edges(self, first: Tensor, second: Tensor) -> Tensor:
        return torch.cat([first, second])

    def _wrong_size(self, roles: Roles, call: Mapping[str, Any]) -> Exception | None:
        whole = self.part.whole
        kinds = (
            ("row", roles.rows, self.num_rows, whole.rows),
            ("column", roles.columns, self.num_cols, whole.cols),
            ("edge", roles.edges, self.num_edges, whole.edges),
        )
        for kind, names, size, total in kinds:
            for name in names:
                if (x := call[name]) is None:
                    continue
                if not isinstance(x, Tensor):
                    return TypeError(f"{name} must be a tensor, got {type(x).__name__}")
                if x.device != self.device:
                    return ValueError(f"graph is on {self.device} but {name} is on {x.device}")
                if x.ndim and len(x) == size:
                    continue
                hint = ""
                if x.ndim and len(x) == total:
                    hint = f": of a tensor of the whole graph, own({name}, {kind!r}) is the share"
                found = list(x.shape)
                return ValueError(
                    f"{name} is {found} but rank {self.part.rank} has {size} {kind}s{hint}"
                )
        return None


class _Sending(Shard):
    """A distributed graph for one call, of whose columns x is sent and projected where it arrives.

    It stands for the graph in that call alone; all else is asked of the graph.
    """

    def __init__(
        self,
        graph: DistributedGraph,
        x: Tensor,
        project: Callable[[Tensor], Sequence[Tensor]],
    ):
        self.graph, self.x, self._project = graph, x, project

    def made(self, halos: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """The tensors of columns, of the halo's x."""
        return tuple(self._project(halos[0]))

    def run(self, op: Callable[..., Any], roles: Roles, arguments: Mapping[str, Any]) -> Any:
        return self.graph.run(op, roles, arguments, self)


def _told(roles: Roles, call: Mapping[str, Any]) -> dict[str, str]:
    """What must be the same on all ranks."""
    shared = {*roles.rows, *roles.columns, *roles.edges}
    told = {name: described(x, rows=name in shared) for name, x in call.items()}
    first: dict[int, str] = {}
    for name in roles.columns:
        other = first.setdefault(id(call[name]), name)
        if call[name] is not None and other != name:  # one tensor is sent once
            told[name] += f", the same tensor as {other}"
    return told
