"""Runs that are killed, shared, stopped and starved: nothing is lost, and the bytes are the same."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from supermix.core import file_hash
from supermix.data import load_data
from supermix.generate import claimed, generate, missing_shards
from supermix.recipes import FAST, Generation, Mixing
from supermix.store import MixedDataset
from supermix.zoo import create, save

ROOT = Path(__file__).parent.parent
RECIPE = Generation(data="digits", count=500, shard=128, mixing=Mixing(**FAST))
OPTIONS = ["--data", "digits", "--count", "500", "--shard", "128"]


def start(folder, *options, launcher=(), **kwargs):
    command = [sys.executable, "-m", *launcher, "supermix.generate", *OPTIONS, "--out", str(folder), *options]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, **kwargs)


def contents(folder): return {p.name: file_hash(p) for p in Path(folder).iterdir()}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    "An uninterrupted store."
    return generate(RECIPE, tmp_path_factory.mktemp("whole") / "store").folder


def killed(folder, kills, seed=0):
    "Start, kill at a random moment, start again; then to the end."
    chance, times = random.Random(seed), []
    while len(times) < kills:
        process = start(folder)
        moment = chance.uniform(2, 8)
        try: process.wait(moment)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            times.append(round(moment, 2))
            continue
        shutil.rmtree(folder)  # done before it could be killed: from the beginning
    process = start(folder)
    out, err = process.communicate()
    assert process.returncode == 0, err
    return times


def test_killed_three_times(whole, tmp_path):
    killed(tmp_path / "store", 3)
    assert contents(tmp_path / "store") == contents(whole)


def test_killed_in_the_middle_of_a_write(whole, tmp_path):
    "Of the manifest, of the first shard and of the third, and once the disk has it but the name is not there yet."
    die = "import os, runpy, signal, sys; at, sync, calls = int(sys.argv.pop(1)), os.fsync, []\ndef fsync(file):\n    calls.append(sync(file))\n    if len(calls) == at: os.kill(os.getpid(), signal.SIGKILL)\nos.fsync = fsync; runpy.run_module('supermix.generate', run_name='__main__', alter_sys=True)"
    for at in (1, 2, 2):
        process = subprocess.run([sys.executable, "-c", die, str(at), *OPTIONS, "--out", str(tmp_path / "store")], capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
        assert process.returncode == -signal.SIGKILL, process.stderr
        assert [p for p in (tmp_path / "store").iterdir() if p.name.startswith(".") and not p.name.endswith(".lock")], "nothing was left behind: the test tests nothing"
    process = start(tmp_path / "store")
    out, err = process.communicate()
    assert process.returncode == 0, err
    assert contents(tmp_path / "store") == contents(whole)


@pytest.mark.slow
def test_killed_fifty_times(whole, tmp_path):
    "Kept in results/kills.json."
    times = killed(tmp_path / "store", 50)
    same = contents(tmp_path / "store") == contents(whole)
    result = {"kills": len(times), "seconds after the start": times, "byte-identical": same, "command": "pytest tests/test_generate.py --slow -k fifty"}
    (ROOT / "results" / "kills.json").write_text(json.dumps(result, indent=1) + "\n")
    assert same


def test_two_processes_make_the_same(whole, tmp_path):
    both = [start(tmp_path / "store") for _ in range(2)]
    for process in both:
        out, err = process.communicate()
        assert process.returncode == 0 and "500 mixed images" in out, err
    assert contents(tmp_path / "store") == contents(whole)


def test_a_worker_that_dies_is_replaced(whole, tmp_path):
    first, second = (start(tmp_path / "store") for _ in range(2))
    while not list(tmp_path.glob("store/[0-9]*.safetensors")): time.sleep(0.05)
    first.kill()
    first.wait()
    out, err = second.communicate()
    assert second.returncode == 0, err
    assert contents(tmp_path / "store") == contents(whole)


def test_under_torchrun(whole, tmp_path):
    process = start(tmp_path / "store", launcher=("torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m"))
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err[-2000:]
    assert out.count("500 mixed images") == 1  # one of them reports
    assert contents(tmp_path / "store") == contents(whole)


def test_control_c_leaves_at_once_and_says_how_to_go_on(whole, tmp_path):
    took = []
    for attempt in range(3):  # it takes a second; on a busy machine a process may be held up for longer than five, but not each time
        shutil.rmtree(tmp_path / "store", ignore_errors=True)
        process = start(tmp_path / "store")
        while not list(tmp_path.glob("store/[0-9]*.safetensors")): time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        begun = time.time()
        out, err = process.communicate(timeout=30)
        took.append(time.time() - begun)
        assert process.returncode == 1 and "of 500 images are kept in" in err and "Run the same command again" in err and "Traceback" not in err
        if took[-1] < 5: break
    assert min(took) < 5, took
    assert start(tmp_path / "store").wait() == 0 and contents(tmp_path / "store") == contents(whole)


def test_a_full_disk_keeps_what_was_done(whole, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=68k", "tmpfs", disk], capture_output=True).returncode: pytest.skip("a small disk cannot be mounted here")
    try:
        process = start(disk / "store")
        out, err = process.communicate()
        assert process.returncode == 1 and "is full" in err and "images are kept" in err and "Traceback" not in err
        kept = sorted(p.name for p in (disk / "store").glob("[0-9]*.safetensors"))
        assert 1 <= len(kept) < len(list(whole.glob("[0-9]*.safetensors")))
        assert all(file_hash(disk / "store" / name) == file_hash(whole / name) for name in kept)
        subprocess.run(["mount", "-o", "remount,size=1m", disk], check=True)
        assert start(disk / "store").wait() == 0 and contents(disk / "store") == contents(whole)
    finally: subprocess.run(["umount", disk], check=True)


def test_threads_do_not_matter(whole, tmp_path):
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        generate(RECIPE, tmp_path / "store")
    finally: torch.set_num_threads(before)
    assert contents(tmp_path / "store") == contents(whole)


def test_claims(tmp_path):
    with claimed(tmp_path / "a") as first:
        code = "import sys; from pathlib import Path; from supermix.generate import claimed\nwith claimed(Path(sys.argv[1])) as mine: print(mine)"
        assert first and subprocess.run([sys.executable, "-c", code, tmp_path / "a"], capture_output=True, text=True).stdout == "False\n"
    with claimed(tmp_path / "a") as again: assert again


@pytest.mark.parametrize("counts, count, missing", [
    ({}, 500, [0, 1, 2, 3]), ({0: (64, 128)}, 500, [1, 2, 3, 4, 5, 6, 7]), ({0: (128, 128), 3: (128, 128)}, 500, [1, 2]), ({0: (128, 128)}, 128, []),
])
def test_which_shards_are_missing(counts, count, missing): assert missing_shards(counts, count, 128) == missing


def test_a_shard_too_many_is_let_go(whole, tmp_path):
    shutil.copytree(whole, tmp_path / "store")
    manifest = json.loads((whole / "manifest.json").read_text())
    extra = len(manifest["shards"])
    shutil.copy(whole / "00000.safetensors", tmp_path / "store" / f"{extra:05d}.safetensors")
    generate(RECIPE, tmp_path / "store")
    assert contents(tmp_path / "store") == contents(whole)


@pytest.mark.parametrize("changes, message", [
    (dict(shard=100), "multiple of 128 sets, got count 500 and shard 100"), (dict(count=0), "count of 1 or more"),
    (dict(teacher="nobody"), "Unknown teacher 'nobody'"), (dict(data="digit"), "Did you mean 'digits'"),
    (dict(mixing=Mixing(k=11, **FAST)), "at least k = 11"),
])
def test_what_cannot_be_made(changes, message, tmp_path):
    with pytest.raises(ValueError, match=message): generate(replace(RECIPE, **changes), tmp_path / "store")


class Torn(torch.nn.Module):
    "Sees bright or dark, and always 'neither' right behind: the two are never on top together."
    def forward(self, x):
        m = 10 * x.mean((1, 2, 3))
        return torch.stack([m, -m, 0 * m], 1)


def test_a_teacher_whose_sets_are_never_solved_is_an_error(tmp_path, digits):
    with pytest.raises(ValueError, match="None of the sets was solved: is the teacher trained"): generate(RECIPE, tmp_path / "store", digits.train, Torn())
    assert not list((tmp_path / "store").glob("*.safetensors"))


def test_a_teacher_from_a_file(teacher, digits, tmp_path):
    path = save(teacher, tmp_path / "mine.safetensors")
    store = generate(replace(RECIPE, teacher=str(path), count=60), tmp_path / "store")
    assert len(MixedDataset(store.folder, load_data("digits").train)) == 60


def test_the_command_line():
    shown = subprocess.run([Path(sys.executable).with_name("supermix"), "generate", "--help"], capture_output=True, text=True, env={**os.environ, "COLUMNS": "120"}).stdout
    for text in ("--count", "--mixing.k", "--mixing.hold", "--out", "sets that are drawn for a file", "images a mixing set"): assert text in shown


@pytest.mark.slow
def test_two_processes_are_nearly_twice_as_fast(tmp_path):
    "One thread each, shards of Fashion-MNIST; kept in results/scaling.json. Times are the processes' own, without starting Python."
    def took(name, n):
        options = ["--data", "fashion_mnist", "--count", "8000", "--shard", "256"]
        running = [start(tmp_path / f"{name}", *options) for _ in range(n)]
        said = [process.communicate()[0] for process in running]
        return max(float(text.rsplit(" ", 2)[-2]) for text in said)
    rounds = [(took(f"one{i}", 1), took(f"two{i}", 2)) for i in range(2)]
    speedup = sum(a for a, _ in rounds) / sum(b for _, b in rounds)
    result = {"images": 8000, "seconds with one process": [a for a, _ in rounds], "with two": [b for _, b in rounds], "speedup": speedup,
              "command": "pytest tests/test_generate.py --slow -k twice"}
    (ROOT / "results" / "scaling.json").write_text(json.dumps(result, indent=1) + "\n")
    assert speedup >= 1.8
