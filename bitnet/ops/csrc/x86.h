// Intrinsics of x86-64: the compiler's, or plain C++ that does the same for a test on a machine without them
// (tests/ops/emulate.h, named by BITNET_EMULATE).
#pragma once
#include <immintrin.h>
#ifdef BITNET_EMULATE
#include BITNET_EMULATE
#endif
