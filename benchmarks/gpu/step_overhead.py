"""Part b: what RAL, RAL with memory and recording cost: time with them over time without.

As `benchmarks/overhead.py`, but in wall time, read when the device has finished: RAL works in every
second step of a fit, and a row compares `PAIRS` steps with it to the `PAIRS` between. A row of
recording compares a fit to the same fit without the time of the recorder's events. A recorder costs
the same in a longer fit, so that ratio holds for its number of steps alone."""
import shutil
import sys
import time
from functools import cache, partial
from pathlib import Path

import torch
from fastai.callback.core import Callback

from device_data import device_dls, DeviceImages, read_fashion_mnist
from fmce_fastai.maps.find import tap_plan
from fmce_fastai.oracle.base import FMCENet
from fmce_fastai.oracle.fitted import FittedFMCENet
from fmce_fastai.train.recorder import FMCSRecorder
from learners import build_learner, quiet

sys.path.append(str(Path(__file__).resolve().parents[1]))
from overhead import AlternatingRAL, PAIRS, WARM

MEMORY = 200  # images in the memory bank
MEASURES = {  # name -> kind of oracle, images in the memory bank
    "RAL step": ("fitted", 0),
    "RAL step, universal oracle": ("universal", 0),
    f"RAL step, universal oracle, memory of {MEMORY} images": ("universal", MEMORY),
}


def now():
    "Seconds, once the device has done what it was given."
    if torch.cuda.is_available(): torch.cuda.synchronize()
    return time.perf_counter()


@cache
def images(root, n, size, bs, device):
    "`n` training images and `bs` to validate, which all measures share."
    train, test = read_fashion_mnist(root)
    return DeviceImages(train, n, size, device), DeviceImages(test, bs, size, device)


class PairClock(Callback):
    "Calls `add` with the seconds of `PAIRS` plain and `PAIRS` RAL steps, as soon as they are done."
    order, run_valid = -100, False
    def __init__(self, add): self.add = add
    def before_train(self): self.times = []
    def before_batch(self): self._tick()
    def after_train(self): self._tick()

    def _tick(self):
        self.times.append(now())
        steps = len(self.times) - 1 - 2*WARM
        if steps > 0 and steps % (2*PAIRS) == 0: self.add(*self._seconds())

    def _seconds(self):
        "Of the last `PAIRS` pairs: plain steps, RAL steps."
        times = torch.tensor(self.times[-2*PAIRS-1:], dtype=torch.float64)
        return times.diff().view(-1, 2).sum(0).tolist()


class TimedRecorder(FMCSRecorder):
    "A recorder that adds up the time its events take."
    spent = 0.
    waits = ("before_train", "before_batch", "after_train", "after_fit")  # they use the device

    def __call__(self, event_name):
        clock = now if event_name in self.waits else time.perf_counter
        start = clock()
        super().__call__(event_name)
        self.spent += clock() - start


class Measures:
    "The measures of one precision."
    def __init__(self, job, precision):
        self.job, self.precision, self.sizes = job, precision, job.sizes["overhead"]
        self.rows = job.rows("overhead", precision)

    def units(self):
        "A (name, function) pair for each measure."
        for what in MEASURES: yield f"{what}, {self.precision}", partial(self.ral, what)
        yield f"recording, {self.precision}", self.recording

    def learner(self, n_steps):
        "A learner whose epoch has `n_steps` steps."
        s = self.sizes
        most = max(s["steps"], 2*(WARM + PAIRS*s["rows"]))
        parts = images(self.job.bundle/"data", most*s["bs"], s["size"], s["bs"], self.job.device)
        dls = device_dls(*parts, s["bs"], n=n_steps*s["bs"])
        return build_learner(self.job, dls, s["arch"], self.precision)

    def add(self, what, setting, plain, with_it):
        "One row."
        s = self.sizes
        seconds = dict(plain_seconds=round(plain, 4), with_seconds=round(with_it, 4))
        result = dict(what=what, setting=setting, **seconds, ratio=round(with_it/plain, 4))
        common = dict(arch=s["arch"], size=s["size"], bs=s["bs"])
        self.rows.add(result | common | self.job.conditions(self.precision))

    def oracle(self, kind, learn):
        "The universal oracle, or one of the fitted kind: random weights cost what fitted ones do."
        if kind == "universal": return FMCENet.universal()
        return FittedFMCENet(tap_plan(learn.model, size=self.sizes["size"])).freeze()

    def ral(self, what):
        "The rows of a RAL step that are missing."
        missing = self.sizes["rows"] - len(self.rows.matching(what=what))
        if missing <= 0: return
        kind, memory = MEASURES[what]
        learn = self.learner(2*(WARM + PAIRS*missing))
        ral = AlternatingRAL(alpha=.9, oracle=self.oracle(kind, learn), memory=memory)
        def add(plain, with_it):
            if any(s.plain for s in ral.epoch_steps[-PAIRS:]): raise RuntimeError("RAL missed steps.")
            self.add(what, f"{PAIRS} steps each, in turn", plain, with_it)
        with quiet(learn): learn.fit(1, 1e-3, cbs=[PairClock(add), ral])

    def recording(self):
        "The row of a recorded fit, if it is missing."
        if self.rows.matching(what="recording"): return
        s, folder = self.sizes, self.job.state/"recording"
        shutil.rmtree(folder, ignore_errors=True)  # of a call that was stopped
        learn = self.learner(s["steps"])
        with quiet(learn): learn.fit(1, 1e-3)  # warms up
        recorder = TimedRecorder(n_images=s["n_images"], n_snapshots=s["n_snapshots"], path=folder)
        start = now()
        with quiet(learn): learn.fit(1, 1e-3, cbs=recorder)
        total = now() - start
        shutil.rmtree(folder)
        setting = f"{s['n_images']} images at {s['n_snapshots']} snapshots in {s['steps']} steps"
        self.add("recording", setting, total - recorder.spent, total)


def units(job):
    "A (name, function) pair for each measure in each precision."
    for precision in job.sizes["precisions"]: yield from Measures(job, precision).units()
