"""Work of which several processes need the result, and that one of them does."""

from __future__ import annotations

import os
import queue
import threading
from collections.abc import Callable
from typing import Any, TypeVar

from torch import distributed

Result = TypeVar("Result")

#: Seconds after which the others are told that the first process is still at work.
_BEAT = 5.0


def from_first_process(work: Callable[[], Result]) -> Result:
    """What ``work()`` returns, run in the first process alone; it has to be pickled for the others.

    They wait for a word of it every few seconds. So it may take hours, and a first process that is
    gone is missed after the time-out of the process group. An exception is raised in all of them:
    as it is in the first, elsewhere ValueError if it was one, else RuntimeError.

    Raises:
        RuntimeError: there are several processes, and nothing connects them yet.
    """
    if not (distributed.is_available() and distributed.is_initialized()):
        if int(os.environ.get("WORLD_SIZE") or 1) > 1:
            raise RuntimeError("several processes: make the DistillationArguments first")
        return work()
    if distributed.get_world_size() == 1:
        return work()
    first = distributed.get_rank() == 0
    done = _started(work) if first else None
    result: Any = None
    problem: Exception | None = None
    told: list[Any] = [None]
    while told[0] is None:
        if done is not None:
            try:
                result, problem = done.get(timeout=_BEAT)
                told = [(result, isinstance(problem, ValueError), problem and str(problem))]
            except queue.Empty:
                pass
        distributed.broadcast_object_list(told)
    if problem is not None:
        raise problem
    result, is_value_error, message = told[0]
    if message is not None:
        raise (ValueError if is_value_error else RuntimeError)(message)
    return result


def _started(work: Callable[[], Any]) -> queue.SimpleQueue[tuple[Any, Exception | None]]:
    """Where (result, exception) of ``work`` come from another thread, which ends with the process.

    The thread that was here is free to tell the others, and to be interrupted.
    """
    done: queue.SimpleQueue[tuple[Any, Exception | None]] = queue.SimpleQueue()

    def run() -> None:
        try:
            done.put((work(), None))
        except Exception as error:
            done.put((None, error))

    threading.Thread(target=run, daemon=True).start()
    return done
