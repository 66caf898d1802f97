"Contracts with fastai: in every setting of the table RAL acts, watches or is refused as the table says, the loss is the written formula, and nothing is left."
import json
import warnings
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from fastai.callback.core import Callback
from fastai.callback.progress import ProgressCallback
from fastai.learner import Learner
from fastai.torch_core import norm_types
from fastai.vision.learner import vision_learner
from torch import nn

from fmce_fastai.train.callback import FMCECallback
from fmce_fastai.data.digits import digits_dls
from fmce_fastai.oracle.base import FMCENet
from fmce_fastai.train.recorder import FMCSRecorder
from fmce_fastai.util.state import hook_count
from fmce_fastai.maps.plan import TapError
from helpers import assert_same, make_learner, make_model, make_oracle, rng_state, seed_all, tensor_learner, weights
from settings import OTHERS, SETTINGS, Diary, table

CASES = [(name, net, oracle) for name, s in SETTINGS.items() for net in s.nets for oracle in s.oracles]


def learner(setting, net, path, cbs=()):
    learn = tensor_learner("vit" if net == "vit" else None, path=path, metrics=[], cbs=[*setting.cbs(path), *cbs], **setting.learner)
    setting.before(learn)
    if setting.loss is not None: learn.loss_func = setting.loss
    learn.logger = lambda *_: None
    seed_all(0)
    return learn

class Formula(Callback):
    "The loss that trains is (1-alpha) * task loss + alpha * FMCS loss, or the task loss itself."
    order, run_valid = FMCECallback.order + .5, False
    def __init__(self): self.seen = []
    def after_loss(self):
        step = self.learn.fmce.epoch_steps[-1]
        counts = step.fmcs_loss[self.learn.fmce.counted & step.fmcs_loss.isfinite()]
        want = self.learn.loss if step.plain else .5*self.learn.loss + .5*counts.mean()
        self.seen.append(float((self.learn.loss_grad - want).abs()/want.abs()))

class Graph:
    "Stands for the progress bar, whose graph ShowGraphCallback draws."
    child = None
    def update_graph(self, graphs, x_bounds=None, y_bounds=None): self.drawn = [len(g[1]) for g in graphs]

@pytest.fixture(autouse=True)
def calm(monkeypatch):
    "No progress bars."
    monkeypatch.setattr(ProgressCallback, "before_fit", lambda self: setattr(self, "mbar", Graph()))
    for e in ("before_epoch", "before_train", "before_validate", "after_train", "after_validate", "after_batch", "after_fit"): monkeypatch.setattr(ProgressCallback, e, lambda self: None, raising=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
    plt.close("all")

@pytest.mark.parametrize("name, net, oracle", CASES)
def test_the_table(name, net, oracle, tmp_path):
    setting = SETTINGS[name]
    expected = setting.result[oracle] if isinstance(setting.result, dict) else setting.result
    learn = learner(setting, net, tmp_path)
    ral, formula = FMCECallback(.5, make_oracle(learn.model) if oracle == "fitted" else None, **setting.ral), Formula()
    learn.add_cbs([ral, formula, Diary()])
    n_cbs, loss_func = len(learn.cbs), learn.loss_func
    setting.fit(learn)
    h = ral.history
    last = h[h.module == h.module.iloc[-1]]
    if expected == "acts": assert (last.acted == last.steps).all()
    elif expected == "watches": assert (last.watched == last.steps).all() and h.fmcs.notna().all()
    elif expected == "fills": assert last.acted.iloc[0] > 0 and (last.acted == last.steps).iloc[1:].all()
    elif expected == "partly": assert (last.acted == last.steps-1).all() and (last.not_valid == 1).all()
    else: assert (last[expected] == last.steps).all()
    assert np.isfinite(formula.seen).all() and max(formula.seen) < (2e-2 if "autocast" in name else 1e-5)
    assert hook_count(learn.model) == 0 and learn.metrics == [] and len(learn.cbs) == n_cbs and learn.loss_func is loss_func
    setting.check(learn)

@pytest.mark.parametrize("name, net", sorted({(name, net) for name, net, _ in CASES}))
def test_recorded_in_every_setting_and_not_a_bit_is_changed(name, net, tmp_path):
    setting, after = SETTINGS[name], []
    for cbs in ([], [FMCSRecorder(n_images=16, n_snapshots=3)], [FMCECallback(0.)]):
        learn = learner(setting, net, tmp_path, cbs)
        setting.fit(learn)
        after.append((weights(learn.model), rng_state(), [list(v)[:2] for v in learn.recorder.values]))
        assert hook_count(learn.model) == 0
        if cbs and isinstance(cbs[0], FMCSRecorder): assert len(cbs[0].dataset) >= 2 and np.isfinite(cbs[0].dataset.steps.loss).all()
    for w, state, losses in after[1:]:
        assert_same(after[0][0], w)
        assert state == after[0][1] and losses == after[0][2]  # as many epochs, too

@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device; the CPU twin is the first row of the table")
@pytest.mark.parametrize("half", ["to_fp16", "to_bf16"])
@pytest.mark.parametrize("oracle", ["fitted", "universal"])
def test_cuda_mixed_precision(half, oracle, tmp_path):
    import fastai.callback.fp16
    learn = make_learner(path=tmp_path)
    learn.dls.to("cuda")
    learn.model.cuda()
    learn.logger = lambda *_: None
    ral = FMCECallback(.5, make_oracle(learn.model) if oracle == "fitted" else None)
    learn.add_cb(ral)
    getattr(learn, half)()
    learn.fit(2)
    assert (ral.history.acted == ral.history.steps).all() and np.isfinite(ral.history[["fmcs", "fmcs_loss", "gradient_ratio"]].to_numpy()).all()

@pytest.mark.parametrize("net", [None, "vit"])
def test_interpretation_is_untouched(net, tmp_path):
    from fastai.interpret import ClassificationInterpretation
    seen = []
    for own in (None, "fitted", "universal", "recorder"):
        learn = make_learner(net, path=tmp_path)
        if own == "recorder": learn.add_cb(FMCSRecorder())
        elif own: learn.add_cb(FMCECallback(.9, make_oracle(learn.model) if own == "fitted" else None))
        learn.logger = lambda *_: None
        seed_all(1)
        found = ClassificationInterpretation.from_learner(learn)
        (losses, items), confusion = found.top_losses(5, items=False), found.confusion_matrix()
        plt.close("all")
        found.plot_top_losses(4)
        found.plot_confusion_matrix()
        drawn = [(ax.get_title(), [im.get_array().tobytes() for im in ax.get_images()]) for n in plt.get_fignums() for ax in plt.figure(n).axes]
        seen.append((losses.tolist(), list(items), confusion.tolist(), found.most_confused(), drawn, rng_state()))
        seen[-1] += ({k: v.tolist() for k, v in weights(learn.model).items()},)
        assert hook_count(learn.model) == 0 and len(drawn) >= 5
    assert all(s == seen[0] for s in seen[1:])

@pytest.mark.parametrize("net", ["cnn", "vit"])
@pytest.mark.parametrize("oracle", ["fitted", "universal"])
def test_fine_tuning_freezes_the_body_and_trains_it_then(net, oracle, tmp_path):
    "The body's weights stay in the first fit, but for its norm layers, through which its maps carry gradient; RAL acts in both."
    class Look(Callback):
        def before_fit(self): self.body = [(m, p, p.detach().clone()) for m in self.model[0].modules() for p in m.parameters(recurse=False)]
        def after_fit(self):
            moved = {norm: [not torch.equal(p, was) for m, p, was in self.body if isinstance(m, norm_types) == norm and p.ndim] for norm in (True, False)}
            self.learn.moved.append({norm: any(ms) for norm, ms in moved.items()})
    seed_all(0)
    if net == "cnn": learn = vision_learner(digits_dls(size=32, n_train=64, bs=32), "test_resnet", pretrained=False, metrics=[], path=tmp_path)
    else: learn = Learner(digits_dls(size=16, n_train=64, bs=32), vit_parts(), splitter=lambda m: [list(p.parameters()) for p in m], metrics=[], path=tmp_path)
    learn.moved, learn.logger = [], lambda *_: None
    learn.add_cbs([FMCECallback(.9, make_oracle(learn.model, size=32 if net == "cnn" else 16) if oracle == "fitted" else None), Look()])
    learn.fine_tune(1, freeze_epochs=1)
    h = learn.fmce.history
    assert h.fit.unique().tolist() == [1, 2] and (h.acted == h.steps).all()
    assert learn.moved == [{True: True, False: False}, {True: True, False: True}]

class Head(nn.Module):
    "The head of a small ViT, which reads the class token."
    def __init__(self): super().__init__(); self.out = nn.Linear(16, 10)
    def forward(self, x): return self.out(x[:, 0])

class Body(nn.Module):
    "Its body, inside as `vision_learner` has it."
    def __init__(self): super().__init__(); self.model = make_model("vit")
    def forward(self, x): return self.model.forward_features(x)

def vit_parts():
    seed_all(0)
    return nn.Sequential(Body(), Head())

@pytest.mark.parametrize("how", ["wrapped", "in place", "one stage"])
@pytest.mark.parametrize("oracle", ["fitted", "universal"])
def test_a_network_that_was_compiled_before_is_told_and_helped(how, oracle, tmp_path):
    "Compiled in an earlier call, it fires no hooks: the first step says so, before any weight has moved; the advice in the message works."
    torch._dynamo.reset()
    learn = tensor_learner(path=tmp_path, metrics=[])
    given = make_oracle(learn.model) if oracle == "fitted" else None
    if how == "wrapped": learn.model = torch.compile(learn.model, backend="aot_eager")
    elif how == "in place": learn.model.compile(backend="aot_eager")
    else: learn.model.stage1.compile(backend="eager")
    learn.logger = lambda *_: None
    learn.fit(1, 1e-2)
    before = dict(weights(learn.model))
    learn.add_cb(FMCECallback(.5, given))
    with pytest.raises(TapError, match=f"No feature map arrived from {'stage1' if how == 'one stage' else 'stem, stage1, stage2'} in.*torch._dynamo.reset"): learn.fit(1, 1e-2)
    after = weights(learn.model)
    assert all(torch.equal(v, after[k]) for k, v in before.items() if "running" not in k and "num_batches" not in k) and hook_count(learn.model) == 0
    torch._dynamo.reset()
    learn.fit(1, 1e-2)
    assert learn.fmce.history.acted.tolist() == [4, 4, 4] and hook_count(learn.model) == 0

def test_every_row_of_the_table_names_a_test_that_is_there():
    here = Path(__file__).parent
    for *_, test in OTHERS:
        file, _, name = test.partition("::")
        assert f"\ndef {name}(" in (here/file).read_text(), test

def test_no_row_is_untested_but_those_that_need_a_gpu():
    for what, holds, *_ in OTHERS: assert ("untested" in holds) == ("need a GPU" in holds or "needs a GPU" in holds), what

def test_the_table_of_the_documentation_is_this_one():
    page = json.loads((Path(__file__).parents[1]/"nbs"/"integration.ipynb").read_text())
    assert table() in "".join("".join(c["source"]) + "\n" for c in page["cells"]), f"python tests/settings.py prints another table:\n{table()}"
