"""
Stage 2a, a variant: the pairs of a *bidirectional* teacher (CausVid, arXiv:2412.07772). Read as a diff, distill_ode.py
against this.

distill_ode.py takes pairs of a causal teacher, so where a chunk's ODE ends is a function of what the student sees: its
own noise and its past. Here the camera model integrates all frames at once, and where a chunk ends depends on the noise
of later ones, too. A student that regresses it can only learn the mean over what it does not see: Causal Forcing
(arXiv:2602.02214) says that this blurs. What changes:
  1. --teacher, by default ckpt/camera.pt, makes the pairs; --init is where the student starts from alone
  2. integrate takes Euler steps of the whole video; nothing is after the truth
  3. the past in training is the teacher's own end point, which is what its chunks go with

$ PYTHONPATH=. python examples/variants/ode_bidirectional.py --generate
$ PYTHONPATH=. python examples/variants/ode_bidirectional.py --out ckpt/ode-bidirectional.pt
"""
import argparse
import gc
import json
import math
import shutil
import sys
import time
import zlib
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import safe_open
from torch import Tensor, nn
from tqdm import tqdm

from data import (
    Batch, HelpFormatter, Latents, check_data, get_batch, open_latents, open_log, positive, random_batch, read_row,
    save_shard, set_recipe, write_log, write_samples,
)
from model import (
    Meta, Nets, Work, add_noise, batch_part, bill, build, check_finite, describe_run, euler, gathered, load_checkpoint,
    load_state, lock_folder, masked_mse, noise_levels, origin, print_peak, save_average, save_state, sequence_rank,
    shard, start_process_group, stopping, update_ema, velocity_to_x0,
)


@torch.no_grad()
def integrate(teacher: nn.Module, batch: Batch, sigmas: list[float], meta: Meta, keep: int) -> Tensor:
    """All frames from noise down `sigmas` at once -> `keep` states and the end point [b keep+1 f c h w].

    meta: the teacher's. Given frames are clean in every state.
    """
    stride = (len(sigmas) - 1) // keep  # Euler steps from one kept state to the next
    noise = add_noise(batch.x0, batch.noise(), batch.generated)  # noise level 1, on given frames 0
    prompts = [batch.prompt] if meta["guidance"] == 1 else [batch.prompt, batch.null]
    no_past, states = [None] * len(prompts), [noise]
    for i in range(0, len(sigmas) - 1, stride):
        part = sigmas[i : i + stride + 1]
        states.append(euler(teacher, [states[-1]], part, prompts, batch.camera, meta["guidance"], no_past,
                            batch.generated))
    return torch.stack(states, dim=1)


def ode_loss(net: nn.Module, batch: Batch, sigmas: list[float], meta: Meta) -> Tensor:
    """|| x0 predicted from a random state of each chunk - where the teacher's ODE ends ||^2. sigmas: of the states."""
    b, f = batch.x0.shape[:2]
    n = len(sigmas) - 1  # the last state is the end point
    s = (batch.rand_per_chunk(meta["chunk"]) * n).long()  # part 3: [b f]
    x_s = batch.states[torch.arange(b)[:, None], s, torch.arange(f)]  # [b f c h w]
    sigma_s = torch.tensor(sigmas, dtype=torch.float32, device=s.device)[s] * batch.generated
    v = net(x_s, sigma_s, batch.prompt, batch.camera, clean=batch.states[:, -1], chunk=meta["chunk"])
    return masked_mse(velocity_to_x0(v, x_s, sigma_s), batch.states[:, -1], batch.generated)  # part 4


# minWM's Muon for HY: see train_camera.py.
RECIPES = {
    "tiny": dict(steps=1000, batch_size=16, accum=1, lr=3e-4, warmup=50, betas=(0.9, 0.99), max_grad_norm=1.0,
                 ema_decay=0.99, pairs_count=512, teacher_steps=48, sampling_steps=4),
    # minWM: 2 k steps, 32 videos, lr 2e-6; it integrates with guidance 6 although its teacher is sampled with 3. Ours
    # takes the teacher's own guidance from its checkpoint, and keeps an EMA.
    "wan-1.3b": dict(steps=2000, batch_size=1, accum=4, lr=2e-6, warmup=0, betas=(0.9, 0.999), max_grad_norm=10.0,
                     ema_decay=0.99, pairs_count=3000, teacher_steps=48, sampling_steps=4),
}
RECIPES["wan-14b"] = RECIPES["wan-1.3b"]
RECIPES["tiny-hy"] = RECIPES["tiny"] | dict(lr=6e-4)
# minWM: 1.5 k steps; its teacher has guidance 5.
RECIPES["hy-8b"] = RECIPES["wan-1.3b"] | dict(steps=1500, max_grad_norm=1.0)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    p.add_argument("--init", type=Path, default=Path("ckpt/ar.pt"), help="weights to start from")
    p.add_argument("--teacher", type=Path, default=Path("ckpt/camera.pt"), help="camera model that makes the pairs")
    p.add_argument("--data", type=Path, default=Path("data/toy"), help="latents folder (python data.py)")
    p.add_argument("--out", type=Path, default=Path("ckpt/ode.pt"), help="checkpoint to write")
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
    p.add_argument("--generate", action="store_true", help="write the pairs instead of training on them")
    p.add_argument("--pairs", type=Path, default=Path("data/ode-bidirectional"), help="folder of pairs")
    p.add_argument("--pairs-count", type=positive, help="videos to integrate")
    p.add_argument("--teacher-steps", type=positive, help="Euler steps of the teacher, a multiple of --sampling-steps")
    p.add_argument("--betas", type=float, nargs=2, help="of AdamW: decay of the gradient's mean and square")
    p.add_argument("--warmup", type=int, help="steps until lr is reached")
    p.add_argument("--sampling-steps", type=positive, help="denoising steps of the student")
    p.add_argument("--gather", action="store_true", help="keep the teacher whole on every GPU during a rollout: "
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
    args = p.parse_args(argv)
    if args.teacher_steps % args.sampling_steps:
        p.error(f"--teacher-steps {args.teacher_steps} is not a multiple of --sampling-steps {args.sampling_steps}: "
                "the student would be asked at levels its teacher never visited")
    return args


def pair_terms(args: argparse.Namespace, meta: Meta) -> dict:
    """What pairs depend on and training on them must agree with. meta: the teacher's."""
    sigmas = noise_levels(args.teacher_steps, meta["shift"])[:: args.teacher_steps // args.sampling_steps]
    return {"levels": sigmas, "teacher": origin(args.teacher, meta), "teacher_steps": args.teacher_steps,
            "guidance": meta["guidance"], "chunk": meta["chunk"], "given_prob": meta["given_prob"]}


def generate(args: argparse.Namespace, teacher: nn.Module, data: Latents, meta: Meta, device: torch.device) -> None:
    """Write --pairs-count videos' states as a latents folder of its own. Shards that exist are not made again."""
    rank, (part, parts) = dist.get_rank(), batch_part(0, 1)
    args.pairs.mkdir(parents=True, exist_ok=True)
    drawn = zlib.crc32(json.dumps([data.rows, data.weights]).encode())  # these videos, each so often
    about = json.dumps(data.meta | pair_terms(args, meta) |
                       {"seed": args.seed, "batch": [args.batch_size, parts], "drawn": drawn})
    for path in sorted(args.pairs.glob("latents-*.safetensors")):
        with safe_open(path, "pt") as file:
            if file.metadata()["meta"] != about:
                raise ValueError(f"{path}: of another teacher, other videos or settings; remove {args.pairs} first")
    sigmas = noise_levels(args.teacher_steps, meta["shift"])
    for i in tqdm(range(math.ceil(args.pairs_count / (args.batch_size * parts))), "pairs", disable=rank > 0):
        path = args.pairs / f"latents-{i:06d}-{part:03d}.safetensors"
        done = torch.tensor(float(path.exists()), device=device)
        dist.all_reduce(done, op=dist.ReduceOp.MIN)  # the teacher is sharded: its ranks skip together or not at all
        if done:
            continue
        batch = get_batch(data, args.seed, i, (part, parts), args.batch_size, device, meta["given_prob"])
        with gathered(teacher, args.gather):
            states = integrate(teacher, batch, sigmas, meta, keep=args.sampling_steps)
        if not states.isfinite().all():
            raise ValueError(f"{path}: the teacher's states of rows {batch.ids} are not finite; not written")
        rows = [read_row(data, row) for row in batch.ids]  # as they are, and beside them what was made here
        tensors = {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
        tensors |= {"states": states.half(), "generated": batch.generated}
        if sequence_rank()[0] == 0:  # the ranks that share a video have all made it
            save_shard(path, tensors, {"meta": about})
    if rank == 0:
        shutil.copy(data.folder / "prompts.safetensors", args.pairs)


def main(args: argparse.Namespace) -> None:
    # -- setup (same in every stage) ---------------------------------------------------------------------------------
    rank, _, device = start_process_group(args.sp, args.shard_over)
    data = open_latents(args.data, args.preset)
    folder = lock_folder(args.out)  # beside the checkpoint: earlier ones, states to resume from, metrics, sheets
    # -- end ---------------------------------------------------------------------------------------------------------

    weights, source = load_checkpoint(args.init, "ar", preset=args.preset)
    source = check_data(data, source, args.init)
    teacher_weights, teacher_meta = load_checkpoint(args.teacher, "camera", preset=args.preset)
    check_data(data, teacher_meta, args.teacher)
    if teacher_meta["shift"] != source["shift"]:
        raise ValueError(f"{args.init} and {args.teacher} differ in noise schedule: shift {source['shift']} and "
                         f"{teacher_meta['shift']}")
    if args.generate:
        with torch.device("meta"):
            teacher = build(args.preset)
        teacher.timed_text = teacher_meta.get("timed_text", False)  # some released HY camera models tell the text, too
        teacher = shard(teacher, teacher_weights, device, compiled=args.compile)
        return generate(args, teacher, data, teacher_meta, device)
    del teacher_weights
    data, terms = open_latents(args.pairs, args.preset), pair_terms(args, teacher_meta)  # the data are pairs from here
    if "generated" not in data.shards[0].keys():
        raise ValueError(f"{args.pairs}: pairs of an older version of this code; remove them, --generate makes others")
    found = {name: data.meta.get(name) for name in terms}
    if found != terms:
        raise ValueError(f"{args.pairs}: expected pairs with {terms}, found {found}; --generate makes them")
    with torch.device("meta"):
        net, ema = (build(args.preset) for _ in range(2))
    net, ema = shard(net, weights, device, train=True, compiled=args.compile), shard(ema, weights, device)
    optimizer = torch.optim.AdamW(net.parameters(), lr=args.lr, betas=args.betas, weight_decay=0.01, fused=True)
    nets, optimizers = {"net": net, "ema": ema}, {"net": optimizer}
    meta: Meta = source | {"stage": "ode", "sampler": "few_step", "sampling_steps": args.sampling_steps,
                           "guidance": 1.0,
                           "from": f"{origin(args.init, source)}; pairs of {origin(args.teacher, teacher_meta)}"}
    run = describe_run(args, init=source, teacher=teacher_meta)

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
            batch = get_batch(data, args.seed, step, part, args.batch_size, device)
            loss = ode_loss(net, batch, terms["levels"], meta) / args.accum
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
    """A micro-batch of a step, or with --generate its pairs."""
    sigmas = noise_levels(args.teacher_steps, meta["shift"])
    if args.generate:
        with gathered(nets["net"], args.gather):
            integrate(nets["net"], batch, sigmas, meta | {"guidance": 2.0}, args.sampling_steps)  # any but 1
        return
    levels = sigmas[:: args.teacher_steps // args.sampling_steps]
    states = batch.x0[:, None].expand(-1, len(levels), -1, -1, -1, -1)
    ode_loss(nets["net"], batch._replace(states=states), levels, meta).backward()
    yield "net"


WORK = Work("ode", {"net": True, "ema": False}, rehearse, random_batch, linear="teacher_steps")


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
