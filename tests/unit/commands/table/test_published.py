"""The published table against its own printed averages."""

from __future__ import annotations

import pytest

from bpt_dist.commands.table.published import FAULTY_MULTIRC, published_rows, published_sheet


def test_published_averages_reproduce_except_where_a_fault_is_named():
    for rows in published_rows().values():
        for row in rows:
            assert sum(row.glue) / 8 == pytest.approx(row.glue_average, abs=0.1), row.method
            if row.super_glue:
                assert sum(row.super_glue) / 5 == pytest.approx(row.super_glue_average, abs=0.1), row.method


def test_published_averages_over_common_columns():
    rows = {row.method: row for block in published_rows().values() for row in block}
    expected = {
        "MPT": (88.86, 75.80),
        "Fine-tuning": (88.26, 77.45),
        "BPT": (88.16, 76.45),
        "BPT*": (88.67, 78.75),
    }
    for method, (glue, super_glue) in expected.items():
        assert rows[method].glue_7 == pytest.approx(glue, abs=0.006)
        assert rows[method].super_glue_4 == pytest.approx(super_glue, abs=0.006)
    assert rows["HyperFormer*"].super_glue_4 is None


def test_published_cola_stands_in_the_column_of_its_own_metric():
    sheet = published_sheet()
    at = {name: index for index, name in enumerate(sheet.header)}
    cells = {row[0].text: row for block in sheet.blocks for row in block.rows}
    for method, matthews, accuracy in (
        ("BPT", "–", "86.6"),
        ("Vanilla transfer PT", "–", "83.2"),
        ("MPT", "62.4", "–"),
    ):
        assert cells[method][at["CoLA (Matthews)"]].text == matthews
        assert cells[method][at["CoLA (accuracy)"]].text == accuracy
    assert cells["BPT, T5-large"][at["MultiRC (F1)"]].text == "75.7"
    assert "95.7" in FAULTY_MULTIRC
    assert all(not cell.bold for row in cells.values() for cell in row)
    assert FAULTY_MULTIRC in sheet.notes
    assert any("KAIST" in note for note in sheet.notes)
