#!/usr/bin/env bash
# SIGKILL after the first committed shard of iteration 2, and the same command once more: that shard must stay as
# it is, for no rollout is sampled twice. check.sh runs it.
set -uo pipefail

shards() {
  find artifacts/check -path '*iteration=000002/rollouts*' -name 'part-*.parquet' -exec sha256sum {} + |
    awk '{print $1}' | sort
}

$GRPO run --until 3 &
pid=$!
for _ in $(seq 900); do
  compgen -G 'artifacts/check/.staging/iteration=000002/rollouts-*/*.sidecar.json' > /dev/null && break
  kill -0 $pid 2> /dev/null || break
  sleep 0.1
done
kill -9 $pid 2> /dev/null || echo "the kill came too late: nothing was tried"
wait $pid 2> /dev/null
sleep 2 # until the driver has taken back the memory of the killed
shards > before.txt
echo "shards committed at the kill: $(wc -l < before.txt)"
$GRPO run --until 3 || exit $?
shards > after.txt
if comm -23 before.txt after.txt | grep .; then
  echo "a committed shard changed"
  exit 1
fi
echo "all $(wc -l < before.txt) committed shards kept, $(wc -l < after.txt) now"
$GRPO verify
