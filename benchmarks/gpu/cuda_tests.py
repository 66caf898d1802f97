"Part a: the tests marked `cuda`, by pytest in a process of its own; a row for each as it ends."
import json
import os
import subprocess
import sys
from functools import partial

from bundle import ROOT
from ledger import OutOfTime


def files():
    "The test files that hold such tests: the others need not be imported."
    paths = sorted((ROOT/"tests").glob("test_*.py"))
    return [p for p in paths if "@pytest.mark.cuda" in p.read_text(encoding="utf-8")]


def command(job, done):
    """pytest's command line, without the tests in `done`.

    Warnings are no errors here: the machine has versions of its own."""
    options = ["-m", "cuda", "-q", "-p", "pytest_rows", "-p", "no:cacheprovider",
               "--continue-on-collection-errors", "-o", "filterwarnings=default"]
    deselected = [o for test in done for o in ("--deselect", test)]
    only = ["--collect-only"] if job.tiny else []
    return [sys.executable, "-m", "pytest", *options, *only, *deselected, *map(str, files())]


def run(job):
    "Run those without a row. Raises `RuntimeError` if one failed, now or before, or could not be run."
    rows = job.rows("cuda_tests")
    conditions = json.dumps(job.conditions(""))
    env = os.environ | dict(FMCE_GPU_ROWS=str(rows.path), FMCE_GPU_CONDITIONS=conditions)
    line, limit = command(job, {r["test"] for r in rows.read()}), job.budget.left
    try: code = subprocess.run(line, cwd=ROOT, env=env, timeout=limit).returncode
    except subprocess.TimeoutExpired as e: raise OutOfTime("the tests were ended") from e
    failed = [r["test"] for r in rows.matching(outcome="failed")]
    if failed: raise RuntimeError(f"failed: {', '.join(failed)}")
    if code not in (0, 5): raise RuntimeError(f"pytest ended with {code}")  # 5: nothing is left to run


def units(job): yield "the tests marked cuda", partial(run, job)
