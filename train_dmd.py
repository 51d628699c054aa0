"""
Stage 3: train on what the model itself makes, by asymmetric distribution matching (Self Forcing, arXiv:2506.08009).

in:  ckpt/ode.pt or ckpt/cd.pt, the four-step causal student; ckpt/camera.pt for both scores, bidirectional
out: ckpt/dmd.pt, the model that streams

So far every chunk was trained after a clean past. In use the past is the model's own. Three networks:
  generator     the student. Rolls out the whole video from its own past; of each chunk's denoising steps only the last
                carries gradient, and what it commits to the cache carries none
  real_score    frozen camera model: which way a noised rollout should move to look like data
  fake_score    the same model, kept trained on the generator's rollouts: which way it moves to look like itself

The generator follows the difference (DMD, arXiv:2311.18828 eq. 7-8; two time scales, arXiv:2405.14867):

    x = rollout(noise)     x_t = (1 - sigma) x + sigma noise'
    grad = (x0_fake(x_t) - x0_real(x_t)) / mean |x - x0_real(x_t)|          loss = 1/2 || x - sg(x - grad) ||^2

and fake_score takes --fake-score-updates plain flow-matching steps on rollouts after each generator step. --steps
counts generator steps. (The papers count fake_score's: their 200 are 40 of these.)

$ python train_dmd.py
$ torchrun --nproc_per_node 2 train_dmd.py --batch-size 8 --init ckpt/ode.pt
"""
import argparse
import gc
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from data import (
    Batch, check_data, get_batch, mix, open_latents, open_log, positive, rand, randn, sample_prefix, write_log,
    write_sheet,
)
from model import (
    add_noise, begin, build, check_finite, commit, gather, guide, habits, load_checkpoint, load_state, load_vae,
    masked_mse, noise_levels, rollout, save_checkpoint, save_state, shard, shift_sigma, start_process_group, update_ema,
    velocity_to_x0,
)

RECIPES = {
    "tiny": dict(steps=30, batch_size=16, accum=1, lr=5e-5, fake_score_lr=1e-4, max_grad_norm=1.0, ema_decay=0.95,
                 fake_score_updates=5, guidance=2.0, save_every=10),
    # minWM: 200 updates of fake_score, 32 videos, lr 2e-6 and 4e-7, betas (0, 0.999), EMA 0.99 from update 200 (ours
    # has only 40 generator steps to follow, so it forgets faster), guidance "3.0" in a formula that adds one: 4 in
    # ours. Its cache leaks gradient between chunks; ours is truncated exactly.
    "wan-1.3b": dict(steps=40, batch_size=1, accum=4, lr=2e-6, fake_score_lr=4e-7, max_grad_norm=10.0, ema_decay=0.8,
                     fake_score_updates=5, guidance=4.0, save_every=5),
}
RECIPES["tiny-hy"] = RECIPES["tiny"] | dict(lr=1e-4, fake_score_lr=2e-4)
# minWM: 100 generator updates after 4 of fake_score each, Muon at lr 1e-5 and 8e-6 (AdamW's at a fifth of that makes
# updates as large), EMA 0.99 from the 100th step on, guidance 5.
RECIPES["hy-8b"] = RECIPES["wan-1.3b"] | dict(steps=100, fake_score_lr=1.6e-6, max_grad_norm=1.0, ema_decay=0.95,
                                              fake_score_updates=4, guidance=5.0)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--init", type=Path, default=Path("ckpt/ode.pt"), help="few-step causal student to start from")
    p.add_argument("--data", type=Path, default=Path("data/toy"), help="latents folder (python data.py)")
    p.add_argument("--out", type=Path, default=Path("ckpt/dmd.pt"), help="checkpoint to write")
    p.add_argument("--preset", default="tiny", choices=RECIPES, help="network, and the defaults of the flags below")
    p.add_argument("--resume", action="store_true", help="continue from the state beside --out")
    p.add_argument("--steps", type=positive, help="generator updates")
    p.add_argument("--batch-size", type=positive, help="videos per process and micro-batch")
    p.add_argument("--accum", type=positive, help="micro-batches per step")
    p.add_argument("--lr", type=float)
    p.add_argument("--max-grad-norm", type=float)
    p.add_argument("--ema-decay", type=float)
    p.add_argument("--scores", type=Path, default=Path("ckpt/camera.pt"), help="bidirectional, starts both scores")
    p.add_argument("--fake-score-lr", type=float)
    p.add_argument("--fake-score-updates", type=positive, help="fake_score steps per generator step")
    p.add_argument("--guidance", type=float, help="of real_score, null + w (cond - null)")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--log-every", type=positive, default=10)
    p.add_argument("--save-every", type=positive)
    p.set_defaults(**RECIPES[p.parse_known_args(argv)[0].preset])
    return p.parse_args(argv)


def self_rollout(generator: nn.Module, batch: Batch, levels: list[float], exit_step: int, chunk: int,
                 free: Tensor) -> Tensor:
    """Video made chunk by chunk after its own past [b f c h w]; gradient through step exit_step of each chunk alone.

    exit_step is shared by all chunks and ranks. The result is the prediction of that step: clean only in the sense in
    which a few-step model's predictions are, which is what the scores must judge. Frames where free [b f] is 0 are
    given: the batch's own, clean.
    """
    want_grad, video = torch.is_grad_enabled(), []
    noise = [randn(batch.rng, *batch.x0.shape[1:]).to(batch.x0.device) for _ in range(exit_step + 1)]
    noise[0] = add_noise(batch.x0, noise[0], free)
    past = begin(generator, noise[0], batch.prompt, batch.camera)
    for start in range(0, batch.x0.shape[1], chunk):
        frames = slice(start, start + chunk)
        camera, x_t = tuple(z[:, frames] for z in batch.camera), noise[0][:, frames]
        for i in range(exit_step + 1):
            sigma = levels[i] * free[:, frames]
            with torch.set_grad_enabled(want_grad and i == exit_step):
                x0 = velocity_to_x0(generator(x_t, sigma, batch.prompt, camera, past=past), x_t, sigma)
            if i < exit_step:
                x_t = add_noise(x0, noise[i + 1][:, frames], levels[i + 1] * free[:, frames])
        video.append(x0)
        if frames.stop < batch.x0.shape[1]:
            past = commit(generator, x0, batch.prompt, camera, past=past)  # without gradient
    return torch.cat(video, dim=1)


def noised(x: Tensor, batch: Batch, shift: float, free: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """x at a random level between 0.02 and 0.98, one per video -> x_t, noise, sigma."""
    sigma = shift_sigma(rand(batch.rng, 1), shift).clamp(0.02, 0.98).to(x.device) * free
    noise = randn(batch.rng, *x.shape[1:]).to(x.device)
    return add_noise(x, noise, sigma), noise, sigma


def dmd_loss(x: Tensor, x0_real: Tensor, x0_fake: Tensor) -> Tensor:
    """A loss whose gradient by x is (x0_fake - x0_real) / mean |x - x0_real| / x.numel(), per video."""
    scale = (x.detach() - x0_real).abs().mean(dim=(1, 2, 3, 4), keepdim=True).clamp_min(1e-8)
    return 0.5 * F.mse_loss(x, x.detach() - (x0_fake - x0_real) / scale)


def generator_loss(generator: nn.Module, real_score: nn.Module, fake_score: nn.Module, batch: Batch,
                   levels: list[float], exit_step: int, chunk: int, shift: float, guidance: float,
                   prefix_prob: float) -> Tensor:
    free = sample_prefix(batch.rng, batch.x0.shape[1], prefix_prob).to(batch.x0.device)
    x = self_rollout(generator, batch, levels, exit_step, chunk, free)
    with torch.no_grad():
        x_t, _, sigma = noised(x, batch, shift, free)
        v_fake = fake_score(x_t, sigma, batch.prompt, batch.camera)
        v_real = guide(*(real_score(x_t, sigma, text, batch.camera) for text in (batch.prompt, batch.null)), guidance)
        x0_real, x0_fake = velocity_to_x0(v_real, x_t, sigma), velocity_to_x0(v_fake, x_t, sigma)
    return dmd_loss(x, x0_real, x0_fake)


def fake_score_loss(generator: nn.Module, fake_score: nn.Module, batch: Batch, levels: list[float], exit_step: int,
                    chunk: int, shift: float, prefix_prob: float) -> Tensor:
    """Flow matching on rollouts. The score sees the level that the noise was mixed at, exactly."""
    free = sample_prefix(batch.rng, batch.x0.shape[1], prefix_prob).to(batch.x0.device)
    with torch.no_grad():
        x = self_rollout(generator, batch, levels, exit_step, chunk, free)
    x_t, noise, sigma = noised(x, batch, shift, free)
    return masked_mse(fake_score(x_t, sigma, batch.prompt, batch.camera), noise - x, free)


def main(args: argparse.Namespace) -> None:
    # -- setup (same in every stage) ---------------------------------------------------------------------------------
    rank, world_size, device = start_process_group()
    data = open_latents(args.data, args.preset)
    vae = load_vae(Path(data.meta["vae"]), device, data.meta["vae_fingerprint"])
    folder = args.out.with_suffix("")  # beside the checkpoint: state to resume from, metrics, sheets of samples
    # -- end ---------------------------------------------------------------------------------------------------------

    weights, source = load_checkpoint(args.init, "ode", "cd", "dmd", preset=args.preset)
    score_weights, scores = load_checkpoint(args.scores, "camera", preset=args.preset)
    source = check_data(data, source, args.init)
    check_data(data, scores, args.scores)
    if scores["shift"] != source["shift"]:
        raise ValueError(f"{args.init} and {args.scores} differ in noise schedule: shift {source['shift']} and "
                         f"{scores['shift']}")
    with torch.device("meta"):
        generator, ema, fake_score = (build(args.preset) for _ in range(3))
        real_score = build(args.preset, **habits(scores))  # it stays as it is
    generator, ema = shard(generator, weights, device, train=True), shard(ema, weights, device)
    real_score = shard(real_score, score_weights, device)
    fake_score = shard(fake_score, score_weights, device, train=True)
    adamw = dict(betas=(0.0, 0.999), weight_decay=0.01, fused=True)  # no momentum: both chase a moving target
    optimizer = torch.optim.AdamW(generator.parameters(), lr=args.lr, **adamw)
    fake_score_optimizer = torch.optim.AdamW(fake_score.parameters(), lr=args.fake_score_lr, **adamw)
    nets = {"generator": generator, "ema": ema, "fake_score": fake_score}
    optimizers = {"generator": optimizer, "fake_score": fake_score_optimizer}
    meta = source | {"stage": "dmd", "sampler": "renoise",
                     "from": f"{args.init.name} at step {source['step']}, scores {args.scores.name}"}
    levels = noise_levels(meta["steps"], meta["shift"])

    def update(net: nn.Module, opt: torch.optim.Optimizer, number: int, loss_of: Callable) -> dict[str, float]:
        """One optimizer step, the number-th of the run, on loss_of(batch, exit_step)."""
        shared = torch.Generator().manual_seed(mix(args.seed, 3, number))  # the same on every rank
        exit_step = int(torch.randint(meta["steps"], (), generator=shared))
        loss_sum, ids = 0.0, []
        for micro in range(args.accum):
            net.set_requires_gradient_sync(micro == args.accum - 1)  # reduce over ranks once an update
            part, parts = micro * world_size + rank, args.accum * world_size
            batch = get_batch(data, args.seed, number, part, parts, args.batch_size, device)
            loss = loss_of(batch, exit_step) / args.accum
            loss.backward()
            loss_sum, ids = loss_sum + loss.detach(), ids + batch.ids
        grad_norm = nn.utils.clip_grad_norm_(net.parameters(), args.max_grad_norm).full_tensor()
        metrics = check_finite(step, {"loss": loss_sum, "grad_norm": grad_norm}, ids)
        opt.step()
        opt.zero_grad()
        return metrics

    # -- start (same in every stage) ---------------------------------------------------------------------------------
    step = load_state(folder, nets, optimizers) if args.resume else 0
    if rank == 0:
        open_log(folder / "metrics.jsonl", step)
        print(f"{args.out}: step {step} of {args.steps}" + (", nothing left to do" if step >= args.steps else ""))
    # -- end ---------------------------------------------------------------------------------------------------------
    for opt, lr in (optimizer, args.lr), (fake_score_optimizer, args.fake_score_lr):
        opt.param_groups[0]["lr"] = lr  # a resumed state brings its own
    bar = tqdm(total=args.steps, initial=step, desc=meta["stage"], disable=rank > 0)
    while step < args.steps:
        t0, number = time.time(), step * (1 + args.fake_score_updates)
        # the generator first, reading the score that was fitted to it; then the score catches up
        metrics = update(generator, optimizer, number, lambda batch, exit_step: generator_loss(
            generator, real_score, fake_score, batch, levels, exit_step, meta["chunk"], meta["shift"], args.guidance,
            meta["prefix_prob"]))
        update_ema(ema, generator, args.ema_decay)
        for n in range(args.fake_score_updates):
            fake = update(fake_score, fake_score_optimizer, number + 1 + n, lambda batch, exit_step: fake_score_loss(
                generator, fake_score, batch, levels, exit_step, meta["chunk"], meta["shift"], meta["prefix_prob"]))
        metrics |= {f"fake_score_{name}": value for name, value in fake.items()}
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
