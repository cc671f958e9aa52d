"""Checkpoints: whole, checked, and never code."""

import os
import pickle
import random
import signal
import subprocess
import sys
import threading
import time
import weakref

import numpy as np
import pytest
import torch
from supermix.core import check_interrupt, interruptible
from supermix.training.checkpoints import (
    _CHECKPOINT_NAME,
    _digest,
    checkpoints,
    load_checkpoint,
    random_state,
    restore_random,
    save_checkpoint,
)
from torch import nn

STATE = {
    "weights": {"a": torch.arange(6.0).view(2, 3), "half": torch.ones(3, dtype=torch.bfloat16)},
    "position": [3, 4, 5],
    "pair": (1, None),
    "name": "naïve",
    "rate": 0.1,
    "flag": True,
}


def test_what_is_kept_comes_back(tmp_path):
    path = save_checkpoint(tmp_path / "new" / "folder", 7, STATE)
    back = load_checkpoint(path)
    assert back["weights"]["half"].dtype == torch.bfloat16 and torch.equal(back["weights"]["a"], STATE["weights"]["a"])
    assert {k: v for k, v in back.items() if k != "weights"} == {k: v for k, v in STATE.items() if k != "weights"}
    assert _CHECKPOINT_NAME.fullmatch(path.name)[1] == "000000007"


@pytest.mark.parametrize("keep", [1, 2, 3])
def test_the_last_ones_stay(keep, tmp_path):
    (tmp_path / "log.csv").write_text("epoch\n")
    for step in (5, 10, 15, 20):
        save_checkpoint(tmp_path, step, {"step": step}, keep)
    assert [load_checkpoint(p)["step"] for p in checkpoints(tmp_path)] == [5, 10, 15, 20][-keep:]
    assert len(list(tmp_path.iterdir())) == keep + 1


@pytest.mark.parametrize("keep", [0, -1])
def test_at_least_one_checkpoint_is_kept(keep, tmp_path):
    first = save_checkpoint(tmp_path, 5, {"step": 5})
    with pytest.raises(ValueError, match=f"at least 1 checkpoint, got {keep}"):
        save_checkpoint(tmp_path, 10, {"step": 10}, keep)
    assert checkpoints(tmp_path) == [first]


def test_any_changed_byte_is_an_error(tmp_path):
    path = save_checkpoint(tmp_path, 1, STATE)
    content, chance = path.read_bytes(), random.Random(0)
    for _ in range(40):
        at = chance.randrange(len(content))
        path.write_bytes(content[:at] + bytes([content[at] ^ (1 << chance.randrange(8))]) + content[at + 1 :])
        with pytest.raises(ValueError, match="was changed or cut off"):
            load_checkpoint(path)
    for length in (0, 1, len(content) // 2, len(content) - 1):
        path.write_bytes(content[:length])
        with pytest.raises(ValueError, match=f"{path.name} was changed or cut off.*Delete it to resume"):
            load_checkpoint(path)


def test_a_renamed_checkpoint_is_an_error(tmp_path):
    first, second = (save_checkpoint(tmp_path, step, STATE) for step in (1, 2))
    assert first.name[15:] != second.name[15:]  # one content, two steps
    false = first.rename(tmp_path / first.name.replace("step-000000001", "step-000000003"))
    assert checkpoints(tmp_path)[-1] == false
    with pytest.raises(ValueError, match=f"{false.name} was changed or cut off, or renamed.*Delete it to resume"):
        load_checkpoint(false)
    assert load_checkpoint(false.rename(first))["position"] == load_checkpoint(second)["position"] == STATE["position"]


class Trap:
    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return os.system, (f"touch {self.target}",)


@pytest.mark.parametrize(
    "write",
    [
        lambda trap, path: path.write_bytes(pickle.dumps({"network": trap})),
        lambda trap, path: torch.save({"network": trap}, path),
    ],
)
def test_code_in_a_checkpoint_never_runs(write, tmp_path):
    write(Trap(tmp_path / "ran"), tmp_path / "evil")
    path = (tmp_path / "evil").rename(tmp_path / f"step-000000001-{_digest(1, (tmp_path / 'evil').read_bytes())}.pt")
    with pytest.raises(ValueError, match="holds more than plain values"):
        load_checkpoint(path)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "odd",
    [np.float64(0.5), np.int64(3), np.arange(3), nn.Linear(1, 1)],
    ids=["a number", "an integer", "an array", "a module"],
)
def test_what_could_not_be_read_is_not_written(odd, tmp_path):
    first = save_checkpoint(tmp_path, 1, STATE)
    with pytest.raises(ValueError, match="got other values in history: convert NumPy's numbers with float"):
        save_checkpoint(tmp_path, 2, {**STATE, "history": {"rows": [{"epoch": 1, "mean": odd}]}})
    assert list(tmp_path.iterdir()) == [first] and load_checkpoint(first)["name"] == "naïve"


def test_other_files_are_no_checkpoints(tmp_path):
    for name in ("step-1.pt", "step-000000001-xyz.pt", "model.pt"):
        (tmp_path / name).write_bytes(b"")
    assert checkpoints(tmp_path) == [] == checkpoints(tmp_path / "none")
    with pytest.raises(ValueError, match="Expected a checkpoint named"):
        load_checkpoint(tmp_path / "model.pt")
    with pytest.raises(FileNotFoundError, match="There is no checkpoint"):
        load_checkpoint(tmp_path / "step-000000001-0123456789abcdef.pt")


def test_all_random_states_come_back(tmp_path):
    def draws():
        return (
            torch.rand(3).tolist(),
            np.random.rand(3).tolist(),
            [random.random() for _ in range(3)],
            random.gauss(0, 1),
            np.random.randn(),
        )

    np.random.randn(), random.gauss(0, 1)  # both keep half a pair back
    path = save_checkpoint(tmp_path, 1, random_state())
    first = draws()
    assert draws() != first
    restore_random(load_checkpoint(path))
    assert draws() == first


@pytest.mark.slow
def test_a_process_that_is_killed_while_it_writes_leaves_whole_checkpoints(tmp_path):
    program = f"""
import torch
from supermix.training.checkpoints import save_checkpoint
step, state = 0, {{"big": torch.zeros(2_000_000)}}
while True:
    step += 1
    save_checkpoint({str(tmp_path)!r}, step, state)
"""
    for wait in (0.05, 0.11, 0.23):
        before = len(list(tmp_path.glob("step-*")))
        process = subprocess.Popen([sys.executable, "-c", program])
        while process.poll() is None and len(checkpoints(tmp_path)) <= min(before, 1):
            time.sleep(0.01)
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(wait)
        process.kill()
        process.wait()
        assert 1 <= len(checkpoints(tmp_path)) <= 3 and all(
            load_checkpoint(p)["big"].shape == (2_000_000,) for p in checkpoints(tmp_path)
        )


def test_what_a_killed_run_left_half_written_goes(tmp_path):
    die = (
        "import os, signal, sys, torch; from supermix.training.checkpoints import save_checkpoint; "
        "os.replace = lambda *a: os.kill(os.getpid(), signal.SIGKILL); "
        "save_checkpoint(sys.argv[1], 1, {'a': torch.ones(3)})"
    )
    assert subprocess.run([sys.executable, "-c", die, str(tmp_path)]).returncode == -9
    assert len(list(tmp_path.iterdir())) == 1 and not checkpoints(tmp_path)
    path = save_checkpoint(tmp_path, 2, STATE)
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("count", [0, 1, 3])
def test_random_states_of_other_gpus(count):
    "As many as are here and there take theirs; the processor's are all set."
    before, numbers = random_state(), (torch.rand(3), np.random.rand(3), random.random())
    own = before["cuda"][:1] or [torch.zeros(16, dtype=torch.uint8)]
    restore_random({**before, "cuda": (own * 3)[:count]})
    again = torch.rand(3), np.random.rand(3), random.random()
    assert torch.equal(numbers[0], again[0]) and (numbers[1] == again[1]).all() and numbers[2] == again[2]


# ---- Ctrl-C


def lose_one():
    "Ctrl-C while a weak reference's callback runs: Python drops what is raised there."
    thing = nn.Module()
    reference = weakref.ref(thing, lambda gone: signal.raise_signal(signal.SIGINT))  # noqa: F841
    del thing


@pytest.fixture
def plain_handler():
    "Python's own handler of Ctrl-C, as in a script."
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield signal.default_int_handler
    signal.signal(signal.SIGINT, before)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("nested", [False, True])
def test_a_lost_interrupt_is_raised_by_the_next_check(nested, plain_handler):
    steps = []
    with pytest.raises(KeyboardInterrupt), interruptible():
        for step in range(5):
            steps.append(step)
            if nested:
                with interruptible():
                    lose_one() if step == 2 else None
            elif step == 2:
                lose_one()
            check_interrupt()
    assert steps == [0, 1, 2] and signal.getsignal(signal.SIGINT) is plain_handler
    check_interrupt()  # outside nothing is remembered


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_lost_interrupt_is_raised_at_the_end_at_least(plain_handler):
    @interruptible()
    def work():
        "A docstring that stays."
        lose_one()
        return "done"

    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            work()
    assert work.__doc__ == "A docstring that stays." and signal.getsignal(signal.SIGINT) is plain_handler


def test_an_interrupt_is_raised_at_once(plain_handler):
    with pytest.raises(KeyboardInterrupt), interruptible():
        signal.raise_signal(signal.SIGINT)
        raise AssertionError("it went on")
    assert signal.getsignal(signal.SIGINT) is plain_handler


def test_handlers_of_others_stay(plain_handler):
    heard = []
    signal.signal(signal.SIGINT, lambda *_: heard.append(1))
    with interruptible():
        signal.raise_signal(signal.SIGINT)
    assert heard == [1]
    signal.signal(signal.SIGINT, plain_handler)
    seen = []

    def elsewhere():
        with interruptible():
            seen.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    assert seen == [plain_handler]
