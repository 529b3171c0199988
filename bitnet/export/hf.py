"""A Hugging Face folder: config, safetensors, tokenizer and model card, which transformers loads by itself.

What the weights file holds depends on what transformers can compute:

dense            a model without quantized layers: its weights.
online           BitNet b1.58 as transformers has it (one absmean scale a matrix, int8 absmax per token): the latent
                 weights, which its ``AutoBitLinear`` quantizes in every forward pass. W1.58A8, and can be trained on.
dequantized      every other quantized model: the values that its codes stand for, in dense layers. The weights are
                 exact; the activations, where the model quantizes them, are not quantized.

Nothing is handed over unread: the folder is loaded by transformers while it still has a temporary name, and has to hold
every tensor bit for bit and to give the same logits.

transformers quantizes with ``round(x * (1 / scale))`` where this package has ``round(x / scale)``, so now and then a
value next to a rounding boundary gets the neighbouring code: 2 of 2.3e8 weights and 33 of 2.5e7 activations in random
models. Such a flip is amplified from layer to layer, up to the level of the rounding noise itself: the logits of random
models differ by 0.002 (2 layers, hidden 64), 0.019 (6, 256) and 0.042 (12, 768) of their spread. Leaving the
activations unquantized makes 0.012, 0.038 and 0.064, leaving out the quantizers altogether about 1.
"""

import copy
import json
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from bitnet.errors import InputError
from bitnet.export.protocol import ExportError
from bitnet.files import atomic_directory
from bitnet.models.build import DEQUANTIZED
from bitnet.nn import BitLinear, QuantizedEmbedding, QuantizedModule, bit_linears
from bitnet.nn.linears import is_conv1d
from bitnet.quant import QTensor, absmax, absmean_ternary

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# Root mean square of the logits' difference, as a share of their spread over the vocabulary.
SAME_ARITHMETIC = 1e-4  # the same layers in the same order: 0 was measured; a kernel may still sum in another order
SAME_QUANTIZERS = 0.25  # transformers' own b1.58 layers: see above. Loose, since the exact check goes before it.

CONTENTS = {
    "dense": "full-precision weights",
    "online": "latent weights, quantized as they are used: 1.58-bit weights and 8-bit activations (W1.58A8)",
    "dequantized": "exact values of the quantized weights in dense layers; activations are not quantized here",
}


@dataclass(frozen=True, slots=True)
class HuggingFaceExporter:
    """Writes what ``AutoModelForCausalLM.from_pretrained`` loads. See the module's docstring."""

    def write(self, model: nn.Module, tokenizer: "PreTrainedTokenizerBase | None", directory: str | Path) -> Path:
        """Write ``directory``, print a line saying what it holds, and return its path. ``model`` stays as it is.

        Raises:
            InputError: ``directory`` exists; a weight is NaN or infinite; ``model`` is no transformers model.
            ExportError: transformers reads back another model than was written. Nothing is left behind.
        """
        from transformers import PreTrainedModel

        if not isinstance(model, PreTrainedModel):
            raise InputError(f"expected a transformers model to write for Hugging Face, got {type(model).__name__}")
        refuse_non_finite(model)
        kind = contents(model)
        written = _dequantized(model) if kind == "dequantized" else model
        with _transformers_at_hand(), atomic_directory(directory) as folder:
            if kind == "dequantized":
                setattr(written.config, DEQUANTIZED, True)
            written.save_pretrained(folder)
            if kind == "online":
                _declare_online(folder / "config.json", _dense_linears(model))
            if tokenizer is not None:
                tokenizer.save_pretrained(folder)
            (folder / "README.md").write_text(_card(kind), encoding="utf-8")
            _read_back(folder, written, kind)
        print(f"Hugging Face checkpoint in {directory}: {CONTENTS[kind]}")
        return Path(directory)


def contents(model: nn.Module) -> str:
    """Return what a Hugging Face folder of ``model`` holds: dense, online or dequantized."""
    quantized = [module for module in model.modules() if isinstance(module, BitLinear | QuantizedModule)]
    if not quantized:
        return "dense"
    return "online" if all(_is_transformers_b158(module) for module in quantized) else "dequantized"


def refuse_non_finite(model: nn.Module) -> None:
    """Raise InputError naming the first tensor of ``model`` that holds NaN or infinity."""
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise InputError(
                f"{name} holds NaN or infinity: the training diverged; export its last good checkpoint instead"
            )


def _is_transformers_b158(layer: nn.Module) -> bool:
    """Whether ``AutoBitLinear`` computes the same codes: asked of the quantizers themselves, however they were made."""
    if not isinstance(layer, BitLinear):
        return False
    generator = torch.Generator().manual_seed(0)
    probe = torch.randn(4, layer.in_features, generator=generator)
    probe[0] *= 1e-7  # below the smallest scale: the clamp shows
    probe[1, 0] = 100.0
    return _same(layer.quantized_weight(), absmean_ternary(layer.weight)) and _same(
        layer.activation(probe), absmax(probe)
    )


def _same(one: QTensor, other: QTensor) -> bool:
    return (
        one.levels == other.levels
        and one.zero_point is None
        and torch.equal(one.scale, other.scale)
        and torch.equal(one.qdata, other.qdata)
    )


def _dequantized(model: "PreTrainedModel") -> "PreTrainedModel":
    """A copy of ``model`` with transformers' own layers in the place of the quantized ones."""
    model = copy.deepcopy(model)
    with torch.device("meta"):
        plain = type(model)(model.config)  # what stood there before
    for name, layer in list(model.named_modules()):
        if isinstance(layer, BitLinear | QuantizedModule):
            weight = layer.weight if isinstance(layer, QuantizedModule) else layer.quantized_weight()
            values = weight.dequantize(model.dtype)
            dense = plain.get_submodule(name)
            dense.register_parameter("weight", nn.Parameter(values.t().contiguous() if is_conv1d(dense) else values))
            if not isinstance(layer, QuantizedEmbedding):
                dense.register_parameter("bias", cast("nn.Parameter | None", layer.bias))
            model.set_submodule(name, dense)
    return model


def _dense_linears(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if type(module) is nn.Linear]


def _declare_online(config_file: Path, left_dense: list[str]) -> None:
    """Tell transformers to quantize: without this entry the latent weights load as a dense model, and raise nothing."""
    config = json.loads(config_file.read_text(encoding="utf-8"))
    config["quantization_config"] = {
        "quant_method": "bitnet",
        "linear_class": "autobitlinear",
        "quantization_mode": "online",
        "modules_to_not_convert": left_dense,
    }
    config_file.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _card(kind: str) -> str:
    lines = [
        "---",
        "library_name: transformers",
        "pipeline_tag: text-generation",
        "tags: [bitnet]",
        "---",
        "",
        f"Contents: {CONTENTS[kind]}.",
        "",
        "```python",
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        'model = AutoModelForCausalLM.from_pretrained("this folder")',
        'tokenizer = AutoTokenizer.from_pretrained("this folder")',
        "```",
    ]
    if kind == "online":
        lines += [
            "",
            "transformers asks for `accelerate` when it loads this (`pip install accelerate`), and compiles its BitNet",
            "layers: without a C++ compiler on the machine set `TORCH_COMPILE_DISABLE=1`.",
        ]
    return "\n".join(lines) + "\n"


def _read_back(folder: Path, written: "PreTrainedModel", kind: str) -> None:
    """Load ``folder`` as its user will, and compare.

    Raises:
        ExportError: a tensor is missing, left over or differs in a bit; a layer is not quantized; the logits differ.
    """
    from transformers import AutoModelForCausalLM

    model_and_report: Any = AutoModelForCausalLM.from_pretrained(
        folder,
        local_files_only=True,
        output_loading_info=True,
        attn_implementation=written.config._attn_implementation,
    )
    loaded, report = model_and_report
    for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if keys := sorted(map(str, report[problem])):
            raise ExportError(f"transformers reads {folder} with {problem.replace('_', ' ')}: {keys[:3]}")
    loaded.to(written.device)
    _compare_tensors(written, loaded)
    token_ids = _token_ids(written)
    expected = _logits(written, token_ids)
    if kind == "online":
        _refuse_unquantized(written, loaded)
        _compare_logits(expected, _logits(loaded, token_ids), SAME_QUANTIZERS, "with transformers' layers")
        for name, layer in bit_linears(written):
            same = type(layer).from_linear(
                loaded.get_submodule(name), quantizer=layer.quantizer, activation=layer.activation
            )
            loaded.set_submodule(name, same)
    _compare_logits(expected, _logits(loaded, token_ids), SAME_ARITHMETIC, "with this package's layers")


@contextmanager
def _transformers_at_hand() -> Iterator[None]:
    """Let transformers load and run BitNet layers in this process, and without its bars; all as before afterwards.

    It compiles those layers when they first run, which takes a C++ compiler.
    """
    from transformers.utils import logging

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # torch's compiler uses what torch has deprecated
        import_module("transformers.integrations.bitnet")

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with torch.compiler.set_stance("force_eager"):
            yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def _compare_tensors(written: nn.Module, loaded: nn.Module) -> None:
    expected, found = written.state_dict(), loaded.state_dict()
    if keys := sorted(expected.keys() ^ found.keys()):
        raise ExportError(f"transformers' model and the one that was written do not have the same tensors: {keys[:3]}")
    for name, tensor in expected.items():
        if tensor.dtype != found[name].dtype or not torch.equal(tensor, found[name]):
            raise ExportError(f"transformers reads other values of {name} than were written")


def _refuse_unquantized(written: nn.Module, loaded: nn.Module) -> None:
    from transformers.integrations.bitnet import AutoBitLinear

    found = {name for name, module in loaded.named_modules() if isinstance(module, AutoBitLinear)}
    if wrong := sorted(found ^ {name for name, _ in bit_linears(written)}):
        raise ExportError(f"transformers quantizes other layers than were trained quantized: {wrong[:3]}")


def _token_ids(model: "PreTrainedModel") -> Tensor:
    """Two rows of random tokens, the same ones every time."""
    config: Any = model.config.get_text_config()
    length = min(32, getattr(config, "max_position_embeddings", 32))
    generator = torch.Generator().manual_seed(0)
    return torch.randint(config.vocab_size, (2, length), generator=generator).to(model.device)


@torch.no_grad()
def _logits(model: nn.Module, token_ids: Tensor) -> Tensor:
    training = model.training
    model.eval()
    try:
        return model(input_ids=token_ids).logits.float()
    finally:
        model.train(training)


def _compare_logits(expected: Tensor, found: Tensor, tolerance: float, how: str) -> None:
    spread = (expected - expected.mean(-1, keepdim=True)).square().mean().sqrt()
    difference = float((found - expected).square().mean().sqrt() / spread.clamp(min=1e-30))
    if not difference <= tolerance:
        raise ExportError(
            f"the folder read back {how} gives other logits: they differ by {difference:.1e} of their spread, "
            f"{tolerance:.1e} is allowed"
        )
