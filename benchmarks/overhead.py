"""What recording costs in stage 1, and what a RAL step costs over a plain one, as ratios.

    python benchmarks/overhead.py --root /usr/share/datasets/fashion-mnist

Recording: whole fits with and without `FMCSRecorder`, in turn. RAL: the same learner's steps with and without `FMCECallback`, in blocks that alternate.
Ratios are taken between neighbours in one run, because a machine's speed drifts. timm `resnet18`, 64x64 pixels, batch 64.
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
from fmce_fastai.callback import FMCECallback
from fmce_fastai.data import fashion_mnist_dls
from fmce_fastai.oracle import FittedFMCENet
from fmce_fastai.recorder import FMCSRecorder
from fmce_fastai.taps import tap_plan

HERE = Path(__file__).parent


def fit_seconds(root, n_train, epochs, cbs):
    "Wall time of one fit from scratch."
    set_seed(0)
    learn = vision_learner(fashion_mnist_dls(size=64, bs=64, n_train=n_train, root=root, device="cpu"), "resnet18", pretrained=False, cbs=cbs)
    learn.dls.loaders[1] = learn.dls.valid.new(n=64)  # validation is no part of the comparison
    with learn.no_bar(), learn.no_logging():
        start = time.perf_counter()
        learn.fit_one_cycle(epochs, 3e-3)
        return time.perf_counter() - start


class StepClock(Callback):
    "Time from the start of the first training step to the end of the last: neither set-up nor validation."
    order, run_valid = -100, False
    def before_train(self): self.start = None
    def before_batch(self): self.start = self.start or time.perf_counter()
    def after_train(self): self.seconds = time.perf_counter() - self.start


def step_seconds(root, blocks, steps):
    "Wall times of blocks of training steps, plain and with RAL in turn: two lists."
    set_seed(0)
    dls = fashion_mnist_dls(size=64, bs=64, n_train=64 * steps, root=root, device="cpu")
    learn = vision_learner(dls, "resnet18", pretrained=False)
    learn.dls.loaders[1] = learn.dls.valid.new(n=64)
    oracle = FittedFMCENet(tap_plan(learn.model)).freeze()
    times, clock = {"plain": [], "ral": []}, StepClock()
    with learn.no_bar(), learn.no_logging():
        for block in range(blocks + 1):
            for arm in ("plain", "ral") if block % 2 else ("ral", "plain"):
                learn.fit(1, 1e-3, cbs=[clock, FMCECallback(alpha=0.9, oracle=oracle)] if arm == "ral" else clock)
                if block: times[arm].append(clock.seconds)  # the first block warms up
    return times["plain"], times["ral"]


@call_parse
def main(
    root: str = "/usr/share/datasets/fashion-mnist",  # Folder with FashionMNIST's IDX files
    pairs: int = 2,  # Pairs of stage-1 fits
    n_train: int = 10_000,  # Training images of stage 1
    epochs: int = 5,  # Epochs of stage 1
    blocks: int = 6,  # Pairs of blocks of steps; 0 for none
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
        with (Path(out) / f"overhead_{what.replace(' ', '_')}_{where}").open("w", newline="") as f:
            writer = csv.DictWriter(f, rows[0])
            writer.writeheader()
            writer.writerows(mine)

    if blocks:
        for a, b in zip(*step_seconds(root, blocks, steps)): add("RAL step", f"{steps} steps a block", a, b)
    for i in range(pairs):
        order = [None, FMCSRecorder()] if i % 2 == 0 else [FMCSRecorder(), None]
        took = {cbs is None: fit_seconds(root, n_train, epochs, cbs) for cbs in order}
        add("recording", f"{n_train} images, {epochs} epochs, 256 images at 16 snapshots", took[True], took[False])
    for what in dict.fromkeys(r["what"] for r in rows): print(what, "median ratio", statistics.median(r["ratio"] for r in rows if r["what"] == what))
