"What a RAL step computes: no more than it must, and the same values as the straightforward way."
import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from fmce_fastai.maps.find import tap_plan
from fmce_fastai.maps.tap import FeatureTap
from fmce_fastai.oracle.base import FMCENet
from fmce_fastai.oracle.neighbours import NeighbourGrams
from fmce_fastai.train.callback import FMCECallback
from fmce_fastai.train.losses import fmcs_loss
from fmce_fastai.train.memory import MemoryBank
from helpers import make_model, tensor_learner

SHAPES = {"early": (6, 14, 14), "late": (24, 3, 3)}  # the first is pooled


def step(i, n=16, kind="labels", offset=0.):
    "Maps of a step, with graph, and their targets. Labels become shares of class, or an image is broken."
    g = torch.Generator().manual_seed(i)
    y = torch.randint(0, 4, (n,), generator=g)
    maps = {}
    for name, shape in SHAPES.items():
        centres = torch.randn(4, *shape, generator=torch.Generator().manual_seed(99))
        m = torch.randn(n, *shape, generator=g) + centres[y] + offset
        if kind == "broken": m[2, 0, 0, 0] = float("nan")
        maps[name] = m.requires_grad_()
    if kind == "shares": y = .7*F.one_hot(y, 4) + .3*F.one_hot(y.flip(0), 4)
    return maps, y


def gradients(scores, maps): return torch.autograd.grad(fmcs_loss(scores, "nll").value, list(maps.values()))


@pytest.mark.parametrize("offset", [0., 30., -1e4])
@pytest.mark.parametrize("kinds", [["labels"]*6, ["labels", "labels", "shares", "shares", "labels", "labels"],
                                   ["labels", "labels", "broken", "labels", "labels", "labels"]])
def test_rows_of_the_batch_are_those_of_the_full_computation(kinds, offset):
    oracle, fast, full = FMCENet.universal(), MemoryBank(), MemoryBank()
    for i, kind in enumerate(kinds):
        maps, y = step(i, kind=kind, offset=offset*(1 + i/10))
        got = fast.score(oracle, maps, y, size=40)
        all_scores = oracle(*full.with_neighbours(maps, y, size=40))
        want = type(got)(*(s[:16] for s in all_scores))
        assert torch.equal(got.valid, want.valid) and got.valid.any()
        assert (got.fmcs - want.fmcs)[got.valid].abs().max() < 1e-5*(1 + abs(offset)/100)
        assert torch.equal(fast.targets, full.targets) and fast.maps.keys() == full.maps.keys()
        torch.testing.assert_close(fast.maps, full.maps, rtol=0, atol=0, equal_nan=True)
        for g, w in zip(gradients(got, maps), gradients(want, maps)):
            assert (g - w).norm() < 1e-4*(1 + abs(offset)/100)*w.norm()


def test_the_bank_may_change_its_size_and_batches_theirs():
    oracle, fast, full = FMCENet.universal(), MemoryBank(), MemoryBank()
    for i, (n, size) in enumerate([(4, 30), (4, 30), (12, 20), (16, 60), (3, 10), (16, 10)]):
        maps, y = step(i, n)
        got, want = fast.score(oracle, maps, y, size), oracle(*full.with_neighbours(maps, y, size))
        assert torch.equal(got.valid, want.valid[:n])
        torch.testing.assert_close(got.logits, want.logits[:n], atol=1e-5, rtol=1e-5)


def flops(f):
    with FlopCounterMode(display=False) as counter: f()
    return counter.get_total_flops()


def test_multiply_adds_with_memory_are_those_of_the_new_rows():
    "Of maps as late ones of a ResNet: their inner products are the larger part of the cost."
    oracle = FMCENet.universal()
    def maps(): return {"a": torch.randn(64, 256, 4, 4, requires_grad=True)}
    y, bank = torch.arange(64) % 10, MemoryBank()
    for _ in range(4): bank.score(oracle, maps(), y, 200)
    def new(): fmcs_loss(bank.score(oracle, maps(), y, 200), "nll").value.backward()
    joined = {"a": torch.randn(264, 256, 4, 4, requires_grad=True)}
    def full(): fmcs_loss(oracle(joined, torch.arange(264) % 10), "nll").value.backward()
    rows = 64*264 + (2*64*64 + 64*200)  # inner products: of the batch's rows, forward; to its maps, backward
    assert flops(new) < 1.2*2*rows*(256*16 + 256)
    assert flops(new) < flops(full)/4


def test_a_step_given_up_starts_afresh():
    "Half of the maps far from the rest is fit to be centred; a constant map is not, and the bank goes on."
    oracle, bank = FMCENet.universal(), MemoryBank()
    constant = {"a": torch.ones(16, 8, 4, 4)}
    assert not bank.score(oracle, constant, torch.arange(16) % 4, 40).valid.any()
    for _ in range(2):
        assert bank.score(oracle, {"a": torch.randn(16, 8, 4, 4)}, torch.arange(16) % 4, 40).valid.all()
    assert isinstance(bank.grams["a"], NeighbourGrams) and bank.grams["a"].grams.shape == (2, 40, 40)


@pytest.mark.parametrize("memory", [0, 40])
def test_modules_that_do_not_count_are_scored_without_graph(memory):
    cb = FMCECallback(.9, memory=memory)
    plan = tap_plan(make_model(), x=torch.zeros(2, 3, 16, 16))
    cb.feature_tap, cb.scorer, cb.batch_targets = FeatureTap(plan), cb.oracle.on(plan), torch.arange(16) % 4
    cb.counted = torch.tensor([False, True, True])
    maps = {t.name: torch.randn(16, t.channels, *t.grid, requires_grad=True) for t in plan}
    scores = cb.score_maps(maps)
    fmcs_loss(scores, "nll", cb.counted).value.backward()
    assert [m.grad is not None for m in maps.values()] == cb.counted.tolist()
    torch.testing.assert_close(scores.fmcs[:, 0], cb.scorer(maps, cb.batch_targets).fmcs[:, 0])


def test_their_gradient_ratio_is_0_and_their_scores_are_there(tmp_path):
    learn = tensor_learner(path=tmp_path, metrics=[], cbs=FMCECallback(.9))
    learn.logger = lambda *_: None
    with learn.no_bar(): learn.fit(1)
    h, counted = learn.fmce.history, learn.fmce.counted.numpy()
    assert (h.acted == h.steps).all() and not counted.all()
    assert (h.gradient_ratio[~counted] == 0).all() and (h.gradient_ratio[counted] > 0).all()
    assert h.fmcs.notna().all() and learn.fmce.curve.fmcs.notna().all()
