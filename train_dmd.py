"""
Stage 3: asymmetric DMD on self-rollouts (Self Forcing, arXiv:2506.08009; DMD, arXiv:2311.18828 and 2405.14867).

in:  ckpt/ode.pt or ckpt/cd.pt, a few-step causal student; ckpt/camera.pt, the bidirectional camera model
out: ckpt/dmd.pt, the model that streams

So far every chunk was trained after a clean past. In use the past is the model's own. Three networks:
  generator     the student, causal
  real_score    the frozen camera model: which way a noised rollout should move to look like data
  fake_score    the same model, kept trained on the generator's rollouts: which way it moves to look like itself

The generator follows the difference. One update of it:
  1. roll out a whole video from its own past; of each chunk's denoising steps only the last carries gradient, and what
     joins the cache carries none
  2. noise the video to a random level, and ask both scores for the clean one
  3. move it along their difference (DMD eq. 7-8):

    x = rollout(noise)     x_t = (1 - sigma) x + sigma noise'
    grad = (x0_fake(x_t) - x0_real(x_t)) / mean |x - x0_real(x_t)|          loss = 1/2 || x - sg(x - grad) ||^2

  4. then fake_score catches up: --fake-score-updates plain flow-matching steps on new rollouts

--steps counts generator updates. (The papers count fake_score's: their 200 are 40 of these.)

$ python train_dmd.py
$ torchrun --nproc_per_node 2 train_dmd.py --batch-size 8 --init ckpt/ode.pt
"""
import argparse
import gc
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from data import (
    Batch, HelpFormatter, Latents, check_data, get_batch, mix, open_latents, open_log, positive, set_recipe, write_log,
    write_samples,
)
from model import (
    Meta, Nets, add_noise, build, check_finite, full_state_dict, guide, load_checkpoint, load_state, load_vae,
    masked_mse, noise_levels, prefill, save_checkpoint, save_state, shard, shift_sigma, start_process_group,
    update_cache, update_ema, velocity_to_x0,
)


def self_rollout(generator: nn.Module, batch: Batch, meta: Meta, exit_step: int) -> Tensor:
    """Video made chunk by chunk after its own past [b f c h w]; gradient through step exit_step of each chunk alone.

    exit_step is shared by all chunks and ranks. The result is the prediction of that step: clean only in the sense in
    which a few-step model's predictions are, which is what the scores must judge. Given frames are the batch's own.
    """
    want_grad = torch.is_grad_enabled()
    f, chunk = batch.x0.shape[1], meta["chunk"]
    sigmas = noise_levels(meta["sampling_steps"], meta["shift"])
    noise = [batch.noise() for _ in range(exit_step + 1)]  # one for each denoising step
    noise[0] = add_noise(batch.x0, noise[0], batch.generated)  # noise level 1, on given frames 0
    kv_cache = prefill(generator, noise[0], batch.prompt, batch.camera)
    video = []
    for start in range(0, f, chunk):
        frames = slice(start, start + chunk)
        camera, generated = batch.camera.frames(frames), batch.generated[:, frames]
        x_t = noise[0][:, frames]
        for i in range(exit_step + 1):
            sigma = sigmas[i] * generated  # [b chunk]
            # truncation: earlier steps leave no graph, so x_t is a constant for the step that carries gradient
            with torch.set_grad_enabled(want_grad and i == exit_step):
                v = generator(x_t, sigma, batch.prompt, camera, kv_cache=kv_cache)
                x0 = velocity_to_x0(v, x_t, sigma)
            if i < exit_step:
                x_t = add_noise(x0, noise[i + 1][:, frames], sigmas[i + 1] * generated)
        video.append(x0)
        if frames.stop < f:  # the cache is made without gradient: none flows from one chunk to an earlier one
            kv_cache = update_cache(generator, x0, batch.prompt, camera, kv_cache=kv_cache)
    return torch.cat(video, dim=1)


def noised(x: Tensor, batch: Batch, meta: Meta) -> tuple[Tensor, Tensor, Tensor]:
    """A rollout x at a random level between 0.02 and 0.98, one per video -> x_t, noise, sigma [b f]."""
    sigma = shift_sigma(batch.rand(1), meta["shift"]).clamp(0.02, 0.98) * batch.generated
    noise = batch.noise()
    return add_noise(x, noise, sigma), noise, sigma


def dmd_loss(x: Tensor, x0_real: Tensor, x0_fake: Tensor) -> Tensor:
    """A loss whose gradient by x is (x0_fake - x0_real) / mean |x - x0_real| / x.numel(), the mean per video."""
    scale = (x.detach() - x0_real).abs().mean(dim=(1, 2, 3, 4), keepdim=True).clamp_min(1e-8)
    return 0.5 * F.mse_loss(x, x.detach() - (x0_fake - x0_real) / scale)


def generator_loss(x: Tensor, real_score: nn.Module, fake_score: nn.Module, batch: Batch, meta: Meta,
                   guidance: float) -> Tensor:
    """DMD eq. 7-8: move the rollout x [b f c h w] from where fake_score expects it to where real_score does.

    guidance: of real_score alone. fake_score has only ever seen what the generator makes of a prompt.
    """
    with torch.no_grad():  # the scores only point
        x_t, _, sigma = noised(x, batch, meta)  # 2
        v_fake = fake_score(x_t, sigma, batch.prompt, batch.camera)
        v_cond = real_score(x_t, sigma, batch.prompt, batch.camera)
        v_null = real_score(x_t, sigma, batch.null, batch.camera)
        x0_fake = velocity_to_x0(v_fake, x_t, sigma)
        x0_real = velocity_to_x0(guide(v_cond, v_null, guidance), x_t, sigma)
    return dmd_loss(x, x0_real, x0_fake)  # 3; on given frames both scores return x itself: no difference


def fake_score_loss(x: Tensor, fake_score: nn.Module, batch: Batch, meta: Meta) -> Tensor:
    """Flow matching on a rollout x [b f c h w]. The score is told the level that the noise was mixed at, exactly."""
    x_t, noise, sigma = noised(x, batch, meta)
    return masked_mse(fake_score(x_t, sigma, batch.prompt, batch.camera), noise - x, batch.generated)


RECIPES = {
    "tiny": dict(steps=30, batch_size=16, accum=1, lr=5e-5, fake_score_lr=1e-4, max_grad_norm=1.0, ema_decay=0.95,
                 fake_score_updates=5, guidance=2.0, save_every=10),
    # minWM: 200 updates of fake_score, 32 videos, lr 2e-6 and 4e-7, betas (0, 0.999), EMA 0.99 from update 200 (ours
    # has only 40 generator steps to follow, so it forgets faster), guidance "3.0" in a formula that adds one: 4 in
    # ours. Its cache leaks gradient between chunks; ours is truncated exactly.
    "wan-1.3b": dict(steps=40, batch_size=1, accum=4, lr=2e-6, fake_score_lr=4e-7, max_grad_norm=10.0, ema_decay=0.8,
                     fake_score_updates=5, guidance=4.0, save_every=5),
}
RECIPES["wan-14b"] = RECIPES["wan-1.3b"]
RECIPES["tiny-hy"] = RECIPES["tiny"] | dict(lr=1e-4, fake_score_lr=2e-4)
# minWM: 100 generator updates after 4 of fake_score each, Muon at lr 1e-5 and 8e-6 (AdamW's at a fifth of that makes
# updates as large), EMA 0.99 from the 100th step on, guidance 5.
RECIPES["hy-8b"] = RECIPES["wan-1.3b"] | dict(steps=100, fake_score_lr=1.6e-6, max_grad_norm=1.0, ema_decay=0.95,
                                              fake_score_updates=4, guidance=5.0)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    p.add_argument("--init", type=Path, default=Path("ckpt/ode.pt"), help="few-step student to start from")
    p.add_argument("--data", type=Path, default=Path("data/toy"), help="latents folder (python data.py)")
    p.add_argument("--out", type=Path, default=Path("ckpt/dmd.pt"), help="checkpoint to write")
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
    p.add_argument("--scores", type=Path, default=Path("ckpt/camera.pt"), help="bidirectional, starts both scores")
    p.add_argument("--fake-score-lr", type=float, help="learning rate of fake_score's AdamW")
    p.add_argument("--fake-score-updates", type=positive, help="of fake_score, per generator update")
    p.add_argument("--guidance", type=float, help="of real_score: w in null + w (cond - null); 1 is off")
    # -- last flags (same in every stage) ----------------------------------------------------------------------------
    p.add_argument("--seed", type=int, default=0, help="of the order of videos and of all noise")
    p.add_argument("--log-every", type=positive, default=10, help="steps from one line of metrics.jsonl to the next")
    p.add_argument("--save-every", type=positive, default=500, help="steps from one checkpoint and state to the next")
    set_recipe(p, RECIPES, argv)
    # -- end ---------------------------------------------------------------------------------------------------------
    return p.parse_args(argv)


def load_nets(args: argparse.Namespace, data: Latents, device: torch.device) -> tuple[Nets, Meta]:
    """generator, its ema, real_score and fake_score, and what the generator's checkpoint says of itself.

    Raises ValueError when student, scores and data do not belong together.
    """
    weights, source = load_checkpoint(args.init, "ode", "cd", "dmd", preset=args.preset)
    score_weights, scores = load_checkpoint(args.scores, "camera", preset=args.preset)
    source = check_data(data, source, args.init)
    check_data(data, scores, args.scores)
    if scores["shift"] != source["shift"]:
        raise ValueError(f"{args.init} and {args.scores} differ in noise schedule: shift {source['shift']} and "
                         f"{scores['shift']}")
    with torch.device("meta"):
        nets = {name: build(args.preset) for name in ("generator", "ema", "real_score", "fake_score")}
    nets["real_score"].timed_text = scores.get("timed_text", False)  # it stays as it is; the others are ours
    shard(nets["generator"], weights, device, train=True)
    shard(nets["ema"], weights, device)
    shard(nets["real_score"], score_weights, device)
    shard(nets["fake_score"], score_weights, device, train=True)
    return nets, source


def sample_exit_step(seed: int, update: int, steps: int) -> int:
    """Which of a chunk's denoising steps carries gradient in this update: the same on every rank."""
    return int(torch.randint(steps, (), generator=torch.Generator().manual_seed(mix(seed, 3, update))))


def main(args: argparse.Namespace) -> None:
    # -- setup (same in every stage) ---------------------------------------------------------------------------------
    rank, world_size, device = start_process_group()
    data = open_latents(args.data, args.preset)
    vae = load_vae(Path(data.meta["vae"]), device, data.meta["vae_fingerprint"])
    folder = args.out.with_suffix("")  # beside the checkpoint: state to resume from, metrics, sheets of samples
    # -- end ---------------------------------------------------------------------------------------------------------

    nets, source = load_nets(args, data, device)
    generator, ema, real_score, fake_score = nets.values()
    adamw = dict(betas=(0.0, 0.999), weight_decay=0.01, fused=True)  # no momentum: both chase a moving target
    optimizer = torch.optim.AdamW(generator.parameters(), lr=args.lr, **adamw)
    fake_score_optimizer = torch.optim.AdamW(fake_score.parameters(), lr=args.fake_score_lr, **adamw)
    nets = {"generator": generator, "ema": ema, "fake_score": fake_score}  # real_score never changes
    optimizers = {"generator": optimizer, "fake_score": fake_score_optimizer}
    meta: Meta = source | {"stage": "dmd", "sampler": "few_step",
                           "from": f"{args.init.name} at step {source['step']}, scores {args.scores.name}"}

    # -- start (same in every stage) ---------------------------------------------------------------------------------
    step = load_state(folder, nets, optimizers) if args.resume else 0
    open_log(args.out, step, args.steps)
    bar = tqdm(total=args.steps, initial=step, desc=meta["stage"], disable=rank > 0)
    # -- end ---------------------------------------------------------------------------------------------------------
    while step < args.steps:
        # the generator first, reading the score that was fitted to it
        t0, update = time.time(), step * (1 + args.fake_score_updates)
        exit_step = sample_exit_step(args.seed, update, meta["sampling_steps"])
        loss_sum, ids = 0.0, []
        for micro in range(args.accum):
            part, parts = micro * world_size + rank, args.accum * world_size
            batch = get_batch(data, args.seed, update, part, parts, args.batch_size, device, meta["given_prob"])
            x = self_rollout(generator, batch, meta, exit_step)  # 1
            loss = generator_loss(x, real_score, fake_score, batch, meta, args.guidance) / args.accum
            loss.backward()
            loss_sum, ids = loss_sum + loss.detach(), ids + batch.ids
        grad_norm = nn.utils.clip_grad_norm_(generator.parameters(), args.max_grad_norm).full_tensor()
        metrics = check_finite(step, {"loss": loss_sum, "grad_norm": grad_norm}, ids)
        optimizer.step()
        optimizer.zero_grad()
        update_ema(ema, generator, args.ema_decay)

        for _ in range(args.fake_score_updates):  # 4: the score catches up
            update += 1
            exit_step = sample_exit_step(args.seed, update, meta["sampling_steps"])
            loss_sum, ids = 0.0, []
            for micro in range(args.accum):
                part, parts = micro * world_size + rank, args.accum * world_size
                batch = get_batch(data, args.seed, update, part, parts, args.batch_size, device, meta["given_prob"])
                with torch.no_grad():
                    x = self_rollout(generator, batch, meta, exit_step)
                loss = fake_score_loss(x, fake_score, batch, meta) / args.accum
                loss.backward()
                loss_sum, ids = loss_sum + loss.detach(), ids + batch.ids
            grad_norm = nn.utils.clip_grad_norm_(fake_score.parameters(), args.max_grad_norm).full_tensor()
            metrics |= check_finite(step, {"fake_score_loss": loss_sum, "fake_score_grad_norm": grad_norm}, ids)
            fake_score_optimizer.step()
            fake_score_optimizer.zero_grad()
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
