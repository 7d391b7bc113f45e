"""The tab of TensorBoard that answers what happened to Tr(F)."""
