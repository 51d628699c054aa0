"""
Stage 2b, a variant: consistency trajectories (CTM, arXiv:2310.02279), with coefficients that are read off the teacher
(Analytic-Precond, arXiv:2502.02922). Read as a diff, distill_cd.py against this.

distill_cd.py's student goes to sigma = 0 and is noised anew. Here it jumps from level n to a lower level r, which it is
told, and samples by jumps alone. A jump is made of x and of the x0 = x - sigma v that the network predicts:

    f(x, n -> r) = a x + b x0          at r = n: a = 1, b = 0          --precond plain: a = sigma_r / sigma_n, b = 1 - a

In lambda = -log sigma the ODE is dx/dlambda = x0 - x; the plain jump is exact where x0 stands still. Let instead
x0 = l x + g. With L = exp(integral of l - 1), S = exp(integral of s), I = integral of S / L from n to r, the ODE is
d(x / L) = (g / S) dI. A backward Euler step of that, with the x0 of n, is

    c = L_r I / S_r         a = (L_r / L_n) / (1 + l_r c)         b = c / (1 + l_r c)         l = s = 0: the plain ones

The l and s for which g moves least are the guided teacher's alone. l = E tr(dx0/dx) / d is (1 - sigma) E|v - (noise -
x0)|^2, so it needs no Jacobian. s = E<g, dg/dlambda> / E|g|^2 is the slope of log E|g|^2 / 2 along the ODE, so S is the
root mean square of g, and noised data, which the ODE goes through, will do for both. The paper's claim: CTM trains two
to three times as fast where two steps or more are sampled. (To sigma = 0, both jumps are x0.) What changes:
  1. JumpDiT: a second time embedding, of the level where a jump ends. It starts at zero, the student as the teacher
  2. tables of l and S on the grid, made before training; they are kept beside the run, tables.json, and in --out
  3. from both ends of an interval a jump to one of the student's levels below it, sigma = 0 or any other
  4. --score, stream.py's: by itself that knows neither the second embedding nor this sampler

$ PYTHONPATH=. python examples/variants/distill_cd_precond.py --precond analytic --out ckpt/ctm-analytic.pt
$ PYTHONPATH=. python examples/variants/distill_cd_precond.py --precond plain --out ckpt/ctm-plain.pt
$ PYTHONPATH=. python examples/variants/distill_cd_precond.py --score --ckpt ckpt/ctm-plain.pt --sampling-steps 2
"""
import argparse
import gc
import json
import sys
import time
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from tqdm import tqdm

import distill_cd
import stream
from data import (
    Batch, HelpFormatter, Latents, check_data, get_batch, open_latents, open_log, positive, set_recipe, write_log,
    write_samples,
)
from model import (
    PRESETS, SAMPLERS, Camera, DiTConfig, KVCache, Meta, Prompt, WanDiT, add_noise, batch_part, bill, build,
    check_finite, describe_run, guide, load_checkpoint, load_state, lock_folder, masked_mse, noise_levels, origin,
    print_peak, read_file, read_json, save_average, save_state, shard, sinusoid, start_process_group, stopping,
    update_ema, velocity_to_x0,
)


class JumpDiT(WanDiT):  # part 1
    """Wan's transformer, v(x_t, sigma, r): r [b f], the sigma at which a jump ends; by default 0."""

    def __init__(self, cfg: DiTConfig, camera: bool = True):
        super().__init__(cfg, camera)
        self.end_embedding = nn.Linear(cfg.freq_dim, cfg.dim)

    def forward(self, x_t: Tensor, sigma: Tensor, *seen, r: Tensor | None = None, **past) -> Tensor | KVCache:
        self.r = torch.zeros_like(sigma) if r is None else r
        return super().forward(x_t, sigma, *seen, **past)

    def embed_time(self, sigma: Tensor) -> tuple[Tensor, Tensor]:
        r = F.pad(self.r, (sigma.shape[1] - self.r.shape[1], 0))  # clean frames before the noisy ones are at 0
        waves = [sinusoid(1000 * z.double(), self.cfg.freq_dim).to(self.head.modulation.dtype) for z in (sigma, r)]
        e = self.time_embedding(waves[0]) + self.end_embedding(waves[1])
        return e, rearrange(self.time_projection(e), "b f (six d) -> b f six d", six=6)


class Grid(NamedTuple):
    """The levels, 0 (noise) .. N (sigma = 0), and what jumps between them are made of."""
    sigmas: Tensor  # [N+1], from 1 to 0
    a: Tensor  # [2 N+1 N+1], in the first chunk and in later ones, from level n to level r
    b: Tensor


def coefficients(sigmas: list[float], l: Tensor, S: Tensor) -> tuple[Tensor, Tensor]:
    """a, b [2 N+1 N+1] for n <= r. l, S [2 N]: at the levels above sigma = 0; between two, l is their mean."""
    step = -torch.tensor(sigmas[:-1], dtype=torch.float64).log().diff()  # of lambda
    L = F.pad(((l[:, 1:] + l[:, :-1]) / 2 - 1) * step, (1, 0)).cumsum(1).exp()
    slope = (S / L).log().diff()
    mean = torch.where(slope == 0, 1.0, slope.expm1() / slope) * (S / L)[:, :-1]  # of S / L, from level to level
    integral = F.pad(mean * step, (1, 0)).cumsum(1)
    c = (integral[:, None] - integral[:, :, None]) * (L / S)[:, None]  # [2 n r]
    a, b = L[:, None] / L[:, :, None] / (1 + l[:, None] * c), c / (1 + l[:, None] * c)
    a, b = F.pad(a, (0, 1, 0, 1)), F.pad(b, (0, 1, 0, 1), value=1.0)  # to sigma = 0, where S is 0 and l is 1, f is x0
    a[:, -1, -1], b[:, -1, -1] = 1, 0
    return a.float(), b.float()


@torch.no_grad()
def moments(teacher: nn.Module, batch: Batch, sigmas: list[float], meta: Meta) -> Tensor:
    """Means of |v - (noise - x0)|^2, and of the predicted x0 and x_t: x0^2, x0 x_t, x_t^2 [4 2 N]. meta: the teacher's.

    Per number, in the first chunk and in later ones, at the levels above sigma = 0, with the same noise at all.
    """
    noise, chunk, rows = batch.noise(), meta["chunk"], []
    for level in sigmas[:-1]:
        sigma = torch.full_like(batch.generated, level)
        x_t = add_noise(batch.x0, noise, sigma)
        vs = [teacher(x_t, sigma, prompt, batch.camera, clean=batch.x0, chunk=chunk)
              for prompt in (batch.prompt, batch.null)]
        error = guide(*((v - (noise - batch.x0)).square() for v in vs), meta["guidance"])  # as l is linear in x0
        x0 = velocity_to_x0(guide(*vs, meta["guidance"]), x_t, sigma)
        rows.append(torch.stack([z.mean((0, 2, 3, 4)) for z in (error, x0 * x0, x0 * x_t, x_t * x_t)]))
    found = torch.stack(rows, dim=-1).double()  # [4 f N]
    return torch.stack([found[:, :chunk].mean(1), found[:, chunk:].mean(1)], dim=1)


def estimate(found: Tensor, sigmas: list[float]) -> tuple[Tensor, Tensor]:
    """l, S [2 N] of moments."""
    error, x0_x0, x0_x, x_x = found
    l = (1 - found.new_tensor(sigmas[:-1])) * error
    return l, (x0_x0 - 2 * l * x0_x + l * l * x_x).sqrt()


def find_tables(args: argparse.Namespace, folder: Path, teacher: nn.Module, data: Latents, sigmas: list[float],
                meta: Meta, device: torch.device) -> dict:  # part 2
    """l and S, and what they are for: of the run that is resumed, else made here and written into its folder."""
    path, known = folder / "tables.json", {"precond": args.precond, "sigmas": sigmas}
    if args.resume:
        tables = read_json(path)
        if tables | known != tables:
            raise ValueError(f"--resume: {path} was made for another --precond or grid; that is another run")
        return tables
    l, S = torch.zeros(2, len(sigmas) - 1), torch.ones(2, len(sigmas) - 1)
    if args.precond == "analytic":
        batches = (get_batch(data, args.seed, i, batch_part(0, 1), args.batch_size, device)
                   for i in range(args.table_batches))
        found = sum(moments(teacher, batch, sigmas, meta) for batch in batches)
        dist.all_reduce(found)
        l, S = estimate(found / (args.table_batches * dist.get_world_size()), sigmas)
    tables = known | {"l": l.tolist(), "S": S.tolist()}
    if dist.get_rank() == 0:
        path.write_text(json.dumps(tables))
    return tables


def make_known(preset: str, tables: dict, steps: int, device: torch.device) -> Grid:
    """Let what loads and samples checkpoints know the network and its sampler. steps: that the student is trained for.
    """
    a, b = coefficients(tables["sigmas"], *(torch.tensor(tables[name], dtype=torch.float64) for name in "lS"))
    grid = Grid(*(z.to(device) for z in (torch.tensor(tables["sigmas"]), a, b)))
    PRESETS[preset] = PRESETS[preset.removesuffix("-jumps")]._replace(net=JumpDiT)
    SAMPLERS["jumps"] = partial(jumps, grid=grid, trained=steps)
    return grid


def jump(net: nn.Module, x: Tensor, n: Tensor, r: Tensor, grid: Grid, later: Tensor | int, *seen, **past) -> Tensor:
    """f(x, n -> r) [b f c h w], from levels n [b f] to levels r [b f]. later: 1 behind the first chunk, else 0."""
    sigma = grid.sigmas[n]
    x0 = velocity_to_x0(net(x, sigma, *seen, r=grid.sigmas[r], **past), x, sigma)
    a, b = (z[later, n, r][..., None, None, None] for z in (grid.a, grid.b))
    return a * x + b * x0


@torch.no_grad()
def jumps(net: nn.Module, noise: list[Tensor], sigmas: list[float], prompts: list[Prompt], camera: Camera | None,
          guidance: float, kv_caches: list[KVCache], generated: Tensor, grid: Grid, trained: int) -> Tensor:
    """A sampler as model.py's `euler`, by jumps from one of `sigmas` to the next."""
    x_t, steps, end = noise[0], len(sigmas) - 1, len(grid.sigmas) - 1
    if trained % steps:
        raise ValueError(f"--sampling-steps {steps}: expected a divisor of {trained}, the levels that it was trained "
                         "to jump to")
    if len(prompts) > 1:
        raise ValueError(f"--guidance {guidance}: a student of jumps has none")
    for i in range(steps):
        # given frames stay at sigma = 0
        n, r = (torch.where(generated > 0, k * end // steps, end) for k in (i, i + 1))
        later = int(kv_caches[0].frames > 0)
        x_t = jump(net, x_t, n, r, grid, later, prompts[0], camera, kv_cache=kv_caches[0])
    return x_t


def trajectory_loss(student: nn.Module, ema: nn.Module, teacher: nn.Module, batch: Batch, grid: Grid, steps: int,
                    meta: Meta) -> Tensor:
    """|| student's jump from the upper end of an interval - EMA's from the lower end ||^2, one interval per chunk.

    Both end at one of the student's levels, of which there are `steps` below pure noise. meta: the teacher's.
    """
    seen, forced = (batch.prompt, batch.camera), dict(clean=batch.x0, chunk=meta["chunk"])
    end = len(grid.sigmas) - 1
    n = (batch.rand_per_chunk(meta["chunk"]) * end).long()  # [b f]
    noise = batch.noise()
    below = steps - n * steps // end  # how many of the student's levels there are below n
    r = end - (batch.rand_per_chunk(meta["chunk"]) * below).long() * end // steps  # part 3
    n, m, r = (torch.where(batch.generated > 0, z, end) for z in (n, n + 1, r))
    sigma_n, sigma_m = grid.sigmas[n], grid.sigmas[m]
    later = (torch.arange(n.shape[1], device=n.device) >= meta["chunk"]).long()

    x_n = add_noise(batch.x0, noise, sigma_n)
    with torch.no_grad():
        v_cond = teacher(x_n, sigma_n, batch.prompt, batch.camera, **forced)
        v_null = teacher(x_n, sigma_n, batch.null, batch.camera, **forced)
        v = guide(v_cond, v_null, meta["guidance"])
        x_m = x_n + (sigma_m - sigma_n)[..., None, None, None] * v
        target = jump(ema, x_m, m, r, grid, later, *seen, **forced)  # x_m itself where r is m
    return masked_mse(jump(student, x_n, n, r, grid, later, *seen, **forced), target, batch.generated)


RECIPES = {name: distill_cd.RECIPES[name] for name in ("tiny", "wan-1.3b", "wan-14b")}  # JumpDiT is Wan's
WORK = distill_cd.WORK  # for --plan and --bench: the passes of a step are the same


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    p.add_argument("--init", type=Path, default=Path("ckpt/ar.pt"), help="teacher, and the weights to start from")
    p.add_argument("--data", type=Path, default=Path("data/toy"), help="latents folder (python data.py)")
    p.add_argument("--out", type=Path, default=Path("ckpt/ctm.pt"), help="checkpoint to write")
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
    p.add_argument("--precond", default="analytic", choices=("plain", "analytic"), help="of what jumps are made")
    p.add_argument("--table-batches", type=positive, default=2, help="batches that l and S are estimated on")
    p.add_argument("--score", nargs=argparse.REMAINDER, metavar="FLAG", help="only stream.py's --score, of --out or "
                   "--ckpt; what follows are its flags")
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


def score(args: argparse.Namespace) -> None:  # part 4
    """stream.py's."""
    args = stream.parse_args(["--score", "--ckpt", str(args.out), *args.score])
    if not args.ckpt.exists():
        raise ValueError(f"{args.ckpt}: no such file")
    _, meta = read_file(args.ckpt)
    if "tables" not in meta:
        raise ValueError(f"{args.ckpt}: expected a checkpoint of this script; stream.py scores others")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    make_known(meta["preset"], meta["tables"], meta["sampling_steps"], device)
    shipped = stream.SHIPPED.with_name(meta["preset"].removesuffix("-jumps")) / "vae.pt"
    if shipped.exists() and not stream.beside(args.ckpt, "vae.pt"):
        args.vae = args.vae or shipped
    stream.main(args)


def main(args: argparse.Namespace) -> None:
    if args.score is not None:
        return score(args)
    # -- setup (same in every stage) ---------------------------------------------------------------------------------
    rank, _, device = start_process_group(args.sp, args.shard_over)
    data = open_latents(args.data, args.preset)
    folder = lock_folder(args.out)  # beside the checkpoint: earlier ones, states to resume from, metrics, sheets
    # -- end ---------------------------------------------------------------------------------------------------------

    weights, source = load_checkpoint(args.init, "ar", preset=args.preset)
    source = check_data(data, source, args.init)
    sigmas, preset = noise_levels(args.teacher_steps, source["shift"]), f"{args.preset}-jumps"
    with torch.device("meta"):
        teacher = build(args.preset)
    teacher = shard(teacher, weights, device, compiled=args.compile)
    tables = find_tables(args, folder, teacher, data, sigmas, source, device)
    grid = make_known(preset, tables, args.sampling_steps, device)
    with torch.device("meta"):
        net, ema = (build(preset) for _ in range(2))
    dit = PRESETS[preset].dit
    weights |= {"end_embedding.weight": torch.zeros(dit.dim, dit.freq_dim), "end_embedding.bias": torch.zeros(dit.dim)}
    net = shard(net, weights, device, train=True, compiled=args.compile)
    ema = shard(ema, weights, device, compiled=args.compile)
    optimizer = torch.optim.AdamW(net.parameters(), lr=args.lr, betas=args.betas, weight_decay=0.01, fused=True)
    nets, optimizers = {"net": net, "ema": ema}, {"net": optimizer}
    meta: Meta = source | {"stage": "cd", "preset": preset, "sampler": "jumps", "sampling_steps": args.sampling_steps,
                           "guidance": 1.0, "from": origin(args.init, source), "tables": tables}
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
            batch = get_batch(data, args.seed, step, part, args.batch_size, device, meta["given_prob"])
            loss = trajectory_loss(net, ema, teacher, batch, grid, args.sampling_steps, source) / args.accum
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
