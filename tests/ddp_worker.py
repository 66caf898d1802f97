"A fit in one of two processes, or in one with both halves of every batch: `test_distributed.py` compares them. Arguments: folder, kind of oracle, `whole` or `halves`."
import sys
import warnings
from pathlib import Path

import torch
from fastai.basics import Learner
from fastai.callback.core import Callback
from fastai.data.core import DataLoaders, TfmdDL
from fastai.distributed import DistributedDL
from fastai.losses import CrossEntropyLossFlat
from fastai.optimizer import SGD
from fastai.torch_core import num_distrib, rank_distrib

from fmce_fastai.callback import FMCECallback
from fmce_fastai.losses import fmcs_loss
from fmce_fastai.oracle import FMCENet
from fmce_fastai.recorder import FMCSRecorder
from fmce_fastai.taps import FeatureTap, hook_count, tap_plan
from helpers import TinyNet, make_oracle, seed_all

warnings.filterwarnings("ignore")
N, BS, EPOCHS = 64, 16, 2  # of one process


def on_cpu(self, t, rank):
    "fastai sends the order of the images by way of the GPU."
    t = torch.LongTensor(t)
    torch.distributed.broadcast(t, rank)
    return t.tolist()

class Halves(Callback):
    "What two processes do, in one: the loss is the mean of the losses of the batch's halves, each with its FMCS loss."
    order, run_valid = FMCECallback.order + .1, False
    def __init__(self, alpha, oracle, counted): self.alpha, self.oracle, self.counted = alpha, oracle, counted
    def before_batch(self): self.x2, self.y2 = self.xb[0].chunk(2), self.yb[0].chunk(2)
    def after_loss(self):
        total = 0.
        for x, y in zip(self.x2, self.y2):
            tap = FeatureTap(self.oracle.plan).arm(self.model)
            task = self.loss_func(self.model(x), y)
            aux = fmcs_loss(self.oracle(tap.take(), y), modules=self.counted).value
            total = total + ((1-self.alpha)*task + self.alpha*aux)/2
        self.learn.loss_grad = total

def main(folder, kind, mode):
    folder = Path(folder)
    DistributedDL._broadcast = on_cpu
    seed_all(0)
    x, y = torch.randn(N, 3, 16, 16), torch.arange(N) % 4
    size, order = BS, list(range(N))
    if mode != "ddp":  # the batches that two processes see together
        size = 2*BS
        order = [i for b in range(0, N//2, BS) for half in (0, N//2) for i in range(half+b, half+b+BS)]
    items = list(zip(x[order], y[order]))
    dls = DataLoaders(TfmdDL(items, bs=size, shuffle=False, num_workers=0), TfmdDL(items, bs=size, num_workers=0), device="cpu")
    seed_all(1)
    model = TinyNet(dropout=0.)
    for stage, c in ((model.stem, 8), (model.stage1, 12), (model.stage2, 16)): stage[1] = torch.nn.GroupNorm(4, c)  # no batch statistics
    oracle = make_oracle(model) if kind == "fitted" else FMCENet.universal()
    ral, recorder = FMCECallback(.7, oracle, when=0.), FMCSRecorder(n_images=32, n_snapshots=6, path=folder/"maps")
    learn = Learner(dls, model, loss_func=CrossEntropyLossFlat(), opt_func=SGD, lr=.1)
    cbs = [recorder]
    if mode == "halves":
        plan = oracle.plan or tap_plan(model, x=x[:2])
        counted = torch.ones(len(plan), dtype=torch.bool) if oracle.plan else torch.tensor([i >= len(plan)-2 for i in range(len(plan))])
        cbs.append(Halves(.7, oracle.freeze() if oracle.plan else oracle.on(plan), counted))
    else: cbs.append(ral)
    learn.add_cbs(cbs)
    with learn.no_bar(), learn.no_logging():
        if num_distrib():
            with learn.distrib_ctx(sync_bn=False, cpu=True): learn.fit(EPOCHS)
        else: learn.fit(EPOCHS)
    name = f"{mode}{rank_distrib()}"
    torch.save({k: v for k, v in learn.model.state_dict().items()}, folder/f"{name}.pt")
    if mode != "halves": ral.history.to_csv(folder/f"{name}.csv", index=False)
    frozen = {id(p) for p in oracle.parameters()}
    assert not any(id(p) in frozen for g in learn.opt.param_lists for p in g) and not any(p.requires_grad for p in oracle.parameters())
    assert hook_count(learn.model) == 0
    (folder/f"{name}.recorded").write_text(str(len(recorder.datasets)))

if __name__ == "__main__": main(*sys.argv[1:])
