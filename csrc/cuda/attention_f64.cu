#include "attention_backward_launch.h"
#include "attention_forward_launch.h"

template tformer::gpu::Status tformer::gpu::launch_forward<double>(const AttentionCall&, Stream);
template tformer::gpu::Status tformer::gpu::launch_dkv<double>(const AttentionCall&, Stream);
template tformer::gpu::Status tformer::gpu::launch_dq<double>(const AttentionCall&, Stream);
