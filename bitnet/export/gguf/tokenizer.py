"""A byte-level BPE tokenizer as the key-value pairs of a GGUF file, and back.

llama.cpp splits a text before it merges bytes, by rules that it knows by name (``tokenizer.ggml.pre``). A tokenizer is
written only where one of these rules splits exactly as its own, and where nothing else of it is unknown there:

gpt-2       ByteLevel with its regular expression: GPT-2, and every tokenizer that this package trains
llama-bpe   Llama 3: digits in threes; a piece that is an entry as a whole is not merged again (``ignore_merges``)
qwen2       Qwen 2 and 3: digits one by one. They normalize to NFC, and llama.cpp does not: text has to be NFC already
smollm      digits one by one, then GPT-2's rule

A file with a SentencePiece vocabulary (``tokenizer.ggml.model`` llama) is read without its tokenizer.
"""

import json
import warnings
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from torch import nn

from bitnet.errors import InputError
from bitnet.export.gguf.container import Container, Value

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5  # llama.cpp's kinds of tokens
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_BYTES = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}
_ALREADY_SPLIT = _BYTES | {"use_regex": False}


def _split(pattern: str) -> dict[str, Any]:
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


PRE_TOKENIZERS: dict[str, list[dict[str, Any]]] = {
    "gpt-2": [_BYTES],
    "llama-bpe": [_split(_CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}" + _REST), _ALREADY_SPLIT],
    "qwen2": [_split(_CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}" + _REST), _ALREADY_SPLIT],
    "smollm": [{"type": "Digits", "individual_digits": True}, _BYTES],
}
IGNORES_MERGES = ("llama-bpe",)
NFC = ("qwen2",)
NFC_KEY = "bitnet_qat.normalizes_to_nfc"  # where it is missing, as `NFC` says
OTHER_NAMES = {"llama3": "llama-bpe", "llama-v3": "llama-bpe", "phi-2": "gpt-2"}
PROBE = (
    "Hello world's  3 text:\n\n\tdef f(x_1): return x**2 + 1234567  # ok?!\r\n "
    "Grüße, naïve façade — ½ “quotes” … Привет мир 你好世界 こんにちは नमस्ते مرحبا 🙂👩‍👩‍👧 e\u0301 \u00a0\u2003end   "
)


def tokenizer_problems(tokenizer: "PreTrainedTokenizerBase", entries: int) -> Iterator[str]:
    """Why llama.cpp would not read ``tokenizer`` as it is meant, for a model of ``entries`` embeddings."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        yield "the tokenizer is none of the tokenizers library: only byte-level BPE of a tokenizer.json is written"
        return
    stored = json.loads(backend.to_str())
    model = stored["model"]
    if model["type"] != "BPE" or (stored.get("decoder") or {}).get("type") != "ByteLevel":
        yield (
            f"the tokenizer is {model['type']} and not byte-level BPE: export without a tokenizer (tokenizer=None, or "
            "--no-tokenizer on the command line)"
        )
        return
    pre = _name_of(stored)
    if pre is None:
        yield (
            "the tokenizer splits text by a rule for which no name of llama.cpp is known here "
            f"({stored.get('pre_tokenizer')}): known are {', '.join(PRE_TOKENIZERS)}"
        )
    elif bool(model.get("ignore_merges")) != (pre in IGNORES_MERGES):
        yield f"with {pre} llama.cpp has ignore_merges={pre in IGNORES_MERGES}, and this tokenizer has not"
    if (normalizer := stored.get("normalizer")) and not (normalizer == {"type": "NFC"} and pre in NFC):
        yield f"the tokenizer normalizes text ({normalizer['type']}), which llama.cpp does not with this rule"
    for option in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(option):
            yield f"the tokenizer has the option {option}, which llama.cpp does not"
    for token in stored["added_tokens"]:
        if token["lstrip"] or token["rstrip"] or token["single_word"]:
            yield f"the token {token['content']!r} takes neighbouring spaces (lstrip, rstrip or single_word)"
    if (largest := max(tokenizer.get_vocab().values())) >= entries:
        yield f"the tokenizer has the id {largest}, and the model {entries} embeddings: it is another model's tokenizer"
    if tokenizer.eos_token_id is None:
        yield "the tokenizer has no end of text, for which llama.cpp would take token 11: set tokenizer.eos_token"
    if _marks_around(tokenizer) is None:
        yield "the tokenizer puts other tokens around a text than its begin and end"


def ends_of(model: nn.Module) -> list[int]:
    """Ids with which ``model`` ends a text, as its generation settings say."""
    config: Any = getattr(model, "generation_config", None)
    ends = getattr(config, "eos_token_id", None)
    return [] if ends is None else [int(each) for each in (ends if isinstance(ends, list | tuple) else [ends])]


def tokenizer_pairs(
    tokenizer: "PreTrainedTokenizerBase | None", entries: int, ends: Sequence[int] = ()
) -> dict[str, Value]:
    """The key-value pairs; without a tokenizer one says that there is none ("no_vocab").

    Entries of the embedding that no token has become unused tokens ``[PAD123]``. llama.cpp stops at the tokenizer's
    end of text, and at the first two others of ``ends``: as end of turn and of message.
    """
    if tokenizer is None:
        return {"tokenizer.ggml.model": Value("str", "no_vocab")}
    backend: Any = getattr(tokenizer, "backend_tokenizer")  # noqa: B009  # not declared for slow tokenizers
    stored = json.loads(backend.to_str())
    added = {token["id"]: token for token in stored["added_tokens"]}
    names = {number: name for name, number in tokenizer.get_vocab().items()}
    kinds = [_kind(number, names, added) for number in range(entries)]
    before, after = _marks_around(tokenizer) or (False, False)
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in stored["model"]["merges"]]
    pairs = {
        "tokenizer.ggml.model": Value("str", "gpt2"),
        "tokenizer.ggml.pre": Value("str", _name_of(stored)),
        "tokenizer.ggml.tokens": Value("str[]", [names.get(each, f"[PAD{each}]") for each in range(entries)]),
        "tokenizer.ggml.token_type": Value("i32[]", kinds),
        "tokenizer.ggml.merges": Value("str[]", merges),
        "tokenizer.ggml.add_bos_token": Value("bool", before),
        "tokenizer.ggml.add_eos_token": Value("bool", after),
    }
    if pairs["tokenizer.ggml.pre"].value in NFC:
        pairs[NFC_KEY] = Value("bool", bool(stored.get("normalizer")))
    marks = {"bos": tokenizer.bos_token_id, "eos": tokenizer.eos_token_id}
    if marks["bos"] is None:
        marks["bos"] = marks["eos"]  # else llama.cpp takes token 11
    marks |= {"unknown": tokenizer.unk_token_id, "padding": tokenizer.pad_token_id}
    others = [each for each in dict.fromkeys(ends) if each != marks["eos"] and 0 <= each < entries]
    marks |= dict(zip(("eot", "eom"), others, strict=False))
    for name, number in marks.items():
        if number is not None:
            pairs[f"tokenizer.ggml.{name}_token_id"] = Value("u32", number)
    templates = _templates(tokenizer)
    pairs |= {_template_key(name): Value("str", template) for name, template in templates.items()}
    if others := [name for name in templates if name != "default"]:
        pairs["tokenizer.chat_templates"] = Value("str[]", others)
    return pairs


def read_tokenizer(file: Container) -> "PreTrainedTokenizerFast | None":
    """The tokenizer of a file, or None where there is none or, with a warning, where this package cannot build it.

    Raises:
        InputError: arrays of different lengths, or merges of tokens that are not there.
    """
    model = file.pairs.get("tokenizer.ggml.model", "no_vocab")
    if model == "no_vocab":
        return None
    pre = file.pairs.get("tokenizer.ggml.pre")
    pre = OTHER_NAMES.get(pre, pre) if isinstance(pre, str) else None
    if model != "gpt2" or pre not in PRE_TOKENIZERS:
        warnings.warn(f"{file.path}: its tokenizer ({model}, {pre}) is not read here, only the model is", stacklevel=2)
        return None
    return _built(file, pre)


def _built(file: Container, pre: str) -> "PreTrainedTokenizerFast":
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors
    from transformers import PreTrainedTokenizerFast

    names, kinds, merges = _lists(file)
    vocabulary = {name: number for number, name in enumerate(names) if kinds[number] != UNUSED}
    try:
        body = models.BPE(vocab=vocabulary, merges=merges, ignore_merges=pre in IGNORES_MERGES)
    except Exception as error:  # the library raises nothing narrower
        raise InputError(f"{file.path}: tokens and merges make no tokenizer: {error}") from error
    backend = Tokenizer(body)
    parts = [_pre_tokenizer(part) for part in PRE_TOKENIZERS[pre]]
    backend.pre_tokenizer = parts[0] if len(parts) == 1 else _sequence(parts)
    backend.decoder = decoders.ByteLevel()
    if file.pairs.get(NFC_KEY, pre in NFC):
        backend.normalizer = normalizers.NFC()
    for number, name in enumerate(names):
        if kinds[number] in (CONTROL, USER_DEFINED):
            special = kinds[number] == CONTROL
            token = AddedToken(name, special=special, normalized=False)
            (backend.add_special_tokens if special else backend.add_tokens)([token])
    marks = {
        part: names[number]
        for part, key in {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}.items()
        if (number := file.pairs.get(f"tokenizer.ggml.{key}_token_id")) is not None and _is_entry(file, number, names)
    }
    around = [mark for mark in ("bos", "eos") if file.pairs.get(f"tokenizer.ggml.add_{mark}_token")]
    if missing := [mark for mark in around if mark not in marks]:
        raise InputError(
            f"{file.path}: a text gets a {missing[0]} token, and tokenizer.ggml.{missing[0]}_token_id is missing"
        )
    if around:
        text = [marks["bos"]] * ("bos" in around) + ["$A"] + [marks["eos"]] * ("eos" in around)
        specials = [(marks[mark], vocabulary[marks[mark]]) for mark in around]
        backend.post_processor = processors.TemplateProcessing(single=" ".join(text), special_tokens=specials)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        clean_up_tokenization_spaces=False,
        **{f"{part}_token": name for part, name in marks.items()},
    )
    tokenizer.chat_template = _read_templates(file)
    return tokenizer


def same_tokens(one: "PreTrainedTokenizerBase", other: "PreTrainedTokenizerBase | None") -> bool:
    """Whether both give the same ids for a text of many scripts, spaces and digits, and the same text for these ids."""
    if other is None:
        return False
    ids = one.encode(PROBE)
    return ids == other.encode(PROBE) and one.decode(ids) == other.decode(ids)


def same_templates(one: "PreTrainedTokenizerBase", other: "PreTrainedTokenizerBase | None") -> bool:
    """Whether both have the same chat templates under the same names."""
    return other is not None and _templates(one) == _templates(other)


def _templates(tokenizer: "PreTrainedTokenizerBase") -> dict[str, str]:
    """Chat templates by name; the one of a tokenizer that has one is "default"."""
    held: Any = tokenizer.chat_template
    named = held if isinstance(held, dict) else {"default": held}
    return {name: template for name, template in named.items() if template}


def _template_key(name: str) -> str:
    return "tokenizer.chat_template" + ("" if name == "default" else f".{name}")


def _read_templates(file: Container) -> str | dict[str, str] | None:
    """The default template alone, all by name where there are others, None where there is none."""
    others: Any = file.pairs.get("tokenizer.chat_templates", [])
    if not isinstance(others, list):
        raise InputError(f"{file.path}: tokenizer.chat_templates must be a list of names: the file is damaged")
    default = _template_key("default")
    named = {"default": file.text(default)} if default in file.pairs else dict[str, str]()
    if not others:
        return named.get("default")
    return named | {name: file.text(_template_key(name)) for name in others}


def _lists(file: Container) -> tuple[list[str], list[int], list[tuple[str, str]]]:
    names: Any = file.pairs.get("tokenizer.ggml.tokens")
    merges: Any = file.pairs.get("tokenizer.ggml.merges")
    if not isinstance(names, list) or not isinstance(merges, list):
        raise InputError(
            f"{file.path}: tokenizer.ggml.tokens and .merges must be lists of strings: the file is damaged"
        )
    kinds = [int(kind) for kind in file.pairs.get("tokenizer.ggml.token_type", [NORMAL] * len(names))]
    if len(kinds) != len(names) or len(set(names)) != len(names):
        raise InputError(f"{file.path}: {len(names)} tokens, {len(set(names))} different, {len(kinds)} kinds: damaged")
    pairs = [tuple(merge.split(" ")) for merge in merges]
    if wrong := next((merge for merge, pair in zip(merges, pairs, strict=True) if len(pair) != 2), None):
        raise InputError(f"{file.path}: {wrong!r} is no merge of two tokens")
    return names, kinds, pairs  # pyright: ignore[reportReturnType]  # pairs, as just checked


def _is_entry(file: Container, number: Any, names: list[str]) -> bool:
    if not isinstance(number, int) or not 0 <= number < len(names):
        raise InputError(f"{file.path}: the special token {number!r} is none of the {len(names)} tokens")
    return True


def _pre_tokenizer(part: dict[str, Any]) -> Any:
    from tokenizers import Regex, pre_tokenizers

    if part["type"] == "Split":
        return pre_tokenizers.Split(Regex(part["pattern"]["Regex"]), "isolated")
    if part["type"] == "Digits":
        return pre_tokenizers.Digits(individual_digits=True)
    return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=part["use_regex"])


def _sequence(parts: list[Any]) -> Any:
    from tokenizers import pre_tokenizers

    return pre_tokenizers.Sequence(parts)


def _name_of(stored: dict[str, Any]) -> str | None:
    """llama.cpp's name of the rule in a tokenizer.json."""
    rule = stored.get("pre_tokenizer") or {}
    parts = rule["pretokenizers"] if rule.get("type") == "Sequence" else [rule]
    parts = [{key: value for key, value in part.items() if key != "trim_offsets"} for part in parts]
    return next((name for name, known in PRE_TOKENIZERS.items() if known == parts), None)


def _kind(number: int, names: dict[int, str], added: dict[int, Any]) -> int:
    if number in added:
        return CONTROL if added[number]["special"] else USER_DEFINED
    return NORMAL if number in names else UNUSED


def _marks_around(tokenizer: "PreTrainedTokenizerBase") -> tuple[bool, bool] | None:
    """Whether a text gets begin and end; None where it gets something else."""
    bare, whole = (tokenizer.encode("a", add_special_tokens=special) for special in (False, True))
    for before in (False, True):
        for after in (False, True):
            if whole == [tokenizer.bos_token_id] * before + bare + [tokenizer.eos_token_id] * after:
                return before, after
    return None
