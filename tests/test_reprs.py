"What a notebook shows of the library's objects: short, without colours of its own (readable in light and dark), and text from files never as markup."
import re
import shutil
import warnings
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from helpers import make_model, make_oracle, tensor_learner

from fmce_fastai.convergence.run import convergence, ConvergenceWarning
from fmce_fastai.oracle.base import FMCENet, Scores
from fmce_fastai.oracle.fitted import FittedFMCENet
from fmce_fastai.oracle.dataset import FMCSDataset
from fmce_fastai.train.recorder import FMCSRecorder
from fmce_fastai.maps.plan import Tap, TapPlan

BAD = "<script>alert('x')</script>"
SCORES = [dict(module="stage2", mode="eval", mae=.01234, rho=.987654, snapshots=16, images=13)]


class Page(HTMLParser):
    "Tags that are opened and closed in order, and the text between them."
    def __init__(self, html):
        super().__init__()
        self.open, self.tags, self.text = [], [], []
        self.feed(html)
        self.close()
        assert not self.open, self.open
    def handle_starttag(self, tag, attrs): self.open.append(tag); self.tags.append((tag, dict(attrs)))
    def handle_endtag(self, tag): assert self.open.pop() == tag
    def handle_data(self, data): self.text.append(data)

def read(html):
    "The text of a notebook's view; fails for broken markup, colours or code in it."
    page = Page(html)
    assert {tag for tag, _ in page.tags} <= {"p", "b", "table", "thead", "tbody", "tr", "th", "td"}
    for _, attrs in page.tags: assert not re.search("color|background|on[a-z]+=", str(attrs)), attrs
    assert len(page.text) < 300
    return " ".join(" ".join(page.text).split())


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    learn = tensor_learner(cbs=FMCSRecorder(n_images=16, n_snapshots=3, path=tmp_path_factory.mktemp("reprs")/"run"))
    with learn.no_bar(), learn.no_logging(), warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # whether it converges does not matter here
        learn.fit(8)
    return learn.fmcs_recorder.dataset


def test_fitted_oracle():
    oracle = make_oracle(make_model())
    assert "no measured figures" in read(oracle._repr_html_())
    oracle.card = dict(scores=SCORES, data=dict(n_images=64), run=dict(status="converged", steps=40, steps_per_epoch=4))
    text = read(oracle._repr_html_())
    for words in ("FittedFMCENet", "network TinyNet", "stage1 (12 channels), stage2 (16 channels)", "levels 11", f"weights {oracle.n_params:,}, frozen", "trained on: n images 64", "run converged, 40 steps, 4 steps an epoch", "stage2 eval 0.012 0.988"): assert words in text, words
    assert repr(oracle).startswith("FittedFMCENet(TinyNet, ") and "\n" not in repr(oracle)

def test_universal_oracle():
    text = read(FMCENet.universal()._repr_html_())
    assert "network any" in text and "modules any" in text and "runs 105" in text and "never seen photographs" in text and "no measured figures" in text

def test_scores():
    fmcs = torch.tensor([[.1, .9], [.3, float("nan")], [.5, .8]])
    s = Scores(fmcs, torch.zeros(3, 2, 11), torch.tensor([[True, True], [True, False], [True, True]]))
    assert repr(s) == "Scores(3 images, 2 modules, 11 levels; mean FMCS per module: 0.300, 0.850; 5 of 6 maps could be scored)"
    assert "0 0.30 0.14 0.46 3" in read(s._repr_html_()) and "1 0.85 0.81 0.89 2" in read(s._repr_html_())
    none = s._replace(valid=torch.zeros(3, 2, dtype=torch.bool))
    assert "0 of 6" in repr(none) and "– – – 0" in read(none._repr_html_())
    assert tuple(s)[0] is fmcs  # still a tuple

def test_scores_with_a_graph():
    oracle = make_oracle(make_model())
    s = oracle({t.name: torch.randn(4, t.channels, *t.grid, requires_grad=True) for t in oracle.plan})
    assert "4 images, 3 modules" in repr(s) and read(s._repr_html_()) and s.fmcs.requires_grad

def test_dataset(dataset):
    text = read(dataset._repr_html_())
    for words in ("network TinyNet", "16, in eval and train mode", f"; {len(dataset.steps)} steps", f"{len(dataset)}, steps 0 to {len(dataset.steps)}", dataset.card["run"]["status"], "FMCS 0.00 to ", str(dataset.path), "stage2 (16 channels)", dataset.card["run"]["message"]): assert words in text, words
    assert "FMCSDataset(TinyNet: " in repr(dataset)

def test_dataset_of_an_unusable_run_or_a_folder_that_is_gone(dataset, tmp_path):
    shutil.copytree(dataset.path, tmp_path/"copy")
    ds = FMCSDataset(tmp_path/"copy")
    ds.snapshots["fmcs"] = np.nan
    assert "no FMCS labels" in read(ds._repr_html_())
    shutil.rmtree(ds.path)
    assert "0 MB" in repr(ds) and "0 MB in" in read(ds._repr_html_())

def test_plan_and_convergence():
    plan = make_oracle(make_model()).plan
    assert "Tap plan of TinyNet" in read(plan._repr_html_()) and "stage2" in repr(plan)
    conv = convergence(np.exp(-np.arange(400)/40) + .1, 40)
    assert conv.status in read(conv._repr_html_()) and conv.status in repr(conv)

def test_text_from_files_is_no_markup(dataset, tmp_path):
    plan = TapPlan(BAD, BAD, [Tap(BAD, 4, (2, 2), 1.)], (2, 3, 8, 8), BAD)
    oracle = FittedFMCENet(plan, width=4)
    oracle.card = dict(data={BAD: BAD}, run=dict(status=BAD, steps=BAD), fit={BAD: [BAD]}, scores=[dict(module=BAD, mae=BAD), BAD])
    oracle.save(tmp_path/"o")
    ds = FMCSDataset(dataset.path)
    ds.card = {**ds.card, "arch": BAD, "run": dict(status=BAD, message=BAD, converged_epoch=BAD)}
    for it in (oracle, FMCENet.load(tmp_path/"o"), plan, ds): assert BAD in read(it._repr_html_())
    for card in (dict(data=3, run=[], scores=3, fit=None), dict(run=dict(steps={}), scores=[3])):
        oracle.card = card
        assert read(oracle._repr_html_())
