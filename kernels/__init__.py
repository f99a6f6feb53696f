"""Hand-written Triton kernels, installed as ``fastgt.kernels``."""

if __name__ != "fastgt.kernels":
    raise ImportError(
        "this folder is the package fastgt.kernels: run `pip install -e .` and import that name"
    )
