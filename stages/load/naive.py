"""What one writes in an afternoon, to compare with: FastAPI, eager PyTorch, one request at a time, no state kept.

`python -m stages.load.naive BUNDLE PORT`. Same routes as far as the load needs them.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import uvicorn
from fastapi import FastAPI

from hstu.data.histories import histories_from_rows
from serving.bundle import open_bundle
from serving.engines.torch import open_torch_engine


def build_app(folder: Path) -> FastAPI:
    """The application; users' events stand in a dictionary."""
    bundle = open_bundle(folder, verify=False)
    engine = open_torch_engine(folder)
    vocabulary = bundle.vocabulary
    users: dict[str, list[dict[str, Any]]] = {}
    app = FastAPI()

    @app.get("/ready")
    def ready() -> dict[str, bool]:
        return {"ready": True}

    @app.post("/v1/users/{user_id}/events")
    def add_events(user_id: str, body: dict[str, Any]) -> dict[str, Any]:
        users.setdefault(user_id, []).extend(body["events"])
        return {"num_events": len(users[user_id])}

    @app.post("/v1/recommend")
    def recommend(body: dict[str, Any]) -> dict[str, Any]:
        events = (body.get("events") or users[body["user_id"]])[-bundle.config.max_history :]
        row = {
            "item_ids": vocabulary.encode_items(event["item_id"] for event in events),
            "actions": vocabulary.encode_actions(event.get("action") for event in events),
            "timestamps": [event["timestamp"] for event in events],
        }
        feeds = histories_from_rows([row]).feeds(bundle.config)  # type: ignore[list-item]
        answers = engine.run("retrieve", feeds)
        k = body.get("k", 10)
        pairs = zip(answers["top_item_ids"][0][:k].tolist(), answers["top_scores"][0][:k].tolist(), strict=True)
        return {"items": [{"item_id": vocabulary.item(item), "score": score} for item, score in pairs]}

    return app


if __name__ == "__main__":
    uvicorn.run(build_app(Path(sys.argv[1])), port=int(sys.argv[2]), log_level="warning", access_log=False)
