"""What recording costs in stage 1, what a RAL step costs over a plain one, and what taps alone cost, as ratios.

    python benchmarks/overhead.py --root /usr/share/datasets/fashion-mnist

Recording: the time spent in the recorder's events during a fit (reading the sample, snapshots, writing, labelling), over the rest of that fit; snapshots and steps alternate, so a
machine that slows down slows both. RAL: the same learner's steps with and without `FMCECallback`, in blocks that alternate. Taps: the time spent in arming, in the hooks and in taking the maps, over the rest of the
steps; nothing is done with the maps. timm `resnet18`, 64x64 pixels, batch 64.
"""
import csv
import platform
import statistics
import time
import warnings
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
from fmce_fastai.train.callback import FMCECallback
from fmce_fastai.data.torchvision import fashion_mnist_dls
from fmce_fastai.oracle.base import FMCENet
from fmce_fastai.oracle.fitted import FittedFMCENet
from fmce_fastai.train.recorder import FMCSRecorder
from fmce_fastai.maps.tap import FeatureTap
from fmce_fastai.maps.find import tap_plan

HERE = Path(__file__).parent


class TimedRecorder(FMCSRecorder):
    "A recorder that adds up the time it takes."
    spent = 0.0
    def __call__(self, event_name):
        start = time.perf_counter()
        super().__call__(event_name)
        self.spent += time.perf_counter() - start


def recording_seconds(root, n_train, epochs):
    "Seconds of one recorded fit from scratch without and with what the recorder took."
    set_seed(0)
    recorder = TimedRecorder()
    learn = vision_learner(fashion_mnist_dls(size=64, bs=64, n_train=n_train, root=root, device="cpu"), "resnet18", pretrained=False, cbs=recorder)
    learn.dls.loaders[1] = learn.dls.valid.new(n=64)  # validation is no part of the comparison
    with learn.no_bar(), learn.no_logging():
        start = time.perf_counter()
        learn.fit_one_cycle(epochs, 3e-3)
        total = time.perf_counter() - start
    return total - recorder.spent, total


class StepClock(Callback):
    "Time from the start of the first training step to the end of the last: neither set-up nor validation."
    order, run_valid = -100, False
    def before_train(self): self.start = None
    def before_batch(self): self.start = self.start or time.perf_counter()
    def after_train(self): self.seconds = time.perf_counter() - self.start


def step_seconds(root, blocks, steps, universal=False, memory=0):
    "Wall times of blocks of training steps, plain and with RAL by a fitted or the universal oracle in turn: two lists."
    set_seed(0)
    dls = fashion_mnist_dls(size=64, bs=64, n_train=64 * steps, root=root, device="cpu")
    learn = vision_learner(dls, "resnet18", pretrained=False)
    learn.dls.loaders[1] = learn.dls.valid.new(n=64)
    oracle = FMCENet.universal() if universal else FittedFMCENet(tap_plan(learn.model)).freeze()
    times, clock = {"plain": [], "ral": []}, StepClock()
    with learn.no_bar(), learn.no_logging():
        for block in range(blocks + 1):
            for arm in ("plain", "ral") if block % 2 else ("ral", "plain"):
                learn.fit(1, 1e-3, cbs=[clock, FMCECallback(alpha=0.9, oracle=oracle, memory=memory)] if arm == "ral" else clock)
                if block: times[arm].append(clock.seconds)  # the first block warms up
    return times["plain"], times["ral"]


class TimedTap(FeatureTap):
    "A tap that adds up the time it takes."
    spent = 0.0
    def _timed(self, f, *args):
        start = time.perf_counter()
        try: return f(*args)
        finally: self.spent += time.perf_counter() - start
    def arm(self, model): return self._timed(super().arm, model)
    def take(self): return self._timed(super().take)
    def _begin(self, *args): return self._timed(super()._begin, *args)
    def _done(self, *args): return self._timed(super()._done, *args)
    def _reader(self, tap):
        hook = super()._reader(tap)
        return lambda *args: self._timed(hook, *args)


class TapEachStep(Callback):
    "Reads every map of every training step, and lets go of them."
    run_valid = False
    def __init__(self, tap): self.tap = tap
    def before_batch(self): self.tap.arm(self.model)
    def after_loss(self): self.tap.take()


def tap_seconds(root, steps):
    "Seconds of one block of steps without and with what the taps took."
    set_seed(0)
    learn = vision_learner(fashion_mnist_dls(size=64, bs=64, n_train=64 * steps, root=root, device="cpu"), "resnet18", pretrained=False)
    learn.dls.loaders[1] = learn.dls.valid.new(n=64)
    tap, clock = TimedTap(tap_plan(learn.model)), StepClock()
    with learn.no_bar(), learn.no_logging():
        learn.fit(1, 1e-3, cbs=[TapEachStep(tap)])  # warms up
        tap.spent = 0.0
        learn.fit(1, 1e-3, cbs=[clock, TapEachStep(tap)])
    return clock.seconds - tap.spent, clock.seconds


@call_parse
def main(
    root: str = "/usr/share/datasets/fashion-mnist",  # Folder with FashionMNIST's IDX files
    fits: int = 1,  # Recorded stage-1 fits; 0 for none
    n_train: int = 10_000,  # Training images of stage 1
    epochs: int = 5,  # Epochs of stage 1
    blocks: int = 6,  # Pairs of blocks of steps, with a fitted oracle; 0 for none
    universal: int = 6,  # The same with the universal oracle
    memory: int = 3,  # The same with a memory of 200 images
    taps: int = 4,  # Blocks of steps with taps alone; 0 for none
    steps: int = 16,  # Steps in a block
    threads: int = 1,  # Torch threads
    out: str = str(HERE),  # Folder for the CSV files, one per measure
):
    "Measure the cost of recording and of a RAL step, as ratios, and write a CSV"
    warnings.simplefilter("ignore")
    torch.set_num_threads(threads)
    where = f"cpu_float32_torch{torch.__version__.split('+')[0]}.csv"
    common = dict(arch="resnet18", size=64, bs=64, threads=threads, torch=torch.__version__, timm=timm.__version__, fmce_fastai=__version__, python=platform.python_version())
    rows = []

    def add(what, setting, a, b):
        rows.append(dict(what=what, setting=setting, plain_seconds=round(a, 3), with_seconds=round(b, 3), ratio=round(b / a, 4)) | common)
        print(rows[-1], flush=True)
        mine = [r for r in rows if r["what"] == what]
        with (Path(out) / f"overhead_{what.replace(',', '').replace(' ', '_')}_{where}").open("w", newline="") as f:
            writer = csv.DictWriter(f, rows[0])
            writer.writeheader()
            writer.writerows(mine)

    if blocks:
        for a, b in zip(*step_seconds(root, blocks, steps)): add("RAL step", f"{steps} steps a block", a, b)
    if universal:
        for a, b in zip(*step_seconds(root, universal, steps, True)): add("RAL step, universal oracle", f"{steps} steps a block", a, b)
    if memory:
        for a, b in zip(*step_seconds(root, memory, steps, True, 200)): add("RAL step, universal oracle, memory of 200 images", f"{steps} steps a block", a, b)
    for _ in range(taps): add("taps alone", f"{steps} steps a block", *tap_seconds(root, steps))
    for _ in range(fits): add("recording", f"{n_train} images, {epochs} epochs, 256 images at 16 snapshots", *recording_seconds(root, n_train, epochs))
    for what in dict.fromkeys(r["what"] for r in rows): print(what, "median ratio", statistics.median(r["ratio"] for r in rows if r["what"] == what))
