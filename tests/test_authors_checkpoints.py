"""Checkpoints of the authors' models give here what they give there."""

from itertools import pairwise

import pytest
import torch
from torch import nn
from torch.nn.functional import relu

from fastgt import Graph
from fastgt.models import (
    EdgeGraphTransformer,
    EdgeGraphTransformerConfig,
    GraphTransformer,
    GraphTransformerConfig,
    graph_transformer_state_dict,
)
from fastgt.testing import random_edge_index

DIM, HEADS, N, E = 16, 4, 12, 40


class Attention(nn.Module):
    def __init__(self, edges):
        super().__init__()
        for name in "QKV":
            setattr(self, name, nn.Linear(DIM, DIM, bias=False))
        if edges:
            self.proj_e = nn.Linear(DIM, DIM, bias=False)

    def forward(self, h, e, index):
        q, k, v = (getattr(self, x)(h).view(-1, HEADS, DIM // HEADS) for x in "QKV")
        source, target = index
        score = k[source] * q[target] / (DIM // HEADS) ** 0.5
        if e is not None:
            score = score * self.proj_e(e).view_as(score)
        w = score.sum(-1, keepdim=True).clamp(-5, 5).exp()
        total = torch.zeros(len(h), HEADS, 1).to(w).index_add(0, target, w)
        out = torch.zeros_like(v).index_add(0, target, w * v[source])
        eps = 0.0 if e is None else 1e-6
        return (out / (total + eps)).flatten(1), score.flatten(1)


class Layer(nn.Module):
    """Under the authors' names: `_h` and `_e` where there are edges."""

    def __init__(self, edges, norm):
        super().__init__()
        self.norm, self.kinds = norm, ("_h", "_e") if edges else ("",)
        self.attention = Attention(edges)
        for x in self.kinds:
            setattr(self, f"O{x}", nn.Linear(DIM, DIM))
            setattr(self, f"FFN{x}_layer1", nn.Linear(DIM, 2 * DIM))
            setattr(self, f"FFN{x}_layer2", nn.Linear(2 * DIM, DIM))
            for i in "12":
                kind = nn.BatchNorm1d if norm == "batch" else nn.LayerNorm
                setattr(self, f"{norm}_norm{i}{x}", kind(DIM))

    def forward(self, h, e, index):
        found = self.attention(h, e, index)
        out = []
        for x, given, new in zip(self.kinds, (h, e), found, strict=False):
            part = lambda name, x=x: getattr(self, name.replace("*", x))  # noqa: E731
            y = part(f"{self.norm}_norm1*")(given + part("O*")(new))
            ffn = part("FFN*_layer2")(relu(part("FFN*_layer1")(y)))
            out.append(part(f"{self.norm}_norm2*")(y + ffn))
        return out if len(out) == 2 else (out[0], None)


class Readout(nn.Module):
    def __init__(self, out):
        super().__init__()
        sizes = DIM, DIM // 2, DIM // 4, out
        self.FC_layers = nn.ModuleList(nn.Linear(*pair) for pair in pairwise(sizes))

    def forward(self, y):
        for layer in self.FC_layers[:-1]:
            y = relu(layer(y))
        return self.FC_layers[-1](y)


class Net(nn.Module):
    def __init__(self, edges, norm):
        super().__init__()
        self.embedding_h = nn.Embedding(5, DIM)
        self.embedding_lap_pos_enc = nn.Linear(3, DIM)
        if edges:
            self.embedding_e = nn.Embedding(4, DIM)
        self.layers = nn.ModuleList(Layer(edges, norm) for _ in range(2))
        self.MLP_layer = Readout(2)

    def forward(self, h, e, index, pe):
        h = self.embedding_h(h) + self.embedding_lap_pos_enc(pe)
        e = None if e is None else self.embedding_e(e)
        for layer in self.layers:
            h, e = layer(h, e, index)
        return self.MLP_layer(h if e is None else h.mean(0, keepdim=True))


@pytest.mark.parametrize("norm", ["batch", "layer"])
@pytest.mark.parametrize("edges", [False, True])
def test_graph_transformer(edges, norm):
    torch.manual_seed(0)
    theirs = Net(edges, norm).double().eval()
    for module in theirs.modules():
        if isinstance(module, nn.BatchNorm1d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
    sizes = {"node_types": 5, "out_dim": 2, "dim": DIM, "heads": HEADS, "layers": 2, "pe_dim": 3}
    if edges:
        ours = EdgeGraphTransformer(EdgeGraphTransformerConfig(edge_types=4, norm=norm, **sizes))
    else:
        ours = GraphTransformer(GraphTransformerConfig(norm=norm, **sizes))
    ours = ours.double().eval()
    ours.load_state_dict(graph_transformer_state_dict(theirs.state_dict()))
    # a row without edges is NaN in theirs
    index = torch.cat([random_edge_index(0, N, E), torch.arange(N).expand(2, -1)], 1)
    h, pe = torch.randint(5, (N,)), torch.randn(N, 3, dtype=torch.float64)
    e = torch.randint(4, (index.shape[1],)) if edges else None
    graph = Graph.from_edge_index(index, N)
    found = ours(h, e, graph, pe) if edges else ours(h, graph, pe)
    torch.testing.assert_close(found, theirs(h, e, index, pe))


def test_other_names_are_refused():
    with pytest.raises(ValueError, match=r"'embedding_wl_pos_enc\.weight' is no parameter"):
        graph_transformer_state_dict({"embedding_wl_pos_enc.weight": torch.zeros(1)})
