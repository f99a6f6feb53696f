"""Graph: what is refused, in which words."""

import numpy as np
import pytest
import scipy.sparse as sp
import torch
from graph_cases import SIX

from fastgt import Graph

_NONE = torch.empty(2, 0, dtype=torch.int64)
_PTR = torch.tensor([0, 1, 2])
_GRAPH = Graph.from_edge_index(SIX, 6)
_META = _GRAPH.to("meta")
_BIPARTITE = Graph.from_edge_index(SIX, (6, 7))


def t(*values: int, dtype: torch.dtype = torch.int64) -> torch.Tensor:
    return torch.tensor(values, dtype=dtype)


def from_edges(edge_index: object, *args: object, **kwargs: object) -> Graph:
    return Graph.from_edge_index(edge_index, *args, **kwargs)  # type: ignore[arg-type]


REFUSALS = {
    # edge_index
    "list": (lambda: from_edges([[0], [1]], 2), TypeError, r"edge_index.*list"),
    "array": (lambda: from_edges(SIX.numpy(), 6), TypeError, r"edge_index.*ndarray"),
    "float": (lambda: from_edges(SIX.float(), 6), TypeError, r"edge_index.*float32"),
    "float, no edges": (lambda: from_edges(torch.empty(2, 0), 6), TypeError, r"edge_index.*float"),
    "bool": (lambda: from_edges(SIX.bool(), 6), TypeError, r"edge_index.*bool"),
    "complex": (lambda: from_edges(SIX.cfloat(), 6), TypeError, r"edge_index.*complex64"),
    "one dimension": (lambda: from_edges(t(0, 1), 6), ValueError, r"edge_index.*\[2, E\].*\[2\]"),
    "[E, 2]": (lambda: from_edges(SIX.t(), 6), ValueError, r"edge_index.*\[2, E\].*\[5, 2\]"),
    "too high": (lambda: from_edges(SIX, 5), ValueError, r"edge_index.*index 5 .* 5 nodes"),
    "negative": (lambda: from_edges(-SIX, 6), ValueError, r"edge_index.*index -5"),
    "all negative, counted": (lambda: from_edges(SIX - 9), ValueError, r"edge_index.*index -9"),
    "source": (lambda: from_edges(SIX, (6, 3)), ValueError, r"edge_index\[0\].*5 .* 3 columns"),
    "target": (lambda: from_edges(SIX, (3, 6)), ValueError, r"edge_index\[1\].*4 .* 3 rows"),
    "beyond int32": (
        lambda: from_edges(torch.tensor([[2**32], [0]]), 6),
        ValueError,
        r"edge_index.*index 4294967296 .* 6 nodes",
    ),
    "edges without nodes": (lambda: from_edges(SIX, 0), ValueError, r"index 5 .* 0 nodes"),
    "uint16": (lambda: from_edges(SIX.to(torch.uint16), 6), TypeError, r"edge_index.*uint16"),
    "sparse": (lambda: from_edges(SIX.to_sparse(), 6), TypeError, r"edge_index.*sparse"),
    # num_nodes
    "size True": (lambda: from_edges(SIX, True), TypeError, r"num_nodes.*bool"),
    "size 6.0": (lambda: from_edges(SIX, 6.0), TypeError, r"num_nodes.*float"),
    "size '6'": (lambda: from_edges(SIX, "6"), TypeError, r"num_nodes.*str"),
    "size -1": (lambda: from_edges(_NONE, -1), ValueError, r"num_nodes.*-1"),
    "size (6, -1)": (lambda: from_edges(_NONE, (6, -1)), ValueError, r"num_nodes.*-1"),
    "size (True, 6)": (lambda: from_edges(SIX, (True, 6)), TypeError, r"num_nodes.*bool"),
    "size (6,)": (lambda: from_edges(SIX, (6,)), ValueError, r"num_nodes.*1"),
    "size (6, 6, 6)": (lambda: from_edges(SIX, (6, 6, 6)), ValueError, r"num_nodes.*3"),
    "size (6, None)": (lambda: from_edges(SIX, (6, None)), TypeError, r"num_nodes.*None"),
    # graph_ptr
    "ptr list": (lambda: from_edges(SIX, 6, graph_ptr=[0, 6]), TypeError, r"graph_ptr.*list"),
    "ptr float": (
        lambda: from_edges(SIX, 6, graph_ptr=torch.tensor([0.0, 6])),
        TypeError,
        r"graph_ptr.*float",
    ),
    "ptr empty": (lambda: from_edges(SIX, 6, graph_ptr=t()), ValueError, r"graph_ptr.*\[0\]"),
    "ptr [1, 2]": (
        lambda: from_edges(SIX, 6, graph_ptr=t(0, 6)[None]),
        ValueError,
        r"graph_ptr.*\[1, 2\]",
    ),
    "ptr start": (lambda: from_edges(SIX, 6, graph_ptr=t(1, 6)), ValueError, r"graph_ptr.*0.*1"),
    "ptr end": (
        lambda: from_edges(SIX, 6, graph_ptr=t(0, 7)),
        ValueError,
        r"graph_ptr.* 7 .* 6 nodes",
    ),
    "ptr down": (
        lambda: from_edges(SIX, 6, graph_ptr=t(0, 5, 4, 6)),
        ValueError,
        r"graph_ptr.*5 to 4",
    ),
    "ptr down, uint8": (
        lambda: from_edges(SIX, 6, graph_ptr=t(0, 5, 4, 6, dtype=torch.uint8)),
        ValueError,
        r"graph_ptr.*5 to 4",
    ),
    "ptr device": (
        lambda: from_edges(SIX, 6, graph_ptr=t(0, 6).to("meta")),
        ValueError,
        r"graph_ptr.*meta.*edge_index.*cpu",
    ),
    "ptr bipartite": (
        lambda: from_edges(SIX, (6, 7), graph_ptr=t(0, 6)),
        ValueError,
        r"graph_ptr.*6 rows and 7 columns",
    ),
    "between graphs": (
        lambda: from_edges(SIX, 6, graph_ptr=t(0, 2, 6)),
        ValueError,
        r"edge_index.*edge 1 .*node 2 .*node 1",
    ),
    # from_csr
    "csr list": (lambda: Graph.from_csr([0, 1], t(0)), TypeError, r"row_ptr.*list"),
    "csr col list": (lambda: Graph.from_csr(t(0, 1), [0]), TypeError, r"col.*list"),
    "csr float": (lambda: Graph.from_csr(_PTR.float(), t(0, 1)), TypeError, r"row_ptr.*float32"),
    "csr col float": (lambda: Graph.from_csr(_PTR, _PTR[1:] / 2), TypeError, r"col.*float32"),
    "csr empty": (lambda: Graph.from_csr(t(), t()), ValueError, r"row_ptr.*\[N \+ 1\].*\[0\]"),
    "csr [1, 3]": (lambda: Graph.from_csr(_PTR[None], t(0, 1)), ValueError, r"row_ptr.*\[1, 3\]"),
    "csr col [1, 2]": (lambda: Graph.from_csr(_PTR, t(0, 1)[None]), ValueError, r"col.*\[1, 2\]"),
    "csr start": (lambda: Graph.from_csr(t(1, 2), t(0, 0)), ValueError, r"row_ptr.*0.*1"),
    "csr end": (lambda: Graph.from_csr(_PTR, t(0)), ValueError, r"row_ptr.* 2 .* 1 edges"),
    "csr down": (
        lambda: Graph.from_csr(t(0, 3, 1, 4), t(0, 1, 0, 1)),
        ValueError,
        r"row_ptr.*3 to 1",
    ),
    "csr down, uint8": (
        lambda: Graph.from_csr(t(0, 3, 1, 4, dtype=torch.uint8), t(0, 1, 0, 1)),
        ValueError,
        r"row_ptr.*3 to 1",
    ),
    "csr down, int8": (
        lambda: Graph.from_csr(t(0, 100, -100, 3, dtype=torch.int8), t(0, 1, 0)),
        ValueError,
        r"row_ptr.*100 to -100",
    ),
    "csr down, int64": (
        lambda: Graph.from_csr(t(0, 2**62 + 5, -(2**62) - 5, 3), t(0, 1, 0)),
        ValueError,
        r"row_ptr",
    ),
    "csr high": (lambda: Graph.from_csr(_PTR, t(0, 2)), ValueError, r"col.*2 .* 2 columns"),
    "csr low": (lambda: Graph.from_csr(_PTR, t(0, -1)), ValueError, r"col.*-1"),
    "csr num_cols": (lambda: Graph.from_csr(_PTR, t(0, 3), 3), ValueError, r"col.*3 .* 3 columns"),
    "csr num_cols -1": (lambda: Graph.from_csr(t(0), t(), -1), ValueError, r"num_cols.*-1"),
    "csr num_cols True": (
        lambda: Graph.from_csr(_PTR, t(0, 0), True),
        TypeError,
        r"num_cols.*bool",
    ),
    "csr device": (
        lambda: Graph.from_csr(_PTR.to("meta"), t(0, 1)),
        ValueError,
        r"row_ptr.*meta.*col.*cpu",
    ),
    # from_dense, from_scipy, from_pyg, batch
    "dense float": (lambda: Graph.from_dense(torch.zeros(3, 2)), TypeError, r"mask.*float32"),
    "dense array": (lambda: Graph.from_dense(np.eye(2) > 0), TypeError, r"mask.*ndarray"),
    "dense [3]": (lambda: Graph.from_dense(t(1, 0).bool()), ValueError, r"mask.*\[2\]"),
    "scipy array": (lambda: Graph.from_scipy(np.eye(3)), TypeError, r"matrix.*ndarray"),
    "scipy 1-d": (
        lambda: Graph.from_scipy(sp.coo_array(np.array([0, 1]))),
        ValueError,
        r"matrix.*\b2\b",
    ),
    "to an integer dtype": (lambda: _GRAPH.to(torch.int64), TypeError, r"dtype must .*int64"),
    "to two dtypes": (
        lambda: _GRAPH.to(torch.half, torch.half),
        TypeError,
        r"device must be .*torch.float16",
    ),
    "to a list": (lambda: _GRAPH.to(["cpu"]), TypeError, r"device must be .*\['cpu'\]"),
    "pyg none": (lambda: Graph.from_pyg(None), TypeError, r"data.*edge_index.*NoneType"),
    "batch of None": (lambda: Graph.batch([_GRAPH, None]), TypeError, r"graphs\[1\].*NoneType"),
    "batch devices": (
        lambda: Graph.batch([_GRAPH, _GRAPH.to("meta")]),
        ValueError,
        r"graphs\[0\].*cpu.*graphs\[1\].*meta",
    ),
    # derived
    "nodes": (lambda: _BIPARTITE.num_nodes, ValueError, r"num_nodes.*6 rows and 7 columns"),
    "loops": (_BIPARTITE.with_self_loops, ValueError, r"with_self_loops.*6 rows and 7 columns"),
    "order bipartite": (
        lambda: _BIPARTITE.reordered(torch.arange(6)),
        ValueError,
        r"reordered.*6 rows and 7 col",
    ),
    "order list": (lambda: _GRAPH.reordered([0]), TypeError, r"order.*list"),
    "order float": (lambda: _GRAPH.reordered(torch.zeros(6)), TypeError, r"order.*float32"),
    "order on meta": (
        lambda: _META.reordered(torch.arange(6, device="meta")),
        RuntimeError,
        r"meta device has no values to order: reorder it before",
    ),
    "rcm on meta": (lambda: _META.reordered("rcm"), RuntimeError, r"no values to order"),
    "from meta": (lambda: _META.to("cpu"), NotImplementedError, r"no values to copy to cpu: keep"),
    "edge_index on meta": (
        lambda: from_edges(SIX.to("meta")),
        RuntimeError,
        r"edge_index is on the meta device and holds no values, .* graph\.to\('meta'\)",
    ),
    "edge_index on meta, size": (
        lambda: from_edges(SIX.to("meta"), 6, graph_ptr=_PTR.to("meta")),
        RuntimeError,
        r"edge_index is on the meta device",
    ),
    "no edges on meta": (
        lambda: from_edges(_NONE.to("meta"), 6),
        RuntimeError,
        r"edge_index is on",
    ),
    "graph_ptr on meta": (
        lambda: from_edges(SIX, graph_ptr=_PTR.to("meta")),
        ValueError,
        r"graph_ptr is on meta, edge_index on cpu",
    ),
    "csr on meta": (
        lambda: Graph.from_csr(_PTR.to("meta"), t(0, 1).to("meta")),
        RuntimeError,
        r"col is on the meta device",
    ),
    "mask on meta": (
        lambda: Graph.from_dense(torch.ones(2, 2, dtype=torch.bool, device="meta")),
        RuntimeError,
        r"mask is on the meta device",
    ),
    "order short": (lambda: _GRAPH.reordered(torch.arange(5)), ValueError, r"order.*\[6\].*\[5\]"),
    "order twice": (
        lambda: _GRAPH.reordered(t(0, 0, 1, 2, 3, 4)),
        ValueError,
        r"order.*node 5 of 6",
    ),
    "order high": (
        lambda: _GRAPH.reordered(t(0, 6, 1, 2, 3, 4)),
        ValueError,
        r"order.*6 .* 6 nodes",
    ),
    "order low": (lambda: _GRAPH.reordered(t(0, -1, 1, 2, 3, 4)), ValueError, r"order.*-1"),
    "order device": (
        lambda: _GRAPH.reordered(torch.arange(6).to("meta")),
        ValueError,
        r"order.*meta.*cpu",
    ),
    "order between graphs": (
        lambda: Graph.batch([_GRAPH, _GRAPH]).reordered(torch.arange(12).roll(1)),
        ValueError,
        r"order.*node 11\b.*graph 1\b.*graph 0\b",
    ),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_refusals(name: str) -> None:
    refused, error, message = REFUSALS[name]
    with pytest.raises(error, match=message):
        refused()


def test_scipy_indices_out_of_range() -> None:
    # scipy checks when a matrix is made, not what is written into its arrays afterwards
    coo = sp.coo_array((np.ones(2), ([0, 1], [0, 1])), shape=(2, 2))
    coo.coords[1][1] = 7
    with pytest.raises(ValueError, match=r"matrix.*7.* 2 columns"):
        Graph.from_scipy(coo)
    coo.coords[1][1] = 0
    coo.coords[0][1] = -1
    with pytest.raises(ValueError, match=r"matrix.*-1"):
        Graph.from_scipy(coo)
