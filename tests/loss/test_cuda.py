"""The CUDA backend on a device, and what it says where it cannot run.

The matrix, the contract and the ops run on it through the `backend` fixture of every other test
file. What needs no device to be proved (numbers, races, bounds, traffic) is in tests/simulate.
"""

from __future__ import annotations

import subprocess
import sys

import cases
import pytest
import torch

from kdkernels import fused_kd_loss, label_errors
from kdkernels.backends import BACKENDS, cuda
from kdkernels.dispatch import choose_backend
from kdkernels.problem import Options, Problem

gpu = pytest.mark.gpu
KERNELS = [("registers", c) for c in (1, 2, 4, 8, 16)] + [("shared", 4), ("stream", 0)]


def problem_of(student: torch.Tensor, teacher: torch.Tensor, **options: object) -> Problem:
    return Problem(student, teacher, None, None, None, Options(**options))  # type: ignore[arg-type]


def test_cpu_tensors_are_refused_by_name() -> None:
    probe = torch.zeros(2, 3)
    assert BACKENDS["cuda"].why_not(problem_of(probe, probe)) == [
        "it runs on cuda tensors, not on cpu"
    ]
    if not BACKENDS["cuda"].unavailable():
        with pytest.raises(RuntimeError, match="cuda: it runs on cuda tensors"):
            fused_kd_loss(probe, probe, backend="cuda")


def test_float64_foreign_divergences_and_devices_are_refused_by_name(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(cuda.CudaBackend, "device_type", "cpu")
    monkeypatch.setattr(cuda, "_device_refusal", lambda index: f"device {index} is too old")
    double, single = torch.zeros(2, 3, dtype=torch.float64), torch.zeros(2, 3)
    reasons = BACKENDS["cuda"].why_not(problem_of(single, double, divergence="mine"))
    assert reasons[0] == "device 0 is too old"
    assert reasons[1] == "it has no kernel for float64 (teacher)"
    assert reasons[2] == "it has no kernel for the divergence 'mine'"


def test_entries_that_do_not_fit_beside_a_bit_of_every_column_are_refused_by_name(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(cuda.CudaBackend, "device_type", "cpu")
    monkeypatch.setattr(cuda, "_device_refusal", lambda index: "")
    if cuda._native is None:
        pytest.skip("the native module was not built")
    for vocab, count, fits in ((262144, 256, True), (262144, 2048, False), (1 << 20, 1, False)):
        student = torch.zeros(1).expand(1, vocab)
        ids = torch.zeros(1, count, dtype=torch.int64)
        problem = Problem(
            student, ids.double(), None, None, None, Options(tail="bucket"), teacher_ids=ids
        )
        reasons = BACKENDS["cuda"].why_not(problem)
        assert reasons == [] if fits else f"{count} entries of a row do not fit" in reasons[0]


def test_without_a_device_the_reason_is_listed() -> None:
    reasons = BACKENDS["cuda"].unavailable()
    if torch.cuda.is_available() and cuda._UNAVAILABLE is None:
        assert reasons == []
    else:
        assert len(reasons) == 1
        probe = torch.zeros(2, 3)
        with pytest.raises(RuntimeError, match="backend 'cuda' cannot run this problem"):
            choose_backend(problem_of(probe, probe), "cuda")


def test_what_cuda_refuses_goes_on_to_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    """An old driver, say: `backend=None` takes Triton, `backend="cuda"` raises with the reason."""
    for name in ("cuda", "triton"):
        monkeypatch.setattr(type(BACKENDS[name]), "unavailable", lambda self: [])
    monkeypatch.setattr(type(BACKENDS["cpu"]), "why_not", lambda self, problem: ["a GPU tensor"])
    monkeypatch.setattr(type(BACKENDS["triton"]), "why_not", lambda self, problem: [])
    monkeypatch.setattr(cuda.CudaBackend, "device_type", "cpu")
    probe = torch.zeros(2, 3)
    for refusal, chosen in (("", "cuda"), ("the driver is too old", "triton")):
        monkeypatch.setattr(cuda, "_device_refusal", lambda index, reason=refusal: reason)
        assert choose_backend(problem_of(probe, probe), None) == chosen
    with pytest.raises(RuntimeError, match="cuda: the driver is too old"):
        choose_backend(problem_of(probe, probe), "cuda")


def test_what_triton_does_faster_goes_to_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the table of CudaBackend.yields; not a backend that was named, nor where Triton cannot."""
    for name in ("cuda", "triton"):
        monkeypatch.setattr(type(BACKENDS[name]), "unavailable", lambda self: [])
        monkeypatch.setattr(type(BACKENDS[name]), "why_not", lambda self, problem: [])
    monkeypatch.setattr(type(BACKENDS["cpu"]), "why_not", lambda self, problem: ["a GPU tensor"])
    probe = torch.zeros(2, 3)
    for divergence in ("forward_kl", "reverse_kl"):
        for temperature in (1.0, 1.7, 3.0):
            problem = problem_of(probe, probe, divergence=divergence, temperature=temperature)
            assert choose_backend(problem, None) == "cuda"
    fast = (
        (probe.expand(4, 2, 3), probe.expand(4, 2, 3)),
        (probe.bfloat16(), probe),
        (probe, probe.bfloat16()),
        (torch.zeros(2, 4)[:, :3], probe),
    )
    for student, teacher in fast:
        assert choose_backend(problem_of(student, teacher), None) == "cuda"
    slow = {
        "not a KL": problem_of(probe, probe, divergence="tvd"),
        "transformed": problem_of(probe, probe, student_softcap=30.0),
        "beside another dtype": problem_of(probe, probe.half()),
        "column stride": problem_of(torch.zeros(2, 6)[:, ::2], probe),
        "does not fit": problem_of(*[torch.zeros(1, 1).expand(2, 270000)] * 2),
    }
    for reason, problem in slow.items():
        faster = BACKENDS["cuda"].yields(problem, False)
        assert faster is not None and faster[0] == "triton" and reason in faster[1]
        assert choose_backend(problem, None) == "triton"
        assert choose_backend(problem, "cuda") == "cuda"
    plain = problem_of(probe, probe)
    assert choose_backend(plain, None, extras=True) == "triton"
    monkeypatch.setattr(type(BACKENDS["triton"]), "why_not", lambda self, problem: ["no"])
    assert choose_backend(slow["transformed"], None) == "cuda"


def test_the_flag_for_labels_is_not_made_inside_a_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    """A replay would zero it again, and its memory would be the graph's."""
    monkeypatch.setattr("kdkernels.backends.gpu._is_capturing", lambda device: True)
    flags: dict[torch.device, torch.Tensor] = {}
    monkeypatch.setattr("kdkernels.backends.gpu._flags", flags)
    with pytest.raises(RuntimeError, match=r'capture .* call kdkernels.label_errors\("cuda:0"\)'):
        label_errors("cuda:0")
    flags[torch.device("cuda:0")] = torch.zeros((), dtype=torch.int64)
    assert label_errors("cuda:0") is flags[torch.device("cuda:0")]


def require_kernels() -> None:
    if cuda._UNAVAILABLE is not None:
        pytest.skip(cuda._UNAVAILABLE)
    if refusal := cuda._device_refusal(0):
        pytest.skip(refusal)


def evaluate(student: torch.Tensor, teacher: torch.Tensor, labels: torch.Tensor | None, **options):
    require_kernels()
    return cases.evaluate(student, teacher, labels, backend="cuda", **options)


@gpu
@pytest.mark.parametrize(("kernel", "cluster"), KERNELS)
@pytest.mark.parametrize("vocab", (1000, 32000, 50257, 128256))
def test_every_kernel_agrees_with_the_oracle(
    kernel: str, cluster: int, vocab: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KDKERNELS_CUDA_KERNEL", kernel)
    if cluster:
        monkeypatch.setenv("KDKERNELS_CUDA_CLUSTER", str(cluster))
    student, teacher = cases.pair((5, vocab), torch.bfloat16)
    labels = cases.labels_for((5,), vocab)
    options = {"temperature": 2.0, "alpha": 0.5}
    standard = cases.standard(student, teacher, labels, cases.Spec("forward_kl"), **options)
    require_kernels()
    try:
        measured = evaluate(student.cuda(), teacher.cuda(), labels.cuda(), **options)
    except ValueError as error:  # a cluster that this device does not schedule, or a row too long
        pytest.skip(str(error))
    cases.assert_accurate(measured, standard)


@gpu
def test_nothing_waits_for_the_device() -> None:
    require_kernels()
    student, teacher = cases.pair((7, 4099), torch.bfloat16, device="cuda")
    labels = cases.labels_for((7,), 4099).cuda()
    evaluate(student, teacher, labels)  # allocations and attributes of a first call
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for gradient in ("forward", "recompute"):
            evaluate(student, teacher, labels, gradient=gradient, reduction="mean")
    finally:
        torch.cuda.set_sync_debug_mode("default")


@gpu
def test_the_callers_stream_is_used() -> None:
    require_kernels()
    student, teacher = cases.pair((64, 32000), torch.bfloat16, device="cuda")
    want = evaluate(student, teacher, None)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        late = torch.empty_like(student)
        torch.cuda._sleep(50_000_000)
        late.copy_(student)
        got = evaluate(late, teacher, None)
    torch.cuda.current_stream().wait_stream(stream)
    assert torch.equal(got.loss, want.loss) and torch.equal(got.gradient, want.gradient)


@gpu
def test_cuda_graphs_capture_forward_and_backward() -> None:
    require_kernels()
    student, teacher = cases.pair((16, 4099), torch.float32, device="cuda")
    labels = cases.labels_for((16,), 4099).cuda()
    leaf = student.clone().requires_grad_()

    def step() -> torch.Tensor:
        leaf.grad = None
        loss = fused_kd_loss(leaf, teacher, labels, backend="cuda")
        loss.backward()
        return loss

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = step()
    other = cases.logits((16, 4099), seed=99, device="cuda")
    with torch.no_grad():
        leaf.copy_(other)
    graph.replay()
    want = evaluate(other, teacher, labels)
    assert torch.equal(loss.detach(), want.loss) and torch.equal(leaf.grad, want.gradient)


@gpu
def test_offsets_beyond_two_to_the_31() -> None:
    """More than 2^31 logits that are all there; what lies behind them is what lies at the start."""
    require_kernels()
    vocab, rows = 4096, (1 << 31) // 4096 + 3
    if torch.cuda.mem_get_info()[0] < 1.1 * 2 * rows * vocab:
        pytest.skip("not enough device memory")
    ends = cases.logits((4, vocab), torch.bfloat16, device="cuda")
    whole = torch.zeros(rows + 1, vocab, dtype=torch.bfloat16, device="cuda")
    whole[:4] = whole[-4:] = ends
    labels = torch.zeros(rows, dtype=torch.int64, device="cuda")
    labels[:3] = labels[-3:] = cases.labels_for((3,), vocab).cuda()
    # The teacher is the student one row on: one tensor serves both.
    options = {"temperature": 2.0, "alpha": 0.5, "reduction": "none", "gradient": "recompute"}
    few = evaluate(ends[:-1], ends[1:], labels[:3], **options).loss
    with torch.no_grad():
        many = fused_kd_loss(whole[:-1], whole[1:], labels, backend="cuda", **options)
    assert torch.equal(many[:3], few) and torch.equal(many[-3:], few)


@gpu
def test_a_gradient_of_more_than_two_to_the_31_elements() -> None:
    require_kernels()
    vocab, rows = 128256, (1 << 31) // 128256 + 2
    if torch.cuda.mem_get_info()[0] < 3 * rows * vocab * 2:
        pytest.skip("not enough device memory")
    student, teacher = cases.pair((1, vocab), torch.bfloat16, device="cuda")
    measured = evaluate(
        student.expand(rows, vocab), teacher.expand(rows, vocab), None, reduction="sum"
    )
    assert torch.equal(measured.gradient[0], measured.gradient[-1])


@gpu
def test_more_rows_than_a_grid_axis() -> None:
    require_kernels()
    student, teacher = cases.pair((70000, 17), device="cuda")
    labels = cases.labels_for((70000,), 17)
    want = cases.oracle(student, teacher, labels)
    got = evaluate(student, teacher, labels.cuda())
    torch.testing.assert_close(got.loss.cpu().double(), want.loss, rtol=1e-5, atol=0.0)


@gpu
def test_two_devices() -> None:
    require_kernels()
    if torch.cuda.device_count() < 2:
        pytest.skip("one CUDA device")
    student, teacher = cases.pair((9, 3001), torch.bfloat16)
    want = evaluate(student.to("cuda:0"), teacher.to("cuda:0"), None)
    torch.cuda.set_device(0)
    got = evaluate(student.to("cuda:1"), teacher.to("cuda:1"), None)
    assert got.loss.device.index == 1 and torch.cuda.current_device() == 0
    assert torch.equal(got.loss.cpu(), want.loss.cpu())


@gpu
def test_labels_out_of_range_set_the_flag() -> None:
    require_kernels()
    student, teacher = cases.pair((3, 257), device="cuda")
    flag = label_errors("cuda:0")
    flag.zero_()
    loss = fused_kd_loss(
        student, teacher, torch.tensor([1, 300, -100]).cuda(), reduction="none", backend="cuda"
    )
    assert loss.isnan().tolist() == [False, True, False] and flag.item() == 2
    flag.zero_()


@gpu
def test_a_new_flag_is_zero_for_every_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever makes it waits: the next to use it may be a kernel on another stream."""
    monkeypatch.setattr("kdkernels.backends.gpu._flags", {})
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        torch.cuda._sleep(50_000_000)
        flag = label_errors("cuda:0")
    assert side.query() and flag.item() == 0


@gpu
def test_a_first_call_may_be_captured() -> None:
    """In a process that has launched nothing of ours; one with labels makes the flag before."""
    require_kernels()
    code = """
import torch
from kdkernels import fused_kd_loss, label_errors

student, teacher = torch.randn(2, 16, 4099, device="cuda").requires_grad_()
labels = torch.arange(16, device="cuda")
label_errors("cuda")
graph = torch.cuda.CUDAGraph()
with torch.cuda.graph(graph):
    losses = [fused_kd_loss(student, teacher.detach(), y, backend="cuda") for y in (None, labels)]
graph.replay()
for loss, y in zip(losses, (None, labels)):
    assert torch.equal(loss, fused_kd_loss(student, teacher.detach(), y, backend="cuda"))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
