"""How each platform takes a mean and a sum of squared deviations, with the figures behind it."""

from normjax._core.platforms import cpu, gpu, kernels, tpu

PLATFORMS = {"cpu": cpu, "kernels": kernels, "gpu": gpu, "tpu": tpu}
