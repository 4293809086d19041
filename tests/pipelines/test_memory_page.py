"""The table of asset/docs/memory.md for CUDA cards against the planner: what a reader plans is what is written."""

import re
from pathlib import Path

import pytest

from sana.config import load_config
from sana.pipelines.plan import MemoryLimitError, PlanRequest, make_plan
from sana.pipelines.plan_search import as_options

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "asset/docs/memory.md").read_text(encoding="utf-8")


def rows() -> list[tuple[str, str, str, list[str]]]:
    """Every row: config, max_vram, words about the choice, GB of the stages."""
    found, config = [], ""
    table = PAGE.split("| command:")[1].split("\n\n")[0]
    for line in table.splitlines()[2:]:
        command, chosen, *amounts = (cell.strip() for cell in line.strip("| ").split("|"))
        named = re.search(r"--config=\.\.\./(\S+)", command)
        config = named[1] if named else config
        limit = re.search(r"--max_vram=(\w+)", command)
        assert config and limit, line
        found.append((config, limit[1], chosen, [one.strip("* GB") for one in amounts if one.strip()]))
    return found


def test_the_table_is_found() -> None:
    assert len(rows()) >= 6 and any(chosen.startswith("refused") for _, _, chosen, _ in rows())


@pytest.mark.slow
@pytest.mark.parametrize(("config", "limit", "chosen", "amounts"), rows(), ids=lambda one: str(one)[:40])
def test_a_row_is_what_the_planner_says(config: str, limit: str, chosen: str, amounts: list[str]) -> None:
    request = PlanRequest(device="cuda", dtype="bf16", max_vram=limit)
    if chosen.startswith("refused"):
        needed = re.search(r"needs ([\d.]+) GB, or (\d+) x (\d+) px in ([\d.]+) GB", chosen)
        assert needed is not None
        with pytest.raises(MemoryLimitError) as error:
            make_plan(load_config(ROOT / "configs/sana_config" / config), request)
        assert f"max_vram {needed[1]}GB" in str(error.value)
        assert f"{needed[2]}x{needed[3]} without resolution binning at {needed[4]}GB" in str(error.value)
        return
    plan = make_plan(load_config(ROOT / "configs/sana_config" / config), request)
    assert [f"{stage.total / 1e9:.2f}" for stage in plan.stages] == amounts
    options = as_options(plan.settings)
    tile, offload = re.search(r"tiles of (\d+) px", chosen), re.search(r"`(\w+)` offload", chosen)
    assert options["tiling"] == (tile[1] if tile else "none")
    assert options["offload"] == (offload[1] if offload else "none")
    assert plan.exact
