"""Corpora: every kind of source, packing, splitting, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tiny_models
import torch

from kdkernels.commands.data import (
    TokenBlocks,
    check_source,
    examples,
    read_documents,
    split_tail,
    token_blocks,
)

datasets = pytest.importorskip("datasets")

ROWS = ["w1 w2 w3", "w4 w5", "", "w6"]


def documents(source: Path, column: str = "text", split: str = "train") -> list[str]:
    return list(read_documents("train_text", str(source), column, split))


def test_a_text_file_is_one_document(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("w1\n\nw2", encoding="utf-8")
    assert documents(tmp_path / "a.txt") == ["w1\n\nw2"]


@pytest.mark.parametrize("kind", ["jsonl", "csv", "tsv", "parquet"])
def test_tables_have_one_document_a_row(kind: str, tmp_path: Path) -> None:
    table = datasets.Dataset.from_dict({"text": ROWS, "other": [1, 2, 3, 4]})
    path = tmp_path / f"table.{kind}"
    if kind == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in table))
    elif kind == "parquet":
        table.to_parquet(path)
    else:
        table.to_csv(path, sep="\t" if kind == "tsv" else ",")
    assert documents(path) == ["w1 w2 w3", "w4 w5", "w6"]


def test_folders_and_saved_datasets(tmp_path: Path) -> None:
    (tmp_path / "texts").mkdir()
    for name in ("b.txt", "a.txt", "c.bin"):
        (tmp_path / "texts" / name).write_text(name)
    assert documents(tmp_path / "texts") == ["a.txt", "b.txt"]
    table = datasets.Dataset.from_dict({"body": ROWS})
    table.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"dev": table}).save_to_disk(tmp_path / "many")
    assert documents(tmp_path / "one", "body") == documents(tmp_path / "many", "body", "dev")


def test_packing_keeps_every_token_in_order() -> None:
    blocks = token_blocks("train_text", ["w0 w1 w2", "w3 w4"], tiny_models.tokenizer(), 3)
    # Ids of w0.. start at 2; 1 is the end of a document.
    assert blocks.blocks.tolist() == [[2, 3, 4], [1, 5, 6]]
    assert blocks.tokens == 6 and len(blocks) == 2
    assert torch.equal(blocks[1]["labels"], blocks[1]["input_ids"])


def test_reading_stops_at_max_tokens() -> None:
    def endless():
        while True:
            yield "w1 w2 w3"

    assert token_blocks("train_text", endless(), tiny_models.tokenizer(), 4, 102).tokens == 100
    rows = ((text,) for text in endless())
    assert examples("train_text", rows, tiny_models.tokenizer(), 2, None, 101).tokens == 100


def test_the_tail_is_held_out() -> None:
    corpus = split_tail(TokenBlocks(torch.arange(40).view(10, 4)), 0.2)
    assert corpus.train.blocks.flatten().tolist() == list(range(32))
    assert corpus.validation.blocks.flatten().tolist() == list(range(32, 40))


def test_evenly_spread_blocks() -> None:
    blocks = TokenBlocks(torch.arange(40).view(10, 4))
    assert blocks.evenly(8).blocks[:, 0].tolist() == [8, 28]
    assert blocks.evenly(None) is blocks and blocks.evenly(4000) is blocks


def test_what_is_refused(tmp_path: Path) -> None:
    table = tmp_path / "t.jsonl"
    table.write_text('{"body": "w1"}\n')
    broken = tmp_path / "broken.jsonl"
    broken.write_text("{")
    latin = tmp_path / "latin.txt"
    latin.write_bytes(b"caf\xe9")
    (tmp_path / "x.pdf").write_bytes(b"")
    (tmp_path / "empty").mkdir()
    datasets.DatasetDict({"dev": datasets.Dataset.from_dict({"text": ROWS})}).save_to_disk(
        tmp_path / "saved"
    )
    for source, message in [
        (tmp_path / "missing.txt", "missing.txt' does not exist"),
        (table, "text_column: 'text' is not a column of .*; it has body"),
        (broken, "cannot read .* as json"),
        (latin, "is not UTF-8"),
        (tmp_path / "x.pdf", "is not one of .txt"),
        (tmp_path / "empty", "no .txt"),
        (tmp_path / "saved", "has no split 'train', only dev"),
    ]:
        with pytest.raises(ValueError, match=message):
            documents(source)
    with pytest.raises(ValueError, match="train_text: not enough text, 2 tokens"):
        token_blocks("train_text", ["w1"], tiny_models.tokenizer(), 3)
    with pytest.raises(ValueError, match="cannot be split"):
        split_tail(TokenBlocks(torch.zeros(1, 4)), 0.5)
    with pytest.raises(ValueError, match="does not exist"):
        check_source("train_text", "a/b/c")
