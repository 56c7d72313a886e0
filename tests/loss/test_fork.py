"""A forked process computes on as many threads as it is asked for, to the same bits.

OpenMP's threads do not survive a fork. What had started them (this library, torch, nothing yet),
who forks, and how often, must make no difference. Each scenario runs in an interpreter of its own,
whose hang is a failure.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from kdkernels.backends import BACKENDS

pytestmark = [
    pytest.mark.skipif(not hasattr(os, "fork"), reason="this system cannot fork"),
    pytest.mark.skipif(
        bool(BACKENDS["cpu"].unavailable()), reason="the native module was not built"
    ),
]

PRELUDE = """
import os, sys, threading, torch, kdkernels
torch.manual_seed(0)
z, t = torch.randn(64, 5000, requires_grad=True), torch.randn(64, 5000)
labels = torch.randint(5000, (64,))

def loss_and_gradient():
    loss = kdkernels.fused_kd_loss(z, t, labels, backend="cpu")
    # Not torch.equal: on all of a gradient it waits, in a child, for threads that torch has lost.
    return loss.item(), torch.autograd.grad(loss, z)[0].numpy().tobytes()

def new_threads(call):
    tasks = "/proc/self/task"
    if not os.path.exists(tasks):
        call()
        return None
    before = set(os.listdir(tasks))
    call()
    return len(set(os.listdir(tasks)) - before)

# One that computes for the thread that forked, and two beside it.
def uses_three():
    torch.set_num_threads(3)
    return new_threads(loss_and_gradient) in (3, None)

def passes_in_child(check):
    child = os.fork()
    if child == 0:
        code = 1
        try:
            code = 0 if check() else 1
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
"""

SCENARIOS = {
    "before any use": """
        assert passes_in_child(uses_three)
        assert passes_in_child(uses_three)
        loss_and_gradient()
    """,
    "after use": """
        expected = loss_and_gradient()
        assert passes_in_child(uses_three)
        assert passes_in_child(lambda: expected == loss_and_gradient())
        assert expected == loss_and_gradient()
    """,
    "after torch's use": """
        torch.softmax(t, -1).sum()
        assert passes_in_child(uses_three)
        assert passes_in_child(lambda: [loss_and_gradient() for _ in range(20)])
    """,
    "of a fork": """
        expected = loss_and_gradient()
        def again():
            return expected == loss_and_gradient()
        def child():
            return again() and passes_in_child(uses_three) and passes_in_child(again) and again()
        assert passes_in_child(child)
        assert passes_in_child(lambda: passes_in_child(lambda: passes_in_child(again)))
    """,
    "by another thread": """
        expected, results = loss_and_gradient(), []
        def work():
            mine = loss_and_gradient()
            results.append(expected == mine)
            results.append(passes_in_child(lambda: mine == loss_and_gradient()))
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
        assert results == [True, True]
    """,
    "and then threads": """
        expected = loss_and_gradient()
        def child():
            results = []
            def work():
                results.extend(expected == loss_and_gradient() for _ in range(5))
            threads = [threading.Thread(target=work) for _ in range(4)]
            for thread in threads: thread.start()
            work()
            for thread in threads: thread.join()
            return results == [True] * 25
        assert passes_in_child(child)
    """,
    "with fewer threads": """
        loss_and_gradient()
        def child():
            torch.set_num_threads(1)
            alone = new_threads(loss_and_gradient)
            torch.set_num_threads(2)
            return alone in (0, None) and new_threads(loss_and_gradient) in (2, None)
        assert passes_in_child(child)
    """,
    "and a bad label": """
        loss_and_gradient()
        def child():
            loss_and_gradient()
            labels[3] = 5000
            try:
                loss_and_gradient()
            except IndexError:
                labels[3] = 0
                return loss_and_gradient()
        assert passes_in_child(child)
    """,
    # Not after torch.set_num_threads, which starts another pool of torch's: its destructor waits
    # for threads that the child does not have, or crashes, without this library, too.
    "that ends by itself": """
        loss_and_gradient()
        child = os.fork()
        loss_and_gradient()
        if child:
            assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    """,
}

PROCESSES = """
import multiprocessing, torch.utils.data

class Losses(torch.utils.data.Dataset):
    def __len__(self):
        return 4
    def __getitem__(self, index):
        fresh = new_threads(loss_and_gradient)
        return loss_and_gradient()[0], -1 if fresh is None else fresh

def work(expected):
    assert expected == loss_and_gradient()

def main(method):
    expected = loss_and_gradient()
    if method == "loader":
        for loss, fresh in torch.utils.data.DataLoader(Losses(), num_workers=2, batch_size=None):
            assert loss == expected[0] and fresh in (0, -1)
        return
    context = multiprocessing.get_context(method)
    if method == "forkserver":
        context.set_forkserver_preload(["kdkernels"])
    processes = [context.Process(target=work, args=(expected,)) for _ in range(2)]
    for process in processes: process.start()
    for process in processes: process.join()
    assert [process.exitcode for process in processes] == [0, 0]

if __name__ == "__main__":
    main(sys.argv[1])
"""


def run_python(*arguments: str) -> None:
    done = subprocess.run(
        [sys.executable, *arguments],
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "2"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_a_fork(scenario: str) -> None:
    body = SCENARIOS[scenario].replace("\n        ", "\n")
    run_python("-c", PRELUDE + body)


@pytest.mark.parametrize("method", ("fork", "forkserver", "loader"))
def test_processes_of_python(method: str, tmp_path: Path) -> None:
    script = tmp_path / "processes.py"
    script.write_text(PRELUDE + PROCESSES)
    run_python(str(script), method)
