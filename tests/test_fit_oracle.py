"Contracts of fitting an oracle: held-out images stay held out, seeds decide everything, figures equal an independent calculation."
import copy
import json
import warnings

import numpy as np
import pytest
import torch
from fastai.callback.core import Callback
from fastai.callback.progress import ProgressCallback
from scipy.stats import spearmanr

import fmce_fastai.oracle.fit as module
import fmce_fastai.oracle.judge as judging
from fmce_fastai.oracle.judge import judge_oracle, score_dataset
from fmce_fastai.oracle.fit import fit_oracle, split_images
from fmce_fastai.oracle.files import tensors_sha256
from fmce_fastai.oracle.base import FMCENet
from fmce_fastai.oracle.dataset import DatasetError, FMCSDataset
from fmce_fastai.train.recorder import FMCSRecorder
from helpers import rng_state, seed_all, tensor_learner

QUICK = dict(n_epochs=2, width=8, bs=32, bar=False)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    "A short run whose labels are set by hand: what is tested here is not convergence."
    path = tmp_path_factory.mktemp("d")/"data"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore") # the run is too short to converge
        learn = tensor_learner(cbs=FMCSRecorder(30, 5, path=path))
        with learn.no_bar(), learn.no_logging(): learn.fit(3, 1e-2)
    ds = learn.fmcs_recorder.dataset
    ds.snapshots["fmcs"] = np.linspace(0, 1, len(ds))**.5
    return ds

@pytest.fixture(scope="module")
def oracle(dataset): return fit_oracle(dataset, **QUICK)


def test_images_are_split_not_rows():
    for n, holdout, seed in [(10, .2, 0), (33, .5, 1), (100, .01, 2)]:
        train, held = split_images(n, holdout, seed)
        assert sorted([*train, *held]) == list(range(n)) and len(held) == round(n*holdout)
        assert [a.tolist() for a in split_images(n, holdout, seed)] == [train.tolist(), held.tolist()]
    assert split_images(100, .2, 0)[1].tolist() != split_images(100, .2, 1)[1].tolist()
    for holdout in (0, 1, .001, -.5, 2):
        with pytest.raises(ValueError, match="holdout"): split_images(20, holdout)


def test_judges_take_the_file_of_an_oracle(dataset, oracle, tmp_path):
    from fmce_fastai.report.plots import fmcs_over_training, plot_calibration
    path = oracle.save(tmp_path/"oracle.safetensors")
    for given in (path, str(path)):
        assert judge_oracle(given, dataset, bar=False).equals(judge_oracle(oracle, dataset, bar=False))
        assert np.array_equal(score_dataset(given, dataset, bar=False), score_dataset(oracle, dataset, bar=False))
    assert fmcs_over_training(path, dataset, bar=False).equals(fmcs_over_training(oracle, dataset, bar=False))
    assert len(plot_calibration(str(path), dataset, bar=False)) == 2

def test_held_out_images_are_never_trained_on(dataset, monkeypatch):
    trained, stats = set(), set()
    batch, channel_stats = module.MapRows.batch, module.channel_stats
    class Flag(Callback):
        def before_train(self): self.learn.rows_training = True
        def after_train(self): self.learn.rows_training = False
    flag = Flag()
    def spy(self, rows):
        if getattr(flag, "learn", None) is not None and getattr(flag.learn, "rows_training", False): trained.update(rows[:, 2].tolist())
        return batch(self, rows)
    monkeypatch.setattr(module.MapRows, "batch", spy)
    monkeypatch.setattr(module, "channel_stats", lambda rows, images: (stats.update(map(int, images)), channel_stats(rows, images))[1])
    oracle = fit_oracle(dataset, cbs=flag, **QUICK)
    held = set(oracle.card["held_out_images"])
    assert len(held) == round(dataset.n_images*.2) and trained | held == set(range(dataset.n_images)) and not trained & held and not stats & held


def test_held_out_pixels_do_not_matter(dataset, monkeypatch):
    "Spoiling the held-out images' maps changes no weight of the oracle."
    sums = []
    init = module.MapRows.__init__
    for spoil in (False, True):
        def spoiled(self, ds, spoil=spoil):
            init(self, ds)
            if spoil:
                for m in self.maps.values(): m[:, :, split_images(ds.n_images)[1]] += 5*torch.rand(len(m), 1, 1, 1, 1, 1, generator=torch.Generator().manual_seed(0)).half()
        monkeypatch.setattr(module.MapRows, "__init__", spoiled)
        sums.append(tensors_sha256(fit_oracle(dataset, **QUICK).state_dict()))
    assert sums[0] == sums[1]


def test_a_seed_decides_everything_and_disturbs_nothing(dataset):
    oracles = []
    for outer, seed in [(1, 0), (2, 0), (1, 3)]:
        seed_all(outer)
        state = rng_state()
        oracles.append(fit_oracle(dataset, seed=seed, **QUICK))
        assert rng_state() == state
    a, b, c = (tensors_sha256(o.state_dict()) for o in oracles)
    assert a == b != c and oracles[0].card == oracles[1].card


def test_the_oracle_is_frozen_on_the_cpu_and_its_card_tells(dataset, oracle, tmp_path):
    assert oracle.frozen and not oracle.training and all(not p.requires_grad and p.device.type == "cpu" for p in oracle.parameters())
    card = oracle.card
    assert card["data"] == dict(n_images=dataset.n_images, held_out=len(card["held_out_images"]), snapshots=len(dataset), targets=len(set(dataset.targets.tolist())))
    assert card["fit"]["n_epochs"] == 2 and card["fit"]["seed"] == 0 and card["run"]["status"]
    assert {(r["module"], r["mode"]) for r in card["scores"]} == {(n, m) for n in dataset.plan.names for m in ("eval", "train")}
    again = FMCENet.load(oracle.save(tmp_path/"o"))
    assert again.plan == dataset.plan and again.n_levels == dataset.card["n_levels"] and again.card["scores"] == json.loads(json.dumps(card["scores"]))
    assert judge_oracle(again, dataset).to_dict("records") == oracle.card["scores"]


def test_mae_and_rho_by_an_independent_calculation(dataset, oracle):
    held = oracle.card["held_out_images"]
    table = judge_oracle(oracle, dataset).set_index(["module", "mode"])
    for j, name in enumerate(dataset.plan.names):
        for k, mode in enumerate(("eval", "train")):
            errors, means = [], []
            for i in range(len(dataset)):
                maps = {n: torch.from_numpy(np.array(dataset.maps(n, i)[k])).float() for n in dataset.plan.names}
                s = [float(oracle({n: m[h:h+1] for n, m in maps.items()}).fmcs[0, j]) for h in held]
                errors += [abs(v-dataset.fmcs[i]) for v in s]
                means.append(np.mean(s))
            assert table.mae[name, mode] == pytest.approx(np.mean(errors), abs=1e-5)
            assert table.rho[name, mode] == pytest.approx(spearmanr(means, dataset.fmcs).statistic, abs=1e-9)


def test_training_learns_the_labels(dataset):
    short, long = (judge_oracle(fit_oracle(dataset, **{**QUICK, "n_epochs": n}), dataset, ).mae.mean() for n in (1, 20))
    assert long < short


def test_what_cannot_be_fitted_is_named(dataset, oracle):
    with pytest.raises(TypeError, match="FMCSDataset"): fit_oracle(str(dataset.path))
    ds = FMCSDataset(dataset.path)
    ds.snapshots["fmcs"] = np.nan
    with pytest.raises(DatasetError, match="no FMCS labels"): fit_oracle(ds)
    ds.snapshots["fmcs"] = .5
    with pytest.raises(DatasetError, match="same FMCS, 0.50"): fit_oracle(ds)
    oracle = copy.deepcopy(oracle)
    oracle.card = {}
    with pytest.raises(ValueError, match="images="): judge_oracle(oracle, dataset)
    assert len(judge_oracle(oracle, dataset, images=[0, 1])) == 2*len(dataset.plan)
    with pytest.raises(ValueError): fit_oracle(dataset, holdout=0., **QUICK)


def test_nan_maps_are_left_out_of_the_figures(dataset, oracle, monkeypatch):
    init = module.MapRows.__init__
    def spoiled(self, ds):
        init(self, ds)
        for m in self.maps.values(): m[0, :, ::3] = float("nan")
    monkeypatch.setattr(module.MapRows, "__init__", spoiled)
    scores = score_dataset(oracle, dataset)
    assert np.isnan(scores[0, :, ::3]).all() and np.isfinite(scores[1:]).all()
    spoilt = fit_oracle(dataset, **QUICK)
    assert all(torch.isfinite(p).all() for p in spoilt.parameters()) and np.isfinite([r["mae"] for r in spoilt.card["scores"]]).all()


def test_a_bar_where_there_is_something_to_wait_for(dataset, oracle, monkeypatch):
    shown = []
    monkeypatch.setattr(judging, "progress_bar", lambda o: shown.append(len(o)) or o)
    many = np.resize(np.arange(dataset.n_images), 5000//(2*len(dataset)))
    scores = score_dataset(oracle, dataset, many)
    assert shown == [5]
    assert np.array_equal(score_dataset(oracle, dataset, many, bar=False), scores) and shown == [5]
    judge_oracle(oracle, dataset)
    assert shown == [5]  # a second's work

@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_an_oracle_on_cuda_scores_a_data_set_alike(dataset):
    "`FMCECallback` moves the oracle to the network's device; judging it afterwards must not fail."
    oracle = fit_oracle(dataset, n_epochs=1, bar=False, device="cpu")
    here = score_dataset(oracle, dataset)
    torch.testing.assert_close(torch.tensor(score_dataset(oracle.cuda(), dataset)), torch.tensor(here), rtol=1e-3, atol=1e-3)
