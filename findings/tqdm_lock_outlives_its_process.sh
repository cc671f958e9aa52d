#!/usr/bin/env bash
# tqdm 4.70.1 guards its bars with a semaphore of multiprocessing, which forked processes share and which no one frees when a process
# that holds it ends. Once a forked worker was killed while it drew or closed a bar, every later bar of its parent waits.
# Seen: a child takes `tqdm.get_lock()` and ends; afterwards the parent cannot take the lock without waiting.
# supermix's bars have a lock of their own process (chapter 0).
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --no-compile --disable-pip-version-check tqdm==4.70.1
"$folder/venv/bin/python" - <<'PY'
import os
from tqdm import tqdm

semaphore = tqdm.get_lock().locks[0]
assert semaphore.acquire(block=False)
semaphore.release()
child = os.fork()
if child == 0:
    semaphore.acquire()
    os._exit(0)
os.waitpid(child, 0)
free = semaphore.acquire(block=False)
print("free after the child has ended:", free)
assert not free
PY
