"""BERT-like models of every kind that are small enough to train in a test, and their data."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from torch import Tensor
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    BertForTokenClassification,
    BertModel,
    PreTrainedModel,
)

from kdkernels.training import DistillationArguments, DistillationTrainer

LABELS = 3


CLASSES: dict[str, Any] = {
    "masked-lm": BertForMaskedLM,
    "sequence-classification": BertForSequenceClassification,
    "token-classification": BertForTokenClassification,
    "encoder": BertModel,
}


def bert(kind: str, layers: int, seed: int, **options: Any) -> PreTrainedModel:
    torch.manual_seed(seed)
    settings: dict[str, Any] = {"hidden_size": 16, "num_attention_heads": 2, "num_labels": LABELS}
    settings |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    settings |= {"vocab_size": tiny_models.VOCAB, "intermediate_size": 32, "initializer_range": 0.3}
    settings |= {"max_position_embeddings": 64, "pad_token_id": 1}
    return CLASSES[kind](BertConfig(num_hidden_layers=layers, **settings | options))


class Batches(torch.utils.data.Dataset):
    """Padded examples of 8 tokens with labels of the kind that the task has."""

    def __init__(self, kind: str, examples: int) -> None:
        generator = torch.Generator().manual_seed(3)
        self.ids = torch.randint(2, tiny_models.VOCAB, (examples, 8), generator=generator)
        lengths = torch.arange(examples) % 5 + 3
        self.mask = (torch.arange(8) < lengths[:, None]).long()
        classes = tiny_models.VOCAB if kind == "masked-lm" else LABELS
        self.labels = torch.randint(classes, self.ids.shape, generator=generator)
        self.labels = self.labels.masked_fill(self.mask == 0, -100)
        self.labels[:, 1] = -100
        if kind == "sequence-classification":
            self.labels = self.labels[:, 0]
        self.kind = kind

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        item = {"input_ids": self.ids[index], "attention_mask": self.mask[index]}
        return item if self.kind == "encoder" else item | {"labels": self.labels[index]}


def trainer(kind: str, output: Path, **options: Any) -> DistillationTrainer:
    settings: dict[str, Any] = {"max_steps": 2, "per_device_train_batch_size": 4, "optim": "sgd"}
    settings |= {"learning_rate": 0.1, "logging_steps": 1, "save_strategy": "no", "use_cpu": True}
    settings |= {"disable_tqdm": True, "temperature": 2.0, "alpha": 0.7, "max_grad_norm": 0.0}
    settings |= {"per_device_eval_batch_size": 2, "lr_scheduler_type": "constant"}
    if kind == "encoder":
        settings["terms"] = "hidden=1,embedding=1,attention=1,minilm=1,sentence=1"
    # Asked for by name: the truth of a compiled model is an error.
    student = options.pop("student") if "student" in options else bert(kind, 1, 1, hidden_size=8)
    teacher = options.pop("teacher") if "teacher" in options else bert(kind, 2, seed=2)
    return DistillationTrainer(
        student,
        DistillationArguments(output_dir=str(output), **settings | options),
        teacher=teacher,
        train_dataset=Batches(kind, 8),
        eval_dataset=Batches(kind, 7),
    )


def masking_tokenizer() -> Any:
    tokenizer = tiny_models.tokenizer(tiny_models.WORDS[:-1])
    tokenizer.add_special_tokens({"mask_token": "<mask>", "pad_token": "<eos>"})
    return tokenizer


@pytest.fixture(scope="module")
def assets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A teacher of each kind and data for it."""
    folder = tmp_path_factory.mktemp("assets")
    for kind in ("masked-lm", "sequence-classification", "encoder"):
        bert(kind, 4, seed=2).save_pretrained(folder / kind)
        masking_tokenizer().save_pretrained(folder / kind)
    for name, labels in (("one-label", 1), ("more-labels", LABELS + 1)):
        bert("sequence-classification", 2, seed=2, num_labels=labels).save_pretrained(folder / name)
        masking_tokenizer().save_pretrained(folder / name)
    generator = torch.Generator().manual_seed(0)
    words = torch.randint(len(tiny_models.WORDS) - 1, (60, 9), generator=generator)
    lines = [" ".join(tiny_models.WORDS[i] for i in row[: 3 + row[0] % 6]) for row in words]
    (folder / "lines.txt").write_text("\n".join(lines))
    rows = [{"text": line, "label": i % LABELS} for i, line in enumerate(lines)]
    (folder / "labelled.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (folder / "bad.jsonl").write_text(json.dumps({"text": "w1", "label": 7}))
    tiny_models.tokenizer().save_pretrained(folder / "no-mask")
    bert("masked-lm", 2, seed=2).save_pretrained(folder / "no-mask")
    return folder
