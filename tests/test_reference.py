"""The plain definitions stand under the operators' public names and signatures."""

import inspect

import pytest
import torch

import fastgt
from fastgt import reference

# a Graph, a context, results and their request, and changes of modules
MODULES = {"accelerate", "prune_heads", "restore"}
NO_OPERATORS = {"Aux", "AuxRequest", "DropoutSeed", "Graph", "PairDropoutSeed", *MODULES}
NO_OPERATORS |= {"implementation"}
OPERATORS = [name for name in fastgt.__all__ if name not in NO_OPERATORS]
SEGMENTS = ["segment_sum", "segment_mean", "segment_max"]


@pytest.mark.parametrize("name", OPERATORS)
def test_it_has_the_public_signature(name):
    public, plain = (
        [(p.name, p.kind, p.default) for p in inspect.signature(f).parameters.values()]
        for f in (getattr(fastgt, name), getattr(reference, name))
    )
    assert plain == [parameter for parameter in public if parameter[0] != "impl"]


def test_nothing_else_is_public_but_what_masks_are_defined_by():
    inner = {
        "masked_attention",
        "masked_additive_attention",
        "masked_channelwise_attention",
        "masked_global_attention",
    }
    assert set(reference.__all__) == {*OPERATORS, *inner}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(), (3,), (2, 3)], ids=str)
@pytest.mark.parametrize("name", SEGMENTS)
def test_segments_and_their_gradients(name, shape, dtype):
    """Ties, a graph without nodes, first, last and in the middle."""
    offsets = torch.tensor([0, 0, 4, 4, 5, 11, 11])
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(-3, 4, (11, *shape), generator=generator).to(dtype)
    upstream = torch.randint(-3, 4, (6, *shape), generator=generator).to(dtype)
    results = []
    for f in (getattr(fastgt, name), getattr(reference, name)):
        leaf = x.clone().requires_grad_()
        out = f(leaf, offsets)
        assert out.dtype == dtype
        results.append((out, *torch.autograd.grad(out, leaf, upstream)))
    for ours, plain in zip(*results, strict=True):
        assert torch.equal(ours, plain)


@pytest.mark.parametrize("name", SEGMENTS)
def test_nan_of_one_graph_reaches_no_other(name):
    x = torch.tensor([1.0, torch.nan, 2.0, 5.0])
    out = getattr(reference, name)(x, torch.tensor([0, 2, 3, 4]))
    assert out[0].isnan()
    assert out[1:].tolist() == [2.0, 5.0]


def test_a_virtual_node_and_its_gradients():
    offsets = torch.tensor([0, 2, 2, 7])
    x, state = torch.arange(21.0).view(7, 3).double(), torch.arange(9.0).view(3, 3).double()
    results = []
    for f in (fastgt.virtual_node, reference.virtual_node):
        leaves = [t.clone().requires_grad_() for t in (x, state)]
        y, pooled = f(*leaves, offsets)
        loss = (y * y).sum() + (pooled * y[:3]).sum()
        results.append((y, pooled, *torch.autograd.grad(loss, leaves)))
    for ours, plain in zip(*results, strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-14, atol=0)
