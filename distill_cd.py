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
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from tqdm import tqdm

from data import (
    Batch, check_data, get_batch, open_latents, open_log, positive, rand, randn, sample_prefix, write_log, write_sheet,
)
from model import (
    add_noise, build, check_finite, gather, guide, load_checkpoint, load_state, load_vae, masked_mse, noise_levels,
    rollout, save_checkpoint, save_state, shard, start_process_group, update_ema, velocity_to_x0,
)

RECIPES = {
    "tiny": dict(steps=300, batch_size=16, accum=1, lr=3e-4, warmup=50, betas=(0.9, 0.99), max_grad_norm=1.0,
                 ema_decay=0.95, teacher_steps=48, sampling_steps=4),
    # minWM: 2 k steps, 32 videos, lr 2e-6, EMA 0.99, guidance 3. Ours has 48 intervals, not 50, so that the student's
    # levels lie on the grid; the last interval is trained, and sigma is fp32 (in bf16 a step is off by 13 %).
    "wan-1.3b": dict(steps=2000, batch_size=1, accum=4, lr=2e-6, warmup=0, betas=(0.0, 0.999), max_grad_norm=10.0,
                     ema_decay=0.99, teacher_steps=48, sampling_steps=4),
}
RECIPES["tiny-hy"] = RECIPES["tiny"] | dict(steps=600, lr=6e-4)
# minWM: 1.5 k steps, EMA 0.999, Muon at lr 1e-5, whose updates are as large as AdamW's at 2e-6; teacher's guidance 5.
RECIPES["hy-8b"] = RECIPES["wan-1.3b"] | dict(steps=1500, betas=(0.9, 0.999), max_grad_norm=1.0, ema_decay=0.999)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--init", type=Path, default=Path("ckpt/ar.pt"), help="autoregressive teacher, also the start")
    p.add_argument("--data", type=Path, default=Path("data/toy"), help="latents folder (python data.py)")
    p.add_argument("--out", type=Path, default=Path("ckpt/cd.pt"), help="checkpoint to write")
    p.add_argument("--preset", default="tiny", choices=RECIPES, help="network, and the defaults of the flags below")
    p.add_argument("--resume", action="store_true", help="continue from the state beside --out")
    p.add_argument("--steps", type=positive)
    p.add_argument("--batch-size", type=positive, help="videos per process and micro-batch")
    p.add_argument("--accum", type=positive, help="micro-batches per step")
    p.add_argument("--lr", type=float)
    p.add_argument("--max-grad-norm", type=float)
    p.add_argument("--ema-decay", type=float)
    p.add_argument("--teacher-steps", type=positive, help="intervals of the grid, a multiple of --sampling-steps")
    p.add_argument("--betas", type=float, nargs=2, help="of AdamW")
    p.add_argument("--warmup", type=int, help="steps until lr is reached")
    p.add_argument("--sampling-steps", type=positive, help="of the student")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--log-every", type=positive, default=10)
    p.add_argument("--save-every", type=positive, default=500)
    p.set_defaults(**RECIPES[p.parse_known_args(argv)[0].preset])
    args = p.parse_args(argv)
    if args.teacher_steps % args.sampling_steps:
        p.error(f"--teacher-steps {args.teacher_steps} is not a multiple of --sampling-steps {args.sampling_steps}: "
                "the student would be asked at levels its teacher never visited")
    return args


def consistency_loss(student: nn.Module, ema: nn.Module, teacher: nn.Module, batch: Batch, levels: list[float],
                     guidance: float, chunk: int, prefix_prob: float) -> Tensor:
    """|| student at the upper end of an interval - EMA at the lower end ||^2, one interval per chunk."""
    f, forced = batch.x0.shape[1], dict(clean=batch.x0, chunk=chunk)
    free = sample_prefix(batch.rng, f, prefix_prob).to(batch.x0.device)
    n = (rand(batch.rng, -(-f // chunk)) * (len(levels) - 1)).long().repeat_interleave(chunk, dim=1)[:, :f]  # [b f]
    upper, lower = (torch.tensor(levels)[i].float().to(batch.x0.device) * free for i in (n, n + 1))

    noise = randn(batch.rng, *batch.x0.shape[1:]).to(batch.x0.device)
    x_n = add_noise(batch.x0, noise, upper)  # 1
    with torch.no_grad():
        v = guide(*(teacher(x_n, upper, text, batch.camera, **forced) for text in (batch.prompt, batch.null)), guidance)
        x_m = x_n + (lower - upper)[..., None, None, None] * v  # 2
        v_ema = ema(x_m, lower, batch.prompt, batch.camera, **forced)
        target = velocity_to_x0(v_ema, x_m, lower)  # 3: x_m itself where lower is 0
    v = student(x_n, upper, batch.prompt, batch.camera, **forced)
    return masked_mse(velocity_to_x0(v, x_n, upper), target, free)  # 4


def main(args: argparse.Namespace) -> None:
    # -- setup (same in every stage) ---------------------------------------------------------------------------------
    rank, world_size, device = start_process_group()
    data = open_latents(args.data, args.preset)
    vae = load_vae(Path(data.meta["vae"]), device, data.meta["vae_fingerprint"])
    folder = args.out.with_suffix("")  # beside the checkpoint: state to resume from, metrics, sheets of samples
    # -- end ---------------------------------------------------------------------------------------------------------

    weights, source = load_checkpoint(args.init, "ar", preset=args.preset)
    source = check_data(data, source, args.init)
    with torch.device("meta"):
        net, ema, teacher = (build(args.preset) for _ in range(3))
    net, ema = shard(net, weights, device, train=True), shard(ema, weights, device)
    teacher = shard(teacher, weights, device)
    optimizer = torch.optim.AdamW(net.parameters(), lr=args.lr, betas=args.betas, weight_decay=0.01, fused=True)
    nets, optimizers = {"net": net, "ema": ema}, {"net": optimizer}
    meta = source | {"stage": "cd", "sampler": "renoise", "steps": args.sampling_steps, "guidance": 1.0,
                     "from": f"{args.init.name} at step {source['step']}"}
    levels = noise_levels(args.teacher_steps, meta["shift"])

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
            loss = consistency_loss(net, ema, teacher, batch, levels, source["guidance"], meta["chunk"],
                                    meta["prefix_prob"]) / args.accum
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
