"""
Walk through a world: roll out any checkpoint, chunk by chunk, decoding as it goes, along a path or as the keys say.

in:  a checkpoint of any stage (it names its own sampler), a path (pose string or path.json), a prompt
out: an mp4 (or gif) and a contact sheet; on the toy world, with --score, how well the path was obeyed; with --live a
     page, to walk in a browser

$ python stream.py --camera 'w*3,w+l*4'
$ python stream.py --camera path.json --ckpt ckpt/ar.pt --sampling-steps 48 --out walk.mp4 --keys
$ python stream.py --live
$ python stream.py --score --scenes 64 --ckpt ckpt/tiny/dmd.pt
$ python stream.py --score --scenes 16 --lengths 1 2 4 8 --window 8 --sink 1
$ torchrun --nproc_per_node 2 stream.py --sp 2
$ python stream.py --plan --preset wan-1.3b
"""
import argparse
import json
import math
import os
import re
import select
import socket
import struct
import subprocess
import sys
import textwrap
import threading
import time
from collections import Counter, deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from functools import cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import chain, pairwise
from pathlib import Path
from typing import Any, NamedTuple

import imageio.v3 as imageio
import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from einops import rearrange, repeat
from imageio_ffmpeg import count_frames_and_secs, get_ffmpeg_exe
from torch import Tensor, nn
from tqdm import tqdm

from data import (
    CLEAR, GRAMMAR, INKS, KEYS, N_PANELS, NAMED, PALETTE, PILLAR, ROOM, TURN, VIDEOS, CameraPath, Encoder,
    HelpFormatter, Scene, best_inks, cast, collate_prompts, explain, explain_frames, fill_errors, first_line,
    from_bytes, held_out, intrinsics, load_encoder, mix, names_a_file, paint, panels_seen, parse_trajectory,
    pixel_cameras, positive, pressed, psnr, random_batch, random_encoder, read_camera, read_picture, read_prompt,
    render, replacing, resize_and_crop, rotation, sample_path, sample_toy, to_bytes, write_sheet,
)
from model import (
    CARDS, PRESETS, Camera, HYPrompt, Meta, Meter, Prompt, StreamState, build, build_vae, card_name, check_window,
    commit, compile_block, extrapolate, fill_with_noise, forget, invert_se3, load_net, load_vae, next_chunk,
    peak_memory, reread, rollout, sequence_rank, start_process_group, start_stream, timed, use_released_cache,
    usual_meta,
)

SHIPPED = Path(__file__).parent / "ckpt/tiny"
PATH = "w*3,w+l*4"
STAGES = ("base", "camera", "ar", "ode", "cd", "dmd")
TOY_PROMPT = ("orange left wall, cyan right wall, blue far wall, green floor, white ceiling, "
              "near left red pillar, far right yellow pillar")


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__ + textwrap.fill(GRAMMAR, 100), formatter_class=HelpFormatter)
    p.add_argument("--camera", help=f"a pose string or a .json file; default {PATH}")
    p.add_argument("--ckpt", type=Path, help="default ckpt/dmd.pt if there is one, else the shipped four-step model")
    p.add_argument("--vae", type=Path, help="default what lies beside the checkpoint, else the shipped one")
    p.add_argument("--text-encoder", type=Path, help="for released networks: umT5, or for HY the "
                   "folder of HunyuanVideo-1.5; default what lies beside them")
    p.add_argument("--prompt", help="default: the path's own, else a room of the toy world")
    p.add_argument("--image", type=Path, help="an image, or a video of 1 + 4k frames, that the world goes on from")
    p.add_argument("--out", type=Path, default=Path("walk.mp4"), help=".mp4 or .gif; the contact sheet goes beside it")
    p.add_argument("--seed", type=int, default=0, help="of the noise")
    p.add_argument("--sampling-steps", "--steps", type=int, help="denoising steps of a chunk, instead of the "
                   "checkpoint's own")
    p.add_argument("--guidance", type=float, help="w in null + w (cond - null), instead of the checkpoint's own")
    p.add_argument("--window", type=int, help="latent frames that a chunk sees, its own with them, so that a walk may "
                   "go on for ever; 0: all; instead of the checkpoint's own")
    p.add_argument("--sink", type=int, help="with a window: how many of it are the video's first")
    p.add_argument("--absolute-positions", action="store_true", default=None, help="with a window: as public code, "
                   "never move what is cached nearer; past the trained length, positions are new to the network")
    p.add_argument("--keys", action="store_true", help="draw the commanded keys on the video")
    p.add_argument("--other-intrinsics", action="store_true", help="let the path's K differ from the one trained with")
    p.add_argument("--released-cache", action="store_true", help="for minWM's released DMD of HunyuanVideo-1.5: let "
                   "PRoPE's queries read RoPE's old keys, as in the rollouts that it was distilled on")
    p.add_argument("--sp", type=positive, default=1, help="processes that share a video, each some of its tokens")
    p.add_argument("--compile", action="store_true", help="torch.compile blocks: slow to start, then faster")
    p.add_argument("--bench", action="store_true", help="print frames/s and time to the first frame, after a warm-up")
    p.add_argument("--plan", action="store_true", help="only say what a stream takes of a GPU and how fast it could be")
    p.add_argument("--preset", choices=PRESETS, help="with --plan and --bench: a network of noise, without any files")
    p.add_argument("--live", action="store_true", help="a page in the browser, to walk with the keys")
    p.add_argument("--port", type=int, default=8000, help="with --live: of http://127.0.0.1; 0: any that is free")
    p.add_argument("--score", action="store_true", help="measure on held-out rooms and paths of the toy world")
    p.add_argument("--scenes", type=int, default=64, help="with --score: how many")
    p.add_argument("--score-seed", type=int, default=1, help="with --score: which rooms and paths")
    p.add_argument("--given", type=int, default=0, help="with --score: how many latent frames of the truth are given")
    p.add_argument("--lengths", type=positive, nargs="+", metavar="N", help="with --score: how a walk of N times the "
                   "trained length fares, each tenth of it, and a walk there and back, and a camera that stands")
    return p.parse_args(argv)


# ----------------------------------------------------------------------------------------------------------------------
# 1. The stream.


class Player(NamedTuple):
    """All that it takes to stream."""
    net: nn.Module
    vae: nn.Module
    encoder: Encoder
    meta: Meta  # of the network

    @property
    def device(self) -> torch.device:
        return next(self.net.parameters()).device


class PlayerState(NamedTuple):
    """A stream between two steps. `step` leaves it as it is, so it may be kept and gone back to, to walk on elsewhere.
    Only the noise goes on: it is drawn anew, from the generators in `latents`."""
    latents: StreamState
    prompts: list[Prompt]  # encoded: the prompt, and with guidance the null prompt
    feat_cache: dict | None  # what the VAE remembers
    given: Tensor | None  # latent frames [b p c h w] that are given, and still to come
    finished: tuple[Tensor, Camera] | None = None  # the last chunk, until it is committed


@torch.no_grad()
def open_stream(player: Player, prompts: list[str], seeds: list[int], given: Tensor | None = None,
                seconds: dict[str, float] | None = None) -> PlayerState:
    """The state before the first step. One prompt and one seed per video; given: as in `stream`.
    seconds: if given, the time spent is added to its "prompt", "denoise", "cache" and "decode"."""
    net, vae, _, meta = player
    device = player.device
    shape = (vae.cfg.z_dim, *(pixels // vae.cfg.stride for pixels in meta["size"]))
    with timed(seconds, "prompt"):
        given_latents = None if given is None else vae.encode(given.to(device))[0]
        pair = encode_prompts(player, prompts, given, given_latents, shape)
    encoded = [*pair] if meta["guidance"] != 1 else [pair[0]]
    rng = [torch.Generator().manual_seed(seed) for seed in seeds]
    with timed(seconds, "cache"):
        latents = start_stream(net, meta, rng, shape, encoded, device)
    return PlayerState(latents, encoded, None, given_latents if meta["given_prob"] else None)


def settle(player: Player, state: PlayerState, seconds: dict[str, float] | None = None) -> PlayerState:
    """Commit the last chunk, if it is not yet. `step` does it first; who waits for a key may do it while waiting."""
    if state.finished is None:
        return state
    x0, camera = state.finished
    with timed(seconds, "cache"):
        latents = commit(player.net, player.meta, state.latents, x0, state.prompts, camera)
    return state._replace(latents=latents, finished=None)


@torch.no_grad()
def step(player: Player, state: PlayerState, camera: Camera,
         seconds: dict[str, float] | None = None) -> tuple[Tensor, PlayerState]:
    """The next chunk's video [b 3 t H W] in [-1, 1] as `camera` sees it, and the state after it.

    camera: viewmats [b n 4 4], Ks [b n 3 3] of the n latent frames of a chunk. t = 4 n, in the first step 4 n - 3.
    """
    state = denoise(player, state, camera, seconds)
    video, feat_cache = decode(player, state.feat_cache, state.finished[0], seconds)
    return video, state._replace(feat_cache=feat_cache)


@torch.no_grad()
def denoise(player: Player, state: PlayerState, camera: Camera, seconds: dict[str, float] | None = None) -> PlayerState:
    """The first half of `step`: the state whose `finished` is the next chunk."""
    state, n = settle(player, state, seconds), camera.viewmats.shape[1]
    given = rest = None
    if state.given is not None:
        given, rest = state.given[:, :n], state.given[:, n:]
    with timed(seconds, "denoise"):
        x0 = next_chunk(player.net, player.meta, state.latents, state.prompts, camera, given)
    return state._replace(given=rest, finished=(x0, camera))


@torch.no_grad()
def decode(player: Player, feat_cache: dict | None, x0: Tensor,
           seconds: dict[str, float] | None = None) -> tuple[Tensor, dict]:
    """The other half: the video of a chunk's latents, of all at once or one by one, and the VAE's new memory."""
    with timed(seconds, "decode"):
        video, feat_cache = player.vae.decode(x0, feat_cache)
        if player.meta.get("window"):
            feat_cache = forget(feat_cache, player.meta["window"])
    return video.clamp(-1, 1), feat_cache


@cache
def stream_aside(device: torch.device) -> torch.cuda.Stream:
    """The GPU's second stream: one for all videos, as the allocator keeps what a stream has freed for that stream."""
    return torch.cuda.Stream(device)


def stream(player: Player, prompts: list[str], camera: Camera, seeds: list[int],
           given: Tensor | None = None) -> Iterator[Tensor]:
    """Yield video [b 3 t H W] in [-1, 1] as it is made: 1 + 4 (n - 1) frames of the first chunk of n latents, then 4 n.

    One prompt and one seed per video; camera: viewmats [b f 4 4], Ks [b f 3 3]. Chunks are whole, so along a path that
    ends within one the camera stands still for the rest of it, and those frames are not shown.
    given: an image or a short video [b 3 t H W] to go on from. The stream begins with it if the network was trained
    with given frames; HY also reads its first frame with the prompt, and makes it anew if it was not.

    The same as one `step` after the other, to rounding, but while a chunk is decoded and its frames are taken, a thread
    already denoises the next: on a GPU with a stream of its own, on a CPU each with half of the cores, until the last
    frame. Who leaves early waits for the chunk that is begun.
    """
    opened = open_stream(player, prompts, seeds, given)
    chunks, feat_cache = whole_chunks(player, camera), None
    left = 1 + 4 * (camera.viewmats.shape[1] - 1)  # pixel frames to show
    device, here, aside = chunks[0].Ks.device, None, None
    cores = torch.get_num_threads()
    share = max(1, cores // 2) if len(chunks) > 1 else cores  # a single chunk has nothing beside it
    prepare = {"initializer": torch.set_num_threads, "initargs": (share,)}
    if device.type == "cuda":
        prepare = {"initializer": torch.cuda.set_device, "initargs": (device,)}
        here, aside = torch.cuda.current_stream(device), stream_aside(device)
        aside.wait_stream(here)  # what `opened` and `chunks` hold was made here, and is kept until `aside` has read it

    def ahead(state: PlayerState, camera: Camera) -> PlayerState:
        with torch.cuda.stream(aside):  # None, on a CPU: nothing
            return denoise(player, state, camera)

    try:
        if not here:
            torch.set_num_threads(share)
        with ThreadPoolExecutor(1, **prepare) as thread:
            coming = thread.submit(ahead, opened, chunks[0])
            for following in [*chunks[1:], None]:
                state = coming.result()
                x0 = state.finished[0]
                if here:
                    here.wait_stream(aside)
                    x0.record_stream(here)
                if following:
                    coming = thread.submit(ahead, state, following)
                video, feat_cache = decode(player, feat_cache, x0)
                yield video[:, :, :left]
                left -= video.shape[2]
    finally:
        torch.set_num_threads(cores)
        if here:
            here.wait_stream(aside)


def whole_chunks(player: Player, camera: Camera) -> list[Camera]:
    """A path cut into chunks, on the network's device, its last pose held until the last of them is whole.

    Each is a copy: a state that remembers some would keep all of the path in memory.
    """
    f = camera.viewmats.shape[1]
    chunk = player.meta["chunk"] or f
    frames = torch.arange(f + -f % chunk).clamp_max(f - 1)
    return [Camera(*(z[:, here].to(player.device) for z in camera)) for here in frames.split(chunk)]


def encode_prompts(player: Player, prompts: list[str], given: Tensor | None, given_latents: Tensor | None,
                   shape: tuple[int, ...]) -> tuple[Prompt, Prompt]:
    """prompts, and for HY the first given frame of pixels [b 3 t H W] and latents [b p *shape] -> prompt, null."""
    net, _, encoder, _ = player
    device, b = player.device, len(prompts)
    texts = [{name: z.to(device) for name, z in encoder.encode_text(prompt).items()}
             for prompt in (*prompts, encoder.null)]
    if encoder.encode_image is None:
        vision = first = None
    elif given is None:  # all zero: no image
        vision = torch.zeros(b, 1, net.cfg.vision_dim, device=device)
        first = torch.zeros(b, 1, *shape, device=device)
    else:
        vision, first = encoder.encode_image(given[:, :, 0].to(device)), given_latents[:, :1]
    return collate_prompts(texts[:-1], texts[-1], encoder.length, vision, first)


def read_given(path: Path, player: Player, latent_frames: int) -> Tensor:
    """An image or a short video -> [1 3 t H W] in [-1, 1], cut to the checkpoint's shape around the middle.

    Raises ValueError when it cannot be read, is not 1 + 4k frames long, or leaves none of `latent_frames` to make.
    """
    if not player.meta["given_prob"] and player.encoder.encode_image is None:
        raise ValueError(f"--image {path}: this checkpoint was never trained to go on from an image")
    return read_image(path, player.meta, latent_frames, player.encoder)


def read_image(path: Path, meta: Meta, latent_frames: int, encoder: Encoder) -> Tensor:
    """As `read_given`, for a checkpoint that goes on from images."""
    try:
        if path.suffix.lower() in VIDEOS:
            pictures = (z if z.ndim == 3 else np.stack([z] * 3, axis=-1) for z in imageio.imiter(path))  # a grey .gif
            pixels = np.stack([picture[..., :3] for picture in pictures])
            video = from_bytes(rearrange(torch.from_numpy(pixels), "t h w c -> t c h w"))
        else:
            video = read_picture(path)
    except Exception as error:  # each of imageio's plugins has its own
        raise ValueError(f"--image {path}: cannot be read ({first_line(error)})") from None
    t = len(video)
    if t > 1 and encoder.encode_image is not None and not meta.get("given_prob"):
        raise ValueError(f"--image {path}: {t} frames, but this checkpoint goes on from a single one")
    if t % 4 != 1 or 1 + t // 4 >= latent_frames:
        raise ValueError(f"--image {path}: found {t} frames, expected 1 + 4k and fewer latent frames than the path's "
                         f"{latent_frames}")
    return rearrange(resize_and_crop(video, meta["size"]), "t c h w -> 1 c t h w")


# ----------------------------------------------------------------------------------------------------------------------
# 2. Files.

GLYPHS = {  # 3x5 letters for the key overlay
    "w": "101101101111101", "a": "010101111101101", "s": "011100010001110", "d": "110101101101110",
    "u": "101101101101111", "n": "110101101101101", "j": "001001001101010", "l": "100100100100111",
    "i": "111010010010111", "k": "101110100110101",
}


def draw_keys(image: np.ndarray, keys: set[str]) -> None:
    """Light the pressed keys at the bottom left of an image [h w 3], in place."""
    unit = max(1, image.shape[0] // 128)
    spots = {"w": (0, 1), "a": (1, 0), "s": (1, 1), "d": (1, 2), "i": (0, 4), "j": (1, 3), "k": (1, 4), "l": (1, 5),
             "u": (0, 6), "dn": (1, 6)}
    for key, (row, column) in spots.items():
        y, x = image.shape[0] - (2 - row) * 10 * unit, (1 + column * 9) * unit
        box = image[y : y + 9 * unit, x : x + 8 * unit]
        box[:] = box // 3 + (150 if key in keys else 0)
        glyph = np.array([*GLYPHS[key[-1]]], dtype=int).reshape(5, 3).astype(bool)
        glyph = glyph.repeat(unit, 0).repeat(unit, 1)
        box[2 * unit : 7 * unit, 2 * unit : 5 * unit][glyph] = 0 if key in keys else 200


def write_video(path: Path, pieces: Iterator[np.ndarray], fps: float) -> None:
    """Pieces [n h w 3] of bytes -> mp4 or gif. Whatever goes wrong leaves what was at `path`.

    An mp4 grows beside it, as `path`.tmp, and gets its name when it is complete. It is a row of fragments of a second
    each, which can be played without what comes after: if the process is killed, what it made can be watched there.
    """
    first = next(pieces)
    with replacing(path) as temporary:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".gif":
            images = np.concatenate([first, *pieces])
            imageio.imwrite(temporary, images, extension=".gif", duration=1000 / fps, loop=0)
            return
        try:
            encode_mp4(temporary, first, pieces, fps)
        except KeyboardInterrupt:  # what was made until then is whole
            with suppress(FileNotFoundError):
                temporary.replace(path)
            raise


def encode_mp4(path: Path, first: np.ndarray, pieces: Iterator[np.ndarray], fps: float) -> None:
    """Raises OSError with what ffmpeg had to say, or if not all frames can be read back."""
    height, width = first.shape[1:3]
    # zerolatency: x264 would hold back some fifty frames to look ahead
    encoder = subprocess.Popen([
        get_ffmpeg_exe(), "-v", "error", "-y", "-f", "rawvideo", "-pix_fmt", "rgb24", "-s", f"{width}x{height}",
        "-r", str(fps), "-i", "-", "-c:v", "libx264", "-pix_fmt", "yuv420p", "-crf", "12", "-tune", "zerolatency",
        "-g", str(math.ceil(fps)), "-movflags", "+frag_keyframe+empty_moov+default_base_moof", "-flush_packets",
        "1", "-f", "mp4", str(path.absolute()),
    ], stdin=subprocess.PIPE, stderr=subprocess.PIPE)
    written = 0
    try:
        for images in chain([first], pieces):
            encoder.stdin.write(images.tobytes())
            written += len(images)
    except BrokenPipeError:
        pass  # it ended, and says below why
    finally:
        log = encoder.communicate()[1].decode(errors="replace").splitlines()
    if encoder.returncode != 0:
        raise OSError(log[-1] if log else f"ffmpeg: {encoder.returncode}")
    found, _ = count_frames_and_secs(path)
    if found != written:
        raise OSError(f"{written} frames were written, {found} can be read back")


# ----------------------------------------------------------------------------------------------------------------------
# 3. Measuring. Geometry, colours and path are known; the inks of the pictures are read off the video, and the room they
# make is rendered along the path: the one that explains the video best. Everything is a comparison with that render.


def named_room(prompt: str) -> Scene | None:
    """The room of the toy world that a prompt names, its inks left open; None: it names none."""
    with suppress(ValueError):
        colours, pillars = read_prompt(prompt)
        return Scene(colours[None], pillars[None], torch.zeros(1, N_PANELS, dtype=torch.long))
    return None


def named_colours(video: Tensor, scene: Scene, viewmats: Tensor, K: Tensor) -> Tensor:
    """For every surface the prompt names: does its colour explain its bare part best? [b 7], NaN where unseen.

    scene: with the video's own inks. Of every fourth frame, those whose poses viewmats [b f 4 4] holds.
    """
    video = video[:, :, ::4]
    hits = cast(scene.pillars, viewmats, K, video.shape[-1])
    b, bare = len(video), (hits.panel == N_PANELS).flatten(1).float()
    surface = hits.surface.flatten(1)
    rays = torch.zeros(b, NAMED + 1).scatter_add_(1, surface, bare)  # that meet each surface where it is bare
    errors = []
    for colour in range(len(PALETTE)):  # of each surface, were it of this colour
        image = paint(hits, torch.full((b, NAMED + 1), colour), scene.inks)
        error = repeat((image - video).square().sum(1), "b t h w -> b (t h p w q)", p=2, q=2)
        errors.append(torch.zeros(b, NAMED + 1).scatter_add_(1, surface, bare * error))
    best = torch.stack(errors, dim=-1).argmin(-1)
    right = (best == scene.colours)[:, :NAMED].float()
    return torch.where(rays[:, :NAMED] / 4 >= 32, right, torch.nan)  # four rays a pixel; under 32 pixels is unseen


def towards_inks(errors: Tensor) -> Tensor:
    """fill_errors [b t 17 7] -> what `texture` and `clutter` are made of, of each frame's each picture [4 b t 16].

    For a picture x, g the grey between all inks and l the ink that explains all frames best: <x - g, l - g>; the same
    for the best decoy; |l - g|^2; |x - g|^2.
    """
    n, errors = len(INKS), errors[:, :, :N_PANELS]
    inks, decoys, off = errors[..., :n], errors[..., n : 2 * n], errors[..., 2 * n]
    energy = inks.mean(-1) - off  # g is the mean of the inks, and all are as far from it

    def towards(bank: Tensor) -> Tensor:
        best = bank.sum(1, keepdim=True).argmin(-1, keepdim=True).expand(*bank.shape[:3], 1)
        return (off + energy - bank.gather(3, best)[..., 0]) / 2  # law of cosines

    return torch.stack([towards(inks), towards(decoys), energy, off])


def texture(found: Tensor) -> Tensor:
    """towards_inks of some frames [4 b t 16] -> how far pictures went from grey to an ink, less how far to a decoy [b].

    0.5 in the true room, as an ink lies between two decoys; 0 for grey and noise, whose best decoy is as near, and for
    inks twice as strong; -0.5 for decoys. Part of a walk may have -2: its inks are those of the whole.
    """
    ink, decoy, energy, _ = found.sum(2)
    return (ink.clamp(-energy, energy) - decoy.clamp(-energy, energy)).sum(1) / energy.sum(1)


def clutter(found: Tensor) -> Tensor:
    """As `texture`: how far, squared, pictures are from all that lies between grey and their ink, over grey to ink."""
    ink, _, energy, off = found.sum(2)
    k = (ink / energy.clamp_min(1e-9)).clamp(0, 1)
    return (off - 2 * k * ink + k.square() * energy).sum(1) / energy.sum(1)


def tenths(t: int) -> list[slice]:
    """The frames of each tenth of t, of few frames one at least."""
    return [slice(t * n // 10, max(t * n // 10 + 1, t * (n + 1) // 10)) for n in range(10)]


def find_pose(video: Tensor, scene: Scene, viewmats: Tensor, K: Tensor) -> Tensor:
    """Where was each frame [b 3 n h w] seen from? c2w [b n 4 4].

    Damped Gauss-Newton (Levenberg-Marquardt) around the commanded poses [b n 4 4], over yaw, pitch, x, y, z together:
    one at a time, a step to the side would be read as a turn. Slopes are measured over a wide step at first (4 degrees,
    0.08 units), since what is far off agrees with no small change, and over a narrow one at last.
    """
    unit = torch.tensor([math.radians(1), math.radians(1), 0.02, 0.02, 0.02])

    def view(c2w: Tensor) -> Tensor:
        return paint(cast(scene.pillars, invert_se3(c2w), K, video.shape[-1]), scene.colours, scene.inks)

    def moved(c2w: Tensor, amount: Tensor) -> Tensor:  # amount [... 5] in units
        amount = amount * unit
        delta = torch.eye(4).repeat(*amount.shape[:-1], 1, 1)
        delta[..., :3, :3] = rotation(amount[..., 0], amount[..., 1])
        delta[..., :3, 3] = amount[..., 2:]
        return c2w @ delta

    c2w = invert_se3(viewmats)
    image = view(c2w)
    damping = torch.full(c2w.shape[:2], 0.01)
    for wide in (4.0, 3.0, 2.0, 1.0, 1.0, 0.5):
        # how the picture changes with each of the five, by central differences
        rise = [view(moved(c2w, wide * axis)) - view(moved(c2w, -wide * axis)) for axis in torch.eye(5)]
        J = rearrange(rise, "k b c n h w -> b n (c h w) k") / (2 * wide)
        H = J.mT @ J
        g = J.mT @ rearrange(video - image, "b c n h w -> b n (c h w) 1")
        H = H + damping[..., None, None] * H.diagonal(dim1=-2, dim2=-1).diag_embed() + 1e-6 * torch.eye(5)
        trial = moved(c2w, torch.linalg.solve(H, g)[..., 0].clamp(-12, 12))
        tried = view(trial)
        # a frame takes the step only if it explains the frame better; if not, a shorter one is tried next
        better = (tried - video).square().mean((1, 3, 4)) < (image - video).square().mean((1, 3, 4))  # [b n]
        c2w = torch.where(better[..., None, None], trial, c2w)
        image = torch.where(better[:, None, :, None, None], tried, image)
        damping = torch.where(better, damping / 4, damping * 8)
    return c2w


def pose_error(found: Tensor, asked: Tensor) -> tuple[Tensor, Tensor]:
    """How far c2w [... 4 4] are from those asked for: in degrees, and in units [...]."""
    turn = asked[..., :3, :3].mT @ found[..., :3, :3]
    angle = torch.arccos(((turn.diagonal(dim1=-2, dim2=-1).sum(-1) - 1) / 2).clamp(-1, 1))
    return torch.rad2deg(angle), (found - asked)[..., :3, 3].norm(dim=-1)


def read_pose(video: Tensor, scene: Scene, viewmats: Tensor, K: Tensor) -> tuple[Tensor, Tensor]:
    """Rotation error in degrees and translation error in units [b n] of frames [b 3 n h w], commanded [b n 4 4]."""
    return pose_error(find_pose(video, scene, viewmats, K), invert_se3(viewmats))


def edge_ratio(video: Tensor, chunk: int) -> Tensor:
    """Frame differences across chunk edges over those inside chunks [b]."""
    change = video.diff(dim=2).abs().mean((1, 3, 4))  # [b t-1]; entry t is the step from frame t to t + 1
    # pixel frame 4n is the last of latent frame n
    edge = torch.tensor([t % 4 == 0 and (t // 4 + 1) % chunk == 0 for t in range(change.shape[1])])
    return change[:, edge].mean(1) / change[:, ~edge].mean(1)


def coverage(inks: Tensor, seen: Tensor) -> float:
    """Entropy of each picture's inks over the videos, against the prior's: 1 follows it, 0 is one ink for all."""
    entropies = []
    for panel in range(N_PANELS):
        counts = torch.bincount(inks[seen[:, panel], panel], minlength=len(INKS)).double()
        if counts.sum() >= 8:  # seen in enough videos to speak of a distribution
            p = counts / counts.sum()
            bias = ((counts > 0).sum() - 1) / (2 * counts.sum())  # Miller-Madow: few samples look uneven
            entropies.append(-(p * p.clamp_min(1e-12).log()).sum() + bias)
    return (torch.stack(entropies).mean() / math.log(len(INKS))).item() if entropies else float("nan")


def measure(video: Tensor, scene: Scene, viewmats: Tensor, K: Tensor, chunk: int) -> dict[str, Tensor]:
    """Every per-video number for a group of videos [b 3 t h w]. Each other's paths are the counterfactuals."""
    hits = cast(scene.pillars, pixel_cameras(viewmats), K, video.shape[-1])
    errors = fill_errors(video, hits, scene.colours)
    found, own = towards_inks(errors), scene._replace(inks=best_inks(errors))  # the room of the video
    best = paint(hits, own.colours, own.inks)
    few = video[:, :, ::4]  # one frame of each latent, which its pose belongs to
    candidates = [psnr(few, explain_frames(few, scene, viewmats, K)[0])]  # along its own path, then along each other's
    for shift in range(1, len(video)):
        other = viewmats.roll(shift, 0)
        same = (other - viewmats).abs().amax((1, 2, 3)) < 1e-4  # two videos with one path are no counterfactual
        candidates.append(torch.where(same, -torch.inf, psnr(few, explain_frames(few, scene, other, K)[0])))
    dB = torch.stack(candidates, dim=1)  # [b candidates], the commanded path first
    first = video[:, :, :1].expand_as(video)  # the first frame held: what standing still would score
    shown = torch.arange(4, video.shape[2], 8)  # the last pixel frame of every second latent
    rot, trans = read_pose(video[:, :, shown], own, viewmats[:, shown // 4], K)
    error, parts = (video - best).square().mean((1, 3, 4)), tenths(video.shape[2])  # [b t]
    return {
        "psnr": decibels(error), "psnr_copy_first": psnr(first, explain(first, scene, viewmats, K)[0]),
        "psnr_shuffled_camera": torch.where(dB[:, 1].isinf(), torch.nan, dB[:, 1]),
        "counterfactual_accuracy": (dB.argmax(1) == 0).float(),
        "texture": texture(found), "clutter": clutter(found), "rot_err_deg": rot.mean(1), "trans_err": trans.mean(1),
        "prompt_accuracy": named_colours(video, own, viewmats, K).nanmean(1),
        "boundary_jump": edge_ratio(video, chunk) / edge_ratio(best, chunk),
        "psnr_first_chunk": decibels(error[:, : 1 + 4 * (chunk - 1)]),
        "lost": decibels(error[:, parts[0]]) - decibels(error[:, parts[-1]]),
        "texture_tenths": torch.stack([texture(found[:, :, part]) for part in parts], dim=1),
        "inks": own.inks, "seen": panels_seen(hits, 24),
    }


def average(rows: list[dict[str, Tensor]]) -> dict[str, float | list | None]:
    """Of what `measure` says of group after group."""
    joined = {name: torch.cat([row[name] for row in rows]) for name in rows[0]}
    spread = coverage(joined.pop("inks"), joined.pop("seen"))
    return {name: rounded(z.nanmean(0)) for name, z in joined.items()} | {"coverage": rounded(torch.tensor(spread))}


def rounded(z: Tensor) -> float | list | None:
    """For JSON, which knows no NaN: None where there was nothing to measure."""
    if z.ndim:
        return [rounded(x) for x in z]
    return round(z.item(), 4) if z.isfinite() else None


def standard_error(rows: list[dict[str, Tensor]], name: str) -> float | None:
    z = torch.cat([row[name] for row in rows])
    z = z[~z.isnan()]
    return rounded(z.std() / len(z) ** 0.5)


@torch.no_grad()
def score(player: Player, args: argparse.Namespace) -> tuple[dict[str, float | list | None], list[Tensor]]:
    """Held-out rooms along held-out paths -> averages, and 16 videos below the renders that explain them best."""
    meta, group = player.meta, 8
    if meta["frames"] < 2:
        raise ValueError("--score measures videos, and this checkpoint makes images")
    if args.scenes < group or args.scenes % group:
        raise ValueError(f"--scenes {args.scenes}: expected a multiple of {group}, the number of candidate paths")
    most = meta["frames"] - 1 if meta["given_prob"] else int(player.encoder.encode_image is not None)
    if not 0 <= args.given <= most:
        raise ValueError(f"--given {args.given}: this checkpoint goes on from at most {most} given frames")
    chunk = meta["chunk"] or 1
    prompts, paths, scene = sample_toy(args.scenes, mix(args.score_seed, 4), meta["frames"] - 1, held=True)
    viewmats = torch.stack([parse_trajectory(path) for path in paths])
    K = intrinsics(meta["K"])
    rows, ceilings, videos, best = [], [], [], []
    for i in tqdm(range(0, args.scenes, group), "score", disable=sequence_rank()[0] > 0):
        rooms = Scene(*(z[i : i + group] for z in scene))
        camera = Camera(viewmats[i : i + group], K.expand(group, len(viewmats[0]), 3, 3))
        truth = render(rooms, camera.viewmats, K, meta["size"][0])
        x0 = player.vae.encode(truth.to(player.device))[0]
        through_vae = decode(player, None, x0)[0].cpu()  # the ceiling: no network shows more than its VAE can
        given = truth[:, :, : 1 + 4 * (args.given - 1)] if args.given else None
        seeds = [mix(args.seed, 5, n) for n in range(i, i + group)]
        video = torch.cat(list(stream(player, prompts[i : i + group], camera, seeds, given)), dim=2).cpu()
        rows.append(measure(video, rooms, camera.viewmats, K, chunk))
        ceilings.append(measure(through_vae, rooms, camera.viewmats, K, chunk))
        if i < 16:
            videos.append(video)
            best.append(explain(video, rooms, camera.viewmats, K)[0])

    floors = ("psnr_copy_first", "psnr_shuffled_camera")
    ceiling = {f"{name}_ceiling": value for name, value in average(ceilings).items() if name not in floors}
    errors = {f"{name}_standard_error": standard_error(rows, name) for name in rows[0]
              if name not in ("inks", "seen", "texture_tenths")}
    sheet = [torch.cat(best), torch.cat(videos)]
    return average(rows) | {"chance": 1 / group} | errors | ceiling, sheet


# How a walk fares that is longer than what was trained. It is of one room: inks are read off the whole walk, and every
# tenth of it is held against the room that they make. Videos are kept in bytes and measured in pieces.


def long_path(rng: torch.Generator, frames: int, length: int) -> Tensor:
    """Held-out paths of the trained `frames`, `length` of them on end -> viewmats [length * frames 4 4].

    All of it stays clear of walls and pillars and looks where training does: who turns round sees a wall that nobody
    named, and what a network makes of that says nothing about the length.
    """
    path = []
    while len(path) < length:
        piece = sample_path(rng, frames if path else frames - 1)  # the first pose takes no step
        viewmats = parse_trajectory(",".join([*path, piece]))
        clear = (invert_se3(viewmats)[:, :3, 3].abs() < torch.tensor(CLEAR)).all()
        ahead = (viewmats[:, 2, 2] > math.cos(frames * TURN)).all()  # of the first view, the axis into the picture
        if held_out(piece) and clear and ahead:
            path.append(piece)
    return viewmats


def film(player: Player, prompts: list[str], viewmats: Tensor, seeds: list[int]) -> Tensor:
    """The stream along viewmats [b f 4 4] in bytes [b 3 t h w]."""
    camera = Camera(viewmats, intrinsics(player.meta["K"]).expand(*viewmats.shape[:2], 3, 3))
    return torch.cat([to_bytes(video).cpu() for video in stream(player, prompts, camera, seeds)], dim=2)


@torch.no_grad()
def film_truth(player: Player, scene: Scene, viewmats: Tensor) -> Tensor:
    """The ceiling of `film`: the true room as the VAE shows it, chunk by chunk as in a stream."""
    meta = player.meta
    poses, K, pieces = pixel_cameras(viewmats), intrinsics(meta["K"]), []
    encoded = decoded = None
    for frames in torch.arange(-3, poses.shape[1]).split(4 * meta["chunk"]):  # the first latent shows one frame alone
        hits = cast(scene.pillars, poses[:, frames[frames >= 0]], K, meta["size"][0])
        truth = paint(hits, scene.colours, scene.inks)
        x0, encoded = player.vae.encode(truth.to(player.device), encoded)
        video, decoded = decode(player, decoded, x0)
        if meta.get("window"):
            encoded = forget(encoded, meta["window"])
        pieces.append(to_bytes(video).cpu())
    return torch.cat(pieces, dim=2)


def frame_errors(video: Tensor, scene: Scene, poses: Tensor, K: Tensor) -> Tensor:
    """`fill_errors` [b t 17 7] of video [b 3 t h w] in bytes seen from poses [b t 4 4], some frames at a time."""
    found = []
    for frames in torch.arange(video.shape[2]).split(16):
        hits = cast(scene.pillars, poses[:, frames], K, video.shape[-1])
        found.append(fill_errors(from_bytes(video[:, :, frames]), hits, scene.colours))
    return torch.cat(found, dim=1)


def best_room(errors: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """frame_errors [b t 17 7] -> the inks [b 16] that explain all frames best, and each frame's error [b t]."""
    inks = best_inks(errors)
    ink = F.pad(inks, (0, 1))[:, None, :, None]  # what has no picture is the same in any
    chosen = errors.gather(3, ink.expand(-1, errors.shape[1], -1, 1)).sum((2, 3))
    return inks, chosen / (3 * size**2)


def decibels(error: Tensor) -> Tensor:
    """Squared error of each frame [b t] -> PSNR of all of them [b]."""
    return 10 * torch.log10(4 / error.mean(1).clamp_min(1e-10))


def measure_walk(video: Tensor, errors: Tensor, scene: Scene, poses: Tensor, K: Tensor) -> dict[str, Tensor]:
    """Of each tenth of a walk [b 10]: PSNR to its one room, texture, and how far off the last frame's pose is."""
    parts = tenths(video.shape[2])
    inks, error = best_room(errors, video.shape[-1])
    found = towards_inks(errors)
    last = torch.tensor([part.stop - 1 for part in parts])
    rot, trans = read_pose(from_bytes(video[:, :, last]), scene._replace(inks=inks), poses[:, last], K)
    return {"psnr": torch.stack([decibels(error[:, part]) for part in parts], dim=1),
            "texture": torch.stack([texture(found[:, :, part]) for part in parts], dim=1),
            "rot_err_deg": rot, "trans_err": trans}


def measure_return(video: Tensor, back: Tensor) -> dict[str, Tensor]:
    """Of a walk there and back, in bytes: PSNR between the first tenth's frames and those of `back`'s last tenth that
    show the same; and between the first tenth and the turning point, which is what standing still would score, too."""
    video, back = video[:, :, ::4], back[:, :, ::4]  # one frame of each latent, which its pose belongs to
    f = video.shape[2]
    n = max(1, f // 10)
    first, last, far = (from_bytes(z) for z in (video[:, :, :n], back[:, :, f - n :].flip(2), video[:, :, [f // 2]]))
    return {"revisit": psnr(first, last), "revisit_elsewhere": psnr(first, far.expand_as(first))}


def measure_stand(video: Tensor, errors: Tensor, scene: Scene, poses: Tensor, K: Tensor) -> dict[str, Tensor]:
    """Of a camera that stands [b]: difference between neighbouring frames; in the last tenth PSNR to the one room and
    by how much it was better in the first; how far off the last frame's pose is."""
    inks, error = best_room(errors, video.shape[-1])
    n = max(1, video.shape[2] // 10)
    rot, trans = read_pose(from_bytes(video[:, :, -1:]), scene._replace(inks=inks), poses[:, -1:], K)
    change = torch.stack([(from_bytes(b) - from_bytes(a)).abs().mean((1, 2, 3)) for a, b in pairwise(video.unbind(2))])
    return {"stand_change": change.mean(0), "stand_psnr": decibels(error[:, -n:]),
            "stand_lost": decibels(error[:, :n]) - decibels(error[:, -n:]),
            "stand_rot_err_deg": rot[:, 0], "stand_trans_err": trans[:, 0]}


def measure_lengths(player: Player, scene: Scene, viewmats: Tensor, prompts: list[str], seeds: list[int],
                    lengths: list[int]) -> tuple[dict[int, dict[str, dict[str, Tensor]]], Tensor]:
    """For each length its numbers, each for the network's videos, for their floor and for their ceiling; and a sheet's
    video, the longest walk's. A shorter walk is the beginning of the longest.

    Floors: of a walk the truth's first frame, held; of a walk back another room's; of a camera that stands the walk.
    """
    K, frames = intrinsics(player.meta["K"]), player.meta["frames"]
    poses, still = pixel_cameras(viewmats), torch.eye(4).expand_as(viewmats)
    standing = torch.eye(4).expand_as(poses)
    walk, true_walk = film(player, prompts, viewmats, seeds), film_truth(player, scene, viewmats)
    first = to_bytes(render(scene, viewmats[:, :1], K, walk.shape[-1])).expand_as(walk)
    walks = {"": walk, "_floor": first, "_ceiling": true_walk}
    stands = {"": film(player, prompts, still, seeds), "_floor": walk, "_ceiling": film_truth(player, scene, still)}
    walk_errors = {kind: frame_errors(video, scene, poses, K) for kind, video in walks.items()}
    stand_errors = {kind: frame_errors(video, scene, standing, K) for kind, video in stands.items()}
    rows = {}
    for length in lengths:
        f = length * frames
        t, there = 1 + 4 * (f - 1), viewmats[:, : f // 2]
        path = torch.cat([there, there.flip(1)], dim=1)
        own, truth = film(player, prompts, path, seeds), film_truth(player, scene, path)
        backs = {"": (own, own), "_floor": (own, own.roll(1, 0)), "_ceiling": (truth, truth)}
        rows[length] = {
            kind: measure_walk(walks[kind][:, :, :t], walk_errors[kind][:, :t], scene, poses[:, :t], K)
            | measure_return(*backs[kind])
            | measure_stand(stands[kind][:, :, :t], stand_errors[kind][:, :t], scene, standing[:, :t], K)
            for kind in walks
        }
    return rows, walk


def summarise(found: dict[str, Tensor]) -> dict[str, Tensor]:
    """Numbers of each video [n] or [n 10], and of PSNR what a walk loses from its best tenth to its worst (`drift`) and
    from its first to its last (`lost`) -> means and standard errors."""
    dB = found["psnr"]
    best, worst = dB.mean(0).argmax(), dB.mean(0).argmin()
    found = found | {"drift": dB[:, best] - dB[:, worst], "lost": dB[:, 0] - dB[:, -1]}
    errors = {f"{name}_standard_error": z.std(0) / len(z) ** 0.5 for name, z in found.items()}
    return {name: z.mean(0) for name, z in found.items()} | errors


def score_lengths(player: Player, args: argparse.Namespace) -> tuple[list[dict], list[Tensor]]:
    """Held-out rooms, walks of so many times the trained length -> a row each, and eight of the longest for a sheet."""
    meta, group = player.meta, 8
    if args.scenes < group or args.scenes % group:
        raise ValueError(f"--scenes {args.scenes}: expected a multiple of {group}, the number of videos made together")
    if not meta["chunk"]:
        raise ValueError(f"--lengths {args.lengths[0]}: a bidirectional network makes videos of one length")
    if args.given:
        raise ValueError(f"--given {args.given}: --lengths measures walks of which nothing is given")
    prompts, _, scene = sample_toy(args.scenes, mix(args.score_seed, 4), meta["frames"] - 1, held=True)
    rng = torch.Generator().manual_seed(mix(args.score_seed, 6))
    viewmats = torch.stack([long_path(rng, meta["frames"], max(args.lengths)) for _ in prompts])
    groups, sheet = [], None
    for i in tqdm(range(0, args.scenes, group), "score", disable=sequence_rank()[0] > 0):
        rows = slice(i, i + group)
        rooms, seeds = Scene(*(z[rows] for z in scene)), [mix(args.seed, 5, n) for n in range(i, i + group)]
        found, walk = measure_lengths(player, rooms, viewmats[rows], prompts[rows], seeds, args.lengths)
        groups.append(found)
        if sheet is None:
            every = math.ceil(walk.shape[2] / 16)
            shown, poses = from_bytes(walk[:, :, ::every]), pixel_cameras(viewmats[rows])[:, ::every]
            sheet = [explain_frames(shown, rooms, poses, intrinsics(meta["K"]))[0], shown]

    table = []
    for length in args.lengths:
        row = {"length": length, "frames": length * meta["frames"]}
        for kind in ("", "_floor", "_ceiling"):
            parts = [found[length][kind] for found in groups]
            means = summarise({name: torch.cat([part[name] for part in parts]) for name in parts[0]})
            row |= {f"{name}{kind}": rounded(z) for name, z in means.items()}
        table.append(row)
    return table, sheet


def bench(player: Player, prompt: str, camera: Camera, given: Tensor | None = None) -> dict:
    """One warm-up, then the best of three: frames/s over the whole path, time to the first frame. And, one step after
    the other, where it goes: more in sum than a frame takes while decoding overlaps denoising.

    last_chunk_ms is the median of the path's last tenth, state_mb what the state holds in the end: with a window, they
    are the same for a path of any length.
    """
    clocks = []
    for _ in range(4):  # of which the first warms up
        clock, frames = [time.perf_counter()], 0
        for video in stream(player, [prompt], camera, [0], given):
            frames += video.cpu().shape[2]  # as who watches: it is there
            clock.append(time.perf_counter())
        clocks.append(np.diff(clock))
    chunks = min(clocks[1:], key=sum)

    for seconds in {}, {}:  # of which the first warms up
        state = open_stream(player, [prompt], [0], given, seconds)
        for here in whole_chunks(player, camera):
            _, state = step(player, state, here, seconds)
    return {"fps": round(frames / chunks.sum(), 1), "first_frame_s": round(chunks[0], 4), "frames": frames,
            "last_chunk_ms": round(1000 * np.median(chunks[-math.ceil(len(chunks) / 10) :]), 1),
            "state_mb": round(held_bytes(state) / 1e6, 3),
            "ms_per_frame": {name: round(1000 * s / frames, 2) for name, s in seconds.items()}}


def held_bytes(state: NamedTuple) -> int:
    """Of all memory that a state keeps alive, each once."""
    storages, left = {}, [state]
    while left:
        z = left.pop()
        if isinstance(z, Tensor):
            storages[z.untyped_storage().data_ptr()] = z.untyped_storage().nbytes()
        elif isinstance(z, (list, tuple, dict)):
            left += z.values() if isinstance(z, dict) else z
    return sum(storages.values())


def settings_of_preset(args: argparse.Namespace) -> Meta:
    """Of a preset's student as usual, but for what the flags say; with --camera, as many latent frames as it has.

    Raises ValueError for flags that need a checkpoint.
    """
    preset = args.preset or "tiny"
    of_files = {"--ckpt": args.ckpt, "--vae": args.vae, "--image": args.image, "--released-cache": args.released_cache,
                "--text-encoder": args.text_encoder, "--prompt": args.prompt, "--score": args.score}
    for flag, value in of_files.items():
        if value:
            raise ValueError(f"{flag}: of no use with --plan and --preset, whose network is noise and reads no files")
    if args.plan and args.sp > 1:
        raise ValueError(f"--sp {args.sp}: --plan counts a stream on one GPU")
    meta = with_flags(usual_meta(preset, "dmd"), args)
    f = meta["frames"] if args.camera is None else len(read_camera(args.camera, meta["fps"])[0].viewmats)
    return meta | {"frames": f + -f % meta["chunk"]}  # chunks are whole


def random_player(args: argparse.Namespace) -> tuple[Player, Camera, Tensor | None]:
    """A student of noise, a camera that stands still for all of meta's frames, and for HY an image."""
    preset, meta, device = args.preset, settings_of_preset(args), open_device(args.sp)
    with torch.device("meta"):
        net, vae = build(preset).eval(), build_vae(preset).eval()
    net = net.to(torch.bfloat16 if device.type == "cuda" else torch.float32)
    for part in (net, vae):
        fill_with_noise(part.to_empty(device=device).requires_grad_(False))
    for block in net.blocks if args.compile else ():
        compile_block(block)
    encoder, f = random_encoder(preset), meta["frames"]
    camera = Camera(torch.eye(4).expand(1, f, 4, 4), intrinsics(meta["K"]).expand(1, f, 3, 3))
    image = torch.zeros(1, 3, 1, *meta["size"]) if encoder.encode_image else None
    return Player(net, vae, encoder, meta), camera, image


@torch.no_grad()
def count_chunks(preset: str, meta: Meta, layers: int) -> list[tuple[str, Counter]]:
    """What each chunk of a stream takes, but for its decoding, in a network of so many blocks (model.py, 12)."""
    meter, chunks = Meter(), []
    with torch.device("meta"):
        net = PRESETS[preset].net(replace(PRESETS[preset].dit, layers=layers)).bfloat16()
    meter.attach(net, 2, recompute=False)
    batch = random_batch(preset, meta, 1, torch.device("meta"))
    with meter.flops:
        for _ in rollout(net, meta, batch.rng, batch.x0.shape[1:], batch.prompt, batch.null, batch.camera):
            chunks.append(("", meter.settle()))
    return chunks


@torch.no_grad()
def count_decoding(preset: str, meta: Meta) -> list[Counter]:
    """What the VAE's decoding of each chunk takes."""
    meter, chunks, feat_cache = Meter(), [], None
    with torch.device("meta"):
        vae = build_vae(preset)
    batch = random_batch(preset, meta, 1, torch.device("meta"))
    with meter.flops:
        for x0 in batch.x0.split(meta["chunk"], dim=1):
            with meter:
                _, feat_cache = vae.decode(x0, feat_cache)
                if meta.get("window"):
                    feat_cache = forget(feat_cache, meta["window"])
            chunks.append(meter.settle())
    return chunks


def plan(preset: str, meta: Meta) -> dict:
    """Memory of a stream of meta's frames on one GPU, and the least time its chunks take, at the card's rates."""
    few, more = (count_chunks(preset, meta, layers) for layers in (2, 3))
    chunks = [cost for _, cost in extrapolate(few, more, PRESETS[preset].dit.layers - 2)]
    decoding = count_decoding(preset, meta)
    with torch.device("meta"):
        net, vae = (sum(p.numel() for p in part.parameters()) for part in (build(preset), build_vae(preset)))
    gb = {"weights": 2 * net / 1e9, "vae": 4 * vae / 1e9, "cache": chunks[-1]["cache"] / 1e9,
          # the next chunk's passes run while one is decoded
          "activations": sum(max(cost["activations"] for cost in costs) for costs in (chunks, decoding)) / 1e9}
    cached = min(meta["frames"], meta.get("window") or meta["frames"]) - meta["chunk"]  # frames, at most
    rate, bandwidth = CARDS["H100"]
    seconds = []
    for cost, decode in zip(chunks, decoding, strict=True):
        passes = cost["weights"] / (2 * net)
        reading = cost["weights"] + passes * cost["cache"]
        # the VAE is fp32, whose convolutions run at half the rate (TF32)
        seconds.append(max(cost["flop"] / rate, reading / bandwidth) + 2 * decode["flop"] / rate)
    return {"preset": preset, "stage": "stream", "gpus": 1, "gb": gb | {"total": sum(gb.values())},
            "cache_gb_per_frame": chunks[-1]["cache"] / 1e9 / cached if cached else 0.0,
            "tflop": [float(f"{cost['flop'] / 1e12:.4g}") for cost in chunks],
            "tflop_decode": [float(f"{cost['flop'] / 1e12:.4g}") for cost in decoding],
            "first_frame_s": seconds[0], "fps": 4 * meta["chunk"] / seconds[-1]}


def print_plan(found: dict) -> None:
    """A table to read, and the same as a line of JSON."""
    notes = {"weights": "bf16", "vae": "fp32", "activations": "of a pass, and of decoding a chunk", "total": "",
             "cache": f"{found['cache_gb_per_frame']:.3g} for each frame of the past"}
    print(f"a stream of {found['preset']} on one GPU: GB that it holds")
    for kind, size in found["gb"].items():
        print(f"  {kind:12}{size:9.4g}   {notes[kind]}")
    print(f"on an H100 at best: first frames after {found['first_frame_s']:.3g} s, then {found['fps']:.3g} frames/s, "
          "when there is most to see of the past")
    print(json.dumps(found))


# ----------------------------------------------------------------------------------------------------------------------
# 4. The page: a walk that answers the keys, in a browser on this machine, for as long as somebody looks.
#
# The walk runs in the main thread, which alone uses the network; every request has a thread of its own, and `Live` is
# where they meet. A chunk is begun as late as may be, so that its keys are fresh: its first frame is to be ready when
# the frames before it have been shown. What can wait is done in that wait: the commit of the last chunk, the window
# read again under a new prompt, and the truth. So decoding has nothing to overlap with, where the walk is faster than
# it plays: the next chunk is not begun yet. Instead a chunk's first latent frame is shown before its last is decoded.

PAGE = Path(__file__).parent / "examples/live.html"
MOST_VIEWERS = 4  # browsers open six connections to a server: one for each page's frames, and some for the keys
MOST_BYTES = 8192  # of a request
MOST_PITCH = 7 * TURN  # in the toy world, as far up and down as its paths look


class Pose(NamedTuple):
    """Where the walk is. Turns add up as yaw and pitch: their product would tilt the world in time."""
    centre: Tensor  # [3]
    yaw: float
    pitch: float

    def moved(self, keys: set[str], toy: bool) -> "Pose":
        """A latent frame later: as a step of parse_trajectory, it turns first, then moves along the new axes.

        In the toy world not further than its paths go: the walls stop it.
        """
        most = MOST_PITCH if toy else math.pi / 2
        steps = [KEYS[key][1:] for key in sorted(keys)]
        yaw = math.remainder(self.yaw + sum(turn for _, turn, _ in steps), 2 * math.pi)
        pitch = min(max(self.pitch + sum(turn for _, _, turn in steps), -most), most)
        move = torch.tensor([(0, 0, 0), *(move for move, _, _ in steps)], dtype=torch.float64).sum(0)
        centre = self.centre + rotation(*torch.tensor([yaw, pitch], dtype=torch.float64)) @ move
        free = torch.tensor(CLEAR, dtype=torch.float64)
        return Pose(centre.clamp(-free, free) if toy else centre, yaw, pitch)

    def viewmat(self) -> Tensor:
        c2w = torch.eye(4, dtype=torch.float64)
        c2w[:3, :3] = rotation(*torch.tensor([self.yaw, self.pitch], dtype=torch.float64))
        c2w[:3, 3] = self.centre
        return invert_se3(c2w).float()


class Viewer:
    """A page that is open."""

    def __init__(self):
        self.messages: deque[bytes] = deque(maxlen=12)  # some three chunks: what is not taken in time is lost
        self.held: set[str] = set()
        self.tapped: set[str] = set()  # pressed since the last chunk, and perhaps no longer held
        self.number = 0  # of its last input


class Live:
    """The walk, and what the requests may ask of it."""

    def __init__(self, player: Player, prompt: str, seed: int, given: Tensor | None, toy: bool):
        self.player, self.prompt, self.seed, self.given, self.toy = player, prompt, seed, given, toy
        self.changed = threading.Condition()  # held by whoever reads or writes what follows
        self.viewers: dict[int, Viewer] = {}  # the first has the keys, the others watch
        self.joined = 0
        self.paused, self.fps = False, player.meta["fps"]
        self.orders: dict[str, Any] = {}  # for the walk: a new "prompt" and, encoded, its "prompts"; "reset"
        # the walk's own
        self.leads: deque[float] = deque(maxlen=50)  # seconds from reading the keys until a chunk can be shown
        self.times: deque[tuple[float, float, int]] = deque(maxlen=100)  # of a chunk: until decoded, in all; its frames
        self.start()

    # What the requests do.

    def join(self) -> tuple[int, Viewer]:
        with self.changed:
            if len(self.viewers) >= MOST_VIEWERS:
                raise ValueError(f"{MOST_VIEWERS} pages are open already")
            self.joined += 1
            self.viewers[self.joined] = viewer = Viewer()
            viewer.messages.append(self.status())
            self.changed.notify_all()
            return self.joined, viewer

    def leave(self, number: int) -> None:
        with self.changed:
            del self.viewers[number]
            self.tell(self.status())

    def take(self, asked: dict) -> None:
        """An input of a page. Raises ValueError, in one line, if it is refused; then nothing has changed."""
        kinds = {"viewer": int, "number": int, "keys": list, "prompt": str, "seed": int, "reset": bool, "paused": bool,
                 "fps": (int, float)}
        if not isinstance(asked, dict) or not all(isinstance(asked[k], kinds.get(k, ())) for k in asked):
            raise ValueError(f"expected some of {', '.join(kinds)}")
        keys, fps, seed = (asked.get(name, usual) for name, usual in (("keys", []), ("fps", 1), ("seed", 0)))
        if not all(isinstance(key, str) and key in KEYS for key in keys):
            raise ValueError(f"keys {keys}: expected some of {', '.join(KEYS)}")
        if not 1 <= fps <= 60:
            raise ValueError(f"frames/s {fps}: expected 1 to 60")
        if not 0 <= seed < 2**63:
            raise ValueError(f"seed {seed}: expected 0 to 2**63 - 1")
        prompt = asked.get("prompt")
        self.driving(asked.get("viewer"))  # before an encoder is asked to work for it
        prompts = None if prompt is None else self.read(prompt)
        with self.changed:
            viewer = self.driving(asked.get("viewer"))
            if "keys" in asked and asked.get("number", 0) > viewer.number:  # requests may overtake each other
                viewer.tapped |= set(keys) - viewer.held
                viewer.held, viewer.number = set(keys), asked["number"]
            if prompts:
                self.orders |= {"prompt": prompt, "prompts": prompts}
            if asked.get("reset"):
                self.orders["reset"] = True
            for name in asked.keys() & {"seed", "fps", "paused"}:
                setattr(self, name, asked[name])
            self.tell(self.status())

    def driving(self, number: int | None) -> Viewer:
        with self.changed:
            viewer = self.viewers.get(number)
            if viewer is None or viewer is not self.driver():
                raise ValueError("this page watches: the one that was opened first has the keys")
            return viewer

    @torch.no_grad()
    def read(self, prompt: str) -> list[Prompt]:
        """A prompt, encoded, and with guidance the null prompt. Raises ValueError if it is not one of this world."""
        if not prompt.strip():
            raise ValueError("the prompt is empty: expected a description of the world")
        if self.toy:
            read_prompt(prompt)
        prompts = encode_prompts(self.player, [prompt], None, None, self.state.latents.shape)
        pairs = zip(prompts, self.state.prompts)  # HY's prompt also says what it is given, which stays
        return [new._replace(vision=old.vision, vision_mask=old.vision_mask, given_latents=old.given_latents)
                if isinstance(new, HYPrompt) else new for new, old in pairs]

    # What the walk does.

    def driver(self) -> Viewer | None:
        return next(iter(self.viewers.values()), None)

    def tell(self, message: bytes) -> None:
        with self.changed:
            for viewer in self.viewers.values():
                viewer.messages.append(message)
            self.changed.notify_all()

    def status(self) -> bytes:
        """All that a page shows beside the picture."""
        with self.changed:
            made, total, frames = np.array([*self.times] or [(0, 0, 0)]).T
            return packed({
                "kind": "status", "prompt": self.prompt, "seed": self.seed, "paused": self.paused, "fps": self.fps,
                "driver": next(iter(self.viewers), 0), "viewers": len(self.viewers), "world": self.world,
                "chunk_seconds": np.quantile(made, [0.5, 0.9]).tolist(), "like": self.like, "obeyed": self.obeyed,
                "real_time": frames.sum() / self.fps / max(total.sum(), 1e-9)})

    def start(self) -> None:
        """Stand at the first frame of a new video."""
        self.state = open_stream(self.player, [self.prompt], [self.seed], self.given)
        self.pose = Pose(torch.zeros(3, dtype=torch.float64), 0.0, 0.0)
        # about a second, for `truth`: frames [1 3 h w] and viewmats [4 4] of latents, one more; a chunk may hardly move
        latents = max(4, self.player.meta["chunk"])
        self.shown, self.walked = deque(maxlen=4 * latents), deque(maxlen=latents + 1)
        self.frames = 0  # shown of this video
        self.due = 0.0  # when the next is to be shown: at once
        self.like, self.obeyed = None, None  # dB of the last second: see `truth`
        self.look_up()

    def look_up(self) -> None:
        """What is true of the toy world with this prompt."""
        self.world = None
        self.scene = named_room(self.prompt) if self.toy else None
        if self.scene:
            rgb = [list(PALETTE.values())[i] for i in self.scene.colours[0, :NAMED]]
            self.world = {"room": ROOM, "pillar": PILLAR, "pillars": self.scene.pillars[0].tolist(), "colours": rgb}

    def lead(self) -> float:
        return float(np.quantile(self.leads, 0.9)) + 0.005 if self.leads else 0.0

    def wait(self) -> tuple[set[str], int] | None:
        """Until the next chunk is to be begun: its keys, and the number of their input. None: orders come first."""
        with self.changed:
            while not self.orders:
                left = self.due - self.lead() - time.perf_counter()
                if self.paused or not self.viewers:
                    self.due, left = 0.0, None
                    for viewer in self.viewers.values():
                        viewer.tapped.clear()
                elif left <= 0:
                    driver = self.driver()
                    keys, driver.tapped = driver.held | driver.tapped, set()
                    return keys, driver.number
                self.changed.wait(left)
            return None

    def obey(self) -> None:
        with self.changed:
            orders, self.orders = self.orders, {}
            self.prompt = orders.get("prompt", self.prompt)
        if "reset" in orders:
            self.start()
        elif "prompts" in orders:
            net, _, _, meta = self.player
            latents = reread(net, meta, self.state.latents, orders["prompts"])
            self.state = self.state._replace(latents=latents, prompts=orders["prompts"])
            self.look_up()
        self.tell(self.status())

    def chunk(self, keys: set[str], number: int) -> None:
        """Make the next chunk and show it."""
        began = time.perf_counter()
        meta, device = self.player.meta, self.player.device
        poses = []
        for _ in range(meta["chunk"]):
            if self.walked or poses:
                self.pose = self.pose.moved(keys, self.toy)
            poses.append(self.pose)
        viewmats = torch.stack([pose.viewmat() for pose in poses])[None]
        Ks = intrinsics(meta["K"]).expand(1, len(poses), 3, 3)
        self.state = denoise(self.player, self.state, Camera(viewmats.to(device), Ks.to(device)))

        pieces, lead = [], 0.0
        for x0, pose in zip(self.state.finished[0].split(1, dim=1), poses, strict=True):
            piece, feat_cache = decode(self.player, self.state.feat_cache, x0)
            self.state = self.state._replace(feat_cache=feat_cache)
            shown = sum(z.shape[2] for z in pieces)
            pieces.append(piece.cpu())
            ready = time.perf_counter()
            self.tell(packed({
                "kind": "frames", "first": self.frames + shown, "before": shown, "number": number, "fps": self.fps,
                "keys": sorted(keys), "pose": [*pose.centre.tolist(), pose.yaw, pose.pitch]}, pieces[-1]))
            if shown == 0:
                self.due = max(self.due, ready)
            lead = max(lead, ready - began - shown / self.fps)
        video, first = torch.cat(pieces, dim=2), self.frames
        self.frames += video.shape[2]
        self.due += video.shape[2] / self.fps
        self.state = settle(self.player, self.state)
        with self.changed:
            self.leads.append(lead)
            self.times.append((ready - began, time.perf_counter() - began, video.shape[2]))
        self.shown.extend(video.unbind(2))
        self.walked.extend(viewmats[0])
        if self.scene is not None and self.due - self.lead() - time.perf_counter() > 0.1:  # if there is time for it
            self.tell(packed({"kind": "truth", "first": first}, self.truth()[:, :, -video.shape[2] :]))
        self.tell(self.status())

    def truth(self) -> Tensor:
        """The room that explains the last second best along its path: how well, how much better than had it stood."""
        video, path = torch.stack([*self.shown], dim=2), torch.stack([*self.walked])
        K, poses = intrinsics(self.player.meta["K"]), pixel_cameras(path[None])[:, -len(self.shown) :]
        best, stood = (explain_frames(video, self.scene, z, K)[0] for z in (poses, path[None, :1].expand_as(poses)))
        went = (path - path[0]).abs().max() > 1e-4
        self.like = psnr(video, best).item()
        self.obeyed = self.like - psnr(video, stood).item() if went else None
        return best

    def run(self) -> None:
        while True:
            asked = self.wait()
            if asked is None:
                self.obey()
            else:
                self.chunk(*asked)


def packed(header: dict, video: Tensor | None = None) -> bytes:
    """A message: two lengths, a header in JSON, frames [1 3 t h w] as RGBA."""
    body = b""
    if video is not None:
        header = header | {"frames": video.shape[2], "size": video.shape[3:]}
        opaque = F.pad(to_bytes(video[0]), (0, 0, 0, 0, 0, 0, 0, 1), value=255)
        body = rearrange(opaque, "c t h w -> t h w c").numpy().tobytes()
    head = json.dumps(header).encode()
    return struct.pack("<II", len(head), len(body)) + head + body


class Handler(BaseHTTPRequestHandler):
    """GET / is the page, GET /frames its messages without end, POST /input what it asks for."""
    protocol_version, disable_nagle_algorithm, timeout = "HTTP/1.1", True, 30
    live: Live

    def log_message(self, *args) -> None:
        pass

    def parse_request(self) -> bool:
        return super().parse_request() and self.from_here()

    def from_here(self) -> bool:
        """No page of another site may speak to us, whatever name it gives this machine (DNS rebinding)."""
        names, port = ["127.0.0.1", "localhost"], self.server.server_port
        hosts = [f"{name}:{port}" for name in names] + (names if port == 80 else [])  # which browsers leave out
        origin, site = self.headers.get("Origin"), self.headers.get("Sec-Fetch-Site", "none")
        allowed = self.headers.get("Host") in hosts and site in ("none", "same-origin")
        if allowed and (origin is None or origin in [f"http://{host}" for host in hosts]):
            return True
        self.answer(403, "error: this page is for the browser of this machine")
        return False

    def begin(self, code: int, headers: dict[str, Any]) -> None:
        self.send_response(code)
        for name, value in headers.items():
            self.send_header(name, str(value))  # "Connection: close" also ends it
        self.end_headers()

    def answer(self, code: int, text: str, kind: str = "text/plain") -> None:
        body = text.encode()
        self.begin(code, {
            "Content-Type": f"{kind}; charset=utf-8", "Content-Length": len(body), "Cache-Control": "no-store",
            "X-Content-Type-Options": "nosniff",
            "Content-Security-Policy": "default-src 'self' 'unsafe-inline' blob: data:; frame-ancestors 'none'",
        } | ({"Connection": "close"} if code >= 400 else {}))
        self.wfile.write(body)

    def do_GET(self) -> None:
        if self.path == "/":
            self.answer(200, PAGE.read_text(), "text/html")
        elif self.path == "/frames":
            self.send_frames()
        else:
            self.answer(404, "error: nothing here")

    def send_frames(self) -> None:
        live = self.live
        try:
            number, viewer = live.join()
        except ValueError as error:
            return self.answer(503, f"error: {error}")
        try:
            self.begin(200, {"Content-Type": "application/octet-stream", "Cache-Control": "no-store",
                             "Connection": "close", "X-Viewer": number})
            while not self.gone():
                with live.changed:
                    live.changed.wait_for(lambda: viewer.messages, timeout=0.2)
                    messages = [viewer.messages.popleft() for _ in range(len(viewer.messages))]
                self.wfile.write(b"".join(messages))
        except OSError:  # a page that was closed, or takes nothing for half a minute
            pass
        finally:
            live.leave(number)

    def gone(self) -> bool:
        """Has the page closed its side?"""
        readable, _, _ = select.select([self.connection], [], [], 0)
        return bool(readable) and self.connection.recv(1, socket.MSG_PEEK) == b""

    def do_POST(self) -> None:
        length = self.headers.get("Content-Length", "")
        if self.path != "/input":
            self.answer(404, "error: nothing here")
        elif not re.fullmatch("[0-9]{1,6}", length) or int(length) > MOST_BYTES:
            self.answer(413, f"error: expected at most {MOST_BYTES} bytes")
        else:
            try:
                self.live.take(json.loads(self.rfile.read(int(length))))
            except (ValueError, RecursionError) as error:
                self.answer(400, f"error: {error}")
            else:
                self.answer(200, "")


class Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request, client_address) -> None:
        """A browser that hangs up is no news."""
        if not isinstance(sys.exception(), OSError):
            super().handle_error(request, client_address)


def open_server(port: int) -> Server:
    handler = type("Handler", (Handler,), {})
    try:
        return Server(("127.0.0.1", port), handler)
    except OSError as error:
        reason = os.strerror(error.errno).lower()
        raise ValueError(f"--port {port}: {reason}; --port 0 takes any that is free") from None


def live(args: argparse.Namespace) -> None:
    """Serve the page until Ctrl-C."""
    try:
        with open_server(args.port) as server:  # a port in use is known before a large network is read
            ckpt, player, text_encoder = open_player(args)
            meta = player.meta
            if not meta["chunk"]:
                raise ValueError(f"{ckpt}: --live needs a network that goes on chunk by chunk; this makes all at once")
            if player.device.type == "cpu":
                torch.set_num_threads(max(1, torch.get_num_threads() - 1))  # one core is the browser's
            _, prompts, _ = open_paths(args, ckpt, player, text_encoder)
            given = read_given(args.image, player, meta["frames"]) if args.image else None
            walk = Live(player, prompts[0], args.seed, given, toy=text_encoder is None and "caption" not in meta)
            for _ in range(3):  # warm up, so that the first frames are not late
                walk.chunk(set(), 0)
            walk.leads.clear(), walk.times.clear()
            walk.start()
            server.RequestHandlerClass.live = walk
            threading.Thread(target=server.serve_forever, daemon=True).start()
            print(f"http://127.0.0.1:{server.server_port} is the page; Ctrl-C ends it", flush=True)
            try:
                walk.run()
            finally:
                server.shutdown()
    except KeyboardInterrupt:
        say("stopped", file=sys.stderr)


# ----------------------------------------------------------------------------------------------------------------------
# 5. main: open what was asked for, check it, then walk, measure or both.


def check_flags(args: argparse.Namespace) -> None:
    """Raises ValueError for a flag that no checkpoint could make sense of."""
    if args.sampling_steps is not None and args.sampling_steps < 1:
        raise ValueError(f"--sampling-steps {args.sampling_steps}: expected at least 1")
    for name in ("window", "sink"):
        value = getattr(args, name)
        if value is not None and value < 0:
            raise ValueError(f"--{name} {value}: expected 0 or more latent frames")
    if args.guidance is not None and not math.isfinite(args.guidance):
        raise ValueError(f"--guidance {args.guidance}: expected a finite number")
    if args.out.suffix not in (".mp4", ".gif"):
        raise ValueError(f"--out {args.out}: expected a name that ends in .mp4 or .gif")
    spare_inputs(args, args.out)
    if args.preset and not (args.plan or args.bench):
        raise ValueError(f"--preset {args.preset}: of use with --plan and --bench alone; a checkpoint knows its own")
    if (args.lengths or args.given) and not args.score:
        raise ValueError(f"{'--lengths' if args.lengths else '--given'}: of use with --score alone")
    if args.lengths and args.bench:
        raise ValueError("--bench: --lengths measures no speed")
    if args.score and args.image:
        raise ValueError("--image: with --score, --given says how many frames of the true room a video goes on from")
    if args.live and (args.plan or args.bench or args.score or args.sp > 1):
        raise ValueError("--live: expected none of --plan, --bench, --score and --sp with it")
    if not 0 <= args.port < 65536:
        raise ValueError(f"--port {args.port}: expected 0 to 65535")
    if args.prompt is not None and not args.prompt.strip():
        raise ValueError("--prompt is empty: expected a description of the world")


def spare_inputs(args: argparse.Namespace, out: Path) -> None:
    """Raises ValueError if `out`, or the sheet beside it, is a file that was given to read."""
    inputs = {name: value for name in ("image", "camera", "ckpt", "vae") if (value := getattr(args, name))}
    for path in (out, out.with_suffix(".png")):
        for name, value in inputs.items():
            if path.exists() and names_a_file(str(value), Path()) and Path(value).exists() and path.samefile(value):
                raise ValueError(f"--out {args.out}: {path} would be written over, which is --{name}")


def open_device(sp: int) -> torch.device:
    """This process's. Raises ValueError unless it is one of sp processes, which share every video."""
    world_size = int(os.environ.get("WORLD_SIZE", 1))
    if world_size != sp:
        raise ValueError(f"--sp {sp}: found {world_size} processes; torchrun --nproc_per_node {sp} stream.py --sp {sp}")
    if sp == 1:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return start_process_group(sp)[2]


def say(text: str, **where) -> None:
    """print, of the processes that share a video on the first alone."""
    if sequence_rank()[0] == 0:
        print(text, **where)


def beside(ckpt: Path, *names: str) -> Path | None:
    """The first of these that lies in the checkpoint, if it is a folder, or next to it."""
    paths = [folder / name for folder in (ckpt, ckpt.parent) for name in names]
    return next((path for path in paths if path.exists()), None)


def with_flags(meta: Meta, args: argparse.Namespace) -> Meta:
    """How a network is sampled: as it says itself, but for what the flags say."""
    names = ("sampling_steps", "guidance", "window", "sink", "absolute_positions")
    meta = meta | {name: value for name in names if (value := getattr(args, name)) is not None}
    if (args.sink or args.absolute_positions) and not (meta.get("window") or args.live):
        raise ValueError(f"{'--sink' if args.sink else '--absolute-positions'}: of use with --window alone")
    if args.live and meta["chunk"] and not meta.get("window") and args.window is None:
        # a walk without end takes a window, of what the network was trained with
        meta |= {"window": meta["frames"], "sink": meta.get("sink") or meta["chunk"]}
    if args.released_cache and meta.get("window") and not meta.get("absolute_positions"):
        raise ValueError("--released-cache: what it reads cannot be moved along with a window; --absolute-positions")
    check_window(meta)
    return meta


def open_player(args: argparse.Namespace) -> tuple[Path, Player, Path | None]:
    """The checkpoint that is played, its network with VAE and encoder, and the files of the encoder, None for words."""
    device = open_device(args.sp)
    ckpt = args.ckpt or (Path("ckpt/dmd.pt") if Path("ckpt/dmd.pt").exists() else SHIPPED / "dmd.pt")
    net, meta = load_net(ckpt, device, *STAGES, compiled=args.compile)
    if args.released_cache:
        use_released_cache(net, meta, ckpt)
    vae = args.vae or beside(ckpt, "vae.pt", "Wan2.1_VAE.pth", "vae") or SHIPPED.with_name(meta["preset"]) / "vae.pt"
    if not (args.vae or vae.exists()):
        raise ValueError(f"{ckpt}: no VAE lies beside it; --vae names one")
    text_encoder = args.text_encoder or beside(ckpt, "models_t5_umt5-xxl-enc-bf16.pth", "text_encoder")
    encoder = load_encoder(meta["preset"], text_encoder, device)
    meta = with_flags(meta, args)
    say(f"{ckpt}: stage {meta['stage']}, trained for {meta['step']} steps; {meta['sampling_steps']} sampling steps, "
        f"guidance {meta['guidance']:g}", file=sys.stderr)
    return ckpt, Player(net, load_vae(vae, device, meta["vae_fingerprint"]), encoder, meta), text_encoder


def open_paths(args: argparse.Namespace, ckpt: Path, player: Player, text_encoder: Path | None):
    """The paths to walk, a prompt for each, and the player, its prompts read. Raises ValueError for any bad one."""
    net, _, encoder, meta = player
    paths = read_camera(PATH if args.camera is None else args.camera, meta["fps"])
    if text_encoder and not args.prompt and not all(path.prompt for path in paths):
        raise ValueError(f"--prompt: expected a description of the world, which {ckpt} reads through {text_encoder}")
    if text_encoder and encoder.encode_image and not args.image:
        say("warning: this network was trained almost only with a first image; --image gives it one", file=sys.stderr)
    for path in paths:
        if (intrinsics(path.K or meta["K"]) - intrinsics(meta["K"])).abs().max() > 1e-3 and not args.other_intrinsics:
            raise ValueError(f"{args.camera}: K {path.K}, but {ckpt} was trained with {meta['K']}; "
                             "--other-intrinsics to insist")
    prompts = [args.prompt or path.prompt or meta.get("caption") or TOY_PROMPT for path in paths]
    texts = {prompt: encoder.encode_text(prompt) for prompt in dict.fromkeys([*prompts, encoder.null])}
    found = next(iter(texts[encoder.null].values())).shape[-1]
    if found != net.cfg.text_dim:
        raise ValueError(f"{ckpt}: its prompts have {net.cfg.text_dim} channels, found {found}; see --text-encoder")
    if text_encoder and not args.bench:  # drop the text encoder before the walk to free memory
        player = player._replace(encoder=encoder._replace(encode_text=texts.__getitem__))
    return paths, prompts, player


def walk(args: argparse.Namespace, player: Player, path: CameraPath, prompt: str, out: Path) -> None:
    """One path -> a video, and a contact sheet: below the room that explains it best, if it is of the toy world.

    Frames are written as they are made, and only those that the sheet shows are kept.
    """
    meta, f = player.meta, len(path.viewmats)
    K = intrinsics(path.K or meta["K"])
    if f > meta["frames"]:
        window = meta.get("window", 0)
        bound = f": a window of {window} goes along" if window else ""
        say(f"the path has {f} latent frames, trained were {meta['frames']}{bound}", file=sys.stderr)
    given = read_given(args.image, player, f) if args.image else None
    camera = Camera(path.viewmats[None], K.expand(1, f, 3, 3))
    keys = pressed(path.viewmats) if args.keys else None
    every = 4 * math.ceil(f / 16)  # of the pixel frames, so that a sheet has at most 16
    shown, made = [], 0

    def pieces() -> Iterator[np.ndarray]:
        """Pieces of the video in bytes [n h w 3], small ones enlarged by whole pixels."""
        nonlocal made
        chunks = stream(player, [prompt], camera, [args.seed], given)
        for video in tqdm(chunks, "chunks", disable=sequence_rank()[0] > 0):
            shown.append(video[:, :, -made % every :: every].cpu())
            images = rearrange(to_bytes(video[0]).cpu(), "c t h w -> t h w c").numpy()
            zoom = max(1, 256 // images.shape[1])
            images = images.repeat(zoom, 1).repeat(zoom, 2)
            for t, image in enumerate(images, made):
                if keys is not None:
                    draw_keys(image, keys[math.ceil(t / 4)])  # of the latent frame that shows pixel frame t
            made += len(images)
            yield images

    if sequence_rank()[0] > 0:
        for _ in pieces():  # the first of the ranks that share a video writes it
            pass
        return
    write_video(out, pieces(), meta["fps"])

    sheet = [torch.cat(shown, dim=2)]
    room = None if "caption" in meta else named_room(prompt)  # of other videos there is no ground truth to show
    if room:
        poses = path.viewmats[None, :: every // 4]  # pixel frame 4i is seen from pose i
        sheet.insert(0, explain_frames(sheet[0], room, poses, K)[0])
    write_sheet(out.with_suffix(".png"), sheet, every=1)
    say(f"{out}: {made} frames. {out.with_suffix('.png')}: every {'fourth' if every == 4 else f'{every}th'} of them"
        + (", below the same path through the room that explains them best" if len(sheet) > 1 else ""))


def main(args: argparse.Namespace) -> None:
    check_flags(args)
    if args.live:
        return live(args)
    if args.plan:
        return print_plan(plan(args.preset or "tiny", settings_of_preset(args)))
    if args.preset:
        player, camera, image = random_player(args)
        found = bench(player, "", camera, image)
        card, peak = card_name(), peak_memory(player.device) / 1e9
        return say(json.dumps({"preset": args.preset, "card": card, "peak_gb": peak} | found))
    ckpt, player, text_encoder = open_player(args)
    if args.score and text_encoder:
        raise ValueError(f"--score measures the toy world, but {ckpt} reads its prompts through {text_encoder}")
    paths, prompts, player = open_paths(args, ckpt, player, text_encoder)
    meta = player.meta

    if args.score and args.lengths:
        rows, sheet = score_lengths(player, args)
        about = {"stage": meta["stage"], "steps": meta["sampling_steps"], "window": meta.get("window", 0),
                 "sink": meta.get("sink", 0), "absolute_positions": meta.get("absolute_positions", False),
                 "scenes": args.scenes, "seed": args.seed, "score_seed": args.score_seed}
        for row in rows:
            say(json.dumps(row | about))
        if sequence_rank()[0] == 0:
            write_sheet(args.out.with_suffix(".png"), sheet, every=1)
        return
    if args.bench or args.score:
        views = paths[0].viewmats
        camera = Camera(views[None], intrinsics(meta["K"]).expand(1, len(views), 3, 3))
        timing = bench(player, prompts[0], camera, read_given(args.image, player, len(views)) if args.image else None)
        if args.bench:
            say(json.dumps(timing | {"peak_gb": peak_memory(player.device) / 1e9}))
        if args.score:
            row, sheet = score(player, args)
            row |= {name: timing[name] for name in ("fps", "first_frame_s")}
            row |= {"stage": meta["stage"], "steps": meta["sampling_steps"], "guidance": meta["guidance"],
                    "scenes": args.scenes, "given": args.given, "seed": args.seed, "score_seed": args.score_seed}
            say(json.dumps(row))
            if sequence_rank()[0] == 0:
                write_sheet(args.out.with_suffix(".png"), sheet)
        return

    outs = [args.out] if len(paths) == 1 else [
        args.out.with_name(f"{args.out.stem}-{path.name}{args.out.suffix}") for path in paths]
    for out in outs:
        spare_inputs(args, out)
    for path, prompt, out in zip(paths, prompts, outs, strict=True):
        walk(args, player, path, prompt, out)


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="replace")  # no console stops a run over a letter that it lacks
    try:
        main(parse_args())
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    if dist.is_initialized():
        dist.destroy_process_group()
