"""Requests in company, and alone."""

from __future__ import annotations

import asyncio
import time
from concurrent.futures import ThreadPoolExecutor

from serving.batching import Batcher

WAIT_S = 0.05


def test_who_comes_alone_does_not_wait_for_company_and_a_crowd_is_one_batch():
    async def scenario() -> tuple[float, int]:
        with ThreadPoolExecutor(1) as executor:
            batcher: Batcher[int, int] = Batcher(
                "test", lambda batch: [2 * one for one in batch], executor, wait_s=WAIT_S
            )
            for _ in range(12):
                await asyncio.sleep(2 * WAIT_S)
                began = time.monotonic()
                assert (await batcher.ask(3, deadline=began + 1.0))[0] == 6
                alone = time.monotonic() - began
            for _ in range(3):
                found = await asyncio.gather(*(batcher.ask(n, deadline=time.monotonic() + 1.0) for n in range(8)))
                assert [answer for answer, _ in found] == [2 * n for n in range(8)]
            await batcher.close()
            return alone, batcher.stats.batches[8]

    alone, crowds = asyncio.run(scenario())
    assert alone < WAIT_S / 2
    assert crowds >= 2
