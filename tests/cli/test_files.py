"""Files of a command: refused before the work, written whole or not at all, and not lost."""

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import click
import numpy as np
import pytest
from command import invoke
from cupycorr.cli import files
from cupycorr.cli.bench import measure
from cupycorr.cli.environment import Unavailable

pillow = pytest.importorskip("PIL.Image")

BENCH = ["bench", "cpu", "-b", 1, "-c", 3, "--height", 9, "-w", 9, "--engine", "numpy", "-r", 3]
PRESETS = ["--preset", "stereo", "--preset", "pwc"]


@pytest.fixture
def pair(tmp_path):
    """Return two image files, the second moved by three pixels to the left."""
    image = np.random.default_rng(0).integers(0, 256, (40, 50), np.uint8)
    paths = tmp_path / "a.png", tmp_path / "b.png"
    for path, view in zip(paths, (image, np.roll(image, -3, 1)), strict=True):
        pillow.fromarray(view).save(path)
    return paths


def match(pair, *words):
    return invoke("match", *pair, "--max-displacement", 8, *words)


def write(option, pair, file):
    """Run a command that writes a file for an option."""
    return match(pair, option, file) if option == "--out" else invoke(*BENCH, option, file)


class TestRefusals:
    def test_an_input_is_never_an_output(self, pair, tmp_path):
        os.link(pair[0], tmp_path / "hard.png")
        os.symlink(pair[1], tmp_path / "soft.png")
        before = [path.read_bytes() for path in pair]
        for name in ("a.png", "b.png", "hard.png", "soft.png", "../" + tmp_path.name + "/a.png"):
            outcome = match(pair, "--out", tmp_path / "f.npy", "--out", tmp_path / name)
            assert outcome.exit_code == 2, name
            assert "is an input" in outcome.stderr
        assert [path.read_bytes() for path in pair] == before
        assert not (tmp_path / "f.npy").exists()

    def test_two_outputs_are_two_files(self, pair, tmp_path):
        os.symlink(tmp_path / "f.npy", tmp_path / "g.npy")
        for name in ("f.npy", "g.npy"):
            outcome = match(pair, "--out", tmp_path / "f.npy", "--out", tmp_path / name)
            assert outcome.exit_code == 2
            assert "is given twice" in outcome.stderr

    @pytest.mark.parametrize("option", ["--out", "--json"])
    def test_a_folder_must_be_there(self, option, pair, tmp_path):
        file = tmp_path / "none" / "f.npy"
        outcome = (
            match(pair, "--out", file) if option == "--out" else invoke(*BENCH, "--json", file)
        )
        assert outcome.exit_code == 2
        assert f"{option} {file}: there is no folder {file.parent}" in outcome.stderr
        assert not outcome.stdout

    @pytest.mark.parametrize("option", ["--out", "--json"])
    def test_a_folder_must_be_writable(self, option, pair, tmp_path, monkeypatch):
        monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path)
        file = tmp_path / "f.npy"
        outcome = (
            match(pair, "--out", file) if option == "--out" else invoke(*BENCH, "--json", file)
        )
        assert outcome.exit_code == 2
        assert f"{option} {file}: is not writable" in outcome.stderr
        assert not outcome.stdout

    def test_a_legend_needs_a_picture(self, pair, tmp_path):
        outcome = match(pair, "--out", tmp_path / "f.npy", "--legend")
        assert outcome.exit_code == 2
        assert "--legend is for pictures" in outcome.stderr


class TestWriting:
    def test_a_file_is_replaced_and_keeps_its_mode(self, tmp_path):
        file = tmp_path / "f"
        file.write_bytes(b"old")
        file.chmod(0o640)
        files.write(file, b"new")
        assert file.read_bytes() == b"new"
        assert file.stat().st_mode & 0o777 == 0o640
        assert list(tmp_path.iterdir()) == [file]

    def test_a_new_file_has_the_mode_of_any_new_file(self, tmp_path):
        (tmp_path / "other").touch()
        files.write(tmp_path / "f", b"new")
        assert (tmp_path / "f").stat().st_mode == (tmp_path / "other").stat().st_mode

    def test_a_link_stays_one(self, tmp_path):
        file, link = tmp_path / "f", tmp_path / "link"
        file.write_bytes(b"old")
        link.symlink_to(file)
        files.write(link, b"new")
        assert link.is_symlink()
        assert file.read_bytes() == b"new"

    @pytest.mark.parametrize("step", ["fdopen", "chmod", "replace"])
    def test_a_failure_leaves_the_old_file(self, step, tmp_path, monkeypatch):
        def fail(*arguments):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        file = tmp_path / "f"
        file.write_bytes(b"old")
        monkeypatch.setattr(os, step, fail)
        with pytest.raises(Unavailable, match=r"cannot write .*: No space left on device"):
            files.write(file, b"new")
        assert file.read_bytes() == b"old"
        assert list(tmp_path.iterdir()) == [file]

    @pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
    def test_a_full_device_is_one_clear_line(self, pair):
        files.refuse("--json", [Path("/dev/full")])
        outcome = invoke(*BENCH, "--json", "/dev/full")
        assert outcome.exit_code == 2
        assert outcome.stderr.endswith("cannot write /dev/full: No space left on device\n")

    def test_a_device_is_written_and_not_replaced(self):
        files.write(Path(os.devnull), b"new")
        assert not Path(os.devnull).is_file()

    @pytest.mark.skipif(sys.platform == "win32", reason="needs POSIX pipes")
    def test_a_reader_that_has_left_loses_no_file(self, pair, tmp_path):
        file = tmp_path / "f.npy"
        command = [sys.executable, "-m", "cupycorr", "match", *pair, "--out", file]
        reader, writer = os.pipe()
        os.close(reader)
        subprocess.run(command, stdout=writer, stderr=subprocess.DEVNULL, check=False)
        os.close(writer)
        assert np.load(file).shape == (40, 50, 2)


def interrupt_at(monkeypatch, number):
    """Interrupt the so-manyth comparison of ``bench``."""
    compare, calls = measure.compare, []

    def interrupted(*arguments, **options):
        calls.append(None)
        if len(calls) == number:
            raise KeyboardInterrupt
        return compare(*arguments, **options)

    monkeypatch.setattr(measure, "compare", interrupted)


class TestInterrupts:
    def test_finished_presets_are_kept(self, tmp_path, monkeypatch):
        interrupt_at(monkeypatch, 2)
        file = tmp_path / "bench.json"
        outcome = invoke(*BENCH, *PRESETS, "--json", file)
        assert outcome.exit_code == 130
        assert "Traceback" not in outcome.stderr
        (problem,) = json.loads(file.read_text())["problems"]
        assert problem["name"] == "stereo"

    def test_a_preset_is_in_the_file_before_the_next_is_measured(self, tmp_path, monkeypatch):
        file, kept = tmp_path / "bench.json", []
        compare = measure.compare

        def look(*arguments, **options):
            kept.append(len(json.loads(file.read_text())["problems"]) if file.exists() else 0)
            return compare(*arguments, **options)

        monkeypatch.setattr(measure, "compare", look)
        assert invoke(*BENCH, *PRESETS, "--json", file).exit_code == 0
        assert kept == list(range(len(kept)))
        assert len(kept) > 1

    def test_nothing_replaces_an_older_file(self, tmp_path, monkeypatch):
        interrupt_at(monkeypatch, 1)
        file = tmp_path / "bench.json"
        file.write_text("old")
        assert invoke(*BENCH, "--json", file).exit_code == 130
        assert file.read_text() == "old"


def test_json_goes_to_standard_output_alone(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    outcome = invoke(*BENCH, "--json", "-")
    assert outcome.exit_code == 0
    assert json.loads(outcome.stdout)["problems"]
    assert not list(tmp_path.iterdir())


def test_a_name_that_the_terminal_cannot_show_does_not_fail(pair, tmp_path):
    file = tmp_path / "ö→.flo"
    done = subprocess.run(
        [sys.executable, "-m", "cupycorr", "match", *pair, "--out", file],
        env=os.environ | {"PYTHONIOENCODING": "cp1252"},
        capture_output=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "ö?.flo".encode("cp1252") in done.stdout
    assert file.exists()


def test_refusals_are_errors_of_the_command_line(tmp_path):
    with pytest.raises(click.UsageError):
        files.refuse("--out", [tmp_path / "none" / "f"])
