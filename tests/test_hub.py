"Oracles and learners go to the Hub and back, through huggingface_hub's own client and a server on this machine; what is no oracle is refused in words, and nothing is unpickled."
import os
import pickle
import socket
import sys

import pytest
import torch
from fake_hub import TOKEN, serving
from helpers import make_learner, make_model, make_oracle, tensor_learner

import fmce_fastai.hub.transfer as hub_module
from fmce_fastai.train.callback import FMCECallback
from fmce_fastai.hub.card import model_card
from fmce_fastai.hub.transfer import HubError
from fmce_fastai.oracle.files import OracleFileError
from fmce_fastai.oracle.base import FMCENet
from fmce_fastai.oracle.fitted import FittedFMCENet
from fmce_fastai.oracle.universal import UniversalFMCENet

REPO = "owner/tiny"


@pytest.fixture(scope="module")
def server():
    with serving() as repos: yield repos

@pytest.fixture
def hub(server, monkeypatch, tmp_path):
    "An empty Hub at which huggingface_hub's client looks, a cache of its own, somebody logged in."
    from huggingface_hub import constants
    server.commits, server.gated, server.asked, server.down = {}, set(), [], False
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_HUB_OFFLINE"): monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    point_at(monkeypatch, server.url)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path/"cache"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path/"token"))
    return server

@pytest.fixture
def impatient(monkeypatch):
    "huggingface_hub asks again, five times in 20 seconds; here without the waiting."
    monkeypatch.setattr("time.sleep", lambda seconds: None)

def point_at(monkeypatch, url):
    from huggingface_hub import constants, file_download
    monkeypatch.setattr(constants, "ENDPOINT", url)
    for module in (constants, file_download): monkeypatch.setattr(module, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}", raising=False)  # before 1.0 a name of its own there

@pytest.fixture(scope="module")
def oracle(): return carded(make_oracle(make_model()))

def carded(oracle):
    oracle.card = dict(data=dict(n_images=64, held_out=13), run=dict(status="converged", steps=40, steps_per_epoch=4), scores=[dict(module="stage2", mode="eval", mae=.0123, rho=.98, snapshots=16, images=13)])
    return oracle

def scores(oracle):
    gen = torch.Generator().manual_seed(3)
    with torch.no_grad(): return oracle({n: torch.randn(6, *oracle_shape(oracle, n), generator=gen) for n in oracle.plan.names}).fmcs
def oracle_shape(oracle, name): return next((t.channels, *t.grid) for t in oracle.plan if t.name == name)

def assert_equal_oracles(a, b):
    for (k, v), (l, w) in zip(a.state_dict().items(), b.state_dict().items(), strict=True): assert k == l and torch.equal(v, w), k
    assert a.plan == b.plan and torch.equal(scores(a), scores(b))


def test_a_name_on_the_hub_is_accepted_as_an_oracle(hub, oracle):
    from fmce_fastai.oracle.base import as_oracle
    oracle.push_to_hub(REPO)
    for given in (REPO, FMCENet.from_pretrained(REPO)): assert_equal_oracles(FMCECallback(oracle=given).oracle, oracle)
    with pytest.raises(HubError, match="No oracle from 'owner/other' on the Hugging Face Hub"): as_oracle("owner/other")

def test_a_folder_is_accepted_as_an_oracle(oracle, tmp_path):
    from fmce_fastai.oracle.base import as_oracle
    for given in (oracle.save_pretrained(tmp_path/"a"), str(tmp_path/"a")): assert_equal_oracles(as_oracle(given), oracle)


class Planted:
    "Unpickling this writes a file."
    def __init__(self, path): self.path = path
    def __reduce__(self): return os.mkdir, (str(self.path),)


# To the Hub and back -------------------------------------------------------------------------------------------------
def test_round_trip_through_the_hub(hub, oracle):
    commit = oracle.push_to_hub(REPO, license="apache-2.0")
    assert set(hub.commits[REPO][-1][1]) == {"README.md", "model.safetensors"}
    again = FMCENet.from_pretrained(REPO)
    assert type(again) is FittedFMCENet and again.frozen and again.card == oracle.card
    assert_equal_oracles(again, oracle)
    assert commit.oid == hub.commits[REPO][-1][0] and commit.oid in commit.commit_url

def test_only_the_oracles_file_is_fetched(hub, oracle):
    oracle.push_to_hub(REPO)
    hub.commit(REPO, {"pytorch_model.bin": b"x", "config.json": b"{}"})
    hub.asked.clear()
    FMCENet.from_pretrained(REPO)
    assert {path for _, path in hub.asked if "/resolve/" in path} == {f"/{REPO}/resolve/main/model.safetensors"}

def test_the_file_is_what_save_writes(hub, oracle, tmp_path):
    oracle.push_to_hub(REPO)
    assert hub.commits[REPO][-1][1]["model.safetensors"] == oracle.save(tmp_path/"o.safetensors").read_bytes()

def test_a_pinned_commit_stays(hub, oracle):
    first, other = oracle.push_to_hub(REPO), carded(make_oracle(make_model(), seed=1))
    other.push_to_hub(REPO)
    assert_equal_oracles(FMCENet.from_pretrained(REPO, revision=first.oid), oracle)
    assert_equal_oracles(FMCENet.from_pretrained(REPO), other)
    assert not torch.equal(scores(oracle), scores(other))

def test_an_edited_card_can_be_kept(hub, oracle):
    oracle.push_to_hub(REPO)
    hub.commit(REPO, {"README.md": b"my own words"})
    carded(make_oracle(make_model(), seed=1)).push_to_hub(REPO, readme=False)
    assert hub.commits[REPO][-1][1]["README.md"] == b"my own words" and len(hub.commits[REPO]) == 3

def test_universal_round_trip(hub):
    universal = FMCENet.universal()
    universal.push_to_hub("owner/universal")
    again, maps, y = FMCENet.from_pretrained("owner/universal"), {"m": torch.randn(16, 5, 4, 4)}, torch.arange(16) % 4
    assert type(again) is UniversalFMCENet and torch.equal(again(maps, y).fmcs, universal(maps, y).fmcs) and torch.equal(again(maps).fmcs, universal(maps).fmcs)
    with pytest.raises(OracleFileError, match="kind is 'universal', but FittedFMCENet"): FittedFMCENet.from_pretrained("owner/universal")

def test_folders_need_no_hub(oracle, tmp_path, monkeypatch):
    folder = oracle.save_pretrained(tmp_path/"a"/"b", license="mit")
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    assert_equal_oracles(FMCENet.from_pretrained(folder), oracle)
    assert_equal_oracles(FMCENet.from_pretrained(str(folder)), oracle)

def test_the_cache_serves_without_a_network(hub, oracle, monkeypatch):
    oracle.push_to_hub(REPO)
    FMCENet.from_pretrained(REPO)
    hub.asked.clear()
    assert_equal_oracles(FMCENet.from_pretrained(REPO, local_files_only=True), oracle)
    assert not hub.asked
    point_at(monkeypatch, closed_port())
    assert_equal_oracles(FMCENet.from_pretrained(REPO), oracle)

def closed_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{s.getsockname()[1]}"


# Refused in words ----------------------------------------------------------------------------------------------------
def test_a_pickle_is_neither_fetched_nor_read(hub, oracle, tmp_path):
    planted = pickle.dumps(Planted(tmp_path/"ran"))
    hub.commit(REPO, {"pytorch_model.bin": planted, "README.md": b""})
    with pytest.raises(HubError, match="'owner/tiny' holds no model.safetensors.*pytorch_model.bin: a pickle can run code"): FMCENet.from_pretrained(REPO)
    assert not any(path.endswith("pytorch_model.bin") for _, path in hub.asked)
    for name in ("model.safetensors", "pytorch_model.bin"):
        hub.commit(REPO, {name: planted})
        with pytest.raises(OracleFileError, match="not a safetensors file"): FMCENet.from_pretrained(REPO, filename=name)
    folder = tmp_path/"folder"
    folder.mkdir()
    (folder/"pytorch_model.bin").write_bytes(planted)
    with pytest.raises(HubError, match="holds no model.safetensors.*a pickle can run code"): FMCENet.from_pretrained(folder)
    assert not (tmp_path/"ran").exists()
    pickle.loads(planted)
    assert (tmp_path/"ran").exists()  # it would have shown

def test_changed_and_foreign_files_are_refused(hub, oracle, tmp_path):
    from safetensors.torch import save
    good = oracle.save(tmp_path/"o").read_bytes()
    for data, words in ((good[:-1] + bytes([good[-1] ^ 1]), "tensors were changed"), (good[:100], "damaged"), (b"", "damaged"), (save({"a": torch.ones(2)}), "has no oracle's card")):
        hub.commit(REPO, {"model.safetensors": data})
        with pytest.raises(OracleFileError, match=words): FMCENet.from_pretrained(REPO)

def test_other_names_are_told(hub, oracle, tmp_path):
    hub.commit(REPO, {"late.safetensors": oracle.save(tmp_path/"o").read_bytes()})
    with pytest.raises(HubError, match="It has late.safetensors: name the file with filename="): FMCENet.from_pretrained(REPO)
    assert_equal_oracles(FMCENet.from_pretrained(REPO, filename="late.safetensors"), oracle)
    hub.commit("owner/empty", {})
    with pytest.raises(HubError, match="It has no files"): FMCENet.from_pretrained("owner/empty")

@pytest.mark.parametrize("where, words", [("owner/none", "there is no such repository, or it is private"), ("a/b/c", "neither a folder on this machine nor the name of a repository"), ("../x", "neither a folder on this machine")])
def test_wrong_names(hub, where, words):
    with pytest.raises(HubError, match=words): FMCENet.from_pretrained(where)

def test_wrong_revisions_and_paths(hub, oracle, tmp_path):
    oracle.push_to_hub(REPO)
    with pytest.raises(HubError, match="it has no revision 'v9'; give a branch, a tag or a commit"): FMCENet.from_pretrained(REPO, revision="v9")
    with pytest.raises(HubError, match="it has no revision 'v9'"): oracle.push_to_hub(REPO, revision="v9")
    with pytest.raises(HubError, match="a folder has no revisions"): FMCENet.from_pretrained(tmp_path, revision="main")
    with pytest.raises(HubError, match="is not a folder here"): FMCENet.from_pretrained(tmp_path/"none")
    with pytest.raises(HubError, match="FMCENet.load reads it"): FMCENet.from_pretrained(str(oracle.save(tmp_path/"o")))

def test_gated(hub, oracle, monkeypatch):
    oracle.push_to_hub(REPO)
    hub.gated.add(REPO)
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(HubError, match="access is granted by its owner.*hf auth login"): FMCENet.from_pretrained(REPO)
    assert_equal_oracles(FMCENet.from_pretrained(REPO, token=TOKEN), oracle)

@pytest.mark.parametrize("token", [None, "hf_wrong"])
def test_no_token(hub, oracle, monkeypatch, token):
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(HubError, match=r"Nothing was pushed to 'owner/tiny'.*refused \(401\).*`hf auth login`, set HF_TOKEN, or pass token="): oracle.push_to_hub(REPO, token=token)
    assert not hub.commits

def test_no_network(hub, oracle, monkeypatch, impatient):
    point_at(monkeypatch, closed_port())
    with pytest.raises(HubError, match="the Hub was not reached and the file is not in the local cache. Check the connection"): FMCENet.from_pretrained(REPO)
    with pytest.raises(HubError, match="Nothing was pushed.*the Hub was not reached"): oracle.push_to_hub(REPO)
    with pytest.raises(HubError, match="not in the local cache"): FMCENet.from_pretrained(REPO, local_files_only=True)

def test_the_hub_is_down(hub, oracle, impatient):
    hub.down = True
    with pytest.raises(HubError, match="not reached and the file is not in the local cache|answered 503"): FMCENet.from_pretrained(REPO)
    with pytest.raises(HubError, match="the Hub answered 503"): oracle.push_to_hub(REPO)

def test_a_licence_that_the_hub_does_not_know(hub, oracle):
    with pytest.raises(HubError, match='Nothing was pushed.*Invalid metadata in README.md.*"license" must be one of'): oracle.push_to_hub(REPO, license="my own")
    assert not hub.commits[REPO]

def test_without_huggingface_hub(oracle, monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ImportError, match="need the package huggingface_hub.*pip install huggingface_hub"): FMCENet.from_pretrained(REPO)
    with pytest.raises(ImportError, match="pip install huggingface_hub"): hub_module.push_files(".", REPO)

def test_a_full_disk_is_no_network(hub, oracle, monkeypatch):
    oracle.push_to_hub(REPO)
    import huggingface_hub
    def full(*args, **kwargs): raise OSError(28, "No space left on device")
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", full)
    with pytest.raises(OSError, match="No space left") as e: FMCENet.from_pretrained(REPO)
    assert e.value.errno == 28


# The card ------------------------------------------------------------------------------------------------------------
def test_the_card_tells_what_was_measured(hub, oracle):
    from huggingface_hub import ModelCard
    oracle.push_to_hub(REPO, license="apache-2.0")
    text = hub.commits[REPO][-1][1]["README.md"].decode()
    meta = ModelCard(text).data
    assert meta.license == "apache-2.0" and meta.library_name == "fmce_fastai" and {"fmce", "fastai", "fitted"} <= set(meta.tags)
    assert "| stage2 | eval | 0.0123 | 0.98 | 16 | 13 |" in text and "| network | TinyNet |" in text and "| trained on: held out | 13 |" in text and oracle.card["sha256"] in text
    assert "stage1 (12 channels), stage2 (16 channels)" in text.replace("stem (8 channels), ", "")

def test_the_card_says_what_is_not_known():
    text = model_card(dict(kind="mine"))
    assert "holds no measured figures" in text and "No licence for these weights was stated" in text and "license" not in text.split("---")[1]
    bad = model_card(dict(kind="fitted", run=dict(status="not converged", message="Train longer.")))
    assert "**The run it was fitted on is not converged:** Train longer." in bad

def test_the_cards_example_runs(hub, oracle):
    for repo, it in ((REPO, oracle), ("owner/universal", FMCENet.universal())):
        it.push_to_hub(repo)
        code = hub.commits[repo][-1][1]["README.md"].decode().split("```python\n")[1].split("```")[0]
        assert f'"{repo}"' in code and 4 <= len([l for l in code.splitlines() if l and not l.startswith("#")]) <= 8
        learn = tensor_learner()
        with learn.no_bar(), learn.no_logging(): exec(code, dict(learn=learn))
        assert len(learn.fmce.history) and learn.fmce.history.fit.nunique() == 1


# Learners ------------------------------------------------------------------------------------------------------------
def test_a_learner_with_the_callback_goes_there_and_back(hub, oracle, tmp_path, monkeypatch):
    pytest.importorskip("toml")
    from huggingface_hub import from_pretrained_fastai, push_to_hub_fastai
    learn = make_learner(cbs=FMCECallback(alpha=.5, oracle=oracle))
    with learn.no_bar(), learn.no_logging(): learn.fit(1)
    x = torch.randn(4, 3, 16, 16)
    want, path = learn.model.eval()(x), learn.path
    push_to_hub_fastai(learn, repo_id="owner/learner")
    learn.path = path
    files = hub.commits["owner/learner"][-1][1]
    assert b"FittedFMCENet" not in files["model.pkl"] and learn.fmce.oracle is not None
    folder = tmp_path/"bare"
    folder.mkdir()
    for name, data in files.items(): (folder/name).write_bytes(data)
    monkeypatch.chdir(tmp_path)
    for where in ("owner/learner", "bare"):
        with pytest.warns(UserWarning, match="pickle"): again = from_pretrained_fastai(where)
        assert torch.equal(again.model.eval()(x), want)
