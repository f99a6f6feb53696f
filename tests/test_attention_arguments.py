"""neighborhood_attention: which implementation runs, and what is refused in which words."""

import math

import pytest
import torch
from attention_cases import BF16, DEVICE, FAST, FP16, FP32, FP64, IMPLS, case

import fastgt
from fastgt import neighborhood_attention, reference
from fastgt.testing import random_graph


@pytest.fixture
def ran(monkeypatch):
    """The names of the implementations that ran, in order."""
    import fastgt.cpu.attention
    import fastgt.kernels.attention
    import fastgt.kernels.attention_backward

    seen = []
    for name, module, function in (
        ("cpp", fastgt.cpu.attention, "attention_fwd"),
        ("triton", fastgt.kernels.attention, "attention_fwd"),
        ("cpp", fastgt.cpu.attention, "attention_bwd"),
        ("triton", fastgt.kernels.attention_backward, "attention_bwd"),
        ("reference", reference, "masked_attention"),
    ):
        real = getattr(module, function)

        def spy(*args, real=real, name=name, **kwargs):
            seen.append(name)
            return real(*args, **kwargs)

        monkeypatch.setattr(module, function, spy)
    return seen


def test_the_named_implementation_runs(ran, compiled_kernels):
    x = case(0, 3, 5, dtype=FP32)
    default = FAST[0]

    def run(impl=None):
        ran.clear()
        q = x.q.detach().requires_grad_()
        neighborhood_attention(q, x.k, x.v, x.graph, impl=impl).sum().backward()
        return ran[0] if len(set(ran)) == 1 else ran

    assert run() == default
    for impl in IMPLS:
        assert run(impl) == impl
        with fastgt.implementation(impl):
            assert run() == impl
            assert run("reference") == "reference"
            with fastgt.implementation(None):
                assert run() == default
            assert run() == impl
    assert run() == default
    with pytest.raises(ZeroDivisionError), fastgt.implementation("reference"):
        raise ZeroDivisionError
    assert run() == default


def test_an_implementation_that_cannot_run_says_why(monkeypatch):
    x = case(0, 3, 5, dtype=FP32)
    for call in (
        lambda: neighborhood_attention(x.q, x.k, x.v, x.graph, impl="cuda"),
        lambda: fastgt.implementation("cuda").__enter__(),
    ):
        with pytest.raises(ValueError, match=r"impl must be one of \['triton', .* got 'cuda'"):
            call()
    meta = [t.to("meta") for t in (x.q, x.k, x.v)]
    with pytest.raises(RuntimeError, match="impl='cpp' runs on CPU tensors, got meta"):
        neighborhood_attention(*meta, x.graph.to("meta"), impl="cpp")
    if DEVICE == "cpu":
        import triton

        monkeypatch.setattr(triton.knobs.runtime, "interpret", False)
        with pytest.raises(RuntimeError, match="impl='triton' needs tensors on a GPU, got cpu"):
            neighborhood_attention(x.q, x.k, x.v, x.graph, impl="triton")


def zeros(*shape, dtype=FP32, device=DEVICE):
    return torch.zeros(shape, dtype=dtype, device=device)


def nested(rows):
    return torch.nested.nested_tensor([zeros(4, 8)] * rows)


REFUSALS = {
    "rows of q": ({"q": zeros(4, 4, 8)}, ValueError, "q has 4 rows but the graph has 5 rows"),
    "rows of k": ({"k": zeros(5, 2, 8)}, ValueError, "k has 5 rows but the graph has 3 columns"),
    "rows of v": ({"v": zeros(5, 2, 6)}, ValueError, "v has 5 rows but the graph has 3 columns"),
    "width of k": ({"k": zeros(3, 2, 7)}, ValueError, "k has head width 7 but q has 8"),
    "heads of v": ({"v": zeros(3, 1, 6)}, ValueError, "v has 1 heads but k has 2"),
    "group": (
        {"q": zeros(5, 3, 8), "edge_bias": None},
        ValueError,
        "q's 3 heads must be a multiple of k's 2 heads",
    ),
    "more key heads": (
        {"q": zeros(5, 1, 8), "edge_bias": None},
        ValueError,
        "q's 1 heads must be a multiple of k's 2 heads",
    ),
    "no heads": (
        {"q": zeros(5, 0, 8), "k": zeros(3, 0, 8), "v": zeros(3, 0, 6), "edge_bias": None},
        ValueError,
        "q's 0 heads must be a multiple of k's 0 heads",
    ),
    "no width": (
        {"q": zeros(5, 4, 0), "k": zeros(3, 2, 0)},
        ValueError,
        "q has head width 0; supported are 1 to 256",
    ),
    "wide q": (
        {"q": zeros(5, 4, 257), "k": zeros(3, 2, 257)},
        ValueError,
        "q has head width 257; supported are 1 to 256: let the linear layers before make more "
        "heads, or, .* take global_attention, up to 512 wide",
    ),
    "wide v": ({"v": zeros(3, 2, 257)}, ValueError, "v has head width 257; supported are 1 to 256"),
    "edges of bias": (
        {"edge_bias": zeros(5, 4)},
        ValueError,
        r"edge_bias must be \[E, H\] = \[6, 4\], got \[5, 4\]",
    ),
    "heads of bias": (
        {"edge_bias": zeros(6, 2)},
        ValueError,
        r"edge_bias must be \[E, H\] = \[6, 4\], got \[6, 2\]",
    ),
    "dimensions of q": ({"q": zeros(5, 8)}, ValueError, r"q must be \[N, H, D\], got \[5, 8\]"),
    "dimensions of v": ({"v": zeros(3)}, ValueError, r"v must be \[N, H, D\], got \[3\]"),
    "integers": ({"q": zeros(5, 4, 8, dtype=torch.int64)}, TypeError, "q must be float.*int64"),
    "dtype of k": ({"k": zeros(3, 2, 8, dtype=FP64)}, TypeError, "k is .*float64 but q is .*32"),
    "dtype of v": ({"v": zeros(3, 2, 6, dtype=FP16)}, TypeError, "v is .*float16 but q is .*32"),
    "dtype of bias": (
        {"edge_bias": zeros(6, 4, dtype=BF16)},
        TypeError,
        "edge_bias is .*bfloat16 but q is .*float32",
    ),
    "device of v": ({"v": zeros(3, 2, 6, device="meta")}, ValueError, "v is on meta but q is on"),
    "device of bias": (
        {"edge_bias": zeros(6, 4, device="meta")},
        ValueError,
        "edge_bias is on meta but q is on",
    ),
    "device of the graph": (
        {
            "q": zeros(5, 4, 8, device="meta"),
            "k": zeros(3, 2, 8, device="meta"),
            "v": zeros(3, 2, 6, device="meta"),
            "edge_bias": None,
        },
        ValueError,
        "graph is on .* but q is on meta",
    ),
    "no tensor q": ({"q": None}, TypeError, "q must be a tensor, got NoneType"),
    "no tensor k": ({"k": [1.0]}, TypeError, "k must be a tensor, got list"),
    "no tensor bias": ({"edge_bias": 1.0}, TypeError, "edge_bias must be a tensor, got float"),
    "no graph": ({"graph": zeros(2, 6)}, TypeError, "graph must be a fastgt.Graph, got Tensor"),
    "scale nan": ({"scale": math.nan}, ValueError, "scale must be finite, got nan"),
    "scale beyond float32": ({"scale": 1e300}, ValueError, "scale must be finite, got 1e"),
    "sparse q": (
        {"q": zeros(5, 4, 8).to_sparse()},
        TypeError,
        "q must be a strided tensor, got torch.sparse_coo",
    ),
    "nested k": ({"k": nested(5)}, TypeError, "k must be a strided tensor, got a nested one"),
    "nested bias": (
        {"edge_bias": nested(6)},
        TypeError,
        "edge_bias must be a strided tensor, got a nested one",
    ),
    "scale inf": ({"scale": -math.inf}, ValueError, "scale must be finite, got -inf"),
    "negative eps": ({"denominator_eps": -1.0}, ValueError, "denominator_eps .* got -1.0"),
    "eps nan": ({"denominator_eps": math.nan}, ValueError, "denominator_eps .* got nan"),
    "eps inf": ({"denominator_eps": math.inf}, ValueError, "denominator_eps .* got inf"),
    "clamp upside down": (
        {"logit_clamp": (3.0, -2.0)},
        ValueError,
        r"logit_clamp must have low <= high, got \(3.0, -2.0\)",
    ),
    "clamp negative": ({"logit_clamp": -2.0}, ValueError, "logit_clamp .* got -2.0"),
    "clamp tensor": ({"logit_clamp": zeros()}, TypeError, "logit_clamp must be a number, got T"),
    "clamp words": ({"logit_clamp": ("a", 1)}, TypeError, "logit_clamp must be a number, got str"),
    "learnt scale": (
        {"scale": zeros().requires_grad_()},
        TypeError,
        "scale must be a number, got Tensor: multiply q by it",
    ),
    "scale in words": ({"scale": "big"}, TypeError, "scale must be a number, got str"),
    "eps none": ({"denominator_eps": None}, TypeError, "denominator_eps must .* got NoneType"),
    "clamp nan": ({"logit_clamp": math.nan}, ValueError, "logit_clamp .* got .*nan"),
    "request of another kind": (
        {"return_aux": True},
        TypeError,
        r"return_aux must be an AuxRequest, got bool: pass AuxRequest\(lse=True\)",
    ),
    "request as a tuple": (
        {"return_aux": (True, False, False)},
        TypeError,
        "return_aux must be an AuxRequest, got tuple: pass",
    ),
    "request as a dict": (
        {"return_aux": {"lse": True}},
        TypeError,
        "return_aux must be an AuxRequest, got dict: pass",
    ),
    "clamp of three": ({"logit_clamp": (0, 1, 2)}, ValueError, "logit_clamp .* got 3 numbers"),
}


@pytest.mark.parametrize("impl", [None, "reference"])
@pytest.mark.parametrize("refused", REFUSALS)
def test_refuses_by_name_and_numbers(refused, impl):
    changes, error, message = REFUSALS[refused]
    fitting = {
        "q": zeros(5, 4, 8),
        "k": zeros(3, 2, 8),
        "v": zeros(3, 2, 6),
        "graph": random_graph(0, 5, 6, cols=3, device=DEVICE),
        "edge_bias": zeros(6, 4),
    }
    neighborhood_attention(**fitting, impl=impl)
    with pytest.raises(error, match=message):
        neighborhood_attention(**fitting | changes, impl=impl)
