// Linear layers with ternary weights and int8 activations: W1.58A8 on NVIDIA GPUs from sm_80 on.
//
// Two kernels make one layer:
//   quantize_rows                inputs -> int8 codes, their sum and their scale, one block a token
//   multiply_1, _2               1 or 2 tokens a block with dp4a, bound by the bytes of the weights
//   multiply_8, _16, _32         8, 16 or 32 with int8 tensor cores (mma.m16n8k32), still bound by those bytes
//   multiply_tiles_*             tiles of many tokens with tensor cores, bound by these
// All of these share an epilogue and read the same bytes. No header is included, so that NVRTC needs no toolkit, and
// nothing but the few functions under "The machine" is special to a GPU, so that a C++ compiler can run all of it on a
// CPU (tests/ops/cuda/emulator.h).
//
// Weights: tiles of 16 rows x 128 columns in 512 bytes. Lane 4g + t of a warp (g = 0..7, t = 0..3) loads 16 of them as
// four words, h = 0..3. Byte b of word h holds four digits c = code + 1, two bits each:
//
//     bits   1:0            3:2              5:4               7:6
//     row    g              g + 8            g                 g + 8
//     column 32t + 8h + b   32t + 8h + b     32t + 8h + b + 4  32t + 8h + b + 4
//
// so that `word & 0x03030303` is four digits of row g, ready for dp4a, `& 0x0c0c0c0c` four of row g + 8 times 4, and
// the same after `>> 4`: these four words are just the operand A of mma.m16n8k32, because a sum does not mind in which
// order both operands go through the columns. Sums of row g + 8 come out times 4, and are shifted back once.
//
// Activations: tiles of 128 tokens x 128 columns in 16 groups of 8 tokens, 1024 bytes each, lane by lane what mma takes
// as operand B:
//
//     byte   512*half + 16*(4*token + t) + j   holds column 32t + 16*half + j,   half = 0, 1, j = 0..15
//
// Both are stored tile after tile of columns for the first 16 rows (128 tokens), then for the next. The number of
// panels of 16 rows is a multiple of 8, so that the largest block of the tensor-core kernels reads nothing else.
//
// Digits instead of codes: sum(q * c) = sum(q * code) + sum(q), and sum(q) is known for the token. Padding is free:
// columns beyond the last have q = 0.
//
// Bits of the answer: integers are exact. 4 * 2 * 127 * K fits into int32 up to K = 2113664; the float of a sum is
// exact up to K = 131072 (2^24 / 128), where the caller stops. Every float operation below is one IEEE operation
// rounded to nearest (__fmul_rn and __fadd_rn are never contracted), in the order of bitnet/ops/reference.py.

enum { FLOAT32 = 0, FLOAT16 = 1, BFLOAT16 = 2 };

#define WARP 32
#define EVERY_LANE 0xffffffffu

// ---- The machine -----------------------------------------------------------------------------------------------

#ifndef EMULATED
__device__ __forceinline__ float float_of_half(unsigned short bits) {
    float value;
    asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(bits));
    return value;
}

__device__ __forceinline__ unsigned short half_of_float(float value) {
    unsigned short bits;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(value));
    return bits;
}

__device__ __forceinline__ unsigned short bfloat16_of_float(float value) {
    unsigned short bits;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(value));
    return bits;
}

// sums[16 x 8] += a[16 x 32] * b[32 x 8] over the warp, in the fragments that PTX defines for m16n8k32.
__device__ __forceinline__ void multiply_accumulate(int sums[4], const unsigned a[4], unsigned b0, unsigned b1) {
    asm("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+r"(sums[0]), "+r"(sums[1]), "+r"(sums[2]), "+r"(sums[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Start copying COPIES times 16 bytes, `STRIDE` of them apart, into shared memory, past the registers. The offsets are
// part of the instructions: as sums of 64 bits they cost registers that the tiles need.
template <int COPIES, int STRIDE>
__device__ __forceinline__ void start_copies(uint4* shared, const uint4* global) {
    const unsigned address = (unsigned)__cvta_generic_to_shared(shared);
    asm volatile("cp.async.cg.shared.global [%0 + %2], [%1 + %2], 16;" ::"r"(address), "l"(global),
                 "n"((COPIES - 1) * STRIDE * 16)
                 : "memory");
    if constexpr (COPIES > 1) start_copies<COPIES - 1, STRIDE>(shared, global);
}

// The copies that this thread started since the last call are one group.
__device__ __forceinline__ void close_group() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Wait until at most `pending` groups of this thread are under way.
template <int pending>
__device__ __forceinline__ void await_groups() { asm volatile("cp.async.wait_group %0;" ::"n"(pending) : "memory"); }
#endif

// ---- Values in memory ------------------------------------------------------------------------------------------

__device__ __forceinline__ float read_value(const void* values, size_t index, int dtype) {
    if (dtype == FLOAT32) return ((const float*)values)[index];
    unsigned short bits = ((const unsigned short*)values)[index];
    return dtype == FLOAT16 ? float_of_half(bits) : __uint_as_float((unsigned)bits << 16);
}

__device__ __forceinline__ void write_value(void* values, size_t index, float value, int dtype) {
    if (dtype == FLOAT32) ((float*)values)[index] = value;
    else ((unsigned short*)values)[index] = dtype == FLOAT16 ? half_of_float(value) : bfloat16_of_float(value);
}

// ---- Activations: values -> codes ------------------------------------------------------------------------------

// codes = clamp(round(x / scale), -127, 127), scale = max(max|x|, 1e-5) / steps; `steps` is 127 (absmax, BitNet b1.58)
// or 128 (absmax_b1, BitNet b1). A row with a NaN or an infinity gets code 0 there and that scale, which makes every
// answer of the row NaN. One block a row; blocks of 256.
extern "C" __global__ void __launch_bounds__(256)
quantize_rows(const void* __restrict__ x, signed char* __restrict__ codes, int* __restrict__ sums,
              float* __restrict__ scales, int columns, int tiles, int dtype, int steps) {
    __shared__ unsigned largest_of_warp[8];
    __shared__ int sum_of_warp[8];
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    const size_t row = blockIdx.x, start = row * columns;

    // Magnitudes compare like their bits, and a NaN is above every number, so it stays.
    unsigned largest = 0;
    for (int column = threadIdx.x; column < columns; column += 256) {
        largest = max(largest, __float_as_uint(read_value(x, start + column, dtype)) & 0x7fffffffu);
    }
    for (int other = 16; other > 0; other /= 2) largest = max(largest, __shfl_xor_sync(EVERY_LANE, largest, other));
    if (lane == 0) largest_of_warp[warp] = largest;
    __syncthreads();
    largest = __float_as_uint(1e-5f);
    for (int each = 0; each < 8; ++each) largest = max(largest, largest_of_warp[each]);
    const float scale = __fdiv_rn(__uint_as_float(largest), (float)steps);

    signed char* tile_of_row = codes + (row / 128) * tiles * 16384 + row % 128 / 8 * 1024 + row % 8 * 64;
    int sum = 0;
    for (int word = threadIdx.x; word < tiles * 32; word += 256) {  // four columns each
        unsigned packed = 0;
        for (int byte = 0; byte < 4; ++byte) {
            const int column = word * 4 + byte;
            if (column < columns) {
                const float steps_of_x = __fdiv_rn(read_value(x, start + column, dtype), scale);
                const int code = steps_of_x == steps_of_x ? min(max(__float2int_rn(steps_of_x), -127), 127) : 0;
                packed |= (unsigned)(code & 0xff) << (8 * byte);
                sum += code;
            }
        }
        const int tile = word / 32, t = word / 8 % 4, half = word / 4 % 2;
        *(unsigned*)(tile_of_row + (size_t)tile * 16384 + half * 512 + t * 16 + word % 4 * 4) = packed;
    }
    for (int other = 16; other > 0; other /= 2) sum += __shfl_xor_sync(EVERY_LANE, sum, other);
    if (lane == 0) sum_of_warp[warp] = sum;
    __syncthreads();
    if (threadIdx.x == 0) {
        for (int each = 1; each < 8; ++each) sum += sum_of_warp[each];
        sums[row] = sum;
        scales[row] = scale;
    }
}

// ---- What both multiplications share ---------------------------------------------------------------------------

// Everything about a layer and its inputs that is not a weight or an activation.
struct Layer {
    const int* sums;             // [tokens] of the activations' codes
    const float* scales;         // [tokens] of the activations
    const float* weight_scales;  // [1] or [outputs]
    const void* bias;            // [outputs], or null
    void* y;                     // [tokens, outputs]
    int tokens, outputs;
    int scale_a_row;             // 1: weight_scales is [outputs]
    int bias_dtype, dtype;
};

#define LAYER_PARAMETERS                                                                                       \
    const int *__restrict__ sums, const float *__restrict__ scales, const float *__restrict__ weight_scales,   \
        const void *__restrict__ bias, void *__restrict__ y, int tokens, int outputs, int scale_a_row,         \
        int bias_dtype, int dtype
#define LAYER {sums, scales, weight_scales, bias, y, tokens, outputs, scale_a_row, bias_dtype, dtype}

// y = float(sum) * (weight scale * activation scale) + bias, each step rounded once.
__device__ __forceinline__ void finish(const Layer& layer, int token, int output, int sum_of_digits) {
    if (token >= layer.tokens || output >= layer.outputs) return;
    const float scale = __fmul_rn(layer.weight_scales[layer.scale_a_row ? output : 0], layer.scales[token]);
    float value = __fmul_rn(__int2float_rn(sum_of_digits - layer.sums[token]), scale);
    if (layer.bias) value = __fadd_rn(value, read_value(layer.bias, output, layer.bias_dtype));
    write_value(layer.y, (size_t)token * layer.outputs + output, value, layer.dtype);
}

// The digits of a word as operand A: row g, 4 * row g + 8, and the same four columns further on.
__device__ __forceinline__ void digits_of(unsigned word, unsigned a[4]) {
    a[0] = word & 0x03030303u;
    a[1] = word & 0x0c0c0c0cu;
    word >>= 4;
    a[2] = word & 0x03030303u;
    a[3] = word & 0x0c0c0c0cu;
}

// ---- Few tokens: dp4a ------------------------------------------------------------------------------------------

// A block computes 16 outputs of TOKENS tokens (1, 2), each warp from its share of the tiles of columns. The host
// chooses how many warps there are, up to 16: enough loads have to be under way to keep the memory busy.
// Grid: (panels of 16 rows, groups of TOKENS tokens).
template <int TOKENS>
__device__ __forceinline__ void multiply(const uint4* __restrict__ weights, const uint4* __restrict__ codes, int tiles,
                                         const Layer& layer) {
    __shared__ int partial[16][TOKENS][16];
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, warps = blockDim.x / WARP;
    const int g = lane / 4, t = lane % 4, last = (warp + 1) * tiles / warps;
    const int first = blockIdx.y * TOKENS;
    const uint4* weight = weights + (size_t)blockIdx.x * tiles * WARP + lane;
    const uint4* code = codes + (size_t)(first / 128) * tiles * 1024 + first % 128 / 8 * 64 + first % 8 * 4 + t;

    int sums[TOKENS][2] = {};  // of row g and, times 4, of row g + 8
#pragma unroll 2
    for (int tile = warp * tiles / warps; tile < last; ++tile) {
        const uint4 words = weight[(size_t)tile * WARP];
        uint4 low[TOKENS], high[TOKENS];  // columns 32t .. 32t + 15 and 32t + 16 .. 32t + 31
#pragma unroll
        for (int token = 0; token < TOKENS; ++token) {
            low[token] = code[(size_t)tile * 1024 + token * 4];
            high[token] = code[(size_t)tile * 1024 + token * 4 + 32];
        }
        const unsigned word[4] = {words.x, words.y, words.z, words.w};
#pragma unroll
        for (int h = 0; h < 4; ++h) {
            unsigned a[4];
            digits_of(word[h], a);
#pragma unroll
            for (int token = 0; token < TOKENS; ++token) {
                const uint4 q = h < 2 ? low[token] : high[token];
                const int q0 = (int)(h % 2 ? q.z : q.x), q1 = (int)(h % 2 ? q.w : q.y);
                sums[token][0] = __dp4a(q0, (int)a[0], sums[token][0]);
                sums[token][1] = __dp4a(q0, (int)a[1], sums[token][1]);
                sums[token][0] = __dp4a(q1, (int)a[2], sums[token][0]);
                sums[token][1] = __dp4a(q1, (int)a[3], sums[token][1]);
            }
        }
    }
#pragma unroll
    for (int token = 0; token < TOKENS; ++token) {
#pragma unroll
        for (int upper = 0; upper < 2; ++upper) {
            int sum = sums[token][upper];
            sum += __shfl_xor_sync(EVERY_LANE, sum, 1);
            sum += __shfl_xor_sync(EVERY_LANE, sum, 2);
            if (t == 0) partial[warp][token][g + 8 * upper] = sum >> (2 * upper);
        }
    }
    __syncthreads();
    if (threadIdx.x < TOKENS * 16) {
        const int token = threadIdx.x / 16, row = threadIdx.x % 16;
        int sum = 0;
        for (int from = 0; from < warps; ++from) sum += partial[from][token][row];
        finish(layer, first + token, blockIdx.x * 16 + row, sum);
    }
}

// 1024 threads a multiprocessor: at most 64 registers a thread.
#define MULTIPLY(TOKENS)                                                                                          \
    extern "C" __global__ void __launch_bounds__(512, 2)                                                          \
    multiply_##TOKENS(const uint4* __restrict__ weights, const uint4* __restrict__ codes, int tiles,              \
                      LAYER_PARAMETERS) {                                                                         \
        const Layer layer = LAYER;                                                                                \
        multiply<TOKENS>(weights, codes, tiles, layer);                                                           \
    }
MULTIPLY(1)
MULTIPLY(2)

// ---- Few tokens: tensor cores ----------------------------------------------------------------------------------

// A block computes 16 outputs of GROUPS * 8 tokens, each of up to MOST warps from its share of the tiles of columns.
// This takes 0.55 instructions a weight for 8 tokens; dp4a takes 0.67 for one, 1.0 for 2, and would take 1.55 for 4.
// Grid: (panels of 16 rows, groups of GROUPS * 8 tokens).
template <int GROUPS, int MOST>
__device__ __forceinline__ void multiply_groups(const uint4* __restrict__ weights, const uint4* __restrict__ codes,
                                                int tiles, const Layer& layer) {
    const int TOKENS = GROUPS * 8, PITCH = 20;  // four words more keep a warp's stores in different banks
    __shared__ int partial[MOST][TOKENS][PITCH];
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, warps = blockDim.x / WARP;
    const int g = lane / 4, t = lane % 4, last = (warp + 1) * tiles / warps;
    const int first = blockIdx.y * GROUPS;
    const uint4* weight = weights + (size_t)blockIdx.x * tiles * WARP + lane;
    const uint4* code = codes + ((size_t)(first / 16) * tiles * 16 + first % 16) * 64 + lane;

    int sums[GROUPS][4] = {};
#pragma unroll(GROUPS < 4 ? 2 : 1)  // more loads at once than registers otherwise
    for (int tile = warp * tiles / warps; tile < last; ++tile) {
        const uint4 words = weight[(size_t)tile * WARP];
        unsigned a[4][4];
        digits_of(words.x, a[0]);
        digits_of(words.y, a[1]);
        digits_of(words.z, a[2]);
        digits_of(words.w, a[3]);
#pragma unroll
        for (int group = 0; group < GROUPS; ++group) {
            const uint4* both = code + (size_t)tile * 1024 + group * 64;
            const uint4 low = both[0], high = both[32];
            multiply_accumulate(sums[group], a[0], low.x, low.y);
            multiply_accumulate(sums[group], a[1], low.z, low.w);
            multiply_accumulate(sums[group], a[2], high.x, high.y);
            multiply_accumulate(sums[group], a[3], high.z, high.w);
        }
    }
#pragma unroll
    for (int group = 0; group < GROUPS; ++group) {
#pragma unroll
        for (int each = 0; each < 4; ++each) {  // rows g, g, g + 8, g + 8; tokens 2t, 2t + 1, 2t, 2t + 1
            const int upper = each / 2;
            partial[warp][group * 8 + 2 * t + each % 2][g + 8 * upper] = sums[group][each] >> (2 * upper);
        }
    }
    __syncthreads();
#pragma unroll 1
    for (int each = threadIdx.x; each < TOKENS * 16; each += blockDim.x) {
        const int token = each / 16, row = each % 16;
        int sum = 0;
        for (int from = 0; from < warps; ++from) sum += partial[from][token][row];
        finish(layer, first * 8 + token, blockIdx.x * 16 + row, sum);
    }
}

#define MULTIPLY_GROUPS(NAME, GROUPS, MOST, BLOCKS)                                                               \
    extern "C" __global__ void __launch_bounds__(MOST* WARP, BLOCKS)                                              \
    NAME(const uint4* __restrict__ weights, const uint4* __restrict__ codes, int tiles, LAYER_PARAMETERS) {       \
        const Layer layer = LAYER;                                                                                \
        multiply_groups<GROUPS, MOST>(weights, codes, tiles, layer);                                              \
    }
MULTIPLY_GROUPS(multiply_8, 1, 16, 2)
MULTIPLY_GROUPS(multiply_16, 2, 16, 2)
MULTIPLY_GROUPS(multiply_32, 4, 8, 3)

// ---- Many tokens: tensor cores ---------------------------------------------------------------------------------

// A warp computes PANELS x 16 outputs of GROUPS x 8 tokens, a block DOWN x ACROSS such warps. Codes pass through shared
// memory in three stages (two tiles of columns are on their way while one is multiplied); weights, which are 4 times
// smaller and belong to one warp (or ACROSS), go straight to registers, one tile ahead.
// Grid: (tokens in blocks of GROUPS * ACROSS * 8, panels in blocks of PANELS * DOWN). `weights` and `codes` hold whole
// blocks; what lies beyond the last output or token is computed and not written.
template <int PANELS, int GROUPS, int DOWN, int ACROSS>
__device__ __forceinline__ void multiply_tiles(const uint4* __restrict__ weights, const uint4* __restrict__ codes,
                                               int tiles, const Layer& layer) {
    const int STAGES = 3, THREADS = DOWN * ACROSS * WARP, BLOCK_GROUPS = GROUPS * ACROSS, CHUNKS = BLOCK_GROUPS * 64;
    __shared__ uint4 stages[STAGES][CHUNKS];
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, down = warp % DOWN, across = warp / DOWN;
    const int first_panel = blockIdx.y * DOWN * PANELS;
    const int first_group = blockIdx.x * BLOCK_GROUPS;

    const uint4* weight = weights + (size_t)(first_panel + down * PANELS) * tiles * WARP + lane;
    const uint4* code = codes + ((size_t)(first_group / 16) * tiles * 16 + first_group % 16) * 64 + threadIdx.x;

    int sums[PANELS][GROUPS][4] = {};
    uint4 words[PANELS];
#pragma unroll
    for (int panel = 0; panel < PANELS; ++panel) words[panel] = weight[(size_t)panel * tiles * WARP];
#pragma unroll
    for (int stage = 0; stage < STAGES - 1; ++stage) {
        if (stage < tiles) start_copies<CHUNKS / THREADS, THREADS>(&stages[stage][threadIdx.x], code + stage * 1024);
        close_group();
    }
    code += (STAGES - 1) * 1024;

    int stage = 0, free_stage = STAGES - 1;
#pragma unroll 1
    for (int tile = 0; tile < tiles; ++tile) {
        await_groups<STAGES - 2>();
        __syncthreads();  // the tile is here for every thread, and all are done with the stage that is filled next
        if (tile + STAGES - 1 < tiles) start_copies<CHUNKS / THREADS, THREADS>(&stages[free_stage][threadIdx.x], code);
        close_group();
        code += 1024;

        weight += tile + 1 < tiles ? WARP : 0;  // the last tile is loaded twice rather than behind a branch
        const uint4* here = &stages[stage][across * GROUPS * 64 + lane];
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            unsigned a[PANELS][2][4];
#pragma unroll
            for (int panel = 0; panel < PANELS; ++panel) {
                digits_of(half ? words[panel].z : words[panel].x, a[panel][0]);
                digits_of(half ? words[panel].w : words[panel].y, a[panel][1]);
                // The next tile's weights arrive while the second half is multiplied, in the same registers.
                if (half) words[panel] = weight[(size_t)panel * tiles * WARP];
            }
#pragma unroll
            for (int group = 0; group < GROUPS; ++group) {
                const uint4 q = here[group * 64 + half * 32];
#pragma unroll
                for (int panel = 0; panel < PANELS; ++panel) {
                    multiply_accumulate(sums[panel][group], a[panel][0], q.x, q.y);
                    multiply_accumulate(sums[panel][group], a[panel][1], q.z, q.w);
                }
            }
        }
        free_stage = stage;
        stage = stage == STAGES - 1 ? 0 : stage + 1;
    }

    // Through shared memory, so that neighbouring threads write neighbouring outputs: 16 rows a warp at a time, as
    // [token][row]. Four words more a token keep the four tokens that a warp stores at once in different banks.
    const int ROWS = DOWN * 16, TOKENS = BLOCK_GROUPS * 8, PITCH = ROWS + 4, g = lane / 4, t = lane % 4;
    static_assert(TOKENS * PITCH * 4 <= sizeof(stages), "the sums do not fit into the stages' memory");
    int* staged = (int*)stages;
#pragma unroll
    for (int panel = 0; panel < PANELS; ++panel) {
        __syncthreads();  // the last tile is multiplied, or the panel before is written
#pragma unroll
        for (int group = 0; group < GROUPS; ++group) {
#pragma unroll
            for (int each = 0; each < 4; ++each) {  // rows g, g, g + 8, g + 8; tokens 2t, 2t + 1, 2t, 2t + 1
                const int token = (across * GROUPS + group) * 8 + 2 * t + each % 2, upper = each / 2;
                staged[token * PITCH + down * 16 + g + 8 * upper] = sums[panel][group][each] >> (2 * upper);
            }
        }
        __syncthreads();
#pragma unroll 1
        for (int each = threadIdx.x; each < ROWS * TOKENS; each += THREADS) {
            const int row = each % ROWS, token = each / ROWS;
            const int output = (first_panel + row / 16 * PANELS + panel) * 16 + row % 16;
            finish(layer, first_group * 8 + token, output, staged[token * PITCH + row]);
        }
    }
}

#define MULTIPLY_TILES(NAME, PANELS, GROUPS, DOWN, ACROSS, BLOCKS)                                                \
    extern "C" __global__ void __launch_bounds__(DOWN* ACROSS* WARP, BLOCKS)                                      \
    NAME(const uint4* __restrict__ weights, const uint4* __restrict__ codes, int tiles, LAYER_PARAMETERS) {       \
        const Layer layer = LAYER;                                                                                \
        multiply_tiles<PANELS, GROUPS, DOWN, ACROSS>(weights, codes, tiles, layer);                               \
    }
MULTIPLY_TILES(multiply_tiles_64x32, 1, 4, 4, 1, 4)
MULTIPLY_TILES(multiply_tiles_128x64, 2, 8, 4, 1, 3)
