"""The rules of the house: names, order, and outputs that were kept."""

import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted(
    p for p in (ROOT / "nbs").rglob("[0-9]*.ipynb") if not any(s.startswith((".", "_")) for s in p.parts)
)
RUNS = [path for path in NOTEBOOKS if path.parent.name == "runs"]
CHAPTERS = [path for path in NOTEBOOKS if path not in RUNS]


def code(path):
    "The code cells of a notebook."
    return [
        cell
        for cell in json.loads(path.read_text())["cells"]
        if cell["cell_type"] == "code" and "".join(cell["source"]).strip()
    ]


def module(path):
    "What a notebook's name says it exports: 13_models.wrn.ipynb is models.wrn."
    return path.stem.partition("_")[2]


NUMBERS = {module(path): int(path.name[:2]) for path in CHAPTERS}


def test_numbers_are_unique():
    assert len(set(NUMBERS.values())) == len(CHAPTERS) > 10


@pytest.mark.parametrize("path", CHAPTERS, ids=lambda p: p.stem)
def test_a_notebook_is_what_its_name_says(path):
    text = "\n".join("".join(cell["source"]) for cell in code(path))
    exported = re.findall(r"^#\| default_exp (\S+)", text, re.MULTILINE)
    assert exported == [module(path)]
    assert (ROOT / "supermix" / f"{exported[0].replace('.', '/')}.py").is_file()
    imported = re.findall(r"^\s*from supermix\.([\w.]+) import", text, re.MULTILINE)
    later = [name for name in imported if NUMBERS[name] >= NUMBERS[module(path)]]
    assert not later, f"{path.name} imports from later chapters: {later}"


@pytest.mark.parametrize("path", [*NOTEBOOKS, ROOT / "nbs" / "index.ipynb"], ids=lambda p: p.stem)
def test_outputs_are_kept(path):
    cells = code(path)
    outputs = [output for cell in cells for output in cell["outputs"]]
    assert outputs, "a reader on the web sees nothing: run `make notebooks`"
    assert not any(output["output_type"] == "error" for output in outputs)
    assert max(len(cell["source"]) for cell in cells) <= 60
    assert path.stat().st_size < 3_000_000


@pytest.mark.parametrize(
    "path",
    [*NOTEBOOKS, *sorted((ROOT / "solutions").glob("[0-9]*.ipynb")), ROOT / "nbs" / "index.ipynb"],
    ids=lambda p: f"{p.parent.name}/{p.stem}",
)
def test_a_saved_figure_has_an_alternative_text(path):
    pictured = [cell for cell in code(path) if any("image/png" in output.get("data", {}) for output in cell["outputs"])]
    told = [re.search(r"\A(?:#\|.*\n)*#\| fig-alt: (.*)", "".join(cell["source"])) for cell in pictured]
    silent = ["".join(cell["source"])[:80] for cell, alt in zip(pictured, told) if not alt]
    assert not silent, (
        f"{len(silent)} of {len(pictured)} figures come from cells that do not begin with `#| fig-alt: …`: {silent}"
    )
    words = [alt[1] for alt in told]
    text = "\n".join(
        "".join(cell["source"]) for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == "markdown"
    )
    words += re.findall(r"!\[(.*?)\]\(", text) + [
        (re.search(r'alt="(.*?)"', image) or "  ")[1] for image in re.findall(r"<img [^>]*>", text)
    ]
    assert all(len(alt.split()) >= 4 for alt in words), (
        f"an alternative text says what is to be seen, in a sentence: {words}"
    )


@pytest.mark.parametrize("path", RUNS, ids=lambda p: p.stem)
def test_a_run_contains_no_algorithms(path):
    text = "\n".join("".join(cell["source"]) for cell in code(path))
    assert "#|" not in text and not re.search(
        r"^\s*(class|def|async def|while) |lambda|\bnn\.|\.backward\(", text, re.MULTILINE
    )
    assert (
        'os.environ.get("SUPERMIX_SCALE", "smoke")' in text
        and ".at(scale)" in text
        and "differences(" in text
        and "cost(" in text
        and "table(" in text
    )


def test_run_notebooks_are_numbered():
    assert [path.name[:2] for path in RUNS] == [f"{i:02d}" for i in range(1, len(RUNS) + 1)] and len(RUNS) == 4


def test_every_module_has_its_notebook():
    modules = {
        ".".join(p.relative_to(ROOT / "supermix").with_suffix("").parts) for p in (ROOT / "supermix").rglob("*.py")
    }
    modules.remove("generate")  # a short name for mixing.generate
    assert {m for m in modules if not m.split(".")[-1].startswith("_")} == set(NUMBERS)
