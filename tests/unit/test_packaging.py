"""The wheel puts one name into site-packages, and code spells its imports in full."""

from __future__ import annotations

import re
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FLOORS = ["jambascope", "hooks", "studies", "dashboards"]


def test_a_wheel_in_an_empty_environment_imports_every_subpackage(tmp_path):
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q"]
    build = [*pip, "wheel", str(ROOT), "--no-deps", "--no-build-isolation", "-w", str(tmp_path)]
    subprocess.run(build, check=True, capture_output=True, cwd=tmp_path)
    (wheel,) = tmp_path.glob("*.whl")
    models = [path for path in (ROOT / "jambascope" / "zoo").glob("*/*") if path.parent.name != "__pycache__"]
    packed = set(zipfile.ZipFile(wheel).namelist())
    assert {str(path.relative_to(ROOT)) for path in models} <= packed
    assert not [name for name in packed if "notebooks" in name]  # scripts of a clone: no module may run one
    environment = tmp_path / "environment"
    venv.create(environment, with_pip=False)
    site = Path(sysconfig.get_path("purelib", vars={"base": str(environment)}))
    subprocess.run([*pip, "install", "--no-deps", "--target", str(site), str(wheel)], check=True, capture_output=True)
    assert {p.name for p in site.iterdir() if "dist-info" not in p.name and p.name != "bin"} == {"jambascope"}
    # The dependencies of the environment that runs this test, but not its own (editable) jambascope.
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    code = """
import importlib, pkgutil, jambascope
names = [m.name for m in pkgutil.walk_packages(jambascope.__path__, "jambascope.")]
for name in names:
    if "dashboards.pages" not in name and not name.endswith("dashboards.app"):  # scripts, run by streamlit
        importlib.import_module(name)
from jambascope.zoo import packaged_models
assert "jamba-micro" in packaged_models()
from pathlib import Path
assert (Path(jambascope.__file__).parent / "py.typed").exists()
print(jambascope.__file__, *names)
"""
    python = environment / "bin" / "python"
    out = subprocess.run([python, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert out.returncode == 0, out.stderr
    assert out.stdout.startswith(str(site))
    for name in (
        "hooks",
        "studies.figures",
        "studies.bench",
        "studies.zoo",
        "studies.runner",
        "dashboards.command",
        "kernels.selective_scan.cpu",
    ):
        assert f"jambascope.{name}" in out.stdout.split()


def python_files():
    return [p for floor in [*FLOORS, "tests"] for p in (ROOT / floor).rglob("*.py")]


def test_no_bare_import_of_a_mapped_folder():
    """``import hooks`` would load a second copy from the repository root."""
    bare = re.compile(r"^\s*(?:from|import)\s+(?:hooks|studies|dashboards)\b", re.MULTILINE)
    assert [p for p in python_files() if bare.search(p.read_text())] == []


@pytest.mark.parametrize("floor", FLOORS)
def test_imports_only_point_down(floor):
    above = FLOORS[FLOORS.index(floor) + 1 :]
    upward = re.compile(rf"^\s*(?:from|import)\s+jambascope\.(?:{'|'.join(above) or '-'})\b", re.MULTILINE)
    assert [p for p in (ROOT / floor).rglob("*.py") if upward.search(p.read_text())] == []


def test_files_stay_readable():
    assert [p for p in python_files() if len(p.read_text().splitlines()) > 450] == []
