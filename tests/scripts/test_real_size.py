"""Training at a real size, on a size that is not."""

import pytest
import real_size


@pytest.fixture
def model(tmp_path, monkeypatch):
    monkeypatch.setitem(real_size.BASE, "size", None)
    real_size.build(tmp_path / "model", "assets/tiny_sd3")
    return tmp_path / "model"


@pytest.mark.slow
def test_every_method_trains_and_is_estimated(model):
    rows = []
    for method in real_size.METHODS:
        row = real_size.measure(method, model) | {"estimated": real_size.estimated(method, model)}
        assert 0 < row["network"] < float("inf")
        assert row["GiB"] >= 0 < row["estimated"]
        rows.append(row)
    by = {row["method"]: row for row in rows}
    assert [by[name]["decodes"] for name in ("terminal", "dense", "branch", "nft")] == [2, 8, 2, 2]
    assert by["terminal"]["forwards"] == 8
    assert real_size.table(rows).count("\n") == 5
