"""Exit codes, one line on stderr, nothing heavy before it is needed."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
import warnings

import pytest

import mmaccel
from mmaccel.cli import main
from mmaccel.cli.terminal import Terminal, one_line

HEAVY = "heavy = {'torch', 'transformers', 'numpy', 'av'} & set(sys.modules); assert not heavy, heavy"


def fresh(*words):
    code = f"import sys; from mmaccel.cli import main; code = main({list(words)!r}); {HEAVY}; sys.exit(code)"
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize("words", [[], ["ask", "--help"]])
def test_help_comes_without_torch(words):
    done = fresh(*words)
    assert done.returncode == 0, done.stderr
    assert "Usage: mmaccel" in done.stdout


def test_wrong_usage_comes_without_torch():
    done = fresh("frobnicate")
    assert done.returncode == 2
    assert done.stderr == "mmaccel: No such command 'frobnicate' (see mmaccel --help)\n"


def test_the_installed_command_is_this_one():
    from importlib.metadata import entry_points

    (found,) = [entry for entry in entry_points(group="console_scripts") if entry.name == "mmaccel"]
    assert found.load() is main


@pytest.mark.parametrize("command", ["demo", "ask", "generate", "bench", "list", "explain", "probe"])
def test_every_command_explains_itself(cli, command):
    code, out, _ = cli(command, "--help")
    assert code == 0
    assert f"mmaccel {command}" in out
    assert "--json" in out


def test_version(cli):
    assert cli("--version") == (0, f"mmaccel {mmaccel.__version__}\n", "")


@pytest.mark.parametrize(
    "words",
    [
        ["ask"],
        ["ask", "a.mp4"],
        ["ask", "a.mp4", "why", "--frames", "0"],
        ["ask", "a.mp4", "why", "--repeats", "none"],
        ["demo", "--clips", "0"],
        ["demo", "--seconds-budget", "-3"],
        ["list", "--nothing"],
        ["explain"],
        ["--nothing"],
    ],
)
def test_wrong_usage_is_code_2(refused, words):
    assert "mmaccel --help" in refused(2, *words)


@pytest.fixture
def explain_that(monkeypatch):
    import mmaccel.cli.explain

    def put(error):
        def run(*_):
            raise error

        monkeypatch.setattr(mmaccel.cli.explain, "run", run)

    return put


def test_own_errors_are_code_1(refused, explain_that):
    explain_that(mmaccel.MMAccelError("this will\n  not do"))
    assert refused(1, "explain", "tiny") == "mmaccel: this will not do\n"


def test_unexpected_errors_are_one_line_and_code_1(refused, explain_that):
    explain_that(RuntimeError("first\nsecond"))
    line = refused(1, "explain", "tiny")
    assert "unexpected RuntimeError: first second" in line
    assert "--debug" in line


@pytest.mark.parametrize("words", [["--debug", "explain", "tiny"], ["explain", "tiny", "--debug"]])
def test_debug_lets_the_traceback_through(explain_that, words):
    explain_that(mmaccel.MMAccelError("here"))
    with pytest.raises(mmaccel.MMAccelError, match="here"):
        main(words)


def test_interrupt_is_code_130(cli, explain_that):
    explain_that(KeyboardInterrupt())
    code, out, err = cli("explain", "tiny")
    assert code == 130
    assert out == ""
    assert err.strip() == "mmaccel: interrupted."


MAIN = "import sys; from mmaccel.cli import main; sys.exit(main())"


def test_an_encoding_that_cannot_say_everything(clip, question):
    environment = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    environment.pop("PYTHONIOENCODING", None)
    done = subprocess.run(
        [sys.executable, "-c", MAIN, "ask", clip, question, "--compare", "--repeats", "1"],
        capture_output=True, text=True, timeout=300, env=environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "513 -> " in done.stdout


def test_characters_outside_the_encoding_become_question_marks(monkeypatch):
    out, err = (io.TextIOWrapper(io.BytesIO(), encoding="ascii") for _ in range(2))
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "stderr", err)
    assert main(["explain", "n\u00f6pe"]) == 1
    err.flush()
    assert b"mmaccel: 'n?pe' is no folder" in err.buffer.getvalue()
    with Terminal(as_json=False) as terminal:
        terminal.show("513 \u2192 78")
    out.flush()
    assert out.buffer.getvalue() == b"513 ? 78\n"


@pytest.mark.parametrize("words", [["list"], ["list", "--json"], ["--version"]])
def test_a_reader_that_has_seen_enough(words):
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "wb") as nowhere:
        done = subprocess.run(
            [sys.executable, "-c", MAIN, *words], stdout=nowhere, stderr=subprocess.PIPE, text=True, timeout=120
        )
    assert (done.returncode, done.stderr) == (1, "")


@pytest.mark.skipif(sys.platform == "win32", reason="signals of POSIX")
def test_an_interrupt_from_the_keyboard(tmp_path):
    (tmp_path / "slow.py").write_text(
        "import sys, time, mmaccel.cli.explain\n"
        "from mmaccel.cli import main\n"
        "def run(*_):\n    print('ready', flush=True)\n    time.sleep(60)\n"
        "mmaccel.cli.explain.run = run\n"
        "sys.exit(main(['explain', 'tiny']))\n"
    )
    command = [sys.executable, str(tmp_path / "slow.py")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as work:
        assert work.stdout.readline() == "ready\n"
        work.send_signal(signal.SIGINT)
        _, err = work.communicate(timeout=60)
    assert (work.returncode, err.strip()) == (130, "mmaccel: interrupted.")


def test_json_keeps_stdout_clean(capsys):
    with Terminal(as_json=True) as terminal:
        print("a library talks")
        terminal.show("for people")
        terminal.finish({"answer": [1, 2]})
    out, err = capsys.readouterr()
    assert out == '{"answer": [1, 2]}\n'
    assert "a library talks" in err
    print("after")
    assert capsys.readouterr().out == "after\n"


def test_without_json_no_document(capsys):
    with Terminal(as_json=False) as terminal:
        terminal.show("for people")
        terminal.finish({"answer": 1})
    assert capsys.readouterr().out == "for people\n"


def test_own_warnings_are_one_line_and_others_are_silent(capsys):
    before = warnings.showwarning
    with Terminal(as_json=True):
        warnings.warn_explicit("two\nlines", UserWarning, "file.py", 1, module="mmaccel.codecs.reader")
        warnings.warn_explicit("not ours", UserWarning, "file.py", 1, module="elsewhere")
    assert capsys.readouterr().err == "warning: two lines\n"
    assert warnings.showwarning is before


def test_a_document_holds_no_nan():
    with Terminal(as_json=True) as terminal, pytest.raises(ValueError):
        terminal.finish({"loss": float("nan")})


def test_one_line():
    assert one_line("  a\n b\t c ") == "a b c"
