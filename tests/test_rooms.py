"""The rooms of the house: nothing imports upwards or in a circle, and the short public paths work."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent / "supermix"
ROOMS = [
    "core",
    "recipes",
    "data",
    "models",
    "zoo",
    "mixing",
    "training",
    "policies",
    "distillation",
    "explore",
    "experiments",
    "cli",
]  # from the ground up


def name_of(path):
    return path.relative_to(ROOT).with_suffix("").parts


def imports_of(path):
    "The modules of the package that a file imports, anywhere in it: `('mixing', 'masks')`."
    for node in ast.walk(ast.parse(path.read_text())):
        if not isinstance(node, ast.ImportFrom):
            continue
        if node.level:
            found = (*name_of(path)[: -node.level], *(node.module or "").split("."))
        else:
            found = tuple((node.module or "").split("."))[1:] if (node.module or "").startswith("supermix") else ()
        if any(found):
            yield tuple(part for part in found if part)


MODULES = {
    name_of(path): set(imports_of(path))
    for path in sorted(ROOT.rglob("*.py"))
    if not path.name.startswith("_") and path != ROOT / "generate.py"
}  # which is a name for mixing/generate.py


def test_every_module_is_in_a_room():
    assert {name[0] for name in MODULES} == set(ROOMS) and len(MODULES) > 40


@pytest.mark.parametrize("module", MODULES, ids=".".join)
def test_no_import_runs_upwards(module):
    for other in MODULES[module]:
        assert other in MODULES, f"{module} imports {other}, which is no module"
        assert ROOMS.index(other[0]) <= ROOMS.index(module[0]), f"{module} imports {other}, a room above its own"


def test_no_import_runs_in_a_circle():
    done, left = set(), dict(MODULES)
    while left:
        free = [module for module, needs in left.items() if needs <= done]
        assert free, f"these import each other in a circle: {sorted(left)}"
        done |= set(free)
        for module in free:
            del left[module]


@pytest.mark.parametrize(
    "line",
    [
        "from supermix.mixing import SuperMix, MixUp, CutMix, PuzzleMix, MixedDataset, Engine",
        "from supermix.training import train, join, accuracy",
        "from supermix.distillation import make_mixes, kd_loss",
        "from supermix.policies import load_policy, Augmented",
        "from supermix.explore import explore",
        "import supermix.recipes, supermix.zoo, supermix.experiments.study",
        "import supermix; supermix.mixing.solver.SuperMix is supermix.SuperMix or 1 / 0",
        "import supermix.mixing; dir(supermix.mixing).index('SuperMix')",
    ],
)
def test_the_short_paths_work(line):
    done = subprocess.run([sys.executable, "-c", line], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_room_imports_nothing_slow_by_itself():
    line = (
        "import sys, supermix.mixing, supermix.training, supermix.policies, supermix.distillation, "
        "supermix.explore, supermix.experiments; sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", line]).returncode == 0


def test_generate_keeps_its_short_name():
    done = subprocess.run([sys.executable, "-m", "supermix.generate", "--help"], capture_output=True, text=True)
    assert done.returncode == 0 and "usage: supermix generate" in done.stdout
