"""The order of a streamed training split: a function of the seed, with a position that is five small integers.

A shuffle buffer is state that cannot be saved, so there is none. Each epoch permutes the shards; inside a shard,
windows of consecutive documents are read and each is permuted. Every permutation is drawn from (seed, epoch, shard,
window), so a position says everything: resuming reads one window again and goes on at the next token.

Several consumers (a rank's data workers, on all ranks) share an epoch without overlap or loss: consumer c of n takes
every n-th shard of the permuted order or, where there are fewer shards than consumers, every n-th document of each.
Documents must be well mixed across shards beforehand, as C4's are: a batch comes from one window.
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from itertools import count, islice

import numpy as np

from bitnet.data.sources import Shard
from bitnet.errors import InputError

WINDOW = 4096  # documents; about 10 MB of C4 text in memory for each consumer


@dataclass(frozen=True, slots=True)
class Position:
    """A place in one consumer's stream; ``asdict`` of it is what a checkpoint holds.

    Attributes:
        epoch: Passes over the split already finished.
        shard: Index into the consumer's own order of shards of this epoch.
        window: Index of the window in the shard.
        document: Index into the window's permutation.
        token: Tokens of that document already handed out.
    """

    epoch: int = 0
    shard: int = 0
    window: int = 0
    document: int = 0
    token: int = 0

    def as_dict(self) -> dict[str, int]:
        """Plain integers by field name, safe for JSON and for weights-only checkpoints."""
        return asdict(self)


def shuffled_documents(
    shards: list[Shard],
    *,
    seed: int,
    consumer: int = 0,
    consumers: int = 1,
    window: int = WINDOW,
    start: Position | None = None,
) -> Iterator[tuple[str, Position]]:
    """An endless stream of (document, position of that document), beginning with the document at ``start``.

    ``start.token`` is left to whoever cuts documents into tokens; the positions that come out have ``token`` 0.

    Raises:
        InputError: A whole epoch held no document for this consumer.
    """
    start = start or Position()
    by_document = len(shards) < consumers
    for epoch in count(start.epoch):
        order = np.random.default_rng([seed, epoch]).permutation(len(shards))
        own = order if by_document else order[consumer::consumers]
        empty = start == Position(epoch=epoch)  # only an epoch that is read from its beginning can prove it
        for place in range(start.shard, len(own)):
            index = int(own[place])
            documents = shards[index].read()
            if by_document:
                documents = islice(documents, consumer, None, consumers)
            here = Position(epoch, place, start.window, start.document)
            for document, position in _windows(documents, [seed, epoch, index], window, here):
                empty = False
                yield document, position
            start = Position(epoch)
        if empty:
            raise InputError(
                f"the training split has no document for reader {consumer + 1} of {consumers}: add text, or lower "
                "data.num_workers or the number of devices"
            )
        start = Position(epoch + 1)


def _windows(documents: Iterator[str], key: list[int], window: int, start: Position) -> Iterator[tuple[str, Position]]:
    remaining = islice(documents, start.window * window, None)
    for number in count(start.window):
        texts = list(islice(remaining, window))
        if not texts:
            return
        permutation = np.random.default_rng([*key, number]).permutation(len(texts))
        for place in range(start.document if number == start.window else 0, len(texts)):
            yield texts[permutation[place]], replace(start, window=number, document=place)
