#include "kernel/kernel_table.h"

#include <cstdlib>

#include "base/check.h"
#include "cpu/features.h"
#include "isa_list.h"  // written by cmake: HETERO_ISAS(X) = X(name) for every ISA this compiler can build, best first

namespace hetero {

#define HETERO_DECLARE(isa) extern const KernelTable kernel_table_##isa;
HETERO_ISAS(HETERO_DECLARE)

namespace {

#define HETERO_ENTRY(isa) &kernel_table_##isa,
const KernelTable* const kBuilt[] = {HETERO_ISAS(HETERO_ENTRY)};

}  // namespace

std::vector<std::string> isa_names() {
  std::vector<std::string> names;
  for (const KernelTable* table : kBuilt)
    if ((table->needs & ~cpu_features()) == 0) names.push_back(table->name);
  return names;
}

const KernelTable& select_kernels(const char* name) {
  if (name == nullptr) name = std::getenv("HETERO_GLM5_ISA");
  std::string present;
  for (const KernelTable* table : kBuilt) {
    if (table->needs & ~cpu_features()) continue;
    if (name == nullptr || *name == 0 || std::string(name) == table->name) return *table;
    present += (present.empty() ? "" : ", ") + std::string(table->name);
  }
  refuse("ISA '", name, "' is not present on this machine; present: ", present);
}

}  // namespace hetero
