"""Benchmarks, installed as ``fastgt.bench``: verify, then time."""
