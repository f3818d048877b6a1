"""`catid2 plan`: its arithmetic, and that each rate is the one that its benchmark's page says."""

import json
import re

import pytest
import yaml

from catid2_ray.config import Recipe
from catid2_ray.errors import CapacityError, InputError
from catid2_ray.on_ray.look.plan import ASSUMED, PRICES, RATES, plan, read_prices
from tests.command import run_here
from tests.unit.test_cluster_files import ROOT

PRODUCTION = ROOT / "jobs" / "recipes" / "production.yaml"


@pytest.fixture
def recipe() -> Recipe:
    return Recipe.load(PRODUCTION)


@pytest.mark.parametrize("name", [name for name, rate in RATES.items() if rate.source != ASSUMED])
def test_every_measured_rate_stands_on_its_page(name):
    page = (ROOT / "benchmarks" / "results" / RATES[name].source).read_text(encoding="utf-8")
    assert RATES[name].quote and RATES[name].quote in page, "measured anew: take the new figure over into RATES"


def test_what_is_assumed_quotes_nothing():
    assert all((rate.source == ASSUMED) == (rate.quote == "") for rate in RATES.values())
    assert {name for name, rate in RATES.items() if rate.source == ASSUMED} >= {"gpu", "embed_gpu", "pairs"}


STARTS = {"quantizer": "quantizer_start", "generator": "generator_start", "ids": "assign_start"}


def by_stage(figures: dict) -> dict[str, dict]:
    return {row["stage"]: row for row in figures["stages"]}


def test_the_arithmetic_by_hand(recipe):
    stages = by_stage(plan(recipe, products=10_000_000))
    # 64 workers; 21.2 µs a product at width 64, and what 320 numbers more take, as in (8.4 − 3.85) s for 80,000 at 384.
    assigning = 2.71 + 1e7 * (21.2e-6 + (56.9e-6 - 21.4e-6)) / 64 + 1e7 * 0.2348e-6
    assert stages["ids"]["hours"] == pytest.approx(assigning / 3600, abs=1e-3) and stages["ids"]["machines"] == 4
    # 10 epochs at 6,761 rows/s of a CPU, 4 workers of 30 CPUs' worth each, after k-means.
    assert stages["quantizer"]["hours"] == pytest.approx((25.2 + 1e8 / 6761 / 4 / 30) / 3600, abs=1e-3)
    assert stages["quantizer"]["pool"] == "gpu-train" and stages["quantizer"]["machine_hours"] == pytest.approx(
        4 * stages["quantizer"]["hours"], abs=3e-3
    )


def test_ten_times_the_products_take_ten_times_the_work_and_room(recipe):
    small, large = (plan(recipe, products=products) for products in (10_000_000, 100_000_000))
    assert large["driver_gib"] < 1.1 * small["driver_gib"], "the job's own process holds a range of IDs"
    for name in ("storage_gb", "transfer_gb"):
        assert large[name] == pytest.approx(10 * small[name], rel=1e-2)
    for stage, row in by_stage(large).items():
        start = RATES[STARTS[stage]].value * row["machines"] / 3600 if stage in STARTS else 0
        less = by_stage(small)[stage]["machine_hours"] - start
        assert row["machine_hours"] - start == pytest.approx(10 * less, rel=2e-2, abs=0.02)
        assert row["memory_gib"] == by_stage(small)[stage]["memory_gib"], (
            "a worker holds a part, whatever the catalogue's size"
        )


def test_a_tuned_encoder_takes_a_bounded_sample_and_what_replicas_read_is_counted_where_it_is_made():
    home_depot = ROOT / "jobs" / "recipes" / "home_depot.yaml"
    tuned = Recipe.load(home_depot, ["catalog.root=x", "embedding.encoder_mode=tuned"])
    for products, pairs in ((10**5, 10**4), (10**7, 20_000)):
        assert by_stage(plan(tuned, products=products))["tuned_encoder"]["seconds"] == pytest.approx(
            pairs * 18 * 60 / 20_000, abs=0.1
        )
    assert by_stage(plan(tuned, products=54_667))["node_vectors"]["seconds"] == pytest.approx(3.9, abs=0.1)
    plain = [
        "embedding.encoder_mode=frozen",
        "serving.node_depth=0",
        "serving.expansion=null",
        "serving.stop_level=null",
    ]
    stages = by_stage(plan(Recipe.load(home_depot, ["catalog.root=x", *plain]), products=10**5))
    assert not {"tuned_encoder", "node_vectors", "serving"} & stages.keys()


@pytest.mark.parametrize("products", [10**6, 10**7, 10**8, 10**9])
def test_the_production_recipe_goes_to_a_thousand_million_products(recipe, products):
    assert plan(recipe, products=products)["cost"] is None


def test_more_workers_take_less_time_and_as_many_machine_hours(recipe):
    more = recipe.model_copy(update={"ids": recipe.ids.model_copy(update={"workers": 128})})
    before, after = (by_stage(plan(one, products=10**9))["ids"] for one in (recipe, more))
    assert after["machines"] == 2 * before["machines"] and after["hours"] < before["hours"]


def test_ids_that_are_too_few_are_refused(recipe):
    few = Recipe.load(PRODUCTION, ["quantizer.codes_per_level=[16,16,16,16]"])
    with pytest.raises(CapacityError, match="1,000,000 products do not fit into 65,536 IDs"):
        plan(few, products=10**6)


def test_the_example_of_prices_can_be_read():
    assert set(read_prices(str(ROOT / "deploy" / "prices.yaml"))) == set(PRICES)


def test_cost_is_hours_times_prices(recipe, tmp_path):
    prices = {"cpu-data": 1.0, "gpu-train": 10.0, "storage": 0.02, "transfer": 0.01}
    (tmp_path / "prices.yaml").write_text(yaml.safe_dump(prices))
    figures = plan(recipe, products=10**8, prices=read_prices(str(tmp_path / "prices.yaml")))
    machines = sum(row["machine_hours"] * prices[row["pool"]] for row in figures["stages"])
    assert figures["cost"]["machines"] == pytest.approx(machines, rel=1e-3)
    assert figures["cost"]["sum"] == pytest.approx(
        machines + figures["storage_gb"] * 0.02 + figures["transfer_gb"] * 0.01, rel=1e-3
    )


@pytest.mark.parametrize("text", ["", "cpu-data: 1", "[1]", "{", f"{{{', '.join(f'{name}: -1' for name in PRICES)}}}"])
def test_prices_that_cannot_be_read_are_refused(text, tmp_path):
    (tmp_path / "prices.yaml").write_text(text)
    with pytest.raises(InputError, match=re.escape(str(tmp_path / "prices.yaml"))):
        read_prices(str(tmp_path / "prices.yaml"))


def test_the_command_shows_it(tmp_path):
    file = tmp_path / "plan.json"
    done = run_here("plan", "--recipe", str(PRODUCTION), "--products", "1e8", "--json", str(file))
    assert done.returncode == 0, done.stderr
    assert "100,000,000 products" in done.stdout and "Assumed, not measured: embed_gpu" in done.stdout
    assert json.loads(file.read_text())["products"] == 10**8
