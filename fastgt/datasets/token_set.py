"""Tokens of LargeGT: read from disk for the nodes of a batch, by other processes, in any order."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from fastgt.datasets.block_file import BlockFile
from fastgt.datasets.hop_features import HOPS, hop_features
from fastgt.datasets.sampled_tokens import sample_tokens
from fastgt.graph import Graph
from fastgt.ops.checks import integer, node_ids
from fastgt.philox import words

_ROUNDS = 6  # of a shuffle
_AROUND = 2**21  # bytes that Linux maps around what is read, at most
_RELEASE = 2**26  # bytes that are mapped, after which they are given back


class TokenBatch(NamedTuple):
    """What :class:`fastgt.models.LargeGT` takes.

    Attributes:
        tokens: ``[B, 3 K, F]``: the features of K nodes, then what they are after one step along
            the edges, then after two. The node that the tokens are of is the first of the K.
        nodes: ``[B]`` int64, that node.
    """

    tokens: Tensor
    nodes: Tensor


class TokenSet:
    """The input of :class:`fastgt.models.LargeGT`: sampled nodes and their features, in a folder.

    Args:
        folder: The folder that :meth:`make` wrote.
        check: Read all files and compare them with their checksums. That takes seconds for each
            gigabyte.

    Raises:
        FileNotFoundError: A file is absent.
        ValueError: A file is damaged or incomplete, or files are of different graphs; its path is
            given.

    Example:
        >>> import tempfile, torch
        >>> from fastgt import Graph
        >>> from fastgt.datasets import TokenSet
        >>> path = Graph.from_edge_index(torch.tensor([[0, 1, 1, 2], [1, 0, 2, 1]]))
        >>> folder = tempfile.TemporaryDirectory()
        >>> tokens = TokenSet.make(path, torch.rand(3, 7), folder.name, samples=5)
        >>> for batch in tokens.loader(batch_size=2):
        ...     print(list(batch.tokens.shape), batch.nodes.tolist())
        [2, 15, 7] [0, 1]
        [1, 15, 7] [2]
        >>> folder.cleanup()
    """

    def __init__(self, folder: str | os.PathLike[str], *, check: bool = True):
        folder = Path(folder)
        for name in ("ids", *(f"hop{h}" for h in range(HOPS + 1))):
            if not (folder / name).is_file():
                raise FileNotFoundError(f"{folder / name} is absent: TokenSet.make writes it")
        self.ids = BlockFile(folder / "ids")
        self.hops = [BlockFile(folder / f"hop{h}") for h in range(HOPS + 1)]
        self.ids.check_about({"what": "sampled nodes"})
        for h, file in enumerate(self.hops):
            file.check_about({"what": "features", "hop": h})
        first = self.hops[0]
        for file in self.hops[1:]:
            if (file.about["features"], file.shape) != (first.about["features"], first.shape):
                raise ValueError(f"{file.path} is of other features than {first.path}")
        for file in (self.ids, *self.hops):
            if file.about["graph"] != self.ids.about["graph"]:
                raise ValueError(
                    f"{file.path} is of the graph {file.about['graph']}, and {self.ids.path} of "
                    f"{self.ids.about['graph']}: make them anew"
                )
            file.check_complete()
            if check:
                file.check()
        self._mapped = 0  # bytes of the files, at most

    @staticmethod
    def make(
        graph: Graph,
        x: Tensor | np.ndarray,
        folder: str | os.PathLike[str],
        *,
        samples: int,
        seed: int = 0,
        workers: int = 0,
        progress: bool = False,
    ) -> TokenSet:
        """Draw nodes and compute features, and write what is missing in the folder.

        Called again, it goes on where it was interrupted, and reads what is there.

        Args:
            graph: Square. Row i attends to the neighbours of node i.
            x: ``[N, F]`` features: float16, float32 or float64.
            folder: Of the files; it is made.
            samples: K, the node itself among them: 2 at least.
            seed, workers, progress: As for :func:`sample_tokens`.

        Raises:
            TypeError, ValueError, RuntimeError: As of :func:`sample_tokens` and
                :func:`hop_features`.
        """
        sample_tokens(
            graph, samples, Path(folder) / "ids", seed=seed, workers=workers, progress=progress
        )
        hop_features(graph, x, folder, progress=progress)
        return TokenSet(folder, check=False)  # both have checked what was there

    def __len__(self) -> int:
        """How many nodes there are."""
        return self.ids.shape[0]

    @property
    def samples(self) -> int:
        """K, the node itself among them."""
        return self.ids.shape[1] + 1

    @property
    def features(self) -> int:
        """F."""
        return self.hops[0].shape[1]

    def batch(self, nodes: Tensor) -> TokenBatch:
        """The tokens of these nodes, on the CPU.

        Args:
            nodes: ``[B]`` integers.

        Raises:
            TypeError, ValueError: No integers, or one that is no node.
        """
        nodes = checked_nodes(nodes, len(self))
        own = nodes.numpy()
        ids = np.concatenate([own[:, None], self.ids.array[own]], 1).astype(np.int64)
        shape = len(own), len(self.hops), self.samples, self.features
        tokens = np.empty(shape, self.hops[0].dtype)
        step = max(1, _RELEASE // _AROUND // self.samples)
        for first in range(0, len(ids), step):
            rows = slice(first, first + step)
            for h, file in enumerate(self.hops):
                tokens[rows, h] = file.array[ids[rows]]
                self._mapped += _AROUND * ids[rows].size
                if self._mapped > _RELEASE:
                    for each in (self.ids, *self.hops):
                        each.release()
                    self._mapped = 0
        return TokenBatch(torch.from_numpy(tokens).flatten(1, 2), nodes)

    def loader(
        self,
        nodes: Tensor | None = None,
        *,
        batch_size: int,
        shuffle: bool = False,
        workers: int = 0,
        generator: torch.Generator | None = None,
        drop_last: bool = False,
        pin_memory: bool = False,
    ) -> DataLoader[TokenBatch]:
        """Batches of nodes. Each worker reads two batches ahead of the one that is used.

        Memory does not grow with the nodes: the order is computed batch by batch, and pages of
        files are given back.

        Args:
            nodes: ``[n]`` nodes; None for all, in their order.
            batch_size: Nodes.
            shuffle: Another order at every pass.
            workers: Processes that read; with 0 this one reads, and nothing is read ahead.
            generator: Of the order; None for PyTorch's own.
            drop_last: Leave out a last batch that is smaller.
            pin_memory: Copy batches to where a GPU reads them faster.
        """
        nodes = None if nodes is None else checked_nodes(nodes, len(self))
        count = len(self) if nodes is None else len(nodes)
        size = integer("batch_size", batch_size, 1)
        return DataLoader(
            _Batches(self, nodes),
            batch_size=None,  # the sampler gives whole batches
            sampler=_Orders(count, size, shuffle, generator, drop_last),
            num_workers=integer("workers", workers, 0),
            pin_memory=pin_memory,
            # at every pass it draws a seed for its workers, by default from PyTorch's own generator
            generator=torch.Generator(),
        )


def checked_nodes(nodes: Tensor, count: int) -> Tensor:
    """``[B]`` int64 on the CPU, each below ``count``."""
    here = nodes.cpu() if isinstance(nodes, Tensor) else nodes
    found = node_ids("nodes", here, count, torch.device("cpu"))
    if found.ndim != 1:
        raise ValueError(f"nodes must be [B], got {list(found.shape)}")
    return found


class _Batches(Dataset):
    """Its items are batches, asked for by their places in the order."""

    def __init__(self, tokens: TokenSet, nodes: Tensor | None):
        self.tokens, self.nodes = tokens, nodes

    def __getitem__(self, places: Tensor) -> TokenBatch:
        return self.tokens.batch(places if self.nodes is None else self.nodes[places])


class _Orders(Sampler[Tensor]):
    """The places of each batch, in order or shuffled."""

    def __init__(
        self,
        count: int,
        batch_size: int,
        shuffle: bool,
        generator: torch.Generator | None,
        drop_last: bool,
    ):
        self.count, self.batch_size, self.shuffle = count, batch_size, shuffle
        self.generator = generator
        self.batches = count // batch_size if drop_last else -(-count // batch_size)

    def __len__(self) -> int:
        return self.batches

    def __iter__(self) -> Iterator[Tensor]:
        key = torch.randint(2**63 - 1, (1,), generator=self.generator) if self.shuffle else None
        for i in range(self.batches):
            first = i * self.batch_size
            places = torch.arange(first, min(first + self.batch_size, self.count))
            yield places if key is None else shuffled(places, self.count, key)


def shuffled(places: Tensor, count: int, key: Tensor) -> Tensor:
    """Where a permutation of ``count`` numbers, that a key gives, takes these: any of them alone.

    A number is a pair of one below a and one below b, for a the root of count. In turn each grows
    by a hash of the other. Numbers that this takes to ``count`` or beyond, of which there are fewer
    than a, are taken on until they are below.

    Source:
        Black and Rogaway, Ciphers with arbitrary finite domains, CT-RSA 2002, section 4.
    """
    a = math.isqrt(max(0, count - 1)) + 1
    b = -(-count // a)
    turn = torch.arange(_ROUNDS)
    low, high, *_ = words(key, turn, torch.zeros_like(turn), torch.ones_like(turn))
    keys = (low | high << 32).tolist()
    found, left = places.clone(), torch.arange(len(places))
    while len(left):
        one, other = found[left] // b, found[left] % b
        for i in range(0, _ROUNDS, 2):
            one = (one + _hash(other, keys[i])) % a
            other = (other + _hash(one, keys[i + 1])) % b
        found[left] = one * b + other
        left = left[found[left] >= count]
    return found


def _hash(x: Tensor, key: int) -> Tensor:
    """31 bits of each number and the key.

    Source:
        The last step of Appleby's MurmurHash3.
    """
    x = x ^ key
    for factor in (-0xAE502812AA7333, -0x3B314601E57A13AD):
        x = (x ^ (x >> 33 & 0x7FFFFFFF)) * factor
    return x >> 33 & 0x7FFFFFFF
