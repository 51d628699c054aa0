"""
Stage 1, a variant: look at the past once a chunk, and denoise without it (separable causal diffusion, SCD,
arXiv:2602.10095). Read as a diff, train_ar.py against this.

in:  ckpt/ar.pt, autoregressive
out: ckpt/scd.pt, autoregressive, but of another shape: an encoder and a decoder, which only this script can load

A plain network sends every denoising step of a chunk through all of its blocks, and each of them attends to the whole
past. The paper: early blocks say almost the same at every noise level, and it is they who look back; so reasoning about
the past can be had once a chunk. What changes:
  1. the network: a causal encoder, copies of the first --encoder blocks, sees the clean past and the chunk near pure
     noise; a light decoder, copies of the blocks --decoder, sees what the encoder says of the chunk, and the chunk
  2. the loss: of one pass of the encoder two of the decoder, each with noise and levels of its own
  3. the sampler: of a chunk one pass of the encoder, one of the decoder a step, and the commit, the encoder's

Two decoders: tokens denoises the encoder's tokens and the chunk's side by side, as the paper has it. In prefix the
former see only each other, so that their keys and values are computed once a chunk, like a cache. --shallow N is the
control, trained by train_ar.py's loss: a plain network of the first N - 1 blocks and the last one.

Chunk, guidance and sampling steps are those of --init, so train_ar.py's flags for them are dropped.

What a chunk costs is printed beside a plain network: by --cost, which reads no files, and by --score.

$ PYTHONPATH=. python examples/variants/scd.py --cost
$ PYTHONPATH=. python examples/variants/scd.py
$ PYTHONPATH=. python examples/variants/scd.py --shallow 2 --out ckpt/shallow.pt
$ PYTHONPATH=. python examples/variants/scd.py --score --ckpt ckpt/scd.pt --sampling-steps 4
"""
import argparse
import gc
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

import model
import stream
from data import (
    Batch, HelpFormatter, check_data, fraction, get_batch, open_latents, open_log, positive, random_batch, set_recipe,
    write_log, write_samples,
)
from model import (
    PRESETS, SAMPLERS, Camera, DiTConfig, KVCache, Meta, Nets, Segments, StreamState, WanDiT, Work, add_noise,
    append_layers, batch_part, build, check_finite, check_shapes, clock, commit, describe_run, euler, fill_with_noise,
    four_copies, load_checkpoint, load_state, lock_folder, masked_mse, my_part, next_chunk, origin, print_peak,
    projections, read_file, rope_table, save_average, save_state, shard, shift_sigma, start_process_group, start_stream,
    stopping, teacher_forcing_segments, update_ema, usual_meta, where_prompt, whole,
)
from train_ar import teacher_forcing_loss

KINDS = ("prefix", "tokens")
Place = tuple[Tensor, tuple[Tensor, Tensor] | None]  # where tokens are: RoPE's table, with a camera PRoPE's P and P^-1


class Context(NamedTuple):
    """What the encoder says of some chunks, which the decoder reads at every step."""
    tokens: Tensor  # [b f s d]
    place: Place
    segments: Segments | None  # with teacher forcing, of many chunks: which of [tokens | noisy] the decoder sees
    # of a stream, per block, as in KVCache
    text: list[tuple[Tensor, Tensor]] | None  # keys and values of the prompt
    layers: list[list[tuple[Tensor, ...]]]  # with prefix, the decoder's of the tokens


def decoder_segments(f: int, chunk: int, kind: str) -> Segments:
    """Encoder's chunks 0 .. n-1, noisy chunks 0 .. n-1. A chunk's two see both of them; in prefix the first itself."""
    lengths = [min(chunk, f - start) for start in range(0, f, chunk)]
    n = len(lengths)
    pairs = [[i, n + i] for i in range(n)]
    return Segments(2 * lengths, ([[i] for i in range(n)] if kind == "prefix" else pairs) + pairs)


def twice(place: Place, f: int, before: int) -> Place:
    """Where the first `before` of f frames are, and behind them all."""
    rope, projection = place
    rope = torch.cat([rope[: before * len(rope) // f], rope])
    return rope, projection and tuple(torch.cat([P[:, :before], P], dim=1) for P in projection)


class SCD(WanDiT):
    """A WanDiT whose last blocks do not follow on the others: they start anew, from the chunk and what those say of it.

        context = net(x_t, sigma, prompt, camera, clean=x0, chunk=2)        the encoder, each chunk after the clean past
        context = net(noise, one, prompt, camera, kv_cache=kv_cache)        ... and in a stream
        v = net(x_t, sigma, prompt, context=context)                        the decoder, at any noise level
        kv_cache = net(x0, zero, prompt, camera, kv_cache=kv_cache, update_cache=True)          of the encoder alone

    Embeddings and head are shared.
    """

    def __init__(self, cfg: DiTConfig, camera: bool = True, decoder: int = 1, kind: str = "prefix"):
        super().__init__(cfg, camera)
        self.split, self.kind = max(0, cfg.layers - decoder), kind

    def forward(self, x_t: Tensor, sigma: Tensor, prompt: Tensor, camera: Camera | None = None, *,
                clean: Tensor | None = None, chunk: int = 0, kv_cache: KVCache | None = None,
                update_cache: bool = False, context: Context | None = None) -> Context | Tensor | KVCache:
        """As WanDiT, but for what comes out; the camera is the encoder's to read."""
        check_shapes(x_t, sigma, camera)
        if context is None:
            return self.encode(x_t, sigma, prompt, camera, clean, chunk, kv_cache, update_cache)
        return self.decode(x_t, sigma, prompt, context)

    def encode(self, x_t: Tensor, sigma: Tensor, prompt: Tensor, camera: Camera | None, clean: Tensor | None,
               chunk: int, kv_cache: KVCache | None, update_cache: bool) -> Context | KVCache:
        f, past = x_t.shape[1], KVCache(0, []) if kv_cache is None else kv_cache
        here = place = self.place(x_t, camera, past)
        segments = pairs = None
        if clean is not None:  # as in WanDiT
            before = (f - 1) // chunk * chunk
            x_t = torch.cat([clean[:, :before], x_t], dim=1)
            sigma = torch.cat([torch.zeros_like(sigma[:, :before]), sigma], dim=1)
            place, segments = twice(here, f, before), teacher_forcing_segments(f, chunk)
            pairs = decoder_segments(f, chunk, self.kind)
        x, modulation = self.embed(x_t), self.embed_time(sigma)[1]
        text, text_kvs = None, past.text and past.text[0]
        if text_kvs is None:
            text, text_kvs = self.text_embedding(prompt.to(x.dtype)), [None] * len(self.blocks)

        if update_cache:
            # the first pass of a stream has no frames: in it the decoder reads the prompt, too
            end = self.split if past.text else len(self.blocks)
            _, kvs, new = self.through(range(end), x, modulation, text, text_kvs, place, None, past.layers, True)
            return past._replace(frames=past.frames + f, layers=append_layers(past.layers, kvs[: self.split]),
                                 text=past.text or (new, None))
        x, *_ = self.through(range(self.split), x, modulation, text, text_kvs, place, segments, past.layers)
        tokens = x[:, -f:].clone()  # FSDP's hooks want no view
        context = Context(tokens, here, pairs, text_kvs if past.text else None, [])
        if self.kind == "prefix" and clean is None:
            modulation, decoder = self.embed_time(torch.ones_like(sigma))[1], range(self.split, len(self.blocks))
            _, kvs, _ = self.through(decoder, tokens, modulation, text, text_kvs, here, None, [], True)
            context = context._replace(layers=[[]] * self.split + [[kv] for kv in kvs])
        return context

    def decode(self, x_t: Tensor, sigma: Tensor, prompt: Tensor, context: Context) -> Tensor:
        f, h = x_t.shape[1], x_t.shape[3]
        x, place = self.embed(x_t), context.place
        if not context.layers:  # [tokens | noisy] along the frames, at the same places and times
            x, place = torch.cat([context.tokens, x], dim=1), twice(place, f, f)
            # where keys are computed once a chunk, no level is known to them
            sigma = torch.cat([torch.ones_like(sigma) if self.kind == "prefix" else sigma, sigma], dim=1)
        e, modulation = self.embed_time(sigma)
        text, text_kvs, decoder = None, context.text, range(self.split, len(self.blocks))
        if text_kvs is None:
            text, text_kvs = self.text_embedding(prompt.to(x.dtype)), [None] * len(self.blocks)
        x, *_ = self.through(decoder, x, modulation, text, text_kvs, place, context.segments, context.layers)
        v = whole(self.head(x[:, -f:], e[:, -f:]), "n b f s c -> b f (n s) c")
        return rearrange(v, "b f (h w) (p q c) -> b f c (h p) (w q)", h=h // 2, p=2, q=2).float()

    def place(self, x_t: Tensor, camera: Camera | None, past: KVCache) -> Place:
        """Where frames are that follow on a past."""
        f, _, h, w = x_t.shape[1:]
        frames = past.position + torch.arange(f, device=x_t.device)
        rope = rope_table(frames, h // 2, w // 2, self.cfg.rope_bands, self.rope_theta)
        if camera is None:
            return rope, None
        camera = camera if past.origin is None else camera.seen_from(past.origin)
        return rope, tuple(four_copies(P, self.cfg.dim) for P in projections(camera))

    def embed(self, x_t: Tensor) -> Tensor:
        """x_t [b f c h w] -> tokens [b f s d]."""
        weight = self.patch_embedding.weight.flatten(1)
        x = rearrange(x_t, "b f c (h p) (w q) -> b f (h w) (c p q)", p=2, q=2).to(weight.dtype)
        return F.linear(my_part(x, dim=2), weight, self.patch_embedding.bias)

    def through(self, blocks: range, x: Tensor, modulation: Tensor, text: Tensor | None, text_kvs: list, place: Place,
                segments: Segments | None, layers: list, update_cache: bool = False) -> tuple[Tensor, list, list]:
        """x [b f s d] through some blocks -> x, and per block what is to be cached of the frames and of the prompt."""
        kvs, new_text_kvs = [], []
        for i in blocks:
            cached = layers[i] if layers else []
            x, kv, text_kv = self.blocks[i](x, modulation, text, text_kvs[i], *place, segments, cached, update_cache)
            kvs.append(kv)
            new_text_kvs.append(text_kv)
        return x, kvs, new_text_kvs


def scd_loss(net: nn.Module, batch: Batch, meta: Meta, null_prob: float) -> Tensor:
    """|| v - (noise - x0) ||^2 at one noise level per chunk, each chunk after what the encoder says of it."""
    chunk = meta["chunk"]
    dropped = batch.chance(null_prob)  # [b]: guidance needs a network that knows videos without a prompt
    prompt = where_prompt(dropped, batch.null, batch.prompt)
    # the encoder knows the chunk from the noisiest fifth of levels; with noise of its own, for of two levels of the
    # same noise the decoder could solve for x0
    sigma = (1 - 0.2 * batch.rand_per_chunk(chunk)) * batch.generated  # [b f]
    x_t = add_noise(batch.x0, batch.noise(), sigma)
    context = net(x_t, sigma, prompt, batch.camera, clean=batch.x0, chunk=chunk)
    (f, _, h, w), d = batch.x0.shape[1:], context.tokens.shape[-1]
    noise = torch.stack([torch.randn((f, h * w // 4, d), generator=g) for g in batch.rng])  # of all ranks' tokens
    tokens = context.tokens.float()
    spread = 0.05 * tokens.std(-1, correction=0, keepdim=True)  # the paper's 0.05, of features that are normed first
    context = context._replace(tokens=(tokens + spread * my_part(noise, dim=2).to(tokens)).to(context.tokens))

    losses = []
    for _ in range(2):  # the decoder is cheap
        sigma = shift_sigma(batch.rand_per_chunk(chunk), meta["shift"]) * batch.generated  # [b f], one per chunk
        noise = batch.noise()  # [b f c h w]
        v = net(add_noise(batch.x0, noise, sigma), sigma, prompt, context=context)
        losses.append(masked_mse(v, noise - batch.x0, batch.generated))
    return torch.stack(losses).mean()


@torch.no_grad()
def scd(net: nn.Module, noise: list[Tensor], sigmas: list[float], prompts: list[Tensor], camera: Camera | None,
        guidance: float, kv_caches: list[KVCache | None], generated: Tensor) -> Tensor:
    """A sampler (part 3): model.py's euler of the decoder, after one pass of the encoder for each prompt."""
    # in training the encoder's noise is none of the decoder's; mirrored, that which is here is another at every place
    x_t = torch.where(generated[..., None, None, None] > 0, noise[0].flip(-1), noise[0])
    contexts = [net(x_t, sigmas[0] * generated, prompt, camera, kv_cache=kv_cache)
                for prompt, kv_cache in zip(prompts, kv_caches, strict=True)]

    def decoder(x_t: Tensor, sigma: Tensor, prompt: Tensor, camera: Camera | None, kv_cache: Context) -> Tensor:
        return net(x_t, sigma, prompt, context=kv_cache)

    return euler(decoder, noise, sigmas, prompts, camera, guidance, contexts, generated)


SAMPLERS["scd"] = scd  # a name that checkpoints use: whatever has not read this file refuses them


class Shape(NamedTuple):
    """Which of a preset's blocks a network is made of, in this order."""
    preset: str
    blocks: list[int]
    decoder: int  # so many of the last ones are the decoder; 0: a plain network of fewer blocks
    kind: str  # of decoder, of KINDS


def shape_of(args: argparse.Namespace) -> Shape:
    if args.shallow:
        return Shape(args.preset, [*range(args.shallow - 1), PRESETS[args.preset].dit.layers - 1], 0, "plain")
    return Shape(args.preset, [*range(args.encoder), *args.decoder], len(args.decoder), args.decoder_kind)


def register(shape: Shape) -> str:
    """Make a network of this shape a preset of its own, and say its name."""
    plain, cut = PRESETS[shape.preset], len(shape.blocks) - shape.decoder
    parts = [".".join(map(str, blocks)) for blocks in (shape.blocks[:cut], shape.blocks[cut:])]
    name = "-".join([shape.preset, *filter(None, parts), shape.kind])
    net = partial(SCD, decoder=shape.decoder, kind=shape.kind) if shape.decoder else plain.net
    PRESETS[name] = plain._replace(net=net, dit=replace(plain.dit, layers=len(shape.blocks)))
    return name


def choose_blocks(weights: dict[str, Tensor], blocks: list[int]) -> dict[str, Tensor]:
    """Weights of a plain network -> those of one whose i-th block is a copy of the plain one's blocks[i]."""
    chosen = {name: w for name, w in weights.items() if not name.startswith("blocks.")}
    for i, block in enumerate(blocks):
        mark = f"blocks.{block}."
        chosen |= {name.replace(mark, f"blocks.{i}."): w for name, w in weights.items() if name.startswith(mark)}
    return chosen


# minWM's Muon for HY: see train_camera.py.
RECIPES = {
    "tiny": dict(steps=2000, batch_size=8, accum=1, lr=1e-3, warmup=50, cooldown=0.5, betas=(0.9, 0.99),
                 max_grad_norm=1.0, ema_decay=0.995, null_prob=0.1, encoder=3, decoder=(3,)),
    # the paper's blocks and steps; all else is train_ar.py's
    "wan-1.3b": dict(steps=55000, batch_size=1, accum=4, lr=2e-6, warmup=0, cooldown=0.0, betas=(0.0, 0.999),
                     max_grad_norm=10.0, ema_decay=0.99, null_prob=0.0, encoder=25,
                     decoder=(*range(5), *range(25, 30))),
}
RECIPES["wan-14b"] = RECIPES["wan-1.3b"] | dict(encoder=35, decoder=(*range(5), *range(35, 40)))


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    p.add_argument("--init", type=Path, default=Path("ckpt/ar.pt"), help="weights to start from")
    p.add_argument("--data", type=Path, default=Path("data/toy"), help="latents folder (python data.py)")
    p.add_argument("--out", type=Path, default=Path("ckpt/scd.pt"), help="checkpoint to write")
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
    p.add_argument("--null-prob", type=fraction, help="share of videos whose prompt is dropped, for guidance's sake")
    p.add_argument("--encoder", type=positive, metavar="N", help="how many of --init's first blocks are the encoder's")
    p.add_argument("--decoder", type=int, nargs="+", metavar="BLOCK", help="which of --init's blocks are the decoder's")
    p.add_argument("--decoder-kind", default="prefix", choices=KINDS, help="how it reads what the encoder says")
    p.add_argument("--shallow", type=positive, metavar="N", help="the control: a plain network of N blocks instead")
    p.add_argument("--cost", action="store_true", help="only count and time a chunk beside a plain network's; no files")
    p.add_argument("--score", nargs=argparse.REMAINDER, metavar="FLAG", help="only score a checkpoint of this script: "
                   "all flags behind it are those of stream.py --score, --ckpt among them")
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
    layers = PRESETS[args.preset].dit.layers
    if args.encoder > layers or not set(args.decoder) <= {*range(layers)} or (args.shallow or 0) > layers:
        p.error(f"--encoder, --decoder, --shallow: {args.preset} has blocks 0 to {layers - 1}")
    return args


def main(args: argparse.Namespace) -> None:
    if args.cost:
        return print_cost(args.preset, register(shape_of(args)))
    if args.score is not None:
        return score(args.score)
    # -- setup (same in every stage) ---------------------------------------------------------------------------------
    rank, _, device = start_process_group(args.sp, args.shard_over)
    data = open_latents(args.data, args.preset)
    folder = lock_folder(args.out)  # beside the checkpoint: earlier ones, states to resume from, metrics, sheets
    # -- end ---------------------------------------------------------------------------------------------------------

    weights, source = load_checkpoint(args.init, "ar", preset=args.preset)
    source = check_data(data, source, args.init)
    shape = shape_of(args)
    args.preset = register(shape)  # part 1
    if shape.decoder:
        model.count_all_blocks = count_both_kinds  # for print_peak
    weights = choose_blocks(weights, shape.blocks)
    with torch.device("meta"):
        net, ema = (build(args.preset) for _ in range(2))
    net, ema = shard(net, weights, device, train=True, compiled=args.compile), shard(ema, weights, device)
    optimizer = torch.optim.AdamW(net.parameters(), lr=args.lr, betas=args.betas, weight_decay=0.01, fused=True)
    nets, optimizers = {"net": net, "ema": ema}, {"net": optimizer}
    meta: Meta = source | {"preset": args.preset, "shape": shape._asdict(),
                           "sampler": "scd" if shape.decoder else "euler", "from": origin(args.init, source)}
    run = describe_run(args, init=source)
    loss_of = scd_loss if shape.decoder else teacher_forcing_loss  # part 2

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
            loss = loss_of(net, batch, meta, args.null_prob) / args.accum
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


# What a chunk costs, and what it is worth.


def last_chunk(preset: str, steps: int, device: torch.device) -> Callable[[], Tensor]:
    """What makes the last chunk of a video, once the one before is committed. Weights are noise, without guidance."""
    with torch.device("meta"):
        net = build(preset)
    net = net.to_empty(device=device).to(torch.bfloat16 if device.type == "cuda" else torch.float32)
    fill_with_noise(net.eval().requires_grad_(False))
    sampler = "scd" if isinstance(net, SCD) else "euler"
    meta = usual_meta(preset, "ar") | {"sampler": sampler, "sampling_steps": steps, "guidance": 1.0}
    batch, chunk = random_batch(preset, meta, 1, device), meta["chunk"]
    state = start_stream(net, meta, batch.rng, batch.x0.shape[2:], [batch.prompt], device)

    def commit_chunk(state: StreamState, start: int) -> StreamState:
        frames = slice(start, start + chunk)
        return commit(net, meta, state, batch.x0[:, frames], [batch.prompt], batch.camera.frames(frames))

    *past, before, last = range(0, meta["frames"], chunk)
    for start in past:
        state = commit_chunk(state, start)
    camera = batch.camera.frames(slice(last, None))
    return lambda: next_chunk(net, meta, commit_chunk(state, before), [batch.prompt], camera)


def cost(preset: str, steps: int, device: torch.device) -> tuple[float, float]:
    """FLOPs and seconds of the last chunk of a video."""
    counted, timed = (last_chunk(preset, steps, where) for where in (torch.device("meta"), device))
    with FlopCounterMode(display=False) as counter:
        counted()
    seconds = []
    for _ in range(6):  # of which the first warms up
        start = clock(device)
        timed()
        seconds.append(clock(device) - start)
    return counter.get_total_flops(), min(seconds)


def print_cost(*presets: str) -> None:
    """A row for each network, the first as the measure of all."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    print("| network | sampling steps | GFLOP a chunk | ms a chunk | fewer FLOPs | faster |")
    print("|---|---|---|---|---|---|")
    for steps in (4, 48):
        found = {preset: cost(preset, steps, device) for preset in presets}
        most = found[presets[0]]
        for preset, (flop, seconds) in found.items():
            print(f"| {preset} | {steps} | {flop / 1e9:.4g} | {1000 * seconds:.1f} | {most[0] / flop:.2f} x | "
                  f"{most[1] / seconds:.2f} x |")


def score(flags: list[str]) -> None:
    """stream.py --score, which needs to know the checkpoint's shape."""
    args = stream.parse_args(["--score", *flags])
    if args.ckpt is None:
        raise ValueError("--score: --ckpt names a checkpoint that this script made")
    meta = load_shape(args.ckpt)
    print_cost(meta["shape"]["preset"], meta["preset"])
    shipped = stream.SHIPPED.with_name(meta["shape"]["preset"]) / "vae.pt"
    if shipped.exists() and not stream.beside(args.ckpt, "vae.pt"):
        args.vae = args.vae or shipped
    stream.main(args)


def load_shape(path: Path) -> Meta:
    """meta of a checkpoint of this script, of which model.py's load_net can make a network from here on."""
    if not path.exists():
        raise ValueError(f"{path}: no such file")
    _, meta = read_file(path)
    if "shape" not in meta:
        raise ValueError(f"{path}: expected a checkpoint that this script made, found one of stage {meta['stage']}")
    register(Shape(**meta["shape"]))
    return meta


# What --plan counts and --bench times, without any files (model.py, 12).


def rehearse(args: argparse.Namespace, nets: Nets, batch: Batch, meta: Meta) -> Iterator[str]:
    """A micro-batch of a step."""
    loss_of = scd_loss if isinstance(nets["net"], SCD) else teacher_forcing_loss
    loss_of(nets["net"], batch, meta, args.null_prob).backward()
    yield "net"


def bill(args: argparse.Namespace, work: Work) -> None:
    """model.py's, of a network of this shape."""
    shape = shape_of(args)
    args.preset = register(shape)
    if shape.decoder:
        model.count_all_blocks = count_both_kinds
    model.bill(args, work)


def count_both_kinds(args: argparse.Namespace, work: Work, size: list[int], recompute: bool,
                     flops: bool) -> model.Costs:
    """model.py's count_all_blocks: straight lines through what one and two blocks of the encoder take, and of the
    decoder."""
    def through(encoder: int, decoder: int) -> model.Costs:
        layers = encoder + decoder
        preset = register(shape_of(args)._replace(blocks=[*range(layers)], decoder=decoder))
        small = argparse.Namespace(**vars(args) | {"preset": preset})
        return model.count(small, work, size, layers, recompute, flops)

    one, two = (model.extrapolate(through(1, n), through(2, n), args.encoder - 1) for n in (1, 2))
    return model.extrapolate(one, two, len(args.decoder) - 1)


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
