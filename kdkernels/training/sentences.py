"""How a sentence encoder's folder makes one vector of a text: the files of sentence-transformers.

``modules.json`` lists what the tokens' vectors go through. Pooling and normalisation are honoured,
and written with a student; anything else (a dense layer) is refused, unless ``--pooling`` says to
leave it out.
"""

from __future__ import annotations

import json
import logging
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from transformers import PreTrainedModel
from transformers.utils import cached_file

from ..losses.relations import POOLINGS, same_pooling
from .folders import write_json
from .layer_configs import text_config
from .models import ModelSource

logger = logging.getLogger(__name__)

#: sentence-transformers' settings of one pooling, before they were one name.
_FLAGS = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}
#: Files beside the modules' that say how texts are cut and what is put before them.
_TEXT_FILES = ("sentence_bert_config.json", "config_sentence_transformers.json")


class Options(Protocol):
    """Those of ``TermArguments`` that say how an example becomes one vector; None: not given."""

    pooling: str | None
    normalize: bool | None


@dataclass(frozen=True)
class Sentences:
    """What a folder says of its vectors: a pooling, or the reason why it is none of ours."""

    pooling: str | None
    normalize: bool
    problem: str | None = None

    @classmethod
    def of(cls, args: Options) -> Sentences:
        """What the options say."""
        return cls(args.pooling or "mean", bool(args.normalize))


def read(source: ModelSource) -> Sentences | None:
    """What the folder or hub name says; None if it is no folder of sentence-transformers.

    Raises:
        ValueError: its files cannot be read.
    """
    modules = _json(source, "modules.json")
    if modules is None:
        return None
    try:
        kinds = [str(module["type"]).rpartition(".")[2] for module in modules]
        paths = {kind: str(module["path"]) for kind, module in zip(kinds, modules, strict=True)}
    except (TypeError, KeyError) as error:
        raise ValueError(
            f"{source.option}: modules.json of {source.name!r} lists no modules"
        ) from error
    others = [kind for kind in kinds[1:] if kind not in ("Pooling", "Normalize", "Dropout")]
    normalize = "Normalize" in kinds
    if others:
        return Sentences(None, normalize, f"its vectors go through a {others[0]} module")
    if "Pooling" not in paths:
        return Sentences(None, normalize, "its modules.json has no Pooling")
    config = _json(source, f"{paths['Pooling']}/config.json") or {}
    modes = _modes(config)
    if len(modes) == 1 and modes[0] in POOLINGS:
        return Sentences(modes[0], normalize)
    return Sentences(None, normalize, f"its pooling is {' beside '.join(map(str, modes))}")


def _modes(config: dict[str, Any]) -> list[Any]:
    named = config.get("pooling_mode")
    if named is not None:
        return list(named) if isinstance(named, list) else [named]
    return [mode for flag, mode in _FLAGS.items() if config.get(flag)] or ["mean"]


def _json(source: ModelSource, name: str) -> Any:
    """A file's content, None if there is no such file."""
    path = _file(source, name)
    if path is None:
        return None
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{source.option}: cannot read {name} of {source.name!r} ({error})"
        ) from error


def _file(source: ModelSource, name: str) -> Path | None:
    if source.path.exists():
        found = source.path / name
        return found if found.is_file() else None
    missing = dict.fromkeys(("gated_repo", "missing_entries", "connection_errors"), False)
    path = cached_file(
        source.name, name, **{f"_raise_exceptions_for_{what}": no for what, no in missing.items()}
    )
    return None if path is None else Path(path)


def settle(teacher: ModelSource, student: ModelSource | None, args: Options) -> None:
    """Fill ``pooling`` and ``normalize`` of ``args`` from the teacher's folder, where not given.

    Raises:
        ValueError: the folder's vectors are made in a way that cannot be honoured, and no pooling
            was given.
    """
    said = read(teacher)
    if said is not None and said.pooling is None and args.pooling is None:
        raise ValueError(
            f"pooling: the folder of teacher {teacher.name!r} cannot be followed: {said.problem}; "
            f"give one of {', '.join(POOLINGS)} to learn the vectors that it gives"
        )
    if args.pooling is None:
        args.pooling = "mean" if said is None else said.pooling
    if args.normalize is None:
        args.normalize = said is not None and said.normalize
    assert args.pooling is not None
    others = [] if student is None else [(student, read(student))]
    for source, found in [(teacher, said), *others]:
        if found is None or same_pooling(found.pooling, args.pooling):
            continue
        own = f"says {found.pooling}" if found.pooling else f"says otherwise ({found.problem})"
        logger.warning(
            "pooling: both models are pooled by %s; the folder of %s %r %s",
            args.pooling,
            source.option,
            source.name,
            own,
        )


def settle_from_model(teacher: PreTrainedModel, args: Options) -> None:
    """:func:`settle`, for a model that was loaded from a folder, if something is not given."""
    folder = teacher.name_or_path
    if folder and Path(folder).is_dir() and None in (args.pooling, args.normalize):
        settle(ModelSource("teacher", folder), None, args)


def write(folder: Path, made: Sentences, student: PreTrainedModel, teacher: ModelSource) -> None:
    """Beside the saved ``student``, what makes sentence-transformers give these vectors of it.

    The maximal length and the prompts of the teacher's folder are taken over, if it has some.
    """
    kinds = ["Transformer", "Pooling", *(["Normalize"] if made.normalize else [])]
    paths = ["", *(f"{at}_{kind}" for at, kind in enumerate(kinds) if at)]
    modules = [
        {"idx": at, "name": str(at), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for at, (kind, path) in enumerate(zip(kinds, paths, strict=True))
    ]
    for path in paths[1:]:
        (folder / path).mkdir(parents=True, exist_ok=True)
    config = {"word_embedding_dimension": text_config(student.config).hidden_size}
    config |= {flag: same_pooling(mode, made.pooling) for flag, mode in _FLAGS.items()}
    write_json(folder / paths[1] / "config.json", config)
    write_json(folder / "modules.json", modules)
    for name in _TEXT_FILES:
        found = _file(teacher, name)
        if found is not None:
            shutil.copyfile(found, folder / name)
