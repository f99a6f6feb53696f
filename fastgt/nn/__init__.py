"""Thin modules: projections around one operator each."""

from fastgt.nn.attention import EdgeGatedAttention, NeighborhoodAttention
from fastgt.nn.transformer_conv import TransformerConv

__all__ = ["EdgeGatedAttention", "NeighborhoodAttention", "TransformerConv"]
