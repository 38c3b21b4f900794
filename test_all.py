"""`pytest test_all.py`: no network, no GPU. What a test compares with comes from elsewhere: autograd's double backward,
float64, a plain loop, PyTorch's own layers, a closed formula."""

import csv
import errno
import json
import math
import os
import pathlib
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time

os.environ.update(KERAS_BACKEND="torch", KERAS_TORCH_DEVICE="cpu", CUDA_VISIBLE_DEVICES="")

import keras
import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional

import data
import hyperinr
import inrn
import mwt
import train

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # Keras's, with NumPy 2
HERE = pathlib.Path(__file__).parent
TINY = ["--dim", "16", "--depth", "2", "--inner-steps", "2", "--blocks", "1", "--batch-size", "16", "--epochs", "1",
        "--validation-images", "20", "--limit", "64"]


TINY_HYPERINR = ["--method", "hyperinr", "--dim", "8", "--depth", "1", "--encoder-width", "2", "--latent-dim", "16",
                 "--batch-size", "16", "--epochs", "2", "--validation-images", "20", "--limit", "64"]


TINY_INRN = ["--method", "inrn", "--widths", "8,8,12,16", "--blocks", "1,1,2,1", "--batch-size", "16", "--epochs", "2",
             "--teacher-epochs", "1", "--validation-images", "20", "--limit", "64"]
TINY_FIT = ["--method", "inrn", "--task", "fit", "--image-size", "24", "--width", "8", "--blocks", "1", "--features", "6",
            "--steps", "40"]


def run_python(*arguments, cwd=HERE, **environment):
    return subprocess.run([sys.executable, *map(str, arguments)], cwd=cwd, capture_output=True, text=True,
                          env={**os.environ, **environment}, timeout=240)


def random_batch(count=5, size=6, channels=1, classes=10, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return (torch.rand(count, size, size, channels, generator=generator, dtype=dtype) * 2 - 1,
            torch.randint(0, classes, (count,), generator=generator))


def small_mwt(images, dtype="float32", **changes):
    """A small built model whose learned base and omega are far from their defaults, so that neither hides an error."""
    keras.utils.set_random_seed(1)
    arguments = dict(channels=images.shape[-1], dim=8, depth=3, omega=3.0, inner_steps=3, blocks=2, token_scale=20.0,
                     mlp_ratio=2)
    model = mwt.MWT(**{**arguments, **changes}, dtype=dtype)
    base = model.classifier.layers[0].base
    base.assign(0.01 * keras.random.normal(base.shape))
    return model


# ---- The oracle: MWT once more in plain PyTorch, the inner loop differentiated twice ----


def double_backward_siren(model, samples):
    """Tokens and final errors by `torch.autograd.grad(create_graph=True)`, image by image for the tokens' layout."""
    siren = model.siren
    count, depth, dim = samples[0][1].shape[0], len(siren.initial) - 1, siren.initial[0].shape[1]
    kernels = [matrix.value[:-1].expand(count, -1, -1) for matrix in siren.initial]
    biases = [matrix.value[-1].expand(count, -1) for matrix in siren.initial]
    start = kernels, biases
    head_kernel = siren.head.value[:-1] * siren.head_scale.value
    head_bias = siren.head.value[-1] * siren.head_scale.value

    def errors(kernels, biases, coords, pixels):
        hidden = coords
        for layer, (kernel, bias) in enumerate(zip(kernels, biases)):
            before = hidden @ kernel + bias[:, None]
            hidden = torch.sin(siren.omega * before) if layer == 0 else torch.sin(before)
        return ((hidden @ head_kernel + head_bias - pixels) ** 2).mean(dim=(1, 2))

    for step, (coords, pixels) in enumerate(samples[:-1]):
        gradients = torch.autograd.grad(errors(kernels, biases, coords, pixels).sum(), [*kernels, *biases],
                                        create_graph=True)
        rates = [matrix.value[0 if siren.shared_step_sizes else step] for matrix in siren.step_sizes]
        kernels = [k - rate[:-1] * g for k, rate, g in zip(kernels, rates, gradients)]
        biases = [b - rate[-1] * g for b, rate, g in zip(biases, rates, gradients[len(rates):])]
    tokens = []
    for image in range(count):
        for layer in range(1, depth + 1):
            for neuron in range(dim):
                tokens.append(torch.cat([(kernels[layer] - start[0][layer])[image, :, neuron],
                                         (biases[layer] - start[1][layer])[image, neuron, None]]))
    tokens = torch.stack(tokens).reshape(count, depth * dim, dim + 1)
    return tokens, errors(kernels, biases, *samples[-1])


def plain_transformer(classifier, tokens):
    """The Transformer in `torch.nn.functional`, attention written out."""
    def dense(layer, x):
        y = x @ layer.kernel.value
        return y if layer.bias is None else y + layer.bias.value

    def norm(layer, x):
        return functional.layer_norm(x, x.shape[-1:], layer.gamma.value, layer.beta.value, 1e-5)

    base, embed, *blocks, _, classify = classifier.layers
    x = dense(embed, base.scale * (tokens + base.base.value))
    for block in blocks:
        dim = x.shape[-1]
        heads = max(1, dim // 64)
        q, k, v = (part.unflatten(-1, (heads, -1)) for part in dense(block.qkv, norm(block.norm1, x)).split(dim, -1))
        scores = torch.einsum("nihd,njhd->nhij", q, k) / math.sqrt(dim // heads)
        attended = torch.einsum("nhij,njhd->nihd", scores.softmax(-1), v).flatten(-2)
        x = x + block.scale1.value * dense(block.project, attended)
        hidden = functional.gelu(dense(type("", (), dict(kernel=block.expand.kernel, bias=block.expand.bias)),
                                       norm(block.norm2, x)))
        x = x + block.scale2.value * dense(block.reduce, hidden)
    return dense(classify, x.mean(1))


def relative_error(actual, expected):
    return ((actual - expected).norm() / expected.norm()).item()


# ---- mwt.py: the inner loop ----


@pytest.mark.parametrize("subsample", [1.0, 0.5])
@pytest.mark.parametrize("shared", [False, True])
def test_inner_loop_equals_double_backward(subsample, shared):
    images, _ = random_batch(channels=3, dtype=torch.float64)
    model = small_mwt(images, "float64", subsample=subsample, shared_step_sizes=shared)
    samples = model.siren.sample_points(images, training=True)
    model.siren.sample_points = lambda *arguments: samples
    tokens, errors = model.siren(images, training=True)
    expected_tokens, expected_errors = double_backward_siren(model, samples)
    assert relative_error(tokens, expected_tokens) < 1e-9
    assert relative_error(errors[-1], expected_errors) < 1e-9

    variables = [variable.value for variable in model.siren.trainable_variables]
    assert len(variables) == 2 * 4 + 2
    weights = torch.randn(tokens.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    actual = torch.autograd.grad((tokens * weights).sum() + errors[-1].sum(), variables)
    expected = torch.autograd.grad((expected_tokens * weights).sum() + expected_errors.sum(), variables)
    for variable, gradient, reference in zip(model.siren.trainable_variables, actual, expected):
        assert relative_error(gradient, reference) < 1e-9, variable.path


def test_each_inner_step_descends_by_the_gradient():
    """One step against autograd's first gradient, parameter by parameter, on weights that differ per image."""
    images, _ = random_batch(dtype=torch.float64)
    model = small_mwt(images, "float64")
    (coords, pixels), *_ = model.siren.sample_points(images, training=False)
    weights, head, rates = model.siren.parameters_for(1)
    weights = [(matrix.detach() + 0.1 * torch.randn(5, *matrix.shape, dtype=torch.float64)).requires_grad_()
               for matrix in weights]
    adapted, errors = mwt.inner_step(weights, rates[0], head, coords, pixels, 3.0)
    rendered = mwt.render(weights, head, coords, 3.0)
    expected_errors = ((rendered - pixels) ** 2).mean(dim=(1, 2))
    assert relative_error(errors, expected_errors) < 1e-12
    for new, old, rate, gradient in zip(adapted, weights, rates[0],
                                        torch.autograd.grad(expected_errors.sum(), weights)):
        assert relative_error(new - old, -rate * gradient) < 1e-9


@pytest.mark.parametrize("task_weight", [0.0, 0.01, 1.0])
def test_training_gradient_equals_double_backward(task_weight):
    images, labels = random_batch(dtype=torch.float64)
    model = small_mwt(images, "float64", task_weight=task_weight)
    logits, errors, cross_entropy = model.losses(images, labels, training=True)
    variables = [variable.value for variable in model.trainable_variables]
    actual = torch.autograd.grad(errors.mean() + cross_entropy, variables)

    tokens, expected_errors = double_backward_siren(model, model.siren.sample_points(images, False))
    expected_logits = plain_transformer(model.classifier, tokens)
    assert relative_error(logits, expected_logits) < 1e-6  # `keras.ops.matmul` rounds float64 to float32
    expected_loss = functional.cross_entropy(expected_logits, labels)
    of_mse = torch.autograd.grad(expected_errors.mean(), variables, retain_graph=True, allow_unused=True,
                                 materialize_grads=True)
    of_task = torch.autograd.grad(expected_loss, variables, allow_unused=True, materialize_grads=True)
    in_siren = {id(variable) for variable in model.siren.trainable_variables}
    for variable, gradient, mse, task in zip(model.trainable_variables, actual, of_mse, of_task):
        weight = task_weight if id(variable) in in_siren else 1.0
        assert relative_error(gradient, mse + weight * task) < 1e-6, variable.path


def test_images_do_not_mix():
    images, _ = random_batch()
    model = small_mwt(images)
    changed = images.clone()
    changed[2] = -changed[2]
    for output in (lambda x: model.siren(x)[0], model):
        differs = [not torch.equal(a, b) for a, b in zip(output(images), output(changed))]
        assert differs == [False, False, True, False, False]


def test_subsampling_draws_without_replacement_anew_per_image_and_step():
    images = torch.arange(5 * 36, dtype=torch.float32).reshape(5, 6, 6, 1)  # a pixel's value tells where it was
    model = small_mwt(images, subsample=0.5)
    samples = model.siren.sample_points(images, training=True)
    drawn = set()
    for coords, pixels in samples:
        assert pixels.shape == (5, 18, 1) and coords.shape == (5, 18, 2)
        for image in range(5):
            values = pixels[image, :, 0].long() - 36 * image
            assert len(set(values.tolist())) == 18 and 0 <= values.min() and values.max() < 36
            expected = torch.stack([values // 6, values % 6], dim=-1) / 2.5 - 1
            torch.testing.assert_close(coords[image], expected.float())
            drawn.add(tuple(sorted(values.tolist())))
    assert len(samples) == 4 and len(drawn) == 20
    assert model.siren.sample_points(images, training=False)[0][1].shape == (5, 36, 1)


def test_inner_loop_compiles_as_one_graph(monkeypatch):
    images, labels = random_batch()
    compile = torch.compile
    monkeypatch.setattr(torch, "compile", lambda function, **options: compile(function, backend="aot_eager", **options))
    gradients = []
    for jit_compile in (False, True):
        model = small_mwt(images)
        model.compile(total_steps=1, jit_compile=jit_compile)
        logits, errors, cross_entropy = model.losses(images, labels, training=True)
        (errors.mean() + cross_entropy).backward()
        gradients.append([logits, *(variable.value.grad for variable in model.trainable_variables)])
    assert model.siren.inner_loop is not mwt.inner_loop
    for compiled, eager in zip(*gradients):
        torch.testing.assert_close(compiled, eager, rtol=1e-4, atol=1e-6)


def test_initial_values_are_the_published_ones():
    keras.utils.set_random_seed(0)
    model = mwt.MWT(**{name: mwt.PAPER[name] for name in ("dim", "depth", "inner_steps")})
    for layer, (matrix, rates) in enumerate(zip(model.siren.initial, model.siren.step_sizes)):
        limit = math.sqrt(6 / 128) if layer else 1 / 2
        assert 0.95 * limit < matrix.value[:-1].abs().max() <= limit
        assert torch.all(matrix.value[-1] == 0)
        assert rates.shape == (6, *matrix.shape)
        assert 0.1 <= rates.value.min() < 0.11 and 0.99 < rates.value.max() <= 1.0
    assert model.siren.head_scale.value.tolist() == pytest.approx([0.1])


def test_reconstruct_renders_every_step_at_any_size():
    images, _ = random_batch(size=7)
    model = small_mwt(images)
    stages = model.reconstruct(images)
    assert stages.shape == (5, 4, 7, 7, 1)
    errors = model.siren(images)[1].detach().numpy()                            # (steps + 1, N)
    np.testing.assert_allclose(((stages - images[:, None].numpy()) ** 2).mean(axis=(2, 3, 4)).T, errors, rtol=1e-4)
    larger = model.reconstruct(images, size=(13, 19))
    assert larger.shape == (5, 4, 13, 19, 1)
    np.testing.assert_allclose(larger[:, :, ::2, ::3], stages, atol=1e-5)  # every second and third point is an old one
    assert model.reconstruct(images, steps=0).shape == (5, 1, 7, 7, 1)
    with pytest.raises(ValueError, match="shared_step_sizes"):
        model.reconstruct(images, steps=4)


def test_shared_step_sizes_allow_more_steps():
    images, _ = random_batch()
    model = small_mwt(images, shared_step_sizes=True)
    stages = model.reconstruct(images, steps=40)
    errors = ((stages - images[:, None].numpy()) ** 2).mean(axis=(0, 2, 3, 4))
    assert len(errors) == 41 and errors[40] < errors[3] < errors[0]


# ---- mwt.py: the model as a Keras model ----


def test_schedule_equals_pytorch():
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.AdamW([parameter], lr=0.01)
    reference = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.01, total_steps=200, pct_start=0.05)
    schedule = mwt.OneCycle(0.01, 200, 0.05)
    for step in range(199):
        assert float(schedule(step)) == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-3, abs=1e-9), step
        assert schedule.beta_1(step) == pytest.approx(optimizer.param_groups[0]["betas"][0], abs=1e-5), step
        optimizer.step()
        reference.step()


def test_a_train_step_equals_pytorch_adamw():
    """Three clipped AdamW optimizers with their own rates, against `torch.optim`, over three steps."""
    images, labels = random_batch(count=4)
    model = small_mwt(images, task_weight=0.5)
    model.compile(total_steps=40, siren_rate=1e-3, step_size_rate=1e-1, classifier_rate=1e-2, weight_decay=0.1,
                  clip_norm=0.01)
    for optimizer in model.optimizers:
        optimizer.epsilon = 1e-14  # Keras adds epsilon before, PyTorch after the correction of the second moment
    twin = mwt.MWT.from_config(model.get_config())
    twin.set_weights(model.get_weights())
    twin.compile(total_steps=1)
    groups = [[variable.value for variable in variables] for variables in twin.variable_groups()]
    assert sum(map(len, groups)) == len(twin.trainable_variables)
    optimizers = [torch.optim.AdamW(group, lr=1.0, weight_decay=0.1, eps=1e-14) for group in groups]
    schedules = [torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=rate, total_steps=40, pct_start=0.05)
                 for optimizer, rate in zip(optimizers, (1e-3, 1e-1, 1e-2))]
    for _ in range(3):
        model.train_step((images, labels))
        twin.zero_grad()
        _, errors, cross_entropy = twin.losses(images, labels, training=True)
        (errors.mean() + cross_entropy).backward()
        for group, optimizer, schedule in zip(groups, optimizers, schedules):
            torch.nn.utils.clip_grad_norm_(group, 0.01)
            optimizer.step()
            schedule.step()
    for ours, reference in zip(model.trainable_variables, twin.trainable_variables):
        torch.testing.assert_close(ours.value, reference.value, rtol=1e-4, atol=2e-5, msg=ours.path)


def test_training_lowers_both_losses():
    images, labels = data.shapes(range(20), size=12)
    images = images.astype("float32") / 127.5 - 1
    model = small_mwt(images, dim=32, depth=1, token_scale=100.0, task_weight=0.1)
    model.compile(total_steps=150, siren_rate=3e-3, classifier_rate=3e-3)
    first = model.evaluate(images, labels, verbose=0, return_dict=True)
    model.fit(images, labels, batch_size=20, epochs=150, verbose=0)
    last = model.evaluate(images, labels, verbose=0, return_dict=True)
    assert last["mse"] < 0.5 * first["mse"]
    assert last["loss"] - last["mse"] < 0.5 * (first["loss"] - first["mse"])
    assert last["accuracy"] > 0.7


def test_metrics_are_what_they_say():
    images, labels = random_batch(count=7)
    model = small_mwt(images, subsample=0.5)
    model.compile(total_steps=1)
    metrics = model.evaluate(images, labels, batch_size=3, verbose=0, return_dict=True)
    logits, errors = torch.tensor(model.predict(images, verbose=0)), model.siren(images)[1][-1].detach()
    assert metrics["accuracy"] == pytest.approx((logits.argmax(1) == labels).float().mean().item())
    assert metrics["mse"] == pytest.approx(errors.mean().item(), rel=1e-5)
    assert metrics["psnr"] == pytest.approx((10 * torch.log10(4 / errors)).mean().item(), rel=1e-5)
    expected = errors.mean() + functional.cross_entropy(logits, labels)
    assert metrics["loss"] == pytest.approx(expected.item(), rel=1e-5)


def test_saved_model_in_a_fresh_process(tmp_path):
    images, labels = random_batch(count=8)
    model = small_mwt(images, subsample=0.5)
    model.compile(total_steps=5, classifier_rate=1e-2)
    model.fit(images, labels, batch_size=4, epochs=2, verbose=0)
    model.save(tmp_path / "model.keras")
    np.savez(tmp_path / "case.npz", images=images, logits=model.predict(images, verbose=0),
             momentum=model.optimizers[2].variables[2].numpy())
    shutil.copy(HERE / "mwt.py", tmp_path)
    (tmp_path / "check.py").write_text("""
import numpy as np, mwt, keras
model, case = keras.saving.load_model("model.keras"), np.load("case.npz")
assert abs(model.predict(case["images"], verbose=0) - case["logits"]).max() < 1e-6
assert int(model.optimizers[2].iterations) == 4
assert abs(model.optimizers[2].variables[2].numpy() - case["momentum"]).max() == 0
""")
    result = run_python("check.py", cwd=tmp_path)
    assert result.returncode == 0, result.stderr


def expected_parameters(dim, depth, steps, blocks, ratio, channels=1, classes=10):
    siren = 3 * dim + depth * (dim + 1) * dim
    head = (dim + 1) * channels + channels
    block = 2 * 2 * dim + 3 * dim**2 + dim**2 + dim + 2 * ratio * dim**2 + ratio * dim + dim + 2 * dim
    classifier = depth * dim * (dim + 1) + (dim + 1) * dim + dim + blocks * block + dim * classes + classes
    return siren * (1 + steps) + head + classifier


@pytest.mark.parametrize("preset", mwt.PRESETS)
def test_presets_build_with_the_expected_number_of_parameters(preset):
    values = mwt.PRESETS[preset]
    assert values.keys() == mwt.PAPER.keys()
    options, method, hyperparameters = train.parse(["--preset", preset])
    model = train.build_model(options, method, hyperparameters, 100, image_shape=(28, 28, 1), num_classes=10)
    assert model(np.zeros((2, 8, 8, 1), "float32")).shape == (2, 10)
    expected = expected_parameters(values["dim"], values["depth"], values["inner_steps"], values["blocks"],
                                   values["mlp_ratio"])
    assert model.count_params() == expected
    lines = []
    model.summary(print_fn=lines.append)
    assert f"{expected:,}" in "\n".join(map(str, lines))
    for optimizer, schedule, peak in zip(model.optimizers, model.schedules,
                                         ("siren_rate", "step_size_rate", "classifier_rate")):
        assert schedule.peak == values[peak] and optimizer.global_clipnorm == values["clip_norm"]


def test_published_hyperparameters():
    """Gielisse & van Gemert's settings, typed from the paper's code."""
    assert mwt.PRESETS["paper"] == dict(
        dim=128, depth=4, omega=10.0, inner_steps=6, shared_step_sizes=False, subsample=1.0, blocks=10, mlp_ratio=1,
        token_scale=500.0, task_weight=0.01, siren_rate=1e-4, step_size_rate=1e-2, classifier_rate=1e-4, warmup=0.05,
        weight_decay=1e-4, clip_norm=1.0, batch_size=16, epochs=10)
    assert mwt.PRESETS["paper-large"]["dim"] == 256
    assert mwt.PRESETS["paper-wide"]["mlp_ratio"] == 4
    assert mwt.PRESETS["paper-separate"]["task_weight"] == 0


def test_mixed_precision_leaves_the_inner_loop_in_float32():
    images, labels = random_batch()
    model = small_mwt(images, "mixed_bfloat16")
    seen = {"siren": [], "block": []}
    model.siren.register_forward_hook(lambda layer, inputs, output: seen["siren"].append(output[0]))
    model.classifier.layers[2].register_forward_hook(lambda layer, inputs, output: seen["block"].append(output.dtype))
    model.compile(total_steps=2)
    model.predict(images, verbose=0)
    model.fit(images, labels, shuffle=False, verbose=0)
    assert len(seen["siren"]) == 2 and set(seen["block"]) == {torch.bfloat16}
    for tokens in seen["siren"]:  # before any update: the same as without mixed precision, to the last bits
        torch.testing.assert_close(tokens, small_mwt(images).siren(images)[0])


def test_wrong_arguments_and_inputs():
    for arguments in (dict(dim=100), dict(subsample=0.0), dict(subsample=1.5), dict(inner_steps=0), dict(depth=0)):
        with pytest.raises(ValueError, match="must|subsample"):
            mwt.MWT(**arguments)
    with pytest.raises(ValueError, match="warmup"):
        mwt.MWT(dim=8).compile(total_steps=10, warmup=2.0)
    images, labels = random_batch(channels=3)
    model = small_mwt(images)
    model.compile(total_steps=1)
    for use in (model, model.reconstruct, lambda images: model.fit(images, labels, verbose=0)):
        with pytest.raises(ValueError, match="3 channels"):
            use(images[..., :1])


# ---- hyperinr.py ----


EXPERIMENTS = ["joint", "latent", "weights", "pretrained"]


def small_hyperinr(images, **changes):
    keras.utils.set_random_seed(1)
    arguments = dict(image_size=images.shape[1], channels=images.shape[-1], latent_dim=16, encoder_width=4, dim=8,
                     depth=2, omega=6.0)
    return hyperinr.HyperINR(**{**arguments, **changes})


def stirred(model, scale=0.1):
    """The same model with all weights changed at random, so that no small initial value hides an error."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for variable in model.trainable_variables:
            variable.value.add_(scale * torch.randn(variable.shape, generator=generator, dtype=variable.value.dtype))
    return model


def test_predicted_parameters_depend_on_their_image_alone():
    images, _ = random_batch()
    model = stirred(small_hyperinr(images))
    changed = images.clone()
    changed[2] = -changed[2]
    theta, other = (model.hypernetwork(model.encode(batch)) for batch in (images, changed))
    for a, b in zip([t for pair in theta for t in pair], [t for pair in other for t in pair]):
        assert [not torch.equal(x, y) for x, y in zip(a, b)] == [False, False, True, False, False]
    for image in range(5):
        alone = model.hypernetwork(model.encode(images[image:image + 1]))
        for pair, expected in zip(alone, theta):
            for tensor, batch in zip(pair, expected):
                torch.testing.assert_close(tensor[0], batch[image], rtol=1e-4, atol=1e-5)


def test_rendering_equals_a_loop_over_images_and_points():
    images, _ = random_batch(count=3, size=5, channels=2)
    model = stirred(small_hyperinr(images))
    theta = [[tensor.detach().numpy().astype(np.float64) for tensor in pair]
             for pair in model.hypernetwork(model.encode(images))]
    assert [kernel.shape for kernel, _ in theta] == [(3, 2, 8), (3, 8, 8), (3, 8, 8), (3, 8, 2)]
    expected = np.empty((3, 4, 7, 2))
    for image, row, column in np.ndindex(3, 4, 7):
        hidden = np.array([-1 + 2 * row / 3, -1 + 2 * column / 6])
        for layer, (kernel, bias) in enumerate(theta):
            hidden = kernel[image].T @ hidden + bias[image, 0]
            if layer < 3:
                hidden = np.sin(6.0 * hidden)
        expected[image, row, column] = hidden
    assert np.abs(expected).std() > 0.05
    np.testing.assert_allclose(model.reconstruct(images, size=(4, 7)), expected, atol=1e-4)


def test_hypernetwork_starts_as_promised():
    keras.utils.set_random_seed(0)
    model = hyperinr.HyperINR()
    images, _ = random_batch(count=8, size=28)
    assert np.abs(model.reconstruct(images)).max() < 0.5
    inputs = [2, 256, 256, 256, 256]
    for number, mlp in enumerate(model.hypernetwork.mlps):
        *_, last = mlp.layers
        limit = 1 / (256 if number % 2 else inputs[number // 2])
        assert last.kernel.value.std().item() == pytest.approx(math.sqrt(2 / 256) / 100, rel=0.2 / math.sqrt(last.units))
        assert last.bias.value.abs().max() <= limit
        if last.units > 100:
            assert last.bias.value.abs().max() > 0.95 * limit
    for kernel, _ in model.hypernetwork(model.encode(images)):  # in all, close to U(±1/inputs), and to other images'
        start = 1 / kernel.shape[1] / math.sqrt(3)
        assert kernel.std().item() == pytest.approx(start, rel=0.1)
        assert kernel.std(dim=0).mean().item() < 0.3 * start


def test_encoder_and_hypernetwork_equal_plain_pytorch():
    images, _ = random_batch(size=9)
    model = stirred(small_hyperinr(images))

    def convolve(layer, x):  # Keras pads evenly but for one more at the end
        kernel, stride = layer.kernel.value.permute(3, 2, 0, 1), layer.strides[0]
        pads = [max((-(-side // stride) - 1) * stride + kernel.shape[-1] - side, 0) for side in x.shape[2:]]
        x = functional.pad(x, [part for pad in reversed(pads) for part in (pad // 2, pad - pad // 2)])
        return functional.conv2d(x, kernel, layer.bias.value, stride)

    first, *blocks, _, last = model.encoder.layers
    x = convolve(first, images.permute(0, 3, 1, 2)).relu()
    for block in blocks:
        x = (convolve(block.refine, convolve(block.reduce, x).relu()) + convolve(block.shortcut, x)).relu()
    latents = x.permute(0, 2, 3, 1).flatten(1) @ last.kernel.value + last.bias.value
    torch.testing.assert_close(model.encode(images), latents, rtol=1e-4, atol=1e-5)
    tensors = [tensor for pair in model.hypernetwork(latents) for tensor in pair]
    assert len(tensors) == len(model.hypernetwork.mlps) == 8
    for tensor, mlp in zip(tensors, model.hypernetwork.mlps):
        one, two, three = [(layer.kernel.value, layer.bias.value) for layer in mlp.layers]
        hidden = ((latents @ one[0] + one[1]).relu() @ two[0] + two[1]).relu()
        torch.testing.assert_close(tensor.flatten(1), hidden @ three[0] + three[1], rtol=1e-4, atol=1e-5)


def test_sample_weights_apply_to_the_cross_entropy_alone():
    images, labels = random_batch(count=6, size=8)
    model = stirred(small_hyperinr(images))
    weights = torch.tensor([0.0, 1.0, 2.0, 0.5, 0.0, 3.0])
    logits, errors, reconstruction, cross_entropy = model.losses(images, labels, weights)
    _, plain_errors, plain_reconstruction, _ = model.losses(images, labels)
    expected = (functional.cross_entropy(logits, labels, reduction="none") * weights).mean()
    torch.testing.assert_close(cross_entropy, 0.1 * expected)
    torch.testing.assert_close(reconstruction, plain_reconstruction)
    torch.testing.assert_close(errors, plain_errors)


def test_weight_tensor_equals_a_hand_built_array():
    rng = np.random.default_rng(0)
    theta = [(torch.tensor(rng.normal(size=(2, inputs, outputs))), None)
             for inputs, outputs in ((2, 5), (5, 5), (5, 5), (5, 3))]
    expected = np.empty((2, 4, 5, 5))
    for image, layer, out, into in np.ndindex(expected.shape):
        kernel = theta[layer][0].numpy()[image]
        expected[image, layer, out, into] = kernel[into % kernel.shape[0], out % kernel.shape[1]]
    np.testing.assert_array_equal(hyperinr.weight_tensor(theta).numpy(), expected)
    scale = np.array([2, 5, 5, 5])
    np.testing.assert_allclose(hyperinr.ToPicture(dtype="float64")(torch.tensor(expected)).numpy(),
                               np.moveaxis(expected, 1, 3) * scale, rtol=1e-6)

    images, _ = random_batch(count=1, size=8)
    model = hyperinr.HyperINR(image_size=8, classifier="weights", latent_dim=4)  # the paper's SIREN
    assert hyperinr.weight_tensor(model.hypernetwork(model.encode(images))).shape == (1, 5, 256, 256)
    kinds = [type(layer).__name__ for layer in model.classifier.layers]
    assert kinds.count("Conv2D") == 4 and kinds.count("Dense") == 3


def plain_losses(model, images, labels):
    """Section 5's loss once more: mean squared error, both penalties, cross entropy, with numbers typed here."""
    latents = model.encoder(images)
    theta = model.hypernetwork(latents)
    axis = torch.linspace(-1, 1, images.shape[1])
    hidden = torch.cartesian_prod(axis, axis)
    for kernel, bias in theta[:-1]:
        hidden = torch.sin(6.0 * (torch.matmul(hidden, kernel) + bias))
    rendered = torch.matmul(hidden, theta[-1][0]) + theta[-1][1]
    mse = functional.mse_loss(rendered.reshape(images.shape), images)
    every = torch.cat([tensor.flatten() for pair in theta for tensor in pair])
    features = hyperinr.weight_tensor(theta) if model.experiment == "weights" else latents
    cross_entropy = functional.cross_entropy(model.classifier(features), labels)
    return mse + 0.1 * latents.pow(2).mean() + 100 * every.pow(2).mean(), 0.1 * cross_entropy


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_train_steps_equal_pytorch_adam(experiment):
    """Six steps, three in each stage, against `torch.optim.Adam` on autograd's gradients of the plain loss."""
    images, labels = random_batch(count=4, size=8)
    model = stirred(small_hyperinr(images, classifier=experiment, encoder_width=2))
    model.compile(total_steps=6, hyper_rate=1e-3, classifier_rate=1e-2, separate_rate=3e-3, classifier_part=0.5,
                  final_rate=0.25)
    twin = hyperinr.HyperINR.from_config(model.get_config())
    twin.set_weights(model.get_weights())
    encoder, hyper, classifier = ([variable.value for variable in part.trainable_variables]
                                  for part in (twin.encoder, twin.hypernetwork, twin.classifier))
    groups = (hyper, encoder + classifier) if experiment == "pretrained" else (encoder + hyper, classifier)
    learning = {"joint": [(0, 1)] * 6, "latent": [(0,)] * 3 + [(1,)] * 3, "weights": [(0,)] * 3 + [(1,)] * 3,
                "pretrained": [(1,)] * 3 + [(0,)] * 3}[experiment]
    steps, second = (6, 1e-2) if experiment == "joint" else (3, 3e-3)
    optimizers = [torch.optim.Adam(group, lr=rate, eps=1e-14) for group, rate in zip(groups, (1e-3, second))]
    for optimizer in model.optimizers:
        optimizer.epsilon = 1e-14  # Keras adds epsilon before, PyTorch after the correction of the second moment
    for step, learns in enumerate(learning):
        metrics = model.train_step((images, labels))
        parts = plain_losses(twin, images, labels)
        assert float(metrics["loss"]) == pytest.approx(sum(parts).item(), rel=1e-4)
        model.reset_metrics()
        within = step % steps / steps
        for group, optimizer, start in zip(groups, optimizers, (1e-3, second)):
            optimizer.param_groups[0]["lr"] = start * (0.25 + 0.75 * (1 + math.cos(math.pi * within)) / 2)
        gradients = [torch.autograd.grad(parts[i] if experiment != "joint" else sum(parts), groups[i],
                                         retain_graph=True) for i in learns]
        for i, gradient in zip(learns, gradients):
            for parameter, value in zip(groups[i], gradient):
                parameter.grad = value
            optimizers[i].step()
        for ours, reference in zip(model.trainable_variables, twin.trainable_variables):
            torch.testing.assert_close(ours.value, reference.value, rtol=1e-3, atol=3e-5, msg=f"{step} {ours.path}")


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_each_experiment_learns_and_changes_its_own_variables_alone(experiment):
    images, labels = data.shapes(range(20), size=12)
    images = images.astype("float32") / 127.5 - 1
    model = small_hyperinr(images, classifier=experiment, dim=24, latent_dim=32)
    model.compile(total_steps=240, hyper_rate=2e-3, classifier_rate=3e-3, separate_rate=1e-2, classifier_part=0.5)

    def state():
        return [[variable.numpy().copy() for variable in group] for group in model.variable_groups()]

    def changed(old, new):
        return [any((a != b).any() for a, b in zip(*groups)) for groups in zip(old, new)]

    known = [id(variable) for group in model.variable_groups() for variable in group]
    assert sorted(known) == sorted(map(id, model.trainable_variables))
    evaluations, states = [model.evaluate(images, labels, verbose=0, return_dict=True)], [state()]
    for _ in range(2):
        model.fit(images, labels, batch_size=20, epochs=120, verbose=0)
        evaluations.append(model.evaluate(images, labels, verbose=0, return_dict=True))
        states.append(state())
    moves = [changed(*pair) for pair in zip(states, states[1:])]
    assert moves == {"joint": [[True, True]] * 2, "latent": [[True, False], [False, True]],
                     "weights": [[True, False], [False, True]], "pretrained": [[False, True], [True, False]]}[experiment]
    assert evaluations[2]["mse"] < 0.5 * evaluations[0]["mse"]
    assert evaluations[2]["accuracy"] > 0.8
    if experiment in ("latent", "weights"):
        assert evaluations[2]["mse"] == evaluations[1]["mse"]


def test_upsampling_is_the_reconstruction_on_a_denser_grid():
    images, _ = random_batch(size=7, channels=3)
    model = stirred(small_hyperinr(images))
    reconstruction = model.reconstruct(images)
    assert reconstruction.shape == (5, 7, 7, 3) and reconstruction.dtype == np.float32
    np.testing.assert_array_equal(model.upsample(images, 1), reconstruction)
    assert model.upsample(images.numpy(), 2.5).shape == (5, 18, 18, 3)
    np.testing.assert_allclose(model.reconstruct(images, size=(13, 19))[:, ::2, ::3], reconstruction, atol=1e-4)
    many = model.reconstruct(images.repeat(14, 1, 1, 1), size=(33, 34))  # 70 images, 1,122 points: more than one part
    np.testing.assert_allclose(many[65:], model.reconstruct(images, size=(33, 34)), atol=1e-4)


def test_images_of_another_size_are_sampled_at_the_encoders():
    rows, columns = np.meshgrid(np.linspace(-1, 1, 28), np.linspace(-1, 1, 10), indexing="ij")
    ramp = (0.3 * rows - 0.6 * columns).astype("float32")[None, :, :, None]
    rows, columns = np.meshgrid(np.linspace(-1, 1, 7), np.linspace(-1, 1, 7), indexing="ij")
    expected = (0.3 * rows - 0.6 * columns).astype("float32")[None, :, :, None]
    np.testing.assert_allclose(hyperinr.resize(ramp, (7, 7)).numpy(), expected, atol=1e-6)
    model = stirred(small_hyperinr(expected))
    np.testing.assert_allclose(model.reconstruct(ramp, size=(7, 7)), model.reconstruct(expected), atol=1e-4)
    assert model.reconstruct(ramp).shape == ramp.shape
    assert model(ramp).shape == (1, 10)


@pytest.mark.parametrize("per_image", [False, True])
def test_inpainting_keeps_what_is_known_and_ignores_the_hole(per_image):
    images, _ = random_batch(size=8, channels=3)
    images = images.numpy()
    model = stirred(small_hyperinr(images))
    mask = np.random.default_rng(0).random((5, 8, 8) if per_image else (8, 8)) < 0.4
    hole = np.broadcast_to(mask, (5, 8, 8))
    for image, filled, holes in zip(images, hyperinr.fill_with_mean(images, mask), hole):
        np.testing.assert_array_equal(filled[~holes], image[~holes])
        np.testing.assert_allclose(filled[holes], np.tile(image[~holes].mean(axis=0), (holes.sum(), 1)), atol=1e-6)
    result = model.inpaint(images, mask)
    np.testing.assert_array_equal(result[~hole], images[~hole])
    assert (np.abs(result[hole] - images[hole]) > 1e-3).mean() > 0.95
    once = np.where(hole[..., None], model.reconstruct(hyperinr.fill_with_mean(images, mask)), images)
    np.testing.assert_array_equal(model.inpaint(images, mask, steps=1), once)
    twice = np.where(hole[..., None], model.reconstruct(once), images)
    np.testing.assert_array_equal(model.inpaint(images, mask, steps=2), twice)
    damaged = np.where(hole[..., None], 1.0, images)
    np.testing.assert_array_equal(model.inpaint(damaged, mask), result)


def test_a_trained_model_denoises_and_inpaints_new_images():
    images, labels = data.shapes(range(2_000), size=12)
    model = small_hyperinr(images, latent_dim=64, encoder_width=8, dim=32, omega=10.0, weight_penalty=10.0)
    model.compile(total_steps=300, hyper_rate=2e-3, classifier_rate=1e-3, final_rate=0.05)
    model.fit(images.astype("float32") / 127.5 - 1, labels, batch_size=32, epochs=5, verbose=0)
    images = data.shapes(range(2_000, 2_100), size=12)[0].astype("float32") / 127.5 - 1
    noisy = images + np.random.default_rng(0).normal(0, 0.5, images.shape).astype("float32")
    hole = np.zeros((12, 12), bool)
    hole[3:8, 4:9] = True

    def error(result):
        return np.square(images - result).mean()

    assert error(model.denoise(noisy)) < 0.6 * error(noisy)
    assert error(model.inpaint(images, hole)) < 0.9 * error(hyperinr.fill_with_mean(images, hole))


def test_hyperinr_metrics_are_what_they_say():
    images, labels = random_batch(count=7)
    model = stirred(small_hyperinr(images))
    model.compile(total_steps=1)
    metrics = model.evaluate(images, labels, batch_size=3, verbose=0, return_dict=True)
    errors = np.square(model.reconstruct(images) - images.numpy()).mean(axis=(1, 2, 3))
    logits = torch.tensor(model.predict(images, verbose=0))
    assert metrics["accuracy"] == pytest.approx((logits.argmax(1) == labels).float().mean().item())
    assert metrics["mse"] == pytest.approx(errors.mean(), rel=1e-4)
    assert metrics["psnr"] == pytest.approx((10 * np.log10(4 / errors)).mean(), rel=1e-4)
    assert metrics["loss"] == pytest.approx(sum(plain_losses(model, images, labels)).item(), rel=1e-4)


@pytest.mark.parametrize("experiment", ["weights", "pretrained"])
def test_saved_hyperinr_in_a_fresh_process(tmp_path, experiment):
    images, labels = random_batch(count=8, size=8)
    model = small_hyperinr(images, classifier=experiment)
    model.compile(total_steps=8, classifier_part=0.25, separate_rate=1e-2)
    model.fit(images, labels, batch_size=4, epochs=2, verbose=0)
    model.save(tmp_path / "model.keras")
    np.savez(tmp_path / "case.npz", images=images, logits=model.predict(images, verbose=0),
             pictures=model.reconstruct(images), momentum=model.optimizers[0].variables[2].numpy())
    shutil.copy(HERE / "hyperinr.py", tmp_path)
    (tmp_path / "check.py").write_text("""
import numpy as np, hyperinr, keras
model, case = keras.saving.load_model("model.keras"), np.load("case.npz")
assert abs(model.predict(case["images"], verbose=0) - case["logits"]).max() < 1e-6
assert abs(model.reconstruct(case["images"]) - case["pictures"]).max() < 1e-6
assert abs(model.optimizers[0].variables[2].numpy() - case["momentum"]).max() == 0
print([int(optimizer.iterations) for optimizer in model.optimizers], model.learning())
""")
    result = run_python("check.py", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == {"weights": "[4, 0] (True, False)", "pretrained": "[2, 2] (True, False)"}[experiment]


def expected_hyperinr_parameters(classifier, V, width, D, L, size=28, channels=1, classes=10):
    siren = [(2, D), *[(D, D)] * L, (D, channels)]
    hyper = sum(2 * (V * V + V) + (V + 1) * numel for i, o in siren for numel in (i * o, o))
    if classifier == "pretrained":
        return hyper + (size * size * channels + 1) * V + (V + 1) * classes
    encoder, side = 9 * channels * width + width, size
    for block in range(3):
        i, o, side = width << block, width << block + 1, -(-side // 2)
        encoder += 9 * i * o + o + 9 * o * o + o + i * o + o
    encoder += (side * side * 8 * width + 1) * V
    if classifier == "weights":
        convolutions = sum(9 * i * o + o for i, o in ((L + 2, 16), (16, 32), (32, 64), (64, 64)))
        return hyper + encoder + convolutions + (64 * (-(-D // 16))**2 + 1) * 128 + 129 * 64 + 65 * classes
    return hyper + encoder + V * V + V + (V + 1) * classes


@pytest.mark.parametrize("preset", hyperinr.PRESETS)
@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_hyperinr_presets_build_with_the_expected_number_of_parameters(preset, experiment):
    values = hyperinr.PRESETS[preset]
    assert values.keys() == hyperinr.PAPER.keys()
    options, method, hyperparameters = train.parse(["--method", "hyperinr", "--preset", preset, "--classifier",
                                                    experiment])
    model = train.build_model(options, method, hyperparameters, 100, image_shape=(28, 28, 1), num_classes=10)
    assert model(np.zeros((2, 28, 28, 1), "float32")).shape == (2, 10)
    assert model.count_params() == expected_hyperinr_parameters(
        experiment, values["latent_dim"], values["encoder_width"], values["dim"], values["depth"])


@pytest.mark.parametrize("method, options", [("mwt", {}), ("hyperinr", {"classifier": "weights", "latent_dim": 16})])
def test_methods_run_where_tensorflow_is_marked_as_absent(method, options):
    """As it is during a run, so that Keras does not import it."""
    result = run_python("-c", f"""
import sys
sys.modules["tensorflow"] = None
import numpy as np, {method}
model = {method}.{train.METHODS[method]}(dim=16, depth=1, **{options})
model.compile(total_steps=2)
model.fit(np.zeros((4, 28, 28, 1), "float32"), np.zeros(4), verbose=0)
model.predict(np.zeros((4, 28, 28, 1), "float32"), verbose=0)
""")
    assert result.returncode == 0, result.stderr


def test_hyperinrs_published_hyperparameters():
    """Typed from the paper's text (sections 3.2, 4.1 and 5) and the hypernetworks that it builds on."""
    published = dict(classifier="joint", latent_dim=256, dim=256, depth=3, omega=30.0, latent_penalty=0.1,
                     weight_penalty=100.0, task_weight=0.1, hyper_rate=5e-5, classifier_rate=1e-2, separate_rate=1e-3,
                     final_rate=1.0)
    assert published.items() <= hyperinr.PRESETS["paper"].items()
    assert 53e6 < hyperinr.HyperINR().count_params() < 55e6


def test_hyperinr_in_mixed_precision_renders_in_float32():
    images, labels = random_batch(size=8)
    model = small_hyperinr(images, dtype="mixed_bfloat16")
    assert model.encoder(images).dtype == torch.bfloat16
    assert {tensor.dtype for pair in model.hypernetwork(model.encode(images)) for tensor in pair} == {torch.float32}
    model.compile(total_steps=2)
    history = model.fit(images, labels, epochs=2, verbose=0).history
    assert np.isfinite(history["loss"]).all() and model(images).dtype == torch.float32


def test_the_siren_compiles_as_one_graph(monkeypatch):
    images, labels = random_batch(size=8)
    compile = torch.compile
    monkeypatch.setattr(torch, "compile", lambda function, **options: compile(function, backend="aot_eager", **options))
    gradients = []
    for jit_compile in (False, True):
        model = stirred(small_hyperinr(images))
        model.compile(total_steps=1, jit_compile=jit_compile)
        _, _, *parts = model.losses(images, labels)
        sum(parts).backward()
        gradients.append([variable.value.grad for variable in model.trainable_variables])
    assert model.render is not hyperinr.render
    for compiled, eager in zip(*gradients):
        torch.testing.assert_close(compiled, eager, rtol=1e-3, atol=1e-5)


def test_hyperinrs_wrong_arguments_and_inputs():
    for arguments in (dict(classifier="cnn"), dict(dim=0), dict(image_size=0), dict(latent_dim=0)):
        with pytest.raises(ValueError, match="must be"):
            hyperinr.HyperINR(**arguments)
    images, labels = random_batch(size=8, channels=3)
    model = small_hyperinr(images)
    for arguments in (dict(classifier_part=0.0), dict(classifier_part=1.5), dict(final_rate=2.0)):
        with pytest.raises(ValueError, match="between 0 and 1"):
            model.compile(total_steps=10, **arguments)
    model.compile(total_steps=1)
    for use in (model, model.reconstruct, model.denoise, lambda images: model.upsample(images, 2),
                lambda images: model.inpaint(images, np.eye(8, dtype=bool)),
                lambda images: model.fit(images, labels, verbose=0)):
        with pytest.raises(ValueError, match=r"\(N, H, W, 3\)"):
            use(images[..., :1])
    for factor in (0.5, 0, -2, math.nan):
        with pytest.raises(ValueError, match="factor must be at least 1"):
            model.upsample(images, factor)
    for mask in (np.ones((8, 7), bool), np.ones((4, 8, 8), bool), np.ones((8, 8)), np.ones((5, 8, 8, 3), bool)):
        with pytest.raises(ValueError, match=r"boolean, of shape \(8, 8\) or \(5, 8, 8\)"):
            model.inpaint(images, mask)
    with pytest.raises(ValueError, match="leave some pixels"):
        model.inpaint(images, np.ones((8, 8), bool))


# ---- inrn.py ----


HYBRIDS = ["interleaved", "front", "post", "mlp"]


def nchw(x):
    return x.permute(0, 3, 1, 2)


def plain_convolution(layer, x, stride=1):
    """Padded as TensorFlow does it, which "same" means: at a stride the odd row goes to the bottom and to the right."""
    kernel = layer.kernel.value.permute(3, 2, 0, 1)
    padding = []
    for side, size in zip(reversed(x.shape[1:3]), reversed(kernel.shape[2:])):
        missing = max(0, (-(-side // stride) - 1) * stride + size - side)
        padding += [missing // 2, missing - missing // 2]
    padded = functional.pad(nchw(x), padding)
    return functional.conv2d(padded, kernel, layer.bias.value, stride).permute(0, 2, 3, 1)


def plain_dense(layer, x):
    return x @ layer.kernel.value + layer.bias.value


def plain_block(block, x, activation):
    """An INReBlock in `torch.nn.functional`, from what its arguments promise."""
    config = block.config
    order = {"interleaved": "dcd" if config["compression"] >= 1 else "cdd", "front": "cdd", "post": "ddc", "mlp": "dd"}
    stride = config["stride"]
    if config["hybrid"] == "mlp" and stride > 1:
        x = functional.avg_pool2d(nchw(x), stride, ceil_mode=True, count_include_pad=False).permute(0, 2, 3, 1)
    y = functional.layer_norm(x, x.shape[-1:], block.norm.gamma.value, block.norm.beta.value, 1e-5)
    for kind, layer in zip(order[config["hybrid"]], block.steps, strict=True):
        y = y if layer is block.steps[0] else activation(y)
        y = plain_dense(layer, y) if kind == "d" else plain_convolution(layer, y, stride)
    if config["hybrid"] == "mlp":
        return y + (x if x.shape == y.shape else plain_dense(block.shortcut, x))
    return y + (x if x.shape == y.shape else plain_convolution(block.shortcut, x, stride))


@pytest.mark.parametrize("hybrid", HYBRIDS)
@pytest.mark.parametrize("compression", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("inputs, stride", [(8, 1), (6, 2)])
def test_a_block_equals_plain_pytorch(hybrid, compression, inputs, stride):
    for name, activation in (("gelu", functional.gelu), ("relu", functional.relu)):
        block = inrn.INReBlock(inputs, 8, compression, stride, name, hybrid)
        x = random_batch(3, 7, inputs)[0]
        start = block(x)
        if inputs == 8:
            assert torch.equal(start, x)  # it starts as its shortcut
        output = stirred(block, 0.3)(x)
        assert output.shape == (3, -(-7 // stride), -(-7 // stride), 8)
        torch.testing.assert_close(output, plain_block(block, x, activation), rtol=1e-4, atol=1e-4)


def block_parameters(inputs, width, compression, stride, hybrid):
    hidden = round(width / compression)
    mlp = (inputs + 1) * hidden + (hidden + 1) * width
    if hybrid == "mlp":
        return 2 * inputs + mlp + ((inputs + 1) * width if inputs != width else 0)
    shortcut = (9 * inputs + 1) * width if stride > 1 or inputs != width else 0
    if hybrid == "front" or hybrid == "interleaved" and compression < 1:
        mlp, conv = (width + 1) * hidden + (hidden + 1) * width, (9 * inputs + 1) * width
    else:
        conv = (9 * width + 1) * width if hybrid == "post" else (9 * hidden + 1) * hidden
    return 2 * inputs + mlp + conv + shortcut


def inrn_parameters(widths, blocks, stem_stride, compression, channels, classes, hybrid="interleaved", **_):
    widths, blocks = ([int(number) for number in text.split(",")] for text in (widths, blocks))
    total = (max(3, stem_stride)**2 * channels + 1) * widths[0] + 2 * widths[-1] + (widths[-1] + 1) * classes
    for stage, (before, width, count) in enumerate(zip([widths[0], *widths], widths, blocks)):
        total += block_parameters(before, width, compression, 2 if stage else 1, hybrid)
        total += (count - 1) * block_parameters(width, width, compression, 1, hybrid)
    return total


def arguments_of(model_class, hyperparameters):
    names = model_class.__init__.__code__.co_varnames
    return {name: value for name, value in hyperparameters.items() if name in names}


@pytest.mark.parametrize("preset, classes, flat, compressed", [
    ("small", 100, 2.5e6, 2.86e6), ("medium", 1000, 14e6, 5.7e6), ("large", 1000, 57e6, 21e6), ("quick", 10, None, None)])
def test_inrn_presets_have_the_papers_numbers_of_parameters(preset, classes, flat, compressed):
    arguments = arguments_of(inrn.INRN, inrn.PRESETS[preset])
    for changes, paper in (({}, compressed), ({"compression": 1.0}, flat)):
        count = inrn.INRN(3, classes, **{**arguments, **changes}).count_params()
        assert count == inrn_parameters(**{**arguments, **changes}, channels=3, classes=classes)
        assert paper is None or count == pytest.approx(paper, rel=0.05)


@pytest.mark.parametrize("hybrid", HYBRIDS)
def test_inrn_is_its_stem_stages_and_head(hybrid):
    keras.utils.set_random_seed(1)
    model = stirred(inrn.INRN(3, 5, "4,6,8,10", "1,2,3,1", 2, 2.0, "gelu", hybrid))
    assert model.count_params() == inrn_parameters("4,6,8,10", "1,2,3,1", 2, 2.0, 3, 5, hybrid)
    for size in ((28, 28), (33, 20)):
        images = torch.rand(2, *size, 3)
        outputs = model.stage_outputs(images)
        x, sides = plain_convolution(model.stem, images, 2), [-(-side // 2) for side in size]
        for number, (blocks, count, width) in enumerate(zip(model.stages, (1, 2, 3, 1), (4, 6, 8, 10), strict=True), 1):
            assert len(blocks) == count
            for block in blocks:
                x = plain_block(block, x, functional.gelu)
            assert outputs[f"stage{number}"].shape == (2, *sides, width)
            torch.testing.assert_close(outputs[f"stage{number}"], x, rtol=1e-3, atol=1e-4)
            sides = [-(-side // 2) for side in sides]
        mean = functional.layer_norm(x.mean((1, 2)), (10,), model.norm.gamma.value, model.norm.beta.value, 1e-5)
        torch.testing.assert_close(model(images), plain_dense(model.head, mean), rtol=1e-3, atol=1e-4)


def test_inrns_wrong_arguments_and_inputs():
    for arguments, hint in ((dict(widths="8,8"), "four whole numbers"), (dict(blocks="1,2,0,1"), "four whole numbers"),
                            (dict(activation="tanh"), "gelu or relu"), (dict(hybrid="both"), "interleaved"),
                            (dict(compression=0.0), "compression"), (dict(compression=64.0), "compression"),
                            (dict(num_classes=0), "at least 1")):
        with pytest.raises(ValueError, match=hint):
            inrn.INRN(1, **{"num_classes": 10, **arguments})
    with pytest.raises(ValueError, match=r"\(N, H, W, 1\)"):
        inrn.INRN(1, 10, "4,4,4,4", "1,1,1,1")(torch.zeros(2, 8, 8, 3))
    for arguments, hint in ((dict(network="nerf"), "siren"), (dict(alpha=1.5), "alpha"), (dict(width=0), "at least 1"),
                            (dict(compression=100.0), "compression")):
        with pytest.raises(ValueError, match=hint):
            inrn.PictureFit(**arguments)


# Fitting.


def plain_ssim(a, b):
    """SSIM of two pictures (H, W, C) in [-1, 1], window by window, in float64. (Wang et al., 2004.)"""
    axis = np.arange(11) - 5
    window = np.exp(-axis**2 / (2 * 1.5**2))
    window = np.outer(window, window) / window.sum()**2
    values = []
    for i in range(a.shape[0] - 10):
        for j in range(a.shape[1] - 10):
            for c in range(a.shape[2]):
                x, y = (picture[i:i + 11, j:j + 11, c].astype(np.float64) + 1 for picture in (a, b))
                mx, my = (window * x).sum(), (window * y).sum()
                vx, vy, cov = ((window * p).sum() - q for p, q in ((x * x, mx * mx), (y * y, my * my), (x * y, mx * my)))
                values.append((2 * mx * my + 4e-4) * (2 * cov + 36e-4) / ((mx**2 + my**2 + 4e-4) * (vx + vy + 36e-4)))
    return np.mean(values)


def test_the_fitting_loss_is_equation_1():
    a, b = (random_batch(2, 16, 3, seed=seed)[0] for seed in (0, 1))
    b = 0.7 * a + 0.3 * b
    squared = ((a - b) ** 2).mean((1, 2, 3)).numpy()
    ssim = np.array([plain_ssim(*pair) for pair in zip(a.numpy(), b.numpy())])
    for alpha in (0.0, 0.3, 1.0):
        loss = inrn.fitting_loss(a, b, alpha)[0].numpy()
        np.testing.assert_allclose(loss, alpha * squared + (1 - alpha) * (1 - ssim), rtol=1e-3)
        np.testing.assert_allclose(inrn.fitting_loss(a, a, alpha)[0].numpy(), 0, atol=1e-6)
    assert inrn.similarity(a[:, :5, :8], a[:, :5, :8]).numpy() == pytest.approx(1, abs=1e-5)  # smaller than a window


def test_coordinates_are_the_centres_of_cells_and_time_comes_last():
    grid = inrn.coordinates(2, 4, np.array([-1.0, 0.5], np.float32)).numpy()
    assert grid.shape == (2, 2, 4, 3)
    for n, i, j in np.ndindex(2, 2, 4):
        np.testing.assert_allclose(grid[n, i, j], [(-0.5, 0.5)[i], (-0.75, -0.25, 0.25, 0.75)[j], (-1, 0.5)[n]])
    np.testing.assert_array_equal(inrn.coordinates(2, 4).numpy(), grid[:1, ..., :2])


@pytest.mark.parametrize("time", [False, True])
def test_the_networks_of_a_fit_equal_plain_pytorch(time):
    arguments = dict(time=time, width=8, blocks=2, features=5, patch=2)
    times = torch.tensor([-0.5, 0.5, 1.0])
    models = {network: stirred(inrn.PictureFit(network, **arguments), 0.05) for network in ("inrn", "siren", "relu")}
    for name, model in models.items():
        pictures = model(times, size=(7, 10))
        size = (4, 5) if name == "inrn" else (7, 10)
        axes = [(torch.arange(side) + 0.5) / side * 2 - 1 for side in size]
        x = torch.stack(torch.meshgrid(*axes, indexing="ij"), -1).expand(3, *size, 2)
        if time:
            x = torch.cat([x, times.reshape(3, 1, 1, 1).expand(3, *size, 1)], -1)
        if name == "siren":
            *sines, last = model.network
            for layer in sines:
                x = torch.sin(30 * plain_dense(layer, x))
            expected = plain_dense(last, x)
        else:
            features, first, *middle, last = model.network
            angles = (x * torch.tensor([15.0, 15.0, 3.0][:x.shape[-1]])) @ features.directions.value
            x = plain_dense(first, torch.cat([angles.sin(), angles.cos()], -1))
            x = x.relu() if name == "relu" else x
            for layer in middle:
                x = plain_block(layer, x, functional.gelu) if name == "inrn" else plain_dense(layer, x).relu()
            expected = plain_dense(last, x)
        if name == "inrn":  # each coordinate is two by two pixels, row by row
            cells = expected.reshape(3, 4, 5, 2, 2, 3)
            expected = torch.stack([torch.stack([cells[:, i // 2, j // 2, i % 2, j % 2] for j in range(10)], 1)
                                    for i in range(7)], 1)
        torch.testing.assert_close(pictures, expected, rtol=1e-4, atol=1e-4)
        if not time:
            assert torch.equal(pictures[0], pictures[2])
        np.testing.assert_allclose(model.render(times, 7, 10), expected.detach().clip(-1, 1).numpy(), atol=1e-4)


def test_compared_networks_have_as_many_parameters_as_fit():
    for arguments in (dict(), dict(width=24, blocks=2, time=True)):
        count = inrn.PictureFit(**arguments).count_params()
        for network in ("siren", "relu"):
            model = inrn.PictureFit(network, **arguments)
            assert 0.95 * count < model.count_params() <= count
            inputs = 2 + arguments.get("time", False)
            inputs, fixed = (inputs, 0) if network == "siren" else (256, 128 * inputs)
            width = model.network[-1].kernel.shape[0]
            sizes = [(inputs + 1) * w + 3 * (w + 1) * w + 3 * (w + 1) + fixed for w in (width, width + 1)]
            assert sizes[0] == model.count_params() and sizes[1] > count
    smallest = dict(width=1, blocks=1, compression=1.0, patch=1, hybrid="mlp")
    for network in ("siren", "relu"):
        assert inrn.PictureFit(network, **smallest).count_params() <= inrn.PictureFit(**smallest).count_params()
    siren = inrn.PictureFit("siren").network
    for layer, limit in ((siren[0], 1 / 2), (siren[1], math.sqrt(6 / siren[1].kernel.shape[0]) / 30)):
        assert 0.98 * limit < layer.kernel.value.abs().max() <= limit


def test_fit_steps_equal_pytorch_adam():
    frames, times = random_batch(2, 12, 3)[0], torch.tensor([-1.0, 1.0])
    model = stirred(inrn.PictureFit(time=True, width=8, blocks=1, features=4, alpha=0.6))
    model.compile(total_steps=4, rate=1e-3)
    twin = inrn.PictureFit.from_config(model.get_config())
    twin.set_weights(model.get_weights())
    parameters = [variable.value for variable in twin.trainable_variables]
    optimizer = torch.optim.Adam(parameters, betas=(0.9, 0.9), eps=1e-14)
    model.optimizers[0].epsilon = 1e-14
    for step in range(4):
        model.train_step((frames, times))
        optimizer.param_groups[0]["lr"] = 1e-3 * (1 + math.cos(math.pi * step / 4)) / 2
        pictures = twin(times, size=(12, 12))
        loss = 0.6 * ((pictures - frames) ** 2).mean() + 0.4 * (1 - inrn.similarity(pictures, frames).mean())
        for parameter, gradient in zip(parameters, torch.autograd.grad(loss, parameters)):
            parameter.grad = gradient
        optimizer.step()
    for ours, reference in zip(model.trainable_variables, twin.trainable_variables):
        torch.testing.assert_close(ours.value, reference.value, rtol=1e-3, atol=3e-5, msg=ours.path)


def test_a_small_picture_is_fitted():
    keras.utils.set_random_seed(0)
    picture = data.scale(data.shapes_mosaic(32))[None]
    model = inrn.PictureFit(width=32, blocks=3, features=64, feature_scale=8.0)
    model.compile(total_steps=200)
    history = model.fit(np.repeat(picture, 20, axis=0), np.zeros(20), batch_size=1, epochs=10, verbose=0).history
    metrics = model.evaluate(picture, np.zeros(1), verbose=0, return_dict=True)
    squared = ((model.render([0.0], 32, 32) - picture) ** 2).mean()
    assert metrics["psnr"] == pytest.approx(10 * math.log10(4 / squared), abs=0.01) and metrics["psnr"] > 30
    ssim = plain_ssim(model.render([0.0], 32, 32)[0], picture[0])
    assert metrics["ssim"] == pytest.approx(ssim, abs=1e-3)
    assert metrics["loss"] == pytest.approx(0.7 * squared + 0.3 * (1 - ssim), abs=1e-3)
    assert history["psnr"][-1] > history["psnr"][0]


# Distillation.


def tiny_inrn(channels=1, classes=10, **changes):
    keras.utils.set_random_seed(1)
    return stirred(inrn.INRN(channels, classes, **{**dict(widths="4,6,8,10", blocks="1,1,1,1", stem_stride=2,
                                                          compression=2.0), **changes}))


def tiny_teacher(classes=10, size=16, softmax=False):
    keras.utils.set_random_seed(2)
    teacher = inrn.residual_cnn((size, size, 1), classes, stem_stride=2, width=4)
    if softmax:
        teacher = keras.Model(teacher.inputs, keras.layers.Softmax()(teacher.output))
    return teacher


@pytest.mark.parametrize("softmax", [False, True])
def test_the_distillation_loss_equals_plain_pytorch(softmax):
    images, labels = random_batch(6, 16)
    student, teacher = tiny_inrn(), tiny_teacher(softmax=softmax)
    distiller = stirred(inrn.Distiller(student, teacher, (16, 16, 1), task_weight=0.8, feature_weight=0.5,
                                       logits_weight=0.25, temperature=3.0))
    distiller.compile(total_steps=10)
    before = teacher.get_weights()
    with torch.no_grad():
        outputs = student.stage_outputs(images)
        logits = student(images)
        layers = [teacher.get_layer(f"stage{number}").output for number in range(1, 5)]
        *features, taught = keras.Model(teacher.inputs, [*layers, teacher.output])(images, training=False)
        distance = 0
        for align, output, feature in zip(distiller.alignment, outputs.values(), features, strict=True):
            aligned = output @ align.kernel.value[0, 0] + align.bias.value
            flat = feature.flatten(1)
            target = (flat - flat.mean(1, keepdim=True)) / torch.sqrt(flat.var(1, keepdim=True, correction=0) + 1e-6)
            distance += ((aligned.flatten(1) - target) ** 2).mean()
        taught = taught.log() if softmax else taught
        divergence = functional.kl_div((logits / 3).log_softmax(-1), (taught / 3).softmax(-1), reduction="batchmean")
        expected = 0.8 * functional.cross_entropy(logits, labels) + 0.5 * distance + 0.25 * 9 * divergence
    metrics = distiller.train_step((images, labels))
    assert float(metrics["loss"]) == pytest.approx(float(expected), rel=1e-3)
    assert float(metrics["distillation"]) == pytest.approx(float(0.5 * distance + 0.25 * 9 * divergence), rel=1e-3)
    assert all(np.array_equal(a, b) for a, b in zip(before, teacher.get_weights()))
    metrics = distiller.test_step((images, labels))
    assert metrics.keys() == {"loss", "accuracy"}


def test_the_teacher_reaches_every_stage_and_is_no_part_of_the_student(tmp_path):
    images, labels = random_batch(6, 16)
    student, teacher = tiny_inrn(), tiny_teacher()
    distiller = inrn.Distiller(student, teacher, (16, 16, 1), task_weight=0.0)
    distiller.compile(total_steps=10)
    distiller.train_step((images, labels))
    learning = {id(variable): variable.value.grad for variable in distiller.trainable_variables}
    for blocks in student.stages:
        for variable in blocks[-1].trainable_variables:
            assert learning[id(variable)].abs().max() > 0
    assert all(learning[id(variable)].abs().max() > 0 for layer in distiller.alignment for variable in layer.variables)
    assert student.head.kernel.value.grad is None or student.head.kernel.value.grad.abs().max() == 0
    teachers = {id(variable) for variable in teacher.variables}
    assert not teachers & {id(variable) for variable in distiller.variables}

    distiller.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    assert type(loaded) is inrn.INRN and loaded.count_params() == student.count_params()
    assert np.allclose(loaded.predict(images.numpy(), verbose=0), student(images).detach().numpy(), atol=1e-5)
    assert (tmp_path / "model.keras").stat().st_size < 12 * student.count_params() + 250_000
    metrics = loaded.evaluate(images.numpy(), labels.numpy(), verbose=0, return_dict=True)
    expected = functional.cross_entropy(student(images), labels).item()
    assert metrics["loss"] == pytest.approx(expected, rel=1e-4)
    assert int(loaded.optimizer.iterations) == 1
    loaded.fit(images.numpy(), labels.numpy(), verbose=0)


def test_saved_inrn_in_a_fresh_process(tmp_path):
    images = random_batch(3, 16)[0].numpy()
    model = tiny_inrn(hybrid="post", activation="relu")
    model.save(tmp_path / "model.keras")
    fit = stirred(inrn.PictureFit(time=True, width=8, blocks=1, features=4))
    fit.compile(total_steps=3)
    fit.save(tmp_path / "fit.keras")
    np.save(tmp_path / "images.npy", images)
    code = ("import inrn, keras, numpy as np; model = keras.saving.load_model('model.keras'); "
            "np.save('logits.npy', model.predict(np.load('images.npy'), verbose=0)); "
            "np.save('frames.npy', keras.saving.load_model('fit.keras').render([0.0, 1.0], 9, 11))")
    result = run_python("-c", code, cwd=tmp_path, PYTHONPATH=str(HERE))
    assert result.returncode == 0, result.stderr
    np.testing.assert_allclose(np.load(tmp_path / "logits.npy"), model.predict(images, verbose=0), atol=1e-5)
    np.testing.assert_allclose(np.load(tmp_path / "frames.npy"), fit.render([0.0, 1.0], 9, 11), atol=1e-5)


def test_distiller_steps_equal_pytorch_adamw():
    """With warming up, clipping to norm 1, and decay of kernels alone; without a teacher."""
    images, labels = random_batch(8, 16)
    student = tiny_inrn()
    distiller = inrn.Distiller(student)
    distiller.compile(total_steps=40, rate=1e-2, weight_decay=0.1)
    twin = inrn.INRN.from_config(student.get_config())
    twin.set_weights(student.get_weights())
    kernels, others = ([v.value for v in twin.trainable_variables if (v.name == "kernel") == wanted]
                       for wanted in (True, False))
    optimizer = torch.optim.AdamW([{"params": kernels, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}],
                                  eps=1e-14)
    distiller.optimizers[0].epsilon = 1e-14
    for step in range(5):
        distiller.train_step((100 * images, labels))
        for group in optimizer.param_groups:
            group["lr"] = 1e-2 * (step / 2 if step < 2 else (1 + math.cos(math.pi * (step - 2) / 38)) / 2)
        optimizer.zero_grad()
        functional.cross_entropy(twin(100 * images), labels).backward()
        torch.nn.utils.clip_grad_norm_(kernels + others, 1.0)
        optimizer.step()
    for ours, reference in zip(student.trainable_variables, twin.trainable_variables):
        torch.testing.assert_close(ours.value, reference.value, rtol=1e-3, atol=1e-4, msg=ours.path)


def test_layers_to_learn_from_are_matched_by_resolution_or_name():
    student, teacher = tiny_inrn(), tiny_teacher()
    matched = inrn.match_layers(teacher, student, (16, 16, 1))
    assert [(stage, layer.name) for stage, layer in matched.items()] == [(f"stage{i}", f"stage{i}") for i in range(1, 5)]
    sequential = keras.Sequential([keras.Input((None, None, 1)), keras.layers.Conv2D(3, 3, strides=4, padding="same",
                                                                                    name="quarter"),
                                   keras.layers.GlobalMaxPooling2D(), keras.layers.Dense(10)])
    assert {stage: layer.name for stage, layer in inrn.match_layers(sequential, student, (16, 16, 1)).items()} == {
        "stage2": "quarter"}
    names = ["stage4", "stage3", "stage2", "stage1"]
    matched = inrn.match_layers(teacher, student, (16, 16, 1), names)
    assert [layer.name for layer in matched.values()] == names
    images, labels = random_batch(2, 16)
    distiller = inrn.Distiller(student, teacher, (16, 16, 1), layers=names)  # resolutions that differ
    distiller.compile(total_steps=3)
    assert math.isfinite(distiller.train_step((images, labels))["loss"])
    odd = keras.Sequential([keras.Input((16, 16, 1)), keras.layers.Conv2D(3, 14), keras.layers.Flatten(),
                            keras.layers.Dense(10)])
    for model, arguments, hint in (
            (teacher, ((16, 16, 3), ()), "the images are"), (teacher, ((28, 28, 1), ()), "the images are"),
            (odd, ((16, 16, 1), ()), "resolution"), (student, ((16, 16, 1), ()), "functional or sequential"),
            (teacher, ((16, 16, 1), ["stage1"]), "four of"), (teacher, ((16, 16, 1), [*names[:3], "none"]), "four of")):
        with pytest.raises(ValueError, match=hint):
            inrn.match_layers(model, student, *arguments)
    with pytest.raises(ValueError, match="10 classes, the dataset has 7"):
        inrn.Distiller(tiny_inrn(classes=7), teacher, (16, 16, 1))


def test_resnet101_sees_images_as_it_was_trained():
    teacher = inrn.resnet101((32, 32, 1), weights=None)
    images = random_batch(1, 32)[0]
    seen = keras.Model(teacher.inputs, teacher.get_layer("conv1_pad").input)(images).numpy()
    expected = (127.5 * (images.numpy() + 1)).repeat(3, -1) - np.array([103.939, 116.779, 123.68])  # BGR means
    np.testing.assert_allclose(seen, expected, rtol=1e-4, atol=1e-3)
    student = tiny_inrn(stem_stride=4)
    assert [layer.output.shape[1:3] for layer in inrn.match_layers(teacher, student, (32, 32, 1)).values()] == [
        (8, 8), (4, 4), (2, 2), (1, 1)]
    inrn.Distiller(student, teacher, (32, 32, 1))  # it has no classes of its own
    with pytest.raises(ValueError, match="logits_weight at 0"):
        inrn.Distiller(student, teacher, (32, 32, 1), logits_weight=1.0)


def test_resnet101_without_a_network(tmp_path, monkeypatch, capsys):
    def unreachable(**_):
        raise OSError("URL fetch failure")

    monkeypatch.setattr(keras.applications, "ResNet101", unreachable)
    with pytest.raises(SystemExit) as stopped:
        train.main([*TINY_INRN, "--teacher", "resnet101", "--image-size", "32", "--run-dir", str(tmp_path / "run")])
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and "URL fetch failure" in error and error.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_inrn_in_mixed_precision():
    student = tiny_inrn(dtype="mixed_bfloat16")
    images, labels = random_batch(4, 16)
    assert student.stage_outputs(images)["stage2"].dtype == torch.bfloat16 and student(images).dtype == torch.float32
    distiller = inrn.Distiller(student, tiny_teacher(), (16, 16, 1))
    distiller.compile(total_steps=3)
    assert math.isfinite(distiller.train_step((images, labels))["loss"])


@pytest.mark.parametrize("method", train.METHODS)
def test_a_method_alone_in_an_empty_folder(tmp_path, method):
    shutil.copy(HERE / f"{method}.py", tmp_path)
    snippet, = (snippet for snippet in re.findall(r"```python\n(.*?)```", (HERE / "README.md").read_text(), re.DOTALL)
                if f"import {method}" in snippet)
    (tmp_path / "mine.py").write_text(snippet)
    result = run_python("mine.py", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "accuracy" in result.stdout


# ---- data.py ----


def test_shapes_depend_on_seed_and_index_alone():
    images, labels = data.shapes(range(40))
    again, _ = data.shapes([17, 3], seed=0)
    assert np.array_equal(again, images[[17, 3]])
    assert not np.array_equal(data.shapes([3], seed=1)[0], images[[3]])
    assert images.shape == (40, 28, 28, 1) and images.dtype == np.uint8
    assert labels.tolist() == list(range(10)) * 4


def test_shapes_are_one_signal_at_every_resolution():
    coarse, _ = data.shapes(range(20), size=28, channels=3)
    fine, _ = data.shapes(range(20), size=82, channels=3)  # 81 = 3 * 27 intervals: every third point is an old one
    assert np.array_equal(fine[:, ::3, ::3], coarse)
    noisy, _ = data.shapes(range(20), noise=0.1)
    clean, _ = data.shapes(range(20))
    assert 15 < (noisy.astype(float) - clean).std() < 27  # 0.1 * 255, less where it is clipped
    assert np.array_equal(noisy, data.shapes(range(20), noise=0.1)[0])


def test_shapes_dataset_is_balanced_and_its_splits_differ():
    dataset = data.load("shapes")
    assert dataset.train_images.shape == (10_000, 28, 28, 1) and dataset.test_images.shape == (2_000, 28, 28, 1)
    assert set(np.bincount(dataset.train_labels)) == {1_000} and set(np.bincount(dataset.test_labels)) == {200}
    train_set = {image.tobytes() for image in dataset.train_images}
    assert not any(image.tobytes() in train_set for image in dataset.test_images)
    small = data.load("shapes", image_size=16, seed=5)
    assert small.train_images.shape == (10_000, 16, 16, 1)
    fine = small.finer(7, 3)  # of the same test pictures, though no point but the corners is on both grids
    assert fine.shape == (7, 48, 48, 1) and np.array_equal(fine[:, ::47, ::47], small.test_images[:7, ::15, ::15])


@pytest.fixture(scope="module")
def dummy_mnist(tmp_path_factory):
    """A dataset that TFDS itself prepares, without a download: 20 images a split."""
    import tensorflow_datasets as tfds

    folder = tmp_path_factory.mktemp("tfds")
    tfds.testing.DummyMnist(data_dir=folder / "array_record", file_format="array_record").download_and_prepare()
    tfds.testing.DummyMnist(data_dir=folder / "tfrecord").download_and_prepare()
    return folder


def test_tfds_dataset_on_disk(dummy_mnist):
    result = run_python("-c", """
import sys, data
dataset = data.load("dummy_mnist")
assert dataset.train_images.shape == dataset.test_images.shape == (20, 28, 28, 1)
assert (dataset.train_images == 1).all() and sorted(dataset.train_labels) == sorted(list(range(10)) * 2)
assert dataset.class_names == tuple("0123456789")
assert "tensorflow" not in sys.modules
""", TFDS_DATA_DIR=str(dummy_mnist / "array_record"))
    assert result.returncode == 0, result.stderr


def test_tfds_dataset_prepared_as_tfrecord_and_resized(dummy_mnist):
    dataset = data.load("dummy_mnist", data_dir=dummy_mnist / "tfrecord", image_size=16)
    assert dataset.train_images.shape == (20, 16, 16, 1) and dataset.train_images.dtype == np.uint8


def test_tfds_prepares_what_is_not_on_disk(tmp_path, monkeypatch):
    """The download path, with a builder that needs no network; and the same with a network that fails."""
    import tensorflow_datasets as tfds

    monkeypatch.setattr(tfds, "builder", lambda name, **options: tfds.testing.DummyMnist(**options))
    assert data.load("mnist", data_dir=tmp_path).train_images.shape == (20, 28, 28, 1)
    assert list(tmp_path.rglob("*.array_record*"))

    def fail(self, **options):
        raise ConnectionError("no route to host")

    monkeypatch.setattr(tfds.testing.DummyMnist, "download_and_prepare", fail)
    with pytest.raises(data.DataError, match="--dataset shapes") as caught:
        data.load("mnist", data_dir=tmp_path / "other")
    assert "TFDS_DATA_DIR" in str(caught.value) and "no route to host" in str(caught.value)


def test_batches_order():
    images = np.arange(50, dtype=np.uint8).reshape(50, 1, 1, 1)
    labels = np.arange(50)
    batches = data.Batches(images, labels, 8, seed=3)
    epochs = []
    for epoch in (1, 2):
        batches.begin(epoch)
        seen = [batches[index] for index in range(len(batches))]
        assert all(np.array_equal(np.rint((x[:, 0, 0, 0] + 1) * 127.5), y) for x, y in seen)
        epochs.append(np.concatenate([y for _, y in seen]).tolist())
    assert len(epochs[0]) == len(set(epochs[0])) == 48 and epochs[0] != epochs[1]
    other = data.Batches(images, labels, 8, seed=3)
    assert other[5][1].tolist() == epochs[0][40:]
    other.begin(2, first=4)
    assert len(other) == 2 and [*other[0][1], *other[1][1]] == epochs[1][32:]
    ordered = data.Batches(images, labels, 8)
    assert np.concatenate([ordered[index][1] for index in range(len(ordered))]).tolist() == list(range(50))


def test_a_drawn_video_pans_over_a_mosaic_of_shapes():
    mosaic = data.shapes_mosaic(64, seed=2)
    tiles = data.shapes(range(16), 16, channels=3, seed=2)[0]
    for i in range(16):
        assert np.array_equal(mosaic[i // 4 * 16:i // 4 * 16 + 16, i % 4 * 16:i % 4 * 16 + 16], tiles[i])
    frames = data.shapes_video(16, 5, seed=2)
    places = [[(i, j) for i in range(49) for j in range(49) if np.array_equal(mosaic[i:i + 16, j:j + 16], frame)]
              for frame in frames]
    assert frames.shape == (5, 16, 16, 3) and all(len(place) == 1 for place in places) and len({*map(str, places)}) == 5


def test_pictures_and_frames_are_read(tmp_path):
    rng = np.random.default_rng(0)
    picture = rng.integers(0, 256, (20, 30, 3), dtype=np.uint8)
    Image.fromarray(picture).save(tmp_path / "b.png")
    Image.fromarray(255 - picture).save(tmp_path / "a.bmp")
    (tmp_path / "c.txt").write_text("no picture")
    assert np.array_equal(data.read_picture(tmp_path / "b.png", 100), picture)  # never scaled up
    assert data.read_picture(tmp_path / "b.png", 15).shape == (10, 15, 3)
    assert np.array_equal(data.read_frames(tmp_path, 30), [255 - picture, picture])
    Image.fromarray(picture[:, :, 0]).save(tmp_path / "grey.png")
    assert np.array_equal(data.read_picture(tmp_path / "grey.png", 30), picture[:, :, :1].repeat(3, -1))


@pytest.mark.parametrize("flip", [False, True])
def test_augmentation_shifts_over_the_reflection(flip):
    images = np.random.default_rng(0).normal(size=(64, 9, 11, 3)).astype("float32")
    result = np.asarray(data.augment(images, np.random.default_rng(1), flip))
    assert result.shape == images.shape
    places, mirrored = set(), 0
    for image, crop in zip(images, result):
        padded = np.pad(image, ((4, 4), (4, 4), (0, 0)), mode="reflect")
        found = [(row, column, mirror) for row in range(9) for column in range(9) for mirror in (False, True)
                 if np.array_equal(padded[row:row + 9, column:column + 11], crop[:, ::-1] if mirror else crop)]
        assert len(found) == 1
        places.add(found[0][:2])
        mirrored += found[0][2]
    assert {row for row, _ in places} == {column for _, column in places} == set(range(9))
    assert len(places) > 30 and (15 < mirrored < 49 if flip else mirrored == 0)
    assert np.array_equal(result, data.augment(images, np.random.default_rng(1), flip))


# ---- train.py ----


def test_a_whole_run(tmp_path, capsys):
    folder = tmp_path / "run"
    arguments = ["--run-dir", str(folder), "--augment", "--seed", "3", *TINY, "--epochs", "2"]
    assert train.main(arguments) == 0
    assert capsys.readouterr().out.strip().endswith(str(folder))
    assert {path.name for path in folder.iterdir()} == {"config.json", "history.csv", "model.keras", "results.json",
                                                        "reconstructions.png", "curves.png"}
    config, results = (json.loads((folder / name).read_text()) for name in ("config.json", "results.json"))
    assert config["dim"] == 16 and config["seed"] == 3 and config["versions"]["torch"] == torch.__version__
    assert {*vars(train.parse([])[0])} - {*train.NOT_OF_A_RUN} <= config.keys()
    assert config["image_shape"] == [28, 28, 1] and config["class_names"] == list(data.SHAPES)
    with open(folder / "history.csv", newline="") as file:
        history = list(csv.DictReader(file))
    assert [row["epoch"] for row in history] == ["0", "1"] and float(history[1]["val_accuracy"]) <= 1
    dataset = data.load("shapes", seed=3)
    metrics = keras.saving.load_model(folder / "model.keras").evaluate(
        data.Batches(dataset.test_images, dataset.test_labels, 200), verbose=0, return_dict=True)
    assert results["test_accuracy"] == pytest.approx(metrics["accuracy"]) and 0 <= results["test_accuracy"] <= 1
    assert results["test_psnr"] == pytest.approx(metrics["psnr"], rel=1e-5)
    assert results["parameters"] == expected_parameters(16, 2, 2, 1, 1)
    assert results["seconds_per_epoch"] > 0 and results["device"] and results["preset"] == "quick"
    for name in ("reconstructions.png", "curves.png"):
        assert (folder / name).read_bytes()[:4] == b"\x89PNG"

    before = {path: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(SystemExit) as stopped:
        train.main(arguments)
    assert stopped.value.code == 2 and "already holds a run" in capsys.readouterr().err
    assert before == {path: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_a_whole_run_of_hyperinr(tmp_path, capsys, experiment):
    folder = tmp_path / "run"
    assert train.main([*TINY_HYPERINR, "--classifier", experiment, "--classifier-part", "0.5", "--run-dir", str(folder),
                       "--seed", "3"]) == 0
    output = capsys.readouterr().out
    assert output.strip().endswith(str(folder))
    assert {path.name for path in folder.iterdir()} == {
        "config.json", "history.csv", "model.keras", "results.json", "reconstructions.png", "curves.png",
        "operations.png"}
    results = json.loads((folder / "results.json").read_text())
    assert results["parameters"] == expected_hyperinr_parameters(experiment, 16, 2, 8, 1)
    dataset = data.load("shapes", seed=3)
    model = keras.saving.load_model(folder / "model.keras")
    metrics = model.evaluate(data.Batches(dataset.test_images, dataset.test_labels, 200), verbose=0, return_dict=True)
    assert results["test_accuracy"] == pytest.approx(metrics["accuracy"])
    assert results["test_psnr"] == pytest.approx(metrics["psnr"], rel=1e-5)

    images, fine = (data.shapes(range(10_000, 11_000), size=size, seed=3)[0].astype("float32") / 127.5 - 1
                    for size in (28, 112))

    def psnr(truth, result):
        return (10 * np.log10(4 / np.square(truth - result).mean(axis=(1, 2, 3)))).mean()

    operations = results["operations"]
    bilinear = functional.interpolate(torch.tensor(images).permute(0, 3, 1, 2), (112, 112), mode="bilinear",
                                      align_corners=True).permute(0, 2, 3, 1).numpy()
    assert operations["upsample"]["bilinear"] == pytest.approx(psnr(fine, bilinear), rel=1e-4)
    assert operations["upsample"]["psnr"] == pytest.approx(psnr(fine, model.upsample(images, 4)), rel=1e-4)
    assert 12 < operations["denoise"]["noisy"] < 14  # noise of 0.5: 12 dB, and more where it is clipped
    for operation, figures in operations.items():
        assert f"{operation}: {figures['psnr']:.2f} dB" in output and 0 < figures["psnr"] < 40


def test_a_whole_run_of_inrn(tmp_path, capsys):
    folder = tmp_path / "run"
    assert train.main([*TINY_INRN, "--run-dir", str(folder)]) == 0
    assert capsys.readouterr().out.strip().endswith(str(folder))
    assert {str(path.relative_to(folder)) for path in folder.rglob("*")} == {
        "config.json", "history.csv", "model.keras", "results.json", "stages.png", "curves.png", "teacher",
        "teacher/history.csv", "teacher/model.keras"}
    config, results = (json.loads((folder / name).read_text()) for name in ("config.json", "results.json"))
    assert config["teacher"] == "train" and config["widths"] == "8,8,12,16"
    assert len((folder / "history.csv").read_text().splitlines()) == 3
    assert len((folder / "teacher" / "history.csv").read_text().splitlines()) == 2
    dataset, model = data.load("shapes"), keras.saving.load_model(folder / "model.keras")
    labels = model.predict(data.scale(dataset.test_images), verbose=0).argmax(-1)
    assert results["test_accuracy"] == pytest.approx((labels == dataset.test_labels).mean(), abs=1e-6)
    assert results["parameters"] == model.count_params() == inrn_parameters("8,8,12,16", "1,1,2,1", 2, 2.0, 1, 10)
    teacher = keras.saving.load_model(folder / "teacher" / "model.keras")
    assert teacher.predict(data.scale(dataset.test_images[:3]), verbose=0).shape == (3, 10)
    assert teacher.get_layer("stage4").output.shape == (None, 2, 2, 128)


def test_teachers_from_files(tmp_path, capsys):
    tiny_teacher(size=28).save(tmp_path / "teacher.keras")
    assert train.main([*TINY_INRN, "--teacher", str(tmp_path / "teacher.keras"), "--run-dir", str(tmp_path / "run"),
                       "--logits-weight", "1", "--teacher-layers", "stage2,stage2,stage3,stage4"]) == 0
    assert not (tmp_path / "run" / "teacher").exists() and "distillation" in (tmp_path / "run/history.csv").read_text()
    tiny_teacher(classes=7, size=28).save(tmp_path / "seven.keras")
    tiny_teacher(size=16).save(tmp_path / "small.keras")
    inrn.INRN().save(tmp_path / "inrn.keras")
    (tmp_path / "text.keras").write_text("no model")
    capsys.readouterr()
    for name, hint in (("seven", "7 classes, the dataset has 10"), ("small", "the images are (28, 28, 1)"),
                       ("inrn", "functional or sequential"), ("text", "text.keras"), ("missing", "missing.keras")):
        with pytest.raises(SystemExit) as stopped:
            train.main([*TINY_INRN, "--teacher", str(tmp_path / f"{name}.keras"), "--run-dir", str(tmp_path / "bad")])
        error = capsys.readouterr().err
        assert stopped.value.code == 2 and hint in error and error.count("\n") == 1
    assert not (tmp_path / "bad").exists()


def test_fitting_a_picture_from_a_file(tmp_path, capsys):
    picture = np.random.default_rng(0).integers(0, 256, (18, 30, 4), dtype=np.uint8)
    picture[..., 3] = 255
    Image.fromarray(picture).save(tmp_path / "photo.png")
    assert train.main([*TINY_FIT, "--image", str(tmp_path / "photo.png"), "--image-size", "15", "--run-dir",
                       str(tmp_path / "run")]) == 0
    folder, lines = tmp_path / "run", capsys.readouterr().out
    assert {str(path.relative_to(folder)) for path in folder.rglob("*")} == {
        "config.json", "history.csv", "model.keras", "results.json", "fit.png", "curves.png", "siren", "relu",
        "siren/history.csv", "siren/model.keras", "relu/history.csv", "relu/model.keras"}
    assert json.loads((folder / "config.json").read_text())["image_shape"] == [9, 15, 3] and "photo" in lines
    results, truth = json.loads((folder / "results.json").read_text()), data.read_picture(tmp_path / "photo.png", 15)
    for network in ("inrn", "siren", "relu"):
        model = keras.saving.load_model(folder / ("" if network == "inrn" else network) / "model.keras")
        squared = ((model.render([0.0], 9, 15)[0] - (truth / 127.5 - 1)) ** 2).mean()
        assert results[network]["psnr"] == pytest.approx(10 * math.log10(4 / squared), abs=1e-3)
        assert results[network]["parameters"] == model.count_params() and -1 <= results[network]["ssim"] <= 1
    with pytest.raises(SystemExit):
        train.main(["--predict", str(folder), str(tmp_path / "photo.png")])
    assert "knows no classes" in capsys.readouterr().err


def test_fitting_a_video_from_a_folder(tmp_path, capsys):
    frames = data.shapes_video(12, 3)
    (tmp_path / "frames").mkdir()
    for i in (2, 0, 1):
        Image.fromarray(frames[i]).save(tmp_path / "frames" / f"{i}.png")
    (tmp_path / "frames" / "notes.txt").write_text("not a frame")
    assert train.main([*TINY_FIT, "--frames", str(tmp_path / "frames"), "--alone", "--steps", "200", "--run-dir",
                       str(tmp_path / "run")]) == 0
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert not (tmp_path / "run" / "siren").exists() and "siren" not in results
    model = keras.saving.load_model(tmp_path / "run" / "model.keras")
    distances = ((model.render([-1.0, 0.0, 1.0], 12, 12)[:, None] - data.scale(frames)[None]) ** 2).mean((2, 3, 4))
    assert (distances.argmin(1) == range(3)).all()  # each time shows its frame
    Image.fromarray(frames[0][:10]).save(tmp_path / "frames" / "3.png")
    (tmp_path / "other").mkdir()
    for folder, hint in (("frames", "12×10"), ("other", "no image files")):
        capsys.readouterr()
        with pytest.raises(SystemExit) as stopped:
            train.main([*TINY_FIT, "--frames", str(tmp_path / folder), "--run-dir", str(tmp_path / "bad")])
        error = capsys.readouterr().err
        assert stopped.value.code == 2 and hint in error and error.count("\n") == 1
    assert not (tmp_path / "bad").exists()


def test_every_variant_of_every_ablation_is_another_model():
    for which, variants in inrn.ABLATIONS.items():
        settings = [dict(variant) for variant in variants]
        assert len({str(setting) for setting in settings}) == len(settings) >= 2
        for variant in settings:
            if which == "distillation":
                assert variant.pop("teacher") in ("none", "train") and variant.keys() <= inrn.SMALL.keys()
            elif which == "architecture":
                inrn.PictureFit(time=True, **variant)
            else:
                arguments = arguments_of(inrn.INRN, {**inrn.PRESETS["quick"], **variant})
                assert {**arguments, **variant} == arguments
                inrn.INRN(**arguments)


@pytest.mark.parametrize("which", ["architecture", "distillation"])
def test_ablations_go_on_where_they_stopped(tmp_path, capsys, monkeypatch, which):
    folder, parts = tmp_path / "run", []
    complete = train.complete

    def stop_in_the_second(options, part, *arguments):
        parts.append(part)
        if len(parts) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return complete(options, part, *arguments)

    monkeypatch.setattr(train, "complete", stop_in_the_second)
    tiny = TINY_FIT[4:] if which == "architecture" else [*TINY_INRN[2:], "--epochs", "1"]
    if which == "stages":
        tiny = [option for option in tiny if option not in ("--blocks", "1,1,2,1")]
    assert train.main(["--method", "inrn", "--ablate", which, *tiny, "--run-dir", str(folder)]) == 143
    error = capsys.readouterr().err
    assert f"--resume {folder} goes on" in error and error.strip().count("\n") == 0
    first = (parts[0] / "results.json").stat().st_mtime_ns
    assert train.main(["--resume", str(folder)]) == 0
    variants = inrn.ABLATIONS[which]
    assert len(set(parts)) == 2 * len(variants) and len(parts) == len(set(parts)) + 1
    monkeypatch.setattr(train, "complete", complete)
    assert (parts[0] / "results.json").stat().st_mtime_ns == first
    rows = list(csv.DictReader((folder / "table.csv").open(newline="")))
    value = "psnr" if which == "architecture" else "accuracy"
    assert [row[which] for row in rows] == [", ".join(f"{k} {v}" for k, v in variant.items()) for variant in variants]
    for row, variant in zip(rows, variants):
        found = [json.loads((folder / f"{row[which].replace(', ', '-').replace(' ', '-')}-{seed}" /
                             "results.json").read_text()) for seed in (0, 1)]
        found = [result["inrn"]["psnr"] if value == "psnr" else 100 * result["test_accuracy"] for result in found]
        assert float(row[value]) == pytest.approx(np.mean(found), abs=0.006)
        assert float(row["spread"]) == pytest.approx(np.std(found, ddof=1), abs=0.006)
        config = json.loads((folder / f"{row[which].replace(', ', '-').replace(' ', '-')}-1" / "config.json").read_text())
        assert config["seed"] == 1 and {**config, **variant} == config
    assert (folder / "table.png").read_bytes()[:4] == b"\x89PNG" and "finished" not in capsys.readouterr().out
    assert train.main(["--resume", str(folder)]) == 0 and "finished" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        train.main(["--evaluate", str(folder)])
    assert "holds an ablation" in capsys.readouterr().err
    assert train.main(["--evaluate", str(parts[0])]) == 0  # as the message says


def test_a_run_on_a_tfds_dataset(dummy_mnist, tmp_path):
    assert train.main(["--dataset", "dummy_mnist", "--data-dir", str(dummy_mnist / "array_record"), "--run-dir",
                       str(tmp_path / "run"), *TINY, "--validation-images", "0", "--precision", "mixed_bfloat16",
                       "--image-size", "12"]) == 0
    keras.config.set_dtype_policy("float32")
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["dataset"] == "dummy_mnist" and 0 <= results["test_accuracy"] <= 1
    assert "val_" not in (tmp_path / "run" / "history.csv").read_text()
    assert keras.saving.load_model(tmp_path / "run" / "model.keras").classifier.layers[2].compute_dtype == "bfloat16"


def test_hyperinr_on_a_tfds_dataset_of_an_odd_size(dummy_mnist, tmp_path):
    assert train.main([*TINY_HYPERINR, "--dataset", "dummy_mnist", "--data-dir", str(dummy_mnist / "array_record"),
                       "--run-dir", str(tmp_path / "run"), "--validation-images", "0", "--image-size", "13"]) == 0
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["operations"]["upsample"]["bilinear"] > 40  # its images are all of one grey


@pytest.mark.parametrize("tiny", [TINY, TINY_HYPERINR, TINY_INRN, TINY_FIT], ids=[*train.METHODS, "fit"])
def test_the_same_seed_gives_the_same_run(tmp_path, tiny):
    for name in ("a", "b"):
        assert train.main(["--run-dir", str(tmp_path / name), *tiny]) == 0
    assert (tmp_path / "a" / "history.csv").read_text() == (tmp_path / "b" / "history.csv").read_text()


def test_a_loss_that_becomes_nan_keeps_good_weights(tmp_path, capsys, monkeypatch):
    original, steps = mwt.MWT.losses, []

    def losses(self, images, labels, sample_weight=None, training=False):
        logits, errors, cross_entropy = original(self, images, labels, sample_weight, training)
        steps.append(training)
        return logits, errors, cross_entropy * (math.nan if sum(steps) == 6 else 1)  # in the second of four epochs

    monkeypatch.setattr(mwt.MWT, "losses", losses)
    assert train.main(["--run-dir", str(tmp_path / "run"), *TINY, "--epochs", "4"]) == 1
    error = capsys.readouterr().err
    assert "nan in step 2 of epoch 2" in error and "after 1 epochs" in error and sum(steps) == 6
    model = keras.saving.load_model(tmp_path / "run" / "model.keras")
    for optimizer in model.optimizers:
        assert int(optimizer.iterations) == 4  # as many as the first epoch had steps
        assert all(np.isfinite(variable.numpy()).all() for variable in optimizer.variables)
    assert all(np.isfinite(weight).all() for weight in model.get_weights())
    assert not (tmp_path / "run" / "results.json").exists()


BAD_OPTIONS = [
    (["--method", "nerf"], "mwt"), (["--preset", "huge"], "paper-wide"), (["--precision", "int8"], "mixed_bfloat16"),
    (["--dataset", "no_such_dataset"], "shapes, mnist"), (["--dataset", "imagenette/9px"], "imagenette/320px-v2"),
    (["--dataset", "lm1b"], "not an image classification dataset"),
    (["--limit", "0"], "from 1 up"), (["--limit", "some"], "from 1 up"), (["--limit", "8"], "--batch-size"),
    (["--epochs", "0"], "from 1 up"), (["--epochs", "1.5"], "from 1 up"), (["--batch-size", "-4"], "from 1 up"),
    (["--batch-size", "9000"], "--batch-size"), (["--inner-steps", "0"], "from 1 up"), (["--seed", "-1"], "from 0 up"),
    (["--validation-images", "10000"], "--validation-images"), (["--image-size", "2"], "from 8 up"),
    (["--dim", "100"], "multiple of 64"), (["--subsample", "2"], "subsample"), (["--siren-rate", "nan"], "from 0 up"),
    (["--task-weight", "-1"], "from 0 up"), (["--warmup", "2"], "between 0 and 1"), (["--seed", "4294967296"], "2**32"),
    (["--dataset", "mnist:9.9.9"], "unknown dataset"), (["--dataset", "imagenette/320px-v2"], "--image-size 64"),
    (["--shared-step-sizes", "maybe"], "true"), (["--no-such-flag"], "flag"),
    (["--method", "hyperinr", "--classifier", "cnn"], "pretrained"), (["--method", "hyperinr", "--dim", "0"], "from 1"),
    (["--method", "hyperinr", "--classifier-part", "1"], "between 0 and 1"),
    (["--method", "hyperinr", "--final-rate", "2"], "between 0 and 1"),
    (["--method", "hyperinr", "--inner-steps", "6"], "--inner-steps"), (["--classifier", "joint"], "--classifier"),
    (["--teacher", "none"], "--teacher"), *[(["--method", "inrn", *arguments], hint) for arguments, hint in [
        (["--widths", "8,8"], "four whole numbers"), (["--hybrid", "both"], "interleaved"), (["--compile"], "--compile"),
        (["--compression", "0"], "compression"), (["--activation", "tanh"], "relu"), (["--ablate", "all"], "stages"),
        (["--teacher", "no/such.keras"], "no/such.keras"), 
        (["--teacher-layers", "a,b"], "stage1"), (["--image", "a.png"], "--task fit"), (["--alone"], "--task fit"),
        (["--task", "fit", "--teacher", "none"], "--task fit"), (["--task", "fit", "--ablate", "stages"], "--task fit"),
        (["--task", "fit", "--widths", "8,8,8,8"], "--widths"), (["--task", "fit", "--alpha", "2"], "alpha"),
        (["--task", "fit", "--image", "no/such.png"], "no/such.png"), (["--task", "fit", "--image", __file__], "image"),
        (["--task", "fit", "--frames", "no/such"], "No such"), (["--task", "fit", "--frames", str(HERE)], "no image"),
        (["--task", "fit", "--image", "a.png", "--frames", "b"], "not allowed with"),
        (["--ablate", "stages", "--blocks", "1,1,1,1"], "itself"), (["--ablate", "activation", "--limit", "9"], "--limit"),
        (["--task", "fit", "--precision", "mixed_bfloat16"], "float32"), (["--ablate", "stages", "--widths", "1"], "four"),
        (["--task", "fit", "--width", "0"], "from 1 up"), (["--task", "fit", "--dataset", "mnist"], "--dataset"), (["--seeds", "0"], "from 1 up"),
    ]],
]


@pytest.mark.parametrize("arguments, hint", BAD_OPTIONS, ids=[" ".join(arguments) for arguments, _ in BAD_OPTIONS])
def test_bad_options(arguments, hint, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "datasets"))
    with pytest.raises(SystemExit) as stopped:
        train.main(["--run-dir", str(tmp_path / "run"), *arguments])
    output = capsys.readouterr()
    assert stopped.value.code == 2 and output.out == ""
    assert output.err.count("\n") == 1 and hint in output.err
    assert not (tmp_path / "run").exists()


def test_run_folder_that_cannot_be_written(tmp_path, capsys):
    (tmp_path / "file").write_text("not a folder")
    for folder in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(SystemExit) as stopped:
            train.main(["--run-dir", str(folder), *TINY])
        assert stopped.value.code == 2
        assert capsys.readouterr().err.count("\n") == 1
    assert (tmp_path / "file").read_text() == "not a folder"


def test_start_imports_neither_tensorflow_nor_tfds(tmp_path):
    for arguments, status in ((["--help"], 0), (["--preset", "huge"], 2), (["--dim", "100", "--dataset", "mnist"], 2)):
        result = run_python("-X", "importtime", HERE / "train.py", *arguments, cwd=tmp_path)
        assert result.returncode == status
        imported = {line.rsplit("|", 1)[1].strip() for line in result.stderr.splitlines() if "import time:" in line}
        assert "keras" in imported and not {"tensorflow", "tensorflow_datasets"} & imported
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("method", [mwt, hyperinr])
def test_help_shows_every_hyperparameter_and_its_defaults(capsys, method):
    with pytest.raises(SystemExit) as stopped:
        train.main(["--method", method.__name__, "--help"])
    options = " ".join(capsys.readouterr().out.split("hyperparameters:")[1].split()).split(" --")
    assert stopped.value.code == 0
    for name, value in method.PAPER.items():
        option, = (option for option in options if option.startswith(name.replace("_", "-") + " "))
        assert f", paper {value}" in option and f" quick {method.PRESETS['quick'][name]}, " in option


def test_options_change_the_preset_they_start_from():
    _, _, hyperparameters = train.parse(["--preset", "paper", "--inner-steps", "4", "--shared-step-sizes", "true"])
    assert hyperparameters == {**mwt.PAPER, "inner_steps": 4, "shared_step_sizes": True}
    assert mwt.PAPER["inner_steps"] == 6


def test_benchmark(capsys):
    assert train.main(["--benchmark", "--image-size", "8", "--batch-size", "16", "--inner-steps", "2", "--dim", "32",
                       "--depth", "2", "--subsample", "1", "--blocks", "3"]) == 0
    figures = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    assert figures.keys() == {"ms_per_step", "images_per_second", "peak_memory_mb", "gflop_per_step", "matmul_gflops",
                              "share_of_matmul_rate"}
    assert all(value > 0 for value in figures.values())
    # An inner step costs three passes, and training triples everything but the gradients of what is not learned.
    siren = 64 * (2 * 32 + 2 * 32**2 + 32)
    transformer = 64 * (33 * 32 + 3 * (6 * 32**2 + 2 * 64 * 32))
    expected = 2 * 16 * ((2 * 9 + 3) * siren + 3 * transformer) / 1e9
    assert 0.75 * expected < figures["gflop_per_step"] <= 1.05 * expected


def test_benchmark_of_hyperinr(capsys):
    assert train.main(["--method", "hyperinr", "--benchmark", "--batch-size", "16", "--dim", "64", "--image-size", "16",
                       "--encoder-width", "8", "--latent-dim", "64"]) == 0
    figures = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    # Forward: a multiply-add per weight and place where it is used; training triples it, but for the gradients of
    # inputs that nobody needs.
    siren = 256 * (2 * 64 + 3 * 64**2 + 64)
    hyper = 10 * 2 * 64**2 + 64 * (3 * 64 + 3 * 64**2 + 64 + 4 * 64 + 1)
    encoder = 256 * 9 * 8 + sum((16 >> block + 1)**2 * (10 * i * 2 * i + 9 * (2 * i)**2)
                                for block, i in enumerate((8, 16, 32))) + 4 * 64 * 64
    expected = 2 * 16 * 3 * (siren + hyper + encoder + 64 * 74) / 1e9
    assert 0.9 * expected < figures["gflop_per_step"] <= 1.02 * expected


def test_benchmark_of_inrn(capsys):
    assert train.main(["--method", "inrn", "--benchmark", "--batch-size", "128", "--widths", "32,64,64,64", "--blocks",
                       "1,1,2,1", "--image-size", "16", "--teacher", "none"]) == 0
    figures = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    # As above, with the places that a kernel is used at; the dense layer before a stride sees four times as many.
    expected = 9 * 32 * 64 + 64 * (2 * 32 * 16 + 9 * 16**2) + 64 * 10
    for before, width, at, blocks in ((32, 64, 16, 1), (64, 64, 4, 2), (64, 64, 1, 1)):
        expected += 4 * at * before * width // 2 + at * (9 * width**2 // 4 + width**2 // 2 + 9 * before * width)
        expected += (blocks - 1) * at * (width**2 + 9 * width**2 // 4)
    expected = 2 * 128 * 3 * expected / 1e9
    assert 0.9 * expected < figures["gflop_per_step"] <= 1.02 * expected
    assert train.main(["--method", "inrn", "--benchmark", "--batch-size", "128", "--widths", "32,64,64,64", "--blocks",
                       "1,1,2,1", "--image-size", "16"]) == 0  # with the teacher's forward pass
    taught = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    teacher = 64 * (9 * 32 + 2 * 9 * 32**2) + sum(at * (10 * i * o + 9 * o * o) for at, i, o in (
        (16, 32, 64), (4, 64, 128), (1, 128, 128))) + 1280
    align = 3 * (64 * 32**2 + 16 * 64**2 + 4 * 64 * 128 + 64 * 128)
    added = 2 * 128 * (teacher + align) / 1e9
    assert taught["gflop_per_step"] - figures["gflop_per_step"] == pytest.approx(added, rel=0.1)
    assert train.main(["--benchmark", *TINY_FIT]) == 0
    assert json.loads(capsys.readouterr().out.strip().splitlines()[-1])["gflop_per_step"] >= 0


# ---- A run survives ----


LONGER = ["--limit", "480", "--epochs", "3", "--save-every", "4"]
SURVIVORS = {  # classifiers
    "mwt": [*TINY, "--augment", *LONGER],
    "hyperinr": [*TINY_HYPERINR, "--classifier", "latent", "--classifier-part", "0.4", *LONGER],
    "inrn": [*TINY_INRN, *LONGER],
}
RUNS = {**SURVIVORS, "fit": [*TINY_FIT, "--steps", "60", "--save-every", "7"]}


def start(*arguments):
    """A real process; returns once it trains."""
    process = subprocess.Popen([sys.executable, "-u", HERE / "train.py", *map(str, arguments)], text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    for line in process.stdout:
        if line.startswith(("Epoch ", "going on")):
            break
    return process


def timeless(results):
    """Results without times."""
    return {name: timeless(value) if isinstance(value, dict) else value for name, value in results.items()
            if not name.startswith("seconds")}


def assert_same_run(folder, reference):
    """Weights and optimizers bit for bit, the history, the results; nothing left behind."""
    assert (folder / "history.csv").read_text() == (reference / "history.csv").read_text()
    ours, theirs = (json.loads((path / "results.json").read_text()) for path in (folder, reference))
    assert timeless(ours) == timeless(theirs)
    assert sorted(path.relative_to(folder) for path in folder.rglob("*")) == sorted(
        path.relative_to(reference) for path in reference.rglob("*"))
    for path in reference.rglob("model.keras"):
        models = [keras.saving.load_model(path) for path in (folder / path.relative_to(reference), path)]
        for a, b in zip(*([*model.weights, *[variable for optimizer in getattr(model, "optimizers", [model.optimizer])
                                             for variable in optimizer.variables]] for model in models), strict=True):
            assert np.array_equal(a.numpy(), b.numpy()), a.path


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """One finished run of each method, which nothing disturbed."""
    folder = tmp_path_factory.mktemp("runs")
    for method, options in RUNS.items():
        result = run_python("train.py", *options, "--run-dir", folder / method)
        assert result.returncode == 0, result.stderr
    return folder


def kill_and_resume(folder, options, kills, rng):
    """Trains in processes of which the first `kills` end by SIGKILL, each up to two seconds after it began to train."""
    arguments = [*options, "--run-dir", folder]
    for _ in range(kills):
        process = start(*arguments)
        time.sleep(rng.random())
        process.kill()
        process.communicate()
        assert process.returncode == -signal.SIGKILL  # it was still at work
        arguments = ["--resume", folder]
    result = run_python("train.py", *arguments)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("method", RUNS)
def test_a_killed_run_ends_like_one_that_was_not(uninterrupted, tmp_path, method):
    kill_and_resume(tmp_path / "run", RUNS[method], 3, np.random.default_rng(0))
    assert_same_run(tmp_path / "run", uninterrupted / method)


def test_a_kill_between_the_last_state_and_the_files_that_follow(uninterrupted, tmp_path, monkeypatch, capsys):
    write_files, folder = train.Run.write_files, tmp_path / "run"

    def stop(self):
        if self.epoch == 3:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write_files(self)

    with monkeypatch.context() as patch:
        patch.setattr(train.Run, "write_files", stop)
        assert train.main([*SURVIVORS["mwt"], "--run-dir", str(folder)]) == 1
    assert len((folder / "history.csv").read_text().splitlines()) == 3
    result = run_python("train.py", "--resume", folder)
    assert result.returncode == 0, result.stderr
    assert len((folder / "history.csv").read_text().splitlines()) == 4
    results, model = json.loads((folder / "results.json").read_text()), keras.saving.load_model(folder / "model.keras")
    dataset = data.load("shapes")
    metrics = model.evaluate(data.scale(dataset.test_images), dataset.test_labels, verbose=0, return_dict=True)
    assert results["test_accuracy"] == pytest.approx(metrics["accuracy"])


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_save_and_say_how_to_resume(uninterrupted, tmp_path, number):
    method = {signal.SIGINT: "mwt", signal.SIGTERM: "hyperinr"}[number]
    folder = tmp_path / "run"
    process = start(*SURVIVORS[method], "--run-dir", folder, "--save-every", "1000")
    time.sleep(0.1)
    process.send_signal(number)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 128 + number
    assert f"python train.py --resume {folder}" in error and error.strip().count("\n") == 0
    assert any((folder / "checkpoint").iterdir())
    result = run_python("train.py", "--resume", folder)
    assert result.returncode == 0 and "going on after" in result.stdout, result.stderr
    assert_same_run(folder, uninterrupted / method)


@pytest.fixture
def interrupted(tmp_path, monkeypatch, capsys):
    """A run of MWT that was interrupted in its second epoch, with both its states."""
    save_state, saves = train.Run.save_state, []

    def save_and_stop(self):
        save_state(self)
        saves.append((self.epoch, self.step))
        if len(saves) == 10:
            raise train.Interrupted(signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(train.Run, "save_state", save_and_stop)
        assert train.main([*SURVIVORS["mwt"], "--run-dir", str(tmp_path / "run")]) == 143
    assert saves[-1] == (1, 8)
    capsys.readouterr()
    return tmp_path / "run"


def newest_first(folder):
    return sorted((folder / "checkpoint").glob("state-*"), key=lambda path: -path.stat().st_mtime_ns)


@pytest.mark.parametrize("damage", [
    lambda path: path.write_bytes(path.read_bytes()[:-100]), lambda path: path.write_bytes(b""),
    lambda path: path.write_bytes(bytes(byte ^ (64 if i == 5000 else 0) for i, byte in enumerate(path.read_bytes())))],
    ids=["truncated", "empty", "altered"])
def test_a_damaged_state_is_named_and_the_one_before_it_used(interrupted, uninterrupted, capsys, damage):
    newest, older = newest_first(interrupted)
    damage(newest)
    assert train.main(["--resume", str(interrupted)]) == 0
    output = capsys.readouterr()
    assert f"{newest} is damaged" in output.err and "going on after 1 epochs and 4 steps" in output.out
    # Other tests may have run in this process with other threads, so the comparison is of what cannot depend on that.
    assert len((interrupted / "history.csv").read_text().splitlines()) == 4
    assert not (interrupted / "checkpoint").exists()


@pytest.mark.parametrize("damage", [lambda path: path.write_bytes(path.read_bytes()[:1000]), pathlib.Path.unlink],
                         ids=["truncated", "gone"])
def test_without_a_whole_state_nothing_is_changed(interrupted, capsys, damage):
    for path in newest_first(interrupted):
        damage(path)
    before = {path: path.read_bytes() for path in interrupted.rglob("*") if path.is_file()}
    with pytest.raises(SystemExit) as stopped:
        train.main(["--resume", str(interrupted)])
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and error.count("\n") == 1 and str(interrupted / "checkpoint") in error
    assert before == {path: path.read_bytes() for path in interrupted.rglob("*") if path.is_file()}


def test_a_full_disk_leaves_the_last_state(interrupted, capsys, monkeypatch):
    states = {path: path.read_bytes() for path in newest_first(interrupted)}

    def fail(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fail)
        assert train.main(["--resume", str(interrupted)]) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "No space left" in error and f"--resume {interrupted}" in error
    assert states == {path: path.read_bytes() for path in newest_first(interrupted)}
    assert not list(interrupted.rglob("new-*"))
    assert train.main(["--resume", str(interrupted)]) == 0


def test_a_folder_that_vanishes(tmp_path, capsys, monkeypatch):
    save_state = train.Run.save_state

    def remove_and_save(self):
        if self.epoch == 1:
            shutil.rmtree(self.folder)
        save_state(self)

    monkeypatch.setattr(train.Run, "save_state", remove_and_save)
    assert train.main([*SURVIVORS["mwt"], "--run-dir", str(tmp_path / "run")]) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and f"cannot write {tmp_path / 'run'} (No such file" in error


def test_signals_before_training(tmp_path):
    for number in (signal.SIGINT, signal.SIGTERM):
        process = subprocess.Popen([sys.executable, "-c", "import os, signal, train; train.load_dataset = "
                                    f"lambda options: os.kill(os.getpid(), {int(number)}); "
                                    f"raise SystemExit(train.main(['--run-dir', {str(tmp_path / 'run')!r}]))"], cwd=HERE,
                                   text=True, stderr=subprocess.PIPE)
        error = process.communicate(timeout=60)[1]
        assert process.returncode == 128 + number and error.strip() == "train.py: interrupted"
    assert not (tmp_path / "run").exists()


def test_files_that_may_not_grow(tmp_path):
    """A real error of the system: files are limited to 2 kB."""
    result = subprocess.run([sys.executable, "-c", "import resource, runpy, sys; "
                             "resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000)); "
                             "runpy.run_path('train.py', run_name='__main__')", *SURVIVORS["mwt"], "--run-dir",
                             str(tmp_path / "run")], cwd=HERE, capture_output=True, text=True, timeout=120)
    assert result.returncode == 1 and "File too large" in result.stderr and result.stderr.count("\n") == 1


def test_a_folder_is_used_by_one_process(interrupted, capsys):
    before = {path: path.read_bytes() for path in interrupted.rglob("*") if path.is_file()}
    with train.locked(interrupted), pytest.raises(SystemExit) as stopped:
        train.main(["--resume", str(interrupted)])
    assert stopped.value.code == 2 and "in use by another process" in capsys.readouterr().err
    assert before == {path: path.read_bytes() for path in interrupted.rglob("*") if path.is_file()}
    process = start("--resume", interrupted)
    with pytest.raises(SystemExit), train.locked(interrupted):
        pass
    process.kill()
    process.communicate()
    with train.locked(interrupted):
        pass


def test_options_beside_resume(interrupted, uninterrupted, capsys):
    for arguments, hint in ((["--dim", "32"], "--dim 32 contradicts"), (["--seed", "7"], "says 0"),
                            (["--method", "hyperinr"], "says mwt"), (["--dataset", "mnist"], "says shapes"),
                            (["--evaluate", str(interrupted)], "not allowed with")):
        with pytest.raises(SystemExit) as stopped:
            train.main(["--resume", str(interrupted), *arguments])
        error = capsys.readouterr().err
        assert stopped.value.code == 2 and hint in error and error.count("\n") == 1
    for folder, hint in ((interrupted / "none", "holds no run"), (HERE / "train.py", "holds no run")):
        with pytest.raises(SystemExit) as stopped:
            train.main(["--resume", str(folder)])
        assert stopped.value.code == 2 and hint in capsys.readouterr().err
    for content in ("{", "[]", '{"method": "nerf"}', '{"method": "mwt"}'):
        (interrupted / "config.json").write_text(content)
        with pytest.raises(SystemExit) as stopped:
            train.main(["--resume", str(interrupted)])
        error = capsys.readouterr().err
        assert stopped.value.code == 2 and "config.json" in error and error.count("\n") == 1

    finished = uninterrupted / "mwt"
    before = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in finished.iterdir()}
    assert train.main(["--resume", str(finished), "--dim", "16"]) == 0  # the same as before
    assert "finished" in capsys.readouterr().out
    assert before == {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in finished.iterdir()}


@pytest.mark.parametrize("method", RUNS)
def test_evaluate_gives_the_same_results(uninterrupted, tmp_path, method):
    folder = tmp_path / "run"
    shutil.copytree(uninterrupted / method, folder)
    result = run_python("train.py", "--evaluate", folder)
    assert result.returncode == 0, result.stderr
    expected, actual = (json.loads((path / "results.json").read_text())
                        for path in (folder, folder / "evaluation-shapes"))
    assert actual == timeless(expected)
    pictures = {path.name for path in folder.glob("*.png")} - {"curves.png"}
    assert {path.name for path in (folder / "evaluation-shapes").glob("*.png")} == pictures


def test_evaluate_on_other_data_and_its_errors(uninterrupted, dummy_mnist, tmp_path, capsys, monkeypatch):
    folder = tmp_path / "run"
    shutil.copytree(uninterrupted / "mwt", folder)
    assert train.main(["--evaluate", str(folder), "--dataset", "dummy_mnist", "--data-dir",
                       str(dummy_mnist / "array_record")]) == 0
    results = json.loads((folder / "evaluation-dummy_mnist" / "results.json").read_text())
    assert results["dataset"] == "dummy_mnist" and 0 <= results["test_accuracy"] <= 1
    three = data.Dataset(*data.shapes(range(9)), *data.shapes(range(9)), class_names=("a", "b", "c"), flip=True)
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped, monkeypatch.context() as patch:
        patch.setattr(train, "load_dataset", lambda options: three)
        train.main(["--evaluate", str(folder)])
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and "3 classes" in error and error.count("\n") == 1
    for damage in (lambda path: path.write_bytes(path.read_bytes()[:5000]), lambda path: path.unlink()):
        damage(folder / "model.keras")
        with pytest.raises(SystemExit) as stopped:
            train.main(["--evaluate", str(folder)])
        error = capsys.readouterr().err
        assert stopped.value.code == 2 and "model.keras" in error and error.count("\n") == 1


@pytest.mark.parametrize("method", SURVIVORS)
def test_predict_reads_images_of_all_kinds(uninterrupted, tmp_path, method, capsys):
    folder = tmp_path / "run"
    shutil.copytree(uninterrupted / method, folder)
    picture = Image.fromarray(data.shapes([10_003], size=28, seed=0)[0][0, :, :, 0])
    kinds = {"grey.png": picture, "rgb.png": picture.convert("RGB"), "palette.gif": picture.convert("P"),
             "rgba.png": picture.convert("RGBA"), "photo.jpg": picture.resize((301, 200)).convert("RGB"),
             "deep.png": Image.fromarray(np.asarray(picture).astype(np.uint16) << 8), "bits.png": picture.convert("1"),
             "one.png": Image.new("L", (1, 1)), "la.png": picture.convert("LA")}
    if method == "mwt":  # reading does not depend on the method, and takes seconds
        kinds["huge.png"] = Image.new("L", (15_000, 12_500))
    for name, image in kinds.items():
        image.save(tmp_path / name)
    (tmp_path / "empty.png").write_bytes(b"")
    (tmp_path / "text.png").write_text("this is no picture")
    noise = np.random.default_rng(0).integers(0, 256, (64, 64), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "truncated.png")
    (tmp_path / "truncated.png").write_bytes((tmp_path / "truncated.png").read_bytes()[:2000])
    bad = ["empty.png", "text.png", "truncated.png", "missing.png", "run"]
    names = ["empty.png", *kinds, *bad[1:]]
    assert train.main(["--predict", str(folder), *[str(tmp_path / name) for name in names]]) == 1
    output = capsys.readouterr()
    lines = dict(line.rsplit(": ", 1) for line in output.out.splitlines())
    assert [pathlib.Path(name).name for name in lines] == [*kinds]
    assert len(output.err.splitlines()) == len(bad)
    for name, line in zip(bad, output.err.splitlines()):
        assert f"cannot read {tmp_path / name}" in line

    logits = keras.saving.load_model(folder / "model.keras").predict(
        np.asarray(picture)[None, :, :, None].astype("float32") / 127.5 - 1, verbose=0)[0]
    probabilities = np.exp(logits - logits.max()) / np.exp(logits - logits.max()).sum()
    expected = ", ".join(f"{data.SHAPES[label]} {probabilities[label]:.1%}" for label in np.argsort(-logits)[:3])
    for name in ("grey.png", "rgb.png", "palette.gif", "rgba.png", "deep.png", "la.png"):  # the same picture in other words
        assert lines[str(tmp_path / name)] == expected, name
    assert len(list((folder / "predictions").glob("*.png"))) == len(kinds)
    with pytest.raises(SystemExit) as stopped:
        train.main(["--predict", str(folder)])
    assert stopped.value.code == 2


# ---- README.md ----


def test_readme_commands_are_real(uninterrupted, monkeypatch):
    config = train.read_config(uninterrupted / "mwt")
    monkeypatch.setattr(train, "read_config", lambda folder: config)
    readme = (HERE / "README.md").read_text()
    commands = [shlex.split(command, comments=True) for command in re.findall(r"python train\.py([^\n`|]*)", readme)]
    assert ["--method", "mwt", "--dataset", "shapes"] in commands
    assert ["--method", "mwt", "--dataset", "mnist"] in commands
    for command in commands:
        if "--help" not in command:
            train.parse(command)
    assert "pip install -r requirements.txt && pytest test_all.py" in readme
    assert "pytest test_all.py" in (HERE / ".ci" / "run").read_text()
    for picture in re.findall(r"!\[[^]]*\]\(([^)]+)\)", readme):
        assert (HERE / picture).stat().st_size < 300_000
