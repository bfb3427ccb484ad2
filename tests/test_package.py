"""What is built from the sources: a wheel that works alone, and an archive of sources that builds the same wheel."""

import json
import os
import re
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from configparser import ConfigParser
from email.parser import Parser
from pathlib import Path

import pytest

import lookfar

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
INFO = f"lookfar-{lookfar.__version__}.dist-info"
OFFLINE = {"PIP_NO_INDEX": "1"} | dict.fromkeys(("http_proxy", "https_proxy", "all_proxy"), "http://127.0.0.1:9")
EVERY_MODULE = """
import importlib, json, pkgutil, sys
import lookfar
for module in pkgutil.walk_packages(lookfar.__path__, "lookfar."):
    if module.name != "lookfar.__main__":
        importlib.import_module(module.name)
found = {name: module.__file__ for name, module in sys.modules.items() if name.partition(".")[0] == "lookfar"}
print(json.dumps(found))
"""


def build(kind, source, place):
    """The one archive that is built of the sources, without a download."""
    words = [sys.executable, "-m", "build", f"--{kind}", "--no-isolation", "--outdir", place, source]
    done = subprocess.run(words, capture_output=True, text=True, env=os.environ | OFFLINE)
    assert done.returncode == 0, done.stdout + done.stderr
    (archive,) = place.iterdir()
    return archive


def contents(wheel):
    with zipfile.ZipFile(wheel) as opened:
        return {name: opened.read(name) for name in opened.namelist()}


def tree(*folders):
    """The files below folders of the sources, in bytes, but for what running them leaves there."""
    found = [file.relative_to(ROOT) for each in folders for file in (ROOT / each).rglob("*") if file.is_file()]
    left = {file for file in found if any(part[0] == "." or part in ("__pycache__", "runs") for part in file.parts)}
    return {file.as_posix(): (ROOT / file).read_bytes() for file in found if file not in left}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    return build("wheel", ROOT, tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """The archive of the sources, unpacked."""
    archive = build("sdist", ROOT, tmp_path_factory.mktemp("sdist"))
    place = tmp_path_factory.mktemp("sources")
    with tarfile.open(archive) as opened:
        opened.extractall(place, filter="data")
    (unpacked,) = place.iterdir()
    return unpacked


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """A folder that holds the installed wheel and nothing else."""
    place = tmp_path_factory.mktemp("installed")
    words = ["pip", "install", "--no-deps", "--no-compile", "--disable-pip-version-check", "--target", place, wheel]
    done = subprocess.run([sys.executable, "-m", *words], capture_output=True, text=True, env=os.environ | OFFLINE)
    assert done.returncode == 0, done.stdout + done.stderr
    return place


@pytest.fixture
def run(installed, tmp_path):
    """Runs Python away from the sources, where `lookfar` is what is installed; the answer is what it printed."""

    def call(*words):
        environment = os.environ | OFFLINE | {"PYTHONPATH": str(installed)}
        words = [sys.executable, "-W", "error", *map(str, words)]
        done = subprocess.run(words, capture_output=True, text=True, env=environment, cwd=tmp_path)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    return call


# What is in it


def test_the_wheel_holds_the_package_to_the_byte_and_nothing_else(wheel):
    found = contents(wheel)
    package = {name: content for name, content in found.items() if not name.startswith(f"{INFO}/")}
    expected = {name.removeprefix("src/"): content for name, content in tree("src/lookfar").items()}
    assert package.keys() == expected.keys()
    assert package == expected
    about = {name.removeprefix(f"{INFO}/") for name in found.keys() - package.keys()}
    assert about == {"METADATA", "WHEEL", "RECORD", "entry_points.txt", "licenses/LICENSE"}


def test_what_is_not_a_module_is_read_at_run_time_or_marks_the_types(wheel):
    others = {name for name in contents(wheel) if name.startswith("lookfar/") and not name.endswith(".py")}
    code = "".join(file.read_text(encoding="utf-8") for file in (ROOT / "src").rglob("*.py"))
    assert {"lookfar/py.typed", "lookfar/study/page.html", "lookfar/study/theme.json"} < others
    told = {name for name in others if f'"{Path(name).name}"' in code}
    told |= {
        name for name in others if name.startswith("lookfar/kernels/compiled/") and f'"{Path(name).suffix}"' in code
    }
    assert others - told == {"lookfar/py.typed"}


def test_the_wheel_is_for_every_machine(wheel):
    assert wheel.name == f"lookfar-{lookfar.__version__}-py3-none-any.whl"
    assert "Root-Is-Purelib: true" in contents(wheel)[f"{INFO}/WHEEL"].decode().splitlines()


def test_the_metadata_names_the_version_the_licence_the_extras_and_the_command(wheel):
    found = contents(wheel)
    about = Parser().parsestr(found[f"{INFO}/METADATA"].decode())
    assert (about["Name"], about["Version"]) == ("lookfar", lookfar.__version__)
    assert about["Requires-Python"] == PROJECT["requires-python"]
    assert (about["License-Expression"], about["License-File"]) == ("Apache-2.0", "LICENSE")
    assert found[f"{INFO}/licenses/LICENSE"] == (ROOT / "LICENSE").read_bytes()
    assert about.get_payload() == (ROOT / "README.md").read_text(encoding="utf-8")
    extras = PROJECT["optional-dependencies"]
    assert {"hub", "bench", "cluster", "track", "dev"} == set(extras) == set(about.get_all("Provides-Extra"))
    wanted = {(need, None) for need in PROJECT["dependencies"]}
    wanted |= {(need, extra) for extra, needs in extras.items() for need in needs}
    pattern = re.compile(r"(.*?)(?:; (?:\((.*)\) and )?extra == '(.*)')?")
    parts = [pattern.fullmatch(need).groups() for need in about.get_all("Requires-Dist")]
    stated = [(f"{need}; {where}" if where else need, extra) for need, where, extra in parts]
    assert set(stated) == wanted and len(stated) == len(wanted)
    commands = ConfigParser()
    commands.read_string(found[f"{INFO}/entry_points.txt"].decode())
    assert dict(commands["console_scripts"]) == {"lookfar": "lookfar.cli:main"}


def test_every_extra_that_a_sentence_tells_to_install_is_there():
    told = {file: re.findall(r"lookfar\[(\w+)\]", content.decode()) for file, content in tree("src/lookfar").items()}
    names = {name for each in told.values() for name in each}
    assert {"hub", "track"} <= names <= set(PROJECT["optional-dependencies"])


def test_the_archive_of_sources_holds_what_its_tests_and_pages_read_and_nothing_stray(sources):
    found = {file.relative_to(sources).as_posix(): file.read_bytes() for file in sources.rglob("*") if file.is_file()}
    whole = tree("src", "tests", "recipes", "docs", "examples", "results")
    folders = {name: content for name, content in found.items() if "/" in name}
    assert folders.keys() == whole.keys()
    assert folders == whole
    files = {"README.md", "LICENSE", "CITATION.cff", "CHANGELOG.md", "pyproject.toml", ".gitignore", "PKG-INFO"}
    assert found.keys() - whole.keys() == files


def test_the_archive_of_sources_builds_the_same_wheel(sources, wheel, tmp_path):
    again = build("wheel", sources, tmp_path)
    assert again.name == wheel.name
    assert contents(again) == contents(wheel)


# What it does


def test_every_module_is_imported_from_where_the_wheel_was_installed(installed, run):
    found = json.loads(run("-c", EVERY_MODULE))
    modules = {file.removesuffix(".py").removesuffix("/__init__") for file in tree("src/lookfar") if file[-3:] == ".py"}
    assert {name.replace(".", "/") for name in found} == {name.removeprefix("src/") for name in modules} - {
        "lookfar/__main__"
    }
    assert {file for file in found.values() if not Path(file).is_relative_to(installed)} == set()


def test_the_installed_package_tells_its_version_and_its_methods(installed, run):
    assert Path(run("-c", "import lookfar; print(lookfar.__file__)").strip()) == installed / "lookfar" / "__init__.py"
    assert run("-m", "lookfar", "--version") == f"lookfar {lookfar.__version__}\n"
    assert run(installed / "bin" / "lookfar", "--version") == f"lookfar {lookfar.__version__}\n"
    page = run("-m", "lookfar", "methods", "alibi")
    assert "arXiv" in page and "Kernels" in page


def test_the_installed_package_trains_measures_and_reports(run, tmp_path):
    small = "training.updates=2", "training.batch=2", "evaluation.lengths=[32]", "evaluation.tokens=64"
    changes = [word for each in small for word in ("--set", each)]
    out = run("-m", "lookfar", "train", ROOT / "recipes" / "tiny.toml", "--folder", "tiny", *changes)
    assert "The run is in tiny." in out
    rows = [json.loads(line) for line in (tmp_path / "tiny" / "rows.jsonl").read_text(encoding="utf-8").splitlines()]
    assert {row["protocol"] for row in rows} == {"training", "non_overlapping", "sliding"}
    assert run("-m", "lookfar", "report", "tiny") == f"The report is {Path('tiny', 'report.html')}\n"
    page = (tmp_path / "tiny" / "report.html").read_text(encoding="utf-8")
    assert "1 scheme, 1 run, trained at 32 tokens" in page and "window.vegaEmbed" in page
    figures = {file.name for file in (tmp_path / "tiny" / "figures").iterdir()}
    assert figures == {f"{name}.{kind}" for name in ("perplexity", "loss") for kind in ("svg", "pdf")}
