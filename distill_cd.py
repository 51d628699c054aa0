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
    Batch, HelpFormatter, check_data, get_batch, open_latents, open_log, positive, set_recipe, write_log, write_samples,
)
from model import (
    Meta, add_noise, build, check_finite, full_state_dict, guide, load_checkpoint, load_state, load_vae, masked_mse,
    noise_levels, save_checkpoint, save_state, shard, start_process_group, update_ema, velocity_to_x0,
)


def consistency_loss(student: nn.Module, ema: nn.Module, teacher: nn.Module, batch: Batch, sigmas: list[float],
                     meta: Meta) -> Tensor:
    """|| student at the upper end of an interval - EMA at the lower end ||^2, one interval of `sigmas` per chunk.

    meta: the teacher's.
    """
    past = dict(clean=batch.x0, chunk=meta["chunk"])
    n = (batch.rand_per_chunk(meta["chunk"]) * (len(sigmas) - 1)).long()  # [b f]
    grid = torch.tensor(sigmas, device=n.device)
    sigma_n, sigma_m = grid[n] * batch.generated, grid[n + 1] * batch.generated  # upper and lower end

    x_n = add_noise(batch.x0, batch.noise(), sigma_n)  # 1
    with torch.no_grad():
        v_cond = teacher(x_n, sigma_n, batch.prompt, batch.camera, **past)
        v_null = teacher(x_n, sigma_n, batch.null, batch.camera, **past)
        v = guide(v_cond, v_null, meta["guidance"])
        x_m = x_n + (sigma_m - sigma_n)[..., None, None, None] * v  # 2
        v_ema = ema(x_m, sigma_m, batch.prompt, batch.camera, **past)
        target = velocity_to_x0(v_ema, x_m, sigma_m)  # 3: x_m itself where sigma_m is 0
    v = student(x_n, sigma_n, batch.prompt, batch.camera, **past)
    return masked_mse(velocity_to_x0(v, x_n, sigma_n), target, batch.generated)  # 4


# minWM trains HY with Muon at lr 1e-5, whose updates are as large as AdamW's at 2e-6, in every stage.
RECIPES = {
    "tiny": dict(steps=300, batch_size=16, accum=1, lr=3e-4, warmup=50, betas=(0.9, 0.99), max_grad_norm=1.0,
                 ema_decay=0.95, teacher_steps=48, sampling_steps=4),
    # minWM: 2 k steps, 32 videos, lr 2e-6, EMA 0.99, guidance 3. Ours has 48 intervals, not 50, so that the student's
    # levels lie on the grid; the last interval is trained, and sigma is fp32 (in bf16 a step is off by 13 %).
    "wan-1.3b": dict(steps=2000, batch_size=1, accum=4, lr=2e-6, warmup=0, betas=(0.0, 0.999), max_grad_norm=10.0,
                     ema_decay=0.99, teacher_steps=48, sampling_steps=4),
}
RECIPES["wan-14b"] = RECIPES["wan-1.3b"]
RECIPES["tiny-hy"] = RECIPES["tiny"] | dict(steps=600, lr=6e-4)
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
    p.add_argument("--lr", type=float, help="learning rate of AdamW")
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
    p.add_argument("--save-every", type=positive, default=500, help="steps from one checkpoint and state to the next")
    set_recipe(p, RECIPES, argv)
    # -- end ---------------------------------------------------------------------------------------------------------
    args = p.parse_args(argv)
    if args.teacher_steps % args.sampling_steps:
        p.error(f"--teacher-steps {args.teacher_steps} is not a multiple of --sampling-steps {args.sampling_steps}: "
                "the student would be asked at levels its teacher never visited")
    return args


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
    meta: Meta = source | {"stage": "cd", "sampler": "few_step", "sampling_steps": args.sampling_steps,
                           "guidance": 1.0, "from": f"{args.init.name} at step {source['step']}"}
    sigmas = noise_levels(args.teacher_steps, meta["shift"])

    # -- start (same in every stage) ---------------------------------------------------------------------------------
    step = load_state(folder, nets, optimizers) if args.resume else 0
    open_log(args.out, step, args.steps)
    bar = tqdm(total=args.steps, initial=step, desc=meta["stage"], disable=rank > 0)
    # -- end ---------------------------------------------------------------------------------------------------------
    while step < args.steps:
        t0, loss_sum, ids = time.time(), 0.0, []
        optimizer.param_groups[0]["lr"] = args.lr * min(1.0, (step + 1) / max(1, args.warmup))
        for micro in range(args.accum):
            part, parts = micro * world_size + rank, args.accum * world_size
            batch = get_batch(data, args.seed, step, part, parts, args.batch_size, device, meta["given_prob"])
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
        bar.set_postfix({name: f"{value:.4g}" for name, value in metrics.items()}, refresh=False)
        if step % args.log_every == 0 and rank == 0:
            write_log(folder / "metrics.jsonl", {"step": step, **metrics, "sec": time.time() - t0})
        if step % args.save_every == 0 or step == args.steps:
            weights = full_state_dict(ema)
            if rank == 0:
                save_checkpoint(args.out, weights, meta | {"step": step})
            save_state(folder, step, nets, optimizers)  # after it: a state to resume from implies its checkpoint
            write_samples(folder / f"sheet-{step:06d}.png", ema, meta, vae, data, args.seed, args.batch_size)
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
