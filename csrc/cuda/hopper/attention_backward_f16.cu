#include "attention_backward_launch.h"

template tformer::gpu::Status tformer::gpu::launch_hopper_backward<tformer::gpu::f16>(const AttentionCall&,
                                                                                      const HopperSums&, Stream);
