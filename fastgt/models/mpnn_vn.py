"""MPNN + VN: message passing with a virtual node for every graph (arXiv 2301.11956).

    y_i  = x_i + s_g
    x_i' = y_i + dropout(relu(MPNN(y, e)_i))                   GCN or GINE
    x_i' = y_i + dropout(relu(norm(GatedGCN(y, e)_i)))         which updates e, too
    s_g' = dropout(MLP(s_g + sum_i x_i'))       before all layers but the first, s_g = 0 before it

MLP is twice Linear, batch norm and ReLU. As in the authors' code, the sum is over what the layer
gives; :class:`fastgt.nn.VirtualNode` sums over y, as OGB's code does. The virtual node may instead
be a node among others, that all nodes of its graph have edges to and from: see
:func:`add_virtual_nodes`.

A virtual node makes a layer of linear attention where it sums ``[phi(k_j) v_j^T, phi(k_j)]`` and
nodes take the quotient (section 4 of the paper).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from fastgt.graph import Graph
from fastgt.models.graph_gps_config import check_inputs, check_together
from fastgt.models.graph_gps_encoders import (
    Head,
    KernelEncoder,
    LaplacianEncoder,
    Pooling,
    Readout,
    check_matrix,
    check_unused,
    make_encoder,
)
from fastgt.models.graph_gps_local import GCN, GINE, WITH_EDGES, GatedGCN
from fastgt.nn.sublayers import check_rows, reset_sublayers
from fastgt.ops.checks import check_graph, check_square, integer
from fastgt.ops.segment_pool import of_nodes, segment_sum

VNLocal = Literal["gcn", "gine", "gatedgcn"]
_SIZES = ("out_dim", "dim", "layers", "head_layers", "lap_layers")
_COUNTS = ("node_features", "edge_features", "walk_steps", "walk_dim", "lap_pe", "lap_dim")


@dataclass
class MPNNVirtualNodeConfig:
    """Settings of :class:`MPNNVirtualNode`; defaults are the authors' for ZINC.

    Attributes:
        out_dim: Numbers to predict.
        node_types, node_features, edge_types, edge_features: As of :class:`GraphGPSConfig`.
        dim: Width of nodes, edges and virtual nodes.
        layers: So many times.
        local: ``"gcn"``, ``"gine"`` or ``"gatedgcn"``. The first uses no edge features, and takes
            none.
        virtual_node: Whether graphs have a virtual node with a state of its own. False: they have
            none, or one among their nodes.
        virtual_residual: Whether s_g is added to its new state.
        dropout: Of messages, and of the states of virtual nodes.
        walk_steps, walk_dim, lap_pe, lap_dim, lap_layers: As of :class:`GraphGPSConfig`.
        head, head_layers, pooling: As of :class:`GraphGPSConfig`.
        last_edges: Whether the last GatedGCN has a norm of edges, which nothing uses, as in the
            authors' code and parameter counts.
    """

    out_dim: int = 1
    node_types: int | Sequence[int] = (28,)
    node_features: int = 0
    edge_types: int | Sequence[int] = (4,)
    edge_features: int = 0
    dim: int = 166
    layers: int = 8
    local: VNLocal = "gine"
    virtual_node: bool = True
    virtual_residual: bool = False
    dropout: float = 0.0
    walk_steps: int = 0
    walk_dim: int = 0
    lap_pe: int = 0
    lap_dim: int = 0
    lap_layers: int = 2
    head: Head = "default"
    head_layers: int = 3
    pooling: Pooling = "add"
    last_edges: bool = True

    def __post_init__(self) -> None:
        for name in _SIZES:
            setattr(self, name, integer(name, getattr(self, name), 1))
        for name in _COUNTS:
            setattr(self, name, integer(name, getattr(self, name), 0))
        check_inputs(self)
        if self.local not in ("gcn", "gine", "gatedgcn"):
            raise ValueError(f"local must be 'gcn', 'gine' or 'gatedgcn', got {self.local!r}")
        if self.local == "gcn" and (self.edge_types or self.edge_features):
            raise ValueError(
                "edge_types must be () and edge_features 0 with local='gcn', which uses no edges, "
                f"got {self.edge_types} and {self.edge_features}"
            )
        check_together(self, "walk_steps", "walk_dim")
        check_together(self, "lap_pe", "lap_dim")
        if self.walk_dim + self.lap_dim >= self.dim:
            found = f"{self.walk_dim} + {self.lap_dim}"
            raise ValueError(f"walk_dim + lap_dim must be below dim={self.dim}, got {found}")
        if self.virtual_residual and not self.virtual_node:
            raise ValueError("virtual_residual must be False with virtual_node=False")

    @staticmethod
    def published(name: str) -> MPNNVirtualNodeConfig:
        """The authors' model of that name.

        Args:
            name: ``"zinc"``, whose virtual nodes have states; or ``"peptides_func"``,
                ``"peptides_struct"`` and ``"voc"``, for graphs of :func:`add_virtual_nodes`, of
                which encodings are computed as well.

        Raises:
            ValueError: There is no such name.

        Source:
            Cai et al., arXiv 2301.11956, table 2, and their code's configurations.
        """
        if name not in _PUBLISHED:
            raise ValueError(f"name must be one of {list(_PUBLISHED)}, got {name!r}")
        return replace(_PUBLISHED[name])


_PEPTIDES = MPNNVirtualNodeConfig(
    out_dim=10,
    node_types=(119, 4, 12, 12, 10, 6, 6, 2, 2),
    edge_types=(5, 6, 2),
    dim=138,
    layers=5,
    local="gatedgcn",
    virtual_node=False,
    walk_steps=16,
    walk_dim=20,
    head_layers=1,
    pooling="mean",
)
_PUBLISHED = {
    "zinc": MPNNVirtualNodeConfig(),
    "peptides_func": _PEPTIDES,
    "peptides_struct": replace(_PEPTIDES, out_dim=11),
    "voc": MPNNVirtualNodeConfig(
        out_dim=21,
        node_types=(),
        node_features=14,
        edge_types=(),
        edge_features=2,
        dim=108,
        local="gatedgcn",
        virtual_node=False,
        lap_pe=10,
        lap_dim=16,
        head="inductive_node",
    ),
}


class WithVirtualNodes(NamedTuple):
    """Graphs that have their virtual node among their nodes, the last of each.

    Attributes:
        node: ``[N + G, ...]``, 0 for virtual nodes.
        edge: ``[E + 2 N, ...]``, 0 for the new edges; None where there are none.
        graph: Edges E to E + N - 1 are those from nodes to their virtual nodes, the others back.
        is_virtual: ``[N + G]`` bool.
    """

    node: Tensor
    edge: Tensor | None
    graph: Graph
    is_virtual: Tensor


def add_virtual_nodes(node: Tensor, edge: Tensor | None, graph: Graph) -> WithVirtualNodes:
    """Every graph of a batch with one more node, that all others have edges to and from.

    Source:
        ``torch_geometric.transforms.VirtualNode``, as Cai et al. use it.

    Example:
        >>> import torch
        >>> from fastgt import Graph
        >>> from fastgt.models.mpnn_vn import add_virtual_nodes
        >>> two = Graph.from_edge_index(torch.tensor([[0], [1]]), graph_ptr=torch.tensor([0, 2, 3]))
        >>> found = add_virtual_nodes(torch.tensor([7, 8, 9]), torch.tensor([5]), two)
        >>> found.node.tolist(), found.edge.tolist()
        ([7, 8, 0, 9, 0], [5, 0, 0, 0, 0, 0, 0])
        >>> found.graph.edge_index.tolist()
        [[0, 0, 1, 3, 2, 2, 4], [1, 2, 2, 4, 0, 1, 3]]
    """
    n, g, device = check_square(graph), graph.num_graphs, graph.device
    for name, x, size, letter in (("node", node, n, "N"), ("edge", edge, graph.num_edges, "E")):
        if x is not None and x.shape[:1] != (size,):
            raise ValueError(f"{name} must be [{letter}, ...] = [{size}, ...], got {list(x.shape)}")
    number = torch.arange(g, device=device)
    ptr = graph.graph_ptr.long()
    owner = number.repeat_interleave(ptr.diff(), output_size=n)
    place = torch.arange(n, device=device) + owner
    virtual = ptr[1:] + number
    new_node = node.new_zeros(n + g, *node.shape[1:])
    new_node[place] = node
    is_virtual = torch.zeros(n + g, dtype=torch.bool, device=device)
    is_virtual[virtual] = True
    there = torch.stack([place, virtual[owner]])
    edge_index = torch.cat([place[graph.edge_index], there, there.flip(0)], 1)
    graph_ptr = ptr + torch.arange(g + 1, device=device)
    if edge is not None:
        edge = torch.cat([edge, edge.new_zeros(2 * n, *edge.shape[1:])])
    return WithVirtualNodes(
        new_node, edge, Graph.from_edge_index(edge_index, graph_ptr=graph_ptr), is_virtual
    )


class MPNNVirtualNodeLayer(nn.Module):
    """Virtual nodes are read, messages passed, and virtual nodes written.

    Args:
        dim, local, dropout: As of :class:`MPNNVirtualNodeConfig`.
        virtual_node: Whether there is a state to read.
        virtual_update: Whether there is a next one to write.
        virtual_residual: Whether the state is added to the next one.
        edge_output: Whether GatedGCN has what updates edges.

    Example:
        >>> import torch
        >>> from fastgt import Graph
        >>> from fastgt.models.mpnn_vn import MPNNVirtualNodeLayer
        >>> graph = Graph.batch([Graph.from_edge_index(torch.tensor([[0, 1], [1, 0]]))] * 2)
        >>> x, e, state = torch.randn(4, 64), torch.randn(4, 64), torch.zeros(2, 64)
        >>> [y.shape for y in MPNNVirtualNodeLayer(64)(x, e, graph, state)]
        [torch.Size([4, 64]), torch.Size([4, 64]), torch.Size([2, 64])]
    """

    def __init__(
        self,
        dim: int,
        *,
        local: VNLocal = "gine",
        dropout: float = 0.0,
        virtual_node: bool = True,
        virtual_update: bool = True,
        virtual_residual: bool = False,
        edge_output: bool = True,
    ):
        super().__init__()
        dim = integer("dim", dim, 1)
        self.virtual_node, self.virtual_residual = virtual_node, virtual_residual
        self.dim, self.edge_output = dim, edge_output
        self.local: GCN | GINE | GatedGCN
        if local == "gatedgcn":
            self.local = GatedGCN(dim, activation="relu", dropout=dropout, edge_output=edge_output)
        else:
            self.local = GCN(dim) if local == "gcn" else GINE(dim, activation="relu")
        self.dropout = nn.Dropout(dropout)
        self.update: nn.Sequential | None = None
        if virtual_node and virtual_update:
            parts: list[nn.Module] = []
            for _ in range(2):
                parts += [nn.Linear(dim, dim), nn.BatchNorm1d(dim), nn.ReLU()]
            self.update = nn.Sequential(*parts, nn.Dropout(dropout))

    def reset_parameters(self) -> None:
        """Draw every parameter anew."""
        reset_sublayers(self)

    def forward(
        self,
        x: Tensor,
        e: Tensor | None,
        graph: Graph,
        state: Tensor | None = None,
        *,
        edge_output: bool | None = None,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """x ``[N, dim]``, e ``[E, dim]``, state ``[G, dim]`` -> the same, after the layer.

        The state comes out as it came where no next one is written.
        """
        check_graph(graph)
        offsets = graph.graph_ptr
        if (state is None) == self.virtual_node:
            wanted = "a tensor" if self.virtual_node else "None"
            raise ValueError(f"state must be {wanted} with virtual_node={self.virtual_node}")
        dim, n, g = self.dim, graph.num_rows, graph.num_graphs
        check_matrix("x", x, "N, dim", (n, dim))
        if not isinstance(self.local, GCN):
            check_matrix("e", e, "E, dim", (graph.num_edges, dim))
        elif e is not None:
            raise ValueError("e must be None: local='gcn' uses no edges")
        if state is not None:
            check_matrix("state", state, "G, dim", (g, dim))
            x = x + of_nodes(state, offsets, n, None)
        if isinstance(self.local, GatedGCN):
            assert e is not None
            output = self.edge_output if edge_output is None else edge_output
            x, e = self.local(x, graph, e, edge_output=output)
        else:
            given = (x, graph) if isinstance(self.local, GCN) else (x, graph, e)
            x = x + self.dropout(self.local(*given).relu())
        if state is not None and self.update is not None:
            pooled = segment_sum(x, offsets) + state
            check_rows(self.update, pooled, "update of MPNNVirtualNodeLayer", "graph")
            new = self.update(pooled)
            state = state + new if self.virtual_residual else new
        return x, e, state


class MPNNVirtualNode(nn.Module):
    """Numbers for every graph of a batch, or for every node.

    In training a batch has two graphs at least, for the batch norms of virtual nodes. With
    ``last_edges=False`` every parameter gets a gradient, as suits ``DistributedDataParallel``.

    Source:
        Cai et al., On the Connection Between MPNN and Graph Transformer, arXiv 2301.11956.

    Example:
        >>> import torch
        >>> from fastgt import Graph
        >>> from fastgt.models import MPNNVirtualNode, MPNNVirtualNodeConfig
        >>> model = MPNNVirtualNode(MPNNVirtualNodeConfig.published("zinc")).eval()
        >>> graph = Graph.from_edge_index(torch.tensor([[0, 1, 2], [1, 2, 0]]))
        >>> model(torch.tensor([0, 27, 1]), torch.tensor([1, 3, 2]), graph).shape
        torch.Size([1, 1])
    """

    def __init__(self, config: MPNNVirtualNodeConfig):
        super().__init__()
        c = self.config = config
        width = c.dim - c.walk_dim - c.lap_dim
        self.embed = make_encoder(c.node_types, c.node_features, width)
        self.embed_lap = LaplacianEncoder(c.lap_pe, c.lap_dim, c.lap_layers) if c.lap_pe else None
        self.embed_walk = (
            KernelEncoder("walk_pe", c.walk_steps, c.walk_dim) if c.walk_steps else None
        )
        self.embed_edge: nn.Module | None = None
        if c.local in WITH_EDGES:
            self.embed_edge = make_encoder(c.edge_types, c.edge_features, c.dim)
        self.start = nn.Parameter(torch.zeros(1, c.dim)) if c.virtual_node else None
        self.layers = nn.ModuleList(
            MPNNVirtualNodeLayer(
                c.dim,
                local=c.local,
                dropout=c.dropout,
                virtual_node=c.virtual_node,
                virtual_update=i < c.layers,
                virtual_residual=c.virtual_residual,
                edge_output=i < c.layers or c.last_edges,
            )
            for i in range(1, c.layers + 1)
        )
        self.readout = Readout(c.head, c.dim, c.out_dim, layers=c.head_layers, pooling=c.pooling)

    def reset_parameters(self) -> None:
        """Draw every parameter anew; the first state is 0."""
        reset_sublayers(self)
        if self.start is not None:
            nn.init.zeros_(self.start)

    def forward(
        self,
        node: Tensor,
        edge: Tensor | None,
        graph: Graph,
        *,
        walk_pe: Tensor | None = None,
        lap_vectors: Tensor | None = None,
        lap_values: Tensor | None = None,
    ) -> Tensor:
        """Nodes, edges and encodings -> ``[G, out_dim]``, or ``[N, out_dim]`` of a head of nodes.

        Args:
            node, edge, graph, walk_pe, lap_vectors, lap_values: As of :class:`GraphGPS`.
        """
        check_graph(graph)
        c = self.config
        check_unused("walk_pe", walk_pe, c.walk_steps, "walk_steps is 0")
        check_unused("lap_vectors", lap_vectors, c.lap_pe, "lap_pe is 0")
        check_unused("lap_values", lap_values, c.lap_pe, "lap_pe is 0")
        parts = [self.embed("node", node, "N", graph.num_rows, graph)]
        if self.embed_lap is not None:
            parts.append(self.embed_lap(lap_vectors, lap_values, graph))
        if self.embed_walk is not None:
            parts.append(self.embed_walk(walk_pe, graph))
        x = parts[0] if len(parts) == 1 else torch.cat(parts, 1)
        e = None
        if self.embed_edge is not None:
            e = self.embed_edge("edge", edge, "E", graph.num_edges, graph)
        elif edge is not None:
            raise ValueError(f"edge must be None: local={c.local!r} uses no edges")
        state = None if self.start is None else self.start.expand(graph.num_graphs, -1)
        for i, layer in enumerate(self.layers, 1):
            update = False if i == len(self.layers) else None
            x, e, state = layer(x, e, graph, state, edge_output=update)
        return self.readout(x, graph.graph_ptr)
