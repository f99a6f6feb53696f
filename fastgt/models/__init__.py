"""Reference models, one file each."""

from fastgt.models.authors_checkpoints import graph_transformer_state_dict
from fastgt.models.correspondence import (
    CorrespondenceTransformer,
    CorrespondenceTransformerConfig,
)
from fastgt.models.correspondence_checkpoints import correspondence_state_dict
from fastgt.models.correspondence_matching import log_likelihoods, matches
from fastgt.models.exphormer import Exphormer
from fastgt.models.exphormer_config import ExphormerConfig
from fastgt.models.exphormer_graph import expander_table
from fastgt.models.graph_classifier import GraphClassifier, GraphClassifierConfig
from fastgt.models.graph_gps import GraphGPS
from fastgt.models.graph_gps_checkpoints import gps_conv_state_dict, graph_gps_state_dict
from fastgt.models.graph_gps_config import GraphGPSConfig
from fastgt.models.graph_transformer import (
    EdgeGraphTransformer,
    EdgeGraphTransformerConfig,
    GraphTransformer,
    GraphTransformerConfig,
)
from fastgt.models.graphormer import Graphormer, GraphormerConfig
from fastgt.models.gtsp import GTSP, GTSPConfig, Sparsification
from fastgt.models.large_gt import LargeGT
from fastgt.models.large_gt_config import LargeGTConfig
from fastgt.models.mpnn_vn import MPNNVirtualNode, MPNNVirtualNodeConfig, add_virtual_nodes
from fastgt.models.open_graph import OpenGraph, OpenGraphConfig
from fastgt.models.open_graph_checkpoints import open_graph_state_dict
from fastgt.models.open_graph_tasks import (
    both_sides,
    class_scores,
    draw_negatives,
    rank_links,
    with_class_nodes,
)
from fastgt.models.polynormer import Polynormer
from fastgt.models.polynormer_checkpoints import polynormer_state_dict
from fastgt.models.polynormer_config import PolynormerConfig
from fastgt.models.san import SAN, SANConfig
from fastgt.models.scene_graph import SceneGraphConfig, SceneGraphEncoder
from fastgt.models.sgformer import SGFormer, SGFormerConfig, sgformer_state_dict
from fastgt.models.sinkhorn import log_sinkhorn
from fastgt.models.sym_point import SymPointAttention, connected_neighbors
from fastgt.models.todyformer import Todyformer, TodyformerConfig

__all__ = [
    "GTSP",
    "SAN",
    "CorrespondenceTransformer",
    "CorrespondenceTransformerConfig",
    "EdgeGraphTransformer",
    "EdgeGraphTransformerConfig",
    "Exphormer",
    "ExphormerConfig",
    "GTSPConfig",
    "GraphClassifier",
    "GraphClassifierConfig",
    "GraphGPS",
    "GraphGPSConfig",
    "GraphTransformer",
    "GraphTransformerConfig",
    "Graphormer",
    "GraphormerConfig",
    "LargeGT",
    "LargeGTConfig",
    "MPNNVirtualNode",
    "MPNNVirtualNodeConfig",
    "OpenGraph",
    "OpenGraphConfig",
    "Polynormer",
    "PolynormerConfig",
    "SANConfig",
    "SGFormer",
    "SGFormerConfig",
    "SceneGraphConfig",
    "SceneGraphEncoder",
    "Sparsification",
    "SymPointAttention",
    "Todyformer",
    "TodyformerConfig",
    "add_virtual_nodes",
    "both_sides",
    "class_scores",
    "connected_neighbors",
    "correspondence_state_dict",
    "draw_negatives",
    "expander_table",
    "gps_conv_state_dict",
    "graph_gps_state_dict",
    "graph_transformer_state_dict",
    "log_likelihoods",
    "log_sinkhorn",
    "matches",
    "open_graph_state_dict",
    "polynormer_state_dict",
    "rank_links",
    "sgformer_state_dict",
    "with_class_nodes",
]
