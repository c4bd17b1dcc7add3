from __future__ import annotations

import json

import pytest
import torch

from mmaccel.errors import MMAccelError
from mmaccel.measure import append_rows, environment, read_rows


def test_rows_come_back(tmp_path):
    path = tmp_path / "deep" / "rows.jsonl"
    assert append_rows(path, [{"a": 1}, {"b": [1.5, None, "ü"]}]) == 2
    assert append_rows(path, [{"c": True}]) == 1
    assert read_rows(path) == [{"a": 1}, {"b": [1.5, None, "ü"]}, {"c": True}]
    assert read_rows(tmp_path / "none.jsonl") == []


def test_a_cut_off_line_is_left_out_and_swallows_nothing(tmp_path):
    path = tmp_path / "rows.jsonl"
    append_rows(path, [{"a": 1}])
    with path.open("a") as file:
        file.write('{"b": 2')
    assert read_rows(path) == [{"a": 1}]
    append_rows(path, [{"c": 3}])
    assert read_rows(path) == [{"a": 1}, {"c": 3}]


def test_a_whole_last_line_without_its_end_stays(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"a": 1}\n{"a": 2}')
    assert read_rows(path) == [{"a": 1}, {"a": 2}]
    append_rows(path, [{"a": 3}])
    assert read_rows(path) == [{"a": 1}, {"a": 2}, {"a": 3}]


@pytest.mark.parametrize("tail", [b'{"b": "\xc3', b'{"b": 2', b"12"])
def test_a_torn_last_line_goes(tmp_path, tail):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"a": 1}\n' + tail)
    assert read_rows(path) == [{"a": 1}]
    append_rows(path, [{"c": 3}])
    assert path.read_bytes() == b'{"a": 1}\n{"c": 3}\n'


@pytest.mark.parametrize("row", [{"a": float("nan")}, {"a": float("inf")}, {"a": object()}])
def test_what_json_cannot_say_is_refused_whole(tmp_path, row):
    path = tmp_path / "rows.jsonl"
    with pytest.raises(MMAccelError, match="JSON"):
        append_rows(path, [{"fine": 1}, row])
    assert not path.exists()


@pytest.mark.parametrize("line", ["{broken", "[1, 2]"])
def test_a_broken_line_is_named(tmp_path, line):
    path = tmp_path / "rows.jsonl"
    path.write_text(f'{{"a": 1}}\n{line}\n{{"b": 1}}\n')
    with pytest.raises(MMAccelError, match="line 2"):
        read_rows(path)


def test_the_environment_says_what_a_figure_depends_on():
    found = json.loads(json.dumps(environment()))
    assert found["machine"]["threads"] == torch.get_num_threads()
    assert found["machine"]["cores"] >= 1
    assert found["machine"]["cpu"]
    assert found["versions"]["torch"] in torch.__version__
    assert {"mmaccel", "python", "transformers"} <= found["versions"].keys()
    assert found["time"].endswith("Z")
