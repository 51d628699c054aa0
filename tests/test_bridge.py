"""
The next chunk from the last frame instead of from noise (examples/variants/bridge.py): its noise and its solver, each
against what they are said to be, and as a stage.
"""
import json
import shutil
import sys
from importlib import import_module

import pytest
import torch

import model
import stream
import train_ar
from conftest import MINIATURE, ROOT, STEADY, call, refusal
from data import Batch
from helpers import GENERATED, hy_inputs, make_batch, make_net, meta_of, random_hy_dit
from model import (
    SAMPLERS, add_noise, commit, load_checkpoint, masked_mse, noise_levels, rollout, shift_sigma, start_stream,
    velocity_to_x0,
)

sys.path.insert(0, str(ROOT / "examples/variants"))
bridge = import_module("bridge")

BACKBONES, FORMS = ("wan", "hy"), ("flow", "bridge")
META = {"chunk": 2, "shift": 3.0, "sampler": "euler", "sampling_steps": 4, "guidance": 1.5, "camera": True, "frames": 5}
NEAR = dict(atol=1e-5, rtol=1e-5)
EVERYTHING = torch.ones(2, 5)
SCRIPT = "examples/variants/bridge.py"


@pytest.fixture(autouse=True)
def as_it_was(monkeypatch):
    """What the script puts in the place of other files' is taken back."""
    for module, name in (model, "next_chunk"), (model, "LASTING"), (stream, "next_chunk"), (stream, "STAGES"):
        monkeypatch.setattr(module, name, getattr(module, name))


def form(name, kappa=0.4, **changes):
    return META | {"form": name, "kappa": kappa} | changes


def make(backbone):
    return make_net(0) if backbone == "wan" else random_hy_dit()


def batch_of(backbone, generated=GENERATED):
    """Two videos of five small latents, of the second one three frames given; calling it again rewinds the noise."""
    if backbone == "wan":
        return make_batch(generated=generated)
    _, _, prompt, camera, x0 = hy_inputs(5, b=2)
    rng = [torch.Generator().manual_seed(seed) for seed in (10, 11)]
    return Batch(x0, prompt, prompt, camera, generated, rng, [0, 1], None)


class Watched(torch.nn.Module):
    """A network, or what stands in for one, and the noisy latents and levels that it was asked about."""

    def __init__(self, net):
        super().__init__()
        self.net, self.seen = net, []

    def forward(self, x_t, sigma, *rest, **past):
        if not past.get("update_cache"):
            self.seen.append((x_t, sigma))
        return self.net(x_t, sigma, *rest, **past)


def knowing(x0):
    """A network to which x0 is no secret, and which keeps no keys and values."""
    return lambda x_t, sigma, *_, **__: (x_t - x0) / sigma.clamp(min=1e-9)[..., None, None, None]


def roll(net, meta, batch, given=None):
    chunks = rollout(net, meta, batch.rng, batch.x0.shape[1:], batch.prompt, batch.null, batch.camera, given)
    return torch.cat([*chunks], dim=1)


def state_after(net, meta, batch, frames):
    """The state of a stream after the first true frames of a batch, and its prompts."""
    prompts = [batch.prompt, batch.null]
    state = start_stream(net, meta, batch.rng, batch.x0.shape[2:], prompts, torch.device("cpu"))
    for start in range(0, frames, meta["chunk"]):
        here = slice(start, start + meta["chunk"])
        state = commit(net, meta, state, batch.x0[:, here], prompts, batch.camera.frames(here))
    return state, prompts


# --------------------------------------------------------------------------------------------------------------- Noise


@torch.no_grad()
@pytest.mark.parametrize("backbone", BACKBONES)
def test_from_noise_it_is_the_recipe(backbone):
    """Loss and rollout: where the form is noise, and where kappa is 1 and y is 0."""
    net, plain = make(backbone), train_ar.teacher_forcing_loss(make(backbone), batch_of(backbone), META, 0.5)
    assert torch.equal(bridge.bridge_loss(net, batch_of(backbone), form("noise"), 0.5), plain)
    black = lambda: batch_of(backbone)._replace(x0=torch.zeros_like(batch_of(backbone).x0))
    plain = train_ar.teacher_forcing_loss(net, black(), META, 0.5)
    assert torch.equal(bridge.bridge_loss(net, black(), form("flow", 1.0), 0.5), plain)
    assert not torch.allclose(bridge.bridge_loss(net, black(), form("flow", 0.4), 0.5), plain, rtol=1e-3)


@torch.no_grad()
@pytest.mark.parametrize("sampler", ("euler", "few_step"))
@pytest.mark.parametrize("backbone", BACKBONES)
def test_a_rollout_from_noise_is_the_recipes(backbone, sampler, monkeypatch):
    net, given = make(backbone), batch_of(backbone).x0[:, :3]
    plain = [roll(net, META | {"sampler": sampler}, batch_of(backbone), z) for z in (None, given)]
    monkeypatch.setattr(model, "next_chunk", bridge.bridged_chunk)
    for meta in META, form("noise"):
        assert torch.equal(roll(net, meta | {"sampler": sampler}, batch_of(backbone)), plain[0])

    def from_black(net, meta, state, *rest):  # y is the last frame of `past`; what the cache holds of it stays
        black = [chunk._replace(x0=torch.zeros_like(chunk.x0)) for chunk in state.past]
        return bridge.bridged_chunk(net, meta, state._replace(past=black), *rest)

    monkeypatch.setattr(model, "next_chunk", from_black)
    for z, expected in zip((None, given), plain):
        found = roll(net, form("flow", 1.0, sampler=sampler), batch_of(backbone), z)
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(roll(net, form("flow", 0.5, sampler=sampler), batch_of(backbone)), plain[0], atol=1e-2)


@torch.no_grad()
@pytest.mark.parametrize("chunk", (1, 2))
@pytest.mark.parametrize("name", FORMS)
def test_noisy_latents_have_the_bridges_mean_and_deviation(name, chunk):
    """Seen by the network, frame by frame. Chunks behind none but frame 0 lie between video and noise; given frames
    stay."""
    net, meta = Watched(make("wan")), form(name, chunk=chunk)
    bridge.bridge_loss(net, batch_of("wan"), meta, 0.0)
    (x_t, sigma), again = net.seen[0], batch_of("wan")
    level = shift_sigma(again.rand_per_chunk(chunk), 3.0) * GENERATED
    noise, x0 = again.noise(), again.x0
    assert torch.equal(sigma, level)
    for f in range(5):
        s, first = level[:, f, None, None, None], f // chunk * chunk
        y = x0[:, first - 1] if first >= 2 else torch.zeros_like(x0[:, 0])
        deviation = {"flow": 0.4 * s, "bridge": 0.4 * (s * (1 - s)).sqrt()}[name] if first >= 2 else s
        torch.testing.assert_close(x_t[:, f], (1 - s) * x0[:, f] + s * y + deviation * noise[:, f], **NEAR)
    assert torch.equal(x_t[GENERATED == 0], x0[GENERATED == 0])


@torch.no_grad()
def test_targets_of_a_bridge_have_one_variance():
    """At every level, so a network that is silent has a loss of 1, with chunks from noise and those from y; of every
    target, x0 is exact."""
    torch.manual_seed(0)
    walk = torch.randn(64, 5, 4, 8, 8)
    walk[:, 2:] *= 0.6**0.5  # frames 0 and 1 of variance 1, then each as far from the last as the toy world's
    walk[:, 1:] = walk[:, 1:].cumsum(1)
    rng = [*map(torch.Generator().manual_seed, range(64))]
    prompt = torch.zeros(64, 1, 1)
    for shift in 0.02, 1.0, 50.0:
        for generated in torch.tensor([[0.0, 0, 1, 1, 1], [1, 1, 0, 0, 0]]):
            batch = Batch(walk, prompt, prompt, None, generated.expand(64, 5), rng, [], None)
            loss = bridge.bridge_loss(lambda x_t, *_, **__: 0 * x_t, batch, form("bridge", chunk=1, shift=shift), 0.0)
            assert loss.item() == pytest.approx(1, rel=0.02)
    for name in FORMS:
        sigma = torch.rand(64, 5)
        source, _ = bridge.sources(batch, form(name, chunk=1), torch.randn_like(walk), sigma)
        x_t = add_noise(walk, source, sigma)
        torch.testing.assert_close(velocity_to_x0(source - walk, x_t, sigma), walk, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_a_level_beyond_both_ends_is_finite():
    batch = batch_of("wan", EVERYTHING)
    for s in (0.0, 1.0000001):
        source, _ = bridge.sources(batch, form("bridge"), batch.noise(), torch.full((2, 5), s))
        assert source.isfinite().all()


# -------------------------------------------------------------------------------------------------------------- Solver


@torch.no_grad()
@pytest.mark.parametrize("steps", (1, 3))
@pytest.mark.parametrize("sampler", ("euler", "few_step"))
@pytest.mark.parametrize("name", FORMS)
def test_the_solver_is_exact_for_a_perfect_prediction(name, sampler, steps):
    """All its states lie on one path, of one noise; a student draws each anew. Given frames stay."""
    batch, meta = batch_of("wan"), form(name, sampler=sampler, sampling_steps=steps)
    x0, y, net = batch.x0[:, 2:4], batch.x0[:, 1:2], Watched(knowing(batch.x0[:, 2:4]))
    state, prompts = state_after(make("wan"), meta, batch, 2)
    found = bridge.bridged_chunk(net, meta, state, prompts, batch.camera.frames(slice(2, 4)), x0[:, :1])
    torch.testing.assert_close(found, x0, **NEAR)
    rng = batch_of("wan").rng
    for i, (s, (x_t, _)) in enumerate(zip(noise_levels(steps, 3.0), net.seen[::2])):
        if i == 0 or sampler == "few_step" or (name == "bridge" and i == 1):
            noise = torch.stack([torch.randn(2, *state.shape, generator=g) for g in rng])
        deviation = 0.4 * (s if name == "flow" else (s * (1 - s)) ** 0.5)
        expected = (1 - s) * x0 + s * y + deviation * noise
        expected[:, 0] = x0[:, 0]
        torch.testing.assert_close(x_t, expected, **NEAR)


@torch.no_grad()
@pytest.mark.parametrize("sampler", ("euler", "few_step"))
@pytest.mark.parametrize("backbone", BACKBONES)
def test_the_solver_of_a_flow_is_the_recipes_sampler(backbone, sampler):
    """Of noise that lies around y, for any network; with guidance, both of whose passes start there."""
    net, batch, frames, meta = make(backbone), batch_of(backbone), slice(2, 4), form("flow", sampler=sampler)
    state, prompts = state_after(net, meta, batch_of(backbone), 2)
    rng = batch_of(backbone).rng
    noise = [batch.x0[:, 1:2] + 0.4 * torch.stack([torch.randn(2, *state.shape, generator=g) for g in rng])
             for _ in range(4)]
    camera = batch.camera.frames(frames)
    expected = SAMPLERS[sampler](net, noise, noise_levels(4, 3.0), prompts, camera, 1.5, state.kv_caches,
                                 torch.ones(2, 2))
    found = bridge.bridged_chunk(net, meta, state, prompts, camera)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("chunk, starts", ((1, (2, 3, 4)), (2, (2, 4))))
def test_a_rollout_starts_at_its_own_last_frame(chunk, starts, monkeypatch):
    """Exactly there, in a bridge; but never at frame 0."""
    monkeypatch.setattr(model, "next_chunk", bridge.bridged_chunk)
    net, meta = Watched(make("wan")), form("bridge", chunk=chunk, guidance=1.0, sampling_steps=2)
    video = roll(net, meta, batch_of("wan"))
    firsts = [x_t for x_t, sigma in net.seen if (sigma == 1).all()]
    for i, x_t in enumerate(firsts):
        n = i * chunk
        same = n > 0 and torch.allclose(x_t, video[:, n - 1 : n].expand_as(x_t))
        assert same == (n in starts)


@torch.no_grad()
def test_a_window_without_the_last_frame_is_refused(monkeypatch):
    """Before a chunk is made; the control, which needs none, streams."""
    monkeypatch.setattr(model, "next_chunk", bridge.bridged_chunk)
    net, batch = make("wan"), batch_of("wan")
    for window, sink in ((3, 0), (4, 0), (2, 0), (4, 2)):
        window_of = dict(chunk=2, window=window, sink=sink)
        roll(net, form("noise", **window_of), batch_of("wan"))
        if window - sink > 2:
            roll(net, form("flow", **window_of), batch_of("wan"))
        else:
            chunks = rollout(net, form("flow", **window_of), batch.rng, batch.x0.shape[1:], batch.prompt, batch.null,
                             batch.camera)
            with pytest.raises(ValueError, match=f"--window {window}: too short for --sink {sink}"):
                next(chunks)


# --------------------------------------------------------------------------------------------------------- Consistency


@torch.no_grad()
@pytest.mark.parametrize("name", (*FORMS, "noise"))
@pytest.mark.parametrize("backbone", BACKBONES)
def test_the_target_of_the_last_interval_is_the_video(backbone, name):
    """Whatever the EMA says."""
    net, meta = Watched(make(backbone)), form(name)
    wrong = lambda x_t, *_, **__: torch.full_like(x_t, 7.0)
    loss = bridge.consistency_loss(net, wrong, batch_of(backbone), [0.6, 0.0], meta)
    (x_n, sigma), batch = net.seen[0], batch_of(backbone)
    v = net.net(x_n, sigma, batch.prompt, batch.camera, clean=batch.x0, chunk=2)
    torch.testing.assert_close(loss, masked_mse(velocity_to_x0(v, x_n, sigma), batch.x0, GENERATED), **NEAR)


@torch.no_grad()
@pytest.mark.parametrize("name", (*FORMS, "noise"))
def test_both_ends_of_an_interval_are_on_one_path(name):
    student, ema = (Watched(lambda x_t, *_, **__: x_t) for _ in range(2))
    bridge.consistency_loss(student, ema, batch_of("wan"), [0.9, 0.6, 0.3], form(name))
    (x_n, sigma_n), (x_m, sigma_m) = *student.seen, *ema.seen
    again = batch_of("wan")
    n = (again.rand_per_chunk(2) * 2).long()
    levels = torch.tensor([0.9, 0.6, 0.3])
    assert torch.equal(sigma_n, levels[n] * GENERATED) and torch.equal(sigma_m, levels[n + 1] * GENERATED)
    noise = again.noise()
    for x, sigma in (x_n, sigma_n), (x_m, sigma_m):
        expected = add_noise(again.x0, bridge.sources(again, form(name), noise, sigma)[0], sigma)
        torch.testing.assert_close(x, expected, **NEAR)


def test_a_perfect_network_is_consistent_and_the_target_has_no_gradient():
    perfect = knowing(batch_of("wan").x0)
    for name in FORMS:
        args = bridge.parse_args(["--consistency", "--form", name])
        nets = {"net": Watched(perfect), "ema": Watched(perfect)}
        assert bridge.loss_of(args, nets, batch_of("wan"), form(name)).item() < 1e-9
        assert all(len(net.seen) == 1 for net in nets.values())
    student, ema = make("wan").requires_grad_(True), make("wan").requires_grad_(True)
    bridge.consistency_loss(student, ema, batch_of("wan"), noise_levels(48, 3.0), form("bridge")).backward()
    assert all(p.grad is None for p in ema.parameters()) and any(p.grad is not None for p in student.parameters())


# ------------------------------------------------------------------------------------------------------------ A stage


def test_a_student_does_not_overwrite_its_teacher(capsys):
    plain, student = bridge.parse_args([]), bridge.parse_args(["--consistency"])
    assert (plain.init.name, plain.out.name, plain.sampling_steps) == ("ar.pt", "bridge.pt", 48)
    assert (student.init, student.out.name, student.sampling_steps) == (plain.out, "bridge-cd.pt", 4)
    for flags in (["--sampling-steps", "5"], ["--out", "ckpt/bridge.pt"]):
        with pytest.raises(SystemExit):
            bridge.parse_args(["--consistency", *flags])
        assert " ".join(flags) in capsys.readouterr().err


def train(*flags, cwd):
    call(SCRIPT, *MINIATURE, *STEADY, "--kappa", "0.5", *flags, cwd=cwd)


@pytest.mark.parametrize("name", FORMS)
def test_a_bridge_is_a_stage_and_resumes(chain, tmp_path, name, capsys):
    """It trains, goes on where it stopped, makes a student, and streams by its own script alone."""
    flags = "--form", name, "--sampling-steps", "4"
    train(*flags, "--steps", "2", "--out", tmp_path / "bridge.pt", cwd=chain)
    for other in ("--form", "noise"), ("--kappa", "0.25"):
        again = *MINIATURE, *STEADY, "--kappa", "0.5", *flags, *other, "--resume", "--steps", "3"
        assert "another run" in refusal(SCRIPT, *again, "--out", tmp_path / "bridge.pt", cwd=chain)
    shutil.copytree(tmp_path / "bridge", tmp_path / "resumed/bridge")
    for folder, resume in ("resumed", ["--resume"]), ("whole", []):
        train(*flags, "--steps", "3", *resume, "--out", tmp_path / folder / "bridge.pt", cwd=chain)
    resumed, whole = (load_checkpoint(tmp_path / z / "bridge.pt", "bridge")[0] for z in ("resumed", "whole"))
    assert all(torch.equal(resumed[key], whole[key]) for key in whole)
    assert model.next_chunk.__name__ == stream.next_chunk.__name__ == "bridged_chunk"

    init, out = tmp_path / "bridge.pt", tmp_path / "student.pt"
    student = "--consistency", "--init", init, "--out", out, "--steps", "2", "--teacher-steps", "8"
    train(*student, "--form", name, cwd=chain)
    before, after = (load_checkpoint(path)[0] for path in (init, out))
    assert any(not torch.equal(before[key], after[key]) for key in before)
    meta = meta_of(out)
    assert (meta["stage"], meta["form"], meta["kappa"], meta["sampler"]) == ("bridge", name, 0.5, "few_step")
    assert (meta["sampling_steps"], meta["guidance"]) == (4, 1.0)

    assert "expected a checkpoint of stage" in refusal("stream.py", "--ckpt", init, cwd=chain)
    capsys.readouterr()
    vae = "--vae", "ckpt/vae.pt", "--out", tmp_path / "walk.mp4"
    call(SCRIPT, "--stream", "--ckpt", out, *vae, "--camera", "w*7", cwd=chain)
    call(SCRIPT, "--stream", "--score", "--scenes", "8", "--ckpt", init, *vae, cwd=chain)
    row = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert row["stage"] == "bridge" and row["steps"] == 4 and row["psnr"] == row["psnr"]


def test_what_is_no_bridge_or_another_is_refused(chain, tmp_path):
    short = *MINIATURE, "--steps", "1"
    student = SCRIPT, *short, "--consistency", "--out", tmp_path / "student.pt"
    assert "expected a checkpoint of stage bridge" in refusal(*student, "--init", "ckpt/ar.pt", cwd=chain)
    train("--form", "flow", "--steps", "1", "--sampling-steps", "2", "--out", tmp_path / "bridge.pt", cwd=chain)
    for change in ("--form", "bridge"), ("--kappa", "0.25"):
        message = refusal(*student, "--init", tmp_path / "bridge.pt", "--kappa", "0.5", *change, cwd=chain)
        assert "made with --form flow --kappa 0.5" in message


@pytest.mark.parametrize("flags", ([], ["--consistency", "--form", "bridge"]))
def test_the_bill_of_a_bridge(capsys, tmp_path, flags):
    call(SCRIPT, "--plan", "1", *flags, cwd=tmp_path)
    assert "TFLOP" in capsys.readouterr().out
