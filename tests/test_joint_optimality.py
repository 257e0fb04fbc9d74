"""``joint`` against a linear program, with replicas placed for another workload; on a recording: ``benches/joint.py``."""

import pytest

pytest.importorskip("numpy", reason="numpy is not installed: make test installs it")
pytest.importorskip("scipy", reason="scipy is not installed: make test installs it")

import joint


@pytest.mark.parametrize("ranks, redundant", joint.SHAPES)
def test_joint_is_the_linear_programs_optimum_in_whole_rows(ranks, redundant):
    found = [joint.solve(*rows, ranks, redundant) for rows in joint.layers_of(None)]
    assert len(found) == joint.LAYERS
    for one in found:
        assert one.rows_over == 0
        # The replicas, as the router splits them, leave something to gain.
        assert one.live >= one.joint
    assert sum(one.live for one in found) > 1.01 * sum(one.joint for one in found)
