"""Keeps notebooks, package and README in step.

house.py check     export into a copy and compare: package and README must be what the notebooks say,
                   and the outputs theirs
house.py execute   run every notebook (or those named: 13, runs/01, solutions/) from a clean kernel and save its outputs
                   --stale: only those whose code has changed since;
                   --workers N: that many at a time, of one thread each
house.py readme    write README.md from nbs/index.ipynb
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
from hashlib import sha256
from pathlib import Path
from shutil import copytree, ignore_patterns

ROOT = Path(__file__).resolve().parent.parent
BIN = Path(sys.executable).parent
STAMPS = ROOT / "nbs" / "executed.json"
IMPORT = re.compile(r"^\s*(?:from\s+(supermix[\w.]*|\.+[\w.]*)\s+import\s+(.+)|import\s+(supermix[\w.]*))",
                    re.MULTILINE)


def name_of(path):
    "What a notebook is called here and in the stamps: 01_data, runs/01_cifar100_distillation, solutions/01_data."
    return str(path.relative_to(ROOT).with_suffix("")).removeprefix("nbs/")


def notebooks(names=()):
    "All notebooks, chapters before solutions and by number, or those whose names start with one of `names`."
    found = [p for folder in ("nbs", "solutions") for p in sorted((ROOT / folder).rglob("*.ipynb"))]
    found = [p for p in found if not any(s.startswith((".", "_")) for s in p.relative_to(ROOT).parts)]
    return [p for p in found if not names or name_of(p).startswith(tuple(names))]


def readme_text():
    "nbs/index.ipynb as Markdown, with its links as seen from the repository's top."
    index = json.loads((ROOT / "nbs" / "index.ipynb").read_text())
    index["metadata"]["language_info"] = {"name": "python"}  # nbdev_clean takes it out; the fences name it
    command = [BIN / "jupyter", "nbconvert", "--log-level=ERROR", "--to", "markdown", "--stdin", "--stdout"]
    text = subprocess.run(command, input=json.dumps(index), check=True, capture_output=True, text=True).stdout
    return re.sub(r"\]\((?=images/|\d\d_|runs/|glossary)", "](nbs/", text).strip() + "\n"


def differing(a: dircmp, prefix=""):
    "Names that differ between two folders, all the way down."
    names = [prefix + n for n in a.left_only + a.right_only + a.diff_files]
    return names + [n for sub, inner in a.subdirs.items() for n in differing(inner, f"{prefix}{sub}/")]


def imported(text, package=""):
    "Names of the supermix modules that lines of `text` import, which is code of `package`."
    for of, names, plain in IMPORT.findall(text):
        dots = len(of) - len(of.lstrip("."))
        if dots:  # as nbdev writes it: .core and ..core
            of = ".".join(filter(None, [*package.split(".")[:len(package.split(".")) - dots + 1], of.lstrip(".")]))
        yield plain or of
        yield from (f"{of}.{name}" for name in re.findall(r"\w+", names))  # from supermix.models import resnet


def without_comments(text):
    """The lines of code that are neither empty nor a comment: lines and not Python's syntax tree, which each version
    prints in its own way."""
    return "\n".join(line for line in text.splitlines() if line.strip() and not line.lstrip().startswith("#"))


def shown_files(text):
    "Hashes of the results and policies that lines of `text` read, by their paths."
    for name in sorted(set(re.findall(r"\.\./((?:results|policies)/[\w./=-]*)", text))):
        place = ROOT / name
        files = sorted(place.rglob("[!.]*.json")) if place.is_dir() else [place] if place.is_file() else []
        yield from ((str(f.relative_to(ROOT)), sha256(f.read_bytes()).hexdigest()) for f in files)


def source_of(path):
    """A hash of what a notebook's outputs depend on: its code, that of every module of ours that it imports, without
    comments, and the results and policies that it shows."""
    cells = json.loads(path.read_text())["cells"]
    text = without_comments("\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"))
    seen, todo = {}, list(imported(text))
    while todo:
        module = todo.pop()
        file = ROOT.joinpath(*module.split("."))
        file = file / "__init__.py" if file.is_dir() else file.with_name(file.name + ".py")
        if module in seen or not file.is_file(): continue
        seen[module] = without_comments(file.read_text())
        todo += imported(seen[module], module if file.stem == "__init__" else module.rpartition(".")[0])
    if "supermix.zoo" in seen:  # it opens the teachers that we ship
        seen |= {f.name: sha256(f.read_bytes()).hexdigest() for f in (ROOT / "supermix" / "teachers").iterdir()}
    seen |= shown_files(text)
    return sha256(json.dumps([text, seen], sort_keys=True).encode()).hexdigest()[:16]


def stamps(): return json.loads(STAMPS.read_text()) if STAMPS.is_file() else {}


def write_stamps(kept):
    "Stamps of the notebooks that there are, one a line; all or nothing."
    names = [name for name in map(name_of, notebooks()) if name in kept]
    fresh = STAMPS.with_suffix(".new")
    fresh.write_text("{\n" + ",\n".join(f"{json.dumps(name)}: {json.dumps(kept[name])}" for name in names) + "\n}\n")
    fresh.replace(STAMPS)


def stale():
    "Names of notebooks whose outputs are not of today's code, and of stamps whose notebook is gone."
    kept, found = stamps(), {name_of(path): path for path in notebooks()}
    changed = [name for name, path in found.items() if kept.get(name, {}).get("source") != source_of(path)]
    return changed, [name for name in kept if name not in found]


def check():
    "Exit with an error unless a fresh export and a fresh README change nothing, and every output is of today's code."
    skip = ignore_patterns("__pycache__", "*.egg-info", ".venv", ".git", "out", "build")
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "copy"
        copytree(ROOT, copy, ignore=skip)
        for module in copy.glob("supermix/**/*.py"):  # what no notebook exports any more must not survive
            if module.name not in ("__init__.py", "__main__.py", "_modidx.py"): module.unlink()
        subprocess.run([BIN / "nbdev_export"], cwd=copy, check=True)
        folders = [f for f in ("supermix", "nbs", "solutions") if (ROOT / f).is_dir()]
        for folder in folders[1:]: subprocess.run([BIN / "nbdev_clean", "--fname", folder], cwd=copy, check=True)
        ignored = ["__pycache__", "out", ".ipynb_checkpoints"]
        other = [f"{f}/{n}" for f in folders for n in differing(dircmp(ROOT / f, copy / f, ignore=ignored))]
    if other:
        sys.exit("Not what the notebooks say: " + ", ".join(other) + "\nRun nbdev_export and nbdev_clean, and commit.")
    if (ROOT / "README.md").read_text() != readme_text():
        sys.exit("README.md is not what nbs/index.ipynb says: run `make readme`.")
    changed, gone = stale()
    if changed:
        sys.exit(f"Outputs are not of today's code: {', '.join(changed)}\n"
                 "Run `make stale` (tools/house.py execute --stale), and commit.")
    if gone:
        sys.exit(f"{STAMPS.name} has notebooks that are gone: {', '.join(gone)}\n"
                 "Run `make stale` (tools/house.py execute --stale), and commit.")
    print("The package and the README are what the notebooks say, and the outputs are theirs.")


def run(path, env):
    """Run one notebook from a clean kernel; it is replaced, cleaned, when all went well. Returns its hash and its
    seconds."""
    source, start = source_of(path), time.perf_counter()
    command = [BIN / "jupyter", "nbconvert", "--log-level=ERROR", "--to", "notebook", "--execute", "--stdout", path]
    text = subprocess.run(command, check=True, env=env, stdout=subprocess.PIPE).stdout
    seconds = time.perf_counter() - start
    fresh = path.with_name(f".{path.name}")
    try:
        fresh.write_bytes(text)
        subprocess.run([BIN / "nbdev_clean", "--fname", fresh], cwd=ROOT, check=True)
        fresh.replace(path)
    finally: fresh.unlink(missing_ok=True)
    return {"source": source, "seconds": round(seconds, 1)}


def execute(names, only_stale, workers):
    """Run notebooks and save them with their outputs and stamps; one that fails keeps its old ones, and the others go
    on."""
    changed, _ = stale()
    unknown = [name for name in names if not notebooks([name])]
    if unknown: sys.exit(f"There is no notebook whose name starts with {' or '.join(unknown)}.")
    paths = [path for path in notebooks(names) if not only_stale or name_of(path) in changed]
    # a progress bar is nothing to keep; this tree's package
    env = {**os.environ, "TQDM_DISABLE": "1", "PYTHONPATH": str(ROOT)}
    if workers > 1: env["OMP_NUM_THREADS"] = "1"
    kept, failed = stamps(), []
    with ThreadPoolExecutor(workers) as pool:
        jobs = {pool.submit(run, path, env): name_of(path) for path in paths}
        for job in as_completed(jobs):
            try:
                kept[jobs[job]] = job.result()
                print(f"{jobs[job]}: {kept[jobs[job]]['seconds']} s", flush=True)
                write_stamps(kept)  # now, so that whoever stops here loses nothing
            except subprocess.CalledProcessError:
                failed.append(jobs[job])
                print(f"{jobs[job]}: FAILED", flush=True)
    write_stamps(kept)
    if failed: sys.exit("Failed, and left as they were: " + ", ".join(sorted(failed)))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=["check", "execute", "readme"])
    parser.add_argument("names", nargs="*")
    parser.add_argument("--stale", action="store_true")
    parser.add_argument("--workers", type=int, default=1)
    options = parser.parse_intermixed_args()
    if options.command == "check": check()
    elif options.command == "execute": execute(options.names, options.stale, options.workers)
    else: (ROOT / "README.md").write_text(readme_text())
