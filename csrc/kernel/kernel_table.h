// The ordered list of ISAs. The first one this machine supports wins; HETERO_GLM5_ISA, the only environment variable C++
// reads, forces one by name.
#pragma once
#include <string>
#include <vector>

#include "kernel/kernels.h"

namespace hetero {

// Tables this machine can run, best first.
std::vector<std::string> isa_names();
// The table of that name; null: the one HETERO_GLM5_ISA names, else the best. Throws on a name that is not present.
const KernelTable& select_kernels(const char* name);

}  // namespace hetero
