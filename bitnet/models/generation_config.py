"""How a model generates (ends of a text, temperature, ...) as json: kept as the user set it.

transformers refuses to save settings that do not go together (a temperature without ``do_sample``), and reads the same
ones with a warning. What was set survives an export here, whatever transformers thinks of it.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from bitnet.errors import InputError

if TYPE_CHECKING:
    from transformers import GenerationConfig

FILE = "generation_config.json"
MARKS = ("bos_token_id", "eos_token_id", "pad_token_id")


def generation_entry(model: nn.Module) -> dict[str, Any] | None:
    """What of the generation settings of ``model`` is not transformers' default; None where it does not generate."""
    body: Any = model
    can: Any = getattr(model, "can_generate", None)
    config = getattr(body, "generation_config", None)
    if config is None or can is None or not can():
        return None
    return json.loads(config.to_json_string(use_diff=True, keys_to_pop=["compile_config"]))


def write_generation(model: nn.Module, folder: Path) -> None:
    """Write generation_config.json where ``model`` generates, without asking whether the settings go together."""
    entry = generation_entry(model)
    if entry is not None:
        (folder / FILE).write_text(json.dumps(entry, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def read_generation(folder: Path) -> "GenerationConfig | None":
    """The settings of a folder, None where it has no such file.

    Raises:
        InputError: the file is no json object, or transformers makes no settings of it.
    """
    file = folder / FILE
    if not file.is_file():
        return None
    try:
        entry = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{file} is no json: {error}") from error
    return generation_from(entry, str(file))


def generation_from(entry: Any, where: str, entries: int | None = None) -> "GenerationConfig":
    """The settings that `generation_entry` described; with ``entries`` its marks must be ids below that number.

    Raises:
        InputError: it describes none; the message begins with ``where``.
    """
    from transformers import GenerationConfig

    if not isinstance(entry, Mapping):
        raise InputError(f"{where} must be a json object, got {str(entry)[:60]!r}")
    if entries is not None:
        for key in MARKS:
            ids = entry.get(key)
            for each in ids if isinstance(ids, list) else [] if ids is None else [ids]:
                if type(each) is not int or not 0 <= each < entries:
                    raise InputError(f"{where}: {key} must be ids of the {entries} tokens, got {each!r}")
    try:
        return GenerationConfig.from_dict(dict(entry))
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise InputError(f"{where} cannot be used: {error}") from error
