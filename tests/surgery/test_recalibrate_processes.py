"""`recalibrate` over processes of torch.distributed: the same bits in each."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import evenkeel
from evenkeel.surgery.caring.together import Together

SIZES = ((6, 3, 5), (4,))
"""Of the batches of the first and of the second process."""


def network() -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 4, 3), nn.SyncBatchNorm(4), nn.ReLU(), nn.Dropout(0.5)]
    return nn.Sequential(*layers, nn.Conv2d(4, 5, 3), evenkeel.BatchNorm2d(5)).double()


def images(rank: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(rank)
    parts = [torch.randn(n, 3, 8, 8, generator=generator) for n in SIZES[rank]]
    return [x.double() * (1 + rank) + 3 * rank for x in parts]


def breaks_in_the_second(rank: int) -> Iterator[Tensor]:
    yield images(rank)[0]
    if rank == 1:
        raise OSError("the disk is gone")


def said_by(act: Callable[[], Any]) -> str:
    try:
        act()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def work(rank: int, folder: str) -> None:
    """What each process does; its results are a file."""
    torch.set_num_threads(1)
    store = f"file://{folder}/store"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=2)
    try:
        torch.save(successes(rank) | {"said": failures(rank)}, f"{folder}/{rank}.pt")
    finally:
        dist.destroy_process_group()


def successes(rank: int) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for way in ("batch", "population"):
        model = network()
        report = evenkeel.recalibrate(model, images(rank), propagate=way)
        found[way] = (model.state_dict(), report.to_dict())
    found["text"] = str(report)
    plain = network()
    plain[1] = nn.BatchNorm2d(4).double()  # torch refuses to wrap SyncBatchNorm on a CPU
    model = DistributedDataParallel(plain)  # its forward would wait for the other process
    report = evenkeel.recalibrate(model, images(rank))
    found["wrapped"] = (model.module.state_dict(), report.to_dict())
    model = network()
    evenkeel.recalibrate(model, images(rank), group=False)
    found["alone"] = model.state_dict()
    model = network()
    forward = lambda net, x: net(x) if rank == 0 else net[:3](x)  # noqa: E731
    evenkeel.recalibrate(model, images(rank), forward=forward)
    found["one reaches it"] = model.state_dict()
    return found


def failures(rank: int) -> list[str]:
    model = network()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    other = nn.Sequential(nn.BatchNorm2d(3), nn.BatchNorm2d(3)).double()
    forward = lambda net, x: net[1 - rank](net[rank](x))  # noqa: E731
    mine = "5" if rank else "1"
    said = [
        said_by(lambda: evenkeel.recalibrate(model, breaks_in_the_second(rank))),
        said_by(lambda: evenkeel.recalibrate(model, [])),
        said_by(lambda: evenkeel.recalibrate(model, images(rank), where=mine)),
        said_by(
            lambda: evenkeel.recalibrate(
                other, images(rank), forward=forward, propagate="population"
            )
        ),
    ]
    unharmed = all(torch.equal(v, before[name]) for name, v in model.state_dict().items())
    return [*said, str(unharmed)]


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> list[dict[str, Any]]:
    """The results of two processes."""
    if not dist.is_available() or not dist.is_gloo_available():
        pytest.skip("torch is built without gloo here")
    folder = tmp_path_factory.mktemp("processes")
    mp.spawn(work, (str(folder),), nprocs=2)
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(2)]


def alike(mine: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert mine.keys() == other.keys()
    for name, value in other.items():
        torch.testing.assert_close(mine[name], value, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("way", ["batch", "population", "wrapped"])
def test_the_same_bits_in_each_and_those_of_one_process(found, way):
    (first, report), (second, other) = (process[way] for process in found)
    assert report == other
    for name, value in first.items():
        assert torch.equal(value, second[name]), name
    model = network()
    propagate = "batch" if way == "wrapped" else way
    alone = evenkeel.recalibrate(model, [*images(0), *images(1)], propagate=propagate)
    alike(first, model.state_dict())
    assert (report["processes"], report["batches"]) == (2, 4)
    for key in ("norm", "values", "batches"):
        assert [c[key] for c in report["changes"]] == [getattr(c, key) for c in alone.changes]
    assert first["1.num_batches_tracked"] == 4


def test_the_report_counts_processes(found):
    assert "2 norms recalibrated on 4 batches of 2 processes, 0 left" in found[0]["text"]


def test_this_process_alone(found):
    for rank, process in enumerate(found):
        model = network()
        evenkeel.recalibrate(model, images(rank))
        alike(process["alone"], model.state_dict())


def test_a_norm_that_only_one_process_reaches(found):
    model = network()
    evenkeel.recalibrate(model, images(0))
    for process in found:
        mine = process["one reaches it"]
        for key in ("running_mean", "running_var", "num_batches_tracked"):
            torch.testing.assert_close(mine[f"5.{key}"], model.state_dict()[f"5.{key}"])
        assert mine["1.num_batches_tracked"] == 4


def test_where_one_fails_all_do(found):
    """And none of them waits for ever."""
    first, second = (process["said"] for process in found)
    assert second[0] == "OSError: the disk is gone"
    assert first[0] == (
        "SurgeryError: process 1 failed: OSError: the disk is gone; nothing was changed in any"
    )
    assert "the loader gave no batch" in first[1]
    assert "processes have different norms to recalibrate" in first[2]
    assert "processes call the norms in different orders" in first[3]
    assert first[1:] == second[1:]
    assert first[-1] == "True"


def test_one_process_needs_no_other():
    together = Together()
    assert (together.size, together.rank) == (1, 0)
    assert together.gather(lambda: 7) == [7]
    with pytest.raises(LookupError, match="mine"):
        together.gather(lambda: {}["mine"])
