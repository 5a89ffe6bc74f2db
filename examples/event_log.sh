#!/usr/bin/env bash
# A log of events: prepared, a model trained on it, compiled, asked.
# usage: examples/event_log.sh OUT [LOG.csv] [-S section.key=value ...]
set -euo pipefail
out=$1
shift
mkdir -p "$out"
log="$out/events.csv"
if [[ $# -gt 0 && $1 != -* ]]; then
  log=$1
  shift
else # users who walk from one item to the next, now and then to another
  python - > "$log" <<'PY'
import random

draw = random.Random(0)
print("user_id,item_id,action,timestamp")
for user in range(400):
    item, time = draw.randrange(100), 1_700_000_000 + draw.randrange(100_000)
    for _ in range(draw.randrange(5, 25)):
        item = (item + 1) % 100 if draw.random() < 0.8 else draw.randrange(100)
        time += draw.randrange(10, 50_000)
        print(f"user-{user},item-{item},{draw.choice(['view', 'view', 'click', 'like'])},{time}")
PY
fi

python cli.py compile --until bundle --artifacts "$out/artifacts" --reports "$out/reports" \
  -S prepare-data.source=csv -S prepare-data.path="$log" "$@"
python cli.py recommend --bundle "$out/artifacts/bundle" --input "$out/artifacts/bundle/examples.jsonl" --k 5
