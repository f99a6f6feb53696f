"""The Transformer over eigenvectors against its equations, and against PyTorch's own."""

from itertools import pairwise

import pytest
import torch
from attention_cases import DEVICE
from literal_layers import assert_same, perturbed, spectral_encoder
from torch import nn

from fastgt.models.spectral_encoder import SpectralEncoder
from fastgt.testing import random_batch

FP64 = torch.float64
SIZES = [(6, 12), (0, 0), (7, 20), (1, 1), (3, 0)]
pytestmark = pytest.mark.usefixtures("one_thread")


def batch():
    return random_batch(3, SIZES, device=DEVICE)


def spectrum(graph):
    """Eigenpairs that are no eigenpairs; small graphs have fewer."""
    vectors = torch.randn(graph.num_rows, 4, dtype=FP64, device=DEVICE)
    values = torch.rand(graph.num_graphs, 4, dtype=FP64, device=DEVICE)
    for g, (first, last) in enumerate(pairwise(graph.graph_ptr.tolist())):
        values[g, last - first :] = torch.nan
        vectors[first:last, last - first :] = torch.nan
    return vectors, values


def small(layers=2, heads=2):
    torch.manual_seed(0)
    encoder = SpectralEncoder(4, 6, heads=heads, layers=layers, hidden_dim=10)
    return perturbed(encoder).to(DEVICE, FP64).eval()


def torchs_encoder(encoder, dropout=0.0):
    """PyTorch's own, with the same weights."""
    d, first = encoder.dim, encoder.layers[0]
    layer = nn.TransformerEncoderLayer(
        d, first.attention.heads, first.ffn[0].out_features, dropout, batch_first=True
    )
    theirs = nn.TransformerEncoder(layer, len(encoder.layers), enable_nested_tensor=False)
    names = {
        "self_attn.out_proj": "attention.out",
        "linear1": "ffn.0",
        "linear2": "ffn.3",
        "norm1": "norm1",
        "norm2": "norm2",
    }
    state = {}
    for i, ours in enumerate(encoder.layers):
        own = ours.state_dict()
        for kind in ("weight", "bias"):
            joined = torch.cat([own[f"attention.{part}.{kind}"] for part in "qkv"])
            state[f"layers.{i}.self_attn.in_proj_{kind}"] = joined
            for name, mine in names.items():
                state[f"layers.{i}.{name}.{kind}"] = own[f"{mine}.{kind}"]
    theirs.load_state_dict(state)
    return theirs.to(DEVICE, FP64)


@pytest.mark.parametrize(("layers", "heads"), [(1, 1), (2, 3)])
def test_the_encoder_is_its_equations_and_pytorchs(layers, heads):
    encoder, graph = small(layers, heads), batch()
    vectors, values = spectrum(graph)
    vectors[5] = torch.nan  # a node without a token
    absent = vectors.isnan()
    there = {"u": vectors.nan_to_num(), "w": values.nan_to_num()}

    def ours(m, u, w):
        return m(torch.where(absent, torch.nan, u), w, graph)

    def theirs(m, u, w):
        return spectral_encoder(m, torch.where(absent, torch.nan, u), w, graph)

    assert_same(encoder, ours, theirs, there)
    owner = torch.repeat_interleave(
        torch.arange(graph.num_graphs, device=DEVICE), graph.graph_ptr.diff()
    )
    pairs = torch.stack([vectors, values[owner]], 2).nan_to_num()
    masked = absent & ~absent.all(1, keepdim=True)  # PyTorch's gives NaN where all are left out
    tokens = torchs_encoder(encoder)(encoder.lin(pairs), src_key_padding_mask=masked)
    wanted = tokens.masked_fill(absent[..., None], 0).sum(1)
    torch.testing.assert_close(encoder(vectors, values, graph), wanted, rtol=1e-10, atol=1e-10)


def test_a_node_without_eigenvectors_gets_zero():
    encoder, graph = small(), batch()
    vectors, values = spectrum(graph)
    vectors[5] = torch.nan
    found = encoder(vectors, values, graph)
    assert not found[5].any()
    assert found.isfinite().all()


def test_signs_are_flipped_in_training_alone():
    encoder, graph = small(), batch()
    vectors, values = spectrum(graph)
    assert torch.equal(encoder(vectors, values, graph), encoder(vectors, values, graph))
    encoder.train()
    for layer in encoder.modules():
        if isinstance(layer, nn.Dropout):
            layer.p = 0.0
        if hasattr(layer, "attention"):
            layer.attention.dropout = 0.0
    found = {encoder(vectors, values, graph).sum().item() for _ in range(40)}
    assert 2 <= len(found) <= 16


def test_dropout_is_that_of_pytorch():
    torch.manual_seed(0)
    encoder = perturbed(SpectralEncoder(5, 8, heads=2, layers=1, dropout=0.1)).to(DEVICE, FP64)
    theirs = torchs_encoder(encoder, dropout=0.1).layers[0]
    x, there = torch.randn(6, 5, 8, dtype=FP64), torch.rand(6, 5) < 0.7
    there[:, 0] = True
    x, there = x.to(DEVICE), there.to(DEVICE)
    bias = x.new_zeros(30).masked_fill(~there.flatten(), -torch.inf)[:, None]
    offsets = 5 * torch.arange(7, device=DEVICE)
    layer = encoder.layers[0]
    draws = [
        [layer(x.flatten(0, 1), offsets, bias).view(6, 5, 8) for _ in range(300)],
        [theirs(x, src_key_padding_mask=~there) for _ in range(300)],
    ]
    assert not torch.equal(*draws[0][:2])
    a, b = (torch.stack(y).detach()[:, there].std(0).mean() for y in draws)
    assert (a / b).item() == pytest.approx(1, abs=0.1)
