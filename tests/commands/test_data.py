"""Corpora: every kind of source, packing, splitting, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tiny_models
import torch
from tokenizers.processors import TemplateProcessing

from kdkernels.commands.data import (
    ClassName,
    Labels,
    TokenBlocks,
    check_source,
    examples,
    read_documents,
    read_rows,
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


def rows(path: Path, content: str, **options: bool) -> list[tuple]:
    path.write_text(content, encoding="utf-8", newline="")
    return list(read_rows("train_text", str(path), ("text", "label"), "train", **options))


@pytest.mark.parametrize(("suffix", "separator"), [(".csv", ","), (".tsv", "\t")])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_a_cell_is_the_text_that_it_says(
    suffix: str, separator: str, end: str, mark: str, tmp_path: Path
) -> None:
    cells = ["NA", "None", "null", "nan", "N/A", "#N/A", "NULL", "", "007", "1.50", "1e5", "True"]
    cells += [
        "2020-01-01",
        " padded ",
        '"a ""quoted"" word"',
        '"two\nlines"',
        "\x1c",
        "w" * 200_000,
    ]
    content = [f"text{separator}label", *(f"{cell}{separator}NA" for cell in cells)]
    found = rows(tmp_path / f"t{suffix}", mark + end.join([*content, "", ""]))
    want = [c for c in cells if c.strip()]  # an empty one is skipped
    want[want.index('"a ""quoted"" word"')] = 'a "quoted" word'
    want[want.index('"two\nlines"')] = "two\nlines"
    assert found == [(cell, "NA") for cell in want]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("text,label\nw1,0\nw2,0,1\n", "line 3: 3 cells, in the first line 2"),
        ("text,label\nw1\n", "line 2: 1 cells, in the first line 2"),
        ('text,label\n"w1,0\nw2,1\n', "line 3: unexpected end of data"),
        ('text,label\n"w1" w2,0\n', "line 2: .* a quote within quotes is written twice"),
        ("", "text_column: 'text' is not a column"),
        ("text\nw1\n", "label_column: 'label' is not a column of .*; it has text"),
    ],
)
def test_tables_that_are_none_are_named(content: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        rows(tmp_path / "t.csv", content)


def test_what_is_no_utf8_is_named(tmp_path: Path) -> None:
    for name, encoding in (("a.csv", "latin1"), ("b.csv", "utf-16"), ("c.txt", "utf-16")):
        (tmp_path / name).write_bytes("text,label\ncafé,0\n".encode(encoding))
        with pytest.raises(ValueError, match=f"{name}' is not UTF-8 text"):
            documents(tmp_path / name)


def test_json_strings_stay_as_they_are(tmp_path: Path) -> None:
    texts = ["NA", "None", "null", "nan", "007", "a\u2028b", "1.50"]
    lines = (json.dumps({"text": t, "label": t}, ensure_ascii=False) for t in texts)
    assert rows(tmp_path / "t.jsonl", "\n".join(lines)) == [(t, t) for t in texts]


def test_a_line_ends_where_it_ends(tmp_path: Path) -> None:
    odd = "a\x0bb\x0cc\x1cd\x1de\x1ef\x85g\u2028h\u2029i"
    (tmp_path / "t.txt").write_text(f"\ufeff{odd}\r\nw1\rw2\n", encoding="utf-8", newline="")
    found = read_rows("train_text", str(tmp_path / "t.txt"), ("text",), "train", lines=True)
    assert [text for (text,) in found] == [odd, "w1", "w2"]


def test_labels_that_nobody_needs_may_be_missing(tmp_path: Path) -> None:
    found = rows(tmp_path / "t.csv", "text\nw1\nw2\n", labels_needed=False)
    assert found == [("w1",), ("w2",)]
    ids = {"a": 0, "b": 1}
    options = {"tokenizer": tiny_models.tokenizer(), "sequence_length": 8, "labels_needed": False}
    assert "labels" not in examples("train_text", found, label_ids=ids, **options)[0]
    unknown = [("w1", ""), ("w2", None)]
    assert "labels" not in examples("train_text", unknown, label_ids=ids, **options)[1]
    with pytest.raises(ValueError, match="label_column: 1 of 2 rows of train_text have a label"):
        examples("train_text", [("w1", "a"), ("w2", "")], label_ids=ids, **options)


NAMED = {"negative": 0, "Positive": 1, "none": 2}
STARS = {str(stars): stars - 1 for stars in range(1, 6)}
NUMBERED = {"LABEL_0": 0, "LABEL_1": 1}


@pytest.mark.parametrize(
    ("ids", "label", "want"),
    [
        (NAMED, "negative", 0),
        (NAMED, " POSITIVE\n", 1),
        (NAMED, "none", 2),
        (NAMED, 1, 1),
        (NAMED, 1.0, 1),
        (NAMED, "1", 1),  # of a CSV file
        (NAMED, ClassName(0, "Positive"), 1),
        (NAMED, None, None),
        (NAMED, True, None),
        (NAMED, 3, None),
        (NAMED, 0.5, None),
        (NAMED, ClassName(0, "neg"), None),
        (STARS, "1", 0),
        (STARS, 5, 4),
        (STARS, 2.0, 1),
        (STARS, ClassName(0, "3"), 2),
        (STARS, 0, None),
        (STARS, "0", None),
        (NUMBERED, 1, 1),
        (NUMBERED, "1", 1),
        (NUMBERED, "label_1", 1),
        (NUMBERED, ClassName(1, "positive"), 1),
        (NUMBERED, "positive", None),
        ({"0": 0, "1": 1}, ClassName(1, "positive"), 1),
        ({"false": 0, "true": 1}, True, 1),
        ({"a": 0, "A": 1}, "A", 1),
        ({"a": 0, "A": 1}, " A", None),
    ],
)
def test_labels_are_read_by_name(ids: dict[str, int], label: object, want: int | None) -> None:
    if want is not None:
        assert Labels("train_text", ids)(label) == want
        return
    with pytest.raises(ValueError, match=r"train_text: label .* is not one of the teacher's"):
        Labels("train_text", ids)(label)


def test_a_column_that_knows_names_gives_them(tmp_path: Path) -> None:
    names = datasets.ClassLabel(names=["entailment", "neutral"])
    features = datasets.Features({"text": datasets.Value("string"), "label": names})
    table = datasets.Dataset.from_dict(
        {"text": ["w1", "w2", "w3"], "label": [1, 0, -1]}, features=features
    )
    table.save_to_disk(tmp_path / "d")
    found = list(read_rows("train_text", str(tmp_path / "d"), ("text", "label"), "train"))
    assert found == [
        ("w1", ClassName(1, "neutral")),
        ("w2", ClassName(0, "entailment")),
        ("w3", None),  # data sets keep labels of a test to themselves
    ]


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


def beginning(end: bool = False) -> tiny_models.PreTrainedTokenizerFast:
    """A tokenizer that puts <bos> (17) before each text, and perhaps <eos> (1) behind it."""
    tokenizer = tiny_models.tokenizer()
    tokenizer.add_special_tokens({"bos_token": "<bos>"})
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<bos> $A <eos>" if end else "<bos> $A",
        special_tokens=[("<bos>", 17), ("<eos>", 1)],
    )
    return tokenizer


@pytest.mark.parametrize("end", [False, True])
def test_blocks_begin_as_the_tokenizer_begins_a_text(end: bool) -> None:
    texts = ["w0 w1 w2 w3 w4", "w5", "w6 w7 w8"]
    blocks = token_blocks("train_text", texts, beginning(end), 4).blocks.tolist()
    assert blocks == [[17, 2, 3, 4], [17, 5, 6, 1], [17, 7, 1, 17], [17, 8, 9, 10]]
    limited = token_blocks("train_text", texts, beginning(end), 4, max_tokens=9)
    assert limited.blocks.tolist() == blocks[:2]


def test_a_long_document_begins_in_every_block() -> None:
    blocks = token_blocks("train_text", ["w1 " * 1000], beginning(), 16).blocks
    assert (blocks[:, 0] == 17).all() and not (blocks[:, 1:] == 17).any()
    assert len(blocks) == 1001 // 15


def test_a_beginning_that_the_tokenizer_does_not_put_is_not_put() -> None:
    tokenizer = tiny_models.tokenizer()
    tokenizer.add_special_tokens({"bos_token": "<bos>"})
    want = token_blocks("train_text", ["w0 w1 w2", "w3 w4"], tiny_models.tokenizer(), 3).blocks
    found = token_blocks("train_text", ["w0 w1 w2", "w3 w4"], tokenizer, 3).blocks
    assert torch.equal(found, want)


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
