"""Text in, blocks of tokens out: the corpora of ``kdkernels distill``.

A source is a text file (.txt, .md), a table with a text column (.jsonl, .json, .csv, .tsv,
.parquet), a folder of such files, a folder written by ``datasets.save_to_disk``, or the name of a
dataset.
For language models documents are tokenised, joined with the end-of-text token and cut into blocks
of equal length ("packing"): no padding, every token but the first of each block is predicted. Where
the tokenizer puts a beginning-of-text token before a text, every document and block begins with it.
Attention crosses the borders of documents inside a block. Masked models get the same blocks with
15 % of the tokens to predict, chosen once for each block.

For classifiers and encoders a row of a table, or a line of a text file, is one example, cut to
``sequence_length`` and padded within its batch.

Bad input raises ValueError in one line that names the option, its value and what is allowed.
"""

from __future__ import annotations

import csv
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ..training.batches import batches
from ..training.tasks import numbered, same_label

#: Suffix of a file -> how it is read ("text": the whole file is one document).
READERS = {
    ".txt": "text",
    ".md": "text",
    ".jsonl": "json",
    ".json": "json",
    ".csv": "csv",
    ".tsv": "csv",
    ".parquet": "parquet",
}

#: Documents given to the tokenizer at once.
_TOKENIZER_BATCH = 1000


class TokenBlocks(torch.utils.data.Dataset):
    """Blocks int64 [N, S]; item i is ``{"input_ids": [S], "labels": [S]}`` (labels not shifted)."""

    def __init__(self, blocks: Tensor) -> None:
        self.blocks = blocks

    def __len__(self) -> int:
        return len(self.blocks)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        block = self.blocks[index]
        return {"input_ids": block, "labels": block}

    @property
    def sequence_length(self) -> int:
        return int(self.blocks.shape[1])

    @property
    def tokens(self) -> int:
        """All tokens, the first of each block included."""
        return self.blocks.numel()

    def evenly(self, max_tokens: int | None) -> TokenBlocks:
        """At most ``max_tokens`` tokens as whole blocks spread evenly over the text; None: all."""
        keep = len(self) if max_tokens is None else max(1, max_tokens // self.sequence_length)
        if keep >= len(self):
            return self
        return TokenBlocks(self.blocks[((torch.arange(keep) + 0.5) * len(self) / keep).long()])


class MaskedBlocks(TokenBlocks):
    """Blocks for a masked language model: item i is ``{"input_ids", "labels"}`` of block i.

    15 % of the tokens that are no special tokens are to be predicted: 80 % of them become the mask
    token, 10 % a random one, 10 % stay (BERT, Devlin et al. 2019, arXiv:1810.04805). The choice is
    made once, from ``seed`` and the block's tokens: two runs, and every epoch, see the same.
    """

    SHARE = 0.15

    def __init__(self, blocks: Tensor, tokenizer: PreTrainedTokenizerBase, seed: int = 0) -> None:
        super().__init__(blocks)
        self.tokenizer, self.seed = tokenizer, seed
        generator = torch.Generator().manual_seed(seed)
        chance = torch.rand(blocks.shape, generator=generator)
        special = torch.tensor(tokenizer.all_special_ids, dtype=blocks.dtype)
        chosen = (chance < self.SHARE) & ~torch.isin(blocks, special)
        self.labels = blocks.masked_fill(~chosen, -100)
        part = chance / self.SHARE  # uniform within the chosen ones
        random = torch.randint(len(tokenizer), blocks.shape, generator=generator)
        self.inputs = blocks.masked_fill(chosen & (part < 0.8), int(tokenizer.mask_token_id))
        replaced = chosen & (part >= 0.8) & (part < 0.9)
        self.inputs = torch.where(replaced, random, self.inputs)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": self.inputs[index], "labels": self.labels[index]}


class Examples(torch.utils.data.Dataset):
    """Tokenised examples, each of its length; item i holds ``input_ids`` and perhaps ``labels``."""

    def __init__(self, rows: list[dict[str, Any]]) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.rows[index]

    @property
    def sequence_length(self) -> int:
        """The longest example."""
        return max(len(row["input_ids"]) for row in self.rows)

    @property
    def tokens(self) -> int:
        return sum(len(row["input_ids"]) for row in self.rows)

    def evenly(self, max_tokens: int | None) -> Examples:
        """Examples spread evenly over the text, of about ``max_tokens`` tokens; None: all."""
        if max_tokens is None or max_tokens >= self.tokens:
            return self
        keep = max(1, round(len(self) * max_tokens / self.tokens))
        return Examples([self.rows[int((i + 0.5) * len(self) / keep)] for i in range(keep)])


@dataclass(frozen=True)
class Corpus:
    """The two parts of the text; no block and no example is in both."""

    train: TokenBlocks | Examples
    validation: TokenBlocks | Examples


def check_source(option: str, source: str) -> None:
    """Refuse a source that can be seen to be missing, before anything is loaded."""
    path = Path(source).expanduser()
    if path.exists():
        if path.is_file():
            _reader(option, path)
        return
    looks_like_a_path = path.suffix.lower() in READERS or source.startswith((".", "/", "~"))
    if looks_like_a_path or source.count("/") > 1:
        raise ValueError(f"{option}: {source!r} does not exist")


def _reader(option: str, path: Path) -> str:
    if path.suffix.lower() not in READERS:
        raise ValueError(f"{option}: {str(path)!r} is not one of {', '.join(READERS)}")
    return READERS[path.suffix.lower()]


def read_documents(option: str, source: str, text_column: str, split: str) -> Iterator[str]:
    """The documents of ``source`` in order; a text file is one document, empty ones are skipped."""
    return (text for (text,) in read_rows(option, source, (text_column,), split))


class ClassName(NamedTuple):
    """A label of a column that knows the names of its numbers (``datasets.ClassLabel``)."""

    number: int
    name: str


def read_rows(
    option: str,
    source: str,
    columns: tuple[str, ...],
    split: str,
    lines: bool = False,
    labels_needed: bool = True,
) -> Iterator[tuple[Any, ...]]:
    """These columns of each row of ``source`` in order; rows whose first one is empty are skipped.

    A text file has one column and one row, or, with ``lines``, a row for each line. Unless
    ``labels_needed``, a second column that a table lacks is left out of its rows.
    """
    read = _Read(option, columns, lines, labels_needed)
    check_source(option, source)
    path = Path(source).expanduser()
    rows: Iterable[tuple[Any, ...]]
    if path.is_file():
        rows = read.file(path)
    elif path.is_dir() and not (_is_saved_dataset(path)):
        files = sorted(p for p in path.rglob("*") if p.suffix.lower() in READERS and p.is_file())
        if not files:
            raise ValueError(f"{option}: no {', '.join(READERS)} file in folder {source!r}")
        rows = (row for file in files for row in read.file(file))
    else:
        rows = read.table(source, _load_dataset(option, source, split))
    for row in rows:
        if row[0] is not None and not isinstance(row[0], str):
            raise ValueError(
                f"text_column: {columns[0]!r} of {option} holds {row[0]!r} "
                f"({type(row[0]).__name__}), not text"
            )
        if row[0] and not row[0].isspace():
            yield row


def _is_saved_dataset(path: Path) -> bool:
    return (path / "state.json").exists() or (path / "dataset_dict.json").exists()


@dataclass(frozen=True)
class _Read:
    """What is wanted of every file and table of one source."""

    option: str
    columns: tuple[str, ...]  #: of the text, and perhaps of the label
    lines: bool
    labels_needed: bool

    def file(self, path: Path) -> Iterable[tuple[Any, ...]]:
        reader = _reader(self.option, path)
        if reader == "text":
            return self._text(path)
        if reader == "csv":
            return self._cells(path)
        import datasets

        try:
            table = datasets.load_dataset(reader, data_files=str(path), split="train")
        except Exception as error:  # a parser's own, whatever its type: the file is not readable
            raise ValueError(
                f"{self.option}: cannot read {str(path)!r} as {reader} ({error})"
            ) from error
        return self.table(str(path), table)

    def _text(self, path: Path) -> Iterable[tuple[str]]:
        if len(self.columns) > 1 and self.labels_needed:
            raise ValueError(
                f"{self.option}: {str(path)!r} is text and has no column {self.columns[1]!r}"
            )
        try:
            text = path.read_text(encoding="utf-8-sig")
        except UnicodeDecodeError as error:
            raise self._not_utf8(path, error) from error
        # Not splitlines: a form feed or U+2028 inside of a sentence ends no line.
        return [(line.strip(),) for line in text.split("\n")] if self.lines else [(text,)]

    def _cells(self, path: Path) -> Iterator[tuple[str, ...]]:
        """The rows of a CSV or TSV file; every cell is text, "NA", "007" and "1.50" as well."""
        # Of the process, and 128 KiB: less than many a document. C's long bounds it.
        csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
        separator = "\t" if path.suffix.lower() == ".tsv" else ","
        try:
            with path.open(encoding="utf-8-sig", newline="") as file:
                # Strict: a quote that is never closed would swallow the rows behind it.
                rows = csv.reader(file, delimiter=separator, strict=True)
                header = next(rows, [])
                places = [header.index(name) for name in self._present(str(path), header)]
                for row in rows:
                    if row and len(row) != len(header):
                        reason = f"{len(row)} cells, in the first line {len(header)}"
                        raise self._no_table(path, rows.line_num, reason)
                    if row:
                        yield tuple(row[place] for place in places)
        except UnicodeDecodeError as error:
            raise self._not_utf8(path, error) from error
        except csv.Error as error:
            reason = f"{error}; a quote within quotes is written twice"
            raise self._no_table(path, rows.line_num, reason) from error

    def table(self, source: str, table: Any) -> Iterable[tuple[Any, ...]]:
        present = self._present(source, table.column_names)
        names = getattr(table.features[present[-1]], "names", None) if present[1:] else None
        rows = (tuple(row[column] for column in present) for row in table)
        return rows if names is None else ((text, _named(i, names)) for text, i in rows)

    def _present(self, source: str, there: list[str]) -> tuple[str, ...]:
        """The columns that are read; ValueError if one is missing that is needed."""
        for name, column in zip(("text_column", "label_column"), self.columns, strict=False):
            if column not in there:
                if name == "label_column" and not self.labels_needed:
                    return self.columns[:1]
                raise ValueError(
                    f"{name}: {column!r} is not a column of {self.option} {source!r}; "
                    f"it has {', '.join(there)}"
                )
        return self.columns

    def _no_table(self, path: Path, line: int, reason: str) -> ValueError:
        return ValueError(f"{self.option}: cannot read {str(path)!r} as csv, line {line}: {reason}")

    def _not_utf8(self, path: Path, error: UnicodeDecodeError) -> ValueError:
        return ValueError(f"{self.option}: {str(path)!r} is not UTF-8 text ({error})")


def _named(number: int | None, names: list[str]) -> ClassName | None:
    """A row's label by its name; data sets write -1 where they keep it to themselves."""
    return None if number is None or number < 0 else ClassName(number, names[number])


def _load_dataset(option: str, source: str, split: str) -> Any:
    import datasets

    try:
        if not Path(source).expanduser().is_dir():
            return datasets.load_dataset(source, split=split)
        loaded = datasets.load_from_disk(str(Path(source).expanduser()))
    except Exception as error:  # hub, network and format errors share no base class
        raise ValueError(f"{option}: cannot load dataset {source!r} ({error})") from error
    if not isinstance(loaded, datasets.DatasetDict):
        return loaded
    if split not in loaded:
        raise ValueError(f"{option}: {source!r} has no split {split!r}, only {', '.join(loaded)}")
    return loaded[split]


def examples(
    option: str,
    rows: Iterable[tuple[Any, ...]],
    tokenizer: PreTrainedTokenizerBase,
    sequence_length: int,
    label_ids: dict[str, int] | None = None,
    max_tokens: int | None = None,
    labels_needed: bool = True,
) -> Examples:
    """Tokenise rows ``(text,)`` or ``(text, label)``, at most ``max_tokens`` tokens of them.

    Args:
        label_ids: the classifier's names of labels; a label is such a name or the id itself.
        labels_needed: False: all rows or none have a label.

    Raises:
        ValueError: no row at all, or a label that the classifier does not have.
    """
    ids_of = None if label_ids is None else Labels(option, label_ids)
    found: list[dict[str, Any]] = []
    total = 0
    for batch in batches(rows, _TOKENIZER_BATCH):
        texts = [row[0] for row in batch]
        encoded = tokenizer(texts, truncation=True, max_length=sequence_length, verbose=False)
        for ids, row in zip(encoded["input_ids"], batch, strict=True):
            label = row[1] if len(row) > 1 else None
            labels = {}
            if ids_of is not None and (labels_needed or label not in (None, "")):
                labels = {"labels": ids_of(label)}
            total += len(ids)
            if max_tokens is not None and total > max_tokens:
                return _some_examples(option, found)
            found.append({"input_ids": ids} | labels)
    return _some_examples(option, found)


def _some_examples(option: str, found: list[dict[str, Any]]) -> Examples:
    if not found:
        raise ValueError(f"{option}: not enough text, there is no example")
    labelled = sum("labels" in row for row in found)
    if 0 < labelled < len(found):
        raise ValueError(f"label_column: {labelled} of {len(found)} rows of {option} have a label")
    return Examples(found)


class Labels:
    """The ids of a classifier's labels: by name where there are names, else by the id itself.

    A number is a name where names are numerals, stars from 1 to 5 for example, whose ids start at
    0. Upper case and space around a name do not count.
    """

    def __init__(self, option: str, ids: dict[str, int]) -> None:
        self.option, self.ids = option, ids
        self._named = not numbered(sorted(ids, key=ids.__getitem__))
        self._numerals = any(name.strip().isdecimal() for name in ids)
        self._alike: dict[str, list[int]] = {}
        for name, i in ids.items():
            self._alike.setdefault(same_label(name), []).append(i)

    def __call__(self, label: Any) -> int:
        """ValueError if it is no label of the classifier."""
        given = label
        if isinstance(label, ClassName):
            given = label.name if self._named else label.number
        if isinstance(given, float) and given.is_integer():
            given = int(given)
        name = str(given)
        alike = [] if given is None else self._alike.get(same_label(name), [])
        if len(alike) == 1 or name in self.ids:
            return alike[0] if len(alike) == 1 else self.ids[name]
        if isinstance(given, str) and given.strip().isdecimal() and given is label:
            given = int(given)  # of a CSV file
        is_id = isinstance(given, int) and not isinstance(given, bool)
        if is_id and not self._numerals and given in self.ids.values():
            return given
        shown = label.name if isinstance(label, ClassName) else label
        raise ValueError(
            f"{self.option}: label {shown!r} is not one of the teacher's {len(self.ids)}: "
            f"{', '.join(list(self.ids)[:8])}{', ...' if len(self.ids) > 8 else ''}"
        )


def token_blocks(
    option: str,
    documents: Iterable[str],
    tokenizer: PreTrainedTokenizerBase,
    sequence_length: int,
    max_tokens: int | None = None,
) -> TokenBlocks:
    """Pack ``documents`` into blocks of at most ``max_tokens`` tokens in all.

    Everything is held in memory, 8 bytes a token. ValueError if there is not one whole block.
    """
    last = tokenizer.eos_token_id
    last = tokenizer.sep_token_id if last is None else last  # BERT has no other end of a text
    end = [] if last is None else [last]
    begin = _beginning(tokenizer)
    pieces: list[np.ndarray] = []
    total = 0
    for batch in batches(documents, _TOKENIZER_BATCH):
        for ids in tokenizer(batch, add_special_tokens=False, verbose=False)["input_ids"]:
            pieces.append(np.asarray(begin + ids + end, dtype=np.int64))
            total += len(pieces[-1])
        if max_tokens is not None and total >= max_tokens:
            break
    most = None if max_tokens is None else max_tokens // sequence_length
    blocks = _blocks(pieces, sequence_length, begin, most)
    if not len(blocks):
        raise ValueError(
            f"{option}: not enough text, {total} tokens; one block of "
            f"sequence_length = {sequence_length} is needed at least"
        )
    return TokenBlocks(torch.from_numpy(blocks))


def _beginning(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The beginning-of-text token, where the tokenizer itself puts one before a text."""
    first = tokenizer("a", verbose=False)["input_ids"][:1]
    return first if first == [tokenizer.bos_token_id] else []


def _blocks(
    pieces: list[np.ndarray], length: int, begin: list[int], most: int | None
) -> np.ndarray:
    """The documents as blocks [N, length], N at most ``most``; what is left over is dropped.

    Each begins with ``begin``, in the middle of a document as well: a model that was never without
    that token says nothing sensible without it (Gemma's perplexity is off by orders of magnitude).
    """
    stream = np.concatenate([*pieces, np.empty(0, np.int64)])
    room = len(stream) // (length - len(begin))
    blocks = np.empty((room if most is None else min(most, room), length), np.int64)
    count = place = 0
    while count < len(blocks):
        own = [] if list(stream[place : place + len(begin)]) == begin else begin
        taken = length - len(own)
        if place + taken > len(stream):
            break
        blocks[count, : len(own)] = own
        blocks[count, len(own) :] = stream[place : place + taken]
        place, count = place + taken, count + 1
    return blocks[:count]


def split_tail(part: TokenBlocks | Examples, fraction: float) -> Corpus:
    """Hold out the last ``fraction`` of the text: contiguous, at least one item on either side."""
    held_out = max(1, round(len(part) * fraction))
    if held_out >= len(part):
        kind = "example(s)"
        if isinstance(part, TokenBlocks):
            kind = f"block(s) of {part.sequence_length} tokens"
        raise ValueError(
            f"train_text: not enough text, {len(part)} {kind} cannot be split with "
            f"validation_fraction = {fraction}"
        )
    if isinstance(part, Examples):
        return Corpus(Examples(part.rows[:-held_out]), Examples(part.rows[-held_out:]))
    return Corpus(TokenBlocks(part.blocks[:-held_out]), TokenBlocks(part.blocks[-held_out:]))
