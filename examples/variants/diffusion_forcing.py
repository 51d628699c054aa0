"""
Stage 1, a variant: diffusion forcing (arXiv:2407.01392, CausVid arXiv:2412.07772). Read as a diff, train_ar.py against
this.

train_ar.py shows every chunk the *clean* chunks before it, which is what a stream will show it. Here a chunk sees the
noised ones of the same video, each at its own level: one sequence, no clean copy beside it, and a past that a stream
never has, since what it keeps is finished. What changes:
  1. the loss reads the noised chunks into a cache one after another, each at its own level and with gradient

Sampling is train_ar.py's. A chunk takes two passes here, one for its velocity and one for its keys and values, where an
attention of all chunks at once would take one.

$ PYTHONPATH=. python examples/variants/diffusion_forcing.py --out ckpt/diffusion-forcing.pt
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
from tqdm import tqdm

from data import (
    Batch, HelpFormatter, check_data, fraction, get_batch, open_latents, open_log, positive, random_batch, set_recipe,
    write_log, write_samples,
)
from model import (
    Meta, Nets, Work, add_noise, batch_part, bill, build, check_finite, describe_run, load_checkpoint, load_state,
    lock_folder, masked_mse, origin, print_peak, save_average, save_state, shard, shift_sigma, start_process_group,
    stopping, update_ema, where_prompt,
)


def diffusion_forcing_loss(net: nn.Module, batch: Batch, meta: Meta, null_prob: float) -> Tensor:
    """|| v - (noise - x0) ||^2 at one noise level per chunk, each chunk after its noised past."""
    f, chunk = batch.x0.shape[1], meta["chunk"]
    sigma = shift_sigma(batch.rand_per_chunk(chunk), meta["shift"]) * batch.generated  # part 1: [b f], one per chunk
    noise = batch.noise()  # [b f c h w]
    dropped = batch.chance(null_prob)  # [b]: guidance needs a network that knows videos without a prompt
    prompt = where_prompt(dropped, batch.null, batch.prompt)
    x_t, kv_cache, vs = add_noise(batch.x0, noise, sigma), None, []
    for start in range(-chunk, f, chunk):  # first of all the prompt, without frames
        frames = slice(max(start, 0), start + chunk)
        seen = x_t[:, frames], sigma[:, frames], prompt, batch.camera.frames(frames)
        if frames.stop > 0:
            vs.append(net(*seen, kv_cache=kv_cache))
        if frames.stop < f:  # nothing comes after the last chunk to see it
            kv_cache = net(*seen, kv_cache=kv_cache, update_cache=True)
    v = torch.cat(vs, dim=1)
    return masked_mse(v, noise - batch.x0, batch.generated)


# minWM's Muon for HY: see train_camera.py.
RECIPES = {
    "tiny": dict(steps=4500, batch_size=8, accum=1, lr=1e-3, warmup=50, cooldown=0.5, betas=(0.9, 0.99),
                 max_grad_norm=1.0, ema_decay=0.995, chunk=1, null_prob=0.1, guidance=1.25, sampling_steps=48),
    # minWM: 4 k steps, 32 videos, lr 2e-6, clip 10, chunks of 4 latent frames, guidance 3.
    "wan-1.3b": dict(steps=4000, batch_size=1, accum=4, lr=2e-6, warmup=0, cooldown=0.0, betas=(0.0, 0.999),
                     max_grad_norm=10.0, ema_decay=0.99, chunk=4, null_prob=0.0, guidance=3.0, sampling_steps=48),
}
RECIPES["wan-14b"] = RECIPES["wan-1.3b"]
RECIPES["tiny-hy"] = RECIPES["tiny"] | dict(steps=6000)
# minWM: 4 k steps, guidance 6, weight decay 1e-4, one noise level for all chunks, logit-normal with shift 3.
RECIPES["hy-8b"] = RECIPES["wan-1.3b"] | dict(betas=(0.9, 0.999), max_grad_norm=1.0, null_prob=0.1, guidance=6.0)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    p.add_argument("--init", type=Path, default=Path("ckpt/camera.pt"), help="weights to start from")
    p.add_argument("--data", type=Path, default=Path("data/toy"), help="latents folder (python data.py)")
    p.add_argument("--out", type=Path, default=Path("ckpt/ar.pt"), help="checkpoint to write")
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
    p.add_argument("--betas", type=float, nargs=2, help="of AdamW: decay of the gradient's mean and square")
    p.add_argument("--warmup", type=int, help="steps until lr is reached")
    p.add_argument("--cooldown", type=fraction, help="share of --steps over which lr falls to zero at the end")
    p.add_argument("--chunk", type=positive, help="latent frames denoised together")
    p.add_argument("--null-prob", type=fraction, help="share of videos whose prompt is dropped, for guidance's sake")
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
    return p.parse_args(argv)


def main(args: argparse.Namespace) -> None:
    # -- setup (same in every stage) ---------------------------------------------------------------------------------
    rank, _, device = start_process_group(args.sp, args.shard_over)
    data = open_latents(args.data, args.preset)
    folder = lock_folder(args.out)  # beside the checkpoint: earlier ones, states to resume from, metrics, sheets
    # -- end ---------------------------------------------------------------------------------------------------------

    weights, source = load_checkpoint(args.init, "camera", "ar", preset=args.preset)
    source = check_data(data, source, args.init)
    with torch.device("meta"):
        net, ema = (build(args.preset) for _ in range(2))
    net, ema = shard(net, weights, device, train=True, compiled=args.compile), shard(ema, weights, device)
    optimizer = torch.optim.AdamW(net.parameters(), lr=args.lr, betas=args.betas, weight_decay=0.01, fused=True)
    nets, optimizers = {"net": net, "ema": ema}, {"net": optimizer}
    meta: Meta = source | {"stage": "ar", "chunk": args.chunk, "sampling_steps": args.sampling_steps,  # part 3
                           "guidance": args.guidance, "from": origin(args.init, source)}
    run = describe_run(args, init=source)

    # -- start (same in every stage) ---------------------------------------------------------------------------------
    step = load_state(folder, nets, optimizers, run) if args.resume else 0
    open_log(args.out, step, args.steps)
    bar = tqdm(total=args.steps, initial=step, desc=meta["stage"], disable=rank > 0)
    # -- end ---------------------------------------------------------------------------------------------------------
    while step < args.steps and not stopping():
        t0, loss_sum, ids = time.time(), 0.0, []
        rise, fall = (step + 1) / max(1, args.warmup), (args.steps - step) / max(1, args.cooldown * args.steps)
        optimizer.param_groups[0]["lr"] = args.lr * min(1.0, rise, fall)
        for micro in range(args.accum):
            part = batch_part(micro, args.accum)
            batch = get_batch(data, args.seed, step, part, args.batch_size, device, meta["given_prob"])
            loss = diffusion_forcing_loss(net, batch, meta, args.null_prob) / args.accum
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
    diffusion_forcing_loss(nets["net"], batch, meta, args.null_prob).backward()
    yield "net"


WORK = Work("ar", {"net": True, "ema": False}, rehearse, random_batch)


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
