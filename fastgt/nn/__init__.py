"""Thin modules: projections around one operator each."""

from fastgt.nn.attention import EdgeGatedAttention, NeighborhoodAttention
from fastgt.nn.head_gate import HardConcreteHeadGate, HeadGate, TopKHeadGate
from fastgt.nn.linear_attention import LinearAttention, random_features
from fastgt.nn.virtual_node import VirtualNode

__all__ = [
    "EdgeGatedAttention",
    "HardConcreteHeadGate",
    "HeadGate",
    "LinearAttention",
    "NeighborhoodAttention",
    "TopKHeadGate",
    "VirtualNode",
    "random_features",
]
