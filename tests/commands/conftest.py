"""The checkpoints of these tests, and the command as they call it."""

import io

import pytest

from llama import cli
from tests.commands.small import make_checkpoint


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    """Its replies end."""
    return make_checkpoint(tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture(scope="session")
def endless(tmp_path_factory):
    """Its replies do not, for a good while."""
    return make_checkpoint(tmp_path_factory.mktemp("endless"), endless=True, context=100_000)


class Ran:
    """What came of a command."""

    def __init__(self, code, captured):
        self.code, self.out, self.err = code, captured.out, captured.err


@pytest.fixture
def llama(capsys, monkeypatch):
    """Runs the command in this process: llama("chat", "Hello", stdin="") -> Ran; stdin None: closed."""

    def run(*args, stdin=None):
        monkeypatch.setattr("sys.stdin", None if stdin is None else io.StringIO(stdin))
        try:
            code = cli.main([str(arg) for arg in args])
        except SystemExit as error:
            code = error.code
        return Ran(code, capsys.readouterr())

    return run
