"""A tap plan for every name in timm, on the meta device: no weights, no values, only what the autograd graph and the shapes tell.

    python benchmarks/timm_zoo.py [--report] [--only resnet18,vit_*]

Writes one row per name to `timm_zoo_meta_timm<version>.csv` as it goes, and goes on where it was stopped. The same file says how large each model is and which family (defining module)
it belongs to; `timm_sweep.py` and `timm_maps.py` pick the smallest model of each family from it."""
import argparse
import csv
import fnmatch
import time
import warnings
from pathlib import Path

import timm
import torch
from timm.models._registry import _model_to_module

from fmce_fastai.maps.plan import TapError
from fmce_fastai.maps.find import tap_plan

HERE = Path(__file__).parent
PATH = HERE/f'timm_zoo_meta_timm{timm.__version__}.csv'
COLUMNS = 'name family params_M input_size fixed_size probe source taps layouts seconds_build seconds_plan error'.split()


def family_of(name): return _model_to_module[name].rpartition('.')[2]

def plan_row(name):
    "What the meta device says about one model."
    row = dict(name=name, family=family_of(name))
    start = time.perf_counter()
    try:
        with torch.device('meta'): model = timm.create_model(name, pretrained=False)
    except Exception as e: return {**row, 'error':f'create_model: {_text(e)}'}
    cfg = model.pretrained_cfg
    row.update(params_M=round(sum(p.numel() for p in model.parameters())/1e6, 3), input_size='x'.join(map(str, cfg['input_size'][1:])), fixed_size=int(bool(cfg.get('fixed_input_size'))))
    built = time.perf_counter()
    try:
        plan = tap_plan(model)
        row.update(probe='x'.join(map(str, plan.probe)), source=plan.source, taps=' '.join(plan.names),
                   layouts=' '.join(dict.fromkeys(t.layout + (f'+{t.prefix}' if t.prefix else '') + (' in tuple' if t.element else '') for t in plan)), error=plan.note)
    except Exception as e: row['error'] = _text(e)
    return {**row, 'seconds_build':round(built-start, 2), 'seconds_plan':round(time.perf_counter()-built, 2)}

def _text(e): return f"{'' if isinstance(e, TapError) else type(e).__name__ + ': '}{' '.join(str(e).split())}"[:400]

def read(path=PATH):
    "The rows written so far, by name."
    if not path.exists(): return {}
    with path.open(newline='') as f: return {r['name']:r for r in csv.DictReader(f)}

def smallest(path=PATH, want=lambda name: True):
    "Family -> its names, the smallest first, from the CSV."
    families = {}
    for r in sorted((r for r in read(path).values() if r['params_M'] and want(r['name'])), key=lambda r: float(r['params_M'])): families.setdefault(r['family'], []).append(r['name'])
    return families

def report(rows):
    got = [r for r in rows if r['source']]
    by = {s:sum(r['source'] == s for r in rows) for s in dict.fromkeys(r['source'] for r in got)}
    print(f"{len(got)} of {len(rows)} names have a plan ({', '.join(f'{n} by {s}' for s,n in by.items())}), in {len({r['family'] for r in got})} of {len({r['family'] for r in rows})} families")
    seconds = sorted(float(r['seconds_plan']) for r in got)
    if seconds: print(f"seconds for a plan: median {seconds[len(seconds)//2]}, worst {seconds[-1]}; building and planning all: {sum(float(r['seconds_plan'] or 0)+float(r['seconds_build'] or 0) for r in rows)/60:.0f} min")
    for r in rows:
        if not r['source']: print(f"  {r['name']}: {r['error'][:160]}")

def main(only=None):
    warnings.filterwarnings('ignore')
    torch.set_num_threads(1)
    names = [n for n in timm.list_models() if only is None or any(fnmatch.fnmatch(n, o) for o in only)]
    done,start,new = read(),time.perf_counter(),not PATH.exists()
    todo = [n for n in names if n not in done]
    with PATH.open('a', newline='') as f:
        out = csv.DictWriter(f, COLUMNS, restval='')
        if new: out.writeheader()
        for i,n in enumerate(todo):
            out.writerow(plan_row(n))
            f.flush()
            if i % 50 == 49: print(f'{i+1} of {len(todo)}, {(time.perf_counter()-start)/60:.1f} min', flush=True)
    report([r for n,r in read().items() if n in names])

if __name__ == '__main__':
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--only', help="names or wildcards, separated by commas")
    p.add_argument('--report', action='store_true', help="print what the file holds, and stop")
    a = p.parse_args()
    if a.report: report(list(read().values()))
    else: main(a.only.split(',') if a.only else None)
