"Contracts with fastai: in every setting of the table RAL acts, watches or is refused as the table says, the loss is the written formula, and nothing is left."
import warnings

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from fastai.callback.core import Callback
from fastai.callback.progress import ProgressCallback
from timm.models.vision_transformer import VisionTransformer

from fmce_fastai.callback import FMCECallback
from fmce_fastai.oracle import FMCENet
from fmce_fastai.recorder import FMCSRecorder
from fmce_fastai.taps import hook_count
from helpers import assert_same, make_oracle, rng_state, seed_all, tensor_learner, weights
from settings import SETTINGS

CASES = [(name, net, oracle) for name, s in SETTINGS.items() for net in s.nets for oracle in s.oracles]


def learner(setting, net, path, cbs=()):
    learn = tensor_learner(path=path, metrics=[], cbs=[*setting.cbs(path), *cbs], **setting.learner)
    if net == "vit":
        seed_all(0)
        learn.model = VisionTransformer(img_size=16, patch_size=4, embed_dim=16, depth=3, num_heads=2, num_classes=10)
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
        step = self.learn.fmce._epoch[-1]
        counts = step["loss"][self.learn.fmce._counted & step["loss"].isfinite()]
        want = self.learn.loss if step["why"] else .5*self.learn.loss + .5*counts.mean()
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
    ral, formula = FMCECallback(.5, make_oracle(learn.model) if oracle == "fitted" else None), Formula()
    learn.add_cbs([ral, formula])
    n_cbs, loss_func = len(learn.cbs), learn.loss_func
    setting.fit(learn)
    h = ral.history
    last = h[h.module == h.module.iloc[-1]]
    if expected == "acts": assert (last.acted == last.steps).all()
    elif expected == "watches": assert (last.watched == last.steps).all() and h.fmcs.notna().all()
    elif expected == "partly": assert (last.acted == last.steps-1).all() and (last.not_valid == 1).all()
    else: assert (last[expected] == last.steps).all()
    assert max(formula.seen) < (2e-2 if "autocast" in name else 1e-5)
    assert hook_count(learn.model) == 0 and learn.metrics == [] and len(learn.cbs) == n_cbs and learn.loss_func is loss_func

@pytest.mark.parametrize("name, net", sorted({(name, net) for name, net, _ in CASES}))
def test_recorded_in_every_setting_and_not_a_bit_is_changed(name, net, tmp_path):
    setting, after = SETTINGS[name], []
    for cbs in ([], [FMCSRecorder(n_images=16, n_snapshots=3)], [FMCECallback(0.)]):
        learn = learner(setting, net, tmp_path, cbs)
        setting.fit(learn)
        after.append((weights(learn.model), rng_state()))
        assert hook_count(learn.model) == 0
        if cbs and isinstance(cbs[0], FMCSRecorder): assert len(cbs[0].dataset) >= 2 and np.isfinite(cbs[0].dataset.steps.loss).all()
    for w, state in after[1:]:
        assert_same(after[0][0], w)
        assert state == after[0][1]
