"""Train, evaluate and compare the methods: `python train.py --method mwt --dataset mnist`; `--help` lists the options.

A run is a folder with config.json, history.csv, model.keras, results.json and figures. `--resume FOLDER` continues an
interrupted run, which ends with the same weights as an uninterrupted one. `--evaluate FOLDER` and `--predict FOLDER
IMAGE…` use a finished run, `--ablate NAME` trains and compares variants, `--benchmark` times a training step.

A method is a file beside this one that defines `TASKS`, a dict from a task ("classify", "fit", …) to a namespace with

    hyperparameters  {name: (value, help text)}; each becomes a command-line option
    presets          {preset: {hyperparameter: value}}; "quick" is the default ("quick-3d" for surfaces);
                     all have batch_size and epochs
    build            (options, dataset, steps_per_epoch) -> [(subfolder, compiled model, epochs)], trained in this
                     order; the subfolder of the main model is "". Raises ValueError for invalid options
    report           (models, images, labels, class_names, finer) -> further results {name: {name: number}}, and
                     figures {name: rows of (picture, title)}; in --predict, labels is None, there is one image, and
                     models has the main model only
    ablations        {name: [{hyperparameter: value}, …]}, one dict per variant
    points           optional, for surfaces: options -> the argument `points` of `data.load_surfaces`
    describe         optional: (model, input, class_names) -> what --predict prints; otherwise the likeliest classes
"""

import argparse
import contextlib
import csv
import ctypes
import datetime
import functools
import importlib
import io
import json
import math
import os
import pathlib
import platform
import signal
import statistics
import sys
import time
import zipfile
from unittest import mock

os.environ.setdefault("KERAS_BACKEND", "torch")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler of --benchmark would print lines of its own

import keras
import numpy as np
import torch
from matplotlib.figure import Figure
from torch.utils.flop_counter import FlopCounterMode

import data

try:
    import fcntl
    import resource
except ImportError:  # Windows
    fcntl = resource = None

# Keras looks for TensorFlow at its first use and would import it, which takes seconds. None stands for "not installed".
with mock.patch.dict(sys.modules, tensorflow=None):
    keras.utils.set_random_seed(0)

METHODS = ("mwt", "hyperinr", "inrn")
NOT_IN_CONFIG = {"resume", "evaluate", "predict", "benchmark", "ablate", "seeds", "run_dir", "memory"}
PROCESSES = int(os.environ["WORLD_SIZE"]) if "RANK" in os.environ else 1  # set by torchrun
RANK = int(os.environ["RANK"]) if PROCESSES > 1 else 0
RESTARTS = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")  # of the same command, by torchrun


# ---- Options ----


def refuse(message):
    """Exits with status 2 and a one-line message."""
    time.sleep(3 if RANK else 0)  # if the first process exits too, torchrun ends this one before the line is repeated
    print(f"train.py: {' '.join(str(message).split())}", file=sys.stderr)
    raise SystemExit(2)


@contextlib.contextmanager
def refusing(action, advice, errors=Exception):
    """Exits with a one-line message if the body raises one of the errors."""
    try:
        yield
    except errors as error:
        refuse(error if isinstance(error, (ImportError, data.DataError)) else  # these say what to do
               f"cannot {action} ({type(error).__name__}: {str(error)[:200]}): {advice}")


def number(kind, lowest):
    """argparse type: a finite int or float that is at least `lowest`."""
    def convert(text):
        with contextlib.suppress(ValueError):
            if lowest <= kind(text) < 2**32:  # false for nan
                return kind(text)
        name = "an integer" if kind is int else "a number"
        raise argparse.ArgumentTypeError(f"{text!r} is not {name} from {lowest} up (and below 2**32)")
    return convert


def flag(name):
    return "--" + name.replace("_", "-")


def parse(arguments):
    """Returns the options, hyperparameters included, as one namespace, and the method's task.

    The tasks depend on --method, the presets on --task, and the hyperparameters on --preset, so the parser is extended
    after reading each of them. For an existing run, config.json provides the defaults of all options.
    """
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], add_help=False, allow_abbrev=False)
    parser.error = refuse  # one line, without the usage
    use = parser.add_argument_group("instead of a new run").add_mutually_exclusive_group()
    use.add_argument("--resume", type=pathlib.Path, metavar="RUN_FOLDER", help="continue an interrupted run")
    use.add_argument("--evaluate", type=pathlib.Path, metavar="RUN_FOLDER",
                     help="evaluate a run, also on another --dataset")
    use.add_argument("--predict", type=pathlib.Path, nargs="*", metavar=("RUN_FOLDER", "FILE"),
                     help="classify image files, or find the objects in them (for surfaces: .off files)")
    use.add_argument("--benchmark", action="store_true", help="time a training step")
    known = parser.parse_known_args(arguments)[0]
    if known.predict is not None and len(known.predict) < 2:
        refuse("--predict needs the folder of a run, followed by image files (for surfaces: .off files)")
    folder = known.resume or known.evaluate or (known.predict or [None])[0]
    config = {**read_config(folder), "run_dir": folder} if folder else {}

    def choose(name, choices, default):
        parser.add_argument("--" + name, choices=choices, default=config.get(name, default), help=f"default: {default}")
        return getattr(parser.parse_known_args(arguments)[0], name)

    with refusing("import the method", "unset KERAS_BACKEND"):
        method = importlib.import_module(choose("method", METHODS, METHODS[0]))
    name = choose("task", method.TASKS, "classify")
    task, add = method.TASKS[name], parser.add_argument
    add("--dataset", default=data.BUILT_IN.get(name, "shapes"),
        help="shapes (default), solids, modelnet10, modelnet40, or the TFDS name of an image classification dataset; "
             "with --task fit: shapes, shapes-video, an image file, or a folder of frames; with --task detect and "
             "segment: scenes (default) or coco")
    surfaces = parser.parse_known_args(arguments)[0].dataset in data.SURFACES and "quick-3d" in task.presets
    preset = task.presets[choose("preset", task.presets, "quick-3d" if surfaces else "quick")]
    add("--seed", type=number(int, 0), default=0, help="of weights, data order, augmentation and shapes (default: 0)")
    add("--limit", type=number(int, 1), help="largest number of training images (default: all)")
    add("--validation-images", type=number(int, 0), help="training images held out for validation (default: 2000)")
    add("--image-size", type=number(int, 8),
        help="scale and crop images to this size; longest side of frames (default: 320) and of images with objects")
    add("--squash", action="store_true", help="stretch images to --image-size instead of cropping them")
    add("--augment", nargs="?", const=True, default=False, choices=["crop"],
        help="shift images at random, and mirror them unless they show characters; rotate and scale images of 128×128 "
             "and more; with crop: random resized crops instead; with objects: scale, crop and mirror")
    add("--memory", type=number(float, 0), default=1.0, help="GB of images that each split keeps (default: 1)")
    add("--data-dir", type=lambda text: text if "://" in text else os.path.abspath(os.path.expanduser(text)),
        help="folder of ModelNet, COCO or TFDS (for TFDS: $TFDS_DATA_DIR or ~/tensorflow_datasets)")
    add("--run-dir", type=pathlib.Path, help="output folder (default: runs/<method>-<task>-<dataset>-<preset>-<seed>)")
    add("--save-every", type=number(int, 1), default=500, help="steps between checkpoints in an epoch (default: 500)")
    add("--precision", choices=["float32", "mixed_bfloat16"], default="float32",
        help="of everything but the INR; bfloat16 is slower on CPUs without instructions for it (default: float32)")
    add("--compile", action="store_true",
        help="compile the INR with torch.compile (takes a minute or more at the first start; needs a C++ compiler)")
    use.add_argument("--ablate", choices=task.ablations, help="train variants of the model and compare them")
    add("--seeds", type=number(int, 1), default=2, help="seeds per variant of --ablate, from --seed up (default: 2)")
    group = parser.add_argument_group("hyperparameters", "the defaults are those of the chosen --preset")
    for name, value in preset.items():
        kind = {"metavar": type(value).__name__.upper(), "type": number(float, 0)}
        if isinstance(value, bool):
            kind = {"action": argparse.BooleanOptionalAction}
        elif isinstance(value, int):
            kind["type"] = number(int, min(1, value))
        elif isinstance(value, str):  # the path of a model file has to be valid in every working directory
            kind["type"] = lambda text: os.path.abspath(text) if text.endswith(".keras") else text
        group.add_argument(flag(name), default=value, **kind,
                           help=f"{task.hyperparameters[name][1]} (default: {value})")
    add("-h", "--help", action="help", help="show this help for the given --method, --task and --preset")
    parser.set_defaults(**config)
    options = parser.parse_args(arguments)
    if options.task == "fit" and options.dataset not in ("shapes", "shapes-video"):
        options.dataset = os.path.abspath(options.dataset)  # valid in every working directory
    refuse_changes(options, config, {"dataset", "data_dir", "image_size"} if options.evaluate else {"data_dir"})
    for name in {name for variant in task.ablations.get(options.ablate, ()) for name in variant}:
        if getattr(options, name) != preset[name]:
            refuse(f"--ablate {options.ablate} sets {flag(name)} itself: remove it")
    options.run_dir = options.run_dir or pathlib.Path("runs", "-".join([
        options.method, options.task, file_name(options.dataset), options.preset, options.ablate or str(options.seed)]))
    return options, task


def refuse_changes(options, config, free):
    """Exits if an option, unless it is free to change, contradicts the config.json of the run that it applies to."""
    for name, value in config.items():
        if name not in free and getattr(options, name, value) != value:
            refuse(f"{flag(name)} {getattr(options, name)} contradicts the run's config.json, which says {value}: "
                   "remove the option, or start a new run")


def read_config(folder):
    """The content of a run's config.json."""
    path = folder / "config.json"
    with refusing(f"read {path}", "use the folder that a run has printed, or restore the file from a backup"):
        config = {"axes": 2, **json.loads(path.read_text())}
        if config["method"] not in METHODS or not {"task", "preset", "image_shape", "class_names"} <= config.keys():
            raise ValueError("not written by this program")
        return config


def file_name(dataset):
    """The name of a dataset for use in file names."""
    return pathlib.Path(dataset).stem if os.path.isabs(dataset) else dataset.replace("/", "-")


# ---- Data ----


@contextlib.contextmanager
def first_process_first():
    """The first process downloads or prepares files, then the others find them."""
    if RANK:
        torch.distributed.barrier()
    yield
    if PROCESSES > 1 and RANK == 0:
        torch.distributed.barrier()


def load_dataset(options, task):
    """The `data.Dataset` that the options name. Raises data.DataError."""
    data.Split.room, points = options.memory * 2**30, getattr(task, "points", lambda options: None)
    with first_process_first():
        return data.LOADERS[options.task](options.dataset, options.data_dir, options.image_size, options.seed,
                                          points(options), options.squash)


def to_tensors(batch):
    """The arrays of a batch as tensors, on a GPU if there is one. Any thread can call it."""
    pin = torch.cuda.is_available()
    if pin and PROCESSES > 1:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))  # of this thread
    return keras.tree.map_structure(
        lambda x: keras.ops.convert_to_tensor(torch.from_numpy(x).pin_memory() if pin else x), batch)


def training_batches(options, dataset):
    """Training batches, of which each process gets its share, and validation batches or None."""
    if dataset.validation and (options.augment or options.limit or options.validation_images is not None):
        refuse("frames are fitted as they are: remove --limit, --validation-images and --augment")
    count = 0 if dataset.validation else 2000 if options.validation_images is None else options.validation_images
    repeats = -(-200 // len(dataset.train)) if dataset.validation else 1  # an epoch has at least 200 frames
    order = np.random.default_rng(options.seed).permutation(repeats * len(dataset.train)) % len(dataset.train)
    held_out, chosen = np.split(order, [count])
    chosen = chosen[:options.limit]
    if len(chosen) < options.batch_size:
        refuse(f"{len(chosen)} training images do not fill a batch of {options.batch_size}: "
               "use a smaller --batch-size or --validation-images, or a larger --limit")
    if options.batch_size % PROCESSES:
        refuse(f"{PROCESSES} processes cannot share a batch of {options.batch_size}: use a multiple as --batch-size")
    batches = data.Batches(dataset.train, chosen, options.batch_size, options.seed, options.augment, dataset.flip,
                           slice(RANK, None, PROCESSES))
    validation = (dataset.validation,) if dataset.validation else (dataset.train, held_out) if count else None
    return batches, validation and evaluation_batches(options, dataset, *validation)


def evaluation_batches(options, dataset, split, indices=None):
    """Batches of this process's images, small for their memory: with as many pixels as 200 images of 28×28, or 8 images
    if training has as many."""
    indices = np.arange(len(split)) if indices is None else indices
    if len(indices) < PROCESSES:
        refuse(f"{PROCESSES} processes cannot share fewer images: use fewer processes, or more --validation-images")
    size = max(1, min(8, options.batch_size // PROCESSES), 200 * 28**2 // math.prod(dataset.image_shape[:2]))
    return data.Batches(split, indices[RANK::PROCESSES], size)


# ---- Several processes: each computes its share of every batch; the gradients are averaged, the metrics added ----


def add_metrics(model):
    """Adds the metrics of all processes in the first one, and resets the others. Returns those of the first one.
    Averages the moving statistics of batch normalization, which each process computes of its share."""
    moving = [(v, 1 / PROCESSES) for v in model.non_trainable_variables if v.dtype == "float32"]
    metrics = [(v, float(RANK == 0)) for metric in model.metrics for v in metric.variables]
    for variable, factor in [*moving, *metrics] if PROCESSES > 1 else ():
        torch.distributed.all_reduce(variable.value)
        variable.assign(variable.value * factor)
    return {name: float(value) for name, value in model.get_metrics_result().items()}


def evaluate_model(model, batches):
    """As `model.evaluate`, but with batches prepared ahead. (Keras 3.15 has threads for that; they skip and repeat
    batches of a model that was compiled with metrics and then loaded.)"""
    model.reset_metrics()
    with torch.no_grad():
        for batch in batches.ahead(0, to_tensors):
            model.test_step(batch)
    return add_metrics(model)


# ---- A run: training that can be interrupted at any moment ----


def interrupt(number, frame):
    """Handles SIGINT and SIGTERM; the argument of the exception is the number of the signal."""
    raise KeyboardInterrupt(number)


@contextlib.contextmanager
def signal_handler(handler):
    with contextlib.ExitStack() as stack:
        for number in (signal.SIGINT, signal.SIGTERM):
            stack.callback(signal.signal, number, signal.signal(number, handler))
        yield


@contextlib.contextmanager
def locked(folder):
    """Creates the folder, unless it exists, and refuses it while another process uses it. Removes it if it is empty."""
    folder.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        if fcntl and RANK == 0:
            stack.callback(os.close, descriptor := os.open(folder, os.O_RDONLY))
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                refuse(f"{folder} is in use by another process: wait until it ends, or use another --run-dir")
        try:
            yield
        finally:
            if RANK == 0:
                with contextlib.suppress(OSError):
                    folder.rmdir()


def write_atomically(path, write):
    """Calls write(temporary path), then renames that file to `path`. If the process or the machine stops at any moment,
    `path` is the old or the new file, never a partial one. Of several processes, the first one writes."""
    if RANK:
        return
    temporary = path.with_name("new-" + path.name)
    try:
        write(temporary)
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
    except BaseException:
        temporary.unlink(missing_ok=True)  # frees the space if the disk is full
        raise
    os.replace(temporary, path)


def write_json(path, content):
    write_atomically(path, lambda temporary: temporary.write_text(json.dumps(content, indent=1)))


def write_csv(path, rows):
    """rows: dicts with the same keys."""
    text = io.StringIO(newline="")
    csv.writer(text).writerows([rows[0], *([row[name] for name in rows[0]] for row in rows)])
    write_atomically(path, lambda temporary: temporary.write_text(text.getvalue(), newline=""))


class Run:
    """Trains one model, with checkpoints in its folder; continues from the checkpoint if there is one.

    A training step depends only on the variables (weights, optimizers, seed generators, metrics), the seed, the epoch
    and the step, so a checkpoint consists of the variables and the position. It is one file, replaced atomically.
    """

    def __init__(self, folder, model, epochs, batches, validation, save_every):
        self.folder, self.model, self.epochs, self.batches, self.validation = folder, model, epochs, batches, validation
        self.save_every, self.signal, self.checkpoint = save_every, 0, folder / "checkpoint.pt"
        self.epoch, self.step = 0, 0  # complete epochs, and complete steps of the current epoch
        self.seconds, self.shown, self.history = 0.0, -math.inf, []
        if self.checkpoint.exists() or (folder / "history.csv").exists():
            with refusing(f"read {self.checkpoint}", "restore it from a backup, or start again with another --run-dir"):
                self.restore()
        for optimizer in model.optimizers if PROCESSES > 1 else ():
            optimizer.apply = functools.partial(self.apply, optimizer.apply)
        if RANK:  # the first process has the metrics of all, and each its own random numbers
            model.reset_metrics()
            for variable in [variable for variable in model.variables if "seed_generator" in variable.path]:
                variable.assign(variable.numpy() + np.uint32([RANK, 0]))

    def variables(self):
        return [v for part in (self.model, *self.model.optimizers, *self.model.metrics) for v in part.variables]

    def restore(self):
        with zipfile.ZipFile(self.checkpoint) as file:  # torch.load does not verify the checksums
            if damaged := file.testzip():
                raise ValueError(f"wrong checksum of {damaged}")
        position, values = torch.load(self.checkpoint, map_location="cpu", weights_only=True)
        for variable, value in zip(self.variables(), values, strict=True):
            variable.assign(value)
        vars(self).update(position)

    def save(self):
        add_metrics(self.model)
        if RANK:
            return
        self.seconds = time.perf_counter() - self.start
        position = {name: getattr(self, name) for name in ("epoch", "step", "seconds", "history")}
        buffer = io.BytesIO()  # on a full disk, torch.save would raise a RuntimeError that does not say so
        torch.save((position, [variable.value.detach() for variable in self.variables()]), buffer)
        write_atomically(self.checkpoint, lambda temporary: temporary.write_bytes(buffer.getbuffer()))

    def on_signal(self, number, frame):
        """The first signal lets the current step finish; the second one ends the program at once."""
        if self.signal:
            raise KeyboardInterrupt(number)
        self.signal = number

    def train(self):
        """Trains the remaining epochs, from any step. (`keras.Model.fit` can only start at the beginning of an epoch.)
        Raises KeyboardInterrupt after saving the state, or OSError if saving fails."""
        self.folder.mkdir(exist_ok=True)
        self.start = time.perf_counter() - self.seconds
        if not self.checkpoint.exists():
            self.save()
        with signal_handler(self.on_signal):
            while self.epoch < self.epochs:
                self.batches.begin(self.epoch + 1)
                for batch in self.batches.ahead(self.step, to_tensors):
                    self.train_step(batch)
        if self.signal:  # it arrived in the last validation
            raise KeyboardInterrupt(self.signal)

    def apply(self, apply, gradients, variables):
        """Calls `apply` of an optimizer with the mean of the gradients of all processes. The first call in a training
        step averages those of all optimizers, and the signals, in one exchange."""
        if self.shared is None:
            tensors = [v.value.grad for v in self.model.trainable_variables if v.value.grad is not None]
            tensors.append(torch.full_like(tensors[0].flatten()[:1], self.signal))
            vector = torch.nn.utils.parameters_to_vector(tensors) / PROCESSES
            torch.distributed.all_reduce(vector)
            torch.nn.utils.vector_to_parameters(vector, tensors)
            self.shared = torch.stack([vector.sum(), vector[-1]])  # the sum is finite only if all gradients are
        apply(gradients, variables)

    def train_step(self, batch):
        self.shared = None
        logs = self.model.train_step(batch)
        self.step += 1
        # Read once: a signal can arrive at any moment. Several processes read the same values, so all stop together.
        finite, stop = self.shared.tolist() if PROCESSES > 1 else (float(logs["loss"]), self.signal)
        stop = stop and (self.signal or signal.SIGTERM)
        last = self.step == len(self.batches)
        save = stop or last or self.step % self.save_every == 0
        values = [variable.value for variable in self.model.trainable_variables if save]
        if not math.isfinite(finite) or save and not torch.stack([torch.isfinite(v).all() for v in values]).all():
            before = f". {self.folder} has the model after {self.epoch} epochs" if self.epoch else ""
            refuse(f"stopped in step {self.step} of epoch {self.epoch + 1}: the loss or a weight became NaN or "
                   f"infinite; use lower learning rates{before}")
        if last:
            self.end_epoch()
        else:
            self.show_progress(logs)
        if save or stop:
            self.save()
        if stop:
            raise KeyboardInterrupt(stop)

    def end_epoch(self):
        """Validates, and writes history.csv and model.keras. These precede the checkpoint: if the process is killed in
        between, the run continues before them and writes them again."""
        logs = add_metrics(self.model)
        if self.validation:
            logs |= {f"val_{name}": value for name, value in evaluate_model(self.model, self.validation).items()}
        self.show_progress(logs, end="\n")
        self.history.append({"epoch": self.epoch, **logs})
        write_atomically(self.folder / "model.keras", self.model.save)
        write_csv(self.folder / "history.csv", self.history)
        self.epoch, self.step = self.epoch + 1, 0
        self.model.reset_metrics()

    def show_progress(self, logs, end="\r"):
        """Prints the metrics and the time left: on a terminal beside a bar, in a log file every 30 seconds."""
        now, terminal = time.perf_counter(), sys.stdout.isatty()
        if end == "\r" and now - self.shown < (0.2 if terminal else 30):
            return
        steps, self.shown = len(self.batches), now
        done = self.epoch * steps + self.step
        left = datetime.timedelta(seconds=round((now - self.start) / done * (self.epochs * steps - done)))
        bar = "[" + ("=" * (20 * self.step // steps)).ljust(20) + "] " if terminal else ""
        metrics = ", ".join(f"{name} {float(value):.4g}" for name, value in logs.items())
        print(f"{bar}epoch {self.epoch + 1}/{self.epochs}, step {self.step}/{steps}: {metrics}; {left} left",
              end="\x1b[K" + end if terminal else "\n", flush=True)


def build(options, task, dataset, steps_per_epoch):
    """The task's models, after setting the seed and the precision. Exits if the options are invalid."""
    keras.utils.set_random_seed(options.seed)
    keras.config.set_dtype_policy(options.precision)
    if options.compile:
        with refusing("compile", "install a C++ compiler such as g++, or leave out --compile"):
            torch.compile(torch.neg)(keras.ops.zeros(1))
    try:
        with first_process_first():
            return task.build(options, dataset, steps_per_epoch)
    except (ValueError, ImportError) as error:
        refuse(error)


def train(options, task):
    """Starts or continues a run, then evaluates it."""
    folder = options.run_dir
    with locked(folder):
        if (options.ablate or RESTARTS != "0") and (folder / "config.json").exists():  # the same command continues
            refuse_changes(options, read_config(folder), {"data_dir"})
            options.resume = True
        if not options.resume and any(path.name != "new-config.json" for path in folder.iterdir()):
            refuse(f"{folder} already holds a run: use --resume, another --run-dir or --seed, or delete it")
        if (folder / "results.json").exists():
            print(f"{folder} holds a finished run: nothing to do")
        else:
            train_models(options, task)
        for checkpoint in folder.rglob("checkpoint.pt"):
            checkpoint.unlink(missing_ok=True)


def train_models(options, task):
    folder, dataset = options.run_dir, load_dataset(options, task)
    batches, validation = training_batches(options, dataset)
    models = build(options, task, dataset, len(batches))
    with first_process_first():  # most errors in the data have to appear before training
        dataset.train[np.arange(1)], dataset.test[np.arange(1)]
    runs = {subfolder or options.method: Run(folder / subfolder, model, epochs, batches, validation, options.save_every)
            for subfolder, model, epochs in models}
    if PROCESSES > 1:
        torch.distributed.barrier()  # all have read the same checkpoint
    if not options.resume:
        versions = {"python": platform.python_version(), **{m.__name__: m.__version__ for m in (keras, torch, np)}}
        write_json(folder / "config.json", {
            **{name: value for name, value in vars(options).items() if name not in NOT_IN_CONFIG},
            **{name: getattr(dataset, name) for name in ("image_shape", "axes", "class_names")}, "versions": versions})
    print(f"{options.method} on {options.dataset}: {len(batches.indices):,} training images of {dataset.image_shape}, "
          f"{len(dataset.test):,} test images; {device_name()}", flush=True)
    for run in runs.values():
        print(f"{run.folder}: {run.epochs} epochs of {len(batches)} steps, {run.epoch} and {run.step} done", flush=True)
        run.train()
    results = report(options, task, dataset, folder)
    for name, run in runs.items():
        (results if name == options.method else results[name])["seconds_per_epoch"] = run.seconds / run.epochs
    draw_curves({name: run.history for name, run in runs.items()}, folder / "curves.png")
    write_json(folder / "results.json", results)
    print(folder)


def ablate(options, task):
    """Trains every variant with every seed, each as a run of its own, and compares the results in table.csv. The same
    command continues an interrupted ablation."""
    folder, rows, variants = options.run_dir, [], task.ablations[options.ablate]
    with locked(folder):
        for variant in variants:
            varied = {name: value for name, value in variant.items() if any(x.get(name) != value for x in variants)}
            label, results = ", ".join(f"{name} {value}" for name, value in varied.items()), []
            for seed in range(options.seed, options.seed + options.seeds):
                part = folder / f"{label.replace(', ', '-').replace(' ', '-')}-{seed}"
                train(argparse.Namespace(**{**vars(options), **variant, "seed": seed, "run_dir": part}), task)
                results.append(json.loads((part / "results.json").read_text()))
            row = {options.ablate: label, "parameters": results[0]["parameters"]}
            for name in [name for name in results[0] if name.startswith(("test_", "seconds"))]:
                values = [result[name] for result in results]
                row |= {name: statistics.mean(values), f"{name} ±": statistics.stdev(values) if values[1:] else 0.0}
            rows.append(row)
        write_csv(folder / "table.csv", rows)
    for cells in ([*rows[0]], ["---"] * len(rows[0]), *(row.values() for row in rows)):
        print("| " + " | ".join(f"{cell:.5g}" if isinstance(cell, float) else str(cell) for cell in cells) + " |")
    print(folder / "table.csv")


# ---- Evaluation and prediction ----


def load_model(folder):
    """The model of a run."""
    path = folder / "model.keras"
    with refusing(f"load {path}", "train again, or restore it from a backup"):
        return keras.saving.load_model(path)


def device_name():
    kind = keras.ops.zeros(1).device.type
    return torch.cuda.get_device_name() if kind == "cuda" else f"{kind.upper()}, {torch.get_num_threads()} threads"


def report(options, task, dataset, target):
    """Evaluates a run's models on the test split, writes figures to `target` and returns the results: the main model's
    at the top level, those of other models under the names of their subfolders. Ends all processes but the first."""
    others = sorted(path.parent for path in options.run_dir.glob("*/model.keras"))
    models = {options.method: load_model(options.run_dir), **{path.name: load_model(path) for path in others}}
    results = {name: getattr(options, name) for name in ("method", "task", "preset", "dataset")}
    results["device"] = device_name()
    with first_process_first():
        dataset.test[np.arange(1)]
    for name, model in models.items():
        metrics = evaluate_model(model, evaluation_batches(options, dataset, dataset.test))
        values = {f"test_{metric}": value for metric, value in metrics.items()} | {"parameters": model.count_params()}
        results |= values if name == options.method else {name: values}
        formats = {"accuracy": "test accuracy {:.2%}", "top5_accuracy": "top-5 {:.2%}", "psnr": "PSNR {:.2f} dB",
                   "ssim": "SSIM {:.4f}", "mae": "mean absolute error {:.4f}", "map_50": "mAP@0.5 {:.1%}",
                   "bbox_map_50": "mAP@0.5 of boxes {:.1%}", "segm_map_50": "mAP@0.5 of masks {:.1%}"}
        shown = [text.format(metrics[metric]) for metric, text in formats.items() if metric in metrics]
        print(f"{name}: {', '.join(shown)} on {len(dataset.test):,} examples; {model.count_params():,} parameters")
    if PROCESSES > 1:
        torch.distributed.destroy_process_group()  # otherwise a process can abort when it exits
    if RANK:
        raise SystemExit
    count = min(len(dataset.test), 1000, max(8, 2**20 // math.prod(dataset.image_shape[:2])))
    shown = np.linspace(0, len(dataset.test) - 1, 3, dtype=int) if dataset.validation else np.arange(count)
    images, labels = dataset.test.examples(np.unique(shown))
    further, figures = task.report(models, images, labels, dataset.class_names, dataset.finer)
    for name, values in further.items():
        print(f"{name}: " + ", ".join(f"{what} {value:.4g}" for what, value in values.items()))
    for name, rows in figures.items():
        draw_grid(rows, target / f"{name}.png")
    return results | further


def evaluate(options, task):
    """Evaluates a run on the test split of its dataset, or of another one with the same number of classes."""
    folder, dataset = options.run_dir, load_dataset(options, task)
    numbers = [f"{len(x.class_names)} classes, {x.axes} axes, {x.image_shape[-1]} channels" if x.class_names else
               f"frames of {x.image_shape[0]}×{x.image_shape[1]}" for x in (dataset, options)]
    if numbers[0] != numbers[1]:
        refuse(f"{options.dataset} has {numbers[0]}, the model of {folder} has {numbers[1]}: use a matching --dataset")
    size = "" if options.image_size == read_config(folder)["image_size"] else f"-{options.image_size}"
    target = folder / f"evaluation-{file_name(options.dataset)}{size}"
    advice = "use a matching --dataset and --image-size"  # a teacher, for example, takes images of one size
    with locked(target), refusing(f"evaluate {folder} on {options.dataset}", advice, ValueError):
        write_json(target / "results.json", report(options, task, dataset, target))
    print(target)


def likeliest_classes(model, image, class_names):
    probabilities = keras.ops.convert_to_numpy(keras.ops.softmax(model.predict(image, verbose=0)))[0]
    return ", ".join(f"{class_names[label]} {probabilities[label]:.1%}" for label in np.argsort(-probabilities)[:3])


def predict(options, task):
    """Prints the three most likely classes of each image file, or what the task finds in it, and writes the method's
    figures for it. Returns 1 if a file cannot be read."""
    folder, *files = options.predict
    if not options.class_names:
        refuse(f"--predict {folder}: a fit has no classes; use the folder of a classifier")
    model, status, target = load_model(folder), 0, folder / "predictions"
    target.mkdir(exist_ok=True)
    for index, path in enumerate(files):
        try:
            image, finer = data.read_example(options.task, options.dataset, path, options.image_shape, options.squash)
        except data.DataError as error:
            print(f"train.py: {error}", file=sys.stderr)
            status = 1
            continue
        print(f"{path}: {getattr(task, 'describe', likeliest_classes)(model, image, options.class_names)}")
        for name, rows in task.report({options.method: model}, image, None, options.class_names, finer)[1].items():
            draw_grid(rows, target / f"{index}-{path.stem[:50]}-{name}.png")
    return status


# ---- Figures ----


def view_surface(distances, level=0.1):
    """A picture (H, W) in [-1, 1] of the points at the distance `level` from a surface, obliquely from above.

    distances: on a grid (X, Y, Z) on [-1, 1]³.
    """
    right, up, depth = torch.tensor([[0.87, 0.5, 0.0], [-0.25, 0.43, 0.87], [-0.43, 0.75, -0.5]])
    steps = torch.linspace(-1.1, 1.1, 96)
    grid = steps[:, None, None, None] * depth - steps[:, None, None] * up + steps[:, None] * right
    # A ray for each pixel, along the first axis. Outside of the cube, where grid_sample returns 0, the distance is 1.
    values = torch.nn.functional.grid_sample(torch.tensor(distances)[None, None] - 1, grid.flip(-1)[None],
                                             align_corners=True)[0, 0].numpy() + 1
    first = (values < level).argmax(axis=0)[None]
    normal = np.concatenate([np.take_along_axis(slope, first, axis=0) for slope in np.gradient(values)])
    light = np.tensordot([-0.6, -0.7, -0.3], normal / (np.linalg.norm(normal, axis=0) + 1e-9), axes=1)
    return np.where((values < level).any(axis=0), 1.6 * light - 0.8, 1.0)


def draw_grid(rows, path):
    """rows: lists of (picture, title). Pictures are (H, W, C) or (H, W), in [-1, 1], of any size, or distances from a
    surface (X, Y, Z, 1), which are drawn by `view_surface`."""
    height, width = rows[0][0][0].shape[:2]
    side = min(4, max(1.3, width / 100))  # inches, at 100 pixels
    figure = Figure(figsize=(side * len(rows[0]), (side * height / width + 0.4) * len(rows)), layout="constrained")
    for row, axes_row in zip(rows, figure.subplots(len(rows), len(rows[0]), squeeze=False)):
        for (picture, title), axes in zip(row, axes_row):
            picture = view_surface(picture[..., 0]) if picture.ndim == 4 else picture
            axes.imshow(np.clip(picture / 2 + 0.5, 0, 1), cmap="gray", vmin=0, vmax=1)
            axes.set_title(title, fontsize=9)
            axes.axis("off")
    figure.savefig(path, dpi=100)


def draw_curves(histories, path):
    """Plots every metric over the epochs. histories: {model: rows of its history.csv}."""
    metrics = dict.fromkeys(name.removeprefix("val_") for rows in histories.values() for name in [*rows[0]][1:])
    figure = Figure(figsize=(3.5 * len(metrics), 3), layout="constrained")
    for metric, axes in zip(metrics, figure.subplots(1, len(metrics), squeeze=False)[0]):
        for model, rows in histories.items():
            for name, line, label in ((metric, ".-", model), ("val_" + metric, ".--", f"{model}, validation")):
                if name in rows[0]:
                    axes.plot([row["epoch"] + 1 for row in rows], [row[name] for row in rows], line, label=label)
        axes.set(title=metric, xlabel="epoch")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.legend()
    figure.savefig(path, dpi=100)


# ---- Benchmark ----


def benchmark(options, task):
    """Times training steps of the main model on one batch; the last line printed is a JSON object."""
    from torch.utils.benchmark import Timer  # here, because it imports setuptools

    def seconds(function):
        timer = Timer("function()", globals={"function": function}, num_threads=torch.get_num_threads())
        return timer.blocked_autorange(min_run_time=3).median  # synchronizes with a GPU

    dataset = load_dataset(options, task)
    batches = training_batches(options, dataset)[0]
    batch = to_tensors(batches[0])
    model = {name: model for name, model, _ in build(options, task, dataset, 1000)}[""]
    device = model.trainable_variables[0].value.device
    print(f"{options.preset}: batch {(options.batch_size, *dataset.image_shape)}, {device_name()}", flush=True)
    step_seconds = seconds(lambda: model.train_step(batch))
    resident = resource and resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    memory = (round(torch.cuda.max_memory_allocated() / 2**20) if device.type == "cuda" else
              resident and resident // (2**20 if sys.platform == "darwin" else 2**10))
    # The profiler slows a step down, so its times are used as shares of the time measured without it.
    named, shares = torch.profiler.record_function, dict.fromkeys(("step", "backward", "optimizer"), 0.0)
    for optimizer in model.optimizers:
        optimizer.apply = named("optimizer")(optimizer.apply)
    with (mock.patch.object(torch.Tensor, "backward", named("backward")(torch.Tensor.backward)),
          torch.profiler.profile() as profiler):
        for _ in range(5):
            named("step")(model.train_step)(batch)
    for event in profiler.events():
        if event.name in shares and event.device_type.name == device.type.upper():  # on a GPU: what its kernels take
            shares[event.name] += event.time_range.elapsed_us()
    backward, optimizer = (1e3 * step_seconds * shares[name] / shares["step"] for name in ("backward", "optimizer"))
    with torch.compiler.set_stance("force_eager"), FlopCounterMode(display=False) as counter:
        model.train_step(batch)
    side, gflop = 8192 if device.type == "cuda" else 2048, counter.get_total_flops() / 1e9
    matrix = torch.ones(side, side, dtype=getattr(torch, options.precision.removeprefix("mixed_")), device=device)
    rate = 2 * side**3 / seconds(lambda: matrix @ matrix) / 1e9
    data_seconds = seconds(lambda: batches[np.random.randint(len(batches))])
    measured = {"ms_per_step": 1e3 * step_seconds, "forward_ms": 1e3 * step_seconds - backward - optimizer,
                "backward_ms": backward, "optimizer_ms": optimizer, "data_ms": 1e3 * data_seconds,
                "images_per_second": options.batch_size / step_seconds, "peak_memory_mb": memory,
                "gflop_per_step": gflop, "matmul_gflops": rate, "share_of_matmul_rate": gflop / step_seconds / rate}
    print(json.dumps({name: value and round(value, 3) for name, value in measured.items()}))  # None: no memory figure


def keep_freed_memory():
    """Keeps freed memory for the next step. glibc would return it to the system, for up to a fifth of a step's time."""
    if platform.libc_ver()[0] == "glibc":
        mallopt = ctypes.CDLL(None).mallopt
        if mallopt(-3, 2**30):  # M_MMAP_THRESHOLD; older versions have a lower limit
            mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD


def main(arguments=None):
    options, task = parse(arguments)  # None: those of the command line
    if PROCESSES > 1:
        if options.predict or options.benchmark or options.ablate:
            refuse("--predict, --benchmark and --ablate use one process: start them without torchrun")
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        store, *_ = next(torch.distributed.rendezvous("env://"))
        # torchrun keeps its store when it starts the processes again; with it, what the last ones wrote there.
        store = torch.distributed.PrefixStore(RESTARTS, store)
        torch.distributed.init_process_group(store=store, rank=RANK, world_size=PROCESSES)
        if RANK:
            sys.stdout = open(os.devnull, "w")
    keep_freed_memory()
    torch.set_float32_matmul_precision("high")  # TF32 on GPUs that have it; no effect on CPUs
    command = (evaluate if options.evaluate else predict if options.predict else benchmark if options.benchmark else
               ablate if options.ablate else train)
    try:
        with signal_handler(interrupt):
            return command(options, task) or 0
    except data.DataError as error:
        refuse(error)
    except OSError as error:
        status, message = 1, f"cannot write {options.run_dir} ({error.strerror or error}): check space and permissions"
    except KeyboardInterrupt as interruption:
        status, message = 128 + interruption.args[0], "interrupted"
        if RANK:
            return status  # the first process says it
    except RuntimeError as error:  # from torch.distributed
        if PROCESSES == 1 or "onnection" not in str(error) and "imed out" not in str(error):
            raise
        status, message = 1, f"lost another process ({' '.join(str(error).split())[:120]})"
    if options.ablate:
        message += "; run the same command again to continue"
    elif command is train and (options.run_dir / "config.json").exists():
        message += f"; continue with python train.py --resume {options.run_dir}"
    print(f"train.py: {message}", file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main())
