#!/usr/bin/env bash
# The demonstration behind `make demo`: draws identities into RecordIO files, starts a coordinator and two workers
# with one rank each on this machine, trains configs/demo_cpu.toml to its end and evaluates on identities that were
# never trained on. Everything lies in work_dirs/demo; a second run keeps the data and starts the training anew.
# With PROMETHEUS=1 a Prometheus (as on the PATH) records it with the shipped rules, and stays until Ctrl-C on a terminal.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

worker=target/release/arcface-worker
coordinator=target/release/arcface-coordinator
work=work_dirs/demo
identities=500
images=40
pairs=1000

for program in "$worker" "$coordinator"; do
    if [ ! -x "$program" ]; then
        printf 'demo: %s is not built\nhint: make build\n' "$program" >&2
        exit 1
    fi
done

# The parameters are written last: without them, or with others, the data is drawn again.
parameters="$identities identities, $images images each, $pairs pairs, $("$worker" --version)"
if [ "$(cat "$work/data/parameters" 2>/dev/null)" != "$parameters" ]; then
    rm -rf "$work/data"
    mkdir -p "$work/data"
    "$worker" data synth --identities "$identities" --images-per-identity "$images" --pairs "$pairs" --output "$work/data"
    echo "$parameters" >"$work/data/parameters"
fi
rm -rf "$work/run"

# The same network with the weights of a fixed rule instead of trained ones.
"$worker" import --fill golden --network tiny -o "$work/untrained.safetensors"
"$worker" verify --network tiny --weights "$work/untrained.safetensors" "$work/data/synth.bin" --output json |
    python3 -c 'import json, sys; print("untrained accuracy %.4f" % json.load(sys.stdin)[0]["accuracy"])'

# Shows a progress bar on a terminal, then says where model, log and metrics are and the final accuracy.
demo=("$coordinator" run configs/demo_cpu.toml --nodes 2 --slots 1 --device cpu)
if [ -z "${PROMETHEUS:-}" ]; then
    exec "${demo[@]}"
fi

if ! command -v prometheus >/dev/null; then
    printf 'demo: no prometheus is installed\nhint: apt-get install prometheus, or scripts/setup.sh prometheus\n' >&2
    exit 1
fi
metrics=127.0.0.1:9464
worker_metrics=127.0.0.1:9465
page=127.0.0.1:9090
rm -rf "$work/prometheus"
mkdir -p "$work/prometheus"
# The demonstration takes a minute or two: everything is looked at more often than in a cluster.
cat >"$work/prometheus/prometheus.yml" <<END
global: {scrape_interval: 1s, scrape_timeout: 1s, evaluation_interval: 2s}
rule_files: ["$PWD/deploy/prometheus/rules/*.yml"]
scrape_configs:
  - job_name: arcface-coordinator
    static_configs: [{targets: ["$metrics"]}]
  - job_name: arcface-worker
    static_configs: [{targets: ["$worker_metrics", "127.0.0.1:9466"]}]
END
prometheus --config.file="$work/prometheus/prometheus.yml" --storage.tsdb.path="$work/prometheus/data" \
    --web.listen-address="$page" --log.level=warn &
recorder=$!
trap 'kill "$recorder" 2>/dev/null || true' EXIT
echo "Prometheus  http://$page   alerts  http://$page/alerts"
"${demo[@]}" --metrics "$metrics" --worker-metrics "$worker_metrics"
if [ -t 0 ]; then
    echo "Prometheus keeps the record of the run at http://$page until Ctrl-C"
    wait "$recorder"
fi
