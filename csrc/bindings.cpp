// The launchers of crate_kernels.h as a Python module, crate_kernels._cuda: the only file here that
// knows Python. Pointers and the stream come as integers. pybind11 turns std::invalid_argument into
// ValueError and std::runtime_error into RuntimeError.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

#include "crate_kernels.h"

namespace py = pybind11;
using namespace crate_kernels;

namespace {

using Pointer = std::uintptr_t;

template <typename T>
T* at(Pointer pointer) {
    return reinterpret_cast<T*>(pointer);
}

cudaStream_t stream_at(Pointer pointer) { return reinterpret_cast<cudaStream_t>(pointer); }

Dtype dtype_named(const std::string& name) {
    if (name == "float16") return Dtype::kFloat16;
    if (name == "bfloat16") return Dtype::kBFloat16;
    if (name == "float32") return Dtype::kFloat32;
    throw std::invalid_argument("expected dtype float16, bfloat16 or float32, got " + name);
}

// ---- MSSA

void bind_attention(py::module_& module) {
    module.def(
        "attention_forward",
        [](Pointer w, int64_t w_stride_batch, int64_t w_stride_row, Pointer o, Pointer lse,
           int batch, int n, int heads, int head_dim, float scale, bool causal,
           const std::string& dtype, Pointer stream) {
            const AttentionForward args{
                .w = at<const void>(w),
                .w_stride_batch = w_stride_batch,
                .w_stride_row = w_stride_row,
                .o = at<void>(o),
                .lse = at<float>(lse),
                .batch = batch,
                .n = n,
                .heads = heads,
                .head_dim = head_dim,
                .scale = scale,
                .causal = causal,
                .dtype = dtype_named(dtype),
            };
            attention_forward(args, stream_at(stream));
        },
        py::call_guard<py::gil_scoped_release>(), py::kw_only(), py::arg("w"),
        py::arg("w_stride_batch"), py::arg("w_stride_row"), py::arg("o"), py::arg("lse"),
        py::arg("batch"), py::arg("n"), py::arg("heads"), py::arg("head_dim"), py::arg("scale"),
        py::arg("causal"), py::arg("dtype"), py::arg("stream"));

    module.def(
        "attention_backward",
        [](Pointer grad_o, int64_t grad_o_stride_batch, int64_t grad_o_stride_row, Pointer w,
           int64_t w_stride_batch, int64_t w_stride_row, Pointer o, Pointer lse, Pointer delta,
           Pointer scratch, Pointer grad_w, int batch, int n, int heads, int head_dim, float scale,
           bool causal, const std::string& dtype, Pointer stream) {
            const AttentionBackward args{
                .grad_o = at<const void>(grad_o),
                .grad_o_stride_batch = grad_o_stride_batch,
                .grad_o_stride_row = grad_o_stride_row,
                .w = at<const void>(w),
                .w_stride_batch = w_stride_batch,
                .w_stride_row = w_stride_row,
                .o = at<const void>(o),
                .lse = at<const float>(lse),
                .delta = at<const float>(delta),
                .scratch = at<void>(scratch),
                .grad_w = at<void>(grad_w),
                .batch = batch,
                .n = n,
                .heads = heads,
                .head_dim = head_dim,
                .scale = scale,
                .causal = causal,
                .dtype = dtype_named(dtype),
            };
            attention_backward(args, stream_at(stream));
        },
        py::call_guard<py::gil_scoped_release>(), py::kw_only(), py::arg("grad_o"),
        py::arg("grad_o_stride_batch"), py::arg("grad_o_stride_row"), py::arg("w"),
        py::arg("w_stride_batch"), py::arg("w_stride_row"), py::arg("o"), py::arg("lse"),
        py::arg("delta"), py::arg("scratch"), py::arg("grad_w"), py::arg("batch"), py::arg("n"),
        py::arg("heads"), py::arg("head_dim"), py::arg("scale"), py::arg("causal"),
        py::arg("dtype"), py::arg("stream"));

    module.def(
        "normed_projection",
        [](Pointer x, Pointer stats, Pointer weight, Pointer sums, Pointer shift, Pointer w,
           int64_t rows, int d, int inner, const std::string& dtype, Pointer stream) {
            const NormedProjection args{
                .x = at<const void>(x),
                .stats = at<const float>(stats),
                .weight = at<const void>(weight),
                .sums = at<const float>(sums),
                .shift = at<const float>(shift),
                .w = at<void>(w),
                .rows = rows,
                .d = d,
                .inner = inner,
                .dtype = dtype_named(dtype),
            };
            normed_projection(args, stream_at(stream));
        },
        py::call_guard<py::gil_scoped_release>(), py::kw_only(), py::arg("x"), py::arg("stats"),
        py::arg("weight"), py::arg("sums"), py::arg("shift"), py::arg("w"), py::arg("rows"),
        py::arg("d"), py::arg("inner"), py::arg("dtype"), py::arg("stream"));

    module.def(
        "residual_projection",
        [](Pointer o, Pointer w_out, Pointer bias, Pointer x, Pointer z, Pointer moments,
           int64_t rows, int d, int inner, const std::string& dtype, Pointer stream) {
            const ResidualProjection args{
                .o = at<const void>(o),
                .w_out = at<const void>(w_out),
                .bias = at<const float>(bias),
                .x = at<const void>(x),
                .z = at<void>(z),
                .moments = at<float>(moments),
                .rows = rows,
                .d = d,
                .inner = inner,
                .dtype = dtype_named(dtype),
            };
            residual_projection(args, stream_at(stream));
        },
        py::call_guard<py::gil_scoped_release>(), py::kw_only(), py::arg("o"), py::arg("w_out"),
        py::arg("bias"), py::arg("x"), py::arg("z"), py::arg("moments"), py::arg("rows"),
        py::arg("d"), py::arg("inner"), py::arg("dtype"), py::arg("stream"));

    module.def(
        "output_gradient",
        [](Pointer dy, Pointer w_out, Pointer o, Pointer grad_o, Pointer delta, Pointer sums,
           int64_t rows, int d, int heads, const std::string& dtype, Pointer stream) {
            const OutputGradient args{
                .dy = at<const void>(dy),
                .w_out = at<const void>(w_out),
                .o = at<const void>(o),
                .grad_o = at<void>(grad_o),
                .delta = at<float>(delta),
                .sums = at<float>(sums),
                .rows = rows,
                .d = d,
                .heads = heads,
                .dtype = dtype_named(dtype),
            };
            output_gradient(args, stream_at(stream));
        },
        py::call_guard<py::gil_scoped_release>(), py::kw_only(), py::arg("dy"), py::arg("w_out"),
        py::arg("o"), py::arg("grad_o"), py::arg("delta"), py::arg("sums"), py::arg("rows"),
        py::arg("d"), py::arg("heads"), py::arg("dtype"), py::arg("stream"));

    module.def("output_gradient_sums", &output_gradient_sums, py::kw_only(), py::arg("rows"));

    module.def("attention_backward_scratch", &attention_backward_scratch, py::kw_only(),
               py::arg("batch"), py::arg("n"), py::arg("heads"));
}

// ---- a layer's norms

void bind_block(py::module_& module) {
    module.def(
        "normalise_backward",
        [](Pointer dh, Pointer z, Pointer skip, Pointer stats, Pointer gamma, Pointer beta,
           Pointer dz, Pointer h, Pointer partials, int64_t rows, int d, bool masks, bool third_sum,
           const std::string& dtype, Pointer stream) {
            const NormaliseBackward args{
                .dh = at<const void>(dh),
                .z = at<const void>(z),
                .skip = at<const void>(skip),
                .stats = at<const float>(stats),
                .gamma = at<const float>(gamma),
                .beta = at<const float>(beta),
                .dz = at<void>(dz),
                .h = at<void>(h),
                .partials = at<float>(partials),
                .rows = rows,
                .d = d,
                .masks = masks,
                .third_sum = third_sum,
                .dtype = dtype_named(dtype),
            };
            normalise_backward(args, stream_at(stream));
        },
        py::call_guard<py::gil_scoped_release>(), py::kw_only(), py::arg("dh"), py::arg("z"),
        py::arg("skip"), py::arg("stats"), py::arg("gamma"), py::arg("beta"), py::arg("dz"),
        py::arg("h"), py::arg("partials"), py::arg("rows"), py::arg("d"), py::arg("masks"),
        py::arg("third_sum"), py::arg("dtype"), py::arg("stream"));

    module.def(
        "encoder_of_few",
        [](Pointer x, const std::vector<std::array<Pointer, 9>>& layers,
           const std::vector<float>& thresholds, Pointer y, Pointer w, Pointer o, Pointer z,
           Pointer lse, Pointer counters, int batch, int n, int d, int heads, float scale,
           float eps, const std::string& dtype, Pointer stream) {
            std::vector<EncoderLayer> given;
            for (const auto& layer : layers) {  // in the order of LayerOfFew (block/of_few.py)
                given.push_back({
                    .w_qkv = at<const void>(layer[0]),
                    .qkv_sums = at<const float>(layer[1]),
                    .qkv_shift = at<const float>(layer[2]),
                    .w_out = at<const void>(layer[3]),
                    .bias = at<const float>(layer[4]),
                    .gram = at<const void>(layer[5]),
                    .gram_scales = at<const float>(layer[6]),
                    .gram_sums = at<const float>(layer[7]),
                    .gram_shift = at<const float>(layer[8]),
                    .threshold = thresholds.at(given.size()),
                });
            }
            const EncoderOfFew args{
                .x = at<const void>(x),
                .layers = given.data(),
                .y = at<void>(y),
                .w = at<void>(w),
                .o = at<void>(o),
                .z = at<void>(z),
                .lse = at<float>(lse),
                .counters = at<uint32_t>(counters),
                .depth = int(given.size()),
                .batch = batch,
                .n = n,
                .d = d,
                .heads = heads,
                .scale = scale,
                .eps = eps,
                .dtype = dtype_named(dtype),
            };
            encoder_of_few(args, stream_at(stream));
        },
        py::call_guard<py::gil_scoped_release>(), py::kw_only(), py::arg("x"), py::arg("layers"),
        py::arg("thresholds"), py::arg("y"), py::arg("w"), py::arg("o"), py::arg("z"),
        py::arg("lse"), py::arg("counters"), py::arg("batch"), py::arg("n"), py::arg("d"),
        py::arg("heads"), py::arg("scale"), py::arg("eps"), py::arg("dtype"), py::arg("stream"));

    module.def("normalise_backward_parts", &normalise_backward_parts);
    module.attr("most_normed_columns") = kMostNormedColumns;
}

// ---- ISTA

void bind_ista(py::module_& module) {
    module.def(
        "ista_forward",
        [](Pointer x, Pointer xc, Pointer gram, Pointer y, Pointer mask, Pointer moments,
           int64_t rows, int d, float threshold, const std::string& dtype,
           const std::string& x_dtype, Pointer stream) {
            const IstaForward args{
                .x = at<const void>(x),
                .xc = at<const void>(xc),
                .gram = at<const void>(gram),
                .y = at<void>(y),
                .mask = at<void>(mask),
                .moments = at<float>(moments),
                .rows = rows,
                .d = d,
                .threshold = threshold,
                .dtype = dtype_named(dtype),
                .x_dtype = dtype_named(x_dtype),
            };
            ista_forward(args, stream_at(stream));
        },
        py::call_guard<py::gil_scoped_release>(), py::kw_only(), py::arg("x"), py::arg("xc"),
        py::arg("gram"), py::arg("y"), py::arg("mask"), py::arg("moments"), py::arg("rows"),
        py::arg("d"), py::arg("threshold"), py::arg("dtype"), py::arg("x_dtype"),
        py::arg("stream"));

    module.def(
        "ista_normed_forward",
        [](Pointer z, Pointer stats, Pointer weight, Pointer scales, Pointer sums, Pointer shift,
           Pointer y, Pointer mask, Pointer moments, int64_t rows, int d, float threshold,
           const std::string& dtype, Pointer stream) {
            const IstaNormedForward args{
                .z = at<const void>(z),
                .stats = at<const float>(stats),
                .weight = at<const void>(weight),
                .scales = at<const float>(scales),
                .sums = at<const float>(sums),
                .shift = at<const float>(shift),
                .y = at<void>(y),
                .mask = at<void>(mask),
                .moments = at<float>(moments),
                .rows = rows,
                .d = d,
                .threshold = threshold,
                .dtype = dtype_named(dtype),
            };
            ista_normed_forward(args, stream_at(stream));
        },
        py::call_guard<py::gil_scoped_release>(), py::kw_only(), py::arg("z"), py::arg("stats"),
        py::arg("weight"), py::arg("scales"), py::arg("sums"), py::arg("shift"), py::arg("y"),
        py::arg("mask"), py::arg("moments"), py::arg("rows"), py::arg("d"), py::arg("threshold"),
        py::arg("dtype"), py::arg("stream"));

    module.def(
        "ista_backward",
        [](Pointer dy, Pointer mask, Pointer gram, Pointer g, Pointer dx, int64_t rows, int d,
           const std::string& dtype, const std::string& x_dtype, Pointer stream) {
            const IstaBackward args{
                .dy = at<const void>(dy),
                .mask = at<const void>(mask),
                .gram = at<const void>(gram),
                .g = at<void>(g),
                .dx = at<void>(dx),
                .rows = rows,
                .d = d,
                .dtype = dtype_named(dtype),
                .x_dtype = dtype_named(x_dtype),
            };
            ista_backward(args, stream_at(stream));
        },
        py::call_guard<py::gil_scoped_release>(), py::kw_only(), py::arg("dy"), py::arg("mask"),
        py::arg("gram"), py::arg("g"), py::arg("dx"), py::arg("rows"), py::arg("d"),
        py::arg("dtype"), py::arg("x_dtype"), py::arg("stream"));

    module.def(
        "ista_weight",
        [](Pointer x, Pointer g, Pointer partials, Pointer m, Pointer both, int64_t rows, int d,
           const std::string& dtype, Pointer stream) {
            const IstaWeight args{
                .x = at<const void>(x),
                .g = at<const void>(g),
                .partials = at<float>(partials),
                .m = at<float>(m),
                .both = at<void>(both),
                .rows = rows,
                .d = d,
                .dtype = dtype_named(dtype),
            };
            ista_weight(args, stream_at(stream));
        },
        py::call_guard<py::gil_scoped_release>(), py::kw_only(), py::arg("x"), py::arg("g"),
        py::arg("partials"), py::arg("m"), py::arg("both"), py::arg("rows"), py::arg("d"),
        py::arg("dtype"), py::arg("stream"));

    module.def("ista_mask_bytes", &ista_mask_bytes);
    module.def("moments_span", &moments_span);
    module.def("ista_weight_parts", &ista_weight_parts);
}

// ---- overcomplete ISTA

void bind_overcomplete_ista(py::module_& module) {
    module.def(
        "overcomplete_code",
        [](Pointer a, Pointer dictionary, Pointer c, Pointer z, Pointer mask, int64_t rows, int d,
           int m, float step_size, float threshold, const std::string& dtype, Pointer stream) {
            const OvercompleteCode args{
                .a = at<const void>(a),
                .dictionary = at<const void>(dictionary),
                .c = at<const void>(c),
                .z = at<void>(z),
                .mask = at<void>(mask),
                .rows = rows,
                .d = d,
                .m = m,
                .step_size = step_size,
                .threshold = threshold,
                .dtype = dtype_named(dtype),
            };
            overcomplete_code(args, stream_at(stream));
        },
        py::call_guard<py::gil_scoped_release>(), py::kw_only(), py::arg("a"),
        py::arg("dictionary"), py::arg("c"), py::arg("z"), py::arg("mask"), py::arg("rows"),
        py::arg("d"), py::arg("m"), py::arg("step_size"), py::arg("threshold"), py::arg("dtype"),
        py::arg("stream"));

    module.def(
        "overcomplete_code_gradient",
        [](Pointer a, Pointer dictionary, Pointer c, Pointer mask, Pointer e, int64_t rows, int d,
           int m, float alpha, const std::string& dtype, Pointer stream) {
            const OvercompleteCodeGradient args{
                .a = at<const void>(a),
                .dictionary = at<const void>(dictionary),
                .c = at<const void>(c),
                .mask = at<const void>(mask),
                .e = at<void>(e),
                .rows = rows,
                .d = d,
                .m = m,
                .alpha = alpha,
                .dtype = dtype_named(dtype),
            };
            overcomplete_code_gradient(args, stream_at(stream));
        },
        py::call_guard<py::gil_scoped_release>(), py::kw_only(), py::arg("a"),
        py::arg("dictionary"), py::arg("c"), py::arg("mask"), py::arg("e"), py::arg("rows"),
        py::arg("d"), py::arg("m"), py::arg("alpha"), py::arg("dtype"), py::arg("stream"));

    module.def(
        "overcomplete_decoded_sum",
        [](Pointer z, Pointer dictionary, Pointer c, Pointer out, int64_t rows, int d, int m,
           float alpha, const std::string& dtype, Pointer stream) {
            const OvercompleteDecodedSum args{
                .z = at<const void>(z),
                .dictionary = at<const void>(dictionary),
                .c = at<const void>(c),
                .out = at<void>(out),
                .rows = rows,
                .d = d,
                .m = m,
                .alpha = alpha,
                .dtype = dtype_named(dtype),
            };
            overcomplete_decoded_sum(args, stream_at(stream));
        },
        py::call_guard<py::gil_scoped_release>(), py::kw_only(), py::arg("z"),
        py::arg("dictionary"), py::arg("c"), py::arg("out"), py::arg("rows"), py::arg("d"),
        py::arg("m"), py::arg("alpha"), py::arg("dtype"), py::arg("stream"));
}

}  // namespace

// One bind_ function per op.
PYBIND11_MODULE(_cuda, module) {
    module.doc() = "The CUDA kernels of crate_kernels, for compute capability 9.0.";
    bind_attention(module);
    bind_block(module);
    bind_ista(module);
    bind_overcomplete_ista(module);
}
