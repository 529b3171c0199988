"""The data of a run for Lightning: splits, tokenizer, batches, and a state that resumes at the very next batch.

Lightning's own handling restarts an epoch or skips a batch on resume, so none of it is used. The training loader
starts where this module's state says, and the state moves when a batch is handed to the training step. What a
checkpoint holds is the data that *finished* optimizer steps have consumed: the batches of a step that was cut off come
again.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch.distributed
from lightning import LightningDataModule
from torch import Tensor

from bitnet.data.batches import Batch, BatchShape, CachedBatches, EndlessLoader, EvaluationBatches, StreamedBatches
from bitnet.data.corpus import Corpus
from bitnet.data.passages import random_windows
from bitnet.data.shuffle import Position
from bitnet.data.sources import Source, Split
from bitnet.data.tokenizer import TokenizerSpec
from bitnet.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


class TextDataModule(LightningDataModule):
    """Packed batches of a source of text.

    A batch holds ``input_ids`` and ``labels``, int64 [batch_size, block_size]; labels equal the ids (the loss shifts by
    one) and are -100 where nothing is to be predicted. With ``isolate_documents`` also ``position_ids``.

    Args:
        source: Where the documents come from.
        tokenizer: Which tokenizer reads them.
        block_size: Tokens in a row of a batch.
        batch_size: Rows in a batch of one process.
        seed: Of the order of the training documents.
        num_workers: Processes that prepare training batches; 0 prepares them in the training process.
        cache_dir: Folder for trained tokenizers and token caches.
        isolate_documents: Positions restart, and attention stops, at the borders of documents.
        validation_blocks: At most so many blocks of the validation split and of the test split; None takes all.
        path: What ``source`` reads, for the record (the configuration hands it to the source itself).

    Raises:
        InputError: A size that is too small; in ``setup``: a corpus, tokenizer or cache that cannot be used.
    """

    def __init__(
        self,
        source: Source,
        tokenizer: TokenizerSpec,
        *,
        block_size: int = 256,
        batch_size: int = 8,
        seed: int = 0,
        num_workers: int = 0,
        cache_dir: str | Path = "cache",
        isolate_documents: bool = False,
        validation_blocks: int | None = 200,
        path: str | None = None,
    ) -> None:
        super().__init__()
        _check_at_least("block_size", block_size, 2)
        _check_at_least("batch_size", batch_size, 1)
        _check_at_least("num_workers", num_workers, 0)
        if validation_blocks is not None:
            _check_at_least("validation_blocks", validation_blocks, 1)
        self._source, self._spec, self._path, self._cache_dir = source, tokenizer, path, Path(cache_dir)
        self._block_size, self._batch_size, self._validation_blocks = block_size, batch_size, validation_blocks
        self._isolate, self._seed, self._num_workers = isolate_documents, seed, num_workers
        self._corpus: Corpus | None = None
        self._latest = self._beginning()  # after the batch that was handed out last
        self._finished = self._latest  # after the last batch of a finished optimizer step
        self._step: int | None = None  # the optimizer step that the latest batch belongs to
        self._skipped: dict[str, int] = {}  # as workers report them

    # The text

    def prepare_data(self) -> None:
        """Fill the caches: Lightning calls this in one process before the others go on."""
        self.setup()

    def setup(self, stage: str | None = None) -> None:
        """Load or train the tokenizer and open or write the token caches; calling it again does nothing."""
        if self._corpus is not None:
            return
        limit = None if self._validation_blocks is None else self._validation_blocks * self._block_size
        corpus = Corpus(self._source, self._spec, self._cache_dir, limit)
        if not self._source.streaming:
            corpus.training_tokens(self._block_size)
        corpus.evaluation_tokens("validation")
        self._corpus = corpus

    @property
    def corpus(self) -> Corpus:
        """The opened text; opens it where ``setup`` was not called."""
        self.setup()
        assert self._corpus is not None
        return self._corpus

    @property
    def tokenizer(self) -> "PreTrainedTokenizerFast":
        return self.corpus.tokenizer

    @property
    def vocab_size(self) -> int:
        """Embeddings that a model needs: one more than the tokenizer's largest id."""
        return self.corpus.vocab_size

    @property
    def block_size(self) -> int:
        """Tokens in a row of a batch."""
        return self._block_size

    @property
    def corpus_hash(self) -> str:
        return self.corpus.hash

    @property
    def tokenizer_hash(self) -> str:
        return self.corpus.tokenizer_hash

    @property
    def bytes_per_token(self) -> float:
        """UTF-8 bytes of the validation text for each of its tokens, marks included."""
        tokens = self.corpus.evaluation_tokens("validation")
        return tokens.n_bytes / len(tokens.ids)

    def describe(self) -> dict[str, Any]:
        """What the run's record says of its data: hashes, counts per split, bad lines left out so far."""
        skipped = {
            shard: max(self._skipped.get(shard, 0), self._source.skipped.get(shard, 0))
            for shard in self._skipped.keys() | self._source.skipped.keys()
        }
        return self.corpus.describe() | {
            "path": self._path,
            "block_size": self._block_size,
            "validation_blocks": self._validation_blocks,
            "isolate_documents": self._isolate,
            "bytes_per_token": self.bytes_per_token,
            "skipped_lines": sum(skipped.values()),
        }

    # The batches

    def train_dataloader(self) -> EndlessLoader:
        """Training batches from the state on, without end; each carries its own ``"state"`` until it is consumed."""
        place: dict[str, Any] = {"seed": self._seed, "rank": self._rank, "world_size": self._world_size}
        if self._source.streaming:
            batches = StreamedBatches(
                self.corpus.training_shards(),
                self.corpus.encoder,
                self._shape,
                streams=[Position(**position) for position in self._latest["streams"]],
                turn=self._latest["turn"],
                skipped=self._source.skipped,
                **place,
            )
        else:
            tokens = self.corpus.training_tokens(self._block_size)
            batches = CachedBatches(tokens, self._shape, samples=self._latest["samples"], **place)
        return EndlessLoader(batches, self._num_workers)

    def val_dataloader(self) -> EvaluationBatches:
        """This rank's share of the validation blocks, in order, at most ``validation_blocks`` of them in all."""
        return self._evaluation_batches("validation", self._rank, self._world_size)

    def test_dataloader(self) -> EvaluationBatches:
        """This rank's share of the test blocks, in order, at most ``validation_blocks`` of them in all."""
        return self._evaluation_batches("test", self._rank, self._world_size)

    def whole(self, split: Split) -> EvaluationBatches:
        """The blocks of the validation or test split that all ranks share, for one process to evaluate alone."""
        return self._evaluation_batches(split, 0, 1)

    def _evaluation_batches(self, split: Split, rank: int, world_size: int) -> EvaluationBatches:
        return EvaluationBatches(
            self.corpus.evaluation_tokens(split),
            self._shape,
            blocks=self._validation_blocks,
            rank=rank,
            world_size=world_size,
        )

    # Text outside batches

    def joined(self, split: Split, *, max_tokens: int | None = None) -> Tensor:
        """All documents of a split joined by a blank line and tokenized as one string, int64 [tokens].

        The tokenizer's own marks stand at the ends of the whole (``<s>`` in front, for most), none between documents.
        ``validation_blocks`` does not limit it; ``max_tokens`` does, and reading stops there.

        Raises:
            InputError: The split holds fewer than two tokens.
        """
        return self.corpus.joined(split, max_tokens)

    def calibration_windows(self, windows: int, window: int, *, documents: int = 400, seed: int = 0) -> Tensor:
        """Windows of training text to calibrate on, int64 [windows, window]; equal arguments give equal windows.

        The first ``documents`` training documents, each between its marks, follow one another; windows begin at random
        places of that text and may overlap. `bitnet.data.passages.ids_hash` tells them from others.

        Raises:
            InputError: A number below 1, or a text shorter than a window.
        """
        return random_windows(self.corpus.first_training_ids(documents), windows, window, seed=seed)

    @property
    def _shape(self) -> BatchShape:
        pad = self.corpus.encoder.end
        return BatchShape(self._block_size, self._batch_size, pad=pad, isolate_documents=self._isolate)

    # The state

    def on_before_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        """Take the state out of a training batch and count the batch as consumed; Lightning calls it once per batch."""
        return self.consume(batch) if "state" in batch else batch

    def consume(self, batch: Batch) -> Batch:
        """Count a training batch as consumed; returns it without its ``"state"``.

        For training without a Lightning Trainer: call it once for every batch, in order.
        """
        step = None if self.trainer is None else self.trainer.global_step
        if step is None or step != self._step:
            self._finished = self._latest
        self._step = step
        state = batch["state"]
        self._latest = self._streams_after(state) if self._source.streaming else state
        return {key: value for key, value in batch.items() if key != "state"}

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers and strings: what the data is, and how much of it finished optimizer steps have consumed."""
        step_is_open = self.trainer is not None and self.trainer.global_step == self._step
        state = self._finished if step_is_open else self._latest
        if not self._source.streaming:
            return {"identity": self._identity(), "consumed": state}
        ranks: list[Any] = [state]
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            ranks = [None] * torch.distributed.get_world_size()
            torch.distributed.all_gather_object(ranks, state)
        return {"identity": self._identity(), "ranks": ranks}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on where ``state_dict`` stands.

        Raises:
            InputError: It was made with other text, another tokenizer or another order, or (streaming only) with
                another number of processes or workers.
        """
        saved = state_dict["identity"]
        for key, value in self._identity().items():
            if saved.get(key) != value:
                raise InputError(
                    f"the checkpoint was made with {key} {saved.get(key)} and this run has {value}: resume with the "
                    "same data settings, or start a new run from the model's weights"
                )
        self._latest = state_dict["ranks"][self._rank] if self._source.streaming else state_dict["consumed"]
        self._finished, self._step = self._latest, None

    def _identity(self) -> dict[str, Any]:
        identity: dict[str, Any] = {
            "corpus_hash": self.corpus_hash,
            "tokenizer_hash": self.tokenizer_hash,
            "data.block_size": self._block_size,
            "data.seed": self._seed,
            "data.isolate_documents": self._isolate,
        }
        if self._source.streaming:
            identity |= {"number of processes": self._world_size, "data.num_workers": max(1, self._num_workers)}
        return identity

    def _beginning(self) -> dict[str, Any]:
        if not self._source.streaming:
            return {"samples": 0}
        return {"streams": [Position().as_dict() for _ in range(max(1, self._num_workers))], "turn": 0}

    def _streams_after(self, state: dict[str, Any]) -> dict[str, Any]:
        for shard, lines in state["skipped"].items():
            self._skipped[shard] = max(lines, self._skipped.get(shard, 0))
        streams = list(self._latest["streams"])
        streams[state["stream"]] = state["position"]
        return {"streams": streams, "turn": (state["stream"] + 1) % len(streams)}

    @property
    def _rank(self) -> int:
        return 0 if self.trainer is None else self.trainer.global_rank

    @property
    def _world_size(self) -> int:
        return 1 if self.trainer is None else self.trainer.world_size


def _check_at_least(name: str, value: int, least: int) -> None:
    if value < least:
        raise InputError(f"data.{name} must be at least {least}, got {value}")
