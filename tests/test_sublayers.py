"""Layers inside modules are called, whatever they have become: adapters, hooks, shards, int8.

Every module stands beside its definition in a few lines, where each layer is called and the
operator between is the reference.
"""

import copy
from collections.abc import Callable
from typing import NamedTuple

import module_cases
import pytest
import torch
from attention_cases import DEVICE, FP32, FP64, close
from module_cases import Given
from torch import nn
from torch.ao.quantization import quantize_dynamic
from torch.nn.modules import module as torch_module
from torch.nn.utils import parametrizations, parametrize, prune
from torch.utils._pytree import tree_map

from fastgt import AuxRequest, Graph, linear_attention, neighborhood_attention, virtual_node
from fastgt.nn import (
    HeadGate,
)
from fastgt.nn.sublayers import is_plain_linear
from fastgt.pruning import GradualPruning, prune_heads

DIM, HEADS, EDGE_DIM = 12, 4, 5
GATES = {
    "no gate": None,
    "[H]": torch.tensor([0.0, 1.0, 0.0, 0.5]),
    "[H] uneven": torch.tensor([0.0, 1.0, -2.0, 0.5]),
    "none left": torch.zeros(4),
    "[G, H]": torch.tensor([[0.0, 1.0, 0.0, 0.5], [0.0, 0.0, 2.0, 1.0]]),
}


def batch(dtype=FP64):
    """-> x, edge features and the graph: two graphs, a hub, isolated nodes."""
    generator = torch.Generator().manual_seed(0)
    edges = torch.randint(3, (2, 9), generator=generator)
    graph = Graph.from_edge_index(
        torch.cat([edges, edges + 4], 1).to(DEVICE), graph_ptr=torch.tensor([0, 4, 9]).to(DEVICE)
    )
    x = torch.randn(9, DIM, generator=generator, dtype=FP64).to(DEVICE, dtype)
    e = torch.randn(18, EDGE_DIM, generator=generator, dtype=FP64).to(DEVICE, dtype)
    return x, e, graph


def heads(y, width=DIM // HEADS):
    return y.unflatten(-1, (-1, width))


def neighborhood(m, x, e, graph, gate):
    attended = neighborhood_attention(
        heads(m.q(x)), heads(m.k(x)), heads(m.v(x)), graph, head_gate=gate, impl="reference"
    )
    return m.out(attended.flatten(-2))


def edge_gated(m, x, e, graph, gate):
    attended, aux = neighborhood_attention(
        heads(m.q(x)),
        heads(m.k(x)),
        heads(m.v(x)),
        graph,
        edge_gate=heads(m.gate(e)),
        head_gate=gate,
        return_aux=AuxRequest(edge_scores=True),
        impl="reference",
    )
    return m.out(attended.flatten(-2)), m.edge_out(aux.edge_scores.flatten(-2))


def linear(m, x, e, graph, gate):
    attended = linear_attention(
        heads(m.q(x)),
        heads(m.k(x)),
        heads(m.v(x)),
        graph.graph_ptr,
        feature_map="elu",
        head_gate=gate,
        impl="reference",
    )
    return m.out(attended.flatten(-2))


def performer(m, x, e, graph, gate):
    attended = linear_attention(
        heads(m.q(x)),
        heads(m.k(x)),
        heads(m.v(x)),
        graph.graph_ptr,
        feature_map="relu_random",
        projection=m.fast_attn.projection_matrix,
        eps=0.0,
        impl="reference",
    )
    return m.attn_out(attended.flatten(-2))


def transformer_conv(m, x, e, graph, gate):
    e = heads(m.lin_edge(e))
    q, k, v = heads(m.lin_query(x)), heads(m.lin_key(x)), heads(m.lin_value(x))
    attended = neighborhood_attention(q, k, v, graph, edge_key=e, edge_value=e, impl="reference")
    r, y = m.lin_skip(x), attended.flatten(-2)
    b = m.lin_beta(torch.cat([y, r, y - r], -1)).sigmoid()
    return b * r + (1 - b) * y


def virtual(m, x, e, graph, gate):
    state = m.initial(2)
    y, pooled = virtual_node(x, state, graph.graph_ptr, impl="reference")
    return y, m.update(pooled)


class Defined(NamedTuple):
    """A module and its options, its definition, and its linear layers."""

    kind: str
    options: dict
    definition: Callable
    layers: tuple[str, ...]

    def make(self):
        return module_cases.MODULES[self.kind].make(DIM, HEADS, **self.options)

    def call(self, m, x, e, graph, gate):
        how = {"head_gate": gate} if self.kind in TAKE_A_GATE else {}
        return module_cases.MODULES[self.kind].call(m, Given(graph, graph.graph_ptr, x, e), **how)


TAKE_A_GATE = ("NeighborhoodAttention", "EdgeGatedAttention", "LinearAttention")
MODULES = {
    "neighborhood": Defined("NeighborhoodAttention", {}, neighborhood, ("q", "k", "v", "out")),
    "grouped": Defined(
        "NeighborhoodAttention", {"kv_heads": 2}, neighborhood, ("q", "k", "v", "out")
    ),
    "edge": Defined(
        "EdgeGatedAttention",
        {"edge_dim": EDGE_DIM, "bias": True},
        edge_gated,
        ("q", "k", "v", "gate", "out", "edge_out"),
    ),
    "linear": Defined("LinearAttention", {}, linear, ("q", "k", "v", "out")),
    "performer": Defined(
        "PerformerAttention",
        {"head_channels": DIM // HEADS},
        performer,
        ("q", "k", "v", "attn_out"),
    ),
    "conv": Defined(
        "TransformerConv with edges",
        {"edge_dim": EDGE_DIM, "beta": True},
        transformer_conv,
        ("lin_query", "lin_key", "lin_value", "lin_edge", "lin_skip", "lin_beta"),
    ),
    "virtual node": Defined("VirtualNode", {}, virtual, ("update.0", "update.3")),
}


class LoRA(nn.Module):
    """As in peft's layers, weight and bias are those of the layer that is adapted."""

    def __init__(self, base):
        super().__init__()
        self.base_layer = base
        out_features, in_features = base.weight.shape
        self.down = nn.Linear(in_features, 2, bias=False).to(base.weight)
        self.up = nn.Linear(2, out_features, bias=False).to(base.weight)

    @property
    def weight(self):
        return self.base_layer.weight

    @property
    def bias(self):
        return self.base_layer.bias

    def forward(self, x):
        return self.base_layer(x) + self.up(self.down(x))


class Shifted(nn.Linear):
    def forward(self, x):
        return super().forward(x) + 0.25


class Doubled(nn.Module):
    def forward(self, weight):
        return 2 * weight


class Tripled(torch.Tensor):
    """A weight of a type of its own, as torchao's: products with it are three times as large."""

    @staticmethod
    def __new__(cls, inner):
        return torch.Tensor._make_wrapper_subclass(
            cls, inner.shape, dtype=inner.dtype, device=inner.device
        )

    def __init__(self, inner):
        self.inner = inner

    def __tensor_flatten__(self):
        return ["inner"], None

    @staticmethod
    def __tensor_unflatten__(inner, meta, size, stride):
        return Tripled(inner["inner"])

    def __deepcopy__(self, memo):
        return nn.Parameter(Tripled(self.inner.clone()), requires_grad=False)

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        if function is nn.functional.linear:
            x, weight, bias = (*args, *(kwargs or {}).values(), None)[:3]
            return nn.functional.linear(x, 3 * weight.inner, bias)
        return super().__torch_function__(function, types, args, kwargs or {})

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        if function in (torch.ops.aten.detach.default, torch.ops.aten.alias.default):
            return args[0]
        raise NotImplementedError(f"{function} of a Tripled weight")


def lora(layer):
    torch.manual_seed(1)
    return LoRA(layer)


def plain_sequence(layer):
    """It has neither weight nor sizes."""
    torch.manual_seed(1)
    width = len(layer.weight)
    return nn.Sequential(layer, nn.Linear(width, width).to(layer.weight))


def subclass(layer):
    layer.__class__ = Shifted
    return layer


def own_forward(layer):
    """As accelerate's hooks: the instance has a forward of its own."""
    layer.forward = lambda x: nn.functional.linear(x, layer.weight, layer.bias) - 0.5
    return layer


def biased(layer):
    if layer.bias is None:
        layer.bias = nn.Parameter(torch.linspace(-1, 1, len(layer.weight)).to(layer.weight))
    return layer


def own_weight(layer):
    layer.weight = nn.Parameter(Tripled(layer.weight.detach()), requires_grad=False)
    return layer


def forward_hook(layer):
    layer.register_forward_hook(lambda m, args, y: 2 * y)
    return layer


def forward_hook_with_kwargs(layer):
    layer.register_forward_hook(
        lambda m, args, kwargs, y: y + 1, with_kwargs=True, always_call=True
    )
    return layer


def forward_hook_in_front(layer):
    layer.register_forward_hook(lambda m, args, y: y * y)
    layer.register_forward_hook(lambda m, args, y: y + 1, prepend=True)
    return layer


def pre_hook(layer):
    layer.register_forward_pre_hook(lambda m, args: (3 * args[0],))
    return layer


def pre_hook_with_kwargs(layer):
    layer.register_forward_pre_hook(
        lambda m, args, kwargs: ((args[0] - 1,), kwargs), with_kwargs=True
    )
    return layer


def backward_hook(layer):
    layer.register_full_backward_hook(
        lambda m, dx, dy: tree_map(lambda t: None if t is None else 5 * t, dx)
    )
    return layer


def backward_pre_hook(layer):
    layer.register_full_backward_pre_hook(lambda m, dy: (7 * dy[0],))
    return layer


def parametrized(layer):
    parametrize.register_parametrization(layer, "weight", Doubled(), unsafe=True)
    return layer


def weight_norm(layer):
    layer = parametrizations.weight_norm(layer)
    with torch.no_grad():
        layer.parametrizations.weight.original0.mul_(1.5)
    return layer


def spectral_norm(layer):
    torch.manual_seed(1)
    return parametrizations.spectral_norm(layer)


def old_weight_norm(layer):
    with pytest.warns(FutureWarning):
        layer = nn.utils.weight_norm(layer)
    with torch.no_grad():
        layer.weight_g.mul_(1.5)
    return layer


def old_spectral_norm(layer):
    torch.manual_seed(1)
    return nn.utils.spectral_norm(layer)


def pruned(layer):
    layer = prune.l1_unstructured(layer, "weight", 0.5)
    with torch.no_grad():
        layer.weight_orig.mul_(1.5)  # the next call makes the weight of it
    return layer


CHANGES = [
    lora,
    plain_sequence,
    subclass,
    own_forward,
    biased,
    own_weight,
    forward_hook,
    forward_hook_with_kwargs,
    forward_hook_in_front,
    pre_hook,
    pre_hook_with_kwargs,
    backward_hook,
    backward_pre_hook,
    parametrized,
    weight_norm,
    spectral_norm,
    old_weight_norm,
    old_spectral_norm,
    pruned,
]


def run(module, call, dtype=FP64, gate=None, seed=None):
    """Outputs, and gradients of the inputs and parameters by name."""
    x, e, graph = batch(dtype)
    x, e = x.requires_grad_(), e.requires_grad_()
    found = call(module, x, e, graph, None if gate is None else gate.to(DEVICE, dtype))
    outs = found if isinstance(found, tuple) else (found,)
    weights = [torch.linspace(-1, 1, y.numel(), dtype=dtype, device=DEVICE) for y in outs]
    leaves = {"x": x, "e": e} | dict(module.named_parameters())
    leaves = {name: t for name, t in leaves.items() if t.requires_grad}
    loss = sum((w * y.flatten()).sum() for w, y in zip(weights, outs, strict=True))
    grads = torch.autograd.grad(loss, leaves.values(), allow_unused=True)
    named = {f"out {i}": y.detach() for i, y in enumerate(outs)}
    for (name, leaf), grad in zip(leaves.items(), grads, strict=True):
        named[f"d{name}"] = torch.zeros_like(leaf) if grad is None else grad
    return named


def changed(name, change, layers=None, dtype=FP64):
    """A module whose linear layers, or those of these names, are changed."""
    torch.manual_seed(0)
    module = MODULES[name].make().to(DEVICE, dtype)
    for path in layers or MODULES[name].layers:
        parent, _, short = path.rpartition(".")
        parent = module.get_submodule(parent)
        setattr(parent, short, change(getattr(parent, short)))
    return module


def assert_is_its_definition(make, name, gate, dtype=FP64, tolerance=1e-9):
    defined = MODULES[name]
    # one for each: a call may change a layer, as spectral norms in training do
    found = run(make(), defined.call, dtype, gate)
    wanted = run(make(), defined.definition, dtype, gate)
    assert found.keys() == wanted.keys()
    for key, x in wanted.items():
        close(found[key], x, key, tolerance)


GATED = ("neighborhood", "grouped", "edge", "linear")
CASES = [(name, gate) for name in MODULES for gate in GATES if name in GATED or gate == "no gate"]


@pytest.mark.parametrize("change", CHANGES, ids=lambda c: c.__name__)
@pytest.mark.parametrize(("name", "gate"), CASES)
def test_a_changed_layer_is_called(name, gate, change):
    """Each layer alone, and all of them."""
    layers = MODULES[name].layers
    for only in (*([layer] for layer in layers), layers):
        assert_is_its_definition(lambda only=only: changed(name, change, only), name, GATES[gate])
    # the change is one that can be seen
    plain, module = (changed(name, f) for f in (lambda layer: layer, change))
    found = [run(m, MODULES[name].call, gate=GATES["no gate"]) for m in (plain, module)]
    if change is not biased or name == "conv":
        assert any(not torch.equal(x, found[1].get(key, x)) for key, x in found[0].items())


@pytest.mark.parametrize(("name", "gate"), CASES)
def test_an_unchanged_layer_is_its_definition(name, gate):
    assert_is_its_definition(lambda: changed(name, lambda layer: layer), name, GATES[gate])


# TransformerConv has torch-geometric's own linear layers
@pytest.mark.parametrize(("name", "gate"), [case for case in CASES if case[0] != "conv"])
@pytest.mark.skipif(DEVICE != "cpu", reason="int8 layers run on a CPU")
@pytest.mark.filterwarnings("ignore:.*torch.ao.quantization.*:DeprecationWarning")
def test_layers_of_8_bits_are_called(name, gate):
    module = changed(name, lambda layer: layer, dtype=FP32)
    quantised = quantize_dynamic(module, {nn.Linear}, torch.qint8)
    assert not any(type(m) is nn.Linear for m in quantised.modules())
    quantised.eval()
    assert_is_its_definition(lambda: quantised, name, GATES[gate], FP32, 1e-5)


@pytest.fixture
def mesh(tmp_path):
    from torch import distributed
    from torch.distributed.device_mesh import init_device_mesh

    distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1
    )
    yield init_device_mesh("cpu", (1,))
    distributed.destroy_process_group()


@pytest.mark.parametrize("whole", [False, True], ids=["layers", "layers and module"])
@pytest.mark.parametrize(("name", "gate"), CASES)
@pytest.mark.skipif(DEVICE != "cpu", reason="the mesh is one of CPUs")
def test_sharded_layers_are_called(name, gate, whole, mesh):
    from torch.distributed.fsdp import fully_shard

    defined = MODULES[name]
    module = changed(name, lambda layer: layer)
    wanted = run(module, defined.definition, gate=GATES[gate])
    for path in defined.layers:
        fully_shard(module.get_submodule(path), mesh=mesh)
    if whole:
        fully_shard(module, mesh=mesh)
    x, e, graph = batch()
    x.requires_grad_()
    gates = None if GATES[gate] is None else GATES[gate].double()
    found = defined.call(module, x, e, graph, gates)
    outs = found if isinstance(found, tuple) else (found,)
    weights = [torch.linspace(-1, 1, y.numel(), dtype=FP64) for y in outs]
    sum((w * y.flatten()).sum() for w, y in zip(weights, outs, strict=True)).backward()
    for i, y in enumerate(outs):
        close(y.detach(), wanted[f"out {i}"], f"out {i}")
    close(x.grad, wanted["dx"], "dx")
    for key, p in module.named_parameters():
        grad = p.grad
        if hasattr(grad, "full_tensor"):
            grad = grad.full_tensor()
        close(torch.zeros_like(wanted[f"d{key}"]) if grad is None else grad, wanted[f"d{key}"], key)


GLOBAL_HOOKS = {
    "forward": lambda seen: torch_module.register_module_forward_hook(
        lambda m, args, y: seen.append(m)
    ),
    "forward pre": lambda seen: torch_module.register_module_forward_pre_hook(
        lambda m, args: seen.append(m)
    ),
    "backward": lambda seen: torch_module.register_module_full_backward_hook(
        lambda m, dx, dy: seen.append(m)
    ),
    "backward pre": lambda seen: torch_module.register_module_full_backward_pre_hook(
        lambda m, dy: seen.append(m)
    ),
}


@pytest.mark.parametrize("hook", GLOBAL_HOOKS)
@pytest.mark.parametrize(("name", "gate"), CASES)
def test_hooks_of_all_modules_see_every_layer(name, gate, hook):
    module, seen = changed(name, lambda layer: layer), []
    handle = GLOBAL_HOOKS[hook](seen)
    try:
        found = run(module, MODULES[name].call, gate=GATES[gate])
    finally:
        handle.remove()
    layers = [module.get_submodule(path) for path in MODULES[name].layers]
    # of no heads at all, no gradient is asked for before the last layer
    if "backward" not in hook or gate != "none left":
        assert {id(m) for m in layers} <= {id(m) for m in seen}
    for key, x in run(module, MODULES[name].definition, gate=GATES[gate]).items():
        close(found[key], x, key)


@pytest.mark.parametrize("change", [lora, forward_hook, parametrized], ids=lambda c: c.__name__)
@pytest.mark.parametrize(("name", "gate"), [c for c in CASES if c[1] in ("no gate", "[H]")])
def test_called_layers_compile_whole(name, gate, change, compiled_kernels):
    torch._dynamo.reset()
    module, call = changed(name, change), MODULES[name].call
    x, e, graph = batch()
    values = None if GATES[gate] is None else GATES[gate].to(DEVICE, FP64)
    compiled = torch.compile(
        lambda x, e: call(module, x, e, graph, values), backend="eager", fullgraph=True
    )
    found, wanted = compiled(x, e), call(module, x, e, graph, values)
    for y, z in zip(*(t if isinstance(t, tuple) else (t,) for t in (found, wanted)), strict=True):
        close(y, z)


def types(high, size):
    return torch.arange(size, device=DEVICE) % high


# name -> what it is, and its options
MODELS = {
    "nodes": ("GraphTransformer", {"layers": 2, "pe_dim": 2}),
    "edges": ("EdgeGraphTransformer", {"layers": 2, "pe_dim": 2, "edge_types": 4}),
    "graphs": ("GraphClassifier", {"layers": 2, "gated": True}),
    "gps": ("GraphGPS", {"layers": 2, "edge_types": 4}),
    "gps gated": (
        "GraphGPS",
        {"layers": 2, "local": "gatedgcn", "edge_types": 4, "last_edges": False},
    ),
    "packages": ("PackageClassifier", {"edge_kinds": 4}),
    "tokens": ("TokenPruning", {}),
}


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_models_call_every_layer_once(name, gated):
    kind, options = MODELS[name]
    model = module_cases.MODULES[kind].make(DIM, HEADS, **options).to(DEVICE)
    for layer in model.get_submodule("layers") if gated and name != "tokens" else ():
        layer.attention.head_gate = HeadGate(torch.tensor([0.0, 1.0, 1.0, 0.5])).to(DEVICE)
    calls = {path: 0 for path, m in model.named_modules() if path and not [*m.children()]}

    def count(path):
        def hook(m, args, y):
            calls[path] += 1

        return hook

    for path in calls:
        model.get_submodule(path).register_forward_hook(count(path))
    x, _, graph = batch(FP32)
    given = Given(
        graph,
        x=x,
        node_type=types(3, 9),
        edge_type=types(4, 18),
        pe=torch.ones(9, 2, device=DEVICE),
        word_ptr=torch.arange(10, device=DEVICE),
        word=types(5, 9),
    )
    module_cases.MODULES[kind].call(model, given)
    unused = () if name != "edges" else ("layers.1.attention.edge_out", "layers.1.edge_")
    for path, times in calls.items():
        expected = 0 if path.startswith(unused) else 1
        if path.endswith("attention.dropout") and name == "edges":
            expected = 1 if path.startswith("layers.1") else 2
        elif path == "dropout":  # of the words, and before the last layer
            expected = 2
        assert times == expected, path


REASONS = {
    "no layer": lambda: None,
    "a lazy layer": lambda: nn.LazyLinear(3),
    "identity": nn.Identity,
} | {change.__name__: lambda change=change: change(nn.Linear(4, 3)) for change in CHANGES}
del REASONS["biased"]  # a bias is a plain layer's


@pytest.mark.parametrize("reason", REASONS)
def test_what_is_no_plain_linear_layer(reason):
    assert not is_plain_linear(REASONS[reason]())


def test_what_is_a_plain_linear_layer():
    layer = nn.Linear(4, 3)
    for plain in (layer, nn.Linear(4, 3, bias=False), copy.deepcopy(layer), layer.bfloat16()):
        assert is_plain_linear(plain)
    assert is_plain_linear(layer.requires_grad_(False).eval())
    with torch.device("meta"):
        assert is_plain_linear(nn.Linear(4, 3))
    layer = nn.Linear(4, 3)
    layer.compile(backend="eager")
    assert not is_plain_linear(layer)
    layer = nn.Linear(4, 3)
    layer.register_forward_hook(lambda m, args, y: None).remove()
    layer.register_full_backward_hook(lambda m, dx, dy: None).remove()
    assert is_plain_linear(layer)
    layer.register_full_backward_pre_hook(lambda m, dy: None)
    assert not is_plain_linear(layer)
    layer = nn.Linear(4, 3)
    layer.bias = nn.Parameter(Tripled(layer.bias.detach()), requires_grad=False)
    assert not is_plain_linear(layer)
    layer = prune.remove(pruned(nn.Linear(4, 3)), "weight")
    assert is_plain_linear(layer)
    layer = nn.utils.remove_spectral_norm(old_spectral_norm(nn.Linear(4, 3)))
    assert is_plain_linear(layer)


CHANGES_BUT_BIAS = [change for change in CHANGES if change is not biased]


@pytest.mark.parametrize("change", CHANGES_BUT_BIAS, ids=lambda c: c.__name__)
@pytest.mark.parametrize("name", GATED)
def test_heads_of_a_changed_layer_are_not_taken_away(name, change):
    plain = changed(name, lambda layer: layer)
    for layer in MODULES[name].layers:
        module = changed(name, change, [layer])
        before = module.state_dict()
        refusal = f"'{layer}' .*remove that before|'{layer}' is no plain nn.Linear, .* got "
        if before.keys() == plain.state_dict().keys():
            with pytest.raises(ValueError, match=refusal):
                prune_heads(module, state_dict=plain.state_dict())
        module.head_gate = HeadGate(torch.tensor([0.0, 1.0, 0.0, 1.0])).to(DEVICE)
        with pytest.raises(ValueError, match=refusal):
            prune_heads(module)
        assert module.heads == HEADS


def test_weights_that_are_made_are_not_pruned():
    """Nor does a refusal leave masks in the layers before it."""
    for change in (parametrized, weight_norm, old_weight_norm, spectral_norm, own_weight):
        net = nn.Sequential(nn.Linear(4, 4), change(nn.Linear(4, 4)))
        with pytest.raises(ValueError, match=r"the weight of '1' .*(made by|Tripled)"):
            GradualPruning(net, 0.5, end=5)
        assert not hasattr(net[0], "weight_mask")
    # an adapter's layers are layers as others are
    net = nn.Sequential(nn.Linear(4, 4), lora(nn.Linear(4, 4)))
    pruning = GradualPruning(net, 0.5, end=1)
    pruning.step()
    assert pruning.pruned() == (16 + 16 + 8 + 8) // 2
    net(torch.randn(3, 4)).sum().backward()
    assert net[1].base_layer.weight_orig.grad.any()
