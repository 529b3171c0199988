"""Any Hugging Face model of plain linears: converted, trained, frozen, exported and read back, bit for bit."""

import copy
import warnings

import pytest
import torch
import transformers
from torch import nn
from transformers.pytorch_utils import Conv1D

import bitnet
from bitnet import BitLinear158, InputError
from bitnet.export import HuggingFaceExporter, PackedExporter
from bitnet.export.packed_read import read
from bitnet.nn import QuantizedLinear, bit_linears
from bitnet.nn.linears import as_linear
from bitnet.training import adamw

VOCABULARY = 60
LLAMA = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "head_dim": 8,
    "pad_token_id": None,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
NO_HEAD_DIM = {key: value for key, value in LLAMA.items() if key != "head_dim"}
OTHER = {"vocab_size": VOCABULARY, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": None}
ARCHITECTURES = {  # model type -> settings of its config, linears converted
    "llama": (LLAMA, 14),
    "mistral": (LLAMA, 14),
    "qwen2": (NO_HEAD_DIM, 14),
    "qwen3": (LLAMA, 14),
    "gemma": (LLAMA, 14),
    "gemma2": (LLAMA, 14),
    "phi": ({**NO_HEAD_DIM, "resid_pdrop": 0.0, "embd_pdrop": 0.0}, 12),
    "gpt2": ({**OTHER, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}, 8),
    "gpt_neox": (
        {
            **OTHER,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "max_position_embeddings": 64,
        },
        8,
    ),
    "opt": (
        {
            **OTHER,
            "pad_token_id": 0,
            "hidden_size": 32,
            "word_embed_proj_dim": 32,
            "ffn_dim": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "max_position_embeddings": 64,
        },
        12,
    ),
    "mixtral": ({**LLAMA, "num_local_experts": 4, "num_experts_per_tok": 2}, 8),
    "olmoe": ({**NO_HEAD_DIM, "num_experts": 4, "num_experts_per_tok": 2}, 8),
}
MIXTURES = ("mixtral", "olmoe")


def dense(kind: str) -> transformers.PreTrainedModel:
    config = transformers.AutoConfig.for_model(kind, **ARCHITECTURES[kind][0])
    return transformers.AutoModelForCausalLM.from_config(config).float()


def convert(model: nn.Module, **options) -> list[str]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*experts kept in one tensor stay dense")
        return bitnet.convert(model, **options)


def train(model: nn.Module, steps: int = 2) -> list[float]:
    """Losses of a few steps on one batch, and the gradients of the first in ``.grad``."""
    ids = torch.randint(3, VOCABULARY, (4, 16))
    optimizer, losses = adamw(model, lr=2e-2, weight_decay=0.0), []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def answers(model: nn.Module) -> torch.Tensor:
    ids = torch.randint(3, VOCABULARY, (2, 12), generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        return model.eval()(input_ids=ids, use_cache=False).logits


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_a_model_is_converted_trained_frozen_exported_and_read_back_bit_for_bit(kind, tmp_path):
    model = dense(kind)
    names = convert(model)
    assert len(names) == ARCHITECTURES[kind][1]
    assert model.get_output_embeddings() not in dict(bit_linears(model)).values()
    losses = train(model.train(), steps=3)
    assert losses[-1] < losses[0]
    for name, layer in bit_linears(model):
        assert layer.weight.grad is not None, name
        assert layer.weight.grad.abs().sum() > 0, name
    trained = answers(model)
    frozen = copy.deepcopy(model)
    assert bitnet.freeze(frozen) == names
    assert torch.equal(answers(frozen), trained)
    loaded = read(PackedExporter().write(model, None, tmp_path / "packed").path).model
    assert torch.equal(answers(loaded), trained)


@pytest.mark.parametrize("kind", ["llama", "qwen3", "phi"])
def test_biases_and_norms_inside_attention_are_left_as_they_are(kind):
    model = dense(kind)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    convert(model)
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_a_conv1d_answers_as_the_linear_it_is_made_into():
    layer = Conv1D(12, 7)
    nn.init.normal_(layer.bias)
    x = torch.randn(3, 7)
    linear = as_linear(layer)
    assert (linear.in_features, linear.out_features) == (7, 12)
    assert linear.bias is layer.bias
    assert linear.weight.is_contiguous()
    torch.testing.assert_close(linear(x), layer(x))


def test_a_conv1d_is_converted_with_the_codes_of_its_transposed_weight():
    model = dense("gpt2")
    weight = model.transformer.h[1].mlp.c_proj.weight.detach().clone()
    convert(model)
    layer = model.transformer.h[1].mlp.c_proj
    assert isinstance(layer, BitLinear158)
    assert torch.equal(layer.weight, weight.t())


@pytest.mark.filterwarnings("ignore:.*:DeprecationWarning")
def test_a_folder_for_transformers_has_conv1d_the_way_it_was(tmp_path):
    model = dense("gpt2").eval()
    convert(model)
    done = HuggingFaceExporter().write(model, None, tmp_path / "hf")
    assert done.format == "hf dequantized"
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    expected = model.transformer.h[0].attn.c_proj.quantized_weight().dequantize()
    assert torch.equal(again.transformer.h[0].attn.c_proj.weight, expected.t())
    problems = HuggingFaceExporter(weights="latent").problems(model)
    assert any("are Conv1D, transformers quantizes nn.Linear only" in each for each in problems)


@pytest.mark.parametrize("kind", MIXTURES)
def test_experts_in_one_tensor_are_named_and_stay_dense(kind):
    model = dense(kind)
    with pytest.warns(
        UserWarning, match=r"layers\.0\.mlp\.experts, .*stay dense, and with them [5-9]\d% of the weights"
    ):
        names = bitnet.convert(model)
    assert all("self_attn" in name for name in names)


class Mixture(nn.Module):
    """Experts that are linears of their own, a router as older models have it, and a shared expert's gate."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.shared_expert_gate = nn.Linear(8, 3), nn.Linear(8, 1)
        self.experts = nn.ModuleList(nn.ModuleDict({"gate_proj": nn.Linear(8, 8)}) for _ in range(3))
        self.shared_expert = nn.Linear(8, 8)


class Eyes(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.vision_tower = nn.ModuleList([nn.Linear(8, 8)])
        self.multi_modal_projector = nn.Linear(8, 8)
        self.layers = nn.ModuleList([Mixture()])
        self.gated = nn.ModuleDict({"gate": nn.Linear(8, 8)})  # no experts beside it: no router
        self.lm_head = nn.Linear(8, 8)


def test_routers_and_other_senses_stay_dense_by_default_and_can_be_asked_for():
    experts = [f"layers.0.experts.{n}.gate_proj" for n in range(3)]
    assert bitnet.convert(Eyes()) == [*experts, "layers.0.shared_expert", "gated.gate"]
    assert len(bitnet.convert(Eyes(), exclude=["lm_head"])) == 9
    with pytest.raises(InputError, match="no linear layer to convert among"):
        bitnet.convert(Eyes(), include=["vision_tower.*"])


def test_a_frozen_conv1d_has_its_bias():
    model = dense("gpt2")
    nn.init.normal_(model.transformer.h[0].attn.c_attn.bias)
    bias = model.transformer.h[0].attn.c_attn.bias.detach().clone()
    convert(model)
    bitnet.freeze(model)
    layer = model.transformer.h[0].attn.c_attn
    assert isinstance(layer, QuantizedLinear)
    assert torch.equal(layer.bias, bias)
