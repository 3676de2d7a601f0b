"""A few thousand inputs of `fuzz.py`; a hundred thousand are its own default."""

from fuzz import fuzz


def test_readers_refuse_or_accept(small_bundle):
    found = fuzz(small_bundle, 2500, seed=1)
    assert found["crashes"] == [] and sum(found["inputs"].values()) == 2500
    assert len(found["inputs"]) == 13 and min(found["inputs"].values()) > 50
    assert found["accepted"]["mask_bytes"] and found["accepted"]["manifest_values"]  # not all is refused at the door
    assert found["memory_bytes"] < 200 * 2**20
