"""A teacher behind an OpenAI-compatible server: a top-k cache that asks for what it lacks.

Texts go to ``/v1/completions`` as token ids, and the log-probabilities of the prompt come back, at
temperature 1. Two forms of that are known, and the first text tells which of them a server has:

``prompt_logprobs``
    ``"prompt_logprobs": K``, vLLM's: entries by token id.
``echo``
    ``"echo": true, "logprobs": K, "max_tokens": 1``, OpenAI's: entries by the token's text, which
    the tokenizer has to tell apart (vLLM is asked for ids here, too); what is generated is cut off.

A token of the prompt that comes beside the top K is left out, so that the cache is what
:func:`kdkernels.training.teacher_cache.cache_teacher` would have written of the same model, but for
the mass of the others, which is 1 minus what is known, and the last token of a text, of which a
server does not say what follows: it has no entry, and no label.

The folder grows in its place: ``filling.json`` says what it will be, becomes ``cache.json`` when
nothing is lacking, and whatever is there is not asked for again.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import itertools
import json
import logging
import queue
import threading
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import filelock
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ..entries import MOST_MASS
from .folders import PARTIAL, check_new, write_json
from .logprobs import from_openai, from_prompt_logprobs
from .processes import from_first_process
from .server import Rejected, Server, ServerError, check_numbers
from .tasks import CAUSAL_LM
from .teacher_cache import (
    FORMAT,
    META_FILE,
    CacheInfo,
    TeacherCache,
    Writer,
    check_kept,
    key_of,
    tokenizer_fingerprint,
)

logger = logging.getLogger(__name__)

FILLING_FILE = "filling.json"
#: What ``form`` may be.
FORMS = ("auto", "prompt_logprobs", "echo")
#: What vLLM and OpenAI-compatible servers give at most, unless they are told otherwise.
DEFAULT_TOP_K = 20

#: So many texts are tokenized by the server, too.
_COMPARED_TEXTS = 3
#: Seconds after which answers are written that are no whole shard yet.
_FLUSH_SECONDS = 60.0
#: No more names of served models are told.
_MOST_NAMES = 20


class FillError(ServerError):
    """A request has failed for good; what has been answered until then is in the folder."""


class _Lacking(ServerError):
    """An answer without log-probabilities of the prompt."""


class ServedCache(TeacherCache):
    """The cache of a served teacher: ``DistillationTrainer`` fills it before it trains from it.

    Nothing is asked before :meth:`reach`. Of several processes the first one asks, and all of them
    read the folder.

    Args:
        server: of the teacher.
        folder: of the cache: a new one, or what an earlier run has left of the same model,
            tokenizer, text and ``top_k``.
        tokenizer: the student's, which has to be the teacher's.
        vocab: entries in a row of the student's logits; ids beyond are refused.
        top_k: how many log-probabilities of a token are asked for and kept.
        name: of the model; None: the only one that is served.
        form: in which log-probabilities are asked for; "auto": the first one that is answered.
        requests: how many are made at a time.

    Raises:
        ValueError: an option is not allowed.
    """

    def __init__(
        self,
        server: Server,
        folder: str | Path,
        tokenizer: PreTrainedTokenizerBase,
        *,
        vocab: int,
        top_k: int = DEFAULT_TOP_K,
        name: str | None = None,
        form: str = "auto",
        requests: int = 8,
    ) -> None:
        check_kept(top_k, None, vocab)
        check_numbers(server.timeout, server.tries, requests)
        if form not in FORMS:
            raise ValueError(f"teacher_logprobs: {form!r} is not one of {', '.join(FORMS)}")
        self.folder = Path(folder)
        self.info = CacheInfo(
            format=FORMAT,
            task=CAUSAL_LM.name,
            model="",
            tokenizer=tokenizer_fingerprint(tokenizer),
            name=name or "",
            parameters=None,
            vocab=vocab,
            top_k=top_k,
            temperature=1.0,
            examples=0,
            rows=0,
        )
        self._server, self._tokenizer, self._top_k = server, tokenizer, top_k
        self._name, self._form, self._requests = name, form, requests
        self._shards, self._places = [], {}
        self._one_reads = threading.Lock()  #: a tokenizer that two threads use raises an error
        self._goal = self.info  #: what the folder is to become
        self._reached = self._whole = False
        self._wanted: dict[str, Tensor] = {}
        self._first: dict[str, dict[str, Tensor]] = {}  #: answered before there was a folder

    @property
    def outlook(self) -> str:
        """What there is to do, in words."""
        told = f"{self.info.name!r} at {self._server.url} teaches by its top {self._top_k}"
        lacking = "all" if self._whole else f"{len(self._places)} of {self.info.examples}"
        return f"{told}; {lacking} texts are in {str(self.folder)!r}"

    def require(self, items: Iterable[dict[str, Any]]) -> None:
        """Nothing that it lacks is missing before it is whole: it will be asked for."""
        if self._whole:
            super().require(items)

    def reach(self, items: Iterable[dict[str, Any]]) -> None:
        """Ask for the model, and compare it, its tokenizer and the folder with what is wanted.

        The first text is answered here, and kept in memory; nothing is written.

        Raises:
            ValueError: the model is not served, the tokenizer is another one, or the folder holds
                something else.
            ServerError: the server does not answer, or not with log-probabilities of these tokens.
        """
        wanted = unique(items)
        if not wanted:
            raise ValueError("teacher_cache: there are no examples to ask a server for")
        if self._whole or (self._reached and wanted.keys() == self._wanted.keys()):
            return
        self._wanted, self._reached = wanted, False
        self.info, self._form, whole = from_first_process(self._reach)
        self._reached = True
        if whole:
            self._close()

    def fill(self, items: Iterable[dict[str, Any]]) -> None:
        """:meth:`reach`, ask for all that is lacking, and write it as it comes.

        Raises:
            FillError: a request has failed for good; what has been answered until then is kept.
            ServerError, ValueError: as :meth:`reach`; or another run is filling it.
        """
        if self._whole:
            return
        self.reach(items)
        if not self._whole:
            from_first_process(self._fill)
            self._close()

    def _close(self) -> None:
        """From now on it is a cache like any other."""
        self._open(self._tokenizer, self.info.model)
        self._whole = True

    # ---- before anything is written ------------------------------------------------------------

    def _reach(self) -> tuple[CacheInfo, str, bool]:
        """What this is a cache of, the form that the server has, and whether nothing is lacking."""
        model = self._model()
        name, root, most = model["id"], model.get("root"), model.get("max_model_len")
        lengths = [len(ids) for ids in self._wanted.values()]
        self._goal = dataclasses.replace(
            self._goal,
            name=name,
            model=hashlib.sha256(json.dumps(["served", name, root]).encode()).hexdigest(),
            examples=len(lengths),
            rows=sum(lengths),
            text=text_fingerprint(self._wanted),
        )
        if self._look():
            return self._goal, self._form, True
        longest = max(lengths)
        if isinstance(most, int) and longest + 1 > most:
            raise ValueError(
                f"sequence_length: {longest} tokens and the one that a request generates are more "
                f"than the {most} that {name!r} takes at {self._server.url}"
            )
        lacking = self._lacking()
        if lacking:
            self._check_tokenizer(list(lacking.values())[:_COMPARED_TEXTS])
            key, ids = next(iter(lacking.items()))
            self._first = {key: self._settle_form(ids)}
        return self._goal, self._form, False

    def _model(self) -> dict[str, Any]:
        """What the server says of the model that is meant; ValueError if it has not got it."""
        url = self._server.url
        try:
            found = self._server.ask("/models").get("data")
        except Rejected as error:
            hint = "; an address often ends in /v1" if error.status == 404 else ""
            raise ServerError(f"{error}{hint}") from error
        if not isinstance(found, list) or not all(map(_is_model, found)):
            raise ServerError(f"teacher_url: {url}/models: its answer is no list of models")
        models = {model["id"]: model for model in found}
        names = ", ".join(list(models)[:_MOST_NAMES]) or "none"
        names += ", ..." if len(models) > _MOST_NAMES else ""
        if self._name is None and len(models) != 1:
            raise ValueError(f"teacher_name: needed, since {url} serves not one model: {names}")
        name = next(iter(models)) if self._name is None else self._name
        if name not in models:
            raise ValueError(f"teacher_name: {name!r} is not served at {url}; what is: {names}")
        return models[name]

    def _look(self) -> bool:
        """Open what the folder holds; whether that is all. ValueError if it is of another run."""
        self.info = wanted = self._goal
        if (self.folder / META_FILE).exists():
            self._open(self._tokenizer, wanted.model)
            self._check_top_k(self.info, wanted)
            super().require({"input_ids": ids} for ids in self._wanted.values())
            return True
        if (self.folder / FILLING_FILE).exists():
            begun = CacheInfo.read(self.folder / FILLING_FILE, self._where)
            self._compare(begun, "tokenizer", wanted.tokenizer)
            self._compare(begun, "model", wanted.model)
            self._check_top_k(begun, wanted)
            if (begun.text, begun.vocab) != (wanted.text, wanted.vocab):
                raise ValueError(
                    f"{self._where} was begun for another text or vocabulary, {begun.examples} "
                    f"examples and {begun.vocab} entries (this run's: {wanted.examples} and "
                    f"{wanted.vocab}); name another folder"
                )
        else:
            check_new("teacher_cache", self.folder)
        self._open_shards()
        return False

    def _check_top_k(self, there: CacheInfo, wanted: CacheInfo) -> None:
        if there.top_k != wanted.top_k:
            raise ValueError(
                f"{self._where} was made with another cache_top_k: it holds {there.kept}, this run "
                f"wants {wanted.kept}"
            )

    def _lacking(self) -> dict[str, Tensor]:
        return {key: ids for key, ids in self._wanted.items() if key not in self._places}

    def _check_tokenizer(self, texts: list[Tensor]) -> None:
        """ValueError if the server makes other tokens of these texts; not every server tells."""
        for tokens in texts:
            text = self._tokenizer.decode(tokens, skip_special_tokens=True)
            ours = self._tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
            body = {"model": self._goal.name, "prompt": text, "add_special_tokens": False}
            try:
                answer = self._server.ask("/tokenize", body, at_root=True) if ours else {}
            except ServerError as error:
                logger.info(f"teacher_url: tokenizers are compared by answers alone ({error})")
                return
            theirs = answer.get("tokens")
            if isinstance(theirs, list) and theirs and theirs != ours:
                pairs = enumerate(zip(ours, theirs, strict=False))
                at = next((i for i, (a, b) in pairs if a != b), min(len(ours), len(theirs)))
                raise ValueError(
                    f"teacher_url: the server's tokenizer is not the student's: {text[:60]!r}... "
                    f"is {len(theirs)} tokens there and {len(ours)} here, and token {at} of them "
                    f"{_shown(theirs, at)} there and {_shown(ours, at)} here"
                )

    def _settle_form(self, ids: Tensor) -> dict[str, Tensor]:
        """The first answer, in the first form that is answered; ServerError if there is none."""
        reasons = []
        for form in FORMS[1:] if self._form == "auto" else [self._form]:
            try:
                rows = self._ask(ids, form, compare=True)
            except (_Lacking, Rejected) as error:
                if isinstance(error, Rejected) and error.status not in (400, 422, 501):
                    raise
                reasons.append(f"{form}: {str(error).removeprefix('teacher_url: ')}")
            else:
                self._form = form
                return rows
        raise ServerError(
            f"teacher_url: {self._server.url} says no log-probabilities of a prompt "
            f"({'; '.join(reasons)})"
        )

    # ---- asking --------------------------------------------------------------------------------

    def _ask(
        self,
        tokens: Tensor,
        form: str,
        stopped: threading.Event | None = None,
        compare: bool = False,
    ) -> dict[str, Tensor]:
        """What the cache keeps of a text; ``compare``: also what entries are written like."""
        sent, top_k = tokens.tolist(), self._top_k
        body = {"model": self._goal.name, "prompt": sent, "max_tokens": 1, "temperature": 1.0}
        if form == "echo":
            body |= {"echo": True, "logprobs": top_k, "return_tokens_as_token_ids": True}
        else:
            body |= {"prompt_logprobs": top_k}
        answer = self._server.ask("/completions", body, stopped)
        try:
            choice = self._choice(answer)
            if form == "echo":
                ids, log_probs = self._of_echo(choice, len(sent))
            else:
                ids, log_probs = self._of_prompt(choice, len(sent))
            self._check_entries(ids, log_probs, tokens)
            if compare and form != "echo":
                self._compare_strings(choice["prompt_logprobs"])
        except _Lacking as error:
            raise _Lacking(f"teacher_url: {self._server.url}/completions: {error}") from error
        except (ValueError, TypeError, OverflowError, RuntimeError) as error:
            raise ServerError(f"teacher_url: {self._server.url}/completions: {error}") from error
        return self._kept(ids, log_probs)

    def _choice(self, answer: dict[str, Any]) -> dict[str, Any]:
        choices = answer.get("choices")
        if not isinstance(choices, list) or len(choices) != 1 or not isinstance(choices[0], dict):
            told = self._server.told(json.dumps(answer))
            raise ValueError(f"its answer has not one choice: {told!r}")
        return choices[0]

    @staticmethod
    def _of_prompt(choice: dict[str, Any], sent: int) -> tuple[Tensor, Tensor]:
        positions = choice.get("prompt_logprobs")
        if not isinstance(positions, list) or not any(positions[1:] or [sent == 1]):
            raise _Lacking("its answer has no prompt_logprobs")
        if len(positions) != sent:
            raise ValueError(f"prompt_logprobs: {len(positions)} positions of {sent} tokens")
        return from_prompt_logprobs(positions)

    def _of_echo(self, choice: dict[str, Any], sent: int) -> tuple[Tensor, Tensor]:
        given = choice.get("logprobs")
        if not isinstance(given, dict) or not isinstance(given.get("tokens"), list):
            raise _Lacking("its answer has no logprobs")
        columns = {name: given.get(name) for name in ("tokens", "token_logprobs", "top_logprobs")}
        if len(given["tokens"]) < sent:
            raise _Lacking(f"logprobs: {len(given['tokens'])} positions of {sent} tokens")
        prompt = {n: c[:sent] if isinstance(c, list) else c for n, c in columns.items()}
        with self._one_reads:
            return from_openai(prompt, self._tokenizer)

    def _compare_strings(self, positions: list[Any]) -> None:
        """ValueError for an entry whose text, if it is told, is not that of its id here."""
        tables = [entries for entries in positions if isinstance(entries, dict)]
        entries = [(int(k), e) for table in tables for k, e in table.items() if isinstance(e, dict)]
        for token_id, theirs in {(token_id, e.get("decoded_token")) for token_id, e in entries}:
            ours = str(self._tokenizer.decode([token_id]))
            written = str(self._tokenizer.convert_ids_to_tokens(token_id) or "")
            # Part of a character, and what is nothing but space, is told in many ways.
            if not isinstance(theirs, str) or "\ufffd" in theirs + ours or not _plain(theirs):
                continue
            if _plain(theirs) not in (_plain(ours), _plain(written)):
                raise ValueError(
                    f"the server's tokenizer is not the student's: id {token_id} is "
                    f"{theirs[:60]!r} there and {ours!r} here"
                )

    def _check_entries(self, ids: Tensor, log_probs: Tensor, tokens: Tensor) -> None:
        """ValueError unless they speak of these tokens, in the student's vocabulary."""
        vocab, top_k = self._goal.vocab, self._top_k
        if int(ids.max()) >= vocab:
            raise ValueError(
                f"id {int(ids.max())} is outside of the student's vocabulary of {vocab}"
            )
        other = (ids[:-1] != tokens[1:, None]).all(-1)
        if bool(other.any()):
            at = int(other.to(torch.uint8).argmax()) + 1
            raise ValueError(
                f"nothing is said of token {at} of the prompt, id {int(tokens[at])}; the server "
                "has not taken the ids as they were sent, or has another tokenizer"
            )
        if len(tokens) > 1 and ids.shape[-1] < top_k:
            raise ValueError(f"{ids.shape[-1]} entries of a token, cache_top_k is {top_k}")
        mass = log_probs.exp().sum(-1)
        if not float(mass.max()) <= MOST_MASS:
            at = int(mass.argmax())
            raise ValueError(
                f"the probabilities of what follows token {at} add up to {float(mass[at]):.4g}"
            )

    def _kept(self, ids: Tensor, log_probs: Tensor) -> dict[str, Tensor]:
        """The largest entries, as a top-k cache holds them."""
        top_k = self._top_k
        room = (0, max(0, top_k - ids.shape[-1]))
        ids = torch.nn.functional.pad(ids, room, value=-1)
        log_probs = torch.nn.functional.pad(log_probs, room, value=-torch.inf)
        top = log_probs.topk(top_k, dim=-1)
        rest = (1 - top.values.exp().sum(-1)).clamp(min=0)
        return {
            "log_probs": top.values.float(),
            "ids": ids.gather(-1, top.indices).int(),
            "tail": rest.float(),
        }

    # ---- filling -------------------------------------------------------------------------------

    def _fill(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        lock = self.folder / f"{PARTIAL}filling.lock"
        try:
            with filelock.FileLock(lock, timeout=0):
                if not self._look():  # another run may have been here
                    self._write()
                with contextlib.suppress(OSError):  # some systems do not let go of open files
                    lock.unlink()
        except filelock.Timeout as error:
            raise ValueError(f"{self._where} is being filled by another run") from error

    def _write(self) -> None:
        write_json(self.folder / FILLING_FILE, asdict(self._goal))
        shards = [int(file.stem[5:]) for file in self.folder.glob("rows-*.safetensors")]
        writer = Writer(self.folder, max(shards, default=-1) + 1)
        lacking = self._lacking()
        first = {key: rows for key, rows in self._first.items() if key in lacking}
        others = {key: ids for key, ids in lacking.items() if key not in first}
        written, there = time.monotonic(), len(self._places)
        try:
            for key, rows in itertools.chain(first.items(), self._answers(others)):
                writer.add(key, rows)
                if time.monotonic() - written > _FLUSH_SECONDS:
                    writer.flush()
                    written = time.monotonic()
                    total = there + len(writer.keys)
                    logger.info(f"teacher_url: {total} of {self._goal.examples} texts answered")
        except ServerError as error:
            total = there + len(writer.keys)
            raise FillError(
                f"{error}; {total} of {self._goal.examples} texts are in {str(self.folder)!r}, "
                "from where the same command goes on"
            ) from error
        finally:
            writer.flush()
        (self.folder / FILLING_FILE).replace(self.folder / META_FILE)

    def _answers(self, wanted: dict[str, Tensor]) -> Iterator[tuple[str, dict[str, Tensor]]]:
        """What the cache keeps of these texts, as the answers come.

        The threads end with the process, so that an interrupt does not wait for a server.
        """
        jobs, turn, stopped = iter(wanted.items()), threading.Lock(), threading.Event()
        answers: queue.SimpleQueue[tuple[str, Any]] = queue.SimpleQueue()

        def work() -> None:
            while not stopped.is_set():
                with turn:
                    job = next(jobs, None)
                if job is None:
                    return
                key, ids = job
                try:
                    answers.put((key, self._ask(ids, self._form, stopped)))
                except Exception as error:
                    answers.put((key, error))  # before the others tell that they were stopped
                    stopped.set()

        for _ in range(min(self._requests, len(wanted))):
            threading.Thread(target=work, daemon=True).start()
        try:
            for _ in range(len(wanted)):
                key, answer = answers.get()
                if isinstance(answer, Exception):
                    raise answer
                yield key, answer
        finally:
            stopped.set()


def text_fingerprint(keys: Iterable[str]) -> str:
    """SHA-256 of the keys of all examples, in whatever order."""
    return hashlib.sha256(" ".join(sorted(keys)).encode()).hexdigest()


def unique(items: Iterable[dict[str, Any]]) -> dict[str, Tensor]:
    """The token ids of each example by its key, without padding."""
    found = {}
    for item in items:
        ids = torch.as_tensor(item["input_ids"]).cpu().long()
        if item.get("attention_mask") is not None:
            ids = ids[torch.as_tensor(item["attention_mask"]).cpu().bool()]
        found[key_of(ids)] = ids
    return found


def _is_model(given: Any) -> bool:
    return isinstance(given, dict) and isinstance(given.get("id"), str)


def _shown(ids: list[Any], at: int) -> str:
    return str(ids[at])[:20] if at < len(ids) else "none"


def _plain(text: str) -> str:
    """A token's text without what stands for, or is, space around it."""
    return text.replace("Ġ", " ").replace("▁", " ").strip()
