"""The kinds of recorded names, the table of a trace, and a profiler whose window is cut short or cannot be written."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch

from components.profiler import ProfilerConfig, break_down, kinds
from components.profiler.breakdown import STEP, Interval, exclusive_times

pytestmark = pytest.mark.quick

RECORDED = {
    # cuBLAS, cuBLASLt and CUTLASS on sm80 and sm90
    "nvjet_tst_128x256_64x4_1x2_h_bz_coopA_NNT": kinds.PRODUCTS,
    "nvjet_hsh_256x128_64x4_2x1_v_bz_coopB_TNN": kinds.PRODUCTS,
    "sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize64x128x64_warpgroupsize1x1x1_execute_kernel__5x_cublas":
        kinds.PRODUCTS,
    "ampere_bf16_s16816gemm_bf16_128x128_ldg8_f2f_stages_32x5_tn": kinds.PRODUCTS,
    "void cutlass::Kernel2<cutlass_80_wmma_tensorop_bf16_s161616gemm_bf16_16x16_128x1_tn_align8>(...)": kinds.PRODUCTS,
    "void cutlass::device_kernel<at::cuda::detail::enable_3x_kernel_for_sm9x<cutlass::gemm::kernel::GemmUniversal<":
        kinds.PRODUCTS,
    "void cublasLt::splitKreduce_kernel<32, 16, int, float, __nv_bfloat16, float>(...)": kinds.PRODUCTS,
    "void gemv2T_kernel_val<int, int, __nv_bfloat16, __nv_bfloat16, __nv_bfloat16, float, 128, 16, 4>": kinds.PRODUCTS,
    "triton_tem_fused_mm_2": kinds.PRODUCTS,
    "aten::mm": kinds.PRODUCTS, "aten::addmm_": kinds.PRODUCTS, "aten::_grouped_mm": kinds.PRODUCTS,
    "mkldnn::_linear_pointwise": kinds.PRODUCTS, "aten::mkldnn_linear": kinds.PRODUCTS,
    # attention: cuDNN, FlashAttention 2, memory-efficient, flex
    "cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16_knob_7_64x128x128_4x1x1_kernel0_0": kinds.ATTENTION,
    "cudnn_generated_fort_native_sdpa_sm90_flash_bprop_wgmma_f16_knob_26_64x64x128_1x4x1_kernel0_0": kinds.ATTENTION,
    "void pytorch_flash::flash_fwd_kernel<Flash_fwd_kernel_traits<128, 64, 64, 4, false, false, cutlass::bfloat16_t":
        kinds.ATTENTION,
    "fmha_cutlassF_bf16_aligned_64x128_rf_sm80(PyTorchMemEffAttention::AttentionKernel<cutlass::bfloat16_t":
        kinds.ATTENTION,
    "triton_tem_fused_flex_attention_backward_1": kinds.ATTENTION,
    "aten::_scaled_dot_product_flash_attention_for_cpu": kinds.ATTENTION,
    "ScaledDotProductCudnnAttentionBackward0": kinds.ATTENTION,
    # the loss, in ranges that autograd makes of the name of its function
    "_LinearCrossEntropy": kinds.LOSS, "_LinearCrossEntropyBackward": kinds.LOSS,
    "aten::cross_entropy_loss": kinds.LOSS, "NllLossBackward0": kinds.LOSS,
    # the optimizer
    "Optimizer.step#AdamW.step": kinds.OPTIMIZER, "Optimizer.zero_grad#AdamW.zero_grad": kinds.OPTIMIZER,
    "aten::_fused_adamw_": kinds.OPTIMIZER, "clip_gradients": kinds.OPTIMIZER,
    "void at::native::(anonymous namespace)::multi_tensor_apply_kernel<at::native::(anonymous namespace)::"
    "FusedOptimizerTensorListMetadata<4>, at::native::(anonymous namespace)::FusedAdamMathFunctor<float, 4>":
        kinds.OPTIMIZER,
    # communication
    "ncclDevKernel_AllGather_RING_LL(ncclDevKernelArgsStorage<4096ul>)": kinds.COMMUNICATION,
    "ncclDevKernel_ReduceScatter_Sum_f32_RING_LL(ncclDevKernelArgsStorage<4096ul>)": kinds.COMMUNICATION,
    "ncclKernel_AllReduce_RING_LL_Sum_float": kinds.COMMUNICATION,
    "gloo:all_reduce": kinds.COMMUNICATION, "c10d::allreduce_": kinds.COMMUNICATION,
    "FSDP::all_gather (layers.0)": kinds.COMMUNICATION, "fsdp::split_with_sizes_copy": kinds.COMMUNICATION,
    "FSDP::post_backward_reduce (layers.3)": kinds.COMMUNICATION,
    "FSDP::pre_forward (layers.0)": None, "FSDP::post_backward_accumulate (layers.0)": None,
    # data and copies
    "next_micro_batch": kinds.DATA,
    "enumerate(DataLoader)#_MultiProcessingDataLoaderIter.__next__": kinds.DATA,
    "Memcpy HtoD (Pinned -> Device)": kinds.COPIES, "Memset (Device)": kinds.COPIES,
    # kernels of inductor are named after all that is in them
    "triton_poi_fused__scaled_dot_product_cudnn_attention_clone_mm_view_3": kinds.OTHER,
    "triton_red_fused__to_copy_add_mean_mm_mul_pow_rsqrt_0": kinds.OTHER,
    "void at::native::vectorized_elementwise_kernel<4, at::native::CUDAFunctor_add<c10::BFloat16>": None,
    "void at::native::(anonymous namespace)::vectorized_layer_norm_kernel<c10::BFloat16, float, true>": None,
    "void at::native::radixSortKVInPlace<-2, -1, 32, 4, long, long, unsigned int>": None,
    "ProfilerStep#12": None, "## Call CompiledFxGraph fhmnzygkz7q6nt47i4m5 ##": None,
}  # fmt: skip


@pytest.mark.parametrize(("name", "kind"), RECORDED.items())
def test_the_kind_of_a_recorded_name(name: str, kind: str | None) -> None:
    assert kinds.kind_of(name) == kind


@pytest.mark.parametrize(
    ("name", "surrounding", "kind"),
    [
        ("aten::mm", kinds.LOSS, kinds.LOSS_PRODUCTS),
        ("aten::exp_", kinds.LOSS, kinds.LOSS),
        ("aten::mm", kinds.OPTIMIZER, kinds.OPTIMIZER),
        ("ncclDevKernel_AllReduce_Sum_f64_RING_LL", kinds.OPTIMIZER, kinds.COMMUNICATION),
        ("aten::copy_", kinds.COMMUNICATION, kinds.COMMUNICATION),
        ("void at::native::reduce_kernel<512, 1, at::native::Reduc", kinds.GRADIENT_NOISE, kinds.GRADIENT_NOISE),
        ("aten::mm", kinds.OTHER, kinds.PRODUCTS),
        ("aten::add", None, None),
    ],
)  # fmt: skip
def test_the_surrounding_range_decides_the_kind_except_for_communication(
    name: str, surrounding: str | None, kind: str | None
) -> None:
    assert kinds.kind_within(name, surrounding) == kind


def test_every_instant_is_counted_once_for_the_first_in_order() -> None:
    """Against a loop over integer instants."""
    chance = random.Random(0)
    for _ in range(200):
        intervals = [
            Interval(chance.randrange(3), start, start + chance.randrange(1, 30), chance.choice("abc"))
            for start in (chance.randrange(-10, 100) for _ in range(chance.randrange(12)))
        ]
        expected: dict[str, float] = {}
        for instant in range(80):
            active = [each for each in intervals if each.start <= instant < each.end]
            kind = min(active).kind if active else kinds.IDLE
            expected[kind] = expected.get(kind, 0) + 1
        assert exclusive_times(intervals, 0, 80) == expected


def host(name: str, ts: float, dur: float, tid: int = 1, cat: str = "cpu_op", correlation: int | None = None) -> dict:
    return {"ph": "X", "cat": cat, "name": name, "pid": 1, "tid": tid, "ts": ts, "dur": dur,
            "args": {} if correlation is None else {"correlation": correlation}}  # fmt: skip


def launch(correlation: int, ts: float, tid: int = 1) -> dict:
    return host("cudaLaunchKernel", ts, 1, tid, "cuda_runtime", correlation)


def kernel(name: str, correlation: int, ts: float, dur: float, stream: int = 7, cat: str = "kernel") -> dict:
    return host(name, ts, dur, stream, cat, correlation)


CUDA_TRACE = [
    host(f"{STEP}7", 100, 100, cat="user_annotation"),
    host(f"{STEP}8", 210, 90, cat="user_annotation"),
    host("profiler: wait for the device", 300, 100, cat="user_annotation"),
    host("cudaDeviceSynchronize", 301, 99, cat="cuda_runtime"),
    host("next_micro_batch", 100, 10, cat="user_annotation"),
    host("aten::mm", 110, 5), launch(1, 112),
    host("_LinearCrossEntropy", 120, 20), host("aten::mm", 121, 5), launch(2, 122),
    host("aten::exp_", 130, 4), launch(3, 131),
    # the thread of autograd on the device
    host("gradient_noise", 150, 5, tid=2, cat="user_annotation"), host("aten::linalg_vector_norm", 151, 3, tid=2),
    launch(4, 152, tid=2), launch(5, 160, tid=2),
    host("cudaStreamSynchronize", 170, 12, cat="cuda_runtime"),
    host("aten::rsqrt", 204, 2), launch(6, 205),  # a validation between the steps
    kernel("nvjet_tst_128x256_64x4_1x2_h_bz_coopA_NNT", 1, 120, 40),          # 120 to 160
    kernel("nvjet_tst_64x64", 2, 160, 20),                                    # 160 to 180, in the loss
    kernel("void at::native::vectorized_elementwise_kernel<4>", 3, 180, 10),  # 180 to 190, in the loss
    kernel("void at::native::reduce_kernel<512>", 4, 190, 5),                 # 190 to 195
    kernel("ncclDevKernel_AllGather_RING_LL", 5, 150, 60, stream=20),         # 150 to 210, from 195 on alone
    kernel("void at::native::rsqrt_kernel", 6, 215, 5),
    kernel("Memcpy HtoD (Pinned -> Device)", 99, 220, 10, cat="gpu_memcpy"),
    kernel("void at::native::unknown<4>", 98, 390, 50),                       # ends after the window
]  # fmt: skip


def test_the_table_of_a_trace_of_a_gpu() -> None:
    found = break_down(CUDA_TRACE)
    assert (found.device, found.steps, found.window) == ("cuda", 2, 300)
    assert found.times == {
        kinds.PRODUCTS: 40, kinds.LOSS_PRODUCTS: 20, kinds.LOSS: 10, kinds.GRADIENT_NOISE: 5,
        kinds.COMMUNICATION: 15, kinds.BETWEEN_STEPS: 5, kinds.COPIES: 10, kinds.OTHER: 10,
        kinds.DATA: 10, kinds.IDLE: 10 + 5 + 160,
    }  # fmt: skip
    assert found.communication == 60
    assert (found.kernels, found.synchronizations, found.synchronizing) == (7, 1, 12)
    table = found.table("profile")
    assert "communication takes 0.03 ms, 75% overlapped" in table
    assert "4 kernels and 0.5 synchronizations per step; the host waits 0.01 ms in them" in table


def test_a_trace_without_a_step_is_refused() -> None:
    with pytest.raises(ValueError, match="no step was recorded"):
        break_down([host("aten::mm", 0, 1)])


def work() -> None:
    torch.ones(4, 4) @ torch.ones(4, 4)


def test_a_run_that_fails_in_the_window_keeps_its_error_and_leaves_no_profiler_behind(tmp_path: Path) -> None:
    profiler = ProfilerConfig(steps=2, start_step=1).build(tmp_path / "profile", device=torch.device("cpu"), rank=0)
    profiler.start_step(1)
    work()
    profiler.close(ArithmeticError, ArithmeticError("bad step"), None)
    assert not torch.autograd._profiler_enabled()
    assert not (tmp_path / "profile").exists()


def test_a_folder_that_cannot_be_written_is_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "profile").write_text("a file is in the way")
    profiler = ProfilerConfig(steps=1, start_step=1).build(tmp_path / "profile", device=torch.device("cpu"), rank=0)
    profiler.start_step(1)
    work()
    with caplog.at_level("WARNING", "powertrain"):
        profiler.end_step()
    assert "the profile of steps 1 to 1 is not complete: FileExistsError" in caplog.text


def test_other_ranks_record_only_where_all_are_asked_for(tmp_path: Path) -> None:
    for all_ranks, recorded in ((False, []), (True, ["steps-1-to-1-rank-3.trace.json.gz", "steps-1-to-1-rank-3.txt"])):
        config = ProfilerConfig(steps=1, start_step=1, all_ranks=all_ranks)
        profiler = config.build(tmp_path / str(all_ranks), device=torch.device("cpu"), rank=3)
        profiler.start_step(1)
        work()
        profiler.end_step()
        profiler.close()
        assert sorted(file.name for file in (tmp_path / str(all_ranks)).glob("*")) == recorded
