"""Which settings of `FMCSFreeze` save most at equal accuracy? A search on validation images; no test split is read.

    python benchmarks/freeze_search.py --settings fashion-100 --seeds 100-103
    python benchmarks/freeze_search.py --report

A variant is `plain`, or keyword arguments of `FMCSFreeze` joined by commas: `by='change',threshold=.02`; `default` has
none. `window` is the least number of checks within which a curve must be flat. Settings: EfficientNet-Lite0 with ImageNet
weights on 1,000 or 10,000 images of FashionMNIST or all of OpenClipart, and ResNet-18 from random weights on 10,000
images of FashionMNIST. Variants of a seed start from the same weights and see the same batches. Rows are written as
they come; what is there is not run again. Few seeds prove nothing: what looks best is confirmed by a study."""
from pathlib import Path

import torch

import fmce_fastai.train.freeze as freeze_module
from fmce_fastai.study.freezing import freezing_of, timed
from fmce_fastai.study.learner import build_learner, eval_dl, fit_arm, study_dls
from fmce_fastai.study.settings import Study
from fmce_fastai.train.freeze import FMCSFreeze
from loss_search import command, COMMON, read

HERE = Path(__file__).resolve().parent
MIN_WINDOW = freeze_module.MIN_WINDOW
PATH = HERE/f"freeze_search_cpu_float32_torch{torch.__version__.split('+')[0]}.csv"
FASHION = dict(data='fashion_mnist', root='/usr/share/datasets/fashion-mnist', n_eval=3000, bs=50)
LITE0 = COMMON | FASHION | dict(size=48)
SETTINGS = {
    'fashion-100':Study(**LITE0, n_train=1000, epochs=6),
    'fashion-100-long':Study(**LITE0, n_train=1000, epochs=12),
    'fashion-100-longer':Study(**LITE0, n_train=1000, epochs=24),
    'fashion-1000':Study(**LITE0, n_train=10000, epochs=2),
    'clipart':Study(**COMMON | dict(data='openclipart', size=128, body_lr=.1, epochs=10)),
    'scratch':Study(**FASHION, n_train=10000, size=32, epochs=6, arch='resnet18', lrs=(3e-3,)),
}
VARIANTS = ['plain', 'default', 'start=1', 'start=0', 'every=1', 'every=2', 'every=2,patience=1', 'every=2,start=0,patience=1', "every=2,window=4",
            "every=2,threshold=.1", "every=2,threshold=.2", "every=2,oracle='universal'", "by='change',threshold=.05",
            "by='change',threshold=.1", 'by=.2', 'by=.3', 'by=.4']

def freezing(variant):
    "Callbacks of a variant."
    if variant == 'plain': return []
    kwargs = {} if variant == 'default' else eval(f'dict({variant})')
    freeze_module.MIN_WINDOW = kwargs.pop('window', MIN_WINDOW)
    return [FMCSFreeze(**kwargs)]

def fit_once(variant, name, seed):
    "Train one variant; a row of the table."
    study = SETTINGS[name]
    dls = study_dls(study, seed)
    valid = eval_dl(dls, 'validation', study.n_eval)
    learn = build_learner(study, dls, seed)
    cbs = freezing(variant)
    with timed() as times: fit_arm(learn, study, study.epochs, study.lrs[0], seed, cbs)
    with learn.no_bar(): p,y = learn.get_preds(dl=valid)
    return dict(setting=name, variant=variant, seed=seed, accuracy=round(float((p.argmax(1) == y).float().mean()), 5),
                images=len(y), **times, **freezing_of(cbs), torch=torch.__version__)

def report(path):
    "Means over seeds of what each variant saves and loses against plain training with the same seed."
    d = read(path)
    d = d.merge(d[d.variant == 'plain'], on=['setting', 'seed'], suffixes=('', ' of plain'))
    d['points'] = 100*(d.accuracy - d['accuracy of plain'])
    d['time'] = 100*(1 - d.fit_cpu/d['fit_cpu of plain'])
    d['flops'] = 100*d.saved
    groups = d[d.variant != 'plain'].groupby(['setting', 'variant'])
    table = groups[['points', 'time', 'flops']].mean().round(2).assign(se=groups.points.sem().round(2), seeds=groups.size())
    print(table.to_string())

if __name__ == '__main__': command(__doc__, PATH, fit_once, 'fashion-100', '100-103', ';'.join(VARIANTS), ';', report)
