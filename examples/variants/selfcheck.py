"""
Did this chunk obey? A network's own answer, and how sure it may be of it (after arXiv:2412.14660).

in:  --player, a causal checkpoint that makes the chunks; --judge, one that is asked, by default the player itself
out: a table on stdout, and selfcheck.png, two reliability diagrams: as it is, and after temperature scaling

The player walks through held-out rooms. Of each chunk x the judge says, for the command and for seven other motions of
the camera, how likely x is after the chunks before it; p is its belief in the command:

    l_k = - mean over sigma, noise of || v(x_t, sigma, camera_k) - (noise - x) ||^2          p = softmax(l / T)_0

Levels and noise are shared by all k. The others: three rooms' motions of the same moment, and four that are hard to
tell from the command: at half the speed, a frame late, without its turn, without its move. Where one of them is the
command itself, it is not asked about. T = 1 / (the chunk's numbers / 2) is the likelihood of Gaussians, and far too
sure; the other T is fitted to one half of the rooms (least negative log-likelihood) and used on the other half.

The truth is read off the picture, and no network has a say in it: a chunk obeyed if the camera, from the last frame
before it to its own last, moved within 1.5 degrees and 0.04 units of the command, half of what a key does (stream.py's
find_pose). Where in the room it is by then is not asked: what a chunk inherits from a past that has strayed is not its
own fault, and the judge, who sees that past, does not hold it against it. A frame that no view of the room explains by
13 dB is seen from nowhere: poses are sought from the command on, and noise would obey. How often the true room obeys,
through the VAE, is printed beside: what is missing there is the reading's own mistake, on true pictures. So is the
label's floor, how often the true first frame does, held, and noise. ± is the standard error, by drawing anew from the
rooms of the second half.

The floor of a judge is one belief for all chunks, how often the first half's obeyed; AUROC is how often it believes
more in a chunk that obeyed than in one that did not. A player that always obeys says nothing about its judge: train one
for a tenth of the steps, too. And there are questions without an answer: paths three times as fast as in training,
prompts of words that it never saw. Their p is printed beside; a judge that knows its limits refuses them.

$ PYTHONPATH=. python examples/variants/selfcheck.py --player ckpt/tiny/dmd.pt --judge ckpt/tiny/ar.pt
"""
import argparse
import math
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import imageio.v3 as imageio
import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from data import (
    HelpFormatter, Scene, between_poses, cast, explain, from_bytes, intrinsics, load_encoder, mix, paint,
    parse_trajectory, positive, sample_toy,
)
from model import Camera, StreamState, add_noise, commit, invert_se3, load_net, load_vae, next_chunk, start_stream
from stream import Player, encode_prompts, film_truth, find_pose, pose_error

LEVELS = (0.5, 0.75, 0.9)
ALTERNATIVES = ("command", "half", "late", "no turn", "no move", "other 1", "other 2", "other 3")


def alternatives(viewmats: Tensor, start: int, stop: int) -> Tensor:
    """viewmats [b f 4 4] -> what frames start .. stop - 1 could have been commanded [8 b n 4 4], as ALTERNATIVES, after
    the frame before; NaN where it is the command."""
    c2w = invert_se3(viewmats.double())
    before, now = c2w[:, start - 1 : start], c2w[:, start:stop]
    half = between_poses(before.expand_as(now), now, torch.full(now.shape[:2], 0.5, dtype=torch.float64))
    late = c2w[:, start - 1 : stop - 1]
    no_turn, no_move = now.clone(), now.clone()
    no_turn[..., :3, :3] = before[..., :3, :3]
    no_move[..., :3, 3] = before[..., :3, 3]
    motion = invert_se3(before) @ now
    others = [before @ motion.roll(n, 0) for n in (1, 2, 3)]
    found = torch.stack([now, half, late, no_turn, no_move, *others])
    same = (found - now).abs().amax((2, 3, 4), keepdim=True) < 1e-3
    same[0] = False
    return torch.where(same, torch.nan, invert_se3(found)).float()


@torch.no_grad()
def beliefs(judge: Player, state: StreamState, prompts: list, x0: Tensor, Ks: Tensor, views: Tensor,
            rng: torch.Generator, draws: int) -> Tensor:
    """Log-likelihoods, but for a factor, of a chunk x0 [b n c h w] under cameras views [8 b n 4 4] -> [8 b], -inf where
    they are NaN. state: the judge's stream before the chunk."""
    total = torch.zeros(views.shape[:2])
    for level in LEVELS:
        for _ in range(draws):
            noise = torch.randn(x0.shape, generator=rng).to(x0)
            sigma = torch.full(x0.shape[:2], level, device=x0.device)
            x_t = add_noise(x0, noise, sigma)
            for k, view in enumerate(views):
                camera = Camera(view.nan_to_num().to(x0), Ks)
                v = judge.net(x_t, sigma, prompts[0], camera, kv_cache=state.kv_caches[0])
                total[k] -= (v - (noise - x0)).square().mean((1, 2, 3, 4)).cpu() / (len(LEVELS) * draws)
    return torch.where(views.isnan().flatten(2).any(-1), -torch.inf, total)


@torch.no_grad()
def ask(player: Player, judge: Player, prompts: list[str], scene: Scene | None, viewmats: Tensor, seeds: list[int],
        draws: int) -> tuple[Tensor, Tensor]:
    """Of every chunk but the first: likelihoods [chunks 8 b], and whether it obeyed [chunks b], NaN without a scene."""
    net, vae, _, meta = player
    device = next(net.parameters()).device
    shape = (vae.cfg.z_dim, *(pixels // vae.cfg.stride for pixels in meta["size"]))
    K, (b, f) = intrinsics(meta["K"]), viewmats.shape[:2]
    camera = Camera(viewmats.to(device), K.expand(b, f, 3, 3).to(device))
    states, texts = [], []
    for who, guided in (player, meta["guidance"] != 1), (judge, False):
        pair = encode_prompts(who, prompts, None, None, shape)
        texts.append([*pair] if guided else [pair[0]])
        rng = [torch.Generator().manual_seed(seed) for seed in seeds]
        states.append(start_stream(who.net, who.meta, rng, shape, texts[-1], device))
    noise, found, video = torch.Generator().manual_seed(seeds[0]), [], []
    for start in range(0, f, meta["chunk"]):
        frames = slice(start, min(start + meta["chunk"], f))
        here = camera.frames(frames)
        x0 = next_chunk(net, meta, states[0], texts[0], here)
        video.append(x0)
        if start:
            views = alternatives(viewmats, frames.start, frames.stop)
            found.append(beliefs(judge, states[1], texts[1], x0, here.Ks, views, noise, draws))
        if frames.stop < f:
            states = [commit(who.net, who.meta, state, x0, text, here)
                      for who, state, text in zip((player, judge), states, texts, strict=True)]
    if scene is None:
        return torch.stack(found), torch.full((len(found), b), torch.nan)
    pixels = vae.decode(torch.cat(video, dim=1))[0].clamp(-1, 1).cpu()
    return torch.stack(found), obeys(pixels, scene, viewmats, K, meta["chunk"])


def obeys(video: Tensor, scene: Scene, viewmats: Tensor, K: Tensor, chunk: int) -> Tensor:
    """Did the camera of every chunk but the first of a video [b 3 t h w] move as viewmats [b f 4 4] say, from the last
    frame before the chunk to its own last? 1 or 0 [chunks b]."""
    f = viewmats.shape[1]
    ends = torch.tensor([min(start + chunk, f) - 1 for start in range(0, f, chunk)])
    _, inks, _ = explain(video, scene, viewmats, K)
    pictures = video[:, :, 4 * ends]
    found = find_pose(pictures, scene._replace(inks=inks), viewmats[:, ends], K)  # c2w [b n 4 4]
    view = paint(cast(scene.pillars, invert_se3(found), K, video.shape[-1]), scene.colours, inks)
    told = (view - pictures).square().mean((1, 3, 4)) < 4 / 10**1.3  # 13 dB, of a range of 2
    motion = lambda c2w: invert_se3(c2w[:, :-1]) @ c2w[:, 1:]
    degrees, units = pose_error(motion(found), motion(invert_se3(viewmats[:, ends])))
    return ((degrees < 1.5) & (units < 0.04) & told[:, :-1] & told[:, 1:]).float().T


def belief(likelihoods: Tensor, sharpness: float) -> Tensor:
    """l [... 8] -> p of the command [...]; sharpness: 1 / T."""
    return (likelihoods * sharpness).softmax(-1)[..., 0]


def nll(p: Tensor, obeyed: Tensor) -> float:
    """Negative log-likelihood of the answers, in nats."""
    p = p.clamp(1e-6, 1 - 1e-6)
    return -(obeyed * p.log() + (1 - obeyed) * (1 - p).log()).mean().item()


def bins(p: Tensor, obeyed: Tensor, count: int = 10) -> list[tuple[int, float, float]]:
    """Ten equal bins of belief: how many answers, their mean belief, how many of them were right."""
    index = (p * count).long().clamp_max(count - 1)
    chosen = [index == n for n in range(count)]
    return [(int(on.sum()), p[on].mean().item(), obeyed[on].mean().item()) for on in chosen]  # NaN of none


def ece(p: Tensor, obeyed: Tensor) -> float:
    """Expected calibration error: how far belief and truth are apart in a bin, weighted by its answers."""
    return sum(n * abs(believed - right) for n, believed, right in bins(p, obeyed) if n) / len(p)


def auroc(p: Tensor, obeyed: Tensor) -> float:
    """How often a chunk that obeyed is believed more than one that did not, half of a draw. NaN: all did, or none."""
    ahead = p[obeyed == 1][:, None] - p[obeyed == 0]
    return (ahead.sign().mean().item() + 1) / 2


def fit_sharpness(likelihoods: Tensor, obeyed: Tensor, start: float) -> float:
    """1 / T of the least negative log-likelihood, of 200 from `start` down to a hundred-thousandth of it."""
    grid = [start * 10 ** (-5 * n / 199) for n in range(200)]
    return min(grid, key=lambda sharpness: nll(belief(likelihoods, sharpness), obeyed))


def error_at(p: Tensor, obeyed: Tensor, coverage: float) -> float:
    """Share of wrong answers among the surest, when it may say "I don't know" to the others. Of those that are equally
    sure each counts as their mean."""
    confidence, wrong = (p - 0.5).abs(), ((p >= 0.5).float() != obeyed).float()
    _, ties, count = confidence.unique(return_inverse=True, return_counts=True)
    wrong = (torch.zeros(len(count)).scatter_add_(0, ties, wrong) / count)[ties]
    return wrong[confidence.argsort(descending=True)[: max(1, round(coverage * len(p)))]].mean().item()


def with_error(measure: Callable, p: Tensor, obeyed: Tensor) -> str:
    """A measure of beliefs and answers [rooms chunks], ± its spread over 200 draws of as many rooms of these."""
    rng, n = torch.Generator().manual_seed(0), len(p)
    draws = [torch.randint(n, (n,), generator=rng) for _ in range(200)]
    found = torch.tensor([measure(p[rooms].flatten(), obeyed[rooms].flatten()) for rooms in draws])
    return f"{measure(p.flatten(), obeyed.flatten()):.3f} ± {found[~found.isnan()].std():.3f}"


def draw_reliability(found: list[list[tuple[int, float, float]]], path: Path) -> None:
    """Reliability diagrams side by side: bars as high as the share that was right, as dark as there are answers, over
    the line on which belief and truth agree."""
    side, pages = 200, []
    for diagram in found:
        page = np.full((side, side, 3), 255, np.uint8)
        most = max(1, *(n for n, *_ in diagram))
        for i, (n, _, right) in enumerate(diagram):
            if n:
                top = side - max(2, round(right * (side - 1)))
                shade = 215 - round(140 * n / most)
                page[top:, i * 20 + 1 : i * 20 + 19] = (shade, shade, 255)
        for i in range(side):
            page[side - 1 - i, max(0, i - 1) : i + 1] = (220, 60, 60)
        pages.append(np.pad(page, ((8, 8), (8, 8), (0, 0)), constant_values=235))
    imageio.imwrite(path, np.concatenate(pages, axis=1))


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    p.add_argument("--player", type=Path, default=Path("ckpt/tiny/dmd.pt"), help="ar, ode, cd or dmd")
    p.add_argument("--judge", type=Path, help="the same; default: the player")
    p.add_argument("--vae", type=Path, help="default what lies beside the player")
    p.add_argument("--scenes", type=positive, default=128, help="rooms, a multiple of 8; half are fitted to")
    p.add_argument("--draws", type=positive, default=2, help="of noise, at each of three levels")
    p.add_argument("--out", type=Path, default=Path("selfcheck.png"), help="reliability diagrams")
    p.add_argument("--seed", type=int, default=0, help="of the noise")
    p.add_argument("--score-seed", type=int, default=1, help="which rooms and paths")
    args = p.parse_args(argv)
    if args.scenes % 8:
        p.error(f"--scenes {args.scenes}: expected a multiple of 8")
    return args


def main(args: argparse.Namespace) -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    net, meta = load_net(args.player, device, "ar", "ode", "cd", "dmd")
    vae = load_vae(args.vae or args.player.with_name("vae.pt"), device, meta["vae_fingerprint"])
    player = Player(net, vae, load_encoder(meta["preset"], None, device), meta)
    judge = player
    if args.judge:
        judge_net, judge_meta = load_net(args.judge, device, "ar", "ode", "cd", "dmd")
        judge = player._replace(net=judge_net, meta=judge_meta)
        if judge_meta["vae_fingerprint"] != meta["vae_fingerprint"]:
            raise ValueError(f"{args.judge}: reads other latents than {args.player} makes")
    prompts, paths, scene = sample_toy(args.scenes, mix(args.score_seed, 4), meta["frames"] - 1, held=True)
    viewmats = torch.stack([parse_trajectory(path) for path in paths])
    fast = invert_se3(viewmats)
    fast[..., :3, 3] *= 3
    sets = {"held-out rooms": (prompts, scene, viewmats), "three times as fast": (prompts, None, invert_se3(fast)),
            "unseen words": (["a castle of clouds above a violet sea"] * args.scenes, None, viewmats)}
    K, answers, known = intrinsics(meta["K"]), {}, []
    blind = torch.Generator().manual_seed(args.seed)
    for name, (texts, rooms, views) in sets.items():
        parts = []
        for i in tqdm(range(0, args.scenes, 8), name):
            rows, seeds = slice(i, i + 8), [mix(args.seed, 5, n) for n in range(i, i + 8)]
            some = None if rooms is None else Scene(*(z[rows] for z in rooms))
            parts.append(ask(player, judge, texts[rows], some, views[rows], seeds, args.draws))
            if some is not None:
                truth = from_bytes(film_truth(player, some, views[rows]))
                noise = 2 * torch.rand(truth.shape, generator=blind) - 1
                pictures = truth, truth[:, :, :1].expand_as(truth), noise
                known.append(torch.stack([obeys(z, some, views[rows], K, meta["chunk"]).mean() for z in pictures]))
        likelihoods = torch.cat([z.permute(2, 0, 1) for z, _ in parts])  # [rooms chunks 8]
        answers[name] = likelihoods, torch.cat([z.T for _, z in parts])
    likelihoods, obeyed = answers["held-out rooms"]
    fitted, tested = ((likelihoods[n::2], obeyed[n::2]) for n in (0, 1))
    numbers = meta["chunk"] * vae.cfg.z_dim * math.prod(pixels // vae.cfg.stride for pixels in meta["size"])
    plain = numbers / 2
    sharpness = fit_sharpness(fitted[0].flatten(0, 1), fitted[1].flatten(), plain)
    ceiling, *floors = torch.stack(known).mean(0)
    print(f"{args.player} judged by {args.judge or 'itself'}: {obeyed.mean():.2f} of {obeyed.numel()} chunks obeyed, "
          f"of the truth through the VAE {ceiling:.2f}, of its first frame, held, {floors[0]:.2f}, of noise "
          f"{floors[1]:.2f}; 1/T {plain:.4g}, fitted {sharpness:.4g}")
    ways = {"one belief for all": lambda z: fitted[1].mean().expand(z.shape[:-1]),
            "as it is": lambda z: belief(z, plain), "scaled": lambda z: belief(z, sharpness)}
    print("| | ECE | NLL | AUROC | wrong of all, of the surest 80, 50 % | mean p: " + ", ".join(answers) + " |")
    print("|---|---|---|---|---|---|")
    for name, way in ways.items():
        p = way(tested[0])
        wrong = ", ".join(with_error(partial(error_at, coverage=c), p, tested[1]) for c in (1, 0.8, 0.5))
        means = ", ".join(f"{way(z).mean():.2f}" for z, _ in answers.values())
        scores = " | ".join(with_error(measure, p, tested[1]) for measure in (ece, nll, auroc))
        print(f"| {name} | {scores} | {wrong} | {means} |")
    hardest = (likelihoods[..., 1:] > likelihoods[..., :1]).float().mean((0, 1))
    shares = [f"{name} {share:.2f}" for name, share in zip(ALTERNATIVES[1:], hardest.tolist(), strict=True)]
    print("likelier than the command: " + ", ".join(shares))
    beliefs_of = (ways[name](tested[0]).flatten() for name in ("as it is", "scaled"))
    draw_reliability([bins(p, tested[1].flatten()) for p in beliefs_of], args.out)


if __name__ == "__main__":
    try:
        main(parse_args())
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
