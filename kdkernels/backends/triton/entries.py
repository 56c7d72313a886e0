"""A sparse teacher's entries as its tail has them, in float32, for the row kernel.

The K entries of a row are nothing beside its logits, but what is done with them is in float64 and
compares them with each other: here, where many rows at once hide that, it costs the row kernel
neither registers nor time. ``kdkernels/entries.py`` is the same in PyTorch, and says what it means.
"""

# mypy: disable-error-code="no-untyped-def"
import triton
import triton.language as tl

from ...entries import MOST_MASS as _MOST_MASS
from .arguments import Facts
from .arithmetic import finite
from .exchange import store_numbers
from .functors import LOG2E

MOST_MASS = tl.constexpr(_MOST_MASS)
#: Numbers of a row beside its entries.
FACTS = tl.constexpr(len(Facts._fields))


@triton.jit
def _repeats(ids_ptr, log_probs_ptr, ids, slot, count, P: tl.constexpr):
    """How many slots before it have an entry's id, and the sum of what all of them weigh."""
    earlier = tl.zeros([P.slots], tl.int32)
    weight = tl.zeros([P.slots], tl.float64)
    for first in range(0, count, P.compared_slots):
        other = first + tl.arange(0, P.compared_slots)
        there = other < count
        its = tl.load(ids_ptr + other, mask=there, other=-1)
        same = ids[:, None] == its[None, :]
        earlier += tl.sum((same & (other[None, :] < slot[:, None])).to(tl.int32), 1)
        if P.tail == "none":
            log = tl.load(log_probs_ptr + other, mask=its >= 0, other=-float("inf"))
            weight += tl.sum(tl.where(same, tl.exp(log.to(tl.float64))[None, :], 0.0), 1)
    return earlier, weight


@triton.jit
def _logarithm(x):
    """Of a float64 that may be 0."""
    return tl.where(x == 0, -float("inf"), tl.log(tl.where(x == 0, 1.0, x)))


@triton.jit
def _normalised(log, known, mass, others, P: tl.constexpr):
    """What a tail divides by, what it leaves to the others, both as logarithms; whether it may."""
    log_norm, log_rest = mass * 0.0, mass * 0.0 - float("inf")
    sound = mass < float("inf")  # which NaN fails
    if P.tail != "none":
        top = tl.max(log, 0)
        log_norm = top + tl.log(tl.sum(tl.where(known, tl.exp(log - top), 0.0), 0))
        if P.tail == "bucket" or P.tail == "uniform":
            sound = sound & (mass <= MOST_MASS)
            # Of a part of the vocabulary only what rounding has added to 1 is taken off again.
            log_norm = tl.where((others > 0) & (mass <= 1), 0.0, log_norm)
            log_rest = _logarithm(tl.where(others > 0, tl.maximum(1 - mass, 0.0), 0.0))
        sound = sound & finite(log_norm)
    return log_norm, log_rest, sound


@triton.jit
def _entropy(log_p, rest, log_rest, others, P: tl.constexpr):
    """In nats, of what a tail makes of the entries; log_p is float64."""
    entropy = -tl.sum(tl.where(log_p > -float("inf"), tl.exp(log_p) * log_p, 0.0), 0)
    each = log_rest
    if P.tail == "uniform":
        each = log_rest - tl.log(tl.maximum(others, 1).to(tl.float64))
    return entropy - tl.where(rest > 0, rest * each, 0.0)


@triton.jit
def _row(row, tensors, sizes, P: tl.constexpr):
    ids_ptr, log_probs_ptr, offsets_ptr, columns_ptr, log_p_ptr, facts_ptr = tensors
    entries, vocab = sizes
    slot = tl.arange(0, P.slots)
    there = slot < entries
    first = row * entries
    if P.mapped:
        first = tl.load(offsets_ptr + row)
    ids = tl.load(ids_ptr + first + slot, mask=there, other=-1)
    known = ids >= 0
    log = tl.load(log_probs_ptr + first + slot, mask=known, other=-float("inf"))
    log = log.to(tl.float64)
    earlier, weight = _repeats(ids_ptr + first, log_probs_ptr + first, ids, slot, entries, P)
    wrong = known & (ids >= vocab)
    if P.tail == "none":
        known = known & (earlier == 0)
        log = tl.where(known, _logarithm(weight), -float("inf"))
    else:
        wrong = wrong | (known & (earlier > 0))
    count = tl.sum(known.to(tl.int32), 0)
    others = vocab - count
    mass = tl.sum(tl.exp(log), 0)
    log_norm, log_rest, sound = _normalised(log, known, mass, others, P)
    log_norm = tl.where(count > 0, log_norm, 0.0)
    sound = (sound | (count == 0)) & (tl.sum(wrong.to(tl.int32), 0) == 0)
    entropy, at = 0.0, 0.0
    if P.extras:
        likeliest = tl.where(known & (log == tl.max(log, 0)), ids, vocab)
        at = tl.where(count > 0, tl.min(likeliest, 0), -1).to(tl.float32)
        entropy = _entropy(log - log_norm, tl.exp(log_rest), log_rest, others, P)
        entropy = tl.where(count > 0, entropy, 0.0).to(tl.float32)
    column = tl.where(known & (ids < vocab), ids, -1).to(tl.int32)
    tl.store(columns_ptr + row * entries + slot, column, mask=there)
    log_p = ((log - log_norm) * LOG2E).to(tl.float32)
    tl.store(log_p_ptr + row * entries + slot, log_p, mask=there)
    facts = Facts(
        lse=tl.where(sound, log_norm, float("nan")).to(tl.float32),
        entropy=entropy,
        at=at,
        log_rest=(log_rest * LOG2E).to(tl.float32),
        others=others.to(tl.float32),
    )
    store_numbers(facts_ptr + row * FACTS, 1, facts, FACTS)


@triton.jit(do_not_specialize=["rows", "entries", "vocab"])
def kd_entries(
    ids_ptr, log_probs_ptr, offsets_ptr, columns_ptr, log_p_ptr, facts_ptr, rows, entries, vocab,
    P: tl.constexpr,
):  # fmt: skip
    """Persistent. ``columns`` and ``log_p`` are [rows, entries], ``facts`` is [rows, FACTS].

    ``offsets``: [rows], where a row's entries begin, in another order; else None.
    """
    tensors = (ids_ptr, log_probs_ptr, offsets_ptr, columns_ptr, log_p_ptr, facts_ptr)
    for row in range(tl.program_id(0), rows, tl.num_programs(0)):
        _row(row + rows.to(tl.int64) * 0, tensors, (entries, vocab), P)
