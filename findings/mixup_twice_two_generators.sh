#!/usr/bin/env bash
# timm 1.0.31 and torchvision 0.29.1 draw MixUp's weights from different generators, and treat the batch differently.
# Seen: after `torch.manual_seed(0)` torchvision's v2.MixUp repeats itself and timm's Mixup does not: it draws from NumPy's
# global generator, which torch's seed leaves alone. timm's mixes the batch that it is given in place (the natural images
# are gone), torchvision's returns a new one; timm's refuses a batch of odd length with an AssertionError.
# supermix clones a batch before it hands it to a foreign mixer, and seeds both generators (chapter 45).
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --no-compile --disable-pip-version-check timm==1.0.31 torch==2.14.1 torchvision==0.29.1
"$folder/venv/bin/python" - <<'PY'
import torch
from timm.data.mixup import Mixup
from torchvision.transforms import v2

images, labels = torch.rand(4, 3, 8, 8), torch.arange(4)
mixers = {"torchvision": v2.MixUp(num_classes=4), "timm": Mixup(mixup_alpha=1.0, num_classes=4)}
repeats, in_place = {}, {}
for name, mixer in mixers.items():
    results = []
    for _ in range(2):
        torch.manual_seed(0)
        batch = images.clone()
        results.append(mixer(batch, labels)[0].clone())
        in_place[name] = not torch.equal(batch, images)
    repeats[name] = torch.equal(*results)
print("repeats under torch's seed:", repeats, "mixes in place:", in_place)
assert repeats == {"torchvision": True, "timm": False} and in_place == {"torchvision": False, "timm": True}
try: mixers["timm"](images[:3], labels[:3])
except AssertionError as error: print("timm, three images:", error)
else: raise SystemExit("timm's Mixup took a batch of three")
PY
