#!/usr/bin/env bash
# What a step of every stage takes, and a stream: rows of the README's table. `plan` and `run` need no files.
#
#   examples/bench.sh plan wan-14b 64 --sp 8        on so many GPUs, counted without any, in two minutes
#   examples/bench.sh run wan-1.3b 8                the same, and measured on the GPUs of this machine
#   examples/bench.sh walk --window 8 --sink 1      the shipped students along 1, 10 and 50 times the trained length
#   examples/bench.sh quality tiny                  a shipped world: camera at 48 steps, ar at 48, 4, 2, 1, students at 4, 2, 1
#   examples/bench.sh prices --scenes 32            them with fewer steps, windows, compiled: frames/s, and what it costs
#   examples/bench.sh videos wan-1.3b               own videos of 480x832: frames/s looked at and judged, and encoded
#
# Flags after the number go to every stage. A row: preset, stage, GPUs, flags, card, GB on each, TFLOP and seconds a step
# (for a plan, at the card's limit), and the share of the rate of a large matmul that was reached.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

if [ "$1" = walk ]; then  # a row: world, latent frames, ms a chunk at the end, MB of the state, GB of the process, frames/s
    for world in tiny tiny-hy; do
        for steps in 7 79 399; do
            python stream.py --bench --camera "w*$steps" --ckpt "ckpt/$world/dmd.pt" "${@:2}" | python -c '
import json, sys
z = json.loads(sys.stdin.read())
print("|", " | ".join([*sys.argv[1:], str(z["last_chunk_ms"]), str(z["state_mb"]), "{:.2f}".format(z["peak_gb"]),
                       str(z["fps"])]), "|")
' "$world" "$((steps + 1))"
        done
    done
    exit
fi

# A row: checkpoint, steps, and of each measure its mean ± standard error (of the truth through the VAE its mean)
if [ "$1" = quality ]; then
    python - "${2:?a world, tiny or tiny-hy}" "${@:3}" << 'END'
import json, subprocess, sys

COLUMNS = {"texture": 3, "clutter": 2, "psnr": 1, "counterfactual_accuracy": 2, "rot_err_deg": 1, "trans_err": 3,
           "boundary_jump": 2, "lost": 1, "prompt_accuracy": 2, "coverage": 2}
STEPS = {"camera": [48], "ar": [48, 4, 2, 1], "ode": [4, 2, 1], "cd": [4, 2, 1], "dmd": [4, 2, 1]}


def table_row(name, z, kind=""):
    spread = {column: f" ± {z[error]:.{n}f}" for column, n in COLUMNS.items()
              if not kind and (error := f"{column}_standard_error") in z}
    cells = [f"{z[column + kind]:.{n}f}{spread.get(column, '')}" for column, n in COLUMNS.items()]
    print("|", " | ".join([name, *cells]), "|", flush=True)


world, *flags = sys.argv[1:]
print("| checkpoint, steps |", " | ".join(COLUMNS), "|\n|---|" + "---|" * len(COLUMNS))
for name, counts in STEPS.items():
    for count in counts:
        run = [sys.executable, "stream.py", "--score", "--ckpt", f"ckpt/{world}/{name}.pt", "--sampling-steps", str(count)]
        z = json.loads(subprocess.run(run + flags, stdout=subprocess.PIPE, check=True).stdout.splitlines()[-1])
        z = {name: float("nan") if value is None else value for name, value in z.items()}  # nothing to measure
        if name == "camera":
            table_row("*the truth through the VAE*", z, "_ceiling")
        table_row(f"{name}, {count}", z)
END
    exit
fi

if [ "$1" = prices ]; then  # a row: world, flags, frames/s, seconds to the first frame, each measure ± standard error
    for world in tiny tiny-hy; do
        for flags in "--sampling-steps 4" "--sampling-steps 2" "--sampling-steps 1" "--window 8 --sink 2" \
                "--window 4 --sink 1" --compile; do
            # shellcheck disable=SC2086
            python stream.py --score --ckpt "ckpt/$world/dmd.pt" $flags "${@:2}" | python -c '
import json, sys
z = json.loads(sys.stdin.read())
z = {name: float("nan") if value is None else value for name, value in z.items()}  # nothing to measure
speed = ["{:.3g}".format(z[name]) for name in ("fps", "first_frame_s")]
names = ("texture", "clutter", "psnr", "counterfactual_accuracy", "rot_err_deg", "trans_err")
measures = ["{:.3g} ± {:.2g}".format(z[name], z[name + "_standard_error"]) for name in names]
print("|", " | ".join([*sys.argv[1:], *speed, *measures]), "|")
' "$world" "\`$flags\`"
        done
    done
    exit
fi

# A row: preset, frames/s that one process looks at and judges, TFLOP to encode a frame, frames/s here and at best (H100)
if [ "$1" = videos ]; then
    python - "$2" << 'END'
import contextlib, io, json, subprocess, sys, tempfile, time
from pathlib import Path
import torch
from torch.utils.flop_counter import FlopCounterMode
from data import find_ffmpeg, main, parse_args
from model import CARDS, build_vae, card_name

preset, clips = sys.argv[1], 16
with tempfile.TemporaryDirectory() as folder:
    for n in range(clips):  # five seconds each; no two alike
        subprocess.run([find_ffmpeg(), "-v", "error", "-ss", str(5 * n), "-f", "lavfi", "-i", "testsrc2=s=832x480:r=16",
                        "-frames:v", "77", f"{folder}/{n}.mp4"], check=True)
    rows = [{"file": f"{n}.mp4", "caption": "a test picture", "poses": "w*19"} for n in range(clips)]
    Path(folder, "table.jsonl").write_text("\n".join(map(json.dumps, rows)))
    flags = f"--videos {folder} --out {folder}/out --dry-run --frames 20 --size 480x832 --K 0.5 0.9 0.5 0.5"
    start = time.time()
    with contextlib.redirect_stdout(io.StringIO()):
        main(parse_args(flags.split()))
    looked = 77 * clips / (time.time() - start)

device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as flops:  # after the first: as in a long video
    vae = build_vae(preset)
    _, feat_cache = vae.encode(torch.empty(1, 3, 1, 480, 832))
    before = flops.get_total_flops()
    vae.encode(torch.empty(1, 3, 4, 480, 832), feat_cache)
tflop = (flops.get_total_flops() - before) / 4 / 1e12
vae = build_vae(preset).to(device).eval()
with torch.no_grad():
    _, feat_cache = vae.encode(torch.zeros(1, 3, 1, 480, 832, device=device))
    for n in range(2):  # the second is warm
        start = time.time()
        z, feat_cache = vae.encode(torch.zeros(1, 3, 4, 480, 832, device=device), feat_cache)
        z.cpu()
encoded = 4 / (time.time() - start)
limit = CARDS["H100"][0] / 2 / (tflop * 1e12)  # fp32 convolutions run at half the rate (TF32)
print("|", " | ".join([preset, f"{looked:.0f}", f"{tflop:.2f}", f"{encoded:.2g} ({card_name()})", f"{limit:.0f}"]), "|")
END
    exit
fi

how=$1 preset=$2 gpus=$3 flags=("${@:4}")

row() {  # the last line of what a command prints, JSON -> a row
    tail -n 1 | python -c '
import datetime, json, sys
z = json.loads(sys.stdin.read())
planned = "gb" in z
card = "H100, planned" if planned else "{}, {}".format(z.get("card"), datetime.date.today())
gb = z["gb"]["total"] if planned else z["peak_gb"]
took = ("{:.3g} frames/s, first after {:.2g} s".format(z["fps"], z["first_frame_s"]) if "fps" in z
        else "{:.3g} s".format(z["seconds_at_limit"] if planned else z["seconds"]))
tflop = "{:.0f}".format(z["tflop"]) if planned and "fps" not in z else ""
share = "{:.0%}".format(z["share"]) if "share" in z else ""
print("|", " | ".join([z["preset"], z.get("stage", "stream"), str(z.get("gpus", 1)), sys.argv[1], card,
                       "{:.1f}".format(gb), tflop, took, share]), "|")
' "${flags[*]}"
}

for stage in train_camera train_ar "distill_ode --generate" distill_ode distill_cd train_dmd; do
    read -r script extra <<< "$stage"
    # shellcheck disable=SC2086
    python "$script.py" --preset "$preset" --plan "$gpus" $extra "${flags[@]}" | row
    if [ "$how" = run ]; then
        # shellcheck disable=SC2086
        torchrun --nproc_per_node "$gpus" "$script.py" --preset "$preset" --bench 3 $extra "${flags[@]}" | row
    fi
done
python stream.py --preset "$preset" --plan | row
if [ "$how" = run ]; then
    python stream.py --preset "$preset" --bench | row
fi
