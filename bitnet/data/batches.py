"""Endless training batches that can be taken up again at any of them, and the batches of an evaluation split.

Each training batch carries the state of the stream *after* it under ``"state"``. So what a checkpoint records follows
the batches that were consumed, not those that workers have prepared ahead.

Batches are made whole inside a worker and taken from the workers in turn: batch k always comes from worker k mod W.
"""

import os
from collections.abc import Iterator
from itertools import count
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from bitnet.data.cache import Tokens
from bitnet.data.pack import IGNORED, Block, batch_of, packed_blocks
from bitnet.data.shuffle import Position, shuffled_documents
from bitnet.data.sources import Shard
from bitnet.data.tokenize import DocumentEncoder
from bitnet.errors import InputError

Batch = dict[str, Any]

# An endless stream still needs a length: Lightning skips a batch on resume of a loader without one.
ENDLESS = 1_000_000_000


class BatchShape:
    """How blocks become batches: sizes, padding, isolation. One for all the loaders of a data module."""

    def __init__(self, block_size: int, batch_size: int, *, pad: int, isolate_documents: bool) -> None:
        self.block_size, self.batch_size = block_size, batch_size
        self._pad, self._isolate = pad, isolate_documents

    def batch(self, blocks: list[Block]) -> Batch:
        """``input_ids``, ``labels`` and maybe ``position_ids``; see :func:`bitnet.data.pack.batch_of`."""
        return dict(batch_of(blocks, self.block_size, pad=self._pad, isolate_documents=self._isolate))


class CachedBatches(IterableDataset[Batch]):
    """Blocks of a token cache, in a new permutation for each epoch.

    Sample s of the whole run is block ``permutation(epoch)[s % blocks]``, epoch ``s // blocks``; a global batch takes
    the next ``world_size * batch_size`` samples. One integer, the number of samples consumed, is the whole state, and
    it means the same at any world size, worker count and batch size.
    """

    def __init__(
        self, tokens: Tokens, shape: BatchShape, *, seed: int, samples: int, rank: int = 0, world_size: int = 1
    ) -> None:
        self._tokens, self._shape, self._seed = tokens, shape, seed
        self._samples, self._rank, self._world_size = samples, rank, world_size
        self._blocks = len(tokens.ids) // shape.block_size
        self._order: tuple[int, Any] = (-1, None)  # an epoch, and the permutation of its blocks

    def __iter__(self) -> Iterator[Batch]:
        worker, workers = _worker()
        size = self._shape.batch_size
        for number in count(worker, workers):
            begin = self._samples + number * size * self._world_size
            own = range(begin + self._rank * size, begin + (self._rank + 1) * size)
            batch = self._shape.batch(
                [self._tokens.block(self._index(sample), self._shape.block_size) for sample in own]
            )
            yield batch | {"state": {"samples": begin + size * self._world_size}}

    def _index(self, sample: int) -> int:
        epoch, place = divmod(sample, self._blocks)
        if self._order[0] != epoch:
            self._order = (epoch, np.random.default_rng([self._seed, epoch]).permutation(self._blocks))
        return int(self._order[1][place])


class StreamedBatches(IterableDataset[Batch]):
    """Blocks packed on the way from shuffled shards, from one stream per worker.

    Args:
        shards: Of the training split.
        encoder: Of the run's tokenizer.
        shape: Of the batches.
        seed: Of the order.
        streams: Where each of this rank's streams stands; as many as there are workers (one without workers).
        turn: The stream that gives the next batch.
        rank: This process among ``world_size``.
        world_size: Processes that share the split.
        skipped: The source's counts of bad lines, sent along with each batch that follows one.
    """

    def __init__(
        self,
        shards: list[Shard],
        encoder: DocumentEncoder,
        shape: BatchShape,
        *,
        seed: int,
        streams: list[Position],
        turn: int = 0,
        rank: int = 0,
        world_size: int = 1,
        skipped: dict[str, int],
    ) -> None:
        self._shards, self._encoder, self._shape, self._seed = shards, encoder, shape, seed
        self._streams, self._turn, self._skipped = streams, turn, skipped
        self._rank, self._world_size = rank, world_size

    def __iter__(self) -> Iterator[Batch]:
        worker, workers = _worker()
        assert workers == len(self._streams), "one stream per worker"
        stream = (self._turn + worker) % len(self._streams)
        blocks: list[Block] = []
        for block, position in self._blocks(stream):
            blocks.append(block)
            if len(blocks) == self._shape.batch_size:
                state = {"stream": stream, "position": position.as_dict(), "skipped": dict(self._skipped)}
                yield self._shape.batch(blocks) | {"state": state}
                blocks = []

    def _blocks(self, stream: int) -> Iterator[tuple[Block, Position]]:
        start = self._streams[stream]
        documents = shuffled_documents(
            self._shards,
            seed=self._seed,
            consumer=self._rank * len(self._streams) + stream,
            consumers=self._world_size * len(self._streams),
            start=start,
        )
        encoded = ((ids, position) for ids, _, position in self._encoder.encode_all(documents))
        return packed_blocks(encoded, self._shape.block_size, start.token)


class EvaluationBatches:
    """The blocks of a split in order, each token once; ranks take every n-th batch. The last batch may be smaller.

    Every rank has the same number of batches, since ranks that evaluate together also wait for one another: where the
    blocks do not suffice, a rank's last batch is one of nothing to predict.

    Args:
        tokens: Of the split.
        shape: Of the batches.
        blocks: At most so many blocks; None takes all.
        rank: This process among ``world_size``.
        world_size: Processes that share the split.
    """

    def __init__(
        self, tokens: Tokens, shape: BatchShape, *, blocks: int | None, rank: int = 0, world_size: int = 1
    ) -> None:
        there = -(-len(tokens.ids) // shape.block_size)
        self._count = there if blocks is None else min(blocks, there)
        self._tokens, self._shape = tokens, shape
        rounds = -(-self._count // (shape.batch_size * world_size))
        self._begins = [(number * world_size + rank) * shape.batch_size for number in range(rounds)]

    def __len__(self) -> int:
        return len(self._begins)

    def __iter__(self) -> Iterator[Batch]:
        for begin in self._begins:
            indices = range(begin, min(begin + self._shape.batch_size, self._count))
            batch = self._shape.batch([self._tokens.block(index, self._shape.block_size) for index in indices or (0,)])
            if not indices:
                batch["labels"] = torch.full_like(batch["labels"], IGNORED)
            yield batch


class EndlessLoader:
    """Training batches, made in this process or by workers, as a plain iterable with a length.

    Not a DataLoader itself: Lightning would put a distributed sampler into one. Drawing from it leaves the global
    random state alone, so a resumed run sees the same dropout masks.
    """

    def __init__(self, batches: "IterableDataset[Batch]", num_workers: int) -> None:
        self._batches, self._num_workers = batches, num_workers

    def __len__(self) -> int:
        return ENDLESS

    def state_dict(self) -> dict[str, Any]:
        """Nothing: the data module keeps the state. Without this pair Lightning warns that a resume is not exact."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Nothing to do: the data module has made this loader where its state stands."""

    def __iter__(self) -> Iterator[Batch]:
        if self._num_workers == 0:
            yield from self._batches
            return
        loader = DataLoader(
            _InWorker(self._batches),
            batch_size=None,
            num_workers=self._num_workers,
            pin_memory=torch.cuda.is_available(),
            generator=torch.Generator(),
        )
        for batch in loader:
            if "error" in batch:
                raise InputError(batch["error"])
            yield batch


class _InWorker(IterableDataset[Batch]):
    """Hands an InputError over as its message: torch would wrap it into a page of the worker's traceback."""

    def __init__(self, batches: "IterableDataset[Batch]") -> None:
        self._batches = batches

    def __iter__(self) -> Iterator[Batch]:
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # threads of the parent do not survive its fork
        try:
            yield from self._batches
        except InputError as error:
            yield {"error": str(error)}


def _worker() -> tuple[int, int]:
    info = get_worker_info()
    return (0, 1) if info is None else (info.id, info.num_workers)
