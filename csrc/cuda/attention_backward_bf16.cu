#include "attention_backward_launch.h"

template tformer::gpu::Status tformer::gpu::launch_one_pass<tformer::gpu::bf16>(const OnePassCall&, size_t, Stream);
template tformer::gpu::Status tformer::gpu::launch_dkv<tformer::gpu::bf16>(const AttentionCall&, Stream);
template tformer::gpu::Status tformer::gpu::launch_dq<tformer::gpu::bf16>(const AttentionCall&, Stream);
