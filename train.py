"""Trains one method on one dataset: `python train.py --method mwt --dataset mnist`; `--help` lists all options.

Reads the options, loads the data, builds the method's model from its preset, fits it, evaluates it on the test split
and writes a folder: config.json, history.csv, model.keras, results.json and pictures. A run that was interrupted, at
any moment and in any way, goes on with `--resume FOLDER` and ends as if it had not been. `--evaluate FOLDER` and
`--predict FOLDER IMAGE…` use what a run has left. `--method inrn` also fits pictures and videos (`--task fit`) and runs
its paper's ablations (`--ablate`).
"""

import argparse
import contextlib
import csv
import ctypes
import functools
import hashlib
import importlib
import inspect
import io
import json
import math
import os
import pathlib
import platform
import random
import shutil
import signal
import statistics
import sys
import time

os.environ.setdefault("KERAS_BACKEND", "torch")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import h5py
import keras
import numpy as np
import torch

import data

NOT_OF_A_RUN = ("resume", "evaluate", "predict", "benchmark", "part_of")  # options that config.json leaves out
METHODS = {"mwt": "MWT", "hyperinr": "HyperINR", "inrn": "INRN"}  # the file, and the model's class in it


# ---- Options ----


def refuse(message):
    """Ends the program with status 2 and one line that says what to do."""
    print(f"train.py: {' '.join(str(message).split())}", file=sys.stderr)
    raise SystemExit(2)


class Parser(argparse.ArgumentParser):
    """Reports an error in one line, without the usage text before it."""

    def error(self, message):
        refuse(message)


def at_least(lowest):
    """Type of an option that is a whole number from `lowest` up, below 2³²."""
    def whole_number(text):
        if not text.lstrip("-").isdigit() or not lowest <= int(text) < 2**32:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from {lowest} up (and below 2**32)")
        return int(text)
    return whole_number


def type_like(value):
    """Type of an option whose presets hold `value`."""
    if isinstance(value, bool):
        def truth(text):
            if text not in ("true", "false"):
                raise argparse.ArgumentTypeError(f"{text!r} is neither true nor false")
            return text == "true"
        return truth
    if isinstance(value, int):
        return at_least(1)
    if isinstance(value, str):
        return str

    def number(text):
        try:
            result = float(text)
        except ValueError:
            result = math.nan
        if not (math.isfinite(result) and result >= 0):
            raise argparse.ArgumentTypeError(f"{text!r} is not a number from 0 up")
        return result
    return number


def parse(arguments):
    """Options as a namespace, the method's module, and its hyperparameters: those of the preset, or of the run that the
    options name, with the options' changes."""
    first = Parser(add_help=False, allow_abbrev=False)
    first.add_argument("--method", choices=METHODS, default="mwt", help="default: mwt")
    use = first.add_argument_group("use what a run has left").add_mutually_exclusive_group()
    use.add_argument("--resume", type=pathlib.Path, metavar="RUN_FOLDER", help="go on with an interrupted run")
    use.add_argument("--evaluate", type=pathlib.Path, metavar="RUN_FOLDER", help="evaluate a run's model again, on its "
                     "dataset or another; writes RUN_FOLDER/evaluation-<dataset>/")
    use.add_argument("--predict", nargs="+", metavar=("RUN_FOLDER", "IMAGE"),
                     help="classify image files; writes their reconstructions to RUN_FOLDER/predictions/")
    chosen = first.parse_known_args(arguments)[0]
    folder = chosen.resume or chosen.evaluate or (pathlib.Path(chosen.predict[0]) if chosen.predict else None)
    config = read_config(folder) if folder else {}
    method = importlib.import_module(config.get("method", chosen.method))
    presets = method.PRESETS
    if method.__name__ == "inrn":
        add_inrn_options(first, method)
        chosen = first.parse_known_args(arguments)[0]
        if config.get("task", chosen.task) == "fit" or config.get("ablate", chosen.ablate) == "architecture":
            presets = method.FIT_PRESETS

    parser = Parser(description=__doc__.splitlines()[0], parents=[first], allow_abbrev=False)
    parser.add_argument("--dataset", default="shapes", help="shapes (default), or the TFDS name of an image "
                        "classification dataset: mnist, fashion_mnist, cifar10, cifar100, imagenette/320px-v2, …")
    parser.add_argument("--preset", choices=presets, default="quick",
                        help="hyperparameters to start from (default: quick)")
    parser.add_argument("--seed", type=at_least(0), default=0,
                        help="of the weights, the order of the data, and shapes (default: 0)")
    parser.add_argument("--limit", type=at_least(1), help="train on that many images at most (default: all)")
    parser.add_argument("--validation-images", type=at_least(0), default=2000, help="held out of the training split "
                        "and evaluated after each epoch; 0 trains on everything (default: 2000)")
    parser.add_argument("--image-size", type=at_least(8), help="scale and crop all images to that many pixels squared "
                        "(default: the dataset's own size)")
    parser.add_argument("--augment", action="store_true", help="shift, and where classes allow it mirror, at random")
    parser.add_argument("--data-dir", type=os.path.abspath,
                        help="where TFDS keeps datasets (default: $TFDS_DATA_DIR or ~/tensorflow_datasets)")
    parser.add_argument("--run-dir", type=pathlib.Path, help="folder to write (default: "
                        "runs/<method>-<dataset>-<preset>-<seed>)")
    parser.add_argument("--save-every", type=at_least(1), default=500, help="save the state for --resume after that "
                        "many steps, as after each epoch (default: 500)")
    parser.add_argument("--precision", choices=["float32", "mixed_bfloat16"], default="float32",
                        help="mixed_bfloat16 keeps the INR in float32 (default: float32)")
    parser.add_argument("--compile", action="store_true",
                        help="compile what the method does with its INR (minutes at the start)")
    parser.add_argument("--benchmark", action="store_true", help="time training steps, train nothing")
    group = parser.add_argument_group("hyperparameters", f"explained in {method.__name__}.py; default: the preset's")
    for name, value in presets["quick"].items():
        group.add_argument("--" + name.replace("_", "-"), type=type_like(value), metavar=type(value).__name__.upper(),
                           help=", ".join(f"{preset} {values[name]}" for preset, values in presets.items()),
                           default=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    unset = argparse.Namespace(**dict.fromkeys(vars(options)))  # what it has, None too, gets no default
    given = {name: value for name, value in vars(parser.parse_args(arguments, unset)).items() if value is not None}
    hyperparameters = {**presets[options.preset], **{name: value for name, value in config.items()
                                                     if name in presets["quick"]}}
    free = {"resume", "evaluate", "predict"} | ({"dataset", "data_dir", "image_size"} if options.evaluate else set())
    for name, value in given.items() if folder else ():
        said = str(value) if isinstance(value, pathlib.Path) else value
        if name not in free and said != config.get(name):
            refuse(f"--{name.replace('_', '-')} {said} contradicts {folder / 'config.json'}, which says "
                   f"{config.get(name)}: leave it out, or start a new run")
    for name, value in config.items():
        if hasattr(options, name) and name not in {*free} & {*given}:
            setattr(options, name, value)
    if folder:
        options.run_dir = folder
    options.part_of = None
    if options.method == "inrn":
        complete_inrn_options(options, given, method)
    return options, method, {name: given.get(name, value) for name, value in hyperparameters.items()}


def add_inrn_options(parser, method):
    """What only inrn can do: fit a picture, learn from a teacher, repeat its paper's ablations."""
    group = parser.add_argument_group("inrn")
    group.add_argument("--task", choices=["classify", "fit"], default="classify",
                       help="fit: represent a picture or a video instead (default: classify)")
    picture = group.add_mutually_exclusive_group()
    picture.add_argument("--image", type=os.path.abspath, help="picture to fit (default: one drawn from shapes); longer "
                         "than --image-size, 256 unless given, it is scaled down")
    picture.add_argument("--frames", type=lambda text: text if text == "shapes" else os.path.abspath(text),
                         metavar="FOLDER", help="video to fit: its frames are the folder's image files in the order of "
                         "their names; shapes: a drawn one")
    group.add_argument("--alone", action="store_true", help="fit INRN without a SIREN and a ReLU MLP beside it")
    group.add_argument("--teacher", type=lambda text: text if text in ("train", "none", "resnet101") else
                       os.path.abspath(text), help="train: a small residual CNN, first, on the same images (default, but "
                       "in most ablations none); none; resnet101: of ImageNet, downloaded; or the .keras file of a Keras "
                       "classifier of images in [-1, 1]")
    group.add_argument("--teacher-layers", default="", metavar="A,B,C,D", help="the teacher's layers that the four "
                       "stages learn from (default: by resolution)")
    group.add_argument("--ablate", choices=method.ABLATIONS, help="train variants, --seeds times each, and compare them")
    group.add_argument("--seeds", type=at_least(1), default=2, help="of each variant, from --seed up (default: 2)")


def complete_inrn_options(options, given, method):
    """Sets what follows from other options, and refuses what contradicts them. given: those of the command line."""
    if options.ablate == "architecture":  # the paper's table is of a video
        options.task = "fit"
        options.frames = options.frames or (None if options.image else "shapes")
    if options.task == "fit" and (options.teacher or options.ablate in ("stages", "distillation")):
        refuse("a fit has neither stages nor a teacher: leave --task fit out")
    if options.compile or options.task == "fit" and options.precision != "float32":
        refuse("inrn has no INR apart from its layers to compile, and fits in float32: leave --compile, or in a fit "
               "--precision, out")
    varied = {name for variant in method.ABLATIONS.get(options.ablate, []) for name in variant} - {"teacher"}
    for name in sorted(varied & {*given}):
        refuse(f"--ablate {options.ablate} chooses --{name.replace('_', '-')} itself: leave it out")
    for name in ("dataset", "limit", "validation_images", "augment") if options.task == "fit" else ():
        if name in given:
            refuse(f"a fit has no use for --{name.replace('_', '-')}: leave it out")
    if options.task != "fit" and (options.image or options.frames or options.alone):
        refuse("--image, --frames and --alone want --task fit")
    if options.teacher is None and options.task != "fit":
        options.teacher = "none" if options.ablate and options.ablate != "distillation" else "train"


def read_config(folder):
    """What config.json in a run's folder says."""
    try:
        config = json.loads((folder / "config.json").read_text())
        if config["method"] in METHODS and isinstance(config["image_shape"], list):
            return config
        refuse(f"{folder / 'config.json'} is not of a run of this program")
    except OSError as error:
        refuse(f"{folder} holds no run ({error.strerror}: config.json): give the folder that a run has named")
    except (ValueError, KeyError, TypeError) as error:
        refuse(f"{folder / 'config.json'} is damaged ({error}): it has to come back from a copy")


# ---- Training ----


def prepare(options):
    """Sets the seeds and the precision of the model that is built next."""
    for seed in (random.seed, np.random.seed, torch.manual_seed):  # Keras's function would import TensorFlow
        seed(options.seed)
    keras.config.set_dtype_policy(options.precision)


def build_model(options, method, hyperparameters, total_steps, teacher=None, **known):
    """The method's model, compiled. hyperparameters, and what is known about the images, go to its constructor or to its
    `compile`, as their names say. known: image_shape (H, W, C) and num_classes; of a fit, network and time.

    Where there is a `Distiller` the model is the one that trains the student, with the teacher or without.
    """
    available = {**hyperparameters, **known, "total_steps": total_steps, "jit_compile": options.compile}
    if "image_shape" in known:
        available |= {"image_size": known["image_shape"][0], "channels": known["image_shape"][-1]}

    prepare(options)

    def accepted_by(function):
        names = inspect.signature(function).parameters
        return {name: value for name, value in available.items() if name in names}
    model_class = method.PictureFit if "network" in known else getattr(method, METHODS[options.method])
    try:
        model = model_class(**accepted_by(model_class.__init__))
        if hasattr(model, "stage_outputs"):
            names = [name for name in options.teacher_layers.split(",") if name]
            model = method.Distiller(model, teacher, layers=names, **accepted_by(method.Distiller.__init__))
        model.compile(**accepted_by(model.compile))
    except ValueError as error:
        refuse(error)
    return model


# ---- The state of a run ----


def sync(path):
    """Returns when a file's content, or a folder's names, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_whole(path, write):
    """Calls write(a path beside this one) and puts that file in place: at every moment, also if the machine stops, the
    old or the new one is there, whole."""
    beside = path.with_name("new-" + path.name)
    try:
        write(beside)
        sync(beside)
    except BaseException:
        beside.unlink(missing_ok=True)  # a full disk gets its room back
        raise
    os.replace(beside, path)
    if os.name == "posix":
        sync(path.parent)


def write_json(path, content):
    write_whole(path, lambda beside: beside.write_text(json.dumps(content, indent=1)))


@contextlib.contextmanager
def locked(folder):
    """Keeps other processes out of the folder until this one is done with it or ends, however it ends."""
    try:
        import fcntl
    except ImportError:  # Windows
        yield
        return
    try:
        descriptor = os.open(folder, os.O_RDONLY)
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        refuse(f"{folder} is in use by another process: wait until that one ends, or take another --run-dir")
    except OSError as error:
        refuse(f"cannot lock {folder} ({error.strerror}): take a --run-dir on another file system")
    try:
        yield
    finally:
        os.close(descriptor)


class Interrupted(BaseException):
    """SIGINT or SIGTERM came; the argument is the signal's number."""


class Diverged(Exception):
    """The loss or the weights are not finite any more; the argument says since when."""


class Run(keras.callbacks.Callback):
    """Writes what a run leaves while it trains, and the state from which it can go on exactly.

    A state is one file: the SHA-256 of the rest, then HDF5 with all variables (weights, random seeds, metrics,
    optimizers), pictures, and, as JSON, how far the run has come. Two such files take turns, so the last state stays
    until a newer one is on the disk. What a run does in a step follows from its state, the seed, the epoch and the step
    alone.

    images: of which `snapshots` keeps reconstructions, before the first and after each epoch; None for none.
    """

    def __init__(self, folder, batches, save_every, images, model):
        super().__init__()
        self.set_model(model)
        self.folder, self.batches, self.save_every, self.images = folder, batches, save_every, images
        self.epoch = self.step = 0  # so many epochs are done, and so many steps of the next
        self.elapsed, self.seconds = 0.0, []  # in this epoch, in each epoch before
        self.history, self.snapshots = [], []
        self.slot, self.metrics, self.training, self.signal = 0, None, False, None
        self.states = [folder / "checkpoint" / f"state-{slot}" for slot in range(2)]

    def variables(self):
        model = self.model
        return [variable for part in (model, *model.optimizers, *model.metrics) for variable in part.variables]

    def check_weights(self):
        if not all(torch.isfinite(variable.value).all() for variable in self.model.trainable_variables):
            raise Diverged(f"the weights became infinite or not a number by step {self.step} of epoch {self.epoch + 1}")

    def save_state(self):
        buffer = io.BytesIO()
        progress = {name: getattr(self, name) for name in ("epoch", "step", "elapsed", "seconds", "history")}
        with h5py.File(buffer, "w") as file:
            file["progress"] = json.dumps(progress)
            for index, variable in enumerate(self.variables()):
                file[f"variables/{index}"] = keras.ops.convert_to_numpy(variable.value)
            file["snapshots"] = np.array(self.snapshots)
        content = buffer.getbuffer()

        def write(path):
            with open(path, "wb") as file:
                file.write(hashlib.sha256(content).digest())
                file.write(content)

        write_whole(self.states[1 - self.slot], write)
        self.slot = 1 - self.slot

    def restore(self):
        """Goes to the newest state that is whole; says which is not. Without any, the run is at its beginning."""
        states, damaged = {}, []
        for slot, path in enumerate(self.states):
            try:
                content = memoryview(path.read_bytes())
            except FileNotFoundError:
                continue
            except OSError:
                content = memoryview(b"")
            if hashlib.sha256(content[32:]).digest() != content[:32]:
                damaged.append(str(path))
                continue
            file = h5py.File(io.BytesIO(content[32:]), "r")
            states[slot] = file, json.loads(file["progress"][()])
        if damaged and not states:
            refuse(f"{' and '.join(damaged)} damaged, no other state is left: start the run again in another --run-dir")
        if damaged:
            print(f"train.py: {damaged[0]} is damaged; going on from the other state", file=sys.stderr)
        if not states:
            if (self.folder / "history.csv").exists() and (self.folder / "history.csv").read_text().count("\n") > 1:
                refuse(f"{self.folder} has finished epochs, but no state in {self.states[0].parent}: bring that folder "
                       "back from a copy, or start again in another --run-dir")
            return
        self.slot = max(states, key=lambda slot: (states[slot][1]["epoch"], states[slot][1]["step"]))
        file, progress = states[self.slot]
        if len(file["variables"]) != len(self.variables()):
            refuse(f"{self.states[self.slot]} is of another version of this program: go on with that one")
        vars(self).update(progress)
        self.snapshots = list(file["snapshots"])
        for index, variable in enumerate(self.variables()):
            variable.assign(file[f"variables/{index}"][()])
        self.metrics = [[variable.numpy() for variable in metric.variables] for metric in self.model.metrics]

    def fit(self, epochs, validation):
        """Trains from where the run is to the end; raises Interrupted, Diverged, and OSError where saving fails."""
        if self.epoch == epochs:
            self.write_files()  # those of the epoch before may still be there
            return
        if self.images is not None and not self.snapshots:
            self.snapshots.append(self.model.reconstruct(self.images))
        self.states[0].parent.mkdir(parents=True, exist_ok=True)
        if not self.step:
            self.write_files()
        self.training = True
        # Keras counts the batches of an epoch once, so the rest of an epoch is trained by a call of its own.
        for last in (self.epoch + 1, epochs) if self.step else (epochs,):
            self.batches.begin(self.epoch + 1, self.step)
            self.model.fit(self.batches, epochs=last, initial_epoch=self.epoch, validation_data=validation,
                           shuffle=False,  # Keras would shuffle once more, by a seed of its own
                           verbose=1 if sys.stdout.isatty() else 2, callbacks=[self])  # no moving bars in a log file
        self.training = False
        if self.signal:
            raise Interrupted(self.signal)

    def on_epoch_begin(self, epoch, logs=None):
        self.batches.begin(epoch + 1, self.step)
        self.start = time.perf_counter() - self.elapsed
        if self.step:  # Keras has just reset them
            for metric, values in zip(self.model.metrics, self.metrics):
                for variable, value in zip(metric.variables, values):
                    variable.assign(value)

    def on_train_batch_end(self, batch, logs=None):
        if not math.isfinite(logs["loss"]):
            raise Diverged(f"the loss became {logs['loss']} in step {self.step + 1} of epoch {self.epoch + 1}")
        self.step += 1
        if self.step == self.batches.steps:
            return  # the epoch ends with validation, and saves then
        number = self.signal  # once: it may come at any moment
        if number or self.step % self.save_every == 0:
            self.check_weights()
            self.elapsed = time.perf_counter() - self.start
            self.save_state()
        if number:
            raise Interrupted(number)

    def on_epoch_end(self, epoch, logs=None):
        self.check_weights()
        self.seconds.append(time.perf_counter() - self.start)
        self.history.append({"epoch": epoch, **logs})
        self.epoch, self.step, self.elapsed = epoch + 1, 0, 0.0
        if self.images is not None:
            self.snapshots.append(self.model.reconstruct(self.images))
        self.save_state()
        self.write_files()
        if self.signal:
            raise Interrupted(self.signal)

    def write_files(self):
        """history.csv and model.keras, as of the last epoch."""
        write_whole(self.folder / "history.csv", lambda beside: beside.write_text(as_csv(self.history), newline=""))
        write_whole(self.folder / "model.keras", self.model.save)


def as_csv(rows):
    """Dicts with the same keys as CSV, keys first; without any, an epoch's heading."""
    text = io.StringIO()
    writer = csv.DictWriter(text, rows[0] if rows else ["epoch"])
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def device_of(model):
    return model.trainable_variables[0].value.device


def device_name(model):
    if device_of(model).type == "cuda":
        return torch.cuda.get_device_name()
    return f"{device_of(model).type.upper()}, {torch.get_num_threads()} threads"


def load_dataset(options):
    try:
        seed = options.seed if options.dataset == "shapes" else 0  # others ignore it, and are read once
        dataset = load_once(options.dataset, options.data_dir, options.image_size, seed)
    except data.DataError as error:
        refuse(error)
    # Keras would import TensorFlow to save or load a model, seconds for nothing: from here on it counts as not there.
    sys.modules.setdefault("tensorflow", None)
    return dataset


load_once = functools.lru_cache(maxsize=1)(data.load)


def evaluation_batches(images, labels):
    """Batches as large as 200 images of 28×28, to bound the memory."""
    return data.Batches(images, labels, max(1, 200 * 28**2 // math.prod(images.shape[1:3])))


def open_run(options, folder, lock):
    """Whether there is anything to do in the folder; locks that of a run to resume, refuses one that is used."""
    if not options.resume:
        refuse_used(folder)
        return True
    lock.enter_context(locked(folder))
    if (folder / "results.json").exists():
        for rest in folder.glob("**/checkpoint"):
            shutil.rmtree(rest, ignore_errors=True)  # a kill in the last instant leaves it
        print(f"{folder} holds a finished run: nothing to do")
        return False
    return True


def create_run(options, folder, lock, **config):
    """Makes and locks the folder of a new run and writes its config.json."""
    if options.resume:
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.enter_context(locked(folder))
        refuse_used(folder)  # another process may have been faster
        write_json(folder / "config.json", {
            **{name: str(value) if isinstance(value, pathlib.Path) else value
               for name, value in vars(options).items() if name not in NOT_OF_A_RUN},
            **config, "versions": {"python": platform.python_version(), "keras": keras.__version__,
                                   "torch": torch.__version__, "numpy": np.__version__}})
    except OSError as error:
        refuse(f"cannot write {folder} ({error.strerror}): take another --run-dir")


def complete(options, folder, runs, conclude):
    """Trains what the runs, (Run, epochs, validation) one after the other, have left to do, and writes results.json with
    what conclude() returns. Returns the exit status."""
    whole = options.part_of or folder
    try:
        with signals_to([run for run, *_ in runs]):
            for run, epochs, validation in runs:
                run.restore()
                if len(runs) > 1:
                    print(f"{run.folder}: {epochs} epochs of {run.batches.steps} steps", flush=True)
                if options.resume:
                    print(f"going on after {run.epoch} epochs and {run.step} steps in {run.folder}", flush=True)
                run.fit(epochs, validation)
            write_json(folder / "results.json", conclude())
            for run, *_ in runs:
                shutil.rmtree(run.states[0].parent)
    except Diverged as problem:
        print(f"train.py: stopped, {problem}; {run.folder / 'model.keras'} holds the model after {run.epoch} epochs: "
              "lower the learning rates, or take another --seed", file=sys.stderr)
        return 1
    except OSError as error:
        print(f"train.py: cannot write {folder} ({error.strerror or error}): make room or give access, then "
              f"python train.py --resume {whole} goes on from the last state", file=sys.stderr)
        return 1
    except Interrupted as interruption:
        print(f"\ntrain.py: interrupted; python train.py --resume {whole} goes on", file=sys.stderr)
        return 128 + interruption.args[0]
    print(folder)
    return 0


def train(options, method, hyperparameters):
    """One run of classification, or the rest of it, from data to pictures. Returns the exit status."""
    folder = options.run_dir or pathlib.Path("runs", "-".join(
        [options.method, options.dataset.replace("/", "-"), options.preset, str(options.seed)]))
    with contextlib.ExitStack() as lock:
        if not open_run(options, folder, lock):
            return 0
        # Refuses before it loads data.
        build_model(options, method, hyperparameters, 1, image_shape=(28, 28, 1), num_classes=10)
        dataset = load_dataset(options)
        image_shape, num_classes = dataset.train_images.shape[1:], len(dataset.class_names)
        order = np.random.default_rng(options.seed).permutation(len(dataset.train_images))
        held_out, chosen = np.split(order, [options.validation_images])
        chosen = chosen[:options.limit]
        batch_size, epochs = hyperparameters["batch_size"], hyperparameters["epochs"]
        if len(chosen) < batch_size:
            refuse(f"{len(chosen)} training images do not fill a batch of {batch_size}: "
                   "take a smaller --batch-size or --validation-images, or a larger --limit")
        batches = data.Batches(dataset.train_images[chosen], dataset.train_labels[chosen], batch_size,
                               seed=options.seed, augment=options.augment, flip=dataset.flip)
        validation = evaluation_batches(dataset.train_images[held_out], dataset.train_labels[held_out])
        validation = validation if len(held_out) else None
        teacher = make_teacher(options, method, hyperparameters, image_shape, num_classes)
        model = build_model(options, method, hyperparameters, epochs * batches.steps, teacher, image_shape=image_shape,
                            num_classes=num_classes)
        create_run(options, folder, lock, **hyperparameters, image_shape=image_shape, class_names=dataset.class_names)
        print(f"{options.method} on {options.dataset}: {len(chosen):,} training images of {image_shape}, "
              f"{len(held_out):,} for validation, {len(dataset.test_images):,} for the test; {device_name(model)}")
        shown = shown_pictures(dataset) if hasattr(model, "upsample") else None  # mwt has steps of its own to show
        run = Run(folder, batches, options.save_every, shown, model)
        runs = [(run, epochs, validation)]
        if teacher and options.teacher == "train":
            trainer = method.Distiller(teacher)
            trainer.compile(hyperparameters["teacher_epochs"] * batches.steps, hyperparameters["rate"],
                            hyperparameters["weight_decay"])
            runs.insert(0, (Run(folder / "teacher", batches, options.save_every, None, trainer),
                            hyperparameters["teacher_epochs"], validation))

        def conclude():
            results = evaluate_model(options, method, getattr(model, "student", model), dataset, folder, run.snapshots)
            draw_history(run.history, folder / "curves.png")
            return {**results, "seconds_per_epoch": statistics.mean(run.seconds)}

        return complete(options, folder, runs, conclude)


def make_teacher(options, method, hyperparameters, image_shape, num_classes):
    """The model that --teacher asks for, with its weights, but for `train`; None for none and for other methods."""
    teacher = getattr(options, "teacher", "none")
    prepare(options)
    try:
        if teacher == "none":
            return None
        if teacher == "train":
            return method.residual_cnn(image_shape, num_classes, hyperparameters["stem_stride"])
        if teacher == "resnet101":
            return method.resnet101(image_shape)
        sys.modules.setdefault("tensorflow", None)  # see load_dataset
        return keras.saving.load_model(teacher, compile=False)
    except Exception as error:  # no network, images too small, no such file, no Keras file: of many kinds
        refuse(f"cannot have the teacher {teacher} ({type(error).__name__}: {str(error)[:160]}): give train, none, "
               "resnet101 or the .keras file of a Keras classifier")


def picture_name(options):
    return pathlib.Path(options.frames or options.image or "shapes").stem


def load_frames(options):
    """The picture or video to fit: frames (T, H, W, 3), `uint8`."""
    sys.modules.setdefault("tensorflow", None)  # see load_dataset
    size = options.image_size or 256
    try:
        if options.image:
            return data.read_picture(options.image, size)[None]
        if options.frames and options.frames != "shapes":
            return data.read_frames(options.frames, size)
    except data.DataError as error:
        refuse(error)
    if options.frames:
        return data.shapes_video(options.image_size or 64, seed=options.seed)
    return data.shapes_mosaic(size, seed=options.seed)[None]


def fit(options, method, hyperparameters):
    """Fits a picture or a video, with a SIREN and a ReLU MLP beside it. Returns the exit status."""
    name = picture_name(options)
    folder = options.run_dir or pathlib.Path("runs", f"{options.method}-fit-{name}-{options.preset}-{options.seed}")
    with contextlib.ExitStack() as lock:
        if not open_run(options, folder, lock):
            return 0
        frames = load_frames(options)
        times = times_of(frames)
        batch_size = min(hyperparameters["batch_size"], len(frames))
        copies = -(-50 * batch_size // len(frames))  # at least 50 steps in what counts as an epoch: it ends with a save
        batches = data.Batches(np.concatenate([frames] * copies), np.concatenate([times] * copies), batch_size,
                               seed=options.seed)
        epochs = -(-hyperparameters["steps"] // batches.steps)
        models = {network: build_model(options, method, hyperparameters, epochs * batches.steps, network=network,
                                       time=len(frames) > 1)
                  for network in fitted(options)}
        create_run(options, folder, lock, **hyperparameters, image_shape=frames.shape[1:])
        print(f"{options.method} fits {name}, {len(frames)} of {frames.shape[1:]}, in {epochs * batches.steps} steps; "
              f"{device_name(models['inrn'])}")
        runs = {network: Run(folder if network == "inrn" else folder / network, batches, options.save_every, None, model)
                for network, model in models.items()}
        validation = data.Batches(frames, times, batch_size)

        def conclude():
            results = evaluate_fit(options, method, models, frames, folder / "fit.png")
            draw_curves({metric: {network: [row["val_" + metric] for row in run.history]
                                  for network, run in runs.items()} for metric in ("psnr", "ssim")},
                        f"× {batches.steps} steps", folder / "curves.png")
            for network, run in runs.items():
                results[network]["seconds"] = sum(run.seconds)
            return results

        return complete(options, folder, [(run, epochs, validation) for run in runs.values()], conclude)


def times_of(frames):
    """The frames' times, from -1 to 1: (T,). A single picture has time 0."""
    return np.linspace(-1, 1, len(frames), dtype=np.float32) if len(frames) > 1 else np.zeros(1, np.float32)


def fitted(options):
    """Names of the networks that a fit compares."""
    return ("inrn",) if options.alone else ("inrn", "siren", "relu")


def evaluate_fit(options, method, models, frames, path):
    """PSNR and SSIM of each network's frames, printed and returned; draws the first, the middle and the last frame."""
    truth, pictures = data.scale(frames), {}
    results = {"method": options.method, "task": "fit", "preset": options.preset, "device": device_name(models["inrn"])}
    for network, model in models.items():
        pictures[network] = model.render(times_of(frames), *frames.shape[1:3])
        pairs = [[keras.ops.convert_to_tensor(picture[None]) for picture in pair] for pair in zip(pictures[network], truth)]
        results[network] = {  # JSON knows no infinity
            "psnr": statistics.mean(min(100.0, float(keras.ops.psnr(*pair, 2.0))) for pair in pairs),
            "ssim": statistics.mean(float(method.similarity(*pair)[0]) for pair in pairs),
            "parameters": model.count_params()}
        print(f"{network}: {results[network]['psnr']:.2f} dB, SSIM {results[network]['ssim']:.4f}, "
              f"{results[network]['parameters']:,} parameters")
    rows = []
    for i in sorted({0, len(frames) // 2, len(frames) - 1}):
        shown = [(pictures[network][i], network) for network in models]
        rows.append([(truth[i], "ground truth")] + [
            (picture, f"{network}\n{float(keras.ops.psnr(truth[i], picture, 2.0)):.1f} dB") for picture, network in shown])
        errors = [np.abs(picture - truth[i]).mean(-1) for picture, _ in shown]
        rows.append([(np.ones((1, 1)), "error\nwhite: 10 %")] + [(error / 0.1 - 1, "") for error in errors])
    draw_grid(rows, path, inches=1.9)
    return results


def run_variant(options, method, hyperparameters, variant, run_one, seed, folder):
    """One run of an ablation, unless it is there. Returns the exit status."""
    if (folder / "results.json").exists():
        return 0
    changes = {name: value for name, value in variant.items() if name not in hyperparameters}
    if changes.get("teacher") == "train":
        changes["teacher"] = options.teacher  # or another that was given
    options = argparse.Namespace(**{
        **vars(options), "ablate": None, "alone": options.task == "fit", "seed": seed, "run_dir": folder, **changes,
        "resume": folder if (folder / "config.json").exists() else None, "part_of": folder.parent})
    return run_one(options, method, {name: variant.get(name, value) for name, value in hyperparameters.items()})


def ablate(options, method, hyperparameters):
    """Runs each variant of an ablation with each seed, and compares them in one table. Returns the exit status."""
    folder = options.run_dir or pathlib.Path("runs", "-".join(
        [options.method, options.ablate, options.dataset.replace("/", "-"), options.preset, str(options.seed)]))
    run_one, value = (fit, "psnr") if options.task == "fit" else (train, "accuracy")
    with contextlib.ExitStack() as lock:
        if not open_run(options, folder, lock):
            return 0
        create_run(options, folder, lock, **hyperparameters, image_shape=[])
        variants = {", ".join(f"{name} {setting}" for name, setting in variant.items()): variant
                    for variant in method.ABLATIONS[options.ablate]}
        results = {label: [] for label in variants}

        def part(label, seed):
            return folder / f"{label.replace(', ', '-').replace(' ', '-')}-{seed}"

        try:
            with signals_to([]):
                for seed in range(options.seed, options.seed + options.seeds):
                    for label, variant in variants.items():
                        status = run_variant(options, method, hyperparameters, variant, run_one, seed, part(label, seed))
                        if status:
                            return status
                        result = json.loads((part(label, seed) / "results.json").read_text())
                        results[label].append(result["inrn"] if options.task == "fit" else {
                            "parameters": result["parameters"], "accuracy": 100 * result["test_accuracy"],
                            "seconds": result["seconds_per_epoch"] * hyperparameters["epochs"]})
        except Interrupted as interruption:
            print(f"\ntrain.py: interrupted; python train.py --resume {folder} goes on", file=sys.stderr)
            return 128 + interruption.args[0]
        except SystemExit:
            if not options.resume and not any(folder.glob("*/config.json")):  # refused before anything began
                shutil.rmtree(folder)
            raise
        rows = [{options.ablate: label, "parameters": found[0]["parameters"],
                 value: round(statistics.mean(result[value] for result in found), 2),
                 "spread": round(statistics.stdev(result[value] for result in found), 2) if len(found) > 1 else 0.0,
                 **{f"seed {options.seed + i}": round(result[value], 2) for i, result in enumerate(found)},
                 "seconds": round(statistics.mean(result["seconds"] for result in found), 1)}
                for label, found in results.items()]
        try:
            write_whole(folder / "table.csv", lambda beside: beside.write_text(as_csv(rows), newline=""))
            draw_table(rows, folder / "table.png")
            write_json(folder / "results.json", {"task": options.task, "ablate": options.ablate, "rows": rows})
        except OSError as error:
            print(f"train.py: cannot write {folder} ({error.strerror or error}): make room or give access, then python "
                  f"train.py --resume {folder} goes on", file=sys.stderr)
            return 1
    print(as_csv(rows) + str(folder))
    return 0


def refuse_used(folder):
    """Ends the program where a new run would write into a folder that holds something."""
    try:
        if folder.exists() and (not folder.is_dir() or any(
                path.name != "new-config.json" for path in folder.iterdir())):  # what a kill in the first instant leaves
            refuse(f"{folder} already holds a run: --resume it, take another --run-dir or --seed, or remove it")
    except OSError as error:
        refuse(f"cannot read {folder} ({error.strerror}): take another --run-dir")


@contextlib.contextmanager
def signals_to(runs):
    """SIGINT and SIGTERM let a training step finish and the state be saved, where one of the runs is training, and raise
    Interrupted. A second one ends the program at once."""
    numbers = (signal.SIGINT, signal.SIGTERM)

    def note(number, frame):
        for other in numbers:
            signal.signal(other, signal.SIG_DFL)
        training = [run for run in runs if run.training]
        if not training:
            raise Interrupted(number)
        training[0].signal = number

    old = {number: signal.signal(number, note) for number in numbers}
    try:
        yield
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)


def shown_pictures(dataset):
    return data.scale(dataset.test_images[:8])


def evaluate_model(options, method, model, dataset, folder, snapshots):
    """Figures of the model on the test split, printed and returned; draws the pictures that the method's paper shows.

    snapshots: reconstructions of `shown_pictures` after some epochs; none for the finished model's alone.
    """
    test = evaluation_batches(dataset.test_images, dataset.test_labels)
    results = {f"test_{name}": value for name, value in model.evaluate(test, verbose=0, return_dict=True).items()}
    results |= {"parameters": model.count_params(), "device": device_name(model), "method": options.method,
                "preset": options.preset, "dataset": options.dataset}
    psnr = f", PSNR {results['test_psnr']:.2f} dB" if "test_psnr" in results else ""
    print(f"test accuracy {results['test_accuracy']:.2%}{psnr} on {len(dataset.test_images):,} images")
    images = shown_pictures(dataset)
    if options.method == "inrn":
        draw_stages(model, images, dataset.class_names, folder / "stages.png")
        return results
    if options.method == "mwt":  # adapts its INR to an image step by step
        stages = model.reconstruct(images)                                       # (N, steps+1, H, W, C)
        titles = [f"step {step}" for step in range(stages.shape[1])]
    elif snapshots:
        chosen = np.unique(np.linspace(0, len(snapshots) - 1, 8).round().astype(int))
        stages, titles = np.stack([snapshots[i] for i in chosen], axis=1), [f"epoch {i}" for i in chosen]
    else:
        stages, titles = model.reconstruct(images)[:, None], ["INR"]
    draw_reconstructions(images, stages, titles, folder / "reconstructions.png")
    if options.method == "hyperinr":
        results["operations"] = use_image_operations(model, method, dataset, options.seed, folder / "operations.png")
    return results


def use_image_operations(model, method, dataset, seed, path):
    """Upsamples, inpaints and denoises 1,000 test images, prints and returns the mean PSNR beside that of what one would
    do without a model, in dB, and draws the first images."""
    height, width = (side // 2 * 2 for side in dataset.test_images.shape[1:3])
    images = data.scale(dataset.test_images[:1000, :height, :width])
    rng = np.random.default_rng(seed)

    if dataset.finer:
        coarse, fine, factor = images, data.scale(dataset.finer(len(images), 4)), 4
    else:
        coarse, fine, factor = keras.ops.convert_to_numpy(method.resize(images, (height // 2, width // 2))), images, 2
    bilinear = keras.ops.convert_to_numpy(method.resize(coarse, fine.shape[1:3]))

    top, left = (rng.integers(0, side - side // 3, (len(images), 1, 1)) for side in (height, width))
    rows, columns = np.arange(height)[:, None] - top, np.arange(width) - left
    hole = (0 <= rows) & (rows < height // 3) & (0 <= columns) & (columns < width // 3)
    mean_filled = method.fill_with_mean(images, hole)

    noisy = np.clip(images + rng.normal(0, 0.5, images.shape), -1, 1).astype("float32")

    figures, cells = {}, []
    for operation, usual, degraded, result, truth in (
            ("upsample", "bilinear", bilinear, model.upsample(coarse, factor), fine),
            ("inpaint", "mean-filled", mean_filled, model.inpaint(images, hole), images),
            ("denoise", "noisy", noisy, model.denoise(noisy), images)):
        psnr, usual_psnr = ([float(keras.ops.psnr(*pair, 2.0)) for pair in zip(truth, pictures)]
                            for pictures in (result, degraded))
        figures[operation] = {"psnr": statistics.mean(psnr), usual: statistics.mean(usual_psnr)}
        print(f"{operation}: {figures[operation]['psnr']:.2f} dB; {usual}: {figures[operation][usual]:.2f} dB")
        cells.append([cell for i in range(2) for cell in (
            (images[i], "input"), (degraded[i], f"{usual}\n{usual_psnr[i]:.1f} dB"),
            (result[i], f"{operation}\n{psnr[i]:.1f} dB"), (truth[i], "ground truth"))])
    draw_grid(cells, path)
    return figures


# ---- Using what a run has left ----


def load_model(folder):
    try:
        sys.modules.setdefault("tensorflow", None)  # see load_dataset
        return keras.saving.load_model(folder / "model.keras")
    except Exception as error:  # missing, cut short, altered: many kinds, from ZIP, JSON, HDF5 and Keras
        refuse(f"cannot load {folder / 'model.keras'} ({type(error).__name__}: {str(error)[:120]}): train again, or "
               "bring it back from a copy")


def refuse_ablation(options, folder):
    if getattr(options, "ablate", None):
        refuse(f"{folder} holds an ablation: give one of the runs in it")


def evaluate(options, method, hyperparameters):
    """A run's model on the test split of its dataset, or of another with as many classes; or a fit's figures again."""
    refuse_ablation(options, options.evaluate)
    if getattr(options, "task", "classify") == "fit":
        name, frames = picture_name(options), load_frames(options)
        models = {network: load_model(options.evaluate / ("" if network == "inrn" else network))
                  for network in fitted(options)}

        def work(folder):
            return evaluate_fit(options, method, models, frames, folder / "fit.png")
    else:
        name, dataset, model = options.dataset, load_dataset(options), load_model(options.evaluate)
        channels, classes = dataset.test_images.shape[-1], len(dataset.class_names)
        if (channels, classes) != (model.config["channels"], model.config["num_classes"]):
            refuse(f"{options.dataset} has {classes} classes and {channels} channels, the model of {options.evaluate} "
                   f"{model.config['num_classes']} and {model.config['channels']}: take a --dataset that fits")

        def work(folder):
            return evaluate_model(options, method, model, dataset, folder, [])

    folder = options.evaluate / f"evaluation-{name.replace('/', '-')}"
    try:
        folder.mkdir(exist_ok=True)
        write_json(folder / "results.json", work(folder))
    except OSError as error:
        refuse(f"cannot write {folder} ({error.strerror}): give access, or evaluate a copy of the run")
    print(folder)
    return 0


def predict(options, method, hyperparameters):
    """Prints the likeliest classes of image files and draws their reconstructions, or what the stages make of them;
    status 1 if any is no image."""
    folder, *files = options.predict
    refuse_ablation(options, folder)
    if getattr(options, "task", "classify") == "fit":
        refuse(f"{folder} holds a fit, which knows no classes: give the folder of a classifier")
    config, status = read_config(pathlib.Path(folder)), 0
    if not files:
        refuse(f"--predict {folder} wants image files after the folder")
    model, pictures = load_model(pathlib.Path(folder)), pathlib.Path(folder) / "predictions"
    for number, name in enumerate(files):
        try:
            image = data.scale(data.read_image(name, *config["image_shape"])[None])
        except data.DataError as error:
            print(f"train.py: {error}", file=sys.stderr)
            status = 1
            continue
        probabilities = keras.ops.convert_to_numpy(keras.ops.softmax(model.predict(image, verbose=0)))[0]
        print(f"{name}: " + ", ".join(f"{config['class_names'][label]} {probabilities[label]:.1%}"
                                      for label in np.argsort(-probabilities)[:3]))
        path = pictures / f"{number}-{pathlib.Path(name).stem[:100]}.png"
        try:
            pictures.mkdir(exist_ok=True)
            if options.method == "inrn":
                draw_stages(model, image, config["class_names"], path)
            else:
                stages = model.reconstruct(image)
                draw_reconstructions(image, stages[:, -1:] if stages.ndim == 5 else stages[:, None], ["INR"], path)
        except OSError as error:
            print(f"train.py: cannot draw into {pictures} ({error.strerror}): give access", file=sys.stderr)
            status = 1
    return status


# ---- Pictures ----


def draw_grid(cells, path, inches=1.3):
    """Rows of cells (picture, title), that wide; pictures are (H, W, C), or grey (H, W), in [-1, 1], of any size."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(inches * len(cells[0]), (inches + 0.3) * len(cells)), layout="constrained")
    for row, axes_row in zip(cells, figure.subplots(len(cells), len(cells[0]), squeeze=False)):
        for (picture, title), axes in zip(row, axes_row):
            picture = picture[..., 0] if picture.ndim == 3 and picture.shape[-1] == 1 else picture
            axes.imshow(np.clip(picture / 2 + 0.5, 0, 1), cmap="gray", vmin=0, vmax=1)
            axes.set_title(title, fontsize=9)
            axes.axis("off")
    figure.savefig(path, dpi=100)


def draw_reconstructions(images, stages, titles, path):
    """Rows: images (N, H, W, C). Columns: the input, then stages (N, len(titles), H, W, C), each with its PSNR."""
    cells = [[(image, "input")] + [(picture, f"{title}\n{float(keras.ops.psnr(image, picture, 2.0)):.1f} dB")
                                   for picture, title in zip(pictures, titles)]
             for image, pictures in zip(images, stages)]
    draw_grid(cells, path)


def draw_stages(model, images, class_names, path):
    """Rows: images (N, H, W, C), their likeliest class, and how strong each stage's output is: its root mean square over
    channels, from the weakest point, black, to the strongest."""
    with torch.no_grad():
        outputs = model.stage_outputs(keras.ops.convert_to_tensor(images))
        labels = keras.ops.convert_to_numpy(model.classify(outputs["stage4"])).argmax(-1)
    cells = [[(image, f"seen as\n{class_names[label]}")] for image, label in zip(images, labels)]
    for stage, output in outputs.items():
        strength = keras.ops.convert_to_numpy(keras.ops.cast(output, "float32") ** 2).mean(-1) ** 0.5    # (N, h, w)
        for row, picture in zip(cells, strength):
            low, high = picture.min(), picture.max()
            row.append((2 * (picture - low) / max(high - low, 1e-12) - 1, f"{stage}\n{' × '.join(map(str, picture.shape))}"))
    draw_grid(cells, path)


def draw_history(history, path):
    """Every metric over the epochs, training and validation. history: dicts as Keras gives them after an epoch."""
    names = [name for name in history[0] if name != "epoch" and not name.startswith("val_")]
    draw_curves({name: {label: [row[column] for row in history]
                        for column, label in ((name, "training"), ("val_" + name, "validation")) if column in history[0]}
                 for name in names}, "epoch", path)


def draw_curves(panels, unit, path):
    """panels: for each title, for each label, values after 1, 2, … units."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3.5 * len(panels), 3), layout="constrained")
    for (title, curves), axes in zip(panels.items(), figure.subplots(1, len(panels), squeeze=False)[0]):
        for label, values in curves.items():
            axes.plot(range(1, len(values) + 1), values, marker=".", label=label)
        axes.set(title=title, xlabel=unit)
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.legend()
    figure.savefig(path, dpi=100)


def draw_table(rows, path):
    """rows: dicts with the same keys, which become the heading."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 0.25 * len(rows)))  # the table grows beyond it, and is saved whole
    axes = figure.subplots()
    axes.axis("off")
    table = axes.table([[f"{value:,}" if isinstance(value, int) else value for value in row.values()] for row in rows],
                       colLabels=[*rows[0]], loc="center", cellLoc="center")
    table.auto_set_column_width(range(len(rows[0])))
    figure.savefig(path, dpi=100, bbox_inches="tight")


# ---- Benchmark ----


def benchmark(options, method, hyperparameters):
    """Prints, as its last line, one JSON object about training steps on random grey images of 28×28 or --image-size; of a
    fit, on one random picture of 256×256."""
    rng, fits = np.random.default_rng(options.seed), getattr(options, "task", "classify") == "fit"
    size = options.image_size or (256 if fits else 28)
    count, shape = (1, (size, size, 3)) if fits else (hyperparameters["batch_size"], (size, size, 1))
    known = {"network": "inrn", "time": False} if fits else {"image_shape": shape, "num_classes": 10}

    def build():
        teacher = None if fits else make_teacher(options, method, hyperparameters, shape, 10)
        return build_model(options, method, hyperparameters, 1000, teacher, **known)

    model = build()
    device = device_of(model)
    batch = (torch.tensor(rng.uniform(-1, 1, (count, *shape)), dtype=torch.float32, device=device),
             torch.tensor(np.zeros(count) if fits else rng.integers(0, 10, count), device=device))

    def seconds(function, repeats):
        times = []
        for _ in range(repeats):
            start = time.perf_counter()
            function()
            if device.type == "cuda":
                torch.cuda.synchronize()
            times.append(time.perf_counter() - start)
        return statistics.median(times)

    from torch.utils.flop_counter import FlopCounterMode

    def step():
        model.train_step(batch)

    print(f"{options.preset}: batch {count} of {shape}, {device_name(model)}; warming up")
    seconds(step, 3)
    step_seconds = seconds(step, 9)
    if device.type == "cuda":
        memory = torch.cuda.max_memory_allocated() / 2**20
    else:
        import resource  # not on Windows

        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)
    # Counted on the eager form, with attention as two plain products: the counter knows these on every device.
    options.compile = False
    model = build()
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        step()
    dtype = torch.bfloat16 if options.precision == "mixed_bfloat16" else torch.float32
    side = 8192 if device.type == "cuda" else 2048
    matrix = torch.ones(side, side, dtype=dtype, device=device)
    seconds(lambda: matrix @ matrix, 3)
    rate = 2 * side**3 / seconds(lambda: matrix @ matrix, 9) / 1e9
    gflop = counter.get_total_flops() / 1e9
    print(json.dumps({"ms_per_step": round(1e3 * step_seconds, 2), "images_per_second": round(count / step_seconds, 1),
                      "peak_memory_mb": round(memory), "gflop_per_step": round(gflop, 2), "matmul_gflops": round(rate),
                      "share_of_matmul_rate": round(gflop / step_seconds / rate, 3)}))
    return 0


def keep_freed_memory():
    """Lets the C library keep the memory that a training step frees for the next one, where it is glibc: giving it back
    to the system after every operation costs up to a fifth of a step."""
    if platform.libc_ver()[0] == "glibc":
        mallopt = ctypes.CDLL(None).mallopt
        if mallopt(-3, 2**30):  # M_MMAP_THRESHOLD; older versions take less
            mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD


def main(arguments=None):
    try:
        options, method, hyperparameters = parse(arguments)
        keep_freed_memory()
        torch.set_float32_matmul_precision("high")  # TF32 on GPUs that have it; no effect on CPUs
        command = (evaluate if options.evaluate else predict if options.predict else benchmark if options.benchmark else
                   ablate if getattr(options, "ablate", None) else fit if getattr(options, "task", None) == "fit" else
                   train)
        with signals_to([]):
            return command(options, method, hyperparameters)
    except Interrupted as interruption:
        print("\ntrain.py: interrupted", file=sys.stderr)
        return 128 + interruption.args[0]


if __name__ == "__main__":
    sys.exit(main())
