"Two processes train as one: `accelerate launch` on the CPU (gloo), through fastai's `distrib_ctx`."
import os
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from torch.testing import assert_close

from fmce_fastai.oracle.dataset import FMCSDataset
from fmce_fastai.util.state import unwrap
from fmce_fastai.maps.find import tap_plan
from helpers import TinyNet

WORKER = Path(__file__).with_name("ddp_worker.py")
KINDS = ["fitted", "universal", "memory", "vit fitted", "vit universal"]
FAILURES = {"the folder exists": ("FileExistsError", "already exists and is not empty"), "the disk is full": ("OSError", "could not be written"), "the disk is full at the end": ("OSError", "No space left on device")}


def run(args):
    env = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(args, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]

@pytest.fixture(scope="module")
def fits(tmp_path_factory):
    "Fits in two processes, and the same in one, this."
    folder = tmp_path_factory.mktemp("fits")
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--num_cpu_threads_per_process", "1", "--main_process_port", "0"]
    for mode in ("two", "one"):
        for name in (*KINDS, *FAILURES, "freeze"): (folder/mode/name).mkdir(parents=True)
    run([*launch, str(WORKER), str(folder/"two"), "two"])
    with warnings.catch_warnings():
        import ddp_worker  # it ignores warnings
        ddp_worker.main(folder/"one", "one")
    return folder

@pytest.mark.parametrize("kind", KINDS)
def test_both_processes_end_with_the_weights_of_one(fits, kind):
    "The fitted oracle scores image by image: the whole batch. The universal one reads the images of a process, `memory` those that it had: the mean of two half batches."
    one = torch.load(fits/"one"/kind/"one0.pt", weights_only=True)
    for rank in (0, 1):
        two = torch.load(fits/"two"/kind/f"two{rank}.pt", weights_only=True)
        assert two.keys() == one.keys()
        for k in one: assert_close(two[k], one[k], atol=2e-6, rtol=1e-4)

def test_both_processes_freeze_the_same_front_and_train_the_rest_as_one(fits):
    one = torch.load(fits/"one"/"freeze"/"one0.pt", weights_only=True)
    for rank in (0, 1):
        two = torch.load(fits/"two"/"freeze"/f"two{rank}.pt", weights_only=True)
        for k in one: assert_close(two[k], one[k], atol=2e-6, rtol=1e-4)
    a, b = (pd.read_csv(fits/"two"/"freeze"/f"two{r}.csv") for r in (0, 1))
    assert len(a) and a.equals(b)

def test_the_kinds_of_fit_differ(fits):
    "Else the comparison above would say little."
    a, b, c = (torch.load(fits/"one"/kind/"one0.pt", weights_only=True)["stem.0.weight"] for kind in KINDS[:3])
    assert min((a-b).abs().max(), (b-c).abs().max()) > 1e-4

@pytest.mark.parametrize("kind", KINDS)
def test_logged_scores_are_means_over_the_processes(fits, kind):
    "In `history`, and in the table of the fit."
    a, b = (pd.read_csv(fits/"two"/kind/f"two{r}.csv") for r in (0, 1))
    assert a.equals(b) and (a.acted == a.steps).all()
    columns = ["fmcs_loss", "fmcs", "fmcs_last"]
    tables = [pd.read_csv(fits/"two"/kind/f"two{r}.table.csv") for r in (0, 1)]
    for t in tables:
        assert list(t.columns) == ["train_loss", "valid_loss", *columns] and len(t) == 2
        assert np.allclose(t.fmcs_last, a[a.module == a.module.iloc[-1]].fmcs, atol=1e-6)
    assert tables[0][columns].equals(tables[1][columns])
    if kind.endswith("fitted"):
        one, table = pd.read_csv(fits/"one"/kind/"one0.csv"), pd.read_csv(fits/"one"/kind/"one0.table.csv")
        for c in ("fmcs", "fmcs_loss"): assert np.allclose(a[c], one[c], atol=1e-5)
        assert np.allclose(tables[0][columns], table[columns], atol=1e-5)

@pytest.mark.parametrize("kind", KINDS)
def test_one_data_set_is_recorded_by_both(fits, kind):
    assert (fits/"two"/kind/"two0.recorded").read_text() == "1" and (fits/"two"/kind/"two1.recorded").read_text() == "0"
    two, one = FMCSDataset(fits/"two"/kind/"maps"), FMCSDataset(fits/"one"/kind/"maps")
    assert len(two.steps) == len(one.steps) == 4 and two.snapshots.step.tolist() == one.snapshots.step.tolist()
    assert np.allclose(two.steps.loss, one.steps.loss, atol=1e-5)  # the task loss of the whole batch

@pytest.mark.parametrize("what", FAILURES)
def test_what_goes_wrong_in_one_process_reaches_the_other_in_words(fits, what):
    first, second = ((fits/"two"/what/f"{r}.txt").read_text() for r in (0, 1))
    error, words = FAILURES[what]
    assert first.startswith(error) and words in first
    assert second.startswith("RankError") and f"Process 0 of this fit failed: {error}" in second and words in second

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
