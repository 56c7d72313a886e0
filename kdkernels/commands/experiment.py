"""What a run is made of: its options, and all that they name, checked and loaded.

:func:`prepare` checks everything that can be checked, cheapest first, and raises ValueError (one
line) before anything is written or trained.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import (
    DataCollatorWithPadding,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    default_data_collator,
    set_seed,
)

from ..dtypes import WEIGHT_DTYPES
from ..training import models, sentences
from ..training.arguments import DistillationArguments, refuse_idle
from ..training.folders import plain
from ..training.layer_configs import layer_count, text_config
from ..training.models import ModelSource
from ..training.redaction import without_secrets
from ..training.saving import not_finite, repair_generation
from ..training.served import DEFAULT_TOP_K, FORMS, ServedCache, text_fingerprint, unique
from ..training.server import KEY_VARIABLE, Address, Server, check_numbers
from ..training.tasks import (
    CAUSAL_LM,
    ENCODER,
    MASKED_LM,
    SEQUENCE,
    TASKS,
    TOKEN,
    Task,
    check_can_be_loaded,
    check_config,
    label_names,
)
from ..training.teacher_cache import (
    TeacherCache,
    check_kept,
    fingerprint_of,
    tokenizer_fingerprint,
)
from ..training.teachers import CachedTeacher, ModelTeacher, Student, Teacher, check_labels
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
from .fetch import cache_folder
from .geometry import FEWEST_VECTORS
from .output import check_output

#: Tasks that the command line has data for; token classifiers are trained from Python.
CLI_TASKS = tuple(name for name in TASKS if name != TOKEN.name)


@dataclass
class ModelArguments:
    """Teacher and student."""

    _argument_group_name = "models"

    teacher: str | None = field(
        default=None,
        metadata={
            "help": "The model to learn from: a folder, a hub name, or a .gguf file. May be left "
            "out where a teacher_url, or a teacher_cache and a student, are given."
        },
    )
    teacher_url: str | None = field(
        default=None,
        metadata={
            "help": "Learn from a served model instead: the address of an OpenAI-compatible "
            "server that gives log-probabilities of prompts (vLLM), e.g. http://localhost:8000/v1. "
            f"A key is read from the environment variable {KEY_VARIABLE}."
        },
    )
    teacher_name: str | None = field(
        default=None,
        metadata={"help": "The model's name at teacher_url; default: the only one it serves."},
    )
    teacher_logprobs: str = field(
        default="auto",
        metadata={
            "help": "How teacher_url is asked: prompt_logprobs (vLLM), echo (OpenAI), or auto (the "
            "first of them that it answers)."
        },
    )
    teacher_requests: int = field(
        default=8, metadata={"help": "Requests to teacher_url at a time."}
    )
    teacher_timeout: float = field(
        default=300.0, metadata={"help": "Seconds that one request to teacher_url may take."}
    )
    teacher_tries: int = field(
        default=6,
        metadata={
            "help": "How often a request to teacher_url is made that gets no connection, no answer "
            "in time, or status 408, 429 or 5xx."
        },
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
        default="float32", metadata={"help": "Student weights: " + ", ".join(WEIGHT_DTYPES) + "."}
    )
    student_dropout: float | None = field(
        default=None,
        metadata={"help": "Set every dropout of the student to this; default: as configured."},
    )

    def __post_init__(self) -> None:
        self._check_server()
        ways = ("student", "student_config", "student_layers")
        given = [name for name in ways if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(
                f"give exactly one of --student, --student_config and --student_layers "
                f"(given: {', '.join(given) or 'none'})"
            )
        if self.task not in CLI_TASKS:
            raise ValueError(f"task: {self.task!r} is not one of {', '.join(CLI_TASKS)}")
        if self.student_dtype not in WEIGHT_DTYPES:
            raise ValueError(f"student_dtype: {self.student_dtype!r} is not one of {WEIGHT_DTYPES}")
        if self.student_dropout is not None and not 0 <= self.student_dropout < 1:
            raise ValueError(f"student_dropout: {self.student_dropout} is not in [0, 1)")

    def _check_server(self) -> None:
        """ValueError for options of a server that are bad, or that nothing would read."""
        if self.teacher_url is None:
            for name in ("name", "logprobs", "requests", "timeout", "tries"):
                refuse_idle(self, f"teacher_{name}", "; it needs teacher_url")
            return
        if self.teacher is not None:
            raise ValueError("teacher_url: give a teacher or the address of its server, not both")
        if self.teacher_logprobs not in FORMS:
            raise ValueError(
                f"teacher_logprobs: {self.teacher_logprobs!r} is not one of {', '.join(FORMS)}"
            )
        check_numbers(self.teacher_timeout, self.teacher_tries, self.teacher_requests)
        Address.of(self.teacher_url)


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
        for name in ("train_text", "validation_text"):
            if getattr(self, name) == "":
                raise ValueError(f"{name}: '' names no text")
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
            "`kdkernels distill` then needs no teacher (only its tokenizer and configuration, or "
            "those of the student). What teacher_url answers is kept there; default: a folder of "
            "its own in .cache/kdkernels."
        },
    )
    cache_top_k: int | None = field(
        default=None,
        metadata={
            "help": "What cache-teacher keeps of a prediction: this many log-probabilities at the "
            "run's temperature and the mass of the others; default: all logits. Of a teacher_url, "
            f"whose are at temperature 1: {DEFAULT_TOP_K} by default."
        },
    )
    cache_samples: int | None = field(
        default=None,
        metadata={
            "help": "What cache-teacher keeps instead: this many tokens of a prediction, drawn "
            "from the teacher's distribution at the run's temperature, by seed."
        },
    )
    overwrite_output_dir: bool = field(
        default=False, metadata={"help": "Replace the results of an earlier run in output_dir."}
    )
    #: The YAML file that the options come from.
    config_file: str | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        check_kept(self.cache_top_k, self.cache_samples)


@dataclass
class Experiment:
    """Everything a run needs, checked."""

    model_args: ModelArguments
    data_args: DataArguments
    run_args: RunArguments
    args: DistillationArguments
    teacher: Teacher
    student: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    corpus: Corpus
    configuration: dict[str, Any]  #: the options that were given, for the record
    notes: list[str] = field(default_factory=list)  #: what the user is told before it begins
    #: Encoders: title of a row -> sentence vectors [N, D] of the held-out examples.
    vectors: dict[str, Tensor] = field(default_factory=dict)

    @property
    def task(self) -> Task:
        return TASKS[self.model_args.task]

    @property
    def lacks_labels(self) -> bool:
        """Whether the text has no labels for a task that has; alpha is 1 then."""
        return self.task is not ENCODER and "labels" not in self.corpus.train[0]

    @property
    def teacher_name(self) -> str:
        """What the teacher is called: as it is loaded, or as it is served."""
        cache = self.teacher.cache
        return self.model_args.teacher or ("a teacher" if cache is None else cache.info.name)

    def reach_teacher(self) -> None:
        """Ask a served teacher's first question; ValueError or RuntimeError if that is in vain."""
        self.teacher.reach(items_of(self.corpus))
        if isinstance(self.teacher.cache, ServedCache):
            self.notes.append(self.teacher.cache.outlook)

    def fill_teacher(self) -> None:
        """All its other ones; RuntimeError if one of them fails."""
        self.teacher.fill(items_of(self.corpus))

    @property
    def has_baseline(self) -> bool:
        """Whether there is a baseline to train; without labels it would learn nothing."""
        return self.run_args.baseline and not self.lacks_labels

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
    teacher: ModelSource | None  #: None: it is served, or its cache is all there is
    student: ModelSource | None  #: None: layers of the teacher
    tokenizer: PreTrainedTokenizerBase
    corpus: Corpus


def prepare_inputs(
    model_args: ModelArguments,
    data_args: DataArguments,
    args: DistillationArguments,
    labels_needed: bool = True,
) -> Inputs:
    """Check and read sources, tokenizers and text; ValueError (one line) on bad input.

    Unless ``labels_needed``, the text may be without those of a classifier.
    """
    check_source("train_text", data_args.train_text)
    if data_args.validation_text is not None:
        check_source("validation_text", data_args.validation_text)
    teacher = None
    if model_args.teacher is not None:
        teacher = ModelSource("teacher", model_args.teacher)
    named = model_args.student or model_args.student_config
    option = "student" if model_args.student else "student_config"
    student = ModelSource(option, named) if named else None
    sources = [source for source in (teacher, student) if source is not None]
    for source in sources:
        source.check()
    task = TASKS[model_args.task]
    for source in sources:
        check_config(task, source.config(), source.option)
    args.resolved_terms(task is not ENCODER)
    if task is ENCODER and teacher is not None:
        sentences.settle(teacher, student, args)
    tokenizer = sources[0].tokenizer()
    _check_tokens(task, tokenizer)
    if student is not None and model_args.student is not None and teacher is not None:
        _check_tokenizer(student, tokenizer)
    names = teacher.config().label2id or {} if task is SEQUENCE and teacher is not None else {}
    label_ids = {str(name): int(i) for name, i in names.items()} or None
    corpus = load_corpus(data_args, tokenizer, task, label_ids, args.seed, labels_needed)
    if task is ENCODER and len(corpus.validation) < FEWEST_VECTORS:
        raise ValueError(
            f"train_text: {len(corpus.validation)} held-out example(s); the geometry of an encoder "
            f"is measured on at least {FEWEST_VECTORS}"
        )
    for source in sources:  # its file says most of it; its model, once it is loaded, the rest
        check_length(f"{source.option} {source.name!r}", source.config(), corpus)
    return Inputs(task, teacher, student, tokenizer, corpus)


def prepare(
    model_args: ModelArguments,
    data_args: DataArguments,
    run_args: RunArguments,
    args: DistillationArguments,
    configuration: dict[str, Any],
    check_folder: Callable[[Path, bool, str | None, dict[str, Any]], None] = check_output,
) -> Experiment:
    """Check and load; ValueError (one line) on bad input. Writes nothing.

    Args:
        configuration: the options that were given.
        check_folder: refuses an output folder; by default one that is not for ``distill``.
    """
    options = configuration | {"config": run_args.config_file}
    overwrite = run_args.overwrite_output_dir
    check_folder(output_folder(args), overwrite, args.resume_from_checkpoint, options)
    if args.push_to_hub:
        raise ValueError(
            "push_to_hub: only a checkpoint of the training would be pushed; upload the folder "
            "`student` of a finished run with `hf upload`"
        )
    if args.max_steps <= 0 and (args.max_steps != -1 or args.num_train_epochs <= 0):
        raise ValueError(
            f"max_steps: {args.max_steps} with num_train_epochs: {args.num_train_epochs} is no "
            "training; give max_steps of at least 1, or -1 and more than 0 epochs"
        )
    reads_cache = run_args.teacher_cache is not None and model_args.teacher_url is None
    check_teacher(model_args, run_args, args, reads_cache)
    # A loss of the teacher alone needs no labels.
    labels_needed = args.alpha_over_time().lowest < 1
    inputs = prepare_inputs(model_args, data_args, args, labels_needed)
    teacher = load_teacher(inputs, model_args, run_args, args.teacher_dtype)
    student = build_student(model_args, inputs.student, teacher, args.seed)
    repaired = repair_generation(student)
    if model_args.student_dropout is not None:
        models.set_dropout(student, model_args.student_dropout)
    _check_student(student, inputs, teacher, args)
    teacher.check_run(Student.of(student, inputs.task, args), items_of(inputs.corpus))
    return Experiment(
        model_args,
        data_args,
        run_args,
        args,
        teacher=teacher,
        student=student,
        tokenizer=inputs.tokenizer,
        corpus=inputs.corpus,
        configuration=plain(without_secrets(configuration)),
        notes=[] if repaired is None else [repaired],
    )


def _check_student(
    student: PreTrainedModel, inputs: Inputs, teacher: Teacher, args: DistillationArguments
) -> None:
    """ValueError unless it can be trained on these inputs, saved, and loaded again."""
    check_can_be_loaded(inputs.task, student.config, "student")
    check_model("student", student, inputs.corpus)
    bad = not_finite(student)
    if bad is not None:  # as it is after --student_dtype
        raise ValueError(f"student: {bad} holds infinite numbers in {student.dtype}")
    if inputs.task is SEQUENCE and inputs.teacher is not None:
        _name_labels(student, inputs.teacher.config())
    if inputs.task in (CAUSAL_LM, MASKED_LM):
        vocab = teacher.width(inputs.task)
        _check_vocabulary(student, vocab, inputs.tokenizer, args.vocab_policy)


def _name_labels(student: PreTrainedModel, teacher: PretrainedConfig) -> None:
    """The teacher's names for a student that only numbers its labels; ValueError if they differ.

    Labels of the text are read as the teacher's; the student is saved with the names it learnt.
    """
    names = label_names(teacher)
    check_labels(student.config, names)
    if label_names(student.config) is None and student.config.num_labels == teacher.num_labels:
        student.config.id2label = teacher.id2label
        student.config.label2id = teacher.label2id


def check_teacher(
    model_args: ModelArguments,
    run_args: RunArguments,
    args: DistillationArguments,
    reads_cache: bool,
) -> None:
    """ValueError unless one teacher is named, and no option that it cannot have.

    ``reads_cache``: whether ``teacher_cache`` is one of a teacher, which may then be away.
    """
    url = model_args.teacher_url
    if model_args.teacher is None and url is None and not reads_cache:
        raise ValueError("give --teacher, or --teacher_url, or the --teacher_cache of one of them")
    without = "teacher_cache" if reads_cache else "teacher_url"
    if model_args.teacher is None and model_args.task != CAUSAL_LM.name:
        raise ValueError(f"{without}: alone it teaches {CAUSAL_LM.name}, not {model_args.task}")
    if model_args.student_layers is not None and (reads_cache or url is not None):
        raise ValueError(
            f"{without}: student_layers need the teacher itself; make the student first with "
            "`kdkernels init-student` and name it with --student"
        )
    if url is None:
        return
    if run_args.cache_samples is not None:
        raise ValueError("cache_samples: a server gives the top of a distribution (cache_top_k)")
    for name in ("teacher_dtype", "teacher_device"):
        refuse_idle(args, name, " on a served teacher")


def load_teacher(
    inputs: Inputs, model_args: ModelArguments, run_args: RunArguments, dtype: str
) -> Teacher:
    """The teacher itself, what a folder holds of it, or a folder that a server will fill.

    ValueError if it cannot be. No server is asked yet.
    """
    folder = run_args.teacher_cache
    if model_args.teacher_url is not None:
        return CachedTeacher(served_cache(inputs, model_args, run_args))
    if folder is not None:
        known = None if inputs.teacher is None else fingerprint_of(inputs.teacher.name)
        return CachedTeacher(TeacherCache(folder, inputs.tokenizer, known))
    assert inputs.teacher is not None
    model = inputs.teacher.model(dtype, inputs.task)
    check_model("teacher", model, inputs.corpus)
    return ModelTeacher(model)


def served_cache(inputs: Inputs, model_args: ModelArguments, run_args: RunArguments) -> ServedCache:
    """The cache of the teacher at ``teacher_url``.

    Its folder has a name of its own where none is given: that of another text, say, is another one.
    """
    assert model_args.teacher_url is not None and inputs.student is not None
    top_k = DEFAULT_TOP_K if run_args.cache_top_k is None else run_args.cache_top_k
    folder = run_args.teacher_cache
    if folder is None:
        parts = [model_args.teacher_name, tokenizer_fingerprint(inputs.tokenizer), top_k]
        parts.append(text_fingerprint(unique(items_of(inputs.corpus))))
        digest = hashlib.sha256(json.dumps(parts).encode()).hexdigest()
        folder = str(cache_folder() / f"served-{digest[:16]}")
    return ServedCache(
        Server(
            model_args.teacher_url,
            timeout=model_args.teacher_timeout,
            tries=model_args.teacher_tries,
        ),
        folder,
        inputs.tokenizer,
        vocab=text_config(inputs.student.config()).vocab_size,
        top_k=top_k,
        name=model_args.teacher_name,
        form=model_args.teacher_logprobs,
        requests=model_args.teacher_requests,
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


def _check_tokens(task: Task, tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse a tokenizer without the special token that the task's batches are made with."""
    needed = {MASKED_LM: "mask_token", SEQUENCE: "pad_token", ENCODER: "pad_token"}.get(task)
    if needed is not None and getattr(tokenizer, needed) is None:
        raise ValueError(f"teacher: its tokenizer has no {needed}, which {task.name} needs")


def check_model(role: str, model: PreTrainedModel, corpus: Corpus) -> None:
    """ValueError if the loaded ``model`` of this role cannot be run on examples of the text."""
    check_length(role, model, corpus)
    models.check_takes_tokens(model, role)


def check_length(role: str, model: PretrainedConfig | PreTrainedModel, corpus: Corpus) -> None:
    """ValueError if an example is longer than ``model``, the one of this role, has positions."""
    longest = max(corpus.train.sequence_length, corpus.validation.sequence_length)
    positions = models.positions(model)
    if positions is not None and positions < longest:
        raise ValueError(
            f"sequence_length: {longest} tokens are more than the {positions} positions of {role}"
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
    labels_needed: bool = True,
) -> Corpus:
    """Read, tokenise, pack or cut, and split the text as ``data`` and ``task`` say.

    Unless ``labels_needed``, classifiers' examples are without labels where the text has none.
    """

    def part(option: str, source: str, split: str, limit: int | None) -> TokenBlocks | Examples:
        if task in (CAUSAL_LM, MASKED_LM):
            documents = read_documents(option, source, data.text_column, split)
            return token_blocks(option, documents, tokenizer, data.sequence_length, limit)
        labels = (data.label_column,) if task is SEQUENCE else ()
        columns: tuple[str, ...] = (data.text_column, *labels)
        rows = read_rows(option, source, columns, split, True, labels_needed)
        length = data.sequence_length
        return examples(option, rows, tokenizer, length, label_ids, limit, labels_needed)

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
    model_args: ModelArguments, source: ModelSource | None, teacher: Teacher, seed: int
) -> PreTrainedModel:
    """The untrained student, in the way that the options name."""
    dtype = model_args.student_dtype
    if source is None:
        assert teacher.model is not None
        available = layer_count(teacher.model.config, "teacher")
        layers = models.parse_layers(model_args.student_layers or "", available)
        return models.in_dtype(models.keep_layers(teacher.model, layers), dtype)
    set_seed(seed)
    if model_args.student_config is not None:
        return models.from_config(source, dtype, TASKS[model_args.task])
    return source.model(dtype, TASKS[model_args.task])
