"""What users would otherwise run for neighbourhood attention.

Compositions of gathers and scatters make several tensors of size edges x heads x width, dense
attention has a mask of nodes x nodes. Every peer is prepared once for a graph, where masks and
sparse matrices are made, and then takes q ``[N_rows, H, D]``, k ``[N_cols, H, D]`` and v
``[N_cols, H, Dv]``. It raises ImportError where its package is absent, and NotImplementedError or
MemoryError where it cannot do this graph.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from fastgt import Graph

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
EdgeCall = Callable[[Tensor], Tensor]
DENSE_BYTES = 2**30  # of a mask


def gather_scatter(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    edge_index: Tensor,
    *,
    edge_bias: Tensor | None = None,
    logit_clamp: float | None = None,
) -> Tensor:
    """Plain PyTorch: gather q and k, softmax by scatter, gather v, ``index_add``."""
    source, target = edge_index
    logit = _logits(q, k, edge_index)  # [E, H]
    if logit_clamp is not None:
        logit = logit.clamp(-logit_clamp, logit_clamp)
    if edge_bias is not None:
        logit = logit + edge_bias
    index = target[:, None].expand_as(logit)
    top = logit.new_full(q.shape[:2], -torch.inf)
    top = top.scatter_reduce(0, index, logit.detach(), "amax")
    p = (logit - top[target]).exp()
    total = p.new_zeros(q.shape[:2]).index_add(0, target, p)
    weight = p / total[target]
    out = v.new_zeros(q.shape[0], *v.shape[1:])
    return out.index_add(0, target, weight[..., None] * v[source])


def composed(graph: Graph) -> Attend:
    """:func:`gather_scatter`."""
    return functools.partial(gather_scatter, edge_index=graph.edge_index)


def pyg(graph: Graph) -> Attend:
    """``torch_geometric``'s softmax and scatter, as ``TransformerConv`` composes them."""
    import torch_geometric  # noqa: F401  absent packages show before they are called

    return functools.partial(_pyg, edge_index=graph.edge_index)


def pyg_compiled(graph: Graph) -> Attend:
    """The same through ``torch.compile``, for graphs of any size."""
    import torch_geometric  # noqa: F401

    return functools.partial(_compiled_pyg(), edge_index=graph.edge_index)


def torch_scatter(graph: Graph) -> Attend:
    """``torch_scatter``'s softmax and sum."""
    softmax, scatter = softmaxes(graph)["torch-scatter"](), scatters(graph)["torch-scatter"]()
    edge_index = graph.edge_index

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return scatter(softmax(_logits(q, k, edge_index))[..., None] * v[edge_index[0]])

    return attend


def torch_sparse(graph: Graph) -> Attend:
    """``torch.sparse``: a sampled product, a softmax and a product for each head. The backward of
    the softmax makes a dense matrix.

    Raises:
        NotImplementedError: An edge stands there twice: sparse tensors add entries up.
        MemoryError: Of the backward: that matrix would take more than ``DENSE_BYTES``.
    """
    source, target = graph.edge_index
    if len((target * graph.num_cols + source).unique()) < graph.num_edges:
        raise NotImplementedError("an edge stands there twice: sparse tensors add up their logits")
    size = graph.num_rows, graph.num_cols
    # columns in order within each row: softmax takes them to be
    one = torch.ones(graph.num_edges, device=source.device)
    ordered = torch.sparse_coo_tensor(torch.stack([target, source]), one, size).to_sparse_csr()
    row_ptr, col = ordered.crow_indices(), ordered.col_indices()

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if q.requires_grad:
            _refuse_beyond(size[0] * size[1] * q.element_size())
        empty = torch.sparse_csr_tensor(row_ptr, col, q.new_zeros(len(col)), size)
        scale = 1 / math.sqrt(q.shape[-1])
        outs = []
        for h in range(q.shape[1]):
            logit = torch.sparse.sampled_addmm(empty, q[:, h], k[:, h].T, beta=0, alpha=scale)
            weight = torch.sparse.softmax(logit.to_sparse_coo(), 1)
            outs.append(torch.sparse.mm(weight, v[:, h]))
        return torch.stack(outs, 1)

    return attend


def sdpa(graph: Graph) -> Attend:
    """PyTorch's dense attention under a mask of all nodes."""
    mask = _in_any_dtype(_dense(graph)[None, None])  # PyTorch's fused kernels take no fewer
    alone = _alone(graph)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
        out = scaled_dot_product_attention(q, k, v, attn_mask=mask(q.dtype))
        return out[0].transpose(0, 1).masked_fill(alone, 0)

    return attend


def sdpa_by_graph(graph: Graph) -> Attend:
    """PyTorch's dense attention on the padded batch, under a mask for each graph.

    Raises:
        NotImplementedError: There is one graph, or it is bipartite.
        MemoryError: The masks would take more than ``DENSE_BYTES``.
    """
    if graph.num_graphs < 2 or graph.num_rows != graph.num_cols:
        raise NotImplementedError("it is not a batch of graphs")
    offsets = graph.graph_ptr.long()
    most = int(offsets.diff().max())
    _refuse_beyond(graph.num_graphs * most**2 * 4)
    device = offsets.device
    number = torch.arange(graph.num_graphs, device=device).repeat_interleave(offsets.diff())
    place = torch.arange(graph.num_rows, device=device) - offsets[number]  # within its graph
    source, target = graph.edge_index
    count = torch.zeros(graph.num_graphs, most, most, device=device)
    one = torch.ones((), device=device)
    where = number[target], place[target], place[source]
    mask = count.index_put_(where, one, accumulate=True).log_()
    nothing = (mask == -torch.inf).all(-1, keepdim=True)
    mask = _in_any_dtype(mask.masked_fill(nothing, 0)[:, None])
    alone = _alone(graph)

    def padded(x: Tensor) -> Tensor:
        dense = x.new_zeros(graph.num_graphs, most, *x.shape[1:])
        return dense.index_put((number, place), x).transpose(1, 2)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = scaled_dot_product_attention(*map(padded, (q, k, v)), attn_mask=mask(q.dtype))
        return out.transpose(1, 2)[number, place].masked_fill(alone, 0)

    return attend


def flex(graph: Graph) -> Attend:
    """PyTorch's FlexAttention with a BlockMask of the edges; on a CPU it has no backward."""
    mask = _dense(graph)
    alone = _alone(graph)
    edge = mask > -torch.inf
    from torch.nn.attention.flex_attention import create_block_mask

    blocks = create_block_mask(
        lambda b, h, i, j: edge[i, j],
        None,
        None,
        graph.num_rows,
        graph.num_cols,
        device=edge.device,
    )
    repeated = bool((mask > 0).any())
    how_often = lambda s, b, h, i, j: s + mask[i, j]  # noqa: E731  a score_mod is written so

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if q.device.type == "cpu" and q.requires_grad:
            # its own refusal leaves the compiled forward unused from then on
            raise NotImplementedError("FlexAttention has no backward on a CPU")
        q, k, v = (x.transpose(0, 1)[None].contiguous() for x in (q, k, v))
        score_mod = how_often if repeated else None
        out = _compiled_flex(repeated)(q, k, v, score_mod=score_mod, block_mask=blocks)
        return out[0].transpose(0, 1).masked_fill(alone, 0)

    return attend


ATTENTION: dict[str, Callable[[Graph], Attend]] = {
    "pyg": pyg,
    "pyg, compiled": pyg_compiled,
    "torch-scatter": torch_scatter,
    "gather-scatter": composed,
    "torch.sparse": torch_sparse,
    "sdpa, dense mask": sdpa,
    "sdpa, by graph": sdpa_by_graph,
    "flex attention": flex,
}


def scatters(graph: Graph) -> dict[str, Callable[[], EdgeCall]]:
    """Packages' sums of edge tensors [E, ...] over the edges of each node."""
    target, size = graph.edge_index[1], graph.num_rows

    def pyg() -> EdgeCall:
        from torch_geometric.utils import scatter

        return lambda x: scatter(x, target, dim=0, dim_size=size)

    def torch_scatter() -> EdgeCall:
        from torch_scatter import scatter_add

        return lambda x: scatter_add(x, target, dim=0, dim_size=size)

    return {"pyg": pyg, "torch-scatter": torch_scatter}


def softmaxes(graph: Graph) -> dict[str, Callable[[], EdgeCall]]:
    """Packages' softmaxes of edge tensors [E, ...] over the edges of each node."""
    target, size = graph.edge_index[1], graph.num_rows

    def pyg() -> EdgeCall:
        from torch_geometric.utils import softmax

        return lambda x: softmax(x, target, num_nodes=size)

    def torch_scatter() -> EdgeCall:
        from torch_scatter import scatter_softmax

        return lambda x: scatter_softmax(x, target, dim=0, dim_size=size)

    return {"pyg": pyg, "torch-scatter": torch_scatter}


def _pyg(q: Tensor, k: Tensor, v: Tensor, edge_index: Tensor) -> Tensor:
    from torch_geometric.utils import scatter, softmax

    source, target = edge_index
    weight = softmax(_logits(q, k, edge_index), target, num_nodes=q.shape[0])
    return scatter(weight[..., None] * v[source], target, dim=0, dim_size=q.shape[0])


@functools.cache
def _compiled_pyg() -> Callable[..., Tensor]:
    # fullgraph: an error, and not eager code, where there are too many to compile
    return torch.compile(_pyg, dynamic=True, fullgraph=True)


@functools.cache
def _compiled_flex(score_mod: bool) -> Callable[..., Tensor]:
    """For graphs of any size; with a score_mod PyTorch 2.13 compiles that for one size alone."""
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=not score_mod, fullgraph=True)


def _logits(q: Tensor, k: Tensor, edge_index: Tensor) -> Tensor:
    source, target = edge_index
    return (q[target] * k[source]).sum(-1) / math.sqrt(q.shape[-1])


def _dense(graph: Graph) -> Tensor:
    """[N_rows, N_cols] to be added to logits: an edge that stands there twice counts so. Rows
    without edges attend to everything, for a softmax over nothing is NaN."""
    _refuse_beyond(graph.num_rows * graph.num_cols * 4)
    source, target = graph.edge_index
    count = torch.zeros(graph.num_rows, graph.num_cols, device=source.device)
    one = torch.ones((), device=source.device)
    mask = count.index_put_((target, source), one, accumulate=True).log_()
    return mask.masked_fill(_alone(graph)[:, 0], 0)


def _in_any_dtype(mask: Tensor) -> Callable[[torch.dtype], Tensor]:
    """The mask as queries are, converted once."""
    return functools.cache(mask.to)


def _refuse_beyond(size: int) -> None:
    if size > DENSE_BYTES:
        raise MemoryError(f"a dense matrix of nodes by nodes would take {size / 1e9:.1f} GB")


def _alone(graph: Graph) -> Tensor:
    """Rows without an edge, [N_rows, 1, 1]."""
    return (graph.row_degree == 0)[:, None, None]
