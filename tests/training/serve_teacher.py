"""Run by test_served_teacher.py: an OpenAI-compatible server of a tiny model, and of its faults.

Prints its port when it listens. ``POST /control`` sets :class:`Behaviour` and starts counting anew,
``GET /control`` tells what has been asked. Whatever it answers is computed by the model, unless a
fault is asked for.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import tiny_models
import torch

MODEL = tiny_models.llama(2, seed=2).eval()
TOKENIZER = tiny_models.tokenizer()
LOCK = threading.Lock()
CHANGED = threading.Condition()
UNDER_WAY: set[Any] = set()  #: clients whose request has not been answered


@dataclasses.dataclass
class Behaviour:
    """What the server does from now on."""

    fault: str | None = None  #: a name in FAULTS, or a status
    path: str = "/v1/completions"  #: that the fault is of
    times: int = 1_000_000  #: how many requests have it, after ``sound`` ones
    sound: int = 0
    headers: dict[str, str] = dataclasses.field(default_factory=dict)
    body: str = "the server's own words"
    patch: str | None = None  #: a name in PATCHES: what is changed in sound answers
    models: list[Any] = dataclasses.field(
        default_factory=lambda: [{"id": "tiny", "root": "folder", "max_model_len": 64}]
    )
    echo_only: bool = False  #: whether ``prompt_logprobs`` is not known
    tokenize: str = "right"  #: "right", "wrong" or "missing"


behaviour = Behaviour()
asked: list[dict[str, Any]] = []


def entries(ids: list[int], top_k: int) -> list[dict[int, float] | None]:
    """Of each token the top k and itself, as vLLM says it."""
    with LOCK, torch.no_grad():
        log_p = MODEL(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
    top = log_p.topk(top_k)
    rows: list[dict[int, float] | None] = [None]
    for at, token in enumerate(ids[1:]):
        row = {token: float(log_p[at, token])}
        pairs = zip(top.indices[at].tolist(), top.values[at].tolist(), strict=True)
        rows.append(row | dict(pairs))
    return rows


def entry(token: int, log_prob: float) -> dict[str, Any]:
    return {"logprob": log_prob, "decoded_token": TOKENIZER.decode([token])}


def choice(request: dict[str, Any]) -> dict[str, Any]:
    ids = request["prompt"]
    if "prompt_logprobs" in request and not behaviour.echo_only:
        rows = entries(ids, request["prompt_logprobs"])
        told = [row and {str(i): entry(i, x) for i, x in row.items()} for row in rows]
        return {"text": "w1", "prompt_logprobs": told}
    if not request.get("echo"):
        return {"text": "w1", "logprobs": None}
    rows = [*entries(ids, request["logprobs"]), {3: -0.5}]  # and what is generated
    tokens = [*ids, 3]
    name = TOKENIZER.convert_ids_to_tokens
    return {
        "text": "",
        "logprobs": {
            "tokens": name(tokens),
            "token_logprobs": [row and row[i] for row, i in zip(rows, tokens, strict=True)],
            "top_logprobs": [row and {name(i): x for i, x in row.items()} for row in rows],
        },
    }


def shifted(found: dict[str, Any]) -> None:
    """As of a tokenizer whose ids are one further."""
    found["prompt_logprobs"] = [
        row and {str((int(i) + 1) % 17): x for i, x in row.items()}
        for row in found["prompt_logprobs"]
    ]


def renamed(found: dict[str, Any]) -> None:
    for one in found["prompt_logprobs"][1].values():
        one["decoded_token"] = "other"


def set_entry(found: dict[str, Any], token: str, log_prob: Any) -> None:
    found["prompt_logprobs"][2][token] = {"logprob": log_prob}


def set_top(found: dict[str, Any]) -> None:
    for row in found["prompt_logprobs"][1:]:
        for one in row.values():
            one["logprob"] = -0.01


PATCHES: dict[str, Callable[[dict[str, Any]], Any]] = {
    "no logprobs": lambda found: [found.pop(n, None) for n in ("prompt_logprobs", "logprobs")],
    "fewer": lambda found: found["prompt_logprobs"].pop(),
    "more": lambda found: found["prompt_logprobs"].append(None),
    "shifted": shifted,
    "renamed": renamed,
    "beyond": lambda found: set_entry(found, "17", -9.0),
    "far beyond": lambda found: set_entry(found, "9" * 30, -9.0),
    "nan": lambda found: set_entry(found, "16", float("nan")),
    "text": lambda found: set_entry(found, "16", "x"),
    "linear": set_top,
}


class Handler(BaseHTTPRequestHandler):
    def log_message(self, *_: Any) -> None:
        pass

    def do_GET(self) -> None:
        if self.path == "/control":
            return self.answer({"asked": asked})
        self.serve(None)

    def do_POST(self) -> None:
        global behaviour
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.path == "/control":
            with CHANGED:  # what a client that gave up has sent is not of the next behaviour
                CHANGED.wait_for(lambda: not UNDER_WAY - {self.client_address}, timeout=10)
            behaviour = Behaviour(**request)
            asked.clear()
            return self.answer({})
        self.serve(request)

    def leave(self) -> None:
        with CHANGED:
            UNDER_WAY.discard(self.client_address)
            CHANGED.notify_all()

    def finish(self) -> None:
        super().finish()
        self.leave()

    def serve(self, request: Any) -> None:
        now = behaviour
        with LOCK:
            before = sum(one["path"] == self.path for one in asked)
            asked.append(
                {"path": self.path, "key": self.headers["Authorization"]} | (request or {})
            )
        faulty = now.path == self.path and now.sound <= before < now.sound + now.times
        if now.fault is not None and faulty:
            return self.fail(now)
        if self.path == "/v1/models":
            return self.answer({"object": "list", "data": now.models})
        if self.path == "/tokenize" and now.tokenize != "missing":
            ids = TOKENIZER(request["prompt"])["input_ids"]
            return self.answer({"tokens": ids if now.tokenize == "right" else [1, *ids]})
        if self.path != "/v1/completions":
            return self.answer({"detail": "Not Found"}, 404)
        if request["model"] not in [model["id"] for model in now.models]:
            return self.answer({"error": {"message": "no such model"}}, 404)
        found = choice(request)
        if now.patch is not None:
            PATCHES[now.patch](found)
        self.answer({"choices": [found]})

    def fail(self, now: Behaviour) -> None:
        fault, body = str(now.fault), now.body.encode()
        self.leave()  # some take a minute
        if fault == "hang":
            time.sleep(60)
        elif fault == "drop":
            self.connection.close()
        elif fault == "trickle":
            self.send_response(200)
            self.end_headers()
            for _ in range(600):
                self.wfile.write(b" ")
                time.sleep(0.1)
        elif fault == "short":
            self.send_response(200)
            self.send_header("Content-Length", "1000")
            self.end_headers()
            self.wfile.write(b'{"choices": [')
        else:
            self.send_response(int(fault))
            for name, value in now.headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

    def answer(self, content: Any, status: int = 200) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


class Server(ThreadingHTTPServer):
    daemon_threads = True

    def process_request(self, request: Any, client_address: Any) -> None:
        with CHANGED:
            UNDER_WAY.add(client_address)
        super().process_request(request, client_address)

    def handle_error(self, *_: Any) -> None:
        """Clients that do not wait are what is tested."""


if __name__ == "__main__":
    torch.set_num_threads(1)
    with Server(("127.0.0.1", 0), Handler) as server, contextlib.suppress(KeyboardInterrupt):
        print(server.server_port, flush=True)
        server.serve_forever()
