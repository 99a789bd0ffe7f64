#!/usr/bin/env bash
# A CELA day on a synthetic log: a local Ray with token authentication, one submitted job, the summary, Ray stopped.
set -euo pipefail
cd "$(dirname "$0")/.."
demo="$PWD/.demo"

if pgrep -u "$(id -u)" -x raylet >/dev/null; then
  echo "error: a Ray is running here already; 'ray stop' it first, or submit the job to it (see README.md)" >&2
  exit 1
fi

if [ ! -f "$demo/data/schema.yaml" ]; then
  python jobs/prepare.py synthetic --out "$demo/data"
fi

# Ray turns token authentication on only where the token is there before it starts.
[ -f ~/.ray/auth_token ] || [ -n "${RAY_AUTH_TOKEN:-}${RAY_AUTH_TOKEN_PATH:-}" ] || ray get-auth-token --generate >/dev/null
export RAY_AUTH_MODE=token RAY_ADDRESS=http://127.0.0.1:8265
trap 'env -u RAY_ADDRESS ray stop >/dev/null 2>&1 || true' EXIT
env -u RAY_ADDRESS ray start --head --disable-usage-stats --dashboard-host 127.0.0.1 >"$demo/ray.log" 2>&1 \
  || { cat "$demo/ray.log" >&2; exit 1; }

rm -rf "$demo/state"
# An epoch of this small log is 44 steps: the defaults, made for longer logs, would stop before the text is learnt, and
# with a text field that starts at a tenth of its scale some orders of the rows would still not have learnt it.
ray job submit --working-dir . -- python jobs/cela_daily.py --data "$demo/data" --state "$demo/state" \
  --train-days 12 --test-days 2 --ctr.epochs 8 --ctr.lr 3e-3 --ctr.table-lr 1e-3 --ctr.table-decay 1e-2 --fuse.scale 1
echo "open $demo/state/releases/2024-01-14/report.html"
