"""
Figures of this process's enclaves for monitoring: Prometheus and OpenTelemetry.

One call gives those of all enclaves and pools of the process: handles are known without being
registered, and what they counted stays when they are gone. Labels are the names of enclaves and of
their functions, both bounded, and fixed words; never an argument, a nonce, an identity or a text of
an error.

Three ways, the first without any other package::

    text = pyenclave.telemetry.render()                  # the body of GET /metrics
    pyenclave.telemetry.register_prometheus()            # prometheus_client's own registry
    pyenclave.telemetry.register_opentelemetry()         # extra "otel"
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Literal

from pyenclave._locks import Lock
from pyenclave.calls.stats import FunctionStats, Latency, registry

if TYPE_CHECKING:
    from opentelemetry.metrics import CallbackOptions, MeterProvider, Observation
    from prometheus_client import CollectorRegistry
    from prometheus_client.core import Metric

__all__ = [
    "CONTENT_TYPE",
    "Family",
    "PrometheusCollector",
    "Sample",
    "collect",
    "register_opentelemetry",
    "register_prometheus",
    "render",
]

CONTENT_TYPE: Final = "text/plain; version=0.0.4; charset=utf-8"
# Upper bounds of the exported histogram: each fourth power of two of the many finer buckets, so
# that the counts are exact, from 1 us to 69 s.
_BOUNDS: Final = tuple(2**power / 1e9 for power in range(10, 37, 2))
_METER: Final = "pyenclave"


@dataclass(frozen=True, slots=True)
class Sample:
    """One value: what is appended to the family's name, its labels, and the number."""

    suffix: str
    labels: Mapping[str, str]
    value: float


@dataclass(frozen=True, slots=True)
class Family:
    """
    All values of one name.

    Attributes:
        name: As Prometheus writes it; of a counter without ``_total``.
        kind: What sort of values these are.
        text: One line for people.
        samples: The values.

    """

    name: str
    kind: Literal["counter", "gauge", "histogram"]
    text: str
    samples: tuple[Sample, ...]


def _histogram(labels: Mapping[str, str], latency: Latency) -> Iterator[Sample]:
    at_most = dict(latency.buckets())
    for bound in _BOUNDS:
        yield Sample("_bucket", {**labels, "le": repr(bound)}, at_most[bound])
    # Counted from the buckets: a call that ends while they are read must not make two of these
    # differ, which a scraper would refuse.
    count = at_most[float("inf")]
    yield Sample("_bucket", {**labels, "le": "+Inf"}, count)
    yield Sample("_sum", labels, latency.seconds)
    yield Sample("_count", labels, count)


def collect() -> tuple[Family, ...]:
    """Return all families, each with its values at this moment."""
    totals = registry.totals()
    functions = [
        ({"enclave": name, "function": item.name}, item)
        for name, total in totals.items()
        for item in total.functions.values()
    ]

    def gauge(name: str, text: str, attribute: str) -> Family:
        values = (
            Sample("", {"enclave": key}, getattr(total, attribute)) for key, total in totals.items()
        )
        return Family(name, "gauge", text, tuple(values))

    def total_of(name: str, text: str, attribute: str) -> Family:
        family = gauge(name, text, attribute)
        samples = (Sample("_total", item.labels, item.value) for item in family.samples)
        return Family(name, "counter", text, tuple(samples))

    def counter(name: str, text: str, attribute: str) -> Family:
        values = (Sample("_total", labels, getattr(item, attribute)) for labels, item in functions)
        return Family(name, "counter", text, tuple(values))

    def counters(name: str, text: str, attribute: str, label: str) -> Family:
        values = (
            Sample("_total", {"enclave": key, label: word}, number)
            for key, total in totals.items()
            for word, number in getattr(total, attribute).items()
        )
        return Family(name, "counter", text, tuple(values))

    def errors(labels: Mapping[str, str], item: FunctionStats) -> Iterator[Sample]:
        yield Sample("_total", {**labels, "kind": "raised"}, item.raised)
        yield Sample("_total", {**labels, "kind": "refused"}, item.refused)

    return (
        total_of("pyenclave_launches", "Enclaves launched by this process.", "launches"),
        total_of(
            "pyenclave_launch_failures",
            "Enclaves that a pool could not launch.",
            "launch_failures",
        ),
        gauge("pyenclave_enclaves", "Enclaves that run.", "running"),
        counters("pyenclave_enclaves_ended", "Enclaves that ended, by how.", "ended", "how"),
        counter("pyenclave_calls", "Calls sent to trusted functions.", "calls"),
        Family(
            "pyenclave_call_errors",
            "counter",
            "Answers that were errors: the function raised, or refused before it was entered.",
            tuple(sample for labels, item in functions for sample in errors(labels, item)),
        ),
        counters(
            "pyenclave_call_failures",
            "Calls without an answer, by why.",
            "failures",
            "reason",
        ),
        total_of(
            "pyenclave_calls_repeated",
            "Calls that a pool made again: their enclave was lost before they began.",
            "repeated",
        ),
        counter("pyenclave_request_bytes", "Bytes of requests, encoded.", "bytes_in"),
        counter("pyenclave_response_bytes", "Bytes of answers, encoded.", "bytes_out"),
        Family(
            "pyenclave_call_seconds",
            "histogram",
            "Time of calls, of those that were timed: one in 64, and the first of each function.",
            tuple(
                sample for labels, item in functions for sample in _histogram(labels, item.latency)
            ),
        ),
        gauge("pyenclave_threads", "Calls that can run at the same time.", "threads"),
        gauge("pyenclave_threads_late", "Threads busy with a call whose caller gave up.", "late"),
        gauge("pyenclave_calls_waiting", "Calls that wait for a thread or an enclave.", "waiting"),
        gauge(
            "pyenclave_calls_waiting_max",
            "Most calls that ever waited at the same time, for one enclave or pool.",
            "most_waiting",
        ),
    )


# ---- Prometheus ----------------------------------------------------------------------------------


def _escaped(text: str, *, quotes: bool) -> str:
    text = text.replace("\\", r"\\").replace("\n", r"\n")
    return text.replace('"', r"\"") if quotes else text


def _number(value: float) -> str:
    return str(value) if isinstance(value, int) else repr(float(value))


def _lines(families: Iterable[Family]) -> Iterator[str]:
    for family in families:
        # In this format a counter's own name ends in _total.
        name = family.name + ("_total" if family.kind == "counter" else "")
        yield f"# HELP {name} {_escaped(family.text, quotes=False)}\n"
        yield f"# TYPE {name} {family.kind}\n"
        for sample in family.samples:
            labels = ",".join(
                f'{key}="{_escaped(word, quotes=True)}"' for key, word in sample.labels.items()
            )
            yield f"{family.name}{sample.suffix}{{{labels}}} {_number(sample.value)}\n"


def render() -> str:
    """
    Return everything in Prometheus' text format 0.0.4; serve it as :data:`CONTENT_TYPE`.

    Needs no other package.
    """
    return "".join(_lines(collect()))


class PrometheusCollector:
    """
    A collector for ``prometheus_client``: ``CollectorRegistry.register(PrometheusCollector())``.

    Each scrape reads the counters; nothing is kept up between scrapes.
    """

    def describe(self) -> list[Metric]:
        """Return no names, so that registering does not collect."""
        return []

    def collect(self) -> Iterator[Metric]:
        """Give each family as prometheus_client has it."""
        from prometheus_client.core import Metric

        for family in collect():
            metric = Metric(family.name, family.text, family.kind)
            for sample in family.samples:
                metric.add_sample(family.name + sample.suffix, dict(sample.labels), sample.value)
            yield metric


def register_prometheus(into: CollectorRegistry | None = None) -> PrometheusCollector:
    """
    Have prometheus_client export the figures of this process's enclaves.

    Args:
        into: A registry; None for prometheus_client's own.

    Returns:
        The collector, for ``unregister``.

    Raises:
        ModuleNotFoundError: prometheus_client is not installed; :func:`render` needs it not.

    """
    from prometheus_client import REGISTRY

    collector = PrometheusCollector()
    (REGISTRY if into is None else into).register(collector)
    return collector


# ---- OpenTelemetry -------------------------------------------------------------------------------


class _Once:
    """
    The families, read once for all instruments of one round.

    Each instrument has a callback of its own; reading everything for each would be quadratic.
    """

    def __init__(self) -> None:
        self._lock = Lock()
        self._left: dict[str, Family] = {}

    def take(self, name: str) -> Family:
        with self._lock:
            if name not in self._left:
                self._left = {family.name: family for family in collect()}
            return self._left.pop(name)


def register_opentelemetry(provider: MeterProvider | None = None) -> None:
    """
    Have OpenTelemetry observe the figures of this process's enclaves.

    The same values as Prometheus gets, under names with dots; of the histogram, which cannot be
    observed from outside, the count and the sum of the timed calls.

    Args:
        provider: Where the meter comes from; None for the global one.

    Raises:
        ModuleNotFoundError: opentelemetry-api is not installed (extra ``otel``).

    """
    from opentelemetry.metrics import Observation, get_meter_provider

    meter = (get_meter_provider() if provider is None else provider).get_meter(_METER)
    once = _Once()

    def observe(name: str, suffix: str) -> Callable[[CallbackOptions], Iterable[Observation]]:
        def read(_options: CallbackOptions) -> Iterable[Observation]:
            for sample in once.take(name).samples:
                if sample.suffix == suffix:
                    yield Observation(sample.value, dict(sample.labels))

        return read

    for family in collect():
        dotted = family.name.replace("_", ".", 1)
        options: dict[str, Any] = {"description": family.text}
        if family.kind == "gauge":
            meter.create_observable_gauge(dotted, callbacks=[observe(family.name, "")], **options)
        elif family.kind == "counter":
            unit = "By" if family.name.endswith("_bytes") else "1"
            meter.create_observable_counter(
                dotted, callbacks=[observe(family.name, "_total")], unit=unit, **options
            )
        else:
            meter.create_observable_counter(
                f"{dotted}.count", callbacks=[observe(family.name, "_count")], unit="1", **options
            )
            meter.create_observable_counter(
                f"{dotted}.sum", callbacks=[observe(family.name, "_sum")], unit="s", **options
            )
