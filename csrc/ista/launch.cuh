// From matrices in global memory to a launch of gemm_kernel.
#pragma once

#include <algorithm>

#include "../common/tensor_map.h"
#include "gemm.cuh"
#include "plan.h"

namespace crate_kernels {

// a, b: what the sum over k takes, as gemm.cuh's uses have them; c and out: m x n, but out is
// one such matrix for each part of the sum over k. All have contiguous rows.
struct GemmOperands {
    const void *a, *b, *c = nullptr;
    void *out, *g = nullptr;
    uint32_t* mask = nullptr;
    int64_t m, n, k;
    Dtype dtype, out_dtype;
    float threshold = 0, alpha = 1;
    float *row_sums = nullptr, *sums_of_a = nullptr;
    float* moments = nullptr;
    const float* row_statistics = nullptr;
    const float *shift = nullptr, *column_sums = nullptr, *column_scales = nullptr;
};

// The plan of a product whose sums over k are whole; moments come by spans of moments_span.
inline GemmPlan whole_plan(const GemmOperands& x) {
    return choose_plan(x.m, x.n, x.k, 1, 12, multiprocessors(), x.moments ? moments_span(x.n) : 0);
}

template <typename Config>
void launch_gemm(const GemmOperands& x, const GemmPlan& plan, cudaStream_t stream) {
    bool shares_a = plan.n_per_cluster == 2, shares_b = plan.m_per_cluster == 2;
    auto matrix = [](const void* data, Dtype dtype, int64_t rows, int64_t columns, int box_rows,
                     int box_columns) {
        return make_tensor_map<2>(data, dtype, {columns, rows}, {columns}, {box_columns, box_rows});
    };
    GemmParams p{};
    p.a = Config::kTransposedA ? matrix(x.a, x.dtype, x.k, x.m, kBlockK, 64)
                               : matrix(x.a, x.dtype, x.m, x.k, shares_a ? 64 : kBlockM, kBlockK);
    p.b = Config::kTransposedB
              ? matrix(x.b, x.dtype, x.k, x.n, shares_b ? kBlockK / 2 : kBlockK, 64)
              : matrix(x.b, x.dtype, x.n, x.k, Config::kBlockN / (shares_b ? 2 : 1), kBlockK);
    if (Config::kHasC) {
        p.c = matrix(x.c, x.out_dtype, x.m, x.n, 64, Config::kPartColumns);
        p.out = matrix(x.out, x.out_dtype, x.m, x.n, 64, Config::kPartColumns);
    } else {
        p.out = make_tensor_map<4>(x.out, x.out_dtype, {x.n, x.m, plan.parts, 1},
                                   {x.n, x.m * x.n, x.m * x.n * plan.parts},
                                   {Config::kPartColumns, 64, 1, 1});
    }
    p.stores_g = Config::kMasksA && x.g != nullptr;
    if (p.stores_g) p.g = matrix(x.g, x.dtype, x.m, x.n, kBlockM, kBlockK);
    p.mask = x.mask;
    p.row_sums = x.row_sums;
    p.sums_of_a = x.sums_of_a;
    p.moments = reinterpret_cast<float2*>(x.moments);
    p.row_statistics = reinterpret_cast<const float2*>(x.row_statistics);
    p.shift = x.shift;
    p.column_sums = x.column_sums;
    p.column_scales = x.column_scales;
    p.rows = x.m;
    p.n = x.n;
    p.k = x.k;
    p.threshold = x.threshold;
    p.alpha = x.alpha;
    p.n_blocks = ceil_div(x.n, kBlockK);
    p.m_blocks = ceil_div(x.m, kBlockM);
    p.k_blocks = ceil_div(x.k, kBlockK);
    p.m_per_cluster = plan.m_per_cluster;
    p.n_per_cluster = plan.n_per_cluster;
    p.groups_m = ceil_div(p.m_blocks, plan.m_per_cluster);
    p.groups_n = ceil_div(ceil_div(x.n, Config::kBlockN), plan.n_per_cluster);
    p.k_blocks_of_part = ceil_div(p.k_blocks, plan.parts);
    p.units = p.groups_m * p.groups_n * plan.parts;
    int blocks_of_unit = plan.m_per_cluster * plan.n_per_cluster;
    int blocks = std::min<int64_t>(multiprocessors(), int64_t(p.units) * blocks_of_unit + 1) & ~1;
    p.step = blocks / blocks_of_unit;
    allow_shared_memory(gemm_kernel<Config>, Config::kSharedBytes);
    launch_early(gemm_kernel<Config>, blocks, Config::kThreads, Config::kSharedBytes, stream, p);
}

// By the dtypes and the plan's tile; Out is T or float.
template <Product kProduct, typename T, typename Out>
void launch_gemm(const GemmOperands& x, const GemmPlan& plan, cudaStream_t stream) {
    if (plan.block_n == 192) {
        launch_gemm<GemmConfig<T, Out, 192, kProduct>>(x, plan, stream);
    } else {
        launch_gemm<GemmConfig<T, Out, 128, kProduct>>(x, plan, stream);
    }
}

template <Product kProduct, typename T>
void launch_gemm(const GemmOperands& x, const GemmPlan& plan, cudaStream_t stream) {
    if constexpr (kProduct == Product::kWeight) {
        launch_gemm<kProduct, T, float>(x, plan, stream);
    } else if constexpr (kProduct != Product::kForward && kProduct != Product::kBackward) {
        launch_gemm<kProduct, T, T>(x, plan, stream);
    } else if (x.out_dtype == Dtype::kFloat32) {
        launch_gemm<kProduct, T, float>(x, plan, stream);
    } else {
        launch_gemm<kProduct, T, T>(x, plan, stream);
    }
}

template <Product kProduct>
void launch_gemm(const GemmOperands& x, const GemmPlan& plan, cudaStream_t stream) {
    if (x.dtype == Dtype::kFloat16) {
        launch_gemm<kProduct, __half>(x, plan, stream);
    } else {
        launch_gemm<kProduct, __nv_bfloat16>(x, plan, stream);
    }
}

inline void check_ista(const char* name, int64_t rows, int d, Dtype dtype, Dtype x_dtype) {
    std::string what(name);
    if (rows < 1 || rows > INT32_MAX - kBlockM || d < 8 || d % 8 != 0) {
        throw std::invalid_argument(
            what + ": expected 1 <= rows < 2^31 - 128 and d a positive multiple of 8, got " +
            std::to_string(rows) + " rows of " + std::to_string(d));
    }
    if (dtype == Dtype::kFloat32 || (x_dtype != dtype && x_dtype != Dtype::kFloat32)) {
        throw std::invalid_argument(what +
                                    ": expected dtype float16 or bfloat16, and x_dtype the same "
                                    "or float32");
    }
}

inline void check_moments(const char* name, int d) {
    if (d % 64 != 0) {
        throw std::invalid_argument(
            std::string(name) + ": expected d a multiple of 64 for the moments of its rows, got " +
            std::to_string(d));
    }
}

}  // namespace crate_kernels
