#!/usr/bin/env bash
# Pillow 13.0.0 inverts a grey TIFF of 8 bits in which 0 is white (PhotometricInterpretation 0), and not one of 16 bits.
# Seen: 8 bits: 0 opens as 255. 16 bits: the same strip opens with equal pixels, whether the tag says 0 or 1.
# So a scanner's 16-bit negative stays a negative. supermix turns such files (chapter 1).
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --disable-pip-version-check Pillow==13.0.0
"$folder/venv/bin/python" - "$folder" <<'PY'
import struct, sys
from PIL import Image

def tiff(path, bits, photometric, strip):
    "A little-endian grey TIFF of 2×1 pixels, written by hand."
    tags = [(256, 4, 2), (257, 4, 1), (258, 3, bits), (259, 3, 1), (262, 3, photometric), (273, 4, 122), (277, 3, 1),
            (278, 4, 1), (279, 4, len(strip))]
    entries = b"".join(struct.pack("<HHII", tag, kind, 1, value) for tag, kind, value in tags)
    content = b"II*\0" + struct.pack("<I", 8) + struct.pack("<H", len(tags)) + entries + b"\0" * 4
    assert len(content) == 122
    open(path, "wb").write(content + strip)
    with Image.open(path) as image: return image.mode, [image.getpixel((x, 0)) for x in range(2)]

folder = sys.argv[1]
eight = [tiff(f"{folder}/8-{p}.tif", 8, p, bytes([0, 200])) for p in (0, 1)]
sixteen = [tiff(f"{folder}/16-{p}.tif", 16, p, struct.pack("<2H", 0, 50000)) for p in (0, 1)]
print("8 bits, 0 is white and 0 is black:", *eight)
print("16 bits, 0 is white and 0 is black:", *sixteen)
assert eight == [("L", [255, 55]), ("L", [0, 200])], eight
assert sixteen == [("I;16", [0, 50000])] * 2, sixteen
PY
