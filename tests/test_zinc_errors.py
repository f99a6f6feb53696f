"""tools/zinc_errors.py: errors of molecules by their largest ring."""

import torch
import train_cases
import zinc_errors

from fastgt import Graph
from fastgt.datasets import load
from fastgt.training.published_recipes import MODELS, RECIPES


def ring(n, at=0):
    ends = torch.arange(n)
    there = torch.stack([ends, (ends + 1) % n])
    return torch.cat([there, there.flip(0)], 1) + at


def test_the_largest_ring_is_of_a_shortest_basis():
    tree = torch.tensor([[0, 1, 1, 2], [1, 0, 2, 1]])
    # two hexagons that share an edge: the ring around both is none of a shortest basis
    fused = torch.cat([ring(6), *(torch.tensor([[a, b], [b, a]]) for a, b in FUSED)], 1)
    graphs = [
        Graph.from_edge_index(tree, 3),
        Graph.from_edge_index(ring(9), 9),
        Graph.from_edge_index(fused, 10),
        Graph.from_edge_index(torch.empty(2, 0, dtype=torch.int64), 1),
        Graph.from_edge_index(torch.cat([ring(5), ring(7, 5)], 1), 12),
    ]
    assert zinc_errors.largest_rings(Graph.batch(graphs)).tolist() == [0, 9, 6, 0, 7]


FUSED = (1, 6), (6, 7), (7, 8), (8, 9), (9, 0)


def test_errors_are_those_of_the_best_epoch(tmp_path):
    data = load("zinc12k", train_cases.write(tmp_path).parent)
    torch.manual_seed(0)
    recipe = RECIPES["edge_graph_transformer", "zinc12k"]
    model = MODELS[recipe.model].make(recipe.config).eval()
    with torch.no_grad():
        for p in model.readout[-1].parameters():
            p.zero_()
        model.readout[-1].bias.fill_(2.0)  # whatever the molecule
    torch.save({"model": model.state_dict(), "epoch": 7}, tmp_path / "best.pt")
    rows = zinc_errors.errors(recipe.model, data, tmp_path)
    assert [(x["split"], x["rings"]) for x in rows] == [
        (split, group) for split in ("val", "test") for group in zinc_errors.GROUPS
    ]
    for split, row in (("val", rows[0]), ("test", rows[3])):
        y = data.batch(data.splits[split]).y.flatten()
        assert row["graphs"] == len(y)
        assert row["epoch"] == 7
        torch.testing.assert_close(row["mae"], (y - 2).abs().mean().item())
    for every, small, large in (rows[:3], rows[3:]):
        assert small["graphs"] + large["graphs"] == every["graphs"]
    text = zinc_errors.table(rows)
    assert f"| `edge_graph_transformer` | 7 | val | all | {rows[0]['graphs']} |" in text
