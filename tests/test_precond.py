"""
Consistency trajectories (examples/variants/distill_cd_precond.py): what jumps are made of, where they lead before
training, and that it still is a stage.
"""
import json
import shutil
import sys
from functools import partial
from importlib import import_module

import pytest
import torch
from torch import nn

import distill_cd
import stream
from conftest import MINIATURE, ROOT, call, refusal
from data import Batch
from helpers import GENERATED, make_batch, make_net
from model import PRESETS, SAMPLERS, load_checkpoint, noise_levels, rollout

sys.path.insert(0, str(ROOT / "examples/variants"))
precond = import_module("distill_cd_precond")

SIGMAS = noise_levels(8, 3.0)
META = {"chunk": 2, "shift": 3.0, "sampler": "jumps", "sampling_steps": 4, "guidance": 1.5, "camera": True, "frames": 5}
FLAT = torch.zeros(2, 8), torch.ones(2, 8)  # l and S of plain jumps
CURVED = torch.linspace(0, 0.9, 16).view(2, 8), torch.tensor([SIGMAS[:-1], SIGMAS[:-1]]).sqrt()
SCRIPT = "examples/variants/distill_cd_precond.py"


def grid_of(l, S):
    return precond.Grid(torch.tensor(SIGMAS), *precond.coefficients(SIGMAS, l.double(), S.double()))


def student_of(net, std):
    """The same network, told where jumps end by weights of this size."""
    student = precond.JumpDiT(net.cfg)
    added = {name: torch.randn(w.shape, generator=torch.Generator().manual_seed(1)) * std
             for name, w in student.end_embedding.named_parameters(prefix="end_embedding")}
    student.load_state_dict(net.state_dict() | added)
    return student


# ----------------------------------------------------------------------------------------------- What jumps are made of


def test_without_l_and_s_jumps_are_those_of_ctm():
    sigma = torch.tensor(SIGMAS)
    ratio = (sigma / sigma[:, None]).nan_to_num(nan=1.0)  # [n m]
    _, a, b = grid_of(*FLAT)
    down = torch.ones(9, 9).triu() > 0
    for chunk in 0, 1:
        torch.testing.assert_close(a[chunk][down], ratio[down])
        torch.testing.assert_close(b[chunk][down], 1 - ratio[down])


@pytest.mark.parametrize("l, S", (FLAT, CURVED), ids=("plain", "analytic"))
def test_a_jump_to_where_it_starts_changes_nothing_and_one_to_0_is_x0(l, S):
    _, a, b = grid_of(l, S)
    assert (a.diagonal(0, 1, 2) == 1).all() and (b.diagonal(0, 1, 2) == 0).all()
    assert (a[:, :-1, -1] == 0).all() and (b[:, :-1, -1] == 1).all()


@pytest.mark.parametrize("l, s", ((0.3, -0.4), (0.8, 0.5), (1.0, 0.0), (0.0, -1.0), (0.5, -1.0)))
def test_constant_l_and_s_have_a_closed_form(l, s):
    """S / L = exp(k lambda), k = 1 + s - l. With l = 1, s = 0 it is a backward Euler step in log sigma."""
    sigma = torch.tensor(SIGMAS[:-1], dtype=torch.float64)
    _, a, b = grid_of(torch.full((2, 8), l), (sigma ** -s).expand(2, 8))
    k = 1 + s - l
    for n in range(8):
        for m in range(n, 8):
            fall = sigma[m] / sigma[n]
            c = (1 - fall**k) / k if abs(k) > 1e-9 else -fall.log()
            expected = torch.stack([fall ** (1 - l), c]) / (1 + l * c)
            for chunk in 0, 1:
                torch.testing.assert_close(torch.stack([a[chunk, n, m], b[chunk, n, m]]), expected.float())


def test_a_jump_is_a_backward_euler_step():
    """x_m / L_m - x_n / L_n = I (x0 - l_m x_m) / S_m, with integrals that are sums of many small steps."""
    grid, many = grid_of(*CURVED), 2000
    lam = -torch.tensor(SIGMAS[:-1], dtype=torch.float64).log()
    for chunk, (l, S) in enumerate(zip(*CURVED)):
        step = (lam.diff() / many).repeat_interleave(many)
        log_L = ((l[1:] + l[:-1]) / 2 - 1).repeat_interleave(many).mul(step).cumsum(0)
        log_S = (S.log().diff() / many).repeat_interleave(many).cumsum(0)
        integral = ((log_S - log_L).exp() * step).cumsum(0) * S[0]
        at = lambda z, n: z[n * many - 1] if n else torch.zeros(())
        for n, m in (0, 1), (2, 5), (0, 7):
            a, b = grid.a[chunk, n, m], grid.b[chunk, n, m]
            I, L_n, L_m = at(integral, m) - at(integral, n), at(log_L, n).exp(), at(log_L, m).exp()
            for x, x0 in (1.0, 0.0), (0.0, 1.0):
                x_m = a * x + b * x0
                assert (x_m / L_m - x / L_n).item() == pytest.approx((I * (x0 - l[m] * x_m) / S[m]).item(), rel=2e-3)


def test_l_and_S_are_read_off_the_teacher():
    """Of data whose channels have deviations 1 and 0.2, twice that in the first chunk, the best x0 is k x, k of each
    channel. Then l is the mean of k, and g = (k - l) x. For the null prompt the teacher says x0 = 0, v = x / sigma."""
    deviation = torch.tensor([1.0, 0.2])[:, None, None] * torch.tensor([2.0, 2, 1, 1])[:, None, None, None]
    rng = [torch.Generator().manual_seed(seed) for seed in range(8)]
    x0 = torch.stack([torch.randn(4, 2, 32, 32, generator=g) for g in rng]) * deviation
    batch = Batch(x0, 1, 0, None, torch.ones(8, 4), rng, [*range(8)], None)

    def teacher(x_t, sigma, prompt, camera, clean, chunk):
        assert torch.equal(clean, x0) and chunk == 2
        sigma = sigma[..., None, None, None]
        k = prompt * (1 - sigma) * deviation**2 / ((1 - sigma) ** 2 * deviation**2 + sigma**2)
        return (x_t - k * x_t) / sigma

    sigma, w = torch.tensor(SIGMAS[:-1])[:, None, None], 0.75
    var = deviation[[0, 2], :, 0, 0] ** 2  # [2 channels]
    total = (1 - sigma) ** 2 * var + sigma**2  # of x_t, [N 2 channels]
    k = (1 - sigma) * var / total
    blind = (1 - sigma) / sigma**2 * var  # (1 - sigma) E|x / sigma - (noise - x0)|^2
    l = (w * k + (1 - w) * blind).mean(2, keepdim=True)
    S = ((w * k - l) ** 2 * total).mean(2).sqrt()
    found = precond.estimate(precond.moments(teacher, batch, SIGMAS, META | {"guidance": w}), SIGMAS)
    torch.testing.assert_close(found[0].float(), l[..., 0].T, rtol=0.05, atol=0)
    torch.testing.assert_close(found[1].float(), S.T, rtol=0.05, atol=0)


# ------------------------------------------------------------------------------------------------------ Where they lead


@pytest.mark.parametrize("l, S", (FLAT, CURVED), ids=("plain", "analytic"))
@torch.no_grad()
def test_before_training_a_jump_is_the_teachers(l, S):
    """A plain one its Euler step, and any to 0 its x0."""
    net, batch, grid = make_net(0), make_batch(), grid_of(l, S)
    x, n, later = batch.noise(), torch.tensor([[0, 0, 3, 3, 7], [8, 8, 5, 5, 1]]), torch.tensor([0, 0, 1, 1, 1])
    student, forced = student_of(net, 0.0), dict(clean=batch.x0, chunk=2)
    v = net(x, grid.sigmas[n], batch.prompt, batch.camera, **forced)
    for m in (n + 1).clamp_max(8), torch.full_like(n, 8):
        found = precond.jump(student, x, n, m, grid, later, batch.prompt, batch.camera, **forced)
        euler = x + (grid.sigmas[m] - grid.sigmas[n])[..., None, None, None] * v
        if (m == 8).all() or l is FLAT[0]:
            torch.testing.assert_close(found, euler)
        else:
            assert not torch.allclose(found, euler, atol=1e-3)
        assert torch.equal(found[n == m], x[n == m])  # given frames


@torch.no_grad()
def test_a_stream_jumps_as_a_video_that_is_forced(monkeypatch):
    """Chunk by chunk, each told where its jumps end, after a past that is told 0."""
    batch, grid = make_batch(generated=torch.ones(2, 5)), grid_of(*CURVED)
    student = student_of(make_net(0), 0.3)
    monkeypatch.setitem(SAMPLERS, "jumps", partial(precond.jumps, grid=grid, trained=4))
    chunks = rollout(student, META | {"sampling_steps": 2, "guidance": 1.0}, batch.rng, batch.x0.shape[1:],
                     batch.prompt, None, batch.camera)
    video, again = torch.cat([*chunks], dim=1), make_batch()
    x, later = torch.cat([again.noise(slice(i, i + 2)) for i in (0, 2, 4)], dim=1), torch.tensor([0, 0, 1, 1, 1])
    for n, m in (0, 4), (4, 8):
        n, m = (torch.full((2, 5), z) for z in (n, m))
        x = precond.jump(student, x, n, m, grid, later, batch.prompt, batch.camera, clean=video, chunk=2)
    torch.testing.assert_close(video, x, atol=1e-4, rtol=1e-4)
    other = precond.jump(student, x, n, n, grid._replace(a=0 * grid.a, b=0 * grid.b + 1), later, batch.prompt,
                         batch.camera, clean=video, chunk=2)
    assert not torch.allclose(other, x, atol=1e-2)  # it heard where to


def test_jumps_that_no_student_was_trained_for_are_refused():
    """Those to other levels, though they are on the grid, and those that a null prompt guides."""
    batch, grid, one = make_batch(), grid_of(*CURVED), torch.ones(2, 5)
    student, noise = student_of(make_net(0), 0.3), [batch.noise()]

    def jumps(steps, prompts, guidance=1.0):
        caches = [student(noise[0][:, :0], one[:, :0], batch.prompt, batch.camera.frames(slice(0)), update_cache=True)]
        return precond.jumps(student, noise, noise_levels(steps, 3.0), prompts, batch.camera, guidance,
                             caches * len(prompts), one, grid, trained=4)

    for steps in 1, 2, 4:
        jumps(steps, [batch.prompt])
    for steps in 3, 8:
        with pytest.raises(ValueError, match=f"--sampling-steps {steps}: expected a divisor of 4, the levels"):
            jumps(steps, [batch.prompt])
    with pytest.raises(ValueError, match="--guidance 1.5: a student of jumps has none"):
        jumps(4, [batch.prompt, batch.null], 1.5)


@torch.no_grad()
def test_with_one_step_it_is_consistency_distillation():
    net, teacher, ema = make_net(0), make_net(1), make_net(2)
    expected = distill_cd.consistency_loss(net, ema, teacher, make_batch(), SIGMAS, META)
    nets = student_of(net, 0.0), student_of(ema, 0.0), teacher
    for tables in FLAT, CURVED:
        found = precond.trajectory_loss(*nets, make_batch(), grid_of(*tables), 1, META)
        torch.testing.assert_close(found, expected)


def test_both_ends_jump_to_a_level_of_the_student_below_them():
    """Any of them. Along a straight line the two meet there."""
    grid, batch, seen, v = grid_of(*FLAT), make_batch(), [], nn.Parameter(torch.ones(()))

    def straight(x, sigma, prompt, camera, r=None, **forced):
        seen.append((sigma, r, torch.is_grad_enabled()))
        return v * torch.ones_like(x)

    for _ in range(40):
        loss = precond.trajectory_loss(straight, straight, straight, batch, grid, 4, META)
        assert loss.item() == pytest.approx(0, abs=1e-9)
    assert [grad for *_, grad in seen] == [False, False, False, True] * 40  # of the teacher two, EMA, student
    lower, upper = (torch.stack([sigma for sigma, *_ in seen[i::4]]) for i in (2, 3))
    end, same = (torch.stack([r for _, r, _ in seen[i::4]]) for i in (2, 3))
    assert torch.equal(end, same) and (end <= lower).all()
    assert not upper[:, GENERATED == 0].any() and not lower[:, GENERATED == 0].any()
    found = {*zip(*(z[:, GENERATED > 0].flatten().tolist() for z in (upper, end)))}
    levels = torch.tensor(SIGMAS).tolist()
    assert found == {(n, m) for n in levels[:-1] for m in levels[2::2] if m < n}


@torch.no_grad()
def test_later_chunks_learn_jumps_of_their_own():
    """Where one chunk is given, only the coefficients of the others count."""
    net, student = make_net(0), student_of(make_net(0), 0.3)
    later, (_, *flat) = grid_of(*CURVED), grid_of(*FLAT)
    mixed = precond.Grid(later.sigmas, *(torch.stack([z[0], w[1]]) for z, w in zip(flat, later[1:])))
    for first, same in (0.0, True), (1.0, False):
        generated = torch.tensor([[first, first, 1 - first, 1 - first, 1 - first]] * 2)
        losses = [torch.zeros(()), torch.zeros(())]
        for seed in range(8):
            for i, grid in enumerate((later, mixed)):
                batch = make_batch(generated=generated)
                batch = batch._replace(rng=[torch.Generator().manual_seed(10 * seed + k) for k in (0, 1)])
                losses[i] += precond.trajectory_loss(student, student, net, batch, grid, 4, META)
        assert torch.equal(*losses) == same


# -------------------------------------------------------------------------------------------------------------- A stage


@pytest.fixture
def short(monkeypatch):
    monkeypatch.setitem(PRESETS, "tiny-jumps", None)  # which the script sets, and no other test should meet
    monkeypatch.setitem(SAMPLERS, "jumps", None)
    return *MINIATURE, "--warmup", "0", "--teacher-steps", "8"


@pytest.mark.parametrize("how", ("plain", "analytic"))
def test_it_is_a_stage_that_resumes(chain, tmp_path, capsys, monkeypatch, short, how):
    """With the tables that it had, which are in its checkpoints. Its VAE is the shipped one, where none lies beside."""
    weights = []
    for name, *runs in ("whole", ["2"]), ("halves", ["1"], ["2", "--resume", "--table-batches", "1"]):
        out = tmp_path / f"{name}.pt"
        for steps, *more in runs:
            call(SCRIPT, *short, "--precond", how, "--out", out, "--steps", steps, *more, cwd=chain)
        found, meta = load_checkpoint(out, "cd")
        weights.append(found)
        tables = json.loads((out.with_suffix("") / "tables.json").read_text())
        assert tables == meta["tables"] and tables["sigmas"] == noise_levels(8, meta["shift"])
        l, S = (torch.tensor(tables[name]) for name in "lS")
        assert l.shape == S.shape == (2, 8) and (l[:, 0] == 0).all() and (S > 0).all()
        assert (l == 0).all() == (how == "plain") == (S == 1).all()
    assert all(torch.equal(w, weights[1][name]) for name, w in weights[0].items())
    assert weights[0]["end_embedding.weight"].any()
    other = {"plain": "analytic", "analytic": "plain"}[how]
    flags = *short, "--out", out, "--steps", "3", "--resume"
    assert "another run" in refusal(SCRIPT, *flags, "--precond", other, cwd=chain)

    capsys.readouterr()
    shipped = tmp_path / "shipped/tiny"
    shipped.mkdir(parents=True)
    shutil.copy(chain / "ckpt/vae.pt", shipped)
    monkeypatch.setattr(stream, "SHIPPED", shipped)
    score = "--out", out, "--score", "--scenes", "8", "--out", tmp_path / "score.mp4"
    call(SCRIPT, *score, "--sampling-steps", "2", cwd=chain)
    row = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert row["stage"] == "cd" and row["steps"] == 2 and 0 < row["psnr"] < 100
    assert "expected a divisor of 4" in refusal(SCRIPT, *score, "--sampling-steps", "8", cwd=chain)


def test_other_networks_are_refused(chain, capsys, short):
    assert "expected a checkpoint of this script" in refusal(SCRIPT, "--out", "ckpt/cd.pt", "--score", cwd=chain)
    assert "ckpt/none.pt: no such file" in refusal(SCRIPT, "--out", "ckpt/none.pt", "--score", cwd=chain)
    with pytest.raises(SystemExit):
        call(SCRIPT, "--preset", "tiny-hy", cwd=chain)
    assert "invalid choice: 'tiny-hy'" in capsys.readouterr().err


def test_its_bill_is_that_of_consistency_distillation(capsys, chain):
    for script in SCRIPT, "distill_cd.py":
        call(script, "--plan", "1", cwd=chain)
    first, second = [line for line in capsys.readouterr().out.splitlines() if line.startswith("{")]
    assert first == second
