// The peak of float32 multiply-adds: a loop on registers alone. Compiled by fma_peak.py with the options of an
// instruction set, and WIDTH, the floats of its vectors.
typedef float Floats __attribute__((vector_size(4 * WIDTH)));

enum { sums = 12 };  // independent sums: more than latency times throughput on known chips, with registers to spare

// Multiplies and adds `steps` times `sums` vectors, and returns a number that depends on all of them.
float multiply_add(long steps) {
  Floats total[sums], left, right;
  for (int i = 0; i < sums; ++i) total[i] = (Floats){0};
  for (int i = 0; i < WIDTH; ++i) left[i] = 1e-9f, right[i] = 1;
  for (long step = 0; step < steps; ++step) {
#pragma GCC unroll 12
    for (int i = 0; i < sums; ++i) total[i] += left * right;
    __asm__ volatile("" : "+" REGISTER (left), "+" REGISTER (right));  // the products are not moved out of the loop
  }
  float result = 0;
  for (int i = 0; i < sums; ++i) result += total[i][0];
  return result;
}

long operations(long steps) { return 2 * steps * sums * WIDTH; }
