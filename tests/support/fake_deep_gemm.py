"""DeepGEMM on a CPU, and experts that call it."""

import torch

from waterfill_rs.calibrate.kernels import Fp8Experts, Tools, quantise_rows

SHAPE = (256, 128)
"""Hidden and intermediate of the experts."""


class FakeDeepGemm:
    """DeepGEMM's contract on Hopper, in float32: it asserts what the real one asserts of its arguments."""

    def __init__(self, wrong_by=1.0):
        self.wrong_by = wrong_by

    def get_mk_alignment_for_contiguous_layout(self):
        return 128

    def fp8_gemm_nt(self, a, b, d):
        assert type(a) is tuple and type(b) is tuple
        (x, x_scales), (weight, weight_scales) = a, b
        (m, k), (n, k_too) = x.shape, weight.shape
        assert x.dtype == weight.dtype == torch.float8_e4m3fn and k == k_too
        assert x.is_contiguous() and weight.is_contiguous() and weight_scales.is_contiguous()
        assert (d.shape, d.dtype, d.is_contiguous()) == ((m, n), torch.bfloat16, True)
        assert x_scales.shape == (m, k // 128) and weight_scales.shape == (n // 128, k // 128)
        assert x_scales.dtype == weight_scales.dtype == torch.float32
        whole = weight.float() * weight_scales.repeat_interleave(128, 0).repeat_interleave(128, 1)
        d.copy_(x.float() * x_scales.repeat_interleave(128, 1) @ whole.T * self.wrong_by)

    def m_grouped_fp8_gemm_nt_contiguous(self, a, b, d, m_indices):
        weight, scales = b
        assert (m_indices.shape, m_indices.dtype) == (a[0].shape[:1], torch.int32)
        assert m_indices.is_contiguous() and len(m_indices) % 128 == 0
        assert weight.dim() == 3 and scales.shape[0] == weight.shape[0]
        for start in range(0, len(m_indices), 128):
            rows = slice(start, start + 128)
            (expert,) = m_indices[rows].unique().tolist()
            part = (a[0][rows], a[1][rows])
            self.fp8_gemm_nt(part, (weight[expert], scales[expert]), d[rows])


TOOLS = Tools(
    quantise=lambda x, packed: quantise_rows(x, powers_of_two=packed),
    activate=lambda both: torch.nn.functional.silu(both.chunk(2, 1)[0]) * both.chunk(2, 1)[1],
    words="torch's",
)


def fp8_experts(count=3, **fake):
    return Fp8Experts(*SHAPE, count, FakeDeepGemm(**fake), TOOLS, device="cpu")
