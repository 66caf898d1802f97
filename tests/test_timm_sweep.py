"The sweep over timm's families, on a small network of every kind of map, and what the sweep itself must not hide."
import csv
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import pytest
import timm
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))

import timm_sweep
import timm_zoo

# As the sweep itself runs: 1,371 networks of timm warn of many things, and two steps are no run that converges
pytestmark = pytest.mark.filterwarnings("ignore")

# Network: layouts of its maps, settings (all four for one network with maps and one with tokens)
EVERY = timm_sweep.SETTINGS
CHEAP = [("learner", "on"), ("vision_learner", "off")]
NETWORKS = {
    "test_resnet": ("NCHW", EVERY),
    "test_convnext": ("NCHW", CHEAP),
    "repghostnet_050": ("NCHW", CHEAP[:1]),
    "test_mambaout": ("NHWC", CHEAP),
    "test_vit": ("NLC+1", EVERY),
    "test_vit_relpos": ("NLC", CHEAP[1:]),
    "vit_tiny_patch16_dinov3_qkvb": ("NLC+5", CHEAP[:1]),
    "efficientvim_m1": ("NCHW in tuple", CHEAP[:1]),
    "crossvit_tiny_240": ("NLC+1 in tuple", [("vision_learner", "off")]),
    "hiera_tiny_224": ("NLC reordered NLC", [("learner", "off")]),
}
# These take one size only, which timm can build smaller: the same modules, in a fifth of the time
SMALLER = dict(vit_tiny_patch16_dinov3_qkvb=64, crossvit_tiny_240=120, hiera_tiny_224=64)


@pytest.mark.parametrize("name,route,ckpt", [(n, *s) for n, (_, settings) in NETWORKS.items() for s in settings])
def test_network_of_every_kind(name, route, ckpt, monkeypatch):
    if size := SMALLER.get(name):
        create = timm.create_model
        monkeypatch.setattr(timm, "create_model", lambda *args, **kwargs: create(*args, img_size=size, **kwargs))
        monkeypatch.setattr(timm_sweep, "image_size", lambda _: size)
    row = timm_sweep.run_setting(name, route, ckpt)
    assert row["status"] == "ok", row["error"]
    assert row["layouts"] == NETWORKS[name][0]
    assert row["recorder_same"] and row["alpha0_same"] and row["task_loss_same"] and row["validated"]
    n = len(row["maps"].split())
    assert row["gradients"] == f"{n}/{n}" and row["acted"] == 2 and row["hooks_left"] == 0
    assert int(row["reached"].split("/")[0]) > 0 and (row["checkpoints"] > 0) == (ckpt == "on")
    assert row["head"] == ("" if route == "learner" else "timm_head" if name == "test_mambaout" else "fastai")


def test_no_checkpointing_in_timm_is_said():
    row = timm_sweep.run_setting("pit_ti_224", "learner", "on")
    assert row["status"] == "unsupported" and "timm has no gradient checkpointing" in row["error"]


@pytest.mark.parametrize("broken,says", [("gradient", "no FMCS gradient at layer4"), ("recorder", "the recorder changes the fit"), ("hook", "hooks left")])
def test_a_fault_is_found(broken, says, monkeypatch):
    "The checks can fail: three faults put in by hand."
    if broken == "gradient":
        from fmce_fastai.train.gradients import GradientNorms
        plain = GradientNorms.watch
        monkeypatch.setattr(GradientNorms, "watch", lambda self, maps, *args: {**plain(self, maps, *args), "layer4": maps["layer4"].detach()})
    elif broken == "recorder":
        plain = timm_sweep.FMCSRecorder.after_loss
        monkeypatch.setattr(timm_sweep.FMCSRecorder, "after_loss", lambda self: (plain(self), torch.rand(1), setattr(self.learn, "loss_grad", self.learn.loss_grad*1.5))[0])
    else: monkeypatch.setattr(timm_sweep.FMCECallback, "after_fit", lambda self: (self.detach(), self.model.register_forward_hook(lambda *_: None))[0])
    row = timm_sweep.run_setting("test_resnet", "learner", "off")
    assert row["status"] == "failed" and says in row["error"]


needs_zoo = pytest.mark.skipif(not timm_zoo.PATH.exists(), reason="the file of model sizes is of another version of timm; timm_zoo.py makes it")

@needs_zoo
def test_zoo_file_is_timms():
    rows = timm_zoo.read()
    families = {r["family"] for r in rows.values()}
    assert set(rows) == set(timm.list_models())
    assert families == {timm_zoo.family_of(n) for n in timm.list_models()} and timm_sweep.known_families() < families
    assert timm_zoo.smallest()["resnet"][0] == "test_resnet"


def options(out, **kwargs): return Namespace(**{**dict(families="resnet", jobs=1, timeout=300, memory=10, retry=False, out=out), **kwargs})

@needs_zoo
def test_rows_are_written_kept_and_tried_again(tmp_path, monkeypatch, capsys):
    out = tmp_path / "sweep.csv"
    script = tmp_path / "child.py"  # stands for the process of a family: one row, then its end
    def child(then): script.write_text(f"import json, sys\nprint(json.dumps(dict(route='learner', checkpointing='off', status='ok', seconds=1)), flush=True)\n{then}\n")
    monkeypatch.setattr(timm_sweep, "__file__", str(script))
    status = lambda: [(r["route"], r["checkpointing"], r["status"], r["error"]) for r in csv.DictReader(out.open())]
    child("sys.exit('no memory')")
    timm_sweep.main(options(out))
    assert [s[2] for s in status()] == ["ok", "failed", "failed", "failed"] and all("code 1: no memory" in s[3] for s in status()[1:])
    before = out.read_text()
    child("raise SystemExit('never runs: every row is there')")
    timm_sweep.main(options(out))
    assert out.read_text() == before
    script.write_text("import time\ntime.sleep(60)")
    timm_sweep.main(options(out, retry=True, timeout=1))
    assert [s[2:] for s in status()] == [("ok", "")] + [("failed", "took too long")]*3
    script.write_text("import time\nx = bytearray(400_000_000)\ntime.sleep(60)")
    timm_sweep.main(options(out, retry=True, memory=0.2))
    assert {s[3] for s in status()[1:]} == {"needed more than 0.2 GB"}
    assert "FAILED resnet test_resnet" in capsys.readouterr().out


def test_file_of_another_kind_is_refused(tmp_path):
    (tmp_path / "old.csv").write_text("family,model\n")
    with pytest.raises(SystemExit, match="other columns"): timm_sweep.read(tmp_path / "old.csv")


@needs_zoo
def test_unknown_family_is_refused():
    with pytest.raises(SystemExit, match="no family nonet"): timm_sweep.choose(["nonet"])
