"""Models, tokenizers and batches that are small enough to train in a test."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from kdkernels.commands.data import TokenBlocks
from kdkernels.training.trainer import DistillationArguments, DistillationTrainer

VOCAB = 17
WORDS = [f"w{i}" for i in range(VOCAB - 2)]
#: Of a configuration of Llama's kind; weights large enough for distributions that differ visibly.
SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
    "bos_token_id": None,
    "eos_token_id": 1,
    "pad_token_id": 1,
}


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Operations this small only lose by threads, most of all on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def llama(layers: int, seed: int, vocab: int = VOCAB, hidden: int = 16) -> LlamaForCausalLM:
    """A random Llama."""
    torch.manual_seed(seed)
    sizes = {"vocab_size": vocab, "hidden_size": hidden, "intermediate_size": 2 * hidden}
    return LlamaForCausalLM(LlamaConfig(**SIZES | sizes | {"num_hidden_layers": layers}))


def tokenizer(words: list[str] = WORDS) -> PreTrainedTokenizerFast:
    """One id a word."""
    vocabulary = {token: i for i, token in enumerate(["<unk>", "<eos>", *words])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", eos_token="<eos>")


def save_model(folder: Path, layers: int, seed: int, **options: Any) -> Path:
    """A model folder with its tokenizer."""
    llama(layers, seed, **options).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


class MaskedBlocks(TokenBlocks):
    """Blocks whose labels are ignored at places that differ from example to example."""

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        item = super().__getitem__(index)
        labels = item["labels"].clone()
        labels[: 1 + 3 * (index % 4)] = -100
        return {"input_ids": item["input_ids"], "labels": labels}


def dataset(examples: int, length: int = 12, seed: int = 5) -> MaskedBlocks:
    generator = torch.Generator().manual_seed(seed)
    return MaskedBlocks(torch.randint(2, VOCAB, (examples, length), generator=generator))


def two_processes(*command: str) -> None:
    """Run a script or ``-m module`` under `accelerate launch` with two CPU processes over gloo.

    Without MPI, `accelerate launch --cpu` starts one process; with --multi_gpu it starts as many as
    it is told to, and ``use_cpu`` makes them talk over gloo.
    """
    tests = Path(__file__).parent
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu"]
    launcher += ["--num_processes=2", "--num_machines=1", "--main_process_port=0"]
    launcher += ["--mixed_precision=no", "--dynamo_backend=no"]
    done = subprocess.run(
        [*launcher, *command],
        env=os.environ | {"PYTHONPATH": f"{tests}:{tests.parent}", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]


def trainer(
    output: Path,
    teacher: Any = "default",
    student: Any = None,
    teacher_cache: Any = None,
    **arguments: Any,
) -> DistillationTrainer:
    """A trainer of a 1-layer student of a 2-layer teacher; SGD, so that updates are gradients."""
    defaults: dict[str, Any] = {
        "max_steps": 3,
        "per_device_train_batch_size": 4,
        "per_device_eval_batch_size": 2,
        "learning_rate": 0.5,
        "lr_scheduler_type": "constant",
        "optim": "sgd",
        "max_grad_norm": 0.0,
        "logging_steps": 1,
        "save_strategy": "no",
        "use_cpu": True,
        "disable_tqdm": True,
        "temperature": 2.0,
        "alpha": 0.7,
    }
    return DistillationTrainer(
        student or llama(1, seed=1),
        DistillationArguments(output_dir=str(output), **defaults | arguments),
        teacher=llama(2, seed=2) if teacher == "default" else teacher,
        teacher_cache=teacher_cache,
        train_dataset=dataset(12),
        eval_dataset=dataset(7, seed=6),
    )
