"""What helps a loss on feature maps? A random factorial experiment in the setting of `loss_screen.py`.

    python benchmarks/loss_factorial.py --runs 0-1039
    python benchmarks/loss_factorial.py --report     # also writes loss_effects_*.csv and later_loss_effects_*.csv

Run i trains with a random choice of every factor: the loss, the bank it is computed among, its taps, its weight alpha
and how that changes over the fit, a projection head, MixUp of maps, mirrored images, and the pull to the starting
network's similarities. Runs come in blocks of eight with the same data, start and batches. The report is a linear model
with a constant per block. So every run says something of every factor, which one comparison at a time does not: after
600 runs a factor of two levels is known to about 0.4 points. Runs 0 to 639 have 5 images a class. The later ones have 10
and 20, and leave out the levels that had lost by then. Read from validation images; no test split is read."""
import argparse
import warnings
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch

from loss_screen import HERE, screen
from loss_search import read

VERSION = f"cpu_float32_torch{torch.__version__.split('+')[0]}"
PATH = HERE/f'loss_factorial_{VERSION}.csv'
FACTORS = dict(base=['alignment', 'ridge', 'ridge.1', 'ridge-ce', 'supcon', 'prototypes', 'ral', 'quality', 'plain'],
               bank=['copies', 'bank', 'none'], taps=['4+6', '6', '4+6+last', '6+last', 'last'], alpha=[.97, .9, .99],
               schedule=['constant', 'fall', 'rise'], head=['no', 'yes'], mixup=['no', 'yes'], flip=['no', 'yes'],
               keep=[0., .3, 1.])
TAPS = {'4+6':'', '6':'-taps1', '4+6+last':'-last-taps3', '6+last':'-last', 'last':'-last-taps1'}
BLOCK = 8   # runs with the same seed

class Stage(NamedTuple):
    "A part of the experiment, with its own settings and levels."
    first:int       # Its first run
    settings:tuple  # Names as for `loss_screen`
    factors:dict    # Factor -> levels; the first is the one the others are compared with
    stem:str        # Of the file of effects

STAGES = (
    Stage(0, ('fashion-5', 'clipart-5'), FACTORS, 'loss_effects'),
    Stage(640, ('fashion-10', 'clipart-10', 'fashion-20', 'clipart-20'), FACTORS | dict(
        base=['alignment', 'ridge', 'ridge.1', 'supcon', 'prototypes', 'ral', 'quality', 'plain'], bank=['copies', 'bank'],
        taps=['4+6', '6', '4+6+last'], alpha=[.97, .9], schedule=['constant', 'fall'], head=['no'], mixup=['no'], keep=[0.]),
          'later_loss_effects'))

def stage_of(i): return next(s for s in reversed(STAGES) if i >= s.first)

def design(i):
    "Setting, seed and levels of run `i`."
    rng = np.random.default_rng([7, i])
    block,stage = i//BLOCK,stage_of(i)
    levels = {f:rng.choice(l).item() for f,l in stage.factors.items()}
    if levels['base'] in ('ral', 'quality'): levels['head'] = 'no'   # an oracle reads maps
    if levels['base'] == 'plain': levels |= {f:FACTORS[f][0] for f in ('bank', 'taps', 'alpha', 'schedule', 'head')}
    return stage.settings[block % len(stage.settings)], 200 + block//2, levels

def variant(l):
    "The levels as a variant of `loss_screen`."
    if l['base'] == 'plain': parts = ['plain']
    else:
        ends = ['' if l['bank'] == 'none' else '-' + l['bank'], TAPS[l['taps']], '-head'*(l['head'] == 'yes'),
                '' if l['schedule'] == 'constant' else '-' + l['schedule']]
        parts = [f"{l['base']}{''.join(ends)}:{l['alpha']:g}"]
    if l['mixup'] == 'yes': parts.append('manifold-mixup')
    if l['flip'] == 'yes': parts.append('flip')
    if l['keep']: parts.append(f"keep-similarities:{l['keep']:g}")
    return '+'.join(parts)

def run_missing(first, last, worker, of):
    torch.set_num_threads(1)
    done = set(read(PATH).get('run', []))
    for i in range(first, last+1):
        if i//BLOCK % of != worker or i in done: continue
        setting,seed,levels = design(i)
        row = dict(run=i, **levels, **screen(variant(levels), setting, seed))
        pd.DataFrame([row]).to_csv(PATH, mode='a', header=not PATH.exists(), index=False)
        print(row, flush=True)

def effects(d, factors):
    "Points of accuracy of each level over the first of its factor, with the standard error; each factor at the mean of the others."
    import statsmodels.formula.api as smf
    d = d.assign(points=100*d.accuracy, block=d.run//BLOCK)
    terms = [f"C({f}, Treatment({levels[0]!r}))" for f,levels in factors.items()]
    fit = smf.ols('points ~ ' + ' + '.join([*terms, 'C(block)']), d).fit(cov_type='HC1')
    rows = {(f, str(l)):(fit.params.get(f"{t}[T.{l}]", 0.), fit.bse.get(f"{t}[T.{l}]", 0.))
            for (f,levels),t in zip(factors.items(), terms) for l in levels}
    return pd.DataFrame(rows, index=['effect', 'se']).T

def report():
    d = read(PATH)
    print(f'{len(d)} runs, {d.seconds.sum()/3600:.2f} core-hours')
    for stage in STAGES:
        rows = d[[stage_of(i) is stage for i in d.run]]
        if len(rows): report_stage(stage, rows)

def report_stage(stage, rows):
    "The effects on each data set and on both, printed and written."
    parts = {n:rows[rows.setting.str.startswith(n)] for n in ('fashion', 'clipart')} | {'both':rows}
    factors = {f:l for f,l in stage.factors.items() if len(l) > 1}
    table = pd.concat({n:effects(p, factors) for n,p in parts.items()}, axis=1).round(2)
    print(table.to_string())
    table.columns = [f'{s} {c}' for s,c in table.columns]
    table.rename_axis(['factor', 'level']).assign(runs=len(rows)).to_csv(HERE/f'{stage.stem}_{VERSION}.csv')

if __name__ == '__main__':
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--runs', default='0-1039', help='first-last')
    p.add_argument('--worker', default='0/1', help='i/n: every n-th block, from the i-th on')
    p.add_argument('--report', action='store_true')
    a = p.parse_args()
    warnings.filterwarnings('ignore')
    report() if a.report else run_missing(*map(int, a.runs.split('-')), *map(int, a.worker.split('/')))
