"""
Everything frozen, and everything that becomes a batch.

    1. Cameras      one type, one trajectory grammar, path.json
    2. Toy world    rooms ray-cast in torch: the data set, the base model and the ground truth of a laptop
    3. Words        umT5, and a deterministic stand-in for it
    4. Latents      the folder a training run reads, and get_batch, a pure function of (seed, step, part)
    5. main         $ python data.py     render the toy world, train its VAE, write the latents folder

Cameras are OpenCV (x right, y down, z forward) and world-to-camera, the first frame is the identity, and intrinsics are
divided by image width and height: K = (fx/W, fy/H, cx/W, cy/H). Geometry stays in fp32.
"""
import argparse
import html
import json
import math
import re
import sys
import zlib
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import imageio.v3 as imageio
import torch
import torch.nn.functional as F
from einops import rearrange, reduce, repeat
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm import tqdm

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
GRAMMAR = "keys: " + ", ".join(f"{key} {help}" for key, (help, *_) in KEYS.items()) + (
    f"; each for one latent frame ({STEP} units or {math.degrees(TURN):g} degrees); w*4 repeats, w+l is both at once, "
    "commas follow one another: 'w*4,w+l*3'")
K_WIDE = (0.5050505, 0.89786756, 0.5, 0.5)  # 16:9, the intrinsics of minWM's training data
K_SQUARE = (0.5050505, 0.5050505, 0.5, 0.5)  # the same field of view on square images


def rotation(yaw: Tensor, pitch: Tensor) -> Tensor:
    """R_y(yaw) R_x(pitch) [... 3 3]: positive yaw looks right, positive pitch looks up."""
    (cy, sy), (cp, sp) = (torch.cos(yaw), torch.sin(yaw)), (torch.cos(pitch), torch.sin(pitch))
    zero = torch.zeros_like(cy)
    rows = [cy, sy * sp, sy * cp, zero, cp, -sp, -sy, cy * sp, cy * cp]
    return rearrange(torch.stack(rows, dim=-1), "... (i j) -> ... i j", i=3)


def parse_trajectory(text: str) -> Tensor:
    """'w*4,w+l*3' -> viewmats [f 4 4] fp32, f = 1 + number of steps. Raises ValueError naming the offending part.

    Each step turns first, then moves along the new axes: c2w <- c2w . R . t, as minWM's training data does.
    """
    c2w, poses = torch.eye(4, dtype=torch.float64), [torch.eye(4, dtype=torch.float64)]
    for part in text.replace(" ", "").split(","):
        keys, _, count = part.partition("*")
        unknown = [key for key in keys.split("+") if key not in KEYS]
        if unknown or ("*" in part and not (count.isdecimal() and 0 < int(count) <= 10**4)):
            raise ValueError(f"trajectory {text!r}: cannot read {part!r}. {GRAMMAR}")
        move, yaw, pitch = (torch.tensor([KEYS[key][n] for key in keys.split("+")], dtype=torch.float64).sum(0)
                            for n in (1, 2, 3))
        step = torch.eye(4, dtype=torch.float64)
        step[:3, :3] = rotation(yaw, pitch)
        step[:3, 3] = step[:3, :3] @ move
        for _ in range(int(count or 1)):
            c2w = c2w @ step
            poses.append(c2w)
    return invert_se3(torch.stack(poses)).float()


def invert_se3(pose: Tensor) -> Tensor:
    """Inverse of rigid transforms [... 4 4] by transposition: R^T, -R^T t."""
    R, t = pose[..., :3, :3].mT, pose[..., :3, 3:]
    last = pose.new_tensor([0, 0, 0, 1]).expand(*pose.shape[:-2], 1, 4)
    return torch.cat([torch.cat([R, -R @ t], dim=-1), last], dim=-2)


def intrinsics(K: tuple[float, ...] | list[float]) -> Tensor:
    """(fx, fy, cx, cy), normalised by width and height -> [3 3] fp32. Raises ValueError when out of range."""
    if not isinstance(K, (list, tuple)) or len(K) != 4 or not all(
            isinstance(k, (int, float)) and math.isfinite(k) for k in K) or not all(0.05 < k < 20 for k in K[:2]):
        raise ValueError(f"K {K}: expected (fx/W, fy/H, cx/W, cy/H) with focal lengths between 0.05 and 20, not pixels")
    fx, fy, cx, cy = K
    if not (0 <= cx <= 1 and 0 <= cy <= 1):
        raise ValueError(f"K {K}: the principal point (cx, cy) lies outside the image, expected between 0 and 1")
    return torch.tensor([[fx, 0, cx], [0, fy, cy], [0, 0, 1]], dtype=torch.float32)


def check_poses(poses: Tensor, name: str) -> Tensor:
    """Rigid transforms [f 4 4], unchanged; raises ValueError at the first that is not in SE(3)."""
    if poses.ndim != 3 or poses.shape[1:] != (4, 4):
        raise ValueError(f"{name}: expected a list of 4x4 matrices, found shape {list(poses.shape)}")
    R, last = poses[:, :3, :3].double(), poses.new_tensor([0, 0, 0, 1])
    for i in range(len(poses)):
        off = (R[i] @ R[i].mT - torch.eye(3, dtype=torch.float64)).abs().max().item()
        if not poses[i].isfinite().all() or off > 1e-3 or R[i].det() < 0 or (poses[i, 3] - last).abs().max() > 1e-5:
            raise ValueError(f"{name}: pose {i} is not a rigid transform (SE(3)): its rotation is off by {off:.2g}")
    return poses


class CameraPath(NamedTuple):
    """One camera path: viewmats [f 4 4], K (fx, fy, cx, cy) or None for the checkpoint's own, and what came with it."""
    viewmats: Tensor
    K: tuple[float, ...] | None = None
    name: str = "path"
    prompt: str | None = None


def read_camera(source: str) -> list[CameraPath]:
    """A pose string, or a .json file holding one of

        "w*4,l*3"                                     a pose string
        {"c2w": [4x4, ...], "K": [fx, fy, cx, cy]}     or "w2c"; one matrix per latent frame, K normalised and optional
        {"0": {"extrinsic": 4x4 c2w, "K": 3x3}, ...}   HY-WorldPlay, one entry per latent frame, K in pixels
        [{"id", "caption", "trajectory"}, ...]         minWM, several paths

    Raises ValueError, naming the file and what is wrong with it. Poses are re-based so that the first is the identity.
    """
    if not source.endswith(".json"):
        return [CameraPath(parse_trajectory(source))]
    try:
        spec = json.loads(Path(source).read_text())
    except FileNotFoundError:
        raise ValueError(f"{source}: no such file") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{source}: not JSON ({error})") from None
    try:
        entries, stem = spec if isinstance(spec, list) else [spec], Path(source).stem
        paths = [_camera_path(entry, f"{stem}-{n}" if len(entries) > 1 else stem) for n, entry in enumerate(entries)]
    except (ValueError, TypeError) as error:
        raise ValueError(f"{source}: {error}") from None
    if not paths:
        raise ValueError(f"{source}: an empty list, expected at least one path")
    names = [path.name for path in paths]
    if len(set(names)) < len(names) or any(Path(name).name != name for name in names):
        raise ValueError(f"{source}: ids {names} name the videos, so each must be a different file name")
    return paths


def _camera_path(spec: str | dict, name: str) -> CameraPath:
    if isinstance(spec, str):
        return CameraPath(parse_trajectory(spec), name=name)
    if not isinstance(spec, dict):
        raise ValueError(f"expected a pose string or an object, found {spec!r}")
    name, prompt = str(spec.get("id", name)), spec.get("caption", spec.get("prompt"))
    if prompt is not None and not (isinstance(prompt, str) and prompt.strip()):
        raise ValueError(f"path {name!r}: its prompt is {prompt!r}, expected a description of the world")
    if "trajectory" in spec:
        kind, poses, K = "w2c", parse_trajectory(str(spec["trajectory"])), spec.get("K")
    elif "c2w" in spec or "w2c" in spec:
        kind = "c2w" if "c2w" in spec else "w2c"
        poses, K = check_poses(torch.tensor(spec[kind], dtype=torch.float32), kind), spec.get("K")
    elif spec and all(isinstance(entry, dict) and "extrinsic" in entry for entry in spec.values()):
        kind, entries = "c2w", [spec[key] for key in sorted(spec, key=lambda key: (len(key), key))]  # "2" before "10"
        poses = check_poses(torch.tensor([entry["extrinsic"] for entry in entries], dtype=torch.float32), "extrinsic")
        (fx, _, cx), (_, fy, cy), _ = entries[0].get("K", ((0, 0, 0), (0, 0, 0), ()))
        if not (cx > 0 and cy > 0):
            raise ValueError(f"expected a 3x3 'K' in pixels with a principal point, found {entries[0].get('K')}")
        K = (fx / (2 * cx), fy / (2 * cy), 0.5, 0.5)  # WorldPlay's rule: the image is twice the principal point
    else:
        raise ValueError(f"expected 'trajectory', 'c2w', 'w2c' or 'extrinsic' entries, found {list(spec)[:4]}")
    viewmats = invert_se3(poses) if kind == "c2w" else poses
    viewmats = viewmats @ invert_se3(viewmats[:1])
    if K is not None:
        intrinsics(K)
    return CameraPath(viewmats, None if K is None else tuple(K), name, prompt)


def pixel_cameras(viewmats: Tensor) -> Tensor:
    """One pose per latent frame [b f 4 4] -> one per pixel frame [b t 4 4], t = 1 + 4 (f - 1).

    Latent frame i shows pixel frames 4i-3 .. 4i, so pose i belongs to the last of them; between two poses the camera
    turns about a fixed axis and its centre moves on a straight line.
    """
    c2w = invert_se3(viewmats.double())
    a, b = c2w[:, :-1, None], c2w[:, 1:, None]
    s = torch.arange(1, 5, dtype=torch.float64, device=viewmats.device).view(1, 1, 4, 1, 1) / 4
    turn = a[..., :3, :3].mT @ b[..., :3, :3]
    angle = torch.arccos(((turn.diagonal(dim1=-2, dim2=-1).sum(-1) - 1) / 2).clamp(-1, 1))[..., None, None]
    axis = (turn - turn.mT) / (2 * angle.sin()).clamp_min(1e-12)  # cross-product matrix of the unit axis
    partial = torch.eye(3, dtype=torch.float64, device=viewmats.device)
    partial = partial + (s * angle).sin() * axis + (1 - (s * angle).cos()) * (axis @ axis)  # Rodrigues
    R = a[..., :3, :3] @ partial
    centre = torch.lerp(a[..., :3, 3:], b[..., :3, 3:], s)
    poses = invert_se3(F.pad(torch.cat([R, centre], dim=-1), (0, 0, 0, 1)))  # the padded row is rewritten by invert_se3
    return torch.cat([viewmats[:, :1].double(), rearrange(poses, "b f s i j -> b (f s) i j")], dim=1).float()


# ----------------------------------------------------------------------------------------------------------------------
# 2. Toy world. A room seen from inside, with two pillars. The prompt names every colour and where the pillars stand;
# each panel of the walls, 1 unit long, carries one of four patterns that the prompt does *not* name. So a generated
# video can be checked against the one room that explains it best, and a model still has something to invent.

PALETTE = {
    "red": (0.86, 0.16, 0.16), "orange": (0.95, 0.55, 0.12), "yellow": (0.93, 0.88, 0.20), "green": (0.16, 0.66, 0.24),
    "cyan": (0.20, 0.80, 0.84), "blue": (0.18, 0.30, 0.88), "purple": (0.62, 0.22, 0.78), "white": (0.92, 0.92, 0.90),
}
SURFACES = ("left wall", "right wall", "far wall", "floor", "ceiling", "pillar", "pillar", "back wall")
NAMED = len(SURFACES) - 1  # nobody names the wall behind the first camera; it is grey
LOOKS = ("level stripes", "upright stripes", "checks", "slanted stripes")
ROOM = ((-1.0, 1.0), (-0.7, 0.7), (-0.9, 1.6))  # x, y, z around the first camera
PILLAR = 0.13  # half width
PILLAR_X, PILLAR_Z = {"left": -0.5, "middle": 0.0, "right": 0.5}, {"near": 0.85, "far": 1.25}
PERIOD = 0.66  # of every pattern, in world units
FPS = 16
# Panels are counted surface by surface, (first panel, panels across); along z each surface has three, from z = -1.4.
PANELS = {"left wall": (0, 1), "right wall": (3, 1), "far wall": (6, 2), "floor": (8, 1), "ceiling": (11, 1),
          "pillar": (16, 1), "back wall": (14, 2)}
N_PANELS = 16  # with a pattern; the pillars, plain, count as one more
SURFACE_OF_PANEL = [0] * 3 + [1] * 3 + [2] * 2 + [3] * 3 + [4] * 3 + [7] * 2  # index into SURFACES


class Scene(NamedTuple):
    """A batch of rooms."""
    colours: Tensor  # [b 8] index into PALETTE, per surface (the back wall's is ignored)
    pillars: Tensor  # [b 2 2] x and z of the two centres
    looks: Tensor  # [b 16] index into LOOKS, per panel: the part that is chance


class Hits(NamedTuple):
    """What each ray meets, at twice the image size (2x2 rays a pixel), each [b t 2h 2w]."""
    surface: Tensor
    panel: Tensor
    u: Tensor
    v: Tensor
    shade: Tensor


def sample_prompt(rng: torch.Generator) -> str:
    names = list(PALETTE)
    colours = [names[i] for i in torch.randint(len(names), (NAMED,), generator=rng)]
    xs = torch.randperm(3, generator=rng)[:2]
    zs = torch.randint(2, (2,), generator=rng)
    parts = [f"{colour} {surface}" for colour, surface in zip(colours[:5], SURFACES)]
    parts += [f"{list(PILLAR_Z)[z]} {list(PILLAR_X)[x]} {colour} pillar" for x, z, colour in zip(xs, zs, colours[5:])]
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
        cuts = torch.randperm(steps - 1, generator=rng)[: torch.randint(3, (), generator=rng)].sort().values + 1
        lengths = torch.tensor([0, *cuts, steps]).diff().tolist()
        parts = []
        for length in lengths:
            move = moves[torch.multinomial(torch.tensor([3, 3, 3, 3, 1, 1.0]), 1, generator=rng)]
            turn = turns[torch.multinomial(torch.tensor([3, 3, 1, 1.0]), 1, generator=rng)]
            kind = torch.multinomial(torch.tensor([4, 3, 3.0]), 1, generator=rng).item()
            parts.append(f"{(move, turn, f'{move}+{turn}')[kind]}*{length}")
        path = ",".join(parts)
        centre = invert_se3(parse_trajectory(path))[:, :3, 3]
        if (centre.abs() < torch.tensor([0.7, 0.4, 0.6])).all():
            return path


def held_out(text: str) -> bool:
    """One prompt, and one path, in eight is never trained on: which ones is a property of the text alone."""
    return zlib.crc32(text.encode()) % 8 == 0


def sample_toy(count: int, seed: int, steps: int, held: bool) -> tuple[list[str], list[str], Scene]:
    """Prompts, paths and scenes, all held out or none."""
    rng = torch.Generator().manual_seed(seed)
    prompts, paths = [], []
    while len(prompts) < count:
        if held_out(text := sample_prompt(rng)) == held:
            prompts.append(text)
    while len(paths) < count:
        if held_out(text := sample_path(rng, steps)) == held:
            paths.append(text)
    colours, pillars = (torch.stack(z) for z in zip(*map(read_prompt, prompts)))
    return prompts, paths, Scene(colours, pillars, torch.randint(len(LOOKS), (count, N_PANELS), generator=rng))


def cast(pillars: Tensor, viewmats: Tensor, K: Tensor, size: int) -> Hits:
    """pillars [b 2 2], viewmats [b t 4 4], K [3 3] -> what each ray of a size x size image meets."""
    grid = (torch.arange(2 * size, dtype=torch.float32) + 0.5) / (2 * size)
    y, x = torch.meshgrid((grid - K[1, 2]) / K[1, 1], (grid - K[0, 2]) / K[0, 0], indexing="ij")
    ray = torch.stack([x, y, torch.ones_like(x)])
    c2w = invert_se3(viewmats)
    d = torch.einsum("btij,jhw->ibthw", c2w[..., :3, :3], ray)
    d = torch.where(d.abs() < 1e-6, 1e-6, d)
    o = rearrange(c2w[..., :3, 3], "b t i -> i b t 1 1")

    lo, hi = (torch.tensor(bound).view(3, 1, 1, 1, 1) for bound in zip(*ROOM))
    distance, axis = ((torch.where(d > 0, hi, lo) - o) / d).min(dim=0)
    positive = d.gather(0, axis[None])[0] > 0
    wall = torch.where(positive, torch.tensor([1, 3, 2])[axis], torch.tensor([0, 4, 7])[axis])  # +y is the floor
    for n in range(2):
        centre = rearrange(pillars[:, n], "b i -> i b 1 1 1")
        a, b = ((centre + side * PILLAR - o[[0, 2]]) / d[[0, 2]] for side in (-1, 1))
        enter, face = torch.minimum(a, b).max(dim=0)
        hit = (enter < torch.maximum(a, b).min(dim=0).values) & (enter > 0) & (enter < distance)
        distance, wall, axis = (torch.where(hit, new, old) for new, old in
                                ((enter, distance), (5 + n, wall), (2 * face, axis)))

    x, y, z = o + distance * d
    side, flat, pillar = axis == 0, (wall == 3) | (wall == 4), (wall == 5) | (wall == 6)
    first, across = (torch.tensor(column)[wall] for column in zip(*[PANELS[name] for name in SURFACES]))
    row = torch.where((side | flat) & ~pillar, (z + 1.4).floor().clamp(0, 2).long(), 0)
    panel = first + row + torch.where(across == 2, (x > 0).long(), 0)
    facing = torch.tensor([0.80, 0.88, 0.95, 1.0, 0.90, 0.95, 0.95, 0.85])[wall] - 0.15 * (pillar & side).float()
    return Hits(wall, panel, torch.where(side, z, x), torch.where(flat, z, y), facing / (1 + 0.12 * distance))


def paint(hits: Hits, colours: Tensor, looks: Tensor) -> Tensor:
    """Colours [b 8] and looks [b 16] on what the rays met -> video [b 3 t h w] in [-1, 1]."""
    rgb = torch.tensor([*PALETTE.values(), (0.5, 0.5, 0.5)])
    batch = torch.arange(len(colours)).view(-1, 1, 1, 1)
    colour = torch.where(hits.surface == NAMED, len(PALETTE), colours[batch, hits.surface])
    look, turn = F.pad(looks, (0, 1), value=-1)[batch, hits.panel], 2 * math.pi / PERIOD
    su, sv = torch.sin(turn * hits.u), torch.sin(turn * hits.v)
    wave = torch.where(look == 0, sv, torch.where(look == 1, su, torch.where(
        look == 2, 1.4 * su * sv, torch.sin(turn * 0.75 * (hits.u + hits.v)))))
    tone = hits.shade * torch.where(look < 0, 0.9, 0.74 + 0.26 * torch.tanh(2.5 * wave))
    return reduce(2 * tone[..., None] * rgb[colour] - 1, "b t (h p) (w q) c -> b c t h w", "mean", p=2, q=2)


def render(scene: Scene, viewmats: Tensor, K: Tensor, size: int) -> Tensor:
    """scene of b rooms, one pose per latent frame [b f 4 4] -> video [b 3 t size size] in [-1, 1]."""
    return paint(cast(scene.pillars, pixel_cameras(viewmats), K, size), scene.colours, scene.looks)


def look_errors(video: Tensor, hits: Hits, colours: Tensor) -> Tensor:
    """Squared error of every panel under every look [b 17 4], summed over the rays that meet it; last, the pillars."""
    errors = []
    for look in range(len(LOOKS)):
        image = paint(hits, colours, torch.full((len(colours), N_PANELS), look))
        error = repeat((image - video).square().sum(1), "b t h w -> b (t h p w q)", p=2, q=2)
        errors.append(torch.zeros(len(colours), N_PANELS + 1).scatter_add_(1, hits.panel.flatten(1), error))
    return torch.stack(errors, dim=-1)


def panels_seen(hits: Hits, least: float) -> Tensor:
    """Which panels cover at least `least` pixels in some frame [b 16]."""
    panel = hits.panel.flatten(2)
    rays = torch.zeros(*panel.shape[:2], N_PANELS + 1).scatter_add_(2, panel, torch.ones(panel.shape))
    return (rays / 4).amax(1)[:, :N_PANELS] >= least


# ----------------------------------------------------------------------------------------------------------------------
# 3. Words. umT5 reads a prompt in context; this stand-in gives each word a fixed random vector and lets a token carry
# its own word and the two before it, so that "red left wall" is not "left red wall". Zero rows pad, as in Wan.

WORD_DIM = 32
TEXT_LEN, TEXT_DIM = 32, 3 * WORD_DIM


@lru_cache(maxsize=4096)
def word_vector(word: str) -> Tensor:
    return torch.randn(WORD_DIM, generator=torch.Generator().manual_seed(zlib.crc32(word.encode())))


def encode_words(prompt: str) -> Tensor:
    """prompt -> [32 96], zero past its end; the empty prompt is the null prompt. Raises ValueError past 32 words."""
    words = prompt.lower().replace(",", " ").split()
    if len(words) > TEXT_LEN:
        raise ValueError(f"prompt {prompt!r}: {len(words)} words, expected at most {TEXT_LEN}")
    vectors = [torch.zeros(WORD_DIM)] * 2 + [word_vector(word) for word in words]
    rows = [torch.cat([vectors[i], vectors[i - 1], vectors[i - 2]]) for i in range(2, len(vectors))]
    return F.pad(torch.stack(rows), (0, 0, 0, TEXT_LEN - len(rows))) if rows else torch.zeros(TEXT_LEN, TEXT_DIM)


# umT5 itself is transformers', imported where it is used: that takes seconds, and the toy world does without.

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
    net: nn.Module
    tokenizer: object


def umt5_name(name: str) -> str:
    """Wan's name of a umT5 parameter -> transformers'."""
    for ours, theirs in UMT5_NAMES:
        name = re.sub(ours, theirs, name)
    return name


def build_umt5(weights: dict[str, Tensor]) -> nn.Module:
    """transformers' UMT5EncoderModel with Wan's weights, sizes read off them; ValueError names what does not fit."""
    from transformers import UMT5Config, UMT5EncoderModel
    try:
        (vocabulary, d), (inner, _) = weights["token_embedding.weight"].shape, weights["blocks.0.attn.q.weight"].shape
        buckets, heads = weights["blocks.0.pos_embedding.embedding.weight"].shape
        d_ff = weights["blocks.0.ffn.fc1.weight"].shape[0]
    except (KeyError, ValueError) as error:
        raise ValueError(f"not the weights of a umT5 encoder ({error!r})") from None
    layers = sum(name.endswith("attn.q.weight") for name in weights)
    with torch.device("meta"):
        net = UMT5EncoderModel(UMT5Config(vocab_size=vocabulary, d_model=d, d_kv=inner // heads, d_ff=d_ff,
                                          num_layers=layers, num_heads=heads, relative_attention_num_buckets=buckets))
    weights = {umt5_name(name): w for name, w in weights.items()}
    weights |= {"encoder.embed_tokens.weight": weights["shared.weight"]}
    expected, found = ({name: tuple(w.shape) for name, w in z.items()} for z in (net.state_dict(), weights))
    if wrong := [name for name in expected | found if expected.get(name) != found.get(name)]:
        raise ValueError(f"{len(wrong)} tensors are not those of a umT5 encoder, first {wrong[0]}: expected shape "
                         f"{expected.get(wrong[0], 'none')}, found {found.get(wrong[0], 'none')}")
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
    places = [path, path.parent / "tokenizer", path.parent / "google/umt5-xxl"]
    home = next((z for z in places if (z / "tokenizer.json").exists() or (z / "spiece.model").exists()), None)
    if not path.exists() or home is None:
        lacks = f"no tokenizer in {', '.join(map(str, places))}" if path.exists() else "no such file or folder"
        raise ValueError(f"{path}: {lacks}; expected models_t5_umt5-xxl-enc-bf16.pth or a transformers folder of umT5")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    try:
        if path.is_dir():
            net, info = UMT5EncoderModel.from_pretrained(path, dtype=dtype, output_loading_info=True)
            if lost := [*info["missing_keys"], *info["mismatched_keys"]]:
                raise ValueError(f"{len(lost)} of umT5's tensors are missing or misshapen, first {lost[0]}")
        else:
            net = build_umt5(torch.load(path, map_location="cpu", weights_only=True))
        return TextEncoder(net.to(device, dtype).eval().requires_grad_(False), AutoTokenizer.from_pretrained(home))
    except Exception as error:  # each of the three readers has its own
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise ValueError(f"{path}: not a umT5 encoder with its tokenizer ({reason[0]})") from error


def encode_prompts(prompts: list[str], encoder: TextEncoder | None) -> Tensor:
    """Prompts -> [b l d], zero past their ends: by umT5, cut at 512 tokens as Wan does, or else word by word."""
    if encoder is None:
        return torch.stack([encode_words(prompt) for prompt in prompts])
    clean = [re.sub(r"\s+", " ", html.unescape(html.unescape(prompt))).strip() for prompt in prompts]
    tokens = encoder.tokenizer(clean, padding="max_length", max_length=UMT5_LEN, truncation=True, return_tensors="pt")
    ids, mask = (tokens[name].to(encoder.net.device) for name in ("input_ids", "attention_mask"))
    return embed_tokens(encoder.net, ids, mask)


# ----------------------------------------------------------------------------------------------------------------------
# 4. Latents. A folder of safetensors shards, read through memory maps: latents [n f c h w] fp16, viewmats [n f 4 4] and
# Ks [n f 3 3] fp32, prompt_ids [n]; and prompts.safetensors with the embedding of each prompt_id, the null last.


class Batch(NamedTuple):
    """What a stage trains on; every random number a sample needs comes from that sample's own generator in `rng`."""
    x0: Tensor  # [b f c h w] fp32
    prompt: Tensor  # [b l d]
    null: Tensor  # [b l d], the prompt that guidance steers away from
    camera: tuple[Tensor, Tensor]  # viewmats [b f 4 4], Ks [b f 3 3]
    rng: list[torch.Generator]
    ids: list[int]  # rows of the data set
    prompt_ids: list[int]
    states: Tensor | None  # [b n f c h w], of an ODE-pair folder (distill_ode.py): along the way from noise to x0


class Latents(NamedTuple):
    """An open latents folder: memory maps, nothing read yet."""
    folder: Path
    shards: list
    starts: list[int]  # first row of each shard, and the total
    prompts: object
    meta: dict


def open_latents(folder: str | Path) -> Latents:
    """Raises ValueError when the folder is missing, empty or holds a file that is not safetensors."""
    folder = Path(folder)
    files = sorted(folder.glob("latents-*.safetensors"))
    if not files or not (folder / "prompts.safetensors").exists():
        raise ValueError(f"{folder}: no latents here; `python data.py --out {folder}` makes the toy world's")
    try:
        shards = [safe_open(file, "pt") for file in files]
        prompts = safe_open(folder / "prompts.safetensors", "pt")
    except SafetensorError as error:
        raise ValueError(f"{folder}: a file is truncated or not safetensors ({error})") from None
    starts = [0]
    for file, shard in zip(files, shards, strict=True):
        held, missing = shard.metadata() or {}, {"latents", "viewmats", "Ks", "prompt_ids"} - set(shard.keys())
        if missing or "meta" not in held:
            raise ValueError(f"{file}: not a shard of latents, it holds {sorted(shard.keys())[:5]}")
        starts.append(starts[-1] + shard.get_slice("prompt_ids").get_shape()[0])
    return Latents(folder, shards, starts, prompts, json.loads(shards[0].metadata()["meta"]))


def check_data(data: Latents, source: dict) -> None:
    """Raises ValueError when latents are not of the kind that the checkpoint described by `source` knows."""
    for name in ("K", "size", "fps", "frames", "vae_fingerprint"):
        if data.meta[name] != source[name]:
            raise ValueError(f"{data.folder}: its {name} is {data.meta[name]}, the checkpoint's {source[name]}")


@lru_cache(maxsize=8)
def _shuffled(count: int, seed: int, epoch: int) -> list[int]:
    return torch.randperm(count, generator=torch.Generator().manual_seed(mix(seed, 1, epoch))).tolist()


def save_shard(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Write safetensors so that a crash or a full disk never leaves half a file under the final name."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        save_file({name: z.cpu().contiguous() for name, z in tensors.items()}, temporary, metadata)
        temporary.replace(path)
    except (OSError, SafetensorError) as error:
        temporary.unlink(missing_ok=True)
        raise ValueError(f"{path}: could not be written ({error})") from error


def mix(*numbers: int) -> int:
    """Integers -> a well-spread 62-bit seed, so that neighbouring (seed, step, sample) share no stream."""
    digest = 0
    for number in numbers:
        digest = (digest ^ (number + 0x9E3779B97F4A7C15)) * 0xBF58476D1CE4E5B9 % 2**64
        digest ^= digest >> 29
    return digest >> 2


def get_batch(data: Latents, seed: int, step: int, part: int, parts: int, size: int, device: torch.device) -> Batch:
    """Samples part * size ... of the parts * size that make up `step`: a pure function, so a run can stop anywhere.

    part is rank + world_size * micro-batch, so N ranks and N micro-batches see the same samples with the same noise.
    Raises ValueError when a latent is not finite.
    """
    total, x0, viewmats, Ks, prompt_ids, rng, ids, states = data.starts[-1], [], [], [], [], [], [], []
    for slot in range(part * size, (part + 1) * size):
        epoch, position = divmod(step * parts * size + slot, total)
        row = _shuffled(total, seed, epoch)[position]
        n = next(i for i, start in enumerate(data.starts[1:]) if row < start)
        shard, at = data.shards[n], row - data.starts[n]
        x0.append(shard.get_slice("latents")[at])
        viewmats.append(shard.get_slice("viewmats")[at])
        Ks.append(shard.get_slice("Ks")[at])
        prompt_ids.append(int(shard.get_slice("prompt_ids")[at]))
        if "states" in shard.keys():
            states.append(shard.get_slice("states")[at])
        rng.append(torch.Generator().manual_seed(mix(seed, 2, step, slot)))
        ids.append(row)
    x0 = torch.stack(x0).float()
    if not x0.isfinite().all():
        bad = [row for row, x in zip(ids, x0) if not x.isfinite().all()]
        raise ValueError(f"{data.folder}: latents of row {bad[0]} hold NaN or inf")
    embeds = data.prompts.get_slice("embeds")
    prompt = torch.stack([embeds[i] for i in prompt_ids]).float()
    null = embeds[embeds.get_shape()[0] - 1].float().expand_as(prompt)
    on = [z.to(device) for z in (x0, prompt, null, torch.stack(viewmats), torch.stack(Ks))]
    on_the_way = torch.stack(states).float().to(device) if states else None
    return Batch(*on[:3], (on[3], on[4]), rng, ids, prompt_ids, on_the_way)


def positive(text: str) -> int:
    """An argparse type: a whole number of at least 1."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number}: expected at least 1")
    return number


def randn(rng: list[torch.Generator], *shape: int) -> Tensor:
    """Normal noise [b *shape], each sample from its own generator: the same on any device and any number of ranks."""
    return torch.stack([torch.randn(shape, generator=g) for g in rng])


def rand(rng: list[torch.Generator], *shape: int) -> Tensor:
    """Uniform numbers [b *shape], each sample from its own generator."""
    return torch.stack([torch.rand(shape, generator=g) for g in rng])


def open_log(path: Path, step: int) -> None:
    """Keep the lines of metrics up to `step`: none of an earlier run's, none that a resumed run will write again."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = path.read_text().splitlines() if path.exists() else []
    path.write_text("".join(line + "\n" for line in lines if json.loads(line)["step"] <= step))


def sample_prefix(rng: list[torch.Generator], f: int, prob: float) -> Tensor:
    """Which of f frames are to be made [b f]: 1 but for the first one or two, with probability `prob`, where they are
    0: given, as an image or a short video that the world goes on from."""
    draw = rand(rng, 1)
    given = torch.where(draw < prob / 2, 1, torch.where(draw < prob, 2, 0)).clamp_max(f - 1)
    return (torch.arange(f) >= given).float()


def write_log(path: Path, row: dict) -> None:
    """Append one line of metrics."""
    with open(path, "a") as file:
        file.write(json.dumps(row) + "\n")


def write_sheet(path: Path, videos: list[Tensor], every: int = 4, zoom: int = 3) -> None:
    """A contact sheet. Each of `videos` [b 3 t h w] gives one strip per sample, every 4th frame; strips of one sample
    stand below each other, in the order of `videos` (ground truth first, then what was made of it)."""
    strips = torch.stack([rearrange(video[:, :, ::every], "b c t h w -> b h (t w) c") for video in videos], dim=1)
    strips = F.pad(strips, (0, 0, 0, 0, 0, 1), value=1.0)  # a white line under each strip
    image = rearrange(strips, "b s h w c -> (b s h) w c")
    image = ((image.clamp(-1, 1) + 1) * 127.5).round().byte().cpu().numpy()
    path.parent.mkdir(parents=True, exist_ok=True)
    imageio.imwrite(path, image.repeat(zoom, 0).repeat(zoom, 1))


# ----------------------------------------------------------------------------------------------------------------------
# 5. main: the toy world as a latents folder.


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--out", type=Path, default=Path("data/toy"), help="latents folder to write")
    p.add_argument("--vae", type=Path, default=Path("ckpt/vae.pt"), help="trained here first if there is none")
    p.add_argument("--count", type=positive, default=4096, help="videos")
    p.add_argument("--frames", type=positive, default=8, help="latent frames per video")
    p.add_argument("--size", type=positive, default=32, help="pixels, height and width")
    p.add_argument("--vae-steps", type=positive, default=3000)
    p.add_argument("--vae-lr", type=float, default=4e-3)
    p.add_argument("--seed", type=int, default=0)
    args = p.parse_args(argv)
    if args.size % 8 or args.frames < 2:
        p.error(f"--size {args.size} --frames {args.frames}: expected a multiple of 8 pixels, and at least 2 frames")
    return args


def train_vae(vae, video: Tensor, steps: int, lr: float, seed: int) -> None:
    """Reconstruct random clips of video [n 3 t h w]; a little KL keeps the latents smooth. In place.

    Many small steps learn faster here than few large ones. Every fourth step sees one long clip, at times forth and
    back again: a VAE that has only seen short ones drifts off in colour later in a video.
    """
    rng = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=lr, betas=(0.9, 0.99), weight_decay=0.0)
    t = video.shape[2]
    for step in (bar := tqdm(range(steps), "vae")):
        optimizer.param_groups[0]["lr"] = lr * min(1.0, (step + 1) / 50, 2 * (1 - step / steps) + 0.02)
        rooms, length = (3, 5) if step % 4 else (1, t) if step % 16 else (1, 2 * t - 1)
        rows = torch.randint(len(video), (rooms,), generator=rng)
        at = torch.randint(2 * t - length, (), generator=rng)
        there_and_back = torch.cat([video[rows], video[rows].flip(2)[:, :, 1:]], dim=2)
        clip = there_and_back[:, :, at : at + length].float() / 127.5 - 1
        mu, logvar = vae.moments(clip, {})
        logvar = logvar.clamp(-20, 10)
        z = mu + (0.5 * logvar).exp() * torch.randn(mu.shape, generator=rng)
        image = vae.decoder(vae.conv2(z, {}), {})
        error = F.mse_loss(image, clip)
        kl = 0.5 * (mu.square() + logvar.exp() - 1 - logvar).mean()
        optimizer.zero_grad()
        (error + 3e-5 * kl).backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        bar.set_postfix(psnr=f"{10 * math.log10(4 / error.item()):.2f}", kl=f"{kl.item():.2f}", refresh=False)


def main(args: argparse.Namespace) -> None:
    from dataclasses import replace  # the library half of this file imports nothing of ours; only this command does

    from model import PRESETS, WanVAE, fingerprint, load_checkpoint, load_vae, save_checkpoint

    prompts, paths, scene = sample_toy(args.count, args.seed, args.frames - 1, held=False)
    viewmats, K = torch.stack([parse_trajectory(path) for path in paths]), intrinsics(K_SQUARE)
    video = torch.empty(args.count, 3, 1 + 4 * (args.frames - 1), args.size, args.size, dtype=torch.uint8)
    for i in tqdm(range(0, args.count, 16), "render"):
        part = Scene(*(z[i : i + 16] for z in scene))
        video[i : i + 16] = ((render(part, viewmats[i : i + 16], K, args.size) + 1) * 127.5).round().byte()

    if not args.vae.exists():
        torch.manual_seed(args.seed)
        vae = WanVAE(PRESETS["tiny"].vae)
        vae.init_weights()
        train_vae(vae, video, args.vae_steps, args.vae_lr, args.seed)
        with torch.no_grad():
            z = torch.cat([vae.encode(v[None].float() / 127.5 - 1)[0] for v in video[:256]])
        mean, std = z.mean((0, 1, 3, 4)).tolist(), z.std((0, 1, 3, 4)).tolist()
        vae.cfg = replace(vae.cfg, mean=tuple(mean), std=tuple(std))
        save_checkpoint(args.vae, vae.state_dict(), {"stage": "vae", "preset": "tiny", "mean": mean, "std": std,
                                                     "fingerprint": fingerprint(vae.state_dict())})
    known_as = load_checkpoint(args.vae, "vae")[1]["fingerprint"]
    vae = load_vae(args.vae, torch.device("cpu"), known_as)

    args.out.mkdir(parents=True, exist_ok=True)
    for old in [args.out / "prompts.safetensors", *args.out.glob("latents-*.safetensors")]:
        old.unlink(missing_ok=True)  # the prompts first and written last: without them the folder does not open
    meta = {"K": list(K_SQUARE), "size": [args.size] * 2, "fps": FPS, "frames": args.frames, "vae": str(args.vae),
            "vae_fingerprint": known_as}
    for start in tqdm(range(0, args.count, 512), "encode"):
        rows = slice(start, min(start + 512, args.count))
        with torch.no_grad():
            latents = torch.cat([vae.encode(v.float() / 127.5 - 1)[0] for v in video[rows].split(16)])
        shard = {"latents": latents.half(), "viewmats": viewmats[rows], "prompt_ids": torch.arange(args.count)[rows],
                 "Ks": K.expand(len(latents), args.frames, 3, 3)}
        save_shard(args.out / f"latents-{start:06d}.safetensors", shard, {"meta": json.dumps(meta)})
    embeds = torch.stack([encode_words(prompt) for prompt in [*prompts, ""]])
    save_shard(args.out / "prompts.safetensors", {"embeds": embeds.half()}, {"prompts": json.dumps(prompts)})


if __name__ == "__main__":
    try:
        main(parse_args())
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
