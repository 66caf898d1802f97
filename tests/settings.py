"Every setting of fastai that the callbacks are proven in: what is set up, and what is to come of it. `test_settings.py` runs them; the table in the documentation is made from them."

import torch
import torch.nn.functional as F
from fastai.callback.core import Callback
from fastai.callback.channelslast import ChannelsLast
from fastai.callback.mixup import CutMix, MixUp
from fastai.callback.progress import CSVLogger, ShowGraphCallback
from fastai.callback.rnn import ModelResetter
from fastai.callback.tensorboard import TensorBoardCallback
from fastai.callback.tracker import EarlyStoppingCallback, ReduceLROnPlateau, SaveModelCallback
from fastai.callback.training import GradientAccumulation, GradientClip
from fastai.losses import LabelSmoothingCrossEntropyFlat
from torch import nn

from fmce_fastai.callback import FMCECallback
from helpers import tensor_dls


# Callbacks that people write themselves ----------------------------------------------------------------------------
class Autocast(Callback):
    "The CPU twin of `MixedPrecision`, which autocasts on the GPU only."
    order, run_valid = FMCECallback.order-1, False
    def before_batch(self): self.ctx = torch.autocast("cpu", torch.bfloat16); self.ctx.__enter__()
    def before_backward(self): self.ctx.__exit__(None, None, None)

class Average(Callback):
    "An exponential moving average of the weights, swapped in for validation."
    def before_fit(self): self.kept = {k: v.detach().clone() for k, v in self.model.state_dict().items()}
    def after_batch(self):
        if self.training:
            for k, v in self.model.state_dict().items():
                if v.is_floating_point(): self.kept[k].lerp_(v, .1)
    def _swap(self):
        own = {k: v.detach().clone() for k, v in self.model.state_dict().items()}
        self.model.load_state_dict(self.kept)
        self.kept = own
    def before_validate(self): self._swap()
    def after_validate(self): self._swap()

class Targets(Callback):
    "Other targets than class labels, made of them."
    order, run_valid = -10, True
    def __init__(self, make): self.make = make
    def before_batch(self): self.learn.yb = tuple(self.make(self.xb[0].as_subclass(torch.Tensor), self.yb[0].as_subclass(torch.Tensor)))

class Segmenter(nn.Module):
    "A network that says a class for every pixel."
    def __init__(self, net):
        super().__init__()
        self.net, self.out = net, nn.Conv2d(16, 10, 1)
    def forward(self, x):
        return F.interpolate(self.out(self.net.stage2(self.net.stage1(self.net.stem(x)))), x.shape[-2:])

def multi_label(x, y): return F.one_hot(y, 10).float(),
def number(x, y): return y.float()[:, None],
def pixels(x, y): return y[:, None, None].expand(-1, *x.shape[-2:]).contiguous(),
def two(x, y): return y, y.float()

def fit(learn, n=2, **kwargs): learn.fit(n, 1e-2, **kwargs)
def fine_tune(learn):
    import fastai.callback.schedule
    learn.fine_tune(1, freeze_epochs=1)
def sizes(learn):
    learn.fit(1, 1e-2)
    learn.dls = tensor_dls(size=24)
    learn.fit(1, 1e-2)
def compiled(learn):
    learn.model = torch.compile(learn.model, backend="eager")
    learn.fit(1, 1e-2)
def checkpointed(learn):
    learn.model.set_grad_checkpointing(True)
    learn.fit(1, 1e-2)

class Setting:
    "`cbs`: callbacks; `before`: what is done to the learner; `fit`: how it is trained; `nets`, `oracles`: where it applies; `result`: 'acts', 'watches', or the words of a refusal."
    def __init__(self, cbs=None, before=None, fit=fit, result="acts", nets=("cnn", "vit"), oracles=("fitted", "universal"), learner=None, note="", loss=None):
        self.cbs, self.before, self.fit, self.result, self.nets, self.oracles, self.learner, self.note, self.loss = cbs or (lambda path: []), before or (lambda learn: None), fit, result, nets, oracles, learner or {}, note, loss

SETTINGS = {
    # Precision and speed
    "`to_fp16()`, `to_bf16()` (CPU twin: autocast to bfloat16)": Setting(lambda p: [Autocast()], note="the oracle itself runs in float32"),
    "`ChannelsLast`": Setting(lambda p: [ChannelsLast()]),
    "`GradientAccumulation`": Setting(lambda p: [GradientAccumulation(32)], note="RAL is divided like the task loss"),
    "`GradientClip`": Setting(lambda p: [GradientClip(.1)]),
    "`torch.compile`d model": Setting(fit=compiled, nets=("cnn",), note="modules inside are found; if hooks never fire, a message says so"),
    "activation checkpointing (timm)": Setting(fit=checkpointed, nets=("vit",)),
    # Other tasks
    "several labels an image": Setting(lambda p: [Targets(multi_label)], loss=nn.BCEWithLogitsLoss(), result={"fitted": "acts", "universal": "watches"}, note="no class labels: the universal oracle watches unless `when` says otherwise"),
    "regression": Setting(lambda p: [Targets(number)], loss=lambda o, y: ((o.mean(1, keepdim=True) - y)**2).mean(), result={"fitted": "acts", "universal": "watches"}, note="as above"),
    "segmentation": Setting(lambda p: [Targets(pixels)], before=lambda l: setattr(l, "model", Segmenter(l.model)), loss=nn.CrossEntropyLoss(), nets=("cnn",), oracles=("universal",), result="watches", note="as above"),
    "several targets": Setting(lambda p: [Targets(two)], loss=lambda o, a, b: F.cross_entropy(o, a) + o.mean()*b.mean(), result={"fitted": "acts", "universal": "watches"}, note="as above"),
    # Other callbacks
    "`MixUp`": Setting(lambda p: [MixUp()], note="the universal oracle gets shares of class"),
    "`CutMix`": Setting(lambda p: [CutMix()], note="as above"),
    "label smoothing": Setting(loss=LabelSmoothingCrossEntropyFlat()),
    "`SaveModelCallback`": Setting(lambda p: [SaveModelCallback(with_opt=True)]),
    "`EarlyStoppingCallback`": Setting(lambda p: [EarlyStoppingCallback(patience=1, min_delta=10.)], fit=lambda l: l.fit(4, 1e-2), note="its loss stays the task loss"),
    "`ReduceLROnPlateau`": Setting(lambda p: [ReduceLROnPlateau(patience=1, min_delta=10.)], fit=lambda l: l.fit(3, 1e-2)),
    "`CSVLogger`": Setting(lambda p: [CSVLogger("log.csv")]),
    "`ShowGraphCallback`": Setting(lambda p: [ShowGraphCallback()]),
    "`TensorBoardCallback`": Setting(lambda p: [TensorBoardCallback(log_dir=p, trace_model=False, log_preds=False)]),
    "`ModelResetter`": Setting(lambda p: [ModelResetter()], before=lambda l: setattr(l.model, "reset", lambda: None)),
    "averaged weights": Setting(lambda p: [Average()]),
    # Ways of training
    "`fine_tune`": Setting(fit=fine_tune),
    "`fit(start_epoch=)`": Setting(fit=lambda l: l.fit(2, 1e-2, start_epoch=1)),
    "images of another size in the next fit": Setting(fit=sizes, nets=("cnn",)),
    "a short last batch": Setting(learner=dict(n=72), oracles=("fitted",)),
    "a last batch of fewer than 8 images": Setting(learner=dict(n=68), oracles=("universal",), result="partly", note="the universal oracle scores batches of 8 or more; that step is plain, and counted as `not_valid`"),
    "batch size 1": Setting(learner=dict(bs=1, n=8), nets=("vit",), oracles=("fitted",)),
    "batch size 1, universal oracle": Setting(learner=dict(bs=1, n=8), nets=("vit",), oracles=("universal",), result="not_valid", note="as above"),
}

# What is no way of training: (what, what holds, the test that proves it)
OTHERS = [
    ("`alpha=0`", "weights, losses and random state are those of a learner without the callback, bit for bit", "test_callback.py::test_alpha_0_changes_no_bit"),
    ("`validate`, `get_preds`, `tta`, `predict`, `show_results`, `lr_find`", "the same outputs and random state, bit for bit; `validate()` returns as many values as before", "test_callback.py::test_validation_prediction_and_lr_find_are_untouched"),
    ("`ClassificationInterpretation`", "the same top losses and confusion matrix", "test_settings.py::test_interpretation_is_untouched"),
    ("a frozen body", "steps stay plain, and a warning says so", "test_callback.py::test_a_frozen_body_is_told"),
    ("Ctrl-C, exceptions, `Cancel...Exception` in any event", "no hook is left; columns and helper go with the next fit at the latest, which is right", "test_callback.py::test_nothing_is_left_however_a_fit_ends"),
    ("Ctrl-C or an exception inside `model.forward`", "at most one set of hooks, which acts no more and goes with the next fit or `detach()`", "test_callback.py::test_an_error_inside_the_networks_forward"),
    ("`learn.export`, `load_learner`", "without oracle, hooks or maps; predicts", "test_callback.py::test_export_holds_no_oracle_and_no_hook"),
    ("two processes (`accelerate launch`, `distrib_ctx`)", "the weights of one process with the whole batch (fitted oracle), of the mean of its two halves (universal)", "test_distributed.py::test_both_processes_end_with_the_weights_of_one"),
    ("two processes: `history`", "scores are means over the processes; steps are a process's own", "test_distributed.py::test_logged_scores_are_means_over_the_processes"),
    ("two processes: `FMCSRecorder`", "one data set, written by the first; its losses are those of the whole batch", "test_distributed.py::test_one_data_set_is_recorded_by_both"),
    ("`SyncBatchNorm`", "by structure: taps are found after the conversion; its numbers need GPUs and are unproven", "test_distributed.py::test_sync_batch_norm_keeps_the_taps"),
    ("`to_fp16()` with loss scaling on a GPU", "needs a GPU; unproven here", "test_settings.py::test_cuda_mixed_precision"),
    ("maps that are NaN", "such images are not scored; a step without any stays plain", "test_callback.py::test_nan_maps_are_not_scored"),
    ("a loss that is not finite", "stays as it is", "test_callback.py::test_a_loss_that_is_not_finite_stays_as_it_is"),
    ("a module that gives no map", "refused by name", "test_taps.py::test_a_module_that_gives_no_map"),
    ("oracle files with flipped bits", "`OracleFileError`", "test_oracle.py::test_flipped_bits"),
    ("oracle files that are cut", "`OracleFileError`", "test_oracle.py::test_cut_files"),
    ("pickles in place of an oracle", "`OracleFileError`, nothing is executed", "test_oracle.py::test_no_unpickling"),
    ("data sets that are damaged: pickles, zip bombs, headers that promise terabytes, links, names that lead out of the folder", "`DatasetError`, nothing is executed", "test_recorder.py::test_damaged_folders_are_named"),
    ("study folders that are damaged", "`StudyError`", "test_study.py::test_a_damaged_result_is_named"),
    ("all three, broken at random", "their own errors", "test_soak.py::test_broken_files_are_refused"),
    ("many steps with callback and recorder", "memory stays flat (`make soak` does 2,000 and prints the figures)", "test_memory.py::test_memory_is_flat"),
    ("maps and graphs of earlier steps", "are gone", "test_memory.py::test_no_map_of_an_earlier_step_is_alive"),
    ("a deleted learner", "goes with network and callbacks", "test_memory.py::test_learner_callback_and_network_are_collected"),
]

def table():
    "The table of the documentation, in Markdown."
    words = {"acts": "works", "watches": "watches", "partly": "works, but for that step", "not_valid": "stays plain"}
    def says(result):
        return words[result] if isinstance(result, str) else "; ".join(f"{o} oracle: {words[r]}" for o, r in result.items())
    nets = dict(cnn="CNN", vit="ViT")
    rows = [[name, says(s.result) + (f" ({s.note})" if s.note else ""), f"{', '.join(nets[n] for n in s.nets)}; {', '.join(s.oracles)}", "`test_settings.py::test_the_table`"] for name, s in SETTINGS.items()]
    rows += [[what, holds, "", f"`{test}`"] for what, holds, test in OTHERS]
    return "\n".join("| " + " | ".join(r) + " |" for r in [["setting", "what happens", "networks; oracles", "proven by"], ["---"]*4, *rows])

if __name__ == "__main__": print(table())
