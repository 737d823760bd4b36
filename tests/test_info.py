"""python -m tformer_ext, and its command info."""

import json

import pytest
import torch

import tformer_ext
from tformer_ext import _C
from tformer_ext import __main__ as command_line


def test_info_prints_what_a_bug_report_needs(capsys):
    assert command_line.main(["info"]) == 0
    text = capsys.readouterr().out
    for expected in (
        _C.build_info()["version"],
        _C.build_info()["compiler"],
        torch.__version__,
        _C.cpu_isa(),
    ):
        assert expected in text
    for key in ("model", "instruction set", "supported", "caches", "flags baseline", "cuda kernels"):
        assert f"  {key} " in text


def test_info_as_json(capsys):
    assert command_line.main(["info", "--json"]) == 0
    information = json.loads(capsys.readouterr().out)
    assert list(information) == ["tformer_ext", "build", "cpu", "torch", "system", "environment"]
    assert information["cpu"]["supported"] == _C.supported_isas()
    assert information["torch"]["version"] == torch.__version__
    assert information["build"]["cuda kernels"] == _C.build_info()["cuda"]


def test_info_tells_the_environment(capsys, monkeypatch):
    monkeypatch.setenv("TFORMER_SOMETHING", "a value")
    monkeypatch.setenv("UNRELATED_TFORMER_", "secret")
    command_line.main(["info"])
    text = capsys.readouterr().out
    assert "TFORMER_SOMETHING" in text and "a value" in text
    assert "secret" not in text


def test_version_is_the_distributions():
    assert tformer_ext.__version__ == _C.build_info()["version"]


def test_help_lists_the_commands(capsys):
    with pytest.raises(SystemExit) as exit_:
        command_line.main(["--help"])
    assert exit_.value.code == 0
    text = capsys.readouterr().out
    assert all(command in text for command in ("info", "demo", "bench", "selfcheck"))


def test_help_of_a_command(capsys):
    with pytest.raises(SystemExit) as exit_:
        command_line.main(["info", "--help"])
    assert exit_.value.code == 0
    assert "--json" in capsys.readouterr().out


def test_unknown_command_is_refused(capsys):
    with pytest.raises(SystemExit) as exit_:
        command_line.main(["frobnicate"])
    assert exit_.value.code == 2
    assert "frobnicate" in capsys.readouterr().err
