"""What a norm costs and how wrong it is, measured against the libraries a user would pick instead.

python -m benchmarks.speed       one layer: time, memory and compile time, against its floor
python -m benchmarks.models      a training step of whole models
python -m benchmarks.stack       a deep stack of convolution, batch norm and activation
python -m benchmarks.compiled    norms on an H100 and a TPU, compiled without either
python -m benchmarks.scaling     shared statistics on many devices
python -m benchmarks.accuracy    one layer: errors against float64, in the form of each platform
python -m benchmarks.second_pass how often batch norm on a GPU or TPU sums twice, in training runs
"""
