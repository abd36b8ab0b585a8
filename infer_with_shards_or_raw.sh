#!/usr/bin/env bash
# A whole test list through the model: raw, shard or combine in, hypotheses and WER out.
#
#   bash infer_with_shards_or_raw.sh LIST RESULT_DIR [DEVICES] [raw|shard] [CHECKPOINT] [TOKEN2WAV] [more arguments of `osum-echat batch`]
#
# DEVICES: cpu (default), or accelerators by number, for example 0,1,2,3 (ACCELERATOR=npu for Ascend): the list is shared out and the results are joined.
set -euo pipefail
cd "$(dirname "$0")"
if [ $# -lt 2 ]; then
  sed -n '2,7p' "$0" | sed 's/^# \{0,1\}//'
  exit 2
fi
list=$1 result=$2 devices=${3:-cpu} data_type=${4:-raw} checkpoint=${5:-mini} token2wav=${6:-}
shift $(($# < 6 ? $# : 6))
python=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)}
arguments=(--list "$list" --out "$result" --data-type "$data_type" --checkpoint "$checkpoint")
[ -n "$token2wav" ] && arguments+=(--token2wav "$token2wav")
IFS=, read -r -a names <<<"$devices"
pids=()
for i in "${!names[@]}"; do
  device=${names[$i]}
  [[ $device =~ ^[0-9]+$ ]] && device=${ACCELERATOR:-cuda}:$device
  "$python" -m osum_echat.cli batch "${arguments[@]}" --device "$device" --part "$i/${#names[@]}" "$@" &
  pids+=($!)
done
failed=0
for pid in "${pids[@]}"; do wait "$pid" || failed=1; done
[ $failed -eq 0 ] || { echo "a part failed; run the same command again: it goes on where it stopped" >&2; exit 1; }
"$python" -m osum_echat.cli batch --join "$result" --parts "${#names[@]}"
