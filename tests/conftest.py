"""
What the tests share: two ways to run a script, and one miniature run of the whole recipe.

The chain has 16 small videos of 4 latent frames, chunks of two and two steps a stage, its learning rate high and its
EMA short: two steps must move the weights that the next stage reads, or nothing would depend on them.
"""
import contextlib
import gc
import multiprocessing
import os
import runpy
import socket
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

import pytest
import torch
import torch.distributed as dist

torch.set_num_threads(1)  # as in the processes below: the networks are tiny, and the numbers depend on it

MINIATURE = "--batch-size 2 --lr 5e-3 --ema-decay 0.5 --log-every 1".split()
STEADY = ("--warmup", "0", "--cooldown", "0")  # the learning rate
SCRIPTS = {
    "base": ("train_camera.py", "--no-camera", *STEADY, "--shift", "3", "--sampling-steps", "4"),
    "camera": ("train_camera.py", *STEADY, "--shift", "3", "--sampling-steps", "4"),
    "ar": ("train_ar.py", *STEADY, "--sampling-steps", "4", "--chunk", "2"),
    "ode": ("distill_ode.py", "--warmup", "0"),
    "cd": ("distill_cd.py", "--warmup", "0"),
    "dmd": ("train_dmd.py", "--fake-score-lr", "5e-3", "--fake-score-updates", "2"),
}  # stage: its script and what makes it short
STAGES = [stage for stage in SCRIPTS if stage != "base"]


def command(script, *flags, nproc=1):
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", nproc] if nproc > 1 else []
    return [str(part) for part in (sys.executable, *torchrun, ROOT / script, *flags)]


ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "PYTHONPATH": str(ROOT)}


def run(script, *flags, cwd, nproc=1):
    """The script in a process of its own, or in nproc of them under torchrun."""
    line = command(script, *flags, nproc=nproc)
    return subprocess.run(line, cwd=cwd, env=ENVIRONMENT, capture_output=True, text=True)


def call(script, *flags, cwd):
    """The script in this process, __main__ block and all: seconds faster. Exits by SystemExit, as Python sees it."""
    argv, sys.argv = sys.argv, [script, *map(str, flags)]
    try:
        with contextlib.chdir(cwd):
            runpy.run_path(str(ROOT / script), run_name="__main__")
    finally:
        sys.argv = argv
        if dist.is_initialized():  # the script stopped half-way
            gc.collect()
            dist.destroy_process_group()


FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["conftest", "data", "distill_cd", "distill_ode", "train_ar", "train_camera", "train_dmd"])


def start(log, script, *flags, cwd, **environment):
    """The script in a process of its own, forked from one that has imported everything: it starts at once, and may be
    killed. What it prints goes to the file `log`."""
    process = FORKS.Process(target=_forked, args=(log, environment, cwd, script, flags))
    process.start()
    return process


def _forked(log, environment, cwd, script, flags):
    with open(log, "w") as file:
        os.dup2(file.fileno(), 1), os.dup2(file.fileno(), 2)
    sys.stdout.reconfigure(line_buffering=True)
    os.environ.update(environment)
    call(script, *flags, cwd=cwd)


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


def start_ranks(count, log, script, *flags, cwd):
    """As `start`, `count` ranks of one run, each with a log of its own."""
    group = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port(), "WORLD_SIZE": str(count)}
    return [start(f"{log}.{rank}", script, *flags, cwd=cwd, **group, RANK=str(rank), LOCAL_RANK=str(rank))
            for rank in range(count)]


def refusal(script, *flags, cwd):
    """The one line with which a script refuses to run: Python prints a SystemExit's text to stderr and exits with 1."""
    try:
        with pytest.raises(SystemExit) as stop:
            call(script, *flags, cwd=cwd)
    except Exception as error:
        pytest.fail(f"a traceback instead of one line: {error!r}", pytrace=False)
    message = stop.value.code
    assert isinstance(message, str) and message.startswith("error: ") and "\n" not in message
    return message


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: reads a folder that scripts wrote, or takes over a second")


def pytest_collection_modifyitems(items):
    for item in items:
        if {"chain", "second", "toy", "hy_world"} & set(item.fixturenames):  # fixtures that run scripts
            item.add_marker(pytest.mark.slow)


@pytest.fixture(scope="session")
def chain(tmp_path_factory):
    """A folder in which the recipe ran once, start to end. Tests read it, and write elsewhere."""
    folder = tmp_path_factory.mktemp("chain")
    commands = [("data.py", "--count", "16", "--frames", "4", "--size", "32")]
    for stage, (script, *flags) in SCRIPTS.items():
        if stage == "ode":
            commands.append((script, "--generate", "--pairs-count", "4", "--batch-size", "2"))
        commands.append((script, *MINIATURE, *flags, "--steps", "2"))
    for line in commands:
        process = start(folder / "log", *line, cwd=folder)
        process.join()
        assert process.exitcode == 0, f"{' '.join(line)}\n{(folder / 'log').read_text()}"
    return folder
