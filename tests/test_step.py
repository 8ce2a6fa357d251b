"""Parts of benchmarks/step.py other than measurements: the group of a kernel, and the best batch."""

from __future__ import annotations

import pytest

from benchmarks import step


@pytest.mark.parametrize(
    ("kernel", "group"),
    [
        ("sm90_xmma_fprop_implicit_gemm_bf16bf16_bf16f32_f32_nhwckrsc_nhwc", "convolution"),
        ("void cudnn::bn_fw_tr_1C11_kernel_NCHW<float, float, int, 512>", "normalisation"),
        ("triton_poi_fused__native_batch_norm_legit_functional_add_relu_5", "normalisation"),
        ("triton_red_fused_native_batch_norm_backward_threshold_backward_9", "normalisation"),
        ("void at::native::multi_tensor_apply_kernel<FusedSgdMathFunctor<float, 3>>", "optimizer"),
        ("triton_poi_fused_convert_element_type_0", "elementwise"),
        ("void at::native::vectorized_elementwise_kernel<4, at::native::CUDAFunctor_add>", "elementwise"),
        ("Memcpy DtoD (Device -> Device)", "copies"),
        ("void at::native::max_pool_forward_nhwc<c10::BFloat16>", "pooling"),
        ("aten::mkldnn_convolution", "convolution"),
        ("aten::threshold_backward", "elementwise"),
        ("something_new", "other"),
    ],
)
def test_a_kernel_belongs_to_the_first_group_that_its_name_fits(kernel: str, group: str) -> None:
    assert step.kernel_group(kernel).startswith(group)


def test_the_best_batch_is_each_contestants_own() -> None:
    def found(a: list[float], b: list[float]) -> list[object]:
        return [step.Contestant("a", "", None, a), step.Contestant("b", "", None, b)]

    by_batch = {256: found([10, 90, 20], [500.0]), 128: found([19, 18, 17], []), 512: found([], [499.0])}
    _, _, first, second, _ = step.best_batch_lines(by_batch)
    assert first == "| a | 18.0 | **20.0** | absent | 256 |", "by the median, not the largest"
    assert second == "| b | absent | **500** | 499 | 256 |"
    assert step.best_batch_lines({256: found([1.0], [2.0])}) == []


def test_shares_of_a_profile_are_of_its_sum() -> None:
    lines = step.profile_lines({"eager": {"convolution": 3.0, "other": 1.0}})
    assert lines[2:4] == ["| convolution | 3.00 | 75% |", "| other | 1.00 | 25% |"]
