"""Falling back in the open: who answers when the first choice cannot, how it is noticed, and how it ends.

Each runtime has a circuit breaker. Failures in a row open it: the runtime is not asked any more, until a probe after
a pause (which doubles, with jitter) finds it well. A change of state is logged once, every fallback is counted.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Generic, Literal, TypeVar

from hstu.errors import CompilerError, InputError, MissingBackendError, UsageError
from serving.batching import BusyError, LateError

LOG = logging.getLogger("hstu.serve")
Level = Literal["engine", "generation", "ranking"]
Y = TypeVar("Y")
_EXPECTED = (CompilerError, ConnectionError, TimeoutError)  # of a runtime that is down, hangs or says what is wrong
_NOT_ITS_FAULT = (InputError, UsageError, BusyError, LateError)  # the request's, the load's


@dataclass(frozen=True, kw_only=True, slots=True)
class Fallback:
    """What an answer says when it does not come from the first choice."""

    level: Level
    wanted: str
    used: str
    reason: str

    def to_dict(self) -> dict[str, str]:
        return {"level": self.level, "wanted": self.wanted, "used": self.used, "reason": self.reason}


class UnavailableError(CompilerError):
    """Nothing that could answer is up; `retry_after_s` says when the next probe is due."""

    exit_code = 3

    def __init__(self, what: str, *, reason: str, retry_after_s: float) -> None:
        super().__init__(what, got=reason, fix=f"ask again in {retry_after_s:.1f} s")
        self.retry_after_s = retry_after_s


class Breaker:
    """Whether a runtime may be asked. Opens after `failures` in a row, lets one probe through after a pause."""

    def __init__(self, name: str, *, failures: int = 3, pause_s: float = 1.0, longest_pause_s: float = 15.0) -> None:
        self.name = name
        self.reason = ""
        self._limit, self._first_pause, self._longest = failures, pause_s, longest_pause_s
        self._failures = 0
        self._pause = pause_s
        self._until = 0.0
        self._open = False
        self._probing = False

    @property
    def state(self) -> Literal["closed", "open", "half-open"]:
        if not self._open:
            return "closed"
        return "half-open" if self._probing or time.monotonic() >= self._until else "open"

    @property
    def retry_after_s(self) -> float:
        """When the next probe is due."""
        return max(0.1, self._until - time.monotonic()) if self._open else 0.1

    def allows(self) -> bool:
        """Whether the caller may ask; when open, one caller at a time after the pause, and that is the probe."""
        if not self._open:
            return True
        if self._probing or time.monotonic() < self._until:
            return False
        self._probing = True
        return True

    def succeeded(self) -> None:
        """It answered."""
        if self._open:
            LOG.warning("%s is back", self.name)
        self._open = self._probing = False
        self._failures, self._pause, self.reason = 0, self._first_pause, ""

    def failed(self, error: BaseException, *, at_once: bool = False) -> None:
        """It did not; `at_once`: it is known to be down, no need to count."""
        self._failures += 1
        self.reason = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"[:200]
        if self._open:
            self._pause = min(self._pause * 2.0, self._longest)
        elif at_once or self._failures >= self._limit:
            self._open = True
            LOG.warning("%s is down, others answer for it: %s", self.name, self.reason)
        self._probing = False
        self._until = time.monotonic() + self._pause * random.uniform(0.8, 1.2)

    def may_be_back(self) -> None:
        """Somebody else says so: the next caller is the probe."""
        self._until = 0.0

    def released(self) -> None:
        """The call ended without telling anything about the runtime."""
        self._probing = False


@dataclass(frozen=True, slots=True)
class Choice(Generic[Y]):
    """A runtime that could answer."""

    name: str
    breaker: Breaker
    ask: Callable[[float], Awaitable[Y]]  # the deadline, of time.monotonic


class Chain:
    """Asks runtimes in order. With `strict` only the first: what it cannot answer is an error."""

    def __init__(self, *, strict: bool = False, retries: int = 1) -> None:
        self.strict, self.retries = strict, retries
        self.counts: Counter[tuple[str, str, str]] = Counter()  # (level, wanted, used)
        self.retried: Counter[str] = Counter()

    async def ask(
        self, level: Level, choices: Sequence[Choice[Y]], *, deadline: float
    ) -> tuple[Y, str, list[Fallback]]:
        """An answer, who gave it, and the fallback if that was not the first choice.

        A failed runtime is asked again after a pause with jitter while it is trusted and time is left. Raises what
        was the request's own fault as it is, UnavailableError when nobody could answer.
        """
        reason = ""
        for index, choice in enumerate(choices[:1] if self.strict else choices):
            if not choice.breaker.allows():
                reason = reason or choice.breaker.reason
                continue
            for attempt in range(self.retries + 1):
                try:
                    answer = await choice.ask(deadline)
                except _NOT_ITS_FAULT:
                    choice.breaker.released()
                    raise
                except asyncio.CancelledError:
                    choice.breaker.released()
                    raise
                except Exception as error:
                    if not isinstance(error, _EXPECTED):
                        LOG.exception("%s failed in a way that nobody foresaw", choice.name)
                    choice.breaker.failed(error, at_once=isinstance(error, (ConnectionError, MissingBackendError)))
                    reason = choice.breaker.reason
                    pause = random.uniform(0.5, 1.5) * 0.02 * 2.0**attempt
                    left = deadline - time.monotonic()
                    if attempt == self.retries or choice.breaker.state != "closed" or pause > 0.25 * left:
                        break
                    self.retried[choice.name] += 1
                    await asyncio.sleep(pause)
                else:
                    choice.breaker.succeeded()
                    if index == 0:
                        return answer, choice.name, []
                    self.counts[level, choices[0].name, choice.name] += 1
                    return (
                        answer,
                        choice.name,
                        [Fallback(level=level, wanted=choices[0].name, used=choice.name, reason=reason)],
                    )
        wait = min((choice.breaker.retry_after_s for choice in choices), default=1.0)
        raise UnavailableError(f"{level}: nothing that could answer is up", reason=reason, retry_after_s=wait)
