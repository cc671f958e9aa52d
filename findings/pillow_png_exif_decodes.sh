#!/usr/bin/env bash
# Pillow 13.0.0: asking a PNG for its EXIF decodes all of its pixels where no eXIf chunk stands in front of them, since the
# format allows the chunk behind them. A JPEG's EXIF comes from its header alone.
# Seen: after `getexif()` a PNG without EXIF has been loaded, a PNG with an eXIf chunk in front has not, a JPEG has not.
# So a table of the orientations of a folder of PNGs costs a whole decoding of each.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --disable-pip-version-check Pillow==13.0.0
"$folder/venv/bin/python" - "$folder" <<'PY'
import sys
from PIL import Image

def decoded(name, **options):
    "Whether the file's pixels have been decoded once its EXIF has been asked for."
    Image.new("RGB", (64, 64), "red").save(path := f"{sys.argv[1]}/{name}", **options)
    with Image.open(path) as image:
        calls, load = [], image.load
        image.load = lambda: (calls.append(1), load())[1]
        image.getexif()
        return bool(calls)

exif = Image.Exif()
exif[274] = 6
seen = {"png": decoded("a.png"), "png with eXIf": decoded("b.png", exif=exif), "jpg": decoded("c.jpg")}
print("decoded:", seen)
assert seen == {"png": True, "png with eXIf": False, "jpg": False}, seen
PY
