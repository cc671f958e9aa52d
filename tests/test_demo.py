"""The main job, as a user starts it."""

import pytest
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
from PIL import Image

from supermix import load, load_data, predict

NAMES = ["student alone", "KD", "MixUp + KD", "CutMix + KD", "SuperMix", "SuperMix + KD"]


def supermix(*args, folder):
    "Run the installed command `supermix` in a folder."
    command = Path(sys.executable).with_name("supermix")
    return subprocess.run([command, *map(str, args)], cwd=folder, capture_output=True, text=True)


@pytest.mark.slow
def test_the_demo_at_smoke_scale(tmp_path):
    done = supermix("demo", "--scale", "smoke", "--out", tmp_path / "out", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "digits: 1,297 training and 500 test images" in done.stdout  # it says which data it took
    table = [line.split("|")[1].strip() for line in done.stdout.splitlines() if line.startswith("|")]
    assert table[2:] == NAMES
    result = json.loads((tmp_path / "out" / "result.json").read_text())
    assert [row["name"] for row in result["rows"]] == NAMES
    assert all(0 < row["accuracy"] <= 100 and row["speed"] > 1 for row in result["rows"])
    picture = np.asarray(Image.open(tmp_path / "out" / "mixes.png").convert("RGB"))
    # masks and images, not a blank
    assert picture.shape[0] > 400 and len(np.unique(picture.reshape(-1, 3), axis=0)) > 500
    student = load(tmp_path / "out" / "supermix_kd.safetensors")
    assert len(predict(student, load_data("digits").test[:5][0]).labels) == 5


def test_an_error_is_one_line_that_names_the_fix(tmp_path):
    done = supermix("teacher", "--data", "digit", folder=tmp_path)
    assert done.returncode == 1 and done.stderr.startswith(
        "supermix: Unknown teacher's data set 'digit'. Did you mean 'digits'?"
    )
