#!/usr/bin/env bash
# Claims of the field on the toy world, each as one command with its table. Under an hour each on two cores.
#
#   examples/ablations.sh filter     a tenth of the clips have the poses of others: are they found, and what do they cost
#                                    a camera that is trained on them?
#
# Flags after the name go to the training script: --steps 1000. What is made stays in data/ablations; clips and latents
# are found there by a second run, training begins anew. ± is the standard error over 64 rooms (or SCENES=32), of one
# training seed.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
case ${1-} in
    filter) ;;
    *) echo "usage: examples/ablations.sh filter [flags of the training script]" >&2; exit 2 ;;
esac
name=$1 flags=("${@:2}") out=data/ablations/$1
mkdir -p "$out"

header() {  # the first columns
    echo "| $1 | psnr | control | rotation, degrees | translation |"
    echo "|$(tr -cd '|' <<< "$1" | sed 's/|/---|/g')---|---|---|---|---|"
}

row() {  # the first cells, a checkpoint
    python stream.py --score --scenes "${SCENES:-64}" --ckpt "$2" --vae ckpt/tiny/vae.pt --out "${2%.pt}.mp4" |
        tail -n 1 | python -c '
import json, sys
z = json.loads(sys.stdin.read())
names = ("psnr", "counterfactual_accuracy", "rot_err_deg", "trans_err")
cells = ["{:.3g} ± {:.2g}".format(z[name], z[name + "_standard_error"]) for name in names]
print("|", " | ".join([sys.argv[1], *cells]), "|")
' "$1"
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
            --vae ckpt/tiny/vae.pt "${which[@]}" >&2
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
        torchrun --standalone --nproc_per_node 2 train_camera.py --data "$folder" --init ckpt/tiny/base.pt \
            --vae ckpt/tiny/vae.pt --batch-size 8 --out "$folder/camera.pt" "${flags[@]}" >&2
        row "$arm | $left" "$folder/camera.pt"
    done
}

"$name"
