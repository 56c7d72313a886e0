"""What nobody else may read: tokens, keys and passwords, kept out of whatever is written or shown.

A name ends in ``token``, ``key``, ``password``, ``secret`` or the like where its value is a secret.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import Any

_HIDDEN = "***"

_NAMES = r"(?:token|key|passw(?:or)?d|passphrase|secret|credentials?|authorization)"
_NAME = re.compile(rf"(?:^|[a-z_-]){_NAMES}$", re.IGNORECASE)
#: ``scheme://user:password@host``
_CREDENTIALS = re.compile(r"(\b[a-z][a-z0-9+.-]*://)[^/\s'\"]+@", re.IGNORECASE)
#: ``?access_token=...&sig=...``
_QUERY = re.compile(rf"([?&][\w.-]*(?:{_NAMES}|sig|signature)=)[^&\s'\"]+", re.IGNORECASE)
#: ``"api_key": "..."`` inside an option that holds JSON.
_FIELD = re.compile(rf"([\w-]*{_NAMES}[\"']?\s*[:=]\s*[\"']?)[^\s\"',}}&]+", re.IGNORECASE)
_HUB_TOKEN = re.compile(r"\bhf_[A-Za-z0-9]{20,}")

#: An environment variable of fewer characters is no secret, and may be a word of any text.
_SHORTEST = 8

#: Secrets that options of this process held: they may come back in anybody's message.
_known: set[str] = set()


def is_secret(name: str) -> bool:
    """Whether the value of an option, a field or an environment variable of this name is one."""
    return _NAME.search(name) is not None


def without_secrets(options: Mapping[str, Any]) -> dict[str, Any]:
    """``options`` as they may be told: none that is a secret, no secret inside the others.

    The secrets are remembered, for :func:`redacted`.
    """
    _known.update(str(value) for name, value in options.items() if value and is_secret(name))
    return {name: _told(value) for name, value in options.items() if not is_secret(name)}


def _told(value: Any) -> Any:
    if isinstance(value, Mapping):
        return without_secrets({str(name): item for name, item in value.items()})
    if isinstance(value, list | tuple):
        return [_told(item) for item in value]
    # Exactly text: an enumeration that is also text stays what it is.
    return redacted(_FIELD.sub(rf"\1{_HIDDEN}", value)) if type(value) is str else value


def redacted(text: str) -> str:
    """``text`` without the secrets that it may hold."""
    environment = {
        value
        for name, value in os.environ.items()
        if is_secret(name) and len(value) >= _SHORTEST and not value.isdigit()
    }
    for secret in sorted(_known | environment, key=len, reverse=True):
        text = text.replace(secret, _HIDDEN)
    for pattern in (_CREDENTIALS, _QUERY):
        text = pattern.sub(rf"\1{_HIDDEN}" + ("@" if pattern is _CREDENTIALS else ""), text)
    return _HUB_TOKEN.sub(_HIDDEN, text)
