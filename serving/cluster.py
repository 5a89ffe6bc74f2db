"""The service as replicas on Ray Serve, and recommendations of whole tables on Ray Data. Here is what Ray is told.

Ray starts, watches and replaces replicas, and routes: by consistent hashing of the header `x-session-id` (the user, as
the client sends it), so a user comes back to the replica that has the state. Answers do not depend on it: the events
of all users are with one keeper (`serving.shared_users`). Deploying once more under the same name is a rolling update:
replicas are replaced one after the other, each when its requests are answered. This module needs Ray; no other does.
"""

from __future__ import annotations

import logging
import math
import os
import signal
import threading
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

# read when Ray is imported, and by what it starts
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_AUTH_MODE", "token")  # its ports are not on loopback; whoever connects needs the token
os.environ.setdefault("RAY_worker_niceness", "0")  # replicas answer people: nothing else goes first
os.environ.setdefault("RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S", "30")

import ray
from ray import serve
from ray.exceptions import RayError

from serving.api import build_app
from serving.bundle import Bundle, open_bundle
from serving.fallback import LOG, UnavailableError
from serving.guard import Guard
from serving.service import Service
from serving.settings import ServiceSettings
from serving.shared_users import EventKeeper, News, SharedUsers
from serving.users import EventRows, RawEvent, event_rows

APPLICATION = NAMESPACE = "hstu"
_KEEPER = "events"
_ROUTER = "ray.serve.experimental.consistent_hash_router.ConsistentHashRouter"
_OBJECT_STORE_BYTES = 128 << 20  # of a cluster that is started here; messages are small


@dataclass(frozen=True, kw_only=True, slots=True)
class Deployment:
    """How many replicas, and what each may use."""

    replicas: int
    cpus: float = 1.0  # that Ray counts for a replica
    gpus: float = 0.0
    cluster: str | None = None  # None: started here, on this machine alone, and stopped with this process


class RayKeeper:
    """The keeper of events as an actor; UnavailableError when it cannot be asked."""

    def __init__(self, actor: Any) -> None:
        self._actor = actor

    async def append(self, user_id: str, events: Sequence[RawEvent], born: int, seen: int) -> News:
        found: News = await self._ask(self._actor.append.remote(user_id, list(events), born, seen))
        return found

    async def since(self, user_id: str, born: int, seen: int) -> News | None:
        found: News | None = await self._ask(self._actor.since.remote(user_id, born, seen))
        return found

    async def delete(self, user_id: str) -> bool:
        return bool(await self._ask(self._actor.delete.remote(user_id)))

    async def _ask(self, answer: Any) -> Any:
        try:
            return await answer
        except RayError as error:
            reason = str(error).splitlines()[0]
            raise UnavailableError("the keeper of events is down", reason=reason, retry_after_s=1.0) from None


class Replica:
    """One replica: the application that `serve` runs, with users that it shares with the others."""

    def __init__(self, bundle: str, settings: ServiceSettings, keys: Sequence[str]) -> None:
        self._bundle, self._settings, self._keys = Path(bundle), settings, list(keys)

    def __serve_build_asgi_app__(self) -> Guard:
        return build_app(
            open_bundle(self._bundle, verify=False), self._settings, keys=self._keys, new_service=_service_of_many
        )


def _service_of_many(bundle: Bundle, settings: ServiceSettings) -> Service:
    def encode(events: Sequence[RawEvent]) -> EventRows:
        vocabulary = bundle.vocabulary
        known = [(vocabulary.encode_item(item), time, action) for item, time, action in events]
        known = [event for event in known if event[0]]
        actions = [vocabulary.actions.index(a) + 1 if a in vocabulary.actions else 0 for _, _, a in known]
        return event_rows([item for item, _, _ in known], actions, [time for _, time, _ in known])

    keeper = RayKeeper(ray.get_actor(_KEEPER, namespace=NAMESPACE))
    max_events = bundle.config.max_history
    users = SharedUsers(keeper, encode, max_users=settings.max_users, max_events=max_events)
    return Service(bundle, settings, users=users)


def connect(cluster: str | None, *, cpus: float) -> None:
    """Ray is there: a cluster by its address, or one of this machine that ends with this process and has `cpus`."""
    if cluster is None:
        ray.init(
            num_cpus=max(os.cpu_count() or 1, math.ceil(cpus)),
            include_dashboard=False,
            namespace=NAMESPACE,
            log_to_driver=False,
            object_store_memory=_OBJECT_STORE_BYTES,
        )
    else:
        ray.init(address=cluster, namespace=NAMESPACE, log_to_driver=False)


def deploy(
    bundle: Bundle, settings: ServiceSettings, how: Deployment, *, host: str, port: int, keys: Sequence[str]
) -> None:
    """All replicas answer with this bundle; those of another bundle that were there have ended, none of their
    requests dropped."""
    ray.remote(EventKeeper).options(
        name=_KEEPER, namespace=NAMESPACE, get_if_exists=True, lifetime="detached", num_cpus=0, max_restarts=-1
    ).remote(max_users=settings.max_users, max_events=4 * bundle.config.max_history)
    serve.start(proxy_location="EveryNode", http_options={"host": host, "port": port})
    replica = serve.deployment(
        serve.ingress()(Replica),
        name="replica",
        num_replicas=how.replicas,
        max_ongoing_requests=settings.max_queue + 2 * settings.max_batch,  # beyond it the service itself says 429
        max_queued_requests=settings.max_queue,
        graceful_shutdown_timeout_s=30.0,
        graceful_shutdown_wait_loop_s=0.5,
        health_check_period_s=2.0,
        health_check_timeout_s=10.0,
        ray_actor_options={"num_cpus": how.cpus, "num_gpus": how.gpus},
        request_router_config={"request_router_class": _ROUTER},
    )
    serve.run(replica.bind(str(bundle.path.resolve()), settings, list(keys)), name=APPLICATION, route_prefix="/")
    LOG.info("%d replicas serve bundle %s", how.replicas, bundle.artifact.id[:12])


def serve_replicas(
    bundle: Bundle, settings: ServiceSettings, how: Deployment, *, host: str, port: int, keys: Sequence[str]
) -> None:
    """The bundle is served by replicas: on a cluster from now on, else until SIGINT or SIGTERM."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s %(message)s")
    if settings.disk is not None:
        settings = replace(settings, disk=settings.disk.resolve())
    connect(how.cluster, cpus=how.replicas * how.cpus)
    if how.cluster is not None:
        deploy(bundle, settings, how, host=host, port=port, keys=keys)
        ray.shutdown()
        return
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _end)  # Ray's own leaves replicas behind
    LOG.info("Ray runs at %s", ray.get_runtime_context().gcs_address)
    try:
        deploy(bundle, settings, how, host=host, port=port, keys=keys)
        threading.Event().wait()
    finally:
        serve.shutdown()
        ray.shutdown()


def _end(*_: object) -> None:
    raise SystemExit(0)
