"""
Stage 3, a variant: DMD on rollouts longer than the videos of training. Read as a diff, train_dmd.py against this.

A walk goes on after the trained length, with a window and a sink, and what it reads as its past then was in no
training. Here a rollout goes on, too, and its last frames, as many as a video has, are what the scores see (after
LongLive's streaming long tuning, arXiv:2509.22622). What changes:
  1. lengthen: the path of a batch's video, back along it, and on again: so it stays where its camera has been
  2. a rollout goes on for a random number of chunks, the same on all ranks, up to --rollout frames in all
  3. cut_clip: its last frames as a video of their own. Their first camera becomes the identity. The first latent frame
     of a video holds one picture, any other four: it is made anew, of the picture that it ends with, and given, as
     frames were when the scores were trained. So where a clip starts late, its first frame has no loss
  4. the student has a window and a sink, --window and --sink: in training, and by its checkpoint when it streams

HY is left out: its prompt holds the image that a video starts from, and a clip starts from another. Memory: the caches
of train_dmd.py's passes share their pieces; those of a window that moves do not, and are as many windows as a clip has
chunks. The parts that are numbered in the code are train_dmd.py's.

$ PYTHONPATH=. python examples/variants/long_dmd.py
$ PYTHONPATH=. torchrun --nproc_per_node 2 examples/variants/long_dmd.py --batch-size 8 --rollout 32
"""
import argparse
import gc
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from data import (
    Batch, HelpFormatter, Latents, check_data, find_vae, get_batch, mix, open_latents, open_log, open_vae, positive,
    random_batch, set_recipe, write_log, write_samples,
)
from model import (
    Camera, KVCache, Meta, Nets, Work, add_noise, batch_part, bill, build, check_finite, commit, describe_run, gathered,
    guide, load_checkpoint, load_state, lock_folder, masked_mse, noise_levels, origin, print_peak, save_average,
    save_state, shard, shift_sigma, start_process_group, start_stream, stopping, update_ema, velocity_to_x0,
)


class LastPass(NamedTuple):
    """The last pass of a chunk: all that it takes to make it again."""
    frames: slice
    x_t: Tensor  # [b chunk c h w], what it started from
    sigma: Tensor  # [b chunk]
    kv_cache: KVCache  # of the chunks before


def predict(generator: nn.Module, batch: Batch, last: LastPass) -> Tensor:
    """The x0 [b chunk c h w] that the generator predicts in this pass."""
    camera = batch.camera.frames(last.frames)
    v = generator(last.x_t, last.sigma, batch.prompt, camera, kv_cache=last.kv_cache)
    return velocity_to_x0(v, last.x_t, last.sigma)


@torch.no_grad()
def self_rollout(generator: nn.Module, batch: Batch, meta: Meta, exit_step: int, first: int = 0,
                 gather: bool = False) -> tuple[Tensor, list[LastPass]]:
    """A video made chunk by chunk after its own past [b f c h w], without gradient, and the last pass of each chunk
    from frame `first` on.

    As model.py's rollout with few_step, but each chunk stops at exit_step (0: after one pass), and the video is what is
    predicted there. Early ones are rough: the scores must see them, too, since few_step noises them again and goes on.
    All chunks share it, and all ranks, whose collectives must match. Given frames are the batch's own.
    gather: keep the generator's weights whole until the video is made.
    """
    f, chunk = batch.x0.shape[1], meta["chunk"]
    sigmas = noise_levels(meta["sampling_steps"], meta["shift"])
    prompts, video, passes = [batch.prompt], [], []
    with gathered(generator, gather):
        state = start_stream(generator, meta, batch.rng, batch.x0.shape[2:], prompts, batch.x0.device)
        for start in range(0, f, chunk):
            frames = slice(start, start + chunk)
            generated = batch.generated[:, frames]
            x_t = add_noise(batch.x0[:, frames], batch.noise(frames), generated)  # level 1, given frames at level 0
            for i in range(exit_step + 1):
                last = LastPass(frames, x_t, sigmas[i] * generated, state.kv_caches[0])
                x0 = predict(generator, batch, last)
                if i < exit_step:
                    x_t = add_noise(x0, batch.noise(frames), sigmas[i + 1] * generated)
            video.append(x0)
            if start >= first:
                passes.append(last)
            if frames.stop < f:
                state = commit(generator, meta, state, x0, prompts, batch.camera.frames(frames))
    return torch.cat(video, dim=1), passes


def lengthen(batch: Batch, frames: int) -> Batch:
    """A batch of so many frames, no fewer than it has: along its paths, back, and on again. The new ones are generated.

    Of x0, only what is given will be read.
    """
    f = batch.x0.shape[1]
    there_and_back = [*range(f), *range(f - 2, 0, -1)]
    index = [there_and_back[n % len(there_and_back)] for n in range(frames)]
    generated = F.pad(batch.generated, (0, frames - f), value=1.0)
    camera = Camera(*(z[:, index] for z in batch.camera))
    return batch._replace(x0=batch.x0[:, index], camera=camera, generated=generated)


@torch.no_grad()
def cut_clip(x: Tensor, batch: Batch, start: int, vae: nn.Module | None) -> tuple[Tensor, Batch]:
    """A rollout x [b f c h w] from frame `start` on, as a video of its own, and the batch of such videos.

    vae: None leaves the first latent frame as it is, where only shapes count.
    """
    clip, generated = x[:, start:], batch.generated[:, start:].clone()
    camera = batch.camera.frames(slice(start, None)).seen_from(batch.camera.viewmats[:, start])
    if start > 0:
        generated[:, 0] = 0
        if vae is not None:
            picture = vae.decode(x[:, : start + 1])[0][:, :, -1:].clamp(-1, 1)
            clip = torch.cat([vae.encode(picture)[0], clip[:, 1:]], dim=1)
    return clip, batch._replace(x0=clip, camera=camera, generated=generated)


def replay(generator: nn.Module, batch: Batch, passes: list[LastPass], grad: Tensor, gather: bool = False) -> None:
    """Make the last passes of a rollout again, with gradient, and hand each its part of the video's [b f c h w].

    From the last one on, and passes is empty afterwards: so the cache goes piece by piece.
    """
    with gathered(generator, gather):
        while passes:
            last = passes.pop()
            predict(generator, batch, last).backward(grad[:, last.frames])


def noised(x: Tensor, batch: Batch, meta: Meta) -> tuple[Tensor, Tensor, Tensor]:
    """A rollout x at a random level, one per video -> x_t, noise, sigma [b f]."""
    # clamped after the shift, as in Self Forcing: at the very ends the scores have nothing to say
    sigma = shift_sigma(batch.rand(1), meta["shift"]).clamp(0.02, 0.98) * batch.generated
    noise = batch.noise()
    return add_noise(x, noise, sigma), noise, sigma


def dmd_loss(x: Tensor, x0_real: Tensor, x0_fake: Tensor) -> Tensor:
    """A loss whose gradient with respect to x is (x0_fake - x0_real) / mean |x - x0_real| / x.numel(), mean per video.

    Its value, half the mean square of the scaled difference, says how far the scores are apart, and need not fall.
    """
    # given frames, on which both scores return x itself, add zeros to both means: that cancels
    scale = (x.detach() - x0_real).abs().mean(dim=(1, 2, 3, 4), keepdim=True).clamp_min(1e-8)
    return 0.5 * F.mse_loss(x, x.detach() - (x0_fake - x0_real) / scale)


def generator_loss(x: Tensor, real_score: nn.Module, fake_score: nn.Module, batch: Batch, meta: Meta,
                   guidance: float) -> Tensor:
    """Move the rollout x [b f c h w] from where fake_score expects it to where real_score does.

    guidance: of real_score alone. The generator's videos have it in them, and fake_score learns it from those.
    """
    with torch.no_grad():  # the scores only point
        x_t, _, sigma = noised(x, batch, meta)  # part 2
        v_fake = fake_score(x_t, sigma, batch.prompt, batch.camera)
        v_cond = real_score(x_t, sigma, batch.prompt, batch.camera)
        v_null = real_score(x_t, sigma, batch.null, batch.camera)
        x0_fake = velocity_to_x0(v_fake, x_t, sigma)
        x0_real = velocity_to_x0(guide(v_cond, v_null, guidance), x_t, sigma)
    return dmd_loss(x, x0_real, x0_fake)  # part 3


def fake_score_loss(x: Tensor, fake_score: nn.Module, batch: Batch, meta: Meta) -> Tensor:
    """Flow matching on a rollout x [b f c h w]. (Public code tells the score a neighbouring level, from a table.)"""
    x_t, noise, sigma = noised(x, batch, meta)
    return masked_mse(fake_score(x_t, sigma, batch.prompt, batch.camera), noise - x, batch.generated)


RECIPES = {
    "tiny": dict(steps=120, batch_size=16, accum=1, lr=1e-4, fake_score_lr=2e-4, max_grad_norm=1.0, ema_decay=0.95,
                 fake_score_updates=5, guidance=1.25, rollout=24, window=8, sink=1, save_every=20, state_every=20),
    # minWM: 200 updates of fake_score, 32 videos, lr 2e-6 and 4e-7, betas (0, 0.999), EMA 0.99 from update 200 on (ours
    # from the start, with 40 generator steps to follow, so it forgets faster), guidance "3.0" in a formula that adds
    # one: 4 in ours. Its cache leaks gradient between chunks; ours is truncated exactly.
    "wan-1.3b": dict(steps=40, batch_size=1, accum=4, lr=2e-6, fake_score_lr=4e-7, max_grad_norm=10.0, ema_decay=0.8,
                     fake_score_updates=5, guidance=4.0, rollout=60, window=20, sink=4, save_every=5, state_every=10),
}
RECIPES["wan-14b"] = RECIPES["wan-1.3b"]


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
    p.add_argument("--lr", type=float, help="of AdamW; in train_dmd.py the generator's")
    p.add_argument("--max-grad-norm", type=float, help="gradients longer than this are scaled down to it")
    p.add_argument("--ema-decay", type=float, help="of the averaged weights, which are what --out holds")
    # -- end ---------------------------------------------------------------------------------------------------------
    p.add_argument("--scores", type=Path, default=Path("ckpt/camera.pt"), help="camera model of any size: both scores; "
                   "--plan and --bench take them for as large as the student")
    p.add_argument("--fake-score-lr", type=float, help="learning rate of fake_score's AdamW")
    p.add_argument("--fake-score-updates", type=positive, help="of fake_score, per generator update")
    p.add_argument("--guidance", type=float, help="of real_score: w in null + w (cond - null); 1 is off")
    p.add_argument("--rollout", type=positive, help="latent frames of the longest rollouts")
    p.add_argument("--window", type=positive, help="latent frames that a chunk sees, its own with them")
    p.add_argument("--sink", type=int, help="how many of them are the video's first")
    p.add_argument("--gather", action="store_true", help="keep the generator whole on every GPU during a rollout: "
                   "fewer gathers, more memory")
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


def load_nets(args: argparse.Namespace, data: Latents, device: torch.device) -> tuple[Nets, Meta, Meta]:
    """generator, its ema, real_score and fake_score; what the student's and the scores' checkpoints say of themselves.

    Of the student's, training reads chunk, sampling_steps, shift and given_prob (in `tiny` 1, 4, 5.0 and 0.25).
    Raises ValueError when student, scores and data do not belong together.
    """
    weights, source = load_checkpoint(args.init, "ode", "cd", "dmd", preset=args.preset)
    # scores may be larger than the student, as in Causal Forcing: a 14B points a 1.3B the way
    score_weights, score_meta = load_checkpoint(args.scores, "camera", preset=args.preset, any_size=True)
    source = check_data(data, source, args.init)  # with the size and length of these videos, if it knew none of ours
    check_data(data, score_meta, args.scores)
    if score_meta["shift"] != source["shift"]:
        raise ValueError(f"{args.init} and {args.scores} differ in noise schedule: shift {source['shift']} and "
                         f"{score_meta['shift']}")
    with torch.device("meta"):
        nets = {name: build(args.preset) for name in ("generator", "ema")}
        nets |= {name: build(score_meta["preset"]) for name in ("real_score", "fake_score")}
    # HY's released scores were told the noise level with the text, too; what we train is not, see HYDiT
    nets["real_score"].timed_text = score_meta.get("timed_text", False)
    shard(nets["generator"], weights, device, train=True, compiled=args.compile)
    shard(nets["ema"], weights, device)
    shard(nets["real_score"], score_weights, device, compiled=args.compile)
    shard(nets["fake_score"], score_weights, device, train=True, compiled=args.compile)
    return nets, source, score_meta


def sample_exit_step(seed: int, update: int, steps: int) -> int:
    """Which of a chunk's denoising steps carries gradient in this update: the same on every rank."""
    return int(torch.randint(steps, (), generator=torch.Generator().manual_seed(mix(seed, 3, update))))


def sample_start(seed: int, update: int, most: int, chunk: int) -> int:
    """With which frame of the rollout the clip of this update starts, at most `most`: the same on every rank."""
    chunks = torch.randint(most // chunk + 1, (), generator=torch.Generator().manual_seed(mix(seed, 6, update)))
    return chunk * int(chunks)


def main(args: argparse.Namespace) -> None:
    # -- setup (same in every stage) ---------------------------------------------------------------------------------
    rank, _, device = start_process_group(args.sp, args.shard_over)
    data = open_latents(args.data, args.preset)
    folder = lock_folder(args.out)  # beside the checkpoint: earlier ones, states to resume from, metrics, sheets
    # -- end ---------------------------------------------------------------------------------------------------------

    nets, source, score_meta = load_nets(args, data, device)
    generator, ema, real_score, fake_score = (nets[name] for name in ("generator", "ema", "real_score", "fake_score"))
    adamw = dict(betas=(0.0, 0.999), weight_decay=0.01, fused=True)  # no momentum: both chase a moving target
    optimizer = torch.optim.AdamW(generator.parameters(), lr=args.lr, **adamw)
    fake_score_optimizer = torch.optim.AdamW(fake_score.parameters(), lr=args.fake_score_lr, **adamw)
    del nets["real_score"]  # from what is saved: it never changes
    optimizers = {"generator": optimizer, "fake_score": fake_score_optimizer}
    meta: Meta = source | {"stage": "dmd", "sampler": "few_step", "window": args.window, "sink": args.sink,
                           "from": f"{origin(args.init, source)}; scores {origin(args.scores, score_meta)}"}
    run = describe_run(args, init=source, scores=score_meta)
    f, chunk = meta["frames"], meta["chunk"]
    if args.rollout < f:
        raise ValueError(f"--rollout {args.rollout}: shorter than the videos of {args.data}, {f} latent frames")
    vae = open_vae(find_vae(data, args.vae), device, data.meta["vae_fingerprint"])

    # -- start (same in every stage) ---------------------------------------------------------------------------------
    step = load_state(folder, nets, optimizers, run) if args.resume else 0
    open_log(args.out, step, args.steps)
    bar = tqdm(total=args.steps, initial=step, desc=meta["stage"], disable=rank > 0)
    # -- end ---------------------------------------------------------------------------------------------------------
    while step < args.steps and not stopping():
        # the generator first, reading the score that was fitted to it (in the first step: the camera model)
        t0, update = time.time(), step * (1 + args.fake_score_updates)
        exit_step = sample_exit_step(args.seed, update, meta["sampling_steps"])
        start = sample_start(args.seed, update, args.rollout - f, chunk)
        loss_sum, ids = 0.0, []
        for micro in range(args.accum):
            part = batch_part(micro, args.accum)
            batch = get_batch(data, args.seed, update, part, args.batch_size, device, meta["given_prob"])
            batch = lengthen(batch, start + f)
            x, passes = self_rollout(generator, batch, meta, exit_step, start, args.gather)  # part 1
            x, clip = cut_clip(x, batch, start, vae)
            loss = generator_loss(x.requires_grad_(), real_score, fake_score, clip, meta, args.guidance) / args.accum
            loss.backward()  # as far as x
            replay(generator, batch, passes, F.pad(x.grad, (*6 * [0], start, 0)), args.gather)  # part 4
            loss_sum, ids = loss_sum + loss.detach(), ids + batch.ids
        grad_norm = nn.utils.clip_grad_norm_(generator.parameters(), args.max_grad_norm).full_tensor()
        metrics = check_finite(step, {"loss": loss_sum, "grad_norm": grad_norm}, ids)
        optimizer.step()
        optimizer.zero_grad()
        update_ema(ema, generator, args.ema_decay)
        for _ in range(args.fake_score_updates):  # part 5: the score catches up
            update += 1
            exit_step = sample_exit_step(args.seed, update, meta["sampling_steps"])
            start = sample_start(args.seed, update, args.rollout - f, chunk)
            loss_sum, ids = 0.0, []
            for micro in range(args.accum):
                part = batch_part(micro, args.accum)
                batch = get_batch(data, args.seed, update, part, args.batch_size, device, meta["given_prob"])
                batch = lengthen(batch, start + f)
                # without the passes: their cache must go before fake_score runs
                x = self_rollout(generator, batch, meta, exit_step, start, args.gather)[0]
                x, clip = cut_clip(x, batch, start, vae)
                loss = fake_score_loss(x, fake_score, clip, meta) / args.accum
                loss.backward()
                loss_sum, ids = loss_sum + loss.detach(), ids + batch.ids
            grad_norm = nn.utils.clip_grad_norm_(fake_score.parameters(), args.max_grad_norm).full_tensor()
            metrics |= check_finite(step, {"fake_score_loss": loss_sum, "fake_score_grad_norm": grad_norm}, ids)
            fake_score_optimizer.step()
            fake_score_optimizer.zero_grad()
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
    """A micro-batch of a step, every rollout as long as they come, but for the VAE."""
    f, chunk, meta = meta["frames"], meta["chunk"], meta | {"window": args.window, "sink": args.sink}
    start = (args.rollout - f) // chunk * chunk
    batch = lengthen(batch, start + f)
    generator, real_score, fake_score = (nets[name] for name in ("generator", "real_score", "fake_score"))
    last_step = meta["sampling_steps"] - 1
    x, passes = self_rollout(generator, batch, meta, last_step, start, args.gather)
    x, clip = cut_clip(x, batch, start, None)
    generator_loss(x.requires_grad_(), real_score, fake_score, clip, meta, args.guidance).backward()
    replay(generator, batch, passes, F.pad(x.grad, (*6 * [0], start, 0)), args.gather)
    yield "generator"
    for _ in range(args.fake_score_updates):
        x = self_rollout(generator, batch, meta, last_step, start, args.gather)[0]
        x, clip = cut_clip(x, batch, start, None)
        fake_score_loss(x, fake_score, clip, meta).backward()
        yield "fake_score"


WORK = Work("dmd", {"generator": True, "ema": False, "real_score": False, "fake_score": True}, rehearse, random_batch,
            repeats="fake_score_updates")


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
