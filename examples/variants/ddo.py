"""
Stage 1, a variant: a likelihood ratio as discriminator (DDO, arXiv:2503.01103). Read as a diff, train_ar.py against
this.

in:  ckpt/ar.pt, which is also the frozen reference; its own videos, made by --generate
out: ckpt/ddo.pt, autoregressive as before

A model that was trained to be likely covers too much. DDO tells data from the reference's own samples with the ratio of
two likelihoods, the model's over the reference's, as discriminator; no other network is trained. A diffusion model's
likelihood is its loss, so for each chunk x after its true past:

    delta(x) = |v_ref - (noise - x)|^2 - |v - (noise - x)|^2          the same sigma and noise for both, summed over x
    loss = softplus(-beta delta(x_data)) + alpha softplus(beta delta(x_ref))          over max(alpha, 1)

At the start delta is 0, and a step goes down the loss of data and up that of the reference's samples. What changes:
  1. --generate makes those samples as distill_ode.py makes its pairs, after true pasts, but without guidance: guided
     videos are no samples of the reference
  2. ddo_loss, with a frozen copy of --init, in the place of teacher_forcing_loss

A round is short: quality peaks and then falls, so choose among the saves by --score, and start the next round from the
best, with samples of its own. --alpha 0 goes on with data alone.

$ PYTHONPATH=. python examples/variants/ddo.py --generate && PYTHONPATH=. python examples/variants/ddo.py
"""
import argparse
import gc
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from einops import reduce
from torch import Tensor, nn
from tqdm import tqdm

from data import (
    Batch, HelpFormatter, check_data, fraction, get_batch, open_latents, open_log, positive, random_batch, set_recipe,
    write_log, write_samples,
)
from distill_ode import generate
from model import (
    Meta, Nets, Work, add_noise, batch_part, bill, build, check_finite, describe_run, load_checkpoint, load_state,
    lock_folder, origin, print_peak, save_average, save_state, shard, shift_sigma, start_process_group, stopping,
    update_ema, where_prompt,
)


def ddo_loss(net: nn.Module, reference: nn.Module, batch: Batch, meta: Meta, null_prob: float, alpha: float,
             beta: float) -> Tensor:
    """The discriminator's loss, a mean over chunks. batch.states: of the reference's pairs [b 2 f c h w]."""
    f, chunk = batch.x0.shape[1], meta["chunk"]
    sigma = shift_sigma(batch.rand_per_chunk(chunk), meta["shift"]) * batch.generated  # [b f], one per chunk
    noise = batch.noise()  # [b f c h w]
    dropped = batch.chance(null_prob)  # [b]: guidance needs a network that knows videos without a prompt
    prompt = where_prompt(dropped, batch.null, batch.prompt)

    def per_chunk(z: Tensor) -> Tensor:  # [b f], zeros behind a short last chunk
        return reduce(F.pad(z, (0, -f % chunk)), "b (n k) -> b n", "sum", k=chunk)

    def delta(x: Tensor) -> Tensor:  # [b chunks]
        seen = add_noise(x, noise, sigma), sigma, prompt, batch.camera
        with torch.no_grad():
            v_reference = reference(*seen, clean=batch.x0, chunk=chunk)
        v = net(*seen, clean=batch.x0, chunk=chunk)
        better = (v_reference - (noise - x)).square() - (v - (noise - x)).square()
        return per_chunk(better.sum((2, 3, 4)) * batch.generated)

    made = (per_chunk(batch.generated) > 0).float()  # chunks that are not given as a whole
    loss = F.softplus(-beta * delta(batch.x0)) + alpha * F.softplus(beta * delta(batch.states[:, -1]))
    return (loss * made).sum() / made.sum() / max(alpha, 1)


# minWM's Muon for HY: see train_camera.py.
RECIPES = {
    "tiny": dict(steps=300, batch_size=16, accum=1, lr=5e-5, warmup=20, betas=(0.9, 0.99), max_grad_norm=1.0,
                 ema_decay=0.99, alpha=1.0, beta=0.05, pairs_count=512, teacher_steps=48, null_prob=0.1,
                 save_every=100),
    # of no paper: a hundredth of the AR stage's steps, as DDO has them
    "wan-1.3b": dict(steps=40, batch_size=1, accum=4, lr=2e-6, warmup=0, betas=(0.0, 0.999), max_grad_norm=10.0,
                     ema_decay=0.9, alpha=1.0, beta=0.05, pairs_count=3000, teacher_steps=48, null_prob=0.0,
                     save_every=10),
}
RECIPES["wan-14b"] = RECIPES["hy-8b"] = RECIPES["wan-1.3b"]
RECIPES["tiny-hy"] = RECIPES["tiny"]


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    p.add_argument("--init", type=Path, default=Path("ckpt/ar.pt"), help="weights to start from, and the reference")
    p.add_argument("--data", type=Path, default=Path("data/toy"), help="latents folder (python data.py)")
    p.add_argument("--out", type=Path, default=Path("ckpt/ddo.pt"), help="checkpoint to write")
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
    p.add_argument("--generate", action="store_true", help="write the reference's samples instead of training")
    p.add_argument("--pairs", type=Path, default=Path("data/ddo"), help="folder of the reference's samples")
    p.add_argument("--pairs-count", type=positive, help="videos to sample")
    p.add_argument("--teacher-steps", type=positive, help="Euler steps of the reference")
    p.add_argument("--gather", action="store_true", help="keep the reference whole on every GPU while it samples")
    p.add_argument("--alpha", type=float, help="weight of the reference's samples beside data")
    p.add_argument("--beta", type=float, help="how sharp the discriminator is")
    p.add_argument("--null-prob", type=fraction, help="share of videos whose prompt is dropped, for guidance's sake")
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
    args.sampling_steps = 1  # of each pair, its noise and its end alone
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
        net, ema, reference = (build(args.preset) for _ in range(3))
    reference = shard(reference, weights, device, compiled=args.compile)
    if args.generate:
        return generate(args, reference, data, source | {"guidance": 1.0}, device)
    data = open_latents(args.pairs, args.preset)  # from here on each with the reference's sample beside it
    if data.meta.get("teacher") != origin(args.init, source) or data.meta.get("guidance") != 1.0:
        raise ValueError(f"{args.pairs}: expected samples of {args.init}; --generate makes them")
    net, ema = shard(net, weights, device, train=True, compiled=args.compile), shard(ema, weights, device)
    optimizer = torch.optim.AdamW(net.parameters(), lr=args.lr, betas=args.betas, weight_decay=0.01, fused=True)
    nets, optimizers = {"net": net, "ema": ema}, {"net": optimizer}
    meta: Meta = source | {"from": origin(args.init, source)}
    run = describe_run(args, init=source)

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
            loss = ddo_loss(net, reference, batch, meta, args.null_prob, args.alpha, args.beta) / args.accum
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
    batch = batch._replace(states=batch.x0[:, None])
    ddo_loss(nets["net"], nets["reference"], batch, meta, args.null_prob, args.alpha, args.beta).backward()
    yield "net"


WORK = Work("ar", {"net": True, "ema": False, "reference": False}, rehearse, random_batch)


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
