"""A graph transformer learns a property of molecules from their atoms and bonds.

    python examples/molecules.py

The molecules are drawn. The property is the energy of a pi electron by Hueckel's method. A batch is
one graph of many molecules, without padding, and the model pools each of them.
"""

import random

import torch

from fastgt import Graph
from fastgt.encodings import laplacian_pe
from fastgt.models import EdgeGraphTransformer, EdgeGraphTransformerConfig

C, N, SINGLE, DOUBLE, AROMATIC = 0, 1, 0, 1, 2
OF_ATOM, OF_BOND = torch.tensor([0.0, 0.5]), torch.tensor([0.9, 1.1, 1.0])  # Hueckel's numbers


def molecule():
    atoms, bonds = [], []
    for size in random.choices([2, 6], k=random.randint(2, 5)):
        first, last = len(atoms), len(atoms) + size - 1
        atoms += [C, *random.choices([C, N], [3, 1], k=size - 2), C]
        bonds += [(i, i + 1, AROMATIC if size == 6 else DOUBLE) for i in range(first, last)]
        bonds += [(first, last, AROMATIC)] if size == 6 else []
        bonds += [(first - 1, first, SINGLE)] if first else []
    bonds += [(j, i, kind) for i, j, kind in bonds]
    atom, (source, target, bond) = torch.tensor(atoms), torch.tensor(bonds).T
    hueckel = torch.diag(OF_ATOM[atom])
    hueckel[source, target] = OF_BOND[bond]
    energy = torch.linalg.eigvalsh(hueckel)[len(atoms) // 2 :].mean()  # each has two electrons
    graph = Graph.from_edge_index(torch.stack([source, target]), len(atoms))
    return atom, bond, graph, laplacian_pe(graph, 4), energy


def error(molecules):
    atom, bond, graphs, pe, energy = zip(*molecules, strict=True)
    out = model(torch.cat(atom), torch.cat(bond), Graph.batch(graphs), torch.cat(pe))
    return (mean + std * out[:, 0] - torch.stack(energy)).abs().mean()


random.seed(0)
torch.manual_seed(0)
train, test = ([molecule() for _ in range(count)] for count in (256, 128))
std, mean = torch.std_mean(torch.stack([energy for *_, energy in train]))
model = EdgeGraphTransformer(EdgeGraphTransformerConfig(2, 3, dim=32, layers=3, pe_dim=4))
optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
print(f"{len(train)} molecules, energies {mean:.3f} +- {std:.3f}")
for epoch in range(1, 21):
    model.train()
    for part in torch.randperm(256).split(32):
        loss = error([train[i] for i in part])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    if epoch in (1, 5, 20):
        model.eval()
        print(f"epoch {epoch}: error of new molecules {error(test).item():.4f}")
