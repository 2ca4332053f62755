"""The store's promise: what has a manifest is complete, and nothing that was complete is ever lost."""

from __future__ import annotations

import builtins
import contextlib
import errno
import itertools
import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny import answer, limbeck, until

from limbeck.pipeline.store import MANIFEST, OUTCOME, Store, out_of_space, write
from limbeck.run_log import RunLog, read_metrics
from limbeck.train.checkpoint import Checkpoint
from limbeck.types import Corrupted, Resumable

pytestmark = pytest.mark.slow

ABOUT = {"kind": "rl", "stage": "zero"}


@pytest.fixture
def store(tmp_path) -> Store:
    return Store(tmp_path / "store")


def lay(store: Store, key: str, text: str = "weights") -> Path:
    """A partial folder as a stage leaves it."""
    folder = store.partial("rl", key)
    (folder / "model").mkdir(exist_ok=True)
    (folder / "model" / "model.safetensors").write_text(text)
    (folder / "metrics.jsonl").write_text('{"step": 0}\n')
    (folder / "timing.jsonl").write_text(f'{{"seconds": {key}}}\n')
    (folder / OUTCOME).write_text("{}")
    return folder


def put(store: Store, key: str, text: str = "weights"):
    return store.finish(lay(store, key, text), {**ABOUT, "key": key})


def test_an_artifact_is_found_once_it_is_finished_and_its_partial_folder_is_gone(store):
    assert store.find("rl", "1") is None
    artifact = put(store, "1")
    assert store.find("rl", "1") == artifact
    assert artifact.folder == store.root / "rl-1"
    assert set(artifact.manifest["outputs"]) == {"model/model.safetensors", "metrics.jsonl", "timing.jsonl"}
    assert not list(store.root.glob(".partial/rl-1"))
    assert not (artifact.folder / OUTCOME).exists()


def test_a_folder_without_a_manifest_does_not_exist(store):
    (store.root / "rl-2").mkdir(parents=True)
    (store.root / "rl-2" / "model.safetensors").write_text("half")
    assert store.find("rl", "2") is None
    assert list(store.all()) == []


def test_looking_into_a_store_creates_nothing(store):
    assert store.find("rl", "1") is None
    assert not list(store.all())
    assert not store.leftovers()
    assert not store.root.exists()


def test_a_digest_tells_of_content_and_not_of_seconds(store):
    assert put(store, "1").digest == put(store, "2").digest
    assert put(store, "3", "other weights").digest != put(store, "4").digest


def test_verify_names_what_changed_and_what_is_missing(store):
    put(store, "1"), put(store, "2"), put(store, "3"), put(store, "4")
    (store.root / "rl-1" / "model" / "model.safetensors").write_text("weighty")
    (store.root / "rl-2" / "metrics.jsonl").unlink()
    manifest = store.root / "rl-3" / MANIFEST
    manifest.write_text(manifest.read_text().replace('"bytes": 7', '"bytes": 8'))
    wrong = {artifact.folder.name: faults for artifact, faults in store.verify()}
    assert wrong["rl-1"] == [f"{store.root / 'rl-1/model/model.safetensors'} has changed"]
    assert wrong["rl-2"] == [f"{store.root / 'rl-2/metrics.jsonl'} is missing"]
    assert wrong["rl-3"][0] == f"{manifest} has changed"
    assert wrong["rl-4"] == []


def test_a_manifest_that_is_no_json_is_named_with_the_remedy(store):
    put(store, "1")
    (store.root / "rl-1" / MANIFEST).write_text("{")
    with pytest.raises(
        Corrupted, match="rl-1/manifest.json: not valid JSON; remove .* and run again"
    ) as caught:
        store.find("rl", "1")
    assert caught.value.exit_code == 4


def test_what_stands_in_an_artifacts_place_is_put_aside_and_never_deleted(store):
    for text in ("first", "second"):
        (store.root / "rl-1").mkdir(parents=True)
        (store.root / "rl-1" / "precious").write_text(text)
        put(store, "1")
        store.remove(store.root / "rl-1")
    assert [p.read_text() for p in sorted(store.root.glob(".bad-*/precious"))] == ["first", "second"]
    assert set(store.leftovers()) == set(store.root.glob(".bad-*"))


def test_when_another_process_was_faster_its_artifact_stays(store):
    first = put(store, "1")
    second = store.finish(lay(store, "1", "later"), {**ABOUT, "key": "1"})
    assert second == first
    assert (first.folder / "model" / "model.safetensors").read_text() == "weights"
    assert store.finish(store.root / ".partial" / "rl-1-gone", {**ABOUT, "key": "1"}) == first
    assert not list(store.root.glob(".bad-*"))


def test_two_processes_never_work_in_one_folder(store):
    folder = lay(store, "1")
    program = (
        "import sys, pathlib; from limbeck.pipeline.store import Store; s = "
        "Store(pathlib.Path(sys.argv[1]))\n"
        "with s.lock(pathlib.Path(sys.argv[2])): print('mine', flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", program, str(store.root), str(folder)]
    other = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert other.stdout.readline() == "mine\n"
    with pytest.raises(Resumable, match="another process works on rl-1"), store.lock(folder, patience=0.1):
        pass
    other.kill()  # the system frees the lock of a process that was killed
    other.communicate()
    with store.lock(folder, patience=5):
        pass


# ---------------------------------------------------------------- faults


class Fault:
    """The n-th call that writes, syncs or renames fails; so do all after it where the disk `stays` full."""

    def __init__(self, monkeypatch, nth: int, number: int, stays: bool):
        self.left = nth
        self.nth = nth
        self.number = number
        self.stays = stays
        for place, name in ((os, "replace"), (os, "rename"), (os, "fsync"), (os, "unlink")):
            monkeypatch.setattr(place, name, self.wrapped(getattr(place, name)))
        monkeypatch.setattr(
            builtins, "open", self.wrapped(open, lambda a, k: set("wa+") & set(str([*a[1:2], k.get("mode")])))
        )

    @property
    def fired(self) -> bool:
        return self.left <= 0

    def wrapped(self, call, concerns=lambda a, k: True):
        def guarded(*arguments, **options):
            if concerns(arguments, options):
                self.left -= 1
                if self.left == 0 or (self.stays and self.left < 0):
                    raise OSError(self.number, os.strerror(self.number))
            return call(*arguments, **options)

        return guarded


@pytest.mark.parametrize("stays", [False, True])
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO])
def test_whatever_write_fails_no_artifact_is_broken_and_none_is_lost(tmp_path, monkeypatch, number, stays):
    for nth in itertools.count(1):
        store = Store(tmp_path / f"{nth}")
        old = put(store, "1")
        folder = lay(store, "2")
        with monkeypatch.context() as patch:
            fault = Fault(patch, nth, number, stays)
            try:
                store.finish(folder, {**ABOUT, "key": "2"})
                failed = False
            except OSError as error:
                failed = error.errno == number
        assert failed == fault.fired
        assert all(wrong == [] for _, wrong in store.verify())
        assert store.find("rl", "1") == old
        again = store.find("rl", "2") or store.finish(store.partial("rl", "2"), {**ABOUT, "key": "2"})
        assert again.digest == old.digest
        assert len(list(store.all())) == 2
        if not fault.fired:
            break
    assert nth > 8


def test_whatever_write_fails_a_checkpoint_is_the_old_one_or_the_new_one(tmp_path, monkeypatch):
    for nth in itertools.count(1):
        folder = tmp_path / str(nth)
        folder.mkdir()
        record = RunLog(folder)
        checkpoint = Checkpoint(folder, every=0)
        record.step(0, {"loss": 1.0})
        checkpoint.offer(lambda: {"step": 1, "weights": torch.ones(1000)}, record)
        with monkeypatch.context() as patch:
            fault = Fault(patch, nth, errno.ENOSPC, stays=True)
            try:
                record.step(1, {"loss": 0.5})
                checkpoint.offer(lambda: {"step": 2, "weights": torch.zeros(1000)}, record)
            except Exception as error:  # noqa: BLE001 - what torch raises is the question
                assert out_of_space(error)
        state = Checkpoint(folder).restore()
        assert (state["step"], float(state["weights"].sum())) in ((1, 1000.0), (2, 0.0))
        assert not fault.fired or state["step"] == 1
        if not fault.fired:
            break
    assert nth > 5


def test_a_text_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "recipe.yaml"
    write(path, "old")
    for nth in itertools.count(1):
        with monkeypatch.context() as patch:
            fault = Fault(patch, nth, errno.EIO, stays=False)
            try:
                write(path, "new")
            except OSError:
                assert path.read_text() == "old"
        if not fault.fired:
            break
    assert path.read_text() == "new"
    assert nth == 4


# ---------------------------------------------------------------- a disk that is full


@pytest.mark.parametrize("error", [
    OSError(errno.ENOSPC, "full"), OSError(errno.EDQUOT, "quota"), OSError(errno.EFBIG, "limit"),
    ValueError("Error while serializing: I/O error: No space left on device (os error 28)"),
])  # fmt: skip
def test_a_full_disk_is_known_by_whatever_library_tells_it(error):
    assert out_of_space(error)
    assert not out_of_space(OSError(errno.EIO, "broken"))
    assert not out_of_space(ValueError("(os error 5)"))


def test_torch_hides_a_full_disk_and_it_is_found_all_the_same(tmp_path):
    """A file may not grow beyond a limit, in a child: the disk itself is not needed."""
    program = (
        "import resource, sys, torch; from pathlib import Path\n"
        "from limbeck.files import atomic_write; from limbeck.pipeline.store import out_of_space\n"
        "def save(state):\n"
        "    with atomic_write(path) as file: torch.save(state, file)\n"
        "path = Path(sys.argv[1]); save({'step': 1})\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))\n"
        "try: save({'weights': torch.zeros(10**6)})\n"
        "except Exception as error: print(type(error).__name__, out_of_space(error), torch.load(path), "
        "len(list(path.parent.iterdir())))"
    )
    out = subprocess.run(
        [sys.executable, "-c", program, tmp_path / "state.pt"], capture_output=True, text=True, check=True
    )
    assert out.stdout == "RuntimeError True {'step': 1} 1\n"


ONE_STAGE = """
name: one
threads: 1
problems: {clock: {source: miniature}}
stages:
  base:
    {kind: pretrain, problems: clock, tokens: 60000, save_every: 0.05,
     shape: {hidden_size: 64, layers: 2, heads: 2, kv_heads: 1, intermediate_size: 128}}
"""


@pytest.fixture
def small_disk(tmp_path):
    """A disk of 4 MB; skips where none can be mounted."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", disk]
    if (
        os.geteuid()
        or not shutil.which("mount")
        or subprocess.run(mount, capture_output=True, check=False).returncode
    ):
        pytest.skip("mounting a small disk takes a superuser")
    yield disk
    subprocess.run(["umount", "-l", disk], check=True)


def fill(disk: Path) -> None:
    with open(disk / "ballast", "wb", buffering=0) as ballast:
        for size in (1 << 16, 1 << 10):
            with contextlib.suppress(OSError):
                while ballast.write(bytes(size)):
                    pass


def test_a_disk_that_fills_while_a_stage_runs_leaves_its_last_checkpoint_and_the_run_goes_on(
    small_disk, tmp_path
):
    recipe = tmp_path / "one.yaml"
    recipe.write_text(ONE_STAGE)
    run = limbeck("run", recipe, "--runs", small_disk)
    until(lambda: list(small_disk.glob("store/.partial/pretrain-*/state.pt")))
    fill(small_disk)
    _, err = run.communicate(timeout=200)
    assert run.returncode == 75, err
    last = err.splitlines()[-1]
    assert last.startswith("limbeck: stage base: no space left on ")
    assert last.endswith("free some, and the same command goes on from the last checkpoint")
    (state,) = small_disk.glob("store/.partial/pretrain-*/state.pt")
    reached = torch.load(state, weights_only=True)["learner"]["step"]
    assert reached > 0
    assert not list(small_disk.glob("store/pretrain-*"))
    (small_disk / "ballast").unlink()
    code, _, err = answer("run", recipe, "--runs", small_disk)
    assert code == 0, err
    (artifact,) = Store(small_disk / "store").all()
    assert [row["step"] for row in read_metrics(artifact.folder)] == [0, 10, 20, 30, 40, 50, 58]


def test_a_file_that_may_not_grow_stops_a_run_resumably(tmp_path):
    recipe = tmp_path / "one.yaml"
    recipe.write_text(ONE_STAGE)
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000))
    code, _, err = answer("run", recipe, "--runs", tmp_path / "runs", preexec_fn=limit)
    assert code == 75
    assert "no space left on" in err.splitlines()[-1]
    assert not list(tmp_path.glob("runs/store/pretrain-*"))
