"Hostile input: odd maps, odd networks and broken files. Each is trained through, left plain and counted, or refused in words."
import io
import json
import math
import os
import resource
import shutil
import struct
import tracemalloc
import zipfile
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from fastai.callback.core import Callback
from hypothesis import HealthCheck, given, settings, strategies as st
from torch import nn

from fmce_fastai.oracle.files import card_sha256
from fmce_fastai.train.callback import FMCECallback
from fmce_fastai.oracle.files import OracleFileError
from fmce_fastai.oracle.base import FMCENet
from fmce_fastai.oracle.dataset import DatasetError
from fmce_fastai.train.recorder import FMCSRecorder
from fmce_fastai.study.arms import StudyError
from fmce_fastai.study.settings import Study
from fmce_fastai.study.rows import read_rows
from fmce_fastai.study.run import run_study
from fmce_fastai.maps.plan import TapError
from fmce_fastai.maps.tap import FeatureTap
from fmce_fastai.maps.find import tap_plan
from helpers import TinyNet, assert_same, make_model, make_oracle, seed_all, tensor_learner, weights
from soak import all_of, data_set

KINDS = ["fitted", "universal"]


class Aside(TinyNet):
    "A network whose map, made by `odd`, nothing else depends on: whatever it is, the task loss is not touched."
    def __init__(self, odd): super().__init__(); self.odd = odd
    def forward(self, x):
        f = self.stage2(self.stage1(self.stem(x)))
        self.odd(f)
        return self.head(self.drop(f.mean((2, 3))))


class Spoil(nn.Module):
    "Gives `change(map)` in training, the map itself else."
    def __init__(self, change): super().__init__(); self.change = change
    def forward(self, x): return self.change(x) if self.training else x


def trained(model, kind, *cbs, taps="odd", callback=True, size=16):
    "A learner after one epoch of four steps, with the callback on one tap or without it."
    learn = tensor_learner(size=size)
    learn.model = model
    learn.create_opt()
    learn.logger = lambda *_: None
    if callback: learn.add_cb(FMCECallback(.5, make_oracle(model, taps=[taps]) if kind == "fitted" else None, **({} if kind == "fitted" else dict(taps=[taps]))))
    seed_all()
    with learn.no_bar(): learn.fit(1, cbs=cbs)
    return learn

def history(learn): return learn.fmce.history.iloc[-1]

def row_of(value):
    "A change that puts `value` into the first image's map."
    def change(x):
        first = torch.zeros(len(x), 1, 1, 1, dtype=torch.bool)
        first[0] = True
        return torch.where(first, x.new_tensor(value), x)
    return change

def plain(make): return weights(trained(make(), None, callback=False).model)

def make_aside(change):
    seed_all()
    return Aside(Spoil(change))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_maps_that_are_not_finite_are_not_scored(kind, value):
    learn = trained(make_aside(row_of(value)), kind)
    assert history(learn).acted == 4 and 0 < history(learn).fmcs < 1
    assert all(w.isfinite().all() for w in learn.model.state_dict().values())
    make = lambda: make_aside(lambda x: x + value)  # every image
    with pytest.warns(UserWarning, match="RAL acted in no step of this fit: 4 steps not_valid"): learn = trained(make(), kind)
    assert_same(weights(learn.model), plain(make))


@pytest.mark.parametrize("kind", KINDS)
def test_constant_maps(kind):
    make = lambda: make_aside(lambda x: x*0 + 1)
    if kind == "fitted":
        learn = trained(make(), kind)
        assert history(learn).acted == 4 and all(w.isfinite().all() for w in learn.model.state_dict().values())
        return
    with pytest.warns(UserWarning, match="4 steps not_valid"): learn = trained(make(), kind)
    assert_same(weights(learn.model), plain(make))


class Sizes(Callback):
    "Images of another size every other step."
    order = -5
    def before_batch(self):
        if self.training and self.iter % 2: self.learn.xb = (F.interpolate(self.xb[0], size=24),)

@pytest.mark.parametrize("kind", KINDS)
def test_maps_of_changing_size(kind):
    learn = trained(make_model(), kind, Sizes(), taps="stage1")
    assert history(learn).acted == 4


class Twice(TinyNet):
    "Calls `mix` twice; `again` is another name of it."
    def __init__(self): super().__init__(); self.mix = self.again = nn.Conv2d(16, 16, 1)
    def forward(self, x):
        self.first = self.mix(self.stage2(self.stage1(self.stem(x))))
        self.second = self.again(self.first)
        return self.head(self.drop(self.second.mean((2, 3))))

@pytest.mark.parametrize("kind", KINDS)
def test_a_module_called_twice_or_shared(kind):
    seed_all()
    model = Twice()
    tap = FeatureTap(tap_plan(model, ["mix"], size=16))
    with tap.on(model): model(torch.randn(2, 3, 16, 16))
    (seen,) = tap.take().values()
    assert torch.equal(seen, model.second) and not torch.equal(seen, model.first)
    model.first = model.second = None
    assert history(trained(model, kind, taps="mix")).acted == 4


class EvalOnly(TinyNet):
    "Has a module that training goes around."
    def __init__(self): super().__init__(); self.odd = nn.Conv2d(16, 16, 1)
    def forward(self, x):
        f = self.stage2(self.stage1(self.stem(x)))
        return self.head(self.drop((f if self.training else self.odd(f)).mean((2, 3))))

@pytest.mark.parametrize("kind", KINDS)
def test_a_module_never_called_in_training(kind):
    with pytest.raises(TapError, match="odd"): trained(EvalOnly(), kind)


class Gives(nn.Module):
    "A map among other things."
    def __init__(self, form): super().__init__(); self.conv, self.form = nn.Conv2d(16, 16, 1), form
    def forward(self, x): return self.form(self.conv(x))

class TakesFirst(TinyNet):
    def __init__(self, form, take): super().__init__(); self.odd, self.take = Gives(form), take
    def forward(self, x): return self.head(self.drop(self.take(self.odd(self.stage2(self.stage1(self.stem(x))))).mean((2, 3))))

FORMS = {"tuple": (lambda f: (f, f.mean((2, 3))), lambda o: o[0]), "dict": (lambda f: dict(map=f, size=f.shape[-1]), lambda o: o["map"]), "nested": (lambda f: dict(levels=[None, (f,)]), lambda o: o["levels"][1][0])}

@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("form", FORMS)
def test_tuples_and_dicts(kind, form):
    seed_all()
    assert history(trained(TakesFirst(*FORMS[form]), kind)).acted == 4


class Empty(Callback):
    "No image at all in one step."
    order = -5
    def __init__(self, at): self.at = at
    def before_batch(self):
        if self.training and self.iter == self.at: self.learn.xb, self.learn.yb = (self.xb[0][:0],), (self.yb[0][:0],)

def without_norm():
    "Batch norm itself refuses an empty batch."
    model = make_model()
    for stage in (model.stem, model.stage1, model.stage2): stage[1] = nn.Identity()
    return model

@pytest.mark.parametrize("kind", KINDS)
def test_empty_batches(kind):
    learn = trained(without_norm(), kind, Empty(2), taps="stage1")
    assert (history(learn).steps, history(learn).acted, history(learn).not_valid) == (4, 3, 1)
    if kind == "universal":
        with pytest.raises(TapError, match=r"stage1 returns \(0, 12, 4, 4\)"): trained(without_norm(), kind, Empty(0), taps="stage1")


def recorded_by(make, *cbs, taps="odd"):
    "What the recorder wrote of a fit of four steps; the fit itself is that of a learner without it."
    after = []
    for rec in ([], [FMCSRecorder(n_images=16, n_snapshots=3, taps=[taps])]):
        learn = tensor_learner(metrics=[])
        learn.model = make()
        learn.create_opt()
        learn.logger = lambda *_: None
        seed_all()
        with learn.no_bar(): learn.fit(1, cbs=[*cbs, *rec])
        after.append(weights(learn.model))
    assert_same(*after)
    return rec[0].dataset

@pytest.mark.filterwarnings("ignore::fmce_fastai.convergence.run.ConvergenceWarning")  # so short a run does not converge
@pytest.mark.parametrize("case", ["nan", "inf", "constant", "sizes", "twice", "tuple", "dict", "nested", "empty"])
def test_the_recorder_writes_what_is_there(case):
    if case in ("nan", "inf"): ds = recorded_by(lambda: make_aside(row_of(float(case))))
    elif case == "constant": ds = recorded_by(lambda: make_aside(lambda x: x*0 + 1))
    elif case == "sizes": ds = recorded_by(make_model, Sizes(), taps="stage1")
    elif case == "twice": ds = recorded_by(lambda: seed_all() or Twice(), taps="mix")
    elif case == "empty": ds = recorded_by(without_norm, Empty(0), taps="stage1")
    else: ds = recorded_by(lambda: seed_all() or TakesFirst(*FORMS[case]))
    (name,) = ds.plan.names
    ev, tr = (np.stack([ds.maps(name, i)[m] for i in range(len(ds))]) for m in (0, 1))
    assert len(ds.steps) == 4 and np.isfinite(ev).all()
    if case == "nan": assert np.isnan(tr[:, 0]).all() and np.isfinite(tr[:, 1:]).all()
    elif case == "inf": assert (tr[:, 0] == np.finfo(np.float16).max).all() and np.isfinite(tr).all()
    elif case == "constant": assert (tr == 1).all()
    else: assert np.isfinite(tr).all() and tr.std() > 0

def test_the_recorder_names_a_module_that_training_goes_around():
    with pytest.raises(TapError, match="No map arrived from odd in training mode"): recorded_by(EvalOnly)


# Files -----------------------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def oracles(tmp_path_factory):
    folder = tmp_path_factory.mktemp("oracles")
    make_oracle(make_model()).save(folder/"fitted.safetensors")
    FMCENet.universal().save(folder/"universal.safetensors")
    return folder

@pytest.mark.parametrize("kind", KINDS)
def test_oracles_cut_at_every_percent(kind, oracles, tmp_path):
    data = (oracles/f"{kind}.safetensors").read_bytes()
    for percent in range(100):
        (tmp_path/"cut.safetensors").write_bytes(data[:len(data)*percent//100])
        with pytest.raises(OracleFileError): FMCENet.load(tmp_path/"cut.safetensors")


def read_study(folder):
    Study.load(folder)
    return read_rows(folder)

def cut_everywhere(files, read, error):
    "Each of `files` at every 1 % of its length is refused."
    for f in files:
        data = f.read_bytes()
        for percent in range(100):
            f.write_bytes(data[:len(data)*percent//100])
            with pytest.raises(error): read()
        f.write_bytes(data)
    read()

@pytest.mark.filterwarnings("ignore::fmce_fastai.convergence.run.ConvergenceWarning")  # so short a run does not converge
def test_data_sets_and_studies_cut_at_every_percent(tmp_path):
    data_set(tmp_path/"maps", n_snapshots=2)
    cut_everywhere([p for p in (tmp_path/"maps").rglob("*") if p.is_file()], lambda: all_of(tmp_path/"maps"), DatasetError)
    run_study(Study(("plain", "scaled"), primary="scaled", n_train=64, n_eval=50, size=16, bs=32, epochs=1, seeds=(0,)), tmp_path/"study", bar=False)
    def read(): assert len(read_study(tmp_path/"study")) == 2
    cut_everywhere([tmp_path/"study"/"study.json", *(tmp_path/"study"/"runs").glob("*.json")], read, StudyError)


def header_and_body(path):
    "The two parts of a safetensors file: what its header says, and the tensors' bytes."
    whole = path.read_bytes()
    n = struct.unpack("<Q", whole[:8])[0]
    return json.loads(whole[8:8+n]), whole[8+n:]

def test_oracles_that_promise_terabytes(oracles, tmp_path):
    whole = (oracles/"fitted.safetensors").read_bytes()
    header, body = header_and_body(oracles/"fitted.safetensors")
    name = next(k for k in header if k != "__metadata__")
    def with_header(**changed):
        text = json.dumps({**header, **changed}).encode()
        return struct.pack("<Q", len(text)) + text + body
    bomb = io.BytesIO()
    with zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as z: z.writestr("archive/data.pkl", bytes(200_000_000))
    card = json.loads(header["__metadata__"]["fmce_card"])
    files = {"a header of terabytes": struct.pack("<Q", 2**42) + whole[8:], "a header of 2**63": struct.pack("<Q", 2**63) + whole[8:], "a tensor of terabytes": with_header(**{name: dict(dtype="F32", shape=[10**6, 10**6], data_offsets=[0, 4*10**12])}),
             "a shape without its bytes": with_header(**{name: dict(header[name], shape=[10**12])}), "a zip bomb": bomb.getvalue(),
             "a card of terabytes": with_header(__metadata__=dict(fmce_card=json.dumps({**card, **{k: 10**12 for k, v in card.items() if type(v) is int}})))}
    path = tmp_path/"oracle.safetensors"
    for what, data in files.items():
        path.write_bytes(data)
        tracemalloc.start()
        try:
            with pytest.raises(OracleFileError): FMCENet.load(path)
            assert tracemalloc.get_traced_memory()[1] < len(data)*4 + 20e6, what
        finally: tracemalloc.stop()
    with open(path, "wb") as f: f.truncate(2**42)  # a sparse file: terabytes that take no room
    with pytest.raises(OracleFileError, match="GB"): FMCENet.load(path)


def test_a_link_to_an_oracle_is_read_and_checked(oracles, tmp_path):
    link = tmp_path/"link.safetensors"
    link.symlink_to(oracles/"fitted.safetensors")
    assert_same(weights(FMCENet.load(link)), weights(FMCENet.load(oracles/"fitted.safetensors")))
    for target in (tmp_path/"gone", "/dev/zero", tmp_path):  # nothing, what never ends, a folder
        link.unlink()
        link.symlink_to(target)
        with pytest.raises(OracleFileError): FMCENet.load(link)


@contextmanager
def little_memory(room=2**30):
    "At most `room` more bytes of address space; more is a MemoryError."
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0])*resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + room, hard))
    try: yield
    finally: resource.setrlimit(resource.RLIMIT_AS, (soft, hard))

def longer(path): os.truncate(path, 2**42)  # a sparse file: terabytes that take no room

def array_of(path, dtype, shape):
    "A whole .npy file of that shape, sparse."
    head = io.BytesIO()
    np.lib.format.write_array_header_1_0(head, dict(descr=np.dtype(dtype).str, fortran_order=False, shape=shape))
    path.write_bytes(head.getvalue())
    os.truncate(path, len(head.getvalue()) + math.prod(shape)*np.dtype(dtype).itemsize)

def pipe(path): path.unlink(); os.mkfifo(path)
def moved(path): path.rename(path.with_name("elsewhere")); path.symlink_to(path.with_name("elsewhere"))

DATA_SET_HARM = {**{f"{what} {f}": (lambda p, f=f, do=do: do(p/f)) for what, do in dict(long=longer, pipe=pipe, link=moved).items() for f in ("card.json", "steps.csv", "snapshots.csv", "targets.npy", "maps/stem.001.npy")},
                 "link maps": lambda p: moved(p/"maps"), "targets of terabytes": lambda p: array_of(p/"targets.npy", "i8", (16, 2**36)), "a map of terabytes": lambda p: array_of(p/"maps"/"stem.001.npy", "f2", (2, 16, 8, 2**17, 2**17)),
                 "a map of gigabytes": lambda p: array_of(p/"maps"/"stem.001.npy", "f2", (2, 16, 8, 2**10, 2**10)), "targets of text": lambda p: np.save(p/"targets.npy", np.array(["three"]*16)), "an array and more": lambda p: (p/"maps"/"stem.001.npy").write_bytes((p/"maps"/"stem.001.npy").read_bytes() + b"x")}

def assert_refused(harms, whole, tmp_path, read, error):
    "A copy of the folder `whole` after each of `harms`: refused with its name, and neither read to its end nor waited for."
    for what, harm in harms.items():
        folder = tmp_path/what.replace("/", "-")
        shutil.copytree(whole, folder)
        harm(folder)
        with little_memory(), pytest.raises(error) as e: read(folder)
        assert str(folder) in str(e.value), what
        shutil.rmtree(folder)

@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sets")/"maps"
    data_set(folder)
    return folder

@pytest.mark.filterwarnings("ignore::fmce_fastai.convergence.run.ConvergenceWarning")  # so short a run does not converge
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="the size of the process is read as Linux tells it")
def test_data_sets_of_terabytes_pipes_and_links(recorded, tmp_path): assert_refused(DATA_SET_HARM, recorded, tmp_path, all_of, DatasetError)


# Fuzz: what a reader is given is made by hypothesis, with the forms that it looks for -----------------------------------

PLAIN = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.sampled_from([10**12, -1, "fitted", "universal", "../../x", "nan"])
JSON = st.recursive(PLAIN, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["name", "plan", "taps", "shape", "dtype", "grid", "x"]), inner, max_size=3), max_leaves=8)
FUZZ = settings(max_examples=120, deadline=None, database=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])

def changed(draw, value, depth=3):
    "A JSON value with another one somewhere in it, a key less or a key more."
    if depth and isinstance(value, (dict, list)) and value and draw(st.integers(0, 4)):
        at = draw(st.sampled_from(sorted(value) if isinstance(value, dict) else list(range(len(value)))))
        value = value.copy()
        value[at] = changed(draw, value[at], depth-1)
        return value
    if isinstance(value, dict) and value and draw(st.booleans()):
        gone = draw(st.sampled_from(sorted(value)))
        return {k: v for k, v in value.items() if k != gone}
    return draw(JSON)

@pytest.mark.parametrize("kind", KINDS)
@FUZZ
@given(data=st.data())
def test_fuzzed_headers_and_cards_of_oracles(kind, oracles, tmp_path, data):
    "Also with sums that are right: then it is an oracle of the card's form, or refused."
    header, body = header_and_body(oracles/f"{kind}.safetensors")
    where = data.draw(st.sampled_from(["header", "card", "bytes"]))
    if where == "header": header = changed(data.draw, header)
    elif where == "card":
        card = changed(data.draw, json.loads(header["__metadata__"]["fmce_card"]))
        if isinstance(card, dict):
            card.pop("card_sha256", None)
            card["card_sha256"] = card_sha256(card)
        header["__metadata__"]["fmce_card"] = json.dumps(card)
    text = data.draw(st.binary(max_size=64)) if where == "bytes" else json.dumps(header).encode()
    path = tmp_path/"oracle.safetensors"
    path.write_bytes(struct.pack("<Q", data.draw(st.sampled_from([len(text)]*4 + [0, len(text)+1, 2**40]))) + text + body)
    try: oracle = FMCENet.load(path)
    except OracleFileError as e: assert str(path) in str(e)
    else: assert_same(weights(oracle), weights(FMCENet.load(oracles/f"{kind}.safetensors")))

CELLS = st.sampled_from(["", "0", "1", "-1", "1e999", "nan", "1.5", "x", '"', "9"*30, "\x00", "\n", ","])

@pytest.mark.filterwarnings("ignore")  # the trouble of a run whose losses are strange is said in warnings
@FUZZ
@given(data=st.data())
def test_fuzzed_data_sets(recorded, tmp_path, data):
    folder = tmp_path/"maps"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(recorded, folder)
    file = folder/data.draw(st.sampled_from(["card.json", "steps.csv", "snapshots.csv", "targets.npy", "maps/stem.001.npy"]))
    if file.suffix == ".json": file.write_text(json.dumps(changed(data.draw, json.loads(file.read_text()))))
    elif file.suffix == ".csv":
        rows = [r.split(",") for r in file.read_text().splitlines()]
        row = data.draw(st.sampled_from(rows))
        row[data.draw(st.integers(0, len(row)-1))] = data.draw(CELLS)
        file.write_text("\n".join(map(",".join, rows)) + "\n")
    else:
        whole = file.read_bytes()
        head = str(data.draw(st.fixed_dictionaries(dict(descr=st.sampled_from(["<f2", "<i8", "|O", "<f8", "x", "|V8"]), fortran_order=st.booleans() | st.just(3), shape=st.tuples(st.sampled_from([2, 16, -1, 2**40])) | st.just((2, 16, 8, 4, 4)) | st.just(16))))).encode()
        file.write_bytes(whole[:8] + struct.pack("<H", len(head)) + head + whole[data.draw(st.integers(0, len(whole))):])
    try: all_of(folder)
    except DatasetError as e: assert str(folder) in str(e)

@pytest.fixture(scope="module")
def studied(tmp_path_factory):
    folder = tmp_path_factory.mktemp("studies")/"study"
    run_study(Study(("plain", "scaled"), primary="scaled", n_train=64, n_eval=50, size=16, bs=32, epochs=1, seeds=(0,)), folder, bar=False)
    return folder

@FUZZ
@given(data=st.data())
def test_fuzzed_studies(studied, tmp_path, data):
    folder = tmp_path/"study"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(studied, folder)
    file = data.draw(st.sampled_from([folder/"study.json", *sorted((folder/"runs").glob("*.json"))]))
    file.write_text(json.dumps(changed(data.draw, json.loads(file.read_text()))))
    try: read_study(folder)
    except StudyError as e: assert str(folder) in str(e) or file.name == "study.json"

@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="the size of the process is read as Linux tells it")
def test_studies_of_terabytes_pipes_and_links(studied, tmp_path):
    files = ["study.json", "runs.csv", f"runs/{next((studied/'runs').glob('*.json')).name}"]
    harms = {f"{what} {f}": (lambda p, f=f, do=do: do(p/f)) for what, do in dict(long=longer, pipe=pipe, link=moved).items() for f in files}
    assert_refused({**harms, "link runs": lambda p: moved(p/"runs")}, studied, tmp_path, read_study, StudyError)
