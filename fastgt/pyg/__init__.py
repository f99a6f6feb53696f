"""torch-geometric's layers on fastgt's operators: the same classes, computed another way.

Each class is a subclass of torch-geometric's of the same name and overrides its computation only.
Constructors, parameters, ``state_dict``, ``repr`` and lazy sizes are torch-geometric's. What cannot
be fused runs torch-geometric's own code: a warning says so once, and :func:`explain` tells why.

Only this package imports torch-geometric.

Example:
    >>> import torch
    >>> from fastgt.pyg import TransformerConv
    >>> edge_index = torch.tensor([[0, 1, 2], [1, 2, 0]])
    >>> TransformerConv(32, 16, heads=4)(torch.randn(3, 32), edge_index).shape
    torch.Size([3, 64])
"""

try:
    import torch_geometric as _  # noqa: F401
except ImportError as error:
    raise ImportError(
        'fastgt.pyg needs torch-geometric, which is not installed: pip install "fastgt[pyg]"'
    ) from error

from fastgt.pyg.accelerating import Report
from fastgt.pyg.fused import explain
from fastgt.pyg.gat_conv import GATConv, GATv2Conv
from fastgt.pyg.gine_conv import GINEConv
from fastgt.pyg.gps_conv import GPSConv
from fastgt.pyg.hgt_conv import HGTConv
from fastgt.pyg.linear_attention import (
    PerformerAttention,
    PolynormerAttention,
    SGFormerAttention,
)
from fastgt.pyg.point_transformer_conv import PointTransformerConv
from fastgt.pyg.res_gated_graph_conv import ResGatedGraphConv
from fastgt.pyg.sharing import shared_graphs
from fastgt.pyg.transformer_conv import TransformerConv

__all__ = [
    "GATConv",
    "GATv2Conv",
    "GINEConv",
    "GPSConv",
    "HGTConv",
    "PerformerAttention",
    "PointTransformerConv",
    "PolynormerAttention",
    "Report",
    "ResGatedGraphConv",
    "SGFormerAttention",
    "TransformerConv",
    "explain",
    "shared_graphs",
]
