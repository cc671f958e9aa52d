#!/usr/bin/env bash
# torchvision 0.29.1: two of its networks hand maps on in different layouts. swin_t's stages pass (B, H, W, C), convnext_tiny's
# (B, C, H, W), and nothing in a tensor says which. A distillation term on maps that takes axis 1 for the channels compares
# rows of the image with channels, and trains on.
# Seen: on a 224×224 image the first stage of swin_t gives (1, 56, 56, 96), that of convnext_tiny (1, 96, 56, 56).
# supermix's Hooked finds the axis by the width that the next layer takes (chapter 18).
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --no-compile --disable-pip-version-check torch==2.14.1 torchvision==0.29.1 "numpy>=2,<3"
"$folder/venv/bin/python" - <<'PY'
import torch
from torchvision.models import convnext_tiny, swin_t

shapes = {}
for build in (swin_t, convnext_tiny):
    network = build().eval()
    network.features[1].register_forward_hook(lambda module, x, y, name=build.__name__: shapes.update({name: tuple(y.shape)}))
    with torch.no_grad(): network(torch.rand(1, 3, 224, 224))
print(shapes)
assert shapes == {"swin_t": (1, 56, 56, 96), "convnext_tiny": (1, 96, 56, 56)}
PY
