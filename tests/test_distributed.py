"Two processes train as one: `accelerate launch` on the CPU (gloo), through fastai's `distrib_ctx`."
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from torch.testing import assert_close

from fmce_fastai.recorder import FMCSDataset
from fmce_fastai.taps import tap_plan, unwrap
from helpers import TinyNet

WORKER = Path(__file__).with_name("ddp_worker.py")


def run(args):
    env = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(args, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]

@pytest.fixture(scope="module", params=["fitted", "universal"])
def fits(request, tmp_path_factory):
    "A fit in two processes, and the same in one."
    kind, folder = request.param, tmp_path_factory.mktemp(request.param)
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--num_cpu_threads_per_process", "1", "--main_process_port", "0"]
    for mode in ("ddp", "whole" if kind == "fitted" else "halves"):
        (folder/mode).mkdir()
        run([*(launch if mode == "ddp" else [sys.executable]), str(WORKER), str(folder/mode), kind, mode])
    return kind, folder

def test_both_processes_end_with_the_weights_of_one(fits):
    "The fitted oracle scores image by image: the whole batch. The universal one reads the images of a process: the mean of two half batches."
    kind, folder = fits
    one = torch.load(next((folder/("whole" if kind == "fitted" else "halves")).glob("*.pt")), weights_only=True)
    for rank in (0, 1):
        two = torch.load(folder/"ddp"/f"ddp{rank}.pt", weights_only=True)
        assert two.keys() == one.keys()
        for k in one: assert_close(two[k], one[k], atol=2e-6, rtol=1e-4)

def test_logged_scores_are_means_over_the_processes(fits):
    kind, folder = fits
    a, b = (pd.read_csv(folder/"ddp"/f"ddp{r}.csv") for r in (0, 1))
    assert a.equals(b) and (a.acted == a.steps).all()
    if kind == "fitted":
        one = pd.read_csv(folder/"whole"/"whole0.csv")
        for c in ("fmcs", "fmcs_loss"): assert np.allclose(a[c], one[c], atol=1e-5)

def test_one_data_set_is_recorded_by_both(fits):
    kind, folder = fits
    assert (folder/"ddp"/"ddp0.recorded").read_text() == "1" and (folder/"ddp"/"ddp1.recorded").read_text() == "0"
    two, one = FMCSDataset(folder/"ddp"/"maps"), FMCSDataset(folder/("whole" if kind == "fitted" else "halves")/"maps")
    assert len(two.steps) == len(one.steps) == 4 and two.snapshots.step.tolist() == one.snapshots.step.tolist()
    if kind == "fitted": assert np.allclose(two.steps.loss, one.steps.loss, atol=1e-5)  # the task loss of the whole batch

def test_sync_batch_norm_keeps_the_taps():
    "By structure: it needs a GPU to run."
    model = TinyNet()
    plan = tap_plan(model, size=16)
    converted = torch.nn.SyncBatchNorm.convert_sync_batchnorm(model)
    assert any(isinstance(m, torch.nn.SyncBatchNorm) for m in converted.modules())
    alive = {id(m) for m in converted.modules()}
    assert len(plan) == 3 and all(id(m) in alive for m in plan.resolve(converted).values())

class Wrapped(torch.nn.parallel.DistributedDataParallel):
    "As the wrapper is seen from outside, without a process group."
    def __init__(self, module): torch.nn.Module.__init__(self); self.module = module

def test_the_wrappers_names_play_no_role():
    model = TinyNet()
    plan = tap_plan(model, size=16)
    assert unwrap(Wrapped(model)) is model and list(plan.resolve(Wrapped(model))) == plan.names
