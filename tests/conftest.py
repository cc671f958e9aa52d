"""What all tests share: a trained teacher, real images, and how long one may search for counterexamples."""

import os

import pytest
import torch
from hypothesis import settings
from supermix.data import load_digits
from supermix.zoo import pretrained

os.environ.setdefault("MPLBACKEND", "Agg")  # no test opens a window
os.environ.setdefault("OMP_NUM_THREADS", "1")  # what tests start gets one thread, too
torch.set_num_threads(1)  # networks this small gain nothing from a second, and on a busy machine wait ten times as long


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="also run what takes long, and twenty times as many examples")


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: takes long; runs with --slow only")
    config.addinivalue_line("markers", "browser: drives a real browser; skipped where there is none")
    settings.register_profile("quick", max_examples=25, deadline=None, derandomize=True)  # the same examples each time
    settings.register_profile("slow", max_examples=500, deadline=None)
    settings.load_profile("slow" if config.getoption("--slow") else "quick")


def pytest_collection_modifyitems(config, items):
    if config.getoption("--slow"): return
    for item in items:
        if "slow" in item.keywords: item.add_marker(pytest.mark.skip(reason="takes long: give --slow"))


@pytest.fixture(scope="session")
def digits():
    "Real images, there without a download."
    return load_digits()


@pytest.fixture(scope="session")
def teacher():
    "A network that knows the digits."
    return pretrained("digits")


@pytest.fixture(scope="session")
def photos():
    "Four colour photographs of different sizes, uint8 (H, W, 3)."
    from skimage import data
    return {name: getattr(data, name)() for name in ("chelsea", "coffee", "astronaut", "rocket")}


@pytest.fixture
def seeded():
    "A fresh generator: `seeded(3)`."
    return lambda seed=0, device="cpu": torch.Generator(device).manual_seed(seed)
