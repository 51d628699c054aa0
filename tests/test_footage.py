"""
What people have: poses in the formats of other programs, a real clip with COLMAP's own output, pictures as phones write
them, tables from spreadsheets, and files of every kind that are broken.

tests/room is a clip of 41 frames, rendered with photographs of scikit-image (CC0 and public domain) as textures; beside
it the true cameras and what pycolmap 4.2.1 made of its frames.
"""
import contextlib
import json
import math
import random
import re
import shutil
import struct
from pathlib import Path

import imageio.v3 as imageio
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save_file

from conftest import ROOT, call, refusal
from data import (
    LEAST_PAIRS, MAX_GAP, UNCERTAIN, Clip, ClipFormat, Poses, agreement, apparent_motion, best_reading, between_poses,
    camera_motion, camera_steps, corner_shift, distort, find_doubts, find_ffmpeg, frame_positions, invert_se3, look_at,
    open_latents, packed, parse_trajectory, pixel_cameras, pose_string, poses_at, pressed, read_camera, read_picture,
    read_poses, read_table, survey_clips, uncertainties, undistort, undistort_points,
)
from model import build, load_checkpoint, save_checkpoint
from stream import read_image, write_video

ROOM = Path(__file__).with_name("room")
FULL = "w*3,w+l*4,d*3"  # what its camera does
PATH = "w*2,a+l,i"
W2C = pixel_cameras(parse_trajectory(PATH)[None])[0].double()  # of 17 pixel frames
C2W = invert_se3(W2C)
OPENGL = C2W @ torch.diag(torch.tensor([1.0, -1, -1, 1], dtype=torch.float64))
AWAY = invert_se3(parse_trajectory("d*9,j*7,u*5,i*3"))[-1].double()  # where another world has its origin
K = (0.6, 0.8, 0.5, 0.5)  # of pictures of 80x60: 48 48 40 30


def quaternions(R):
    """Rotations [n 3 3] -> [n 4], w first."""
    w = (1 + R.diagonal(dim1=-2, dim2=-1).sum(-1)).clamp_min(0).sqrt() / 2
    x, y, z = (R[:, i, j] - R[:, j, i] for i, j in ((2, 1), (0, 2), (1, 0)))
    return torch.stack([w, x / (4 * w), y / (4 * w), z / (4 * w)], dim=-1)


def rows(table):
    return "".join(" ".join(f"{x:.12g}" for x in row) + "\n" for row in torch.as_tensor(table).tolist())


# --------------------------------------------------------------------------------------------------------- Pose formats


def colmap_text(folder, viewmats=W2C, name="frame_{:05d}.png", camera="PINHOLE 80 60 48 48 40 30", numbers=None):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "cameras.txt").write_text(f"# a camera\n1 {camera}\n")
    lines = []
    for n, (q, pose) in enumerate(zip(quaternions(viewmats[:, :3, :3]), viewmats)):
        numbered = name.format(n if numbers is None else numbers[n])
        lines.append(f"{n + 1} {' '.join(f'{x:.15g}' for x in [*q, *pose[:3, 3]])} 1 {numbered}\n1.5 2.5 -1\n")
    (folder / "images.txt").write_text("# images\n" + "".join(reversed(lines)))
    return folder


def colmap_binary(folder, viewmats=W2C):
    folder.mkdir(parents=True)
    (folder / "cameras.bin").write_bytes(struct.pack("<Q", 1) + struct.pack("<iiQQ4d", 1, 1, 80, 60, 48, 48, 40, 30))
    parts = [struct.pack("<Q", len(viewmats))]
    for n, (q, pose) in enumerate(zip(quaternions(viewmats[:, :3, :3]), viewmats)):
        parts.append(struct.pack("<i7di", n, *q, *pose[:3, 3], 1) + f"{n}.png\0".encode())
        parts.append(struct.pack("<Q", 2) + struct.pack("<2dq", 1, 2, -1) * 2)
    (folder / "images.bin").write_bytes(b"".join(parts))
    return folder


def transforms(**about):
    frames = [{"file_path": f"images/{n}.png", "transform_matrix": pose.tolist()} for n, pose in enumerate(OPENGL)]
    return about | {"frames": frames[::-1]}


def unreal():
    """As ReCamMaster has it: transposed, x forward, y right, z up, in centimetres."""
    frames = {}
    for n, pose in enumerate(C2W):
        right, down, forward, centre = (pose[:3, i] for i in range(4))
        swap = lambda v: torch.stack([v[2], v[0], -v[1]])  # our world's axes in Unreal's
        columns = torch.stack([swap(forward), swap(right), swap(-down), 100 * swap(centre)], dim=1)
        matrix = torch.cat([columns, torch.tensor([[0.0, 0, 0, 1]], dtype=torch.float64)])
        words = " ".join("[" + " ".join(f"{x:.12g}" for x in row) + "]" for row in matrix.T.tolist())
        frames[f"frame{n}"] = {"cam01": words, "cam02": "[1 0 0 0] [0 1 0 0] [0 0 1 0] [0 0 0 1] "}
    return frames


def in_pixels(n=None):
    matrix = torch.tensor([[48.0, 0, 40], [0, 48, 30], [0, 0, 1]])
    return (matrix if n is None else matrix.expand(n, 3, 3)).numpy()


def write_json(path, spec):
    path.write_text(json.dumps(spec), encoding="utf-8-sig")
    return path


def write_text(path, text):
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)
    return path


def scannet(folder, name):
    for n, pose in enumerate(C2W):
        write_text(folder / name.format(n), rows(pose))
    return folder


def write_npz(path, **arrays):
    np.savez(path, **{name: np.asarray(z) for name, z in arrays.items()})
    return path


def write_npy(path, array, **beside):
    with open(path, "wb") as file:
        np.save(file, np.asarray(array))
    for name, z in beside.items():
        np.save(path.with_name(f"{name}.npy"), np.asarray(z))
    return path


def stamped(seconds, poses=C2W):
    return torch.cat([torch.as_tensor(seconds, dtype=torch.float64)[:, None], poses[:, :3, 3],
                      quaternions(poses[:, :3, :3])[:, [1, 2, 3, 0]]], dim=1)


T = torch.arange(17) / 16


def realestate():
    return torch.cat([T[:, None], torch.tensor([[*K, 0, 0]]).expand(17, 6), W2C[:, :3].flatten(1)], dim=1)


FORMATS = {
    "colmap text": (lambda p: colmap_text(p / "sparse") / "images.txt", K),
    "colmap folder": (lambda p: colmap_text(p / "sparse/0").parent, K),
    "colmap binary": (lambda p: colmap_binary(p / "sparse/0").parent, K),
    "colmap images.bin": (lambda p: colmap_binary(p / "sparse/0") / "images.bin", K),
    "colmap elsewhere": (lambda p: colmap_text(p / "sparse", W2C @ AWAY), K),
    "nerfstudio": (lambda p: write_json(p / "transforms.json", transforms(
        fl_x=48, fl_y=48, cx=40, cy=30, w=80, h=60)), K),
    "blender": (lambda p: write_json(p / "transforms_train.json", transforms(
        camera_angle_x=2 * math.atan(0.5 / 0.6))), K),
    "recammaster": (lambda p: write_json(p / "camera_extrinsics.json", unreal()), None),
    "c2w": (lambda p: write_json(p / "poses.json", {"c2w": C2W.tolist(), "K": K}), K),
    "MegaSaM": (lambda p: write_npz(p / "a.npz", cam_c2w=C2W, intrinsic=in_pixels()), K),
    "ViPE": (lambda p: write_npz(p / "a.npz", data=C2W, inds=torch.arange(17)), None),
    "VGGT": (lambda p: write_npz(p / "a.npz", extrinsic=W2C[None, :, :3], intrinsic=in_pixels(17)), K),
    "SANA-WM": (lambda p: write_npz(p / "a.npz", c2w=C2W.float(), intrinsics=in_pixels(17)), K),
    "npy c2w": (lambda p: write_npy(p / "poses.NPY", C2W[:, :3], intrinsics=[[48, 48, 40, 30]]), K),
    "SpatialVID": (lambda p: write_npy(p / "poses.npy", stamped(T, W2C)[:, 1:]), None),
    "npy w2c": (lambda p: write_npy(p / "w2c.npy", W2C), None),
    "TUM": (lambda p: write_text(p / "tum.txt", "# t x y z qx qy qz qw\n" + rows(stamped(T))), None),
    "TUM of a clock": (lambda p: write_text(p / "tum.txt", rows(stamped(1305031102.17 + T.double()))), None),
    "DROID": (lambda p: write_text(p / "tum.txt", rows(stamped(torch.arange(17)))), None),
    "KITTI": (lambda p: write_text(p / "kitti.txt", rows(C2W[:, :3].flatten(1))), None),
    "Replica": (lambda p: write_text(p / "traj.txt", rows(C2W.flatten(1))), None),
    "RealEstate10K": (lambda p: write_text(p / "re.txt", "https://a.b/c\r\n" + rows(realestate())), K),
    "ScanNet": (lambda p: scannet(p / "scene", "pose/{}.txt") if (p / "scene").mkdir() is None else None, None),
    "7-Scenes": (lambda p: scannet(p / "scene", "frame-{:06d}.pose.txt"), None),
}


UNMEASURED = ("VGGT", "nerfstudio", "blender", "RealEstate10K")


@pytest.mark.parametrize("form", FORMATS)
def test_every_format_is_the_same_path(tmp_path, form):
    write, intrinsic = FORMATS[form]
    found = read_poses(str(write(tmp_path).relative_to(tmp_path)), tmp_path, "videos/cam01.mp4", aspect=80 / 60)
    viewmats, Ks, made = poses_at(found, frame_positions(found, 17, 16), [*range(17)])
    torch.testing.assert_close(viewmats, W2C, atol=2e-6, rtol=0)
    assert made == 0 and found.measured == (form not in UNMEASURED and "colmap" not in form)
    if intrinsic is None:
        assert Ks is None
    else:
        torch.testing.assert_close(Ks, torch.tensor([K] * 17, dtype=torch.float64), atol=1e-6, rtol=0)


@pytest.mark.parametrize("form", ["colmap folder", "nerfstudio", "VGGT", "TUM", "ScanNet"])
def test_a_stream_walks_what_a_table_may_name(tmp_path, form):
    path, = read_camera(str(FORMATS[form][0](tmp_path)))
    torch.testing.assert_close(path.viewmats, parse_trajectory(PATH), atol=2e-6, rtol=0)


def test_a_pose_string_may_be_longer_than_a_file_s_name(tmp_path):
    assert len(read_poses(",".join(["w", "s"] * 140), tmp_path).viewmats) == 281
    assert len(read_camera(",".join(["w", "s"] * 140))[0].viewmats) == 281


def test_a_stream_walks_by_time_stamps(tmp_path):
    """At half the frames a second, every other of the poses counts."""
    path, = read_camera(str(write_text(tmp_path / "tum.txt", rows(stamped(5 + T)))), fps=8)
    torch.testing.assert_close(path.viewmats, W2C[::8].float(), atol=2e-6, rtol=0)


@pytest.mark.parametrize("name, says", [
    ("poses.csv", "no such format"), ("poses.pkl", "no such format"), ("none.json", "no such file"),
    ("none/images.txt", "no such file"), ("empty.d", "no images.txt or images.bin"),
])
def test_what_is_no_format_is_called_so(tmp_path, name, says):
    if name == "empty.d":
        (tmp_path / name).mkdir()
    elif "none" not in name:
        (tmp_path / name).write_text("1,2,3")
    with pytest.raises(ValueError, match=says):
        read_poses(name, tmp_path)


def test_of_many_models_the_one_with_the_most_images_of_the_clip_counts(tmp_path):
    colmap_text(tmp_path / "sparse/0", W2C[:2])
    colmap_text(tmp_path / "sparse/1")
    assert len(read_poses("sparse", tmp_path).viewmats) == 17
    colmap_text(tmp_path / "sparse/2", W2C[:6], "clip/{}.png")
    assert len(read_poses("sparse", tmp_path, "clip.mp4").viewmats) == 6  # its own, and not the most
    assert len(read_poses("sparse", tmp_path, "frame_0000.mp4").viewmats) == 17  # no name before a number
    colmap_text(tmp_path / "walk/sparse/0", W2C[:3])
    colmap_text(tmp_path / "walk/dense/0/sparse")
    assert len(read_poses("walk", tmp_path).viewmats) == 3  # below dense are the undistorted pictures' lenses
    colmap_text(tmp_path / "dense/walk/sparse/0", W2C[:3])
    colmap_text(tmp_path / "dense/walk/dense/0/sparse")
    assert len(read_poses("dense/walk", tmp_path).viewmats) == 3  # whatever the folder itself is called
    colmap_text(tmp_path / "only/dense/0/sparse")
    assert len(read_poses("only", tmp_path).viewmats) == 17  # there is no other
    two = colmap_text(tmp_path / "both", torch.cat([W2C, W2C[:5]]))
    text = (two / "images.txt").read_text()
    for n in range(17, 22):
        text = text.replace(f"frame_{n:05d}", f"other/{n - 16}")
    (two / "images.txt").write_text(text)
    assert len(read_poses("both", tmp_path, "clips/other.mp4").viewmats) == 5
    assert len(read_poses("both", tmp_path, "clips/frame.mp4").viewmats) == 17


@pytest.mark.parametrize("name, numbers", [
    ("{}.png", range(1, 18)), ("f{}.jpg", range(17)), ("v2_{:04d}.png", range(1, 18)), ("{:02d}", range(9, 26)),
])
def test_pictures_count_as_people_do(tmp_path, name, numbers):
    colmap_text(tmp_path / "sparse", name=name, numbers=[*numbers])
    torch.testing.assert_close(read_poses("sparse", tmp_path).viewmats, W2C, atol=1e-6, rtol=0)


# ------------------------------------------------------------------------------------------------- Poses of some frames


def some(frames):
    return Poses(W2C[frames], numbers=frames)


def test_poses_of_some_frames_are_interpolated_over_short_gaps():
    every_other = [0, 2, 4, 6, 7, 8, 12, 16]
    poses = some(every_other)
    assert frame_positions(poses, 40, 16) == every_other
    found, _, made = poses_at(poses, every_other, [*range(17)])
    torch.testing.assert_close(found, W2C, atol=2e-3, rtol=0)  # keys are pressed for four frames at a time
    assert made == 17 - len(every_other) and torch.equal(found[every_other], W2C[every_other])
    with pytest.raises(ValueError, match="end before frame 17"):
        poses_at(poses, every_other, [16, 17])


def test_only_the_frames_that_are_used_need_poses():
    poses = some([*range(5, 12)])
    positions = frame_positions(poses._replace(numbers=[0, *range(6, 12)]), 17, 16)
    assert positions == [0, *range(6, 12)]
    found, *_ = poses_at(poses, [*range(5, 12)], [6, 7, 8])
    torch.testing.assert_close(found, W2C[6:9], atol=1e-9, rtol=0)
    with pytest.raises(ValueError, match="begin after frame 4"):
        poses_at(poses, [*range(5, 12)], [4, 5])
    far = Poses(W2C[:2], numbers=[0, MAX_GAP + 1])
    with pytest.raises(ValueError, match=f"more than {MAX_GAP} apart"):
        poses_at(far, frame_positions(far, 40, 16), [3])


def test_what_could_be_two_things_is_asked():
    poses = some([*range(17)])
    for frames in (34, 36):
        with pytest.raises(ValueError, match="of the first 17, or of every 2th.*pose_fps says which, 16 or 8"):
            frame_positions(poses, frames, 16)
    holed = some([n for n in range(17) if n not in (3, 7, 8)])  # of every third frame, three not registered
    with pytest.raises(ValueError, match="of every 3th"):
        frame_positions(holed, 50, 16)
    assert frame_positions(holed, 50, 15, pose_fps=5) == pytest.approx([3 * n for n in holed.numbers])
    assert frame_positions(some([0, 4, 8]), 50, 16, pose_fps=4) == [0, 4, 8]
    assert frame_positions(poses, 34, 16, pose_fps=8) == [*range(0, 34, 2)]
    assert frame_positions(poses, 34, 16, pose_fps=16) == [*range(17)]
    assert frame_positions(some([*range(12)]), 17, 16) == [*range(12)]  # a part: twelve are no even share of 17
    with pytest.raises(ValueError, match="a pose of frame 17, but 16 frames"):
        frame_positions(Poses(W2C[:2], numbers=[0, 17]), 16, 16)
    with pytest.raises(ValueError, match="time stamps from 0.5 to 9.5, but 1 seconds"):
        frame_positions(Poses(W2C[:2], seconds=[0.5, 9.5]), 16, 16)


def test_halfway_between_two_poses_is_half_the_turn():
    a, b = torch.eye(4, dtype=torch.float64), invert_se3(parse_trajectory("l*4,w"))[-1].double()
    half = between_poses(a[None], b[None], torch.tensor([0.5], dtype=torch.float64))
    _, angle = camera_steps(invert_se3(torch.cat([a[None], half, b[None]])))
    torch.testing.assert_close(angle, torch.full((2,), math.radians(6), dtype=torch.float64), atol=1e-5, rtol=0)
    torch.testing.assert_close(half[0, :3, 3], b[:3, 3] / 2)


def test_still_is_a_key():
    viewmats = parse_trajectory("w,still*2,l")
    assert torch.equal(viewmats[1], viewmats[3]) and pose_string(viewmats) == "w*1,still*2,l*1"
    assert pressed(viewmats)[2] == set()
    for wrong in ("still+w", "w+still", "stil"):
        with pytest.raises(ValueError, match="cannot read"):
            parse_trajectory(wrong)


# -------------------------------------------------------------------------------------------------------- The real clip


FLAGS = ("--frames", 11, "--size", "64x112", "--vae", ROOT / "ckpt/tiny/vae.pt")


def make_room(folder, poses, *flags, **row):
    (folder / "clips").mkdir(exist_ok=True)
    shutil.copy(ROOM / "room.mp4", folder / "clips")
    row = {"file": "room.mp4", "caption": "a room", "poses": poses} | row
    (folder / "clips/table.jsonl").write_text(json.dumps(row))
    call("data.py", "--videos", "clips", *FLAGS, *flags, cwd=folder)
    report, = map(json.loads, (folder / "data/videos/report.jsonl").read_text().splitlines())
    return report, open_latents(folder / "data/videos")


def edited(folder, keep=lambda n: True, name="{}.png"):
    """COLMAP's output of some frames, its pictures called otherwise; frame_00001.png is number 1 here."""
    shutil.copytree(ROOM / "colmap", folder)
    lines = (folder / "images.txt").read_text().splitlines()
    images = [line for line in lines if re.search(r"\.(png|jpg)", line)]
    found = {int(re.findall(r"\d+", line.split()[-1])[-1]): line for line in images}
    first = min(found)
    kept = [" ".join([*line.split()[:9], name.format(n - first + 1)]) + "\n\n"
            for n, line in found.items() if keep(n - first)]
    (folder / "images.txt").write_text("# as COLMAP has it\n" + "".join(sorted(kept)))


OPENCV = torch.diag(torch.tensor([1.0, -1, -1, 1], dtype=torch.float64))
TRUTH = torch.tensor(json.loads((ROOM / "truth.json").read_text())["w2c"], dtype=torch.float64)


@pytest.mark.slow
@pytest.mark.parametrize("keep, name", [
    (lambda n: True, "frame_{:06d}.png"), (lambda n: True, "{}.png"), (lambda n: n % 2 == 0, "{}.png"),
    (lambda n: n < 30, "{}.png"),
])
def test_a_real_reconstruction_gives_the_true_path(tmp_path, keep, name):
    (tmp_path / "clips/sparse").mkdir(parents=True)
    shutil.copytree(ROOM / "colmap_model0", tmp_path / "clips/sparse/0")
    edited(tmp_path / "clips/sparse/1", keep, name)
    frames = 11 if keep(40) else 8
    report, data = make_room(tmp_path, "sparse", "--frames", frames)
    assert report["path"] == (FULL if frames == 11 else "w*3,w+l*4")
    assert report["interpolated"] == (0 if keep(1) else 20)
    found, true = (invert_se3(z) for z in (data.shards[0].get_tensor("viewmats")[0].double(), TRUTH[: 4 * frames : 4]))
    assert (found[:, :3, 3] - true[:, :3, 3]).norm(dim=-1).max() < 0.005
    _, angle = camera_steps(torch.stack([found, true], dim=1).flatten(0, 1))
    assert math.degrees(angle[::2].max()) < 0.2


@pytest.mark.slow
@pytest.mark.parametrize("reading, change", [
    (None, lambda w2c: w2c), ("inverted", invert_se3), ("with OpenGL's axes", lambda w2c: OPENCV @ w2c),
    ("in reverse order", lambda w2c: w2c.flip(0)),
])
def test_the_pictures_say_which_convention_the_poses_have(tmp_path, capsys, reading, change):
    poses = read_poses("colmap", ROOM)
    with contextlib.suppress(SystemExit):
        make_room(tmp_path, {"w2c": change(poses.viewmats @ AWAY).tolist(), "K": poses.K[0]}, "--scale", "clip")
    report, = map(json.loads, (tmp_path / "data/videos/report.jsonl").read_text().splitlines())
    assert report["reading"] == (reading or "as given")
    assert set(report["reasons"]) == ({"disagree"} if reading else set())
    assert f"agree with the poses {reading or 'as given'} in 1 of 1" in capsys.readouterr().out


@pytest.mark.parametrize("costs, reading", [
    ({}, None), ({"as given": 1.0, "inverted": 0.1}, "as given"), ({"as given": 2.5, "inverted": 1.0}, "inverted"),
    ({"as given": 2.5, "inverted": 2.0}, "as given"), ({"as given": 4.0, "inverted": 3.0}, "none"),
])
def test_pictures_must_be_clear_about_it(costs, reading):
    assert best_reading(costs, 96) == reading
    assert best_reading(costs, 32) == (None if reading == "none" else reading)


@pytest.mark.slow
@pytest.mark.parametrize("moves, said, doubted", [
    (False, "w*3", True), (True, "still*3", True), (False, "still*3", False), (True, "d*3", False),
])
def test_a_still_camera_is_told_from_a_lively_picture(moves, said, doubted):
    """A street of noise, in front of which something large moves on its own."""
    rng = torch.Generator().manual_seed(0)
    street = F.interpolate(torch.rand(1, 3, 24, 48, generator=rng), scale_factor=4, mode="bicubic")[0].clamp(0, 1)
    frames = [street[:, :, 2 * t * moves :][:, :, :96].clone() for t in range(13)]
    for t, frame in enumerate(frames):
        frame[:, 40:80, 4 * t : 4 * t + 30] = torch.rand(3, 40, 30, generator=rng)
    path, K = parse_trajectory(said), torch.tensor([[0.5, 0.5, 0.5, 0.5]], dtype=torch.float64).expand(13, 4)
    survey = look_at((torch.stack(frames) * 255).byte(), ClipFormat(4, 16, [96, 96])) | {"height": 96, "width": 96}
    doubts = find_doubts(survey, pixel_cameras(path[None])[0].double(), K, {}, [96, 96])
    assert ("static" in doubts) == doubted


@pytest.mark.slow
def test_what_has_no_scale_is_not_taken_as_it_is(tmp_path):
    shutil.copytree(ROOM / "colmap", tmp_path / "clips/sparse")
    with pytest.raises(SystemExit, match="none of 1 clips"):
        make_room(tmp_path, "sparse", "--scale", "1")
    assert "'clip'" in (text := (tmp_path / "data/videos/report.jsonl").read_text()) and "'set'" in text
    assert '"frames": 41' in text  # and what one needs to mend it


def test_a_lens_is_undone():
    """A picture seen through a lens, made by looking up where each of its pixels comes from, comes back."""
    lens, K, n = (-0.15, 0.02, 0.002, -0.001), [0.75, 0.75, 0.5, 0.5], 96
    y, x = torch.meshgrid(*[(torch.arange(n, dtype=torch.float64) + 0.5) / n] * 2, indexing="ij")
    picture = lambda xy: torch.sin(9 * xy[..., 0]) * torch.cos(7 * xy[..., 1])
    seen = (torch.stack([x, y], dim=-1) - 0.5) / 0.75
    ideal = seen.clone()
    for _ in range(50):  # the fixed point: what distort moves to where it is seen
        ideal = ideal - (distort(ideal, lens) - seen)
    points = torch.rand(50, 2, dtype=torch.float64)
    focal, centre = torch.tensor(K, dtype=torch.float64).split(2)
    seen_at = distort((points - centre) / focal, lens) * focal + centre
    torch.testing.assert_close(undistort_points(seen_at, torch.cat([focal, centre]), lens), points, atol=1e-6, rtol=0)
    back = undistort(picture(ideal).float()[None, None], K, lens)[0, 0]
    torch.testing.assert_close(back[12:-12, 12:-12], picture(seen).float()[12:-12, 12:-12], atol=5e-3, rtol=0)
    assert (picture(ideal) - picture(seen)).abs().max() > 0.1
    assert corner_shift([0.75, 1.3, 0.5, 0.5], (0.0018, 0, 0, 0), [256, 448]) < 1 < corner_shift(K, lens, [64, 64])


# ------------------------------------------------------------------------------------------------------------- Pictures


def corner_photo(orientation=None):
    """Red at the top left of what a viewer shows, grey elsewhere: 48 wide, 32 high."""
    pixels = np.full((32, 48, 3), 128, dtype=np.uint8)
    pixels[:16, :24] = (255, 0, 0)
    stored = {None: pixels, 3: pixels[::-1, ::-1], 6: np.rot90(pixels), 8: np.rot90(pixels, 3), 2: pixels[:, ::-1]}
    return Image.fromarray(np.ascontiguousarray(stored[orientation]))


@pytest.mark.parametrize("name, orientation", [
    ("a.png", None), ("a.JPG", 3), ("a.jpeg", 6), ("a.png", 8), ("a.webp", 6), ("a.jpg", 2),
])
def test_a_picture_is_turned_as_its_camera_was_held(tmp_path, name, orientation):
    exif = Image.Exif()
    if orientation:
        exif[0x0112] = orientation
    corner_photo(orientation).save(tmp_path / name, exif=exif, quality=95)
    picture = read_picture(tmp_path / name)
    assert picture.shape == (1, 3, 32, 48)
    torch.testing.assert_close(picture[0, :, 8, 12], torch.tensor([1.0, -1, -1]), atol=0.1, rtol=0)
    assert picture[0, :, 24, 36].abs().max() < 0.1


@pytest.mark.parametrize("mode", ["L", "LA", "P", "RGBA", "CMYK", "1", "I;16", "I", "F"])
def test_a_picture_of_any_colour_model_and_depth_is_its_colours(tmp_path, mode):
    grey = np.full((8, 8), 128, dtype=np.uint8)
    if mode in ("I;16", "I", "F"):
        image = Image.fromarray((257 * grey.astype({"I;16": np.uint16, "I": np.int32, "F": np.float32}[mode])))
    else:
        image = Image.fromarray(grey).convert("RGB")
        image = image.convert("L" if mode == "1" else mode, palette=Image.Palette.ADAPTIVE)
        image = image.point(lambda value: 255 * (value > 100)).convert("1") if mode == "1" else image
    name = {"CMYK": "a.jpg", "F": "a.tiff", "I": "a.tiff"}.get(mode, "a.png")
    image.save(tmp_path / name)
    expected = 1.0 if mode == "1" else 0.0
    torch.testing.assert_close(read_picture(tmp_path / name), torch.full((1, 3, 8, 8), expected), atol=0.03, rtol=0)


def test_what_is_transparent_shows_white(tmp_path):
    pixels = np.zeros((4, 4, 4), dtype=np.uint8)
    pixels[:2] = (255, 0, 0, 255)  # below it black, and transparent
    Image.fromarray(pixels).save(tmp_path / "a.png")
    picture = read_picture(tmp_path / "a.png")[0]
    assert picture[:, 0, 0].tolist() == [1, -1, -1] and picture[:, 3, 3].tolist() == [1, 1, 1]


# ------------------------------------------------------------------------------------------- Tools, tables, final names


OLD_FFMPEG = """#!/bin/bash
for a in "$@"; do [ "$a" = -fps_mode ] && { echo "Unrecognized option 'fps_mode'." >&2; exit 1; }; done
"""


@pytest.mark.parametrize("script, says", [
    (OLD_FFMPEG, "5.1 or newer"), ("#!/bin/bash\nkill -9 $$\n", "exit status -9"), (None, "cannot be run"),
])
def test_a_tool_that_fails_is_named_and_no_video_is_blamed(tmp_path, monkeypatch, script, says):
    ffmpeg = tmp_path / "ffmpeg"
    if script:
        ffmpeg.write_text(script)
        ffmpeg.chmod(0o755)
    monkeypatch.setenv("IMAGEIO_FFMPEG_EXE", str(ffmpeg))
    find_ffmpeg.cache_clear()
    try:
        with pytest.raises(ValueError, match=says):
            find_ffmpeg()
    finally:
        find_ffmpeg.cache_clear()


def test_poses_are_judged_by_what_a_pinhole_would_have_seen():
    """Points of a room, seen from two places through a lens: without it, right poses look wrong."""
    lens, K = (-0.3, 0.05, 0.0, 0.0), torch.tensor([0.6, 0.8, 0.5, 0.5], dtype=torch.float64)
    rng = torch.Generator().manual_seed(0)
    points = torch.rand(60, 3, generator=rng, dtype=torch.float64) * torch.tensor([2, 1.4, 1])
    points -= torch.tensor([1, 0.7, -1])
    viewmats = parse_trajectory("d+l,w,u").double()
    seen = [points @ pose[:3, :3].T + pose[:3, 3] for pose in viewmats]
    xy = [distort(z[:, :2] / z[:, 2:], lens) * K[:2] + K[2:] for z in seen]
    matches, Ks = [[i, packed(torch.cat(xy[i : i + 2], dim=1))] for i in range(3)], K.expand(4, 4)
    right, wrong = agreement(matches, viewmats, Ks, lens), agreement(matches, viewmats, Ks)
    assert right["as given"] < 0.01 and wrong["as given"] > 0.05


@pytest.mark.parametrize("flags, says", [
    (["--K", "500", "500", "320", "240"], "--K"), (["--image-share", "2"], "--image-share: 2.0: expected 0 to 1"),
    (["--dry-run"], "--dry-run"), (["--table", "table.csv"], "--table")])
def test_flags_are_judged_before_any_work(tmp_path, capsys, flags, says):
    with pytest.raises(SystemExit):
        call("data.py", *flags, cwd=tmp_path)
    assert says in capsys.readouterr().err and not any(tmp_path.iterdir())


def test_whole_time_stamps_count_frames(tmp_path):
    lines = [f"{4 * n} {0.02 * n} 0 0 0 0 0 1" for n in range(5)]
    path, = read_camera(str(write_text(tmp_path / "tum.txt", "\n".join(lines))))
    assert invert_se3(path.viewmats)[:, 0, 3].tolist() == pytest.approx([0.02 * n for n in range(5)])


def test_a_path_may_have_intrinsics_for_each_pose(tmp_path):
    Ks = [[0.5 + n / 10, 0.6, 0.5, 0.5] for n in range(2)]
    spec = {"c2w": torch.eye(4).repeat(2, 1, 1).tolist(), "K": Ks}
    assert read_camera(str(write_text(tmp_path / "path.json", json.dumps(spec))))[0].K == tuple(Ks[0])


def test_a_clip_without_a_name_that_a_file_could_have_is_missing(tmp_path):
    clips = [Clip(name, 0, "a room", "w", None) for name in ("x" * 300 + ".mp4", "a\0b.mp4", "none.mp4")]
    found = survey_clips(clips, tmp_path, tmp_path, 0, 1, ClipFormat(2, 16, [32, 32]))
    assert [survey["error"] for survey in found] == ["no such file"] * 3


def test_an_empty_file_beside_the_poses_is_one_line(tmp_path):
    np.save(tmp_path / "poses.npy", np.eye(4)[None])
    (tmp_path / "intrinsics.npy").touch()
    with pytest.raises(ValueError, match="poses.npy: "):
        read_poses("poses.npy", tmp_path)


def test_apparent_motion_is_what_was_done_to_the_picture():
    where = torch.rand(60, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    middle = where - where.mean(0)
    for n, step in enumerate(([0.03, 0], [0, -0.02], 0.1 * middle, 0.05 * middle.flip(1) * torch.tensor([-1, 1]))):
        expected = torch.zeros(4, dtype=torch.float64)
        expected[n] = (0.03, -0.02, 0.1, 0.05)[n]
        found = apparent_motion(torch.cat([where, where + torch.as_tensor(step)], dim=1))
        torch.testing.assert_close(found, expected, atol=4e-3 if n > 1 else 1e-9, rtol=0)  # the median of moves


def test_camera_motion_is_along_the_cameras_own_axes():
    for n, path in enumerate(("d", "dn", "w", "i", "l")):
        a, b = parse_trajectory(f"j*30,{path}").double()[-2:]
        found = camera_motion(a, b)
        assert found.abs().argmax() == n and found[n] > 0


@pytest.mark.parametrize("share", [0.0, 0.1, 0.3])
def test_clips_with_the_cameras_of_others_are_uncertain(share):
    """What pictures do follows the camera, with noise; of some clips, another's. In a few pairs nothing is usual."""
    rng = torch.Generator().manual_seed(0)
    clips, effect = 200, torch.randn(6, 4, generator=rng, dtype=torch.float64)
    done = torch.randn(clips, 6, 6, generator=rng, dtype=torch.float64)
    seen = done @ effect + 0.3 * torch.randn(clips, 6, 4, generator=rng, dtype=torch.float64)
    wrong = [*range(round(share * clips))]
    done[wrong] = done[wrong].roll(1, 0)
    pairs = [(n, seen[n, i], done[n, i]) for n in range(clips) for i in range(6)]
    found = [n for n, (far, anyway) in uncertainties(pairs).items() if far > max(UNCERTAIN, anyway)]
    assert len(set(wrong) & set(found)) >= 0.95 * len(wrong) and len(set(found) - set(wrong)) <= 2
    assert not uncertainties(pairs[: LEAST_PAIRS - 1])


@pytest.mark.parametrize("text, suffix, captions", [
    ('\ufeff{"file": "a", "caption": "x\u2028y", "poses": "w"}\n', ".jsonl", ["x\u2028y"]),
    ('file,caption,poses,start\na,x,w,120.0\nb,y,w,\n', ".csv", ["x", "y"]),
    ('{"file": "a", "caption": "x\u0085y", "poses": "w"}\r\n\r\n', ".jsonl", ["x\u0085y"]),
    ('\ufefffile,caption,poses\r\na,"x\r\ny",w\r\n', ".csv", ["x\r\ny"]),
    ('\ufeff[{"file": "a", "caption": "x\u2029", "poses": "w"}]', ".JSON", ["x"]),
])
def test_a_table_is_read_as_it_was_written(tmp_path, text, suffix, captions):
    (tmp_path / f"table{suffix}").write_bytes(text.encode())
    assert [clip.caption.replace("\r\n", "\n") for clip in read_table(tmp_path / f"table{suffix}")] == [
        caption.replace("\r\n", "\n") for caption in captions]


def test_a_blank_cell_says_nothing(tmp_path):
    table = write_text(tmp_path / "table.csv", "file,caption,poses,start,K,pose_fps,weight\na.mp4,x,w, , ,\t, \n")
    assert read_table(table) == [Clip("a.mp4", 0, "x", "w", None, None, None)]


def test_a_video_gets_its_name_when_it_is_whole(tmp_path):
    """Whatever happens while it is made, what stood there before stays."""
    def pieces(fail):
        yield frames[:4]
        assert not path.exists() or path.read_bytes() == b"mine"
        if fail:
            raise OSError("the disk is gone")
        yield frames[4:]

    frames = np.arange(0, 225, 25, dtype=np.uint8)[:, None, None, None] + np.zeros((9, 32, 32, 3), dtype=np.uint8)
    for name in ("a.mp4", "a.gif"):
        path = tmp_path / name
        path.write_bytes(b"mine")
        with pytest.raises(ValueError, match="the disk is gone"):
            write_video(path, pieces(True), 16)
        assert path.read_bytes() == b"mine" and [*tmp_path.iterdir()] == [path]
        write_video(path, pieces(False), 16)
        assert len(imageio.imread(path)) == 9 and [*tmp_path.iterdir()] == [path]
        path.unlink()


@pytest.mark.parametrize("flag, name", [("--image", "walk.png"), ("--ckpt", "walk.mp4"), ("--image", "walk-b.png")])
def test_no_output_is_an_input(chain, tmp_path, flag, name):
    (tmp_path / name).write_bytes(b"mine")
    paths = write_json(tmp_path / "paths.json", [{"id": "a", "trajectory": "w*3"}, {"id": "b", "trajectory": "s*3"}])
    camera = ("--camera", paths) if "-b" in name else ()
    message = refusal("stream.py", flag, tmp_path / name, "--out", tmp_path / "walk.mp4", *camera, cwd=chain)
    assert f"which is {flag}" in message and (tmp_path / name).read_bytes() == b"mine"
    assert not [*tmp_path.glob("walk-a*")]  # it is known before any walk


# ------------------------------------------------------------------------------------------------------------- Weights


@pytest.mark.parametrize("change, says", [
    (lambda w: w * float("nan"), "NaN or inf"), (lambda w: w / 0, "NaN or inf"),
    (lambda w: torch.ones(w.shape, dtype=torch.int8), "int8"),
])
def test_weights_are_finite_floats(tmp_path, change, says):
    weights = {name: torch.rand(w.shape) + 1 for name, w in build("tiny").state_dict().items()}
    weights["head.head.weight"] = change(weights["head.head.weight"])
    save_checkpoint(tmp_path / "ar.pt", weights, {"stage": "ar", "preset": "tiny", "camera": True})
    with pytest.raises(ValueError, match=f"ar.pt: expected finite floats, head.head.weight holds {says}"):
        load_checkpoint(tmp_path / "ar.pt", "ar")


@pytest.mark.parametrize("prefix", ["", "diffusion_model.", "model.diffusion_model."])
def test_a_single_file_is_known_by_its_names_and_shapes(tmp_path, prefix):
    weights = {name: torch.zeros(w.shape) for name, w in build("tiny", False).state_dict().items()}
    save_file({prefix + name: w for name, w in weights.items()}, tmp_path / "one.safetensors")
    found, meta = load_checkpoint(tmp_path / "one.safetensors")
    assert (meta["stage"], meta["preset"]) == ("base", "tiny") and found.keys() == weights.keys()


@pytest.mark.parametrize("names, says", [
    (["diffusion_model.blocks.0.self_attn.q.lora_A.weight"], "a LoRA"),
    (["lora_unet_blocks_0.lora_down.weight"], "a LoRA"),
    (["conditioner.weight"], "it holds conditioner.weight"),
])
def test_a_file_of_something_else_is_called_so(tmp_path, names, says):
    save_file({name: torch.zeros(4) for name in names}, tmp_path / "one.safetensors")
    with pytest.raises(ValueError, match=says):
        load_checkpoint(tmp_path / "one.safetensors")


# --------------------------------------------------------------------------------------------------- A thousand faults


PIECES = (b"", b"1e999", b"-1", b"9" * 400, b"NaN", b"null", b"[]", b"{", b'"', b"\xff\xfe", "\u2028".encode(), b"0")


def spoil(data, rng):
    """A few bytes changed, a piece cut out or doubled, or in its place what numbers and names may not be."""
    data = bytearray(data)
    for _ in range(rng.randint(1, 3)):
        at = rng.randrange(len(data) + 1)
        end = min(len(data), at + rng.choice((1, 2, 8, 40)))
        data[at:end] = rng.choice((*PIECES, bytes(data[at:end]) * 2, rng.randbytes(end - at)))
    return bytes(data)


def path_of(poses):
    found = read_poses(str(poses), Path(), "cam01.mp4")
    return poses_at(found, frame_positions(found, 17, 16), [0, 1, 2])


def test_a_thousand_spoilt_files_are_refused_in_a_line_each(tmp_path, chain):
    """Whatever stands in a file, it is read, or refused with a ValueError of one line."""
    rng, kinds = random.Random(0), {}
    for form in ("colmap text", "colmap binary", "nerfstudio", "blender", "recammaster", "c2w", "TUM", "KITTI",
                 "MegaSaM", "RealEstate10K", "7-Scenes"):
        (tmp_path / form).mkdir()
        poses = FORMATS[form][0](tmp_path / form)
        files = sorted(file for file in (tmp_path / form).rglob("*") if file.is_file())
        kinds[form] = rng.choice(files), lambda file, poses=poses: path_of(poses)
    row = {"file": "a.mp4", "caption": "x", "poses": "w*2", "K": [0.5, 0.5, 0.5, 0.5]}
    corner_photo().save(tmp_path / "a.png")
    corner_photo().save(tmp_path / "a.jpg")
    shutil.copytree(chain / "data/toy", tmp_path / "toy")
    shutil.copy(chain / "ckpt/ar.pt", tmp_path / "ar.pt")
    weights = {name: torch.zeros(w.shape) for name, w in build("tiny", False).state_dict().items()}
    save_file(weights, tmp_path / "one.safetensors")
    encoder, meta = type("Encoder", (), {"encode_image": None}), {"size": [32, 32], "given_prob": 0.5}
    image, folder = lambda file: read_image(file, meta, 9, encoder), lambda file: open_latents(file.parent)
    kinds |= {
        "table": (write_text(tmp_path / "table.jsonl", 2 * (json.dumps(row) + "\n")), read_table),
        "sheet": (write_text(tmp_path / "table.csv", "file,caption,poses,start\na.mp4,x,w*2,3\n"), read_table),
        "camera": (write_json(tmp_path / "path.json", {"trajectory": "w*4", "K": K, "prompt": "a room"}),
                   lambda file: read_camera(str(file))),
        "png": (tmp_path / "a.png", image), "jpg": (tmp_path / "a.jpg", image),
        "shard": (next((tmp_path / "toy").glob("latents-*")), folder),
        "prompts": (tmp_path / "toy/prompts.safetensors", folder), "checkpoint": (tmp_path / "ar.pt", load_checkpoint),
        "single file": (tmp_path / "one.safetensors", load_checkpoint),
    }
    refused = 0
    for kind, (file, read) in kinds.items():
        whole = file.read_bytes()
        read(file)
        for _ in range(55 if len(whole) < 10**6 else 15):  # a thousand of all kinds
            file.write_bytes(spoil(whole, rng))
            try:
                read(file)
            except ValueError as error:
                assert "\n" not in str(error), kind
                refused += 1
        file.write_bytes(whole)
    assert refused > 300
