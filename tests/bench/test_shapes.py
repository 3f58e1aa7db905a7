"""Four networks' batch norms: the totals that the networks are known for."""

from __future__ import annotations

from collections import Counter

import pytest

from evenkeel.bench.shapes import NETWORKS, QUICK, TAILS, Place, distinct, places
from evenkeel.errors import ConfigError

# What torchvision's models have: norms, and the channels of all of them together, which is half of
# what batch norm adds to the number of parameters.
KNOWN = {
    "resnet50": (53, 26_560),
    "vgg16": (13, 4_224),
    "mobilenetv2": (52, 17_056),
    "densenet121": (121, 41_824),
}


@pytest.mark.parametrize("network", KNOWN)
def test_totals(network):
    found = places(network)
    norms, channels = KNOWN[network]
    assert found.total() == norms
    assert sum(place.channels * count for place, count in found.items()) == channels


def test_resnet50():
    found = places("resnet50")
    tails = Counter(place.tail for place in found.elements())
    assert tails == {"bn+relu": 33, "bn+add+relu": 16, "bn": 4}
    assert found[Place(64, 56, 56, "bn+relu")] == 6
    assert found[Place(128, 56, 56, "bn+relu")] == 1  # before the stride
    assert found[Place(1024, 14, 14, "bn+add+relu")] == 6
    assert found[Place(2048, 7, 7, "bn")] == 1


def test_mobilenetv2():
    tails = Counter(place.tail for place in places("mobilenetv2").elements())
    assert tails == {"bn+relu6": 35, "bn": 7, "bn+add": 10}


def test_densenet121():
    found = places("densenet121")
    assert {place.tail for place in found} == {"bn+relu"}
    assert found[Place(128, 14, 14, "bn+relu")] == 24
    assert found[Place(1024, 14, 14, "bn+relu")] == 1
    assert max(place.channels for place in found if place.height == 28) == 512


def test_distinct_counts_every_norm_once():
    found = distinct()
    for network in NETWORKS:
        assert sum(counts.get(network, 0) for counts in found.values()) == KNOWN[network][0]
    assert {"resnet50", "vgg16", "densenet121"} <= set(found[Place(512, 14, 14, "bn+relu")])
    assert {place.tail for place in found} == set(TAILS)


def test_quick_is_a_dozen_of_them():
    assert set(distinct(quick=True)) == set(QUICK)
    assert len(QUICK) == len(set(QUICK)) == 12
    assert {place.tail for place in QUICK} == set(TAILS)


def test_unknown():
    with pytest.raises(ConfigError, match=r"'resnet5' \(did you mean 'resnet50'\?\); choose one"):
        distinct("resnet5")
