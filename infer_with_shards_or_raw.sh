#!/usr/bin/env bash
# A whole test list through the model: raw, shard or combine in; answers, spoken replies and scores out.
#
#   bash infer_with_shards_or_raw.sh LIST RESULT_DIR [DEVICES] [auto|raw|shard|combine] [CHECKPOINT] [TOKEN2WAV] [more arguments of `osum-echat batch`]
#
# DEVICES: cpu (default), or accelerators by number, for example 0,1,2,3 (ACCELERATOR=npu for Ascend): the list is shared out and the results are joined.
# ray: on the devices of a Ray cluster (docs/scale.md); --address auto, --device, --workers and --share may follow.
# The same command goes on where it was stopped. An argument may be "" (its default). Example: ... out/test cpu "" mini "" --task s2s_think

set -euo pipefail
if [ $# -lt 2 ]; then
  sed -n '2,/^$/p' "$0" | sed -n 's/^# \{0,1\}//p'
  exit 2
fi
here=$(cd "$(dirname "$0")" && pwd)
list=$1 result=$2 devices=${3:-cpu} data_type=${4:-auto} checkpoint=${5:-mini} token2wav=${6:-}
shift $(($# < 6 ? $# : 6))
python=${PYTHON:-$([ -x "$here/.venv/bin/python" ] && echo "$here/.venv/bin/python" || echo python3)}
export PYTHONPATH=$here${PYTHONPATH:+:$PYTHONPATH}
arguments=(--list "$list" --out "$result" --data-type "$data_type" --checkpoint "$checkpoint")
[ -n "$token2wav" ] && arguments+=(--token2wav "$token2wav")
if [ "$devices" = ray ]; then
  exec "$python" -m osum_echat.cli batch "${arguments[@]}" --engine ray "$@"
fi
IFS=, read -r -a names <<<"$devices"
pids=()
for i in "${!names[@]}"; do
  device=${names[$i]}
  [[ $device =~ ^[0-9]+$ ]] && device=${ACCELERATOR:-cuda}:$device
  "$python" -m osum_echat.cli batch "${arguments[@]}" --device "$device" --part "$i/${#names[@]}" "$@" &
  pids+=($!)
done
trap 'kill "${pids[@]}" 2>/dev/null || true' INT TERM
failed=0
for pid in "${pids[@]}"; do wait "$pid" || failed=1; done
[ $failed -eq 0 ] || { echo "a part failed (see above); if it was stopped, run the same command again: it goes on" >&2; exit 1; }
"$python" -m osum_echat.cli batch --join "$result" --parts "${#names[@]}"
