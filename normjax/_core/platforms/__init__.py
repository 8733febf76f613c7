"""How each platform takes a mean and a sum of squared deviations, with the figures behind it."""

from normjax._core.platforms import cpu, gpu, tpu

PLATFORMS = {"cpu": cpu, "gpu": gpu, "tpu": tpu}
