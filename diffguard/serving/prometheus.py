"""What the endpoint counts and measures, in Prometheus' text format: GET /metrics.

Each application has a registry of its own. Labels take few values: paths of the interface, HTTP statuses, and the
classifier's classes; nothing of a body, a header or a key is in them.
"""

import time
from collections.abc import Iterator, MutableMapping, Sequence
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Info, ProcessCollector, generate_latest
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from diffguard.deploy.detector import Decision, DeployedDetector
from diffguard.serving.body_limit import App, Message, Receive, Send
from diffguard.serving.service import Service
from diffguard.version import METHOD_VERSION, __version__

MEDIA_TYPE = "text/plain; version=0.0.4; charset=utf-8"

PATHS = ("/score", "/health", "/version", "/metrics")
"""Paths by which requests are counted; every other one is "other"."""

DISCONNECTED = "disconnected"
"""Stands for the status of a request whose client was gone before it was answered."""

DURATION_BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
"""In seconds, up to `diffguard.serving.limits.REQUEST_SECONDS`."""

P_VALUE_BUCKETS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
"""Finer where images are rejected. Of images like those of calibration each holds the share that its width says."""


class ServerMetrics:
    """The metrics of one application."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self._shared: dict[str, Any] = {"namespace": "diffguard", "registry": self._registry}
        self._requests = Counter("requests", "Requests, by path and HTTP status.", ["path", "status"], **self._shared)
        self._open = Gauge("requests_in_progress", "Requests that are not answered yet.", **self._shared)
        self._durations = Histogram(
            "request_duration_seconds",
            "Seconds from the headers of a POST /score to the first byte of its answer, by HTTP status.",
            ["status"],
            buckets=DURATION_BUCKETS,
            **self._shared,
        )
        by_class = ["label", "class_name"]
        self._images = Counter("images", "Images that were decided on, by predicted class.", by_class, **self._shared)
        self._rejections = Counter(
            "rejections",
            "Images that were taken for out-of-distribution, by predicted class.",
            by_class,
            **self._shared,
        )
        self._p_values = Histogram(
            "p_value", "Conformal p-values of images that were decided on.", buckets=P_VALUE_BUCKETS, **self._shared
        )
        self._waiting = Gauge("queue_images", "Images that wait for the model.", **self._shared)
        self._ready = Gauge(
            "ready", "1 if the detector is open, 0 while it is being opened or if that failed.", **self._shared
        )
        ProcessCollector(registry=self._registry)

    def watch(self, service: Service) -> None:
        """Read the queue's length and whether the detector is open from a service, at each scrape."""
        self._waiting.set_function(lambda: service.waiting_images)
        self._ready.set_function(lambda: float(service.detector is not None))

    def describe(self, detector: DeployedDetector) -> None:
        """Say which detector is served; each class begins at 0, so that its first image is an increase."""
        info = detector.info
        # Made only now, so that there is none while no detector is open.
        alpha = Gauge("alpha", "False-rejection rate that the detector is calibrated to.", **self._shared)
        alpha.set(detector.alpha)
        served = Info("detector", "The detector that is served.", **self._shared)
        served.info(
            {
                "name": info.detector,
                "benchmark": info.benchmark,
                "bundle": detector.bundle_hash or "",
                "diffguard": __version__,
                "method_version": str(METHOD_VERSION),
            }
        )
        for label, name in enumerate(info.classes):
            for counter in (self._images, self._rejections):
                counter.labels(str(label), name)

    def decided(self, decisions: Sequence[Decision]) -> None:
        """Count the images of a request."""
        for decision in decisions:
            self._images.labels(str(decision.label), decision.class_name).inc()
            if decision.is_ood:
                self._rejections.labels(str(decision.label), decision.class_name).inc()
            self._p_values.observe(decision.p_value)

    def requested(self, path: str, status: str, seconds: float) -> None:
        """Count a request."""
        path = path.rstrip("/")
        self._requests.labels(path if path in PATHS else "other", status).inc()
        if path == "/score":
            self._durations.labels(status).observe(seconds)

    def started(self) -> None:
        """A request has begun."""
        self._open.inc()

    def ended(self) -> None:
        """A request has been answered, or its client is gone."""
        self._open.dec()

    def exposition(self) -> bytes:
        """All metrics in Prometheus' text format, as `MEDIA_TYPE`."""
        return generate_latest(_WithoutTimes(self._registry))


class _WithoutTimes(Collector):
    """A registry without the time at which each series was created, which would double the answer."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._whole = registry

    def collect(self) -> Iterator[Metric]:
        for metric in self._whole.collect():
            metric.samples = [sample for sample in metric.samples if not sample.name.endswith("_created")]
            yield metric


class Measured:
    """ASGI middleware that counts requests and measures how long they take; outermost, so that it sees refusals."""

    def __init__(self, app: App, metrics: ServerMetrics) -> None:
        self._app, self._metrics = app, metrics

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        """Handle one ASGI connection."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        start, status, seconds = time.perf_counter(), DISCONNECTED, 0.0

        async def send_noted(message: Message) -> None:
            nonlocal status, seconds
            if message["type"] == "http.response.start":
                status, seconds = str(message["status"]), time.perf_counter() - start
            await send(message)

        self._metrics.started()
        try:
            await self._app(scope, receive, send_noted)
        except Exception:
            if status == DISCONNECTED:  # answered further out, as an internal error
                status, seconds = "500", time.perf_counter() - start
            raise
        finally:
            self._metrics.ended()
            self._metrics.requested(scope["path"], status, seconds or time.perf_counter() - start)
