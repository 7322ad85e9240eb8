"""Batches: the same results in the same order, whoever computes them."""

from __future__ import annotations

import subprocess
import sys
from datetime import UTC, datetime

import pytest

from pyenclave.attestation import AppraisalPolicy, Appraisers, Item, appraise, appraise_many
from pyenclave.errors import EvidenceFormatError
from pyenclave.testing.certificates import Key
from pyenclave.testing.intel import IntelPlatform

NOW = datetime(2026, 7, 1, 12, tzinfo=UTC)


@pytest.fixture(scope="module")
def platform():
    return IntelPlatform(NOW)


def quotes(platform, count):
    made = []
    for _ in range(count):
        platform.attestation_key = Key.ec()
        made.append(platform.enclave_quote())
    return made


def common(platform):
    return {
        "policy": AppraisalPolicy.strict(),
        "freshness": "not_checked",
        "endorsements": platform.endorsements(),
        "roots": [platform.root],
    }


@pytest.mark.parametrize("workers", [1, 2])
def test_a_batch_gives_what_appraise_gives_in_the_same_order(platform, workers):
    items = quotes(platform, 5)
    broken = bytearray(items[2])
    broken[100] ^= 1
    items[2] = memoryview(broken)
    given = common(platform)
    found = appraise_many(items, workers=workers, at=NOW, **given)
    alone = [appraise(item, at=NOW, **given) for item in items]
    assert [result.accepted for result in found] == [True, True, False, True, True]
    assert found == alone
    assert [result.claims for result in found] == [result.claims for result in alone]


@pytest.mark.parametrize("workers", [1, 2])
def test_what_is_wrong_with_one_item_stands_in_its_place(platform, workers):
    (good,) = quotes(platform, 1)
    items = [b"no evidence at all", good, Item(good, nonce=b"contradicts"), 7, good]
    found = appraise_many(items, workers=workers, at=NOW, **common(platform))
    kinds = [type(outcome) for outcome in found]
    assert kinds[0] is EvidenceFormatError
    assert kinds[2] is ValueError
    assert kinds[3] is TypeError
    assert found[1].accepted
    assert found[4].accepted
    assert found[0].found


def test_each_item_has_its_own_nonce(platform):
    nonce = bytes(range(64))
    made = platform.enclave_quote(report_data=nonce)
    given = common(platform) | {"freshness": "required"}
    items = [Item(made, nonce=nonce), Item(made, nonce=bytes(64)), made]
    with Appraisers(workers=2, **given) as pool:
        for _ in range(2):
            first, second, third = pool.appraise(items, at=NOW)
            assert first.fresh
            assert first.accepted
            assert not second.accepted
            assert isinstance(third, ValueError)


def test_impossible_arguments_raise_before_anything_runs(platform):
    given = common(platform)
    with pytest.raises(ValueError, match="at least 1"):
        appraise_many([], workers=0, **given)
    with pytest.raises(TypeError, match="workers"):
        appraise_many([], workers=1.5, **given)
    with pytest.raises(TypeError, match="policy"):
        appraise_many([], **(given | {"policy": {}}))
    with pytest.raises(ValueError, match="freshness"):
        appraise_many([], **(given | {"freshness": "maybe"}))
    with pytest.raises(ValueError, match="zone"):
        appraise_many([], at=NOW.replace(tzinfo=None), **given)
    assert appraise_many([], **given) == []


def test_what_is_for_batches_is_loaded_when_it_is_asked_for():
    code = (
        "import sys; before = set(sys.modules); "
        "import pyenclave.attestation as a; loaded = set(sys.modules) - before; "
        "assert not {'pyenclave.attestation.batch', 'pathlib', 'difflib'} & loaded, loaded; "
        "assert {'Appraisers', 'Item', 'appraise_many'} <= set(dir(a)); "
        "from pyenclave.attestation import Appraisers, Item, appraise_many; "
        "assert a.Item is Item and not hasattr(a, 'items')"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
