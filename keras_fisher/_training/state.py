"""What a resumed run needs to go on as if it had never stopped."""

from __future__ import annotations

import weakref

import keras
import numpy as np
import tensorflow as tf

from keras_fisher._common import dtypes
from keras_fisher._training.measurements import NOT_MEASURED
from keras_fisher._training.measurements import Observed
from keras_fisher._training.measurements import is_something

# What it, and a moving α, have in the logs.
LOGGED = (
    *("fisher_trace", "fisher_penalty", "fisher_nonfinite", "fisher_ratio"),
    "fisher_alpha",
)


def _quantize_nothing(*args, **kwargs) -> None:
    """In place of `quantize`: there is nothing to compute with."""


class FisherState(keras.layers.Layer):
    """Variables that are saved with a model: last values, reused gradient.

    The random state of the model is saved with them. Keras itself saves no
    seed generators, so that dropout would start again from its seed.

    Args:
        dtype: Dtype of the last measured values.
        synchronization: When replicas take the mean of their values: as they
            write them (`"auto"`), or as all are read together (`"on_read"`).
    """

    def __init__(
        self, dtype="float32", synchronization="auto", name="fisher_state"
    ):
        super().__init__(dtype=dtype, trainable=False, name=name)
        self._synchronization = synchronization
        # What was loaded before there was a variable for it.
        self._loaded = {}
        self.fisher_trace = self._scalar("fisher_trace", NOT_MEASURED)
        self.fisher_penalty = self._scalar("fisher_penalty", 0.0)
        self.fisher_nonfinite = self._scalar("fisher_nonfinite", 0.0, "sum")
        self.fisher_ratio = None
        self._gradients = {}
        self._alpha = lambda: None
        # By weak references, or Keras would take them for variables of this.
        self._owners = {}
        self._random_state = list
        # Keras's would take no more variables afterwards.
        self.quantize = _quantize_nothing
        # Nothing is left to build; not through `build`, after which Keras
        # would take no more variables.
        self.built = True

    def _scalar(
        self, name: str, initial: float, aggregation: str = "mean"
    ) -> keras.Variable:
        return self._variable(
            name,
            (),
            self.dtype,
            keras.initializers.Constant(initial),
            aggregation,
        )

    def _variable(
        self, name, shape, dtype, initializer, aggregation="mean"
    ) -> keras.Variable:
        if name in self._loaded:
            initializer = keras.initializers.Constant(self._loaded.pop(name))
        # What is made in a step that cannot be traced to its end is there for
        # the next try. `add_weight` does not take the synchronization.
        with tf.init_scope(), keras.name_scope(self.name):
            return keras.Variable(
                initializer,
                shape=shape,
                dtype=dtype,
                trainable=False,
                # Of the replicas' values; each has measured its share.
                aggregation=aggregation,
                synchronization=self._synchronization,
                name=name,
            )

    def remember(self, observed: Observed) -> None:
        """Takes up what a step has told."""
        if observed.traces is not None:
            self.fisher_trace.assign(tf.reduce_sum(observed.traces))
        if observed.ratio is not None:
            self.fisher_ratio.assign(observed.ratio)
        if observed.penalty is not None:
            self.fisher_penalty.assign(observed.penalty)
            self.fisher_nonfinite.assign_add(
                tf.cast(~observed.is_usable, self.dtype)
            )

    def last_trace(self) -> tf.Tensor:
        """The last measured Tr(F), a scalar; NaN if there is none yet."""
        return _last(self.fisher_trace)

    def last_ratio(self) -> tf.Tensor:
        """The last ‖∇P‖ / ‖∇L‖, a scalar; NaN if there is none yet."""
        return _last(self.fisher_ratio)

    def carry(
        self,
        seed_generator: keras.random.SeedGenerator,
        layer: keras.layers.Layer,
    ) -> None:
        """Saves and loads also the random state of these two."""
        # In a function, since Keras would track what is an attribute.
        self._random_state = lambda: [
            seed_generator.state,
            *_random_state_of(layer),
        ]

    def begin_penalty(self, alpha: keras.Variable | None) -> None:
        """Forgets what was kept for another penalty.

        Args:
            alpha: α of this one, to be saved and loaded; None for nothing.
        """
        # As the random state: Keras would train a variable of the user's.
        self._alpha = lambda: alpha
        self._loaded = {}
        self.fisher_penalty.assign(0.0)
        if self.fisher_ratio is not None:
            self.fisher_ratio.assign(NOT_MEASURED)
        for variable in self._gradients.values():
            variable.assign(tf.zeros_like(variable))

    def begin_run(self) -> None:
        """Forgets what a bound goes by, which the optimizer does not go on."""
        if self.fisher_ratio is not None:
            self.loss_norm.assign(NOT_MEASURED)
        for name, variable in self._gradients.items():
            if name.startswith("accumulated_"):
                variable.assign(tf.zeros_like(variable))

    def create_gradients(
        self, layer: keras.layers.Layer, kind: str = "gradient"
    ) -> None:
        """Makes room for a gradient of each trainable variable of `layer`.

        What exists stays, so that variables frozen in between lose nothing. It
        goes with its variable if others come before it, as those of LoRA do,
        and variables that are new start from zero.
        """
        named = _named(layer, kind)
        of_another = {
            name: variable
            for name, variable in named
            if self._owner(name) is not variable
        }
        kept = {
            id(self._owner(name)): tf.convert_to_tensor(gradient)
            for name, gradient in self._gradients.items()
            if of_another and name.startswith(f"{kind}_")
        }
        for name, variable in of_another.items():
            # Keras forgets what is taken out, not what is replaced.
            self._gradients.pop(name, None)
            self._gradients[name] = self._variable(
                name,
                variable.shape,
                variable.dtype
                if kind == "gradient"
                else dtypes.at_least_single(variable.dtype).name,
                "zeros",
            )
            self._owners[name] = weakref.ref(variable)
            if id(variable) in kept:
                self._gradients[name].assign(kept[id(variable)])

    def _owner(self, name: str) -> keras.Variable | None:
        """The variable that a stored gradient is of."""
        return self._owners[name]() if name in self._owners else None

    def gradients(
        self, layer: keras.layers.Layer, kind: str = "gradient"
    ) -> list[keras.Variable]:
        """The stored gradient for each trainable variable of `layer`."""
        return [self._gradients[name] for name, _ in _named(layer, kind)]

    def create_bound(self) -> None:
        """Makes room for what a bound goes by."""
        if self.fisher_ratio is None:
            self.fisher_ratio = self._scalar("fisher_ratio", NOT_MEASURED)
            # The mean of ‖∇L‖.
            self.loss_norm = self._scalar("loss_norm", NOT_MEASURED)

    def _saved(self) -> dict[str, keras.Variable]:
        variables = {v.name: v for v in self.weights}
        if (alpha := self._alpha()) is not None:
            variables["fisher_alpha"] = alpha
        for i, variable in enumerate(self._random_state()):
            variables[f"random_state_{i}"] = variable
        return variables

    def save_own_variables(self, store) -> None:
        for name, variable in self._saved().items():
            store[name] = variable

    def load_own_variables(self, store) -> None:
        # Files of models that measured or stored less leave the rest as it is.
        # What there is more of may get its variable later, with the network's.
        saved = self._saved()
        self._loaded = {}
        for name in [*store.keys()]:
            if name in saved:
                saved[name].assign(store[name])
            else:
                self._loaded[name] = np.array(store[name])


def _last(variable: keras.Variable) -> tf.Tensor:
    value = tf.convert_to_tensor(variable)
    return value + dtypes.zero_if(is_something(value), value.dtype)


def _named(layer: keras.layers.Layer, kind: str) -> list[tuple]:
    """The trainable variables, each with the name of what is kept for it."""
    positions = {id(v): i for i, v in enumerate(layer.weights)}
    return [
        (f"{kind}_{positions[id(v)]}", v) for v in layer.trainable_variables
    ]


def _random_state_of(layer: keras.layers.Layer) -> list[keras.Variable]:
    """The state of the seed generators of a layer and all in it."""
    weights = {id(variable) for variable in layer.weights}
    return [v for v in layer.variables if id(v) not in weights]
