"""A server that speaks HTTP and JSON: asked until it answers, or it is clear that it will not.

The standard library's client. A redirect is told of and not followed: the key would go along. The
proxies that the environment names are not used.
"""

from __future__ import annotations

import contextlib
import email.utils
import http.client
import json
import math
import random
import socket
import ssl
import threading
import time
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from ..environment import setting
from .redaction import redacted

#: The variable that holds the server's key, if it wants one.
KEY_VARIABLE = "KDKERNELS_TEACHER_KEY"

#: Seconds before the second try; each further one waits twice as long, up to the most, and all by
#: chance up to half more or less, so that requests that failed together do not come back together.
_FIRST_WAIT = 1.0
_MOST_WAIT = 60.0
#: A server that asks for more seconds than that (Retry-After) is not waited for.
_LONGEST_WAIT = 600.0
#: Not the numbers that a training draws: they must not depend on how often a server was asked.
_chance = random.Random()
#: No answer is read any further. Two thousand tokens' top 100 take a tenth of it.
_MOST_BYTES = 2**28
#: So much of what a server says of an error is told.
_MOST_WORDS = 300


def _passes(status: int) -> bool:
    """Whether a request that was answered so may succeed later; 501: this server never does it."""
    return status in (408, 429) or (status >= 500 and status != 501)


class ServerError(RuntimeError):
    """What is wrong with a server or its answer, in one line that begins with ``teacher_url``."""


class Rejected(ServerError):
    """A request that the server says is wrong: ``status`` 400 to 499."""

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


class _Passing(Exception):
    """What may be otherwise at the next try; ``wait``: seconds that the server asks for."""

    def __init__(self, message: str, wait: float | None = None) -> None:
        super().__init__(message)
        self.wait = wait


class Address(NamedTuple):
    """Where a server is."""

    secure: bool
    host: str
    port: int | None
    path: str  #: of the interface, ``/v1``; without a slash at its end

    @classmethod
    def of(cls, url: str) -> Address:
        """ValueError unless it is ``http://HOST:PORT/PATH`` or ``https://...``, and no more."""
        plain = url.isascii() and url.isprintable() and " " not in url
        try:
            parts = urlsplit(url)
            host, port = parts.hostname, parts.port
        except ValueError as error:
            raise ValueError(f"teacher_url: {redacted(url)!r}: {error}") from error
        if parts.scheme not in ("http", "https") or not host or not plain:
            raise ValueError(
                f"teacher_url: {redacted(url)!r} is no address such as http://localhost:8000/v1"
            )
        if "@" in parts.netloc:
            raise ValueError(
                f"teacher_url: {redacted(url)!r} holds a name or password; a key is read from the "
                f"environment variable {KEY_VARIABLE}"
            )
        if "?" in url or "#" in url:
            raise ValueError(f"teacher_url: {redacted(url)!r} holds more than an address (?, #)")
        return cls(parts.scheme == "https", host, port, parts.path.rstrip("/"))


def check_numbers(timeout: float, tries: int, requests: int) -> None:
    """ValueError unless requests can be made with these, naming the option."""
    if not (math.isfinite(timeout) and 0 < timeout <= threading.TIMEOUT_MAX):
        raise ValueError(f"teacher_timeout: {timeout!r} is no number of seconds above 0")
    for name, number in (("teacher_tries", tries), ("teacher_requests", requests)):
        if number < 1:
            raise ValueError(f"{name}: {number} is not at least 1")


class Server:
    """A server, its key, and how long it is asked.

    Args:
        url: ``http://HOST:PORT/v1``.
        timeout: seconds that connecting, and from then on the answer to its last byte, may take.
        tries: how often a request is made that fails by what may pass: no connection, statuses 408,
            429, and 500 and above but for 501.

    Raises:
        ValueError: ``url`` is no address, a number is not allowed, or the key in
            ``KDKERNELS_TEACHER_KEY`` cannot be sent.
    """

    def __init__(self, url: str, *, timeout: float = 300.0, tries: int = 6) -> None:
        self.address, self.url = Address.of(url), url.rstrip("/")
        check_numbers(timeout, tries, 1)
        self.timeout, self.tries = timeout, tries
        self._key = setting(KEY_VARIABLE)
        if self._key is not None and not (self._key.isascii() and self._key.isprintable()):
            raise ValueError(f"{KEY_VARIABLE}: its value has characters that no header can hold")

    def ask(
        self,
        path: str,
        body: Any = None,
        stopped: threading.Event | None = None,
        at_root: bool = False,
    ) -> dict[str, Any]:
        """The JSON object that the server answers.

        Args:
            path: below the server's address; ``at_root``: beside the ``/v1`` that it ends in.
            body: is posted as JSON; None: nothing is, the answer is got.
            stopped: ends the wait between two tries.

        Raises:
            ServerError: with the address, the number of tries, and the server's own words.
        """
        above = self.address.path
        place = (above.removesuffix("/v1") if at_root else above) + path
        where = f"teacher_url: {self.url.removesuffix(above)}{place}"
        for attempt in range(1, self.tries + 1):
            try:
                return self._try(where, place, body)
            except _Passing as error:
                wait = min(_FIRST_WAIT * 2 ** (attempt - 1), _MOST_WAIT) * _chance.uniform(0.5, 1.5)
                wait = max(wait, error.wait or 0.0)
                if attempt == self.tries or wait > _LONGEST_WAIT:
                    tries = "1 try" if attempt == 1 else f"{attempt} tries"
                    raise ServerError(f"{where}: no answer in {tries}: {error}") from error
                if stopped is None:
                    time.sleep(wait)
                elif stopped.wait(wait):
                    raise ServerError(f"{where}: no longer asked") from error
        raise AssertionError

    def _try(self, where: str, place: str, body: Any) -> dict[str, Any]:
        try:
            response, data = self._exchange(place, body)
        except ssl.SSLError as error:
            if isinstance(error, TimeoutError):
                raise _Passing(f"no answer within {self.timeout:g} s") from error
            raise ServerError(f"{where}: no secure connection ({self.told(str(error))})") from error
        except TimeoutError as error:
            raise _Passing(f"no answer within {self.timeout:g} s") from error
        except (OSError, http.client.HTTPException, UnicodeError) as error:
            told = self.told(str(error))
            raise _Passing(f"{type(error).__name__}" + (f": {told}" if told else "")) from error
        status = response.status
        if 200 <= status < 300:
            return self._read(where, response, data)
        if 300 <= status < 400:
            target = self.told(response.getheader("Location") or "")
            raise ServerError(
                f"{where}: status {status}, it is at {target!r}; redirects are not followed"
            )
        message = f"status {status}{self._words(data)}"
        if _passes(status):
            wait = _seconds(response.getheader("Retry-After"))
            if wait is not None and wait > _LONGEST_WAIT:
                message += f"; it asks for {wait:.0f} s"
            raise _Passing(message, wait)
        raise Rejected(f"{where}: {message}", status)

    def _exchange(self, place: str, body: Any) -> tuple[http.client.HTTPResponse, bytes]:
        """One request and all of its answer, within the time-out."""
        address = self.address
        kind = http.client.HTTPSConnection if address.secure else http.client.HTTPConnection
        connection = kind(address.host, address.port, timeout=self.timeout)
        headers = {"Accept": "application/json", "Connection": "close"}
        if self._key is not None:
            headers["Authorization"] = f"Bearer {self._key}"
        content = None
        if body is not None:
            headers["Content-Type"] = "application/json"
            content = json.dumps(body).encode()
        late = threading.Event()
        try:
            connection.connect()
            # The socket's own time-out begins anew with every byte.
            timer = threading.Timer(self.timeout, _end, (connection.sock, late))
            timer.daemon = True
            timer.start()
            try:
                connection.request("GET" if content is None else "POST", place, content, headers)
                response = connection.getresponse()
                data = response.read(_MOST_BYTES + 1)
                if response.length and len(data) <= _MOST_BYTES:
                    raise http.client.IncompleteRead(data, response.length)
            except (OSError, http.client.HTTPException) as error:
                raise (TimeoutError() if late.is_set() else error) from error
            finally:
                timer.cancel()
            if late.is_set():  # where nothing but the end of the connection ends an answer
                raise TimeoutError
            return response, data
        finally:
            connection.close()

    def _read(self, where: str, response: http.client.HTTPResponse, data: bytes) -> dict[str, Any]:
        if len(data) > _MOST_BYTES:
            raise ServerError(f"{where}: its answer is longer than {_MOST_BYTES} bytes")
        try:
            answer = json.loads(data)
        except (ValueError, RecursionError) as error:
            kind = self.told(response.getheader("Content-Type") or "no type")
            begins = self.told(data[:_MOST_WORDS].decode(errors="replace"))
            reason = self.told(str(error))
            raise ServerError(
                f"{where}: its answer ({kind}) is no JSON ({reason}): {begins!r}"
            ) from error
        if not isinstance(answer, dict):
            raise ServerError(f"{where}: its answer is a JSON {type(answer).__name__}, no object")
        return answer

    def _words(self, data: bytes) -> str:
        """What the server says of an error, as the end of a sentence."""
        text = data[: 2**16].decode(errors="replace")
        with contextlib.suppress(ValueError, RecursionError):
            found = json.loads(text)
            for name in ("error", "message", "detail"):
                if isinstance(found, dict) and found.get(name):
                    found = found[name]
            text = found if isinstance(found, str) else json.dumps(found)
        told = self.told(text)
        return f", {told!r}" if told else ""

    def told(self, text: str) -> str:
        """What a server has said as it may be shown: in one line, bounded, and without the key."""
        if self._key is not None:
            text = text.replace(self._key, "***")
        line = redacted(" ".join(text.split()))
        line = "".join(character if character.isprintable() else "?" for character in line)
        return line if len(line) <= _MOST_WORDS else f"{line[:_MOST_WORDS]}..."


def _end(connection: socket.socket, late: threading.Event) -> None:
    """End whatever is read of a connection, or written to it."""
    late.set()
    with contextlib.suppress(OSError):
        connection.shutdown(socket.SHUT_RDWR)


def _seconds(header: str | None) -> float | None:
    """The wait that ``Retry-After`` asks for: seconds, or a date; None: neither."""
    text = (header or "").strip()
    if text.isascii() and text.isdecimal():
        return float(text[:9])
    try:
        date = email.utils.parsedate_to_datetime(text)
        return max(0.0, date.timestamp() - time.time())
    except (ValueError, TypeError, OverflowError):
        return None
