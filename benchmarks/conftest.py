import pytest
import torch

from resnet_kernels.testing import assert_matches

from .providers import arrange, peak_gflops, provider, synchronize


@pytest.fixture
def device():
    return "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture
def check_then_time(benchmark):
    """Time a provider's forward on x, once its result is within the rule; rate and share of the peak in extra_info."""

    def run(name, model, x, flops, reduction, want, exact, rounds):
        module, x = provider(name, model), arrange(name, x)
        with torch.no_grad():
            for _ in range(2):
                y = module(x)
            assert_matches(y, want, exact, reduction, name)

            def step():
                module(x)
                synchronize(x)

            benchmark.pedantic(step, rounds=rounds, warmup_rounds=1)
        rate = flops / benchmark.stats.stats.median / 1e9
        peak = peak_gflops(x.device.type, x.dtype)
        benchmark.extra_info.update(
            provider=name,
            dtype=str(x.dtype),
            batch=x.shape[0],
            gflops=round(rate, 1),
            peak_gflops=round(peak, 1),
            share_of_peak=round(rate / peak, 3),
            images_per_second=round(x.shape[0] / benchmark.stats.stats.median, 2),
            torch=torch.__version__,
            threads=torch.get_num_threads(),
            device=torch.cuda.get_device_name() if x.is_cuda else torch.backends.cpu.get_cpu_capability(),
        )

    return run
