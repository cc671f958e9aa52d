"""Runs that are killed, shared, stopped and starved: nothing is lost, and the bytes are the same."""

import json
import os
import random
import runpy
import shutil
import signal
import subprocess
import sys
import time
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from supermix import cli
from supermix.core import file_hash, seeded
from supermix.data import ArrayImages, Info, load_data
from supermix.mixing.generate import _check_solved, _missing_shards, settle, claimed, generate
from supermix.mixing.store import MixedDataset, Store, _load_card
from supermix.recipes import FAST, Generation, Mixing
from supermix.zoo import save

ROOT = Path(__file__).parent.parent
RECIPE = Generation(data="digits", count=500, shard=128, mixing=Mixing(**FAST))
OPTIONS = ["--data", "digits", "--count", "500", "--shard", "128"]


def start(folder, *options, launcher=(), **kwargs):
    command = [sys.executable, "-m", *launcher, "supermix.generate", *OPTIONS, "--out", str(folder), *options]
    return subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        **kwargs,
    )


def contents(folder):
    return {p.name: file_hash(p) for p in Path(folder).iterdir()}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    "An uninterrupted store."
    return generate(RECIPE, tmp_path_factory.mktemp("whole") / "store").folder


def shards(folder):
    return sorted(Path(folder).glob("[0-9]*.safetensors"))


def at_work(folder, since):
    "Whether a process that was started then has begun a shard: it holds a lock that is younger."
    for lock in Path(folder).glob(".[0-9]*.lock"):
        try:
            young = lock.stat().st_mtime >= since
        except FileNotFoundError:
            continue
        if young:
            return True
    return False


def killed(folder, kills, whole, seed=0):
    """Start, kill at a random moment of its work, start again, and compare whenever a run comes to its end; at last to
    the end. Shards that were there at each kill, runs that ended."""
    chance, there, ended = random.Random(seed), [], 0
    while len(there) < kills:
        since, process = time.time(), start(folder)
        while process.poll() is None and not at_work(folder, since):
            time.sleep(0.01)
        try:
            process.wait(chance.uniform(0, 3))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            there.append(len(shards(folder)))
            continue
        assert process.returncode == 0 and contents(folder) == contents(whole)  # done before it could be killed
        ended += 1
        shutil.rmtree(folder)
    process = start(folder)
    out, err = process.communicate()
    assert process.returncode == 0, err
    assert contents(folder) == contents(whole)
    return there, ended + 1


@pytest.mark.slow
def test_killed_twice(whole, tmp_path):
    there, _ = killed(tmp_path / "store", 2, whole)
    assert len(there) == 2


@pytest.mark.slow
def test_killed_in_the_middle_of_a_write(whole, tmp_path):
    "Of the manifest, of the first shard and of the third, and once the disk has it but the name is not there yet."
    die = (
        "import os, runpy, signal, sys; at, sync, calls = int(sys.argv.pop(1)), os.fsync, []\n"
        "def fsync(file):\n"
        "    calls.append(sync(file))\n"
        "    if len(calls) == at: os.kill(os.getpid(), signal.SIGKILL)\n"
        "os.fsync = fsync; runpy.run_module('supermix.generate', run_name='__main__', alter_sys=True)"
    )
    for at in (1, 2, 2):
        process = subprocess.run(
            [sys.executable, "-c", die, str(at), *OPTIONS, "--out", str(tmp_path / "store")],
            capture_output=True,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        assert process.returncode == -signal.SIGKILL, process.stderr
        assert [p for p in (tmp_path / "store").iterdir() if p.name.startswith(".") and not p.name.endswith(".lock")], (
            "nothing was left behind: the test tests nothing"
        )
    process = start(tmp_path / "store")
    out, err = process.communicate()
    assert process.returncode == 0, err
    assert contents(tmp_path / "store") == contents(whole)


@pytest.mark.slow
def test_killed_fifty_times(whole, tmp_path):
    "Kept in results/kills.json."
    there, ended = killed(tmp_path / "store", 50, whole)
    assert max(there) > 0 and 0 in there  # before the first shard, and after
    result = {
        "kills": len(there),
        "shards at each kill": there,
        "runs that ended": ended,
        "byte-identical": True,
        "command": "pytest tests/test_generate.py --slow -k fifty",
    }
    (ROOT / "results" / "kills.json").write_text(json.dumps(result) + "\n")


def test_the_kept_kills():
    "What the chapter shows."
    kept = json.loads((ROOT / "results" / "kills.json").read_text())
    assert (
        kept["kills"] == len(kept["shards at each kill"]) == 50
        and kept["byte-identical"]
        and max(kept["shards at each kill"]) > 0
    )
    assert json.loads((ROOT / "results" / "scaling.json").read_text())["speedup"] >= 1.8


@pytest.mark.slow
def test_two_processes_make_the_same(whole, tmp_path):
    both = [start(tmp_path / "store") for _ in range(2)]
    for process in both:
        out, err = process.communicate()
        assert process.returncode == 0 and "500 mixed images" in out, err
    assert contents(tmp_path / "store") == contents(whole)


@pytest.mark.slow
def test_a_worker_that_dies_is_replaced(whole, tmp_path):
    first, second = (start(tmp_path / "store") for _ in range(2))
    while not list(tmp_path.glob("store/[0-9]*.safetensors")):
        time.sleep(0.05)
    first.kill()
    first.wait()
    out, err = second.communicate()
    assert second.returncode == 0, err
    assert contents(tmp_path / "store") == contents(whole)


@pytest.mark.slow
def test_under_torchrun(whole, tmp_path):
    process = start(
        tmp_path / "store", launcher=("torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m")
    )
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err[-2000:]
    assert out.count("500 mixed images") == 1  # one of them reports
    assert contents(tmp_path / "store") == contents(whole)


@pytest.mark.slow
def test_a_rank_that_is_killed_under_torchrun(whole, tmp_path):
    process = start(
        tmp_path / "store",
        launcher=("torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--max-restarts", "3", "-m"),
    )
    while not shards(tmp_path / "store"):
        time.sleep(0.05)
    ranks = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(int(ranks[-1]), signal.SIGKILL)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0 and "exitcode: -9" in err, err[-2000:]
    assert contents(tmp_path / "store") == contents(whole)


@pytest.mark.slow
def test_control_c_leaves_at_once_and_says_how_to_go_on(whole, tmp_path):
    took = []
    # it takes a second; on a busy machine a process may be held up for longer than five, but not each time
    for attempt in range(3):
        shutil.rmtree(tmp_path / "store", ignore_errors=True)
        # a shell's background jobs, and their children, ignore it
        process = start(tmp_path / "store", preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))
        while not list(tmp_path.glob("store/[0-9]*.safetensors")):
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        begun = time.time()
        out, err = process.communicate(timeout=300)
        took.append(time.time() - begun)
        assert (
            process.returncode == 130
            and "of 500 images are kept in" in err
            and "Run the same command again" in err
            and "Traceback" not in err
        )
        if took[-1] < 5:
            break
    assert min(took) < 5, took
    assert start(tmp_path / "store").wait() == 0 and contents(tmp_path / "store") == contents(whole)


@pytest.mark.slow
def test_a_full_disk_keeps_what_was_done(whole, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=68k", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("a small disk cannot be mounted here")
    try:
        process = start(disk / "store")
        out, err = process.communicate()
        assert process.returncode == 1 and "is full" in err and "images are kept" in err and "Traceback" not in err
        kept = sorted(p.name for p in (disk / "store").glob("[0-9]*.safetensors"))
        assert 1 <= len(kept) < len(list(whole.glob("[0-9]*.safetensors")))
        assert all(file_hash(disk / "store" / name) == file_hash(whole / name) for name in kept)
        subprocess.run(["mount", "-o", "remount,size=1m", disk], check=True)
        assert start(disk / "store").wait() == 0 and contents(disk / "store") == contents(whole)
    finally:
        subprocess.run(["umount", disk], check=True)


@pytest.mark.slow
def test_threads_do_not_matter(tmp_path):
    before, few = torch.get_num_threads(), replace(RECIPE, count=100)  # a shard: two threads may wait long for a core
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            generate(few, tmp_path / f"{threads}")
    finally:
        torch.set_num_threads(before)
    assert contents(tmp_path / "1") == contents(tmp_path / "2")


@pytest.mark.parametrize(
    "spoil, message",
    [
        (lambda content: content[:-1] + bytes([content[-1] ^ 1]), "00001.safetensors was changed: its SHA-256 is not"),
        (lambda content: content[:500], "00001.safetensors was changed"),
    ],
)
def test_a_run_that_is_repeated_does_not_approve_a_changed_shard(spoil, message, whole, tmp_path):
    store = tmp_path / "store"
    shutil.copytree(whole, store)
    (store / "00001.safetensors").write_bytes(spoil((store / "00001.safetensors").read_bytes()))
    with pytest.raises(ValueError, match=message):
        generate(RECIPE, store)
    (store / "00001.safetensors").unlink()  # as the message says
    generate(RECIPE, store)
    assert contents(store) == contents(whole)


@pytest.mark.parametrize(
    "spoil, message",
    [
        (
            lambda store: (store / "00001.safetensors").write_bytes((store / "00000.safetensors").read_bytes()),
            "it holds shard 0",
        ),
        (
            lambda store: (store / "00001.safetensors").write_bytes(
                (store / "00001.safetensors").read_bytes()[:-1] + b"\x07"
            ),
            "its tensors are not those of its card",
        ),
        (lambda store: (store / "00001.safetensors").write_bytes(b"no shard"), "it is not a complete shard"),
    ],
)
def test_a_run_that_goes_on_does_not_approve_a_changed_shard(spoil, message, whole, tmp_path):
    store = tmp_path / "store"
    shutil.copytree(whole, store)
    Store(store).write(
        {key: value for key, value in Store(store).manifest().items() if key not in ("shards", "images")}
    )  # as before the end
    spoil(store)
    with pytest.raises(ValueError, match=f"00001.safetensors was changed: {message}"):
        generate(RECIPE, store)


@pytest.mark.parametrize("size", ["4k", "16k"])
def test_a_disk_that_is_full_from_the_beginning(size, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("a small disk cannot be mounted here")
    try:
        (disk / "filler").write_bytes(b"x" * 4096)
        with pytest.raises(OSError, match="is full. 0 images are kept"):
            generate(RECIPE, disk / "store")
    finally:
        subprocess.run(["umount", disk], check=True)


def test_claims(tmp_path):
    with claimed(tmp_path / "a") as first:
        code = (
            "import sys; from pathlib import Path; from supermix.mixing.generate import claimed\n"
            "with claimed(Path(sys.argv[1])) as mine: print(mine)"
        )
        assert (
            first
            and subprocess.run([sys.executable, "-c", code, tmp_path / "a"], capture_output=True, text=True).stdout
            == "False\n"
        )
    with claimed(tmp_path / "a") as again:
        assert again


@pytest.mark.parametrize(
    "counts, count, missing",
    [
        ({}, 500, [0, 1, 2, 3]),
        ({0: (64, 128)}, 500, [1, 2, 3, 4, 5, 6, 7]),
        ({0: (128, 128), 3: (128, 128)}, 500, [1, 2]),
        ({0: (128, 128)}, 128, []),
    ],
)
def test_which_shards_are_missing(counts, count, missing):
    assert _missing_shards(counts, count, 128) == missing


@pytest.mark.slow
def test_a_shard_too_many_is_let_go(whole, tmp_path):
    shutil.copytree(whole, tmp_path / "store")
    manifest = json.loads((whole / "manifest.json").read_text())
    extra = f"{len(manifest['shards']):05d}.safetensors"
    shutil.copy(generate(replace(RECIPE, count=700), tmp_path / "more").folder / extra, tmp_path / "store" / extra)
    generate(RECIPE, tmp_path / "store")
    assert contents(tmp_path / "store") == contents(whole)


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(shard=100), "multiple of 128 sets, got count 500 and shard 100"),
        (dict(count=0), "count of 1 or more"),
        (dict(teacher="nobody"), "Unknown teacher 'nobody'"),
        (dict(data="digit"), "Did you mean 'digits'"),
        (dict(mixing=Mixing(k=11, **FAST)), "top of at least k = 11"),
        (dict(mixing=Mixing(k=11, **FAST), top=11), "at least k = 11 classes"),
        (dict(top=1), "top of at least k = 2 logits.*got 1"),
        (dict(slots=0), "slots of 1 or more, or None, got 0"),
        (dict(mixing=Mixing(**FAST, mask_size=40)), "no larger than the images"),
    ],
)
def test_what_cannot_be_made(changes, message, tmp_path):
    "And no folder is left behind, in which the corrected command would find another run."
    with pytest.raises(ValueError, match=message):
        generate(replace(RECIPE, **changes), tmp_path / "store")
    assert not (tmp_path / "store").exists()


class Torn(torch.nn.Module):
    "Sees bright or dark, and always 'neither' right behind: the two are never on top together."

    def forward(self, x):
        m = 10 * x.mean((1, 2, 3))
        return torch.stack([m, -m, 0 * m], 1)


def small_images(n=400):
    "Grey squares of 8×8, bright or dark: quickly mixed."
    g = torch.Generator().manual_seed(0)
    labels = torch.randint(2, (n,), generator=g)
    pixels = (60 + 130 * labels[:, None, None, None] + 60 * torch.rand(n, 1, 8, 8, generator=g)).byte()
    return ArrayImages(Info("grey", ("dark", "bright"), 8, (0.5,) * 3, (0.25,) * 3), pixels, labels)


def grey_squares(labels):
    "Squares of 8×8, bright for label 1."
    pixels = 60 + 130 * labels[:, None, None, None] + 60 * torch.rand(len(labels), 1, 8, 8, generator=seeded(0))
    return ArrayImages(Info("grey", ("dark", "bright"), 8, (0.5,) * 3, (0.25,) * 3), pixels.byte(), labels)


class Bright(torch.nn.Module):
    "Sees dark or bright, and never the third class."

    def forward(self, x):
        m = 10 * x.mean((1, 2, 3))
        return torch.stack([-m, m, 0 * m - 20], 1)


def test_blocks_that_lack_a_rare_class_are_drawn_again(tmp_path):
    labels = (torch.arange(2000) % 50 == 0).long()  # 2 %: of 128 draws, 7 % of the blocks have none
    images, recipe = grey_squares(labels), replace(RECIPE, count=4000, mixing=Mixing(**{**FAST, "mask_size": 4}))
    lacking = [b for b in range(16) if not labels[torch.randint(2000, (128,), generator=seeded(0, "block", b))].any()]
    assert lacking  # without another draw the run would end here
    stores = [generate(replace(recipe, count=2000), tmp_path / name, images, Bright()) for name in "ab"]
    assert contents(stores[0].folder) == contents(stores[1].folder)
    mixes = MixedDataset(stores[0].folder, images)
    assert (mixes.batch(torch.arange(len(mixes))).classes.sort(1).values == torch.tensor([0, 1])).all()


def test_a_class_that_is_too_rare_is_an_error_with_advice(tmp_path):
    few = grey_squares((torch.arange(100_000) == 77).long())
    with pytest.raises(ValueError, match="the other classes are too rare.*images.subset"):
        generate(QUICK, tmp_path, few, Bright())
    even = generate(replace(QUICK, count=20, train_images=2), tmp_path, few, Bright())
    assert even.manifest()["data"]["images"] == 2 and len(MixedDataset(even.folder, few.subset(2))) == 20
    with pytest.raises(ValueError, match="Expected images for the folder .*pass images=load_folder"):
        generate(replace(QUICK, data=str(tmp_path)), tmp_path / "other")


QUICK = replace(RECIPE, mixing=Mixing(**{**FAST, "mask_size": 2, "max_iter": 1}), slots=4096)


def test_a_teacher_whose_sets_are_never_solved_is_an_error(tmp_path):
    "After many sets, and nothing is left that the corrected command would meet."
    with pytest.raises(ValueError, match="None of the sets was solved: is the teacher trained.*4,096 sets in a row"):
        generate(QUICK, tmp_path / "new" / "store", small_images(), Torn())
    assert not (tmp_path / "new").exists()
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="in a row, shards 0 to 2"):
        generate(replace(QUICK, shard=2048), tmp_path / "store", small_images(), Torn())
    assert os.listdir(tmp_path / "store") == ["notes.txt"]


class Hard(torch.nn.Module):
    "Torn, but for one set in some hundred, which it knows by the last digits of its pixels."

    def forward(self, x):
        m = 10 * x.mean((1, 2, 3))
        rare = (100 * x.detach().abs().sum((1, 2, 3))).frac() < 0.005
        return torch.stack([m, -m, torch.where(rare, -50.0 - 0 * m, 0 * m)], 1)


def test_a_shard_without_a_solved_set_does_not_end_a_run(tmp_path):
    recipe = replace(QUICK, count=20)
    store = generate(recipe, tmp_path / "store", small_images(), Hard())
    empty = [entry["images"] == 0 for entry in store.manifest()["shards"]]
    assert 3 < sum(empty) < len(empty) and not empty[-1]
    assert len(MixedDataset(store.folder, small_images())) == 20
    before = contents(store.folder)
    for name in ("manifest.json", f"{empty.index(True):05d}.safetensors", f"{empty.index(False):05d}.safetensors"):
        (store.folder / name).unlink()
        generate(recipe, store.folder, small_images(), Hard())
        assert contents(store.folder) == before


@pytest.mark.parametrize(
    "row, ends",
    [
        ([0] * 32, True),
        ([0] * 31, False),
        ([1, *[0] * 32], True),
        ([*[0] * 31, 1, *[0] * 31], False),
        ([0] * 20 + [None] + [0] * 20, False),
    ],
)
def test_how_many_empty_shards_end_a_run(row, ends):
    counts = {i: (images, 128) for i, images in enumerate(row) if images is not None}
    if not ends:
        return _check_solved(counts)
    with pytest.raises(ValueError, match=f"4,096 sets in a row, shards {len(row) - 32} to {len(row) - 1}"):
        _check_solved(counts)


@pytest.mark.parametrize(
    "answer, kind, message",
    [
        (lambda x: Hard()(x).detach(), ValueError, "differentiable"),
        (lambda x: Hard()(x) * 0 + torch.tensor([3.0, 2.0, 1.0]), ValueError, "at least k = 2 different classes"),
        (lambda x: [][0], IndexError, "out of range"),
    ],
)
def test_a_command_that_fails_before_its_first_image_leaves_nothing(answer, kind, message, tmp_path):
    folder = tmp_path / "new" / "store"

    def teacher(x):
        return answer(x) if (folder / "manifest.json").exists() else Hard()(x)

    with pytest.raises(kind, match=message):
        generate(QUICK, folder, small_images(), teacher)
    assert not list(tmp_path.iterdir())


def test_a_command_that_fails_later_keeps_what_was_made(tmp_path):
    network = Hard()

    def tired(x):
        if len(list(tmp_path.glob("store/*.safetensors"))) > 8:
            raise RuntimeError("enough")
        return network(x)

    recipe = replace(QUICK, count=20)
    with pytest.raises(RuntimeError, match="enough"):
        generate(recipe, tmp_path / "store", small_images(), tired)
    assert len(shards(tmp_path / "store")) == 9 and any(n for n, _ in Store(tmp_path / "store").counts().values())
    assert sorted(p.name for p in (tmp_path / "store").iterdir())[0] == "00000.safetensors"  # and no lock
    whole = generate(recipe, tmp_path / "whole", small_images(), lambda x: network(x)).folder
    generate(recipe, tmp_path / "store", small_images(), lambda x: network(x))
    assert contents(tmp_path / "store") == contents(whole)


@pytest.mark.slow
def test_what_a_killed_command_left_before_its_first_image_is_replaced(whole, tmp_path):
    process = start(tmp_path / "store", "--seed", "7")
    while not (tmp_path / "store" / "manifest.json").exists():
        time.sleep(0.01)
    with pytest.raises(ValueError, match="recipe.seed: 7 there, 0 now"):  # as long as it lives
        generate(RECIPE, tmp_path / "store")
    process.kill()
    process.communicate()
    if shards(tmp_path / "store"):
        pytest.skip("the machine was too slow to kill it before its first shard")
    assert (tmp_path / "store" / "manifest.json").exists()
    generate(RECIPE, tmp_path / "store")
    assert contents(tmp_path / "store") == contents(whole)


def test_a_store_with_an_image_is_never_replaced(whole, tmp_path):
    shutil.copytree(whole, tmp_path / "store")
    for path in shards(tmp_path / "store")[1:]:
        path.unlink()
    before = contents(tmp_path / "store")
    for changes in ({"seed": 1}, {"count": 501}, {"slots": 64}):
        with pytest.raises(ValueError, match="with other settings"):
            generate(replace(RECIPE, **changes), tmp_path / "store")
    assert contents(tmp_path / "store") == before


def test_more_slots_than_sets_are_as_many_as_sets(tmp_path):
    few, many = (
        generate(replace(QUICK, count=5, shard=512, slots=slots), tmp_path / str(slots), small_images(), Hard())
        for slots in (512, 10**9)
    )
    for a, b in zip(shards(few.folder), shards(many.folder), strict=True):
        assert _load_card(a)["tensors"] == _load_card(b)["tensors"]


def test_a_request_that_cannot_fit_says_so(tmp_path):
    recipe = replace(RECIPE, slots=10**9, shard=128 * 10**7)
    with pytest.raises(ValueError, match=r"000,000,000 need more than [\d,.]+ GB, .* are free. Take [\d,]+ slots"):
        generate(recipe, tmp_path / "store")
    assert not (tmp_path / "store").exists()


def test_a_teacher_from_a_file(teacher, digits, tmp_path):
    path = save(teacher, tmp_path / "mine.safetensors")
    store = generate(replace(RECIPE, teacher=str(path), count=60), tmp_path / "store")
    assert len(MixedDataset(store.folder, load_data("digits").train)) == 60


def test_python_has_nothing_to_say_of_the_module(tmp_path):
    "`python -m supermix.generate` runs a module that nobody has imported before."
    done = subprocess.run(
        [
            sys.executable,
            "-W",
            "error",
            "-c",
            "import sys, supermix; "
            "assert 'supermix.mixing.generate' not in sys.modules; "
            "assert supermix.distill and supermix.make_mixes",
        ],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert (
        "RuntimeWarning"
        not in subprocess.run(
            [sys.executable, "-m", "supermix.generate", "--help"], capture_output=True, text=True
        ).stderr
    )


def test_the_short_name_is_the_command(tmp_path, monkeypatch):
    "The same settings of the same words, for a folder too, whose number of images is another one."
    seen, before = [], signal.getsignal(signal.SIGINT)
    monkeypatch.setattr("supermix.mixing.generate.command", lambda *settings: seen.append(settings))
    monkeypatch.setattr(warnings, "formatwarning", warnings.formatwarning)  # which the command replaces
    words = ["generate", "--data", str(tmp_path), "--train-images", "None", "--mixing.k", "3"]
    cli.main(words)
    monkeypatch.setattr(sys, "argv", ["supermix.generate", *words[1:]])
    try:
        runpy.run_module("supermix.generate", run_name="__main__")
    finally:
        signal.signal(signal.SIGINT, before)
    assert seen[0] == seen[1] and seen[0][0].count == 1000 and seen[0][0].mixing.k == 3


def test_the_command_line():
    shown = subprocess.run(
        [Path(sys.executable).with_name("supermix"), "generate", "--help"],
        capture_output=True,
        text=True,
        env={**os.environ, "COLUMNS": "120"},
    ).stdout
    for text in (
        "--count",
        "--mixing.k",
        "--mixing.hold",
        "--out",
        "sets per file",
        "images per mixing set",
    ):
        assert text in shown


@pytest.mark.slow
def test_two_processes_are_nearly_twice_as_fast(tmp_path):
    """One thread each, shards of Fashion-MNIST; kept in results/scaling.json. Times are the processes' own, without
    starting Python."""

    def took(name, n):
        options = ["--data", "fashion_mnist", "--count", "8000", "--shard", "256"]
        running = [start(tmp_path / f"{name}", *options) for _ in range(n)]
        said = [process.communicate()[0] for process in running]
        return max(float(text.rsplit(" ", 2)[-2]) for text in said)

    rounds = [(took(f"one{i}", 1), took(f"two{i}", 2)) for i in range(2)]
    speedup = sum(a for a, _ in rounds) / sum(b for _, b in rounds)
    result = {
        "images": 8000,
        "seconds with one process": [a for a, _ in rounds],
        "with two": [b for _, b in rounds],
        "speedup": speedup,
        "command": "pytest tests/test_generate.py --slow -k twice",
    }
    (ROOT / "results" / "scaling.json").write_text(json.dumps(result, indent=1) + "\n")
    assert speedup >= 1.8


def test_slots_suit_the_device_where_none_are_named(teacher, digits, tmp_path):
    recipe = settle(Generation(data="digits"), digits.train, teacher)
    assert (recipe.slots, recipe.shard, recipe.bfloat16) == (128, 4096, False)
    large = ArrayImages(digits.info, torch.zeros(2, 3, 96, 96, dtype=torch.uint8), torch.tensor([0, 1]))
    assert settle(Generation(), large, teacher).slots == 16
    named = Generation(slots=5, shard=256, bfloat16=True)
    assert settle(named, digits.train, teacher) == named
    kept = generate(replace(RECIPE, count=20), tmp_path / "store", digits.train, teacher).manifest()["recipe"]
    assert (kept["slots"], kept["shard"], kept["bfloat16"]) == (128, 128, False)
