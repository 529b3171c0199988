// Runs the kernels of bitnet/ops/cuda/packed_linear.cu on a CPU, one fiber a CUDA thread, to see that they are right.
//
// It is stricter than a GPU where that finds mistakes: asynchronous copies happen as late as they may, and what they
// will overwrite is spoilt at once; a collective or a barrier that some thread does not reach stops the program; fibers
// run in either order of their numbers between barriers, which shows most races. Built with AddressSanitizer and UBSan,
// reads beyond a buffer and misaligned loads end it, too.
#pragma once
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <vector>

using std::max;
using std::min;

#define EMULATED
#define __global__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __shared__ static

struct alignas(16) uint4 { unsigned x, y, z, w; };
struct Index { unsigned x, y, z; };

namespace emulator {

enum State { READY, IN_COLLECTIVE, AT_BARRIER, DONE };

struct Copy { void* shared; const void* global; };

struct Fiber {
    void* place[5];                   // where it goes on (__builtin_setjmp)
    std::vector<char> stack;          // empty: never started
    Index thread;
    State state;
    bool parity;                      // of the collectives so far
    std::vector<Copy> open;           // copies that no group has yet
    std::deque<std::vector<Copy>> groups;
};

struct Deposit { unsigned words[6]; };  // what a lane gives to a collective

inline std::deque<Fiber> fibers;  // never moves one: their stacks hold addresses
inline unsigned current;
inline Index block, block_size, grid_size;
inline void* scheduler[5];
inline std::function<void()> kernel;
inline std::vector<Deposit> deposits[2];

[[noreturn]] inline void stop(const char* why) {
    fprintf(stderr, "emulator: %s (block %u,%u thread %u)\n", why, block.x, block.y, current);
    exit(3);
}

// Fibers live as long as the program, one for every thread of a block, and switch by jumps: swapcontext is slow.
// Both functions are left out of AddressSanitizer, which takes the jump for the end of a stack.
#define SWITCHES __attribute__((noinline, no_sanitize("address")))

SWITCHES inline void leave() {
    if (__builtin_setjmp(fibers[current].place) == 0) __builtin_longjmp(scheduler, 1);
}

inline void pause(State state) {
    fibers[current].state = state;
    leave();
}

inline void entry() {
    for (;;) {
        kernel();
        pause(DONE);
    }
}

SWITCHES inline void enter(ucontext_t* first) {
    if (__builtin_setjmp(scheduler)) return;
    if (first) setcontext(first);
    __builtin_longjmp(fibers[current].place, 1);
}

// Runs the current fiber up to its next pause.
inline void go_on() {
    if (!fibers[current].stack.empty()) return enter(nullptr);
    ucontext_t context;
    getcontext(&context);
    std::vector<char>& stack = fibers[current].stack;
    stack.resize(256 << 10);
    context.uc_stack.ss_sp = stack.data();
    context.uc_stack.ss_size = stack.size();
    makecontext(&context, entry, 0);
    enter(&context);
}

inline void start(unsigned number) {
    Fiber& fiber = fibers[number];
    fiber.thread = {number % block_size.x, number / block_size.x, 0};
    fiber.state = READY;
    fiber.parity = false;
    fiber.open.clear();
    fiber.groups.clear();
}

// Lets threads go on that have all come to the same collective (a warp) or barrier (the block).
inline bool release(State state, unsigned first, unsigned last) {
    for (unsigned each = first; each < last; ++each) {
        if (fibers[each].state != state) return false;
    }
    for (unsigned each = first; each < last; ++each) fibers[each].state = READY;
    return true;
}

inline void run_block(bool backwards) {
    const unsigned threads = block_size.x * block_size.y;
    if (threads % 32) stop("blocks of whole warps only");
    if (fibers.size() < threads) fibers.resize(threads);
    for (auto& each : deposits) each.resize(threads);
    for (unsigned each = 0; each < threads; ++each) start(each);
    for (;;) {
        bool moved = false, alive = false;
        for (unsigned each = 0; each < threads; ++each) {
            current = backwards ? threads - 1 - each : each;
            if (fibers[current].state != READY) continue;
            moved = true;
            go_on();
        }
        for (unsigned warp = 0; warp < threads; warp += 32) moved |= release(IN_COLLECTIVE, warp, warp + 32);
        moved |= release(AT_BARRIER, 0, threads);
        for (unsigned each = 0; each < threads; ++each) alive |= fibers[each].state != DONE;
        if (!alive) return;
        if (!moved) stop("some thread never comes to a barrier or a warp's collective");
    }
}

// Gives `mine` to the warp; what all 32 lanes gave. Two buffers in turn: a lane may be one collective ahead, not two.
inline const Deposit* exchange(const Deposit& mine) {
    Fiber& fiber = fibers[current];
    const bool parity = fiber.parity;
    fiber.parity = !parity;
    deposits[parity][current] = mine;
    pause(IN_COLLECTIVE);
    return &deposits[parity][current / 32 * 32];
}

template <class T>
T bits_as(unsigned bits) {
    T value;
    memcpy(&value, &bits, 4);
    return value;
}

template <class T>
unsigned bits_of(T value) {
    unsigned bits;
    memcpy(&bits, &value, 4);
    return bits;
}

inline int byte_of(unsigned word, int place) { return (int8_t)(word >> (8 * place)); }

}  // namespace emulator

#define threadIdx (emulator::fibers[emulator::current].thread)
#define blockIdx (emulator::block)
#define blockDim (emulator::block_size)
#define gridDim (emulator::grid_size)

inline void __syncthreads() { emulator::pause(emulator::AT_BARRIER); }

template <class T>
T __shfl_xor_sync(unsigned mask, T value, int other) {
    if (mask != 0xffffffffu) emulator::stop("a shuffle of a part of a warp");
    const int lane = emulator::current % 32;
    return emulator::bits_as<T>(emulator::exchange({{emulator::bits_of(value)}})[lane ^ other].words[0]);
}

inline int __dp4a(int a, int b, int sum) {
    for (int place = 0; place < 4; ++place) sum += emulator::byte_of(a, place) * emulator::byte_of(b, place);
    return sum;
}

// The fragments of mma.m16n8k32 as the PTX manual gives them, lane = 4 * group + t:
//   a[i], byte b: row group + 8 * (i % 2), column 4 * t + b + 16 * (i / 2);   b[i], byte b: row 4 * t + b + 16 * i,
//   column group;   sums[i]: row group + 8 * (i / 2), column 2 * t + i % 2.
inline void multiply_accumulate(int sums[4], const unsigned a[4], unsigned b0, unsigned b1) {
    const emulator::Deposit* lanes = emulator::exchange({{a[0], a[1], a[2], a[3], b0, b1}});
    const int lane = emulator::current % 32;
    for (int each = 0; each < 4; ++each) {
        const int row = lane / 4 + 8 * (each / 2), column = lane % 4 * 2 + each % 2;
        for (int k = 0; k < 32; ++k) {
            const unsigned left = lanes[row % 8 * 4 + k % 16 / 4].words[row / 8 + 2 * (k / 16)];
            const unsigned right = lanes[column * 4 + k % 16 / 4].words[4 + k / 16];
            sums[each] += emulator::byte_of(left, k % 4) * emulator::byte_of(right, k % 4);
        }
    }
}

template <int COPIES, int STRIDE>
void start_copies(uint4* shared, const uint4* global) {
    for (int each = 0; each < COPIES; ++each) {
        memset(shared + each * STRIDE, 0xa5, 16);
        emulator::fibers[emulator::current].open.push_back({shared + each * STRIDE, global + each * STRIDE});
    }
}

inline void close_group() {
    auto& fiber = emulator::fibers[emulator::current];
    fiber.groups.push_back(std::move(fiber.open));
    fiber.open.clear();
}

template <int pending>
void await_groups() {
    auto& groups = emulator::fibers[emulator::current].groups;
    for (; groups.size() > pending; groups.pop_front()) {
        for (const auto& copy : groups.front()) memcpy(copy.shared, copy.global, 16);
    }
}

inline float __uint_as_float(unsigned bits) { return emulator::bits_as<float>(bits); }
inline unsigned __float_as_uint(float value) { return emulator::bits_of(value); }
inline float __fmul_rn(float a, float b) { return a * b; }  // -ffp-contract=off
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __int2float_rn(int value) { return (float)value; }
inline int __float2int_rn(float value) { return std::isnan(value) ? INT32_MIN : (int)lrintf(value); }

inline float float_of_half(unsigned short bits) {
    const int exponent = bits >> 10 & 31, fraction = bits & 1023;
    const float size = exponent == 31 ? (fraction ? NAN : INFINITY)
                       : exponent     ? ldexpf((float)(1024 + fraction), exponent - 25)
                                      : ldexpf((float)fraction, -24);
    return bits & 0x8000 ? -size : size;
}

inline unsigned short half_of_float(float value) {
    const unsigned sign = std::signbit(value) ? 0x8000 : 0;
    if (std::isnan(value)) return 0x7fff;
    const float size = fabsf(value);
    if (size >= 65520.0f) return sign | 0x7c00;
    int exponent;
    frexpf(size, &exponent);                                 // size = [0.5, 1) * 2^exponent
    const int unit = size == 0 ? -24 : max(exponent - 11, -24);  // one unit of the last place is 2^unit
    const unsigned units = (unsigned)lrintf(ldexpf(size, -unit));
    return sign | (unit == -24 ? units : ((unsigned)(unit + 24) << 10) + units);
}

inline unsigned short bfloat16_of_float(float value) {
    const unsigned bits = emulator::bits_of(value);
    if (std::isnan(value)) return 0x7fff;
    return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}
