"""What operators know of a graph that lies on several ranks: that it runs them itself.

:class:`fastgt.distributed.DistributedGraph` is one. An operator that gets one hands over its
arguments and says which of them belong to rows, to columns and to edges.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, NoReturn

from torch import Tensor


class Roles(NamedTuple):
    """Which arguments of an operator are tensors of rows, of columns and of edges.

    Arguments of no role are the same on every rank. ``of_edges``: the result is of edges, else of
    rows.
    """

    rows: tuple[str, ...] = ()
    columns: tuple[str, ...] = ()
    edges: tuple[str, ...] = ()
    of_edges: bool = False


class NotOnRanks(AttributeError, TypeError):
    """What needs a whole graph got a rank's share of one."""


class Shard(ABC):
    """One rank's share of a graph: rows that the rank owns, with all their edges."""

    @abstractmethod
    def run(self, op: Callable[..., Any], roles: Roles, arguments: Mapping[str, Any]) -> Any:
        """The operator's result for the rank's rows, with columns of other ranks fetched."""

    def sending(self, x: Tensor, project: Callable[[Tensor], Sequence[Tensor]]) -> Shard:
        """The same share for one call of an operator whose tensors of columns are ``project(x)``:
        what other ranks fetch is x, ``[m, ...]``, and they project it themselves.

        The fewer bytes x has beside what is made of it, the fewer are sent. ``project`` gives the
        operator's different tensors of columns in the order of its arguments, row by row.
        """
        return self

    def __getattr__(self, name: str) -> NoReturn:
        raise NotOnRanks(
            f"a {type(self).__name__} has no {name!r}: what needs it does not run on a graph that "
            "lies on several ranks"
        )
