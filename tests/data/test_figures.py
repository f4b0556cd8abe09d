"""The example's figures: arms differ in one thing, and the table says what came out."""

from __future__ import annotations

import pytest

from data.regulator.figures import ARMS, METRICS, render, table, write_config
from tasks.config import load_config


@pytest.mark.parametrize("arm", ARMS)
def test_arms_differ_from_the_shipped_run_in_one_thing(arm: str) -> None:
    shipped, run = (load_config(write_config(name, seed=0)) for name in ("shipped", arm))
    assert run.sources == shipped.sources and run.evaluate == shipped.evaluate
    assert run.sft == (None if arm.startswith("replay_") else shipped.sft)
    if arm == "sft_only":
        assert run.cpt is None
        return
    assert run.cpt and shipped.cpt and run.cpt.tokens == shipped.cpt.tokens  # equal steps, whatever the share
    assert run.cpt.model_copy(update={"replay": shipped.cpt.replay}) == shipped.cpt
    assert (run.cpt.replay != shipped.cpt.replay) == (arm != "shipped")


def test_table_holds_mean_and_range_over_seeds() -> None:
    values = [dict.fromkeys(METRICS, value) for value in (0.5, 0.7)]
    runs = [{"arm": "sft_only", "seed": seed, "values": {"sft": value}} for seed, value in enumerate(values)]
    (line,) = table(runs)
    assert line["model"] == "SFT only" and line["seeds"] == 2
    assert line["violation F1"] == {"mean": pytest.approx(0.6), "min": 0.5, "max": 0.7}
    assert "| SFT only | 2 | 0.600 (0.500 to 0.700) |" in render([line])
