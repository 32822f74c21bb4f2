"""Checkpoints: resumed runs equal whole ones bit for bit, and what is damaged, foreign or cannot be written."""

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import jax
import numpy as np
import pytest

import pp_diffusion as ppd
from pp_diffusion.training.checkpoints import Checkpoint, Checkpoints, terminations

X = np.random.default_rng(0).normal(size=(60, 2))
DIFFUSION = ppd.Diffusion(ppd.GaussianKernel((2,)), ppd.FixedSchedule([0.1, 0.3]), ppd.networks.MLP((4,)))
IDENTITY = {"kernel": "a"}
KEY = jax.random.key(1)
ROOT = Path(__file__).parent.parent


class Killed(BaseException):
    """As a kill comes: between any two lines, and nothing is tidied up."""


def fit(folder=None, data=X, diffusion=DIFFUSION, kill_at=None, rng_key=KEY, **settings):
    def callback(step, state):
        if kill_at is not None and step >= kill_at:
            raise Killed

    settings = {"num_steps": 120, "batch_size": 16, "checkpoint_every": 0.0, **settings}
    return ppd.fit(rng_key, diffusion, data, checkpoint_dir=folder, callback=callback, progress_bar=False, **settings)


def same(a, b):
    for name in ("losses", "params", "state"):
        values = [jax.tree.leaves(jax.tree.map(as_numbers, getattr(x, name))) for x in (a, b)]
        for x, y in zip(*values, strict=True):
            np.testing.assert_array_equal(x, y)


def as_numbers(leaf):
    is_key = jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)
    return np.asarray(jax.random.key_data(leaf) if is_key else leaf)


@pytest.fixture(scope="module")
def whole():
    return fit()


@pytest.mark.slow
def test_a_run_that_was_killed_gives_what_it_would_have(tmp_path, whole):
    """Killed twice, at no multiples of anything: losses, parameters and held-out values are the same."""
    for kill_at in (5, 70):
        with pytest.raises(Killed):
            fit(tmp_path / "run", kill_at=kill_at)
    resumed = fit(tmp_path / "run")
    same(resumed, whole)
    for name in ("steps", "values", "per_step", "train"):
        np.testing.assert_array_equal(getattr(resumed.validation, name), getattr(whole.validation, name))
    same(fit(tmp_path / "run"), whole)  # it is at its end: nothing is trained
    assert len([path for path in (tmp_path / "run").iterdir() if path.name.isdigit()]) == 2


def test_a_call_that_goes_on_from_a_state_ends_where_it_would_have(tmp_path):
    """Its updates are counted from that state, also where the checkpoint is in their midst."""
    first = fit(num_steps=40)
    rest = {"state": first.state, "num_steps": 50}
    whole = fit(**rest)
    with pytest.raises(Killed):
        fit(tmp_path / "run", kill_at=60, **rest)
    same(fit(tmp_path / "run", **rest), whole)
    assert len(whole.losses) == 50 and int(whole.state.step) == 90


def test_pieces_of_a_total_by_one_folder(tmp_path, whole):
    """A piece that was killed is ended first; the call after a whole one is the next piece."""
    piece = {"num_steps": 50, "total_steps": 120}
    with pytest.raises(Killed):
        fit(tmp_path / "run", kill_at=20, **piece)
    ends = [fit(tmp_path / "run", **piece) for _ in range(4)]
    assert [int(end.state.step) for end in ends] == [50, 100, 120, 120]
    same(ends[-1], whole)


@pytest.mark.slow
def test_batches_go_on_too(tmp_path):
    data = [X[:16], X[16:32], X[32:48]]
    diffusion = ppd.Diffusion(ppd.GaussianKernel((2,)), ppd.FixedSchedule([0.1]), ppd.networks.MLP((3,)))
    for name, make in (("list", lambda: data), ("generator", lambda: (X[3 * (i % 9) :][:16] for i in range(99)))):
        with pytest.raises(Killed):
            fit(tmp_path / name, make(), diffusion, kill_at=10, num_steps=30)
        same(fit(tmp_path / name, make(), diffusion, num_steps=30), fit(None, make(), diffusion, num_steps=30))


@pytest.mark.slow
def test_grain_datasets_go_on_from_their_own_state(tmp_path):
    grain = pytest.importorskip("grain")
    rows = grain.MapDataset.source(X).shuffle(seed=3).repeat().batch(16, drop_remainder=True)
    data = rows.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=2))
    with pytest.raises(Killed):
        fit(tmp_path / "run", data, kill_at=10, num_steps=30)
    position = Checkpoints(tmp_path / "run", 60.0, {}).restore().notes["positions"][0]
    assert position["state"]["next_index"] > 0
    same(fit(tmp_path / "run", data, num_steps=30), fit(None, data, num_steps=30))


@pytest.mark.slow
def test_checkpoints_of_another_run_are_refused(tmp_path):
    fit(tmp_path / "run", num_steps=8, validation_data=X[:30])
    wider = ppd.Diffusion(ppd.GaussianKernel((2,)), ppd.FixedSchedule([0.1, 0.2]), ppd.networks.MLP((4,)))
    for settings, named in (
        ({"data": X + 1}, "data is '60 rows"),
        ({"diffusion": wider}, "rates"),
        ({"num_times": 2}, "num_times is 1, here 2"),
        ({"batch_size": 8}, "batch_size is 16, here 8"),
        ({"rng_key": jax.random.key(2)}, "rng_key"),
        ({"row_noise": 0.1}, "noise 0.5', here .* noise 0.1'"),
        ({"validation_data": X[30:]}, "held-out rows"),
    ):
        with pytest.raises(ValueError, match=f"checkpoint_dir holds the checkpoints of another run: in .*{named}"):
            fit(tmp_path / "run", **{"num_steps": 8, "validation_data": X[:30], **settings})
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"checkpoint_dir must be a folder of its own; .* holds 'notes.txt'"):
        fit(tmp_path)
    with pytest.raises(NotADirectoryError, match=r"checkpoint_dir must be a folder; .*notes.txt is a file"):
        fit(tmp_path / "notes.txt")


# --- damage ------------------------------------------------------------------------------------------------------


def checkpoint(step):
    numbers = np.random.default_rng(step)
    arrays = {"state.0": numbers.normal(size=300), "state.1": np.arange(5), "losses": np.zeros(0)}
    return Checkpoint(step, arrays, {"position": {"at": step}})


def check(found, step):
    assert found.step == step and found.notes == {"position": {"at": step}}
    for name, a in checkpoint(step).arrays.items():
        np.testing.assert_array_equal(found.arrays[name], a)


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """A folder with two of them."""
    folder = tmp_path_factory.mktemp("two") / "run"
    for step in (10, 20, 30):
        assert Checkpoints(folder, 60.0, IDENTITY).save(checkpoint(step))
    return folder


def files_of(folder):
    return sorted(path for path in folder.rglob("*") if path.is_file())


def damage(path, how):
    content = path.read_bytes()
    if how == "removed":
        path.unlink()
    elif how == "truncated":
        path.write_bytes(content[: len(content) // 2])
    elif how == "emptied":
        path.write_bytes(b"")
    else:
        place = len(content) // 3 if how == "flipped" else -1 - len(content) // 5
        path.write_bytes(content[:place] + bytes([content[place] ^ 0x55]) + content[place:][1:])


HOWS = ("removed", "truncated", "emptied", "flipped", "flipped late")


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # of futures that orbax drops
@pytest.mark.parametrize("how", HOWS)
def test_what_is_damaged_is_told_and_the_last_good_one_used(tmp_path, two, how):
    """Each file of the newest in turn: what comes back is one of the two, whole; never a third thing."""
    used = []
    for number in range(len(files_of(two / "30"))):
        folder = tmp_path / f"{how}{number}"
        shutil.copytree(two, folder)
        path = files_of(folder / "30")[number]
        if not path.stat().st_size:
            continue
        damage(path, how)
        checkpoints = Checkpoints(folder, 60.0, IDENTITY)
        with pytest.MonkeyPatch.context() as patch:
            told = []
            patch.setattr("warnings.warn", lambda message, told=told, **_: told.append(message))
            found = checkpoints.restore()
        used.append(found.step)
        check(found, found.step)
        assert found.step == 30 or f"checkpoint {folder / '30'} is damaged" in told[0]
        if found.step == 20:
            assert (folder / "30.damaged1").is_dir()
            assert checkpoints.save(checkpoint(25))  # it goes on from there
            check(Checkpoints(folder, 60.0, IDENTITY).restore(), 25)
    assert 20 in used


def test_damage_in_orbax_own_notes_hides_no_other(tmp_path, two):
    """A digit of a time that becomes an ``e`` makes a float of it; neither reading nor the next writing minds."""
    shutil.copytree(two, tmp_path / "run")
    for step in ("20", "30"):
        notes = tmp_path / "run" / step / "_CHECKPOINT_METADATA"
        found = json.loads(notes.read_text())
        notes.write_text(json.dumps({name: 1.5 if "timestamp" in name else value for name, value in found.items()}))
    checkpoints = Checkpoints(tmp_path / "run", 60.0, IDENTITY)
    check(checkpoints.restore(), 30)
    assert checkpoints.save(checkpoint(40))
    assert sorted(os.listdir(tmp_path / "run")) == ["30", "40"]
    check(checkpoints.restore(), 40)


def test_where_none_is_good_it_says_so(tmp_path, two):
    shutil.copytree(two, tmp_path / "run")
    for step in ("20", "30"):
        shutil.rmtree(tmp_path / "run" / step / "header")
    with pytest.raises(ValueError, match=r"checkpoint_dir holds no checkpoint that can be read: .*30 is damaged"):
        Checkpoints(tmp_path / "run", 60.0, IDENTITY).restore()
    (tmp_path / "other" / "7").mkdir(parents=True)
    (tmp_path / "other" / "7" / "weights.bin").write_bytes(b"x" * 100)
    with pytest.raises(ValueError, match="7 is damaged or foreign"):
        Checkpoints(tmp_path / "other", 60.0, IDENTITY).restore()
    assert Checkpoints(tmp_path / "new", 60.0, IDENTITY).restore() is None


def test_half_written_ones_are_no_checkpoints(tmp_path, two):
    shutil.copytree(two, tmp_path / "run")
    shutil.copytree(two / "30", tmp_path / "run" / "40.orbax-checkpoint-tmp-1")
    check(Checkpoints(tmp_path / "run", 60.0, IDENTITY).restore(), 30)


def test_a_full_disk_does_not_lose_the_last(tmp_path, two):
    """Files may not grow beyond 2 kB: writing fails, says so, and the last one is there, as if nothing had been."""
    shutil.copytree(two, tmp_path / "run")
    checkpoints = Checkpoints(tmp_path / "run", 60.0, IDENTITY)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    big = Checkpoint(40, {"state.0": np.random.default_rng(0).normal(size=100_000)}, {"position": None})
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, before[1]))
        with pytest.warns(UserWarning, match="no checkpoint could be written at update 40 .* the last one is kept"):
            assert not checkpoints.save(big)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, ignored)
    check(Checkpoints(tmp_path / "run", 60.0, IDENTITY).restore(), 30)
    assert checkpoints.save(checkpoint(40))
    check(checkpoints.restore(), 40)


def test_sigterm_saves_and_goes_on_its_way(tmp_path, whole):
    came = []
    before = signal.signal(signal.SIGTERM, lambda *_: came.append(1))
    try:
        with pytest.raises(Killed), terminations() as ended:
            signal.raise_signal(signal.SIGTERM)
            assert ended and not came
            raise Killed
        assert came == [1]  # the handler that was there, once, behind all

        def callback(step, state):
            if step >= 30:
                signal.raise_signal(signal.SIGTERM)

        settings = {"num_steps": 120, "batch_size": 16, "progress_bar": False, "checkpoint_dir": tmp_path / "run"}
        first = ppd.fit(jax.random.key(1), DIFFUSION, X, callback=callback, **settings)
        assert came == [1, 1] and 30 <= len(first.losses) < 120
    finally:
        signal.signal(signal.SIGTERM, before)
    same(fit(tmp_path / "run"), whole)


SCRIPT = """
    import sys, jax, numpy as np, pp_diffusion as ppd
    x = np.random.default_rng(0).normal(size=(400, 2))
    network = ppd.networks.MLP((16, 16))
    diffusion = ppd.Diffusion(ppd.GaussianKernel((2,)), ppd.LearnedSchedule(10, 1e-3), network)
    told = []

    def callback(step, state):  # the second dispatch is done: it trains
        told.append(len(told) == 1 and print("training", flush=True))

    fit = ppd.fit(jax.random.key(1), diffusion, x, num_steps=60_000, batch_size=64, max_patience=1000,
                  checkpoint_dir=sys.argv[1], checkpoint_every=0.1, progress_bar=False, callback=callback)
    np.savez(sys.argv[2], losses=fit.losses, *jax.tree.leaves(fit.params))
"""


@pytest.mark.slow
def test_kill_9_at_any_moment(tmp_path):
    """A process of its own, killed twenty times at random moments of its training, of which every tenth of a second is
    a checkpoint, and once asked to end, ends as the one that was left alone."""
    (tmp_path / "script.py").write_text(textwrap.dedent(SCRIPT))
    environment = os.environ | {"PYTHONPATH": str(ROOT)}

    def start(folder):
        arguments = [sys.executable, tmp_path / "script.py", tmp_path / folder, tmp_path / f"{folder}.npz"]
        return subprocess.Popen(arguments, env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)

    def saved():
        return max((int(path.name) for path in (tmp_path / "killed").glob("[0-9]*") if path.name.isdigit()), default=0)

    def ends(folder):
        with start(folder) as process:
            process.communicate()
        return process.returncode == 0

    assert ends("whole")
    whole = np.load(tmp_path / "whole.npz")
    moments, steps = np.random.default_rng(0), []
    for number in [signal.SIGKILL] * 20 + [signal.SIGTERM]:
        with start("killed") as process:
            assert process.stdout.readline() == b"training\n"
            time.sleep(moments.uniform(0.0, 0.6))
            before = saved()
            process.send_signal(number)
            assert process.wait() == -number
        steps.append(saved())
    assert steps[-1] > before or steps[-1] == len(whole["losses"])  # SIGTERM saved one more
    assert len(set(steps)) > 10 and steps == sorted(steps)
    assert ends("killed")
    killed = np.load(tmp_path / "killed.npz")
    for name in whole.files:
        np.testing.assert_array_equal(whole[name], killed[name])
