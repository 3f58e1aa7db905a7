"""Networks written for Darknet: read by the oracle they compute what they did in torch."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import evenkeel
from evenkeel.errors import ConfigError, SurgeryError
from evenkeel.formats import darknet
from evenkeel.formats.darknet import saving
from evenkeel.study.models import MODELS

from . import oracle
from .samples import image, loaded, text, weights_for
from .test_darknet_load import CLASSIFIER, DETECTOR, OTHERS


def stirred(network: nn.Module, seed: int = 0) -> nn.Module:
    """The network with statistics and parameters as training might leave them."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in network.modules():
            if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
                shape = module.running_mean.shape
                module.running_mean.copy_(torch.randn(shape, generator=generator))
                module.running_var.copy_(torch.rand(shape, generator=generator) + 0.1)
                if module.affine:
                    module.weight.copy_(torch.randn(shape, generator=generator))
                    module.bias.copy_(torch.randn(shape, generator=generator))
    return network


def agrees(folder: Path, network: nn.Module, x: Tensor, **options: str) -> str:
    """Writes it, and compares what the oracle makes of the files; returns the .cfg's text."""
    cfg, weights = folder / "new.cfg", folder / "new.weights"
    modes = [m.training for m in network.modules()]
    state = {name: value.clone() for name, value in network.state_dict().items()}
    saved = darknet.save(network, cfg, weights, x, **options)
    assert [m.training for m in network.modules()] == modes
    assert all(torch.equal(value, state[name]) for name, value in network.state_dict().items())
    assert saved.difference <= 1e-5 * saved.scale
    assert saved.bytes == weights.stat().st_size
    outside = options.get("convention") == "darknet-cpu"
    with torch.no_grad():
        wanted = network.eval()(x).flatten(1).double().numpy()
    for one, y in zip(x, wanted, strict=True):
        z = oracle.run(cfg.read_text(), weights.read_bytes(), one.numpy(), outside=outside)[-1]
        np.testing.assert_allclose(z.ravel(), y, rtol=1e-4, atol=1e-5)
    return cfg.read_text()


@pytest.mark.parametrize("convention", ["darknet-cpu", "darknet-gpu", "alexeyab-gpu"])
@pytest.mark.parametrize("source", [CLASSIFIER, DETECTOR, OTHERS], ids=["cl", "det", "others"])
def test_there_and_back(tmp_path, source, convention):
    """To the bit, but for the variances where epsilon is outside: to their rounding."""
    data = weights_for(source, revision=5 if convention.startswith("alexeyab") else 0)
    network = loaded(tmp_path, source, data, convention=convention)
    saved = darknet.save(network, tmp_path / "a.cfg", tmp_path / "a.weights")
    assert oracle.sections((tmp_path / "a.cfg").read_text()) == oracle.sections(source)
    again = (tmp_path / "a.weights").read_bytes()
    assert again[:20] == data[:20]
    assert saved.convention == convention
    if convention == "darknet-cpu":
        one, other = (np.frombuffer(d, "<f4", offset=20) for d in (again, data))
        np.testing.assert_allclose(one, other, rtol=3e-6)
    else:
        assert again == data


def test_what_darknet_wrote_comes_back(tmp_path, darknets_files):
    for name in ("mnist", "heads"):
        cfg, weights = (darknets_files / f"{name}.{end}" for end in ("cfg", "weights"))
        darknet.save(darknet.load(cfg, weights), tmp_path / "a.cfg", tmp_path / "a.weights")
        assert (tmp_path / "a.weights").read_bytes() == weights.read_bytes()
        assert oracle.sections((tmp_path / "a.cfg").read_text()) == oracle.sections(cfg.read_text())


@pytest.mark.parametrize("convention", ["darknet-cpu", "darknet-gpu"])
@pytest.mark.parametrize("placement", ["before-activation", "after-activation", "after-pooling"])
@pytest.mark.parametrize("name", list(MODELS))
def test_the_studys_networks(tmp_path, name, placement, convention):
    x = image(2, 12, 12)
    torch.manual_seed(0)
    network = MODELS[name]((2, 12, 12), 5, "relu")
    try:
        network, _ = evenkeel.introduce(network, x, placement)
    except SurgeryError:
        pytest.skip(f"{name} has no pooling")
    agrees(tmp_path, stirred(network), x, convention=convention)


class Mixed(nn.Module):
    """Functions, methods, sums and concatenations, in orders that need a [route]."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 6, 3, padding=1)
        self.norm = nn.BatchNorm2d(6, eps=1e-3)
        self.left = nn.Conv2d(6, 4, 1, bias=False)
        self.left_norm = nn.BatchNorm2d(4, affine=False)
        self.right = nn.Conv2d(6, 4, 3, padding="same", groups=2)
        self.down = nn.Conv2d(14, 8, (3, 3), stride=(2, 2), padding=(1, 1))
        self.up = nn.Upsample(scale_factor=2)
        self.head = nn.Linear(22, 4)

    def forward(self, x: Tensor) -> Tensor:
        stem = F.relu(self.norm(self.first(x)))
        left = torch.tanh(self.left_norm(self.left(stem)))
        right = self.right(stem).sigmoid()
        both = torch.cat([left, right, stem], 1)
        low = self.down(both).relu_()
        high = F.max_pool2d(both, 2, 2, ceil_mode=True)
        wide = F.avg_pool2d(self.up(high), 2)
        total = torch.add(wide, high) + high
        total = torch.cat((low, total), dim=1)
        pooled = F.adaptive_avg_pool2d(total, 1)
        flat = torch.flatten(F.dropout(pooled, 0.3, self.training), 1)
        return self.head(flat).softmax(dim=1)


def test_functions_sums_and_routes(tmp_path):
    cfg = agrees(tmp_path, stirred(Mixed()), image(3, 8, 8))
    names = [name for name, _ in oracle.sections(cfg)]
    assert names.count("convolutional") == 5
    assert {"route", "shortcut", "softmax", "dropout", "avgpool"} <= set(names)


class Two(nn.Module):
    def __init__(self, how: str) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 2, 1)
        self.relu = nn.ReLU(inplace=True)
        self.how = how

    def forward(self, x: Tensor, *more: Tensor) -> object:
        y = self.conv(x)
        if self.how == "image":
            return y + x
        if self.how == "functions":
            up = F.interpolate(F.leaky_relu(y, 0.1), scale_factor=2)
            return F.elu(up).view(x.size(0), -1)
        if self.how == "alias":
            return self.conv(self.relu(y)) + y
        if self.how == "means":
            return y.mean()
        if self.how == "outputs":
            return y, y
        if self.how == "product":
            return y * 2
        if self.how == "wide":
            return y + y.mean((2, 3), keepdim=True)
        if self.how == "reshape":
            return y.reshape(2, 4, -1)
        if self.how == "branch":
            return y if y.sum() > 0 else -y
        return torch.cat([y, y], 2)


def small(*layers: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), *layers)


@pytest.mark.parametrize(
    "network",
    [
        small(nn.BatchNorm2d(4), nn.LeakyReLU(0.1)),
        small(nn.LeakyReLU(0.01), nn.BatchNorm2d(4), nn.ELU()),
        small(nn.MaxPool2d(3, 2, 1), nn.Hardtanh()),
        small(nn.MaxPool2d(2, 2), nn.SiLU()),
        small(nn.MaxPool2d(3, 3), nn.Mish(), nn.Flatten(), nn.Linear(16, 3), nn.Softmax(1)),
        small(nn.AvgPool2d(3, 2, 1), nn.Tanh()),
        small(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.BatchNorm1d(4), nn.ReLU6()),
        small(nn.Flatten(), nn.Linear(4 * 36, 6), nn.Sigmoid(), nn.BatchNorm1d(6)),
        nn.Sequential(nn.BatchNorm2d(2), nn.Conv2d(2, 3, 1), nn.Identity()),
        nn.Sequential(nn.ReLU(), nn.Conv2d(2, 3, 2, 2, 1)),
        small(evenkeel.BatchNorm2d(4), nn.ReLU()),
        nn.Sequential(nn.Dropout(0.2), nn.LeakyReLU(0.1, inplace=True), nn.Conv2d(2, 3, 1, 2)),
        small(nn.AvgPool2d(1, 2), nn.AdaptiveAvgPool2d((3, 3)), nn.Conv2d(4, 2, 1, 2, bias=False)),
        Two("image"),
        Two("functions"),
    ],
    ids=range(15),
)
def test_layers(tmp_path, network):
    agrees(tmp_path, stirred(network), image(2, 6, 6), convention="alexeyab-gpu")


def test_variances_below_darknets_epsilon(tmp_path):
    """A smaller epsilon here than Darknet's is made up for by gamma."""
    network = stirred(nn.Sequential(nn.Conv2d(2, 4, 1), nn.BatchNorm2d(4, eps=1e-9)))
    network[1].running_var.copy_(torch.tensor([0.0, 1e-7, 1e-5, 1.0]))
    network[1].running_mean.zero_()
    for convention in ("darknet-gpu", "darknet-cpu"):
        agrees(tmp_path, network, image(2, 3, 3), convention=convention)


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel:UserWarning")
@pytest.mark.parametrize(
    ("network", "message"),
    [
        (Two("alias"), "'relu', relu (ReLU), cannot be written for Darknet: it writes over"),
        (Two("means"), "averages whole images"),
        (small().bfloat16(), "0.weight is in bfloat16, and Darknet computes in float32"),
        (Two("outputs"), "Darknet's networks give one output"),
        (Two("product"), "'mul', mul, cannot be written for Darknet: Darknet has no layer for it"),
        (Two("wide"), "its values are of different shapes"),
        (Two("reshape"), "which is no flattening"),
        (Two("branch"), "the network cannot be traced"),
        (Two("rows"), "joins channels"),
        (small(nn.LeakyReLU(0.3)), "'_1', 1 (LeakyReLU), cannot be written for Darknet"),
        (small(nn.PReLU()), "Darknet has no layer for it"),
        (nn.Conv2d(2, 2, (1, 3)), "size=(1, 3), and Darknet has one for both axes"),
        (nn.Conv2d(2, 2, 3, dilation=2), "it is dilated"),
        (nn.Conv2d(2, 2, 3, padding=1, padding_mode="reflect"), "padded with something else"),
        (nn.Conv2d(2, 2, 4, padding="same"), "more on one side"),
        (nn.Conv2d(2, 2, 3, padding="same", dilation=2), "it is dilated"),
        (small(nn.BatchNorm2d(4, track_running_stats=False)), "has no running statistics"),
        (small(nn.Flatten(), nn.BatchNorm1d(4 * 36)), "a mean for each value"),
        (small(nn.AdaptiveAvgPool2d(2)), "averages whole images"),
        (small(nn.AvgPool2d(2, padding=1, count_include_pad=False)), "leaves its padding out"),
        (small(nn.AvgPool2d(4, 3, ceil_mode=True)), "rounds its size up"),
        (small(nn.MaxPool2d(4, 3, ceil_mode=True, padding=1)), "cannot round its size up so"),
        (small(nn.MaxPool2d(5, 4, ceil_mode=True)), "Darknet cannot round its size up so"),
        (small(nn.MaxPool2d(2, dilation=2)), "it is dilated"),
        (small(nn.Linear(6, 3)), "applied to more than one axis"),
        (small(nn.Softmax(1)), "over all values of an image"),
        (small(nn.Upsample(scale_factor=2, mode="bilinear")), "repeats places"),
        (small(nn.GroupNorm(2, 4)), "Darknet has no layer for it"),
        (small(nn.ConvTranspose2d(4, 2, 2)), "Darknet has no layer for it"),
    ],
)
def test_what_darknet_cannot_say(tmp_path, network, message):
    x = image(2, 6, 6)
    with pytest.raises(SurgeryError, match=re.escape(message)):
        darknet.save(network, tmp_path / "a.cfg", tmp_path / "a.weights", x)
    assert list(tmp_path.iterdir()) == []


def test_bad_calls(tmp_path):
    network, x = small(), image(2, 6, 6)
    with pytest.raises(ConfigError, match="give an example, a batch of images"):
        darknet.save(network, tmp_path / "a.cfg", tmp_path / "a.weights")
    with pytest.raises(ConfigError, match="the example has no image"):
        darknet.save(network, tmp_path / "a.cfg", tmp_path / "a.weights", x[:0])
    zero = nn.Sequential(nn.Conv2d(2, 2, 1), nn.ReLU6())
    nn.init.zeros_(zero[0].weight)
    nn.init.zeros_(zero[0].bias)
    with pytest.raises(SurgeryError, match="nothing but zeros"):
        darknet.save(zero, tmp_path / "a.cfg", tmp_path / "a.weights", x, convention="alexeyab-gpu")
    with pytest.raises(ConfigError, match="has swish, which only AlexeyAB's Darknet knows"):
        darknet.save(small(nn.SiLU()), tmp_path / "a.cfg", tmp_path / "a.weights", x)
    with pytest.raises(ConfigError, match="two files"):
        darknet.save(network, tmp_path / "a", tmp_path / "a", x)
    with pytest.raises(ConfigError, match="'torch' is no build of Darknet"):
        darknet.save(network, tmp_path / "a.cfg", tmp_path / "a.weights", x, convention="torch")
    with pytest.raises(SurgeryError, match="Darknet takes images"):
        darknet.save(network, tmp_path / "a.cfg", tmp_path / "a.weights", x.flatten(1))
    with pytest.raises(ConfigError, match="cannot be written"):
        darknet.save(network, tmp_path / "none" / "a.cfg", tmp_path / "a.weights", x)
    assert list(tmp_path.iterdir()) == []


def test_a_beta_that_pjreddies_program_does_not_store(tmp_path):
    source = text((2, 4, 4), "convolutional filters=3 activation=linear", "batchnorm")
    network = loaded(tmp_path, source, weights_for(source, revision=5), convention="alexeyab-gpu")
    paths = tmp_path / "a.cfg", tmp_path / "a.weights"
    with pytest.raises(ConfigError, match=r"layer 1, \[batchnorm\], has a beta"):
        darknet.save(network, *paths, convention="darknet-gpu")
    assert not paths[0].exists()
    darknet.save(network, *paths)
    x = image(2, 4, 4)
    again = darknet.load(*paths, convention="alexeyab-gpu")
    assert torch.equal(again(x), network(x))


def test_files_that_compute_something_else_are_not_kept(tmp_path, monkeypatch):
    paths = tmp_path / "a.cfg", tmp_path / "a.weights"
    darknet.save(small(), *paths, image(2, 6, 6))
    before = paths[1].read_bytes()
    right = saving.numbers_of
    monkeypatch.setattr(saving, "numbers_of", lambda *args: right(*args) * 1.001)
    with pytest.raises(SurgeryError, match=r"would differ by .*; nothing was written"):
        darknet.save(small(), *paths, image(2, 6, 6))
    assert paths[1].read_bytes() == before
    assert len(list(tmp_path.iterdir())) == 2


def test_what_no_longer_is_what_the_cfg_says(tmp_path):
    """Without an example it is run on a random image, too."""
    network = loaded(tmp_path, CLASSIFIER, weights_for(CLASSIFIER))
    network.layers[0].activation = nn.Tanh()
    with pytest.raises(SurgeryError, match="would differ"):
        darknet.save(network, tmp_path / "a.cfg", tmp_path / "a.weights")
    network.layers[2].norm.running_var[1] = -1
    with pytest.raises(SurgeryError, match=r"layers\.2\.norm\.running_var has values below 0"):
        darknet.save(network, tmp_path / "a.cfg", tmp_path / "a.weights")


@pytest.mark.parametrize("convention", ["darknet-cpu", "darknet-gpu"])
def test_a_folded_detector_keeps_its_sections(tmp_path, convention):
    source = DETECTOR.replace("[net]", "[net]\nlearning_rate=0.5").replace(
        "[batchnorm]", "[avgpool]"
    )
    source = source.replace("[avgpool]", "[activation]\nactivation=leaky")
    network = loaded(tmp_path, source, weights_for(source), convention=convention)
    x = image(3, 8, 8)
    folded, report = evenkeel.fold(network, x)
    assert not report.left
    saved = darknet.save(folded, tmp_path / "f.cfg", tmp_path / "f.weights", x, like=network)
    kept = oracle.sections((tmp_path / "f.cfg").read_text())
    wanted = [(name, {k: v for k, v in options.items() if k != "batch_normalize"})
              for name, options in oracle.sections(source)]  # fmt: skip
    assert kept == wanted
    assert (tmp_path / "f.weights").read_bytes()[:20] == (tmp_path / "net.weights").read_bytes()[
        :20
    ]
    assert saved.convention == convention


def test_a_norm_that_is_folded_forward_is_traced(tmp_path):
    source = text(
        (2, 6, 6), "convolutional filters=3 activation=leaky", "batchnorm",
        "convolutional filters=4 size=1 activation=linear",
    )  # fmt: skip
    network = loaded(tmp_path, source, weights_for(source))
    x = image(2, 6, 6)
    folded, report = evenkeel.fold(network, x)
    assert not report.left
    darknet.save(folded, tmp_path / "f.cfg", tmp_path / "f.weights", x, like=network)
    assert "batchnorm" not in (tmp_path / "f.cfg").read_text()
    torch.testing.assert_close(
        darknet.load(tmp_path / "f.cfg", tmp_path / "f.weights")(x),
        network(x),
        atol=1e-5,
        rtol=1e-4,
    )


def test_trained_further_and_written(tmp_path):
    """A network from Darknet, trained on in torch, goes back."""
    network = loaded(tmp_path, CLASSIFIER, weights_for(CLASSIFIER)).train()
    optimizer = torch.optim.SGD(network.parameters(), 0.1)
    for seed in range(3):
        network(image(2, 9, 11, seed=seed)).square().sum().backward()
        optimizer.step()
    agrees(tmp_path, network, image(2, 9, 11))
