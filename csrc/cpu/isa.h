// RK_MULTI_ISA compiles a function for several x86-64 instruction sets; the loader picks the best one the CPU supports.
#pragma once

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define RK_MULTI_ISA __attribute__((target_clones("default", "arch=x86-64-v3", "arch=x86-64-v4")))
#else
#define RK_MULTI_ISA
#endif
