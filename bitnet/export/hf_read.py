"""Reading a Hugging Face folder whose weights are codes: what is in it becomes `bitnet.nn.QuantizedLinear`, exactly.

transformers loads a packed folder with a weight or a scale missing, with a NaN or with the inverse of a scale, and says
nothing. Here each is an error that names the tensor. Nothing in a folder is executed: json, safetensors, and the
configurations that transformers itself has (no remote code).
"""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from bitnet.errors import InputError
from bitnet.export import hf_bitnet
from bitnet.export.reading import Loaded
from bitnet.export.tensorfile import TensorFile
from bitnet.models.build import DEQUANTIZED
from bitnet.models.empty import empty_causal_lm
from bitnet.models.generation_config import read_generation
from bitnet.models.pretrained import config_of, first_line, from_directory
from bitnet.nn import QuantizedLinear
from bitnet.quant import QTensor, absmax, absmean_ternary

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

LINEAR_CLASSES = ("bitlinear", "autobitlinear")
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"

Make = Callable[[str, nn.Linear, "Tensors"], nn.Module]


def read(path: str | Path) -> Loaded:
    """Read a folder that `HuggingFaceExporter` or another program wrote: float32, codes and scales as they are stored.

    Reads dense folders, folders of ``quant_method: bitnet`` (online, bitlinear, autobitlinear; no ``linear_class``
    means bitlinear, as in transformers) and of ``quant_method: gptq``. Latent weights are frozen.

    Raises:
        InputError: no such folder, another quantization, or files that do not fit its config (see the module).
    """
    path = Path(path)
    entry = config_of(path).get("quantization_config")
    method = None if entry is None else entry.get("quant_method")
    if entry is None:
        model = from_directory(path)
        form = "hf dequantized" if getattr(model.config, DEQUANTIZED, False) else "hf dense"
    elif method == "bitnet" and entry.get("quantization_mode") == "online":
        model, form = _read_latent(path, entry), "hf latent"
    elif method == "bitnet":
        linear_class = entry.get("linear_class", "bitlinear")
        model, form = _read_packed(path, entry), f"hf {linear_class}"
    elif method == "gptq":
        from bitnet.export.gptq_read import read_gptq

        model, form = read_gptq(path, entry), "gptq"
    else:
        raise InputError(
            f"{path} is quantized with {method!r}; expected none, bitnet or gptq: load it with transformers, or give "
            "the full-precision checkpoint"
        )
    return Loaded(model.eval(), read_tokenizer(path), path, form)


class Tensors:
    """The tensors of a folder by name, whichever of its files they are in; memory-mapped, read when taken.

    Raises:
        InputError: no safetensors in the folder, or files that are not whole.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        files = [folder / name for name in self._file_names()]
        if missing := [each.name for each in files if not each.is_file()]:
            raise InputError(f"{folder} lacks {missing[0]}: fetch the whole checkpoint, as safetensors")
        self._files = {name: file for file in (TensorFile(each, {}) for each in files) for name in file.names}
        self._left = set(self._files)

    def __contains__(self, name: str) -> bool:
        return name in self._files

    def __len__(self) -> int:
        return len(self._files)

    @property
    def left(self) -> list[str]:
        """Names of the tensors that nobody has taken."""
        return sorted(self._left)

    def take(self, name: str, shape: tuple[int, ...], dtype: torch.dtype | None = None) -> Tensor:
        """The tensor ``name``, of this shape and dtype (None: any floating one).

        Raises:
            InputError: there is none, it has another shape or dtype, or holds NaN or infinity.
        """
        if name not in self._files:
            raise InputError(f"{self.folder} lacks the tensor {name}, {list(shape)}: the checkpoint is not whole")
        tensor = self._files[name].take(name)
        self._left.discard(name)
        wanted = "floating" if dtype is None else str(dtype).removeprefix("torch.")
        fits = tensor.is_floating_point() if dtype is None else tensor.dtype == dtype
        if not fits or tuple(tensor.shape) != tuple(shape):
            raise InputError(
                f"{self.folder}: expected {name} to be {wanted} {list(shape)}, got "
                f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"
            )
        if dtype is None and not bool(torch.isfinite(tensor).all()):
            raise InputError(f"{self.folder}: {name} holds NaN or infinity: the checkpoint is damaged or diverged")
        return tensor

    def bias(self, name: str, linear: nn.Linear) -> Tensor | None:
        """The bias of the layer ``name`` in float32, where its configuration gives it one."""
        return None if linear.bias is None else self.take(f"{name}.bias", tuple(linear.bias.shape)).float()

    def _file_names(self) -> list[str]:
        index = self.folder / INDEX
        if not index.is_file():
            return [WEIGHTS]
        try:
            entries = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            names = sorted({str(name) for name in entries.values()})
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise InputError(f"{index} is no index of a sharded checkpoint: {error}") from error
        if wrong := [name for name in names if Path(name).name != name or not name.endswith(".safetensors")]:
            raise InputError(f"{index} names {wrong[0]!r}: expected safetensors files beside it")
        return names


def read_with(path: Path, quantized: Callable[["PreTrainedModel", Tensors], set[str]], make: Make) -> "PreTrainedModel":
    """The body that config.json describes, one layer at a time: ``make`` for the linears that ``quantized`` names.

    Everything else is read in float32, and has to be there: no tensor missing, none too many.
    """
    tensors = Tensors(path)
    model = _empty(path, most_layers=len(tensors))
    names = quantized(model, tensors)
    if not names:
        raise InputError(f"{path}/config.json leaves every linear dense, and says that the model is quantized")
    for name in [name for name, _ in model.named_modules() if name in names]:
        linear = model.get_submodule(name)
        assert isinstance(linear, nn.Linear)
        try:
            model.set_submodule(name, make(name, linear, tensors))
        except InputError as error:
            raise error if name in str(error) else InputError(f"{path}: {name}: {error}") from None
    _fill(model, tensors, names)
    if tensors.left:
        raise InputError(f"{path} has tensors that the model has no place for: {', '.join(tensors.left[:3])}")
    return model


def read_tokenizer(path: Path) -> "PreTrainedTokenizerBase | None":
    """The tokenizer of a folder, where it has one."""
    from transformers import AutoTokenizer

    if not any((path / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "tokenizer_config.json")):
        return None
    try:
        return AutoTokenizer.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # tokenizers raises plain Exception for a file that it cannot parse
        raise InputError(f"{path} has a tokenizer that does not load: {first_line(error)}") from error


def _read_packed(path: Path, entry: dict[str, Any]) -> "PreTrainedModel":
    linear_class = entry.get("linear_class", "bitlinear")
    if linear_class not in LINEAR_CLASSES:
        raise InputError(f"{path}: linear_class must be bitlinear or autobitlinear, got {linear_class!r}")
    if entry.get("use_rms_norm"):
        raise InputError(
            f"{path} has a norm inside each linear (use_rms_norm), which this package's layers do not have"
        )

    def make(name: str, linear: nn.Linear, tensors: Tensors) -> nn.Module:
        if linear.out_features % hf_bitnet.ROWS_A_BYTE:
            raise InputError(f"{linear.out_features} rows are no multiple of 4: such a layer cannot be packed")
        bias = tensors.bias(name, linear)
        if bias is not None and linear_class == "autobitlinear" and bool(bias.any()):
            raise InputError("autobitlinear multiplies a bias by the scale, so this one was either lost or is wrong")
        shape = (linear.out_features // hf_bitnet.ROWS_A_BYTE, linear.in_features)
        codes = hf_bitnet.unpack_rows(tensors.take(f"{name}.weight", shape, torch.uint8))
        stored = tensors.take(f"{name}.weight_scale", (1,))
        try:
            scale = hf_bitnet.restored_scale(stored, linear_class)
        except InputError as error:
            raise InputError(f"{path}: {name}.weight_scale: {error}") from None
        return QuantizedLinear(QTensor(codes, scale, levels=3), bias, absmax)

    return read_with(path, lambda model, _: _converted(model, entry), make)


def _read_latent(path: Path, entry: dict[str, Any]) -> "PreTrainedModel":
    model = from_directory(path)
    for name in sorted(_converted(model, entry)):
        linear = model.get_submodule(name)
        assert isinstance(linear, nn.Linear)
        bias: Tensor | None = linear.bias
        model.set_submodule(name, QuantizedLinear(absmean_ternary(linear.weight.detach()), bias, absmax))
    return model


def _converted(model: "PreTrainedModel", entry: dict[str, Any]) -> set[str]:
    """Names of the linears that transformers would replace: its own rules, applied to our empty model."""
    from transformers.quantizers.base import HfQuantizer
    from transformers.quantizers.quantizers_utils import should_convert_module

    keep: Any = model._keep_in_fp32_modules
    listed = entry.get("modules_to_not_convert")
    if listed is not None and not (isinstance(listed, list) and all(isinstance(each, str) for each in listed)):
        raise InputError(f"modules_to_not_convert must be a list of names, got {listed!r}")
    skipped = HfQuantizer.get_modules_to_not_convert(model, listed, keep)
    return {
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and should_convert_module(name, skipped)
    }


def _empty(path: Path, most_layers: int) -> "PreTrainedModel":
    """The body of config.json without memory. A file has a tensor a layer at least, which bounds the number of them."""
    config = config_of(path)
    for name in ("dtype", "torch_dtype"):  # what the files hold; it is read into float32
        config.pop(name, None)
    try:
        model = empty_causal_lm(config, most_layers)
    except InputError as error:
        raise InputError(f"{path}/config.json: {error}") from error
    model.config.dtype = torch.float32
    model.generation_config = read_generation(path) or model.generation_config
    return model


def _fill(model: "PreTrainedModel", tensors: Tensors, quantized: set[str]) -> None:
    """Give every parameter and saved buffer of the empty ``model`` its values."""
    tied: set[str] = set(model.all_tied_weights_keys)
    for name, tensor in _unfilled(model, quantized):
        if name in tied and name not in tensors:
            continue
        values = tensors.take(name, tuple(tensor.shape), None if tensor.is_floating_point() else tensor.dtype)
        values = values.float() if values.is_floating_point() else values
        parent, _, leaf = name.rpartition(".")
        module = model.get_submodule(parent)
        setattr(module, leaf, nn.Parameter(values) if isinstance(tensor, nn.Parameter) else values)
    if tied:
        model.tie_weights()


def _unfilled(model: nn.Module, quantized: set[str]) -> Iterator[tuple[str, Tensor]]:
    saved = model.state_dict(keep_vars=True)
    for name, tensor in list(saved.items()):
        if name.rpartition(".")[0] not in quantized:
            yield name, tensor
