"""Gates in the attention modules, and heads taken away for good."""

import copy
import itertools

import pytest
import torch
from attention_cases import DEVICE, FP64, close
from torch import nn
from torch.nn.utils import prune

from fastgt import Graph, implementation, prune_heads
from fastgt.models import EdgeGraphTransformer, EdgeGraphTransformerConfig
from fastgt.models.graph_transformer import GraphTransformerEdgeLayer, GraphTransformerLayer
from fastgt.nn import (
    EdgeGatedAttention,
    HardConcreteHeadGate,
    HeadGate,
    LinearAttention,
    NeighborhoodAttention,
    TopKHeadGate,
)

HEADS, DIM = 4, 12
MODULES = ["neighborhood", "grouped", "edge", "linear"]


def module(name, gate=None, seed=0, **more):
    torch.manual_seed(seed)
    made = {
        "neighborhood": lambda: NeighborhoodAttention(DIM, HEADS, head_gate=gate, **more),
        "grouped": lambda: NeighborhoodAttention(DIM, HEADS, kv_heads=2, head_gate=gate, **more),
        "edge": lambda: EdgeGatedAttention(
            DIM, HEADS, edge_dim=5, bias=True, head_gate=gate, **more
        ),
        "linear": lambda: LinearAttention(DIM, HEADS, head_gate=gate, **more),
    }[name]()
    return made.to(DEVICE, FP64)


def inputs(name, seed=0):
    generator = torch.Generator().manual_seed(seed)
    ptr = torch.tensor([0, 4, 9], device=DEVICE)
    edges = torch.randint(5, (2, 14), generator=generator).to(DEVICE)
    edges = torch.cat([edges % 4, edges + 4], 1)
    graph = Graph.from_edge_index(edges, 9, graph_ptr=ptr)
    x = torch.randn(9, DIM, generator=generator, dtype=FP64).to(DEVICE)
    e = torch.randn(28, 5, generator=generator, dtype=FP64).to(DEVICE)
    return {"linear": (x, ptr), "edge": (x, e, graph)}.get(name, (x, graph))


def run(attention, args, **more):
    """Outputs, and gradients of the inputs and of the parameters by name."""
    args = [
        t.detach().requires_grad_() if isinstance(t, torch.Tensor) and t.is_floating_point() else t
        for t in args
    ]
    found = attention(*args, **more)
    outs = found if isinstance(found, tuple) else (found,)
    weights = [torch.linspace(-1, 1, o.numel(), dtype=o.dtype, device=DEVICE) for o in outs]
    attention.zero_grad()
    sum((w * o.flatten()).sum() for w, o in zip(weights, outs, strict=True)).backward()
    leaves = {f"input {i}": t for i, t in enumerate(args) if getattr(t, "requires_grad", False)}
    leaves |= dict(attention.named_parameters())
    grads = {f"d{k}": torch.zeros_like(t) if t.grad is None else t.grad for k, t in leaves.items()}
    return {f"out {i}": o.detach() for i, o in enumerate(outs)}, grads


@pytest.mark.parametrize("name", MODULES)
def test_masked_is_pruned(name):
    """For every subset of heads: values and all gradients."""
    for on in itertools.product([0.0, 1.0], repeat=HEADS):
        gated = module(name, HeadGate(torch.tensor(on) * torch.tensor([1.0, 0.5, -2.0, 1.0])))
        smaller = prune_heads(gated, allow_empty=True)
        args = inputs(name)
        outs, grads = run(gated, args)
        small_outs, small_grads = run(smaller, args)
        for key, o in outs.items():
            close(small_outs[key], o, f"{key} of {on}")
        keep = [h for h in range(HEADS) if on[h]]
        assert smaller.heads == len(keep)
        for key, g in grads.items():
            if key.startswith("dinput"):
                close(small_grads[key], g, f"{key} of {on}")
        # rows of the projections into heads: those of masked heads get nothing
        rows = gated.q.weight.grad
        rows = torch.zeros_like(gated.q.weight) if rows is None else rows
        mask = torch.tensor(on, device=DEVICE).bool().repeat_interleave(DIM // HEADS)
        assert not rows[~mask].any()
        close(small_grads["dq.weight"], rows[mask], f"dq.weight of {on}")
        columns = gated.out.weight.grad
        assert not columns[:, ~mask].any()
        close(small_grads["dout.bias"], grads["dout.bias"], "dout.bias")


@pytest.mark.parametrize("name", MODULES)
def test_nan_weights_of_a_masked_head_change_nothing(name):
    gated = module(name, HeadGate(torch.tensor([0.0, 0.0, 1.0, 1.0])))
    args = inputs(name)
    clean_outs, clean_grads = run(gated, args)
    width = DIM // HEADS
    with torch.no_grad():
        for layer in gated.INTO:
            getattr(gated, layer).weight[: 2 * width] = torch.nan
            getattr(gated, layer).bias[: 2 * width] = torch.nan
        for layer in gated.INTO_KV:  # two heads share one
            getattr(gated, layer).weight[:width] = torch.nan
        for layer in gated.OUT_OF:
            getattr(gated, layer).weight[:, : 2 * width] = torch.nan
    outs, grads = run(gated, args)
    for found, clean in ((outs, clean_outs), (grads, clean_grads)):
        for key, x in found.items():
            close(x, clean[key], key)


@pytest.mark.parametrize("impl", ["cpp", "reference"] if DEVICE == "cpu" else ["triton"])
def test_an_edge_bias_has_all_heads_where_some_are_masked(impl):
    gated = module("neighborhood", HeadGate(torch.tensor([0.0, 1.0, 0.0, 0.5])), impl=impl)
    bias = torch.randn(28, HEADS, dtype=FP64, device=DEVICE, requires_grad=True)
    args = inputs("neighborhood")
    out = gated(*args, edge_bias=bias)
    close(out, prune_heads(gated)(*args, edge_bias=bias[:, [1, 3]]), "x")
    (grad,) = torch.autograd.grad(out.square().sum(), bias)
    assert grad.any(0).tolist() == [False, True, False, True]


@pytest.mark.parametrize("layer", ["node", "edge"])
def test_all_heads_masked_is_the_residual_path(layer):
    gate = HeadGate(torch.zeros(HEADS))
    x, e, graph = inputs("edge")
    kinds = {"node": GraphTransformerLayer, "edge": GraphTransformerEdgeLayer}
    made = kinds[layer](DIM, HEADS, norm="layer", head_gate=gate).to(DEVICE, FP64)
    e = torch.randn(28, DIM, dtype=FP64, device=DEVICE)
    found = made(x, graph) if layer == "node" else made(x, e, graph)[0]
    wanted = made.norm1(x + made.attention.out.bias)
    close(found, made.norm2(wanted + made.ffn(wanted)), "x")


@pytest.mark.parametrize("name", MODULES)
def test_a_gate_for_each_graph_is_each_graph_alone(name):
    attention, args = module(name), inputs(name)
    gate = torch.tensor([[1.0, 0.0, 0.5, 0.0], [0.0, 0.0, 1.0, -1.0]], device=DEVICE, dtype=FP64)
    both = attention(*args, head_gate=gate)
    both = both[0] if isinstance(both, tuple) else both
    for rows, mine in zip((slice(0, 4), slice(4, 9)), gate, strict=True):
        alone = attention(*args, head_gate=mine)
        alone = alone[0] if isinstance(alone, tuple) else alone
        close(both[rows], alone[rows], "x")


@pytest.mark.parametrize("name", MODULES)
def test_gates_that_are_trained(name):
    """Straight through: the exact gradient of masked heads' gates arrives at the logits."""
    gate = TopKHeadGate(HEADS, k=2).double()
    with torch.no_grad():
        gate.logits.copy_(torch.tensor([0.3, -0.1, 0.8, -2.0]))
    attention = module(name, gate, dense_gate_grad=True)
    args = inputs(name)
    attended = attention(*args)
    attended = attended[0] if isinstance(attended, tuple) else attended
    attended.square().sum().backward()
    # one head at a time, by a gate that is a plain tensor
    free = (gate.logits.detach() > 0).double().to(DEVICE).requires_grad_()
    plain = module(name, dense_gate_grad=True)
    plain.load_state_dict({k: v for k, v in attention.state_dict().items() if "gate.log" not in k})
    out = plain(*args, head_gate=free)
    out = out[0] if isinstance(out, tuple) else out
    close(out, attended, "x")
    (wanted,) = torch.autograd.grad(out.square().sum(), free)
    s = gate.logits.detach().sigmoid()
    close(gate.logits.grad, wanted * s * (1 - s), "dlogits")
    assert gate.logits.grad.all()
    # without dense_gate_grad, masked heads get none
    attention.dense_gate_grad, gate.logits.grad = False, None
    attended = attention(*args)
    attended = attended[0] if isinstance(attended, tuple) else attended
    attended.square().sum().backward()
    assert gate.logits.grad.nonzero().flatten().tolist() == [0, 2]


def test_hard_concrete_gates_are_pruned_as_in_evaluation():
    gate = HardConcreteHeadGate(HEADS).double()
    with torch.no_grad():
        gate.logits.copy_(torch.tensor([3.0, -4.0, 0.2, -3.0]))
    gated = module("neighborhood", gate).train()
    smaller = prune_heads(gated)
    assert smaller.heads == 2
    assert gate.training
    args = inputs("neighborhood")
    close(smaller(*args), gated.eval()(*args), "x")


@pytest.mark.skipif(DEVICE != "cpu", reason="on a GPU, the operator multiplies")
def test_gradients_of_gates_are_not_summed_in_16_bits():
    attention = LinearAttention(4, 2, bias=False).half()
    x, gate = torch.rand(100_000, 4).half(), torch.tensor([1.5, 1.0], requires_grad=True)
    with torch.no_grad():
        for layer in (attention.q, attention.k, attention.v, attention.out):
            layer.weight.copy_(torch.eye(4))
    attention(x, head_gate=gate).float().sum().backward()
    wide = copy.deepcopy(attention).double()
    wanted = gate.detach().double().requires_grad_()
    wide(x.double(), head_gate=wanted).sum().backward()
    close(gate.grad.double(), wanted.grad, "dgate", 1e-2)  # inf in float16


def test_pruned_weights_are_used_where_heads_are_masked():
    """torch.nn.utils.prune makes weights in hooks before the call."""
    gated = module("neighborhood", HeadGate(torch.tensor([1.0, 0.0, 1.0, 1.0])))
    for layer in (gated.q, gated.out):
        prune.l1_unstructured(layer, "weight", amount=0.5)
    args = inputs("neighborhood")
    for _ in range(2):  # a second backward would meet the first one's weight
        with torch.no_grad():
            gated.q.weight_orig.mul_(1.1)
        outs, grads = run(gated, args)
    assert grads["dq.weight_orig"].any()
    assert not grads["dq.weight_orig"][gated.q.weight_mask == 0].any()
    with pytest.raises(ValueError, match="weight of 'q' is made by a hook or a parametrization"):
        prune_heads(gated)
    for layer in (gated.q, gated.out):
        prune.remove(layer, "weight")
    close(run(gated, args)[0]["out 0"], outs["out 0"], "x")
    close(prune_heads(gated)(*args), outs["out 0"], "x")


class Adapted(nn.Linear):
    """A layer that does more than multiply with its weight."""

    def forward(self, x):
        return super().forward(x) + 5 * x[..., : self.out_features]


@pytest.mark.parametrize("how", ["subclass", "forward hook", "input hook", "parametrized"])
@pytest.mark.parametrize("impl", [None, "reference"])
def test_layers_that_do_more_are_called(how, impl):
    gated = module("neighborhood", HeadGate(torch.tensor([0.0, 1.0, 0.0, 0.5])), impl=impl)
    full = module("neighborhood", HeadGate(torch.tensor([0.0, 1.0, 0.0, 0.5])), impl=impl)
    full.dense_gate_grad = True  # everything is computed
    full.head_gate.score(True)
    for attention in (gated, full):
        for layer in (attention.q, attention.v, attention.out):
            if how == "subclass":
                layer.__class__ = Adapted
            elif how == "forward hook":
                layer.register_forward_hook(lambda m, inputs, y: y + 1)
            elif how == "input hook":
                layer.register_forward_pre_hook(lambda m, inputs: (inputs[0] * 3,))
            else:
                torch.manual_seed(0)
                nn.utils.parametrizations.spectral_norm(layer).eval()
    args = inputs("neighborhood")
    found, wanted = run(gated, args), run(full, args)
    close(found[0]["out 0"], wanted[0]["out 0"], "x")
    for key in ("dinput 0", "dk.weight", "dk.bias"):
        close(found[1][key], wanted[1][key], key)


def model(seed=0, masks=None):
    torch.manual_seed(seed)
    config = EdgeGraphTransformerConfig(dim=16, heads=HEADS, layers=3, pe_dim=0)
    made = EdgeGraphTransformer(config).to(DEVICE)
    for i, layer in enumerate(made.layers):
        mask = torch.ones(HEADS) if masks is None else torch.tensor(masks[i])
        layer.attention.head_gate = HeadGate(mask).to(DEVICE)
    return made


def test_a_whole_model(tmp_path):
    masks = [[1.0, 0.0, 0.0, 1.0], [0.0, 0.0, 0.0, 1.0], [1.0, 1.0, 1.0, 1.0]]
    gated = model(0, masks).eval()
    before = copy.deepcopy(gated.state_dict())
    smaller = prune_heads(gated)
    assert [layer.attention.heads for layer in smaller.layers] == [2, 1, 4]
    assert sum(p.numel() for p in smaller.parameters()) < sum(p.numel() for p in gated.parameters())
    _, _, graph = inputs("edge")
    types = torch.arange(9, device=DEVICE), torch.arange(28, device=DEVICE) % 4
    wanted = gated(*types, graph)
    close(smaller(*types, graph), wanted, "y", 1e-5)
    # the model is as it was
    for key, x in gated.state_dict().items():
        assert torch.equal(x, before[key]), key
    # there and back through a file, into a model that never saw the gates
    torch.save(smaller.state_dict(), tmp_path / "small.pt")
    state = torch.load(tmp_path / "small.pt")
    again = prune_heads(model(seed=1), state_dict=state).eval()
    assert torch.equal(again(*types, graph), smaller(*types, graph))
    assert again.state_dict().keys() == smaller.state_dict().keys()
    # a second time there is nothing left to take
    twice = prune_heads(smaller)
    assert torch.equal(twice(*types, graph), smaller(*types, graph))


def test_pruned_modules_train_on():
    smaller = prune_heads(module("grouped", HeadGate(torch.tensor([1.0, 0.0, 1.0, 1.0]))))
    assert (smaller.heads, smaller.kv_heads) == (3, 3)  # uneven: a key head each
    even = prune_heads(module("grouped", HeadGate(torch.tensor([1.0, 0.0, 0.0, 1.0]))))
    assert (even.heads, even.kv_heads) == (2, 2)
    both = prune_heads(module("grouped", HeadGate(torch.tensor([0.0, 0.0, 1.0, 1.0]))))
    assert (both.heads, both.kv_heads) == (2, 1)
    optimizer = torch.optim.SGD(smaller.parameters(), lr=0.1)
    args, losses = inputs("grouped"), []
    for _ in range(5):
        loss = smaller(*args).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("impl", ["reference", "triton"])
def test_modules_of_every_implementation(impl):
    if impl == "triton":
        pytest.importorskip("triton")
    for name in MODULES:
        gated = module(name, HeadGate(torch.tensor([0.0, 1.0, 0.0, 0.5])))
        args = inputs(name)
        wanted = run(gated, args)
        with implementation(impl):
            found = run(gated, args)
        for x, y in zip(found, wanted, strict=True):
            for key in x:
                close(x[key], y[key], f"{name} {key}", 1e-8)


def test_refusals():
    with pytest.raises(TypeError, match="head_gate must be a module, as HeadGate"):
        NeighborhoodAttention(DIM, HEADS, head_gate=torch.ones(HEADS))
    args = inputs("neighborhood")
    gated = module("neighborhood", HeadGate(torch.ones(HEADS)))
    with pytest.raises(ValueError, match="head_gate is given twice"):
        gated(*args, head_gate=torch.ones(HEADS, device=DEVICE))
    with pytest.raises(ValueError, match=r"head_gate must be \[H\] = \[4\], got \[3\]"):
        module("neighborhood", HeadGate(torch.ones(3)))(*args)
    masks = [[1.0, 0.0, 0.0, 1.0], [0.0] * HEADS, [1.0] * HEADS]
    message = r"head_gate of 'layers\.1\.attention' masks all 4 heads: allow_empty=True"
    with pytest.raises(ValueError, match=message):
        prune_heads(model(0, masks))
    assert prune_heads(model(0, masks), allow_empty=True).layers[1].attention.heads == 0
    with pytest.raises(ValueError, match=r"head_gate must be \[H\] = \[4\], got \[3\]"):
        prune_heads(module("linear", HeadGate(torch.ones(3))))
    made = module("linear", HeadGate(torch.ones(4)))
    made.head_gate.mask[1] = torch.nan
    with pytest.raises(ValueError, match=r"head_gate is NaN at heads \[1\]"):
        prune_heads(made)
    for make in (nn.utils.parametrizations.weight_norm, nn.utils.spectral_norm):
        made = module("linear", HeadGate(torch.ones(4)))
        make(made.k)
        with pytest.raises(ValueError, match="the weight of 'k' is made by a hook or a param"):
            prune_heads(made)
    made = module("linear", HeadGate(torch.ones(4)))
    made.v.register_forward_hook(lambda m, inputs, y: y + 1)
    with pytest.raises(ValueError, match=r"'v' is no plain nn\.Linear, or has hooks"):
        prune_heads(made)
    made = module("linear", HeadGate(torch.ones(4)))
    made.k = made.q
    with pytest.raises(ValueError, match="'q' and 'k' are one layer: heads of both go"):
        prune_heads(made)
    made = module("neighborhood", HeadGate(torch.ones(4)))
    for width in (9, 2):
        with pytest.raises(ValueError, match=r"edge_bias must be \[E, H\] = \[E, 4\], got"):
            made(*args, edge_bias=torch.randn(28, width, dtype=FP64, device=DEVICE))
    with pytest.raises(TypeError, match="head_gate must be a tensor, got list"):
        module("neighborhood")(*args, head_gate=[1.0] * 4)
    with pytest.raises(ValueError, match=r"head_gate must be \[H\] = \[4\], got \[\]"):
        module("neighborhood")(*args, head_gate=torch.tensor(1.0, device=DEVICE))
    gated = model(0, [[1.0, 0.0, 0.0, 1.0]] * 3)
    with pytest.raises(ValueError, match=r"attention\.head_gate: it is of a model with gates"):
        prune_heads(gated, state_dict=gated.state_dict())
    empty = prune_heads(module("linear", HeadGate(torch.zeros(4))), allow_empty=True)
    out = empty(*inputs("linear"), head_gate=torch.ones(0, device=DEVICE))
    close(out, empty.out.bias.expand_as(out), "x")
    state = prune_heads(model(0, masks), allow_empty=True).state_dict()
    with pytest.raises(ValueError, match=r"has no 'layers\.0\.attention\.q\.weight'"):
        prune_heads(model(), state_dict={})
    with pytest.raises(ValueError, match="does not fit the model"):
        prune_heads(model(), state_dict={k: v for k, v in state.items() if "readout" not in k})
    state["layers.0.attention.q.weight"] = torch.zeros(7, 16)
    with pytest.raises(ValueError, match="has 7 rows in state_dict, which are no heads of 4"):
        prune_heads(model(), state_dict=state)
