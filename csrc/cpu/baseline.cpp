#define KD_LANES 4
#define KD_RUN_ROW run_row_baseline
#include "row.inc"
