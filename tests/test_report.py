"`fmce_report`: any network, any images, nothing printed; clear errors for what it does not accept."
import numpy as np
import pytest
import torch
from fastai.data.core import DataLoaders
from fastai.vision.data import ImageDataLoaders, get_image_files
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from fmce_fastai.report.report import fmce_report
from fmce_fastai.maps.stages import stage_params
from fmce_fastai.maps.find import tap_plan
from helpers import make_learner, make_model, seed_all, tensor_dls


def activations_last():
    "Its taps are activations: no weights of their own."
    seed_all()
    conv = lambda i, o: [nn.Conv2d(i, o, 3, 2, 1), nn.BatchNorm2d(o), nn.ReLU()]
    return nn.Sequential(*conv(3, 8), *conv(8, 12), *conv(12, 16), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10))

def test_stages_whose_taps_have_no_weights_have_a_control():
    model = activations_last()
    plan = tap_plan(model, ["2", "5", "8"], size=16)
    assert stage_params(model, plan) == [[], ["0.weight", "0.bias", "1.weight", "1.bias", "3.weight", "3.bias", "4.weight", "4.bias"], ["6.weight", "6.bias", "7.weight", "7.bias"]]
    report = fmce_report(model, tensor_dls(), taps=["2", "5", "8"], bar=False)
    assert report.table.learnt.isna().tolist() == [True, False, False]
    assert [n.split()[0] for n in report.notes if "looks untrained" in n] == report.table.module[report.untrained].tolist()

def test_images_without_labels():
    x = torch.randn(24, 3, 16, 16)
    for data in (TensorDataset(x), list(x)):
        report = fmce_report(make_model(), DataLoader(data, batch_size=8), bar=False)
        assert report.classes is None and report.table.images.tolist() == [24]*len(report.table) and "without class labels" in report.notes[-1]

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
        except SystemExit as e: return e.code, capsys.readouterr().err
        return 0, capsys.readouterr().out
    return answer


def test_the_command_reads_images_in_no_classes(tmp_path, command):
    rng = np.random.default_rng(0)
    (tmp_path / "below").mkdir()
    for i in range(20): Image.fromarray(rng.integers(0, 255, (40, 30, 3), dtype=np.uint8)).save(tmp_path / ("below" if i % 2 else ".") / f"{i}.png")
    code, text = command("test_resnet", str(tmp_path), no_labels=True, size=32)
    assert code == 0 and "Scored without class labels" in text and "32x32, all in it" in text and "20 images" in text
    (tmp_path / "none").mkdir()
    assert command("test_resnet", str(tmp_path / "none"), no_labels=True) == (1, f"fmce_report: There are no images in {tmp_path / 'none'}.\n")


@pytest.mark.parametrize("option, path, words", [("plot", "/dev/null/x.png", "/dev/null is not a folder"), ("csv", ".", "it is a folder"), ("images", "x.pdf", "ends in .png"), ("plot", "x", "ends in .png")])
def test_outputs_that_cannot_be_written_are_refused_before_anything_is_scored(option, path, words, command, tmp_path, monkeypatch):
    import fmce_fastai.report.report
    monkeypatch.setattr(fmce_fastai.report.report, "fmce_report", lambda *a, **k: pytest.fail("scored"))
    monkeypatch.chdir(tmp_path)
    code, text = command("test_resnet", size=32, **{option: path})
    assert code == 1 and f"--{option} {path}: " in text and words in text and not list(tmp_path.iterdir())


def test_the_network_is_no_option(command):
    assert command("resnet7")[1].startswith("fmce_report: arch 'resnet7' is not known. Near it: ")
