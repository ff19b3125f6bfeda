// What a layer is made of besides: products of normed rows, the projection with residual, the
// norm's gradient; and layers of few rows, all in one kernel.
#include <list>

#include "host.h"

namespace crate_kernels {
namespace {

// Rows with a mean, and a weight (n, d) for what LN makes of them.
struct NormedCase {
    int rows, d, n;
    Round round;
    Values x, weight;
    std::vector<float> stats, sums, shift;

    NormedCase(Dtype dtype, int rows, int d, int n)
        : rows(rows), d(d), n(n), round(rounding_to(dtype)), sums(n), shift(n) {
        std::mt19937 generator(rows);
        x = random_values(size_t(rows) * d, dtype, generator);
        weight = random_values(size_t(n) * d, dtype, generator);
        for (double& value : x) value = round(value + 0.5);
        stats = statistics_of(x, d);
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

bool test_normalise_backward(Dtype dtype, int rows, int d, bool adds, bool third_sum) {
    std::mt19937 generator(rows);
    std::string name = std::string("norm's gradient ") + name_of(dtype) + " " +
                       std::to_string(rows) + " x " + std::to_string(d) + (adds ? ", added" : "") +
                       (third_sum ? ", three sums" : "");
    Round round = rounding_to(dtype);
    size_t size = size_t(rows) * d;
    Values dh = random_values(size, dtype, generator), z = random_values(size, dtype, generator),
           skip = random_values(size, dtype, generator),
           random = random_values(2 * d, Dtype::kFloat16, generator);
    for (size_t i = 0; i < size; i += 3) z[i] = 0;
    std::vector<float> gamma(random.begin(), random.begin() + d),
        beta(random.begin() + d, random.end()), stats = statistics_of(z, d);
    DeviceArray dh_in(to_bytes(dh, dtype)), z_in(to_bytes(z, dtype)),
        skip_in(to_bytes(skip, dtype));
    DeviceArray stats_in(stats), gamma_in(gamma), beta_in(beta);
    DeviceArray<unsigned char> dz(z_in.size()), h(z_in.size());
    const int parts = normalise_backward_parts(rows, d), n_sums = third_sum ? 3 : 2;
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
                            .third_sum = third_sum,
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
            if (third_sum) want_sums[2 * d + k] += adds ? skip[at(k)] : gradient;
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

}  // namespace

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

// All layers at once against their products and attention one by one, which have their own tests.
bool test_encoder_of_few(Dtype dtype, int batch, int n, int d, int heads, int depth) {
    const int rows = batch * n;
    const float eps = 1e-5f, scale = 1 / std::sqrt(float(d) / heads);
    std::string name = std::string("encoder of few ") + name_of(dtype) + " " +
                       std::to_string(batch) + " x " + std::to_string(n) + " x " +
                       std::to_string(d) + ", " + std::to_string(heads) + " heads";
    std::mt19937 generator(n);
    DeviceArray x_in(to_bytes(random_values(size_t(rows) * d, dtype, generator), dtype));
    std::list<DeviceArray<unsigned char>> matrices;
    std::list<DeviceArray<float>> vectors;
    auto matrix = [&] {
        Values values = random_values(size_t(d) * d, dtype, generator);
        for (double& value : values) value /= std::sqrt(d);
        return matrices.emplace_back(to_bytes(values, dtype)).data();
    };
    auto vector = [&](double start) {
        Values values = random_values(d, Dtype::kFloat16, generator);
        std::vector<float> near(d);
        for (int j = 0; j < d; ++j) near[j] = start + values[j] / 4;
        return vectors.emplace_back(near).data();
    };
    std::vector<EncoderLayer> layers;
    for (int i = 0; i < depth; ++i) {
        layers.push_back({.w_qkv = matrix(),
                          .qkv_sums = vector(0),
                          .qkv_shift = vector(0),
                          .w_out = matrix(),
                          .bias = i % 2 ? nullptr : vector(0),
                          .gram = matrix(),
                          .gram_scales = vector(1),
                          .gram_sums = vector(0),
                          .gram_shift = vector(0),
                          .threshold = 0.125f * float(i)});
    }
    DeviceArray<unsigned char> w(x_in.size()), o(x_in.size()), z(x_in.size()), y(x_in.size());
    DeviceArray<float> lse(size_t(batch) * heads * n);
    DeviceArray<float> moments(size_of_moments(rows, d));
    auto statistics = [&](const DeviceArray<unsigned char>& t) {
        check(cudaDeviceSynchronize());
        return vectors.emplace_back(statistics_of(from_bytes(t.on_host(), dtype), d)).data();
    };
    for (int i = 0; i < depth; ++i) {
        const EncoderLayer& l = layers[i];
        const auto& x = i == 0 ? x_in : y;
        normed_projection({.x = x.data(),
                           .stats = statistics(x),
                           .weight = l.w_qkv,
                           .sums = l.qkv_sums,
                           .shift = l.qkv_shift,
                           .w = w.data(),
                           .rows = rows,
                           .d = d,
                           .inner = d,
                           .dtype = dtype},
                          nullptr);
        attention_forward({.w = w.data(),
                           .w_stride_batch = int64_t(n) * d,
                           .w_stride_row = d,
                           .o = o.data(),
                           .lse = lse.data(),
                           .batch = batch,
                           .n = n,
                           .heads = heads,
                           .head_dim = d / heads,
                           .scale = scale,
                           .causal = false,
                           .dtype = dtype},
                          nullptr);
        residual_projection({.o = o.data(),
                             .w_out = l.w_out,
                             .bias = l.bias,
                             .x = x.data(),
                             .z = z.data(),
                             .moments = moments.data(),
                             .rows = rows,
                             .d = d,
                             .inner = d,
                             .dtype = dtype},
                            nullptr);
        ista_normed_forward({.z = z.data(),
                             .stats = statistics(z),
                             .weight = l.gram,
                             .scales = l.gram_scales,
                             .sums = l.gram_sums,
                             .shift = l.gram_shift,
                             .y = y.data(),
                             .mask = nullptr,
                             .moments = nullptr,
                             .rows = rows,
                             .d = d,
                             .threshold = l.threshold,
                             .dtype = dtype},
                            nullptr);
        check(cudaDeviceSynchronize());
    }
    Values want = from_bytes(y.on_host(), dtype);
    Bytes first;
    for (int run = 0; run < 20; ++run) {
        y.poison(), w.poison(), o.poison(), z.poison(), lse.poison();
        DeviceArray counters(std::vector<uint32_t>(size_t(depth) * 4 * (rows / 64 + 1), 0));
        encoder_of_few({.x = x_in.data(),
                        .layers = layers.data(),
                        .y = y.data(),
                        .w = w.data(),
                        .o = o.data(),
                        .z = z.data(),
                        .lse = lse.data(),
                        .counters = counters.data(),
                        .depth = depth,
                        .batch = batch,
                        .n = n,
                        .d = d,
                        .heads = heads,
                        .scale = scale,
                        .eps = eps,
                        .dtype = dtype},
                       nullptr);
        check(cudaDeviceSynchronize());
        Bytes found = y.on_host();
        if (run > 0 && found != first) {
            std::printf("FAILED %s: two runs differ\n", name.c_str());
            return false;
        }
        first = found;
    }
    return close_enough(name, from_bytes(first, dtype), want, want, 2, unit_of(dtype));
}

bool test_encoder_of_few_everywhere() {
    bool passed = true;
    for (Dtype dtype : {Dtype::kFloat16, Dtype::kBFloat16}) {
        passed &= test_encoder_of_few(dtype, 1, 197, 768, 12, 3);
        passed &= test_encoder_of_few(dtype, 2, 197, 576, 12, 2);
        passed &= test_encoder_of_few(dtype, 3, 65, 384, 6, 3);
        passed &= test_encoder_of_few(dtype, 1, 256, 768, 12, 2);
        passed &= test_encoder_of_few(dtype, 5, 10, 576, 12, 2);
        passed &= test_encoder_of_few(dtype, 9, 130, 384, 6, 2);
    }
    return passed;
}

bool test_normalise_backward_everywhere() {
    bool passed = true;
    for (Dtype dtype : {Dtype::kFloat16, Dtype::kBFloat16}) {
        for (auto [rows, d] :
             {std::pair{40000, 64}, {1, 8}, {333, 264}, {5000, 768}, {700, 1024}}) {
            for (bool adds : {false, true}) {
                passed &= test_normalise_backward(dtype, rows, d, adds, true);
            }
            passed &= test_normalise_backward(dtype, rows, d, true, false);
        }
    }
    return passed;
}

}  // namespace crate_kernels
