"""head_gate of channelwise_attention: a masked head is a head that is not there."""

from dataclasses import replace

import pytest
import torch
from attention_cases import DEVICE, FAST, FP32, FP64, IMPLS, all_close, close
from channelwise_cases import PLANES, TERMS, attend, case, evaluate
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_attention_gate import GATES, in_graphs, rows_of
from torch._dynamo.testing import CompileCounterWithBackend

from fastgt import channelwise_attention

WAYS = [*IMPLS, "buckets"]


def evaluate_gated(x, gate, way, **more):
    """As ``evaluate``, with the gate's gradient where it is not bool."""
    names = [name for name in ("logits", "v", "edge_value") if getattr(x, name) is not None]
    leaves = {name: getattr(x, name).detach().requires_grad_() for name in names}
    y = replace(x, **leaves)
    if gate.dtype != torch.bool:
        gate = gate.detach().clone().requires_grad_()
        leaves["gate"] = gate
    o, lse, weights = attend(y, way, head_gate=gate, **more)
    upstream = x.do, x.dlse
    grads = torch.autograd.grad((o, lse), list(leaves.values()), upstream, materialize_grads=True)
    found = {"o": o, "lse": lse, "weights": weights}
    found |= {f"d{name}": g for name, g in zip(leaves, grads, strict=True)}
    return {name: t.detach() for name, t in found.items()}


def without(x, gate):
    """By the plain definition without gates, masked heads' results and gradients taken away."""
    rows = rows_of(x, gate)[..., None]
    on = rows != 0
    plain = replace(x, do=torch.where(on, x.do * rows, 0), dlse=torch.where(on, x.dlse, 0))
    found = evaluate(plain, "reference")
    per_row = torch.where(on, x.do * found["o"], 0).sum(2)
    parts = per_row.split(x.graph.graph_ptr.diff().tolist())
    found["dgate"] = torch.stack([part.sum(0) for part in parts])
    found["dgate"] = found["dgate"].sum(0) if gate.ndim == 1 else found["dgate"]
    found["o"] = torch.where(on, found["o"] * rows, 0)
    found["lse"] = torch.where(on, found["lse"], -torch.inf)
    found["weights"] = torch.where(on[x.target], found["weights"], 0)
    return found


@pytest.mark.parametrize("per_graph", [False, True])
@pytest.mark.parametrize("way", WAYS)
def test_masked_is_removed(way, per_graph):
    few = way in ("triton", "buckets") and DEVICE == "cpu"

    @settings(max_examples=8 if few else 50, suppress_health_check=list(HealthCheck))
    @given(
        data=st.data(),
        seed=st.integers(0, 2**31),
        heads=st.integers(1, 4),
        width=st.sampled_from([1, 3, 8, 20]),
        rows=st.integers(1, 12 if few else 50),
        edges=st.integers(0, 40 if few else 200),
        terms=st.sampled_from(TERMS),
        layout=st.sampled_from(["contiguous", "transposed", *PLANES]),
        clamped=st.booleans(),
        eps=st.sampled_from([0.0, 0.5]),
    )
    def check(data, seed, heads, width, rows, edges, terms, layout, clamped, eps):
        how = {"terms": terms, "layout": layout, "clamped": clamped, "eps": eps, "isolated": 1}
        x = in_graphs(case(seed, rows, edges, channels=(heads, width), **how))
        graphs = 4 if per_graph else 1
        gate = data.draw(st.lists(GATES, min_size=graphs * heads, max_size=graphs * heads))
        gate = torch.tensor(gate, dtype=FP64, device=DEVICE).view(graphs, heads)
        gate = gate if per_graph else gate[0]
        all_close(evaluate_gated(x, gate, way), without(x, gate), 1e-8)

    check()


def test_wide_heads_and_long_rows_on_a_cpu():
    """More channels than go together, and a row beyond a chunk."""
    x = in_graphs(case(1, 6, 300, channels=(5, 70), kind="hub", dtype=FP64))
    gate = torch.tensor([1.0, 0.0, 2.0, 1.0, 0.0], dtype=FP64, device=DEVICE)
    all_close(evaluate_gated(x, gate, FAST[0]), without(x, gate), 1e-8)
    gate = gate.repeat(4, 1)
    gate[2, 0], gate[0, 4] = 0, 1
    all_close(evaluate_gated(x, gate, FAST[0]), without(x, gate), 1e-8)


@pytest.mark.skipif(DEVICE != "cpu", reason="tasks are those of the path on a CPU")
def test_many_tasks():
    x = in_graphs(case(1, 400, 2000, channels=(3, 4)))
    gate = torch.tensor([[1.0, 0.0, 2.0]] * 2 + [[0.0, 1.0, 0.5]] * 2, dtype=FP64)
    all_close(evaluate_gated(x, gate, "cpp"), without(x, gate), 1e-8)


@pytest.mark.parametrize("per_graph", [False, True])
@pytest.mark.parametrize("way", WAYS)
def test_nan_in_a_masked_head_changes_nothing(way, per_graph):
    x = in_graphs(case(2, 12, 50, channels=(3, 5)))
    gate = torch.rand(4, 3, dtype=FP64, device=DEVICE) + 0.5
    gate[:, 1] = 0
    if per_graph:
        gate[2, 0], gate[3] = 0, 0
    gate = gate if per_graph else gate[0]
    clean = evaluate_gated(x, gate, way)
    off = rows_of(x, gate) == 0
    for t, mask in ((x.logits, off[x.target]), (x.v, off), (x.edge_value, off[x.target])):
        t[mask] = torch.nan
    all_close(evaluate_gated(x, gate, way), clean)
    x.do[off], x.dlse[off] = torch.nan, torch.nan
    found = evaluate_gated(x, gate != 0, way)
    assert "dgate" not in found
    for name, t in found.items():
        mask = off[x.target] if name in ("weights", "dlogits", "dedge_value") else off
        assert (t[mask] == -torch.inf).all() if name == "lse" else not t[mask].any(), name
        assert not t.isnan().any(), name


@pytest.mark.parametrize("impl", IMPLS)
def test_a_gate_of_0_gets_the_exact_gradient_on_request(impl):
    x = in_graphs(case(3, channels=(3, 4)))
    gate = torch.tensor([1.0, 0.0, -0.5], dtype=FP64, device=DEVICE)
    wanted = (x.do * evaluate(x, "reference")["o"]).sum((0, 2))
    dense = evaluate_gated(x, gate, impl, dense_gate_grad=True)
    close(dense["dgate"], wanted, "dgate")
    sparse = evaluate_gated(x, gate, impl)
    close(sparse["dgate"], torch.where(gate == 0, 0, wanted), "dgate")
    for name in set(sparse) - {"dgate"}:
        close(sparse[name], dense[name], name)


@pytest.mark.parametrize("impl", FAST)
def test_second_derivatives(impl):
    x = in_graphs(case(6, 6, 14, channels=(2, 2)))
    gate = torch.tensor([0.7, 0.0], dtype=FP64, device=DEVICE)
    leaves = [t.detach().clone().requires_grad_() for t in (x.logits, x.v, x.edge_value)]

    def call(logits, v, edge_value):
        more = {"edge_value": edge_value, "head_gate": gate, "impl": impl}
        return channelwise_attention(logits, v, x.graph, **more)

    assert torch.autograd.gradgradcheck(call, leaves)
    first = torch.autograd.grad(call(*leaves).square().sum(), leaves[0], create_graph=True)[0]
    (second,) = torch.autograd.grad(first.square().sum(), leaves[1])
    assert second[:, 0].any()
    assert not second[:, 1].any()


@pytest.mark.parametrize("impl", FAST)
def test_compiles_once_for_all_gates(impl):
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(channelwise_attention, fullgraph=True, dynamic=True, backend=counter)
    counts = []
    for seed, on in enumerate([(1.0, 0.0), (0.0, 2.0), (0.0, 0.0)]):
        x = in_graphs(case(seed, 12 + seed, 40 + seed, channels=(2, 6), dtype=FP32))
        call = {"head_gate": torch.tensor(on, device=DEVICE), "impl": impl}
        leaves = [t.detach().clone().requires_grad_() for t in (x.logits, x.v)]
        found = []
        for attend_with in (compiled, channelwise_attention):
            out = attend_with(*leaves, x.graph, **call)
            found.append([out, *torch.autograd.grad(out, leaves, x.do)])
        for a, b in zip(*found, strict=True):
            assert torch.equal(a, b)
        counts.append(counter.frame_count)
    assert counts[1] == counts[2]


def test_refusals():
    x = in_graphs(case(6, channels=(2, 3), dtype=FP32))
    one = torch.ones(2, device=DEVICE)
    with pytest.raises(ValueError, match=r"head_gate needs logits \[E, H, D\], got \[40, 6\]"):
        channelwise_attention(x.logits.flatten(1), x.v.flatten(1), x.graph, head_gate=one)
    with pytest.raises(ValueError, match=r"head_gate must be \[H\] = \[2\] or \[G, H\] = \[4, 2\]"):
        channelwise_attention(x.logits, x.v, x.graph, head_gate=torch.ones(3, device=DEVICE))
