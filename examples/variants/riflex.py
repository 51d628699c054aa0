"""
Longer than trained, without training: RIFLEx (arXiv:2502.15894) and its neighbours, measured against the truth.

RoPE turns each pair of channels of the temporal band at a speed of its own. A network has seen the frames of one video,
so many positions; asked for more, it meets new ones. RIFLEx says that the pair whose turn is over about where videos
begin to repeat themselves makes them repeat, and slows that one down, so that its turn lasts as long as the video. Here
every way is a change of those speeds, and all else is stream.py's:
  as they are    positions go on
  component k    RIFLEx: pair k (0 is the fastest) makes 0.9 of a turn in the longer video; where it already makes less,
                 there is nothing to slow down, and no such row
  interpolated   all pairs slowed by the length (arXiv:2306.15595)
  ntk            RoPE's base raised, so that the slowest pair is slowed by the length, the fastest not at all
  window         of causal networks: a window of as many frames as a video had, at positions of training (--window)

Walks are --times as long as trained, of held-out rooms. PSNR is to the one room that explains the walk best, of frames
within the trained length and of those behind it; rotation is how far off the last frame's pose is; `alike` is how much
closer frames a trained length apart are to each other than the truth's are: what repeats has more than 0 dB. The
ceiling is the truth through the VAE, the floor its first frame, held.

$ PYTHONPATH=. python examples/variants/riflex.py --ckpt ckpt/tiny/camera.pt
$ PYTHONPATH=. python examples/variants/riflex.py --ckpt ckpt/tiny/ar.pt --times 3 --scenes 64
"""
import argparse
import math
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

import model
from data import (
    HelpFormatter, Scene, from_bytes, intrinsics, load_encoder, mix, pixel_cameras, positive, psnr, sample_toy,
)
from model import load_net, load_vae, rope_speed
from stream import Player, best_room, decibels, film, film_truth, frame_errors, long_path, read_pose

Change = Callable[[Tensor], Tensor]  # of the temporal band's speeds [n], in radians a frame


@contextmanager
def temporal_speeds(change: Change) -> Iterator[None]:
    """Inside, every network turns the temporal band at changed speeds."""
    usual = model.rope_table

    def rope_table(frames: Tensor, h: int, w: int, bands: tuple[int, int, int], theta: float) -> Tensor:
        rope = usual(frames, h, w, bands, theta)  # [f*s 1 hd/2]
        speed = rope_speed(bands[0], theta, frames.device)
        more = torch.outer(frames.double(), change(speed) - speed)  # [f n]
        turn = torch.polar(torch.ones_like(more), more).repeat_interleave(len(rope) // max(1, len(frames)), dim=0)
        return torch.cat([rope[..., : len(speed)] * turn[:, None].to(rope.dtype), rope[..., len(speed) :]], dim=-1)

    model.rope_table = rope_table
    try:
        yield
    finally:
        model.rope_table = usual


def slow_down(k: int, frames: int) -> Change:
    """RIFLEx of pair k: 0.9 of a turn in so many frames (arXiv:2502.15894 eq. 8, and the 0.9 of its code)."""
    def change(speed: Tensor) -> Tensor:
        return torch.where(torch.arange(len(speed), device=speed.device) == k, 0.9 * 2 * math.pi / frames, speed)
    return change


def ways(speed: Tensor, trained: int, times: int, causal: bool) -> dict[str, tuple[Change, dict]]:
    """name: a change of the temporal speeds [n], and of the checkpoint's meta."""
    n, frames = len(speed), trained * times
    found = {"as they are": (lambda speed: speed, {})}
    for k in range(n):
        if 0.9 * 2 * math.pi / frames < speed[k]:
            found[f"component {k}"] = slow_down(k, frames), {}
    found["interpolated"] = (lambda speed: speed / times), {}
    found["ntk"] = (lambda speed: speed * float(times) ** -(torch.arange(n).double() / max(1, n - 1))), {}
    if causal:
        found["window"] = (lambda speed: speed), {"window": trained, "sink": 1}
    return found


def measure(video: Tensor, truth: Tensor, scene: Scene, poses: Tensor, K: Tensor, trained: int) -> Tensor:
    """Of videos and truths in bytes [b 3 t h w]: PSNR within the trained length and behind, the last frame's rotation
    in degrees, how much more alike than the truth's frames are a trained length apart [4 b]."""
    inks, error = best_room(frame_errors(video, scene, poses, K), video.shape[-1])
    end = 1 + 4 * (trained - 1)
    rotation, _ = read_pose(from_bytes(video[:, :, -1:]), scene._replace(inks=inks), poses[:, -1:], K)

    def alike(z: Tensor) -> Tensor:
        return psnr(from_bytes(z[:, :, : -4 * trained]), from_bytes(z[:, :, 4 * trained :]))

    within, behind = decibels(error[:, :end]), decibels(error[:, end:])
    return torch.stack([within, behind, rotation[:, 0], alike(video) - alike(truth)])


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    p.add_argument("--ckpt", type=Path, default=Path("ckpt/tiny/camera.pt"), help="camera, ar or a student")
    p.add_argument("--vae", type=Path, help="default what lies beside the checkpoint")
    p.add_argument("--times", type=positive, default=2, help="how many times as long as trained")
    p.add_argument("--scenes", type=positive, default=16, help="rooms to walk through")
    p.add_argument("--sampling-steps", type=positive, help="denoising steps of a chunk; default the checkpoint's own")
    p.add_argument("--seed", type=int, default=0, help="of the noise")
    p.add_argument("--score-seed", type=int, default=1, help="which rooms and paths")
    args = p.parse_args(argv)
    if args.times < 2:
        p.error(f"--times {args.times}: expected at least 2")
    return args


@torch.no_grad()
def main(args: argparse.Namespace) -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    net, meta = load_net(args.ckpt, device, "camera", "ar", "ode", "cd", "dmd")
    vae = load_vae(args.vae or args.ckpt.with_name("vae.pt"), device, meta["vae_fingerprint"])
    encoder, trained = load_encoder(meta["preset"], None, device), meta["frames"]
    if args.sampling_steps:
        meta["sampling_steps"] = args.sampling_steps
    speed = rope_speed(net.cfg.rope_bands[0], net.rope_theta, torch.device("cpu"))
    print(f"{args.ckpt}: {trained} frames; turns of the temporal pairs last "
          + ", ".join(f"{2 * math.pi / z:.3g}" for z in speed.tolist()))
    prompts, _, scene = sample_toy(args.scenes, mix(args.score_seed, 4), trained - 1, held=True)
    rng = torch.Generator().manual_seed(mix(args.score_seed, 6))
    viewmats = torch.stack([long_path(rng, trained, args.times) for _ in prompts])
    K, groups = intrinsics(meta["K"]), torch.arange(args.scenes).split(8)
    found: dict[str, list[Tensor]] = {}
    for rows in tqdm(groups, "rooms"):
        rooms, poses = Scene(*(z[rows] for z in scene)), pixel_cameras(viewmats[rows])
        truth = film_truth(Player(net, vae, encoder, meta | {"chunk": meta["chunk"] or trained}), rooms, viewmats[rows])
        seeds = [mix(args.seed, 5, n) for n in rows.tolist()]
        names = [prompts[n] for n in rows.tolist()]
        for name, (change, more) in ways(speed, trained, args.times, bool(meta["chunk"])).items():
            with temporal_speeds(change):
                video = film(Player(net, vae, encoder, meta | more), names, viewmats[rows], seeds)
            found.setdefault(name, []).append(measure(video, truth, rooms, poses, K, trained))
        held = truth[:, :, :1].expand_as(truth)
        for name, video in ("*truth through the VAE*", truth), ("*its first frame, held*", held):
            found.setdefault(name, []).append(measure(video, truth, rooms, poses, K, trained))
    print("| temporal speeds | PSNR within | behind | rotation, degrees | alike, dB |")
    print("|---|---|---|---|---|")
    for name, parts in found.items():
        z = torch.cat(parts, dim=1)
        error = z.std(1) / z.shape[1] ** 0.5
        print(f"| {name} | " + " | ".join(f"{m:.1f} ± {e:.1f}" for m, e in zip(z.mean(1), error, strict=True)) + " |")


if __name__ == "__main__":
    try:
        main(parse_args())
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
