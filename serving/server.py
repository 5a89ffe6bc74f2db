"""The service on a port: loopback unless keys are given."""

from __future__ import annotations

import importlib.util
import ipaddress
import logging
import os
from pathlib import Path

import uvicorn

from hstu.errors import InputError, MissingBackendError, UsageError
from serving.api import build_app
from serving.bundle import Bundle
from serving.settings import ServiceSettings

KEYS_VARIABLE = "HSTU_API_KEYS"
_SHORTEST_KEY = 16


def read_keys(path: Path | None) -> list[str]:
    """API keys, one a line of the file, or in HSTU_API_KEYS with commas between; InputError for one that is short."""
    if path is not None:
        try:
            keys = path.read_text(encoding="utf-8").split()
        except OSError as error:
            raise InputError(f"{path}: cannot be read ({error.strerror})", fix="pass --api-keys FILE") from None
    else:
        keys = [key.strip() for key in os.environ.get(KEYS_VARIABLE, "").split(",") if key.strip()]
    if any(len(key) < _SHORTEST_KEY for key in keys):
        raise InputError("an API key is too short", expected=f"at least {_SHORTEST_KEY} characters",
                         fix="python -c 'import secrets; print(secrets.token_urlsafe(32))'")  # fmt: skip
    return keys


def require_safe(host: str, keys: list[str]) -> None:
    """UsageError when others than this machine could ask without a key."""
    try:
        loopback = ipaddress.ip_address(host).is_loopback
    except ValueError:
        loopback = host == "localhost"
    if not loopback and not keys:
        raise UsageError(
            "without API keys only this machine may ask",
            got=f"--host {host}",
            expected="127.0.0.1",
            fix=f"set {KEYS_VARIABLE} or pass --api-keys FILE",
        )


def serve(bundle: Bundle, settings: ServiceSettings, *, host: str, port: int, keys: list[str]) -> None:
    """Serve until SIGINT or SIGTERM; what was asked before is answered first."""
    require_safe(host, keys)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s %(message)s")
    uvicorn.run(
        build_app(bundle, settings, keys=keys),
        host=host,
        port=port,
        log_level="warning",
        access_log=False,
        timeout_graceful_shutdown=10,
        timeout_keep_alive=75,  # longer than what proxies keep, so that none writes into a connection that closes
        server_header=False,
        lifespan="on",
    )


def require_ray() -> None:
    """MissingBackendError when Ray, which runs replicas, is not installed."""
    if importlib.util.find_spec("ray") is None:
        raise MissingBackendError(
            "replicas and whole tables run on Ray, which is not installed",
            expected="the packages of locks/cluster.txt beside those of locks/cpu.txt",
            fix="pip install --no-deps -r locks/cluster.txt",
        )
