"""Thin modules: projections around one operator each."""

from fastgt.nn.attention import EdgeGatedAttention, NeighborhoodAttention
from fastgt.nn.head_gate import HardConcreteHeadGate, HeadGate, TopKHeadGate
from fastgt.nn.linear_attention import LinearAttention, PerformerAttention, random_features
from fastgt.nn.transformer_conv import TransformerConv
from fastgt.nn.virtual_node import VirtualNode

__all__ = [
    "EdgeGatedAttention",
    "HardConcreteHeadGate",
    "HeadGate",
    "LinearAttention",
    "NeighborhoodAttention",
    "PerformerAttention",
    "TopKHeadGate",
    "TransformerConv",
    "VirtualNode",
    "random_features",
]
