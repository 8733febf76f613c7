"""What a norm costs and how wrong it is, measured against the libraries a user would pick instead.

python -m benchmarks.speed       one layer: time, memory and compile time, against its floor
python -m benchmarks.models      a training step of whole models
python -m benchmarks.stack       a deep stack of convolution, batch norm and activation
python -m benchmarks.compiled    norms on an H100 and a TPU, compiled without either
python -m benchmarks.scaling     shared statistics on many devices
python benchmarks/accuracy.py    one layer: errors against float64
"""
