"""The tokenizer: a given Hugging Face one, or a byte-level BPE trained once on the training split and cached.

Byte-level, so that every text can be written and read back without loss, and small by default: at 4096 entries the
embeddings of a demonstration model do not outweigh its ternary matrices. What comes out is always a transformers
tokenizer, which ``save_pretrained`` puts beside the model.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

from bitnet.data.tokenize import pieces
from bitnet.errors import InputError
from bitnet.files import atomic_file

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

BEGIN, END = "<s>", "</s>"
SMALLEST_VOCABULARY = 256 + 2  # the bytes, and the two marks
TRAINING_CHARACTERS = 20_000_000  # of the training split, from its beginning: more changes few merges


@dataclass(frozen=True)
class TokenizerSpec:
    """Which tokenizer a run uses.

    Attributes:
        path: A directory with a saved tokenizer or a name on the Hugging Face hub; None trains a byte-level BPE.
        vocab_size: Entries of the trained BPE, the two marks ``<s>`` and ``</s>`` included; unused with ``path``.
    """

    path: str | None = None
    vocab_size: int = 4096

    def load(
        self, documents: Callable[[], Iterable[str]], corpus: str, cache_dir: str | Path
    ) -> "PreTrainedTokenizerFast":
        """The tokenizer, trained on ``documents()`` where it has to be and is not in the cache.

        Args:
            documents: Gives the training documents; called only when training is needed.
            corpus: The source's fingerprint, the cache's key together with the size and the library's version.
            cache_dir: The run's cache folder.

        Raises:
            InputError: ``path`` cannot be loaded, or ``vocab_size`` cannot hold the bytes.
        """
        if self.path is not None:
            return read_tokenizer(self.path)
        if self.vocab_size < SMALLEST_VOCABULARY:
            raise InputError(
                f"data.tokenizer.vocab_size must be at least {SMALLEST_VOCABULARY} (256 bytes and 2 marks), got "
                f"{self.vocab_size}"
            )
        key = f"{corpus} {self.vocab_size} {TRAINING_CHARACTERS} {version('tokenizers')}"
        file = Path(cache_dir) / "tokenizers" / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.json"
        if not file.exists():
            with atomic_file(file) as partial:
                partial.write_text(_trained(documents(), self.vocab_size), encoding="utf-8")
        return _wrapped(file)


def fingerprint(tokenizer: "PreTrainedTokenizerFast") -> str:
    """SHA-256 over everything that decides which ids a document becomes; two tokenizers that share it agree.

    Covers vocabulary, merges, normalizer, pre-tokenizer, added tokens and the two marks; not the files' layout, so it
    survives ``save_pretrained`` and ``from_pretrained``.
    """
    stored = json.loads(tokenizer.backend_tokenizer.to_str())
    parts = {key: stored.get(key) for key in ("model", "normalizer", "pre_tokenizer", "added_tokens")}
    parts["marks"] = [tokenizer.bos_token_id, tokenizer.eos_token_id]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def check_vocabulary(tokenizer: "PreTrainedTokenizerFast", model_vocab_size: int) -> None:
    """Refuse a tokenizer that can produce an id for which the model has no embedding.

    Raises:
        InputError: It can; left alone, training ends in a bare IndexError.
    """
    largest = max(tokenizer.get_vocab().values())
    if largest >= model_vocab_size:
        raise InputError(
            f"the tokenizer's largest id is {largest} and the model has {model_vocab_size} embeddings: set the model's "
            f"vocab_size to at least {largest + 1}, or use the tokenizer that the model was made for"
        )


def read_tokenizer(path: str) -> "PreTrainedTokenizerFast":
    """The fast tokenizer of a directory, or of a name on the hub.

    Raises:
        InputError: There is none.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise InputError(
            f"data.tokenizer.path must be a directory with a saved tokenizer or a name on the hub, got {path}: {reason}"
        ) from error
    if not tokenizer.is_fast:
        raise InputError(f"{path} has no fast tokenizer (tokenizer.json), which data.tokenizer.path needs")
    return tokenizer


def _trained(documents: Iterable[str], vocab_size: int) -> str:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[BEGIN, END],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_beginning(documents), trainer)
    begin = tokenizer.token_to_id(BEGIN)
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{BEGIN} $A", special_tokens=[(BEGIN, begin)])
    return tokenizer.to_str(pretty=True)


def _beginning(documents: Iterable[str]) -> Iterator[str]:
    left = TRAINING_CHARACTERS
    for document in documents:
        yield from pieces(document[:left])
        left -= len(document)
        if left <= 0:
            return


def _wrapped(file: Path) -> "PreTrainedTokenizerFast":
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(
        tokenizer_file=str(file),
        bos_token=BEGIN,
        eos_token=END,
        pad_token=END,
        clean_up_tokenization_spaces=False,
    )
