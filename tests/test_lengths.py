"""
Walks longer than the trained length: what `--score --lengths` says of videos whose faults are known, and of a stream.
"""
import json
import math

import pytest
import torch
import torch.nn.functional as F

from conftest import call, refusal
from data import CLEAR, K_SQUARE, explain, intrinsics, pixel_cameras, psnr, render, sample_toy, to_bytes
from model import invert_se3
from stream import frame_errors, long_path, measure_return, measure_stand, measure_walk, summarise

FRAMES, B = 4, 2
K = intrinsics(K_SQUARE)


@pytest.fixture(scope="module")
def world():
    """Two held-out rooms, walks of twice four latent frames, and what is to be seen on them."""
    _, _, scene = sample_toy(B, seed=3, steps=FRAMES - 1, held=True)
    rng = torch.Generator().manual_seed(0)
    viewmats = torch.stack([long_path(rng, FRAMES, 2) for _ in range(B)])
    return scene, viewmats, render(scene, viewmats, K, 32)


def walked(world, video):
    scene, viewmats, _ = world
    poses, video = pixel_cameras(viewmats), to_bytes(video.clamp(-1, 1))
    return measure_walk(video, frame_errors(video, scene, poses, K), scene, poses, K)


def stood(world, video):
    scene, viewmats, _ = world
    poses, video = torch.eye(4).expand_as(pixel_cameras(viewmats)), to_bytes(video.clamp(-1, 1))
    found = measure_stand(video, frame_errors(video, scene, poses, K), scene, poses, K)
    return {name: z.mean().item() for name, z in found.items()}


def returned(video, back=None):
    video, back = (to_bytes(z.clamp(-1, 1)) for z in (video, video if back is None else back))
    return {name: z.mean().item() for name, z in measure_return(video, back).items()}


def noise(video):
    return 2 * torch.rand(video.shape, generator=torch.Generator().manual_seed(0)) - 1


def blurred(video):
    images = F.interpolate(F.avg_pool2d(video.transpose(1, 2).flatten(0, 1), 8), scale_factor=8)
    return images.unflatten(0, (len(video), -1)).transpose(1, 2)


def test_a_long_path_stays_clear_and_looks_ahead_and_begins_with_the_shorter_one():
    for seed in range(4):
        rng, again = (torch.Generator().manual_seed(seed) for _ in range(2))
        viewmats = long_path(rng, 8, 8)
        assert viewmats.shape == (64, 4, 4) and torch.equal(viewmats[0], torch.eye(4))
        torch.testing.assert_close(viewmats[:16], long_path(again, 8, 2), atol=1e-6, rtol=0)
        assert (invert_se3(viewmats)[:, :3, 3].abs() < torch.tensor(CLEAR)).all()
        assert viewmats[:, 2, 2].min() > math.cos(math.radians(24))
        step = viewmats[:-1] @ invert_se3(viewmats[1:])
        assert step[:, :3, 3].norm(dim=-1).max() < 0.081  # nothing jumps where pieces meet


def test_errors_of_frames_are_those_of_the_room_that_explains_them(world):
    scene, viewmats, truth = world
    found = walked(world, truth)["psnr"]
    torch.testing.assert_close(walked(world, truth)["texture"], torch.full((B, 10), 0.5), atol=0.02, rtol=0)
    assert found.min() > 45  # bytes
    shaken = truth + 0.3 * torch.randn(truth.shape, generator=torch.Generator().manual_seed(0))
    whole = psnr(to_bytes(shaken.clamp(-1, 1)) / 127.5 - 1, explain(shaken, scene, viewmats, K)[0])
    torch.testing.assert_close(walked(world, shaken)["psnr"].mean(1), whole, atol=0.1, rtol=0)


@pytest.mark.slow
def test_a_walk_of_noise_blur_or_one_frame_does_not_pass(world):
    """Noise and blur drift as little as the truth: drift is worth its `psnr` over the floor, the first frame held."""
    _, _, truth = world
    still = truth[:, :, :1].expand_as(truth)
    right, still, noisy, blur = (
        summarise(walked(world, video)) for video in (truth, still, noise(truth), blurred(truth)))
    assert right["psnr"].min() > 35 and right["rot_err_deg"].max() < 0.1 and right["trans_err"].max() < 0.005
    assert still["lost"] > 5 and still["drift"] >= still["lost"] and still["rot_err_deg"][-1] > 1.5
    assert abs(noisy["lost"]) < 1 and noisy["psnr"].max() < 9 and noisy["rot_err_deg"].mean() > 1
    assert blur["psnr"].max() < right["psnr"].min() - 10 and blur["psnr"][0] < still["psnr"][0]


@pytest.mark.slow
def test_a_room_that_fades_drifts(world):
    _, _, truth = world
    fade = torch.linspace(0, 1, truth.shape[2]).view(-1, 1, 1)
    found = summarise(walked(world, (1 - fade) * truth + fade * noise(truth)))
    assert found["lost"] > 15 and found["psnr"].diff().max() < 0
    assert found["texture"][0] > 0.45 and found["texture"][-1] < 0.2


def test_a_way_back_is_told_from_a_frozen_one_and_from_another_room(world):
    scene, viewmats, _ = world
    path = torch.cat([viewmats[:, :4], viewmats[:, :4].flip(1)], dim=1)
    truth = render(scene, path, K, 32)
    right, other, still, noisy = (
        returned(truth), returned(truth, truth.roll(1, 0)), returned(truth[:, :, :1].expand_as(truth)),
        returned(noise(truth)))
    assert right["revisit"] > 60 and right["revisit_elsewhere"] < 25 and other["revisit"] < 15
    assert still["revisit"] == still["revisit_elsewhere"]
    assert noisy["revisit"] == pytest.approx(noisy["revisit_elsewhere"], abs=0.2)
    changed = render(scene._replace(inks=(scene.inks + 1) % 3), path, K, 32)
    half = truth.shape[2] // 2
    assert returned(torch.cat([truth[:, :, :half], changed[:, :, half:]], dim=2))["revisit"] < 25


@pytest.mark.slow
def test_a_camera_that_stands(world):
    scene, _, truth = world
    still = truth[:, :, :1].expand_as(truth)
    right, walks, noisy, blur = (stood(world, video) for video in (still, truth, noise(truth), blurred(still)))
    assert right["stand_change"] == 0 and right["stand_psnr"] > 35 and right["stand_rot_err_deg"] < 0.1
    assert right["stand_lost"] == 0 and right["stand_trans_err"] < 0.005
    assert walks["stand_change"] > 0.01 and walks["stand_lost"] > 3 and walks["stand_rot_err_deg"] > 1
    assert noisy["stand_change"] > 0.5 and noisy["stand_psnr"] < 9
    assert blur["stand_change"] == 0 and blur["stand_psnr"] < right["stand_psnr"] - 10


def test_a_summary_has_drift_with_its_standard_error():
    found = summarise({"psnr": torch.tensor([[20.0, 22, 19], [20, 24, 17]]), "x": torch.tensor([1.0, 3])})
    assert (found["drift"], found["lost"], found["x"]) == (5, 2, 2)
    assert found["drift_standard_error"] == pytest.approx(2) and found["x_standard_error"] == pytest.approx(1)
    assert found["psnr"].tolist() == [20, 23, 18]


def test_lengths_are_scored(chain, tmp_path, capsys):
    flags = ("--score", "--scenes", "8", "--out", tmp_path / "score.mp4", "--lengths", "2")
    call("stream.py", *flags, "--window", "4", "--sink", "1", cwd=chain)
    row = json.loads(capsys.readouterr().out)
    assert (row["length"], row["frames"], row["window"], row["sink"], row["scenes"]) == (2, 8, 4, 1, 8)
    for name in "psnr rot_err_deg trans_err drift lost revisit revisit_elsewhere stand_change stand_psnr".split():
        for kind in ("", "_floor", "_ceiling"):
            value, error = row[name + kind], row[f"{name}_standard_error{kind}"]
            values = [*value, *error] if isinstance(value, list) else [value, error]
            assert all(math.isfinite(x) for x in values)
            assert len(values) == (20 if name in ("psnr", "rot_err_deg", "trans_err") else 2)
    assert (tmp_path / "score.png").exists()
    assert "--given 1" in refusal("stream.py", *flags, "--given", "1", cwd=chain)
    assert "--lengths 2: a bidirectional" in refusal("stream.py", *flags, "--ckpt", "ckpt/camera.pt", cwd=chain)
