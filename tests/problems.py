"""What a law needs of an operator: its random problems, its results, and what these must equal.

A problem is a graph with tensors by name: inputs, and upstream gradients, whose names are those of
the outputs after a "d". Each tensor has an entry for every row, every column or every edge of the
graph, or for none of these. That is all that is needed to renumber its nodes, to reorder its edges,
to take some of them or to put several problems into one batch.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Self

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis.strategies import SearchStrategy
from torch import Tensor

from fastgt import Graph
from fastgt.testing import with_buckets

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
PLANS = ("gather", "buckets", "windows 16", "windows 32", "windows 64", "graphs 64")
Over = Literal["rows", "cols", "edges", "none"]
Results = dict[str, Tensor]


def planned(graph: Graph, plan: str) -> Graph:
    """The graph with one of PLANS; "buckets" gathers with segments of a few edges."""
    path, _, height = plan.partition(" ")
    if path == "buckets":
        return with_buckets(graph, few=4, segment=5)
    if path == "gather":
        return graph
    try:
        return graph.plan(path, height=int(height))
    except ValueError:  # an edge stands there twice
        return graph.plan("windows", height=int(height))


@dataclass(repr=False)
class GraphProblem:
    """A graph and, in subclasses, tensors and options of an operator on it."""

    seed: int
    edge_index: Tensor
    graph: Graph
    made_by: str = field(default="", kw_only=True)
    plan: str = field(default="gather", kw_only=True)

    def tensors(self) -> dict[str, Tensor]:
        """Inputs and upstream gradients by name, those that there are."""
        raise NotImplementedError

    def having(self, **tensors: Tensor) -> Self:
        """The same problem with other tensors, by the names of ``tensors()``."""
        raise NotImplementedError

    def over(self, name: str) -> Over:
        """What a tensor, a result or a gradient has an entry for."""
        raise NotImplementedError

    def __repr__(self) -> str:
        return self.made_by

    @property
    def generator(self) -> torch.Generator:
        return torch.Generator().manual_seed(self.seed + 1)

    @property
    def source(self) -> Tensor:
        return self.edge_index[0]

    @property
    def target(self) -> Tensor:
        return self.edge_index[1]

    @property
    def sizes(self) -> dict[Over, int]:
        graph = self.graph
        return {"rows": graph.num_rows, "cols": graph.num_cols, "edges": graph.num_edges}

    def isolated(self) -> Tensor:
        """[N_rows], which rows have no edge."""
        return torch.bincount(self.target, minlength=self.graph.num_rows) == 0

    def unused(self) -> Tensor:
        """[N_cols], which columns have no edge."""
        return torch.bincount(self.source, minlength=self.graph.num_cols) == 0

    def onto(self, edge_index: Tensor, **changes: Any) -> Self:
        """The same rows and columns joined by other edges, planned likewise."""
        size = self.graph.num_rows, self.graph.num_cols
        graph = planned(Graph.from_edge_index(edge_index, size), self.plan)
        return replace(self, edge_index=edge_index, graph=graph, **changes)

    def taking(self, edges: Tensor) -> Self:
        """The same problem with some of its edges, or with its edges in another order."""
        parts = {n: t[edges] for n, t in self.tensors().items() if self.over(n) == "edges"}
        return self.onto(self.edge_index[:, edges]).having(**parts)

    def renumbered(self, order: Tensor) -> Self:
        """The same problem whose node i is what node order[i] was; the graph is square."""
        moved = {n: t[order] for n, t in self.tensors().items() if self.over(n) in ("rows", "cols")}
        return self.onto(torch.argsort(order)[self.edge_index]).having(**moved)

    def leaves(self, names: set[str] | None = None) -> tuple[Self, dict[str, Tensor]]:
        """-> the problem on detached inputs, and these by name; ``names``: of those that require
        a gradient (None: all)."""
        inputs = {
            name: t.detach().requires_grad_(names is None or name in names)
            for name, t in self.tensors().items()
            if not name.startswith("d")
        }
        return self.having(**inputs), inputs


def joined(parts: list[GraphProblem]) -> GraphProblem:
    """One problem on the batch of all graphs, with the options of the first."""
    tensors = [part.tensors() for part in parts]
    whole = {name: torch.cat([t[name] for t in tensors]) for name in tensors[0]}
    index = [part.edge_index for part in parts]
    graph = Graph.batch([part.graph for part in parts])
    return replace(parts[0], edge_index=torch.cat(index, 1), graph=graph).having(**whole)


@dataclass(frozen=True)
class OpUnderTest:
    """An operator, as laws see it.

    Attributes:
        name: Of the operator.
        implementations: Those that drawn problems are for.
        cases: ``cases(impl, **fixed)``: random problems, small where the implementation is slow.
        draws: ``draws(count, impl)``: how many problems are drawn for a law that asks for
            ``count``.
        results: ``results(problem, impl)``: its outputs by name, connected to the inputs.
        evaluate: ``evaluate(problem, impl, dtype=None)``: its outputs and gradients by name, in
            another dtype where one is given.
        oracle: ``oracle(problem)``: the same in float64, by loops.
        logit: Name of the input that is added to the logits, one number to each.
        tolerance: Relative and absolute, of float64 results against the oracle's.
    """

    name: str
    implementations: list[str]
    cases: Callable[..., SearchStrategy]
    draws: Callable[[int, str], int]
    results: Callable[..., Results]
    evaluate: Callable[..., Results]
    oracle: Callable[[Any], Results]
    logit: str = ""
    tolerance: float = 1e-9

    def check(self, law: Callable, count: int, impl: str, **fixed: Any) -> None:
        """``law(op, impl, problem)`` holds for drawn problems, in which ``fixed`` is not drawn."""

        @settings(
            max_examples=self.draws(count, impl),
            suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
        )
        @given(case=self.cases(impl, **fixed))
        def run(case):
            law(self, impl, case)

        run()

    def obeys(
        self, law: Callable, count: int, impls: list[str] | None = None, **fixed: Any
    ) -> Callable:
        """The test that a law holds for drawn problems, in these implementations or all."""

        def test(impl):
            self.check(law, count, impl, **fixed)

        test.__name__, test.__doc__ = law.__name__, law.__doc__
        return pytest.mark.parametrize("impl", impls or self.implementations)(test)

    def examples(self, count: int, impls: list[str] | None = None, **fixed: Any) -> Callable:
        """Decorates a test of (impl, problem) that only this operator has."""

        def wrap(test: Callable[[str, Any], None]) -> Callable:
            def law(op: OpUnderTest, impl: str, problem: Any) -> None:
                test(impl, problem)

            law.__name__, law.__doc__ = test.__name__, test.__doc__
            return self.obeys(law, count, impls, **fixed)

        return wrap
