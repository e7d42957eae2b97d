"""Tile sizes: the table, the user's own before it, and `leedl-fast tune` without a GPU."""

from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from leedl_fast import tuning
from leedl_fast.cli import app
from leedl_fast.kernels import attention_blocks
from leedl_fast.kernels.attention_blocks import Blocks, Key
from leedl_fast.ops.attention_problem import Inputs, Problem, describe


def _problem(head_dim: int = 128, window: int = 4096, softcap: float | None = None) -> Problem:
    q = torch.empty(1, 1, 8, head_dim, dtype=torch.bfloat16)
    return describe(Inputs(q, q, q), 0.1, window, 0, "softmax", softcap, 0.0, False)


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> dict[Key, Blocks]:
    """The table that a GPU's user would have measured."""
    table: dict[Key, Blocks] = {}
    monkeypatch.setattr(attention_blocks, "tuned", lambda device: table)
    monkeypatch.setattr(attention_blocks, "architecture", lambda device: "hopper")
    return table


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_tune_needs_a_gpu() -> None:
    result = CliRunner().invoke(app, ["tune"])
    assert result.exit_code == 2
    assert "error: tune measures on a GPU, and torch sees none here" in result.output


def test_tune_names_what_it_knows() -> None:
    with pytest.raises(ValueError, match=r"head_dim must be one of \(64, 128, 256\), got 80"):
        tuning.tune([80])
    with pytest.raises(ValueError, match=r"dtype must be one of .*, got 'float64'"):
        tuning.tune([64], ["float64"])


def test_the_fastest_that_runs_is_taken() -> None:
    times = {(1,): 3.0, (2,): None, (3,): 1.5, (4,): 2.0}
    assert tuning.fastest(times, times.__getitem__) == ((3,), 1.5)
    assert tuning.fastest([(2,)], times.__getitem__) is None


@pytest.mark.parametrize("kernel", attention_blocks.KERNELS)
def test_candidates_divide_what_a_program_owns(kernel: str) -> None:
    found = tuning.candidates(kernel)
    assert len(set(found)) == len(found) >= 18
    if kernel == "decode":  # whole steps of keys
        assert all(blocks.own % blocks.step == 0 for blocks in found)


def test_few_programs_share_the_tiles_where_the_table_says_so(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(attention_blocks, "multiprocessors", lambda device: 10)
    found = tuning.shared_among_programs(Blocks(64, 32, 4, 2))
    programs = {
        blocks: attention_blocks.programs_for(blocks, 25, torch.device("cpu")) for blocks in found
    }
    assert len(programs) == 10
    assert programs[Blocks(64, 32, 4, 2)] == 25
    for tile in ((64, 32, 4, 2), (64, 16, 4, 2), (64, 32, 8, 2)):
        assert [programs[Blocks(*tile, False, count)] for count in (1, 2, 4)] == [10, 20, 25]


def test_few_programs_of_four_warps_take_two_stages_by_pointers() -> None:
    for descriptors in (False, True):
        own = Blocks(64, 64, 4, 3, descriptors)
        alone, *shared = tuning.shared_among_programs(own)
        assert alone == own
        of_four_warps = {blocks.num_stages for blocks in shared if blocks.num_warps == 4}
        assert of_four_warps == {3 if descriptors else 2}


@pytest.mark.parametrize("n", tuning.ROW_LENGTHS)
def test_candidates_for_rows_are_tiles_of_whole_rows(n: int) -> None:
    found = tuning.candidates_for_rows(n)
    assert len(set(found)) == len(found) == 36
    assert {blocks.own * blocks.step for blocks in found} == {1024, 2048, 4096}
    assert {blocks.step for blocks in found} == {n}


def test_rows_take_what_was_measured(measured: dict[Key, Blocks]) -> None:
    on_gpu = _problem()._replace(device=torch.device("cuda"))
    default, own = Blocks(4, 256, 2, 3), Blocks(8, 256, 4, 3, False, 8)
    assert attention_blocks.blocks_for_rows(on_gpu, default) == default
    measured[attention_blocks.key_of_rows(2, 256)] = own
    assert attention_blocks.blocks_for_rows(on_gpu, default) == own
    assert attention_blocks.blocks_for_rows(_problem(), default) == default


@pytest.mark.parametrize("major", [8, 9, 10, 12])
def test_sm_90_and_sm_100_take_descriptors(major: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (major, 0))
    takes = tuning.takes_descriptors(torch.device("cuda"))
    assert takes == (major in (9, 10))
    found = tuning.candidates("query", takes)
    assert any(blocks.descriptors for blocks in found) == takes


@pytest.mark.parametrize("home", ["/somewhere", "relative", ""])
def test_the_table_is_in_the_users_cache(home: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200 (MIG)")
    monkeypatch.setenv("XDG_CACHE_HOME", home)
    monkeypatch.setenv("HOME", "/home/of-user")
    parent = "/somewhere" if home == "/somewhere" else "/home/of-user/.cache"
    path = attention_blocks.tuned_path(torch.device("cuda"))
    assert path == Path(parent, "leedl_fast", "attention-blocks-nvidia-h200-mig.json")


def test_a_table_survives_its_file(tmp_path: Path) -> None:
    table = {
        Key("forward", 2, 64): Blocks(1, 2, 3, 4, True, 5),
        Key("query", 4, 256, True): Blocks(*[8] * 4),
    }
    tuning.write_table(tmp_path / "new" / "table.json", table)
    assert attention_blocks.read_table(tmp_path / "new" / "table.json") == table


@pytest.mark.parametrize("text", ["{", '{"a": 1}', '[{"key": ["forward", 2, 64]}]'])
def test_a_broken_table_is_an_error(tmp_path: Path, text: str) -> None:
    path = tmp_path / "table.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"table\.json must be a table that `leedl-fast"):
        attention_blocks.read_table(path)


def test_what_was_measured_goes_first(measured: dict[Key, Blocks]) -> None:
    on_gpu = _problem()._replace(device=torch.device("cuda"))
    default = attention_blocks.blocks_for("forward", on_gpu)
    measured[Key("forward", 2, 128)] = own = Blocks(64, 32, 4, 1)
    assert attention_blocks.blocks_for("forward", on_gpu) == own != default
    assert attention_blocks.blocks_for("forward", _problem()) == default
    assert attention_blocks.blocks_for("forward", on_gpu._replace(window_left=10)) == own
    measured[Key("forward", 2, 128, True)] = narrow = Blocks(32, 32, 4, 1)
    assert attention_blocks.blocks_for("forward", on_gpu._replace(window_left=10)) == narrow


def test_bias_softcap_and_dropout_take_smaller_steps() -> None:
    plain = attention_blocks.blocks_for("forward", _problem())
    capped = attention_blocks.blocks_for("forward", _problem(softcap=2.0))
    assert capped == plain._replace(step=plain.step // 2)


@pytest.mark.parametrize(
    ("capability", "name"),
    [((8, 9), "ampere"), ((9, 0), "hopper"), ((10, 3), "blackwell"), ((12, 0), "ampere")],
)
def test_every_gpu_has_a_column(
    capability: tuple[int, int], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert attention_blocks.architecture.__wrapped__(torch.device("cuda")) == name
    assert all(name in row for row in attention_blocks._BLOCKS.values())


def test_every_size_has_tiles() -> None:
    for kernel in attention_blocks.KERNELS:
        for head_dim in (1, 64, 65, 128, 200, 256):
            for window in (0, 4096):
                blocks = attention_blocks.blocks_for(kernel, _problem(head_dim, window))
                assert min(blocks[:4]) > 0
