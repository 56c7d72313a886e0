"""Log-probabilities that others have written, as :func:`kdkernels.fused_topk_kd_loss` takes them.

A reader takes what is said of one text of S tokens, and returns ``(teacher_ids,
teacher_log_probs)``: int64 and float64 [S, K] on the CPU. K is the most that is known of one token
(at least 1); slots without an entry have id -1. Row s is what the teacher predicts for token s + 1,
as the row of logits at s is, so the last row is empty; ``shift=True`` of the loss fits labels to
that. Whoever says something of a token itself is moved by one row.

What is wrong is told by its position in what was given, and its value: ValueError, or TypeError
where it is not even of the kind.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ..entries import MOST_MASS

#: What is known of a token: id -> natural log-probability.
_Row = dict[int, float]


def from_prompt_logprobs(positions: Sequence[Any], *, before: int = 0) -> tuple[Tensor, Tensor]:
    """Entries of a served model's own ids: vLLM's ``prompt_logprobs``, SGLang's lists.

    A token that the prompt holds, or that was sampled, comes beside the top k where it is none of
    them; it is an entry like the others.

    Args:
        positions: of each token None (nothing is known, as of the first) or the entries: a dict of
            id (an int, or a string as JSON has it) to a log-probability, to a dict with
            ``"logprob"`` or to an object with that attribute (``prompt_logprobs`` of a response, or
            ``logprobs`` of what vLLM has generated); or a list of ``[logprob, id, ...]``
            (``input_top_logprobs`` in SGLang's ``meta_info``).
        before: how many tokens of the text, of which nothing is known, come before the first of
            ``positions``: the length of the prompt where these are of what was generated after it.
    """
    rows = []
    for at, given in enumerate(positions):
        where = f"prompt_logprobs: position {at}"
        row: _Row = {}
        for key, value in _pairs(where, given):
            _add(where, row, _as_id(where, key), value)
        rows.append(row)
    return _tensors(_of_the_next("prompt_logprobs", rows, before))


def from_openai(
    logprobs: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase, *, before: int = 0
) -> tuple[Tensor, Tensor]:
    """Entries of an OpenAI-style completion: ``choices[0]["logprobs"]`` of its JSON.

    Args:
        logprobs: ``tokens`` and ``token_logprobs`` (of the tokens themselves, None if unknown), and
            ``top_logprobs``, None or of each token None or a dict of string to log-probability.
        tokenizer: the teacher's, which tells a string's id. A string stands for the token that is
            written like it, with "▁" for spaces if there is one, or else that is encoded from it
            and decoded to it; ``token_id:7`` (vLLM's ``return_tokens_as_token_ids``) for id 7.
        before: as in :func:`from_prompt_logprobs`; 0 fits a prompt that is echoed.

    Raises:
        ValueError: also for a string that is no single token (part of a character, say), and for
            two strings of one position that are the same one.
    """
    tokens, own = (_listed(name, logprobs.get(name)) for name in ("tokens", "token_logprobs"))
    top = logprobs.get("top_logprobs") or [None] * len(tokens)
    for name, column in (("token_logprobs", own), ("top_logprobs", top)):
        if len(column) != len(tokens):
            raise ValueError(f"{name}: {len(column)} positions, tokens has {len(tokens)}")
    vocabulary, rows = tokenizer.get_vocab(), []
    for at, (token, log_prob, others) in enumerate(zip(tokens, own, top, strict=True)):
        where, row = f"top_logprobs: position {at}", _Row()
        for string, value in _pairs(where, others):
            _add(where, row, _id_of(where, string, tokenizer, vocabulary), value)
        if log_prob is not None:
            where = f"token_logprobs: position {at}"
            token_id = _id_of(where, token, tokenizer, vocabulary)
            if token_id not in row:
                _add(where, row, token_id, log_prob)
        rows.append(row)
    return _tensors(_of_the_next("top_logprobs", rows, before))


def from_columns(
    ids: Sequence[Any], log_probs: Sequence[Any], *, of_next: bool = True
) -> tuple[Tensor, Tensor]:
    """Entries of a data set's two columns, such as those that TRL and axolotl train from offline.

    Args:
        ids, log_probs: of each token a list of ids and one of their log-probabilities, of any
            number; None for a token of which nothing is known. A slot is empty where its id is None
            or negative, or its log-probability is None or -inf (what is padded with 0 has that).
        of_next: whether row s speaks of token s + 1, as logits do; False: of token s itself, as
            ``prompt_logprobs`` that were stored as they came.
    """
    if len(ids) != len(log_probs):
        raise ValueError(f"log_probs: {len(log_probs)} positions, ids has {len(ids)}")
    rows = []
    for at, (some, theirs) in enumerate(zip(ids, log_probs, strict=True)):
        where = f"position {at}"
        some, theirs = ([] if one is None else _listed(where, one) for one in (some, theirs))
        if len(some) != len(theirs):
            raise ValueError(f"log_probs: {where} has {len(theirs)} entries, ids {len(some)}")
        row: _Row = {}
        for token_id, value in zip(some, theirs, strict=True):
            if token_id is None or value is None or value == -math.inf:
                continue
            if not (isinstance(token_id, numbers.Real) and token_id < 0):
                _add(where, row, _as_id(where, token_id), value)
        rows.append(row)
    return _tensors(rows if of_next else _of_the_next("log_probs", rows, 0))


def _is_list(given: Any) -> bool:
    return isinstance(given, Sequence) and not isinstance(given, (str, bytes))


def _listed(where: str, given: Any) -> Sequence[Any]:
    """A list, or anything with ``tolist`` (a row of an array or a tensor), as a list."""
    listed: Sequence[Any] = given.tolist() if hasattr(given, "tolist") else given
    if not _is_list(listed):
        raise TypeError(f"{where}: expected a list, got {type(given).__name__}")
    return listed


def _pairs(where: str, given: Any) -> list[tuple[Any, Any]]:
    """What a position holds, as (id or string, log-probability)."""
    if given is None:
        return []
    if isinstance(given, Mapping):
        return [(key, _logprob(value)) for key, value in given.items()]
    if not _is_list(given):
        raise TypeError(f"{where}: expected None, a dict or a list, got {type(given).__name__}")
    for one in given:
        if not _is_list(one) or len(one) < 2:
            raise TypeError(f"{where}: expected [logprob, id, ...], got {one!r}")
    return [(one[1], one[0]) for one in given]


def _logprob(value: Any) -> Any:
    """The number itself, however it is wrapped."""
    if isinstance(value, Mapping):
        return value.get("logprob")
    return getattr(value, "logprob", value)


def _as_id(where: str, given: Any) -> int:
    if isinstance(given, str) and given.isdecimal():
        given = int(given)
    if not isinstance(given, numbers.Integral) or isinstance(given, bool) or given < 0:
        raise ValueError(f"{where}: id {given!r} is not an integer >= 0")
    return int(given)


def _id_of(
    where: str, string: Any, tokenizer: PreTrainedTokenizerBase, vocabulary: Mapping[str, int]
) -> int:
    """The id of the one token that this string stands for."""
    if not isinstance(string, str):
        raise TypeError(f"{where}: expected a token's string, got {string!r}")
    for written in (string, string.replace(" ", "▁")):
        if written in vocabulary:
            return vocabulary[written]
    prefix, _, number = string.partition(":")
    if prefix == "token_id" and number.isdecimal():
        return int(number)
    encoded: list[int] = tokenizer.encode(string, add_special_tokens=False)
    if len(encoded) == 1:
        # An unknown string is encoded, too, but to what is decoded to something else.
        decoded = tokenizer.decode(encoded, clean_up_tokenization_spaces=False)
        if decoded == string:
            return encoded[0]
    raise ValueError(f"{where}: {string!r} is no single token of the tokenizer")


def _add(where: str, row: _Row, token_id: int, log_prob: Any) -> None:
    if not isinstance(log_prob, numbers.Real) or isinstance(log_prob, bool):
        raise TypeError(f"{where}: id {token_id}: expected a number, got {log_prob!r}")
    value = float(log_prob)
    if not value <= math.log(MOST_MASS):  # NaN is not, either
        raise ValueError(
            f"{where}: id {token_id}: {value!r} is not the natural logarithm of a probability"
        )
    if token_id in row:
        raise ValueError(f"{where}: id {token_id} comes twice")
    row[token_id] = value


def _of_the_next(name: str, rows: list[_Row], before: int) -> list[_Row]:
    """Rows that speak of their own tokens, ``before`` tokens into a text, moved by one."""
    if before < 0:
        raise ValueError(f"before: {before} is negative")
    rows = [*({} for _ in range(before)), *rows]
    if rows and rows[0]:
        raise ValueError(
            f"{name}: position 0 has entries, but no token comes before it that they could be "
            "predicted from; of a text that goes on from a prompt give the prompt's length as "
            "before="
        )
    return [*rows[1:], *({} for _ in rows[:1])]


def _tensors(rows: list[_Row]) -> tuple[Tensor, Tensor]:
    width = max((len(row) for row in rows), default=0) or 1
    ids = torch.full((len(rows), width), -1, dtype=torch.int64)
    log_probs = torch.full((len(rows), width), -math.inf, dtype=torch.float64)
    for at, row in enumerate(rows):
        ids[at, : len(row)] = torch.tensor(list(row), dtype=torch.int64)
        log_probs[at, : len(row)] = torch.tensor(list(row.values()), dtype=torch.float64)
    return ids, log_probs
