"""
Latents from videos: toy rooms saved as mp4 files, with every format of poses, against the same rooms rendered directly;
what is wrong with a clip is reported by name; runs that stop, start again or share the work; contact sheets.
"""
import argparse
import json
import math
import shutil
import subprocess
from pathlib import Path

import imageio.v3 as imageio
import pytest
import torch
from einops import rearrange, repeat
from safetensors import safe_open
from safetensors.torch import load_file

from conftest import MINIATURE, call, refusal, run
from data import (
    DOUBTFUL, K_SQUARE, STEP, UNUSABLE, ClipFormat, Encoder, Poses, Scene, action_class, camera_steps, crop_intrinsics,
    draw_path, encode_captions, find_duplicates, find_ffmpeg, frame_positions, get_batch, intrinsics, invert_se3,
    median_step, open_latents, parse_args, parse_trajectory, pixel_cameras, pose_string, poses_at, read_frames,
    read_poses, read_prompts, read_row, render, resize_and_crop, resize_crop_size, sample_frame_indices, sample_toy,
    save_prompts, survey_clip, to_bytes,
)
from model import fresh_weights, load_checkpoint, save_checkpoint
from stream import TOY_PROMPT

COUNT, FRAMES = 16, 4
FLAGS = ("--frames", FRAMES, "--size", 32, "--shard-size", 6)
AWAY = invert_se3(parse_trajectory("d*9,j*7,u*5,i*3"))[-1].double()  # where another world has its origin


def write_mp4(path, video, fps=16, crf=1):
    """video [3 t h w] uint8 -> mp4, colours at full resolution."""
    imageio.imwrite(path, rearrange(video, "c t h w -> t h w c").numpy(), fps=fps, codec="libx264",
                    pixelformat="yuv444p", macro_block_size=1, output_params=["-crf", str(crf)])


def write_table(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def report(out):
    """What the report says, by file and first frame."""
    rows = [json.loads(line) for line in (out / "report.jsonl").read_text().splitlines()]
    return {row["file"] if not row["start"] else (row["file"], row["start"]): row for row in rows}


def tensors(out):
    """All rows of a latents folder."""
    parts = [load_file(file) for file in sorted(out.glob("latents-*.safetensors"))]
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def colmap(folder, c2w, K):
    """COLMAP's two files; images are listed out of order, some have no points."""
    folder.mkdir()
    fx, fy, cx, cy = K
    (folder / "cameras.txt").write_text("# Camera list\n"
                                        f"7 PINHOLE 640 480 {fx * 640} {fy * 480} {cx * 640} {cy * 480}\n")
    lines = []
    for n, pose in enumerate(invert_se3(c2w).double()):
        R, t = pose[:3, :3], pose[:3, 3].tolist()
        w = (1 + R.trace()).sqrt() / 2
        xyz = torch.stack([R[2, 1] - R[1, 2], R[0, 2] - R[2, 0], R[1, 0] - R[0, 1]]) / (4 * w)
        lines.append(f"{n + 1} {w.item()} {' '.join(map(str, [*xyz.tolist(), *t]))} 7 frame {n:03d}.png\n"
                     + ("1.5 2.5 -1 3.0 4.0 17\n" if n % 2 else "\n"))
    (folder / "images.txt").write_text("# Image list\n" + "".join(reversed(lines)))
    return f"{folder.name}/images.txt"


def realestate(path, c2w, K):
    rows = [[n * 33366, *K, 0, 0, *pose[:3].flatten().tolist()] for n, pose in enumerate(invert_se3(c2w).double())]
    path.write_text("https://example.org/v\n" + "".join(" ".join(map(repr, row)) + "\n" for row in rows))
    return path.name


def as_json(path, spec):
    path.write_text(json.dumps(spec))
    return path.name


FORMATS = ("string", "c2w", "w2c", "c2w_opengl", "colmap", "realestate", "worldplay", "worldplay training")


def poses_in(form, path, folder, name):
    """A pose string, as the `poses` and `K` of a row in any of FORMATS; matrices in a world of their own."""
    latent = AWAY @ invert_se3(parse_trajectory(path)).double()
    pixel = AWAY @ invert_se3(pixel_cameras(parse_trajectory(path)[None]))[0].double()  # camera-to-world
    in_pixels = [[K_SQUARE[0] * 960, 0, 480], [0, K_SQUARE[1] * 540, 270], [0, 0, 1]]
    match form:
        case "string":
            return path, list(K_SQUARE)
        case "c2w":
            return {"c2w": pixel.tolist(), "K": [list(K_SQUARE)] * len(pixel)}, None
        case "w2c":
            return as_json(folder / f"{name}.json", {"w2c": invert_se3(latent).tolist()}), list(K_SQUARE)
        case "c2w_opengl":  # y up, z backwards
            flipped = pixel * torch.tensor([1.0, -1, -1, 1])
            return as_json(folder / f"{name}.json", {"c2w_opengl": flipped.tolist(), "K": list(K_SQUARE)}), None
        case "colmap":
            return colmap(folder / name, pixel, K_SQUARE), None
        case "realestate":
            return realestate(folder / f"{name}.txt", pixel, K_SQUARE), None
        case "worldplay":
            entries = {str(n): {"extrinsic": pose, "K": in_pixels} for n, pose in enumerate(latent.tolist())}
            return as_json(folder / f"{name}.json", entries), None
        case "worldplay training":
            w2c = invert_se3(pixel).tolist()
            entries = {str(n): {"w2c": pose, "intrinsic": in_pixels} for n, pose in enumerate(w2c)}
            return as_json(folder / f"{name}.json", entries), None


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    """A folder with a VAE and data/toy, made directly, the same videos as clips/, and data/videos made of those."""
    folder = tmp_path_factory.mktemp("videos")
    call("data.py", "--count", COUNT, "--frames", FRAMES, "--size", 32, cwd=folder)
    (folder / "clips").mkdir()
    prompts, paths, scene = sample_toy(COUNT, 0, FRAMES - 1, held=False)
    rows = []
    for n, video in enumerate(toy_videos()):
        write_mp4(folder / f"clips/{n:02d}.mp4", video)
        poses, K = poses_in(FORMATS[n % len(FORMATS)], paths[n], folder / "clips", f"{n:02d}")
        rows.append({"file": f"{n:02d}.mp4", "caption": prompts[n], "poses": poses} | ({"K": K} if K else {}))
    write_table(folder / "clips/table.jsonl", rows)
    call("data.py", "--videos", "clips", *FLAGS, cwd=folder)
    return folder


def toy_videos():
    """What data.py renders into data/toy [16 3 13 32 32], uint8."""
    _, paths, scene = sample_toy(COUNT, 0, FRAMES - 1, held=False)
    video = render(scene, torch.stack([parse_trajectory(path) for path in paths]), intrinsics(K_SQUARE), 32)
    return to_bytes(video)


def again(toy, out, rows=None, *flags):
    """data.py --videos into another folder; what was seen of the clips is remembered."""
    out.mkdir()
    shutil.copy(toy / "data/videos/survey-0.jsonl", out)
    if rows is not None:
        write_table(toy / f"clips/{out.name}.jsonl", rows)
        flags = ("--table", toy / f"clips/{out.name}.jsonl", *flags)
    call("data.py", "--videos", "clips", "--out", out, *FLAGS, *flags, cwd=toy)
    return tensors(out)


def table(toy):
    return [json.loads(line) for line in (toy / "clips/table.jsonl").read_text().splitlines()]


# -------------------------------------------------------------------------------------- Videos against direct rendering


@pytest.mark.parametrize("form", FORMATS)
def test_every_format_of_poses_gives_the_cameras_of_the_direct_set(toy, form):
    made, direct = tensors(toy / "data/videos"), tensors(toy / "data/toy")
    rows = range(FORMATS.index(form), COUNT, len(FORMATS))
    torch.testing.assert_close(made["viewmats"][rows], direct["viewmats"][rows], atol=1e-6, rtol=0)
    torch.testing.assert_close(made["Ks"][rows], direct["Ks"][rows], atol=1e-6, rtol=0)
    assert made["viewmats"].dtype == made["Ks"].dtype == torch.float32 and (made["scales"] - 1).abs().max() < 1e-5


def test_latents_are_those_of_the_direct_set_but_for_compression(toy):
    made, direct = (tensors(toy / f"data/{name}")["latents"] for name in ("videos", "toy"))
    assert made.shape == direct.shape and made.dtype == direct.dtype
    error = (made.float() - direct.float()).square().mean((1, 2, 3, 4)).sqrt() / direct.float().std()
    other = (made.roll(1, 0).float() - direct.float()).square().mean((1, 2, 3, 4)).sqrt() / direct.float().std()
    assert error.max() < 0.05 and other.min() > 0.3  # 0.03 and 0.9


def test_the_folder_says_what_training_compares(toy):
    made, direct = open_latents(toy / "data/videos"), open_latents(toy / "data/toy")
    compared = {name: value for name, value in direct.meta.items() if name != "prompts"}  # the mark of its table
    own = {"scale": "measured", "negative": "", "encoder": "words", "caption": table(toy)[0]["caption"]}
    assert made.meta == compared | own
    assert made.starts == [0, 6, 12, 16] and made.prompts.metadata()["prompts"] == direct.prompts.metadata()["prompts"]
    assert torch.equal(made.prompts.get_tensor("embeds"), direct.prompts.get_tensor("embeds"))
    assert torch.equal(tensors(toy / "data/videos")["prompt_ids"], torch.arange(COUNT))


def test_a_training_step_sees_no_difference(toy, tmp_path):
    weights = fresh_weights("tiny", camera=True, seed=0)
    for w in weights.values():
        if not w.any():  # output layers start at zero, and nothing would depend on the camera
            torch.nn.init.normal_(w, std=0.05)
    known = {"vae_fingerprint": load_checkpoint(toy / "ckpt/vae.pt")[1]["fingerprint"]}
    meta = {"stage": "camera", "preset": "tiny", "camera": True, "step": 0}
    save_checkpoint(tmp_path / "camera.pt", weights, meta | known)
    metrics = []
    for name in ("videos", "toy"):
        call("train_camera.py", *MINIATURE, "--init", tmp_path / "camera.pt", "--data", f"data/{name}", "--out",
             tmp_path / f"{name}.pt", "--steps", "1", "--sampling-steps", "1", cwd=toy)
        metrics.append(json.loads((tmp_path / name / "metrics.jsonl").read_text()))
    assert metrics[0]["loss"] == pytest.approx(metrics[1]["loss"], rel=2e-3)
    assert metrics[0]["grad_norm"] == pytest.approx(metrics[1]["grad_norm"], rel=2e-2)


def test_a_wider_faster_video_that_starts_late_is_the_same_clip(toy, tmp_path):
    video, path = toy_videos()[3], sample_toy(COUNT, 0, FRAMES - 1, held=False)[1][3]
    c2w = invert_se3(pixel_cameras(parse_trajectory(path)[None]))[0].repeat_interleave(2, 0)
    c2w = torch.cat([c2w[:1].expand(5, 4, 4) @ invert_se3(parse_trajectory("d*5"))[1:], c2w])  # five frames elsewhere
    wide = torch.nn.functional.pad(repeat(video, "c t h w -> c (t r) h w", r=2), (12, 12))
    wide = torch.cat([255 - wide[:, :5], wide], dim=1)
    (tmp_path / "clips").mkdir()
    write_mp4(tmp_path / "clips/wide.mp4", wide, fps=32)
    K = [K_SQUARE[0] * 32 / 56, *K_SQUARE[1:]]
    write_table(tmp_path / "clips/table.jsonl", [
        {"file": "wide.mp4", "caption": "a room", "poses": {"c2w": c2w.tolist()}, "K": K, "start": 5}])
    call("data.py", "--videos", "clips", "--vae", toy / "ckpt/vae.pt", *FLAGS, cwd=tmp_path)
    made, direct = tensors(tmp_path / "data/videos"), tensors(toy / "data/toy")
    torch.testing.assert_close(made["viewmats"][0], direct["viewmats"][3], atol=1e-6, rtol=0)
    torch.testing.assert_close(made["Ks"][0], direct["Ks"][3], atol=1e-6, rtol=0)
    assert (made["latents"][0].float() - direct["latents"][3].float()).std() < 0.05 * direct["latents"].float().std()


def test_contact_sheets_show_the_path_beside_the_frames(toy, capsys):
    call("data.py", "--inspect", "data/videos", cwd=toy)
    assert imageio.imread(toy / "data/videos/inspect-0.png").shape == (8 * 129, (2 + FRAMES) * 128, 3)
    assert len(list((toy / "data/videos").glob("inspect-*.png"))) == 2
    prompts, paths, _ = sample_toy(COUNT, 0, FRAMES - 1, held=False)
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].startswith("the pictures agree with the poses as given in")
    assert lines[2].startswith("row 0: ") and lines[2].endswith(prompts[0]) and "step 0.08 units" in lines[2]


def test_inspect_takes_the_vae_that_is_named(toy, tmp_path):
    shutil.copytree(toy / "data/videos", tmp_path / "videos")
    assert "vae.pt" in refusal("data.py", "--inspect", "videos", cwd=tmp_path)
    call("data.py", "--inspect", "videos", "--vae", toy / "ckpt/vae.pt", cwd=tmp_path)
    assert (tmp_path / "videos/inspect-0.png").exists()


# -------------------------------------------------------------------------------------------------------- What is wrong


@pytest.fixture(scope="module")
def broken(toy):
    """A folder of clips each with one thing wrong, and its report. Returns the folder and {file: reasons expected}."""
    folder = toy / "broken"
    folder.mkdir()
    video, viewmats = toy_videos(), parse_trajectory("w*3")[None]
    room = Scene(*(z[:1] for z in sample_toy(COUNT, 0, FRAMES - 1, held=False)[2]))
    base = to_bytes(render(room, viewmats, intrinsics(K_SQUARE), 32))[0]
    c2w = invert_se3(pixel_cameras(viewmats))[0].double()
    jump, scaled, nan = c2w.clone(), c2w.clone(), c2w.clone()
    jump[6:, 0, 3] += 1
    scaled[:, :3, 3] *= 20
    nan[5, 1, 3] = math.nan
    cut = torch.cat([base[:, :6], 255 - video[1, :, 6:]], dim=1)
    rows, expected = [], {}

    def add(name, video, reason, poses=None, K=K_SQUARE, caption="a room", **how):
        write_mp4(folder / f"{name}.mp4", video, **how)
        poses = poses if poses is not None else {"c2w": c2w.tolist()}
        rows.append({"file": f"{name}.mp4", "caption": caption, "poses": poses, "K": K})
        expected[f"{name}.mp4"] = reason

    add("good", base, None)
    add("truncated", base, "video")
    data = (folder / "truncated.mp4").read_bytes()
    (folder / "truncated.mp4").write_bytes(data[: len(data) // 2])
    rows.append(rows[0] | {"file": "missing.mp4"})
    expected["missing.mp4"] = "video"
    add("short", base[:, :9], "video")
    add("slow", base, "video", fps=8)
    add("no caption", base, "caption", caption=" ")
    add("long caption", base, "caption", caption="word " * 33)
    add("count", base, "poses", {"c2w": c2w[:12].tolist()})
    add("mirrored", base, "poses", {"c2w": (c2w * torch.tensor([-1.0, 1, 1, 1])).tolist()})
    add("nan", base, "poses", {"c2w": nan.tolist()})
    add("string", base, "poses", "w*2,q")
    add("no poses", base, "poses", "nowhere.json")
    add("pixels", base, "intrinsics", K=[485, 485, 480, 270])
    add("no K", base, "intrinsics", K=None)
    add("weightless", base, "weight")
    rows[-1]["weight"] = 0
    add("swapped", base, "skewed", K=[0.505, 0.9, 0.5, 0.5])
    add("jump", base, "jump", {"c2w": jump.tolist()})
    add("scale", base, "scale", {"c2w": scaled.tolist()})
    add("frozen", base[:, :1].expand_as(base), "static")
    add("tripod", base, "static", {"c2w": torch.eye(4).repeat(13, 1, 1).tolist()})
    add("inverted", base, "disagree", {"w2c": c2w.tolist()})
    add("cut", cut, "cut")
    add("dark", (base.float() / 12).byte(), "dark")
    add("bright", (base.float() * 3 + 190).clamp(0, 255).byte(), "bright")
    add("small", base[:, :, ::2, ::2], "small")
    add("copy", base, "duplicate", crf=24)
    add("left out", video[2], "unlisted")
    write_table(folder / "table.jsonl", rows[:-1])
    call("data.py", "--videos", "broken", "--out", "data/broken", *FLAGS, cwd=toy)
    return folder, expected


def test_each_broken_clip_is_in_the_report_with_its_reason(toy, broken):
    found = report(toy / "data/broken")
    assert {file: set(row["reasons"]) for file, row in found.items()} == {
        file: {reason} if reason else set() for file, reason in broken[1].items()}
    assert [file for file, row in found.items() if row["kept"]] == ["good.mp4"]
    assert set(broken[1].values()) == {None, *UNUSABLE, *DOUBTFUL} - {"uncertain"}  # that takes dozens of clips


@pytest.mark.parametrize("file, says", [
    ("missing", "no such file"), ("truncated", "not a video"), ("short", "9 frames at 16 a second"),
    ("slow", "8 frames a second, fewer than --fps 16"), ("no caption", "empty"), ("long caption", "33 words"),
    ("count", "12 poses, but 13 frames: expected 13, or 4"), ("mirrored", "it mirrors"),
    ("nan", "pose 5 is not a rigid transform (SE(3)): it holds NaN"), ("string", "cannot read 'q'"),
    ("no poses", "nowhere.json: no such file"),
    ("pixels", "not pixels"), ("no K", "--K"), ("weightless", "0: expected 0.001 to 1000"),
    ("swapped", "factor of 0.56"), ("jump", "at frame 6 "),
    ("scale", "1.6 units"), ("small", "16x16"), ("copy", "good.mp4"), ("left out", "table.jsonl"),
])
def test_the_report_says_what_was_found(toy, broken, file, says):
    (why,) = report(toy / "data/broken")[f"{file}.mp4"]["reasons"].values()
    assert says in why and "\n" not in why


def test_the_printed_table_counts_and_names_what_was_dropped(toy, broken, tmp_path, capsys):
    shutil.copytree(toy / "data/broken", tmp_path / "out")
    call("data.py", "--videos", "broken", "--out", tmp_path / "out", *FLAGS, cwd=toy)
    out = capsys.readouterr().out
    lines = [line.split() for line in out.splitlines()]
    assert ["all", "27", "1", "1"] in lines and ["unusable", "15", "0", "0"] in lines
    assert "dropped 5: poses, " in out and "dropped 2: static, " in out and "jump.mp4 from 0: jump: at frame 6" in out


def test_doubtful_clips_can_be_kept(toy, broken, tmp_path):
    (tmp_path / "out").mkdir()
    shutil.copy(toy / "data/broken/survey-0.jsonl", tmp_path / "out")
    call("data.py", "--videos", "broken", "--out", tmp_path / "out", "--keep", "dark", "duplicate", *FLAGS, cwd=toy)
    kept = {file: set(row["reasons"]) for file, row in report(tmp_path / "out").items() if row["kept"]}
    assert "dark" in kept.pop("dark.mp4")  # and perhaps too dark to be told from the first
    assert kept == {"good.mp4": set(), "copy.mp4": {"duplicate"}}
    assert len(tensors(tmp_path / "out")["latents"]) == 3


def test_a_class_of_actions_can_be_limited(toy, tmp_path):
    again(toy, tmp_path / "few", None, "--at-most", "1")
    found = report(tmp_path / "few")
    kept = [row["class"] for row in found.values() if row["kept"]]
    assert len(kept) == len(set(kept)) and set(kept) == {row["class"] for row in found.values()}
    assert all(row["kept"] != ("surplus" in row["reasons"]) for row in found.values())


@pytest.mark.parametrize("scale, factors, found", [
    ("0.2", (5, 5), (0.2, 0.2)), ("set", (5, 5), (0.2, 0.2)), ("clip", (5, 7), (0.2, 1 / 7)),
])
def test_translations_are_scaled_and_the_folder_says_how(toy, tmp_path, scale, factors, found):
    rows = [row for row in table(toy) if isinstance(row["poses"], dict)]
    for row, factor in zip(rows, factors, strict=True):
        c2w = row["poses"]["c2w"]
        row["poses"]["c2w"] = [[[*line[:3], factor * line[3]] for line in pose[:3]] + pose[3:] for pose in c2w]
    made, direct = again(toy, tmp_path / scale, rows, "--scale", scale), tensors(toy / "data/toy")["viewmats"][1::8]
    assert all(median_step(z) == pytest.approx(STEP, abs=1e-5) for z in direct)
    torch.testing.assert_close(made["viewmats"], direct, atol=1e-5, rtol=0)
    torch.testing.assert_close(made["scales"], torch.tensor(found), atol=0, rtol=1e-4)
    meta = open_latents(tmp_path / scale).meta
    assert meta["scale"] == (0.2 if scale == "0.2" else scale)
    assert meta.get("factor", found[0]) == pytest.approx(found[0], rel=1e-4)


@pytest.mark.parametrize("text, says", [
    ("[{", "not .jsonl"), ("5", "row 0 needs the columns"), ('{"file": "a.mp4", "caption": "a"}', "row 0 needs"),
    ("", "a list of rows"),
    ('{"file": "a.mp4", "caption": "a", "poses": "w", "start": -1}', "row 0 starts at '-1'"),
])
def test_what_is_no_table_is_refused(toy, tmp_path, text, says):
    (tmp_path / "table.jsonl").write_text(text)
    message = refusal("data.py", "--videos", "clips", "--table", tmp_path / "table.jsonl", cwd=toy)
    assert str(tmp_path / "table.jsonl") in message and says in message


def test_a_table_may_be_a_spreadsheet(toy, tmp_path):
    rows = table(toy)[:1] + table(toy)[2:7:2]
    text = "\ufefffile,caption,poses,K,camera maker\n" + "".join(
        f'{row["file"]},"{row["caption"]}","{row["poses"]}",{" ".join(map(str, row.get("K", [])))},x\n' for row in rows)
    (toy / "clips/table.csv").write_text(text, encoding="utf-8")
    (tmp_path / "csv").mkdir()
    try:
        shutil.copy(toy / "data/videos/survey-0.jsonl", tmp_path / "csv")
        call("data.py", "--videos", "clips", "--table", "clips/table.csv", "--out", tmp_path / "csv", *FLAGS, cwd=toy)
        assert "found 2" in refusal("data.py", "--videos", "clips", cwd=toy)  # which of the two tables?
    finally:
        (toy / "clips/table.csv").unlink()
    assert torch.equal(tensors(tmp_path / "csv")["latents"], tensors(toy / "data/videos")["latents"][[0, 2, 4, 6]])


def test_a_run_that_would_keep_nothing_says_so(toy, tmp_path):
    row = table(toy)[0] | {"caption": ""}
    write_table(tmp_path / "table.jsonl", [row])
    message = refusal("data.py", "--videos", "clips", "--table", tmp_path / "table.jsonl", "--out", tmp_path / "out",
                      *FLAGS, cwd=toy)
    assert "none of 16 clips" in message and not list((tmp_path / "out").glob("*.safetensors"))


@pytest.mark.parametrize("flags", [
    ["--size", "36"], ["--size", "32x"], ["--size", "8x8x8"], ["--size", "32x64"], ["--scale", "0"], ["--scale", "big"],
    ["--keep", "poses"], ["--K", "1", "1"], ["--fps", "0"], ["--at-most", "0"], ["--frames", "0"],
])
def test_bad_flags_are_refused(flags, capsys):
    with pytest.raises(SystemExit):
        parse_args(flags)
    assert flags[0] in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------ Stop, start and share


def same(a, b):
    """Do two files hold the same? (The order of a file's metadata is a matter of chance.)"""
    with safe_open(a, "pt") as one, safe_open(b, "pt") as two:
        assert one.metadata() == two.metadata() and one.keys() == two.keys()
        return all(torch.equal(one.get_tensor(name), two.get_tensor(name)) for name in one.keys())


def stamps(out):
    return {file.name: file.stat().st_mtime_ns for file in out.glob("*.safetensors")}


def test_a_finished_run_makes_nothing_twice(toy, tmp_path, capsys):
    shutil.copytree(toy / "data/videos", tmp_path / "out")
    before, notes = stamps(tmp_path / "out"), (tmp_path / "out/survey-0.jsonl").read_text()
    call("data.py", "--videos", "clips", "--out", tmp_path / "out", *FLAGS, cwd=toy)
    assert stamps(tmp_path / "out") == before and (tmp_path / "out/survey-0.jsonl").read_text() == notes
    assert "16 clips in 3 files, 0 of them new" in capsys.readouterr().out


def test_a_stopped_run_makes_what_is_missing(toy, tmp_path):
    shutil.copytree(toy / "data/videos", tmp_path / "out")
    before, lost = stamps(tmp_path / "out"), "latents-000006.safetensors"
    (tmp_path / "out" / lost).unlink()
    (tmp_path / "out/prompts.safetensors").unlink()
    notes = (tmp_path / "out/survey-0.jsonl").read_text()
    (tmp_path / "out/survey-0.jsonl").write_text(notes[:-100])  # killed while it was written
    call("data.py", "--videos", "clips", "--out", tmp_path / "out", *FLAGS, cwd=toy)
    assert {name for name, stamp in stamps(tmp_path / "out").items() if stamp != before[name]} == {
        lost, "prompts.safetensors"}
    assert all(same(tmp_path / "out" / name, toy / "data/videos" / name) for name in before)


def test_a_full_disk_leaves_the_report_before(toy, tmp_path, monkeypatch):
    shutil.copytree(toy / "data/videos", tmp_path / "out")
    path = tmp_path / "out/report.jsonl"
    before = path.read_bytes()

    def no_space(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", no_space)
    message = refusal("data.py", "--videos", "clips", "--out", tmp_path / "out", *FLAGS, cwd=toy)
    assert message.startswith(f"error: {path}: could not be written") and path.read_bytes() == before


@pytest.mark.parametrize("flags, says", [
    (["--scale", "2", "--keep", "scale"], "made with --scale measured, now 2.0"),
    (["--scale", "set"], "made with --scale measured, now set"), (["--negative", "ugly"], "its negative"),
    (["--fps", "15"], "its fps"), (["--frames", "3"], "its frames is 4, now 3"),
])
def test_shards_of_other_settings_are_refused_by_name(toy, tmp_path, flags, says):
    shutil.copytree(toy / "data/videos", tmp_path / "out")
    before = stamps(tmp_path / "out")
    (tmp_path / "out/report.jsonl").write_text("the earlier run's")
    message = refusal("data.py", "--videos", "clips", "--out", tmp_path / "out", *FLAGS, *flags, cwd=toy)
    assert says in message and stamps(tmp_path / "out") == before
    assert (tmp_path / "out/report.jsonl").read_text() == "the earlier run's"


def test_the_factor_of_a_set_is_that_of_the_clips_that_were_there_first(toy, tmp_path):
    rows = [row for row in table(toy) if isinstance(row["poses"], dict)]
    far = json.loads(json.dumps(rows[1]))
    far["poses"]["c2w"] = [[[*line[:3], 5 * line[3]] for line in pose[:3]] + pose[3:] for pose in far["poses"]["c2w"]]
    again(toy, tmp_path / "out", rows[:1], "--scale", "set")
    first = open_latents(tmp_path / "out").meta["factor"]
    grow(toy, tmp_path / "out", [far], "--scale", "set")  # alone it would be a fifth of that
    assert open_latents(tmp_path / "out").meta["factor"] == first and first == pytest.approx(1, abs=1e-3)
    dry = ("--table", "clips/other.jsonl", "--out", tmp_path / "out", *FLAGS, "--scale", "set", "--dry-run")
    call("data.py", "--videos", "clips", *dry, cwd=toy)
    assert report(tmp_path / "out")[far["file"]]["scale"] == first


def test_a_set_that_holds_poses_made_of_pictures_is_made_again(toy, tmp_path):
    """Its factor is 1, like the flag that takes no such poses."""
    flags = ("--scale", "set", "--keep", *DOUBTFUL)
    again(toy, tmp_path / "out", None, *flags)
    made, data = grow(toy, tmp_path / "out", table(toy), *flags)
    assert data.meta["factor"] == 1 and made == set() and len(data.rows) == COUNT


def test_the_toy_world_does_not_replace_own_videos(toy):
    before = stamps(toy / "data/videos")
    assert "holds videos of your own" in refusal("data.py", "--count", "2", "--out", "data/videos", cwd=toy)
    assert stamps(toy / "data/videos") == before


def test_clips_whose_motion_is_unusual_are_dropped(toy, tmp_path, monkeypatch):
    """One clip has the camera of another; with --keep uncertain it stays, and says how far off it is all the same."""
    import data as module
    monkeypatch.setattr("runpy.run_path", lambda *_, **__: module.main(module.parse_args()))
    monkeypatch.setattr(module, "uncertainties", lambda pairs: {n: (99.0 if n == 2 else 3.0, 5.0) for n, *_ in pairs})
    for keep in False, True:
        again(toy, tmp_path / str(keep), None, *(["--keep", *DOUBTFUL] if keep else []))
        found = [json.loads(line) for line in (tmp_path / f"{keep}/report.jsonl").read_text().splitlines()]
        assert [row["uncertainty"] for row in found[:4]] == [3, 3, 99, 3] and "uncertain" in found[2]["reasons"]
        assert [row["kept"] for row in found[:4]] == [True, True, keep, True]
        assert open_latents(tmp_path / str(keep)).weights == ()  # who is kept is trained on like others


def test_a_clip_is_trained_on_as_often_as_its_row_says(toy, tmp_path):
    """What is said later counts, without anything being encoded again; what cannot be costs the clip alone."""
    rows = [json.loads(line) for line in (toy / "clips/table.jsonl").read_text().splitlines()]
    again(toy, tmp_path / "out", rows)
    assert open_latents(tmp_path / "out").weights == ()
    rows[1]["weight"], rows[2]["weight"], rows[4]["weight"] = 0.5, "3", " "
    made, data = grow(toy, tmp_path / "out", rows)
    assert made == set() and data.weights == (1, 0.5, 3, *[1] * (COUNT - 3))
    for n, bad in enumerate((0, -1, "often", 1e308, [1])):
        rows[n + 5]["weight"] = bad
    _, data = grow(toy, tmp_path / "out", rows)
    assert data.weights == (1, 0.5, 3, *[1] * (COUNT - 8)) and len(data.rows) == COUNT - 5
    found = [json.loads(line) for line in (tmp_path / "out/report.jsonl").read_text().splitlines()]
    assert [[*row["reasons"]] for row in found[5:10]] == [["weight"]] * 5


def test_a_clip_with_two_captions_has_two_weights(toy, tmp_path):
    rows = [json.loads(line) for line in (toy / "clips/table.jsonl").read_text().splitlines()]
    rows.append(rows[0] | {"caption": "a room, seen from inside", "weight": 0.25})
    _, data = grow(toy, tmp_path / "out", rows, "--keep", *DOUBTFUL)
    captions = [caption_of(data, row) for row in data.rows]
    assert [captions[n] for n, weight in enumerate(data.weights) if weight == 0.25] == ["a room, seen from inside"]
    assert sorted(data.weights) == [0.25, *[1] * COUNT]


def grow(toy, out, rows, *flags):
    """data.py on other rows, into what an earlier run made: the files that it wrote, and the folder."""
    write_table(toy / "clips/other.jsonl", rows)
    before = stamps(out)
    call("data.py", "--videos", "clips", "--table", "clips/other.jsonl", "--out", out, *FLAGS, *flags, cwd=toy)
    now = stamps(out)
    return {name for name in now if name.startswith("latents") and now[name] != before.get(name)}, open_latents(out)


def caption_of(data, row):
    return json.loads(data.prompts.metadata()["prompts"])[int(read_row(data, row)["prompt_ids"])]


def test_a_folder_grows_and_no_shard_is_written_twice(toy, tmp_path, capsys):
    """One row more, one less, one of a broken file, one with another caption, in another order."""
    out, rows = tmp_path / "out", table(toy)
    shutil.copytree(toy / "data/videos", out)
    count, K = len(open_latents(out).rows), open_latents(out).meta["K"]
    (toy / "clips/broken.mp4").write_bytes((toy / "clips" / rows[0]["file"]).read_bytes()[:2000])
    changed = rows[4] | {"caption": "called otherwise"}
    others = [rows[0] | {"file": "broken.mp4"}, *rows[:4][::-1], changed, *rows[6:]]  # without the sixth
    made, data = grow(toy, out, others)
    assert made == {"latents-000018.safetensors"} and "1 of them new" in capsys.readouterr().out
    assert len(data.rows) == count - 1 and data.meta["K"] == K
    captions = [caption_of(data, row) for row in data.rows]
    assert sorted(captions) == sorted(row["caption"] for row in others[1:])
    old = [name for name in stamps(toy / "data/videos") if "latents" in name]
    assert all(same(out / name, toy / "data/videos" / name) for name in old)
    report = {row["file"]: row for row in map(json.loads, (out / "report.jsonl").read_text().splitlines())}
    assert not report["broken.mp4"]["kept"]
    made, data = grow(toy, out, rows)  # and back: nothing is made but what was never there
    assert made == set() and sorted(data.rows) == [*range(count)]
    batch = get_batch(data, 0, 0, (0, 1), count, torch.device("cpu"))
    assert sorted(batch.ids) == [*range(count)]
    (toy / "clips/broken.mp4").unlink()


@pytest.mark.slow
def test_two_hundred_clips_grow_by_one(toy, tmp_path, capsys):
    """One row more, one less, one of a file that breaks: one clip is encoded. Training goes on with another folder."""
    prompts, paths, scene = sample_toy(201, 1, FRAMES - 1, held=False)
    videos = to_bytes(render(scene, torch.stack([parse_trajectory(path) for path in paths]), intrinsics(K_SQUARE), 32))
    clips = tmp_path / "clips"
    clips.mkdir()
    for n, video in enumerate(videos):
        write_mp4(clips / f"{n:03d}.mp4", video)
    rows = [{"file": f"{n:03d}.mp4", "caption": prompts[n], "poses": paths[n]} for n in range(201)]
    K = ("--K", *K_SQUARE, "--vae", toy / "ckpt/vae.pt", "--frames", FRAMES, "--size", 32, "--shard-size", 32)
    flags = ("--videos", clips, "--out", tmp_path / "out", *K, "--keep", *DOUBTFUL)

    write_table(clips / "table.jsonl", rows[:200])
    call("data.py", *flags, cwd=tmp_path)
    before = stamps(tmp_path / "out")
    assert len(open_latents(tmp_path / "out").rows) == 200
    (clips / "007.mp4").write_bytes((clips / "007.mp4").read_bytes()[:1500])
    write_table(clips / "table.jsonl", [row for row in rows if row["file"] != "100.mp4"])
    capsys.readouterr()
    call("data.py", *flags, cwd=tmp_path)
    assert "199 clips in 8 files, 1 of them new" in capsys.readouterr().out
    after, data = stamps(tmp_path / "out"), open_latents(tmp_path / "out")
    assert after.keys() - before.keys() == {"latents-000224.safetensors"}
    assert all(after[name] == before[name] for name in before if name.startswith("latents"))
    assert {caption_of(data, row) for row in data.rows} == {prompts[n] for n in range(201) if n not in (7, 100)}

    train = ("train_camera.py", "--no-camera", "--out", tmp_path / "base.pt", *MINIATURE)
    call(*train, "--data", tmp_path / "out", "--steps", "1", cwd=tmp_path)
    call(*train, "--data", toy / "data/videos", "--steps", "2", "--resume", cwd=tmp_path)


def test_a_dry_run_says_the_same_and_encodes_nothing(toy, tmp_path, capsys):
    flags = ("--videos", "clips", "--table", "clips/table.jsonl", "--out", tmp_path / "out", *FLAGS)
    call("data.py", *flags, "--dry-run", "--vae", "nowhere.pt", cwd=toy)
    assert "16 of 16 clips would be kept" in capsys.readouterr().out
    assert report(tmp_path / "out") == report(toy / "data/videos")
    assert {file.name for file in (tmp_path / "out").iterdir()} == {"report.jsonl", "survey-0.jsonl"}


def test_a_caption_may_lie_beside_its_video(toy, tmp_path):
    rows = [{name: value for name, value in row.items() if name != "caption"} for row in table(toy)[:2]]
    beside = (toy / "clips" / rows[0]["file"]).with_suffix(".txt")
    beside.write_text("\ufeffa room,\nseen from inside\n", encoding="utf-8")
    write_table(toy / "clips/other.jsonl", rows)
    call("data.py", "--videos", "clips", "--table", "clips/other.jsonl", "--out", tmp_path / "out", *FLAGS, cwd=toy)
    beside.unlink()
    data = open_latents(tmp_path / "out")
    assert [caption_of(data, row) for row in data.rows] == ["a room, seen from inside"]
    assert data.meta["caption"] == "a room, seen from inside"
    assert report(tmp_path / "out")[rows[1]["file"]]["reasons"] == {"caption": "empty"}


def test_a_network_of_other_videos_is_shown_no_toy_room(toy, tmp_path, capsys):
    """Its prompt is a caption of its own folder, and no sheet has a room for the truth."""
    write_table(toy / "clips/other.jsonl", [table(toy)[0] | {"caption": TOY_PROMPT}])
    flags = ("--videos", "clips", "--table", "clips/other.jsonl", "--vae", "ckpt/vae.pt")
    wide = ("--out", tmp_path / "wide", "--frames", "4", "--size", "32x48", "--keep", *DOUBTFUL)
    call("data.py", *flags, *wide, cwd=toy)
    short = ("--data", tmp_path / "wide", "--steps", "1", *MINIATURE)
    call("train_camera.py", "--no-camera", *short, "--out", tmp_path / "base.pt", cwd=toy)
    call("train_camera.py", "--init", tmp_path / "base.pt", *short, "--out", tmp_path / "camera.pt", cwd=toy)
    call("train_ar.py", "--init", tmp_path / "camera.pt", *short, "--out", tmp_path / "ar.pt", cwd=toy)
    capsys.readouterr()
    call("stream.py", "--ckpt", tmp_path / "ar.pt", "--vae", "ckpt/vae.pt", "--camera", "w", "--sampling-steps", "1",
         "--out", tmp_path / "walk.mp4", cwd=toy)
    assert "explains them best" not in capsys.readouterr().out
    assert imageio.imread(tmp_path / "walk.png").shape[0] < 2 * 32 * 3  # one strip


def test_rows_that_were_dropped_are_not_trained_on(toy, tmp_path):
    out, rows = tmp_path / "out", table(toy)
    shutil.copytree(toy / "data/videos", out)
    _, data = grow(toy, out, rows[8:])
    assert len(data.rows) == 8 and {*get_batch(data, 0, 0, (0, 1), 8, torch.device("cpu")).ids} == {*range(8, 16)}


def test_a_clip_that_cannot_be_encoded_costs_itself_alone(toy, tmp_path, monkeypatch, capsys):
    import data as module
    real, rows = module.read_frames, table(toy)
    spoilt = rows[2]["file"]

    def read(path, survey, *others):
        if path.name == spoilt and "matches" in survey:  # it was looked at: it is to be encoded
            raise ValueError("damaged while nobody looked")
        return real(path, survey, *others)

    monkeypatch.setattr("runpy.run_path", lambda *_, **__: module.main(module.parse_args()))
    monkeypatch.setattr(module, "read_frames", read)
    write_table(toy / "clips/other.jsonl", rows[:5])
    flags = ("--videos", "clips", "--table", "clips/other.jsonl", "--out", tmp_path / "out", *FLAGS)
    call("data.py", *flags, cwd=toy)
    assert "damaged while nobody looked" in capsys.readouterr().out
    assert len(open_latents(tmp_path / "out").rows) == 4
    found = {row["file"]: row for row in map(json.loads, (tmp_path / "out/report.jsonl").read_text().splitlines())}
    assert not found[spoilt]["kept"] and found[spoilt]["reasons"] == {"video": "damaged while nobody looked"}
    monkeypatch.setattr(module, "read_frames", real)
    call("data.py", *flags, cwd=toy)  # mended: it alone is added
    data = open_latents(tmp_path / "out")
    assert len(data.rows) == 5 and len(data.shards) == 2


def test_training_goes_on_with_a_second_folder(toy, tmp_path, capsys):
    """Of other intrinsics and another length: said in a line. Of another size: refused."""
    rows = [row | {"K": [0.7, 0.7, 0.5, 0.5]} for row in table(toy)[:4]]
    write_table(toy / "clips/other.jsonl", rows)
    flags = ("--videos", "clips", "--table", "clips/other.jsonl", "--vae", "ckpt/vae.pt")
    call("data.py", *flags, "--out", tmp_path / "second", "--frames", "3", "--size", "32", "--keep", *DOUBTFUL, cwd=toy)
    call("data.py", *flags, "--out", tmp_path / "large", "--frames", "3", "--size", "48", "--keep", *DOUBTFUL, cwd=toy)
    short = ("--data", "data/videos", "--steps", "1", *MINIATURE)
    call("train_camera.py", "--no-camera", *short, "--out", tmp_path / "base.pt", cwd=toy)
    call("train_camera.py", "--init", tmp_path / "base.pt", *short, "--out", tmp_path / "first.pt", cwd=toy)
    capsys.readouterr()
    more = ("--init", tmp_path / "first.pt", "--steps", "1", *MINIATURE, "--out", tmp_path / "ar.pt")
    call("train_ar.py", "--data", tmp_path / "second", *more, cwd=toy)
    said = capsys.readouterr().out
    assert "has K [0.7" in said and "has frames 3" in said and "goes on with the former" in said
    assert "has size" in refusal("train_ar.py", "--data", tmp_path / "large", *more, cwd=toy)


@pytest.mark.parametrize("make", ["truncate", "foreign"])
def test_shards_of_no_such_run_are_refused_by_name(toy, tmp_path, make):
    shutil.copytree(toy / "data/videos", tmp_path / "out")
    file = tmp_path / "out/latents-000006.safetensors"
    if make == "truncate":
        file.write_bytes(file.read_bytes()[:-10])
    else:
        shutil.copy(toy / "data/toy/latents-000000.safetensors", file)
    message = refusal("data.py", "--videos", "clips", "--out", tmp_path / "out", *FLAGS, cwd=toy)
    assert message.startswith(f"error: {file}: ")


def test_two_processes_write_the_files_of_one(toy, tmp_path):
    done = run("data.py", "--videos", "clips", "--out", tmp_path / "out", *FLAGS, cwd=toy, nproc=2)
    assert done.returncode == 0, done.stderr
    assert all(same(tmp_path / "out" / file.name, file) for file in (toy / "data/videos").glob("*.safetensors"))
    assert report(tmp_path / "out") == report(toy / "data/videos")
    assert all((tmp_path / f"out/survey-{rank}.jsonl").exists() for rank in range(2))


# -------------------------------------------------------------------------------------------------------------- Details


@pytest.mark.parametrize("own, fps, expected", [
    (16, 16, [0, 1, 2, 3, 4]), (30, 15, [0, 2, 4, 6, 8]), (24, 16, [0, 2, 3, 5, 6]), (23.976, 24, [0, 1, 2, 3, 4]),
])
def test_frames_are_chosen_at_even_times(own, fps, expected):
    assert sample_frame_indices(7, own, ClipFormat(2, fps, [32, 32])) == [7 + n for n in expected]


def brightness(n):
    return 20 + 37 * n % 200  # of frame n in a long video, unlike its neighbours'


def write_long(path, moments):
    """A video whose frames are shown at so many milliseconds."""
    raw = b"".join(bytes([brightness(n)]) * (3 * 32 * 32) for n in range(len(moments)))
    shown = "+".join(f"eq(N\\,{n})*{t}" for n, t in enumerate(moments))
    uneven = ["-vf", f"settb=1/1000,setpts={shown}", "-fps_mode", "passthrough", "-enc_time_base", "1/1000"]
    codec = ["libx265", "-x265-params", "open-gop=1:log-level=none"] if path.suffix == ".mov" else ["libx264"]
    between = "0" if path.suffix == ".avi" else "3"
    coded = ["-c:v", *codec, "-pix_fmt", "yuv444p", "-crf", "2", "-g", "40", "-bf", between]
    given = ["-f", "rawvideo", "-pix_fmt", "rgb24", "-s", "32x32", "-r", "50", "-i", "-"]
    command = [find_ffmpeg(), "-v", "error", *given, *(uneven if moments != EVEN else []), *coded, path]
    subprocess.run(command, input=raw, check=True)


EVEN = [20 * n for n in range(400)]


@pytest.mark.slow
@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".avi", ".mov"])
def test_rows_of_a_long_video_are_sought_and_it_is_counted_once(tmp_path, monkeypatch, suffix):
    """The frames that the row starts with, to the frame, wherever the key frames are; and no more than are needed."""
    path, wanted, runs = tmp_path / f"long{suffix}", ClipFormat(3, 25, [32, 32]), []
    write_long(path, EVEN)
    real = subprocess.Popen
    monkeypatch.setattr("data.subprocess.Popen", lambda command, **how: runs.append(command) or real(command, **how))
    for start in (0, 1, 39, 40, 41, 123, 279, 383):
        survey = survey_clip(path, start, wanted)
        assert survey["frames"] == 400 and survey["fps"] == 50 and survey["indices"] == [*range(start, start + 17, 2)]
        found = read_frames(path, survey, [32, 32]).float().mean((1, 2, 3))
        torch.testing.assert_close(found, torch.tensor([*map(brightness, survey["indices"])]).float(), atol=3, rtol=0)
    assert sum("framecrc" in command for command in runs) == 1
    assert sum(command.count("-ss") for command in runs) == (28 if suffix != ".avi" else 0)
    with pytest.raises(ValueError, match="400 frames at 50 a second, --frames 3 at 25 needs 401"):
        survey_clip(path, 384, wanted)


@pytest.mark.slow
def test_a_video_that_does_not_keep_its_pace_is_read_by_its_times(tmp_path):
    """20 ms a frame, then 40: even in time is uneven in frames, and poses with time stamps are where they belong."""
    path, wanted = tmp_path / "uneven.mp4", ClipFormat(3, 25, [32, 32])
    moments = [20 * n if n < 30 else 600 + 40 * (n - 30) for n in range(60)]
    write_long(path, moments)
    survey = survey_clip(path, 20, wanted)
    assert survey["indices"] == [20, 22, 24, 26, 28, 30, 31, 32, 33]
    assert survey["moments"] == [pytest.approx(moments[n] / 1000, abs=1e-4) for n in survey["indices"]]
    found = read_frames(path, survey, [32, 32]).float().mean((1, 2, 3))
    torch.testing.assert_close(found, torch.tensor([*map(brightness, survey["indices"])]).float(), atol=3, rtol=0)
    poses = Poses(torch.eye(4, dtype=torch.float64).repeat(18, 1, 1), seconds=[0.1 * n for n in range(18)])
    shown = dict(zip(survey["indices"], survey["moments"]))
    positions = frame_positions(poses, 60, survey["fps"], None, shown)
    assert positions[4:8] == pytest.approx([20, 25, 30, 32.5], abs=1e-3) and sorted(positions) == positions
    assert frame_positions(poses._replace(seconds=None), 60, survey["fps"], 10, shown) == positions
    with pytest.raises(ValueError, match="does not keep its pace: 1.80 s .* no frame is shown within 40 ms, --fps 25"):
        survey_clip(path, 58, wanted)


@pytest.mark.parametrize("height, width", [(48, 32), (32, 60), (40, 40), (100, 300), (20, 24)])
def test_a_point_of_the_picture_is_where_its_intrinsics_say(height, width):
    # a gradient from -1 to 1 over the picture's width shows, at normalised x, 2 x - 1; a camera with K sees ray X there
    picture = torch.linspace(-1, 1, 2 * width + 1)[1::2].expand(1, 3, height, width)
    K, size = torch.tensor([0.7, 0.8, 0.45, 0.55], dtype=torch.float64), [16, 24]
    cut, (fx, _, cx, _) = resize_and_crop(picture, size), crop_intrinsics(K, height, width, size)
    x = (torch.arange(24) + 0.5) / 24
    before = 0.7 * (x - cx) / fx + 0.45  # where the same ray meets the uncut picture
    torch.testing.assert_close(cut[0, 0, 8, 2:-2], (2 * before - 1)[2:-2].float(), atol=5e-3, rtol=0)
    rows, columns, top, left = resize_crop_size(height, width, size)
    assert rows >= 16 and columns >= 24 and (rows == 16 or columns == 24) and top >= 0 and left >= 0


def test_intrinsics_may_differ_from_frame_to_frame():
    zoom = [[0.5 + n / 100, 0.5, 0.5, 0.5] for n in range(13)]
    poses = Poses(torch.eye(4, dtype=torch.float64).repeat(13, 1, 1), zoom)
    assert poses_at(poses, [*range(13)], [*range(13)])[1][:, 0].tolist() == [k[0] for k in zoom]
    per_latent = Poses(poses.viewmats[::4], zoom[::4])
    found = poses_at(per_latent, frame_positions(per_latent, 13, 16), [*range(13)])[1]
    torch.testing.assert_close(found, torch.tensor(zoom, dtype=torch.float64))
    assert poses_at(poses._replace(K=zoom[:1]), [*range(13)], [0, 5])[1].shape == (2, 4)
    with pytest.raises(ValueError, match="found 5 intrinsics .K., but 13 poses: expected 1 or one each"):
        poses_at(poses._replace(K=zoom[:5]), [*range(13)], [0])


def test_poses_are_per_frame_or_per_latent_frame():
    poses = Poses(parse_trajectory("w*2,w+l").double())
    for frames in (13, 16):
        assert frame_positions(poses, frames, 16) == [0, 4, 8, 12]
    found, _, made = poses_at(poses, [0, 4, 8, 12], [*range(13)])
    torch.testing.assert_close(found.float(), pixel_cameras(poses.viewmats[None].float())[0], atol=1e-6, rtol=0)
    assert torch.equal(found[::4], poses.viewmats) and made == 9
    assert frame_positions(poses, 4, 16) == [0, 1, 2, 3]
    for frames in (12, 17):
        with pytest.raises(ValueError, match=f"4 poses, but {frames} frames"):
            frame_positions(poses, frames, 16)


@pytest.mark.parametrize("line, says", [
    ("0 0.5 0.9", "poses.txt line 1: found 3 numbers"), ("zero 0.5", "poses.txt line 1: .*zero"), ("", "no poses"),
])
def test_bad_realestate_poses_are_named(tmp_path, line, says):
    (tmp_path / "poses.txt").write_text(line)
    with pytest.raises(ValueError, match=says):
        read_poses("poses.txt", tmp_path)


@pytest.mark.parametrize("camera, says", [
    ("1 OPENCV_FISHEYE 640 480 500 500 320 240 0 0 0 0", "undistort"),
    ("1 FISHEYE 640 480 500 500 320 240", "FISHEYE"), ("1 PINHOLE 640 480 500", "PINHOLE"),
    ("2 PINHOLE 640 480 500 500 320 240", "camera 1, of which"), ("1 PINHOLE 640 480 500 500 320 240", None),
    ("1 SIMPLE_PINHOLE 640 480 500 320 240", None),
])
def test_colmap_cameras_must_be_pinholes(tmp_path, camera, says):
    (tmp_path / "images.txt").write_text("1 1 0 0 0 0 0 0 1 a.png\n\n2 1 0 0 0 0 0 -1 1 b.png\n")
    (tmp_path / "cameras.txt").write_text(camera + "\n")
    if says is None:
        viewmats, K, *_ = read_poses("images.txt", tmp_path)
        assert viewmats[1, :3, 3].tolist() == [0, 0, -1] and K == [(500 / 640, 500 / 480, 0.5, 0.5)] * 2
    else:
        with pytest.raises(ValueError, match=says):
            read_poses("images.txt", tmp_path)


@pytest.mark.parametrize("spec", [
    [], 5, {}, {"poses": []}, {"c2w": "here"}, {"w2c": [[1]]}, {"0": {"extrinsic": [[1]]}}, {"0": {"w2c": 1}, "1": 5},
    {"0": {"rotation": 1}},
])
def test_poses_that_cannot_be_read_raise_one_line(tmp_path, spec):
    (tmp_path / "poses.json").write_text(json.dumps(spec))
    with pytest.raises(ValueError) as error:
        read_poses("poses.json", tmp_path)
    assert "\n" not in str(error.value)


def test_steps_are_measured_between_poses():
    length, angle = camera_steps(parse_trajectory("w*2,d+l,j*2"))
    torch.testing.assert_close(length.float(), torch.tensor([STEP, STEP, STEP, 0, 0]), atol=1e-6, rtol=0)
    torch.testing.assert_close(torch.rad2deg(angle).float(), torch.tensor([0.0, 0, 3, 3, 3]), atol=1e-3, rtol=0)
    assert median_step(parse_trajectory("w*2,d+l,j*2")) == pytest.approx(STEP, abs=1e-6)
    assert median_step(parse_trajectory("j*5")) == 0


@pytest.mark.parametrize("path, key", [("w*3,l*2", "w"), ("w+l*2,l", "l"), ("u+k*4,d", "u"), ("dn*2", "dn")])
def test_a_class_is_the_key_pressed_most(path, key):
    assert action_class(parse_trajectory(path)) == key and pose_string(parse_trajectory("w*3,w+l*4")) == "w*3,w+l*4"
    assert action_class(torch.eye(4).repeat(5, 1, 1)) == pose_string(torch.eye(4).repeat(5, 1, 1))[:5] == "still"


def test_duplicates_look_alike_in_all_three_pictures():
    pictures = torch.randn(1500, 3, 64, generator=torch.Generator().manual_seed(0))
    noise = torch.randn(3, 64, generator=torch.Generator().manual_seed(1))
    pictures[1400] = 40 + 7 * (pictures[2] + 0.1 * noise)  # brighter, of more contrast
    pictures[7], pictures[9] = pictures[5] + 0.5 * noise, pictures[5]
    pictures[9, 2] = noise[2]  # ends elsewhere
    pictures[11] = pictures[12] = 5.0  # plain
    assert find_duplicates(pictures.tolist()) == {1400: 2} and find_duplicates([]) == {}


def test_captions_of_an_earlier_run_are_not_encoded_again(tmp_path):
    asked = []

    def encode_text(prompt):
        asked.append(prompt)
        if prompt == "too long":
            raise ValueError("33 words")
        return {"embeds": torch.full((len(prompt), 2), len(asked) / 2)}

    table, log = tmp_path / "prompts.safetensors", tmp_path / "prompts-0.jsonl"
    encoder = Encoder("counting", encode_text, 8, None, "")
    assert encode_captions(["ab", "", "too long"], encoder, [table], log) == {"too long": "33 words"}
    embeds = read_prompts([log], "counting")
    assert asked == ["ab", "", "too long"] and set(embeds) == {"ab", ""}
    save_prompts(table, [embeds["ab"], embeds[""]], {"prompts": '["ab"]', "null": "", "encoder": "counting"})
    assert not encode_captions(["", "ab", "new"], encoder, [tmp_path / "nowhere", table], log)
    assert asked[3:] == ["new"]
    again = read_prompts([table], "counting")
    assert all(torch.equal(again[prompt]["embeds"], embeds[prompt]["embeds"]) for prompt in ("ab", ""))
    encode_captions(["ab"], encoder._replace(name="another"), [table], log)
    assert asked[4:] == ["ab"]


def test_every_flag_says_what_it_does_and_its_default(monkeypatch):
    parsers, parse = [], argparse.ArgumentParser.parse_args
    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", lambda p, argv: parsers.append(p) or parse(p, argv))
    args = parse_args([])
    assert args.size == [64, 64] and args.keep == [] and args.image_share == 0.25
    assert all(action.help for action in parsers[0]._actions)
    assert "videos to render (default: 6144)" in parsers[0].format_help()


def test_a_path_is_drawn_from_above():
    right, ahead = (draw_path(parse_trajectory(f"{key}*6"), intrinsics(K_SQUARE), 64, 96) for key in "dw")
    red, blue = (lambda p: (p[0] > 0.5).nonzero().float().mean(0)), (lambda p: (p[2] > 0.8).nonzero().float().mean(0))
    assert red(right)[1] > blue(right)[1] + 10 and red(ahead)[0] < blue(ahead)[0] - 10  # rightwards; up the page
    up, ahead = (draw_path(parse_trajectory(f"{key}*6"), intrinsics(K_SQUARE), 64, 96, side=True) for key in "uw")
    assert red(up)[0] < blue(up)[0] - 10 and red(ahead)[1] > blue(ahead)[1] + 10  # up the page; rightwards
