"`fmce_report`: any network, any images, nothing printed; clear errors for what it does not accept."
import json

import numpy as np
import pytest
import timm
import torch
from fastai.data.core import DataLoaders
from fastai.vision.data import ImageDataLoaders, get_image_files
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from fmce_fastai.oracle.quality import QualityFMCENet
from fmce_fastai.report.report import fmce_report
from fmce_fastai.maps.stages import stage_params
from fmce_fastai.maps.find import tap_plan
from fmce_fastai.report.weights import disturb, weight_report
from helpers import assert_same, make_learner, make_model, make_oracle, seed_all, tensor_dls, weights


def activations_last():
    "Its taps are activations: no weights of their own."
    seed_all()
    conv = lambda i, o: [nn.Conv2d(i, o, 3, 2, 1), nn.BatchNorm2d(o), nn.ReLU()]
    return nn.Sequential(*conv(3, 8), *conv(8, 12), *conv(12, 16), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10))

def test_stages_whose_taps_have_no_weights_have_a_control():
    model = activations_last()
    plan = tap_plan(model, ["2", "5", "8"], size=16)
    assert stage_params(model, plan) == [[], ["0.weight", "0.bias", "1.weight", "1.bias", "3.weight", "3.bias", "4.weight", "4.bias"], ["6.weight", "6.bias", "7.weight", "7.bias"]]
    report = fmce_report(model, tensor_dls(), taps=["2", "5", "8"], control=2, bar=False)
    assert report.table.learnt.isna().tolist() == [True, False, False]
    told = [n.split()[0] for n in report.notes if "looks untrained" in n]
    assert set(told) <= {"5", "8"} and report.table.weights.tolist()[1:] == ["as initialised"]*2 and not report.ok

def test_an_oracle_is_told_whether_the_network_was_trained_on_the_images(monkeypatch):
    learn, told = make_learner(n_train=96), []
    on = QualityFMCENet.on
    monkeypatch.setattr(QualityFMCENet, "on", lambda self, plan, held_out=False: told.append(held_out) or on(self, plan, held_out))
    def scores(*args, **kwargs): return fmce_report(*args, oracle="quality", new_networks=0, bar=False, **kwargs).scores
    trained, held = scores(learn, learn.dls.train), scores(learn, learn.dls.train, held_out=True)
    assert np.isfinite(trained).all() and (trained != held).any()
    scores(learn); scores(learn.model, learn.dls.train)  # a network alone does not tell what it was trained on
    assert told == [False, True, True, True]

@pytest.mark.parametrize("kwargs, title", [({}, "the ridge oracle"), (dict(control=1), "the universal oracle"), (dict(control=1, oracle="ridge"), "the ridge oracle"), (dict(oracle="alignment"), "the alignment oracle")])
def test_the_oracle_of_a_report(kwargs, title):
    report = fmce_report(make_learner(n_train=96), new_networks=0, bar=False, **kwargs)
    assert report.oracle == title and title in report.title and report.table.fmcs.between(0, 1).all()

def test_images_without_labels():
    x = torch.randn(24, 3, 16, 16)
    for data in (TensorDataset(x), list(x)):
        report = fmce_report(make_model(), DataLoader(data, batch_size=8), bar=False)
        assert report.classes is None and report.table.images.tolist() == [24]*len(report.table) and "without class labels" in report.notes[-1]
        assert_has_no_scores(report)

def assert_has_no_scores(report):
    "What needs class labels is left out, everywhere, and one note states why."
    assert report.table[["fmcs", "low", "high", "learnt", "probe", "added"]].isna().all().all() and np.isnan(report.scores).all()
    assert not report.measured and sum("No FMCS" in n for n in report.notes) == 1
    for shown in (repr(report), report._repr_html_()):
        table = shown.partition("! No FMCS")[0].partition("<b>Worth a look")[0]
        assert "module" in table and "channels" in table and not any(c in table for c in ("fmcs", " low", ">low", "high", "learnt", " probe", ">probe"))
    ax = report.plot()
    assert not ax.patches and [t.get_text() for t in ax.texts] == ["needs class labels"]*len(report.table)
    with pytest.raises(ValueError, match="Give images with one class each"): report.plot_images()

def test_labels_that_are_not_to_be_used_leave_only_the_structure():
    model, dls = make_model(), tensor_dls(n_valid=24)
    labelled, unlabelled = (fmce_report(model, dls, labels=labels, bar=False) for labels in (True, False))
    assert_has_no_scores(unlabelled)
    kept = ["module", "depth", "channels", "grid", "weights"]
    assert unlabelled.table[kept].equals(labelled.table[kept]) and labelled.measured and labelled.table.fmcs.notna().all()

def test_without_labels_maps_that_are_not_finite_are_still_named():
    model = make_model()
    with torch.no_grad(): model.stage2[0].weight.fill_(float("nan"))
    report = fmce_report(model, DataLoader(TensorDataset(torch.randn(24, 3, 16, 16)), batch_size=8), bar=False)
    assert report.table.images.iloc[-1] == 0 and report.table.images.iloc[0] == 24
    assert report.notes[0] == f"{report.table.module.iloc[-1]}: the maps of 24 of 24 images are constant or not finite."

def test_a_fitted_oracle_needs_no_labels():
    model, dls = make_model(), tensor_dls(n_valid=24)
    oracle = make_oracle(model)
    labelled, unlabelled = (fmce_report(model, dls, oracle=oracle, labels=labels, bar=False) for labels in (True, False))
    scores = ["weights", "fmcs", "low", "high", "images"]
    assert unlabelled.table[scores].equals(labelled.table[scores]) and unlabelled.table.fmcs.notna().all() and unlabelled.notes == []

def test_an_oracle_is_also_given_by_its_file(tmp_path):
    model, dls = make_model(), tensor_dls(n_valid=24)
    oracle = make_oracle(model)
    path = oracle.save(tmp_path/"oracle.safetensors")
    expected = fmce_report(model, dls, oracle=oracle, bar=False).table
    for given in (path, str(path)): assert fmce_report(model, dls, oracle=given, bar=False).table.equals(expected)
    with pytest.raises(ValueError, match="there is no such file"): fmce_report(model, dls, oracle=tmp_path/"none.safetensors", bar=False)
    with pytest.raises(TypeError, match="oracle is a dict; accepted are an FMCENet, the path"): fmce_report(model, dls, oracle={}, bar=False)

def test_files_without_labels(tmp_path):
    for i in range(20): Image.new("RGB", (16, 16), (12*i, 100, 0)).save(tmp_path/f"{i:02}.png")
    files = get_image_files(tmp_path)
    dls = ImageDataLoaders.from_lists(tmp_path, files, [str(i % 2) for i in range(20)], bs=8, num_workers=0, seed=0)
    report = fmce_report(make_model(), dls.test_dl(files), bar=False)
    assert report.scores.shape[0] == 20 and report.classes is None

def test_loaders_of_both_splits_mean_the_validation_images():
    model, dls = make_model(), tensor_dls(n_valid=24)
    assert isinstance(dls, DataLoaders)
    assert fmce_report(model, dls, bar=False).table.equals(fmce_report(model, dls.valid, bar=False).table)

@pytest.mark.parametrize("args, words", [(("resnet18", None), "learn_or_model is a str; give a Learner or a torch network"), ((None, "images"), "dl is a str; give a fastai or torch DataLoader")])
def test_other_things_are_refused(args, words):
    with pytest.raises(TypeError, match=words): fmce_report(args[0] or make_model(), args[1], bar=False)

def test_nothing_is_printed(capsys):
    fmce_report(make_learner(), bar=False)
    assert capsys.readouterr() == ("", "")


@pytest.fixture
def command(capsys):
    "`fmce_report` as a shell calls it: its exit code and its output."
    from fmce_fastai.cli.report import fmce_report as run
    def answer(*args, **kwargs):
        try: run(*args, **kwargs)
        except SystemExit as e:
            said = capsys.readouterr()
            return e.code, said.out or said.err
        return 0, capsys.readouterr().out
    return answer


def test_the_command_reads_images_in_no_classes(tmp_path, command):
    rng = np.random.default_rng(0)
    (tmp_path / "below").mkdir()
    for i in range(20): Image.fromarray(rng.integers(0, 255, (40, 30, 3), dtype=np.uint8)).save(tmp_path / ("below" if i % 2 else ".") / f"{i}.png")
    code, text = command("test_resnet", str(tmp_path), no_labels=True, size=32)
    assert code == 1 and "The whole network is as initialised" in text and "No FMCS: without class labels" in text and "fmcs" not in text and "32x32, all in it" in text and "20 images" in text
    code, text = command("test_resnet", str(tmp_path), no_labels=True, size=32, images=str(tmp_path/"x.png"))
    assert code == 2 and "Leave --images out, leave --no-labels out, or give a fitted --oracle" in text
    (tmp_path / "none").mkdir()
    assert command("test_resnet", str(tmp_path / "none"), no_labels=True) == (2, f"fmce_report: There are no images in {tmp_path / 'none'}.\n")


@pytest.mark.parametrize("option, path, words", [("plot", "/dev/null/x.png", "/dev/null is not a folder"), ("csv", ".", "it is a folder"), ("images", "x.pdf", "ends in .png"), ("plot", "x", "ends in .png")])
def test_outputs_that_cannot_be_written_are_refused_before_anything_is_scored(option, path, words, command, tmp_path, monkeypatch):
    import fmce_fastai.report.report
    monkeypatch.setattr(fmce_fastai.report.report, "fmce_report", lambda *a, **k: pytest.fail("scored"))
    monkeypatch.chdir(tmp_path)
    code, text = command("test_resnet", "digits", size=32, **{option: path})
    assert code == 2 and f"--{option} {path}: " in text and words in text and not list(tmp_path.iterdir())


def test_the_network_is_no_option(command):
    assert command("resnet7")[1].startswith("fmce_report: arch 'resnet7' is not known. Near it: ")


# Verdicts: weights, probe ----------------------------------------------------------------------------------------------
def trained_learner():
    "A learner whose weights look trained."
    learn = make_learner(n_train=64)
    disturb(learn.model)
    return learn

def test_the_first_line_is_the_verdict():
    learn = trained_learner()
    report = fmce_report(learn, n_images=64, bar=False)
    assert report.ok and report.findings == [] and repr(report).startswith("Healthy: ") and set(report.table.weights) == {"trained"}
    learn.model.stage2.load_state_dict(make_model(seed=3).stage2.state_dict())
    report = fmce_report(learn, n_images=64, bar=False)
    assert not report.ok and repr(report).startswith("TinyNet: stage2 is as initialised") and report.table.weights.tolist() == ["trained", "trained", "as initialised"]
    assert [b.get_hatch() for b in report.plot().patches] == [None, None, "//"] and "stage2 is as initialised" in report._repr_html_()
    found = json.loads(json.dumps(report.to_dict()))
    assert found["ok"] is False and found["findings"][0]["module"] == "stage2" and found["modules"][2]["weights"] == "as initialised"

def test_the_probe_beside_a_new_network():
    learn = trained_learner()
    state = weights(learn.model)
    report = fmce_report(learn, n_images=64, bar=False)
    t = report.table
    assert t.probe.between(0, 1).all() and np.allclose(t.added, t.probe - t.new) and (t.added_low <= t.added).all() and (t.added <= t.added_high).all()
    assert .1 <= report.chance < .3 and f"chance level is {report.chance:.2f}" in repr(report)
    assert_same(state, weights(learn.model))
    assert fmce_report(learn, n_images=64, new_networks=0, bar=False).table.new.isna().all()

def test_a_network_that_cannot_be_made_anew_has_no_comparison():
    "Its constructor needs arguments."
    class Odd(nn.Module):
        def __init__(self, width):
            super().__init__()
            self.a, self.b, self.head = nn.Conv2d(3, width, 3, 2, 1), nn.Conv2d(width, width, 3, 2, 1), nn.Linear(width, 10)
        def forward(self, x): return self.head(self.b(self.a(x).relu()).relu().mean((2, 3)))
    report = fmce_report(Odd(8), tensor_dls(n_valid=24), bar=False)
    assert report.table.probe.notna().all() and report.table.added.isna().all()

@pytest.mark.parametrize("change, words", [
    (lambda s: {f"module.{n}": t for n, t in s.items()}, "the checkpoint has other names than the network"),
    (lambda s: {"model": {f"0.model.{n}": t for n, t in s.items()}, "opt": {"state": [], "hypers": []}}, "the checkpoint has other names than the network"),
    (lambda s: {"state_dict": {f"model.{n}": t for n, t in s.items()}, "optimizer_states": []}, "the checkpoint has other names than the network"),
    (lambda s: {n: t for n, t in s.items() if not n.startswith("layer4")}, "the checkpoint does not fill the network"),
    (lambda s: {n: t for n, t in s.items() if n.startswith(("conv1", "bn1"))}, "the checkpoint does not fill the network"),
    (lambda s: {n: torch.cat([t, t]) for n, t in s.items() if t.ndim}, "the checkpoint does not fit the network"),
    (lambda s: s, None), (lambda s: {"model": s, "optimizer": {"state": {}, "param_groups": []}}, None),
    (lambda s: {n: t for n, t in s.items() if not n.startswith("fc.")}, None)],
    ids=["module.", "fastai", "Lightning", "half", "stem", "another width", "good", "with optimiser", "new head"])
def test_the_command_names_what_is_wrong_with_a_checkpoint(change, words, command, tmp_path):
    model = disturb(timm.create_model("test_resnet"))
    torch.save(change(model.state_dict()), tmp_path/"c.pth")
    code, text = command("test_resnet", weights=str(tmp_path/"c.pth"))
    assert code == (1 if words else 0) and (words or "Healthy") in text.splitlines()[0], text

def test_a_pickle_is_not_run(command, tmp_path):
    class Bomb:
        def __reduce__(self): return (open, (str(tmp_path/"run"), "w"))
    torch.save({"a": Bomb()}, tmp_path/"c.pth")
    code, text = command("test_resnet", weights=str(tmp_path/"c.pth"))
    assert code == 2 and "cannot be read" in text and not (tmp_path/"run").exists()

def test_files_of_fastai_and_lightning_are_read(tmp_path, command):
    "With optimiser state and hyper-parameters, which hold more than tensors."
    import argparse
    import fastai.callback.schedule
    from fastai.vision.learner import vision_learner
    from fmce_fastai.data.digits import digits_dls
    from fmce_fastai.report.checkpoint import compare_keys
    learn = vision_learner(digits_dls(size=32, bs=32, n_train=64), "test_resnet", pretrained=False, path=tmp_path)
    with learn.no_bar(), learn.no_logging(): learn.fit_one_cycle(1)
    keys = compare_keys(learn.save("v"), timm.create_model("test_resnet"))
    assert (keys.nest, keys.remove) == ("model", "0.model.") and len(keys.matched) > 60
    state = disturb(timm.create_model("test_resnet")).state_dict()
    torch.save({"state_dict": {f"model.{n}": t for n, t in state.items()}, "hyper_parameters": argparse.Namespace(lr=.1)}, tmp_path/"l.ckpt")
    code, text = command("test_resnet", weights=str(tmp_path/"l.ckpt"))
    assert code == 1 and "without the prefix 'model.'" in text

def test_a_deeper_network_and_other_classes(tmp_path, command):
    torch.save(disturb(timm.create_model("resnet26")).state_dict(), tmp_path/"r26.pth")
    code, text = command("resnet14t", weights=str(tmp_path/"r26.pth"))
    assert code == 1 and "Healthy" not in text
    torch.save(disturb(timm.create_model("test_resnet", num_classes=7)).state_dict(), tmp_path/"c7.pth")
    code, text = command("test_resnet", weights=str(tmp_path/"c7.pth"))
    assert code == 0 and "new head" not in text.splitlines()[0] and "All 77 tensors" in text

def test_half_precision_and_lazy_networks():
    learn = trained_learner()
    learn.model.bfloat16()
    report = fmce_report(learn, n_images=64, bar=False)
    assert report.table.fmcs.notna().all() and report.table.probe.notna().all()
    with pytest.raises(ValueError, match="lazy layers without weights yet"): weight_report(nn.Sequential(nn.LazyConv2d(8, 3), nn.Conv2d(8, 8, 3)))

def test_nothing_judged_is_not_healthy():
    report = weight_report(nn.Linear(3, 4))
    assert not report.ok and report.title == "Cannot be told: none of the 1 block of Linear could be judged"
