"""Runs whose inputs stay in float, or are turned and end in 4 bits: from the command line's settings to the exports."""

import pytest
import torch

from bitnet.experiment.run import run
from bitnet.export import load
from bitnet.nn import PackedLinear, QuantizedLinear
from bitnet.quant import Rotated


@pytest.mark.parametrize("format", ["packed", "gptq", "model.gguf"])
def test_weights_alone_are_trained_and_exported_with_equal_codes(tiny, tmp_path, format):
    name = format.removeprefix("model.")  # the file is named so
    shape = ["size.intermediate_size=64", "size.num_attention_heads=2", "size.num_key_value_heads=2"]
    body = ["model.body=llama", "model.hidden_act=silu", *shape]
    cfg = tiny("quantizer=int4", "quantizer.granularity=32", "activation=none", f"export={name}", *body)
    latent, frozen = run(cfg)
    assert latent.nll == frozen.nll
    assert frozen.bits_per_weight == pytest.approx(4.5)
    layers = [each for each in load(tmp_path / "run" / format).model.modules() if isinstance(each, QuantizedLinear)]
    assert len(layers) == 14
    assert all(each.activation is None for each in layers)


def test_inputs_are_turned_and_go_from_8_bits_to_4(tiny, tmp_path):
    cfg = tiny("activation=a4_rotated", "warmup=a8_a4", "warmup.narrow=4", "export=[packed,hf]")
    latent, frozen = run(cfg)
    assert latent.nll == frozen.nll
    model = load(tmp_path / "run" / "packed").model
    turned = {name.split(".")[-1] for name, each in model.named_modules() if _activation(each) == Rotated()}
    assert turned == {"o_proj", "down_proj"}
    dense = load(tmp_path / "run" / "hf").model
    weight = model.model.layers[0].mlp.down_proj.weight
    assert torch.equal(dense.model.layers[0].mlp.down_proj.weight, Rotated().rotate(weight.dequantize()))


def _activation(layer):
    return layer.activation if isinstance(layer, PackedLinear) else None
