"""A student learns from a teacher that stays as it is; each term is what its formula says; a resume is exact."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from toy_training import VOCABULARY, ToyData, toy_module, toy_trainer

from bitnet import BitLinear158, InputError
from bitnet.models import Size, causal_lm
from bitnet.nn import LatentLoRA
from bitnet.training import AttentionRelations, Distillation, HiddenStates, LastAndBest, LogitKL
from bitnet.training.distill import Seen

BLOCK = 8


def build(body="llama", layer=None, seed=0, layers=2, hidden=16, vocabulary=VOCABULARY):
    size = Size(
        hidden_size=hidden,
        intermediate_size=24,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=16,
    )
    act = "silu" if body == "llama" else "relu2"
    return causal_lm(vocab_size=vocabulary, body=body, hidden_act=act, size=size, layer=layer, seed=seed)


def student(**options) -> nn.Module:
    return build(layer=BitLinear158.from_linear, **options).train()


def every_term(teacher=None, **options) -> Distillation:
    return Distillation(
        teacher or build(seed=5),
        logits=LogitKL(weight=0.5, temperature=2.0),
        hidden=HiddenStates(weight=0.3, layers=(0, -1)),
        relations=AttentionRelations(weight=10.0, heads=2),
        **options,
    )


def fitted(root, model, distillation, *, until=6, resume=None, **options):
    module = toy_module(6, model=model, distillation=distillation)
    logged = {}
    module.log_dict = lambda figures: logged.update({k: float(v) for k, v in figures.items()})
    trainer = toy_trainer(root, until, [LastAndBest()], enable_checkpointing=True, **options)
    trainer.fit(module, datamodule=ToyData(), ckpt_path=resume)
    return module, logged


def ids() -> torch.Tensor:
    return torch.randint(0, VOCABULARY, (3, BLOCK), generator=torch.Generator().manual_seed(1))


def terms_of(model, distillation) -> dict[str, torch.Tensor]:
    distillation.check(model)
    distillation.attach(model)
    inputs = {"input_ids": ids()}
    logits = model(**inputs, use_cache=False).logits
    found = distillation.losses(logits, inputs, torch.ones(3, BLOCK, dtype=torch.bool))
    distillation.detach()
    return found


def test_a_teacher_has_nothing_to_tell_to_itself():
    teacher = build(seed=5)
    for name, term in terms_of(build(seed=5), every_term(teacher)).items():
        assert term.detach().abs() < 1e-6, name


def test_the_divergence_of_logits_is_that_of_the_predicted_tokens():
    ours, theirs = torch.randn(2, 4, 7, requires_grad=True), 3 * torch.randn(2, 4, 7)
    predicted = torch.tensor([[1, 1, 1, 0], [1, 0, 1, 0]]).bool()
    found = LogitKL(temperature=2.0).loss(Seen(ours, {}), Seen(theirs, {}), predicted)
    p, q = (theirs.double() / 2).softmax(-1), (ours.double() / 2).softmax(-1)
    expected = (p * (p / q).log()).sum(-1)[predicted].mean() * 4
    torch.testing.assert_close(found.double(), expected)
    assert torch.autograd.grad(found, ours)[0][~predicted].abs().max() == 0


def test_relations_are_softmaxes_of_products_between_tokens():
    ours, theirs = torch.randn(2, 5, 12), torch.randn(2, 5, 6)  # widths may differ
    term = AttentionRelations(heads=3, projections=("v_proj",))
    logits = torch.zeros(2, 5, 1)
    found = term.loss(
        Seen(logits, {"relations.v_proj": ours}), Seen(logits, {"relations.v_proj": theirs}), torch.ones(2, 5)
    )
    total, count = 0.0, 0
    for b in range(2):
        for h in range(3):
            for t in range(5):
                rows = [x[b, :, h * w : (h + 1) * w].double() for x, w in ((ours, 4), (theirs, 2))]
                q, p = ((r @ r[t] / math.sqrt(r.shape[1])).softmax(0) for r in rows)
                total, count = total + (p * (p / q).log()).sum(), count + 1
    torch.testing.assert_close(found.double(), total / count)


@pytest.mark.parametrize("measure", ["mse", "cosine"])
def test_hidden_states_are_compared_after_the_named_blocks(measure):
    model, teacher = student(), build(seed=5)
    found = terms_of(model, Distillation(teacher, hidden=HiddenStates(measure=measure, layers=[0])))["hidden"]
    ours, theirs = (
        each(ids(), output_hidden_states=True, use_cache=False).hidden_states[1] for each in (model, teacher)
    )
    if measure == "mse":
        expected = F.mse_loss(ours, theirs) / theirs.square().mean()
    else:
        expected = 1 - F.cosine_similarity(ours, theirs, dim=-1).mean()
    torch.testing.assert_close(found, expected)


def test_the_objective_weighs_the_terms(tmp_path):
    distillation = every_term(cross_entropy=0.25)
    terms = {name: torch.tensor(value) for name, value in [("logits", 1.0), ("hidden", 2.0), ("relations", 3.0)]}
    assert float(distillation.objective(torch.tensor(4.0), terms)) == pytest.approx(1.0 + 0.5 + 0.6 + 30.0)


def test_training_changes_the_student_alone_and_logs_every_term(tmp_path):
    teacher = build(seed=5)
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    module, logged = fitted(tmp_path, student(), every_term(teacher))
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())
    assert not teacher.training
    assert all(parameter.grad is None for parameter in teacher.parameters())
    assert {f"train/distill_{name}" for name in ("logits", "hidden", "relations")} <= logged.keys()
    assert all(math.isfinite(value) for value in logged.values())
    assert not any("teacher" in name or "distill" in name for name in module.state_dict())
    assert not any(layer._forward_hooks for layer in module.model.modules())


def test_learning_from_the_teacher_alone_comes_nearer_to_it(tmp_path):
    model, teacher = student(), build(seed=5)
    for parameter in teacher.parameters():
        parameter.data *= 3  # sharp opinions
    distillation = Distillation(teacher, cross_entropy=0.0, logits=LogitKL())
    before = terms_of(model, Distillation(teacher, logits=LogitKL()))["logits"].detach()
    fitted(tmp_path, model, distillation)
    assert terms_of(model, Distillation(teacher, logits=LogitKL()))["logits"].detach() < 0.9 * before


def test_the_logged_loss_is_the_cross_entropy_over_all_micro_batches(tmp_path):
    _, alone = fitted(tmp_path / "alone", student(), None, until=1, accumulate_grad_batches=2)
    _, taught = fitted(tmp_path / "taught", student(), every_term(), until=1, accumulate_grad_batches=2)
    assert taught["train/loss"] == alone["train/loss"]
    assert taught["train/grad_norm"] != alone["train/grad_norm"]


def test_a_resumed_run_ends_in_the_same_bits(tmp_path):
    straight, _ = fitted(tmp_path / "straight", student(), every_term())
    fitted(tmp_path / "stopped", student(), every_term(), until=3)
    resumed, _ = fitted(
        tmp_path / "stopped", student(), every_term(), resume=tmp_path / "stopped/checkpoints/last.ckpt"
    )
    for name, value in straight.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name


def test_a_teacher_may_be_a_folder_in_bfloat16_of_another_depth(tmp_path):
    build(seed=5, layers=3).save_pretrained(tmp_path)
    distillation = Distillation(tmp_path, dtype="bfloat16", logits=LogitKL(), relations=AttentionRelations())
    assert {parameter.dtype for parameter in distillation.teacher.parameters()} == {torch.bfloat16}
    assert all(torch.isfinite(term) for term in terms_of(student(), distillation).values())


def test_what_the_student_does_not_train_is_in_memory_once():
    model, teacher = student(seed=5), build(seed=5)
    model.get_input_embeddings().requires_grad_(False)
    model.lm_head.requires_grad_(False)
    model.lm_head.weight.data[0, 0] += 1  # no longer the teacher's
    distillation = Distillation(teacher, logits=LogitKL())
    assert distillation.share(model) == VOCABULARY * 16 * 4
    assert teacher.model.embed_tokens.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()
    assert teacher.lm_head.weight.data_ptr() != model.lm_head.weight.data_ptr()


def test_the_frozen_base_of_adapters_is_in_memory_once():
    model, teacher = student(seed=5), build(seed=5)
    LatentLoRA(rank=2, norms=False)(model)
    shared = Distillation(teacher, logits=LogitKL()).share(model)
    assert shared == sum(parameter.nbytes for parameter in teacher.parameters())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Distillation(build(vocabulary=29), logits=LogitKL()), "vocabulary of 23 tokens, got 29"),
        (lambda: Distillation(build(), hidden=HiddenStates(layers=(2,))), r"layers are -2 \.\.\. 1 in LlamaFor.*got 2"),
        (lambda: Distillation(build(), relations=AttentionRelations(projections=("c_attn",))), "one layer 'c_attn'"),
        (lambda: Distillation(None, logits=LogitKL()), "distill.teacher is missing"),
        (lambda: Distillation("no/folder", logits=LogitKL()), "distill.teacher must be a Hugging Face dir.* no/folder"),
        (lambda: Distillation(build()), "give logits, hidden or relations"),
        (lambda: Distillation(build(), logits=LogitKL(), dtype="float16"), "dtype must be one of float32, bfloat16"),
        (lambda: Distillation(build(), logits=LogitKL(), cross_entropy=-1), "cross_entropy must be 0 or more"),
        (lambda: LogitKL(temperature=0), "temperature must be a positive number"),
        (lambda: HiddenStates(measure="l1"), "measure must be one of mse, cosine"),
        (lambda: AttentionRelations(heads=0), "heads must be a positive whole number"),
        (lambda: Distillation(build(), relations=AttentionRelations(heads=3)), "must divide the 16 outputs, got 3"),
    ],
)
def test_what_cannot_be_compared_is_refused_before_any_work(make, message):
    with pytest.raises(InputError, match=message):
        toy_module(6, model=student(), distillation=make())


def test_hidden_states_of_another_width_are_refused():
    with pytest.raises(InputError, match="equally wide, got 16 and the teacher's 32"):
        terms_of(student(), Distillation(build(hidden=32), hidden=HiddenStates()))
