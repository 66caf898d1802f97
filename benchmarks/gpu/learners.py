"The Learner of a measure, in a precision and under the time limit."
import warnings
from contextlib import contextmanager

import fastai.callback.progress
import fastai.callback.schedule
from fastai.callback.channelslast import ChannelsLast
from fastai.callback.core import Callback
from fastai.callback.fp16 import MixedPrecision
from fastai.losses import CrossEntropyLossFlat
from fastai.metrics import accuracy
from fastai.torch_core import set_seed
from fastai.vision.learner import vision_learner

from fmce_fastai.study.learner import cut_at, find_arch

class Deadline(Callback):
    "Ends a fit by `OutOfTime` when the time is up, or after an epoch that shows it will be."
    run_valid = False
    def __init__(self, budget): self.budget = budget
    def before_fit(self): self.start = self.budget.spent
    def before_batch(self): self.budget.check(what="the rest of this fit")
    def after_epoch(self):
        left = self.n_epoch - self.epoch - 1
        spent = self.budget.spent - self.start
        if left: self.budget.check(spent/(self.epoch+1)*left, "the rest of this fit")


def precision_callbacks(precision):
    "fastai's callbacks for one of `PRECISIONS`."
    if precision.endswith("channels_last"): yield ChannelsLast()
    if precision.startswith("bfloat16"): yield MixedPrecision("bf16")


def build_learner(job, dls, arch, precision="float32", seed=0, **kwargs):
    "`vision_learner` from random weights, on the device."
    set_seed(seed)
    arch = find_arch(arch)
    with warnings.catch_warnings(), cut_at(arch):
        warnings.simplefilter("ignore")  # fastai passes torchvision its old argument `pretrained`
        learn = vision_learner(dls, arch, pretrained=False, loss_func=CrossEntropyLossFlat(),
                               metrics=accuracy, path=job.state, **kwargs)
    learn.add_cbs([Deadline(job.budget), *precision_callbacks(precision)])
    learn.model.to(job.device)
    return learn


@contextmanager
def quiet(learn):
    "Without progress bar and table."
    with learn.no_bar(), learn.no_logging(): yield
