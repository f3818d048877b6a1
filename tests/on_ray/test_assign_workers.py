"""Workers of Ray give the IDs of one process, and so they do when they die in the middle."""

import threading
import time

import psutil
import pytest

from catid2_ray.artifacts.store import Store
from tests.in_process import without_ray
from tests.on_ray.test_assign import assigned, parts_of, products, recipe_of, write_catalogue


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """3,000 products with codes, and the digest of their IDs as one process makes them."""
    folder = tmp_path_factory.mktemp("workers")
    write_catalogue(folder, products(3000))
    recipe = recipe_of(folder, ids={"workers": 4})
    with without_ray():
        parts = parts_of(recipe, "quantizer")
        return recipe, parts, assigned(recipe, parts).digest


@pytest.mark.faults
@pytest.mark.parametrize("written", ["codes", "moves"])
def test_a_worker_killed_in_the_middle_changes_no_byte(shared_ray, world, written, fault):
    """Killed while rows are brought to their buckets, and while what was decided is brought back."""
    recipe, parts, undisturbed = world
    killed, done = [], threading.Event()

    def kill_at_the_first_files():
        while not done.is_set() and len(killed) < 2:
            found = list(Store(recipe.store).fs.glob(f"{recipe.store}/artifacts/ids/*/*/exchange/{written}-*.arrow"))
            if len(found) > len(killed):
                for process in psutil.Process().children(recursive=True):
                    if "ray::MapBatches" in " ".join(process.cmdline()):
                        process.kill()
                        killed.append(process.pid)
                        break
            time.sleep(0.002)

    watch = threading.Thread(target=kill_at_the_first_files)
    watch.start()
    try:
        assert assigned(recipe, parts).digest == undisturbed
    finally:
        done.set()
        watch.join()
    assert killed
    fault(f"workers killed while {written} are written", times=len(killed), outcome="same digest", lost_s=0)
