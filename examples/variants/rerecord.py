"""
A new prompt in the middle of a walk: what of the past has to be read again? (LongLive's re-cache, arXiv:2509.22622)

A chunk sees the prompt, and keys and values of the chunks before it, which were read with the prompt of then. Half-way
through a walk of twice the trained length two walls of the room are named in another colour. Ways:
  the old prompt    nothing changes: the floor of `changed`, the ceiling of `kept`
  new words alone   what is cached stays, and the next chunks read the new prompt
  read again        the window is committed once more, as if it had been made for the new prompt (model.py's reread)
  start again       an empty cache: a new video, whose first frame is where the walk stands
The ceiling is the same walk with the new prompt from the start.

Of the chunks after the change: `changed`, how often the two new colours are those of eight that explain the video best;
`kept`, the same of the five other surfaces; PSNR, to the room as it was seen before, its pictures with it, in the new
colours; jump, how much the first frame after the change differs from the last before it, over the usual step.

$ PYTHONPATH=. python examples/variants/rerecord.py
$ PYTHONPATH=. python examples/variants/rerecord.py --ckpt ckpt/tiny/ar.pt --window 8 --sink 2
"""
import argparse
import sys
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from data import (
    PALETTE, SURFACES, HelpFormatter, Scene, explain, intrinsics, load_encoder, mix, positive, psnr, read_prompt,
    render, sample_toy,
)
from model import Camera, StreamState, commit, invert_se3, load_net, load_vae, next_chunk, reread, start_stream
from stream import Player, encode_prompts, long_path, named_colours

WAYS = ("the old prompt", "new words alone", "read again", "start again")
CEILING = "*new from the start*"
CHANGED = (SURFACES.index("far wall"), SURFACES.index("floor"))
KEPT = tuple(n for n in range(7) if n not in CHANGED)


def repaint(prompt: str) -> str:
    """The prompt with far wall and floor three colours further."""
    parts, names = prompt.split(", "), list(PALETTE)
    for n in CHANGED:
        colour, surface = parts[n].split(" ", 1)
        parts[n] = f"{names[(names.index(colour) + 3) % len(names)]} {surface}"
    return ", ".join(parts)


def change_prompt(player: Player, state: StreamState, way: str, new: list, empty: StreamState) -> StreamState:
    """The state that the next chunk is to come from. new: the prompts; empty: a stream of them without frames."""
    if way == "new words alone":
        kv_caches = [old._replace(text=z.text) for old, z in zip(state.kv_caches, empty.kv_caches, strict=True)]
        return state._replace(kv_caches=kv_caches)
    if way == "read again":
        return reread(player.net, player.meta, state, new)
    return empty if way == "start again" else state


@torch.no_grad()
def walk(player: Player, way: str, old: list[str], new: list[str], viewmats: Tensor, seeds: list[int]) -> Tensor:
    """Two videos on end [b 3 t h w], the prompts changed half-way along viewmats [b f 4 4]."""
    net, vae, _, meta = player
    device, half = next(net.parameters()).device, viewmats.shape[1] // 2
    shape = (vae.cfg.z_dim, *(pixels // vae.cfg.stride for pixels in meta["size"]))
    Ks = intrinsics(meta["K"]).expand(*viewmats.shape[:2], 3, 3)
    guided = meta["guidance"] != 1
    texts = [[*encode_prompts(player, z, None, None, shape)][: 1 + guided] for z in (old, new)]
    rng = [torch.Generator().manual_seed(seed) for seed in seeds]
    state, empty = (start_stream(net, meta, rng, shape, text, device) for text in texts)
    poses, made = viewmats, []
    for start in range(0, viewmats.shape[1], meta["chunk"]):
        if start == half:
            state = change_prompt(player, state, way, texts[1], empty)
            if way == "start again":
                poses = viewmats @ invert_se3(viewmats[:, half : half + 1])
        prompts = texts[start >= half and way != "the old prompt"]
        frames = slice(start, start + meta["chunk"])
        camera = Camera(poses[:, frames].to(device), Ks[:, frames].to(device))
        made.append(next_chunk(net, meta, state, prompts, camera))
        state = commit(net, meta, state, made[-1], prompts, camera)
    return vae.decode(torch.cat(made, dim=1))[0].clamp(-1, 1).cpu()


def measure(video: Tensor, scene: Scene, new_colours: Tensor, viewmats: Tensor, K: Tensor) -> Tensor:
    """changed, kept, PSNR, jump [4 b] of the second half of a walk."""
    half = viewmats.shape[1] // 2
    first = 1 + 4 * (half - 1)  # pixel frames before the change
    _, inks, _ = explain(video[:, :, :first], scene, viewmats[:, :half], K)
    room = scene._replace(colours=new_colours, inks=inks)
    shown = video[:, :, 4 * half :: 4]  # a frame of each latent, which its pose belongs to
    right = named_colours(shown.repeat_interleave(4, dim=2), room, viewmats[:, half:], K)
    truth = render(room, viewmats, K, video.shape[-1])
    step = video.diff(dim=2).abs().mean((1, 3, 4))  # [b t-1]
    jump = step[:, first - 1] / step[:, : first - 1].median(1).values
    dB = psnr(video[:, :, first:], truth[:, :, first:])
    return torch.stack([right[:, CHANGED].nanmean(1), right[:, KEPT].nanmean(1), dB, jump])


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    p.add_argument("--ckpt", type=Path, default=Path("ckpt/tiny/dmd.pt"), help="ar, ode, cd or dmd")
    p.add_argument("--vae", type=Path, help="default what lies beside the checkpoint")
    p.add_argument("--window", type=int, default=0, help="as stream.py's; 0: the whole past")
    p.add_argument("--sink", type=int, default=0, help="as stream.py's")
    p.add_argument("--scenes", type=positive, default=64, help="rooms to walk through")
    p.add_argument("--seed", type=int, default=0, help="of the noise")
    p.add_argument("--score-seed", type=int, default=1, help="which rooms and paths")
    return p.parse_args(argv)


def main(args: argparse.Namespace) -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    net, meta = load_net(args.ckpt, device, "ar", "ode", "cd", "dmd")
    meta |= {"window": args.window, "sink": args.sink}
    vae = load_vae(args.vae or args.ckpt.with_name("vae.pt"), device, meta["vae_fingerprint"])
    player, frames = Player(net, vae, load_encoder(meta["preset"], None, device), meta), meta["frames"]
    if frames % meta["chunk"]:
        raise ValueError(f"{args.ckpt}: {frames} frames are no whole chunks of {meta['chunk']}")
    prompts, _, scene = sample_toy(args.scenes, mix(args.score_seed, 4), frames - 1, held=True)
    rng, K = torch.Generator().manual_seed(mix(args.score_seed, 6)), intrinsics(meta["K"])
    viewmats = torch.stack([long_path(rng, frames, 2) for _ in prompts])
    new = [repaint(prompt) for prompt in prompts]
    colours = torch.stack([read_prompt(prompt)[0] for prompt in new])
    found: dict[str, list[Tensor]] = {way: [] for way in (*WAYS, CEILING)}
    for rows in tqdm(torch.arange(args.scenes).split(8), "rooms"):
        rooms, seeds = Scene(*(z[rows] for z in scene)), [mix(args.seed, 5, n) for n in rows.tolist()]
        before, after = ([z[n] for n in rows.tolist()] for z in (prompts, new))
        for way in WAYS:
            video = walk(player, way, before, after, viewmats[rows], seeds)
            found[way].append(measure(video, rooms, colours[rows], viewmats[rows], K))
        video = walk(player, CEILING, after, after, viewmats[rows], seeds)
        found[CEILING].append(measure(video, rooms._replace(colours=colours[rows]), colours[rows], viewmats[rows], K))
    print("| after a new prompt | changed | kept | PSNR, dB | jump |")
    print("|---|---|---|---|---|")
    for way, parts in found.items():
        z = torch.cat(parts, dim=1)
        cells = [(m[~m.isnan()].mean(), m[~m.isnan()].std() / m.isfinite().sum() ** 0.5) for m in z]
        print(f"| {way} | " + " | ".join(f"{mean:.2f} ± {error:.2f}" for mean, error in cells) + " |")


if __name__ == "__main__":
    try:
        main(parse_args())
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
