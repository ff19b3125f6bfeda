// ISTA, forward and backward.
#include "host.h"

namespace crate_kernels {
namespace {

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

}  // namespace

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

}  // namespace crate_kernels
