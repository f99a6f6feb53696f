"""What parts of one partition have in common, and what is wrong with those that have not."""

from __future__ import annotations

import torch
from torch import Tensor

from fastgt.distributed.agreement import described
from fastgt.distributed.group import Group
from fastgt.distributed.part import Part


def identity(part: Part) -> dict[str, str]:
    """What every rank's part says alike."""
    whole = part.whole
    sizes = {"parts": part.parts, "rows": whole.rows, "cols": whole.cols, "edges": whole.edges}
    told = {name: repr(x) for name, x in sizes.items()}
    graphs = described(whole.graph_ptr, rows=False), described(whole.col_graph_ptr, rows=False)
    return told | {"square": repr(whole.square), "graph_ptr": graphs[0], "col_graph_ptr": graphs[1]}


def misfit(part: object, group: Group) -> Exception | None:
    """What is wrong with a part, of which each rank knows by itself."""
    if not isinstance(part, Part):
        return TypeError(f"part must be a Part, got {type(part).__name__}")
    if group.size != part.parts:
        return ValueError(
            f"the group has {group.size} ranks but the partition has {part.parts} parts"
        )
    if group.rank != part.rank:
        return ValueError(f"part {part.rank} was given to rank {group.rank} of the group")
    return None


def check_whole(part: Part, sizes: Tensor) -> None:
    """The ranks' parts together are the whole graph: what all ranks find alike.

    Args:
        sizes: ``[P, 2 or more]``: rows and edges of each rank.

    Raises:
        RuntimeError: They have more or less than it.
    """
    for i, (kind, total) in enumerate((("rows", part.whole.rows), ("edges", part.whole.edges))):
        if (found := int(sizes[:, i].sum())) != total:
            raise RuntimeError(
                f"the ranks have {found} {kind} together but the whole graph has {total}: their "
                "parts are of different partitions"
            )


def not_owned(part: Part, numbers: Tensor, places: Tensor) -> Exception | None:
    """What is wrong where other ranks ask for columns that this one does not have.

    Args:
        numbers: Of the columns, in the whole graph.
        places: Where each would stand among the rank's own.
    """
    columns = torch.cat([part.cols, part.cols.new_tensor([-1])])  # no column is -1
    strange = numbers[columns.index_select(0, places) != numbers]
    if not len(strange):
        return None
    return ValueError(
        f"rank {part.rank} is asked for column {int(strange[0])}, which it does not own: ranks "
        "have parts of different partitions"
    )
