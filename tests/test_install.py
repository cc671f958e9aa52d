"""What `pip install .` gives: the package, its teachers, and no notebook tool."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from shutil import copytree
from zipfile import ZipFile

ROOT = Path(__file__).parent.parent
TOOLS = (
    "nbdev",
    "fastcore",
    "execnb",
    "IPython",
    "ipykernel",
    "ipywidgets",
    "jupyterlab",
    "jupyter_core",
    "nbformat",
    "nbconvert",
)


def test_supermix_imports_without_any_notebook_tool():
    program = f"""
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {TOOLS}: raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Refuse())
import supermix, supermix.cli
assert all(hasattr(supermix, name) for name in supermix.__all__)
assert not set({TOOLS}) & set(sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_wheel_holds_the_package_and_the_teachers(tmp_path):
    for name in ("settings.ini", "setup.py", "pyproject.toml", "README.md", "LICENSE"):
        (tmp_path / name).write_bytes((ROOT / name).read_bytes())
    copytree(ROOT / "supermix", tmp_path / "supermix")
    command = [sys.executable, "-m", "pip", "wheel", ".", "--no-deps", "--no-build-isolation", "-q", "-w", "wheels"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    wheel = ZipFile(next((tmp_path / "wheels").glob("*.whl")))
    names = wheel.namelist()
    assert {
        "supermix/py.typed",
        "supermix/mixing/solver.py",
        "supermix/models/wrn.py",
        "supermix/teachers/digits.safetensors",
        "supermix/teachers/fashion_mnist.json",
    } <= set(names)
    metadata = wheel.read(next(n for n in names if n.endswith("METADATA"))).decode()
    required = [line for line in metadata.splitlines() if line.startswith("Requires-Dist") and "extra ==" not in line]
    assert len(required) >= 6 and not any(tool.lower() in line.lower() for line in required for tool in TOOLS)


def test_uv_takes_the_versions_that_pip_is_told_to_take(tmp_path):
    "The settings are read as pip itself prints them, from a real file of settings."
    (tmp_path / "pip.conf").write_text(
        f"[global]\nconstraint = {tmp_path}/c.txt\ntimeout = 60\n[install]\nfind-links =\n    {tmp_path}/a\n    /b\n"
    )
    env = {k: v for k, v in os.environ.items() if not k.startswith("PIP_")} | {
        "PIP_CONFIG_FILE": str(tmp_path / "pip.conf")
    }
    listed = subprocess.run([sys.executable, "-m", "pip", "config", "list"], env=env, capture_output=True, text=True)
    spec = importlib.util.spec_from_file_location("install", ROOT / "tools" / "install.py")
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    found = tool.uv_settings(listed.stdout)
    assert found["UV_CONSTRAINT"] == f"{tmp_path}/c.txt" and found["UV_FIND_LINKS"] == f"{tmp_path}/a,/b"
    assert "60" not in found.values()
