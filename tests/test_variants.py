"""
Changes of the recipe (examples/variants): what each says it changes, and that it still is a stage.
"""
import sys
from importlib import import_module

import pytest
import torch

import train_dmd
from conftest import MINIATURE, ROOT, call, refusal
from data import Batch
from helpers import GENERATED, hy_inputs, make_batch, make_net, meta_of, random_hy_dit
from model import build_vae, invert_se3, load_checkpoint, rollout, save_checkpoint

sys.path.insert(0, str(ROOT / "examples/variants"))
sgf, long_dmd = import_module("sgf"), import_module("long_dmd")

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


def test_a_student_whose_window_is_shorter_than_its_videos_is_refused(chain, tmp_path):
    weights, meta = load_checkpoint(chain / "ckpt/ode.pt")
    for window, name in ((3, "short"), (meta["frames"], "long")):
        save_checkpoint(tmp_path / f"{name}.pt", weights, meta | {"window": window, "sink": 0})
    flags = "--out", tmp_path / "dmd.pt", *SHORT
    message = refusal("examples/variants/sgf.py", "--init", tmp_path / "short.pt", *flags, cwd=chain)
    assert str(tmp_path / "short.pt") in message and "window of 3" in message
    call("examples/variants/sgf.py", "--init", tmp_path / "long.pt", *flags, cwd=chain)


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
    vae, batch = build_vae("tiny").eval(), batch_of("wan")
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


# ----------------------------------------------------------------------------------------------------------------- Both


RUNS = {"sgf": (), "long_dmd": ("--rollout", "8", "--window", "4", "--sink", "1")}


@pytest.mark.parametrize("name", RUNS)
def test_a_variant_is_a_stage(chain, tmp_path, name):
    """It trains, in micro-batches as at once, and what it writes streams."""
    script, weights = f"examples/variants/{name}.py", []
    for size, accum in ((2, 1), (1, 2)):
        out = tmp_path / f"{size}.pt"
        call(script, *SHORT, *RUNS[name], "--batch-size", size, "--accum", accum, "--seed", 3, "--out", out, cwd=chain)
        weights.append(torch.cat([w.flatten() for w in load_checkpoint(out, "dmd")[0].values()]))
    start = torch.cat([w.flatten() for w in load_checkpoint(chain / "ckpt/ode.pt")[0].values()])
    assert (weights[0] - weights[1]).norm() < 0.02 * (weights[0] - start).norm()
    meta = meta_of(tmp_path / "1.pt")
    assert (meta.get("window"), meta.get("sink")) == ((4, 1) if name == "long_dmd" else (None, None))
    call("stream.py", "--ckpt", tmp_path / "1.pt", "--vae", "ckpt/vae.pt", "--camera", "w*9", "--out",
         tmp_path / "walk.mp4", cwd=chain)


@pytest.mark.parametrize("name", RUNS)
def test_the_bill_of_a_variant(capsys, chain, name):
    call(f"examples/variants/{name}.py", "--plan", "1", cwd=chain)
    assert '"stage": "dmd"' in capsys.readouterr().out
