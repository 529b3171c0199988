"""Why a packed folder cannot carry a model: what a reader would not rebuild from its config."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from bitnet.errors import InputError
from bitnet.export.parity import (
    dense_tensors,
    quantized_layers,
    rotary_problems,
    rotary_tables,
    warm_up_problems,
)
from bitnet.models.empty import empty_causal_lm, plain_config
from bitnet.nn import QuantizedEmbedding
from bitnet.nn.linears import is_linear

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def body_problems(model: "PreTrainedModel") -> list[str]:
    """How ``model`` differs from what transformers builds of its config: a reader starts from that.

    A model that is stopped in the warm-up of its quantization is none yet.
    """
    if found := warm_up_problems(model):
        return found
    try:
        plain = empty_causal_lm(plain_config(model))
    except InputError as error:
        return [str(error)]
    layers, body = quantized_layers(model), type(plain).__name__
    places = {name: _place(plain, name) for name in layers}
    for name, place in places.items():
        fits = (
            type(place) is nn.Embedding
            if isinstance(layers[name], QuantizedEmbedding)
            else place is not None and is_linear(place)
        )
        if not fits:
            return [
                f"{name} is a {type(layers[name]).__name__} where {body} has a {type(place).__name__}: leave it dense"
            ]
    kept = {name: tuple(each.shape) for name, each in dense_tensors(model)}
    expected = {name: tuple(each.shape) for name, each in dense_tensors(plain, layers)}
    if differing := sorted(name for name in kept.keys() | expected.keys() if kept.get(name) != expected.get(name)):
        one = differing[0]
        return [
            f"it is a {type(model).__name__}, and its config describes a {body} with other tensors: {one} is "
            f"{kept.get(one, 'missing')} and not {expected.get(one, 'there at all')} ({len(differing)} differ); only "
            "transformers' causal language models can be rebuilt, with a config that says what they are"
        ]
    return rotary_problems(model) or _table_problems(rotary_tables(model), rotary_tables(plain))


def _table_problems(tables: dict[str, Tensor], expected: dict[str, Tensor]) -> list[str]:
    """Tables that are in float32 again, and were rounded before; not those that a long text changes for itself."""
    for name, table in tables.items():
        home, _, last = name.rpartition(".")
        if (last == "inv_freq" and f"{home}.original_inv_freq" in tables) or table.is_meta:
            continue
        if name in expected and not torch.allclose(table.cpu().double(), expected[name].double(), rtol=1e-5, atol=0):
            return [
                f"{name} holds other frequencies than its config describes, and no file keeps them: was it rounded by "
                "model.bfloat16()? Load or build the model in its dtype instead"
            ]
    return []


def _place(plain: nn.Module, name: str) -> nn.Module | None:
    try:
        return plain.get_submodule(name)
    except AttributeError:
        return None


def rounding_problems(model: "PreTrainedModel") -> list[str]:
    """Embedding and head that compute more than a plain one does, as Gemma's does, which scales its rows."""
    found = []
    for home, plain in ((model.get_input_embeddings(), nn.Embedding), (model.get_output_embeddings(), nn.Linear)):
        if isinstance(getattr(home, "weight", None), nn.Parameter) and type(home) is not plain:
            found.append(
                f"rest=int8 rounds a plain nn.{plain.__name__}, and it has a {type(home).__name__}: use rest=exact"
            )
    return found


def tokenizer_problems(model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase") -> list[str]:
    entries = model.config.get_text_config().vocab_size
    last = max(tokenizer.get_vocab().values(), default=-1)
    if last < entries:
        return []
    return [
        f"the tokenizer has the token id {last}, and the model {entries} embeddings: it belongs to another model, or "
        "needs model.resize_token_embeddings before training"
    ]
