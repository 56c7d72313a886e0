// GCC 12 takes the undefined operand inside its own AVX-512 intrinsics for a mistake of ours (GCC
// bug 105593).
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#endif

#define KD_LANES 16
#define KD_RUN_ROW run_row_avx512
#include "row.inc"
