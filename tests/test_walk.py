"""
A walk, step by step: what is seen stays whatever comes after it, a file grows as frames are made, and what the process
holds does not grow with the length of the path.
"""
import os
import signal
import time

import imageio.v3 as imageio
import numpy as np
import pytest
import torch

import stream as stream_module
from conftest import FORKS
from data import K_SQUARE, intrinsics, load_encoder, parse_trajectory
from helpers import CPU, fitted_vae, make_net, random_hy_dit
from model import PRESETS, Camera, WanDiT, commit, next_chunk, start_stream
from stream import TOY_PROMPT, Player, open_stream, settle, step, stream, walk, write_video

META = {"size": [32, 32], "fps": 16, "frames": 4, "K": K_SQUARE, "camera": True, "given_prob": 0.0, "chunk": 2,
        "shift": 3.0, "sampler": "few_step", "sampling_steps": 2, "guidance": 1.0}
SAMPLERS = {"euler": {"sampler": "euler", "guidance": 2.0}, "few_step": {}}


@torch.no_grad()
def make_player(preset, **changes):
    """Random weights of a useful size everywhere, in a network of the preset's channels and prompts."""
    torch.manual_seed(0)
    if preset == "tiny":
        net = WanDiT(PRESETS["tiny"].dit)
        for name, p in net.named_parameters():
            p.normal_(std=0.3 if p.ndim == 1 or name.endswith("modulation") else p[0].numel() ** -0.5)
    else:
        net = random_hy_dit(**vars(PRESETS["tiny-hy"].dit))
    return Player(net.requires_grad_(False), fitted_vae(preset), load_encoder(preset, None, CPU), META | changes)


def camera_along(path):
    viewmats = parse_trajectory(path)
    return Camera(viewmats[None], intrinsics(K_SQUARE).expand(1, len(viewmats), 3, 3))


def watch(player, path, seed=0):
    return torch.cat([*stream(player, [TOY_PROMPT], camera_along(path), [seed])], dim=2)


@pytest.mark.parametrize("changes", SAMPLERS.values(), ids=SAMPLERS)
@pytest.mark.parametrize("preset", ("tiny", "tiny-hy"))
def test_a_longer_path_begins_with_the_same_video(preset, changes):
    player = make_player(preset, **changes)
    short, longer, other = (watch(player, path) for path in ("w*3", "w*3,l*2,s*2", "w*3,j*4"))
    assert short.shape[2] == 13 and longer.shape[2] == 29
    assert torch.equal(longer[:, :, :13], short) and torch.equal(other[:, :, :13], short)
    assert not torch.equal(longer[:, :, 13:], other[:, :, 13:]) and not torch.equal(watch(player, "w*3", 1), short)


@pytest.mark.parametrize("changes", SAMPLERS.values(), ids=SAMPLERS)
@pytest.mark.parametrize("preset", ("tiny", "tiny-hy"))
def test_steps_make_the_stream_and_a_pose_may_be_decided_before_each(preset, changes):
    player, camera = make_player(preset, **changes), camera_along("w*3,l*2")
    expected, seen = watch(player, "w*3,l*2"), []
    for early in (False, True):
        state = open_stream(player, [TOY_PROMPT], [0])
        for start in range(0, 6, 2):
            video, state = step(player, state, camera.frames(slice(start, start + 2)))
            seen.append(video)
            if early:  # as while waiting for a key
                state = settle(player, state)
                assert state.finished is None and settle(player, state) is state
        assert torch.equal(torch.cat(seen, dim=2), expected)
        seen.clear()


def test_a_chunk_draws_from_each_videos_own_generator_level_after_level():
    net, drawn = make_net(0).requires_grad_(False), []
    prompt, camera = torch.randn(2, 6, 24), Camera(*(z.expand(2, *z.shape[1:]) for z in camera_along("w")))
    rng = [torch.Generator().manual_seed(seed) for seed in (3, 4)]
    state = start_stream(net, META, rng, (4, 4, 4), [prompt], CPU)
    watched = lambda x_t, *rest, **past: drawn.append(x_t) or torch.zeros_like(x_t)
    next_chunk(watched, META, state, [prompt], camera)
    own = torch.Generator().manual_seed(4)
    first, again = (torch.randn(2, 4, 4, 4, generator=own) for _ in range(2))
    torch.testing.assert_close(drawn[0][1], first)
    torch.testing.assert_close(drawn[1][1], 0.25 * first + 0.75 * again)  # at shift 3, half-way is 0.75


def test_nothing_comes_after_a_bidirectional_video():
    player = make_player("tiny", chunk=0)
    _, state = step(player, open_stream(player, [TOY_PROMPT], [0]), camera_along("w*3"))
    with pytest.raises(ValueError, match="bidirectional"):
        step(player, state, camera_along("w"))
    with pytest.raises(ValueError, match="bidirectional"):
        commit(player.net, player.meta, state.latents, *state.finished[:1], state.prompts, state.finished[1])


# ---------------------------------------------------------------------------------------------------------------- Files


def endless_film(path, numbers):
    os.setsid()

    def film():
        rng = np.random.default_rng(0)
        while True:
            time.sleep(0.01)
            yield rng.integers(0, 255, (8, 64, 64, 3), dtype=np.uint8)
            numbers.value += 8

    write_video(path, film(), 16)


def test_a_killed_walk_leaves_what_it_made(tmp_path):
    numbers = FORKS.Value("i", 0)
    process = FORKS.Process(target=endless_film, args=(tmp_path / "walk.mp4", numbers))
    process.start()
    while numbers.value < 200:
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGKILL)  # the encoder, too
    process.join()
    assert not (tmp_path / "walk.mp4").exists()
    frames = [*imageio.imiter((tmp_path / "walk.mp4.tmp").rename(tmp_path / "half.mp4"))]
    assert len(frames) > 100 and {frame.shape for frame in frames} == {(64, 64, 3)}


def test_a_film_that_ends_early_is_a_whole_file(tmp_path):
    def film():
        for _ in range(3):
            yield np.zeros((4, 32, 32, 3), dtype=np.uint8)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_video(tmp_path / "walk.mp4", film(), 16)
    assert len([*imageio.imiter(tmp_path / "walk.mp4")]) == 12


def test_a_film_that_does_not_start_leaves_what_was_there(tmp_path):
    def film():
        raise ValueError("no such path")
        yield

    for name in ("walk.mp4", "walk.gif"):
        (tmp_path / name).write_text("mine")
        with pytest.raises(ValueError, match="no such path"):
            write_video(tmp_path / name, film(), 16)
        assert (tmp_path / name).read_text() == "mine"


def test_a_film_that_cannot_be_written_names_its_file(tmp_path):
    (tmp_path / "walk.mp4").mkdir()
    film = (np.zeros((4, 32, 32, 3), dtype=np.uint8) for _ in range(1000))  # more than a pipe holds
    with pytest.raises(ValueError) as error:
        write_video(tmp_path / "walk.mp4", film, 16)
    message = str(error.value)
    assert message.startswith(f"{tmp_path / 'walk.mp4'}: could not be written (") and "\n" not in message


@pytest.mark.parametrize("steps, every, shown", ((4, 4, 5), (15, 4, 16), (16, 8, 9), (100, 28, 15)))
def test_a_walk_keeps_the_frames_of_its_sheet_alone(tmp_path, monkeypatch, capsys, steps, every, shown):
    """Whatever their number: frame n of the film is of brightness n, and so is what the sheet has of it."""
    video, sheets = torch.arange(1 + 4 * steps).view(1, 1, -1, 1, 1).expand(1, 3, -1, 32, 32) / 256 - 1, []
    pieces = lambda *_: iter([video[:, :, :5], *video[:, :, 5:].split(8, dim=2)])
    monkeypatch.setattr(stream_module, "stream", pieces)
    monkeypatch.setattr(stream_module, "write_sheet", lambda path, videos, every: sheets.append((videos, every)))
    player = Player(None, None, None, META | {"frames": 200})
    args = stream_module.parse_args([])
    path = stream_module.CameraPath(parse_trajectory(f"w*{steps}"))
    walk(args, player, path, TOY_PROMPT, tmp_path / "walk.mp4")
    (truth, kept), again = sheets[0]
    assert again == 1 and torch.equal(kept, video[:, :, ::every]) and truth.shape == kept.shape == (1, 3, shown, 32, 32)
    assert len([*imageio.imiter(tmp_path / "walk.mp4")]) == 1 + 4 * steps
    assert f"every {'fourth' if every == 4 else f'{every}th'} of them" in capsys.readouterr().out
