"""The benchmark suite itself: it must not report what it did not measure. Nothing here is timed."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import sys
import time

import pytest
import torch

from benchmarks import __main__ as runner
from benchmarks import gpu_day, measure, memory, providers, record, report, summary, workloads
from benchmarks.gpu_day import plan, steps
from benchmarks.providers import EAGER_FORMULAS, PROVIDERS, Answer, Provider
from benchmarks.workloads import Inputs, Workload

TINY = Workload("kd_ce/fp32/tiny/T2", rows=4, vocab=50)
LINEAR = Workload("linear/fp32/tiny", rows=70, vocab=50, hidden=8)  # two slices of the oracle
#: Who takes part in the end-to-end test, by group of workloads.
EXPECTED = {
    "kd_ce": {"fused", "kernel", "eager", "eager_log_target", "fused_torch"},
    "forward": {"fused", "kernel", "eager", "eager_log_target", "fused_torch"},
    "divergence": {"fused", "kernel", "kernel_forward_kl", "eager_log_target"},
    "topk": {"fused_topk", "eager_topk", "fused_dense"},
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
        Workload("topk/fp32/tiny/K3", 4, 50, entries=3),
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
    names += ",fused_topk,eager_topk,fused_dense"
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


@pytest.mark.parametrize(
    "option",
    [
        "--rounds=0",
        "--threads=-1",
        "gpu-day first --limit=nan",
        "gpu-day first --limit=0",
        "gpu-day second --only=nothing",
        "report nothing.json",
    ],
)
def test_what_cannot_be_run_is_named_before_it_runs(option, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with contextlib.suppress(SystemExit):  # argparse's
        assert runner.main(option.split()) == 2
    printed = capsys.readouterr()
    assert option.split()[-1].split("=")[-1] in (printed.err + printed.out).splitlines()[-1]


def test_a_file_is_no_report_and_no_folder(tiny_suite, capsys, tmp_path):
    text = tmp_path / "text.md"
    text.write_text("no JSON")
    for words in (["report", str(text)], [f"--output={text}"]):
        assert runner.main(words) == 2
        assert str(text) in capsys.readouterr().err


def test_what_was_measured_is_kept_when_a_run_ends_early(tiny_suite, tmp_path, monkeypatch):
    contest, calls = measure.contest, []

    def second_is_interrupted(*args, **options):
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return contest(*args, **options)

    monkeypatch.setattr(measure, "contest", second_is_interrupted)
    with pytest.raises(KeyboardInterrupt):
        runner.main(["--rounds=2", "--threads=1", "--providers=eager", f"--output={tmp_path}"])
    (path,) = tmp_path.glob("*.json")
    assert len(record.load(path).contests) == 1


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


# --- what a GPU needs besides ---------------------------------------------------------------------


@pytest.fixture
def sampled(monkeypatch):
    """A workload that is checked like the large ones: rows by sample, the loss in slices."""
    monkeypatch.setattr(workloads, "WHOLE_LOGITS", 0)
    monkeypatch.setattr(workloads, "SAMPLED_ROWS", 20)
    monkeypatch.setattr(workloads, "_SLICE_LOGITS", 7 * TINY.vocab)
    return dataclasses.replace(TINY, rows=200)


def test_the_oracle_of_a_sample_is_that_of_the_whole(sampled, monkeypatch):
    inputs = sampled.make()
    loss, (gradient,), rows = sampled.oracle(inputs)
    assert {0, sampled.rows - 1} <= set(rows.tolist())
    assert 10 < len(rows) < sampled.rows
    monkeypatch.setattr(workloads, "WHOLE_LOGITS", sampled.logits)
    whole, (of_all,), none = sampled.oracle(inputs)
    assert none is None
    torch.testing.assert_close(loss, whole)
    torch.testing.assert_close(gradient, of_all[rows])


@pytest.mark.parametrize("row", [0, -1])
def test_a_wrong_row_of_the_sample_gets_no_speed(sampled, row):
    def prepare(workload, inputs):
        step = PROVIDERS["eager"].prepare(workload, inputs)

        def altered() -> Answer:
            loss, (gradient,) = step()
            gradient[row] *= 1.01
            return Answer(loss, (gradient,))

        return altered

    contest = measure.contest(sampled, [PROVIDERS["eager"], Provider("off", "peer", prepare)], 1)
    assert contest.entries["eager"].status == "ok"
    assert contest.entries["off"].status == "wrong"


def test_a_floor_has_no_answer_to_check():
    contest = measure.contest(LINEAR, [PROVIDERS["bare_products"]], 1)
    entry = contest.entries["bare_products"]
    assert entry.status == "ok" and len(entry.wall_ns) == 1
    assert entry.loss_error is None and entry.gradient_error is None


def test_what_only_a_gpu_has_does_not_compete_on_a_cpu():
    here, there = ({p.name for p in providers.unasked(device)} for device in ("cpu", "cuda"))
    assert there - here >= {"kernel_cuda", "kernel_triton", "kernel_registers_8", "liger_jsd"}
    assert not here - there


def test_the_gpu_workloads_are_large_and_each_has_contenders():
    suite = workloads.suite(device="cuda")
    names = [w.name for w in suite]
    assert len(set(names)) == len(names)
    for workload in suite:
        if workload.group in ("kd_ce", "variant", "peer"):
            assert (1 << 27) < workload.logits < (1 << 31)
        asked = [p for p in PROVIDERS.values() if not workload.excludes(p.name, p.family)]
        assert workload.subject in {p.name for p in asked}
        tiny = workloads.tiny(workload)
        assert tiny.name == workload.name and tiny.logits <= 1 << 18


def test_a_variant_is_forced_during_its_call_only(monkeypatch):
    seen = []

    def kernel(name):
        assert name == "cuda"
        return lambda workload, inputs: (
            lambda: seen.append(
                [os.environ.get(f"KDKERNELS_CUDA_{what}") for what in ("KERNEL", "CLUSTER")]
            )
        )

    monkeypatch.setattr(providers, "_kernel", kernel)
    monkeypatch.setenv("KDKERNELS_CUDA_CLUSTER", "2")
    providers._variant("registers", 16)(TINY, TINY.make())()
    assert seen == [["registers", "16"]]
    assert "KDKERNELS_CUDA_KERNEL" not in os.environ
    assert os.environ["KDKERNELS_CUDA_CLUSTER"] == "2"


def _gpu_run(tmp_path) -> record.Run:
    """A GPU's run as its processes leave it, line by line, read again."""
    lines = tmp_path / "lines.jsonl"
    machine = {"device": "NVIDIA H200", "cpu": "x86", "family_model": [], "cores": 16}
    machine |= {"huge_pages": "", "caches": [], "kernel_isa": "avx512", "torch_isa": "AVX512"}
    versions = {"date": "2026-11-26T12:00:00+00:00", "torch": "2.11.0", "commit": "0" * 40}
    options = {"device": "cuda", "dry": False, "threads": 1, "max_chunk_bytes": 1 << 28}
    about = {"machine": machine, "versions": versions, "options": options}
    record.append(lines, "about", about)
    for name, gigabytes in (("add", 4340.0), ("add_bf16", 4350.0)):
        found = {"name": name, "threads": 1, "median": gigabytes, "best": gigabytes}
        record.append(lines, "bandwidth", found)
    for workload in workloads.suite(device="cuda"):
        times = {"fused": 3e6, "kernel": 2.9e6, "compile": 7.5e6, "eager": 60e6}
        if workload.hidden:
            times = {"fused_linear": 30e6, "bare_products": 25e6, "eager": 60e6}
        entries = {
            name: record.Entry(
                name, PROVIDERS[name].family, "ok", "", 1e-8, 1e-3, 1, [ns], [ns / 9]
            )
            for name, ns in times.items()
        }
        rounds = [record.Round(list(times), 0.1, 1.0, 0.0, 0.0)]
        if workload.group == "smoke":
            refusal = (
                "ValueError: KDKERNELS_CUDA_KERNEL='shared' cannot run this problem: it is long"
            )
            entries = {
                "kernel_registers": record.Entry("kernel_registers", "variant"),
                "kernel_shared": record.Entry("kernel_shared", "variant", "failed", refusal),
            }
            rounds = []
        declared = ("logits", "bytes_moved", "flops", "subject")
        described = vars(workload) | {name: getattr(workload, name) for name in declared}
        record.append(lines, "contest", record.Contest(described, entries, rounds))
        if rounds:
            peak = record.Memory(dict(vars(workload)), "fused", peak_bytes=3 * workload.logits)
            record.append(lines, "memory", peak)
    record.append(lines, "clusters", {"blocks": 8, "clusters": 15})
    return record.collect(lines)


def test_a_gpus_report_comes_from_its_lines_alone(tmp_path):
    run = _gpu_run(tmp_path)
    assert run.machine["clusters"] == [{"blocks": 8, "clusters": 15}]
    path = tmp_path / "gpu.json"
    run.save(path)
    text, written = report.write(record.load(path), tmp_path, "gpu")
    assert text == report.markdown(run)
    assert {p.name for p in written} == {"gpu.md", "gpu.png", "gpu-linear.png"}
    # 6.3 GB in 3 ms of the 4350 GB/s that two reads and a write reach in bfloat16.
    assert "3.00 ms, 2101 GB/s, 48%" in text
    smoke = sum(w.group == "smoke" for w in workloads.suite(device="cuda"))
    right = f"{smoke} results right, {smoke} refused by name, 0 wrong or failed."
    assert right in text and right in report.digest(run)
    assert "Small batches" in text and "3.00 ms (333.3 us)" in text
    verdicts = {v.target.name: v for v in summary.verdicts(run)}
    assert verdicts["8192 x 128256 bf16 on an H200"].worst == ("kd_ce/bf16/8192x128256/T2", 3.0)
    assert verdicts["8192 x 128256 bf16 on an H100"].worst is None
    assert verdicts["vs best torch.compile"].worst[1] == 2.5
    assert verdicts["vs fastest eager"].worst[1] == 20
    assert verdicts["linear vs bare products"].worst[1] == 1.2


@dataclasses.dataclass(frozen=True)
class _Program(plan.Step):
    """A step that is any program."""

    program: str = ""

    def command(self, output, seconds, dry):
        return [sys.executable, "-c", self.program]


def test_a_step_that_hangs_ends_with_its_children_and_the_next_one_runs(tmp_path, monkeypatch):
    child = tmp_path / "child"
    hangs = (
        "import subprocess, sys, time; print('before', flush=True);"
        "p = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)']);"
        f"open({str(child)!r}, 'w').write(str(p.pid)); time.sleep(600)"
    )
    half = (
        _Program("beside", 30, beside=True, program="print('beside')"),
        _Program("hangs", 3, program=hangs),
        _Program("fails", 30, gate=False, program="raise SystemExit(3)"),
        _Program("after", 30, alone=True, program="print('after')"),
    )
    monkeypatch.setitem(plan.HALVES, "first", half)
    assert plan.run("first", tmp_path, 60, dry=False) == 1
    said = (tmp_path / "summary.txt").read_text()
    assert "hangs: rc 124 (its time ran out)" in said
    assert all(f"    {text}\n" in said for text in ("before", "beside", "after"))
    assert "failed: hangs\n" in said
    outcomes = record.collect(tmp_path / "lines.jsonl").machine["steps"]
    found = [(o["name"], o["rc"]) for o in outcomes]
    assert found == [("hangs", 124), ("fails", 3), ("beside", 0), ("after", 0)]
    pid = int(child.read_text())
    deadline = time.monotonic() + 10
    while _runs(pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not _runs(pid)


def _runs(pid: int) -> bool:
    """Not a process that has ended and waits for whoever adopts it to say so."""
    try:
        return open(f"/proc/{pid}/stat").read().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def test_a_half_stops_where_its_time_ends(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(plan.HALVES, "first", (_Program("late", 1),))
    assert plan.run("first", tmp_path, plan._REPORT_SECONDS + 1, dry=True) == 0
    assert "no time left" in capsys.readouterr().out


def test_a_half_is_rehearsed_from_its_processes_to_its_report(tmp_path, capsys):
    only = "divergences"
    assert gpu_day.main(["second", "--dry", f"--only={only}", f"--output={tmp_path}"]) == 0
    assert "all went well" in capsys.readouterr().out
    run = record.load(tmp_path / "gpu-day.json")
    assert run.options["dry"] and {c.workload["name"].split("/")[0] for c in run.contests}
    assert all(c.entries["fused"].status == "ok" for c in run.contests)
    # As many files as come back from a lent machine, and no more.
    assert len(list(tmp_path.iterdir())) <= 8


@pytest.mark.parametrize("name", ["own", "small", "variants", "counted", "ceilings"])
def test_steps_are_rehearsed(name, tmp_path, monkeypatch):
    for module, size in ((measure, "SAMPLE_SECONDS"), (runner.machine, "_ARRAY_BYTES")):
        monkeypatch.setattr(module, size, getattr(module, size))  # a rehearsal makes it small
    arguments = ["step", name, "--dry", f"--output={tmp_path}"]
    assert gpu_day.main(arguments) == 0


def test_a_step_with_a_wrong_result_of_ours_fails(tmp_path, monkeypatch):
    def steps_providers(device):
        return [dataclasses.replace(_altered(1.0, 1.1), name=name) for name in names]

    monkeypatch.setattr(measure, "SAMPLE_SECONDS", measure.SAMPLE_SECONDS)
    monkeypatch.setattr(steps, "unasked", steps_providers)
    arguments = ["step", "own", "--dry", f"--output={tmp_path}"]
    names = ["theirs"]
    assert gpu_day.main(arguments) == 0
    names = ["theirs", "fused_cuda"]
    with pytest.raises(SystemExit, match=r"WRONG RESULTS, OR NONE: kd_ce/[^:]*: fused_cuda;"):
        gpu_day.main(arguments)


@pytest.mark.parametrize("carried", ["same", "other", "none"])
def test_the_carried_module_is_taken_only_if_it_is_of_these_sources(carried, tmp_path, monkeypatch):
    monkeypatch.setattr(steps, "ROOT", tmp_path)
    monkeypatch.setattr(steps, "CARRIED", tmp_path / ".gpu")
    monkeypatch.setattr(steps, "fingerprint", lambda: "of these")
    monkeypatch.setattr(steps, "_loads", lambda: True)
    built = []
    monkeypatch.setattr(steps, "build_native", lambda *a, **k: built.append(a))
    for folder in ("kdkernels", ".gpu"):
        (tmp_path / folder).mkdir()
    suffix = steps.sysconfig.get_config_var("EXT_SUFFIX")
    if carried != "none":
        (tmp_path / ".gpu" / f"_native{suffix}").write_text("module")
        stamp = (tmp_path / ".gpu" / f"_native{suffix}").with_suffix(".stamp")
        stamp.write_text("of these" if carried == "same" else "of others")
    steps._find_or_build()
    assert len(built) == (carried != "same")
    module = tmp_path / "kdkernels" / f"_native{suffix}"
    assert module.exists() == (carried == "same")
    module.write_text("module")
    steps._find_or_build()  # it stays
    assert len(built) == (carried != "same")
