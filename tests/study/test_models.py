"""The networks: their layers, their weights from the seed, and networks of users."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from evenkeel.errors import ConfigError
from evenkeel.study.models import ACTIVATIONS, MODELS, build, source_fingerprint

SHAPES = [(1, 8, 8), (1, 28, 28), (3, 32, 32), (3, 64, 48)]


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_network_takes_every_image_size(name, shape):
    model = build(name, shape, 7, "relu", seed=0)
    assert model(torch.rand(2, *shape)).shape == (2, 7)
    assert not [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._NormBase)]


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_the_activation_is_the_arms(name, activation):
    kinds = {type(m) for m in build(name, (1, 8, 8), 10, activation, seed=0).modules()}
    mine = type(ACTIVATIONS[activation]())
    assert mine in kinds
    assert not kinds & {type(make()) for make in ACTIVATIONS.values()} - {mine}


def test_the_standard_network_is_the_textbooks():
    model = build("standard", (1, 28, 28), 10, "relu", seed=0)
    kinds = [type(module).__name__ for module in model.children()]
    half = ["Conv2d", "ReLU", "MaxPool2d"]
    assert kinds == [*half, *half, "Flatten", "Linear", "ReLU", "Linear"]


def test_the_papers_network():
    model = build("paper", (1, 28, 28), 10, "sigmoid", seed=0)
    layers = [m for m in model.children() if isinstance(m, nn.Linear)]
    assert [layer.out_features for layer in layers] == [100, 100, 100, 10]
    weights = torch.cat([layer.weight.detach().flatten() for layer in layers])
    assert abs(float(weights.std()) - 0.05) < 0.001
    assert all(not layer.bias.any() for layer in layers)


def test_lenet5_on_mnist_has_the_published_sizes():
    model = build("lenet5", (1, 28, 28), 10, "sigmoid", seed=0)
    assert sum(p.numel() for p in model.parameters()) == 61_706


def test_weights_depend_on_the_seed_alone():
    torch.manual_seed(123)
    before = torch.random.get_rng_state()
    first = build("standard", (1, 8, 8), 10, "relu", seed=5)
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.manual_seed(7)
    second = build("standard", (1, 8, 8), 10, "relu", seed=5)
    third = build("standard", (1, 8, 8), 10, "relu", seed=6)
    assert torch.equal(first.conv1.weight, second.conv1.weight)
    assert not torch.equal(first.conv1.weight, third.conv1.weight)


def test_residual_nets_share_their_weights_and_differ_in_order():
    post = build("residual", (1, 8, 8), 10, "relu", seed=0)
    pre = build("residual-pre", (1, 8, 8), 10, "relu", seed=0)
    ours = {key: value.shape for key, value in post.state_dict().items()}
    assert ours == {key: value.shape for key, value in pre.state_dict().items()}


class TestOwn:
    """A user's factory, in a module of the folder that evenkeel runs in."""

    @pytest.fixture(autouse=True)
    def folder(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr("sys.path", ["/nowhere", *__import__("sys").path])
        yield
        for name in ("own_nets", "broken_nets", "raising_nets"):
            __import__("sys").modules.pop(name, None)

    def write(self, text, name="own_nets"):
        (__import__("pathlib").Path.cwd() / f"{name}.py").write_text(text)

    def test_it_gets_the_arguments_that_it_asks_for(self):
        self.write(
            "from torch import nn\n"
            "def make(classes, shape):\n"
            "    return nn.Sequential(nn.Flatten(), nn.Linear(shape[1] * shape[2], classes))\n"
            "class Net(nn.Sequential):\n"
            "    def __init__(self):\n"
            "        super().__init__(nn.Flatten(), nn.Linear(64, 10))\n"
        )
        assert build("own_nets:make", (1, 8, 8), 4, "relu", 0)[1].out_features == 4
        assert build("own_nets:Net", (1, 8, 8), 4, "relu", 0)[1].out_features == 10

    def test_its_fingerprint_follows_its_file(self):
        self.write("def make():\n    return 1\n")
        first = source_fingerprint("own_nets:make")
        self.write("def make():\n    return 2\n")
        assert source_fingerprint("own_nets:make") != first

    @pytest.mark.parametrize(
        ("name", "message"),
        [
            ("no_such_module:make", "'no_such_module' of model .* cannot be imported"),
            ("own_nets:missing", "module 'own_nets' has no 'missing'"),
            ("own_nets:number", "is of type int, not a function or class"),
            ("own_nets:fails", "failed with ZeroDivisionError: division by zero; it is called"),
            ("own_nets:wants_more", "failed with TypeError.*'depth'"),
            ("own_nets:gives_none", "returned NoneType, not a torch.nn.Module"),
            ("broken_nets:make", "'broken_nets' of model .* cannot be imported .*no_such_thing"),
            (":make", "names no network; write package.module:factory"),
            ("own_nets:", "names no network"),
            ("raising_nets:make", "cannot be imported .ZeroDivisionError: division by zero.;"),
        ],
    )
    def test_what_is_wrong_is_named(self, name, message):
        self.write(
            "number = 3\n"
            "def fails():\n    return 1 / 0\n"
            "def wants_more(depth):\n    pass\n"
            "def gives_none():\n    pass\n"
        )
        self.write("import no_such_thing\n", "broken_nets")
        self.write("1 / 0\n", "raising_nets")
        with pytest.raises(ConfigError, match=message):
            build(name, (1, 8, 8), 10, "relu", 0)


def test_unknown_names_are_refused():
    with pytest.raises(ConfigError, match="unknown model 'vgg'; choose one of standard"):
        build("vgg", (1, 8, 8), 10, "relu", 0)
    with pytest.raises(ConfigError, match="unknown activation 'gelu'"):
        build("standard", (1, 8, 8), 10, "gelu", 0)
