// The library of operators and the dispatch key that CUDA files register with. The tests compile those files once more
// for the host and give both another value.
#pragma once

#ifndef TFORMER_NAMESPACE
#define TFORMER_NAMESPACE tformer_ext
#define TFORMER_CUDA_KEY CUDA
#endif
