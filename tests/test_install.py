"""The shipped recipes are found from a wheel, an sdist, an editable install and a plain checkout."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from surgery.recipe import list_recipes

ROOT = Path(__file__).resolve().parent.parent
CHECK = """
import sys, surgery
from surgery.recipe import list_recipes, load_recipe
assert surgery.__file__.startswith(sys.argv[1]), surgery.__file__
names = list_recipes()
assert all(load_recipe(name).stages for name in names)
print("\\n".join(names))
"""


def run(*command, **kwargs) -> str:
    done = subprocess.run(
        [str(part) for part in command],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300,
        **kwargs,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


def pip_install(target: Path, *what) -> None:
    flags = ["--quiet", "--no-deps", "--no-build-isolation", "--no-index", "--disable-pip-version-check"]
    run(sys.executable, "-m", "pip", "install", *flags, "--target", target, *what)


def recipes_seen_from(folder: Path, elsewhere: Path, expected_place: Path) -> list[str]:
    """What a fresh interpreter, started elsewhere with `folder` first on its path, lists and can load."""
    # an editable install is a .pth file, which is read in site folders only; this package may be installed already, so
    # what the folder brings goes before it
    start = f"import site, sys; known, sys.path = sys.path, []; site.addsitedir({str(folder)!r}); sys.path += known\n"
    return run(sys.executable, "-c", start + CHECK, expected_place, cwd=elsewhere).split()


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """A copy of the checkout as version control sees it, so that building writes nothing into the real one."""
    copy = tmp_path_factory.mktemp("source") / "surgery-checkout"
    skipped = shutil.ignore_patterns(".*", "__pycache__", "dist", "build", "*.egg-info", "shared")
    shutil.copytree(ROOT, copy, ignore=skipped)
    return copy


@pytest.fixture(scope="module")
def built(source, tmp_path_factory) -> Path:
    """A folder with the wheel and the sdist."""
    folder = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", "--no-isolation", "--sdist", "--wheel", "--outdir", folder, source)
    return folder


def test_wheel(built, tmp_path):
    (wheel,) = built.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert "surgery/py.typed" in names
    assert {f"surgery/demo/{file.name}" for file in (ROOT / "surgery" / "demo").iterdir()} <= set(names)
    assert not [name for name in names if name.startswith(("tests/", "recipes/"))]
    pip_install(tmp_path / "site", wheel)
    assert recipes_seen_from(tmp_path / "site", tmp_path, tmp_path / "site") == list_recipes()


def test_sdist(built, tmp_path):
    (sdist,) = built.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        packed = {Path(name).name for name in archive.getnames() if "/surgery/demo/" in name}
    assert packed == {file.name for file in (ROOT / "surgery" / "demo").iterdir()}
    pip_install(tmp_path / "site", sdist)
    assert recipes_seen_from(tmp_path / "site", tmp_path, tmp_path / "site") == list_recipes()


def test_editable(source, tmp_path):
    pip_install(tmp_path / "site", "--editable", source)
    assert not (tmp_path / "site" / "surgery").exists()
    assert recipes_seen_from(tmp_path / "site", tmp_path, source) == list_recipes()


def test_checkout(source, tmp_path):
    assert recipes_seen_from(source, tmp_path, source) == list_recipes()
