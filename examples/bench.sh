#!/usr/bin/env bash
# What a step of every stage takes, as rows of a markdown table; files and checkpoints are not needed.
#
#   examples/bench.sh plan wan-14b 64 --sp 8        on so many GPUs, counted without any (a minute or two)
#   examples/bench.sh run wan-1.3b 8                the same measured on the GPUs of this machine, and a stream
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

how=$1 preset=$2 gpus=$3
flags=("${@:4}")
stages=(train_camera "train_ar" "distill_ode" "distill_ode --generate" "distill_cd" "train_dmd")

rows() {  # a line of JSON -> a row
    python -c '
import json, sys, datetime
for line in sys.stdin:
    if not line.startswith("{"):
        continue
    z = json.loads(line)
    if "gb" in z and "tflop" in z and z["stage"] != "stream":
        print("| {preset} | {stage} | {gpus} | planned | {total:.1f} | {tflop:.0f} | {seconds_at_limit:.1f} | |".format(
            total=z["gb"]["total"], **z))
    elif z.get("stage") == "stream" or "fps" in z:
        print("| {} | stream | 1 | {} | {} | | | {:.1f} frames/s, the first after {:.2f} s |".format(
            z["preset"], "planned" if "gb" in z else z["card"], f"{z['gb']['total']:.1f}" if "gb" in z else "", z["fps"], z["first_frame_s"]))
    else:
        print("| {preset} | {stage} | {gpus} | {card}, {today} | {peak_gb:.1f} | | {seconds:.1f} | {share:.0%} of its matmuls |".format(
            today=datetime.date.today(), **z))
'
}
