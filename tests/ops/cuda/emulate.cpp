// Reads launches from standard input, runs them in the emulator, and writes the buffers back, until the input ends.
//
//     request   int32 backwards, buffers, launches
//               a buffer:  int64 bytes, the bytes
//               a launch:  int32 length of the name, the name, int32 grid x, y, block size, arguments
//               an argument: int32 kind (0 a number, 1 a buffer, 2 null), int32 number or index
//     answer    the bytes of every buffer, in order
#include "emulator.h"
#include "packed_linear.cu"

#include <string>
#include <type_traits>
#include <utility>

struct Argument { int kind, value; };

static std::vector<void*> buffers;

template <class T>
T value_of(const Argument& argument) {
    if constexpr (std::is_pointer_v<T>) {
        if (argument.kind == 0) emulator::stop("a number where a buffer belongs");
        return argument.kind == 2 ? nullptr : (T)buffers.at(argument.value);
    } else {
        if (argument.kind != 0) emulator::stop("a buffer where a number belongs");
        return argument.value;
    }
}

template <class... Parameters, size_t... places>
void call(void (*kernel)(Parameters...), const std::vector<Argument>& arguments, std::index_sequence<places...>) {
    kernel(value_of<Parameters>(arguments[places])...);
}

template <class... Parameters>
std::function<void()> bound(void (*kernel)(Parameters...), const std::vector<Argument>& arguments) {
    if (arguments.size() != sizeof...(Parameters)) emulator::stop("another number of arguments than the kernel takes");
    return [=] { call(kernel, arguments, std::index_sequence_for<Parameters...>()); };
}

static std::function<void()> kernel_named(const std::string& name, const std::vector<Argument>& arguments) {
#define KERNEL(NAME) if (name == #NAME) return bound(NAME, arguments)
    KERNEL(quantize_rows);
    KERNEL(multiply_1);
    KERNEL(multiply_2);
    KERNEL(multiply_8);
    KERNEL(multiply_16);
    KERNEL(multiply_32);
    KERNEL(multiply_tiles_64x32);
    KERNEL(multiply_tiles_128x64);
    emulator::stop("no such kernel");
}

template <class T = int>
T next() {
    T value;
    if (fread(&value, sizeof value, 1, stdin) != 1) emulator::stop("the request ends too early");
    return value;
}

static void run(const std::string& name, Index grid, unsigned block_size, const std::vector<Argument>& arguments,
                bool backwards) {
    emulator::kernel = kernel_named(name, arguments);
    emulator::block_size = {block_size, 1, 1};
    emulator::grid_size = grid;
    for (unsigned y = 0; y < grid.y; ++y) {
        for (unsigned x = 0; x < grid.x; ++x) {
            emulator::block = {x, y, 0};
            emulator::run_block(backwards);
        }
    }
}

int main() {
    int backwards;
    while (fread(&backwards, sizeof backwards, 1, stdin) == 1) {
        const int count = next(), launches = next();
        std::vector<size_t> sizes(count);
        buffers.assign(count, nullptr);
        for (int each = 0; each < count; ++each) {
            sizes[each] = next<int64_t>();
            buffers[each] = malloc(sizes[each]);
            if (fread(buffers[each], 1, sizes[each], stdin) != sizes[each]) emulator::stop("a buffer ends too early");
        }
        for (int each = 0; each < launches; ++each) {
            std::string name(next(), ' ');
            for (char& letter : name) letter = next<char>();
            const unsigned x = next(), y = next(), block_size = next();
            std::vector<Argument> arguments(next());
            for (Argument& argument : arguments) argument = next<Argument>();
            run(name, {x, y, 1}, block_size, arguments, backwards);
        }
        for (int each = 0; each < count; ++each) {
            fwrite(buffers[each], 1, sizes[each], stdout);
            free(buffers[each]);
        }
        fflush(stdout);
    }
}
