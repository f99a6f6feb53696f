"""GraphGPS: message passing and global attention side by side (arXiv 2205.12454).

    l_i  = norm(x_i + dropout(MPNN(x, e)_i))            over the neighbours, see graph_gps_local.py
    a_i  = norm(x_i + dropout(Attention(x)_i))          over all nodes of the graph
    h_i  = l_i + a_i
    x_i' = norm(h_i + dropout(W_2 dropout(act(W_1 h_i))))

GatedGCN updates e too, and has its own residual and dropout within l_i. The attention is a softmax,
that of Performer, linear, or along BigBird's pattern (graph_gps_bigbird.py), or a layer of DeepSets
stands in its place. It is computed graph by graph, without padding: where the authors' Performer
lets padded nodes into the denominator, here there are none.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastgt.graph import Graph
from fastgt.models.graph_gps_bigbird import bigbird_pattern
from fastgt.models.graph_gps_config import GraphGPSConfig
from fastgt.models.graph_gps_encoders import (
    KernelEncoder,
    LaplacianEncoder,
    Readout,
    StableEncoder,
    check_unused,
    make_encoder,
)
from fastgt.models.graph_gps_layer import GraphGPSLayer
from fastgt.models.graph_gps_local import WITH_EDGES, edge_distance, edge_width
from fastgt.models.graph_gps_pairs import DegreeEncoder, PairBias
from fastgt.models.graph_gps_sign_net import SignNet
from fastgt.models.spectral_encoder import SpectralEncoder
from fastgt.nn.sublayers import reset_sublayers
from fastgt.ops.checks import check_graph


class GraphGPS(nn.Module):
    """Numbers for every graph of a batch, or for every node.

    The edges of the last GatedGCN reach no output: its norm of edges is there, as in the authors'
    code and parameter counts, but is not computed and gets no gradient. With ``last_edges=False``
    it is not there, as suits ``DistributedDataParallel``. Weights are drawn as torch's layers draw
    theirs.

    Source:
        Rampasek et al., Recipe for a General, Powerful, Scalable Graph Transformer, arXiv
        2205.12454.

    Example:
        >>> import torch
        >>> from fastgt import Graph
        >>> from fastgt.models import GraphGPS, GraphGPSConfig
        >>> model = GraphGPS(GraphGPSConfig.published("zinc"))
        >>> graph = Graph.from_edge_index(torch.tensor([[0, 1, 2], [1, 2, 0]]))
        >>> atoms, bonds = torch.tensor([0, 27, 1]), torch.tensor([1, 3, 2])
        >>> model(atoms, bonds, graph, walk_pe=torch.rand(3, 20)).shape
        torch.Size([1, 1])
    """

    def __init__(self, config: GraphGPSConfig):
        super().__init__()
        c = self.config = config
        assert not isinstance(c.edge_types, int)
        width = c.dim - c.encoded_dim
        self.embed = make_encoder(c.node_types, c.node_features, width)
        self.embed_lap: nn.Module | None = None
        if c.lap_pe and c.lap_heads:
            self.embed_lap = SpectralEncoder(
                c.lap_pe, c.lap_dim, heads=c.lap_heads, layers=c.lap_layers
            )
        elif c.lap_pe:
            self.embed_lap = LaplacianEncoder(c.lap_pe, c.lap_dim, c.lap_layers)
        self.embed_sign = (
            SignNet(
                c.sign_pe,
                c.sign_dim,
                kind=c.sign_net,
                layers=c.sign_layers,
                hidden=c.sign_hidden,
                out=c.sign_out,
                rho_layers=c.sign_rho_layers,
            )
            if c.sign_pe
            else None
        )
        self.embed_walk, self.embed_heat, self.embed_electrostatic = (
            KernelEncoder(name, count, dim, c.kernel_layers) if dim else None
            for name, count, dim in (
                ("walk_pe", c.walk_steps, c.walk_dim),
                ("heat_pe", c.heat_times, c.heat_dim),
                ("electrostatic_pe", 10, c.electrostatic_dim),
            )
        )
        self.embed_stable = StableEncoder(c.stable_pe, c.dim) if c.stable_pe else None
        self.embed_degree = DegreeEncoder(c.degrees, width) if c.degrees else None
        self.pair_bias = (
            PairBias(c.path_distance, c.edge_types[0], c.heads) if c.path_distance else None
        )
        self.embed_edge: nn.Module | None = None
        if c.local in WITH_EDGES:
            width = edge_width(c.local, c.dim)
            self.embed_edge = make_encoder(c.edge_types, c.edge_features, width)
        self.layers = nn.ModuleList(
            GraphGPSLayer(
                c.dim,
                c.heads,
                local=c.local,
                attention=c.attention,
                performer_width=c.performer_width,
                learn_temperature=c.learn_temperature,
                norm=c.norm,
                activation=c.activation,
                dropout=c.dropout,
                attention_dropout=c.attention_dropout,
                stable=c.stable_pe > 0,
                edge_output=i < c.layers or c.last_edges,
            )
            for i in range(1, c.layers + 1)
        )
        self.readout = Readout(
            c.head,
            c.dim,
            c.out_dim,
            layers=c.head_layers,
            pooling=c.pooling,
            activation=c.activation,
        )

    def reset_parameters(self) -> None:
        """Draw every parameter anew."""
        reset_sublayers(self)

    def forward(
        self,
        node: Tensor,
        edge: Tensor | None,
        graph: Graph,
        *,
        walk_pe: Tensor | None = None,
        heat_pe: Tensor | None = None,
        electrostatic_pe: Tensor | None = None,
        lap_vectors: Tensor | None = None,
        lap_values: Tensor | None = None,
        pair_distance: Tensor | None = None,
        pair_edges: Tensor | None = None,
        pattern: Graph | None = None,
    ) -> Tensor:
        """Nodes, edges and encodings -> ``[G, out_dim]``, or ``[N, out_dim]`` of a head of nodes.

        Args:
            node: Types ``[N]``, or ``[N, columns]``, integers; or features ``[N, node_features]``.
            edge: As node, of edges. None with one vector for all, or where none is used.
            graph: The batch.
            walk_pe: ``[N, walk_steps]``, of :func:`fastgt.encodings.random_walk_pe`.
            heat_pe: ``[N, heat_times]``, of :func:`fastgt.encodings.heat_kernel_pe`.
            electrostatic_pe: ``[N, 10]``, of :func:`fastgt.encodings.electrostatic_pe`.
            lap_vectors: ``[N, lap_pe]``, ``[N, sign_pe]`` or ``[N, stable_pe]``. NaN stands for an
                eigenvector that a small graph does not have.
            lap_values: ``[G, lap_pe]``, the eigenvalues.
            pair_distance, pair_edges: ``[P]`` and ``[P, path_distance]``, of
                :func:`fastgt.encodings.shortest_paths`.
            pattern: Of BigBird. By default the call makes it, by
                :func:`fastgt.models.graph_gps_bigbird.bigbird_pattern`; ``torch.compile`` and
                ``torch.export`` take it as an input.
        """
        check_graph(graph)
        c, n = self.config, graph.num_rows
        vectors = c.lap_pe + c.sign_pe + c.stable_pe
        for name, given, wanted, why in (
            ("walk_pe", walk_pe, c.walk_steps, "walk_steps is 0"),
            ("heat_pe", heat_pe, c.heat_times, "heat_times is 0"),
            ("electrostatic_pe", electrostatic_pe, c.electrostatic_dim, "electrostatic_dim is 0"),
            ("lap_vectors", lap_vectors, vectors, "lap_pe, sign_pe and stable_pe are 0"),
            ("lap_values", lap_values, c.lap_pe, "lap_pe is 0"),
            ("pair_distance", pair_distance, c.path_distance, "path_distance is 0"),
            ("pair_edges", pair_edges, c.path_distance, "path_distance is 0"),
        ):
            check_unused(name, given, wanted, why)
        parts = [self.embed("node", node, "N", n, graph)]
        if self.embed_degree is not None:
            parts[0] = parts[0] + self.embed_degree(graph)
        if self.embed_lap is not None:
            parts.append(self.embed_lap(lap_vectors, lap_values, graph))
        if self.embed_sign is not None:
            parts.append(self.embed_sign(lap_vectors, graph))
        for embed, given in (
            (self.embed_walk, walk_pe),
            (self.embed_heat, heat_pe),
            (self.embed_electrostatic, electrostatic_pe),
        ):
            if embed is not None:
                parts.append(embed(given, graph))
        x = parts[0] if len(parts) == 1 else torch.cat(parts, 1)
        e = distance = None
        if self.embed_edge is not None:
            e = self.embed_edge("edge", edge, "E", graph.num_edges, graph)
        elif edge is not None:
            raise ValueError(f"edge must be None: local={c.local!r} uses no edges")
        if self.embed_stable is not None:
            distance = edge_distance(self.embed_stable(lap_vectors, graph), graph)
        bias = None
        if self.pair_bias is not None:
            bias = self.pair_bias(pair_distance, pair_edges, graph)
        if c.attention == "bigbird" and pattern is None:
            pattern = bigbird_pattern(graph)
        for i, layer in enumerate(self.layers, 1):
            update = False if i == len(self.layers) else None
            x, e = layer(
                x, e, graph, distance=distance, bias=bias, pattern=pattern, edge_output=update
            )
        return self.readout(x, graph.graph_ptr)
