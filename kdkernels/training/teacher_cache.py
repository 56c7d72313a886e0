"""The teacher's outputs on disk, so that a second run needs no teacher.

A cache is a folder, which takes its place when it is whole: ``cache.json`` and shards
``rows-00000.safetensors``. A row is one prediction: a token, or a classifier's example. Examples
are found by their token ids, so order, batch size and padding do not matter; which examples a
cache has is fixed. (That of a teacher behind a server, :mod:`kdkernels.training.served`, is a top-k
cache which grows in its place, and has no ``cache.json`` until it is whole.)

* **Full** (``top_k=None``): the logits as the teacher gave them. The loss is bitwise that of the
  teacher itself, at every temperature.
* **Top-k**: for one temperature T the k largest log-probabilities of softmax(z / T), their ids, and
  the mass m of all others. They go to :func:`kdkernels.fused_topk_kd_loss` as they are, nothing of
  the vocabulary's size is made of them, and a run's ``cache_tail`` says what it makes of m. With p
  the teacher's, q the student's probabilities at T and p_k the k-th largest p, forward KL (before
  T^2) and its gradient ``T (q - p)`` in the student's logits are then:

  ``"uniform"`` (default)
    m spread evenly over the other V - k entries. The KL differs from the teacher's own by at most
    :func:`forward_kl_bound`::

      m * (log((V - k) * p_k / m) + max_tail log q - min_tail log q)

    (the tail's negative entropy is at most ``m log p_k`` and at least that of the even spread;
    moving the mass m within the tail changes ``sum p log q`` by at most m times the range of log q
    there.) The gradient differs by at most ``2 m T`` in the 1-norm.
  ``"bucket"``
    All others are one category, of which the student gives q_m. The KL is the teacher's own without
    ``m KL(p / m, q / q_m)`` within the tail: never above it, and below by at most ``m * (log(p_k /
    m) + log q_m - min_tail log q)``, which is at most the same bound, as ``q_m <= (V - k) max_tail
    q``. The gradient differs by at most ``2 m T`` here, too.
  ``"renormalize"``
    ``p / (1 - m)``, and 0 in the tail. With A = sum p (log p - log q) over the entries the KL is
    ``A / (1 - m) - log(1 - m)``: what the tail would say is not in it, so the bound does not hold.
    The gradient differs by at most ``2 m T``, half of it in the tail, which is pushed to 0.
  ``"subset"``
    The k entries alone, both models' renormalised over them. Says nothing of the tail: no bound,
    and no gradient there.

  The last two can be had at another temperature than the cache's, T0: of ``p^(T0 / T)``.
* **Samples** (Anshumann et al. 2025, arXiv:2503.16870): for one temperature, N ids drawn from
  softmax(z / T) with replacement; each weighs its count / N, and these add up to 1. Under the tail
  ``"none"``, which is the default here, the gradient's expectation over the draws is the teacher's
  own, whatever the student is, which no top k has. The KL's value is above the teacher's own, in
  expectation, by the entropy that the drawn weights lack. An example's draws depend on the seed and
  its tokens, not on the batch that it is in.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterable, Set
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple, get_args, get_origin, get_type_hints

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..entries import NORMALIZED
from ..problem import entry_dtype
from ..topk import TopK
from .batches import batches
from .folders import check_new, write_json, written_file, written_whole
from .models import output_width, parameter_count
from .recorder import Signature
from .tasks import SEQUENCE, TOKEN, Task, base_of, label_names, task_of

META_FILE = "cache.json"
FORMAT = 1

#: A shard is written once it holds this many bytes.
_SHARD_BYTES = 256 * 2**20

#: Rows are drawn from this many bytes of their probabilities at a time.
_DRAW_BYTES = 64 * 2**20

#: What fills slots that a row has no entry for; elsewhere 0.
_EMPTY = {"ids": -1}

#: The least mass of the others that is handed out: 1 minus a sum of 256 float64 numbers below 1
#: errs by 2.8e-14 at most.
_LEAST_REST = 2.0**-44


@dataclass(frozen=True)
class CacheInfo:
    """What ``cache.json`` holds."""

    format: int
    task: str
    model: str  #: fingerprint of the teacher
    tokenizer: str  #: fingerprint of its tokenizer
    name: str  #: what the teacher was called
    parameters: int | None  #: of the teacher; None: its server does not say
    vocab: int
    top_k: int | None  #: None: full logits
    temperature: float  #: of a top-k cache
    examples: int
    rows: int
    labels: list[str] | None = None  #: a classifier's, in the order of its logits, if named
    samples: int | None = None  #: of each row; None: the top k, or full logits
    text: str | None = None  #: fingerprint of all examples that a server was asked for

    @property
    def is_full(self) -> bool:
        return self.top_k is None and self.samples is None

    @property
    def kept(self) -> str:
        """What there is of a row, in words."""
        if self.samples is not None:
            return f"{self.samples} samples"
        return "all logits" if self.top_k is None else f"the top {self.top_k}"

    @classmethod
    def read(cls, file: Path, where: str) -> CacheInfo:
        """What a file holds; ValueError, which begins with ``where``, if it cannot be that."""
        try:
            info = cls(**json.loads(file.read_text()))
            info.check_types()
        except (TypeError, ValueError) as error:
            raise ValueError(f"{where}: {file.name} cannot be read ({error})") from error
        if info.format != FORMAT:
            raise ValueError(f"{where} has format {info.format}, this version reads {FORMAT}")
        return info

    def check_types(self) -> None:
        """TypeError unless every field has the type that it is declared with."""
        for name, kind in get_type_hints(CacheInfo).items():
            value = getattr(self, name)
            kinds = tuple(get_origin(part) or part for part in get_args(kind) or (kind,))
            if not isinstance(value, (float, int) if kind is float else kinds):
                raise TypeError(f"{name}: {value!r}")


# ---- fingerprints -------------------------------------------------------------------------------


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """SHA-256 of everything that decides which ids a text becomes."""
    parts: list[Any] = [sorted(tokenizer.get_vocab().items()), tokenizer.all_special_tokens]
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        settings = json.loads(backend.to_str())
        for changing in ("truncation", "padding"):  # whatever the last call asked for
            settings.pop(changing, None)
        parts.append(settings)
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def model_fingerprint(model: PreTrainedModel) -> str:
    """SHA-256 of names, dtypes, shapes and values of all weights in memory."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def file_fingerprint(source: Path) -> str:
    """SHA-256 of a model's configuration and weights as they lie on disk: a folder or a file."""
    suffixes = (".safetensors", ".bin", ".gguf")
    files = [source]
    if source.is_dir():
        files = [f for f in source.iterdir() if f.suffix in suffixes or f.name == "config.json"]
    digest = hashlib.sha256()
    for file in sorted(files):
        digest.update(file.name.encode())
        with file.open("rb") as content:
            while chunk := content.read(2**20):
                digest.update(chunk)
    return digest.hexdigest()


def key_of(ids: Tensor) -> str:
    """The name of an example: a hash of its token ids, without padding."""
    data = ids.to(device="cpu", dtype=torch.int64).contiguous().numpy().data
    return hashlib.blake2b(data, digest_size=16).hexdigest()


def _examples(inputs: dict[str, Any]) -> list[tuple[str, Tensor]]:
    """(key, bool [S] of its tokens) of each example of a batch, on the CPU."""
    ids = inputs["input_ids"].cpu()
    mask = inputs.get("attention_mask")
    masks = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.cpu().bool()
    return [(key_of(row[tokens]), tokens) for row, tokens in zip(ids, masks, strict=True)]


# ---- writing ------------------------------------------------------------------------------------


class _Kept(NamedTuple):
    """What is kept of a row of logits."""

    top_k: int | None
    samples: int | None
    temperature: float
    seed: int  #: of the samples

    def of(self, logits: Tensor, key: str) -> dict[str, Tensor]:
        """What is kept of an example's logits [R, V]."""
        if self.samples is not None:
            digest = hashlib.blake2b(f"{self.seed} {key}".encode(), digest_size=7).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(digest, "big"))
            return drawn(logits, self.samples, self.temperature, generator)
        if self.top_k is None:
            return {"logits": logits.cpu().contiguous()}
        log_p = torch.log_softmax(logits.float() / self.temperature, -1)
        kept, ids = log_p.topk(self.top_k, dim=-1)
        # Summed over the tail itself: 1 - sum(top) would be rounding noise where the tail is small.
        tail = log_p.scatter(-1, ids, -math.inf).exp().sum(-1)
        return {"log_probs": kept.cpu(), "ids": ids.int().cpu(), "tail": tail.cpu()}


class Writer:
    """Collects rows and writes a shard whenever there are enough; ``shards``: those there are."""

    def __init__(self, folder: Path, shards: int = 0) -> None:
        self.folder, self.shards = folder, shards
        self.keys: set[str] = set()
        self.rows = self.bytes = 0
        self._names: list[str] = []
        self._parts: list[dict[str, Tensor]] = []

    def add_batch(self, inputs: dict[str, Any], logits: Tensor, task: Task, kept: _Kept) -> None:
        """The logits [B, S, V] or [B, V] of the examples that have not come before."""
        for at, (key, tokens) in enumerate(_examples(inputs)):
            if key not in self.keys:
                of_tokens = task.labels == "token"
                rows = logits[at][tokens.to(logits.device)] if of_tokens else logits[at : at + 1]
                self.add(key, kept.of(rows, key))

    def add(self, key: str, tensors: dict[str, Tensor]) -> None:
        """What is kept of an example's rows, by the names of a shard's tensors."""
        self.keys.add(key)
        self._names.append(key)
        self._parts.append(tensors)
        self.rows += len(next(iter(tensors.values())))
        self.bytes += sum(t.numel() * t.element_size() for t in tensors.values())
        if self.bytes >= _SHARD_BYTES:
            self.flush()

    def flush(self) -> None:
        if not self._parts:
            return
        lengths = [len(next(iter(part.values()))) for part in self._parts]
        shard = {
            name: torch.cat(_of_one_width([p[name] for p in self._parts], _EMPTY.get(name, 0)))
            for name in self._parts[0]
        }
        metadata = {"keys": json.dumps(self._names), "lengths": json.dumps(lengths)}
        with written_file(self.folder / f"rows-{self.shards:05}.safetensors") as file:
            save_file(shard, file, metadata=metadata)
        self.shards, self.bytes, self._names, self._parts = self.shards + 1, 0, [], []


def _of_one_width(rows: list[Tensor], fill: float) -> list[Tensor]:
    """Tensors [R, K] filled up to the largest K; those [R] as they are."""
    if rows[0].ndim == 1:
        return rows
    widest = max(one.shape[-1] for one in rows)
    pad = torch.nn.functional.pad
    return [pad(one, (0, widest - one.shape[-1]), value=fill) for one in rows]


def drawn(
    logits: Tensor, samples: int, temperature: float, generator: torch.Generator
) -> dict[str, Tensor]:
    """Ids drawn from softmax(logits / temperature) with replacement, and how often each came.

    ``ids`` and ``counts``, int32 [R, K] on the CPU: K is the most that one row has of different
    ones; empty slots have id -1 and count 0. ValueError for rows that are no distribution.
    """
    if entry_dtype(logits.device) != torch.float64:
        logits = logits.cpu()
    uniform = torch.rand(len(logits), samples, dtype=torch.float64, generator=generator)
    step = max(1, _DRAW_BYTES // (8 * logits.shape[-1]))
    found = []
    for rows, points in zip(logits.split(step), uniform.split(step), strict=True):
        up_to = torch.softmax(rows.double() / temperature, -1).cumsum(-1)
        if not bool(up_to[:, -1].isfinite().all()):
            raise ValueError("cache_samples: the teacher's logits hold NaN or infinity")
        # Of the first entry whose sum exceeds the point, which no entry of probability 0 is.
        points = points.to(rows.device) * up_to[:, -1:]
        found.append(torch.searchsorted(up_to, points, right=True).cpu())
    return _counted(torch.cat(found))


def _counted(ids: Tensor) -> dict[str, Tensor]:
    """Each row's different ids [R, N], and their numbers, as :func:`drawn` has them."""
    ordered = ids.sort(-1).values
    starts = torch.ones_like(ordered)
    starts[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
    slot = starts.cumsum(-1) - 1
    width = int(slot.max()) + 1 if slot.numel() else 1
    shape = (len(ids), width)
    counts = torch.zeros(shape, dtype=torch.int64).scatter_add_(-1, slot, torch.ones_like(slot))
    unique = torch.full(shape, _EMPTY["ids"]).scatter_(-1, slot, ordered)
    return {"ids": unique.int(), "counts": counts.int()}


def check_kept(top_k: int | None, samples: int | None, vocab: int | None = None) -> None:
    """ValueError unless it is one of them at most, and positive; fewer than all of ``vocab``."""
    for name, number in (("cache_top_k", top_k), ("cache_samples", samples)):
        if number is not None and number < 1:
            raise ValueError(f"{name}: {number} is not at least 1")
    if top_k is not None and samples is not None:
        raise ValueError(
            f"cache_samples: {samples} next to cache_top_k: {top_k}; a cache holds one of them"
        )
    if top_k is not None and vocab is not None and top_k >= vocab:
        raise ValueError(f"cache_top_k: {top_k} is not in 1..{vocab - 1}")


def check_can_be_written(folder: Path, task: Task) -> None:
    """ValueError if ``folder`` holds something, or models for ``task`` have no outputs to keep."""
    check_new("teacher_cache", folder)
    if task.labels is None:
        raise ValueError("teacher_cache: a model without a head has no outputs that can be cached")


@torch.no_grad()
def cache_teacher(
    teacher: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    items: Iterable[dict[str, Any]],
    collator: Callable[[list[dict[str, Any]]], Any],
    folder: str | Path,
    *,
    top_k: int | None = None,
    samples: int | None = None,
    temperature: float = 1.0,
    seed: int = 0,
    batch_size: int = 8,
    fingerprint: str | None = None,
    name: str = "teacher",
) -> CacheInfo:
    """Run the teacher once over ``items`` and write what it says.

    Args:
        teacher: in the dtype and on the device in which it is to run; switched to ``eval()``.
        items: of a data set, with ``input_ids``; labels are not used. One that comes twice is
            written once.
        collator: makes a batch of a list of items.
        folder: is made; must not exist, or be empty.
        top_k: how many log-probabilities of a row are kept; None: its logits.
        samples, seed: how many ids are drawn of a row instead, and the seed of all draws.
        temperature: of a top k, or of samples; a run's own, unless its tail renormalises a top k.
        fingerprint: of the teacher; default: :func:`model_fingerprint`.

    Raises:
        ValueError: the folder is not empty, ``top_k`` is not in 1..V - 1, both are given, or the
            teacher has no logits, or (of samples) logits that are no distribution.
    """
    output, task = Path(folder), task_of(teacher)
    check_can_be_written(output, task)
    base, signature = base_of(teacher), Signature(teacher)
    check_kept(top_k, samples, vocab := output_width(base, task))
    with written_whole(output) as scratch:
        writer, kept = Writer(scratch), _Kept(top_k, samples, temperature, seed)
        for batch in batches(items, batch_size):
            inputs = {k: v for k, v in dict(collator(batch)).items() if k != "labels"}
            moved = {n: t.to(base.device) for n, t in signature.own(inputs).items()}
            writer.add_batch(inputs, teacher.eval()(**moved).logits, task, kept)
        writer.flush()
        info = CacheInfo(
            format=FORMAT,
            task=task.name,
            model=fingerprint or model_fingerprint(base),
            tokenizer=tokenizer_fingerprint(tokenizer),
            name=name,
            parameters=parameter_count(teacher),
            vocab=vocab,
            top_k=top_k,
            temperature=temperature,
            examples=len(writer.keys),
            rows=writer.rows,
            labels=label_names(base.config) if task in (SEQUENCE, TOKEN) else None,
            samples=samples,
        )
        write_json(scratch / META_FILE, asdict(info))
    return info


# ---- reading ------------------------------------------------------------------------------------


class TeacherCache:
    """A cache, opened for reading: stands in for the teacher of ``DistillationTrainer``.

    Args:
        folder: written by :func:`cache_teacher`.
        tokenizer: the one that the new run uses; its fingerprint is compared.
        fingerprint: of the teacher that the new run names; compared if given.

    Raises:
        ValueError: no finished cache, or made with another tokenizer or model.
    """

    def __init__(
        self,
        folder: str | Path,
        tokenizer: PreTrainedTokenizerBase | None = None,
        fingerprint: str | None = None,
    ) -> None:
        self.folder = Path(folder)
        self._open(tokenizer, fingerprint)

    def _open(self, tokenizer: PreTrainedTokenizerBase | None, fingerprint: str | None) -> None:
        """Read the folder; ValueError unless it is whole, and of this tokenizer and model."""
        try:
            self.info = CacheInfo.read(self.folder / META_FILE, self._where)
        except (FileNotFoundError, NotADirectoryError):
            raise ValueError(f"{self._where} holds no finished cache (no {META_FILE})") from None
        if tokenizer is not None:
            self._compare(self.info, "tokenizer", tokenizer_fingerprint(tokenizer))
        if fingerprint is not None:
            self._compare(self.info, "model", fingerprint)
        self._open_shards()
        if len(self._places) != self.info.examples:
            raise ValueError(f"{self._where}: {len(self._places)} examples of {self.info.examples}")

    @property
    def _where(self) -> str:
        """How messages about it begin."""
        return f"teacher_cache: {str(self.folder)!r}"

    def reach(self, items: Iterable[dict[str, Any]]) -> None:
        """Get ready to fill it with these examples; one that is whole has what it has."""

    def fill(self, items: Iterable[dict[str, Any]]) -> None:
        """Get what it lacks of these examples; one that is whole gets nothing more."""

    def _compare(self, info: CacheInfo, what: str, now: str) -> None:
        """ValueError unless ``what`` its file says it was made with is that of this run."""
        then = getattr(info, what)
        if now != then:
            raise ValueError(
                f"{self._where} was made with another {what} (of {info.name!r}, fingerprint "
                f"{then[:12]}; this run's is {now[:12]})"
            )

    def _open_shards(self) -> None:
        self._shards: list[Any] = []
        self._places: dict[str, tuple[int, int, int]] = {}
        for file in sorted(self.folder.glob("rows-*.safetensors")):
            self._open_shard(file)

    def _open_shard(self, file: Path) -> None:
        """Note where the examples of this shard are; ValueError unless it is what META_FILE says.

        Values are not checked: that would read all of it.
        """
        where = f"teacher_cache: {str(file)!r}"
        try:
            shard = safe_open(file, "pt")
            metadata = shard.metadata()
            lengths = json.loads(metadata["lengths"])
            places = list(zip(json.loads(metadata["keys"]), lengths, strict=True))
            names = shard.keys()
            shapes = {name: shard.get_slice(name).get_shape() for name in names}
            rows = sum(lengths)
            if any(length < 0 for length in lengths):
                raise ValueError(f"lengths: {lengths}")
        except (SafetensorError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{where} is damaged, or no part of a cache ({error})") from error
        wanted = self._shapes(rows, shapes.get("ids", [0])[-1])
        if shapes != wanted:
            raise ValueError(f"{where} holds {shapes}, {META_FILE} and its header say {wanted}")
        first = 0
        for key, length in places:
            self._places[key] = (len(self._shards), first, first + length)
            first += length
        self._shards.append(shard)

    def _shapes(self, rows: int, width: int) -> dict[str, list[int]]:
        """The shapes of a shard's tensors; ``width``: that of its ids."""
        info = self.info
        if info.samples is not None:
            width = min(max(width, 1), info.samples)
            return {"counts": [rows, width], "ids": [rows, width]}
        if info.top_k is not None:
            return {"log_probs": [rows, info.top_k], "ids": [rows, info.top_k], "tail": [rows]}
        return {"logits": [rows, info.vocab]}

    def tail(self, given: str | None) -> str:
        """What a run makes of the entries that are not kept: as it says, or else what fits."""
        if given is not None:
            return given
        return "uniform" if self.info.samples is None else "none"

    def check(
        self,
        task: Task,
        beside_response: list[str],
        temperatures: set[float],
        divergences: Set[str] = frozenset(),
        tail: str | None = None,
    ) -> None:
        """ValueError if a run with these terms, temperatures and so on cannot use it.

        ``divergences``: their keys. ``tail``: the run's ``cache_tail``.
        """
        info = self.info
        if beside_response:
            raise ValueError(
                f"teacher_cache: terms: {', '.join(beside_response)} need the teacher itself"
            )
        if info.task != task.name:
            raise ValueError(f"teacher_cache: made for {info.task}, the student is {task.name}")
        rescaled = info.top_k is not None and self.tail(tail) in NORMALIZED
        if not (info.is_full or rescaled or temperatures == {info.temperature}):
            others = f"; with cache_tail {' or '.join(NORMALIZED)} it can" if info.top_k else ""
            raise ValueError(
                f"teacher_cache: {info.kept} at temperature {info.temperature} cannot be "
                f"used at {', '.join(map(str, sorted(temperatures)))}{others}"
            )
        if info.is_full and tail is not None:
            raise ValueError(f"cache_tail: {tail!r} has no effect; the cache holds all logits")
        if self.tail(tail) == "none":
            self._check_none(divergences)

    def _check_none(self, divergences: Set[str]) -> None:
        """ValueError unless a sum over entries as they are is what a run may have of them."""
        if self.info.samples is None:
            raise ValueError("cache_tail: 'none' is for samples of a teacher, not for its top k")
        if others := sorted(divergences - {"forward_kl"}):
            raise ValueError(
                f"divergence: {others[0]!r} compares distributions, and samples are none; only "
                "'forward_kl' is possible, or cache_tail 'renormalize'"
            )

    def require(self, items: Iterable[dict[str, Any]]) -> None:
        """ValueError unless the cache holds every one of these examples."""
        missing = total = 0
        for item in items:
            total += 1
            missing += key_of(torch.as_tensor(item["input_ids"])) not in self._places
        if missing:
            raise ValueError(
                f"{self._where} lacks {missing} of {total} examples; it has "
                "to be made from the same text, sequence_length and seed"
            )

    def logits(self, inputs: dict[str, Any]) -> Tensor:
        """Teacher logits of a batch, [B, S, V] or [B, V], on the CPU; 0 where there is padding.

        ValueError if an example is not in the cache, or the cache has no logits.
        """
        if not self.info.is_full:
            raise ValueError(f"{self._where} holds entries, no logits")
        examples = _examples(inputs)
        found = [rows["logits"] for rows in self._found(examples)]
        return self._batch(inputs, examples, found, 0.0)

    def entries(
        self, inputs: dict[str, Any], device: torch.device, vocab: int | None = None
    ) -> TopK:
        """Ids and log-probabilities [B, S, K] or [B, K] of a batch; no id where there is padding.

        Of a top k, 1 minus the sum of a row's probabilities is the mass of all others as it was
        written, to 3e-14, and at least 2^-44, so that it is not rounding noise. Log-probabilities
        are float64 (float32 where ``device`` has no such), moved by what float32 had rounded off.

        Args:
            vocab: what is left of the vocabulary, whose first ids these are; None: all. The rest of
                it is taken out of the distribution, of the others as an even spread has there.

        Raises:
            ValueError: an example is not in the cache, or the cache is full.
        """
        if self.info.is_full:
            raise ValueError(f"{self._where} holds logits, no entries")
        examples = _examples(inputs)
        parts = [self._entries(rows, vocab) for rows in self._found(examples)]
        ids, log_probs = (
            self._batch(inputs, examples, _of_one_width([part[i] for part in parts], fill), fill)
            for i, fill in enumerate((-1, -math.inf))
        )
        return TopK(ids.to(device), log_probs.to(entry_dtype(device)).to(device))

    def _batch(
        self,
        inputs: dict[str, Any],
        examples: list[tuple[str, Tensor]],
        found: list[Tensor],
        fill: float,
    ) -> Tensor:
        """The examples' rows as [B, S, ...] or [B, ...], ``fill`` at tokens that are padding."""
        if self.info.task == SEQUENCE.name:
            return torch.cat(found)
        shape = (*inputs["input_ids"].shape, found[0].shape[-1])
        batch = torch.full(shape, fill, dtype=found[0].dtype)
        for at, (_, tokens) in enumerate(examples):
            batch[at, tokens] = found[at]
        return batch

    def _found(self, examples: list[tuple[str, Tensor]]) -> list[dict[str, Tensor]]:
        """What the cache holds of each example."""
        return [self._example(at, key) for at, (key, _) in enumerate(examples)]

    def _example(self, at: int, key: str) -> dict[str, Tensor]:
        if key not in self._places:
            raise ValueError(
                f"{self._where} does not hold example {at} of this batch; it "
                "has to be made from the same text, sequence_length and seed"
            )
        shard_index, first, last = self._places[key]
        shard = self._shards[shard_index]
        return {name: shard.get_slice(name)[first:last] for name in shard.keys()}  # noqa: SIM118

    def _entries(self, rows: dict[str, Tensor], vocab: int | None) -> tuple[Tensor, Tensor]:
        """Ids and log-probabilities [R, K] of one example."""
        ids, full = rows["ids"].long(), self.info.vocab
        least = _EMPTY["ids"]
        if ids.numel() and not least <= int(ids.min()) <= int(ids.max()) < full:
            raise ValueError(
                f"{self._where} is damaged: its ids are not all in {least}..{full - 1}"
            )
        inside = ids < (full if vocab is None else vocab)
        if self.info.samples is not None:
            counts = rows["counts"].double().masked_fill(~inside, 0.0)
            log_probs = (counts / counts.sum(-1, keepdim=True).clamp(min=1)).log()
        else:
            log_probs = self._top(rows, inside, full if vocab is None else vocab)
        return ids.masked_fill(~inside, -1), log_probs

    def _top(self, rows: dict[str, Tensor], inside: Tensor, vocab: int) -> Tensor:
        """Log-probabilities [R, k] of a top k, -inf where they are not ``inside`` [R, k]."""
        log_probs, rest = rows["log_probs"].double(), rows["tail"].double()
        if vocab < self.info.vocab:
            known = rows["ids"] >= 0
            log_probs = log_probs.masked_fill(~inside, -math.inf)
            others = self.info.vocab - known.sum(-1)
            rest = rest * (vocab - (known & inside).sum(-1)) / others
            total = log_probs.exp().sum(-1) + rest
            rest = torch.where(total > 0, rest / total, 1.0)
        return _with_rest(log_probs, rest)


def _with_rest(log_probs: Tensor, rest: Tensor) -> Tensor:
    """The log-probabilities [R, K], shifted so that their mass is 1 minus ``rest`` [R]."""
    mass = torch.log1p(-rest.clamp(_LEAST_REST, 1.0)) - log_probs.logsumexp(-1)
    return torch.where(log_probs == -math.inf, log_probs, log_probs + mass.unsqueeze(-1))


def forward_kl_bound(
    log_probs: Tensor, ids: Tensor, tail: Tensor, student_log_probs: Tensor
) -> Tensor:
    """The most by which a row's forward KL from a top-k cache can differ from the teacher's, [R].

    With ``cache_tail`` "uniform" or "bucket".

    Args:
        log_probs: [R, k], the kept ones. ids: integers [R, k]. tail: [R], the mass of the others.
        student_log_probs: [R, V], at the same T.
    """
    others = student_log_probs.shape[-1] - ids.shape[-1]
    kept = torch.zeros_like(student_log_probs, dtype=torch.bool).scatter_(-1, ids.long(), True)
    low = student_log_probs.masked_fill(kept, math.inf).amin(-1)
    high = student_log_probs.masked_fill(kept, -math.inf).amax(-1)
    mass = tail.clamp_min(torch.finfo(tail.dtype).tiny)
    entropy = (math.log(others) + log_probs.amin(-1) - mass.log()).clamp_min(0)
    return mass * (entropy + high - low)


def fingerprint_of(source: str) -> str:
    """The fingerprint of a teacher by its name: its files' where it is local, else the name."""
    path = Path(source).expanduser()
    return file_fingerprint(path) if path.exists() else f"name:{source}"
