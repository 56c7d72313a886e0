"""What a launch is made of: the variant of the kernel that is compiled, and the launch numbers.

Counts are of the compiled kernels (``make kernel-report``, docs/gpu-kernels.md); what a GPU would
have to measure is marked so.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from ...environment import setting


class Device(NamedTuple):
    """What the policy knows of a device."""

    kind: str  # "cuda", "hip" or "interpreter"
    architecture: int  # 90 for sm_90; 0 elsewhere
    processors: int
    cache_bytes: int  # of the last cache that all processors share
    warp: int = 32


#: Stands for any GPU where no driver tells (ahead-of-time compilation, emulation): an H100 SXM.
H100 = Device("cuda", 90, 132, 50 << 20)
INTERPRETER = Device("interpreter", 0, 2, 1 << 20)


@dataclass(frozen=True)
class LaunchPolicy:
    """Launch numbers of the row kernel.

    Args:
        num_warps: of one program.
        vectors: 16-byte vectors per thread and tile (K): one rescale serves all of them.
        registers: the most that a thread may use (NVIDIA), so that ``residents`` fit; None: any.
        residents: programs that a processor holds at once. The row kernel is persistent; a larger
            grid would only add rows in flight.
        split: programs that share a row.
        exchange: how they combine: "none" (split is 1), "spin" (all resident, they wait for each
            other) or "launch" (the next launch reads what this one left).
        programs: the grid.
    """

    num_warps: int
    vectors: int
    registers: int | None
    residents: int
    split: int
    exchange: str
    programs: int


#: 8 warps of 16 bf16 per thread are a tile of 4096 columns. Forward KL + CE + gradient fits into 64
#: registers without a spill on every target, so that 4 programs share an SM: 32 warps with 2 x 32
#: bytes each in flight are 64 KB, three times what 0.7 us of H200 latency needs. (One vector per
#: thread would bring 0.25 instead of 0.12 special-function operations of rescaling per element.)
NUM_WARPS = 8
#: The same numbers for every release from 3.5 to 3.9: none spills with them on sm_90 (docs/
#: gpu-kernels.md has the counts by release), so no release needs a smaller tile.
#: A mixture of logarithms or a softcap hold more at once: 16 elements per thread would spill, 8
#: need 77 registers (jsd, sm_90); the alpha-beta divergence, or both together, need 96 and more.
#: A third exponential (T other than 1, 2, 3, 4) spills two registers of 64 on sm_100 and sm_120.
#: (vectors, registers, residents) by heaviness: plain, third exponential, one of the above, more.
TILES = ((2, 64, 4), (2, 80, 3), (1, 80, 3), (1, 128, 2))
#: Share of the cache that rows in flight may fill, so that their second reading finds them there.
#: An estimate: an H100's or A100's L2 is two halves, and either may keep a copy.
CACHE_SHARE = 0.4
#: Up to this many rows the vocabulary is split over separate launches: so few rows cannot fill the
#: device, and a second launch (2-3 us) costs less than waiting in every program.
FEW_ROWS = 64
#: More members share no more than the cache rule asks for at 256k columns of float32 on an A100.
MAX_SPLIT = 64


@functools.lru_cache(maxsize=1024)
def choose(
    device: Device, rows: int, vocab: int, row_bytes: int, width: int, sweeps: int, heaviness: int
) -> LaunchPolicy:
    """The launch for this problem.

    Args:
        row_bytes: of both models' logits of one row.
        width: W, the columns of one 16-byte vector.
        sweeps: times that a launch reads a row; the second and later ones should find it in cache.
        heaviness: an index of TILES.
    """
    if device.architecture // 10 in (10, 12):
        heaviness = max(heaviness, 1)  # 64 registers spill: float32, T = 2 or an odd vocabulary
    if device.architecture // 10 == 10 and heaviness == 2:
        heaviness = 3  # 80 registers spill three addresses of a row for JSD (Triton 3.7.1)
    vectors, registers, residents = TILES[min(heaviness, len(TILES) - 1)]
    if device.kind == "interpreter":
        # Its time goes by operations, not by elements: few tiles, but more than one.
        warps = 1
        while warps < 32 and 3 * 2 * warps * device.warp * vectors * width <= vocab:
            warps *= 2
        programs = max(1, min(rows, device.processors))
        return LaunchPolicy(warps, vectors, None, 1, 1, "none", programs)
    vectors *= 8 // width  # as many columns of float32
    tiles = max(1, vocab // (NUM_WARPS * device.warp * vectors * width))
    resident = device.processors * residents
    split, exchange = 1, "none"
    if rows <= FEW_ROWS:
        split = min(max(1, resident // max(rows, 1)), tiles, MAX_SPLIT)
        exchange = "launch" if split > 1 else "none"
    else:
        # Waiting for each other needs all programs resident: only where the register limit holds.
        if device.kind == "cuda":
            wanted = resident / rows
            if sweeps > 1:
                wanted = max(wanted, resident * row_bytes / (CACHE_SHARE * device.cache_bytes))
            while split < wanted and split * 2 <= min(tiles, MAX_SPLIT):
                split *= 2
            exchange = "spin" if split > 1 else "none"
    return LaunchPolicy(
        num_warps=NUM_WARPS,
        vectors=vectors,
        registers=registers if device.kind == "cuda" else None,
        residents=residents,
        split=split,
        exchange=exchange,
        programs=programs_for(device, rows, residents, split, exchange),
    )


def programs_for(device: Device, rows: int, residents: int, split: int, exchange: str) -> int:
    """The grid: all slices at once before another launch, else no more than are resident."""
    if exchange == "launch":
        return rows * split
    return max(1, min(rows, device.processors * residents // split)) * split


def choose_whole(
    device: Device, rows: int, vocab: int, row_bytes: int, width: int, heaviness: int
) -> LaunchPolicy:
    """The launch where a row is one program's: of a sparse teacher, ``row_bytes`` the student's.

    Where the rows in flight would not stay in the cache until the second sweep, or do not fill the
    device, a processor has one wide program instead of two. (Whether that pays is not measured.)
    """
    # Extra statistics of a tail spill with two vectors on sm_100 (Triton 3.7.1).
    least = 2 if device.architecture // 10 == 10 else 1
    alone = choose(device, 1 << 20, vocab, row_bytes, width, 1, max(heaviness, least))
    warps, registers, residents = alone.num_warps, alone.registers, 1
    if device.kind != "interpreter":
        # 80 registers, of three programs, spill what a row keeps beside extra statistics.
        registers = None if registers is None else 128
        in_flight = min(rows, 2 * device.processors) * row_bytes
        wide = 2 * warps * device.warp * alone.vectors * width <= vocab
        fits = in_flight <= CACHE_SHARE * device.cache_bytes and rows > device.processors
        warps, residents = (2 * warps, 1) if wide and not fits else (warps, 2)
    return dataclasses.replace(
        alone,
        num_warps=warps,
        registers=registers,
        residents=residents,
        programs=programs_for(device, rows, residents, 1, "none"),
    )


def key(
    device: Device, rows: int, vocab: int, row_bytes: int, width: int, sweeps: int, heaviness: int
) -> str:
    """What a measured launch is kept under: the arguments of :func:`choose`, rows by doublings."""
    most_rows = 1 << (rows - 1).bit_length()
    return (
        f"{device.kind}{device.architecture}x{device.processors} rows<={most_rows}"
        f" vocab={vocab} bytes={row_bytes} width={width} sweeps={sweeps} heaviness={heaviness}"
    )


def tuned_file() -> Path:
    """Where ``kdkernels tune`` keeps what it measured: ``$KDKERNELS_TUNE``, or the user's cache."""
    named = setting("KDKERNELS_TUNE")
    if named is not None:
        return Path(named).expanduser()
    folder = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(folder) / "kdkernels" / "tune.json"


@functools.lru_cache
def all_tuned() -> dict[str, dict[str, Any]]:
    """The measured launches by key; read once in a process.

    A file that is none counts as empty, with a warning; so does the lack of one that is named.
    """
    path = tuned_file()
    try:
        found = json.loads(path.read_text())
        if isinstance(found, dict):
            return found
        why = "it holds no JSON object"
    except FileNotFoundError as error:
        if setting("KDKERNELS_TUNE") is None:
            return {}
        why = str(error)
    except (OSError, ValueError) as error:
        why = str(error)
    warnings.warn(f"the measured launches in {path} are not used: {why}", stacklevel=2)
    return {}


def tuned(device: Device, rows: int, name: str) -> LaunchPolicy | None:
    """The measured launch of this :func:`key`, for this number of rows."""
    entry = all_tuned().get(name)
    if entry is None:
        return None
    found = LaunchPolicy(**entry["policy"])
    programs = programs_for(device, rows, found.residents, found.split, found.exchange)
    return dataclasses.replace(found, programs=programs)


#: Divergences whose sums follow from the statistics of the first sweep.
CLOSED = ("forward_kl", "reverse_kl")


class Entries(NamedTuple):
    """What the kernel of a sparse teacher's entries is compiled for; ``P`` there."""

    tail: str
    slots: int
    extras: bool
    mapped: bool  # rows meet those of the teacher in another order

    def constants(self) -> dict[str, Any]:
        # Ids are compared by pairs, of which a thread has up to 32 at once.
        return self._asdict() | {"compared_slots": min(16, max(2, 4096 // self.slots))}


class Tile(NamedTuple):
    """What one program reads at once: K vectors of W columns in each of THREADS threads."""

    K: int
    THREADS: int
    W: int
    itemsize: int  # of the student

    @property
    def columns(self) -> int:
        return self.K * self.THREADS * self.W


class Functor(NamedTuple):
    """The divergence: what functors.py reads."""

    divergence: str
    case: str  # which limit of the alpha-beta divergence
    nvidia: bool


class Terms(NamedTuple):
    """The terms of a row's loss."""

    power: int  # T if exp(z) is a small power of exp(z / T), else 0
    extras: bool
    kd_in_loss: bool
    ce_in_loss: bool
    smoothing: bool
    z_loss: bool


class Side(NamedTuple):
    """One model's logits."""

    scale: bool
    softcap: bool
    unit: bool  # columns are neighbours
    align: bool  # 16-byte accesses once the head of the row is peeled off


class Given(NamedTuple):
    """The tensors that a call may come with."""

    labels: bool
    items: bool
    weights: bool
    upstream: bool
    offsets: bool


class Stages(NamedTuple):
    """What this launch does of a row."""

    observe: bool
    evaluate: bool
    finish: bool
    differentiate: bool


class Sharing(NamedTuple):
    """Several programs for a row."""

    exchange: str
    split: int  # programs that share a row in this launch
    members: int  # slices whose partials are combined


class Variant(NamedTuple):
    """What the row kernel is compiled for; ``P`` in the kernels."""

    interpreted: bool
    tile: Tile
    functor: Functor
    terms: Terms
    student: Side
    teacher: Side
    align_gradient: bool
    base_aligned: bool  # all pointers are multiples of 16 bytes
    single: bool  # the vocabulary has one entry
    truncated: bool  # the gradient has columns that take no part
    given: Given
    stages: Stages
    sharing: Sharing
    tail: str  # of a sparse teacher; "": it is logits
    slots: int  # of its entries, a power of two

    def constants(self) -> dict[str, Any]:
        """The fields and what follows from them."""
        terms, stages, exchange = self.terms, self.stages, self.sharing.exchange
        with_kd = terms.kd_in_loss or terms.extras
        closed = self.functor.divergence in CLOSED
        rereads = stages.observe and (stages.evaluate or stages.differentiate)
        keep = "evict_last"  # the next sweep wants it
        done = "evict_first"
        return self._asdict() | {
            "sparse": self.tail != "",
            "with_kd": with_kd,
            # Below 0 is rounding only, but of weights that are no distribution.
            "nonnegative": self.tail != "none",
            "with_ce": terms.ce_in_loss or (self.given.labels and terms.extras),
            "label_term": terms.ce_in_loss or terms.z_loss,
            "closed": with_kd and closed,
            # Whose slopes are counted from one of them: state.py says why. Forward KL has none.
            "centred": with_kd and self.functor.divergence != "forward_kl",
            # A backward starts from the statistics tensor; only launches of one call exchange.
            "resumes": not stages.observe and exchange == "none",
            # Every member needs the row's sums of values and slopes, and has those of a slice.
            "collects_sums": with_kd and not closed and exchange != "none"
            and (stages.finish or stages.differentiate),
            "members_pow2": 1 << (self.sharing.members - 1).bit_length(),
            "meetings": 1 + int(stages.evaluate),
            "gradient_reads": 2 if terms.kd_in_loss else 1,
            "first_policy": keep if rereads else done,
            "middle_policy": keep if stages.differentiate else done,
            "last_policy": done,
            "store_policy": done,
        }  # fmt: skip
