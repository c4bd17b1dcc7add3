from __future__ import annotations

import json

import pytest

from mmaccel.tiny.world import encode, sample_clip, sample_questions

INDEX = 910_000


@pytest.fixture(scope="session")
def clip(tmp_path_factory):
    """A real H.264 file of a held-out clip of the world."""
    path = tmp_path_factory.mktemp("clips") / "clip.mp4"
    encode(sample_clip(INDEX), path)
    return path


@pytest.fixture(scope="session")
def question():
    return sample_questions(sample_clip(INDEX))[0].text


@pytest.fixture
def cli(capsys):
    """cli(*words) -> (exit code, stdout, stderr)."""
    from mmaccel.cli import main

    def run(*words):
        code = main([str(word) for word in words])
        return code, *capsys.readouterr()

    return run


@pytest.fixture
def document(cli):
    """document(*words) -> the parsed JSON, after checking that stdout holds one document and nothing else."""

    def run(*words):
        code, out, err = cli(*words, "--json")
        assert code == 0, err
        assert out.count("\n") == 1
        return json.loads(out)

    return run


@pytest.fixture
def refused(cli):
    """refused(code, *words) -> the one line on stderr, after checking that there is one line only."""

    def run(code, *words):
        got, out, err = cli(*words)
        assert got == code, err
        assert out == ""
        assert err.startswith("mmaccel: ")
        assert err.count("\n") == 1
        assert "Traceback" not in err
        return err

    return run
