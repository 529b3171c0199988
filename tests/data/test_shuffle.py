from collections import Counter
from collections.abc import Callable, Iterator
from itertools import islice

import pytest

from bitnet.data.shuffle import Position, shuffled_documents
from bitnet.data.sources import Shard
from bitnet.errors import InputError


def shards_of(*sizes: int) -> list[Shard]:
    def reader(shard: int, size: int) -> Callable[[], Iterator[str]]:
        return lambda: (f"{shard}/{number}" for number in range(size))

    return [Shard(str(shard), reader(shard, size)) for shard, size in enumerate(sizes)]


def epoch_of(shards: list[Shard], epoch: int, **place: int) -> list[str]:
    documents = shuffled_documents(shards, window=4, start=Position(epoch=epoch), **place)  # type: ignore[arg-type]
    found = []
    for document, position in documents:
        if position.epoch != epoch:
            return found
        found.append(document)
    raise AssertionError("the stream ended")


@pytest.mark.parametrize("consumers", [1, 2, 3, 5, 7])
@pytest.mark.parametrize("sizes", [(9, 4, 1), (10,), (5, 5, 5, 5, 3, 8)])
def test_consumers_together_see_each_document_once_an_epoch(sizes: tuple[int, ...], consumers: int) -> None:
    shards = shards_of(*sizes)
    whole = Counter(document for shard in shards for document in shard.read())
    for epoch in range(2):
        seen: Counter[str] = Counter()
        for consumer in range(consumers):
            seen.update(epoch_of(shards, epoch, seed=1, consumer=consumer, consumers=consumers))
        assert seen == whole


def test_the_order_depends_on_seed_and_epoch_alone() -> None:
    shards = shards_of(9, 4, 7)
    assert epoch_of(shards, 0, seed=1) == epoch_of(shards, 0, seed=1)
    orders = {tuple(epoch_of(shards, epoch, seed=seed)) for seed in range(3) for epoch in range(3)}
    assert len(orders) == 9
    assert all(order != tuple(d for shard in shards for d in shard.read()) for order in orders)


def test_every_position_continues_exactly() -> None:
    shards = shards_of(9, 4, 7)
    straight = list(islice(shuffled_documents(shards, seed=3, window=4), 50))  # two and a half epochs
    for index, (_, position) in enumerate(straight):
        resumed = shuffled_documents(shards, seed=3, window=4, start=Position(**position.as_dict()))
        assert list(islice(resumed, 50 - index)) == straight[index:]


@pytest.mark.parametrize("consumer", range(5))
def test_positions_continue_where_documents_of_a_shard_are_shared_out(consumer: int) -> None:
    shards = shards_of(23, 14)
    place = {"seed": 3, "window": 3, "consumer": consumer, "consumers": 5}
    straight = list(islice(shuffled_documents(shards, **place), 20))
    for index, (_, position) in enumerate(straight):
        assert list(islice(shuffled_documents(shards, **place, start=position), 20 - index)) == straight[index:]


def test_a_consumer_without_documents_is_an_error_and_no_endless_loop() -> None:
    with pytest.raises(InputError, match=r"no document for reader 4 of 4"):
        next(shuffled_documents(shards_of(3), seed=0, consumer=3, consumers=4))
