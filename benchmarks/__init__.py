"""Cost and accuracy of norms, compared with other libraries.

python -m benchmarks.speed       one layer: time, memory and compile time, and the floor of its time
python -m benchmarks.models      a training step of whole models
python -m benchmarks.stack       a deep stack of convolution, batch norm and activation
python -m benchmarks.compiled    norms on an H100 and a TPU, compiled without the devices
python -m benchmarks.scaling     shared statistics on many devices
python -m benchmarks.accuracy    one layer: errors relative to float64, in the form of each platform
python -m benchmarks.second_pass how often norms on a GPU or TPU need a second pass in training
"""
