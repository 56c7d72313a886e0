"""A served teacher: the cache of the model behind the server, what fails on the way, and refusals.

The server is a process of its own on the loopback address, whose faults are set from here.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import command_line
import filelock
import pytest
import tiny_models
import torch
from command_line import options, refused
from transformers import default_data_collator

from kdkernels.commands import main as cli
from kdkernels.training import server as client
from kdkernels.training.processes import from_first_process
from kdkernels.training.served import ServedCache
from kdkernels.training.server import Server, ServerError
from kdkernels.training.teacher_cache import TeacherCache, cache_teacher

pytestmark = pytest.mark.usefixtures("one_thread", "soon")
one_thread = tiny_models.one_thread
llama_assets = command_line.llama_assets
HERE = torch.device("cpu")


class Served:
    """The server, as the tests see it."""

    def __init__(self, port: int) -> None:
        self.root = f"http://127.0.0.1:{port}"
        self.url = f"{self.root}/v1"

    def set(self, **behaviour: Any) -> None:
        """What it does from now on; nothing has been asked yet."""
        body = json.dumps(behaviour).encode()
        urllib.request.urlopen(f"{self.root}/control", body).read()

    def asked(self, path: str = "/v1/completions") -> list[dict[str, Any]]:
        with urllib.request.urlopen(f"{self.root}/control") as answer:
            everything = json.load(answer)["asked"]
        return [one for one in everything if path in ("", one["path"])]


@pytest.fixture(scope="module")
def process() -> Iterator[Served]:
    script = Path(__file__).with_name("serve_teacher.py")
    tests = script.parents[1]
    environment = os.environ | {"PYTHONPATH": f"{tests}:{tests.parent}", "OMP_NUM_THREADS": "1"}
    started = subprocess.Popen(
        [sys.executable, str(script)], stdout=subprocess.PIPE, text=True, env=environment
    )
    assert started.stdout is not None
    try:
        yield Served(int(started.stdout.readline()))
    finally:
        started.kill()
        started.wait()
        started.stdout.close()


@pytest.fixture
def served(process: Served) -> Served:
    process.set()
    return process


@pytest.fixture
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """No time is spent on waiting between two tries."""
    monkeypatch.setattr(client, "_FIRST_WAIT", 0.01)


def items(examples: int = 6) -> list[dict[str, Any]]:
    data = tiny_models.dataset(examples)
    return [data[i] for i in range(examples)]


def cache_of(served: Served, folder: Path, timeout: float = 20.0, **changes: Any) -> ServedCache:
    server = Server(served.url, timeout=timeout, tries=changes.pop("tries", 3))
    chosen: dict[str, Any] = {"vocab": tiny_models.VOCAB, "top_k": 5} | changes
    return ServedCache(server, folder, tiny_models.tokenizer(), **chosen)


def local(folder: Path, examples: list[dict[str, Any]], **options: Any) -> TeacherCache:
    """The cache of the model that is served."""
    teacher, tokenizer = tiny_models.llama(2, seed=2), tiny_models.tokenizer()
    cache_teacher(teacher, tokenizer, examples, default_data_collator, folder, **options)
    return TeacherCache(folder, tokenizer)


# ---- what is asked, and what is kept ------------------------------------------------------------


@pytest.mark.parametrize(
    ("form", "named"), [("prompt_logprobs", "auto"), ("echo", "auto"), ("echo", "echo")]
)
def test_the_cache_is_that_of_the_model(
    form: str, named: str, served: Served, tmp_path: Path
) -> None:
    served.set(echo_only=form == "echo")
    examples = [*items(), {"input_ids": [2, 3, 4]}, {"input_ids": [5]}]
    cache = cache_of(served, tmp_path / "served", form=named)
    cache.fill(examples)
    asked = served.asked()
    # The first text was asked for in the other form, too, where that is not known.
    assert len(asked) == 8 + (form != "prompt_logprobs" and named == "auto")
    assert all(form in one for one in asked[1:])
    want = local(tmp_path / "local", items(), top_k=5)
    batch = default_data_collator(items())
    for opened in (cache, TeacherCache(tmp_path / "served", tiny_models.tokenizer())):
        ours, theirs = (one.entries(batch, HERE) for one in (opened, want))
        assert torch.equal(ours.ids[:, :-1], theirs.ids[:, :-1])
        torch.testing.assert_close(
            ours.log_probs[:, :-1], theirs.log_probs[:, :-1], rtol=1e-5, atol=1e-5
        )
        assert (ours.ids[:, -1] == -1).all() and (ours.log_probs[:, -1] == -torch.inf).all()
    cache.fill([{"input_ids": [7, 7]}])  # it is whole
    assert len(served.asked()) == len(asked) and not (tmp_path / "served/filling.json").exists()


@pytest.mark.parametrize(("tail", "temperature"), [("bucket", 1.0), ("renormalize", 2.0)])
def test_training_asks_once_and_is_that_of_a_cache_of_the_model(
    tail: str, temperature: float, served: Served, tmp_path: Path
) -> None:
    arguments: dict[str, Any] = {"cache_tail": tail, "temperature": temperature, "max_steps": 6}
    cache = cache_of(served, tmp_path / "served")
    ours = tiny_models.trainer(tmp_path, teacher=None, teacher_cache=cache, **arguments)
    assert served.asked("") == []
    data = [ours.train_dataset, ours.eval_dataset]
    examples = [one[i] for one in data for i in range(len(one))]
    ours.train()
    evaluated = ours.evaluate()
    assert len(served.asked()) == len(examples)  # 6 steps are two epochs
    want = local(tmp_path / "local", examples, top_k=5)
    theirs = tiny_models.trainer(tmp_path, teacher=None, teacher_cache=want, **arguments)
    theirs.train()
    assert evaluated["eval_kd_loss"] == pytest.approx(theirs.evaluate()["eval_kd_loss"], rel=1e-5)
    for a, b in zip(ours.state.log_history, theirs.state.log_history, strict=True):
        for name in {"loss", "kd_loss", "agreement"} & a.keys():
            assert a[name] == pytest.approx(b[name], rel=1e-5), name
    again = cache_of(served, tmp_path / "served")
    tiny_models.trainer(tmp_path, teacher=None, teacher_cache=again, **arguments).train()
    assert len(served.asked()) == len(examples) and len(served.asked("/v1/models")) == 2


def test_an_interrupted_cache_goes_on(served: Served, tmp_path: Path) -> None:
    served.set(fault="400", sound=4)
    with pytest.raises(
        ServerError, match=r"own words\"; 4 of 6 texts are in '.*served', from where"
    ):
        cache_of(served, tmp_path / "served", requests=1).fill(items())
    with pytest.raises(ValueError, match=r"holds no finished cache \(no cache.json\)"):
        TeacherCache(tmp_path / "served")
    served.set()
    for changes, examples, message in [
        (
            {"top_k": 4},
            items(),
            "another cache_top_k: it holds the top 5, this run wants the top 4",
        ),
        ({"vocab": 18}, items(), "6 examples and 17 entries (this run's: 6 and 18)"),
        ({}, items(5), "was begun for another text or vocabulary, 6 examples"),
    ]:
        with pytest.raises(ValueError) as refusal:
            cache_of(served, tmp_path / "served", **changes).reach(examples)
        assert message in str(refusal.value)
    assert served.asked() == []
    cache = cache_of(served, tmp_path / "served")
    cache.reach(items())
    assert "4 of 6 texts are in" in cache.outlook and cache.info.name == "tiny"
    cache.fill(items())
    assert len(served.asked()) == 2 and cache.info.examples == 6
    served.set(models=[{"id": "tiny", "root": "another"}])
    with pytest.raises(ValueError, match="was made with another model"):
        cache_of(served, tmp_path / "served").fill(items())
    served.set()
    with pytest.raises(ValueError, match="another cache_top_k"):
        cache_of(served, tmp_path / "served", top_k=4).fill(items())
    with pytest.raises(ValueError, match="lacks 1 of 7 examples"):
        cache_of(served, tmp_path / "served").fill(items(7))
    cache_of(served, tmp_path / "served").fill(items(3))  # it has them
    assert served.asked() == []


def test_only_one_run_fills_a_cache(served: Served, tmp_path: Path) -> None:
    cache = cache_of(served, tmp_path / "cache")
    cache.reach(items())
    (tmp_path / "cache").mkdir()
    with (
        filelock.FileLock(tmp_path / "cache" / ".kdkernels-filling.lock"),
        pytest.raises(ValueError, match="is being filled by another run"),
    ):
        cache.fill(items())
    cache_of(served, tmp_path / "cache").fill(items())
    cache.fill(items())  # the other run has answered all
    assert len(served.asked()) == 2 + 5
    with pytest.raises(ValueError, match="there are no examples to ask a server for"):
        cache_of(served, tmp_path / "none").fill([])


# ---- what fails on the way ----------------------------------------------------------------------


@pytest.mark.parametrize(("path", "requests"), [("/v1/models", 1), ("/v1/completions", 3)])
@pytest.mark.parametrize("fault", ["503", "429", "408", "drop", "short"])
def test_what_passes_is_tried_again(
    fault: str, path: str, requests: int, served: Served, tmp_path: Path
) -> None:
    served.set(fault=fault, path=path, times=2, sound=requests - 1)
    cache = cache_of(served, tmp_path)
    cache.fill(items(3))
    assert cache.info.examples == 3 and len(served.asked(path)) == 2 + requests


def test_what_hangs_is_tried_again(served: Served, tmp_path: Path) -> None:
    served.set(fault="hang", sound=1, times=2)  # both of the others at once
    cache_of(served, tmp_path, timeout=2.0).fill(items(3))
    assert len(served.asked()) == 2 + 3


def test_a_server_that_asks_for_time_gets_it(served: Served, tmp_path: Path) -> None:
    served.set(fault="429", times=1, headers={"Retry-After": "1"})
    began = time.monotonic()
    cache_of(served, tmp_path / "a").fill(items(2))
    assert 1 <= time.monotonic() - began < 10
    served.set(fault="503", headers={"Retry-After": "3600"})
    with pytest.raises(ServerError, match=r"no answer in 1 try: status 503.*it asks for 3600 s"):
        cache_of(served, tmp_path / "b").fill(items(2))
    assert client._seconds("Wed, 21 Oct 2015 07:28:00 GMT") == 0
    assert [client._seconds(text) for text in (None, "", "soon", "-1")] == [None] * 4


def test_a_key_is_sent_and_told_nowhere(
    served: Served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(client.KEY_VARIABLE, "k3y")
    served.set(fault="401", body='{"error": {"message": "k3y is not a key of\\u001b ours"}}')
    with pytest.raises(
        ServerError, match=r"status 401, '\*\*\* is not a key of\? ours'"
    ) as refusal:
        cache_of(served, tmp_path).fill(items(2))
    assert "k3y" not in str(refusal.value)
    assert {one["key"] for one in served.asked("")} == {"Bearer k3y"}
    monkeypatch.setenv(client.KEY_VARIABLE, "a\nb")
    with pytest.raises(ValueError, match="its value has characters that no header can hold"):
        cache_of(served, tmp_path)


LOOP: dict[str, Any] = {"fault": "302", "headers": {"Location": "/v1/models"}}
PAGE: dict[str, Any] = {"fault": "200", "body": "<html>hello</html>"}
PAGE |= {"headers": {"Content-Type": "text/html"}}
#: What the server does -> the error of a request, after which there is no other one.
FINAL: list[tuple[dict[str, Any], str]] = [
    ({"fault": "404"}, "/v1/completions: status 404, \"the server's own words\""),
    ({"fault": "401", "path": "/v1/models"}, "/v1/models: status 401"),
    ({"fault": "404", "path": "/v1/models"}, "an address often ends in /v1"),
    (LOOP | {"path": "/v1/models"}, "302, it is at '/v1/models'; redirects are not followed"),
    (LOOP, "/v1/completions: status 302, it is at '/v1/models'"),
    (PAGE, "its answer (text/html) is no JSON"),
    ({"fault": "200", "body": '{"choices": [{"tex'}, "is no JSON (Unterminated string"),
    ({"fault": "200", "body": ""}, "is no JSON"),
    ({"fault": "200", "body": "[" * 100_000}, "is no JSON"),
    ({"fault": "200", "body": "[1]"}, "its answer is a JSON list, no object"),
    ({"fault": "200", "body": '{"choices": []}'}, "its answer has not one choice"),
    ({"fault": "200", "body": "[]", "path": "/v1/models"}, "is a JSON list"),
    ({"models": ["tiny"]}, "its answer is no list of models"),
    ({"models": []}, "teacher_name: needed, since"),
    ({"models": [{"id": "a"}, {"id": "b"}]}, "serves not one model: a, b"),
    ({"models": [{"id": "tiny", "max_model_len": 12}]}, "generates are more than the 12 that"),
    ({"patch": "no logprobs"}, "says no log-probabilities of a prompt (prompt_logprobs: http://127"),
    ({"patch": "fewer"}, "prompt_logprobs: 11 positions of 12 tokens"),
    ({"patch": "more"}, "prompt_logprobs: 13 positions of 12 tokens"),
    ({"patch": "shifted"}, "nothing is said of token"),
    ({"patch": "renamed"}, "the server's tokenizer is not the student's: id"),
    ({"patch": "beyond"}, "id 17 is outside of the student's vocabulary of 17"),
    ({"patch": "far beyond"}, "/v1/completions: "),
    ({"patch": "nan"}, "id 16: nan is not the natural logarithm"),
    ({"patch": "text"}, "id 16: expected a number, got 'x'"),
    ({"patch": "linear"}, "the probabilities of what follows token 0 add up to"),
    ({"tokenize": "wrong"}, "the server's tokenizer is not the student's: 'w"),
]  # fmt: skip


@pytest.mark.parametrize(("behaviour", "message"), FINAL)
def test_one_error_and_no_second_try(
    behaviour: dict[str, Any], message: str, served: Served, tmp_path: Path
) -> None:
    served.set(**behaviour)
    cache = cache_of(served, tmp_path / "cache")
    with pytest.raises((ServerError, ValueError)) as refusal:
        cache.fill(items(3))
    told = str(refusal.value)
    assert message in told and len(told) < 1500
    # The answer decides, not how often it is given: once in each form.
    asked = [json.dumps(one) for one in served.asked("")]
    assert len(set(asked)) == len(asked) and not (tmp_path / "cache").exists()
    with pytest.raises(type(refusal.value)) as again:
        cache.fill(items(3))
    assert str(again.value) == told


def test_nobody_is_waited_for_forever(served: Served, tmp_path: Path) -> None:
    for fault in ("hang", "trickle"):
        served.set(fault=fault)
        began = time.monotonic()
        with pytest.raises(ServerError, match=r"no answer in 2 tries: no answer within 0\.3 s"):
            cache_of(served, tmp_path, timeout=0.3, tries=2).fill(items(2))
        assert time.monotonic() - began < 10
    closed = Server("http://127.0.0.1:1/v1", tries=2)
    with pytest.raises(
        ServerError, match=r"http://127.0.0.1:1/v1/models: no answer in 2 tries: Conn"
    ):
        closed.ask("/models")


def test_an_interrupt_waits_for_nobody(served: Served, tmp_path: Path) -> None:
    served.set(fault="hang", sound=2)
    main = threading.main_thread().ident
    assert main is not None
    interrupted: list[float] = []

    def interrupt() -> None:
        while len(served.asked()) < 4:  # two are answered, two hang
            time.sleep(0.05)
        time.sleep(0.5)
        interrupted.append(time.monotonic())
        signal.pthread_kill(main, signal.SIGINT)

    threading.Thread(target=interrupt, daemon=True).start()
    with pytest.raises(KeyboardInterrupt):
        cache_of(served, tmp_path / "cache", timeout=60, requests=2).fill(items())
    assert time.monotonic() - interrupted[0] < 5
    served.set()
    cache = cache_of(served, tmp_path / "cache")
    cache.reach(items())
    assert "2 of 6 texts are in" in cache.outlook


def test_an_unsaid_tokenizer_is_compared_by_answers(served: Served, tmp_path: Path) -> None:
    served.set(tokenize="missing")
    cache_of(served, tmp_path / "a", name="tiny").fill(items(2))
    served.set(tokenize="missing", patch="renamed")
    with pytest.raises(ServerError, match="is not the student's: id"):
        cache_of(served, tmp_path / "b").fill(items(2))
    with pytest.raises(
        ValueError, match=r"teacher_name: 'huge' is not served at .*; what is: tiny"
    ):
        cache_of(served, tmp_path / "b", name="huge").fill(items(2))


# ---- several processes --------------------------------------------------------------------------


def worker(rank: int, store: str, served: Served, folder: Path, told: Any) -> None:
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=2
    )
    try:
        cache = cache_of(served, folder, tries=1)
        cache.fill(items())
        told.put(
            (rank, cache.info.examples, str(cache.entries(default_data_collator(items()), HERE)))
        )
    except Exception as error:
        told.put((rank, type(error).__name__, str(error)))
    torch.distributed.destroy_process_group()
    told.close()
    told.join_thread()
    os._exit(0)


@pytest.mark.parametrize("fault", [None, "500"])
def test_one_of_two_processes_asks(fault: str | None, served: Served, tmp_path: Path) -> None:
    served.set(fault=fault, sound=3)
    context = multiprocessing.get_context("fork")
    told = context.Queue()
    arguments = (str(tmp_path / "store"), served, tmp_path / "cache", told)
    both = [
        context.Process(target=worker, args=(rank, *arguments), daemon=True) for rank in range(2)
    ]
    for one in both:
        one.start()
    (_, *first), (_, *second) = sorted(told.get(timeout=60) for _ in both)
    for one in both:
        one.join()
    if fault is None:
        assert first == second and first[0] == 6 and len(served.asked()) == 6
    else:
        assert (first[0], second[0]) == ("FillError", "RuntimeError")
        assert first[1] == second[1] and "no answer in 1 try: status 500" in first[1]


def test_processes_that_are_not_connected_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(RuntimeError, match="make the DistillationArguments first"):
        from_first_process(lambda: None)


# ---- the command line ---------------------------------------------------------------------------


@pytest.fixture
def words(llama_assets: Path, served: Served, tmp_path: Path, monkeypatch: Any) -> Any:
    """A small valid command line that names the server."""
    monkeypatch.setenv("KDKERNELS_CACHE", str(tmp_path / "kept"))
    start: dict[str, Any] = {"teacher": None, "teacher_url": served.url, "student_layers": None}
    start |= {"student": llama_assets / "other", "cache_top_k": 5, "baseline": "false"}
    return lambda output="out", **changes: options(
        llama_assets, tmp_path / output, **start | changes
    )


def test_a_run_by_the_command_line(
    words: Any, served: Served, tmp_path: Path, capfd: Any, monkeypatch: Any
) -> None:
    monkeypatch.setenv(client.KEY_VARIABLE, "a-secret-key")
    saving = {"save_strategy": "steps", "save_steps": 2, "cache_tail": "bucket"}
    assert cli.main(words(**saving)) == 0
    texts = len(served.asked())
    told = capfd.readouterr()
    assert f"'tiny' at {served.url} teaches by its top 5; 0 of {texts} texts are in" in told.err
    report = (tmp_path / "out/report.md").read_text()
    assert "# Student of tiny" in report and "nothing is measured of it" in report
    assert "taught by tiny\n(as it was served)" in (tmp_path / "out/student/README.md").read_text()
    found = json.loads((tmp_path / "out/results.json").read_text())
    assert found["teacher"] == "tiny" and found["rows"][0]["parameters"] is None
    # Resumed, in another folder, and swept: nothing is asked but which model it is.
    (tmp_path / "out/distilled/checkpoint-4").rename(tmp_path / "gone")
    assert cli.main(words(**saving, resume_from_checkpoint="true")) == 0
    sweep = ["sweep", *words("sweep")[1:], "--sweep_temperatures=1", "--sweep_alphas=0.5"]
    assert cli.main(sweep) == 0
    assert len(served.asked()) == texts and len(served.asked("/v1/models")) == 3
    # And nothing at all of a cache that is named instead.
    (folder,) = (tmp_path / "kept").iterdir()
    served.set()
    without = {"teacher_url": None, "cache_top_k": None, "teacher_cache": folder}
    assert cli.main(words("alone", **saving, **without)) == 0 and served.asked("") == []
    rows = [
        json.loads((tmp_path / f / "results.json").read_text())["rows"] for f in ("out", "alone")
    ]
    assert rows[0][-1]["divergence"] == rows[1][-1]["divergence"]
    for file in filter(Path.is_file, tmp_path.rglob("*")):
        assert b"a-secret-key" not in file.read_bytes(), file


def test_a_cache_by_the_command_line_and_a_failing_one(
    words: Any, served: Served, tmp_path: Path, capfd: Any
) -> None:
    served.set(fault="500", sound=5)
    few = {"teacher_cache": tmp_path / "cache", "teacher_tries": 1}
    assert cli.main(words(**few)) == 1  # it had begun
    told = capfd.readouterr().err.splitlines()[-1]
    assert told.startswith("kdkernels distill: error: teacher_url: http://127.0.0.1")
    assert "no answer in 1 try: status 500" in told and not (tmp_path / "out").exists()
    served.set(fault="500", sound=1)
    caching = ["cache-teacher", *words(**few)[1:]]
    assert cli.main(caching) == 1 and "texts are in" in capfd.readouterr().err
    served.set()
    assert cli.main(caching) == 0
    assert "the top 5 at T = 1.0 of 17" in capfd.readouterr().out


#: Options -> why they are refused before the server is asked.
REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"teacher": "{assets}/teacher"}, "teacher_url: give a teacher or the address of its ser"),
    ({"teacher_url": "127.0.0.1:8000/v1"}, "'127.0.0.1:8000/v1' is no address such as http://"),
    ({"teacher_url": "localhost"}, "teacher_url: 'localhost' is no address"),
    ({"teacher_url": "ftp://host/v1"}, "'ftp://host/v1' is no address"),
    ({"teacher_url": "http://host:port/v1"}, "teacher_url: 'http://host:port/v1': Port"),
    ({"teacher_url": "http:///v1"}, "is no address"),
    ({"teacher_url": "http://[::1/v1"}, "teacher_url: 'http://[::1/v1': Invalid IPv6"),
    ({"teacher_url": "http://me:secret@host/v1"}, "teacher_url: 'http://***@host/v1' holds a name"),
    ({"teacher_url": "http://host/v1?key=x"}, "holds more than an address"),
    ({"teacher_url": None}, "give --teacher, or --teacher_url, or the --teacher_cache"),
    ({"teacher_url": None, "teacher_name": "x"}, "teacher_name: 'x' has no effect; it needs teach"),
    ({"teacher_logprobs": "chat"}, "teacher_logprobs: 'chat' is not one of auto, prompt_lo"),
    ({"teacher_requests": 0}, "teacher_requests: 0 is not at least 1"),
    ({"teacher_tries": 0}, "teacher_tries: 0 is not at least 1"),
    ({"teacher_timeout": "nan"}, "teacher_timeout: nan is no number of seconds above 0"),
    ({"cache_top_k": 0}, "cache_top_k: 0 is not at least 1"),
    ({"cache_top_k": 17}, "cache_top_k: 17 is not in 1..16"),
    ({"cache_top_k": None, "cache_samples": 3}, "cache_samples: a server gives the top"),
    ({"temperature": 2}, "5 at temperature 1.0 cannot be used at 2.0; with cache_tail renormalize"),
    ({"temperature": 2, "cache_tail": "bucket"}, "cannot be used at 2.0"),
    ({"cache_tail": "none"}, "cache_tail: 'none' is for samples of a teacher"),
    ({"terms": "hidden=1"}, "terms: hidden need the teacher itself"),
    ({"teacher_dtype": "bfloat16"}, "teacher_dtype: 'bfloat16' has no effect on a served teacher"),
    ({"task": "masked-lm"}, "teacher_url: alone it teaches causal-lm, not masked-lm"),
    ({"student": None, "student_layers": "0"}, "teacher_url: student_layers need the teacher"),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "message"), REFUSED)
def test_refused_before_a_request(
    changes: dict[str, Any], message: str, words: Any, served: Served, llama_assets: Any, capfd: Any
) -> None:
    filled = {
        k: v.format(assets=llama_assets) if isinstance(v, str) else v for k, v in changes.items()
    }
    refused(words(**filled), message, capfd)
    assert served.asked("") == []


def test_a_sweep_is_refused_before_a_request(words: Any, served: Served, capfd: Any) -> None:
    refused(["sweep", *words()[1:]], "cannot be used at 1.0, 2.0, 4.0, 8.0", capfd)
    assert served.asked("") == []
