#!/usr/bin/env bash
# A checkpoint of Meta's research trainer: compiled, asked, shipped, installed, verified.
# usage: examples/meta_checkpoint.sh FILE HEADS OUT [-S section.key=value ...]
set -euo pipefail
file=$1 heads=$2 out=$3
shift 3

python cli.py compile --until bundle --artifacts "$out/artifacts" --reports "$out/reports" \
  -S checkpoint.source=meta -S checkpoint.path="$file" -S checkpoint.num_heads="$heads" "$@"

# Items are Meta's raw ids; times are seconds, oldest first.
echo '{"user_id": 1, "events": [{"item_id": 3, "timestamp": 1000}, {"item_id": 5, "timestamp": 2000}]}' \
  | python cli.py recommend --bundle "$out/artifacts/bundle" --input - --k 5

openssl ecparam -name prime256v1 -genkey -noout -out "$out/key.pem"
openssl ec -in "$out/key.pem" -pubout -out "$out/pub.pem"
python cli.py ship --bundle "$out/artifacts/bundle" --output "$out/shipped" --sign "$out/key.pem"
python cli.py install "$out/shipped" --root "$out/root" --key "$out/pub.pem"
python cli.py verify "$out/root/current" --key "$out/pub.pem"
