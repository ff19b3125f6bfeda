// Every kernel against host loops in double precision, without torch or Python:
//   ctest --test-dir build/cpython-312, or under compute-sanitizer (make gpu-sanitize).
//
// The criterion is that of the Python tests: the host also computes with every tensor rounded as
// plain PyTorch rounds it, and our largest error may be at most twice that one's (gradients: three
// times), or one unit in the last place. Each launch runs twice and has to repeat every bit; fresh
// memory is NaN.
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

#include "crate_kernels.h"

using namespace crate_kernels;

namespace {

constexpr int kNoDevice = 77;  // what ctest takes for "skipped", see CMakeLists.txt

using Values = std::vector<double>;
using Round = std::function<double(double)>;

void check(cudaError_t error) {
    if (error != cudaSuccess) throw std::runtime_error(cudaGetErrorString(error));
}

// ---- dtypes

uint16_t bits_of(double value, Dtype dtype) {
    float narrow = static_cast<float>(value);
    return dtype == Dtype::kFloat16 ? __half_as_ushort(__float2half_rn(narrow))
                                    : __bfloat16_as_ushort(__float2bfloat16_rn(narrow));
}

double value_of(uint16_t bits, Dtype dtype) {
    return dtype == Dtype::kFloat16 ? __half2float(__ushort_as_half(bits))
                                    : __bfloat162float(__ushort_as_bfloat16(bits));
}

Round rounding_to(Dtype dtype) {
    return [dtype](double value) { return value_of(bits_of(value, dtype), dtype); };
}

double exact(double value) { return value; }

double unit_of(Dtype dtype) { return dtype == Dtype::kFloat16 ? 0x1p-10 : 0x1p-7; }

const char* name_of(Dtype dtype) { return dtype == Dtype::kFloat16 ? "float16" : "bfloat16"; }

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

Values random_values(size_t size, Dtype dtype, std::mt19937& generator) {
    std::normal_distribution<double> normal(0.0, 0.6);
    Round round = rounding_to(dtype);
    Values values(size);
    for (double& value : values) value = round(normal(generator));
    return values;
}

// Rows of `width` values, `stride` apart; what lies between them is NaN.
std::vector<uint16_t> in_rows(const Values& values, int width, int stride, Dtype dtype) {
    size_t rows = values.size() / width;
    std::vector<uint16_t> spread(rows * stride, 0xffff);
    for (size_t i = 0; i < values.size(); ++i) {
        spread[i / width * stride + i % width] = bits_of(values[i], dtype);
    }
    return spread;
}

Values from_bits(const std::vector<uint16_t>& bits, Dtype dtype) {
    Values values(bits.size());
    std::transform(bits.begin(), bits.end(), values.begin(),
                   [dtype](uint16_t b) { return value_of(b, dtype); });
    return values;
}

double largest_error(const Values& got, const Values& want) {
    double largest = 0;
    for (size_t i = 0; i < want.size(); ++i) {
        double error = std::abs(got[i] - want[i]);
        if (!(error <= largest)) largest = error;  // NaN stays
        if (std::isnan(error)) return error;
    }
    return largest;
}

// Prints and returns whether `got` is as close to `want` as `factor` times plain's error allows.
bool close_enough(const std::string& what, const Values& got, const Values& plain,
                  const Values& want, double factor, double unit) {
    double magnitude = largest_error(want, Values(want.size()));
    double error = largest_error(got, want), of_plain = largest_error(plain, want);
    bool passed = error <= factor * std::max(of_plain, unit * magnitude);
    std::printf("%s %s: error %.3g, plain %.3g\n", passed ? "ok    " : "FAILED", what.c_str(),
                error, of_plain);
    return passed;
}

// ---- MSSA

struct AttentionCase {
    Dtype dtype;
    int head_dim, n;
    bool causal;
    int batch = 2, heads = 2;

    int width() const { return heads * head_dim; }
    double scale() const { return 1 / std::sqrt(head_dim); }
    size_t elements() const { return size_t(batch) * n * width(); }
    std::string name() const {
        return std::string("attention ") + name_of(dtype) + " head_dim " +
               std::to_string(head_dim) + " n " + std::to_string(n) + (causal ? " causal" : "");
    }
};

struct AttentionResults {
    Values o, lse, grad_w;
};

double dot(const double* a, const double* b, int size) {
    double sum = 0;
    for (int i = 0; i < size; ++i) sum += a[i] * b[i];
    return sum;
}

// The formulas of crate_kernels.h, head by head; `round` is applied to every tensor.
AttentionResults attention_on_host(const AttentionCase& c, const Values& w, const Values& grad_o,
                                   const Round& round) {
    const int n = c.n, d = c.head_dim, width = c.width();
    AttentionResults r{Values(c.elements()), Values(size_t(c.batch) * c.heads * n),
                       Values(c.elements())};
    Values p(size_t(n) * n), ds(size_t(n) * n);
    for (int head = 0; head < c.batch * c.heads; ++head) {
        size_t base = size_t(head / c.heads) * n * width + head % c.heads * d;
        auto row = [&](const Values& t, int i) { return t.data() + base + size_t(i) * width; };
        auto seen = [&](int i) { return c.causal ? i + 1 : n; };
        for (int i = 0; i < n; ++i) {
            double* p_i = p.data() + size_t(i) * n;
            double* ds_i = ds.data() + size_t(i) * n;
            std::fill_n(p_i, n, 0.0);
            std::fill_n(ds_i, n, 0.0);
            double top = -std::numeric_limits<double>::infinity(), total = 0;
            for (int j = 0; j < seen(i); ++j) {
                p_i[j] = round(round(dot(row(w, i), row(w, j), d)) * c.scale());
                top = std::max(top, p_i[j]);
            }
            for (int j = 0; j < seen(i); ++j) total += std::exp(p_i[j] - top);
            r.lse[size_t(head) * n + i] = top + std::log(total);
            double delta = 0;
            for (int j = 0; j < seen(i); ++j) {
                p_i[j] = round(std::exp(p_i[j] - top) / total);
                ds_i[j] = round(dot(row(grad_o, i), row(w, j), d));  // dP
                delta += p_i[j] * ds_i[j];
            }
            for (int j = 0; j < seen(i); ++j) {
                ds_i[j] = round(round(p_i[j] * (ds_i[j] - delta)) * c.scale());
            }
        }
        for (int j = 0; j < n; ++j) {
            Values o(d), as_value(d), as_key(d), as_query(d);
            for (int i = 0; i < n; ++i) {
                double p_ij = p[size_t(i) * n + j], ds_ij = ds[size_t(i) * n + j];
                double p_ji = p[size_t(j) * n + i], ds_ji = ds[size_t(j) * n + i];
                for (int k = 0; k < d; ++k) {
                    o[k] += p_ji * row(w, i)[k];
                    as_value[k] += p_ij * row(grad_o, i)[k];
                    as_key[k] += ds_ij * row(w, i)[k];
                    as_query[k] += ds_ji * row(w, i)[k];
                }
            }
            for (int k = 0; k < d; ++k) {
                size_t at = base + size_t(j) * width + k;
                r.o[at] = round(o[k]);
                r.grad_w[at] =
                    round(round(round(as_value[k]) + round(as_key[k])) + round(as_query[k]));
            }
        }
    }
    return r;
}

bool test_attention(const AttentionCase& c) {
    std::mt19937 generator(c.n);
    Values w = random_values(c.elements(), c.dtype, generator);
    Values grad_o = random_values(c.elements(), c.dtype, generator);
    int w_stride = c.width() + 8, grad_o_stride = c.width() + 16;  // rows apart
    DeviceArray w_rows(in_rows(w, c.width(), w_stride, c.dtype));
    DeviceArray grad_o_rows(in_rows(grad_o, c.width(), grad_o_stride, c.dtype));
    DeviceArray<uint16_t> o(c.elements()), grad_w(c.elements());
    DeviceArray<float> lse(size_t(c.batch) * c.heads * c.n);
    DeviceArray<char> scratch(attention_backward_scratch(c.batch, c.n, c.heads));

    std::vector<uint16_t> first_o, first_grad_w;
    bool repeatable = true;
    for (int run = 0; run < 2; ++run) {
        o.poison(), lse.poison(), scratch.poison(), grad_w.poison();
        attention_forward({.w = w_rows.data(),
                           .w_stride_batch = int64_t(c.n) * w_stride,
                           .w_stride_row = w_stride,
                           .o = o.data(),
                           .lse = lse.data(),
                           .batch = c.batch,
                           .n = c.n,
                           .heads = c.heads,
                           .head_dim = c.head_dim,
                           .scale = float(c.scale()),
                           .causal = c.causal,
                           .dtype = c.dtype},
                          nullptr);
        attention_backward({.grad_o = grad_o_rows.data(),
                            .grad_o_stride_batch = int64_t(c.n) * grad_o_stride,
                            .grad_o_stride_row = grad_o_stride,
                            .w = w_rows.data(),
                            .w_stride_batch = int64_t(c.n) * w_stride,
                            .w_stride_row = w_stride,
                            .o = o.data(),
                            .lse = lse.data(),
                            .delta = nullptr,
                            .scratch = scratch.data(),
                            .grad_w = grad_w.data(),
                            .batch = c.batch,
                            .n = c.n,
                            .heads = c.heads,
                            .head_dim = c.head_dim,
                            .scale = float(c.scale()),
                            .causal = c.causal,
                            .dtype = c.dtype},
                           nullptr);
        check(cudaDeviceSynchronize());
        if (run == 0) {
            first_o = o.on_host(), first_grad_w = grad_w.on_host();
        } else {
            repeatable = first_o == o.on_host() && first_grad_w == grad_w.on_host();
        }
    }
    if (!repeatable) std::printf("FAILED %s: two runs differ\n", c.name().c_str());

    AttentionResults want = attention_on_host(c, w, grad_o, exact);
    AttentionResults plain = attention_on_host(c, w, grad_o, rounding_to(c.dtype));
    std::vector<float> got_lse = lse.on_host();
    Values lse_values(got_lse.begin(), got_lse.end());
    double unit = unit_of(c.dtype);
    bool passed = repeatable;
    passed &= close_enough(c.name() + ", o", from_bits(first_o, c.dtype), plain.o, want.o, 2, unit);
    passed &= close_enough(c.name() + ", lse", lse_values, plain.lse, want.lse, 2, 0x1p-21);
    passed &= close_enough(c.name() + ", dw", from_bits(first_grad_w, c.dtype), plain.grad_w,
                           want.grad_w, 3, unit);
    return passed;
}

bool test_attention_everywhere() {
    bool passed = true;
    for (Dtype dtype : {Dtype::kFloat16, Dtype::kBFloat16}) {
        for (int head_dim : kHeadDims) {
            for (int n : {1, 17, 65, 197, 300}) {
                for (bool causal : {false, true}) {
                    passed &= test_attention({dtype, head_dim, n, causal});
                }
            }
        }
    }
    return passed;
}

// ---- ISTA

struct IstaCase {
    Dtype dtype, x_dtype;
    int rows, d;
    double threshold = 0.3;

    size_t elements() const { return size_t(rows) * d; }
    std::string name() const {
        return std::string("ista ") + name_of(dtype) +
               (x_dtype == Dtype::kFloat32 ? " of float32 " : " ") + std::to_string(rows) + " x " +
               std::to_string(d);
    }
};

using Bytes = std::vector<unsigned char>;

Bytes to_bytes(const Values& values, Dtype dtype) {
    size_t size = dtype == Dtype::kFloat32 ? 4 : 2;
    Bytes bytes(values.size() * size);
    for (size_t i = 0; i < values.size(); ++i) {
        float wide = static_cast<float>(values[i]);
        uint16_t narrow = dtype == Dtype::kFloat32 ? 0 : bits_of(values[i], dtype);
        std::memcpy(&bytes[i * size], size == 4 ? (void*)&wide : (void*)&narrow, size);
    }
    return bytes;
}

Values from_bytes(const Bytes& bytes, Dtype dtype) {
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

// (m, n) = c + round(a b), a (m, k) and b (k, n) read by those functions of row and column.
template <typename A, typename B>
Values add_product(Values c, int m, int n, int k, const A& a, const B& b, const Round& round) {
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
Values moments_of(const Values& t, int d) {
    size_t rows = t.size() / d, spans = (d + moments_span(d) - 1) / moments_span(d);
    Values found(spans * rows * 2);
    for (size_t i = 0; i < t.size(); ++i) {
        double* moments = &found[(i % d / moments_span(d) * rows + i / d) * 2];
        moments[0] += t[i], moments[1] += t[i] * t[i];
    }
    return found;
}

size_t size_of_moments(int rows, int d) { return moments_of(Values(d), d).size() * rows; }

bool test_ista(const IstaCase& c) {
    std::mt19937 generator(c.rows);
    const int rows = c.rows, d = c.d;
    Round to_dtype = rounding_to(c.dtype);
    Round to_x =
        c.x_dtype == Dtype::kFloat32 ? [](double v) { return double(float(v)); } : to_dtype;
    Values x = random_values(c.elements(), c.dtype, generator);
    Values gram = random_values(size_t(d) * d, c.dtype, generator);
    Values dy = random_values(c.elements(), c.dtype, generator);
    for (double& value : gram) value = to_dtype(value * 0.1);
    DeviceArray x_in(to_bytes(x, c.x_dtype)), dy_in(to_bytes(dy, c.x_dtype));
    DeviceArray xc_in(to_bytes(x, c.dtype)), gram_in(to_bytes(gram, c.dtype));
    const void* x_data = c.x_dtype == c.dtype ? xc_in.data() : x_in.data();
    DeviceArray<unsigned char> y(x_in.size()), dx(x_in.size()), g(xc_in.size()),
        g_alone(xc_in.size());
    DeviceArray<unsigned char> mask(ista_mask_bytes(rows, d));
    DeviceArray<float> partials(size_t(ista_weight_parts(rows, d)) * d * d), m(size_t(d) * d);
    Dtype both_dtype = c.dtype == Dtype::kFloat16 ? Dtype::kFloat32 : c.dtype;
    DeviceArray<unsigned char> both(size_t(d) * d * (both_dtype == Dtype::kFloat32 ? 4 : 2));

    bool has_moments = d % 64 == 0 && c.x_dtype == c.dtype;
    DeviceArray<float> moments(has_moments ? size_of_moments(rows, d) : 0);

    std::array<Bytes, 6> results[2];
    for (auto& result : results) {
        y.poison(), dx.poison(), g.poison(), g_alone.poison(), mask.poison();
        partials.poison(), m.poison(), both.poison();
        if (has_moments) moments.poison();
        ista_forward({.x = x_data,
                      .xc = xc_in.data(),
                      .gram = gram_in.data(),
                      .y = y.data(),
                      .mask = mask.data(),
                      .moments = has_moments ? moments.data() : nullptr,
                      .rows = rows,
                      .d = d,
                      .threshold = float(c.threshold),
                      .dtype = c.dtype,
                      .x_dtype = c.x_dtype},
                     nullptr);
        IstaBackward backward{.dy = dy_in.data(),
                              .mask = mask.data(),
                              .gram = gram_in.data(),
                              .g = g.data(),
                              .dx = dx.data(),
                              .rows = rows,
                              .d = d,
                              .dtype = c.dtype,
                              .x_dtype = c.x_dtype};
        ista_backward(backward, nullptr);
        backward.g = g_alone.data(), backward.dx = nullptr;
        ista_backward(backward, nullptr);
        ista_weight({.x = xc_in.data(),
                     .g = g.data(),
                     .partials = partials.data(),
                     .m = m.data(),
                     .both = both.data(),
                     .rows = rows,
                     .d = d,
                     .dtype = c.dtype},
                    nullptr);
        check(cudaDeviceSynchronize());
        auto bytes_of = [](const std::vector<float>& t) {
            return to_bytes(Values(t.begin(), t.end()), Dtype::kFloat32);
        };
        result = {y.on_host(),    dx.on_host(),
                  g.on_host(),    bytes_of(m.on_host()),
                  both.on_host(), has_moments ? bytes_of(moments.on_host()) : Bytes()};
    }
    const auto& [y_out, dx_out, g_out, m_bytes, both_out, moments_bytes] = results[0];
    bool passed = results[0] == results[1];
    if (!passed) std::printf("FAILED %s: two runs differ\n", c.name().c_str());

    auto at = [d](const Values& t) {
        return [&t, d](int i, int j) { return t[size_t(i) * d + j]; };
    };
    auto across = [d](const Values& t) {
        return [&t, d](int i, int j) { return t[size_t(j) * d + i]; };
    };
    auto forward = [&](const Round& product, const Round& result) {
        Values sum = add_product(x, rows, d, d, at(x), at(gram), product);
        for (double& value : sum) value = std::max(result(value - c.threshold), 0.0);
        return sum;
    };
    // The rest starts from the y that was computed, whose zeros are within rounding.
    Values y_values = from_bytes(y_out, c.x_dtype), masked = dy;
    for (size_t i = 0; i < masked.size(); ++i) masked[i] = y_values[i] == 0 ? 0 : dy[i];
    auto backward = [&](const Round& product, const Round& result) {
        Values sum = add_product(masked, rows, d, d, at(masked), across(gram), product);
        for (double& value : sum) value = result(value);
        return sum;
    };
    Round to_float = [](double v) { return double(float(v)); };
    Values want_m = add_product(Values(size_t(d) * d), d, d, rows, across(x), at(masked), exact);
    Values want_both = want_m;
    for (int i = 0; i < d; ++i) {
        for (int j = 0; j < d; ++j) want_both[size_t(i) * d + j] += want_m[size_t(j) * d + i];
    }
    auto rounded = [](Values values, const Round& round) {
        for (double& value : values) value = round(value);
        return values;
    };
    double unit = c.x_dtype == Dtype::kFloat32 ? 0x1p-21 : unit_of(c.dtype);
    Round round_both = both_dtype == Dtype::kFloat32 ? to_float : to_dtype;
    passed &= close_enough(c.name() + ", y", y_values, forward(to_dtype, to_x),
                           forward(exact, exact), 2, unit);
    passed &= close_enough(c.name() + ", dx", from_bytes(dx_out, c.x_dtype),
                           backward(to_dtype, to_x), backward(exact, exact), 3, unit);
    passed &= close_enough(c.name() + ", m", from_bytes(m_bytes, Dtype::kFloat32),
                           rounded(want_m, to_float), want_m, 3, 0x1p-19);
    passed &= close_enough(c.name() + ", m + m^T", from_bytes(both_out, both_dtype),
                           rounded(want_both, round_both), want_both, 3, 0x1p-19);
    if (has_moments) {
        passed &= close_enough(c.name() + ", moments", from_bytes(moments_bytes, Dtype::kFloat32),
                               moments_of(forward(to_dtype, to_x), d),
                               moments_of(forward(exact, exact), d), 2, 0x1p-19);
    }
    bool same_g = from_bytes(g_out, c.dtype) == masked && g_alone.on_host() == g_out;
    if (!same_g) std::printf("FAILED %s: g\n", c.name().c_str());
    return passed && same_g;
}

bool test_normalise_backward(Dtype dtype, int rows, int d, bool adds) {
    std::mt19937 generator(rows);
    std::string name = std::string("norm's gradient ") + name_of(dtype) + " " +
                       std::to_string(rows) + " x " + std::to_string(d) + (adds ? ", added" : "");
    Round round = rounding_to(dtype);
    size_t size = size_t(rows) * d;
    Values dh = random_values(size, dtype, generator), z = random_values(size, dtype, generator),
           skip = random_values(size, dtype, generator),
           random = random_values(2 * d, Dtype::kFloat16, generator);
    for (size_t i = 0; i < size; i += 3) z[i] = 0;
    std::vector<float> gamma(random.begin(), random.begin() + d),
        beta(random.begin() + d, random.end()), stats(2 * size_t(rows));
    for (int i = 0; i < rows; ++i) {
        double mean = 0, square = 1e-5;
        for (int k = 0; k < d; ++k) mean += z[size_t(i) * d + k] / d;
        for (int k = 0; k < d; ++k) square += std::pow(z[size_t(i) * d + k] - mean, 2) / d;
        stats[2 * i] = mean, stats[2 * i + 1] = 1 / std::sqrt(square);
    }
    DeviceArray dh_in(to_bytes(dh, dtype)), z_in(to_bytes(z, dtype)),
        skip_in(to_bytes(skip, dtype));
    DeviceArray stats_in(stats), gamma_in(gamma), beta_in(beta);
    DeviceArray<unsigned char> dz(z_in.size()), h(z_in.size());
    const int parts = normalise_backward_parts(rows, d), n_sums = adds ? 2 : 3;
    DeviceArray<float> partials(size_t(parts) * n_sums * d);
    Bytes dz_of[2], h_of[2];
    std::vector<float> partials_of[2];
    for (int run = 0; run < 2; ++run) {
        dz.poison(), h.poison(), partials.poison();
        normalise_backward({.dh = dh_in.data(),
                            .z = z_in.data(),
                            .skip = adds ? skip_in.data() : nullptr,
                            .stats = stats_in.data(),
                            .gamma = gamma_in.data(),
                            .beta = beta_in.data(),
                            .dz = dz.data(),
                            .h = h.data(),
                            .partials = partials.data(),
                            .rows = rows,
                            .d = d,
                            .masks = adds,
                            .sums_dz = !adds,
                            .dtype = dtype},
                           nullptr);
        check(cudaDeviceSynchronize());
        dz_of[run] = dz.on_host(), h_of[run] = h.on_host(), partials_of[run] = partials.on_host();
    }
    bool passed = dz_of[0] == dz_of[1] && h_of[0] == h_of[1] && partials_of[0] == partials_of[1];
    if (!passed) std::printf("FAILED %s: two runs differ\n", name.c_str());
    Values want_dz(size), want_h(size), want_sums(size_t(n_sums) * d), sums(want_sums.size());
    for (int i = 0; i < rows; ++i) {
        const double mean = stats[2 * i], rstd = stats[2 * i + 1];
        double along = 0, across = 0;
        auto at = [&](int k) { return size_t(i) * d + k; };
        auto zhat = [&](int k) { return (z[at(k)] - mean) * rstd; };
        for (int k = 0; k < d; ++k) {
            along += gamma[k] * dh[at(k)] / d;
            across += gamma[k] * dh[at(k)] * zhat(k) / d;
        }
        for (int k = 0; k < d; ++k) {
            double gradient = rstd * (gamma[k] * dh[at(k)] - along - zhat(k) * across);
            if (adds) gradient = z[at(k)] == 0 ? 0 : gradient + skip[at(k)];
            want_dz[at(k)] = gradient;
            want_h[at(k)] = gamma[k] * zhat(k) + beta[k];
            want_sums[k] += dh[at(k)] * zhat(k);
            want_sums[d + k] += dh[at(k)];
            if (!adds) want_sums[2 * d + k] += gradient;
        }
    }
    for (size_t i = 0; i < partials_of[0].size(); ++i) sums[i % sums.size()] += partials_of[0][i];
    auto rounded = [&](Values values) {
        for (double& value : values) value = round(value);
        return values;
    };
    passed &= close_enough(name + ", dz", from_bytes(dz_of[0], dtype), rounded(want_dz), want_dz, 2,
                           unit_of(dtype));
    passed &= close_enough(name + ", h", from_bytes(h_of[0], dtype), rounded(want_h), want_h, 2,
                           unit_of(dtype));
    return passed & close_enough(name + ", sums", sums, want_sums, want_sums, 2, 0x1p-18);
}

bool test_normalise_backward_everywhere() {
    bool passed = true;
    for (Dtype dtype : {Dtype::kFloat16, Dtype::kBFloat16}) {
        for (auto [rows, d] :
             {std::pair{40000, 64}, {1, 8}, {333, 264}, {5000, 768}, {700, 1024}}) {
            passed &= test_normalise_backward(dtype, rows, d, false);
            passed &= test_normalise_backward(dtype, rows, d, true);
        }
    }
    return passed;
}

bool test_output_gradient(Dtype dtype, int rows, int d, int heads) {
    std::mt19937 generator(rows);
    const int inner = 64 * heads;
    std::string name = std::string("output gradient ") + name_of(dtype) + " " +
                       std::to_string(rows) + " x " + std::to_string(d) + ", " +
                       std::to_string(heads) + " heads";
    Round round = rounding_to(dtype);
    Values dy = random_values(size_t(rows) * d, dtype, generator);
    Values w_out = random_values(size_t(d) * inner, dtype, generator);
    Values o = random_values(size_t(rows) * inner, dtype, generator);
    DeviceArray dy_in(to_bytes(dy, dtype)), w_out_in(to_bytes(w_out, dtype)),
        o_in(to_bytes(o, dtype));
    DeviceArray<unsigned char> grad_o(o_in.size());
    DeviceArray<float> delta(size_t(heads) * rows);
    Bytes grad_o_of[2];
    std::vector<float> delta_of[2];
    for (int run = 0; run < 2; ++run) {
        grad_o.poison(), delta.poison();
        output_gradient({.dy = dy_in.data(),
                         .w_out = w_out_in.data(),
                         .o = o_in.data(),
                         .grad_o = grad_o.data(),
                         .delta = delta.data(),
                         .rows = rows,
                         .d = d,
                         .heads = heads,
                         .dtype = dtype},
                        nullptr);
        check(cudaDeviceSynchronize());
        grad_o_of[run] = grad_o.on_host(), delta_of[run] = delta.on_host();
    }
    bool passed = grad_o_of[0] == grad_o_of[1] && delta_of[0] == delta_of[1];
    if (!passed) std::printf("FAILED %s: two runs differ\n", name.c_str());
    auto product = [&](const Round& to) {
        return add_product(
            Values(size_t(rows) * inner), rows, inner, d,
            [&](int i, int j) { return dy[size_t(i) * d + j]; },
            [&](int i, int j) { return w_out[size_t(i) * inner + j]; }, to);
    };
    auto sums = [&](const Values& t) {
        Values sum(size_t(heads) * rows);
        for (int i = 0; i < rows; ++i) {
            for (int j = 0; j < inner; ++j) {
                size_t at = size_t(i) * inner + j;
                sum[size_t(j / 64) * rows + i] += t[at] * o[at];
            }
        }
        return sum;
    };
    Values want = product(exact), plain = product(round);
    passed &= close_enough(name + ", dO", from_bytes(grad_o_of[0], dtype), plain, want, 2,
                           unit_of(dtype));
    passed &= close_enough(name + ", delta", Values(delta_of[0].begin(), delta_of[0].end()),
                           sums(plain), sums(want), 2, 0x1p-19);
    return passed;
}

// Rows with a mean, and a weight (n, d) for what LN makes of them.
struct NormedCase {
    int rows, d, n;
    Round round;
    Values x, weight;
    std::vector<float> stats, sums, shift;

    NormedCase(Dtype dtype, int rows, int d, int n)
        : rows(rows),
          d(d),
          n(n),
          round(rounding_to(dtype)),
          stats(2 * size_t(rows)),
          sums(n),
          shift(n) {
        std::mt19937 generator(rows);
        x = random_values(size_t(rows) * d, dtype, generator);
        weight = random_values(size_t(n) * d, dtype, generator);
        for (double& value : x) value = round(value + 0.5);
        for (int i = 0; i < rows; ++i) {
            double mean = 0, square = 1e-5;
            for (int k = 0; k < d; ++k) mean += x[size_t(i) * d + k] / d;
            for (int k = 0; k < d; ++k) square += std::pow(x[size_t(i) * d + k] - mean, 2) / d;
            stats[2 * i] = mean, stats[2 * i + 1] = 1 / std::sqrt(square);
        }
        for (int j = 0; j < n; ++j) {
            double sum = 0;
            for (int k = 0; k < d; ++k) sum += weight[size_t(j) * d + k];
            sums[j] = sum, shift[j] = weight[size_t(j) * d];
        }
    }
    // scales LN(x) weight^T + shift, with LN(x) rounded by `to`
    Values product(const Round& to, const std::vector<float>& scales) const {
        Values shifts(size_t(rows) * n);
        for (size_t i = 0; i < shifts.size(); ++i) shifts[i] = shift[i % n];
        return add_product(
            shifts, rows, n, d,
            [&](int i, int k) {
                return to((x[size_t(i) * d + k] - stats[2 * i]) * stats[2 * i + 1]);
            },
            [&](int k, int j) { return scales[j] * weight[size_t(j) * d + k]; }, exact);
    }
};

bool test_normed_projection(Dtype dtype, int rows, int d, int inner) {
    NormedCase c(dtype, rows, d, inner);
    std::string name = std::string("normed projection ") + name_of(dtype) + " " +
                       std::to_string(rows) + " x " + std::to_string(d) + " x " +
                       std::to_string(inner);
    DeviceArray x_in(to_bytes(c.x, dtype)), weight_in(to_bytes(c.weight, dtype));
    DeviceArray stats_in(c.stats), sums_in(c.sums), shift_in(c.shift);
    DeviceArray<unsigned char> w(size_t(rows) * inner * 2);
    Bytes w_of[2];
    for (Bytes& result : w_of) {
        w.poison();
        normed_projection({.x = x_in.data(),
                           .stats = stats_in.data(),
                           .weight = weight_in.data(),
                           .sums = sums_in.data(),
                           .shift = shift_in.data(),
                           .w = w.data(),
                           .rows = rows,
                           .d = d,
                           .inner = inner,
                           .dtype = dtype},
                          nullptr);
        check(cudaDeviceSynchronize());
        result = w.on_host();
    }
    bool passed = w_of[0] == w_of[1];
    if (!passed) std::printf("FAILED %s: two runs differ\n", name.c_str());
    std::vector<float> ones(inner, 1.0f);
    Values plain = c.product(c.round, ones);
    for (double& value : plain) value = c.round(value);
    return passed & close_enough(name + ", w", from_bytes(w_of[0], dtype), plain,
                                 c.product(exact, ones), 2, unit_of(dtype));
}

bool test_normed_ista(Dtype dtype, int rows, int d) {
    const double threshold = 0.25;
    NormedCase c(dtype, rows, d, d);
    std::string name = std::string("normed ISTA ") + name_of(dtype) + " " + std::to_string(rows) +
                       " x " + std::to_string(d);
    std::mt19937 generator(d);
    Values dy = random_values(size_t(rows) * d, dtype, generator);
    std::vector<float> scales(d);
    for (int j = 0; j < d; ++j) scales[j] = 1 + float(j) / 256 / d;
    DeviceArray z_in(to_bytes(c.x, dtype)), weight_in(to_bytes(c.weight, dtype)),
        dy_in(to_bytes(dy, dtype));
    DeviceArray stats_in(c.stats), scales_in(scales), sums_in(c.sums), shift_in(c.shift);
    DeviceArray<unsigned char> y(z_in.size()), g(z_in.size()), mask(ista_mask_bytes(rows, d));
    DeviceArray<float> moments(size_of_moments(rows, d));
    Bytes y_of[2], g_of[2];
    std::vector<float> moments_found[2];
    for (int run = 0; run < 2; ++run) {
        y.poison(), mask.poison(), moments.poison(), g.poison();
        ista_normed_forward({.z = z_in.data(),
                             .stats = stats_in.data(),
                             .weight = weight_in.data(),
                             .scales = scales_in.data(),
                             .sums = sums_in.data(),
                             .shift = shift_in.data(),
                             .y = y.data(),
                             .mask = mask.data(),
                             .moments = moments.data(),
                             .rows = rows,
                             .d = d,
                             .threshold = float(threshold),
                             .dtype = dtype},
                            nullptr);
        ista_backward({.dy = dy_in.data(),
                       .mask = mask.data(),
                       .gram = weight_in.data(),
                       .g = g.data(),
                       .dx = nullptr,
                       .rows = rows,
                       .d = d,
                       .dtype = dtype,
                       .x_dtype = dtype},
                      nullptr);
        check(cudaDeviceSynchronize());
        y_of[run] = y.on_host(), g_of[run] = g.on_host(), moments_found[run] = moments.on_host();
    }
    bool passed = y_of[0] == y_of[1] && g_of[0] == g_of[1] && moments_found[0] == moments_found[1];
    if (!passed) std::printf("FAILED %s: two runs differ\n", name.c_str());
    Values got = from_bytes(y_of[0], dtype), masked = dy;
    for (size_t i = 0; i < masked.size(); ++i) masked[i] = got[i] == 0 ? 0 : dy[i];
    bool same_g = from_bytes(g_of[0], dtype) == masked;
    if (!same_g) std::printf("FAILED %s: mask\n", name.c_str());
    auto forward = [&](const Round& to) {
        Values sum = c.product(to, scales);
        for (double& value : sum) value = std::max(to(value - threshold), 0.0);
        return sum;
    };
    Values plain = forward(c.round), want = forward(exact);
    Values moments_got(moments_found[0].begin(), moments_found[0].end());
    passed &= close_enough(name + ", y", got, plain, want, 2, unit_of(dtype));
    passed &= close_enough(name + ", moments", moments_got, moments_of(plain, d),
                           moments_of(want, d), 2, 0x1p-19);
    return passed && same_g;
}

bool test_residual_projection(Dtype dtype, int rows, int d, int inner, bool has_bias) {
    std::mt19937 generator(rows);
    std::string name = std::string("residual projection ") + name_of(dtype) + " " +
                       std::to_string(rows) + " x " + std::to_string(d) + " x " +
                       std::to_string(inner);
    Round round = rounding_to(dtype);
    Values o = random_values(size_t(rows) * inner, dtype, generator);
    Values w_out = random_values(size_t(d) * inner, dtype, generator);
    Values x = random_values(size_t(rows) * d, dtype, generator);
    Values random = random_values(d, Dtype::kFloat16, generator);
    std::vector<float> bias(random.begin(), random.end());
    DeviceArray o_in(to_bytes(o, dtype)), w_out_in(to_bytes(w_out, dtype)),
        x_in(to_bytes(x, dtype));
    DeviceArray bias_in(bias);
    DeviceArray<unsigned char> z(x_in.size());
    DeviceArray<float> moments(size_of_moments(rows, d));
    Bytes z_of[2];
    std::vector<float> moments_found[2];
    for (int run = 0; run < 2; ++run) {
        z.poison(), moments.poison();
        residual_projection({.o = o_in.data(),
                             .w_out = w_out_in.data(),
                             .bias = has_bias ? bias_in.data() : nullptr,
                             .x = x_in.data(),
                             .z = z.data(),
                             .moments = moments.data(),
                             .rows = rows,
                             .d = d,
                             .inner = inner,
                             .dtype = dtype},
                            nullptr);
        check(cudaDeviceSynchronize());
        z_of[run] = z.on_host(), moments_found[run] = moments.on_host();
    }
    bool passed = z_of[0] == z_of[1] && moments_found[0] == moments_found[1];
    if (!passed) std::printf("FAILED %s: two runs differ\n", name.c_str());
    auto sum = [&](const Round& to) {
        Values added = x;
        for (size_t i = 0; i < added.size(); ++i) added[i] += has_bias ? bias[i % d] : 0;
        added = add_product(
            added, rows, d, inner, [&](int i, int k) { return o[size_t(i) * inner + k]; },
            [&](int k, int j) { return w_out[size_t(j) * inner + k]; }, to);
        for (double& value : added) value = to(value);
        return added;
    };
    Values plain = sum(round), want = sum(exact);
    Values moments_got(moments_found[0].begin(), moments_found[0].end());
    passed &=
        close_enough(name + ", z", from_bytes(z_of[0], dtype), plain, want, 2, unit_of(dtype));
    return passed & close_enough(name + ", moments", moments_got, moments_of(plain, d),
                                 moments_of(want, d), 2, 0x1p-19);
}

bool test_normed_projection_everywhere() {
    bool passed = true;
    for (Dtype dtype : {Dtype::kFloat16, Dtype::kBFloat16}) {
        for (auto [rows, d, inner] : {std::array{40000, 64, 64},
                                      {333, 104, 144},
                                      {129, 200, 80},
                                      {1, 8, 256},
                                      {700, 384, 384}}) {
            passed &= test_normed_projection(dtype, rows, d, inner);
        }
    }
    return passed;
}

bool test_normed_ista_everywhere() {
    bool passed = true;
    for (Dtype dtype : {Dtype::kFloat16, Dtype::kBFloat16}) {
        for (auto [rows, d] : {std::pair{40000, 64}, {333, 128}, {1, 192}, {700, 384}}) {
            passed &= test_normed_ista(dtype, rows, d);
        }
    }
    return passed;
}

bool test_residual_projection_everywhere() {
    bool passed = true;
    for (Dtype dtype : {Dtype::kFloat16, Dtype::kBFloat16}) {
        for (auto [rows, d, inner] : {std::array{40000, 64, 64},
                                      {333, 128, 144},
                                      {129, 192, 80},
                                      {1, 64, 8},
                                      {700, 384, 384}}) {
            passed &= test_residual_projection(dtype, rows, d, inner, rows != 129);
        }
    }
    return passed;
}

bool test_output_gradient_everywhere() {
    bool passed = true;
    for (Dtype dtype : {Dtype::kFloat16, Dtype::kBFloat16}) {
        for (auto [rows, d, heads] :
             {std::array{40000, 64, 1}, {333, 104, 3}, {129, 200, 2}, {1, 8, 5}, {700, 384, 6}}) {
            passed &= test_output_gradient(dtype, rows, d, heads);
        }
    }
    return passed;
}

bool test_ista_everywhere() {
    bool passed = true;
    for (Dtype dtype : {Dtype::kFloat16, Dtype::kBFloat16}) {
        for (Dtype x_dtype : {dtype, Dtype::kFloat32}) {
            // Several tiles for each block; less than a tile, less than a chunk; both widths of
            // tile.
            for (auto [rows, d] :
                 {std::pair{40000, 64}, {333, 104}, {129, 200}, {1, 8}, {700, 384}}) {
                passed &= test_ista({dtype, x_dtype, rows, d});
            }
        }
    }
    return passed;
}

}  // namespace

int main() {
    int devices = 0;
    if (cudaGetDeviceCount(&devices) != cudaSuccess || devices == 0) {
        std::puts("skipped: no CUDA device");
        return kNoDevice;
    }
    try {
        // One test per op.
        bool passed = test_attention_everywhere();
        passed &= test_normed_projection_everywhere();
        passed &= test_residual_projection_everywhere();
        passed &= test_output_gradient_everywhere();
        passed &= test_normalise_backward_everywhere();
        passed &= test_ista_everywhere();
        passed &= test_normed_ista_everywhere();
        return passed ? 0 : 1;
    } catch (const std::exception& error) {
        std::printf("FAILED: %s\n", error.what());
        return 1;
    }
}
