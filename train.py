"""Trains one method on one dataset: `python train.py --method mwt --dataset mnist`; `--help` lists all options.

Reads the options, loads the data, builds the method's model from its preset, fits it, evaluates it on the test split
and writes a folder: config.json, history.csv, model.keras, results.json and pictures.
"""

import argparse
import csv
import ctypes
import importlib
import inspect
import json
import math
import os
import pathlib
import platform
import random
import statistics
import sys
import time

os.environ.setdefault("KERAS_BACKEND", "torch")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import keras
import numpy as np
import torch

import data

METHODS = {"mwt": "MWT", "hyperinr": "HyperINR"}  # the file, and the model's class in it


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
    """Options as a namespace, the method's module, and its preset with the options' changes."""
    first = Parser(add_help=False)
    first.add_argument("--method", choices=METHODS, default="mwt", help="default: mwt")
    method = importlib.import_module(first.parse_known_args(arguments)[0].method)

    parser = Parser(description=__doc__.splitlines()[0], parents=[first], allow_abbrev=False)
    parser.add_argument("--dataset", default="shapes", help="shapes (default), or the TFDS name of an image "
                        "classification dataset: mnist, fashion_mnist, cifar10, cifar100, imagenette/320px-v2, …")
    parser.add_argument("--preset", choices=method.PRESETS, default="quick",
                        help="hyperparameters to start from (default: quick)")
    parser.add_argument("--seed", type=at_least(0), default=0,
                        help="of the weights, the order of the data, and shapes (default: 0)")
    parser.add_argument("--limit", type=at_least(1), help="train on that many images at most (default: all)")
    parser.add_argument("--validation-images", type=at_least(0), default=2000, help="held out of the training split "
                        "and evaluated after each epoch; 0 trains on everything (default: 2000)")
    parser.add_argument("--image-size", type=at_least(8), help="scale and crop all images to that many pixels squared "
                        "(default: the dataset's own size)")
    parser.add_argument("--augment", action="store_true", help="shift, and where classes allow it mirror, at random")
    parser.add_argument("--data-dir",
                        help="where TFDS keeps datasets (default: $TFDS_DATA_DIR or ~/tensorflow_datasets)")
    parser.add_argument("--run-dir", type=pathlib.Path, help="folder to write (default: "
                        "runs/<method>-<dataset>-<preset>-<seed>)")
    parser.add_argument("--precision", choices=["float32", "mixed_bfloat16"], default="float32",
                        help="mixed_bfloat16 keeps the INR in float32 (default: float32)")
    parser.add_argument("--compile", action="store_true",
                        help="compile what the method does with its INR (minutes at the start)")
    parser.add_argument("--benchmark", action="store_true", help="time training steps, train nothing")
    group = parser.add_argument_group("hyperparameters", f"explained in {method.__name__}.py; default: the preset's")
    for name, value in method.PRESETS["quick"].items():
        group.add_argument("--" + name.replace("_", "-"), type=type_like(value), metavar=type(value).__name__.upper(),
                           help=", ".join(f"{preset} {values[name]}" for preset, values in method.PRESETS.items()),
                           default=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    preset = method.PRESETS[options.preset]
    return options, method, {name: getattr(options, name, value) for name, value in preset.items()}


# ---- Training ----


def build_model(options, method, hyperparameters, image_shape, num_classes, total_steps):
    """The method's model for images of image_shape (H, W, C), compiled; hyperparameters, and what the constructor wants
    to know about the images, go to its constructor or to its `compile`, as their names say."""
    available = {**hyperparameters, "image_size": image_shape[0], "channels": image_shape[-1]}

    def accepted_by(function):
        names = inspect.signature(function).parameters
        return {name: value for name, value in available.items() if name in names}
    for seed in (random.seed, np.random.seed, torch.manual_seed):  # Keras's function would import TensorFlow
        seed(options.seed)
    keras.config.set_dtype_policy(options.precision)
    model_class = getattr(method, METHODS[options.method])
    try:
        model = model_class(num_classes=num_classes, **accepted_by(model_class.__init__))
        model.compile(total_steps=total_steps, jit_compile=options.compile, **accepted_by(model_class.compile))
    except ValueError as error:
        refuse(error)
    return model


class KeepGoodModel(keras.callbacks.Callback):
    """Saves the model at the start and after each epoch; stops, and leaves the file as it is, once numbers are not
    finite any more."""

    failed = None

    def __init__(self, path):
        super().__init__()
        self.path, self.epochs = path, 0

    def save(self):
        beside = self.path.with_name("saving.keras")
        self.model.save(beside)
        os.replace(beside, self.path)  # in one step: an interrupted save leaves the old file

    def fail(self, what):
        self.failed = f"{what} in epoch {self.epochs + 1}"
        self.model.stop_training = True

    def on_train_begin(self, logs=None):
        self.save()

    def on_train_batch_end(self, batch, logs=None):
        if not math.isfinite(logs["loss"]):
            self.fail(f"the loss became {logs['loss']} in step {batch + 1}")

    def on_epoch_end(self, epoch, logs=None):
        if not self.failed and not all(np.isfinite(weight).all() for weight in self.model.get_weights()):
            self.fail("the weights became infinite or not a number")
        if not self.failed:
            self.epochs = epoch + 1
            self.save()


class EpochTimes(keras.callbacks.Callback):
    """Seconds that each epoch took, validation included."""

    def on_train_begin(self, logs=None):
        self.seconds = []

    def on_epoch_begin(self, epoch, logs=None):
        self.start = time.perf_counter()

    def on_epoch_end(self, epoch, logs=None):
        self.seconds.append(time.perf_counter() - self.start)


class Snapshots(keras.callbacks.Callback):
    """Keeps what the model makes of some images before the first and after each epoch: arrays (N, H, W, C)."""

    def __init__(self, images):
        super().__init__()
        self.images, self.taken = images, []

    def on_train_begin(self, logs=None):
        self.taken.append(self.model.reconstruct(self.images))

    def on_epoch_end(self, epoch, logs=None):
        self.taken.append(self.model.reconstruct(self.images))


def device_of(model):
    return model.trainable_variables[0].value.device


def device_name(model):
    if device_of(model).type == "cuda":
        return torch.cuda.get_device_name()
    return f"{device_of(model).type.upper()}, {torch.get_num_threads()} threads"


def train(options, method, hyperparameters):
    """One run, from data to pictures. Returns the exit status."""
    folder = options.run_dir or pathlib.Path("runs", "-".join(
        [options.method, options.dataset.replace("/", "-"), options.preset, str(options.seed)]))
    try:
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            refuse(f"{folder} already holds a run: take another --run-dir or --seed, or remove it")
    except OSError as error:
        refuse(f"cannot read {folder} ({error.strerror}): take another --run-dir")
    build_model(options, method, hyperparameters, (28, 28, 1), 10, total_steps=1)  # refuses before it loads what takes time
    try:
        dataset = data.load(options.dataset, options.data_dir, options.image_size, options.seed)
    except data.DataError as error:
        refuse(error)
    # Keras would import TensorFlow to save a model, seconds for nothing: from here on it counts as not installed.
    sys.modules.setdefault("tensorflow", None)
    order = np.random.default_rng(options.seed).permutation(len(dataset.train_images))
    held_out, chosen = np.split(order, [options.validation_images])
    chosen = chosen[:options.limit]
    batch_size = hyperparameters["batch_size"]
    if len(chosen) < batch_size:
        refuse(f"{len(chosen)} training images do not fill a batch of {batch_size}: "
               "take a smaller --batch-size or --validation-images, or a larger --limit")
    batches = data.Batches(dataset.train_images[chosen], dataset.train_labels[chosen], batch_size,
                           seed=options.seed, augment=options.augment, flip=dataset.flip)
    evaluated = max(1, 200 * 28**2 // math.prod(dataset.test_images.shape[1:3]))  # images at once: bounds the memory
    validation = data.Batches(dataset.train_images[held_out], dataset.train_labels[held_out], evaluated)
    test = data.Batches(dataset.test_images, dataset.test_labels, evaluated)
    epochs = hyperparameters["epochs"]
    model = build_model(options, method, hyperparameters, dataset.train_images.shape[1:], len(dataset.class_names),
                        epochs * len(batches))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        versions = {"python": platform.python_version(), "keras": keras.__version__, "torch": torch.__version__,
                    "numpy": np.__version__}
        settings = {name: str(value) if isinstance(value, pathlib.Path) else value
                    for name, value in {**vars(options), **hyperparameters}.items()}
        (folder / "config.json").write_text(json.dumps({**settings, "versions": versions}, indent=1))
    except OSError as error:
        refuse(f"cannot write {folder} ({error.strerror}): take another --run-dir")

    print(f"{options.method} on {options.dataset}: {len(chosen):,} training images of {dataset.train_images.shape[1:]}, "
          f"{len(held_out):,} for validation, {len(dataset.test_images):,} for the test; {device_name(model)}")
    guard, times = KeepGoodModel(folder / "model.keras"), EpochTimes()
    shown = dataset.test_images[:8].astype("float32") / 127.5 - 1
    snapshots = Snapshots(shown)
    model.fit(batches, epochs=epochs, validation_data=validation if len(held_out) else None,
              callbacks=[guard, times, keras.callbacks.CSVLogger(folder / "history.csv"),
                         *([] if options.method == "mwt" else [snapshots])])
    if guard.failed:
        print(f"train.py: stopped, {guard.failed}; {folder / 'model.keras'} holds the model after {guard.epochs} "
              "epochs: lower the learning rates, or take another --seed", file=sys.stderr)
        return 1
    results = {f"test_{name}": value for name, value in model.evaluate(test, verbose=0, return_dict=True).items()}
    results |= {"parameters": model.count_params(), "seconds_per_epoch": statistics.mean(times.seconds),
                "device": device_name(model), "method": options.method, "preset": options.preset,
                "dataset": options.dataset}
    draw_curves(folder)
    if options.method == "mwt":  # adapts its INR to an image step by step
        stages = model.reconstruct(shown)
        draw_reconstructions(shown, stages, [f"step {step}" for step in range(stages.shape[1])],
                             folder / "reconstructions.png")
    else:
        chosen = np.unique(np.linspace(0, epochs, 8).round().astype(int))
        draw_reconstructions(shown, np.stack([snapshots.taken[epoch] for epoch in chosen], axis=1),
                             [f"epoch {epoch}" for epoch in chosen], folder / "reconstructions.png")
    print(f"test accuracy {results['test_accuracy']:.2%}, PSNR {results['test_psnr']:.2f} dB on "
          f"{len(dataset.test_images):,} images")
    if options.method == "hyperinr":
        results["operations"] = use_image_operations(model, method, dataset, options.seed, folder / "operations.png")
    (folder / "results.json").write_text(json.dumps(results, indent=1))
    print(folder)
    return 0


def use_image_operations(model, method, dataset, seed, path):
    """Upsamples, inpaints and denoises 1,000 test images, prints and returns the mean PSNR beside that of what one would
    do without a model, in dB, and draws the first images."""
    height, width = (side // 2 * 2 for side in dataset.test_images.shape[1:3])
    images = dataset.test_images[:1000, :height, :width].astype("float32") / 127.5 - 1
    rng = np.random.default_rng(seed)

    if dataset.finer:
        coarse, fine, factor = images, dataset.finer(len(images), 4).astype("float32") / 127.5 - 1, 4
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


# ---- Pictures ----


def draw_grid(cells, path):
    """Rows of cells (picture, title); pictures are (H, W, C) in [-1, 1], of any size."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(1.3 * len(cells[0]), 1.6 * len(cells)), layout="constrained")
    for row, axes_row in zip(cells, figure.subplots(len(cells), len(cells[0]), squeeze=False)):
        for (picture, title), axes in zip(row, axes_row):
            axes.imshow(np.clip(picture / 2 + 0.5, 0, 1).squeeze(), cmap="gray", vmin=0, vmax=1)
            axes.set_title(title, fontsize=9)
            axes.axis("off")
    figure.savefig(path, dpi=100)


def draw_reconstructions(images, stages, titles, path):
    """Rows: images (N, H, W, C). Columns: the input, then stages (N, len(titles), H, W, C), each with its PSNR."""
    cells = [[(image, "input")] + [(picture, f"{title}\n{float(keras.ops.psnr(image, picture, 2.0)):.1f} dB")
                                   for picture, title in zip(pictures, titles)]
             for image, pictures in zip(images, stages)]
    draw_grid(cells, path)


def draw_curves(folder):
    """Every metric of history.csv over the epochs, training and validation."""
    from matplotlib.figure import Figure

    with open(folder / "history.csv", newline="") as file:
        history = list(csv.DictReader(file))
    names = [name for name in history[0] if name != "epoch" and not name.startswith("val_")]
    figure = Figure(figsize=(3.5 * len(names), 3), layout="constrained")
    for name, axes in zip(names, figure.subplots(1, len(names), squeeze=False)[0]):
        for column, label in ((name, "training"), ("val_" + name, "validation")):
            if history[0][column] != "NA":  # what CSVLogger writes where there is no validation
                axes.plot([int(row["epoch"]) + 1 for row in history], [float(row[column]) for row in history],
                          marker=".", label=label)
        axes.set(title=name, xlabel="epoch")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.legend()
    figure.savefig(folder / "curves.png", dpi=100)


# ---- Benchmark ----


def benchmark(options, method, hyperparameters):
    """Prints, as its last line, one JSON object about training steps on random grey images of 28×28 or --image-size."""
    size = options.image_size or 28
    count = hyperparameters["batch_size"]
    model = build_model(options, method, hyperparameters, (size, size, 1), 10, total_steps=1000)
    rng = np.random.default_rng(options.seed)
    device = device_of(model)
    batch = (torch.tensor(rng.uniform(-1, 1, (count, size, size, 1)), dtype=torch.float32, device=device),
             torch.tensor(rng.integers(0, 10, count), device=device))

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

    print(f"{options.preset}: batch {count} of ({size}, {size}, 1), {device_name(model)}; warming up")
    seconds(step, 3)
    step_seconds = seconds(step, 9)
    if device.type == "cuda":
        memory = torch.cuda.max_memory_allocated() / 2**20
    else:
        import resource  # not on Windows

        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)
    # Counted on the eager form, with attention as two plain products: the counter knows these on every device.
    options.compile = False
    model = build_model(options, method, hyperparameters, (size, size, 1), 10, total_steps=1000)
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
    options, method, hyperparameters = parse(arguments)
    keep_freed_memory()
    torch.set_float32_matmul_precision("high")  # TF32 on GPUs that have it; no effect on CPUs
    return (benchmark if options.benchmark else train)(options, method, hyperparameters)


if __name__ == "__main__":
    sys.exit(main())
