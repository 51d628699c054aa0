"""
Stage 1, a variant: the next chunk from the last frame instead of from noise (a bridge; CDBM, arXiv:2410.22637). Read as
a diff, train_ar.py against this; --consistency, distill_cd.py against this, but trained as the former is: the control
of a student is --form noise --consistency.

in:  ckpt/ar.pt; with --consistency, ckpt/bridge.pt
out: ckpt/bridge.pt, with --consistency ckpt/bridge-cd.pt; of a stage of their own: stream.py would start their chunks
     from noise, so refuses them; --stream is stream.py with the solver of this file

A chunk is much like the last latent frame y before it, and nearer to it than to noise. The claim: a shorter way takes
fewer steps. So the line from x0 ends not at noise, but at a source around y:

    x_t = (1 - sigma) x0 + sigma source,  v = source - x0,  source = y + spread noise
    --form flow      spread = kappa: from N(y, kappa^2 I); all else is flow matching as it was
    --form bridge    spread = kappa sqrt((1 - sigma) / sigma): a Brownian bridge from y itself. x_t has deviation
                     kappa sqrt(sigma (1 - sigma)), none at both ends; the loss is divided by the variance of v
    --form noise     y = 0, spread = 1: train_ar.py's, a control of equal compute

What changes:
  1. the source. Latent frame 0 holds one picture, any other four; the mean square difference of 0 and 1, 2.7, exceeds
     that of a frame and noise, 2: a chunk behind fewer than two frames starts from noise in every form
  2. the solver holds x0 as predicted, y and the noise, and mixes them anew (CDBM's eq. 16); of a flow that is an Euler
     step. At sigma 1 a bridge holds no noise, which is drawn after the first step: one step alone makes a blurred mean
  3. --consistency: a student of few steps, without a teacher. Its EMA sees the same video and noise one level lower

    loss = || f(x_n, sigma_n) - sg f_ema(x_m, sigma_m) ||^2,   m = n + 1,   f(x, sigma) = x - sigma v

y is in the network's past anyway: nothing new is told. But what is wrong with it now enters twice, so watch the last
chunk; a flow noises it by kappa. A student has no guidance: compare it with students of a teacher without.

$ PYTHONPATH=. python examples/variants/bridge.py
$ PYTHONPATH=. python examples/variants/bridge.py --consistency
$ PYTHONPATH=. python examples/variants/bridge.py --stream --score --ckpt ckpt/bridge-cd.pt --sampling-steps 2
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

import model
import stream
from data import (
    Batch, HelpFormatter, check_data, fraction, get_batch, open_latents, open_log, positive, random_batch, set_recipe,
    write_log, write_samples,
)
from model import (
    Camera, Meta, Nets, Prompt, StreamState, Work, add_noise, batch_part, bill, build, check_finite, describe_run,
    load_checkpoint, load_state, lock_folder, masked_mse, next_chunk, noise_levels, origin, print_peak, save_average,
    save_state, shard, shift_sigma, start_process_group, stopping, update_ema, velocity, velocity_to_x0, where_prompt,
)

CHANGE = 0.6  # mean square of x0 - y, of the toy world's neighbouring latent frames; of 0 and 1 it would be 2.7


def spread(meta: Meta, sigma: Tensor | float) -> Tensor | float:
    """How far a source lies from y, as a standard deviation. sigma > 0, for a bridge."""
    return meta["kappa"] * (1 if meta["form"] == "flow" else ((1 - sigma) / sigma) ** 0.5)


def sources(batch: Batch, meta: Meta, noise: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
    """Where the lines from x0 end [b f c h w], and the variance of v, a mean over videos [b f 1 1 1]."""
    start = torch.arange(noise.shape[1], device=noise.device) // meta["chunk"] * meta["chunk"]  # [f], of each chunk
    from_past = ((start >= 2) & (meta["form"] != "noise"))[:, None, None, None]  # part 1
    y = torch.where(from_past, batch.x0[:, (start - 1).clamp(min=0)], 0.0)
    sigma = sigma.clamp(1e-4, 1)[..., None, None, None]  # given frames are at 0, where a bridge's line has no end
    deviation = torch.where(from_past, spread(meta, sigma), torch.ones_like(sigma))
    return y + deviation * noise, torch.where(from_past, CHANGE, 1.0) + deviation**2  # latents have variance 1


def bridge_loss(net: nn.Module, batch: Batch, meta: Meta, null_prob: float) -> Tensor:
    """|| v - (source - x0) ||^2 at one noise level per chunk, each chunk after its clean past."""
    chunk = meta["chunk"]
    sigma = shift_sigma(batch.rand_per_chunk(chunk), meta["shift"]) * batch.generated  # [b f], one per chunk
    noise = batch.noise()  # [b f c h w]
    dropped = batch.chance(null_prob)  # [b]: guidance needs a network that knows videos without a prompt
    prompt = where_prompt(dropped, batch.null, batch.prompt)
    source, variance = sources(batch, meta, noise, sigma)
    v = net(add_noise(batch.x0, source, sigma), sigma, prompt, batch.camera, clean=batch.x0, chunk=chunk)
    scale = variance**-0.5 if meta["form"] == "bridge" else 1.0  # near sigma 0 its v has no bound
    return masked_mse(scale * v, scale * (source - batch.x0), batch.generated)


def consistency_loss(student: nn.Module, ema: nn.Module, batch: Batch, sigmas: list[float], meta: Meta) -> Tensor:
    """|| student at the upper end of an interval - EMA at the lower end ||^2, one interval of `sigmas` per chunk."""
    forced = dict(clean=batch.x0, chunk=meta["chunk"])
    n = (batch.rand_per_chunk(meta["chunk"]) * (len(sigmas) - 1)).long()  # [b f]
    grid = torch.tensor(sigmas, dtype=torch.float32, device=n.device)
    noise, ends = batch.noise(), (grid[n] * batch.generated, grid[n + 1] * batch.generated)  # upper and lower
    x_n, x_m = (add_noise(batch.x0, sources(batch, meta, noise, sigma)[0], sigma) for sigma in ends)  # part 3
    with torch.no_grad():
        v_ema = ema(x_m, ends[1], batch.prompt, batch.camera, **forced)
        target = velocity_to_x0(v_ema, x_m, ends[1])  # at level 0 x0 itself
    v = student(x_n, ends[0], batch.prompt, batch.camera, **forced)
    return masked_mse(velocity_to_x0(v, x_n, ends[0]), target, batch.generated)


@torch.no_grad()
def bridged_chunk(net: nn.Module, meta: Meta, state: StreamState, prompts: list[Prompt], camera: Camera,
                  given: Tensor | None = None) -> Tensor:
    """next_chunk, but from the last frame y of the past. Of what does not start there, next_chunk itself."""
    plain, chunk = meta.get("form", "noise") == "noise", meta["chunk"]
    window, sink = meta.get("window", 0), meta.get("sink", 0)
    if not plain and window and window <= sink + chunk:  # refused at the first chunk
        raise ValueError(f"--window {window}: too short for --sink {sink}, chunks of {chunk} and the frame before each")
    if plain or state.kv_caches[0].frames < 2:
        return next_chunk(net, meta, state, prompts, camera, given)
    last, (b, n), device = state.past[-1], camera.viewmats.shape[:2], camera.viewmats.device

    def draw() -> Tensor:
        return torch.stack([torch.randn((n, *state.shape), generator=g) for g in state.rng]).to(device)

    y, sigmas = last.x0[:, -1:], noise_levels(meta["sampling_steps"], meta["shift"])
    x_t, generated = y + spread(meta, 1.0) * draw(), torch.ones(b, n, device=device)
    if given is not None:  # clean from the start
        p = given.shape[1]
        x_t = torch.cat([given, x_t[:, p:]], dim=1)
        generated[:, :p] = 0
    for upper, lower in zip(sigmas, sigmas[1:]):
        v = velocity(net, x_t, upper * generated, prompts, camera, meta["guidance"], state.kv_caches)
        x0 = velocity_to_x0(v, x_t, upper * generated)
        if lower == 0:
            return x0
        if meta["sampler"] == "few_step" or spread(meta, upper) == 0:
            noise = draw()
        else:
            noise = (x0 + v - y) / spread(meta, upper)  # part 2: x0 + v is the source
        x_t = add_noise(x0, y + spread(meta, lower) * noise, lower * generated)


# minWM's Muon for HY: see train_camera.py.
RECIPES = {
    "tiny": dict(steps=1000, batch_size=8, accum=1, lr=5e-4, warmup=50, cooldown=0.5, betas=(0.9, 0.99),
                 max_grad_norm=1.0, ema_decay=0.99, kappa=0.4, null_prob=0.1, guidance=1.25, teacher_steps=48),
    # of no paper: a quarter of the AR stage's steps
    "wan-1.3b": dict(steps=1000, batch_size=1, accum=4, lr=2e-6, warmup=0, cooldown=0.0, betas=(0.0, 0.999),
                     max_grad_norm=10.0, ema_decay=0.99, kappa=0.4, null_prob=0.0, guidance=3.0, teacher_steps=48),
}
RECIPES["wan-14b"] = RECIPES["wan-1.3b"]
RECIPES["tiny-hy"] = RECIPES["tiny"]
RECIPES["hy-8b"] = RECIPES["wan-1.3b"] | dict(betas=(0.9, 0.999), max_grad_norm=1.0, null_prob=0.1, guidance=6.0)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    p.add_argument("--init", type=Path, help="weights to start from; default ckpt/ar.pt, of a student ckpt/bridge.pt")
    p.add_argument("--data", type=Path, default=Path("data/toy"), help="latents folder (python data.py)")
    p.add_argument("--out", type=Path, help="checkpoint to write; default ckpt/bridge.pt, of a student bridge-cd.pt")
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
    p.add_argument("--form", choices=("flow", "bridge", "noise"), default="flow", help="what a chunk starts from")
    p.add_argument("--kappa", type=float, help="deviation of the noise; about what the past leaves open")
    p.add_argument("--consistency", action="store_true", help="make a student of few steps of this script's own --init")
    p.add_argument("--teacher-steps", type=positive, help="intervals of the student's grid, a multiple of its steps")
    p.add_argument("--null-prob", type=fraction, help="share of videos whose prompt is dropped, for guidance's sake")
    p.add_argument("--guidance", type=float, help="for sampling: w in null + w (cond - null); 1, a student's, is off")
    p.add_argument("--sampling-steps", type=positive, help="for sampling; default 48, of a student 4")
    p.add_argument("--stream", nargs=argparse.REMAINDER, metavar="FLAG", help="be stream.py; its flags follow")
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
    init, out, steps = ("bridge", "bridge-cd", 4) if args.consistency else ("ar", "bridge", 48)
    args.init, args.out = args.init or Path(f"ckpt/{init}.pt"), args.out or Path(f"ckpt/{out}.pt")
    args.sampling_steps = args.sampling_steps or steps
    if args.init == args.out:
        p.error(f"--out {args.out}: is --init, too, and would be written over")
    if args.consistency and args.teacher_steps % args.sampling_steps:
        p.error(f"--teacher-steps {args.teacher_steps} is not a multiple of --sampling-steps {args.sampling_steps}: "
                "the student would be asked at levels that it was not trained at")
    return args


def loss_of(args: argparse.Namespace, nets: Nets, batch: Batch, meta: Meta) -> Tensor:
    """Of a micro-batch."""
    if args.consistency:
        return consistency_loss(nets["net"], nets["ema"], batch, noise_levels(args.teacher_steps, meta["shift"]), meta)
    return bridge_loss(nets["net"], batch, meta, args.null_prob)


def main(args: argparse.Namespace) -> None:
    model.next_chunk = stream.next_chunk = bridged_chunk  # what model.rollout and stream.py call
    model.LASTING += ("form", "kappa")
    if args.stream is not None:
        stream.STAGES = (*stream.STAGES, "bridge")
        return stream.main(stream.parse_args(args.stream))
    # -- setup (same in every stage) ---------------------------------------------------------------------------------
    rank, _, device = start_process_group(args.sp, args.shard_over)
    data = open_latents(args.data, args.preset)
    folder = lock_folder(args.out)  # beside the checkpoint: earlier ones, states to resume from, metrics, sheets
    # -- end ---------------------------------------------------------------------------------------------------------

    weights, source = load_checkpoint(args.init, "bridge" if args.consistency else "ar", preset=args.preset)
    source, form = check_data(data, source, args.init), {"form": args.form, "kappa": args.kappa}
    if args.consistency and source | form != source:
        raise ValueError(f"{args.init}: made with --form {source['form']} --kappa {source['kappa']}, found "
                         f"--form {args.form} --kappa {args.kappa}")
    with torch.device("meta"):
        net, ema = (build(args.preset) for _ in range(2))
    net, ema = shard(net, weights, device, train=True, compiled=args.compile), shard(ema, weights, device)
    optimizer = torch.optim.AdamW(net.parameters(), lr=args.lr, betas=args.betas, weight_decay=0.01, fused=True)
    nets, optimizers = {"net": net, "ema": ema}, {"net": optimizer}
    how = {"sampler": "few_step", "guidance": 1.0} if args.consistency else {"guidance": args.guidance}
    meta: Meta = source | form | how | {"stage": "bridge", "sampling_steps": args.sampling_steps,
                                        "from": origin(args.init, source)}
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
            loss = loss_of(args, nets, batch, meta) / args.accum
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
    loss_of(args, nets, batch, meta | {"form": args.form, "kappa": args.kappa}).backward()
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
