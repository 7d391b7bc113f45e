"""What TensorBoard imports when it starts, whatever the logs are of.

TensorBoard does not start if an entry point cannot be imported, as
`keras_fisher` cannot with another backend of Keras in the environment. What
`load` raises it logs, and goes on without the tab. So this module stands beside
the package, and imports it in `load`.
"""

from __future__ import annotations

from tensorboard.plugins import base_plugin


class FisherTabLoader(base_plugin.TBLoader):
    """Makes the Fisher tab."""

    def load(self, context: base_plugin.TBContext) -> base_plugin.TBPlugin:
        """Makes the plugin.

        Args:
            context: TensorBoard's.

        Raises:
            ImportError: If `keras_fisher` cannot be imported.
        """
        from keras_fisher._fisher_tab import plugin

        return plugin.FisherTab(context)
