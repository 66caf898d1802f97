"""The search of `loss_search.py` at a twentieth of its cost: the front of the network is fixed and its maps are kept.

    python benchmarks/loss_screen.py --variants plain,alignment:0.97 --seeds 0-19
    python benchmarks/loss_screen.py --report

EfficientNet-Lite0 with ImageNet weights: stem and blocks 0 to 3 stay as they are, blocks 4 to 6 and the linear head
are trained. The maps of block 3 are computed once, of each image and of its mirror image. Everything else as in
`loss_search.py`, whose losses and variants (without MixUp of pixels) it uses. `manifold-mixup` mixes the kept maps,
`flip` trains on image or mirror image, `-last` adds the map that the head pools to the taps, `-head` puts a small
network between the channel means and the loss, as supervised contrastive learning does."""
import copy
import time
from types import SimpleNamespace

import numpy as np
import timm
import torch
import torch.nn.functional as F
from torch import nn

import loss_search
from loss_search import Bank, command, HERE
from fmce_fastai.data.names import get_dls
from fmce_fastai.data.subsets import stratified_subset
from fmce_fastai.study.weights import load_efficientnet_lite

PATH = HERE/f"loss_screen_cpu_float32_torch{torch.__version__.split('+')[0]}.csv"
STEPS = {5:60, 10:80, 20:100, 50:140}
_cache = {}

def network():
    torch.manual_seed(0)
    net = timm.create_model('tf_efficientnet_lite0', num_classes=0).eval()
    load_efficientnet_lite(net, '0')
    return net

@torch.no_grad()
def front(net, x):
    return torch.cat([nn.Sequential(net.conv_stem, net.bn1, *net.blocks[:4])(b) for b in x.split(100)])

@torch.no_grad()
def kept(data):
    "Maps of block 3 (N, 2, C, H, W) of image and mirror image, labels, groups of related images, which may be trained on."
    if data in _cache: return _cache[data]
    net = network()
    if data == 'clipart':
        from fmce_fastai.data.openclipart import drawing_groups, read_openclipart, split_drawings
        d = read_openclipart(size=64)
        part,groups = split_drawings(d),drawing_groups(d)
        dls = loss_search.array_dls(*[(d.images[part < 2], d.labels[part < 2])]*2, vocab=d.vocab, size=64, bs=50)
        groups,train = groups[part < 2],(part < 2)[part < 2] & (part[part < 2] == 0)
        loaders = [dls.valid]
    else:
        kwargs = dict(fashion=dict(root='/usr/share/datasets/fashion-mnist', size=48, n_train=2500), glyphs=dict(size=48, n_train=3100))[data]
        dls = get_dls(dict(fashion='fashion_mnist').get(data, data), bs=100, **kwargs)
        items = dls.valid_ds.items
        keep = np.random.default_rng(0).permutation(len(items))[:1500]
        loaders = [dls.test_dl(dls.train_ds.items, with_labels=True), dls.test_dl([items[i] for i in keep], with_labels=True)]
        n = [len(l.dataset) for l in loaders]
        train = np.repeat([True, False], n)
        groups = np.arange(sum(n))
    batches = [(x.as_subclass(torch.Tensor), y.as_subclass(torch.Tensor)) for l in loaders for x,y in l]
    x,y = zip(*((torch.stack([front(net, x), front(net, x.flip(3))], 1), y) for x,y in batches))
    _cache[data] = torch.cat(x),torch.cat(y),np.asarray(groups),np.asarray(train)
    return _cache[data]

class Pointwise(nn.Module):
    "1x1 convolution and frozen batch norm on (C, B, P): maps of B images and P positions, channels first."
    def __init__(self, conv, norm):
        super().__init__()
        self.weight,self.norm = nn.Parameter(conv.weight[:,:,0,0].clone()),norm
    def forward(self, x): return affine(torch.tensordot(self.weight, x, 1), self.norm)

class Depthwise(nn.Module):
    "Depthwise convolution on (C, B, P): on grids of 2x2 to 8x8 a matrix per channel is ten times as fast."
    def __init__(self, conv, norm, side):
        super().__init__()
        self.weight,self.norm = nn.Parameter(conv.weight.flatten(1).clone()),norm
        k,stride = conv.kernel_size[0],conv.stride[0]
        self.side = out = -(-side//stride)
        before = max((out-1)*stride + k - side, 0)//2 if 'Same' in type(conv).__name__ else k//2
        q,p = torch.arange(side),torch.arange(out)
        offset = q[None] - p[:,None]*stride + before               # (out, side), along one axis
        inside = (offset >= 0) & (offset < k)
        at = (offset[:,None,:,None]*k + offset[None,:,None,:])
        ok = inside[:,None,:,None] & inside[None,:,None,:]
        self.at = torch.where(ok, at, k*k).reshape(out*out, side*side)
    def forward(self, x):
        w = F.pad(self.weight, (0, 1))[:,self.at]                  # (C, P_out, P_in)
        return affine(torch.bmm(x, w.transpose(1, 2)), self.norm)

def affine(x, norm):
    scale = norm.weight*(norm.running_var + norm.eps).rsqrt()
    return x*scale[:,None,None] + (norm.bias - norm.running_mean*scale)[:,None,None]

class Block(nn.Module):
    "Inverted residual: expand, depthwise, project."
    def __init__(self, block, side):
        super().__init__()
        self.expand = Pointwise(block.conv_pw, block.bn1)
        self.depth = Depthwise(block.conv_dw, block.bn2, side)
        self.project = Pointwise(block.conv_pwl, block.bn3)
        self.has_skip = block.has_skip
    def forward(self, x):
        y = self.project(F.hardtanh(self.depth(F.hardtanh(self.expand(x), 0, 6)), 0, 6))
        return x + y if self.has_skip else y

class Tail(nn.Module):
    "Blocks 4 to 6 and a linear head, on maps of block 3 (B, C, H, W)."
    def __init__(self, n_out, seed, side):
        super().__init__()
        net = network()
        self.stages = nn.ModuleList()
        for stage in net.blocks[4:]:
            blocks = []
            for b in stage:
                blocks.append(Block(b, side))
                side = blocks[-1].depth.side
            self.stages.append(nn.Sequential(*blocks))
        self.last = Pointwise(net.conv_head, net.bn2)
        torch.manual_seed(seed)
        self.head = nn.Linear(net.num_features, n_out)
    def body(self): return [*self.stages.parameters(), *self.last.parameters()]
    def forward(self, x, maps=None):
        x = x.flatten(2).transpose(0, 1).contiguous()
        for i,s in enumerate(self.stages):
            x = s(x)
            if maps is not None and i != 1: maps[f'blocks.{i+4}'] = as_map(x)
        x = F.hardtanh(self.last(x), 0, 6)
        if maps is not None: maps['last'] = as_map(x)
        return self.head(x.mean(2).T)

def as_map(x):
    side = int(x.shape[2]**.5)
    return x.transpose(0, 1).unflatten(2, (side, side))

def screen(name, setting_name, seed):
    "Train one variant; a row of the table."
    data,_,a_class = setting_name.partition('-')
    start,a_class = time.process_time(),int(a_class)
    x,y,groups,train = kept(data)
    pool = np.flatnonzero(train)
    n_classes = int(y.max())+1
    chosen = pool[stratified_subset(y[pool].numpy(), a_class*n_classes, seed)]
    held = np.flatnonzero(~np.isin(groups, groups[chosen]) & (np.ones_like(train) if data == 'clipart' else ~train))
    model = Tail(n_classes, seed, x.shape[-1])
    losses = [PARTS(part, model) for part in name.split('+')]
    quick = [*model.head.parameters(), *(p for l in losses for p in l.parameters())]
    opt = torch.optim.AdamW([dict(params=model.body(), lr=9e-4), dict(params=quick, lr=3e-3)], weight_decay=.01)
    bs,n_steps = min(25, len(chosen)),STEPS[a_class]
    if data == 'glyphs': bs,n_steps = 50,2*n_steps
    sched = torch.optim.lr_scheduler.OneCycleLR(opt, [9e-4, 3e-3], total_steps=n_steps+1, pct_start=.25, div_factor=25, final_div_factor=1e4, base_momentum=.85)
    rng,queue = np.random.default_rng(seed),[]
    for step in range(n_steps):
        if len(queue) < bs: queue = list(rng.permutation(len(chosen)))
        ids,queue = np.array(queue[:bs]),queue[bs:]
        torch.manual_seed(1000*seed + step)
        b = chosen[ids]
        state = SimpleNamespace(model=model, x=x[b,0], mirrored=x[b,1], y=y[b], targets=y[b], ids=torch.from_numpy(ids), step=step, done=step/n_steps, maps={}, loss=F.cross_entropy)
        for l in losses: l.before(state)
        state.out = model(state.x, state.maps)
        state.total = state.loss(state.out, state.targets)
        for l in losses: l.after(state)
        opt.zero_grad()
        state.total.backward()
        opt.step()
        for l in losses: l.stepped(state)
        sched.step()
    with torch.no_grad():
        final = getattr(losses[-1], 'final', lambda m: m)(model)
        p = torch.cat([final(b).log_softmax(1) for b in x[held,0].split(250)])
    t = y[held]
    return dict(setting=setting_name, variant=name, seed=seed, accuracy=round(float((p.argmax(1) == t).float().mean()), 5),
                images=len(t), loss=round(float(F.nll_loss(p, t)), 5), seconds=round(time.process_time()-start, 1), torch=torch.__version__)

CHANNELS = {'blocks.4':112, 'blocks.6':320, 'last':1280}
def projection_head(channels, n_out=128): return nn.Sequential(nn.Linear(channels, n_out), nn.ReLU(), nn.Linear(n_out, n_out))

class Part:
    "Part of a variant: acts before the forward, on the loss, after the step."
    def before(self, s): pass
    def after(self, s): pass
    def stepped(self, s): pass
    def parameters(self): return []

class OnMaps(Part):
    "A loss on features of the last taps, among the images of a bank."
    def __init__(self, fn, alpha, bank='', taps=2, view='means', schedule=None, size=200, weights=None, add=False,
                 last=False, head=False):
        self.fn,self.alpha,self.taps,self.view,self.schedule,self.weights,self.add = fn,alpha,taps,view,schedule,weights,add
        self.bank,self.last = Bank(bank, size),last
        self.heads = {n:projection_head(c) for n,c in CHANNELS.items()} if head else {}
    def parameters(self): return [p for h in self.heads.values() for p in h.parameters()]
    def read(self, m): return {'means':lambda m: m.mean((2,3)), 'flat':lambda m: m.flatten(1), 'map':lambda m: m}[self.view](m)
    def names(self, s): return [n for n in s.maps if n != 'last' or self.last][-self.taps:]
    def after(self, s):
        feats = {n:self.heads.get(n, nn.Identity())(self.read(s.maps[n])) for n in self.names(s)}
        joined,targets = self.bank.join(s.ids, feats, s.targets)
        per_tap = torch.stack([self.fn(x, targets, len(s.ids)) for x in joined.values()])
        aux = (per_tap*per_tap.detach()).sum()/per_tap.detach().sum() if self.weights == 'gain' else per_tap.mean()
        a = self.alpha
        if self.schedule == 'fall': a = a*.5*(1 + np.cos(np.pi*s.done))
        if self.schedule == 'rise': a = a*.5*(1 - np.cos(np.pi*s.done))
        s.total = (1-a)*s.total + a*aux if not self.add else s.total + a*aux

class Oracle(OnMaps):
    "RAL by an oracle."
    def __init__(self, path, alpha, kind='nll', **kwargs):
        super().__init__(None, alpha, view='map', **kwargs)
        oracle = loss_search.FMCENet.load(path)
        depths = {'blocks.4':.72, 'blocks.6':1., 'last':1.}
        def score(x, targets, n, name):
            labels = loss_search.same_class(targets) if oracle.kind == 'universal' else targets
            logits,valid = oracle.score_map(loss_search.pool_map(x), labels, depths[name])
            loss = -logits.log_softmax(-1)[:n,-1] if kind == 'nll' else 1 - (logits.softmax(-1) @ oracle.levels)[:n]
            return (loss*valid[:n]).sum()/valid[:n].sum().clamp(min=1)
        self.score = score
    def after(self, s):
        names = iter(self.names(s))
        self.fn = lambda x, t, n: self.score(x, t, n, next(names))
        super().after(s)

class Flip(Part):
    "Image or mirror image, at random."
    def before(self, s): s.x = torch.where((torch.rand(len(s.x)) < .5)[:,None,None,None], s.mirrored, s.x)

class KeepStart(Part):
    "Distance to the start's maps ('maps') or to their similarities ('similarities')."
    def __init__(self, weight, kind): self.weight,self.kind,self.start = weight,kind,None
    def before(self, s):
        if self.start is None: self.start = copy.deepcopy(s.model).requires_grad_(False)
    def after(self, s):
        maps = {}
        with torch.no_grad(): self.start(s.x, maps)
        losses = []
        for n in ('blocks.4', 'blocks.6'):
            a,b = s.maps[n],maps[n]
            if self.kind == 'maps': losses.append((a-b).square().mean()/b.square().mean())
            else:
                a,b = (loss_search.centre((lambda u: u @ u.T)(loss_search.unit_rows(m.mean((2,3))))) for m in (a, b))
                losses.append(1 - (a*b).sum()/(a.norm()*b.norm() + 1e-9))
        s.total = s.total + self.weight*torch.stack(losses).mean()

class ManifoldMixUp(Part):
    "Mixes the maps of block 3."
    def __init__(self, a): self.a = a
    def before(self, s):
        lam = torch.distributions.Beta(self.a, self.a).sample((len(s.x),))
        lam = torch.maximum(lam, 1-lam)
        perm = torch.randperm(len(s.x))
        l = lam[:,None,None,None]
        s.x = l*s.x + (1-l)*s.x[perm]
        n = s.model.head.out_features
        onehot = F.one_hot(s.y, n).float()
        s.targets = lam[:,None]*onehot + (1-lam[:,None])*onehot[perm]

class LabelSmoothing(Part):
    def before(self, s): s.loss = lambda o,t: F.cross_entropy(o, t, label_smoothing=.1)

class Average(Part):
    "An exponential moving average of the weights, used at the end."
    def __init__(self, decay): self.decay,self.model = decay,None
    def stepped(self, s):
        if self.model is None: self.model = copy.deepcopy(s.model)
        with torch.no_grad():
            for a,b in zip(self.model.parameters(), s.model.parameters()): a.lerp_(b, 1-self.decay)
    def final(self, model): return self.model

def PARTS(part, model):
    name,_,alpha = part.partition(':')
    alpha = float(alpha or 0)
    if name == 'plain': return Part()
    if name == 'flip': return Flip()
    if name == 'smooth': return LabelSmoothing()
    if name == 'ema': return Average(alpha)
    if name == 'manifold-mixup': return ManifoldMixUp(alpha or .4)
    if name in ('keep-maps', 'keep-similarities'): return KeepStart(alpha, name.removeprefix('keep-'))
    options = {}
    for end,value in (('-add', dict(add=True)), ('-fall', dict(schedule='fall')), ('-rise', dict(schedule='rise')), ('-gain', dict(weights='gain')), ('-flat', dict(view='flat')),
                      ('-head', dict(head=True)), ('-taps1', dict(taps=1)), ('-taps3', dict(taps=3)), ('-last', dict(last=True)), ('-bank', dict(bank='bank')), ('-copies', dict(bank='copies')), ('-long', dict(size=2000))):
        if name.endswith(end): name,options = name.removesuffix(end),{**options, **value}
    if name.removesuffix('-gap') in loss_search.ORACLES:
        return Oracle(loss_search.ORACLES[name.removesuffix('-gap')], alpha, 'gap' if 'gap' in name else 'nll', **options)
    if name.startswith('oracle='): return Oracle(name.removeprefix('oracle='), alpha, **options)
    return OnMaps(loss_search.LOSSES[name], alpha, **options)

if __name__ == '__main__': command(__doc__, PATH, screen, 'fashion-5,fashion-20,clipart-5,clipart-10', '0-9')
