"settings.ini, pyproject.toml and the package say the same."
import subprocess
import sys
from configparser import ConfigParser
from pathlib import Path

import pytest

import fmce_fastai

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def settings():
    config = ConfigParser(delimiters=["="])
    with open(ROOT / "settings.ini", encoding="utf-8") as f: config.read_file(f)
    return config["DEFAULT"]


def test_version(settings):
    assert fmce_fastai.__version__ == settings["version"]
    assert f"version: {settings['version']}" in (ROOT / "CITATION.cff").read_text()
    assert f"## {settings['version']}" in (ROOT / "CHANGELOG.md").read_text()


@pytest.mark.skipif(sys.version_info < (3, 11), reason="tomllib is in the standard library from Python 3.11 on")
def test_pyproject_repeats_settings(settings):
    import tomllib
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["name"] == settings["lib_name"]
    assert project["description"] == settings["description"]
    assert project["requires-python"] == ">=" + settings["min_python"]
    assert project["urls"]["Repository"] == f"https://github.com/{settings['user']}/{settings['repo']}"


def test_requirements_are_lower_bounds(settings):
    for field in ("requirements", "dev_requirements", "study_requirements", "cam_requirements", "docs_requirements"):
        for requirement in settings[field].split():
            assert ">=" in requirement and "==" not in requirement, requirement


def test_library_code_prints_nothing():
    "Only the shell commands print, and `FMCECallback(verbose=True)`."
    import ast
    found = {}
    for path in (ROOT / "fmce_fastai").rglob("*.py"):
        calls = [n for n in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(n, ast.Call)]
        found.setdefault(path.relative_to(ROOT / "fmce_fastai").parts[0], []).extend(ast.unparse(n) for n in calls if ast.unparse(n.func) in ("print", "sys.stdout.write", "sys.stderr.write", "pprint", "display"))
    assert found.pop("cli") and {k: v for k, v in found.items() if v} == {"train": ["print(self)"]}


def test_what_an_extra_needs_is_tested(settings):
    for extra in ("study", "cam"): assert set(settings[f"{extra}_requirements"].split()) <= set(settings["dev_requirements"].split())


ABSENT = """
import sys, warnings
warnings.simplefilter("ignore")
for name in ("accelerate", "statsmodels", "pytorch_grad_cam", "nbdev", "hypothesis", "tensorboard", "toml", "spacy"): sys.modules[name] = None
import fmce_fastai.all
"""

def test_names_of_a_notebook_need_no_optional_package():
    "fastai requires spaCy, for text; images do not need it. The others are in extras or for developers."
    done = subprocess.run([sys.executable, "-c", ABSENT], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
