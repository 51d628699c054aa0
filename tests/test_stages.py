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

import train_ar
import train_camera
from conftest import ENVIRONMENT, MINIATURE, ROOT, SCRIPTS, STAGES, call, command, refusal, run
from data import K_SQUARE, Batch, get_batch, open_latents, open_log, sample_generated
from distill_cd import consistency_loss
from distill_ode import integrate, ode_loss
from helpers import GENERATED, made_from, make_batch, make_net, meta_of
from model import (
    PRESETS, Camera, KVCache, Meta, add_noise, describe_run, load_checkpoint, noise_levels, rollout, save_checkpoint,
)
from train_ar import teacher_forcing_loss
from train_camera import flow_matching_loss
from train_dmd import dmd_loss, fake_score_loss, generator_loss, predict, self_rollout

TRAINERS = sorted({script for script, *_ in SCRIPTS.values()})
SHARED = (  # a stage's own flags stand between these
    "--init --data --out --preset --resume --steps --batch-size --accum --lr --max-grad-norm --ema-decay".split(),
    "--seed --log-every --save-every --state-every --keep --vae --sp --shard-over --compile --plan --bench".split())
SOURCES = {"base": "base", "camera": "base", "ar": "camera", "ode": "ar", "cd": "ar", "dmd": "ode"}  # stage: its --init
B, F, CHUNK, SHIFT = 2, 5, 2, 3.0  # five frames: the last chunk is a short one
LEVELS, GRID = noise_levels(4, SHIFT), noise_levels(48, SHIFT)  # of a student; of its teacher
ALL_GENERATED = torch.ones(B, F)
META = {"chunk": CHUNK, "shift": SHIFT, "sampler": "few_step", "sampling_steps": 4, "guidance": 1.0, "camera": True}


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
    meta = meta_of(chain / f"ckpt/{stage}.pt")
    assert meta["K"] == pytest.approx(K_SQUARE)
    expected = {"stage": stage, "preset": "tiny", "step": 2, "frames": 4, "size": [32, 32], "camera": stage != "base",
                "sampler": "few_step" if few else "euler", "shift": 3.0,
                "given_prob": 0.0 if stage == "base" else import_module("train_camera").parse_args([]).given_prob}
    others = {"timed_text", "released_cache", "mean", "std", "fingerprint", "window", "sink", "absolute_positions"}
    assert meta.keys() == Meta.__annotations__.keys() - others
    assert {name: meta[name] for name in expected} == expected
    source, camera = (made_from(chain / f"ckpt/{name}.pt") for name in (SOURCES[stage], "camera"))
    assert re.fullmatch(rf"{SOURCES[stage]}\.pt at step 2, [0-9a-f]{{8}}", source)
    assert meta["from"] == {"base": None, "dmd": f"{source}; scores {camera}"}.get(stage, source)
    assert meta["chunk"] == (0 if stage in ("base", "camera") else 2)
    assert (meta["sampling_steps"], meta["guidance"]) == (4, 1.0 if few else asked.guidance)


def test_ode_pairs_start_at_noise_and_end_where_the_teacher_ends(chain):
    for path in sorted((chain / "data/ode").glob("latents-*")):
        states = load_file(path)["states"].float()  # [b 5 f c h w]
        assert states.shape[:3] == (2, 5, 4) and abs(states[:, 0].std() - 1) < 0.05
        with safe_open(path, "pt") as file:
            assert json.loads(file.metadata()["meta"])["levels"] == LEVELS


@pytest.fixture(scope="module")
def pairs(chain, tmp_path_factory):
    """A folder of pairs whose teacher was given frames in three of four videos."""
    folder = tmp_path_factory.mktemp("pairs")
    weights, meta = load_checkpoint(chain / "ckpt/ar.pt")
    save_checkpoint(folder / "ar.pt", weights, meta | {"given_prob": 0.75})
    flags = ("--generate", "--pairs-count", "8", "--batch-size", "4", "--teacher-steps", "4")
    call("distill_ode.py", "--init", folder / "ar.pt", "--pairs", folder / "ode", *flags, cwd=chain)
    return folder / "ode"


def test_ode_pairs_hold_which_frames_were_given(chain, pairs):
    count = 0
    for path in sorted(pairs.glob("latents-*")):
        shard = load_file(path)
        given = shard["generated"] == 0  # [n f]
        assert not given[:, 2:].any() and (given[:, 0] | ~given[:, 1]).all()
        for state in shard["states"].unbind(1):  # clean from pure noise to the end
            assert torch.equal(state[given], shard["latents"][given])
        assert (shard["states"][:, 0] - shard["states"][:, -1])[~given].abs().amax((1, 2, 3)).min() > 0.1
        count += int(given.any(1).sum())
    assert 0 < count < 8


def test_training_on_ode_pairs_gives_the_frames_that_their_teacher_was_given(pairs):
    data = open_latents(pairs, "tiny")
    shards = [load_file(path) for path in sorted(pairs.glob("latents-*"))]
    generated, states = (torch.cat([shard[name] for shard in shards]) for name in ("generated", "states"))
    for given_prob in (None, 0.0, 1.0):
        batch = get_batch(data, 0, 0, (0, 1), 8, torch.device("cpu"), given_prob)
        assert torch.equal(batch.generated, generated[batch.ids])
        assert torch.equal(batch.states, states[batch.ids].float())


@pytest.fixture(scope="module")
def second(tmp_path_factory):
    """The folder of a shorter chain of the second backbone, one step a stage."""
    folder = tmp_path_factory.mktemp("second")
    call("data.py", "--preset", "tiny-hy", "--count", "4", "--frames", "4", "--size", "32", cwd=folder)
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
    flags = (*MINIATURE, *short, "--out", out, "--state-every", "2", "--steps", "1000")
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


@pytest.mark.parametrize("stage, flags, found", [
    ("ar", ["--betas", "0.5", "0.9", "--lr", "1e-4"], [(1e-4, (0.5, 0.9))]),
    ("dmd", ["--lr", "1e-4", "--fake-score-lr", "1e-5"], [(1e-4, (0.0, 0.999)), *[(1e-5, (0.0, 0.999))] * 2]),
])
def test_resumed_run_keeps_the_moments_and_takes_this_runs_flags(chain, tmp_path, monkeypatch, stage, flags, found):
    shutil.copytree(chain / "ckpt" / stage, tmp_path / stage)  # two steps, at lr 5e-3
    seen, counts, step = [], [], torch.optim.AdamW.step

    def watched(optimizer, **closure):
        group, = optimizer.param_groups
        if group["lr"]:  # PyTorch makes the moments that it loads into by a step at lr 0
            seen.append((group["lr"], tuple(group["betas"]), group["weight_decay"]))
            counts.append({int(moments["step"]) for moments in optimizer.state.values()})
        return step(optimizer, **closure)

    monkeypatch.setattr(torch.optim.AdamW, "step", watched)
    train(stage, "--out", tmp_path / f"{stage}.pt", "--steps", "3", "--resume", *flags, cwd=chain)
    assert seen == [(lr, betas, 0.01) for lr, betas in found]
    assert counts == [{2}] if stage == "ar" else [{2}, {4}, {5}]  # steps taken before: two of fake_score to one


def test_log_of_an_earlier_run_does_not_mix_with_this_ones(chain, tmp_path, monkeypatch):
    shutil.copytree(chain / "ckpt/ar", tmp_path / "ar")  # two steps of it
    before = rows(tmp_path / "ar/metrics.jsonl")
    with open(tmp_path / "ar/metrics.jsonl", "a") as file:
        file.write('{"step": 3, "lo')  # killed here
    with monkeypatch.context() as patch:
        patch.setattr("torch.distributed.get_rank", lambda: 0)
        open_log(tmp_path / "ar.pt", 1, 9)
    assert rows(tmp_path / "ar/metrics.jsonl") == before[:1]  # as after a kill between a save and the end
    train("ar", "--out", tmp_path / "ar.pt", "--steps", "1", cwd=chain)
    assert [row["step"] for row in rows(tmp_path / "ar/metrics.jsonl")] == [1]


@pytest.mark.parametrize("rank, said", [(0, "{out}: step 3 of 9\n"), (1, "")])
def test_rank_0_says_where_the_run_stands_and_opens_the_log(tmp_path, monkeypatch, capsys, rank, said):
    monkeypatch.setattr("torch.distributed.get_rank", lambda: rank)
    open_log(tmp_path / "ar.pt", 3, 9)
    assert capsys.readouterr().out == said.format(out=tmp_path / "ar.pt")
    assert (tmp_path / "ar/metrics.jsonl").exists() == (rank == 0)


def test_truncated_state_is_refused(chain, tmp_path):
    shutil.copytree(chain / "ckpt/ar", tmp_path / "ar")
    for path in (tmp_path / "ar").glob("state-*/*.distcp"):
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    script, *short = SCRIPTS["ar"]
    message = refusal(script, *short, "--resume", "--out", tmp_path / "ar.pt", "--steps", "9", cwd=chain)
    assert message.startswith(f"error: {tmp_path / 'ar/state-000002'}: truncated")


@pytest.mark.parametrize("stage, accum", [*((stage, 1) for stage in STAGES), ("ar", 2)])
def test_two_ranks_equal_twice_the_micro_batches(chain, tmp_path, stage, accum):
    script, *short = SCRIPTS[stage]
    flags = (*MINIATURE, *short, "--steps", "1", "--batch-size", "1", "--ema-decay", "0")
    done = run(script, *flags, "--accum", accum, "--out", tmp_path / "ranks.pt", cwd=chain, nproc=2)
    assert done.returncode == 0, done.stderr
    call(script, *flags, "--accum", 2 * accum, "--out", tmp_path / "micro.pt", cwd=chain)
    ranks, micro = (rows(tmp_path / f"{name}/metrics.jsonl")[0] | {"sec": 0} for name in ("ranks", "micro"))
    assert ranks == pytest.approx(micro, rel=1e-5)
    # Adam's first step is lr times the *sign* of each gradient, so a weight whose gradient is rounding noise may go
    # either way, and no bound on single weights would do. The update as a whole is compared: half the batch would turn
    # it right round. A sum in place of a mean it would not, which is what grad_norm above is for.
    start, _ = load_checkpoint(chain / f"ckpt/{SOURCES[stage]}.pt")
    ranks, micro = (load_checkpoint(tmp_path / f"{name}.pt")[0] for name in ("ranks", "micro"))
    moved = distance({name: w for name, w in micro.items() if name in start}, start)
    assert moved > 0 and distance(ranks, micro) < 1e-3 * moved


# --------------------------------------------------------------------------------------------------------------- Losses


def seer(x0):
    """A network that knows the clean video: v = (x_t - x0) / sigma."""
    return lambda x_t, sigma, *_, **__: (x_t - x0) / sigma.clamp_min(1e-3)[..., None, None, None]


def test_perfect_prediction_has_no_flow_matching_loss():
    batch = make_batch()
    assert flow_matching_loss(seer(batch.x0), batch, META, 0.1) < 1e-8
    assert flow_matching_loss(seer(batch.x0 + 1), make_batch(), META, 0.1) > 1


@pytest.mark.parametrize("camera", (True, False))
def test_the_camera_reaches_a_network_that_has_one(camera):
    batch, seen = make_batch(), []
    net = lambda x_t, sigma, prompt, camera: seen.append(camera) or torch.zeros_like(x_t)
    flow_matching_loss(net, batch, META | {"camera": camera}, 0.1)
    assert seen[0] is (batch.camera if camera else None)


@pytest.mark.parametrize("null_prob, dropped", ((0.0, [False] * 64), (1.0, [True] * 64), (0.25, None)))
@pytest.mark.parametrize("loss", (flow_matching_loss, teacher_forcing_loss))
def test_prompts_are_dropped_as_often_as_asked(loss, null_prob, dropped):
    batch, rng = make_batch(), [torch.Generator().manual_seed(n) for n in range(64)]
    many = lambda z: z[:1].expand(64, *z.shape[1:])
    x0, prompt, null, generated = map(many, (batch.x0, batch.prompt, batch.null, batch.generated))
    seen = []
    net = lambda x_t, sigma, prompt, *_, **__: seen.append(prompt) or torch.zeros_like(x_t)
    loss(net, Batch(x0, prompt, null, Camera(*map(many, batch.camera)), generated, rng, [], None), META, null_prob)
    found = (seen[0] == 0).all((1, 2)).tolist()
    assert found == dropped if dropped else 8 <= sum(found) <= 24


def test_perfect_prediction_has_no_teacher_forcing_loss():
    batch = make_batch()
    assert teacher_forcing_loss(seer(batch.x0), batch, META, 0.1) < 1e-8
    assert teacher_forcing_loss(seer(batch.x0 + 1), make_batch(), META, 0.1) > 1


def test_perfect_prediction_has_no_ode_loss():
    states = torch.randn(B, 5, F, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    end = states[:, -1]
    assert ode_loss(seer(end), make_batch(states, ALL_GENERATED), LEVELS, META) < 1e-8
    assert ode_loss(seer(end + 1), make_batch(states, ALL_GENERATED), LEVELS, META) == pytest.approx(1, abs=1e-4)


def test_perfect_prediction_has_no_consistency_loss():
    batch, meta = make_batch(), META | {"guidance": 3.0}
    net = seer(batch.x0)
    assert consistency_loss(net, net, net, batch, GRID, meta) < 1e-8
    # where the interval ends at noise level 0 the target is the teacher's point itself: the EMA's error does not enter
    wrong = consistency_loss(net, seer(batch.x0 + 1), net, make_batch(), noise_levels(1, SHIFT), meta)
    assert wrong < 1e-8
    behind = seer(batch.x0 + 1)
    assert consistency_loss(net, behind, net, make_batch(), GRID, meta) > 0.5


def test_consistency_gradient_reaches_the_student_alone():
    student, ema, teacher = (make_net(seed) for seed in range(3))
    consistency_loss(student, ema, teacher, make_batch(), GRID, META | {"guidance": 3.0}).backward()
    assert all(p.grad is not None for p in student.parameters())
    assert all(p.grad is None for net in (ema, teacher) for p in net.parameters())


def test_perfect_prediction_has_no_fake_score_loss():
    still = make_batch().x0[:, :1]  # a generator that makes this picture, whatever the noise
    made = lambda x_t, *rest, update_cache=False, **past: KVCache(0, []) if update_cache else seer(still)(x_t, *rest)
    x, _ = self_rollout(made, make_batch(), META, 3)
    assert fake_score_loss(x, seer(still), make_batch(), META) < 1e-8
    assert fake_score_loss(x, seer(still + 1), make_batch(), META) > 1


def test_dmd_gradient_is_its_formula():
    torch.manual_seed(0)
    x, real, fake = torch.randn(3, B, F, 4, 4, 4)
    gradient, = torch.autograd.grad(dmd_loss(x.requires_grad_(), real, fake), x)
    for n in range(B):
        scale = (x[n] - real[n]).abs().mean()
        torch.testing.assert_close(gradient[n], ((fake[n] - real[n]) / scale / x.numel()).detach())


def test_dmd_stops_where_the_scores_agree():
    generator, score, other = (make_net(seed) for seed in range(3))
    x, _ = self_rollout(generator, make_batch(), META, 1)
    agree, differ = (generator_loss(x, score, fake, make_batch(), META, 1.0) for fake in (score, other))
    assert agree < 1e-10 < 1e-3 < differ


def test_dmd_guides_the_real_score_alone():
    batch, meta = make_batch(generated=ALL_GENERATED), META | {"guidance": 9.0}  # the student's own: nothing reads it
    x = batch.x0.clone().requires_grad_()
    aim = lambda value: lambda x_t, sigma, *_: seer(torch.full_like(x_t, value))(x_t, sigma)
    real = lambda x_t, sigma, prompt, camera: aim(2.0 if prompt is batch.prompt else 0.5)(x_t, sigma)
    loss = generator_loss(x, real, aim(0.0), batch, meta, 4.0)
    formula = dmd_loss(x, torch.full_like(x, 0.5 + 4 * 1.5), torch.zeros_like(x))
    torch.testing.assert_close(*(torch.autograd.grad(z, x)[0] for z in (loss, formula)))


def test_dmd_moves_only_what_the_generator_made():
    real, fake, batch = make_net(1), make_net(2), make_batch()
    x = batch.x0.clone().requires_grad_()
    gradient, = torch.autograd.grad(generator_loss(x, real, fake, batch, META, 2.0), x)
    assert not gradient[GENERATED == 0].any() and gradient[GENERATED == 1].abs().amax((1, 2, 3)).min() > 0


def test_generator_gradient_reaches_the_generator_alone():
    generator, real, fake = (make_net(seed) for seed in range(3))
    batch = make_batch()
    x, passes = self_rollout(generator, batch, META, 1)
    generator_loss(x.requires_grad_(), real, fake, batch, META, 2.0).backward()
    assert all(p.grad is None for p in generator.parameters())  # as far as x
    replay(generator, batch, passes, x.grad)
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in generator.parameters())
    assert all(p.grad is None for net in (real, fake) for p in net.parameters())


def test_fake_score_gradient_reaches_the_fake_score_alone():
    generator, fake, batch = make_net(0), make_net(1), make_batch()
    x, _ = self_rollout(generator, batch, META, 1)
    fake_score_loss(x, fake, batch, META).backward()
    assert all(p.grad is not None for p in fake.parameters()) and all(p.grad is None for p in generator.parameters())


def states_of(batch):
    """On straight lines from noise to x0, given frames clean: what `integrate` keeps of a teacher that knows x0."""
    noise = torch.randn(batch.x0.shape, generator=torch.Generator().manual_seed(3))
    return torch.stack([add_noise(batch.x0, noise, level * batch.generated) for level in LEVELS], dim=1)


LOSSES = {  # of a network, and where there are others beside it they know x0
    "flow matching": lambda net, batch: flow_matching_loss(net, batch, META, 0.0),
    "teacher forcing": lambda net, batch: teacher_forcing_loss(net, batch, META, 0.0),
    "ode": lambda net, batch: ode_loss(net, batch._replace(states=states_of(batch)), LEVELS, META),
    "consistency": lambda net, batch: consistency_loss(net, seer(batch.x0), seer(batch.x0), batch, GRID, META),
    "fake score": lambda net, batch: fake_score_loss(batch.x0, net, batch, META),
}


@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
def test_losses_ignore_what_was_given(loss):
    """Where frames are given, no noise is added and no prediction counts."""
    seen, generated = [], sample_generated([torch.Generator().manual_seed(n) for n in range(B)], F, 1.0)

    def net(x_t, sigma, *_, **__):
        seen.append((x_t, sigma))
        wrong = torch.where(sigma[..., None, None, None] == 0, 1e3, 0.0)  # absurd on given frames alone
        return seer(make_batch().x0)(x_t, sigma) + wrong

    assert loss(net, make_batch(generated=generated)) < 1e-8
    (x_t, sigma), = seen
    given = (sigma == 0).sum(1)
    assert ((given == 1) | (given == 2)).all() and (sigma[:, 0] == 0).all() and torch.equal(sigma == 0, generated == 0)
    assert torch.equal(x_t[sigma == 0], make_batch().x0[sigma == 0])


@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
def test_losses_draw_from_each_samples_own_generator(loss):
    """A sample's noise does not depend on what else is in the batch."""
    seen = []
    net = lambda x_t, sigma, *_, **__: seen.append((x_t, sigma)) or torch.zeros_like(x_t)
    for rows in ([0, 1], [1, 0]):
        x0, prompt, null, camera, generated, rng, *_ = make_batch()
        camera, rng = Camera(*(z[rows] for z in camera)), [rng[n] for n in rows]
        loss(net, Batch(x0[rows], prompt[rows], null[rows], camera, generated[rows], rng, rows, None))
    (x_t, sigma), (x_t_swapped, sigma_swapped) = seen
    assert torch.equal(sigma, sigma_swapped[[1, 0]])
    if loss is not LOSSES["ode"]:  # its noise is the pairs'
        assert torch.equal(x_t, x_t_swapped[[1, 0]])


def test_integrate_keeps_the_students_levels_of_the_teachers_own_rollout():
    """The first chunk's states lie on the path that the teacher takes when it samples."""
    net, meta = make_net(0), META | {"sampler": "euler", "sampling_steps": 8, "guidance": 2.0}
    batch, sigmas = make_batch(generated=ALL_GENERATED), noise_levels(8, SHIFT)
    states = integrate(net, batch, sigmas, meta, keep=4)
    assert states.shape == (B, 5, F, 4, 4, 4)
    batch = make_batch()
    first = next(iter(rollout(net, meta, batch.rng, batch.x0.shape[1:], batch.prompt, batch.null, batch.camera)))
    torch.testing.assert_close(states[:, -1, :CHUNK], first)
    torch.testing.assert_close(states[:, 0], make_batch().noise())


def test_integrate_leaves_given_frames_clean_in_every_state():
    states = integrate(make_net(0), make_batch(), LEVELS, META | {"guidance": 2.0}, keep=4)
    x0 = make_batch().x0
    assert all(torch.equal(state[GENERATED == 0], x0[GENERATED == 0]) for state in states.unbind(1))


def test_integrate_starts_every_chunk_after_the_ground_truth():
    net, (batch, other) = make_net(0), (make_batch(generated=ALL_GENERATED) for _ in range(2))
    other.x0[:, 2:4] += 1  # the second chunk of three
    states, changed = (integrate(net, of, LEVELS, META, keep=4) for of in (batch, other))
    assert torch.equal(changed[:, :, :4], states[:, :, :4])  # no chunk sees its own clean frames
    assert (changed - states)[:, -1, 4:].abs().max() > 1e-2


# --------------------------------------------------------------------------------------------------------- Self-rollout


def detached_rollout(net, batch, exit_step, detach):
    """The self-rollout with its graph whole and then cut by hand: at every step's input and at every key and value."""
    kv_cache, video = None, []
    for start in range(0, F, CHUNK):
        frames = slice(start, start + CHUNK)
        camera, generated = batch.camera.frames(frames), batch.generated[:, frames]
        given = generated[..., None, None, None] == 0
        truth, x_t = batch.x0[:, frames], torch.where(given, batch.x0[:, frames], batch.noise(frames))
        for i in range(exit_step + 1):
            v = net(x_t, LEVELS[i] * generated, batch.prompt, camera, kv_cache=kv_cache)
            x0 = torch.where(given, truth, x_t - LEVELS[i] * v)
            if i < exit_step:
                x_t = (1 - LEVELS[i + 1]) * x0 + LEVELS[i + 1] * batch.noise(frames)
                x_t = detach(torch.where(given, truth, x_t))
        video.append(x0)
        zero = torch.zeros(x0.shape[:2])
        kv_cache = net(detach(x0), zero, batch.prompt, camera, kv_cache=kv_cache, update_cache=True)
        layers = [[tuple(map(detach, piece)) for piece in layer] for layer in kv_cache.layers]
        kv_cache = kv_cache._replace(layers=layers)
    return torch.cat(video, dim=1)


def replay(net, batch, passes, gradient):
    """The last pass of each chunk again, with its part of the video's gradient: a chunk's graph at a time."""
    for last in passes:
        predict(net, batch, last).backward(gradient[:, last.frames])


def gradient(net, video):
    """Of a probe of the video, through its graph."""
    return torch.cat([g.flatten() for g in torch.autograd.grad(video, net.parameters(), PROBE)])


PROBE = torch.randn(B, F, 4, 4, 4, generator=torch.Generator().manual_seed(7))


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64))
@pytest.mark.parametrize("exit_step", range(4))
def test_self_rollout_gradient_is_exactly_truncated(exit_step, dtype):
    net, batch = make_net(0, dtype), make_batch()
    video, passes = self_rollout(net, batch, META, exit_step)
    reference = detached_rollout(net, make_batch(), exit_step, torch.Tensor.detach)
    torch.testing.assert_close(video, reference, atol=1e-5, rtol=1e-5)
    truncated = gradient(net, reference)
    near = dict(atol=1e-5 * truncated.abs().max().item(), rtol=1e-4)
    direct = torch.cat([predict(net, batch, last) for last in passes], dim=1)  # all chunks in one graph
    assert torch.equal(direct, video)  # the very pass again
    torch.testing.assert_close(gradient(net, direct), truncated, **near)
    replay(net, batch, passes, PROBE)
    torch.testing.assert_close(torch.cat([p.grad.flatten() for p in net.parameters()]), truncated, **near)
    whole = gradient(net, detached_rollout(net, make_batch(), exit_step, lambda z: z))
    assert (whole - truncated).norm() > 0.05 * truncated.norm()  # a leak would show


def test_a_self_rollout_carries_no_gradient():
    net, caches = make_net(0), []

    def watched(*inputs, kv_cache=None, **flags):
        if kv_cache is not None:
            caches.append(kv_cache)
        return net(*inputs, kv_cache=kv_cache, **flags)

    batch = make_batch()
    video, passes = self_rollout(watched, batch, META, 2)
    assert [last.frames for last in passes] == [slice(0, 2), slice(2, 4), slice(4, 6)]
    assert caches and {id(last.kv_cache) for last in passes} <= {id(kv_cache) for kv_cache in caches}
    tensors = [z for kv_cache in caches for layer in kv_cache.layers for piece in layer for z in piece]
    assert not any(z.requires_grad for z in (video, *tensors, *(last.x_t for last in passes)))
    assert all(predict(watched, batch, last).requires_grad for last in passes)


def test_self_rollout_is_the_sampler():
    net, batch = make_net(0), make_batch()
    chunks = list(rollout(net, META, batch.rng, batch.x0.shape[1:], batch.prompt, batch.null, batch.camera))
    video, _ = self_rollout(net, make_batch(generated=ALL_GENERATED), META, 3)
    torch.testing.assert_close(video, torch.cat(chunks, dim=1))


def test_self_rollout_leaves_given_frames_as_they_are():
    for exit_step in range(4):
        batch = make_batch()
        video, _ = self_rollout(make_net(0), batch, META, exit_step)
        assert torch.equal(video[GENERATED == 0], batch.x0[GENERATED == 0])


@pytest.mark.parametrize("given", (1, 2, 3))
@pytest.mark.parametrize("sampler, guidance", (("euler", 2.0), ("few_step", 1.0)))
def test_given_frames_come_out_unchanged_and_what_follows_depends_on_them(given, sampler, guidance):
    net, batch, meta = make_net(0), make_batch(), META | {"guidance": guidance, "sampler": sampler}

    def walk(given):
        rng = make_batch().rng
        chunks = rollout(net, meta, rng, batch.x0.shape[1:], batch.prompt, batch.null, batch.camera, given=given)
        return torch.cat(list(chunks), dim=1)

    alone, after, other = walk(None), walk(batch.x0[:, :given]), walk(batch.x0[:, :given] + 1)
    assert torch.equal(after[:, :given], batch.x0[:, :given])
    assert min((after - z)[:, given:].abs().mean() for z in (alone, other)) > 1e-2


# ------------------------------------------------------------------------------------------------------------ Wrong use


def nothing_written(folder):
    """Nothing but the lock of a run that writes out.pt."""
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*")} <= {"out", "out/lock"}


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
    assert message.startswith(f"error: {flags[-1]}: ") and message.endswith(found) and nothing_written(tmp_path)


@pytest.mark.parametrize("script, missing, maker", [
    ("train_camera.py", "base", "python train_camera.py --no-camera --data data/images"),
    ("train_ar.py", "camera", "python train_camera.py"),
    ("distill_ode.py", "ar", "python train_ar.py"), ("distill_cd.py", "ar", "python train_ar.py"),
    ("train_dmd.py", "ode", "python distill_ode.py"), ("train_dmd.py", "cd", "python distill_cd.py"),
])
def test_missing_init_names_the_command_that_makes_it(chain, tmp_path, script, missing, maker):
    path = tmp_path / f"{missing}.pt"
    message = refusal(script, "--init", path, "--out", tmp_path / "out.pt", cwd=chain)
    assert str(path) in message and f"`{maker}`" in message and nothing_written(tmp_path)


def test_missing_latents_name_the_command_that_makes_them(chain, tmp_path):
    assert "`python data.py --out" in refusal("train_ar.py", "--data", tmp_path / "none", cwd=chain)


@pytest.mark.parametrize("change", ({"shift": 5.0}, {"size": [64, 64]}))
def test_scores_with_another_schedule_or_size_are_refused(chain, tmp_path, change):
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


@pytest.mark.parametrize("script, stage, change", [
    ("train_ar.py", "camera", {"size": [64, 64]}), ("train_ar.py", "camera", {"vae_fingerprint": "0"}),
    ("train_camera.py", "base", {"vae_fingerprint": "0"}),
])
def test_latents_of_another_kind_are_refused(chain, tmp_path, script, stage, change):
    weights, meta = load_checkpoint(chain / f"ckpt/{stage}.pt")
    save_checkpoint(tmp_path / "init.pt", weights, meta | change)
    (name, value), = change.items()
    message = refusal(script, "--init", tmp_path / "init.pt", "--out", tmp_path / "out.pt", cwd=chain)
    ours, theirs = f"data/toy: has {name} {meta[name]}", f"{tmp_path / 'init.pt'} was trained with {value}"
    assert message == f"error: {ours}, but {theirs}"


@pytest.mark.parametrize("change", ({"step": 3}, {"given_prob": 0.5}, {"guidance": 7.0}))
def test_pairs_of_another_teacher_are_refused(chain, tmp_path, change):
    weights, meta = load_checkpoint(chain / "ckpt/ar.pt")
    save_checkpoint(tmp_path / "ar.pt", weights, meta | change)
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
    tensors["latents"][5, 1, 2, 3, 3] = torch.nan
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


def read_help(script, capsys, *flags):
    """flag: its help, for every flag that the script's --help explains, above the table of presets."""
    with pytest.raises(SystemExit) as stop:
        call(script, *flags, "--help", cwd=ROOT)
    shown = capsys.readouterr().out
    assert stop.value.code == 0 and "usage:" in shown
    found = {}
    for entry in re.findall(r"^  (-.*(?:\n {10}.*)*)", shown.partition("defaults of each preset:")[0], re.M):
        spelling, *text = re.split(r"\s{2,}", entry, maxsplit=1)
        found[re.split(r"[ ,]", spelling)[0]] = " ".join(text)
    return found


@pytest.fixture
def wide(monkeypatch):
    """Help of one line a flag."""
    monkeypatch.setenv("COLUMNS", "400")


@pytest.mark.parametrize("script", sorted(path.name for path in ROOT.glob("*.py")))
def test_help_explains_every_flag(script, capsys, wide):
    shown = read_help(script, capsys)
    assert "-h" in shown and all(text.strip() for text in shown.values())


@pytest.mark.parametrize("script", TRAINERS)
def test_every_preset_has_a_recipe_of_the_same_flags(script):
    recipes = import_module(script[:-3]).RECIPES
    assert "wan-14b" in recipes and recipes.keys() == PRESETS.keys()
    assert all(recipe.keys() == recipes["tiny"].keys() for recipe in recipes.values())


@pytest.mark.parametrize("script, preset", [
    (script, preset) for script in TRAINERS for preset in import_module(script[:-3]).RECIPES])
def test_help_shows_every_default_of_the_preset(script, preset, capsys, wide):
    stage = import_module(script[:-3])
    shown, args = read_help(script, capsys, "--preset", preset), stage.parse_args(["--preset", preset])
    for name, value in stage.RECIPES[preset].items():
        assert shown[f"--{name.replace('_', '-')}"].endswith(f"(default: {value})") and getattr(args, name) == value


@pytest.mark.parametrize("script, preset", [
    (script, preset) for script in TRAINERS for preset in import_module(script[:-3]).RECIPES])
def test_a_flag_given_at_its_default_is_no_change_of_the_run(script, preset, monkeypatch):
    monkeypatch.setattr("torch.distributed.get_world_size", lambda: 1)
    stage, given = import_module(script[:-3]), ["--preset", preset]
    by_default = describe_run(stage.parse_args(given))
    for name, value in stage.RECIPES[preset].items():
        given += [f"--{name.replace('_', '-')}", *map(str, value if isinstance(value, tuple) else [value])]
    assert describe_run(stage.parse_args(given)) == by_default


def test_flags_keep_their_older_spelling():
    for argv in ["--prefix-prob", "0.5"], ["--given-prob", "0.5"]:
        assert import_module("train_camera").parse_args(argv).given_prob == 0.5
    for argv in ["--steps", "3"], ["--sampling-steps", "3"]:
        assert import_module("stream").parse_args(argv).sampling_steps == 3


@pytest.mark.parametrize("script", TRAINERS)
def test_shared_flags_come_first_and_last(script, capsys):
    _, *flags = read_help(script, capsys)  # the first is -h
    first, last = SHARED
    assert flags[: len(first)] == first and flags[-len(last) :] == last


def fenced_blocks(path):
    """name: text of every block of a script that is fenced off as the same in every stage."""
    text, fence = path.read_text(), r"^( *)# -- ([\w ]+) \(same in every stage\) -+\n(.*?)^\1# -- end -+$"
    blocks = {name: body for _, name, body in re.findall(fence, text, re.S | re.M)}
    assert len(blocks) == text.count("same in every stage") == text.count("# -- end -"), f"{path}: a fence is broken"
    return blocks


@pytest.mark.parametrize("path", [ROOT / script for script in TRAINERS], ids=TRAINERS)
def test_fenced_blocks_are_the_same_in_every_stage(path):
    blocks = fenced_blocks(path)
    assert list(blocks) == ["first flags", "last flags", "setup", "start", "log and save", "run"]
    assert blocks == fenced_blocks(ROOT / TRAINERS[0])


def test_fenced_blocks_are_the_same_in_variants():
    for path in sorted(ROOT.glob("examples/variants/*.py")):
        blocks = fenced_blocks(path)
        assert blocks.items() <= fenced_blocks(ROOT / TRAINERS[0]).items(), f"{path} differs from the stages"


def readme_commands():
    """[script, flags ...] of every `python x.py` and `torchrun ... x.py` in the README's fenced blocks."""
    pages = [(ROOT / name).read_text() for name in ("README.md", "examples/README.md")]
    blocks = re.findall(r"^```\w*\n(.*?)^```$", "".join(pages), re.S | re.M)
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
    commands = readme_commands()
    assert {script for script, *_ in commands} >= {"data.py", *TRAINERS, "stream.py"}
    for script, *flags in commands:
        import_module(script[:-3]).parse_args(flags)


@pytest.mark.parametrize("stage, flag", [
    (train_camera, "--cooldown"), (train_camera, "--null-prob"), (train_camera, "--given-prob"),
    (train_ar, "--cooldown"), (train_ar, "--null-prob"),
])
def test_a_share_is_from_0_to_1(stage, flag, capsys):
    stage.parse_args([flag, "1"])
    for wrong in "1.5", "-0.1", "nan":
        with pytest.raises(SystemExit):
            stage.parse_args([flag + "=" + wrong])
        assert "expected 0 to 1" in capsys.readouterr().err
