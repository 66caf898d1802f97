"tools/style.py --check finds what is never right, in a small package with one fault of each kind."
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tools"))
try: import style
finally: sys.path.pop(0)

FAULTS = {
    "against the arrows": ({"util/a.py": "from ..train.b import f", "train/b.py": "f = 1"}, "util.a imports train.b: util may import nothing"),
    "against the arrows, inside a function": ({"maps/a.py": "def g():\n    from fmce_fastai.oracle.b import f\n    return f", "oracle/b.py": "f = 1"}, "maps.a imports oracle.b"),
    "a private name": ({"maps/a.py": "from .b import _f", "maps/b.py": "_f = 1"}, "maps.a imports _f, a private name of maps.b"),
    "the Hub in the core": ({"oracle/a.py": "def f():\n    import huggingface_hub"}, "oracle.a is part of the core and imports huggingface_hub"),
    "matplotlib in the core": ({"train/a.py": "import matplotlib.pyplot as plt"}, "train.a is part of the core and imports matplotlib"),
    "statistics in the core": ({"oracle/a.py": "from statsmodels.stats.power import TTestPower"}, "oracle.a is part of the core and imports statsmodels"),
    "a cycle": ({"maps/a.py": "from .b import f", "maps/b.py": "def f():\n    from .a import g"}, "import cycle: maps.a -> maps.b -> maps.a"),
    "a method from outside": ({"oracle/a.py": "class A: pass\nA.save, A.load = print, print"}, "oracle.a sets A.save from outside"),
}


def write(folder, files):
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text + "\n")


@pytest.mark.parametrize("name", list(FAULTS))
def test_a_fault_is_found(name, tmp_path, monkeypatch):
    files, words = FAULTS[name]
    monkeypatch.setattr(style, "PACKAGE", tmp_path)
    write(tmp_path, files)
    assert words in "\n".join(style.never_right())


def test_what_is_allowed(tmp_path, monkeypatch):
    monkeypatch.setattr(style, "PACKAGE", tmp_path)
    write(tmp_path, {"convergence/plot.py": "def plot():\n    import matplotlib", "oracle/a.py": "from ..maps.b import f\nfrom fmce_fastai import __version__", "maps/b.py": "f = 1", "hub/c.py": "import huggingface_hub"})
    assert style.never_right() == []


def test_figures_of_a_file(tmp_path):
    "Twenty lines that are not empty, one of them long; functions of two and ten lines."
    write(tmp_path, {"a.py": "def f():\n    return 1\n\n\ndef g():\n" + "    x = 1\n"*9 + "y = 1\n"*7 + "y = '" + "x"*150 + "'"})
    assert style.figures([tmp_path / "a.py"]) == dict(files=1, p95=12, over_140="5.0%", median=6, p90=9, largest=22)


def test_the_package_itself(): assert style.never_right() == []
