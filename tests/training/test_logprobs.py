"""Readers of log-probabilities that servers and data sets hold."""

from __future__ import annotations

import json
import math
import types
from typing import Any

import pytest
import tiny_models
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from kdkernels import fused_kd_loss, fused_topk_kd_loss
from kdkernels.training.logprobs import from_columns, from_openai, from_prompt_logprobs

INF = math.inf


def check(read: Any, ids: list[list[int]], log_probs: list[list[float]]) -> None:
    assert [one.dtype for one in read] == [torch.int64, torch.float64]
    assert read[0].tolist() == ids
    assert read[1].tolist() == log_probs


#: As JSON has it: of "Paris is lovely", top 2; the prompt's own "is" is the 9th.
VLLM = """[
  null,
  {"318": {"logprob": -3.25, "rank": 9, "decoded_token": " is"},
   "11": {"logprob": -0.5, "rank": 1, "decoded_token": ","},
   "13": {"logprob": -1.25, "rank": 2, "decoded_token": "."}},
  {"4950": {"logprob": -0.75, "rank": 1, "decoded_token": " lovely"},
   "257": {"logprob": -1.5, "rank": 2, "decoded_token": " a"}}
]"""


def test_prompt_logprobs_of_vllm() -> None:
    want = [[318, 11, 13], [4950, 257, -1], [-1, -1, -1]]
    values = [[-3.25, -0.5, -1.25], [-0.75, -1.5, -INF], [-INF] * 3]
    positions = json.loads(VLLM)
    check(from_prompt_logprobs(positions), want, values)
    named = [
        one and {int(i): types.SimpleNamespace(**entry) for i, entry in one.items()}
        for one in positions
    ]
    check(from_prompt_logprobs(named), want, values)  # as vLLM's own objects
    plain = [one and {i: entry["logprob"] for i, entry in one.items()} for one in positions]
    check(from_prompt_logprobs(plain), want, values)
    check(
        from_prompt_logprobs(positions[1:], before=3),
        [[-1] * 3, [-1] * 3, *want],
        [[-INF] * 3, [-INF] * 3, *values],
    )


def test_prompt_logprobs_of_sglang() -> None:
    positions = [None, [[-0.5, 11, ","], [-1.25, 13, None]], [[-0.75, 4950, " lovely"]]]
    check(
        from_prompt_logprobs(positions),
        [[11, 13], [4950, -1], [-1, -1]],
        [[-0.5, -1.25], [-0.75, -INF], [-INF, -INF]],
    )


def test_nothing_is_known() -> None:
    check(from_prompt_logprobs([]), [], [])
    check(from_prompt_logprobs([None]), [[-1]], [[-INF]])
    check(from_columns([None, []], [None, []]), [[-1]] * 2, [[-INF]] * 2)


@pytest.mark.parametrize(
    ("positions", "error", "match"),
    [
        ([None, {"7": -1, "x": -2}], ValueError, "prompt_logprobs: position 1: id 'x' is not an"),
        ([None, {-7: -1}], ValueError, "position 1: id -7 is not an integer >= 0"),
        ([None, {"7": {"rank": 1}}], TypeError, "position 1: id 7: expected a number, got None"),
        ([None, {"7": 0.5}], ValueError, r"position 1: id 7: 0\.5 is not the natural log"),
        ([None, {"7": math.nan}], ValueError, "position 1: id 7: nan is not the natural log"),
        ([None, {7: -1, "7": -2}], ValueError, "position 1: id 7 comes twice"),
        ([None, None, "7"], TypeError, "position 2: expected None, a dict or a list, got str"),
        ([None, [-0.5, 7]], TypeError, r"position 1: expected \[logprob, id, ...\], got -0\.5"),
        ([{"7": -1}, None], ValueError, "position 0 has entries, but no token comes before"),
    ],
)
def test_bad_prompt_logprobs(positions: Any, error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        from_prompt_logprobs(positions)


def byte_level() -> PreTrainedTokenizerFast:
    """As GPT-2's: a space is Ġ, a line end Ċ."""
    pieces = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "Ġi", "Ġis"]
    merges = [("Ġ", "i"), ("Ġi", "s")]
    backend = Tokenizer(models.BPE({piece: i for i, piece in enumerate(pieces)}, merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend)


def test_openai_logprobs() -> None:
    """The own token is among the top, or beside them; of the first nothing is known."""
    tokenizer = byte_level()
    space_is, line, dot, a = (tokenizer.get_vocab()[x] for x in ("Ġis", "Ċ", ".", "a"))
    logprobs = {
        "tokens": ["a", " is", "\n", "."],
        "token_logprobs": [None, -0.5, -4.0, -2.0],
        "top_logprobs": [None, {" is": -0.5, ".": -1.5}, {"a": -0.25, "token_id:3": -3.0}, None],
        "text_offset": [0, 1, 4, 5],
    }
    want = [[space_is, dot, -1], [a, 3, line], [dot, -1, -1], [-1] * 3]
    values = [[-0.5, -1.5, -INF], [-0.25, -3.0, -4.0], [-2.0, -INF, -INF], [-INF] * 3]
    check(from_openai(logprobs, tokenizer), want, values)
    generated = {"tokens": ["."], "token_logprobs": [-2.0], "top_logprobs": None}
    check(from_openai(generated, tokenizer, before=2), [[-1], [dot], [-1]], [[-INF], [-2], [-INF]])


def test_openai_strings_of_sentencepiece() -> None:
    tokenizer = tiny_models.tokenizer(["▁w1", "w1", "<0x0A>"])
    ids = tokenizer.get_vocab()
    logprobs = {
        "tokens": ["w1", " w1"],
        "token_logprobs": [None, -0.5],
        "top_logprobs": [None, {" w1": -0.5, "w1": -1.0, "<0x0A>": -2.0}],
    }
    read = from_openai(logprobs, tokenizer)
    assert read[0][0].tolist() == [ids["▁w1"], ids["w1"], ids["<0x0A>"]]


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"top_logprobs": [None, {"zz": -1.0}]}, ValueError, "position 1: 'zz' is no single token"),
        ({"top_logprobs": [None, {"�": -1.0}]}, ValueError, "top_logprobs: position 1: '�' is no"),
        ({"tokens": ["a", "zz"]}, ValueError, "token_logprobs: position 1: 'zz' is no single"),
        ({"top_logprobs": [None]}, ValueError, "top_logprobs: 1 positions, tokens has 2"),
        ({"token_logprobs": None}, TypeError, "token_logprobs: expected a list, got NoneType"),
        ({"token_logprobs": [None, "x"]}, TypeError, "position 1: id .*: expected a number"),
        ({"top_logprobs": [None, {" is": -1, "Ġis": -2}]}, ValueError, "position 1: id .* twice"),
        ({"token_logprobs": [-1.0, -1.0]}, ValueError, "position 0 has entries, but no token"),
    ],
)
def test_bad_openai_logprobs(change: Any, error: type[Exception], match: str) -> None:
    good = {"tokens": ["a", "."], "token_logprobs": [None, -1.0], "top_logprobs": None}
    with pytest.raises(error, match=match):
        from_openai(good | change, byte_level())


def test_an_unknown_string_is_not_the_unknown_token() -> None:
    logprobs = {"tokens": ["w1", "zz"], "token_logprobs": [None, -1.0]}
    with pytest.raises(ValueError, match="'zz' is no single token"):
        from_openai(logprobs, tiny_models.tokenizer())


def test_columns() -> None:
    ids = [[5, 7], None, [3, None, 4], [6, 0, 0], [2, -1]]
    log_probs = [[-0.5, -1.5], None, [-0.25, None, -2.0], [-1.0, -INF, None], [-3.0, 0.0]]
    want = [[5, 7], [-1, -1], [3, 4], [6, -1], [2, -1]]
    values = [[-0.5, -1.5], [-INF, -INF], [-0.25, -2.0], [-1.0, -INF], [-3.0, -INF]]
    check(from_columns(ids, log_probs), want, values)
    arrays = [torch.tensor([[5, 7]]).numpy(), torch.tensor([[-0.5, -1.5]])]
    check(from_columns(*arrays), want[:1], values[:1])
    own = from_columns([None, *ids], [None, *log_probs], of_next=False)
    check(own, [*want, [-1, -1]], [*values, [-INF, -INF]])


@pytest.mark.parametrize(
    ("ids", "log_probs", "error", "match"),
    [
        ([[1]], [[-1.0], [-1.0]], ValueError, "log_probs: 2 positions, ids has 1"),
        ([[1], [1, 2]], [[-1.0], [-1.0]], ValueError, "position 1 has 1 entries, ids 2"),
        ([[1, 1]], [[-1.0, -2.0]], ValueError, "position 0: id 1 comes twice"),
        ([[1.5]], [[-1.0]], ValueError, r"position 0: id 1\.5 is not an integer"),
        ([[1]], [[2.0]], ValueError, r"position 0: id 1: 2\.0 is not the natural logarithm"),
        ([1], [[-1.0]], TypeError, "position 0: expected a list, got int"),
    ],
)
def test_bad_columns(ids: Any, log_probs: Any, error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        from_columns(ids, log_probs)


def test_what_is_read_lines_up_with_logits() -> None:
    """A server that says everything gives the loss of the teacher's own logits."""
    teacher, student = torch.randn(2, 1, 6, 9, dtype=torch.float64)
    tokens = torch.tensor([[3, 1, 4, 1, 5, 8]])
    log_p = teacher[0].log_softmax(-1)
    positions = [None, *({i: float(x) for i, x in enumerate(row)} for row in log_p[:-1])]
    ids, log_probs = from_prompt_logprobs(positions)
    got = fused_topk_kd_loss(student, ids[None], log_probs[None], tokens, shift=True)
    torch.testing.assert_close(got, fused_kd_loss(student, teacher, tokens, shift=True))
