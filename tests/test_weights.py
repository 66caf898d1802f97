"Contracts of `weight_report`: it only reads, and the usual traps are no findings."
import copy
import random
import warnings

import numpy as np
import pytest
import timm
import torch
from torch import nn

from fmce_fastai.report.weights import disturb, weight_report

def trained(name="test_vit", **kwargs):
    "A network that looks trained."
    return disturb(timm.create_model(name, num_classes=10, **kwargs))

def problems(model, **kwargs): return [(f.module, f.problem) for f in weight_report(model, **kwargs).findings]

def states(): return random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()


@pytest.mark.parametrize("name", ["test_resnet", "test_vit", "test_nfnet", "test_convnext2"])
def test_only_reads_and_is_healthy(name):
    model = trained(name).train()
    before, random_states = copy.deepcopy(model.state_dict()), states()
    report = weight_report(model)
    assert report.ok, str(report)
    assert repr(report).startswith("Healthy")
    assert states() == random_states and model.training
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())

def test_same_report_twice():
    model = trained()
    assert weight_report(model).tensors.equals(weight_report(model).tensors)

class LoRA(nn.Module):
    "A linear layer with an adapter, with the names that peft gives them."
    def __init__(self, layer, rank=8):
        super().__init__()
        self.base_layer = layer
        self.lora_A = nn.ModuleDict(dict(default=nn.Linear(layer.in_features, rank, bias=False)))
        self.lora_B = nn.ModuleDict(dict(default=nn.Linear(rank, layer.out_features, bias=False)))
        nn.init.zeros_(self.lora_B["default"].weight)

def with_lora(model):
    for b in model.blocks: b.attn.qkv = LoRA(b.attn.qkv)
    return model

def with_ema(model):
    from timm.utils import ModelEmaV3
    return ModelEmaV3(model)

def sin_cos(model):
    model.pos_embed.requires_grad_(False)
    return model

def tied(model):
    model.blocks[3] = model.blocks[1]
    return model

def frozen_norms():
    "A torchvision ResNet whose batch norms are buffers."
    from torchvision.models import resnet18
    from torchvision.ops import FrozenBatchNorm2d
    model = disturb(resnet18(norm_layer=FrozenBatchNorm2d))
    for m in model.modules():
        if isinstance(m, FrozenBatchNorm2d): m.weight += .1*torch.randn_like(m.weight); m.bias += .1*torch.randn_like(m.bias)
    return model

TRAPS = {
    "LoRA": lambda: with_lora(trained()), "EMA copy": lambda: with_ema(trained()), "half": lambda: trained().half(),
    "bfloat16": lambda: trained().bfloat16(), "fixed embedding": lambda: sin_cos(trained()), "tied": lambda: tied(trained()),
    "frozen batch norm": frozen_norms, "new head": lambda: nn.Sequential(trained("test_resnet"), nn.Linear(10, 3)),
    "relative position bias": lambda: trained("test_vit_relpos"), "DataParallel": lambda: nn.DataParallel(trained()),
}

@pytest.mark.parametrize("trap", TRAPS)
def test_traps(trap):
    torch.manual_seed(0)
    report = weight_report(TRAPS[trap]())
    assert report.ok, str(report)

def test_quantised():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch announces the move to torchao
        model = torch.ao.quantization.quantize_dynamic(trained(), {nn.Linear})
    assert problems(model) == []

def test_meta_device():
    with torch.device("meta"): model = timm.create_model("test_resnet")
    assert [p for _, p in problems(model)] == ["have tensors on the meta device"]

def test_lora_on_a_block_as_initialised():
    model, new = trained(), timm.create_model("test_vit")
    model.blocks[2] = new.blocks[2]
    assert problems(with_lora(model)) == [("blocks.2", "is as initialised")]

@pytest.mark.parametrize("name,stage", [("test_resnet", "layer1"), ("test_convnext", "stages.3"), ("test_vit", "blocks")])
def test_stage(name, stage):
    model, new = trained(name), timm.create_model(name, num_classes=10)
    model.get_submodule(stage).load_state_dict(new.get_submodule(stage).state_dict())
    assert (stage, "is as initialised") in problems(model)

def test_half_precision_as_initialised():
    assert problems(timm.create_model("test_vit").half()) == [("The whole network", "is as initialised")]

def test_norms_lost():
    model, new = trained("test_resnet"), timm.create_model("test_resnet")
    for a, b in zip(model.modules(), new.modules()):
        if isinstance(a, nn.BatchNorm2d): a.load_state_dict(b.state_dict())
    found = problems(model)
    assert ("layer4", "is partly as initialised") in found
    assert [m for m, p in found if p == "is as initialised"] == ["bn1"]  # a row without convolutions

def test_torchvision_and_a_class_of_ones_own():
    from torchvision.models import resnet18
    report = weight_report(resnet18())
    assert report.source == "torchvision's resnet18" and set(report.table.verdict) == {"as initialised"}
    class Net(nn.Sequential):
        def __init__(self): super().__init__(nn.Linear(32, 64), nn.LayerNorm(64), nn.Linear(64, 64), nn.Linear(64, 64))
    assert weight_report(Net()).source == "Net()"
    class Loads(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(32, 32)
            torch.nn.init.eye_(self.layer.weight)
            self.layer.bias.data = torch.arange(32.)
    assert "usual initialisers" in weight_report(Loads()).source  # a constructor without random numbers is no witness

def test_arguments():
    with pytest.raises(TypeError, match="function that makes one"): weight_report(trained(), fresh=3)
    with pytest.raises(TypeError, match="must return a new network"): weight_report(trained(), fresh=lambda: 3)
    with pytest.raises(ValueError, match="no parameters"): weight_report(nn.ReLU())

def test_json_and_html():
    import json
    report = weight_report(timm.create_model("test_resnet"))
    assert json.loads(json.dumps(report.to_dict()))["ok"] is False
    assert report.title in report._repr_html_() and repr(report).splitlines()[0] == report.title

def test_scale_out_of_line():
    model = trained()
    with torch.no_grad(): model.blocks[2].mlp.fc1.weight *= 100
    assert ("blocks.2", "has a scale out of line") in problems(model)
