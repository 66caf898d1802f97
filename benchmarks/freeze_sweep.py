"""Can every timm family be frozen up to its taps, and train on from kept maps?

    python benchmarks/freeze_sweep.py [--families a,b] [--report]

The smallest classifier of each family (as in `timm_sweep.py`), random weights, batches of two digits. In a middle tap and in the last one that `FMCSFreeze` may freeze:
`exact`: with the prefix's parameters frozen, exactly the others get a gradient, and a step has exactly the FLOPs announced;
`fixed`: in a fit that freezes after its first step, no parameter and no buffer of the front changes after that; `trained`: others do;
`short`: steps, of the last epoch's two, that started from kept maps; `same`: the weights are then those of a fit without kept maps, bit for bit; `refused`: why no maps were kept;
`left`: what the fits have left: hooks, frozen parameters, modules in another mode. `nested`: each tap's prefix holds that of the tap before. One row per family, written as it is done; what is there is not run again."""
import argparse
import json
import subprocess
import sys
import time
import traceback
import warnings
from pathlib import Path

import pandas as pd
import timm
import torch
from fastai.callback.core import Callback
from fastai.torch_core import set_seed
from torch.utils.flop_counter import FlopCounterMode

from fmce_fastai.maps.find import tap_plan
from fmce_fastai.maps.inputs import first_rows
from fmce_fastai.maps.prefix import find_prefixes
from fmce_fastai.train.freeze import FMCSFreeze
from fmce_fastai.util.state import hook_count, keep_buffers, keep_modes
from timm_sweep import build, choose, image_size, known_families

HERE = Path(__file__).parent
PATH = HERE/f"freeze_sweep_cpu_float32_torch{torch.__version__.split('+')[0]}_timm{timm.__version__}.csv"

def is_exact(net, prefix, x):
    "Exactly the parameters outside the prefix get a gradient, with the FLOPs announced."
    params = dict(net.named_parameters())
    with keep_modes(net), keep_buffers(net):
        net.train().eval()
        out = net(x)
        whole = {n for n,g in zip(params, torch.autograd.grad(out.float().sum(), list(params.values()), allow_unused=True)) if g is not None}
        for n in prefix.params: params[n].requires_grad_(False)
        rest = [n for n in params if n not in prefix.params]
        net.train().eval()  # drops tensors that were kept with their graph
        with FlopCounterMode(display=False) as counter:
            grads = torch.autograd.grad(net(x).float().sum(), [params[n] for n in rest], allow_unused=True)
        for n in prefix.params: params[n].requires_grad_(True)
    got = {n for n,g in zip(rest, grads) if g is not None}
    return got == whole - set(prefix.params) and counter.get_total_flops() == prefix.step_flops*len(x)

class Watch(Callback):
    "The front's weights and buffers after the step in which it was frozen."
    order,run_valid = 1000,False
    def __init__(self, names): self.names,self.first = names,None
    def state(self): return {n:v.clone() for n,v in self.model.state_dict().items() if n in self.names}
    def after_batch(self):
        if self.learn.train_iter == 1: self.first = self.state()
    def after_train(self): self.last = self.state()

def fit(name, size, prefix, keep):
    "A fit of three epochs of two steps, frozen after the first step; what is left of it."
    learn = build(name, 'learner', size, 'off', False)
    buffers = [n for n,_ in learn.model.named_buffers() if n.rpartition('.')[0] in prefix.modules]
    freeze,watch = FMCSFreeze(by={prefix.tap:0.}, start=0., keep_maps=4e9*keep),Watch({*prefix.params, *buffers})
    before = {n:p.detach().clone() for n,p in learn.model.named_parameters()}
    set_seed(1)
    with warnings.catch_warnings(record=True) as told, learn.no_bar(), learn.no_logging():
        warnings.simplefilter('always')
        learn.fit(3, 1e-4, cbs=[freeze, watch])
    refused = next((str(w.message).partition('every step: ')[2] for w in told if 'keeps no maps' in str(w.message)), '')
    left = [f'{hook_count(learn.model)} hooks'] if hook_count(learn.model) else []
    if frozen := sum(not p.requires_grad for p in learn.model.parameters()): left.append(f'{frozen} frozen parameters')
    if len({m.training for m in learn.model.modules()}) > 1: left.append('modes differ')
    fixed = all(torch.equal(v, watch.last[n]) for n,v in watch.first.items())
    trained = any(not torch.equal(p, before[n]) for n,p in learn.model.named_parameters() if n not in prefix.params)
    return dict(fixed=fixed, trained=trained, short=freeze._n_short, refused=refused, left=', '.join(left), weights=learn.model.state_dict())

def family_row(name):
    "The row of a model, without the family."
    size = image_size(name)
    learn = build(name, 'learner', size, 'off', False)
    x = first_rows((learn.dls.valid.one_batch()[0],))
    plan = tap_plan(learn.model, x=x)
    if min(t.depth for t in plan) > .95: plan = tap_plan(learn.model, 'all', x=x)  # as FMCSFreeze does
    start = time.perf_counter()
    prefixes = find_prefixes(learn.model, plan, x)
    row = dict(size=size, taps=len(plan), seconds_prefixes=round(time.perf_counter()-start, 2),
               nested=all(set(a.params) <= set(b.params) for a,b in zip(prefixes, prefixes[1:])))
    usable = [p for p,t in zip(prefixes, plan) if p.params and t.depth <= .95]
    row['freezable'] = len(usable)
    if not usable: return dict(row, status='failed', error='no tap that may be frozen')
    chosen = list({p.tap:p for p in (usable[(len(usable)-1)//2], usable[-1])}.values())
    row['tried'] = ' '.join(p.tap for p in chosen)
    row['saved'] = ' '.join(f'{p.saved:.2f}' for p in chosen)
    row['exact'] = all(is_exact(learn.model, p, x[0]) for p in chosen)
    del learn
    fits = []
    for p in chosen:
        kept,plain = fit(name, size, p, True),fit(name, size, p, False)
        kept['same'] = all(torch.equal(v, plain['weights'][n]) for n,v in kept['weights'].items())
        kept['left'] = ', '.join(dict.fromkeys(l for l in (kept['left'], plain['left']) if l))
        kept['fixed'] &= plain['fixed']
        fits.append({k:v for k,v in kept.items() if k != 'weights'})
    row |= {k:all(f[k] for f in fits) for k in ('fixed', 'trained', 'same')}
    row |= dict(short=' '.join(str(f['short']) for f in fits), left='; '.join(f['left'] for f in fits if f['left']), refused='; '.join(dict.fromkeys(f['refused'] for f in fits if f['refused'])))
    faults = [k for k in ('nested', 'exact', 'fixed', 'trained', 'same') if not row[k]] + ['left']*bool(row['left'])
    return dict(row, status='failed' if faults else 'ok', error=' '.join(faults))

def attempt(name):
    start = time.perf_counter()
    try: row = family_row(name)
    except Exception as e: row = dict(status='failed', error=f"{type(e).__name__}: {' '.join(str(e).split())[:300]} ({traceback.extract_tb(e.__traceback__)[-1].name})")
    return dict(row, seconds=round(time.perf_counter()-start, 1))

COLUMNS = ['family', 'model', 'held_out', 'status', 'size', 'taps', 'freezable', 'tried', 'saved', 'nested', 'exact', 'fixed', 'trained', 'short', 'same', 'left', 'refused', 'seconds_prefixes', 'seconds', 'error']

def main(families):
    rows = pd.read_csv(PATH).to_dict('records') if PATH.exists() else []
    done,known = {r['family'] for r in rows},known_families()
    for family,model in choose(families).items():
        if model is None or family in done: continue
        try:
            out = subprocess.run([sys.executable, __file__, '--one', model], capture_output=True, text=True, timeout=900)
            row = next((json.loads(l) for l in reversed(out.stdout.splitlines()) if l.startswith('{')), dict(status='failed', error=f'the process ended with code {out.returncode}'))
        except subprocess.TimeoutExpired: row = dict(status='failed', error='took too long')
        rows.append(dict(row, family=family, model=model, held_out=int(family not in known)))
        pd.DataFrame(rows, columns=COLUMNS).sort_values('family').to_csv(PATH, index=False)
        print(family, model, row['status'], row.get('short', ''), row.get('refused', ''), row.get('error', ''), flush=True)

def report():
    d = pd.read_csv(PATH)
    print(f"{len(d)} families, {int((d.status == 'ok').sum())} ok; {int((d.refused.isna() & (d.status == 'ok')).sum())} train on from kept maps; {int(d.held_out.sum())} held out")
    print(d[d.status != 'ok'][['family', 'model', 'error']].to_string(index=False))
    print(d[d.refused.notna()][['family', 'refused']].to_string(index=False))

if __name__ == '__main__':
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--families')
    p.add_argument('--one', help=argparse.SUPPRESS)
    p.add_argument('--report', action='store_true')
    a = p.parse_args()
    if a.one: warnings.filterwarnings('ignore'); torch.set_num_threads(1); print(json.dumps(attempt(a.one), default=str))
    elif a.report: report()
    else: main(a.families and a.families.split(','))
