"Networks with several inputs are probed with all of them and read; what is no network with image feature maps is refused in one sentence."
import re

import numpy as np
import pandas as pd
import pytest
import timm
import torch
from fastai.data.core import DataLoaders
from fastai.data.load import DataLoader
from fastai.learner import Learner
from fastai.losses import CrossEntropyLossFlat
from torch import nn

from fmce_fastai.maps.check import check_taps
from fmce_fastai.maps.find import tap_plan
from fmce_fastai.maps.plan import TapError
from fmce_fastai.maps.pool import pool_map
from fmce_fastai.maps.tap import FeatureTap
from fmce_fastai.oracle.base import FMCENet
from fmce_fastai.oracle.fitted import FittedFMCENet
from fmce_fastai.report.report import fmce_report
from fmce_fastai.train.callback import FMCECallback
from fmce_fastai.train.recorder import FMCSRecorder
from fmce_fastai.util.state import hook_count
from helpers import TinyNet, assert_same, make_model, rng_state, seed_all, weights

pytestmark = pytest.mark.filterwarnings("ignore::fmce_fastai.convergence.run.ConvergenceWarning")  # so short a run does not converge


# Networks by the form of their inputs: what `forward` gets for images a and b and a table t -------------------------------
class Pair(TinyNet):
    "One encoder for two images; its head sees the difference of their features."
    def maps(self, x): return self.stage2(self.stage1(self.stem(x)))
    def pooled(self, x): return self.drop(self.maps(x).mean((2, 3)))
    def both(self, a, b):
        first = self.pooled(a)
        return self.head(self.pooled(b) - .1*first)
    def forward(self, a, b): return self.both(a, b)

class OfTuple(Pair):
    def forward(self, pair): return self.both(*pair)

class OfDict(Pair):
    def forward(self, batch): return self.both(batch["a"], batch["b"])

class Nested(Pair):
    def forward(self, batch):
        (t,), images = batch
        return self.both(images["a"], images["b"]) + t.sum(1, keepdim=True)

class WithTable(Pair):
    "One image, and a table of numbers."
    def __init__(self, **kwargs): super().__init__(**kwargs); self.table = nn.Linear(5, 10)
    def forward(self, b, t): return self.head(self.pooled(b)) + self.table(t)

class TableFirst(WithTable):
    def forward(self, t, b): return super().forward(b, t)

class TwoSizes(Pair):
    "The second image is half as large; a third input has no row per image."
    def forward(self, a, b, scale): return self.both(a, b)*scale

FORMS = {
    "two images": (Pair, lambda a, b, t: (a, b)),
    "a tuple": (OfTuple, lambda a, b, t: ((a, b),)),
    "a dict": (OfDict, lambda a, b, t: (dict(a=a, b=b),)),
    "nested": (Nested, lambda a, b, t: ([(t,), dict(a=a, b=b)],)),
    "an image and a table": (WithTable, lambda a, b, t: (b, t)),
    "a table and an image": (TableFirst, lambda a, b, t: (t, b)),
}

class Items(torch.utils.data.Dataset):
    "Items (inputs, target): a random image a, an image b in a shade of its class, and a table t."
    def __init__(self, n, form, seed=0):
        gen = torch.Generator().manual_seed(seed)
        self.y, self.form = torch.arange(n) % 4, form
        self.a, self.t = torch.randn(n, 3, 16, 16, generator=gen), torch.randn(n, 5, generator=gen)
        self.b = torch.randn(n, 3, 16, 16, generator=gen) + self.y[:, None, None, None]/3
    def __len__(self): return len(self.y)
    def __getitem__(self, i): return *self.form(self.a[i], self.b[i], self.t[i]), self.y[i]
    def batch(self, n=None): return self.form(self.a[:n], self.b[:n], self.t[:n])

def learner(form, cbs=None):
    seed_all()
    cls, arrange = FORMS[form]
    train, valid = Items(64, arrange), Items(32, arrange, seed=1)
    dls = DataLoaders(DataLoader(train, bs=16, shuffle=True), DataLoader(valid, bs=16))
    learn = Learner(dls, cls(), loss_func=CrossEntropyLossFlat(), cbs=cbs, metrics=[])
    learn.logger = lambda *_: None
    seed_all()
    return learn

def fit(learn):
    with learn.no_bar(): learn.fit(1, 1e-2)
    return learn


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("oracle", ["fitted", "universal"])
def test_networks_of_several_inputs_are_trained(form, oracle):
    learn = learner(form)
    x = learn.dls.train.dataset.batch(2)
    plan = tap_plan(learn.model, x=x)
    assert plan.names == ["stem", "stage1", "stage2"] and plan.probe == (2, 3, 16, 16)
    learn.add_cb(FMCECallback(.5, FittedFMCENet(plan, width=8).freeze() if oracle == "fitted" else None))
    fit(learn)
    h = learn.fmce.history
    assert (h.acted == 4).all() and np.isfinite(h.fmcs).all() and hook_count(learn.model) == 0

@pytest.mark.parametrize("form", FORMS)
def test_alpha_0_changes_no_bit_of_them(form):
    after = []
    for cbs in ([], [FMCECallback(0.)], [FMCSRecorder(n_images=16, n_snapshots=3)]):
        learn = fit(learner(form, cbs))
        after.append((weights(learn.model), rng_state()))
    for w, state in after[1:]:
        assert_same(w, after[0][0])
        assert state == after[0][1]

@pytest.mark.parametrize("form", FORMS)
def test_networks_of_several_inputs_are_recorded(form):
    rec = FMCSRecorder(n_images=16, n_snapshots=3)
    learn = learner(form, [rec])
    items = learn.dls.train.dataset
    start = type(learn.model)()
    start.load_state_dict(learn.model.state_dict())
    fit(learn)
    ds = rec.dataset
    assert ds.plan.names == ["stem", "stage1", "stage2"] and len(ds.steps) == 4
    images = items.b[ds.card["image_indices"]]
    with torch.no_grad(): want = pool_map(start.eval().maps(images))
    np.testing.assert_allclose(ds.maps("stage2", 0)[0].astype("float32"), want.numpy(), rtol=2e-3, atol=1e-3)
    assert ds.targets.tolist() == items.y[ds.card["image_indices"]].tolist()

@pytest.mark.parametrize("form", FORMS)
def test_the_report_of_several_inputs_is_that_of_the_image_read_last(form):
    learn = learner(form)
    plain = TinyNet()
    plain.load_state_dict(learn.model.state_dict(), strict=False)
    items = learn.dls.valid.dataset
    dl = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(items.b, items.y), batch_size=16)
    got, want = (fmce_report(net, loader, control=1, new_networks=0, bar=False) for net, loader in ((learn, None), (plain, dl)))
    want.table["learnt"] = got.table["learnt"]  # of the whole network's parameters in the order of registration
    pd.testing.assert_frame_equal(got.table, want.table)
    assert np.isfinite(got.table.fmcs).all() and got.pixels.keys() == want.pixels.keys() and got.pixels

@pytest.mark.parametrize("form", FORMS)
def test_taps_read_the_last_call(form):
    learn = learner(form)
    model, items = learn.model.eval(), learn.dls.train.dataset
    x = items.batch(4)
    for cache in (True, False):
        plan = tap_plan(model, "stage2", x=x, cache=cache)
        tap = FeatureTap(plan).arm(model)
        model(*x)
        assert torch.equal(tap.take()["stage2"], model.maps(items.b[:4]))
    assert check_taps(model, plan, x).task_gradient.gt(0).all()

def test_a_siamese_network_of_timms():
    "The encoder is found, and its plan is that of the network alone: names, grids, depths."
    class Siamese(nn.Module):
        def __init__(self):
            super().__init__()
            self.encoder, self.head = make_model("test_resnet"), nn.Linear(20, 2)
        def forward(self, a, b): return self.head(torch.cat([self.encoder(a), self.encoder(b)], 1))
    model, (a, b) = Siamese().eval(), torch.randn(2, 2, 3, 64, 64)
    plan, alone = tap_plan(model, x=(a, b)), tap_plan(model.encoder, x=b)
    assert plan == alone and plan.source == "forward_intermediates"
    tap, by_itself = FeatureTap(plan).arm(model), FeatureTap(alone).arm(model.encoder)
    by_itself.detach()
    model(a, b)
    seen = tap.take()
    by_itself.arm(model.encoder)
    model.encoder(b)
    for n, m in by_itself.take().items(): assert torch.equal(m, seen[n])

def test_two_encoders_and_two_sizes():
    class Apart(TinyNet):
        "Each image has stages of its own."
        def __init__(self): super().__init__(); self.other = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU())
        def forward(self, a, b): return super().forward(a) + self.other(b).mean()
    x = torch.randn(2, 3, 16, 16), torch.randn(2, 3, 32, 32)
    plan = tap_plan(Apart(), x=x)
    assert plan.names == ["stage1", "stage2", "other"] or plan.names == ["stem", "stage1", "stage2", "other"]
    plan = tap_plan(TwoSizes(), x=(torch.randn(2, 3, 32, 32), torch.randn(2, 3, 16, 16), torch.tensor(2.)))
    assert [t.grid for t in plan] == [(8, 8), (4, 4), (2, 2)]

def test_a_network_that_joins_its_inputs_is_refused_in_words():
    "Its maps have two rows an image, and the targets one."
    class Joined(Pair):
        def forward(self, a, b):
            f = self.pooled(torch.cat([a, b]))
            return self.head(f[:len(a)] - f[len(a):])
    learn = learner("two images")
    learn.model = Joined()
    learn.add_cb(FMCECallback())
    before = weights(learn.model)
    with pytest.raises(TapError, match="maps of 4 images for 2.*joins") as e: fit(learn)
    assert_same(before, weights(learn.model))
    with pytest.raises(TapError, match="maps of 4 images for 2"): tap_plan(learn.model, "stage2", x=learn.dls.train.dataset.batch(2))
    class JoinedTimm(nn.Module):
        def __init__(self): super().__init__(); self.encoder = make_model("test_resnet")
        def forward(self, a, b): return self.encoder(torch.cat([a, b]))[:len(a)]
    with pytest.raises(TapError, match="maps of 4 images for 2"): tap_plan(JoinedTimm(), x=(torch.randn(2, 3, 32, 32),)*2)

def test_inputs_are_cut_to_two_images_in_every_form():
    from fmce_fastai.maps.inputs import describe_inputs, first_image, first_rows, run
    a, b, t, scale = torch.randn(6, 3, 8, 8), torch.randn(6, 3, 4, 4), torch.randn(6, 5), torch.tensor(2.)
    class Point(tuple):
        _fields = ("a", "b")
        def __new__(cls, a, b): return tuple.__new__(cls, (a, b))
    x = (dict(a=a, more=[(t,), Point(b, None)]), scale, torch.ones(3), ["cat"]*6, "text")
    cut = first_rows(x)
    assert torch.equal(cut[0]["a"], a[:2]) and torch.equal(cut[0]["more"][0][0], t[:2]) and torch.equal(cut[0]["more"][1][0], b[:2])
    assert isinstance(cut[0]["more"][1], Point) and cut[1] == scale and len(cut[2]) == 3 and cut[3] == ["cat"]*2 and cut[4] == "text"
    assert first_image(x) is a and first_image((t, [b])) is b and first_image((t, scale)) is None
    assert run(lambda *args: args, (a, t)) == (a, t) and run(lambda *args: args, a) == (a,)
    assert describe_inputs((t, torch.ones(6, dtype=torch.long))) == "(6, 5) float32, (6,) int64" and describe_inputs("x") == "str"

@pytest.mark.parametrize("x, part", [((1,), "x is tuple"), (torch.zeros(3, 8, 8), "x is (3, 8, 8) float32"), ((torch.zeros(2, 5), torch.zeros(2)), "x is (2, 5) float32, (2,) float32"), ({}, "x is dict"), ("a", "x is str")])
def test_inputs_without_images(x, part):
    with pytest.raises(TypeError) as e: tap_plan(make_model(), x=x)
    assert str(e.value).startswith(part) and "(B, C, H, W)" in str(e.value)

def test_a_network_of_two_inputs_without_a_batch_says_what_to_pass():
    with pytest.raises(TapError, match=r"missing 1 required positional argument: 'b'.*x=\(a, b\)"): tap_plan(Pair(), size=16)


# What has no images ------------------------------------------------------------------------------------------------------
def tabular(path):
    from fastai.tabular.all import CategoryBlock, Categorify, FillMissing, Normalize, TabularDataLoaders, tabular_learner
    rng = np.random.default_rng(0)
    df = pd.DataFrame(dict(kind=rng.choice(list("xyz"), 96), n=rng.normal(size=96), m=rng.normal(size=96), y=rng.choice(["no", "yes"], 96)))
    dls = TabularDataLoaders.from_df(df, path, procs=[Categorify, FillMissing, Normalize], cat_names=["kind"], cont_names=["n", "m"], y_names="y", y_block=CategoryBlock(), bs=16)
    return tabular_learner(dls, layers=[8], metrics=[])

def text(path):
    from fastai.text.all import AWD_LSTM, awd_lstm_clas_config, Categorize, Datasets, ItemGetter, Numericalize, pad_input_chunk, SortedDL, text_classifier_learner
    vocab, rng = "xxunk xxpad the a cat dog sits runs".split(), np.random.default_rng(0)
    items = [(rng.choice(vocab[2:], rng.integers(5, 12)).tolist(), "yes" if i % 2 else "no") for i in range(80)]
    data = Datasets(items, [[ItemGetter(0), Numericalize(vocab)], [ItemGetter(1), Categorize()]], splits=[range(64), range(64, 80)], dl_type=SortedDL)
    dls = data.dataloaders(bs=16, before_batch=pad_input_chunk)
    return text_classifier_learner(dls, AWD_LSTM, config={**awd_lstm_clas_config, "emb_sz": 8, "n_hid": 8, "n_layers": 2}, pretrained=False, metrics=[])

def sequences(path):
    seed_all()
    data = torch.utils.data.TensorDataset(torch.randn(32, 3, 50), torch.arange(32) % 4)
    dls = DataLoaders(DataLoader(data, bs=8), DataLoader(data, bs=8))
    return Learner(dls, nn.Sequential(nn.Conv1d(3, 4, 3), nn.Flatten(), nn.LazyLinear(4)), loss_func=CrossEntropyLossFlat())

def flat(path):
    "A network whose inputs hold no image, though it makes one of them: refused, too."
    seed_all()
    data = torch.utils.data.TensorDataset(torch.randn(32, 12, 12), torch.arange(32) % 4)
    dls = DataLoaders(DataLoader(data, bs=8), DataLoader(data, bs=8))
    return Learner(dls, nn.Sequential(nn.Unflatten(1, (1, 12)), make_model(channels=1)), loss_func=CrossEntropyLossFlat())

WITHOUT = {"tabular": (tabular, r"\(16, 1\) int64, \(16, 2\) float32"), "text": (text, r"\(16, 1?\d\) int64"), "sequences": (sequences, r"\(8, 3, 50\) float32"), "flat": (flat, r"\(8, 12, 12\) float32")}

@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("what", WITHOUT)
@pytest.mark.parametrize("who", ["FMCECallback", "FMCSRecorder"])
@pytest.mark.parametrize("how", ["in the learner", "in fit"])
def test_learners_without_images_are_told_in_one_sentence(what, who, how, tmp_path):
    make, shapes = WITHOUT[what]
    learn = make(tmp_path)
    learn.model(*(t.to("cpu") for t in learn.dls.train.one_batch()[:learn.dls.n_inp if what in ("tabular", "text") else 1]))  # lazy layers
    before = weights(learn.model)
    cb = FMCECallback() if who == "FMCECallback" else FMCSRecorder()
    if how == "in the learner": learn.add_cb(cb)
    with pytest.raises(TapError) as e, learn.no_bar(), learn.no_logging(): learn.fit(1, cbs=[] if how == "in the learner" else [cb])
    said = str(e.value).removeprefix("Exception occured in `FMCSRecorder` when calling event `before_train`:\n\t")
    assert re.fullmatch(rf"{who} needs a network with image feature maps; the first batch's inputs are {shapes}, none of them images \(B, C, H, W\)\. Remove the callback\.", said), said
    after = weights(learn.model)
    assert_same({k: v for k, v in before.items() if "running" not in k}, {k: v for k, v in after.items() if "running" not in k})
    assert hook_count(learn.model) == 0

@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("what", WITHOUT)
def test_the_report_of_learners_without_images(what, tmp_path):
    make, shapes = WITHOUT[what]
    with pytest.raises(TapError, match=f"^fmce_report needs a network with image feature maps; the first batch's inputs are {shapes}, none of them images"): fmce_report(make(tmp_path), bar=False, n_images=16)

@pytest.mark.filterwarnings("ignore")
def test_after_the_callback_is_removed_the_learner_trains(tmp_path):
    learn = tabular(tmp_path)
    learn.add_cb(FMCECallback())
    with pytest.raises(TapError), learn.no_bar(), learn.no_logging(): learn.fit(1)
    learn.remove_cb(FMCECallback)
    with learn.no_bar(), learn.no_logging(): learn.fit(1)

def test_errors_of_the_probe_name_no_helper():
    "fastai puts the name of the callback before an error; that of our helper says nothing to a user."
    learn = learner("two images")
    learn.model = nn.Sequential(nn.Flatten(), nn.Linear(3*16*16, 4))
    learn.dls = DataLoaders(*(DataLoader(torch.utils.data.TensorDataset(torch.randn(32, 3, 16, 16), torch.arange(32) % 4), bs=8) for _ in range(2)))
    learn.add_cb(FMCECallback())
    with pytest.raises(TapError, match="^Sequential has no module with a map to tap"): fit(learn)


# A network inside another ------------------------------------------------------------------------------------------------
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("arch", ["legacy_xception"])
def test_maps_found_by_value_are_found_in_a_wrapped_network(arch):
    "timm calls some of its modules in place of others, so that only values tell which module returns a map."
    seed_all()
    model = timm.create_model(arch, num_classes=4).eval()
    bare = tap_plan(model, "all", size=64)
    assert bare.source == "forward_intermediates"
    for wrapped in (nn.Sequential(model), nn.Sequential(nn.Sequential(nn.Identity(), model))):
        plan = tap_plan(wrapped, "all", size=64)
        assert plan.names == bare.names and plan.note == bare.note
