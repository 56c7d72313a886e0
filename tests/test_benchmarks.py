"""The benchmark suite itself: it must not report what it did not measure. Nothing here is timed."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from benchmarks import __main__ as runner
from benchmarks import measure, memory, record, summary, workloads
from benchmarks.providers import EAGER_FORMULAS, PROVIDERS, Answer, Provider
from benchmarks.workloads import Inputs, Workload

TINY = Workload("kd_ce/fp32/tiny/T2", rows=4, vocab=50)
LINEAR = Workload("linear/fp32/tiny", rows=70, vocab=50, hidden=8)  # two slices of the oracle
#: Who takes part in the end-to-end test, by group of workloads.
EXPECTED = {
    "kd_ce": {"fused", "kernel", "eager", "eager_log_target", "fused_torch"},
    "forward": {"fused", "kernel", "eager", "eager_log_target", "fused_torch"},
    "divergence": {"fused", "kernel", "kernel_forward_kl", "eager_log_target"},
    "linear": {"fused_linear", "products", "fused", "eager", "chunked_linear"},
    "linear_chunk": {"chunk_256M", "chunk_512M"},
}


@pytest.fixture
def tiny_suite(monkeypatch):
    """One workload of each kind that does not need a compiler."""
    kinds = [
        TINY,
        Workload("forward/bf16/tiny/T2", 4, 50, "bf16", backward=False),
        Workload("divergence/fp32/jsd", 4, 50, divergence="jsd"),
        LINEAR,
        dataclasses.replace(LINEAR, name="linear_chunk/fp32/tiny"),
        dataclasses.replace(LINEAR, name="linear_memory/fp32/tiny/N70"),
    ]
    monkeypatch.setattr(workloads, "suite", lambda quick=False, device="cpu": kinds)
    monkeypatch.setattr(measure, "SAMPLE_SECONDS", 1e-4)
    monkeypatch.setattr(runner.machine, "_ARRAY_BYTES", 1 << 16)
    monkeypatch.setattr(runner, "MEMORY_WORKLOADS", (TINY.name,))


def test_the_runner_works_from_end_to_end_and_its_report_comes_from_the_json_alone(
    tiny_suite, tmp_path, capsys
):
    names = "fused,kernel,kernel_forward_kl,eager,eager_log_target,fused_torch"
    names += ",fused_linear,products,chunked_linear,chunk_256M,chunk_512M"
    options = ["--rounds=3", "--threads=1", f"--output={tmp_path}", f"--providers={names}"]
    assert runner.main(options) == 0
    printed = capsys.readouterr().out
    (path,) = tmp_path.glob("*.json")
    run = record.load(path)
    timed = [w for w in workloads.suite() if w.timed]
    assert [c.workload["name"] for c in run.contests] == [w.name for w in timed]
    for contest, workload in zip(run.contests, timed, strict=True):
        subject = contest.entries[workload.subject]
        assert subject.status == "ok", subject.reason
        assert len(subject.wall_ns) == len(contest.rounds) == 3
        took_part = {name for name, e in contest.entries.items() if e.status != "skipped"}
        assert took_part == EXPECTED[workload.group]
        assert all(contest.entries[name].status == "ok" for name in took_part)
    measured = {(m.workload["name"].split("/")[0], m.provider): m.status for m in run.memory}
    linear = ("fused", "eager", "fused_linear", "chunked_linear")
    assert {provider for group, provider in measured if group == "linear_memory"} == {*linear}
    assert set(measured.values()) == {"ok"}
    text = path.with_suffix(".md").read_text()
    assert text in printed
    assert "x products + loss" in text and "Time over `max_chunk_bytes`" in text
    for name in (path.with_suffix(".png"), path.with_name(f"{path.stem}-linear.png")):
        assert name.stat().st_size > 10_000

    again = tmp_path / "again"
    assert runner.main(["report", str(path), f"--output={again}"]) == 0
    text = (again / path.with_suffix(".md").name).read_text()
    assert text == path.with_suffix(".md").read_text()
    assert {p.name for p in again.iterdir()} == {
        p.name for p in tmp_path.iterdir() if p.suffix in (".md", ".png")
    }


@pytest.mark.parametrize("option", ["--providers=nobody", "--workloads=nothing"])
def test_unknown_names_end_with_one_line(option, capsys):
    assert runner.main([option]) == 2
    assert option.split("=")[1] in capsys.readouterr().err


def _altered(factor_loss: float, factor_gradient: float) -> Provider:
    def prepare(workload, inputs):
        step = PROVIDERS["eager"].prepare(workload, inputs)

        def altered() -> Answer:
            loss, (gradient,) = step()
            return Answer(loss * factor_loss, (gradient * factor_gradient,))

        return altered

    return Provider("altered", "fused", prepare)


@pytest.mark.parametrize("factors", [(1.001, 1.0), (1.0, 1.001), (float("nan"), 1.0)])
def test_a_wrong_result_gets_no_speed(factors):
    contest = measure.contest(TINY, [PROVIDERS["eager"], _altered(*factors)], rounds=2)
    entry = contest.entries["altered"]
    assert entry.status == "wrong"
    assert "error" in entry.reason
    assert entry.wall_ns == []
    assert summary.ratio(contest, "eager", "altered") is None
    assert summary.fastest(contest, "fused") is None
    assert len(contest.entries["eager"].wall_ns) == 2


def test_a_wrong_weight_gradient_gets_no_speed():
    def prepare(workload, inputs):
        step = PROVIDERS["fused_linear"].prepare(workload, inputs)

        def altered() -> Answer:
            loss, (to_hidden, to_weight) = step()
            return Answer(loss, (to_hidden, to_weight * 1.001))

        return altered

    entry = measure.contest(LINEAR, [Provider("fused_linear", "linear", prepare)], 1).entries
    assert entry["fused_linear"].status == "wrong"
    assert entry["fused_linear"].reason.startswith("gradient error 0.001")


def test_the_oracle_of_hidden_states_is_that_of_their_logits():
    inputs = LINEAR.make()
    loss, (to_hidden, to_weight), _ = LINEAR.oracle(inputs)
    wide = Inputs(*(t.double() if t.is_floating_point() else t for t in inputs if t is not None))
    student, teacher = wide.logits()
    on_logits = dataclasses.replace(LINEAR, hidden=0)
    same, (gradient,), _ = on_logits.oracle(Inputs(student, teacher, inputs.labels))
    torch.testing.assert_close(loss, same)
    torch.testing.assert_close(to_hidden, gradient @ wide.student_weight)
    torch.testing.assert_close(to_weight, gradient.t() @ wide.student)


def test_materialised_contenders_leave_where_memory_ends():
    long = dataclasses.replace(LINEAR, name="linear_memory/fp32/N65536", rows=65536, vocab=50257)
    for name in ("fused", "eager"):
        assert "GiB" in PROVIDERS[name].absence(long)
    for name in ("fused_linear", "chunked_linear"):
        assert PROVIDERS[name].absence(long) is None


def test_a_contender_that_raises_is_recorded_and_the_others_run():
    def prepare(workload, inputs):
        raise RuntimeError("no such device\nand more")

    contest = measure.contest(TINY, [Provider("broken", "peer", prepare), PROVIDERS["eager"]], 1)
    assert contest.entries["broken"].status == "failed"
    assert contest.entries["broken"].reason == "RuntimeError: no such device"
    assert contest.entries["eager"].status == "ok"


@pytest.mark.parametrize("divergence", EAGER_FORMULAS)
def test_the_eager_formulas_are_those_of_the_package(divergence):
    workload = dataclasses.replace(TINY, divergence=divergence)
    contest = measure.contest(workload, [PROVIDERS["eager_log_target"]], rounds=0)
    assert contest.entries["eager_log_target"].status == "ok"


def _contest(rounds: list[tuple[float, float]], foreign: list[float]) -> record.Contest:
    slow, fast = (list(times) for times in zip(*rounds, strict=True))
    entries = {
        "eager": record.Entry("eager", "eager", wall_ns=slow, cpu_ns=slow),
        "fused": record.Entry("fused", "fused", wall_ns=fast, cpu_ns=fast),
    }
    declared = ("logits", "bytes_moved", "flops", "subject")
    workload = {**vars(TINY), **{name: getattr(TINY, name) for name in declared}}
    order = list(entries)
    return record.Contest(
        workload, entries, [record.Round(order, 1.0, 0.1, f, 0.0) for f in foreign]
    )


def test_ratios_are_taken_round_by_round():
    # The medians alone would say 30 / 2 = 15.
    contest = _contest([(10, 1), (30, 2), (800, 4)], foreign=[0.0] * 3)
    assert summary.ratio(contest, "eager", "fused") == summary.Spread(15, 12.5, 107.5)
    contest = _contest([(10, 2), (30, 1), (20, 4)], foreign=[0.0] * 3)
    assert summary.ratio(contest, "eager", "fused").median == 5


def test_disturbed_rounds_do_not_count_where_enough_are_quiet():
    rounds = [(10.0, 1.0)] * 5 + [(10.0, 5.0)] * 6
    quiet_first = [0.0] * 5 + [0.5] * 6
    assert summary.ratio(_contest(rounds, quiet_first), "eager", "fused").median == 10
    assert summary.ratio(_contest(rounds, [0.5] * 11), "eager", "fused").median == 2


def test_a_target_is_judged_by_its_worst_case():
    contests = [_contest([(100.0, 2.0)], [0.0]), _contest([(90.0, 10.0)], [0.0])]
    contests[1].workload["name"] = "kd_ce/fp32/other/T2"
    run = record.Run({}, {}, {"threads": 2}, contests=contests)
    verdict = summary.verdicts(run)[0]
    assert verdict.cases == {TINY.name: 50, "kd_ce/fp32/other/T2": 9}
    assert verdict.worst == ("kd_ce/fp32/other/T2", 9)
    assert verdict.fulfilled() == [TINY.name]


def test_memory_beyond_the_gradients_is_counted_in_chunks():
    gradients = 4 * 8 * (70 + 50)
    found = record.Memory(dict(vars(LINEAR)), "fused_linear", peak_bytes=gradients + 3000)
    run = record.Run({}, {}, {"threads": 1, "max_chunk_bytes": 2000}, memory=[found])
    (verdict,) = (v for v in summary.verdicts(run) if "linear peak" in v.target.name)
    assert verdict.cases == {LINEAR.name: 1.5}
    assert verdict.fulfilled() == []
    (given,) = (v for v in summary.verdicts(run) if v.target.name.startswith("peak memory"))
    assert not given.cases


@pytest.mark.skipif(not memory.available("cpu"), reason="needs Linux's /proc/self/clear_refs")
def test_the_gradient_of_a_call_counts_although_its_memory_was_kept():
    workload = dataclasses.replace(TINY, rows=256, vocab=32000)
    peak = memory.of_provider("fused", workload, "cpu")
    assert workload.logits * 4 <= peak < 1.5 * workload.logits * 4


def test_shares_of_bandwidth_use_the_declared_bytes():
    contest = _contest([(2000.0, 300.0)], [0.0])
    rates = [{"name": "copy", "threads": n, "median": 8.0 * n, "best": 9.0 * n} for n in (1, 2)]
    run = record.Run({}, {}, {"threads": 2}, bandwidth=rates, contests=[contest])
    assert TINY.bytes_moved == 12 * 4 * 50
    assert summary.floor_per_logit(run, contest) == 12 / 16
    assert summary.bandwidth_share(run, contest, "fused") == pytest.approx(0.5)


def test_the_workload_sizes_are_those_promised():
    for workload in workloads.suite():
        if workload.group in ("kd_ce", "forward", "divergence", "retain"):
            assert 1 << 24 <= workload.logits < 1.2 * (1 << 24)
    names = [w.name for w in workloads.suite()]
    assert len(set(names)) == len(names)


@pytest.mark.skipif(not memory.available("cpu"), reason="needs Linux's /proc/self/clear_refs")
def test_the_memory_measure_sees_an_allocation_and_not_what_was_there_before():
    mebibyte = 1 << 20
    held = torch.ones(64 * mebibyte // 4)

    def allocate() -> None:
        torch.ones(48 * mebibyte // 4)

    found = memory.peak_extra(allocate)
    assert 47 * mebibyte < found < 52 * mebibyte
    assert memory.peak_extra(lambda: None) < 4 * mebibyte
    assert held.numel()
