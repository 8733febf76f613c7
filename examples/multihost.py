"""Train the network of digits.py on several processes, with checkpoints to resume after a kill.

One command starts all processes on this machine. The same command resumes:

    python examples/multihost.py                  # two processes with two devices each
    python examples/multihost.py --processes 4    # four processes with one device each
    python examples/multihost.py --smoke          # a short run of half a minute

On a cluster, start one process on each host, with the address of the coordinator and its own index.
The folder of the checkpoints must be shared by all hosts. The model does not change.

    python examples/multihost.py --coordinator HOST0:1234 --processes 16 --process 0    # on host 0
    python examples/multihost.py --coordinator HOST0:1234 --processes 16 --process 1    # on host 1
"""

import hashlib
import itertools
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import _common
import digits
import jax
import numpy as np
import orbax.checkpoint as ocp
import shard_map
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from tqdm import tqdm

# A process without a heartbeat for this many seconds counts as dead: the others stop with an error
# and do not wait for it. Use more on a network that drops packets.
HEARTBEAT = 20
# The settings that determine the results. A checkpoint with other settings is of another training.
SETTINGS = ("epochs", "batch_size", "devices", "seed", "momentum")


def parse(argv):
    parser = _common.make_parser(__doc__, epochs=10)
    parser.add_argument("--processes", type=int, default=2, help="number of processes")
    parser.add_argument("--process", type=int, help="index of this process; default: start all")
    parser.add_argument("--coordinator", help="host:port of process 0, the same for all")
    parser.add_argument(
        "--checkpoints", type=Path, default=Path("out/multihost"), help="folder of the checkpoints"
    )
    parser.add_argument("--save-every", type=int, default=5, help="steps between checkpoints")
    parser.add_argument("--resume", action="store_true", help="fail if there is no checkpoint")
    parser.add_argument("--launched", action="store_true", help="stop when standard input closes")
    args = _common.parse(parser, argv)
    if args.processes < 1 or args.devices % args.processes:
        parser.error(f"--devices {args.devices} must be a multiple of --processes {args.processes}")
    if (args.process is None) != (args.coordinator is None):
        parser.error("--process and --coordinator go together: a cluster needs both on each host")
    if args.process is not None and not 0 <= args.process < args.processes:
        parser.error(f"--process {args.process} must be from 0 to {args.processes - 1}")
    args.checkpoints = args.checkpoints.absolute()
    return args


def check_folder(args):
    """Exits with a message if this training cannot use the folder; it changes no file."""
    folder, note = args.checkpoints, args.checkpoints / "settings.json"
    if args.resume and not any(path.name.isdigit() for path in folder.glob("steps/*")):
        sys.exit(
            f"there is no checkpoint in {folder} to resume from. Leave --resume out to start "
            "anew, or name the right folder with --checkpoints."
        )
    if not note.exists():
        if folder.is_dir() and any(folder.iterdir()):
            sys.exit(
                f"{folder} holds files that are not from this script. Nothing was overwritten; "
                "name an empty or new folder with --checkpoints."
            )
        return
    found, wanted = json.loads(note.read_text()), {name: getattr(args, name) for name in SETTINGS}
    if found != wanted:
        other = [
            f"{name}={found.get(name)} there and {wanted[name]} here"
            for name in SETTINGS
            if found.get(name) != wanted[name]
        ]
        sys.exit(
            f"the checkpoint in {folder} is from another training: {', '.join(other)}. Nothing was "
            "overwritten; repeat those settings, or name another folder with --checkpoints."
        )


def note_settings(args):
    try:
        args.checkpoints.mkdir(parents=True, exist_ok=True)
        note = args.checkpoints / "settings.json"
        if not note.exists():
            # Renamed when complete, so that a kill leaves no partial file.
            part = note.with_suffix(".part")
            part.write_text(json.dumps({name: getattr(args, name) for name in SETTINGS}))
            part.replace(note)
    except OSError as error:
        sys.exit(
            f"cannot write {error.filename or args.checkpoints}: {error.strerror or error}. Name "
            "another folder with --checkpoints."
        )


def launch(args, argv):
    """Starts the processes and waits for them; if one fails, it stops the others."""
    check_folder(args)
    note_settings(args)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    logs = args.checkpoints / "logs"
    logs.mkdir(exist_ok=True)
    workers = []
    try:
        for process in range(args.processes):
            command = [sys.executable, __file__, *argv, "--launched"]
            command += ["--coordinator", address, "--process", str(process)]
            with (logs / f"process{process}.txt").open("w") as log:
                # Their standard input is a pipe. It closes when this process ends, even if killed.
                out = None if process == 0 else log
                workers.append(
                    subprocess.Popen(command, stdin=subprocess.PIPE, stdout=out, stderr=log)
                )
        while any(worker.poll() is None for worker in workers):
            if any(worker.poll() for worker in workers):
                break
            time.sleep(0.1)
        codes = [worker.poll() for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
            worker.wait()
    for process, code in enumerate(codes):
        if code:
            why = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
            sys.exit(
                f"process {process} of {args.processes} ended by {why}, and the others were "
                f"stopped. The same command resumes from the last checkpoint. Logs: {logs}"
            )


def obey_launcher():
    """Ends this process when the one that started it ends, even by SIGKILL."""

    def watch():
        while os.read(0, 1):
            pass
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
    # This script prints to the terminal. Output of C++ libraries goes to the log.
    sys.stdout = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)


def join(args):
    """Connects this process with the others; jax.devices() then has the devices of all."""
    jax.config.update("jax_num_cpu_devices", args.devices // args.processes)
    # Collectives between CPU processes need gloo. GPUs use NCCL by default.
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(
        args.coordinator, args.processes, args.process, heartbeat_timeout_seconds=HEARTBEAT
    )


def batches(args, data, start):
    """The batches from step `start` on. They depend only on the step, so a resume has the same.

    All processes compute the same order, and each takes its own rows.
    """
    x_train, _, y_train, _ = data
    size = args.batch_size // args.processes
    mine = slice(args.process * size, (args.process + 1) * size)
    rng = np.random.default_rng(args.seed)
    epochs = (_common.batches(x_train, y_train, args.batch_size, rng) for _ in range(args.epochs))
    for batch in itertools.islice(itertools.chain.from_iterable(epochs), start, None):
        yield [leaf[mine] for leaf in batch]


def train(args, data, model, manager):
    x_train = data[0]
    mesh = Mesh(np.array(jax.devices()), ("batch",))
    rows, whole = NamedSharding(mesh, P("batch")), NamedSharding(mesh, P())
    steps = args.epochs * -(-len(x_train) // args.batch_size)
    optimizer = _common.make_optimizer(steps)

    def start():
        variables = model.init(jax.random.key(args.seed), x_train[:1], train=False)
        return digits.initial_state(variables, optimizer)

    done = manager.latest_step() or 0
    if done:
        state = restore(args, manager, done, jax.eval_shape(start), whole)
    else:
        # All processes compute the same initial state, so none is sent.
        state = jax.jit(start, out_shardings=whole)()
    tell(args, f"starting at step {done} of {steps}")

    step = shard_map.make_step(model, optimizer, mesh)
    bar = tqdm(
        initial=done, total=steps, unit="step", file=sys.stdout, mininterval=0.5,
        disable=args.process != 0, desc="training",
    )  # fmt: skip
    with bar:
        for number, batch in enumerate(batches(args, data, done), start=done + 1):
            batch = [jax.make_array_from_process_local_data(rows, leaf) for leaf in batch]
            state, (loss, _) = step(state, *batch)
            if number % args.save_every == 0 or number == steps:
                # Orbax renames a checkpoint when it is complete, so a kill leaves the previous one.
                manager.save(number, args=ocp.args.StandardSave(state))
                manager.wait_until_finished()
            bar.set_postfix(loss=f"{float(loss):.4f}", refresh=False)
            bar.update()
    # Each process has a copy of the whole state, and reads its own.
    return jax.tree.map(lambda leaf: np.asarray(leaf.addressable_data(0)), state)


def restore(args, manager, step, shapes, whole):
    wanted = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=whole), shapes
    )
    try:
        return manager.restore(step, args=ocp.args.StandardRestore(wanted))
    except (ValueError, KeyError, TypeError, OSError) as error:
        reason = str(error).splitlines()[0][:200]
        tell(
            args,
            f"the checkpoint of step {step} in {args.checkpoints} does not fit this model: "
            f"{reason}\nNothing was overwritten; name another folder with --checkpoints.",
        )
        sys.exit(1)


def tell(args, *words):
    if args.process == 0:
        print(*words, flush=True)


def fingerprint(tree):
    """A hash: equal for equal bits, different otherwise."""
    digest = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        digest.update(jax.tree_util.keystr(path).encode() + leaf.tobytes())
    return digest.hexdigest()


def work(args):
    """The work of each process."""
    check_folder(args)
    join(args)
    if args.process == 0:
        note_settings(args)
    here, everywhere = jax.local_device_count(), jax.device_count()
    tell(args, f"devices: {everywhere}, {here} in each of {args.processes} processes")
    data = _common.load_data(args.seed)
    tell(args, f"data: {len(data[0])} training and {len(data[1])} test images of 8 x 8 pixels")
    model = digits.ResidualNet(args.momentum)
    options = ocp.CheckpointManagerOptions(
        max_to_keep=2, cleanup_tmp_directories=True, enable_async_checkpointing=False
    )
    with ocp.CheckpointManager(args.checkpoints / "steps", options=options) as manager:
        params, batch_stats, _ = train(args, data, model, manager)

    served = {"params": params, "batch_stats": batch_stats}
    accuracy = _common.accuracy(digits.predict(model, served, data[1]), data[3])
    tell(args, f"\ntest accuracy with running statistics (train=False): {accuracy:.4f}")
    mark = fingerprint(served)
    tell(args, f"parameters and running statistics, fingerprint: {mark}")
    marks = multihost_utils.process_allgather(np.frombuffer(bytes.fromhex(mark), np.uint8))
    assert (marks == marks.reshape(-1, 32)[0]).all(), "all processes must have the same bits"
    if not args.smoke:
        assert accuracy >= 0.97, f"expected an accuracy of 0.97, got {accuracy:.4f}"


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    args = parse(argv)
    if args.launched:
        obey_launcher()
    if args.process is None:
        launch(args, argv)
    else:
        work(args)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("\nstopped by Ctrl-C; the same command resumes from the last checkpoint")
