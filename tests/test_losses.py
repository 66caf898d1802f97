"The losses against plain loops, and their gradients against finite differences."
import math

import pytest
import torch

from fmce_fastai.train.losses import check_alpha, fmcs_loss, FMCS_LOSSES, representation_auxiliary_loss
from fmce_fastai.train.gradients import GradientNorms
from fmce_fastai.oracle.base import Scores


def random_scores(b=7, m=3, k=5, seed=0, p_valid=.7, dtype=torch.float64):
    gen = torch.Generator().manual_seed(seed)
    logits = torch.randn(b, m, k, generator=gen, dtype=dtype)*3
    return Scores(logits.softmax(-1) @ torch.linspace(0, 1, k, dtype=dtype), logits, torch.rand(b, m, generator=gen) < p_valid)

def by_loops(scores, kind, counted):
    b, m, k = scores.logits.shape
    modules = []
    for j in range(m):
        terms = []
        for i in range(b):
            if not scores.valid[i, j]: continue
            e = [math.exp(v) for v in scores.logits[i, j].tolist()]
            p = [v/sum(e) for v in e]
            terms.append(-math.log(p[-1]) if kind == "nll" else 1 - sum(q*l/(k-1) for l, q in enumerate(p)))
        modules.append(sum(terms)/len(terms) if terms else math.nan)
    used = [v for v, c in zip(modules, counted) if c and not math.isnan(v)]
    return (sum(used)/len(used) if used else None), modules


@pytest.mark.parametrize("kind", FMCS_LOSSES)
@pytest.mark.parametrize("seed", range(6))
def test_fmcs_loss_equals_plain_loops(kind, seed):
    scores = random_scores(seed=seed, p_valid=[1., .7, .3][seed % 3])
    for counted in ([True]*3, [False, True, True], [False, False, True]):
        got, want = fmcs_loss(scores, kind, torch.tensor(counted)), by_loops(scores, kind, counted)
        assert (got.value is None) == (want[0] is None)
        if want[0] is not None: assert float(got.value) == pytest.approx(want[0], rel=1e-12)
        torch.testing.assert_close(got.modules, torch.tensor(want[1], dtype=torch.float64), equal_nan=True)


@pytest.mark.parametrize("kind", FMCS_LOSSES)
def test_gradients(kind):
    base = random_scores()
    def value(logits):
        return fmcs_loss(Scores(logits.softmax(-1) @ torch.linspace(0, 1, 5, dtype=torch.float64), logits, base.valid), kind, torch.tensor([True, False, True])).value
    assert torch.autograd.gradcheck(value, base.logits.clone().requires_grad_())
    task = torch.tensor(.7, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda t, l: representation_auxiliary_loss(t, value(l), .3), (task, base.logits.clone().requires_grad_()))


@pytest.mark.parametrize("kind", FMCS_LOSSES)
def test_invalid_scores_reach_neither_value_nor_gradient(kind):
    scores = random_scores()
    logits = torch.where(scores.valid[..., None], scores.logits, 0.).requires_grad_()
    spoiled = Scores(torch.where(scores.valid, scores.fmcs, float("nan")), torch.where(scores.valid[..., None], logits, float("nan")), scores.valid)
    loss = fmcs_loss(spoiled, kind)
    torch.testing.assert_close(loss.value.detach(), fmcs_loss(scores, kind).value)
    if kind == "nll":
        loss.value.backward()
        assert torch.isfinite(logits.grad).all() and (logits.grad[~scores.valid] == 0).all()


def test_nothing_valid_and_nothing_counted():
    scores = random_scores()
    assert fmcs_loss(scores._replace(valid=torch.zeros(7, 3, dtype=torch.bool))).value is None
    assert fmcs_loss(scores, modules=torch.zeros(3, dtype=torch.bool)).value is None


def test_a_certain_score_costs_nothing_and_stays_finite():
    logits = torch.full((2, 1, 4), -1e4); logits[..., -1] = 1e4
    scores = Scores(torch.ones(2, 1), logits, torch.ones(2, 1, dtype=torch.bool))
    assert float(fmcs_loss(scores).value) == 0 and float(fmcs_loss(scores, "gap").value) == 0
    worst = Scores(torch.zeros(2, 1), logits.flip(-1), scores.valid)
    assert float(fmcs_loss(worst).value) == 2e4 and float(fmcs_loss(worst, "gap").value) == 1


def test_ral_is_the_weighted_mean():
    t, a = torch.tensor(2.), torch.tensor(5.)
    assert representation_auxiliary_loss(t, a, 0) is t
    for alpha in (.3, .9, 1.): assert float(representation_auxiliary_loss(t, a, alpha)) == pytest.approx((1-alpha)*2 + alpha*5)
    assert representation_auxiliary_loss(t, torch.tensor(float("nan")), 0) is t


@pytest.mark.parametrize("alpha, error", [(-1e-9, ValueError), (1.0001, ValueError), (float("nan"), ValueError), (float("inf"), ValueError), ("x", TypeError), (None, TypeError), (False, TypeError), ([.5], TypeError)])
def test_alpha_out_of_range_is_named(alpha, error):
    with pytest.raises(error, match="alpha is"): check_alpha(alpha)
    with pytest.raises(error): representation_auxiliary_loss(torch.tensor(1.), torch.tensor(1.), alpha)

def test_alpha_may_be_any_number():
    import numpy as np
    for a in (0, 1, np.float32(.5), torch.tensor(.5)): assert isinstance(check_alpha(a), float)

@pytest.mark.parametrize("kind", ["NLL", "mse", None, ""])
def test_unknown_kinds_are_named(kind):
    with pytest.raises(ValueError, match="'nll' and 'gap'"): fmcs_loss(random_scores(), kind)


def test_gradient_norms_split_what_arrives_at_a_map():
    gen = torch.Generator().manual_seed(0)
    w = torch.randn(4, generator=gen, requires_grad=True)
    a = w[:, None]*torch.randn(4, 3, generator=gen)
    b = (a*2).tanh() # the second map depends on the first
    norms = GradientNorms()
    views = norms.watch({"a": a, "b": b, "c": torch.randn(3)})
    aux = lambda v: (v["a"]**3).sum() + v["b"].exp().sum()
    ((b**2).sum() + aux(views)).backward()
    a0, b0 = a.detach().requires_grad_(), None
    b0 = (a0*2).tanh(); b0.retain_grad()
    direct_a = torch.autograd.grad((a0**3).sum(), a0)[0]
    direct_b = torch.autograd.grad(b0.exp().sum(), b0, retain_graph=True)[0]
    total_b = 2*b0 + direct_b
    rest_a = torch.autograd.grad((b0**2).sum() + b0.exp().sum(), a0)[0]
    for got, want in [(norms.direct["a"], direct_a), (norms.rest["a"], rest_a), (norms.direct["b"], direct_b), (norms.rest["b"], total_b-direct_b)]:
        torch.testing.assert_close(got, want.norm())
    assert set(norms.direct) == {"a", "b"} and not norms._pending
