"""
The page: what the server lets in and sends, that the keys decide a chunk just before it is made, that a walk with the
keys is the walk of a file; and all of it once more in a real browser, which presses keys and reads the canvas.
"""
import base64
import http.client
import io
import json
import random
import re
import shutil
import signal
import struct
import subprocess
import threading
import time
from contextlib import ExitStack, contextmanager

import imageio.v3 as imageio
import numpy as np
import pytest
import torch
from einops import rearrange

from conftest import ENVIRONMENT, ROOT, command, free_port, refusal
from data import (
    CLEAR, KEYS, N_PANELS, Scene, explain_frames, from_bytes, intrinsics, load_encoder, parse_trajectory, psnr,
    read_prompt,
)
from helpers import fitted_vae, random_hy_dit
from model import PRESETS, Camera, load_checkpoint, load_net, load_vae
from stream import (
    MOST_BYTES, MOST_PITCH, MOST_VIEWERS, PAGE, TOY_PROMPT, Live, Player, Pose, open_server, packed, stream,
)

CPU = torch.device("cpu")
OTHER_PROMPT = ("red left wall, green right wall, yellow far wall, purple floor, blue ceiling, "
                "near right white pillar, far middle cyan pillar")
START = Pose(torch.zeros(3, dtype=torch.float64), 0.0, 0.0)


def open_shipped():
    net, meta = load_net(ROOT / "ckpt/tiny/dmd.pt", CPU)
    vae = load_vae(ROOT / "ckpt/tiny/vae.pt", CPU, meta["vae_fingerprint"])
    return Player(net, vae, load_encoder("tiny", None, CPU), meta | {"window": 8, "sink": 2})


def second_backbone():
    """Of random weights."""
    meta = load_checkpoint(ROOT / "ckpt/tiny/dmd.pt")[1] | {"preset": "tiny-hy", "window": 8, "sink": 2}
    net = random_hy_dit(**vars(PRESETS["tiny-hy"].dit))
    return Player(net, fitted_vae("tiny-hy"), load_encoder("tiny-hy", None, CPU), meta)


@pytest.fixture(scope="module")
def player():
    return open_shipped()


@pytest.fixture
def walk(player):
    return Live(player, TOY_PROMPT, 0, None, toy=True)


@pytest.fixture(scope="module")
def server(player):
    """A page's server, whose walk rests while nobody looks."""
    with open_server(0) as server:
        server.RequestHandlerClass.live = walk = Live(player, TOY_PROMPT, 0, None, toy=True)
        walk.fps = 60
        threading.Thread(target=walk.run, daemon=True).start()
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


def ask(server, method, path, body=None, **headers):
    """Status, headers and text of an answer."""
    link = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=20)
    headers = {name.replace("_", "-"): value for name, value in headers.items()}
    link.request(method, path, body, headers)
    answer = link.getresponse()
    text = answer.read().decode()
    link.close()
    return answer.status, answer.headers, text


def post(server, **asked):
    status, _, text = ask(server, "POST", "/input", json.dumps(asked))
    return status, text


class Page:
    """What a page reads."""

    def __init__(self, server):
        self.link = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=20)
        self.link.request("GET", "/frames")
        self.answer = self.link.getresponse()
        self.viewer = int(self.answer.headers.get("X-Viewer", 0))

    def read(self):
        head, body = struct.unpack("<II", self.answer.read(8))
        head = json.loads(self.answer.read(head))
        frames = np.frombuffer(self.answer.read(body), np.uint8)
        return head, frames.reshape(head["frames"], *head["size"], 4) if body else None

    def until(self, kind, found=lambda head: True):
        patience = time.time() + 60
        while time.time() < patience:
            head, frames = self.read()
            if head["kind"] == kind and found(head):
                return head, frames
        raise TimeoutError(f"no such message of kind {kind} in a minute")


@contextmanager
def page(server):
    opened = Page(server)
    try:
        yield opened
    finally:
        opened.answer.close()
        opened.link.close()
        left = time.time() + 10
        while opened.viewer in server.RequestHandlerClass.live.viewers and time.time() < left:
            time.sleep(0.01)


def restart(server, shown, **asked):
    """The first frame of a new video."""
    shown.until("frames", lambda head: head["first"] > 0)
    assert post(server, viewer=shown.viewer, reset=True, **asked) == (200, "")
    return shown.until("frames", lambda head: head["first"] == 0)[1]


# ------------------------------------------------------------------------------------------------------------- The walk


@pytest.mark.parametrize("path", ("w*3,w+l*2,d+j", "a,u*2,dn+l", "j*3,i*2,s+i", "w,i+l"))
def test_keys_move_the_camera_as_a_path_does(path):
    """While it does not turn aside after it looked up or down."""
    pose, poses = START, [START.viewmat()]
    for part in path.split(","):
        keys, _, count = part.partition("*")
        for _ in range(int(count or 1)):
            pose = pose.moved(set(keys.split("+")), toy=False)
            poses.append(pose.viewmat())
    torch.testing.assert_close(torch.stack(poses), parse_trajectory(path), atol=1e-6, rtol=0)


def test_the_horizon_stays_level_and_walls_stop_the_walk():
    pose, rng = START, random.Random(0)
    for _ in range(500):
        pose = pose.moved(set(rng.sample(sorted(KEYS), 2)) | {"w"}, toy=True)
        assert (pose.centre.abs() <= torch.tensor(CLEAR) + 1e-6).all() and abs(pose.pitch) <= MOST_PITCH
        assert abs(pose.viewmat()[0, 1]) < 1e-6  # the picture's rows are level
    still = pose.moved({"w", "s", "j", "l"}, toy=True)
    torch.testing.assert_close(still.viewmat(), pose.viewmat())


@pytest.mark.slow
@pytest.mark.parametrize("open_one", (open_shipped, second_backbone))
def test_a_walk_with_the_keys_is_the_walk_of_a_file(open_one):
    player = open_one()
    walk, shown = Live(player, TOY_PROMPT, 3, None, toy=False), []
    _, viewer = walk.join()
    for keys in ("w", "w", "w", "l", "l", "dl", "dl", "", "a", "a", "s", "s"):  # more than the window
        walk.chunk(set(keys), 0)
        for message in viewer.messages:
            head, body = struct.unpack("<II", message[:8])
            if body:
                shown.append(np.frombuffer(message[8 + head :], np.uint8).reshape(-1, 64, 64, 4))
        viewer.messages.clear()
    viewmats = parse_trajectory("w*2,l*2,d+l*2,a*2,s*2")  # the first frame is where the walk begins
    viewmats = viewmats[[*range(7), 6, *range(7, 11)]]  # for a chunk it stands
    camera = Camera(viewmats[None], intrinsics(player.meta["K"]).expand(1, len(viewmats), 3, 3))
    film = torch.cat(list(stream(player, [TOY_PROMPT], camera, [3])), dim=2)
    shown = from_bytes(torch.from_numpy(np.concatenate(shown)))
    assert len(shown) == 1 + 4 * (len(viewmats) - 1) and (shown[..., 3] == 1).all()
    torch.testing.assert_close(rearrange(shown[..., :3], "t h w c -> 1 c t h w"), film, atol=1.01 / 127.5, rtol=0)


def test_a_chunk_waits_for_its_keys(walk):
    """It is begun as late as may be, with what was pressed until then: also what was only tapped, and once."""
    number, _ = walk.join()
    walk.leads.extend([0.1] * 20)
    walk.due = time.perf_counter() + 0.5
    began, found = time.perf_counter(), []
    waiting = threading.Thread(target=lambda: found.append(walk.wait()))
    waiting.start()
    for count, keys in enumerate((["w"], [], ["l"]), 1):
        time.sleep(0.05)
        walk.take({"viewer": number, "keys": keys, "number": count})
    walk.take({"viewer": number, "keys": ["k"], "number": 1})  # one that was overtaken
    waiting.join()
    assert found == [({"w", "l"}, 3)]
    assert 0.35 < time.perf_counter() - began < 5
    assert walk.wait() == ({"l"}, 3)


def test_what_nobody_takes_is_lost_and_a_walk_takes_no_more_memory(walk):
    _, slow = walk.join()
    sizes = []
    for _ in range(8):
        walk.chunk({"w"}, 0)
        sizes.append((len(walk.state.latents.past), len(slow.messages)))
    assert sizes[-1] == sizes[-2] == (sizes[-1][0], slow.messages.maxlen)
    head, = struct.unpack("<I", slow.messages[0][:4])
    assert json.loads(slow.messages[0][8 : 8 + head]).get("first", 1) > 0


def test_a_walk_stands_while_nobody_looks_or_it_is_paused(walk):
    results = []
    threading.Thread(target=lambda: results.append(walk.wait()), daemon=True).start()
    time.sleep(0.1)
    assert results == []
    number, _ = walk.join()
    walk.take({"viewer": number, "paused": True})
    walk.take({"viewer": number, "reset": True, "seed": 4})
    time.sleep(0.1)
    walk.obey()
    assert walk.seed == 4 and walk.paused


def test_the_truth_tells_who_obeys(walk):
    """The keys' own path explains a second better than standing still; of one that stands, nothing is said."""
    walk.join()
    walk.chunk({"d"}, 0)
    for _ in range(2):
        walk.due = time.perf_counter() + 10  # there is time
        walk.chunk({"d"}, 0)
        assert walk.obeyed > 0.3
    for _ in range(4):
        assert walk.obeyed is not None
        walk.due = time.perf_counter() + 10
        walk.chunk(set(), 0)
    assert walk.obeyed is None


def test_a_new_prompt_keeps_what_a_second_backbone_was_given():
    player = second_backbone()
    walk = Live(player, TOY_PROMPT, 0, torch.rand(1, 3, 1, 64, 64), toy=True)
    walk.chunk({"w"}, 0)
    new, old = walk.read(OTHER_PROMPT)[0], walk.state.prompts[0]
    assert torch.equal(new.vision, old.vision) and torch.equal(new.given_latents, old.given_latents)
    assert new.vision.any() and not torch.equal(new.text, old.text)
    number, _ = walk.join()
    walk.take({"viewer": number, "prompt": OTHER_PROMPT})
    assert walk.wait() is None
    walk.obey()
    walk.chunk({"w"}, 0)
    assert walk.prompt == OTHER_PROMPT and walk.state.prompts[0] is not old


# ----------------------------------------------------------------------------------------------------------- The server


def test_the_page_has_a_button_for_every_key(server):
    status, headers, text = ask(server, "GET", "/")
    assert status == 200 and text == PAGE.read_text() and "default-src 'self'" in headers["Content-Security-Policy"]
    assert set(re.findall(r'data-key="(\w+)"', text)) == set(KEYS)
    assert "http://" not in text and "https://" not in text  # nothing from elsewhere
    assert ask(server, "GET", "/stream.py")[0] == ask(server, "POST", "/")[0] == 404


@pytest.mark.parametrize("headers", (
    {"Host": "example.com"}, {"Host": "evil.example:80"}, {"Origin": "http://evil.example"}, {"Origin": "null"},
    {"Sec_Fetch_Site": "cross-site"}, {"Origin": "http://127.0.0.1:1"},
))
@pytest.mark.parametrize("method, path", (("GET", "/"), ("GET", "/frames"), ("POST", "/input")))
def test_other_sites_are_refused(server, headers, method, path):
    status, _, text = ask(server, method, path, "{}" if method == "POST" else None, **headers)
    assert status == 403 and text.startswith("error: ")


def test_it_listens_on_this_machine_alone(server):
    assert server.server_address[0] == "127.0.0.1"
    port = server.server_port
    for host in (f"localhost:{port}", f"127.0.0.1:{port}"):
        assert ask(server, "GET", "/", Host=host, Origin=f"http://{host}", Sec_Fetch_Site="same-origin")[0] == 200


def test_a_browser_leaves_out_the_usual_port(server, monkeypatch):
    link = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=20)
    monkeypatch.setattr(server, "server_port", 80)
    link.request("GET", "/", None, {"Host": "localhost", "Origin": "http://localhost"})
    assert link.getresponse().status == 200
    link.close()


def test_an_input_changes_what_it_names_alone(walk, monkeypatch):
    """Also if something else changes while a prompt is read; and whatever the network's own frames/s are."""
    number, _ = walk.join()
    walk.fps = 120

    def read(prompt):
        walk.take({"viewer": number, "fps": 30})
        return walk.state.prompts

    monkeypatch.setattr(walk, "read", read)
    walk.take({"viewer": number, "prompt": TOY_PROMPT, "keys": ["w"], "number": 1})
    assert walk.fps == 30 and walk.viewers[number].held == {"w"}


@pytest.mark.parametrize("body", (
    "", "{", "[]", "3", '"w"', "\xff", "[" * 5000, '{"keys": ["x"]}', '{"keys": [["w"]]}', '{"keys": "w"}',
    '{"fps": 0}', '{"fps": NaN}', '{"fps": 1e9}', '{"seed": -1}', '{"seed": 1e3}', '{"prompt": ""}',
    '{"prompt": "a red cat"}', '{"what": 1}', '{"paused": 1}', "{}", '{"viewer": 999, "keys": ["w"]}',
))
def test_bad_input_is_refused_in_one_line(server, body):
    status, _, text = ask(server, "POST", "/input", body.encode("latin1"))
    assert status == 400 and text.startswith("error: ") and "\n" not in text


def test_what_is_too_large_is_refused(server):
    assert ask(server, "POST", "/input", b" " * (MOST_BYTES + 1))[0] == 413
    assert ask(server, "POST", "/input", b"{}", Content_Length="-1")[0] == 413
    assert ask(server, "GET", "/" + "a" * 70_000)[0] == 414


def test_frames_come_and_the_keys_steer(server):
    with page(server) as shown:
        first = restart(server, shown, seed=1)
        assert first.shape == (1, 64, 64, 4)
        following, _ = shown.until("frames")
        assert following["first"] == 1 and following["frames"] == 4
        assert post(server, viewer=shown.viewer, keys=["d", "l"], number=7) == (200, "")
        head, _ = shown.until("frames", lambda head: head["number"] == 7 and head["first"] > 1)
        assert head["keys"] == ["d", "l"] and head["pose"][0] > 0 and head["pose"][3] > 0
        assert shown.until("status")[0]["chunk_seconds"][0] > 0
        assert post(server, viewer=shown.viewer, keys=[], number=8)[0] == 200
        assert (restart(server, shown, seed=1) == first).all()
        assert (restart(server, shown, seed=2) != first).any()


def test_a_page_that_is_closed_lets_go_of_its_keys(server):
    walk = server.RequestHandlerClass.live
    with page(server) as shown:
        post(server, viewer=shown.viewer, keys=["w"], number=1)
        shown.until("frames", lambda head: head["keys"] == ["w"])
    time.sleep(0.5)
    made = walk.frames
    time.sleep(0.3)
    assert walk.frames == made and not walk.viewers  # nobody looks: it stands
    with page(server) as shown:
        assert shown.until("frames")[0]["keys"] == []


def test_the_second_page_watches_until_the_first_is_closed(server):
    with page(server) as second:  # closed last
        with page(server) as first:
            pass
        with page(server) as third:
            assert third.until("status")[0]["driver"] == second.viewer
            status, text = post(server, viewer=third.viewer, keys=["w"], number=1)
            assert status == 400 and "watches" in text
            assert first.viewer != third.viewer
            seen = [second.until("frames"), third.until("frames")]
            while (ahead := seen[0][0]["first"] - seen[1][0]["first"]) != 0:  # they may be chunks apart
                seen[ahead > 0] = (second, third)[ahead > 0].until("frames")
            assert (seen[0][1] == seen[1][1]).all()
            second.answer.close()
            second.link.close()
            third.until("status", lambda head: head["driver"] == third.viewer)
            assert post(server, viewer=third.viewer, keys=["w"], number=1) == (200, "")


def test_there_is_an_end_of_pages(server):
    with ExitStack() as pages:
        for _ in range(MOST_VIEWERS):
            pages.enter_context(page(server))
        status, _, text = ask(server, "GET", "/frames")
        assert status == 503 and text == f"error: {MOST_VIEWERS} pages are open already"


def test_a_prompt_is_taken_at_the_next_chunk_and_a_bad_one_changes_nothing(server):
    with page(server) as shown:
        restart(server, shown, prompt=TOY_PROMPT)
        status, text = post(server, viewer=shown.viewer, prompt="a castle in the clouds")
        assert status == 400 and text.startswith("error: prompt 'a castle in the clouds': expected")
        assert shown.until("status")[0]["prompt"] == TOY_PROMPT
        assert post(server, viewer=shown.viewer, prompt=OTHER_PROMPT) == (200, "")
        head, _ = shown.until("status", lambda head: head["prompt"] == OTHER_PROMPT)
        assert head["world"]["pillars"] == read_prompt(OTHER_PROMPT)[1].tolist()
        frames = shown.until("frames")[0]
        assert frames["first"] > 0  # the walk goes on


def test_messages():
    head, = struct.unpack("<I", packed({"a": 1})[:4])
    assert packed({"a": 1})[8:] == b'{"a": 1}' and head == 8
    message = packed({}, torch.full((1, 3, 2, 4, 5), -1.0))
    assert message.endswith(b"\0\0\0\xff" * 40)


def test_a_port_in_use(server, tmp_path):
    port = server.server_port
    assert refusal("stream.py", "--live", "--port", port, cwd=tmp_path) == (
        f"error: --port {port}: address already in use; --port 0 takes any that is free")


@pytest.mark.parametrize("flags, reason", (
    (("--port", "70000"), "--port 70000: expected 0 to 65535"), (("--score",), "--live: expected none of"),
    (("--ckpt", ROOT / "ckpt/tiny/camera.pt"), "chunk by chunk"),
    (("--window", "1", "--sink", "1"), "--window 1: too short"),
))
def test_what_cannot_be_played(tmp_path, flags, reason):
    assert reason in refusal("stream.py", "--live", "--port", "0", *flags, cwd=tmp_path)


# ---------------------------------------------------------------------------------------------------------- The browser


@contextmanager
def served(cwd, port="0"):
    """`python stream.py --live` in a process of its own, and the page's address."""
    line = command("stream.py", "--live", "--port", port, "--ckpt", ROOT / "ckpt/tiny/dmd.pt")
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    heard = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)  # which a shell's background jobs ignore
    process = subprocess.Popen(line, cwd=cwd, env=ENVIRONMENT, preexec_fn=heard, **pipes)
    try:
        said = process.stdout.readline()
        assert said.startswith("http://127.0.0.1:"), said + process.stderr.read()
        yield process, said.split()[0]
    finally:
        process.kill()
        process.communicate()


def stop(process):
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 0 and errors.endswith("stopped\n") and "Traceback" not in errors


@pytest.mark.slow
def test_ctrl_c_ends_it_while_a_page_is_open(tmp_path):
    port = free_port()
    with served(tmp_path, port) as (process, _):
        link = http.client.HTTPConnection("127.0.0.1", int(port), timeout=20)
        link.request("GET", "/frames")
        assert len(link.getresponse().read(50_000)) == 50_000
        stop(process)
    with served(tmp_path, port) as (process, _):  # the port is free again
        stop(process)


@pytest.fixture
def browser(tmp_path):
    """A real one, which keeps what it downloads in tmp_path."""
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
    programs = [shutil.which(name) for name in ("chromium", "chromedriver")]
    if None in programs:
        pytest.skip("chromium and chromedriver are not installed (Debian: chromium, chromium-driver)")
    options = webdriver.ChromeOptions()
    options.binary_location = programs[0]
    for flag in ("headless", "no-sandbox", "disable-gpu", "disable-quic", "no-first-run", "disable-sync",
                 "disable-background-networking", "disable-component-update", "disable-dev-shm-usage",
                 f"user-data-dir={tmp_path / 'profile'}"):
        options.add_argument(f"--{flag}")
    options.add_experimental_option("prefs", {"download.default_directory": str(tmp_path)})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(programs[1]))
    driver.set_script_timeout(30)
    yield driver
    driver.quit()


def until(found, seconds=30):
    """What `found` returns, once that is something."""
    end = time.time() + seconds
    while time.time() < end:
        result = found()
        if result:
            return result
        time.sleep(0.05)
    pytest.fail("the page did not get there in time")


def press(browser, key, down):
    from selenium.webdriver import ActionChains
    actions = ActionChains(browser, duration=0)
    (actions.key_down(key) if down else actions.key_up(key)).perform()


def shown(browser, what="index"):
    return browser.execute_script(f"return window.shown ? window.shown.{what} : null")


def text(browser, name):
    return browser.find_element("id", name).text


def read_canvas(browser):
    """The picture [1 3 1 64 64], as it is on the page."""
    url = browser.execute_script("return document.getElementById('picture').toDataURL()")
    image = imageio.imread(io.BytesIO(base64.b64decode(url.split(",")[1])))
    zoom = image.shape[0] // 64
    return rearrange(from_bytes(torch.from_numpy(image[zoom // 2 :: zoom, zoom // 2 :: zoom, :3].copy())),
                     "h w c -> 1 c 1 h w")


@pytest.mark.slow
def test_the_picture_in_a_browser_obeys_the_keys(tmp_path, browser):
    """Two walks from the same first frame: of each, its own end explains the canvas better than the other's."""
    colours, pillars = read_prompt(TOY_PROMPT)
    scene = Scene(colours[None], pillars[None], torch.zeros(1, N_PANELS, dtype=torch.long))
    pictures, poses = [], []
    with served(tmp_path) as (process, address):
        browser.get(address)
        until(lambda: shown(browser))
        for key in ("d", "\ue012"):  # to the right; the left arrow
            browser.find_element("id", "reset").click()
            until(lambda: (shown(browser) or 99) < 8)
            press(browser, key, True)
            until(lambda: shown(browser) > 24)
            press(browser, key, False)
            browser.find_element("id", "pause").click()
            until(lambda: text(browser, "pause") == "go on")
            until(lambda: shown(browser, "index % 4 == 0"))  # the last of a chunk, whose pose is its own
            time.sleep(0.5)
            x, y, z, yaw, pitch = shown(browser, "pose")
            pictures.append(read_canvas(browser))
            poses.append(Pose(torch.tensor([x, y, z], dtype=torch.float64), yaw, pitch))
        stop(process)
    assert poses[0].centre[0] > 0.2 and poses[1].yaw < -0.1
    K = intrinsics((0.5050505, 0.5050505, 0.5, 0.5))
    dB = torch.tensor([[psnr(picture, explain_frames(picture, scene, pose.viewmat()[None, None], K)[0])
                        for pose in (*poses, START)] for picture in pictures])
    print(f"dB of each canvas along its own path, the other's, and standing still: {dB.tolist()}")
    assert dB[0].argmax() == 0 and dB[1].argmax() == 1


@pytest.mark.slow
def test_keys_reach_the_screen_soon(tmp_path, browser):
    """Its figures are for the reader: machines that test are slow."""
    rng = random.Random(0)
    with served(tmp_path) as (process, address):
        browser.get(address)
        until(lambda: shown(browser))
        browser.execute_script("document.getElementById('fps').value = 24; document.getElementById('fps').onchange()")
        for _ in range(20):
            key = rng.choice(["w", "a", "s", "d", "\ue012", "\ue014"])
            press(browser, key, True)
            time.sleep(rng.uniform(0.1, 0.5))
            press(browser, key, False)
            time.sleep(rng.uniform(0.1, 0.5))
        until(lambda: browser.execute_script("return figures.photons") >= 15)
        figures = browser.execute_script("return figures")
        print(json.dumps(figures), text(browser, "chunk"))
        assert 0 < figures["photon"][0] <= figures["photon"][1] < 5
        stop(process)


@pytest.mark.slow
def test_tabs_that_come_and_go(tmp_path, browser):
    """Reloaded, a page has the keys again; a second one watches; it takes over when the first is killed, key held."""
    with served(tmp_path) as (process, address):
        browser.get(address)
        until(lambda: shown(browser))
        press(browser, "w", True)
        until(lambda: shown(browser, "keys.length"))
        browser.refresh()
        until(lambda: shown(browser, "keys.length === 0"))
        until(lambda: text(browser, "note") == "")
        press(browser, "d", True)
        until(lambda: shown(browser, "keys.includes('d')"))

        first = browser.current_window_handle
        browser.switch_to.new_window("tab")
        second = browser.current_window_handle
        browser.get(address)
        until(lambda: "watches" in text(browser, "note"))
        seen = until(lambda: shown(browser))
        until(lambda: shown(browser) > seen)
        browser.switch_to.window(first)
        browser.close()
        browser.switch_to.window(second)
        until(lambda: text(browser, "note") == "")
        until(lambda: shown(browser, "keys.length === 0"))
        stop(process)


@pytest.mark.slow
def test_the_rest_of_the_page(tmp_path, browser):
    """Prompts, a recording, a server that ends and comes again."""
    port = free_port()
    with served(tmp_path, port) as (process, address):
        browser.get(address)
        until(lambda: shown(browser))
        box = browser.find_element("id", "prompt")
        all_of_it = "\ue009a"  # Ctrl-A
        box.send_keys(all_of_it, "\ue000", "a castle in the clouds\n")
        until(lambda: "expected '<colour> left wall'" in text(browser, "note"))
        seen = shown(browser)
        until(lambda: shown(browser) > seen + 8)
        assert box.get_attribute("value") == "a castle in the clouds"  # to be mended
        box.send_keys(all_of_it, "\ue000", OTHER_PROMPT + "\n")
        until(lambda: text(browser, "note") == "" and browser.execute_script("return told.prompt") == OTHER_PROMPT)

        record = browser.find_element("id", "record")
        record.click()
        time.sleep(1.5)
        record.click()
        film, = until(lambda: [*tmp_path.glob("walk.webm"), *tmp_path.glob("walk.mp4")])
        assert next(imageio.imiter(film, plugin="FFMPEG")).shape == (256, 256, 3)
        stop(process)
        until(lambda: "trying again" in text(browser, "note"))
    with served(tmp_path, port):
        browser.execute_script("shown.index = -1")
        until(lambda: shown(browser) >= 0)
        until(lambda: text(browser, "note") == "")
