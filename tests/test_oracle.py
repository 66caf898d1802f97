"Contracts of oracles: scores per image, files that are either whole or refused."
import copy
import errno
import json
import os
import pickle
import random
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load as load_tensors, save as save_tensors

from fmce_fastai.oracle.files import card_sha256
from fmce_fastai.oracle.files import OracleFileError, tensors_sha256
from fmce_fastai.oracle.base import as_oracle, FMCENet, OracleError, Scores
from fmce_fastai.oracle.fitted import FittedFMCENet
from fmce_fastai.maps.plan import Tap, TapPlan
from helpers import assert_same

PLAN = TapPlan("net", "given", [Tap("a", 4, (9, 6), .5), Tap("b", 6, (3, 3), 1.)], (2, 3, 32, 32))
TAP = PLAN.to_dict()["taps"][0]

def make(seed=0, width=4, n_levels=5):
    torch.manual_seed(seed)
    oracle = FittedFMCENet(PLAN, n_levels, width)
    oracle.set_stats({"a": torch.randn(4), "b": torch.randn(6)}, {"a": torch.rand(4)+.5, "b": torch.rand(6)+.5})
    oracle.card = dict(data="digits", scores=[dict(module="a", mae=.01), dict(module="b", mae=1e-05)])
    return oracle.freeze()

def some_maps(n=6, seed=1):
    gen = torch.Generator().manual_seed(seed)
    return {"a": torch.randn(n, 4, 9, 6, generator=gen), "b": torch.randn(n, 6, 3, 3, generator=gen)}

@pytest.fixture
def file(tmp_path): return make().save(tmp_path/"oracle.safetensors")

def test_an_oracle_is_given_as_it_is_or_by_its_file(file, monkeypatch):
    oracle = make()
    assert as_oracle(None) is None and as_oracle(oracle) is oracle
    for given in (file, str(file)): assert_same(as_oracle(given).state_dict(), oracle.state_dict())
    monkeypatch.chdir(file.parent)
    assert as_oracle(file.name).frozen
    (file.parent/"owner").mkdir()
    file.rename(file.parent/"owner"/"name")
    assert as_oracle("owner/name").frozen  # a file takes precedence over a repository of the same name
    for other in ("oracle.safetensors", "runs/oracle.safetensors", Path("runs/oracle"), "/runs/oracle"):
        with pytest.raises(OracleFileError, match="there is no such file"): as_oracle(other)
    for other in (3, {}, "", torch.nn.Linear(1, 1), np.zeros(2)):
        with pytest.raises(TypeError, match="accepted are an FMCENet, the path of an oracle's file, 'owner/name'"): as_oracle(other)

def test_the_hub_is_not_imported_for_a_name(monkeypatch, tmp_path):
    monkeypatch.delattr(FMCENet, "from_pretrained", raising=False)
    for name in ("owner/name", tmp_path, str(tmp_path)):
        with pytest.raises(ImportError, match="import fmce_fastai.hub.transfer"): as_oracle(name)

def test_callback_and_copies_take_the_file_of_an_oracle(tmp_path):
    from fmce_fastai.study.alphas import fine_tune_alphas
    from fmce_fastai.train.callback import FMCECallback
    from helpers import make_model, make_oracle, tensor_learner, weights
    path = make_oracle(make_model()).save(tmp_path/"oracle.safetensors")
    trained = []
    for given in (FMCENet.load(path), path, str(path)):
        learn = tensor_learner(cbs=FMCECallback(.5, given))
        with learn.no_bar(), learn.no_logging(): learn.fit(1)
        trained.append(weights(learn.model))
    for other in trained[1:]: assert_same(trained[0], other)
    with pytest.raises(TypeError, match="oracle is a Linear"): FMCECallback(oracle=torch.nn.Linear(1, 1))
    by_file, by_oracle = (fine_tune_alphas(tensor_learner(), (.9,), epochs=1, oracle=o, placebo=0, bar=False) for o in (str(path), FMCENet.load(path)))
    assert_same(*(weights(t["alpha 0.90"].model) for t in (by_file, by_oracle)))
    with pytest.raises(OracleFileError, match="there is no such file"): fine_tune_alphas(None, (.9,), oracle="none.safetensors")

def rewrite(path, tensors=None, card=None, sums=True):
    "A file with other tensors or another card, its sums made right again."
    data = path.read_bytes()
    meta = json.loads(data[8:8+int.from_bytes(data[:8], "little")])["__metadata__"]
    card = {**json.loads(meta["fmce_card"]), **(card or {})}
    tensors = load_tensors(data) if tensors is None else tensors
    if sums:
        card["sha256"] = tensors_sha256(tensors)
        card["card_sha256"] = card_sha256(card)
    path.write_bytes(save_tensors(tensors, metadata={"fmce_card": json.dumps(card)}))
    return path


# ---- scores ---------------------------------------------------------------------------------------------------------

def test_scores_are_those_of_a_plain_calculation():
    oracle, maps = make(), some_maps()
    s = oracle(maps)
    p = torch.softmax(s.logits.double(), -1)
    torch.testing.assert_close(s.fmcs.double(), sum(p[..., k]*k/4 for k in range(5)), rtol=1e-5, atol=1e-6)
    assert s.fmcs.shape == (6, 2) and s.logits.shape == (6, 2, 5) and s.valid.all() and (s.fmcs >= 0).all() and (s.fmcs <= 1).all()


def test_an_images_scores_do_not_depend_on_the_others():
    oracle, maps = make(), some_maps()
    whole = oracle(maps)
    for i in range(6): torch.testing.assert_close(oracle({n: m[i:i+1] for n, m in maps.items()}).logits[0], whole.logits[i])
    order = torch.tensor([3, 1, 5, 0, 2, 4])
    torch.testing.assert_close(oracle({n: m[order] for n, m in maps.items()}).logits, whole.logits[order])
    big = some_maps(300)
    torch.testing.assert_close(oracle(big).fmcs[:10], oracle({n: m[:10] for n, m in big.items()}).fmcs)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_an_image_that_is_not_finite_is_not_valid_and_harms_nobody(value):
    oracle, maps = make(), some_maps()
    clean = oracle(maps)
    maps["a"][2, 1, 3, 3] = value
    maps["b"].requires_grad_(); maps["a"].requires_grad_()
    s = oracle(maps)
    assert s.valid.tolist() == [[i != 2, True] for i in range(6)]
    torch.testing.assert_close(s.fmcs[s.valid], clean.fmcs[s.valid])
    s.fmcs[s.valid].sum().backward()
    assert torch.isfinite(maps["b"].grad).all() and torch.isfinite(maps["a"].grad).all()
    assert oracle({n: torch.full_like(m, value) for n, m in some_maps().items()}).valid.sum() == 0


def test_autocast_changes_nothing():
    oracle, maps = make(), some_maps()
    plain = oracle(maps)
    with torch.autocast("cpu", torch.bfloat16): inside = oracle(maps)
    assert torch.equal(plain.logits, inside.logits) and inside.logits.dtype == torch.float32
    for dtype in (torch.bfloat16, torch.float16):
        low = {n: m.to(dtype) for n, m in maps.items()}
        with torch.autocast("cpu", torch.bfloat16): s = oracle(low)
        assert s.fmcs.dtype == torch.float32 and torch.equal(s.logits, oracle({n: m.float() for n, m in low.items()}).logits)
        torch.testing.assert_close(s.fmcs, plain.fmcs, atol=2e-2, rtol=0)


def test_frozen_means_frozen_but_not_detached():
    oracle, maps = make(), some_maps()
    before = tensors_sha256(oracle.state_dict())
    maps["b"].requires_grad_()
    state = torch.get_rng_state()
    for _ in range(3): oracle.train(); s = oracle(maps)
    assert torch.equal(state, torch.get_rng_state()) and not oracle.training
    s.fmcs.sum().backward()
    assert maps["b"].grad.abs().sum() > 0 and all(p.grad is None and not p.requires_grad for p in oracle.parameters())
    assert tensors_sha256(oracle.state_dict()) == before
    assert all(torch.equal(oracle(maps).logits, s.logits) for _ in range(2))


def test_maps_that_do_not_fit_are_named():
    oracle, maps = make(), some_maps()
    for bad, words in [({"a": maps["a"]}, "No map for b"), ({}, "got maps of nothing"), ({**maps, "a": maps["b"]}, "'a' has 6 channels.* trained on 4"), ({**maps, "b": maps["b"].flatten(1)}, "reads .B, C, H, W.")]:
        with pytest.raises(OracleError, match=words): oracle(bad)
    for grid in [(1, 1), (2, 13), (40, 40)]: assert oracle({"a": torch.randn(2, 4, *grid), "b": maps["b"][:2]}).valid.all()
    with pytest.raises(ValueError, match="n_levels is 1"): FittedFMCENet(PLAN, 1)
    with pytest.raises(ValueError, match="plan is empty"): FittedFMCENet(PLAN.subset([]))


def test_channels_that_never_vary_are_left_unscaled():
    oracle = make()
    oracle.set_stats({"a": torch.zeros(4), "b": torch.zeros(6)}, {"a": torch.tensor([0., 1, 2, 0]), "b": torch.zeros(6)})
    assert oracle.nets[0].std.tolist() == [1, 1, 2, 1] and oracle.nets[1].std.tolist() == [1]*6 and torch.isfinite(oracle(some_maps()).logits).all()


# ---- files ----------------------------------------------------------------------------------------------------------

def test_round_trip(tmp_path):
    oracle, maps = make(), some_maps()
    again = FMCENet.load(oracle.save(tmp_path/"new folder"/"o.safetensors"))
    assert type(again) is FittedFMCENet and again.frozen and again.plan == PLAN and again.width == 4 and again.n_levels == 5
    assert all(torch.equal(p, q) for p, q in zip(oracle(maps), again(maps)))
    assert_same(dict(oracle.state_dict()), dict(again.state_dict()))
    card = again.card
    assert card["arch"] == "net" and card["channels"] == {"a": 4, "b": 6} and card["kind"] == "fitted" and card["data"] == "digits" and card["sha256"] == tensors_sha256(again.state_dict())
    assert card["scores"] == oracle.card["scores"] and card == oracle.card
    assert again.save(tmp_path/"o2").read_bytes() == (tmp_path/"new folder"/"o.safetensors").read_bytes()
    assert FittedFMCENet.load(str(tmp_path/"o2")).frozen and [f.name for f in tmp_path.glob("*")] and not list(tmp_path.rglob("*.part"))


def test_no_unpickling(tmp_path, file):
    class Bomb:
        def __reduce__(self): return (os.mkdir, (str(tmp_path/"boom"),))
    bad = {"pickle": pickle.dumps(Bomb()), "empty": b"", "text": b"hello"*100, "zero": b"\0"*1000, "huge header": (2**62).to_bytes(8, "little")+b"{}"}
    for name, content in bad.items(): (tmp_path/name).write_bytes(content)
    torch.save(make().state_dict(), tmp_path/"torch")
    with zipfile.ZipFile(tmp_path/"zip", "w") as z: z.writestr("data.pkl", pickle.dumps(Bomb()))
    (tmp_path/"folder").mkdir()
    for name in [*bad, "torch", "zip", "folder", "missing"]:
        with pytest.raises(OracleFileError) as e: FMCENet.load(tmp_path/name)
        assert str(tmp_path/name) in str(e.value) and "fit_oracle" in str(e.value)
    assert not (tmp_path/"boom").exists()


@pytest.mark.parametrize("metadata", [None, {"format": "pt"}, {"fmce_card": "{"}, {"fmce_card": "[1]"}, {"fmce_card": "3"}, {"fmce_card": "{}"}, {"fmce_card": "null"}, {"fmce_card": "["*100_000}])
def test_foreign_safetensors(tmp_path, metadata):
    (tmp_path/"f").write_bytes(save_tensors({"x": torch.ones(3)}, metadata=metadata))
    with pytest.raises(OracleFileError, match="card"): FMCENet.load(tmp_path/"f")


@pytest.mark.parametrize("card, words", [(dict(format=2), "format 2"), (dict(format=None), "format None"), (dict(kind="universal?"), "its kind is 'universal."), (dict(kind=None), "its kind is None"),
                                         (dict(kind=["fitted"]), "kind"), (dict(n_levels=7), "does not fit"), (dict(n_levels="x"), "does not fit"), (dict(n_levels=-1), "does not fit"), (dict(n_levels=None), "does not fit"),
                                         (dict(width=5), "does not fit"), (dict(width=None), "does not fit"), (dict(plan={}), "does not fit"), (dict(plan=[]), "does not fit"), (dict(plan=None), "does not fit"), (dict(plan="x"), "does not fit"),
                                         (dict(n_levels=float("inf")), "does not fit"), (dict(width=1e300), "does not fit"),
                                         *((dict(plan={**PLAN.to_dict(), **plan}), "does not fit") for plan in (dict(taps=[1]), dict(taps=["x"]), dict(probe="abcd"), dict(arch=[3]), dict(taps=[dict(TAP, name=7)]), dict(taps=[dict(TAP, channels=2**70)]), dict(taps=[dict(TAP, grid=[{}, []])]), dict(taps=[dict(TAP, layout="CNHW")])))])
def test_cards_that_do_not_fit(file, card, words):
    "Also with sums that were made right again."
    with pytest.raises(OracleFileError, match=words): FMCENet.load(rewrite(file, card=card))

def test_a_card_cannot_ask_for_more_memory_than_the_file_has(file, monkeypatch):
    built, make_it = [], FittedFMCENet.from_spec.__func__
    def watched(cls, spec):
        built.append(make_it(cls, spec))
        return built[-1]
    monkeypatch.setattr(FittedFMCENet, "from_spec", classmethod(watched))
    with pytest.raises(OracleFileError, match="its card does not fit its tensors .* of other names or shapes"): FMCENet.load(rewrite(file, card=dict(width=10**5)))
    assert [o.levels.device.type for o in built] == ["meta"]  # 40 GB per module otherwise



def test_edited_cards_and_tensors_are_seen(file):
    whole = file.read_bytes()
    with pytest.raises(OracleFileError, match="card was changed"): FMCENet.load(rewrite(file, card=dict(data="cifar10"), sums=False))
    file.write_bytes(whole)
    tensors = load_tensors(whole)
    for bad in ({**tensors, "extra": torch.ones(1)}, {k: v for k, v in tensors.items() if k != "levels"}, {**tensors, "levels": tensors["levels"].double()}, {**tensors, "levels": tensors["levels"]+1e-7}):
        file.write_bytes(whole)
        with pytest.raises(OracleFileError, match="tensors were changed"): FMCENet.load(rewrite(file, tensors=bad, sums=False))
    for bad in ({**tensors, "extra": torch.ones(1)}, {k: v for k, v in tensors.items() if k != "nets.0.mean"}, {**tensors, "nets.0.mean": torch.ones(5)}):
        file.write_bytes(whole)
        with pytest.raises(OracleFileError, match="does not fit its tensors"): FMCENet.load(rewrite(file, tensors=bad))


def test_the_wrong_subclass_is_refused(file):
    class Other(FMCENet): kind = "other kind"
    try:
        with pytest.raises(OracleFileError, match="Other.load was called"): Other.load(file)
    finally: FMCENet.kinds.pop("other kind")


def test_cut_files(file):
    whole = file.read_bytes()
    for n in sorted({*range(0, len(whole), max(1, len(whole)//50)), 1, 7, 8, 9, len(whole)-1}):
        file.write_bytes(whole[:n])
        with pytest.raises(OracleFileError): FMCENet.load(file)
    for longer in (whole+b"\0", whole+whole, b"\0"+whole):
        file.write_bytes(longer)
        with pytest.raises(OracleFileError): FMCENet.load(file)


def test_flipped_bits(file):
    "Every flip is refused, or the file still says exactly the same (the header's JSON can be spelled in more than one way)."
    whole, maps = file.read_bytes(), some_maps()
    want, card = FMCENet.load(file), FMCENet.load(file).card
    gen = random.Random(0)
    header = int.from_bytes(whole[:8], "little")+8
    places = [gen.randrange(len(whole)*8) for _ in range(300)] + [gen.randrange(header*8) for _ in range(700)] + list(range(64))
    harmless = 0
    for bit in places:
        data = bytearray(whole)
        data[bit//8] ^= 1 << bit % 8
        file.write_bytes(data)
        try: got = FMCENet.load(file)
        except OracleFileError: continue
        harmless += 1
        assert got.card == card and got.plan == want.plan
        assert_same(dict(want.state_dict()), dict(got.state_dict()))
        assert bit//8 < header
    assert harmless < 5


@pytest.mark.parametrize("where", ["write", "replace"])
def test_a_full_disk_leaves_the_old_file(file, monkeypatch, where):
    before = file.read_bytes()
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    if where == "write":
        real = Path.write_bytes
        def write(self, data): real(self, data[:100]); raise full
        monkeypatch.setattr(Path, "write_bytes", write)
    else: monkeypatch.setattr(os, "replace", lambda *a: (_ for _ in ()).throw(full))
    other = make(seed=5)
    card = dict(other.card)
    with pytest.raises(OSError, match="could not be written.*No space left") as e: other.save(file)
    assert e.value.errno == errno.ENOSPC and e.value.filename == str(file)
    assert file.read_bytes() == before and [f.name for f in file.parent.iterdir()] == [file.name] and other.card == card


def test_saving_over_a_folder_or_below_a_file(tmp_path, file):
    (tmp_path/"d").mkdir()
    for path in (tmp_path/"d", file/"x"):
        with pytest.raises(OSError, match="could not be written"): make().save(path)
    assert not list((tmp_path/"d").iterdir()) and not list(tmp_path.glob(".*"))
