"""Which recipe makes plain fine-tuning on clip art and glyphs strongest? A search on validation images; no test split is read.

    python benchmarks/recipe_search.py --settings clipart-10 --seeds 100-102 --variants 'plain;plain,size=96'
    python benchmarks/recipe_search.py --report

A variant is an arm of `fmce_study` and fields of `Study`: `alignment@0.97,size=96,body_lr=1`. EfficientNet-Lite0 with
ImageNet weights, 64 px, batches of 25, a linear head at 3e-3 and the body at 9e-4, the body's batch norm in eval mode,
5, 10 or 20 images a class, 50, 35 or 20 epochs, unless the variant says otherwise. `clipart-10` has the validation images
of `loss_search`; `glyphs-5` reads the fonts in the folder `fonts`, unpacked from the packages of `glyph_fonts.txt`
(commands on the results page).
A baseline should be as good as its users can make it before anything is added to it. Rows are written as they come."""
import time
from dataclasses import replace
from pathlib import Path

import torch

from fmce_fastai.study.jobs import arm_changes, Job
from fmce_fastai.study.learner import build_learner, eval_dl, fit_arm, study_dls
from fmce_fastai.study.settings import alphas_of, Study
from loss_search import clipart_dls, command, COMMON, read, setting

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
    job = Job('tune', arm, alphas_of(study, arm)[0], study.lrs[0], seed)
    cbs,lr,kwargs = arm_changes(study, job, None)
    learn = build_learner(study, dls, seed, **kwargs)
    fit_arm(learn, study, study.epochs, lr, seed, cbs)
    with learn.no_bar(): p,y = learn.get_preds(dl=valid)
    return dict(setting=name, variant=variant, seed=seed, accuracy=round(float((p.argmax(1) == y).float().mean()), 5),
                images=len(y), cpu_seconds=round(time.process_time() - start, 1), torch=torch.__version__)

def report(path):
    d = read(path)
    d['accuracy'] *= 100
    groups = d.groupby(['setting', 'variant'])
    table = groups.accuracy.agg(['mean', 'sem', 'count']).join(groups.cpu_seconds.mean()).round(2)
    print(f'{d.cpu_seconds.sum()/3600:.2f} core-hours')
    print(table.sort_values(['setting', 'mean'], ascending=False).to_string())

if __name__ == '__main__': command(__doc__, PATH, fit_once, 'clipart-10', '100-102', separator=';', report=report)
