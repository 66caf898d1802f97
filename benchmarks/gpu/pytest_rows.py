"A pytest plugin: a row for each test as it ends; with `--collect-only`, for each that was found."
import json
import os

from ledger import Rows


def add(test, outcome, seconds=0., message=""):
    row = dict(test=test, outcome=outcome, seconds=round(seconds, 2), message=message)
    Rows(os.environ["FMCE_GPU_ROWS"]).add(row | json.loads(os.environ["FMCE_GPU_CONDITIONS"]))


def pytest_runtest_logreport(report):
    if report.when != "call" and report.passed: return
    message = report.longreprtext.strip().rpartition("\n")[2]
    add(report.nodeid, report.outcome, report.duration, message[:300])


def pytest_collection_finish(session):
    if not session.config.option.collectonly: return
    for item in session.items: add(item.nodeid, "collected")
