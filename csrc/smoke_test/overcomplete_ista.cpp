// The steps of overcomplete ISTA, forward and backward, each from what the one before has made.
#include "host.h"

namespace crate_kernels {
namespace {

constexpr float kStepSize = 0.3f, kThreshold = 0.1f;

struct OvercompleteCase {
    Dtype dtype;
    int rows, d, m;

    std::string name() const {
        return std::string("overcomplete ista ") + name_of(dtype) + " " + std::to_string(rows) +
               " x " + std::to_string(d) + " x " + std::to_string(m);
    }
};

bool test_overcomplete_ista(const OvercompleteCase& c) {
    std::mt19937 generator(c.rows);
    const int rows = c.rows, d = c.d, m = c.m;
    const size_t narrow = size_t(rows) * d, wide = size_t(rows) * m;
    Round round = rounding_to(c.dtype);
    Values x = random_values(narrow, c.dtype, generator);
    Values dout = random_values(narrow, c.dtype, generator);
    Values dr = random_values(narrow, c.dtype, generator);
    Values dictionary = random_values(size_t(d) * m, c.dtype, generator);
    for (double& value : dictionary) value = round(value * 0.3);
    DeviceArray x_in(to_bytes(x, c.dtype)), dout_in(to_bytes(dout, c.dtype)),
        dr_in(to_bytes(dr, c.dtype)), dictionary_in(to_bytes(dictionary, c.dtype));
    DeviceArray<unsigned char> z1(2 * wide), z1_alone(2 * wide), r(2 * narrow), z2(2 * wide),
        e2(2 * wide), e1(2 * wide), dx(2 * narrow);
    DeviceArray<unsigned char> mask1(ista_mask_bytes(rows, m)), mask2(ista_mask_bytes(rows, m));

    auto code = [&](const auto& a, const void* added, auto& z, void* mask) {
        overcomplete_code({.a = a.data(),
                           .dictionary = dictionary_in.data(),
                           .c = added,
                           .z = z.data(),
                           .mask = mask,
                           .rows = rows,
                           .d = d,
                           .m = m,
                           .step_size = kStepSize,
                           .threshold = kThreshold,
                           .dtype = c.dtype},
                          nullptr);
    };
    auto code_gradient = [&](const auto& a, const void* added, const auto& mask, auto& e,
                             float alpha) {
        overcomplete_code_gradient({.a = a.data(),
                                    .dictionary = dictionary_in.data(),
                                    .c = added,
                                    .mask = mask.data(),
                                    .e = e.data(),
                                    .rows = rows,
                                    .d = d,
                                    .m = m,
                                    .alpha = alpha,
                                    .dtype = c.dtype},
                                   nullptr);
    };
    auto decoded_sum = [&](const auto& z, const auto& added, auto& out, float alpha) {
        overcomplete_decoded_sum({.z = z.data(),
                                  .dictionary = dictionary_in.data(),
                                  .c = added.data(),
                                  .out = out.data(),
                                  .rows = rows,
                                  .d = d,
                                  .m = m,
                                  .alpha = alpha,
                                  .dtype = c.dtype},
                                 nullptr);
    };
    std::array<Bytes, 7> results[2];
    for (auto& result : results) {
        z1.poison(), z1_alone.poison(), r.poison(), z2.poison(), mask1.poison(), mask2.poison();
        e2.poison(), e1.poison(), dx.poison();
        code(x_in, nullptr, z1, mask1.data());
        code(x_in, nullptr, z1_alone, nullptr);
        decoded_sum(z1, x_in, r, -1);
        code(r, z1.data(), z2, mask2.data());
        code_gradient(dout_in, nullptr, mask2, e2, kStepSize);
        code_gradient(dr_in, e2.data(), mask1, e1, -kStepSize);
        decoded_sum(e1, dr_in, dx, 1);
        check(cudaDeviceSynchronize());
        result = {z1.on_host(), z1_alone.on_host(), r.on_host(), z2.on_host(),
                  e2.on_host(), e1.on_host(),       dx.on_host()};
    }
    bool passed = results[0] == results[1] && results[0][0] == results[0][1];
    if (!passed) std::printf("FAILED %s: two runs differ\n", c.name().c_str());

    // What each step makes of what it was given, up to its threshold or mask.
    auto values_of = [&](int result) { return from_bytes(results[0][result], c.dtype); };
    const Values z1_got = values_of(0), r_got = values_of(2), z2_got = values_of(3),
                 e2_got = values_of(4), e1_got = values_of(5), dx_got = values_of(6);
    auto encoded = [&](const Values& added, const Values& a, double alpha, const Round& to) {
        return add_product(
            added, rows, m, d, [&](int i, int k) { return alpha * a[size_t(i) * d + k]; },
            [&](int k, int j) { return dictionary[size_t(k) * m + j]; }, to);
    };
    auto decoded = [&](const Values& added, const Values& z, double alpha, const Round& to) {
        Values sum = add_product(
            added, rows, d, m, [&](int i, int k) { return alpha * z[size_t(i) * m + k]; },
            [&](int k, int j) { return dictionary[size_t(j) * m + k]; }, to);
        for (double& value : sum) value = to(value);
        return sum;
    };
    auto clipped = [&](Values sum, const Round& to) {
        for (double& value : sum) value = std::max(to(value - kThreshold), 0.0);
        return sum;
    };
    auto masked = [&](Values sum, const Values& z, const Round& to) {
        for (size_t i = 0; i < sum.size(); ++i) sum[i] = z[i] == 0 ? 0 : to(sum[i]);
        return sum;
    };
    auto same = [&](const char* what, const Values& got, double factor, auto&& formula) {
        passed &= close_enough(c.name() + ", " + what, got, formula(round), formula(Round(exact)),
                               factor, unit_of(c.dtype));
    };
    const Values nothing(wide);
    same("z1", z1_got, 2,
         [&](const Round& to) { return clipped(encoded(nothing, x, kStepSize, to), to); });
    same("r", r_got, 2, [&](const Round& to) { return decoded(x, z1_got, -1, to); });
    same("z2", z2_got, 2,
         [&](const Round& to) { return clipped(encoded(z1_got, r_got, kStepSize, to), to); });
    same("e2", e2_got, 3, [&](const Round& to) {
        return masked(encoded(nothing, dout, kStepSize, to), z2_got, to);
    });
    same("e1", e1_got, 3,
         [&](const Round& to) { return masked(encoded(e2_got, dr, -kStepSize, to), z1_got, to); });
    same("dx", dx_got, 3, [&](const Round& to) { return decoded(dr, e1_got, 1, to); });
    return passed;
}

}  // namespace

bool test_overcomplete_ista_everywhere() {
    bool passed = true;
    for (Dtype dtype : {Dtype::kFloat16, Dtype::kBFloat16}) {
        // Several tiles for each block; less than a tile, less than a chunk; dictionaries wide and
        // not; both widths of tile (the wider at 8500 rows); pairs of tiles of which one is absent.
        for (auto [rows, d, m] : {std::array{40000, 64, 72},
                                  {333, 104, 144},
                                  {129, 200, 80},
                                  {1, 8, 256},
                                  {300, 192, 576},
                                  {700, 64, 968},
                                  {8500, 192, 136}}) {
            passed &= test_overcomplete_ista({dtype, rows, d, m});
        }
    }
    return passed;
}

}  // namespace crate_kernels
