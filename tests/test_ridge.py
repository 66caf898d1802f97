"Contracts of the ridge oracle: its scores against refits, one per image; a memory bank without an image's own copies; what FMCECallback, reports and studies do with it."
import os
import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from fastai.callback.core import Callback
from fastai.callback.mixup import MixUp
from torch.testing import assert_close

from fmce_fastai.hub.transfer import local_file
from fmce_fastai.maps.find import tap_plan
from fmce_fastai.oracle.base import as_oracle, FMCENet
from fmce_fastai.oracle.files import OracleFileError
from fmce_fastai.oracle.kernels import cosines
from fmce_fastai.oracle.ridge import channel_cosines, left_out_scores, RidgeFMCENet
from fmce_fastai.report.report import fmce_report
from fmce_fastai.study.arms import ARMS
from fmce_fastai.study.run import run_study
from fmce_fastai.study.settings import Study
from fmce_fastai.train.callback import FMCECallback
from fmce_fastai.train.losses import fmcs_loss
from fmce_fastai.train.memory import MemoryBank
from helpers import make_learner, make_model, tensor_learner


def clustered(n=40, classes=5, channels=12, grid=3, spread=1., seed=0):
    "Maps of images about a centre per class, and their labels."
    g = torch.Generator().manual_seed(seed)
    y = torch.arange(n) % classes
    centres = torch.randn(classes, channels, 1, 1, generator=torch.Generator().manual_seed(99))
    return centres[y] + spread*torch.randn(n, channels, grid, grid, generator=g), y

def vectors_of(y): return F.one_hot(y).double() if y.ndim == 1 else y.double()

def refitted(fmap, y, penalty, n=None):
    "The first n left-out errors and predictions, by a ridge regression per image on all other images; in double precision, from the formula."
    x = fmap.double().mean((2, 3))
    x = x - x.mean(0)
    power = x.square().sum(1)
    x = x/(power + 1e-3*power.mean()).sqrt()[:, None]  # the length, kept away from 0
    y = vectors_of(y)
    y = y - y.mean(0)
    predicted = []
    for i in range(n or len(x)):
        others = torch.arange(len(x)) != i
        a, b = x[others], y[others]
        w = torch.linalg.solve(a.T @ a + penalty*torch.eye(a.shape[1], dtype=a.dtype), a.T @ b)
        predicted.append(x[i] @ w)
    predicted = torch.stack(predicted)
    return (predicted - y[:len(predicted)]).square().sum(1)/y.square().sum(1).mean(), predicted

def told(predicted, y):
    "Probability of the image's class in the softmax of the predictions, in units of their root mean square; 0 for a guess."
    shares = vectors_of(y)
    shares, predicted = shares[:, shares.sum(0) > 0], predicted[:, shares.sum(0) > 0]
    shares = shares/shares.sum(1, keepdim=True)
    p = torch.softmax(predicted/predicted.square().mean().sqrt(), 1)
    guess = sum(shares[:, c].mean()**2 for c in range(shares.shape[1]))
    return torch.stack([(p[i] @ shares[i] - guess)/(1 - guess) for i in range(len(p))])/sure(vectors_of(y))

def sure(shares):
    "The same for certain predictions of as many classes of equal frequency as a guess is up against."
    c = float(1/(shares.sum(0)/shares.sum()).square().sum())
    right, wrong = 1 - 1/c, -1/c  # a centred class vector
    unit = ((right**2 + (c - 1)*wrong**2)/c)**.5
    p = np.exp(right/unit)/(np.exp(right/unit) + (c - 1)*np.exp(wrong/unit))
    return (p - 1/c)/(1 - 1/c)

def errors_of(scores): return -scores.logits.log_softmax(-1)[..., -1]

def quiet(learn, epochs=2):
    with learn.no_bar(), learn.no_logging(): learn.fit(epochs)
    return learn


# Scores ------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("penalty", [.05, 1., 20.])
@pytest.mark.parametrize("targets", ["labels", "shares", "sets"])
def test_an_error_is_that_of_a_regression_on_the_other_images(penalty, targets):
    fmap, y = clustered()
    if targets == "shares": y = .7*F.one_hot(y, 6) + .3*F.one_hot(y.roll(1), 6)
    if targets == "sets": y = F.normalize((F.one_hot(y, 6) + F.one_hot(y % 2 + 3, 6)).clamp(max=1).float(), dim=1)
    want, predicted = refitted(fmap, y, penalty)
    scores, want, probability = RidgeFMCENet(penalty)({"m": fmap}, y), want.float(), told(predicted, y).float()
    mean, own = probability.mean(), .3*(probability - probability.mean())
    probability = (mean.clamp(max=1) + own*(mean/-own.min()).clamp(max=1)).clamp(max=1)
    assert scores.valid.all()
    assert_close(errors_of(scores)[:, 0], want, atol=2e-5, rtol=2e-5)
    assert_close(scores.fmcs[:, 0], probability, atol=5e-5, rtol=0)
    assert_close(fmcs_loss(scores).value, want.mean(), atol=1e-5, rtol=1e-5)
    assert_close(fmcs_loss(scores, "gap").value, 1 - probability.mean(), atol=1e-4, rtol=0)

def test_a_guess_scores_about_0_whatever_the_number_of_images_and_classes():
    for n, classes, most in ((24, 2, .15), (64, 10, .05), (256, 10, .05), (200, 50, .05)):  # few images: noise, from 0 upwards
        g = torch.Generator().manual_seed(0)
        scores = [RidgeFMCENet()({"m": torch.randn(n, 32, 2, 2, generator=g)}, torch.arange(n) % classes).fmcs.mean() for _ in range(10)]
        assert sum(scores)/10 < most

def test_errors_above_1_are_not_clipped_in_the_loss():
    fmap, y = clustered(spread=30.)
    fmap.requires_grad_()
    scores = RidgeFMCENet(.01)({"m": fmap}, y)
    above = errors_of(scores)[:, 0] > 1
    assert above.any()
    (grad,) = torch.autograd.grad(errors_of(scores)[above].sum(), fmap)
    assert grad.abs().sum() > 0

def test_the_order_of_the_batch_plays_no_role():
    fmap, y = clustered(64, spread=2.)
    order = torch.randperm(64, generator=torch.Generator().manual_seed(1))
    ridge = RidgeFMCENet()
    assert_close(ridge({"m": fmap[order]}, y[order]).fmcs, ridge({"m": fmap}, y).fmcs[order], atol=1e-5, rtol=0)

def test_gradients_are_those_of_finite_differences():
    torch.manual_seed(0)
    y = torch.arange(10) % 3
    fmap = torch.randn(10, 4, 2, 2, dtype=torch.double, requires_grad=True)
    def errors(m, n=None): return left_out_scores(channel_cosines(m)[0], y, 1., n)[0]
    assert torch.autograd.gradcheck(lambda m: errors(m), fmap)
    assert torch.autograd.gradcheck(lambda m: errors(m, 4), fmap)
    gram = torch.randn(10, 3, dtype=torch.double)
    gram = (gram @ gram.T).requires_grad_()
    assert torch.autograd.gradcheck(cosines, gram)

@pytest.mark.parametrize("case", ["constant", "no channel means", "NaN", "all NaN", "duplicates", "all the same but one", "one class", "each its own class", "too few", "no labels", "alike shares"])
def test_what_cannot_be_scored_is_not_valid_and_gradients_are_finite(case):
    fmap, y = clustered()
    if case == "constant": fmap = torch.full_like(fmap, 3.)
    if case == "no channel means": fmap = fmap - fmap.mean((2, 3), keepdim=True)
    if case == "NaN": fmap[:5] = float("nan")
    if case == "all NaN": fmap[:] = float("nan")
    if case == "duplicates": fmap = fmap[:5].repeat(8, 1, 1, 1)
    if case == "all the same but one": fmap[1:] = fmap[1]
    if case == "one class": y = y*0
    if case == "each its own class": y = torch.arange(40)
    if case == "too few": fmap, y = fmap[:7], y[:7] % 2
    if case == "no labels": y = None
    if case == "alike shares": y = torch.full((40, 2), .5)
    fmap.requires_grad_()
    scores = RidgeFMCENet()({"m": fmap}, y)
    scored = {"NaN": 35, "duplicates": 40, "all the same but one": 40}.get(case, 0)
    assert scores.valid.sum() == scored and scores.logits.isfinite().all() and ((0 <= scores.fmcs) & (scores.fmcs <= 1)).all()
    (errors_of(scores).sum() + scores.fmcs.sum()).backward()
    assert fmap.grad.isfinite().all()
    if not scored and case not in ("one class", "each its own class", "alike shares"): assert not fmap.grad.any()
    if case == "NaN": assert not fmap.grad[:5].any() and fmap.grad[5:].any()
    if case == "duplicates": assert_close(errors_of(scores)[:, 0], refitted(fmap.detach(), y, 1.)[0].float(), atol=1e-5, rtol=0)

@pytest.mark.parametrize("dtype", [torch.half, torch.bfloat16])
def test_half_precision_maps_and_autocast(dtype):
    fmap, y = clustered()
    low = fmap.to(dtype).requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16): scores = RidgeFMCENet()({"m": low}, y)
    assert scores.logits.dtype == torch.float32
    assert_close(scores.fmcs, RidgeFMCENet()({"m": low.float()}, y).fmcs, atol=1e-6, rtol=0)
    fmcs_loss(scores).value.backward()
    assert low.grad.dtype == dtype and low.grad.isfinite().all()


# The memory bank ---------------------------------------------------------------------------------------------------
def test_a_bank_leaves_out_an_images_own_copies():
    "Three epochs over 48 images in shuffled batches of 8, against refits: the newest copy of each image that is not in the batch."
    g = torch.Generator().manual_seed(0)
    y = torch.arange(48) % 4
    ridge, bank, newest = RidgeFMCENet(), MemoryBank(), {}
    for epoch in range(3):
        for ids in torch.randperm(48, generator=g).split(8):
            fmap = clustered(48, 4, seed=int(ids[0]) + 100*epoch)[0][ids] + epoch  # drifts, as in training
            if epoch == 1 and 7 in ids: fmap[ids == 7] = float("nan")
            maps = {"m": fmap.clone().requires_grad_()}
            targets = F.one_hot(y[ids], 4)*.8 + .05 if epoch == 2 and 5 in ids else y[ids]
            scores = bank.score(ridge, maps, targets, 48, ids)
            for i in ids.tolist(): newest.pop(i, None)
            own = fmap[fmap.flatten(1).isfinite().all(1)]
            known = [v for v in newest.values() if v[0].isfinite().all()][::-1]
            together = torch.cat([own, *(v[0][None] for v in known)])
            vectors = [targets if targets.ndim == 2 else F.one_hot(targets, 4).float()]
            vectors = torch.cat([vectors[0][fmap.flatten(1).isfinite().all(1)], *(v[1][None] for v in known)])
            want = refitted(together, vectors, 1., len(own))[0].float()
            assert_close(errors_of(scores)[fmap.flatten(1).isfinite().all(1), 0].detach(), want, atol=2e-4, rtol=2e-4)
            soft = targets if targets.ndim == 2 else F.one_hot(targets, 4).float()
            for j in reversed(range(8)): newest[int(ids[j])] = (fmap[j], soft[j])
            assert sorted(bank.ids.tolist()) == sorted(newest)
            (grad,) = torch.autograd.grad(fmcs_loss(scores).value, maps["m"])
            assert grad.isfinite().all() and grad.any()

def test_the_fast_path_has_the_gradient_of_all_maps_together():
    (first, y), (second, _) = clustered(), clustered(seed=1)
    grads = []
    for score in (lambda b, *a: b.score(RidgeFMCENet(), *a), lambda b, m, y, size, ids: RidgeFMCENet()(*b.with_neighbours(m, y, size, ids))):
        bank, maps = MemoryBank(), {"m": second.clone().requires_grad_()}
        bank.with_neighbours({"m": first}, y, 60, torch.arange(40))
        errors = errors_of(score(bank, maps, y, 60, torch.arange(30, 70)))[:40]
        grads.append(torch.autograd.grad(errors.sum(), maps["m"])[0])
    assert_close(*grads, atol=1e-5, rtol=1e-3)

def test_copies_in_the_bank_would_answer_for_their_images():
    "The trap: maps that say nothing of the classes look learnt if each image meets itself."
    fmap, _ = clustered(64, channels=200, spread=100.)
    y = torch.randint(0, 4, (64,), generator=torch.Generator().manual_seed(3))
    def error(ids):
        bank = MemoryBank()
        bank.with_neighbours({"m": fmap}, y, 64, None if ids is None else ids)
        return float(errors_of(bank.score(RidgeFMCENet(), {"m": fmap + 0.}, y, 64, ids)).mean())
    assert error(None) < .8 < 1 < error(torch.arange(64))


# Training ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("memory", [0, 40])
def test_training_lowers_the_error(memory):
    def error(alpha):
        "Of the last module, in the last epoch."
        cb = quiet(make_learner(cbs=FMCECallback(alpha, "ridge", memory=memory), n_train=192, bs=32), 3).fmce
        assert cb._bank.targets is None and cb.batch_ids is None and (cb.history.acted == cb.history.steps*(alpha > 0)).all()
        return cb.history.fmcs_loss.iloc[-1]
    assert error(.97) < error(0.) - .05

def test_the_loss_is_the_written_formula():
    class Formula(Callback):
        order, run_valid = FMCECallback.order + 1, False
        def after_loss(self):
            cb = self.learn.fmce
            if not hasattr(self, "seen"): self.seen = True, float(self.learn.loss_grad.detach()), float(self.learn.loss.detach()), float(torch.stack([refitted(m.detach(), cb.batch_targets, 1.)[0] for m in self.maps]).mean())
    class Keep(FMCECallback):
        name = "fmce"
        def score_maps(self, maps):
            if not hasattr(formula, "maps"): formula.maps = [m for (n, m), c in zip(maps.items(), self.counted) if c]
            return super().score_maps(maps)
    formula = Formula()
    quiet(tensor_learner(cbs=[Keep(.9, "ridge", memory=0), formula], n=20, bs=20), 1)
    _, total, task, error = formula.seen
    assert total == pytest.approx(.1*task + .9*error, rel=1e-4)

def test_a_bank_of_the_training_set_and_mixed_images():
    sizes = []
    class Sizes(Callback):
        order, run_valid = 10_000, False
        def after_loss(self): sizes.append(len(self.learn.fmce.bank_targets))
    cb = FMCECallback(.9, "ridge", memory=1000)
    quiet(make_learner(cbs=[cb, MixUp(), Sizes()], n_train=64), 2)
    assert sizes == [16, 32, 48, 64, 64, 64, 64, 64] and (cb.history.acted == cb.history.steps).all()

def test_small_batches_get_a_bank_by_themselves():
    cb = FMCECallback(.9, "ridge")
    with pytest.warns(UserWarning, match="and the ridge oracle scores 8 or more"): quiet(make_learner(cbs=cb, bs=4, n_train=32), 2)
    assert cb.history.acted.iloc[-1] == cb.history.steps.iloc[-1]

def test_without_indices_there_is_no_bank_and_one_warning():
    alone, cb = FMCECallback(.9, "ridge", memory=0), FMCECallback(.9, "ridge", memory=40)
    quiet(tensor_learner(cbs=alone, torch_loaders=True))
    with pytest.warns(UserWarning) as told: quiet(tensor_learner(cbs=cb, torch_loaders=True))
    assert [str(w.message)[:60] for w in told] == ["FMCECallback scores each batch by itself, without memory ban"]
    assert "needs a bank without an image's own earlier copies, and the training loader does not show" in str(told[0].message)
    assert cb.history.fmcs.tolist() == alone.history.fmcs.tolist()

def test_the_universal_oracle_asks_for_no_indices():
    cb, seen = FMCECallback(.9, memory=40), []
    class See(Callback):
        order, run_valid = 10_000, False
        def after_loss(self): seen.append((cb.batch_ids, cb._bank.ids, len(cb.bank_targets)))
    quiet(make_learner(cbs=[cb, See()]), 2)
    assert all(ids is None and bank is None for ids, bank, _ in seen) and seen[-1][2] == 40

@pytest.mark.parametrize("when", ["auto", 0.])
def test_without_classes_it_says_why_it_does_not_act(when):
    learn = make_learner(cbs=FMCECallback(.9, "ridge", when=when, targets=None))
    with pytest.warns(UserWarning, match="targets=None keeps the classes from the ridge oracle, which has no scores without them"): quiet(learn, 1)
    assert not learn.fmce.history.acted.any()

@pytest.mark.parametrize("arch, size", [("test_resnet", 32), ("test_vit", 160), ("test_convnext", 64)])
def test_timm_families(arch, size):
    cb = FMCECallback(.9, "ridge", memory=24)
    learn = quiet(make_learner(arch, cbs=cb, size=size, n_train=32), 1)
    counted = cb.history.query("acted > 0")
    assert len(counted) and (cb.history.acted == cb.history.steps).all() and cb.history.fmcs.between(0, 1).all()


# Files and access --------------------------------------------------------------------------------------------------
def test_files(tmp_path):
    fmap, y = clustered()
    plan = tap_plan(make_model(), size=16)
    for ridge in (RidgeFMCENet(), RidgeFMCENet(2.5, 12), RidgeFMCENet().on(plan)):
        back = FMCENet.load(ridge.save(tmp_path/"r.safetensors"))
        assert (type(back), back.penalty, back.min_batch, back.frozen, back.card["kind"]) == (RidgeFMCENet, ridge.penalty, ridge.min_batch, True, "ridge")
        assert (back.plan is None) == (ridge.plan is None)
        maps = {"m": fmap} if back.plan is None else {t.name: torch.randn(40, t.channels, *t.grid) for t in plan}
        assert torch.equal(back(maps, y).logits, ridge(maps, y).logits)
    folder = RidgeFMCENet(.5).save_pretrained(tmp_path/"hub", "owner/ridge")
    assert FMCENet.from_pretrained(folder).penalty == .5 and "leave-one-out" in (folder/"README.md").read_text()
    assert FMCENet.load(local_file(folder)).n_params == 0

def test_its_name_is_enough_unless_something_on_disk_has_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert isinstance(as_oracle("ridge"), RidgeFMCENet) and as_oracle("ridge").penalty == 1
    assert as_oracle("universal").kind == "universal" and as_oracle("quality").card["data"]["runs"] == 111
    with pytest.raises(OracleFileError, match="there is no such file"): as_oracle("fitted")  # belongs to one network
    RidgeFMCENet(3.).save("named"); os.rename("named", "ridge")
    assert as_oracle("ridge").penalty == 3

def test_report_with_and_without_labels():
    learn = make_learner(n_train=96)
    report = fmce_report(learn, learn.dls.train, oracle="ridge", bar=False, new_networks=0)
    assert report.oracle == "the ridge oracle" and report.measured and report.table.fmcs.between(0, 1).all()
    report = fmce_report(learn, learn.dls.train, oracle="ridge", labels=False, bar=False, new_networks=0)
    assert not report.measured and report.table.fmcs.isna().all() and len(report.notes) == 1 and "without class labels this oracle" in report.notes[0]
    assert report.oracle == "the ridge oracle"
    plan = tap_plan(learn.model, size=16)
    plan = plan.subset(plan.names[-1:])
    for labels in (True, False):
        report = fmce_report(learn, oracle=RidgeFMCENet(plan=plan), labels=labels, bar=False, new_networks=0)
        assert report.table.module.tolist() == plan.names and report.table.images.tolist() == [len(report.scores)]

def test_study_arms(tmp_path):
    assert {"ridge", "ridge-memory", "alignment-memory"} <= set(ARMS)
    arms = ("plain", "ridge", "ridge-memory+mixup", "alignment-memory")
    study = Study(arms, (.9,), "ridge", n_train=30, n_eval=30, size=16, bs=15, arch="test_resnet", epochs=2, seeds=(0,), memory=30)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # one seed: no intervals
        table = run_study(study, tmp_path, bar=False)
    assert sorted(table.arm) == sorted(arms) and table.accuracy.notna().all()
