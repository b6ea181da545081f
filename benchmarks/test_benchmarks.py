"""Benchmarks of convolutions, blocks, whole models and training steps by every provider.

    pytest benchmarks --benchmark-only

`-k resnet50`, `-k frozen` and so on select benchmarks; `--full` runs every case, dtype and provider. pytest-benchmark's
options, such as `--benchmark-json`, `--benchmark-compare` and `--benchmark-group-by`, work as usual. A provider that
cannot run on this machine is skipped with its reason; a wrong result fails.
"""


def test_primitives(case, provider, check_then_time):
    check_then_time(case, provider)


def test_blocks(case, provider, check_then_time):
    check_then_time(case, provider)


def test_inference(case, provider, check_then_time):
    check_then_time(case, provider)


def test_training(case, provider, check_then_time):
    check_then_time(case, provider)
