"""Batches of a set, cut out here or by other processes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

if TYPE_CHECKING:
    from fastgt.datasets.graph_set import Batch, GraphSet


def loader(
    data: GraphSet,
    graphs: Tensor,
    batch_size: int,
    *,
    shuffle: bool,
    workers: int,
    generator: torch.Generator | None,
    drop_last: bool,
    pin_memory: bool,
) -> DataLoader[Batch]:
    """See :meth:`fastgt.datasets.GraphSet.loader`."""
    return DataLoader(
        _Batches(data),
        batch_size=None,  # the sampler gives whole batches
        sampler=_Chunks(graphs, batch_size, shuffle, generator, drop_last),
        num_workers=workers,
        collate_fn=_same,
        pin_memory=pin_memory,
        # at every pass it draws a seed for its workers, by default from PyTorch's own generator
        generator=torch.Generator(),
    )


class _Batches(Dataset):
    """Its items are batches, asked for by the numbers of their graphs."""

    def __init__(self, data: GraphSet):
        self.data = data

    def __getitem__(self, graphs: Tensor) -> Batch:
        return self.data.batch(graphs)


class _Chunks(Sampler[Tensor]):
    """The graphs of each batch; in a new order at every pass where they are shuffled."""

    def __init__(
        self,
        graphs: Tensor,
        batch_size: int,
        shuffle: bool,
        generator: torch.Generator | None,
        drop_last: bool,
    ):
        self.graphs, self.batch_size = graphs, batch_size
        self.shuffle, self.generator = shuffle, generator
        full = len(graphs) // batch_size
        self.batches = full if drop_last else -(-len(graphs) // batch_size)

    def __len__(self) -> int:
        return self.batches

    def __iter__(self) -> Iterator[Tensor]:
        graphs = self.graphs
        if self.shuffle:
            graphs = graphs[torch.randperm(len(graphs), generator=self.generator)]
        for i in range(self.batches):
            yield graphs[i * self.batch_size : (i + 1) * self.batch_size]


def _same(batch: Any) -> Any:
    return batch
