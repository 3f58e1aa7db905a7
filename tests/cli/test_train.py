"""``evenkeel train``: what it says, what it keeps, and every way in which it can end."""

from __future__ import annotations

import os
import resource
import signal
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from evenkeel.study import container
from evenkeel.study.arms import Data
from evenkeel.study.checkpoint import load
from evenkeel.study.data import load as load_data
from evenkeel.study.fit import Fit, read_state
from evenkeel.study.training import training_for

REPOSITORY = Path(__file__).resolve().parents[2]
MNIST = Path(os.environ.get("EVENKEEL_MNIST") or REPOSITORY.parent / "shared" / "data" / "mnist")
CPU = torch.device("cpu")
MODEL, STATE = Path("model.safetensors"), Path("model.state.safetensors")
OWN = """
from torch import nn
def net(shape, classes):
    return nn.Sequential(nn.Conv2d(shape[0], 4, 3), nn.ReLU(), nn.Flatten(),
                         nn.Linear(4 * (shape[1] - 2) * (shape[2] - 2), classes))
"""


def flat(text: str) -> str:
    return " ".join(text.split())


@contextmanager
def stopped(monkeypatch):
    """Ctrl-C arrives in the sixth step."""

    def some(fit, run=Fit.run):
        for number, event in enumerate(run(fit)):
            if number == 5:
                signal.raise_signal(signal.SIGINT)
            yield event

    with monkeypatch.context() as patch:
        patch.setattr(Fit, "run", some)
        yield


class TestTrain:
    def test_it_says_what_it_does_and_does_it(self, command):
        code, out, err = command("train", "--epochs", "4")
        assert (code, err) == (0, "")
        assert "digits: 1,347 training and 450 test images, 1x8x8, 10 classes" in out
        assert "Network: standard, relu, 13,818 weights" in out
        assert "conv1_norm: BatchNorm2d(16" in out
        assert "redundant biases dropped: conv1, conv2, fc1" in out
        assert "SGD: learning rate 0.05 (cosine), momentum 0.9, weight decay 0.0005" in out
        assert "4 epochs of 42 steps = 168 steps; about" in out
        assert "epoch 4 of 4: loss 0." in out
        assert "Try: evenkeel evaluate model.safetensors --inference all" in out
        _, card = load(MODEL, CPU)
        assert card.history[-1].accuracy > 0.96
        assert f"Test accuracy {100 * card.history[-1].accuracy:.2f} %" in out
        assert not STATE.exists()

    def test_the_same_command_gives_the_same_file(self, command):
        for name in ("a", "b"):
            assert command("train", "--epochs", "2", "--out", name)[0] == 0
        assert command("train", "--epochs", "2", "--seed", "1", "--out", "c")[0] == 0
        assert Path("a").read_bytes() == Path("b").read_bytes() != Path("c").read_bytes()

    def test_every_option_arrives(self, command):
        words = (
            "--model lenet5 --placement after-activation --statistics layer --activation sigmoid "
            "--epochs 1 --batch-size 100 --learning-rate 0.002 --optimizer Adam "
            "--schedule constant --option betas=[0.8,0.9] --option amsgrad=true "
            "--weight-decay 0.01 --seed 7 --binary --device cpu --out own.bin"
        )
        code, _, err = command("train", *words.split())
        assert (code, err) == (0, "")
        training = load(Path("own.bin"), CPU)[1].training
        arm = training.arm
        assert (arm.model, arm.placement, arm.statistics) == ("lenet5", "after-activation", "layer")
        assert (arm.activation, arm.batch_size, arm.learning_rate) == ("sigmoid", 100, 0.002)
        assert (arm.optimizer, arm.weight_decay) == ("Adam", 0.01)
        assert arm.options == {"betas": [0.8, 0.9], "amsgrad": True}
        assert (training.epochs, training.schedule, training.seed) == (1, "constant", 7)
        assert training.data.binary

    def test_no_norms(self, command):
        code, out, _ = command("train", "--epochs", "1", "--placement", "none")
        assert code == 0
        assert "No norms (--placement none)" in out

    def test_your_own_network(self, command, tmp_path):
        (tmp_path / "mine_to_train.py").write_text(OWN)
        code, out, _ = command("train", "--model", "mine_to_train:net", "--epochs", "1")
        sys.modules.pop("mine_to_train", None)
        assert code == 0
        assert "Network: mine_to_train:net, 1,494 weights" in out

    def test_help_names_the_defaults(self, command):
        code, out, _ = command("train", "--help")
        assert code == 0
        assert "--resume" in out

    @pytest.mark.slow
    @pytest.mark.skipif(not MNIST.is_dir(), reason=f"no MNIST in {MNIST}; set EVENKEEL_MNIST")
    def test_mnist_with_the_defaults_begins_well(self, command, monkeypatch):
        """A few steps only; all four epochs reach 99.3 to 99.5 % and take minutes."""
        with stopped(monkeypatch):
            code, out, _ = command("train", "--data", "mnist", "--data-dir", MNIST)
        assert code == 130
        assert "4 epochs of 937 steps = 3,748 steps" in flat(out)
        state = read_state(STATE)
        assert state.done == 6
        assert state.card.shape == (1, 28, 28)
        assert state.card.shift == pytest.approx([0.1307], abs=1e-4)
        assert state.loss_sum / state.done < 3.5


WORDS = ("train", "--epochs", "12", "--device", "cpu")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The bytes of the network of a training that was never stopped."""
    path = tmp_path_factory.mktemp("whole") / "m"
    training = training_for(Data(), epochs=12, placement="before-activation")
    fit = Fit(training, load_data("digits"), CPU)
    for _ in fit.run():
        pass
    fit.save(path)
    return path.read_bytes()


class TestStop:
    def begin(self, start, epoch: int):
        """A training in its own process that has finished so many epochs."""
        process = start(*WORDS)
        for line in iter(process.stdout.readline, ""):
            if line.startswith(f"epoch {epoch} of 12"):
                return process
        raise AssertionError(process.communicate()[1])

    def finish(self, command, whole) -> str:
        """Goes on to the end in another process, and compares with one that was never stopped."""
        code, out, err = command("train", "--resume")
        assert (code, err) == (0, "")
        assert MODEL.read_bytes() == whole
        assert not STATE.exists()
        return out

    def test_ctrl_c_keeps_everything(self, start, command, tmp_path, whole):
        process = self.begin(start, 2)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
        assert process.returncode == 130
        assert "Traceback" not in err
        assert "all of it is kept. Go on with:\n  evenkeel train --resume\n" in out
        done = read_state(tmp_path / STATE).done
        assert f"Stopped behind step {done:,} of 504" in out
        assert not (tmp_path / MODEL).exists()
        out = self.finish(command, whole)
        assert f"504 steps, {done:,} of them done" in out

    def test_kill_9_keeps_the_finished_epochs(self, start, command, tmp_path, whole):
        process = self.begin(start, 3)
        process.kill()
        process.communicate()
        assert process.returncode == -signal.SIGKILL
        assert len(read_state(tmp_path / STATE).card.history) >= 2
        self.finish(command, whole)

    def test_a_full_disk_at_the_beginning(self, command):
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
        try:
            code, out, err = command(*WORDS)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        assert code == 2
        assert "epoch 1" not in out  # told at once, not behind an epoch's work
        assert "model.state.safetensors cannot be written (File too large)" in flat(err)
        assert "Traceback" not in err
        assert os.listdir() == []

    def test_a_full_disk_at_the_end_loses_nothing(self, command, monkeypatch, tmp_path):
        write = container.write

        def full(path, kind, *rest):
            if kind == "model":
                monkeypatch.setattr("os.fsync", lambda _: exec("raise OSError(28, 'No space')"))
            write(path, kind, *rest)

        monkeypatch.setattr(container, "write", full)
        code, _, err = command("train", "--epochs", "1")
        monkeypatch.undo()
        monkeypatch.chdir(tmp_path)
        assert code == 2
        assert "model.safetensors cannot be written (No space)" in flat(err)
        code, out, _ = command("train", "--resume")
        assert code == 0
        assert "1 epochs of 42 steps = 42 steps, 42 of them done" in out
        assert load(MODEL, CPU)[1].history


class TestResume:
    def stop_early(self, command, monkeypatch, *words):
        """A training that was stopped in its first epoch."""
        with stopped(monkeypatch):
            code, out, err = command("train", "--epochs", "2", *words)
        assert (code, "Stopped behind step 6" in out) == (130, True), err
        return out

    def test_another_file(self, command, monkeypatch):
        out = self.stop_early(command, monkeypatch, "--out", "a.safetensors")
        assert "evenkeel train --resume --out a.safetensors" in out
        assert command("train", "--resume", "--out", "a.safetensors")[0] == 0
        assert Path("a.safetensors").exists()

    def test_your_own_network_is_named_again(self, command, monkeypatch, tmp_path):
        (tmp_path / "mine_again.py").write_text(OWN)
        out = self.stop_early(command, monkeypatch, "--model", "mine_again:net")
        assert "evenkeel train --resume --model mine_again:net" in out
        code, _, err = command("train", "--resume")
        assert code == 2
        assert "whose code is not in the file; say --model mine_again:net if you" in flat(err)
        assert command("train", "--resume", "--model", "mine_again:net")[0] == 0
        sys.modules.pop("mine_again")

    def test_a_stopped_training_is_not_trampled(self, command, monkeypatch):
        self.stop_early(command, monkeypatch)
        before = STATE.read_bytes()
        code, _, err = command("train", "--epochs", "1")
        assert code == 2
        assert "holds a training that was stopped; go on with it by --resume" in flat(err)
        assert STATE.read_bytes() == before
        assert command("train", "--epochs", "1", "--overwrite")[0] == 0
        assert not STATE.exists()

    def test_a_damaged_state(self, command, monkeypatch):
        self.stop_early(command, monkeypatch)
        STATE.write_bytes(STATE.read_bytes()[:-1])
        code, _, err = command("train", "--resume")
        assert code == 2
        assert "model.state.safetensors: is no safetensors file that can be read" in flat(err)

    def test_an_existing_network_stays_until_the_new_one_is_done(self, command, monkeypatch):
        assert command("train", "--epochs", "1")[0] == 0
        before = MODEL.read_bytes()
        self.stop_early(command, monkeypatch, "--overwrite")
        assert MODEL.read_bytes() == before
        assert command("train", "--resume")[0] == 0
        assert MODEL.read_bytes() != before


class TestMistakes:
    @pytest.mark.parametrize(
        ("words", "message"),
        [
            ("--data mnits", "unknown data 'mnits' (did you mean 'mnist'?); choose one of digits"),
            ("--data mnist --data-dir .", "train-images"),
            ("--data mnist --data-dir nowhere", "nowhere"),
            ("--data folder", "'folder' needs the folder"),
            ("--data-dir .", "'digits' has no files, but got the folder"),
            ("--image-size 9", "image_size=9 is for 'folder' only"),
            ("--model vgg16", "unknown model 'vgg16'"),
            ("--model nowhere:net", "'nowhere' of model 'nowhere:net' cannot be imported"),
            ("--placement up", "unknown placement 'up'; choose one of none, before-activation"),
            ("--placement after-addition --model paper --every", "No such option"),
            ("--statistics spatail", "unknown statistics 'spatail' (did you mean 'spatial'?)"),
            ("--statistics c->d", "'c->d'"),
            ("--activation swish", "unknown activation 'swish'; choose one of relu"),
            ("--epochs 0", "Invalid value for '--epochs'"),
            ("--epochs 9999999", "epochs must be a number from 1 to 1,000,000"),
            ("--batch-size 5000", "a batch of 5000 is more than the 1347 training images"),
            ("--batch-size 1", "one value per"),
            ("--learning-rate nan", "learning_rate is nan"),
            ("--optimizer Adamm", "torch.optim has no optimizer 'Adamm'"),
            ("--option momentum", "--option momentum cannot be read; write key=value"),
            ("--option momentum=big", "--option momentum=big cannot be read; write key=value"),
            ("--option momentun=0.9", "torch.optim.SGD refused"),
            ("--option momentum=-1", "torch.optim.SGD refused"),
            ("--option momentum=NaN", "of the optimizer cannot be kept"),
            ("--option momentum=1e999", "give finite numbers, true, false, null or lists"),
            ("--learning-rate inf", "learning_rate is inf; give a finite number"),
            ("--weight-decay inf", "weight_decay is inf; give a finite number"),
            ("--option lr=1", "torch.optim.SGD refused"),
            ("--schedule linear", "unknown schedule 'linear'; choose one of cosine, constant"),
            ("--seed 99999999999", "seed must be a number from 0 to 4,294,967,295"),
            ("--device tpu", "unknown device 'tpu'; choose auto, cpu or cuda"),
            ("--out .", "--out . is a folder; name a file in it"),
            ("--out no/where", "there is no folder no; make it first"),
            ("--resume", "there is no stopped training in model.state.safetensors; start one"),
            ("--resume --epochs 3", "--resume goes on with a training as it was; give only --out"),
            ("--learning-rate 1e30 --placement none", "the training has diverged; choose a lear"),
        ],
    )
    def test_one_clear_line(self, command, words, message):
        code, _, err = command("train", *words.split())
        assert code == 2, err
        assert message in flat(err)
        assert "Traceback" not in err
        assert os.listdir() == []

    def test_a_network_is_not_overwritten(self, command):
        MODEL.write_bytes(b"precious")
        code, _, err = command("train")
        assert code == 2
        assert "model.safetensors is there already; replace it with --overwrite" in flat(err)
        code, _, err = command("train", "--resume")
        assert code == 2
        assert "no stopped training in model.state.safetensors; model.safetensors is fin" in flat(
            err
        )
        assert MODEL.read_bytes() == b"precious"
        assert command("train", "--epochs", "1", "--overwrite")[0] == 0
        assert load(MODEL, CPU)
