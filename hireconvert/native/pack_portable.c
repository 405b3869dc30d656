/* The packing for any machine. */
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC optimize("O3")
#endif
#include "pack_body.h"
#include "code_pack_body.h"
#include "head_pack_body.h"

const hire_packers hire_packers_portable = {pack_neurons, code_rows, pack_head, head_energy};
