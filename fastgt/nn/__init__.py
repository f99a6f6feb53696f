"""Thin modules: projections around one operator each."""

from fastgt.nn.attention import NeighborhoodAttention

__all__ = ["NeighborhoodAttention"]
