"""Graphs that lie on several machines, on ``torch.distributed``."""
