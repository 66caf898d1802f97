"The commands. `fmce_train`: what it writes, what it prints when something is wrong, and that an interrupted run resumes to the same figures."
import argparse
import csv
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from fastai.vision.learner import model_meta
from fastcore.script import anno_parser
from PIL import Image
from safetensors.torch import load_file, save_file
from torchvision.models import resnet18, shufflenet_v2_x1_0

from fmce_fastai import __version__
from fmce_fastai.cli import demo
from fmce_fastai.cli.common import CommandError
from fmce_fastai.cli.demo import fmce_demo
from fmce_fastai.cli.learner import run_dls, run_learner
from fmce_fastai.cli.networks import check_weights
from fmce_fastai.cli.options import resumed_settings
from fmce_fastai.cli.pretrain import fmce_pretrain
from fmce_fastai.cli.report import fmce_report
from fmce_fastai.cli.stages import finished_stages
from fmce_fastai.cli.study import fmce_study
from fmce_fastai.cli.summary import summary
from fmce_fastai.cli.taps import fmce_taps
from fmce_fastai.cli.train import fmce_train
from fmce_fastai.data.digits import digits_dls

TINY = dict(arch='test_resnet', epochs=6, ral_epochs=1, oracle_epochs=4, n_images=64, n_snapshots=8)
RUN = dict(TINY, n_train=480, bs=48, size=16)  # runs that are trained to the end: the smallest that converges
STAGES = ('stage1', 'stage2', 'stage3_plain', 'stage3_ral')

def script(name): return shutil.which(name, path=os.pathsep.join([str(Path(sys.executable).parent), os.environ['PATH']]))

def command(**options):
    return [script('fmce_train'), *(str(o) for k,v in options.items() for o in ('--' + k.replace('_', '-'), v))]

def figures(results):
    "All of `results.json` but times and the folder."
    if isinstance(results, list): return [figures(v) for v in results]
    return {k:figures(v) for k,v in results.items() if k not in ('seconds', 'out')} if isinstance(results, dict) else results

def read(folder): return json.loads((folder/'results.json').read_text())

@pytest.fixture(scope='session')
def finished(tmp_path_factory):
    "A finished run; tests work on copies."
    out = tmp_path_factory.mktemp('cli')/'run'
    fmce_train(**RUN, out=str(out))
    return out

@pytest.fixture
def copy(finished, tmp_path):
    "A function: a copy of the finished run in which only the stages `keep` are finished."
    def make(*keep, name='copy'):
        shutil.copytree(finished, tmp_path/name)
        for s in set(STAGES)-set(keep): (tmp_path/name/f'{s}.json').unlink()
        return tmp_path/name
    return make

@pytest.fixture
def refused(capsys):
    "A function: the one line that the command says when it refuses `options`."
    def call(code=1, lines=1, **options):
        capsys.readouterr()
        with pytest.raises(SystemExit) as e: fmce_train(**{k:str(v) if isinstance(v, Path) else v for k,v in options.items()})
        said = capsys.readouterr().err
        assert e.value.code == code and said.startswith('fmce_train: ') and 'Traceback' not in said
        assert len(said.splitlines()) == lines, said
        return said
    return call

def test_resume_heeds_an_option_that_equals_its_default(copy):
    "The run has 6 epochs; 12 are the command's default, and were asked for all the same."
    run = subprocess.run(command(resume=copy('stage1'), epochs=12), capture_output=True, text=True)
    assert run.returncode == 1 and '--epochs 12 does not go with --resume' in run.stderr, run.stderr


# All commands ----------------------------------------------------------------------------------------------------------

COMMANDS = dict(fmce_train=fmce_train, fmce_taps=fmce_taps, fmce_report=fmce_report, fmce_pretrain=fmce_pretrain, fmce_study=fmce_study, fmce_demo=fmce_demo)

@pytest.mark.parametrize('name', COMMANDS)
def test_version(name):
    run = subprocess.run([script(name), '--version'], capture_output=True, text=True)
    assert (run.returncode, run.stdout, run.stderr) == (0, f'fmce_fastai {__version__}\n', '')

@pytest.mark.parametrize('name', COMMANDS)
def test_help_shows_every_option_with_its_default(name):
    run = subprocess.run([script(name), '--help'], capture_output=True, text=True)
    assert run.returncode == 0 and f'fmce_fastai {__version__}' in run.stdout
    actions = anno_parser(COMMANDS[name].__wrapped__)._actions
    shown = [a for a in actions if a.option_strings and a.help != argparse.SUPPRESS]
    assert {'--help', '--version'} < {o for a in shown for o in a.option_strings}
    for a in shown:
        assert a.option_strings[-1] in run.stdout
        if a.dest not in ('help', 'version'): assert a.help.count('(default: ') == 1, a.help

@pytest.mark.parametrize('name', COMMANDS)
def test_python_callers_see_no_version(name):
    import inspect
    assert 'version' not in inspect.signature(COMMANDS[name]).parameters

# The demonstration -----------------------------------------------------------------------------------------------------

FEW = dict(epochs=12, jobs=1)  # a complete miniature runs in the notebook of the command

@pytest.fixture
def made_up_seeds(monkeypatch):
    "Seeds train nothing: accuracies are made up. The seeds that were run, in order."
    import matplotlib.pyplot as plt
    done = []
    def run_seed(cfg, out):
        done.append(cfg['seed'])
        plain = .80 + .05*cfg['seed']
        return dict(accuracy=dict(before=.7, plain=plain, ral=plain-.02, universal=plain+.01*(cfg['seed']+1)), images=300, status='converged', untrained=['layer1'], versions=dict(torch='2'))
    monkeypatch.setattr(demo, '_run_seed', run_seed)
    monkeypatch.setattr(demo, '_draw', lambda folder, results: plt.figure().savefig(folder/'demo.png'))
    return done

def demo_refused(capsys, code=1, **options):
    "What the command says when it refuses `options`."
    with pytest.raises(SystemExit) as e: fmce_demo(**options)
    said = capsys.readouterr().err
    assert e.value.code == code and said.startswith('fmce_demo: ') and 'Traceback' not in said
    return said

def test_the_demonstration_pairs_its_seeds_and_resumes(made_up_seeds, tmp_path, capsys):
    run = dict(FEW, n_seeds=2, out=str(tmp_path/'demo'))
    fmce_demo(**run)
    text,r = capsys.readouterr().out,read(tmp_path/'demo')
    for part in ('seed 1', 'RAL, universal oracle', 'no difference shown', 'not evidence', 'trained\non digits', 'layer1 (2 of 2 seeds)', str(tmp_path/'demo/demo.png')): assert part in text, part
    assert {arm:round(d['difference'], 6) for arm,d in r['differences'].items()} == dict(ral=-2, universal=1.5) and r['differences']['universal']['seeds'] == 2
    (tmp_path/'demo/seed1/seed.json').unlink()
    fmce_demo(**run)
    assert made_up_seeds == [0, 1, 1] and read(tmp_path/'demo')['differences'] == r['differences'] and 'seed 0: finished before, kept' in capsys.readouterr().out
    assert '--alpha 0.9, not 0.5' in demo_refused(capsys, **{**run, 'alpha':.5}) and len(made_up_seeds) == 3

def test_an_interrupted_demonstration_says_what_is_kept(made_up_seeds, monkeypatch, tmp_path, capsys):
    def interrupted(cfg, out, run=demo._run_seed):
        if cfg['seed'] == 1: raise KeyboardInterrupt
        return run(cfg, out)
    monkeypatch.setattr(demo, '_run_seed', interrupted)
    said = demo_refused(capsys, 130, **FEW, out=str(tmp_path/'my demo'))
    assert 'stopped by Ctrl-C' in said and f"Kept in {tmp_path/'my demo'}: seed0" in said
    assert said.strip().endswith(f"Resume with: fmce_demo --out '{tmp_path/'my demo'}' --jobs 1 --epochs 12")

@pytest.mark.parametrize('bad,part', [(dict(per_class=3), '--per-class is 3'), (dict(per_class=101), '--full'), (dict(jobs=0), '--jobs is 0'), (dict(epochs=1), 'Give --epochs'), (dict(alpha=2.), '--alpha'),
    (dict(arch='resnet1o'), 'Near it'), (dict(out='/dev/null'), 'not an empty folder'), (dict(out='/dev/null/x'), 'cannot be made'), (dict(out=''), '--out is empty'), (dict(full=True), '--jobs does not go with --full')])
def test_a_refused_demonstration_leaves_nothing(bad, part, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    said = demo_refused(capsys, **{**FEW, **bad})
    assert part in said and len(said.splitlines()) == 1 and list(tmp_path.iterdir()) == []

def test_a_demonstration_leaves_other_folders_alone(made_up_seeds, tmp_path, capsys):
    (tmp_path/'mine.txt').write_text('x')
    assert 'not an empty folder' in demo_refused(capsys, **FEW, out=str(tmp_path))
    (tmp_path/'d').mkdir()
    (tmp_path/'d/demo.json').write_text('{')
    assert 'demo.json is damaged' in demo_refused(capsys, **FEW, out=str(tmp_path/'d')) and made_up_seeds == []

def test_the_full_demonstration_is_fmce_train(monkeypatch):
    seen = []
    monkeypatch.setattr(demo, 'fmce_train', lambda **kwargs: seen.append(kwargs))
    fmce_demo(full=True, out='x')
    assert seen == [dict(out='x')]

# Studies on one's own images -------------------------------------------------------------------------------------------

@pytest.fixture
def my_folder(tmp_path):
    rng = np.random.default_rng(0)
    for k,name in enumerate('abc'):
        (tmp_path/'mine'/name).mkdir(parents=True)
        for i in range(30): Image.fromarray((rng.integers(0, 60, (16, 16, 3)) + 60*k).astype(np.uint8)).save(tmp_path/'mine'/name/f'{i}.png')
    return str(tmp_path/'mine')

SMALL = dict(arch='test_resnet', weights='', arms='plain,scaled@0.5', seeds='0', epochs=1, size=16)

@pytest.mark.parametrize('root', [None, ''])
def test_a_preset_runs_on_a_folder(tmp_path, my_folder, capsys, root):
    fmce_study(str(tmp_path/'out'), preset='few-images', data=my_folder, root=root, **SMALL)
    text = capsys.readouterr().out
    assert 'too few images: 20-a-class, 100-a-class, 500-a-class' in text and text.count('Everything is in') == 2
    assert sorted(p.name for p in (tmp_path/'out').iterdir()) == ['5-a-class', 'lite1-5-a-class']
    settings = json.loads((tmp_path/'out'/'5-a-class'/'study.json').read_text())
    assert (settings['data'], settings['root'], settings['n_train']) == (my_folder, '', 15)
    fmce_study(str(tmp_path/'out'), report=True)
    assert capsys.readouterr().out == text.partition('\n')[2]

@pytest.mark.parametrize('change, words', [
    (dict(n_train=500), '--n-train 500 but there are 54 training images'), (dict(arch='resnet500'), 'Near it'), (dict(root='data'), 'cannot be combined with a folder'),
    (dict(oracle='none.safetensors'), 'there is no such file'), (dict(data='nowhere'), 'neither a data set nor a folder'), (dict(weights='best'), '--weights')])
def test_a_refused_study_leaves_nothing_behind(tmp_path, my_folder, capsys, change, words):
    with pytest.raises(SystemExit): fmce_study(str(tmp_path/'out'), preset='few-images', **{**SMALL, 'data':my_folder, **change})
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1 and (words in error or words == '--weights' and 'weights' in error)
    assert not (tmp_path/'out').exists()

def test_no_study_of_a_preset_begins_where_a_later_one_cannot(tmp_path, my_folder, capsys):
    (tmp_path/'out'/'lite1-5-a-class').mkdir(parents=True)
    fmce_study(str(tmp_path/'out'/'lite1-5-a-class'), data=my_folder, **SMALL)
    before = sorted((tmp_path/'out').iterdir())
    with pytest.raises(SystemExit): fmce_study(str(tmp_path/'out'), preset='few-images', data=my_folder, **SMALL)
    assert 'holds another study' in capsys.readouterr().err and sorted((tmp_path/'out').iterdir()) == before

def test_a_report_shows_the_studies_that_have_runs(tmp_path, capsys):
    from fmce_fastai.study.settings import Study
    out = tmp_path/'out'
    Study(n_train=64).save(out/'5-a-class')  # what a refused call of an earlier version left
    given = dict(n_train=64, n_eval=50, bs=32, **SMALL)
    fmce_study(str(out), **given)
    capsys.readouterr()
    fmce_study(str(out), report=True)
    text = capsys.readouterr().out
    assert text.count('Everything is in') == 1 and text.count('No run of the study in') == 1
    shutil.rmtree(out/'5-a-class')
    fmce_study(str(out), report=True, **given)
    text = capsys.readouterr().out
    assert text.count('Everything is in') == 1 and 'No run' not in text
    with pytest.raises(SystemExit): fmce_study(str(out), report=True, bs=16)
    assert 'bs is 32 there and 16 here' in capsys.readouterr().err

# What a run leaves -----------------------------------------------------------------------------------------------------

def test_a_run_leaves_what_is_promised(finished):
    r = read(finished)
    for png in ('convergence.png', 'fmcs.png', 'calibration.png'):
        with Image.open(finished/png) as im: assert min(im.size) > 300 and len(im.convert('L').getcolors(1<<16)) > 20
    modules = list(dict.fromkeys(s['module'] for s in r['stage2']['scores']))
    with open(finished/'history.csv') as f: rows = list(csv.DictReader(f))
    assert [x['module'] for x in rows] == modules and len(modules) == 4  # layer3 and layer4 have one resolution at 16 px
    assert r['stage1']['test']['accuracy'] > 0.5 and r['stage1']['test']['split'] == 'test'
    assert not [f.name for f in finished.iterdir() if f.name.startswith('.')]

def test_the_table_says_what_counts(finished):
    text = summary(read(finished))
    for part in ('before fine-tuning', 'plain fine-tuning', 'RAL, alpha 0.9', 'one seed proves nothing', 'layer4', 'time per stage', '300 images: one is 0.33 points'): assert part in text
    assert max(map(len, text.splitlines())) <= 115

def test_the_exported_learner_predicts(finished):
    from fastai.learner import load_learner
    import warnings
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')  # fastai warns that it unpickles
        learn = load_learner(finished/'learner.pkl')
    item,_,probs = learn.predict(np.zeros((8,8), np.uint8))
    assert item in '0123456789' and probs.sum() == pytest.approx(1, abs=1e-5)

def test_alpha_0_equals_the_control_bit_for_bit(copy):
    out = copy('stage1', 'stage2', 'stage3_plain')
    fmce_train(resume=str(out), alpha=0.)
    plain,ral = load_file(out/'stage3_plain.safetensors'),load_file(out/'stage3_ral.safetensors')
    assert list(plain) == list(ral) and all(torch.equal(plain[k], ral[k]) for k in plain)
    assert read(out)['stage3_plain']['test'] == read(out)['stage3_ral']['test'] and read(out)['options']['alpha'] == 0

def test_alpha_09_does_not_equal_the_control(finished):
    plain,ral,start = (load_file(finished/f'{n}.safetensors') for n in ('stage3_plain', 'stage3_ral', 'stage1'))
    assert any(not torch.equal(plain[k], ral[k]) for k in plain) and any(not torch.equal(plain[k], start[k]) for k in plain)

# Interrupted -----------------------------------------------------------------------------------------------------------

def stop(when, sig, **options):
    "Start the command and send it `sig` when its output has `when`; returns its exit status and what it said."
    listen = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)  # a suite run in a shell's background hands on an ignored Ctrl-C
    p = subprocess.Popen(command(**options), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=listen)
    for line in p.stdout:
        if when in line: break
    p.send_signal(sig)
    return p.communicate()[1],p.returncode

def test_killed_in_stage_1_then_the_same_figures(finished, tmp_path):
    said,code = stop('epoch 2/6', signal.SIGKILL, **RUN, out=tmp_path/'k')
    assert code == -signal.SIGKILL and not (tmp_path/'k/stage1.json').exists()
    fmce_train(resume=str(tmp_path/'k'))
    assert figures(read(tmp_path/'k')) == figures(read(finished))

def test_ctrl_c_is_one_message(copy):
    said,code = stop('stage1:', signal.SIGINT, resume=copy('stage1'))
    assert code == 130 and 'stopped by Ctrl-C' in said and '--resume' in said and 'Traceback' not in said

@pytest.mark.parametrize('keep', [('stage1',), ('stage1', 'stage2'), ('stage1', 'stage2', 'stage3_plain')])
def test_goes_on_after_the_last_finished_stage(keep, copy, finished, capsys):
    out = copy(*keep)
    times = {s:(out/f'{s}.json').stat().st_mtime_ns for s in keep}
    fmce_train(resume=str(out))
    assert figures(read(out)) == figures(read(finished))
    assert capsys.readouterr().out.count('finished before, kept') == len(keep)
    assert times == {s:(out/f'{s}.json').stat().st_mtime_ns for s in keep}

def test_a_repeated_stage_takes_along_what_rests_on_it(copy, finished):
    out = copy('stage2', 'stage3_plain', 'stage3_ral')
    assert finished_stages(out) == {}
    (out/'stage1.json').write_text((finished/'stage1.json').read_text())
    assert set(finished_stages(out)) == set(STAGES)
    (out/'stage2.json').unlink()
    assert set(finished_stages(out)) == {'stage1', 'stage3_plain'}

def test_options_of_finished_stages_stay(copy, refused):
    out = copy('stage1', 'stage2', 'stage3_plain')
    assert '--epochs 9 does not go with --resume' in refused(resume=out, epochs=9)
    assert 'stage3_plain, which uses it, is finished' in refused(resume=out, ral_lr=1e-5)
    assert resumed_settings(out, dict(alpha=0.5))['alpha'] == 0.5

# Damage ----------------------------------------------------------------------------------------------------------------

def half(p): p.write_bytes(p.read_bytes()[:p.stat().st_size//2])
def flip(p): b = bytearray(p.read_bytes()); b[len(b)//2] ^= 255; p.write_bytes(bytes(b))
def gone(p): shutil.rmtree(p) if p.is_dir() else p.unlink()
def empty(p): p.write_bytes(b'')
def other(p): p.write_text('{}')

@pytest.mark.parametrize('file,how', [('stage1.json', half), ('stage1.json', other), ('stage2.json', empty), ('stage1.safetensors', gone), ('stage1.safetensors', half),
    ('stage1.safetensors', flip), ('oracle.safetensors', flip), ('oracle.safetensors', gone), ('fmcs_dataset', gone), ('fmcs_dataset/card.json', half),
    ('fmcs_dataset/maps/layer4.003.npy', half), ('fmcs_dataset/targets.npy', empty), ('history.csv', empty), ('learner.pkl', gone)])
def test_damage_is_named_with_the_way_out(file, how, copy, refused):
    keep = STAGES if file.endswith(('.csv', '.pkl')) or how is gone else ('stage1',) if 'fmcs' in file else ('stage1', 'stage2', 'stage3_plain') if 'oracle' in file else ('stage1', 'stage2')
    out = copy(*keep)
    how(out/file)
    said = refused(resume=out, lines=2)
    assert file.split('/')[0] in said and 'delete' in said and '.json' in said

@pytest.mark.parametrize('how', [half, empty, other, gone])
def test_damaged_options(how, copy, refused):
    out = copy(*STAGES)
    how(out/'options.json')
    assert 'options.json' in refused(resume=out)

# A full disk -----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('limit,keep,file', [(100_000, ('stage1',), 'oracle.safetensors'), (1_000_000, ('stage1', 'stage2'), 'stage3_plain.safetensors'),
                                             (1_950_000, STAGES[:3], 'learner.pkl'), (50_000, STAGES, 'fmcs.png')])
def test_a_full_disk_loses_nothing(limit, keep, file, copy, refused):
    out = copy(*keep)
    (out/file).unlink() if keep != STAGES[:3] else None
    before = {f.name:f.read_bytes() for f in out.iterdir() if f.is_file()}
    soft,hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try: said = refused(resume=out, lines=2)
    finally: resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert file in said and 'disk is full' in said and ', '.join(keep) in said
    assert not [f.name for f in out.iterdir() if f.name.endswith('.part')]
    assert all((out/f'{s}.json').read_bytes() == before[f'{s}.json'] for s in keep)

def test_a_full_disk_while_recording(tmp_path, refused):
    soft,hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, hard))
    try: said = refused(**TINY, out=tmp_path/'o', lines=2)
    finally: resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert 'disk is full' in said and 'no finished stage yet' in said

# Wrong options ---------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('bad,part', [(dict(alpha=-0.1), '[0, 1]'), (dict(alpha=1.5), '[0, 1]'), (dict(alpha=float('nan')), '[0, 1]'), (dict(arch='resnet1o'), 'Near it: resnet'),
    (dict(arch='torchvision.resnet'), 'torchvision.resnet'), (dict(arch='test_resnet.nope'), 'Invalid pretrained tag'), (dict(data='digit'), "Did you mean 'digits'"), (dict(data=''), '--data is empty'),
    (dict(device='cuda:99'), 'cpu'), (dict(device='tpu'), 'cpu'), (dict(n_train=5), '--n-train 5 leaves'), (dict(n_train=10**6), 'at most 1197'), (dict(seed=-1), '--seed -1'),
    (dict(bs=1), '--bs is 1'), (dict(size=0), '--size is 0'), (dict(lr=float('nan')), '--lr is nan'), (dict(epochs=2), 'Give --epochs 3 or more'), (dict(n_train=10), 'Give --epochs 17 or more'),
    (dict(cut=-1), '--cut goes with torchvision'), (dict(cut=-50, arch='torchvision.resnet18'), 'could not be built'), (dict(weights='nowhere.pth'), 'no such file'),
    (dict(weights='x', arch='torchvision.resnet18'), '--weights goes with timm'), (dict(arch='levit_128s', size=8), 'at --size 8'), (dict(root='x'), 'takes no root'), (dict(download=True), 'Leave it out'),
    (dict(data='fashion_mnist', root='nowhere'), 'train-images-idx3-ubyte'), (dict(out='/dev/null'), 'already exists'), (dict(out='/dev/null/x'), 'cannot be made')])
def test_wrong_options_are_one_line_and_leave_nothing(bad, part, refused, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert part in refused(**{**TINY, **bad})
    assert list(tmp_path.iterdir()) == []

def test_existing_folder_is_left_alone(finished, refused, tmp_path):
    before = {f:f.stat().st_mtime_ns for f in finished.rglob('*')}
    assert 'already exists and holds a run' in refused(**TINY, out=finished)
    assert before == {f:f.stat().st_mtime_ns for f in finished.rglob('*')}
    (tmp_path/'mine.txt').write_text('x')
    assert 'not an empty folder' in refused(**TINY, out=tmp_path)
    assert 'no options.json' in refused(resume=tmp_path) and 'cannot be read' in refused(resume=tmp_path/'mine.txt')

def test_weights_of_another_network_are_refused(tmp_path):
    save_file(timm.create_model('test_vit').state_dict(), tmp_path/'vit.safetensors')
    with pytest.raises(CommandError, match='does not fit test_resnet: .* of its 90 tensors'): check_weights(str(tmp_path/'vit.safetensors'), 'test_resnet')
    torch.save(timm.create_model('test_resnet', num_classes=7).state_dict(), tmp_path/'own.pth')  # another classifier does not matter
    check_weights(str(tmp_path/'own.pth'), 'test_resnet')

def test_weights_never_run_code(tmp_path):
    class Evil:
        def __reduce__(self): return os.mkdir, (str(tmp_path/'ran'),)
    torch.save({'a':Evil()}, tmp_path/'evil.pth')
    with pytest.raises(CommandError, match='not a file of weights'): check_weights(str(tmp_path/'evil.pth'), 'test_resnet')
    assert not (tmp_path/'ran').exists()

def test_weights_are_used(tmp_path):
    own = timm.create_model('test_resnet')
    save_file(own.state_dict(), tmp_path/'own.safetensors')
    cfg = dict(arch='test_resnet', weights=str(tmp_path/'own.safetensors'), pretrained=False, cut=None, size=32, seed=0, out=None)
    got = run_learner(cfg, digits_dls()).model[0].model.state_dict()
    assert all(torch.equal(v, own.state_dict()[k]) for k,v in got.items())

def test_cut_reaches_the_network():
    cfg = dict(arch='torchvision.resnet18', weights=None, pretrained=False, cut=-4, seed=0, out=None)
    dls,before = digits_dls(),dict(model_meta)
    assert len(run_learner(cfg, dls).model[0]) == len(list(resnet18().children()))-4
    body = run_learner({**cfg, 'arch':'torchvision.shufflenet_v2_x1_0', 'cut':None}, dls).model[0]
    assert len(body) == len(list(shufflenet_v2_x1_0().children()))-1
    assert dict(model_meta) == before

# Runs that cannot go on ------------------------------------------------------------------------------------------------

def test_loss_not_a_number_in_stage_1(refused, tmp_path):
    said = refused(**{**TINY, 'lr':1e30}, out=tmp_path/'o', lines=2)
    assert 'the loss of stage 1 became nan' in said and 'lower --lr' in said and 'Resume with: fmce_train' not in said and 'Exception occured' not in said

def test_loss_not_a_number_in_stage_3_keeps_the_rest(copy, refused, finished):
    out = copy('stage1', 'stage2')
    said = refused(resume=out, ral_lr=1e8, lines=2)
    assert 'stage 3 (plain) became nan' in said and f'Kept in {out}: stage1, stage2.' in said
    fmce_train(resume=str(out), ral_lr=3e-4)  # what the message advises; 3e-4 is what the finished run had by default
    assert figures(read(out)['stage3_ral']) == figures(read(finished)['stage3_ral'])

def test_a_run_that_learns_nothing_keeps_its_network(refused, tmp_path):
    rng = np.random.default_rng(0)
    for name in 'ab':
        (tmp_path/'d'/name).mkdir(parents=True)
        for i in range(40): Image.fromarray(rng.integers(0, 255, (8, 8, 3), dtype=np.uint8)).save(tmp_path/'d'/name/f'{i}.png')
    said = refused(**{**TINY, 'bs':8, 'epochs':4}, data=tmp_path/'d', out=tmp_path/'o', lr=1e-8, lines=2)
    assert 'cannot be scored' in said and 'Start again in a new --out' in said and 'Kept in' in said
    assert (tmp_path/'o/stage1.safetensors').exists()

# Networks that are made for one image size, or need another head -------------------------------------------------------

@pytest.mark.parametrize('arch,layout', [('swin_tiny_patch4_window7_224', 'NHWC'), ('vit_tiny_patch16_224', 'NC'), ('resnet10t', None)])
def test_the_learner_is_built_for_the_size_and_the_layout(arch, layout):
    import inspect
    cfg = {**{k:p.default for k,p in inspect.signature(fmce_train).parameters.items()}, **TINY, 'arch':arch, 'size':32, 'n_train':50, 'device':'cpu'}
    learn = run_learner(cfg, run_dls(cfg))
    assert type(learn.model[1][0]).__name__ == ('ChannelsFirst' if layout == 'NHWC' else 'AdaptiveConcatPool2d' if layout is None else 'BatchNorm1d')
    assert learn.model(torch.randn(2, 3, 32, 32)).shape == (2, 10)

# fmce_taps -------------------------------------------------------------------------------------------------------------

def taps(capsys, **options):
    code = 0
    try: fmce_taps(**options)
    except SystemExit as e: code = e.code
    said = capsys.readouterr()
    return code, said.out, said.err

@pytest.mark.parametrize('options,parts', [(dict(arch='test_resnet'), ['5 taps, found by forward_intermediates', 'layer4', 'NCHW']), (dict(arch='test_vit', taps='all', size=64), ['6 taps', 'NLC', '4x4']),
    (dict(arch='crossvit_tiny_240'), ['[1]', '2 taps']), (dict(arch='test_mambaout', n_in=1), ['NHWC']), (dict(arch='torchvision.resnet18'), ['found by stages', 'layer4']),
    (dict(arch='test_resnet', taps='layer*,act1'), ['found by given', 'act1'])])
def test_taps_prints_the_plan(options, parts, capsys):
    code, out, err = taps(capsys, **options)
    assert (code, err) == (0, '') and all(p in out for p in parts), out

def test_taps_checks_gradient(capsys):
    _, out, _ = taps(capsys, arch='test_vit', size=64, check=True)
    rows = [l.split() for l in out.splitlines() if l.startswith('blocks') or ' blocks.' in l][-4:]
    assert [r[1] for r in rows] == ['yes']*4 and 'RAL can train this network through all 4 maps.' in out
    reached = [int(r[2]) for r in rows]
    assert reached == sorted(reached) and reached[0] > 0

def test_taps_writes_the_plan(capsys, tmp_path):
    from fmce_fastai.maps.plan import TapPlan
    from fmce_fastai.maps.find import tap_plan
    assert taps(capsys, arch='test_resnet', json=str(tmp_path/'plan.json'))[0] == 0
    assert TapPlan.from_dict(json.loads((tmp_path/'plan.json').read_text())) == tap_plan(timm.create_model('test_resnet'))

@pytest.mark.parametrize('options,part', [(dict(arch='test_vot'), 'Near it: test_vit'), (dict(arch='levit_128s', size=8), 'does not run on an input of shape (2, 3, 8, 8)'), (dict(arch='test_resnet', size=0), '--size is 0'),
    (dict(arch='test_resnet', taps='layer5'), 'The nearest names are layer4'), (dict(arch='test_resnet', taps='fc'), 'not a (B, C, H, W) map'), (dict(arch='torchvision.nope'), 'not known'),
    (dict(arch='test_resnet', json='/dev/null/x.json'), 'could not write')])
def test_taps_mistakes_are_one_line(options, part, capsys):
    code, _, err = taps(capsys, **options)
    assert code == 1 and part in err and len(err.strip().splitlines()) == 1 and err.startswith('fmce_taps: '), err
