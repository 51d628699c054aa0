"""
Everything frozen, and everything that becomes a batch.

    1. Cameras      poses, intrinsics, and the one grammar of trajectories
    2. Toy world    rooms ray-cast in torch: the data set, the base model and the ground truth of a laptop
    3. Prompts      what an encoder makes of them; a deterministic stand-in for umT5
    4. Batches      the folder of latents that a run reads, and get_batch, a pure function of (seed, step, part)
    5. Making       the toy world: render it, fit its VAE, write its latents
    ---- the course ends here ----
    6. Pose files   COLMAP, nerfstudio, TUM and a dozen others; poses of some frames; lenses
    7. Encoders     umT5, Qwen2.5-VL, byT5, SigLIP, and HY's stand-ins
    8. Videos       real ones with captions and cameras: look, judge, encode, report; pictures of what came out
    9. Noise        in the place of all data, to plan and to time training
    10. main        $ python data.py                        render the toy world, fit its VAE, write its latents
                    $ python data.py --videos clips         the latents of your own videos instead
                    $ python data.py --inspect data/videos  draw frames and camera paths of a latents folder

Cameras are OpenCV (x right, y down, z forward) and world-to-camera, the first frame is the identity, and intrinsics are
divided by image width and height: K = (fx/W, fy/H, cx/W, cy/H). Geometry stays in fp32.
"""
import argparse
import base64
import csv
import html
import io
import json
import math
import re
import signal
import struct
import subprocess
import sys
import tempfile
import textwrap
import zlib
from bisect import bisect_left, bisect_right
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from functools import lru_cache
from itertools import groupby, pairwise
from pathlib import Path
from statistics import median_high
from typing import IO, Any, NamedTuple

import imageio.v3 as imageio
import imageio_ffmpeg
import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from einops import rearrange, reduce
from PIL import Image, ImageOps
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm import tqdm

from model import (
    PRESETS, Camera, HYDiT, HYPrompt, Meta, build_vae, check_same_tensors, fingerprint, invert_se3, load_checkpoint,
    load_vae, point_to, rollout, save_checkpoint, start_process_group, tree_map,
)

# ----------------------------------------------------------------------------------------------------------------------
# 1. Cameras.

STEP, TURN = 0.08, math.radians(3.0)  # world units and radians per latent frame; minWM's and WorldPlay's data
KEYS = {  # key: (help text, translation along the camera's own axes, yaw, pitch)
    "w": ("forward", (0, 0, STEP), 0, 0),
    "s": ("backward", (0, 0, -STEP), 0, 0),
    "a": ("left", (-STEP, 0, 0), 0, 0),
    "d": ("right", (STEP, 0, 0), 0, 0),
    "u": ("up", (0, -STEP, 0), 0, 0),
    "dn": ("down", (0, STEP, 0), 0, 0),
    "j": ("look left", (0, 0, 0), -TURN, 0),
    "l": ("look right", (0, 0, 0), TURN, 0),
    "i": ("look up", (0, 0, 0), 0, TURN),
    "k": ("look down", (0, 0, 0), 0, -TURN),
}
STILL = {"still": ("stand", (0, 0, 0), 0, 0)}  # no key at all
WORDS = {"left": "j", "right": "l", "up": "i", "down": "k"}  # HY-WorldPlay's data says right-8,a-11 for l*8,a*11
GRAMMAR = "keys: " + ", ".join(f"{key} {text}" for key, (text, *_) in (KEYS | STILL).items()) + (
    f"; each for one latent frame ({STEP} units or {math.degrees(TURN):g} degrees); w*4 or w-4 repeats, w+l is both at "
    "once, commas follow one another: 'w*4,w+l*3'")
K_WIDE = (0.5050505, 0.89786756, 0.5, 0.5)  # 16:9, the intrinsics of minWM's training data
K_SQUARE = (0.5050505, 0.5050505, 0.5, 0.5)  # the same field of view on square images


def rotation(yaw: Tensor, pitch: Tensor) -> Tensor:
    """R_y(yaw) R_x(pitch) [... 3 3]: positive yaw looks right, positive pitch looks up."""
    cy, sy = torch.cos(yaw), torch.sin(yaw)
    cp, sp = torch.cos(pitch), torch.sin(pitch)
    zero = torch.zeros_like(cy)
    rows = [cy, sy * sp, sy * cp, zero, cp, -sp, -sy, cy * sp, cy * cp]
    return rearrange(torch.stack(rows, dim=-1), "... (i j) -> ... i j", i=3)


def parse_trajectory(text: str) -> Tensor:
    """'w*4,w+l*3' -> viewmats [f 4 4] fp32, f = 1 + number of steps. Raises ValueError naming the offending part.

    Each step turns first, then moves along the new axes: c2w <- c2w . R . t, as minWM's training data does. Built as
    camera-to-world, where a step is a product from the right; returned as world-to-camera.
    """
    c2w = torch.eye(4, dtype=torch.float64)
    poses = [c2w]
    for part in text.replace(" ", "").split(","):
        match = re.fullmatch(r"([a-z+]+)(?:[*-]([0-9]{1,4}))?", part)  # w, w*4, w-4, w+l*4
        keys = [WORDS.get(key, key) for key in match[1].split("+")] if match else []
        count = int(match[2] or 1) if match else 0
        if count == 0 or not (set(keys) <= set(KEYS) or keys == ["still"]):
            raise ValueError(f"trajectory {text!r}: cannot read {part!r}. {GRAMMAR}")
        move, yaw, pitch = (torch.tensor([(KEYS | STILL)[key][n] for key in keys], dtype=torch.float64).sum(0)
                            for n in (1, 2, 3))
        step = torch.eye(4, dtype=torch.float64)
        step[:3, :3] = rotation(yaw, pitch)
        step[:3, 3] = step[:3, :3] @ move
        for _ in range(count):
            c2w = c2w @ step
            poses.append(c2w)
    return invert_se3(torch.stack(poses)).float()


def intrinsics(K: tuple[float, ...] | list[float]) -> Tensor:
    """(fx, fy, cx, cy), normalised by width and height -> [3 3] fp32. Raises ValueError when out of range."""
    numbers = isinstance(K, (list, tuple)) and len(K) == 4 and all(isinstance(k, (int, float)) for k in K)
    if not numbers or not all(math.isfinite(k) for k in K) or not all(0.05 < k < 20 for k in K[:2]):
        raise ValueError(f"K {K}: expected (fx/W, fy/H, cx/W, cy/H) with focal lengths between 0.05 and 20, not pixels")
    fx, fy, cx, cy = K
    if not (0 <= cx <= 1 and 0 <= cy <= 1):
        raise ValueError(f"K {K}: the principal point (cx, cy) lies outside the image, expected between 0 and 1")
    return torch.tensor([[fx, 0, cx], [0, fy, cy], [0, 0, 1]], dtype=torch.float32)


def pixel_cameras(viewmats: Tensor) -> Tensor:
    """One pose per latent frame [b f 4 4] -> one per pixel frame [b t 4 4], t = 1 + 4 (f - 1).

    Latent frame i shows pixel frames 4i-3 .. 4i, so pose i belongs to the last of them; between two poses the camera
    turns about a fixed axis and its centre moves on a straight line.
    """
    c2w = invert_se3(viewmats.double())
    quarters = torch.arange(1, 5, dtype=torch.float64, device=viewmats.device) / 4
    poses = invert_se3(between_poses(c2w[:, :-1, None], c2w[:, 1:, None], quarters))
    return torch.cat([viewmats[:, :1].double(), rearrange(poses, "b f s i j -> b (f s) i j")], dim=1).float()


def between_poses(a: Tensor, b: Tensor, share: Tensor) -> Tensor:
    """Camera-to-world [... 4 4], fp64, a share [...] of the way from a to b: turned about a fixed axis, moved on a
    straight line."""
    s = share[..., None, None]
    turn = a[..., :3, :3].mT @ b[..., :3, :3]
    angle = torch.arccos(((turn.diagonal(dim1=-2, dim2=-1).sum(-1) - 1) / 2).clamp(-1, 1))[..., None, None]
    axis = (turn - turn.mT) / (2 * angle.sin()).clamp_min(1e-12)  # cross-product matrix of the unit axis
    partial = torch.eye(3, dtype=torch.float64, device=a.device)
    partial = partial + (s * angle).sin() * axis + (1 - (s * angle).cos()) * (axis @ axis)  # Rodrigues
    R = a[..., :3, :3] @ partial
    centre = torch.lerp(a[..., :3, 3:], b[..., :3, 3:], s)
    bottom = a.new_tensor([0, 0, 0, 1]).expand(*R.shape[:-2], 1, 4)
    return torch.cat([torch.cat([R, centre], dim=-1), bottom], dim=-2)


def pressed(viewmats: Tensor) -> list[set[str]]:
    """Which keys would make each step of a path [f 4 4]: one set per latent frame, the first empty."""
    c2w = invert_se3(viewmats.double())
    keys: list[set[str]] = [set()]
    for a, b in zip(c2w, c2w[1:]):
        step = invert_se3(a) @ b  # R t, as parse_trajectory makes it
        move, turn = step[:3, :3].T @ step[:3, 3], step[:3, 2]  # along the new axes; where the view goes
        amounts = {"d": move[0], "a": -move[0], "dn": move[1], "u": -move[1], "w": move[2], "s": -move[2],
                   "l": turn[0], "j": -turn[0], "i": -turn[1], "k": turn[1]}
        least = {key: (TURN if key in "jlik" else STEP) / 3 for key in amounts}
        keys.append({key for key, amount in amounts.items() if amount > least[key]})
    return keys


# ----------------------------------------------------------------------------------------------------------------------
# 2. Toy world. A room seen from inside, with two pillars. The prompt names every colour and where the pillars stand; on
# each of the 16 panels of walls, floor and ceiling hangs a picture in one of three inks, and which one the prompt does
# *not* say. So a generated video can be checked against the one room that explains it best, and a model still has
# something to invent.

PALETTE = {
    "red": (0.86, 0.16, 0.16), "orange": (0.95, 0.55, 0.12), "yellow": (0.93, 0.88, 0.20), "green": (0.16, 0.66, 0.24),
    "cyan": (0.20, 0.80, 0.84), "blue": (0.18, 0.30, 0.88), "purple": (0.62, 0.22, 0.78), "white": (0.92, 0.92, 0.90),
}
SURFACES = ("left wall", "right wall", "far wall", "floor", "ceiling", "pillar", "pillar", "back wall")
NAMED = len(SURFACES) - 1  # nobody names the wall behind the first camera; it is grey
# The inks are equally bright and equally far from grey, and grey is their mean: what a model shows that cannot decide.
# Their complements, as far from grey on the other side, are in no room: who finds inks in noise finds as many decoys.
INKS = {"teal": (0.24, 0.63, 0.63), "violet": (0.63, 0.24, 0.63), "olive": (0.63, 0.63, 0.24)}
DECOYS = tuple(tuple(1 - c for c in ink) for ink in INKS.values())
GREY = (0.5, 0.5, 0.5)
FILLS = (*INKS.values(), *DECOYS, GREY)  # what a picture is compared with; a room has one of the first three
ROOM = ((-1.0, 1.0), (-0.7, 0.7), (-0.9, 1.6))  # x, y, z around the first camera
PILLAR = 0.13  # half width
PILLAR_X, PILLAR_Z = {"left": -0.5, "middle": 0.0, "right": 0.5}, {"near": 0.85, "far": 1.25}
CLEAR = (0.7, 0.4, 0.6)  # how far a path may lead from the first camera, so that it stays clear of walls and pillars
FPS = 16
# Panels are counted surface by surface from the first given here: two side by side; on floor and ceiling two such rows.
FIRST_PANEL = {"left wall": 0, "right wall": 2, "far wall": 4, "floor": 6, "ceiling": 10, "back wall": 14}
N_PANELS = 16  # whatever has no picture, pillars and the wall around a picture, counts as one more
FRAMED = 0.78  # of a panel's sides is picture, the rest bare wall


class Scene(NamedTuple):
    """A batch of rooms."""
    colours: Tensor  # [b 8] index into PALETTE, per surface (the back wall's is ignored)
    pillars: Tensor  # [b 2 2] x and z of the two centres
    inks: Tensor  # [b 16] index into INKS, per panel: the part that is chance


class Hits(NamedTuple):
    """What each ray meets, at twice the image size (2x2 rays a pixel), each [b t 2h 2w]."""
    surface: Tensor  # index into SURFACES
    panel: Tensor  # whose picture; N_PANELS: none
    shade: Tensor


def sample_prompt(rng: torch.Generator) -> str:
    """A random room in words: five surfaces by colour, two pillars by colour and place."""
    names = list(PALETTE)
    colours = [names[i] for i in torch.randint(len(names), (NAMED,), generator=rng)]
    xs = torch.randperm(3, generator=rng)[:2]
    zs = torch.randint(2, (2,), generator=rng)
    parts = [f"{colour} {surface}" for colour, surface in zip(colours[:5], SURFACES)]
    for x, z, colour in zip(xs, zs, colours[5:], strict=True):
        parts.append(f"{list(PILLAR_Z)[z]} {list(PILLAR_X)[x]} {colour} pillar")
    return ", ".join(parts)


def read_prompt(prompt: str) -> tuple[Tensor, Tensor]:
    """A toy prompt -> colours [8], pillars [2 2]. Raises ValueError when it is not of the toy world's form."""
    words = [part.split() for part in prompt.lower().split(",")]
    colours, pillars = [], []
    for part, surface in zip(words, SURFACES):
        n = len(surface.split())
        if len(part) <= n or part[-n:] != surface.split() or part[-n - 1] not in PALETTE:
            raise ValueError(f"prompt {prompt!r}: expected '<colour> {surface}', found {' '.join(part)!r}")
        colours.append(list(PALETTE).index(part[-n - 1]))
        if surface == "pillar":
            if len(part) != 4 or part[0] not in PILLAR_Z or part[1] not in PILLAR_X:
                raise ValueError(f"prompt {prompt!r}: expected 'near|far left|middle|right <colour> pillar'")
            pillars.append((PILLAR_X[part[1]], PILLAR_Z[part[0]]))
    if len(words) != NAMED:
        raise ValueError(f"prompt {prompt!r}: expected {NAMED} parts as in {sample_prompt(torch.Generator())!r}")
    return torch.tensor([*colours, 0]), torch.tensor(pillars)


def sample_path(rng: torch.Generator, steps: int) -> str:
    """A random trajectory of one to three movements that stays clear of walls and pillars."""
    moves, turns = ["w", "s", "a", "d", "u", "dn"], ["j", "l", "i", "k"]
    while True:
        order = torch.randperm(steps - 1, generator=rng)
        cuts = order[: torch.randint(3, (), generator=rng)].sort().values + 1  # none, one or two
        parts = []
        for length in torch.tensor([0, *cuts, steps]).diff().tolist():
            move = moves[torch.multinomial(torch.tensor([3, 3, 3, 3, 1, 1.0]), 1, generator=rng)]
            turn = turns[torch.multinomial(torch.tensor([3, 3, 1, 1.0]), 1, generator=rng)]
            kind = torch.multinomial(torch.tensor([4, 3, 3.0]), 1, generator=rng).item()
            parts.append(f"{(move, turn, f'{move}+{turn}')[kind]}*{length}")
        path = ",".join(parts)
        centre = invert_se3(parse_trajectory(path))[:, :3, 3]
        if (centre.abs() < torch.tensor(CLEAR)).all():
            return path


def held_out(text: str) -> bool:
    """One prompt, and one path, in eight is never trained on: which ones is a property of the text alone."""
    return zlib.crc32(text.encode()) % 8 == 0


def sample_toy(count: int, seed: int, steps: int, held: bool) -> tuple[list[str], list[str], Scene]:
    """Prompts, paths and scenes, all held out or none."""
    rng = torch.Generator().manual_seed(seed)
    prompts: list[str] = []
    while len(prompts) < count:
        prompt = sample_prompt(rng)
        if held_out(prompt) == held:
            prompts.append(prompt)
    paths: list[str] = []
    while len(paths) < count:
        path = sample_path(rng, steps)
        if held_out(path) == held:
            paths.append(path)
    rooms = [read_prompt(prompt) for prompt in prompts]
    colours = torch.stack([colours for colours, _ in rooms])
    pillars = torch.stack([pillars for _, pillars in rooms])
    inks = torch.randint(len(INKS), (count, N_PANELS), generator=rng)
    return prompts, paths, Scene(colours, pillars, inks)


def cast(pillars: Tensor, viewmats: Tensor, K: Tensor, size: int) -> Hits:
    """pillars [b 2 2], viewmats [b t 4 4], K [3 3] -> what each ray of a size x size image meets."""
    # a ray through the middle of each quarter of a pixel, in the camera's axes, then in the world's
    grid = (torch.arange(2 * size, dtype=torch.float32) + 0.5) / (2 * size)
    y, x = torch.meshgrid((grid - K[1, 2]) / K[1, 1], (grid - K[0, 2]) / K[0, 0], indexing="ij")
    ray = torch.stack([x, y, torch.ones_like(x)])
    c2w = invert_se3(viewmats)
    d = torch.einsum("btij,jhw->ibthw", c2w[..., :3, :3], ray)  # direction [3 b t 2h 2w]
    d = torch.where(d.abs() < 1e-6, 1e-6, d)  # divided by below
    o = rearrange(c2w[..., :3, 3], "b t i -> i b t 1 1")  # origin

    # seen from inside, a ray leaves the box through the nearest of the three walls it runs towards
    lo, hi = (torch.tensor(bound).view(3, 1, 1, 1, 1) for bound in zip(*ROOM, strict=True))
    distance, axis = ((torch.where(d > 0, hi, lo) - o) / d).min(dim=0)
    positive = d.gather(0, axis[None])[0] > 0
    wall = torch.tensor([[0, 4, 7], [1, 3, 2]])[positive.long(), axis]  # +y is the floor
    for n in range(2):  # a pillar, from outside: the ray is in it once it is between both pairs of faces
        centre = rearrange(pillars[:, n], "b i -> i b 1 1 1")
        a, b = ((centre + side * PILLAR - o[[0, 2]]) / d[[0, 2]] for side in (-1, 1))
        enter, face = torch.minimum(a, b).max(dim=0)
        leave = torch.maximum(a, b).min(dim=0).values
        hit = (enter < leave) & (enter > 0) & (enter < distance)
        distance = torch.where(hit, enter, distance)
        wall = torch.where(hit, 5 + n, wall)
        axis = torch.where(hit, 2 * face, axis)

    # where on its surface, along the two axes that lie in it, counted in panels
    side = axis == 0
    flat = (wall == 3) | (wall == 4)  # floor and ceiling
    pillar = (wall == 5) | (wall == 6)
    x, y, z = ((p - start) / (end - start) for p, (start, end) in zip(o + distance * d, ROOM, strict=True))
    u, v = 2 * torch.where(side, z, x), torch.where(flat, 2 * z, y)
    column, row = (p.floor().clamp(0, 1).long() for p in (u, v))
    framed = ((u - column - 0.5).abs() < FRAMED / 2) & ((v - row - 0.5).abs() < FRAMED / 2)
    first = torch.tensor([FIRST_PANEL.get(name, 0) for name in SURFACES])[wall]
    panel = torch.where(framed & ~pillar, first + column + 2 * row, N_PANELS)
    facing = torch.tensor([0.80, 0.88, 0.95, 1.0, 0.90, 0.95, 0.95, 0.85])[wall] - 0.15 * (pillar & side).float()
    return Hits(wall, panel, shade=facing / (1 + 0.12 * distance))


def paint(hits: Hits, colours: Tensor, fills: Tensor) -> Tensor:
    """Colours [b 8] and fills [b 16], a room's inks, on what the rays met -> video [b 3 t h w] in [-1, 1]."""
    rgb = torch.tensor([*PALETTE.values(), GREY, *FILLS])
    batch = torch.arange(len(colours)).view(-1, 1, 1, 1)
    bare = torch.where(hits.surface == NAMED, len(PALETTE), colours[batch, hits.surface])
    picture = len(PALETTE) + 1 + F.pad(fills, (0, 1))[batch, hits.panel]
    rays = rgb.mT[:, torch.where(hits.panel == N_PANELS, bare, picture)] * hits.shade  # [3 b t 2h 2w]
    return 2 * rearrange(F.avg_pool2d(rays.flatten(0, 1), 2), "(c b) t h w -> b c t h w", c=3) - 1


def render(scene: Scene, viewmats: Tensor, K: Tensor, size: int) -> Tensor:
    """scene of b rooms, one pose per latent frame [b f 4 4] -> video [b 3 t size size] in [-1, 1]."""
    return paint(cast(scene.pillars, pixel_cameras(viewmats), K, size), scene.colours, scene.inks)


def fill_errors(video: Tensor, hits: Hits, colours: Tensor) -> Tensor:
    """Squared error of every frame's every panel under each of FILLS [b t 17 7], summed over the pixels that show some
    of its picture; the last is of all other pixels, which are the same under all of them."""
    panel = reduce(hits.panel, "b t (h p) (w q) -> b t (h w)", "min", p=2, q=2)

    def per_panel(z: Tensor) -> Tensor:  # [b t h w] -> [b t 17]
        return torch.zeros(*z.shape[:2], N_PANELS + 1).scatter_add_(2, panel, z.flatten(2))

    # a fill m from grey adds 2 share m to a pixel, of which `share` is picture, and so to what it is off
    off = paint(hits, colours, torch.full((len(colours), N_PANELS), FILLS.index(GREY))) - video
    share = reduce(hits.shade * (hits.panel < N_PANELS), "b t (h p) (w q) -> b t h w", "mean", p=2, q=2)
    m = torch.tensor(FILLS) - torch.tensor(GREY)
    squared, energy = per_panel(off.square().sum(1)), per_panel((2 * share).square())
    along = torch.stack([per_panel(2 * share * channel) for channel in off.unbind(1)], dim=-1)
    return squared[..., None] + 2 * along @ m.mT + energy[..., None] * m.square().sum(-1)


def best_inks(errors: Tensor) -> Tensor:
    """fill_errors [b t 17 7] -> the ink in which each picture explains all frames best [b 16]."""
    return errors.sum(1)[:, :N_PANELS, : len(INKS)].argmin(-1)


def panels_seen(hits: Hits, least: float) -> Tensor:
    """Which pictures cover at least `least` pixels in some frame [b 16]."""
    panel = hits.panel.flatten(2)
    rays = torch.zeros(*panel.shape[:2], N_PANELS + 1).scatter_add_(2, panel, torch.ones(panel.shape))
    return (rays / 4).amax(1)[:, :N_PANELS] >= least


def psnr(a: Tensor, b: Tensor) -> Tensor:
    """[b 3 t h w] in [-1, 1] -> dB per video [b]."""
    return 10 * torch.log10(4 / (a - b).square().mean((1, 2, 3, 4)).clamp_min(1e-10))


def explain(video: Tensor, scene: Scene, viewmats: Tensor, K: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The best-explaining render [b 3 t h w], its inks [b 16], and which pictures are large enough to tell [b 16]."""
    return explain_frames(video, scene, pixel_cameras(viewmats), K)


def explain_frames(video: Tensor, scene: Scene, poses: Tensor, K: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """As `explain`, of any frames: poses [b t 4 4] has one for each."""
    hits = cast(scene.pillars, poses, K, video.shape[-1])
    inks = best_inks(fill_errors(video, hits, scene.colours))
    return paint(hits, scene.colours, inks), inks, panels_seen(hits, 24)


def control_margin(video: Tensor, prompts: list[str], viewmats: Tensor, K: Tensor) -> float:
    """By how many dB the room that explains each video [b 3 t h w] best, seen along its path, beats the same along the
    path of another, less what the video's middle frame alone gets that way: how well the camera is obeyed. A video that
    stands still scores 0; one of blur or noise about 0.

    Raises ValueError when a prompt is not of the toy world, of which alone the truth is known.
    """
    rooms = [read_prompt(prompt) for prompt in prompts]
    inks = torch.zeros(len(rooms), N_PANELS, dtype=torch.long)
    scene = Scene(torch.stack([colours for colours, _ in rooms]), torch.stack([pillars for _, pillars in rooms]), inks)

    def margin(video: Tensor) -> Tensor:
        own, other = (psnr(video, explain(video, scene, path, K)[0]) for path in (viewmats, viewmats.roll(1, 0)))
        return own - other

    middle = video.shape[2] // 2
    held = video[:, :, middle : middle + 1].expand_as(video)  # halfway along a path, much of the rest is in view
    return (margin(video) - margin(held)).mean().item()


# ----------------------------------------------------------------------------------------------------------------------
# 3. Prompts. What encodes them is frozen, so it is asked once, while latents are made. The toy world has a stand-in for
# umT5 that needs no download: each word has a fixed random vector, and a token carries its own word and the two before
# it, so that "red left wall" is not "left red wall". Zero rows pad, as in Wan.

WORD_DIM = 32
TEXT_LEN, TEXT_DIM = 32, 3 * WORD_DIM


class Encoder(NamedTuple):
    """What turns prompts, and for HY the first frames of videos, into what a network reads."""
    name: str
    encode_text: Callable[[str], dict[str, Tensor]]  # a prompt -> embeds [l d], or for HY text and byt5, unpadded
    length: int | None  # that prompts are padded to with zeros; None: to the longest of a batch, with masks
    encode_image: Callable[[Tensor], Tensor] | None  # images [b 3 H W] in [-1, 1] -> [b l d]; Wan has none
    null: str  # the prompt that guidance steers away from


@lru_cache(maxsize=4096)
def word_vector(word: str) -> Tensor:
    return torch.randn(WORD_DIM, generator=torch.Generator().manual_seed(zlib.crc32(word.encode())))


def encode_words(prompt: str) -> Tensor:
    """prompt -> [32 96], zero past its end; the empty prompt is the null prompt. Raises ValueError past 32 words."""
    words = prompt.lower().replace(",", " ").split()
    if len(words) > TEXT_LEN:
        raise ValueError(f"prompt {prompt!r}: {len(words)} words, expected at most {TEXT_LEN}")
    vectors = [torch.zeros(WORD_DIM)] * 2 + [word_vector(word) for word in words]
    tokens = torch.zeros(TEXT_LEN, TEXT_DIM)
    for i in range(2, len(vectors)):
        tokens[i - 2] = torch.cat([vectors[i], vectors[i - 1], vectors[i - 2]])
    return tokens


def trimmed(z: Tensor) -> Tensor:
    """One prompt [l d] without the zeros past its end."""
    return z[: int(z.any(-1).sum())]


def collate_prompts(rows: list[dict[str, Tensor]], null: dict[str, Tensor], length: int | None,
                    vision: Tensor | None = None, first: Tensor | None = None) -> tuple:
    """The encoded prompts of a batch, and the null prompt -> both as a network takes them, b each.

    Wan: [b length d], zero past their ends. HY: HYPrompts, padded to the longest, with masks, and with an image to go
    on from: vision [b l d] is what the encoder made of it, zero where there is none, and first [b 1 c h w] its latents.
    """
    if "embeds" not in null:
        return collate_hy_prompts(rows, null, vision, first)
    embeds = nn.utils.rnn.pad_sequence([row["embeds"] for row in (*rows, null)], batch_first=True)
    embeds = F.pad(embeds, (0, 0, 0, max(length or 1, embeds.shape[1]) - embeds.shape[1]))
    prompt = embeds[:-1]
    return prompt, embeds[-1:].expand_as(prompt)


# ----------------------------------------------------------------------------------------------------------------------
# 4. Batches. A folder of safetensors shards, read through memory maps: latents [n f c h w] fp16, viewmats [n f 4 4] and
# Ks [n f 3 3] fp32, prompt_ids [n], for HY also vision [n l d]; and prompts.safetensors, the encoded prompts one after
# another, the null prompt last: embeds [l d] fp16, or for HY text and byt5; embeds_ends [n] is where each ends.


class Batch(NamedTuple):
    """What a stage trains on. Every random number that a sample needs comes from a stream of its own, in the order in
    which it is asked for: the same on any device, on any number of ranks, and whatever else is in the batch."""
    x0: Tensor  # [b f c h w] fp32, clean latents
    prompt: Any  # [b l d], or HY's HYPrompt
    null: Any  # alike, the prompt that guidance steers away from; HY's keeps the image
    camera: Camera  # viewmats [b f 4 4], Ks [b f 3 3]
    generated: Tensor  # [b f]: 1 on frames that the model makes, 0 on given ones, which stay clean and have no loss
    rng: list[torch.Generator]  # the samples' streams of random numbers
    ids: list[int]  # rows of the data set
    states: Tensor | None  # [b n f c h w], of a folder of ODE pairs (distill_ode.py): on the way from noise to x0

    def rand(self, *shape: int) -> Tensor:
        """Uniform numbers in [0, 1), [b *shape]."""
        return torch.stack([torch.rand(shape, generator=g) for g in self.rng]).to(self.x0.device)

    def chance(self, prob: float) -> Tensor:
        """True with this probability [b]. On the CPU, where a prompt's masks are (HYPrompt)."""
        return torch.cat([torch.rand(1, generator=g) for g in self.rng]) < prob

    def rand_per_chunk(self, chunk: int) -> Tensor:
        """Uniform numbers in [0, 1), one per chunk of frames, the last of which may be short: [b f]."""
        f = self.x0.shape[1]
        return self.rand(math.ceil(f / chunk)).repeat_interleave(chunk, dim=1)[:, :f]

    def noise(self, frames: slice = slice(None)) -> Tensor:
        """Normal noise of the latents' shape [b f c h w], or of some of their frames'."""
        shape = self.x0[0, frames].shape
        return torch.stack([torch.randn(shape, generator=g) for g in self.rng]).to(self.x0.device)


class Latents(NamedTuple):
    """An open latents folder: memory maps, nothing read yet."""
    folder: Path
    shards: list  # of safetensors' files
    starts: list[int]  # first row of each shard, and the total
    rows: list[int]  # those that count: what was dropped from a folder stays in its shard
    weights: tuple[float, ...]  # how often each of them is drawn, beside others; () where all are alike
    prompts: Any  # safetensors' file of the encoded prompts
    ends: dict[str, list[int]]  # of each prompt in it
    meta: dict  # preset, size, fps, frames, K, vae, vae_fingerprint as in Meta; prompt_length, and how it was made


def open_latents(folder: str | Path, preset: str | None = None) -> Latents:
    """Raises ValueError when the folder is missing, empty, holds a file that is not safetensors, or has latents or
    prompts that the preset's network, if one is named, cannot read."""
    folder = Path(folder)
    files = sorted(folder.glob("latents-*.safetensors"))
    if not files or not (folder / "prompts.safetensors").exists():
        images = "--frames 1 --count 16384 " if folder.name == "images" else ""
        raise ValueError(f"{folder}: no latents here; `python data.py {images}--out {folder}` makes the toy world's")
    try:
        shards = [safe_open(file, "pt") for file in files]
        prompts = safe_open(folder / "prompts.safetensors", "pt")
    except SafetensorError as error:
        raise ValueError(f"{folder}: a file is truncated or not safetensors ({error})") from None
    about = prompts.metadata() or {}
    table, dropped = json.loads(about.get("prompts", "[]")), json.loads(about.get("dropped", "{}"))
    weight_of = json.loads(about.get("weights", "{}"))  # of clips, where it is not 1
    mark, by_id = prompts_mark(table), dict(enumerate(table))
    starts, counting, weights = [0], [], []
    for file, shard in zip(files, shards, strict=True):
        missing = {"latents", "viewmats", "Ks", "prompt_ids"} - set(shard.keys())
        if missing or "meta" not in (shard.metadata() or {}):
            raise ValueError(f"{file}: not a shard of latents, it holds {sorted(shard.keys())[:5]}")
        clips = json.loads(shard.metadata().get("clips", "[]"))  # of videos, row by row
        captions = [caption for _, _, caption, *_ in clips]
        rows = [by_id.get(i) for i in shard.get_tensor("prompt_ids").tolist()] if captions else []
        if captions != rows or json.loads(shard.metadata()["meta"]).get("prompts", mark) != mark:
            raise ValueError(f"{file}: a shard of another folder, made for other prompts than {folder} has")
        count = shard.get_slice("prompt_ids").get_shape()[0]
        gone = {*dropped.get(file.name, [])}
        counting += [starts[-1] + row for row in range(count) if row not in gone]
        weights += [weight_of.get(clip_key(*clip[:3]), 1.0) for row, clip in enumerate(clips) if row not in gone]
        starts.append(starts[-1] + count)
    if preset:
        net, dit = PRESETS[preset].net, PRESETS[preset].dit
        column = net.text_column
        channels = shards[0].get_slice("latents").get_shape()[2]
        text_dim = prompts.get_slice(column).get_shape()[1] if column in prompts.keys() else 0
        if (channels, text_dim) != (dit.channels, dit.text_dim):
            raise ValueError(f"{folder}: made by the VAE or text encoder of another network than {preset}: {channels} "
                             f"channels, prompts with {text_dim} of {column}, expected {dit.channels} and "
                             f"{dit.text_dim}")
    columns = [name for name in ("embeds", "text", "byt5") if f"{name}_ends" in prompts.keys()]
    if not columns:
        raise ValueError(f"{folder}/prompts.safetensors: no table of prompts; data.py makes the folder anew")
    ends = {name: prompts.get_tensor(f"{name}_ends").tolist() for name in columns}
    if not counting:
        raise ValueError(f"{folder}: all of its rows were dropped")
    meta = json.loads(shards[0].metadata()["meta"]) | json.loads(about.get("meta", "{}"))  # of a shard, of the folder
    # pairs (distill_ode.py) name no clips: theirs were drawn by weight already
    weights = tuple(weights) if weight_of and len(weights) == len(counting) else ()
    return Latents(folder, shards, starts, counting, weights, prompts, ends, meta)


def check_vae(data: Latents, source: Meta, path: Path) -> None:
    """Raises ValueError when latents are of another VAE than the checkpoint at path, described by `source`, knows."""
    ours, theirs = data.meta["vae_fingerprint"], source["vae_fingerprint"]
    if ours != theirs:
        raise ValueError(f"{data.folder}: has vae_fingerprint {ours}, but {path} was trained with {theirs}")


def check_data(data: Latents, source: Meta, path: Path) -> Meta:
    """Raises ValueError when latents are not of the kind that the checkpoint at path, described by `source`, knows.

    Returns `source`. A released checkpoint (made "from" None) may be shown any videos, and knows their kind from then
    on; what is made of it has none of its quirks.
    """
    check_vae(data, source, path)
    kind = {name: data.meta[name] for name in ("K", "size", "fps", "frames")}
    for name in kind if source["from"] else ():
        if data.meta[name] != source[name]:
            differs = f"{data.folder}: has {name} {data.meta[name]}, but {path} was trained with {source[name]}"
            if name == "size":
                raise ValueError(differs)
            if dist.get_rank() == 0:
                print(f"{differs}; it goes on with the former")
    plain = {name: value for name, value in source.items() if name not in ("timed_text", "released_cache", "caption")}
    return plain | kind | ({"caption": data.meta["caption"]} if "caption" in data.meta else {})


def mix(*numbers: int) -> int:
    """Integers -> a well-spread 62-bit seed, so that neighbouring (seed, step, sample) share no stream."""
    digest = 0
    for number in numbers:
        digest = (digest ^ (number + 0x9E3779B97F4A7C15)) * 0xBF58476D1CE4E5B9 % 2**64
        digest ^= digest >> 29
    return digest >> 2


@lru_cache(maxsize=8)
def shuffled(count: int, weights: tuple[float, ...], seed: int, epoch: int) -> list[int]:
    """The order of an epoch: each of `count` rows once or, where they have weights, as often as those say."""
    rng = torch.Generator().manual_seed(mix(seed, 1, epoch))
    turns = torch.randperm(count, generator=rng)
    if weights:  # a row has its share of a line as long as the epoch, whose turns are a step of 1 apart
        ends = torch.tensor(weights, dtype=torch.float64).cumsum(0)
        turns = torch.searchsorted(ends * count / ends[-1], turns + torch.rand(1, generator=rng, dtype=torch.float64))
    return turns.clamp_max(count - 1).tolist()


def read_row(data: Latents, row: int) -> dict[str, Tensor]:
    """All that the folder holds of one video."""
    n = bisect_right(data.starts, row) - 1
    shard = data.shards[n]
    return {name: shard.get_slice(name)[row - data.starts[n]] for name in shard.keys()}


def clip_key(file: str, start: int, *caption: str) -> str:
    """What a clip of a video, or one of its captions, is called where more is said of it."""
    return json.dumps([file, start, *caption])


def read_embeds(data: Latents, i: int) -> dict[str, Tensor]:
    """Encoded prompt i; -1 is the null prompt."""
    row = {}
    for name, ends in data.ends.items():
        start = ends[i - 1] if i % len(ends) else 0  # i - 1 is the row before it for -1, too
        row[name] = data.prompts.get_slice(name)[start : ends[i]]
    return row


def sample_generated(rng: list[torch.Generator], f: int, prob: float) -> Tensor:
    """[b f]: 1 but for the first frame or the first two, which with probability prob / 2 each are given: 0.

    So a model learns to go on from an image or a short video.
    """
    draw = torch.stack([torch.rand(1, generator=g) for g in rng])  # [b 1]
    given = torch.where(draw < prob / 2, 1, torch.where(draw < prob, 2, 0)).clamp_max(f - 1)
    return (torch.arange(f) >= given).float()


def get_batch(data: Latents, seed: int, step: int, part: tuple[int, int], size: int, device: torch.device,
              given_prob: float | None = None) -> Batch:
    """A part, of `size` videos, of the batch of a step: a pure function, so a run can stop anywhere.

    part: which, of how many (model.py, batch_part). A step of N ranks and one of N micro-batches are made of the same
    videos with the same noise. step: train_dmd.py counts every update of either network.
    given_prob: None gives no frames; a folder of ODE pairs says itself which are given.
    Raises ValueError when a latent is not finite.
    """
    total, (n, parts) = len(data.rows), part
    ids, rng, order = [], [], {}
    for slot in range(n * size, (n + 1) * size):
        epoch, position = divmod(step * parts * size + slot, total)
        if epoch not in order:
            order[epoch] = shuffled(total, data.weights, seed, epoch)
        ids.append(data.rows[order[epoch][position]])
        rng.append(torch.Generator().manual_seed(mix(seed, 2, step, slot)))
    rows = [read_row(data, row) for row in ids]
    for row, sample in zip(ids, rows, strict=True):
        if not sample["latents"].isfinite().all():
            raise ValueError(f"{data.folder}: latents of row {row} hold NaN or inf")

    def column(name: str) -> Tensor | None:
        """Of all rows, in fp32 on the device; None where the folder has none."""
        return torch.stack([row[name] for row in rows]).to(device, torch.float32) if name in rows[0] else None

    x0 = column("latents")
    generated = column("generated")
    if generated is None and given_prob is not None:
        generated = sample_generated(rng, x0.shape[1], given_prob).to(device)
    elif generated is None:
        generated = torch.ones(x0.shape[:2], device=device)
    texts = [read_embeds(data, int(row["prompt_ids"])) for row in rows] + [read_embeds(data, -1)]
    texts = [{name: z.to(device, torch.float32) for name, z in text.items()} for text in texts]
    prompt, null = collate_prompts(texts[:-1], texts[-1], data.meta["prompt_length"], column("vision"), x0[:, :1])
    camera = Camera(column("viewmats"), column("Ks"))
    return Batch(x0, prompt, null, camera, generated, rng, ids, column("states"))


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """What is written in a with-block under the name that it gets becomes `path` at its end: a crash or a full disk
    never leaves half a file there."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        yield temporary
        temporary.replace(path)
    except (OSError, SafetensorError) as error:
        with suppress(OSError):
            temporary.unlink()
        raise ValueError(f"{path}: could not be written ({error})") from error


def save_shard(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Write safetensors."""
    with replacing(path) as temporary:
        save_file({name: z.cpu().contiguous() for name, z in tensors.items()}, temporary, metadata)


def prompts_mark(prompts: list[str]) -> str:
    """A short name for a table of prompts, which all shards that count in it remember."""
    return f"{zlib.crc32(json.dumps(prompts).encode()):08x}"


def stored(z: Tensor) -> bytes:
    """Numbers as they stand in a file."""
    return z.cpu().contiguous().numpy().tobytes()


def save_prompts(path: Path, rows: list[dict[str, Tensor]], about: dict[str, str]) -> None:
    """The table of encoded prompts, the null prompt's row last.

    All together may be larger than memory, so this writes safetensors by hand, row after row: the header's length in
    eight bytes, the header, the numbers.
    """
    ends = {name: torch.tensor([len(row[name]) for row in rows]).cumsum(0) for name in rows[0]}
    columns = [(f"{name}_ends", "I64", [len(rows)], 8) for name in ends]
    columns += [(name, "F16", [int(ends[name][-1]), rows[0][name].shape[1]], 2) for name in ends]
    header, start = {"__metadata__": about}, 0
    for name, dtype, shape, size in columns:
        end = start + size * math.prod(shape)
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}
        start = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with replacing(path) as temporary, open(temporary, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for column in ends.values():
            file.write(stored(column))
        for name in ends:
            for row in rows:
                file.write(stored(row[name].half()))


# What the stages' command lines, logs and pictures share.


def read_text(path: Path) -> str:
    """What a person or another program wrote: UTF-8, with or without a byte-order mark. Raises ValueError."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 ({error})") from None
    except OSError as error:
        found = "no such file" if isinstance(error, FileNotFoundError) else error.strerror
        raise ValueError(f"{path}: {found}") from None


def positive(text: str) -> int:
    """An argparse type: a whole number of at least 1."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number}: expected at least 1")
    return number


def fraction(text: str) -> float:
    """An argparse type: a number from 0 to 1."""
    number = float(text)
    if not 0 <= number <= 1:
        raise argparse.ArgumentTypeError(f"{number}: expected 0 to 1")
    return number


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Docstrings as they are written, and behind each flag's help its default."""

    def _get_help_string(self, action: argparse.Action) -> str:
        no_default = action.default is None or action.default is False or action.default is argparse.SUPPRESS
        return action.help if no_default else f"{action.help} (default: %(default)s)"


def set_recipe(parser: argparse.ArgumentParser, recipes: dict[str, dict], argv: list[str] | None) -> None:
    """Make the numbers of the chosen --preset the parser's defaults, and print those of all presets below its help."""
    # --preset decides what the other defaults are, so it is read first, by a parser that knows nothing else
    only = argparse.ArgumentParser(add_help=False)
    only.add_argument("--preset", nargs="?", default="tiny")
    preset = only.parse_known_args(argv)[0].preset
    parser.set_defaults(**recipes.get(preset, {}))
    lines = ["defaults of each preset:", f"  {'':22}" + "".join(f"{name:>14}" for name in recipes)]
    for name in dict.fromkeys(name for recipe in recipes.values() for name in recipe):
        values = [recipe.get(name, "") for recipe in recipes.values()]
        cells = [" ".join(map(str, value)) if isinstance(value, tuple) else str(value) for value in values]
        lines.append(f"  --{name.replace('_', '-'):20}" + "".join(f"{cell:>14}" for cell in cells))
    parser.epilog = "\n".join(lines)


def open_log(out: Path, step: int, steps: int) -> None:
    """Say where the run that writes `out` stands, and keep the lines of its metrics up to `step`: none of an earlier
    run's, none that a resumed run will write again. OUT.best.pt goes along. On rank 0."""
    if dist.get_rank() > 0:
        return
    for name in ("metrics.jsonl", "scores.jsonl"):
        path = out.with_suffix("") / name
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        whole = [line for line in lines if line.endswith("\n")]  # a killed run or a full disk may have cut the last one
        try:
            kept = [line for line in whole if json.loads(line)["step"] <= step]
        except (ValueError, LookupError, TypeError) as error:
            raise ValueError(f"{path}: a line is none of a run's ({error}); move the file away") from None
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as temporary:
            temporary.write_text("".join(kept))
    if step > 0:  # a new run replaces an earlier one's at its first save
        rewind_best(out, step)
    print(f"{out}: step {step} of {steps}" + (", nothing left to do" if step >= steps else ""))


def rewind_best(out: Path, step: int) -> None:
    """If OUT.best.pt is of a later step, let it be the best up to `step`, or nothing where that one is not kept."""
    best, scores = out.with_suffix(".best.pt"), read_scores(out.with_suffix("") / "scores.jsonl")
    if not best.exists() or load_checkpoint(best)[1]["step"] <= step:
        return
    before = out.with_suffix("") / f"step-{max(scores, key=scores.get, default=0):06d}.pt"  # there is no step 0
    if before.exists():
        point_to(best, before)
    else:
        best.unlink()


@contextmanager
def appending(path: Path, mode: str = "a") -> Iterator[IO]:
    """The open file, at whose end a with-block writes."""
    try:
        with open(path, mode) as file:
            yield file
    except OSError as error:  # of a full disk, which names no file
        raise ValueError(f"{path}: could not be written ({error})") from error


def write_log(path: Path, row: dict) -> None:
    """Append one line of metrics."""
    with appending(path) as file:
        file.write(json.dumps(row) + "\n")


def to_bytes(video: Tensor) -> Tensor:
    """[-1, 1] -> 0 .. 255."""
    return ((video + 1) * 127.5).round().byte()


def from_bytes(video: Tensor) -> Tensor:
    """0 .. 255 -> [-1, 1], fp32."""
    return video.float() / 127.5 - 1


def read_picture(path: Path) -> Tensor:
    """An image as a viewer shows it -> [1 3 H W] in [-1, 1]: turned as its camera was held, of any colour model and
    depth, what is transparent on white. Raises OSError or ValueError, PIL's, when it is none."""
    with Image.open(path) as file:
        image = ImageOps.exif_transpose(file)
    if image.mode.startswith(("I", "F")):  # 16 bits or more of grey
        grey = np.asarray(image, dtype=np.float64)
        top = 65535 if grey.max() > 255 else 255 if grey.max() > 1 else 1
        image = Image.fromarray((255 * grey / top).clip(0, 255).round().astype(np.uint8))
    if image.has_transparency_data:
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
    return from_bytes(rearrange(torch.from_numpy(np.array(image.convert("RGB"))), "h w c -> 1 c h w"))


def write_sheet(path: Path, videos: list[Tensor], every: int = 4, most: int = 16) -> None:
    """A contact sheet. Each of `videos` [b 3 t h w] gives one strip per sample, every 4th frame, or fewer if more than
    `most` would come of it; strips of one sample stand below each other, in the order of `videos` (ground truth first,
    then what was made of it). Small pictures are enlarged by whole pixels to about 96, large ones shrunk to 128."""
    every = every * math.ceil(math.ceil(videos[0].shape[2] / every) / most)
    height, width = videos[0].shape[3:]
    strips = []
    for video in videos:
        frames = video[:, :, ::every].clamp(-1, 1)
        if height > 128:
            size = (frames.shape[2], 128, round(128 * width / height))
            frames = F.interpolate(frames.float(), size, mode="area")
        strips.append(rearrange(frames, "b c t h w -> b h (t w) c"))
    strips = F.pad(torch.stack(strips, dim=1), (0, 0, 0, 0, 0, 1), value=1.0)  # a white line under each strip
    sheet = to_bytes(rearrange(strips, "b s h w c -> (b s h) w c")).cpu().numpy()
    zoom = max(1, 96 // height)
    picture = imageio.imwrite("<bytes>", sheet.repeat(zoom, 0).repeat(zoom, 1), extension=".png")
    with replacing(path) as temporary:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_bytes(picture)


def find_vae(data: Latents, vae: Path | None = None) -> Path:
    """The VAE's file: the one named, else the one that data.py used, as seen from here or from the latents folder."""
    made_with = Path(data.meta["vae"])
    folders = [Path(), *data.folder.absolute().parents]
    return vae or next((folder / made_with for folder in folders if (folder / made_with).exists()), made_with)


@lru_cache(maxsize=1)
def open_vae(path: Path, device: torch.device, known_as: str) -> nn.Module:
    return load_vae(path, device, known_as)


def write_samples(out: Path, step: int, net: nn.Module, meta: Meta, data: Latents, vae: Path | None, seed: int,
                  size: int) -> None:
    """What the network makes of the prompts and paths of up to eight training videos: of the first four a sheet, ground
    truth above, and in the toy world a line of scores.jsonl. The best of a run so far stays as OUT.best.pt.

    Every rank must call it, since the network is sharded; rank 0 decodes and writes.
    """
    device = next(net.parameters()).device
    batch = get_batch(data, seed, -1, (0, 1), min(8, size), device)
    chunks = rollout(net, meta, batch.rng, batch.x0.shape[1:], batch.prompt, batch.null, batch.camera)
    x0 = torch.cat(list(chunks), dim=1)
    folder, path = out.with_suffix(""), find_vae(data, vae)
    if dist.get_rank() > 0:
        return
    if not path.exists():
        print(f"{path}: no such file, so no sheets of samples; --vae names it")
        return
    decoder = open_vae(path, device, data.meta["vae_fingerprint"])
    video = torch.cat([decoder.decode(z[None])[0] for z in x0])
    write_sheet(folder / f"sheet-{step:06d}.png", [decoder.decode(batch.x0[:4])[0], video[:4]])
    if "caption" in data.meta or data.meta["frames"] < 2 or len(x0) < 2:
        return  # own videos, of which nobody knows the truth; images; no other's path to compare with
    prompts = json.loads((data.prompts.metadata() or {}).get("prompts", "[]"))
    ids = [int(read_row(data, row)["prompt_ids"]) for row in batch.ids]
    try:
        K = batch.camera.Ks[0, 0].cpu()
        score = control_margin(video.clamp(-1, 1).cpu(), [prompts[i] for i in ids], batch.camera.viewmats.cpu(), K)
    except (ValueError, IndexError):
        return  # videos of which nobody knows the truth
    scores = read_scores(folder / "scores.jsonl")
    write_log(folder / "scores.jsonl", {"step": step, "control_margin": score})
    if score >= max(scores.values(), default=score):
        point_to(out.with_suffix(".best.pt"), folder / f"step-{step:06d}.pt")
    best = max(scores | {step: score}, key=(scores | {step: score}).get)
    print(f"{out}: step {step} obeys its camera by {score:.2f} dB; best so far is step {best}")


def read_scores(path: Path) -> dict[int, float]:
    lines = path.read_text().splitlines() if path.exists() else []
    return {row["step"]: row["control_margin"] for row in map(json.loads, lines)}


# ----------------------------------------------------------------------------------------------------------------------
# 5. Making the toy world.


def make_vae(args: argparse.Namespace, video: Tensor) -> None:
    """Fit a VAE to video [n 3 t h w] uint8 and save it with the mean and std of its latents."""
    vae, some = build_vae(args.preset), from_bytes(video[:128])
    vae.fit(some)
    z = vae.encode(some)[0]
    mean, std = z.mean((0, 1, 3, 4)).tolist(), z.std((0, 1, 3, 4)).tolist()
    weights = vae.state_dict()
    meta = {"stage": "vae", "preset": args.preset, "mean": mean, "std": std, "fingerprint": fingerprint(weights)}
    save_checkpoint(args.vae, weights, meta)


def make_toy(args: argparse.Namespace) -> None:
    """Render the toy world, fit its VAE if there is none, and write its latents folder."""
    if args.vae.exists():
        _, about_vae = load_checkpoint(args.vae, "vae")
        if about_vae["preset"] != args.preset:
            raise ValueError(f"{args.vae}: a VAE of preset {about_vae['preset']}, but --preset is {args.preset}")
    elif args.frames == 1:
        raise ValueError(f"{args.vae}: no such file; a VAE is fitted to videos, `python data.py` makes it")
    for old in args.out.glob("latents-*.safetensors"):
        with suppress(SafetensorError), safe_open(old, "pt") as shard:
            if "clips" in (shard.metadata() or {}):
                raise ValueError(f"{args.out}: holds videos of your own, expected another --out for the toy world")
    size = args.size[0]
    prompts, paths, scene = sample_toy(args.count, args.seed, max(1, args.frames - 1), held=False)
    viewmats, K = torch.stack([parse_trajectory(path)[: args.frames] for path in paths]), intrinsics(K_SQUARE)
    video = torch.empty(args.count, 3, 1 + 4 * (args.frames - 1), size, size, dtype=torch.uint8)
    for i in tqdm(range(args.count), "render"):
        room = Scene(*(z[i : i + 1] for z in scene))
        video[i] = to_bytes(render(room, viewmats[i : i + 1], K, size))[0]

    if not args.vae.exists():
        make_vae(args, video)
    _, about_vae = load_checkpoint(args.vae, "vae")
    vae = load_vae(args.vae, torch.device("cpu"), about_vae["fingerprint"])
    encoder = load_encoder(args.preset, None, torch.device("cpu"))

    args.out.mkdir(parents=True, exist_ok=True)
    for old in [args.out / "prompts.safetensors", *args.out.glob("latents-*.safetensors")]:
        old.unlink(missing_ok=True)  # the prompts first and written last: without them the folder does not open
    meta = {"preset": args.preset, "K": list(K_SQUARE), "size": args.size, "fps": FPS, "frames": args.frames,
            "vae": str(args.vae), "vae_fingerprint": about_vae["fingerprint"], "prompt_length": encoder.length,
            "prompts": prompts_mark(prompts)}
    if encoder.encode_image:
        meta["image_share"] = args.image_share
    with_image = torch.rand(args.count, 1, 1, generator=torch.Generator().manual_seed(args.seed)) < args.image_share
    for start in tqdm(range(0, args.count, 512), "encode"):
        rows = slice(start, min(start + 512, args.count))
        with torch.no_grad():
            latents = torch.cat([vae.encode(from_bytes(v))[0] for v in video[rows].split(16)])
        shard = {"latents": latents.half(), "viewmats": viewmats[rows], "prompt_ids": torch.arange(args.count)[rows],
                 "Ks": K.expand(len(latents), args.frames, 3, 3)}
        if encoder.encode_image:
            shard["vision"] = (encoder.encode_image(from_bytes(video[rows, :, 0])) * with_image[rows]).half()
        save_shard(args.out / f"latents-{start:06d}.safetensors", shard, {"meta": json.dumps(meta)})
    encoded = [encoder.encode_text(prompt) for prompt in [*prompts, encoder.null]]
    save_prompts(args.out / "prompts.safetensors", encoded, {"prompts": json.dumps(prompts)})


# ======================================================================================================================
# The course ends here. Nothing above refers to what follows, but for one call each of load_encoder and
# collate_hy_prompts.

# ----------------------------------------------------------------------------------------------------------------------
# 6. Pose files. Each reader returns Poses as the file has them, world-to-camera. Then what is made of them: which pixel
# frame of a video each is of, what is between two, and what a lens did to the pictures.


def check_poses(poses: Tensor, name: str) -> Tensor:
    """Rigid transforms [n 4 4] fp64, unchanged; raises ValueError at the first that is not in SE(3)."""
    if poses.ndim != 3 or poses.shape[1:] != (4, 4):
        raise ValueError(f"{name}: expected a list of 4x4 matrices, found shape {list(poses.shape)}")
    R = poses[:, :3, :3]
    faults = {
        "it holds NaN or inf": ~poses.isfinite().flatten(1).all(1),
        "its rotation is off": (R @ R.mT - torch.eye(3, dtype=torch.float64)).abs().amax((1, 2)) > 1e-3,
        "it mirrors": R.det() < 0,
        "its last row is not 0 0 0 1": (poses[:, 3] - poses.new_tensor([0, 0, 0, 1])).abs().amax(1) > 1e-5}
    for wrong, bad in faults.items():
        if bad.any():
            raise ValueError(f"{name}: pose {int(bad.int().argmax())} is not a rigid transform (SE(3)): {wrong}")
    return poses


class CameraPath(NamedTuple):
    """One camera path for stream.py, and what came with it."""
    viewmats: Tensor  # [f 4 4] fp32, one per latent frame, the first the identity
    K: tuple[float, ...] | None = None  # (fx, fy, cx, cy); None: the one that the network was trained with
    name: str = "path"
    prompt: str | None = None


def read_camera(source: str, fps: float = FPS) -> list[CameraPath]:
    """A pose string, a recording of a camera (POSE_FILES: a pose for each pixel frame, or time stamps, at fps frames a
    second; every fourth frame counts), or a .json file holding one of

        "w*4,l*3"                                     a pose string
        {"c2w": [4x4, ...], "K": [fx, fy, cx, cy]}     or "w2c", or "c2w_opengl" (y up, z backwards); one matrix per
                                                      latent frame, or "pose_fps" a second; K normalised and optional
        {"0": {"extrinsic": 4x4 c2w, "K": 3x3}, ...}   HY-WorldPlay, one entry per latent frame, K in pixels
        {"0": {"w2c": 4x4, "intrinsic": 3x3}, ...}     its training data, one entry per pixel frame; every fourth counts
        [{"id", "caption", "trajectory"}, ...]         minWM, several paths

    Raises ValueError, naming the file and what is wrong with it. Poses are re-based so that the first is the identity.
    """
    file = Path(source)
    if not names_a_file(source, Path()):
        return [CameraPath(parse_trajectory(source))]
    if file.suffix.lower() != ".json":
        return [record(read_poses(source, Path()), file, fps)]
    try:
        spec = json.loads(read_text(file))
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{source}: not JSON ({error})") from None
    if is_recording(spec):
        return [record(read_poses(source, Path()), file, fps)]
    entries = spec if isinstance(spec, list) else [spec]
    names = [f"{file.stem}-{n}" for n in range(len(entries))] if len(entries) > 1 else [file.stem]
    with blamed(source):
        paths = [read_path(entry, name, fps) for entry, name in zip(entries, names)]
    if not paths:
        raise ValueError(f"{source}: an empty list, expected at least one path")
    names = [path.name for path in paths]
    if len(set(names)) < len(names) or any(Path(name).name != name for name in names):
        raise ValueError(f"{source}: ids {names} name the videos, so each must be a different file name")
    return paths


def record(poses: "Poses", file: Path, fps: float) -> CameraPath:
    """The path of a camera that was recorded at every pixel frame, or at some of them."""
    with blamed(file):
        count = len(poses.viewmats)
        positions = poses.numbers or [*range(count)]
        if poses.seconds:
            rate = 1 if all(t == int(t) for t in poses.seconds) else fps  # whole ones are numbers of frames
            positions = [(t - poses.seconds[0]) * rate for t in poses.seconds]
        every_fourth = range(int(min(positions)), int(max(positions)) + 1, 4)
        viewmats, Ks, _ = poses_at(poses, positions, every_fourth)
        if Ks is not None:
            intrinsics(Ks[0].tolist())
        if not poses.measured and (step := median_step(viewmats)):
            viewmats[:, :3, 3] *= STEP / step  # as data.py takes them
    return CameraPath((viewmats @ invert_se3(viewmats[:1])).float(), None if Ks is None else tuple(Ks[0].tolist()),
                      file.stem)


def read_path(spec: str | dict, name: str, fps: float) -> CameraPath:
    """One path of a camera file; `name`, unless it brings its own. Raises ValueError or TypeError."""
    if isinstance(spec, str):
        return CameraPath(parse_trajectory(spec), name=name)
    if not isinstance(spec, dict):
        raise ValueError(f"expected a pose string or an object, found {spec!r:.80}")
    name = str(spec.get("id", name))
    prompt = spec.get("caption", spec.get("prompt"))
    if prompt is not None and not (isinstance(prompt, str) and prompt.strip()):
        raise ValueError(f"path {name!r}: its prompt is {prompt!r}, expected a description of the world")
    poses = read_object(spec)
    viewmats, K = poses.viewmats @ invert_se3(poses.viewmats[:1]), poses.K
    pose_key = find_worldplay_key(spec)
    if pose_key == "w2c":
        viewmats = viewmats[::4]  # latent frame i ends with pixel frame 4 i
    if poses.pose_fps:
        positions = frame_positions(poses, len(viewmats), fps, poses.pose_fps)
        viewmats = poses_at(Poses(viewmats), positions, range(0, round(positions[-1]) + 1, 4))[0]
    if K is not None:
        intrinsics(K[0])  # are they in range?
    return CameraPath(viewmats.float(), None if K is None else tuple(K[0]), name, prompt)  # a path has one


class Poses(NamedTuple):
    """Cameras as a file has them."""
    viewmats: Tensor  # [n 4 4] fp64, world-to-camera
    K: list | None = None  # (fx, fy, cx, cy) over width and height: one, or one for each pose; None: it says none
    numbers: list[int] | None = None  # which pixel frame each is of, if names or indices say so
    seconds: list[float] | None = None  # when each pose was, if it is stamped
    lens: tuple[float, ...] = ()  # distortion k1 k2 p1 p2, as OpenCV has it
    measured: bool = True  # False: made of pictures alone, in units that mean nothing
    pose_fps: float | None = None  # how many there are a second, if the file says so
    origin: Tensor | None = None  # [4 4] the first, before re-basing: only as they stand there can poses be inverted


# What a file of another shape brings about: JSON's, numbers', torch's of ragged lists, a binary file's.
BAD_INPUT = (ValueError, TypeError, KeyError, IndexError, AttributeError, ArithmeticError, RuntimeError, RecursionError,
             EOFError, struct.error)


@contextmanager
def blamed(owner: str | Path) -> Iterator[None]:
    """Whatever a user's numbers, JSON or files bring about within is one ValueError of one line that names them."""
    try:
        yield
    except OSError as error:
        raise ValueError(f"{Path(error.filename or owner).name}: {error.strerror or error}") from None
    except KeyError as error:
        raise ValueError(f"{owner}: an entry has no {error}") from None
    except BAD_INPUT as error:
        found = first_line(error)
        raise ValueError(found if str(owner) in found else f"{owner}: {found}") from None


def names_a_file(poses: str, folder: Path) -> bool:
    """Does a row's `poses` name a file or folder? Else it is a pose string, which has no dots and no slashes."""
    if re.search(r"[./\\]", poses):
        return True
    with suppress(OSError):  # a name may be too long for a file
        return poses.strip() != "" and (folder / poses).exists()
    return False


def read_poses(poses: str | dict, folder: Path, clip: str = "", aspect: float = 1.0) -> Poses:
    """The `poses` of a row, in any format of POSE_FILES, the first pose the identity. Files lie below `folder`.

    clip: the video's file; of poses of several, its own are taken. aspect: its width over its height, for files that
    leave that to the picture. Raises ValueError.
    """
    with blamed(poses if isinstance(poses, str) else "poses"):
        if not isinstance(poses, str):
            found = read_object(poses)
        elif names_a_file(poses, folder):
            found = read_pose_file(folder / poses, clip, aspect)
        else:
            found = Poses(parse_trajectory(poses).double())
        first = found.viewmats[:1]
        return found._replace(viewmats=found.viewmats @ invert_se3(first), origin=first[0])


POSE_FILES = """.json       {"c2w": [4x4, ...]}, "w2c" or "c2w_opengl" (y up, z backwards), with "K" for all or each;
            HY-WorldPlay's entries, {"extrinsic", "K"} or {"w2c", "intrinsic"}; transforms.json of nerfstudio,
            instant-ngp or Blender; camera_extrinsics.json of ReCamMaster; in a .json or .jsonl table, an
            object of the first two may stand in the row itself
a folder    COLMAP's, text or binary: of the models below it, the one with the most images of the video; or
            ScanNet's, a 4x4 camera-to-world a file
images.txt  or images.bin: COLMAP's, cameras beside it
.npz, .npy  "c2w", "cam_c2w" (MegaSaM), "data" and "inds" (ViPE), "w2c" or "extrinsic" (VGGT), 3x4 or 4x4,
            with K in pixels as 3x3 "intrinsic"; .npy is camera-to-world, if not called w2c or extrinsic
.txt        a line a frame, and its count of numbers says whose: 19 RealEstate10K, time fx fy cx cy k1 k2 and
            3x4 world-to-camera; 8 TUM, time tx ty tz qx qy qz qw; 12 KITTI and 16 Replica, 3x4 or 4x4
            camera-to-world"""


def read_pose_file(path: Path, clip: str, aspect: float) -> Poses:
    """By how it ends."""
    suffix = path.suffix.lower()
    if path.is_dir():
        return read_scannet(path) if scannet_poses(path) else read_colmap(path, clip)
    if not path.exists():
        raise ValueError(f"{path.name}: no such file")
    if path.name in ("images.txt", "images.bin"):
        return read_colmap_model(path, clip)
    if suffix == ".json":
        spec = json.loads(read_text(path))
        if is_recording(spec):
            return read_transforms(spec, aspect) if "frames" in spec else read_recammaster(spec, clip)
        return read_object(spec)
    if suffix in (".npz", ".npy"):
        return read_numpy(path)
    if suffix == ".txt":
        return read_pose_lines(path)
    raise ValueError(f"{path.name}: no such format; expected a pose string, a folder or a file that ends in .json, "
                     ".npz, .npy, .txt or .bin")


def is_recording(spec: Any) -> bool:
    """Is this JSON one that data sets have, with a pose for each frame of a video?"""
    return isinstance(spec, dict) and ("frames" in spec or "frame0" in spec)


MATRICES = ("c2w", "w2c", "c2w_opengl")
# HY-WorldPlay numbers its poses: {"0": {...}, "1": {...}}. The key of a pose, and of its K: in what its generator reads
# (camera-to-world, one entry per latent frame), and in its training data (world-to-camera, one per pixel frame).
WORLDPLAY_KEYS = {"extrinsic": "K", "w2c": "intrinsic"}


def read_object(spec: Any) -> Poses:
    """A JSON object that holds one path: a pose string, matrices or HY-WorldPlay's entries."""
    if not isinstance(spec, dict):
        raise ValueError(f"expected a pose string or an object, found {spec!r:.80}")
    K = spec.get("K")
    if K is not None and not (isinstance(K, (list, tuple)) and K):
        raise ValueError(f"K {K!r:.80}: expected (fx/W, fy/H, cx/W, cy/H)")
    Ks = K if K is None or isinstance(K[0], (list, tuple)) else [K]
    if "trajectory" in spec:
        return Poses(parse_trajectory(str(spec["trajectory"])).double(), Ks)
    for kind in MATRICES:
        if kind in spec:
            poses = check_poses(torch.tensor(spec[kind], dtype=torch.float64), kind)
            if kind == "c2w_opengl":
                poses = poses @ OPENGL
            return Poses(poses if kind == "w2c" else invert_se3(poses), Ks,
                         pose_fps=checked_pose_fps(spec.get("pose_fps")))
    pose_key = find_worldplay_key(spec)
    if pose_key is None:
        raise ValueError(f"expected 'trajectory', 'c2w', 'w2c' or 'extrinsic' entries, found {list(spec)[:4]}")
    return read_worldplay(spec, pose_key)


def checked_pose_fps(text: str | float | None) -> float | None:
    """How many poses there are a second, if anything is said."""
    if not text:
        return None
    if not 1e-3 < float(text) < 1e6:
        raise ValueError(f"pose_fps {text}: expected how many there are a second")
    return float(text)


OPENGL = torch.diag(torch.tensor([1.0, -1, -1, 1], dtype=torch.float64))  # its camera's y and z point the other way


def numbered_entries(spec: dict) -> list:
    """The values of {"0": ..., "1": ..., ...} in the order of their numbers: "2" before "10"."""
    return [spec[key] for key in sorted(spec, key=natural)]


def natural(name: str) -> list:
    """A key that sorts as people count: 2 before 10."""
    return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in re.split(r"(\d+)", name) if part]


def picture_numbers(names: list[str]) -> list[int] | None:
    """Which pixel frame each picture is, by the last number in its name, from 0 on: programs count them from 1, if none
    is called 0. None unless each has its own."""
    found = [re.findall(r"\d+", Path(name).stem) for name in names]
    numbers = [int(digits[-1]) for digits in found if digits]
    first = int(min(numbers, default=0) > 0)
    return [number - first for number in numbers] if len(set(numbers)) == len(names) else None


def find_worldplay_key(spec: dict) -> str | None:
    """Which of WORLDPLAY_KEYS the poses stand under; None if these are no entries of HY-WorldPlay's."""
    entries = numbered_entries(spec)
    if not entries or not all(isinstance(entry, dict) for entry in entries):
        return None
    return next((key for key in WORLDPLAY_KEYS if key in entries[0]), None)


def read_worldplay(spec: dict, pose_key: str) -> Poses:
    """HY-WorldPlay's entries, each a pose and its 3x3 K in pixels."""
    entries, K_key = numbered_entries(spec), WORLDPLAY_KEYS[pose_key]
    matrices = [entry.get(pose_key) for entry in entries]
    if None in matrices:
        raise ValueError(f"entry {matrices.index(None)} has no {pose_key!r}")
    poses = check_poses(torch.tensor(matrices, dtype=torch.float64), pose_key)
    Ks = [normalise_intrinsics(entry.get(K_key), K_key) for entry in entries]
    return Poses(poses if pose_key == "w2c" else invert_se3(poses), Ks)


def normalise_intrinsics(K: list | Tensor | None, name: str) -> tuple[float, ...]:
    """A 3x3, in pixels -> (fx/W, fy/H, cx/W, cy/H). HY-WorldPlay's rule: the image is twice the principal point."""
    matrix = torch.as_tensor(K if K is not None else [], dtype=torch.float64)
    if matrix.shape != (3, 3) or not (matrix[:2, 2] > 0).all():
        raise ValueError(f"expected a 3x3 {name!r} in pixels with a principal point, found {matrix.tolist()}")
    width, height = 2 * matrix[0, 2].item(), 2 * matrix[1, 2].item()
    return matrix[0, 0].item() / width, matrix[1, 1].item() / height, 0.5, 0.5


def quaternion_poses(wxyz: Tensor, t: Tensor) -> Tensor:
    """Quaternions [n 4], w first, of any length, and translations [n 3] -> [n 4 4] fp64."""
    w, x, y, z = (wxyz / wxyz.norm(dim=-1, keepdim=True)).unbind(-1)
    rows = [1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y),
            2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x),
            2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)]
    R = torch.stack(rows, dim=-1).unflatten(-1, (3, 3))
    return to_square(torch.cat([R, t[..., None]], dim=-1))


def to_square(poses: Tensor) -> Tensor:
    """[n 3 4] or [n 4 4] -> [n 4 4]."""
    if poses.ndim == 3 and poses.shape[1:] == (3, 4):
        poses = torch.cat([poses, poses.new_tensor([0, 0, 0, 1]).expand(len(poses), 1, 4)], dim=1)
    return poses


class ColmapImage(NamedTuple):
    """An image of a COLMAP model: its pose, world-to-camera, a quaternion and a translation; and its camera."""
    wxyz: list[float]
    t: list[float]
    camera: int


COLMAP_MODELS = (  # by COLMAP's number: name, focal lengths, parameters
    ("SIMPLE_PINHOLE", 1, 3), ("PINHOLE", 2, 4), ("SIMPLE_RADIAL", 1, 4), ("RADIAL", 1, 5), ("OPENCV", 2, 8),
    ("OPENCV_FISHEYE", 2, 8), ("FULL_OPENCV", 2, 12), ("FOV", 2, 5), ("SIMPLE_RADIAL_FISHEYE", 1, 4),
    ("RADIAL_FISHEYE", 1, 5), ("THIN_PRISM_FISHEYE", 2, 12))
UNDISTORTED = ("SIMPLE_PINHOLE", "PINHOLE", "SIMPLE_RADIAL", "RADIAL", "OPENCV")  # whose lens we know


def read_colmap(folder: Path, clip: str) -> Poses:
    """Of all models below a folder the one with the most images of this clip. What a workspace of COLMAP holds below
    dense/ is no other model: the same poses, with the lens of pictures that were undistorted."""
    models = [file for file in sorted(folder.rglob("images.*")) if file.name in ("images.bin", "images.txt")]
    models = [file for file in models if "dense" not in file.relative_to(folder).parts] or models
    if not models:
        raise ValueError(f"{folder.name}: no images.txt or images.bin of COLMAP below it, and no poses of ScanNet's")

    def own_then_all(file: Path) -> tuple[int, int]:
        images = colmap_images(file)
        return len(images_of(images, clip)), len(images)

    return read_colmap_model(max(models, key=own_then_all), clip)


def colmap_images(path: Path) -> dict[str, ColmapImage]:
    """images.txt or .bin, by the images' names."""
    return (colmap_images_bin if path.suffix == ".bin" else colmap_images_txt)(path)


def images_of(images: Iterable[str], clip: str) -> list[str]:
    """Those whose folder, or the name before their number, is called as the clip."""
    stem = re.escape(Path(clip).stem)
    own = re.compile(rf"(.*/)?{stem}(/.*|[^0-9A-Za-z.]+[0-9]+\.\w+)")
    return [name for name in images if stem and own.fullmatch(name)]


def read_colmap_model(path: Path, clip: str) -> Poses:
    """images.txt or .bin, with cameras beside it. Images count by the numbers in their names, in their natural order;
    of a model of several videos, those of the folder or prefix that is called as the clip."""
    read_cameras = colmap_cameras_bin if path.suffix == ".bin" else colmap_cameras_txt
    cameras, images = read_cameras(path.with_name("cameras" + path.suffix)), colmap_images(path)
    names = sorted(images_of(images, clip) or images, key=natural)
    if not names:
        raise ValueError(f"{path.name}: no images in it")
    wxyz, t = (torch.tensor(each, dtype=torch.float64) for each in zip(*(images[name][:2] for name in names)))
    viewmats = quaternion_poses(wxyz, t)
    for name in names:
        if images[name].camera not in cameras:
            raise ValueError(f"{path.name}: image {name} was taken by camera {images[name].camera}, of which "
                             f"cameras{path.suffix} says nothing")
    found = [colmap_lens(path, images[name].camera, *cameras[images[name].camera]) for name in names]
    return Poses(check_poses(viewmats, "w2c"), [K for K, _ in found], picture_numbers(names),
                 lens=one_lens(lens for _, lens in found), measured=False)


def one_lens(lenses: Iterable[tuple[float, ...]]) -> tuple[float, ...]:
    """The distortion that all pictures share, () if it is none. Raises ValueError where they differ."""
    lenses = {*lenses}
    if len(lenses) > 1:
        raise ValueError(f"its pictures were taken through {len(lenses)} lenses: undistort")
    lens, = lenses
    return lens if any(lens) else ()


def colmap_lens(path: Path, camera: int, model: str, width: float, height: float,
                parameters: list[float]) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """A camera -> (fx/W, fy/H, cx/W, cy/H), and its distortion k1 k2 p1 p2. Parameters are in pixels, focal lengths
    first, then cx cy, then distortion."""
    known = {name: (focals, count) for name, focals, count in COLMAP_MODELS}
    focals, count = known.get(model, (1, 0))
    lens = parameters[focals + 2 :]
    if len(parameters) != count or "FISHEYE" in model or (model not in UNDISTORTED and any(lens)):
        raise ValueError(f"cameras{path.suffix}: camera {camera} is {model} {parameters}, expected one of "
                         f"{', '.join(UNDISTORTED)}: undistort")
    if not (width > 0 and height > 0):
        raise ValueError(f"cameras{path.suffix}: camera {camera} has pictures of {width:g}x{height:g} pixels")
    cx, cy = parameters[focals : focals + 2]
    K = (parameters[0] / width, parameters[focals - 1] / height, cx / width, cy / height)
    return K, tuple((lens + [0.0] * 4)[:4])


def colmap_cameras_txt(path: Path) -> dict[int, tuple]:
    """A line is: id model width height, then the model's parameters."""
    cameras = {}
    for n, line in enumerate(read_text(path).split("\n"), 1):
        if line.strip() and not line.startswith("#"):
            with blamed(f"{path.name} line {n}"):
                name, model, *numbers = line.split()
                width, height, *parameters = map(float, numbers)
                cameras[int(name)] = (model, width, height, parameters)
    return cameras


def colmap_images_txt(path: Path) -> dict[str, ColmapImage]:
    """An image's line is id qw qx qy qz tx ty tz camera name. After it comes one with its points, x y id each, which
    may be empty, and which some programs leave out."""
    images: dict[str, ColmapImage] = {}
    points_next = False
    for n, line in enumerate(read_text(path).split("\n"), 1):
        fields = line.split()
        if line.startswith("#") or (not fields and not points_next):
            continue
        if points_next and (not fields or (len(fields) % 3 == 0 and all(map(is_number, fields)))):
            points_next = False
            continue
        with blamed(f"{path.name} line {n}"):
            _, *pose, camera, name = line.strip().split(maxsplit=9)
            pose = [float(number) for number in pose]
            images[name] = ColmapImage(pose[:4], pose[4:], int(camera))
        points_next = True
    return images


def is_number(text: str) -> bool:
    with suppress(ValueError):
        return math.isfinite(float(text))
    return False


def colmap_cameras_bin(path: Path) -> dict[int, tuple]:
    """A count, and of each camera: id, model, width, height, then the model's parameters."""
    data, cameras = path.read_bytes(), {}
    (count,), at = struct.unpack_from("<Q", data), 8
    for _ in range(count):
        name, model, width, height = struct.unpack_from("<iiQQ", data, at)
        if not 0 <= model < len(COLMAP_MODELS):
            raise ValueError(f"camera {name} is of model {model}, unknown: undistort")
        model_name, _, parameters = COLMAP_MODELS[model]
        cameras[name] = (model_name, width, height, [*struct.unpack_from(f"<{parameters}d", data, at + 24)])
        at += 24 + 8 * parameters
    return cameras


def colmap_images_bin(path: Path) -> dict[str, ColmapImage]:
    """A count, and of each image: id, pose, camera, name up to a zero, and its points, 24 bytes each."""
    data, images = path.read_bytes(), {}
    (count,), at = struct.unpack_from("<Q", data), 8
    for _ in range(count):
        _, *pose, camera = struct.unpack_from("<i7di", data, at)
        end = data.index(b"\0", at + 64)
        name = data[at + 64 : end].decode()
        (points,) = struct.unpack_from("<Q", data, end + 1)
        images[name] = ColmapImage(pose[:4], pose[4:], camera)
        at = end + 9 + 24 * points
    return images


def read_transforms(spec: dict, aspect: float) -> Poses:
    """transforms.json of nerfstudio, instant-ngp and Blender: OpenGL's camera-to-world; pixels, or angles of view."""
    frames = sorted(spec["frames"], key=lambda frame: natural(str(frame.get("file_path", ""))))
    matrices = torch.tensor([frame["transform_matrix"] for frame in frames], dtype=torch.float64)
    c2w = check_poses(to_square(matrices), "transform_matrix") @ OPENGL
    Ks, lenses = [], []
    for frame in frames:
        own = spec | frame
        if "fl_x" in own and "w" in own:
            w, h, fl_x = own["w"], own["h"], own["fl_x"]
            K = (fl_x / w, own.get("fl_y", fl_x) / h, own.get("cx", w / 2) / w, own.get("cy", h / 2) / h)
        elif "camera_angle_x" in own:
            fx = 0.5 / math.tan(own["camera_angle_x"] / 2)
            K = (fx, 0.5 / math.tan(own["camera_angle_y"] / 2) if "camera_angle_y" in own else fx * aspect, 0.5, 0.5)
        else:
            K = None
        Ks.append(K)
        lenses.append(tuple(float(own.get(k, 0)) for k in ("k1", "k2", "p1", "p2")))
        model = str(own.get("camera_model"))
        if any(own.get(k) for k in ("k3", "k4", "is_fisheye")) or re.search("FISHEYE|EQUI", model):
            raise ValueError(f"a lens of {model}, fisheye or with k3 or k4: undistort")
    numbers = picture_numbers([str(frame.get("file_path", "")) for frame in frames])
    return Poses(invert_se3(c2w), None if None in Ks else Ks, numbers, lens=one_lens(lenses), measured=False)


def read_recammaster(spec: dict, clip: str) -> Poses:
    """camera_extrinsics.json of ReCamMaster and SynCamMaster: of each frame and camera a 4x4 in words, transposed, in
    Unreal's axes (x forward, y right, z up) and centimetres. Of several cameras, the one called as the clip."""
    names = sorted(spec, key=natural)
    cameras = sorted(spec[names[0]])
    camera = cameras[0] if len(cameras) == 1 else Path(clip).stem
    if camera not in cameras:
        raise ValueError(f"poses of {', '.join(cameras)[:80]}, none called as the clip {clip!r}")
    words = [spec[name][camera] for name in names]
    rows = [[float(x) for x in re.findall(r"[-+.\deE]+", text)] for text in words]
    c2w = torch.tensor(rows, dtype=torch.float64).view(-1, 4, 4).mT
    c2w = c2w[:, :, [1, 2, 0, 3]] * c2w.new_tensor([1, -1, 1, 1])  # columns: right, down, forward, centre
    c2w[:, :3, 3] /= 100
    # relative to the first, c2w[0]^-1 c2w[i]: Unreal's world is left-handed, which multiplies from the left and cancels
    return Poses(invert_se3(check_poses(torch.linalg.solve(c2w[:1], c2w), camera)), None, picture_numbers(names))


NUMPY_C2W, NUMPY_W2C = ("c2w", "cam_c2w", "poses", "data"), ("w2c", "extrinsic", "extrinsics", "viewmats")
NUMPY_K = ("intrinsic", "intrinsics", "K")


def read_numpy(path: Path) -> Poses:
    """.npz or .npy, beside the latter intrinsics.npy and indexes.txt (SpatialVID)."""
    try:
        loaded, arrays = np.load(path, allow_pickle=False), {}
        if path.suffix.lower() == ".npz":  # other arrays, of pictures and depths, may be large
            with loaded:
                names = NUMPY_C2W + NUMPY_W2C + NUMPY_K + ("inds",)
                arrays = {name: loaded[name] for name in names if name in loaded.files}
    except Exception as error:  # numpy's, zipfile's and tokenize's are of many kinds
        raise ValueError(f"{path.name}: cannot be read ({first_line(error)})") from None
    with blamed(path.name):
        if isinstance(loaded, np.ndarray):
            inverse = any(word in path.stem.lower() for word in ("w2c", "extrinsic"))
            if loaded.ndim == 2 and loaded.shape[1] == 7:  # SpatialVID's, world-to-camera: tx ty tz qx qy qz qw
                table, inverse = torch.from_numpy(loaded.astype(np.float64)), True
                loaded = quaternion_poses(table[:, [6, 3, 4, 5]], table[:, :3]).numpy()
            arrays["w2c" if inverse else "c2w"] = loaded
            if (beside := path.with_name("intrinsics.npy")).exists():
                arrays["intrinsics"] = np.load(beside)
            if (beside := path.with_name("indexes.txt")).exists():
                arrays["inds"] = np.array(read_text(beside).split(), int)
        kind = next((name for name in NUMPY_C2W + NUMPY_W2C if name in arrays), None)
        if kind is None:
            raise ValueError(f"expected one of {', '.join(NUMPY_C2W + NUMPY_W2C)}, found {', '.join(loaded.files)}")
        poses = torch.from_numpy(np.asarray(arrays[kind], dtype=np.float64))
        if poses.ndim == 4 and len(poses) == 1:  # VGGT's, of a batch of one
            poses = poses[0]
        poses = check_poses(to_square(poses), kind)
        K = next((arrays[name] for name in NUMPY_K if name in arrays), None)
        Ks = None if K is None else numpy_intrinsics(np.asarray(K, dtype=np.float64), len(poses))
        inds = arrays["inds"].astype(int).tolist() if "inds" in arrays else None
        return Poses(poses if kind in NUMPY_W2C else invert_se3(poses), Ks, inds,
                     measured=kind not in ("extrinsic", "extrinsics") and "extrinsic" not in path.stem.lower())


def numpy_intrinsics(K: np.ndarray, count: int) -> list:
    """3x3 or fx fy cx cy, in pixels or over width and height, one or one each -> (fx, fy, cx, cy), one or one each."""
    K = K.reshape(-1, *K.shape[-2:]) if K.shape[-2:] == (3, 3) else K.reshape(-1, K.shape[-1])
    if K.shape[1:] == (3, 3):
        K = np.stack([K[:, 0, 0], K[:, 1, 1], K[:, 0, 2], K[:, 1, 2]], axis=1)
    if K.shape[1:] != (4,) or len(K) not in (1, count):
        raise ValueError(f"expected one K or {count}, as 3x3 or fx fy cx cy, found shape {list(K.shape)}")
    if (K[:, 2:] > 1).any():  # in pixels
        K = np.concatenate([K[:, :2] / (2 * K[:, 2:]), np.full_like(K[:, 2:], 0.5)], axis=1)
    return K.tolist()


def scannet_poses(folder: Path) -> list[Path]:
    """Files of a pose each: pose/0.txt of ScanNet, frame-000000.pose.txt of 7-Scenes."""
    files = {*folder.glob("pose/*.txt"), *folder.glob("*.pose.txt")}
    if folder.name == "pose":
        files |= {*folder.glob("*.txt")}
    return sorted(files, key=lambda file: natural(file.name))


def read_scannet(folder: Path) -> Poses:
    """A 4x4 camera-to-world a file; where the camera was lost it holds no numbers, and counts as none. K, 4x4 and in
    pixels, is in intrinsic/intrinsic_color.txt, if anywhere."""
    c2w, numbers = [], []
    for file in scannet_poses(folder):
        with blamed(file.name):
            matrix = torch.tensor([float(number) for number in read_text(file).split()], dtype=torch.float64).view(4, 4)
            if matrix.isfinite().all():
                c2w.append(matrix)
                numbers.append(int(re.findall(r"\d+", file.name)[-1]))
    K = None
    for file in (folder.parent if folder.name == "pose" else folder).glob("intrinsic/intrinsic_color.txt"):
        with blamed(file.name):
            numbers_of_K = [float(number) for number in read_text(file).split()]
            K = [normalise_intrinsics(torch.tensor(numbers_of_K).view(4, 4)[:3, :3], "intrinsic_color")]
    if not c2w:
        raise ValueError(f"{folder.name}: no pose in it holds numbers")
    return Poses(invert_se3(check_poses(torch.stack(c2w), folder.name)), K, numbers)


def read_pose_lines(path: Path) -> Poses:
    """A line a frame; what it is, its count of numbers tells."""
    rows, counts = [], {8: "TUM", 12: "KITTI", 16: "Replica", 19: "RealEstate10K"}
    for n, line in enumerate(read_text(path).split("\n"), 1):
        if line.strip() and not line.startswith(("#", "http")):
            with blamed(f"{path.name} line {n}"):
                rows.append([float(number) for number in line.replace(",", " ").split()])
                if len(rows[-1]) not in counts or len(rows[-1]) != len(rows[0]):
                    each = ", ".join(f"{count} ({name})" for count, name in counts.items())
                    raise ValueError(f"found {len(rows[-1])} numbers, expected in every line {each}")
    if not rows:
        raise ValueError(f"{path.name}: no poses in it")
    table = torch.tensor(rows, dtype=torch.float64)
    if table.shape[1] == 8:
        c2w = quaternion_poses(table[:, [7, 4, 5, 6]], table[:, 1:4])
        return Poses(invert_se3(check_poses(c2w, path.name)), seconds=table[:, 0].tolist())
    if table.shape[1] < 19:
        return Poses(invert_se3(check_poses(to_square(table.view(len(table), -1, 4)), path.name)))
    lens = one_lens((k1, k2, 0.0, 0.0) for k1, k2 in table[:, 5:7].tolist())
    viewmats = check_poses(to_square(table[:, 7:].view(-1, 3, 4)), "w2c")
    return Poses(viewmats, table[:, 1:5].tolist(), seconds=(table[:, 0] / 1e6).tolist(), lens=lens, measured=False)


# When a pose was: which pixel frame of the video, a fraction if between two.

MAX_GAP = 8  # pixel frames over which a pose is interpolated


def frame_positions(poses: Poses, frames: int, fps: float, pose_fps: float | None = None,
                    shown: dict[int, float] | None = None) -> list[float]:
    """Of a video with so many pixel frames, so many a second: where each pose is. pose_fps: poses come so often, from
    frame 0 on. shown: of a video that does not keep its pace, when the frames that are used are shown, in seconds.
    Raises ValueError when nothing tells, or more than one thing would do."""
    n, latent_frames = len(poses.viewmats), 1 + (frames - 1) // 4

    def frame_at(seconds: float) -> float:
        if not shown:
            return seconds * fps
        (first, start), *_, (last, end) = shown.items()
        if not start <= seconds <= end:
            return first + (seconds - start) * fps if seconds < start else last + (seconds - end) * fps
        return float(np.interp(seconds, [*shown.values()], [*shown]))

    if pose_fps:
        numbers = poses.numbers or [*range(n)]
        step = 1 / pose_fps / (math.gcd(*numbers) or 1)  # pictures 0, 5, 10 come as often as 0, 1, 2
        return [frame_at(number * step) for number in numbers]
    if n == frames:
        return [*range(n)]
    if poses.numbers:
        in_order = sorted(poses.numbers)
        last, usual = in_order[-1] + 1, median_high([b - a for a, b in pairwise(in_order)] or [0])
        if last > frames:
            raise ValueError(f"a pose of frame {last - 1}, but {frames} frames")
        every = (frames - 1) // max(1, last - 1)  # the largest stride at which there are as many frames as numbers
        if usual == 1 and every > 1 and last > 0.75 * math.ceil(frames / every):  # nearly as many are no accident
            raise ValueError(f"poses of pictures numbered up to {last}, but {frames} frames: of the first {last}, or "
                             f"of every {every}th? A column pose_fps says which, {fps:g} or {fps / every:g}")
        return poses.numbers
    if poses.seconds:
        first, last = min(poses.seconds), max(poses.seconds)
        if last <= frames / fps + 0.5:
            return [frame_at(t) for t in poses.seconds]
        if all(t == int(t) for t in poses.seconds) and last < frames:  # DROID's and DPVO's are numbers of frames
            return poses.seconds
        if last - first <= frames / fps + 0.5:  # of a clock
            return [frame_at(t - first) for t in poses.seconds]
        raise ValueError(f"time stamps from {first:g} to {last:g}, but {frames / fps:.3g} seconds of video")
    if n == latent_frames:
        return [4 * i for i in range(n)]
    raise ValueError(f"{n} poses, but {frames} frames: expected {frames}, or {latent_frames}, one per latent frame; a "
                     "column pose_fps says how many there are a second")


def poses_at(poses: Poses, positions: list[float], frames: Sequence[int]) -> tuple[Tensor, Tensor | None, int]:
    """What the camera was at some pixel frames: viewmats [t 4 4] fp64, K [t 4] fp64 if the file has them, and how many
    of these are interpolated. Raises ValueError over a gap of more than MAX_GAP frames."""
    order = sorted(range(len(positions)), key=positions.__getitem__)
    at = [positions[i] for i in order]
    before, share = [], []
    for wanted in frames:
        # half a frame before the first pose, and after the last, it is still that pose
        frame = at[0] if at[0] - 0.5 <= wanted < at[0] else wanted
        n = bisect_right(at, frame + 1e-3) - 1
        if n < 0 or (n == len(at) - 1 and frame > at[-1] + 0.5):
            raise ValueError(f"poses {'begin after' if n < 0 else 'end before'} frame {frame} of the video")
        after = min(n + 1, len(at) - 1)
        gap = at[after] - at[n]
        between = abs(frame - at[n]) > 1e-3 and gap > 0
        if between and gap > MAX_GAP:
            raise ValueError(f"none between frames {at[n]:g} and {at[after]:g} of the video, more than {MAX_GAP} apart")
        before.append(n)
        share.append((frame - at[n]) / gap if between else 0.0)
    index = torch.tensor(order)
    a, b = index[before], index[[min(n + 1, len(at) - 1) for n in before]]
    s = torch.tensor(share, dtype=torch.float64)
    made = int((s > 0).sum())
    c2w = invert_se3(poses.viewmats)
    viewmats = torch.where((s > 0)[:, None, None], invert_se3(between_poses(c2w[a], c2w[b], s)), poses.viewmats[a])
    if poses.K is None:
        return viewmats, None, made
    Ks = torch.tensor(poses.K, dtype=torch.float64)
    if len(Ks) not in (1, len(at)):
        raise ValueError(f"found {len(Ks)} intrinsics (K), but {len(at)} poses: expected 1 or one each")
    if len(Ks) == 1:
        return viewmats, Ks.expand(len(frames), 4), made
    return viewmats, torch.lerp(Ks[a], Ks[b], s[:, None]), made


def distort(xy: Tensor, lens: tuple[float, ...]) -> Tensor:
    """Where a lens k1 k2 p1 p2 shows what a pinhole would show at xy [... 2], both as tangents of angles (OpenCV)."""
    k1, k2, p1, p2 = lens
    x, y = xy.unbind(-1)
    r = x * x + y * y
    radial = 1 + k1 * r + k2 * r * r
    return torch.stack([x * radial + 2 * p1 * x * y + p2 * (r + 2 * x * x),
                        y * radial + p1 * (r + 2 * y * y) + 2 * p2 * x * y], dim=-1)


def corner_shift(K: list[float], lens: tuple[float, ...], size: list[int]) -> float:
    """By how many pixels of a picture of `size` = [h, w] a lens moves its corners."""
    K = torch.tensor(K, dtype=torch.float64)
    corners = (torch.tensor([[0, 0], [0, 1], [1, 0], [1, 1]], dtype=torch.float64) - K[2:]) / K[:2]
    shift = (distort(corners, lens) - corners) * K[:2] * torch.tensor([size[1], size[0]])
    return shift.norm(dim=-1).max().item()


@lru_cache(maxsize=4)
def lens_grid(height: int, width: int, K: tuple[float, ...], lens: tuple[float, ...]) -> Tensor:
    """Where a lens shows what a pinhole of the same K shows at each pixel [1 h w 2], from -1 to 1."""
    y, x = torch.meshgrid((torch.arange(height) + 0.5) / height, (torch.arange(width) + 0.5) / width, indexing="ij")
    focal, centre = torch.tensor(K).split(2)
    seen = distort((torch.stack([x, y], dim=-1) - centre) / focal, lens) * focal + centre
    return (2 * seen - 1).float()[None]


def undistort(video: Tensor, K: list[float], lens: tuple[float, ...]) -> Tensor:
    """Pictures [t 3 H W] through a lens -> as a pinhole of the same K (over width and height) would show them."""
    grid = lens_grid(*video.shape[2:], tuple(K), tuple(lens)).expand(len(video), -1, -1, -1)
    return F.grid_sample(video.float(), grid, padding_mode="border", align_corners=False)


def undistort_points(xy: Tensor, K: Tensor, lens: tuple[float, ...]) -> Tensor:
    """Where a pinhole of the same K [4] would show what a lens shows at xy [... 2], over width and height."""
    seen = ideal = (xy - K[2:]) / K[:2]
    for _ in range(20):  # a fixed point, as what a lens does is small
        ideal = ideal - (distort(ideal, lens) - seen)
    return ideal * K[:2] + K[2:]


# ----------------------------------------------------------------------------------------------------------------------
# 7. Encoders. The real ones are transformers', imported where they are used: that takes seconds, and the toy world does
# without.


def load_encoder(preset: str, path: Path | None, device: torch.device) -> Encoder:
    """path: umT5 for a Wan preset, HunyuanVideo-1.5's folder for an HY one; None: the toy world's stand-ins.

    Networks are loaded when they are first asked, which is when a missing or broken one raises ValueError; and they are
    kept by the Encoder alone, so that dropping it frees their memory.
    """
    if PRESETS[preset].net is HYDiT:
        return make_hy_encoder(path, device) if path else Encoder("words", encode_hy_words, None, encode_places, "")
    return make_umt5_encoder(path, device) if path else Encoder("words", encode_wan_words, TEXT_LEN, None, "")


def encode_wan_words(prompt: str) -> dict[str, Tensor]:
    """The toy world's umT5: embeds [l 96]."""
    return {"embeds": trimmed(encode_words(prompt))}


def encode_hy_words(prompt: str) -> dict[str, Tensor]:
    """The toy world's Qwen2.5-VL: text [l 96]. byt5 [0 8] is empty, since its rooms show no writing."""
    return {"text": trimmed(encode_words(prompt)), "byt5": torch.zeros(0, 8)}


def encode_places(image: Tensor) -> Tensor:
    """The toy world's SigLIP: images [b 3 H W] in [-1, 1] -> [b 16 16], a token for each of 4 x 4 places: the mean
    colours of its four quarters (12 numbers) and where it is (y, x and their squares)."""
    colours = rearrange(F.adaptive_avg_pool2d(image, 8), "b c (h p) (w q) -> b (h w) (c p q)", p=2, q=2)
    y, x = torch.meshgrid(torch.linspace(-1, 1, 4), torch.linspace(-1, 1, 4), indexing="ij")
    position = rearrange([y, x, y * y, x * x], "k h w -> (h w) k").to(image.device)
    return torch.cat([colours, position.expand(len(image), -1, -1)], dim=2)


def pad_prompts(rows: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Prompts [l d] of several lengths -> [b l d], zero past their ends, and on the CPU the mask [b l] of what is no
    padding. l is the longest of them and at least 1, as attention needs."""
    padded = nn.utils.rnn.pad_sequence(rows, batch_first=True)
    if padded.shape[1] == 0:
        padded = F.pad(padded, (0, 0, 0, 1))
    lengths = torch.tensor([len(row) for row in rows])
    return padded, torch.arange(padded.shape[1]) < lengths[:, None]


def collate_hy_prompts(rows: list[dict[str, Tensor]], null: dict[str, Tensor], vision: Tensor,
                       first: Tensor) -> tuple[HYPrompt, HYPrompt]:
    """The encoded prompts of a batch, and the null prompt -> both as HYPrompts of b; they share the image.

    rows, null: text [l d] and byt5 [l d], unpadded. vision [b l d]: SigLIP's tokens of each video's first frame, zero
    where there is no image to go on from; first [b 1 c h w]: the latents of that frame.
    """
    text, byt5 = (pad_prompts([row[name] for row in (*rows, null)]) for name in ("text", "byt5"))  # each and its mask
    words = (*text, *byt5)
    has_image = vision.flatten(1).any(1)  # [b]
    given_latents = F.pad(first, (0, 0, 0, 0, 0, 1), value=1.0)  # a channel more, 1 where they are given
    image = (vision, has_image.cpu()[:, None].expand(vision.shape[:2]), given_latents * has_image.view(-1, 1, 1, 1, 1))
    return HYPrompt(*(z[:-1] for z in words), *image), HYPrompt(*(z[-1:].expand_as(z[:-1]) for z in words), *image)


def load_pretrained(kind: Any, folder: Path | None, dtype: torch.dtype, **source) -> nn.Module:
    """A net of transformers' class `kind`, frozen. What its files lack, transformers would fill with noise and a
    warning: here that raises ValueError."""
    net, info = kind.from_pretrained(folder, dtype=dtype, output_loading_info=True, ignore_mismatched_sizes=True,
                                     **source)
    mismatched = [name for name, *_ in info["mismatched_keys"]]
    if lost := sorted([*info["missing_keys"], *mismatched]):
        raise ValueError(f"{len(lost)} of its tensors are missing or misshapen, first {lost[0]}")
    return net.eval().requires_grad_(False)


def first_line(error: Exception) -> str:
    """Of an error's text; its type if it has none."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


# umT5, Wan's text encoder.

UMT5_LEN = 512
NULL_PROMPT = (  # what guidance steers public Wan away from, in diffusers' wording
    "Bright tones, overexposed, static, blurred details, subtitles, style, works, paintings, images, static, overall "
    "gray, worst quality, low quality, JPEG compression residue, ugly, incomplete, extra fingers, poorly drawn hands, "
    "poorly drawn faces, deformed, disfigured, misshapen limbs, fused fingers, still picture, messy background, three "
    "legs, many people in the background, walking backwards")
UMT5_NAMES = (  # of a parameter: in Wan's file, in transformers
    (r"^token_embedding\.", "shared."), (r"^norm\.", "encoder.final_layer_norm."),
    (r"^blocks\.(\d+)\.norm1\.", r"encoder.block.\1.layer.0.layer_norm."),
    (r"^blocks\.(\d+)\.norm2\.", r"encoder.block.\1.layer.1.layer_norm."),
    (r"^blocks\.(\d+)\.attn\.", r"encoder.block.\1.layer.0.SelfAttention."),
    (r"^blocks\.(\d+)\.pos_embedding\.embedding\.", r"encoder.block.\1.layer.0.SelfAttention.relative_attention_bias."),
    (r"^blocks\.(\d+)\.ffn\.gate\.0\.", r"encoder.block.\1.layer.1.DenseReluDense.wi_0."),
    (r"^blocks\.(\d+)\.ffn\.fc1\.", r"encoder.block.\1.layer.1.DenseReluDense.wi_1."),
    (r"^blocks\.(\d+)\.ffn\.fc2\.", r"encoder.block.\1.layer.1.DenseReluDense.wo."),
)


class TextEncoder(NamedTuple):
    """umT5."""
    net: nn.Module
    tokenizer: Any


def make_umt5_encoder(path: Path, device: torch.device) -> Encoder:
    """umT5 as an Encoder; path as load_text_encoder takes it."""
    loaded = lru_cache(maxsize=1)(lambda: load_text_encoder(path, device))  # a cache that goes with the Encoder
    return Encoder("umt5", lambda prompt: {"embeds": trimmed(encode_prompts([prompt], loaded())[0])}, UMT5_LEN, None,
                   NULL_PROMPT)


def umt5_name(name: str) -> str:
    """Wan's name of a umT5 parameter -> transformers'."""
    for wan_pattern, transformers_name in UMT5_NAMES:
        name = re.sub(wan_pattern, transformers_name, name)
    return name


def build_umt5(weights: dict[str, Tensor]) -> nn.Module:
    """transformers' UMT5EncoderModel with Wan's weights, sizes read off them; ValueError names what does not fit."""
    from transformers import UMT5Config, UMT5EncoderModel
    try:
        vocabulary, d_model = weights["token_embedding.weight"].shape
        inner, _ = weights["blocks.0.attn.q.weight"].shape
        buckets, heads = weights["blocks.0.pos_embedding.embedding.weight"].shape
        d_ff = weights["blocks.0.ffn.fc1.weight"].shape[0]
    except (KeyError, ValueError) as error:
        raise ValueError(f"not the weights of a umT5 encoder ({error!r})") from None
    layers = sum(name.endswith("attn.q.weight") for name in weights)
    config = UMT5Config(vocab_size=vocabulary, d_model=d_model, d_kv=inner // heads, d_ff=d_ff, num_layers=layers,
                        num_heads=heads, relative_attention_num_buckets=buckets)
    with torch.device("meta"):
        net = UMT5EncoderModel(config)
    weights = {umt5_name(name): w for name, w in weights.items()}
    weights["encoder.embed_tokens.weight"] = weights["shared.weight"]
    check_same_tensors(weights, net.state_dict(), owner="a umT5 encoder")
    net.load_state_dict(weights, assign=True)
    return net.eval().requires_grad_(False)  # or its dropout would be on


@torch.no_grad()
def embed_tokens(net: nn.Module, ids: Tensor, mask: Tensor) -> Tensor:
    """Tokens and which of them are no padding, each [b l] -> umT5's last layer [b l d], zero past each prompt's end."""
    return net(ids, attention_mask=mask).last_hidden_state.float() * mask[..., None]


def load_text_encoder(path: Path, device: torch.device) -> TextEncoder:
    """umT5 from Wan's models_t5_umt5-xxl-enc-bf16.pth or a transformers folder; bf16 on a GPU, else fp32.

    The tokenizer lies in the folder itself, or beside it in tokenizer/ or google/umt5-xxl/. Raises ValueError when
    either is missing, broken or something else.
    """
    from transformers import AutoTokenizer, UMT5EncoderModel
    candidates = [path, path.parent / "tokenizer", path.parent / "google/umt5-xxl"]
    with_tokenizer = [z for z in candidates if (z / "tokenizer.json").exists() or (z / "spiece.model").exists()]
    if not path.exists() or not with_tokenizer:
        missing = f"no tokenizer in {', '.join(map(str, candidates))}" if path.exists() else "no such file or folder"
        raise ValueError(f"{path}: {missing}; expected models_t5_umt5-xxl-enc-bf16.pth or a transformers folder of "
                         "umT5")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    try:
        if path.is_dir():
            net = load_pretrained(UMT5EncoderModel, path, dtype)
        else:
            net = build_umt5(torch.load(path, map_location="cpu", weights_only=True))
        tokenizer = AutoTokenizer.from_pretrained(with_tokenizer[0])
        return TextEncoder(net.to(device, dtype).eval().requires_grad_(False), tokenizer)
    except Exception as error:  # each of the three readers raises its own kinds
        raise ValueError(f"{path}: not a umT5 encoder with its tokenizer ({first_line(error)})") from error


def encode_prompts(prompts: list[str], encoder: TextEncoder) -> Tensor:
    """Prompts -> umT5's [b 512 d], zero past their ends, cut at 512 tokens as Wan does."""
    # cleaned as Wan's pipeline does: HTML entities, some of them escaped twice, and runs of white space
    clean = [re.sub(r"\s+", " ", html.unescape(html.unescape(prompt))).strip() for prompt in prompts]
    tokens = encoder.tokenizer(clean, padding="max_length", max_length=UMT5_LEN, truncation=True, return_tensors="pt")
    device = next(encoder.net.parameters()).device
    return embed_tokens(encoder.net, tokens["input_ids"].to(device), tokens["attention_mask"].to(device))


# HunyuanVideo-1.5 uses three encoders: Qwen2.5-VL's language model for the prompt, byT5 for words to be seen in the
# video, SigLIP for its first frame. We call each as HunyuanVideo-1.5's own pipeline does, in training and in use alike.
# (minWM calls them in two ways, one in training and one in inference: a template for images, byT5 given the whole
# prompt.)

HY_TEXT_LEN, HY_BYT5_LEN = 1000, 256
HY_SYSTEM = "You are a helpful assistant. Describe the video by detailing the following aspects:" + "".join(
    " " * 9 + aspect for aspect in (  # the indentation of somebody's source code, which the model was trained on
        "1. The main content and theme of the video.",
        "2. The color, shape, size, texture, quantity, text, and spatial relationships of the objects.",
        "3. Actions, events, behaviors temporal relationships, physical movement changes of the objects.",
        "4. background environment, light, style and atmosphere.",
        "5. camera angles, movements, and transitions used in the video."))
HY_BEFORE = f"<|im_start|>system\n{HY_SYSTEM}<|im_end|>\n<|im_start|>user\n"  # Qwen's chat, as its tokenizer writes it
HY_AFTER = "<|im_end|>\n<|im_start|>assistant\n"
HY_FOLDERS = {  # part: where HunyuanVideo-1.5 has it, where diffusers has it
    "llm": ("text_encoder/llm", "text_encoder"),
    "tokenizer": ("text_encoder/llm", "tokenizer"),
    "byt5_tokenizer": ("text_encoder/byt5-small", "tokenizer_2"),
    "byt5": ("text_encoder/Glyph-SDXL-v2", "text_encoder_2"),
    "siglip": ("vision_encoder/siglip/image_encoder", "image_encoder"),
    "feature_extractor": ("vision_encoder/siglip/feature_extractor", "feature_extractor"),
}


class HYTextEncoders(NamedTuple):
    """What reads HY's prompts."""
    llm: nn.Module  # without its last two layers and norm: HY takes what goes into them
    tokenizer: Any
    byt5: nn.Module
    byt5_tokenizer: Any


class SigLIP(NamedTuple):
    """What sees HY's first frames."""
    net: Any
    size: tuple[int, int]  # height, width of the images it wants
    mode: str  # of interpolation
    mean: list[float]  # per colour, of images in [0, 1]
    std: list[float]


def make_hy_encoder(path: Path, device: torch.device) -> Encoder:
    """HunyuanVideo-1.5's encoders as one. Whoever only encodes text loads no SigLIP, and the reverse."""
    if path.name == "text_encoder":
        path = path.parent  # SigLIP lies beside it

    # caches that go with the Encoder
    text_encoders = lru_cache(maxsize=1)(lambda: load_hy_text_encoders(path, device))
    siglip = lru_cache(maxsize=1)(lambda: load_siglip(path, device))
    return Encoder("hy", lambda prompt: encode_hy_prompt(prompt, text_encoders()), None,
                   lambda image: encode_first_frame(image, siglip()), "")


def load_llm(folder: Path, dtype: torch.dtype) -> nn.Module:
    """The language model alone, of Qwen2.5-VL or by itself, up to what its last two layers read."""
    from transformers import AutoConfig, Qwen2_5_VLTextModel

    class Language(Qwen2_5_VLTextModel):
        _keys_to_ignore_on_load_unexpected = [r"^visual\.", r"^lm_head\."]

    net: Any = load_pretrained(Language, folder, dtype, config=AutoConfig.from_pretrained(folder).get_text_config())
    net.layers, net.norm = net.layers[:-2], nn.Identity()
    return net


def load_chat_tokenizer(folder: Path) -> Any:
    """Qwen's. Raises ValueError if it cannot spell the chat around a prompt."""
    from transformers import AutoTokenizer
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="right")
    ids = tokenizer(HY_BEFORE).input_ids  # without its files transformers makes a tokenizer of no words
    spelled = tokenizer.decode(ids, clean_up_tokenization_spaces=False)
    if ids[:1] != [tokenizer.convert_tokens_to_ids("<|im_start|>")] or spelled != HY_BEFORE:
        raise ValueError("its tokens cannot spell Qwen's chat")
    return tokenizer


def load_glyph_byt5(folder: Path, base: Path, tokenizer: Any) -> nn.Module:
    """byT5-small, whose config lies in `base`, as Glyph-SDXL-v2 trained it further. The tokenizer gains, in place, its
    tokens for colours and fonts."""
    from transformers import T5Config, T5EncoderModel
    colours = json.loads((folder / "assets/color_idx.json").read_text())
    fonts = json.loads((folder / "assets/multilingual_10-lang_idx.json").read_text())
    new_tokens = [f"<color-{n}>" for n in range(len(colours))]
    new_tokens += [f"<{name[:2]}-font-{n}>" for name, n in fonts.items()]
    tokenizer.add_tokens(new_tokens, special_tokens=True)
    saved = torch.load(folder / "checkpoints/byt5_model.pt", map_location="cpu", weights_only=True)
    prefix = "module.text_tower.encoder."
    weights = {f"encoder.{name.removeprefix(prefix)}": w for name, w in saved.get("state_dict", saved).items()}
    config = T5Config.from_pretrained(base, vocab_size=len(tokenizer))
    return load_pretrained(T5EncoderModel, None, torch.float32, config=config, state_dict=weights)


def read_feature_extractor(folder: Path) -> dict[str, Any]:
    """How SigLIP wants an image: the fields of SigLIP but for its net. transformers' own processors differ with what
    else is installed."""
    match json.loads((folder / "preprocessor_config.json").read_text()):
        case {"size": {"height": int(h), "width": int(w)}, "resample": 2 | 3 as resample,
              "image_mean": [_, _, _] as mean, "image_std": [_, _, _] as std}:
            return {"size": (h, w), "mode": {2: "bilinear", 3: "bicubic"}[resample], "mean": mean, "std": std}
    raise ValueError("preprocessor_config.json: expected size, resample 2 or 3, image_mean and image_std")


def is_released_layout(path: Path) -> bool:
    """Is it HunyuanVideo-1.5's folder as released, or as diffusers has it?"""
    return not (path / "text_encoder/config.json").exists()


@contextmanager
def hy_part(path: Path, part: str) -> Iterator[Path]:
    """Where a part of HY_FOLDERS lies. Raises ValueError if it is missing; and whatever goes wrong while it is loaded
    becomes a ValueError of one line that names the folder."""
    released, diffusers = HY_FOLDERS[part]
    folder = path / (released if is_released_layout(path) else diffusers)
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder; expected HunyuanVideo-1.5 with its encoders, or diffusers'")
    try:
        yield folder
    except Exception as error:  # each of transformers' readers raises its own kinds
        raise ValueError(f"{folder}: not the {part} of HunyuanVideo-1.5 ({first_line(error)})") from error


def load_hy_text_encoders(path: Path, device: torch.device) -> HYTextEncoders:
    """From HunyuanVideo-1.5's folder as released or as diffusers has it. Raises ValueError naming what is missing,
    broken or something else.

    fp16 on a GPU, as HY's own pipeline, else fp32; byT5 always fp32: T5s overflow fp16.
    """
    from transformers import ByT5Tokenizer, T5EncoderModel
    dtype = torch.float16 if device.type == "cuda" else torch.float32
    with hy_part(path, "llm") as folder:
        llm = load_llm(folder, dtype)
    with hy_part(path, "tokenizer") as folder:
        tokenizer = load_chat_tokenizer(folder)
    with hy_part(path, "byt5_tokenizer") as base:
        byt5_tokenizer = ByT5Tokenizer.from_pretrained(base)
    with hy_part(path, "byt5") as folder:
        if is_released_layout(path):
            byt5 = load_glyph_byt5(folder, base, byt5_tokenizer)
        else:
            byt5 = load_pretrained(T5EncoderModel, folder, torch.float32)
    return HYTextEncoders(llm.to(device), tokenizer, byt5.to(device), byt5_tokenizer)


def load_siglip(path: Path, device: torch.device) -> SigLIP:
    """From the same folder, in the same precision. Raises ValueError as above."""
    from transformers import SiglipVisionModel
    dtype = torch.float16 if device.type == "cuda" else torch.float32
    with hy_part(path, "siglip") as folder:
        net = load_pretrained(SiglipVisionModel, folder, dtype)
    with hy_part(path, "feature_extractor") as folder:
        recipe = read_feature_extractor(folder)
    return SigLIP(net.to(device), **recipe)


def quoted(prompt: str) -> str:
    """What a prompt has in "straight" or “curly” quotes, each once, in the words that byT5 was trained on."""
    pairs = re.findall(r'"(.*?)"|“(.*?)”', prompt)
    texts = dict.fromkeys(straight or curly for straight, curly in pairs)
    return "".join(f'Text "{text}". ' for text in texts)


def encode_padded(net: nn.Module, tokenizer: Any, texts: list[str], length: int) -> tuple[Tensor, Tensor]:
    """Texts -> their last states [b length d], zero past their ends, and which are no padding [b length]."""
    tokens = tokenizer(texts, padding=True, truncation=True, max_length=length, return_tensors="pt")
    device = next(net.parameters()).device
    ids, mask = tokens["input_ids"].to(device), tokens["attention_mask"].to(device)
    padding = length - ids.shape[1]  # of zeros, added afterwards: the longest of the batch decides how much to compute
    return F.pad(embed_tokens(net, ids, mask), (0, 0, 0, padding)), F.pad(mask, (0, padding))


def encode_hy_prompts(prompts: list[str], encoders: HYTextEncoders) -> dict[str, Tensor]:
    """Prompts -> text [b 1000 d], text_mask [b 1000], byt5 [b 256 d], byt5_mask [b 256], zero where the masks are."""
    # the system message is the same for every prompt: the model reads it for context, and its states are cut off
    crop = len(encoders.tokenizer(HY_BEFORE).input_ids)
    chats = [f"{HY_BEFORE}{prompt or ' '}{HY_AFTER}" for prompt in prompts]
    text, text_mask = encode_padded(encoders.llm, encoders.tokenizer, chats, crop + HY_TEXT_LEN)
    glyphs = [quoted(prompt) for prompt in prompts]
    byt5, byt5_mask = encode_padded(encoders.byt5, encoders.byt5_tokenizer, glyphs, HY_BYT5_LEN)
    # a prompt without quotes would still have one token, the end of text
    any_glyphs = torch.tensor([bool(text) for text in glyphs], device=byt5.device)[:, None]
    return {"text": text[:, crop:], "text_mask": text_mask[:, crop:], "byt5": byt5 * any_glyphs[..., None],
            "byt5_mask": byt5_mask * any_glyphs}


def encode_hy_prompt(prompt: str, encoders: HYTextEncoders) -> dict[str, Tensor]:
    """One prompt, without the padding that only a batch needs: text [l d], byt5 [l d]."""
    padded = encode_hy_prompts([prompt], encoders)
    return {name: padded[name][0, : int(padded[f"{name}_mask"].sum())] for name in ("text", "byt5")}


@torch.no_grad()
def encode_first_frame(image: Tensor, siglip: SigLIP) -> Tensor:
    """The first frame of a video [b 3 H W] in [-1, 1] -> SigLIP's tokens [b 729 1152], in training and in use alike.

    HunyuanVideo-1.5 cuts an image to the video's shape, keeping its aspect, and SigLIP's processor squashes that into a
    square. A frame has its shape already, so the squash is left. To cut a square out of it would hide two fifths of a
    480x832 video. (minWM squashes twice, the image to the video's shape too.)
    """
    device = siglip.net.device
    x = F.interpolate(image.to(device, torch.float32) / 2 + 0.5, siglip.size, mode=siglip.mode, antialias=True)
    mean = torch.tensor(siglip.mean, device=device)[:, None, None]
    std = torch.tensor(siglip.std, device=device)[:, None, None]
    x = (x.clamp(0, 1) - mean) / std  # bicubic overshoots
    return siglip.net(x.to(siglip.net.dtype)).last_hidden_state.float()


# ----------------------------------------------------------------------------------------------------------------------
# 8. Videos. A folder of them and a table of captions and cameras become a folder of latents in three passes: look at
# every clip, judge it beside all others, encode what is kept. What a pass makes depends on its input alone, so a run
# can be killed and started again, and any number of processes write the same files.
#
# Frames of a video file are pixel frames; latent frames are always called so, but for the flag --frames and for what
# training compares, meta["frames"].

VIDEOS = (".mp4", ".gif", ".webm", ".mov", ".avi", ".mkv")
TABLE = f"""a table of the videos, .jsonl, .json (a list of objects) or .csv, with the columns
  file      below the folder
  caption   what it shows; or a .txt of the same name beside the video says so
  poses     where the camera was. Either a pose string, as for stream.py, or a file or folder, beside the table:
{textwrap.indent(POSE_FILES, " " * 14)}
            As many poses as the video has frames, or one per latent frame: of frames 0, 4, 8 ... Or of some frames, if
            numbers in the names of pictures or time stamps say of which: up to {MAX_GAP} frames between two poses are
            interpolated, and only the frames that are used need any.
  K         optional: fx/W fy/H cx/W cy/H of the video, instead of what the poses' file says
  start     optional: the first frame to use, so that a long video can stand in several rows
  pose_fps  optional: how many poses there are a second, from the first frame on
  weight    optional: 0.5 is to train on it half as often as on others, 2 twice as often. An epoch is as long as ever"""
UNUSABLE = {  # why a clip can never be used: what it means
    "unlisted": "no row of the table names it",
    "video": "missing, damaged, too short, or of too few frames a second",
    "caption": "empty, or more than the text encoder reads",
    "poses": "missing, unreadable, not rigid, or not as many as frames",
    "intrinsics": "missing, or out of range",
    "weight": "not a number from 0.001 to 1000",
}
DOUBTFUL = {  # why a clip is dropped unless --keep names the reason
    "small": "smaller than --size: it would be enlarged",
    "skewed": "K says that its pixels are not square, by more than 10 %: are width and height swapped?",
    "scale": "its steps are over ten times those of the pose strings: see --scale",
    "jump": "between two frames the camera moves over ten times the usual and a whole step, or turns over 15 degrees",
    "cut": "between two frames the picture changes over six times the usual",
    "static": "the picture stands still and the camera does not, or the reverse",
    "disagree": "what moves in its pictures is not what its poses say",
    "uncertain": "its pictures move as those of other clips with such poses do not",
    "dark": "under 6 % bright on average",
    "bright": "over half of it is blown out",
    "duplicate": "it looks like an earlier clip",
}
SURPLUS = "surplus"  # why a clip is dropped with --at-most


class Clip(NamedTuple):
    """A row of the table, as written there."""
    file: str
    start: int  # the first pixel frame to use
    caption: str
    poses: str | dict
    K: str | list | None
    pose_fps: str | float | None = None
    weight: str | float | None = None


class ClipFormat(NamedTuple):
    """What every clip is turned into: 1 + 4 (latent_frames - 1) pixel frames, 1 / fps apart, of size [h, w]."""
    latent_frames: int
    fps: float
    size: list[int]


# The table.


def find_table(folder: Path) -> Path:
    """The one table in a folder. Raises ValueError if there is none, or several."""
    candidates = [folder / "table.jsonl", folder / "table.json", folder / "table.csv"]
    tables = [path for path in candidates if path.exists()]
    if len(tables) != 1:
        raise ValueError(f"{folder}: expected one table.jsonl, table.json or table.csv, found {len(tables)}; "
                         "--table names another")
    return tables[0]


def read_table(path: Path) -> list[Clip]:
    """Raises ValueError, naming the row, for what is not a table. What is wrong with one clip alone is for later."""
    text, suffix = read_text(path), path.suffix.lower()
    try:
        if suffix == ".csv":
            rows: Any = list(csv.DictReader(io.StringIO(text)))
        elif suffix == ".jsonl":  # a string may hold other line breaks than this one
            rows = [json.loads(line) for line in text.split("\n") if line.strip()]
        else:
            rows = json.loads(text)
    except (json.JSONDecodeError, RecursionError, csv.Error) as error:
        raise ValueError(f"{path}: not {path.suffix} ({error})") from None
    if not isinstance(rows, list) or not rows:
        raise ValueError(f"{path}: expected a list of rows with the columns file, caption, poses")
    clips = []
    for n, row in enumerate(rows):
        if not isinstance(row, dict) or not {"file", "poses"} <= set(row):
            found = list(row) if isinstance(row, dict) else repr(row)
            raise ValueError(f"{path}: row {n} needs the columns file, poses, and a caption, and has {found}")
        said = {name: cell for name, cell in row.items() if str(cell).strip()}  # a blank cell says nothing
        start = str(said.get("start") or 0).strip().removesuffix(".0")  # as a table with gaps in the column is written
        if not start.isdecimal():
            raise ValueError(f"{path}: row {n} starts at {start!r}, expected the number of a frame")
        caption = str(row.get("caption") or "").strip()
        clips.append(Clip(str(row["file"]), int(start), caption, row["poses"], said.get("K"), said.get("pose_fps"),
                          said.get("weight")))
    return clips


def with_caption(clip: Clip, folder: Path) -> Clip:
    """Its caption from the .txt beside its video, if the table has none."""
    with suppress(ValueError, OSError):  # none that can be read: its caption is empty
        beside = (folder / clip.file).with_suffix(".txt")
        if not clip.caption and beside.is_file() and Path(str(clip.poses)).name != beside.name:
            return clip._replace(caption=" ".join(read_text(beside).split()))
    return clip


def checked_weight(clip: Clip) -> float:
    """How often it is to be trained on, beside others; 1 if nothing is said."""
    if clip.weight is None:
        return 1.0
    if not 1e-3 <= float(clip.weight) <= 1e3:
        raise ValueError(f"{clip.weight}: expected 0.001 to 1000")
    return float(clip.weight)


def clip_number(clip: Clip) -> int:
    """32 bits that look random, but depend on the clip alone and not on its place in the table."""
    return zlib.crc32(f"{clip.file} {clip.start}".encode())


# Frames.


def resize_crop_size(height: int, width: int, size: list[int]) -> tuple[int, int, int, int]:
    """How a picture becomes `size` = [h, w]: resized to the least [rows, columns] that covers it, its aspect kept, then
    cut in the middle, from [top, left] on."""
    h, w = size
    scale = max(h / height, w / width)
    rows, columns = max(h, round(scale * height)), max(w, round(scale * width))
    return rows, columns, (rows - h) // 2, (columns - w) // 2


def resize_and_crop(video: Tensor, size: list[int]) -> Tensor:
    """video [t 3 H W], floats -> [t 3 h w], cut around the middle."""
    height, width = video.shape[2:]
    rows, columns, top, left = resize_crop_size(height, width, size)
    video = F.interpolate(video, [rows, columns], mode="bilinear", antialias=True)
    return video[:, :, top : top + size[0], left : left + size[1]]


def crop_intrinsics(K: Tensor, height: int, width: int, size: list[int]) -> Tensor:
    """K [... 4] (fx, fy, cx, cy) of a picture, over its width and height -> K of what resize_and_crop makes of it."""
    rows, columns, top, left = resize_crop_size(height, width, size)
    zoom = K.new_tensor([columns / size[1], rows / size[0]] * 2)
    return K * zoom - K.new_tensor([0, 0, left / size[1], top / size[0]])


def sample_frame_indices(start: int, own_fps: float, wanted: ClipFormat) -> list[int]:
    """Which pixel frames of a video that has own_fps, from `start` on, show moments 1 / fps apart."""
    pixel_frames = 1 + 4 * (wanted.latent_frames - 1)
    return [start + math.floor(n * own_fps / wanted.fps + 0.5) for n in range(pixel_frames)]


def nearest_frames(start: int, times: list[float], wanted: ClipFormat) -> list[int]:
    """The same of a video that does not keep its pace: the frames that are shown nearest to these moments. Raises
    ValueError where none is near."""
    indices = []
    for n in range(1 + 4 * (wanted.latent_frames - 1)):
        moment = times[start] + n / wanted.fps
        after = min(bisect_left(times, moment), len(times) - 1)
        index = min((max(after - 1, 0), after), key=lambda i: abs(times[i] - moment))
        if abs(times[index] - moment) > 0.75 / wanted.fps:
            raise ValueError(f"it does not keep its pace: {moment:.2f} s after its beginning no frame is shown within "
                             f"{1000 * abs(times[index] - moment):.0f} ms, --fps {wanted.fps:g}")
        indices.append(index)
    return indices


@lru_cache(maxsize=1)
def find_ffmpeg() -> str:
    """Raises ValueError if there is none, or one that cannot do what is asked of it: no video is to blame for that."""
    try:
        ffmpeg = imageio_ffmpeg.get_ffmpeg_exe()
        command = [ffmpeg, "-v", "error", "-f", "lavfi", "-i", "color=size=16x16:duration=0.1", *FRAMES_AS_STORED,
                   "-f", "null", "-"]
        done = subprocess.run(command, capture_output=True, text=True, errors="replace")
    except (OSError, RuntimeError) as error:
        raise ValueError(f"ffmpeg: cannot be run ({error})") from None
    if done.returncode:
        wrong = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[0]
        raise ValueError(f"ffmpeg: {ffmpeg} cannot be used ({wrong}); expected version 5.1 or newer, as comes with "
                         "imageio-ffmpeg; IMAGEIO_FFMPEG_EXE names another")
    return ffmpeg


# Of the first video that is no cover; and none dropped or repeated to keep an even pace.
FRAMES_AS_STORED = ["-map", "0:V:0", "-fps_mode", "passthrough"]


def open_video(path: Path) -> dict[str, Any]:
    """Its "size" (width, height), as it is shown, and its "fps". Raises ValueError when it is damaged."""
    find_ffmpeg()
    try:
        reader = imageio_ffmpeg.read_frames(path, output_params=FRAMES_AS_STORED)
        about = next(reader)
        reader.close()
    except Exception as error:  # of any kind, with all that ffmpeg had to say
        if isinstance(error, OSError) and error.errno:  # of the machine
            raise
        raise ValueError(f"not a video ({(str(error).strip().splitlines() or ['?'])[-1].strip()})") from None
    return about


@contextmanager
def run_ffmpeg(path: Path, before: list[str], after: list[str]) -> Iterator[IO[bytes]]:
    """What ffmpeg makes of a video, to be read to its end. Raises ValueError then with what it complained of: it makes
    up what it cannot read, and says so only there."""
    with tempfile.TemporaryFile() as log:
        command = [find_ffmpeg(), "-v", "error", "-nostdin", *before, "-i", str(path.absolute()), *FRAMES_AS_STORED,
                   *after, "-"]
        decoder = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log)
        try:
            yield decoder.stdout
            if decoder.stdout.read(1):
                raise ValueError("damaged: it holds more than it says")
            status = decoder.wait()
        finally:
            decoder.stdout.close()
            decoder.kill()
            decoder.wait()
        log.seek(0)
        lines = [line for line in log.read().decode(errors="replace").splitlines()
                 if line.strip() and "non monotonically increasing dts" not in line]  # of our way to write it
    if status in (-signal.SIGKILL, -signal.SIGTERM):  # by the machine, which is short of something
        raise OSError(f"{path}: ffmpeg was killed by signal {-status}")
    if lines or status:
        raise ValueError(f"damaged ({lines[0].strip() if lines else f'ffmpeg: {status}'})")


class VideoFile(NamedTuple):
    """What a video file is, as it is shown."""
    height: int
    width: int
    fps: float
    times: list[float]  # when each of its pixel frames is shown, in seconds
    steady: bool  # does it keep its pace?


@lru_cache(maxsize=64)
def survey_file(path: Path, stamp: int) -> VideoFile | str:
    """Counts the frames of a file, once for all of its clips (stamp: when it was last written). A text says that it is
    missing or damaged."""
    times: list[float] = []
    try:
        about = open_video(path)
        with run_ffmpeg(path, [], ["-enc_time_base", "1/90000", "-f", "framecrc"]) as listing:
            for line in listing:
                if not line.startswith(b"#"):
                    times.append(int(line.split(b",")[2]) / 90000)  # stream, dts, pts, ...
    except ValueError as error:
        return f"{error}, of {len(times)} frames" if times else str(error)
    if len(times) > 1 and times[-1] <= times[0]:
        return "damaged: all its frames have one time stamp"

    def steady(fps: float) -> bool:
        return all(abs((t - times[0]) * fps - n) < 0.25 for n, t in enumerate(times))

    (width, height), fps = about["size"], about["fps"]
    if not steady(fps):  # the header's is rounded, or an average
        fps = (len(times) - 1) / (times[-1] - times[0])
    return VideoFile(height, width, fps, times, steady(fps))


SEEKABLE = {".mp4", ".m4v", ".mov", ".mkv", ".webm"}  # they say where each frame is


def read_frames(path: Path, survey: dict[str, Any], size: list[int], K: list[float] | None = None,
                lens: tuple[float, ...] = ()) -> Tensor:
    """The pixel frames of a clip, resized and cut [t 3 h w], uint8. Raises ValueError when the file is damaged there.

    survey: what survey_clip says of the file, the frames and where to seek them. K, lens: of the file's pictures; what
    the lens did to them is undone.
    """
    height, width, indices, seek = (survey[name] for name in ("height", "width", "indices", "seek"))
    first = indices[0] if seek else 0  # of those that are decoded
    count = indices[-1] + 1 - first
    video: list[Tensor] = []
    # sought a second too early: after a key frame, some codecs show pictures that need what was before it
    early = min(seek, max(1, 32 / survey["fps"]))
    begin, then = (["-ss", f"{seek - early:.6f}"], ["-ss", f"{early:.6f}"]) if seek else ([], [])
    raw = ["-frames:v", str(count), "-s", f"{width}x{height}", "-f", "rawvideo", "-pix_fmt", "rgb24"]
    with run_ffmpeg(path, begin, [*then, *raw]) as frames:
        for n in range(first, first + count):
            frame = frames.read(3 * width * height)
            if len(frame) < 3 * width * height:
                break
            repeats = indices.count(n)  # a video that is a little slower than --fps shows a frame twice now and then
            if repeats:
                pixels = torch.frombuffer(bytearray(frame), dtype=torch.uint8)
                picture = rearrange(pixels, "(h w c) -> 1 c h w", h=height, c=3).float()
                if lens:
                    picture = undistort(picture, K, lens)
                video += [resize_and_crop(picture, size).round().byte()] * repeats
    if len(video) < len(indices):
        raise ValueError(f"damaged: it ends before frame {indices[len(video)]}")
    return torch.cat(video)


# Do the pictures agree with the poses? Patches that two pictures share lie on each other's epipolar lines and in front
# of both cameras, if the cameras are right. To find them takes pictures alone: pass 1 does, and pass 2 judges.

MATCH_HEIGHT, MATCH_PAIRS = 96, 6  # rows of a picture, pairs of a clip
MATCH_LEAST, MATCH_MOST = 15, 40  # patches of a pair
REACH, HALF = 10, 4  # pixels that a patch is looked for on either side, and half its width


def match_patches(a: Tensor, b: Tensor) -> Tensor:
    """Pictures [h w], grey, 0 to 1 -> where they show the same, [n 4]: x y in a, x y in b, over width and height."""
    h, w = a.shape
    margin, patch, window = REACH + HALF, 2 * HALF + 1, 2 * (REACH + HALF) + 1
    if min(h, w) <= window:
        return a.new_zeros(0, 4)
    y, x = torch.meshgrid(torch.linspace(margin, h - 1 - margin, 12).long(),
                          torch.linspace(margin, w - 1 - margin, round(12 * w / h)).long(), indexing="ij")
    y, x = y.flatten(), x.flatten()
    own = a.unfold(0, patch, 1).unfold(1, patch, 1)[y - HALF, x - HALF].flatten(1)  # [n 81]
    clear = own.std(1) > 0.03
    own, y, x = own[clear], y[clear], x[clear]
    around = b.unfold(0, window, 1).unfold(1, window, 1)[y - margin, x - margin]
    others = around.unfold(1, patch, 1).unfold(2, patch, 1).flatten(3).flatten(1, 2)  # [n 441 81]
    own, others = (F.normalize(z - z.mean(-1, keepdim=True), dim=-1) for z in (own, others))
    steps = torch.arange(-REACH, REACH + 1)
    far = (steps[:, None].square() + steps.square()).sqrt().flatten()
    # along an edge many places look alike: of them the nearest
    likeness, best = (torch.einsum("np,nkp->nk", own, others) - 1e-3 * far).max(1)
    dy, dx = best // (2 * REACH + 1) - REACH, best % (2 * REACH + 1) - REACH
    found = torch.stack([(x + 0.5) / w, (y + 0.5) / h, (x + dx + 0.5) / w, (y + dy + 0.5) / h], dim=1)
    return found[likeness > 0.9]


def packed(match: Tensor) -> str:
    """[n 4] in text, a ten-thousandth exact: there are 20,000 clips in a folder."""
    return base64.b64encode((10_000 * match).round().short().numpy().tobytes()).decode()


def unpacked(text: str) -> Tensor:
    """[n 4] fp64."""
    numbers = np.frombuffer(base64.b64decode(text), dtype=np.int16)
    return torch.from_numpy(numbers.astype(np.float64)).view(-1, 4) / 10_000


HYPOTHESES = {  # what else the poses may have been meant as: viewmats [n 4 4] -> viewmats
    "as given": lambda viewmats: viewmats,
    "inverted": invert_se3,
    "with OpenGL's axes": lambda viewmats: OPENGL @ viewmats,
    "inverted, with OpenGL's axes": lambda viewmats: OPENGL @ invert_se3(viewmats),
    "in reverse order": lambda viewmats: viewmats.flip(0),
}


def disagreement(match: Tensor, a: Tensor, b: Tensor, K: Tensor) -> float:
    """Of matches [n 4] seen from viewmats a and b [4 4], all fp64: the median distance from epipolar lines, in pixels
    of MATCH_HEIGHT rows, and two for the share that lies behind a camera."""
    one, two = (F.pad((xy - K[2:]) / K[:2], (0, 1), value=1.0) for xy in (match[:, :2], match[:, 2:]))
    T = b @ invert_se3(a[None])[0]
    R, t = T[:3, :3], T[:3, 3]
    pixels = K[1] * MATCH_HEIGHT
    turned = one @ R.mT
    if t.norm() < 1e-4:  # a turn: every ray is known
        behind = (turned[:, 2] <= 0).double().mean()
        return ((turned[:, :2] / turned[:, 2:] - two[:, :2]).norm(dim=1).median() * pixels + 2 * behind).item()
    E = torch.linalg.cross(t.expand(3, 3), R.mT, dim=-1).mT  # [t]x R
    line_two, line_one = one @ E.mT, two @ E
    slope = line_two[:, :2].square().sum(1) + line_one[:, :2].square().sum(1)
    distance = (two * line_two).sum(1).abs() / slope.sqrt()  # Sampson's
    depth = torch.linalg.lstsq(torch.stack([turned, -two], dim=-1), -t.expand(len(one), 3)[..., None]).solution[..., 0]
    return (distance.median() * pixels + 2 * (depth <= 0).any(1).double().mean()).item()


def agreement(matches: list, viewmats: Tensor, K: Tensor, lens: tuple[float, ...] = ()) -> dict[str, float]:
    """How far the pictures of a clip disagree with each reading of its poses: the median over its pairs of pictures,
    {} when too little was found. matches: of each pair its first latent frame and its patches; viewmats [f 4 4] and
    K [f 4], fp64; lens: what the pictures were taken through."""
    found = [(i, unpacked(text)) for i, text in matches]
    if lens:
        found = [(i, undistort_points(match.view(-1, 2, 2), K[i], lens).flatten(1)) for i, match in found]
    moving = [(i, match) for i, match in found if len(match) >= MATCH_LEAST and shift(match, 0.5) >= 1]
    if len(moving) < 2:
        return {}
    costs = {}
    for name, reading in HYPOTHESES.items():
        poses = reading(viewmats)
        costs[name] = median_high(disagreement(match, poses[i], poses[i + 1], K[i]) for i, match in moving)
    return costs


def shift(match: Tensor, share: float) -> float:
    """By how many pixels of MATCH_HEIGHT rows this share of a pair's patches moved at most."""
    one, two = match.split(2, dim=1)
    return (MATCH_HEIGHT * (two - one).norm(dim=1)).quantile(share).item()


def best_reading(costs: dict[str, float], rows: int) -> str | None:
    """The reading of the poses that the pictures, of so many rows, are clear about, "as given" first; "none" if they
    agree with none; None if they do not tell. Small ones, enlarged, tell conventions apart, and not more."""
    if not costs:
        return None
    best = min(costs, key=costs.get)
    if costs["as given"] >= max(1.5, 2 * costs[best]):
        return best
    if costs["as given"] < 3:
        return "as given"
    return "none" if rows >= MATCH_HEIGHT else None


# Pass 1: look at every clip.


def survey_clip(path: Path, start: int, wanted: ClipFormat) -> dict[str, Any]:
    """What can be said of a clip without its poses: of the file its pixel frames, how many a second, height and width;
    of the clip its `indices` among them, where to `seek` them, and, if the file does not keep its pace, when they are
    shown (moments); of the pictures what look_at says. Raises ValueError when the file is missing, damaged, too short
    or too slow."""
    if not path.is_file():
        raise ValueError("no such file")
    file = survey_file(path, path.stat().st_mtime_ns)
    if isinstance(file, str):
        raise ValueError(file)
    times, frames = file.times, len(file.times)
    if file.steady and file.fps < 0.998 * wanted.fps:  # 23.976 is as good as 24
        raise ValueError(f"{file.fps:g} frames a second, fewer than --fps {wanted.fps:g}")
    indices = sample_frame_indices(start, file.fps, wanted)
    if indices[-1] >= frames and (file.steady or start >= frames):
        raise ValueError(f"{frames} frames at {file.fps:g} a second, --frames {wanted.latent_frames} at {wanted.fps:g} "
                         f"needs {indices[-1] + 1}")
    about: dict[str, Any] = {"frames": frames, "fps": file.fps, "height": file.height, "width": file.width,
                             "indices": indices, "seek": 0.0}
    if not file.steady:
        about["indices"] = nearest_frames(start, times, wanted)
        about["moments"] = [round(times[i] - times[0], 5) for i in about["indices"]]
    if start and path.suffix.lower() in SEEKABLE and times[start] - times[start - 1] > 1e-4:
        about["seek"] = (times[start - 1] + times[start]) / 2
    try:
        video = read_frames(path, about, wanted.size)
    except ValueError:
        if not about["seek"]:
            raise
        about["seek"] = 0.0  # as a whole it was sound: perhaps it cannot be sought
        video = read_frames(path, about, wanted.size)
    return about | look_at(video, wanted)


def look_at(video: Tensor, wanted: ClipFormat) -> dict[str, Any]:
    """Of a clip's pictures [t 3 h w], bytes: of brightness, between 0 and 1, its mean, the share that is blown out, and
    how much it changes from pixel frame to pixel frame (change, the largest, and usual_change, the median); the patches
    that pairs of latent frames share (matches); and a hash, three thumbnails [3 64]."""
    grey = video.float().mean(1) / 255  # [t h w]
    small = F.adaptive_avg_pool2d(grey, 32)
    change = small.diff(dim=0).abs().mean((1, 2))  # [t - 1]
    last = len(grey) - 1
    columns = round(MATCH_HEIGHT * wanted.size[1] / wanted.size[0])
    at_latents = F.interpolate(grey[::4, None], [MATCH_HEIGHT, columns], mode="bilinear", antialias=True)[:, 0]
    starts = torch.linspace(0, max(0, len(at_latents) - 2), min(MATCH_PAIRS, len(at_latents) - 1)).long().tolist()
    matches = []
    for i in starts:
        found = match_patches(at_latents[i], at_latents[i + 1])
        some = torch.linspace(0, len(found) - 1, min(len(found), MATCH_MOST)).long()
        matches.append([i, packed(found[some])])
    # not of the first frames: one image may be the start of many clips
    thumbnails = F.adaptive_avg_pool2d(grey[[last // 2, 3 * last // 4, last]], 8)
    return {
        "mean": grey.mean().item(), "blown": (grey > 0.98).float().mean().item(),
        "matches": matches,
        "change": change.max().item(), "usual_change": change.median().item(),
        "hash": (255 * thumbnails.flatten(1)).round().int().tolist()}


# of a survey, what only the next passes read
UNREPORTED = ("of", "hash", "error", "matches", "indices", "seek", "moments")


def read_surveys(folder: Path) -> dict[str, dict]:
    """What earlier runs saw: the lines of survey-*.jsonl, by what they are of."""
    surveys = {}
    for path in folder.glob("survey-*.jsonl"):
        for line in path.read_text().splitlines():
            with suppress(json.JSONDecodeError):  # the last line of a run that was killed
                survey = json.loads(line)
                if "seek" in survey:  # older ones remember failures, and saw less
                    surveys[json.dumps(survey["of"])] = survey
    return surveys


def survey_clips(clips: list[Clip], folder: Path, out: Path, rank: int, world_size: int,
                 wanted: ClipFormat) -> list[dict[str, Any]]:
    """survey_clip of every world_size-th clip, or what an earlier run saw of the same file in the same format.

    Each says what it is "of"; for a file that could not be read it holds only the "error".
    """
    known = read_surveys(out)
    surveys = []
    for clip in tqdm(clips[rank::world_size], "look", disable=rank > 0):
        path, stamp = folder / clip.file, None
        with suppress(OSError, ValueError):  # no file, or no name that a file could have
            stamp = [path.stat().st_size, path.stat().st_mtime_ns]
        key = [clip.file, clip.start, stamp, *wanted]
        survey = known.get(json.dumps(key))
        if survey is None:
            try:
                if stamp is None:
                    raise ValueError("no such file")
                survey = {"of": key} | survey_clip(path, clip.start, wanted)
            except ValueError as error:
                surveys.append({"of": key, "error": str(error)})  # not remembered: what was wrong may be mended
                continue
            with appending(out / f"survey-{rank}.jsonl") as log:
                log.write("\n" + json.dumps(survey))  # the line break first: what stands there may be half a line
        surveys.append(survey)
    return surveys


def read_prompts(tables: list[Path], encoder_name: str) -> dict[str, dict[str, Tensor]]:
    """The rows of all tables and logs of prompts that this encoder made, by prompt. They are memory-mapped."""
    embeds: dict[str, dict[str, Tensor]] = {}
    for path in filter(Path.exists, tables):
        embeds |= (read_prompt_log if path.suffix == ".jsonl" else read_prompt_table)(path, encoder_name)
    return embeds


def read_prompt_table(path: Path, encoder_name: str) -> dict[str, dict[str, Tensor]]:
    """Of what save_prompts wrote, nothing if another encoder made it. Raises ValueError if it is damaged."""
    embeds: dict[str, dict[str, Tensor]] = {}
    about = prompt_metadata(path)
    if about.get("encoder") != encoder_name:
        return {}
    with safe_open(path, "pt") as table:
        prompts = [*json.loads(about["prompts"]), about["null"]]
        for name in [name for name in table.keys() if f"{name}_ends" in table.keys()]:
            ends = table.get_tensor(f"{name}_ends")
            rows = table.get_tensor(name).tensor_split(ends[:-1])
            for prompt, row in zip(prompts, rows, strict=True):
                embeds.setdefault(prompt, {})[name] = row
    return embeds


def read_prompt_log(path: Path, encoder_name: str) -> dict[str, dict[str, Tensor]]:
    """Of what log_prompt wrote, and may be writing."""
    lines, file = path.read_text().splitlines(), path.with_suffix(".f16")
    numbers = torch.from_file(str(file), size=file.stat().st_size // 2, dtype=torch.float16)
    embeds: dict[str, dict[str, Tensor]] = {}
    for line in lines:
        with suppress(json.JSONDecodeError):  # the last line of a run that was killed
            about = json.loads(line)
            start, row = about["start"], {}
            for name, (length, width) in about["shapes"].items():
                row[name] = numbers[start : start + length * width].view(length, width)
                start += length * width
            if about["encoder"] == encoder_name:
                embeds[about["prompt"]] = row
    return embeds


def log_prompt(path: Path, encoder_name: str, prompt: str, row: dict[str, Tensor]) -> None:
    """Append a prompt's row of fp16 to a log: its numbers to a file of their own, and then a line to path, a .jsonl."""
    with appending(path.with_suffix(".f16"), "ab") as file:
        file.write(b" " * (file.tell() % 2))  # a killed run may have left half a number
        start = file.tell() // 2
        for z in row.values():
            file.write(stored(z))
    shapes = {name: list(z.shape) for name, z in row.items()}
    with appending(path) as file:
        # the line break first: what stands there may be half a line
        file.write("\n" + json.dumps({"encoder": encoder_name, "prompt": prompt, "start": start, "shapes": shapes}))


def encode_captions(captions: Iterable[str], encoder: Encoder, tables: list[Path], log: Path) -> dict[str, str]:
    """Encode, into a log and in fp16, the captions that no table of an earlier run has -> the errors of those that
    cannot be encoded."""
    known, errors = set(read_prompts(tables, encoder.name)), {}
    for caption in captions:
        if caption in known:
            continue
        try:
            row = encoder.encode_text(caption)
        except ValueError as error:
            errors[caption] = str(error)
        else:
            log_prompt(log, encoder.name, caption, {name: z.half().cpu() for name, z in row.items()})
    return errors


# Pass 2: judge each clip, alone and beside all others.


def camera_steps(viewmats: Tensor) -> tuple[Tensor, Tensor]:
    """How far a camera [n 4 4] moves and turns from each pose to the next: units and radians [n - 1]."""
    c2w = invert_se3(viewmats.double())
    turn = c2w[:-1, :3, :3].mT @ c2w[1:, :3, :3]
    sine = (turn - turn.mT).square().sum((1, 2)).sqrt() / 8**0.5  # exact for small angles, where arccos is not
    angle = torch.atan2(sine, (turn.diagonal(dim1=1, dim2=2).sum(-1) - 1) / 2)
    return c2w[:, :3, 3].diff(dim=0).norm(dim=-1), angle


def median_step(viewmats: Tensor) -> float:
    """Median step length of a path [n 4 4], ignoring steps under 5 % of the 90th percentile; 0 if none moves."""
    if len(viewmats) < 2:
        return 0.0
    length, _ = camera_steps(viewmats)
    moving = length[length > max(0.05 * length.quantile(0.9, interpolation="lower").item(), 1e-6)]
    return moving.median().item() if len(moving) else 0.0


class Track(NamedTuple):
    """A clip's cameras, re-based to its first frame, in the units of its poses."""
    viewmats: Tensor  # [t 4 4] fp64
    K: Tensor  # [t 4] fp64, of the frames as they are cut
    Ks: Tensor  # [f 3 3] fp32, the same per latent frame
    lens: tuple[list[float], tuple[float, ...]] | None  # K and distortion of the file's pictures, if it shows
    weight: float  # how often to train on it
    as_stored: Tensor  # [t 4 4] fp64, viewmats before they were re-based
    interpolated: int  # of the t poses
    measured: bool  # False: in units that mean nothing


class ClipCamera(NamedTuple):
    """What is written of a clip's cameras, one per latent frame."""
    viewmats: Tensor  # [f 4 4] fp32
    Ks: Tensor  # [f 3 3] fp32
    scale: float  # factor on translations, already applied
    lens: tuple[list[float], tuple[float, ...]] | None  # to be undone in its pictures


class Unusable(ValueError):
    """A clip that can never be used: what is wrong with it, and the reason of UNUSABLE that it comes under."""

    def __init__(self, reason: str, found: str):
        super().__init__(found)
        self.reason = reason


@contextmanager
def unusable(reason: str) -> Iterator[None]:
    """Whatever a user's numbers bring about within is an Unusable for this reason."""
    try:
        yield
    except KeyError as error:
        raise Unusable(reason, f"an entry has no {error}") from None
    except (OSError, *BAD_INPUT) as error:
        raise Unusable(reason, first_line(error).removeprefix(f"{reason}: ")) from None


def table_intrinsics(clip: Clip) -> list[float] | None:
    """K of the table, before that of the poses' file, or None."""
    if isinstance(clip.K, str):  # a cell of a .csv
        return [float(number) for number in clip.K.strip("[ ]").replace(",", " ").split()]
    return clip.K or None


def clip_track(clip: Clip, survey: dict, bad_captions: dict[str, str], args: argparse.Namespace) -> Track:
    """A clip's cameras at the pixel frames that are used of it. Raises Unusable."""
    if "error" in survey:
        raise Unusable("video", survey["error"])
    if not clip.caption:
        raise Unusable("caption", "empty")
    if clip.caption in bad_captions:
        raise Unusable("caption", bad_captions[clip.caption])
    height, width = survey["height"], survey["width"]
    indices = survey["indices"]
    with unusable("poses"):
        poses = read_poses(clip.poses, args.table.parent, clip.file, width / height)
        if not poses.measured and args.scale == 1:
            raise ValueError("they were made of pictures, in units that mean nothing, so not --scale 1: 'clip' gives "
                             "each clip the step of the pose strings, 'set' all clips together")
        pose_fps = checked_pose_fps(clip.pose_fps) or poses.pose_fps
        shown = dict(zip(indices, survey["moments"])) if "moments" in survey else None
        positions = frame_positions(poses, survey["frames"], survey["fps"], pose_fps, shown)
        viewmats, _, interpolated = poses_at(poses._replace(K=None), positions, indices)  # K: below, if it is needed
    with unusable("intrinsics"):
        K = table_intrinsics(clip)
        if K is None and poses.K is not None:
            for one in poses.K:
                intrinsics(one)
            K = poses_at(poses, positions, indices)[1]
        else:
            K = K or args.K
            if K is None:
                raise ValueError("none: expected a K in the table, in the file of the poses, or --K")
            intrinsics(K)
            K = torch.tensor([K], dtype=torch.float64).expand(len(indices), 4)
        own = K[0].tolist()
        lens = (own, poses.lens) if poses.lens and corner_shift(own, poses.lens, args.size) >= 1 else None
        K = crop_intrinsics(K, height, width, args.size)
        Ks = torch.stack([intrinsics(k) for k in K[::4].tolist()])
    with unusable("weight"):
        weight = checked_weight(clip)
    rebased, as_stored = viewmats @ invert_se3(viewmats[:1]), viewmats @ poses.origin
    return Track(rebased, K, Ks, lens, weight, as_stored, interpolated, poses.measured)


def translation_factors(tracks: dict[int, Track], scale: str | float | None) -> dict[int, float]:
    """What --scale makes of each clip's translations: STEP over its own median step, over that of all, or a number. If
    none was given, 1 where they were measured and else STEP over the clip's own."""
    steps = {n: median_step(track.viewmats[::4]) for n, track in tracks.items()}
    if scale in ("clip", None):
        own = {n: STEP / step if step else 1.0 for n, step in steps.items()}
        return {n: 1.0 if scale is None and tracks[n].measured else factor for n, factor in own.items()}
    if scale == "set":
        moving = [step for step in steps.values() if step] or [STEP]
        scale = float(f"{STEP / torch.tensor(moving).median().item():.6g}")
    return {n: float(scale) for n in tracks}


def find_doubts(survey: dict, viewmats: Tensor, K: Tensor, costs: dict[str, float],
                size: list[int]) -> dict[str, str]:
    """Reasons of DOUBTFUL against a clip alone, and the figures they rest on; viewmats [t 4 4], scaled, K [t 4], and
    what `agreement` says."""
    doubts = {}
    height, width = survey["height"], survey["width"]
    rows, columns, _, _ = resize_crop_size(height, width, size)
    if rows > height or columns > width:
        doubts["small"] = f"{height}x{width} pixels, --size is {size[0]}x{size[1]}"
    aspect = (K[0, 0] * size[1] / (K[0, 1] * size[0])).item()  # fx / fy, in pixels
    if abs(math.log(aspect)) > math.log(1.1):
        doubts["skewed"] = f"the focal lengths in pixels differ by a factor of {aspect:.2f}"

    length, angle = camera_steps(viewmats)  # from pixel frame to pixel frame
    usual = length.median().item()
    if length.max() > max(10 * usual, STEP) or angle.max() > math.radians(15):
        n = int((length / STEP + angle / TURN).argmax())
        doubts["jump"] = (f"at frame {n + 1} of the clip it moves {length[n]:.3g} units, usual are {usual:.3g}, "
                          f"and turns {math.degrees(angle[n]):.3g} degrees")
    usual = median_step(viewmats[::4])  # from latent frame to latent frame
    if usual > 10 * STEP:
        doubts["scale"] = f"its usual step is {usual:.3g} units, a pose string's {STEP:g}"

    change, usual = survey["change"], survey["usual_change"]
    if change > max(0.15, 6 * usual):
        doubts["cut"] = f"between two frames it changes by {change:.0%}, usual are {usual:.1%}"
    if survey["mean"] < 0.06:
        doubts["dark"] = f"{survey['mean']:.1%} bright on average"
    elif survey["blown"] > 0.5:
        doubts["bright"] = f"{survey['blown']:.0%} of its pixels are blown out"
    elif seen := [match for _, text in survey["matches"] if len(match := unpacked(text)) >= MATCH_LEAST]:
        length, angle = camera_steps(viewmats[::4])
        moves = (length / STEP + angle / TURN).mean().item()  # times a key's step
        most, all_but = (torch.tensor([shift(found, share) for found in seen]).median().item() for share in (0.5, 0.95))
        if (moves > 0.5 and all_but < 0.5) or (moves < 0.1 and most >= 1):
            doubts["static"] = (f"from one latent frame to the next, the camera moves {moves:.2g} of a key's step and "
                                f"most of the picture {most:.2g} pixels of {MATCH_HEIGHT} rows")
    if not doubts:
        reading = best_reading(costs, size[0])
        if reading not in ("as given", None):
            found = f"{costs[reading]:.2g} {reading}" if reading in costs else "no other reading fits"
            doubts["disagree"] = (f"patches are {costs['as given']:.2g} pixels from where its poses have them, "
                                  f"{found}; is it another convention?")
    return doubts


def apparent_motion(match: Tensor) -> Tensor:
    """How a picture moves to the next by their matches [n 4]: to the right, down, larger and clockwise [4]."""
    where, move = match[:, :2] - match[:, :2].mean(0), match[:, 2:] - match[:, :2]
    usual = move.median(0).values
    (x, y), (dx, dy) = where.T, (move - usual).T
    size = where.square().sum().clamp_min(1e-6)
    return torch.stack([*usual, (x * dx + y * dy).sum() / size, (x * dy - y * dx).sum() / size])


def camera_motion(a: Tensor, b: Tensor) -> Tensor:
    """From viewmat a to b [4 4]: where the camera goes and turns, along and about its own axes [6]."""
    step = a @ invert_se3(b)
    R = step[:3, :3]
    return torch.stack([*step[:3, 3], R[2, 1] - R[1, 2], R[0, 2] - R[2, 0], R[1, 0] - R[0, 1]])


UNCERTAIN = 30  # were motions Gaussian, five in a million would be larger; of toy clips, four to ten in a hundred are
LEAST_PAIRS = 200  # of pictures, from which to learn what is usual


def uncertainties(pairs: list[tuple[int, Tensor, Tensor]]) -> dict[int, tuple[float, float]]:
    """Of pairs of pictures, each of a clip with its apparent_motion and camera_motion: how unusual each clip's pictures
    move for such a camera, and for any. {} if there are too few to tell what is usual.

    The first is a Mahalanobis distance (arXiv:2411.17767, there from a class's mean, here from what a linear map of the
    camera's motion predicts), under one covariance for all, the median over the clip's pairs. If it is larger than the
    second, the distance from the mean of all pairs, the poses say less than none would.
    """
    if len(pairs) < LEAST_PAIRS:
        return {}
    clips = torch.tensor([n for n, *_ in pairs])
    seen, done = (torch.stack(each) for each in zip(*(pair[1:] for pair in pairs)))  # [n 4], [n 6]
    done = F.pad(done / done.std(0).clamp_min(1e-9), (0, 1), value=1.0)

    def distance(cause: Tensor) -> Tensor:
        usual = torch.ones(len(pairs), dtype=torch.bool)
        for _ in range(3):  # what is far off is not learnt from
            off = seen - cause @ torch.linalg.lstsq(cause[usual], seen[usual]).solution
            covariance = off[usual].T @ off[usual] / usual.sum() + 1e-8 * torch.eye(4, dtype=off.dtype)
            far = torch.einsum("ni,ij,nj->n", off, torch.linalg.inv(covariance), off)
            usual = far <= far.quantile(0.8)
        scale = far.median() / 3.357  # the median of a chi-square variable of 4 degrees of freedom
        return far / scale

    own, of_any = distance(done), distance(done[:, -1:])
    return {n: (own[clips == n].median().item(), of_any[clips == n].median().item()) for n in clips.unique().tolist()}


def find_duplicates(hashes: list, least: float = 0.98) -> dict[int, int]:
    """Of hashes [n 3 64], those all of whose three thumbnails correlate above `least` with an earlier one's, and which.

    Of 96 toy rooms no two reach 0.86; a copy compressed hard (crf 24 at 32 pixels) has 0.988 or more.
    """
    thumbnails = torch.tensor(hashes, dtype=torch.float32).view(len(hashes), 3, 64)
    # plain ones become 0, and correlate with none
    thumbnails = F.normalize(thumbnails - thumbnails.mean(-1, keepdim=True), dim=-1)
    duplicates = {}
    for start in range(0, len(hashes), 1024):  # [1024 n] numbers at a time
        rows = thumbnails[start : start + 1024]
        correlation = torch.stack([rows[:, i] @ thumbnails[:, i].T for i in range(3)]).amin(0)
        earlier = (correlation > least).tril(start - 1)  # row n of these, clip start + n, sees only clips before it
        for n, row in enumerate(earlier, start):
            if row.any():
                duplicates[n] = int(row.float().argmax())
    return duplicates


def action_class(viewmats: Tensor) -> str:
    """The key pressed in most steps of a path [f 4 4], or "still"."""
    counts = Counter(key for keys in pressed(viewmats) for key in keys)
    return max(KEYS, key=lambda key: counts[key]) if counts else "still"


def pose_string(viewmats: Tensor) -> str:
    """The pose string nearest to a path [f 4 4], to be read: 'w*3,w+l*4', 'still' where nothing is pressed."""
    steps = ["+".join(key for key in KEYS if key in keys) or "still" for keys in pressed(viewmats)[1:]]
    return ",".join(f"{step}*{len(list(repeats))}" for step, repeats in groupby(steps))


def is_sound(row: dict, *allowed: str) -> bool:
    """Has this row of the report no reasons but those allowed?"""
    return set(row["reasons"]) <= set(allowed)


def judge(clips: list[Clip], surveys: list[dict], bad_captions: dict[str, str], args: argparse.Namespace,
          factor: float | None = None) -> tuple[list[dict], dict[int, ClipCamera]]:
    """What the report says of every clip, and behind them of videos that the table does not name; and, by the clip's
    number, the cameras of all that are not unusable. factor: of all translations, if an earlier run found it."""
    report: list[dict[str, Any]] = []
    tracks: dict[int, Track] = {}
    for n, (clip, survey) in enumerate(zip(clips, surveys, strict=True)):
        report.append({"file": clip.file, "start": clip.start, "kept": False, "class": None, "reasons": {}})
        report[n] |= {name: value for name, value in survey.items() if name not in UNREPORTED}
        try:
            tracks[n] = clip_track(clip, survey, bad_captions, args)
        except Unusable as error:
            report[n]["reasons"][error.reason] = str(error)

    cameras: dict[int, ClipCamera] = {}
    for n, scale in translation_factors(tracks, factor or args.scale).items():
        viewmats = tracks[n].viewmats.clone()
        viewmats[:, :3, 3] *= scale
        cameras[n] = ClipCamera(viewmats[::4].float(), tracks[n].Ks, scale, tracks[n].lens)
        as_stored = tracks[n].as_stored[::4].clone()  # poses may be inverted, or in other axes, as they stand there
        as_stored[:, :3, 3] *= scale
        _, lens = tracks[n].lens or (None, ())
        costs = agreement(surveys[n]["matches"], as_stored, tracks[n].K[::4], lens)
        report[n]["reasons"] = find_doubts(surveys[n], viewmats, tracks[n].K, costs, args.size)
        path = cameras[n].viewmats
        report[n]["reading"] = best_reading(costs, args.size[0])
        report[n] |= {"class": action_class(path), "path": pose_string(path), "scale": scale,
                      "interpolated": tracks[n].interpolated, "weight": tracks[n].weight}

    # beside the others: only clips that are sound so far tell what is usual, or can make another superfluous
    pairs = []
    for n, row in enumerate(report):
        if is_sound(row, *args.keep):
            for i, text in surveys[n]["matches"]:
                if len(match := unpacked(text)) >= MATCH_LEAST:
                    a, b = cameras[n].viewmats[i : i + 2].double()
                    pairs.append((n, apparent_motion(match), camera_motion(a, b)))
    for n, (far, anyway) in uncertainties(pairs).items():
        report[n]["uncertainty"] = far
        if far > max(UNCERTAIN, anyway):
            report[n]["reasons"]["uncertain"] = (f"how its pictures move is {far:.0f} from what is usual for its "
                                                 f"cameras and {anyway:.0f} from what is for any; 3 are usual")
    sound = [n for n, row in enumerate(report) if is_sound(row, *args.keep)]
    for i, j in find_duplicates([surveys[n]["hash"] for n in sound]).items():
        earlier = clips[sound[j]]
        report[sound[i]]["reasons"]["duplicate"] = f"looks like {earlier.file} from {earlier.start} on"
    if args.at_most:
        drop_surplus(report, clips, args)
    for row in report:
        row["kept"] = is_sound(row, *args.keep)
    return report + find_unlisted(clips, args), cameras


def drop_surplus(report: list[dict], clips: list[Clip], args: argparse.Namespace) -> None:
    """Of each class of action, --at-most so many of the sound clips stay, chosen at random. Changes the report."""
    by_class: dict[str, list[dict]] = {}
    for n in sorted(range(len(clips)), key=lambda n: clip_number(clips[n])):
        if is_sound(report[n], *args.keep):
            by_class.setdefault(report[n]["class"], []).append(report[n])
    for rows in by_class.values():
        for row in rows[args.at_most :]:
            row["reasons"][SURPLUS] = f"one of {len(rows)}, --at-most {args.at_most}"


def find_unlisted(clips: list[Clip], args: argparse.Namespace) -> list[dict]:
    """Rows of the report for videos in the folder that the table does not name."""
    listed = {(args.videos / clip.file).resolve() for clip in clips if "\0" not in clip.file}
    return [{"file": str(path.relative_to(args.videos)), "start": 0, "kept": False, "class": None,
             "reasons": {"unlisted": f"not in {args.table.name}"}}
            for path in sorted(args.videos.rglob("*"))
            if path.suffix.lower() in VIDEOS and path.resolve() not in listed]


def print_report(report: list[dict], keep: list[str]) -> None:
    """How many clips of each class were found and kept, how many were dropped for each reason, and which."""
    titles = {None: "unusable", "still": "still"} | {key: f"{key} {text}" for key, (text, *_) in KEYS.items()}
    found = Counter(row["class"] for row in report)
    sound = Counter(row["class"] for row in report if is_sound(row, *keep, SURPLUS))
    kept = Counter(row["class"] for row in report if row["kept"])
    print(f"{'class':16}{'found':>8}{'sound':>8}{'kept':>8}")
    for name, count in found.most_common():
        print(f"{titles[name]:16}{count:8}{sound[name]:8}{kept[name]:8}")
    print(f"{'all':16}{found.total():8}{sound.total():8}{kept.total():8}")

    print_votes(report)
    meanings = UNUSABLE | DOUBTFUL | {SURPLUS: "more than --at-most of its class"}
    dropped = [(row, {name: why for name, why in row["reasons"].items() if name not in keep})
               for row in report if not row["kept"]]
    for name, count in Counter(name for _, reasons in dropped for name in reasons).most_common():
        print(f"dropped {count}: {name}, {meanings[name]}")
    for row, reasons in dropped[:20]:
        why = "; ".join(f"{name}: {text:.120}" for name, text in reasons.items())
        print(f"  {row['file']} from {row['start']}: {why}")
    if len(dropped) > 20:
        print(f"  and {len(dropped) - 20} more, all in report.jsonl")


def print_votes(report: list[dict]) -> None:
    """What most clips say of their poses' convention."""
    votes = Counter(row["reading"] for row in report if row.get("reading"))
    if votes:
        said = ", ".join(f"{name} in {count}" for name, count in votes.most_common())
        print(f"the pictures agree with the poses {said} of {votes.total()} clips that tell")


# Pass 3: encode what is kept.


class Kept(NamedTuple):
    """A clip that is kept and that no shard holds yet: all that is known of it before its video is encoded."""
    clip: Clip
    survey: dict  # what survey_clip says of it
    camera: ClipCamera
    source: tuple  # file, start, caption, the file's size in bytes


class Shard(NamedTuple):
    """What an earlier run wrote."""
    sources: list[list]
    prompt_ids: list[int]
    viewmats: Tensor
    Ks: Tensor


def read_shards(out: Path, meta: dict) -> dict[Path, Shard]:
    """All that a folder holds. Raises ValueError for a shard that is damaged, no video's, or of other settings."""
    shards = {}
    for file in sorted(out.glob("latents-*.safetensors")):
        try:
            with safe_open(file, "pt") as shard:
                about = shard.metadata() or {}
                viewmats, Ks, prompt_ids = (shard.get_tensor(name) for name in ("viewmats", "Ks", "prompt_ids"))
        except SafetensorError as error:
            raise ValueError(f"{file}: truncated or not safetensors ({error}); delete it, it is made again") from None
        if "clips" not in about:
            raise ValueError(f"{file}: made by another run, not of videos; delete it, or choose another --out")
        old = json.loads(about.get("meta", "{}"))
        for name in meta:
            if name != "vae" and old.get(name) != meta[name]:  # the VAE's file may have moved
                raise ValueError(f"{file}: made by another run, its {name} is {old.get(name)}, now {meta[name]}; "
                                 "delete it, or choose another --out")
        shards[file] = Shard(json.loads(about["clips"]), prompt_ids.tolist(), viewmats, Ks)
    return shards


Plans = dict[Path, list[Kept]]


def plan_shards(clips: list[Clip], surveys: list[dict], report: list[dict], cameras: dict[int, ClipCamera],
                shards: dict[Path, Shard], args: argparse.Namespace) -> tuple[Plans, dict[str, list[int]]]:
    """The kept clips that no shard holds yet, --shard-size to a file; and which rows of the shards count no more, since
    their clip was dropped, or is now another or seen by another camera. A folder grows, and no shard is written twice.
    """
    wanted: dict[tuple, Kept] = {}
    for n, camera in cameras.items():
        if report[n]["kept"]:
            source = (clips[n].file, clips[n].start, clips[n].caption, surveys[n]["of"][2][0])
            wanted[source] = Kept(clips[n], surveys[n], camera, source)
    dropped: dict[str, list[int]] = {}
    for file, shard in shards.items():
        for row, source in enumerate(map(tuple, shard.sources)):
            new = wanted.get(source)
            if new and all(old.shape == now.shape and torch.allclose(old, now, atol=1e-5) for old, now in (
                    (shard.viewmats[row], new.camera.viewmats), (shard.Ks[row], new.camera.Ks))):
                del wanted[source]
            else:
                dropped.setdefault(file.name, []).append(row)
    rest, plans, start = [*wanted.values()], {}, 0
    while rest:
        file = args.out / f"latents-{start:06d}.safetensors"
        start += args.shard_size
        if file not in shards:
            plans[file], rest = rest[: args.shard_size], rest[args.shard_size :]
    return plans, dropped


def number_captions(shards: dict[Path, Shard], plans: Plans, blank: str) -> list[str]:
    """The table of prompts: shards count in it, so what they hold keeps its number; new captions take what is free."""
    known: dict[int, str] = {}
    for shard in shards.values():
        known |= {i: source[2] for source, i in zip(shard.sources, shard.prompt_ids, strict=True)}
    old = {*known.values()}
    captions = dict.fromkeys(row.clip.caption for rows in plans.values() for row in rows)
    new = iter([caption for caption in captions if caption not in old])
    table = [known[i] if i in known else next(new, blank) for i in range(max(known, default=-1) + 1)]
    return table + [*new]


def encode_clip(vae: Any, video: Tensor, device: torch.device) -> Tensor:
    """video [t 3 h w] uint8 -> latents [f c h w] fp16, 16 frames at a time: more would not fit at full size."""
    video = rearrange(video, "t c h w -> 1 c t h w")
    latents, feat_cache = [], None
    for piece in (video[:, :, :1], *video[:, :, 1:].split(16, dim=2)):
        z, feat_cache = vae.encode(from_bytes(piece.to(device)), feat_cache)
        latents.append(z.half().cpu())
    return torch.cat(latents, dim=1)[0]


class Run(NamedTuple):
    """What the passes over a folder of videos share."""
    args: argparse.Namespace
    clips: list[Clip]
    vae: Any
    vae_meta: Any  # Meta, and the VAE's own "fingerprint"
    encoder: Encoder
    negative: str  # the prompt that guidance steers away from
    rank: int
    world_size: int
    device: torch.device
    group: Any  # of all ranks, on gloo

    def gather(self, value: Any) -> list:
        """Every rank's value, in the order of ranks. Waits for all of them."""
        values = [None] * self.world_size
        dist.all_gather_object(values, value, group=self.group)
        return values


def clip_format(args: argparse.Namespace) -> ClipFormat:
    """Of the flags."""
    return ClipFormat(args.frames, args.fps, args.size)


def open_table(args: argparse.Namespace) -> list[Clip]:
    """Its rows, captions beside the videos read; --out is made."""
    if args.table is None:
        args.table = find_table(args.videos)
    if args.table.resolve() == (args.out / "report.jsonl").resolve():
        raise ValueError(f"--table {args.table}: the report would be written over it; choose another --out")
    find_ffmpeg()
    clips = [with_caption(clip, args.videos) for clip in read_table(args.table)]
    args.out.mkdir(parents=True, exist_ok=True)
    return clips


def open_run(args: argparse.Namespace) -> Run:
    """Read the table, load VAE and text encoder, join the other processes. Raises ValueError if they do not fit."""
    clips = open_table(args)
    _, vae_meta = load_checkpoint(args.vae, "vae")
    preset = vae_meta["preset"]
    rank, world_size, device = start_process_group()
    group = dist.new_group(backend="gloo", timeout=timedelta(days=7))  # ranks wait for each other as long as it takes
    vae: Any = load_vae(args.vae, device, vae_meta["fingerprint"])
    encoder = load_encoder(preset, args.text_encoder, device)
    negative = encoder.null if args.negative is None else args.negative
    dit = PRESETS[preset].dit
    if any(side % (dit.patch * vae.cfg.stride) for side in args.size):
        raise ValueError(f"--size {args.size[0]}x{args.size[1]}: expected multiples of {dit.patch * vae.cfg.stride} "
                         f"pixels, this VAE's times patches of {dit.patch}")
    if args.text_encoder is None and dit.text_dim != TEXT_DIM:
        raise ValueError(f"--text-encoder: expected the one of {preset}, whose VAE {args.vae} is")
    return Run(args, clips, vae, vae_meta, encoder, negative, rank, world_size, device, group)


def prompt_tables(out: Path) -> list[Path]:
    """All that may hold encoded prompts: the table; what it is called until all shards are written, for without it the
    folder does not open; and every process's log."""
    return [out / "prompts.safetensors", out / "prompts.safetensors.unfinished", *sorted(out.glob("prompts-*.jsonl"))]


def look(run: Run) -> tuple[list[dict], dict[str, str]]:
    """Pass 1, shared by all ranks: encode every caption -> a survey of every clip, and the errors of captions."""
    out, rank, world_size = run.args.out, run.rank, run.world_size
    captions = list(dict.fromkeys([run.negative] + [clip.caption for clip in run.clips if clip.caption]))
    mine = tqdm(captions[rank::world_size], "prompts", disable=rank > 0)
    errors = encode_captions(mine, run.encoder, prompt_tables(out), out / f"prompts-{rank}.jsonl")
    if run.negative in errors:
        raise ValueError(f"--negative: {errors[run.negative]}")
    surveys_of_mine = survey_clips(run.clips, run.args.videos, out, rank, world_size, clip_format(run.args))
    everyones = run.gather((surveys_of_mine, errors))
    surveys = [everyones[n % world_size][0][n // world_size] for n in range(len(run.clips))]  # as they were dealt out
    return surveys, {caption: error for _, theirs in everyones for caption, error in theirs.items()}


def describe_shards(run: Run) -> dict[str, Any]:
    """The meta of every shard: what a folder's shards share, and how they were made."""
    args = run.args
    meta = {"preset": run.vae_meta["preset"], "size": args.size, "fps": args.fps, "frames": args.frames,
            "vae": str(args.vae), "vae_fingerprint": run.vae_meta["fingerprint"], "negative": run.negative,
            "encoder": run.encoder.name, "prompt_length": run.encoder.length}
    if run.encoder.encode_image:
        meta["image_share"] = args.image_share
    return meta


def describe_folder(scale: str | float, caption: str, cameras: list[ClipCamera]) -> dict[str, Any]:
    """The part of the meta that may change when clips are added: the usual K of the cameras that are kept, --scale and,
    if it is 'set', its factor, and a caption to show what was learnt."""
    Ks = torch.cat([camera.Ks for camera in cameras]).double()  # [n 3 3]
    K = Ks[:, [0, 1, 0, 1], [0, 1, 2, 2]].median(0).values.tolist()  # fx, fy, cx, cy
    factor = {"factor": cameras[0].scale} if scale == "set" else {}
    return {"K": [round(k, 7) for k in K], "scale": scale, "caption": caption} | factor


def encode_shard(run: Run, rows: list[Kept], prompt_ids: dict[str, int],
                 bar: tqdm) -> tuple[list[Kept], dict[str, Tensor], dict[str, str]]:
    """The clips that a shard holds in the end, its tensors, and by file and start what was wrong with those it lacks: a
    video that cannot be read any more, or that encodes to NaN, costs itself alone."""
    latents, vision, good, failed = [], [], [], {}
    for row in rows:
        clip = row.clip
        bar.update()
        try:
            video = read_frames(run.args.videos / clip.file, row.survey, run.args.size, *(row.camera.lens or ()))
            with torch.no_grad():
                z = encode_clip(run.vae, video, run.device)
            if not z.isfinite().all():
                raise ValueError("its latents hold NaN or inf")
        except ValueError as error:
            failed[clip_key(clip.file, clip.start)] = str(error)
            continue
        latents.append(z)
        good.append(row)
        if run.encoder.encode_image:
            # by the clip and not by its place among those kept, or a clip more would change the images of all others
            has_image = clip_number(clip) < run.args.image_share * 2**32
            tokens = run.encoder.encode_image(from_bytes(video[:1].to(run.device)))[0]
            vision.append(tokens.half().cpu() * has_image)
    if not good:
        return [], {}, failed
    cameras = [row.camera for row in good]
    tensors = {"latents": torch.stack(latents), "viewmats": torch.stack([camera.viewmats for camera in cameras]),
               "Ks": torch.stack([camera.Ks for camera in cameras]),
               "prompt_ids": torch.tensor([prompt_ids[row.clip.caption] for row in good]),
               "scales": torch.tensor([camera.scale for camera in cameras])}
    if run.encoder.encode_image:
        tensors["vision"] = torch.stack(vision)
    return good, tensors, failed


def encode(run: Run, plans: Plans, captions: list[str], meta: dict, about: dict) -> dict[str, str]:
    """Pass 3, shared by all ranks: write the shards that are missing, and the table of prompts, which says what else is
    to be known `about` the folder -> what was wrong with clips that could not be encoded, by file and start."""
    out, rank = run.args.out, run.rank
    final, unfinished, *_ = prompt_tables(out)
    prompt_ids = {caption: i for i, caption in enumerate(captions)}
    run.gather(None)  # no process writes before all have agreed
    about = {"prompts": json.dumps(captions), "null": run.negative, "encoder": run.encoder.name} | about
    if rank == 0 and (plans or not final.exists() or prompt_metadata(final) != about):
        embeds = read_prompts(prompt_tables(out), run.encoder.name)
        null = embeds[run.negative]  # stands for captions that nothing needs any more
        save_prompts(unfinished, [embeds.get(prompt, null) for prompt in captions] + [null], about)
        final.unlink(missing_ok=True)
    mine, failed = list(plans)[rank :: run.world_size], {}
    with tqdm(total=sum(len(plans[file]) for file in mine), desc="encode", disable=rank > 0) as bar:
        for file in mine:
            made, tensors, wrong = encode_shard(run, plans[file], prompt_ids, bar)
            failed |= wrong
            if tensors:
                sources = [row.source for row in made]
                save_shard(file, tensors, {"meta": json.dumps(meta), "clips": json.dumps(sources)})
    failed = {clip: wrong for theirs in run.gather(failed) for clip, wrong in theirs.items()}
    if rank == 0:
        if unfinished.exists():
            unfinished.replace(final)
        for log in out.glob("prompts-*"):
            log.unlink()
    return failed


def prompt_metadata(path: Path) -> dict[str, str]:
    """What a table of prompts says of its folder. Raises ValueError if it is damaged."""
    try:
        with safe_open(path, "pt") as table:
            return table.metadata() or {}
    except SafetensorError as error:
        raise ValueError(f"{path}: truncated or not safetensors ({error}); delete it") from None


def write_report(out: Path, report: list[dict]) -> None:
    with replacing(out / "report.jsonl") as temporary:
        temporary.write_text("".join(json.dumps(row) + "\n" for row in report))


def earlier_factor(args: argparse.Namespace) -> float | None:
    """What --scale set was when the clips that are in the folder were encoded, if it was that. Raises ValueError if it
    was made with another --scale."""
    tables = [path for path in prompt_tables(args.out)[:2] if path.exists()]
    if not tables or not any(args.out.glob("latents-*.safetensors")):
        return None
    before, scale = json.loads(prompt_metadata(tables[0]).get("meta", "{}")), args.scale or "measured"
    if before.get("scale", scale) != scale:
        raise ValueError(f"{args.out}: made with --scale {before['scale']}, now {scale}; choose another --out")
    return before.get("factor")


def dry_run(args: argparse.Namespace) -> None:
    """What make_from_videos would say of every clip, without VAE and text encoder; it goes on from this look."""
    clips = open_table(args)
    surveys = survey_clips(clips, args.videos, args.out, 0, 1, clip_format(args))
    report, _ = judge(clips, surveys, {}, args, earlier_factor(args))
    print_report(report, args.keep)
    write_report(args.out, report)
    print(f"{args.out}/report.jsonl: {sum(row['kept'] for row in report)} of {len(report)} clips would be kept")


def make_from_videos(args: argparse.Namespace) -> None:
    """A folder of videos and its table -> a folder of latents, and report.jsonl on every clip. What the folder holds
    already stays; what is new is added."""
    run = open_run(args)
    meta = describe_shards(run)
    shards = read_shards(args.out, meta)
    factor = earlier_factor(args)

    # 1. look
    surveys, bad_captions = look(run)

    # 2. judge, which every rank does alike
    report, cameras = judge(run.clips, surveys, bad_captions, args, factor)
    if run.rank == 0:
        print_report(report, args.keep)
        write_report(args.out, report)
    kept = [n for n in cameras if report[n]["kept"]]
    if not kept:
        raise ValueError(f"{args.out}: none of {len(report)} clips can be kept; report.jsonl says why")
    plans, dropped = plan_shards(run.clips, surveys, report, cameras, shards, args)

    # 3. encode
    caption = run.clips[kept[0]].caption
    about = {"meta": json.dumps(describe_folder(args.scale or "measured", caption, [cameras[n] for n in kept]))}
    about |= {"dropped": json.dumps(dropped)} if dropped else {}
    weights = {clip_key(clip.file, clip.start, clip.caption): report[n]["weight"] for n, clip in enumerate(run.clips)
               if report[n]["kept"]}
    if unequal := {key: weight for key, weight in weights.items() if weight != 1}:
        about |= {"weights": json.dumps(unequal)}
    failed = encode(run, plans, number_captions(shards, plans, run.negative), meta, about)
    if run.rank == 0:
        for row in report:
            if wrong := failed.get(clip_key(row["file"], row["start"])):
                row["kept"], row["reasons"] = False, row["reasons"] | {"video": wrong}
                print(f"{row['file']} from {row['start']}: could not be encoded ({wrong})")
        if failed:
            write_report(args.out, report)
        new = sum(file.exists() for file in plans)
        if dropped:
            print(f"{sum(map(len, dropped.values()))} rows of earlier runs count no more: the table has them not, or "
                  "otherwise")
        print(f"{args.out}: {len(kept) - len(failed)} clips in {len(shards) + new} files, {new} of them new; python "
              f"data.py --inspect {args.out}")
        if not shards and not new:
            raise ValueError(f"{args.out}: none of {len(report)} clips could be encoded; report.jsonl says why")


# Pictures of a folder of latents.


def draw_path(viewmats: Tensor, K: Tensor, h: int, w: int, side: bool = False) -> Tensor:
    """A camera path [f 4 4] from above -> picture [3 h w] in [-1, 1]: x to the right and z up the page, from blue to
    red, a tick in the direction of each view; grey, the field of view of the first (K [3 3]). Or from the side: z to
    the right, and what is up is up."""
    def on_page(points: Tensor) -> Tensor:
        return torch.stack([points[..., 2], -points[..., 1]], dim=-1) if side else points[..., [0, 2]]

    c2w = invert_se3(viewmats)
    centres, ahead = on_page(c2w[:, :3, 3]), on_page(c2w[:, :3, 2])
    lo, hi = centres.amin(0), centres.amax(0)
    pixels_per_unit = 0.6 * min(h, w) / (hi - lo).max().clamp_min(4 * STEP)
    middle, tick = (lo + hi) / 2, 0.12 * min(h, w) / pixels_per_unit
    progress = torch.linspace(0, 1, len(centres))[:, None]
    colours = torch.lerp(torch.tensor([-0.5, 0.2, 1.0]), torch.tensor([1.0, 0.0, -0.5]), progress)
    # rays through the image's left and right, or its top and bottom
    edges = torch.tensor([[0, (y - K[1, 2]) / K[1, 1], 1] if side else [(y - K[0, 2]) / K[0, 0], 0, 1] for y in (0, 1)])
    lines = [(centres[0], centres[0] + 2 * tick * on_page(ray), torch.zeros(3)) for ray in edges @ c2w[0, :3, :3].T]
    lines += [(a, b, colour) for a, b, colour in zip(centres, centres[1:], colours[1:])]
    lines += [(a, a + tick * direction, colour) for a, direction, colour in zip(centres, ahead, colours)]
    picture = torch.full((3, h, w), -0.8)
    for a, b, colour in lines:
        points = torch.lerp(a, b, torch.linspace(0, 1, 2 * max(h, w))[:, None]) - middle
        x, y = (w / 2 + pixels_per_unit * points[:, 0]).long(), (h / 2 - pixels_per_unit * points[:, 1]).long()
        picture[:, y.clamp(0, h - 1), x.clamp(0, w - 1)] = colour[:, None]
    return picture


@torch.no_grad()
def draw_row(vae: Any, row: dict[str, Tensor], height: int, device: torch.device) -> Tensor:
    """A row of a latents folder -> its path from above and from the side, then every fourth pixel frame
    [3 2+f height width]."""
    video, _ = vae.decode(row["latents"][None].to(device).float())
    pictures = rearrange(video[0, :, ::4].clamp(-1, 1).cpu(), "c t h w -> t c h w")
    own_height, own_width = pictures.shape[2:]
    width = round(height * own_width / own_height)
    if own_height > height:
        pictures = F.interpolate(pictures, [height, width], mode="bilinear", antialias=True)
    else:  # a toy video: its pixels are to be seen
        pictures = F.interpolate(pictures, [height, width], mode="nearest")
    paths = [draw_path(row["viewmats"], row["Ks"][0], height, width, side) for side in (False, True)]
    return rearrange([*paths, *pictures], "t c h w -> c t h w")


def inspect(folder: Path, vae: Path | None) -> None:
    """Contact sheets of up to 24 rows, evenly spaced, beside the shards: a path from above and from the side, then
    every fourth frame."""
    data = open_latents(folder)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    vae = load_vae(find_vae(data, vae), device, data.meta["vae_fingerprint"])
    prompts = json.loads(data.prompts.metadata()["prompts"])
    total = len(data.rows)
    print(f"{folder}: {total} rows, {data.meta}")
    if (folder / "report.jsonl").exists():
        print_votes([json.loads(line) for line in read_text(folder / "report.jsonl").split("\n") if line])
    shown = sorted({data.rows[round(n * (total - 1) / 23)] for n in range(24)})
    for first in range(0, len(shown), 8):
        strips = []
        for n in shown[first : first + 8]:
            row = read_row(data, n)
            strips.append(draw_row(vae, row, 128, device))
            _, angle = camera_steps(row["viewmats"])
            print(f"row {n}: {pose_string(row['viewmats'])} | step {median_step(row['viewmats']):.3g} units, turn "
                  f"{math.degrees(max(angle, default=0)):.3g} degrees at most | {prompts[int(row['prompt_ids'])]}")
        write_sheet(folder / f"inspect-{first // 8}.png", [torch.stack(strips)], every=1, most=64)
    print(f"{folder}/inspect-*.png: {len(shown)} of {total} rows")


# ----------------------------------------------------------------------------------------------------------------------
# 9. Noise in the place of all data, for a bill without any (model.py, 12).


def random_encoder(preset: str) -> Encoder:
    """Any prompt and image as noise, of the shapes that the preset's encoders make."""
    dit = PRESETS[preset].dit
    toy = dit.text_dim == TEXT_DIM
    if PRESETS[preset].net is not HYDiT:
        length = TEXT_LEN if toy else UMT5_LEN
        return Encoder("noise", lambda _: {"embeds": torch.randn(length, dit.text_dim)}, length, None, "")
    words, places = (26, 16) if toy else (300, 729)  # a prompt may have up to HY_TEXT_LEN words
    return Encoder("noise", lambda _: {"text": torch.randn(words, dit.text_dim), "byt5": torch.zeros(0, dit.byt5[0])},
                   None, lambda images: torch.randn(len(images), places, dit.vision_dim), "")


def random_batch(preset: str, meta: Meta, size: int, device: torch.device) -> Batch:
    """A batch of noise, of videos as meta has them. On the meta device, all but masks are shapes alone."""
    dit, encoder, f = PRESETS[preset].dit, random_encoder(preset), meta["frames"]
    h, w = (pixels // PRESETS[preset].vae.stride for pixels in meta["size"])
    x0, text = torch.randn(size, f, dit.channels, h, w), encoder.encode_text("")
    vision = encoder.encode_image(x0) if encoder.encode_image else None
    prompt, null = collate_prompts([text] * size, text, encoder.length, vision, x0[:, :1])
    camera = Camera(torch.eye(4).expand(size, f, 4, 4), intrinsics(meta["K"]).expand(size, f, 3, 3))
    x0, prompt, null, camera, generated = (
        tree_map(lambda z: z if z.dtype == torch.bool else z.to(device), tree)
        for tree in (x0, prompt, null, camera, torch.ones(size, f)))
    rng = [torch.Generator().manual_seed(i) for i in range(size)]
    return Batch(x0, prompt, null, camera, generated, rng, [*range(size)], None)


# ----------------------------------------------------------------------------------------------------------------------
# 10. main: the toy world, or videos, as a latents folder.


def pixels(text: str) -> list[int]:
    """An argparse type: '32', or height x width as in '480x832'."""
    size = [positive(side) for side in text.split("x")]
    if len(size) > 2:
        raise argparse.ArgumentTypeError(f"{text}: expected pixels, or height x width")
    return [size[0], size[-1]]


def translation_scale(text: str) -> str | float:
    """An argparse type: 'set', 'clip' or a number above 0."""
    if text in ("set", "clip"):
        return text
    number = float(text)
    if not 0 < number < math.inf:
        raise argparse.ArgumentTypeError(f"{text}: expected 'set', 'clip' or a number above 0")
    return number


def add_toy_flags(p: argparse.ArgumentParser) -> None:
    toy = p.add_argument_group("the toy world")
    toy.add_argument("--preset", default="tiny", choices=("tiny", "tiny-hy"), help="network that it is made for")
    toy.add_argument("--count", type=positive, default=6144, help="videos to render")


def add_video_flags(p: argparse.ArgumentParser) -> None:
    own = p.add_argument_group("your own videos")
    own.add_argument("--videos", type=Path, help="folder of videos, to be used instead of the toy world")
    own.add_argument("--table", type=Path, help="see below; default the table.jsonl, table.json or table.csv in that "
                     "folder")
    own.add_argument("--fps", type=float, default=FPS, help="frames a second to take; a video must have as many")
    own.add_argument("--K", type=float, nargs=4, metavar=("FX", "FY", "CX", "CY"),
                     help="intrinsics of clips that bring none, over the width and height of the video")
    own.add_argument("--scale", type=translation_scale, help=f"factor on all translations; or 'set': the one that "
                     f"makes the median step of the whole folder {STEP} units, for metric poses; or 'clip': one for "
                     "each clip, for poses whose scale is arbitrary. Default: 1, and 'clip' for those that were "
                     "made of pictures alone: COLMAP's, transforms.json, RealEstate10K's, VGGT's")
    own.add_argument("--text-encoder", type=Path, help="umT5, or for HY the folder of HunyuanVideo-1.5; without it "
                     "prompts are read word by word, as the toy's")
    own.add_argument("--negative", help="the prompt that guidance steers away from; default empty, or Wan's for umT5")
    own.add_argument("--dry-run", action="store_true", help="look and judge alone, with report.jsonl: nothing is "
                     "encoded, and neither VAE nor text encoder is needed")
    own.add_argument("--keep", nargs="+", choices=DOUBTFUL, metavar="REASON",
                     help="do not drop clips for: " + ", ".join(DOUBTFUL))
    own.add_argument("--at-most", type=positive, metavar="N", help="clips to keep of one action class, the key pressed "
                     "most; default all")
    own.add_argument("--shard-size", type=positive, default=64, help="clips per file, and per turn of a process")
    own.add_argument("--inspect", type=Path, metavar="FOLDER", help="only draw up to 24 rows of a latents folder: the "
                     "path from above, from blue to red, beside the frames")


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    reasons = "\n".join(f"  {name:11}{text}" for name, text in (UNUSABLE | DOUBTFUL).items())
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=HelpFormatter,
        epilog=f"--table: {TABLE}\n\nreport.jsonl has a line for every clip; why one may be dropped:\n{reasons}")
    p.add_argument("--out", type=Path, help="latents folder to write; default data/toy, or data/videos with --videos")
    p.add_argument("--vae", type=Path, help="checkpoint of the VAE, default ckpt/vae.pt, or with --inspect what made "
                   "the latents; the toy world's is fitted if there is none")
    p.add_argument("--frames", type=positive, default=8,
                   help="latent frames per video, which are 1 + 4 (frames - 1) pixel frames")
    p.add_argument("--size", type=pixels, default="64",
                   help="pixels: the side of a square, or height x width, as in 480x832")
    p.add_argument("--seed", type=int, default=0, help="of the toy world's rooms and paths")
    p.add_argument("--image-share", type=fraction, help="HY: share of the videos that come with their first frame as "
                   "an image to go on from; default 0.25, of your own videos 1")
    add_toy_flags(p)
    add_video_flags(p)
    args = p.parse_args(argv)
    args.out = args.out or Path("data/videos" if args.videos else "data/toy")
    args.keep = args.keep or []
    if args.vae is None and not args.inspect:
        args.vae = Path("ckpt/vae.pt")
    if args.image_share is None:
        args.image_share = 1.0 if args.videos else 0.25
    size = f"--size {args.size[0]}x{args.size[1]}"
    if any(side % 16 for side in args.size) or args.frames < (2 if args.videos else 1):
        p.error(f"{size} --frames {args.frames}: expected multiples of 16 pixels, and of a video at least 2 frames")
    if not args.videos and args.size[0] != args.size[1]:
        p.error(f"{size}: the toy world is square")
    if not 0 < args.fps < math.inf:
        p.error(f"--fps {args.fps}: expected a number above 0")
    if not args.videos and (args.dry_run or args.table):
        p.error("--dry-run, --table: of use with --videos alone")
    try:
        if args.K:
            intrinsics(args.K)
    except ValueError as error:
        p.error(f"--K: {error}")
    return args


def main(args: argparse.Namespace) -> None:
    if args.inspect:
        inspect(args.inspect, args.vae)
    elif args.videos and args.dry_run:
        dry_run(args)
    elif args.videos:
        make_from_videos(args)
    else:
        make_toy(args)


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="replace")  # no console stops a run over a letter that it lacks
    try:
        main(parse_args())
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    if dist.is_initialized():
        dist.destroy_process_group()
