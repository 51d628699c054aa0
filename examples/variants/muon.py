"""
Stage 0, a variant: Muon (Jordan, kellerjordan.github.io/posts/muon). Read as a diff, train_camera.py against this.

AdamW scales every number of a gradient by its own size. Muon takes the matrices of the blocks whole: of the momentum of
each it keeps the directions and sets all singular values to about one, so that rare directions learn as fast as loud
ones. minWM trains HunyuanVideo this way. What changes:
  1. the optimizer: matrices of the blocks by Muon, all else by AdamW. A number of an update is a fifth of lr, root mean
     square: about AdamW's with betas (0.9, 0.99), and --lr means the same; with beta1 = 0, Wan's, AdamW's is lr itself
  2. every rank makes the whole matrix of the update: any number of ranks makes the same, up to rounding

    m <- .95 m + .05 g      u = .95 m + .05 g = U S V^T      W <- (1 - .01 lr) W - .2 lr sqrt(max(rows, columns)) U V^T

--plan and --bench count and time AdamW: two moments of each number, and none of Muon's products.

$ PYTHONPATH=. python examples/variants/muon.py --out ckpt/muon.pt
"""
import argparse
import gc
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import distribute_tensor
from tqdm import tqdm

from data import (
    Batch, HelpFormatter, check_vae, fraction, get_batch, open_latents, open_log, positive, random_batch, set_recipe,
    write_log, write_samples,
)
from model import (
    Meta, Nets, Work, add_noise, batch_part, bill, build, check_finite, describe_run, fresh_weights, load_checkpoint,
    load_state, lock_folder, masked_mse, origin, print_peak, save_average, save_state, shard, shift_sigma,
    start_process_group, stopping, update_ema, where_prompt, with_camera,
)


def flow_matching_loss(net: nn.Module, batch: Batch, meta: Meta, null_prob: float) -> Tensor:
    """|| v - (noise - x0) ||^2 at one noise level per video."""
    sigma = shift_sigma(batch.rand(1), meta["shift"]) * batch.generated  # [b f]: one level per video, 0 on given frames
    noise = batch.noise()  # [b f c h w]
    dropped = batch.chance(null_prob)  # [b]: guidance needs a network that knows videos without a prompt
    prompt = where_prompt(dropped, batch.null, batch.prompt)
    camera = batch.camera if meta["camera"] else None
    v = net(add_noise(batch.x0, noise, sigma), sigma, prompt, camera)
    return masked_mse(v, noise - batch.x0, batch.generated)


def orthogonal(m: Tensor) -> Tensor:
    """U V^T of m = U S V^T [rows columns], nearly: five Newton-Schulz steps take singular values to 0.7 to 1.2, those
    under a hundredth of the whole less far."""
    x = m if m.shape[0] <= m.shape[1] else m.T
    x = x / x.norm().clamp_min(1e-7)
    for _ in range(5):
        A = x @ x.T
        x = 3.4445 * x + (2.0315 * A @ A - 4.7750 * A) @ x
    return x if m.shape[0] <= m.shape[1] else x.T


class Muon(torch.optim.AdamW):
    """AdamW, but for groups of matrices, marked `whole`."""

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for group in self.param_groups:
            for p in group["params"] if group["whole"] else []:
                if p.grad is None:
                    continue
                state, lr = self.state[p], group["lr"]
                if not state:  # "step" is what a saved state is known by
                    state |= {"step": torch.tensor(0.0), "momentum": torch.zeros_like(p)}
                state["step"] += 1
                m = state["momentum"].lerp_(p.grad, 0.05)
                update = orthogonal(p.grad.lerp(m, 0.95).full_tensor())  # part 2
                update = distribute_tensor(update, p.device_mesh, p.placements, src_data_rank=None)  # all have it
                p.mul_(1 - lr * group["weight_decay"]).sub_(update, alpha=0.2 * lr * max(p.shape) ** 0.5)
                p.grad = None
        super().step()  # of what has a gradient left


# minWM trains HY with Muon at lr 1e-5, whose updates are as large as AdamW's at 2e-6, in every stage.
RECIPES = {
    "tiny": dict(steps=12000, batch_size=8, accum=1, lr=2e-3, warmup=50, cooldown=0.5, betas=(0.9, 0.99),
                 max_grad_norm=1.0, ema_decay=0.995, shift=5.0, null_prob=0.1, given_prob=0.25, guidance=1.25,
                 sampling_steps=48),
    # minWM: 5 k steps, 32 videos, lr 2e-6, clip 10, shift 5, guidance 8. Ours: EMA from the first step, no loss weight
    # (theirs falls to zero at pure noise, where every sample starts).
    "wan-1.3b": dict(steps=5000, batch_size=1, accum=4, lr=2e-6, warmup=0, cooldown=0.0, betas=(0.0, 0.999),
                     max_grad_norm=10.0, ema_decay=0.99, shift=5.0, null_prob=0.0, given_prob=0.0, guidance=8.0,
                     sampling_steps=50),
}
RECIPES["wan-14b"] = RECIPES["wan-1.3b"]
# HY's images come with its prompts (data.py --image-share), and need no given frames.
RECIPES["tiny-hy"] = RECIPES["tiny"] | dict(given_prob=0.0)
# minWM: 8 k steps, 32 videos, guidance 6, weight decay 1e-4, noise levels logit-normal with shift 3. And one change at
# step 0: the text is no longer told the noise level (model.py, HYDiT), or it could not be cached later.
RECIPES["hy-8b"] = RECIPES["wan-1.3b"] | dict(steps=8000, lr=1e-5, betas=(0.9, 0.999), max_grad_norm=1.0,
                                              null_prob=0.1, guidance=6.0)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    p.add_argument("--init", type=Path, default=Path("ckpt/base.pt"), help="weights to start from")
    p.add_argument("--data", type=Path, default=Path("data/toy"), help="latents folder (python data.py)")
    p.add_argument("--out", type=Path, help="checkpoint to write; default ckpt/camera.pt or, without camera, base.pt")
    # -- first flags (same in every stage) ---------------------------------------------------------------------------
    p.add_argument("--preset", default="tiny", choices=RECIPES, help="network, and the defaults of the other flags")
    p.add_argument("--resume", action="store_true", help="continue from the state beside --out")
    p.add_argument("--steps", type=positive, help="optimizer steps; of the generator in train_dmd.py")
    p.add_argument("--batch-size", type=positive, help="videos per process and micro-batch")
    p.add_argument("--accum", type=positive, help="micro-batches per optimizer step")
    p.add_argument("--lr", type=float, help="of AdamW; in train_dmd.py the generator's")
    p.add_argument("--max-grad-norm", type=float, help="gradients longer than this are scaled down to it")
    p.add_argument("--ema-decay", type=float, help="of the averaged weights, which are what --out holds")
    # -- end ---------------------------------------------------------------------------------------------------------
    p.add_argument("--no-camera", action="store_true", help="train the toy world's base model from scratch instead")
    p.add_argument("--betas", type=float, nargs=2, help="of AdamW: decay of the gradient's mean and square")
    p.add_argument("--warmup", type=int, help="steps until lr is reached")
    p.add_argument("--cooldown", type=fraction, help="share of --steps over which lr falls to zero at the end")
    p.add_argument("--shift", type=float, help="of the noise levels, towards pure noise; 1 is uniform")
    p.add_argument("--null-prob", type=fraction, help="share of videos whose prompt is dropped, for guidance's sake")
    p.add_argument("--given-prob", "--prefix-prob", type=fraction, help="share of videos whose first latent frame or "
                   "two are given, as an image or a short video to go on from")
    p.add_argument("--guidance", type=float, help="for sampling: w in null + w (cond - null); 1 is off")
    p.add_argument("--sampling-steps", type=positive, help="Euler steps, for sampling")
    # -- last flags (same in every stage) ----------------------------------------------------------------------------
    p.add_argument("--seed", type=int, default=0, help="of the order of videos and of all noise")
    p.add_argument("--log-every", type=positive, default=10, help="steps from one line of metrics.jsonl to the next")
    p.add_argument("--save-every", type=positive, default=500, help="steps from one checkpoint and sheet to the next")
    p.add_argument("--state-every", type=positive, default=500, help="steps from one state to resume from to the next")
    p.add_argument("--keep", type=positive, default=5, help="checkpoints of earlier saves that stay beside --out")
    p.add_argument("--vae", type=Path, help="for the sheets; default: what made the latents")
    p.add_argument("--sp", type=positive, default=1, help="processes that share a video, each some of its tokens")
    p.add_argument("--shard-over", type=positive, help="processes that share a copy of weights and moments; default: "
                   "those of a node; of two, where --sp takes a whole one")
    p.add_argument("--compile", action="store_true", help="torch.compile blocks: slow to start, then faster steps")
    p.add_argument("--plan", type=positive, metavar="GPUS", help="only say what a step would take on so many; no files")
    p.add_argument("--bench", type=positive, metavar="STEPS", help="only time so many steps, on noise; no files")
    set_recipe(p, RECIPES, argv)
    # -- end ---------------------------------------------------------------------------------------------------------
    args = p.parse_args(argv)
    args.out = args.out or Path("ckpt/base.pt" if args.no_camera else "ckpt/camera.pt")
    return args


def main(args: argparse.Namespace) -> None:
    # -- setup (same in every stage) ---------------------------------------------------------------------------------
    rank, _, device = start_process_group(args.sp, args.shard_over)
    data = open_latents(args.data, args.preset)
    folder = lock_folder(args.out)  # beside the checkpoint: earlier ones, states to resume from, metrics, sheets
    # -- end ---------------------------------------------------------------------------------------------------------

    if args.no_camera:
        weights, source = fresh_weights(args.preset, camera=False, seed=args.seed), None
    else:
        weights, source = load_checkpoint(args.init, "base", "camera", preset=args.preset)
        check_vae(data, source, args.init)
        weights, added = with_camera(weights, args.preset)
        if rank == 0 and added:
            print(f"{args.init} has no camera: {added} tensors of it are added, at zero output")
    with torch.device("meta"):
        net, ema = (build(args.preset, camera=not args.no_camera) for _ in range(2))
    net, ema = shard(net, weights, device, train=True, compiled=args.compile), shard(ema, weights, device)
    kinds = {True: [], False: []}
    for name, p in net.named_parameters():
        kinds[p.ndim == 2 and "blocks." in name].append(p)
    groups = [{"params": params, "whole": whole} for whole, params in kinds.items()]
    optimizer = Muon(groups, lr=args.lr, betas=args.betas, weight_decay=0.01, fused=True)  # part 1
    nets, optimizers = {"net": net, "ema": ema}, {"net": optimizer}
    known = ("K", "size", "fps", "frames", "vae_fingerprint", "caption")  # the last of own videos alone
    meta: Meta = {name: data.meta[name] for name in known if name in data.meta}
    meta |= {"stage": "base" if args.no_camera else "camera", "preset": args.preset, "camera": not args.no_camera,
             "given_prob": 0.0 if args.no_camera else args.given_prob, "chunk": 0, "shift": args.shift,
             "sampler": "euler", "sampling_steps": args.sampling_steps, "guidance": args.guidance,
             "from": origin(args.init, source) if source else None}
    run = describe_run(args, init=source)

    # -- start (same in every stage) ---------------------------------------------------------------------------------
    step = load_state(folder, nets, optimizers, run) if args.resume else 0
    open_log(args.out, step, args.steps)
    bar = tqdm(total=args.steps, initial=step, desc=meta["stage"], disable=rank > 0)
    # -- end ---------------------------------------------------------------------------------------------------------
    while step < args.steps and not stopping():
        t0, loss_sum, ids = time.time(), 0.0, []
        rise, fall = (step + 1) / max(1, args.warmup), (args.steps - step) / max(1, args.cooldown * args.steps)
        for group in optimizer.param_groups:
            group["lr"] = args.lr * min(1.0, rise, fall)
        for micro in range(args.accum):
            part = batch_part(micro, args.accum)
            batch = get_batch(data, args.seed, step, part, args.batch_size, device, meta["given_prob"])
            loss = flow_matching_loss(net, batch, meta, args.null_prob) / args.accum
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
        if rank == 0 and bar.n == bar.initial + 2:  # all that a step takes is there from the second on
            print_peak(args, WORK, meta)
        bar.set_postfix({name: f"{value:.4g}" for name, value in metrics.items()}, refresh=False)
        if step % args.log_every == 0 and rank == 0:
            write_log(folder / "metrics.jsonl", {"step": step, **metrics, "sec": time.time() - t0})
        ends = step == args.steps or stopping()
        if step % args.save_every == 0 or ends:
            save_average(args.out, step, ema, meta, args.keep)
            write_samples(args.out, step, ema, meta, data, args.vae, args.seed, args.batch_size)
        if step % args.state_every == 0 or ends:
            save_state(folder, step, nets, optimizers, run)  # last: a state to resume from has its checkpoint
        # -- end -----------------------------------------------------------------------------------------------------


# What --plan counts and --bench times, without any files (model.py, 12).


def rehearse(args: argparse.Namespace, nets: Nets, batch: Batch, meta: Meta) -> Iterator[str]:
    """A micro-batch of a step."""
    flow_matching_loss(nets["net"], batch, meta, args.null_prob).backward()
    yield "net"


WORK = Work("camera", {"net": True, "ema": False}, rehearse, random_batch)


if __name__ == "__main__":
    # -- run (same in every stage) ----------------------------------------------------------------------------------
    sys.stdout.reconfigure(errors="replace")  # no console stops a run over a letter that it lacks
    try:
        args = parse_args()
        if args.plan or args.bench:
            bill(args, WORK)
        else:
            main(args)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    gc.collect()  # frees FSDP's reference cycles, which could otherwise outlive the process group
    if dist.is_initialized():
        dist.destroy_process_group()
    # -- end --------------------------------------------------------------------------------------------------------
