#!/usr/bin/env bash
# torchvision 0.29.1 with PyTorch 2.14.1: of its 80 classification networks the 15 RegNets alone cannot be built on the meta device, which
# is the usual way to count parameters without memory: their constructor calls `.tolist()` on the tensors that it makes.
# Seen: NotImplementedError, "Cannot copy out of meta tensor". The others are built. supermix counts the parameters of its own networks on
# real tensors, and opens torchvision's by their weights (chapters 19 and 80).
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --no-compile --disable-pip-version-check torch==2.14.1 torchvision==0.29.1 "numpy>=2,<3"
"$folder/venv/bin/python" - <<'PY'
import warnings

import torch
from torchvision.models import get_model, list_models

warnings.simplefilter("ignore")
names = [name for name in list_models() if not any(
    part in name for part in ("rcnn", "quantized", "retinanet", "ssd", "fcos", "raft", "deeplab", "lraspp", "fcn_", "3d", "mvit", "swin3d",
                              "r2plus1d", "mc3", "s3d"))]
refused = {}
for name in names:
    options = {"weights": None} if "inception" not in name and "googlenet" not in name else {"weights": None, "init_weights": False}
    try:
        with torch.device("meta"):
            get_model(name, **options)
    except NotImplementedError as error:
        refused[name] = str(error)
print(len(names), "networks;", "not on meta:", *refused)
assert len(refused) == 15 and all("regnet" in name and "meta tensor" in error for name, error in refused.items())
PY
