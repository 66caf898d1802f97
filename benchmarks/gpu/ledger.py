"Rows that are kept as they come, and the minutes that a call may take."
import csv
import gc
import os
import time
import traceback
from pathlib import Path

SPARE = 20  # seconds kept for what cannot be interrupted, such as judging an oracle


class OutOfTime(Exception):
    "The minutes are spent, or what comes next needs more than are left."


class Budget:
    "The seconds that are left of `minutes`, `SPARE` of them kept back."
    def __init__(self, minutes, clock=time.monotonic):
        self.clock, self.start, self.most = clock, clock(), 60*minutes - SPARE

    @property
    def spent(self): return self.clock() - self.start

    @property
    def left(self): return self.most - self.spent

    def check(self, needed=0., what="the next step"):
        "Raise `OutOfTime` unless more than `needed` seconds are left."
        if self.left > needed: return
        raise OutOfTime(f"{what}: about {needed:.0f} s needed, {max(self.left, 0):.0f} s left")


def drop_partial_line(path):
    "Cut off a last line that was not completed, as a process that was killed leaves it."
    text = path.read_bytes()
    if text and not text.endswith(b"\n"): path.write_bytes(text[:text.rfind(b"\n")+1])


class Rows:
    "The CSV file of a measure: each row is appended and flushed at once."
    def __init__(self, path):
        self.path = Path(path)
        if self.path.exists(): drop_partial_line(self.path)

    def read(self):
        "All rows, as dicts of strings."
        if not self.path.exists(): return []
        with self.path.open(newline="") as f: return list(csv.DictReader(f))

    def matching(self, **key):
        "The rows with these values."
        return [r for r in self.read() if all(r[k] == str(v) for k, v in key.items())]

    def longest(self, column, **key):
        "The largest number in `column` of the rows with these values; 0 where there is none."
        return max((float(r[column]) for r in self.matching(**key)), default=0.)

    def add(self, row):
        "Append `row`. Raises `ValueError` if the file has other columns."
        have = self.read()
        if have and list(have[0]) != list(row):
            raise ValueError(f"{self.path} has other columns than this script writes: move it away.")
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", newline="") as f:
            writer = csv.DictWriter(f, row)
            if f.tell() == 0: writer.writeheader()
            writer.writerow(row)
            f.flush()
            os.fsync(f.fileno())
        print({k: row[k] for k in list(row)[:8]}, flush=True)


def run_units(units, budget):
    """Run (name, function) pairs until the time is up; the names of those that failed.

    What fails is printed and does not keep the others from running: time on the device is scarce."""
    failed = []
    for name, work in units:
        try:
            budget.check()
            print(f"{budget.spent:4.0f} s: {name}", flush=True)
            work()
        except OutOfTime as e:
            print(f"stopped in {name} ({e}). A second call goes on from here.", flush=True)
            break
        except Exception:
            print(f"FAILED: {name}\n{traceback.format_exc()}", flush=True)
            failed.append(name)
        gc.collect()  # a Learner and its callbacks refer to each other, and hold memory of the device
    return failed
