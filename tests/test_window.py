"""
A walk without end: what is left of a cache when its window moves on, that it is the cache of a video that never had the
frames between, that no error and no memory grows with the length of the path, and a prompt that changes on the way.
"""
import math
from dataclasses import replace

import imageio.v3 as imageio
import pytest
import torch

from conftest import ROOT, call, refusal
from data import K_SQUARE, intrinsics, load_encoder, rotation
from helpers import CPU, fitted_vae, hy_inputs, random_hy_dit, rigid
from model import (
    PRESETS, Camera, DiTConfig, KVCache, WanDiT, action_labels, commit, invert_se3, move_piece, move_window, prefill,
    reread, rolling_cache, rollout, start_stream, update_cache,
)
from stream import TOY_PROMPT, Player, held_bytes, open_stream, parse_args, step, with_flags

BACKBONES = ("wan", "hy")
META = {"frames": 8, "camera": True, "chunk": 2, "shift": 3.0, "sampler": "few_step", "sampling_steps": 2,
        "guidance": 1.0, "given_prob": 0.0, "size": [32, 32]}
WINDOWS = [(6, 0), (5, 1), (8, 3), (4, 2), (6, 1)]  # whole chunks and parts of them; (4, 2): the sink alone


@torch.no_grad()
def make(backbone, layers, dtype=torch.float32):
    """A network with weights of a useful size."""
    if backbone == "hy":
        return random_hy_dit(layers=layers).to(dtype)
    torch.manual_seed(0)
    net = WanDiT(DiTConfig(32, 48, 2, layers, channels=4, text_dim=24, freq_dim=32))
    for p in net.parameters():
        torch.nn.init.normal_(p, std=0.3 if p.ndim == 1 else p[0].numel() ** -0.5)
    return net.requires_grad_(False).to(dtype)


def near_path(f, b=2, speed=0.1):
    """Poses [b f 4 4] of a camera that goes on and turns, a little differently in each video, from the identity on."""
    poses, pose = [], torch.eye(4).double().repeat(b, 1, 1)
    for n in range(f):
        poses.append(invert_se3(pose))
        move = torch.eye(4).double().repeat(b, 1, 1)
        for i in range(b):
            move[i, :3, :3] = rotation(torch.tensor(0.05 * (1 + i)), torch.tensor(0.03 * math.sin(n))).double()
            move[i, :3, 3] = torch.tensor([0.02 * i, 0.01, speed])
        pose = pose @ move
    return torch.stack(poses, dim=1).float()


def inputs(backbone, f, b=2, given=0):
    """Clean latents, prompt and camera of a path."""
    Ks = torch.tensor([[0.6, 0, 0.5], [0, 0.9, 0.5], [0, 0, 1]]).expand(b, f, 3, 3)
    if backbone == "hy":
        x0, _, prompt, _, _ = hy_inputs(f, b=b, given=given)
    else:
        torch.manual_seed(1)
        x0, prompt = torch.randn(b, f, 4, 4, 4), torch.randn(b, 6, 24)
    return x0, prompt, Camera(near_path(f, b), Ks)


def walked(net, meta, x0, prompt, camera):
    """The state after these frames, chunk by chunk."""
    rng = [torch.Generator().manual_seed(n) for n in range(len(x0))]
    state, chunk = start_stream(net, meta, rng, x0.shape[2:], [prompt], CPU), meta["chunk"]
    for start in range(0, x0.shape[1], chunk):
        frames = slice(start, start + chunk)
        state = commit(net, meta, state, x0[:, frames], [prompt], camera.frames(frames))
    return state


def joined(pieces):
    return [torch.cat(z, dim=2) for z in zip(*pieces, strict=True)]


def same_cache(a, b, **near):
    for some, others in zip(a.layers, b.layers, strict=True):
        for z, w in zip(joined(some), joined(others), strict=True):
            torch.testing.assert_close(z, w, **near)


NEAR = dict(atol=2e-5, rtol=1e-4)

# ------------------------------------------------------------------------------------------------------- What is cached


@pytest.mark.parametrize("backbone", BACKBONES)
def test_a_window_that_all_fits_into_changes_nothing(backbone):
    net, (x0, prompt, camera) = make(backbone, 2), inputs(backbone, 8)

    def video(**changes):
        rng = [torch.Generator().manual_seed(n) for n in range(2)]
        return torch.cat([*rollout(net, META | changes, rng, x0.shape[1:], prompt, prompt, camera)], dim=1)

    assert torch.equal(video(window=8, sink=1), video()) and torch.equal(video(window=0, sink=1), video())
    assert not torch.equal(video(window=6, sink=1), video())


@pytest.mark.parametrize("window, sink", WINDOWS)
@pytest.mark.parametrize("backbone", BACKBONES)
def test_a_moved_window_is_a_cache_of_the_kept_frames_alone(backbone, window, sink):
    """In a network of one block, where no key depends on another: positions from 0 on, cameras seen from the origin."""
    net, (x0, prompt, camera), meta = make(backbone, 1), inputs(backbone, 16), META | {"window": window, "sink": sink}
    state, recent = walked(net, meta, x0[:, :14], prompt, camera.frames(slice(0, 14))), window - sink - 2
    moved, = state.kv_caches
    first, latest = slice(0, sink), slice(14 - recent, 14)
    origin = camera.viewmats[:, 14 - recent if recent else 13]
    near = camera.seen_from(origin)
    assert torch.equal(moved.origin, origin) and (moved.frames, moved.position) == (14, sink + recent)

    fresh = prefill(net, x0, prompt, camera)
    for frames in (first, latest):
        if frames.start > 0:  # of the second backbone, for the label of the step that leads there
            fresh = fresh._replace(last_pose=near.viewmats[:, frames.start - 1])
        fresh = update_cache(net, x0[:, frames], prompt, near.frames(frames), fresh)
    same_cache(moved, fresh, **NEAR)
    kept = torch.cat([z.x0 for z in state.past], dim=1) if state.past else x0[:, :0]
    assert torch.equal(kept, torch.cat([x0[:, first], x0[:, latest]], dim=1))
    if backbone == "hy":
        assert all(torch.equal(z.last_pose, camera.viewmats[:, z.start - 1]) for z in state.past if z.start > 0)

    x_t, sigma, here = x0[:, 14:], torch.full((2, 2), 0.7), slice(14, 16)
    fresh = fresh._replace(last_pose=near.viewmats[:, 13])
    seen = net(x_t, sigma, prompt, camera.frames(here), kv_cache=moved)
    torch.testing.assert_close(seen, net(x_t, sigma, prompt, near.frames(here), kv_cache=fresh), **NEAR)


@pytest.mark.parametrize("backbone", BACKBONES)
def test_keys_move_by_the_formula(backbone):
    """In a deep network, on the keys and values that were stored; twice, with half a chunk between."""
    net, (x0, prompt, camera) = make(backbone, 3), inputs(backbone, 10)
    whole = walked(net, META, x0, prompt, camera).kv_caches[0]
    tokens, P = whole.layers[0][0][0].shape[2] // 2, camera.viewmats.double()
    once = move_window(net, whole, tokens, 1, 6, P[:, 4].float())
    twice = move_window(net, once, tokens, 1, 3, P[:, 7].float())
    hd, (time, *_) = whole.layers[0][0][0].shape[-1], net.cfg.rope_bands
    speed = net.rope_theta ** -(torch.arange(0, time, 2).double() / time)
    for before, after in zip(whole.layers, twice.layers, strict=True):
        before, after = (joined([tuple(z.double() for z in piece) for piece in pieces]) for pieces in (before, after))
        for name, old, new in zip("k v k' v'".split(), before, after, strict=True):
            for n, frame, moved_by in ((0, 0, 0), (1, 7, -6), (2, 8, -6), (3, 9, -6)):
                z = old[:, :, frame * tokens : (frame + 1) * tokens]
                if name == "k":
                    angle = (moved_by * speed)[:, None]
                    a, b = z[..., 0:time:2, None], z[..., 1:time:2, None]
                    turned = torch.cat([a * angle.cos() - b * angle.sin(), a * angle.sin() + b * angle.cos()], dim=-1)
                    z = torch.cat([turned.flatten(-2), z[..., time:]], dim=-1)
                elif name in ("k'", "v'"):
                    z = torch.einsum("bij,bnsgj->bnsgi", P[:, 7], z.unflatten(-1, (hd // 4, 4))).flatten(-2)
                torch.testing.assert_close(new[:, :, n * tokens : (n + 1) * tokens], z, atol=1e-5, rtol=1e-5)


def test_what_moves_in_bf16_is_rounded_once():
    net, change = make("wan", 1), torch.eye(4).repeat(2, 1, 1)
    change[:, :3, :3], change[:, :3, 3] = rigid(2)[:, :3, :3], 100.3 * torch.randn(2, 3)
    piece = [torch.randn(2, 2, 8, 16).bfloat16() for _ in range(4)]
    exact, found = (move_piece(net, [z.to(dtype) for z in piece], -5, change)
                    for dtype in (torch.double, torch.bfloat16))
    for z, w in zip(exact, found, strict=True):
        assert ((w.double() - z).abs() <= 2**-8 * z.abs() + 1e-4).all()


@pytest.mark.parametrize("camera_on", (True, False))
def test_without_a_sink_a_moved_window_makes_the_video_of_absolute_positions(camera_on):
    """Only how far frames are from each other counts, in a deep network, too, and over many chunks."""
    net, (x0, prompt, camera) = make("wan", 2), inputs("wan", 40)
    videos = []
    for absolute in (False, True):
        rng = [torch.Generator().manual_seed(n) for n in range(2)]
        meta = META | {"window": 6, "sink": 0, "absolute_positions": absolute, "camera": camera_on}
        videos.append(torch.cat([*rollout(net, meta, rng, x0.shape[1:], prompt, prompt, camera)], dim=1))
    torch.testing.assert_close(*videos, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("window, sink", WINDOWS)
def test_the_public_window_is_cut_and_nothing_else(window, sink):
    net, (x0, prompt, camera), recent = make("wan", 2), inputs("wan", 14), window - sink - 2
    meta = META | {"window": window, "sink": sink, "absolute_positions": True}
    found, = walked(net, meta, x0, prompt, camera).kv_caches
    kv_cache = prefill(net, x0, prompt, camera)
    for start in range(0, 14, 2):
        frames = slice(start, start + 2)
        kv_cache = update_cache(net, x0[:, frames], prompt, camera.frames(frames), kv_cache)
        kv_cache = rolling_cache(kv_cache, 4, sink, recent)
    assert (found.frames, found.evicted, found.origin) == (14, 0, None)
    same_cache(found, kv_cache, atol=0, rtol=0)


@pytest.mark.parametrize("window, sink", WINDOWS)
@pytest.mark.parametrize("backbone", BACKBONES)
def test_every_pass_of_a_public_rollout_sees_the_cache_cut_for_its_chunk(backbone, window, sink):
    net, (x0, prompt, camera), calls = make(backbone, 2), inputs(backbone, 10), []
    null = prompt.flip(0) if backbone == "wan" else prompt._replace(text=prompt.text.flip(0))

    def watched(x_t, sigma, text, here, kv_cache, update_cache=False):
        calls.append((x_t, sigma, text, here, kv_cache, update_cache))
        return net(x_t, sigma, text, here, kv_cache=kv_cache, update_cache=update_cache)

    watched.cfg = net.cfg
    meta = META | {"window": window, "sink": sink, "absolute_positions": True, "guidance": 2.0}
    for each in (prompt, null):  # both have a cache; one call after the other
        calls.clear()
        rng = [torch.Generator().manual_seed(n) for n in range(2)]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("model.prefill", lambda _, *rest: prefill(net, *rest))
            [*rollout(watched, meta, rng, x0.shape[1:], prompt, null, camera)]
        tokens, kv_cache = x0.shape[3] * x0.shape[4] // net.cfg.patch**2, prefill(net, x0, each, camera)
        own = [call for call in calls if call[2] is each]
        assert len(own) == 5 * 2 + 4
        for x_t, sigma, text, here, seen, joins in own:
            rolled = rolling_cache(kv_cache, tokens, sink, window - sink - 2)
            same_cache(seen, rolled, atol=0, rtol=0) if kv_cache.frames else None
            assert seen.frames == rolled.frames
            if joins:
                kv_cache = net(x_t, sigma, text, here, kv_cache=rolled, update_cache=True)


def test_a_path_moved_as_a_whole_is_the_same_video():
    net, (x0, prompt, camera) = make("wan", 2), inputs("wan", 20)
    moved, videos = camera._replace(viewmats=camera.viewmats @ rigid(2)[:, None]), []
    for path in (camera, moved):
        rng = [torch.Generator().manual_seed(n) for n in range(2)]
        meta = META | {"window": 5, "sink": 1}
        videos.append(torch.cat([*rollout(net, meta, rng, x0.shape[1:], prompt, prompt, path)], dim=1))
    torch.testing.assert_close(*videos, atol=1e-3, rtol=1e-3)


def test_actions_and_what_was_given_are_told_by_the_whole_walk(monkeypatch):
    """Not by a position or a camera that moved: the first frame of a window is no first frame of a video."""
    import model
    net, (x0, prompt, camera), labels = make("hy", 1), inputs("hy", 12, given=2), []
    monkeypatch.setattr(model, "action_labels", lambda *z: labels.append(action_labels(*z)) or labels[-1])
    state = walked(net, META | {"window": 4, "sink": 0}, x0, prompt, camera)
    assert torch.equal(torch.cat(labels, dim=1), action_labels(camera.viewmats))
    free = prompt._replace(given_latents=prompt.given_latents[:, :0])
    at, here = torch.full((2, 2), 0.5), camera.frames(slice(10, 12))
    told = [net(x0[:, 10:], at, text, here, kv_cache=state.kv_caches[0]) for text in (prompt, free)]
    assert torch.equal(*told)


# --------------------------------------------------------------------------------------------------- What does not grow


def circle(f):
    """Poses [1 f 4 4] on a circle of three units across, 60 frames round."""
    return torch.stack([invert_se3(at(2 * math.pi * n / 60)) for n in range(f)])[None]


def straight(f):
    viewmats = torch.eye(4).repeat(1, f, 1, 1)
    viewmats[..., 2, 3] = -0.08 * torch.arange(f)
    return viewmats


def at(angle):
    pose = torch.eye(4)
    pose[:3, :3] = rotation(torch.tensor(angle), torch.tensor(0.0))
    pose[:3, 3] = torch.tensor([1.5 - 1.5 * math.cos(angle), 0, 1.5 * math.sin(angle)])
    return pose


@pytest.mark.slow
@pytest.mark.parametrize("path, sink", ((circle, 2), (straight, 0)))
@pytest.mark.parametrize("backbone", BACKBONES)
def test_no_error_grows_in_bf16_over_a_thousand_frames(backbone, path, sink):
    """Against fp32 of the same weights, inputs and window."""
    f, chunk = 1000, 4
    viewmats, meta = path(f), META | {"window": 16, "sink": sink, "chunk": chunk}
    (x0, prompt, _), errors = inputs(backbone, 12, b=1), []
    x0 = x0[:, torch.arange(f) % 12]
    camera = Camera(viewmats, torch.tensor([[0.6, 0, 0.5], [0, 0.9, 0.5], [0, 0, 1]]).expand(1, f, 3, 3))
    nets = [make(backbone, 1, dtype) for dtype in (torch.float32, torch.bfloat16)]
    nets[0].load_state_dict({name: w.float() for name, w in nets[1].state_dict().items()})
    states = [start_stream(net, meta, [None], x0.shape[2:], [prompt], CPU) for net in nets]
    sigma = torch.full((1, chunk), 0.7)
    for start in range(0, f, chunk):
        frames = slice(start, start + chunk)
        here = camera.frames(frames)
        exact, rounded = (net(x0[:, frames].flip(1), sigma, prompt, here, kv_cache=state.kv_caches[0])
                          for net, state in zip(nets, states, strict=True))
        errors.append(((rounded - exact).norm() / exact.norm()).item())
        states = [commit(net, meta, state, x0[:, frames], [prompt], here)
                  for net, state in zip(nets, states, strict=True)]
    first, last = (sum(z) / len(z) for z in (errors[4:19], errors[-15:]))  # a round each, from a full window on
    assert first < 0.02 and last < 1.1 * first


@pytest.mark.slow
@pytest.mark.parametrize("changes", ({}, {"absolute_positions": True}), ids=("moved", "absolute"))
@pytest.mark.parametrize("preset", ("tiny", "tiny-hy"))
def test_what_is_held_is_as_much_after_fifty_times_the_trained_length(preset, changes):
    dit = replace(PRESETS[preset].dit, layers=1)
    if preset == "tiny-hy":
        net = random_hy_dit(**vars(dit))
    else:
        net = WanDiT(dit).requires_grad_(False)
        net.init_weights()
    meta = META | {"window": 8, "sink": 1, "sampling_steps": 1} | changes
    player = Player(net, fitted_vae(preset), load_encoder(preset, None, CPU), meta)
    state, held = open_stream(player, [TOY_PROMPT], [0]), {}
    camera = Camera(circle(400), intrinsics(K_SQUARE).expand(1, 400, 3, 3))
    for start in range(0, 400, 2):
        video, state = step(player, state, camera.frames(slice(start, start + 2)))
        held[start + 2] = held_bytes(state)
    assert held[16] == held[80] == held[400] and video.isfinite().all()


# ------------------------------------------------------------------------------------------------------------- A prompt


@pytest.mark.parametrize("backbone", BACKBONES)
def test_a_window_read_again_for_the_same_prompt_is_the_same(backbone):
    net, (x0, prompt, camera) = make(backbone, 2), inputs(backbone, 8, given=1)
    state = walked(net, META, x0, prompt, camera)
    again = reread(net, META, state, [prompt])
    same_cache(again.kv_caches[0], state.kv_caches[0], atol=1e-6, rtol=1e-6)
    assert again.kv_caches[0]._replace(layers=[], text=None, last_pose=None) == KVCache(8, [])


@pytest.mark.parametrize("absolute", (False, True), ids=("moved", "absolute"))
@pytest.mark.parametrize("window, sink", WINDOWS)
@pytest.mark.parametrize("backbone", BACKBONES)
def test_a_moved_window_read_again_is_where_it_was(backbone, window, sink, absolute):
    """One block, where what was evicted left no trace. And it goes on as if nothing had happened."""
    net, (x0, prompt, camera) = make(backbone, 1), inputs(backbone, 18, given=3)
    meta = META | {"window": window, "sink": sink, "absolute_positions": absolute}
    state = walked(net, meta, x0[:, :14], prompt, camera.frames(slice(0, 14)))
    again = reread(net, meta, state, [prompt])
    for start in (14, 16, None):
        for old, new in zip(state.kv_caches, again.kv_caches, strict=True):
            same_cache(new, old, **NEAR)
            assert (new.frames, new.evicted) == (old.frames, old.evicted)
            assert all(a is b or torch.equal(a, b)
                       for a, b in ((new.origin, old.origin), (new.last_pose, old.last_pose)))
        if start:
            frames = slice(start, start + 2)
            state, again = (commit(net, meta, z, x0[:, frames], [prompt], camera.frames(frames))
                            for z in (state, again))


@pytest.mark.parametrize("backbone", BACKBONES)
def test_a_window_read_again_for_another_prompt_is_as_if_made_for_it(backbone):
    net, (x0, prompt, camera) = make(backbone, 2), inputs(backbone, 6)
    other = prompt.flip(0) if backbone == "wan" else prompt._replace(text=prompt.text.flip(0))
    state = walked(net, META, x0, prompt, camera)
    again, fresh = reread(net, META, state, [other]), walked(net, META, x0, other, camera)
    same_cache(again.kv_caches[0], fresh.kv_caches[0], atol=1e-6, rtol=1e-6)
    x_t, sigma, here = x0[:, :2], torch.full((2, 2), 0.7), camera.frames(slice(4, 6))
    seen = [net(x_t, sigma, text, here, kv_cache=z.kv_caches[0]) for text, z in ((other, again), (other, fresh))]
    torch.testing.assert_close(*seen, atol=1e-5, rtol=1e-5)
    assert (seen[0] - net(x_t, sigma, prompt, here, kv_cache=state.kv_caches[0])).abs().max() > 1e-2


# -------------------------------------------------------------------------------------------------------------- Flags


@pytest.mark.parametrize("flags, found", [
    (("--window", "-1"), "--window -1"), (("--sink", "-1"), "--sink -1"),
    (("--sink", "1"), "--sink: of use with --window"), (("--absolute-positions",), "of use with --window"),
    (("--window", "2", "--sink", "2"), "--window 2: too short for --sink 2 and chunks of 1"),
    (("--window", "4", "--ckpt", ROOT / "ckpt/tiny/camera.pt"), "bidirectional"),
])
def test_a_window_without_room_is_refused(tmp_path, flags, found):
    (tmp_path / "walk.mp4").write_text("mine")
    assert found in refusal("stream.py", "--ckpt", ROOT / "ckpt/tiny/dmd.pt", *flags, cwd=tmp_path)
    assert (tmp_path / "walk.mp4").read_text() == "mine"


def test_what_a_released_student_reads_wrongly_is_not_moved():
    flags = ["--released-cache", "--window", "6"]
    with pytest.raises(ValueError, match="--released-cache"):
        with_flags(META, parse_args(flags))
    assert with_flags(META, parse_args([*flags, "--absolute-positions"]))["absolute_positions"]


@pytest.mark.slow
@pytest.mark.parametrize("world", ("tiny", "tiny-hy"))
def test_a_walk_past_its_training_says_so_once(tmp_path, capsys, world):
    flags = ("--ckpt", ROOT / f"ckpt/{world}/dmd.pt", "--camera", "l*11", "--sampling-steps", "1")
    films = []
    for name, more in (("all", ()), ("window", ("--window", "6", "--sink", "1")),
                       ("absolute", ("--window", "6", "--sink", "1", "--absolute-positions"))):
        call("stream.py", *flags, *more, "--out", tmp_path / f"{name}.mp4", cwd=tmp_path)
        said = capsys.readouterr().err
        assert said.count("the path has 12 latent frames, trained were 8") == 1
        assert ("a window of 6 goes along" in said) == bool(more)
        films.append(torch.from_numpy(imageio.imread(tmp_path / f"{name}.mp4")).float())
    assert all(film.shape == (45, 256, 256, 3) for film in films)
    assert all((a[:13] - b[:13]).abs().mean() < 1 < (a[-8:] - b[-8:]).abs().mean()
               for a, b in ((films[0], films[1]), (films[1], films[2])))
