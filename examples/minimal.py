"""The shortest way to see, and to control, the Fisher information.

python examples/minimal.py && tensorboard --logdir=logs
"""

import keras

import keras_fisher

keras.utils.set_random_seed(0)
train, test = keras_fisher.datasets.load("digits", ["train", "test"])
train = train.cache().shuffle(2000, seed=0).batch(128, drop_remainder=True)
test = test.batch(128).cache()

network = keras.Sequential(
    [
        keras.Input((8, 8, 1)),
        keras.layers.Conv2D(32, 3, activation="relu"),
        keras.layers.Flatten(),
        keras.layers.Dense(64, activation="relu"),
        keras.layers.Dense(10),
    ]
)
penalty = keras_fisher.FisherPenalty(warmup_steps=0)  # of 220 steps in all
model = keras_fisher.FisherModel(network, penalty=penalty)
model.compile(
    keras.optimizers.SGD(0.03, momentum=0.9),
    keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    metrics=["accuracy"],
)
board = keras_fisher.callbacks.FisherTensorBoard("logs")
model.fit(train, validation_data=test, epochs=20, callbacks=[board])

trace = keras_fisher.fisher_trace(model, test)
print(f"Tr(F): {trace} on the test set")
accuracy = model.evaluate(test, return_dict=True, verbose=0)["accuracy"]
print(f"Test accuracy: {100 * accuracy:.1f} %")
