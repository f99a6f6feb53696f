"""Operators on ranks beside one process: what tests of fastgt.distributed draw and compare."""

import torch
from hypothesis import strategies as st

from fastgt import (
    AuxRequest,
    Graph,
    additive_attention,
    aggregate,
    channelwise_attention,
    gated_aggregate,
    global_attention,
    linear_attention,
    neighborhood_attention,
    segment_max,
    segment_mean,
    segment_softmax,
    segment_sum,
    sgformer_attention,
    virtual_node,
)
from fastgt.distributed import DistributedGraph, halo_exchange

H, D, C = 2, 3, 2

# by operator: what it takes of rows, columns and edges, and what is the same on all ranks
OPERATORS = {
    "attention": (
        neighborhood_attention,
        {"q": ("row", H, D), "k": ("column", H, D), "v": ("column", H, D)},
    ),
    "attention of every edge term": (
        neighborhood_attention,
        {
            "q": ("row", H, D),
            "k": ("column", 1, D),
            "v": ("column", 1, D),
            "edge_bias": ("edge", H),
            "edge_gate": ("edge", H, D),
            "edge_attr": ("edge", C),
            "edge_key_weight": ("all", C, H, D),
            "edge_value_weight": ("all", C, H, D),
        },
    ),
    "attention of edge vectors": (
        neighborhood_attention,
        {
            "q": ("row", H, D),
            "k": ("column", H, D),
            "v": ("column", H, D),
            "edge_key": ("edge", H, D),
            "edge_value": ("edge", H, D),
        },
    ),
    "additive attention": (
        additive_attention,
        {
            "q": ("row", H, D),
            "k": ("column", H, D),
            "v": ("column", H, D),
            "weight": ("all", H, D),
            "edge_bias": ("edge", H),
        },
    ),
    "channelwise attention": (
        channelwise_attention,
        {"logits": ("edge", H, D), "v": ("column", H, D), "edge_value": ("edge", H, D)},
    ),
    "aggregate": (aggregate, {"x": ("column", D), "edge_value": ("edge", D)}),
    "aggregate of low rank": (
        aggregate,
        {
            "x": ("column", D),
            "edge_weight": ("edge",),
            "edge_attr": ("edge", C),
            "edge_value_weight": ("all", C, D),
        },
    ),
    "gated aggregate": (
        gated_aggregate,
        {
            "x": ("column", D),
            "gate": ("edge", D),
            "gate_row": ("row", D),
            "gate_col": ("column", D),
        },
    ),
    "segment softmax": (segment_softmax, {"x": ("edge", D)}),
}
QKV = {"q": ("row", H, D), "k": ("row", H, D), "v": ("row", H, D + 1)}
# those that go over the graphs of a batch: what they take, and options of theirs
OVER_GRAPHS = {
    "linear attention": (linear_attention, QKV, {}),
    "linear attention of sums": (
        linear_attention,
        QKV,
        {"feature_map": "identity", "normalize": False},
    ),
    "linear attention of random features": (
        linear_attention,
        QKV,
        {"feature_map": "softmax", "projection": torch.linspace(-1, 1, 5 * D).view(5, D).double()},
    ),
    "linear attention with masked heads": (
        linear_attention,
        QKV,
        {"head_gate": torch.tensor([0.0, 0.5], dtype=torch.float64)},
    ),
    "sgformer attention": (sgformer_attention, QKV, {}),
    "sgformer attention of unit nodes": (sgformer_attention, QKV, {"norms": "node"}),
    "global attention": (global_attention, QKV, {"return_aux": AuxRequest(lse=True)}),
    "global attention of biased keys": (
        global_attention,
        QKV | {"bias": ("row", H)},
        {"return_aux": AuxRequest(lse=True), "scale": 0.7},
    ),
    "global attention with masked heads": (
        global_attention,
        QKV,
        {
            "head_gate": torch.tensor([0.5, 0.0], dtype=torch.float64),
            "return_aux": AuxRequest(lse=True),
        },
    ),
    "sum": (segment_sum, {"x": ("row", D)}, {}),
    "mean": (segment_mean, {"x": ("row", D)}, {}),
    "max": (segment_max, {"x": ("row", D)}, {}),
    "virtual node": (virtual_node, {"x": ("row", D), "state": ("graph", D)}, {}),
}
OPERATORS |= {name: case[:2] for name, case in OVER_GRAPHS.items()}
AUX = {
    neighborhood_attention: AuxRequest(lse=True, weights=True, edge_scores=True),
    additive_attention: AuxRequest(lse=True, weights=True),
    channelwise_attention: AuxRequest(lse=True),
    gated_aggregate: AuxRequest(edge_scores=True),
}


SHARED = "all", "graph"
RESULTS, GRADIENTS = 1, 2


@st.composite
def cut_graphs(draw, *, square=None):
    """A graph, square or not, one or a batch, hubs among them, and the owner of each node."""
    seed = draw(st.integers(0, 2**31))
    generator = torch.Generator().manual_seed(seed)
    parts = draw(st.integers(1, 4))
    rows = draw(st.integers(1, 12))
    edges = draw(st.integers(0, 40))
    square = draw(st.booleans()) if square is None else square
    # as many columns as rows would be the same nodes
    cols = rows if square else rows + draw(st.integers(1, 4))

    def below(n, size):
        return torch.randint(n, (size,), generator=generator)

    ends = torch.stack([below(cols, edges), below(rows, edges)])
    if draw(st.booleans()):
        ends[0, ::2] = 0  # a hub, which half of the edges read
    graph = Graph.from_edge_index(ends, (rows, cols))
    if draw(st.booleans()):
        # the middle graph has no edges
        graph = Graph.batch([graph, Graph.from_edge_index(ends[:, :0], (rows, cols)), graph])
    row_part = below(parts, graph.num_rows)
    # few nodes on many ranks leave some without rows
    if draw(st.booleans()):
        row_part = row_part.clamp(max=draw(st.integers(0, parts - 1)))
    col_part = row_part if square else below(parts, graph.num_cols)
    return graph, row_part, col_part, parts


def tensors_of(name, graph, seed):
    """The operator's tensors for the whole graph: name -> (kind, tensor)."""
    generator = torch.Generator().manual_seed(seed)
    sizes = {
        "row": graph.num_rows,
        "column": graph.num_cols,
        "edge": graph.num_edges,
        "graph": graph.num_graphs,
    }
    found = {}
    for key, (kind, *shape) in OPERATORS[name][1].items():
        lead = [sizes[kind]] if kind in sizes else []
        found[key] = kind, torch.randn(*lead, *shape, dtype=torch.float64, generator=generator)
    return found


def weights_of(results, seed):
    """What each of the whole graph's results is multiplied with for a loss."""
    generator = torch.Generator().manual_seed(seed + 1)
    return {
        key: (kind, torch.randn(x.shape, dtype=x.dtype, generator=generator))
        for key, (kind, x) in results.items()
    }


def results_of(name, graph, tensors, options):
    """The operator's results by name -> (kind, tensor)."""
    op = OPERATORS[name][0]
    if name in OVER_GRAPHS:
        out = op(**tensors, offsets=graph.graph_ptr, **OVER_GRAPHS[name][2], **options)
        if op is virtual_node:
            return {"y": ("row", out[0]), "pooled": ("graph", out[1])}
        if op is global_attention:
            return {"out": ("row", out[0]), "lse": ("row", out[1].lse)}
        return {"out": ("graph" if "x" in tensors else "row", out)}
    aux = {"return_aux": AUX[op]} if op in AUX else {}
    out = op(**tensors, graph=graph, **aux, **options)
    if op is segment_softmax:
        return {"out": ("edge", out)}
    if not aux:
        return {"out": ("row", out)}
    found = {"out": ("row", out[0])}
    for key, x in out[1]._asdict().items():
        if x is not None:
            found[key] = "row" if key == "lse" else "edge", x
    return found


def loss_of(results, weights):
    """A sum over all results that a gradient goes through; LSEs of empty rows are left out."""
    total = 0.0
    for key, (_, x) in results.items():
        if x.requires_grad:
            total = total + torch.where(x.isfinite(), x, 0.0).mul(weights[key]).sum()
    return total


def on_one_process(name, graph, seed, options):
    """-> results and gradients, each name -> (kind, tensor), and the weights of the loss."""
    kinds = {key: kind for key, (kind, _) in tensors_of(name, graph, seed).items()}
    leaves = {key: x.requires_grad_() for key, (_, x) in tensors_of(name, graph, seed).items()}
    results = results_of(name, graph, leaves, options)
    weights = weights_of(results, seed)
    loss = loss_of(results, {key: x for key, (_, x) in weights.items()})
    grads = torch.autograd.grad(loss, list(leaves.values()), materialize_grads=True)
    grads = dict(
        zip(leaves, ((kinds[k], g) for k, g in zip(leaves, grads, strict=True)), strict=True)
    )
    return {k: (kind, x.detach()) for k, (kind, x) in results.items()}, grads, weights


def on_a_rank(group, name, graph, part, seed, options, weights, overlap):
    """This rank's numbers of rows, columns and edges, its results and its gradients."""
    shard = DistributedGraph.from_graph(graph, part, group, overlap=overlap)
    tensors = tensors_of(name, graph, seed)
    leaves = {
        key: (x.clone() if kind in SHARED else shard.own(x, kind)).requires_grad_()
        for key, (kind, x) in tensors.items()
    }
    results = results_of(name, shard, leaves, options)
    # every rank has what graphs have, and a P-th of its loss
    shares = {
        key: x / shard.group.size if kind in SHARED else shard.own(x, kind)
        for key, (kind, x) in weights.items()
    }
    loss = loss_of(results, shares)
    grads = torch.autograd.grad(loss, list(leaves.values()), materialize_grads=True)
    numbers = {"row": shard.part.rows, "column": shard.part.cols, "edge": shard.part.edge}
    found = {key: x.detach() for key, (_, x) in results.items()}
    return numbers, found, dict(zip(leaves, grads, strict=True))


def together(answers, wanted, which):
    """The ranks' shares put together as ``wanted``, name -> (kind, tensor), has them.

    Gradients of what all ranks have are the sum of theirs; results of graphs are the same on all.
    """
    found = {}
    for key, (kind, like) in wanted.items():
        shares = [answer[which][key] for answer in answers]
        if kind in SHARED and which == GRADIENTS:
            found[key] = torch.stack(shares).sum(0)
        elif kind in SHARED:
            assert all(torch.equal(share, shares[0]) for share in shares)
            found[key] = shares[0]
        else:
            found[key] = torch.full_like(like, torch.nan)
            for answer, share in zip(answers, shares, strict=True):
                found[key][answer[0][kind]] = share
    return found


def assert_equal_to_one_process(answers, wanted, which):
    for key, whole in together(answers, wanted, which).items():
        torch.testing.assert_close(
            whole, wanted[key][1], rtol=1e-10, atol=1e-10, msg=lambda m, key=key: f"{key}: {m}"
        )


def exchanged(group, graph, part, x):
    """-> own columns, the halo, what was exchanged, and the gradient of a weighted sum of it."""
    shard = DistributedGraph.from_graph(graph, part, group)
    own = shard.own(x, "column").requires_grad_()
    found = halo_exchange(own, shard)
    weight = torch.arange(len(found), dtype=found.dtype)[:, None] + group.rank()
    (grad,) = torch.autograd.grad((found**2 * weight).sum(), own, create_graph=True)
    (second,) = torch.autograd.grad(grad.sum(), own)
    place = torch.cat([shard.part.cols, shard.part.halo])
    return place, found.detach(), grad.detach(), second, weight
