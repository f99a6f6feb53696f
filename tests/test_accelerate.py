"""fastgt.accelerate and fastgt.restore on models that something else has changed, too."""

import copy
import pickle

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

pytest.importorskip("torch_geometric")

from torch_geometric import nn as pyg

import fastgt
from fastgt import pyg as ours

WIDE = torch.float64


class Net(nn.Module):
    """A layer that is there twice, and another."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.one = pyg.GATConv(6, 6)
        self.parts = nn.ModuleList([self.one, pyg.TransformerConv(6, 6)])

    def forward(self, x, index):
        return self.parts[1](self.parts[0](self.one(x, index), index), index)


@pytest.fixture
def given():
    torch.manual_seed(1)
    return torch.randn(9, 6, dtype=WIDE), torch.randint(9, (2, 30))


def hooks(net):
    return [
        hook
        for layer in net.modules()
        for hooks in (layer._forward_pre_hooks, layer._forward_hooks)
        for hook in hooks.values()
    ]


class Twice(nn.Module):
    def forward(self, x):
        return 2 * x


def test_layers_may_be_parametrized_between(given):
    net = Net().double()
    fastgt.accelerate(net)
    for name in ("att_src", "bias"):
        parametrize.register_parametrization(net.one, name, Twice())
    expected = net(*given)
    assert net.one.ran() == "fused"
    fastgt.restore(net)
    assert isinstance(net.one, pyg.GATConv)
    assert not isinstance(net.one, ours.GATConv)
    torch.testing.assert_close(net(*given), expected)
    torch.testing.assert_close(copy.deepcopy(net)(*given), expected)
    assert "one" in fastgt.accelerate(net).kept
    for name in ("att_src", "bias"):
        parametrize.remove_parametrizations(net.one, name)
    assert type(net.one) is pyg.GATConv
    torch.testing.assert_close(net(*given), expected)


def test_restore_undoes_what_was_done_to_parts(given):
    net = Net().double()
    expected = net(*given)
    fastgt.accelerate(net.parts)
    with pytest.warns(
        UserWarning, match="nothing to replace in Net: one: it is fastgt's already; "
    ):
        report = fastgt.accelerate(net)
    assert list(report.kept) == ["one", "parts.1"]
    assert hooks(net)
    for changed in (net, pickle.loads(pickle.dumps(net)), copy.deepcopy(net)):
        fastgt.restore(changed)
        assert not hooks(changed)
        assert [type(x) for x in changed.parts] == [pyg.GATConv, pyg.TransformerConv]
        torch.testing.assert_close(changed(*given), expected)
        assert fastgt.restore(changed) is changed


class Scripted(nn.Module):
    """torch.jit of torch 2.13 takes this layer, and not GATConv."""

    def __init__(self):
        super().__init__()
        self.conv = pyg.TransformerConv(6, 6)

    def forward(self, x: Tensor, index: Tensor) -> Tensor:
        return self.conv(x, index)


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_restore_comes_before_torch_jit_and_after_it(given):
    """torch.jit does not take our hooks; by then it has put torch-geometric's layer there."""
    net = Scripted().double()
    expected = net(*given)
    fastgt.accelerate(net)
    with pytest.raises(RuntimeError, match="_leave"):
        torch.jit.script(net)
    fastgt.restore(net)
    assert not hooks(net)
    assert type(net.conv) is pyg.TransformerConv
    torch.testing.assert_close(net(*given), expected)
    torch.testing.assert_close(torch.jit.script(net)(*given), expected)
    assert list(fastgt.accelerate(net).replaced) == ["conv"]
    torch.testing.assert_close(net(*given), expected)


@pytest.mark.parametrize("what", [fastgt.accelerate, fastgt.restore, ours.explain])
@pytest.mark.parametrize("model", [None, [nn.Linear(2, 2)], nn.Linear])
def test_what_is_no_module_is_refused(what, model):
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, got "):
        what(model)
