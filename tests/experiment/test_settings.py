"""What cannot be run is refused before any work, with the key and what to do."""

from pathlib import Path

import pytest
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException

from bitnet.errors import InputError
from bitnet.experiment.explain import explained
from bitnet.experiment.settings import check

CONFIG = Path(__file__).parents[2] / "conf"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["+model.extra=3"], "unknown key model.extra"),
        (["+optim.betass=[0,1]"], r"unknown key optim.betass: did you mean optim.betas\?"),
        (["+sed=1"], r"unknown key sed: did you mean seed\?"),
        (["model=dense", "quantizer=sign"], "model=dense quantizes nothing"),
        (["model=hf"], "model=hf reads a pretrained model: give model.path=DIR"),
        (["model=dense", "twin=dense"], "which is dense itself"),
        (["twin=bf16"], "twin must be null or dense, got 'bf16'"),
        (["fit=false"], "fit=false evaluates a trained model: give model.path=DIR"),
        (["fit=false", "model.path=x", "twin=dense"], "does not go with fit=false"),
        (["data.block_size=4096"], "data.block_size=4096 exceeds size.max_position_embeddings=512"),
        (["trainer.max_steps=0"], "trainer.max_steps must be a positive whole number, got 0"),
        (["trainer.max_steps=true"], "trainer.max_steps must be a positive whole number, got True"),
        (["data.block_size=abc"], "data.block_size must be a positive whole number, got 'abc'"),
        (["warmup=linear", "model=dense"], "model=dense quantizes nothing in training: leave out warmup="),
        (["warmup=linear", "warmup.weight=[0,1000]"], "before the last of the run's 6 steps.*ends at step 1000"),
        (["warmup=cosine", "warmup.shape=cos"], "warmup.shape must be one of linear, cosine, sigmoid, got 'cos'"),
        (["warmup=linear", "fit=false", "model.path=x"], "warmup= is a part of training"),
        (["quantizer=lsq", "quantizer.init=max"], "init must be one of mean, absmax, mse, got 'max'"),
        (["quantizer=seq", "quantizer.bits=4"], "1.58 or 2 bits, got 4: for 3 and 4 take quantizer=lsq"),
        (["quantizer=int4", "quantizer.bits=1"], "bits must be 2 to 8, got 1"),
        (["threads=0"], "threads must be a positive whole number, got 0"),
        (["compile=2"], "compile must be true or false, got 2"),
        (["callbacks.guard=3"], "callbacks.guard is switched off with null"),
        (["quantizer=none"], "model=bitnet158 needs a quantizer: model=dense quantizes nothing"),
        (["warmup=a8_a4", "warmup.narrow=4"], "inputs can go from 8 bits to fewer only where they end in fewer"),
        (["warmup=a8_a4", "warmup.narrow=4", "activation=none"], "activation=a4_rotated.*, got none: leave out"),
        (["warmup=a8_a4", "activation=a4", "warmup.input=[0,3]", "warmup.narrow=2"], "ends at step 3.* got step 2"),
        (["warmup=a8_a4", "activation=a4", "warmup.narrow=6"], "before the last of the run's 6 steps, got step 6"),
        (["activation=a4_rotated", "activation.rotate=o_proj"], "activation.rotate must be a list of patterns"),
        (["activation=a4_rotated", "activation.bits=9"], "bits must be 2 to 8, got 9"),
        (["model=dense", "ptq=gptq", "activation=a4_rotated"], "turns weights as well.*: take activation=a4"),
        (["twin_lr=1e-3"], "add twin=dense"),
        (["ptq=gptq"], "ptq=gptq quantizes a full-precision model after its training: choose model=hf or model=dense"),
        (["model=dense", "ptq=gptq", "quantizer=sign"], "leave out quantizer="),
        (["model.subln=true"], "model.subln=true goes into a pretrained model: give model.path=DIR"),
        (["distill=logits"], "distill= needs a teacher: give distill.teacher=DIR"),
        (["distill=logits", "fit=false", "model.path=x"], "distill= is a part of training"),
        (["distill=logits", "distill.teacher=x", "distill.logits.temperature=0"], "must be a positive number, got 0"),
        (["activation=static"], "activation=static is calibrated after the training: it goes with ptq="),
        (["model=dense", "ptq=gptq", "calibration.windows=0"], "calibration.windows must be a positive whole number"),
        (["model=dense", "ptq=gptq", "+ptq.bit=4"], r"unknown key ptq.bit: did you mean ptq.bits\?"),
        (["model=dense", "ptq=gptq", "+calibration.widnow=4"], "unknown key calibration.widnow"),
        (["model=dense", "ptq=gptq", "calibration.seed=null"], "calibration.seed must be a whole number"),
        (["model=dense", "ptq=gptq", "ptq.bits=9"], "bits must be 2 to 8"),
        (["model=dense", "ptq=gptq", "ptq.bits=abc"], "bitnet.ptq.GPTQ cannot be made from"),
        (["model=dense", "ptq=gptq", "ptq.symmetric=no"], "ptq.symmetric must be true or false, got 'no'"),
        (["model=dense", "ptq=gptq", "ptq.sweeps=1.5"], "sweeps must be a whole number"),
        (["model=dense", "ptq=hqq", "ptq.bits=2.5"], "bits must be 2 to 8, got 2.5: whole numbers only"),
        (["model=dense", "ptq=gptq", "driver.head=nope"], "driver.head must be true or false"),
        (["model=dense", "ptq=gptq", "driver.batch_size=two"], "driver.batch_size must be a whole number"),
        (["model=dense", "ptq=gptq", "driver.memory_budget=small"], "driver.memory_budget must be a number of bytes"),
    ],
)
def test_impossible_settings_are_refused(tiny, overrides, message):
    with pytest.raises(InputError, match=message):
        check(tiny(*overrides))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["modle=x"], "there is no key 'modle': did you mean model?"),
        (["data.pth=x"], "there is no key 'data.pth': did you mean data.path?"),
        (["optim.max_grad_norm=1"], "there are optim.lr, optim.weight_decay, optim.betas, optim.eps, optim.scale_lr"),
        (["model=bitnet15"], "model=bitnet15 is no choice: did you mean bitnet158?"),
        (["data=imagenet"], "data=imagenet is no choice: there are "),
        (["export=null"], "a group is switched off with GROUP=none"),
    ],
)
def test_a_misspelt_setting_is_told_in_one_line_with_what_was_meant(tiny, overrides, message):
    with pytest.raises((HydraException, OmegaConfBaseException, ValueError)) as caught:
        tiny(*overrides)
    GlobalHydra.instance().clear()
    told = explained(caught.value, CONFIG)
    assert message in told
    assert "\n" not in told


def _choices():
    groups = [folder for folder in CONFIG.iterdir() if folder.is_dir() and folder.name not in ("hydra", "experiment")]
    return [f"{group.name}={file.stem}" for group in groups for file in group.glob("[!_]*.yaml")]


@pytest.mark.parametrize("choice", sorted(_choices()))
def test_every_choice_of_every_group_names_constructors_and_their_parameters(tiny, choice):
    beside = {"model=hf": ["model.path=x"], "size=none": ["model.path=x"], "quantizer=none": ["model=dense"]}
    beside |= {f"distill={name}": ["distill.teacher=x"] for name in ("logits", "bitdistill")}
    beside["activation=none"] = ["model=dense"]  # what model=dense chooses by itself
    beside["lora=latent"] = ["model.path=x", "size=none"]
    beside["warmup=a8_a4"] = ["activation=a4", "warmup.narrow=4"]
    if choice.startswith("ptq=") or choice == "activation=static":
        beside[choice] = ["model=dense", *(["ptq=absmax"] if choice == "activation=static" else [])]
    check(tiny(choice, *beside.get(choice, [])))


EXPERIMENTS = {file.stem for file in (CONFIG / "experiment").glob("[!_]*.yaml")}


@pytest.mark.parametrize("name", sorted(EXPERIMENTS - {"ladder", "rung"}))  # test_ladder.py runs those
def test_every_experiment_composes(tiny, name):
    from_scratch = name in ("c4", "demo")
    check(tiny(f"+experiment={name}", *([] if from_scratch else ["model=hf", "model.path=x", "data=c4"])))


def test_yaml_files_stay_under_fifty_lines():
    files = set(CONFIG.rglob("*.yaml")) - {CONFIG / "hydra" / "bitnet.yaml"}  # that one holds the help page
    assert {str(file): n for file in files if (n := len(file.read_text().splitlines())) >= 50} == {}
