"""Does every timm family train with recorder, fitted oracle and RAL, in a plain Learner and in `vision_learner`, with and without gradient checkpointing?

    python benchmarks/timm_sweep.py [--families a,b] [--jobs 2] [--timeout 900] [--memory 12] [--retry] [--out FILE] [--report]

The smallest model of each family that is a classifier (by `timm_zoo.py`'s file), random weights, two training batches of two digits and one validation batch, each family in a process of its own.
One row per family, route and checkpointing goes to `timm_sweep_cpu_float32_torch<version>_timm<version>.csv` as soon as it is done; rows that are there are not done again (`--retry`: but for those that failed).

In each setting the same learner, from the same seed, is fitted four times: plain, with `FMCSRecorder`, with `FMCECallback(alpha=0)`, with `FMCECallback(alpha=0.9)` and an oracle fitted to the recording (its
labels are set by hand to 0 and 1: two steps are no run that converges). A row is `ok` if all of these hold:
`recorder_same`, `alpha0_same`: losses of both steps, weights and validation are those of the plain fit, bit by bit;
`task_loss_same`: the task loss of RAL's first step is the plain one, bit by bit;
`acted`: RAL acted in both steps; `gradients`: taps (of all) whose map gets a finite gradient other than 0 from the FMCS loss; `reached`: weights of the backbone (of those that have a gradient) whose
gradient RAL changed by more than the factor 1-alpha; `validated`: each fit has the usual number of values in its table, and one validation value after it;
`checkpoints`: calls of torch's checkpoint in the plain fit, 0 without and more with; `hooks_left`: 0 hooks after each fit. `head` is `timm_head` where `vision_learner`'s own head fails on the body. `held_out`: not among the 72 families the taps were developed with."""
import argparse
import csv
import gc
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path

import timm
import torch
import torch.utils.checkpoint
from fastai.callback.core import Callback
from fastai.learner import Learner
from fastai.losses import CrossEntropyLossFlat
from fastai.torch_core import set_seed
from fastai.vision.learner import vision_learner

import fastai.callback.progress  # gives Learner its `no_bar`
from fmce_fastai.train.callback import FMCECallback
from fmce_fastai.data.digits import digits_dls
from fmce_fastai.oracle.fit import fit_oracle
from fmce_fastai.oracle.files import tensors_sha256
from fmce_fastai.train.recorder import FMCSRecorder
from fmce_fastai.util.state import hook_count
from fmce_fastai.maps.plan import find_backbone, TapError
from fmce_fastai.maps.find import tap_plan
from fmce_fastai.maps.head import timm_head

import timm_zoo

HERE = Path(__file__).parent
PATH = HERE/f"timm_sweep_cpu_float32_torch{torch.__version__.split('+')[0]}_timm{timm.__version__}.csv"
SETTINGS = [(route, ckpt) for route in ('learner', 'vision_learner') for ckpt in ('off', 'on')]
COLUMNS = '''family model route checkpointing status params_M size held_out head source layouts maps recorder_same alpha0_same task_loss_same acted gradients reached
             validated checkpoints hooks_left fmcs_loss seconds_plan seconds peak_GB error'''.split()
ALPHA = 0.9


# One setting ---------------------------------------------------------------------------------------------------------

@lru_cache
def image_size(name):
    "The model's own size if it takes no other, else the smallest of a few at which a plan can be made."
    with torch.device('meta'): model = timm.create_model(name, pretrained=False)
    cfg = model.pretrained_cfg
    if cfg.get('fixed_input_size'): return cfg['input_size'][-1]
    for size in (96, 112, 128, 160, 224, cfg['input_size'][-1]):
        try: tap_plan(model, size=size)
        except TapError: continue
        return size
    return cfg['input_size'][-1]

def loaders(size):
    dls = digits_dls(size=size, bs=2, n_train=10, device=torch.device('cpu'))
    dls.loaders[0] = dls.train.new(n=4)
    dls.loaders[1] = dls.valid.new(n=2)
    return dls

def build(name, route, size, ckpt, head):
    "A fresh learner; equal ones for equal arguments. `head`: with `timm_head`?"
    set_seed(0)
    dls = loaders(size)
    if route == 'learner': learn = Learner(dls, timm.create_model(name, pretrained=False, num_classes=10), loss_func=CrossEntropyLossFlat())
    else:
        custom = timm_head(name, 10) if head else None
        set_seed(0)
        learn = vision_learner(dls, name, pretrained=False, custom_head=custom)
    if ckpt == 'on': find_backbone(learn.model)[1].set_grad_checkpointing(True)
    return learn

def supports_checkpointing(name):
    with torch.device('meta'): model = timm.create_model(name, pretrained=False)
    try: model.set_grad_checkpointing(True)
    except (AssertionError, AttributeError, NotImplementedError): return False
    return any(getattr(m, 'grad_checkpointing', False) for m in model.modules())

def needs_timm_head(name, size):
    "Does `vision_learner`'s own head fail on this body?"
    learn = build(name, 'vision_learner', size, 'off', False)
    try:
        with torch.no_grad(): learn.model.eval()(learn.dls.valid.one_batch()[0])
    except RuntimeError: return True
    return False

@contextmanager
def counting_checkpoints():
    "A list that grows by one with each call of torch's checkpoint, timm's way to it included."
    calls,plain = [],torch.utils.checkpoint.checkpoint
    def counted(*args, **kwargs):
        calls.append(1)
        return plain(*args, **kwargs)
    torch.utils.checkpoint.checkpoint = counted
    try: yield calls
    finally: torch.utils.checkpoint.checkpoint = plain

@contextmanager
def watching_gradients(oracle):
    "Tap -> norm of the gradient that the FMCS loss sends into its map in the first step; 0 if none does."
    norms = {}
    def see(module, args):
        if norms: return  # in this step alone the callback gives views of the maps: at the maps themselves the task's gradient arrives too
        for name,m in args[0].items():
            norms[name] = 0.
            if m.requires_grad: m.register_hook(lambda g, name=name: norms.update({name:float(g.norm())}))
    handle = oracle.register_forward_pre_hook(see)
    try: yield norms
    finally: handle.remove()

class Watch(Callback):
    "The task losses of all steps, and what `read` makes of the first step's gradients."
    order,run_valid = 900,False
    def __init__(self, read): self.losses,self.read,self.first = [],read,None
    def after_loss(self): self.losses.append(self.loss.detach().clone())
    def before_step(self):
        if self.read is not None: self.first,self.read = self.read({n:p.grad for n,p in self.model.named_parameters() if p.grad is not None}),None

def fit(learn, *cbs, read=None):
    "What two training steps and a validation leave: losses, the gradients as `read`, sum over the weights, validation, hooks, calls of checkpoint. No tensor of the network's size: the largest has 412M weights."
    watch = Watch(read)
    set_seed(1)
    with learn.no_bar(), learn.no_logging():
        with counting_checkpoints() as calls: learn.fit(1, 1e-4, cbs=[watch, *cbs])
        table,hooks = learn.recorder.values[-1],hook_count(learn.model)
        after = learn.validate()
    return dict(losses=torch.stack(watch.losses), first=watch.first, weights=tensors_sha256(learn.model.state_dict()), valid=list(table[1:2]), values=(len(table), len(after)), checkpoints=len(calls), hooks=hooks)

def same(a, b): return torch.equal(a['losses'], b['losses']) and a['valid'] == b['valid'] and a['weights'] == b['weights']

def layouts(plan):
    "The layouts among a plan's taps, with prefix tokens and what else is special."
    return ' '.join(dict.fromkeys(t.layout + (f'+{t.prefix}' if t.prefix else '') + (' reordered' if t.order else '') + (' in tuple' if t.element else '') for t in plan))

def compare(plain, prefix):
    "Reads RAL's gradients: those of the backbone's that are not just the scaled plain ones, all of the backbone's, and are they finite?"
    def read(grads):
        body = [n for n in plain if n.startswith(prefix)]
        changed = [n for n in body if (grads[n] - (1-ALPHA)*plain[n]).abs().max() > 1e-3*(1-ALPHA)*plain[n].abs().max()]
        return changed, body, all(bool(g.isfinite().all()) for g in grads.values())
    return read

def run_setting(name, route, ckpt):
    "The row of one setting, without what is known of the family; raises what it meets."
    size = image_size(name)
    row = dict(size=size)
    if ckpt == 'on' and not supports_checkpointing(name): return dict(row, status='unsupported', error='timm has no gradient checkpointing for it')
    head = route == 'vision_learner' and needs_timm_head(name, size)
    row['head'] = ('timm_head' if head else 'fastai') if route == 'vision_learner' else ''
    learn = build(name, route, size, ckpt, head)
    start = time.perf_counter()
    plan = tap_plan(learn.model, x=learn.dls.valid.one_batch()[0], cache=False)
    row.update(seconds_plan=round(time.perf_counter()-start, 2), source=plan.source, layouts=layouts(plan), maps=' '.join(f"{t.name}:{t.channels}x{'x'.join(map(str, t.grid))}" for t in plan))
    prefix,fits = find_backbone(learn.model)[0],[]
    def run(*cbs, **kwargs):
        gc.collect()  # the network of the fit before
        fits.append(fit(build(name, route, size, ckpt, head), *cbs, **kwargs))
        return fits[-1]
    del learn
    plain = run(read=lambda grads: {n:g.clone() for n,g in grads.items()})
    recorder = FMCSRecorder(n_images=4, n_snapshots=2)
    row['recorder_same'] = same(run(recorder), plain)
    dataset = recorder.dataset
    dataset.snapshots['fmcs'] = [0., 1.]
    oracle = fit_oracle(dataset, n_epochs=1, width=8, bar=False)
    row['alpha0_same'] = same(run(FMCECallback(alpha=0, oracle=oracle)), plain)
    callback = FMCECallback(alpha=ALPHA, oracle=oracle)
    with watching_gradients(oracle) as norms: ral = run(callback, read=compare(plain['first'], prefix))
    history,(changed,body,finite) = callback.history,ral['first']
    silent = [n for n in plan.names if not 0 < norms.get(n, 0.) < float('inf')]
    row.update(task_loss_same=torch.equal(ral['losses'][0], plain['losses'][0]), acted=int(history.acted.min()), gradients=f'{len(plan)-len(silent)}/{len(plan)}', reached=f'{len(changed)}/{len(body)}',
               fmcs_loss=round(float(history.fmcs_loss.mean()), 4), checkpoints=plain['checkpoints'], hooks_left=sum(f['hooks'] for f in fits),
               # training and validation loss; with the callback its three columns too, gone after the fit
               validated=[f['values'] for f in fits] == [(2, 1), (2, 1), (5, 1), (5, 1)])
    faults = [text for text,bad in [('the recorder changes the fit', not row['recorder_same']), ('alpha 0 changes the fit', not row['alpha0_same']), ('the task loss differs', not row['task_loss_same']),
                                    ('RAL did not act in both steps', row['acted'] != 2), (f"no FMCS gradient at {', '.join(silent)}", silent), ('no gradient in the backbone', not changed),
                                    ('gradients not finite', not finite), ('another number of validation values', not row['validated']),
                                    ('checkpointing is not what was asked for', (row['checkpoints'] > 0) != (ckpt == 'on')), ('hooks left', row['hooks_left'])] if bad]
    return dict(row, status='failed' if faults else 'ok', error='; '.join(faults))

def attempt(name, route, ckpt):
    start = time.perf_counter()
    try: row = run_setting(name, route, ckpt)
    except Exception as e: row = dict(status='failed', error=f"{type(e).__name__}: {' '.join(str(e).split())[:300]} ({traceback.extract_tb(e.__traceback__)[-1].name})")
    return dict(row, route=route, checkpointing=ckpt, seconds=round(time.perf_counter()-start, 1))


# All families --------------------------------------------------------------------------------------------------------

def known_families(): return set((HERE/'timm_families_developed_with.txt').read_text().split())

def is_classifier(name):
    "Has it a classifier, and does it run? Tried without weights."
    try:
        with torch.device('meta'): model = timm.create_model(name, pretrained=False, num_classes=10).eval()
        size = model.pretrained_cfg['input_size'][-1]
        with torch.no_grad(): out = model(torch.randn(2, 3, size, size, device='meta'))
        return tuple(out.shape) == (2, 10)
    except NotImplementedError: return True  # an operation without a meta kernel says nothing about the model
    except RuntimeError as e: return 'meta' in str(e)
    except Exception: return False

def choose(families=None):
    "Family -> its smallest classifier, for all families of timm or those named."
    smallest = timm_zoo.smallest()
    if unread := set(timm.list_models())-set(timm_zoo.read()): raise SystemExit(f"{len(unread)} of timm's names are not in {timm_zoo.PATH.name}: run timm_zoo.py first.")
    if unknown := set(families or ())-set(smallest): raise SystemExit(f"timm {timm.__version__} has no family {', '.join(sorted(unknown))}; it has {', '.join(sorted(smallest))}.")
    return {f:next((n for n in names if is_classifier(n)), None) for f,names in smallest.items() if not families or f in families}

def read(path):
    "The rows written so far."
    if not path.exists(): return []
    with path.open(newline='') as f:
        rows = csv.DictReader(f)
        if rows.fieldnames != COLUMNS: raise SystemExit(f"{path} has other columns than this version writes, so its rows say less or something else: move it away, or give another file with --out.")
        return list(rows)

def write(rows, path):
    part = path.with_suffix('.part')
    with part.open('w', newline='') as f:
        out = csv.DictWriter(f, COLUMNS, restval='', extrasaction='ignore')
        out.writeheader()
        out.writerows(sorted(rows, key=lambda r: (r['family'], SETTINGS.index((r['route'], r['checkpointing'])))))
    os.replace(part, path)

class Child:
    "One family's settings in a process of its own, watched for time and memory."
    def __init__(self, family, model, settings, timeout, memory):
        self.family,self.model,self.left,self.memory,self.peak = family,model,list(settings),memory,0.
        self.deadline = time.time()+timeout
        self.errors = tempfile.TemporaryFile('w+')
        self.process = subprocess.Popen([sys.executable, __file__, '--one', model, '--settings', ','.join('/'.join(s) for s in settings)], stdout=subprocess.PIPE, stderr=self.errors, text=True,
                                        env={**os.environ, 'OMP_NUM_THREADS':'1', 'MKL_NUM_THREADS':'1'})
        os.set_blocking(self.process.stdout.fileno(), False)
        self.text = ''

    def last_words(self):
        "The last line that the process wrote to its standard error."
        self.errors.seek(0)
        lines = self.errors.read().split('\n')
        return next((f': {l.strip()[:200]}' for l in reversed(lines) if l.strip()), '')

    def rows(self):
        "Finished rows since the last call; a process that ended or had to be stopped gives the reason for those that are missing."
        why = None
        code = self.process.poll()
        try: self.peak = max(self.peak, int(Path(f'/proc/{self.process.pid}/statm').read_text().split()[1])*os.sysconf('SC_PAGE_SIZE')/1e9)
        except (FileNotFoundError, ProcessLookupError, IndexError): pass
        if code is not None: why = f'the process ended with code {code}{self.last_words()}'
        elif time.time() > self.deadline: why = 'took too long'
        elif self.peak > self.memory: why = f'needed more than {self.memory} GB'
        if why and code is None: self.process.kill(); self.process.wait()
        try: self.text += self.process.stdout.read() or ''
        except (TypeError, ValueError): pass
        lines = self.text.split('\n')
        self.text = lines.pop()
        found = [json.loads(l) for l in lines if l.startswith('{')]
        for r in found: self.left.remove((r['route'], r['checkpointing']))
        if why:
            found += [dict(route=r, checkpointing=c, status='failed', error=why) for r,c in self.left]
            self.left = []
            self.process.stdout.close()
            self.errors.close()
        return [dict(r, family=self.family, model=self.model, peak_GB=round(self.peak, 2)) for r in found]

def main(a):
    rows = {(r['family'], r['route'], r['checkpointing']):r for r in read(a.out)}
    chosen = choose(a.families and a.families.split(','))
    known,zoo = known_families(),timm_zoo.read()
    todo = []
    for family,model in chosen.items():
        keep = lambda s: (r := rows.get((family, *s))) and r['model'] == model and not (a.retry and r['status'] == 'failed')
        settings = [s for s in SETTINGS if not keep(s)]
        if model is None: print(f'{family}: no classifier in this family', flush=True)
        elif settings: todo.append((family, model, settings))
    print(f"{len(chosen)} families; to do: {len(todo)}", flush=True)
    running,start,total = [],time.time(),len(todo)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit('stopped'))  # through `finally`, like Ctrl-C
    try:
        while todo or running:
            while todo and len(running) < a.jobs: running.append(Child(*todo.pop(0), a.timeout, a.memory))
            time.sleep(0.5)
            for child in list(running):
                new = child.rows()
                for r in new:
                    r.update(params_M=zoo[r['model']]['params_M'], held_out=int(child.family not in known))
                    rows[r['family'], r['route'], r['checkpointing']] = r
                    print(f"{r['family']} {r['model']} {r['route']} checkpointing {r['checkpointing']}: {r['status']} {r.get('error') or ''} {r.get('seconds', '')} s", flush=True)
                if new: write(rows.values(), a.out)
                if not child.left:
                    if child.process.poll() is None: child.process.wait()
                    if not child.process.stdout.closed: child.process.stdout.close()
                    running.remove(child)
                    done = total-len(todo)-len(running)
                    print(f"  {done} of {total} families, {(time.time()-start)/60:.1f} min, about {(time.time()-start)/60/done*(total-done):.0f} min left", flush=True)
    finally:
        for child in running: child.process.kill()
    report(read(a.out))

def report(rows):
    for title,part in (('all families', rows), ('families not developed with', [r for r in rows if r['held_out'] == '1'])):
        print(f"{title}: {len({r['family'] for r in part})}")
        for route,ckpt in SETTINGS:
            of = [r for r in part if (r['route'], r['checkpointing']) == (route, ckpt)]
            count = lambda s: sum(r['status'] == s for r in of)
            print(f"  {route}, checkpointing {ckpt}: {count('ok')} ok, {count('failed')} failed, {count('unsupported')} unsupported by timm" + (f", {sum(r['head'] == 'timm_head' for r in of)} through timm_head" if route == 'vision_learner' else ''))
    plan = sorted(float(r['seconds_plan']) for r in rows if r['seconds_plan'])
    if plan: print(f"seconds for a plan: median {plan[len(plan)//2]:.2f}, worst {plan[-1]:.2f}; peak memory {max(float(r['peak_GB'] or 0) for r in rows):.1f} GB; {sum(float(r['seconds'] or 0) for r in rows)/60:.0f} min in all")
    seconds = {f:sum(float(r['seconds'] or 0) for r in rows if r['family'] == f) for f in dict.fromkeys(r['family'] for r in rows)}
    print("slowest:", ', '.join(f'{f} {seconds[f]:.0f} s' for f in sorted(seconds, key=seconds.get, reverse=True)[:8]))
    # A family counts as done with all four rows
    if missing := sorted(f for f in set(map(timm_zoo.family_of, timm.list_models())) if sum(r['family'] == f for r in rows) < len(SETTINGS)):
        print(f"{len(missing)} families are not done: {' '.join(missing)}")
    for r in rows:
        if r['status'] == 'failed': print(f"  FAILED {r['family']} {r['model']} {r['route']} checkpointing {r['checkpointing']}: {r['error']}")

if __name__ == '__main__':
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--families', help="only these, separated by commas")
    p.add_argument('--jobs', type=int, default=2, help="processes side by side, one thread each")
    p.add_argument('--timeout', type=float, default=900, help="seconds for one family")
    p.add_argument('--memory', type=float, default=12, help="GB for one process")
    p.add_argument('--retry', action='store_true', help="do failed rows again")
    p.add_argument('--out', type=Path, default=PATH, help="file to write")
    p.add_argument('--report', action='store_true', help="print what the file holds, and stop")
    p.add_argument('--one', help=argparse.SUPPRESS)
    p.add_argument('--settings', help=argparse.SUPPRESS)
    a = p.parse_args()
    if a.one:
        warnings.filterwarnings('ignore')
        torch.set_num_threads(1)
        for s in a.settings.split(','): print(json.dumps(attempt(a.one, *s.split('/'))), flush=True)
    elif a.report: report(read(a.out))
    else: main(a)
