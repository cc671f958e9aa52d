"""The study: its grid, its intervals, and that every number in its tables comes from a file."""

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import asdict, replace
from math import ceil
from pathlib import Path

import pytest
import torch
from scipy import stats
from supermix.data import ArrayImages, load_data
from supermix.distillation.distill import MIXERS
from supermix.experiments import study as module
from supermix.experiments.study import (
    _T95,
    Trial,
    _charge_prices,
    _clutter,
    _confidence_interval,
    _core_seconds,
    _core_trials,
    _load_data_and_teacher,
    _measure_prices,
    _Place,
    _run_all,
    _run_trial,
    all_trials,
    load_results,
    study,
    study_table,
)
from supermix.recipes import METHODS, Mixing
from supermix.zoo import create, save

ROOT = Path(__file__).parent.parent


def test_the_grid_is_the_studys():
    trials = all_trials()
    assert len({t.file for t in trials}) == len(trials)
    assert {t.seed for t in trials if t.group == "core"} == set(range(5)) and len(_core_trials()) == 13
    both = lambda t: t.mixer and not METHODS[t.method].mixes  # natural and mixed images
    seen = lambda t: t.updates * t.batch_size * (2 if both(t) else 1)  # images that the student sees
    same = [t for t in trials if "double" in t.name or t.name == "SuperMix + KD"]
    for hundred in {t.group for t in same if t.data == "cifar100"}:
        assert len({seen(t) for t in same if t.group == hundred}) == 1 < len([t for t in same if t.group == hundred])
    assert len({seen(t) for t in same if t.data != "cifar100"}) == 1
    assert {t.seed for t in trials if t.group == "ablation"} == {0, 1}
    for group in ("n=500", "n=5000", "WRN-16-1", "harder", "schedule", "further"):
        assert {t.seed for t in trials if t.group == group} == {0, 1, 2}
    assert {t.seed for t in trials if t.name.startswith("KD, rate")} == {0}
    assert {t.data for t in trials if t.group == "harder"} == {"cluttered"}
    assert {t.seed for t in trials if t.group == "cifar100"} == {0, 1, 2}
    assert {t.data for t in trials if t.group.startswith("cifar100")} == {"cifar100"}
    assert {t.data for t in trials if t.group != "harder" and "cifar100" not in t.group} == {"fashion_mnist"}
    for t in trials:  # what a GPU is needed for
        assert bool(t.teacher) == t.group.startswith("cifar100-") == t.bfloat16
    lengths = {
        group: {t.training.epochs for t in trials if t.group == group} for group in ("cifar100-30", "cifar100-120")
    }
    assert lengths == {"cifar100-30": {30, 60}, "cifar100-120": {120, 240}}
    for t in trials:
        assert t.method in METHODS and (t.mixer is None or t.mixer in MIXERS)
        assert t.training.epochs * ceil(t.images / t.batch_size) == t.updates
        assert 0 < t.training.milestones[0] < t.training.milestones[1] < t.training.epochs
    doubles = {f"{who}, double {what}" for who in ("alone", "KD") for what in ("batch", "updates")}
    halves = {f"{who} + KD, half batch" for who in ("MixUp", "CutMix", "SuperMix")}
    assert {t.name for t in trials if t.group == "budget"} == doubles | halves


def test_students_t():
    for df, value in _T95.items():
        assert value == pytest.approx(stats.t.ppf(0.975, df), abs=1e-3)
    values = [84.1, 85.0, 83.7, 84.9]
    low, high = stats.t.interval(0.95, 3, sum(values) / 4, stats.sem(values))
    mean, half = _confidence_interval(values)
    assert mean - half == pytest.approx(low, abs=1e-3) and mean + half == pytest.approx(high, abs=1e-3)
    assert _confidence_interval([5.0]) == (5.0, float("inf"))


def test_every_result_is_of_its_trial():
    found = load_results(ROOT / "results" / "study")
    by_file = {t.file: t for t in all_trials()}
    files = sorted((ROOT / "results" / "study").glob("*/*.json"))
    assert sum(len(seeds) for rows in found.values() for seeds in rows.values()) == len(files)
    for path in files:
        result = json.loads(path.read_text())
        mixing = Mixing(**result["trial"]["mixing"])  # options that came later have their defaults
        drops = tuple(result["trial"].get("drops", Trial.drops))
        trial = Trial(**result["trial"] | {"mixing": mixing, "drops": drops})
        assert trial == by_file[str(path.relative_to(ROOT / "results" / "study"))]
        assert 10 < result["accuracy"] < 100
        assert result["core_seconds"]["training"] > 10 if result["device"] == "CPU" else result["core_seconds"] is None


def test_the_table_says_what_was_not_run():
    row = lambda accuracy: {"accuracy": accuracy, "core_seconds": {"mixing": 10.0, "training": 20.0}}
    fast = {"accuracy": 81.0, "core_seconds": None}  # by a GPU
    rows = {"A": {0: row(80.0), 1: row(82.0)}, "B": {}, "C": {0: row(80.0), 1: fast}, "D": {0: fast, 1: fast}}
    text = study_table(rows, {0: row(79.0), 1: row(80.0)})
    assert "| C | 80.50 ± 6.35 | +1.00 ± 0.00 | 2 | 10 + 20 |" in text and "| 2 |  |" in text
    assert "| A | 81.00 ± 12.71 | +1.50 ± 6.35 | 2 | 10 + 20 |" in text and "| B | not run |" in text


def test_a_trial_says_all_about_itself(teacher, digits, tmp_path):
    trial = replace(_core_trials()[1], images=60, updates=2, batch_size=30)
    result, again = (_run_trial(trial, digits, teacher, tmp_path) for _ in range(2))
    assert result["accuracy"] == again["accuracy"] and result["loss"] == again["loss"]
    assert result["trial"] == asdict(trial) and result["threads"] == torch.get_num_threads()
    assert result["teacher"] == teacher.card["sha256"][:16]
    assert result["teacher_accuracy"] == teacher.card["test_accuracy"]


@pytest.mark.slow
def test_prices_are_those_of_whole_runs(teacher, digits, tmp_path):
    rows = [replace(_core_trials()[i], images=60, updates=updates, batch_size=30) for i, updates in ((1, 40), (9, 20))]
    listed = _measure_prices(rows, digits, teacher, rounds=2, updates=4)["rows"]
    kd, supermix = (listed[row.name] for row in rows)
    assert kd["mixing"] == [0, 0] and all(len(took) == 2 for parts in listed.values() for took in parts.values())
    training = _run_trial(rows[0], digits, teacher, None)["core_seconds"]["training"]
    mixing = (
        rows[1].mixes
        * _run_trial(replace(rows[1], mixes=1, updates=2), digits, teacher, tmp_path)["core_seconds"]["mixing"]
    )  # 600 images, from what 60 took
    for price, whole in ((kd["training"], training), (supermix["mixing"], mixing)):
        assert whole / 5 < min(price) < 5 * whole  # unscaled, either would be a tenth


def test_every_row_that_is_compared_has_a_price():
    found, listed = (
        load_results(ROOT / "results" / "study"),
        json.loads((ROOT / "results" / "study" / "prices.json").read_text())["rows"],
    )
    rows = found["core"] | found["budget"]
    assert listed.keys() == rows.keys()
    for name, seeds in _charge_prices(rows, listed).items():
        assert _core_seconds(seeds) == min(listed[name]["training"])
        assert _core_seconds(seeds, "mixing") == min(listed[name]["mixing"])
        assert [r["accuracy"] for r in seeds.values()] == [r["accuracy"] for r in rows[name].values()]
        assert (_core_seconds(seeds, "mixing") > 0) == name.startswith("SuperMix")


def test_clutter_puts_an_item_on_a_piece_of_a_photograph():
    plain = load_data("digits")
    photographs = torch.arange(2 * 40 * 50).remainder(151).view(2, 40, 50).byte()
    images = ArrayImages(plain.info, torch.zeros(5, 1, 32, 32, dtype=torch.uint8), torch.arange(5))
    images.pixels[2, 0, 2:-2, 2:-2] = 200
    busy, cover = _clutter(images, photographs, plain.info, 3)
    again, _ = _clutter(images, photographs, plain.info, 3)
    assert busy.labels.equal(images.labels) and busy.pixels.equal(again.pixels)
    assert cover.flatten(1).sum(1).tolist() == [0, 0, 400, 0, 0] and (busy.pixels[2, 0] == 200).equal(cover[2] == 1)
    pieces = {p[y : y + 32, x : x + 32].numpy().tobytes() for p in photographs for y in range(9) for x in range(19)}
    for i in (0, 1, 3, 4):
        assert busy.pixels[i, 0].numpy().tobytes() in pieces  # black: the photograph alone
    rows, columns = (busy.pixels[2, 0] == 200).nonzero().T
    corner, edge = (int(rows.min()), int(columns.min())), 20
    square = busy.pixels[2, 0, corner[0] : corner[0] + edge, corner[1] : corner[1] + edge]
    assert (square == 200).all()
    assert any(
        all(piece[i] == value for i, value in enumerate(busy.pixels[2, 0].flatten().tolist()) if value != 200)
        for piece in pieces
    )


def test_cifar100_is_downloaded_only_by_name(tmp_path, monkeypatch, capsys):
    run = []
    monkeypatch.setenv("SUPERMIX_DATA", str(tmp_path / "nothing"))
    monkeypatch.setattr(module, "_run_all", lambda trials, *_: run.append({trial.group for trial in trials}))
    monkeypatch.setattr(module, "_is_found", lambda name: False)
    study(tmp_path, tmp_path, minutes=0)
    assert (
        "core" in run[0] and "cifar100" not in run[0] and "left out: supermix study --groups" in capsys.readouterr().out
    )
    study(tmp_path, tmp_path, groups=("cifar100",), minutes=0)
    monkeypatch.setattr(module, "_is_found", lambda name: True)
    study(tmp_path, tmp_path, minutes=0)
    assert run[1] == {"cifar100"} and {"core", "cifar100"} <= run[2] and not capsys.readouterr().out


def test_what_is_found_is_found_without_a_download(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("SUPERMIX_DATA", raising=False)
    monkeypatch.setattr("supermix.data._CACHE", tmp_path / "cache")
    assert module._is_found("digits") and not module._is_found("cifar100")
    assert not list(tmp_path.iterdir())


def test_an_unknown_group_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="Unknown group 'cor'. Did you mean 'core'"):
        study(tmp_path, groups=("cor",))


def test_a_teacher_that_is_missing_is_an_error_with_its_command(tmp_path):
    with pytest.raises(FileNotFoundError, match="supermix teacher --data digits --network wrn_16_1 --out .* --half"):
        _load_data_and_teacher("digits", "wrn_16_1", tmp_path, tmp_path / "study")


def test_a_trained_teacher_is_found(tmp_path):
    network, folder = create("wrn_16_1", num_classes=10), tmp_path / "teachers"
    network.info = load_data("digits").info
    save(network, folder / "digits_wrn_16_1.safetensors", half=True)
    (folder / "digits_wrn_16_1.json").write_text('{"sha256": "0123", "test_accuracy": 1.0}')
    data, teacher = _load_data_and_teacher("digits", "wrn_16_1", tmp_path, tmp_path / "study")
    x = data.test[:8][0]
    assert teacher.card["sha256"] == "0123" and teacher.name == "wrn_16_1"
    assert torch.allclose(teacher(x), network.eval()(x), atol=1e-2)


# ---- several at a time


def tiny(name, **changes):
    return replace(Trial("tiny", name, "kd"), data="digits", images=60, updates=2, batch_size=30, **changes)


@pytest.mark.slow
def test_runs_together_are_those_one_by_one(tmp_path, capfd):
    trials = [tiny("a"), tiny("b", mixer="mixup"), tiny("c", seed=1)]
    _run_all(trials, _Place(tmp_path / "one", tmp_path, "cpu"), 1, float("inf"))
    _run_all(trials, _Place(tmp_path / "two", tmp_path, "cpu"), 2, float("inf"))
    lines = [line for line in capfd.readouterr().out.splitlines() if line]
    assert len(lines) == 6 and sorted(line[:30] for line in lines[:3]) == sorted(line[:30] for line in lines[3:])
    for trial in trials:
        one, two = (json.loads((tmp_path / place / trial.file).read_text()) for place in ("one", "two"))
        assert one["accuracy"] == two["accuracy"] and one["loss"] == two["loss"] and two["threads"] == 1
    _run_all(trials, _Place(tmp_path / "two", tmp_path, "cpu"), 2, float("inf"))  # all is there
    assert not capfd.readouterr().out.strip()


@pytest.mark.parametrize("together", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_run_that_fails_is_named_and_the_others_go_on(together, tmp_path, capfd):
    trials = [tiny("odd", student="resnet9"), tiny("good"), tiny("better", seed=1)]
    with pytest.raises(ValueError, match="1 of the runs failed, .*tiny/odd-0.json .*Unknown network 'resnet9'"):
        _run_all(trials, _Place(tmp_path, tmp_path, "cpu"), together, float("inf"))
    assert "failed: tiny/odd-0.json (ValueError: Unknown network 'resnet9'" in capfd.readouterr().out
    assert sorted(p.name for p in (tmp_path / "tiny").glob("*.json")) == ["better-1.json", "good-0.json"]


def test_no_run_is_begun_after_the_deadline(tmp_path):
    _run_all([tiny("late")], _Place(tmp_path, tmp_path, "cpu"), 2, 0.0)
    assert not list(tmp_path.iterdir())


def test_none_together_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="Expected 1 run or more together, got 0"):
        study(tmp_path, together=0)


LONG = """
import sys
from dataclasses import replace
from pathlib import Path
import supermix.experiments.study as module

if __name__ == "__main__":
    from supermix.cli import main
    trials = [replace(module.Trial("long", str(i)), data="digits", images=60, updates=100_000) for i in range(4)]
    module.all_trials = lambda: trials
    sys.argv = ["supermix", "study", "--together", "2", "--groups", "long", "--out", sys.argv[1], "--home", sys.argv[1]]
    main()
"""


def in_session(leader):
    "Processes of a session that are no zombies."
    found = []
    for place in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            state, _, _, session = place.joinpath("stat").read_text().rpartition(")")[2].split()[:4]
            if int(session) == leader and state != "Z":
                found.append(int(place.name))
    return found


@pytest.mark.slow
@pytest.mark.parametrize("how", ["Ctrl-C", "the parent is killed"])
@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="counts processes in /proc")
def test_all_workers_end_with_the_command(how, tmp_path):
    (tmp_path / "long.py").write_text(LONG)
    process = subprocess.Popen(
        [sys.executable, tmp_path / "long.py", tmp_path / "out"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    until = time.monotonic() + 180
    while len(list(tmp_path.glob("out/long/.*.lock"))) < 2 and process.poll() is None and time.monotonic() < until:
        time.sleep(0.2)
    assert process.poll() is None and len(in_session(process.pid)) >= 3  # two are at work
    if how == "Ctrl-C":
        os.killpg(process.pid, signal.SIGINT)  # as a terminal sends it: to all
    else:
        process.kill()
    out, err = process.communicate(timeout=60)
    while in_session(process.pid) and time.monotonic() < until:
        time.sleep(0.2)
    assert not in_session(process.pid) and "Traceback" not in err
    if how == "Ctrl-C":
        assert process.returncode == 130 and "stopped. Run the same command again to resume it." in err
