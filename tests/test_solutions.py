"""Every chapter's exercises have their solutions, and these run."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
CHAPTERS = sorted((ROOT / "nbs").rglob("[0-9]*.ipynb"))
SOLUTIONS = sorted((ROOT / "solutions").glob("*.ipynb"))


def prose(path):
    "A notebook's markdown cells as one text."
    return "\n\n".join(
        "".join(cell["source"]) for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == "markdown"
    )


def exercises(path):
    "The numbers of a chapter's exercises: those of the list under its heading."
    section = re.search(r"^## Exercises\n(.*?)(?=^## |\Z)", prose(path), re.MULTILINE | re.DOTALL)
    return [int(n) for n in re.findall(r"^(\d+)\. ", section[1], re.MULTILINE)] if section else None


WITH_EXERCISES = {path.stem: numbers for path in CHAPTERS if (numbers := exercises(path)) is not None}


def test_exercises_are_numbered():
    assert len(WITH_EXERCISES) > 10
    for stem, numbers in WITH_EXERCISES.items():
        assert numbers and numbers == list(range(1, len(numbers) + 1)), stem


def test_no_solutions_without_exercises():
    assert {path.stem for path in SOLUTIONS} <= set(WITH_EXERCISES)


@pytest.mark.parametrize("stem", [*WITH_EXERCISES])
def test_each_exercise_is_solved(stem):
    path = ROOT / "solutions" / f"{stem}.ipynb"
    assert path.is_file()
    assert [int(n) for n in re.findall(r"^## Exercise (\d+)\b", prose(path), re.MULTILINE)] == WITH_EXERCISES[stem]
    cells = [cell for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == "code"]
    assert any(cell["outputs"] for cell in cells), "a reader on the web sees nothing: run `make notebooks`"
    assert not any(output["output_type"] == "error" for cell in cells for output in cell["outputs"])
    assert not any(line.startswith(("#| export", "#| default_exp")) for cell in cells for line in cell["source"]), (
        "solutions export nothing"
    )


@pytest.mark.slow
@pytest.mark.parametrize("path", SOLUTIONS, ids=lambda p: p.stem)
def test_solutions_run_from_a_clean_kernel(path):
    command = [
        sys.executable,
        "-m",
        "nbconvert",
        "--log-level=ERROR",
        "--to",
        "notebook",
        "--execute",
        "--stdout",
        path,
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
