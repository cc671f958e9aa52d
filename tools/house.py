"""Keeps notebooks, package and README in step.

house.py check     export into a copy and compare: package and README must agree with the notebooks;
                   stale outputs are reported; with --strict they are an error
house.py execute   run every notebook (or those named: 13, runs/01, solutions/) from a clean kernel and save its outputs
                   --stale: only those whose code has changed since;
                   --workers N: N notebooks at a time, with one thread each
house.py readme    write the table of chapters into nbs/index.ipynb, and README.md from it: all cells except those
                   that begin with <!-- not in the README -->
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from filecmp import dircmp
from pathlib import Path
from shutil import copytree, ignore_patterns

import course
from freshness import House, changes, dependencies

ROOT = Path(__file__).resolve().parent.parent
BIN = Path(sys.executable).parent
STAMPS = ROOT / "nbs" / "executed.json"
REPORTED = ROOT / "nbs" / "reading.json"
INDEX_ONLY = "<!-- not in the README -->"  # the first line of such a cell of nbs/index.ipynb


def name_of(path):
    "The name of a notebook here and in the stamps: 01_data, runs/01_cifar100_distillation, solutions/01_data."
    return str(path.relative_to(ROOT).with_suffix("")).removeprefix("nbs/")


def notebooks(names=()):
    "All notebooks, chapters before solutions and by number, or those whose names start with one of `names`."
    found = [p for folder in ("nbs", "solutions") for p in sorted((ROOT / folder).rglob("*.ipynb"))]
    found = [p for p in found if not any(s.startswith((".", "_")) for s in p.relative_to(ROOT).parts)]
    return [p for p in found if not names or name_of(p).startswith(tuple(names))]


def reported():
    "Minutes that readers took for a notebook, as they reported them: {name: [minutes, …]}."
    return json.loads(REPORTED.read_text()) if REPORTED.is_file() else {}


def index_with_course():
    "nbs/index.ipynb as data, with the current table of chapters."
    index = json.loads((ROOT / "nbs" / "index.ipynb").read_text())
    chapters = [
        course.Chapter(path, name_of(path))
        for path in notebooks()
        if path.name[:2].isdigit() and path.is_relative_to(ROOT / "nbs")
    ]
    seconds = {name: entry["seconds"] for name, entry in stamps().items()}
    course.fill(index["cells"], course.table(chapters, seconds, reported()))
    return index


def readme_text(index):
    "An index as Markdown, without the cells for the index only; links start at the repository's top."
    cells = [cell for cell in index["cells"] if not "".join(cell["source"]).startswith(INDEX_ONLY)]
    metadata = index["metadata"] | {"language_info": {"name": "python"}}  # nbdev_clean removes it; code fences need it
    command = [BIN / "jupyter", "nbconvert", "--log-level=ERROR", "--to", "markdown", "--stdin", "--stdout"]
    notebook = json.dumps(index | {"cells": cells, "metadata": metadata})
    text = subprocess.run(command, input=notebook, check=True, capture_output=True, text=True).stdout
    return re.sub(r"\]\((?=images/|\d\d_|runs/|glossary|index)", "](nbs/", text).strip() + "\n"


def write_readme():
    "Write the table of chapters into nbs/index.ipynb, and README.md from the index."
    from supermix.core import write_atomic

    index = index_with_course()
    text = readme_text(index)
    write_atomic(ROOT / "nbs" / "index.ipynb", (json.dumps(index, indent=1, ensure_ascii=False) + "\n").encode())
    write_atomic(ROOT / "README.md", text.encode())


def check_readme():
    "Exit with an error if the table of chapters or README.md is out of date."
    index = index_with_course()
    if index != json.loads((ROOT / "nbs" / "index.ipynb").read_text()):
        sys.exit("The table of chapters in nbs/index.ipynb is out of date: run `make readme`.")
    if (ROOT / "README.md").read_text() != readme_text(index):
        sys.exit("README.md is out of date with nbs/index.ipynb: run `make readme`.")


def differing(a: dircmp, prefix=""):
    "Names that differ between two folders, all the way down."
    names = [prefix + n for n in a.left_only + a.right_only + a.diff_files]
    return names + [n for sub, inner in a.subdirs.items() for n in differing(inner, f"{prefix}{sub}/")]


def stamps():
    "For each notebook: the code that its outputs were made with, {hash: name}, and its seconds."
    if not STAMPS.is_file():
        return {}
    kept = json.loads(STAMPS.read_text())
    names = kept["definitions"]
    return {
        name: {"uses": {digest: names[digest] for digest in entry["uses"].split()}, "seconds": entry["seconds"]}
        for name, entry in kept["notebooks"].items()
    }


def write_stamps(kept):
    "Write the stamps of the existing notebooks, one per line, atomically. A definition's name is written once."
    here = {name: kept[name] for name in map(name_of, notebooks()) if name in kept}
    known = sorted({pair for entry in here.values() for pair in entry["uses"].items()}, key=lambda pair: pair[::-1])
    lines = [
        f'{json.dumps(name)}: {json.dumps({"seconds": e["seconds"], "uses": " ".join(sorted(e["uses"]))})}'
        for name, e in here.items()
    ]
    table = [f"{json.dumps(digest)}: {json.dumps(name)}" for digest, name in known]
    fresh = STAMPS.with_suffix(".new")
    table, lines = (",\n".join(part) for part in (table, lines))
    fresh.write_text(f'{{"definitions": {{\n{table}\n}},\n"notebooks": {{\n{lines}\n}}}}\n')
    fresh.replace(STAMPS)


def stale():
    """Notebooks whose outputs are out of date, each with the names of what has changed; and stamps whose notebook is
    gone."""
    kept, found, house = stamps(), {name_of(path): path for path in notebooks()}, House(ROOT)
    changed = {
        name: changes(kept[name]["uses"], dependencies(house, path)) if name in kept else ["never executed"]
        for name, path in found.items()
    }
    return {name: why for name, why in changed.items() if why}, [name for name in kept if name not in found]


def report_stale(strict):
    "Print which outputs are stale, and why; with `strict` this is an error."
    changed, gone = stale()
    lines = [
        f"  {name}: {', '.join(why[:4])}{f' and {len(why) - 4} more' if len(why) > 4 else ''}"
        for name, why in changed.items()
    ] + [f"  {name}: the notebook is gone" for name in gone]
    if not lines:
        return print("All outputs are up to date.")
    text = "\n".join(
        [
            f"Outputs of {len(lines)} notebooks are older than their code:",
            *lines,
            "Run `make stale` (tools/house.py execute --stale), and commit.",
        ]
    )
    if strict:
        sys.exit(text)
    print(text)


def check(strict):
    """Exit with an error unless a new export and a new README change nothing. Stale outputs are reported; with
    `strict` they are an error, too."""
    skip = ignore_patterns("__pycache__", "*.egg-info", ".venv", ".git", "out", "build")
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "copy"
        copytree(ROOT, copy, ignore=skip)
        for module in copy.glob("supermix/**/*.py"):  # remove modules that no notebook exports any more
            if "AUTOGENERATED! DO NOT EDIT!" in module.read_text() and module.name != "_modidx.py":
                module.unlink()
        subprocess.run([BIN / "nbdev_export"], cwd=copy, check=True)
        folders = [f for f in ("supermix", "nbs", "solutions") if (ROOT / f).is_dir()]
        for folder in folders[1:]:
            subprocess.run([BIN / "nbdev_clean", "--fname", folder], cwd=copy, check=True)
        ignored = ["__pycache__", "out", ".ipynb_checkpoints"]
        other = [f"{f}/{n}" for f in folders for n in differing(dircmp(ROOT / f, copy / f, ignore=ignored))]
    if other:
        sys.exit("Not as in the notebooks: " + ", ".join(other) + "\nRun nbdev_export and nbdev_clean, and commit.")
    check_readme()
    print("The package and the README agree with the notebooks.")
    report_stale(strict)


def run(path, env):
    """Run one notebook from a clean kernel, and replace it by the cleaned result if nothing failed. Returns its
    dependencies and its seconds."""
    uses, start = dependencies(House(ROOT), path), time.perf_counter()
    command = [BIN / "jupyter", "nbconvert", "--log-level=ERROR", "--to", "notebook", "--execute", "--stdout", path]
    text = subprocess.run(command, check=True, env=env, stdout=subprocess.PIPE).stdout
    seconds = time.perf_counter() - start
    fresh = path.with_name(f".{path.name}")
    try:
        fresh.write_bytes(text)
        subprocess.run([BIN / "nbdev_clean", "--fname", fresh], cwd=ROOT, check=True)
        fresh.replace(path)
    finally:
        fresh.unlink(missing_ok=True)
    return {"uses": uses, "seconds": round(seconds, 1)}


def execute(names, only_stale, workers):
    """Run notebooks and save them with their outputs and stamps. A notebook that fails keeps its old outputs, and the
    others continue."""
    changed, _ = stale()
    unknown = [name for name in names if not notebooks([name])]
    if unknown:
        sys.exit(f"There is no notebook whose name starts with {' or '.join(unknown)}.")
    paths = [path for path in notebooks(names) if not only_stale or name_of(path) in changed]
    # no progress bars in saved outputs; use this tree's package
    env = {**os.environ, "TQDM_DISABLE": "1", "PYTHONPATH": str(ROOT)}
    if workers > 1:
        env["OMP_NUM_THREADS"] = "1"
    kept, failed = stamps(), []
    with ThreadPoolExecutor(workers) as pool:
        jobs = {pool.submit(run, path, env): name_of(path) for path in paths}
        for job in as_completed(jobs):
            try:
                kept[jobs[job]] = job.result()
                print(f"{jobs[job]}: {kept[jobs[job]]['seconds']} s", flush=True)
                write_stamps(kept)  # now, so that an interruption loses nothing
            except subprocess.CalledProcessError:
                failed.append(jobs[job])
                print(f"{jobs[job]}: FAILED", flush=True)
    write_stamps(kept)
    if failed:
        sys.exit("Failed, and not changed: " + ", ".join(sorted(failed)))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=["check", "execute", "readme"])
    parser.add_argument("names", nargs="*")
    parser.add_argument("--stale", action="store_true")
    parser.add_argument("--strict", action="store_true")
    parser.add_argument("--workers", type=int, default=1)
    options = parser.parse_intermixed_args()
    if options.command == "check":
        check(options.strict)
    elif options.command == "execute":
        execute(options.names, options.stale, options.workers)
    else:
        write_readme()
