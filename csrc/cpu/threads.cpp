#include "cpu/isa.h"

#ifdef _OPENMP
#include <omp.h>
#endif

int igva::cpu::granted_threads(int threads) {
  int granted = 1;
#ifdef _OPENMP
  // Where the number of threads is dynamic, what is granted now says nothing about the next region.
  if (threads > 1 && !omp_get_dynamic()) {
#pragma omp parallel num_threads(threads)
#pragma omp master
    granted = omp_get_num_threads();
  }
#endif
  return granted;
}
