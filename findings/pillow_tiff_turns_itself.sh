#!/usr/bin/env bash
# Pillow 13.0.0 turns a TIFF by its Orientation tag while it loads, and only a TIFF.
# Seen: a 30×20 picture with orientation 6 opens as 20×30 where it is a TIFF (the tag is there before `load`, and gone after
# it), and as 30×20 where it is a JPEG or a PNG (the tag stays). Code that reads the tag first and turns the loaded image
# afterwards turns a TIFF twice.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --disable-pip-version-check Pillow==13.0.0
"$folder/venv/bin/python" - "$folder" <<'PY'
import sys
from PIL import Image

seen = {}
for kind in ("tif", "jpg", "png"):
    exif = Image.Exif()
    exif[274] = 6
    Image.new("RGB", (30, 20), "red").save(path := f"{sys.argv[1]}/picture.{kind}", exif=exif)
    with Image.open(path) as image:
        opened, before = image.size, image.getexif().get(274)
        image.load()
        seen[kind] = opened, before, image.size, image.getexif().get(274)
    print(kind, "opened as %s with orientation %s, loaded as %s with orientation %s" % seen[kind])
assert seen["tif"] == ((20, 30), 6, (20, 30), None), seen
assert seen["jpg"] == seen["png"] == ((30, 20), 6, (30, 20), 6), seen
PY
