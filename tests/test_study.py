"Contracts of studies: matched budgets, planted effects, runs that survive being killed, statistics against their written formulas."
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from fastai.callback.core import Callback, CancelFitException
from fastai.callback.mixup import MixUp
from fastai.vision.augment import RandomErasing
from scipy import stats

from fmce_fastai.study.jobs import run_job
from fmce_fastai.study.learner import build_learner, eval_dl
from fmce_fastai.util.files import write_json
from fmce_fastai.util.processes import run_in_processes
from fmce_fastai.study.arms import ARMS, has_alpha, parts, StudyError
from fmce_fastai.study.settings import Study
from fmce_fastai.study.matched import NormEval, RunLog, StepSeeds
from fmce_fastai.study.choices import choices, chosen, final_jobs, tuning_jobs
from fmce_fastai.study.rows import read_rows
from fmce_fastai.study.compare import compare
from fmce_fastai.study.statistics import holm, seeds_needed
from fmce_fastai.study.tables import table_text, verdict
from fmce_fastai.study.run import merge_studies, run_study, write_report
from fmce_fastai.study.presets import preset_on, presets
from fmce_fastai.data.digits import digits_dls
from helpers import make_learner

TINY = dict(n_train=96, n_eval=100, size=16, bs=32, epochs=1, seeds=(0, 1, 2))


@pytest.fixture
def arm(monkeypatch):
    "Adds an arm for one test."
    def add(name, fn): monkeypatch.setitem(ARMS, name, fn)
    return add

def quiet(study, folder, **kwargs): return run_study(study, folder, bar=False, **kwargs).set_index("arm")

def row(arm="plain", seed=0, accuracy=.9, phase="final", alpha=0., lr=3e-3, **kwargs):
    return dict(dict(phase=phase, arm=arm, alpha=alpha, lr=lr, seed=seed, accuracy=accuracy, steps=3, batches="b", start="s", images=100), **kwargs)


# Matched budgets ---------------------------------------------------------------------------------------------------
def test_every_arm_starts_from_the_same_weights_and_sees_the_same_batches(tmp_path):
    "All arms that need no stage 1, with an architecture that has dropout."
    names = [n for n in ARMS if n != "ral"]
    run_study(Study(tuple(names), (.5,), "ral-universal", arch="test_vit", **{**TINY, "size": 32, "n_train": 64, "n_eval": 20, "seeds": (0,)}), tmp_path, bar=False)
    rows = read_rows(tmp_path)
    assert len(rows) == len(names) and {r["steps"] for r in rows} == {2}
    for key in ("start", "batches"): assert len({r[key] for r in rows}) == 1
    idle = {"plain", "freeze", "freeze-kept", "freeze-change"}  # in two steps nothing converges: these train as plain does
    assert len({r["loss"] for r in rows if r["arm"] in idle}) == 1
    assert len({r["loss"] for r in rows if r["arm"] not in idle}) > len(names) - len(idle) - 2  # and yet the others are different ways of training

FINE_TUNING = ("lp-ft", "l2-sp", "bss", "supcon-head", "ema", "cutmix")

def test_methods_of_fine_tuning_see_the_same_batches_and_resume(tmp_path):
    "Epochs with a validation between them, the body at a lower rate, alone and joined with RAL; every third run is lost and repeated."
    joined = ("ral-universal+lp-ft@0.5+bss", "ral-universal@0.25+ema@0.5+cutmix")
    study = Study(("plain", *FINE_TUNING, *joined), (.5,), "lp-ft", **{**TINY, "n_train": 32, "bs": 16, "epochs": 2, "n_eval": 20, "seeds": (0,)}, body_lr=.3, freeze_norm=True)
    quiet(study, tmp_path)
    rows = {r["arm"]: r for r in read_rows(tmp_path)}
    assert {a: r["alpha"] for a, r in rows.items()} == {"plain": 0, "lp-ft": .33, "l2-sp": .1, "bss": .001, "supcon-head": .5, "ema": .99, "cutmix": 0, joined[0]: .5, joined[1]: .25}
    for key in ("start", "batches", "steps"): assert len({r[key] for r in rows.values()}) == 1
    assert len({r["loss"] for r in rows.values()}) == len(rows)
    assert [rows[a]["acted"] for a in joined] == [2, 4]  # while LP-FT keeps the body fixed, RAL has nothing to train
    for f in [*sorted((tmp_path/"runs").glob("*.json"))[::3], tmp_path/"runs.csv"]: f.unlink()
    quiet(None, tmp_path)
    assert {r["arm"]: (r["loss"], r["batches"]) for r in read_rows(tmp_path)} == {a: (r["loss"], r["batches"]) for a, r in rows.items()}
    shutil.rmtree(tmp_path/"runs")
    quiet(None, tmp_path)
    assert not (tmp_path/"runs").exists()  # a repository keeps `runs.csv` alone

def test_methods_of_fine_tuning_are_joined_where_it_makes_sense():
    for arm in FINE_TUNING:
        for other in ("ral-universal", "ridge-memory", "label-smoothing", *(("mixup",) if arm != "cutmix" else ())): assert parts(f"{other}+{arm}") == [other, arm]
        with pytest.raises(StudyError, match=f"has {arm} 2 times"): parts(f"{arm}+plain+{arm}")
    for pair in ("mixup+cutmix", "supcon-head+supcon", "ridge+ral-memory"):
        with pytest.raises(StudyError, match=f"{pair.replace('+', ' and ')} cannot be joined"): parts(pair)

@pytest.mark.parametrize("cbs", [[], [MixUp()]])
def test_an_arm_that_draws_numbers_sees_the_same_augmented_batches(cbs):
    "Random erasing draws from the global generators when a batch is made, as MixUp and dropout do when it is used."
    def digest(cbs, seeds):
        noted = RunLog()
        learn = make_learner(dls=digits_dls(size=16, bs=16, n_train=64, augment=[RandomErasing(p=1.)]), cbs=[noted, *seeds, *cbs])
        with learn.no_bar(), learn.no_logging(): learn.fit(2)
        return noted.digest.hexdigest()
    assert digest(cbs, [StepSeeds(3)]) == digest([], [StepSeeds(3)]) != digest([], [StepSeeds(4)])
    if cbs: assert digest(cbs, []) != digest([], [])  # without, it does not

def test_one_step_more_or_less_is_found(tmp_path, arm):
    class Stop(Callback):
        def after_batch(self):
            if self.training and self.train_iter == 2: raise CancelFitException
    arm("short", lambda study, alpha, seed, folder: dict(cbs=[Stop()]))
    with pytest.raises(StudyError, match="number of steps of 'short' \\(2\\) and 'plain' \\(3\\)"): quiet(Study(("plain", "short"), primary="short", **TINY), tmp_path)

def test_other_batches_and_other_weights_are_found():
    study = Study(("plain", "scaled"), primary="scaled", seeds=(0,))
    for key, words in (("batches", "batches"), ("start", "start weights"), ("images", "images judged on")):
        with pytest.raises(StudyError, match=words): compare(study, [row(), row("scaled", alpha=.9, **{key: "other"})])


def test_norms_in_eval_mode_train_their_weights_and_use_no_batch_statistics():
    "fastai's BnFreeze leaves norm layers alone whose weights train."
    learn = make_learner(cbs=NormEval())
    before = {k: v.clone() for k, v in learn.model.state_dict().items()}
    with learn.no_bar(), learn.no_logging(): learn.fit(1)
    after = learn.model.state_dict()
    assert all(torch.equal(before[k], after[k]) == ("running" in k or "tracked" in k) for k in after)

def test_a_study_freezes_the_norms_of_the_body_only(tmp_path, arm):
    seen = {}
    class Look(Callback):
        def before_batch(self):
            if self.training: seen.update({n: m.training for n, m in self.model.named_modules() if isinstance(m, torch.nn.modules.batchnorm._BatchNorm)})
    arm("look", lambda study, alpha, seed, folder: dict(cbs=[Look()]))
    quiet(Study(("plain", "look"), primary="look", **{**TINY, "seeds": (0,)}, freeze_norm=True), tmp_path)
    assert {n[0] for n in seen} == {"0", "1"} and all(t == n.startswith("1") for n, t in seen.items())

# Null and planted --------------------------------------------------------------------------------------------------
def test_two_names_for_one_arm_are_identical(tmp_path, arm):
    arm("again", ARMS["plain"])
    t = quiet(Study(("plain", "again"), primary="again", **TINY), tmp_path)
    assert t.note["again"] == "identical" and t.difference["again"] == 0 and "identical in all 3 seeds" in verdict(t.reset_index().query("role == 'primary'").iloc[0])

def test_a_leak_is_found_to_gain_and_a_harm_to_harm(tmp_path, arm):
    class Leak(Callback):
        "Trains on the test images that are judged, after the fit."
        def after_fit(self):
            x, y = (t.as_subclass(torch.Tensor) for t in eval_dl(self.dls, "test", TINY["n_eval"]).one_batch())
            opt = torch.optim.Adam(self.model.parameters(), 3e-3)
            self.model.train()
            for _ in range(25):
                opt.zero_grad(); torch.nn.functional.cross_entropy(self.model(x), y).backward(); opt.step()
    class Ruin(Callback):
        def after_fit(self):
            with torch.no_grad():
                for p in self.model.parameters(): p.mul_(.1).add_(torch.randn_like(p)*.3)
    arm("leak", lambda study, alpha, seed, folder: dict(cbs=[Leak()]))
    arm("ruin", lambda study, alpha, seed, folder: dict(cbs=[Ruin()]))
    study = Study(("plain", "leak", "ruin"), primary="leak", **{**TINY, "n_train": 320, "epochs": 2})
    t = quiet(study, tmp_path)
    assert t.low["leak"] > 0 and t.above["leak"] == 3 and "helps here" in table_text(study, t.reset_index())
    assert t.high["ruin"] < 0 and t.below["ruin"] == 3
    assert "harms here" in verdict(t.reset_index().query("arm == 'ruin'").iloc[0])


# Choices -----------------------------------------------------------------------------------------------------------
def test_choices_are_made_on_the_validation_split_and_the_test_split_is_read_for_the_final_table_only(tmp_path):
    study = Study(("plain", "scaled"), (.2, .5), "scaled", **{**TINY, "seeds": (0,)}, lrs=(1e-4, 1e-2))
    quiet(study, tmp_path)
    rows = read_rows(tmp_path)
    tune, final = [r for r in rows if r["phase"] == "tune"], [r for r in rows if r["phase"] == "final"]
    assert len(tune) == 2 + 2*2 == len(tuning_jobs(study)) and len(final) == 1 + 2
    assert {r["split"] for r in tune} == {"validation"} and {r["split"] for r in final} == {"test"} and {r["seed"] for r in tune} == {100}
    best = max((r for r in tune if r["arm"] == "plain"), key=lambda r: (r["accuracy"], -r["lr"]))
    assert next(r for r in final if r["arm"] == "plain")["lr"] == best["lr"]

def test_the_better_rate_and_alpha_are_chosen_and_nothing_is_decided_early():
    study = Study(("plain", "scaled"), (.2, .5), "scaled", lrs=(1e-3, 1e-2), tune_seeds=(100, 101))
    acc = {("plain", 0., 1e-3): .8, ("plain", 0., 1e-2): .8, ("scaled", .2, 1e-3): .5, ("scaled", .2, 1e-2): .6, ("scaled", .5, 1e-3): .9, ("scaled", .5, 1e-2): .7}
    rows = [row(a, s, v, "tune", al, lr) for (a, al, lr), v in acc.items() for s in (100, 101)]
    rates, alphas = chosen(study, rows)
    assert rates == {("plain", 0.): 1e-3, ("scaled", .2): 1e-2, ("scaled", .5): 1e-3} and alphas == {"plain": 0., "scaled": .5}
    assert {(j.arm, j.alpha, j.lr) for j in final_jobs(study, rows)} == {("plain", 0., 1e-3), ("scaled", .2, 1e-2), ("scaled", .5, 1e-3)}
    rates, alphas = chosen(study, rows[:-1])
    assert ("scaled", .5) not in rates and "scaled" not in alphas

def test_a_search_reads_the_validation_split_alone_and_can_be_followed_by_the_final_runs(tmp_path):
    study = Study(("plain", "scaled@0.5"), primary="scaled@0.5", **{**TINY, "seeds": (0,)}, tune_seeds=(100, 101))
    assert tuning_jobs(study) == []  # nothing must be chosen
    run_study(study, tmp_path, bar=False, choices_only=True)
    rows = read_rows(tmp_path)
    assert len(rows) == 4 and {r["split"] for r in rows} == {"validation"} and {r["alpha"] for r in rows if r["arm"] != "plain"} == {.5}
    tried = choices(study, rows).set_index("arm")
    by = {(r["arm"], r["seed"]): 100*r["accuracy"] for r in rows}
    assert np.isclose(tried.difference["scaled@0.5"], np.mean([by["scaled@0.5", s] - by["plain", s] for s in (100, 101)])) and tried.difference["plain"] == 0
    assert "the test split has not been read" in (tmp_path/"table.txt").read_text() and (tmp_path/"choices.csv").exists()
    assert quiet(study, tmp_path).seeds.tolist() == [1, 1] and len(read_rows(tmp_path)) == 6
    assert "Choices on" not in (tmp_path/"table.txt").read_text()

def test_a_method_with_its_own_scale_gets_as_many_trials_as_ral():
    study = Study(("plain", "ral-universal", "l2-sp", "ema+mixup"), (.5, .9, .97), lrs=(1e-3, 1e-2))
    tried = {a: sorted({(j.alpha, j.lr) for j in tuning_jobs(study) if j.arm == a}) for a in study.arms}
    assert {a: len(t) for a, t in tried.items()} == {"plain": 2, "ral-universal": 6, "l2-sp": 6, "ema+mixup": 6} and {a for a, _ in tried["l2-sp"]} == {.01, .1, 1.}
    rows = [row(j.arm, j.seed, .5 + .1*(j.alpha == .01), "tune", j.alpha, j.lr) for j in tuning_jobs(study)]
    assert chosen(study, rows)[1]["l2-sp"] == .01

def test_only_the_primary_arm_chooses_its_alpha():
    study = Study(("plain", "scaled", "ral-universal"), (.2, .5))
    assert {j.arm for j in tuning_jobs(study)} == {"ral-universal"} and {(j.arm, j.alpha) for j in final_jobs(study, [])} == {("plain", 0.), ("scaled", .2), ("scaled", .5)}

def test_an_unknown_architecture_is_named_with_its_neighbours():
    for name, near in (("torchvision.resnt50", "torchvision.resnet50"), ("resnet500", "resnet50")):
        with pytest.raises(StudyError, match=near): build_learner(Study(arch=name), None, 0)

def test_a_linear_head_is_pooling_and_one_layer():
    learn = build_learner(Study(head="linear"), digits_dls(size=32, n_train=32), 0)
    assert [type(m).__name__ for m in learn.model[1]] == ["AdaptiveAvgPool2d", "Flatten", "Linear"]

def test_channels_last_is_the_same_training(tmp_path):
    accuracy = [quiet(Study(("plain", "scaled"), primary="scaled", channels_last=c, **{**TINY, "seeds": (0,)}), tmp_path/str(c)).accuracy["plain"] for c in (False, True)]
    assert abs(accuracy[0] - accuracy[1]) < 3

@pytest.mark.parametrize("kwargs, words", [(dict(seeds=(0, 100)), "no evidence"), (dict(arms=("plain", "rla")), "Unknown arm 'rla'"), (dict(arms=("plain", "ral"), primary="ral"), "stage1_epochs"), (dict(primary="ral"), "must be one of the arms"),
                                           (dict(epochs=0), "at least 1"), (dict(lrs=()), "one or more"), (dict(lrs=(-1.,)), "positive"), (dict(alphas=(2.,)), "alpha is 2"), (dict(lrs=(1e-3, 1e-2), tune_seeds=()), "no tune_seeds"),
                                           (dict(arms=("plain", "mixup@0.5"), primary="mixup@0.5"), "mixup has no alpha"), (dict(arms=("plain", "scaled@x"), primary="scaled@x"), "no alpha"), (dict(arms=("plain", "scaled@1.5"), primary="scaled@1.5"), "must lie in"), (dict(head="big"), "'fastai' and 'linear'"),
                                           (dict(arms=("plain", "scaled", "scaled"), primary="scaled"), "each arm once"), (dict(memory=0), "at least 1"), (dict(fmcs_loss="mse"), "accepted are 'nll'"),
                                           (dict(arms=("plain", "ridge+ral-universal"), primary="ridge+ral-universal"), "RAL would be applied twice"), (dict(arms=("plain", "l2-sp@10"), primary="l2-sp@10"), "must lie in")])
def test_what_does_not_go_together_is_said(kwargs, words):
    with pytest.raises(ValueError, match=words): Study(**kwargs)


# Statistics --------------------------------------------------------------------------------------------------------
def planted(differences, arms=("scaled",), alphas=(.9,)):
    rows = []
    for s in range(len(next(iter(differences.values())))):
        rows.append(row(seed=s, accuracy=.8))
        rows += [row(a, s, .8 + d[s]/100, alpha=alphas[0] if has_alpha(a) else 0.) for a, d in differences.items()]
    return rows

def test_interval_and_p_are_those_of_the_paired_t_test():
    d = {"scaled": [.5, 1.5, -.2, .9, 2.]}
    t = compare(Study(("plain", "scaled"), primary="scaled", seeds=range(5)), planted(d)).set_index("arm").loc["scaled"]
    x = np.array(d["scaled"])
    half = stats.t.ppf(.975, 4)*x.std(ddof=1)/5**.5
    assert np.allclose([t.difference, t.low, t.high], [x.mean(), x.mean()-half, x.mean()+half])
    assert np.isclose(t.p, stats.ttest_rel(x, 0*x).pvalue) and np.isnan(t.p_holm) and t.role == "primary" and (t.above, t.below) == (4, 1)

def test_holm_by_hand_and_the_primary_is_not_corrected():
    d = {"scaled": [.5, 1.5, -.2, .9, 2.], "mixup": [.1, .2, .1, .3, .2], "label-smoothing": [.1, -.2, .1, .0, .2], "lr-scaled": [1., 1.1, .9, 1., 1.05]}
    t = compare(Study(("plain", *d), primary="scaled", seeds=range(5)), planted(d)).set_index("arm")
    rest = t[t.role == "exploratory"].sort_values("p")
    want = np.maximum.accumulate([min(1, p*(3-i)) for i, p in enumerate(rest.p)])
    assert len(rest) == 3 and np.allclose(rest.p_holm, want)

def test_needed_seeds_reach_the_power():
    "The number of seeds by noncentral t: 80 % with it, less with one fewer."
    d = {"scaled": [.5, 1.5, -.2, .9, 2., -.7]}
    t = compare(Study(("plain", "scaled"), primary="scaled", seeds=range(6)), planted(d)).set_index("arm").loc["scaled"]
    def power(n):
        effect, crit = 1/np.std(d["scaled"], ddof=1)*n**.5, stats.t.ppf(.975, n-1)
        return stats.nct.sf(crit, n-1, effect) + stats.nct.cdf(-crit, n-1, effect)
    assert power(int(t.needed)) >= .8 > power(int(t.needed)-1)

def test_one_seed_and_no_variance_are_not_evidence():
    one = compare(Study(("plain", "scaled"), primary="scaled", seeds=(0,)), planted({"scaled": [3.]}))
    assert np.isnan(one.low).all() and "no evidence" in verdict(one.iloc[1])
    same = compare(Study(("plain", "scaled"), primary="scaled"), planted({"scaled": [0., 0., 0.]}))
    assert same.note.iloc[1] == "identical"

def test_a_baseline_that_learnt_nothing_gives_no_verdict():
    study = Study(("plain", "scaled"), primary="scaled", seeds=range(3))
    rows = [dict(r, guess=.1, accuracy=.12 if r["arm"] == "plain" else .7 + r["seed"]/100) for r in planted({"scaled": [0., 0., 0.]})]
    text = table_text(study, compare(study, rows))
    assert "No verdict: plain training is hardly better than guessing (10.0 %), 12.0 %" in text and "helps here" not in text
    assert "helps here" in table_text(study, compare(study, [dict(r, guess=.05) for r in rows]))

def test_without_statsmodels_a_study_says_what_to_install_before_its_first_run(tmp_path, monkeypatch):
    for name in ("statsmodels", "statsmodels.stats", "statsmodels.stats.multitest", "statsmodels.stats.power"): monkeypatch.setitem(sys.modules, name, None)
    study = Study(("plain", "scaled"), primary="scaled", **TINY)
    for needs in (lambda: holm([.01, .02]), lambda: seeds_needed(1.), lambda: quiet(study, tmp_path/"new"), lambda: compare(study, planted({"scaled": [.5, 1.5, -.2]}))):
        with pytest.raises(ImportError, match=r"needs statsmodels: pip install 'fmce_fastai\[study\]'"): needs()
    assert not (tmp_path/"new").exists()
    assert compare(study, planted({"scaled": [.5]})).difference[1] == pytest.approx(.5)  # a single seed needs neither

def test_partial_tables(tmp_path):
    study = Study(("plain", "scaled"), primary="scaled", **TINY)
    study.save(tmp_path)
    assert write_report(tmp_path).seeds.tolist() == [0, 0] and "exploratory" not in (tmp_path/"table.txt").read_text()
    run_job(tmp_path, final_jobs(study, [])[0])
    assert write_report(tmp_path).seeds.tolist() == [1, 0]


# Runs that last ----------------------------------------------------------------------------------------------------
def test_killed_three_times_it_ends_with_the_same_table(tmp_path):
    "Killed each time a little after another run has finished; it ends in two processes."
    study = Study(("plain", "scaled", "ral-universal"), primary="ral-universal", **{**TINY, "seeds": (0, 1)})
    quiet(study, tmp_path/"whole")
    study.save(tmp_path/"killed")
    finished = lambda: {f: f.stat().st_mtime_ns for f in (tmp_path/"killed"/"runs").glob("[!.]*.json")}
    server = multiprocessing.get_context("forkserver")  # it imports what a study needs, once for all three
    server.set_forkserver_preload(["fmce_fastai.study.run", "fmce_fastai.data.digits", "fastai.vision.learner", "timm"])
    rng = random.Random(0)
    for _ in range(3):
        n, limit, p = len(finished()), time.time() + 90, server.Process(target=run_study, args=(None, tmp_path/"killed"), kwargs=dict(bar=False))
        p.start()
        while len(finished()) == n and p.is_alive() and time.time() < limit: time.sleep(.02)
        time.sleep(rng.uniform(0, .3))
        p.kill()
        p.join()
    stamps = finished()
    assert 0 < len(stamps)
    quiet(None, tmp_path/"killed", jobs=2)
    assert len(read_rows(tmp_path/"killed")) == 6 and stamps.items() <= finished().items()  # finished runs are not done again
    assert (tmp_path/"whole"/"table.csv").read_text() == (tmp_path/"killed"/"table.csv").read_text()

@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="reads the list of processes as Linux gives it")
def test_workers_end_with_a_parent_that_was_killed(tmp_path):
    "Otherwise they would keep running beside a resumed study."
    Study(("plain", "scaled"), primary="scaled", **{**TINY, "epochs": 40}).save(tmp_path/"study")
    code = f"from fmce_fastai.study.run import run_study\nif __name__ == '__main__': run_study(None, {str(tmp_path/'study')!r}, jobs=2, bar=False)"
    (tmp_path/"go.py").write_text(code)
    p = subprocess.Popen([sys.executable, "-W", "ignore", tmp_path/"go.py"], start_new_session=True, stderr=subprocess.DEVNULL)
    def living():
        "Processes of the session, without zombies."
        found = []
        for stat in Path("/proc").glob("[0-9]*/stat"):
            with suppress(OSError):
                state, _, _, session = stat.read_text().rpartition(")")[2].split()[:4]
                if int(session) == p.pid and state != "Z": found.append(int(stat.parent.name))
        return found
    def wait(until, seconds=60):
        limit = time.time() + seconds
        while not until() and time.time() < limit: time.sleep(.1)
        return until()
    try:
        assert wait(lambda: list((tmp_path/"study").glob("start/*.json"))) and len(living()) > 2
        p.kill()
        p.wait()
        assert wait(lambda: not living(), 30), living()
    finally:
        with suppress(ProcessLookupError): os.killpg(p.pid, signal.SIGKILL)

def test_shards_are_merged_to_the_whole(tmp_path):
    study = Study(("plain", "scaled"), primary="scaled", **{**TINY, "seeds": (0, 1)})
    quiet(study, tmp_path/"whole")
    for i in (0, 1): run_study(study, tmp_path/f"part{i}", shard=(i, 2), bar=False)
    assert len(read_rows(tmp_path/"part0")) == len(read_rows(tmp_path/"part1")) == 2
    assert merge_studies(tmp_path/"part0", tmp_path/"part1") == 2 and merge_studies(tmp_path/"part0", tmp_path/"part1") == 0
    write_report(tmp_path/"part0")
    assert (tmp_path/"part0"/"table.csv").read_text() == (tmp_path/"whole"/"table.csv").read_text()
    replace(study, epochs=2).save(tmp_path/"other")
    with pytest.raises(StudyError, match="different studies"): merge_studies(tmp_path/"whole", tmp_path/"other")

def test_a_folder_kept_without_its_runs_gives_the_same_table(tmp_path):
    import shutil
    study = Study(("plain", "scaled"), primary="scaled", **TINY)
    study.save(tmp_path)
    (tmp_path/"runs").mkdir()
    for i, r in enumerate(planted({"scaled": [.5, 1.5, -.2]})): write_json(tmp_path/"runs"/f"{i}.json", r)
    write_report(tmp_path)
    before, shown = (tmp_path/"table.csv").read_text(), read_rows(tmp_path)
    shutil.rmtree(tmp_path/"runs")
    assert read_rows(tmp_path) == shown
    write_report(tmp_path)
    study.save(tmp_path/"new")
    assert len(write_report(tmp_path/"new")) == 2 and write_report(tmp_path/"new").seeds.tolist() == [0, 0]  # nothing is there yet, also the second time
    assert merge_studies(tmp_path/"new", tmp_path) == 6 and read_rows(tmp_path/"new") == shown  # from a folder without its runs
    assert merge_studies(tmp_path, tmp_path/"new") == 0 and read_rows(tmp_path) == shown
    assert (tmp_path/"table.csv").read_text() == before

def test_a_damaged_result_is_named(tmp_path):
    study = Study(("plain", "scaled"), primary="scaled", **{**TINY, "seeds": (0,)})
    quiet(study, tmp_path)
    f = next((tmp_path/"runs").glob("*.json"))
    f.write_text(f.read_text()[:40])
    with pytest.raises(StudyError, match=f"{f.name} cannot be read.*Delete it"): run_study(None, tmp_path, bar=False)
    f.unlink()
    assert len(quiet(None, tmp_path)) == 2
    for text, words in (("[1]", "is not the result of a run"), ('{"phase": "final"}', "arm is missing"), ("[" * 100_000, "cannot be read")):
        (tmp_path/"runs"/"x.json").write_text(text)
        with pytest.raises(StudyError, match=words): read_rows(tmp_path)
    (tmp_path/"runs"/"x.json").unlink()
    (tmp_path/"runs"/"x.json").symlink_to(f)
    with pytest.raises(StudyError, match="is a link"): read_rows(tmp_path)
    (tmp_path/"runs"/"x.json").unlink()
    (tmp_path/"other").mkdir()
    for text in ("[]", '{"heed": 1}', '{"seeds": 3}'):
        (tmp_path/"other"/"study.json").write_text(text)
        with pytest.raises(StudyError, match="no settings of a study"): Study.load(tmp_path/"other")
    with pytest.raises(StudyError, match="holds another study: n_train is 96 there and 97 here"): run_study(replace(study, n_train=97), tmp_path, bar=False)

def test_stage_1_is_trained_once_and_its_oracle_used(tmp_path, monkeypatch):
    import fmce_fastai.oracle.fit as fitting
    whole = fitting.fit_oracle
    monkeypatch.setattr(fitting, "fit_oracle", lambda *a, **k: whole(*a, n_epochs=1, **k))  # how good it is plays no role here
    study = Study(("plain", "ral", "placebo"), (.5,), "ral", **{**TINY, "n_train": 200, "seeds": (0,)}, stage1_epochs=5)
    import warnings
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        quiet(study, tmp_path)
    assert sorted(p.name for p in (tmp_path/"start").iterdir()) == ["0.json", "0.oracle.safetensors", "0.safetensors"]
    rows = {r["arm"]: r for r in read_rows(tmp_path)}
    assert rows["ral"]["acted"] == rows["ral"]["steps"] == rows["placebo"]["acted"] and rows["plain"]["acted"] is None

def test_joined_arms_and_presets():
    assert parts("ral-universal+mixup") == ["ral-universal", "mixup"] and has_alpha("ral-universal+mixup") and not has_alpha("mixup+label-smoothing")
    known = presets()
    assert len(known["paper"]) == 8 and {s.arch for s in known["paper"].values()} == {"resnet50", "torchvision.shufflenet_v2_x1_0"} and {s.data for s in known["paper"].values()} == {"mnist", "fashion_mnist", "cifar10", "cifar100"}
    assert all(s.alphas == (.7, .75, .8, .85, .9, .95) and len(s.seeds) == 5 for s in known["paper"].values())
    for studies in known.values():
        for s in studies.values(): assert not set(s.seeds) & set(s.tune_seeds) and tuning_jobs(s) + final_jobs(s, []) != []

def image_folder(folder, n=60, classes="abc"):
    "`n` images a class, a shade for each class; 60 % of them are for training."
    from PIL import Image
    rng = np.random.default_rng(0)
    for k, name in enumerate(classes):
        (folder/name).mkdir(parents=True)
        for i in range(n): Image.fromarray((rng.integers(0, 60, (16, 16, 3)) + 60*k).astype(np.uint8)).save(folder/name/f"{i}.png")
    return str(folder)

@pytest.mark.parametrize("change", [dict(n_train=5000), dict(data="nowhere"), dict(root="data"), dict(arch="resnet500"), dict(weights="best"), dict(oracle="no.safetensors"), dict(taps=("layer9",)),
                                    dict(arch="test_vit", taps=("blocks.7",)), dict(data="fashion_mnist", root="/nowhere")])
def test_a_study_that_cannot_begin_leaves_nothing_behind(tmp_path, change):
    study = Study(("plain", "scaled"), primary="scaled", **{**TINY, **change})
    with pytest.raises((ValueError, OSError)): run_study(study, tmp_path/"s", bar=False)
    assert not list(tmp_path.iterdir())

def test_a_search_without_its_seeds_and_data_without_a_test_split_leave_nothing_behind(tmp_path):
    study = Study(("plain", "scaled"), primary="scaled", tune_seeds=(), **TINY)
    with pytest.raises(StudyError, match="A search needs tune_seeds"): run_study(study, tmp_path/"s", bar=False, choices_only=True)
    for split in ("train", "valid"): image_folder(tmp_path/"data"/split, n=12)
    study = Study(("plain", "scaled"), primary="scaled", **{**TINY, "data": str(tmp_path/"data"), "n_train": 0})
    with pytest.raises(StudyError, match="no test split"): run_study(study, tmp_path/"s", bar=False)
    assert not (tmp_path/"s").exists()

def test_settings_of_the_machine_are_those_of_the_last_call(tmp_path):
    "The runs read the folder's settings: a `root` that is given with a resumed study reached none of them."
    study = Study(("plain", "scaled"), primary="scaled", **{**TINY, "seeds": (0,)})
    replace(study, root="data").save(tmp_path)  # of a call that was refused: digits take no root
    assert len(quiet(study, tmp_path)) == 2 and Study.load(tmp_path).root == ""

def test_presets_on_other_images(tmp_path):
    data = image_folder(tmp_path/"mine")
    for preset in presets():
        for s in preset_on(preset, data).values(): assert (s.data, s.root) == (data, "") and s.n_train <= 108
    assert {n: s.n_train for n, s in preset_on("few-images", data).items()} == {"5-a-class": 15, "20-a-class": 60, "lite1-5-a-class": 15}
    assert list(preset_on("paper", data)) == ["mine-resnet50", "mine-shufflenet_v2_x1_0"]  # not once for each of its four data sets
    assert {s.root for s in preset_on("few-images", "cifar10").values()} == {"data"} and preset_on("few-images", "digits")["5-a-class"].root == ""
    assert {n: s for n, s in preset_on("few-images", "fashion_mnist").items()} == presets()["few-images"]
    with pytest.raises(StudyError, match="6 training images of 3 classes: too few for every study"): preset_on("few-images", image_folder(tmp_path/"few", n=4))

def test_the_command(tmp_path, capsys):
    from fmce_fastai.cli.study import fmce_study
    args = dict(arms="plain,scaled", alphas="0.5", seeds="0-1", n_train=400, n_eval=100, size=16, epochs=4)
    fmce_study(str(tmp_path/"s"), **args)
    out = capsys.readouterr().out
    assert "Primary contrast: scaled" in out and (tmp_path/"s"/"differences.png").stat().st_size > 5_000
    fmce_study(str(tmp_path/"s"), report=True)
    assert "Primary contrast: scaled" in capsys.readouterr().out
    for kwargs, words in ((dict(shard="3/2"), "--shard"), (dict(preset="none"), "few-images"), (dict(report=True, out=str(tmp_path/"none")), "holds no study"), (dict(seeds="a"), "--seeds is 'a'"), (dict(args, epochs=5), "holds another study")):
        with pytest.raises(SystemExit): fmce_study(**{"out": str(tmp_path/"s"), **kwargs})
        assert words in capsys.readouterr().err


@pytest.mark.parametrize("jobs", [1, 2])
def test_progress_is_shown_in_a_console(jobs, capsys):
    "The notebook's bar is tried in the notebook of `pretrain`."
    run_in_processes(abs, jobs, [(-1,), (2,)], "final runs", bar=True)
    assert "2/2" in capsys.readouterr().out
