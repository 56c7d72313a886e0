"""The contract, the peers' bugs and the properties, with the simulated CUDA backend."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import simulator
from test_contract import *  # noqa: F403
from test_peer_bugs import *  # noqa: F403

pytestmark = simulator.needs_simulator

#: What the emulator cannot show, or is not so on a device.
for _name in (
    # A device cannot raise for a label without a synchronisation: NaN and a flag instead.
    "test_row10_a_label_outside_the_vocabulary_is_an_index_error",
    "test_row10_truncated_vocabulary_bounds_the_labels",
    # Other processes and threads know nothing of the pretence.
    "test_row30_eight_python_threads_give_the_same_bits",
    "test_row30_fork_after_use_does_not_hang",
    "test_row30_fork_after_use_is_no_worse_than_eager_with_all_threads",
    "test_row31_a_rank_with_nothing_to_learn_takes_part",
    # The emulator needs the memory of a plain tensor.
    "test_subclasses_and_parameters_give_the_same_result",
    # Compares bits of two alignments, which divide a row differently among threads.
    "test_item17_rows_sliced_from_padded_vocabularies",
):
    del globals()[_name]


@pytest.fixture
def backend() -> Iterator[str]:
    with simulator.simulated():
        yield "cuda"


@pytest.fixture
def device(backend: str) -> str:
    return "cpu"
