"""The house's own tool: which outputs are of today's code, on a small copy of the real notebooks."""

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

ROOT = Path(__file__).parent.parent


ALL = ["00_core", "31_mixing.mixers", "index", "runs/01_cifar100_distillation", "solutions/33_mixing.solver"]


def uses_of(house, path):
    return house.dependencies(house.House(house.ROOT), path)


@pytest.fixture
def house(tmp_path, monkeypatch):
    "tools/house.py of a copy with the whole package and four notebooks, all of them stamped."
    for folder in ("supermix", "tools"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "nbs" / "runs").mkdir(parents=True)
    (tmp_path / "solutions").mkdir()
    shutil.copy(ROOT / "settings.ini", tmp_path)
    for name in ("index", "00_core", "31_mixing.mixers", "runs/01_cifar100_distillation"):
        shutil.copy(ROOT / "nbs" / f"{name}.ipynb", tmp_path / "nbs" / f"{name}.ipynb")
    shutil.copy(ROOT / "nbs" / "33_mixing.solver.ipynb", tmp_path / "solutions")
    monkeypatch.syspath_prepend(tmp_path / "tools")
    for name in ("freshness", "course"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    spec = importlib.util.spec_from_file_location("house", tmp_path / "tools" / "house.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.stale()[0] == dict.fromkeys(ALL, ["never executed"])
    module.write_stamps(
        {module.name_of(path): {"uses": uses_of(module, path), "seconds": 1.0} for path in module.notebooks()}
    )
    assert module.stale() == ({}, [])
    return module


def edit(path, change):
    "Change a notebook's cells in place."
    notebook = json.loads(path.read_text())
    change(notebook["cells"])
    path.write_text(json.dumps(notebook))


def cells_of(kind, cells):
    return [cell for cell in cells if cell["cell_type"] == kind and cell["source"]]


def write_notebook(path, code):
    cell = {"cell_type": "code", "id": "one", "source": code, "metadata": {}, "outputs": [], "execution_count": None}
    kernel = {"kernelspec": {"display_name": "python3", "language": "python", "name": "python3"}}
    path.write_text(json.dumps({"cells": [cell], "metadata": kernel, "nbformat": 4, "nbformat_minor": 5}))


def test_a_code_cell_makes_its_notebook_stale(house):
    edit(
        house.ROOT / "nbs" / "31_mixing.mixers.ipynb",
        lambda cells: cells_of("code", cells)[-1]["source"].append("\n1 + 1"),
    )
    assert house.stale() == ({"31_mixing.mixers": ["its cells"]}, [])


def test_prose_and_outputs_do_not(house):
    def change(cells):
        for cell in cells_of("markdown", cells):
            cell["source"].append("\nMore words.")
        for cell in cells_of("code", cells):
            cell.update(outputs=[], execution_count=7)

    for path in house.notebooks():
        edit(path, change)
    assert house.stale() == ({}, [])


def change_code(house, module, old, new):
    path = house.ROOT / "supermix" / f"{module}.py"
    assert path.read_text().count(old) == 1
    path.write_text(path.read_text().replace(old, new))


@pytest.mark.parametrize(
    "module, old, new, name, changed",
    [
        (
            "mixing/masks",
            "def areas(",
            "@no_grad\ndef areas(",
            "areas",
            {"31_mixing.mixers", "runs/01_cifar100_distillation", "index"},
        ),
        # through create, a registry and a class: no cell names it
        (
            "models/blocks",
            "class Block(nn.Module)",
            "class Block(nn.Module, object)",
            "Block",
            {"index", "runs/01_cifar100_distillation"},
        ),
        ("explore/trace", "def share_out(", "def share_out(more, ", "share_out", set()),
        # in a module that every notebook imports, but reached by few
        ("core", "def commit(", "def commit(more, ", "commit", {"runs/01_cifar100_distillation"}),
    ],
)
def test_a_definition_makes_those_stale_that_reach_it(house, module, old, new, name, changed):
    change_code(house, module, old, new)
    found, gone = house.stale()
    assert set(found) - {"solutions/33_mixing.solver"} == changed and not gone
    assert all(why == [name] for why in found.values())


def test_words_layout_and_moves_do_not(house):
    "Comments, docstrings, line breaks, and the module that a definition lives in."
    change_code(
        house, "core", "def commit() -> str:\n    \"", "def commit(\n) -> str:  # a comment\n\n    \"In other words: "
    )
    package = house.ROOT / "supermix" / "mixing"
    text = (package / "masks.py").read_text()
    start = text.index("def areas(")
    stop = text.index("\n# %%", start)
    (package / "more.py").write_text("import torch\n" + text[start:stop])
    (package / "masks.py").write_text(text[:start] + "from .more import areas\n" + text[stop:])
    assert house.stale() == ({}, [])


def test_another_teacher_makes_those_stale_that_may_ask_it(house):
    (house.ROOT / "supermix" / "teachers" / "digits.safetensors").write_bytes(b"")
    found, _ = house.stale()
    assert {"index", "runs/01_cifar100_distillation"} <= set(found) and "00_core" not in found
    assert found["index"] == ["supermix/teachers/digits.safetensors"]


def test_a_teacher_that_is_new_does_not(house):
    (house.ROOT / "supermix" / "teachers" / "new.safetensors").write_bytes(b"1")
    assert house.stale() == ({}, [])


def test_results_make_those_stale_that_show_them(house):
    shows = house.ROOT / "nbs" / "02_shows.ipynb"
    write_notebook(shows, 'print(open("../results/one.json").read(), *Path("../results/study").glob("*/*.json"))')
    (house.ROOT / "results" / "study" / "core").mkdir(parents=True)
    seen = {tuple(uses_of(house, shows))}
    for name, text in (("one.json", "1"), ("study/core/KD-0.json", "2"), ("study/core/KD-0.json", "3")):
        (house.ROOT / "results" / name).write_text(text)
        seen.add(tuple(uses_of(house, shows)))
    for name in ("study/core/.KD-0.json.lock", "two.json"):
        (house.ROOT / "results" / name).write_text("")
    assert tuple(uses_of(house, shows)) in seen and len(seen) == 4


def test_a_notebook_that_there_is_not(house):
    done = subprocess.run(
        [sys.executable, "tools/house.py", "execute", "00", "99_nothing"],
        cwd=house.ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1 and "no notebook whose name starts with 99_nothing" in done.stderr


def test_new_notebooks_and_those_that_are_gone(house):
    (house.ROOT / "nbs" / "31_mixing.mixers.ipynb").rename(house.ROOT / "nbs" / "32_mixers.ipynb")
    assert house.stale() == ({"32_mixers": ["never executed"]}, ["31_mixing.mixers"])


def test_executing_what_is_stale(house):
    good, bad, old = (house.ROOT / "nbs" / name for name in ("01_good.ipynb", "02_bad.ipynb", "03_old.ipynb"))
    write_notebook(good, "import supermix.core\nprint(supermix.core.__file__)")
    write_notebook(bad, "1 / 0")
    write_notebook(old, "print('as it was')")
    kept = house.stamps() | {
        "02_bad": {"uses": {"00000000": "its cells"}, "seconds": 2.0},
        "03_old": {"uses": uses_of(house, old), "seconds": 3.0},
    }
    house.write_stamps(kept)
    before = bad.read_text(), old.read_text()
    command = [sys.executable, "tools/house.py", "execute", "--stale", "--workers", "2", "01", "02", "03"]
    done = subprocess.run(
        command, cwd=house.ROOT, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)}
    )
    assert (
        done.returncode == 1
        and done.stderr.endswith("Failed, and not changed: 02_bad\n")
        and "ZeroDivisionError" in done.stderr
    )
    assert (bad.read_text(), old.read_text()) == before
    assert (
        house.stale() == ({"02_bad": ["its cells"]}, [])
        and house.stamps()["02_bad"] == kept["02_bad"]
        and house.stamps()["03_old"] == kept["03_old"]
    )
    outputs = json.loads(good.read_text())["cells"][0]["outputs"]
    assert "".join(outputs[0]["text"]).strip() == str(house.ROOT / "supermix" / "core.py")  # of its own tree's package
    assert house.stamps()["01_good"]["seconds"] > 0 and not list((house.ROOT / "nbs").glob(".*"))


# ---- the table of chapters


def test_the_table_of_chapters_is_written_from_the_chapters(house):
    table = course_of(house)
    rows = {re.match(r"\| \[(?:run )?(\d\d) ", line)[1]: line for line in table.splitlines() if line.startswith("| [")}
    assert list(rows) == ["00", "31", "01"] and "runs/01_cifar100_distillation.ipynb) |" in rows["01"]
    two = ["## Exercises\n\n1. One.\n2. Two."]
    edit(
        house.ROOT / "nbs" / "31_mixing.mixers.ipynb",
        lambda cells: [cell.update(source=two) for cell in cells if "## Exercises\n" in cell["source"]],
    )
    edit(
        house.ROOT / "nbs" / "00_core.ipynb",
        lambda cells: cells_of("markdown", cells)[0].update(
            source=["# Another title\n", "\n", "> Another | line.\n", "\n", "word " * 1500]
        ),
    )
    house.write_stamps(house.stamps() | {"00_core": house.stamps()["00_core"] | {"seconds": 21.0}})
    changed = {line for line in course_of(house).splitlines() if line not in table.splitlines()}
    core = next(line for line in changed if "00_core" in line)
    assert core.startswith("| [00 Another title](00_core.ipynb) | variation | Another \\| line. | – |")
    assert core.endswith("| 30 |")
    assert int(core.split(" | ")[-3].removeprefix("≈ ")) >= 10  # minutes for 1,500 words and the code
    assert any("31_mixing.mixers" in line and line.endswith("| 24 | 5 |") for line in changed)  # twelve for each


def read_column(house):
    "By number: what the table says of the minutes that a chapter takes to read."
    rows = [line.split(" | ") for line in course_of(house).splitlines() if line.startswith("| [")]
    return {re.search(r"\d\d", row[0])[0]: row[-3] for row in rows}


def test_times_of_readers_replace_the_estimates(house):
    before = read_column(house)
    assert all(re.fullmatch(r"≈ \d+", minutes) for minutes in before.values())
    assert "No reader has reported a time yet" in course_of(house)
    house.REPORTED.write_text('{"31_mixing.mixers": [50, 200, 90]}')
    assert read_column(house) == before | {"31": "90 (3)"}
    assert "Readers have reported their times for 1 of 3 notebooks." in course_of(house)
    row = next(line for line in course_of(house).splitlines() if line.startswith("| **The main path**"))
    assert row == "| **The main path** | | | | 2 hours | 1 hours | |"  # of chapters 22 to 60 only 31 is here


@pytest.mark.parametrize(
    "text, message",
    [
        ('{"31": [50]}', "Expected names of notebooks .*got '31'"),
        ('{"00_core": [0]}', "Expected a list of minutes for 00"),
    ],
)
def test_what_is_no_reading_time_is_said(house, text, message):
    house.REPORTED.write_text(text)
    with pytest.raises(SystemExit, match=message):
        course_of(house)


def test_hidden_checks_are_not_counted_as_reading(house):
    before = read_column(house)["00"]
    long = "\n".join(f"x = {i}" for i in range(1200))  # 100 minutes
    for first, same in (("#| hide\n", True), ("", False)):
        edit(
            house.ROOT / "nbs" / "00_core.ipynb",
            lambda cells: cells_of("code", cells)[-1].update(source=[first + long]),
        )
        assert (int(read_column(house)["00"][2:]) - int(before[2:]) < 50) == same


def test_a_main_path_longer_than_a_weekend_is_an_error(house):
    house.REPORTED.write_text('{"31_mixing.mixers": [930]}')  # 15.5 hours, and 36 minutes for its exercises
    with pytest.raises(SystemExit, match="Expected a main path of 16 hours at most, .* got 16.1"):
        course_of(house)


def course_of(house):
    text = "".join("".join(cell["source"]) for cell in house.index_with_course()["cells"])
    return text.partition(house.course.BEGIN)[2].partition(house.course.END)[0].strip()


def test_the_readme_is_the_index_without_what_is_only_for_the_index(house):
    def change(cells):
        cells_of("markdown", cells)[0]["source"] = ["# A page\n", "\n", "[All](index.ipynb), ![a](images/a.png)"]

    edit(house.ROOT / "nbs" / "index.ipynb", change)
    house.write_readme()
    readme, index = (house.ROOT / "README.md").read_text(), (house.ROOT / "nbs" / "index.ipynb").read_text()
    assert readme.startswith("# A page\n\n[All](nbs/index.ipynb), ![a](nbs/images/a.png)\n")
    assert "## The course" in readme and "## The course" in index
    for part in (house.INDEX_ONLY, house.course.BEGIN, "## The chapters", "00_core.ipynb"):
        assert part not in readme and part in index


def test_check_says_when_the_table_or_the_readme_is_old(house):
    house.write_readme()
    house.check_readme()
    (house.ROOT / "README.md").write_text("")
    with pytest.raises(SystemExit, match="README.md is out of date with nbs/index.ipynb: run `make readme`"):
        house.check_readme()
    edit(
        house.ROOT / "nbs" / "00_core.ipynb",
        lambda cells: cells_of("markdown", cells)[0]["source"].insert(0, "# Another title\n"),
    )
    with pytest.raises(SystemExit, match="The table of chapters .* is out of date: run `make readme`"):
        house.check_readme()
    edit(house.ROOT / "nbs" / "index.ipynb", lambda cells: [cell.update(source=["nothing"]) for cell in cells])
    with pytest.raises(SystemExit, match="Expected a cell of nbs/index.ipynb with the lines"):
        house.write_readme()


def test_needs_leave_out_what_others_build_on(house):
    imports = {"00_core": set(), "03_a": {"core"}, "04_b": {"core"}, "05_c": {"a", "b"}, "06_d": {"a", "c", "torch"}}
    chapters = [SimpleNamespace(name=name, number=name[:2], modules=modules) for name, modules in imports.items()]
    assert house.course.needs(chapters) == {"00": [], "03": [], "04": [], "05": ["03", "04"], "06": ["05"]}
    assert house.course.ranges(["03", "11", "12", "13", "20", "21"]) == "03, 11–13, 20, 21"
    assert house.course.ranges([]) == "–"


def test_no_line_of_code_has_more_than_120_columns():
    cells = {
        f"{path.relative_to(ROOT)}, cell {cell['id']}": "".join(cell["source"])
        for folder in ("nbs", "solutions")
        for path in (ROOT / folder).rglob("*.ipynb")
        if not any(part.startswith(".") for part in path.relative_to(ROOT).parts)
        for cell in json.loads(path.read_text())["cells"]
        if cell["cell_type"] == "code"
    }
    files = {
        str(path.relative_to(ROOT)): path.read_text()
        for folder in ("tests", "tools")
        for path in (ROOT / folder).glob("*.py")
    }
    assert len(cells) > 500 and len(files) > 30
    long = [
        f"{name}: {line.strip()[:60]}"
        for name, text in {**cells, **files}.items()
        for line in text.splitlines()
        if len(line) > 120 and not line.startswith("#|")
    ]
    assert not long
