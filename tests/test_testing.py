"""The tools that the tests stand on: the accuracy gate, poisoned memory, random graphs."""

import pytest
import torch
from attention_cases import DEVICE

from fastgt.testing import assert_as_accurate, random_batch


@pytest.mark.parametrize(
    "spoil",
    [
        lambda x: x + 1e-3,
        lambda x: x.clone().index_fill_(0, torch.tensor([1]), torch.nan),
        lambda x: x.clone().index_fill_(0, torch.tensor([1]), torch.inf),
    ],
    ids=["offset", "nan", "inf"],
)
def test_accuracy_gate_can_fail(spoil):
    x = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
    x[3] = -torch.inf
    assert_as_accurate(x, x, x.double(), "x")
    with pytest.raises(AssertionError, match=r"x is off by .* at \[\d, \d\]"):
        assert_as_accurate(spoil(x), x, x.double(), "x")
    with pytest.raises(AssertionError, match="x is off by"):
        assert_as_accurate(x.nan_to_num(neginf=0.0), x, x.double(), "x")


def test_library_memory_is_poisoned():
    source = "import torch\ndef f(x): return x.new_empty(3), torch.empty(3, dtype=torch.int32)"
    for name, poisoned in (("fastgt.somewhere", True), ("elsewhere", False)):
        scope = {"__name__": name}
        exec(source, scope)
        x, i = scope["f"](torch.zeros(1))
        if poisoned:
            assert x.isnan().all()
            assert (i == 2**30 - 1).all()


def test_random_batches_have_their_graphs():
    graph = random_batch(0, [(4, 9), (0, 0), (3, 5)], device=DEVICE)
    assert graph.graph_ptr.tolist() == [0, 4, 4, 7]
    assert graph.num_edges == 14
