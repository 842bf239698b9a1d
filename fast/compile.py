"""torch.compile for the convolution blocks: a few per cent, for a minute or two at the start."""

import torch


def compile_resnets(unet: torch.nn.Module) -> None:
    """Have torch.compile make the kernels of each convolution block when it is first called.

    Block by block, since blocks of one shape share their code: the whole UNet would take far longer
    (https://docs.pytorch.org/tutorials/recipes/regional_compilation.html). layers.unwrap() undoes
    it.
    """
    torch._dynamo.config.cache_size_limit = 64  # one entry a shape: SDXL has more than the usual 8
    for module in unet.modules():
        if type(module).__name__ == "ResnetBlock2D":
            module.forward = torch.compile(module.forward, dynamic=False)
