"""
Changes of the recipe (examples/variants): what each says it changes, and that it still is a stage.
"""
import json
import re
import shlex
import sys
from importlib import import_module
from pathlib import Path
from typing import NamedTuple

import imageio.v3 as imageio
import pytest
import torch
from torch import nn

import distill_ode
import model
import train_ar
import train_dmd
from conftest import MINIATURE, ROOT, STEADY, call, refusal, run
from data import K_SQUARE, Batch, intrinsics, load_encoder, parse_trajectory, read_prompt, render, rotation, sample_toy
from helpers import GENERATED, fitted_vae, hy_inputs, made_from, make_batch, make_net, meta_of, random_hy_dit
from model import (
    add_noise, invert_se3, load_checkpoint, load_net, load_vae, noise_levels, rollout, rope_speed, save_checkpoint,
    shift_sigma, tree_map,
)
from stream import TOY_PROMPT, Player

sys.path.insert(0, str(ROOT / "examples/variants"))
sgf, long_dmd, leaky_dmd, reuse_dmd = (import_module(name) for name in ("sgf", "long_dmd", "leaky_dmd", "reuse_dmd"))
riflex, selfcheck, ddo, rerecord = (import_module(name) for name in ("riflex", "selfcheck", "ddo", "rerecord"))
diffusion_forcing, ode_bidirectional, muon = map(import_module, ("diffusion_forcing", "ode_bidirectional", "muon"))

BACKBONES = ("wan", "hy")
META = {"chunk": 2, "shift": 3.0, "sampler": "few_step", "sampling_steps": 4, "guidance": 1.0, "camera": True,
        "frames": 5}
NEAR = dict(atol=1e-4, rtol=1e-4)
SHORT = (*MINIATURE, "--fake-score-lr", "5e-3", "--fake-score-updates", "1", "--steps", "1")


def make(backbone):
    net = make_net(0) if backbone == "wan" else random_hy_dit()
    return net.requires_grad_(True)


def batch_of(backbone, generated=GENERATED):
    """Two videos of five small latents, of the second one three frames given; calling it again rewinds the noise."""
    if backbone == "wan":
        return make_batch(generated=generated)
    _, _, prompt, camera, x0 = hy_inputs(5, b=2)
    rng = [torch.Generator().manual_seed(seed) for seed in (10, 11)]
    return Batch(x0, prompt, prompt, camera, generated, rng, [0, 1], None)


class Given(NamedTuple("Given", [*Batch.__annotations__.items(), ("chosen", torch.Tensor)])):
    """A batch whose noise is chosen."""

    def noise(self, frames=slice(None)):
        return self.chosen[:, frames]


def gradient(net, video, probe):
    """Of a probe of the video, through its graph."""
    grads = torch.autograd.grad(video, net.parameters(), probe, allow_unused=True, materialize_grads=True)
    return torch.cat([g.flatten() for g in grads])


# ------------------------------------------------------------------------------------------------ Self Gradient Forcing


@pytest.mark.parametrize("exit_step", (0, 2))
@pytest.mark.parametrize("backbone", BACKBONES)
def test_the_second_pass_is_the_rollout(backbone, exit_step):
    net, batch = make(backbone), batch_of(backbone)
    video, passes = sgf.self_rollout(net, batch, META, exit_step)
    plain, _ = train_dmd.self_rollout(net, batch_of(backbone), META, exit_step)
    assert torch.equal(video, plain) and not any(z.requires_grad for z in (video, *passes))
    again = sgf.replay(net, batch, META, video, passes)
    torch.testing.assert_close(again, video, **NEAR)
    assert torch.equal(again[GENERATED == 0], batch.x0[GENERATED == 0])


def streamed_with_gradient(net, batch, video, passes):
    """The last passes again, chunk by chunk, after a cache that was written with gradient."""
    (x_t, sigma), again = passes, []
    nothing = batch.camera.frames(slice(0, 0))
    kv_cache = net(x_t[:, :0], sigma[:, :0], batch.prompt, nothing, kv_cache=None, update_cache=True)
    for start in range(0, 5, 2):
        frames = slice(start, start + 2)
        camera, zero = batch.camera.frames(frames), torch.zeros_like(sigma[:, frames])
        v = net(x_t[:, frames], sigma[:, frames], batch.prompt, camera, kv_cache=kv_cache)
        again.append(x_t[:, frames] - sigma[:, frames, None, None, None] * v)
        kv_cache = net(video[:, frames], zero, batch.prompt, camera, kv_cache=kv_cache, update_cache=True)
    return torch.cat(again, dim=1)


@pytest.mark.parametrize("backbone", BACKBONES)
def test_the_loss_of_a_chunk_reaches_what_the_chunks_before_wrote(backbone):
    net, batch = make(backbone), batch_of(backbone)
    video, passes = sgf.self_rollout(net, batch, META, 2)
    probe = torch.randn(video.shape, generator=torch.Generator().manual_seed(0))
    probe[:, :2] = 0  # no loss of the first chunk's own
    found = gradient(net, sgf.replay(net, batch, META, video, passes), probe)
    whole = gradient(net, streamed_with_gradient(net, batch, video, passes), probe)
    torch.testing.assert_close(found, whole, atol=1e-4 * whole.abs().max().item(), rtol=1e-3)

    batch = batch_of(backbone)
    _, passes = train_dmd.self_rollout(net, batch, META, 2)
    cut = gradient(net, torch.cat([train_dmd.predict(net, batch, last) for last in passes], dim=1), probe)
    assert (found - cut).norm() > 0.05 * cut.norm()


@pytest.mark.parametrize("name", ("sgf", "leaky_dmd"))
def test_a_student_whose_window_is_shorter_than_its_videos_is_refused(chain, tmp_path, name):
    script = f"examples/variants/{name}.py"
    weights, meta = load_checkpoint(chain / "ckpt/ode.pt")
    for window, length in ((3, "short"), (meta["frames"], "long")):
        save_checkpoint(tmp_path / f"{length}.pt", weights, meta | {"window": window, "sink": 0})
    flags = "--out", tmp_path / "dmd.pt", *SHORT
    message = refusal(script, "--init", tmp_path / "short.pt", *flags, cwd=chain)
    assert str(tmp_path / "short.pt") in message and "window of 3" in message
    call(script, "--init", tmp_path / "long.pt", *flags, cwd=chain)


# ----------------------------------------------------------------------------------------------------- A leaking cache


@pytest.mark.parametrize("exit_step", (0, 2))
@pytest.mark.parametrize("backbone", BACKBONES)
def test_a_leaking_rollout_is_the_rollout(backbone, exit_step):
    net = make(backbone)
    plain, _ = train_dmd.self_rollout(net, batch_of(backbone), META, exit_step)
    torch.testing.assert_close(leaky_dmd.self_rollout(net, batch_of(backbone), META, exit_step), plain, **NEAR)
    with torch.no_grad():
        assert not leaky_dmd.self_rollout(net, batch_of(backbone), META, exit_step).requires_grad


@pytest.mark.parametrize("backbone", BACKBONES)
def test_what_leaks_is_all_that_a_chunk_saw(backbone):
    """Of one denoising step a chunk, so that nothing is cut: finite differences of the whole rollout. The exact cut is
    blind to most of it."""
    net, everything = make(backbone).double(), torch.ones(2, 5, dtype=torch.float64)
    double = lambda z: z.double() if z.is_floating_point() else z
    batch = batch_of(backbone, everything)
    batch = batch._replace(x0=batch.x0.double(), prompt=tree_map(double, batch.prompt))
    probe = torch.randn(batch.x0.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    probe[:, :2] = 0  # no loss of the first chunk's own

    def video(how):
        again = batch_of(backbone, everything)
        return how(net, batch._replace(rng=again.rng), META, 0)

    found = gradient(net, video(leaky_dmd.self_rollout), probe)
    step = {name: torch.randn_like(p) * 1e-5 for name, p in net.named_parameters()}
    ends = []
    for sign in (1, -1):
        with torch.no_grad():
            for name, p in net.named_parameters():
                p += sign * step[name]
            ends.append((video(leaky_dmd.self_rollout) * probe).sum())
            for name, p in net.named_parameters():
                p -= sign * step[name]
    along = torch.cat([step[name].flatten() for name, _ in net.named_parameters()])
    assert (found @ along).item() == pytest.approx((ends[0] - ends[1]).item() / 2, rel=1e-3)

    _, passes = video(train_dmd.self_rollout)
    cut = gradient(net, torch.cat([train_dmd.predict(net, batch, last) for last in passes], dim=1), probe)
    assert (found - cut).norm() > 0.05 * cut.norm()


# ------------------------------------------------------------------------------------------------- A rollout used twice


def test_fake_score_is_first_fitted_to_what_moved_the_generator(chain, tmp_path, monkeypatch):
    """And then to new videos: two rollouts for three losses."""
    seen = []

    def watched(name, function):
        def watch(x, *rest):
            seen.append((name, x.detach().clone() if name != "self_rollout" else None))
            return function(x, *rest)
        return watch

    for name in "self_rollout", "generator_loss", "fake_score_loss":
        monkeypatch.setattr(reuse_dmd, name, watched(name, getattr(reuse_dmd, name)))
    flags = ["--init", "ckpt/ode.pt", "--out", str(tmp_path / "dmd.pt"), "--batch-size", "2", "--steps", "1",
             "--fake-score-updates", "2"]
    monkeypatch.chdir(chain)
    try:
        reuse_dmd.main(reuse_dmd.parse_args(flags))
    finally:
        torch.distributed.destroy_process_group()
    assert [name for name, *_ in seen] == ["self_rollout", "generator_loss", "fake_score_loss", "self_rollout",
                                           "fake_score_loss"]
    assert torch.equal(seen[1][1], seen[2][1]) and not torch.equal(seen[2][1], seen[4][1])


def test_the_plan_of_a_rollout_used_twice_is_one_rollout_less():
    def one_rollout(args, nets, batch, meta):
        train_dmd.self_rollout(nets["generator"], batch, meta, meta["sampling_steps"] - 1)
        yield "generator"

    args = train_dmd.parse_args(["--plan", "1", "--batch-size", "1", "--fake-score-updates", "3"])
    works = train_dmd.WORK, reuse_dmd.WORK, reuse_dmd.WORK._replace(rehearse=one_rollout)
    usual, twice, once = (
        [cost["flop"] for _, cost in model.count(args, work, [16, 16], 1, False, flops=True)] for work in works)
    assert twice == [usual[0], usual[1] - once[0], *usual[2:]] and once[0] > 0


# ----------------------------------------------------------------------------------------------------- Another past


@pytest.mark.parametrize("backbone", BACKBONES)
def test_diffusion_forcing_after_a_clean_past_is_teacher_forcing(backbone):
    """Loss and gradient, that of the past with it. After a noised past both are others."""
    net, meta = make(backbone), META | {"chunk": 2}
    for generated, same in (torch.tensor([[0.0, 0, 0, 0, 1]] * 2), True), (torch.ones(2, 5), False):
        losses = [loss(net, batch_of(backbone, generated), meta, 0.0)
                  for loss in (diffusion_forcing.diffusion_forcing_loss, train_ar.teacher_forcing_loss)]
        found, plain = (gradient(net, loss, torch.ones(())) for loss in losses)
        assert torch.allclose(*losses, rtol=1e-4) == same
        assert ((found - plain).norm() < 1e-3 * plain.norm()) == same


@torch.no_grad()
@pytest.mark.parametrize("backbone", BACKBONES)
def test_a_bidirectional_teachers_chunks_end_where_later_noise_has_them(backbone):
    """A causal teacher's do not; and of both, given frames are clean in every state."""
    net, meta, sigmas, generated = make(backbone), META, noise_levels(4, 3.0), torch.ones(2, 5)
    generated[1, 0] = 0
    for how, depends in (ode_bidirectional.integrate, True), (distill_ode.integrate, False):
        ends = []
        for change in (0.0, 1.0):
            batch = batch_of(backbone, generated)
            noise = batch.noise()
            noise[:, 4] += change  # of the last chunk
            batch = Given(*batch, noise)
            states = how(net, batch, sigmas, meta, keep=2)
            assert states.shape == (2, 3, *batch.x0.shape[1:]) and torch.equal(states[0, 0], noise[0])
            assert all(torch.equal(state, batch.x0[1, 0]) for state in states[1, :, 0])
            ends.append(states[:, -1])
        assert ((ends[0] - ends[1])[0, :4].abs().max() > 1e-3) == depends


@torch.no_grad()
def test_the_past_of_bidirectional_pairs_is_the_teachers():
    net, batch = make("wan"), batch_of("wan", torch.ones(2, 5))
    states = torch.randn(2, 3, *batch.x0.shape[1:], generator=torch.Generator().manual_seed(0))
    losses = []
    for x0, end in ((batch.x0, 0.0), (batch.x0 + 1, 0.0), (batch.x0, 1.0)):
        changed = states.clone()
        changed[:, -1, :2] += end  # of the first chunk: what later ones see, and its own aim
        again = batch_of("wan", torch.tensor([[0.0, 0, 1, 1, 1]] * 2))  # whose own aim does not count
        losses.append(ode_bidirectional.ode_loss(net, again._replace(x0=x0, states=changed), [1.0, 0.5], META))
    assert losses[0] == losses[1] != losses[2]


def test_another_teacher_makes_other_pairs(chain, tmp_path):
    flags = "--pairs", tmp_path / "pairs", "--teacher-steps", "4"
    script = "examples/variants/ode_bidirectional.py"
    call(script, "--generate", "--pairs-count", "2", "--batch-size", "2", *flags, cwd=chain)
    weights, meta = load_checkpoint(chain / "ckpt/camera.pt")
    for name, change in ("other", {}), ("shifted", {"shift": 7.0}):
        save_checkpoint(tmp_path / f"{name}.pt", {key: w + 0.1 for key, w in weights.items()}, meta | change)
    run = (*MINIATURE, "--steps", "1", "--out", tmp_path / "ode.pt", *flags, "--teacher")
    assert "expected pairs with" in refusal(script, *run, tmp_path / "other.pt", cwd=chain)
    assert "differ in noise schedule" in refusal(script, *run, tmp_path / "shifted.pt", cwd=chain)
    call(script, *run, chain / "ckpt/camera.pt", cwd=chain)
    assert meta_of(tmp_path / "ode.pt")["from"].endswith(f"pairs of {made_from(chain / 'ckpt/camera.pt')}")


# -------------------------------------------------------------------------------------------------------- Long rollouts


@pytest.mark.parametrize("window, sink", ((4, 1), (3, 1), (2, 0)))
@pytest.mark.parametrize("backbone", BACKBONES)
def test_a_self_rollout_has_the_window_of_its_student(backbone, window, sink):
    net, meta, everything = make(backbone), META | {"window": window, "sink": sink}, torch.ones(2, 5)
    batch = long_dmd.lengthen(batch_of(backbone, everything), 10)
    stream = rollout(net, meta, batch.rng, batch.x0.shape[1:], batch.prompt, batch.null, batch.camera)
    expected = torch.cat([*stream], dim=1)
    for stage in (train_dmd, long_dmd):
        video, passes = stage.self_rollout(net, long_dmd.lengthen(batch_of(backbone, everything), 10), meta, 3)
        torch.testing.assert_close(video, expected, **NEAR)
        assert [last.frames.start for last in passes] == [0, 2, 4, 6, 8]
    _, passes = long_dmd.self_rollout(net, long_dmd.lengthen(batch_of(backbone, everything), 10), meta, 0, first=6)
    assert [last.frames.start for last in passes] == [6, 8]


def test_a_long_path_goes_back_and_on_again():
    batch = batch_of("wan")
    longer = long_dmd.lengthen(batch, 12)
    for z, longer_z in zip((batch.x0, *batch.camera), (longer.x0, *longer.camera), strict=True):
        assert torch.equal(longer_z, z[:, [0, 1, 2, 3, 4, 3, 2, 1, 0, 1, 2, 3]])
    assert torch.equal(longer.generated[:, :5], GENERATED) and longer.generated[:, 5:].all()
    same = long_dmd.lengthen(batch, 5)
    assert torch.equal(same.x0, batch.x0) and torch.equal(same.generated, GENERATED)


@torch.no_grad()
def test_a_clip_is_a_video_of_its_own():
    torch.manual_seed(0)
    vae, batch = fitted_vae(), batch_of("wan")
    truth = 0.3 * torch.randn(2, 3, 1 + 4 * 11, 32, 32)
    x = vae.encode(truth)[0]
    longer = long_dmd.lengthen(batch, 12)
    clip, of = long_dmd.cut_clip(x, longer, 0, vae)
    assert torch.equal(clip, x) and torch.equal(of.generated, longer.generated)
    torch.testing.assert_close(of.camera.viewmats, longer.camera.viewmats)

    clip, of = long_dmd.cut_clip(x, longer, 6, vae)
    picture = vae.decode(x)[0][:, :, 24:25]  # the last of the four that latent frame 6 holds
    torch.testing.assert_close(clip[:, :1], vae.encode(picture.clamp(-1, 1))[0], **NEAR)
    assert torch.equal(clip[:, 1:], x[:, 7:]) and of.x0 is clip
    assert not of.generated[:, 0].any() and of.generated[:, 1:].all()
    P = longer.camera.viewmats
    torch.testing.assert_close(of.camera.viewmats, P[:, 6:] @ invert_se3(P[:, 6])[:, None], **NEAR)
    torch.testing.assert_close(of.camera.viewmats[:, 0], torch.eye(4).expand(2, 4, 4), **NEAR)


def test_clips_start_everywhere_and_the_same_on_all_ranks():
    starts = [long_dmd.sample_start(0, update, 9, 2) for update in range(200)]
    assert {*starts} == {0, 2, 4, 6, 8} and starts == [long_dmd.sample_start(0, n, 9, 2) for n in range(200)]
    assert starts != [long_dmd.sample_start(1, update, 9, 2) for update in range(200)]


def test_a_rollout_shorter_than_a_video_is_refused(chain, tmp_path):
    flags = "--rollout", "3", "--out", tmp_path / "dmd.pt", *SHORT
    message = refusal("examples/variants/long_dmd.py", *flags, cwd=chain)
    assert message.startswith("error: --rollout 3")


# --------------------------------------------------------------------------------- A likelihood ratio as discriminator


@pytest.mark.parametrize("alpha", (0.0, 0.5, 2.0))
@pytest.mark.parametrize("backbone", BACKBONES)
def test_ddo_starts_downhill_on_data_and_uphill_on_samples(backbone, alpha):
    """Where model and reference are one: log 2 of each, and (beta / 2) (grad e_data - alpha grad e_samples)."""
    net, reference = make(backbone), make(backbone).requires_grad_(False)
    reference.load_state_dict(net.state_dict())
    batch = batch_of(backbone)  # of the second video, the first chunk is given and half of the second
    states = torch.randn(2, 2, *batch.x0.shape[1:], generator=torch.Generator().manual_seed(0))
    states[:, -1][GENERATED == 0] = batch.x0[GENERATED == 0]
    beta, start = 0.05, batch._replace(states=states)
    loss = ddo.ddo_loss(net, reference, start, META, 0.0, alpha, beta)
    assert loss.item() == pytest.approx(0.693147 * (1 + alpha) / max(alpha, 1), rel=1e-4)
    found = gradient(net, loss, torch.ones(()))

    def error(x):  # a sum over chunks, over their number
        again = batch_of(backbone)
        sigma = shift_sigma(again.rand_per_chunk(2), META["shift"]) * GENERATED
        noise = again.noise()
        v = net(add_noise(x, noise, sigma), sigma, again.prompt, again.camera, clean=again.x0, chunk=2)
        return ((v - (noise - x)).square().sum((2, 3, 4)) * GENERATED).sum() / 5  # three chunks, and two

    data, samples = (gradient(net, error(x), torch.ones(())) for x in (batch.x0, states[:, -1]))
    expected = beta / 2 * (data - alpha * samples) / max(alpha, 1)
    torch.testing.assert_close(found, expected, rtol=2e-3, atol=1e-4 * expected.abs().max().item())


def test_samples_of_another_reference_are_refused(chain, tmp_path):
    pairs = "--pairs", tmp_path / "pairs", "--teacher-steps", "4"
    call("examples/variants/ddo.py", "--generate", "--pairs-count", "2", "--batch-size", "2", *pairs, cwd=chain)
    weights, meta = load_checkpoint(chain / "ckpt/ar.pt")
    save_checkpoint(tmp_path / "other.pt", {name: w + 0.1 for name, w in weights.items()}, meta)
    run = (*MINIATURE, "--steps", "1", "--out", tmp_path / "ddo.pt", *pairs, "--init")
    assert "expected samples of" in refusal("examples/variants/ddo.py", *run, tmp_path / "other.pt", cwd=chain)


# ------------------------------------------------------------------------------------------------- Longer than trained


def test_temporal_speeds_are_changed_as_they_are_called():
    bands, theta, trained, times = (16, 16, 16), 10000.0, 8, 2
    speed = rope_speed(16, theta, torch.device("cpu"))
    frames, far = torch.arange(16), torch.arange(16) * times
    plain = model.rope_table(frames, 2, 3, bands, theta)
    ways = {name: change for name, (change, _) in riflex.ways(speed, trained, times, causal=True).items()}
    assert "window" in ways and "window" not in riflex.ways(speed, trained, times, causal=False)
    # pairs that make less than 0.9 of a turn in 16 frames are not slowed down: all but the fastest
    assert [name for name in ways if name.startswith("component")] == ["component 0"]
    tables = {}
    for name, change in ways.items():
        with riflex.temporal_speeds(change):
            tables[name] = model.rope_table(far if name == "interpolated" else frames, 2, 3, bands, theta)
        assert torch.equal(tables[name][:, :, 8:], plain[:, :, 8:])  # rows and columns
    assert torch.equal(model.rope_table(frames, 2, 3, bands, theta), plain)
    torch.testing.assert_close(tables["as they are"], plain)
    torch.testing.assert_close(tables["interpolated"][:, :, :8], plain[:, :, :8])  # twice as far at half the speed
    first = tables["component 0"].unflatten(0, (16, 6))[:, 0, 0]  # [frames pairs]
    torch.testing.assert_close(first[:, 1:8], plain.unflatten(0, (16, 6))[:, 0, 0, 1:8])
    turned = torch.polar(torch.ones(16), frames * 0.9 * 2 * torch.pi / 16)
    torch.testing.assert_close(first[:, 0], turned, atol=1e-5, rtol=0)
    slow = tables["ntk"].unflatten(0, (16, 6))[:, 0, 0]
    torch.testing.assert_close(slow[:, 0], plain.unflatten(0, (16, 6))[:, 0, 0, 0])
    torch.testing.assert_close(slow[::2, 7], plain.unflatten(0, (16, 6))[:8, 0, 0, 7])


@pytest.mark.parametrize("stage", ("camera", "dmd"))
def test_longer_walks_are_measured(chain, capsys, stage):
    call("examples/variants/riflex.py", "--ckpt", f"ckpt/{stage}.pt", "--scenes", "2", "--times", "2", cwd=chain)
    lines = capsys.readouterr().out.splitlines()
    table = [line for line in lines if line.startswith("|")]
    names = [line.split("|")[1].strip() for line in table[2:]]
    assert names[0] == "as they are" and names[-2:] == ["*truth through the VAE*", "*its first frame, held*"]
    assert ("window" in names) == (stage == "dmd")
    assert "nan" not in "".join(table) and table[-1].count("±") == 4
    truth, held = (row.split("|")[5].split() for row in table[-2:])
    assert truth == ["0.0", "±", "0.0"] and float(held[0]) > 20  # a frame that is held repeats itself


# ------------------------------------------------------------------------------------------------------- Did it obey?


def test_what_could_have_been_commanded():
    viewmats = torch.stack([parse_trajectory(path) for path in ("w*4", "w+l*4", "j*4", "d*2,a*2")])
    found = selfcheck.alternatives(viewmats, 2, 4)
    c2w = invert_se3(viewmats)
    assert found.shape == (8, 4, 2, 4, 4) and torch.allclose(found[0], viewmats[:, 2:4])
    moved = lambda k, n: invert_se3(found[k])[n, :, :3, 3] - c2w[n, 1, :3, 3]
    step = c2w[0, 2:4, :3, 3] - c2w[0, 1, :3, 3]
    torch.testing.assert_close(moved(1, 0), step / 2)
    torch.testing.assert_close(found[2], viewmats[:, 1:3])
    without = lambda k: found[k].isnan().flatten(1).any(1).tolist()
    assert without(3) == [True, False, False, True]  # w and d do not turn
    assert without(4) == [False, False, True, False]  # j does not move
    torch.testing.assert_close(found[3, 1, :, :3, :3], viewmats[1, 1:2, :3, :3].expand(2, 3, 3))
    torch.testing.assert_close(moved(4, 1), torch.zeros(2, 3), atol=1e-6, rtol=0)
    relative = viewmats[0, 2:4] @ c2w[0, 1]  # the first room's motion, after the second room's frame
    torch.testing.assert_close(found[5, 1], relative @ viewmats[1, 1])


def test_a_fitted_temperature_is_the_one_that_answers_came_from():
    rng = torch.Generator().manual_seed(0)
    likelihoods = -torch.rand(4000, 8, generator=rng)
    right = selfcheck.belief(likelihoods, 9.0)
    obeyed = (torch.rand(4000, generator=rng) < right).float()
    fitted = selfcheck.fit_sharpness(likelihoods, obeyed, 500.0)
    assert fitted == pytest.approx(9.0, rel=0.15)
    sure, calm = selfcheck.belief(likelihoods, 500.0), selfcheck.belief(likelihoods, fitted)
    assert selfcheck.ece(calm, obeyed) < 0.03 < 0.08 < selfcheck.ece(sure, obeyed)
    assert selfcheck.nll(calm, obeyed) < selfcheck.nll(sure, obeyed)
    risks = [selfcheck.error_at(calm, obeyed, coverage) for coverage in (1, 0.8, 0.5)]
    assert risks == sorted(risks, reverse=True) and risks[0] > risks[-1]
    assert selfcheck.error_at(obeyed, obeyed, 1) == 0 and selfcheck.error_at(1 - obeyed, obeyed, 1) == 1
    assert selfcheck.error_at(torch.full((4000,), 0.7), obeyed, 0.5) == pytest.approx(1 - obeyed.mean().item())  # ties
    assert selfcheck.auroc(obeyed, obeyed) == 1 and selfcheck.auroc(torch.ones(4000), obeyed) == 0.5


def test_the_true_room_obeys():
    _, paths, scene = sample_toy(4, 0, 7, held=True)
    viewmats, K = torch.stack([parse_trajectory(path) for path in paths]), intrinsics(K_SQUARE)
    video = render(scene, viewmats, K, 64)
    assert selfcheck.obeys(video, scene, viewmats, K, 3).shape == (2, 4)  # chunks of 3, 3 and 2 frames
    assert selfcheck.obeys(video, scene, viewmats, K, 1).mean() == 1
    off = torch.eye(4)
    off[:3, :3], off[:3, 3] = rotation(torch.tensor(0.05), torch.tensor(0.0)), torch.tensor([0.08, 0.0, 0.0])
    assert selfcheck.obeys(video, scene, viewmats @ off, K, 1).mean() > 0.9  # a past that has strayed is no fault
    late = viewmats[:, [0, 0, 2, 2, 4, 4, 6, 6]]  # asked to stand still, then for two steps at once
    assert selfcheck.obeys(video, scene, late, K, 1).mean() < 0.1
    noise = 2 * torch.rand(video.shape, generator=torch.Generator().manual_seed(0)) - 1
    assert selfcheck.obeys(noise, scene, viewmats, K, 1).mean() == 0
    assert selfcheck.obeys(video[:, :, :1].expand_as(video), scene, viewmats, K, 1).mean() < 0.4


def test_a_standard_error_is_over_rooms():
    rng = torch.Generator().manual_seed(0)
    obeyed = torch.randint(2, (64, 1), generator=rng).float().expand(64, 7)  # a room's chunks all do, or none
    mean, error = map(float, selfcheck.with_error(lambda p, obeyed: obeyed.mean().item(), obeyed, obeyed).split(" ± "))
    assert mean == pytest.approx(obeyed.mean().item(), abs=1e-3) and error == pytest.approx(0.5 / 64**0.5, rel=0.15)


def test_bins_hold_every_answer():
    found = selfcheck.bins(torch.tensor([0.0, 0.05, 0.55, 1.0]), torch.tensor([0.0, 1, 1, 1]))
    assert [n for n, *_ in found] == [2, 0, 0, 0, 0, 1, 0, 0, 0, 1] and found[0][2] == 0.5
    assert selfcheck.ece(torch.tensor([0.3, 0.3]), torch.tensor([1.0, 0.0])) == pytest.approx(0.2)


def test_a_judge_is_asked(chain, tmp_path, capsys):
    """And says the same again; of another judge, something else."""
    weights, meta = load_checkpoint(chain / "ckpt/ar.pt")
    torch.manual_seed(0)  # after two steps of training, ar.pt itself may agree with the player on every printed digit
    save_checkpoint(tmp_path / "judge.pt", {name: w + 0.5 * torch.randn_like(w) for name, w in weights.items()}, meta)
    said = []
    for judge in ([], [], ["--judge", tmp_path / "judge.pt"]):
        flags = "--player", "ckpt/dmd.pt", "--scenes", "8", "--draws", "1", "--out", tmp_path / "selfcheck.png", *judge
        call("examples/variants/selfcheck.py", *flags, cwd=chain)
        said.append([line for line in capsys.readouterr().out.splitlines() if line.startswith("|")])
    assert said[0] == said[1] != said[2] and len(said[0]) == 5 and "nan" not in "".join(said[0])
    assert imageio.imread(tmp_path / "selfcheck.png").shape == (216, 432, 3)


# --------------------------------------------------------------------------------------------------------- A new prompt


def test_a_repainted_room_has_two_other_colours():
    old, new = (read_prompt(prompt)[0] for prompt in (TOY_PROMPT, rerecord.repaint(TOY_PROMPT)))
    assert (old != new).nonzero().flatten().tolist() == [2, 3] and ((new - old)[2:4] % 8 == 3).all()


def test_what_of_the_past_is_read_again(chain):
    """Where new words are the old: reading again changes nothing, nor do they; an empty cache does. With new ones all
    four ways differ, behind the change alone."""
    net, meta = load_net(chain / "ckpt/dmd.pt", torch.device("cpu"))
    vae = load_vae(chain / "ckpt/vae.pt", torch.device("cpu"), meta["vae_fingerprint"])
    player = Player(net, vae, load_encoder("tiny", None, torch.device("cpu")), meta)
    viewmats, other = parse_trajectory("w*3,j*4")[None], rerecord.repaint(TOY_PROMPT)
    same, new = ([rerecord.walk(player, way, [TOY_PROMPT], [prompt], viewmats, [3]) for way in rerecord.WAYS]
                 for prompt in (TOY_PROMPT, other))
    for video in same[1:3]:
        torch.testing.assert_close(video, same[0], atol=1e-5, rtol=0)
    torch.testing.assert_close(new[0], same[0])
    assert not torch.allclose(same[3], same[0], atol=1e-3)
    for i, video in enumerate(new):
        torch.testing.assert_close(video[:, :, :13], same[0][:, :, :13], atol=1e-5, rtol=0)
        assert all(not torch.allclose(video, z, atol=1e-4) for z in new[:i])


def test_a_new_prompt_is_measured(chain, capsys):
    call("examples/variants/rerecord.py", "--ckpt", "ckpt/dmd.pt", "--scenes", "2", cwd=chain)
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    names = [line.split("|")[1].strip() for line in lines[2:]]
    assert names == [*rerecord.WAYS, rerecord.CEILING] and "nan" not in "".join(lines)


# ----------------------------------------------------------------------------------------------------------------- Muon


@pytest.mark.parametrize("shape", [(48, 48), (24, 96), (96, 24)])
def test_an_orthogonal_matrix_keeps_its_directions(shape):
    m = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    found = muon.orthogonal(m)
    U, S, V = torch.linalg.svd(m, full_matrices=False)
    kept = (U.T @ found @ V.T).diagonal()  # of each direction of m
    assert ((S / m.norm() < 0.01) | ((kept > 0.6) & (kept < 1.3))).all()
    torch.testing.assert_close(U @ kept.diag() @ V, found, atol=1e-4, rtol=0)


@pytest.mark.parametrize("shape", [(32, 64), (64, 32)])
def test_muon_is_torchs_for_whole_matrices_and_else_adamw(monkeypatch, shape):
    """torch's makes U V^T in bf16. Nobody is asked for an update that all ranks have."""
    monkeypatch.setattr(muon, "distribute_tensor", lambda z, *of, src_data_rank: z)
    monkeypatch.setattr(torch.Tensor, "full_tensor", lambda z: z, raising=False)
    for name in "device_mesh", "placements":
        monkeypatch.setattr(torch.Tensor, name, None, raising=False)
    torch.manual_seed(0)
    start, first = torch.randn(shape), torch.randn(shape[1])
    (matrix, vector), (matrix_twin, twin) = ([nn.Parameter(z.clone()) for z in (start, first)] for _ in range(2))
    groups, how = [{"params": [matrix], "whole": True}, {"params": [vector], "whole": False}], {"weight_decay": 0.1}
    found, plain = muon.Muon(groups, lr=1e-2, **how), torch.optim.AdamW([twin], lr=1e-2, **how)
    torchs = torch.optim.Muon([matrix_twin], lr=1e-2, momentum=0.95, nesterov=True, adjust_lr_fn="match_rms_adamw",
                              **how)
    for _ in range(3):
        matrix.grad = torch.randn(shape)
        matrix_twin.grad, vector.grad, twin.grad = matrix.grad.clone(), matrix.grad[0].clone(), matrix.grad[0].clone()
        found.step(), plain.step(), torchs.step()
    assert torch.equal(vector, twin) and matrix.grad is None and found.state[matrix]["step"] == 3
    moved, theirs = ((z.detach() - start).flatten() for z in (matrix, matrix_twin))
    assert torch.cosine_similarity(moved, theirs, dim=0) > 0.99 and (moved.norm() / theirs.norm() - 1).abs() < 0.03


@pytest.mark.slow
def test_muon_resumes_and_is_the_same_on_two_ranks(chain, tmp_path):
    def train(name, nproc, *flags):
        # a step's mean is over frames that are not given, of each micro-batch
        flags = ("--init", "ckpt/camera.pt", *MINIATURE, *STEADY, "--seed", "3", "--given-prob", "0", *flags)
        out = tmp_path / f"{name}.pt"
        done = run("examples/variants/muon.py", *flags, "--out", out, cwd=chain, nproc=nproc)
        assert done.returncode == 0, done.stderr
        return torch.cat([w.flatten() for w in load_checkpoint(out)[0].values()])

    whole = train("whole", 1, "--steps", "2")
    train("broken", 1, "--steps", "1")
    assert torch.equal(train("broken", 1, "--steps", "2", "--resume"), whole)
    start = torch.cat([w.flatten() for w in load_checkpoint(chain / "ckpt/camera.pt")[0].values()])
    two = train("two", 2, "--steps", "2", "--batch-size", "1")
    assert (two - whole).norm() < 0.02 * (whole - start).norm()


# ----------------------------------------------------------------------------------------------------------------- Both


RUNS = {  # variant: its stage, what it starts from, and what makes it short
    "sgf": ("dmd", "ode", *SHORT), "leaky_dmd": ("dmd", "ode", *SHORT), "reuse_dmd": ("dmd", "ode", *SHORT),
    "long_dmd": ("dmd", "ode", *SHORT, "--rollout", "8", "--window", "4", "--sink", "1"),
    "diffusion_forcing": ("ar", "camera", *MINIATURE, *STEADY, "--chunk", "2", "--steps", "1"),
    "ode_bidirectional": ("ode", "ar", *MINIATURE, "--warmup", "0", "--steps", "1"),
    "ddo": ("ar", "ar", *MINIATURE, "--warmup", "0", "--steps", "1"),
    "muon": ("camera", "camera", "--init", "ckpt/camera.pt", *MINIATURE, *STEADY, "--steps", "1"),
}


@pytest.mark.parametrize("name", RUNS)
def test_a_variant_is_a_stage(chain, tmp_path, name):
    """It trains, and what it writes streams."""
    stage, before, *flags = RUNS[name]
    script, weights = f"examples/variants/{name}.py", []
    if name in ("ode_bidirectional", "ddo"):
        flags += ["--pairs", tmp_path / "pairs", "--teacher-steps", "4"]
        call(script, "--generate", "--pairs-count", "4", "--batch-size", "2", *flags[-4:], cwd=chain)
    for size, accum in ((2, 1), (1, 2)):
        out = tmp_path / f"{size}.pt"
        call(script, *flags, "--batch-size", size, "--accum", accum, "--seed", 3, "--out", out, cwd=chain)
        weights.append(torch.cat([w.flatten() for w in load_checkpoint(out, stage)[0].values()]))
    start = torch.cat([w.flatten() for w in load_checkpoint(chain / f"ckpt/{before}.pt")[0].values()])
    moved = (weights[0] - start).norm()
    assert moved > 0
    if stage == "dmd":  # in the others a step's mean is over frames that are not given, of each micro-batch
        assert (weights[0] - weights[1]).norm() < 0.02 * moved
    meta = meta_of(tmp_path / "1.pt")
    assert (meta.get("window"), meta.get("sink")) == ((4, 1) if name == "long_dmd" else (None, None))
    path = "w*9" if meta["chunk"] else "w*3"  # a bidirectional one makes videos of one length
    call("stream.py", "--ckpt", tmp_path / "1.pt", "--vae", "ckpt/vae.pt", "--camera", path, "--out",
         tmp_path / "walk.mp4", cwd=chain)


@pytest.mark.parametrize("name, stage", [
    ("muon", "train_camera"), ("diffusion_forcing", "train_ar"), ("ode_bidirectional", "distill_ode"),
    *((name, "train_dmd") for name in ("sgf", "long_dmd", "leaky_dmd", "reuse_dmd")),
])
def test_a_variant_is_trained_as_its_stage_is(name, stage):
    """What it changes is all that it changes: the same steps, rates and batches. HY's rate of Muon is minWM's own."""
    recipes, theirs = import_module(name).RECIPES, dict(import_module(stage).RECIPES)
    if name == "muon":
        theirs["hy-8b"] = theirs["hy-8b"] | {"lr": 1e-5}
    assert recipes and all(recipe.items() >= theirs[preset].items() for preset, recipe in recipes.items())


@pytest.mark.parametrize("name", RUNS)
def test_the_bill_of_a_variant(capsys, chain, name):
    call(f"examples/variants/{name}.py", "--plan", "1", cwd=chain)
    assert f'"stage": "{RUNS[name][0]}"' in capsys.readouterr().out


@pytest.mark.slow
def test_the_bill_sees_gradients_through_a_cache(capsys, tmp_path):
    """Of diffusion forcing's eight passes, four into the cache: all but that of the prompt alone go backward, too."""
    sent = []
    for script in "train_ar.py", "examples/variants/diffusion_forcing.py":
        call(script, "--plan", "8", "--chunk", "2", cwd=tmp_path)
        sent.append(json.loads(capsys.readouterr().out.splitlines()[-1])["bytes_between_gpus"])
    assert sent[1] > 6.5 * sent[0]  # five times, were only velocities to go backward


def test_the_page_of_variants_knows_them_all_and_its_commands_parse():
    page = (ROOT / "examples/variants/README.md").read_text()
    assert all(f"`{path.name}`" in page for path in (ROOT / "examples/variants").glob("*.py"))
    commands = re.findall(r"python (\S+\.py)([^`&\n]*)", page)
    assert {Path(script).stem for script, _ in commands} >= {"data", "train_ar", "riflex", "rerecord", "selfcheck"}
    for script, flags in commands:
        import_module(Path(script).stem).parse_args(shlex.split(flags))
