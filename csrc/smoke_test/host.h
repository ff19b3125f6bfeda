// What the tests share: dtypes, device memory, the criterion, and the formulas of several ops on
// the host.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime_api.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <functional>
#include <limits>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#include "../crate_kernels.h"

namespace crate_kernels {

using Values = std::vector<double>;
using Round = std::function<double(double)>;

inline void check(cudaError_t error) {
    if (error != cudaSuccess) throw std::runtime_error(cudaGetErrorString(error));
}

// ---- dtypes

inline uint16_t bits_of(double value, Dtype dtype) {
    float narrow = static_cast<float>(value);
    return dtype == Dtype::kFloat16 ? __half_as_ushort(__float2half_rn(narrow))
                                    : __bfloat16_as_ushort(__float2bfloat16_rn(narrow));
}

inline double value_of(uint16_t bits, Dtype dtype) {
    return dtype == Dtype::kFloat16 ? __half2float(__ushort_as_half(bits))
                                    : __bfloat162float(__ushort_as_bfloat16(bits));
}

inline Round rounding_to(Dtype dtype) {
    return [dtype](double value) { return value_of(bits_of(value, dtype), dtype); };
}

inline double exact(double value) { return value; }

inline double unit_of(Dtype dtype) { return dtype == Dtype::kFloat16 ? 0x1p-10 : 0x1p-7; }

inline const char* name_of(Dtype dtype) {
    return dtype == Dtype::kFloat16 ? "float16" : "bfloat16";
}

// ---- device memory, NaN until it is written

template <typename T>
class DeviceArray {
  public:
    explicit DeviceArray(size_t size) : size_(size) {
        void* memory = nullptr;
        check(cudaMalloc(&memory, size * sizeof(T)));
        data_ = static_cast<T*>(memory);
        poison();
    }
    explicit DeviceArray(const std::vector<T>& values) : DeviceArray(values.size()) {
        check(cudaMemcpy(data_, values.data(), size_ * sizeof(T), cudaMemcpyHostToDevice));
    }
    ~DeviceArray() { cudaFree(data_); }
    DeviceArray(const DeviceArray&) = delete;
    DeviceArray& operator=(const DeviceArray&) = delete;

    void poison() { check(cudaMemset(data_, 0xff, size_ * sizeof(T))); }
    T* data() const { return data_; }
    size_t size() const { return size_; }
    std::vector<T> on_host() const {
        std::vector<T> values(size_);
        check(cudaMemcpy(values.data(), data_, size_ * sizeof(T), cudaMemcpyDeviceToHost));
        return values;
    }

  private:
    T* data_ = nullptr;
    size_t size_;
};

// ---- values on the host

inline Values random_values(size_t size, Dtype dtype, std::mt19937& generator) {
    std::normal_distribution<double> normal(0.0, 0.6);
    Round round = rounding_to(dtype);
    Values values(size);
    for (double& value : values) value = round(normal(generator));
    return values;
}

// Rows of `width` values, `stride` apart; what lies between them is NaN.
inline std::vector<uint16_t> in_rows(const Values& values, int width, int stride, Dtype dtype) {
    size_t rows = values.size() / width;
    std::vector<uint16_t> spread(rows * stride, 0xffff);
    for (size_t i = 0; i < values.size(); ++i) {
        spread[i / width * stride + i % width] = bits_of(values[i], dtype);
    }
    return spread;
}

inline Values from_bits(const std::vector<uint16_t>& bits, Dtype dtype) {
    Values values(bits.size());
    std::transform(bits.begin(), bits.end(), values.begin(),
                   [dtype](uint16_t b) { return value_of(b, dtype); });
    return values;
}

inline double largest_error(const Values& got, const Values& want) {
    double largest = 0;
    for (size_t i = 0; i < want.size(); ++i) {
        double error = std::abs(got[i] - want[i]);
        if (!(error <= largest)) largest = error;  // NaN stays
        if (std::isnan(error)) return error;
    }
    return largest;
}

// Prints and returns whether `got` is as close to `want` as `factor` times plain's error allows.
inline bool close_enough(const std::string& what, const Values& got, const Values& plain,
                         const Values& want, double factor, double unit) {
    double magnitude = largest_error(want, Values(want.size()));
    double error = largest_error(got, want), of_plain = largest_error(plain, want);
    bool passed = error <= factor * std::max(of_plain, unit * magnitude);
    std::printf("%s %s: error %.3g, plain %.3g\n", passed ? "ok    " : "FAILED", what.c_str(),
                error, of_plain);
    return passed;
}

using Bytes = std::vector<unsigned char>;

inline Bytes to_bytes(const Values& values, Dtype dtype) {
    size_t size = dtype == Dtype::kFloat32 ? 4 : 2;
    Bytes bytes(values.size() * size);
    for (size_t i = 0; i < values.size(); ++i) {
        float wide = static_cast<float>(values[i]);
        uint16_t narrow = dtype == Dtype::kFloat32 ? 0 : bits_of(values[i], dtype);
        std::memcpy(&bytes[i * size], size == 4 ? (void*)&wide : (void*)&narrow, size);
    }
    return bytes;
}

inline Values from_bytes(const Bytes& bytes, Dtype dtype) {
    size_t size = dtype == Dtype::kFloat32 ? 4 : 2;
    Values values(bytes.size() / size);
    for (size_t i = 0; i < values.size(); ++i) {
        float wide;
        uint16_t narrow;
        std::memcpy(size == 4 ? (void*)&wide : (void*)&narrow, &bytes[i * size], size);
        values[i] = size == 4 ? wide : value_of(narrow, dtype);
    }
    return values;
}

// ---- formulas on the host

// (m, n) = c + round(a b), a (m, k) and b (k, n) read by those functions of row and column.
template <typename A, typename B>
inline Values add_product(Values c, int m, int n, int k, const A& a, const B& b,
                          const Round& round) {
    for (int i = 0; i < m; ++i) {
        Values sum(n);
        for (int j = 0; j < k; ++j) {
            double left = a(i, j);
            for (int l = 0; l < n; ++l) sum[l] += left * b(j, l);
        }
        for (int l = 0; l < n; ++l) c[size_t(i) * n + l] += round(sum[l]);
    }
    return c;
}

// Of each span of a row: the sum of its elements, and of their squares.
inline Values moments_of(const Values& t, int d) {
    size_t rows = t.size() / d, spans = (d + moments_span(d) - 1) / moments_span(d);
    Values found(spans * rows * 2);
    for (size_t i = 0; i < t.size(); ++i) {
        double* moments = &found[(i % d / moments_span(d) * rows + i / d) * 2];
        moments[0] += t[i], moments[1] += t[i] * t[i];
    }
    return found;
}

inline size_t size_of_moments(int rows, int d) { return moments_of(Values(d), d).size() * rows; }

// Mean and 1 / standard deviation of each row, as LN has them.
inline std::vector<float> statistics_of(const Values& x, int d) {
    std::vector<float> stats(x.size() / d * 2);
    for (size_t i = 0; i < stats.size() / 2; ++i) {
        double mean = 0, square = 1e-5;
        for (int k = 0; k < d; ++k) mean += x[i * d + k] / d;
        for (int k = 0; k < d; ++k) square += std::pow(x[i * d + k] - mean, 2) / d;
        stats[2 * i] = mean, stats[2 * i + 1] = 1 / std::sqrt(square);
    }
    return stats;
}

// ---- the tests, one for each op

bool test_attention_everywhere();
bool test_output_gradient_everywhere();
bool test_ista_everywhere();
bool test_normed_ista_everywhere();
bool test_normed_projection_everywhere();
bool test_residual_projection_everywhere();
bool test_encoder_of_few_everywhere();
bool test_normalise_backward_everywhere();
bool test_overcomplete_ista_everywhere();

}  // namespace crate_kernels
