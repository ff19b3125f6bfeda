// What csrc/ offers: launchers over raw device pointers and a stream. No torch in here.
//
// Strides count elements, and the last dimension of every tensor is contiguous. A launcher throws
// std::invalid_argument for what it does not support and std::runtime_error for what CUDA reports.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace crate_kernels {

enum class Dtype { kFloat16, kBFloat16, kFloat32 };

// o_h = softmax(scale w_h w_h^T) w_h for each head h; lse = logsumexp of the scaled scores.
struct AttentionForward {
    const void* w;  // (batch, n, heads * head_dim), float16 or bfloat16
    int64_t w_stride_batch, w_stride_row;
    void* o;     // as w, contiguous
    float* lse;  // (batch, heads, n)
    int batch, n, heads, head_dim;
    float scale;
    bool causal;
    Dtype dtype;
};
void attention_forward(const AttentionForward& args, cudaStream_t stream);

// w = LN(x) U^T = rstd (x (U diag(gamma))^T - mean s) + U beta, s = rowsum(U diag(gamma)): no
// normed rows are written. Contiguous; d and inner multiples of 8, pointers of 16 bytes.
struct NormedProjection {
    const void* x;       // (rows, d), float16 or bfloat16
    const float* stats;  // (rows, 2): mean and rstd of each row
    const void* weight;  // U diag(gamma): (inner, d), as x
    const float* sums;   // s: (inner)
    const float* shift;  // U beta: (inner)
    void* w;             // (rows, inner), as x
    int64_t rows;
    int d, inner;
    Dtype dtype;
};
void normed_projection(const NormedProjection& args, cudaStream_t stream);

// z = x + o V^T + b, and the moments of its rows (moments_span, below).
struct ResidualProjection {
    const void* o;      // (rows, inner), float16 or bfloat16
    const void* w_out;  // V: (d, inner), as o
    const float* bias;  // b: (d), or null
    const void* x;      // (rows, d), as o
    void* z;            // as x
    float* moments;     // (ceil(d / moments_span(d)), rows, 2)
    int64_t rows;
    int d, inner;
    Dtype dtype;
};
void residual_projection(const ResidualProjection& args, cudaStream_t stream);

// dO = dy V, and delta = rowsum(dO * O) of each head: what comes before attention_backward where o
// was projected by V. And the gradient of a bias behind that, as far as sums over 64 rows of dy.
// head_dim is 64; rows are contiguous, pointers multiples of 16 bytes.
struct OutputGradient {
    const void* dy;     // (rows, d), float16 or bfloat16
    const void* w_out;  // V: (d, heads * 64)
    const void* o;      // (rows, heads * 64)
    void* grad_o;       // as o
    float* delta;       // (heads, rows)
    float* sums;        // (output_gradient_sums(rows), d), or null
    int64_t rows;
    int d, heads;
    Dtype dtype;
};
void output_gradient(const OutputGradient& args, cudaStream_t stream);
int64_t output_gradient_sums(int64_t rows);

// dw = P^T dO + scale (dS + dS^T) w, dS = P * (dP - delta), dP = dO w^T, delta = rowsum(dO * O).
struct AttentionBackward {
    const void* grad_o;  // (batch, n, heads * head_dim), as w
    int64_t grad_o_stride_batch, grad_o_stride_row;
    const void* w;
    int64_t w_stride_batch, w_stride_row;
    const void* o;       // contiguous, of the forward
    const float* lse;    // (batch, heads, n), of the forward
    const float* delta;  // (heads, batch, n), or null: made from grad_o and o
    void* scratch;       // attention_backward_scratch(batch, n, heads) bytes
    void* grad_w;        // as w, contiguous
    int batch, n, heads, head_dim;
    float scale;
    bool causal;
    Dtype dtype;
};
void attention_backward(const AttentionBackward& args, cudaStream_t stream);
int64_t attention_backward_scratch(int batch, int n, int heads);  // bytes

// With t = gamma dh and zhat = (z - mean) rstd, row by row:
//     dz = rstd (t - mean(t) - zhat mean(t zhat)) (+ skip; 0 where z is, if it masks)
//     h = gamma zhat + beta
// and a part for each block of the sums over rows of dh zhat, dh and, where wanted, skip or without
// one dz. Contiguous, pointers multiples of 16 bytes; d a multiple of 8 up to kMostNormedColumns.
struct NormaliseBackward {
    const void* dh;      // (rows, d), float16 or bfloat16
    const void* z;       // as dh
    const void* skip;    // as dh, or null
    const float* stats;  // (rows, 2): mean and rstd of each row
    const float* gamma;  // (d)
    const float* beta;   // (d)
    void* dz;            // as dh
    void* h;             // as dh, or null where unwanted
    float* partials;     // (normalise_backward_parts(rows, d), 2 or 3, d)
    int64_t rows;
    int d;
    bool masks, third_sum;
    Dtype dtype;
};
void normalise_backward(const NormaliseBackward& args, cudaStream_t stream);
int normalise_backward_parts(int64_t rows, int d);
inline constexpr int kMostNormedColumns = 1024;

// All layers of an encoder in one kernel, for few rows:
//     w = LN(x) U^T,  o = attention(w),  z = x + o V^T + b,  x = relu(LN(z) (I + G) - threshold)
// with the norms folded into U and G as in NormedProjection and IstaNormedForward. Contiguous,
// pointers multiples of 16 bytes; d is 384 or 768 in heads of 64, or 576 in heads of 48.
struct EncoderLayer {
    const void* w_qkv;         // U diag(gamma): (d, d), dtype
    const float* qkv_sums;     // its row sums: (d)
    const float* qkv_shift;    // U beta: (d)
    const void* w_out;         // V: (d, d), dtype
    const float* bias;         // b: (d), or null
    const void* gram;          // B^T of IstaNormedForward: (d, d), dtype
    const float* gram_scales;  // e: (d)
    const float* gram_sums;    // s: (d)
    const float* gram_shift;   // f: (d)
    float threshold;
};
struct EncoderOfFew {
    const void* x;               // (batch, n, d), float16 or bfloat16
    const EncoderLayer* layers;  // (depth), on the host
    void* y;                     // the last x
    void *w, *o, *z;             // scratch, as x
    float* lse;                  // scratch, (batch, heads, n)
    uint32_t* counters;          // scratch, (depth, 4, ceil(batch n / 64)), zero
    int depth, batch, n, d, heads;
    float scale, eps;
    Dtype dtype;
};
void encoder_of_few(const EncoderOfFew& args, cudaStream_t stream);
inline constexpr int kMostFewEncoderLayers = 24, kMostFewEncoderColumns = 768;

// head_dim the attention kernels are built for.
inline constexpr int kHeadDims[] = {48, 64, 80, 128};

// ISTA on rows of d elements, contiguous; d a multiple of 8. dtype is float16 or bfloat16, x_dtype
// the same or float32. Pointers are multiples of 16 bytes.

// What a GEMM writes of its output's rows for a norm to come: of each span of elements their sum
// and the sum of their squares. d is a multiple of 64.
constexpr int moments_span(int d) { return d % 192 == 0 ? 192 : 128; }

// y = relu(x + xc G - threshold); the mask has a bit for each element of y, 1 where that is not
// zero (csrc/ista/tiles.cuh has the layout).
struct IstaForward {
    const void* x;     // (rows, d), x_dtype
    const void* xc;    // (rows, d), dtype: x itself where the dtypes are one
    const void* gram;  // (d, d), dtype
    void* y;           // (rows, d), x_dtype
    void* mask;        // ista_mask_bytes(rows, d), or null
    float* moments;    // (ceil(d / moments_span(d)), rows, 2), or null; x_dtype as dtype
    int64_t rows;
    int d;
    float threshold;
    Dtype dtype, x_dtype;
};
void ista_forward(const IstaForward& args, cudaStream_t stream);
int64_t ista_mask_bytes(int64_t rows, int d);

// The same of x = LN(z), whose rows are not written:
//     x + x G = rstd e (z B - mean s) + f,  B = diag(gamma) (I + G) diag(1 / e),  f = beta (I + G)
// with s the column sums of B; e is free, such that the diagonal of B is exact. d is a multiple of
// 64.
struct IstaNormedForward {
    const void* z;        // (rows, d), dtype
    const float* stats;   // (rows, 2): mean and rstd of each row
    const void* weight;   // B^T: (d, d), dtype
    const float* scales;  // e: (d)
    const float* sums;    // s: (d)
    const float* shift;   // f: (d)
    void* y;              // (rows, d), dtype
    void* mask;           // as of IstaForward, or null
    float* moments;       // as of IstaForward, or null
    int64_t rows;
    int d;
    float threshold;
    Dtype dtype;
};
void ista_normed_forward(const IstaNormedForward& args, cudaStream_t stream);

// g = dy where the mask has ones, else 0; dx = g + g G^T. Without a mask dy is g, of dtype.
struct IstaBackward {
    const void* dy;    // (rows, d), x_dtype
    const void* mask;  // of the forward, or null: then dx is wanted and g is not
    const void* gram;  // (d, d), dtype
    void* g;           // (rows, d), dtype; null where unwanted, if dx is not and x_dtype is dtype
    void* dx;          // (rows, d), x_dtype; null where unwanted
    int64_t rows;
    int d;
    Dtype dtype, x_dtype;
};
void ista_backward(const IstaBackward& args, cudaStream_t stream);

// m = x^T g and both = m + m^T, summed in float32 and always in the same order.
struct IstaWeight {
    const void* x;    // (rows, d), dtype
    const void* g;    // (rows, d), dtype
    float* partials;  // (ista_weight_parts(rows, d), d, d), scratch
    float* m;         // (d, d)
    void* both;       // (d, d), bfloat16 if dtype is, else float32
    int64_t rows;
    int d;
    Dtype dtype;
};
void ista_weight(const IstaWeight& args, cudaStream_t stream);
int ista_weight_parts(int64_t rows, int d);

// CRATE-alpha's step, in dictionaries D of (d, m): contiguous rows, d and m multiples of 8,
// pointers of 16 bytes; dtype is float16 or bfloat16, of all matrices.

// z = relu(c + step_size a D - threshold), and a bit for each element of z as IstaForward has them.
struct OvercompleteCode {
    const void* a;           // (rows, d)
    const void* dictionary;  // (d, m)
    const void* c;           // (rows, m), or null for 0
    void* z;                 // (rows, m)
    void* mask;              // ista_mask_bytes(rows, m), or null
    int64_t rows;
    int d, m;
    float step_size, threshold;
    Dtype dtype;
};
void overcomplete_code(const OvercompleteCode& args, cudaStream_t stream);

// e = c + alpha a D where the mask has ones, else 0.
struct OvercompleteCodeGradient {
    const void* a;           // (rows, d)
    const void* dictionary;  // (d, m)
    const void* c;           // (rows, m), or null for 0
    const void* mask;        // of overcomplete_code
    void* e;                 // (rows, m)
    int64_t rows;
    int d, m;
    float alpha;
    Dtype dtype;
};
void overcomplete_code_gradient(const OvercompleteCodeGradient& args, cudaStream_t stream);

// out = c + alpha z D^T.
struct OvercompleteDecodedSum {
    const void* z;           // (rows, m)
    const void* dictionary;  // (d, m)
    const void* c;           // (rows, d)
    void* out;               // (rows, d)
    int64_t rows;
    int d, m;
    float alpha;
    Dtype dtype;
};
void overcomplete_decoded_sum(const OvercompleteDecodedSum& args, cudaStream_t stream);

}  // namespace crate_kernels
