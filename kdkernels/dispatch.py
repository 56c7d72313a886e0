"""Which backend runs a problem: chosen, or refused with every reason."""

from __future__ import annotations

from .backends import BACKENDS
from .problem import Problem


def available_backends() -> dict[str, list[str]]:
    """For each backend why it cannot run on this machine; an empty list: it can."""
    return {name: backend.unavailable() for name, backend in BACKENDS.items()}


def _reasons(name: str, problem: Problem) -> list[str]:
    backend = BACKENDS[name]
    return backend.unavailable() or backend.why_not(problem)


def check_name(name: str) -> None:
    """ValueError unless there is a backend of this name."""
    if name not in BACKENDS:
        raise ValueError(f"backend: {name!r} is not one of {', '.join(BACKENDS)}")


def choose_backend(problem: Problem, name: str | None, *, extras: bool = False) -> str:
    """The name of the backend that runs ``problem``: ``name`` itself, or the first that can.

    Where that one knows of a faster one for this problem, and it can run it, the faster one.
    ``extras``: the entropies and hits are wanted, too.

    Raises:
        ValueError: ``name`` is unknown.
        RuntimeError: the named backend cannot run the problem; the message has its reasons and the
            backends that could. A named backend is never replaced silently.
    """
    if name is None:
        for candidate in BACKENDS:
            if _reasons(candidate, problem):
                continue
            faster = BACKENDS[candidate].yields(problem, extras)
            if faster is not None and not _reasons(faster[0], problem):
                candidate = faster[0]
            return _prepared(candidate, problem)
        raise RuntimeError(_refusal("no backend can run this problem", problem, list(BACKENDS)))
    check_name(name)
    if _reasons(name, problem):
        able = [other for other in BACKENDS if not _reasons(other, problem)]
        message = _refusal(f"backend {name!r} cannot run this problem", problem, [name])
        raise RuntimeError(f"{message}; it can run on: {', '.join(able) or 'none'}")
    return _prepared(name, problem)


def _prepared(name: str, problem: Problem) -> str:
    BACKENDS[name].prepare(problem)
    return name


def _refusal(headline: str, problem: Problem, names: list[str]) -> str:
    reasons = (f"{name}: {reason}" for name in names for reason in _reasons(name, problem))
    return f"{headline} ({'; '.join(reasons)})"
