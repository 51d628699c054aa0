"""
stream.py on the miniature chain's checkpoints: what it writes, that streaming changes nothing, what it measures and
whether the measures are right (ground truth instead of a model), and what bad input gets.
"""
import json
import math
import threading

import imageio.v3 as imageio
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import stream as script
from conftest import ROOT, SCRIPTS, call, refusal
from data import (
    FILLS, GREY, INKS, K_SQUARE, KEYS, N_PANELS, STEP, cast, encode_words, intrinsics, load_encoder, paint,
    parse_trajectory, pixel_cameras, pressed, read_camera, render, rotation, sample_toy,
)
from model import Camera, guide, invert_se3, load_checkpoint, load_net, load_vae, noise_levels, rollout, save_checkpoint
from stream import (
    TOY_PROMPT, Player, average, coverage, edge_ratio, encode_prompts, explain, measure, open_stream, psnr, read_pose,
    rounded, standard_error, step, stream, texture, whole_chunks,
)

CPU = torch.device("cpu")
OTHER_PROMPT = ("red left wall, green right wall, yellow far wall, purple floor, blue ceiling, "
                "near right white pillar, far middle cyan pillar")


@torch.no_grad()
def open_player(chain, stage):
    """A checkpoint's player, the weights shaken: after two steps the camera hardly moves a pixel."""
    net, meta = load_net(chain / f"ckpt/{stage}.pt", CPU)
    rng = torch.Generator().manual_seed(0)
    for name, p in net.named_parameters():
        if p.ndim > 1:
            p += (0.5 if name.endswith("modulation") else p.shape[1] ** -0.5) * torch.randn(p.shape, generator=rng)
    vae = load_vae(chain / "ckpt/vae.pt", CPU, meta["vae_fingerprint"])
    return Player(net, vae, load_encoder(meta["preset"], None, CPU), meta)


def camera_along(viewmats, meta, b=1):
    """b videos of the same path, viewmats [f 4 4]."""
    return Camera(viewmats.expand(b, *viewmats.shape), intrinsics(meta["K"]).expand(b, len(viewmats), 3, 3))


def walk(player, path, prompts=(TOY_PROMPT,), seeds=(0,), given=None):
    """The whole video [b 3 t H W] along a pose string or viewmats [f 4 4], and the number of pieces it came in."""
    viewmats = parse_trajectory(path) if isinstance(path, str) else path
    camera = camera_along(viewmats, player.meta, len(prompts))
    pieces = list(stream(player, list(prompts), camera, list(seeds), given))
    return torch.cat(pieces, dim=2), len(pieces)


def film(path):
    return [frame for frame in imageio.imiter(path)]


# ---------------------------------------------------------------------------------------------------------------- Files


@pytest.mark.parametrize("stage", SCRIPTS)
def test_every_stage_streams_to_a_file(chain, tmp_path, stage):
    call("stream.py", "--ckpt", f"ckpt/{stage}.pt", "--camera", "w*2,l+w*2", "--out", tmp_path / "walk.mp4", cwd=chain)
    frames = film(tmp_path / "walk.mp4")
    assert len(frames) == 1 + 4 * (5 - 1) and {frame.shape for frame in frames} == {(256, 256, 3)}
    strip = 3 * 5 * 32  # every fourth of the frames, three times enlarged; the room that explains them above
    assert imageio.imread(tmp_path / "walk.png").shape == (3 * 2 * 33, strip, 3)


@pytest.mark.parametrize("entry", (
    "w*2,l", {"trajectory": "w*2,l"}, {"trajectory": "w*2,l", "K": K_SQUARE},
    {"c2w": invert_se3(parse_trajectory("w*2,l")).tolist()},
    {"w2c": parse_trajectory("w*2,l").tolist(), "K": K_SQUARE, "prompt": TOY_PROMPT},
))
def test_camera_from_json_is_the_pose_string(chain, tmp_path, entry):
    (tmp_path / "path.json").write_text(json.dumps(entry))
    path, = read_camera(str(tmp_path / "path.json"))
    torch.testing.assert_close(path.viewmats, parse_trajectory("w*2,l"))
    call("stream.py", "--camera", tmp_path / "path.json", "--out", tmp_path / "walk.mp4", cwd=chain)
    assert len(film(tmp_path / "walk.mp4")) == 13


def test_several_paths_give_several_videos(chain, tmp_path):
    paths = [{"id": "left", "caption": TOY_PROMPT, "trajectory": "a"},
             {"id": "on", "caption": "fog", "trajectory": "w*2"}]
    (tmp_path / "paths.json").write_text(json.dumps(paths))
    call("stream.py", "--camera", tmp_path / "paths.json", "--out", tmp_path / "walk.mp4", cwd=chain)
    assert len(film(tmp_path / "walk-left.mp4")) == 5 and len(film(tmp_path / "walk-on.mp4")) == 9


def test_gif(chain, tmp_path):
    call("stream.py", "--camera", "w*2,l", "--out", tmp_path / "walk.gif", cwd=chain)
    assert imageio.imread(tmp_path / "walk.gif").shape == (13, 256, 256, 3)


def test_pressed_keys_are_read_off_the_path():
    for key in KEYS:
        assert pressed(parse_trajectory(f"{key}*2")) == [set(), {key}, {key}]
    assert pressed(parse_trajectory("w+l,s+i,a+u+j")) == [set(), {"w", "l"}, {"s", "i"}, {"a", "u", "j"}]


def test_keys_are_drawn_at_the_bottom(chain, tmp_path):
    for name, flags in ("plain", []), ("keys", ["--keys"]):
        call("stream.py", "--camera", "w*2", "--out", tmp_path / f"{name}.mp4", *flags, cwd=chain)
    plain, keys = (film(tmp_path / f"{name}.mp4")[-1].astype(int) for name in ("plain", "keys"))
    change = abs(keys - plain).mean((1, 2))  # of each row
    assert change[-40:].mean() > 10 and change[:-48].mean() < 2  # compression leaves a trace elsewhere


# --------------------------------------------------------------------------------------------------------------- Stream


@pytest.mark.parametrize("stage", SCRIPTS)
def test_checkpoint_streams_with_its_own_sampler(chain, stage):
    net, vae, _, meta = player = open_player(chain, stage)
    viewmats, prompt, rng = parse_trajectory("w"), encode_words(TOY_PROMPT)[None], torch.Generator().manual_seed(5)
    camera = camera_along(viewmats, meta) if stage != "base" else None
    levels, draw = noise_levels(4, meta["shift"]), lambda: torch.randn(1, 2, 16, 4, 4, generator=rng)
    x_t = draw()  # two latent frames: one chunk, no past
    with torch.no_grad():
        for sigma, lower in zip(levels, levels[1:]):
            v, null = (net(x_t, torch.full((1, 2), sigma), text, camera) for text in (prompt, torch.zeros_like(prompt)))
            if stage in ("base", "camera", "ar"):  # Euler steps, guided
                x_t = x_t + (lower - sigma) * guide(v, null, meta["guidance"])
            else:  # predict, and noise again
                x_t = (1 - lower) * (x_t - sigma * v) + (lower * draw() if lower else 0)
        expected = vae.decode(x_t)[0].clamp(-1, 1)
    torch.testing.assert_close(walk(player, viewmats, seeds=[5])[0], expected, atol=2e-5, rtol=0)


@pytest.mark.parametrize("stage", ("camera", "ar", "dmd"))
def test_streamed_video_equals_whole_decode(chain, stage):
    net, vae, _, meta = player = open_player(chain, stage)
    path = "w*2,l*3,a"  # seven latent frames: with chunks of two, the last one is held for an eighth
    video, pieces = walk(player, path)
    f = 7 + (-7 % meta["chunk"] if meta["chunk"] else 0)
    viewmats = parse_trajectory(path)
    viewmats = torch.cat([viewmats, viewmats[-1:].expand(f - 7, 4, 4)])
    camera, prompt = camera_along(viewmats, meta), encode_words(TOY_PROMPT)[None]
    x0 = rollout(net, meta, [torch.Generator().manual_seed(0)], (f, 16, 4, 4), prompt, torch.zeros_like(prompt), camera)
    with torch.no_grad():
        whole = vae.decode(torch.cat(list(x0), dim=1))[0][:, :, : 1 + 4 * 6].clamp(-1, 1)
    assert pieces == (f // meta["chunk"] if meta["chunk"] else 1)
    torch.testing.assert_close(video, whole, atol=2e-5, rtol=0)


def test_path_that_ends_within_a_chunk_is_held(chain):
    player = open_player(chain, "dmd")
    short = parse_trajectory("w*2")  # three latent frames, chunks of two
    held = torch.cat([short, short[-1:]])
    (a, _), (b, _) = walk(player, short), walk(player, held)
    assert a.shape[2] == 9 and b.shape[2] == 13
    torch.testing.assert_close(a, b[:, :, :9])


def test_seed_prompt_and_path_each_decide_the_video(chain):
    player = open_player(chain, "dmd")
    video, again, seed, prompt, path = (walk(player, *change)[0] for change in (
        ("l*3",), ("l*3",), ("l*3", [TOY_PROMPT], [1]), ("l*3", [OTHER_PROMPT]), ("j*3",)))
    assert torch.equal(video, again)
    assert min((video - other).abs().max() for other in (seed, prompt, path)) > 1e-3  # through an untrained decoder


@pytest.mark.parametrize("stage", ("ar", "dmd"))
def test_batch_of_two_equals_each_alone(chain, stage):
    player = open_player(chain, stage)
    both = walk(player, "w*3", [TOY_PROMPT, OTHER_PROMPT], [3, 4])[0]
    for n, (prompt, seed) in enumerate(((TOY_PROMPT, 3), (OTHER_PROMPT, 4))):
        torch.testing.assert_close(both[n : n + 1], walk(player, "w*3", [prompt], [seed])[0], atol=2e-5, rtol=0)


def test_steps_are_timed_and_made_one_after_the_other_are_the_same_video(chain):
    player, seconds, pieces = open_player(chain, "dmd"), {}, []
    state = open_stream(player, [TOY_PROMPT], [0], None, seconds)
    for here in whole_chunks(player, camera_along(parse_trajectory("w*3"), player.meta)):
        video, state = step(player, state, here, seconds)
        pieces.append(video)
    assert torch.equal(torch.cat(pieces, dim=2), walk(player, "w*3")[0])
    assert seconds.keys() == {"prompt", "denoise", "cache", "decode"} and min(seconds.values()) > 0


def test_a_chunk_is_denoised_while_the_one_before_it_is_decoded(chain, monkeypatch):
    """Each waits for the other: in one thread, neither would ever end."""
    player, both = open_player(chain, "dmd"), threading.Barrier(2, timeout=60)
    denoise, decode, calls = script.denoise, script.decode, []

    def denoised(*of):
        calls.append("denoise")
        if len(calls) > 1:  # the first has nothing to wait for
            both.wait()
        return denoise(*of)

    def decoded(*of):
        calls.append("decode")
        if calls.count("decode") < 4:  # the last has nothing either
            both.wait()
        return decode(*of)

    monkeypatch.setattr(script, "denoise", denoised)
    monkeypatch.setattr(script, "decode", decoded)
    video, pieces = walk(player, "w*7")
    assert pieces == 4 and video.shape[2] == 29


def test_two_threads_share_the_cores_and_give_them_back(chain, monkeypatch):
    player, denoise, decode, seen = open_player(chain, "dmd"), script.denoise, script.decode, []
    monkeypatch.setattr(script, "denoise", lambda *of: seen.append(torch.get_num_threads()) or denoise(*of))
    monkeypatch.setattr(script, "decode", lambda *of: seen.append(torch.get_num_threads()) or decode(*of))
    torch.set_num_threads(2)
    try:
        walk(player, "w*3")
        assert seen == [1] * 4 and torch.get_num_threads() == 2
        seen.clear()
        walk(player, "w")  # a single chunk has all of them
        assert seen == [2] * 2
    finally:
        torch.set_num_threads(1)


def test_an_error_of_the_thread_is_heard_and_a_stream_can_be_left(chain, monkeypatch):
    player = open_player(chain, "dmd")
    camera = camera_along(parse_trajectory("w*7"), player.meta)
    left = stream(player, [TOY_PROMPT], camera, [0])
    next(left)
    left.close()
    assert not [thread for thread in threading.enumerate() if "ThreadPool" in thread.name]
    monkeypatch.setattr(script, "next_chunk", lambda *of: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        next(stream(player, [TOY_PROMPT], camera, [0]))


@pytest.mark.parametrize("stage", ("camera", "ar", "dmd"))
@pytest.mark.parametrize("frames", (1, 5))
def test_stream_begins_with_what_was_given(chain, world, stage, frames):
    player, given = open_player(chain, stage), F.avg_pool3d(world[-1][:2, :, :frames], (1, 2, 2))
    alone, after = (walk(player, "w*3", [TOY_PROMPT] * 2, [0, 1], image)[0] for image in (None, given))
    with torch.no_grad():
        shown = player.vae.decode(player.vae.encode(given)[0])[0].clamp(-1, 1)  # what the VAE leaves of it
    torch.testing.assert_close(after[:, :, :frames], shown, atol=2e-5, rtol=0)
    assert (after - alone)[:, :, frames:].abs().max() > 1e-3


def test_what_was_given_to_a_network_that_never_saw_any_is_made_anew(chain, world):
    player, given = open_player(chain, "dmd"), F.avg_pool3d(world[-1][:1, :, :1], (1, 2, 2))
    player = player._replace(meta=player.meta | {"given_prob": 0.0})
    assert torch.equal(walk(player, "w*3", given=given)[0], walk(player, "w*3")[0])


def test_prompts_are_read_as_the_latents_folder_has_them(chain):
    player = open_player(chain, "dmd")
    prompt, null = encode_prompts(player, [TOY_PROMPT, OTHER_PROMPT], None, None, (16, 4, 4))
    assert torch.equal(prompt, torch.stack([encode_words(TOY_PROMPT), encode_words(OTHER_PROMPT)]))
    assert prompt.shape == null.shape and not null.any()


@pytest.mark.parametrize("name, frames", (("room.png", 1), ("room.gif", 5), ("grey.gif", 1)))
def test_image_is_gone_on_from(chain, tmp_path, world, name, frames):
    truth = ((F.avg_pool2d(world[-1][0, :, :frames], 2) + 1) * 127.5).round().byte().permute(1, 2, 3, 0).numpy()
    if name == "grey.gif":
        Image.fromarray(truth[0, ..., 0]).save(tmp_path / name, optimize=False)
        assert next(imageio.imiter(tmp_path / name)).ndim == 2
    else:
        imageio.imwrite(tmp_path / name, truth[0] if frames == 1 else truth)
    for out, flags in ("alone", []), ("after", ["--image", tmp_path / name]):
        call("stream.py", "--camera", "w*3", "--out", tmp_path / f"{out}.gif", *flags, cwd=chain)
    alone, after = (imageio.imread(tmp_path / f"{out}.gif")[:, ::8, ::8] for out in ("alone", "after"))
    vae = load_vae(chain / "ckpt/vae.pt", CPU, load_checkpoint(chain / "ckpt/vae.pt")[1]["fingerprint"])
    with torch.no_grad():  # what the VAE leaves of the image
        read = imageio.imread(tmp_path / name)
        read = read if read.shape[-1] < 5 else np.stack([read] * 3, axis=-1)
        image = torch.from_numpy(read[..., :3].copy()).float().view(1, frames, 32, 32, 3)
        shown = vae.decode(vae.encode(image.permute(0, 4, 1, 2, 3) / 127.5 - 1)[0])[0].clamp(-1, 1)
    shown = ((shown[0] + 1) * 127.5).permute(1, 2, 3, 0).numpy()
    assert abs(after[:frames].astype(float) - shown).mean() < 8  # a gif has 256 colours
    assert abs(after[frames:].astype(int) - alone[frames:]).max() > 0


@pytest.mark.parametrize("name, found", (
    ("none.png", "cannot be read"), ("text.png", "cannot be read"), ("long.gif", "fewer latent frames"),
    ("three.gif", "1 + 4k"),
))
def test_bad_image_is_refused(chain, tmp_path, name, found):
    (tmp_path / "text.png").write_text("not an image")
    for clip, shape in ("long.gif", (13, 32, 32, 3)), ("three.gif", (3, 32, 32, 3)):
        imageio.imwrite(tmp_path / clip, np.random.default_rng(0).integers(0, 255, shape, dtype=np.uint8))
    flags = ("--camera", "w*3", "--image", tmp_path / name, "--out", tmp_path / "walk.mp4")
    message = refusal("stream.py", *flags, cwd=chain)
    assert message.startswith(f"error: --image {tmp_path / name}: ") and found in message
    assert not (tmp_path / "walk.mp4").exists()


def test_image_is_refused_where_it_was_never_trained(chain, tmp_path):
    flags = ("--ckpt", "ckpt/base.pt", "--image", "room.png", "--out", tmp_path / "walk.mp4")
    assert "never trained to go on from an image" in refusal("stream.py", *flags, cwd=chain)


def test_given_frames_are_scored(chain, tmp_path, capsys):
    flags = ("--score", "--scenes", "8", "--out", tmp_path / "score.mp4")
    call("stream.py", *flags, "--given", "1", cwd=chain)
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["given"] == 1
    assert "--given 4" in refusal("stream.py", *flags, "--given", "4", cwd=chain)
    assert "--given 1" in refusal("stream.py", *flags, "--given", "1", "--ckpt", "ckpt/base.pt", cwd=chain)
    for flags in "--given 1", "--lengths 2", "--bench --lengths 2 --score":
        assert refusal("stream.py", *flags.split(), cwd=chain).startswith(f"error: {flags.split()[0]}: ")


# ------------------------------------------------------------------------------------------------------------- Measures


def test_score_is_one_line_of_finite_numbers(chain, tmp_path, capsys):
    call("stream.py", "--score", "--scenes", "8", "--seed", "3", "--out", tmp_path / "score.mp4", cwd=chain)
    row = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert set(row) >= set(
        "psnr psnr_ceiling psnr_copy_first psnr_shuffled_camera texture texture_ceiling "
        "texture_standard_error clutter clutter_standard_error counterfactual_accuracy chance rot_err_deg "
        "trans_err prompt_accuracy coverage boundary_jump fps first_frame_s steps scenes seed".split())
    assert None not in row.values()  # which stands for NaN and inf
    assert all(math.isfinite(value) for value in row.values() if isinstance(value, float))
    assert len(row["texture_tenths"]) == len(row["texture_tenths_ceiling"]) == 10
    assert all(map(math.isfinite, row["texture_tenths"] + row["texture_tenths_ceiling"]))
    assert (row["scenes"], row["seed"], row["steps"], row["chance"]) == (8, 3, 4, 1 / 8)
    assert (tmp_path / "score.png").exists()


def test_bench_says_where_the_time_goes(chain, capsys):
    call("stream.py", "--bench", "--camera", "w*3", cwd=chain)
    row = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert row["fps"] > 0 and row["first_frame_s"] > 0 and row["frames"] == 13
    assert row["last_chunk_ms"] > 0 and 0 < row["state_mb"] < 1000 * row["peak_gb"]
    assert set(row["ms_per_frame"]) == {"prompt", "denoise", "cache", "decode"}
    assert sum(row["ms_per_frame"].values()) == pytest.approx(1000 / row["fps"], rel=0.3)


@pytest.fixture(scope="module")
def world():
    """Eight held-out rooms and paths of five latent frames, seen as they are."""
    _, paths, scene = sample_toy(8, seed=3, steps=4, held=True)
    viewmats, K = torch.stack([parse_trajectory(path) for path in paths]), intrinsics(K_SQUARE)
    return scene, viewmats, K, render(scene, viewmats, K, 64)


def test_explain_finds_the_true_room(world):
    scene, viewmats, K, video = world
    found, inks, seen = explain(video, scene, viewmats, K)
    assert psnr(found, video).min() > 35 and (inks == scene.inks)[seen].all() and seen.sum(1).min() >= 3


@pytest.mark.slow
def test_measures_of_a_perfect_video(world):
    scene, viewmats, K, video = world
    row = measure(video, scene, viewmats, K, chunk=2)
    mean = {name: z.nanmean().item() for name, z in row.items() if z.is_floating_point()}
    assert mean["psnr"] > 35 and mean["counterfactual_accuracy"] == 1
    assert mean["psnr_shuffled_camera"] < 18 and mean["psnr_copy_first"] < 20
    assert mean["texture"] == pytest.approx(0.5, abs=1e-3) and mean["clutter"] == pytest.approx(0, abs=1e-3)
    assert mean["boundary_jump"] == pytest.approx(1, abs=0.01)
    assert mean["prompt_accuracy"] > 0.97 and mean["rot_err_deg"] < 0.1 and mean["trans_err"] < 0.005


@pytest.mark.slow
def test_prompt_accuracy_counts_wrong_colours(world):
    scene, viewmats, K, video = world
    wrong = scene._replace(colours=(scene.colours + torch.tensor([0, 0, 1, 0, 0, 0, 0, 0])) % 8)  # the far wall's
    accuracy = measure(video, wrong, viewmats, K, chunk=2)["prompt_accuracy"]
    assert 0.6 < accuracy.mean() < 0.9  # six of seven, where all seven can be seen


@pytest.mark.slow
def test_a_video_along_another_path_is_told_apart(world):
    scene, viewmats, K, video = world
    row = measure(video.roll(1, 0), scene._replace(inks=scene.inks.roll(1, 0)), viewmats, K, chunk=2)
    assert row["counterfactual_accuracy"].mean() < 0.5 and row["psnr"].mean() < 20


def test_averages_over_groups_are_those_over_all_videos():
    torch.manual_seed(0)
    inks, seen = torch.randint(len(INKS), (16, N_PANELS)), torch.ones(16, N_PANELS, dtype=torch.bool)
    rows = [{"psnr": torch.tensor([10.0, 20, math.nan]), "inks": inks[:8], "seen": seen[:8]},
            {"psnr": torch.tensor([30.0]), "inks": inks[8:], "seen": seen[8:]}]
    assert average(rows) == {"psnr": 20.0, "coverage": pytest.approx(coverage(inks, seen), abs=1e-4)}
    assert standard_error(rows, "psnr") == pytest.approx(10 / 3**0.5, abs=1e-4)


def test_a_picture_counts_no_more_than_its_energy():
    ink, decoy = torch.tensor([-5.0, 0.5, 3.0]), torch.tensor([0.0, 0.0, 4.0])
    found = torch.stack([ink, decoy, torch.ones(3), torch.ones(3)])[:, None, None]  # of one frame
    assert texture(found).tolist() == pytest.approx([(-1 + 0.5 + 0) / 3])


def test_psnr_is_in_decibels():
    video = torch.zeros(2, 3, 5, 8, 8)
    assert psnr(video, video + 0.2).tolist() == pytest.approx([20, 20])  # of a range of 2: 20 log10(2 / 0.2)


def degenerate(scene, viewmats, K):
    """name: a video that is wrong in one way, or right, of the rooms along the paths."""
    size, rng = 64, torch.Generator().manual_seed(0)
    hits = cast(scene.pillars, pixel_cameras(viewmats), K, size)
    inks = lambda: torch.randint(len(INKS), scene.inks.shape, generator=rng)
    truth = paint(hits, scene.colours, scene.inks)
    noise = torch.randn(truth.shape, generator=rng)
    grey = paint(hits, scene.colours, torch.full_like(scene.inks, FILLS.index(GREY)))
    flicker = [paint(hits, scene.colours, inks())[:, :, t] for t in range(truth.shape[2])]
    wide = dict(kernel_size=(1, 9, 9), stride=1, padding=(0, 4, 4), count_include_pad=False)
    return {
        "truth": truth,
        "other inks": render(scene._replace(inks=inks()), viewmats, K, size),
        "one ink for all": paint(hits, scene.colours, torch.zeros_like(scene.inks)),
        "truth, half decided": (truth + grey) / 2,
        "grey pictures": grey,
        "decoys": paint(hits, scene.colours, scene.inks + len(INKS)),
        "another ink in every frame": torch.stack(flicker, dim=2),
        "truth, blurred": F.avg_pool3d(truth, **wide),
        "truth under noise": (truth + noise / 2).clamp(-1, 1),
        "noise": noise.clamp(-1, 1),
        "black": -torch.ones_like(truth),
        "teal all over": paint(hits._replace(panel=0 * hits.panel), scene.colours, 0 * scene.inks),
        "bare walls": paint(hits._replace(panel=torch.full_like(hits.panel, N_PANELS)), scene.colours, scene.inks),
        "inks twice as strong": (2 * truth - grey).clamp(-1, 1),
        "the first frame, held": truth[:, :, :1].expand_as(truth),
        "backwards": truth.flip(2),
        "another path": render(scene._replace(inks=inks()), viewmats.roll(1, 0), K, size),
    }


@pytest.mark.slow
def test_no_measure_praises_what_is_wrong(world):
    """What each measure says of each of them: (least, most)."""
    scene, viewmats, K, _ = world
    found = {name: average([measure(video, scene, viewmats, K, 1)])
             for name, video in degenerate(scene, viewmats, K).items()}
    truth = {"psnr": (60, 200), "texture": (0.49, 0.51), "clutter": (-0.01, 0.01), "counterfactual_accuracy": (1, 1),
             "prompt_accuracy": (0.97, 1), "rot_err_deg": (0, 0.1), "boundary_jump": (0.95, 1.05),
             "coverage": (0.8, 1.1)}
    expected = {
        "truth": truth, "other inks": truth,  # nobody named the inks
        "one ink for all": truth | {"coverage": (0, 0.05)},
        "truth, half decided": {"psnr": (23, 30), "texture": (0.24, 0.26), "clutter": (-0.01, 0.01)},
        "grey pictures": {"psnr": (17, 23), "texture": (-0.01, 0.01), "clutter": (-0.01, 0.01)},
        "decoys": {"psnr": (17, 23), "texture": (-0.51, -0.49), "clutter": (0.7, 0.8)},
        "another ink in every frame": {"psnr": (15, 20), "texture": (0, 0.15), "clutter": (0.6, 1.1)},
        "truth, blurred": {"psnr": (18, 23), "texture": (0.2, 0.4), "clutter": (0.2, 1)},
        "truth under noise": {"psnr": (11, 15), "texture": (0.4, 0.5), "clutter": (1.5, 4),
                              "counterfactual_accuracy": (1, 1)},
        # texture and clutter look at pictures alone: beside psnr and prompt_accuracy, never without
        "teal all over": {"psnr": (8, 18), "texture": (0.3, 0.6), "prompt_accuracy": (0, 0.5)},
        "bare walls": {"psnr": (13, 20), "texture": (-0.1, 0.1), "clutter": (0.8, 5)},
        "inks twice as strong": {"psnr": (17, 23), "texture": (-0.05, 0.05), "clutter": (0.7, 1.1)},
        "noise": {"psnr": (5, 10), "texture": (-0.03, 0.03), "clutter": (4, 12), "counterfactual_accuracy": (0, 0.4),
                  "prompt_accuracy": (0, 0.4), "coverage": (0.8, 1.1), "lost": (-1, 1)},  # the last two praise it
        "black": {"psnr": (3, 9), "texture": (-0.03, 0.03), "clutter": (4, 12), "counterfactual_accuracy": (0, 0.4),
                  "prompt_accuracy": (0, 0.4)},
        "the first frame, held": {"psnr": (10, 20), "texture": (0, 0.35), "clutter": (0.5, 4),
                                  "counterfactual_accuracy": (0, 0.4), "rot_err_deg": (0.5, 9), "lost": (3, 100)},
        "backwards": {"psnr": (10, 20), "texture": (0, 0.35), "clutter": (0.5, 4), "rot_err_deg": (0.5, 9)},
        "another path": {"psnr": (8, 18), "texture": (0, 0.35), "clutter": (0.5, 5), "rot_err_deg": (0.5, 9),
                         "counterfactual_accuracy": (0, 0.3)},
    }
    assert found.keys() == expected.keys()
    wrong = {(name, measured): found[name][measured] for name, bounds in expected.items()
             for measured, (least, most) in bounds.items() if not least <= found[name][measured] <= most}
    assert not wrong


def test_edge_ratio_is_the_jump_between_chunks():
    change = torch.ones(24)
    change[[4, 12, 20]] = 2.0  # chunks of two latents: frames 0-4, 5-12, 13-20, 21-24
    video = F.pad(change.cumsum(0), (1, 0)).view(1, 1, -1, 1, 1).expand(1, 3, 25, 4, 4)
    assert edge_ratio(video, 2).item() == pytest.approx(2)


def test_what_cannot_be_measured_is_null():
    """A chunk of all frames has no edge, and JSON no NaN."""
    assert rounded(edge_ratio(torch.rand(1, 3, 25, 4, 4), 7).mean()) is None
    assert rounded(torch.tensor([0.12345, math.nan, math.inf])) == [0.1235, None, None]
    nothing = torch.zeros(8, N_PANELS, dtype=torch.long)
    assert rounded(torch.tensor(coverage(nothing, nothing > 0))) is None


def test_coverage_follows_the_prior():
    seen = torch.ones(64, N_PANELS, dtype=torch.bool)
    inks = torch.randint(len(INKS), (64, N_PANELS), generator=torch.Generator().manual_seed(0))
    assert coverage(inks, seen) == pytest.approx(1, abs=0.02)
    assert coverage(inks % 2, seen) == pytest.approx(0.58, abs=0.03)  # one ink of two: (log 3 - 2/3 log 2) / log 3
    assert coverage(torch.zeros_like(inks), seen) == pytest.approx(0, abs=0.02)


@pytest.mark.parametrize("turn, move", [
    ((0, 0), (0, 0, 0)), ((3, 0), (0, 0, 0)), ((0, -3), (0, 0, 0)), ((0, 0), (0, 0, -STEP)), ((0, 0), (STEP, 0, 0)),
    ((0, 0), (0, STEP, 0)),
])
def test_read_pose_recovers_a_known_offset(world, turn, move):
    scene, viewmats, K, _ = world
    offset = torch.eye(4)
    offset[:3, :3], offset[:3, 3] = rotation(*torch.deg2rad(torch.tensor(turn).float())), torch.tensor(move)
    asked = viewmats[:, [1, 3]]
    video = paint(cast(scene.pillars, invert_se3(invert_se3(asked) @ offset), K, 64), scene.colours, scene.inks)
    degrees, units = read_pose(video, scene, asked, K)
    assert degrees.mean().item() == pytest.approx(math.hypot(*turn), abs=0.5)
    assert units.mean().item() == pytest.approx(math.hypot(*move), abs=0.025)


# ------------------------------------------------------------------------------------------------------------ Bad input


SHEAR = torch.eye(4) + 0.1 * torch.ones(4, 4).triu(1) * torch.tensor([1, 1, 1, 0])


@pytest.mark.parametrize("text, found", [
    ("{", "not JSON"), ("7", ""), ("{}", ""), ('{"trajectory": 7}', ""), ('{"trajectory": "w*2,x"}', "'x'"),
    (json.dumps({"c2w": [torch.eye(4).tolist(), SHEAR.tolist()]}), "pose 1 is not a rigid transform"),
    (json.dumps({"w2c": [torch.eye(4).tolist(), [[math.nan] * 4] * 4]}), "pose 1"),
    (json.dumps({"c2w": torch.eye(4).tolist()}), "4x4"), ('{"c2w": []}', "4x4"), ('{"c2w": "w*2"}', ""), ("[]", ""),
    (json.dumps({"trajectory": "w", "K": [320, 320, 160, 160]}), "not pixels"),
    (json.dumps({"trajectory": "w", "K": [0.5, 0.5, 2, 0.5]}), "principal point"),
    (json.dumps({"trajectory": "w", "K": [0.5, 0.5]}), "expected (fx/W, fy/H, cx/W, cy/H)"),
    (json.dumps({"trajectory": "w", "K": 0.5}), "K"),
    (json.dumps({"c2w": [torch.eye(4).tolist()] * 2, "K": [math.nan] * 4}), "K"),
    (json.dumps({"trajectory": "w", "K": [0.7, 0.7, 0.5, 0.5]}), "--other-intrinsics"),
    (json.dumps({"trajectory": "w", "prompt": ""}), "prompt"), (json.dumps({"trajectory": "w", "prompt": 7}), "prompt"),
])
def test_bad_path_file_is_refused_by_name(chain, tmp_path, text, found):
    path = tmp_path / "path.json"
    path.write_text(text)
    for name in ("walk.mp4", "walk.png"):
        (tmp_path / name).write_text("mine")
    message = refusal("stream.py", "--camera", path, "--out", tmp_path / "walk.mp4", cwd=chain)
    assert str(path) in message and found in message
    assert all((tmp_path / name).read_text() == "mine" for name in ("walk.mp4", "walk.png"))


@pytest.mark.parametrize("flags, found", [
    (["--camera", "w*2,q"], "'q'"), (["--camera", ""], "trajectory"),
    (["--camera", "none.json"], "none.json: no such file"),
    (["--prompt", ""], "--prompt"), (["--prompt", "  "], "--prompt"), (["--steps", "0"], "--sampling-steps 0"),
    (["--sampling-steps", "0"], "steps 0: expected at least 1"), (["--guidance", "nan"], "--guidance nan"),
    (["--prompt", "fog " * 33], "33 words"),
    (["--ckpt", "ckpt/none.pt"], "ckpt/none.pt: no such file"), (["--ckpt", "ckpt/vae.pt"], "ckpt/vae.pt: expected"),
    (["--vae", "ckpt/ar.pt"], "ckpt/ar.pt: expected a checkpoint of stage vae, found ar"),
    (["--score", "--scenes", "9"], "--scenes 9"), (["--score", "--scenes", "0"], "--scenes 0"),
])
def test_bad_flag_is_refused(chain, tmp_path, flags, found):
    for name in ("walk.mp4", "walk.png"):
        (tmp_path / name).write_text("mine")
    assert found in refusal("stream.py", "--out", tmp_path / "walk.mp4", *flags, cwd=chain)
    assert all((tmp_path / name).read_text() == "mine" for name in ("walk.mp4", "walk.png"))


@pytest.mark.parametrize("name", ("walk.xyz", "walk", "file/walk.mp4"))
def test_out_that_cannot_be_written_is_refused(chain, tmp_path, name):
    (tmp_path / "file").write_text("mine")  # a file where a folder would have to be
    assert str(tmp_path / name) in refusal("stream.py", "--camera", "w", "--out", tmp_path / name, cwd=chain)
    assert [path.read_text() for path in tmp_path.iterdir()] == ["mine"]


@pytest.mark.parametrize("keep", (0, 100, 0.5))
def test_truncated_checkpoint_is_refused(chain, tmp_path, keep):
    whole = (chain / "ckpt/dmd.pt").read_bytes()
    (tmp_path / "dmd.pt").write_bytes(whole[: int(keep * len(whole)) if isinstance(keep, float) else keep])
    message = refusal("stream.py", "--ckpt", tmp_path / "dmd.pt", "--out", tmp_path / "walk.mp4", cwd=chain)
    assert message.startswith(f"error: {tmp_path / 'dmd.pt'}: truncated") and not (tmp_path / "walk.mp4").exists()


def test_another_vae_is_refused(chain, tmp_path):
    weights, meta = load_checkpoint(chain / "ckpt/vae.pt")
    save_checkpoint(tmp_path / "vae.pt", weights, meta | {"fingerprint": "0"})
    message = refusal("stream.py", "--vae", tmp_path / "vae.pt", "--out", tmp_path / "walk.mp4", cwd=chain)
    assert message.startswith(f"error: {tmp_path / 'vae.pt'}: not the VAE that made the latents")
    assert not (tmp_path / "walk.mp4").exists()


def test_other_intrinsics_can_be_insisted_on(chain, tmp_path):
    (tmp_path / "path.json").write_text(json.dumps({"trajectory": "w*2", "K": [0.7, 0.7, 0.5, 0.5]}))
    flags = ("--camera", tmp_path / "path.json", "--other-intrinsics")
    call("stream.py", *flags, "--out", tmp_path / "walk.mp4", cwd=chain)
    assert len(film(tmp_path / "walk.mp4")) == 9


def test_default_checkpoint_is_the_chains_own(chain, tmp_path, capsys):
    call("stream.py", "--camera", "w", "--out", tmp_path / "walk.mp4", cwd=chain)
    assert "ckpt/dmd.pt" in capsys.readouterr().err


# -------------------------------------------------------------------------------------------------------------- Shipped


@pytest.mark.slow
@pytest.mark.parametrize("world", ("tiny", "tiny-hy"))
def test_the_world_that_ships_obeys_its_camera(tmp_path, capsys, world):
    folder = ROOT / "ckpt" / world
    for stage in ("vae", *SCRIPTS):
        if (world, stage) == ("tiny-hy", "base"):
            continue  # nothing goes on from it, and all files together stay under 60 MB
        assert load_checkpoint(folder / f"{stage}.pt", stage)[1]["preset"] == world
    flags = ("--score", "--scenes", "8", "--ckpt", folder / "dmd.pt", "--out", tmp_path / "walk.mp4")
    call("stream.py", *flags, cwd=tmp_path)
    row = json.loads(capsys.readouterr().out)
    assert row["counterfactual_accuracy"] >= 0.75 and row["psnr"] > row["psnr_shuffled_camera"] + 2
