"""Part c: the FashionMNIST cells of the source's table, fine-tuned plainly and with RAL of two kinds.

For each seed and network: stage 1 trains and records, stage 2 fits the oracle, stage 3 fine-tunes from
stage 1's weights in three arms with the same batches and random numbers: `plain`, `ral` (fitted
oracle) and `universal`. A row is an arm. Weights and oracle stay in the folder `state`, so that arms
that are missing start from the same weights in a second call."""
import shutil
import time
from functools import cached_property, partial

from fastai.optimizer import OptimWrapper
from fastai.torch_core import set_seed
from safetensors.torch import load_file, save_file
from torch.optim import AdamW

from bundle import ROOT
from device_data import device_dls, DeviceImages, read_fashion_mnist
from fmce_fastai.oracle.base import FMCENet
from fmce_fastai.oracle.files import tensors_sha256
from fmce_fastai.oracle.fit import fit_oracle
from fmce_fastai.train.callback import FMCECallback
from fmce_fastai.train.recorder import FMCSRecorder
from fmce_fastai.util.files import read_json, write_json
from learners import build_learner, Deadline, quiet

ARMS = ("plain", "ral", "universal")
# It has seen no FashionMNIST; the one in the package has
UNIVERSAL = ROOT/"benchmarks"/"oracles"/"universal_without_fashion.safetensors"


class Data:
    "The images, read when they are first needed and kept on the device."
    def __init__(self, job): self.job, self.run = job, job.sizes["run"]

    @cached_property
    def images(self):
        "`DeviceImages` to train on and to test on."
        parts = read_fashion_mnist(self.job.bundle/"data")
        numbers, size = (self.run["n_train"], self.run["n_test"]), self.run["size"]
        return [DeviceImages(p, n, size, self.job.device) for p, n in zip(parts, numbers)]

    def loaders(self, seed):
        "New loaders: the same batches in the same order for the same seed."
        return device_dls(*self.images, self.run["bs"], seed)


def acted_steps(cbs):
    "Steps in which RAL acted."
    if not cbs: return 0
    history = cbs[0].history
    return int(history[history.module == history.module.iloc[-1]].acted.sum())


class Cell:
    "One network and seed."
    def __init__(self, job, data, arch, seed):
        self.job, self.data, self.arch, self.seed, self.run = job, data, arch, seed, job.sizes["run"]
        self.rows = job.rows("fashion_cells", "float32")
        self.folder = job.state/f"{self.rows.path.stem}_{arch}_{seed}"

    @property
    def missing(self):
        "The arms without a row."
        return [a for a in ARMS if not self.rows.matching(arch=self.arch, seed=self.seed, arm=a)]

    @property
    def is_started(self): return (self.folder/"stage1.json").exists()

    def units(self):
        "A (name, function) pair for the stages that are to be done."
        where = f"{self.arch}, seed {self.seed}"
        if self.missing and not self.is_started:
            if len(self.missing) < len(ARMS): return print(f"{where} stays incomplete: its start is gone")
            yield f"stages 1 and 2 of {where}", self.start
            if not self.is_started: return
        for arm in self.missing: yield f"{arm} of {where}", partial(self.fine_tune, arm)

    def learner(self):
        # One launch for all weights: fastai's own optimiser takes a dozen for each
        optimiser = partial(OptimWrapper, opt=AdamW)
        dls = self.data.loaders(self.seed)
        return build_learner(self.job, dls, self.arch, seed=self.seed, opt_func=optimiser)

    def accuracy(self, learn):
        "On the test images."
        with quiet(learn): return round(float(learn.validate(dl=learn.dls.loaders[2])[1]), 4)

    def check_time(self, column, **key):
        "Raise `OutOfTime` if what earlier rows took is more than is left."
        self.job.budget.check(self.rows.longest(column, arch=self.arch, **key), "by earlier rows")

    def start(self):
        "Stages 1 and 2: weights and oracle in `folder`, what became of them in its `stage1.json`."
        self.check_time("seconds_start")
        shutil.rmtree(self.folder, ignore_errors=True)  # of a call that was stopped
        begin, learn = time.perf_counter(), self.learner()
        recorder = FMCSRecorder(self.run["n_images"], self.run["n_snapshots"], seed=self.seed,
                                path=self.folder/"fmcs_dataset")
        with quiet(learn): learn.fit_one_cycle(self.run["epochs"], self.run["lr"], cbs=recorder)
        facts = self.fit_oracle(recorder.dataset) | dict(accuracy_before=self.accuracy(learn))
        weights = {k: v.detach().cpu().contiguous() for k, v in learn.model.state_dict().items()}
        save_file(weights, self.folder/"stage1.safetensors")
        shutil.rmtree(self.folder/"fmcs_dataset")
        seconds = round(time.perf_counter() - begin, 1)
        facts |= dict(start=tensors_sha256(weights)[:12], seconds_start=seconds)
        write_json(self.folder/"stage1.json", facts)

    def fit_oracle(self, dataset):
        "Stage 2; what rows say of the run, and of the oracle on images held out from its fitting."
        oracle = fit_oracle(dataset, self.run["oracle_epochs"], seed=self.seed,
                            device=self.job.device, bar=False, cbs=Deadline(self.job.budget))
        oracle.save(self.folder/"oracle.safetensors")
        last = next(s for s in reversed(oracle.card["scores"]) if s["mode"] == "train")
        return dict(run=dataset.convergence().status, oracle_mae=round(last["mae"], 4),
                    oracle_rho=round(last["rho"], 4))

    def oracle(self, arm):
        "The frozen oracle of a RAL arm."
        return FMCENet.load(self.folder/"oracle.safetensors" if arm == "ral" else UNIVERSAL)

    def fine_tune(self, arm):
        "Stage 3 in one arm, and its row."
        self.check_time("seconds", arm=arm)
        begin, learn = time.perf_counter(), self.learner()
        learn.model.load_state_dict(load_file(self.folder/"stage1.safetensors"))
        cbs = [] if arm == "plain" else [FMCECallback(self.run["alpha"], self.oracle(arm))]
        set_seed(self.seed + 1)  # all arms have the same dropout masks
        with quiet(learn): learn.fit_one_cycle(self.run["ral_epochs"], self.run["ral_lr"], cbs=cbs)
        result = dict(arch=self.arch, seed=self.seed, arm=arm, accuracy=self.accuracy(learn))
        steps = dict(acted=acted_steps(cbs), steps=self.run["ral_epochs"]*len(learn.dls.train))
        seconds = dict(seconds=round(time.perf_counter() - begin, 1))
        facts = read_json(self.folder/"stage1.json")
        self.rows.add(result | facts | steps | seconds | self.run | self.job.conditions("float32"))


def units(job):
    "(name, function) pairs of all that has no row yet: every network, then the next seed."
    data = Data(job)
    for seed in range(job.seeds):
        for arch in job.sizes["cells"]: yield from Cell(job, data, arch, seed).units()
