"""What monitoring gets: Prometheus' text, its collector, and OpenTelemetry's instruments."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest

from pyenclave import _core, telemetry
from pyenclave.calls import stats
from pyenclave.calls.stats import Launch, Registry

HOSTILE = 'evil"} 1\n# HELP \\ x'


class Lanes:
    late_lanes = 1
    queued = 2

    def __init__(self) -> None:
        self.stats = _core.CallStats(1, 2)


class Owner:
    pass


@pytest.fixture
def known(monkeypatch):
    """A registry with two launches: one with a hostile name."""
    registry = Registry()
    monkeypatch.setattr(telemetry, "registry", registry)
    held = []
    for name in ("scoring", HOSTILE):
        owner, lanes = Owner(), Lanes()
        lanes.stats.refused()
        registry.add(Launch(name, ["score", HOSTILE], 4, lanes), owner)
        held.append((owner, lanes))
    return held


class Counted:
    """Give a launch calls without an enclave."""

    def __init__(self, monkeypatch) -> None:
        counts = [0] * (len(_core.STATS_BOUNDS) + 1)
        counts[0], counts[40], counts[-1] = 1, 2, 1
        latency = stats.Latency(samples=4, seconds=1.5, counts=tuple(counts))
        self.functions = tuple(
            stats.FunctionStats(
                name=name, calls=9, raised=2, refused=1, bytes_in=5, bytes_out=7, latency=latency
            )
            for name in ("score", HOSTILE)
        )
        monkeypatch.setattr(Launch, "by_function", lambda _: self.functions)


@pytest.fixture
def counted(known, monkeypatch):
    return Counted(monkeypatch)


def values(text: str) -> dict[str, float]:
    pattern = re.compile(r"([a-z_]+)(\{.*\}) (\S+)")
    return {
        match[1] + match[2]: float(match[3])
        for match in map(pattern.fullmatch, text.splitlines())
        if match
    }


def test_nothing_is_exported_before_there_is_an_enclave(monkeypatch) -> None:
    monkeypatch.setattr(telemetry, "registry", Registry())
    text = telemetry.render()
    assert values(text) == {}
    assert text.count("# TYPE") == len(telemetry.collect())


def test_a_hostile_name_cannot_leave_its_label(counted) -> None:
    """Quotes, line ends and backslashes are escaped; each line is one of three kinds."""
    label = r'"(?:[^"\\\n]|\\["\\n])*"'
    sample = re.compile(rf"[a-z_]+\{{(?:[a-z]+={label})(?:,[a-z]+={label})*\}} [0-9.e+-]+")
    kinds = re.compile(r"# (?:HELP [a-z_]+ [^\n]+|TYPE [a-z_]+ (?:counter|gauge|histogram))")
    for line in telemetry.render().split("\n")[:-1]:
        assert sample.fullmatch(line) or kinds.fullmatch(line), line


def test_the_text_is_what_prometheus_reads(counted) -> None:
    parser = pytest.importorskip("prometheus_client.parser")
    families = {f.name: f for f in parser.text_string_to_metric_families(telemetry.render())}
    assert {f.name for f in telemetry.collect()} == set(families)
    calls = {
        (s.labels["enclave"], s.labels["function"]): s.value
        for s in families["pyenclave_calls"].samples
    }
    assert calls == {(e, f): 9 for e in ("scoring", HOSTILE) for f in ("score", HOSTILE)}
    assert families["pyenclave_call_seconds"].type == "histogram"


def test_the_histogram_adds_up(counted) -> None:
    (family,) = (f for f in telemetry.collect() if f.name == "pyenclave_call_seconds")
    one = [s for s in family.samples if s.labels["enclave"] == "scoring"][
        : len(family.samples) // 4
    ]
    buckets = [s.value for s in one if s.suffix == "_bucket"]
    assert buckets == sorted(buckets)
    assert buckets[0] == 1
    assert buckets[-2:] == [3, 4]
    assert [s.value for s in one if s.suffix in ("_sum", "_count")] == [1.5, 4]
    assert [s.labels["le"] for s in one if s.suffix == "_bucket"][-1] == "+Inf"


def test_names_follow_prometheus_conventions(counted) -> None:
    """Counters end in _total, units are base units, nothing is a label that has no bound."""
    text = telemetry.render()
    for name, kind in re.findall(r"# TYPE (\S+) (\S+)", text):
        assert name.startswith("pyenclave_")
        assert name.endswith("_total") == (kind == "counter")
    labels = set(re.findall(r'[{,]([a-z]+)="', text.replace(r"\"", "")))
    assert labels == {"enclave", "function", "kind", "reason", "how", "le"}


def test_both_ways_to_prometheus_say_the_same(counted) -> None:
    client = pytest.importorskip("prometheus_client")
    into = client.CollectorRegistry()
    collector = telemetry.register_prometheus(into)
    theirs = values(client.generate_latest(into).decode())
    assert theirs
    ours = values(telemetry.render())
    assert len(theirs) == len(ours)
    assert sorted(theirs.values()) == sorted(ours.values())
    into.unregister(collector)
    assert client.generate_latest(into) == b""


def test_the_scrape_names_no_argument_nonce_or_identity(tmp_path) -> None:
    """Whatever is called with whatever: labels are names of the image, and fixed words."""
    import secrets

    from pyenclave.errors import EcallError
    from pyenclave.host import Enclave

    script = tmp_path / "entry.py"
    script.write_text(
        "import pyenclave\n"
        "@pyenclave.ecall\n"
        "def check(text: str) -> str:\n"
        "    raise KeyError(text)\n"
    )
    nonce = secrets.token_bytes(32)
    with Enclave.from_file(script, quiet=True, state=tmp_path / "state") as enclave:
        with pytest.raises(EcallError) as caught:
            enclave.check("planted-argument")
        enclave.attest(nonce)
        text = telemetry.render()
        for secret in ("planted-argument", caught.value.id, nonce.hex(), "KeyError"):
            assert secret not in text
        assert enclave.info.enclave_id.hex() not in text
        found = values(text)
        assert (
            found['pyenclave_call_errors_total{enclave="entry",function="check",kind="raised"}']
            == 1
        )
        assert enclave.stats.raised == 1
        assert enclave.stats.state == "running"
    assert enclave.stats.state == "closed"
    assert values(telemetry.render())['pyenclave_enclaves{enclave="entry"}'] == 0


def test_opentelemetry_observes_the_same_values(counted) -> None:
    metrics = pytest.importorskip("opentelemetry.sdk.metrics")
    export = pytest.importorskip("opentelemetry.sdk.metrics.export")
    reader = export.InMemoryMetricReader()
    provider = metrics.MeterProvider(metric_readers=[reader])
    telemetry.register_opentelemetry(provider)
    for _ in range(2):
        data = reader.get_metrics_data()
        found = {
            metric.name: {
                tuple(point.attributes.values()): point.value for point in metric.data.data_points
            }
            for metric in data.resource_metrics[0].scope_metrics[0].metrics
        }
        assert found["pyenclave.calls"][("scoring", "score")] == 9
        assert found["pyenclave.call_seconds.count"][("scoring", "score")] == 4
        assert found["pyenclave.call_seconds.sum"][("scoring", "score")] == 1.5
        assert found["pyenclave.calls_waiting"][("scoring",)] == 2
        assert found["pyenclave.call_failures"][("scoring", "arguments")] == 1
    provider.shutdown()


def test_rendering_needs_no_other_package() -> None:
    """Nor does importing the module load one."""
    script = (
        "import sys, pyenclave\n"
        "pyenclave.telemetry.render()\n"
        "others = ('prometheus_client', 'opentelemetry', 'numpy')\n"
        "print(*[m for m in sys.modules if m.split('.')[0] in others])"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == ""
