"""GPTQModel itself, through transformers: its logits for the folders that are written here. Runs where it is installed:

``pip install gptqmodel optimum`` and ``pytest tests/export/test_gptq_runtime.py`` (a minute; not among the packages
that this project installs).
"""

import pytest

pytest.importorskip("gptqmodel", reason="GPTQModel is not installed: pip install gptqmodel optimum")
pytest.importorskip("optimum", reason="optimum is not installed: pip install gptqmodel optimum")

from transformers import AutoModelForCausalLM

from bitnet.export.gptq import GPTQExporter
from bitnet.export.parity import difference, logits, token_ids
from bitnet.models import Size, from_scratch
from bitnet.ptq import Driver, RoundToNearest, quantize

pytestmark = pytest.mark.filterwarnings("ignore")  # those of GPTQModel and of what it imports


@pytest.mark.parametrize("exclude", [(), ("down_proj",)])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize(("bits", "symmetric"), [(2, False), (3, True), (4, False), (8, True)])
def test_gptqmodel_computes_the_logits_of_the_model(tmp_path, bits, symmetric, dtype, exclude):
    size = Size(
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
    )
    model = from_scratch(body="llama", size=size, vocab_size=128, hidden_act="silu").eval()
    quantize(model, RoundToNearest(bits=bits, symmetric=symmetric, granularity=32), driver=Driver(exclude=exclude))
    GPTQExporter(dtype=dtype).write(model, None, tmp_path / "out")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", device_map="cpu")
    ids = token_ids(model)
    assert difference(logits(model, ids), logits(loaded, ids)) < (1e-3 if dtype == "float32" else 5e-3)
