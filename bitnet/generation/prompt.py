"""From a prompt, or a conversation, to the ids that a model reads."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from bitnet.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def prompt_ids(tokenizer: "PreTrainedTokenizerBase", prompt: str) -> list[int]:
    """Ids of a text that is to be continued: with the marks that the tokenizer puts in front, without those at the end.

    An empty prompt is the start of a document.

    Raises:
        InputError: an empty prompt, and the tokenizer has no mark for the start; or bytes that are no text.
    """
    _refuse_bytes(prompt)
    start, plain = _start(tokenizer), tokenizer.encode(prompt, add_special_tokens=False)
    if not start and not plain:
        begin = tokenizer.bos_token_id
        if not isinstance(begin, int):
            raise InputError("an empty prompt needs a tokenizer that marks the start of a document: give a prompt")
        start = [begin]
    return [*start, *plain]


def chat_ids(tokenizer: "PreTrainedTokenizerBase", messages: Sequence[Mapping[str, str]]) -> list[int]:
    """Ids of a conversation up to where the model's answer begins, by the tokenizer's chat template.

    Args:
        messages: each with "role" ("system", "user", "assistant") and "content".

    Raises:
        InputError: no chat template, or one that cannot render these messages; or bytes that are no text.
    """
    if not tokenizer.chat_template:
        raise InputError(
            "the tokenizer has no chat template: the model was not trained to chat; continue a text instead"
        )
    from jinja2 import TemplateError

    try:
        text = tokenizer.apply_chat_template(
            [dict(each) for each in messages], tokenize=False, add_generation_prompt=True
        )
    except TemplateError as error:
        raise InputError(f"the chat template cannot render these messages: {error}") from error
    _refuse_bytes(str(text))
    return tokenizer.encode(str(text), add_special_tokens=False)  # a template writes the marks itself


def check_ids(model: "PreTrainedModel", ids: Sequence[int]) -> None:
    """Raise InputError where ``model`` cannot read ``ids`` and answer with a token: none, too many, or too large."""
    if not ids:
        raise InputError("expected at least one token to continue, got none")
    limit, rows = context_limit(model), model.config.get_text_config().vocab_size
    if limit is not None and len(ids) >= limit:
        raise InputError(
            f"the prompt has {len(ids)} tokens and the model's context is {limit}: shorten it to at most {limit - 1}"
        )
    if not 0 <= min(ids) <= max(ids) < rows:
        worst = max(ids) if max(ids) >= rows else min(ids)
        raise InputError(
            f"the prompt has the token {worst} and the model {rows} embeddings: use the model's own tokenizer"
        )


def context_limit(model: "PreTrainedModel") -> int | None:
    """Tokens that the model was made for, prompt and answer together; None where its config says nothing."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None)


def end_ids(model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", stop: Sequence[str] = ()) -> frozenset[int]:
    """Tokens that end a text: of the tokenizer, of the model's generation settings, and special tokens in ``stop``."""
    config = getattr(model, "generation_config", None)
    own = None if config is None else config.eos_token_id
    ends = [tokenizer.eos_token_id, *(own if isinstance(own, list) else [own])]
    special = set(tokenizer.all_special_tokens) | {str(each) for each in tokenizer.added_tokens_decoder.values()}
    ends += [tokenizer.convert_tokens_to_ids(each) for each in stop if each in special]  # they have no text to compare
    return frozenset(int(each) for each in ends if each is not None)


def _refuse_bytes(text: str) -> None:
    """Python stands surrogates for bytes of a command line that are in no encoding; tokenizers cannot read them."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InputError(
            f"the prompt has bytes, or half characters, that are no text, at character {error.start}: give it in UTF-8"
        ) from error


def _start(tokenizer: "PreTrainedTokenizerBase") -> list[int]:
    """The marks that the tokenizer puts in front of a text."""
    plain, marked = tokenizer.encode("a", add_special_tokens=False), tokenizer.encode("a")
    places = range(len(marked) - len(plain) + 1)
    return marked[: next((i for i in places if marked[i : i + len(plain)] == plain), 0)]
