"The examples of the README and of the page on one's own oracle run as they stand, but for their length, and the names they need are in `fmce_fastai.all`."
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tools"))
try: import figures as FIGURES
finally: sys.path.pop(0)


FEW = {"digits_dls()": "digits_dls(size=16, n_train=480, bs=32)"}
SHORTER = [  # what the examples do, in less time
    ({**FEW, "'resnet10t'": "'test_resnet'", "fit_one_cycle(5": "fit_one_cycle(1", "fmce_report(learn)": "fmce_report(learn, n_images=64, bar=False)"}, "assert len(report.table) == learn.fmce.history.module.nunique() and report.plot()"),
    ({**FEW, "'resnet10t'": "'test_resnet'", "fit_one_cycle(12": "fit_one_cycle(6", "fit_oracle(dataset)": "fit_oracle(dataset, n_epochs=2, bar=False)", "FMCSRecorder())": "FMCSRecorder(n_images=64, n_snapshots=8))", "fit_one_cycle(4": "fit_one_cycle(1"},
     "assert len(learn.fmce.history) == len(oracle.plan)\nassert FMCENet.load('oracle.safetensors').plan == oracle.plan")]


@pytest.mark.parametrize("i", range(len(SHORTER)))
def test_examples_run(i, tmp_path):
    tutorial = json.loads((ROOT / "nbs" / "tutorials" / "own_oracle.ipynb").read_text())
    page = "\n".join("".join(c["source"]) for c in tutorial["cells"] if c["cell_type"] == "markdown")
    examples = [e for text in ((ROOT / "README.md").read_text(), page) for e in re.findall(r"```python\n(.*?)```", text, re.S)]
    assert len(examples) == len(SHORTER)
    (changes, check), code = SHORTER[i], examples[i]
    for old, new in changes.items():
        assert code.count(old) == 1, old
        code = code.replace(old, new)
    script = tmp_path / "example.py"
    script.write_text(f"{code}\n{check}\n")
    run = subprocess.run([sys.executable, script], cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


def test_all_is_light_and_named():
    code = "import sys, fmce_fastai; assert not {'torch', 'fastai', 'timm', 'matplotlib'} & set(sys.modules), 'import fmce_fastai is heavy'"
    subprocess.run([sys.executable, "-c", code], check=True)
    import fmce_fastai.all as everything
    assert {"FMCECallback", "FMCSRecorder", "fit_oracle", "digits_dls", "FMCENet", "tap_plan"} <= set(everything.__all__)
    assert not any(hasattr(getattr(everything, n), "__path__") for n in everything.__all__)


@pytest.fixture(scope="module")
def figures(): return FIGURES


@pytest.mark.parametrize("name", list(FIGURES.PAGES))
def test_tables_of_the_pages_are_those_of_the_benchmarks(figures, name):
    make, notebook = figures.PAGES[name]
    text = "".join("".join(c["source"]) for c in json.loads((ROOT / "nbs" / f"{notebook}.ipynb").read_text())["cells"])
    assert len(make().splitlines()) > 2 and make() in text, f"python tools/figures.py prints another table:\n{make()}"


@pytest.mark.parametrize("name", list(FIGURES.TABLES))
def test_figures_are_those_of_the_benchmarks(figures, name):
    table = figures.TABLES[name]()
    assert len(table.splitlines()) > 2, "no benchmark file was found"
    assert table in (ROOT / "README.md").read_text(), f"python tools/figures.py prints another table:\n{table}"
