"""What recording, a RAL step and taps alone cost: CPU time with them over CPU time without.

    python benchmarks/overhead.py --root /usr/share/datasets/fashion-mnist

RAL: one fit in which `FMCECallback` works in every second step and does nothing in the others. A row
compares 8 steps with it (one of them measures gradient norms, as every 8th does) to the 8 steps between.
Check of freezing: the same with `FMCSFreeze`, which looks at the modules in every second step and freezes nothing. It
looks at most in every fourth step by itself, so of what such a step takes longer at most a quarter counts.
Recording: the time spent in the recorder's events during a fit (reading the sample, snapshots, writing,
labelling), over the rest of that fit. Taps: the time spent in arming, in the hooks and in taking the maps,
over the rest of the steps; nothing is done with the maps.

Times are CPU times of the process, and steps that are compared follow each other: other work on the
machine slows both down. timm `resnet18`, 64x64 pixels, batch 64.
"""
import csv
import platform
import statistics
import time
import warnings
from functools import partial
from pathlib import Path

import timm
import torch
from fastai.callback.core import Callback
from fastai.torch_core import set_seed
from fastai.vision.learner import vision_learner
from fastcore.script import call_parse

import fastai.callback.progress
import fastai.callback.schedule
from fmce_fastai import __version__
from fmce_fastai.data.torchvision import fashion_mnist_dls
from fmce_fastai.maps.find import tap_plan
from fmce_fastai.maps.tap import FeatureTap
from fmce_fastai.oracle.base import as_oracle
from fmce_fastai.oracle.fitted import FittedFMCENet
from fmce_fastai.train.callback import FMCECallback
from fmce_fastai.train.freeze import FMCSFreeze
from fmce_fastai.train.recorder import FMCSRecorder

HERE = Path(__file__).parent
PAIRS = 8  # of a plain and a RAL step, behind a row
WARM = 4  # pairs before the first row: probing, allocation, the memory bank fills


def resnet_learner(root, n_train, cbs=None):
    "A learner on `n_train` images of FashionMNIST, with next to no validation."
    set_seed(0)
    dls = fashion_mnist_dls(size=64, bs=64, n_train=n_train, root=root, device="cpu")
    learn = vision_learner(dls, "resnet18", pretrained=False, cbs=cbs)
    learn.dls.loaders[1] = learn.dls.valid.new(n=64)  # validation is no part of the comparison
    return learn


class StepClock(Callback):
    "CPU seconds from each training step to the next."
    order, run_valid = -100, False
    def before_train(self): self.times = []
    def before_batch(self): self.times.append(time.process_time())
    def after_train(self): self.times.append(time.process_time())
    @property
    def seconds(self): return [b - a for a, b in zip(self.times, self.times[1:])]
    def rows(self):
        "Seconds of `PAIRS` even steps and of the odd steps between, for each row; the first `WARM` pairs are left out."
        return torch.tensor(self.seconds).view(-1, 2)[WARM:].view(-1, PAIRS, 2).sum(1).tolist()


class AlternatingRAL(FMCECallback):
    "RAL in every second step; in the others, nothing is read, scored or added."
    @property
    def is_on(self): return self.iter % 2 == 1
    def arm_tap(self):
        if self.is_on: super().arm_tap()
    def after_loss(self):
        if self.is_on: super().after_loss()


def step_seconds(root, n_rows, kind="", memory=0):
    "Pairs of CPU seconds, of `PAIRS` plain and RAL steps; RAL by a fitted oracle, or by one of the given kind."
    n_pairs = WARM + PAIRS * n_rows
    learn, clock = resnet_learner(root, 64 * 2 * n_pairs), StepClock()
    oracle = as_oracle(kind) if kind else FittedFMCENet(tap_plan(learn.model)).freeze()
    ral = AlternatingRAL(alpha=0.9, oracle=oracle, memory=memory)
    with learn.no_bar(), learn.no_logging(): learn.fit(1, 1e-3, cbs=[clock, ral])
    if (ral.history.acted != n_pairs).any(): raise SystemExit(f"RAL missed steps:\n{ral.history}")
    return clock.rows()


def check_seconds(root, n_rows, oracle):
    "Pairs of CPU seconds, of `PAIRS` plain steps and of as many in which `FMCSFreeze` looks at the modules."
    n_pairs = WARM + PAIRS * n_rows
    learn, clock, freeze = resnet_learner(root, 64 * 2 * n_pairs), StepClock(), FMCSFreeze(oracle, start=1.0, every=2)
    with learn.no_bar(), learn.no_logging(): learn.fit(1, 1e-3, cbs=[clock, freeze])
    if freeze.curve.groupby("module").size().min() != n_pairs: raise SystemExit(f"Checks were missed:\n{freeze.curve}")
    return clock.rows()


class TimedTap(FeatureTap):
    "A tap that adds up the CPU time it takes."
    spent = 0.0
    def _timed(self, f, *args):
        start = time.process_time()
        try: return f(*args)
        finally: self.spent += time.process_time() - start
    def arm(self, model): return self._timed(super().arm, model)
    def take(self): return self._timed(super().take)
    def _begin(self, *args): return self._timed(super()._begin, *args)
    def _read(self, *args): return self._timed(super()._read, *args)
    def _done(self, *args): return self._timed(super()._done, *args)


class TapEachStep(Callback):
    "Reads every map of every training step, and lets go of them."
    run_valid = False
    def __init__(self, tap): self.tap = tap
    def before_batch(self): self.tap.arm(self.model)
    def after_loss(self): self.tap.take()


def tap_seconds(root, steps):
    "CPU seconds of a block of steps without and with what the taps took."
    learn = resnet_learner(root, 64 * steps)
    tap, clock = TimedTap(tap_plan(learn.model)), StepClock()
    with learn.no_bar(), learn.no_logging():
        learn.fit(1, 1e-3, cbs=[TapEachStep(tap)])  # warms up
        tap.spent = 0.0
        learn.fit(1, 1e-3, cbs=[clock, TapEachStep(tap)])
    total = sum(clock.seconds)
    return total - tap.spent, total


class TimedRecorder(FMCSRecorder):
    "A recorder that adds up the CPU time it takes."
    spent = 0.0
    def __call__(self, event_name):
        start = time.process_time()
        super().__call__(event_name)
        self.spent += time.process_time() - start


def recording_seconds(root, n_train, epochs):
    "CPU seconds of one recorded fit from scratch without and with what the recorder took."
    recorder = TimedRecorder()
    learn = resnet_learner(root, n_train, recorder)
    with learn.no_bar(), learn.no_logging():
        start = time.process_time()
        learn.fit_one_cycle(epochs, 3e-3)
        total = time.process_time() - start
    return total - recorder.spent, total


def csv_path(folder, what):
    "The file of a measure; its name holds the conditions."
    conditions = f"cpu_float32_torch{torch.__version__.split('+')[0]}"
    return Path(folder) / f"overhead_{what.replace(',', '').replace(' ', '_')}_{conditions}.csv"


class Table:
    "The rows of a measure, printed and written as they come."
    def __init__(self, what, setting, out, threads):
        self.what, self.path, self.rows = what, csv_path(out, what), []
        self.first = dict(what=what, setting=setting)
        self.common = dict(arch="resnet18", size=64, bs=64, threads=threads, torch=torch.__version__,
                           timm=timm.__version__, fmce_fastai=__version__, python=platform.python_version())

    def add(self, plain, with_it):
        seconds = dict(plain_seconds=round(plain, 3), with_seconds=round(with_it, 3))
        self.rows.append({**self.first, **seconds, "ratio": round(with_it / plain, 4), **self.common})
        with self.path.open("w", newline="") as f:
            writer = csv.DictWriter(f, self.rows[0])
            writer.writeheader()
            writer.writerows(self.rows)

    def report(self):
        ratios = sorted(r["ratio"] for r in self.rows)
        low, high = ratios[len(ratios) // 4], ratios[-1 - len(ratios) // 4]
        print(f"{self.what}: median ratio {statistics.median(ratios):.4f}, middle half {low:.4f} to "
              f"{high:.4f}, all {ratios[0]:.4f} to {ratios[-1]:.4f}, {len(ratios)} rows", flush=True)


@call_parse
def main(
    root: str = "/usr/share/datasets/fashion-mnist",  # Folder with FashionMNIST's IDX files
    fits: int = 1,  # Recorded stage-1 fits; 0 for none
    n_train: int = 10_000,  # Training images of stage 1
    epochs: int = 5,  # Epochs of stage 1
    fitted: int = 12,  # Rows of RAL with a fitted oracle; 0 for none
    universal: int = 12,  # The same with the universal oracle
    memory: int = 12,  # The same with a memory of 200 images
    others: int = 6,  # The same two with the ridge, the quality and the alignment oracle
    checks: int = 12,  # The same of a check of FMCSFreeze; 0 for none
    taps: int = 4,  # Blocks of steps with taps alone; 0 for none
    steps: int = 16,  # Steps of such a block
    threads: int = 1,  # Torch threads
    out: str = str(HERE),  # Folder for the CSV files, one per measure
):
    "Measure the cost of recording, of a RAL step, of a check of FMCSFreeze and of taps, as ratios, and write a CSV for each"
    warnings.simplefilter("ignore")
    torch.set_num_threads(threads)
    turns = f"{PAIRS} steps each, in turn, CPU time"
    recorded = f"{n_train} images, {epochs} epochs, 256 images at 16 snapshots, CPU time"
    measures = [
        ("RAL step", turns, fitted, lambda: step_seconds(root, fitted)),
        ("RAL step, universal oracle", turns, universal, lambda: step_seconds(root, universal, "universal")),
        ("RAL step, universal oracle, memory of 200 images", turns, memory,
         lambda: step_seconds(root, memory, "universal", 200)),
        *(measure for kind in ("ridge", "quality", "alignment") for measure in (
            (f"RAL step, {kind} oracle", turns, others, partial(step_seconds, root, others, kind)),
            (f"RAL step, {kind} oracle, memory of 200 images", turns, others,
             partial(step_seconds, root, others, kind, 200)))),
        *((f"check of freezing, {kind} oracle", turns, checks, partial(check_seconds, root, checks, kind))
          for kind in ("ridge", "alignment", "universal")),
        ("taps alone", f"{steps} steps, CPU time", taps,
         lambda: (tap_seconds(root, steps) for _ in range(taps))),
        ("recording", recorded, fits, lambda: (recording_seconds(root, n_train, epochs) for _ in range(fits))),
    ]
    for what, setting, rows, measure in measures:
        if not rows: continue
        table = Table(what, setting, out, threads)
        for pair in measure(): table.add(*pair)
        table.report()
