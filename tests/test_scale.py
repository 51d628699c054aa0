"""
What long runs on many ranks rest on. Ranks: sharded, within nodes and between them, a video shared by several, blocks
run again for backward: the numbers of one process. Runs: killed, terminated, resumed on other ranks and with other
flags, two at once, on a full disk. And what a run leaves beside its checkpoint.
"""
import contextlib
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from functools import cache
from pathlib import Path

import imageio.v3 as imageio
import pytest
import scale_worker
import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from scale_worker import KINDS, make_batch, make_net
from test_stages import SOURCES, distance, rows, train

import data
import model
from conftest import ENVIRONMENT, MINIATURE, SCRIPTS, STAGES, call, command, free_port, refusal, start, start_ranks
from data import (
    K_SQUARE, Clip, ClipFormat, control_margin, find_vae, intrinsics, log_prompt, open_latents, open_log,
    parse_trajectory, render, sample_toy, save_prompts, survey_clips, write_log, write_sheet,
)
from helpers import made_from
from model import load_checkpoint, lock_folder, point_to, save_checkpoint, start_process_group

# ---------------------------------------------------------------------------------------------------------------- Ranks


LAUNCHES = {  # nodes, processes on each, and what they compute
    "2 ranks": (1, 2, ("--sp", "1", "2", "--recompute")), "4 ranks": (1, 4, ("--sp", "1", "2", "4")),
    "2 nodes of 2": (2, 2, ("--sp", "1", "2")), "4 ranks, weights over 2": (1, 4, ("--sp", "2", "--shard-over", "2")),
    "2 nodes, weights over 4": (2, 2, ("--sp", "1", "--shard-over", "4")),
}
MESHES = {"2 ranks": {"shard": 2}, "4 ranks": {"shard": 4}, "2 nodes of 2": {"replicate": 2, "shard": 2},
          "4 ranks, weights over 2": {"replicate": 2, "shard": 2}, "2 nodes, weights over 4": {"shard": 4}}


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """Of a launch, what its ranks computed: {sp: {name: tensor}}."""
    @cache
    def launch(name):
        (nodes, count, flags), out = LAUNCHES[name], tmp_path_factory.mktemp("ranks") / "found.pt"
        torchrun = (sys.executable, "-m", "torch.distributed.run", "--nnodes", nodes, "--nproc_per_node", count,
                    "--master_addr", "127.0.0.1", "--master_port", free_port(), "--node_rank")
        agents = [subprocess.Popen([*map(str, (*torchrun, node, scale_worker.__file__, out, *flags))], env=ENVIRONMENT)
                  for node in range(nodes)]
        assert [agent.wait() for agent in agents] == [0] * nodes
        return torch.load(out)

    return launch


@pytest.fixture(scope="module")
def alone():
    """The same of one process whose networks are not sharded."""
    return scale_worker.compute()


def far(found, expected, bound=1e-5):
    """Names of the tensors that differ by more than `bound` of the largest value of what is expected."""
    assert expected.keys() <= found.keys()
    return [name for name, z in expected.items() if not (found[name] - z).abs().max() <= bound * z.abs().max()]


@pytest.mark.slow
@pytest.mark.parametrize("launch, sp", [(name, sp) for name, sps in (
    ("2 ranks", (1, 2)), ("4 ranks", (1, 2, 4)), ("2 nodes of 2", (1, 2)), ("4 ranks, weights over 2", (2,)),
    ("2 nodes, weights over 4", (1,))) for sp in sps])
def test_ranks_compute_what_one_process_computes(alone, results, launch, sp):
    """Loss and gradient of every stage's step, weights after three steps, a guided rollout with its caches."""
    found = results(launch)
    assert found["mesh"] == MESHES[launch]
    assert not far(found[sp], alone) and all(z.abs().max() > 0 for z in alone.values())
    for kind in KINDS:  # ranks that share a video have made the same one
        for rank in range(1, sp):
            video = found[sp][f"{kind}, rollout: video of rank {rank} among those that share it"]
            assert torch.equal(video, found[sp][f"{kind}, rollout: video"])


@pytest.mark.slow
def test_micro_batches_compute_what_ranks_compute(alone, results):
    for accum in 2, 4:
        assert not far(scale_worker.compute(accum), alone)
    assert not far(results("2 ranks")[1], scale_worker.compute(2))
    other = scale_worker.compute(2) | {"wan, ar: loss": alone["wan, ar: loss"] * (1 + 2e-5)}
    assert far(other, alone) == ["wan, ar: loss"]  # so much would show


@pytest.mark.slow
def test_blocks_run_again_for_backward_change_no_bit(results):
    found = results("2 ranks")
    assert found[2].keys() == found["recompute"].keys()
    assert all(torch.equal(found["recompute"][name], z) for name, z in found[2].items())


@pytest.fixture
def group():
    yield start_process_group()
    dist.destroy_process_group()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("recompute, trained, passes", [(True, True, 2), (False, True, 1), (True, False, 1)])
def test_trained_blocks_run_again_if_the_preset_says_so(group, kind, recompute, trained, passes):
    net, calls = make_net(kind, 0, recompute, train=trained), []
    for block in net.blocks:
        layer = block.ffn if kind == "wan" else block["img_mlp"]
        layer.register_forward_hook(lambda *_: calls.append(1))
    batch = make_batch(kind, 0, (0, 1))
    x_t = batch.x0.requires_grad_()
    net(x_t, batch.generated, batch.prompt, batch.camera, clean=batch.x0, chunk=2).sum().backward()
    assert len(calls) == passes * len(net.blocks)
    assert net.state_dict().keys() == KINDS[kind][0](KINDS[kind][1]).state_dict().keys()  # no parameter is renamed


def test_large_presets_run_their_blocks_again():
    again = {name for name, preset in model.PRESETS.items() if preset.dit.recompute}
    assert again == {"wan-1.3b", "wan-14b", "hy-8b"}


@pytest.mark.parametrize("kind, heads, side, ranks, found", [
    ("wan", 4, 4, 3, "4 heads or tokens"), ("hy", 4, 4, 3, "16 heads or tokens"),
    ("wan", 4, 8, 8, "4 heads"), ("hy", 4, 4, 8, "4 heads or tokens"), ("wan", 2, 4, 4, "2 heads"),
    ("wan", 6, 4, 4, "6 heads"),  # whose width 4 does divide
])
def test_heads_or_tokens_that_ranks_cannot_share_are_refused(monkeypatch, kind, heads, side, ranks, found):
    net_type, cfg = KINDS[kind]
    net, batch = net_type(replace(cfg, heads=heads, dim=24 * heads)), make_batch(kind, 0, (0, 1))
    x_t = batch.x0.repeat(1, 1, 1, side // 4, side // 4)
    monkeypatch.setattr(model, "sequence_rank", lambda: (0, ranks))
    with pytest.raises(ValueError) as error:
        net(x_t, batch.generated, batch.prompt, batch.camera)
    assert str(error.value).startswith(f"--sp {ranks}: {found}") and "\n" not in str(error.value)


@pytest.mark.parametrize("flag", ["--sp", "--shard-over"])
def test_ranks_that_a_flag_does_not_divide_are_refused(tmp_path, flag):
    assert refusal("train_ar.py", flag, "2", cwd=tmp_path) == (
        f"error: {flag} 2: 1 processes cannot be cut into groups of 2")


@pytest.mark.parametrize("sp, found", [("2", "3 processes cannot be cut"), ("3", "4 heads or tokens of a frame")])
def test_every_rank_refuses_in_one_line(chain, tmp_path, sp, found):
    flags = (*MINIATURE, *SCRIPTS["ar"][1:], "--sp", sp, "--out", tmp_path / "ar.pt")
    finish(*start_ranks(3, tmp_path / "log", "train_ar.py", *flags, cwd=chain), code=1)
    for rank in range(3):
        log = (tmp_path / f"log.{rank}").read_text()
        assert log.count(f"error: --sp {sp}: {found}") == 1 and "Traceback" not in log


@pytest.mark.parametrize("stage", ("camera", "ar", "dmd"))
def test_a_stage_whose_videos_are_shared_takes_the_same_step(chain, tmp_path, stage):
    script, *short = SCRIPTS[stage]
    flags = (*MINIATURE, *short, "--steps", "1", "--ema-decay", "0")
    finish(*start_ranks(2, tmp_path / "log", script, *flags, "--sp", "2", "--out", tmp_path / "shared.pt", cwd=chain))
    call(script, *flags, "--out", tmp_path / "alone.pt", cwd=chain)
    shared, alone = (rows(tmp_path / f"{name}/metrics.jsonl")[0] | {"sec": 0} for name in ("shared", "alone"))
    assert shared == pytest.approx(alone, rel=1e-4)
    check_same_update(tmp_path / "shared.pt", tmp_path / "alone.pt", chain / f"ckpt/{SOURCES[stage]}.pt")


def test_shared_videos_make_the_same_pairs(chain, tmp_path):
    flags = ("--generate", "--pairs-count", "2", "--batch-size", "2", "--teacher-steps", "4", "--pairs")
    finish(*start_ranks(2, tmp_path / "log", "distill_ode.py", *flags, tmp_path / "shared", "--sp", "2", cwd=chain))
    call("distill_ode.py", *flags, tmp_path / "alone", cwd=chain)
    shared, alone = (load_file(tmp_path / name / "latents-000000-000.safetensors") for name in ("shared", "alone"))
    assert len(list((tmp_path / "shared").glob("latents-*"))) == 1
    torch.testing.assert_close(shared, alone, atol=1e-2, rtol=1e-2)  # fp16 on disk


def check_same_update(path, other, start):
    """One step from `start` has led both to the same weights, to rounding. Adam's first steps are the sign of a
    gradient that may itself be rounding, so no bound on single weights would do: the update is compared as a whole."""
    (weights, _), (others, _), (before, _) = map(load_checkpoint, (path, other, start))
    moved = distance({name: w for name, w in others.items() if name in before}, before)
    assert moved > 0 and distance(weights, others) < 1e-3 * moved


# ---------------------------------------------------------------------------------------------------------------- Kills


def finish(*processes, code=0):
    for process in processes:
        process.join(300)
    assert [process.exitcode for process in processes] == [code] * len(processes)


def wait_for(condition, *processes):
    """Polls fast: what is waited for may be there for milliseconds."""
    patience = time.time() + 120
    while not condition():
        assert all(process.is_alive() for process in processes) and time.time() < patience
        time.sleep(0.001)


def steps_logged(folder):
    path = folder / "metrics.jsonl"
    return path.read_text().count("\n") if path.exists() else 0


def check_same_run(path, other):
    """Weights, meta, metrics and scores, bit for bit; nothing half-written is left."""
    (weights, meta), (others, expected) = load_checkpoint(path), load_checkpoint(other)
    assert meta == expected and all(torch.equal(weights[name], w) for name, w in others.items())
    for name in "metrics.jsonl", "scores.jsonl":
        found, right = (rows(run.with_suffix("") / name) for run in (path, other))
        assert [row | {"sec": 0} for row in found] == [row | {"sec": 0} for row in right]
    found, right = ({file.name for file in run.with_suffix("").iterdir()} for run in (path, other))
    assert found == right and not [name for name in found if name.endswith(".tmp")]


def written_since(folder, pattern, since):
    """Files of a pattern; one may vanish while it is looked at."""
    for path in folder.glob(pattern):
        with contextlib.suppress(FileNotFoundError):
            if path.stat().st_mtime > since:
                yield path


def is_complete(state):
    return (state / ".metadata").exists()


MOMENTS = {  # of a save: has one begun since the run did?
    "in a checkpoint": lambda folder, since: any(written_since(folder, "step-*.pt.tmp", since)),
    "before its state": lambda folder, since: any(
        not is_complete(folder / path.stem.replace("step", "state"))
        for path in written_since(folder, "step-*.pt", since)),
    "in a state": lambda folder, since: any(
        not is_complete(path) for path in written_since(folder, "state-*", since)),
}


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
def test_a_run_killed_five_times_resumes_bit_exactly(chain, tmp_path, stage):
    """Three times in a save, twice at random, one run after the other; each goes on from what the last one left."""
    script, *short = SCRIPTS[stage]
    flags = (*MINIATURE, *short, "--batch-size", "1", "--steps", "7", "--save-every", "1", "--state-every", "1")
    whole, killed = (tmp_path / name / f"{stage}.pt" for name in ("whole", "killed"))
    began = time.time()
    finish(start(tmp_path / "log", script, *flags, "--out", whole, cwd=chain))
    pace, folder, rng = (time.time() - began) / 7, killed.with_suffix(""), random.Random(stage)
    moments = [*MOMENTS.values(), None, None]
    rng.shuffle(moments)
    for moment in [*moments, "end"]:
        resume = ["--resume"] if any(map(is_complete, folder.glob("state-*"))) else []
        log, since = tmp_path / f"log of {len(list(tmp_path.iterdir()))}", time.time()
        process = start(log, script, *flags, *resume, "--out", killed, cwd=chain)
        if moment == "end":
            break
        wait_for(lambda: log.exists() and "of 7" in log.read_text(), process)  # it has read what was left
        if moment is None:
            time.sleep(rng.uniform(0, 1.5 * pace))
        else:
            wait_for(lambda: moment(folder, since), process)
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL
    finish(process)
    check_same_run(killed, whole)


@pytest.mark.parametrize("stage", ("ar", "dmd"))
def test_a_terminated_run_saves_and_resumes_bit_exactly(chain, tmp_path, stage):
    script, *short = SCRIPTS[stage]
    asked, whole = (tmp_path / name / f"{stage}.pt" for name in ("asked", "whole"))
    process = start(tmp_path / "log", script, *MINIATURE, *short, "--steps", "1000", "--out", asked, cwd=chain)
    wait_for(lambda: steps_logged(asked.with_suffix("")) >= 2, process)
    process.terminate()
    finish(process)
    reached = load_checkpoint(asked)[1]["step"]
    assert 2 <= reached == steps_logged(asked.with_suffix("")) < 1000
    assert is_complete(asked.with_suffix("") / f"state-{reached:06d}")
    for path, *resume in (asked, "--resume"), (whole,):
        train(stage, "--out", path, "--steps", reached + 1, *resume, cwd=chain)
    (resumed, _), (uninterrupted, _) = load_checkpoint(asked), load_checkpoint(whole)
    assert all(torch.equal(resumed[name], w) for name, w in uninterrupted.items())
    found, right = (rows(path.with_suffix("") / "metrics.jsonl") for path in (asked, whole))
    assert [row | {"sec": 0} for row in found] == [row | {"sec": 0} for row in right]


def test_ranks_end_together_when_one_of_them_is_terminated(chain, tmp_path):
    script, *short = SCRIPTS["ar"]
    flags, asked, whole = (*MINIATURE, *short, "--batch-size", "1"), tmp_path / "asked/ar.pt", tmp_path / "whole/ar.pt"
    line = command(script, *flags, "--steps", "1000", "--out", asked, nproc=2)
    with open(tmp_path / "log", "w") as log, subprocess.Popen(
            line, cwd=chain, env=ENVIRONMENT, stdout=log, stderr=log) as torchrun:
        try:
            wait_for(lambda: steps_logged(asked.with_suffix("")) >= 2)
            ranks = Path(f"/proc/{torchrun.pid}/task/{torchrun.pid}/children").read_text().split()
            rank_1, = set(ranks) - {(asked.with_suffix("") / "lock").read_text()}
            os.kill(int(rank_1), signal.SIGTERM)
            assert torchrun.wait(120) == 0
        finally:
            torchrun.kill()
    reached = load_checkpoint(asked)[1]["step"]
    assert is_complete(asked.with_suffix("") / f"state-{reached:06d}")
    for path, *resume in (asked, "--resume"), (whole,):
        goal = ("--steps", reached + 1, "--out", path, *resume)
        finish(*start_ranks(2, tmp_path / "log", script, *flags, *goal, cwd=chain))
    (resumed, meta), (uninterrupted, _) = load_checkpoint(asked), load_checkpoint(whole)
    assert meta["step"] == reached + 1 and all(torch.equal(resumed[name], w) for name, w in uninterrupted.items())


def test_a_terminated_run_that_has_nothing_to_save_ends_at_once(chain, tmp_path):
    flags = ("--generate", "--pairs-count", "100", "--batch-size", "1", "--teacher-steps", "4", "--pairs")
    goal = (tmp_path / "ode", "--out", tmp_path / "ode.pt")
    process = start(tmp_path / "log", "distill_ode.py", *flags, *goal, cwd=chain)
    wait_for(lambda: any((tmp_path / "ode").glob("latents-*.safetensors")), process)
    process.terminate()
    finish(process, code=-signal.SIGTERM)


def test_only_a_run_that_asks_whether_to_stop_takes_the_signal():
    before = signal.signal(signal.SIGTERM, signal.SIG_DFL)
    try:
        start_process_group()
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
        assert not model.stopping()
        os.kill(os.getpid(), signal.SIGTERM)
        assert not model.stopping() and model.STOP == {"asked"}  # until all ranks know
        model.check_finite(1, {"loss": torch.ones(())}, [])
        assert model.stopping()
    finally:
        signal.signal(signal.SIGTERM, before)
        dist.destroy_process_group()


def test_a_second_run_of_one_out_is_refused_while_the_first_lives(chain, tmp_path):
    script, *short = SCRIPTS["ar"]
    flags = (*MINIATURE, *short, "--out", tmp_path / "ar.pt", "--steps")
    process = start(tmp_path / "log", script, *flags, "1000", cwd=chain)
    wait_for(lambda: steps_logged(tmp_path / "ar") >= 1, process)
    for resume in [], ["--resume"]:
        message = refusal(script, *flags, "9", *resume, cwd=chain)
        assert message.startswith(f"error: {tmp_path / 'ar'}: another run is writing here (process {process.pid})")
    before = steps_logged(tmp_path / "ar")
    wait_for(lambda: steps_logged(tmp_path / "ar") > before, process)  # which it did not notice
    process.kill()
    process.join()
    call(script, *flags, "1", cwd=chain)
    assert [row["step"] for row in rows(tmp_path / "ar/metrics.jsonl")] == [1]


# ----------------------------------------------------------------------------------------------------------- Full disks


def no_space(*_, **__):
    raise OSError(28, "No space left on device")


needs_dev_full = pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full, a disk without room")


@contextlib.contextmanager
def disk_left(size):
    """As a disk on which no file can grow past `size` bytes."""
    _, hard = limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def says(error, path):
    message = str(error.value)
    return message.startswith(f"{path}: could not be written") and "\n" not in message


@pytest.mark.parametrize("size, file", [(5_000_000, "step-000003.pt"), (20_000_000, "state-000003")])
def test_a_full_disk_stops_a_run_and_leaves_what_was_there(chain, tmp_path, size, file):
    """A checkpoint has 12 MB, a state 47."""
    shutil.copytree(chain / "ckpt/ar", tmp_path / "ar")
    shutil.copy(chain / "ckpt/ar.pt", tmp_path)
    script, *short = SCRIPTS["ar"]
    flags = (*MINIATURE, *short, "--out", tmp_path / "ar.pt", "--steps", "3", "--resume")
    with disk_left(size):
        message = refusal(script, *flags, cwd=chain)
    assert message.startswith(f"error: {tmp_path / 'ar' / file}: could not be written") and "untouched" in message
    assert load_checkpoint(tmp_path / "ar.pt")[1]["step"] == (2 if file.endswith("pt") else 3)
    assert is_complete(tmp_path / "ar/state-000002")
    for path, *resume in (tmp_path / "ar.pt", "--resume"), (tmp_path / "whole.pt",):  # with room again, it goes on
        train("ar", "--out", path, "--steps", "3", *resume, cwd=chain)
    resumed, whole = (load_checkpoint(tmp_path / f"{name}.pt")[0] for name in ("ar", "whole"))
    assert all(torch.equal(resumed[name], w) for name, w in whole.items())
    assert [path.name for path in (tmp_path / "ar").glob("state-*")] == ["state-000003"]


def test_a_full_disk_leaves_the_state_before(group, tmp_path, monkeypatch):
    """run.json is written first; then the step is saved again, where half of it is."""
    nets, run = {"net": torch.nn.Linear(2, 2)}, {"weights": {}, "flags": {}, "videos per step": 1}
    model.save_state(tmp_path, 1, nets, {}, run)
    with pytest.raises(ValueError) as error, monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", no_space)
        model.save_state(tmp_path, 2, nets, {}, run)
    assert says(error, tmp_path / "state-000002") and "untouched" in str(error.value)
    assert model.load_state(tmp_path, nets, {}, run) == 1
    model.save_state(tmp_path, 2, nets, {}, run)
    assert model.load_state(tmp_path, nets, {}, run) == 2 and not (tmp_path / "state-000001").exists()


@pytest.mark.parametrize("fails", [("copy",), ("link", "copy"), ("link", "replace")])
def test_a_full_disk_leaves_the_checkpoint_that_a_name_pointed_to(tmp_path, monkeypatch, fails):
    old, new, name = (tmp_path / file for file in ("step-000001.pt", "step-000002.pt", "ar.pt"))
    old.write_text("old"), new.write_text("new")
    point_to(name, old)
    for call_of in fails:
        monkeypatch.setattr(shutil if call_of == "copy" else os, call_of, no_space)
    if fails == ("copy",):  # which nobody needs where there are links
        point_to(name, new)
        assert name.samefile(new)
        return
    with pytest.raises(ValueError) as error:
        point_to(name, new)
    assert says(error, name) and "untouched" in str(error.value)
    assert name.samefile(old) and sorted(os.listdir(tmp_path)) == ["ar.pt", old.name, new.name]


def test_where_there_are_no_links_a_checkpoint_is_copied(tmp_path, monkeypatch):
    old, new, name = (tmp_path / file for file in ("step-000001.pt", "step-000002.pt", "ar.pt"))
    old.write_text("old"), new.write_text("new")
    point_to(name, old)
    monkeypatch.setattr(os, "link", no_space)
    point_to(name, new)
    assert name.read_text() == "new" and not name.samefile(new) and old.read_text() == "old"


@needs_dev_full
@pytest.mark.parametrize("name, write", [
    ("metrics.jsonl", lambda path: write_log(path, {"step": 1})),
    ("scores.jsonl", lambda path: write_log(path, {"step": 1, "control_margin": 0.0})),
    ("sheet-000001.png.tmp", lambda path: write_sheet(path.with_suffix(""), [torch.zeros(1, 3, 1, 32, 32)])),
    ("prompts-0.jsonl", lambda path: log_prompt(path, "words", "a room", {"embeds": torch.ones(3, 6)})),
    ("prompts-0.f16", lambda path: log_prompt(path.with_suffix(".jsonl"), "words", "", {"embeds": torch.ones(3, 6)})),
])
def test_what_does_not_fit_on_a_full_disk_is_named(tmp_path, name, write):
    (tmp_path / name).symlink_to("/dev/full")
    with pytest.raises(ValueError) as error:
        write(tmp_path / name)
    assert says(error, tmp_path / name.removesuffix(".tmp")) and not (tmp_path / "sheet-000001.png").exists()


def test_a_survey_that_does_not_fit_on_a_full_disk_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr("data.survey_clip", lambda *_: {"matches": []})
    clips = 2 * [Clip("none.mp4", 0, "a room", "w", None)]
    (tmp_path / "none.mp4").touch()
    with disk_left(0), pytest.raises(ValueError) as error:
        survey_clips(clips, tmp_path, tmp_path, 1, 2, ClipFormat(4, 16, [32, 32]))  # rank 1 draws no bar
    assert says(error, tmp_path / "survey-1.jsonl")


def test_a_full_disk_leaves_the_log_as_it_was(group, tmp_path, monkeypatch):
    (tmp_path / "ar").mkdir()
    (tmp_path / "ar/metrics.jsonl").write_text('{"step": 1}\n{"step": 2}\n')
    monkeypatch.setattr(Path, "write_text", no_space)
    with pytest.raises(ValueError) as error:
        open_log(tmp_path / "ar.pt", 1, 9)
    assert says(error, tmp_path / "ar/metrics.jsonl")
    assert [row["step"] for row in rows(tmp_path / "ar/metrics.jsonl")] == [1, 2]


def test_a_full_disk_on_which_a_folder_cannot_be_locked_is_named(group, tmp_path):
    with disk_left(0), pytest.raises(ValueError) as error:
        lock_folder(tmp_path / "ar.pt")
    assert says(error, tmp_path / "ar/lock")


def test_a_disk_that_has_no_locks_is_not_taken_for_another_run(group, tmp_path, monkeypatch):
    monkeypatch.setattr("fcntl.flock", no_space)
    with pytest.raises(ValueError) as error:
        lock_folder(tmp_path / "ar.pt")
    assert says(error, tmp_path / "ar/lock")


@pytest.mark.parametrize("line", ['{"step": 1', '{"loss": 1.0}', "1", "[1]", '{"step": null}', "\0\0\0"])
def test_a_log_that_is_none_is_named_and_left(group, tmp_path, line):
    (tmp_path / "ar").mkdir()
    (tmp_path / "ar/scores.jsonl").write_text(f"{line}\n")
    with pytest.raises(ValueError) as error:
        open_log(tmp_path / "ar.pt", 1, 9)
    assert str(error.value).startswith(f"{tmp_path / 'ar/scores.jsonl'}: ") and "\n" not in str(error.value)
    assert (tmp_path / "ar/scores.jsonl").read_text() == f"{line}\n"


def test_a_full_disk_leaves_the_old_prompts(tmp_path):
    path, row = tmp_path / "prompts.safetensors", {"embeds": torch.ones(3, 6)}
    save_prompts(path, [row], {})
    with disk_left(10_000), pytest.raises(ValueError) as error:
        save_prompts(path, [{"embeds": torch.zeros(300_000, 6)}], {})
    assert says(error, path) and os.listdir(tmp_path) == [path.name]
    assert load_file(path)["embeds_ends"].tolist() == [3]


def test_a_full_disk_leaves_the_pairs_that_were_made(chain, tmp_path):
    flags = ("--generate", "--batch-size", "1", "--teacher-steps", "4", "--pairs", tmp_path / "ode", "--pairs-count")
    call("distill_ode.py", *flags, "1", cwd=chain)
    before = {path: path.read_bytes() for path in (tmp_path / "ode").iterdir()}
    with disk_left(10_000):
        message = refusal("distill_ode.py", *flags, "2", cwd=chain)
    assert message.startswith(f"error: {tmp_path / 'ode/latents-000001-000.safetensors'}: could not be written")
    assert {path: path.read_bytes() for path in (tmp_path / "ode").iterdir()} == before


# --------------------------------------------------------------------------------------------------------------- Resume


def test_a_state_of_two_ranks_goes_on_with_one_two_or_four(chain, tmp_path):
    script, *short = SCRIPTS["ar"]
    flags = (*MINIATURE, *short, "--batch-size", "1", "--ema-decay", "0")
    goal = ("--accum", "2", "--steps", "2", "--out", tmp_path / "2/ar.pt")
    finish(*start_ranks(2, tmp_path / "log", script, *flags, *goal, cwd=chain))
    shutil.copy(tmp_path / "2/ar.pt", tmp_path / "before.pt")
    for count in 1, 4:
        shutil.copytree(tmp_path / "2/ar", tmp_path / f"{count}/ar")
    for count in 1, 2, 4:  # four videos a step
        goal = ("--accum", 4 // count, "--steps", "3", "--out", tmp_path / f"{count}/ar.pt", "--resume")
        finish(*start_ranks(count, tmp_path / f"log{count}", script, *flags, *goal, cwd=chain))
        log = (tmp_path / f"log{count}.0").read_text()
        assert ("--accum is" in log) == (count != 2) and "videos from now on" not in log
    right = rows(tmp_path / "2/ar/metrics.jsonl")
    for count in 1, 4:
        found = rows(tmp_path / f"{count}/ar/metrics.jsonl")
        assert found[:2] == right[:2] and found[2] | {"sec": 0} == pytest.approx(right[2] | {"sec": 0}, rel=1e-5)
        check_same_update(tmp_path / f"{count}/ar.pt", tmp_path / "2/ar.pt", tmp_path / "before.pt")


def test_a_resumed_run_names_every_flag_that_differs(chain, tmp_path, capsys):
    shutil.copytree(chain / "ckpt/ar", tmp_path / "ar")
    train("ar", "--out", tmp_path / "ar.pt", "--steps", "2", "--resume", "--lr", "1e-4", "--betas", "0.5", "0.9",
          "--accum", "2", "--keep", "3", cwd=chain)
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("--resume: ")]
    assert said == [f"--resume: {line}" for line in (
        f"--out is {tmp_path / 'ar.pt'} from now on, was ckpt/ar.pt", "--accum is 2 from now on, was 1",
        "--lr is 0.0001 from now on, was 0.005", "--betas is (0.5, 0.9) from now on, was (0.9, 0.99)",
        "--keep is 3 from now on, was 5", "a step has 4 videos from now on, had 2")]


@pytest.mark.parametrize("stage, flag, was, value", [
    ("camera", "--seed", 0, 1), ("camera", "--shift", 3.0, 5.0), ("camera", "--given-prob", 0.25, 0.5),
    ("camera", "--no-camera", False, True), ("ar", "--chunk", 2, 1), ("ar", "--sampling-steps", 4, 5),
    ("cd", "--teacher-steps", 48, 8),
])
def test_flags_that_make_it_another_run_are_refused(chain, tmp_path, stage, flag, was, value):
    shutil.copytree(chain / "ckpt" / stage, tmp_path / stage)
    script, *short = SCRIPTS[stage]
    flags = (*MINIATURE, *short, flag, *([] if value is True else [value]), "--out", tmp_path / f"{stage}.pt")
    message = refusal(script, *flags, "--steps", "9", "--resume", cwd=chain)
    assert message == (f"error: --resume: {tmp_path / stage / 'state-000002'} was made with {flag} {was}, now {value}; "
                       "that is another run")
    assert is_complete(tmp_path / stage / "state-000002")


def changed(path, out):
    """A copy of a checkpoint that says the same of itself, its weights a little different."""
    weights, meta = load_checkpoint(path)
    save_checkpoint(out, {name: 1.01 * w for name, w in weights.items()}, meta)
    return out


@pytest.mark.parametrize("stage, flag", [
    ("camera", "--init"), ("cd", "--init"), ("dmd", "--init"), ("dmd", "--scores")])
def test_a_state_of_other_weights_is_refused(chain, tmp_path, stage, flag):
    shutil.copytree(chain / "ckpt" / stage, tmp_path / stage)
    other = changed(chain / f"ckpt/{'camera' if flag == '--scores' else SOURCES[stage]}.pt", tmp_path / "other.pt")
    script, *short = SCRIPTS[stage]
    flags = (*MINIATURE, *short, flag, other, "--out", tmp_path / f"{stage}.pt")
    message = refusal(script, *flags, "--steps", "9", "--resume", cwd=chain)
    assert message == (f"error: --resume: {tmp_path / stage / 'state-000002'} was made from other weights than "
                       f"{flag} {other} holds")


def test_a_moved_checkpoint_is_the_one_that_a_state_was_made_from(chain, tmp_path):
    shutil.copytree(chain / "ckpt/ar", tmp_path / "ar")
    shutil.copy(chain / "ckpt/camera.pt", tmp_path / "moved.pt")
    train("ar", "--init", tmp_path / "moved.pt", "--out", tmp_path / "ar.pt", "--steps", "3", "--resume", cwd=chain)
    assert load_checkpoint(tmp_path / "ar.pt")[1]["step"] == 3


def test_pairs_of_another_teacher_with_the_same_step_are_refused(chain, tmp_path):
    teacher = changed(chain / "ckpt/ar.pt", tmp_path / "ar.pt")
    ours, theirs = made_from(chain / "ckpt/ar.pt"), made_from(teacher)
    assert ours.partition(", ")[0] == theirs.partition(", ")[0] == "ar.pt at step 2" and ours != theirs
    message = refusal("distill_ode.py", "--init", teacher, "--out", tmp_path / "ode.pt", cwd=chain)
    assert message.startswith("error: data/ode: expected pairs with ") and ours in message and theirs in message
    flags = ("--generate", "--pairs-count", "4", "--batch-size", "2", "--out", tmp_path / "ode.pt")
    message = refusal("distill_ode.py", "--init", teacher, *flags, cwd=chain)
    assert message.startswith("error: data/ode/latents-") and "another teacher" in message


def test_pairs_of_other_videos_are_refused(chain, tmp_path):
    shutil.copytree(chain / "data", tmp_path / "data")
    prompts = tmp_path / "data/toy/prompts.safetensors"
    with safe_open(prompts, "pt") as file:
        tensors, about = {name: file.get_tensor(name) for name in file.keys()}, file.metadata()
    shard = next((tmp_path / "data/toy").glob("latents-*")).name
    save_file(tensors, prompts, about | {"dropped": json.dumps({shard: [3]})})
    flags = ("--init", chain / "ckpt/ar.pt", "--vae", chain / "ckpt/vae.pt", "--out", tmp_path / "ode.pt")
    message = refusal("distill_ode.py", *flags, "--generate", "--pairs-count", "4", "--batch-size", "2", cwd=tmp_path)
    assert message.startswith("error: data/ode/latents-") and "other videos" in message


# ------------------------------------------------------------------------------------------------- Beside a checkpoint


def test_the_newest_checkpoints_stay_and_the_best(chain, tmp_path, monkeypatch):
    scores = iter([1.0, 3.0, 2.0, 2.5])
    monkeypatch.setattr(data, "control_margin", lambda *_: next(scores))
    train("ar", "--out", tmp_path / "ar.pt", "--steps", "4", "--save-every", "1", "--keep", "2", cwd=chain)
    steps = sorted((tmp_path / "ar").glob("step-*.pt"))
    assert [path.name for path in steps] == ["step-000003.pt", "step-000004.pt"]
    assert (tmp_path / "ar.pt").samefile(steps[-1])
    assert [load_checkpoint(path)[1]["step"] for path in (*steps, tmp_path / "ar.best.pt")] == [3, 4, 2]
    found = {row["step"]: row["control_margin"] for row in rows(tmp_path / "ar/scores.jsonl")}
    assert found == {1: 1.0, 2: 3.0, 3: 2.0, 4: 2.5}
    assert len(list((tmp_path / "ar").glob("sheet-*.png"))) == 4


def test_states_come_at_their_own_interval(chain, tmp_path, monkeypatch):
    seen, save_state = [], model.save_state
    monkeypatch.setattr(model, "save_state", lambda *args: seen.append(args[1]) or save_state(*args))
    train("ar", "--out", tmp_path / "ar.pt", "--steps", "5", "--save-every", "3", "--state-every", "2", cwd=chain)
    assert seen == [2, 4, 5] and [path.name for path in (tmp_path / "ar").glob("state-*")] == ["state-000005"]
    assert sorted(path.name for path in (tmp_path / "ar").glob("step-*")) == ["step-000003.pt", "step-000005.pt"]


def test_the_best_of_an_earlier_run_is_not_this_ones(chain, tmp_path, monkeypatch):
    for score in 9.0, 1.0:
        monkeypatch.setattr(data, "control_margin", lambda *_: score)
        train("ar", "--out", tmp_path / "ar.pt", "--steps", "1", "--lr", score * 1e-3, cwd=chain)
    assert [row["control_margin"] for row in rows(tmp_path / "ar/scores.jsonl")] == [1.0]
    (best, _), (last, _) = load_checkpoint(tmp_path / "ar.best.pt"), load_checkpoint(tmp_path / "ar.pt")
    assert all(torch.equal(best[name], w) for name, w in last.items())


@pytest.mark.parametrize("resumed, kept, best", [(4, (1, 2, 3, 4), 4), (3, (2, 3), 2), (3, (3,), None), (1, (1,), 1)])
def test_the_best_of_steps_that_a_resume_drops_is_not_the_runs(group, chain, tmp_path, resumed, kept, best):
    """Steps 1 to 4, ever better but the third."""
    (tmp_path / "ar").mkdir()
    weights, meta = load_checkpoint(chain / "ckpt/ar.pt")
    for step, score in (1, 1.0), (2, 2.0), (3, 1.5), (4, 3.0):
        write_log(tmp_path / "ar/scores.jsonl", {"step": step, "control_margin": score})
        if step in kept or step == 4:
            save_checkpoint(tmp_path / f"ar/step-{step:06d}.pt", weights, meta | {"step": step})
    point_to(tmp_path / "ar.best.pt", tmp_path / "ar/step-000004.pt")
    open_log(tmp_path / "ar.pt", resumed, 9)
    found = load_checkpoint(tmp_path / "ar.best.pt")[1]["step"] if (tmp_path / "ar.best.pt").exists() else None
    assert found == best
    assert [row["step"] for row in rows(tmp_path / "ar/scores.jsonl")] == list(range(1, resumed + 1))


def test_the_best_of_steps_that_a_resume_keeps_stays(group, chain, tmp_path):
    """Also where its file beside the others is gone, and the best of an earlier run until a new one has its own."""
    weights, meta = load_checkpoint(chain / "ckpt/ar.pt")
    save_checkpoint(tmp_path / "ar.best.pt", weights, meta | {"step": 2})
    before = (tmp_path / "ar.best.pt").stat().st_ino
    (tmp_path / "ar").mkdir()
    for step, resumed in (2, 3), (2, 2), (2, 0):
        write_log(tmp_path / "ar/scores.jsonl", {"step": step, "control_margin": 1.0})
        open_log(tmp_path / "ar.pt", resumed, 9)
        assert (tmp_path / "ar.best.pt").stat().st_ino == before


@pytest.fixture(scope="module")
def toy_videos():
    prompts, paths, scene = sample_toy(4, 0, 3, held=False)
    viewmats, K = torch.stack([parse_trajectory(path) for path in paths]), intrinsics(K_SQUARE)
    return render(scene, viewmats, K, 32), prompts, viewmats, K


@pytest.mark.parametrize("made, low, high", [
    (lambda video: video, 3, 100), (lambda video: (video + 0.3 * torch.randn_like(video)).clamp(-1, 1), 1, 100),
    (lambda video: torch.rand_like(video) * 2 - 1, -1, 1), (torch.zeros_like, -1, 1),
    (lambda video: video.mean((3, 4), keepdim=True).expand_as(video), -1, 1),
    *((lambda video, n=n: video[:, :, n : n + 1].expand_as(video), -1e-3, 1e-3) for n in (0, 4, 6, 9, 12)),
    (lambda video: video.roll(1, 0), -3, 0),
], ids=["truth", "noisy truth", "noise", "grey", "blur", *(f"frame {n} frozen" for n in (0, 4, 6, 9, 12)),
        "another's video"])
def test_a_control_margin_tells_who_obeys(toy_videos, made, low, high):
    video, *asked = toy_videos
    torch.manual_seed(0)
    assert low < control_margin(made(video), *asked) < high


def test_a_control_margin_of_videos_of_which_nobody_knows_the_truth_is_refused(toy_videos):
    video, prompts, *rest = toy_videos
    with pytest.raises(ValueError, match="prompt"):
        control_margin(video, ["a house", *prompts[1:]], *rest)


# -------------------------------------------------------------------------------------------------------------- Folders


def test_a_vae_is_found_from_another_working_directory(chain, tmp_path):
    flags = ("--data", os.path.relpath(chain / "data/toy", tmp_path), "--init", chain / "ckpt/camera.pt")
    train("ar", *flags, "--out", tmp_path / "ar.pt", "--steps", "1", cwd=tmp_path)
    assert (tmp_path / "ar/sheet-000001.png").exists()
    shutil.copytree(chain / "data/toy", tmp_path / "toy")
    with contextlib.chdir(tmp_path):
        assert find_vae(open_latents(chain / "data/toy")).samefile(chain / "ckpt/vae.pt")
        assert not find_vae(open_latents("toy")).exists()


def test_without_a_vae_a_run_goes_on_without_sheets(chain, tmp_path, capsys):
    shutil.copytree(chain / "data/toy", tmp_path / "toy")
    flags = ("--data", "toy", "--init", chain / "ckpt/camera.pt", "--steps", "1", "--out", tmp_path / "ar.pt")
    train("ar", *flags, cwd=tmp_path)
    assert "ckpt/vae.pt: no such file, so no sheets of samples; --vae names it" in capsys.readouterr().out
    assert load_checkpoint(tmp_path / "ar.pt")[1]["step"] == 1 and not list((tmp_path / "ar").glob("sheet-*"))
    train("ar", *flags, "--vae", chain / "ckpt/vae.pt", cwd=tmp_path)
    assert imageio.imread(tmp_path / "ar/sheet-000001.png").shape[2] == 3


def test_shards_of_another_folder_are_refused(chain, tmp_path):
    for name, seed in ("other", 1), ("same", 0):
        flags = ("--count", "16", "--frames", "4", "--size", "32", "--seed", seed, "--vae", chain / "ckpt/vae.pt")
        call("data.py", *flags, "--out", tmp_path / name, cwd=tmp_path)
        merged = shutil.copytree(chain / "data/toy", tmp_path / f"with {name}")
        shutil.copy(tmp_path / name / "latents-000000.safetensors", merged / "latents-000512.safetensors")
    message = refusal("train_ar.py", "--data", tmp_path / "with other", "--out", tmp_path / "ar.pt", cwd=chain)
    assert message.startswith(f"error: {tmp_path / 'with other/latents-000512.safetensors'}: a shard of another folder")
    assert open_latents(tmp_path / "with same").starts == [0, 16, 32]  # whose prompts these are
