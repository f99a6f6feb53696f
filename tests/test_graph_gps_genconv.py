"""GENConv against torch-geometric's, weights copied, and with a learnt temperature."""

import pytest
import torch
from attention_cases import DEVICE, FAST
from gps_cases import DIM, FP64, batch, check, run
from literal_layers import perturbed

from fastgt import Graph, implementation
from fastgt.models.graph_gps_layer import GraphGPSLayer
from fastgt.models.graph_gps_local import GENConv

pytestmark = pytest.mark.usefixtures("one_thread")

THEIRS = {"mlp.0": "mlp.0", "mlp.1": "mlp.1", "mlp.3": "mlp.4", "temperature": "aggr_module.t"}


def names_there(state):
    for ours, theirs in THEIRS.items():
        state = {
            theirs + k.removeprefix(ours) if k.startswith(ours) else k: x for k, x in state.items()
        }
    return state


@pytest.mark.parametrize("learn", [False, True])
@pytest.mark.parametrize("train", [False, True])
def test_same_as_torch_geometric(learn, train):
    pyg = pytest.importorskip("torch_geometric.nn")
    torch.manual_seed(0)
    graph = batch()
    layer = perturbed(GENConv(DIM, learn_temperature=learn)).to(DEVICE, FP64).train(train)
    theirs = pyg.GENConv(DIM, DIM, learn_t=learn).to(DEVICE, FP64).train(train)
    assert dict(pyg.GENConv(DIM, DIM).named_parameters()).keys() == {
        THEIRS[k.rpartition(".")[0]] + "." + k.rpartition(".")[2]
        for k, _ in GENConv(DIM).named_parameters()
    }
    theirs.load_state_dict(names_there(layer.state_dict()))
    n, edges = graph.num_rows, graph.num_edges
    tensors = {
        "x": torch.randn(n, DIM, dtype=FP64, device=DEVICE),
        "e": torch.randn(edges, DIM, dtype=FP64, device=DEVICE),
    }
    upstream = [torch.randn(n, DIM, dtype=FP64, device=DEVICE)]
    found = run(layer, lambda m, x, e: [m(x, graph, e)], tensors, upstream)
    wanted = run(theirs, lambda m, x, e: [m(x, graph.edge_index, e)], tensors, upstream)
    ours = {
        "d " + name: "d " + there
        for name, there in zip(
            dict(layer.named_parameters()), names_there(dict(layer.named_parameters())), strict=True
        )
    }
    assert len(ours) == 4 + learn
    for name, x in found.items():
        torch.testing.assert_close(x, wanted[ours.get(name, name)], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("impl", ["reference", *FAST])
def test_a_learnt_temperature_is_in_the_equations(impl):
    check("genconv", "none", impl, learn_temperature=True)


def test_large_messages_do_not_overflow():
    """Messages of 1,000: their exponentials are infinite."""
    layer = GENConv(2).eval()
    graph = Graph.from_edge_index(torch.tensor([[0, 1], [2, 2]]), 3)
    x = torch.tensor([[1000.0, 0.0], [990.0, 1000.0], [0.0, 0.0]])
    found = layer(x, graph, torch.zeros(2, 2))
    wanted = layer.mlp(torch.tensor([[1000.0, 0.0], [990.0, 1000.0], [999.9995, 1000.0]]))
    torch.testing.assert_close(found, wanted)


def test_a_temperature_of_one_is_drawn_anew():
    layer = GraphGPSLayer(DIM, 2, local="genconv", learn_temperature=True)
    layer.local.temperature.data.fill_(3)
    layer.reset_parameters()
    assert layer.local.temperature.tolist() == [1.0]
    assert GENConv(DIM).temperature is None


def test_one_node_is_too_few_for_its_batch_norm():
    graph = Graph.from_edge_index(torch.tensor([[0], [0]]), 1)
    layer = GraphGPSLayer(DIM, 2, local="genconv", norm="none")
    x, e = torch.randn(1, DIM), torch.randn(1, DIM)
    with pytest.raises(ValueError, match="mlp of GENConv is a batch norm in training and got 1 no"):
        layer(x, e, graph)
    assert layer.eval()(x, e, graph)[0].isfinite().all()


def test_no_edge_leaves_the_node_itself():
    layer = GENConv(DIM).eval()
    graph = Graph.from_edge_index(torch.zeros(2, 0, dtype=torch.long), 4)
    x = torch.randn(4, DIM)
    torch.testing.assert_close(layer(x, graph, torch.zeros(0, DIM)), layer.mlp(x))


def test_implementations_of_mixed_precision():
    torch.manual_seed(0)
    graph, layer = batch(), GENConv(DIM, learn_temperature=True).to(DEVICE).eval()
    x, e = torch.randn(13, DIM, device=DEVICE), torch.randn(graph.num_edges, DIM, device=DEVICE)
    wanted = layer(x, graph, e)
    with torch.autocast(DEVICE, torch.bfloat16), implementation("reference"):
        found = layer(x, graph, e)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), wanted, rtol=0.05, atol=0.05)
