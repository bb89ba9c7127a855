"""Tables: every format reads the same, and errors name the line."""

from __future__ import annotations

import csv
import json
import sys

import numpy as np
import pytest
from task_data import refused

from regard.tasks.tables import read_table

HEADER = ["when", "load", "place"]
ROWS = [
    ["2024-01-01 00:00", "1.5", "Bern, old town"],
    ["2024-01-01 01:00", "", 'the "Bund"'],
    ["2024-01-01 02:00", "-2e3", "é 中"],
]


def write(path, content):
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def delimited(path, delimiter, **options):
    with path.open("w", newline="", **options) as file:
        csv.writer(file, delimiter=delimiter).writerows([HEADER, *ROWS])
    return path


def check(table):
    assert list(table.columns) == HEADER
    assert np.array_equal(table.numbers("load", "target"), [1.5, np.nan, -2000], equal_nan=True)
    assert table.times("when", "time").astype(str).tolist()[1] == "2024-01-01T01:00:00"
    assert table.texts("place", "text") == [row[2] for row in ROWS]
    assert table.numeric_columns() == ["load"]
    assert table.time_columns() == ["when"]


@pytest.mark.parametrize("delimiter", [",", "\t", ";", "|"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_delimiters_and_byte_order_marks_are_found(tmp_path, delimiter, encoding):
    check(read_table(delimited(tmp_path / "a.txt", delimiter, encoding=encoding)))


def test_suffix_tsv_means_tabs(tmp_path):
    table = read_table(write(tmp_path / "a.tsv", "a,b\tc,d\n1,2\t3,4\n"))
    assert list(table.columns) == ["a,b", "c,d"]


def test_json_lines_are_rows_and_missing_fields_empty(tmp_path):
    records = [{"when": r[0], "place": r[2], **({"load": float(r[1])} if r[1] else {})} for r in ROWS]
    path = write(tmp_path / "a.jsonl", "\n\n".join(map(json.dumps, records)))
    whole = write(tmp_path / "a.json", json.dumps(records))
    for table, second in ((read_table(path), "a.jsonl, line 3"), (read_table(whole), "a.json, record 2")):
        assert np.array_equal(table.numbers("load", "target"), [1.5, np.nan, -2000], equal_nan=True)
        assert table.places[1] == second


def test_parquet_reads_as_the_others(tmp_path):
    pa = pytest.importorskip("pyarrow", reason="writes and reads the file")
    import pyarrow.parquet

    times = np.array([row[0].replace(" ", "T") for row in ROWS], dtype="datetime64[ns]")
    columns = {"when": pa.array(times), "load": pa.array([1.5, None, -2000]), "place": [row[2] for row in ROWS]}
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pa.table(columns), path)
    check(read_table(path))


def test_parquet_that_is_broken_or_that_nothing_can_read_is_refused(tmp_path, monkeypatch):
    path = write(tmp_path / "a.parquet", b"PAR1 broken")
    pytest.importorskip("pyarrow", reason="reads the file")
    refused(lambda: read_table(path), "cannot be read as Parquet")
    for name in [n for n in sys.modules if n.partition(".")[0] == "pyarrow"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    refused(lambda: read_table(path), "try pip install 'regard[tables]'")


def test_tables_with_the_same_columns_are_laid_end_to_end(tmp_path):
    one, two = write(tmp_path / "a.csv", "x,y\n1,2\n"), write(tmp_path / "b.csv", "y,x\n4,3\n")
    table = read_table([one, two])
    assert table.numbers("x", "target").tolist() == [1, 3]
    assert list(table.places) == ["a.csv, line 2", "b.csv, line 2"]
    other = write(tmp_path / "c.csv", "x,z\n1,2\n")
    refused(lambda: read_table([one, other]), "columns differ from those of", "(y, z)")


def test_a_file_without_names_gets_those_it_is_given(tmp_path):
    path = write(tmp_path / "a.tsv", "bonjour\thello\nmerci\tthanks\n")
    table = read_table(path, names=("source", "target"))
    assert table.columns == {"source": ("bonjour", "merci"), "target": ("hello", "thanks")}
    assert "its first line is data too" in table.notes[0]
    named = read_table(write(tmp_path / "b.tsv", "source\ttarget\na\tb\n"), names=("source", "target"))
    assert len(named) == 1


def test_quotation_marks_that_mean_themselves_are_kept_in_tabbed_text(tmp_path):
    table = read_table(write(tmp_path / "a.tsv", 'source\ttarget\nsay "a\tsay b\n"c" d\te\n'))
    assert table.columns["source"] == ('say "a', '"c" d')
    assert "quotation marks read as plain characters" in table.notes[0]


def test_a_quoted_cell_may_hold_line_breaks_and_lines_are_counted_with_them(tmp_path):
    table = read_table(write(tmp_path / "a.csv", 'text,n\n"one\ntwo",1\n\nthree,x\n'))
    assert table.columns["text"][0] == "one\ntwo"
    refused(lambda: table.numbers("n", "target"), "a.csv, line 5, where the column n has 'x'")


def test_long_cells_are_read_and_the_limit_of_the_csv_module_is_left_alone(tmp_path):
    before = csv.field_size_limit(100_000)
    table = read_table(write(tmp_path / "a.csv", "text,label\n" + "x" * 200_000 + ",1\n"))
    assert len(table.columns["text"][0]) == 200_000
    assert csv.field_size_limit(before) == 100_000


def column_of(folder, *cells):
    return read_table(write(folder / "a.csv", "x,y\n" + "".join(f"{cell},1\n" for cell in cells)))


@pytest.mark.parametrize(
    ("cells", "times"),
    [
        (["2024-02-29"], ["2024-02-29T00:00:00"]),
        (["2024/2/9 05:06"], ["2024-02-09T05:06:00"]),
        (["2024-01-01T02:00:00.5"], ["2024-01-01T02:00:00"]),
        (["2024-01-01T02:00:00+02:00", "2024-01-01T02:00:00Z"], ["2024-01-01T00:00:00", "2024-01-01T02:00:00"]),
        (["1/2/2024", "2/13/2024 5:06"], ["2024-01-02T00:00:00", "2024-02-13T05:06:00"]),
        (["1/2/2024", "13/2/2024"], ["2024-02-01T00:00:00", "2024-02-13T00:00:00"]),
        (["01.02.2024 05:06", "03.04.2024"], ["2024-02-01T05:06:00", "2024-04-03T00:00:00"]),
        (["2024-01", "2024-02"], ["2024-01-01T00:00:00", "2024-02-01T00:00:00"]),
    ],
)
def test_forms_of_time(tmp_path, cells, times):
    table = column_of(tmp_path, *cells)
    assert table.time_columns() == ["x"]
    assert table.times("x", "time").astype(str).tolist() == times


@pytest.mark.parametrize("cell", ["1704067200", "1704067200000"])
def test_numbers_may_be_seconds_or_milliseconds_since_1970(tmp_path, cell):
    table = column_of(tmp_path, cell)
    assert table.time_columns() == []
    assert str(table.times("x", "time")[0]) == "2024-01-01T00:00:00"


def test_columns_of_times_are_found_though_a_cell_is_broken_and_numbers_are_none(tmp_path):
    table = read_table(write(tmp_path / "a.csv", "a,b,c\n1704067200,2024-01-01,x\n1704067201,2024-01-02,y\n3,?,z\n"))
    assert table.time_columns() == ["b"]
    assert table.numeric_columns() == ["a"]


@pytest.mark.parametrize(
    ("kind", "first", "cells", "told"),
    [
        ("numbers", "1", ["inf", "-1e39", "1e400", "abc", "1_000", "1 000", "0x10"], "supported: numbers, or empty"),
        ("numbers", "1", ["1,5"], "try a decimal point: 1.5"),
        ("times", "2024-01-01", ["9999-12-31T23:00-12:00", "0001-01-01T01:00+02:00", "2024-02-30", ""], "ISO 8601"),
        ("times", "2024-01-01", ["01/02/2024", "12", "monday", "20240101"], "ISO 8601"),
    ],
)
def test_a_cell_that_is_not_what_its_column_needs_is_refused_with_its_line_and_value(
    tmp_path, kind, first, cells, told
):
    for cell in cells:
        table = read_table(write(tmp_path / "a.tsv", f"x\ty\n{first}\t0\n{cell}\t1\n"))
        place = f"a.tsv, line 3, where the column x has {repr(cell) if cell else ''}"
        refused(lambda table=table: getattr(table, kind)("x", "target"), place, told)


def test_times_with_and_without_a_zone_do_not_mix(tmp_path):
    table = column_of(tmp_path, "2024-01-01T00:00", "2024-01-01T00:00Z")
    refused(lambda: table.times("x", "time"), "line 3, where the column x begins to mix")


@pytest.mark.parametrize("cells", [["1/2/2024", "3/4/2024"], ["13/1/2024", "1/13/2024"], ["13.1.2024", "1.13.2024"]])
def test_dates_that_do_not_tell_day_from_month_are_refused(tmp_path, cells):
    refused(lambda: column_of(tmp_path, *cells).times("x", "time"), "31/01/2024 where a row tells which is the day")


def test_a_missing_column_is_refused_with_the_nearest_or_with_what_the_first_line_lacks(tmp_path):
    table = read_table(write(tmp_path / "a.csv", "demand,price\n1,2\n"))
    refused(lambda: table.column("demnd", "target"), "target=demnd, ", "supported: demand, price; try target=demand")
    nameless = read_table(write(tmp_path / "a.csv", "2024-01-01,0.5\n2024-01-02,0.7\n"))
    told = ("not a column of a.csv", " try a first line that names the columns")
    refused(lambda: nameless.column("load", "target"), *told)


def test_nested_json_and_surrogates_are_no_text(tmp_path):
    table = read_table(write(tmp_path / "a.jsonl", '{"a": [1], "b": "\\ud800"}\n'))
    refused(lambda: table.texts("a", "text"), "line 1, where the column a has [1]")
    refused(lambda: table.texts("b", "text"), "surrogate")


WRONG = {
    "missing": (lambda t: t / "a.cvs", "does not exist", "try ", "a.csv"),
    "folder": (lambda t: t, "as a table", "try ", "a.csv"),
    "empty": (lambda t: write(t / "e.csv", ""), "holds no rows"),
    "only names": (lambda t: write(t / "e.csv", "a,b\n"), "holds no rows"),
    "blank json": (lambda t: write(t / "e.jsonl", "\n\n"), "holds no rows"),
    "binary": (lambda t: write(t / "e.csv", b"a,b\n1,\0\n"), "a zero byte at offset 6"),
    "latin": (lambda t: write(t / "e.csv", b"a\nx\ncaf\xe9\n"), "line 3 is not UTF-8 (byte 0xe9)", "iconv -f LATIN1"),
    "mixed": (lambda t: write(t / "e.csv", b"a\n\xc3\xa9\n\xe9\n"), "line 3 is not UTF-8", "while line 2 is", "repair"),
    "utf-16": (lambda t: write(t / "e.csv", "a\n1\n".encode("utf-16")), "UTF-16", "iconv -f UTF-16"),
    "ragged": (lambda t: write(t / "e.csv", "a,b\n1,2\n\n1,2,3\n"), "line 4 has 3 cells", "supported: 2"),
    "quote": (lambda t: write(t / "e.csv", 'a,b\n"1,2\n'), "line 2 cannot be read"),
    "twice": (lambda t: write(t / "e.csv", "a,a\n1,2\n"), "names the column a twice"),
    "sheet": (lambda t: write(t / "e.xlsx", "x"), "try save the sheet as CSV"),
    "json": (lambda t: write(t / "e.jsonl", '{"a": 1}\n{oops\n'), "line 2 is not JSON"),
    "deep json": (lambda t: write(t / "e.jsonl", '{"a":' + "[" * 100_000 + "]" * 100_000 + "}"), "line 1", "too deep"),
    "json list": (lambda t: write(t / "e.jsonl", "[1]\n"), "line 1 is not a JSON object"),
    "no json": (lambda t: write(t / "e.json", "[1"), "is not JSON"),
    "json text": (lambda t: write(t / "e.json", '{"a": 1}'), "is not a list of objects"),
    "number": (lambda t: 3, "data=3"),
    "nothing": (lambda t: [], "no data at all"),
}


@pytest.mark.parametrize("case", WRONG)
def test_unusable_tables_are_refused_with_what_is_wrong(case, tmp_path):
    make, *told = WRONG[case]
    write(tmp_path / "a.csv", "a\n1\n")
    refused(lambda: read_table(make(tmp_path)), *told)
