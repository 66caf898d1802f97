"Fits in one of two processes, or in one with both halves of every batch: `test_distributed.py` compares them. Arguments: folder, `two` or `one`."
import errno
import faulthandler
import os
import sys
import warnings
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from fastai.basics import Learner
from fastai.callback.core import Callback
from fastai.data.core import DataLoaders, TfmdDL
from fastai.distributed import DistributedDL
from fastai.losses import CrossEntropyLossFlat
from fastai.optimizer import SGD
from fastai.torch_core import num_distrib, rank_distrib

from fmce_fastai.train.callback import FMCECallback
from fmce_fastai.train.freeze import FMCSFreeze
from fmce_fastai.train.losses import fmcs_loss
from fmce_fastai.oracle.base import FMCENet, Scores
from fmce_fastai.train.recorder import FMCSRecorder
from fmce_fastai.util.state import hook_count
from fmce_fastai.maps.pool import pool_map
from fmce_fastai.maps.tap import FeatureTap
from fmce_fastai.maps.find import tap_plan
from helpers import TinyNet, make_model, make_oracle, seed_all

warnings.filterwarnings("ignore")
N, BS, EPOCHS, MEMORY = 64, 16, 2, 24  # of one process


def on_cpu(self, t, rank):
    "fastai sends the order of the images by way of the GPU."
    t = torch.LongTensor(t)
    torch.distributed.broadcast(t, rank)
    return t.tolist()

class Halves(Callback):
    "What two processes do, in one: the loss is the mean of the losses of the batch's halves, each with its FMCS loss, and each with a memory bank of its own."
    order, run_valid = FMCECallback.order + .1, False
    def __init__(self, alpha, oracle, plan, memory=0):
        self.alpha, self.oracle, self.plan, self.memory, self.kept = alpha, oracle.on(plan.subset(plan.names[-2:])), plan.subset(plan.names[-2:]), memory, [None, None]
    def before_batch(self): self.x2, self.y2 = self.xb[0].chunk(2), self.yb[0].chunk(2)
    def after_loss(self):
        total = 0.
        for i, (x, y) in enumerate(zip(self.x2, self.y2)):
            tap = FeatureTap(self.plan).arm(self.model)
            task, n = self.loss_func(self.model(x), y), len(x)
            maps = {k: pool_map(m) for k, m in tap.take().items()}
            if self.kept[i]: maps, y = {k: torch.cat([m, self.kept[i][0][k]]) for k, m in maps.items()}, torch.cat([y, self.kept[i][1]])
            if self.memory: self.kept[i] = {k: m.detach()[:self.memory] for k, m in maps.items()}, y[:self.memory]
            aux = fmcs_loss(Scores(*(s[:n] for s in self.oracle(maps, y)))).value
            total = total + ((1-self.alpha)*task + self.alpha*aux)/2
        self.learn.loss_grad = total

def learner(mode, vit=False):
    seed_all(0)
    x, y = torch.randn(N, 3, 16, 16), torch.arange(N) % 4
    size, order = BS, list(range(N))
    if mode == "one":  # the batches that two processes see together
        size = 2*BS
        order = [i for b in range(0, N//2, BS) for half in (0, N//2) for i in range(half+b, half+b+BS)]
    items = list(zip(x[order], y[order]))
    dls = DataLoaders(TfmdDL(items, bs=size, shuffle=False, num_workers=0), TfmdDL(items, bs=size, num_workers=0), device="cpu")
    seed_all(1)
    model = make_model("vit") if vit else TinyNet(dropout=0.)
    for stage, c in () if vit else ((model.stem, 8), (model.stage1, 12), (model.stage2, 16)): stage[1] = torch.nn.GroupNorm(4, c)  # no batch statistics
    return Learner(dls, model, loss_func=CrossEntropyLossFlat(), opt_func=SGD, lr=.1)

def fit(learn):
    with learn.no_bar(), learn.no_logging():
        if num_distrib():
            with learn.distrib_ctx(sync_bn=False, cpu=True): learn.fit(EPOCHS)
        else: learn.fit(EPOCHS)

def compared(folder, kind, mode):
    "A fit with callback and recorder; weights, history and the table of the fit."
    vit, kind = kind.startswith("vit"), kind.removeprefix("vit ")
    learn, recorder = learner(mode, vit), FMCSRecorder(n_images=32, n_snapshots=6, path=folder/"maps")
    oracle, memory = make_oracle(learn.model) if kind == "fitted" else FMCENet.universal(), MEMORY if kind == "memory" else 0
    by_hand = mode == "one" and kind != "fitted"
    learn.add_cbs([recorder, Halves(.7, oracle, tap_plan(learn.model, size=16), memory) if by_hand else FMCECallback(.7, oracle, when=0., memory=memory)])
    fit(learn)
    name = f"{mode}{rank_distrib()}"
    torch.save(learn.model.state_dict(), folder/f"{name}.pt")
    if not by_hand: learn.fmce.history.to_csv(folder/f"{name}.csv", index=False)
    pd.DataFrame([list(v) for v in learn.recorder.values], columns=list(learn.recorder.metric_names)[1:-1]).to_csv(folder/f"{name}.table.csv", index=False)
    frozen = {id(p) for p in oracle.parameters()}
    assert not any(id(p) in frozen for g in learn.opt.param_lists for p in g) and not any(p.requires_grad for p in oracle.parameters())
    assert hook_count(learn.model) == 0
    (folder/f"{name}.recorded").write_text(str(len(recorder.datasets)))

def freezing(folder, mode):
    "A fit that freezes its front on the way; two processes decide alike, and train the rest as one does."
    learn = learner(mode)
    learn.add_cb(FMCSFreeze(by={"stage1": .5}, eval_mode=False))
    fit(learn)
    torch.save(learn.model.state_dict(), folder/f"{mode}{rank_distrib()}.pt")
    assert all(p.requires_grad for p in learn.model.parameters()) and hook_count(learn.model) == 0
    watching = learner(mode)
    watching.add_cb(FMCSFreeze(by="change", every=1, patience=1, threshold=1e3, start=0.))
    fit(watching)
    watching.fmcs_freeze.history.to_csv(folder/f"{mode}{rank_distrib()}.csv", index=False)

def failing(folder, what):
    "A fit that goes wrong in the first process alone; what each process says."
    rank, save, write = rank_distrib(), np.save, Path.write_text
    def full(*args, **kwargs): raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    if rank == 0 and what == "the folder exists": (folder/"maps").mkdir(); (folder/"maps"/"mine.txt").write_text("x")
    if rank == 0 and what == "the disk is full": np.save = lambda path, a: full() if ".001." in str(path) else save(path, a)
    if rank == 0 and what == "the disk is full at the end": Path.write_text = lambda self, *args, **kwargs: full() if "card.json" in self.name else write(self, *args, **kwargs)
    learn = learner("two")
    learn.add_cbs([FMCSRecorder(n_images=32, n_snapshots=6, path=folder/"maps"), FMCECallback(.7)])
    try: fit(learn)
    except Exception as e: said = f"{type(e).__name__}: {e}"
    else: said = "nothing"
    finally: np.save, Path.write_text = save, write
    (folder/f"{rank}.txt").write_text(said)

def main(folder, mode):
    if mode == "two": DistributedDL._broadcast = on_cpu
    for kind in ("fitted", "universal", "memory", "vit fitted", "vit universal"): compared(Path(folder)/kind, kind, mode)
    freezing(Path(folder)/"freeze", mode)
    if mode == "two":
        for what in ("the folder exists", "the disk is full", "the disk is full at the end"): failing(Path(folder)/what, what)

if __name__ == "__main__":
    faulthandler.dump_traceback_later(120, exit=True)  # processes that wait for each other say where
    main(*sys.argv[1:])
    sys.stdout.flush()
    os._exit(0)  # at the interpreter's own exit, threads of gloo now and then abort the process ("terminate called without an active exception")
