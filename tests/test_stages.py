"""
The five training stages: the README's chain at miniature size, kill and resume, ranks against micro-batches, each loss
against its formula, the truncated self-rollout, what a wrong use gets, the flags, the fences and the README's commands.
"""
import json
import re
import shlex
import shutil
import subprocess
import time
from importlib import import_module
from pathlib import Path

import imageio.v3 as imageio
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from conftest import ENVIRONMENT, MINIATURE, ROOT, SCRIPTS, STAGES, call, command, refusal, run
from data import K_SQUARE, Batch, intrinsics, open_log, parse_trajectory, randn
from distill_cd import consistency_loss
from distill_ode import ode_loss
from model import DiTConfig, Past, WanDiT, load_checkpoint, noise_levels, rollout, save_checkpoint
from train_ar import teacher_forcing_loss
from train_camera import flow_matching_loss
from train_dmd import fake_score_loss, dmd_loss, generator_loss, self_rollout

TRAINERS = sorted({script for script, *_ in SCRIPTS.values()})
SHARED = ("--init --data --out --preset --resume --steps --batch-size --accum --lr --max-grad-norm --ema-decay".split(),
          "--seed --log-every --save-every".split())  # a stage's own flags stand between the two
B, F, CHUNK, SHIFT = 2, 5, 2, 3.0  # five frames: the last chunk is a short one
LEVELS = noise_levels(4, SHIFT)
PREFIX = 0.5  # how often first frames are given
FREE = torch.tensor([[1.0, 1, 1, 1, 1], [0, 0, 0, 1, 1]])  # 0: given, here to the middle of the second chunk


def train(stage, *flags, cwd):
    """A miniature stage in this process."""
    script, *short = SCRIPTS[stage]
    call(script, *MINIATURE, *short, *flags, cwd=cwd)


def rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def distance(weights, others):
    return sum((weights[name] - others[name]).square().sum() for name in weights).sqrt().item()


# ------------------------------------------------------------------------------------------------------------ The chain


@pytest.mark.parametrize("stage", SCRIPTS)
def test_chain_leaves_checkpoint_metrics_and_sheet(chain, stage):
    weights, _ = load_checkpoint(chain / f"ckpt/{stage}.pt", stage)
    assert all(w.isfinite().all() for w in weights.values())
    metrics = rows(chain / f"ckpt/{stage}/metrics.jsonl")
    assert [row["step"] for row in metrics] == [1, 2]
    assert all({"loss", "grad_norm", "sec"} <= set(row) for row in metrics)
    frames = 1 + 3  # of 13, every fourth; two videos, each above its reconstruction, three times enlarged
    assert imageio.imread(chain / f"ckpt/{stage}/sheet-000002.png").shape == (3 * 4 * 33, 3 * frames * 32, 3)


@pytest.mark.parametrize("stage", SCRIPTS)
def test_checkpoint_describes_itself(chain, stage):
    script, *short = SCRIPTS[stage]
    asked = import_module(script[:-3]).parse_args(short)
    few = stage in ("ode", "cd", "dmd")
    _, meta = load_checkpoint(chain / f"ckpt/{stage}.pt")
    assert meta["K"] == pytest.approx(K_SQUARE)
    expected = {"stage": stage, "preset": "tiny", "step": 2, "frames": 4, "size": [32, 32], "camera": stage != "base",
                "sampler": "renoise" if few else "euler", "shift": import_module("train_camera").parse_args([]).shift}
    assert {name: meta[name] for name in expected} == expected
    assert meta["from"] == {
        "base": None, "camera": "base.pt at step 2", "ar": "camera.pt at step 2", "ode": "ar.pt at step 2",
        "cd": "ar.pt at step 2", "dmd": "ode.pt at step 2, scores camera.pt"}[stage]
    assert meta["chunk"] == (0 if stage in ("base", "camera") else import_module("train_ar").parse_args([]).chunk)
    assert (meta["steps"], meta["guidance"]) == (4, 1.0 if few else asked.guidance)


def test_ode_pairs_start_at_noise_and_end_where_the_teacher_ends(chain):
    for path in sorted((chain / "data/ode").glob("latents-*")):
        states = load_file(path)["states"].float()  # [b 5 f c h w]
        assert states.shape[:3] == (2, 5, 4) and abs(states[:, 0].std() - 1) < 0.05
        with safe_open(path, "pt") as file:
            assert json.loads(file.metadata()["meta"])["levels"] == LEVELS


@pytest.fixture(scope="module")
def second(tmp_path_factory):
    """The folder of a shorter chain of the second backbone, one step a stage."""
    folder = tmp_path_factory.mktemp("second")
    call("data.py", "--preset", "tiny-hy", "--count", "4", "--frames", "4", "--vae-steps", "1", cwd=folder)
    for stage in SCRIPTS:
        if stage == "ode":
            flags = ("--preset", "tiny-hy", "--generate", "--pairs-count", "2", "--batch-size", "2")
            call("distill_ode.py", *flags, cwd=folder)
        train(stage, "--preset", "tiny-hy", "--steps", "1", cwd=folder)
    return folder


@pytest.mark.parametrize("stage", ("camera", "ar", "dmd"))
def test_second_backbone_resumes(second, tmp_path, stage):
    """Its last text outputs are never read: they have no gradient, so the optimizer saves nothing of them."""
    shutil.copytree(second / "ckpt" / stage, tmp_path / "resumed" / stage)
    for name, resume in ("resumed", ["--resume"]), ("whole", []):
        flags = ("--preset", "tiny-hy", "--out", tmp_path / name / f"{stage}.pt", "--steps", "2")
        train(stage, *flags, *resume, cwd=second)
    resumed, whole = (load_checkpoint(tmp_path / name / f"{stage}.pt")[0] for name in ("resumed", "whole"))
    assert all(torch.equal(resumed[name], whole[name]) for name in whole)
    assert distance(whole, load_checkpoint(second / f"ckpt/{stage}.pt")[0]) > 0


@pytest.mark.parametrize("script", TRAINERS)
def test_latents_of_the_other_backbone_are_refused(chain, second, script):
    message = refusal(script, "--data", second / "data/toy", "--out", second / "none.pt", cwd=chain)
    assert message.startswith(f"error: {second / 'data/toy'}: made by the VAE or text encoder of another network")


def test_second_backbone_goes_through_the_same_scripts(second, tmp_path):
    for stage in SCRIPTS:
        assert load_checkpoint(second / f"ckpt/{stage}.pt", stage)[1]["preset"] == "tiny-hy"
        assert rows(second / f"ckpt/{stage}/metrics.jsonl")[0]["grad_norm"] > 0
    imageio.imwrite(tmp_path / "room.png", torch.randint(255, (32, 32, 3), dtype=torch.uint8).numpy())
    video = tmp_path / "walk.gif"
    call("stream.py", "--camera", "w*3", "--image", tmp_path / "room.png", "--out", video, cwd=second)
    assert imageio.imread(video).shape == (13, 256, 256, 3)


# ------------------------------------------------------------------------------------------------- Resume, ranks, kills


@pytest.mark.parametrize("stage", STAGES)
def test_resumed_equals_uninterrupted(chain, tmp_path, stage):
    shutil.copytree(chain / "ckpt" / stage, tmp_path / "resumed" / stage)  # stopped after step 2, in another process
    for name, resume in ("resumed", ["--resume"]), ("whole", []):
        train(stage, "--out", tmp_path / name / f"{stage}.pt", "--steps", "4", *resume, cwd=chain)
    resumed, meta = load_checkpoint(tmp_path / "resumed" / f"{stage}.pt")
    whole, whole_meta = load_checkpoint(tmp_path / "whole" / f"{stage}.pt")
    assert meta == whole_meta and meta["step"] == 4
    assert all(torch.equal(resumed[name], whole[name]) for name in whole)
    assert distance(whole, load_checkpoint(chain / f"ckpt/{stage}.pt")[0]) > 0  # the last two steps did something
    logs = [rows(tmp_path / name / stage / "metrics.jsonl") for name in ("resumed", "whole")]
    assert [row | {"sec": 0} for row in logs[0]] == [row | {"sec": 0} for row in logs[1]]


def test_killed_run_resumes_bit_exactly(chain, tmp_path):
    script, *short = SCRIPTS["ar"]
    out = tmp_path / "killed/ar.pt"
    flags = (*MINIATURE, *short, "--out", out, "--save-every", "2", "--steps", "1000")
    process = subprocess.Popen(command(script, *flags), cwd=chain, env=ENVIRONMENT, stderr=subprocess.DEVNULL)
    try:
        patience = time.time() + 120
        while not any(out.with_suffix("").glob("state-*/.metadata")):
            assert process.poll() is None and time.time() < patience
            time.sleep(0.05)
    finally:
        process.kill()  # SIGKILL, wherever it is
        process.wait()
    reached = max(int(path.parent.name[-6:]) for path in out.with_suffix("").glob("state-*/.metadata"))
    for path, resume in (out, ["--resume"]), (tmp_path / "whole/ar.pt", []):
        train("ar", "--out", path, "--steps", reached + 2, *resume, cwd=chain)
    (resumed, meta), (whole, _) = load_checkpoint(out), load_checkpoint(tmp_path / "whole/ar.pt")
    assert meta["step"] == reached + 2 and all(torch.equal(resumed[name], whole[name]) for name in whole)


def test_resume_of_a_finished_run_says_so(chain, tmp_path, capsys):
    shutil.copytree(chain / "ckpt/ar", tmp_path / "ar")
    train("ar", "--out", tmp_path / "ar.pt", "--steps", "2", "--resume", cwd=chain)
    assert f"{tmp_path / 'ar.pt'}: step 2 of 2, nothing left to do" in capsys.readouterr().out
    assert not (tmp_path / "ar.pt").exists()


def test_log_of_an_earlier_run_does_not_mix_with_this_ones(chain, tmp_path):
    shutil.copytree(chain / "ckpt/ar", tmp_path / "ar")  # two steps of it
    before = rows(tmp_path / "ar/metrics.jsonl")
    with open(tmp_path / "ar/metrics.jsonl", "a") as file:
        file.write('{"step": 3, "lo')  # killed here
    open_log(tmp_path / "ar/metrics.jsonl", 1)
    assert rows(tmp_path / "ar/metrics.jsonl") == before[:1]  # as after a kill between a save and the end
    train("ar", "--out", tmp_path / "ar.pt", "--steps", "1", cwd=chain)
    assert [row["step"] for row in rows(tmp_path / "ar/metrics.jsonl")] == [1]


def test_truncated_state_is_refused(chain, tmp_path):
    shutil.copytree(chain / "ckpt/ar", tmp_path / "ar")
    for path in (tmp_path / "ar").glob("state-*/*.distcp"):
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    message = refusal("train_ar.py", "--resume", "--out", tmp_path / "ar.pt", "--steps", "9", cwd=chain)
    assert message.startswith(f"error: {tmp_path / 'ar/state-000002'}: truncated")


@pytest.mark.parametrize("stage", STAGES)
def test_two_ranks_equal_two_micro_batches(chain, tmp_path, stage):
    script, *short = SCRIPTS[stage]
    flags = (*MINIATURE, *short, "--steps", "1", "--batch-size", "1", "--ema-decay", "0")
    done = run(script, *flags, "--out", tmp_path / "ranks.pt", cwd=chain, nproc=2)
    assert done.returncode == 0, done.stderr
    call(script, *flags, "--accum", "2", "--out", tmp_path / "micro.pt", cwd=chain)
    ranks, micro = (rows(tmp_path / f"{name}/metrics.jsonl")[0] | {"sec": 0} for name in ("ranks", "micro"))
    assert ranks == pytest.approx(micro, rel=1e-5)
    # Adam's first step is lr times the *sign* of each gradient, so a weight whose gradient is rounding noise may go
    # either way, and no bound on single weights would do. The update as a whole is compared: half the batch would turn
    # it right round. A sum in place of a mean it would not, which is what grad_norm above is for.
    source = {"camera": "base", "ar": "camera", "ode": "ar", "cd": "ar", "dmd": "ode"}[stage]
    start, _ = load_checkpoint(chain / f"ckpt/{source}.pt")
    ranks, micro = (load_checkpoint(tmp_path / f"{name}.pt")[0] for name in ("ranks", "micro"))
    moved = distance({name: w for name, w in micro.items() if name in start}, start)
    assert moved > 0 and distance(ranks, micro) < 1e-3 * moved


# --------------------------------------------------------------------------------------------------------------- Losses


def make_batch(states=None):
    """Two videos of small latents; calling it again rewinds the generators."""
    torch.manual_seed(2)
    viewmats = torch.stack([parse_trajectory("w*4"), parse_trajectory("d+l*2,s*2")])
    camera = viewmats, intrinsics(K_SQUARE).expand(B, F, 3, 3)
    rng = [torch.Generator().manual_seed(seed) for seed in (10, 11)]
    x0, prompt = torch.randn(B, F, 4, 4, 4), torch.randn(B, 6, 24)
    return Batch(x0, prompt, torch.zeros(B, 6, 24), camera, rng, [0, 1], {}, states)


def make_net(seed, dtype=torch.float32):
    """A small network with weights of a useful size everywhere, also where training starts at zero."""
    torch.manual_seed(seed)
    net = WanDiT(DiTConfig(32, 48, 2, 2, channels=4, text_dim=24, freq_dim=32))
    for p in net.parameters():
        nn.init.normal_(p, std=0.3 if p.ndim == 1 else p[0].numel() ** -0.5)
    return net.to(dtype)


def seer(x0):
    """A network that knows the clean video: v = (x_t - x0) / sigma."""
    return lambda x_t, sigma, *_, **__: (x_t - x0) / sigma.clamp_min(1e-3)[..., None, None, None]


def test_perfect_prediction_has_no_flow_matching_loss():
    batch = make_batch()
    assert flow_matching_loss(seer(batch.x0), batch, batch.camera, SHIFT, 0.1, PREFIX) < 1e-8
    assert flow_matching_loss(seer(batch.x0 + 1), make_batch(), batch.camera, SHIFT, 0.1, PREFIX) > 1


def test_perfect_prediction_has_no_teacher_forcing_loss():
    batch = make_batch()
    assert teacher_forcing_loss(seer(batch.x0), batch, CHUNK, SHIFT, 0.1, PREFIX) < 1e-8
    assert teacher_forcing_loss(seer(batch.x0 + 1), make_batch(), CHUNK, SHIFT, 0.1, PREFIX) > 1


def test_perfect_prediction_has_no_ode_loss():
    states = torch.randn(B, 5, F, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    assert ode_loss(seer(states[:, -1]), make_batch(states), LEVELS, CHUNK) < 1e-8
    assert ode_loss(seer(states[:, -1] + 1), make_batch(states), LEVELS, CHUNK) == pytest.approx(1, abs=1e-4)


def test_perfect_prediction_has_no_consistency_loss():
    batch = make_batch()
    net = seer(batch.x0)
    assert consistency_loss(net, net, net, batch, noise_levels(48, SHIFT), 3.0, CHUNK, PREFIX) < 1e-8
    # where the interval ends at noise level 0 the target is the teacher's point itself: the EMA's error does not enter
    wrong = consistency_loss(net, seer(batch.x0 + 1), net, make_batch(), noise_levels(1, SHIFT), 3.0, CHUNK, PREFIX)
    assert wrong < 1e-8
    behind = seer(batch.x0 + 1)
    assert consistency_loss(net, behind, net, make_batch(), noise_levels(48, SHIFT), 3.0, CHUNK, PREFIX) > 0.5


def test_consistency_gradient_reaches_the_student_alone():
    student, ema, teacher = (make_net(seed) for seed in range(3))
    consistency_loss(student, ema, teacher, make_batch(), noise_levels(48, SHIFT), 3.0, CHUNK, PREFIX).backward()
    assert all(p.grad is not None for p in student.parameters())
    assert all(p.grad is None for net in (ema, teacher) for p in net.parameters())


def test_perfect_prediction_has_no_fake_score_loss():
    still = make_batch().x0[:, :1]  # a generator that makes this picture, whatever the noise
    made = lambda x_t, *rest, commit=False, **past: None if commit else seer(still)(x_t, *rest)
    assert fake_score_loss(made, seer(still), make_batch(), LEVELS, 3, CHUNK, SHIFT, PREFIX) < 1e-8
    assert fake_score_loss(made, seer(still + 1), make_batch(), LEVELS, 3, CHUNK, SHIFT, PREFIX) > 1


def test_dmd_gradient_is_its_formula():
    torch.manual_seed(0)
    x, real, fake = torch.randn(3, B, F, 4, 4, 4)
    gradient, = torch.autograd.grad(dmd_loss(x.requires_grad_(), real, fake), x)
    for n in range(B):
        scale = (x[n] - real[n]).abs().mean()
        torch.testing.assert_close(gradient[n], ((fake[n] - real[n]) / scale / x.numel()).detach())


def test_dmd_stops_where_the_scores_agree():
    generator, score, other = (make_net(seed) for seed in range(3))
    agree, differ = (generator_loss(generator, score, fake, make_batch(), LEVELS, 1, CHUNK, SHIFT, 1.0, PREFIX)
                     for fake in (score, other))
    assert agree < 1e-10 < 1e-3 < differ


def test_generator_gradient_reaches_the_generator_alone():
    generator, real, fake = (make_net(seed) for seed in range(3))
    generator_loss(generator, real, fake, make_batch(), LEVELS, 1, CHUNK, SHIFT, 2.0, PREFIX).backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in generator.parameters())
    assert all(p.grad is None for net in (real, fake) for p in net.parameters())


def test_fake_score_gradient_reaches_the_fake_score_alone():
    generator, fake = make_net(0), make_net(1)
    fake_score_loss(generator, fake, make_batch(), LEVELS, 1, CHUNK, SHIFT, PREFIX).backward()
    assert all(p.grad is not None for p in fake.parameters()) and all(p.grad is None for p in generator.parameters())


# --------------------------------------------------------------------------------------------------------- Self-rollout


def detached_rollout(net, batch, exit_step, detach):
    """The self-rollout with its graph whole and then cut by hand: at every step's input and at every key and value."""
    noise = [randn(batch.rng, F, 4, 4, 4) for _ in range(exit_step + 1)]
    past, video = None, []
    for start in range(0, F, CHUNK):
        frames = slice(start, start + CHUNK)
        camera, given = [z[:, frames] for z in batch.camera], FREE[:, frames, None, None, None] == 0
        truth, x_t = batch.x0[:, frames], torch.where(given, batch.x0[:, frames], noise[0][:, frames])
        for i in range(exit_step + 1):
            v = net(x_t, LEVELS[i] * FREE[:, frames], batch.prompt, camera, past=past)
            x0 = torch.where(given, truth, x_t - LEVELS[i] * v)
            if i < exit_step:
                x_t = (1 - LEVELS[i + 1]) * x0 + LEVELS[i + 1] * noise[i + 1][:, frames]
                x_t = detach(torch.where(given, truth, x_t))
        video.append(x0)
        past = net(detach(x0), torch.zeros(x0.shape[:2]), batch.prompt, camera, past=past, commit=True)
        past = Past(past.frames, [tuple(map(detach, layer)) for layer in past.layers])
    return torch.cat(video, dim=1)


def gradient(net, video):
    probe = torch.randn(video.shape, generator=torch.Generator().manual_seed(7))
    return torch.cat([g.flatten() for g in torch.autograd.grad((video * probe).sum(), net.parameters())])


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64))
@pytest.mark.parametrize("exit_step", range(4))
def test_self_rollout_gradient_is_exactly_truncated(exit_step, dtype):
    net = make_net(0, dtype)
    video = self_rollout(net, make_batch(), LEVELS, exit_step, CHUNK, FREE)
    reference = detached_rollout(net, make_batch(), exit_step, torch.Tensor.detach)
    torch.testing.assert_close(video, reference, atol=1e-5, rtol=1e-5)
    truncated = gradient(net, video)
    torch.testing.assert_close(truncated, gradient(net, reference), atol=1e-5 * truncated.abs().max().item(), rtol=1e-4)
    whole = gradient(net, detached_rollout(net, make_batch(), exit_step, lambda z: z))
    assert (whole - truncated).norm() > 0.05 * truncated.norm()  # a leak would show


def test_committed_past_carries_no_gradient():
    net, pasts = make_net(0), []

    def watched(*inputs, past=None, **flags):
        if past is not None:
            pasts.append(past)
        return net(*inputs, past=past, **flags)

    assert self_rollout(watched, make_batch(), LEVELS, 2, CHUNK, FREE).requires_grad
    assert pasts and not any(z.requires_grad for past in pasts for layer in past.layers for z in layer)


def test_self_rollout_is_the_sampler():
    meta = {"steps": 4, "shift": SHIFT, "guidance": 1.0, "sampler": "renoise", "chunk": CHUNK, "camera": True}
    net, batch = make_net(0), make_batch()
    chunks = list(rollout(net, meta, batch.rng, batch.x0.shape[1:], batch.prompt, batch.null, batch.camera))
    with torch.no_grad():
        video = self_rollout(net, make_batch(), LEVELS, 3, CHUNK, torch.ones(B, F))
    torch.testing.assert_close(video, torch.cat(chunks, dim=1))


@pytest.mark.parametrize("given", (1, 2, 3))
@pytest.mark.parametrize("sampler, guidance", (("euler", 2.0), ("renoise", 1.0)))
def test_prefix_comes_out_unchanged_and_what_follows_depends_on_it(given, sampler, guidance):
    meta = {"steps": 4, "shift": SHIFT, "guidance": guidance, "sampler": sampler, "chunk": CHUNK, "camera": True}
    net, batch = make_net(0), make_batch()

    def walk(prefix):
        rng = make_batch().rng
        chunks = rollout(net, meta, rng, batch.x0.shape[1:], batch.prompt, batch.null, batch.camera, prefix=prefix)
        return torch.cat(list(chunks), dim=1)

    alone, after, other = walk(None), walk(batch.x0[:, :given]), walk(batch.x0[:, :given] + 1)
    assert torch.equal(after[:, :given], batch.x0[:, :given])
    assert min((after - z)[:, given:].abs().mean() for z in (alone, other)) > 1e-2


def test_losses_ignore_what_was_given():
    """Where frames are given, no noise is added and no prediction counts."""
    for loss in (lambda net, batch: flow_matching_loss(net, batch, batch.camera, SHIFT, 0.0, 1.0),
                 lambda net, batch: teacher_forcing_loss(net, batch, CHUNK, SHIFT, 0.0, 1.0)):
        seen = []

        def net(x_t, sigma, *_, **__):
            seen.append((x_t, sigma))
            wrong = torch.where(sigma[..., None, None, None] == 0, 1e3, 0.0)  # absurd on given frames alone
            return seer(make_batch().x0)(x_t, sigma) + wrong

        assert loss(net, make_batch()) < 1e-8
        (x_t, sigma), = seen
        given = (sigma == 0).sum(1)
        assert ((given == 1) | (given == 2)).all() and (sigma[:, 0] == 0).all()
        assert torch.equal(x_t[sigma == 0], make_batch().x0[sigma == 0])


# ------------------------------------------------------------------------------------------------------------ Wrong use


@pytest.mark.parametrize("script, flags, found", [
    ("train_camera.py", "--init ckpt/ar.pt", "stage base or camera, found ar"),
    ("train_ar.py", "--init ckpt/base.pt", "stage camera or ar, found base"),
    ("distill_ode.py", "--init ckpt/camera.pt", "stage ar, found camera"),
    ("distill_ode.py", "--generate --init ckpt/camera.pt", "stage ar, found camera"),
    ("distill_cd.py", "--init ckpt/ode.pt", "stage ar, found ode"),
    ("train_dmd.py", "--init ckpt/ar.pt", "stage ode or cd or dmd, found ar"),
    ("train_dmd.py", "--scores ckpt/ar.pt", "stage camera, found ar"),
    ("train_ar.py", "--init ckpt/vae.pt", "stage camera or ar, found vae"),
])
def test_checkpoint_of_another_stage_is_refused(chain, tmp_path, script, flags, found):
    flags = flags.split()
    message = refusal(script, *flags, "--out", tmp_path / "out.pt", "--steps", "1", cwd=chain)
    assert message.startswith(f"error: {flags[-1]}: ") and message.endswith(found) and not list(tmp_path.iterdir())


@pytest.mark.parametrize("script, missing, maker", [
    ("train_camera.py", "base", "python train_camera.py --no-camera"),
    ("train_ar.py", "camera", "python train_camera.py"),
    ("distill_ode.py", "ar", "python train_ar.py"), ("distill_cd.py", "ar", "python train_ar.py"),
    ("train_dmd.py", "ode", "python distill_ode.py"), ("train_dmd.py", "cd", "python distill_cd.py"),
])
def test_missing_init_names_the_command_that_makes_it(chain, tmp_path, script, missing, maker):
    path = tmp_path / f"{missing}.pt"
    message = refusal(script, "--init", path, "--out", tmp_path / "out.pt", cwd=chain)
    assert str(path) in message and f"`{maker}`" in message and not list(tmp_path.iterdir())


def test_missing_latents_name_the_command_that_makes_them(chain, tmp_path):
    assert "`python data.py --out" in refusal("train_ar.py", "--data", tmp_path / "none", cwd=chain)


@pytest.mark.parametrize("change", ({"shift": 5.0}, {"K": [0.7, 0.7, 0.5, 0.5]}))
def test_scores_with_another_schedule_or_camera_are_refused(chain, tmp_path, change):
    weights, meta = load_checkpoint(chain / "ckpt/camera.pt")
    save_checkpoint(tmp_path / "camera.pt", weights, meta | change)
    message = refusal("train_dmd.py", "--scores", tmp_path / "camera.pt", "--out", tmp_path / "dmd.pt", cwd=chain)
    name, = change
    assert all(str(part) in message for part in (tmp_path / "camera.pt", meta[name], change[name]))


@pytest.mark.parametrize("script, flag, stage", [
    ("train_camera.py", "--init", "base"), ("train_ar.py", "--init", "camera"), ("distill_ode.py", "--init", "ar"),
    ("distill_cd.py", "--init", "ar"), ("train_dmd.py", "--init", "ode"), ("train_dmd.py", "--scores", "camera"),
])
def test_checkpoint_of_another_preset_is_refused(chain, tmp_path, script, flag, stage):
    weights, meta = load_checkpoint(chain / f"ckpt/{stage}.pt")
    path = tmp_path / f"{stage}.pt"
    save_checkpoint(path, weights, meta | {"preset": "wan-1.3b"})
    message = refusal(script, flag, path, "--out", tmp_path / "out.pt", cwd=chain)
    assert message.startswith(f"error: {path}: ") and "wan-1.3b" in message and "tiny" in message


@pytest.mark.parametrize("change", ({"K": [0.7, 0.7, 0.5, 0.5]}, {"fps": 24}, {"vae_fingerprint": "0"}))
def test_latents_of_another_kind_are_refused(chain, tmp_path, change):
    weights, meta = load_checkpoint(chain / "ckpt/camera.pt")
    save_checkpoint(tmp_path / "camera.pt", weights, meta | change)
    (name, value), = change.items()
    message = refusal("train_ar.py", "--init", tmp_path / "camera.pt", "--out", tmp_path / "ar.pt", cwd=chain)
    assert message == f"error: data/toy: its {name} is {meta[name]}, that of {tmp_path / 'camera.pt'} {value}"


def test_pairs_of_another_teacher_are_refused(chain, tmp_path):
    weights, meta = load_checkpoint(chain / "ckpt/ar.pt")
    save_checkpoint(tmp_path / "ar.pt", weights, meta | {"step": 3})
    for flags in [], ["--generate", "--pairs-count", "4", "--batch-size", "2"]:
        message = refusal("distill_ode.py", "--init", tmp_path / "ar.pt", *flags, "--out", tmp_path / "o.pt", cwd=chain)
        assert message.startswith("error: data/ode") and not (tmp_path / "o.pt").exists()


def test_pairs_at_other_levels_are_refused(chain, tmp_path):
    message = refusal("distill_ode.py", "--sampling-steps", "3", "--out", tmp_path / "ode.pt", cwd=chain)
    assert message.startswith("error: data/ode: ") and str(noise_levels(3, SHIFT)) in message and str(LEVELS) in message


def test_grid_that_misses_the_students_levels_is_refused(capsys):
    for script in ("distill_ode", "distill_cd"):
        with pytest.raises(SystemExit):
            import_module(script).parse_args(["--teacher-steps", "50"])
        assert "--teacher-steps 50" in capsys.readouterr().err


def test_resume_without_a_state_is_refused(chain, tmp_path):
    assert str(tmp_path / "ar") in refusal("train_ar.py", "--resume", "--out", tmp_path / "ar.pt", cwd=chain)


def test_nan_latents_stop_the_run_and_are_named(chain, tmp_path):
    shutil.copytree(chain / "data/toy", tmp_path / "toy")
    path, = (tmp_path / "toy").glob("latents-*")
    tensors = load_file(path)
    tensors["latents"][5, 1, 2, 3, 4] = torch.nan
    with safe_open(path, "pt") as file:
        save_file(tensors, path, file.metadata())
    shutil.copy(chain / "ckpt/ar.pt", tmp_path)
    script, *short = SCRIPTS["ar"]
    flags = ("--data", tmp_path / "toy", "--out", tmp_path / "ar.pt", "--steps", "9", "--batch-size", "2")
    done = run(script, *short, *flags, cwd=chain)  # a real process, for its exit status and its stderr
    error = [line for line in re.split(r"[\r\n]+", done.stderr) if line.startswith("error: ")]
    assert done.returncode == 1 and len(error) == 1 and "Traceback" not in done.stderr
    assert str(tmp_path / "toy") in error[0] and re.search(r"\brow 5\b", error[0])
    assert (tmp_path / "ar.pt").read_bytes() == (chain / "ckpt/ar.pt").read_bytes()


@pytest.mark.parametrize("stage", STAGES)
def test_nan_loss_stops_the_run_with_step_and_rows(chain, tmp_path, stage):
    script, *short = SCRIPTS[stage]
    out = tmp_path / f"{stage}.pt"
    shutil.copy(chain / f"ckpt/{stage}.pt", out)
    flags = ["--lr", "1e30", "--steps", "9", "--batch-size", "2", "--out", out]  # step 0 is sound, step 1 cannot be
    message = refusal(script, *short, *flags, cwd=chain)
    assert re.match(r"error: step \d: ", message) and re.search(r"rows on rank 0: \[\d+, \d+\]", message)
    assert out.read_bytes() == (chain / f"ckpt/{stage}.pt").read_bytes()


# ------------------------------------------------------------------------------------------- Flags, fences, the README


@pytest.mark.parametrize("script", sorted(path.name for path in ROOT.glob("*.py")))
def test_help(script, capsys):
    with pytest.raises(SystemExit) as stop:
        call(script, "--help", cwd=ROOT)
    assert stop.value.code == 0 and "usage:" in capsys.readouterr().out


@pytest.mark.parametrize("script", TRAINERS)
def test_shared_flags_come_first_and_last(script, capsys):
    with pytest.raises(SystemExit):
        import_module(script[:-3]).parse_args(["--help"])
    flags = re.findall(r"^  (--[\w-]+)", capsys.readouterr().out, re.M)
    first, last = SHARED
    assert flags[: len(first)] == first and flags[-len(last) :] == last


def test_fenced_blocks_are_identical():
    fence = re.compile(r"^( *)# -- ([\w ]+) \(same in every stage\) -+\n(.*?)^\1# -- end -+$", re.S | re.M)
    blocks = {}
    for script in TRAINERS:
        for _, name, body in fence.findall((ROOT / script).read_text()):
            blocks.setdefault(name, []).append(body)
    assert set(blocks) >= {"setup", "log and save", "run"}
    for name, bodies in blocks.items():
        assert len(bodies) == len(TRAINERS) and len(set(bodies)) == 1, f"{name!r} differs between stages"


def readme_commands():
    """[script, flags ...] of every `python x.py` and `torchrun ... x.py` in the README's fenced blocks."""
    blocks = re.findall(r"^```\w*\n(.*?)^```$", (ROOT / "README.md").read_text(), re.S | re.M)
    found = []
    for line in "".join(blocks).replace("\\\n", " ").splitlines():
        line = line.removeprefix("$ ")
        words = shlex.split(line, comments=True) if line.startswith(("python ", "torchrun ", "pip ")) else []
        while words:
            end = next((i for i, word in enumerate(words) if word in ("&&", ";", "|", ">")), len(words))
            script = next((i for i, word in enumerate(words[:end]) if word.endswith(".py")), None)
            if words[0] in ("python", "torchrun") and script is not None:
                found.append([Path(words[script]).name, *words[script + 1 : end]])
            words = words[end + 1 :]
    return found


def test_readme_commands_parse():
    if not (ROOT / "README.md").exists():
        pytest.skip("there is no README.md yet")
    commands = readme_commands()
    assert {script for script, *_ in commands} >= {"data.py", *TRAINERS, "stream.py"}
    for script, *flags in commands:
        import_module(script[:-3]).parse_args(flags)
