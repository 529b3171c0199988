"""A dry run says what a conversion leaves dense and which formats will hold the codes."""

from bitnet.experiment.estimate import memory_of_a_run
from bitnet.experiment.run import run


def test_a_dry_run_of_a_quantized_model_prints_the_conversion(tiny, capsys):
    assert run(tiny("dry_run=true")) == []
    told = capsys.readouterr().out
    assert "lm_head (the output head)" in told
    assert "--to packed --layout i2" in told
    assert "exports that do not fit" in told


def test_a_dry_run_of_a_dense_model_prints_none(tiny, capsys):
    run(tiny("model=dense", "dry_run=true"))
    told = capsys.readouterr().out
    assert "parameters" in told
    assert "Conversion" not in told


def test_the_memory_of_a_run_follows_its_optimizer_and_checkpointing(tiny):
    adamw, adamw8bit, adafactor, checkpointed = (
        memory_of_a_run(tiny(*settings))
        for settings in ([], ["optim=adamw8bit"], ["optim=adafactor"], ["model.gradient_checkpointing=true"])
    )
    parameters = (adamw - adafactor) // 8
    assert parameters > 2 * (4 * 32 * 32 + 3 * 32 * 48)
    assert adamw - adamw8bit == 6 * parameters
    assert checkpointed < adamw
