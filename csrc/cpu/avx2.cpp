#define KD_LANES 8
#define KD_RUN_ROW run_row_avx2
#include "row.inc"
