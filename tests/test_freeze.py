"Contracts of FMCSFreeze: the front is not trained and the rest is as it should be, what it saves is what it says, nothing is left however a fit ends."
import cloudpickle
import pytest
import torch
from fastai.callback.core import Callback, CancelEpochException, CancelFitException
from fastai.callback.fp16 import MixedPrecision
from fastai.callback.tracker import SaveModelCallback
from fastai.callback.training import BnFreeze, GradientAccumulation
from fastai.learner import load_learner
from torch.utils.flop_counter import FlopCounterMode

from fmce_fastai.maps.plan import TapError
from fmce_fastai.oracle.base import OracleError
from fmce_fastai.train.callback import FMCECallback
from fmce_fastai.train.columns import ArmLast
from fmce_fastai.train.freeze import FMCSFreeze
from fmce_fastai.train.recorder import FMCSRecorder
from fmce_fastai.util.state import hook_count
from helpers import Probe, RaiseAt, TinyNet, assert_same, make_learner, make_oracle, seed_all, tensor_learner, weights
from test_callback import EVENTS, ERRORS, Breaker, broken_off, broken_off_without_us, quiet, shape_of, silent

pytestmark = [
    pytest.mark.filterwarnings("ignore:load_learner. uses Python's insecure pickle:UserWarning"),
    pytest.mark.filterwarnings("ignore:numpy.core is deprecated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::fmce_fastai.convergence.run.ConvergenceWarning"),
    pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step:UserWarning"),
]
AT_HALF = {"stage1": .5}   # of a fit of two epochs of four steps: after the fourth


def learner(arch=None, cbs=(), freeze=None, **kwargs):
    learn = silent(tensor_learner(arch, **kwargs))
    learn.add_cbs(cbs)
    if freeze is not None: learn.add_cb(FMCSFreeze(**freeze))
    return learn

def trainable(learn): return [n for n, p in learn.model.named_parameters() if p.requires_grad]

def left_over(learn):
    "What a fit must not leave."
    return dict(hooks=hook_count(learn.model), frozen=[n for n, p in learn.model.named_parameters() if not p.requires_grad],
                helpers=[c for c in learn.cbs if isinstance(c, ArmLast)], guard="_with_events" in learn.__dict__)

NOTHING = dict(hooks=0, frozen=[], helpers=[], guard=False)


# ---- what it does ---------------------------------------------------------------------------------------------------

class ByHand(Callback):
    "The same freezing, by a few lines: the stem and the first stage from the fourth step on."
    order, run_valid = 5, False
    def before_train(self): self.set_modes()
    def set_modes(self):
        if self.learn.train_iter >= 4:
            for m in (*self.model.stem.modules(), *self.model.stage1.modules()): m.training = False
    def after_batch(self):
        if self.learn.train_iter != 4: return
        for p in (*self.model.stem.parameters(), *self.model.stage1.parameters()): p.requires_grad_(False); p.grad = None
        self.set_modes()

def test_the_rest_trains_as_with_a_front_that_is_frozen_by_hand():
    ours, theirs = learner(freeze=dict(by=AT_HALF), cbs=[Probe()]), learner(cbs=[ByHand(), Probe()])
    for learn in (ours, theirs): seed_all(3); learn.fit_one_cycle(2, 1e-1)
    assert_same(weights(ours.model), weights(theirs.model))
    assert [torch.equal(a, b) for a, b in zip(ours.probe.losses, theirs.probe.losses)] == [True]*8
    assert [set(a) == set(b) for a, b in zip(ours.probe.grads, theirs.probe.grads)] == [True]*8
    assert len(ours.probe.grads[3]) == 11 and len(ours.probe.grads[4]) == 5
    assert left_over(ours) == NOTHING and all(m.training == ours.model.training for m in ours.model.modules())

@pytest.mark.parametrize("by", ["fmcs", "change"])
def test_watching_alone_changes_nothing(by):
    ours, theirs = learner(freeze=dict(by=by, every=1, start=1.5), cbs=[Probe()]), learner(cbs=[Probe()])
    for learn in (ours, theirs): seed_all(3); learn.fit_one_cycle(2, 1e-1)
    assert_same(weights(ours.model), weights(theirs.model))
    assert all(torch.equal(a, b) for a, b in zip(ours.probe.losses, theirs.probe.losses)) and ours.fmcs_freeze.history.empty

@pytest.mark.parametrize("arch, taps", [(None, {"stem": .25, "stage1": .5}), ("vit", {"blocks.0": .25, "blocks.1": .5})])
def test_what_it_says_to_save_is_what_the_fit_does_not_compute(arch, taps):
    def flops(freeze):
        learn = learner(arch, freeze=freeze, n_valid=0)
        learn.remove_cbs([c for c in learn.cbs if type(c).__name__ == "ProgressCallback"])
        class Count(Callback):
            "Forward and backward of the training steps, without the tap search of the first."
            order, total = 2_000_000, 0
            def before_batch(self): self.counter = FlopCounterMode(display=False); self.counter.__enter__()
            def after_backward(self): self.counter.__exit__(None, None, None); self.total += self.counter.get_total_flops()
        learn.add_cb(count := Count())
        learn._do_epoch_validate = lambda *_, **__: None
        learn.fit(2)
        return count.total, learn
    plain, _ = flops(None)
    ours, learn = flops(dict(by=taps, taps=list(taps)))
    assert learn.fmcs_freeze.history.module.tolist() == list(taps)
    assert ours/plain == pytest.approx(1 - learn.fmcs_freeze.saved, abs=1e-6) and ours < .9*plain

def test_history_tells_what_was_frozen_when():
    learn = learner(freeze=dict(by={"stem": .25, "stage1": .5}))
    learn.fit(2)
    h = learn.fmcs_freeze.history
    assert h.step.tolist() == [2, 4] and h.epoch.tolist() == [.5, 1.] and h.event.tolist() == ["freeze"]*2 and h.fit.tolist() == [1, 1]
    assert h.parameters.tolist() == [3*8*9 + 16, 3*8*9 + 16 + 8*12*9 + 24] and h.saved.is_monotonic_increasing
    assert learn.fmcs_freeze.saved == pytest.approx((2*h.saved[0] + 4*h.saved[1])/8, abs=1e-4)
    assert "freeze stage1" in repr(learn.fmcs_freeze) and learn.fmcs_freeze.frozen_until is None
    learn.fit(1)
    assert learn.fmcs_freeze.history.fit.tolist() == [1, 1, 2, 2]

def test_it_thaws_when_the_rate_is_restarted():
    class Restart(Callback):
        run_valid = False
        def before_batch(self): self.opt.set_hyper("lr", .1 if self.learn.train_iter < 4 or self.learn.train_iter > 6 else .01)
    learn = learner(freeze=dict(by={"stage1": .25}, every=1), cbs=[Restart()])
    learn.fit(4)
    events = learn.fmcs_freeze.history
    assert events.event.tolist() == ["freeze", "thaw", "freeze"] and "the learning rate rose from 0.01 to 0.1" in events.reason[1]

def test_it_thaws_when_a_trained_module_loses_what_it_knew(monkeypatch):
    from fmce_fastai.train.watch import FmcsWatch
    monkeypatch.setattr(FmcsWatch, "flat", lambda self, names, share: [n == "stem" for n in names])
    told = iter([.8]*4 + [.1]*40)
    monkeypatch.setattr("fmce_fastai.train.freeze.mean_fmcs", lambda scores: torch.full((scores.fmcs.shape[1],), next(told)))
    learn = learner(freeze=dict(every=1, start=.3, thaw=.2))
    learn.fit(2)
    events = learn.fmcs_freeze.history
    assert events.event.tolist()[:2] == ["freeze", "thaw"] and "FMCS of stage1 fell by more than 0.2" in events.reason[1]

def test_what_the_user_froze_stays_frozen():
    learn = learner(freeze=dict(by=AT_HALF), cbs=[BnFreeze()])
    learn.model.stem.requires_grad_(False)
    learn.fit(2)
    assert not any(p.requires_grad for p in learn.model.stem.parameters()) and all(p.requires_grad for p in learn.model.stage1.parameters())
    assert hook_count(learn.model) == 0

def test_batch_norm_goes_on_where_it_is_asked_to():
    def statistics(eval_mode):
        learn = learner(freeze=dict(by={"stem": 0.}, start=0., eval_mode=eval_mode))
        learn.fit(2)
        return learn.model.stem[1].num_batches_tracked.item()
    assert (statistics(True), statistics(False)) == (1, 8)

# ---- beside others --------------------------------------------------------------------------------------------------

def test_beside_ral_and_a_recorder():
    learn = learner(freeze=dict(by=AT_HALF), cbs=[FMCECallback(.5), FMCSRecorder(16, 3)])
    learn.fit(2)
    h = learn.fmce.history
    assert (h[h.module == "stage2"].acted == h[h.module == "stage2"].steps).all() and learn.fmcs_freeze.history.module.tolist() == ["stage1"]
    assert left_over(learn) == NOTHING and len(learn.fmcs_recorder.dataset.steps) == 8

@pytest.mark.parametrize("cbs", [[GradientAccumulation(32)], [MixedPrecision()], [SaveModelCallback()]], ids=lambda c: type(c[0]).__name__)
@pytest.mark.filterwarnings("ignore:.*CUDA is not available:UserWarning")
def test_beside_fastai_callbacks(cbs, tmp_path):
    learn = learner(freeze=dict(by=AT_HALF), cbs=cbs, path=tmp_path)
    learn.fit(2)
    assert learn.fmcs_freeze.history.module.tolist() == ["stage1"] and left_over(learn) == NOTHING

def test_fine_tune_and_discriminative_rates():
    from fastai.torch_core import params
    learn = learner("test_resnet", freeze=dict(by={"layer2": .5}), size=32, splitter=lambda m: [params(m.conv1) + params(m.bn1) + params(m.layer1), params(m.layer2) + params(m.layer3) + params(m.layer4), params(m.fc)])
    learn.fine_tune(2, freeze_epochs=2)
    h = learn.fmcs_freeze.history
    assert h.fit.tolist() == [1, 2] and left_over(learn) == NOTHING
    learn.fit_one_cycle(2, slice(1e-4, 1e-2))
    assert learn.fmcs_freeze.history.fit.tolist() == [1, 2, 3] and left_over(learn) == NOTHING

def test_an_oracle_of_any_kind_judges():
    for oracle in ("universal", "alignment", make_oracle(tensor_learner().model)):
        learn = learner(freeze=dict(oracle=oracle, every=1, patience=1))
        learn.fit(6)
        assert set(learn.fmcs_freeze._watch.curves if learn.fmcs_freeze._watch else ()) <= {"stem", "stage1", "stage2"} and left_over(learn) == NOTHING

# ---- kept maps ------------------------------------------------------------------------------------------------------

EARLY = {"stage1": .25}   # of four epochs of four steps: after the fourth

def counted_forwards(learn, module):
    "Training forwards of `module` from the second epoch on; those of copies are not counted."
    calls = []
    handle = module.register_forward_hook(lambda m, args, out: calls.append(m is module and learn.epoch > 0 and torch.is_grad_enabled()))
    learn.fit(4)
    handle.remove()
    return sum(calls)

@pytest.mark.parametrize("on_disk", [False, True])
@pytest.mark.parametrize("arch, by", [(None, EARLY), ("vit", {"blocks.1": .25})])
def test_a_fit_with_kept_maps_is_the_same_without_running_the_front(arch, by, on_disk):
    ours, theirs = (learner(arch, freeze=dict(by=by, taps=list(by), keep_maps=keep, on_disk=on_disk), cbs=[Probe()]) for keep in (1e6, 0))
    front = (lambda m: m.stem[0] if arch is None else m.patch_embed.proj)
    seen = []
    for learn in (ours, theirs): seed_all(3); seen.append(counted_forwards(learn, front(learn.model)))
    assert_same(weights(ours.model), weights(theirs.model))
    assert all(torch.equal(a, b) for a, b in zip(ours.probe.losses, theirs.probe.losses))
    assert seen == [4, 12]  # two epochs in which the front did not run
    assert ours.fmcs_freeze._n_short == 8 and ours.fmcs_freeze.saved > theirs.fmcs_freeze.saved + .05 and "8 steps started from kept maps" in repr(ours.fmcs_freeze)
    assert left_over(ours) == NOTHING and not any("forward" in vars(m) for m in ours.model.modules())

def test_kept_maps_are_really_used():
    "With other weights in the front after its maps were kept, the fit goes on as if nothing had happened."
    class Spoil(Callback):
        run_valid = False
        def after_batch(self):
            if self.learn.train_iter != 8: return
            with torch.no_grad(): self.model.stem[0].weight.zero_()
    def losses(keep, spoil):
        learn = learner(freeze=dict(by=EARLY, keep_maps=keep), cbs=[Probe(), *[Spoil()]*spoil])
        seed_all(3); learn.fit(4)
        return torch.stack(learn.probe.losses)
    plain = losses(0, False)
    assert torch.equal(losses(1e6, True), plain) and not torch.equal(losses(0, True), plain)

def test_maps_are_not_kept_where_images_change():
    from fastai.callback.mixup import MixUp
    from fastai.vision.augment import Flip
    def fit(said, cbs=(), change=None, learn=None, **freeze):
        learn = learn or learner(freeze=dict(by=EARLY, keep_maps=1e6) | freeze, cbs=cbs)
        if change: change(learn)
        with pytest.warns(UserWarning, match=said) as told: learn.fit(4)
        assert sum("keeps no maps" in str(w.message) for w in told) == 1 and learn.fmcs_freeze._n_short == 0 and left_over(learn) == NOTHING
        assert learn.fmcs_freeze.history.module.tolist() == ["stage1"]
    fit("are augmented, or mixed", cbs=[MixUp()])
    digits = silent(make_learner())
    digits.add_cb(FMCSFreeze(by=EARLY, keep_maps=1e6))
    fit(r"augmented at random \(Flip\)", learn=digits, change=lambda l: l.dls.train.after_batch.add(Flip()))
    fit("eval_mode is False", eval_mode=False)
    fit("FMCECallback reads a map of the front", cbs=[FMCECallback(.5)])
    fit("take 0 MB, more than the 0 MB allowed", keep_maps=10)

class Shared(TinyNet):
    "A parameter that is used in the front and behind it."
    def __init__(self): super().__init__(); self.scale = torch.nn.Parameter(torch.ones(1))
    def forward(self, x): return self.head(self.drop(self.stage2(self.stage1(self.stem(x)*self.scale)).mean((2, 3)))*self.scale)

def test_maps_are_not_kept_where_a_parameter_of_the_front_is_trained_on():
    learn = learner(freeze=dict(by=EARLY, keep_maps=1e6))
    learn.model = Shared()
    with pytest.warns(UserWarning, match="a parameter that is trained further back is used in the front too"): learn.fit(4)
    assert learn.fmcs_freeze._n_short == 0 and learn.fmcs_freeze.history.module.tolist() == ["stage1"] and learn.model.scale.item() != 1

def test_ral_goes_on_where_it_reads_behind_the_front():
    learn = learner(freeze=dict(by=EARLY, keep_maps=1e6), cbs=[FMCECallback(.5, make_oracle(tensor_learner().model, taps=["stage2"]))])
    learn.fit(4)
    assert learn.fmcs_freeze._n_short == 8 and (learn.fmce.history.acted == 4).all()

@pytest.mark.parametrize("error", ERRORS[:2], ids=lambda e: type(e).__name__)
def test_no_stand_in_is_left_by_an_error_in_the_forward(error):
    learn = learner(freeze=dict(by=EARLY, keep_maps=1e6))
    learn.model.drop = torch.nn.Sequential(learn.model.drop, Breaker(error, after=14))
    with pytest.raises(type(error)): learn.fit(4)
    assert learn.fmcs_freeze._n_short > 2 and left_over(learn) == NOTHING and not any("forward" in vars(m) for m in learn.model.modules())

# ---- every way a fit can end ----------------------------------------------------------------------------------------

@pytest.mark.parametrize("event", EVENTS)
@pytest.mark.parametrize("error", ERRORS[:2] + [CancelEpochException(), CancelFitException()], ids=lambda e: type(e).__name__)
def test_nothing_is_left_however_a_fit_ends(event, error):
    "By an error, Ctrl-C or a cancel out of another callback, at any event, with the front frozen from the first step on."
    learn = learner(freeze=dict(by={"stage1": 0.}, start=0.), n=32)
    left = broken_off(learn, event, error, 99)
    assert left == broken_off_without_us(None, event, type(error), 99)
    assert {**left_over(learn), "helpers": []} == NOTHING | dict(guard=event == "before_fit" and not isinstance(error, CancelFitException))
    learn.fit(1)
    assert left_over(learn) == NOTHING and shape_of(learn) == (["epoch", "train_loss", "valid_loss", "accuracy", "time"], [3], 2)

@pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError("out of memory")], ids=lambda e: type(e).__name__)
def test_nothing_is_left_by_an_error_in_the_forward(error):
    learn = learner(freeze=dict(by={"stage1": 0.}, start=0.))
    learn.model.drop = torch.nn.Sequential(learn.model.drop, Breaker(error, after=3))
    with pytest.raises(type(error)): learn.fit(2)
    assert left_over(learn) == NOTHING and all(m.training for m in learn.model.modules())

def test_removed_within_a_fit():
    class Remove(Callback):
        def after_batch(self):
            if self.learn.train_iter == 6: self.learn.remove_cb(FMCSFreeze)
    learn = learner(freeze=dict(by=AT_HALF), cbs=[Remove()])
    learn.fit(3)
    assert left_over(learn) == NOTHING

def test_pickled_in_the_middle_of_a_fit():
    "The copy is not frozen, and trains on."
    class Middle(Callback):
        run_valid, copies = False, []
        def after_batch(self):
            if self.learn.train_iter != 6: return
            assert len(trainable(self.learn)) == 5
            learn = self.learn
            learn.remove_cb(self)
            self.copies.append(cloudpickle.loads(cloudpickle.dumps(learn)))
    learn = learner(freeze=dict(by=AT_HALF), cbs=[middle := Middle()])
    learn.fit(2)
    copy, = middle.copies
    assert left_over(copy) | dict(guard=False, helpers=[]) == NOTHING
    copy.fmcs_freeze.oracle = learn.fmcs_freeze.oracle
    copy.fit(2)
    assert copy.fmcs_freeze.history.module.tolist()[-1] == "stage1" and left_over(copy) == NOTHING

def test_exported_after_a_fit(tmp_path):
    learn = silent(make_learner(path=tmp_path))
    learn.add_cb(FMCSFreeze(by=AT_HALF))
    learn.fit(2)
    learn.export("end.pkl")
    loaded = load_learner(tmp_path/"end.pkl")
    assert left_over(loaded) == NOTHING and loaded.fmcs_freeze.history.equals(learn.fmcs_freeze.history)

def test_stopped_and_resumed(tmp_path):
    learn = learner(freeze=dict(by=AT_HALF), cbs=[RaiseAt("before_epoch", KeyboardInterrupt(), skip=2)], path=tmp_path)
    with pytest.raises(KeyboardInterrupt): learn.fit(4)
    assert learn.fmcs_freeze.history.step.tolist() == [8] or left_over(learn) == NOTHING
    learn.save("stopped")
    again = learner(freeze=dict(by=AT_HALF), path=tmp_path)
    again.load("stopped")
    again.fit(4, start_epoch=2)
    assert again.fmcs_freeze.history.step.tolist() == [1] and left_over(again) == NOTHING

# ---- errors ---------------------------------------------------------------------------------------------------------

def test_what_cannot_be_is_named():
    with pytest.raises(ValueError, match="by is 'loss'; known are 'fmcs', 'change'"): FMCSFreeze(by="loss")
    with pytest.raises(ValueError, match="every is 0; give a number of steps"): FMCSFreeze(every=0)
    with pytest.raises(ValueError, match="`start`"): FMCSFreeze(start=-1)
    with pytest.raises(ValueError, match="shares of the fit lie in"): FMCSFreeze(by={"stem": 3})
    for kwargs, said in ((dict(by={"stag": .5}), "cannot freeze up to 'stag': its taps are stem, stage1, stage2"), (dict(freeze_until="head"), "cannot freeze up to 'head'"),
                         (dict(max_depth=.01), "nothing to freeze: no tap with weights lies within max_depth 0.01")):
        learn = learner(freeze=kwargs)
        before = weights(learn.model)
        with pytest.raises(TapError, match=said): learn.fit(1)
        assert_same(before, weights(learn.model))
        assert {**left_over(learn), "helpers": []} == NOTHING
    learn = learner(freeze={}, cbs=[FMCSFreeze()])
    with pytest.raises(ValueError, match="two FMCSFreeze callbacks"): learn.fit(1)

def test_it_says_when_it_could_judge_nothing():
    learn = learner(freeze=dict(every=1))
    learn.dls.train.dataset.tensors = (learn.dls.train.dataset.tensors[0], torch.zeros_like(learn.dls.train.dataset.tensors[1]))
    with pytest.warns(UserWarning, match="froze nothing in this fit: the ridge oracle could score no batch"): learn.fit(2)
