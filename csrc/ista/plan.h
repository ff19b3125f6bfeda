// How a GEMM is cut up: the tile, what the two blocks of a cluster share, the parts of the sum.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>
#include <utility>

#include "../common/math.cuh"

namespace crate_kernels {

struct GemmPlan {
    int block_n;                       // 128 or 192
    int m_per_cluster, n_per_cluster;  // tiles of a cluster's two blocks: 2, 1 or 1, 2 or 1, 1
    int parts;                         // of the sum over k; none is empty
};

// The plan for tiles [128, block_n] of an m x n output that takes least time, by what was measured
// on an H200 (docs/ista.md): a step over 64 of k takes as long as block_n + step_cost columns of
// it, about 3 ns each; a partial sum in float32 is written and read at 4 TB/s. What a cluster
// shares matters little, but spares the L2 cache. width: of the tile, or 0.
inline GemmPlan choose_plan(int64_t m, int64_t n, int64_t k, int max_parts, int step_cost,
                            int multiprocessors, int width = 0) {
    GemmPlan best{};
    double least = std::numeric_limits<double>::infinity();
    int64_t steps = ceil_div(k, 64);
    for (int block_n : {192, 128}) {
        if (width > 0 && block_n != width) continue;
        for (auto [per_m, per_n] : {std::pair{2, 1}, {1, 2}, {1, 1}}) {
            for (int parts = 1; parts <= std::min<int64_t>(max_parts, steps); ++parts) {
                int64_t steps_of_part = ceil_div(steps, parts);
                if (ceil_div(steps, steps_of_part) != parts) continue;
                int64_t units = ceil_div(ceil_div(m, 128), per_m) *
                                ceil_div(ceil_div(n, block_n), per_n) * parts;
                int64_t waves = ceil_div(units, multiprocessors / (per_m * per_n));
                double loaded = 128.0 / per_n + double(block_n) / per_m;
                double time = waves * steps_of_part * (block_n + step_cost + 1e-3 * loaded);
                if (parts > 1) time += 8.0 * m * n * parts / 12000;
                if (time < least) {
                    least = time;
                    best = {block_n, per_m, per_n, parts};
                }
            }
        }
    }
    return best;
}

}  // namespace crate_kernels
