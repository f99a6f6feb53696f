"""What a partition costs: edges, halos and bytes of each rank, before anything runs."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from fastgt.distributed.partition import check_part
from fastgt.graph import Graph
from fastgt.graph_build import size_of

MOST_LINES = 16  # ranks that a table shows; of more, the first and the slowest


class Network(NamedTuple):
    """What a rank sends, and at the same time receives, in a second, and what a message costs.

    Attributes:
        bandwidth: Bytes a second of a rank in each direction, as the data sheet has it.
        latency: Seconds that an exchange with one more rank takes, whatever its size.
    """

    bandwidth: float
    latency: float


# Bandwidths: NVIDIA's data sheets of the H200 (NVLink 4, 900 GB/s both ways together) and of the
# ConnectX-7 (NDR, 400 Gb/s); 100 and 10 Gb/s of IEEE 802.3. Latencies of the first two are those
# that NCCL plans with (src/graph/tuning.cc: Ring, Simple, over NVLink and over a network). That of
# Ethernet through the kernel's TCP is assumed.
NETWORKS = {
    "nvlink4": Network(450e9, 3.4e-6),
    "infiniband-ndr": Network(50e9, 14e-6),
    "ethernet-100g": Network(12.5e9, 30e-6),
    "ethernet-10g": Network(1.25e9, 30e-6),
}


class Report(NamedTuple):
    """Counts of each rank, which are exact, and seconds, which a model predicts.

    Attributes:
        rows, cols, edges: ``[P]``, what each rank owns.
        halo: ``[P]``, the distinct columns of others that it reads, and so receives.
        sent: ``[P]``, the columns that it sends, once for each rank that reads them.
        cut: ``[P]``, its edges to columns of others.
        peers: ``[P]``, how many others it exchanges with.
        width, dtype, network: What is exchanged, and through which of :data:`NETWORKS`.
    """

    rows: Tensor
    cols: Tensor
    edges: Tensor
    halo: Tensor
    sent: Tensor
    cut: Tensor
    peers: Tensor
    width: int
    dtype: torch.dtype
    network: str

    @property
    def balance(self) -> float:
        """The most edges of a rank by their mean; 1 is even."""
        total = int(self.edges.sum())
        return int(self.edges.max()) * len(self.edges) / total if total else 1.0

    @property
    def bytes_received(self) -> Tensor:
        """``[P]``, of one exchange forward; the backward sends as many back."""
        return self.halo * (self.width * self.dtype.itemsize)

    @property
    def bytes_sent(self) -> Tensor:
        """``[P]``, of one exchange forward."""
        return self.sent * (self.width * self.dtype.itemsize)

    @property
    def seconds(self) -> Tensor:
        """``[P]``: the larger of bytes sent and received by the bandwidth, and the latency of each
        peer. A model: nothing was measured, nor do ranks wait for each other in it."""
        network = NETWORKS[self.network]
        bytes_ = torch.maximum(self.bytes_sent, self.bytes_received).double()
        return bytes_ / network.bandwidth + self.peers * network.latency

    def __str__(self) -> str:
        kind = str(self.dtype).removeprefix("torch.")
        names = "rank", "rows", "edges", "halo", "cut edges", "sent MB", "received MB", "us"
        columns = [
            *(self.rows, self.edges, self.halo, self.cut),
            *(x / 1e6 for x in (self.bytes_sent, self.bytes_received)),
            self.seconds * 1e6,
        ]
        ranks = list(range(len(self.rows)))
        if len(ranks) > MOST_LINES:
            slowest = self.seconds.argsort(descending=True, stable=True).tolist()
            ranks = sorted({*ranks[: MOST_LINES // 2], *slowest[: MOST_LINES // 2]})
        table = [names, *((f"{p}", *(_shown(x[p]) for x in columns)) for p in ranks)]
        most = [_shown(x.max()) for x in columns]
        total = [_shown(x.sum()) for x in columns[:-1]]
        table += [("most", *most), ("all", *total, "")]
        wide = [max(len(line[i]) for line in table) for i in range(len(names))]
        lines = ["  ".join(x.rjust(w) for x, w in zip(line, wide, strict=True)) for line in table]
        edges = int(self.edges.sum())
        share = int(self.cut.sum()) / edges if edges else 0.0
        return "\n".join(
            [
                *(line.rstrip() for line in lines),
                f"balance {self.balance:.3f} (most edges by their mean), {share:.1%} of the edges "
                f"cut, {len(self.rows)} ranks",
                f"An exchange of {self.width} channels of {kind}; times are those of a model of "
                f"{self.network}, not measured.",
            ]
        )


def report(
    graph: Graph,
    part: Tensor | tuple[Tensor, Tensor],
    *,
    parts: int | None = None,
    width: int = 128,
    dtype: torch.dtype = torch.float32,
    network: str = "infiniband-ndr",
) -> Report:
    """What each rank owns, reads and exchanges; ``print`` shows a table.

    Takes the memory of the largest rank beside the graph, which may lie in a file.

    Args:
        graph: The graph.
        part: As :func:`fastgt.distributed.partition` gives it.
        parts: How many ranks. Default: the largest of ``part``, plus one.
        width: Channels of a column that are exchanged: of k and v together, or of x.
        dtype: Of the channels.
        network: One of ``"nvlink4"``, ``"infiniband-ndr"``, ``"ethernet-100g"`` and
            ``"ethernet-10g"``.

    Raises:
        TypeError, ValueError: ``part`` does not fit, ``width`` is no positive int, ``dtype`` is no
            dtype, or there is no such network.

    Example:
        >>> import torch
        >>> from fastgt import Graph
        >>> from fastgt.distributed import report
        >>> graph = Graph.from_edge_index(torch.tensor([[1, 2, 3, 0], [0, 1, 2, 3]]))
        >>> found = report(graph, torch.tensor([0, 0, 1, 1]), width=4)
        >>> found.halo.tolist(), found.bytes_sent.tolist(), found.balance
        ([1, 1], [16, 16], 1.0)
    """
    row_part, col_part, count = check_part(graph, part, parts)
    width = size_of(width, "width")
    if width < 1:
        raise ValueError(f"width must be 1 channel or more, got {width}")
    if not isinstance(dtype, torch.dtype):
        raise TypeError(f"dtype must be a torch.dtype, got {type(dtype).__name__}")
    if network not in NETWORKS:
        raise ValueError(f"network must be one of {list(NETWORKS)}, got {network!r}")
    edges, halo, cut, sent = torch.zeros(4, count, dtype=torch.int64)
    peers: list[set[int]] = [set() for _ in range(count)]
    for rank, rows in enumerate(rows_by_rank(row_part, count)):
        slots = slots_of(graph.row_ptr, rows)
        edges[rank] = len(slots)
        reads = graph.col.index_select(0, slots).long()
        reads = reads[col_part.index_select(0, reads) != rank]
        cut[rank] = len(reads)
        owners = col_part.index_select(0, reads.unique())
        halo[rank] = len(owners)
        from_ranks = owners.bincount(minlength=count).cpu()
        sent += from_ranks
        for p in from_ranks.nonzero().flatten().tolist():
            peers[p].add(rank)
            peers[rank].add(p)
    met = torch.tensor([len(x) for x in peers])
    rows_of, cols_of = (x.bincount(minlength=count).cpu() for x in (row_part, col_part))
    return Report(rows_of, cols_of, edges, halo, sent, cut, met, width, dtype, network)


def rows_by_rank(row_part: Tensor, parts: int) -> Iterator[Tensor]:
    """The rows of each rank, ascending."""
    order = row_part.sort(stable=True).indices
    yield from order.split(row_part.bincount(minlength=parts).tolist())


def slots_of(row_ptr: Tensor, rows: Tensor) -> Tensor:
    """The slots of some rows in a row walk, row after row, ``[e]`` int64."""
    begin = row_ptr.index_select(0, rows).long()
    degree = row_ptr.index_select(0, rows + 1).long() - begin
    before = degree.cumsum(0)
    total = int(before[-1]) if len(rows) else 0
    shift = (begin - before + degree).repeat_interleave(degree, output_size=total)
    return torch.arange(total, device=rows.device) + shift


def _shown(x: Tensor) -> str:
    return f"{x:,.1f}" if x.is_floating_point() else f"{int(x):,}"
