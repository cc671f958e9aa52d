"""What is measured on a card: the prepared run of `tools/card.py`, the ladder of a race, and the facts in its files."""

import ast
import importlib.util
import inspect
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from supermix.cli import COMMANDS, parse_command
from supermix.experiments import throughput
from supermix.experiments.large import measure_large
from supermix.experiments.race import _Way, _ladder, _make_engine, race, report_file
from supermix.experiments.throughput import best_device, given_command, machine_facts
from supermix.recipes import FAST, Mixing

ROOT = Path(__file__).parent.parent
spec = importlib.util.spec_from_file_location("card", ROOT / "tools" / "card.py")
card = importlib.util.module_from_spec(spec)
spec.loader.exec_module(card)


@pytest.mark.parametrize("small", [False, True])
def test_the_steps_are_commands_of_today(small, tmp_path):
    steps = list(card.steps(tmp_path, small, "cpu", ""))
    names = [name for name, *_ in steps]
    assert names[0] == "tests" and names[1].startswith("race") and len(set(names)) == len(names) == 6 - small
    assert sum(seconds for *_, seconds in steps[:2]) < 12 * 60  # what matters most has its time
    for _, command, seconds in steps:
        if command[1:3] == ["-m", "supermix"]:
            assert callable(parse_command(command[3:]))
        elif command[1] == "-c":
            compile(command[2], "a step", "exec")
        else:
            assert Path(command[-1]).is_file()
        assert 60 < seconds < 600


@pytest.mark.parametrize("source", [card.DISTIL, card.LARGE], ids=["distil", "photographs"])
def test_a_step_finds_what_it_imports(source):
    lines = [node for node in ast.walk(ast.parse(source)) if isinstance(node, (ast.Import, ast.ImportFrom))]
    exec(compile(ast.Module(lines, []), "imports", "exec"), {})


@pytest.mark.parametrize(
    "work, ended", [("pass", 0), ("import sys; sys.exit(3)", 3), ("import time; time.sleep(60)", "out of time")]
)
def test_how_a_step_ended(work, ended, capfd):
    step = card.take("a step", [sys.executable, "-c", work], 20 if ended != "out of time" else 3)
    assert step["ended"] == ended and step["seconds"] < 30


def test_made_up_pictures_are_called_so(tmp_path, monkeypatch):
    "The step's program, with the measurement left out."
    monkeypatch.setattr("supermix.experiments.large.measure_large", lambda *_: {"ratio": 1.0, "folder": "tmp"})
    monkeypatch.setattr(
        "supermix.experiments.large.large_teacher", lambda: (lambda x: x.mean((2, 3)), (0.5,) * 3, (0.5,) * 3)
    )
    monkeypatch.setattr("supermix.experiments.large.photographs_in", lambda *_: SimpleNamespace(labels=torch.arange(9)))
    monkeypatch.setattr(sys, "argv", ["-c", str(tmp_path / "large.json"), "cpu", "1", "8", "2", ""])
    program = card.LARGE.replace("teacher.to(device)", "teacher")
    exec(compile(program, "a step", "exec"), {})
    assert json.loads((tmp_path / "large.json").read_text())["folder"].startswith("made-up pictures")
    told = subprocess.run([sys.executable, ROOT / "tools" / "card.py", "--help"], capture_output=True, text=True).stdout
    assert "64 pictures of random colours" in " ".join(told.split())


@pytest.mark.slow
def test_a_small_run(tmp_path):
    command = [sys.executable, ROOT / "tools" / "card.py", "--small", "--minutes", "30", "--only", "distil"]
    done = subprocess.run([*command, "--out", tmp_path], env=os.environ | {"TQDM_DISABLE": "1"})
    told = json.loads((tmp_path / "card.json").read_text())
    assert done.returncode == 0 and [step["ended"] for step in told["steps"]] == [0] and told["torch"]
    ways = json.loads((tmp_path / "distil_gpu.json").read_text())["ways"]
    assert ways["replayed"]["test"] == pytest.approx(ways["pass by pass"]["test"], abs=5)


def test_facts_of_this_machine(monkeypatch):
    facts = machine_facts("cpu")
    assert facts["torch"] == torch.__version__ and facts["device"] and "driver" not in facts
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    assert machine_facts("cuda")["device"] == "NVIDIA H200" and "driver" in machine_facts("cuda")


def test_the_drivers_version(monkeypatch, tmp_path):
    told = tmp_path / "nvidia-smi"
    told.write_text("#!/bin/sh\necho 570.86.15\necho 570.86.15\n")
    told.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    assert throughput._driver_version() == "570.86.15"
    told.write_text("#!/bin/sh\nexit 9\n")
    assert throughput._driver_version() is None
    monkeypatch.setenv("PATH", str(tmp_path / "nothing"))
    assert throughput._driver_version() is None


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_device_that_is_not_there(tmp_path):
    assert best_device() == best_device("cpu") == "cpu"
    for command in ("race", "throughput"):
        with pytest.raises(
            ValueError, match="Expected a device that this machine has, such as cpu or cuda:0, got 'cuda'"
        ):
            parse_command([command, "--data", "digits", "--device", "cuda", "--out", str(tmp_path / "x.json")])()
    assert not list(tmp_path.iterdir())


def test_files_of_a_race():
    assert report_file("fashion_mnist", "cpu") == Path("results/engine.json")
    assert report_file("cifar100", "cuda:0") == Path("results/engine_cifar100_gpu.json")
    assert report_file("digits", "cpu") == Path("results/engine_digits.json")


def test_a_file_of_results_has_the_command_as_it_was_given(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/usr/bin/supermix", "large", "--photos", "my photos"])
    assert given_command(measure_large, "large") == "supermix large --photos 'my photos'"
    assert given_command(measure_large, "race") == "supermix.experiments.large.measure_large"
    monkeypatch.setattr(sys, "argv", ["-c", "out.json"])
    assert given_command(measure_large, "large") == "supermix.experiments.large.measure_large"


def test_what_is_raced_by_default_is_named():
    assert inspect.signature(COMMANDS["race"]).parameters["data"].default == "fashion_mnist"
    for file in ("engine.json", "engine_cifar100.json"):
        data = "cifar100" if "cifar100" in file else "fashion_mnist"
        report = json.loads((ROOT / "results" / file).read_text())
        assert report["teacher"] == f"resnet20 on {data}" and report_file(data, "cpu").name == file


def test_the_ladder_adds_one_idea_at_a_time():
    ways = list(_ladder(3).values())
    for before, after in zip(ways, ways[1:]):
        assert sum(a != b for a, b in zip(before, after)) == 1
    assert {way.mixing for way in ways} == {Mixing(**FAST, k=3)} and ways[0].slots == 128 and not ways[0].replays


def test_ways_of_a_race(digits, teacher):
    "Each way gets as many sets as suit its slots; on a processor all find the same."
    mixing = replace(Mixing(**FAST), max_iter=6)
    engine = _make_engine(teacher, digits.train, _Way(mixing, 256, replays=False))
    assert (engine.slots, engine.replays, engine.dtype) == (256, False, torch.float32)
    ways = {"few": _Way(mixing, 64), "many": _Way(mixing, 256, replays=False)}
    result = race(teacher, digits.train, ways, rounds=1, blocks=1, batch=8)
    assert list(result) == ["baseline", "few", "many"] and result["many"]["passes/s"] > 0
    assert result["few"]["solved"] == pytest.approx(result["many"]["solved"], abs=0.1)
