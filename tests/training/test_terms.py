"""The loss as a sum of named terms: weights, schedules, balance, checkpoints, refusals."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor
from transformers import LlamaForCausalLM, MambaConfig, MambaForCausalLM

from kdkernels.losses import features, relations
from kdkernels.training import schedules
from kdkernels.training.terms import TERMS
from kdkernels.training.trainer import TERMS_FILE, DistillationArguments, DistillationTrainer

pytestmark = pytest.mark.usefixtures("one_thread")
one_thread = tiny_models.one_thread

TOKEN_TERMS = "hidden=0.7,embedding=0.5,attention=0.3,minilm=0.2,sentence=0.4"
RELATIONS = ("rkd_distance", "rkd_angle", "gram")


def narrow() -> LlamaForCausalLM:
    return tiny_models.llama(1, seed=1, hidden=8)


def trainer(output: Path, **options: Any) -> DistillationTrainer:
    return tiny_models.trainer(output, **{"student": narrow(), "max_steps": 2} | options)


def logs(trained: DistillationTrainer) -> list[dict[str, float]]:
    return [entry for entry in trained.state.log_history if "loss" in entry]


def weights(model: torch.nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def assert_close(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=3e-5, atol=3e-6)


@pytest.mark.parametrize(
    ("given", "first", "middle", "last"),
    [
        ("0.5", 0.5, 0.5, 0.5),
        (2, 2, 2, 2),
        ("linear:1:3", 1, 2, 3),
        ("cosine:4:1", 4, 2.5, 1),
        ("warmup:2:1", 0, 1, 2),
        ("warmup:2:0.25", 0, 2, 2),
    ],
)
def test_schedules(given: Any, first: float, middle: float, last: float) -> None:
    schedule = schedules.parse("w", given)
    values = [schedule.at(x) for x in (0, 0.5, 1)]
    assert values == [pytest.approx(v) for v in (first, middle, last)]
    assert (schedule.at(-1), schedule.at(2)) == (schedule.at(0), last)
    assert schedule.highest == max(first, last)


@pytest.mark.parametrize("given", ["", "x", "linear:1", "step:1:2", "linear:a:2", "nan", "inf"])
def test_schedules_that_are_none(given: str) -> None:
    with pytest.raises(ValueError, match=f"^w: '{given}' is not a number, linear:START:END"):
        schedules.parse("w", given)


def test_schedules_are_used_and_logged(tmp_path: Path) -> None:
    trained = trainer(
        tmp_path,
        max_steps=3,
        terms={"hidden": "linear:0:2", "response": 0.5},
        alpha_schedule="linear:1:0",
        temperature_schedule="cosine:4:1",
    )
    trained.train()
    entries = logs(trained)
    assert [entry["alpha"] for entry in entries] == [1, 0.5, 0]
    assert [entry["temperature"] for entry in entries] == [4, 2.5, 1]
    assert [entry["hidden_weight"] for entry in entries] == [0, 1, 2]
    for entry in entries:
        alpha = entry["alpha"]
        response = alpha * entry["kd_loss"] + (1 - alpha) * entry["ce_loss"]
        want = 0.5 * response + entry["hidden_weight"] * entry["hidden_loss"]
        assert entry["loss"] == pytest.approx(want, rel=1e-5)
    assert (trained.args.alpha, trained.args.temperature) == (0, 1)  # for evaluations


def test_the_response_alone_can_have_a_weight(tmp_path: Path) -> None:
    for weight in (1.0, 0.25):
        trained = trainer(tmp_path, max_steps=1, terms={"response": weight})
        trained.train()
        entry = logs(trained)[0]
        response = 0.7 * entry["kd_loss"] + 0.3 * entry["ce_loss"]
        assert entry["loss"] == pytest.approx(weight * response)
        assert trained.terms is None


def test_token_terms_do_not_depend_on_how_a_batch_is_cut(tmp_path: Path) -> None:
    whole = trainer(tmp_path, terms=TOKEN_TERMS)
    cut = trainer(
        tmp_path,
        terms=TOKEN_TERMS,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=4,
    )
    torch.manual_seed(0)
    for ours, theirs in zip(whole.terms.parameters(), cut.terms.parameters(), strict=True):
        theirs.data.copy_(ours)
    whole.train()
    cut.train()
    assert_close(weights(whole.model), weights(cut.model))
    assert_close(weights(whole.terms), weights(cut.terms))
    for a, b in zip(logs(whole), logs(cut), strict=True):
        names = [name for name in a if name.endswith("loss")]
        assert len(names) == 8
        for name in names:
            assert a[name] == pytest.approx(b[name], rel=1e-4), name


def test_relations_are_means_over_micro_batches(tmp_path: Path) -> None:
    options: dict[str, Any] = {"terms": dict.fromkeys(RELATIONS, 0.5), "max_steps": 1}
    parts = trainer(
        tmp_path, per_device_train_batch_size=4, gradient_accumulation_steps=3, **options
    )
    with torch.no_grad():  # as the trainer draws its batches: all 12 examples, in its own order
        batches = list(parts.get_train_dataloader())
        hidden = [
            [
                m(input_ids=b["input_ids"], output_hidden_states=True).hidden_states[-1]
                for b in batches
            ]
            for m in (parts.model.eval(), parts.teacher)
        ]
    losses = (relations.rkd_distance_loss, relations.rkd_angle_loss, relations.gram_loss)
    want = [
        sum(loss(s.mean(1), t.mean(1)) for s, t in zip(*hidden, strict=True)) / 3 for loss in losses
    ]
    fresh = trainer(
        tmp_path, per_device_train_batch_size=4, gradient_accumulation_steps=3, **options
    )
    fresh.train()
    entry = logs(fresh)[0]
    for name, value in zip(RELATIONS, want, strict=True):
        assert entry[f"{name}_loss"] == pytest.approx(float(value), rel=1e-4), name


def test_padding_is_seen_by_no_term(tmp_path: Path) -> None:
    """Another padding token, another loss? No."""
    names = [name for name in TERMS if name != "response"]
    trained = trainer(tmp_path, terms=dict.fromkeys(names, 1.0))
    ids = torch.randint(2, 17, (3, 8))
    mask = torch.ones_like(ids)
    mask[1, 5:], mask[2, 3:] = 0, 0
    labels = ids.masked_fill(mask == 0, -100)
    values = []
    for padding in (2, 3):
        batch = {"input_ids": ids.masked_fill(mask == 0, padding), "attention_mask": mask}
        values.append(trained.compute_loss(trained.model, batch | {"labels": labels}).item())
    assert values[0] == pytest.approx(values[1], rel=1e-6)


def test_evaluation_is_the_formula(tmp_path: Path) -> None:
    trained = trainer(
        tmp_path, student=tiny_models.llama(1, seed=1), terms="hidden=0.5,gram=2", layer_map="1:2"
    )
    data = trained.eval_dataset
    ids = torch.stack([data[i]["input_ids"] for i in range(len(data))])
    with torch.no_grad():
        ours, theirs = (
            m.eval()(input_ids=ids, output_hidden_states=True).hidden_states[-1]
            for m in (trained.model, trained.teacher)
        )
    hidden = features.hidden_state_loss(ours, theirs)
    sizes = [2, 2, 2, 1]  # batches of 2 from 7 examples: the gram term sees these
    grams = [
        relations.gram_loss(a.mean(1), b.mean(1)) * len(a) / 7
        for a, b in zip(ours.split(sizes), theirs.split(sizes), strict=True)
    ]
    metrics = trained.evaluate()
    assert metrics["eval_hidden_loss"] == pytest.approx(float(hidden), rel=1e-5)
    assert metrics["eval_gram_loss"] == pytest.approx(float(sum(grams)), rel=1e-4)
    response = 0.7 * metrics["eval_kd_loss"] + 0.3 * metrics["eval_ce_loss"]
    want = response + 0.5 * metrics["eval_hidden_loss"] + 2 * metrics["eval_gram_loss"]
    assert metrics["eval_loss"] == pytest.approx(want, rel=1e-5)


def test_two_processes_give_the_update_of_one(tmp_path: Path) -> None:
    terms = "hidden=0.5,sentence=0.5,attention=0.5"
    script = Path(__file__).with_name("train_two_processes.py")
    tiny_models.two_processes(str(script), str(tmp_path), terms)
    two = torch.load(tmp_path / "result.pt", weights_only=True)
    one = trainer(tmp_path, terms=terms, max_steps=3)
    one.train()
    assert_close(dict(one.model.state_dict()), two["model"])
    for a, b in zip(logs(one), two["logs"], strict=True):
        for name in ("loss", "hidden_loss", "sentence_loss", "attention_loss"):
            assert a[name] == pytest.approx(b[name], rel=1e-4), name
    metrics = one.evaluate()
    for name in ("eval_loss", "eval_hidden_loss", "eval_sentence_loss"):
        assert metrics[name] == pytest.approx(two["metrics"][name], rel=1e-4), name


@pytest.mark.parametrize("name", ["alpha", "temperature"])
def test_a_number_that_a_schedule_stands_for_is_named(
    name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for given, told in ((0.25, 1), (0.5, 0)):
        caplog.clear()
        options: dict[str, Any] = {name: given, f"{name}_schedule": "linear:1:0.5"}
        arguments = DistillationArguments(output_dir=str(tmp_path), use_cpu=True, **options)
        assert getattr(arguments, name) == 0.5
        found = [r.getMessage() for r in caplog.records if r.name.startswith("kdkernels")]
        assert found == [f"{name}: 0.25 is not used; {name}_schedule stands for it"] * told


@pytest.mark.parametrize("balance", ["fixed", "uncertainty", "gradient_norm"])
def test_a_resumed_run_is_bitwise_the_uninterrupted_one(balance: str, tmp_path: Path) -> None:
    options: dict[str, Any] = {"optim": "adamw_torch", "learning_rate": 1e-2, "max_steps": 4}
    options |= {"save_strategy": "steps", "save_steps": 2, "balance": balance, "balance_steps": 2}
    options |= {"terms": "hidden=1,gram=linear:0:1"}
    through = trainer(tmp_path / "through", **options)
    before = weights(through.terms)
    through.train()
    assert any(not torch.equal(before[name], p) for name, p in weights(through.terms).items())
    checkpoint = tmp_path / "through" / "checkpoint-2"
    resumed = trainer(tmp_path / "resumed", **options)
    resumed.train(resume_from_checkpoint=str(checkpoint))
    for part in ("model", "terms"):
        ours, theirs = (getattr(t, part).state_dict() for t in (through, resumed))
        assert all(torch.equal(ours[name], theirs[name]) for name in ours), part
    with safe_open(checkpoint / "model.safetensors", "pt") as saved:
        assert not [name for name in saved.keys() if "terms" in name]  # noqa: SIM118
    assert "projections.maps.1-2.weight" in load_file(checkpoint / TERMS_FILE)
    assert not [name for name in through.model.state_dict() if "terms" in name]
    through.save_model(str(tmp_path / "saved"))
    LlamaForCausalLM.from_pretrained(tmp_path / "saved")


def test_what_the_terms_learn_is_in_the_optimizer(tmp_path: Path) -> None:
    trained = trainer(tmp_path, terms="hidden=1", balance="uncertainty")
    trained.train()
    optimised = {id(p) for group in trained.optimizer.param_groups for p in group["params"]}
    learnt = {id(p) for p in trained.terms.parameters()}
    assert optimised == learnt | {id(p) for p in trained.model.parameters()}
    assert len(learnt) == 3  # one projection, two log variances
    assert "hidden_log_variance" in logs(trained)[-1]


def test_uncertainty_is_the_formula(tmp_path: Path) -> None:
    trained = trainer(tmp_path, terms="hidden=3", balance="uncertainty")
    trained.terms.log_variances["hidden"].data.fill_(0.5)
    values = {"response": torch.tensor(2.0), "hidden": torch.tensor(4.0)}
    want = 2 / 2 + 3 * (math.exp(-0.5) * 4 + 0.5 / 4) / 2
    assert trained.terms.total(values, 0.0, 0.25).item() == pytest.approx(want)


def test_gradient_norms_are_made_equal(tmp_path: Path) -> None:
    trained = trainer(tmp_path, terms="hidden=1,gram=1", balance="gradient_norm", max_steps=1)
    trained.train()
    entry = logs(trained)[0]
    assert entry["response_factor"] == 1
    batch = next(iter(trained.get_train_dataloader()))
    trained.train()  # a second first update: what was measured is kept with weight 0.9
    terms, model = trained.terms, trained.model
    terms.factors.zero_()
    labels = batch.pop("labels")
    student, teacher = terms.student.run(model, batch), trained.teacher_features(batch)
    mask = torch.ones_like(labels, dtype=torch.bool)
    from kdkernels.training.terms import Counts

    values = terms(student, teacher, mask, Counts.of(mask))
    values["response"] = trained.distillation_loss(student.logits, teacher.logits, labels).loss
    terms.rebalance(terms.gradient_norms(values, list(model.parameters())))
    norms = []
    for at, name in enumerate(terms.weights):
        gradients = torch.autograd.grad(
            values[name] * terms.factors[at],
            list(model.parameters()),
            retain_graph=True,
            allow_unused=True,
        )
        norms.append(math.sqrt(sum(float(g.square().sum()) for g in gradients if g is not None)))
    assert norms == [pytest.approx(norms[0], rel=1e-4)] * 3


def test_terms_need_a_teacher_and_no_labels_term(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="teacher: None, but terms: hidden, gram need one"):
        trainer(tmp_path, teacher=None, alpha=0.0, terms="hidden=1,gram=1")
    trained = trainer(tmp_path, alpha=0.0, terms="hidden=1,response=0")
    trained.train()
    entry = logs(trained)[-1]
    assert entry["loss"] == pytest.approx(entry["hidden_loss"]) and "kd_loss" not in entry


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"terms": "hiden=1"}, "terms: 'hiden' is not one of response, hidden"),
        ({"terms": "hidden"}, "terms: 'hidden' is not a list such as"),
        ({"terms": "hidden=-1"}, "terms: hidden: '-1' is negative"),
        ({"terms": "hidden=linear:1"}, "terms: hidden: 'linear:1' is not a number"),
        ({"terms": '{"hidden": 1,}'}, "terms: "),
        ({"hidden_distance": "l1"}, "hidden_distance: 'l1' is not one of mse, cosine"),
        ({"pooling": "median"}, "pooling: 'median' is not one of"),
        ({"balance": "auto"}, "balance: 'auto' is not one of fixed, gradient_norm"),
        ({"balance_steps": 0}, "balance_steps: 0"),
        ({"relation_heads": 0}, "relation_heads: 0"),
        ({"alpha_schedule": "linear:0:2"}, r"alpha_schedule: 2\.0 is not allowed"),
        ({"temperature_schedule": "linear:0:2"}, r"temperature_schedule: 0\.0 is not allowed"),
        ({"terms": "hidden=warmup:1:0"}, r"the share 0\.0 of 'warmup:1:0' is not in \(0, 1\]"),
    ],
)
def test_bad_arguments_are_named(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        DistillationArguments(output_dir=str(tmp_path), **options)


def test_terms_are_read_in_three_ways(tmp_path: Path) -> None:
    ways: list[Any] = [{"hidden": 1, "gram": "linear:0:2"}, "hidden=1, gram=linear:0:2"]
    ways.append(json.dumps(ways[0]))
    read = [DistillationArguments(str(tmp_path), terms=way).resolved_terms() for way in ways]
    assert read[0] == read[1] == read[2] and list(read[0]) == ["response", "hidden", "gram"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layer_map": "1:3"}, r"teacher layer 3 of pair 1:3.*'llama' \(LlamaForCausalLM\) has.*2"),
        ({"layer_map": "2:2"}, "student layer 2 of pair 2:2 does not exist"),
        ({"layer_map": "0:0", "terms": "attention=1"}, "'0:0' has only embeddings"),
        ({"relation_heads": 3, "terms": "minilm=1"}, "relation_heads: 3 does not divide the width"),
    ],
)
def test_maps_that_the_models_do_not_have(
    options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        trainer(tmp_path, **{"terms": "hidden=1"} | options)


def test_a_teacher_smaller_than_its_map(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"has 2, the student .* has 3"):
        trainer(tmp_path, terms="hidden=1", student=tiny_models.llama(3, seed=1))


def test_a_model_without_attentions(tmp_path: Path) -> None:
    config = MambaConfig(
        vocab_size=17, hidden_size=8, state_size=4, num_hidden_layers=1, time_step_rank=2
    )
    config.num_attention_heads = 1
    mamba = MambaForCausalLM(config)
    with pytest.raises(ValueError, match=r"terms: the student 'mamba' .* gives no attentions"):
        trainer(tmp_path, terms="attention=1", student=mamba)
    with pytest.raises(ValueError, match=r"terms: minilm: layer 1 of the student 'mamba'"):
        trainer(tmp_path, terms="minilm=1", student=mamba)


def test_attention_dropout_is_refused(tmp_path: Path) -> None:
    student = narrow()
    student.config.attention_dropout = 0.1
    with pytest.raises(ValueError, match=r"attention_dropout is 0\.1"):
        trainer(tmp_path, terms="attention=1", student=student)
