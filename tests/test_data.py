"""
Cameras, measured in ray-cast pictures; trajectory strings and camera files; the toy world and what can be read off it;
words; the latents folder and its batches.
"""
import contextlib
import json
import math
import re
import resource

import imageio.v3 as imageio
import numpy as np
import pytest
import torch
from einops import repeat
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from conftest import MINIATURE, STEADY, call, refusal
from data import (
    FILLS, FIRST_PANEL, FRAMED, INKS, K_SQUARE, K_WIDE, KEYS, N_PANELS, PALETTE, PILLAR, PILLAR_X, PILLAR_Z, ROOM, STEP,
    SURFACES, TEXT_DIM, TEXT_LEN, TURN, best_inks, cast, collate_prompts, encode_places, encode_words, fill_errors,
    get_batch, held_out, intrinsics, invert_se3, mix, open_latents, paint, panels_seen, parse_trajectory, pixel_cameras,
    read_camera, read_prompt, read_row, render, rotation, sample_path, sample_prompt, sample_toy, save_prompts,
    save_shard, write_sheet,
)
from helpers import ORACLE
from model import load_checkpoint

CPU = torch.device("cpu")


# ---------------------------------------------------------------------------------------------------------- 1. Cameras


def measure(hits):
    """Where a pillar and the far wall behind it are in a picture, and where floor and ceiling end, in pixels."""
    (_, pillar), (wall_y, wall) = (torch.where(hits.surface[0, 0] == surface) for surface in (5, 2))
    width = lambda rays: (rays.max() - rays.min()) / 2  # two rays a pixel
    middle = lambda rays: (rays.max() + rays.min()) / 4
    return {"pillar width": width(pillar), "wall width": width(wall), "pillar x": middle(pillar),
            "wall x": middle(wall), "wall y": middle(wall_y), "parallax": middle(pillar) - middle(wall),
            "floor": torch.where(hits.surface[0, 0] == 3)[0].min() / 2,
            "ceiling": torch.where(hits.surface[0, 0] == 4)[0].max() / 2}


@pytest.mark.parametrize("key, says, changes", [
    ("w", "forward", {"pillar width": 1, "wall width": 1, "pillar x": 0, "wall y": 0}),
    ("s", "backward", {"pillar width": -1, "wall width": -1, "pillar x": 0, "wall y": 0}),
    ("a", "left", {"pillar x": 1, "wall x": 1, "parallax": 1, "wall y": 0}),
    ("d", "right", {"pillar x": -1, "wall x": -1, "parallax": -1, "wall y": 0}),
    ("u", "up", {"floor": 1, "ceiling": 1, "wall y": 1, "wall x": 0}),
    ("dn", "down", {"floor": -1, "ceiling": -1, "wall y": -1, "wall x": 0}),
    ("j", "look left", {"pillar x": 1, "wall x": 1, "parallax": 0}),
    ("l", "look right", {"pillar x": -1, "wall x": -1, "parallax": 0}),
    ("i", "look up", {"floor": 1, "ceiling": 1, "wall y": 1, "wall x": 0}),
    ("k", "look down", {"floor": -1, "ceiling": -1, "wall y": -1, "wall x": 0}),
])
def test_each_key_moves_the_picture_as_its_help_text_says(key, says, changes):
    assert KEYS[key][0] == says
    pillars = torch.tensor([[[0.0, 0.85], [0.9, 1.5]]])  # one ahead, the other out of the way
    before, after = (measure(cast(pillars, pose[None, None], intrinsics(K_SQUARE), 64))
                     for pose in parse_trajectory(f"{key}*3")[[0, 3]])
    for what, sign in changes.items():
        change = after[what] - before[what]
        assert sign * change > 2 if sign else abs(change) < 2, (what, change)


def test_a_turn_keeps_the_centre_and_a_move_the_orientation():
    for key, (_, move, yaw, pitch) in KEYS.items():
        c2w = invert_se3(parse_trajectory(f"{key}*2"))[2]
        if yaw or pitch:
            torch.testing.assert_close(c2w[:3, 3], torch.zeros(3), atol=1e-7, rtol=0)
        else:
            torch.testing.assert_close(c2w[:3], torch.cat([torch.eye(3), 2 * torch.tensor(move)[:, None]], dim=1))


def test_forward_twice_is_world_to_camera():
    viewmats = parse_trajectory("w*2")
    assert viewmats.shape == (3, 4, 4) and viewmats.dtype == torch.float32
    expected = torch.eye(4)
    expected[2, 3] = -0.16  # the world comes towards the camera
    torch.testing.assert_close(viewmats[2], expected)
    assert torch.equal(viewmats[0], torch.eye(4))


def test_compound_step_turns_first_then_moves_along_the_new_axis():
    turn = math.radians(3)
    c2w = invert_se3(parse_trajectory("w+l*2"))
    centres = torch.tensor([[0, 0, 0], [math.sin(turn), 0, math.cos(turn)],
                            [math.sin(turn) + math.sin(2 * turn), 0, math.cos(turn) + math.cos(2 * turn)]])
    torch.testing.assert_close(c2w[:, :3, 3], STEP * centres)
    ahead = torch.tensor([[math.sin(n * turn), 0, math.cos(n * turn)] for n in range(3)])
    torch.testing.assert_close(c2w[:, :3, 2], ahead)


def test_rotation_is_yaw_after_pitch_with_up_at_minus_y():
    yaw, pitch = torch.tensor([0.3, 0.0], dtype=torch.float64), torch.tensor([0.0, 0.3], dtype=torch.float64)
    right, up = rotation(yaw, pitch)[:, :, 2]  # where the camera looks
    torch.testing.assert_close(right.tolist(), [math.sin(0.3), 0.0, math.cos(0.3)])
    torch.testing.assert_close(up.tolist(), [0.0, -math.sin(0.3), math.cos(0.3)])
    torch.testing.assert_close(rotation(yaw[0], pitch[1]), rotation(yaw, pitch)[0] @ rotation(yaw, pitch)[1])


@pytest.mark.parametrize("text, same", [
    ("w*3", "w,w,w"), (" w *2, l+ w*2 ", "w*2,w+l*2"), ("l,w*1", "l*1,w"), ("w*12", ",".join("w" * 12)),
    ("right-8, a-2,left,up-3,down+w-2", "l*8,a*2,j,i*3,k+w*2"),  # WorldPlay's dialect
])
def test_ways_to_write_the_same_path(text, same):
    assert torch.equal(parse_trajectory(text), parse_trajectory(same))


def test_a_doubled_key_is_a_doubled_step_and_opposite_keys_cancel():
    torch.testing.assert_close(parse_trajectory("w+w")[1], parse_trajectory("w*2")[2])
    assert torch.equal(parse_trajectory("w+s")[1], torch.eye(4))


@pytest.mark.parametrize("text, part", [
    ("q*3", "q*3"), ("w*", "w*"), ("w*0", "w*0"), ("w*00", "w*00"), ("", ""), ("w**2", "w**2"), ("w*-1", "w*-1"),
    ("w*1.5", "w*1.5"), ("w,,l", ""), ("w*2,l+x*3", "l+x*3"), ("W", "W"), ("w+", "w+"), ("w*²", "w*²"),
    ("w;l", "w;l"),
])
def test_a_bad_trajectory_names_its_bad_part(text, part):
    with pytest.raises(ValueError, match=re.escape(f"cannot read {part!r}")) as error:
        parse_trajectory(text)
    assert "\n" not in str(error.value) and "look right" in str(error.value)  # and the keys there are


def test_trajectories_are_those_of_the_reference():
    if not (path := ORACLE / "case8_traj_A.safetensors").exists():
        pytest.skip(f"no reference tensors {path}; ORACLE_DIR names their folder")
    with safe_open(path, "pt") as file:
        for i, text in enumerate(json.loads(file.metadata()["config"])["strings"]):
            reference = file.get_tensor(f"out/wan_{i}_viewmats")[0]
            torch.testing.assert_close(parse_trajectory(text), reference, atol=1e-6, rtol=0)


def test_c2w_and_w2c_are_inverse():
    viewmats = parse_trajectory("w+l*5,u+i*4,a+k*9,s+j*30")
    torch.testing.assert_close(invert_se3(viewmats) @ viewmats, torch.eye(4).expand_as(viewmats), atol=1e-6, rtol=0)
    assert torch.equal(invert_se3(invert_se3(viewmats))[:, :3, :3], viewmats[:, :3, :3])


def test_pixel_cameras_pass_through_the_latent_cameras():
    viewmats = torch.stack([parse_trajectory("w+l*3,u+i*2,a*3"), parse_trajectory("s*4,k+d*4")])
    poses = pixel_cameras(viewmats)
    assert poses.shape == (2, 1 + 4 * 8, 4, 4) and poses.dtype == torch.float32
    torch.testing.assert_close(poses[:, ::4], viewmats, atol=1e-6, rtol=0)
    R = poses[..., :3, :3]
    torch.testing.assert_close(R @ R.mT, torch.eye(3).expand_as(R), atol=1e-6, rtol=0)
    assert (torch.linalg.det(R) > 0).all() and (poses[..., 3, :] == torch.tensor([0.0, 0, 0, 1])).all()


@pytest.mark.parametrize("quarter", [1, 2, 3])
def test_pixel_cameras_turn_and_move_evenly(quarter):
    turned, moved = pixel_cameras(torch.stack([parse_trajectory("l"), parse_trajectory("d")]))
    angle, zero = torch.tensor(quarter / 4 * TURN), torch.tensor(0.0)
    torch.testing.assert_close(invert_se3(turned)[quarter, :3, :3], rotation(angle, zero), atol=1e-6, rtol=0)
    torch.testing.assert_close(invert_se3(moved)[quarter, :3, 3], torch.tensor([quarter / 4 * STEP, 0, 0]))


def test_pixel_cameras_take_the_short_way_through_a_large_turn():
    a, b = rotation(torch.tensor(0.0), torch.tensor(0.0)), rotation(torch.tensor(2.0), torch.tensor(0.0))
    viewmats = torch.eye(4).repeat(1, 2, 1, 1)
    viewmats[0, :, :3, :3] = torch.stack([a, b]).mT
    half = invert_se3(pixel_cameras(viewmats))[0, 2, :3, :3]
    torch.testing.assert_close(half, rotation(torch.tensor(1.0), torch.tensor(0.0)), atol=1e-6, rtol=0)


def camera_files():
    """The path w*2,l*3 in every format of read_camera, by name."""
    viewmats = parse_trajectory("w*2,l*3")
    c2w, away = invert_se3(viewmats), invert_se3(parse_trajectory("d*9,j*7,u*5"))[-1]
    pixels = [[484.8, 0, 480], [0, 484.8, 270], [0, 0, 1]]  # K_WIDE at 960 x 540
    return {
        "string": "w*2,l*3", "trajectory": {"trajectory": "w*2,l*3"},
        "c2w": {"c2w": c2w.tolist()}, "rebased c2w": {"c2w": (away @ c2w).tolist()},
        "every frame": {"w2c": pixel_cameras(viewmats[None])[0].tolist(), "pose_fps": 16},
        "every second frame": {"w2c": pixel_cameras(viewmats[None])[0, ::2].tolist(), "pose_fps": 8},
        "w2c": {"w2c": viewmats.tolist()}, "rebased w2c": {"w2c": (viewmats @ away).tolist()},
        "worldplay": {str(i): {"extrinsic": pose.tolist(), "K": pixels} for i, pose in enumerate(c2w)},
        "worldplay training": {str(i): {"w2c": pose.tolist(), "intrinsic": pixels}
                               for i, pose in enumerate(pixel_cameras((viewmats @ away)[None])[0])},
        "minwm": [{"id": 7, "caption": "a room", "trajectory": "w*2,l*3"}],
    }


@pytest.mark.parametrize("form", camera_files())
def test_every_camera_format_is_the_same_path(tmp_path, form):
    (tmp_path / "path.json").write_text(json.dumps(camera_files()[form]))
    (path,) = read_camera(str(tmp_path / "path.json"))
    torch.testing.assert_close(path.viewmats, parse_trajectory("w*2,l*3"), atol=1e-6, rtol=0)
    assert (path.name, path.prompt) == (("7", "a room") if form == "minwm" else ("path", None))
    assert path.K == (pytest.approx((0.505, 0.89777778, 0.5, 0.5)) if "worldplay" in form else None)


def test_a_pose_string_needs_no_file():
    (path,) = read_camera("w*2,l*3")
    assert torch.equal(path.viewmats, parse_trajectory("w*2,l*3")) and path.K is None and path.prompt is None


def test_a_list_holds_several_paths_with_ids_prompts_and_intrinsics(tmp_path):
    c2w = {"id": "b", "prompt": "two", "c2w": invert_se3(parse_trajectory("d*2")).tolist(), "K": list(K_WIDE)}
    (tmp_path / "paths.json").write_text(json.dumps([{"id": "a", "caption": "one", "trajectory": "w"}, c2w, "s*3"]))
    paths = read_camera(str(tmp_path / "paths.json"))
    assert [(path.name, path.prompt, path.K) for path in paths] == [
        ("a", "one", None), ("b", "two", K_WIDE), ("paths-2", None, None)]
    assert [len(path.viewmats) for path in paths] == [2, 3, 4]


EYE = [[1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]
SCALED, MIRRORED, TILTED, BROKEN = ([row[:] for row in EYE] for _ in range(4))
SCALED[0][0], MIRRORED[0][0], TILTED[3][0], BROKEN[0][3] = 1.1, -1, 0.5, float("nan")


PIXELS = [485, 485, 480, 270]


@pytest.mark.parametrize("spec, says", [
    ('{"c2w": [', "not JSON"), ("", "not JSON"), ({"c2w": [EYE, SCALED]}, "pose 1 is not a rigid"),
    ({"w2c": [EYE, MIRRORED]}, "pose 1 is not"), ({"c2w": [EYE, TILTED]}, "pose 1 is not"),
    ({"c2w": [EYE, EYE, BROKEN]}, "pose 2 is not"), ({"c2w": [EYE[:3]]}, "4x4"), ({"c2w": EYE}, "4x4"),
    ({"c2w": []}, "4x4"), ({"c2w": [EYE, EYE[:3]]}, ""), ({"c2w": "here"}, ""),
    ({"c2w": [EYE], "K": PIXELS}, "not pixels"), ({"c2w": [EYE], "K": [0.5, 0.5]}, "K"),
    ({"trajectory": "w", "K": PIXELS}, "not pixels"), ({"trajectory": "q"}, "'q'"), ({"trajectory": 5}, ""),
    ({"0": {"extrinsic": SCALED, "K": EYE[:3]}}, "pose 0 is not"), ({"0": {"extrinsic": EYE}}, "K"),
    ({"0": {"extrinsic": EYE, "K": [[485, 0, 0], [0, 485, 0], [0, 0, 1]]}}, ""),  # no principal point, so no image size
    ({"poses": [EYE]}, "'poses'"), ({}, ""), (5, ""), ([5], ""), (None, ""), ([], ""), ([EYE], ""),
])
def test_a_bad_camera_file_is_named_in_one_line(tmp_path, spec, says):
    file = tmp_path / "path.json"
    file.write_text(spec if isinstance(spec, str) else json.dumps(spec))
    with pytest.raises(ValueError) as error:
        read_camera(str(file))
    assert str(error.value).startswith(f"{file}: ") and says in str(error.value) and "\n" not in str(error.value)


def test_a_missing_camera_file_is_named(tmp_path):
    with pytest.raises(ValueError, match=re.escape(f"{tmp_path / 'path.json'}: no such file")):
        read_camera(str(tmp_path / "path.json"))


def test_intrinsics_are_a_matrix_in_units_of_the_image():
    assert intrinsics((0.6, 0.9, 0.4, 0.5)).tolist() == torch.tensor([[0.6, 0, 0.4], [0, 0.9, 0.5], [0, 0, 1]]).tolist()


@pytest.mark.parametrize("K", [
    (480, 480, 416, 240), (0.5, 480, 0.5, 0.5), (0.01, 0.5, 0.5, 0.5), (-0.5, 0.5, 0.5, 0.5), (0.5, 0.5, 1.2, 0.5),
    (0.5, 0.5, 0.5, -0.1),
    (0.5, 0.5, 0.5), (0.5, 0.5, 0.5, 0.5, 1), (float("nan"), 0.5, 0.5, 0.5), (0.5, 0.5, 0.5, float("inf")),
])
def test_intrinsics_out_of_range_are_refused(K):
    with pytest.raises(ValueError, match="expected"):
        intrinsics(K)


# -------------------------------------------------------------------------------------------------------- 2. Toy world


def rooms(count=8, seed=3, held=True, steps=7):
    prompts, paths, scene = sample_toy(count, seed, steps, held)
    return prompts, torch.stack([parse_trajectory(path) for path in paths]), scene


def test_a_prompt_reads_back_as_it_was_written():
    form = re.compile(r"(\w+) left wall, (\w+) right wall, (\w+) far wall, (\w+) floor, (\w+) ceiling, "
                      r"(near|far) (left|middle|right) (\w+) pillar, (near|far) (left|middle|right) (\w+) pillar")
    rng = torch.Generator().manual_seed(0)
    for _ in range(50):
        *colours, z1, x1, c1, z2, x2, c2 = form.fullmatch(prompt := sample_prompt(rng)).groups()
        read, pillars = read_prompt(prompt)
        assert [list(PALETTE)[i] for i in read[:7]] == [*colours, c1, c2] and len(read) == 8
        places = torch.tensor([[PILLAR_X[x1], PILLAR_Z[z1]], [PILLAR_X[x2], PILLAR_Z[z2]]])
        assert torch.equal(pillars, places) and x1 != x2


PROMPT = ("red left wall, green right wall, blue far wall, white floor, yellow ceiling, "
          "far left cyan pillar, near right orange pillar")


@pytest.mark.parametrize("prompt", [
    "", "a cat on a sofa", "red left wall", PROMPT.replace("red ", ""), PROMPT.replace("red", "beige"),
    PROMPT.replace("floor", "carpet"), PROMPT.replace("near", "close"), PROMPT.replace("far left cyan", "cyan"),
    PROMPT[:PROMPT.rindex(",")], PROMPT + ", red back wall",
])
def test_a_prompt_of_another_world_is_refused(prompt):
    with pytest.raises(ValueError, match="prompt"):
        read_prompt(prompt)


def test_held_out_rooms_and_paths_are_never_trained_on():
    (seen, seen_paths, _), (held, held_paths, _) = (sample_toy(64, 0, 7, held) for held in (False, True))
    assert not set(seen) & set(held) and not set(seen_paths) & set(held_paths)
    assert not any(map(held_out, seen + seen_paths)) and all(map(held_out, held + held_paths))


def test_one_text_in_eight_is_held_out():
    rng = torch.Generator().manual_seed(0)
    assert sum(held_out(sample_prompt(rng)) for _ in range(2000)) / 2000 == pytest.approx(1 / 8, abs=0.03)


def test_the_toy_world_is_a_function_of_its_seed():
    one, again, other = (sample_toy(4, seed, 7, False) for seed in (0, 0, 1))
    assert one[:2] == again[:2] and all(map(torch.equal, one[2], again[2]))
    assert one[0] != other[0] and one[1] != other[1] and not torch.equal(one[2].inks, other[2].inks)


@pytest.mark.parametrize("steps", [1, 3, 7, 15])
def test_paths_have_their_steps_and_stay_clear_of_walls_and_pillars(steps):
    rng, (lo, hi) = torch.Generator().manual_seed(0), torch.tensor(ROOM).T
    pillars = torch.tensor([(x, z) for x in PILLAR_X.values() for z in PILLAR_Z.values()])
    for _ in range(20):
        viewmats = parse_trajectory(sample_path(rng, steps))
        assert len(viewmats) == steps + 1
        centres = invert_se3(pixel_cameras(viewmats[None]))[0, :, :3, 3]
        assert ((centres > lo + 0.2) & (centres < hi - 0.2)).all()
        assert ((centres[:, None, [0, 2]] - pillars).abs().amax(-1) > PILLAR).all()


def test_a_room_shows_the_colours_of_its_prompt_around_pictures_in_its_inks():
    colours, pillars = (z[None] for z in read_prompt(PROMPT))
    hits = cast(pillars, torch.eye(4)[None, None], intrinsics(K_SQUARE), 64)
    inks = torch.arange(N_PANELS)[None] % len(INKS)
    image = (paint(hits, colours, inks)[0, :, 0] + 1) / 2
    named = "red", "green", "blue", "white", "yellow", "cyan", "orange"
    for n, colour in enumerate(named):
        for panel in range(N_PANELS + 1):
            on = (hits.surface[0, 0] == n) & (hits.panel[0, 0] == panel)
            pixels = on.unflatten(0, (64, 2)).unflatten(2, (64, 2)).all(3).all(1)  # that are of nothing else
            hues = image[:, pixels] / image[:, pixels].amax(0)
            hue = torch.tensor(PALETTE[colour] if panel == N_PANELS else list(INKS.values())[panel % len(INKS)])
            torch.testing.assert_close(hues, (hue / hue.max())[:, None].expand_as(hues), atol=0.01, rtol=0)


def test_every_surface_has_pictures_of_its_own():
    """Seen from the middle in all directions: two on a wall, four on floor and ceiling, none of them on two."""
    paths = "still", "j*30", "j*60", "l*30", "i*20", "k*20", "j*60,i*20", "j*60,k*20"
    turns = [parse_trajectory(path)[-1] for path in paths]
    hits = cast(torch.tensor([[[0.8, -0.7], [-0.8, -0.7]]]), torch.stack(turns)[None], intrinsics(K_SQUARE), 64)
    of_surface = {}
    for surface, panel in zip(hits.surface.flatten().tolist(), hits.panel.flatten().tolist(), strict=True):
        if panel < N_PANELS:
            of_surface.setdefault(SURFACES[surface], set()).add(panel)
    assert {name: len(panels) for name, panels in of_surface.items()} == {
        "left wall": 2, "right wall": 2, "far wall": 2, "back wall": 2, "floor": 4, "ceiling": 4}
    assert sorted(panel for panels in of_surface.values() for panel in panels) == [*range(N_PANELS)]


def test_inks_and_decoys_are_as_bright_and_as_far_from_grey():
    inks, decoys, grey = torch.tensor(FILLS[:3]), torch.tensor(FILLS[3:6]), torch.tensor(FILLS[6])
    torch.testing.assert_close(inks.mean(0), grey)
    torch.testing.assert_close(decoys - grey, grey - inks)
    for bank in (inks, decoys):
        torch.testing.assert_close(bank.sum(1), grey.sum().expand(3))
        torch.testing.assert_close((bank - grey).norm(dim=1), (inks[0] - grey).norm().expand(3))


def test_pictures_hang_in_the_middle_of_their_panels():
    pillars = torch.tensor([[[0.8, -0.7], [-0.8, -0.7]]])  # out of sight
    hits = cast(pillars, torch.eye(4)[None, None], intrinsics(K_SQUARE), 64)
    surface, panel = hits.surface[0, 0], hits.panel[0, 0]
    for name, first in FIRST_PANEL.items():
        found = set(panel[surface == SURFACES.index(name)].tolist())
        most = 4 if name in ("floor", "ceiling") else 2
        assert found <= {N_PANELS, *range(first, first + most)}
    far = torch.where(surface == SURFACES.index("far wall"))
    height, width = (float(z.max() - z.min() + 1) for z in far)
    for picture in (4, 5):
        y, x = torch.where(panel == picture)
        assert (y.max() - y.min() + 1) / height == pytest.approx(FRAMED, abs=0.05)
        assert (x.max() - x.min() + 1) / width == pytest.approx(FRAMED / 2, abs=0.05)
        middle = (x.max() + x.min() + 1) / 2 - far[1].min()
        assert middle / width == pytest.approx(0.25 + 0.5 * (picture == 5), abs=0.02)


def test_render_is_repeatable_and_in_range():
    _, viewmats, scene = rooms(2)
    video = render(scene, viewmats, intrinsics(K_SQUARE), 16)
    assert video.shape == (2, 3, 29, 16, 16) and video.min() >= -1 and video.max() <= 1
    assert torch.equal(video, render(scene, viewmats, intrinsics(K_SQUARE), 16))


def test_fill_errors_are_those_of_rooms_with_each_fill_everywhere():
    _, viewmats, scene = rooms(2)
    hits = cast(scene.pillars, pixel_cameras(viewmats), intrinsics(K_SQUARE), 32)
    video = torch.randn(2, 3, 29, 32, 32)
    errors = fill_errors(video, hits, scene.colours)
    shown = hits.panel.unfold(2, 2, 2).unfold(3, 2, 2).amin((-2, -1))  # of a pixel's four rays, those of a picture
    assert errors.shape == (2, 29, N_PANELS + 1, len(FILLS))
    for fill in range(len(FILLS)):
        error = (paint(hits, scene.colours, torch.full((2, N_PANELS), fill)) - video).square().sum(1)
        for panel in range(N_PANELS + 1):
            expected = (error * (shown == panel)).sum((2, 3))
            torch.testing.assert_close(errors[:, :, panel, fill], expected, rtol=1e-4, atol=1e-3)


def test_the_ink_of_every_picture_that_is_seen_can_be_read_off_a_clean_render():
    _, viewmats, scene = rooms(8)
    hits = cast(scene.pillars, pixel_cameras(viewmats), intrinsics(K_SQUARE), 32)
    inks = best_inks(fill_errors(paint(hits, scene.colours, scene.inks), hits, scene.colours))
    seen = panels_seen(hits, 24)
    assert seen.float().mean() > 0.4 and (inks == scene.inks)[seen].all()


def test_panels_seen_counts_pixels_of_the_best_frame():
    _, viewmats, scene = rooms(2)
    hits = cast(scene.pillars, pixel_cameras(viewmats), intrinsics(K_SQUARE), 16)
    rays = torch.stack([(hits.panel == panel).sum((2, 3)).amax(1) for panel in range(N_PANELS)], dim=1)
    for least in (1, 24):
        assert torch.equal(panels_seen(hits, least), rays >= 4 * least)  # 2x2 rays a pixel


# ---------------------------------------------------------------------------------------------------------- 3. Prompts


def test_words_carry_their_order():
    a, b = encode_words("red left wall"), encode_words("left red wall")
    assert a.shape == (TEXT_LEN, TEXT_DIM) and (a[2] - b[2]).abs().max() > 0.1
    assert torch.equal(a[2, :32], b[2, :32])  # the token's own word comes first


def test_words_are_deterministic_and_case_and_commas_do_not_matter():
    assert torch.equal(encode_words("Red wall, blue floor"), encode_words("red wall blue floor"))


def test_the_empty_prompt_is_all_zero_and_padding_too():
    assert not encode_words("").any()
    rows = encode_words("red left wall").abs().sum(-1)
    assert (rows[:3] > 0).all() and not rows[3:].any()


def test_prompts_that_would_be_cut_are_refused():
    words = [f"word{i}" for i in range(TEXT_LEN)]
    assert encode_words(" ".join(words))[-1].any()
    with pytest.raises(ValueError, match="33 words, expected at most 32"):
        encode_words(" ".join([*words, "more"]))


def test_images_are_videos_of_one_frame(chain, tmp_path):
    """What a base model learns from; scores are of videos."""
    flags = ("--frames", "1", "--count", "4", "--size", "32", "--out", tmp_path / "images")
    assert "`python data.py` makes it" in refusal("data.py", *flags, cwd=tmp_path)
    call("data.py", *flags, cwd=chain)
    data = open_latents(tmp_path / "images", "tiny")
    batch = get_batch(data, 0, 0, (0, 1), 4, CPU)
    assert batch.x0.shape == (4, 1, 16, 4, 4) and data.meta["frames"] == 1
    assert torch.equal(batch.camera.viewmats, torch.eye(4).expand(4, 1, 4, 4))
    base = tmp_path / "base.pt"
    flags = ("--no-camera", "--data", tmp_path / "images", *MINIATURE, *STEADY, "--steps", "1", "--out", base)
    assert "--frames 1" in refusal("train_camera.py", "--no-camera", "--data", "data/images", cwd=tmp_path)
    call("train_camera.py", *flags, cwd=chain)
    assert list(tmp_path.glob("base/sheet-*.png")) and not (tmp_path / "base/scores.jsonl").read_text()  # no path
    short = (*MINIATURE, *STEADY, "--shift", "3", "--sampling-steps", "2", "--steps", "1")
    call("train_camera.py", "--init", base, *short, "--out", tmp_path / "camera.pt", cwd=chain)
    assert load_checkpoint(tmp_path / "camera.pt")[1]["frames"] == 4
    assert "makes images" in refusal("stream.py", "--score", "--ckpt", base, "--vae", "ckpt/vae.pt", cwd=chain)


def test_hy_prompts_bring_their_image(tmp_path):
    """A share of the toy videos comes with its first frame, seen and as latents; the null prompt keeps the image."""
    flags = ("--preset", "tiny-hy", "--count", "24", "--frames", "2", "--size", "32", "--image-share", "0.5")
    call("data.py", *flags, cwd=tmp_path)
    with contextlib.chdir(tmp_path):
        data = open_latents("data/toy")
    batch = get_batch(data, 0, 0, (0, 1), 24, CPU)
    vision, given = batch.prompt.vision, batch.prompt.given_latents
    pictured = vision.flatten(1).any(1)
    assert data.meta["image_share"] == 0.5 and 4 < pictured.sum() < 20
    assert torch.equal(given[pictured, :, :16], batch.x0[pictured, :1]) and given[pictured, :, 16].eq(1).all()
    stored = torch.stack([read_row(data, row)["vision"] for row in batch.ids])
    assert not given[~pictured].any() and torch.equal(stored.float(), vision)
    assert batch.prompt.text_mask.any(1).all() and not batch.null.text_mask.any() and not batch.null.text.any()
    assert torch.equal(batch.null.given_latents, given) and torch.equal(batch.null.vision, vision)
    assert not batch.prompt.byt5_mask.any()  # no writing in the toy world


def test_places_are_seen_where_they_are():
    image = torch.full((1, 3, 32, 32), -1.0)
    image[:, 0, 8:16, 24:32] = 1.0  # the second row's last place, red
    seen = encode_places(image)
    assert seen.shape == (1, 16, 16)
    assert (seen[0, :, :4] == 1).all(1).nonzero().flatten().tolist() == [7] and (seen[0, :, 4:12] == -1).all()
    assert seen[0, 7, 12:].tolist() == pytest.approx([-1 / 3, 1, 1 / 9, 1])


def test_a_prompt_table_pads_with_zeros_and_knows_where():
    rows = [{"text": torch.ones(n, 3), "byt5": torch.ones(0, 2)} for n in (2, 5, 0, 1)]
    prompt, null = collate_prompts(rows[:-1], rows[-1], None, torch.zeros(3, 1, 4), torch.ones(3, 1, 8, 2, 2))
    assert prompt.text.shape == null.text.shape == (3, 5, 3) and not prompt.given_latents.any()
    assert prompt.text_mask.sum(1).tolist() == [2, 5, 0] and null.text_mask.sum(1).tolist() == [1, 1, 1]
    assert torch.equal(prompt.text.any(-1), prompt.text_mask) and not prompt.byt5_mask.any()
    rows = [{"embeds": torch.ones(n, 3)} for n in (2, 4)]
    embeds, nulls = collate_prompts(rows, {"embeds": torch.ones(0, 3)}, 6)
    assert embeds.any(-1).sum(1).tolist() == [2, 4] and embeds.shape == nulls.shape == (2, 6, 3) and not nulls.any()


# ---------------------------------------------------------------------------------------------------------- 4. Latents


@pytest.fixture
def folder(tmp_path):
    """Twelve samples in shards of five and seven; the latents of row i are all i, its prompt is 11 - i."""
    for start, stop in ((0, 5), (5, 12)):
        rows, n = torch.arange(start, stop), stop - start
        tensors = {"latents": repeat(rows.half(), "n -> n 3 2 4 4"), "prompt_ids": 11 - rows,
                   "viewmats": torch.eye(4).repeat(n, 3, 1, 1), "Ks": intrinsics(K_SQUARE).repeat(n, 3, 1, 1)}
        save_file({name: z.contiguous() for name, z in tensors.items()}, tmp_path / f"latents-{start:06d}.safetensors",
                  {"meta": json.dumps({"K": list(K_SQUARE), "frames": 3, "prompt_length": 4})})
    prompts = [{"embeds": torch.full((1 + i % 3, 6), i + 1.0)} for i in range(12)]  # prompt i is all i + 1
    save_prompts(tmp_path / "prompts.safetensors", [*prompts, {"embeds": torch.zeros(0, 6)}],
                 {"prompts": json.dumps([f"prompt {i}" for i in range(12)])})
    return tmp_path


def same(a, b):
    """Batches equal in ids, tensors and the noise their generators draw."""
    tensors = zip((a.x0, a.prompt, a.noise()), (b.x0, b.prompt, b.noise()))
    return a.ids == b.ids and all(torch.equal(*pair) for pair in tensors)


def test_a_batch_holds_the_rows_it_names(folder):
    data = open_latents(folder)
    batch = get_batch(data, 0, 0, (0, 1), 12, CPU)
    assert data.starts == [0, 5, 12] and data.meta["frames"] == 3
    assert batch.x0.shape == (12, 3, 2, 4, 4) and batch.x0.dtype == torch.float32
    prompt_ids = [int(read_row(data, row)["prompt_ids"]) for row in batch.ids]
    assert batch.x0[:, 0, 0, 0, 0].tolist() == batch.ids and prompt_ids == [11 - i for i in batch.ids]
    assert batch.prompt[:, 0, 0].tolist() == [1 + i for i in prompt_ids]
    assert batch.null.shape == (12, 4, 6) and not batch.null.any() and batch.states is None
    assert torch.equal(batch.camera.viewmats, torch.eye(4).repeat(12, 3, 1, 1))
    assert torch.equal(batch.camera.Ks, intrinsics(K_SQUARE).repeat(12, 3, 1, 1))


def test_get_batch_is_a_pure_function(folder):
    data = open_latents(folder)
    first = get_batch(data, 3, 5, (1, 2), 3, CPU)
    get_batch(data, 3, 6, (0, 2), 3, CPU)
    assert same(first, get_batch(open_latents(folder), 3, 5, (1, 2), 3, CPU))


@pytest.mark.parametrize("parts, size", [(1, 12), (3, 4), (2, 3), (3, 2), (1, 1)])
def test_parts_are_disjoint_and_cover_an_epoch(folder, parts, size):
    data, steps = open_latents(folder), 12 // (parts * size)
    for epoch in range(2):
        ids = [i for step in range(epoch * steps, (epoch + 1) * steps) for part in range(parts)
               for i in get_batch(data, 0, step, (part, parts), size, CPU).ids]
        assert sorted(ids) == list(range(12))


def test_epochs_are_shuffled_anew_also_in_the_middle_of_a_step(folder):
    data = open_latents(folder)
    ids = [i for step in range(3) for i in get_batch(data, 0, step, (0, 1), 8, CPU).ids]  # two epochs in three steps
    assert sorted(ids[:12]) == sorted(ids[12:]) == list(range(12)) and ids[:12] != ids[12:]


def test_a_row_is_drawn_as_often_as_its_weight_says(folder):
    data, weights = open_latents(folder), (1.0, 0.5, 2, 1, 1, 1, 1, 0.25, 1, 1, 1, 1.25)  # twelve of twelve, together
    weighted = data._replace(weights=weights)
    epochs = [[i for step in range(3) for i in get_batch(weighted, 0, 3 * n + step, (0, 1), 4, CPU).ids]
              for n in range(200)]
    for row, weight in enumerate(weights):
        counts = [epoch.count(row) for epoch in epochs]
        assert math.floor(weight) <= min(counts) and max(counts) <= math.ceil(weight)
        assert sum(counts) / 200 == pytest.approx(weight, abs=0.1)
    alike, ids = data._replace(weights=(0.3,) * 12), [get_batch(data, 0, step, (0, 1), 4, CPU).ids for step in range(6)]
    assert [get_batch(alike, 0, step, (0, 1), 4, CPU).ids for step in range(6)] == ids


def test_how_a_step_is_split_does_not_change_it(folder):
    # part = rank + world_size * micro: one process with two micro-batches, two ranks with one, or all at once
    data, whole = open_latents(folder), get_batch(open_latents(folder), 0, 7, (0, 1), 4, CPU)
    noise, uniform = whole.noise(), whole.rand(2)
    for parts, size in ((2, 2), (4, 1)):
        split = [get_batch(data, 0, 7, (part, parts), size, CPU) for part in range(parts)]
        assert [i for batch in split for i in batch.ids] == whole.ids
        assert torch.equal(torch.cat([batch.noise() for batch in split]), noise)
        assert torch.equal(torch.cat([batch.rand(2) for batch in split]), uniform)


def test_steps_seeds_and_slots_draw_different_noise(folder):
    data = open_latents(folder)
    draws = [get_batch(data, seed, step, (0, 1), 4, CPU).rand(3) for seed in (0, 1) for step in (0, 1, 3)]
    assert len(torch.cat(draws).unique(dim=0)) == 24
    assert get_batch(data, 0, 0, (0, 1), 12, CPU).ids != get_batch(data, 1, 0, (0, 1), 12, CPU).ids


def test_mixed_seeds_do_not_collide():
    seeds = {mix(seed, 2, step, slot) for seed in range(10) for step in range(100) for slot in range(20)}
    assert len(seeds) == 20_000 and 0 <= min(seeds) and max(seeds) < 2**62


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_latents_that_are_not_finite_are_named(folder, bad):
    file = folder / "latents-000005.safetensors"
    with safe_open(file, "pt") as shard:
        tensors, meta = {name: shard.get_tensor(name) for name in shard.keys()}, shard.metadata()
    tensors["latents"][3, 1, 0, 2, 2] = bad  # row 5 + 3
    save_file(tensors, file, meta)
    with pytest.raises(ValueError, match=re.escape(f"{folder}: ") + ".*row 8 "):
        get_batch(open_latents(folder), 0, 0, (0, 1), 12, CPU)


def remove(file):
    file.unlink()


def truncate(file):
    file.write_bytes(file.read_bytes()[:-10])


def overwrite(file):
    file.write_text("hello")


@pytest.mark.parametrize("damage", [remove, truncate, overwrite])
@pytest.mark.parametrize("name", ["latents-000005", "prompts"])
def test_a_damaged_latents_folder_is_named_in_one_line(folder, name, damage):
    if damage is remove:
        remove(folder / "latents-000000.safetensors")
    damage(folder / f"{name}.safetensors")
    with pytest.raises(ValueError) as error:
        open_latents(folder)
    assert str(error.value).startswith(f"{folder}: ") and "\n" not in str(error.value)


def test_a_missing_latents_folder_names_the_command_that_makes_it(tmp_path):
    with pytest.raises(ValueError, match="python data.py --out"):
        open_latents(tmp_path / "nowhere")


def test_a_contact_sheet_shows_every_fourth_frame_one_strip_per_video(tmp_path):
    truth, made = torch.full((2, 3, 9, 48, 36), -1.0), torch.full((2, 3, 9, 48, 36), 1.0)
    truth[:, 0, 4] = 1.0  # frame 4 is red
    write_sheet(tmp_path / "new" / "sheet.png", [truth, made])
    image = imageio.imread(tmp_path / "new" / "sheet.png")
    assert image.shape == (2 * 2 * (48 + 1) * 2, 3 * 36 * 2, 3) and image.dtype == np.uint8
    strips = image[::2, ::2].reshape(4, 49, 3, 36, 3)  # strip, row, frame, column, colour
    assert torch.equal(*(torch.from_numpy(image[i::2, i::2].copy()) for i in range(2)))  # whole pixels, twice as large
    assert (strips[::2, :48, 0] == 0).all() and (strips[::2, :48, 1] == (255, 0, 0)).all()
    assert (strips[1::2] == 255).all() and (strips[:, 48] == 255).all()  # the line below


@pytest.mark.parametrize("size, shown, most, columns", [
    ((32, 32), (96, 96), 16, 3), ((8, 8), (96, 96), 16, 3), ((96, 64), (96, 64), 16, 3), ((128, 96), (128, 96), 16, 3),
    ((480, 832), (128, 222), 16, 3), ((32, 32), (96, 96), 3, 3), ((32, 32), (96, 96), 2, 2), ((32, 32), (96, 96), 1, 1),
])
def test_a_contact_sheet_fits_a_screen(tmp_path, size, shown, most, columns):
    write_sheet(tmp_path / "sheet.png", [torch.rand(1, 3, 9, *size)], most=most)  # frames 0, 4, 8
    height, width, _ = imageio.imread(tmp_path / "sheet.png").shape
    zoom = shown[0] / size[0] if size[0] < 96 else 1
    assert (height, width) == (shown[0] + zoom, columns * shown[1])


def test_a_contact_sheet_of_large_frames_is_their_average(tmp_path):
    video = torch.zeros(1, 3, 1, 256, 256)
    video[..., ::2] = 0.5  # stripes of one pixel
    write_sheet(tmp_path / "sheet.png", [video])
    image = imageio.imread(tmp_path / "sheet.png")
    assert image.shape == (129, 128, 3) and (image[:128] == round(1.25 * 127.5)).all()


def test_a_full_disk_leaves_the_old_shard(tmp_path):
    path = tmp_path / "latents-000000.safetensors"
    save_shard(path, {"latents": torch.ones(3)}, {})
    _, hard = limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))  # as a disk with 10 kB left
    try:
        with pytest.raises(ValueError, match="could not be written") as error:
            save_shard(path, {"latents": torch.zeros(300_000)}, {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert str(path) in str(error.value) and "\n" not in str(error.value)
    assert [file.name for file in tmp_path.iterdir()] == [path.name] and load_file(path)["latents"].tolist() == [1] * 3
