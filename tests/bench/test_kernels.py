"""`sparse-lightning bench kernels`: parity checks, tables, files, peers, wrong options."""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from sparse_lightning.bench import environment, kernels, peers
from sparse_lightning.bench.plot import break_even
from sparse_lightning.bench.problem import OPS, Contender, Problem
from sparse_lightning.bench.timing import Times
from sparse_lightning.cli import main
from sparse_lightning.kernels import ops

SMALL = ("bench", "kernels", "--device", "cpu", "--shape", "64", "128", "96", "--repeats", "3")
ONE = (*SMALL, "--block-sizes", "16", "--densities", "0.5")
CPU = torch.device("cpu")


def problem(dtype: torch.dtype = torch.float32, block_size: int = 16) -> Problem:
    return Problem((64, 128, 96), block_size, 0.4, dtype=dtype, device=CPU, seed=0)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_block_sparse_and_dense_products_pass_the_check(op: str, dtype: torch.dtype) -> None:
    p = problem(dtype)
    # The norms are accumulated, so each contender is checked once.
    p.check(op, p.ours(op))
    p.check(op, p.dense(op))


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("part", range(4))
def test_the_check_covers_every_part_of_a_result(op: str, part: int) -> None:
    p = problem()
    right = p.ours(op)
    results = list(right.read(right.run()))
    if part >= len(results):
        return
    for wrong in (results[part] * 1.001, results[part] * torch.nan, results[part][..., 1:]):
        spoiled = (*results[:part], wrong, *results[part + 1 :])
        with pytest.raises(AssertionError, match=r"error|shape"):
            p.check(op, Contender(lambda s=spoiled: s, lambda out: out))


def test_clones_compute_the_same_on_other_weights() -> None:
    p = problem()
    (clone,) = p.clones(1)
    for op in ("fwd", "dx", "dw"):
        p.check(op, clone.ours(op))
        p.check(op, clone.dense(op))
    clone.layer.values.data.zero_()
    assert p.layer.values.any() and clone.x is p.x


def test_flops_by_hand() -> None:
    p = problem()
    assert p.layer.topology.n_blocks == 19  # 0.4 of 8 x 6
    assert p.flops("fwd") == p.flops("dx") == p.flops("dw") == 2 * 64 * 19 * 256
    assert p.flops("layer") == 3 * p.flops("fwd")
    assert p.flops("norms") == 2 * 64 * 48 * 256


def test_times_by_hand() -> None:
    assert Times.from_samples(range(21)) == Times(median=10, low=2, high=18)
    assert Times.from_samples([5.0]) == Times(5.0, 5.0, 5.0)


def test_break_even_by_hand() -> None:
    # From (0.5, 0.5x) to (0.125, 2x): halfway in log-log.
    assert break_even([0.5, 0.125], [0.5, 2.0]) == pytest.approx(0.25)
    assert break_even([0.125, 0.5], [2.0, 0.5]) == pytest.approx(0.25)
    assert break_even([0.5, 0.25, 0.1], [0.9, 0.9, 0.95]) is None
    assert break_even([0.5, 0.25], [0.5, 1.0]) == pytest.approx(0.25)


# -- the command --------------------------------------------------------------------------------


def test_the_table_and_the_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = ("--json", f"{tmp_path}/out.json", "--plot", f"{tmp_path}/out.png")
    assert main([*SMALL, "--ops", "fwd", "host", "--block-sizes", "16", "32", *files]) == 0
    printed = capsys.readouterr().out
    assert "torch 2" in printed and "64 x 128 x 96 (tokens x in x out)" in printed
    rows = [line.split(" | ") for line in printed.splitlines() if line.startswith(("| f", "| h"))]
    assert [(row[0], row[1], row[2]) for row in rows] == [
        *[("| fwd", "64", "16"), ("| host", "64", "16")] * 4,
        *[("| fwd", "64", "32"), ("| host", "64", "32")] * 4,
    ]
    content = json.loads((tmp_path / "out.json").read_text())
    assert content["tokens"] == [64] and content["features"] == [128, 96]
    assert content["dtype"] == "fp32"
    assert content["repeats"] == 3 and content["seed"] == 0
    assert {"device", "torch", "commit"} <= content["environment"].keys()
    first = content["rows"][0]
    assert first["density"] == 0.5 and first["peers"] == {}
    assert 0 < first["sparse"]["low"] <= first["sparse"]["median"] <= first["sparse"]["high"]
    flops = 2 * 64 * 24 * 256
    assert first["tflops"] == pytest.approx(flops / first["sparse"]["median"] / 1e9)
    assert (tmp_path / "out.png").read_bytes().startswith(b"\x89PNG")
    assert {path.name for path in tmp_path.iterdir()} == {"out.json", "out.png"}


def test_a_wrong_kernel_is_not_timed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    right = ops.block_linear_dx
    monkeypatch.setattr(ops, "block_linear_dx", lambda *a: right(*a) * 2)
    assert main([*ONE, "--ops", "fwd", "dx", "dw"]) == 1
    printed = capsys.readouterr()
    assert "| fwd |" in printed.out and "| dx |" not in printed.out
    assert (
        "dx of 64 tokens with blocks of 16 at density 0.5 is wrong: ours: relative error"
        in printed.err
    )


@pytest.mark.parametrize(
    ("peer", "ratio", "remark"),
    [
        (lambda p, op: p.dense(op), 1.0, None),
        (lambda p, op: Contender(lambda: p.x @ p.linear.weight.T * 2), None, "relative error 1"),
        (lambda p, op: Contender(lambda: p.x * torch.nan), None, "shape"),
        (lambda p, op: 1 / 0, None, "division by zero"),
        # Reused memory may still hold the right result.
        (lambda p, op: Contender(lambda: torch.empty(64, 96)), None, "relative error nan"),
    ],
)
def test_a_peer_is_checked_too(peer: Any, ratio: float | None, remark: str | None) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(peers.PEERS, "stk", peer)
        row = kernels.measure(problem(), "fwd", ["stk"], repeats=9)
    if ratio is None:
        assert row.peers == {"stk": None} and remark in row.remarks["stk"]
        assert kernels.table_row(row).endswith("| n/a |")
    else:
        assert row.peers["stk"] == pytest.approx(ratio, rel=0.9) and not row.remarks
        assert row.as_dict()["peer_times"]["stk"]["median"] > 0


def test_products_of_a_pattern_within_blocks(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out.json"
    given = ("--ops", "fwd", "dx", "dw", "layer", "--json", str(output))
    assert main([*ONE, "--nm", "2:4", *given]) == 0
    assert "2:4 within blocks" in capsys.readouterr().out
    written = json.loads(output.read_text())
    assert written["nm"] == "2:4" and [row["op"] for row in written["rows"]] == [*given[1:5]]


def test_peers_that_need_a_pattern_or_another_op_say_so() -> None:
    row = kernels.measure(problem(), "fwd", ["cusparselt"], repeats=3)
    assert row.remarks == {"cusparselt": "needs 2:4 sparse blocks (--nm 2:4)"}
    sparse = Problem((64, 128, 96), 16, 0.4, dtype=torch.float32, device=CPU, seed=0, nm="2:4")
    row = kernels.measure(sparse, "dx", ["cutlass"], repeats=3)
    assert row.remarks == {"cutlass": "multiplies forward only by this W"}
    assert not {"cusparselt", "cutlass"} & {*peers.installed_peers()}
    assert peers.installed_peers("2:4")[-2:] == ["cusparselt", "cutlass"]


def test_several_numbers_of_tokens(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    checked: list[tuple[str, int]] = []
    check = Problem.check

    def spy(self: Problem, op: str, contender: Contender) -> None:
        assert self.dy.shape[0] == self.x.shape[0]
        checked.append((op, self.x.shape[0]))
        check(self, op, contender)

    monkeypatch.setattr(Problem, "check", spy)
    output = tmp_path / "out.json"
    given = ("--tokens", "1", "7", "--ops", "fwd", "dw", "--json", str(output))
    assert main([*ONE, *given]) == 0
    assert "1, 7 x 128 x 96 (tokens x in x out)" in capsys.readouterr().out
    rows = json.loads(output.read_text())["rows"]
    cases = [("fwd", 1), ("fwd", 7), ("dw", 1), ("dw", 7)]
    assert [(row["op"], row["tokens"]) for row in rows] == cases
    assert list(dict.fromkeys(checked)) == cases


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--shape", "64", "100", "96"), "in_features.*multiple of block_size=16; got 100"),
        (("--densities", "0"), r"--densities.*\(0, 1\].*got 0"),
        (("--repeats", "0"), "--repeats.*at least 1; got 0"),
        (("--threads", "-1"), "--threads.*at least 1; got -1"),
        (("--shape", "0", "128", "96"), "`--shape`.*at least one token; got 0"),
        (("--tokens", "8", "0"), "`--tokens`.*at least one token; got 0"),
        (("--tokens", "8", "9", "--plot", "x.png"), r"one number of tokens; got \[8, 9\]"),
        (("--peers", "torch_bsr"), "CUDA only"),
        (("--device", "meta"), "cuda or cpu; got 'meta'"),
        (("--device", "nonsense"), "cuda or cpu; got 'nonsense'"),
        (("--json", "/nowhere/x.json"), "--json.*written to; got '/nowhere/x.json'"),
        (("--plot", "/nowhere/x.png"), "--plot.*written to; got '/nowhere/x.png'"),
        (("--json", "."), r"--json.*must be a file.*'\.'"),
        (("--plot", "."), r"--plot.*must be a file.*'\.'"),
        (("--plot", "x.docx"), r"--plot.*must end in.*png.*got 'x.docx'"),
    ],
)
def test_bad_options(
    options: tuple[str, ...], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*ONE, *options]) == 2
    printed = capsys.readouterr()
    assert "|" not in printed.out, "nothing may be measured"
    assert re.search(says, printed.err), printed.err


def test_a_peer_that_is_not_installed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert main([*ONE, "--device", "cuda", "--peers", "stk"]) == 2
    assert "installed; got 'stk'" in capsys.readouterr().err


def test_no_memory_left(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: Any) -> Tensor:
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr(ops, "block_linear", full)
    assert main([*ONE, "--ops", "fwd"]) == 1
    assert capsys.readouterr().err == "sparse-lightning: out of memory\n"


def test_an_unavailable_gpu(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert main([*ONE, "--device", "cuda:2", "--peers", "none"]) == 2
    printed = capsys.readouterr()
    assert not printed.out and "one of the 2 available GPUs; got 'cuda:2'" in printed.err


def test_the_commit_is_that_of_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is not that of another repository that contains the installed package."""
    installed = tmp_path / "site" / "environment.py"
    installed.parent.mkdir()
    installed.write_text("")
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b"]
    subprocess.run([*git, "init", "-q"], check=True)
    subprocess.run([*git, "commit", "-q", "--allow-empty", "-m", "theirs"], check=True)
    monkeypatch.setattr(environment, "__file__", str(installed))
    assert "commit" not in environment.describe_environment(torch.device("cpu"))
    subprocess.run([*git, "add", "."], check=True)
    assert environment.describe_environment(torch.device("cpu"))["commit"].endswith("-dirty")


def test_a_plot_without_matplotlib(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "matplotlib" else find(name)
    )
    assert main([*ONE, "--plot", "x.png"]) == 2
    assert "pip install 'sparse-lightning[examples]'" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [(), ("bench",), ("bench", "kernels", "--block-sizes", "48")])
def test_an_unfinished_command_shows_the_usage(
    arguments: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2 and "usage: sparse-lightning" in capsys.readouterr().err


def test_help_lists_every_op(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["bench", "kernels", "--help"])
    printed = capsys.readouterr().out
    assert all(f"{op}:" in printed for op in OPS)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_on_a_gpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ("--shape", "256", "512", "384", "--repeats", "3", "--json", f"{tmp_path}/x.json")
    assert main(["bench", "kernels", *options, "--ops", *OPS]) == 0
    content = json.loads((tmp_path / "x.json").read_text())
    assert len(content["rows"]) == 4 * 4 * len(OPS)
    assert "driver" in content["environment"]
    for row in content["rows"]:
        if row["op"] in ("fwd", "dx", "dw"):
            assert row["peers"].get("torch_bsr", 1) is not None or row["remarks"]


def test_blocks_of_a_peer_by_hand() -> None:
    p = problem()
    rows, cols, blocks = peers._row_major(p)
    dense: Tensor = p.layer.topology.unpack(peers._slot_order(p, blocks))
    torch.testing.assert_close(dense, p.linear.weight.detach())
    assert (rows * 8 + cols).diff().min() > 0
