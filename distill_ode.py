"""
Stage 2a: few steps, by regressing the teacher's own ODE (Causal Forcing, arXiv:2602.02214).

in:  ckpt/ar.pt, the autoregressive teacher: 48 Euler steps with guidance
out: ckpt/ode.pt, a student that needs four steps and no guidance

Two phases that share one grid of noise levels.
  1. --generate: from noise, integrate the teacher's ODE for every chunk, after the *ground-truth* chunks before it, and
     keep the states at the student's four levels and the end point. The teacher is causal, so a chunk's end point is a
     function of what the student sees: its noise and its past. (A bidirectional teacher's is not: regressing it blurs.)
  2. train: regress the end point from a random one of the four states, in one step, teacher-forced.

    loss = || x_s - sigma_s v(x_s^i, x0^{<i}, sigma_s) - x_end^i ||^2        s in {0, 12, 24, 36} of 48

$ python distill_ode.py --generate && python distill_ode.py
$ torchrun --nproc_per_node 2 distill_ode.py --batch-size 8 --generate
"""
import argparse
import gc
import json
import shutil
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import safe_open
from torch import Tensor, nn
from tqdm import tqdm

from data import (
    Batch, Latents, check_data, get_batch, open_latents, open_log, positive, rand, randn, sample_prefix, save_shard,
    write_log, write_sheet,
)
from model import (
    add_noise, begin, build, check_finite, commit, denoise, gather, load_checkpoint, load_state, load_vae, masked_mse,
    noise_levels, rollout, save_checkpoint, save_state, shard, start_process_group, update_ema, velocity_to_x0,
    with_null,
)

RECIPES = {
    "tiny": dict(steps=400, batch_size=16, accum=1, lr=3e-4, warmup=50, betas=(0.9, 0.99), max_grad_norm=1.0,
                 ema_decay=0.99, pairs_count=512, teacher_steps=48, sampling_steps=4),
    # minWM: 2 k steps, 32 videos, lr 2e-6; it integrates with guidance 6 although its teacher is sampled with 3. Ours
    # takes the teacher's own guidance from its checkpoint, and keeps an EMA.
    "wan-1.3b": dict(steps=2000, batch_size=1, accum=4, lr=2e-6, warmup=0, betas=(0.9, 0.999), max_grad_norm=10.0,
                     ema_decay=0.99, pairs_count=3000, teacher_steps=48, sampling_steps=4),
}
RECIPES["tiny-hy"] = RECIPES["tiny"] | dict(steps=800, lr=6e-4)
# minWM: 1.5 k steps, with Muon at lr 1e-5, whose updates are as large as AdamW's at 2e-6; its teacher has guidance 5.
RECIPES["hy-8b"] = RECIPES["wan-1.3b"] | dict(steps=1500, max_grad_norm=1.0)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--init", type=Path, default=Path("ckpt/ar.pt"), help="autoregressive teacher, also the start")
    p.add_argument("--data", type=Path, default=Path("data/toy"), help="latents folder (python data.py)")
    p.add_argument("--out", type=Path, default=Path("ckpt/ode.pt"), help="checkpoint to write")
    p.add_argument("--preset", default="tiny", choices=RECIPES, help="network, and the defaults of the flags below")
    p.add_argument("--resume", action="store_true", help="continue from the state beside --out")
    p.add_argument("--steps", type=positive)
    p.add_argument("--batch-size", type=positive, help="videos per process and micro-batch")
    p.add_argument("--accum", type=positive, help="micro-batches per step")
    p.add_argument("--lr", type=float)
    p.add_argument("--max-grad-norm", type=float)
    p.add_argument("--ema-decay", type=float)
    p.add_argument("--generate", action="store_true", help="write the pairs instead of training on them")
    p.add_argument("--pairs", type=Path, default=Path("data/ode"), help="folder of pairs")
    p.add_argument("--pairs-count", type=positive, help="videos to integrate")
    p.add_argument("--teacher-steps", type=positive, help="Euler steps of the teacher, a multiple of --sampling-steps")
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


@torch.no_grad()
def integrate(teacher: nn.Module, batch: Batch, levels: list[float], keep: int, guidance: float, chunk: int,
              prefix_prob: float) -> Tensor:
    """Every chunk from noise down `levels`, after ground truth -> states [b keep+1 f c h w], the end point last.

    Frames that are given are the same in all states.
    """
    free = sample_prefix(batch.rng, batch.x0.shape[1], prefix_prob).to(batch.x0.device)
    noise = add_noise(batch.x0, randn(batch.rng, *batch.x0.shape[1:]).to(batch.x0.device), free)
    text = with_null(batch.prompt, batch.null, guidance)
    stride, past, chunks = (len(levels) - 1) // keep, begin(teacher, noise, text, batch.camera, guidance), []
    for start in range(0, batch.x0.shape[1], chunk):
        frames = slice(start, start + chunk)
        camera, truth = tuple(z[:, frames] for z in batch.camera), batch.x0[:, frames]
        states = [noise[:, frames]]
        for i in range(0, len(levels) - 1, stride):
            states.append(denoise(teacher, states[-1], levels[i : i + stride + 1], text, camera, guidance, past,
                                  free=free[:, frames]))
        chunks.append(torch.stack(states, dim=1))
        past = commit(teacher, truth, text, camera, guidance, past)
    return torch.cat(chunks, dim=2)


def pair_terms(args: argparse.Namespace, teacher: dict) -> dict:
    """What pairs depend on and training on them must agree with."""
    return {"levels": noise_levels(args.teacher_steps, teacher["shift"])[:: args.teacher_steps // args.sampling_steps],
            "teacher": f"{args.init.name} at step {teacher['step']}", "teacher_steps": args.teacher_steps,
            "guidance": teacher["guidance"], "chunk": teacher["chunk"]}


def generate(args: argparse.Namespace, teacher: nn.Module, data: Latents, meta: dict, rank: int, world_size: int,
             device: torch.device) -> None:
    """Write --pairs-count videos' states as a latents folder of its own. Shards that exist are not made again."""
    args.pairs.mkdir(parents=True, exist_ok=True)
    levels = noise_levels(args.teacher_steps, meta["shift"])
    about = json.dumps(data.meta | pair_terms(args, meta) | {"seed": args.seed, "batch": [args.batch_size, world_size]})
    for path in sorted(args.pairs.glob("latents-*.safetensors")):
        with safe_open(path, "pt") as shard:
            if shard.metadata()["meta"] != about:
                raise ValueError(f"{path}: made by another teacher or other settings; remove {args.pairs} first")
    shards = -(-args.pairs_count // (args.batch_size * world_size))
    for i in tqdm(range(shards), "pairs", disable=rank > 0):
        path = args.pairs / f"latents-{i:06d}-{rank:03d}.safetensors"
        done = torch.tensor(float(path.exists()), device=device)
        dist.all_reduce(done, op=dist.ReduceOp.MIN)  # the teacher is sharded: its ranks skip together or not at all
        if done:
            continue
        batch = get_batch(data, args.seed, i, rank, world_size, args.batch_size, device)
        states = integrate(teacher, batch, levels, args.sampling_steps, meta["guidance"], meta["chunk"],
                           meta["prefix_prob"])
        if not states.isfinite().all():
            raise ValueError(f"{path}: the teacher's states of rows {batch.ids} are not finite; not written")
        save_shard(path, {"latents": batch.x0.half(), "states": states.half(), **batch.held}, {"meta": about})
    if rank == 0:
        shutil.copy(data.folder / "prompts.safetensors", args.pairs)


def ode_loss(net: nn.Module, batch: Batch, levels: list[float], chunk: int) -> Tensor:
    """|| x0 predicted from a random state of each chunk - where the teacher's ODE ends ||^2."""
    b, f = batch.x0.shape[:2]
    n = len(levels) - 1  # the last level is 0, the end point
    i = (rand(batch.rng, -(-f // chunk)) * n).long().repeat_interleave(chunk, dim=1)[:, :f].to(batch.x0.device)  # [b f]
    x_t = batch.states[torch.arange(b)[:, None], i, torch.arange(f)]
    free = (batch.states[:, 0] != batch.states[:, -1]).flatten(2).any(-1)  # [b f]
    sigma = torch.tensor(levels, device=i.device, dtype=torch.float32)[i] * free
    v = net(x_t, sigma, batch.prompt, batch.camera, clean=batch.x0, chunk=chunk)
    return masked_mse(velocity_to_x0(v, x_t, sigma), batch.states[:, -1], free)


def main(args: argparse.Namespace) -> None:
    # -- setup (same in every stage) ---------------------------------------------------------------------------------
    rank, world_size, device = start_process_group()
    data = open_latents(args.data, args.preset)
    vae = load_vae(Path(data.meta["vae"]), device, data.meta["vae_fingerprint"])
    folder = args.out.with_suffix("")  # beside the checkpoint: state to resume from, metrics, sheets of samples
    # -- end ---------------------------------------------------------------------------------------------------------

    weights, source = load_checkpoint(args.init, "ar", preset=args.preset)
    source = check_data(data, source, args.init)
    if args.generate:
        with torch.device("meta"):
            teacher = build(args.preset)
        return generate(args, shard(teacher, weights, device), data, source, rank, world_size, device)
    terms = pair_terms(args, source)
    levels, data = terms["levels"], open_latents(args.pairs, args.preset)
    if (found := {name: data.meta.get(name) for name in terms}) != terms:
        raise ValueError(f"{args.pairs}: expected pairs with {terms}, found {found}; --generate makes them")
    with torch.device("meta"):
        net, ema = (build(args.preset) for _ in range(2))
    net, ema = shard(net, weights, device, train=True), shard(ema, weights, device)
    optimizer = torch.optim.AdamW(net.parameters(), lr=args.lr, betas=args.betas, weight_decay=0.01, fused=True)
    nets, optimizers = {"net": net, "ema": ema}, {"net": optimizer}
    meta = source | {"stage": "ode", "sampler": "renoise", "steps": args.sampling_steps, "guidance": 1.0,
                     "from": f"{args.init.name} at step {source['step']}"}

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
            loss = ode_loss(net, batch, levels, meta["chunk"]) / args.accum
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
