"""Backups: what is kept, what is refused, and what is taken instead."""

from __future__ import annotations

import os
import resource
import shutil

import keras
import pytest
import training

from keras_fisher import FisherModel
from keras_fisher import FisherPenalty
from keras_fisher.callbacks import BackupAndRestore

_WEIGHTS, _METADATA = "latest.weights.h5", "training_metadata.json"
_CHECKSUMS = "checksums.json"


def _model(seed=2):
    penalty = FisherPenalty(0.3, every=10)
    return training.compiled(
        FisherModel(training.network(), penalty, seed=seed)
    )


def _fit(model, directory, *callbacks, epochs=4, **kwargs):
    backup = BackupAndRestore(directory, **kwargs)
    return training.fit(model, epochs=epochs, callbacks=[*callbacks, backup])


@pytest.fixture(scope="module")
def whole():
    """The weights of four epochs that nothing has interrupted."""
    model = _model()
    training.fit(model, epochs=4)
    return model.get_weights()


class _Interrupt(keras.callbacks.Callback):
    def on_epoch_begin(self, epoch, logs=None):
        if epoch == 3:
            raise KeyboardInterrupt


class _InterruptOfBatch(keras.callbacks.Callback):
    def on_train_batch_end(self, batch, logs=None):
        raise KeyboardInterrupt


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory):
    directory = tmp_path_factory.mktemp("interrupted") / "backup"
    with pytest.raises(KeyboardInterrupt):
        _fit(_model(), directory, _Interrupt())
    return directory


@pytest.fixture
def backups(interrupted, tmp_path):
    """A directory with backups of two and of three epochs."""
    assert sorted(os.listdir(interrupted)) == ["epoch-2", "epoch-3"]
    return shutil.copytree(interrupted, tmp_path / "backup")


def _change_a_byte(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def _cut(path):
    path.write_bytes(path.read_bytes()[:-1])


def _empty_of_names(path):
    path.write_text("{}")


def _no_mapping(path):
    path.write_text("3")


def test_the_last_backup_is_taken(backups, whole):
    model = _model(seed=99)
    assert _fit(model, backups).epoch == [3]
    training.assert_equal(model.get_weights(), whole)
    assert os.listdir(backups) == [], "deleted at the end"


@pytest.mark.few(3)
@pytest.mark.parametrize(
    "name, damage, fault",
    [
        (_WEIGHTS, os.remove, "missing"),
        (_WEIGHTS, _change_a_byte, "changed"),
        (_METADATA, os.remove, "missing"),
        (_METADATA, _change_a_byte, "changed"),
        (_CHECKSUMS, os.remove, "missing"),
        (_CHECKSUMS, _cut, "damaged"),
        (_CHECKSUMS, _change_a_byte, ""),
        (_CHECKSUMS, _empty_of_names, "damaged"),
        (_CHECKSUMS, _no_mapping, "damaged"),
    ],
)
def test_the_one_before_a_damaged_backup_is_taken(name, damage, fault, backups):
    damage(backups / "epoch-3" / name)
    model = _model()
    backup = BackupAndRestore(backups)
    backup.set_model(model)
    with pytest.warns(UserWarning, match=f"epoch-3 .*{fault}.* of 2 epochs"):
        backup.on_train_begin()
    assert model.optimizer.iterations == 2 * 7
    assert sorted(os.listdir(backups)) == ["epoch-2", "epoch-3"]


@pytest.mark.slow
def test_a_damaged_backup_is_replaced_by_a_good_one(backups, whole):
    _change_a_byte(backups / "epoch-3" / _WEIGHTS)
    model = _model(seed=99)
    with pytest.warns(UserWarning, match="not used"):
        history = _fit(model, backups, delete_checkpoint=False)
    assert history.epoch == [2, 3]
    training.assert_equal(model.get_weights(), whole)
    assert sorted(os.listdir(backups)) == ["epoch-3", "epoch-4"]
    os.remove(backups / "epoch-4" / _METADATA)
    with pytest.warns(UserWarning, match="of 3 epochs is taken"):
        assert _fit(_model(), backups).epoch == [3]


def test_where_all_backups_are_damaged_nothing_is_trained(backups):
    os.remove(backups / "epoch-3" / _WEIGHTS)
    _change_a_byte(backups / "epoch-2" / _WEIGHTS)
    model = _model()
    with pytest.raises(ValueError, match=r"missing.*changed.*delete the dir"):
        _fit(model, backups)
    assert model.optimizer.iterations == 0
    assert sorted(os.listdir(backups)) == ["epoch-2", "epoch-3"]


class _LimitFiles(keras.callbacks.Callback):
    """Lets no file grow beyond a few bytes, as if the disk was full."""

    def __init__(self, epoch, size):
        super().__init__()
        self.epoch, self.size = epoch, size

    def on_epoch_end(self, epoch, logs=None):
        if epoch == self.epoch:
            _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
            resource.setrlimit(resource.RLIMIT_FSIZE, (self.size, hard))


@pytest.fixture
def unlimited():
    """Restores the limit on files."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)

    def restore():
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)

    yield restore
    restore()


# Metadata take 24 bytes, checksums 200, and the weights many thousands.
@pytest.mark.few(1)
@pytest.mark.parametrize("size", [0, 100, 20_000])
def test_where_the_disk_is_full_the_last_good_backup_stays(
    size, tmp_path, unlimited, whole
):
    with pytest.raises(
        OSError, match=r"3 epochs.*MB.*goes on.*2 epochs"
    ) as error:
        _fit(_model(), tmp_path, _LimitFiles(2, size))
    unlimited()
    assert str(tmp_path) in str(error.value)
    assert sorted(os.listdir(tmp_path)) == ["epoch-1", "epoch-2"]
    model = _model(seed=99)
    assert _fit(model, tmp_path).epoch == [2, 3]
    training.assert_equal(model.get_weights(), whole)


def test_a_directory_that_cannot_be_written_is_refused(tmp_path):
    (tmp_path / "file").write_text("in the way")
    model = _model()
    with pytest.raises(ValueError, match=r"`backup_dir`.*file/backup"):
        _fit(model, tmp_path / "file" / "backup")
    assert model.optimizer.iterations == 0
    assert (tmp_path / "file").read_text() == "in the way"


def test_a_backup_that_was_not_finished_is_not_used(tmp_path):
    class Torn(keras.callbacks.Callback):
        def on_epoch_begin(self, epoch, logs=None):
            if epoch == 2:
                self.model.save_weights = self.tear

        def tear(self, filepath, **kwargs):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        _fit(_model(), tmp_path, Torn())
    # As a kill leaves one that is written, and one that is deleted.
    for name in ("incomplete", "obsolete"):
        (tmp_path / name).mkdir()
        (tmp_path / name / _WEIGHTS).write_bytes(b"half of it")
    assert _fit(_model(), tmp_path).epoch == [2, 3]
    assert os.listdir(tmp_path) == [], "deleted at the end"


def test_a_fit_after_a_resumed_one_begins_where_it_is_told(backups):
    model = _model()
    assert _fit(model, backups).epoch == [3]
    assert training.fit(model, epochs=2).epoch == [0, 1]


def test_a_fit_after_one_that_was_interrupted_begins_where_it_is_told(backups):
    model = _model()
    with pytest.raises(KeyboardInterrupt):
        _fit(model, backups, _InterruptOfBatch())
    assert training.fit(model, epochs=2).epoch == [0, 1]


def test_a_backup_has_a_directory():
    with pytest.raises(ValueError, match="backup_dir=''"):
        BackupAndRestore("")


def test_models_that_are_not_built_are_refused_at_once(tmp_path):
    network = keras.Sequential([keras.layers.Dense(3)])
    model = training.compiled(FisherModel(network, 0.1))
    with pytest.raises(ValueError, match=r"not built.*call it on a batch"):
        _fit(model, tmp_path)
    model(training.X[:1])
    assert len(_fit(model, tmp_path).history["loss"]) == 4
