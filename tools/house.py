"""Keeps notebooks, package and README in step.

house.py check     export into a copy and compare: package and README must be what the notebooks say
house.py execute   run every notebook (or those named) from a clean kernel and save its outputs
house.py readme    write README.md from nbs/index.ipynb
"""
import json
import os
import re
import subprocess
import sys
import tempfile
from filecmp import dircmp
from pathlib import Path
from shutil import copytree, ignore_patterns

ROOT = Path(__file__).resolve().parent.parent
BIN = Path(sys.executable).parent


def notebooks(names=()):
    "All notebooks in the order of their numbers, or those whose names start with one of `names`: 13, or runs/01."
    found = [p for p in sorted((ROOT / "nbs").rglob("*.ipynb")) if not any(s.startswith((".", "_")) for s in p.parts)]
    return [p for p in found if not names or str(p.relative_to(ROOT / "nbs")).startswith(tuple(names))]


def readme_text():
    "nbs/index.ipynb as Markdown, with its links as seen from the repository's top."
    index = json.loads((ROOT / "nbs" / "index.ipynb").read_text())
    index["metadata"]["language_info"] = {"name": "python"}  # nbdev_clean takes it out; the fences name it
    command = [BIN / "jupyter", "nbconvert", "--log-level=ERROR", "--to", "markdown", "--stdin", "--stdout"]
    text = subprocess.run(command, input=json.dumps(index), check=True, capture_output=True, text=True).stdout
    return re.sub(r"\]\((?=images/|\d\d_|runs/)", "](nbs/", text).strip() + "\n"


def differing(a: dircmp, prefix=""):
    "Names that differ between two folders, all the way down."
    names = [prefix + n for n in a.left_only + a.right_only + a.diff_files]
    return names + [n for sub, inner in a.subdirs.items() for n in differing(inner, f"{prefix}{sub}/")]


def check():
    "Exit with an error unless a fresh export and a fresh README change nothing."
    skip = ignore_patterns("__pycache__", "*.egg-info", ".venv", ".git", "out", "build")
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "copy"
        copytree(ROOT, copy, ignore=skip)
        for module in copy.glob("supermix/**/*.py"):  # what no notebook exports any more must not survive
            if module.name not in ("__init__.py", "_modidx.py"): module.unlink()
        subprocess.run([BIN / "nbdev_export"], cwd=copy, check=True)
        subprocess.run([BIN / "nbdev_clean"], cwd=copy, check=True)
        stale = [f"supermix/{n}" for n in differing(dircmp(ROOT / "supermix", copy / "supermix", ignore=["__pycache__", "out", ".ipynb_checkpoints"]))]
        stale += [f"nbs/{n}" for n in differing(dircmp(ROOT / "nbs", copy / "nbs", ignore=["__pycache__", "out", ".ipynb_checkpoints"]))]
    if stale: sys.exit("Not what the notebooks say: " + ", ".join(stale) + "\nRun nbdev_export and nbdev_clean, and commit.")
    if (ROOT / "README.md").read_text() != readme_text(): sys.exit("README.md is not what nbs/index.ipynb says: run `make readme`.")
    print("The package and the README are what the notebooks say.")


def execute(names):
    "Run notebooks from a clean kernel and save them with their outputs, cleaned."
    for path in notebooks(names):
        print(path.relative_to(ROOT), flush=True)
        command = [BIN / "jupyter", "nbconvert", "--log-level=ERROR", "--to", "notebook", "--execute", "--inplace", path]
        subprocess.run(command, check=True, env={**os.environ, "TQDM_DISABLE": "1"})  # a progress bar is nothing to keep
    subprocess.run([BIN / "nbdev_clean"], cwd=ROOT, check=True)


if __name__ == "__main__":
    command, *rest = sys.argv[1:] or [""]
    if command == "check": check()
    elif command == "execute": execute(rest)
    elif command == "readme": (ROOT / "README.md").write_text(readme_text())
    else: sys.exit(__doc__)
