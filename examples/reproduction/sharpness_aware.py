"""SAM, to compare the Fisher Penalty with."""

from __future__ import annotations

import keras
import tensorflow as tf


class SharpnessAwareModel(keras.Model):
    """Trains a model by sharpness-aware minimization.

    The gradient of a step is that of the loss L at θ + ρ ∇L(θ) / ‖∇L(θ)‖.
    Statistics of batch normalization are those of the pass at θ.

    Source: Foret, Kleiner, Mobahi, Neyshabur, *Sharpness-Aware Minimization
    for Efficiently Improving Generalization*, ICLR 2021, section 2.

    Args:
        model: A `keras.Model`, which is trained.
        rho: ρ, the distance to look ahead.
    """

    def __init__(self, model: keras.Model, rho: float, **kwargs):
        super().__init__(**kwargs)
        self.model, self.rho = model, rho
        self.built = model.built

    def call(self, inputs, training=None):
        return self.model(inputs, training=training)

    def train_step(self, data):
        x, y, sample_weight = keras.utils.unpack_x_y_sample_weight(data)
        variables = self.trainable_variables

        def loss_and_gradients(values):
            with tf.GradientTape(watch_accessed_variables=False) as tape:
                tape.watch(values)
                outputs = self(x, training=True)
                loss = self.compute_loss(x, y, outputs, sample_weight)
            return outputs, loss, tape.gradient(loss, values)

        values = [variable.value for variable in variables]
        outputs, loss, gradients = loss_and_gradients(values)
        norm = tf.linalg.global_norm(gradients)
        scale = tf.math.divide_no_nan(self.rho, norm)
        ahead = [v + scale * g for v, g in zip(values, gradients)]
        with keras.StatelessScope(state_mapping=[*zip(variables, ahead)]):
            _, _, gradients = loss_and_gradients(ahead)
        self.optimizer.apply(gradients, variables)

        self._loss_tracker.update_state(loss)
        return self.compute_metrics(x, y, outputs, sample_weight)
