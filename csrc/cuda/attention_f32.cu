#include "attention_backward_launch.h"
#include "attention_forward_launch.h"

template tformer::gpu::Status tformer::gpu::launch_forward<float>(const AttentionCall&, Stream);
template tformer::gpu::Status tformer::gpu::launch_dkv<float>(const AttentionCall&, Stream);
template tformer::gpu::Status tformer::gpu::launch_dq<float>(const AttentionCall&, Stream);
