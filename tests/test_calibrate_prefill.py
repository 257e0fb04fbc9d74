"""A layer's two forms without a GPU: how DeepEP and sglang's kernels are called, what comes out, and how pairs are timed."""

from contextlib import nullcontext

import pytest

torch = pytest.importorskip("torch")

from fake_deep_gemm import SHAPE, fp8_experts

from waterfill_rs.calibrate import prefill
from waterfill_rs.calibrate.job import Job
from waterfill_rs.calibrate.kernels import quantise_rows
from waterfill_rs.calibrate.prefill import Kernels, Layer, check_forms, draw, paired

EXPERTS, TOP_K, TOKENS = 5, 3, 200
HIDDEN = SHAPE[0]


class FakeEvent:
    def current_stream_wait(self):
        pass


class FakeBuffer:
    """DeepEP over one rank. It asserts what the real one does of its arguments."""

    def __init__(self):
        self.calls = []
        self.event = FakeEvent()

    def capture(self):
        return self.event

    def get_dispatch_layout(self, ids, slots, **options):
        self.calls.append((tuple(ids.shape), slots))
        assert options["previous_event"] is self.event and options["async_finish"]
        assert ids.dtype == torch.int64 and ids.is_contiguous()
        assert int(ids.min()) >= 0 and int(ids.max()) < slots
        per_expert = torch.bincount(ids.flatten(), minlength=slots)
        return "per rank", None, per_expert, "in rank", self.event

    def dispatch(self, x, *, topk_idx, topk_weights, num_tokens_per_expert, expert_alignment, **_):
        values, scales = x
        assert values.dtype == torch.float8_e4m3fn and values.is_contiguous()
        assert scales.shape == (len(values), HIDDEN // 128) and scales.is_contiguous()
        assert topk_weights.shape == topk_idx.shape and topk_weights.dtype == torch.float32
        rows = [
            -(-n // expert_alignment) * expert_alignment for n in num_tokens_per_expert.tolist()
        ]
        return x, topk_idx, topk_weights, rows, ("handle", len(values)), self.event

    def combine(self, x, handle, *, async_finish, previous_event, **_):
        assert x.dtype == torch.bfloat16 and handle == ("handle", len(x))
        assert async_finish and previous_event is self.event
        return x, None, self.event


def ep_scatter(
    recv_x,
    recv_x_scale,
    recv_topk,
    num_recv_tokens_per_expert,
    expert_start_loc,
    output_tensor,
    output_tensor_scale,
    m_indices,
    output_index,
    scale_ue8m0=False,
):
    """As sglang 0.5.13 to 0.5.16 have it. What it leaves unwritten is garbage there, and zero here."""
    assert num_recv_tokens_per_expert.dtype == expert_start_loc.dtype == torch.int32
    assert m_indices.dtype == torch.int32 and m_indices.shape == output_tensor.shape[:1]
    assert output_tensor.dtype == recv_x.dtype and output_tensor_scale.dtype == recv_x_scale.dtype
    assert output_index.shape == recv_topk.shape
    output_tensor.zero_(), output_tensor_scale.zero_()
    counts = num_recv_tokens_per_expert.long()
    expert_start_loc.copy_(counts.cumsum(0) - counts)
    m_indices.copy_(torch.arange(len(counts)).repeat_interleave(counts))
    for token, ids in enumerate(recv_topk.tolist()):
        for column, expert in enumerate(ids):
            if expert >= 0:
                place = int(expert_start_loc[expert])
                expert_start_loc[expert] += 1
                output_tensor[place] = recv_x[token]
                output_tensor_scale[place] = recv_x_scale[token]
                output_index[token, column] = place


def newer_ep_scatter(
    recv_x, recv_x_scale, recv_topk, num_recv_tokens_per_expert, num_valid_tokens_per_expert, *rest
):
    """As 0.5.17 and newer have it."""
    assert num_valid_tokens_per_expert is num_recv_tokens_per_expert
    ep_scatter(recv_x, recv_x_scale, recv_topk, num_recv_tokens_per_expert, *rest)


def ep_gather(input_tensor, recv_topk_ids, recv_topk_weight, input_index, output_tensor):
    assert input_tensor.dtype == output_tensor.dtype == torch.bfloat16
    assert input_index.shape == recv_topk_ids.shape
    rows = input_tensor[input_index].float() * recv_topk_weight[:, :, None]
    output_tensor.copy_(rows.sum(1))


def kernels(**changes):
    def quantise(x, group):
        assert group == 128
        return quantise_rows(x)

    parts = {
        "quantise": quantise,
        "ep_scatter": ep_scatter,
        "ep_gather": ep_gather,
        "tma_align_input_scale": lambda scales: scales.t().contiguous().t(),
    }
    return Kernels(**parts | changes)


class FakeStream:
    def wait_stream(self, other):
        pass

    def wait_event(self, event):
        pass

    def record_event(self):
        return "event"


@pytest.fixture(autouse=True)
def streams(monkeypatch):
    monkeypatch.setattr(torch.cuda, "Stream", FakeStream)
    monkeypatch.setattr(torch.cuda, "current_stream", FakeStream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())


def job(ranks=1, experts=EXPERTS):
    return Job(ranks, *SHAPE, TOP_K, experts, (), (), 0)


def layer(experts=None, **changes):
    return Layer(FakeBuffer(), experts or fp8_experts(EXPERTS + 1), kernels(**changes), EXPERTS + 1)


@pytest.fixture
def batch():
    torch.manual_seed(3)
    return draw(job(), 0, TOKENS, torch.int64, "cpu")


@pytest.mark.parametrize("scatter", [ep_scatter, newer_ep_scatter])
def test_both_forms_are_the_layer(batch, scatter):
    tried = layer(ep_scatter=scatter)
    check_forms(tried, batch)
    assert not tried.experts.poisoned
    assert tried._buffer.calls == [((TOKENS, TOP_K + 1), 6), ((TOKENS, TOP_K), 6)]


def test_forms_that_differ_are_refused(batch):
    tried = layer()
    tried.experts.dense = lambda x, expert: torch.zeros_like(x)
    with pytest.raises(RuntimeError, match=r"overlapped layer differs .* by 0\.\d+ of its norm"):
        check_forms(tried, batch)


def test_a_layer_that_is_no_layer_is_refused(batch):
    with pytest.raises(RuntimeError, match=r"fused layer differs from torch's by 0\.\d+"):
        check_forms(layer(fp8_experts(EXPERTS + 1, wrong_by=1.1)), batch)

    def loses_rows(out, ids, weights, places, gathered):
        ep_gather(out, ids, weights, torch.zeros_like(places), gathered)

    with pytest.raises(RuntimeError, match="fused layer differs"):
        check_forms(layer(ep_gather=loses_rows), batch)


def test_tokens_are_drawn_over_all_experts_and_share_their_own_rank_s():
    drawn = [draw(job(4, 12), rank, 300, torch.int64, "cpu") for rank in range(4)]
    for rank, tokens in enumerate(drawn):
        routed, fused = tokens.routed[0], tokens.fused[0]
        assert torch.equal(fused[:, :-1], routed)
        assert fused[:, -1].unique().tolist() == [rank * 4 + 3]
        assert routed.unique().tolist() == [slot for slot in range(16) if slot % 4 != 3]
        assert all(len(set(row)) == TOP_K for row in routed.tolist())
        assert torch.equal(tokens.fused[1][:, :-1], tokens.routed[1])
        assert tokens.fused[1][:, -1].unique().tolist() == [1.0]


def test_a_pair_s_bursts_lie_side_by_side():
    began, clock = [], [0.0]

    def burst(name, us):
        """The GPU gets slower by 1% from burst to burst."""

        def run():
            began.append(name)
            clock[0] += 0.01
            return us * (1 + clock[0])

        return run

    overlapped, fused = paired(burst("o", 880.0), burst("f", 1000.0), lambda times: times)
    assert overlapped / fused == pytest.approx(0.88, rel=0.02)
    warm = 2 * prefill._WARM
    assert began[warm : warm + 6] == ["o", "f", "f", "o", "o", "f"]
    assert began.count("o") == began.count("f")


def test_the_slowest_rank_s_burst_counts():
    other = iter(([5.0] * 21, [9.0] * 21))

    def slowest(times):
        return [max(pair) for pair in zip(times, next(other), strict=True)]

    assert paired(lambda: 8.0, lambda: 4.0, slowest) == pytest.approx((8.0, 9.0))


def test_what_cannot_be_compared_is_refused(monkeypatch):
    capability = [(9, 0)]
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability[0])
    prefill._check_machine(job())
    many = Job(2, *SHAPE, 32, 64, (), (), 0)
    with pytest.raises(RuntimeError, match="DeepEP takes 32 experts a token, and fused are 33"):
        prefill._check_machine(many)
    capability[0] = (10, 0)
    with pytest.raises(RuntimeError, match="stay fused on SM 100"):
        prefill._check_machine(job())
    monkeypatch.setattr(
        prefill, "experts_of", lambda hidden, intermediate, count: fp8_experts(count)
    )
    capability[0] = (9, 0)
    with pytest.raises(RuntimeError, match="a server's kernels are not there, but FP8"):
        prefill.measure(job(), 0, FakeBuffer(), torch.int64, print)
