#!/usr/bin/env bash
# Pillow 13.0.0: ImageOps.posterize(image, 0) is an error. AutoAugment's levels go that far: its Posterize keeps
# 4 - int(10 · 4 / 10) = 0 bits at level 10, and Fast AutoAugment's Posterize2 begins at 0 bits. Code that hands such a level
# on to Pillow stops there. supermix's Posterize gives black, as 0 bits say (chapter 3).
# Seen: ValueError, "bits must be between or equal to 1 and 8".
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --disable-pip-version-check Pillow==13.0.0
"$folder/venv/bin/python" - <<'PY'
from PIL import Image, ImageOps

image = Image.new("RGB", (2, 2), (200, 100, 50))
print("1 bit:", ImageOps.posterize(image, 1).getpixel((0, 0)))
assert ImageOps.posterize(image, 1).getpixel((0, 0)) == (128, 0, 0)
try: ImageOps.posterize(image, 0)
except ValueError as error: print("0 bits:", error)
else: raise AssertionError("0 bits are no error any more")
PY
