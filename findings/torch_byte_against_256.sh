#!/usr/bin/env bash
# PyTorch 2.14.1: a tensor of bytes compared with a Python number beyond its range takes the number modulo 256, without a
# warning. NumPy 2 compares the values.
# Seen: torch.tensor([255], dtype=torch.uint8) < 256 is False, since 256 becomes 0; numpy.array([255], numpy.uint8) < 256 is
# True. So a check "all class numbers are below 256" refuses good labels. supermix compares Python's numbers (chapter 35).
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --no-compile --disable-pip-version-check torch==2.14.1 "numpy>=2,<3"
"$folder/venv/bin/python" - <<'PY'
import numpy, torch

ours, theirs = torch.tensor([255], dtype=torch.uint8) < 256, numpy.array([255], numpy.uint8) < 256
print("torch:", ours.tolist(), "numpy:", theirs.tolist())
assert ours.tolist() == [False] and theirs.tolist() == [True]
assert (torch.tensor([0, 255], dtype=torch.uint8) >= 256).tolist() == [True, True]
PY
