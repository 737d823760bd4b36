#include "attention_forward_launch.h"

template tformer::gpu::Status tformer::gpu::launch_hopper_forward<tformer::gpu::f16>(const AttentionCall&, int,
                                                                                     int32_t*, Stream);
