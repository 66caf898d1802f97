"Contracts of FMCECallback: gradients of the written formula, nothing touched where it must not act, nothing left behind however a fit ends."
import contextlib
import copy
import functools
import gc
import pickle
import pickletools
import sys
import warnings
import weakref
import zipfile
from pathlib import Path

import cloudpickle
import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from fastai.callback.core import (CancelBatchException, CancelEpochException, CancelFitException, CancelTrainException,
                                  CancelValidException, Callback)
from fastai.callback.progress import CSVLogger
from fastai.callback.schedule import SchedCos
from fastai.callback.tracker import EarlyStoppingCallback, SaveModelCallback, TerminateOnNaNCallback
from fastai.callback.training import BnFreeze, GradientAccumulation
from fastai.learner import load_learner
from torch import nn

import fmce_fastai
from fmce_fastai.train.callback import FMCECallback
from fmce_fastai.train.columns import ArmLast
from fmce_fastai.convergence.online import OnlineCQI
from fmce_fastai.oracle.files import tensors_sha256
from fmce_fastai.oracle.base import FMCENet, OracleError
from fmce_fastai.oracle.fitted import FittedFMCENet
from fmce_fastai.train.recorder import FMCSRecorder
from fmce_fastai.util.state import hook_count
from fmce_fastai.maps.plan import TapError
from fmce_fastai.maps.pool import pool_map
from fmce_fastai.maps.tap import FeatureTap
from fmce_fastai.maps.find import tap_plan
from helpers import Probe, RaiseAt, assert_same, make_learner, make_oracle, rng_state, seed_all, tensor_dls, tensor_learner, weights

pytestmark = [
    # fastai and torch say these about their own code, not about ours
    pytest.mark.filterwarnings("ignore:load_learner. uses Python's insecure pickle:UserWarning"),
    # matplotlib copies an image in NumPy 2's way, which fastai's tensors do not know
    pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy keyword:DeprecationWarning"),
    # optimizer states and exports that NumPy 1 wrote are read by fastai through the old name
    pytest.mark.filterwarnings("ignore:numpy.core is deprecated:DeprecationWarning"),
    # these fits are far too short to converge, and the recorder says so
    pytest.mark.filterwarnings("ignore::fmce_fastai.convergence.run.ConvergenceWarning"),
    # a fit that is broken off in its first step steps the scheduler's parameters without an optimizer's step
    pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step:UserWarning"),
]

OURS = str(Path(fmce_fastai.__file__).parent)
EVENTS = ["before_fit", "before_epoch", "before_train", "before_batch", "after_pred", "after_loss", "before_backward", "after_backward", "before_step",
          "after_step", "after_batch", "after_train", "before_validate", "after_validate", "after_epoch", "after_fit"]
COLUMNS = ["fmcs_loss", "fmcs", "fmcs_last"]


@pytest.fixture(autouse=True)
def quiet(monkeypatch, capsys):
    "No progress bars; the log goes where pytest takes it."
    import matplotlib.pyplot as plt
    from fastai.callback.progress import ProgressCallback
    monkeypatch.setattr(ProgressCallback, "before_fit", lambda self: None)
    for e in ("before_epoch", "before_train", "before_validate", "after_train", "after_validate", "after_batch", "after_fit"): monkeypatch.setattr(ProgressCallback, e, lambda self: None, raising=False)
    yield
    plt.close("all")


def silent(learn):
    learn.logger = lambda *_: None
    return learn

def with_ral(alpha=.5, arch=None, seed=0, oracle=None, learner=tensor_learner, cbs=(), ral=None, **kwargs):
    "A learner with a probe and FMCECallback; alpha None leaves the callback out."
    learn = learner(arch, seed, **kwargs)
    if oracle != "universal": oracle = make_oracle(learn.model) if oracle is None else oracle
    else: oracle = None
    if alpha is not None: learn.add_cb(FMCECallback(alpha, oracle, **(ral or {})))
    learn.add_cbs([Probe(), *cbs])
    return silent(learn)

def by_hand(model, oracle, x, y, alpha, kind="nll", counted=None, divide=1.):
    "Gradients of the written formula, weights and maps, by hooks of our own and autograd alone."
    maps, handles = {}, []
    for tap in oracle.plan:
        def hook(m, a, out, tap=tap): maps[tap.name] = tap.to_nchw(out) if tap.layout == "NLC" else out
        handles.append(model.get_submodule(tap.name).register_forward_hook(hook))
    try: task = F.cross_entropy(model(x), y)
    finally:
        for h in handles: h.remove()
    terms = []
    scores = oracle(maps, y)
    for j, name in enumerate(oracle.plan.names):
        if counted is not None and name not in counted: continue
        per_image = []
        for i in range(len(x)):
            if not scores.valid[i, j]: continue
            p = torch.softmax(scores.logits[i, j].double(), 0)
            per_image.append(-p[-1].log() if kind == "nll" else 1 - (p*torch.linspace(0, 1, len(p)).double()).sum())
        terms.append(sum(per_image)/len(per_image))
    aux = (sum(terms)/len(terms)).float()
    total = ((1-alpha)*task + alpha*aux)/divide
    params = list(model.parameters())
    grads = torch.autograd.grad(total, params, retain_graph=True, allow_unused=True)
    own = torch.autograd.grad(alpha*aux, list(maps.values()), retain_graph=True)
    full = torch.autograd.grad(total*divide, list(maps.values()))
    return dict(task=task.detach(), aux=aux.detach(), grads={n: g for (n, _), g in zip(model.named_parameters(), grads)}, own=dict(zip(maps, own)), full=dict(zip(maps, full)))


class Keep(Callback):
    "Keeps each training batch, the weights and the torch random state before it, and the gradients at the taps."
    order, run_valid = 2_000_000, False
    def __init__(self, names=()): self.batches, self.names, self.map_grads = [], names, []
    def before_batch(self):
        self.batches.append((self.xb[0].clone(), self.yb[0].clone(), weights(self.model), torch.get_rng_state()))
        self.now = {}
    def after_pred(self): pass


# ---- the gradient ---------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("alpha, kind, taps", [(.3, "nll", None), (.9, "nll", None), (.3, "gap", None), (.9, "gap", ["stage2"]), (.9, "nll", ["stem", "stage2"])])
def test_every_gradient_is_that_of_the_written_formula(alpha, kind, taps, monkeypatch):
    monkeypatch.setattr("fmce_fastai.train.callback.NORMS_EVERY", 2)  # the ratio is that of steps 0 and 2 of four
    keep = Keep()
    learn = with_ral(alpha, ral=dict(fmcs_loss=kind, taps=taps), cbs=[keep])
    learn.fit(1, 1e-2)
    probe, oracle, cb = learn.probe, learn.fmce.oracle, learn.fmce
    assert len(probe.grads) == len(keep.batches) == 4
    ratio = {n: [0., 0.] for n in oracle.plan.names}
    for step, ((x, y, w, rng), grads, loss) in enumerate(zip(keep.batches, probe.grads, probe.losses)):
        learn.model.load_state_dict(w); learn.model.train(); torch.set_rng_state(rng)
        want = by_hand(learn.model, oracle, x, y, alpha, kind, taps)
        assert torch.equal(loss, want["task"])
        for n, g in want["grads"].items(): torch.testing.assert_close(grads[n], g, rtol=2e-4, atol=1e-7)
        last = oracle.plan.names[-1]
        if step % 2: continue
        ratio[last][0] += float(want["own"][last].norm()); ratio[last][1] += float((want["full"][last]-want["own"][last]).norm())
    h = cb.history.set_index("module")
    assert h.gradient_ratio["stage2"] == pytest.approx(ratio["stage2"][0]/ratio["stage2"][1], rel=1e-3)
    assert (h.acted == 4).all() and (h.steps == 4).all() and np.allclose(h.alpha, alpha)
    assert h.gradient_ratio.notna().tolist() == [taps is None or n in taps for n in oracle.plan.names] or (h.gradient_ratio[[n for n in oracle.plan.names if taps and n not in taps]] == 0).all()


def test_gradients_at_the_maps_inside_the_fit():
    class MapGrads(Callback):
        order, run_valid = 3_000_000, False
        def before_batch(self):
            self.maps, self.hooks = {}, []
            for n in self.fmce.oracle.plan.names:
                def hook(m, a, out, n=n): out.retain_grad(); self.maps[n] = out
                self.hooks.append(self.learn.model.get_submodule(n).register_forward_hook(hook))
        def after_pred(self):
            for h in self.hooks: h.remove()
        def after_backward(self): self.found = {n: m.grad.clone() for n, m in self.maps.items()}; raise CancelFitException
    keep = Keep()
    learn = with_ral(.9, cbs=[keep, MapGrads()])
    learn.fit(1, 1e-2)
    x, y, w, rng = keep.batches[0]
    learn.model.load_state_dict(w); learn.model.train(); torch.set_rng_state(rng)
    want = by_hand(learn.model, learn.fmce.oracle, x, y, .9)["full"]
    for n, g in want.items(): torch.testing.assert_close(learn.map_grads.found[n], g, rtol=2e-4, atol=1e-8)


def test_a_real_network_and_images():
    keep = Keep()
    learn = silent(make_learner("test_resnet", size=32, n_train=64, bs=32))
    oracle = make_oracle(learn.model, size=32)
    learn.add_cbs([FMCECallback(.9, oracle), Probe(), keep])
    learn.fit(1, 1e-2)
    x, y, w, rng = keep.batches[-1]
    learn.model.load_state_dict(w); learn.model.train()
    want = by_hand(learn.model, oracle, x.as_subclass(torch.Tensor), y.as_subclass(torch.Tensor), .9)
    for n, g in want["grads"].items(): torch.testing.assert_close(learn.probe.grads[-1][n], g, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("first, arch, kind", [("ral", None, "fitted"), ("accumulation", None, "fitted"), ("ral", None, "universal"), ("accumulation", "vit", "fitted"), ("ral", "vit", "universal")])
def test_gradient_accumulation_divides_ral_like_the_task_loss(first, arch, kind):
    "Two batches of 16 accumulated: the mean of the two batches' RAL gradients, times the share that fastai gives each."
    keep = Keep()
    learn = with_ral(None, arch, cbs=[keep])
    oracle = make_oracle(learn.model) if kind == "fitted" else FMCENet.universal()
    cbs = [FMCECallback(.9, oracle), GradientAccumulation(32)]
    learn.add_cbs(cbs if first == "ral" else cbs[::-1])
    learn.fit(1, 1e-2)
    assert len(learn.probe.grads) == 2
    scorer = oracle if kind == "fitted" else oracle.on(tap_plan(learn.model, size=16))
    counted = None if kind == "fitted" else scorer.plan.names[-2:]
    total = {}
    for x, y, w, rng in keep.batches[:2]:
        learn.model.load_state_dict(w); learn.model.train(); torch.set_rng_state(rng)
        found = by_hand(learn.model, scorer, x, y, .9, counted=counted, divide=32/16)["grads"]
        for n, g in found.items(): total[n] = total.get(n, 0) + (torch.zeros_like(learn.model.get_parameter(n)) if g is None else g)
    for n, g in total.items(): torch.testing.assert_close(learn.probe.grads[0].get(n, torch.zeros_like(g)), g, rtol=2e-4, atol=1e-7 if arch is None else 1e-6)


# ---- alpha 0 and everything that is no training ---------------------------------------------------------------------

def seed_loaders(learn):
    "fastai's loaders have random states of their own."
    for i, dl in enumerate(learn.dls.loaders): dl.rng.seed(i)

def random_states(learn): return rng_state(), [dl.rng.getstate() for dl in learn.dls.loaders]

def outcome(learn):
    probe = learn.probe
    return weights(learn.model), torch.stack(probe.losses), probe.seen, random_states(learn), [list(v) for v in learn.recorder.values]

@pytest.mark.parametrize("arch, oracle", [(None, None), ("test_resnet", None), (None, "universal"), ("vit", None), ("vit", "universal")])
@pytest.mark.parametrize("ral", [dict(), dict(when=.5, fmcs_loss="gap")])
def test_alpha_0_changes_no_bit(arch, oracle, ral):
    "Weights, losses, batches, random state, predictions; only columns are added."
    plain, zero = with_ral(None, arch, learner=make_learner), with_ral(0., arch, oracle=oracle, learner=make_learner, ral=ral)
    for learn in (plain, zero): seed_loaders(learn); seed_all(3); learn.fit_one_cycle(2, 1e-2)
    a, b = outcome(plain), outcome(zero)
    assert_same(a[0], b[0])
    assert torch.equal(a[1], b[1]) and a[2] == b[2] and a[3] == b[3]
    assert [v[:2] for v in a[4]] == [v[:2] for v in b[4]]
    for p, q in zip(plain.get_preds(), zero.get_preds()): assert torch.equal(p, q)
    h = zero.fmce.history
    assert (h.watched == h.steps).all() and (h.acted == 0).all() and h.fmcs.notna().all() and h.gradient_ratio.isna().all()


def test_before_when_nothing_is_touched():
    plain, late = with_ral(None), with_ral(.9, ral=dict(when=.5))
    for learn in (plain, late): seed_all(3); learn.fit(2, 1e-2)
    assert torch.equal(torch.stack(plain.probe.losses[:5]), torch.stack(late.probe.losses[:5]))
    assert not torch.equal(torch.stack(plain.probe.losses[5:]), torch.stack(late.probe.losses[5:]))


def shown_results(learn):
    "What `show_results` draws: titles and pixels of every picture."
    import matplotlib.pyplot as plt
    plt.close("all")
    learn.show_results(max_n=4, show=False)
    return [(ax.get_title(), [im.get_array().tobytes() for im in ax.get_images()]) for ax in plt.gcf().axes]

@pytest.mark.parametrize("arch, kind", [(None, "fitted"), (None, "universal"), ("vit", "fitted"), ("vit", "universal"), (None, "recorder"), ("vit", "recorder")])
def test_validation_prediction_and_lr_find_are_untouched(arch, kind, tmp_path):
    "By the callback with either oracle, and by the recorder."
    out = {}
    for own in (False, True):
        learn = with_ral(None, arch, learner=make_learner, path=tmp_path/str(own))
        if own: learn.add_cb(FMCSRecorder(16, 4) if kind == "recorder" else FMCECallback(.9, make_oracle(learn.model) if kind == "fitted" else None))
        seed_loaders(learn)
        seen = [learn.validate(), learn.validate(), *learn.get_preds(), *learn.get_preds(ds_idx=0, with_input=True)[:2]]
        seed_all(1)
        seen += [*learn.tta(n=2), *learn.predict(learn.dls.valid_ds[0][0])[1:]]
        seed_all(1)
        seen += [shown_results(learn)]
        seed_all(2)
        seen += [list(learn.lr_find(num_it=6, show_plot=False)), learn.recorder.lrs, [float(l) for l in learn.recorder.losses], learn.validate()]
        assert hook_count(learn.model) == 0 and len(learn.metrics) == 1
        out[own] = seen, weights(learn.model), random_states(learn)
        if own: assert not (learn.fmcs_recorder.datasets if kind == "recorder" else len(learn.fmce.history))
    for p, q in zip(out[False][0], out[True][0]):
        assert torch.equal(p, q) if isinstance(p, torch.Tensor) else list(p) == list(q)
    assert_same(out[False][1], out[True][1])
    assert out[False][2] == out[True][2]


def test_validation_between_and_inside_fits():
    learn = with_ral(.9)
    learn.fit(1, 1e-2)
    n = len(learn.validate())
    learn.fit(1, 1e-2)
    assert len(learn.validate()) == n == 2
    class Nested(Callback):
        def after_epoch(self): self.inner = self.learn.get_preds(dl=self.dls.valid, inner=True)
    learn.add_cb(Nested())
    learn.fit(2, 1e-2)
    assert learn.fmce.history.groupby("fit").epoch.nunique().tolist() == [1, 1, 2]


# ---- losses and columns ---------------------------------------------------------------------------------------------

def test_recorded_losses_stay_the_task_loss():
    learn = with_ral(.9)
    class ValidLoss(Callback):
        def after_epoch(self):
            self.learn.model.eval()
            with torch.no_grad(): self.mine = float(F.cross_entropy(*map(torch.cat, zip(*[(self.learn.model(x), y) for x, y in self.dls.valid]))))
            self.learn.model.train()
    learn.add_cb(ValidLoss())
    learn.fit(1, 1e-2)
    values = dict(zip(learn.recorder.metric_names[1:], learn.recorder.values[-1]))
    assert values["valid_loss"] == pytest.approx(learn.valid_loss.mine, rel=1e-6)
    smooth = 0.
    for i, l in enumerate(learn.probe.losses): smooth = .98*smooth + .02*float(l)
    assert values["train_loss"] == pytest.approx(smooth/(1-.98**len(learn.probe.losses)), rel=1e-5)
    h = learn.fmce.history
    assert values["fmcs"] == pytest.approx(h.fmcs.mean()) and values["fmcs_last"] == pytest.approx(h.fmcs.iloc[-1]) and values["fmcs_loss"] == pytest.approx(h.fmcs_loss.mean())


def test_columns_come_after_valid_loss_and_go():
    learn = with_ral(.5)
    learn.fit(1)
    assert list(learn.recorder.metric_names) == ["epoch", "train_loss", "valid_loss", "accuracy", *COLUMNS, "time"]
    assert len(learn.metrics) == 1 and hook_count(learn.model) == 0 and not learn.cbs.filter(lambda c: isinstance(c, ArmLast))
    learn.remove_cb(learn.fmce)
    learn.fit(1)
    assert list(learn.recorder.metric_names) == ["epoch", "train_loss", "valid_loss", "accuracy", "time"]


def test_loggers_and_trackers(tmp_path):
    learn = with_ral(.5, path=tmp_path, cbs=[CSVLogger(), SaveModelCallback(monitor="fmcs", fname="best"), EarlyStoppingCallback(monitor="valid_loss", patience=5)])
    learn.fit(3, 1e-2)
    log = pd.read_csv(tmp_path/"history.csv")
    assert list(log.columns) == ["epoch", "train_loss", "valid_loss", "accuracy", *COLUMNS, "time"] and len(log) == 3
    assert (tmp_path/"models"/"best.pth").is_file()
    mean = learn.fmce.history.groupby("epoch").fmcs.mean()
    assert log.fmcs.to_numpy() == pytest.approx(mean.to_numpy(), rel=1e-5)
    learn = with_ral(.5, cbs=[EarlyStoppingCallback(monitor="fmcs", patience=1, min_delta=10.)])
    learn.fit(8, 1e-2)
    assert len(learn.recorder.values) == 2 and hook_count(learn.model) == 0 and len(learn.metrics) == 1


# ---- what the steps that stay plain say -----------------------------------------------------------------------------

def test_a_frozen_body_is_told():
    plain, learn = with_ral(None), with_ral(.9)
    for l in (plain, learn):
        for n, p in l.model.named_parameters(): p.requires_grad_(n.startswith("head"))
    seed_all(3)
    plain.fit(1)
    seed_all(3)
    with pytest.warns(UserWarning, match="RAL acted in no step.*4 steps no_gradient"): learn.fit(1)
    assert_same(weights(plain.model), weights(learn.model))
    h = learn.fmce.history
    assert (h.no_gradient == 4).all() and (h.acted == 0).all() and h.fmcs.notna().all()


class Spoiled(nn.Conv2d):
    "NaN for the images in `bad`, which pass no gradient back."
    bad = ()
    def forward(self, x): return super().forward(x).masked_fill(torch.tensor([i in self.bad for i in range(len(x))])[:, None, None, None], float("nan"))

class SideNet(nn.Module):
    "A network with a side branch whose map can be made NaN, with gradient, without harm to the output."
    def __init__(self):
        super().__init__()
        self.stem, self.side, self.head = nn.Conv2d(3, 6, 3, 2, 1), Spoiled(6, 5, 1), nn.Linear(6, 10)
    def forward(self, x):
        z = self.stem(x)
        self.side(z)
        return self.head(z.mean((2, 3)))


def test_nan_maps_are_not_scored():
    "A batch of NaN maps leaves the step plain; single NaN images are left out of the mean."
    out = {}
    for alpha, bad in [(None, range(16)), (.9, range(16)), (.9, [0, 3])]:
        seed_all(0)
        learn = silent(tensor_learner())
        seed_all(0)
        learn.model = SideNet()
        learn.add_cb(Probe())
        if alpha: learn.add_cb(FMCECallback(alpha, make_oracle(learn.model, taps=["side"])))
        learn.model.side.bad = list(bad)
        if alpha and len(bad) == 16:
            with pytest.warns(UserWarning, match="4 steps not_valid"): learn.fit(1, 1e-2)
        else: learn.fit(1, 1e-2)
        out[alpha, len(bad)] = learn
    assert_same(weights(out[None, 16].model), weights(out[.9, 16].model))
    h = out[.9, 16].fmce.history
    assert (h.not_valid == 4).all() and h.fmcs.isna().all() and h.fmcs_loss.isna().all()
    h = out[.9, 2].fmce.history
    assert (h.acted == 4).all() and h.fmcs.notna().all()
    assert all(torch.isfinite(p).all() for p in out[.9, 2].model.parameters())


def test_a_loss_that_is_not_finite_stays_as_it_is():
    seen = []
    class Break(Callback):
        order, run_valid = 0, False
        def after_loss(self):
            if self.iter == 1: self.learn.loss_grad = self.learn.loss_grad*float("inf")
    class See(Callback):
        order, run_valid = 800, False
        def after_loss(self): seen.append(float(self.loss_grad.detach()))
        def before_backward(self):
            if self.iter == 1: raise CancelBatchException
    learn = with_ral(.9, cbs=[Break(), See()])
    learn.fit(1)
    h = learn.fmce.history
    assert (h.not_finite == 1).all() and (h.acted == 3).all() and seen[1] == float("inf") and np.isfinite(seen[2])


def test_history_counts_what_a_nan_fit_did():
    "TerminateOnNaN ends the fit inside a batch: what was scored until then is in the history."
    class Break(Callback):
        order, run_valid = 0, False
        def after_loss(self):
            if self.epoch == 1 and self.iter == 2: self.learn.loss = self.learn.loss*float("nan"); self.learn.loss_grad = self.learn.loss
    learn = with_ral(.9, cbs=[Break(), TerminateOnNaNCallback()])
    learn.fit(3)
    h = learn.fmce.history
    assert h.groupby("epoch").steps.first().tolist() == [4, 3] and h.groupby("epoch").not_finite.first().tolist() == [0, 1]


def test_history_keeps_epochs_apart_when_one_is_cancelled():
    learn = with_ral(.9, cbs=[RaiseAt("after_batch", CancelEpochException(), skip=1, training=True)])
    learn.fit(2)
    assert learn.fmce.history.groupby("epoch").steps.first().to_dict() == {0: 2, 1: 4}


# ---- when and alpha -------------------------------------------------------------------------------------------------

def acted_steps(learn, n_epoch=2, **kwargs):
    steps = []
    class See(Callback):
        order, run_valid = FMCECallback.order+.5, False
        def after_loss(self): steps.append(float(self.loss_grad.detach()) != float(self.loss.detach()))
    learn.add_cb(See())
    learn.fit(n_epoch, 1e-2, **kwargs)
    return steps

@pytest.mark.parametrize("when, expected", [("auto", range(8)), (0., range(8)), (.5, range(4, 8)), ((.25, .6), range(2, 5)), ([.25, .6], range(2, 5)), (1., []),
                                            (lambda learn: learn.epoch == 1, range(4, 8))])
def test_when(when, expected):
    learn = with_ral(.9, ral=dict(when=when))
    never = pytest.warns(UserWarning, match="no training step of this fit began") if not expected else contextlib.nullcontext()
    with never: assert [i for i, on in enumerate(acted_steps(learn)) if on] == list(expected)
    assert learn.fmce.history.groupby("epoch").acted.first().sum() == len(expected)


def test_when_converged_follows_the_online_cqi_of_the_task_loss():
    class Plateau(Callback):
        order, run_valid = 0, False
        def after_loss(self):
            t = self.epoch*4 + self.iter
            self.learn.loss = self.learn.loss*0 + 1 + 2*np.exp(-t/4).item()
            self.learn.loss_grad = self.learn.loss
    learn = with_ral(.9, ral=dict(when="converged"), cbs=[Plateau()])
    on = acted_steps(learn, 16)
    cqi, want = OnlineCQI(4), []
    for t in range(64):
        want.append(cqi.converged)
        cqi.update(float(torch.tensor(1 + 2*np.exp(-t/4))))
    assert on == want and not on[0] and on[-1]


def test_alpha_may_follow_a_schedule():
    learn = with_ral(SchedCos(0., .9))
    learn.fit(2)
    want = [SchedCos(0., .9)(t/8) for t in range(8)]
    got = learn.fmce.history.groupby("epoch").alpha.first()
    assert got.tolist() == pytest.approx([np.mean(want[:4]), np.mean(want[4:])])
    with pytest.raises(ValueError, match="alpha is 1.5"): with_ral(lambda p: 1.5).fit(1)


@pytest.mark.parametrize("kwargs, error, words", [
    (dict(alpha=-.1), ValueError, "alpha is -0.1"), (dict(alpha=1.1), ValueError, "alpha is 1.1"), (dict(alpha=float("nan")), ValueError, "alpha is nan"),
    (dict(alpha="0.9"), TypeError, "alpha is '0.9'"), (dict(alpha=None), TypeError, "alpha is None"), (dict(alpha=True), TypeError, "alpha is True"),
    (dict(when="late"), ValueError, "when is 'late'"), (dict(when=1.5), ValueError, "when is 1.5"), (dict(when=(.6, .2)), ValueError, "start is not after"),
    (dict(when=float("nan")), ValueError, "when is nan"), (dict(when=(.1, .2, .3)), ValueError, "when is"), (dict(fmcs_loss="mse"), ValueError, "'nll' and 'gap'"),
    (dict(targets="labels"), ValueError, "targets is 'labels'"), (dict(oracle=nn.Linear(2, 2)), TypeError, "oracle is a Linear; accepted are an FMCENet")])
def test_bad_arguments_are_named(kwargs, error, words):
    with pytest.raises(error, match=words): FMCECallback(**kwargs)


def test_alpha_1_warns():
    with pytest.warns(UserWarning, match="alpha is 1"): FMCECallback(1.)


def test_oracles_that_do_not_fit_are_refused_before_the_first_step():
    learn = silent(tensor_learner())
    before, rng = weights(learn.model), rng_state()
    other = make_oracle(tensor_learner("test_resnet").model, size=32)
    wide = FittedFMCENet(make_oracle(learn.model).plan, width=8)
    wide.plan = type(wide.plan).from_dict({**wide.plan.to_dict(), "taps": [{**t, "channels": t["channels"]+1} for t in wide.plan.to_dict()["taps"]]})
    torch.set_rng_state(torch.tensor(rng[2], dtype=torch.uint8))
    lost = FMCECallback(oracle=make_oracle(learn.model))
    lost.oracle = None  # as after load_learner
    for cb, error, words in [(lost, OracleError, "lost its oracle.*FMCENet.load"), (FMCECallback(oracle=other), TapError, "has no module"),
                             (FMCECallback(oracle=make_oracle(learn.model), taps=["nowhere"]), TapError, "nowhere.*stem, stage1, stage2"),
                             (FMCECallback(oracle=wide), OracleError, "channels")]:
        with pytest.raises(error, match=words): learn.fit(1, cbs=cb)
        assert hook_count(learn.model) == 0
        if words != "channels": assert_same(before, weights(learn.model))


def test_an_oracle_of_other_channels_changes_no_weight():
    learn = silent(tensor_learner())
    before = {n: p.clone() for n, p in learn.model.named_parameters()}
    oracle = make_oracle(learn.model)
    oracle.plan = type(oracle.plan).from_dict({**oracle.plan.to_dict(), "taps": [{**t, "channels": t["channels"]+1} for t in oracle.plan.to_dict()["taps"]]})
    with pytest.raises(OracleError): learn.fit(1, cbs=FMCECallback(.5, oracle))
    assert_same(before, dict(learn.model.named_parameters()))


# ---- the oracle -----------------------------------------------------------------------------------------------------

def test_the_oracle_does_not_move():
    learn = with_ral(.9)
    oracle = learn.fmce.oracle
    before = tensors_sha256(oracle.state_dict())
    learn.fit_one_cycle(2, 1e-1)
    assert tensors_sha256(oracle.state_dict()) == before and not oracle.training
    mine = {id(p) for p in oracle.parameters()}
    assert not any(id(p) in mine for g in learn.opt.param_lists for p in g)
    assert all(not p.requires_grad and p.grad is None for p in oracle.parameters())
    assert not any(id(p) in mine for p in learn.model.parameters())


def test_an_unfrozen_oracle_is_frozen_by_the_callback():
    learn = tensor_learner()
    oracle = FittedFMCENet(make_oracle(learn.model).plan, width=8)
    learn = with_ral(.9, oracle=oracle)
    before = tensors_sha256(oracle.state_dict())
    learn.fit(1, 1e-1)
    assert tensors_sha256(oracle.state_dict()) == before and oracle.frozen and all(not p.requires_grad and p.grad is None for p in oracle.parameters())


# ---- every way a fit can end ----------------------------------------------------------------------------------------

ERRORS = [RuntimeError("another callback"), KeyboardInterrupt(), CancelBatchException(), CancelTrainException(), CancelValidException(), CancelEpochException(), CancelFitException()]

def shape_of(learn):
    "What a fit's table looks like, and how many values `validate` gives."
    return list(learn.recorder.metric_names), [len(v) for v in learn.recorder.values], len(learn.validate())

@functools.cache
def broken_off_without_us(arch, event, error, order):
    "The same of a learner that has only the callback which raises; what oracle is meant plays no role."
    return broken_off(with_ral(None, arch, n=32), event, error("again"), order)

def broken_off(learn, event, error, order):
    "After a fit that `error` has ended, or cut short: random states, and the modules' modes."
    learn.add_cb(RaiseAt(event, error, skip=1 if "batch" in event or "step" in event else 0, order=order))
    seed_all(4)
    try: learn.fit(2)
    except type(error): pass
    except AttributeError as e: assert "no attribute 'log'" in str(e) # fastai's Recorder after a cancelled before_epoch
    return rng_state(), [m.training for m in learn.model.modules()]

# Every event and error, after ours, with the small CNN and a fitted oracle. Before ours, and with ViT or the universal oracle, every second one in turn: each meets every event and every error
PAIRS = [(i+j, event, error) for i, event in enumerate(EVENTS) for j, error in enumerate(ERRORS)]
ENDS = [(event, error, 99, None, None) for _, event, error in PAIRS]
ENDS += [(event, error, -5, None, None) for k, event, error in PAIRS if k % 2]
ENDS += [(event, error, 99, *(("vit", "universal"), (None, "universal"), ("vit", None))[k//2 % 3]) for k, event, error in PAIRS if k % 2 == 0]

@pytest.mark.parametrize("event, error, order, arch, oracle", ENDS, ids=lambda o: type(o).__name__ if isinstance(o, BaseException) else None)
def test_nothing_is_left_however_a_fit_ends(event, error, order, arch, oracle):
    "An exception out of another callback, at any event and on either side of ours: no hook stays, random state and modes are as without us, and the next fit is as a fresh learner's."
    learn = with_ral(.5, arch, oracle=oracle, cbs=[FMCSRecorder(16, 3)], n=32)
    left = broken_off(learn, event, error, order)
    if order == 99: assert left == broken_off_without_us(arch, event, type(error), order)
    assert hook_count(learn.model) == 0
    learn.fit(1)  # a next fit of two epochs: after Ctrl-C, below
    assert hook_count(learn.model) == 0 and len(learn.metrics) == 1
    assert not [c for c in learn.cbs if isinstance(c, ArmLast)]
    assert shape_of(learn) == (["epoch", "train_loss", "valid_loss", "accuracy", *COLUMNS, "time"], [6], 2)
    last = learn.fmce.history.query("fit == fit.max()")
    assert last.groupby("epoch").steps.first().tolist() == [2] and (last.acted == 2).all()
    assert len(learn.fmcs_recorder.dataset.steps) == 2
    assert learn.fmce.feature_tap is None


class Breaker(nn.Module):
    "Raises `error` at a chosen forward in training."
    def __init__(self, error, after=2): super().__init__(); self.error, self.after = error, after
    def forward(self, x):
        if self.training and torch.is_grad_enabled():
            self.after -= 1
            if self.after == 0: raise self.error
        return x

READ, read = [], FeatureTap._read  # weak references to the maps that were read; here, since a hook that is exported must be found by its name


def noted(self, tap, module, args, out):
    read(self, tap, module, args, out)
    if torch.is_grad_enabled(): READ.append(weakref.ref(out))


@pytest.mark.parametrize("error", [RuntimeError("out of memory"), KeyboardInterrupt()], ids=lambda e: type(e).__name__)
@pytest.mark.parametrize("then", ["fit", "validate", "export", "get_preds", "detach", "callback first"])
@pytest.mark.parametrize("arch, kind", [(None, "fitted"), ("vit", "universal")])
def test_an_error_inside_the_networks_forward(error, then, arch, kind, tmp_path):
    "Random state, modes and weights are those of a learner without us; what is left goes, whatever comes next."
    def breaking():
        learn = silent(make_learner(arch, path=tmp_path))
        if arch: learn.model.norm = nn.Sequential(learn.model.norm, Breaker(error, 1))
        else: learn.model.drop = nn.Sequential(learn.model.drop, Breaker(error, 1))
        seed_all(5)
        return learn
    def state(learn): return rng_state(), [m.training for m in learn.model.modules()]
    bare = breaking()
    with pytest.raises(type(error)): bare.fit(1)
    learn = breaking()
    breaker = learn.model.get_submodule("norm.1" if arch else "drop.1")
    oracle = make_oracle(learn.model) if kind == "fitted" else None
    READ.clear()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FeatureTap, "_read", noted)
        learn.add_cb(FMCECallback(.5, oracle))
        with pytest.raises(type(error)): learn.fit(1)
    assert state(learn) == state(bare)
    assert_same(weights(learn.model), weights(bare.model))
    error.__traceback__ = error.__context__ = None  # it would hold the frames, as a notebook does till the next error
    learn.xb, learn.yb, learn.pred, learn.loss, learn.loss_grad = (), (), None, None, None  # what fastai keeps of the step before
    gc.collect()
    assert READ and not any(m() is not None for m in READ) and not learn.fmce.feature_tap.maps and not learn.fmce.feature_tap._edges  # no map is held
    left = hook_count(learn.model)
    assert left == 0 if isinstance(error, RuntimeError) else left == len(learn.fmce.feature_tap.plan) + 2
    breaker.error = None
    if then == "fit": learn.fit(1); assert learn.fmce.history.acted.tolist()[-1] == 4
    elif then == "validate": assert len(learn.validate()) == 2
    elif then == "get_preds": learn.get_preds()
    elif then == "detach": learn.fmce.detach(); assert not [c for c in learn.cbs if isinstance(c, ArmLast)]
    elif then == "callback first":  # pickled before the network
        again = cloudpickle.loads(cloudpickle.dumps(learn.fmce)).learn
        assert hook_count(again.model) == hook_count(learn.model) == 0
        return
    else:
        learn.export("a.pkl")
        again = load_learner(tmp_path/"a.pkl")
        assert hook_count(again.model) == hook_count(learn.model) == 0
        again.predict(learn.dls.valid_ds[0][0])
        assert len(again.metrics) == 1 and not [c for c in again.cbs if isinstance(c, ArmLast)]
        return
    assert hook_count(learn.model) == 0 and len(learn.metrics) == 1


class Interrupt:
    "Ctrl-C at the `at`-th line that is executed in the package's own files."
    def __init__(self, at): self.at, self.lines, self.where = at, 0, None
    def __enter__(self): sys.settrace(self._call)
    def __exit__(self, *_): sys.settrace(None)
    def _call(self, frame, event, arg): return self._line if frame.f_code.co_filename.startswith(OURS) else None
    def _line(self, frame, event, arg):
        if event == "line":
            self.lines += 1
            if self.lines == self.at:
                self.where = f"{frame.f_code.co_filename}:{frame.f_lineno}"
                raise KeyboardInterrupt
        return self._line

def interrupted(arch, kind, at):
    learn = with_ral(.5, arch, oracle=kind, cbs=[FMCSRecorder(16, 3)], n=32, ral=dict(memory=8) if kind == "universal" else None)
    seed_all(6)
    ctrl_c = Interrupt(at)
    try:
        with ctrl_c: learn.fit(2)
    except KeyboardInterrupt: pass
    return learn, ctrl_c

@pytest.mark.parametrize("arch, kind", [(None, None), (None, "universal"), ("vit", None), ("vit", "universal")])
def test_ctrl_c_at_any_line_of_ours(arch, kind):
    "At 12 lines of the thousands that callback, recorder, tap and oracle execute in a fit, evenly spread: after it the next fit is whole, and nothing is left."
    for _ in range(2): learn, ctrl_c = interrupted(arch, kind, -1)  # the first fit of a process executes more
    assert ctrl_c.lines > 1000
    for at in np.linspace(1, ctrl_c.lines, 12).round().astype(int):
        learn, ctrl_c = interrupted(arch, kind, at)
        assert ctrl_c.where is not None
        assert hook_count(learn.model) in (0, *range(len(learn.fmce.feature_tap.plan) + 3 if learn.fmce.feature_tap is not None and learn.fmce.feature_tap.plan is not None else 0)), ctrl_c.where
        learn.validate()
        assert hook_count(learn.model) == 0 and not learn.model.training, ctrl_c.where
        learn.fit(2)
        assert hook_count(learn.model) == 0 and len(learn.metrics) == 1 and not [c for c in learn.cbs if isinstance(c, ArmLast)], ctrl_c.where
        assert shape_of(learn) == (["epoch", "train_loss", "valid_loss", "accuracy", *COLUMNS, "time"], [6, 6], 2), ctrl_c.where
        last = learn.fmce.history.query("fit == fit.max()")
        assert last.groupby("epoch").steps.first().tolist() == [2, 2] and (last.acted == 2).all(), ctrl_c.where
        assert len(learn.fmcs_recorder.dataset.steps) == 4, ctrl_c.where
        assert all(p.isfinite().all() for p in learn.model.parameters()) and not any(p.requires_grad for p in learn.fmce.oracle.parameters()), ctrl_c.where


def test_ctrl_c_at_every_line_of_a_read_forward_leaves_no_hook():
    model = tensor_learner().model
    tap, x = FeatureTap(tap_plan(model, size=16)), torch.randn(2, 3, 16, 16)
    for at in range(1, 1000):
        ctrl_c = Interrupt(at)
        try:
            with ctrl_c, tap.on(model): model(x)
        except KeyboardInterrupt: pass
        assert hook_count(model) == 0, ctrl_c.where
        if ctrl_c.where is None: break
    assert 50 < ctrl_c.lines == at - 1

def test_a_copy_of_a_network_with_hooks_that_ctrl_c_left_heals_itself():
    "By `copy.deepcopy`, as averaging callbacks do it, or by a pickle of the network alone: its first forward takes them away."
    model = tensor_learner().model
    model.drop = nn.Sequential(model.drop, Breaker(KeyboardInterrupt(), after=1))
    tap, x = FeatureTap(tap_plan(model, size=16)).arm(model), torch.randn(2, 3, 16, 16)
    with pytest.raises(KeyboardInterrupt): model(x)
    model.drop[1].error = None
    for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert hook_count(again) == 5
        again(x)
        assert hook_count(again) == 0
    assert hook_count(model) == 5
    tap.detach()
    assert hook_count(model) == 0


@pytest.mark.parametrize("arch, kind", [(None, None), ("vit", "universal")])
def test_save_and_load(arch, kind, tmp_path):
    "The file knows nothing of the callback, and training goes on after it as it would have."
    sizes, after = [], []
    for alpha in (None, .5):
        learn = with_ral(alpha, arch, oracle=kind, path=tmp_path)
        learn.fit(1)
        learn.save("a")
        sizes.append((tmp_path/"models"/"a.pth").stat().st_size)
    learn.fit(1)
    after.append(weights(learn.model))
    learn.load("a")
    assert learn.fmce.oracle is not None and hook_count(learn.model) == 0
    state = torch.load(tmp_path/"models"/"a.pth", weights_only=False)
    assert set(state["model"]) == set(weights(learn.model)) and sizes[0] == sizes[1]
    learn.fit(1)
    assert learn.fmce.history.fit.max() == 3 and learn.fmce.history.acted.iloc[-1] == 4


def test_taking_the_callback_away_after_a_broken_fit():
    "remove_cb after Ctrl-C, as a notebook user does: the next fit is a plain one."
    learn = with_ral(.5, cbs=[RaiseAt("after_pred", KeyboardInterrupt(), skip=1)])
    with pytest.raises(KeyboardInterrupt): learn.fit(1)
    learn.remove_cb(learn.fmce)
    learn.fit(1)
    assert list(learn.recorder.metric_names) == ["epoch", "train_loss", "valid_loss", "accuracy", "time"]
    assert hook_count(learn.model) == 0 and not [c for c in learn.cbs if isinstance(c, ArmLast)]


def test_a_callback_given_to_fit_goes_with_it():
    learn = silent(tensor_learner())
    oracle = make_oracle(learn.model)
    learn.fit(1, cbs=FMCECallback(.5, oracle))
    with pytest.raises(RuntimeError): learn.fit(1, cbs=[FMCECallback(.5, oracle), RaiseAt("after_loss", RuntimeError("x"), skip=1)])
    n = len(learn.cbs)
    learn.fit(1)
    assert list(learn.recorder.metric_names) == ["epoch", "train_loss", "valid_loss", "accuracy", "time"] and hook_count(learn.model) == 0 and len(learn.validate()) == 2


def test_quiet_training_is_training():
    learn = with_ral(.5)
    with learn.no_bar(), learn.no_logging(): learn.fit(1)
    assert len(learn.fmce.history) == 3
    with learn.no_mbar(), learn.no_logging(): learn.fit(1)
    assert len(learn.fmce.history) == 6


# ---- the ways people fit --------------------------------------------------------------------------------------------

def test_fit_one_cycle_and_fine_tune_and_construction():
    from fastai.learner import Learner
    from helpers import TinyNet
    seed_all(0)
    model = TinyNet()
    learn = silent(Learner(tensor_dls(), model, loss_func=nn.CrossEntropyLoss(), splitter=lambda m: [list(m.stem.parameters())+list(m.stage1.parameters()), list(m.stage2.parameters())+list(m.head.parameters())],
                           cbs=FMCECallback(.5, make_oracle(model))))
    learn.fine_tune(2, freeze_epochs=1)
    learn.fit_one_cycle(1)
    h = learn.fmce.history
    assert h.groupby("fit").epoch.nunique().tolist() == [1, 2, 1] and (h.acted == 4).all() and len(learn.metrics) == 0


def test_a_vision_learner_with_a_frozen_body():
    from fastai.vision.learner import vision_learner
    from fmce_fastai.data.digits import digits_dls
    for train_bn in (True, False):
        seed_all(0)
        learn = silent(vision_learner(digits_dls(size=32, n_train=64, bs=32), "test_resnet", pretrained=False, train_bn=train_bn))
        learn.freeze()
        learn.add_cb(FMCECallback(.9, make_oracle(learn.model, size=32)))
        if train_bn: learn.fit(1)
        else:
            with pytest.warns(UserWarning, match="the body is frozen. Call learn.unfreeze"): learn.fit(1)
        h = learn.fmce.history
        assert (h.acted == (2 if train_bn else 0)).all() and (h.no_gradient == (0 if train_bn else 2)).all()
    learn.unfreeze()
    learn.fit(1)
    assert learn.fmce.history.acted.iloc[-1] == 2


@pytest.mark.parametrize("kwargs", [dict(), dict(alpha=SchedCos(0., .9)), dict(alpha=lambda p: .5, when=lambda learn: True), dict(oracle=None), dict(oracle=None, memory=200)], ids=["plain", "schedule", "lambdas", "universal", "memory"])
@pytest.mark.parametrize("fitted", [False, True])
@pytest.mark.parametrize("arch", ["test_resnet", "vit"])
def test_export_holds_no_oracle_and_no_hook(tmp_path, kwargs, fitted, arch):
    "With the callback; and without it nothing of the package is in the file, which can be read where that is not installed."
    size = {}
    for ral in (False, True):
        learn = silent(make_learner(arch, path=tmp_path))
        oracle = make_oracle(learn.model, width=256)
        if ral: learn.add_cbs([FMCECallback(**{"alpha": .5, "oracle": oracle, **kwargs}), FMCSRecorder(16, 3)])
        oracle = learn.fmce.oracle if ral else oracle
        if fitted: learn.fit(1)
        learn.export(f"{ral}.pkl")
        size[ral] = (tmp_path/f"{ral}.pkl").stat().st_size
    assert (oracle.n_params*4 > 300_000 or oracle.plan is None) and abs(size[True]-size[False]) < 100_000
    again = load_learner(tmp_path/"True.pkl")
    assert hook_count(again.model) == 0 and again.fmce.oracle is None and not again.fmcs_recorder.datasets
    img = learn.dls.valid_ds[0][0]
    assert torch.equal(again.predict(img)[2], learn.predict(img)[2]) and learn.fmce.oracle is oracle
    learn.remove_cbs([learn.fmce, learn.fmcs_recorder])
    learn.export("bare.pkl")
    with zipfile.ZipFile(tmp_path/"bare.pkl") as z: named = {arg.split(" ")[0] for part in z.namelist() if part.endswith(".pkl") for _, arg, _ in pickletools.genops(z.read(part)) if isinstance(arg, str)}
    assert {n for n in named if n.startswith("fmce_fastai")} == {"fmce_fastai.data.loaders"}  # these images are the package's own


def test_a_copy_by_pickle_holds_no_map():
    learn = with_ral(.5)
    learn.fit(1)
    assert len(pickle.dumps(learn.fmce.__getstate__()["_history"].rows)) < 10_000 and learn.fmce.__getstate__()["oracle"] is None


def test_autocast_around_the_forward():
    "The CPU twin of mixed precision: maps in bfloat16, the oracle in float32, the task loss as it was."
    class Cast(Callback):
        order, run_valid = FMCECallback.order-1, False
        def before_batch(self): self.ctx = torch.autocast("cpu", torch.bfloat16); self.ctx.__enter__()
        def before_backward(self): self.ctx.__exit__(None, None, None)
    learn = with_ral(.9, cbs=[Cast()])
    learn.fit(1)
    h = learn.fmce.history
    assert (h.acted == 4).all() and np.isfinite(h[["fmcs", "fmcs_loss", "gradient_ratio"]].to_numpy()).all()


def test_mixup_keeps_its_loss():
    from fastai.callback.mixup import MixUp
    learn = silent(make_learner(cbs=MixUp()))
    learn.add_cb(FMCECallback(.5, make_oracle(learn.model)))
    learn.fit(1)
    assert (learn.fmce.history.acted == 4).all()


def test_an_oracle_of_a_run_that_did_not_converge_is_warned_of():
    learn = with_ral(.5)
    learn.fmce.oracle.card = dict(run=dict(status="not converged"))
    with pytest.warns(UserWarning, match="never saw a converged map"): learn.fit(1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        learn.fit(1)  # said once
        other = with_ral(.5)
        other.fmce.oracle.card = dict(run=dict(status="converged"))
        other.fit(1)


def test_a_memory_beside_a_fitted_oracle_is_refused_before_the_first_step():
    learn = tensor_learner()
    with pytest.raises(ValueError, match="scores each image by itself"): FMCECallback(.5, make_oracle(learn.model), memory=9)
    silent(learn).add_cb(FMCECallback(.5, memory=9))
    learn.fmce.oracle = make_oracle(learn.model)
    before = weights(learn.model)
    with pytest.raises(OracleError, match="learn.fmce.memory = 0"): learn.fit(1)
    assert_same(before, weights(learn.model))
