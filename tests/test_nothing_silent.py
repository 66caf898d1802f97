"RAL acts, or says at once why not: no configuration with alpha above 0 in which no step acts without a warning that names the cause."
import itertools
import re
import warnings

import pytest
import torch
import torch.nn.functional as F
from fastai.callback.core import Callback
from fastai.callback.mixup import MixUp
from fastai.callback.schedule import SchedCos
from fastai.data.core import DataLoaders
from fastai.data.load import DataLoader
from torch import nn

from fmce_fastai.report.report import fmce_report
from fmce_fastai.train.callback import FMCECallback
from helpers import assert_same, make_learner, make_model, make_oracle, seed_all, weights


# What the targets are -> (targets of class labels, the loss, the words by which a warning names what is wrong; None where they are classes)
def hot(y, n): return F.one_hot(y, n).float()
TARGETS = {
    "labels": (lambda y, n: y, F.cross_entropy, None),
    "column": (lambda y, n: y[:, None], lambda o, y: F.cross_entropy(o, y[:, 0]), None),
    "label sets": (hot, F.binary_cross_entropy_with_logits, None),
    "label sets of integers": (lambda y, n: F.one_hot(y, n), lambda o, y: F.binary_cross_entropy_with_logits(o, y.float()), None),
    "probabilities": (lambda y, n: hot(y, n)*.9 + .1/n, F.cross_entropy, None),
    "numbers": (lambda y, n: y.float(), lambda o, y: F.mse_loss(o[:, 0], y), "per image, "),
    "number columns": (lambda y, n: y[:, None].float(), lambda o, y: F.mse_loss(o[:, :1], y), "per image, "),
    "points": (lambda y, n: torch.stack([y, -y], 1)/7, lambda o, y: F.mse_loss(o[:, :2], y), "neither sets of labels nor probabilities"),
    "masks": (lambda y, n: y[:, None, None].expand(-1, 4, 4), lambda o, y: F.cross_entropy(o[:, :, None, None].expand(-1, -1, 4, 4), y), "masks or images, as in segmentation"),
}

def loaders(make, n_classes, bs, n=48):
    "Images whose shade is their class; the targets made of the classes."
    seed_all()  # the loader's own random numbers
    gen = torch.Generator().manual_seed(0)
    y = torch.randint(n_classes, (n,), generator=gen)
    x = torch.randn(n, 3, 16, 16, generator=gen) + y[:, None, None, None]/3
    data = torch.utils.data.TensorDataset(x, make(y, n_classes))
    dls = DataLoaders(*(DataLoader(data, bs=bs, shuffle=s, drop_last=s, num_workers=0) for s in (True, False)))
    dls.c = n_classes
    return dls

def learner(targets="labels", n_classes=10, bs=16, cbs=None, n=48, **kwargs):
    make, loss, _ = TARGETS[targets]
    learn = make_learner(dls=loaders(make, n_classes, bs, n), metrics=[], cbs=cbs, **kwargs)
    learn.model.head = nn.Linear(16, n_classes)
    learn.loss_func = loss
    learn.logger = lambda *_: None
    return learn

def fitted(learn, n_epochs=1):
    "The warnings of a fit."
    with warnings.catch_warnings(record=True) as caught, learn.no_bar():
        warnings.simplefilter("always")
        learn.fit(n_epochs, 1e-3)
    return [str(w.message) for w in caught if "FMCECallback" in str(w.message) or "RAL" in str(w.message)]

def acted(learn): return learn.fmce.history.groupby(["fit", "epoch"]).acted.first().sum()

def freeze(learn):
    for n, p in learn.model.named_parameters(): p.requires_grad_(n.startswith("head"))


# Targets, batch sizes, classes, frozen or not ----------------------------------------------------------------------
@pytest.mark.parametrize("targets", TARGETS)
@pytest.mark.parametrize("oracle", ["universal", "fitted"])
def test_ral_acts_or_says_why_not(targets, oracle):
    "Every combination: a fit in which no step acts ends with one warning, of the cause; one in which RAL acts, with none but that of the memory bank."
    cause = TARGETS[targets][2]
    for bs, n_classes, frozen, memory in itertools.product((4, 16), (2, 40), (False, True), ("auto", 0)):
        if memory == 0 and (frozen or n_classes == 2 and bs == 16): continue
        if frozen and n_classes == 2: continue
        if oracle == "fitted" and (memory == 0 or n_classes == 2): continue  # neither matters to it
        cb = FMCECallback(.5, make_oracle(make_model()) if oracle == "fitted" else None, memory=memory)
        learn = learner(targets, n_classes, bs, cb, n=32)
        if frozen: freeze(learn)
        told = fitted(learn)
        banks, rest = [t for t in told if "memory bank, because" in t], [t for t in told if "memory bank, because" not in t]
        case = (targets, oracle, bs, n_classes, frozen, memory, told)
        if acted(learn): assert not rest and not frozen and (oracle == "fitted" or not cause), case
        elif cause and oracle == "universal": assert len(rest) == 1 and cause in rest[0] and rest[0].startswith("RAL cannot act"), case
        elif frozen: assert len(rest) == 1 and "the body is frozen" in rest[0], case
        else: assert oracle == "universal" and memory == 0 and len(rest) == 1 and re.search("scores 8 images or more together, and a batch has|No image has another one of its class|are of one class", rest[0]), case
        assert len(banks) == (1 if learn.fmce.bank_size and memory == "auto" else 0) or not frozen and len(banks) <= 1, case

@pytest.mark.parametrize("targets", TARGETS)
def test_at_alpha_0_nothing_is_said_and_no_bit_changes(targets):
    after = []
    for cbs in (None, FMCECallback(0.)):
        learn = learner(targets, 40, 4, cbs)
        seed_all(1)
        assert fitted(learn) == []
        after.append(weights(learn.model))
    assert_same(*after)

def test_targets_without_classes_are_named_in_the_first_step():
    class Look(Callback):
        order, run_valid = FMCECallback.order+1, False
        def before_fit(self): self.at = []
        def after_loss(self): self.at.append(len(caught))
    learn = learner("numbers", cbs=[FMCECallback(.9), Look()])
    with warnings.catch_warnings(record=True) as caught, learn.no_bar():
        warnings.simplefilter("always")
        learn.fit(2)
    assert learn.look.at[0] == 1 and learn.look.at[-1] == 1 and len(caught) == 1
    assert (learn.fmce.history.watched == learn.fmce.history.steps).all()

def test_label_sets_train_by_what_two_images_share():
    "The loss is that of the oracle with the cosines of the label sets as its same-class matrix."
    y = torch.tensor([[1., 1, 0, 0], [1, 0, 0, 0], [0, 1, 1, 0], [0, 0, 0, 1]]).repeat(4, 1)
    learn = learner(bs=16, n_classes=4, n=16)
    x = torch.randn(16, 3, 16, 16)
    learn.dls = DataLoaders(*[DataLoader(torch.utils.data.TensorDataset(x, y), bs=16, shuffle=False, num_workers=0)]*2)
    learn.loss_func = F.binary_cross_entropy_with_logits
    class Keep(Callback):
        order, run_valid = FMCECallback.order+1, False
        def after_loss(self): self.seen = self.learn.fmce.batch_targets
    learn.add_cbs([FMCECallback(.9), Keep()])
    fitted(learn)
    t = learn.keep.seen
    torch.testing.assert_close(t @ t.T, (y @ y.T)/(y.sum(1)[:, None]*y.sum(1)).sqrt())
    assert acted(learn) == 1

def test_mixed_label_sets():
    learn = learner("label sets", cbs=[FMCECallback(.9), MixUp()])
    assert fitted(learn, 2) == [] and acted(learn) == 6


# The memory bank that switches itself on ---------------------------------------------------------------------------
def test_many_classes_switch_a_bank_on():
    learn = learner(n_classes=60, bs=16, cbs=FMCECallback(.9), n=240)
    told = fitted(learn, 2)
    h = learn.fmce.history
    assert len(told) == 1 and "memory=224" in told[0] and "60 classes" in told[0] and "batch of 16" in told[0]
    assert learn.fmce.bank_size == 224 and h.paired.iloc[-1] > .9 and (h.acted == h.steps).all()

def test_history_reports_the_pairs():
    learn = learner(n_classes=60, bs=16, cbs=FMCECallback(.9, memory=0), n=160)
    assert fitted(learn) == []
    assert .1 < learn.fmce.history.paired.iloc[-1] < .4
    learn = learner(n_classes=2, bs=16, cbs=FMCECallback(.9, make_oracle(make_model())))
    fitted(learn)
    assert learn.fmce.history.paired.isna().all()

def test_a_small_last_batch_switches_no_bank_on():
    learn = learner(bs=16, cbs=FMCECallback(.9), n=50)
    learn.dls.train.drop_last = False
    assert fitted(learn, 2) == [] and learn.fmce.bank_size == 0

@pytest.mark.parametrize("n_classes, bs", [(10, 16), (2, 8), (20, 48)])
def test_where_pairs_are_plenty_the_automatic_bank_changes_no_bit(n_classes, bs):
    after = []
    for memory in (0, "auto"):
        learn = learner(n_classes=n_classes, bs=bs, cbs=FMCECallback(.9, memory=memory), n=96)
        seed_all(2)
        assert fitted(learn, 2) == []
        after.append(weights(learn.model))
    assert_same(*after)


# `when`, `targets`, gradients ----------------------------------------------------------------------------------------
@pytest.mark.parametrize("kwargs, words", [
    (dict(when=(.99, 1.)), r"when=\(0.99, 1.0\), and no training step"), (dict(when="converged"), "had not converged when the fit ended"),
    (dict(when=lambda learn: False), "returned False in every step"), (dict(targets=None), "targets=None keeps the classes from the universal oracle")])
def test_what_keeps_ral_from_acting_is_named(kwargs, words):
    learn = learner(cbs=FMCECallback(.9, **kwargs))
    told = fitted(learn)
    assert len(told) == 1 and re.search(words, told[0]) and not acted(learn)

def test_a_schedule_that_is_0_is_no_cause():
    assert fitted(learner(cbs=FMCECallback(lambda pct: 0., when=.99))) == []
    assert fitted(learner(cbs=FMCECallback(SchedCos(0., .9)))) == []

class Detached(nn.Module):
    "Detaches its maps behind a trainable stem."
    def __init__(self):
        super().__init__()
        self.stem, self.head = nn.Conv2d(3, 6, 3, 2, 1), nn.Linear(6, 10)
    def forward(self, x):
        with torch.no_grad(): maps = self.stem(x)
        return self.head(maps.mean((2, 3)))

def test_a_network_that_detaches_is_not_called_frozen():
    learn = learner(cbs=FMCECallback(.9, taps="stem"))
    learn.model = Detached()
    told = fitted(learn)
    assert len(told) == 1 and "torch.no_grad()" in told[0] and "frozen" not in told[0]

def test_one_class_only():
    learn = learner(cbs=FMCECallback(.9, memory=0), n_classes=1)
    told = fitted(learn)
    assert len(told) == 1 and "of one class" in told[0] and "Shuffle" in told[0]


# Two callbacks, and what the callback says of itself -----------------------------------------------------------------
def test_two_callbacks_are_refused():
    first = FMCECallback(.5)
    learn = learner(cbs=first)
    before = weights(learn.model)
    with learn.no_bar(), pytest.raises(ValueError, match="two FMCECallbacks.*learn.remove_cb"): learn.fit(1, 1e-3, cbs=FMCECallback(.9))
    assert_same(before, weights(learn.model))
    assert fitted(learn) == [] and (first.history.acted == 3).all()
    learn.remove_cb(FMCECallback)
    learn.add_cb(FMCECallback(.9))
    assert fitted(learn) == [] and acted(learn)

def test_a_second_callback_may_watch():
    "By another oracle, say; either is the first."
    for alphas in ((0., .5), (.5, 0.)):
        cbs = [FMCECallback(a) for a in alphas]
        learn = learner(cbs=cbs)
        assert fitted(learn) == []
        assert [int(cb.history.acted.iloc[0]) for cb in cbs] == [3*(a > 0) for a in alphas]

def test_verbose_prints_once_a_fit(capsys):
    learn = learner(n_classes=40, bs=16, cbs=FMCECallback(.9, verbose=True), n=96)
    fitted(learn, 2)
    said = capsys.readouterr().out
    assert said.count("FMCECallback: RAL with alpha 0.9") == 1
    for words in ("stem, stage1*, stage2*", "acts    in every step whose images have classes", "memory  the last 80 images (auto)", "of the first 16 images", "UniversalFMCENet"): assert words in said, said
    fitted(learn)
    assert capsys.readouterr().out.count("FMCECallback: RAL") == 1
    assert repr(learn.fmce) in said + repr(learn.fmce) and "stage2*" in repr(learn.fmce)

def test_the_repr_before_a_fit_and_after_an_export(capsys):
    cb = FMCECallback(.9)
    assert "found with the first batch" in repr(cb) and "off (auto: on where under 50% have a pair)" in repr(cb)
    cb.oracle = None
    assert "lost in an export" in repr(cb)
    fitted(learner(cbs=FMCECallback(.9)))
    assert capsys.readouterr().out == ""


# Reports ---------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("targets", ["column", "label sets", "probabilities"])
def test_a_report_uses_them_too(targets):
    learn = learner(targets)
    report = fmce_report(learn, n_images=48, control=0, bar=False)
    assert report.measured and report.table.fmcs.notna().all()


# Found by a reader ---------------------------------------------------------------------------------------------------
def test_a_callback_that_is_given_to_a_second_learner_leaves_the_first_with_a_warning():
    cb = FMCECallback(.5)
    learner(cbs=cb)
    with pytest.warns(UserWarning, match="now belongs to another Learner"): learner(cbs=cb)

def test_one_class_only_switches_no_bank_on():
    learn = learner(cbs=FMCECallback(.9), n_classes=1)
    told = fitted(learn)
    assert len(told) == 1 and "of one class" in told[0] and learn.fmce.bank_size == 0

def test_the_cause_is_that_of_the_steps_in_which_ral_was_due():
    learn = learner(cbs=FMCECallback(.9, when=.5, memory=0), n_classes=40, bs=4)
    told = fitted(learn)
    assert len(told) == 1 and "scores 8 images or more" in told[0] and "when=" not in told[0]

def test_the_repr_knows_a_bank_that_is_switched_on_later():
    learn = learner(cbs=FMCECallback(.9, when=.5), n_classes=40, bs=16, n=96)
    fitted(learn)
    assert f"the last {learn.fmce.bank_size} images (auto)" in repr(learn.fmce) and learn.fmce.bank_size

@pytest.mark.parametrize("mixed", [False, True])
def test_images_whose_label_is_ignored_have_no_class(mixed):
    learn = learner(cbs=[FMCECallback(.9, memory=0), *([MixUp()] if mixed else [])], n=64)
    learn.loss_func = nn.CrossEntropyLoss(ignore_index=-100) if mixed else lambda o, y: F.cross_entropy(o, y, ignore_index=-100)
    x, y = learn.dls.train.dataset.tensors
    learn.dls.train.dataset = torch.utils.data.TensorDataset(x, y.masked_fill(torch.arange(len(y)) % 4 == 0, -100))
    if mixed: learn.loss_func.y_int = True
    fitted(learn)
    assert acted(learn) == 4 and learn.fmce.history.paired.iloc[-1] < .9
