#!/usr/bin/env bash
# torchvision 0.29.1 with PyTorch 2.14.1: `import torchvision` loads torch.compile's front end (torch._dynamo, and sympy with it),
# which `import torch` alone does not. The import takes more than twice as long as torch's own.
# Seen: sys.modules holds torch._dynamo and sympy after `import torchvision`, through torchvision.ops. supermix imports
# torchvision inside the functions that use it, so that `supermix --help` waits for neither (chapters 1 and 90).
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --no-compile --disable-pip-version-check torch==2.14.1 torchvision==0.29.1 "numpy>=2,<3"
"$folder/venv/bin/python" - <<'PY'
import sys
import torch

before = {name for name in ("torch._dynamo", "sympy") if name in sys.modules}
import torchvision

after = {name for name in ("torch._dynamo", "sympy") if name in sys.modules}
print("loaded by torch:", sorted(before), "and after torchvision:", sorted(after))
assert not before and after == {"torch._dynamo", "sympy"}
PY
