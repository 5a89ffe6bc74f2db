"""A day in the service: shoppers who browse, return and ask to be forgotten; every route is called once or more.

python cli.py serve --bundle artifacts/bundle &
python examples/behaviour.py --url http://127.0.0.1:8000 --requests artifacts/bundle/examples.jsonl
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
from pathlib import Path

from serving.client import Client, ServiceError
from serving.schemas import Event, RecommendRequest


async def main(url: str, requests: Path) -> None:
    """Print what a shopper would see."""
    histories = [json.loads(line) for line in requests.read_text(encoding="utf-8").splitlines()]
    chance = random.Random(7)
    async with Client(url, key=os.environ.get("HSTU_API_KEY")) as client:
        assert await client.health()
        print("ready:", await client.ready())
        served = await client.bundle()
        print("bundle", served["id"][:12], "runtimes", [runtime["name"] for runtime in served["runtimes"]])
        shoppers = {}
        for number, history in enumerate(histories):
            events = [Event.model_validate(event) for event in history["events"]]
            name = f"shopper-{number}"
            await client.add_events(name, events[:-3])
            shoppers[name] = events[-3:]
        for name, later in shoppers.items():  # each comes back three times, with something new done
            for event in later:
                await client.add_events(name, [event])
                answer = await client.recommend(user_id=name, k=3)
                print(
                    f"{name}: {[item.item_id for item in answer.items]} by {answer.served.strategy} "
                    f"({answer.served.runtime}), state {answer.served.cache}, {answer.served.timing.total_ms:.1f} ms"
                )
                if chance.random() < 0.5:  # takes the first recommendation
                    clicked = Event(
                        item_id=answer.items[0].item_id, timestamp=later[-1].timestamp, action=later[-1].action
                    )
                    await client.add_events(name, [clicked])
        favourite = await client.recommend(
            user_id="shopper-0", k=5, strategy="unified", task_weights={"monetisation": 3}
        )
        print("weighted towards a sale:", [(item.item_id, round(item.score, 3)) for item in favourite.items])
        scored = await client.score(
            user_id="shopper-0", candidates=[item.item_id for item in favourite.items], similarity=True
        )
        print("scores:", {item.item_id: {k: round(v, 3) for k, v in item.tasks.items()} for item in scored.items})
        batch = await client.recommend_batch([RecommendRequest(user_id=name, k=1) for name in [*shoppers, "stranger"]])
        print("batch statuses:", [entry.status for entry in batch.answers])
        for strategy in ("engine", "vllm", "torch"):
            answer = await client.recommend(user_id="shopper-1", k=3, strategy=strategy, deadline_ms=20_000)
            print(strategy, [item.item_id for item in answer.items], "fallbacks", answer.served.fallbacks)
        print("forgotten:", (await client.delete_user("shopper-1")).deleted)
        try:
            await client.recommend(user_id="shopper-1")
        except ServiceError as error:
            print("after that:", error.status)
        lines = [line for line in (await client.metrics()).splitlines() if line.startswith("hstu_cache_requests")]
        print("\n".join(lines))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--requests", type=Path, default=Path("artifacts/bundle/examples.jsonl"))
    arguments = parser.parse_args()
    asyncio.run(main(arguments.url, arguments.requests))
