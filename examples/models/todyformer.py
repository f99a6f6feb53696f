"""Todyformer on flights: which pairs of airports have a flight next, and against what that stands.

    python examples/models/todyformer.py --data FOLDER

Trains Todyformer, and the same model with means in the place of its softmaxes, on the same batches.
A step predicts the next flights from those before them, against pairs without one. Then both are
compared with counts: how many flights a pair had (popularity), and whether it had one, ever or in
the history (EdgeBank). All scores of a split are ranked together. The folder holds flights.npz,
which docs/data-sets.md describes.
"""

import argparse
from pathlib import Path
from time import process_time

import torch
from torch.nn.functional import binary_cross_entropy_with_logits
from torch.optim.lr_scheduler import LinearLR

from fastgt.datasets import flights
from fastgt.models import Todyformer, TodyformerConfig
from fastgt.training.scores import average_precision, roc_auc

parser = argparse.ArgumentParser()
parser.add_argument("--data", type=Path, help="default: the folder that FASTGT_DATA names")
parser.add_argument("--history", type=int, default=4096, help="events that a prediction knows")
parser.add_argument("--patches", type=int, default=8)
parser.add_argument("--dim", type=int, default=64)
parser.add_argument("--batch", type=int, default=600, help="events of a step")
parser.add_argument("--steps", type=int, default=2000)
parser.add_argument("--lr", type=float, default=2e-3, help="of the first step; it falls to 0")
parser.add_argument("--seed", type=int, default=0)
parser.add_argument("--evaluated", type=int, help="batches of a split; default: all")
args = parser.parse_args()

data = flights(args.data)
KINDS = ("random", "historical", "inductive")


def batch_of(split, number):
    return data.batch(split, number, size=args.batch, history=args.history)


def train(mixing):
    """-> the model, its losses and seconds of the processor."""
    torch.manual_seed(args.seed)
    config = TodyformerConfig(
        data.num_nodes,
        edge_features=data.edge.shape[1],
        dim=args.dim,
        patches=args.patches,
        mixing=mixing,
    )
    model = Todyformer(config)
    optimizer = torch.optim.Adam(model.parameters(), lr=args.lr)
    schedule = LinearLR(optimizer, 1.0, 0.0, total_iters=args.steps)
    count, losses, begin = data.batches("train", args.batch), [], process_time()
    for step in range(args.steps):
        if step % count == 0:
            order = torch.randperm(count).tolist()
        batch = batch_of("train", order[step % count])
        parts = [batch.pairs, *(data.negatives(batch, kind, seed=step) for kind in KINDS[:2])]
        y = (torch.arange(3 * len(batch.events.time)) < len(batch.events.time)).float()
        loss = binary_cross_entropy_with_logits(
            model(torch.cat(parts, 1), *batch.history, now=batch.now), y
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
        if (step + 1) % 100 == 0:
            mean = sum(losses[-100:]) / 100
            print(
                f"{mixing}, step {step + 1}: loss {mean:.4f}, {process_time() - begin:.0f} s",
                flush=True,
            )
    return model.eval(), losses, process_time() - begin


@torch.no_grad()
def scores(models, split):
    """-> for each kind of negatives and each method the scores of all pairs, and which have an
    event."""
    count = data.batches(split, args.batch)
    found = {kind: {} for kind in KINDS}
    for number in range(min(count, args.evaluated or count)):
        batch = batch_of(split, number)
        size = len(batch.events.time)
        against = {kind: data.negatives(batch, kind, seed=args.seed) for kind in KINDS}
        pairs = torch.cat([batch.pairs, *against.values()], 1)
        recent = batch.known - len(batch.history.time)
        rows = {
            "popularity": data.times_seen(pairs, batch.known),
            "EdgeBank": (data.times_seen(pairs, batch.known) > 0).long(),
            "EdgeBank, history": (data.times_seen(pairs, batch.known, recent) > 0).long(),
        }
        for name, model in models.items():
            rows[name] = model(pairs, *batch.history, now=batch.now)
        for i, kind in enumerate(KINDS, 1):
            mine = torch.cat([torch.arange(size), torch.arange(i * size, (i + 1) * size)])
            for name, row in rows.items():
                found[kind].setdefault(name, []).append(row[mine])
            found[kind].setdefault("y", []).append(mine < size)
    return {kind: {k: torch.cat(x) for k, x in of.items()} for kind, of in found.items()}


models, losses = {}, {}
for mixing, name in (("mean", "Todyformer, means"), ("attention", "Todyformer")):
    models[name], losses[name], seconds = train(mixing)
    print(f"{name}: {seconds / args.steps:.3f} s a step")
results = {}
for split in ("val", "test"):
    for kind, of in scores(models, split).items():
        y = of.pop("y").float()
        for name, score in of.items():
            ap, auc = (f(score[:, None].double(), y) for f in (average_precision, roc_auc))
            results[split, kind, name] = ap, auc
            print(f"{split}, {kind} negatives, {name}: AP {ap:.4f}, AUC {auc:.4f}")
