"""The teacher's cache: the same loss, the stated bound, fingerprints; and ``init-student``."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import command_line
import pytest
import tiny_berts
import tiny_models
import torch
from command_line import options, refused
from safetensors import safe_open
from safetensors.torch import save
from tiny_berts import bert, masking_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer, default_data_collator

from kdkernels import fused_kd_loss, fused_topk_kd_loss
from kdkernels.commands import init_student as student
from kdkernels.commands import main as cli
from kdkernels.training import DistillationArguments, DistillationTrainer
from kdkernels.training import teacher_cache as caching
from kdkernels.training.teacher_cache import TeacherCache, cache_teacher

pytestmark = pytest.mark.usefixtures("one_thread")
one_thread = tiny_models.one_thread
llama_assets = command_line.llama_assets
assets = tiny_berts.assets  # BERT-like teachers and their texts


def write(folder: Path, teacher: Any, datasets: list[Any], **options: Any) -> TeacherCache:
    items = [data[i] for data in datasets for i in range(len(data))]
    info = cache_teacher(
        teacher, tiny_models.tokenizer(), items, default_data_collator, folder, **options
    )
    assert info == TeacherCache(folder).info
    return TeacherCache(folder, tiny_models.tokenizer())


def cached_trainer(cache: TeacherCache, output: Path, vocab: int, **options: Any) -> Any:
    """Of a student of this vocabulary, which need not be the teacher's."""
    student = tiny_models.llama(1, seed=1, vocab=vocab)
    options |= {"teacher": None, "teacher_cache": cache, "vocab_policy": "truncate"}
    return tiny_models.trainer(output, student=student, **options)


def loss_by_hand(
    logits: torch.Tensor,
    ids: torch.Tensor,
    log_probs: torch.Tensor,
    labels: torch.Tensor,
    tail: str,
) -> Any:
    """What tiny_models' trainer computes at T = 2 of these entries, log-probabilities at that T."""
    options: dict[str, Any] = {"temperature": 2.0, "alpha": 0.7, "shift": True}
    return fused_topk_kd_loss(
        logits, ids, log_probs, labels, tail=tail, backend="reference", **options
    )


def logs(trained: Any) -> list[dict[str, float]]:
    names = ("loss", "kd_loss", "ce_loss", "agreement")
    return [{n: e[n] for n in names} for e in trained.state.log_history if "loss" in e]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_full_cache_gives_the_loss_of_the_teacher_exactly(
    dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(caching, "_SHARD_BYTES", 4000)  # several shards
    # A cache holds the logits that the model gives; without them a bfloat16 teacher rounds less.
    online = tiny_models.trainer(
        tmp_path, teacher=tiny_models.llama(2, seed=2).to(dtype), fused_linear="false"
    )
    datasets = [online.train_dataset, online.eval_dataset]
    cache = write(tmp_path / "cache", online.teacher, datasets, batch_size=4)
    assert len(list((tmp_path / "cache").iterdir())) >= 3
    cached = tiny_models.trainer(tmp_path, teacher=None, teacher_cache=cache)
    # Batches of the same size, since a matrix product's rounding may depend on it.
    online.train()
    cached.train()
    assert logs(online) == logs(cached)
    for a, b in zip(online.model.parameters(), cached.model.parameters(), strict=True):
        assert torch.equal(a, b)
    metrics = [t.evaluate() for t in (online, cached)]
    for name in ("eval_loss", "eval_kd_loss", "eval_agreement"):
        assert metrics[0][name] == pytest.approx(metrics[1][name], rel=1e-6)


@pytest.mark.parametrize("tail", [None, "uniform", "bucket"])
@pytest.mark.parametrize(("top_k", "temperature"), [(1, 1.0), (4, 2.0), (12, 1.0), (16, 3.0)])
def test_a_top_k_cache_is_within_its_bound(
    top_k: int, temperature: float, tail: str | None, tmp_path: Path
) -> None:
    options: dict[str, Any] = {"temperature": temperature, "alpha": 1.0, "max_steps": 1}
    online = tiny_models.trainer(tmp_path, **options)
    datasets = [online.train_dataset, online.eval_dataset]
    cache = write(
        tmp_path / "cache", online.teacher, datasets, top_k=top_k, temperature=temperature
    )
    cached = tiny_models.trainer(
        tmp_path, teacher=None, teacher_cache=cache, cache_tail=tail, **options
    )
    losses = [t.evaluate()["eval_kd_loss"] for t in (online, cached)]
    data = online.eval_dataset
    ids, labels = (
        torch.stack([data[i][key] for i in range(len(data))]) for key in ("input_ids", "labels")
    )
    with torch.no_grad():
        log_p, log_q = (
            (m.eval()(input_ids=ids).logits.double() / temperature).log_softmax(-1)
            for m in (online.teacher, online.model)
        )
    counted = torch.zeros_like(labels, dtype=torch.bool)
    counted[:, :-1] = labels[:, 1:] != -100
    top = log_p.topk(top_k)
    others = log_p.scatter(-1, top.indices, -math.inf).exp().sum(-1)
    parts = [part[counted] for part in (top.values, top.indices, others)]
    bound = caching.forward_kl_bound(*parts, log_q[counted])
    true = (log_p.exp() * (log_p - log_q)).sum(-1)[counted]
    seen = fused_topk_kd_loss(
        log_q[counted],
        parts[1],
        parts[0],
        tail=tail or "uniform",
        reduction="none",
        backend="reference",
    )
    assert ((true - seen).abs() <= bound + 1e-9).all()  # in every row
    assert tail != "bucket" or (seen <= true + 1e-12).all()
    gap = abs(losses[0] - losses[1])
    assert gap <= temperature**2 * bound.mean().item() + 1e-5
    assert losses[1] == pytest.approx(temperature**2 * seen.mean().item(), rel=1e-4, abs=1e-5)


def test_a_top_k_cache_hands_out_the_mass_of_the_others(tmp_path: Path) -> None:
    teacher, data = tiny_models.llama(2, seed=2), tiny_models.dataset(6)
    with torch.no_grad():
        teacher.lm_head.weight.mul_(12)  # some rows are sure of a token
    cache = write(tmp_path / "cache", teacher, [data], top_k=5)
    batch = default_data_collator([data[i] for i in range(6)])
    entries = cache.entries(batch, torch.device("cpu"))
    assert entries.log_probs.dtype == torch.float64 and entries.ids.shape == (6, 12, 5)
    with torch.no_grad():
        log_p = teacher(input_ids=batch["input_ids"]).logits.double().log_softmax(-1)
    want = log_p.scatter(-1, entries.ids, -math.inf).exp().sum(-1)
    got = 1 - entries.log_probs.exp().sum(-1)
    assert want.min() < 2**-44 and want.max() > 1e-3
    torch.testing.assert_close(got, want.clamp(min=2**-44), rtol=1e-4, atol=1e-14)
    top = log_p.gather(-1, entries.ids)
    torch.testing.assert_close(entries.log_probs, top, rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="holds entries, no logits"):
        cache.logits(batch)
    full = write(tmp_path / "full", teacher, [data])
    with pytest.raises(ValueError, match="holds logits, no entries"):
        full.entries(batch, torch.device("cpu"))


@pytest.mark.parametrize("tail", ["bucket", "uniform", "renormalize", "subset"])
@pytest.mark.parametrize("fused_linear", ["true", "false"])
@pytest.mark.parametrize(("ours", "theirs"), [(17, 17), (14, 17), (17, 14)])
def test_every_tail_trains_as_the_oracle(
    ours: int, theirs: int, fused_linear: str, tail: str, tmp_path: Path
) -> None:
    """Also where one model has more entries: of the teacher's then, the student's are left."""
    teacher, data = tiny_models.llama(2, seed=2, vocab=theirs), tiny_models.dataset(8)
    data.blocks.clamp_(max=min(ours, theirs) - 1)
    cache = write(tmp_path / "cache", teacher, [data], top_k=5, temperature=2.0)
    trained = cached_trainer(cache, tmp_path, ours, fused_linear=fused_linear, cache_tail=tail)
    batch = default_data_collator([data[i] for i in range(4)])
    loss = trained.compute_loss(trained.model, batch)
    loss.backward()
    weight = trained.model.lm_head.weight
    got, weight.grad = weight.grad.clone(), None
    common = min(ours, theirs)
    with torch.no_grad():
        z = teacher(input_ids=batch["input_ids"]).logits.double() / 2
        top = z.log_softmax(-1).topk(5)
    log_p = z.log_softmax(-1)
    share = log_p.scatter(-1, top.indices, -math.inf).exp().sum(-1, keepdim=True) / (theirs - 5)
    spread = share.expand_as(z).scatter(-1, top.indices, top.values.exp())[..., :common]
    log_probs = (spread / spread.sum(-1, keepdim=True)).log()
    inside = top.indices < common
    ids = top.indices.masked_fill(~inside, -1)
    logits = trained.model(input_ids=batch["input_ids"]).logits.double()[..., :common]
    of_entries = log_probs.gather(-1, ids.clamp(min=0))
    want = loss_by_hand(logits, ids, of_entries, batch["labels"], tail)
    want.backward()
    assert loss.item() == pytest.approx(want.item(), rel=1e-5)
    torch.testing.assert_close(got, weight.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("tail", ["renormalize", "subset"])
@pytest.mark.parametrize("fused_linear", ["true", "false"])
def test_a_top_k_cache_of_another_temperature(fused_linear: str, tail: str, tmp_path: Path) -> None:
    teacher, data = tiny_models.llama(2, seed=2), tiny_models.dataset(8)
    cache = write(tmp_path / "cache", teacher, [data], top_k=5)
    trained = cached_trainer(cache, tmp_path, 17, fused_linear=fused_linear, cache_tail=tail)
    batch = default_data_collator([data[i] for i in range(4)])
    with torch.no_grad():
        top = teacher(input_ids=batch["input_ids"]).logits.log_softmax(-1).topk(5)
    logits = trained.model(input_ids=batch["input_ids"]).logits
    log_probs = (top.values / 2).log_softmax(-1)
    want = loss_by_hand(logits, top.indices, log_probs, batch["labels"], tail)
    got = trained.compute_loss(trained.model, batch)
    assert got.item() == pytest.approx(want.item(), rel=1e-5)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_the_mean_gradient_of_samples_is_the_teachers(temperature: float) -> None:
    """To 5 of its standard errors, in each of 40 entries; that of the top 6 is far off."""
    draws, samples = 4000, 6
    student, teacher = (torch.randn(1, 40, dtype=torch.float64) * 2 for _ in range(2))
    teacher[0, 7] = -math.inf

    def gradient(loss: Any) -> Any:
        leaf = student.clone().requires_grad_()
        return torch.autograd.grad(loss(leaf), leaf)[0]

    generator = torch.Generator().manual_seed(3)
    kept = caching.drawn(teacher.expand(draws, -1), samples, temperature, generator)
    ids, log_probs = kept["ids"], (kept["counts"].double() / samples).log()
    assert (kept["counts"].sum(-1) == samples).all() and not (ids == 7).any()
    options: dict[str, Any] = {"temperature": temperature, "temperature_squared": False}
    got = gradient(
        lambda z: fused_topk_kd_loss(z.expand(draws, -1), ids, log_probs, tail="none", **options)
    )
    want = gradient(lambda z: fused_kd_loss(z, teacher, **options))
    p = (teacher / temperature).softmax(-1)
    error = (p * (1 - p) / (samples * draws)).sqrt() / temperature
    assert ((got - want).abs() <= 5 * error + 1e-12).all()
    top = (teacher / temperature).log_softmax(-1).topk(samples)
    off = gradient(
        lambda z: fused_topk_kd_loss(z, top.indices, top.values, tail="renormalize", **options)
    )
    assert ((off - want).abs() > 20 * error).any()


def test_samples_are_the_same_whatever_the_batch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And padding, the order of examples, what else is in the cache, and the pieces of a row."""
    teacher, data = tiny_models.llama(2, seed=2), tiny_models.dataset(12)
    options: dict[str, Any] = {"samples": 9, "temperature": 2.0, "seed": 4}
    whole = write(tmp_path / "whole", teacher, [data], batch_size=12, **options)
    monkeypatch.setattr(caching, "_SHARD_BYTES", 500)
    monkeypatch.setattr(caching, "_DRAW_BYTES", 3 * 8 * tiny_models.VOCAB)
    some = [data[i] for i in (8, 2, 5)]
    pieces = write(tmp_path / "pieces", teacher, [some], batch_size=1, **options)
    assert len(list((tmp_path / "pieces").iterdir())) > 2
    batch, here = default_data_collator(some), torch.device("cpu")
    entries = [cache.entries(batch, here) for cache in (whole, pieces)]
    for got, want in zip(entries[0][:2], entries[1][:2], strict=True):
        assert torch.equal(got, want)
    ids, log_probs = entries[0][:2]
    assert ids.shape[-1] == int((ids >= 0).sum(-1).max()) <= 9
    assert (log_probs.exp().sum(-1) - 1).abs().max() < 1e-15
    assert all(len(set(row[row >= 0].tolist())) == int((row >= 0).sum()) for row in ids.view(-1, 9))
    other = write(tmp_path / "other", teacher, [some], **options | {"seed": 5})
    assert not torch.equal(other.entries(batch, here).ids, ids)
    with torch.no_grad():
        teacher.lm_head.weight[3] = math.nan
    with pytest.raises(ValueError, match="cache_samples: the teacher's logits hold NaN"):
        write(tmp_path / "nan", teacher, [some], **options)
    assert not (tmp_path / "nan").exists()


@pytest.mark.parametrize("fused_linear", ["true", "false"])
@pytest.mark.parametrize(("ours", "tail"), [(17, None), (17, "renormalize"), (14, None)])
def test_a_run_from_samples(ours: int, tail: str | None, fused_linear: str, tmp_path: Path) -> None:
    teacher, data = tiny_models.llama(2, seed=2), tiny_models.dataset(8)
    data.blocks.clamp_(max=ours - 1)
    cache = write(tmp_path / "cache", teacher, [data], samples=7, temperature=2.0)
    trained = cached_trainer(cache, tmp_path, ours, fused_linear=fused_linear, cache_tail=tail)
    batch = default_data_collator([data[i] for i in range(4)])
    entries = cache.entries(batch, torch.device("cpu"))
    ids = entries.ids.masked_fill(entries.ids >= ours, -1)
    p = entries.log_probs.exp().masked_fill(ids < 0, 0.0)
    logits = trained.model(input_ids=batch["input_ids"]).logits
    log_probs = (p / p.sum(-1, keepdim=True).clamp(min=1e-9)).log()
    want = loss_by_hand(logits, ids, log_probs, batch["labels"], tail or "none")
    got = trained.compute_loss(trained.model, batch)
    assert got.item() == pytest.approx(want.item(), rel=1e-5)
    trained.train_dataset = data
    trained.train()
    assert math.isfinite(trained.evaluate(data)["eval_kd_loss"])


def test_what_samples_refuse(tmp_path: Path) -> None:
    teacher, data = tiny_models.llama(2, seed=2), tiny_models.dataset(12)
    cache = write(tmp_path / "cache", teacher, [data], samples=5, temperature=2.0)
    make = lambda **o: tiny_models.trainer(  # noqa: E731
        tmp_path, **{"teacher": None, "teacher_cache": cache} | o
    )
    with pytest.raises(ValueError, match=r"5 samples at temperature 2\.0 cannot be used at 1\.0"):
        make(temperature=1.0)
    with pytest.raises(ValueError, match="divergence: 'jsd' compares distributions"):
        make(divergence="jsd")
    make(divergence="jsd", cache_tail="renormalize")
    make(divergence="jsd", beta=0.0)  # the forward KL
    for both, message in [
        ({"samples": 0}, "cache_samples: 0 is not at least 1"),
        ({"samples": 2, "top_k": 3}, "cache_samples: 2 next to cache_top_k: 3"),
    ]:
        with pytest.raises(ValueError, match=message):
            write(tmp_path / "other", teacher, [data], **both)
    shard = tmp_path / "cache" / "rows-00000.safetensors"
    with safe_open(shard, "pt") as opened:
        header, tensors = opened.metadata(), {n: opened.get_tensor(n) for n in ("ids", "counts")}
    damaged = tensors | {"ids": tensors["ids"] - 1}
    shard.write_bytes(save(damaged, header))
    with pytest.raises(ValueError, match=r"is damaged: its ids are not all in -1\.\.16"):
        TeacherCache(tmp_path / "cache").entries(
            default_data_collator([data[0]]), torch.device("cpu")
        )
    shard.write_bytes(save(tensors | {"counts": tensors["counts"][:, :1].clone()}, header))
    with pytest.raises(ValueError, match=r"holds {'counts'"):
        TeacherCache(tmp_path / "cache")


@pytest.mark.parametrize("kind", ["masked-lm", "sequence-classification", "token-classification"])
def test_padded_batches_of_entries(kind: str, tmp_path: Path) -> None:
    """Of all but one entry everything is known, that one's too."""
    online = tiny_berts.trainer(kind, tmp_path)
    items = [online.train_dataset[i] for i in range(8)]
    logits = online.teacher(**default_data_collator(items)).logits
    cache_teacher(
        online.teacher,
        masking_tokenizer(),
        items,
        default_data_collator,
        tmp_path / "cache",
        top_k=logits.shape[-1] - 1,
        temperature=online.args.temperature,
    )
    cached = DistillationTrainer(
        online.model, online.args, teacher_cache=TeacherCache(tmp_path / "cache")
    )
    metrics = [one.evaluate(online.train_dataset) for one in (online, cached)]
    for name in ("eval_loss", "eval_kd_loss", "eval_agreement", "eval_ce_loss", "eval_accuracy"):
        assert metrics[1][name] == pytest.approx(metrics[0][name], rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("kind", ["masked-lm", "sequence-classification", "token-classification"])
def test_padded_batches_of_every_task(kind: str, tmp_path: Path) -> None:
    online = tiny_berts.trainer(kind, tmp_path)
    items = [online.train_dataset[i] for i in range(8)]
    cache_teacher(
        online.teacher, masking_tokenizer(), items, default_data_collator, tmp_path / "cache"
    )
    cache = TeacherCache(tmp_path / "cache")
    batch = default_data_collator([items[i] for i in (5, 2, 7)])
    batch.pop("labels")
    with torch.no_grad():
        want = online.teacher(**batch).logits
    got = cache.logits(batch)
    if kind != "sequence-classification":
        want = want * batch["attention_mask"][..., None]
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


def test_fingerprints(tmp_path: Path) -> None:
    teacher, data = tiny_models.llama(2, seed=2), tiny_models.dataset(3)
    write(tmp_path / "cache", teacher, [data])
    swapped = tiny_models.tokenizer([*tiny_models.WORDS[1:], tiny_models.WORDS[0]])
    with pytest.raises(ValueError, match="was made with another tokenizer"):
        TeacherCache(tmp_path / "cache", swapped)
    other = caching.model_fingerprint(tiny_models.llama(2, seed=3))
    with pytest.raises(ValueError, match=r"was made with another model \(of 'teacher', finger"):
        TeacherCache(tmp_path / "cache", fingerprint=other)
    TeacherCache(tmp_path / "cache", fingerprint=caching.model_fingerprint(teacher))
    used = tiny_models.tokenizer()
    used(["w1 w2"], truncation=True, max_length=1)  # leaves a setting behind
    TeacherCache(tmp_path / "cache", used)


def test_what_a_cache_refuses(tmp_path: Path) -> None:
    teacher, data = tiny_models.llama(2, seed=2), tiny_models.dataset(12)
    cache = write(tmp_path / "cache", teacher, [data], top_k=3, temperature=2.0)
    make = lambda **o: tiny_models.trainer(  # noqa: E731
        tmp_path, **{"teacher": None, "teacher_cache": cache} | o
    )
    with pytest.raises(ValueError, match=r"top 3 at temperature 2\.0 cannot be used at 1\.0"):
        make(temperature=1.0)
    with pytest.raises(ValueError, match=r"cannot be used at 1\.0, 2\.0"):
        make(temperature_schedule="linear:2:1")
    with pytest.raises(ValueError, match="terms: hidden need the teacher itself"):
        make(terms="hidden=1")
    with pytest.raises(ValueError, match="not both"):
        make(teacher=teacher)
    with pytest.raises(ValueError, match=r"cache_tail: 'none' is for samples of a teacher"):
        make(cache_tail="none")
    with pytest.raises(ValueError, match="cache_tail: 'rest' is not one of bucket, uniform"):
        make(cache_tail="rest")
    full = write(tmp_path / "full", teacher, [data])
    with pytest.raises(ValueError, match=r"cache_tail: 'bucket' .* holds all logits"):
        make(cache_tail="bucket", teacher_cache=full)
    for nobody in ({"teacher": teacher}, {"alpha": 0.0}):
        with pytest.raises(
            ValueError, match=r"cache_tail: 'bucket' .* needs a teacher_cache of fe"
        ):
            make(cache_tail="bucket", **{"teacher_cache": None} | nobody)
    with pytest.raises(ValueError, match="vocabulary of 17, the student's has 20"):
        make(student=tiny_models.llama(1, seed=1, vocab=20))
    trained = make()
    with pytest.raises(ValueError, match="does not hold example 0 of this batch"):
        trained.evaluate()
    with pytest.raises(ValueError, match="exists and is not an empty folder"):
        write(tmp_path / "cache", teacher, [data])
    with pytest.raises(ValueError, match=r"cache_top_k: 17 is not in 1\.\.16"):
        write(tmp_path / "other", teacher, [data], top_k=17)
    assert not (tmp_path / "other").exists()
    with pytest.raises(ValueError, match="holds no finished cache"):
        TeacherCache(tmp_path / "other")
    with pytest.raises(ValueError, match="a model without a head"):
        write(tmp_path / "encoder", bert("encoder", 1, seed=1), [data])


def test_a_damaged_cache_is_refused_when_it_is_opened(tmp_path: Path) -> None:
    write(tmp_path / "whole", tiny_models.llama(2, seed=2), [tiny_models.dataset(3)])
    shard, meta = "rows-00000.safetensors", caching.META_FILE
    content = (tmp_path / "whole" / shard).read_bytes()
    info = json.loads((tmp_path / "whole" / meta).read_text())
    with safe_open(tmp_path / "whole" / shard, "pt") as opened:
        header, logits = opened.metadata(), opened.get_tensor("logits")
    damages: list[tuple[str, bytes, str]] = [
        (shard, content[:-1], "is damaged, or no part of a cache"),
        (shard, b"", "is damaged, or no part of a cache"),
        (shard, save({"logits": logits}), "is damaged, or no part of a cache"),  # no header
        (shard, save({"x": logits}, header), "holds {'x': "),
        (
            shard,
            save({"logits": logits[:-1]}, header),
            r"holds {'logits': \[35, 17\]}, .* \[36, 17",
        ),
        (meta, json.dumps(info | {"vocab": 18}).encode(), r"\[36, 17\]}, .* \[36, 18"),
        (meta, json.dumps(info | {"top_k": 3}).encode(), "say {'log_probs'"),
        (meta, json.dumps(info | {"examples": 4}).encode(), "3 examples of 4"),
        (meta, b"[1]", "cache.json cannot be read"),
        (meta, b"\xff", "cache.json cannot be read"),
    ]
    for number, (file, damage, message) in enumerate(damages):
        folder = tmp_path / str(number)
        shutil.copytree(tmp_path / "whole", folder)
        (folder / file).write_bytes(damage)
        with pytest.raises(ValueError, match=message) as refusal:
            TeacherCache(folder)
        assert str(folder) in str(refusal.value)
    with pytest.raises(ValueError, match="holds no finished cache"):
        TeacherCache(tmp_path / "whole" / shard)


def test_a_cache_knows_its_teachers_labels(tmp_path: Path) -> None:
    kind, names = "sequence-classification", {0: "no", 1: "perhaps", 2: "yes"}
    options: dict[str, Any] = {"id2label": names, "label2id": {n: i for i, n in names.items()}}
    teacher = bert(kind, 2, seed=2, **options)
    data = tiny_berts.Batches(kind, 8)
    # A wrapper is the model that it wraps: its fingerprint, its labels, its task.
    cache = write(tmp_path / "cache", torch.compile(teacher, backend="eager"), [data])
    assert cache.info.labels == ["no", "perhaps", "yes"] and cache.info.task == kind
    assert cache.info.model == caching.model_fingerprint(teacher)
    args = DistillationArguments(output_dir=str(tmp_path), use_cpu=True)
    DistillationTrainer(bert(kind, 1, 1, **options), args, teacher_cache=cache)
    other = {0: "yes", 1: "perhaps", 2: "no"}
    student = bert(kind, 1, 1, id2label=other, label2id={n: i for i, n in other.items()})
    with pytest.raises(ValueError, match="teacher: its label 0 is 'no', the student's 'yes'"):
        DistillationTrainer(student, args, teacher_cache=cache)


# ---- the command line ---------------------------------------------------------------------------


def test_a_cache_and_a_sweep_of_text_without_labels(
    assets: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    kind = "sequence-classification"
    changes: dict[str, Any] = {"task": kind, "teacher": assets / kind, "student": assets / kind}
    changes |= {"student_layers": None, "train_text": assets / "lines.txt", "alpha": 0.5}
    command = options(assets, tmp_path / "out", teacher_cache=tmp_path / "cache", **changes)
    assert cli.main(["cache-teacher", *command[1:]]) == 0
    refused(command, "has no column 'label'", capfd)
    changes |= {"alpha": 1, "teacher_cache": tmp_path / "cache"}
    sweep = ["sweep", *options(assets, tmp_path / "sweep", **changes)[1:]]
    refused(sweep, "sweep: without labels there is no alpha to vary", capfd)
    assert cli.main(options(assets, tmp_path / "out", **changes)) == 0


def test_a_run_without_the_teacher(
    llama_assets: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    made = ["init-student", f"--teacher={llama_assets / 'teacher'}", "--layers=0,3"]
    assert cli.main([*made, f"--output_dir={tmp_path / 'student'}"]) == 0
    changes: dict[str, Any] = {"student": tmp_path / "student", "student_layers": None}
    assert cli.main(options(llama_assets, tmp_path / "online", **changes)) == 0
    changes["teacher_cache"] = tmp_path / "cache"
    command = options(llama_assets, tmp_path / "cached", **changes)
    assert cli.main(["cache-teacher", *command[1:]]) == 0
    assert not (tmp_path / "cached").exists() and "all logits of 17" in capfd.readouterr().out
    assert cli.main(command) == 0
    rows = [
        json.loads((tmp_path / run / "results.json").read_text())["rows"]
        for run in ("online", "cached")
    ]
    for ours, theirs in zip(rows[0][1:], rows[1][1:], strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-5)
        assert ours["divergence"] == pytest.approx(theirs["divergence"], rel=1e-4)
    assert rows[1][0] == {"name": "teacher", "parameters": rows[0][0]["parameters"]}
    # Nothing of the teacher is timed or weighed: the report tells the parameters alone.
    report = (tmp_path / "cached" / "report.md").read_text()
    ratio = rows[1][-1]["parameters"] / rows[1][0]["parameters"]
    assert f"against the teacher: {ratio:.2f} times the parameters.\n" in report
    capfd.readouterr()
    for wrong, message in [
        ({"teacher": llama_assets / "other"}, "was made with another model"),
        ({"sequence_length": 8}, "lacks "),
        ({"terms": "hidden=1"}, "terms: hidden need the teacher itself"),
        ({"student": None, "student_layers": "0"}, "student_layers need the teacher itself"),
        ({"teacher_cache": tmp_path / "none"}, "holds no finished cache"),
    ]:
        refused(options(llama_assets, tmp_path / "new", **changes | wrong), message, capfd)


def test_a_run_from_samples_by_the_command_line(
    llama_assets: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    made = ["init-student", f"--teacher={llama_assets / 'teacher'}", "--layers=0,3"]
    assert cli.main([*made, f"--output_dir={tmp_path / 'student'}"]) == 0
    changes: dict[str, Any] = {"student": tmp_path / "student", "student_layers": None}
    changes |= {"teacher_cache": tmp_path / "cache"}
    command = options(llama_assets, tmp_path / "out", **changes)
    both = ["cache-teacher", *command[1:], "--cache_samples=20", "--cache_top_k=3"]
    refused(both, "cache_samples: 20 next to cache_top_k: 3", capfd)
    assert cli.main(["cache-teacher", *command[1:], "--cache_samples=20"]) == 0
    assert "20 samples at T = " in capfd.readouterr().out
    assert cli.main(command) == 0
    rows = json.loads((tmp_path / "out" / "results.json").read_text())["rows"]
    assert all(math.isfinite(row["divergence"]) for row in rows[1:])
    sweep = ["sweep", *options(llama_assets, tmp_path / "sweep", **changes)[1:]]
    sweep += ["--sweep_temperatures=1", "--sweep_divergences", "forward_kl", "jsd"]
    refused(sweep, "divergence: 'jsd' compares distributions", capfd)


def test_students_of_layers(
    llama_assets: Path, assets: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert student.choose("uniform:2", 6) == [2, 5] and student.choose("uniform:4", 4) == [
        0,
        1,
        2,
        3,
    ]
    start = ["init-student", f"--teacher={llama_assets / 'teacher'}"]
    assert cli.main([*start, "--layers=uniform:2", f"--output_dir={tmp_path / 'made'}"]) == 0
    made = AutoModelForCausalLM.from_pretrained(tmp_path / "made")
    whole = AutoModelForCausalLM.from_pretrained(llama_assets / "teacher")
    for ours, theirs in zip(
        made.model.layers, (whole.model.layers[1], whole.model.layers[3]), strict=True
    ):
        assert torch.equal(ours.mlp.up_proj.weight, theirs.mlp.up_proj.weight)
    AutoTokenizer.from_pretrained(tmp_path / "made")
    of_bert = ["init-student", f"--teacher={assets / 'encoder'}", "--task=encoder", "--layers=3"]
    assert cli.main([*of_bert, f"--output_dir={tmp_path / 'bert'}"]) == 0
    for options_, message in [
        (["--layers=0,9"], "student_layers: 9 is outside 0..3"),
        (["--layers=uniform:5"], "layers: 'uniform:5' is not uniform:N with N in 1..4"),
        (["--layers=0", "--task=ner"], "task: 'ner' is not one of"),
        (["--layers=0", "--dtype=int8"], "dtype: 'int8' is not one of"),
        (["--layers=0", f"--output_dir={tmp_path / 'made'}"], "is not an empty folder"),
    ]:
        refused([*start, f"--output_dir={tmp_path / 'x'}", *options_], message, capfd)
