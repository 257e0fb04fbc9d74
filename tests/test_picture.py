"""What pictures show: bars, lines and numbers as they are drawn, not files that exist."""

import random
from itertools import pairwise

import pytest

pytest.importorskip("matplotlib", reason="matplotlib is not installed: make test installs it")

from matplotlib.figure import Figure

from waterfill_rs.policies import picture
from waterfill_rs.policies.comparison import POLICIES, Layer, Result, compare
from waterfill_rs.policies.report import Compared


def result(layer=0, pass_id=0, policy="home", most=1.2, **changes):
    """Four ranks with 900 rows in the mean, the last of them ``most`` times that."""
    slowest = round(900 * most)
    rest = (3600 - slowest) // 3
    fields = dict(
        tokens=400, routed_max=slowest - 100, max=slowest, mean=900.0, home_mean=900.0, optimum=900
    )
    fields |= dict(extra_copies=0.0, loads=[rest, rest, 3600 - slowest - 2 * rest, slowest])
    return Result(layer=layer, pass_id=pass_id, policy=policy, **{**fields, **changes})


def drawn(results, *, unit="rows", recording="traffic", top_k=8):
    figure = Figure()
    one = Compared(recording, 4, 64, 0, top_k, [], results)
    picture.draw_layers(figure, one, "4 ranks, 64 experts", unit)
    figure.draw_without_rendering()
    return figure


def lines(axes):
    """By the first word of their labels."""
    return {line.get_label().split()[0]: line for line in axes.get_lines()}


def texts(figure):
    """All that can be read on it, marks at axes left out."""
    return "\n".join(text.get_text() for text in figure.findobj(lambda a: hasattr(a, "get_text")))


def test_lines_are_weighted_over_passes_and_bands_go_from_the_least_to_the_most():
    results = [result(layer, 0, most=1.5) for layer in (3, 4)]
    results += [result(layer, 1, most=1.1, home_mean=9000.0, max=9900) for layer in (3, 4)]
    above, _ = drawn(results).axes
    home = lines(above)["home"]
    assert list(home.get_xdata()) == [3, 4]
    assert list(home.get_ydata()) == pytest.approx([(1350 + 9900) / 9900] * 2)
    assert f"{(1350 + 9900) / 9900:.3f}" in home.get_label()
    band = above.collections[0].get_paths()[0].get_extents()
    assert (band.ymin, band.ymax) == pytest.approx((1.1, 1.5))


def test_the_bound_is_there_and_is_not_that_of_joint():
    results = [result(i, policy="live", most=1.3, optimum=1170) for i in range(4)]
    results += [result(i, policy="joint", most=1.1, optimum=990) for i in range(4)]
    above, _ = drawn(results).axes
    assert list(lines(above)["bound"].get_ydata()) == pytest.approx([1.3] * 4)


@pytest.mark.parametrize("unit, values, limit", [("rows", 1.125, 1.125), ("time", 1.0, 1.0)])
def test_routed_rows_reach_the_line_where_shared_rows_cannot_level(unit, values, limit):
    _, below = drawn([result(i, routed_max=900) for i in range(3)], unit=unit).axes
    line, limit_line = below.get_lines()
    assert list(line.get_ydata()) == pytest.approx([values] * 3)
    assert list(limit_line.get_ydata()) == pytest.approx([limit] * 2)
    assert ("1 + 1/8 = 1.125" in limit_line.get_label()) == (unit == "rows")
    assert below.get_ylim()[0] < limit < below.get_ylim()[1]


def test_equal_curves_are_all_seen():
    above, _ = drawn([result(i, policy=policy) for i in range(58) for policy in POLICIES]).axes
    found = above.get_lines()
    assert [line.get_label().split()[0] for line in found] == [*POLICIES, "bound"]
    for wide, narrow in pairwise(found):
        assert narrow.get_zorder() >= wide.get_zorder()
        assert narrow.get_linewidth() <= wide.get_linewidth() - 0.4
        assert narrow.get_markersize() < wide.get_markersize()
    assert len({line.get_color() for line in found}) == len(found)


def test_every_policy_has_its_own_line():
    from waterfill_rs.policies.comparison import POLICIES as all_policies

    above, _ = drawn([result(policy=policy) for policy in all_policies]).axes
    assert list(lines(above)) == [*all_policies, "bound"]


def test_spikes_do_not_squash_the_rest_and_are_marked_with_their_numbers():
    draw = random.Random(1)
    most = [1 + 0.1 * draw.random() for _ in range(58)]
    most[10], most[40] = 3.5, 2.25
    figure = drawn([result(i, most=value) for i, value in enumerate(most)])
    above, _ = figure.axes
    assert max(sorted(most)[:-2]) < above.get_ylim()[1] < 1.12
    marks = lines(above)["beyond"]
    assert list(marks.get_xdata()) == [10, 40]
    assert {text.get_text(): text.get_position()[0] for text in above.texts} == {
        "3.50": 10,
        "2.25": 40,
    }


def test_without_spikes_nothing_is_left_out():
    most = [1.05, 1.1, 1.2, 1.3]
    above, _ = drawn([result(i, most=value) for i, value in enumerate(most)]).axes
    assert above.get_ylim()[0] < 1 and above.get_ylim()[1] > 1.3
    assert "beyond" not in lines(above) and not above.texts


def test_prefill_and_decode_are_apart():
    results = [result(i, 0, phase="decode", most=1.4) for i in range(2)]
    results += [result(i, p, phase="prefill", most=1.1) for i in range(2) for p in (1, 2)]
    figure = drawn(results)
    titles = [axes.get_legend().get_title().get_text() for axes in figure.axes[:2]]
    assert titles[0].startswith("prefill: 2 passes") and titles[1].startswith("decode: 1 pass")
    values = [lines(axes)["home"].get_ydata()[0] for axes in figure.axes[:2]]
    assert values == pytest.approx([1.1, 1.4])


@pytest.mark.parametrize(
    "name, seen",
    [
        ("$x_{$ of tuesday", "$x_{$ of tuesday"),
        ("a\nb\x00\udcff", "a\\nb\\x00\\udcff"),
        ("left" * 99 + "right" * 99, "left" * 9 + "lef\N{HORIZONTAL ELLIPSIS}" + "right" * 8),
    ],
)
def test_the_title_says_which_recording_it_is(name, seen):
    title = drawn([result()], recording=name).get_suptitle()
    assert title.splitlines()[0] == seen
    assert title.splitlines()[1] == "4 ranks, 64 experts"


def ranks_drawn(layers, tokens):
    figure = Figure()
    results = [result for layer in layers for result in compare(layer, ("home", "live"))]
    picture.draw_ranks(figure, results, tokens)
    return figure, results


# Routed rows of four ranks with an expert each, 20 tokens a rank. The middle one is usual.
LAYERS = [
    Layer(i, 7, routed, [20] * 4)
    for i, routed in enumerate(([60] * 4, [66, 58, 60, 56], [90, 50, 50, 50]))
]


def test_bars_are_the_loads_of_the_usual_run_with_shared_rows_on_top():
    figure, results = ranks_drawn(LAYERS, 20)
    for axes, policy in zip(figure.axes, ("home", "live"), strict=True):
        expected = next(r for r in results if (r.layer, r.policy) == (1, policy))
        routed, shared = axes.containers
        assert [bar.get_height() for bar in routed] == [66, 58, 60, 56]
        assert [bar.get_y() for bar in shared] == [66, 58, 60, 56]
        assert [bar.get_y() + bar.get_height() for bar in shared] == list(expected.loads)
        ends = {line.get_label(): line.get_ydata()[0] for line in axes.get_lines()}
        assert ends["mean"] == 80 and ends["least that any plan's slowest rank can have"] == 80
    assert [bar.get_height() for bar in figure.axes[0].containers[1]] == [20] * 4


def test_the_title_says_the_result_in_words():
    figure, _ = ranks_drawn(LAYERS, 20)
    assert figure.get_suptitle() == "Slowest rank: 7.5% above the mean \N{RIGHTWARDS ARROW} 0.0%"
    assert "rank 0: +7.5%" in texts(figure)
    # (80 + 86 + 110) / 240 and (80 + 80 + 90) / 240
    said = "layer 1, step 7: the median of 3 layers and steps; over all of them 15.0% \N{RIGHTWARDS ARROW} 4.2%"
    assert said in texts(figure)


@pytest.mark.parametrize("rank, side", [(0, "left"), (3, "center"), (7, "right")])
def test_the_slowest_ranks_number_stays_within_the_picture(rank, side):
    routed = [60] * 8
    routed[rank] = 70
    figure, _ = ranks_drawn([Layer(0, 0, routed, [20] * 8)], 20)
    number = next(
        text for text in figure.axes[0].texts if text.get_text().startswith(f"rank {rank}:")
    )
    assert number.get_ha() == side
