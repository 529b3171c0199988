"""Text that the model writes at each validation: the plainest sign of what it has learnt.

Sampling has a generator of its own, so that a run with samples trains the same bits as one without.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn

from bitnet.errors import InputError
from bitnet.generation import Sampler, Sampling, new_tokens


class Tokenizer(Protocol):
    """What sampling needs of a tokenizer; every transformers tokenizer has it."""

    bos_token_id: int | None
    eos_token_id: int | None

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]: ...
    def decode(self, token_ids: Sequence[int]) -> str: ...


class WriteSamples(Callback):
    """Continue each prompt at each validation; print the texts and append them to ``samples.md``.

    Args:
        prompts: texts to continue. An empty one starts a document.
        max_new_tokens: tokens a text is continued by, at most. Each costs one forward pass over the text so far.
        temperature: 0 takes the most likely token; above, tokens are drawn with logits divided by it.
        seed: of the drawing; the same at each validation, so that texts differ by what was learnt.
        path: None: ``samples.md`` in the trainer's root directory.

    The tokenizer is the data module's (``trainer.datamodule.tokenizer``).
    """

    def __init__(
        self,
        prompts: Sequence[str] = ("",),
        max_new_tokens: int = 48,
        temperature: float = 0.7,
        seed: int = 0,
        path: str | Path | None = None,
    ) -> None:
        if not prompts or max_new_tokens < 1 or temperature < 0:
            raise InputError(
                "expected prompts, max_new_tokens of at least 1 and a temperature of at least 0, got "
                f"{list(prompts)}, {max_new_tokens}, {temperature}: set callbacks.samples=null for no samples"
            )
        self._prompts = list(prompts)
        self._max_new_tokens = max_new_tokens
        self._temperature = temperature
        self._seed = seed
        self._path = path

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.sanity_checking or not trainer.is_global_zero:
            return
        tokenizer: Tokenizer = trainer.datamodule.tokenizer  # pyright: ignore
        model: nn.Module = pl_module.model  # pyright: ignore
        generator = torch.Generator(pl_module.device).manual_seed(self._seed)
        with trainer.precision_plugin.forward_context():
            texts = [self._continue(model, tokenizer, prompt, generator) for prompt in self._prompts]
        for text in texts:
            pl_module.print(f"  | {text}".replace("\n", "\n  | "))
        path = Path(self._path or Path(trainer.default_root_dir) / "samples.md")
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "a", encoding="utf-8") as file:
            file.write(f"## Step {trainer.global_step}\n\n" + "".join(f"{_quoted(text)}\n\n" for text in texts))

    def _continue(self, model: nn.Module, tokenizer: Tokenizer, prompt: str, generator: torch.Generator) -> str:
        ids = tokenizer.encode(prompt, add_special_tokens=False)
        start = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
        if not start and not ids:
            raise InputError("an empty prompt needs a tokenizer that marks the start of a document: give a prompt")
        new = generate(
            model, [*start, *ids], max_new_tokens=self._max_new_tokens, temperature=self._temperature,
            end=tokenizer.eos_token_id, generator=generator,
        )  # fmt: skip
        return tokenizer.decode([*ids, *new])


@torch.no_grad()
def generate(
    model: nn.Module,
    token_ids: Sequence[int],
    *,
    max_new_tokens: int,
    temperature: float,
    end: int | None,
    generator: torch.Generator,
) -> list[int]:
    """The tokens that ``model`` adds to ``token_ids``, without the ``end`` token that may stop it early.

    The network is called uncompiled (each length would compile anew) and without a cache of keys and values, which
    keeps to the one calling convention of training. Draws from ``generator`` alone.
    """
    text = list[int]()

    def read(tokens: Sequence[int]) -> Tensor:
        text.extend(tokens)
        return model.forward(input_ids=torch.tensor([text], device=generator.device), use_cache=False).logits[0, -1]

    draw = Sampler(Sampling(temperature=temperature), generator)
    return list(new_tokens(read, token_ids, draw, at_most=max_new_tokens, ends=() if end is None else (end,)))


def _quoted(text: str) -> str:
    """A Markdown quotation, whatever the text holds."""
    return "\n".join(f">     {line}" for line in text.splitlines() or [""])
