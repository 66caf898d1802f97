"Contracts of the universal oracle: what its scores may depend on, and what FMCECallback does with it."
import gzip
import struct
import warnings
from importlib.resources import files

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from fastai.callback.core import Callback
from fastai.callback.mixup import CutMix, MixUp
from fastai.learner import load_learner
from torch.testing import assert_close

from fmce_fastai.train.targets import join_targets, mixed_targets
from fmce_fastai.train.callback import FMCECallback
from fmce_fastai.train.scoring import N_COUNTED
from fmce_fastai.train.losses import fmcs_loss, representation_auxiliary_loss
from fmce_fastai.oracle.files import tensors_sha256
from fmce_fastai.oracle.base import FMCENet, OracleError
from fmce_fastai.oracle.kernels import class_alignment, class_share, debiased_alignment, gram_views, kernels, same_class, u_center
from fmce_fastai.oracle.universal import UniversalFMCENet
from fmce_fastai.util.state import hook_count
from fmce_fastai.maps.plan import TapError
from fmce_fastai.maps.tap import FeatureTap
from fmce_fastai.maps.find import tap_plan
from helpers import assert_same, make_learner, make_model, rng_state, seed_all, weights


@pytest.fixture(scope="module")
def oracle(): return FMCENet.universal()

def clustered(n=64, classes=10, channels=24, grid=4, spread=1., seed=0):
    "Maps of images that lie about a centre per class, and their labels."
    g = torch.Generator().manual_seed(seed)
    y = torch.randint(0, classes, (n,), generator=g)
    centres = torch.randn(classes, channels, grid, grid, generator=torch.Generator().manual_seed(99))
    return centres[y] + spread*torch.randn(n, channels, grid, grid, generator=g), y

def both(y): return [y, None]


# What a score depends on -------------------------------------------------------------------------------------------
@pytest.mark.parametrize("labels", [True, False])
def test_order_of_channels_and_images_and_the_unit_play_no_role(oracle, labels):
    x, y = clustered()
    images, channels = torch.randperm(len(x)), torch.randperm(x.shape[1])
    want = oracle({"m": x}, y if labels else None)
    assert want.valid.all()
    for scale in (1., 1e-6, 1e6):
        got = oracle({"m": scale*x[images][:, channels]}, y[images] if labels else None)
        assert_close(got.fmcs, want.fmcs[images], atol=2e-4, rtol=0)

def test_any_channels_grid_and_batch(oracle):
    for shape in [(8, 1, 1, 1), (9, 3, 1, 7), (33, 700, 2, 3), (64, 8, 40, 30)]:
        y = torch.arange(shape[0]) % 3
        for t in both(y):
            s = oracle({"m": torch.randn(shape, generator=torch.Generator().manual_seed(0))}, t)
            assert s.fmcs.shape == (shape[0], 1) and s.logits.shape == (shape[0], 1, 11) and s.valid.all() and ((s.fmcs >= 0) & (s.fmcs <= 1)).all()

def test_images_that_lie_nearer_to_their_class_never_score_lower(oracle):
    "The promise of the monotone net, on maps whose classes close in step by step."
    x, y = clustered(128, 8, spread=2.)
    centres = torch.stack([x[y == k].mean(0) for k in range(8)])[y]
    means = torch.stack([oracle({"m": torch.lerp(x, centres, t)}, y).fmcs.mean() for t in torch.linspace(0, .95, 12)])
    assert (means.diff() >= -1e-4).all() and means[-1] > means[0] + .2

def test_every_alignment_and_share_has_a_rising_effect(oracle):
    seed_all()
    a = torch.randn(50, len(oracle.labelled.mean))*.3 + .3
    a.requires_grad_()
    oracle.labelled(a, torch.full((50, 1), .7)).softmax(-1).matmul(oracle.levels).sum().backward()
    assert (a.grad >= 0).all() and (a.grad.sum(1) > 0).all()

def test_alignment_is_debiased_cka_where_there_are_ten_classes():
    "With 10 equal classes the reference variance is the batch's own, but for the ridge and the finite batch."
    y = torch.arange(200) % 10
    x = clustered(200, 10, spread=1.5)[0]*0 + torch.randn(200, 24, 4, 4, generator=torch.Generator().manual_seed(1)) + 2*F.one_hot(y, 24)[:, :, None, None]
    u = u_center(kernels(gram_views(x)[0]))[:, 0]  # cosine
    got, v = class_alignment(u, same_class(y))[0], u_center(same_class(y))
    want = (u*v).sum((-1, -2))/((u*u).sum((-1, -2))*(v*v).sum()).sqrt()
    assert_close(got, want, atol=.01, rtol=0)

def shares(x, y):
    k = kernels(gram_views(x)[0])[:, 0]  # cosine
    return class_share(k, u_center(k), same_class(y))

@pytest.mark.parametrize("spread", [.5, 1., 2.])
def test_the_class_share_is_the_intraclass_correlation(spread):
    "Of vectors drawn about class centres it is 1/(1 + spread^2), in batches of any size and number of classes."
    for n, classes in [(16, 2), (64, 10), (64, 30), (256, 100)]:
        found = []
        for seed in range(20):
            g = torch.Generator().manual_seed(seed)
            y = torch.arange(n) % classes
            x = torch.randn(classes, 2000, 1, 1, generator=g)[y] + spread*torch.randn(n, 2000, 1, 1, generator=g)
            found.append(shares(x, y)[0])
        assert_close(torch.stack(found).mean(0), torch.full((2,), 1/(1 + spread**2)), atol=.02, rtol=0)

def test_the_class_share_is_1_where_classes_are_points_and_an_image_out_of_place_has_less():
    y = torch.arange(40) % 4
    x = torch.randn(4, 30, 2, 2, generator=torch.Generator().manual_seed(0))[y]
    assert_close(shares(x, y)[0], torch.ones(2), atol=5e-3, rtol=0)
    x[0] = x[1]
    whole, rows = shares(x, y)
    assert (whole < .98).all() and (rows.argmin(1) == 0).all()

def test_noise_is_not_aligned_in_batches_of_any_size():
    "Plain CKA of noise is 0.33 at batch 64 with 10 classes; ours is 0 on average."
    for n, classes in [(16, 2), (64, 10), (64, 40), (200, 100)]:
        found = []
        for seed in range(30):
            g = torch.Generator().manual_seed(seed)
            x, y = torch.randn(n, 30, 3, 3, generator=g), torch.randint(0, classes, (n,), generator=g)
            found.append(torch.cat([class_alignment(u_center(kernels(gram_views(x)[0])), same_class(y))[0].flatten(), shares(x, y)[0], debiased_alignment(x, y)]))
        assert torch.stack(found).mean(0).abs().max() < .08, (n, classes)

@pytest.mark.parametrize("spread", [.7, 1.5, 3.])
def test_batch_size_and_number_of_classes_move_the_score_by_at_most_a_twentieth(oracle, spread):
    "The same maps, of 100 classes; batches of 16 to 256 images of 2 to 100 of the classes."
    means = {}
    for seed in range(30):
        x, y = clustered(4000, 100, spread=spread, seed=seed)
        some = torch.randperm(100, generator=torch.Generator().manual_seed(seed))
        for n, classes in [(16, 2), (16, 5), (64, 2), (64, 10), (64, 30), (256, 10), (256, 100)]:
            keep = torch.isin(y, some[:classes]).nonzero()[:, 0][:n]
            s = oracle({"m": x[keep]}, y[keep])
            means.setdefault((n, classes), []).append(float(s.fmcs[s.valid].mean()))
    means = {k: np.mean(v) for k, v in means.items()}
    assert max(means.values()) - min(means.values()) <= .05, {k: round(float(v), 3) for k, v in means.items()}

def test_soft_labels(oracle):
    x, y = clustered()
    hard = oracle({"m": x}, y)
    assert_close(oracle({"m": x}, F.one_hot(y, 10).float()).fmcs, hard.fmcs)
    soft = oracle({"m": x}, .8*F.one_hot(y, 10).float() + .2*F.one_hot((y+1) % 10, 10).float())
    assert soft.valid.all() and soft.fmcs.isfinite().all()


# What cannot be scored ---------------------------------------------------------------------------------------------
@pytest.mark.parametrize("case", ["zeros", "constant", "one class", "every image its own class", "too few"])
@pytest.mark.parametrize("labels", [True, False])
def test_what_cannot_be_scored_is_not_valid_and_has_finite_gradients(oracle, case, labels):
    x, y = clustered(7 if case == "too few" else 32)
    if case == "zeros": x = x*0
    if case == "constant": x = x*0 + 3e4
    if case == "one class": y = y*0
    if case == "every image its own class": y = torch.arange(len(x))
    x.requires_grad_()
    s = oracle({"m": x}, y if labels else None)
    scored = not labels and "class" in case  # without labels their classes play no role
    assert (s.valid == scored).all() and s.fmcs.isfinite().all() and s.logits.isfinite().all()
    s.fmcs.sum().backward()
    assert x.grad.isfinite().all()

def test_images_without_another_of_their_class_are_not_valid(oracle):
    x, y = clustered(32, 3)
    y[5] = 7
    s = oracle({"m": x}, y)
    assert s.valid.sum() == 31 and not s.valid[5]

def test_a_broken_image_is_left_out_and_changes_no_other_score(oracle):
    x, y = clustered(32, 4)
    keep = torch.arange(32) != 3
    bad = x.clone()
    bad[3, 0, 0, 0] = float("nan")
    bad.requires_grad_()
    for t in both(y):
        s = oracle({"m": bad}, t)
        want = oracle({"m": x[keep]}, None if t is None else t[keep])
        assert not s.valid[3, 0] and s.valid[keep].all()
        assert_close(s.fmcs[keep], want.fmcs, atol=1e-5, rtol=0)
        s.fmcs[s.valid].sum().backward()
        assert bad.grad.isfinite().all()

def test_errors(oracle):
    with pytest.raises(OracleError, match="No maps"): oracle({})
    with pytest.raises(OracleError, match=r"\(B, C, H, W\)"): oracle({"m": torch.randn(8, 3)})
    bound = oracle.on(tap_plan(make_model(), size=16))
    with pytest.raises(OracleError, match="No map for"): bound({"stem": torch.randn(8, 8, 8, 8)})


# The file ----------------------------------------------------------------------------------------------------------
def test_the_shipped_oracle(oracle):
    assert type(oracle) is UniversalFMCENet and oracle.frozen and oracle.plan is None and oracle.n_params <= 100_000
    path = files("fmce_fastai")/"universal.safetensors"
    assert path.stat().st_size <= 1_000_000 and oracle.card["sha256"] == tensors_sha256(oracle.state_dict())
    data = oracle.card["data"]
    assert len(data["families"]) >= 8 and len(data["networks"]) >= 12 and "ImageNet" in data["never"] and "test" in data["never"]

def test_round_trip_with_and_without_a_plan(oracle, tmp_path):
    x, y = clustered()
    plan = tap_plan(make_model(), size=16)
    for o, maps in ((oracle, {"m": x}), (oracle.on(plan), {t.name: torch.randn(32, t.channels, *t.grid) for t in plan})):
        o.save(tmp_path/"o.safetensors")
        again = FMCENet.load(tmp_path/"o.safetensors")
        assert again.plan == o.plan
        t = y[:len(next(iter(maps.values())))]
        assert torch.equal(again(maps, t).fmcs, o(maps, t).fmcs)

def test_binding_to_a_plan_leaves_the_oracle_alone(oracle):
    before = tensors_sha256(oracle.state_dict())
    bound = oracle.on(tap_plan(make_model(), size=16))
    assert oracle.plan is None and bound.labelled is oracle.labelled and tensors_sha256(oracle.state_dict()) == before


# The callback ------------------------------------------------------------------------------------------------------
def quiet(learn, n=2, **kwargs):
    with learn.no_bar(), learn.no_logging(): learn.fit(n, 1e-2, **kwargs)
    return learn

@pytest.mark.parametrize("arch, size", [(None, 16), ("test_vit", 160)])
def test_the_headline_line(arch, size):
    learn = make_learner(arch, size=size, cbs=FMCECallback(alpha=.9), n_train=48)
    quiet(learn)
    h = learn.fmce.history
    plan = tap_plan(learn.model, size=size)
    assert list(h.module.unique()) == plan.names and (h.acted == h.steps).all()
    pulled = h.groupby("module", sort=False).gradient_ratio.max()
    assert (pulled[-N_COUNTED:] > 0).all() and hook_count(learn.model) == 0
    assert learn.fmce.oracle.plan is None and all(not p.requires_grad for p in learn.fmce.oracle.parameters())

def test_taps_are_named_by_the_user():
    learn = quiet(make_learner(cbs=FMCECallback(.9, taps=["stage1"])))
    assert list(learn.fmce.history.module.unique()) == ["stage1"]
    learn = make_learner(cbs=FMCECallback(.9, taps=["stage7"]))
    before = weights(learn.model)
    with pytest.raises(TapError, match="stage7.*stage1"): quiet(learn)
    assert_same(weights(learn.model), before)
    assert hook_count(learn.model) == 0

@pytest.mark.parametrize("kind", ["nll", "gap"])
def test_the_loss_is_the_written_formula(kind):
    class Formula(Callback):
        order, run_valid = FMCECallback.order+1, False
        def before_batch(self):
            self.x0 = self.x.clone()
            self.tap = FeatureTap(self.plan).arm(self.model)
        def after_loss(self):
            maps = self.tap.take()
            s = self.oracle.on(self.plan)(maps, self.y.as_subclass(torch.Tensor))
            aux = fmcs_loss(s, kind, torch.tensor([n in self.plan.names[-N_COUNTED:] for n in maps])).value
            assert_close(self.learn.loss_grad.as_subclass(torch.Tensor), representation_auxiliary_loss(self.loss, aux, .7).as_subclass(torch.Tensor))
            self.seen = True
    formula = Formula()
    learn = make_learner(cbs=[FMCECallback(.7, fmcs_loss=kind), formula])
    formula.plan, formula.oracle, formula.seen = tap_plan(learn.model, x=torch.randn(2, 3, 16, 16)), FMCENet.universal(), False
    quiet(learn, 1)
    assert formula.seen

def test_alpha_0_changes_nothing():
    plain, watched = quiet(make_learner()), make_learner(cbs=FMCECallback(0.))
    quiet(watched)
    assert_same(weights(plain.model), weights(watched.model))
    seed_all(); quiet(plain); a = rng_state()
    seed_all(); quiet(watched); assert rng_state() == a
    assert (watched.fmce.history.watched == watched.fmce.history.steps).all() and watched.fmce.history.fmcs.notna().all()

def test_without_class_labels_it_watches_and_says_so():
    class Number(Callback):
        order = -10
        def before_batch(self): self.learn.yb = (self.y.as_subclass(torch.Tensor).float()[:, None],)
    def learner(*cbs):
        learn = make_learner(cbs=[Number(), *cbs], metrics=None)
        learn.loss_func = lambda p, y: ((p.mean(1, keepdim=True) - y)**2).mean()
        return quiet(learn)
    plain, forced = learner(), learner(FMCECallback(.9, when=0.))
    with pytest.warns(UserWarning, match="RAL cannot act in this fit"): other = learner(FMCECallback(.9))
    assert_same(weights(plain.model), weights(other.model))
    assert (other.fmce.history.watched == other.fmce.history.steps).all()
    assert (forced.fmce.history.acted == forced.fmce.history.steps).all()

@pytest.mark.parametrize("mixer", [MixUp, CutMix])
def test_mixed_images_have_mixed_labels(mixer):
    class Check(Callback):
        order, run_valid = 10_000, False
        def after_loss(self):
            got, cb = mixed_targets(self.learn), next(c for c in self.learn.cbs if isinstance(c, mixer))
            lam = torch.as_tensor(cb.lam).flatten().expand(len(self.y))
            for i, (own, other) in enumerate(zip(self.y.tolist(), cb.yb1[0].tolist())):
                want = torch.zeros(got.shape[1])
                want[own] += float(lam[i]); want[other] += 1 - float(lam[i])
                assert_close(got[i].as_subclass(torch.Tensor), want)
            self.checked = True
    check = Check()
    learn = quiet(make_learner(cbs=[mixer(), FMCECallback(.9), check]), 1)
    assert check.checked and (learn.fmce.history.acted > 0).all()

def test_a_batch_too_small_stays_plain():
    learn = make_learner(cbs=FMCECallback(.9, memory=0), bs=6, n_train=48)
    with pytest.warns(UserWarning, match="not_valid"): quiet(learn, 1)
    assert (learn.fmce.history.not_valid == learn.fmce.history.steps).all()

def test_export_travels_without_the_oracle(tmp_path):
    learn = quiet(make_learner(cbs=FMCECallback(.9)), 1)
    learn.export(tmp_path/"l.pkl")
    bare = make_learner(); bare.export(tmp_path/"bare.pkl")
    assert (tmp_path/"l.pkl").stat().st_size < (tmp_path/"bare.pkl").stat().st_size + 100_000
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "load_learner")  # fastai's word on pickle
        again = load_learner(tmp_path/"l.pkl")
    with again.no_bar(): again.predict(np.zeros((16, 16, 3), np.uint8))
    assert again.fmce.oracle is None and hook_count(again.model) == 0


# Its training set --------------------------------------------------------------------------------------------------
def test_no_test_file_is_opened(tmp_path):
    "FashionMNIST's folder holds the training files only, and reading works."
    from fmce_fastai.pretrain.tasks import make_task
    rng = np.random.default_rng(0)
    for name, head, data in [("train-images-idx3-ubyte", struct.pack(">IIII", 0x803, 60, 28, 28), rng.integers(0, 256, (60, 28, 28), np.uint8)), ("train-labels-idx1-ubyte", struct.pack(">II", 0x801, 60), np.arange(60, dtype=np.uint8) % 10)]:
        with gzip.open(tmp_path/f"{name}.gz", "wb") as f: f.write(head + data.tobytes())
    x, y, k = make_task("fashion", "plain", 50, 32, 0, tmp_path)
    assert x.shape == (50, 3, 32, 32) and k == 10

def test_the_digits_of_the_training_set_are_those_that_digits_dls_trains_on():
    from fmce_fastai.data.digits import digits_split
    from fmce_fastai.pretrain.images import digits_images
    from sklearn.datasets import load_digits
    data = load_digits()
    train, valid, test = digits_split(data.target)
    x, y = digits_images()
    assert len(x) == len(train) and not set(train) & (set(valid) | set(test))
    assert np.array_equal((x[:, 0]*16).round().numpy(), data.images[train])

def test_pretrain_resumes_where_it_was_stopped(tmp_path):
    from fmce_fastai.pretrain.labels import read_runs
    from fmce_fastai.pretrain.record import record_run
    from fmce_fastai.pretrain.runs import Run
    runs = [Run(f"r{i}", "test_efficientnet", s, "plain", i, epochs=2, bs=32, n_train=96, n_images=64, n_snapshots=3) for i, s in enumerate(("digits", "shapes"))]
    for r in runs: record_run(r, tmp_path)
    stamp = {p.name: p.stat().st_mtime_ns for p in tmp_path.iterdir()}
    for r in runs: record_run(r, tmp_path)
    assert stamp == {p.name: p.stat().st_mtime_ns for p in tmp_path.iterdir()} and set(read_runs(tmp_path)) == {"r0", "r1"}

def test_labels_are_absolute():
    "A run that only half learns never gets near 1; one that reaches the best loss does; a frozen or re-initialised stage is 0."
    from fmce_fastai.pretrain.labels import absolute_progress, run_labels
    rows = [dict(mode="eval", kind="fit", step=s) for s in (0, 50, 99)]
    task = dict(source="digits", task="plain", epochs=10, frozen=[])
    losses = lambda low: (np.log(10) - (np.log(10) - low)*np.linspace(0, 1, 100)).tolist()
    runs = {n: dict(run=task, n_classes=10, steps=100, clean=losses(low), rows=rows, taps=[{}, {}]) for n, low in (("good", .01), ("bad", 1.2))}
    p = absolute_progress(runs)
    assert p["good"][-1] > .95 and .4 < p["bad"][-1] < .5 and p["good"][0] == 0
    degraded = dict(runs["good"], run=dict(task, frozen=[1]), rows=rows + [dict(mode="eval", kind="reset", step=99, stage=0)])
    labels = run_labels(degraded, np.append(p["good"], 1.))
    assert (labels[:3, 1] == 0).all() and labels[3, 0] == 0 and np.isnan(labels[3, 1])


# A memory of earlier steps ----------------------------------------------------------------------------------------
def remembered(cb, steps, monkeypatch):
    "Maps, labels and scores of each step of a fit."
    seen, score = [], cb.score_maps
    def note(maps):
        s = score(maps)
        seen.append(({n: m.detach().clone() for n, m in maps.items()}, cb.batch_targets.clone(), s))
        return s
    monkeypatch.setattr(cb, "score_maps", note)
    learn = make_learner(cbs=cb)
    with learn.no_bar(), learn.no_logging(): learn.fit(1)
    return seen[:steps]

def test_memory_scores_a_batch_together_with_the_last_images(monkeypatch):
    cb = FMCECallback(.9, memory=40)
    seen = remembered(cb, 4, monkeypatch)
    n, oracle = len(seen[0][1]), FMCENet.universal().on(tap_plan(make_model(), x=torch.zeros(2, 3, 16, 16)))
    for i in range(1, 4):
        steps = seen[i::-1]  # newest first
        together = {k: torch.cat([maps[k] for maps, *_ in steps])[:n+40] for k in steps[0][0]}
        want = oracle(together, torch.cat([y for _, y, _ in steps])[:n+40])
        alone = oracle(seen[i][0], seen[i][1])
        assert_close(seen[i][2].fmcs.detach(), torch.cat([alone.fmcs[:, :1], want.fmcs[:n, 1:]], 1), atol=1e-4, rtol=0)  # the first of three taps does not count
        assert not torch.allclose(want.fmcs[:n, 1:], alone.fmcs[:, 1:], atol=1e-3)  # the other images matter
    assert cb._bank.targets is None  # nothing is held after the fit

def test_memory_lets_small_batches_be_scored_and_is_automatic():
    def acted(memory):
        cb = FMCECallback(.9, memory=memory)
        learn = make_learner(bs=4, cbs=cb)
        with learn.no_bar(), learn.no_logging(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            learn.fit(1)
        return cb.history.acted.iloc[0], cb.history.steps.iloc[0]
    assert FMCECallback(.9).memory == "auto" and acted(0)[0] == 0
    for memory in (64, "auto"):
        n, of = acted(memory)
        assert n > .9*of

@pytest.mark.parametrize("mixer", [MixUp, CutMix])
def test_memory_of_mixed_images(mixer):
    cb = FMCECallback(.9, memory=50)
    learn = make_learner(cbs=[cb, mixer()])
    with learn.no_bar(), learn.no_logging(): learn.fit(1)
    assert (cb.history.acted == cb.history.steps).all()

def test_labels_and_shares_join():
    a, b = torch.tensor([0, 2]), torch.tensor([[.5, .5, 0., 0.]])
    assert join_targets(a, a).tolist() == [0, 2, 0, 2]
    assert join_targets(a, b).tolist() == [[1, 0, 0, 0], [0, 0, 1, 0], [.5, .5, 0, 0]]
    assert join_targets(b, torch.tensor([5])).shape == (2, 6)

def test_other_sizes_start_a_new_memory():
    "Images of another size between two batches: what does not fit beside them is let go."
    cb = FMCECallback(.9, memory=50)
    cb.learn = make_learner()
    plan = tap_plan(cb.learn.model, x=torch.zeros(2, 3, 16, 16))
    cb.feature_tap, cb.scorer, cb.counted, cb.batch_targets = FeatureTap(plan), cb.oracle.on(plan), torch.tensor([False, True, True]), torch.arange(16) % 4
    maps = lambda side: {t.name: torch.randn(16, t.channels, side, side) for t in plan}
    for side, kept in ((4, 16), (4, 32), (2, 16)):
        assert cb.score_maps(maps(side)).fmcs.shape == (16, 3)
        assert {m.shape for m in cb._bank.maps.values()} == {(kept, plan.channels[n], side, side) for n in plan.names[1:]}

@pytest.mark.parametrize("memory", [-1, 2.5, True, "all"])
def test_a_memory_that_is_no_number_of_images_is_refused(memory):
    with pytest.raises(ValueError, match="give a number of images"): FMCECallback(memory=memory)
