"""
Stage 0: teach a text-to-video model to obey a camera.

in:  ckpt/base.pt, latents with one camera per latent frame (data.py)
out: ckpt/camera.pt, a bidirectional model: every frame sees every frame

Plain flow matching. One noise level sigma per video, mix the clean latents with noise, regress the slope from data to
noise. The camera enters through PRoPE, whose output layer starts at zero: at step 0 this is the base model, exactly.
In some videos the first frame or two are given, as an image to go on from: they stay at noise level zero, without loss.

    x_t = (1 - sigma) x0 + sigma noise          loss = || v(x_t, sigma, prompt, camera) - (noise - x0) ||^2

$ python train_camera.py --no-camera            the toy world has no base model to download: make one, camera unseen
$ python train_camera.py
$ torchrun --nproc_per_node 2 train_camera.py --batch-size 8
"""
import argparse
import gc
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from tqdm import tqdm

from data import Batch, get_batch, open_latents, open_log, positive, rand, randn, sample_prefix, write_log, write_sheet
from model import (
    add_noise, build, check_finite, choose, fresh_weights, gather, load_checkpoint, load_state, load_vae, masked_mse,
    rollout, save_checkpoint, save_state, shard, shift_sigma, start_process_group, update_ema, with_camera,
)

RECIPES = {
    "tiny": dict(steps=3000, batch_size=16, accum=1, lr=2e-3, warmup=50, betas=(0.9, 0.99), max_grad_norm=1.0,
                 ema_decay=0.995, shift=3.0, null_prob=0.1, prefix_prob=0.25, guidance=1.25, sampling_steps=48),
    # minWM: 5 k steps, 32 videos, lr 2e-6, clip 10, shift 5, guidance 8. Ours: EMA from the first step, no loss weight
    # (theirs falls to zero at pure noise, where every sample starts).
    "wan-1.3b": dict(steps=5000, batch_size=1, accum=4, lr=2e-6, warmup=0, betas=(0.0, 0.999), max_grad_norm=10.0,
                     ema_decay=0.99, shift=5.0, null_prob=0.0, prefix_prob=0.0, guidance=8.0, sampling_steps=50),
}
# HY's images come with its prompts (data.py --image-share), and need no frames that are given.
RECIPES["tiny-hy"] = RECIPES["tiny"] | dict(steps=10000, lr=4e-3, ema_decay=0.998, prefix_prob=0.0)
# minWM: 8 k steps, 32 videos, guidance 6, and Muon at lr 1e-5, whose updates are as large as AdamW's at 2e-6, weight
# decay 1e-4, noise levels logit-normal with shift 3. And one change at step 0: the text is no longer told the noise
# level (model.py, HYConfig), or it could not be cached later.
RECIPES["hy-8b"] = RECIPES["wan-1.3b"] | dict(steps=8000, betas=(0.9, 0.999), max_grad_norm=1.0, null_prob=0.1,
                                              guidance=6.0)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--init", type=Path, default=Path("ckpt/base.pt"), help="weights to start from")
    p.add_argument("--data", type=Path, default=Path("data/toy"), help="latents folder (python data.py)")
    p.add_argument("--out", type=Path, help="checkpoint to write; default ckpt/camera.pt or, without camera, base.pt")
    p.add_argument("--preset", default="tiny", choices=RECIPES, help="network, and the defaults of the flags below")
    p.add_argument("--resume", action="store_true", help="continue from the state beside --out")
    p.add_argument("--steps", type=positive)
    p.add_argument("--batch-size", type=positive, help="videos per process and micro-batch")
    p.add_argument("--accum", type=positive, help="micro-batches per step")
    p.add_argument("--lr", type=float)
    p.add_argument("--max-grad-norm", type=float)
    p.add_argument("--ema-decay", type=float)
    p.add_argument("--no-camera", action="store_true", help="train the toy world's base model from scratch instead")
    p.add_argument("--betas", type=float, nargs=2, help="of AdamW")
    p.add_argument("--warmup", type=int, help="steps until lr is reached")
    p.add_argument("--shift", type=float, help="of the noise levels, towards pure noise")
    p.add_argument("--null-prob", type=float, help="how often the prompt is dropped, so that guidance has a null")
    p.add_argument("--prefix-prob", type=float, help="how often the first latent frames are given, as an image")
    p.add_argument("--guidance", type=float, help="for sampling; 1 is off")
    p.add_argument("--sampling-steps", type=positive)
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--log-every", type=positive, default=10)
    p.add_argument("--save-every", type=positive, default=500)
    p.set_defaults(**RECIPES[p.parse_known_args(argv)[0].preset])
    args = p.parse_args(argv)
    args.out = args.out or Path("ckpt/base.pt" if args.no_camera else "ckpt/camera.pt")
    return args


def flow_matching_loss(net: nn.Module, batch: Batch, camera: tuple | None, shift: float, null_prob: float,
                       prefix_prob: float) -> Tensor:
    """|| v - (noise - x0) ||^2 at one noise level per video."""
    f = batch.x0.shape[1]
    free = sample_prefix(batch.rng, f, prefix_prob).to(batch.x0.device)
    sigma = shift_sigma(rand(batch.rng, 1), shift).to(batch.x0.device) * free  # [b f]
    noise = randn(batch.rng, *batch.x0.shape[1:]).to(batch.x0.device)
    drop = rand(batch.rng, 1).to(batch.x0.device)[:, 0] < null_prob
    prompt = choose(drop, batch.null, batch.prompt)
    v = net(add_noise(batch.x0, noise, sigma), sigma, prompt, camera)
    return masked_mse(v, noise - batch.x0, free)


def main(args: argparse.Namespace) -> None:
    # -- setup (same in every stage) ---------------------------------------------------------------------------------
    rank, world_size, device = start_process_group()
    data = open_latents(args.data, args.preset)
    vae = load_vae(Path(data.meta["vae"]), device, data.meta["vae_fingerprint"])
    folder = args.out.with_suffix("")  # beside the checkpoint: state to resume from, metrics, sheets of samples
    # -- end ---------------------------------------------------------------------------------------------------------

    if args.no_camera:
        weights, source = fresh_weights(args.preset, camera=False, seed=args.seed), None
    else:
        weights, source = load_checkpoint(args.init, "base", "camera", preset=args.preset)
        weights, added = with_camera(weights, args.preset)
        if rank == 0 and added:
            print(f"{args.init} has no camera: {added} tensors of it are added, at zero output")
    with torch.device("meta"):
        net, ema = (build(args.preset, camera=not args.no_camera) for _ in range(2))
    net, ema = shard(net, weights, device, train=True), shard(ema, weights, device)
    optimizer = torch.optim.AdamW(net.parameters(), lr=args.lr, betas=args.betas, weight_decay=0.01, fused=True)
    nets, optimizers = {"net": net, "ema": ema}, {"net": optimizer}
    meta = {"stage": "base" if args.no_camera else "camera", "preset": args.preset, "camera": not args.no_camera,
            "K": data.meta["K"], "size": data.meta["size"], "fps": data.meta["fps"], "frames": data.meta["frames"],
            "vae_fingerprint": data.meta["vae_fingerprint"],
            "prefix_prob": 0.0 if args.no_camera else args.prefix_prob, "chunk": 0, "shift": args.shift,
            "sampler": "euler", "steps": args.sampling_steps, "guidance": args.guidance,
            "from": source and f"{args.init.name} at step {source['step']}"}

    # -- start (same in every stage) ---------------------------------------------------------------------------------
    step = load_state(folder, nets, optimizers) if args.resume else 0
    if rank == 0:
        open_log(folder / "metrics.jsonl", step)
        print(f"{args.out}: step {step} of {args.steps}" + (", nothing left to do" if step >= args.steps else ""))
    # -- end ---------------------------------------------------------------------------------------------------------
    bar = tqdm(total=args.steps, initial=step, desc=meta["stage"], disable=rank > 0)
    while step < args.steps:
        t0, loss_sum, ids = time.time(), 0.0, []
        optimizer.param_groups[0]["lr"] = args.lr * min(1.0, (step + 1) / max(1, args.warmup))
        for micro in range(args.accum):
            net.set_requires_gradient_sync(micro == args.accum - 1)  # reduce over ranks once a step
            part, parts = micro * world_size + rank, args.accum * world_size
            batch = get_batch(data, args.seed, step, part, parts, args.batch_size, device)
            camera = None if args.no_camera else batch.camera
            loss = flow_matching_loss(net, batch, camera, args.shift, args.null_prob, meta["prefix_prob"]) / args.accum
            loss.backward()
            loss_sum, ids = loss_sum + loss.detach(), ids + batch.ids
        grad_norm = nn.utils.clip_grad_norm_(net.parameters(), args.max_grad_norm).full_tensor()
        metrics = check_finite(step, {"loss": loss_sum, "grad_norm": grad_norm}, ids)
        optimizer.step()
        optimizer.zero_grad()
        update_ema(ema, net, args.ema_decay)
        step += 1

        # -- log and save (same in every stage) ----------------------------------------------------------------------
        bar.update()
        bar.set_postfix({name: f"{value:.4g}" for name, value in metrics.items()}, refresh=False)
        if step % args.log_every == 0 and rank == 0:
            write_log(folder / "metrics.jsonl", {"step": step, **metrics, "sec": time.time() - t0})
        if step % args.save_every == 0 or step == args.steps:
            weights = gather(ema)
            if rank == 0:
                save_checkpoint(args.out, weights, meta | {"step": step})
            save_state(folder, step, nets, optimizers)  # after it: a state to resume from implies its checkpoint
            shown = get_batch(data, args.seed, -1, 0, 1, min(4, args.batch_size), device)
            chunks = rollout(ema, meta, shown.rng, shown.x0.shape[1:], shown.prompt, shown.null, shown.camera)
            x0 = torch.cat(list(chunks), dim=1)
            if rank == 0:
                write_sheet(folder / f"sheet-{step:06d}.png", [vae.decode(shown.x0)[0], vae.decode(x0)[0]])
        # -- end -----------------------------------------------------------------------------------------------------


if __name__ == "__main__":
    # -- run (same in every stage) ----------------------------------------------------------------------------------
    try:
        main(parse_args())
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    gc.collect()  # frees FSDP's reference cycles, which could otherwise outlive the process group
    dist.destroy_process_group()
    # -- end --------------------------------------------------------------------------------------------------------
