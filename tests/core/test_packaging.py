import importlib
import importlib.metadata
import importlib.util
import itertools
import re
import tomllib
import zipfile

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

import xglm_core
from tests.helpers.commands import ROOT
from xglm_core.backends import BACKENDS

PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
PROJECT = PYPROJECT["project"]
EXTRAS = {
    extra: [Requirement(text) for text in requirements]
    for extra, requirements in PROJECT["optional-dependencies"].items()
}
PACKAGES = ["xglm_core", *(backend.package for backend in BACKENDS.values())]


def names(requirements):
    return {requirement.name for requirement in requirements}


def test_core_needs_no_framework():
    assert names(map(Requirement, PROJECT["dependencies"])) == {"numpy", "sentencepiece", "tokenizers"}


@pytest.mark.parametrize("backend", BACKENDS.values(), ids=lambda backend: backend.name)
def test_the_extra_of_a_backend_is_its_frameworks(backend):
    assert names(EXTRAS[backend.name]) == set(backend.frameworks)


def test_all_holds_every_backend_and_format():
    (requirement,) = EXTRAS["all"]
    assert requirement.name == PROJECT["name"] == "xglm"
    assert requirement.extras == {*BACKENDS, "hub", "h5"}


def test_cpu_build_of_tensorflow_is_no_part_of_all():
    """Two distributions with the same files break each other."""
    assert names(EXTRAS["tf-cpu"]) == {"tensorflow-cpu", "keras"}
    assert [str(r.specifier) for r in EXTRAS["tf-cpu"]] == [str(r.specifier) for r in EXTRAS["tf"]]


def test_transformers_is_never_needed():
    assert all("transformers" not in names(requirements) for requirements in EXTRAS.values())


def test_constraints_satisfy_the_requirements():
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pinned = dict(line.split("==") for line in lines if line and not line.startswith("#"))
    for requirement in itertools.chain(map(Requirement, PROJECT["dependencies"]), *EXTRAS.values()):
        exact = str(requirement.specifier).startswith("==")
        assert requirement.name in pinned or exact or requirement.name == "xglm", requirement
        if requirement.name in pinned:
            assert requirement.specifier.contains(pinned[requirement.name]), requirement


def test_version():
    assert str(Version(xglm_core.__version__)) == xglm_core.__version__
    assert PROJECT["dynamic"] == ["version"]
    path = ROOT / PYPROJECT["tool"]["hatch"]["version"]["path"]
    assert re.findall(r'^__version__ = "(.*)"$', path.read_text(encoding="utf-8"), re.M) == [xglm_core.__version__]


def test_installed_version():
    try:
        installed = importlib.metadata.distribution("xglm")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("runs from the source tree")
    assert installed.version == xglm_core.__version__
    assert set(installed.metadata.get_all("Provides-Extra")) == {*EXTRAS}


def test_one_oldest_python():
    oldest = PROJECT["requires-python"].removeprefix(">=")
    assert PYPROJECT["tool"]["mypy"]["python_version"] == oldest
    assert PYPROJECT["tool"]["ruff"]["target-version"] == "py" + oldest.replace(".", "")


def test_files_that_the_metadata_names():
    assert (ROOT / PROJECT["readme"]).stat().st_size > 0
    for pattern in PROJECT["license-files"]:
        assert list(ROOT.glob(pattern))


@pytest.mark.parametrize("package", PACKAGES)
def test_packages_are_typed(package):
    assert (ROOT / package / "py.typed").is_file()
    assert (ROOT / package / "__init__.py").is_file()
    assert "Typing :: Typed" in PROJECT["classifiers"]


def test_console_script():
    assert PROJECT["scripts"] == {"xglm": "xglm_core.cli:main"}
    module, _, function = PROJECT["scripts"]["xglm"].partition(":")
    assert callable(getattr(importlib.import_module(module), function))


def test_wheel_holds_the_four_packages():
    packages = PYPROJECT["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]
    assert packages == PACKAGES
    # Each folder below them is a package too: one without `__init__.py` would work here and be lost elsewhere.
    for package in packages:
        for folder in {path.parent for path in (ROOT / package).rglob("*.py")}:
            assert (folder / "__init__.py").is_file(), folder


@pytest.mark.skipif(not importlib.util.find_spec("hatchling"), reason="needs hatchling, the build backend")
def test_built_wheel(tmp_path):
    builder = importlib.import_module("hatchling.builders.wheel").WheelBuilder(str(ROOT))
    (wheel,) = builder.build(directory=str(tmp_path), versions=["standard"])
    with zipfile.ZipFile(wheel) as archive:
        files = [name for name in archive.namelist() if ".dist-info/" not in name]
    expected = {
        str(path.relative_to(ROOT))
        for package in PACKAGES
        for path in (ROOT / package).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert set(files) == expected
