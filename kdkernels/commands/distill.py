"""``kdkernels distill``: one experiment from a configuration to a table, a plot and a checkpoint.

:func:`prepare` checks everything that can be checked, cheapest first, and raises ValueError (one
line) before anything is written or trained. :func:`run` trains and reports.
"""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    DataCollatorWithPadding,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    default_data_collator,
    set_seed,
)
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from ..losses.relations import pooled
from ..training import models
from ..training.arguments import DistillationArguments
from ..training.folders import check_can_be_made
from ..training.models import ModelSource
from ..training.tasks import (
    CAUSAL_LM,
    ENCODER,
    MASKED_LM,
    SEQUENCE,
    TASKS,
    TOKEN,
    Task,
    check_config,
)
from ..training.teacher_cache import (
    CacheInfo,
    TeacherCache,
    cache_teacher,
    check_can_be_written,
    fingerprint_of,
)
from ..training.terms import DistillationTerms, layer_pairs
from ..training.trainer import DistillationTrainer
from . import geometry, report
from .data import (
    Corpus,
    Examples,
    MaskedBlocks,
    TokenBlocks,
    check_source,
    examples,
    read_documents,
    read_rows,
    split_tail,
    token_blocks,
)

#: Changes of the arguments that leave the labels as the only source of learning.
LABELS_ONLY: dict[str, Any] = {
    "alpha": 0.0,
    "alpha_schedule": None,
    "terms": None,
    "balance": "fixed",
}

#: An encoder has no labels: its baseline learns nothing but the teacher's sentence vectors.
OUTPUT_ONLY: dict[str, Any] = {"terms": {"sentence": 1.0}, "balance": "fixed"}

#: Tasks that the command line has data for; token classifiers are trained from Python.
CLI_TASKS = tuple(name for name in TASKS if name != TOKEN.name)

DTYPES = ("auto", "float32", "bfloat16", "float16")


@dataclass
class ModelArguments:
    """Teacher and student."""

    _argument_group_name = "models"

    teacher: str = field(
        metadata={"help": "The model to learn from: a folder, a hub name, or a .gguf file."}
    )
    task: str = field(
        default=CAUSAL_LM.name,
        metadata={"help": "What both models are for: " + ", ".join(CLI_TASKS) + "."},
    )
    student: str | None = field(
        default=None, metadata={"help": "Start from this model: a folder or a hub name."}
    )
    student_config: str | None = field(
        default=None,
        metadata={"help": "Start from random weights: a config.json, a folder or a hub name."},
    )
    student_layers: str | None = field(
        default=None, metadata={"help": "Start from these layers of the teacher, e.g. 0,1,2,8-11."}
    )
    student_dtype: str = field(
        default="float32", metadata={"help": "Student weights: " + ", ".join(DTYPES) + "."}
    )
    student_dropout: float | None = field(
        default=None,
        metadata={"help": "Set every dropout of the student to this; default: as configured."},
    )

    def __post_init__(self) -> None:
        ways = ("student", "student_config", "student_layers")
        given = [name for name in ways if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(
                f"give exactly one of --student, --student_config and --student_layers "
                f"(given: {', '.join(given) or 'none'})"
            )
        if self.task not in CLI_TASKS:
            raise ValueError(f"task: {self.task!r} is not one of {', '.join(CLI_TASKS)}")
        if self.student_dtype not in DTYPES:
            raise ValueError(f"student_dtype: {self.student_dtype!r} is not one of {DTYPES}")
        if self.student_dropout is not None and not 0 <= self.student_dropout < 1:
            raise ValueError(f"student_dropout: {self.student_dropout} is not in [0, 1)")


@dataclass
class DataArguments:
    """The text."""

    _argument_group_name = "data"

    train_text: str = field(
        metadata={
            "help": "Text file (.txt .md), table (.jsonl .json .csv .tsv .parquet), a folder of "
            "them, a folder of datasets.save_to_disk, or the name of a dataset."
        }
    )
    validation_text: str | None = field(
        default=None,
        metadata={"help": "Held-out text, likewise; default: the end of train_text."},
    )
    validation_fraction: float = field(
        default=0.05,
        metadata={
            "help": "Share of train_text held out at its end if validation_text is not given."
        },
    )
    text_column: str = field(default="text", metadata={"help": "Column of tables and datasets."})
    label_column: str = field(
        default="label",
        metadata={"help": "Column of labels (names or ids of the teacher's), for classifiers."},
    )
    train_split: str = field(default="train", metadata={"help": "Split of a dataset to train on."})
    validation_split: str = field(
        default="validation", metadata={"help": "Split of a dataset given as validation_text."}
    )
    sequence_length: int = field(default=256, metadata={"help": "Tokens in one training example."})
    max_train_tokens: int | None = field(
        default=None, metadata={"help": "Read no more of train_text than this many tokens."}
    )
    max_validation_tokens: int | None = field(
        default=None,
        metadata={"help": "Evaluate on this many tokens, spread evenly over the text."},
    )
    data_notice: str | None = field(
        default=None, metadata={"help": "Origin and licence of the text, for the model card."}
    )

    def __post_init__(self) -> None:
        if self.sequence_length < 2:
            raise ValueError(f"sequence_length: {self.sequence_length} is not at least 2")
        if not 0 < self.validation_fraction < 1:
            raise ValueError(f"validation_fraction: {self.validation_fraction} is not in (0, 1)")
        for name in ("max_train_tokens", "max_validation_tokens"):
            value = getattr(self, name)
            if value is not None and value < self.sequence_length:
                raise ValueError(f"{name}: {value} is less than sequence_length")


@dataclass
class RunArguments:
    """The experiment."""

    _argument_group_name = "experiment"

    baseline: bool = field(
        default=True,
        metadata={
            "help": "Also train the same student, seed and budget on the labels only (an encoder: "
            "on the teacher's sentence vectors only)."
        },
    )
    teacher_cache: str | None = field(
        default=None,
        metadata={
            "help": "Folder of the teacher's outputs: `kdkernels cache-teacher` writes it, "
            "`kdkernels distill` then needs no teacher (only its tokenizer and configuration)."
        },
    )
    cache_top_k: int | None = field(
        default=None,
        metadata={
            "help": "What cache-teacher keeps of a prediction: this many log-probabilities at the "
            "run's temperature and the mass of the others; default: all logits."
        },
    )
    overwrite_output_dir: bool = field(
        default=False, metadata={"help": "Replace the results of an earlier run in output_dir."}
    )

    def __post_init__(self) -> None:
        if self.cache_top_k is not None and self.cache_top_k < 1:
            raise ValueError(f"cache_top_k: {self.cache_top_k} is not at least 1")


@dataclass
class Experiment:
    """Everything a run needs, checked."""

    model_args: ModelArguments
    data_args: DataArguments
    run_args: RunArguments
    args: DistillationArguments
    teacher: PreTrainedModel | None  #: None: its cache is used
    cache: TeacherCache | None
    student: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    corpus: Corpus
    configuration: dict[str, Any]  #: the options that were given, for the record
    #: Encoders: title of a row -> sentence vectors [N, D] of the held-out examples.
    vectors: dict[str, Tensor] = field(default_factory=dict)

    @property
    def task(self) -> Task:
        return TASKS[self.model_args.task]

    @property
    def collator(self) -> Any:
        return collator_for(self.corpus, self.tokenizer)

    @property
    def output(self) -> Path:
        return output_folder(self.args)


def output_folder(args: DistillationArguments) -> Path:
    """``output_dir`` as a path."""
    return Path(args.output_dir or "distilled")


# ---- preparation --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Inputs:
    """What is read before any model is loaded."""

    task: Task
    teacher: ModelSource
    student: ModelSource | None  #: None: layers of the teacher
    tokenizer: PreTrainedTokenizerBase
    corpus: Corpus


def prepare_inputs(
    model_args: ModelArguments, data_args: DataArguments, args: DistillationArguments
) -> Inputs:
    """Check and read sources, tokenizers and text; ValueError (one line) on bad input."""
    check_source("train_text", data_args.train_text)
    if data_args.validation_text is not None:
        check_source("validation_text", data_args.validation_text)
    teacher = ModelSource("teacher", model_args.teacher)
    named = model_args.student or model_args.student_config
    option = "student" if model_args.student else "student_config"
    student = ModelSource(option, named) if named else None
    sources = [teacher] if student is None else [teacher, student]
    for source in sources:
        source.check()
    task = TASKS[model_args.task]
    for source in sources:
        check_config(task, source.config(), source.option)
    args.resolved_terms(task is not ENCODER)
    tokenizer = teacher.tokenizer()
    _check_tokens(task, tokenizer)
    if student is not None and model_args.student is not None:
        _check_tokenizer(student, tokenizer)
    names = teacher.config().label2id or {} if task is SEQUENCE else {}
    label_ids = {str(name): int(i) for name, i in names.items()} or None
    corpus = load_corpus(data_args, tokenizer, task, label_ids, args.seed)
    for source in sources:
        _check_length(source, corpus)
    return Inputs(task, teacher, student, tokenizer, corpus)


def prepare(
    model_args: ModelArguments,
    data_args: DataArguments,
    run_args: RunArguments,
    args: DistillationArguments,
    configuration: dict[str, Any],
) -> Experiment:
    """Check and load; ValueError (one line) on bad input. Writes nothing."""
    check_output(output_folder(args), run_args.overwrite_output_dir, args.resume_from_checkpoint)
    if args.max_steps <= 0 and (args.max_steps != -1 or args.num_train_epochs <= 0):
        raise ValueError(
            f"max_steps: {args.max_steps} with num_train_epochs: {args.num_train_epochs} is no "
            "training; give max_steps of at least 1, or -1 and more than 0 epochs"
        )
    if run_args.teacher_cache is not None and model_args.student_layers is not None:
        raise ValueError(
            "teacher_cache: student_layers need the teacher itself; make the student first with "
            "`kdkernels init-student` and name it with --student"
        )
    inputs = prepare_inputs(model_args, data_args, args)
    task, cache, teacher = inputs.task, None, None
    if run_args.teacher_cache is None:
        teacher = inputs.teacher.model(args.teacher_dtype, task)
    else:
        fingerprint = fingerprint_of(model_args.teacher)
        cache = TeacherCache(run_args.teacher_cache, inputs.tokenizer, fingerprint)
    student = build_student(model_args, inputs.student, teacher, args.seed)
    if model_args.student_dropout is not None:
        models.set_dropout(student, model_args.student_dropout)
    if task in (CAUSAL_LM, MASKED_LM):
        vocab = cache.info.vocab if cache else models.vocab_size(teacher or student)
        _check_vocabulary(student, vocab, inputs.tokenizer, args.vocab_policy)
    weights = args.resolved_terms(task is not ENCODER)
    if set(weights) - {"response"} and teacher is not None:
        DistillationTerms(args, student, teacher, weights)  # refuses what they lack
    if teacher is not None and args.layer_map != "uniform":
        layer_pairs(args, student, teacher)  # refused even where no term looks at it
    if cache is not None:
        ends = args.temperature_over_time()
        beside = [name for name in weights if name != "response"]
        cache.check(task, beside, {ends.lowest, ends.highest})
        if task is SEQUENCE and student.config.num_labels != cache.info.vocab:
            raise ValueError(
                f"student: {student.config.num_labels} labels, the cache has {cache.info.vocab}"
            )
        cache.require(items_of(inputs.corpus))
    return Experiment(
        model_args,
        data_args,
        run_args,
        args,
        teacher=teacher,
        cache=cache,
        student=student,
        tokenizer=inputs.tokenizer,
        corpus=inputs.corpus,
        configuration=configuration,
    )


def collator_for(corpus: Corpus, tokenizer: PreTrainedTokenizerBase) -> Any:
    """Blocks need no padding, and not every tokenizer can; examples do."""
    if isinstance(corpus.train, TokenBlocks):
        return default_data_collator
    return DataCollatorWithPadding(tokenizer)


def items_of(corpus: Corpus) -> Iterator[dict[str, Any]]:
    """Every example of both parts."""
    for part in (corpus.train, corpus.validation):
        yield from (part[i] for i in range(len(part)))


def write_cache(
    model_args: ModelArguments,
    data_args: DataArguments,
    run_args: RunArguments,
    args: DistillationArguments,
    configuration: dict[str, Any],
) -> CacheInfo:
    """``kdkernels cache-teacher``: the teacher's outputs for the texts of a run, into a folder."""
    if run_args.teacher_cache is None:
        raise ValueError("teacher_cache: name the folder that is to be written")
    if args.temperature_schedule is not None and run_args.cache_top_k is not None:
        raise ValueError("cache_top_k: a top-k cache has one temperature, not a schedule")
    check_can_be_written(Path(run_args.teacher_cache), TASKS[model_args.task])
    inputs = prepare_inputs(model_args, data_args, args)
    teacher = inputs.teacher.model(args.teacher_dtype, inputs.task)
    module: Any = teacher
    module.to(args.teacher_device or args.device)
    return cache_teacher(
        teacher,
        inputs.tokenizer,
        items_of(inputs.corpus),
        collator_for(inputs.corpus, inputs.tokenizer),
        run_args.teacher_cache,
        top_k=run_args.cache_top_k,
        temperature=args.temperature,
        batch_size=args.per_device_eval_batch_size,
        fingerprint=fingerprint_of(model_args.teacher),
        name=model_args.teacher,
    )


def check_output(output: Path, overwrite: bool, resume: str | None) -> None:
    """Refuse an output folder that holds something, unless the caller wants that."""
    check_can_be_made("output_dir", output)
    if resume is not None:
        if overwrite:
            raise ValueError("overwrite_output_dir: would delete what resume_from_checkpoint needs")
        if resume.lower() not in ("true", "last"):
            raise ValueError(
                f"resume_from_checkpoint: {resume!r} is not `true` (which goes on from the last "
                "checkpoints in output_dir)"
            )
        arms = [output / arm for arm in report.ARM_FOLDERS.values()]
        if not any(map(last_checkpoint, arms)):
            raise ValueError(f"resume_from_checkpoint: no checkpoint in {str(output)!r}")
    elif output.is_dir() and any(output.iterdir()) and not overwrite:
        raise ValueError(
            f"output_dir: {str(output)!r} is not empty; choose another one, --overwrite_output_dir "
            "or --resume_from_checkpoint true"
        )


def last_checkpoint(folder: Path) -> str | None:
    """The newest whole checkpoint in ``folder``: a killed run leaves one without its last file."""
    found = {
        int(state.parent.name.rpartition("-")[2]): str(state.parent)
        for state in folder.glob("checkpoint-*/trainer_state.json")
        if state.parent.name.rpartition("-")[2].isdigit() and state.stat().st_size
    }
    return found[max(found)] if found else None


def _check_tokens(task: Task, tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse a tokenizer without the special token that the task's batches are made with."""
    needed = {MASKED_LM: "mask_token", SEQUENCE: "pad_token", ENCODER: "pad_token"}.get(task)
    if needed is not None and getattr(tokenizer, needed) is None:
        raise ValueError(f"teacher: its tokenizer has no {needed}, which {task.name} needs")


def _check_length(source: ModelSource, corpus: Corpus) -> None:
    longest = max(corpus.train.sequence_length, corpus.validation.sequence_length)
    positions = getattr(source.config(), "max_position_embeddings", None)
    if isinstance(positions, int) and 0 < positions < longest:
        raise ValueError(
            f"sequence_length: {longest} tokens are more than the {positions} positions of "
            f"{source.option} {source.name!r}"
        )


def _check_tokenizer(student: ModelSource, teacher_tokenizer: PreTrainedTokenizerBase) -> None:
    difference = models.tokenizer_difference(student.tokenizer(), teacher_tokenizer)
    if difference is not None:
        raise ValueError(f"student: tokenizers differ: {difference}")


def _check_vocabulary(
    student: PreTrainedModel,
    teacher_vocab: int,
    tokenizer: PreTrainedTokenizerBase,
    policy: str,
) -> None:
    sizes = models.vocab_size(student), teacher_vocab
    if sizes[0] != sizes[1] and policy == "error":
        raise ValueError(
            f"student: vocabulary of {sizes[0]}, the teacher's has {sizes[1]}; they must be equal, "
            "or --vocab_policy truncate"
        )
    if min(sizes) < len(tokenizer):
        raise ValueError(
            f"student: a vocabulary of {min(sizes)} is less than the tokenizer's {len(tokenizer)}"
        )


def load_corpus(
    data: DataArguments,
    tokenizer: PreTrainedTokenizerBase,
    task: Task = CAUSAL_LM,
    label_ids: dict[str, int] | None = None,
    seed: int = 0,
) -> Corpus:
    """Read, tokenise, pack or cut, and split the text as ``data`` and ``task`` say."""

    def part(option: str, source: str, split: str, limit: int | None) -> TokenBlocks | Examples:
        if task in (CAUSAL_LM, MASKED_LM):
            documents = read_documents(option, source, data.text_column, split)
            return token_blocks(option, documents, tokenizer, data.sequence_length, limit)
        labels = (data.label_column,) if task is SEQUENCE else ()
        columns: tuple[str, ...] = (data.text_column, *labels)
        rows = read_rows(option, source, columns, split, lines=True)
        return examples(option, rows, tokenizer, data.sequence_length, label_ids, limit)

    train = part("train_text", data.train_text, data.train_split, data.max_train_tokens)
    if data.validation_text is None:
        corpus = split_tail(train, data.validation_fraction)
    else:
        split = data.validation_split
        corpus = Corpus(train, part("validation_text", data.validation_text, split, None))
    parts = [corpus.train, corpus.validation.evenly(data.max_validation_tokens)]
    if task is MASKED_LM:
        parts = [
            MaskedBlocks(blocks.blocks, tokenizer, seed)
            for blocks in parts
            if isinstance(blocks, TokenBlocks)
        ]
    return Corpus(*parts)


def build_student(
    model_args: ModelArguments,
    source: ModelSource | None,
    teacher: PreTrainedModel | None,
    seed: int,
) -> PreTrainedModel:
    """The untrained student, in the way that the options name."""
    if source is None:
        assert teacher is not None
        layers = models.parse_layers(
            model_args.student_layers or "", teacher.config.num_hidden_layers
        )
        student = models.keep_layers(teacher, layers)
        dtype = model_args.student_dtype
        return student if dtype == "auto" else student.to(getattr(torch, dtype))
    set_seed(seed)
    if model_args.student_config is not None:
        return models.from_config(source, model_args.student_dtype, TASKS[model_args.task])
    return source.model(model_args.student_dtype, TASKS[model_args.task])


# ---- the run ------------------------------------------------------------------------------------


class Progress(ProgressCallback):
    """A progress bar that shows the newest losses beside itself, not as lines of dictionaries."""

    SHOWN = ("loss", "kd_loss", "ce_loss", "eval_ce_loss")

    def __init__(self, title: str) -> None:
        super().__init__()
        self.title = title
        self.shown: dict[str, str] = {}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        super().on_train_begin(args, state, control, **kwargs)
        if self.training_bar is not None:
            self.training_bar.set_description(self.title)

    def on_prediction_step(
        self, args: Any, state: Any, control: Any, eval_dataloader: Any = None, **kwargs: Any
    ) -> None:
        super().on_prediction_step(args, state, control, eval_dataloader, **kwargs)
        if self.prediction_bar is not None:
            self.prediction_bar.set_description(f"{self.title}: evaluation")

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if self.training_bar is not None and logs:
            self.shown |= {k: f"{logs[k]:.3f}" for k in self.SHOWN if k in logs}
            self.training_bar.set_postfix(self.shown)


def make_trainer(
    experiment: Experiment,
    title: str,
    model: PreTrainedModel,
    taught: bool,
    **changes: Any,
) -> DistillationTrainer:
    """A trainer of ``model`` with the run's arguments, ``changes`` applied to them."""
    # Not dataclasses.replace: a second __post_init__ resets accelerate's process state, and a
    # process of several would train alone from then on.
    args = copy.copy(experiment.args)
    for name, value in changes.items():
        setattr(args, name, value)
    trainer = DistillationTrainer(
        model,
        args,
        teacher=experiment.teacher if taught else None,
        teacher_cache=experiment.cache if taught else None,
        train_dataset=experiment.corpus.train,
        eval_dataset=experiment.corpus.validation,
        data_collator=experiment.collator,
        processing_class=experiment.tokenizer,
    )
    # Either prints dictionaries among the results; the curves are in results.json.
    trainer.remove_callback(PrinterCallback)
    trainer.remove_callback(ProgressCallback)
    if not args.disable_tqdm:
        trainer.add_callback(Progress(title))
    return trainer


def evaluate(experiment: Experiment, title: str, model: PreTrainedModel) -> dict[str, Any]:
    """One row of the table: size of ``model``, and its quality on the held-out text."""
    is_teacher = model is experiment.teacher
    row: dict[str, Any] = {
        "name": title,
        "parameters": models.parameter_count(model),
        "megabytes": models.weight_bytes(model) / 1e6,
    }
    if experiment.task is ENCODER:
        ours = experiment.vectors[title] = sentence_vectors(experiment, model)
        return row if is_teacher else row | geometry.compare(ours, experiment.vectors["teacher"])
    # Agreement with the teacher is measured for every student, one trained on labels only, too.
    alpha = 0.0 if is_teacher else experiment.args.alpha or 0.5
    changes = LABELS_ONLY | {"alpha": alpha}
    trainer = make_trainer(experiment, title, model, not is_teacher, **changes)
    metrics = trainer.evaluate()
    row |= {
        "loss": metrics["eval_ce_loss"],
        "divergence": 0.0 if is_teacher else metrics["eval_kd_loss"],
        "agreement": 1.0 if is_teacher else metrics["eval_agreement"],
        "accuracy": metrics["eval_accuracy"],
    }
    if "eval_perplexity" in metrics:
        row["perplexity"] = metrics["eval_perplexity"]
    return row


@torch.no_grad()
def sentence_vectors(experiment: Experiment, model: PreTrainedModel) -> Tensor:
    """Pooled vectors [N, D] of all held-out examples, on the CPU."""
    data, size = experiment.corpus.validation, experiment.args.per_device_eval_batch_size
    found: list[Tensor] = []
    model.eval()
    for first in range(0, len(data), size):
        items = [data[i] for i in range(first, min(first + size, len(data)))]
        moved = {k: v.to(model.device) for k, v in experiment.collator(items).items()}
        hidden = model(**moved).last_hidden_state
        how = experiment.args.pooling
        found.append(pooled(hidden, moved["attention_mask"], how=how).cpu())
    return torch.cat(found)


#: How long speeds are measured: until so many seconds have passed, within so many rounds.
_SPEED_SECONDS, _SPEED_ROUNDS = 6.0, (7, 31)
#: Tokens of the batch on a CPU: enough to keep it busy, few enough for many rounds.
_SPEED_TOKENS = 256


@torch.no_grad()
def forward_speeds(
    experiment: Experiment, timed: dict[str, PreTrainedModel]
) -> dict[str, dict[str, Any]]:
    """Title -> tokens per second of that model's forward alone, their spread, and every round.

    The models take turns on one batch of held-out text, each round in another order, so that
    whatever else the machine does meets all of them: medians over the same rounds are comparable.
    The first round warms up and is not counted, nor is padding.
    """
    on_cpu = experiment.args.device.type == "cpu"
    data = experiment.corpus.validation.evenly(_SPEED_TOKENS if on_cpu else None)
    size = min(experiment.args.per_device_eval_batch_size, len(data))
    batch = dict(experiment.collator([data[i] for i in range(size)]))
    batch.pop("labels", None)
    mask = batch.get("attention_mask")
    tokens = int(batch["input_ids"].numel() if mask is None else mask.sum())
    names = list(timed)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    fewest, most = _SPEED_ROUNDS
    started = 0.0
    for number in range(most + 1):
        turn = number % len(names)
        for name in names[turn:] + names[:turn]:
            seconds[name].append(_forward_seconds(timed[name], batch))
        if number == 0:
            started = time.perf_counter()
        if number >= fewest and time.perf_counter() - started > _SPEED_SECONDS:
            break
    return {name: _speed(tokens, counted) for name, (_, *counted) in seconds.items()}


def _speed(tokens: int, seconds: list[float]) -> dict[str, Any]:
    first, median, third = statistics.quantiles(seconds, n=4, method="inclusive")
    return {
        "tokens_per_second": tokens / median,
        "speed_spread": (third - first) / 2 / median,
        "forward_seconds": seconds,
    }


def _forward_seconds(model: PreTrainedModel, batch: dict[str, Tensor]) -> float:
    device = next(model.parameters()).device
    moved = {name: tensor.to(device) for name, tensor in batch.items()}
    model.eval()
    _wait_for(device)
    started = time.perf_counter()
    model(**moved, **models.without_cache(model))
    _wait_for(device)
    return time.perf_counter() - started


def _wait_for(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def train(
    experiment: Experiment, arm: str, student: PreTrainedModel, changes: dict[str, Any]
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Train ``student`` in place; returns (training numbers of the table's row, log history)."""
    folder = experiment.output / report.ARM_FOLDERS[arm]
    # Blocks have no padding, but may hold the token that batches of examples are padded with.
    counted = "all" if isinstance(experiment.corpus.train, TokenBlocks) else "non_padding"
    changes = changes | {"output_dir": str(folder), "include_num_input_tokens_seen": counted}
    trainer = make_trainer(experiment, arm, student, True, **changes)
    last = last_checkpoint(folder)
    started = time.perf_counter()
    result = trainer.train(resume_from_checkpoint=last)
    seconds = time.perf_counter() - started
    args = trainer.args
    if args.process_index == 0 and not any(folder.iterdir()):
        folder.rmdir()
    first_step = 0 if last is None else int(last.rsplit("-", 1)[1])
    tokens = trainer.state.num_input_tokens_seen
    share = (result.global_step - first_step) / max(1, result.global_step)
    row = {
        "train_seconds": seconds,
        "train_tokens_per_second": tokens * share / seconds,
        "steps": result.global_step,
        "tokens_seen": tokens,
        "seed": args.seed,
        "resumed_from_step": first_step,
    }
    return row, trainer.state.log_history


def run(experiment: Experiment) -> dict[str, Any]:
    """Evaluate, train, evaluate, write results; returns what ``results.json`` holds."""
    started = time.perf_counter()
    main_process = experiment.args.process_index == 0
    if experiment.run_args.overwrite_output_dir and main_process:
        report.remove(experiment.output)
    if experiment.teacher is None:
        assert experiment.cache is not None
        rows: list[dict[str, Any]] = [
            {"name": "teacher", "parameters": experiment.cache.info.parameters}
        ]
    else:
        rows = [evaluate(experiment, "teacher", experiment.teacher)]
    rows.append(evaluate(experiment, "student, untrained", experiment.student))
    curves: dict[str, list[dict[str, Any]]] = {}
    arms: list[tuple[str, dict[str, Any]]] = []
    if experiment.task is ENCODER:
        if experiment.run_args.baseline:
            arms.append(("output only", OUTPUT_ONLY))
    elif experiment.run_args.baseline or not experiment.args.uses_teacher:
        arms.append(("labels only", LABELS_ONLY))
    if experiment.args.uses_teacher:
        arms.append(("distilled", {}))
    timed = {} if experiment.teacher is None else {"teacher": experiment.teacher}
    for position, (arm, changes) in enumerate(arms):
        last = position == len(arms) - 1
        student = experiment.student if last else copy.deepcopy(experiment.student)
        training, curves[arm] = train(experiment, arm, student, changes)
        title = f"student, {arm}"
        timed[title] = student
        rows.append(evaluate(experiment, title, student) | training)
    if main_process:  # the others are idle, so that nothing competes
        speeds = forward_speeds(experiment, timed)
        rows = [row | speeds.get(row["name"], {}) for row in rows]
    results = report.results(experiment, rows, curves, time.perf_counter() - started)
    if main_process:
        report.write(experiment, results)
    return results
