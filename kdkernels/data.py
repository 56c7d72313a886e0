"""Text in, blocks of tokens out: the corpora of ``kdkernels distill``.

A source is a text file (.txt, .md), a table with a text column (.jsonl, .json, .csv, .tsv,
.parquet), a folder of such files, a folder written by ``datasets.save_to_disk``, or the name of a
dataset.
Documents are tokenised, joined with the end-of-text token and cut into blocks of equal length
("packing"): no padding, every token but the first of each block is predicted. Attention crosses the
borders of documents inside a block.

Bad input raises ValueError in one line that names the option, its value and what is allowed.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

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


@dataclass(frozen=True)
class Corpus:
    """The two parts of the text; no block is in both."""

    train: TokenBlocks
    validation: TokenBlocks


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
    """The documents of ``source`` in order; empty ones are skipped."""
    check_source(option, source)
    path = Path(source).expanduser()
    if path.is_file():
        documents = _read_file(option, path, text_column)
    elif path.is_dir() and not (_is_saved_dataset(path)):
        files = sorted(p for p in path.rglob("*") if p.suffix.lower() in READERS and p.is_file())
        if not files:
            raise ValueError(f"{option}: no {', '.join(READERS)} file in folder {source!r}")
        documents = (text for file in files for text in _read_file(option, file, text_column))
    else:
        documents = _column(option, source, _load_dataset(option, source, split), text_column)
    return (text for text in documents if text and not text.isspace())


def _is_saved_dataset(path: Path) -> bool:
    return (path / "state.json").exists() or (path / "dataset_dict.json").exists()


def _read_file(option: str, path: Path, text_column: str) -> Iterable[str]:
    reader = _reader(option, path)
    if reader == "text":
        try:
            return [path.read_text(encoding="utf-8")]
        except UnicodeDecodeError as error:
            raise ValueError(f"{option}: {str(path)!r} is not UTF-8 text ({error})") from error
    import datasets

    options = {"sep": "\t"} if path.suffix.lower() == ".tsv" else {}
    try:
        table = datasets.load_dataset(reader, data_files=str(path), split="train", **options)
    except Exception as error:  # a parser's own error, whatever its type: the file is not readable
        raise ValueError(f"{option}: cannot read {str(path)!r} as {reader} ({error})") from error
    return _column(option, str(path), table, text_column)


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


def _column(option: str, source: str, table: Any, text_column: str) -> Iterable[str]:
    if text_column not in table.column_names:
        raise ValueError(
            f"text_column: {text_column!r} is not a column of {option} {source!r}; "
            f"it has {', '.join(table.column_names)}"
        )
    return (row[text_column] for row in table)


def token_blocks(
    option: str,
    documents: Iterable[str],
    tokenizer: PreTrainedTokenizerBase,
    sequence_length: int,
    max_tokens: int | None = None,
) -> TokenBlocks:
    """Pack ``documents`` into blocks; reading stops once ``max_tokens`` tokens are there.

    Everything is held in memory, 8 bytes a token. ValueError if there is not one whole block.
    """
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    pieces: list[np.ndarray] = []
    total = 0
    for batch in _batches(documents, _TOKENIZER_BATCH):
        for ids in tokenizer(batch, add_special_tokens=False, verbose=False)["input_ids"]:
            pieces.append(np.asarray(ids + end, dtype=np.int64))
            total += len(ids) + len(end)
        if max_tokens is not None and total >= max_tokens:
            break
    count = total // sequence_length
    if count == 0:
        raise ValueError(
            f"{option}: not enough text, {total} tokens; one block of "
            f"sequence_length = {sequence_length} is needed at least"
        )
    stream = torch.from_numpy(np.concatenate(pieces)[: count * sequence_length])
    return TokenBlocks(stream.view(count, sequence_length))


def _batches(items: Iterable[str], size: int) -> Iterator[list[str]]:
    batch: list[str] = []
    for item in items:
        batch.append(item)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch


def split_tail(blocks: TokenBlocks, fraction: float) -> Corpus:
    """Hold out the last ``fraction`` of the text: contiguous, at least one block on either side."""
    held_out = max(1, round(len(blocks) * fraction))
    if held_out >= len(blocks):
        raise ValueError(
            f"train_text: not enough text, {len(blocks)} block(s) of {blocks.sequence_length} "
            f"tokens cannot be split with validation_fraction = {fraction}"
        )
    return Corpus(TokenBlocks(blocks.blocks[:-held_out]), TokenBlocks(blocks.blocks[-held_out:]))
