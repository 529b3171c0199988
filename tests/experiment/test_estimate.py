"""A dry run says what a conversion leaves dense and which formats will hold the codes."""

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
