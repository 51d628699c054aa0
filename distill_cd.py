"""
Stage 2b: few steps without pairs, by causal consistency distillation (Causal Forcing++, arXiv:2605.15141).

in:  ckpt/ar.pt, the autoregressive teacher
out: ckpt/cd.pt, a student that needs four steps and no guidance; the alternative to ckpt/ode.pt

All points of one ODE trajectory should predict the same x0. So, on the grid of 48 levels, one interval at a time:
  1. noise the clean video to level sigma_n, n random per chunk
  2. the teacher makes one guided Euler step down, to sigma_m, m = n + 1
  3. the student predicts x0 at the upper end, its EMA at the lower end; at sigma_m = 0 that is the point itself
  4. regress the first on the second
Every pass is teacher-forced on the clean past.

    loss = || f(x_n, sigma_n) - sg f_ema(x_n + (sigma_m - sigma_n) v_teacher, sigma_m) ||^2,   f(x, sigma) = x - sigma v

$ python distill_cd.py
$ torchrun --nproc_per_node 2 distill_cd.py --batch-size 8
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
    Batch, HelpFormatter, check_data, get_batch, open_latents, open_log, positive, random_batch, set_recipe, write_log,
    write_samples,
)
from model import (
    Meta, Nets, Work, add_noise, batch_part, bill, build, check_finite, describe_run, guide, load_checkpoint,
    load_state, lock_folder, masked_mse, noise_levels, origin, print_peak, save_average, save_state, shard,
    start_process_group, stopping, update_ema, velocity_to_x0,
)


def consistency_loss(student: nn.Module, ema: nn.Module, teacher: nn.Module, batch: Batch, sigmas: list[float],
                     meta: Meta) -> Tensor:
    """|| student at the upper end of an interval - EMA at the lower end ||^2, one interval of `sigmas` per chunk.

    meta: the teacher's.
    """
    forced = dict(clean=batch.x0, chunk=meta["chunk"])
    n = (batch.rand_per_chunk(meta["chunk"]) * (len(sigmas) - 1)).long()  # [b f]
    grid = torch.tensor(sigmas, dtype=torch.float32, device=n.device)
    sigma_n, sigma_m = grid[n] * batch.generated, grid[n + 1] * batch.generated  # upper and lower end

    x_n = add_noise(batch.x0, batch.noise(), sigma_n)  # part 1
    with torch.no_grad():
        v_cond = teacher(x_n, sigma_n, batch.prompt, batch.camera, **forced)
        v_null = teacher(x_n, sigma_n, batch.null, batch.camera, **forced)
        v = guide(v_cond, v_null, meta["guidance"])
        x_m = x_n + (sigma_m - sigma_n)[..., None, None, None] * v  # part 2
        v_ema = ema(x_m, sigma_m, batch.prompt, batch.camera, **forced)
        target = velocity_to_x0(v_ema, x_m, sigma_m)  # part 3: x_m itself where sigma_m is 0
    v = student(x_n, sigma_n, batch.prompt, batch.camera, **forced)
    return masked_mse(velocity_to_x0(v, x_n, sigma_n), target, batch.generated)  # part 4


# minWM's Muon for HY: see train_camera.py.
RECIPES = {
    "tiny": dict(steps=400, batch_size=16, accum=1, lr=3e-4, warmup=50, betas=(0.9, 0.99), max_grad_norm=1.0,
                 ema_decay=0.95, teacher_steps=48, sampling_steps=4),
    # minWM: 2 k steps, 32 videos, lr 2e-6, EMA 0.99, guidance 3. Ours has 48 intervals, not 50, so that the student's
    # levels lie on the grid; the last interval is trained, and sigma is fp32 (in bf16 a step is off by 13 %).
    "wan-1.3b": dict(steps=2000, batch_size=1, accum=4, lr=2e-6, warmup=0, betas=(0.0, 0.999), max_grad_norm=10.0,
                     ema_decay=0.99, teacher_steps=48, sampling_steps=4),
}
RECIPES["wan-14b"] = RECIPES["wan-1.3b"]
RECIPES["tiny-hy"] = RECIPES["tiny"] | dict(lr=6e-4)
# minWM: 1.5 k steps, EMA 0.999; its teacher has guidance 5.
RECIPES["hy-8b"] = RECIPES["wan-1.3b"] | dict(steps=1500, betas=(0.9, 0.999), max_grad_norm=1.0, ema_decay=0.999)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    p.add_argument("--init", type=Path, default=Path("ckpt/ar.pt"), help="teacher, and the weights to start from")
    p.add_argument("--data", type=Path, default=Path("data/toy"), help="latents folder (python data.py)")
    p.add_argument("--out", type=Path, default=Path("ckpt/cd.pt"), help="checkpoint to write")
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
    p.add_argument("--teacher-steps", type=positive, help="intervals of the grid, a multiple of --sampling-steps")
    p.add_argument("--betas", type=float, nargs=2, help="of AdamW: decay of the gradient's mean and square")
    p.add_argument("--warmup", type=int, help="steps until lr is reached")
    p.add_argument("--sampling-steps", type=positive, help="denoising steps of the student")
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
    if args.teacher_steps % args.sampling_steps:
        p.error(f"--teacher-steps {args.teacher_steps} is not a multiple of --sampling-steps {args.sampling_steps}: "
                "the student would be asked at levels its teacher never visited")
    return args


def main(args: argparse.Namespace) -> None:
    # -- setup (same in every stage) ---------------------------------------------------------------------------------
    rank, _, device = start_process_group(args.sp, args.shard_over)
    data = open_latents(args.data, args.preset)
    folder = lock_folder(args.out)  # beside the checkpoint: earlier ones, states to resume from, metrics, sheets
    # -- end ---------------------------------------------------------------------------------------------------------

    weights, source = load_checkpoint(args.init, "ar", preset=args.preset)
    source = check_data(data, source, args.init)
    with torch.device("meta"):
        net, ema, teacher = (build(args.preset) for _ in range(3))
    net = shard(net, weights, device, train=True, compiled=args.compile)
    ema, teacher = (shard(frozen, weights, device, compiled=args.compile) for frozen in (ema, teacher))
    optimizer = torch.optim.AdamW(net.parameters(), lr=args.lr, betas=args.betas, weight_decay=0.01, fused=True)
    nets, optimizers = {"net": net, "ema": ema}, {"net": optimizer}
    meta: Meta = source | {"stage": "cd", "sampler": "few_step", "sampling_steps": args.sampling_steps,
                           "guidance": 1.0, "from": origin(args.init, source)}
    run = describe_run(args, init=source)
    sigmas = noise_levels(args.teacher_steps, meta["shift"])

    # -- start (same in every stage) ---------------------------------------------------------------------------------
    step = load_state(folder, nets, optimizers, run) if args.resume else 0
    open_log(args.out, step, args.steps)
    bar = tqdm(total=args.steps, initial=step, desc=meta["stage"], disable=rank > 0)
    # -- end ---------------------------------------------------------------------------------------------------------
    while step < args.steps and not stopping():
        t0, loss_sum, ids = time.time(), 0.0, []
        optimizer.param_groups[0]["lr"] = args.lr * min(1.0, (step + 1) / max(1, args.warmup))
        for micro in range(args.accum):
            part = batch_part(micro, args.accum)
            batch = get_batch(data, args.seed, step, part, args.batch_size, device, meta["given_prob"])
            loss = consistency_loss(net, ema, teacher, batch, sigmas, source) / args.accum
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
    sigmas = noise_levels(args.teacher_steps, meta["shift"])
    consistency_loss(nets["net"], nets["ema"], nets["teacher"], batch, sigmas, meta).backward()
    yield "net"


WORK = Work("cd", {"net": True, "ema": False, "teacher": False}, rehearse, random_batch)


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
