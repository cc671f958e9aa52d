"""What all tests share: a trained teacher, real images, and how long one may search for counterexamples.

The tests must pass on every machine. Two variables of the environment show whether they do:

    SUPERMIX_TEST_THREADS=2   the tests' own process has two threads (default: one)
    SUPERMIX_TEST_SEED=3      other initial weights, draws and examples wherever a test sets no seed, or sets it by
                              `torch.manual_seed` or `seeded` (default: 0)

and the libraries' own variables, which make this processor add in the order of another:

    ATEN_CPU_CAPABILITY=default ONEDNN_MAX_CPU_ISA=AVX2 MKL_CBWR=COMPATIBLE    an old processor
    ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 MKL_CBWR=AVX2             one without AVX-512
"""

import os
import signal
import sys

import pytest
import torch
from hypothesis import settings
from supermix.data import load_digits
from supermix.zoo import pretrained

THREADS, SHIFT = (int(os.environ.get(f"SUPERMIX_TEST_{name}", n)) for name, n in (("THREADS", 1), ("SEED", 0)))
# a program that a shell starts in the background ignores Ctrl-C, and so does all that it starts: not our tests
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
os.environ.setdefault("MPLBACKEND", "Agg")  # no test opens a window
os.environ.setdefault("OMP_NUM_THREADS", str(THREADS))  # what tests start gets as many threads, too
torch.set_num_threads(THREADS)  # networks this small gain nothing from two, and on a busy machine wait ten times longer

torch_manual_seed = torch.manual_seed


def manual_seed(seed):
    "torch.manual_seed, shifted where a test calls it; the package's own calls are left as they are."
    asked_by_test = sys._getframe(1).f_globals["__name__"].startswith("test_")
    return torch_manual_seed(seed + 1000 * SHIFT if asked_by_test else seed)


if SHIFT:
    torch.manual_seed = manual_seed


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="also run what takes long, and twenty times as many examples")


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: takes long; runs with --slow only")
    config.addinivalue_line("markers", "browser: drives a real browser; skipped where there is none")
    settings.register_profile(
        "quick", max_examples=25, deadline=None, derandomize=not SHIFT
    )  # the same examples each time
    settings.register_profile("slow", max_examples=500, deadline=None)
    settings.load_profile("slow" if config.getoption("--slow") else "quick")


def pytest_collection_modifyitems(config, items):
    # last: its passes on pretended GPUs start autograd's threads, and then this process cannot fork one that learns
    items.sort(key=lambda item: item.path.stem == "test_captured")
    if config.getoption("--slow"):
        return
    for item in items:
        if "slow" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="takes long: give --slow"))


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


@pytest.fixture(autouse=True)
def first_seed():
    "Each test begins with the same random numbers, whichever tests ran before it."
    torch_manual_seed(1000 * SHIFT)


@pytest.fixture
def seeded():
    "A fresh generator: `seeded(3)`."
    return lambda seed=0, device="cpu": torch.Generator(device).manual_seed(seed + 1000 * SHIFT)
