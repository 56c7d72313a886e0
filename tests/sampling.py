"""Where a case takes long, only some of a test's many cases are run, unless all are asked for."""

from __future__ import annotations

import collections
import random
from collections.abc import Callable

import pytest

from kdkernels.environment import setting

#: Runs every case: of the emulated tests, and of those in Triton's interpreter.
ALL = "KDKERNELS_SIMULATE=all"
WANTS_ALL = setting("KDKERNELS_SIMULATE") == "all"


def keep_some(
    config: pytest.Config,
    items: list[pytest.Item],
    most: int,
    share: int,
    concerns: Callable[[pytest.Item], bool] = lambda item: True,
) -> None:
    """Of each test with more cases than ``most`` keep one in ``share``."""
    if WANTS_ALL:
        return
    families = collections.defaultdict(list)
    for item in filter(concerns, items):
        families[item.nodeid.split("[")[0]].append(item)
    dropped: set[pytest.Item] = set()
    for family in families.values():
        if len(family) > most:
            # The same ones each time, and no period that would miss one value of a parameter.
            dropped.update(random.Random(0).sample(family, len(family) * (share - 1) // share))
    items[:] = [item for item in items if item not in dropped]
    config.hook.pytest_deselected(items=list(dropped))
