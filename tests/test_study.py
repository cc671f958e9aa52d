"""The study: its grid, its intervals, and that every number in its tables comes from a file."""

import json
from dataclasses import asdict, replace
from math import ceil
from pathlib import Path

import pytest
from scipy import stats
from supermix.distillation import MIXERS
from supermix.recipes import METHODS, Mixing
from supermix.study import T95, Trial, core, grid, interval, results, run_trial, table

ROOT = Path(__file__).parent.parent


def test_the_grid_is_the_studys():
    trials = grid()
    assert len({t.file for t in trials}) == len(trials)
    assert {t.seed for t in trials if t.group == "core"} == set(range(5)) and len(core()) == 13
    seen = lambda t: t.updates * t.batch_size * (2 if t.mixer else 1)  # images that the student sees
    assert len({seen(t) for t in trials if t.group == "longer"}) == 1 and {t.seed for t in trials if t.group == "longer"} == {0, 1}
    for group in ("n=500", "n=5000", "WRN-16-1", "further"): assert {t.seed for t in trials if t.group == group} == {0, 1, 2}
    for t in trials:
        assert t.method in METHODS and (t.mixer is None or t.mixer in MIXERS)
        assert t.training.epochs * ceil(t.images / t.batch_size) == t.updates
        assert 0 < t.training.milestones[0] < t.training.milestones[1] < t.training.epochs
    names = {t.name for t in trials if t.group == "budget"}
    assert names == {f"{who}, double {what}" for who in ("alone", "KD") for what in ("batch", "updates")} | {f"{who} + KD, half batch" for who in ("MixUp", "CutMix", "SuperMix")}


def test_students_t():
    for df, value in T95.items(): assert value == pytest.approx(stats.t.ppf(0.975, df), abs=1e-3)
    values = [84.1, 85.0, 83.7, 84.9]
    low, high = stats.t.interval(0.95, 3, sum(values) / 4, stats.sem(values))
    mean, half = interval(values)
    assert mean - half == pytest.approx(low, abs=1e-3) and mean + half == pytest.approx(high, abs=1e-3)
    assert interval([5.0]) == (5.0, float("inf"))


def test_every_result_is_of_its_trial():
    found = results(ROOT / "results" / "study")
    by_file = {t.file: t for t in grid()}
    files = sorted((ROOT / "results" / "study").rglob("*.json"))
    assert sum(len(seeds) for rows in found.values() for seeds in rows.values()) == len(files)
    for path in files:
        result = json.loads(path.read_text())
        trial = Trial(**result["trial"] | {"mixing": Mixing(**result["trial"]["mixing"])})  # options that came later have their defaults
        assert trial == by_file[str(path.relative_to(ROOT / "results" / "study"))]
        assert 10 < result["accuracy"] < 100 and result["core_seconds"]["training"] > 10


def test_the_table_says_what_was_not_run():
    row = lambda accuracy: {"accuracy": accuracy, "core_seconds": {"mixing": 10.0, "training": 20.0}}
    text = table({"A": {0: row(80.0), 1: row(82.0)}, "B": {}}, {0: row(79.0), 1: row(80.0)})
    assert "| A | 81.00 ± 12.71 | +1.50 ± 6.35 | 2 | 10 + 20 |" in text and "| B | not run |" in text


def test_a_trial_says_all_about_itself(teacher, digits, tmp_path):
    trial = replace(core()[1], images=60, updates=2, batch_size=30)
    result, again = (run_trial(trial, digits, teacher, tmp_path) for _ in range(2))
    assert result["accuracy"] == again["accuracy"] and result["loss"] == again["loss"]
    assert result["trial"] == asdict(trial) and result["teacher"] == teacher.card["sha256"][:16] and result["threads"] == 1
