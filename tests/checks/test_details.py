"""Rules at their edges: when a finding is graver, milder, or none."""

from __future__ import annotations

import os

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torch.utils.data.distributed import DistributedSampler

from evenkeel import BatchNorm2d, check, freeze

from .planted import Net, images, net, seen


def severities(model: nn.Module, code: str, **given) -> dict[str, str]:
    return {f.path: f.severity for f in check(model, **given).of(code)}


class Siamese(nn.Module):
    """One branch for two inputs, alike or not."""

    def __init__(self) -> None:
        super().__init__()
        self.branch, self.fc = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)), nn.Linear(4, 2)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return self.fc((self.branch(a) - self.branch(b)).abs().mean((2, 3)))


@pytest.mark.parametrize(("scale", "severity"), [(1.0, "note"), (3.0, "warning")])
def test_reuse_matters_where_values_differ(scale, severity):
    pair = (images(seed=1), scale * images(seed=2))
    (finding,) = check(Siamese(), pair).of("EK105")
    assert finding.severity == severity
    assert finding.evidence == 2


def test_bias_needs_a_norm_that_subtracts_it():
    sure = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    assert severities(sure, "EK101", example=torch.randn(8, 3)) == {"0": "note"}
    assert severities(sure, "EK101") == {}  # a dense layer's output may have three axes

    class Used(Net):
        def body(self, x: Tensor) -> Tensor:
            y = self.conv1(x)
            return self.bn1(y)[:, :6] + y[:, :6]

    assert severities(Used(bias=True), "EK101", example=images()) == {}
    three = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(5))
    assert severities(three, "EK101", example=torch.randn(8, 5, 3)) == {}
    pooled = nn.Sequential(nn.Conv2d(3, 4, 3), nn.MaxPool2d(2), nn.BatchNorm2d(4))
    assert severities(pooled, "EK101", example=images()) == {}
    layer = nn.Sequential(nn.Conv2d(3, 4, 3), nn.LayerNorm(6))
    assert severities(layer, "EK101", example=images()) == {}


def test_logits_are_outputs_and_not_features():
    class Features(Net):
        def forward(self, x: Tensor) -> list[Tensor]:
            a = self.bn1(self.conv1(x))
            return [a, self.bn2(self.conv2(F.relu(a)))]

    assert severities(Features(), "EK102", example=images()) == {}
    pooled = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Softmax(1)
    )
    assert severities(pooled, "EK102", example=images()) == {"1": "warning"}
    assert severities(pooled, "EK102") == {"1": "warning"}
    active = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
    assert severities(active, "EK102", example=images()) == {}
    neck = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.BatchNorm2d(4))
    assert severities(neck, "EK102", example=images()) == {}


def test_dropout_is_judged_by_what_it_does():
    def chain(*layers: nn.Module) -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Conv2d(3, 8, 3), *layers, nn.Flatten(), nn.LazyLinear(5))

    x = images(64)
    norm = BatchNorm2d(8)
    for rate, grade in ((0.5, "warning"), (0.05, "note")):
        assert severities(chain(nn.Dropout(rate), norm), "EK104", example=x) == {"2": grade}
    behind = chain(norm, nn.Dropout(0.5))
    assert severities(behind, "EK104", example=x) == {}
    off = chain(nn.Dropout(0.5).eval(), norm)
    assert severities(off, "EK104", example=x) == {}
    for rate, grade in ((0.5, "warning"), (0.1, "note")):  # without a run, by the rate
        assert severities(chain(nn.Dropout(rate), norm), "EK104") == {"2": grade}
    far = chain(nn.Dropout(0.5), nn.Conv2d(8, 8, 1), nn.ReLU(), norm)
    assert severities(far, "EK104") == {"4": "note"}


def test_functional_dropout_counts_when_it_is_on():
    class Drops(Net):
        on = True

        def body(self, x: Tensor) -> Tensor:
            x = F.dropout(self.conv1(x), 0.5, training=self.training and self.on)
            return F.relu(self.bn2(self.conv2(F.relu(self.bn1(x)))))

    model = Drops()
    assert severities(model, "EK104", example=images(64)) == {"bn1": "warning"}
    model.on = False
    assert severities(model, "EK104", example=images(64)) == {}


def test_norms_in_disguise_fix_the_image_size():
    model = nn.Sequential(nn.Conv2d(3, 2, 3), nn.Flatten(), nn.BatchNorm1d(72), nn.Linear(72, 3))
    (finding,) = check(model, images()).of("EK106")
    assert (finding.path, finding.evidence) == ("2", 36)
    pooled = nn.Sequential(
        nn.Conv2d(3, 9, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.BatchNorm1d(9)
    )
    assert severities(pooled, "EK106", example=images()) == {}


def test_branches_of_training_alone_are_no_skipped_norms():
    """An auxiliary head as a whole, as in Inception."""

    class Auxiliary(Net):
        def __init__(self, bias: bool = False) -> None:
            super().__init__(bias)
            self.head = nn.Sequential(nn.Conv2d(8, 4, 1), nn.BatchNorm2d(4))

        def forward(self, x: Tensor) -> list[Tensor]:
            y = F.relu(self.bn1(self.conv1(x)))
            out = [self.fc(F.relu(self.bn2(self.conv2(y))).mean((2, 3)))]
            return [*out, self.head(y).mean((2, 3))] if self.training else out

    assert severities(Auxiliary(), "EK108", example=images()) == {}
    assert severities(Auxiliary(), "EK108") == {}


def test_norms_of_inference_alone():
    class Late(Net):
        def forward(self, x: Tensor) -> Tensor:
            y = self.conv1(x)
            y = y if self.training else self.bn1(y)
            return self.fc(F.relu(self.bn2(self.conv2(F.relu(y)))).mean((2, 3)))

    (finding,) = check(Late(), images()).of("EK108")
    assert "called in inference and not in training" in finding.message
    assert severities(Late(), "EK108") == {"bn1": "error"}  # torch.fx


def test_a_norm_that_does_not_listen_to_eval():
    class Stubborn(nn.BatchNorm2d):
        def train(self, mode: bool = True) -> nn.Module:
            return super().train(True)

    model = nn.Sequential(nn.Conv2d(3, 4, 3), Stubborn(4), nn.ReLU()).eval()
    (finding,) = check(model, images()).of("EK109")
    assert "eval() leaves it in training" in finding.message


def test_freezing_on_purpose_is_at_most_a_note():
    model = net()
    model.bn1.eval().requires_grad_(False)
    assert severities(model, "EK201") == {"bn1": "note"}
    assert severities(model, "EK203") == {}
    lasting = net()
    freeze(lasting)
    assert severities(lasting.train(), "EK201") == {"bn1": "note", "bn2": "note"}
    freeze(lasting, affine=True)
    assert severities(lasting, "EK201") == {}
    assert severities(lasting, "EK203") == {}


def test_never_updated_depends_on_the_rest():
    fresh = Net()
    assert severities(fresh, "EK301") == {"bn1": "note", "bn2": "note"}
    part = net()
    part.bn2.reset_running_stats()
    assert severities(part, "EK301") == {"bn2": "warning"}
    assert severities(Net(), "EK301", checkpoint=Net().state_dict()) == dict.fromkeys(
        ("bn1", "bn2"), "error"
    )
    for p in (*fresh.bn1.parameters(), *fresh.bn2.parameters()):  # as DCGAN and RepVGG begin
        nn.init.normal_(p, 1, 0.02)
    assert severities(fresh, "EK301") == {"bn1": "note", "bn2": "note"}
    assert severities(fresh.eval(), "EK301") == {"bn1": "warning", "bn2": "warning"}


def test_a_norm_on_a_branch_of_a_norm_is_no_second_one():
    """As in RepGhost, whose identity branch has a norm of its own."""

    class Branch(Net):
        def __init__(self, bias: bool = False) -> None:
            super().__init__(bias)
            self.act, self.again = nn.Identity(), nn.BatchNorm2d(8)

        def body(self, x: Tensor) -> Tensor:
            y = self.act(self.bn1(self.conv1(x)))
            return F.relu(self.bn2(self.conv2(y.abs() + self.again(y))))

    assert severities(Branch(), "EK103", example=images()) == {}


def test_few_vanished_channels_are_a_note():
    model = net()
    model.bn1.running_var[0] = 1e-14
    assert severities(model, "EK304") == {"bn1": "note"}
    model.bn1.running_var[1] = 1e-40
    (finding,) = check(model).of("EK304")
    assert "2 of 8 variances have vanished" in finding.message
    assert "(1 subnormal)" in finding.message
    assert "multiplied by 316" in finding.message
    assert finding.fixable


def test_half_precision_for_inference_is_a_note():
    model = net().half().eval()
    assert set(severities(model, "EK305").values()) == {"note"}
    assert severities(net().bfloat16(), "EK305") == {"bn1": "warning", "bn2": "warning"}
    (finding, _) = check(net().bfloat16()).of("EK305")
    assert finding.evidence == 2**-7


@pytest.mark.parametrize(
    ("momentum", "severity"),
    [(0.9, "warning"), (0.999, "warning"), (1.0, "warning"), (1.5, "error"), (-0.1, "error"),
     (0.0, "note"), (0.5, None), (0.1, None), (0.0003, None), (None, None)],
)  # fmt: skip
def test_momenta(momentum, severity):
    model = net()
    model.bn1.momentum = momentum
    assert severities(model, "EK403").get("bn1") == severity


def test_a_momentum_of_zero_in_a_fresh_norm():
    model = Net()
    model.bn1.momentum = 0.0
    assert severities(model, "EK403") == {"bn1": "warning"}


@pytest.mark.parametrize(
    ("eps", "severity"),
    [(1e-3, "note"), (1e-6, "note"), (2e-5, None), (1e-12, "warning"), (-1e-5, "error")],
)
def test_epsilons(eps, severity):
    model = net()
    model.bn1.eps = eps
    assert severities(model, "EK404").get("bn1") == severity
    assert "bn2" not in severities(model, "EK404")


def test_eps_zero_in_single_precision_is_a_warning_until_a_variance_is_zero():
    model = net()
    model.bn1.eps = 0.0
    assert severities(model, "EK405") == {"bn1": "warning"}
    model.bn1.running_var[0] = 0
    assert severities(model, "EK405") == {"bn1": "error"}


def test_gamma_may_begin_at_zero():
    model = Net()
    nn.init.zeros_(model.bn2.weight)
    assert severities(model, "EK401") == {}
    assert severities(seen(model), "EK401") == {"bn2": "warning"}
    with torch.no_grad():
        model.bn2.weight[1:] = 1
    assert severities(model, "EK401") == {"bn2": "note"}


def test_usual_weight_decay_is_a_note():
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=1e-4)
    found = check(model, optimizer=optimizer).of("EK406")
    assert {f.severity for f in found} == {"note"}
    assert {f.evidence for f in found} == {1e-4}
    assert "halves them in 69,315 steps" in found[0].message
    resting = torch.optim.SGD(model.parameters(), lr=0.0, weight_decay=1e-4)
    assert {f.severity for f in check(model, optimizer=resting).of("EK406")} == {"note"}


def test_a_frozen_norm_need_not_be_in_the_optimizer():
    model = net()
    model.bn1.requires_grad_(False)
    head = torch.optim.SGD([*model.fc.parameters(), *model.bn2.parameters()], lr=0.1)
    assert severities(model, "EK407", optimizer=head) == {}
    model.bn2.eval()
    body = torch.optim.SGD(model.fc.parameters(), lr=0.1)
    assert severities(model, "EK407", optimizer=body) == {"bn2": "note"}


def test_counts_from_the_example_alone_are_notes():
    """Its batch is for the shape; only one value in a batch of several is sure to be wrong."""
    small = images(2, size=5)
    assert severities(net(), "EK502", example=small) == {"bn2": "note"}
    assert severities(net(), "EK501", example=small[:1]) == {"bn2": "note"}
    wide = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    assert severities(wide, "EK501", example=torch.randn(2, 3)) == {}
    assert severities(net(), "EK502", data=small) == {"bn2": "warning"}


def test_the_last_batch_of_a_loader_is_known_without_reading_it():
    x = images(16 * 20 + 1, size=5)
    loader = DataLoader(TensorDataset(x), batch_size=16)
    (finding,) = check(net(), data=loader).of("EK501")
    assert "from a batch of 1" in finding.message
    sampler = DistributedSampler(TensorDataset(x), num_replicas=4, rank=0)  # 81 for each
    shared = DataLoader(TensorDataset(x), batch_size=16, sampler=sampler)
    assert check(net(), data=shared).of("EK501")
    even = DataLoader(TensorDataset(x[:-1]), batch_size=16)
    assert not check(net(), data=even).of("EK501")
    single = DataLoader(TensorDataset(x), batch_size=1)
    assert check(net(), data=single).of("EK501")


def test_small_batches_of_frozen_norms_do_no_harm():
    model = net()
    freeze(model)
    assert severities(model.train(), "EK503", data=images(4)) == {}


@pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="this torch has no gloo")
def test_sync_norms_on_the_cpu_of_several_processes(tmp_path):
    """The error that torch would raise in training is told; the check itself runs all the same."""
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    store = f"file://{tmp_path}/store"
    torch.distributed.init_process_group("gloo", init_method=store, rank=0, world_size=1)
    try:
        model = nn.SyncBatchNorm.convert_sync_batchnorm(net())
        with pytest.raises(ValueError, match="SyncBatchNorm expected input tensor to be on"):
            model(images())
        found = check(model, images(), images(64).split(16))
        assert {f.path: f.severity for f in found.of("EK504")} == {"bn1": "error", "bn2": "error"}
        assert not any("EK306" in u.codes or "EK101" in u.codes for u in found.unchecked)
        assert type(model.bn1) is nn.SyncBatchNorm
    finally:
        torch.distributed.destroy_process_group()
        del os.environ["GLOO_SOCKET_IFNAME"]
