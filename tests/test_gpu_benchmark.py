"""benchmarks/gpu.py without a GPU: every case at a tiny size, on the CPU backend."""

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._functorch.config
from torch.nn.attention.flex_attention import create_block_mask

from leedl_fast.benchmarks import gpu
from leedl_fast.testing.bench import Ceilings


@pytest.fixture
def on_cpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name, value in (
        ("DEVICE", torch.device("cpu")),
        ("BACKEND", "cpu"),
        ("BUDGET_S", 1e-3),
        ("HEAD_DIM", 16),
        (
            "measure_ceilings",
            lambda *_, **__: Ceilings(1e9, 1e9, {"float32": 1e9, "bfloat16": 1e9}),
        ),
    ):
        monkeypatch.setattr(gpu, name, value)
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a processor")
    with torch._functorch.config.patch(donated_buffer=True):  # which `main` changes
        yield


def test_every_case_is_measured(
    on_cpu: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    cases = {
        "full": lambda: gpu._attention(256, 2, False, None),
        "causal": lambda: gpu._attention(256, 2, True, None),
        "window": lambda: gpu._attention(512, 2, False, (100, 0)),
        "rows": lambda: gpu._add_layer_norm(16, 64),
        "long rows": lambda: gpu._add_layer_norm(4, 9000),
        "steps": lambda: gpu._diffusion((2, 3, 8, 8)),
        "wrong": lambda: gpu._attention(-1, 2, False, None),
    }
    monkeypatch.setattr(gpu, "CASES", cases)
    gpu.main(tmp_path / "out.json")
    results = json.loads((tmp_path / "out.json").read_text())["cases"]
    assert results.keys() == cases.keys()
    assert "negative dimension" in results.pop("wrong")["error"]
    for case in results.values():
        for part in case.values():
            assert part["ms"][gpu.OURS] > 0
            rates = part.get("tflop_per_s") or part["gb_per_s"]
            assert rates[gpu.OURS] > 0
            assert part["percent_of_ceiling"].keys() == rates.keys()
    flash, eager = "SDPA flash", "eager"
    assert all(part["ms"][flash] > 0 for part in results["full"].values())
    for name in ("rows", "long rows", "steps"):
        assert all(part["ms"][eager] > 0 for part in results[name].values())
    assert results["window"]["forward"]["ms"][gpu.WALKING] > 0
    # FlexAttention's backward pass runs on GPUs alone, and says so without losing the others.
    assert "NotImplementedError" in results["window"]["forward"]["ms"]["FlexAttention"]
    assert results["long rows"]["backward"]["moved"] == 7 * 4 * 9000 * 2
    assert "moved" not in results["rows"]["backward"]


@pytest.mark.parametrize(("left", "right"), [(300, 0), (256, 0), (10, 200)])
def test_the_windows_mask_is_flex_attentions_own(on_cpu: None, left: int, right: int) -> None:
    ours = gpu._window_mask(1024, left, right)
    theirs = create_block_mask(ours.mask_mod, None, None, 1024, 1024, device="cpu")
    assert torch.equal(ours.to_dense(), theirs.to_dense())
    assert torch.equal(ours.full_kv_num_blocks, theirs.full_kv_num_blocks)
    assert torch.equal(ours.full_q_num_blocks, theirs.full_q_num_blocks)


def test_the_plain_steps_are_the_librarys(on_cpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """They agree where there is no noise."""
    monkeypatch.setattr(torch, "randn_like", torch.zeros_like)
    seen: list[dict[str, Any]] = []
    monkeypatch.setattr(gpu, "_milliseconds", lambda peers: seen.append(peers) or {})
    zeros = torch.zeros(2, 3, 4, 4)
    names = ("add_noise", "ddpm_step", "ddim_step")
    for name in names:
        function = getattr(gpu.diffusion, name)
        monkeypatch.setattr(
            gpu.diffusion,
            name,
            lambda *args, function=function, seed, **rest: function(*args, noise=zeros, **rest),
        )
    gpu._diffusion((2, 3, 4, 4))
    for peers in seen:
        assert torch.allclose(peers["eager"](), peers[gpu.OURS](), rtol=1e-4, atol=1e-5)


def test_tiles_are_changed_only_while_they_are_measured(on_cpu: None) -> None:
    table = gpu.attention_blocks.tuned(gpu.DEVICE)
    assert table == {}
    wrap = gpu._with_tiles(("forward", "query"), descriptors=True, programs_per_sm=2)
    seen = wrap(lambda: dict(table))()
    assert {key.kernel for key in seen} == {"forward", "query"}
    assert all(blocks.descriptors and blocks.programs_per_sm == 2 for blocks in seen.values())
    assert table == {}


def test_the_script_asks_for_a_folder() -> None:
    script = Path(gpu.__file__).with_name("gpu.sh")
    finished = subprocess.run(["bash", str(script)], capture_output=True, text=True)
    assert finished.returncode == 2
    assert "usage: benchmarks/gpu.sh FOLDER" in finished.stderr
