"""Install this repository, and what it needs, beside the Python that runs this script: `python tools/install.py dev`.

uv does it in a third of pip's time. It does not read pip's settings, so those that decide which versions are taken
are handed over to it. Where uv is missing or fails, pip installs."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
PIP = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
NAMES = {"index-url": "UV_DEFAULT_INDEX", "find-links": "UV_FIND_LINKS", "constraint": "UV_CONSTRAINT"}  # pip's, uv's


def uv_settings(listed: str) -> dict[str, str]:
    "uv's variables for what `pip config list` prints: lines such as global.constraint='/etc/constraints.txt'."
    found = {}
    for line in listed.splitlines():
        key, _, value = line.partition("=")
        name = NAMES.get(key.rpartition(".")[2])
        if name:
            values = value.strip("'\"").replace("\\n", " ").split()
            found[name] = ("," if name == "UV_FIND_LINKS" else " ").join(values)
    return found


def install(extra: str = "") -> int:
    "The exit status of the installation."
    what = ["-e", f"{ROOT}[{extra}]" if extra else str(ROOT)]
    if subprocess.run([*PIP, "install", "-q", "uv"], stderr=subprocess.DEVNULL).returncode == 0:
        listed = subprocess.run([*PIP, "config", "list"], capture_output=True, text=True).stdout
        uv = [sys.executable, "-m", "uv", "pip", "install", "-q", "--python", sys.executable, *what]
        if subprocess.run(uv, env={**uv_settings(listed), **os.environ}).returncode == 0:
            return 0
        print("uv could not install it: now pip tries", file=sys.stderr)
    return subprocess.run([*PIP, "install", "-q", "--no-compile", *what]).returncode


if __name__ == "__main__":
    sys.exit(install(*sys.argv[1:2]))
