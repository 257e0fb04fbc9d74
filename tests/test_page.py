"""The page of a replay, read as a browser reads it: cells, numbers, words, and names that mean harm."""

import re
import sys
from html.parser import HTMLParser

import pytest

from waterfill_rs.cli import main
from waterfill_rs.policies import verdict
from waterfill_rs.policies.comparison import Layer, Result, compare
from waterfill_rs.policies.report import Compared
from waterfill_rs.replay import heat_map, page
from waterfill_rs.replay.heat_map import HeatMap

VOID = {"meta", "br"}
CELL = re.compile(r"layer (\d+), rank (\d+): ([\d.]+), ([\d.]+) (rows|us)$")


class Page(HTMLParser):
    """``texts``: by tag; ``attributes``: of all tags; ``maps``: each map's cells, by layer and rank."""

    def __init__(self, text):
        super().__init__()
        self.open, self.texts, self.attributes, self.maps, self.shades = [], {}, [], [], {}
        self.feed(text)
        self.close()
        assert not self.open, "each tag that was opened is closed"

    def handle_starttag(self, tag, attributes):
        self.attributes += [(tag, name, value) for name, value in attributes]
        if tag == "figure":
            self.maps.append({})
        if tag == "rect":
            self.shade = dict(attributes)["class"]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.attributes += [(tag, name, value) for name, value in attributes]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, text):
        tag = self.open[-1] if self.open else ""
        self.texts.setdefault(tag, []).append(text)
        if tag == "title" and "figure" in self.open:
            layer, rank, part, amount, _ = CELL.match(text).groups()
            self.maps[-1][int(layer), int(rank)] = float(part), float(amount), self.shade


def results_of(routed_by_pass, *, tokens=20, **known):
    """``[passes][layers][ranks]``, an expert a rank."""
    return [
        result
        for pass_id, layers in enumerate(routed_by_pass)
        for layer, routed in enumerate(layers)
        for result in compare(
            Layer(layer + 3, pass_id, routed, [tokens] * len(routed), **known), ("home", "live")
        )
    ]


def written(tmp_path, results, *, recording="traffic", unit="rows", notes=(), more=()):
    file = tmp_path / "new folder" / "replay.html"
    one = Compared(recording, 4, 64, 0, 3, list(notes), results)
    page.write(file, [(one, "4 ranks, 64 experts"), *more], unit)
    return file.read_text(encoding="utf-8")


ROUTED = [[[66, 58, 60, 56], [60, 60, 60, 60]], [[90, 50, 50, 50], [60, 60, 60, 60]]]


def test_cells_are_ranks_by_layers_for_home_and_live_over_all_passes(tmp_path):
    found = Page(written(tmp_path, results_of(ROUTED)))
    home, live = found.maps
    assert set(home) == set(live) == {(layer, rank) for layer in (3, 4) for rank in range(4)}
    # (66 + 90) / 2 routed rows a pass and 20 shared ones, where the mean rank has 80.
    assert home[3, 0][:2] == (1.225, 98)
    assert home[3, 3][:2] == (0.912, 73)
    assert home[4, 1][:2] == (1.0, 80)
    # Live: 80 and 90 in the first rank.
    assert live[3, 0][:2] == (1.062, 85)


def test_both_maps_have_the_same_colours_and_the_legend_has_their_numbers(tmp_path):
    found = Page(written(tmp_path, results_of([[[100, 52, 44, 44]]])))
    home, live = found.maps
    assert home[3, 0][0] == 1.5 and home[3, 2][0] == 0.8 and live[3, 0][0] == 1.25
    legend = ["\N{LESS-THAN OR EQUAL TO} 0.5", "0.6", "0.7", "0.8", "0.9", "1.0", "1.1", "1.2"]
    legend += ["1.3", "1.4", "\N{GREATER-THAN OR EQUAL TO} 1.5"]
    assert found.texts["text"][: len(legend)] == legend
    assert (home[3, 0][2], home[3, 2][2]) == ("more5", "less2")
    assert live[3, 0][2] in ("more2", "more3")


def test_one_hot_rank_does_not_take_all_colours():
    loads = [[98.0, 102.0, 97.0, 103.0] for _ in range(20)]
    loads[7] = [400.0, 0.0, 0.0, 0.0]
    text = "".join(heat_map.draw([HeatMap("all", list(range(20)), loads, [100.0] * 20)], "rows"))
    assert "\N{GREATER-THAN OR EQUAL TO} 1.05" in text
    assert 'class="more3"><title>layer 0, rank 3: 1.030, 103 rows<' in text
    assert 'class="more5"><title>layer 7, rank 0: 4.000, 400 rows<' in text


def test_names_of_maps_are_text():
    text = "".join(heat_map.draw([HeatMap('"<b>', [0], [[1.0]], [1.0])], "rows"))
    assert "<b>" not in text and text.count("&quot;&lt;b&gt;") == 2


def test_times_are_microseconds(tmp_path):
    text = written(tmp_path, [result for result in timed()], unit="time")
    assert "layer 0, rank 1: 1.500, 30.0 us" in text


def timed():
    numbers = dict(
        tokens=8, routed_max=0, max=30_000_000, mean=20e6, home_mean=20e6, optimum=20_000_000
    )
    yield Result(0, 0, "home", **numbers, extra_copies=0.0, loads=[10_000_000, 30_000_000])


def test_prefill_and_decode_are_apart(tmp_path):
    results = results_of(ROUTED, phase="prefill") + results_of(ROUTED[1:], phase="decode")
    found = Page(written(tmp_path, results))
    assert found.texts["h3"] == ["prefill: 2 passes", "decode: 1 pass"]
    assert len(found.maps) == 4
    assert found.maps[0][3, 0][1] == 98 and found.maps[2][3, 0][1] == 110


def test_tables_and_verdicts_are_those_of_the_terminal(tmp_path, capsys):
    results = results_of(ROUTED)
    found = Page(written(tmp_path, results, notes=["Tokens are spread evenly."]))
    capsys.readouterr()
    verdict.print_verdict(results, 3)
    assert capsys.readouterr().out.strip() in found.texts["p"]
    table, slowest = found.texts["pre"]
    assert slowest.startswith("Slowest ranks")
    assert re.search(r"^home +1\.1125 ", table, re.M) and re.search(
        r"^bound +1\.0312$", table, re.M
    )
    assert found.texts["li"] == ["Tokens are spread evenly."]
    assert found.texts["h1"] == ["traffic"] and found.texts["h2"] == ["4 ranks, 64 experts"]


def test_several_recordings_have_a_table_of_all_and_a_section_each(tmp_path):
    other = Compared("evening", 4, 64, 32, 3, [], results_of(ROUTED[:1]))
    found = Page(written(tmp_path, results_of(ROUTED), more=[(other, "32 redundant")]))
    assert found.texts["h2"] == ["traffic: 4 ranks, 64 experts", "evening: 32 redundant"]
    assert "evening" in found.texts["pre"][0] and len(found.maps) == 4


NAMES = [
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "a&amp;b</title>",
    "\x00\udcff\n<b>",
]


@pytest.mark.parametrize("name", NAMES)
def test_names_are_text_whatever_they_hold(name, tmp_path):
    results = results_of(ROUTED)
    other = Compared("other", 4, 64, 0, 3, [name], results)
    text = written(tmp_path, results, recording=name, notes=[name], more=[(other, name)])
    found = Page(text)
    shown = name.replace("\x00", "\\x00").replace("\udcff", "\\udcff")
    assert found.texts["li"] == [shown, shown]
    assert shown.replace("\n", "\\n") in found.texts["h1"][0]
    assert not {"script", "img", "b"} & {tag for tag, _, _ in found.attributes}
    assert not {"script", "img", "b"} & set(found.texts)


def test_a_long_name_is_cut(tmp_path):
    found = Page(written(tmp_path, results_of(ROUTED), recording="a" * 10_000))
    assert found.texts["h1"] == ["a" * 59 + "\N{HORIZONTAL ELLIPSIS}" + "a" * 60]


def test_it_loads_nothing(tmp_path):
    text = written(tmp_path, results_of(ROUTED))
    assert not re.search(r"https?:|//|url\(|@import", text)
    found = Page(text)
    names = {name for _, name, _ in found.attributes}
    assert not {
        name for name in names if name in ("src", "href", "srcset", "data") or name[:2] == "on"
    }
    assert "script" not in found.texts and "link" not in {tag for tag, _, _ in found.attributes}


def test_58_layers_of_72_ranks_are_about_a_megabyte(tmp_path):
    loads = list(range(9_000, 9_072))
    numbers = dict(
        tokens=1,
        routed_max=1,
        max=9_071,
        mean=9_035.5,
        home_mean=9_035.5,
        optimum=9_036,
        extra_copies=0.0,
    )
    results = [
        Result(layer, 0, policy, **numbers, loads=loads)
        for layer in range(58)
        for policy in ("home", "live")
    ]
    text = written(tmp_path, results)
    assert sum(len(cells) for cells in Page(text).maps) == 58 * 72 * 2
    assert len(text) < 1_100_000


@pytest.fixture
def replay(monkeypatch):
    """The command, on two layers of counts, where matplotlib is not installed."""
    pytest.importorskip("torch", reason="torch is not installed: make test installs it")
    for name in ["matplotlib", *(name for name in sys.modules if name.startswith("matplotlib."))]:
        monkeypatch.setitem(sys.modules, name, None)
    counts = '{"logical_count": [[60, 20, 30, 10], [10, 20, 30, 60]]}'
    return lambda *arguments: main(["replay", counts, "--ep", "2", "--top-k", "2", *arguments])


def test_it_needs_no_matplotlib(replay, tmp_path, capsys):
    file = tmp_path / "replay.html"
    assert replay("--html", str(file)) == 0
    assert len(Page(file.read_text()).maps) == 2
    assert not list(tmp_path.rglob("*.partial"))
    assert replay("--plot", str(file)) == 2
    assert "--plot needs matplotlib" in capsys.readouterr().err


def test_several_ep_sizes_are_on_one_page(replay, tmp_path):
    file = tmp_path / "replay.html"
    assert replay("--ep", "1,2,4", "--html", str(file)) == 0
    found = Page(file.read_text())
    assert [len(cells) for cells in found.maps] == [2, 2, 4, 4, 8, 8]
    sizes = [title.split(": ")[1].split(",")[0] for title in found.texts["h2"]]
    assert sizes == ["1 rank", "2 ranks", "4 ranks"]


@pytest.mark.parametrize(
    "name, other, text",
    [
        ("folder", "x.json", "give a file, not a folder"),
        ("file/x.html", "x.json", "is no folder to write in"),
        ("x.html", "x.html", "is given for two outputs"),
    ],
)
def test_a_page_that_cannot_be_written_leaves_nothing(name, other, text, replay, tmp_path, capsys):
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("")
    before = set(tmp_path.rglob("*"))
    assert replay("--html", str(tmp_path / name), "--json", str(tmp_path / other)) == 2
    said = capsys.readouterr()
    assert name in said.err and text in said.err and said.err.count("\n") == 1
    assert not said.out, "it is refused before the work"
    assert set(tmp_path.rglob("*")) == before
