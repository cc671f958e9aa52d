#!/usr/bin/env bash
# timm 1.0.31: its pretrained ImageNet weights rarely want the evaluation that most scripts use (resize to 256, crop 224, bilinear).
# Seen, of the 1,321 weights with 1,000 classes: 1,174 want bicubic interpolation, 73 the crop mode "squash" (which changes the
# aspect ratio), and 3 a crop_pct of 1.15, larger than the picture, which is padded. And `floor(size / crop_pct)`, timm's
# resize, differs from `round(size / crop_pct)` for 373 of them, by a pixel. supermix.load_folder takes all of these as timm's
# `resolve_model_data_config` gives them (chapter 1).
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --no-compile --disable-pip-version-check timm==1.0.31 torch==2.14.1 torchvision==0.29.1
"$folder/venv/bin/python" - <<'PY'
from math import floor

import timm

configs = [timm.get_pretrained_cfg(name) for name in timm.list_models(pretrained=True)]
configs = [c for c in configs if c.num_classes == 1000]
found = {"weights": len(configs), "bicubic": sum(c.interpolation == "bicubic" for c in configs),
         "squash": sum(c.crop_mode == "squash" for c in configs), "padded": sum(c.crop_pct > 1 for c in configs),
         "floor is not round": sum(floor(c.input_size[-1] / c.crop_pct) != round(c.input_size[-1] / c.crop_pct)
                                   for c in configs)}
print(found)
assert found == {"weights": 1321, "bicubic": 1174, "squash": 73, "padded": 3, "floor is not round": 373}
PY
