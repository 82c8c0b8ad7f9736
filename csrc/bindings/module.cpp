#include "bindings/bindings.h"

PYBIND11_MODULE(_C, m) {
  m.doc() = "CPU kernels and host threads of hetero_glm5.";
  hetero::bind_cpu(m);
  hetero::bind_weights(m);
  hetero::bind_moe(m);
  hetero::bind_dense(m);
  hetero::bind_probe(m);
  hetero::bind_testing(m);
#ifdef HETERO_PLANTED_BUGS
  hetero::bind_planted(m);
#endif
}
