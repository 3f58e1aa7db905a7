"""`exchange` in a network's life: optimizers, hooks, modes, sharing, precision, wrappers."""

from __future__ import annotations

import inspect

import pytest
import torch
from torch import nn

from evenkeel.surgery.exchange import exchange

from .nets import randomized, state
from .test_exchange import batch, net


class TestInPlace:
    @pytest.mark.parametrize("to", ["sync", "evenkeel", "frozen", "group", "n c h w -> c"])
    def test_optimizers_go_on(self, to):
        model = net().train()
        parameters = list(model.parameters())
        optimizer = torch.optim.SGD(parameters, lr=0.1, momentum=0.9)
        model(batch()).sum().backward()
        optimizer.step()
        new, report = exchange(model, to, example=batch(), inplace=True)
        assert new is model
        assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
        assert not [note for note in report.notes if "optimizer" in note]
        before = [p.clone() for p in parameters]
        optimizer.zero_grad()
        model(batch()).square().sum().backward()
        optimizer.step()
        assert all(not torch.equal(p, q) for p, q in zip(parameters, before, strict=True))

    def test_says_when_an_optimizer_cannot(self):
        model = net()
        _, report = exchange(model, "n c h w -> c h w", example=batch(), inplace=True)
        assert (
            "gamma and beta are new parameters in '1', '4'; build the optimizer anew"
            in report.notes
        )

    def test_a_copy_leaves_the_network_alone(self):
        model = net()
        before = state(model)
        for to in ("sync", "evenkeel", "frozen", "group", "n c h w -> c h w"):
            exchange(model, to, example=batch())
        assert state(model) == before

    def test_keeps_objects_hooks_modes_and_attributes(self):
        model = net().train()
        norm = model[1].eval()
        norm.weight.requires_grad_(False)
        norm.colour = "blue"
        calls: list[str] = []
        handle = norm.register_forward_hook(lambda *_: calls.append("after"))
        norm.register_forward_pre_hook(lambda *_: calls.append("before"))
        norm.register_full_backward_hook(lambda *_: calls.append("back"))
        for to in ("sync", "evenkeel", "frozen", "batch", "group"):
            exchange(model, to, inplace=True)
            assert model[1] is norm
            assert (norm.colour, norm.weight.requires_grad) == ("blue", False)
            calls.clear()
            model(batch().requires_grad_()).sum().backward()
            assert calls == ["before", "after", "back"]
        assert (norm.training, model[4].training) == (False, True)
        handle.remove()
        calls.clear()
        model(batch())
        assert calls == ["before"]

    def test_shared_norms_stay_shared(self):
        norm = randomized(nn.BatchNorm2d(3))
        model = nn.Sequential(norm, nn.Sequential(nn.ReLU(), norm))
        for to in ("sync", "n c h w -> c h w", "group"):
            new, report = exchange(model, to, example=batch())
            assert new[0] is new[1][1]
            assert len(report.exchanged) == 1

    def test_shared_parameters_stay_shared(self):
        model = nn.Sequential(nn.BatchNorm2d(3), nn.BatchNorm2d(3), nn.BatchNorm2d(3))
        model[1].weight = model[0].weight
        ours, _ = exchange(model, "evenkeel")
        assert ours[1].weight is ours[0].weight
        new, report = exchange(model, "n c h w -> c h w", example=batch())
        assert [path for path, *_ in report.exchanged] == ["2"]
        assert report.left[0][1].startswith("its gamma and beta are also another module's")
        assert new[1].weight is new[0].weight

    def test_a_network_that_is_a_norm(self):
        norm = randomized(nn.BatchNorm2d(3))
        new, report = exchange(norm, "sync", example=batch(), inplace=True)
        assert new is norm
        assert report.exchanged == (
            ("BatchNorm2d", "torch.nn.BatchNorm2d", "torch.nn.SyncBatchNorm"),
        )

    def test_half_precision(self):
        model = net().half()
        for to in ("sync", "evenkeel", "frozen", "n c h w -> c h w"):
            new, report = exchange(model, to, example=batch().half())
            assert {p.dtype for p in new.parameters()} == {torch.half}
            assert report.difference <= report.budget * report.scale

    def test_without_beta(self):
        if "bias" not in inspect.signature(nn.BatchNorm2d).parameters:
            pytest.skip("torch's norms have no bias setting yet")
        model = nn.Sequential(nn.BatchNorm2d(4, bias=False))
        for to in ("sync", "evenkeel", "group", "n c h w -> c h w"):
            new, _ = exchange(model, to, example=torch.randn(2, 4, 3, 3))
            assert new[0].bias is None
            new(torch.randn(2, 4, 3, 3))

    def test_compiled_and_parallel_networks(self):
        torch._dynamo.reset()
        model = net().eval()
        wanted = model(batch())
        compiled = torch.compile(model, backend="eager")
        compiled(batch())
        _, report = exchange(compiled, "n c h w -> c h w", example=batch(), inplace=True)
        assert report.exchanged[0][0] == "1"
        torch.testing.assert_close(compiled(batch()), wanted)
        parallel, _ = exchange(nn.DataParallel(net()), "sync")
        assert type(parallel.module[1]) is nn.SyncBatchNorm
