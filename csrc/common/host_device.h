// What marks a function for host and device.
#pragma once

#if defined(__CUDACC__)
#define LEEDL_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define LEEDL_HOST_DEVICE inline
#endif
