"""A transformers body without memory for its weights: what a reader fills from a file."""

import json
from typing import Any

from accelerate import init_empty_weights
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from bitnet.errors import InputError

COUNTS = ("num_hidden_layers", "num_layers", "n_layer", "n_layers")  # what configs call the number of layers


def empty_causal_lm(config: dict[str, Any], most_layers: int | None = None) -> PreTrainedModel:
    """The body that ``config`` (a transformers config as a dict) describes, in evaluation mode.

    Parameters are on the meta device, buffers that no file keeps (rotary tables) are real. Only classes that
    transformers itself brings are built: nothing that a config names is downloaded or executed.

    Args:
        config: with ``model_type``.
        most_layers: a config of more layers is refused before any is built. The number of tensors in a file is such a
            bound, for every layer has one at least; without it a damaged number builds until memory ends.

    Raises:
        InputError: transformers knows no causal language model of that type, or refuses the config.
    """
    values = {key: value for key, value in config.items() if key not in ("auto_map", "quantization_config")}
    kind = values.pop("model_type", None)
    _refuse_more_layers([values.get(key) for key in COUNTS], most_layers)
    try:
        described = AutoConfig.for_model(kind, **values)
        _refuse_more_layers([_layers(described)], most_layers)
        with init_empty_weights():
            model = AutoModelForCausalLM.from_config(described)
        model.tie_weights()
    except InputError:
        raise
    except Exception as error:  # a value that does not fit can fail anywhere inside transformers, in any way
        raise InputError(f"transformers builds no causal language model of type {kind!r}: {_reason(error)}") from error
    return model.eval()


def plain_config(model: PreTrainedModel) -> dict[str, Any]:
    """The config of ``model`` as json keeps it, its type with it: what `empty_causal_lm` takes."""
    config = json.loads(model.config.to_json_string(use_diff=False))
    config.pop("quantization_config", None)
    return {**config, "model_type": model.config.model_type}


def _layers(config: PreTrainedConfig) -> Any:
    return getattr(config.get_text_config(), "num_hidden_layers", None)


def _refuse_more_layers(counts: list[Any], most: int | None) -> None:
    for count in counts:
        if most is not None and isinstance(count, int | float) and not 0 <= count <= most:
            raise InputError(f"the config has {count} layers, and the file {most} tensors in all: it is damaged")


def _reason(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
