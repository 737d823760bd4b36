#include "attention_forward_launch.h"

template tformer::gpu::Status tformer::gpu::launch_forward<tformer::gpu::bf16>(const AttentionCall&, Stream);
