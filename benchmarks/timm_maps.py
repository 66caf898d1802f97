"""Does every tap return timm's own map? The smallest model of each timm family, all taps of it, values and gradients.

    python benchmarks/timm_maps.py [--families swin_transformer,vit] [--report]

Writes one row per family to `timm_maps_cpu_float32_torch<version>_timm<version>.csv`. Columns:
`maps` and `taps`: maps that `forward_intermediates` gives, and taps that hand one out; `seconds`: finding the plan, one thread, nothing cached;
`error`: largest difference between a tap's map and timm's, over the largest value in the map; `gradient_error`: the same for the gradients of all weights, of a loss on all maps;
`other_size`, `other_error`: the same plan on images of another shape, not square where the model allows it;
`checkpointing`: are maps and gradients the same with gradient checkpointing on; `redrawn`: is the plan the same after all norms, scales and gates were randomised.
"""
import argparse
import copy
import csv
import statistics
import time
import warnings
from pathlib import Path

import timm
import torch

from fmce_fastai.util.state import hook_count, quiet_eval
from fmce_fastai.maps.tap import FeatureTap
from fmce_fastai.maps.find import tap_plan

import timm_zoo

HERE = Path(__file__).parent
PATH = HERE/f"timm_maps_cpu_float32_torch{torch.__version__.split('+')[0]}_timm{timm.__version__}.csv"
COLUMNS = 'family model params_M size source maps taps layouts seconds error gradient_error other_size other_error checkpointing redrawn hooks_left failure'.split()


def images(size, n=2): return torch.randn(n, 3, *size, generator=torch.Generator().manual_seed(1))

def read_tap(model, plan, x):
    "What the taps of `plan` return in a forward of `model`."
    model.train(model.training)  # LeViT and kin keep attention biases, graph included, from one eval() to the next
    tap = FeatureTap(plan).arm(model)
    model(x)
    return list(tap.take().values())

def read_timm(model, x):
    "timm's own maps."
    model.train(model.training)
    return model.forward_intermediates(x, output_fmt='NCHW', intermediates_only=True)

def loss_of(maps): return sum((m.float()*torch.randn(m.shape, generator=torch.Generator().manual_seed(i))).sum()/m.numel() for i,m in enumerate(maps))

def gradients(model, maps): return [torch.zeros_like(p) if g is None else g for p,g in zip(model.parameters(), torch.autograd.grad(loss_of(maps), list(model.parameters()), allow_unused=True))]

def off(a, b):
    "Largest difference of two lists of tensors, over the largest value of each."
    if [t.shape for t in a] != [t.shape for t in b]: return float('inf')
    return max((float(((s-t).abs().max()/t.abs().max().clamp(min=1e-12)).detach()) for s,t in zip(a, b)), default=0.)

def total_off(a, b):
    "Largest difference between two gradients of the whole network, over the largest value."
    return float(max((s-t).abs().max() for s,t in zip(a, b))/max(t.abs().max() for t in b))

def match(got, maps):
    "timm's maps in the order of the taps' maps `got`: where several have one shape, the nearest one by value."
    return [min((m for m in maps if m.shape == g.shape), key=lambda m: float((m-g).detach().abs().max())) for g in got]

def redraw(model):
    "Randomise every norm, layer scale and residual gate: at initialisation many of them make a block an identity."
    gen = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim <= 1 or p.numel() == max(p.shape): p.copy_(torch.rand(p.shape, generator=gen)+.5)
    return model

def other_images(name, model, size):
    "A copy of `model`, or the same network built for it, and images of a shape it was not probed with."
    h,w = size
    for s in ((h, w+w//2), (h+h//2, w), (2*h, w), (h, w//2)):
        for build in (lambda: model, lambda: timm.create_model(name, num_classes=10, img_size=s).eval()):
            try:
                m = build()
                with torch.no_grad(): m(images(s))
                return m, s
            except Exception: continue  # refused: the next shape
    return None, None

def check(name, family='', **kwargs):
    "The row of one model, built with `kwargs`."
    torch.manual_seed(0)
    model = timm.create_model(name, pretrained=False, num_classes=10, **kwargs).eval()
    row = dict(family=family, model=name, params_M=round(sum(p.numel() for p in model.parameters())/1e6, 2))
    start = time.perf_counter()
    default = tap_plan(model, cache=False)
    row.update(seconds=round(time.perf_counter()-start, 2), source=default.source, size='x'.join(map(str, default.probe[2:])),
               layouts=' '.join(dict.fromkeys(t.layout + (f'+{t.prefix}' if t.prefix else '') + (' reordered' if t.order else '') + (' in tuple' if t.element else '') for t in default)))
    size = default.probe[2:]
    plan = tap_plan(model, 'all', size=size, cache=False)
    x = images(size, 1 if row['params_M'] > 300 else 2)  # one graph at a time, and a small one for the largest: this machine's memory
    got = read_tap(model, plan, x)
    got_gradients,got = gradients(model, got),[g.detach() for g in got]
    maps = read_timm(model, x)
    want = match(got, maps)
    row.update(maps=len(maps), taps=len(plan), error=off(got, want), gradient_error=total_off(got_gradients, gradients(model, want)))
    del maps, want, got, got_gradients
    other,shape = other_images(name, model, size)
    if other is None: row['other_size'] = 'refused'
    else:
        x2 = images(shape, len(x))
        p2 = plan if not any(t.order for t in plan) else tap_plan(other, 'all', size=shape)
        with torch.no_grad(): got = read_tap(other, p2, x2)
        with torch.no_grad(): row.update(other_size='x'.join(map(str, shape)), other_error=off(got, match(got, read_timm(other, x2))))
    model.eval()  # drops cached attention biases, which cannot be copied
    row['redrawn'] = same_plan(plan, tap_plan(redraw(copy.deepcopy(model)), 'all', size=size, cache=False))
    row['checkpointing'] = checkpointed(model, plan, x)
    row['hooks_left'] = hook_count(model)
    return row

def same_plan(a, b): return [t.__dict__ for t in a] == [t.__dict__ for t in b]

def checkpointed(model, plan, x):
    "Are the maps of a training forward, and the gradients through them, the same with gradient checkpointing on?"
    found = []
    for on in (False, True):
        m = copy.deepcopy(model).train()
        if on:
            try: m.set_grad_checkpointing(True)
            except Exception: return 'unsupported'
            if not any(getattr(k, 'grad_checkpointing', False) for k in m.modules()): return 'unsupported'
        torch.manual_seed(3)
        maps = read_tap(m, plan, x)
        if len(maps) < len(plan): return f'{len(plan)-len(maps)} of {len(plan)} maps missing'
        found.append(([t.detach() for t in maps], gradients(m, maps)))
        del m, maps
    return 'same' if off(found[1][0], found[0][0]) < 1e-4 and total_off(found[1][1], found[0][1]) < 1e-3 else f'differs by {off(found[1][0], found[0][0]):.1e}, gradients {total_off(found[1][1], found[0][1]):.1e}'

def read(): return list(csv.DictReader(PATH.open(newline=''))) if PATH.exists() else []

def report(rows):
    fine = [r for r in rows if not r['failure']]
    whole = [r for r in fine if r['maps'] == r['taps']]
    print(f"{len(fine)} of {len(rows)} families checked; every map of forward_intermediates has a tap in {len(whole)}")
    for key in ('error', 'gradient_error', 'other_error'):
        v = [float(r[key]) for r in fine if r[key] != '']
        print(f"  {key}: {len(v)} families, median {statistics.median(v):.1e}, largest {max(v):.1e}")
    seconds = [float(r['seconds']) for r in fine]
    print(f"  seconds for a plan: median {statistics.median(seconds):.2f}, worst {max(seconds):.2f}")
    print('  not square:', {k:sum((r['other_size'] == 'refused') == (k == 'refused') for r in fine) for k in ('accepted', 'refused')})
    for key in ('checkpointing', 'redrawn', 'source'): print(f"  {key}:", {v:sum(r[key] == v for r in fine) for v in dict.fromkeys(r[key] for r in fine)})
    for r in rows:
        if r['failure'] or r['maps'] != r['taps'] or r['checkpointing'] not in ('same', 'unsupported') or r['redrawn'] != 'True': print('   ', r['family'], r['model'], r['failure'] or f"{r['taps']} of {r['maps']} maps, checkpointing {r['checkpointing']}, redrawn {r['redrawn']}")

def main(families=None):
    warnings.filterwarnings('ignore')
    torch.set_num_threads(1)
    rows = {r['family']:r for r in read()}
    for family,names in timm_zoo.smallest().items():
        if (families and family not in families) or (not families and family in rows): continue
        for name in names[:3]:  # an encoder without a classifier takes no part: the next
            try: row = check(name, family)
            except Exception as e: row = dict(family=family, model=name, failure=f"{type(e).__name__}: {' '.join(str(e).split())}"[:300])
            if 'failure' not in row: break
        rows[family] = row
        print({k:row.get(k) for k in ('family', 'model', 'seconds', 'maps', 'taps', 'error', 'gradient_error', 'other_size', 'other_error', 'checkpointing', 'redrawn', 'failure')}, flush=True)
        with PATH.open('w', newline='') as f:
            out = csv.DictWriter(f, COLUMNS, restval='')
            out.writeheader()
            out.writerows(rows[k] for k in sorted(rows))
    report(read())

if __name__ == '__main__':
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--families', help="only these, separated by commas")
    p.add_argument('--report', action='store_true', help="print what the file holds, and stop")
    a = p.parse_args()
    if a.report: report(read())
    else: main(a.families.split(',') if a.families else None)
