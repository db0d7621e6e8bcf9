"""The command `raydet`, run by the tests."""

import contextlib
import io
import subprocess
import sys

import pytest

from raydet.cli import main


def raydet(*arguments, cwd="."):
    """Run the command in this process, which has imported already what takes seconds in a process of its own."""
    words = ["raydet", *map(str, arguments)]
    out, err = io.StringIO(), io.StringIO()
    with (
        pytest.MonkeyPatch.context() as patch,
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        patch.setattr(sys, "argv", words)
        patch.chdir(cwd)
        with pytest.raises(SystemExit) as end:
            main()
    return subprocess.CompletedProcess(words, end.value.code or 0, out.getvalue(), err.getvalue())
