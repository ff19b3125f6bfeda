// Tied attention, and dO with the sums of its rows.
#include "host.h"

namespace crate_kernels {
namespace {

struct AttentionCase {
    Dtype dtype;
    int head_dim, n;
    bool causal;
    // Each seventh token is so many times the one behind it: then rows have to be done again.
    double outliers = 0;
    int batch = 2, heads = 2;

    int width() const { return heads * head_dim; }
    double scale() const { return 1 / std::sqrt(head_dim); }
    size_t elements() const { return size_t(batch) * n * width(); }
    std::string name() const {
        return std::string("attention ") + name_of(dtype) + " head_dim " +
               std::to_string(head_dim) + " n " + std::to_string(n) + (causal ? " causal" : "") +
               (outliers > 0 ? " with outliers" : "");
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
    for (int i = 0; c.outliers > 0 && i + 1 < c.batch * c.n; i += 7) {
        for (int k = 0; k < c.width(); ++k) {
            size_t at = size_t(i) * c.width() + k;
            w[at] = rounding_to(c.dtype)(c.outliers * w[at + c.width()]);
        }
    }
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
    if (c.outliers > 0) return passed;  // dw: docs/mssa.md, "Precision"
    passed &= close_enough(c.name() + ", dw", from_bits(first_grad_w, c.dtype), plain.grad_w,
                           want.grad_w, 3, unit);
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
    DeviceArray<float> delta(size_t(heads) * rows), sums_out(output_gradient_sums(rows) * d);
    Bytes grad_o_of[2];
    std::vector<float> delta_of[2], sums_of[2];
    for (int run = 0; run < 2; ++run) {
        grad_o.poison(), delta.poison(), sums_out.poison();
        output_gradient({.dy = dy_in.data(),
                         .w_out = w_out_in.data(),
                         .o = o_in.data(),
                         .grad_o = grad_o.data(),
                         .delta = delta.data(),
                         .sums = sums_out.data(),
                         .rows = rows,
                         .d = d,
                         .heads = heads,
                         .dtype = dtype},
                        nullptr);
        check(cudaDeviceSynchronize());
        grad_o_of[run] = grad_o.on_host(), delta_of[run] = delta.on_host();
        sums_of[run] = sums_out.on_host();
    }
    bool passed =
        grad_o_of[0] == grad_o_of[1] && delta_of[0] == delta_of[1] && sums_of[0] == sums_of[1];
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
    Values total(d), want_total(d);
    std::vector<float> plain_total(d);
    for (int i = 0; i < rows; ++i) {
        for (int j = 0; j < d; ++j) {
            want_total[j] += dy[size_t(i) * d + j];
            plain_total[j] += float(dy[size_t(i) * d + j]);
        }
    }
    for (size_t i = 0; i < sums_of[0].size(); ++i) total[i % d] += sums_of[0][i];
    passed &= close_enough(name + ", sums of dy", total,
                           Values(plain_total.begin(), plain_total.end()), want_total, 2, 0x1p-22);
    return passed;
}

}  // namespace

bool test_attention_everywhere() {
    bool passed = true;
    for (Dtype dtype : {Dtype::kFloat16, Dtype::kBFloat16}) {
        for (int head_dim : kHeadDims) {
            for (int n : {1, 17, 65, 197, 300}) {
                for (bool causal : {false, true}) {
                    passed &= test_attention({dtype, head_dim, n, causal});
                    if (n > 1) passed &= test_attention({dtype, head_dim, n, causal, 24});
                }
            }
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

}  // namespace crate_kernels
