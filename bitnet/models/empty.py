"""A transformers body without memory for its weights: what a reader fills from a file."""

from typing import Any

from accelerate import init_empty_weights
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from bitnet.errors import InputError


def empty_causal_lm(config: dict[str, Any]) -> PreTrainedModel:
    """The body that ``config`` (a transformers config as a dict) describes, in evaluation mode.

    Parameters are on the meta device, buffers that no file keeps (rotary tables) are real. Only classes that
    transformers itself brings are built: nothing that a config names is downloaded or executed.

    Raises:
        InputError: transformers knows no causal language model of that type, or refuses the config.
    """
    values = {key: value for key, value in config.items() if key not in ("auto_map", "quantization_config")}
    kind = values.pop("model_type", None)
    try:
        with init_empty_weights():
            model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **values))
    except (ValueError, TypeError, KeyError, AttributeError, ImportError, RuntimeError, ZeroDivisionError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise InputError(f"transformers builds no causal language model of type {kind!r}: {reason}") from error
    model.tie_weights()
    return model.eval()
