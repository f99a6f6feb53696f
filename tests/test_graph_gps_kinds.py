"""Every pair of message passing and global attention makes a model that learns a batch by heart."""

import pytest
import torch
from attention_cases import DEVICE
from gps_cases import ATTENTION, LOCAL, NO_ENCODINGS, WITH_EDGES, inputs, small
from torch.nn import functional as F

from fastgt.testing import random_batch

pytestmark = pytest.mark.usefixtures("one_thread")
PAIRS = [(a, b) for a in LOCAL for b in ATTENTION if not a == b == "none"]


@pytest.mark.parametrize(("local", "attention"), PAIRS)
def test_a_batch_is_learnt_by_heart(local, attention):
    torch.manual_seed(0)
    edges = {} if local in WITH_EDGES else {"edge_types": ()}
    options = {"local": local, "attention": attention, "last_edges": False, "norm": "graph"}
    # in a readout that narrows, all ReLUs may be 0
    options |= {"head": "default", "head_layers": 1, "pooling": "mean"}
    options |= {"layers": 1, "performer_width": 8}
    model = small(**NO_ENCODINGS | edges | options)
    graph = random_batch(5, [(6, 14), (5, 12), (17, 30), (4, 8)], device=DEVICE)
    given = inputs(model, graph)
    wanted = torch.tensor([[0.5], [-1.0], [1.0], [-0.5]], device=DEVICE)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.03)
    losses = []
    for _ in range(40):
        optimizer.zero_grad()
        loss = F.mse_loss(model(graph=graph, **given), wanted)
        loss.backward()
        if not losses:
            assert all(p.grad is not None for p in model.parameters())
        optimizer.step()
        losses.append(loss.item())
    assert min(losses[-10:]) < 0.05 * losses[0], (losses[0], losses[-1])
