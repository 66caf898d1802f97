"The script for a GPU: what has a row is not run again, the minutes are kept, packages stay."
import sys
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest

FOLDER = str(Path(__file__).resolve().parents[1]/"benchmarks"/"gpu")
sys.path.insert(0, FOLDER)
try:
    import bundle
    import cells
    import cuda_tests
    import job
    import learners
    import ledger
    import step_overhead
finally: sys.path.remove(FOLDER)


class Clock:
    "Stands still unless work moves it."
    now = 100.
    def __call__(self): return self.now


@pytest.fixture
def clock(): return Clock()


def make_budget(clock, seconds): return ledger.Budget((seconds + ledger.SPARE)/60, clock)

def make_job(tmp_path, clock, seconds, seeds=2):
    return job.Job(tmp_path, tmp_path/"out", tmp_path/"state", make_budget(clock, seconds), True, seeds)


@pytest.fixture
def quick_cells(monkeypatch, clock):
    "Cells whose stages take 60 and 30 seconds and train nothing; the list of what was run."
    ran = []
    def start(self):
        self.job.budget.check(self.rows.longest("seconds_start", arch=self.arch))
        ran.append((self.arch, self.seed, "start"))
        clock.now += 60
        cells.write_json(self.folder/"stage1.json", dict(start=f"{self.arch}{self.seed}", seconds_start=60))
    def fine_tune(self, arm):
        self.job.budget.check(self.rows.longest("seconds", arch=self.arch, arm=arm))
        ran.append((self.arch, self.seed, arm))
        clock.now += 30
        facts = cells.read_json(self.folder/"stage1.json")
        self.rows.add(dict(arch=self.arch, seed=self.seed, arm=arm, **facts, seconds=30))
    monkeypatch.setattr(cells.Cell, "start", start)
    monkeypatch.setattr(cells.Cell, "fine_tune", fine_tune)
    return ran


def call(tmp_path, clock, seconds):
    "One call of part c."
    job = make_job(tmp_path, clock, seconds)
    return ledger.run_units(cells.units(job), job.budget)


def test_a_second_call_goes_on_where_the_first_stopped(tmp_path, clock, quick_cells):
    first, second = job.TINY["cells"]
    call(tmp_path, clock, 200)  # a network and the start of the next
    assert quick_cells == [(first, 0, s) for s in ("start", *cells.ARMS)] + [(second, 0, "start")]
    assert clock.now == 100 + 60 + 3*30 + 60
    call(tmp_path, clock, 3600)
    stages = [(arch, seed, s) for seed in (0, 1) for arch in (first, second) for s in ("start", *cells.ARMS)]
    assert quick_cells == stages
    call(tmp_path, clock, 3600)
    assert quick_cells == stages


def test_what_earlier_rows_show_to_be_too_long_is_not_begun(tmp_path, clock, quick_cells):
    call(tmp_path, clock, 290)
    n, before = len(quick_cells), clock.now
    job = make_job(tmp_path, clock, 50)  # a start takes 60
    units = [u for u in cells.units(job) if "seed 1" in u[0]]
    ledger.run_units(units, job.budget)
    assert n == 8 and len(quick_cells) == n and clock.now == before


def test_arms_are_not_paired_with_another_start(tmp_path, clock, quick_cells, capsys):
    call(tmp_path, clock, 110)  # start and two arms of the first network
    first, second = job.TINY["cells"]
    assert quick_cells[1:] == [(first, 0, "plain"), (first, 0, "ral")]
    cells.shutil.rmtree(tmp_path/"state")
    call(tmp_path, clock, 3600)
    assert (first, 0, "universal") not in quick_cells and (second, 0, "universal") in quick_cells
    assert f"{first}, seed 0 stays incomplete" in capsys.readouterr().out


def test_what_fails_is_named_and_the_rest_runs(tmp_path, clock, quick_cells, monkeypatch):
    def broken(self): raise ValueError("no such oracle")
    monkeypatch.setattr(cells.Cell, "start", broken)
    failed = call(tmp_path, clock, 3600)
    assert len(failed) == 4 and not quick_cells  # every start; no arm without one


def test_rows_are_kept_as_they_come_and_a_broken_one_is_dropped(tmp_path):
    rows = ledger.Rows(tmp_path/"out"/"a.csv")
    rows.add(dict(a=1, b="x,y"))
    rows.add(dict(a=2, b=.5))
    with rows.path.open("a") as f: f.write("3,unfin")  # as a process that was killed leaves it
    again = ledger.Rows(rows.path)
    again.add(dict(a=4, b=""))
    assert [r["a"] for r in again.read()] == ["1", "2", "4"]
    assert again.matching(a=1) == [dict(a="1", b="x,y")]
    assert again.longest("a") == 4 and again.longest("a", b="z") == 0
    with pytest.raises(ValueError, match="other columns"): again.add(dict(a=1, c=2))


def test_a_fit_ends_when_the_time_is_up_or_will_not_do(clock):
    deadline = learners.Deadline(make_budget(clock, 110))
    deadline.learn = SimpleNamespace(epoch=0, n_epoch=3)
    deadline.before_fit()
    deadline.before_batch()
    clock.now += 36
    deadline.after_epoch()  # two more would take 72
    clock.now += 10
    with pytest.raises(ledger.OutOfTime): deadline.after_epoch()
    deadline.before_batch()
    clock.now += 64
    with pytest.raises(ledger.OutOfTime): deadline.before_batch()


def test_rows_of_steps_compare_those_between(monkeypatch):
    "Plain steps take 1 s and RAL steps 3; the first pairs take longer and do not count."
    rows, time = [], iter([])
    monkeypatch.setattr(step_overhead, "now", lambda: next(time))
    warm, pairs = step_overhead.WARM, step_overhead.PAIRS
    seconds = [9., 9.]*warm + [1., 3.]*(2*pairs)
    time = iter([sum(seconds[:i]) for i in range(len(seconds)+1)])
    clock = step_overhead.PairClock(lambda *row: rows.append(row))
    clock.before_train()
    for _ in seconds: clock.before_batch()
    assert rows == [(pairs, 3*pairs)]  # the second row ends with the last step
    clock.after_train()
    assert rows == 2*[(pairs, 3*pairs)]


def make_wheel(folder, name, version):
    with zipfile.ZipFile(folder/f"{name}-{version}-py3-none-any.whl", "w") as z:
        z.writestr(f"{name}/__init__.py", f"version = '{version}'")
        z.writestr(f"{name}-{version}.dist-info/METADATA", f"Name: {name}\nVersion: {version}\n")


def test_only_what_the_machine_lacks_is_unpacked(tmp_path):
    (tmp_path/"wheels").mkdir()
    make_wheel(tmp_path/"wheels", "numpy", "99.0")
    make_wheel(tmp_path/"wheels", "nowhere", "1.0")
    for _ in range(2): assert bundle.unpack_missing(tmp_path, tmp_path/"site") == ["nowhere"]
    assert sorted(p.name for p in (tmp_path/"site").iterdir()) == ["nowhere", "nowhere-1.0.dist-info"]


def test_an_old_package_is_none(monkeypatch):
    least = bundle.minima()["fastai"]
    for version, is_there in {least: True, "99.0": True, "2.7.19": False}.items():
        monkeypatch.setattr(bundle.importlib.metadata, "version", lambda name: version)
        assert bundle.is_there("fastai") is is_there
    assert bundle.requirement("fastai") == f"fastai>={least}" and bundle.requirement("rich") == "rich"


def test_tests_with_a_row_are_left_out(tmp_path, clock):
    command = cuda_tests.command(make_job(tmp_path, clock, 500), ["tests/test_data.py::test_a"])
    assert command[command.index("--deselect")+1] == "tests/test_data.py::test_a"
    assert any(c.endswith("test_settings.py") for c in command) and Path(__file__) not in map(Path, command)
