"""How each platform computes a mean and a sum of squared deviations, with measurements."""

from normjax._core.platforms import cpu, gpu, kernels, tpu

PLATFORMS = {"cpu": cpu, "kernels": kernels, "gpu": gpu, "tpu": tpu}
