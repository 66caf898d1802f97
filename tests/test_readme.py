"The README's example runs as it stands, but for its length, and the names it needs are in `fmce_fastai.all`."
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


@pytest.fixture(scope="module")
def example():
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    assert len(blocks) == 1
    return blocks[0]


def test_example_runs(example, tmp_path):
    short = example.replace("'resnet10t'", "'test_resnet'").replace("fit_one_cycle(12", "fit_one_cycle(6").replace("fit_oracle(dataset)", "fit_oracle(dataset, n_epochs=2, bar=False)")
    short = short.replace("FMCSRecorder())", "FMCSRecorder(n_images=64, n_snapshots=8))").replace("fit_one_cycle(4", "fit_one_cycle(1")
    assert short.count("test_resnet") == 1 and "fit_one_cycle(6" in short and "fit_one_cycle(1," in short
    check = "\nassert len(learn.fmce.history) == len(oracle.plan)\nassert FMCENet.load('oracle.safetensors').plan == oracle.plan\n"
    script = tmp_path / "example.py"
    script.write_text(short + check)
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


@pytest.mark.parametrize("name", ["overhead", "oracles", "architectures", "gains", "universal", "untrained", "few_images"])
def test_figures_are_those_of_the_benchmarks(figures, name):
    table = figures.TABLES[name]()
    assert len(table.splitlines()) > 2, "no benchmark file was found"
    assert table in (ROOT / "README.md").read_text(), f"python tools/figures.py prints another table:\n{table}"
