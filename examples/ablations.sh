#!/usr/bin/env bash
# Claims of the field on the toy world, each as one command with its table. They start from the shipped checkpoints, or
# from $CKPT, and from data/toy, which `python data.py --vae ckpt/tiny/vae.pt` makes. About an hour each on two cores.
#
#   examples/ablations.sh steps      control against training steps of the camera stage
#   examples/ablations.sh batch      batches of 2, 4, 8, 16, 32, as many videos seen of each
#   examples/ablations.sh poses      poses with noise: none, half a step, a step, two
#   examples/ablations.sh forcing    teacher forcing against diffusion forcing
#   examples/ablations.sh teacher    ODE pairs of the autoregressive teacher against those of a bidirectional one
#   examples/ablations.sh init       DMD from nothing, from ar, ode, cd (60 updates, as in cut and scores)
#   examples/ablations.sh longer     DMD's curve, to twice its recipe
#   examples/ablations.sh cut        self-rollouts cut exactly, through a leaking cache, with a second pass (SGF)
#   examples/ablations.sh scores     fake_score on the generator's own rollout, too; scores at uniform levels (FastVideo)
#   examples/ablations.sh filter     a tenth of the clips have the poses of others: are they found, what do they cost?
#
# and papers around the recipe (variants/), each beside a control of as many steps:
#
#   examples/ablations.sh muon       AdamW against Muon
#   examples/ablations.sh scd        an encoder once a chunk and a light decoder, against a shallow network
#   examples/ablations.sh ddo        a likelihood ratio as discriminator, against data alone
#   examples/ablations.sh bridge     chunks from the last frame, against chunks from noise; both distilled
#   examples/ablations.sh precond    consistency trajectories with coefficients read off the teacher, against plain ones
#
# Flags after the name go to every training command: --seed 1, --steps 500. What is made stays in data/ablations. ± is the
# standard error over 64 rooms (or SCENES=32), of one training seed.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export PYTHONPATH=.
case ${1-} in
    steps | batch | poses | forcing | teacher | init | longer | cut | scores | filter) ;;
    muon | scd | ddo | bridge | precond) ;;
    *) sed -n '2,/^set /{/^#/p}' examples/ablations.sh >&2; exit 2 ;;
esac
name=$1 flags=("${@:2}") out=data/ablations/$1 ckpt=${CKPT:-ckpt/tiny}
mkdir -p "$out"

train() {  # a script and its flags, in one process: on two cores that is faster than two
    python "$1" --vae "$ckpt/vae.pt" "${@:2}" "${flags[@]}" >&2
}

header() {  # the names of the first columns
    echo "| $1 | texture | clutter | psnr | control | rotation, degrees | translation | lost |"
    echo "|$(tr -cd '|' <<< "$1" | sed 's/|/---|/g')---|---|---|---|---|---|---|---|"
}

score=(stream.py --score)

row() {  # the first cells, a checkpoint, flags of stream.py
    python "${score[@]}" --scenes "${SCENES:-64}" --ckpt "$2" --vae "$ckpt/vae.pt" --out "$out/$(tr / - <<< "${2%.pt}").mp4" "${@:3}" |
        tail -n 1 | python -c '
import json, sys
z = json.loads(sys.stdin.read())
z = {name: float("nan") if value is None else value for name, value in z.items()}  # None: there was nothing to measure
names = ("texture", "clutter", "psnr", "counterfactual_accuracy", "rot_err_deg", "trans_err", "lost")
cells = ["{:.3g} ± {:.2g}".format(z[name], z[name + "_standard_error"]) for name in names]
print("|", " | ".join([sys.argv[1], *cells]), "|")
' "$1"
}

steps() {
    rm -f "$out"/camera/step-*.pt  # of an earlier, longer run
    train train_camera.py --init "$ckpt/base.pt" --out "$out/camera.pt" --steps 6000 --save-every 1000 \
        --keep 100
    header "steps, of which the rate falls over the second half"
    for save in "$out"/camera/step-*.pt; do
        row "$((10#$(basename "$save" .pt | cut -d- -f2)))" "$save"
    done
}

batch() {
    header "videos a step"
    for size in 2 4 8 16 32; do  # 24,000 videos of each
        train train_camera.py --init "$ckpt/base.pt" --out "$out/$size.pt" --batch-size "$size" \
            --steps $((24000 / size))
        row "$size" "$out/$size.pt"
    done
}

poses() {
    header "noise on every pose, in steps of 0.08 units and 3 degrees"
    for noise in 0 0.5 1 2; do
        python - "$out/data-$noise" "$noise" << 'END'
import shutil, sys
from pathlib import Path
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from data import STEP, TURN, rotation

out, noise = Path(sys.argv[1]), float(sys.argv[2])
out.mkdir(exist_ok=True)
shutil.copy("data/toy/prompts.safetensors", out)
rng = torch.Generator().manual_seed(0)
for file in sorted(Path("data/toy").glob("latents-*.safetensors")):
    with safe_open(file, "pt") as shard:
        tensors, about = {name: shard.get_tensor(name) for name in shard.keys()}, shard.metadata()
    n, f = tensors["viewmats"].shape[:2]
    off = torch.eye(4).repeat(n, f, 1, 1)
    yaw, pitch = noise * TURN * torch.randn(2, n, f, generator=rng)
    off[..., :3, :3] = rotation(yaw, pitch)
    off[..., :3, 3] = noise * STEP * torch.randn(n, f, 3, generator=rng) / 3**0.5
    off[:, 0] = torch.eye(4)  # the first frame is the origin
    save_file(tensors | {"viewmats": off @ tensors["viewmats"]}, out / file.name, about)
END
        train train_camera.py --init "$ckpt/base.pt" --data "$out/data-$noise" --out "$out/$noise.pt" --steps 3000
        row "$noise" "$out/$noise.pt"
    done
}

forcing() {
    header "past in training, sampling steps"
    for script in train_ar.py examples/variants/diffusion_forcing.py; do
        made=$out/$(basename "$script" .py).pt
        train "$script" --init "$ckpt/camera.pt" --out "$made" --steps 1500
        row "$(basename "$script" .py), 48" "$made"
        row "$(basename "$script" .py), 4" "$made" --sampling-steps 4
    done
}

teacher() {
    header "pairs of, sampling steps"
    for script in distill_ode.py examples/variants/ode_bidirectional.py; do
        made=$out/$(basename "$script" .py) who=()
        if [ "$script" != distill_ode.py ]; then
            who=(--teacher "$ckpt/camera.pt")
        fi
        train "$script" --init "$ckpt/ar.pt" "${who[@]}" --pairs "$made-pairs" --out "$made.pt" --generate
        train "$script" --init "$ckpt/ar.pt" "${who[@]}" --pairs "$made-pairs" --out "$made.pt"
        for n in 4 2 1; do
            row "$(basename "$script" .py), $n" "$made.pt" --sampling-steps "$n"
        done
    done
}

init() {
    header "DMD from, sampling steps"
    python - "$ckpt" "$out" << 'END'
import sys
from pathlib import Path
from model import fresh_weights, load_checkpoint, save_checkpoint

ckpt, out = map(Path, sys.argv[1:])
weights, meta = load_checkpoint(ckpt / "ar.pt", "ar")
student = meta | {"stage": "ode", "sampler": "few_step", "sampling_steps": 4, "guidance": 1.0}  # in name alone
save_checkpoint(out / "as-ar.pt", weights, student)
save_checkpoint(out / "as-nothing.pt", fresh_weights(meta["preset"], camera=True, seed=0), student)
END
    for start in nothing ar ode cd; do
        from=$ckpt/$start.pt
        if [ -e "$out/as-$start.pt" ]; then
            from=$out/as-$start.pt
        fi
        train train_dmd.py --init "$from" --scores "$ckpt/camera.pt" --out "$out/$start.pt" --steps 60
        row "$start, before, 4" "$from"
        for n in 4 2 1; do
            row "$start, $n" "$out/$start.pt" --sampling-steps "$n"
        done
    done
}

longer() {
    rm -f "$out"/dmd/step-*.pt  # of an earlier, longer run
    train train_dmd.py --init "$ckpt/ode.pt" --scores "$ckpt/camera.pt" --out "$out/dmd.pt" --steps 240 --save-every 60 \
        --keep 100
    header "updates of the generator, sampling steps"
    for save in "$ckpt/ode.pt" "$out"/dmd/step-*.pt; do
        for n in 4 2 1; do
            row "$(basename "$save" .pt), $n" "$save" --sampling-steps "$n"
        done
    done
}

cut_exactly() {
    header "rollouts"
    for script in train_dmd.py examples/variants/leaky_dmd.py examples/variants/sgf.py; do
        made=$out/$(basename "$script" .py).pt
        train "$script" --init "$ckpt/ode.pt" --scores "$ckpt/camera.pt" --out "$made" --steps 60
        row "$(basename "$script" .py)" "$made"
    done
}

scores() {
    cat > "$out/uniform_dmd.py" << 'END'
# train_dmd.py, but for the levels at which the scores are asked
import gc
import sys
import torch.distributed as dist
import train_dmd
from model import add_noise

def noised(x, batch, meta):
    sigma, noise = (0.02 + 0.96 * batch.rand(1)) * batch.generated, batch.noise()
    return add_noise(x, noise, sigma), noise, sigma

train_dmd.noised = noised
train_dmd.main(train_dmd.parse_args())
gc.collect()
dist.destroy_process_group()
END
    header "scores"
    for script in train_dmd.py examples/variants/reuse_dmd.py "$out/uniform_dmd.py"; do
        made=$out/$(basename "$script" .py)-made.pt
        train "$script" --init "$ckpt/ode.pt" --scores "$ckpt/camera.pt" --out "$made" --steps 60
        row "$(basename "$script" .py)" "$made"
    done
}

filter() {
    if [ ! -e "$out/wrong.jsonl" ]; then
        python - "$out" << 'END'
import json, sys
from pathlib import Path
import imageio.v3 as imageio
import torch
from tqdm import tqdm
from data import FPS, K_SQUARE, Scene, intrinsics, parse_trajectory, render, sample_toy, to_bytes

out, count = Path(sys.argv[1]), 1024
(out / "clips").mkdir(exist_ok=True)
prompts, paths, scene = sample_toy(count, seed=7, steps=7, held=False)
for n in tqdm(range(count), "render"):
    room = Scene(*(z[n : n + 1] for z in scene))
    video = to_bytes(render(room, parse_trajectory(paths[n])[None], intrinsics(K_SQUARE), 64))[0]
    imageio.imwrite(out / f"clips/{n:04d}.mp4", video.permute(1, 2, 3, 0).numpy(), fps=FPS, macro_block_size=2,
                    output_params=["-crf", "12"])
rows = [{"file": f"{n:04d}.mp4", "caption": prompts[n], "poses": paths[n], "K": K_SQUARE} for n in range(count)]
some = torch.randperm(count, generator=torch.Generator().manual_seed(0))[: count // 10].tolist()
exchanged = {n: paths[other] for n, other in zip(some, some[1:] + some[:1], strict=True)}
for name, poses in ("right", {}), ("wrong", exchanged):
    lines = [json.dumps(row | {"poses": poses.get(n, row["poses"])}) for n, row in enumerate(rows)]
    (out / f"{name}.jsonl").write_text("\n".join(lines))
END
    fi
    read -ra keep <<< "$(python -c 'from data import DOUBTFUL; print("--keep", *DOUBTFUL)')"
    header "clips | wrong ones left out | right ones left out"
    for arm in wrong-kept wrong-doubted-dropped right-kept right-doubted-dropped; do
        table=$out/${arm%%-*}.jsonl folder=$out/$arm which=()
        if [[ $arm == *-kept ]]; then
            which=("${keep[@]}")
        fi
        mkdir -p "$folder"
        cp -n "$out"/*/survey-*.jsonl "$folder" 2> /dev/null || true  # what was seen of the clips is the same for all
        torchrun --standalone --nproc_per_node 2 data.py --videos "$out/clips" --table "$table" --out "$folder" \
            --vae "$ckpt/vae.pt" "${which[@]}" >&2
        left=$(python - "$out/right.jsonl" "$table" "$folder/report.jsonl" << 'END'
import json, sys
from pathlib import Path
right, table, report = ([json.loads(line) for line in Path(path).read_text().splitlines()] for path in sys.argv[1:])
wrong = [a["poses"] != b["poses"] for a, b in zip(right, table, strict=True)]
gone = [[not row["kept"] for row, is_wrong in zip(report, wrong, strict=True) if is_wrong == which]
        for which in (True, False)]
print(" | ".join(f"{sum(z)} of {len(z)}" for z in gone))
END
        )
        train train_camera.py --data "$folder" --init "$ckpt/base.pt" --out "$folder/camera.pt" --steps 3000
        row "$arm | $left" "$folder/camera.pt"
    done
}

muon() {
    header "optimizer, steps"
    for script in train_camera.py examples/variants/muon.py; do
        made=$out/$(basename "$script" .py)
        rm -f "$made"/step-*.pt  # of an earlier, longer run
        train "$script" --init "$ckpt/base.pt" --out "$made.pt" --steps 3000 --save-every 1000 --keep 100
        for save in "$made"/step-*.pt; do
            row "$(basename "$made" | sed 's/train_camera/AdamW/; s/muon/Muon/'), $((10#$(basename "$save" .pt | cut -d- -f2)))" "$save"
        done
    done
}

scd() {
    header "network, sampling steps"
    score=(examples/variants/scd.py --score)
    for arm in "--decoder-kind prefix" "--decoder-kind tokens" "--shallow 2"; do
        made=$out/${arm##* }.pt
        # shellcheck disable=SC2086
        python examples/variants/scd.py --cost $arm >&2
        # shellcheck disable=SC2086
        train examples/variants/scd.py --init "$ckpt/ar.pt" --out "$made" $arm
        for n in 48 4; do
            row "\`$arm\`, $n" "$made" --sampling-steps "$n"
        done
    done
}

ddo() {
    train examples/variants/ddo.py --init "$ckpt/ar.pt" --pairs "$out/samples" --out "$out/ddo.pt" --generate
    header "loss, training steps, sampling steps"
    row "the start, 0, 48" "$ckpt/ar.pt"
    row "the start, 0, 4" "$ckpt/ar.pt" --sampling-steps 4
    for alpha in 1 0; do
        made=$out/alpha-$alpha
        rm -f "$made"/step-*.pt
        train examples/variants/ddo.py --init "$ckpt/ar.pt" --pairs "$out/samples" --out "$made.pt" --alpha "$alpha" \
            --keep 100
        for save in "$made"/step-*.pt; do
            row "alpha $alpha, $((10#$(basename "$save" .pt | cut -d- -f2))), 48" "$save"
        done
        row "alpha $alpha, all, 4" "$made.pt" --sampling-steps 4
    done
    train train_ar.py --init "$ckpt/ar.pt" --out "$out/plain.pt" --steps 300 --batch-size 16 --lr 5e-5 --warmup 20 \
        --cooldown 0 --ema-decay 0.99
    row "flow matching on data/toy, all, 48" "$out/plain.pt"
}

bridge() {
    header "a chunk starts from, sampling steps"
    score=(examples/variants/bridge.py --stream --score)
    for form in noise flow bridge; do
        made=$out/$form
        train examples/variants/bridge.py --init "$ckpt/ar.pt" --form "$form" --out "$made.pt"
        train examples/variants/bridge.py --init "$made.pt" --form "$form" --out "$made-cd.pt" --consistency
        for n in 48 4; do
            row "$form, $n" "$made.pt" --sampling-steps "$n"
        done
        for n in 4 2 1; do
            row "$form, distilled, $n" "$made-cd.pt" --sampling-steps "$n"
        done
    done
}

precond() {
    header "jumps, training steps, sampling steps"
    score=(examples/variants/distill_cd_precond.py --score)
    for kind in plain analytic; do
        made=$out/$kind
        rm -f "$made"/step-*.pt
        train examples/variants/distill_cd_precond.py --init "$ckpt/ar.pt" --precond "$kind" --out "$made.pt" \
            --save-every 100 --keep 100
        for save in "$made"/step-*.pt; do
            row "$kind, $((10#$(basename "$save" .pt | cut -d- -f2))), 4" "$save"
        done
        for n in 2 1; do
            row "$kind, all, $n" "$made.pt" --sampling-steps "$n"
        done
    done
}

if [ "$name" = cut ]; then
    name=cut_exactly
fi
"$name"
