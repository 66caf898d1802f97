"Contracts of the recorder: training unchanged to the last bit, maps that are the network's, damage that is named."
import json
import pickle
import shutil
import warnings

import numpy as np
import pandas as pd
import pytest
import torch
from fastai.callback.core import CancelBatchException, CancelFitException, Callback
from fastai.callback.progress import ProgressCallback
from fastai.callback.training import GradientAccumulation

from fmce_fastai.convergence.run import convergence
from fmce_fastai.data.digits import digits_dls
from fmce_fastai.util.state import undisturbed
from fmce_fastai.oracle.dataset import DatasetError, FMCSDataset
from fmce_fastai.train.recorder import FMCSRecorder, snapshot_steps
from fmce_fastai.util.state import hook_count
from fmce_fastai.maps.pool import pool_map
from helpers import Probe, RaiseAt, assert_same, make_learner, make_model, rng_state, seed_all, tensor_learner, weights

pytestmark = [
    # these fits are far too short to converge, and the recorder says so
    pytest.mark.filterwarnings("ignore::fmce_fastai.convergence.run.ConvergenceWarning"),
    # fastai reads image files in a way that Pillow and NumPy deprecate
    pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy keyword:DeprecationWarning"),
    # fastai's random crops and warps solve their equations, and scripted functions, in a deprecated way
    pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:FutureWarning"),
]


@pytest.fixture(autouse=True)
def quiet(monkeypatch):
    for e in ("before_fit", "before_epoch", "before_train", "before_validate", "after_train", "after_validate", "after_batch", "after_fit"): monkeypatch.setattr(ProgressCallback, e, lambda self: None, raising=False)

def silent(learn): learn.logger = lambda *_: None; return learn

class Watch(Callback):
    "Keeps the weights before every step."
    order, run_valid = 4, False
    def __init__(self): self.states, self.modes = [], []
    def before_batch(self):
        self.states.append(weights(self.model))
        self.modes.append([m.training for m in self.model.modules()])


def augmented(kind, tmp_path):
    from fastai.vision.all import ImageDataLoaders, RandomResizedCrop, aug_transforms
    seed_all(5)
    if kind == "batch": return digits_dls(size=16, n_train=50, bs=16, augment=aug_transforms(size=16))
    from PIL import Image
    gen = np.random.default_rng(0)
    for c in "ab":
        (tmp_path/c).mkdir(exist_ok=True)
        for i in range(30): Image.fromarray(gen.integers(0, 256, (24, 24, 3), dtype=np.uint8)).save(tmp_path/c/f"{i}.png")
    return ImageDataLoaders.from_folder(tmp_path, valid_pct=.3, seed=0, bs=16, item_tfms=RandomResizedCrop(16, min_scale=.4), batch_tfms=aug_transforms(), num_workers=0)


@pytest.mark.parametrize("kind", ["tensors", "torch loaders", "drop_last", "digits", "batch", "item", "real"])
def test_recording_changes_no_bit_of_training(kind, tmp_path):
    out = []
    for record in (False, True):
        if kind in ("tensors", "torch loaders", "drop_last"): learn = tensor_learner(n=70, torch_loaders=kind == "torch loaders", drop_last=True if kind == "drop_last" else None)
        elif kind in ("batch", "item"): learn = make_learner(dls=augmented(kind, tmp_path))
        else: learn = make_learner("test_resnet" if kind == "real" else None, n_train=100)
        silent(learn).add_cb(Probe())
        if record: learn.add_cb(FMCSRecorder(32, 6))
        seed_all(7)
        learn.fit_one_cycle(2, 1e-2)
        out.append(learn)
    a, b = out
    assert_same(weights(a.model), weights(b.model))
    assert [float(l) for l in a.probe.losses] == [float(l) for l in b.probe.losses] and a.probe.seen == b.probe.seen
    assert [list(v) for v in a.recorder.values] == [list(v) for v in b.recorder.values] and list(a.recorder.metric_names) == list(b.recorder.metric_names)
    seed_all(8); a.fit(1); after = rng_state()
    seed_all(8); b.fit(1)
    assert rng_state() == after and a.probe.seen == b.probe.seen and len(b.fmcs_recorder.datasets) == 2
    assert hook_count(b.model) == 0


def test_random_states_after_a_recorded_fit():
    states = []
    for record in (False, True):
        learn = silent(tensor_learner(cbs=FMCSRecorder(16, 4) if record else None))
        seed_all(1); learn.fit(1)
        states.append(rng_state())
    assert states[0] == states[1]


@pytest.mark.parametrize("frozen_bn", [False, True])
def test_maps_are_the_networks_own_at_that_step(frozen_bn):
    watch, rec = Watch(), FMCSRecorder(32, 5)
    learn = silent(make_learner(n_train=64, cbs=[watch, rec]))
    if frozen_bn:
        class Eval(Callback):
            order = 0
            def before_batch(self): self.learn.model.stem[1].eval()
        learn.add_cb(Eval())
    learn.fit(2, 1e-2)
    watch.states.append(weights(learn.model)); watch.modes.append(watch.modes[-1])
    ds = rec.dataset
    assert ds.snapshots.step.tolist() == snapshot_steps(8, 5).tolist() == [0, 1, 3, 8] or ds.snapshots.step.tolist() == snapshot_steps(8, 5).tolist()
    items = learn.dls.train_ds
    idx = ds.card["image_indices"]
    assert len(set(idx)) == 32 == ds.n_images
    batches = [learn.dls.train.new(shuffle=False, drop_last=False, bs=16, get_idxs=lambda i=i: idx[i:i+16], n=16).one_batch() for i in (0, 16)]
    assert ds.targets.tolist() == torch.cat([y for _, y in batches]).tolist()
    model = make_model()
    for k, step in enumerate(ds.snapshots.step):
        for m, mode in enumerate(("eval", "train")):
            found = {n: [] for n in ds.plan.names}
            model.load_state_dict(watch.states[step])
            torch.manual_seed(0)
            for x, _ in batches:
                for mod, training in zip(model.modules(), watch.modes[step]): mod.training = training and mode == "train"
                if step == ds.snapshots.step.iloc[-1] and mode == "train" and not frozen_bn: model.train()
                handles = [model.get_submodule(n).register_forward_hook(lambda mm, a, o, n=n: found[n].append(pool_map(o.detach()))) for n in found]
                with torch.no_grad(): model(x.as_subclass(torch.Tensor))
                for h in handles: h.remove()
            for n in found: torch.testing.assert_close(torch.from_numpy(np.array(ds.maps(n, k)[m])), torch.cat(found[n]).half(), rtol=2e-3, atol=1e-4)


def test_tables_are_the_fits():
    rec = FMCSRecorder(16, 6, threshold=.2, n_levels=5)
    learn = silent(tensor_learner(n=160, bs=16, cbs=[Probe(), rec]))
    learn.fit_one_cycle(8, 1e-2)
    ds = rec.dataset
    assert ds.steps.loss.to_numpy() == pytest.approx([float(l) for l in learn.probe.losses], rel=1e-6) and ds.steps.step.tolist() == list(range(80))
    assert ds.steps.lr.to_numpy() == pytest.approx(np.array(learn.recorder.lrs))
    assert ds.snapshots.step.tolist() == snapshot_steps(80, 6).tolist() and ds.snapshots.epoch.to_numpy() == pytest.approx(ds.snapshots.step/10)
    conv = convergence(ds.steps.loss.to_numpy(), 10, threshold=.2, n_levels=5)
    want = conv.label(ds.snapshots.step.to_numpy()) if conv.usable else np.full(6, np.nan)
    np.testing.assert_allclose(ds.fmcs, want)
    assert conv.usable and ds.card["run"]["status"] == conv.status
    again = FMCSDataset(ds.path)
    np.testing.assert_allclose(again.fmcs, ds.fmcs)


@pytest.mark.parametrize("n, k", [(1, 2), (5, 16), (100, 16), (7, 7)])
def test_schedule(n, k):
    s = snapshot_steps(n, k)
    want = sorted({int(np.round(n*(i/(k-1))**3)) for i in range(k)})
    assert s.tolist() == want and s[0] == 0 and s[-1] == n


def test_byte_budget_and_existing_folders(tmp_path):
    learn = silent(tensor_learner())
    before, rng = weights(learn.model), rng_state()
    with pytest.raises(DatasetError, match="over max_bytes.*n_images="): learn.fit(1, cbs=FMCSRecorder(32, 4, path=tmp_path/"x", max_bytes=1000))
    assert not (tmp_path/"x").exists()
    (tmp_path/"full").mkdir(); (tmp_path/"full"/"mine.txt").write_text("x"); (tmp_path/"file").write_text("x")
    for p in ("full", "file"):
        with pytest.raises(FileExistsError, match="already exists"): learn.fit(1, cbs=FMCSRecorder(32, 4, path=tmp_path/p))
    assert (tmp_path/"full"/"mine.txt").read_text() == "x" and (tmp_path/"file").read_text() == "x"
    assert_same(before, weights(learn.model))
    rec = FMCSRecorder(32, 4, path=tmp_path/"y")
    learn.fit(1, cbs=rec)
    pooled = lambda side: -(-side//-(-side//7))  # blocks of ceil(side/7) pixels
    sizes = sum(t.channels*pooled(t.grid[0])*pooled(t.grid[1]) for t in rec.dataset.plan)*2*2*32*len(rec.dataset)
    assert sizes <= rec.dataset.nbytes <= sizes + 200*len(rec.dataset)*len(rec.dataset.plan)
    rec2 = FMCSRecorder(32, 4, max_bytes=sizes)
    learn.fit(1, cbs=rec2)
    with pytest.raises(DatasetError): learn.fit(1, cbs=FMCSRecorder(32, 4, max_bytes=sizes-1))


@pytest.mark.parametrize("error", [RuntimeError("x"), KeyboardInterrupt()], ids=lambda e: type(e).__name__)
def test_a_broken_off_fit_can_be_finished(error, tmp_path):
    rec = FMCSRecorder(16, 8, path=tmp_path/"d")
    learn = silent(tensor_learner(cbs=[Probe(), rec, RaiseAt("after_batch", error, skip=14)]))
    with pytest.raises(type(error)): learn.fit(8)
    with pytest.raises(DatasetError, match="finish"): FMCSDataset(tmp_path/"d")
    with pytest.raises(DatasetError, match="finish"): rec.dataset
    ds = rec.finish()
    assert len(ds.steps) in (11, 12, 13, 14) and ds.snapshots.step.iloc[-1] == len(ds.steps) and rec.dataset is ds and rec.finish() is ds
    learn.fit(1)
    assert len(rec.datasets) == 2 and rec.dataset.path == tmp_path/"d-2"


@pytest.mark.parametrize("event", ["before_train", "before_batch", "after_pred", "after_loss"])
@pytest.mark.parametrize("path", [False, True])
def test_a_fit_broken_off_before_its_first_step_leaves_nothing(event, path, tmp_path):
    rec = FMCSRecorder(16, 4, path=tmp_path/"d" if path else None)
    learn = silent(tensor_learner(cbs=[rec, RaiseAt(event, KeyboardInterrupt(), order=99)]))
    with pytest.raises(KeyboardInterrupt): learn.fit(1)
    with pytest.raises(DatasetError, match="Nothing is recorded"): rec.finish()
    assert not (tmp_path/"d").exists()
    learn.fit(1)
    assert len(rec.datasets) == 1 and len(rec.dataset.steps) == 4 and (not path or rec.dataset.path == tmp_path/"d")


@pytest.mark.parametrize("order", [-1, 99])
def test_cancelled_batches_are_no_steps(order):
    class Skip(Callback):
        run_valid = False
        def before_batch(self):
            if self.iter % 2 == 0: raise CancelBatchException
    skip = Skip(); skip.order = order
    learn = silent(tensor_learner(n=128, cbs=[Probe(), skip, FMCSRecorder(16, 4)]))
    learn.fit(2)
    ds = learn.fmcs_recorder.dataset
    assert ds.steps.loss.to_numpy() == pytest.approx([float(l) for l in learn.probe.losses]) and len(ds.steps) == 8 and ds.snapshots.step.tolist()[0] == 0


def test_fine_tune_start_epoch_and_accumulation(tmp_path):
    rec = FMCSRecorder(16, 4, path=tmp_path/"d")
    learn = silent(tensor_learner(splitter=lambda m: [list(m.stem.parameters()), [p for n, p in m.named_parameters() if not n.startswith("stem")]], cbs=[rec, GradientAccumulation(32)]))
    learn.fine_tune(2, freeze_epochs=1)
    assert [len(d.steps) for d in rec.datasets] == [4, 8] and [d.path.name for d in rec.datasets] == ["d", "d-2"]
    learn.fit_one_cycle(4, start_epoch=2)
    assert rec.dataset.snapshots.step.tolist() == snapshot_steps(8, 4).tolist() and len(rec.dataset.steps) == 8
    assert hook_count(learn.model) == 0


# torch unpickles the weights that `lr_find` kept by NumPy's old names
@pytest.mark.filterwarnings("ignore:numpy.core is deprecated:DeprecationWarning")
def test_validation_and_lr_find_record_nothing(tmp_path):
    import fastai.callback.schedule
    learn = silent(tensor_learner(cbs=FMCSRecorder(16, 4), path=tmp_path))
    learn.validate(); learn.get_preds(); learn.lr_find(num_it=4, show_plot=False, suggest_funcs=())
    assert not learn.fmcs_recorder.datasets and learn.fmcs_recorder._recording is None


HARM = {"no card": lambda p: (p/"card.json").unlink(), "cut card": lambda p: (p/"card.json").write_bytes((p/"card.json").read_bytes()[:200]), "empty card": lambda p: (p/"card.json").write_text(""),
        "card is a list": lambda p: (p/"card.json").write_text("[]"), "card without plan": lambda p: (p/"card.json").write_text("{}"), "binary card": lambda p: (p/"card.json").write_bytes(b"\xff\xfe\x00"),
        "empty steps": lambda p: (p/"steps.csv").write_text(""), "no snapshots": lambda p: (p/"snapshots.csv").unlink(), "binary steps": lambda p: (p/"steps.csv").write_bytes(b"\xff\xfe\x00\x9d"),
        "empty targets": lambda p: (p/"targets.npy").write_bytes(b""), "cut targets": lambda p: (p/"targets.npy").write_bytes((p/"targets.npy").read_bytes()[:-3]), "pickled targets": lambda p: np.save(p/"targets.npy", np.array([{}]), allow_pickle=True),
        "no maps": lambda p: shutil.rmtree(p/"maps"), "a map missing": lambda p: (p/"maps"/"stem.001.npy").unlink(), "empty map": lambda p: (p/"maps"/"stem.001.npy").write_bytes(b""),
        "cut map": lambda p: (p/"maps"/"stem.001.npy").write_bytes((p/"maps"/"stem.001.npy").read_bytes()[:-3]), "other map": lambda p: np.save(p/"maps"/"stem.001.npy", np.zeros((2, 3, 4))),
        "steps without loss": lambda p: (p/"steps.csv").write_text("a,b\n1,2\n"), "snapshots without fmcs": lambda p: (p/"snapshots.csv").write_text("step\n0\n1\n2\n3\n"),
        "map is a zip": lambda p: (np.savez(p/"z.npz", x=np.zeros(3)), (p/"z.npz").replace(p/"maps"/"stem.001.npy")),
        "targets are a zip bomb": lambda p: (np.savez_compressed(p/"z.npz", x=np.zeros(20_000_000)), (p/"z.npz").replace(p/"targets.npy")),
        "targets are a pickle": lambda p: (p/"targets.npy").write_bytes(pickle.dumps(Trap())), "map is a pickled array": lambda p: np.save(p/"maps"/"stem.001.npy", np.array([Trap()], dtype=object), allow_pickle=True),
        "a header that promises terabytes": lambda p: (p/"targets.npy").write_bytes((p/"targets.npy").read_bytes().replace(b"(16,)", b"(9999999999999,)".ljust(5))),
        "a link": lambda p: ((p/"steps.csv").rename(p.parent/"elsewhere.csv"), (p/"steps.csv").symlink_to(p.parent/"elsewhere.csv")),
        "a tap outside the folder": lambda p: (p/"card.json").write_text((p/"card.json").read_text().replace('"name": "stem"', '"name": "../../stem"')),
        "text in a column of numbers": lambda p: (p/"steps.csv").write_text("step,loss,lr\n0,x,1\n"), "negative steps": lambda p: (p/"snapshots.csv").write_text("step,epoch,fmcs\n-1,0,0\n0,1,0\n1,1,1\n2,1,1\n")}

class Trap:
    "What a pickle must never do here."
    def __reduce__(self): return (pytest.fail, ("a pickle was executed",))

def test_a_broken_off_prediction_does_not_silence_the_next_fit():
    rec = FMCSRecorder(16, 4)
    learn = tensor_learner(cbs=[rec, RaiseAt("after_pred", RuntimeError("x"))])
    with pytest.raises(RuntimeError): learn.get_preds()
    learn.fit(1)
    assert rec.dataset.snapshots.step.iloc[-1] == len(learn.dls.train)


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    path = tmp_path_factory.mktemp("d")/"data"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        learn = silent(tensor_learner(cbs=FMCSRecorder(16, 4, path=path)))
        learn.remove_cb(learn.progress) if hasattr(learn, "progress") else None
        learn.fit(3)
    return path

@pytest.mark.parametrize("harm", HARM)
def test_damaged_folders_are_named(harm, recorded, tmp_path):
    shutil.copytree(recorded, tmp_path/"d")
    HARM[harm](tmp_path/"d")
    with pytest.raises(DatasetError) as e:
        ds = FMCSDataset(tmp_path/"d")
        for n in ds.plan.names:
            for i in range(len(ds)): np.array(ds.maps(n, i))
        ds.fmcs; ds.relabel()
    assert str(tmp_path/"d") in str(e.value)

def test_no_folder(tmp_path):
    with pytest.raises(DatasetError, match="not a finished FMCS data set"): FMCSDataset(tmp_path/"nowhere")


def test_undisturbed_brings_everything_back_also_after_an_error():
    model = make_model()
    before, state, modes = weights(model), rng_state(), [m.training for m in model.modules()]
    with pytest.raises(KeyError):
        with undisturbed(model): model.train(); model(torch.randn(4, 3, 16, 16)); model.eval(); raise KeyError
    assert_same(before, weights(model))
    assert rng_state() == state and [m.training for m in model.modules()] == modes


def test_eval_maps_see_plain_images_and_train_maps_augmented_ones(tmp_path):
    learn = silent(make_learner(dls=augmented("batch", tmp_path), cbs=FMCSRecorder(16, 4)))
    first = weights(learn.model)
    learn.fit(1)
    ds, model = learn.fmcs_recorder.dataset, make_model()
    model.load_state_dict(first); model.eval()
    x = learn.dls.test_dl([learn.dls.train_ds.items[i] for i in ds.card["image_indices"]], bs=16).one_batch()[0].as_subclass(torch.Tensor)
    with torch.no_grad(): want = pool_map(model.stem(x)).half()
    torch.testing.assert_close(torch.from_numpy(np.array(ds.maps("stem", 0)[0])), want, rtol=2e-3, atol=1e-4)
    with torch.no_grad(): model.train(); same = pool_map(model.stem(x)).half()
    assert not torch.allclose(torch.from_numpy(np.array(ds.maps("stem", 0)[1])).float(), same.float(), atol=1e-2)
