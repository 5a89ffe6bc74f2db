"""What `/metrics` says, in Prometheus' conventions: base units, `_total` for counters."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from serving.service import Service

_SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0)


class Telemetry:
    """A registry of one application: requests as they happen, and the state of the service when it is scraped."""

    def __init__(self, service: Service) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter("hstu_http_requests", "Requests answered.", ["route", "status"], registry=self.registry)
        self.seconds = Histogram(
            "hstu_http_request_duration_seconds", "Time to answer.", ["route"], buckets=_SECONDS, registry=self.registry
        )
        self.registry.register(ServiceCollector(service))


class ServiceCollector(Collector):
    """The counters that the service keeps."""

    def __init__(self, service: Service) -> None:
        self._service = service

    def collect(self) -> Iterator[Metric]:
        yield from self._cache()
        yield from self._runtimes()
        users = self._service.users
        yield GaugeMetricFamily("hstu_users_known", "Users whose events are kept.", value=len(users))
        yield CounterMetricFamily("hstu_users_forgotten", "Users dropped for want of room.", value=users.forgotten)

    def _cache(self) -> Iterator[Metric]:
        cache = self._service.cache
        stats, heat = cache.stats, cache.heat
        found = CounterMetricFamily("hstu_cache_requests", "Look-ups by outcome.", labels=["kind", "result"])
        for (kind, tier), count in sorted(stats.hits.items()):
            found.add_metric([kind, tier], count)
        for kind, count in sorted(stats.misses.items()):
            found.add_metric([kind, "miss"], count)
        yield found
        yield CounterMetricFamily("hstu_cache_hit_bytes", "Bytes found.", value=stats.hit_bytes)
        yield CounterMetricFamily("hstu_cache_missed_bytes", "Bytes that had to be computed.", value=stats.missed_bytes)
        gone = CounterMetricFamily("hstu_cache_departures", "Entries that left a tier.", labels=["tier", "reason"])
        for (tier, reason), count in sorted(stats.gone.items()):
            gone.add_metric([tier, reason], count)
        yield gone
        size = GaugeMetricFamily("hstu_cache_size_bytes", "Bytes in use.", labels=["tier"])
        for tier, used in cache.bytes_used().items():
            size.add_metric([tier], used)
        yield size
        entries = GaugeMetricFamily("hstu_cache_entries", "Entries.", labels=["tier"])
        for tier, count in cache.num_entries().items():
            entries.add_metric([tier], count)
        yield entries
        yield CounterMetricFamily("hstu_cache_prefetches", "States moved up ahead of time.", value=stats.prefetched)
        yield CounterMetricFamily("hstu_cache_prefetch_hits", "Of these, asked for.", value=stats.prefetched_used)
        yield CounterMetricFamily(
            "hstu_cache_predictions", "Predictions of a return, settled.", value=heat.accuracy.predictions
        )
        yield CounterMetricFamily("hstu_cache_predictions_right", "Of these, right.", value=heat.accuracy.right)
        yield GaugeMetricFamily("hstu_cache_horizon_seconds", "How far ahead is predicted.", value=heat.horizon_s)

    def _runtimes(self) -> Iterator[Metric]:
        service = self._service
        runtimes = service.runtimes
        fallbacks = CounterMetricFamily("hstu_fallbacks", "Answers not by the first choice.",
                                        labels=["level", "wanted", "used"])  # fmt: skip
        for labels, count in sorted(runtimes.chain.counts.items()):
            fallbacks.add_metric(list(labels), count)
        yield fallbacks
        retries = CounterMetricFamily("hstu_retries", "Calls repeated.", labels=["runtime"])
        for name, count in sorted(runtimes.chain.retried.items()):
            retries.add_metric([name], count)
        yield retries
        breakers = {lane.name: lane.breaker for lane in runtimes.lanes.values()} | runtimes.breakers
        opened = GaugeMetricFamily("hstu_circuit_open", "1 while a runtime is not asked.", labels=["runtime"])
        for name, breaker in breakers.items():
            opened.add_metric([name], float(breaker.state != "closed"))
        yield opened
        up = GaugeMetricFamily("hstu_worker_up", "1 while a process answers.", labels=["worker"])
        restarts = CounterMetricFamily("hstu_worker_restarts", "Processes started again.", labels=["worker"])
        for name, worker in runtimes.workers.items():
            up.add_metric([name], float(worker.ready))
            restarts.add_metric([name], worker.restarts)
        yield up
        yield restarts
        depth = GaugeMetricFamily("hstu_queue_depth", "Requests that wait.", labels=["runtime"])
        refused = CounterMetricFamily("hstu_queue_refusals", "Requests refused with 429.", labels=["runtime"])
        batches = CounterMetricFamily("hstu_batches", "Batches by size.", labels=["runtime", "size"])
        for lane in runtimes.lanes.values():
            if lane.batcher is not None:
                depth.add_metric([lane.name], lane.batcher.depth)
                refused.add_metric([lane.name], lane.batcher.stats.refused)
                for size, count in sorted(lane.batcher.stats.batches.items()):
                    batches.add_metric([lane.name, str(size)], count)
        for name, worker in runtimes.workers.items():
            refused.add_metric([name], worker.refused)
        yield depth
        yield refused
        yield batches
        expected = GaugeMetricFamily("hstu_strategy_expected_seconds", "What an answer takes.", labels=["strategy"])
        for name, seconds in service.seconds.items():
            expected.add_metric([name], seconds)
        yield expected
