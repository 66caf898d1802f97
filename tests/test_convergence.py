"Contracts of fmce_fastai.convergence, checked against calculations that share no code with it"
import json, math, pickle, subprocess, sys, warnings
import numpy as np, pandas as pd, pytest
from hypothesis import given, settings, strategies as st
from fmce_fastai.convergence.cqi import converged_step, cqi, cqi_online, smooth_losses, window_steps
from fmce_fastai.convergence.noise import cqi_noise, real_drop
from fmce_fastai.convergence.online import OnlineCQI
from fmce_fastai.convergence.labels import level_targets, levels, markers, progress
from fmce_fastai.convergence.run import Convergence, convergence, ConvergenceError, ConvergenceWarning

SPE = 40

def curve(epochs=12, tau=1., noise=.05, seed=0, spe=SPE, a=1.9, b=.4):
    t = np.arange(epochs*spe)/spe
    return b + a*np.exp(-t/tau) + noise*np.random.default_rng(seed).normal(size=len(t))

def quiet(losses, spe=SPE, **kw):
    "The result of `convergence`, and the ConvergenceWarnings it gave"
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter('always')
        res = convergence(losses, spe, **kw)
    assert all(w.category is ConvergenceWarning for w in warned)
    return res, [str(w.message) for w in warned]

# --- plain-Python twins ---------------------------------------------------------------------------------------------------------------

def loop_ema(losses, spe, halflife=.25):
    q, out = 2**(-1/(halflife*spe)), []
    for t in range(len(losses)):
        top = sum(q**(t-i)*losses[i] for i in range(t+1))
        out.append(top/sum(q**(t-i) for i in range(t+1)))
    return np.array(out)

def loop_cqi(s, spe, w, online=False):
    out = []
    for t in range(len(s)):
        drop = s[0] - min(s[:t+1] if online else s)
        out.append(math.nan if t < w or drop <= 0 else abs(sum(s[i]-s[i-1] for i in range(t-w+1, t+1))/w)*spe/drop)
    return np.array(out)

def loop_converged(c, threshold, w):
    for t in range(len(c)):
        if all(v < threshold for v in c[t:]): return t if len(c) - 1 - t >= w else None

def loop_markers(p, k):
    rows = []
    for i in range(k):
        hits = [t for t,v in enumerate(p) if v*(k-1) >= i - 1e-9]
        if hits: rows.append((i, hits[0], i/(k-1)))
    return rows

@pytest.mark.parametrize('spe,halflife', [(1, .25), (7, .25), (40, .1), (12.5, 1.)])
def test_smoothing_is_the_weighted_mean(spe, halflife):
    l = curve(4)
    np.testing.assert_allclose(smooth_losses(l, spe, halflife), loop_ema(l, spe, halflife), rtol=1e-12)

@pytest.mark.parametrize('spe,window,w', [(40, 1., 40), (40, .25, 10), (3, 1., 8), (1, 1., 8), (12.5, 2., 25)])
def test_cqi_is_the_mean_difference(spe, window, w):
    s = smooth_losses(curve(4), spe)
    assert window_steps(spe, window) == w
    np.testing.assert_allclose(cqi(s, spe, window), loop_cqi(s, spe, w), rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(cqi_online(s, spe, window), loop_cqi(s, spe, w, online=True), rtol=1e-9, atol=1e-12)

@settings(max_examples=200, deadline=None)
@given(st.lists(st.sampled_from([math.nan, .01, .04, .05, .06, .9]), max_size=25), st.integers(1, 6))
def test_converged_step_matches_search(c, w):
    assert converged_step(c, .05, window_steps=w) == loop_converged(c, .05, w)

@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, 60), min_size=1, max_size=40), st.integers(2, 13))
def test_markers_match_brute_force(p, k):
    p = np.array(p)/60
    got = markers(p, k)
    assert list(got.columns) == ['level', 'step', 'fmcs']
    want = loop_markers(p, k)
    assert [(r.level, r.step) for r in got.itertuples()] == [r[:2] for r in want]
    np.testing.assert_allclose(got.fmcs, [r[2] for r in want], rtol=1e-12)

# --- closed forms ---------------------------------------------------------------------------------------------------------------------

def test_exponential_decay_closed_form():
    a, b, tau, n = 1.9, .4, 1.5, 20*SPE
    t, r, q = np.arange(n), math.exp(-1/(tau*SPE)), 2**(-1/(.25*SPE))
    s = smooth_losses(b + a*r**t, SPE)
    want = b + a*(1-q)/(1-q**(t+1))*(r**(t+1)-q**(t+1))/(r-q)  # EMA of a geometric sequence
    np.testing.assert_allclose(s, want, rtol=1e-10)
    c = cqi(b + a*r**t, SPE)
    assert np.isnan(c[:SPE]).all()
    np.testing.assert_allclose(c[SPE:], r**t[SPE:]*(r**-SPE - 1)/(1 - r**(n-1)), rtol=1e-9)
    raw = math.log((math.exp(1/tau) - 1)/.05/(1 - r**(n-1)))*tau*SPE
    assert converged_step(c, window_steps=SPE) == math.floor(raw) + 1
    # long after the start the average trails by a constant factor, i.e. by a constant time
    lag = math.log((1-q)/(1-q/r))*tau*SPE
    assert abs(convergence(b + a*r**t, SPE).converged - raw - lag) <= 1

@pytest.mark.parametrize('epochs,threshold,hit', [(10, .11, True), (10, .09, False), (25, .05, True)])
def test_linear_loss_gains_the_same_each_epoch(epochs, threshold, hit):
    c = cqi(np.linspace(3, 1, epochs*SPE + 1), SPE)
    np.testing.assert_allclose(c[SPE:], 1/epochs, rtol=1e-9)
    assert converged_step(c, threshold, window_steps=SPE) == (SPE if hit else None)

def test_cqi_noise_formula_against_simulation():
    z = np.random.default_rng(0).normal(size=200_000)
    s = smooth_losses(z, SPE)[1000:]
    for w in (10, 40, 80):
        measured = (s[w:] - s[:-w]).std()*SPE/w
        assert cqi_noise(1., SPE, window=w/SPE) == pytest.approx(measured, rel=.05)

# --- online ---------------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('spe,seed,noise', [(40, 0, .05), (40, 1, .3), (3, 2, .05), (100, 3, 0.)])
def test_online_equals_vectorised(spe, seed, noise):
    l = curve(6, noise=noise, seed=seed, spe=100)
    m = OnlineCQI(spe)
    got = []
    for x in l:
        returned = m.update(x)
        assert returned is m.cqi
        got.append((m.smoothed, m.cqi))
    s = smooth_losses(l, spe)
    np.testing.assert_allclose([g[0] for g in got], s, rtol=1e-14)
    np.testing.assert_allclose([g[1] for g in got], cqi_online(s, spe), rtol=1e-8, atol=1e-10)
    assert m.step == len(l) and m.drop == pytest.approx(s[0] - s.min(), rel=1e-12)

def test_online_speaks_up_a_window_after_the_step_it_means():
    l = curve(12, noise=.02)
    m, converged = OnlineCQI(SPE), []
    for x in l: m.update(x); converged.append(m.converged)
    c = cqi_online(smooth_losses(l, SPE), SPE)
    assert converged.index(True) == converged_step(c, window_steps=SPE) + SPE
    assert all(converged[converged.index(True):])

def test_online_takes_it_back_when_the_loss_moves_again():
    m = OnlineCQI(SPE)
    for x in curve(10, noise=0.): m.update(x)
    assert m.converged
    for _ in range(SPE//2): m.update(1.5)
    assert not m.converged

def test_online_is_not_fooled_by_noise():
    spe, fooled = 1000, 0  # long epochs: averages calm down, and CQI alone would call 6 of these 30 converged
    for seed in range(30):
        m, hit = OnlineCQI(spe), False
        for x in np.random.default_rng(seed).normal(size=5*spe): m.update(x); hit |= m.converged
        fooled += hit
    assert fooled <= 1

def test_online_edges():
    m = OnlineCQI(SPE)
    assert m.drop == 0 and not m.converged and math.isnan(m.noise) and 'step=0' in repr(m)
    for x in curve(10): m.update(x)
    assert m.converged and pickle.loads(pickle.dumps(m)).converged
    assert math.isnan(m.update(math.inf)) and not m.converged
    assert math.isnan(m.update(.4)) and math.isnan(m.smoothed)
    rising = OnlineCQI(SPE)
    assert all(math.isnan(rising.update(x)) for x in range(3*SPE))

def test_online_noise_is_that_of_single_losses():
    m = OnlineCQI(SPE)
    for x in curve(20, noise=.1): m.update(x)
    assert m.noise == pytest.approx(.1, rel=.1)

# --- invariances ----------------------------------------------------------------------------------------------------------------------

@settings(max_examples=25, deadline=None)
@given(st.floats(-50, 50), st.floats(1e-3, 1e3), st.integers(0, 5))
def test_affine_maps_of_the_loss_change_nothing(shift, factor, seed):
    l = curve(noise=.1, seed=seed)
    one, two = quiet(l)[0], quiet(shift + factor*l)[0]
    assert one.status == two.status and one.converged == two.converged
    np.testing.assert_allclose(two.cqi, one.cqi, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(two.progress, one.progress, atol=1e-6)
    assert list(one.markers.step) == list(two.markers.step)

def test_appending_quiet_steps_keeps_labels():
    l = curve(12, noise=0.)
    a, b = convergence(l, SPE), convergence(np.r_[l, np.full(5*SPE, l[-1])], SPE)
    assert abs(a.converged - b.converged) <= 1
    np.testing.assert_allclose(b.progress[:len(l)], a.progress, atol=2e-3)

# --- progress, labels, targets --------------------------------------------------------------------------------------------------------

def test_progress_by_hand():
    np.testing.assert_allclose(progress([4, 5, 3, 2, 1], 3), [0, 0, .5, 1, 1])
    np.testing.assert_allclose(progress([4, 5, 3, 2, 1], None, n_levels=5), [0, 0, .25, .5, .75])
    assert not progress([4., 1.], None, n_levels=2).any()
    for s, at in [([1., 2.], 1), ([1., 1.], None), ([], None)]:
        with pytest.raises(ValueError): progress(s, at)
    with pytest.raises(ValueError, match='0 to 1'): progress([2., 1.], 2)

def test_step_markers():
    p = np.linspace(0, 1, 101)
    assert list(markers(p, 5, 'step', 40).step) == [0, 10, 20, 30, 40]
    never = markers(.75*p, 5, 'step')
    assert list(never.step) == [0, 33, 67, 100] and never.fmcs.max() == .75
    assert list(markers(p, 2, 'step').step) == [0]
    with pytest.raises(ValueError, match='converged'): markers(p, 5, 'step', 101)

@settings(max_examples=100, deadline=None)
@given(st.lists(st.floats(0, 1), min_size=1, max_size=20), st.integers(2, 30))
def test_level_targets_expect_p_from_two_neighbours(p, k):
    t = level_targets(p, k)
    assert t.shape == (len(p), k) and (t >= 0).all()
    np.testing.assert_allclose(t.sum(1), 1, atol=1e-12)
    np.testing.assert_allclose(t @ levels(k), p, atol=1e-12)
    for row in t:
        on = np.flatnonzero(row)
        assert len(on) <= 2 and on[-1] - on[0] <= 1

@pytest.mark.parametrize('p', [[-.1], [1.1], [math.nan], [[.5]]])
def test_level_targets_refuse(p):
    with pytest.raises(ValueError): level_targets(p)

def test_label_ends_and_kinds():
    l = curve()
    r = convergence(l, SPE)
    n = len(l)
    assert r.label(0) == 0 and r.label(r.converged) == 1 and r.label(n) == r.label(n-1) == r.progress[-1]
    assert (r.label(range(n)) == r.progress).all()
    assert r.label([]).shape == (0,) and r.label(np.array([3, 1], np.int32)).shape == (2,)
    for bad in ([-1], [n+1]):
        with pytest.raises(ValueError, match=f'0 to {n}'): r.label(bad)
    with pytest.raises(TypeError, match='whole'): r.label([1.5])

# --- the whole ------------------------------------------------------------------------------------------------------------------------

def test_converged_run():
    l, lr = curve(), np.linspace(1e-2, 5e-3, 12*SPE)
    r, warned = quiet(l, lr=lr)
    s = loop_ema(l, SPE)
    at = loop_converged(loop_cqi(s, SPE, SPE), .05, SPE)
    assert isinstance(r, Convergence) and r.status == 'converged' and r.usable and not warned and r.converged == at
    np.testing.assert_allclose(r.progress, np.clip((s[0]-s)/(s[0]-s[at]), 0, 1), atol=1e-9)
    assert r.markers.fmcs.iloc[-1] == 1 and r.markers.step.iloc[-1] <= at
    assert r.start_noise == pytest.approx(.05/(s[0]-s[at]), rel=.15)
    f = r.frame()
    assert list(f.columns) == ['step', 'epoch', 'loss', 'smoothed', 'lr', 'cqi', 'progress'] and len(f) == len(l)
    assert f.epoch[SPE] == 1 and (f.lr == lr).all() and (f.loss == l).all()
    d = json.loads(json.dumps(r.to_dict(), allow_nan=False))
    assert d['converged'] == at and d['lr_at_converged'] == pytest.approx(lr[at]) and d['markers'][-1]['fmcs'] == 1
    assert f'step {at}' in repr(r) and 'converged' in r._repr_html_()

def test_not_converged_run_has_no_top_level():
    r, warned = quiet(curve(4))
    assert r.status == 'not converged' and r.converged is None and len(warned) == 1
    assert r.progress.max() == pytest.approx(.9) and r.progress[r.smoothed.argmin()] == r.progress.max()
    assert list(r.markers.level) == list(range(10)) and r.markers.fmcs.max() < 1
    for word in ('Train longer', 'learning rate', '`threshold`'): assert word in warned[0]
    # the CQI that the message names is the limit: just above it the run converges, just below it does not
    reach = np.max(r.cqi[-SPE-1:])
    assert f'{reach:.3g}' in warned[0]
    assert quiet(curve(4), threshold=reach*1.001)[0].converged is not None
    assert quiet(curve(4), threshold=reach*.999)[0].converged is None

def test_noise_that_keeps_a_run_from_converging_is_named():
    r, warned = quiet(curve(20, noise=.3))
    assert r.status == 'not converged' and 'larger `window`' in warned[0]
    assert 'Noise alone' not in quiet(curve(4))[1][0]
    assert quiet(curve(20, noise=.3), window=4.)[0].status == 'converged'

def spoiled(value, at):
    l = curve(); l[at] = value
    return l

UNUSABLE = {
    'nan': (spoiled(math.nan, 77), 'nan at step 77'), 'inf': (spoiled(math.inf, 0), 'inf at step 0'),
    'short': (curve()[:2*SPE], f'at least {2*SPE+1}'), 'empty': ([], '0 steps'), 'rising': (curve()[::-1], 'does not fall'),
    'flat': (np.full(400, .7), 'does not fall'), 'zero': (np.zeros(400), 'does not fall'),
    'noise': (np.random.default_rng(3).normal(size=400)*.1 + 2, ''),
    'faint': (2 - .05*np.arange(400)/400 + .2*np.random.default_rng(0).normal(size=400), 'noise could explain'),
    'diverged': (np.r_[curve(6), np.full(6*SPE, 5.)], 'does not fall'),
    'settled above its start': (np.r_[1., 5., np.full(16*SPE, .4), np.full(4*SPE, 1.01)], 'rose again'),
}

@pytest.mark.parametrize('kind', UNUSABLE)
def test_unusable_runs(kind):
    losses, says = UNUSABLE[kind]
    r, warned = quiet(losses)
    assert r.status == 'unusable' and not r.usable and r.converged is None and len(warned) == 1
    assert says in r.message and r.message in warned[0]
    assert r.progress.shape == r.cqi.shape == r.smoothed.shape == r.losses.shape and np.isnan(r.progress).all() and len(r.markers) == 0
    with pytest.raises(ConvergenceError, match='no FMCS labels'): r.label(0)
    assert issubclass(ConvergenceError, ValueError)
    json.dumps(r.to_dict(), allow_nan=False)
    assert len(r.frame()) == len(losses) and 'unusable' in repr(r) and 'unusable' in r._repr_html_()

def test_a_first_loss_within_noise_is_no_start_of_a_scale():
    l = 2 - 1.*np.arange(800)/800 + .5*np.random.default_rng(0).normal(size=800)
    l[0] = 1.2
    assert real_drop(l, SPE).real
    assert 'first loss' in quiet(l)[0].message

def test_a_run_that_rises_back_keeps_its_drop_but_is_not_converged():
    r = quiet(np.r_[curve(6, noise=0.), curve(6, noise=0.)[::-1]])[0]
    assert r.status == 'not converged' and r.progress.argmax() in range(6*SPE, 7*SPE) and r.label(12*SPE) < .25

def test_shortest_run_that_can_converge():
    l = np.r_[2.3, np.full(2*SPE, .4)]
    assert quiet(l[:-1])[0].status == 'unusable'
    assert quiet(l, halflife=.01)[0].status != 'unusable'

def test_false_alarms_of_pure_noise():
    hits = sum(real_drop(np.random.default_rng(i).standard_t(2, 600), 30).real for i in range(200))
    assert hits <= 10

@pytest.mark.parametrize('decay_steps', [1, 3, 10, 40, 200])
def test_fast_and_slow_drops_are_seen(decay_steps):
    hits = 0
    for i in range(40):
        t, z = np.arange(600), np.random.default_rng(i).normal(size=600)
        hits += real_drop(.4 + 1.9*np.exp(-t/decay_steps) + .2*z, 30).real
    assert hits >= 39

def test_an_outlier_at_the_start_is_no_drop_if_a_larger_one_follows():
    l = .4 + .01*np.random.default_rng(0).normal(size=600)
    l[0] = 2.
    assert real_drop(l, 30).real
    l[450] = 3.
    assert not real_drop(l, 30).real

def test_a_steady_decline_is_not_taken_for_noise():
    t = np.arange(60)
    assert sum(real_drop(2.3 - 1.9*t/60 + .3*np.random.default_rng(i).normal(size=60), 8).real for i in range(100)) >= 95

def test_real_drop_arguments():
    with pytest.raises(ValueError, match='at least 61'): real_drop(np.arange(60.), 30)
    with pytest.raises(ValueError, match='level'): real_drop(np.arange(100.), 30, level=1.)

def test_decayed_rate_is_named():
    l = curve()
    at = convergence(l, SPE).converged
    rate = np.where(np.arange(len(l)) < at, 1., .01)
    assert 'stopped moving' in convergence(l, SPE, lr=rate).message
    assert 'stopped moving' not in convergence(l, SPE, lr=np.ones(len(l))).message

def test_step_spacing_reaches_the_whole():
    r = convergence(curve(), SPE, n_levels=5, spacing='step')
    np.testing.assert_allclose(np.diff(r.markers.step), r.converged/4, atol=1)

def test_accepts_lists_frames_and_tensors():
    torch = pytest.importorskip('torch')
    l = curve()
    want = convergence(l, SPE)
    for same in (list(l), pd.Series(l), torch.tensor(l, requires_grad=True)): assert convergence(same, SPE).converged == want.converged
    assert convergence(torch.tensor(l).bfloat16(), SPE).losses.dtype == np.float64
    given = l.copy(); convergence(given, SPE); assert (given == l).all()

BAD = [(dict(threshold=0), ValueError), (dict(threshold=-1.), ValueError), (dict(threshold=math.nan), ValueError), (dict(threshold='low'), TypeError),
       (dict(n_levels=1), ValueError), (dict(n_levels=2.5), TypeError), (dict(steps_per_epoch=0), ValueError), (dict(steps_per_epoch=.5), ValueError),
       (dict(steps_per_epoch=True), TypeError), (dict(halflife=0), ValueError), (dict(halflife=None), TypeError), (dict(window=0), ValueError),
       (dict(lr=[1e-3]), ValueError), (dict(lr=[math.nan]*480), ValueError), (dict(spacing='time'), ValueError),
       (dict(losses=np.ones((480, 2))), ValueError), (dict(losses=1.), ValueError), (dict(losses=['a', 'b']), TypeError), (dict(losses=None), (TypeError, ValueError))]

@pytest.mark.parametrize('change,error', BAD, ids=lambda x: str(list(x)[0]) if isinstance(x, dict) else '')
def test_bad_arguments(change, error):
    args = dict(losses=curve(), steps_per_epoch=SPE) | change
    with pytest.raises(error, match=f'`{next(iter(change))}`'): convergence(**args)

# --- picture and import ---------------------------------------------------------------------------------------------------------------

@pytest.fixture
def plt():
    import matplotlib
    matplotlib.use('agg')
    import matplotlib.pyplot as plt
    yield plt
    plt.close('all')

def test_plot_shows_losses_levels_threshold_and_step(plt):
    l = curve()
    r = convergence(l, SPE, lr=np.linspace(1, .5, len(l)))
    axs = r.plot()
    axs[0].figure.canvas.draw()
    assert len(axs) == 3 and axs[1].get_yscale() == 'log' and axs[-1].get_xlabel() == 'epoch' and all(a.get_ylabel() for a in axs)
    lines = [{o.get_label(): o for o in a.get_lines()} for a in axs]
    np.testing.assert_array_equal(lines[0]['smoothed'].get_ydata(), r.smoothed)
    np.testing.assert_array_equal(lines[0]['levels 0 to 10'].get_xdata(), r.markers.step/SPE)
    assert set(lines[1]['threshold 0.05'].get_ydata()) == {.05}
    for o in lines: assert list(o['converged step'].get_xdata()) == [r.converged/SPE]*2
    np.testing.assert_array_equal(lines[2]['learning rate'].get_ydata(), r.lr)
    own = plt.subplots(2)[1]
    assert convergence(l, SPE).plot(own)[0] is own[0]
    with pytest.raises(ValueError, match='3 axes'): r.plot(own)

@pytest.mark.parametrize('kind', UNUSABLE)
def test_plot_of_unusable_runs(plt, kind):
    axs = quiet(UNUSABLE[kind][0])[0].plot()
    axs[0].figure.canvas.draw()
    assert axs[0].get_title(loc='left') == 'unusable' and not any('levels' in o.get_label() for o in axs[0].get_lines())

def test_import_stays_light():
    code = "import sys, fmce_fastai.convergence.run; print([m for m in ('torch','fastai','matplotlib','scipy.stats','fastcore') if m in sys.modules])"
    out = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True).stdout
    assert out.strip() == '[]'
