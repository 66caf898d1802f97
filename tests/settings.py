"Every setting of fastai that the callbacks are proven in: what is set up, and what is to come of it. `test_settings.py` runs them; the table in the documentation is made from them."

import numpy as np
import pandas as pd
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

from fmce_fastai.train.callback import FMCECallback
from helpers import assert_same, make_model, tensor_dls, weights


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

class Diary(Callback):
    "What happened, for the checks below: weights before the fit, after every step and at every validation, norms of the gradient that the optimizer gets, types of the outputs."
    order, run_valid = 950, False
    def __init__(self): self.first, self.steps, self.valid, self.norms, self.dtypes = None, [], [], [], set()
    def before_fit(self): self.first = self.first or weights(self.model)
    def after_pred(self): self.dtypes.add(self.pred.dtype)
    def before_step(self): self.norms.append(float(torch.stack([p.grad.norm() for p in self.model.parameters() if p.grad is not None]).norm()))
    def after_batch(self): self.steps.append(weights(self.model))
    def before_validate(self): self.valid.append(weights(self.model))

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
def any_size(learn):
    if hasattr(learn.model, "patch_embed"): learn.model = make_model("vit", dynamic_img_size=True)
def compiled(learn):
    torch._dynamo.reset()  # what was compiled for another learner of this class is used again, without hooks: see `test_a_network_that_was_compiled_before_is_told_and_helped`
    learn.model = torch.compile(learn.model, backend="eager")
    learn.fit(1, 1e-2)
def checkpointed(learn):
    learn.model.set_grad_checkpointing(True)
    learn.fit(1, 1e-2)

# Effects that the setting is to have, beside RAL: each gets the learner after the fit -----------------------------------
COLUMNS = ["fmcs_loss", "fmcs", "fmcs_last"]

def shown(learn):
    "The table of the fit, which shows the three columns after the task's loss."
    names = list(learn.recorder.metric_names)
    assert names == ["epoch", "train_loss", "valid_loss", *COLUMNS, "time"]
    return pd.DataFrame([list(v) for v in learn.recorder.values], columns=names[1:-1])

def in_bfloat16(learn): assert learn.diary.dtypes == {torch.bfloat16}
def channels_last(learn): assert all(p.is_contiguous(memory_format=torch.channels_last) for p in learn.model.parameters() if p.ndim == 4)
def two_batches_a_step(learn): assert len(learn.diary.norms) == 4 and len(learn.diary.steps) == 8
def clipped(learn): assert max(learn.diary.norms) <= .1001 and min(learn.diary.norms) > .0999
def stopped(learn):
    "After the second epoch, by the task loss."
    seen = shown(learn)
    assert len(seen) == 2 and learn.early_stopping.best == seen.valid_loss[0]
    with learn.removed_cbs(learn.early_stopping): assert learn.validate()[0] == seen.valid_loss[1]
def reduced(learn): assert np.allclose(learn.recorder.lrs, [1e-2]*8 + [1e-3]*4) and learn.reduce_lr_on_plateau.best == shown(learn).valid_loss[0]
def kept_best(learn):
    best = learn.diary.valid[int(shown(learn).valid_loss.argmin())]
    assert_same(best, torch.load(learn.path/"models"/"model.pth", weights_only=False)["model"])
    assert_same(best, weights(learn.model))
def logged(learn):
    log = pd.read_csv(learn.path/"log.csv")
    assert list(log.columns) == ["epoch", "train_loss", "valid_loss", *COLUMNS, "time"] and np.allclose(log[shown(learn).columns], shown(learn), rtol=1e-5)
def drawn(learn): assert learn.progress.mbar.drawn == [8, 2]
def on_the_board(learn):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    events = EventAccumulator(str(learn.path))
    events.Reload()
    for name in ["valid_loss", *COLUMNS]: assert np.allclose([e.value for e in events.Scalars(name)], shown(learn)[name], rtol=1e-5)
def reset(learn): assert len(learn.model.resets) >= 2*2+1  # before training, before validation, after the fit
def averaged(learn):
    "By the weights after each step: the average was validated, and the fit went on with the weights themselves."
    kept, at = {k: v.clone() for k, v in learn.diary.first.items()}, iter(learn.diary.valid)
    for i, step in enumerate(learn.diary.steps, 1):
        kept = {k: .9*v + .1*step[k] if v.is_floating_point() else v for k, v in kept.items()}
        if i % 4 == 0:
            for k, v in next(at).items(): torch.testing.assert_close(v, kept[k])
    assert_same(weights(learn.model), learn.diary.steps[-1])
def second_epoch(learn): assert learn.fmce.history.epoch.unique().tolist() == [1] and len(learn.diary.steps) == 4
def two_fits(learn): assert learn.fmce.history.fit.unique().tolist() == [1, 2] and len(learn.diary.steps) == 8
def five_steps(learn): assert (learn.fmce.history.steps == 5).all()

class Setting:
    "`cbs`: callbacks; `before`: what is done to the learner; `fit`: how it is trained; `nets`, `oracles`: where it applies; `ral`: more for `FMCECallback`; `result`: 'acts', 'watches', or the reason why steps stay plain; `check`: what the setting itself is to do."
    def __init__(self, cbs=None, before=None, fit=fit, result="acts", nets=("cnn", "vit"), oracles=("fitted", "universal"), learner=None, note="", loss=None, ral=None, check=None):
        self.cbs, self.before, self.fit, self.result, self.nets, self.oracles, self.learner, self.note, self.loss = cbs or (lambda path: []), before or (lambda learn: None), fit, result, nets, oracles, learner or {}, note, loss
        self.ral, self.check = ral or {}, check or (lambda learn: None)

def resettable(learn): learn.model.resets = []; learn.model.reset = lambda: learn.model.resets.append(1)

def soft(x, y): return F.one_hot(y, 10)*.8 + .02,
def column(x, y): return y[:, None],
def column_loss(o, y): return F.cross_entropy(o, y[:, 0])
# (targets, loss): the images have classes, in another form than one label (B,)
CLASSES = {
    "several labels per image (`MultiCategoryBlock`)": (multi_label, nn.BCEWithLogitsLoss()),
    "class probabilities, one-hot vectors": (soft, nn.CrossEntropyLoss()),
    "class labels of shape (B, 1)": (column, column_loss),
}
# (targets, loss, what else): tasks without classes
TASKS = {
    "regression": (number, lambda o, y: ((o.mean(1, keepdim=True) - y)**2).mean(), {}),
    "segmentation": (pixels, nn.CrossEntropyLoss(), dict(before=lambda l: setattr(l, "model", Segmenter(l.model)), nets=("cnn",))),
    "several targets": (two, lambda o, a, b: F.cross_entropy(o, a) + o.mean()*b.mean(), {}),
}
def task(make, loss, more, **kwargs): return Setting(lambda p: [Targets(make)], loss=loss, **more, **kwargs)

SETTINGS = {
    # Precision and speed
    "`to_fp16()`, `to_bf16()` (CPU twin: autocast to bfloat16)": Setting(lambda p: [Autocast()], note="the oracle itself runs in float32", check=in_bfloat16),
    "`ChannelsLast`": Setting(lambda p: [ChannelsLast()], check=channels_last),
    "`GradientAccumulation`": Setting(lambda p: [GradientAccumulation(32)], note="RAL is divided like the task loss", check=two_batches_a_step),
    "`GradientClip`": Setting(lambda p: [GradientClip(.1)], note="the gradient of RAL is clipped", check=clipped),
    "`torch.compile`d model": Setting(fit=compiled, note="modules inside are found"),
    "activation checkpointing (timm)": Setting(fit=checkpointed, nets=("vit",)),
    # Other tasks
    **{name: task(*t, {}, note="two images share what their vectors have in common" if "labels per" in name else "") for name, t in CLASSES.items()},
    "several labels per image, `MixUp`": Setting(lambda p: [Targets(multi_label), MixUp()], loss=nn.BCEWithLogitsLoss(), note="fastai mixes the vectors"),
    **{name: task(*t, result={"fitted": "acts", "universal": "watches"}, note="no classes: the universal oracle watches unless `when` says otherwise, and a warning in the first step says so") for name, t in TASKS.items()},
    **{f"{name}, `when=0.`": task(*t, oracles=("universal",), ral=dict(when=0.), note="by scores without labels") for name, t in TASKS.items()},
    # Other callbacks
    "`MixUp`": Setting(lambda p: [MixUp()], note="the universal oracle receives class shares"),
    "`CutMix`": Setting(lambda p: [CutMix()], note="as above"),
    "label smoothing": Setting(loss=LabelSmoothingCrossEntropyFlat()),
    "`SaveModelCallback`": Setting(lambda p: [SaveModelCallback(with_opt=True)], note="the best epoch's weights, by the task loss", check=kept_best),
    "`EarlyStoppingCallback`": Setting(lambda p: [EarlyStoppingCallback(patience=1, min_delta=10.)], fit=lambda l: l.fit(4, 1e-2), note="at the same epoch as without the callback: its loss stays the task loss", check=stopped),
    "`ReduceLROnPlateau`": Setting(lambda p: [ReduceLROnPlateau(patience=1, min_delta=10.)], fit=lambda l: l.fit(3, 1e-2), note="by the task loss", check=reduced),
    "`CSVLogger`": Setting(lambda p: [CSVLogger("log.csv")], note="with the three columns", check=logged),
    "`ShowGraphCallback`": Setting(lambda p: [ShowGraphCallback()], check=drawn),
    "`TensorBoardCallback`": Setting(lambda p: [TensorBoardCallback(log_dir=p, trace_model=False, log_preds=False)], note="with the three columns", check=on_the_board),
    "`ModelResetter`": Setting(lambda p: [ModelResetter()], before=resettable, check=reset),
    "averaged weights": Setting(lambda p: [Average()], note="they are validated and unchanged; RAL reads the network that trains", check=averaged),
    # Ways of training
    "`fine_tune`": Setting(fit=fine_tune, check=two_fits),
    "`fit(start_epoch=)`": Setting(fit=lambda l: l.fit(2, 1e-2, start_epoch=1), check=second_epoch),
    "images of another size in the next fit": Setting(before=any_size, fit=sizes, check=two_fits),
    "a short last batch": Setting(learner=dict(n=72), check=five_steps),
    "a last batch of fewer than 8 images": Setting(learner=dict(n=68), oracles=("universal",), result="partly", note="the universal oracle scores batches of 8 or more; that step is plain, and counted as `not_valid`"),
    "batch size 1": Setting(learner=dict(bs=1, n=8), nets=("vit",), oracles=("fitted",)),
    "batch size 1, universal oracle": Setting(learner=dict(bs=1, n=32), nets=("vit",), oracles=("universal",), result="fills", note="from the step on in which an automatic memory bank holds 7 images and one of the same class"),
    "batches of 4, universal oracle": Setting(learner=dict(bs=4, n=64), oracles=("universal",), result="fills", note="from the step on in which an automatic memory bank holds enough images"),
    "batches of 4, `memory=0`": Setting(learner=dict(bs=4, n=16), oracles=("universal",), result="not_valid", ral=dict(memory=0), note="a warning says that the oracle scores 8 images or more"),
}

# What is no way of training: (what, what holds, networks and oracles, the test that proves it)
ALL = "CNN, ViT; fitted, universal"
OTHERS = [
    ("`alpha=0`", "weights, losses and random state are those of a learner without the callback, bit for bit", ALL, "test_callback.py::test_alpha_0_changes_no_bit"),
    ("a `FeatureTap` in your own training loop", "outputs, weights, modes and random state are those without it, bit for bit", "CNN, ViT", "test_taps.py::test_a_read_network_trains_to_the_same_bit"),
    ("`validate`, `get_preds`, `tta`, `predict`, `show_results`, `lr_find`", "the same outputs and random state, bit for bit; `validate()` returns as many values as before", ALL, "test_callback.py::test_validation_prediction_and_lr_find_are_untouched"),
    ("`ClassificationInterpretation`", "the same top losses, confusion matrix and pictures, and nothing else changed", "CNN, ViT; fitted, universal, recorder", "test_settings.py::test_interpretation_is_untouched"),
    ("`fine_tune` of a `vision_learner`, body frozen then not", "works in both fits: norm layers train on in the frozen body, so its maps carry gradient", ALL, "test_settings.py::test_fine_tuning_freezes_the_body_and_trains_it_then"),
    ("a frozen body without trainable norm layers (`train_bn=False`)", "steps stay plain, and a warning says so", "CNN; fitted", "test_callback.py::test_a_frozen_body_is_told"),
    ("any targets, batch size, number of classes, frozen or not", "RAL acts, or a warning names the cause", "CNN; fitted, universal", "test_nothing_silent.py::test_ral_acts_or_says_why_not"),
    ("60 classes, batches of 16", "works; a memory bank of 224 images is switched on, with a warning", "CNN; universal", "test_nothing_silent.py::test_many_classes_switch_a_bank_on"),
    ("two `FMCECallback`s on one Learner", "refused before the first step, unless one of them only watches (`alpha=0`)", ALL, "test_nothing_silent.py::test_two_callbacks_are_refused"),
    ("a network, or a stage of it, that `torch.compile` compiled in an earlier call", "refused: `TapError`, \"No feature map arrived ... call torch._dynamo.reset()\"", "CNN; fitted, universal", "test_settings.py::test_a_network_that_was_compiled_before_is_told_and_helped"),
    ("`GradientAccumulation`: the gradient", "the exact mean of its batches' gradients", ALL, "test_callback.py::test_gradient_accumulation_divides_ral_like_the_task_loss"),
    ("Ctrl-C, exceptions, `Cancel...Exception` in any event", "no hook is left, random state and modes are as without the callback; columns and helper are removed by the next fit, `validate` or `detach()`, and the next fit is unaffected", ALL, "test_callback.py::test_nothing_is_left_however_a_fit_ends"),
    ("Ctrl-C at any line of callback, recorder, tap or oracle", "what is left is removed by the next fit, `validate`, `detach()`, and the next fit is unaffected", ALL, "test_callback.py::test_ctrl_c_at_any_line_of_ours"),
    ("an exception inside `model.forward`", "no hook is left", ALL, "test_callback.py::test_an_error_inside_the_networks_forward"),
    ("Ctrl-C inside `model.forward`", "at most one set of hooks, which holds no tensor, does nothing and is removed by the next fit, `validate`, `detach()` or `learn.export`; no exported file contains it", ALL, "test_callback.py::test_an_error_inside_the_networks_forward"),
    ("`learn.save`, `learn.load`", "do not involve the callback; training continues", ALL, "test_callback.py::test_save_and_load"),
    ("`learn.export`, `load_learner`", "without oracle, hooks or maps, under 100 kB more; predicts; with the callbacks removed before, without any reference to this package", ALL, "test_callback.py::test_export_holds_no_oracle_and_no_hook"),
    ("two processes (`accelerate launch`, `distrib_ctx`)", "the weights of one process with the whole batch (fitted oracle), of the mean of its two halves (universal, also with `memory`)", ALL, "test_distributed.py::test_both_processes_end_with_the_weights_of_one"),
    ("two processes: `history` and the table of the fit", "scores are means over the processes; steps are a process's own", ALL, "test_distributed.py::test_logged_scores_are_means_over_the_processes"),
    ("two processes: `FMCSRecorder`", "one data set, written by the first; its losses are those of the whole batch", "CNN, ViT; recorder", "test_distributed.py::test_one_data_set_is_recorded_by_both"),
    ("two processes: the recorder's folder exists, or its disk is full", "the first raises its error, the other `RankError` with the same text; neither hangs", "CNN; recorder", "test_distributed.py::test_what_goes_wrong_in_one_process_reaches_the_other_in_words"),
    ("`SyncBatchNorm`", "by structure: taps are found after the conversion; its numbers **need a GPU and are untested**", "CNN", "test_distributed.py::test_sync_batch_norm_keeps_the_taps"),
    ("`to_fp16()` with loss scaling on a GPU", "**needs a GPU and is untested**; its CPU twin is the first row", "CNN; fitted, universal", "test_settings.py::test_cuda_mixed_precision"),
    ('k-fold loops: a Learner and a callback per fold', 'works', 'CNN; universal', "test_situations.py::test_k_folds_with_a_callback_each"),
    ('one callback for several Learners, in turn', 'works; the history counts on over all fits', 'CNN; fitted, universal', "test_situations.py::test_one_callback_for_several_learners"),
    ('one callback for two architectures, in turn', 'works: taps are found for each', 'CNN, ViT; universal', "test_situations.py::test_one_callback_for_two_architectures"),
    ('`copy.deepcopy(learn)`', "trains by itself, once it is given an oracle: copies, like exports, leave the oracle's weights out", 'CNN; universal', "test_situations.py::test_a_copied_learner_trains_by_itself"),
    ('`load_learner`, then `learn.fmce.oracle = ...`, then training', 'works', 'CNN; universal', "test_situations.py::test_an_exported_learner_is_loaded_given_an_oracle_and_trained"),
    ('`added_cbs`, `removed_cbs`', 'RAL acts in the fits that have the callback', 'CNN; universal', "test_situations.py::test_added_for_one_fit_and_removed_for_another"),
    ('`fine_tune` twice', 'works: four fits', 'CNN; universal', "test_situations.py::test_fine_tune_twice"),
    ('`fit_flat_cos`, `fit_sgdr`, `fit_one_cycle` with a scheduled `alpha`', 'works: the schedule is over the fit', 'CNN; universal', "test_situations.py::test_other_schedules"),
    ('`freeze_to(-2)`, discriminative rates', 'works', 'CNN; universal', "test_situations.py::test_discriminative_rates_and_freeze_to"),
    ('`fit(0)`', 'nothing happens; the next fit works', 'CNN; universal', "test_situations.py::test_a_fit_of_no_epoch"),
    ('`lr_find` between two fits', 'is no fit: `history` has two', 'CNN; universal', "test_situations.py::test_lr_find_between_two_fits"),
    ('forward passes of other callbacks in the middle of an epoch', 'are not read', 'CNN; universal', "test_situations.py::test_forward_passes_of_other_callbacks_are_not_read"),
    ('`TerminateOnNaNCallback`', 'the steps so far are in `history`, nothing is left', 'CNN; universal', "test_situations.py::test_terminate_on_nan"),
    ('`weighted_dataloaders`, `partial_dataloaders`', 'works', 'CNN; universal', "test_situations.py::test_weighted_and_partial_loaders"),
    ('a stream of images (`IterableDataset`)', 'works', 'CNN; universal', "test_situations.py::test_a_stream_of_images"),
    ('images sorted by class, not shuffled', 'the memory bank switches itself on; RAL acts as soon as it holds two classes', 'CNN; universal', "test_situations.py::test_sorted_images"),
    ('progressive resizing with `memory`', 'works: the bank is emptied with each size', 'CNN; universal', "test_situations.py::test_progressive_resizing_with_memory"),
    ('`GradientAccumulation`, `MixUp` and label smoothing together, with `memory`', 'works', 'CNN; universal', "test_situations.py::test_accumulated_mixed_and_smoothed_with_memory"),
    ('another batch size in the next fit', 'works', 'CNN; universal', "test_situations.py::test_another_batch_size_in_the_next_fit"),
    ('images with 1, 4 or 13 channels (`n_in=`)', 'works', 'CNN; universal', "test_situations.py::test_vision_learner_with_other_channels"),
    ('images that are not square', 'works', 'CNN; universal', "test_situations.py::test_images_that_are_not_square"),
    ('`BnFreeze`, frozen norm weights', 'works; the statistics stay as they are', 'CNN; universal', "test_situations.py::test_frozen_batch_norm"),
    ('`weight_norm`, `spectral_norm` (parametrised weights)', 'works', 'CNN; universal', "test_situations.py::test_parametrised_weights"),
    ('weights and images in bfloat16', 'works; the oracle itself runs in float32', 'CNN; universal', "test_situations.py::test_a_network_in_bfloat16"),
    ('`SGD`, `ranger`', 'works', 'CNN; universal', "test_situations.py::test_other_optimisers"),
    ('another head and other classes in the next fit', 'works', 'CNN; universal', "test_situations.py::test_the_head_is_exchanged_between_two_fits"),
    ('`learn.summary()`, `show_training_loop()`, `fmce_report` between two fits', 'changes nothing', 'CNN; universal', "test_situations.py::test_summary_training_loop_and_report_between_fits"),
    ("`MultiCategoryBlock`", "works", "CNN; universal", "test_situations.py::test_multi_category_block"),
    ("`unet_learner`; `RegressionBlock`", "the universal oracle watches; a warning in the first step names the cause", "CNN; universal", "test_situations.py::test_unet_learner"),
    ("maps that are NaN or infinite", "such images are not scored; a step without any stays plain", "CNN; fitted, universal", "test_hostile.py::test_maps_that_are_not_finite_are_not_scored"),
    ("constant maps", "fitted oracle: works; universal oracle: stays plain, counted as `not_valid`; gradients are finite", "CNN; fitted, universal", "test_hostile.py::test_constant_maps"),
    ("maps of changing size", "works", "CNN; fitted, universal", "test_hostile.py::test_maps_of_changing_size"),
    ("a module called twice, or shared under two names", "works: the map of its last call is used", "CNN; fitted, universal", "test_hostile.py::test_a_module_called_twice_or_shared"),
    ("two image inputs (siamese), a tuple, a dict, nested inputs, an image and a table", "works: the network is probed with all inputs of the batch; a shared encoder is read at its last call", "CNN; fitted, universal", "test_inputs.py::test_networks_of_several_inputs_are_trained"),
    ("several inputs, `alpha=0` or `FMCSRecorder`", "weights and random state are those without the callback, bit for bit", "CNN; universal, recorder", "test_inputs.py::test_alpha_0_changes_no_bit_of_them"),
    ("several inputs: `FMCSRecorder`", "the maps of the last image", "CNN; recorder", "test_inputs.py::test_networks_of_several_inputs_are_recorded"),
    ("several inputs: `fmce_report`", "the scores of the last image, as of a network with that input alone", "CNN; universal", "test_inputs.py::test_the_report_of_several_inputs_is_that_of_the_image_read_last"),
    ("a network that joins two inputs into one batch", "refused: `TapError`, \"maps of 4 images for 2\"", "CNN; universal", "test_inputs.py::test_a_network_that_joins_its_inputs_is_refused_in_words"),
    ("a tabular or text learner, sequences, flat vectors", "refused before the first step: \"FMCECallback needs a network with image feature maps ... Remove the callback.\"", "universal, recorder", "test_inputs.py::test_learners_without_images_are_told_in_one_sentence"),
    ("`fmce_report` of a tabular or text learner", "refused in the same words", "universal", "test_inputs.py::test_the_report_of_learners_without_images"),
    ("a module never called in training", "refused by name", "CNN; fitted, universal", "test_hostile.py::test_a_module_never_called_in_training"),
    ("modules that return tuples or dicts", "works", "CNN; fitted, universal", "test_hostile.py::test_tuples_and_dicts"),
    ("empty batches", "stay plain, counted as `not_valid`; as the first batch refused by the universal oracle's probe", "CNN; fitted, universal", "test_hostile.py::test_empty_batches"),
    ("a loss that is not finite", "stays as it is", "CNN; fitted", "test_callback.py::test_a_loss_that_is_not_finite_stays_as_it_is"),
    ("`FMCSRecorder` on all of these", "writes what is there (what float16 cannot hold as its largest value); the fit is bitwise unchanged; a module that training bypasses is refused by name", "CNN; recorder", "test_hostile.py::test_the_recorder_writes_what_is_there"),
    ("a module that returns no map", "refused by name", "", "test_taps.py::test_a_module_that_gives_no_map"),
    ("oracle files with flipped bits", "`OracleFileError`", "fitted", "test_oracle.py::test_flipped_bits"),
    ("truncated oracle files, at every 1 % of their length", "`OracleFileError`", "fitted, universal", "test_hostile.py::test_oracles_cut_at_every_percent"),
    ("truncated data sets and studies, each file at every 1 % of its length", "`DatasetError`, `StudyError`", "", "test_hostile.py::test_data_sets_and_studies_cut_at_every_percent"),
    ("pickles and archives in place of an oracle", "`OracleFileError`, nothing is executed", "", "test_oracle.py::test_no_unpickling"),
    ("oracle files: zip bombs, headers and cards that specify terabytes, files of terabytes", "`OracleFileError`, memory bounded", "", "test_hostile.py::test_oracles_that_promise_terabytes"),
    ("oracle files: links", "followed (the hub's cache is made of links); the file is checked like any other", "", "test_hostile.py::test_a_link_to_an_oracle_is_read_and_checked"),
    ("data sets that are damaged: pickles, zip bombs, headers that specify terabytes, links, names that point outside the folder", "`DatasetError`, nothing is executed", "", "test_recorder.py::test_damaged_folders_are_named"),
    ("data sets: files of terabytes, pipes, links at every place", "`DatasetError`; nothing is read to its end and nothing blocks, memory bounded", "", "test_hostile.py::test_data_sets_of_terabytes_pipes_and_links"),
    ("studies: files of terabytes, pipes, links at every place", "`StudyError`; nothing is read to its end and nothing blocks, memory bounded", "", "test_hostile.py::test_studies_of_terabytes_pipes_and_links"),
    ("study folders that are damaged, also links in them", "`StudyError`", "", "test_study.py::test_a_damaged_result_is_named"),
    ("all three, broken at random", "their own errors", "", "test_soak.py::test_broken_files_are_refused"),
    ("oracles' headers and cards made by hypothesis, also with sums that are right", "`OracleFileError`, or the same oracle", "fitted, universal", "test_hostile.py::test_fuzzed_headers_and_cards_of_oracles"),
    ("data sets' cards, tables and arrays, studies' settings and results made by hypothesis", "`DatasetError`, `StudyError`", "", "test_hostile.py::test_fuzzed_data_sets"),
    ("many steps with callback and recorder", "memory stays flat (`make soak` does 2,000 and prints the figures)", "CNN; fitted, universal", "test_memory.py::test_memory_is_flat"),
    ("maps and graphs of earlier steps", "are gone", ALL, "test_memory.py::test_no_map_of_an_earlier_step_is_alive"),
    ("a deleted learner, also after Ctrl-C", "goes with network, callbacks, oracle and what `memory` kept; the recorder's temporary folder goes with its data set", ALL, "test_memory.py::test_learner_callbacks_oracle_and_network_are_collected"),
]

def table():
    "The table of the documentation, in Markdown."
    words = {"acts": "works", "watches": "watches", "partly": "works, but for that step", "not_valid": "stays plain", "fills": "works"}
    def says(result):
        return words[result] if isinstance(result, str) else "; ".join(f"{o} oracle: {words[r]}" for o, r in result.items())
    nets = dict(cnn="CNN", vit="ViT")
    rows = [[name, says(s.result) + (f" ({s.note})" if s.note else ""), f"{', '.join(nets[n] for n in s.nets)}; {', '.join(s.oracles)}", "`test_settings.py::test_the_table`"] for name, s in SETTINGS.items()]
    rows += [[what, holds, where, f"`{test}`"] for what, holds, where, test in OTHERS]
    return "\n".join("| " + " | ".join(r) + " |" for r in [["setting", "what happens", "networks; oracles", "proven by"], ["---"]*4, *rows])

if __name__ == "__main__": print(table())
