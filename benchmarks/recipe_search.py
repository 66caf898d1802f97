"""Which recipe makes plain fine-tuning on clip art and glyphs strongest? A search on validation images; no test split is read.

    python benchmarks/recipe_search.py --settings clipart-10 --seeds 100-102 --variants 'plain;plain,size=96'
    python benchmarks/recipe_search.py --report

A variant is an arm of `fmce_study` and fields of `Study`: `alignment@0.97,size=96,body_lr=1`. EfficientNet-Lite0 with
ImageNet weights, 64 px, batches of 25, a linear head at 3e-3 and the body at 9e-4, the body's batch norm in eval mode,
5, 10 or 20 images a class, 50, 35 or 20 epochs, unless the variant says otherwise. `clipart-10` has the validation images
of `loss_search`; `glyphs-5` reads the fonts in the folder `fonts` (`glyph_fonts.txt` tells how to make it).
A baseline should be as good as its users can make it before anything is added to it. Rows are written as they come."""
import argparse
import time
import warnings
from dataclasses import replace
from pathlib import Path

import torch

from fmce_fastai.study.arms import ARMS, own_alpha, part_alphas
from fmce_fastai.study.learner import build_learner, eval_dl, fit_arm, study_dls
from fmce_fastai.study.settings import Study
from loss_search import clipart_dls, COMMON, read, run_missing, setting

PATH = Path(__file__).resolve().parent/f"recipe_search_cpu_float32_torch{torch.__version__.split('+')[0]}.csv"

def split(variant):
    "Arm and changed fields of a variant."
    arm,_,fields = variant.partition(',')
    fields = eval(f'dict({fields})')
    if 'lr' in fields: fields['lrs'] = (fields.pop('lr'),)
    return arm,fields

def study_of(name, fields):
    "The study of a setting with the fields of a variant."
    data,_,a_class = name.partition('-')
    if data != 'glyphs': return replace(setting(name), **fields)
    own = dict(data='glyphs', root='fonts', n_train=62*int(a_class), n_eval=3000, size=48, epochs=15)
    return Study(**COMMON | own | fields)

def fit_once(variant, name, seed):
    "Train one variant; a row of the table."
    arm,fields = split(variant)
    study = study_of(name, fields)
    start = time.process_time()
    dls = study_dls(study, seed) if study.data == 'glyphs' else clipart_dls(study, seed)
    valid = eval_dl(dls, 'validation', study.n_eval)
    learn = build_learner(study, dls, seed)
    own = [ARMS[n](study, alpha, seed, None) for n,alpha in part_alphas(arm, own_alpha(arm) or 0.)]
    fit_arm(learn, study, study.epochs, study.lrs[0], seed, [cb for o in own for cb in o.get('cbs', [])])
    with learn.no_bar(): p,y = learn.get_preds(dl=valid)
    return dict(setting=name, variant=variant, seed=seed, accuracy=round(float((p.argmax(1) == y).float().mean()), 5),
                images=len(y), cpu_seconds=round(time.process_time() - start, 1), torch=torch.__version__)

def report():
    d = read(PATH)
    d['accuracy'] *= 100
    groups = d.groupby(['setting', 'variant'])
    table = groups.accuracy.agg(['mean', 'sem', 'count']).join(groups.cpu_seconds.mean()).round(2)
    print(f'{d.cpu_seconds.sum()/3600:.2f} core-hours')
    print(table.sort_values(['setting', 'mean'], ascending=False).to_string())

if __name__ == '__main__':
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--settings', default='clipart-10')
    p.add_argument('--variants', help='separated by semicolons', default='plain')
    p.add_argument('--seeds', default='100-102', help='first-last')
    p.add_argument('--worker', default='0/1', help='i/n: every n-th run, from the i-th on')
    p.add_argument('--report', action='store_true')
    a = p.parse_args()
    warnings.filterwarnings('ignore')
    report() if a.report else run_missing(PATH, fit_once, a, ';')
